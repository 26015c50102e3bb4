//! Which point is measured next, within a time.
//!
//! In: the points, how fast the engine seems to be, what each measurement came to and how long it took. Out: the next point,
//! until there is none. Start at [`Survey::next`].
//!
//! Invariants: no point is begun that is not expected to end within the time; what an engine is too small for is asked of it
//! once; the order depends on the arguments alone.

use crate::{
    jumps::{between, of_prompts},
    point::{Kind, Point, Sample},
    trace::median,
};

/// Measurements of a prompt or a hand-over: each is one number.
const PROMPT_SAMPLES: usize = 5;
/// Measurements of a step: each is the middle of many.
const STEP_SAMPLES: usize = 3;
/// How far apart samples may be, as a share, before there must be more of them.
const SPREAD_SURE: f64 = 0.04;
/// Attempts at a point for each sample that it should have.
const TRIES_PER_SAMPLE: usize = 3;
/// Attempts at a point that never comes about.
const MISSES_MAX: u32 = 2;
/// Share of the time that is left which a point's first measurement may take.
const FIRST_SHARE: f64 = 0.5;
/// Tokens that each sequence of a batch generates while a step is measured.
const STEPS: f64 = 56.0;
/// Sequences that make a step twice as long: a guess, corrected by what is seen.
const SEQUENCES_DOUBLE: f64 = 128.0;
/// Points beyond the plan, to find where steps jump: two jumps between neighbours as far apart as they are in the plan.
const SEARCHES_MAX: usize = 20;
/// Weight of the newest measurement in how long those of its kind take.
const NEWEST: f64 = 0.5;

/// How fast an engine seems to be, from a first look at it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Of a request with nothing in it.
    pub request_seconds: f64,
    /// Of a prompt token.
    pub prefill_token_seconds: f64,
    /// Of a decode step.
    pub step_seconds: f64,
    /// Tokens of a step at most.
    pub step_tokens: u32,
}

impl Pace {
    /// Seconds that measuring `point` takes; of a batch, whether its prompts are cached already.
    fn seconds(&self, point: &Point, prompts_cached: bool) -> f64 {
        let prompt = |tokens: u32| self.request_seconds + self.prefill_token_seconds * f64::from(tokens);
        let batch = |sequences: u32, context: u32| {
            let (sequences, context) = (f64::from(sequences), f64::from(context));
            let computed = if prompts_cached { 0.1 } else { 1.0 } * sequences * context;
            let chunks = 2.0 * sequences * context / f64::from(self.step_tokens.max(1));
            let step = self.step_seconds * (1.0 + sequences / SEQUENCES_DOUBLE);
            self.request_seconds + computed * self.prefill_token_seconds + (STEPS + chunks) * step
        };
        match *point {
            Point::Prefill { new_tokens, cached_tokens } => {
                let first = if prompts_cached || cached_tokens == 0 { 0.0 } else { prompt(cached_tokens) };
                first + prompt(new_tokens)
            }
            Point::Decode { sequences, context_tokens } => batch(sequences, context_tokens),
            Point::Mixed { new_tokens, sequences, context_tokens } => {
                batch(sequences, context_tokens) + 2.0 * prompt(new_tokens)
            }
            Point::Handover { tokens } => {
                2.0 * prompt(tokens) + self.request_seconds + 12.0 * self.step_seconds
            }
        }
    }
}

/// What an attempt at a point came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// A sample.
    Measured(Sample),
    /// Others' requests ran meanwhile: it says nothing.
    Disturbed,
    /// The engine cannot hold so long a prompt, or so many sequences at once.
    TooLarge,
    /// It did not come about: what should be cached was not, a batch was never complete.
    Missed,
}

/// Why a point was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The engine is too small for it.
    TooLarge,
    /// It takes longer than there is time.
    TooSlow,
    /// It never came about.
    Missed,
}

/// A point and what is known of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Which.
    pub point: Point,
    /// What its measurements showed.
    pub samples: Vec<Sample>,
    /// Given up, perhaps with samples.
    pub dropped: Option<Why>,
    tries: usize,
    misses: u32,
}

impl Progress {
    /// A point that was measured so.
    pub fn measured(point: Point, samples: Vec<Sample>) -> Self {
        Self { point, tries: samples.len(), samples, dropped: None, misses: 0 }
    }

    /// Samples that it should have: twice as many once they disagree.
    fn wanted(&self) -> usize {
        let usual = match self.point.kind() {
            Kind::Prefill | Kind::Cached | Kind::Handover => PROMPT_SAMPLES,
            Kind::Decode | Kind::Mixed => STEP_SAMPLES,
        };
        if self.samples.len() < usual || self.spread() <= SPREAD_SURE { usual } else { 2 * usual + 1 }
    }

    /// How far samples usually are from their median, as a share of it.
    pub fn spread(&self) -> f64 {
        let seconds = || self.samples.iter().map(|sample| sample.seconds);
        let Some(middle) = median(seconds()).filter(|middle| *middle > 0.0) else { return 0.0 };
        median(seconds().map(|seconds| (seconds / middle - 1.0).abs())).unwrap_or(0.0)
    }

    fn seconds(&self) -> Option<f64> {
        median(self.samples.iter().map(|sample| sample.seconds))
    }

    fn is_open(&self) -> bool {
        let wanted = self.wanted();
        self.dropped.is_none() && self.samples.len() < wanted && self.tries < TRIES_PER_SAMPLE * wanted
    }
}

/// Measurements under way.
#[derive(Debug, Clone)]
pub struct Survey {
    points: Vec<Progress>,
    pace: Pace,
    /// By how much longer each kind takes than the pace says.
    slower: [f64; Kind::ALL.len()],
    seconds_max: f64,
    disturbed: u32,
    /// Points that were added to find jumps.
    searches: usize,
}

impl Survey {
    /// Measurements of `points` on an engine of this pace, in `seconds_max` at most.
    pub fn new(points: Vec<Point>, pace: Pace, seconds_max: f64) -> Self {
        let mut points: Vec<Progress> =
            points.into_iter().map(|point| Progress::measured(point, Vec::new())).collect();
        points.sort_by(|a, b| pace.seconds(&a.point, false).total_cmp(&pace.seconds(&b.point, false)));
        Self { points, pace, slower: [1.0; Kind::ALL.len()], seconds_max, disturbed: 0, searches: 0 }
    }

    /// The number of the point to measure now, `elapsed` seconds after the beginning; `None` when all is done, or the time
    /// is over.
    pub fn next(&mut self, elapsed: f64) -> Option<usize> {
        let left = self.seconds_max - elapsed;
        loop {
            let open = self.points.iter().enumerate().filter(|(_, progress)| progress.is_open());
            let next = open
                .map(|(index, progress)| (index, progress.samples.is_empty()))
                .min_by_key(|(index, _)| (self.points[*index].samples.len(), *index));
            let Some((index, first)) = next else {
                let point = self.search()?;
                self.points.push(Progress::measured(point, Vec::new()));
                continue;
            };
            let may = if first { FIRST_SHARE * left } else { left };
            if self.seconds(index) <= may {
                return Some(index);
            }
            // With samples it is done; without, it is said why there are none.
            self.points[index].dropped = Some(Why::TooSlow);
        }
    }

    /// A prompt that shows better where steps jump; `None` if they do not, or it is known.
    fn search(&mut self) -> Option<Point> {
        if self.searches == SEARCHES_MAX {
            return None;
        }
        let measured = self.points.iter().filter_map(|progress| Some((progress.point, progress.seconds()?)));
        let asked = of_prompts(measured, self.pace.step_tokens).into_iter().filter_map(between);
        let point = |new_tokens| Point::Prefill { new_tokens, cached_tokens: 0 };
        let found = asked.map(point).find(|point| self.points.iter().all(|known| known.point != *point))?;
        self.searches += 1;
        Some(found)
    }

    /// Takes what an attempt came to, and how many seconds it took.
    pub fn took(&mut self, index: usize, outcome: Outcome, seconds: f64) {
        let expected = self.seconds(index);
        let progress = &mut self.points[index];
        progress.tries += 1;
        match outcome {
            Outcome::Measured(sample) => {
                progress.samples.push(sample);
                let slower = &mut self.slower[progress.point.kind() as usize];
                let seen = *slower * seconds / expected.max(1e-9);
                *slower += NEWEST * (seen - *slower);
            }
            Outcome::Disturbed => self.disturbed += 1,
            Outcome::Missed => {
                progress.misses += 1;
                if progress.misses >= MISSES_MAX {
                    progress.dropped = Some(Why::Missed);
                }
            }
            Outcome::TooLarge => {
                let point = progress.point;
                for other in &mut self.points {
                    if other.point.needs_at_least(&point) && other.samples.is_empty() {
                        other.dropped = Some(Why::TooLarge);
                    }
                }
                self.points[index].dropped = Some(Why::TooLarge);
            }
        }
    }

    /// Seconds that are left of it, as it seems.
    pub fn seconds_left(&self, elapsed: f64) -> f64 {
        let open = self.points.iter().enumerate().filter(|(_, progress)| progress.is_open());
        let work: f64 = open
            .map(|(index, progress)| {
                let again = (progress.wanted() - progress.samples.len()).saturating_sub(1) as f64;
                self.seconds(index) + again * self.again_seconds(index)
            })
            .sum();
        work.min(self.seconds_max - elapsed).max(0.0)
    }

    /// Every point, in the order in which they are measured.
    pub fn points(&self) -> &[Progress] {
        &self.points
    }

    /// Attempts that others' requests disturbed.
    pub fn disturbed(&self) -> u32 {
        self.disturbed
    }

    fn seconds(&self, index: usize) -> f64 {
        let progress = &self.points[index];
        self.slower_of(progress) * self.pace.seconds(&progress.point, !progress.samples.is_empty())
    }

    fn again_seconds(&self, index: usize) -> f64 {
        let progress = &self.points[index];
        self.slower_of(progress) * self.pace.seconds(&progress.point, true)
    }

    fn slower_of(&self, progress: &Progress) -> f64 {
        self.slower[progress.point.kind() as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace =
        Pace { request_seconds: 0.01, prefill_token_seconds: 1e-4, step_seconds: 0.01, step_tokens: 8_192 };

    fn prefill(new_tokens: u32) -> Point {
        Point::Prefill { new_tokens, cached_tokens: 0 }
    }

    fn sample() -> Outcome {
        Outcome::Measured(Sample { seconds: 1.0, ..Sample::default() })
    }

    /// Measures until nothing is left, each attempt in `seconds`; the points in their order.
    fn run(survey: &mut Survey, seconds: f64, outcome: impl Fn(&Point) -> Outcome) -> Vec<Point> {
        let (mut elapsed, mut order) = (0.0, Vec::new());
        while let Some(index) = survey.next(elapsed) {
            let point = survey.points()[index].point;
            order.push(point);
            survey.took(index, outcome(&point), seconds);
            elapsed += seconds;
        }
        order
    }

    #[test]
    fn each_point_once_then_again() {
        let decode = Point::Decode { sequences: 1, context_tokens: 10 };
        let mut survey = Survey::new(vec![decode, prefill(20), prefill(10)], PACE, 1e6);
        let order = run(&mut survey, 0.1, |_| sample());
        assert_eq!(order[..4], [prefill(10), prefill(20), decode, prefill(10)]);
        assert_eq!(order.len(), 5 + 5 + 3);
        assert_eq!(survey.seconds_left(0.0), 0.0);
    }

    #[test]
    fn what_is_too_large_is_asked_once() {
        let batch = |sequences| Point::Decode { sequences, context_tokens: 100 };
        let mut survey = Survey::new(vec![batch(1), batch(8), batch(64), batch(128)], PACE, 1e6);
        let order = run(&mut survey, 0.1, |point| match point {
            Point::Decode { sequences: 64.., .. } => Outcome::TooLarge,
            _ => sample(),
        });
        assert_eq!(order.iter().filter(|point| **point == batch(64)).count(), 1);
        assert!(!order.contains(&batch(128)));
        assert_eq!(survey.points()[3].dropped, Some(Why::TooLarge));
    }

    #[test]
    fn the_time_is_kept_and_a_slow_engine_noticed() {
        let lengths = [10, 100, 1_000, 10_000, 100_000].map(prefill);
        let mut survey = Survey::new(lengths.into(), PACE, 60.0);
        let slow = |point: &Point| 100.0 * PACE.seconds(point, false);
        let mut elapsed = 0.0;
        while let Some(index) = survey.next(elapsed) {
            let point = survey.points()[index].point;
            survey.took(index, sample(), slow(&point));
            elapsed += slow(&point);
        }
        assert!(elapsed < 60.0, "{elapsed}");
        let dropped: Vec<_> = survey.points().iter().map(|progress| progress.dropped.is_some()).collect();
        assert!(dropped[4] && !survey.points()[2].samples.is_empty(), "{dropped:?}");
    }

    #[test]
    fn where_steps_jump_is_searched_and_where_they_do_not_is_not() {
        let lengths = [64, 128, 256, 512, 768, 1_024, 1_536, 2_048].map(prefill);
        let measured = |jump: u32| {
            let mut survey = Survey::new(lengths.into(), PACE, 1e6);
            run(&mut survey, 0.1, |point| match point {
                Point::Prefill { new_tokens, .. } => {
                    let late = if *new_tokens > jump { 0.02 } else { 0.0 };
                    Outcome::Measured(Sample {
                        seconds: 0.01 + f64::from(*new_tokens) * 2e-5 + late,
                        ..Sample::default()
                    })
                }
                _ => Outcome::Missed,
            });
            let tokens = |progress: &Progress| match progress.point {
                Point::Prefill { new_tokens, .. } => new_tokens,
                _ => 0,
            };
            let mut lengths: Vec<u32> = survey.points().iter().map(tokens).collect();
            lengths.sort_unstable();
            lengths
        };
        assert_eq!(measured(u32::MAX).len(), 8);
        for jump in [513, 600, 767] {
            let lengths = measured(jump);
            let after = lengths.partition_point(|tokens| *tokens <= jump);
            assert!(lengths[after] - lengths[after - 1] <= 2, "{jump}: {lengths:?}");
            assert!(lengths.len() <= 8 + 9, "{jump}: {lengths:?}");
        }
    }

    #[test]
    fn a_disturbed_engine_does_not_hold_it_for_ever() {
        let mut survey = Survey::new(vec![prefill(10)], PACE, 1e6);
        let order = run(&mut survey, 0.1, |_| Outcome::Disturbed);
        assert_eq!((order.len(), survey.disturbed()), (15, 15));
        let mut survey = Survey::new(vec![prefill(10)], PACE, 1e6);
        assert_eq!(run(&mut survey, 0.1, |_| Outcome::Missed).len(), 2);
    }
}
