//! Steps in which nothing is decided: every sequence decodes one token, none ends, none begins. Who computes nothing can
//! take many of them at once.
//!
//! Invariant: [`Scheduler::advance`] leaves what as many steps of [`Scheduler::plan`] and [`Scheduler::complete`] would
//! leave, and its events are in the same order.

use forebay_types::{LegId, TokenId};

use super::Scheduler;

/// What a block needs at one step: decodes are given room when a step is planned, and fill blocks when it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    Grow,
    Fill,
}

impl Scheduler {
    /// How many next steps decide nothing, at least; 0 if the next one may. All sequences then decode, none of them ends,
    /// and there are blocks for all of it.
    pub fn quiet_steps(&self) -> u32 {
        let is_busy = !self.waiting.is_empty() || !self.importing.is_empty() || !self.copies.is_empty();
        if is_busy || self.running.is_empty() || self.running.len() > self.config.step_tokens_max as usize {
            return 0;
        }
        let mut steps = u32::MAX;
        for sequence in &self.running {
            let Some(leg) = self.legs.get(&sequence.leg) else { return 0 };
            if !sequence.decodes() || sequence.choices.len() != 1 || !leg.stop_tokens.is_empty() {
                return 0;
            }
            // The step after these may be the last one.
            let of_answer = leg.output_tokens_max.saturating_sub(sequence.generated + 1);
            let of_context = self.config.context_tokens_max.saturating_sub(sequence.len() + 1);
            steps = steps.min(of_answer).min(of_context);
        }
        let blocks_each = self.pool.available() / self.running.len() as u32;
        steps.min(blocks_each.saturating_mul(self.config.block_size_tokens))
    }

    /// Sequences that decode, and the tokens of context that the next step reads.
    pub fn decoding(&self) -> (u32, u64) {
        let decoding = self.running.iter().filter(|sequence| sequence.decodes());
        decoding.fold((0, 0), |(count, context), sequence| (count + 1, context + u64::from(sequence.len())))
    }

    /// Legs that decode, in the order in which steps serve them, each with the position of its next token.
    pub fn decoding_legs(&self) -> impl Iterator<Item = (LegId, u32)> + '_ {
        let decoding = self.running.iter().filter(|sequence| sequence.decodes());
        decoding.map(|sequence| (sequence.leg, sequence.len()))
    }

    /// Whether the next step computes nothing unless something comes: nothing runs, waits or is brought in.
    pub fn is_resting(&self) -> bool {
        self.running.is_empty()
            && self.waiting.is_empty()
            && self.importing.is_empty()
            && self.copies.is_empty()
    }

    /// Takes `steps` steps: no more than [`quiet_steps`](Self::quiet_steps) said, less those taken since. `token_of` says which token a leg has at a position.
    ///
    /// # Panics
    /// If there are not that many quiet steps and the pool runs out of blocks.
    pub fn advance(&mut self, steps: u32, token_of: impl Fn(LegId, u32) -> TokenId) {
        let size = self.config.block_size_tokens;
        let mut turns: Vec<(u32, Turn, usize)> = Vec::new();
        for (index, sequence) in self.running.iter_mut().enumerate() {
            let (length, room) = (sequence.len(), sequence.blocks.len() as u32 * size);
            // Step n is planned with `length + n` tokens, and has computed them all when it is over.
            let grows = (room.max(length - 1) + 1 - length..steps).step_by(size as usize);
            turns.extend(grows.map(|step| (step, Turn::Grow, index)));
            let fills = (length.next_multiple_of(size) - length..steps).step_by(size as usize);
            turns.extend(fills.map(|step| (step, Turn::Fill, index)));
            let leg = sequence.leg;
            sequence.tokens.extend((length..length + steps).map(|position| token_of(leg, position)));
            sequence.generated += steps;
        }
        turns.sort_unstable();
        for (step, turn, index) in turns {
            let sequence = &mut self.running[index];
            match turn {
                Turn::Grow => {
                    sequence.blocks.push(self.pool.allocate().expect("quiet steps have their blocks"))
                }
                Turn::Fill => {
                    sequence.computed = sequence.len() - steps + step;
                    sequence.cache_full_blocks(&mut self.pool, &self.hasher);
                }
            }
        }
        for sequence in &mut self.running {
            sequence.computed = sequence.len() - 1;
        }
        // Nothing is written here.
        let mut rewritten = Vec::new();
        self.pool.drain_rewritten(&mut rewritten);
    }
}
