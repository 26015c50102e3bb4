//! Seconds of a KV transfer between one ordered pair of ranks.

use serde::{Deserialize, Serialize};

use crate::fit::{Fit, Limits, ModelError, Tuning};

/// What is assumed of a link before anything moved over it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LinkPrior {
    /// Seconds until the first byte moves: finding the blocks, notifying, one scheduler step.
    pub latency_seconds: f64,
    /// Bytes a second after that.
    pub bytes_per_second: f64,
}

impl LinkPrior {
    /// Two pools in one host's memory: one core's copy runs at some 5 GB/s when the pools do not fit a cache. A guess.
    pub const SHARED_MEMORY: Self = Self { latency_seconds: 2e-4, bytes_per_second: 5e9 };
    /// Engines' own connectors, from the decode leg's start to its first token: queues and a step are in it. Two H100s on
    /// NVLink at 3 to 10 requests a second: some 15 ms when idle, 10 GB/s beyond. Measured.
    pub const CONNECTOR: Self = Self { latency_seconds: 1.5e-2, bytes_per_second: 1e10 };
    /// NVLink with 2 MiB pieces, loaded engines: about 4 ms for the hand-over, then 190 GB/s. Measured.
    pub const NVLINK: Self = Self { latency_seconds: 4e-3, bytes_per_second: 1.9e11 };
}

/// Transfers are rarer than steps: a memory of about 100 of them. 32 MiB is 256 tokens of an 8B model's KV.
static TUNING: Tuning<2> = Tuning {
    forgetting: 0.99,
    prior_weight: 0.1,
    typical: [1.0, 32.0 * 1024.0 * 1024.0],
    limits: Limits::NOT_NEGATIVE,
    owner: None,
};

/// A petabyte a second: what a link without a measurable cost per byte is said to carry, so that nobody divides by 0.
const SECONDS_PER_BYTE_MIN: f64 = 1e-15;

/// Latency and bandwidth of one ordered pair of ranks, learned from transfers.
#[derive(Debug, Clone)]
pub struct LinkModel {
    fit: Fit<2, 1>,
}

impl LinkModel {
    /// Starts from an assumption about this kind of link.
    pub fn new(prior: LinkPrior) -> Self {
        let LinkPrior { latency_seconds, bytes_per_second } = prior;
        Self { fit: Fit::new([latency_seconds, 1.0 / bytes_per_second], &TUNING) }
    }

    /// Learns that moving `bytes` took `seconds` from the request for it to its last byte.
    pub fn observe(&mut self, bytes: u64, seconds: f64) {
        self.fit.observe(0, &[1.0, bytes as f64], seconds);
    }

    /// Seconds to move `bytes`.
    pub fn seconds(&self, bytes: u64) -> f64 {
        let [latency, per_byte] = self.fit.coefficients();
        latency + per_byte * bytes as f64
    }

    /// Bytes a second once moving; at most a petabyte.
    pub fn bytes_per_second(&self) -> f64 {
        let [_, per_byte] = self.fit.coefficients();
        1.0 / per_byte.max(SECONDS_PER_BYTE_MIN)
    }

    /// Seconds before the first byte.
    pub fn latency_seconds(&self) -> f64 {
        let [latency, _] = self.fit.coefficients();
        latency
    }

    /// Transfers learned from.
    pub fn samples(&self) -> u64 {
        self.fit.samples()
    }

    /// How far predictions of the last 128 transfers, made before learning from each, were off.
    pub fn error(&self) -> ModelError {
        self.fit.error()
    }
}

#[cfg(test)]
mod tests;
