//! A long history: whatever order things happen in, nothing promised stays behind.

use super::*;

/// SplitMix64: the history is the same on every machine.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}

fn any_event(draw: &mut Draw, now: Duration, newest_life: &mut u64) -> Event {
    // Some of the ids and lives are always gone, or not there yet.
    let id = ReservationId(draw.below(400));
    let life = newest_life.saturating_sub(draw.below(8));
    let at = rank(life, draw.below(2) as u16);
    match draw.below(100) {
        0 => {
            *newest_life += 1;
            let name = format!("e{}", *newest_life % 6);
            let load_sight = if draw.below(2) == 0 { LoadSight::EveryStep } else { LoadSight::Sampled };
            Event::Joined(EngineFacts { load_sight, ..facts(&name, *newest_life, 2) })
        }
        1 => Event::Lost(Incarnation(life)),
        2..20 => {
            let (waiting, running) = (draw.below(40) as u32, draw.below(40) as u32);
            let load = RankLoad { waiting, running, decoding: running, ..RankLoad::default() };
            Event::Load { rank: at, load, as_of: now.saturating_sub(ms(draw.below(30))) }
        }
        20..45 => {
            let amount = Reserved {
                prefill_tokens: draw.below(9000),
                context_tokens: draw.below(9000),
                output_tokens: draw.below(900),
                sequences: 1,
                decodes: draw.below(4) as u32,
                blocks: draw.below(600) as u32,
            };
            Event::Reserved { id, rank: at, amount }
        }
        45..75 => {
            let progress = match draw.below(4) {
                0 => Progress::Accepted { at: now + ms(draw.below(20)) },
                1 => Progress::Started,
                2 => Progress::Decoding,
                _ => Progress::Generated { tokens: draw.below(900) },
            };
            Event::Progress { id, progress }
        }
        _ => Event::Released(id),
    }
}

#[test]
fn nothing_is_left_of_a_million_events_in_random_order() {
    let mut draw = Draw(20_261_123);
    let mut fleet = Fleet::new(FleetSettings::default());
    let (mut now, mut newest_life) = (Duration::ZERO, 0);
    for _ in 0..1_000_000 {
        now += ms(draw.below(3));
        let event = any_event(&mut draw, now, &mut newest_life);
        fleet.apply(now, event);
    }
    let counters = fleet.counters();
    assert!(
        fleet.reservations() > 20 && counters.reservations_voided > 1000,
        "it was a busy fleet: {counters:?}"
    );
    for id in 0..400 {
        fleet.apply(now, Event::Released(ReservationId(id)));
    }
    assert_eq!(fleet.reservations(), 0);
    for rank in &mut fleet.ranks {
        assert_eq!(rank.reserved, Reserved::default());
        assert!(rank.watched.is_empty());
    }
    // What is left of a load is what others were said to have.
    for rank in fleet.snapshot(now).ranks().iter().map(|view| view.id).collect::<Vec<_>>() {
        fleet.apply(now, Event::Load { rank, load: RankLoad::default(), as_of: now });
        assert_eq!(view(&mut fleet, now, rank).load, RankLoad::default());
    }
}
