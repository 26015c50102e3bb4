//! Whether two targets differ by more than what disturbs both.

use serde::Serialize;

/// How often pure chance may be called a difference.
const CHANCE_MAX: f64 = 0.05;

/// What the slices allow to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// More than noise.
    Differs,
    /// No more than noise.
    Noise,
    /// So few pairs that even if all agreed it might be chance.
    TooFewSlices,
}

/// The second target against the first.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    /// The second's median over the first's.
    pub ratio: f64,
    /// The same of single pairs of slices: the lowest ...
    pub lowest: f64,
    /// ... and the highest.
    pub highest: f64,
    /// Whether it is noise.
    pub verdict: Verdict,
}

/// Compares one figure of the slices of two targets, pair by pair: neighbours in time share what disturbs a machine. By a
/// two-sided sign test, which assumes nothing about the noise. `None` without pairs, or where a figure is 0.
pub fn compare(first: &[f64], second: &[f64]) -> Option<Comparison> {
    let pairs: Vec<(f64, f64)> = first.iter().copied().zip(second.iter().copied()).collect();
    let sound = |value: f64| value > 0.0 && value.is_finite();
    if pairs.is_empty() || !pairs.iter().all(|(one, other)| sound(*one) && sound(*other)) {
        return None;
    }
    let ratios: Vec<f64> = pairs.iter().map(|(one, other)| other / one).collect();
    let above = ratios.iter().filter(|ratio| **ratio > 1.0).count();
    let below = ratios.iter().filter(|ratio| **ratio < 1.0).count();
    let verdict = match (chance(ratios.len(), 0), chance(above + below, above.min(below))) {
        (best, _) if best > CHANCE_MAX => Verdict::TooFewSlices,
        (_, chance) if chance <= CHANCE_MAX => Verdict::Differs,
        _ => Verdict::Noise,
    };
    Some(Comparison {
        ratio: median(&pairs.iter().map(|(_, other)| *other).collect::<Vec<_>>())?
            / median(&pairs.iter().map(|(one, _)| *one).collect::<Vec<_>>())?,
        lowest: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        highest: ratios.iter().copied().fold(0.0, f64::max),
        verdict,
    })
}

/// How likely fair coins fall at least as unevenly: `few` or fewer of `all` on either side.
fn chance(all: usize, few: usize) -> f64 {
    let mut ways = 1.0;
    let mut sum = 1.0;
    for k in 0..few {
        ways *= (all - k) as f64 / (k + 1) as f64;
        sum += ways;
    }
    (2.0 * sum * 0.5_f64.powi(i32::try_from(all).unwrap_or(i32::MAX))).min(1.0)
}

/// The middle one, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    Some(f64::midpoint(sorted[last / 2], sorted[last.div_ceil(2)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_must_be_seen_in_slice_after_slice() {
        let check = |what: &str, first: &[f64], second: &[f64], expected: Option<(f64, Verdict)>| {
            let found = compare(first, second).map(|found| (found.ratio, found.verdict));
            assert_eq!(found, expected, "{what}");
        };
        let ones = [1.0; 8];
        let mixed = [2.0, 0.5, 2.0, 0.5, 2.0, 0.5, 2.0, 2.0];
        check("twice in all", &ones, &[2.0; 8], Some((2.0, Verdict::Differs)));
        check("twice in five", &ones[..5], &[2.0; 5], Some((2.0, Verdict::TooFewSlices)));
        check("twice in six", &ones[..6], &[2.0; 6], Some((2.0, Verdict::Differs)));
        check("now more, now less", &ones, &mixed, Some((2.0, Verdict::Noise)));
        check("the same", &ones, &ones, Some((1.0, Verdict::Noise)));
        check("nothing", &[], &[], None);
        check("a slice without answers", &[0.0], &[1.0], None);
    }

    #[test]
    fn the_range_is_that_of_pairs() {
        let found = compare(&[1.0, 2.0], &[3.0, 1.0]).expect("two pairs");
        assert_eq!((found.lowest, found.highest), (0.5, 3.0));
    }
}
