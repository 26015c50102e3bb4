//! When requests of an open loop are due.

use forebay_twin::Draw;

/// Times of a Poisson process in seconds since its start, without end.
#[derive(Debug, Clone)]
pub struct Arrivals {
    draw: Draw,
    mean_seconds: f64,
    at_seconds: f64,
}

impl Arrivals {
    /// `rate` a second in the mean; it is above 0.
    pub fn new(rate: f64, seed: u64) -> Self {
        Self { draw: Draw::new(seed, "arrivals"), mean_seconds: 1.0 / rate, at_seconds: 0.0 }
    }
}

impl Iterator for Arrivals {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        self.at_seconds += self.draw.exponential(self.mean_seconds);
        Some(self.at_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_keep_their_rate_and_vary_as_poisson_does() {
        let times: Vec<f64> = Arrivals::new(20.0, 7).take(20_000).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean * 20.0 - 1.0).abs() < 0.03, "{mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "{variance}");
        assert_eq!(times, Arrivals::new(20.0, 7).take(20_000).collect::<Vec<_>>());
    }
}
