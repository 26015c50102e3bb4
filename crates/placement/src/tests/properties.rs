//! What holds for any fleet and request.

use forebay_types::{Leaning, Role};
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    choose::Chooser,
    cost,
    filter::{self, Relaxed},
};

prop_compose! {
    fn any_rank()(
        role in prop_oneof![4 => Just(Role::Both), 1 => Just(Role::Prefill), 1 => Just(Role::Decode)],
        state in prop_oneof![8 => Just(RankState::Ready), 1 => Just(RankState::Draining), 1 => Just(RankState::Starting)],
        breaker in prop_oneof![8 => Just(Breaker::Closed), 1 => Just(Breaker::Open), 1 => Just(Breaker::HalfOpen)],
        (decoding, waiting, prefill_tokens) in (0_u32..64, 0_u32..70, 0_u64..60_000),
        (free, share, layout, promised) in (0_u32..=POOL_BLOCKS, 0.0..1.0_f64, 0_u64..2, 0_u32..3),
        leaning in prop_oneof![2 => Just(Leaning::Neither), 1 => Just(Leaning::Prefill), 1 => Just(Leaning::Decode)],
        (can_export, can_import) in (prop::bool::weighted(0.9), prop::bool::weighted(0.9)),
    ) -> RankView {
        idle(0).decoding(decoding, 1000).queued(waiting, prefill_tokens).share(share).role(role).state(state)
            .breaker(breaker).put(|rank| {
                rank.load.blocks_free = free;
                rank.kv_layout = layout;
                rank.reserved.sequences = promised;
                rank.reserved.prefill_tokens = u64::from(promised) * 700;
                rank.leaning = leaning;
                rank.can_export = can_export;
                rank.can_import = can_import;
            })
    }
}

/// Ranks with their overlaps, and a prompt's and an answer's length.
fn any_case(ranks_max: usize) -> impl Strategy<Value = (Vec<(RankView, u32)>, u32, u32)> {
    (vec((any_rank(), 0_u32..600), 1..ranks_max), 1_u32..9000, 1_u32..600)
}

/// Gives the ranks the ids `ids`, in that order.
fn labelled(ranks: &[(RankView, u32)], ids: &[u64]) -> (Snapshot, Vec<(RankId, u32)>) {
    let named = |(rank, n): (&(RankView, u32), &u64)| rank.0.clone().put(|rank| rank.id = id(*n));
    let overlaps = ranks
        .iter()
        .zip(ids)
        .filter(|((_, blocks), _)| *blocks > 0)
        .map(|((_, blocks), n)| (id(*n), *blocks));
    (fleet(ranks.iter().zip(ids).map(named)), overlaps.collect())
}

fn in_order(ranks: &[(RankView, u32)]) -> Vec<u64> {
    (0..ranks.len() as u64).collect()
}

proptest! {
    #[test]
    fn a_decision_is_cheapest_eligible_and_adds_up((ranks, prompt_tokens, output) in any_case(14), seed: u64) {
        let (snapshot, overlaps) = labelled(&ranks, &in_order(&ranks));
        let request = Request { overlaps: &overlaps, output_tokens_expected: output, ..prompt(prompt_tokens) };
        let result = place(&snapshot, &request, Policy::Cost, &Weights::default(), seed);
        prop_assert_eq!(&result, &place(&snapshot, &request, Policy::Cost, &Weights::default(), seed), "deterministic");
        let Ok(decision) = result else { return Ok(()) };
        let chosen = decision.explanation.chosen();
        prop_assert_eq!(chosen.plan, decision.plan);
        for candidate in &decision.explanation.candidates {
            prop_assert!(candidate.total_seconds >= chosen.total_seconds * (1.0 - 1e-9));
            prop_assert_eq!(candidate.terms.total(), candidate.total_seconds);
            let crate::Terms { wait, prefill, transfer, decode, harm, kv_pressure } = candidate.terms;
            for term in [wait, prefill, transfer, decode, harm, kv_pressure] {
                prop_assert!(term.is_finite() && term >= 0.0);
            }
        }
        let (p, d) = (snapshot.rank(decision.plan.prefill_rank()).unwrap(), snapshot.rank(decision.plan.decode_rank()).unwrap());
        for rank in [p, d] {
            prop_assert_eq!(rank.state, RankState::Ready);
            prop_assert!(rank.load.waiting + rank.reserved.sequences < rank.waiting_max);
            prop_assert!(rank.breaker != Breaker::Open || decision.explanation.relaxed == Relaxed::Breakers);
        }
        match decision.plan {
            Plan::Aggregated { .. } => prop_assert_eq!(p.role, Role::Both),
            Plan::Split { .. } => prop_assert!(p.can_hand_over_to(d) && p.role.prefills() && d.role.decodes()),
        }
    }

    /// With equal links, pairing only the best of each side loses nothing.
    #[test]
    fn the_best_of_each_side_give_the_best_pair((mut ranks, prompt_tokens, output) in any_case(48), pinned: bool) {
        if pinned {
            for (n, (rank, _)) in ranks.iter_mut().enumerate() {
                rank.role = if n % 2 == 0 { Role::Prefill } else { Role::Decode };
            }
        }
        let (snapshot, overlaps) = labelled(&ranks, &in_order(&ranks));
        let request = Request { overlaps: &overlaps, output_tokens_expected: output, ..prompt(prompt_tokens) };
        let weights = Weights::default();
        let Ok(decision) = placed(&snapshot, &request) else { return Ok(()) };
        let priced: Vec<_> = filter::judge(&snapshot, &request)
            .iter()
            .filter(|verdict| verdict.eligible(decision.explanation.relaxed))
            .map(|verdict| {
                let (rank, standing) = (&snapshot.ranks()[verdict.index], snapshot.standing(verdict.index));
                cost::price(rank, standing, verdict, &request, &weights)
            })
            .collect();
        let chooser = Chooser { snapshot: &snapshot, weights: &weights, priced: &priced, beginning: None };
        let views: Vec<&RankView> = priced.iter().map(|priced| &snapshot.ranks()[priced.index]).collect();
        let hands_over = |source: &RankView, target: &RankView| {
            source.role.prefills()
                && target.role.decodes()
                && target.leaning != Leaning::Prefill
                && source.can_hand_over_to(target)
        };
        let mut least = f64::INFINITY;
        for p in 0..priced.len() {
            for d in 0..priced.len() {
                let (source, target) = (views[p], views[d]);
                let allowed = if p == d {
                    let only_prefills = source.leaning == Leaning::Prefill
                        && views.iter().any(|target| hands_over(source, target));
                    source.role == Role::Both && !only_prefills
                } else {
                    source.leaning != Leaning::Decode && hands_over(source, target)
                };
                if allowed {
                    least = least.min(chooser.terms(p, d).total());
                }
            }
        }
        let total = decision.explanation.chosen().total_seconds;
        prop_assert!((total / least - 1.0).abs() < 1e-9, "{} {}", total, least);
    }

    #[test]
    fn names_do_not_matter((ranks, prompt_tokens, output) in any_case(14), rotation in 0_usize..14) {
        let request = Request { output_tokens_expected: output, ..prompt(prompt_tokens) };
        let total = |ids: &[u64]| {
            let (snapshot, overlaps) = labelled(&ranks, ids);
            placed(&snapshot, &Request { overlaps: &overlaps, ..request })
                .map(|decision| decision.explanation.chosen().total_seconds)
                .map_err(|error| std::mem::discriminant(&error))
        };
        let mut ids = in_order(&ranks);
        let before = total(&ids);
        ids.rotate_left(rotation % ranks.len());
        ids.reverse();
        prop_assert_eq!(before, total(&ids));
    }

    #[test]
    fn a_rank_worse_in_everything_changes_nothing((ranks, prompt_tokens, output) in any_case(14), seed: u64) {
        let (before, overlaps) = labelled(&ranks, &in_order(&ranks));
        // Ranks of one kind: what the busy one can do, an idler one can do as well.
        let alike = before.ranks().iter().cloned().map(|rank| rank.role(Role::Both).put(|rank| {
            (rank.kv_layout, rank.can_export, rank.can_import) = (1, true, true);
            rank.leaning = Leaning::Neither;
        }));
        let before = fleet(alike);
        let request = Request { overlaps: &overlaps, output_tokens_expected: output, ..prompt(prompt_tokens) };
        let plan = |snapshot| place(snapshot, &request, Policy::Cost, &Weights::default(), seed);
        let Ok(alone) = plan(&before) else { return Ok(()) };
        prop_assume!(alone.explanation.relaxed == Relaxed::Nothing);
        let busy = idle(99).decoding(65, 1000).queued(60, 700_000).share(1.0).put(|rank| rank.load.blocks_free = 0);
        let beside = plan(&fleet(before.ranks().iter().cloned().chain([busy])));
        prop_assert_eq!(alone.plan, beside.unwrap().plan);
    }
}
