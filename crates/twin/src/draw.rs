//! Numbers drawn from a seed, and the distributions that workloads need.

use std::f64::consts::TAU;

/// SplitMix64. One for each purpose ([`Draw::new`]), so that drawing more for one changes nothing for another.
#[derive(Debug, Clone)]
pub struct Draw(u64);

impl Draw {
    /// The stream named `purpose` of a seed.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let named = purpose.bytes().fold(seed, |state, byte| mix(state ^ u64::from(byte).rotate_left(32)));
        Self(mix(named))
    }

    /// 64 bits, all equally likely.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Above 0, at most 1.
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }

    /// Exponentially distributed with this mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -self.unit().ln() * mean
    }

    /// Box-Muller; the second number is not kept, so that each call takes two of the stream.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        radius * (TAU * self.unit()).cos()
    }

    /// Gamma distributed with this shape above 0 and a scale of 1, so with a mean of `shape`.
    ///
    /// Marsaglia and Tsang, A Simple Method for Generating Gamma Variables, ACM TOMS 26 (2000); below 1 by a shape larger by 1.
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let smaller = self.unit().powf(1.0 / shape);
            return self.gamma(shape + 1.0) * smaller;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.unit().ln() < 0.5 * x * x + d * (1.0 - v + v.ln()) {
                return d * v;
            }
        }
    }

    /// A length in tokens with this median, at least `least` and at most `most`.
    pub fn lognormal_tokens(&mut self, median: f64, sigma: f64, least: u32, most: u32) -> u32 {
        let tokens = median * (sigma * self.normal()).exp();
        (tokens.round() as u32).clamp(least, most)
    }
}

/// The finaliser of SplitMix64.
pub fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean_of(count: u32, mut next: impl FnMut() -> f64) -> f64 {
        (0..count).map(|_| next()).sum::<f64>() / f64::from(count)
    }

    #[test]
    fn distributions_have_the_moments_that_they_promise() {
        let mut draw = Draw::new(7, "test");
        assert!((mean_of(100_000, || draw.unit()) - 0.5).abs() < 0.005);
        assert!((mean_of(100_000, || draw.exponential(5.0)) - 5.0).abs() < 0.05);
        assert!(mean_of(100_000, || draw.normal()).abs() < 0.01);
        assert!((mean_of(100_000, || draw.normal().powi(2)) - 1.0).abs() < 0.02);
        // The mean of a lognormal is its median times exp(sigma² / 2).
        let mean = mean_of(100_000, || f64::from(draw.lognormal_tokens(4000.0, 0.4, 1, 1 << 20)));
        assert!((mean / (4000.0 * (0.08_f64).exp()) - 1.0).abs() < 0.01, "{mean}");
    }

    #[test]
    fn streams_of_one_seed_differ_and_repeat() {
        let numbers = |seed, purpose| {
            let mut draw = Draw::new(seed, purpose);
            [draw.bits(), draw.bits()]
        };
        assert_eq!(numbers(1, "arrivals"), numbers(1, "arrivals"));
        assert_ne!(numbers(1, "arrivals"), numbers(1, "lengths"));
        assert_ne!(numbers(1, "arrivals"), numbers(2, "arrivals"));
    }
}
