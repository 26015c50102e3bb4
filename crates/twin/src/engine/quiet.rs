//! An engine's next steps where they decide nothing: when they will be over, and how they are taken at once.

use forebay_perf_model::StepShape;
use forebay_types::{LegId, StepObservation, TokenId};

use super::{Group, Happened};
use crate::clock::Time;

/// Steps that decide nothing, as they will be unless something comes.
#[derive(Debug, Default)]
pub(crate) struct Quiet {
    /// When the first one begins.
    pub began: Time,
    /// When each is over. Empty: there are none.
    pub ends: Vec<Time>,
    /// How long each takes.
    seconds: Vec<f64>,
    /// Those that were taken.
    pub taken: usize,
}

impl Quiet {
    pub(crate) fn is_on(&self) -> bool {
        !self.ends.is_empty()
    }

    /// When the first that was not taken is over; never, if there is none.
    pub(crate) fn next(&self) -> Time {
        self.ends.get(self.taken).copied().unwrap_or(Time::NEVER)
    }

    /// There are none, and room for the next ones.
    pub(crate) fn clear(&mut self) {
        self.ends.clear();
        self.seconds.clear();
        self.taken = 0;
    }
}

impl Group {
    /// How many next steps decide nothing, at least. To be asked only between steps.
    pub(crate) fn quiet_steps(&self) -> u32 {
        debug_assert!(self.running.is_none());
        // The next step says what is notable.
        if self.ranks.iter().any(|rank| rank.notable || !rank.arrived.is_empty()) {
            return 0;
        }
        let busy = self.ranks.iter().filter(|rank| !rank.scheduler.is_resting());
        busy.map(|rank| rank.scheduler.quiet_steps()).min().unwrap_or(0)
    }

    /// Works out when so many quiet steps will be over, from `now` on.
    pub(crate) fn foresee(&self, now: Time, steps: u32, slow: f64, quiet: &mut Quiet) {
        quiet.clear();
        quiet.began = now;
        let budget_tokens = self.kind.scheduler.step_tokens_max;
        let loads: Vec<(u32, u64)> = self.ranks.iter().map(|rank| rank.scheduler.decoding()).collect();
        let mut end = now;
        for step in 0..u64::from(steps) {
            let shapes = loads.iter().map(|&(decodes, context)| StepShape {
                decodes,
                context_tokens: context + step * u64::from(decodes),
                budget_tokens,
                ..StepShape::default()
            });
            let seconds = self.kind.profile.step_seconds(&StepShape::of_group(shapes)) * slow;
            end = end.after(seconds);
            quiet.ends.push(end);
            quiet.seconds.push(seconds);
        }
    }

    /// Legs that decode, each with the position of its next token.
    pub(crate) fn decoding(&self) -> impl Iterator<Item = (LegId, u32)> + '_ {
        self.ranks.iter().flat_map(|rank| rank.scheduler.decoding_legs())
    }

    /// Takes quiet steps, from number `from` to the last one that is to be taken by now.
    pub(crate) fn advance(
        &mut self,
        quiet: &Quiet,
        from: usize,
        token_of: impl Fn(LegId, u32) -> TokenId,
        happened: &mut Happened,
    ) {
        let taken = from..quiet.taken;
        self.busy_seconds =
            quiet.seconds[taken.clone()].iter().fold(self.busy_seconds, |sum, step| sum + step);
        for rank in self.ranks.iter_mut().filter(|rank| !rank.scheduler.is_resting()) {
            let (decodes, context) = rank.scheduler.decoding();
            for (nth, step) in (0..).zip(taken.clone()) {
                let observed = StepObservation {
                    prefill_tokens: 0,
                    prefill_attention: 0.0,
                    decodes,
                    context_tokens: context + nth * u64::from(decodes),
                    seconds: quiet.seconds[step],
                };
                happened.steps.push((rank.id, quiet.ends[step], observed));
            }
            rank.scheduler.advance(taken.len() as u32, &token_of);
            rank.computed_tokens += taken.len() as u64 * u64::from(decodes);
            happened.reports.push(rank.report(None));
        }
    }
}
