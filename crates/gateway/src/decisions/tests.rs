use forebay_placement::{Candidate, Explanation, Plan, Policy, Relaxed, RequestInputs, Terms};
use forebay_types::{Incarnation, RankId};

use super::*;

/// A record of a request that found its place at once, and has no leg yet.
pub(crate) fn record(id: &str) -> DecisionRecord {
    DecisionRecord {
        id: id.into(),
        arrived_unix_ms: 0,
        tenant: "t".into(),
        model: "m".into(),
        prompt_tokens: 100,
        choices: 1,
        placements: vec![placement(0.0, 0.5)],
        legs: Vec::new(),
        transfers: Vec::new(),
        ttft_seconds: None,
        e2e_seconds: None,
        cached_tokens: 48,
        output_tokens: 0,
        outcome: "running".into(),
    }
}

fn placement(at_seconds: f64, ttft_seconds: f64) -> Placement {
    let zero = Terms { wait: 0.0, prefill: 0.0, transfer: 0.0, decode: 0.0, harm: 0.0, kv_pressure: 0.0 };
    let candidate = Candidate {
        plan: Plan::Aggregated { rank: RankId { incarnation: Incarnation(1), dp_rank: 0 } },
        terms: zero,
        total_seconds: 0.0,
        ttft_seconds,
        itl_seconds: Some(0.125),
        cached_tokens: 64,
        transfer_blocks: 0,
        transfer_bytes: 0,
    };
    let explanation = Explanation {
        policy: Policy::Cost,
        generation: 1,
        request: RequestInputs { prompt_tokens: 100, output_tokens_expected: 10, choices: 1 },
        relaxed: Relaxed::Nothing,
        candidates: vec![candidate],
        candidates_omitted: 0,
        chosen: 0,
        tied: 1,
        ranks: Vec::new(),
        others: Vec::new(),
        excluded: Vec::new(),
        excluded_omitted: 0,
    };
    Placement { purpose: "first".into(), at_seconds, took_microseconds: 1.0, explanation }
}

fn leg(engine: &str) -> LegRecord {
    LegRecord {
        leg: 1,
        work: "aggregated".into(),
        engine: engine.into(),
        incarnation: 1,
        at_seconds: 0.0,
        started_seconds: None,
        ended_seconds: None,
        cached_tokens: 0,
        output_tokens: 0,
        outcome: "running".into(),
    }
}

#[test]
fn a_prediction_is_that_of_the_placement_that_gave_the_first_token() {
    let mut record = record("a");
    assert_eq!(record.prediction(), None, "no token yet");
    record.placements.push(Placement { purpose: "retry".into(), ..placement(1.0, 0.25) });
    record.placements.push(Placement { purpose: "migration".into(), ..placement(3.0, 9.0) });
    record.ttft_seconds = Some(2.0);
    let prediction = record.prediction().expect("it had a first token");
    assert_eq!((prediction.ttft_seconds, prediction.error_seconds()), (1.25, -0.75));
    assert_eq!((prediction.cached_tokens, prediction.cached_tokens_real), (64, 48));
}

#[test]
fn the_time_between_tokens_is_judged_of_whole_answers_in_one_place() {
    let mut record = DecisionRecord { ttft_seconds: Some(2.0), output_tokens: 10, choices: 2, ..record("a") };
    let itl = |record: &DecisionRecord| record.prediction().expect("it had a first token").itl;
    assert_eq!(itl(&record), None, "it runs");
    record.e2e_seconds = Some(3.0);
    let pace = Pace { seconds: 0.125, seconds_real: 0.25 };
    assert_eq!((itl(&record), pace.error_seconds()), (Some(pace), -0.125), "five tokens each, four gaps");
    record.placements.push(Placement { purpose: "migration".into(), ..placement(2.5, 9.0) });
    assert_eq!(itl(&record), None, "another engine ended it");
    record.placements.pop();
    record.output_tokens = 3;
    assert_eq!(itl(&record), None, "one token each, and a bit");
}

#[test]
fn decisions_are_found_by_error_by_slowness_and_by_engine() {
    let log = DecisionLog::new(4, None);
    for (id, ttft, engine) in [
        ("gone", 0.5, "x"),
        ("good", 0.6, "x"),
        ("quick", 0.1, "y"),
        ("slow", 4.0, "x"),
        ("running", -1.0, "y"),
    ] {
        let ttft_seconds = Some(ttft).filter(|ttft| *ttft > 0.0);
        log.put(DecisionRecord { ttft_seconds, legs: vec![leg(engine)], ..record(id) });
    }
    let ids = |order, engine: Option<&str>, limit| -> Vec<String> {
        let query = DecisionQuery { order, engine: engine.map(Into::into), limit };
        log.find(&query).iter().map(|record| record.id.to_string()).collect()
    };
    assert_eq!(ids(DecisionOrder::Newest, None, 9), ["running", "slow", "quick", "good"]);
    assert_eq!(ids(DecisionOrder::Newest, Some("x"), 9), ["slow", "good"]);
    assert_eq!(ids(DecisionOrder::Slowest, None, 2), ["slow", "good"]);
    assert_eq!(ids(DecisionOrder::WorstError, None, 9), ["slow", "quick", "good"], "0.5 s was predicted");
    assert_eq!(ids(DecisionOrder::WorstError, Some("y"), 9), ["quick"]);
    assert_eq!(ids(DecisionOrder::Slowest, Some("z"), 9), Vec::<String>::new());
}
