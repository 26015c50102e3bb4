//! Conversations: whether later turns find their earlier ones in a cache.

use forebay_engines::simulated::StepCoefficients;
use forebay_gateway::{
    decisions::{DecisionOrder, DecisionQuery},
    orchestrator::api::Orchestrate as _,
};
use forebay_placement::Policy;
use forebay_types::TokenId;

use crate::rig::{Plan, Rig, prompt, request};

const TURNS: u32 = 5;
const BLOCK_TOKENS: u32 = 16;

/// Of the full blocks before each new user message, from turn two on, the share that came from a cache, at the pace of
/// the embedded engine.
async fn cached_share(policy: Policy) -> f64 {
    let timing = StepCoefficients::CPU_TINY;
    let rig = Rig::start(Plan { policy, timing, ..Plan::default() }).await;
    let (mut before, mut cached) = (0, 0);
    // Three conversations take turns, so that engines are neither idle nor anyone's own.
    let mut histories: Vec<Vec<TokenId>> = (0..3).map(|who| prompt(who, 400)).collect();
    for turn in 0..TURNS {
        for (who, history) in histories.iter_mut().enumerate() {
            // The last token of an answer was drawn and never computed.
            let known = history.len() as u32 - u32::from(turn > 0);
            history.extend(prompt(100 * turn + who as u32, 30));
            let answer = rig.answer(request(&format!("t{turn}-{who}"), history.clone(), 1, 50)).await;
            if turn > 0 {
                before += known / BLOCK_TOKENS;
                cached += answer.usage.expect("it ended well").cached_tokens / BLOCK_TOKENS;
            }
            history.extend(&answer.tokens[0]);
        }
    }
    rig.assert_nothing_leaks().await;
    f64::from(cached) / f64::from(before)
}

#[tokio::test(flavor = "multi_thread")]
async fn later_turns_are_served_from_cache() {
    let share = cached_share(Policy::Cost).await;
    assert!(share >= 0.9, "{share:.2} of the blocks before the new message came from a cache");
}

#[tokio::test(flavor = "multi_thread")]
async fn round_robin_does_not_find_them() {
    let share = cached_share(Policy::RoundRobin).await;
    assert!(share < 0.6, "{share:.2}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_if_says_where_a_turn_would_go_and_leaves_nothing() {
    let rig = Rig::start(Plan { timing: StepCoefficients::CPU_TINY, ..Plan::default() }).await;
    let history = prompt(1, 400);
    let turn = request("turn", history.clone(), 1, 5);
    let cold = rig.orchestrator.what_if(&turn).expect("there are engines");
    assert_eq!(cold.cached_tokens, 0);
    assert_eq!(rig.orchestrator.decisions(&newest(9)).len(), 0, "nothing was decided");
    rig.answer(turn).await;
    rig.until(|rig| {
        let next = request("next", history.clone(), 1, 5);
        rig.orchestrator.what_if(&next).expect("there are engines").cached_tokens >= 384
    })
    .await;
    let next = request("next", history.clone(), 1, 5);
    let said = rig.orchestrator.what_if(&next).expect("there are engines");
    rig.answer(next).await;
    let record = &rig.orchestrator.decisions(&newest(1))[0];
    let chosen = record.placements[0].explanation.chosen();
    assert_eq!(
        (chosen.plan, chosen.cached_tokens),
        (said.plan, said.cached_tokens),
        "it goes where it was said"
    );
    let prediction = record.prediction().expect("it was answered");
    assert_eq!(prediction.cached_tokens_real, said.cached_tokens);
    rig.assert_nothing_leaks().await;
}

fn newest(limit: usize) -> DecisionQuery {
    DecisionQuery { order: DecisionOrder::Newest, engine: None, limit }
}
