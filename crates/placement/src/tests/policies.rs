//! The policies that do not look at seconds.

use std::collections::BTreeMap;

use forebay_types::Role;

use super::*;

fn plans(ranks: Vec<RankView>, policy: Policy, seeds: std::ops::Range<u64>) -> Vec<Plan> {
    let snapshot = fleet(ranks);
    let warm = [(id(1), 40)];
    let request = Request { overlaps: &warm, ..prompt(640) };
    seeds.map(|seed| place(&snapshot, &request, policy, &Weights::default(), seed).unwrap().plan).collect()
}

#[test]
fn round_robin_takes_eligible_ranks_in_turn_whatever_their_load() {
    let ranks = vec![idle(0), idle(1).state(RankState::Draining), idle(2).queued(50, 100_000), idle(3)];
    assert_eq!(plans(ranks, Policy::RoundRobin, 0..5), [on(0), on(2), on(3), on(0), on(2)]);
}

#[test]
fn round_robin_over_pinned_roles_takes_both_sides_in_turn() {
    let (p, d) = (|n| idle(n).role(Role::Prefill), |n| idle(n).role(Role::Decode));
    let expected = [split(0, 2), split(1, 3), split(0, 4), split(1, 2), split(0, 3), split(1, 4)];
    assert_eq!(plans(vec![p(0), p(1), d(2), d(3), d(4)], Policy::RoundRobin, 0..6), expected);
    let lonely = p(0).put(|rank| rank.kv_layout = 9);
    assert_eq!(plans(vec![lonely, p(1), d(2)], Policy::RoundRobin, 0..2), [split(1, 2), split(1, 2)]);
}

#[test]
fn least_load_counts_sequences_waiting_running_and_reserved() {
    let three = |n| idle(n).put(|rank| rank.reserved.sequences = 3);
    let two_and_two = |n| idle(n).decoding(2, 100).queued(2, 10);
    assert_eq!(plans(vec![two_and_two(0), three(1)], Policy::LeastLoad, 0..1), [on(1)]);
    let pinned =
        vec![two_and_two(0).role(Role::Prefill), three(1).role(Role::Prefill), three(2).role(Role::Decode)];
    assert_eq!(plans(pinned, Policy::LeastLoad, 0..1), [split(1, 2)]);
}

#[test]
fn lmetric_multiplies_new_tokens_and_batch() {
    // Rank 1 holds the whole prompt: (1 + 1) × (24 + 1) = 50 against (640 + 1) × (0 + 1).
    assert_eq!(plans(vec![idle(0), idle(1).decoding(24, 1000)], Policy::LMetric, 0..1), [on(1)]);
    assert_eq!(plans(vec![idle(0).decoding(3, 1000), idle(2)], Policy::LMetric, 0..1), [on(2)]);
}

#[test]
fn random_reaches_every_eligible_rank_about_equally() {
    let mut counts: BTreeMap<Plan, u32> = BTreeMap::new();
    for plan in plans((0..4).map(idle).collect(), Policy::Random, 0..4000) {
        *counts.entry(plan).or_default() += 1;
    }
    assert_eq!(counts.len(), 4);
    // Binomial with n = 4000, p = 1/4: a standard deviation is 27.
    assert!(counts.values().all(|&count| (850..1150).contains(&count)), "{counts:?}");
}

#[test]
fn every_policy_obeys_eligibility_and_lists_what_it_passed_over() {
    for policy in Policy::ALL {
        for seed in 0..8 {
            let snapshot =
                fleet([idle(0).state(RankState::Draining), idle(1), idle(2).breaker(Breaker::Open), idle(3)]);
            let decision = place(&snapshot, &prompt(64), policy, &Weights::default(), seed).unwrap();
            assert!([on(1), on(3)].contains(&decision.plan), "{policy}");
            let explanation = &decision.explanation;
            assert_eq!(explanation.chosen().plan, decision.plan);
            assert_eq!((explanation.candidates.len(), explanation.excluded.len()), (4, 2), "{policy}");
        }
    }
}
