//! The policies that do not look at seconds.

use std::collections::BTreeMap;

use forebay_types::{BlockHash, Role};

use super::*;
use crate::{DynamoKnobs, beginning};

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
fn the_quieter_of_two_drawn_ranks_is_taken() {
    // Of three, the busiest is never taken and the quietest whenever it is drawn: in two pairs of three.
    let ranks = vec![idle(0).decoding(9, 100), idle(2).decoding(4, 100), idle(3)];
    let plans = plans(ranks, Policy::PowerOfTwo, 0..3000);
    let count = |n| plans.iter().filter(|plan| **plan == on(n)).count();
    assert_eq!(count(0), 0);
    assert!((1900..2100).contains(&count(3)), "{} of 3000", count(3));
    assert_eq!(self::plans(vec![idle(5)], Policy::PowerOfTwo, 0..2), [on(5), on(5)]);
}

#[test]
fn prompts_that_begin_alike_go_to_one_rank_unless_it_has_too_much() {
    let asked = |ranks: &[RankView], beginning: u64| {
        let request = Request { beginning: Some(BlockHash(beginning)), ..prompt(640) };
        place(&fleet(ranks.to_vec()), &request, Policy::PrefixAffinity, &Weights::default(), 3).unwrap().plan
    };
    let eight: Vec<RankView> = (0..8).map(idle).collect();
    let mut counts: BTreeMap<Plan, u32> = BTreeMap::new();
    for beginning in 0..4000 {
        let plan = asked(&eight, beginning);
        assert_eq!(asked(&eight, beginning), plan);
        // A rank that leaves moves only what it had.
        if plan != on(7) {
            assert_eq!(asked(&eight[..7], beginning), plan);
        }
        *counts.entry(plan).or_default() += 1;
    }
    assert!(counts.len() == 8 && counts.values().all(|count| (400..600).contains(count)), "{counts:?}");
    // With 3 sequences where the mean is less than 1 it is passed over; with all ranks as busy it is not.
    let Plan::Aggregated { rank } = asked(&eight, 1) else { panic!("one rank") };
    let busy: Vec<RankView> = (0..8).map(|at| idle(at).decoding(3, 100)).collect();
    let mut only = eight;
    only[rank.incarnation.0 as usize] = idle(rank.incarnation.0).decoding(3, 100);
    assert_ne!(asked(&only, 1), on(rank.incarnation.0));
    assert_eq!(asked(&busy, 1), on(rank.incarnation.0));
}

#[test]
fn a_beginning_is_that_of_256_tokens() {
    let chain: Vec<BlockHash> = (0..40).map(BlockHash).collect();
    for (blocks, block_tokens, last) in [
        (40, 16, Some(15)),
        (16, 16, Some(15)),
        (3, 16, Some(2)),
        (0, 16, None),
        (40, 1024, Some(0)),
        (40, 1, Some(39)),
    ] {
        assert_eq!(beginning(&chain[..blocks], block_tokens), last.map(BlockHash), "{blocks} {block_tokens}");
    }
}

#[test]
fn dynamos_cost_counts_blocks_to_prefill_and_to_decode() {
    let take = |ranks: &[RankView], dynamo| {
        let warm = [(id(1), 30)];
        let request = Request { overlaps: &warm, ..prompt(640) };
        let weights = Weights { dynamo, ..Weights::default() };
        place(&fleet(ranks.to_vec()), &request, Policy::Dynamo, &weights, 1).unwrap().plan
    };
    // 40 blocks of prompt. Rank 1 has 30 of them: 10 to prefill and 10 to hold beside 50 in use: 70, against 40 + 40.
    let ranks = [idle(0), idle(1).decoding(1, 800)];
    let standard = DynamoKnobs::default();
    assert_eq!(take(&ranks, standard), on(1));
    assert_eq!(take(&[idle(0), idle(1).decoding(1, 1000)], standard), on(0), "82.5 against 80");
    assert_eq!(take(&ranks, DynamoKnobs { overlap_credit: 0.5, ..standard }), on(0), "85 against 80");
    assert_eq!(take(&ranks, DynamoKnobs { prefill_load_scale: 0.5, ..standard }), on(0), "65 against 60");
    assert_eq!(take(&ranks, DynamoKnobs { active_request_weight: 11.0, ..standard }), on(0), "81 against 80");
    // Drawn by softmax of 0 and 1 over 0.5: 1 / (1 + e^-2) = 88 % take the cheaper.
    let snapshot = fleet(ranks);
    let weights = Weights { dynamo: DynamoKnobs { temperature: 0.5, ..standard }, ..Weights::default() };
    let warm = [(id(1), 30)];
    let request = Request { overlaps: &warm, ..prompt(640) };
    let drawn = (0..4000)
        .filter(|&seed| place(&snapshot, &request, Policy::Dynamo, &weights, seed).unwrap().plan == on(1))
        .count();
    assert!((3450..3600).contains(&drawn), "{drawn} of 4000");
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
