//! What counts as reserved, and until when.

use super::*;

fn report(load: RankLoad) -> Event {
    Event::Load { rank: rank(0, 0), load, as_of: ms(0) }
}

fn reserved(fleet: &mut Fleet) -> Reserved {
    view(fleet, ms(0), rank(0, 0)).reserved
}

#[test]
fn each_part_counts_until_a_load_report_shows_it() {
    let mut fleet = ready(1, FleetSettings::default());
    fleet.apply(ms(0), reserve(1, rank(0, 0), LEG));
    assert_eq!(reserved(&mut fleet), LEG);
    fleet.apply(ms(0), report(RankLoad::default()));
    assert_eq!(reserved(&mut fleet), LEG, "a report from before the engine had it");

    fleet.apply(ms(0), progress(1, Progress::Accepted { at: ms(0) }));
    assert_eq!(reserved(&mut fleet), LEG, "no report yet");
    fleet.apply(ms(0), report(RankLoad { waiting: 1, prefill_tokens: 1000, ..RankLoad::default() }));
    let queued = Reserved { prefill_tokens: 0, sequences: 0, ..LEG };
    assert_eq!(reserved(&mut fleet), queued, "the queue is in the report");

    fleet.apply(ms(0), progress(1, Progress::Started));
    fleet.apply(ms(0), report(RankLoad { running: 1, prefill_tokens: 500, ..RankLoad::default() }));
    let running = Reserved { blocks: 0, ..queued };
    assert_eq!(reserved(&mut fleet), running, "and now its blocks");

    fleet.apply(ms(0), progress(1, Progress::Decoding));
    fleet.apply(ms(0), report(RankLoad { running: 1, decoding: 1, ..RankLoad::default() }));
    let decoding = Reserved { output_tokens: 200, ..Reserved::default() };
    assert_eq!(reserved(&mut fleet), decoding, "only expected output is nobody else's to report");

    fleet.apply(ms(0), progress(1, Progress::Generated { tokens: 150 }));
    assert_eq!(reserved(&mut fleet).output_tokens, 50);
    fleet.apply(ms(0), progress(1, Progress::Generated { tokens: 900 }));
    assert_eq!(reserved(&mut fleet).output_tokens, 0, "more than expected is not less than none");

    fleet.apply(ms(0), Event::Released(ReservationId(1)));
    assert_eq!((reserved(&mut fleet), fleet.reservations()), (Reserved::default(), 0));
}

#[test]
fn an_engine_that_reports_nothing_is_known_by_its_reservations() {
    let mut fleet = ready(1, FleetSettings::default());
    fleet.apply(ms(0), reserve(1, rank(0, 0), LEG));
    fleet.apply(ms(0), reserve(2, rank(0, 0), LEG));
    fleet.apply(ms(0), progress(1, Progress::Generated { tokens: 20 }));
    let expected = Reserved {
        prefill_tokens: 1000,
        context_tokens: 3200,
        output_tokens: 380,
        sequences: 2,
        decodes: 2,
        blocks: 126,
    };
    assert_eq!(reserved(&mut fleet), expected, "a prompt that is computed is no prefill ahead");
}

#[test]
fn stages_do_not_go_back() {
    let mut fleet = ready(1, FleetSettings::default());
    fleet.apply(ms(0), reserve(1, rank(0, 0), LEG));
    for stage in [Progress::Decoding, Progress::Accepted { at: ms(0) }, Progress::Started] {
        fleet.apply(ms(0), progress(1, stage));
    }
    fleet.apply(ms(0), report(RankLoad::default()));
    assert_eq!(reserved(&mut fleet), Reserved { output_tokens: 200, ..Reserved::default() });
}

#[test]
fn ids_that_are_unknown_or_in_use_are_counted() {
    let mut fleet = ready(1, FleetSettings { reservations_max: 2, ..FleetSettings::default() });
    let id = ReservationId(1);
    let unknown = Applied::Ignored(Ignored::UnknownReservation);
    assert_eq!(fleet.apply(ms(0), Event::Released(id)), unknown);
    fleet.apply(ms(0), reserve(1, rank(0, 0), LEG));
    assert_eq!(
        fleet.apply(ms(0), reserve(1, rank(0, 0), LEG)),
        Applied::Ignored(Ignored::DuplicateReservation)
    );
    fleet.apply(ms(0), reserve(2, rank(0, 0), LEG));
    assert_eq!(fleet.apply(ms(0), reserve(3, rank(0, 0), LEG)), Applied::Ignored(Ignored::ReservationsFull));
    fleet.apply(ms(0), Event::Released(id));
    assert_eq!(fleet.apply(ms(0), Event::Released(id)), unknown, "released once");
    assert_eq!(fleet.apply(ms(0), progress(1, Progress::Started)), unknown);
    let counters = fleet.counters();
    assert_eq!(
        (counters.reservations_unknown, counters.reservations_duplicate, counters.reservations_refused),
        (3, 1, 1)
    );
    assert_eq!(reserved(&mut fleet), LEG);
}
