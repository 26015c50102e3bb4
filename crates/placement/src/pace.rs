//! What a rank's steps are taken to cost: its own learned rates, or those of its kind where the two cannot be told apart.
//!
//! Every rank learns its rates alone, from noisy steps. A few per cent of a long answer's decoding are as many seconds
//! as a cached prefix saves; compared as they are, such differences would send turns of one conversation to whichever
//! rank last looked quick. So ranks of one kind share the mean of their rates, until one is really slower or quicker.

use forebay_perf_model::StepCoefficients;

use crate::snapshot::{RankView, Snapshot};

/// Prompt tokens of the prefill, and context of the decode, at which rates are compared.
const TYPICAL_TOKENS: u32 = 512;

/// Mean rates by kind of engine. Ranks are of one kind if their KV is: same weights, same arithmetic.
pub(crate) struct Paces {
    kinds: Vec<Kind>,
    tolerance: f64,
}

struct Kind {
    kv_layout: u64,
    /// The first rank's rates, and the sum of the others' differences from them: the mean of equal rates is exact.
    first: [f64; 5],
    differences: [f64; 5],
    ranks: f64,
}

impl Paces {
    /// O(ranks × kinds); a fleet has few kinds.
    pub(crate) fn of(snapshot: &Snapshot, tolerance: f64) -> Self {
        let mut kinds: Vec<Kind> = Vec::new();
        for rank in &snapshot.ranks {
            let own = rank.perf.coefficients().to_array();
            match kinds.iter_mut().find(|kind| kind.kv_layout == rank.kv_layout) {
                Some(kind) => {
                    kind.ranks += 1.0;
                    for ((sum, own), first) in kind.differences.iter_mut().zip(own).zip(kind.first) {
                        *sum += own - first;
                    }
                }
                None => kinds.push(Kind {
                    kv_layout: rank.kv_layout,
                    first: own,
                    differences: [0.0; 5],
                    ranks: 1.0,
                }),
            }
        }
        Self { kinds, tolerance }
    }

    /// The rates to price `rank` with, which runs `decodes` sequences.
    pub(crate) fn pace(&self, rank: &RankView, decodes: u32) -> StepCoefficients {
        let own = rank.perf.coefficients();
        let Some(kind) = self.kinds.iter().find(|kind| kind.kv_layout == rank.kv_layout) else { return own };
        let mut mean = kind.first;
        for (mean, sum) in mean.iter_mut().zip(kind.differences) {
            *mean += sum / kind.ranks;
        }
        let mean = StepCoefficients::from_array(mean);
        let sequences = decodes.saturating_add(1);
        let decode = |pace: &StepCoefficients| {
            pace.step_seconds(0, 0.0, sequences, u64::from(sequences) * u64::from(TYPICAL_TOKENS))
        };
        let prefill = |pace: &StepCoefficients| pace.prefill_seconds(TYPICAL_TOKENS, 0, TYPICAL_TOKENS);
        let alike = |own: f64, mean: f64| (own - mean).abs() <= self.tolerance * mean;
        if alike(decode(&own), decode(&mean)) && alike(prefill(&own), prefill(&mean)) { mean } else { own }
    }
}
