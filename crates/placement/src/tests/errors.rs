//! What is said when nothing can be placed.

use forebay_types::Role;

use super::*;
use crate::{Exclusion, Missing};

fn refused(ranks: impl IntoIterator<Item = RankView>, request: &Request<'_>) -> PlaceError {
    placed(&fleet(ranks), request).unwrap_err()
}

#[test]
fn an_unknown_model_lists_the_known_ones() {
    let other = |n, name: &str| idle(n).put(|rank| rank.model = name.into());
    let error = refused([other(0, "b"), other(1, "a"), other(2, "b")], &prompt(64));
    assert_eq!(error, PlaceError::NoModel { model: MODEL.into(), known: vec!["a".into(), "b".into()] });
    assert_eq!(error.to_string(), "no engine serves the model `m`; known models: a, b");
    let nobody = refused([], &prompt(64));
    assert_eq!(nobody.to_string(), "no engine serves the model `m`; no engine has joined");
}

#[test]
fn a_missing_role_is_named() {
    let missing = |ranks: Vec<RankView>| match refused(ranks, &prompt(64)) {
        PlaceError::NoRank { missing, .. } => missing,
        other => panic!("{other}"),
    };
    let (p, d) = (|n| idle(n).role(Role::Prefill), |n| idle(n).role(Role::Decode));
    assert_eq!(missing(vec![p(0), p(1)]), Missing::Decode);
    assert_eq!(missing(vec![d(0)]), Missing::Prefill);
    assert_eq!(missing(vec![p(0), d(1).put(|rank| rank.kv_layout = 2)]), Missing::Link);
    assert_eq!(missing(vec![idle(0).state(RankState::Starting)]), Missing::Rank);
    assert_eq!(missing(vec![p(0), d(1).state(RankState::Draining)]), Missing::Decode);
}

#[test]
fn no_rank_says_why_for_each() {
    let error =
        refused([idle(0).state(RankState::Starting), idle(1).state(RankState::Draining)], &prompt(64));
    assert_eq!(
        error.to_string(),
        "no rank can take a request for `m`: none is in service; wait until an engine is ready, or start one \
         (e0: starting, e1: draining)"
    );
    let PlaceError::NoRank { reasons, .. } = &error else { panic!("{error}") };
    assert_eq!(
        reasons.iter().map(|it| it.reason).collect::<Vec<_>>(),
        [Exclusion::Starting, Exclusion::Draining]
    );
    let many = refused((0..20).map(|n| idle(n).state(RankState::Lost)), &prompt(64)).to_string();
    assert!(many.ends_with("e7: lost and 12 more)"), "{many}");
}

#[test]
fn full_queues_say_when_to_come_back() {
    let full = |n, tokens| idle(n).queued(WAITING_MAX, tokens);
    let PlaceError::Saturated { serving, retry_after_seconds } =
        refused([full(0, 400_000), full(1, 100_000), idle(2).state(RankState::Draining)], &prompt(64))
    else {
        panic!("not saturated")
    };
    assert_eq!(serving, 2);
    // 100,000 tokens at 23.5 µs, and 13 steps of 6.3 ms: about 2.5 s.
    assert!((2.4..2.6).contains(&retry_after_seconds), "{retry_after_seconds}");

    let pinned = [full(0, 10).role(Role::Prefill), idle(1).role(Role::Decode)];
    assert!(
        matches!(refused(pinned, &prompt(64)), PlaceError::Saturated { serving: 1, .. }),
        "one side is full"
    );
    let useless = [full(0, 10).role(Role::Prefill)];
    assert!(
        matches!(refused(useless, &prompt(64)), PlaceError::NoRank { .. }),
        "waiting brings no decode rank"
    );
}

#[test]
fn a_prompt_that_fits_nowhere_is_told_the_longest_context() {
    let context = |n, tokens| idle(n).put(|rank| rank.context_tokens_max = tokens);
    let error = refused([context(0, 2048), context(1, 4096)], &prompt(4096));
    assert_eq!(error, PlaceError::TooLong { prompt_tokens: 4096, context_tokens_max: 4096 });
    let pool = idle(0).put(|rank| rank.load.blocks_total = 100);
    let error = refused([pool], &prompt(1600));
    assert_eq!(error, PlaceError::TooLong { prompt_tokens: 1600, context_tokens_max: 1600 });
    assert!(error.to_string().contains("1600"));
    let full = context(0, 8192).put(|rank| rank.load.waiting = WAITING_MAX);
    assert!(matches!(refused([full, context(1, 2048)], &prompt(4096)), PlaceError::Saturated { .. }));
}

#[test]
fn errors_are_values() {
    let error = refused([idle(0).state(RankState::Starting)], &prompt(64));
    let json = serde_json::to_value(&error).unwrap();
    assert_eq!(json["code"], "no_rank");
    assert_eq!(json["reasons"][0]["reason"], "starting");
    assert_eq!(serde_json::from_value::<PlaceError>(json).unwrap(), error);
}
