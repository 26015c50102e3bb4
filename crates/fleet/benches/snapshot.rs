//! Times what one request costs the fleet among 64 ranks: `cargo bench -p forebay-fleet`.
#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_fleet::{EngineFacts, Event, Fleet, FleetSettings, Progress};
use forebay_perf_model::StepCoefficients;
use forebay_placement::{Reserved, Snapshot};
use forebay_types::{FirstToken, Incarnation, RankId, RankLoad, ReservationId, Role, StepObservation};

const RANKS: u64 = 64;
/// The quickest of many short rounds: on a shared machine the rest measures the neighbours.
const ROUNDS: u64 = 100;
const REQUESTS: u64 = 1_000;

fn rank(n: u64) -> RankId {
    RankId { incarnation: Incarnation(n % RANKS), dp_rank: 0 }
}

fn fleet() -> Fleet {
    let mut fleet = Fleet::new(FleetSettings::default());
    for n in 0..RANKS {
        let facts = EngineFacts {
            engine: format!("sim-{n}").into(),
            incarnation: Incarnation(n),
            model: "m".into(),
            role: Role::Both,
            dp_ranks: 1,
            block_size_tokens: 16,
            block_bytes: 2 << 20,
            blocks_total: 20_000,
            step_tokens_max: 8192,
            context_tokens_max: 32_768,
            waiting_max: 64,
            kv_layout: 1,
            can_export: true,
            can_import: true,
            needs_warming: false,
            first_token: FirstToken::Handed,
            takes_tokens: true,
            takes_body: false,
            steps_together: false,
            profile: None,
            load_sight: forebay_fleet::LoadSight::EveryStep,
            step_prior: StepCoefficients::H100_8B,
        };
        fleet.apply(Duration::ZERO, Event::Joined(facts));
        fleet.apply(Duration::ZERO, Event::Ready(Incarnation(n)));
    }
    fleet
}

/// One request: a snapshot to place it on, its reservation, its progress, and what its rank reports meanwhile.
fn serve(fleet: &mut Fleet, now: Duration, n: u64) -> Arc<Snapshot> {
    let snapshot = fleet.snapshot(now);
    let (id, rank) = (ReservationId(n), rank(n * 7));
    let amount =
        Reserved { prefill_tokens: 256, sequences: 1, decodes: 1, blocks: 16, ..Reserved::default() };
    fleet.apply(now, Event::Reserved { id, rank, amount });
    for progress in [Progress::Accepted { at: now }, Progress::Started, Progress::Decoding] {
        fleet.apply(now, Event::Progress { id, progress });
        fleet.apply(now, Event::Load { rank, load: RankLoad::default(), as_of: now });
    }
    let step =
        StepObservation { prefill_tokens: 256, decodes: 4, seconds: 0.01, ..StepObservation::default() };
    fleet.apply(now, Event::Step { rank, step });
    fleet.apply(now, Event::LegOk(rank));
    fleet.apply(now, Event::Released(id));
    snapshot
}

fn main() {
    for (name, hold) in [("dropped before the next", false), ("held past the next", true)] {
        let mut fleet = fleet();
        let mut quickest = f64::INFINITY;
        let mut held = None;
        for round in 0..ROUNDS {
            let started = Instant::now();
            for turn in 0..REQUESTS {
                let n = round * REQUESTS + turn;
                // 5,000 requests a second.
                let snapshot = serve(&mut fleet, Duration::from_micros(n * 200), n);
                if hold {
                    held = Some(snapshot);
                }
                black_box(&held);
            }
            quickest = quickest.min(started.elapsed().as_secs_f64());
        }
        let micros = quickest * 1e6 / REQUESTS as f64;
        println!("one request's 10 events and snapshot among 64 ranks, snapshot {name}: {micros:.2} µs");
    }
}
