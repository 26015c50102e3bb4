//! What hand-overs came to, for the metrics that vLLM's NIXL connector has.

use std::collections::BTreeMap;

use forebay_kv_move::Report;
use parking_lot::Mutex;

use crate::metrics::Histogram;

/// vLLM's bounds of `nixl_xfer_time_seconds`.
const SECONDS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0];
const BYTES: &[f64] = &[1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10];
const PIECES: &[f64] = &[1.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5];

/// Counters of one engine's hand-overs, as their reader.
#[derive(Debug)]
pub(crate) struct TransferStats(Mutex<Transfers>);

/// See the fields' metrics.
#[derive(Debug, Clone)]
pub(crate) struct Transfers {
    /// `nixl_xfer_time_seconds`
    pub(crate) seconds: Histogram,
    /// `nixl_bytes_transferred`
    pub(crate) bytes: Histogram,
    /// `nixl_num_descriptors`
    pub(crate) pieces: Histogram,
    /// `nixl_num_failed_transfers_total`, by reason.
    pub(crate) failed: BTreeMap<&'static str, u64>,
}

impl Default for TransferStats {
    fn default() -> Self {
        Self(Mutex::new(Transfers {
            seconds: Histogram::new(SECONDS),
            bytes: Histogram::new(BYTES),
            pieces: Histogram::new(PIECES),
            failed: BTreeMap::new(),
        }))
    }
}

impl TransferStats {
    pub(super) fn done(&self, report: &Report) {
        // With everything cached here there was nothing to move; vLLM counts no transfer then.
        if report.blocks == 0 {
            return;
        }
        let mut transfers = self.0.lock();
        transfers.seconds.observe(report.seconds);
        transfers.bytes.observe(report.bytes as f64);
        transfers.pieces.observe(f64::from(report.pieces));
    }

    pub(super) fn failed(&self, reason: &'static str) {
        *self.0.lock().failed.entry(reason).or_default() += 1;
    }

    pub(crate) fn read(&self) -> Transfers {
        self.0.lock().clone()
    }
}
