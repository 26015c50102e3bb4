//! The breaker's states against a table.

use super::*;
use crate::{BreakerSettings, breaker::Breaker};

enum Step {
    Ok,
    Failed,
    /// Time passes, in milliseconds.
    Wait(u64),
    Reserve(u64),
    Release(u64),
}
use Step::*;

#[track_caller]
fn check(fact: &str, steps: impl IntoIterator<Item = Step>, expected: View) {
    let settings = BreakerSettings {
        failures_consecutive: 3,
        failure_share: 0.5,
        outcomes: 10,
        back_off: ms(1000),
        back_off_max: ms(3000),
    };
    let mut breaker = Breaker::new(&settings);
    let mut now = ms(0);
    for step in steps {
        match step {
            Ok => breaker.succeeded(now, &settings),
            Failed => breaker.failed(now, &settings),
            Wait(milliseconds) => now += ms(milliseconds),
            Reserve(id) => breaker.reserved(now, ReservationId(id)),
            Release(id) => breaker.released(ReservationId(id)),
        }
    }
    assert_eq!(breaker.view(now), expected, "{fact}");
}

fn opened() -> Vec<Step> {
    vec![Failed, Failed, Failed]
}

fn then(mut before: Vec<Step>, after: impl IntoIterator<Item = Step>) -> Vec<Step> {
    before.extend(after);
    before
}

#[test]
fn a_breaker_follows_its_table() {
    check("a new one is closed", [], View::Closed);
    check("two failures are not enough", [Failed, Failed], View::Closed);
    check("three in a row open it", opened(), View::Open);
    check("a success in between starts the count anew", [Failed, Failed, Ok, Failed, Failed], View::Closed);
    let alternating = || (0..10).map(|n| if n % 2 == 0 { Ok } else { Failed });
    check("half of ten outcomes open it", alternating(), View::Open);
    check("half of nine do not", alternating().take(9), View::Closed);
    check("it rests for the back-off", then(opened(), [Wait(999)]), View::Open);
    check("and is half open then", then(opened(), [Wait(1000)]), View::HalfOpen);
    check("successes of older legs do not end the rest", then(opened(), [Ok, Ok]), View::Open);
    check("failures of older legs do not lengthen it", then(opened(), [Failed, Wait(1000)]), View::HalfOpen);
    check("one probe at a time", then(opened(), [Wait(1000), Reserve(1)]), View::Open);
    check(
        "a promise made during the rest is no probe",
        then(opened(), [Reserve(1), Wait(1000)]),
        View::HalfOpen,
    );
    check(
        "a probe without an outcome makes room",
        then(opened(), [Wait(1000), Reserve(1), Release(1)]),
        View::HalfOpen,
    );
    check("another leg's end does not", then(opened(), [Wait(1000), Reserve(1), Release(2)]), View::Open);
    check(
        "a probe that succeeds closes it",
        then(opened(), [Wait(1000), Reserve(1), Ok, Release(1)]),
        View::Closed,
    );
    let reopened = || then(opened(), [Wait(1000), Reserve(1), Failed, Release(1)]);
    check("a probe that fails opens it again", reopened(), View::Open);
    check("for twice as long", then(reopened(), [Wait(1999)]), View::Open);
    check("and not longer", then(reopened(), [Wait(2000)]), View::HalfOpen);
    check("up to a bound", then(reopened(), [Wait(2000), Failed, Wait(3000)]), View::HalfOpen);
    check("below it not", then(reopened(), [Wait(2000), Failed, Wait(2999)]), View::Open);
    let healed = || then(reopened(), [Wait(2000), Ok]);
    check(
        "after a success the back-off starts over",
        then(healed(), [Failed, Failed, Failed, Wait(1000)]),
        View::HalfOpen,
    );
    check("and so does the count", then(healed(), [Failed, Failed]), View::Closed);
}

#[test]
fn a_snapshot_shows_the_breaker_of_its_moment() {
    let mut fleet = ready(1, FleetSettings::default());
    for _ in 0..3 {
        fleet.apply(ms(0), Event::LegFailed(rank(0, 0)));
    }
    assert_eq!(view(&mut fleet, ms(0), rank(0, 0)).breaker, View::Open);
    assert_eq!(view(&mut fleet, ms(1000), rank(0, 0)).breaker, View::HalfOpen);
    fleet.apply(ms(1001), reserve(1, rank(0, 0), LEG));
    assert_eq!(view(&mut fleet, ms(1001), rank(0, 0)).breaker, View::Open, "the probe is in flight");
    assert_eq!(fleet.apply(ms(1002), Event::LegOk(rank(0, 0))), Applied::Changed);
    assert_eq!(view(&mut fleet, ms(1002), rank(0, 0)).breaker, View::Closed);
    assert_eq!(fleet.apply(ms(1003), Event::LegOk(rank(0, 0))), Applied::Unchanged);
}

#[test]
fn a_pair_whose_hand_overs_fail_rests_longer_each_time() {
    let mut fleet = ready(2, FleetSettings::default());
    let resting =
        |fleet: &mut Fleet, now| fleet.snapshot(now).links.is_resting(Incarnation(0), Incarnation(1));
    let failed = Event::TransferFailed { from: rank(0, 0), to: rank(1, 0) };
    fleet.apply(ms(0), failed.clone());
    fleet.apply(ms(10), failed.clone());
    assert!(resting(&mut fleet, ms(999)));
    assert!(!resting(&mut fleet, ms(1000)), "an echo does not lengthen the rest");
    fleet.apply(ms(1000), failed.clone());
    assert!(resting(&mut fleet, ms(2999)));
    assert!(!resting(&mut fleet, ms(3000)));
    fleet.apply(ms(3000), Event::Transferred { from: rank(0, 0), to: rank(1, 0), bytes: 1, seconds: 0.1 });
    fleet.apply(ms(3000), failed);
    assert!(!resting(&mut fleet, ms(4000)), "a success forgives");
    fleet.apply(ms(4000), Event::Lost(Incarnation(1)));
    let late = Event::TransferFailed { from: rank(0, 0), to: rank(1, 0) };
    assert_eq!(fleet.apply(ms(4000), late), Applied::Ignored(Ignored::Fenced));
}

#[test]
fn cold_pairs_are_those_that_could_and_never_did() {
    let mut fleet = Fleet::new(FleetSettings::default());
    for n in 0..3 {
        let facts = EngineFacts {
            needs_warming: n < 2,
            kv_layout: u64::from(n > 1),
            ..facts(&format!("e{n}"), n, 2)
        };
        fleet.apply(ms(0), Event::Joined(facts));
        fleet.apply(ms(0), Event::Ready(Incarnation(n)));
    }
    let pairs = |fleet: &Fleet| fleet.cold_pairs(10);
    assert_eq!(
        pairs(&fleet),
        [(rank(0, 0), rank(1, 0)), (rank(1, 0), rank(0, 0))],
        "of one layout, once an engine"
    );
    fleet.apply(ms(0), Event::Transferred { from: rank(0, 0), to: rank(1, 0), bytes: 1, seconds: 0.1 });
    assert_eq!(pairs(&fleet), [(rank(1, 0), rank(0, 0))]);
    fleet.apply(ms(0), Event::TransferFailed { from: rank(1, 0), to: rank(0, 0) });
    assert_eq!(pairs(&fleet), [], "it rests first");
}

#[test]
fn a_silent_engine_returns_and_a_fenced_one_does_not() {
    let mut fleet = ready(1, FleetSettings::default());
    let state = |fleet: &mut Fleet| view(fleet, ms(1), rank(0, 0)).state;
    fleet.apply(ms(1), Event::Silent(Incarnation(0)));
    assert_eq!(state(&mut fleet), RankState::Silent);
    fleet.apply(ms(1), Event::Ready(Incarnation(0)));
    assert_eq!(state(&mut fleet), RankState::Ready);
    fleet.apply(ms(1), Event::Fenced(Incarnation(0)));
    fleet.apply(ms(1), Event::Ready(Incarnation(0)));
    assert_eq!(state(&mut fleet), RankState::Fenced);
}
