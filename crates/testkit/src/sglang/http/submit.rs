//! Gives a parsed request to the engine: ids, ranks, and what a disaggregated server makes of plain requests.
//!
//! Evidence: SGLang 0.5.23's `managers/scheduler.py` (a request without a room is answered with 400) and
//! `managers/data_parallel_controller.py` (with several ranks, an assertion that nobody catches: the server dies).

use std::sync::Arc;

use super::ask::Asked;
use crate::api::error::ApiError;
use crate::api::generation::{Generation, Wanted};
use crate::engine::pool::Identity;
use crate::engine::request::Work;
use crate::kv::mix;
use crate::sglang::Sglang;
use crate::sglang::options::SglangMode;
use crate::tokenizer;

/// Whether this request kills the server.
pub(super) fn kills(sglang: &Sglang, asked: &Asked) -> bool {
    let options = &sglang.options;
    let unroutable =
        options.mode == SglangMode::Prefill && options.dp > 1 && !asked.has_room && asked.rank.is_none();
    let poisoned = options.poison.as_ref().is_some_and(|poison| {
        asked.ask.prompts.iter().any(|prompt| tokenizer::decode(prompt, false).contains(poison))
    });
    unroutable || poisoned
}

/// Submits all choices.
///
/// # Errors
/// What the scheduler refuses.
pub(super) fn start(sglang: &Arc<Sglang>, asked: Asked) -> Result<Generation, ApiError> {
    let Some(life) = sglang.body.life().filter(|life| !life.dead()) else {
        return Err(ApiError::engine_dead());
    };
    let Asked { ask, rank, has_room } = asked;
    let id = ask.request_id.clone().unwrap_or_else(|| format!("{:032x}", u128::from(sglang.body.unique())));
    if sglang.options.mode != SglangMode::Null && !has_room {
        let message = format!(
            "Invalid request: Disaggregated request received without bootstrap room id. req.rid='{id}'"
        );
        return Err(ApiError::invalid(message));
    }
    let running =
        |id: &str| life.ranks.iter().any(|rank| rank.core.lock().ids().iter().any(|other| other == id));
    if running(&id) {
        return Err(ApiError::invalid(format!("Duplicate request ID detected: {id}")));
    }
    let wanted = (0..ask.choices)
        .map(|choice| {
            let mut sampling = ask.sampling.clone();
            sampling.generator = sampling.generator.map(|seed| match ask.unseeded {
                true => sglang.body.unique(),
                false => mix(seed, choice as u64),
            });
            let identity = Identity {
                salt: ask.salt.clone(),
                adapter: ask.adapter.clone(),
                session: ask.session.clone(),
            };
            let id = if choice == 0 { id.clone() } else { format!("{id}_{choice}") };
            let work = Work {
                id,
                prompt: ask.prompts[0].clone(),
                identity,
                sampling,
                priority: ask.priority,
                transfer: ask.transfer.clone(),
            };
            Wanted { work, text: ask.text.clone(), rank: rank.map(|rank| rank as usize) }
        })
        .collect();
    Ok(Generation::start(&life, ask, id, wanted))
}
