//! Recursive least squares with forgetting for a few bounded, non-negative coefficients.
//!
//! In: rows of features with the seconds they took. Out: coefficients, and how well they predicted. Start at
//! [`Fit::observe`]. Invariants: every coefficient is finite and within its limits, which are not negative; the same
//! observations in the same order give the same bits; an observation costs O(N²) and allocates nothing.

use serde::{Deserialize, Serialize};

use crate::window::Window;

/// How one kind of model learns.
#[derive(Debug)]
pub(crate) struct Tuning<const N: usize> {
    /// Share of a coefficient's evidence that survives one observation that it took part in.
    pub(crate) forgetting: f64,
    /// How many observations the prior is worth, once the first ones scaled it.
    pub(crate) prior_weight: f64,
    /// A usual value of each feature. Only gives coefficients that the prior left at 0 something to grow from.
    pub(crate) typical: [f64; N],
    /// What every coefficient stays within, the prior included.
    pub(crate) limits: Limits,
    /// The kind of observation by which each coefficient follows a jump; `None`: jumps are learned like anything else.
    pub(crate) owner: Option<[usize; N]>,
}

/// A range of coefficients.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// At least 0.
    pub(crate) least: f64,
    /// Above `least`.
    pub(crate) most: f64,
}

impl Limits {
    /// Whatever is possible.
    pub(crate) const NOT_NEGATIVE: Self = Self { least: 0.0, most: f64::INFINITY };

    /// The nearest value within; `least` for what is not finite.
    fn nearest(self, value: f64) -> f64 {
        if value.is_finite() { value.clamp(self.least, self.most) } else { self.least }
    }
}

/// Observations that scale the prior as a whole before single coefficients move.
const START: usize = 8;
/// Innovations beyond this many times their recent median are clipped: for a normal distribution 2.7 standard
/// deviations, so 0.7 % of honest steps.
const CLIP: f64 = 4.0;
/// Scatter is never taken for less: clocks and the model itself are not better than this.
const SCATTER_MIN: f64 = 0.01;
/// Innovations whose median is the scatter of one kind of observation.
const SCATTER_WINDOW: usize = 32;
/// The median is taken anew after so many; in between it is cached.
const SCATTER_PERIOD: u64 = 8;
/// The model lags when the median innovation is this share of the median absolute one. For symmetric noise the share is
/// 0.3 or less in two windows out of three, and practically never 0.9.
const LAG_SHARE: f64 = 0.9;
/// Forgetting while it lags, if that is faster.
const FORGETTING_LAGGING: f64 = 0.9;
/// A lag by more than this, as a share of the prediction, is a jump: half as long again, or half as long.
const JUMP: f64 = 0.5;
/// An owned part below this share of a prediction says nothing of its coefficients: noise is as large.
const OWNED_SHARE_MIN: f64 = 0.1;
/// Recent predictions that [`ModelError`] describes.
const ERROR_WINDOW: usize = 128;
/// A coefficient whose share of a usual observation is less in the prior is taken to be as uncertain as if it had this.
const UNIT_SHARE_MIN: f64 = 0.2;
/// Predictions are divided by; nothing that is measured takes less.
const SECONDS_MIN: f64 = 1e-9;

/// How far recent predictions were from what was then measured: (predicted - measured) / measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ModelError {
    /// Median of the absolute relative error.
    pub p50: f64,
    /// Its 90th percentile.
    pub p90: f64,
    /// Median of the signed relative error: above 0, predictions are too long.
    pub bias: f64,
    /// Predictions that these figures describe; 0 means that nothing is known.
    pub samples: u32,
}

/// Recent innovations of one kind of observation: measured / predicted - 1.
#[derive(Debug, Clone)]
struct Scatter {
    recent: Window<SCATTER_WINDOW>,
    /// Of their absolute values.
    median: f64,
    /// Nearly all have one sign: the coefficients lag behind a change.
    lagging: bool,
    /// What was measured of the part that this kind owns / what was predicted of it.
    owned: Window<SCATTER_WINDOW>,
}

impl Scatter {
    const fn new() -> Self {
        Self { recent: Window::new(), median: f64::INFINITY, lagging: false, owned: Window::new() }
    }

    /// How much of `innovation` to believe, 0..=1.
    fn weight(&mut self, innovation: f64) -> f64 {
        let limit = CLIP * self.median;
        self.recent.push(innovation as f32);
        if self.recent.pushed().is_multiple_of(SCATTER_PERIOD) {
            let quantile = |map: fn(f32) -> f32| self.recent.quantile(0.5, map).unwrap_or(0.0);
            let (absolute, signed) = (quantile(f32::abs), quantile(|innovation| innovation));
            self.median = absolute.max(SCATTER_MIN);
            self.lagging = signed.abs() > SCATTER_MIN && signed.abs() >= LAG_SHARE * absolute;
        }
        if innovation.abs() <= limit { 1.0 } else { limit / innovation.abs() }
    }

    /// How many times longer the owned part has become, if it has jumped; then starts anew.
    fn take_jump(&mut self) -> Option<f64> {
        if !self.lagging || self.median < JUMP {
            return None;
        }
        let times = self.owned.quantile(0.5, |ratio| ratio)?;
        *self = Self { median: JUMP, ..Self::new() };
        Some(times)
    }
}

/// `KINDS` separates observations whose scatter differs: judged by the scatter of decode steps, which are many and
/// regular, every prefill would be an outlier.
#[derive(Debug, Clone)]
pub(crate) struct Fit<const N: usize, const KINDS: usize> {
    tuning: &'static Tuning<N>,
    prior: [f64; N],
    coefficients: [f64; N],
    /// What a coefficient is measured in, so that the covariance has no units.
    unit: [f64; N],
    covariance: [[f64; N]; N],
    start: [(usize, [f64; N], f64); START],
    scatter: [Scatter; KINDS],
    errors: Window<ERROR_WINDOW>,
}

impl<const N: usize, const KINDS: usize> Fit<N, KINDS> {
    /// Starts from `prior`; entries outside of the limits count as the nearest limit, and what is no number as the
    /// least.
    pub(crate) fn new(prior: [f64; N], tuning: &'static Tuning<N>) -> Self {
        let mut prior = prior.map(|value| tuning.limits.nearest(value));
        if prior.iter().all(|&value| value == 0.0) {
            prior[0] = 1e-3; // a prior that says nothing; the first observations set the scale
        }
        Self {
            tuning,
            prior,
            coefficients: prior,
            unit: [0.0; N],
            covariance: [[0.0; N]; N],
            start: [(0, [0.0; N], 0.0); START],
            scatter: [const { Scatter::new() }; KINDS],
            errors: Window::new(),
        }
    }

    pub(crate) fn coefficients(&self) -> [f64; N] {
        self.coefficients
    }

    /// Observations that were learned from.
    pub(crate) fn samples(&self) -> u64 {
        self.errors.pushed()
    }

    pub(crate) fn error(&self) -> ModelError {
        let quantile = |q, map: fn(f32) -> f32| self.errors.quantile(q, map).unwrap_or(0.0);
        ModelError {
            p50: quantile(0.5, f32::abs),
            p90: quantile(0.9, f32::abs),
            bias: quantile(0.5, |error| error),
            samples: self.errors.values().len() as u32,
        }
    }

    /// Learns that `row` took `seconds`. Ignores what cannot be: values that are negative or not finite, no time at
    /// all.
    pub(crate) fn observe(&mut self, kind: usize, row: &[f64; N], seconds: f64) {
        let measured = seconds.is_finite() && seconds >= SECONDS_MIN;
        if !measured || row.iter().any(|value| !value.is_finite() || *value < 0.0) {
            return;
        }
        let predicted = dot(&self.coefficients, row);
        let seen = self.errors.pushed() as usize;
        self.errors.push(((predicted - seconds) / seconds) as f32);
        if seen >= START {
            self.learn(kind, row, seconds);
            return;
        }
        self.start[seen] = (kind, *row, seconds);
        self.scale_prior(seen + 1);
        if seen + 1 == START {
            self.reset_covariance();
            self.start_scatter();
            for (kind, row, seconds) in self.start {
                self.learn(kind, &row, seconds);
            }
        }
    }

    /// Takes the prior times the median of measured / predicted over the first `seen` observations. The lower median:
    /// an odd step is nearly always a slow one.
    fn scale_prior(&mut self, seen: usize) {
        let mut ratios = [0.0; START];
        for (ratio, (_, row, seconds)) in ratios.iter_mut().zip(&self.start[..seen]) {
            *ratio = seconds / dot(&self.prior, row).max(SECONDS_MIN);
        }
        ratios[..seen].sort_unstable_by(f64::total_cmp);
        let speed = ratios[(seen - 1) / 2];
        self.coefficients = self.prior.map(|value| self.tuning.limits.nearest(value * speed));
    }

    /// Clips from the first row that is learned, by how far the first rows are from the scaled prior.
    fn start_scatter(&mut self) {
        let mut recent = Window::<START>::new();
        for (_, row, seconds) in &self.start {
            recent.push((seconds / dot(&self.coefficients, row).max(SECONDS_MIN) - 1.0) as f32);
        }
        let median = recent.quantile(0.5, f32::abs).map_or(f64::INFINITY, |median| median.max(SCATTER_MIN));
        for scatter in &mut self.scatter {
            scatter.median = median;
        }
    }

    /// Back to knowing as much as at the start, around the present coefficients.
    fn reset_covariance(&mut self) {
        let usual = dot(&self.coefficients, &self.tuning.typical).max(SECONDS_MIN);
        for i in 0..N {
            self.unit[i] = self.coefficients[i].max(UNIT_SHARE_MIN * usual / self.tuning.typical[i]);
            self.covariance[i] = [0.0; N];
            self.covariance[i][i] = 1.0 / self.tuning.prior_weight;
        }
    }

    /// One step of recursive least squares on the relative error.
    fn learn(&mut self, kind: usize, row: &[f64; N], seconds: f64) {
        let predicted = dot(&self.coefficients, row).max(SECONDS_MIN);
        let innovation = seconds / predicted - 1.0;
        let weight = self.scatter[kind].weight(innovation);
        if self.tuning.owner.is_some_and(|owner| self.followed_jump(kind, &owner, row, seconds)) {
            return;
        }
        self.forget(row, self.scatter[kind].lagging);

        let scaled: [f64; N] = std::array::from_fn(|i| row[i] * self.unit[i] / predicted);
        let spread: [f64; N] = std::array::from_fn(|i| dot(&self.covariance[i], &scaled));
        // The noise of a clipped row counts as larger instead of its innovation as smaller: the coefficients move as
        // little, and the covariance does not shrink for a row that was hardly believed.
        let variance = dot(&spread, &scaled) + 1.0 / weight;
        for i in 0..N {
            self.coefficients[i] += self.unit[i] * spread[i] / variance * innovation;
            for j in 0..N {
                self.covariance[i][j] -= spread[i] * spread[j] / variance;
            }
        }
        self.project();
        if !self.is_sound() {
            self.coefficients = self.coefficients.map(|value| self.tuning.limits.nearest(value));
            self.reset_covariance();
        }
    }

    /// Takes what `kind` owns times as long as it has become, if this row shows that it has jumped; of what is known
    /// of those coefficients only that is kept. Least squares alone would take hundreds of rows: what it forgets
    /// slowest is their sum, the very thing that jumped, so it bends their proportions instead.
    fn followed_jump(&mut self, kind: usize, owner: &[usize; N], row: &[f64; N], seconds: f64) -> bool {
        let share = |owned: bool| {
            (0..N)
                .filter(|&i| (owner[i] == kind) == owned)
                .map(|i| self.coefficients[i] * row[i])
                .sum::<f64>()
        };
        let (own, others) = (share(true), share(false));
        if own > OWNED_SHARE_MIN * (own + others) {
            self.scatter[kind].owned.push(((seconds - others) / own).max(0.0) as f32);
        }
        let Some(times) = self.scatter[kind].take_jump() else { return false };
        for i in (0..N).filter(|&i| owner[i] == kind) {
            self.coefficients[i] = self.tuning.limits.nearest(self.coefficients[i] * times);
            for j in 0..N {
                (self.covariance[i][j], self.covariance[j][i]) = (0.0, 0.0);
            }
            self.unit[i] = self.coefficients[i];
            self.covariance[i][i] = 1.0 / self.tuning.prior_weight;
        }
        true
    }

    /// Widens the covariance of the coefficients that `row` involves, up to the prior's. Scaling rows and columns alike
    /// keeps it positive definite.
    fn forget(&mut self, row: &[f64; N], lagging: bool) {
        let slow = self.tuning.forgetting;
        let growth = 1.0 / if lagging { slow.min(FORGETTING_LAGGING) } else { slow };
        let prior = 1.0 / self.tuning.prior_weight;
        let factor: [f64; N] = std::array::from_fn(|i| {
            if row[i] == 0.0 { 1.0 } else { growth.min(prior / self.covariance[i][i]).max(1.0).sqrt() }
        });
        for i in 0..N {
            for j in 0..N {
                self.covariance[i][j] *= factor[i] * factor[j];
            }
        }
    }

    /// Moves to the nearest coefficients that are within their limits, near in the metric of what is known: pinning one
    /// moves those that it is correlated with, so predictions of usual rows hardly change.
    fn project(&mut self) {
        let Limits { least, most } = self.tuning.limits;
        // How far beyond a limit, in what the coefficient is measured in; below the least counts as negative.
        let beyond = |fit: &Self, i: usize| {
            let value = fit.coefficients[i];
            ((value - least).min(0.0) + (value - most).max(0.0)) / fit.unit[i]
        };
        for _ in 0..N {
            let outside = |i: &usize| beyond(self, *i) != 0.0;
            let Some(worst) = (0..N)
                .filter(outside)
                .min_by(|&a, &b| beyond(self, b).abs().total_cmp(&beyond(self, a).abs()))
            else {
                return;
            };
            let limit = if self.coefficients[worst] < least { least } else { most };
            let excess = beyond(self, worst) / self.covariance[worst][worst];
            for i in 0..N {
                self.coefficients[i] -= self.unit[i] * self.covariance[i][worst] * excess;
            }
            self.coefficients[worst] = limit;
        }
        self.coefficients = self.coefficients.map(|value| value.clamp(least, most));
    }

    /// Rounding may in the end spoil the covariance; then it is rebuilt rather than believed.
    fn is_sound(&self) -> bool {
        (0..N).all(|i| {
            let variance = self.covariance[i][i];
            self.coefficients[i].is_finite() && variance.is_finite() && variance > 0.0
        })
    }
}

fn dot<const N: usize>(a: &[f64; N], b: &[f64; N]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests;
