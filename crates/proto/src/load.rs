//! Load and step times of ranks.

use std::time::Duration;

use forebay_types::{RankId, RankLoad, StepObservation};

use crate::{engine::required, error::WireError, kv::Life, limits::STEPS_MAX, v1};

/// How busy one rank is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadReport {
    /// Which.
    pub rank: RankId,
    /// As the engine said.
    pub load: RankLoad,
    /// How long ago the engine said so when it was sent.
    pub age: Duration,
}

/// What steps of one rank cost.
#[derive(Debug, Clone, PartialEq)]
pub struct StepsReport {
    /// Which.
    pub rank: RankId,
    /// In the order in which they ran.
    pub steps: Vec<StepObservation>,
}

impl Life {
    /// A load report. Its numbers are the engine's own and not held against each other: engines sample them at different
    /// moments.
    ///
    /// # Errors
    /// A foreign rank, no load.
    pub fn load(&self, message: v1::Load) -> Result<LoadReport, WireError> {
        let v1::Load { dp_rank, load, age_ms } = message;
        Ok(LoadReport {
            rank: self.rank(dp_rank)?,
            load: required(load, "Load", "load")?.into(),
            age: Duration::from_millis(age_ms.into()),
        })
    }

    /// Step observations.
    ///
    /// # Errors
    /// A foreign rank, too many, a duration or an amount of work that cannot be.
    pub fn steps(&self, message: v1::Steps) -> Result<StepsReport, WireError> {
        let v1::Steps { dp_rank, steps } = message;
        let rank = self.rank(dp_rank)?;
        WireError::at_most("the step observations", "steps", steps.len(), STEPS_MAX)?;
        let steps = steps.into_iter().map(StepObservation::try_from).collect::<Result<_, _>>()?;
        Ok(StepsReport { rank, steps })
    }
}

impl From<LoadReport> for v1::Load {
    fn from(report: LoadReport) -> Self {
        let LoadReport { rank: RankId { incarnation: _, dp_rank }, load, age } = report;
        Self {
            dp_rank: dp_rank.into(),
            load: Some(load.into()),
            age_ms: u32::try_from(age.as_millis()).unwrap_or(u32::MAX),
        }
    }
}

impl From<StepsReport> for v1::Steps {
    /// Keeps the last [`STEPS_MAX`] observations.
    fn from(report: StepsReport) -> Self {
        let StepsReport { rank: RankId { incarnation: _, dp_rank }, steps } = report;
        let late = steps.len().saturating_sub(STEPS_MAX);
        Self { dp_rank: dp_rank.into(), steps: steps.into_iter().skip(late).map(Into::into).collect() }
    }
}

impl From<v1::RankLoad> for RankLoad {
    fn from(message: v1::RankLoad) -> Self {
        let v1::RankLoad {
            waiting,
            running,
            decoding,
            prefill_tokens,
            context_tokens,
            blocks_total,
            blocks_free,
            preemptions,
            cached_tokens,
            prompt_tokens,
        } = message;
        Self {
            waiting,
            running,
            decoding,
            prefill_tokens,
            context_tokens,
            blocks_total,
            blocks_free,
            preemptions,
            cached_tokens,
            prompt_tokens,
        }
    }
}

impl From<RankLoad> for v1::RankLoad {
    fn from(load: RankLoad) -> Self {
        let RankLoad {
            waiting,
            running,
            decoding,
            prefill_tokens,
            context_tokens,
            blocks_total,
            blocks_free,
            preemptions,
            cached_tokens,
            prompt_tokens,
        } = load;
        Self {
            waiting,
            running,
            decoding,
            prefill_tokens,
            context_tokens,
            blocks_total,
            blocks_free,
            preemptions,
            cached_tokens,
            prompt_tokens,
        }
    }
}

impl TryFrom<v1::StepObservation> for StepObservation {
    type Error = WireError;

    fn try_from(message: v1::StepObservation) -> Result<Self, WireError> {
        let v1::StepObservation { prefill_tokens, prefill_attention, decodes, context_tokens, seconds } =
            message;
        for (what, number) in
            [("the attention work of a step", prefill_attention), ("a step's seconds", seconds)]
        {
            if !(number.is_finite() && number >= 0.0) {
                return Err(WireError::Range {
                    what,
                    got: number.to_string(),
                    must: "finite and at least 0",
                });
            }
        }
        Ok(Self { prefill_tokens, prefill_attention, decodes, context_tokens, seconds })
    }
}

impl From<StepObservation> for v1::StepObservation {
    fn from(step: StepObservation) -> Self {
        let StepObservation { prefill_tokens, prefill_attention, decodes, context_tokens, seconds } = step;
        Self { prefill_tokens, prefill_attention, decodes, context_tokens, seconds }
    }
}

#[cfg(test)]
mod tests {
    use forebay_types::Incarnation;
    use proptest::prelude::*;

    use super::*;

    const LIFE: Life = Life { incarnation: Incarnation(7), dp_ranks: 2 };
    const RANK: RankId = RankId { incarnation: Incarnation(7), dp_rank: 1 };

    proptest! {
        #[test]
        fn loads_come_back(small in any::<[u32; 5]>(), large in any::<[u64; 5]>(), age_ms: u32) {
            let load = RankLoad {
                waiting: small[0], running: small[1], decoding: small[2], blocks_total: small[3],
                blocks_free: small[4], prefill_tokens: large[0], context_tokens: large[1],
                preemptions: large[2], cached_tokens: large[3], prompt_tokens: large[4],
            };
            let report = LoadReport { rank: RANK, load, age: Duration::from_millis(age_ms.into()) };
            prop_assert_eq!(LIFE.load(report.into()), Ok(report));
        }
    }

    #[test]
    fn steps_come_back_and_only_the_latest_are_sent() {
        let step = |n: usize| StepObservation {
            prefill_tokens: n as u32,
            prefill_attention: 0.5,
            decodes: 3,
            context_tokens: 4,
            seconds: 0.01,
        };
        let report = StepsReport { rank: RANK, steps: (0..STEPS_MAX + 10).map(step).collect() };
        let arrived = LIFE.steps(report.clone().into()).expect("valid");
        assert_eq!((arrived.rank, arrived.steps.as_slice()), (RANK, &report.steps[10..]));
    }

    #[test]
    fn reports_that_cannot_be_are_refused_in_sentences() {
        let step = |seconds| v1::StepObservation { seconds, ..v1::StepObservation::default() };
        let steps =
            |dp_rank, steps| LIFE.steps(v1::Steps { dp_rank, steps }).expect_err("refused").to_string();
        assert_eq!(steps(2, vec![]), "DP rank 2 of an engine with 2");
        assert_eq!(steps(65_536, vec![]), "DP rank 65536 of an engine with 2");
        assert_eq!(steps(0, vec![step(-1.0)]), "a step's seconds is -1; it must be finite and at least 0");
        assert_eq!(
            steps(0, vec![step(f64::NAN)]),
            "a step's seconds is NaN; it must be finite and at least 0"
        );
        assert_eq!(
            steps(0, vec![step(0.1); STEPS_MAX + 1]),
            "the step observations: 257 steps, at most 256 are allowed"
        );
        let empty = v1::Load { dp_rank: 0, load: None, age_ms: 0 };
        assert_eq!(LIFE.load(empty).expect_err("refused").to_string(), "Load has no load, which is required");
    }
}
