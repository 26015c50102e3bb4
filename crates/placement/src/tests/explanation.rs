//! The record of a decision.

use super::*;
use crate::{Explanation, Relaxed};

fn example() -> Decision {
    let ranks = [
        idle(0).decoding(2, 4000).share(0.8),
        idle(1).decoding(48, 4000).put(|rank| rank.reserved.prefill_tokens = 100),
        idle(2).state(RankState::Draining),
        idle(3).put(|rank| rank.load.waiting = WAITING_MAX),
    ];
    let warm = [(id(0), 125)];
    check("a split", ranks, &Request { overlaps: &warm, ..prompt(4000) }, split(0, 1))
}

#[test]
fn an_explanation_as_json() {
    let explanation = example().explanation;
    insta::assert_json_snapshot!(explanation);
    let json = serde_json::to_string(&explanation).unwrap();
    // serde_json reads numbers to within a rounding, so what is compared is what a reader sees.
    let read: Explanation = serde_json::from_str(&json).unwrap();
    assert_eq!(read.table(), explanation.table());
    assert_eq!((read.ranks, read.excluded), (explanation.ranks, explanation.excluded));
}

#[test]
fn an_explanation_as_a_table() {
    let table = example().explanation.table();
    let text: Vec<String> = std::iter::once(table.columns.join(" | "))
        .chain(table.rows.iter().map(|row| row.cells.join(" | ")))
        .collect();
    insta::assert_snapshot!(text.join("\n"));
    assert!(table.rows.iter().all(|row| row.cells.len() == table.columns.len()));
    assert!(table.rows[0].chosen && !table.rows[1..].iter().any(|row| row.chosen));
}

#[test]
fn a_record_is_bounded_whatever_the_fleet() {
    let serving = (0..300).map(|n| idle(n).decoding(n as u32 % 7, 100));
    let draining = (300..400).map(|n| idle(n).state(RankState::Draining));
    let snapshot = fleet(serving.chain(draining));
    for policy in Policy::ALL {
        let decision = place(&snapshot, &prompt(64), policy, &Weights::default(), 298).unwrap();
        let record = &decision.explanation;
        assert!(record.candidates.len() <= 16 && record.ranks.len() <= 32 && record.excluded.len() <= 32);
        // 300 aggregated and 8 × 8 pairs, less those of a rank with itself.
        let compared = record.candidates.len() as u32 + record.candidates_omitted;
        assert!((300 + 56..=300 + 64).contains(&compared), "{policy}: {compared}");
        assert_eq!(record.excluded.len() as u32 + record.excluded_omitted, 100);
        assert_eq!(record.chosen().plan, decision.plan, "{policy}");
        // Every rank has a number: by name, as one of the others, or with the reason why not.
        assert_eq!(record.others.len() + record.ranks.len(), 300, "{policy}");
        assert!(record.others.is_sorted_by_key(|other| other.rank));
        // One of each kind can be compared, however dear.
        let splits = record.candidates.iter().filter(|it| matches!(it.plan, Plan::Split { .. })).count();
        assert!((1..16).contains(&splits), "{policy}: {splits} of {}", record.candidates.len());
        assert!(record.candidates.is_sorted_by(|a, b| a.total_seconds <= b.total_seconds));
    }
}

#[test]
fn another_ranks_number_is_its_cheapest_candidate() {
    let ranks = (0..20).map(|n| idle(n).decoding(2 * n as u32, 500));
    let record = placed(&fleet(ranks), &prompt(64)).unwrap().explanation;
    assert!(!record.others.is_empty());
    for other in &record.others {
        let alone = check(
            "alone",
            [idle(other.rank.incarnation.0).decoding(2 * other.rank.incarnation.0 as u32, 500)],
            &prompt(64),
            on(other.rank.incarnation.0),
        );
        assert!(other.total_seconds <= alone.explanation.chosen().total_seconds);
        let dearest = record.candidates.iter().filter(|it| matches!(it.plan, Plan::Aggregated { .. }));
        assert!(dearest.take(1).all(|it| it.total_seconds <= other.total_seconds));
    }
}

#[test]
fn the_note_says_how_it_was_chosen() {
    let note = |decision: &Decision| decision.explanation.table().rows[0].cells.last().unwrap().clone();
    let tie = placed(&fleet([idle(0), idle(1)]), &prompt(64)).unwrap();
    assert_eq!(note(&tie), "chosen by seed among 2 equal");
    let turn =
        place(&fleet([idle(0), idle(1)]), &prompt(64), Policy::RoundRobin, &Weights::default(), 1).unwrap();
    assert_eq!(note(&turn), "chosen by round-robin");
    let open = placed(&fleet([idle(0).breaker(Breaker::Open)]), &prompt(64)).unwrap();
    assert_eq!(open.explanation.relaxed, Relaxed::Breakers);
    assert_eq!(note(&open), "chosen; nothing but open breakers left");
}

#[test]
fn a_split_says_what_it_saves_against_the_cheapest_rank_alone() {
    let Decision { explanation, .. } = example();
    let weights = Weights::default();
    let savings = explanation.savings(&weights).expect("a split");
    let alone = explanation.candidates.iter().find(|it| matches!(it.plan, Plan::Aggregated { .. })).unwrap();
    let split = explanation.chosen();
    assert_eq!(savings.ttft_seconds, alone.ttft_seconds - split.ttft_seconds);
    let decode = alone.terms.decode - split.terms.decode;
    assert!((savings.decode_seconds * weights.decode - decode).abs() < 1e-12);
    assert!((savings.transfer_seconds * weights.transfer - split.terms.transfer).abs() < 1e-12);
    assert!(savings.transfer_seconds > 0.0);
    let turn = placed(&fleet([idle(0), idle(1)]), &prompt(64)).unwrap();
    assert_eq!(turn.explanation.savings(&weights), None, "on one rank");
}
