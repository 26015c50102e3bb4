//! One data-parallel rank of a double: scheduler, KV pool and model, as a plain value.
//!
//! In: requests ([`Core::submit`]), aborts, KV that arrived from elsewhere ([`Core::loaded`]). Out of each
//! [`Core::step`]: tokens, KV events, and loads of KV that the shell ([`rank`]) must start. Start at [`Core`].
//!
//! Always holds: a step schedules every running request and as many waiting ones as fit, computes whole prompts at
//! once, and draws one token for each; KV is computed for a token when the next one is drawn, so the last token of an
//! answer has none (which is why 192 of 194 + 1 tokens are cached in `fixtures/vllm/nixl_pd`).

pub(crate) mod nixl;
pub(crate) mod pool;
pub(crate) mod rank;
pub(crate) mod request;
mod schedule;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::events::KvEvent;
use crate::kv::Model;
use crate::tokenizer::Token;
use pool::{BlockId, BlockPool, EngineHash, Style};
use request::{Ending, Outlet, Phase, Sampled, Sequence, Transfer, Work};

/// What one rank is.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) block_size: usize,
    pub(crate) blocks: usize,
    pub(crate) prefix_caching: bool,
    pub(crate) style: Style,
    /// Requests that run at once.
    pub(crate) running_max: usize,
    /// Waiting requests go by their priority, not by arrival.
    pub(crate) by_priority: bool,
    pub(crate) model: Model,
    /// Where hash chains start.
    pub(crate) hash_root: u64,
    pub(crate) connector: Option<nixl::Connector>,
}

/// KV that must come from elsewhere before a request can run.
#[derive(Clone, Debug)]
pub(crate) enum Load {
    /// vLLM pull or push: read these blocks of that engine.
    Remote { request: String, source: nixl::Source },
    /// SGLang: the prompt's KV of this room.
    Room { request: String, room: request::Room },
}

/// SGLang: what a prefill server hands to a decode server.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) room: request::Room,
    pub(crate) entries: Vec<u64>,
    pub(crate) first: Token,
}

/// What a step gives out. The shell delivers tokens when the step's time is over.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) events: Vec<KvEvent>,
    pub(crate) loads: Vec<Load>,
    /// SGLang: these rooms' prompts are computed.
    pub(crate) offers: Vec<Offer>,
    /// Prompt tokens computed.
    pub(crate) prefilled: usize,
    /// Requests that a token was drawn for.
    pub(crate) decoded: usize,
    /// An assertion failed inside the engine: it is dead.
    pub(crate) died: bool,
}

/// One token, or an end, for one request.
#[derive(Debug)]
pub(crate) struct Delivery {
    pub(crate) outlet: Arc<Outlet>,
    pub(crate) token: Option<Sampled>,
    pub(crate) ending: Option<Ending>,
    pub(crate) cached_tokens: usize,
    pub(crate) transfer_params: Option<serde_json::Value>,
}

impl Delivery {
    pub(crate) fn perform(self) {
        self.outlet.put(|output| {
            output.tokens.extend(self.token);
            output.cached_tokens = Some(self.cached_tokens);
            output.transfer_params = self.transfer_params.or_else(|| output.transfer_params.take());
            output.ending = self.ending.or_else(|| output.ending.take());
        });
    }
}

/// Sums since the engine started, named after vLLM's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Prompt tokens asked of other engines.
    pub external_queries: u64,
    /// Prompt tokens that other engines brought.
    pub external_hits: u64,
    /// Prompt tokens computed here.
    pub computed: u64,
    /// Tokens generated.
    pub generated: u64,
    /// Of these, those that followed another one of the same answer here.
    pub gaps: u64,
    /// Requests ended by a stop token or string.
    pub stopped: u64,
    /// Requests ended by their length.
    pub length: u64,
    /// Requests ended by an error.
    pub failed: u64,
    /// Requests aborted. vLLM's metric does not count these.
    pub aborted: u64,
    /// Requests sent back to the queue for want of blocks.
    pub preempted: u64,
    /// Steps taken.
    pub steps: u64,
    /// Hand-overs finished, on the receiving side.
    pub transfers: u64,
    /// Hand-overs that failed, on the receiving side.
    pub transfers_failed: u64,
    /// Prefilled requests whose blocks nobody fetched within the lease.
    pub leases_expired: u64,
    /// Notices that blocks were fetched, for requests no longer known.
    pub late_notices: u64,
}

/// What a rank is doing now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gauges {
    /// Requests that compute.
    pub running: usize,
    /// Requests that wait for blocks or a place.
    pub waiting: usize,
    /// Of these, those that wait for another engine's KV.
    pub waiting_for_kv: usize,
    /// Share of the KV blocks in use, 0 to 1.
    pub usage: f64,
    /// Prefilled requests whose blocks are kept for another engine.
    pub held: usize,
    /// KV blocks that requests can have.
    pub blocks: usize,
    /// Tokens in use by requests: their contexts.
    pub tokens: usize,
    /// Prompt tokens of waiting requests, whether cached or not.
    pub waiting_tokens: usize,
    /// Requests that can run at once.
    pub running_max: usize,
}

/// One rank. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Core {
    settings: Settings,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    held: BTreeMap<String, Held>,
    counts: Counts,
    arrivals: u64,
    dead: bool,
}

#[derive(Debug)]
struct Held {
    table: Vec<BlockId>,
    until: Instant,
}

impl Core {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            pool: BlockPool::new(
                settings.blocks,
                settings.block_size,
                settings.style,
                settings.prefix_caching,
                settings.hash_root,
            ),
            settings,
            waiting: VecDeque::new(),
            running: Vec::new(),
            held: BTreeMap::new(),
            counts: Counts::default(),
            arrivals: 0,
            dead: false,
        }
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// Takes a request; a dead engine answers at once.
    pub(crate) fn submit(&mut self, work: Work, outlet: Arc<Outlet>) {
        if self.dead {
            outlet.put(|output| output.ending = Some(Ending::EngineDead));
            return;
        }
        self.arrivals += 1;
        let model = match &work.identity.adapter {
            Some(name) => self.settings.model.with_adapter(name),
            None => self.settings.model,
        };
        self.waiting.push_back(Sequence::new(work, outlet, model, self.arrivals));
    }

    /// Drops a request, wherever it is; its blocks are free at once. `stopped` if a stop string ended it.
    pub(crate) fn abort(&mut self, id: &str, stopped: bool) -> bool {
        let Some(sequence) = self.remove(id) else { return false };
        self.pool.release(&sequence.table);
        let counter = if stopped { &mut self.counts.stopped } else { &mut self.counts.aborted };
        *counter += 1;
        sequence.outlet.put(|output| output.ending = Some(Ending::Abort));
        true
    }

    /// Ids of requests that are not finished.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.running.iter().chain(&self.waiting).map(|sequence| sequence.work.id.clone()).collect()
    }

    /// Ends every request: the engine is dead and stays so.
    pub(crate) fn die(&mut self) {
        self.dead = true;
        for sequence in self.waiting.drain(..).chain(self.running.drain(..)) {
            sequence.outlet.put(|output| output.ending = Some(Ending::EngineDead));
        }
    }

    pub(crate) fn dead(&self) -> bool {
        self.dead
    }

    /// Whether a step would do anything.
    pub(crate) fn busy(&self) -> bool {
        !self.dead
            && (!self.running.is_empty()
                || self.waiting.iter().any(|sequence| sequence.phase == Phase::Waiting))
    }

    pub(crate) fn reset_prefix_cache(&mut self) -> bool {
        self.pool.reset()
    }

    /// The KV that a [`Load`] asked for is here, or will not come.
    pub(crate) fn loaded(&mut self, id: &str, result: Result<nixl::Arrived, String>) {
        let waits = |sequence: &Sequence| sequence.work.id == id && sequence.phase == Phase::Loading;
        let Some(index) = self.waiting.iter().position(waits) else { return };
        let mut sequence = self.waiting.remove(index).expect("found above");
        sequence.loaded = true;
        sequence.phase = Phase::Waiting;
        match result {
            Ok(nixl::Arrived::Partner) => sequence.computed = sequence.hit,
            Ok(nixl::Arrived::Blocks(blocks)) => {
                let first = sequence.hit / self.settings.block_size;
                self.pool.write_blocks(&sequence.table[first..], &blocks);
                self.received(&mut sequence);
            }
            Ok(nixl::Arrived::Prompt { entries, first }) => {
                for (position, entry) in entries.iter().enumerate().skip(sequence.hit) {
                    self.pool.write(&sequence.table, position, *entry);
                }
                self.received(&mut sequence);
                if self.begin_with(&mut sequence, first) {
                    return;
                }
            }
            Err(reason) => {
                self.counts.transfers_failed += 1;
                let recompute = self.settings.connector.as_ref().is_some_and(|connector| connector.recompute);
                if !recompute {
                    self.pool.release(&sequence.table);
                    self.counts.failed += 1;
                    sequence.outlet.put(|output| output.ending = Some(Ending::Failed(reason)));
                    return;
                }
                sequence.computed = sequence.hit;
            }
        }
        self.waiting.insert(index, sequence);
    }

    fn received(&mut self, sequence: &mut Sequence) {
        self.counts.transfers += 1;
        sequence.external = sequence.work.prompt.len() - sequence.hit;
        sequence.computed = sequence.work.prompt.len();
    }

    /// What is in these blocks, whosever it is now. `None` if there is no such block.
    pub(crate) fn read_blocks(&self, ids: &[BlockId]) -> Option<Vec<Vec<u64>>> {
        self.pool.read_blocks(ids)
    }

    /// Frees the blocks of a prefilled request: they were fetched, or never will be.
    pub(crate) fn release_held(&mut self, id: &str) -> bool {
        match self.held.remove(id) {
            Some(held) => {
                self.pool.release(&held.table);
                true
            }
            None => {
                self.counts.late_notices += 1;
                false
            }
        }
    }

    /// A prefilled request of which `id` is the external part; for push transfers.
    pub(crate) fn find_held(&self, external: &str) -> Option<(String, Vec<BlockId>)> {
        let matching = |id: &str| id == external || nixl::external_id(id) == external;
        self.held.iter().find(|(id, _)| matching(id)).map(|(id, held)| (id.clone(), held.table.clone()))
    }

    /// Keeps prefilled blocks longer: their reader is alive and waits.
    pub(crate) fn extend_leases(&mut self, ids: &[String], until: Instant) {
        for id in ids {
            if let Some(held) = self.held.get_mut(id) {
                held.until = held.until.max(until);
            }
        }
    }

    /// Frees what was held for too long.
    pub(crate) fn expire(&mut self, now: Instant) {
        let late: Vec<String> =
            self.held.iter().filter(|(_, held)| held.until <= now).map(|(id, _)| id.clone()).collect();
        for id in late {
            let held = self.held.remove(&id).expect("listed above");
            self.pool.release(&held.table);
            self.counts.leases_expired += 1;
        }
    }

    /// When [`Core::expire`] has something to do.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.held.values().map(|held| held.until).min()
    }

    /// Requests of other engines that this one waits for: (host, port, their ids), to be told that it lives.
    pub(crate) fn waited_for(&self) -> Vec<(String, u16, String)> {
        let waiting = self.waiting.iter().filter(|sequence| !sequence.loaded);
        waiting.filter_map(|sequence| nixl::heartbeat_target(&sequence.work.transfer)).collect()
    }

    pub(crate) fn gauges(&self) -> Gauges {
        let loading = |sequence: &&Sequence| matches!(sequence.phase, Phase::Loading | Phase::Stranded);
        let usable = self.pool.usable();
        Gauges {
            running: self.running.len(),
            waiting: self.waiting.len(),
            waiting_for_kv: self.waiting.iter().filter(loading).count(),
            usage: (usable - self.pool.free_blocks()) as f64 / usable as f64,
            held: self.held.len(),
            blocks: usable,
            tokens: self.running.iter().chain(&self.waiting).map(|sequence| sequence.computed).sum(),
            waiting_tokens: self
                .waiting
                .iter()
                .map(|sequence| sequence.tokens.len() - sequence.computed)
                .sum(),
            running_max: self.settings.running_max,
        }
    }

    pub(crate) fn cached_hashes(&self) -> Vec<EngineHash> {
        self.pool.cached_hashes()
    }

    /// The KV of a request's prompt, once it is computed: what an SGLang prefill server sends.
    fn prompt_entries(&self, sequence: &Sequence) -> Vec<u64> {
        (0..sequence.work.prompt.len()).map(|position| self.pool.entry(&sequence.table, position)).collect()
    }

    fn remove(&mut self, id: &str) -> Option<Sequence> {
        if let Some(index) = self.running.iter().position(|sequence| sequence.work.id == id) {
            return Some(self.running.remove(index));
        }
        let index = self.waiting.iter().position(|sequence| sequence.work.id == id)?;
        self.waiting.remove(index)
    }

    fn hold(&mut self, sequence: &Sequence, lease: Duration) {
        let held = Held { table: sequence.table.clone(), until: Instant::now() + lease };
        self.held.insert(sequence.work.id.clone(), held);
    }

    fn connector_for(&self, transfer: &Transfer) -> Option<&nixl::Connector> {
        self.settings.connector.as_ref().filter(|_| matches!(transfer, Transfer::Params(_)))
    }
}

#[cfg(test)]
mod story_tests;
