//! The step machine: [`Scheduler::plan`] says what the next step computes, [`Scheduler::complete`] takes what came of
//! it.
//!
//! A job waits as one sequence; at the end of its prompt it forks into one sequence a choice, which share the prompt's
//! full blocks. A sequence gets all blocks of its tokens when it begins, so only decodes grow, and only growth preempts:
//! the youngest sequence gives its blocks back and computes its tokens again later.

mod quiet;
mod sequence;
mod step;

use std::collections::{BTreeMap, VecDeque};

use forebay_kv_hash::BlockHasher;
use forebay_types::{KvEvent, LegId, RankLoad, TokenId};

use crate::{
    job::{Job, SchedulerConfig, SubmitError, Work},
    pool::{Accounting, Pool},
};
use sequence::{Order, Origin, Sequence};
use step::PendingCopy;

/// The scheduler of one rank.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    hasher: BlockHasher,
    pool: Pool,
    legs: BTreeMap<LegId, Leg>,
    waiting: VecDeque<Sequence>,
    /// Sorted by order.
    running: Vec<Sequence>,
    /// Decode jobs whose KV is on its way.
    importing: Vec<Sequence>,
    /// Destinations of imports whose leg was cancelled, until the transfer ends.
    abandoned: BTreeMap<LegId, Vec<u32>>,
    /// Blocks of finished prefill legs.
    held: BTreeMap<LegId, Vec<u32>>,
    copies: Vec<PendingCopy>,
    /// Chunks of the step that was planned last, for [`Scheduler::complete`].
    planned: Vec<Planned>,
    arrivals: u64,
    waiting_prefill_tokens: u64,
    totals: Totals,
}

/// What all sequences of a job share.
#[derive(Debug)]
struct Leg {
    output_tokens_max: u32,
    stop_tokens: std::sync::Arc<[TokenId]>,
    prefill_only: bool,
    /// Choices that have not ended.
    open: Vec<u32>,
}

#[derive(Debug)]
struct Planned {
    order: Order,
    tokens: u32,
    samples: bool,
}

#[derive(Debug, Default)]
struct Totals {
    preemptions: u64,
    cached_tokens: u64,
    prompt_tokens: u64,
}

impl Scheduler {
    /// An idle rank with an empty cache. The context is cut to what the pool holds.
    ///
    /// # Panics
    /// If a bound is 0 or the hasher's block size is not the pool's: both are fixed at start-up.
    pub fn new(mut config: SchedulerConfig, hasher: BlockHasher) -> Self {
        let SchedulerConfig {
            block_size_tokens,
            blocks_total,
            step_tokens_max,
            chunk_tokens_max,
            sequences_max,
            ..
        } = config;
        assert!(block_size_tokens > 0 && blocks_total > 0 && sequences_max > 0);
        assert!(step_tokens_max > 0 && chunk_tokens_max > 0);
        assert_eq!(block_size_tokens, hasher.block_size_tokens());
        config.context_tokens_max =
            config.context_tokens_max.min(blocks_total.saturating_mul(block_size_tokens));
        Self {
            config,
            hasher,
            pool: Pool::new(blocks_total),
            legs: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            importing: Vec::new(),
            abandoned: BTreeMap::new(),
            held: BTreeMap::new(),
            copies: Vec::new(),
            planned: Vec::new(),
            arrivals: 0,
            waiting_prefill_tokens: 0,
            totals: Totals::default(),
        }
    }

    /// Queues a job.
    ///
    /// # Errors
    /// Says whether waiting helps.
    pub fn submit(&mut self, job: Job) -> Result<(), SubmitError> {
        self.check(&job)?;
        let Job { leg, prompt, hashes, root, choices, output_tokens_max, stop_tokens, work } = job;
        let prefill_only = work == Work::Prefill;
        let (first, import) = match work {
            Work::Aggregated | Work::Prefill => (None, false),
            Work::Decode { first } => (Some(first), true),
        };
        self.arrivals += 1;
        self.totals.prompt_tokens += prompt.len() as u64;
        self.legs.insert(leg, Leg { output_tokens_max, stop_tokens, prefill_only, open: choices.clone() });
        let order = (self.arrivals, 0);
        self.wait_last(Sequence::new(Origin { order, leg, choices, prompt, hashes, root, first, import }));
        Ok(())
    }

    fn check(&self, job: &Job) -> Result<(), SubmitError> {
        let malformed = |reason| Err(SubmitError::Malformed { reason });
        let prompt_tokens = job.prompt.len() as u32;
        if job.prompt.is_empty() {
            return malformed("the prompt is empty");
        }
        if prompt_tokens >= self.config.context_tokens_max {
            let context_tokens_max = self.config.context_tokens_max;
            return Err(SubmitError::TooLong { prompt_tokens, context_tokens_max });
        }
        if job.hashes.len() != job.prompt.len() / self.config.block_size_tokens as usize {
            return malformed("there is not one hash for each full block");
        }
        if job.choices.is_empty() || job.output_tokens_max == 0 {
            return malformed("nothing is to be generated");
        }
        let mut distinct = job.choices.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.len() != job.choices.len() {
            return malformed("a choice is named twice");
        }
        if let Work::Decode { first } = &job.work
            && (first.len() != job.choices.len()
                || first.iter().any(|(choice, _)| !job.choices.contains(choice)))
        {
            return malformed("a choice lacks its first token");
        }
        if let Work::Decode { first } = &job.work
            && (job.output_tokens_max < 2 || first.iter().any(|(_, token)| job.stop_tokens.contains(token)))
        {
            return malformed("a choice has ended with its first token");
        }
        if self.legs.contains_key(&job.leg)
            || self.abandoned.contains_key(&job.leg)
            || self.held.contains_key(&job.leg)
        {
            return malformed("the leg is already here");
        }
        if self.waiting.len() >= self.config.waiting_max as usize {
            return Err(SubmitError::QueueFull { waiting_max: self.config.waiting_max });
        }
        Ok(())
    }

    /// Forgets a job wherever it is and frees its blocks, held ones too; blocks to which a transfer may still write are
    /// quarantined until [`Scheduler::import_finished`]. Whether there was such a job.
    pub fn cancel(&mut self, leg: LegId) -> bool {
        let held = self.held.contains_key(&leg);
        self.release_held(leg);
        if self.legs.remove(&leg).is_none() {
            return held;
        }
        self.drop_copies(|copy| copy.leg == leg);
        self.drop_sequences(|sequence| sequence.leg == leg);
        if let Some(index) = self.importing.iter().position(|sequence| sequence.leg == leg) {
            let sequence = self.importing.remove(index);
            let own = sequence.import_from.expect("it is importing");
            let (matched, destinations) = sequence.blocks.split_at(own);
            self.pool.quarantine(destinations);
            self.pool.release(matched);
            self.abandoned.insert(leg, destinations.to_vec());
        }
        true
    }

    /// Ends one choice early: its text is complete. Whether that was the job's last one.
    pub fn stop_choice(&mut self, leg: LegId, choice: u32) -> bool {
        let Some(state) = self.legs.get_mut(&leg) else { return false };
        if !state.open.contains(&choice) {
            return false;
        }
        if state.open.len() == 1 {
            return self.cancel(leg);
        }
        state.open.retain(|open| *open != choice);
        self.drop_copies(|copy| copy.leg == leg && copy.choice == choice);
        self.drop_sequences(|sequence| sequence.leg == leg && sequence.choices == [choice]);
        // A prompt that is still computed for several choices is computed for one less.
        for sequence in self.waiting.iter_mut().chain(&mut self.running).chain(&mut self.importing) {
            if sequence.leg == leg && sequence.choices.len() > 1 {
                sequence.choices.retain(|open| *open != choice);
                sequence.first.iter_mut().for_each(|first| first.retain(|(open, _)| *open != choice));
            }
        }
        false
    }

    /// A transfer that [`crate::StepPlan::imports`] asked for is over, and nothing writes to its destination any more.
    /// `ok: false` makes the rank compute the prompt itself.
    pub fn import_finished(&mut self, leg: LegId, ok: bool) {
        if let Some(blocks) = self.abandoned.remove(&leg) {
            self.pool.end_quarantine(&blocks);
            return;
        }
        let Some(index) = self.importing.iter().position(|sequence| sequence.leg == leg) else { return };
        let mut sequence = self.importing.remove(index);
        sequence.import_from = None;
        if ok {
            sequence.computed = sequence.len();
            sequence.cache_full_blocks(&mut self.pool, &self.hasher);
            let first = sequence.first.take().expect("a decode job knows its first tokens");
            self.continue_choices(&sequence, &first);
        } else {
            sequence.uninstall(&mut self.pool);
            self.wait_first(sequence);
        }
    }

    /// Frees what a finished prefill job holds: it was handed over, or its lease is over. Unknown legs are ignored.
    pub fn release_held(&mut self, leg: LegId) {
        if let Some(blocks) = self.held.remove(&leg) {
            self.pool.release(&blocks);
        }
    }

    /// Appends the cache changes since the last call, in order.
    pub fn drain_events(&mut self, out: &mut Vec<KvEvent>) {
        self.pool.drain_events(out);
    }

    /// Every block that can be reused, as the events that would make it from nothing: for a reader that lost some.
    pub fn cached(&self) -> Vec<KvEvent> {
        self.pool.cached()
    }

    /// What the rank carries. O(running).
    pub fn load(&self) -> RankLoad {
        let accounting = self.pool.accounting();
        let decoding = || self.running.iter().filter(|sequence| sequence.decodes());
        let prefill: u64 = self.running.iter().map(|sequence| u64::from(sequence.prefill_left())).sum();
        RankLoad {
            waiting: (self.waiting.len() + self.importing.len()) as u32,
            running: self.running.len() as u32,
            decoding: decoding().count() as u32,
            prefill_tokens: prefill + self.waiting_prefill_tokens,
            context_tokens: decoding().map(|sequence| u64::from(sequence.len())).sum(),
            blocks_total: self.config.blocks_total,
            blocks_free: accounting.free + accounting.cached,
            preemptions: self.totals.preemptions,
            cached_tokens: self.totals.cached_tokens,
            prompt_tokens: self.totals.prompt_tokens,
        }
    }

    /// Whether there is nothing to compute, import or hold.
    pub fn is_idle(&self) -> bool {
        self.legs.is_empty() && self.held.is_empty() && self.abandoned.is_empty()
    }

    /// Blocks by state.
    pub fn accounting(&self) -> Accounting {
        let held = self.held.values().map(|blocks| blocks.len() as u32).sum();
        Accounting { held, ..self.pool.accounting() }
    }

    fn wait_last(&mut self, sequence: Sequence) {
        self.waiting_prefill_tokens += u64::from(sequence.prefill_left());
        // Those that began before keep their place: they were preempted.
        let stays_ahead = |other: &Sequence| other.started || other.import_from.is_some();
        if self.config.imports_first && sequence.import_from.is_some() {
            let at = self.waiting.iter().take_while(|other| stays_ahead(other)).count();
            self.waiting.insert(at, sequence);
        } else {
            self.waiting.push_back(sequence);
        }
    }

    /// Back to the queue, before everything that came later.
    fn wait_first(&mut self, sequence: Sequence) {
        self.waiting_prefill_tokens += u64::from(sequence.prefill_left());
        let at = self.waiting.partition_point(|waiting| waiting.order < sequence.order);
        self.waiting.insert(at, sequence);
    }

    fn drop_sequences(&mut self, gone: impl Fn(&Sequence) -> bool) {
        let pool = &mut self.pool;
        self.running.retain(|sequence| {
            let drop = gone(sequence);
            if drop {
                pool.release(&sequence.blocks);
            }
            !drop
        });
        let left = &mut self.waiting_prefill_tokens;
        self.waiting.retain(|sequence| {
            let drop = gone(sequence);
            if drop {
                *left -= u64::from(sequence.prefill_left());
            }
            !drop
        });
    }

    fn drop_copies(&mut self, gone: impl Fn(&PendingCopy) -> bool) {
        let pool = &mut self.pool;
        self.copies.retain(|copy| {
            let drop = gone(copy);
            if drop {
                pool.release(&[copy.from]);
            }
            !drop
        });
    }
}

#[cfg(test)]
mod tests;
