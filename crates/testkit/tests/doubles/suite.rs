//! The suite that a real vLLM must pass, run against the doubles.

use std::sync::Arc;

use forebay_testkit::suite::{Outcome, Target, vllm};
use forebay_testkit::{ApiKey, Fault, KvEventOptions, VllmDouble, VllmOptions, VllmVersion};

use crate::common::LONG;

async fn run(mut target: Target) -> Vec<(&'static str, Outcome)> {
    target.timeout = LONG;
    let target = Arc::new(target);
    let mut outcomes = Vec::new();
    for check in vllm() {
        outcomes.push((check.name, check.run(&target).await));
    }
    outcomes
}

fn skipped(outcomes: &[(&'static str, Outcome)]) -> usize {
    for (name, outcome) in outcomes {
        assert!(!matches!(outcome, Outcome::Failed(_)), "{name}: {outcome:?}");
    }
    outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Skipped(_))).count()
}

#[tokio::test]
async fn a_pair_of_doubles_passes_every_check() {
    let p = VllmOptions { scale_out: true, ..VllmOptions::prefill() };
    let (p, d) = (VllmDouble::start(p).await, VllmDouble::start(VllmOptions::decode()).await);
    let mut target = Target::new(p.url());
    target.decode_url = Some(d.url());
    assert_eq!(skipped(&run(target).await), 0);
}

#[tokio::test]
async fn a_single_double_skips_what_it_was_not_started_for() {
    let options = VllmOptions {
        version: VllmVersion::V0_26,
        api_key: Some(ApiKey("secret".into())),
        dev_mode: false,
        prompt_tokens_details: false,
        kv_events: Some(KvEventOptions::default()),
        ..VllmOptions::default()
    };
    let double = VllmDouble::start(options).await;
    let mut target = Target::new(double.url());
    target.api_key = Some(ApiKey("secret".into()));
    assert_eq!(skipped(&run(target).await), 10, "pair, events without discovery, dev mode, salts, tokens in");
}

#[tokio::test]
async fn the_suite_can_fail() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    double.control().inject(Fault::WrongEventBlockSize { tokens: 8 });
    let outcomes = run(Target::new(double.url())).await;
    let failed: Vec<&str> = outcomes
        .iter()
        .filter(|(_, outcome)| matches!(outcome, Outcome::Failed(_)))
        .map(|(name, _)| *name)
        .collect();
    assert_eq!(failed, ["a prompt's full blocks are announced with their tokens"]);
}
