//! The fleet and placement together.

use std::collections::BTreeMap;

use forebay_placement::{Decision, Form, Plan, Policy, Request, Weights, place};

use super::*;

fn placed(fleet: &mut Fleet, now: Duration, request: &Request<'_>, seed: u64) -> Decision {
    place(&fleet.snapshot(now), request, Policy::Cost, &Weights::default(), seed).unwrap()
}

fn prompt(prompt_tokens: u32) -> Request<'static> {
    Request {
        model: "m",
        prompt_tokens,
        overlaps: &[],
        overlap_block_tokens: 16,
        form: Form::Tokens,
        output_tokens_expected: 200,
        output_tokens_max: 500,
        choices: 1,
        excluded: &[],
        beginning: None,
    }
}

/// A step as an engine with these coefficients would measure it.
fn step(prefill_tokens: u32, decodes: u32) -> StepObservation {
    let attention = f64::from(prefill_tokens).powi(2) / 2.0;
    let context_tokens = u64::from(decodes) * 4000;
    StepObservation {
        prefill_tokens,
        prefill_attention: attention,
        decodes,
        context_tokens,
        seconds: StepCoefficients::H100_8B.step_seconds(prefill_tokens, attention, decodes, context_tokens),
    }
}

#[test]
fn placements_made_at_once_spread_because_each_is_reserved() {
    let mut fleet = ready(4, FleetSettings::default());
    let mut counts: BTreeMap<RankId, u32> = BTreeMap::new();
    for n in 0..16 {
        let decision = placed(&mut fleet, ms(1), &prompt(2000), n);
        let (id, amount) = decision.reservations.prefill;
        fleet.apply(ms(1), reserve(n, id, amount));
        *counts.entry(id).or_default() += 1;
    }
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [4, 4, 4, 4]);
}

#[test]
fn a_long_prompt_splits_once_one_rank_is_seen_to_prefill_and_another_to_decode() {
    let mut fleet = ready(2, FleetSettings::default());
    assert!(matches!(placed(&mut fleet, ms(0), &prompt(4000), 1).plan, Plan::Aggregated { .. }), "idle");

    // Rank 0 computes one prompt after another beside two decodes; rank 1 decodes 48 sequences.
    let mut now = Duration::ZERO;
    while now < ms(8000) {
        let prefills = step(4096, 2);
        now += Duration::from_secs_f64(prefills.seconds);
        fleet.apply(now, Event::Step { rank: rank(0, 0), step: prefills });
        for _ in 0..6 {
            fleet.apply(now, Event::Step { rank: rank(1, 0), step: step(0, 48) });
        }
    }
    let load = |decodes: u32| RankLoad {
        running: decodes,
        decoding: decodes,
        context_tokens: u64::from(decodes) * 4000,
        blocks_total: 20_000,
        blocks_free: 20_000 - decodes * 250,
        ..RankLoad::default()
    };
    fleet.apply(now, Event::Load { rank: rank(0, 0), load: load(2), as_of: now });
    fleet.apply(now, Event::Load { rank: rank(1, 0), load: load(48), as_of: now });
    assert!(view(&mut fleet, now, rank(0, 0)).prefill_share > 0.8);
    assert_eq!(view(&mut fleet, now, rank(1, 0)).prefill_share, 0.0);

    let split = Plan::Split { prefill: rank(0, 0), decode: rank(1, 0) };
    assert_eq!(placed(&mut fleet, now, &prompt(4000), 1).plan, split);
    let later = now + ms(20_000);
    assert_eq!(
        placed(&mut fleet, later, &prompt(4000), 1).plan,
        Plan::Aggregated { rank: rank(0, 0) },
        "once its prefills have ended, the rank with fewer decodes does both"
    );
}

#[test]
fn ages_move_in_steps_and_an_unchanged_fleet_gives_the_same_snapshot() {
    let mut fleet = ready(2, FleetSettings::default());
    fleet.apply(ms(100), Event::Load { rank: rank(0, 0), load: RankLoad::default(), as_of: ms(100) });
    let first = fleet.snapshot(ms(105));
    let again = fleet.snapshot(ms(109));
    assert!(std::sync::Arc::ptr_eq(&first, &again));
    let later = fleet.snapshot(ms(150));
    assert!(later.generation > first.generation);
    assert_eq!(later.rank(rank(0, 0)).unwrap().load_age, ms(50));
    assert_eq!(first.rank(rank(0, 0)).unwrap().load_age, ms(0), "a snapshot that is held does not change");
    assert_eq!(fleet.snapshot(ms(120)).generation, later.generation, "time does not go back");
}
