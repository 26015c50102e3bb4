//! Replays in the twin: one run for each way of placing and each seed.

use forebay_engine_wire::metrics::Histogram;
use forebay_fleet::LoadSight;
use forebay_placement::Policy;
use forebay_twin::{
    EngineSpec, Fault, GatewaySettings, Outcome, Rule, Run, RunSettings, SLO, Session, Summary, Time, Trouble,
};
use serde::Serialize;

use crate::infer::Inferred;

/// Times that the speed of engines is brought nearer to the measured one.
const FITS: u32 = 4;

/// How requests find their engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Each where it was seen.
    AsSeen,
    /// One after the other.
    RoundRobin,
    /// As Forebay places: policy `cost`, which knows engines as attached ones are known, by a look a second.
    Forebay,
}

impl Way {
    /// Every one; the one that can be compared with what was measured comes first.
    pub const ALL: [Self; 3] = [Self::AsSeen, Self::RoundRobin, Self::Forebay];

    /// For people and programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::AsSeen => "as-seen",
            Self::RoundRobin => "round-robin",
            Self::Forebay => "forebay",
        }
    }

    fn rule(self) -> Rule {
        match self {
            Self::AsSeen => Rule::Pinned,
            Self::RoundRobin => Rule::Policy(Policy::RoundRobin),
            Self::Forebay => Rule::Policy(Policy::Cost),
        }
    }
}

/// The fleet of the twin.
#[derive(Debug, Clone)]
pub struct Bench {
    /// One for each seat.
    pub engines: Vec<EngineSpec>,
    /// So many times as long as the profile says takes each step.
    pub slow: f64,
}

/// What the twin says of one run. Seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Predicted {
    /// Requests that counted.
    pub requests: usize,
    /// Of those, without a complete answer.
    pub unfinished: usize,
    /// Time to the first token.
    pub ttft_mean: f64,
    /// Its median.
    pub ttft_p50: f64,
    /// Its 90th percentile.
    pub ttft_p90: f64,
    /// Time between two tokens: of all tokens, as engines measure it.
    pub itl_mean: f64,
    /// Share of prompt tokens that was found cached.
    pub cached_share: f64,
    /// GPUs times seconds in which a step ran.
    pub gpu_seconds: f64,
    /// The median and the 90th percentile of TTFT as they would be read off the engines' own buckets.
    #[serde(skip)]
    pub ttft_in_buckets: [f64; 2],
}

impl Bench {
    /// One run over what arrived. `progress` is told how much of it is over, and stops it with `false`.
    pub fn run(
        &self,
        inferred: &Inferred,
        way: Way,
        seed: u64,
        progress: &mut dyn FnMut(f64) -> bool,
    ) -> Predicted {
        let sessions = inferred.sessions(seed);
        self.replay(inferred, &sessions, way, seed, progress)
    }

    fn replay(
        &self,
        inferred: &Inferred,
        sessions: &[Session],
        way: Way,
        seed: u64,
        progress: &mut dyn FnMut(f64) -> bool,
    ) -> Predicted {
        let rule = way.rule();
        let slow = |engine: usize| Fault {
            at: Time::ZERO,
            lasts: None,
            trouble: Trouble::Slow { engine: engine as u32, factor: self.slow },
        };
        let faults = if self.slow == 1.0 { Vec::new() } else { (0..self.engines.len()).map(slow).collect() };
        let settings = RunSettings {
            gateway: GatewaySettings { sight: LoadSight::Sampled, ..GatewaySettings::new(rule, seed) },
            gives_up: false,
            faults,
            warm_up: inferred.warm_up(),
            ..RunSettings::new(self.engines.clone(), rule, seed, inferred.end())
        };
        let ran = Run::new(&settings, sessions).go_with(progress);
        let summary = Summary::of(&ran.outcomes, &SLO, ran.engines, ran.given_up);
        let mut ttft = Histogram::with_bounds(&inferred.measured.ttft.bounds());
        ran.outcomes
            .iter()
            .filter_map(|outcome| outcome.seen.ttft())
            .for_each(|seconds| ttft.observe(seconds));
        Predicted {
            requests: summary.requests,
            unfinished: summary.unfinished,
            ttft_mean: summary.ttft_mean_ms / 1e3,
            ttft_p50: summary.ttft_p50_ms / 1e3,
            ttft_p90: summary.ttft_p90_ms / 1e3,
            itl_mean: itl_mean(&ran.outcomes),
            cached_share: summary.cached_share,
            gpu_seconds: summary.engines.gpu_seconds_busy,
            ttft_in_buckets: [0.5, 0.9].map(|share| ttft.quantile(share).unwrap_or(0.0)),
        }
    }

    /// The factor on the engines' steps with which the twin has the measured time between tokens, where requests ran where
    /// they were seen. `None` if none was measured, or `progress` stopped it.
    pub fn fit(&self, inferred: &Inferred, seed: u64, progress: &mut dyn FnMut(f64) -> bool) -> Option<f64> {
        let measured = inferred.measured.itl.mean().filter(|mean| *mean > 0.0)?;
        let sessions = inferred.sessions(seed);
        let mut slow = self.slow;
        for _ in 0..FITS {
            let bench = Self { engines: self.engines.clone(), slow };
            let itl = bench.replay(inferred, &sessions, Way::AsSeen, seed, progress).itl_mean;
            if itl <= 0.0 {
                return None;
            }
            slow = (slow * measured / itl).clamp(0.01, 100.0);
        }
        Some(slow)
    }
}

/// Over tokens, not over answers: long answers have more of them.
fn itl_mean(outcomes: &[Outcome]) -> f64 {
    let (mut seconds, mut gaps) = (0.0, 0.0);
    for seen in outcomes.iter().map(|outcome| &outcome.seen) {
        if let Some(itl) = seen.itl() {
            let of_answer = f64::from(seen.tokens - 1);
            seconds += itl * of_answer;
            gaps += of_answer;
        }
    }
    if gaps > 0.0 { seconds / gaps } else { 0.0 }
}
