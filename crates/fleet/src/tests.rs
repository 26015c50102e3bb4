//! Fixtures of the tests.

use std::time::Duration;

use forebay_perf_model::StepCoefficients;
use forebay_placement::{Breaker as View, RankState, RankView, Reserved};
use forebay_types::{
    FirstToken, Incarnation, Leaning, RankId, RankLoad, ReservationId, Role, StepObservation,
};

use crate::{Applied, EngineFacts, Event, Fleet, FleetSettings, Ignored, LoadSight, Progress};

mod breaker;
mod herding;
mod leaks;
mod lives;
mod properties;
mod reservations;
mod scenarios;

pub(crate) fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

pub(crate) fn rank(incarnation: u64, dp_rank: u16) -> RankId {
    RankId { incarnation: Incarnation(incarnation), dp_rank }
}

/// Life `incarnation` of engine `name`, with `dp_ranks` ranks.
pub(crate) fn facts(name: &str, incarnation: u64, dp_ranks: u16) -> EngineFacts {
    EngineFacts {
        engine: name.into(),
        incarnation: Incarnation(incarnation),
        model: "m".into(),
        role: Role::Both,
        dp_ranks,
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
        load_sight: LoadSight::EveryStep,
        step_prior: StepCoefficients::H100_8B,
    }
}

/// `engines` engines of one rank each, ready.
pub(crate) fn ready(engines: u64, settings: FleetSettings) -> Fleet {
    let mut fleet = Fleet::new(settings);
    for n in 0..engines {
        fleet.apply(ms(0), Event::Joined(facts(&format!("e{n}"), n, 1)));
        fleet.apply(ms(0), Event::Ready(Incarnation(n)));
    }
    fleet
}

pub(crate) fn view(fleet: &mut Fleet, now: Duration, id: RankId) -> RankView {
    fleet.snapshot(now).rank(id).expect("the rank lives").clone()
}

pub(crate) fn reserve(id: u64, rank: RankId, amount: Reserved) -> Event {
    Event::Reserved { id: ReservationId(id), rank, amount }
}

pub(crate) fn progress(id: u64, progress: Progress) -> Event {
    Event::Progress { id: ReservationId(id), progress }
}

pub(crate) const LEG: Reserved = Reserved {
    prefill_tokens: 1000,
    context_tokens: 1600,
    output_tokens: 200,
    sequences: 1,
    decodes: 1,
    blocks: 63,
};
