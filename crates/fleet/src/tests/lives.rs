//! Joining, leaving, and what old messages may not do.

use super::*;

const LATE: Applied = Applied::Ignored(Ignored::Fenced);

fn every_kind_about(incarnation: u64) -> Vec<Event> {
    let id = rank(incarnation, 0);
    let other = rank(0, 0);
    vec![
        Event::Ready(id.incarnation),
        Event::TextOnly(id.incarnation),
        Event::Leans(id.incarnation, Leaning::Prefill),
        Event::Draining(id.incarnation),
        Event::Lost(id.incarnation),
        Event::Load { rank: id, load: RankLoad::default(), as_of: ms(0) },
        Event::Step { rank: id, step: StepObservation { decodes: 1, seconds: 1.0, ..Default::default() } },
        reserve(77, id, LEG),
        Event::LegOk(id),
        Event::LegFailed(id),
        Event::Transferred { from: id, to: other, bytes: 1, seconds: 1.0 },
        Event::Transferred { from: other, to: id, bytes: 1, seconds: 1.0 },
    ]
}

#[test]
fn an_engine_starts_serves_drains_and_is_gone() {
    let mut fleet = Fleet::new(FleetSettings::default());
    let state = |fleet: &mut Fleet| fleet.snapshot(ms(0)).rank(rank(5, 1)).map(|rank| rank.state);
    assert_eq!(fleet.apply(ms(0), Event::Joined(facts("e", 5, 2))), Applied::Changed);
    assert_eq!(state(&mut fleet), Some(RankState::Starting));
    fleet.apply(ms(0), Event::Ready(Incarnation(5)));
    assert_eq!(state(&mut fleet), Some(RankState::Ready));
    fleet.apply(ms(0), Event::Draining(Incarnation(5)));
    assert_eq!(state(&mut fleet), Some(RankState::Draining));
    fleet.apply(ms(0), Event::Ready(Incarnation(5)));
    assert_eq!(state(&mut fleet), Some(RankState::Ready), "a drain can be called off");
    fleet.apply(ms(0), Event::Lost(Incarnation(5)));
    assert_eq!(state(&mut fleet), None);
    assert!(fleet.snapshot(ms(0)).ranks().is_empty());
}

#[test]
fn a_leaning_holds_for_all_ranks_of_an_engine_until_the_next() {
    let mut fleet = ready(2, FleetSettings::default());
    fleet.apply(ms(0), Event::Joined(facts("e", 5, 2)));
    assert_eq!(fleet.apply(ms(0), Event::Leans(Incarnation(5), Leaning::Prefill)), Applied::Changed);
    assert_eq!(fleet.apply(ms(0), Event::Leans(Incarnation(5), Leaning::Prefill)), Applied::Unchanged);
    let leaning = |fleet: &mut Fleet, id| fleet.snapshot(ms(0)).rank(id).unwrap().leaning;
    assert_eq!(leaning(&mut fleet, rank(5, 0)), Leaning::Prefill);
    assert_eq!(leaning(&mut fleet, rank(5, 1)), Leaning::Prefill);
    assert_eq!(leaning(&mut fleet, rank(1, 0)), Leaning::Neither);
    fleet.apply(ms(0), Event::Leans(Incarnation(5), Leaning::Neither));
    assert_eq!(leaning(&mut fleet, rank(5, 1)), Leaning::Neither, "shown without anybody coming or going");
}

#[test]
fn ranks_are_sorted_whatever_the_order_of_joins() {
    let mut fleet = Fleet::new(FleetSettings::default());
    for (name, incarnation, dp_ranks) in [("b", 7, 2), ("a", 3, 3), ("c", 5, 1)] {
        fleet.apply(ms(0), Event::Joined(facts(name, incarnation, dp_ranks)));
    }
    let ids: Vec<RankId> = fleet.snapshot(ms(0)).ranks().iter().map(|rank| rank.id).collect();
    assert_eq!(ids, [rank(3, 0), rank(3, 1), rank(3, 2), rank(5, 0), rank(7, 0), rank(7, 1)]);
}

#[test]
fn events_of_lives_that_ended_or_never_began_change_nothing() {
    let mut fleet = ready(2, FleetSettings::default());
    fleet.apply(ms(0), Event::Lost(Incarnation(1)));
    let before = fleet.snapshot(ms(5));
    let mut fenced = 0;
    for stranger in [1, 9] {
        for event in every_kind_about(stranger) {
            assert_eq!(fleet.apply(ms(5), event.clone()), LATE, "{event:?}");
            fenced += 1;
        }
    }
    let beyond = Event::LegFailed(rank(0, 1));
    assert_eq!(fleet.apply(ms(5), beyond), LATE, "a DP rank that the engine does not have");
    assert_eq!(fleet.apply(ms(5), Event::Joined(facts("e1", 1, 1))), Applied::Ignored(Ignored::JoinedBefore));
    assert_eq!(fleet.apply(ms(5), Event::Joined(facts("e9", 0, 1))), Applied::Ignored(Ignored::JoinedBefore));
    assert!(std::sync::Arc::ptr_eq(&before, &fleet.snapshot(ms(5))));
    assert_eq!((fleet.counters().fenced, fleet.counters().joins_refused), (fenced + 1, 2));
}

#[test]
fn a_restarted_engine_ends_its_earlier_life() {
    let mut fleet = ready(2, FleetSettings::default());
    fleet.apply(ms(0), reserve(1, rank(0, 0), LEG));
    fleet.apply(ms(0), Event::Transferred { from: rank(0, 0), to: rank(1, 0), bytes: 1 << 20, seconds: 9.0 });
    let joined = fleet.apply(ms(0), Event::Joined(facts("e0", 8, 1)));
    assert_eq!(joined, Applied::Replaced(Incarnation(0)));
    let snapshot = fleet.snapshot(ms(0));
    assert_eq!(snapshot.ranks().iter().map(|rank| rank.id).collect::<Vec<_>>(), [rank(1, 0), rank(8, 0)]);
    assert_eq!(snapshot.ranks()[1].reserved, Reserved::default());
    assert_eq!(snapshot.links.measured().len(), 0);
    assert_eq!((fleet.reservations(), fleet.counters().reservations_voided), (0, 1));
    assert_eq!(
        fleet.apply(ms(0), Event::Released(ReservationId(1))),
        Applied::Ignored(Ignored::UnknownReservation),
        "what died with its incarnation is not released again"
    );
}

#[test]
fn ranks_have_a_limit_and_a_restart_does_not_need_more() {
    let mut fleet = ready(2, FleetSettings { ranks_max: 2, ..FleetSettings::default() });
    assert_eq!(fleet.apply(ms(0), Event::Joined(facts("e2", 2, 1))), Applied::Ignored(Ignored::RanksFull));
    let restarted = fleet.apply(ms(0), Event::Joined(facts("e1", 3, 1)));
    assert_eq!(restarted, Applied::Replaced(Incarnation(1)));
    assert_eq!(fleet.snapshot(ms(0)).ranks().len(), 2);
}

/// What warming measures between two engines' own connectors: 2 blocks in 15 ms, 32 in 16 ms.
#[test]
fn a_link_of_attached_engines_costs_latency_first() {
    let mut fleet = Fleet::new(FleetSettings::default());
    for n in 0..2 {
        let facts = EngineFacts { needs_warming: true, ..facts(&format!("e{n}"), n, 1) };
        fleet.apply(ms(0), Event::Joined(facts));
        fleet.apply(ms(0), Event::Ready(Incarnation(n)));
    }
    for (blocks, seconds) in [(2, 0.015), (32, 0.016)] {
        let bytes = blocks * (2 << 20);
        fleet.apply(ms(1), Event::Transferred { from: rank(0, 0), to: rank(1, 0), bytes, seconds });
    }
    let snapshot = fleet.snapshot(ms(1));
    let link = snapshot.links.get(Incarnation(0), Incarnation(1));
    let (short, long) = (link.seconds(2 << 20), link.seconds(250 * (2 << 20)));
    assert!((0.010..0.020).contains(&short), "{short}");
    assert!((0.020..0.100).contains(&long), "4,000 tokens: {long}");
    assert!(snapshot.links.is_warm(Incarnation(0), Incarnation(1)));
}

#[test]
fn links_are_measured_by_pair_and_the_stalest_makes_room() {
    let mut fleet = ready(3, FleetSettings { links_max: 2, ..FleetSettings::default() });
    let moved = |from, to, seconds| Event::Transferred {
        from: rank(from, 0),
        to: rank(to, 0),
        bytes: 1 << 30,
        seconds,
    };
    fleet.apply(ms(1), moved(0, 1, 10.0));
    fleet.apply(ms(2), moved(1, 0, 1.0));
    fleet.apply(ms(3), moved(0, 1, 10.0));
    let links = fleet.snapshot(ms(3)).links.clone();
    let seconds = |from, to| links.get(Incarnation(from), Incarnation(to)).seconds(1 << 30);
    assert!(
        seconds(0, 1) > 2.0 * seconds(1, 0) && seconds(1, 0) > 2.0 * seconds(2, 0),
        "each pair has its own"
    );

    fleet.apply(ms(4), moved(2, 0, 1.0));
    let snapshot = fleet.snapshot(ms(4));
    let pairs: Vec<(u64, u64)> = snapshot.links.measured().map(|(from, to, _)| (from.0, to.0)).collect();
    assert_eq!(pairs, [(0, 1), (2, 0)]);
    assert_eq!(fleet.counters().links_evicted, 1);
    assert_eq!(links.measured().len(), 2, "a snapshot that is held does not change");
}
