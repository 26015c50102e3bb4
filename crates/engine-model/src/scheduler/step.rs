//! Planning a step and taking its results.

use forebay_types::{FinishReason, LegId, TokenId};

use super::{Planned, Scheduler, Sequence};
use crate::{
    job::Output,
    plan::{BlockCopy, Import, Started, StepPlan},
};

/// The partial last block of a shared prompt, to be copied for one choice before it writes there. `from` is referenced
/// until the copy is done.
#[derive(Debug)]
pub(super) struct PendingCopy {
    pub(super) leg: LegId,
    pub(super) choice: u32,
    pub(super) from: u32,
    pub(super) to: u32,
    /// Part of the step that is being computed.
    planned: bool,
}

/// Tokens as the shell drew them: mostly in the order of the chunks that sample them.
struct Drawn<'a> {
    all: &'a [(LegId, u32, TokenId)],
    next: usize,
}

impl Drawn<'_> {
    fn of(&mut self, leg: LegId, choice: u32) -> TokenId {
        let is_it = |(l, c, _): &&(LegId, u32, TokenId)| *l == leg && *c == choice;
        let next = self.all.get(self.next).filter(is_it);
        self.next += usize::from(next.is_some());
        let found = next.or_else(|| self.all.iter().find(is_it));
        found.expect("the shell draws a token for every choice that a chunk samples").2
    }
}

impl Scheduler {
    /// Fills `plan` with the next step: decodes first, then prompts that have begun, then new ones in order.
    ///
    /// An empty plan means that nothing can run until a job, an import's end or a release comes.
    pub fn plan(&mut self, plan: &mut StepPlan) {
        plan.clear();
        self.planned.clear();
        let mut budget = self.config.step_tokens_max;
        self.plan_decodes(plan, &mut budget);
        for index in 0..self.running.len() {
            if !self.running[index].decodes() {
                self.plan_chunk(index, plan, &mut budget);
            }
        }
        while (budget > 0 || self.imports_next())
            && let Some(index) = self.admit(plan)
        {
            self.plan_chunk(index, plan, &mut budget);
        }
        for copy in &mut self.copies {
            copy.planned = true;
            plan.copies.push(BlockCopy { from: copy.from, to: copy.to });
        }
        self.pool.drain_rewritten(&mut plan.rewritten);
    }

    /// Whether the first in the queue computes nothing yet, and need not wait for room in a step.
    fn imports_next(&self) -> bool {
        self.config.imports_first && self.waiting.front().is_some_and(|next| next.import_from.is_some())
    }

    /// Takes the tokens that were drawn, one for each choice that a chunk of the planned step samples, and appends what
    /// the step produced to `outputs`.
    pub fn complete(&mut self, drawn: &[(LegId, u32, TokenId)], outputs: &mut Vec<Output>) {
        let pool = &mut self.pool;
        self.copies.retain(|copy| {
            if copy.planned {
                pool.release(&[copy.from]);
            }
            !copy.planned
        });
        let mut drawn = Drawn { all: drawn, next: 0 };
        let mut planned = std::mem::take(&mut self.planned);
        for Planned { order, tokens, samples } in planned.drain(..) {
            let Ok(index) = self.running.binary_search_by_key(&order, |sequence| sequence.order) else {
                continue;
            };
            let sequence = &mut self.running[index];
            sequence.computed += tokens;
            sequence.cache_full_blocks(&mut self.pool, &self.hasher);
            if samples {
                self.take_drawn(index, &mut drawn, outputs);
            } else if sequence.computed == sequence.len() {
                // A prompt whose first tokens another rank drew, computed here after all.
                let mut sequence = self.running.remove(index);
                let first = sequence.first.take().expect("else its last chunk samples");
                self.continue_choices(&sequence, &first);
            }
        }
        // Its room is used again.
        self.planned = planned;
    }

    fn plan_decodes(&mut self, plan: &mut StepPlan, budget: &mut u32) {
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            if !self.running[index].decodes() {
                index += 1;
                continue;
            }
            if !self.grow(index) {
                continue; // it was itself preempted: its place is now the next one's
            }
            self.plan_chunk(index, plan, budget);
            index += 1;
        }
    }

    /// Gives a decoding sequence room for its next token, preempting the youngest for it. `false` if that was itself.
    fn grow(&mut self, index: usize) -> bool {
        let size = self.config.block_size_tokens;
        while self.running[index].blocks.len() as u32 * size < self.running[index].len() {
            if let Some(block) = self.pool.allocate() {
                self.running[index].blocks.push(block);
                continue;
            }
            self.preempt_youngest();
            if self.running.len() == index {
                return false;
            }
        }
        true
    }

    fn preempt_youngest(&mut self) {
        let mut youngest = self.running.pop().expect("the caller is running");
        let (leg, choice) = (youngest.leg, youngest.choices[0]);
        self.drop_copies(|copy| copy.leg == leg && copy.choice == choice);
        youngest.uninstall(&mut self.pool);
        self.totals.preemptions += 1;
        self.wait_first(youngest);
    }

    /// As much of one sequence as the budget allows; its blocks are there.
    fn plan_chunk(&mut self, index: usize, plan: &mut StepPlan, budget: &mut u32) {
        let sequence = &self.running[index];
        let left = sequence.len() - sequence.computed;
        let tokens = left.min(*budget).min(self.config.chunk_tokens_max);
        if tokens == 0 {
            return;
        }
        let (start, end) = (sequence.computed as usize, (sequence.computed + tokens) as usize);
        let samples = tokens == left && sequence.first.is_none();
        plan.push_chunk(
            sequence.leg,
            sequence.computed,
            &sequence.tokens[start..end],
            &sequence.blocks[..end.div_ceil(self.config.block_size_tokens as usize)],
            if samples { &sequence.choices } else { &[] },
        );
        if sequence.decodes() {
            plan.decodes += 1;
            plan.context_tokens += u64::from(sequence.len());
        } else {
            let (new, before) = (f64::from(tokens), f64::from(sequence.computed));
            plan.prefill_tokens += tokens;
            plan.prefill_attention += new * before + new * new / 2.0;
        }
        self.planned.push(Planned { order: sequence.order, tokens, samples });
        *budget -= tokens;
    }

    /// Lets the first waiting sequence begin, if there is room for all its tokens: its place among the running ones.
    /// Imports begin on the way.
    fn admit(&mut self, plan: &mut StepPlan) -> Option<usize> {
        while let Some(sequence) = self.waiting.front() {
            if self.running.len() + self.importing.len() >= self.config.sequences_max as usize {
                return None;
            }
            let size = self.config.block_size_tokens;
            let matched = sequence.match_cache(&self.pool, size as usize);
            let own = sequence.len().div_ceil(size) - matched.len() as u32;
            // One spare block for each running sequence, so that beginning one does not at once preempt it.
            let spare = self.running.len() as u32;
            let needed = own + self.pool.unreferenced_among(&matched);
            if needed + spare > self.pool.available() {
                return None;
            }
            let mut sequence = self.waiting.pop_front().expect("it is in front");
            self.waiting_prefill_tokens -= u64::from(sequence.prefill_left());
            self.pool.retain(&matched);
            let own: Vec<u32> = (0..own).map(|_| self.pool.allocate().expect("room was checked")).collect();
            let matched_blocks = matched.len();
            sequence.install(matched, &own, size);
            if !std::mem::replace(&mut sequence.started, true) {
                let cached_tokens = sequence.computed;
                self.totals.cached_tokens += u64::from(cached_tokens);
                plan.started.push(Started { leg: sequence.leg, cached_tokens });
            }
            if sequence.import_from.is_some() {
                sequence.import_from = Some(matched_blocks);
                let indices = matched_blocks as u32..;
                plan.imports.push(Import { leg: sequence.leg, blocks: indices.zip(own).collect() });
                self.importing.push(sequence);
                continue;
            }
            // A preempted sequence may be older than some that run.
            let at = self.running.partition_point(|running| running.order < sequence.order);
            self.running.insert(at, sequence);
            return Some(at);
        }
        None
    }

    /// Takes what was drawn at the end of a sequence's chunk.
    fn take_drawn(&mut self, index: usize, drawn: &mut Drawn<'_>, outputs: &mut Vec<Output>) {
        let sequence = &self.running[index];
        let (leg, position) = (sequence.leg, sequence.len());
        let prefill_only = self.legs.get(&leg).is_some_and(|leg| leg.prefill_only);
        if let ([choice], false) = (&sequence.choices[..], prefill_only) {
            let choice = *choice;
            let token = drawn.of(leg, choice);
            outputs.push(Output::Token { leg, choice, position, token });
            return self.take_one(index, choice, token, outputs);
        }
        let tokens: Vec<(u32, TokenId)> = sequence.choices.iter().map(|&c| (c, drawn.of(leg, c))).collect();
        for &(choice, token) in &tokens {
            outputs.push(Output::Token { leg, choice, position, token });
        }
        if prefill_only {
            for &(choice, token) in &tokens {
                if let Some(reason) = self.finish_reason(leg, 1, position + 1, token) {
                    outputs.push(Output::Finished { leg, choice, reason });
                }
            }
            let sequence = self.running.remove(index);
            let blocks = sequence.blocks.iter().map(|&block| (block, self.pool.generation(block))).collect();
            outputs.push(Output::Held { leg, blocks, tokens: sequence.len() });
            outputs.push(Output::Ended { leg });
            self.held.insert(leg, sequence.blocks);
            self.legs.remove(&leg);
            return;
        }
        let sequence = self.running.remove(index);
        let mut going_on = Vec::new();
        for (choice, token) in tokens {
            match self.finish_reason(leg, 1, position + 1, token) {
                None => going_on.push((choice, token)),
                Some(reason) => {
                    outputs.push(Output::Finished { leg, choice, reason });
                    self.close_choice(leg, choice, outputs);
                }
            }
        }
        self.continue_choices(&sequence, &going_on);
    }

    /// The common step: one choice, one more token, nothing moves.
    fn take_one(&mut self, index: usize, choice: u32, token: TokenId, outputs: &mut Vec<Output>) {
        let sequence = &self.running[index];
        let (leg, length) = (sequence.leg, sequence.len() + 1);
        match self.finish_reason(leg, sequence.generated + 1, length, token) {
            None => {
                let sequence = &mut self.running[index];
                sequence.tokens.push(token);
                sequence.generated += 1;
            }
            Some(reason) => {
                let sequence = self.running.remove(index);
                self.pool.release(&sequence.blocks);
                outputs.push(Output::Finished { leg, choice, reason });
                self.close_choice(leg, choice, outputs);
            }
        }
    }

    /// Why a choice ends with `token`, its `generated`th, in a sequence of `length` tokens.
    fn finish_reason(&self, leg: LegId, generated: u32, length: u32, token: TokenId) -> Option<FinishReason> {
        let state = self.legs.get(&leg)?;
        if state.stop_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if generated >= state.output_tokens_max || length >= self.config.context_tokens_max {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    fn close_choice(&mut self, leg: LegId, choice: u32, outputs: &mut Vec<Output>) {
        let Some(state) = self.legs.get_mut(&leg) else { return };
        state.open.retain(|open| *open != choice);
        if state.open.is_empty() {
            self.legs.remove(&leg);
            outputs.push(Output::Ended { leg });
        }
    }

    /// A computed prompt goes on as one sequence a choice, each with its first token. They share full blocks; the first
    /// keeps the partial last one, the others get copies, or wait and compute again where no block is free.
    pub(super) fn continue_choices(&mut self, sequence: &Sequence, first: &[(u32, TokenId)]) {
        let size = self.config.block_size_tokens;
        let full = (sequence.computed / size) as usize;
        let partial = sequence.blocks.get(full).copied();
        let mut children = Vec::new();
        for (nth, &(choice, token)) in first.iter().enumerate() {
            self.pool.retain(&sequence.blocks[..full]);
            let mut blocks = sequence.blocks[..full].to_vec();
            let mut room = true;
            if let Some(partial) = partial {
                if nth == 0 {
                    self.pool.retain(&[partial]);
                    blocks.push(partial);
                } else if let Some(own) = self.pool.allocate() {
                    self.pool.retain(&[partial]);
                    let leg = sequence.leg;
                    self.copies.push(PendingCopy { leg, choice, from: partial, to: own, planned: false });
                    blocks.push(own);
                } else {
                    room = false;
                }
            }
            let mut child = sequence.fork(choice, blocks);
            child.tokens.push(token);
            child.generated += 1;
            children.push((child, room));
        }
        self.pool.release(&sequence.blocks);
        for (mut child, room) in children {
            if room {
                let at = self.running.partition_point(|running| running.order < child.order);
                self.running.insert(at, child);
            } else {
                child.uninstall(&mut self.pool);
                self.totals.preemptions += 1;
                self.wait_first(child);
            }
        }
    }
}
