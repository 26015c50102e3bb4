//! The smallest fleet that keeps a promise.
//!
//! In: an engine to build it from, what arrives, what is promised. Out: for each [`Shape`] of a fleet the least count of engines
//! that keeps it, and what breaks it with one less. The caller runs the simulations ([`Search`] says which), beside each other if
//! it likes.

use std::{collections::BTreeMap, fmt};

use forebay_types::Role;
use serde::Serialize;

use crate::{
    engine::EngineSpec,
    metrics::{Ending, Outcome, Slo, Summary, percentile},
};

/// Steps of the engines that decode, in a fleet whose engines differ: small, so that answers are smooth, and what a prompt
/// leaves of a step lets hand-overs begin.
const SMALL_STEP_TOKENS: u32 = 832;
const SMALL_CHUNK_TOKENS: u32 = 768;

/// How the engines of a fleet differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Not at all: placement decides for each request.
    Fluid {
        /// Tokens of a step.
        step_tokens_max: u32,
    },
    /// Half of them have small steps, so that they decode for the others; placement decides.
    Mixed,
    /// So many of four only prefill, and the others only decode.
    Split {
        /// 1 to 3.
        prefill_quarters: u32,
    },
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fluid { step_tokens_max } => write!(f, "fluid, steps of {step_tokens_max}"),
            Self::Mixed => write!(f, "fluid, half with steps of {SMALL_STEP_TOKENS}"),
            Self::Split { prefill_quarters } => write!(f, "{prefill_quarters} of 4 prefill"),
        }
    }
}

impl Shape {
    /// Those worth trying with this engine.
    pub fn all(engine: &EngineSpec) -> Vec<Self> {
        let usual = engine.kind.scheduler.step_tokens_max;
        let sequences = engine.kind.scheduler.sequences_max;
        let mut steps = vec![usual, 2048, 1024];
        steps.retain(|&step| step <= usual && step >= sequences);
        steps.dedup();
        let mut shapes: Vec<Self> =
            steps.into_iter().map(|step_tokens_max| Self::Fluid { step_tokens_max }).collect();
        if engine.kind.hands_over() && engine.dp_ranks == 1 {
            if usual > SMALL_STEP_TOKENS && sequences <= SMALL_STEP_TOKENS {
                shapes.push(Self::Mixed);
            }
            shapes.extend((1..=3).map(|prefill_quarters| Self::Split { prefill_quarters }));
        }
        shapes
    }

    /// A fleet of this shape; `None` if it takes more engines than that.
    pub fn fleet(self, engine: &EngineSpec, count: u32) -> Option<Vec<EngineSpec>> {
        let prefills = match self {
            Self::Split { prefill_quarters } => {
                let prefills = (f64::from(count * prefill_quarters) / 4.0).round() as u32;
                if count < 2 {
                    return None;
                }
                prefills.clamp(1, count - 1)
            }
            Self::Fluid { .. } | Self::Mixed => count.div_ceil(2),
        };
        let fleet = (0..count).map(|number| {
            let mut engine = engine.clone();
            let scheduler = &mut engine.kind.scheduler;
            match self {
                Self::Fluid { step_tokens_max } => scheduler.step_tokens_max = step_tokens_max,
                Self::Mixed if number >= prefills => {
                    scheduler.step_tokens_max = SMALL_STEP_TOKENS;
                    scheduler.chunk_tokens_max = SMALL_CHUNK_TOKENS;
                }
                Self::Mixed => {}
                Self::Split { .. } => {
                    engine.role = if number < prefills { Role::Prefill } else { Role::Decode };
                }
            }
            engine
        });
        (count > 0).then(|| fleet.collect())
    }
}

/// What a fleet is to keep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Promise {
    /// Times; `ttft_prefills` counts as in [`Outcome::meets`].
    pub slo: Slo,
    /// Share of requests whose time to the first token keeps it, and as many whose time between tokens does: 0.9 for P90.
    pub share: f64,
}

/// What broke a promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Binds {
    /// Requests were refused, or never ended: queues grow.
    Throughput,
    /// Time to the first token.
    Ttft,
    /// Time between tokens.
    Itl,
}

impl fmt::Display for Binds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Throughput => "throughput: queues grow, or requests are refused",
            Self::Ttft => "time to the first token",
            Self::Itl => "time between tokens",
        })
    }
}

/// One fleet tried.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trial {
    /// Its shape.
    pub shape: Shape,
    /// Its engines.
    pub engines: u32,
    /// Their GPUs.
    pub gpus: u32,
    /// What broke the promise; `None`: it was kept.
    pub binds: Option<Binds>,
    /// Time to the first token at the promised share, seconds; beyond `ttft_prefills` times the prompt's own. Infinite, in JSON null,
    /// where fewer than that share got one.
    pub ttft_seconds: f64,
    /// Mean time between tokens of an answer at that share, seconds.
    pub itl_seconds: f64,
    /// Requests within both, a second of arrivals.
    pub goodput: f64,
    /// The rest of the figures.
    pub summary: Summary,
}

impl Trial {
    /// Judges what clients saw of a fleet in `window_seconds` of arrivals.
    pub fn judge(
        shape: Shape,
        fleet: &[EngineSpec],
        outcomes: &[Outcome],
        summary: Summary,
        promise: &Promise,
        window_seconds: f64,
    ) -> Self {
        let at_share = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            percentile(&values, promise.share)
        };
        let excess = |outcome: &Outcome| {
            Some(outcome.seen.ttft()? - promise.slo.ttft_prefills * outcome.alone_seconds)
        };
        let asked = outcomes.iter().filter(|outcome| outcome.ending != Ending::Left).count();
        let excesses: Vec<f64> = outcomes.iter().filter_map(excess).collect();
        let few = (excesses.len() as f64) < promise.share * asked as f64;
        let ttft_seconds = if few { f64::INFINITY } else { at_share(excesses) };
        let itl_seconds = at_share(outcomes.iter().filter_map(|outcome| outcome.seen.itl()).collect());
        let lost = summary.given_up.is_some() || summary.unfinished > 0;
        let binds = if lost {
            Some(Binds::Throughput)
        } else {
            let over = [
                (ttft_seconds / promise.slo.ttft_seconds, Binds::Ttft),
                (itl_seconds / promise.slo.itl_seconds, Binds::Itl),
            ];
            let worst = over.into_iter().max_by(|one, other| one.0.total_cmp(&other.0));
            worst.filter(|(over, _)| *over > 1.0).map(|(_, binds)| binds)
        };
        Self {
            shape,
            engines: fleet.len() as u32,
            gpus: fleet.iter().map(|engine| engine.gpus).sum(),
            binds,
            ttft_seconds,
            itl_seconds,
            goodput: summary.slo_share * summary.requests as f64 / window_seconds.max(1e-9),
            summary,
        }
    }

    /// Whether the promise was kept.
    pub fn keeps(&self) -> bool {
        self.binds.is_none()
    }
}

/// The least amount that is enough, by doubling up to the most that may be and then by halves.
#[derive(Debug, Clone)]
pub struct Bisection {
    most: u32,
    /// Too little.
    low: u32,
    /// Enough.
    high: Option<u32>,
    next: u32,
}

impl Bisection {
    /// Of `least` to `most`, from a first guess.
    pub fn new(least: u32, most: u32, guess: u32) -> Self {
        Self { most, low: least - 1, high: None, next: guess.clamp(least, most.max(least)) }
    }

    /// Of 1 to `enough`, which is known to be.
    pub fn below(enough: u32) -> Self {
        Self { most: enough, low: 0, high: Some(enough), next: enough / 2 }
    }

    /// What to try next; `None`: it is over.
    pub fn next(&self) -> Option<u32> {
        (self.next > self.low && self.next <= self.most && self.high.is_none_or(|high| self.next < high))
            .then_some(self.next)
    }

    /// Whether `amount` was enough.
    pub fn tried(&mut self, amount: u32, enough: bool) {
        if enough {
            self.high = Some(amount);
        } else {
            self.low = amount;
        }
        self.next = match self.high {
            Some(high) => self.low + (high - self.low) / 2,
            None if self.low >= self.most => self.low,
            None => (self.low * 2).clamp(self.low + 1, self.most),
        };
    }

    /// The least that was enough.
    pub fn found(&self) -> Option<u32> {
        self.high
    }
}

/// The search for one shape's least count of engines.
#[derive(Debug, Clone)]
pub struct Search {
    shape: Shape,
    engines: Bisection,
    /// Every fleet tried, in the order of trying.
    pub trials: Vec<Trial>,
}

impl Search {
    /// Of up to `most` engines, from a first guess.
    pub fn new(shape: Shape, most: u32, guess: u32) -> Self {
        let least = if matches!(shape, Shape::Split { .. }) { 2 } else { 1 };
        Self { shape, engines: Bisection::new(least, most, guess), trials: Vec::new() }
    }

    /// Of which shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// How many engines to try next; `None`: it is over.
    pub fn next(&self) -> Option<u32> {
        self.engines.next()
    }

    /// What came of the trial that [`Search::next`] asked for.
    pub fn tried(&mut self, trial: Trial) {
        self.engines.tried(trial.engines, trial.keeps());
        self.trials.push(trial);
    }

    /// The smallest fleet found that keeps the promise.
    pub fn found(&self) -> Option<&Trial> {
        let kept = self.trials.iter().filter(|trial| trial.keeps());
        kept.min_by_key(|trial| trial.engines)
    }

    /// Of fleets that do not keep it, the largest below that: what it breaks there is what binds.
    pub fn one_less(&self) -> Option<&Trial> {
        let broken = self.trials.iter().filter(|trial| !trial.keeps());
        broken.max_by_key(|trial| trial.engines)
    }
}

/// Parts of an engine's KV pool by which [`with_less_kv`] makes it smaller.
pub const KV_PARTS: u32 = 16;

/// The fleet with `parts` sixteenths of each engine's KV blocks, rounded up: what cards with less memory, or larger weights,
/// leave. A sequence is no longer than the pool then.
pub fn with_less_kv(fleet: &[EngineSpec], parts: u32) -> Vec<EngineSpec> {
    let smaller = |engine: &EngineSpec| {
        let mut engine = engine.clone();
        let scheduler = &mut engine.kind.scheduler;
        let blocks = u64::from(scheduler.blocks_total) * u64::from(parts);
        scheduler.blocks_total = blocks.div_ceil(u64::from(KV_PARTS)) as u32;
        let pool_tokens = scheduler.blocks_total.saturating_mul(scheduler.block_size_tokens);
        scheduler.context_tokens_max = scheduler.context_tokens_max.min(pool_tokens);
        engine
    };
    fleet.iter().map(smaller).collect()
}

/// The best fleet of each number of GPUs, from the smallest up: one that keeps the promise, and of those the one with most
/// goodput. Once one keeps it, larger ones are left out unless they have more goodput: not every shape was tried at every size,
/// and the smaller fleet could be run on theirs.
pub fn frontier<'a>(trials: impl IntoIterator<Item = &'a Trial>) -> Vec<&'a Trial> {
    let mut best = BTreeMap::<u32, &Trial>::new();
    for trial in trials {
        best.entry(trial.gpus)
            .and_modify(|best| {
                let key = |trial: &Trial| (trial.keeps(), trial.goodput);
                if key(trial) > key(best) {
                    *best = trial;
                }
            })
            .or_insert(trial);
    }
    let mut kept = None;
    let is_better = |trial: &&Trial| {
        let is_better = match kept {
            Some(goodput) => trial.keeps() && trial.goodput > goodput,
            None => true,
        };
        if is_better && trial.keeps() {
            kept = Some(trial.goodput);
        }
        is_better
    };
    best.into_values().filter(is_better).collect()
}

/// Counts of engines that say how goodput grows up to `found` and beyond, where those of `tried` leave gaps: at most `points`,
/// up to `most`.
pub fn between(tried: &[u32], found: u32, most: u32, points: u32) -> Vec<u32> {
    let last = (found + found.div_ceil(2)).clamp(1, most.max(1));
    let step = last.div_ceil(points.max(1)).max(1);
    (1..=last).filter(|count| (last - count).is_multiple_of(step) && !tried.contains(count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fleet_file::FleetFile,
        metrics::{Ending, EngineSide, SLO_OF_TESTS, outcome_of_tests as outcome},
    };
    use forebay_perf_model::Profile;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn engine() -> EngineSpec {
        let profile = |name: &str| Ok(Arc::new(Profile::built_in(name).unwrap()));
        FleetFile::of(1).engines(&profile).unwrap().remove(0)
    }

    fn trial(engines: u32, outcomes: &[Outcome], given_up: Option<&'static str>) -> Trial {
        let shape = Shape::Fluid { step_tokens_max: 8192 };
        let fleet = shape.fleet(&engine(), engines).unwrap();
        let summary = Summary::of(outcomes, &SLO_OF_TESTS, EngineSide::default(), given_up);
        let promise = Promise { slo: SLO_OF_TESTS, share: 0.9 };
        Trial::judge(shape, &fleet, outcomes, summary, &promise, 10.0)
    }

    #[test]
    fn what_is_furthest_over_binds() {
        let binds = |ttft, itl| trial(2, &[outcome(ttft, itl), outcome(ttft, itl)], None).binds;
        assert_eq!(binds(0.6, 0.02), None, "0.5 s and twice 0.1 are promised");
        assert_eq!(binds(0.8, 0.02), Some(Binds::Ttft));
        assert_eq!(binds(0.71, 0.05), Some(Binds::Itl));
        let silent = Outcome { seen: crate::Seen::default(), ..outcome(0.1, 0.01) };
        let mostly_silent = trial(2, &[outcome(0.1, 0.01), silent], Some("too slow"));
        assert_eq!(mostly_silent.ttft_seconds, f64::INFINITY, "nobody knows when the other one's came");
        let left = Outcome { ending: Ending::Left, ..silent };
        assert!(trial(2, &[outcome(0.1, 0.01), left], None).ttft_seconds < 0.1);
        let unfinished = Outcome { ending: Ending::Open, ..outcome(0.1, 0.01) };
        assert_eq!(trial(2, &[unfinished], None).binds, Some(Binds::Throughput));
        assert_eq!(trial(2, &[outcome(0.1, 0.01)], Some("the queue grows")).binds, Some(Binds::Throughput));
        // One slow one of eleven is beyond P90.
        let mut many = vec![outcome(0.1, 0.01); 21];
        many[3] = outcome(9.0, 0.01);
        assert!(trial(2, &many, None).keeps());
    }

    #[test]
    fn shapes_give_engines_their_parts() {
        let parts = |shape: Shape, count| {
            let fleet = shape.fleet(&engine(), count)?;
            let of = |role| fleet.iter().filter(|engine| engine.role == role).count();
            let small = fleet.iter().filter(|engine| engine.kind.scheduler.chunk_tokens_max == 768).count();
            Some((of(Role::Prefill), of(Role::Decode), small))
        };
        assert_eq!(parts(Shape::Split { prefill_quarters: 1 }, 8), Some((2, 6, 0)));
        assert_eq!(parts(Shape::Split { prefill_quarters: 3 }, 2), Some((1, 1, 0)));
        assert_eq!(parts(Shape::Split { prefill_quarters: 2 }, 1), None);
        assert_eq!(parts(Shape::Mixed, 5), Some((0, 0, 2)));
        assert_eq!(parts(Shape::Mixed, 0), None);
        assert_eq!(Shape::all(&engine()).len(), 7);
        let mut alone = engine();
        alone.kind.layout = None;
        assert_eq!(Shape::all(&alone).len(), 3, "without hand-overs there are no roles");
    }

    #[test]
    fn a_smaller_pool_holds_shorter_sequences() {
        let fleet = Shape::Fluid { step_tokens_max: 8192 }.fleet(&engine(), 2).unwrap();
        let of = |parts| {
            let scheduler = with_less_kv(&fleet, parts)[1].kind.scheduler;
            (scheduler.blocks_total, scheduler.context_tokens_max)
        };
        let whole = fleet[0].kind.scheduler;
        assert_eq!(of(KV_PARTS), (whole.blocks_total, whole.context_tokens_max));
        let blocks = whole.blocks_total.div_ceil(16);
        assert_eq!(of(1), (blocks, blocks * whole.block_size_tokens));
    }

    #[test]
    fn the_frontier_has_the_best_fleet_of_each_size() {
        let of = |engines, ttft, goodput| Trial { goodput, ..trial(engines, &[outcome(ttft, 0.01)], None) };
        let of_each = [of(4, 0.1, 8.0), of(2, 9.0, 3.0), of(4, 9.0, 8.5), of(2, 9.0, 3.5), of(1, 9.0, 0.5)];
        let found = |trials: &[Trial]| {
            let found = frontier(trials).into_iter().map(|trial| (trial.gpus, trial.goodput));
            found.collect::<Vec<_>>()
        };
        assert_eq!(found(&of_each), [(1, 0.5), (2, 3.5), (4, 8.0)], "a kept promise comes first");
        let larger = [of(5, 9.0, 8.6), of(6, 0.1, 7.9), of(7, 0.1, 8.2)];
        assert_eq!(found(&[&of_each[..], &larger].concat()), [(1, 0.5), (2, 3.5), (4, 8.0), (7, 8.2)]);
    }

    #[test]
    fn gaps_between_trials_are_filled() {
        assert_eq!(between(&[4, 2, 3], 3, 64, 8), [1, 5]);
        assert_eq!(between(&[], 40, 64, 8), [4, 12, 20, 28, 36, 44, 52, 60]);
        assert_eq!(between(&[1], 1, 1, 8), [0; 0]);
    }

    proptest! {
        #[test]
        fn halving_finds_the_least_that_is_enough(least in 1u32..=64, enough in 1u32..=64) {
            let mut parts = Bisection::below(enough);
            let mut tries = 0;
            while let Some(amount) = parts.next() {
                prop_assert!((1..enough).contains(&amount));
                parts.tried(amount, amount >= least);
                tries += 1;
            }
            prop_assert!(tries <= 7);
            prop_assert_eq!(parts.found(), Some(least.min(enough)));
        }

        #[test]
        fn the_least_count_is_found_in_few_trials(least in 1u32..200, most in 1u32..130, guess in 0u32..150) {
            let mut search = Search::new(Shape::Fluid { step_tokens_max: 8192 }, most, guess);
            while let Some(engines) = search.next() {
                prop_assert!((1..=most).contains(&engines));
                let ttft = if engines >= least { 0.1 } else { 9.0 };
                search.tried(trial(engines, &[outcome(ttft, 0.01)], None));
                prop_assert!(search.trials.len() < 18);
            }
            prop_assert_eq!(search.found().map(|trial| trial.engines), (least <= most).then_some(least));
            if least <= most && least > 1 {
                prop_assert_eq!(search.one_less().map(|trial| trial.engines), Some(least - 1));
            }
        }
    }
}
