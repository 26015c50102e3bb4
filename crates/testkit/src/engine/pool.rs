//! An engine's KV blocks: what is in each, which are cached under which hash, and which is evicted next.
//!
//! In: allocations and frees of requests. Out: block numbers, and the KV events that engines publish about them.
//! Start at [`BlockPool`].
//!
//! Always holds, each from vLLM 0.32's `block_pool.py` and seen in `fixtures/vllm/kv_events`: block 0 is never used;
//! only full blocks are announced; two physical blocks with the same content are announced twice and removed twice;
//! a removal names one hash; freed blocks stay cached and are evicted in the order in which they were freed, a
//! request's last block first; blocks without a hash are used again first. [`Style::Tree`] differs in two things, from
//! SGLang 0.5.23's `mem_cache/events.py`: content is cached and announced once, and each page is an event of its own.

use std::collections::{BTreeMap, BTreeSet};

use crate::events::{KvEvent, Stored};
use crate::kv::{UNWRITTEN, mix};
use crate::tokenizer::Token;

/// Number of a physical block.
pub(crate) type BlockId = u32;
/// What the engine calls a block's content and everything before it; means nothing to other engines.
pub(crate) type EngineHash = u64;

/// What besides its tokens makes a request's blocks its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) salt: Option<String>,
    pub(crate) adapter: Option<String>,
    /// vLLM: names the request's session in the events it causes; no part of the hash.
    pub(crate) session: Option<String>,
}

/// What kind of cache announces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// vLLM's: a table of physical blocks.
    Table,
    /// SGLang's: a tree of prefixes.
    Tree,
}

#[derive(Debug)]
struct Block {
    users: u32,
    hash: Option<EngineHash>,
    entries: Vec<u64>,
    /// Place in the queue of free blocks, if no request uses it.
    free: Option<i64>,
}

/// All blocks of one rank.
#[derive(Debug)]
pub(crate) struct BlockPool {
    block_size: usize,
    style: Style,
    caching: bool,
    /// Where hash chains start. vLLM draws it at random unless `PYTHONHASHSEED` is set, so hashes differ by engine.
    root: u64,
    blocks: Vec<Block>,
    /// Free blocks by their place in the queue: the first is used next.
    free: BTreeMap<i64, BlockId>,
    cached: BTreeMap<EngineHash, BTreeSet<BlockId>>,
    events: Vec<KvEvent>,
}

impl BlockPool {
    pub(crate) fn new(blocks: usize, block_size: usize, style: Style, caching: bool, root: u64) -> Self {
        let mut pool = Self {
            block_size,
            style,
            caching,
            root,
            blocks: Vec::with_capacity(blocks),
            free: BTreeMap::new(),
            cached: BTreeMap::new(),
            events: Vec::new(),
        };
        for id in 0..blocks {
            let free = (id > 0).then_some(id as i64);
            pool.blocks.push(Block { users: 0, hash: None, entries: vec![UNWRITTEN; block_size], free });
            if let Some(place) = free {
                pool.free.insert(place, id as BlockId);
            }
        }
        pool
    }

    /// Blocks that requests can have at most.
    pub(crate) fn usable(&self) -> usize {
        self.blocks.len() - 1
    }

    pub(crate) fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// The hashes of `tokens`' full blocks, in order.
    pub(crate) fn hashes(&self, tokens: &[Token], identity: &Identity) -> Vec<EngineHash> {
        let text =
            |hash: u64, text: &str| text.bytes().fold(mix(hash, 0x65_7874), |h, b| mix(h, u64::from(b)));
        let mut hash = mix(self.root, 0x726f_6f74);
        if let Some(adapter) = &identity.adapter {
            hash = text(mix(hash, 1), adapter);
        }
        if let Some(salt) = &identity.salt {
            hash = text(mix(hash, 2), salt);
        }
        let mut hashes = Vec::with_capacity(tokens.len() / self.block_size);
        for block in tokens.chunks_exact(self.block_size) {
            hash = block.iter().fold(hash, |h, token| mix(h, u64::from(*token)));
            hashes.push(hash);
        }
        hashes
    }

    /// Takes the longest cached prefix of `hashes`, at most `blocks_max` blocks, for one request.
    pub(crate) fn take_cached(&mut self, hashes: &[EngineHash], blocks_max: usize) -> Vec<BlockId> {
        let mut taken = Vec::new();
        for hash in hashes.iter().take(blocks_max) {
            let Some(id) = self.cached.get(hash).and_then(|ids| ids.first().copied()) else { break };
            taken.push(id);
        }
        for id in &taken {
            let block = &mut self.blocks[*id as usize];
            block.users += 1;
            if let Some(place) = block.free.take() {
                self.free.remove(&place);
            }
        }
        taken
    }

    /// `count` blocks for one request; `None` if there are not as many. What was cached in them is evicted.
    pub(crate) fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.free.len() {
            return None;
        }
        let mut ids = Vec::with_capacity(count);
        for _ in 0..count {
            let (_, id) = self.free.pop_first().expect("counted above");
            self.evict(id);
            let block = &mut self.blocks[id as usize];
            block.free = None;
            block.users = 1;
            ids.push(id);
        }
        Some(ids)
    }

    /// Puts the full blocks `from..to` of a request into the cache and announces them.
    pub(crate) fn cache(
        &mut self,
        tokens: &[Token],
        identity: &Identity,
        hashes: &[EngineHash],
        table: &[BlockId],
        (from, to): (usize, usize),
    ) {
        let known = |pool: &Self, index: usize| pool.cached.contains_key(&hashes[index]);
        let from = match self.style {
            Style::Table => from,
            Style::Tree => (from..to).find(|index| !known(self, *index)).unwrap_or(to),
        };
        if !self.caching || from >= to {
            return;
        }
        for index in from..to {
            let id = table[index];
            self.blocks[id as usize].hash = Some(hashes[index]);
            self.cached.entry(hashes[index]).or_default().insert(id);
        }
        let extra = |index: usize| {
            let salt = identity.salt.iter().filter(|_| index == 0);
            identity.adapter.iter().chain(salt).cloned().collect::<Vec<String>>()
        };
        let stored = |(from, to): (usize, usize)| {
            KvEvent::Stored(Stored {
                hashes: hashes[from..to].to_vec(),
                parent: from.checked_sub(1).map(|parent| hashes[parent]),
                tokens: tokens[from * self.block_size..to * self.block_size].to_vec(),
                block_size: self.block_size,
                adapter: identity.adapter.clone(),
                salt: identity.salt.clone(),
                extra_keys: (from..to).map(extra).collect(),
                session: identity.session.clone(),
            })
        };
        let events: Vec<KvEvent> = match self.style {
            Style::Table => vec![stored((from, to))],
            Style::Tree => (from..to).map(|index| stored((index, index + 1))).collect(),
        };
        self.events.extend(events);
    }

    /// Gives back a request's blocks, last one first.
    pub(crate) fn release(&mut self, table: &[BlockId]) {
        let first = |pool: &Self| pool.free.first_key_value().map_or(0, |(place, _)| *place);
        let last = |pool: &Self| pool.free.last_key_value().map_or(0, |(place, _)| *place);
        for id in table.iter().rev() {
            let place = match &self.blocks[*id as usize] {
                block if block.users > 1 => None,
                block if block.hash.is_some() => Some(last(self) + 1),
                _ => Some(first(self) - 1),
            };
            let block = &mut self.blocks[*id as usize];
            block.users -= 1;
            block.free = place;
            if let Some(place) = place {
                self.free.insert(place, *id);
            }
        }
    }

    /// Forgets all hashes; refused (false) while a request has blocks. The event about it leaves with the next batch.
    pub(crate) fn reset(&mut self) -> bool {
        if self.free.len() != self.usable() {
            return false;
        }
        self.cached.clear();
        self.blocks.iter_mut().for_each(|block| block.hash = None);
        self.events.push(KvEvent::Cleared);
        true
    }

    /// The entry at `position` of a request with these blocks.
    pub(crate) fn entry(&self, table: &[BlockId], position: usize) -> u64 {
        self.blocks[table[position / self.block_size] as usize].entries[position % self.block_size]
    }

    pub(crate) fn write(&mut self, table: &[BlockId], position: usize, entry: u64) {
        self.blocks[table[position / self.block_size] as usize].entries[position % self.block_size] = entry;
    }

    /// What is in these blocks now, whosever it is: a remote read asks nobody. `None` if there is no such block.
    pub(crate) fn read_blocks(&self, ids: &[BlockId]) -> Option<Vec<Vec<u64>>> {
        ids.iter().map(|id| self.blocks.get(*id as usize).map(|block| block.entries.clone())).collect()
    }

    /// Writes what was read from another engine's blocks, one after another. A smaller source block leaves the rest of
    /// ours unwritten, a larger one is cut: bytes land in the wrong places, as they do in vLLM.
    pub(crate) fn write_blocks(&mut self, ids: &[BlockId], source: &[Vec<u64>]) {
        for (id, entries) in ids.iter().zip(source) {
            let block = &mut self.blocks[*id as usize].entries;
            for (index, entry) in block.iter_mut().enumerate() {
                *entry = entries.get(index).copied().unwrap_or(UNWRITTEN);
            }
        }
    }

    /// The events since the last call, in order.
    pub(crate) fn take_events(&mut self) -> Vec<KvEvent> {
        std::mem::take(&mut self.events)
    }

    /// Hashes that are cached now, for tests of what an index should hold; one that two blocks hold counts once.
    pub(crate) fn cached_hashes(&self) -> Vec<EngineHash> {
        self.cached.keys().copied().collect()
    }

    fn evict(&mut self, id: BlockId) {
        let Some(hash) = self.blocks[id as usize].hash.take() else { return };
        if let Some(ids) = self.cached.get_mut(&hash) {
            ids.remove(&id);
            if ids.is_empty() {
                self.cached.remove(&hash);
            }
        }
        self.events.push(KvEvent::Removed { hash });
    }
}
