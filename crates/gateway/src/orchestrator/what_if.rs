//! Where a request would go now.

use std::sync::atomic::Ordering;

use forebay_placement::Form;
use forebay_routing::{Known, Question};

use super::{
    Shared,
    api::{GenerateRequest, RouteError, WhatIf},
    request::unplaced_error,
};

/// Places a request as it would be placed, and leaves it at that.
pub(super) fn what_if(shared: &Shared, request: &GenerateRequest) -> Result<WhatIf, RouteError> {
    let prompt = shared.prompt(request);
    let question = Question {
        model: &request.model,
        tenant: &request.tenant,
        prompt_tokens: prompt.tokens.len() as u32,
        unit: request.unit,
        form: if request.body.is_some() { Form::Body } else { Form::Tokens },
        output_tokens_max: request.sampling.output_tokens_max,
        choices: request.choices,
        excluded: &[],
        chain: &prompt.hashes,
    };
    let mut known = Known::default();
    shared.caches.look_up(question.unit, &prompt.hashes, &mut known);
    // The next request's turn, which stays that one's.
    let turn = shared.next_turn.load(Ordering::Relaxed);
    let policy = *shared.policy.read();
    let asked = shared.now();
    let answer =
        shared.core.lock().place(asked, &question, &mut known, policy, &shared.settings.weights, turn);
    let took = shared.now().saturating_sub(asked);
    let decision = answer.map_err(|error| unplaced_error(&request.model, &error))?;
    Ok(WhatIf {
        object: "placement",
        plan: decision.plan,
        predicted_ttft_seconds: decision.predicted_ttft_seconds,
        cached_tokens: decision.cached_tokens,
        took_microseconds: took.as_secs_f64() * 1e6,
        explanation: decision.explanation,
    })
}
