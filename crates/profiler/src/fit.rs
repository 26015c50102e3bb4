//! From samples to a profile.
//!
//! In: points with their samples. Out: the profile's JSON form, and for every point what the profile says of it. Start at
//! [`fit`]. The times of a point are linear in the unknowns ([`Terms`]), so one least squares of relative errors gives them.

use forebay_perf_model::{
    HandoverFile, KvLayout, Profile, ProfileError, ProfileFile, RankFile, RequestFile, StepShape, StepsFile,
};

use crate::{
    jumps::of_prompts,
    least_squares::solve,
    point::{Kind, Point},
    survey::Progress,
    trace::median,
};

/// Columns of the unknowns that are no part of the launch curve.
const FIXED: usize = 0;
const TOKEN: usize = 1;
const ATTENTION: usize = 2;
const CONTEXT: usize = 3;
const MIX: usize = 4;
/// The curve at its first point; its rises follow.
const CURVE: usize = 5;
/// How much farther a point of the curve is from the one before, as a factor: closer ones would follow the noise.
const KNOT_FACTOR: f64 = 1.9;
/// Rounds of weighting points by how far off they are.
const ROUNDS: usize = 8;
/// A point counts in full up to so many times the usual error, and an error that is always taken for usual.
const USUAL_TIMES: f64 = 2.5;
const USUAL_MIN: f64 = 0.01;
/// ms of the shortest step: a profile takes no 0.
const STEP_MS_MIN: f64 = 1e-3;
/// Digits that are kept; a measurement has no more.
const DIGITS: usize = 4;

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// What the profile is to be called.
    pub name: String,
    /// Engine, model and machine.
    pub measured: String,
    /// Tokens that the engine puts into a step at most.
    pub step_tokens: u32,
    /// How it lays out KV, for hand-overs.
    pub layout: KvLayout,
}

/// A profile, and how good it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The profile in its JSON form.
    pub file: ProfileFile,
    /// Every point that was measured, by kind.
    pub points: Vec<Fitted>,
    /// What could not be told, as sentences.
    pub notes: Vec<&'static str>,
}

/// A point beside what the profile says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    /// Which.
    pub point: Point,
    /// How many measurements.
    pub samples: usize,
    /// Their median.
    pub measured_ms: f64,
    /// What the profile says.
    pub fitted_ms: f64,
}

impl Fitted {
    /// How far the profile is off, as a share of what was measured.
    pub fn error(&self) -> f64 {
        self.fitted_ms / self.measured_ms - 1.0
    }
}

/// How far a profile is from some points.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Errors {
    /// How many points.
    pub points: usize,
    /// Nine in ten are off by no more.
    pub p90: f64,
    /// None is off by more.
    pub max: f64,
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// Too few points of a kind that it cannot do without.
    #[error("{found} points of kind `{}` were measured, and {needed} are needed", .kind.name())]
    TooLittle {
        /// Which kind.
        kind: Kind,
        /// How many there are.
        found: usize,
        /// How many there must be.
        needed: usize,
    },
    /// What was measured makes no profile that can be read.
    #[error("the measurements make no profile")]
    Impossible(#[from] ProfileError),
}

impl Fit {
    /// How far it is from the points of a kind; `None` if there are none.
    pub fn errors(&self, kind: Kind) -> Option<Errors> {
        let mut errors: Vec<f64> = self
            .points
            .iter()
            .filter(|fitted| fitted.point.kind() == kind)
            .map(|fitted| fitted.error().abs())
            .collect();
        errors.sort_by(f64::total_cmp);
        let rank = (0.9 * errors.len() as f64).ceil() as usize;
        let max = *errors.last()?;
        Some(Errors { points: errors.len(), p90: errors[rank.max(1) - 1], max })
    }
}

/// The profile that `points` make. Those without samples say nothing.
///
/// # Errors
/// If there are fewer than two prompts or no batches that decode, or what is measured is absurd.
pub fn fit(points: &[Progress], subject: &Subject) -> Result<Fit, FitError> {
    let mut rows: Vec<Row> = points.iter().filter_map(Row::of).collect();
    rows.sort_by_key(|row| row.point.kind());
    let count = |kind: Kind| rows.iter().filter(|row| row.point.kind() == kind).count();
    for (kind, needed) in [(Kind::Prefill, 2), (Kind::Decode, 1)] {
        let found = count(kind);
        if found < needed {
            return Err(FitError::TooLittle { kind, found, needed });
        }
    }
    let terms = Terms::new(&rows, subject.step_tokens);
    let (steps, handed): (Vec<Row>, Vec<Row>) =
        rows.iter().copied().partition(|row: &Row| row.point.kind() != Kind::Handover);
    let x = robust(&steps.iter().map(|row| (terms.features(row), row.ms)).collect::<Vec<_>>());
    let handover = hand_over(&terms, &x, &handed, subject.layout);
    let file = ProfileFile {
        version: ProfileFile::VERSION,
        name: subject.name.clone(),
        measured: subject.measured.clone(),
        request: RequestFile { fixed_ms: rounded(x[FIXED]), token_ms: rounded(x[TOKEN]) },
        steps: StepsFile::Rank(RankFile {
            launch_ms: terms.curve(&x),
            attention_ms: rounded(x[ATTENTION]),
            context_token_ms: rounded(x[CONTEXT]),
            mixed_context_token_ms: rounded(x[MIX]),
            budgets: Vec::new(),
        }),
        handover: handover.into_iter().collect(),
    };
    let profile = Profile::from_file(file.clone())?;
    let fitted = rows.iter().map(|row| row.beside(&profile, subject)).collect();
    Ok(Fit { file, points: fitted, notes: notes(&terms, count(Kind::Mixed)) })
}

fn notes(terms: &Terms, mixed: usize) -> Vec<&'static str> {
    let mut notes = Vec::new();
    if !terms.has[TOKEN] {
        notes.push("no cached share was measured: a prompt token's own time counts as part of its step");
    }
    if !terms.has[ATTENTION] {
        notes.push(
            "neither chunks nor cached shares were measured: attention counts as part of the launch curve",
        );
    }
    if mixed == 0 {
        notes.push("no prompt beside decodes was measured: mixing is taken to cost nothing more");
    }
    notes
}

/// A point's measurements in one.
#[derive(Debug, Clone, Copy)]
struct Row {
    point: Point,
    samples: usize,
    ms: f64,
    /// As found, which may be other than asked for.
    cached_tokens: u32,
    context_tokens: f64,
    start_ms: Option<f64>,
}

impl Row {
    fn of(progress: &Progress) -> Option<Self> {
        let samples = &progress.samples;
        let ms = 1e3 * median(samples.iter().map(|sample| sample.seconds))?;
        let cached = median(samples.iter().map(|sample| f64::from(sample.cached_tokens)))?;
        let start = median(samples.iter().filter_map(|sample| sample.start_seconds));
        let context_tokens = median(samples.iter().map(|sample| sample.context_tokens))?;
        (ms > 0.0).then_some(Self {
            point: progress.point,
            samples: samples.len(),
            ms,
            cached_tokens: cached as u32,
            context_tokens,
            start_ms: start.map(|seconds| 1e3 * seconds.max(0.0)),
        })
    }

    /// Tokens of a prompt that were computed, and those that were cached.
    fn split(&self, new_tokens: u32, cached_tokens: u32) -> (u32, u32) {
        let total = new_tokens + cached_tokens;
        let cached = self.cached_tokens.min(total.saturating_sub(1));
        (total - cached, cached)
    }

    fn beside(&self, profile: &Profile, subject: &Subject) -> Fitted {
        let budget_tokens = subject.step_tokens;
        let seconds = match self.point {
            Point::Prefill { new_tokens, cached_tokens } => {
                let (new, cached) = self.split(new_tokens, cached_tokens);
                profile.request_seconds(new + cached) + profile.prefill_seconds(new, cached, budget_tokens)
            }
            Point::Decode { sequences, .. } => {
                profile.decode_step_seconds(sequences, self.context_tokens as u64)
            }
            Point::Mixed { new_tokens, sequences, .. } => profile.step_seconds(&StepShape {
                prefill_tokens: new_tokens,
                prefill_attention: f64::from(new_tokens).powi(2) / 2.0,
                decodes: sequences,
                context_tokens: self.context_tokens as u64,
                group_decodes: 0,
                budget_tokens,
            }),
            Point::Handover { tokens } => {
                let moved = profile.handover_seconds(subject.layout, tokens).unwrap_or(0.0);
                profile.request_seconds(0) + moved + profile.decode_step_seconds(1, u64::from(tokens))
            }
        };
        Fitted { point: self.point, samples: self.samples, measured_ms: self.ms, fitted_ms: 1e3 * seconds }
    }
}

/// The unknowns, and how each point depends on them.
struct Terms {
    knots: Vec<u32>,
    step_tokens: u32,
    /// Whether the points tell these apart from the curve.
    has: [bool; CURVE],
}

impl Terms {
    fn new(rows: &[Row], step_tokens: u32) -> Self {
        let step_tokens = step_tokens.max(2);
        let mut counts: Vec<u32> = rows
            .iter()
            .filter_map(|row| match row.point {
                Point::Decode { sequences, .. } => Some(sequences),
                Point::Prefill { new_tokens, cached_tokens: 0 } if row.cached_tokens == 0 => {
                    (new_tokens <= step_tokens).then_some(new_tokens)
                }
                _ => None,
            })
            .collect();
        counts.sort_unstable();
        let knots = knots(&counts, &edges(rows, step_tokens));
        let is_cached = |row: &Row| matches!(row.point, Point::Prefill { .. }) && row.cached_tokens > 0;
        let is_cut =
            |row: &Row| matches!(row.point, Point::Prefill { new_tokens, .. } if new_tokens > step_tokens);
        let cached = rows.iter().any(is_cached);
        let attention = cached || rows.iter().any(is_cut);
        let mixed = rows.iter().any(|row| row.point.kind() == Kind::Mixed);
        Self { knots, step_tokens, has: [true, cached, attention, true, mixed] }
    }

    fn features(&self, row: &Row) -> Vec<f64> {
        let mut x = vec![0.0; CURVE + self.knots.len()];
        match row.point {
            Point::Prefill { new_tokens, cached_tokens } => {
                let (new, cached) = row.split(new_tokens, cached_tokens);
                x[FIXED] = 1.0;
                x[TOKEN] = f64::from(new + cached);
                let mut done = 0;
                while done < new {
                    let chunk = self.step_tokens.min(new - done);
                    self.step(&mut x, chunk);
                    done += chunk;
                }
                x[ATTENTION] = f64::from(new) * (f64::from(cached) + f64::from(new) / 2.0);
            }
            Point::Decode { sequences, .. } => {
                self.step(&mut x, sequences);
                x[CONTEXT] = row.context_tokens;
            }
            Point::Mixed { new_tokens, sequences, .. } => {
                self.step(&mut x, new_tokens + sequences);
                x[ATTENTION] = f64::from(new_tokens).powi(2) / 2.0;
                x[CONTEXT] = row.context_tokens;
                x[MIX] = row.context_tokens;
            }
            Point::Handover { tokens } => {
                self.step(&mut x, 1);
                x[FIXED] = 1.0;
                x[CONTEXT] = f64::from(tokens);
            }
        }
        for (feature, has) in x.iter_mut().zip(self.has) {
            *feature = if has { *feature } else { 0.0 };
        }
        x
    }

    /// A step of so many tokens: the curve's start, and as much of each rise as lies before them.
    fn step(&self, x: &mut [f64], tokens: u32) {
        x[CURVE] += 1.0;
        let rises = self.knots.len().saturating_sub(1);
        for (rise, pair) in self.knots.windows(2).enumerate() {
            let share = (f64::from(tokens) - f64::from(pair[0])) / f64::from(pair[1] - pair[0]);
            let most = if rise + 1 == rises { f64::INFINITY } else { 1.0 };
            x[CURVE + 1 + rise] += share.clamp(0.0, most);
        }
    }

    fn curve(&self, x: &[f64]) -> Vec<(u32, f64)> {
        let mut ms = 0.0;
        let point = |(&knot, rise): (&u32, &f64)| {
            ms += rise;
            (knot, rounded(ms.max(STEP_MS_MIN)))
        };
        self.knots.iter().zip(&x[CURVE..]).map(point).collect()
    }
}

/// Tokens of a step on both sides of where steps jump.
fn edges(rows: &[Row], step_tokens: u32) -> Vec<u32> {
    let measured = rows.iter().map(|row| (row.point, row.ms));
    of_prompts(measured, step_tokens).into_iter().flat_map(|(before, behind)| [before, behind]).collect()
}

/// The points of the launch curve, of those that were measured: where it jumps, and elsewhere not too close.
fn knots(counts: &[u32], edges: &[u32]) -> Vec<u32> {
    let far = |from: u32, to: u32| f64::from(to) >= KNOT_FACTOR * f64::from(from);
    let mut knots: Vec<u32> = Vec::new();
    for &count in counts {
        let last_is_far = knots.last().is_none_or(|last| far(*last, count));
        let edge_is_far = edges.iter().filter(|edge| **edge > count).all(|edge| far(count, *edge));
        if (edges.contains(&count) && knots.last() != Some(&count)) || (last_is_far && edge_is_far) {
            knots.push(count);
        }
    }
    knots
}

/// Least squares of relative errors; rows that are far off count less, round by round. A row is its features and its ms.
fn robust(rows: &[(Vec<f64>, f64)]) -> Vec<f64> {
    let mut weights = vec![1.0; rows.len()];
    let mut x = Vec::new();
    for _ in 0..ROUNDS {
        let scaled: Vec<Vec<f64>> = rows
            .iter()
            .zip(&weights)
            .map(|((features, ms), weight)| features.iter().map(|feature| feature * weight / ms).collect())
            .collect();
        x = solve(&scaled, &weights);
        let off: Vec<f64> = rows.iter().map(|(features, ms)| (dot(features, &x) / ms - 1.0).abs()).collect();
        let usual = median(off.iter().copied()).unwrap_or(0.0).max(USUAL_MIN);
        // Huber: an error counts as it is up to a limit and no more beyond; its square's weight is limit / error.
        weights = off.iter().map(|off| (USUAL_TIMES * usual / off.max(1e-12)).min(1.0).sqrt()).collect();
    }
    x
}

fn hand_over(terms: &Terms, x: &[f64], rows: &[Row], layout: KvLayout) -> Option<HandoverFile> {
    if rows.is_empty() {
        return None;
    }
    let line = |times: &[(f64, f64, f64)]| {
        let features: Vec<Vec<f64>> =
            times.iter().map(|(tokens, _, scale)| vec![1.0 / scale, tokens / scale]).collect();
        let targets: Vec<f64> = times.iter().map(|(_, ms, scale)| ms.max(0.0) / scale).collect();
        let x = solve(&features, &targets);
        (rounded(x.first().copied().unwrap_or(0.0)), rounded(x.get(1).copied().unwrap_or(0.0)))
    };
    let tokens = |row: &Row| match row.point {
        Point::Handover { tokens } => f64::from(tokens),
        _ => 0.0,
    };
    let moved: Vec<_> =
        rows.iter().map(|row| (tokens(row), row.ms - dot(&terms.features(row), x), row.ms)).collect();
    // Differences of two steps, most of them small: absolute errors.
    let starts: Vec<_> = rows.iter().filter_map(|row| Some((tokens(row), row.start_ms?, 1.0))).collect();
    let ((fixed_ms, token_ms), (start_fixed_ms, start_token_ms)) = (line(&moved), line(&starts));
    Some(HandoverFile { layout, fixed_ms, token_ms, start_fixed_ms, start_token_ms })
}

fn dot(features: &[f64], x: &[f64]) -> f64 {
    features.iter().zip(x).map(|(feature, x)| feature * x).sum()
}

/// To the digits that a measurement has.
fn rounded(ms: f64) -> f64 {
    format!("{ms:.*e}", DIGITS - 1).parse().unwrap_or(ms)
}

#[cfg(test)]
mod tests;
