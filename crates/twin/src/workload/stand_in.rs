//! A synthetic trace with the statistics that matter of a chat service's: long prompts with a heavy tail, short answers,
//! and somewhat less than half of all prompt tokens seen before. It stands in where no recorded trace is at hand, and is
//! none.
//!
//! Conversations arrive at random; each has a few turns whose prompts repeat the earlier ones and add to them. Turns come
//! at fixed times, like those of a trace.

use super::trace::{MOONCAKE_BLOCK_TOKENS as BLOCK_TOKENS, Trace, TraceRequest};
use crate::draw::Draw;

/// Its numbers. Chosen so that the mean prompt has 12,000 tokens, the mean answer 343, and an endless cache would find 40
/// to 50 % of all prompt tokens; a test holds them to that.
#[derive(Debug, Clone, Copy)]
pub struct StandIn {
    /// Chance that a conversation goes on after a turn.
    pub goes_on: f64,
    /// Median and sigma of a first prompt.
    pub first: (f64, f64),
    /// Median and sigma of what a later turn adds.
    pub more: (f64, f64),
    /// Median and sigma of answers.
    pub answer: (f64, f64),
    /// Mean seconds between turns, at the trace's own pace.
    pub pause_seconds: f64,
    /// Conversations a second, at the trace's own pace.
    pub conversations: f64,
    /// System prompts in blocks, and how many there are.
    pub system_blocks: u32,
    /// System prompts.
    pub systems: u64,
}

/// Longest prompt.
const PROMPT_TOKENS_MAX: u32 = 120_000;

impl Default for StandIn {
    fn default() -> Self {
        Self {
            goes_on: 0.45,
            first: (4800.0, 1.1),
            more: (1800.0, 1.2),
            answer: (240.0, 0.85),
            pause_seconds: 40.0,
            conversations: 1.5,
            system_blocks: 1,
            systems: 8,
        }
    }
}

impl StandIn {
    /// `seconds` of trace, in order of time.
    pub fn trace(&self, seconds: f64, seed: u64) -> Trace {
        let mut draw = Draw::new(seed, "stand-in");
        let mut ids = self.systems * u64::from(self.system_blocks);
        let mut rows = Vec::new();
        // Conversations that began before the trace make its beginning like its middle.
        let mut began = -600.0;
        while began < seconds {
            began += draw.exponential(1.0 / self.conversations);
            self.conversation(began, &mut ids, &mut draw, |row| {
                if (0.0..seconds).contains(&row.at_seconds) {
                    rows.push(row);
                }
            });
        }
        rows.sort_by(|one: &TraceRequest, other| one.at_seconds.total_cmp(&other.at_seconds));
        Trace { requests: rows, tenants: vec![String::new()], skipped: 0 }
    }

    fn conversation(&self, began: f64, ids: &mut u64, draw: &mut Draw, mut push: impl FnMut(TraceRequest)) {
        let first_of_system = draw.below(self.systems) * u64::from(self.system_blocks);
        let mut blocks: Vec<u64> = (first_of_system..).take(self.system_blocks as usize).collect();
        let mut fresh = || {
            *ids += 1;
            *ids
        };
        let mut seconds = began;
        let mut tokens = draw.lognormal_tokens(self.first.0, self.first.1, 64, PROMPT_TOKENS_MAX);
        loop {
            let answer = draw.lognormal_tokens(self.answer.0, self.answer.1, 1, 4000);
            let (whole, part) = (tokens / BLOCK_TOKENS, tokens % BLOCK_TOKENS);
            blocks.truncate(whole as usize);
            blocks.resize_with(whole as usize, &mut fresh);
            // A block that is not full is nobody else's: the next turn goes on within it.
            let ids = blocks.iter().copied().chain((part > 0).then(&mut fresh)).collect();
            push(TraceRequest {
                at_seconds: seconds,
                prompt_tokens: tokens,
                output_tokens: answer,
                blocks: ids,
                block_tokens: BLOCK_TOKENS,
                tenant: 0,
                observed: None,
                session: None,
            });
            tokens += answer + draw.lognormal_tokens(self.more.0, self.more.1, 16, PROMPT_TOKENS_MAX);
            if draw.unit() > self.goes_on || tokens > PROMPT_TOKENS_MAX {
                return;
            }
            seconds += draw.exponential(self.pause_seconds);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn it_has_the_statistics_that_it_is_said_to_have() {
        let rows = StandIn::default().trace(3600.0, 1).requests;
        let count = rows.len() as f64;
        let mean =
            |of: fn(&TraceRequest) -> u32| rows.iter().map(|row| f64::from(of(row))).sum::<f64>() / count;
        let (input, output) = (mean(|row| row.prompt_tokens), mean(|row| row.output_tokens));
        assert!((11_000.0..13_000.0).contains(&input), "mean input {input}");
        assert!((325.0..360.0).contains(&output), "mean output {output}");
        let mut inputs: Vec<u32> = rows.iter().map(|row| row.prompt_tokens).collect();
        inputs.sort_unstable();
        let p99 = f64::from(inputs[inputs.len() * 99 / 100]);
        assert!(p99 > 5.0 * input, "P99 {p99} of a mean of {input}");

        let (mut seen, mut reused) = (HashSet::new(), 0_u64);
        for row in &rows {
            let mut known = true;
            for id in &row.blocks {
                known &= !seen.insert(*id);
                reused += u64::from(known) * u64::from(BLOCK_TOKENS);
            }
        }
        let share = reused as f64 / (input * count);
        assert!((0.40..0.50).contains(&share), "reuse {share}");
    }
}
