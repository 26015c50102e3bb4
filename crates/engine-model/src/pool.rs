//! The blocks of one KV pool: who owns them, what is cached, what goes first.
//!
//! A block is in exactly one state: free, in use (referenced by sequences), cached (unreferenced, content reusable) or
//! quarantined (a transfer may still write to it). A block that is in use may also be reusable by others.
//!
//! A sequence references every block of its prefix, so a cached block's parent is released no earlier than the block
//! itself; with releases that put suffixes before prefixes, eviction takes children before their parents.

mod table;

use forebay_kv_hash::Run;
use forebay_types::{BlockHash, KvEvent, Tier, TokenId};

use table::Table;

/// Which owner's content a block holds: rises whenever the block gets a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

/// Blocks by state; they sum to the pool's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Accounting {
    /// Without content.
    pub free: u32,
    /// Unreferenced, reusable, evicted when needed.
    pub cached: u32,
    /// Referenced by sequences, held ones included.
    pub in_use: u32,
    /// Perhaps still written to by a transfer of a cancelled leg.
    pub quarantined: u32,
    /// Of those in use, blocks that finished prefill legs hold.
    pub held: u32,
}

#[derive(Debug, Default)]
struct Block {
    generation: Generation,
    references: u32,
    quarantined: bool,
    cached: Option<Cached>,
    /// Neighbours in the eviction order, while unreferenced and cached.
    older: Option<u32>,
    newer: Option<u32>,
}

/// What a reusable block holds: with its tokens, enough to tell it from any other block that happens to have the same hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cached {
    hash: BlockHash,
    before: Before,
}

/// What stands before a block: the identity of its prefix, by induction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// Nothing: it is the first of a chain with this root.
    Root(BlockHash),
    /// This block with this content.
    Block(u32, Generation),
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Pool {
    blocks: Vec<Block>,
    /// Tokens of each block that is or was cached, one block after another, as far as any was.
    tokens: Vec<TokenId>,
    free: Vec<u32>,
    by_hash: Table,
    oldest: Option<u32>,
    newest: Option<u32>,
    cached_unreferenced: u32,
    quarantined: u32,
    rewritten: Vec<(u32, Generation)>,
    events: Vec<KvEvent>,
}

impl Pool {
    pub(crate) fn new(blocks: u32) -> Self {
        Self {
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            tokens: Vec::new(),
            free: (0..blocks).rev().collect(),
            by_hash: Table::default(),
            oldest: None,
            newest: None,
            cached_unreferenced: 0,
            quarantined: 0,
            rewritten: Vec::new(),
            events: Vec::new(),
        }
    }

    /// Blocks that [`Pool::allocate`] can give.
    pub(crate) fn available(&self) -> u32 {
        self.free.len() as u32 + self.cached_unreferenced
    }

    /// How many of `blocks` nobody references: they stop being available when they are retained.
    pub(crate) fn unreferenced_among(&self, blocks: &[u32]) -> u32 {
        blocks.iter().filter(|block| self.blocks[**block as usize].references == 0).count() as u32
    }

    pub(crate) fn generation(&self, block: u32) -> Generation {
        self.blocks[block as usize].generation
    }

    /// A block for a new owner, with one reference; the coldest cached one if none is free.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let coldest = self.oldest?;
                self.unlink(coldest);
                self.uncache(coldest);
                coldest
            }
        };
        let entry = &mut self.blocks[block as usize];
        entry.generation.0 += 1;
        entry.references = 1;
        self.rewritten.push((block, entry.generation));
        Some(block)
    }

    /// The cached blocks of the longest prefix of a chain, compared token by token.
    pub(crate) fn matched(
        &self,
        root: BlockHash,
        hashes: &[BlockHash],
        tokens: &[TokenId],
        block_size: usize,
    ) -> Vec<u32> {
        let mut before = Before::Root(root);
        let mut matched = Vec::new();
        for (hash, tokens) in hashes.iter().zip(tokens.chunks_exact(block_size)) {
            let Some(block) = self.find(*hash) else { break };
            let entry = &self.blocks[block as usize];
            let Some(cached) = &entry.cached else { break };
            if cached.before != before || self.tokens_of(block, block_size) != tokens {
                break;
            }
            before = Before::Block(block, entry.generation);
            matched.push(block);
        }
        matched
    }

    /// One more reference to each block.
    pub(crate) fn retain(&mut self, blocks: &[u32]) {
        for &block in blocks {
            if self.blocks[block as usize].references == 0 {
                self.unlink(block);
            }
            self.blocks[block as usize].references += 1;
        }
    }

    /// One reference less to each block of a sequence, given in order of position.
    pub(crate) fn release(&mut self, blocks: &[u32]) {
        for &block in blocks.iter().rev() {
            let entry = &mut self.blocks[block as usize];
            entry.references -= 1;
            if entry.references > 0 {
                continue;
            }
            if entry.cached.is_some() {
                self.link_newest(block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// Makes a full block reusable. If an equal one already is, the caller shall use that one: returns it, with a
    /// reference taken and the caller's own given back. Announces only what is new.
    ///
    /// `None` if another prefix with the same hash is cached: this block, and whatever follows it, stays private.
    pub(crate) fn cache(
        &mut self,
        block: u32,
        hash: BlockHash,
        before: Before,
        tokens: &[TokenId],
    ) -> Option<u32> {
        if let Some(other) = self.find(hash)
            && other != block
        {
            let cached = self.blocks[other as usize].cached.as_ref();
            let is_equal = cached.is_some_and(|cached| cached.before == before);
            if is_equal && self.tokens_of(other, tokens.len()) == tokens {
                self.retain(&[other]);
                self.release(&[block]);
                return Some(other);
            }
            return None;
        }
        if self.blocks[block as usize].cached.is_none() {
            self.by_hash.insert(hash, block);
            self.blocks[block as usize].cached = Some(Cached { hash, before });
            self.keep_tokens(block, tokens);
            self.announce_stored(hash, before);
        }
        Some(block)
    }

    /// The block that is cached under `hash`.
    fn find(&self, hash: BlockHash) -> Option<u32> {
        let is_it = |block: u32| {
            self.blocks[block as usize].cached.as_ref().is_some_and(|cached| cached.hash == hash)
        };
        self.by_hash.get(hash, is_it)
    }

    /// The tokens that a cached block holds.
    fn tokens_of(&self, block: u32, block_size: usize) -> &[TokenId] {
        &self.tokens[block as usize * block_size..][..block_size]
    }

    fn keep_tokens(&mut self, block: u32, tokens: &[TokenId]) {
        let at = block as usize * tokens.len();
        if self.tokens.len() < at + tokens.len() {
            self.tokens.resize(at + tokens.len(), 0);
        }
        self.tokens[at..at + tokens.len()].copy_from_slice(tokens);
    }

    /// Gives up blocks to which a transfer may still write.
    pub(crate) fn quarantine(&mut self, blocks: &[u32]) {
        for &block in blocks {
            let entry = &mut self.blocks[block as usize];
            debug_assert!(
                entry.references == 1 && entry.cached.is_none(),
                "only unshared blocks are written to"
            );
            entry.references = 0;
            entry.quarantined = true;
            self.quarantined += 1;
        }
    }

    /// The transfer is over: nothing writes to these blocks any more.
    pub(crate) fn end_quarantine(&mut self, blocks: &[u32]) {
        for &block in blocks {
            let entry = &mut self.blocks[block as usize];
            debug_assert!(entry.quarantined);
            entry.quarantined = false;
            self.quarantined -= 1;
            self.free.push(block);
        }
    }

    pub(crate) fn drain_rewritten(&mut self, out: &mut Vec<(u32, Generation)>) {
        out.append(&mut self.rewritten);
    }

    pub(crate) fn drain_events(&mut self, out: &mut Vec<KvEvent>) {
        out.append(&mut self.events);
    }

    /// Every reusable block, as the events that would make it from nothing.
    pub(crate) fn cached(&self) -> Vec<KvEvent> {
        let cached = self.blocks.iter().filter_map(|block| block.cached.as_ref());
        let blocks = cached.map(|cached| (cached.hash, self.hash_before(cached.before)));
        let event = |Run { parent, hashes }| KvEvent::Stored { parent, hashes, tier: Tier::Device, group: 0 };
        forebay_kv_hash::join(blocks).into_iter().map(event).collect()
    }

    pub(crate) fn accounting(&self) -> Accounting {
        let free = self.free.len() as u32;
        let in_use = self.blocks.len() as u32 - free - self.cached_unreferenced - self.quarantined;
        Accounting { free, cached: self.cached_unreferenced, in_use, quarantined: self.quarantined, held: 0 }
    }

    fn announce_stored(&mut self, hash: BlockHash, before: Before) {
        let parent = self.hash_before(before);
        if let Some(KvEvent::Stored { hashes, .. }) = self.events.last_mut()
            && parent.is_some()
            && hashes.last().copied() == parent
        {
            hashes.push(hash);
        } else {
            self.events.push(KvEvent::Stored { parent, hashes: vec![hash], tier: Tier::Device, group: 0 });
        }
    }

    /// The hash of what stands before a block, if that is cached.
    fn hash_before(&self, before: Before) -> Option<BlockHash> {
        match before {
            Before::Root(_) => None,
            Before::Block(block, generation) => {
                let before =
                    Some(&self.blocks[block as usize]).filter(|block| block.generation == generation);
                before?.cached.as_ref().map(|cached| cached.hash)
            }
        }
    }

    fn uncache(&mut self, block: u32) {
        let Some(cached) = self.blocks[block as usize].cached.take() else { return };
        self.by_hash.remove(cached.hash, block);
        if let Some(KvEvent::Removed { hashes, .. }) = self.events.last_mut() {
            hashes.push(cached.hash);
        } else {
            self.events.push(KvEvent::Removed { hashes: vec![cached.hash], tier: Tier::Device, group: 0 });
        }
    }

    fn link_newest(&mut self, block: u32) {
        let before = self.newest.replace(block);
        self.blocks[block as usize].older = before;
        self.blocks[block as usize].newer = None;
        match before {
            Some(before) => self.blocks[before as usize].newer = Some(block),
            None => self.oldest = Some(block),
        }
        self.cached_unreferenced += 1;
    }

    fn unlink(&mut self, block: u32) {
        let (older, newer) = {
            let entry = &mut self.blocks[block as usize];
            (entry.older.take(), entry.newer.take())
        };
        match older {
            Some(older) => self.blocks[older as usize].newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.blocks[newer as usize].older = older,
            None => self.newest = older,
        }
        self.cached_unreferenced -= 1;
    }

    /// Panics where the pool contradicts itself. `owners`: how many references sequences hold to each block.
    #[cfg(test)]
    pub(crate) fn check(&self, owners: &std::collections::HashMap<u32, u32>) {
        let mut linked = 0;
        let mut at = self.oldest;
        let mut before = None;
        while let Some(block) = at {
            let entry = &self.blocks[block as usize];
            assert_eq!(entry.older, before);
            assert!(entry.references == 0 && entry.cached.is_some() && !entry.quarantined, "block {block}");
            linked += 1;
            before = at;
            at = entry.newer;
        }
        assert_eq!(self.newest, before);
        assert_eq!(linked, self.cached_unreferenced);
        let free: std::collections::BTreeSet<u32> = self.free.iter().copied().collect();
        assert_eq!(free.len(), self.free.len(), "a block is free twice");
        for (index, entry) in self.blocks.iter().enumerate() {
            let block = index as u32;
            assert_eq!(entry.references, owners.get(&block).copied().unwrap_or(0), "references to {block}");
            if free.contains(&block) {
                assert!(entry.references == 0 && entry.cached.is_none() && !entry.quarantined);
            }
            if let Some(cached) = &entry.cached {
                assert_eq!(self.find(cached.hash), Some(block));
                if let Before::Block(parent, generation) = cached.before {
                    let parent = &self.blocks[parent as usize];
                    assert!(
                        parent.generation == generation && parent.cached.is_some(),
                        "{block} has lost its parent"
                    );
                }
            }
        }
        let Accounting { free, cached, in_use, quarantined, held: _ } = self.accounting();
        assert_eq!((free + cached + in_use + quarantined) as usize, self.blocks.len());
    }
}
