//! Ranks that step together.

use forebay_perf_model::Profile;
use forebay_types::Role;

use super::*;
use crate::sharing;

/// `ranks` of one expert-parallel group; each decodes what `put` gives it.
fn group(n: u64, ranks: u16, put: impl Fn(u16, RankView) -> RankView) -> Vec<RankView> {
    let profile = Arc::new(Profile::built_in("h100x2-qwen3-30b-a3b").unwrap());
    let view = |dp_rank| {
        let rank = idle(n).put(|rank| {
            rank.id.dp_rank = dp_rank;
            rank.steps_together = true;
            rank.perf = Arc::new(RankModel::profiled(profile.clone(), 8192));
            rank.can_export = false;
        });
        put(dp_rank, rank)
    };
    (0..ranks).map(view).collect()
}

fn at(n: u64, dp_rank: u16) -> Plan {
    Plan::Aggregated { rank: RankId { incarnation: Incarnation(n), dp_rank } }
}

fn busy(_: u16, rank: RankView) -> RankView {
    rank.decoding(8, 2000)
}

#[test]
fn a_prompt_joins_those_that_wait_in_a_group() {
    let waits = |dp_rank: u16, rank: RankView| match dp_rank {
        0 => busy(0, rank).queued(1, 4000),
        _ => busy(dp_rank, rank),
    };
    let ranks = [group(0, 2, busy), group(1, 2, waits)].concat();
    check("they share their steps", ranks, &prompt(3000), at(1, 1));
}

#[test]
fn a_prompt_that_is_being_computed_has_nothing_to_share() {
    let computes = |dp_rank: u16, rank: RankView| match dp_rank {
        0 => busy(0, rank).put(|rank| {
            rank.load.running += 1;
            rank.load.prefill_tokens += 4000;
        }),
        _ => busy(dp_rank, rank),
    };
    let ranks = [group(0, 2, busy), group(1, 2, computes)].concat();
    let decision = placed(&fleet(ranks), &prompt(3000)).unwrap();
    assert_eq!(
        decision.plan.prefill_rank().incarnation,
        Incarnation(0),
        "{:#?}",
        decision.explanation.table()
    );
}

#[test]
fn within_a_group_the_rank_with_least_context_decodes() {
    let uneven =
        |dp_rank: u16, rank: RankView| rank.decoding(8, [3000, 1000, 2000, 3000][usize::from(dp_rank)]);
    check("context is levelled", group(0, 4, uneven), &prompt(1000), at(0, 1));
    let fewer = |dp_rank: u16, rank: RankView| rank.decoding([9, 9, 7, 8][usize::from(dp_rank)], 1000);
    check("and so are sequences", group(0, 4, fewer), &prompt(1000), at(0, 2));
}

#[test]
fn the_whole_group_counts_as_stalled() {
    let harm = |decodes: [u32; 2]| {
        let ranks = group(0, 2, |dp_rank, rank| rank.decoding(decodes[usize::from(dp_rank)], 1000));
        placed(&fleet(ranks), &prompt(2000)).unwrap().explanation.chosen().terms.harm
    };
    let (level, one_sided) = (harm([16, 16]), harm([32, 0]));
    assert!(level > 0.0 && (one_sided / level - 1.0).abs() < 0.05, "{level} {one_sided}");
}

#[test]
fn a_dense_engine_beside_groups_is_compared_by_price() {
    let ranks = || group(0, 2, |dp_rank, rank| busy(dp_rank, rank).share(0.2));
    check("an idle one takes the prompt", [ranks(), vec![idle(5)]].concat(), &prompt(3000), on(5));
    let crowded = idle(5).decoding(40, 2000).queued(20, 80_000);
    let decision = placed(&fleet([ranks(), vec![crowded]].concat()), &prompt(3000)).unwrap();
    assert_eq!(decision.plan.prefill_rank().incarnation, Incarnation(0), "a crowded one does not");
    let prefill_only = idle(6).role(Role::Prefill);
    assert!(placed(&fleet([ranks(), vec![prefill_only]].concat()), &prompt(3000)).is_ok());
}

#[test]
fn a_snapshot_brought_up_to_date_decides_like_a_new_one() {
    let before = || [group(0, 4, busy), vec![idle(3), idle(5).decoding(9, 700)], group(7, 2, busy)].concat();
    let after = |n: usize, rank: RankView| match n % 3 {
        0 => rank.queued(n as u32 + 1, 900 * n as u64 + 50).share(0.1 * n as f64),
        1 => rank.decoding(n as u32, 1200),
        _ => rank,
    };
    let mut updated = fleet(before());
    let count = updated.ranks().len();
    for index in 0..count {
        updated.update(index, |rank| *rank = after(index, rank.clone()));
        let ranks = before().into_iter().enumerate();
        let rebuilt = fleet(ranks.map(|(n, rank)| if n <= index { after(n, rank) } else { rank }));
        for tokens in [40, 1000, 9000, 20_000] {
            assert_eq!(placed(&updated, &prompt(tokens)), placed(&rebuilt, &prompt(tokens)), "{index}");
        }
    }
    let mut together = fleet(before());
    together.update_all(|index, rank| *rank = after(index, rank.clone()));
    assert_eq!(placed(&together, &prompt(1000)), placed(&updated, &prompt(1000)));
}

#[test]
fn prompts_can_share_only_where_every_rank_that_could_take_them_has_decodes_to_stall() {
    let shared = |ranks: Vec<RankView>| sharing(&fleet(ranks), &prompt(3000));
    let two =
        || [group(0, 4, busy), group(7, 2, |dp_rank, rank| rank.decoding(u32::from(dp_rank), 1000))].concat();
    let found = shared(two()).expect("both groups decode");
    assert_eq!(found.stalled, f64::from(4 * 8 + 1) / 2.0, "in the mean");
    assert_eq!(found.step_tokens, 4 * 8192, "of the larger group");
    assert!(found.stall_seconds > 0.08 && found.way_seconds > 0.005, "{found:?}");

    assert_eq!(shared(vec![idle(0), idle(1)]), None, "no groups");
    assert_eq!(shared([two(), vec![idle(9)]].concat()), None, "a rank that steps alone");
    let decodes_only = idle(9).role(Role::Decode);
    assert!(shared([two(), vec![decodes_only]].concat()).is_some(), "which does not compute prompts");
    assert_eq!(shared([two(), group(9, 2, |_, rank| rank)].concat()), None, "a group without decodes");
    let draining = group(9, 2, |_, rank| rank.state(RankState::Draining));
    assert!(shared([two(), draining].concat()).is_some(), "which takes nothing new");
}
