//! Ranks that are kept for a phase.

use super::*;

fn prefills(n: u64) -> RankView {
    idle(n).leaning(Leaning::Prefill)
}

fn decodes(n: u64) -> RankView {
    idle(n).leaning(Leaning::Decode)
}

#[test]
fn a_rank_that_leans_to_prefill_hands_over() {
    let busy = |rank: RankView| rank.decoding(30, 4000);
    check("the long way round", [prefills(0), busy(decodes(1))], &prompt(4000), split(0, 1));
    check("where nobody leans, the idle rank does both", [idle(0), busy(idle(1))], &prompt(4000), on(0));
}

#[test]
fn a_rank_that_leans_to_decode_computes_prompts_for_itself_alone() {
    let queue = || prefills(0).queued(30, 120_000);
    check(
        "the queue there is longer",
        [queue(), decodes(1), decodes(2).decoding(9, 4000)],
        &prompt(4000),
        on(1),
    );
    let decision = placed(&fleet([queue(), decodes(1), decodes(2)]), &prompt(4000)).unwrap();
    let lent = decision
        .explanation
        .candidates
        .iter()
        .find(|candidate| matches!(candidate.plan, Plan::Split { prefill, .. } if prefill != id(0)));
    assert_eq!(lent.map(|candidate| candidate.plan), None);
}

#[test]
fn nobody_is_refused_for_a_leaning() {
    check("alone", [prefills(0)], &prompt(64), on(0));
    check("among its like", [prefills(0).queued(1, 9000), prefills(1)], &prompt(64), on(1));
    let full = decodes(1).put(|rank| rank.load.waiting = WAITING_MAX);
    check("the other is full", [prefills(0), full], &prompt(64), on(0));
    let deaf = decodes(1).queued(9, 90_000).put(|rank| rank.can_import = false);
    check("the other takes no KV", [prefills(0), deaf], &prompt(64), on(0));
    let foreign = decodes(1).queued(9, 90_000).put(|rank| rank.kv_layout = 9);
    check("the other's KV is another", [prefills(0), foreign], &prompt(64), on(0));
    let mut resting = links();
    resting.set_resting([(id(0).incarnation, id(1).incarnation)]);
    let snapshot = Snapshot::new(1, vec![prefills(0), decodes(1).queued(9, 90_000)], resting);
    assert_eq!(placed(&snapshot, &prompt(64)).unwrap().plan, on(0), "the pair rests");
}

#[test]
fn other_policies_know_no_leanings() {
    let snapshot = fleet([prefills(0), decodes(1).queued(3, 900)]);
    let decision = place(&snapshot, &prompt(4000), Policy::LeastLoad, &Weights::default(), 0).unwrap();
    assert_eq!(decision.plan, on(0));
    let leanings: Vec<_> = decision.explanation.ranks.iter().map(|rank| rank.leaning).collect();
    assert!(leanings.contains(&Leaning::Prefill), "the record tells them");
}
