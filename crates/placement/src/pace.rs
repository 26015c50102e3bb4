//! What a rank's steps are taken to cost: its own learned rates, or those of its kind where the two cannot be told apart.
//!
//! Every rank learns its rates alone, from noisy steps. A few per cent of a long answer's decoding are as many seconds
//! as a cached prefix saves; compared as they are, such differences would send turns of one conversation to whichever
//! rank last looked quick. So ranks of one kind share the mean of their rates, until one is really slower or quicker.

use forebay_perf_model::{RankPrices, StepCoefficients};

use crate::snapshot::RankView;

/// Prompt tokens of the prefill, and context of the decode, at which rates are compared.
const TYPICAL_TOKENS: u32 = 512;
/// Share by which a rank's step times must differ from the mean of its kind before its own count: less is noise. About
/// three times the scatter of learned rates between equal engines on one busy machine.
const TOLERANCE: f64 = 0.15;

/// Mean rates by kind of engine. Ranks are of one kind if their KV is: same weights, same arithmetic. Ranks whose kind was
/// measured are left to what their own profile says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Paces {
    kinds: Vec<Kind>,
}

#[derive(Debug, Clone)]
struct Kind {
    kv_layout: u64,
    /// The first rank's rates, and the sum of the others' differences from them: the mean of equal rates is exact.
    first: [f64; 5],
    differences: [f64; 5],
    ranks: f64,
    mean: StepCoefficients,
    mean_prefill_seconds: f64,
}

impl Paces {
    /// O(ranks × kinds); a fleet has few kinds.
    pub(crate) fn of(ranks: &[RankView]) -> Self {
        let mut kinds: Vec<Kind> = Vec::new();
        for rank in ranks {
            let RankPrices::Rates(own) = rank.perf.prices() else { continue };
            let rates = own.to_array();
            match kinds.iter_mut().find(|kind| kind.kv_layout == rank.kv_layout) {
                Some(kind) => {
                    kind.ranks += 1.0;
                    for ((sum, own), first) in kind.differences.iter_mut().zip(rates).zip(kind.first) {
                        *sum += own - first;
                    }
                }
                None => kinds.push(Kind {
                    kv_layout: rank.kv_layout,
                    first: rates,
                    differences: [0.0; 5],
                    ranks: 1.0,
                    mean: own,
                    mean_prefill_seconds: 0.0,
                }),
            }
        }
        kinds.iter_mut().for_each(Kind::take_mean);
        Self { kinds }
    }

    /// The rates to price a rank with that has rates `own` and runs `decodes` sequences.
    pub(crate) fn pace(&self, own: StepCoefficients, rank: &RankView, decodes: u32) -> StepCoefficients {
        let Some(kind) = self.kinds.iter().find(|kind| kind.kv_layout == rank.kv_layout) else { return own };
        let sequences = decodes.saturating_add(1);
        let decode = |pace: &StepCoefficients| {
            pace.step_seconds(0, 0.0, sequences, u64::from(sequences) * u64::from(TYPICAL_TOKENS))
        };
        let alike = |own: f64, mean: f64| (own - mean).abs() <= TOLERANCE * mean;
        let as_all =
            alike(decode(&own), decode(&kind.mean)) && alike(prefill(&own), kind.mean_prefill_seconds);
        if as_all { kind.mean } else { own }
    }
}

impl Kind {
    fn take_mean(&mut self) {
        let mut mean = self.first;
        for (mean, sum) in mean.iter_mut().zip(self.differences) {
            *mean += sum / self.ranks;
        }
        self.mean = StepCoefficients::from_array(mean);
        self.mean_prefill_seconds = prefill(&self.mean);
    }
}

fn prefill(pace: &StepCoefficients) -> f64 {
    pace.prefill_seconds(TYPICAL_TOKENS, 0, TYPICAL_TOKENS)
}
