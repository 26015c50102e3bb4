//! One rank's cache: what its engine announces in, what changes for the index out.
//!
//! Start at [`RankCache::apply`]. How engine blocks become ours is in `chain`, how they are counted in `held`, what can be
//! wrong in `fault`.
//!
//! Invariants: a block of ours is held on a tier exactly while an engine block that completes it is, and that one while it
//! was stored there more often than removed; `Stored` is said when that begins and `Removed` when it ends, so whoever
//! follows the events has what [`RankCache::snapshot`] has; nothing an engine says makes it panic, and memory is bounded
//! by [`RankSettings::blocks_max`].

mod chain;
mod fault;
mod held;

use std::{
    collections::{HashMap, HashSet, hash_map},
    hash::BuildHasherDefault,
};

use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, KvEvent, Tier};

use crate::event::{EngineEvent, EngineHash, EventBatch, GroupKind, Removed, Stored};
use chain::{Chain, Identity, Own};
use held::{AsItIs, Held, Keyed, TIERS, place};

pub use fault::Fault;

/// Two million: a rank of 32 million tokens in blocks of 16, or of 2 million in pages of one, in some 200 MB.
pub const BLOCKS_MAX_DEFAULT: usize = 1 << 21;

/// What one rank's events are read by.
#[derive(Debug, Clone)]
pub struct RankSettings {
    /// The fleet's, with the fleet's block size.
    pub hasher: BlockHasher,
    /// The model's name, as requests are hashed under. An adapter's name takes its place.
    pub model: String,
    /// Block size of the engine's own pool in tokens, as discovered; `None` if it is not known. Blocks of another size on
    /// the device are left out.
    pub engine_block_size_tokens: Option<u32>,
    /// Engine blocks, and blocks of ours, that are followed. More are left out and counted.
    pub blocks_max: usize,
}

/// Whether everything since the engine's start was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum History {
    /// It was, or will be: what is removed was stored, and a parent is known.
    Whole,
    /// The beginning is lost, as it is for every engine that runs longer than its replay buffer lasts. What was stored
    /// then is not known until it is stored again: to follow or to remove it is no fault. Ends with the next clearing.
    Lost,
}

/// What came of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Applied {
    /// For the index, in order.
    pub events: Vec<KvEvent>,
    /// What was wrong, at most one of a kind. Everything else of the batch was applied.
    pub faults: Vec<Fault>,
}

/// Figures for metrics and `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RankStats {
    /// Blocks of ours that are held: on the device.
    pub blocks_device: u64,
    /// In host memory.
    pub blocks_host: u64,
    /// On disk.
    pub blocks_disk: u64,
    /// Elsewhere.
    pub blocks_remote: u64,
    /// Distinct engine hashes that are followed.
    pub engine_blocks: u64,
    /// Engine blocks of other groups of layers, which do not count for overlaps.
    pub engine_blocks_other_groups: u64,
    /// Tokens in an engine's block on its device, by its last event; 0 before the first.
    pub engine_block_size_tokens: u32,
    /// Stores since the last clearing that are not indexed and not yet removed, as far as can be told.
    pub left_out: u64,
    /// Blocks after an unknown parent, since the start.
    pub orphans: u64,
    /// Blocks for which there was no room, since the start.
    pub refused: u64,
    /// Blocks of malformed events, since the start: wrong block size, number of tokens or of keys.
    pub malformed: u64,
    /// Hashes announced with two different prefixes, since the start.
    pub ambiguous: u64,
    /// Removals of what was not stored, since the start, except while history is lost.
    pub removals_unknown: u64,
}

/// What one engine hash is and how often it is stored.
#[derive(Debug)]
struct Entry {
    stored: [u32; TIERS],
    /// Our block before those that it completes.
    before: Option<BlockHash>,
    identity: Identity,
}

/// A hash of another group of layers: only counted.
type OtherGroup = (EngineHash, u32, Tier);

/// Follows what one DP rank of one life of an engine caches.
#[derive(Debug)]
pub struct RankCache {
    settings: RankSettings,
    plain_root: BlockHash,
    entries: HashMap<EngineHash, Entry, Keyed>,
    other_groups: HashMap<OtherGroup, u32, Keyed>,
    held: Held,
    /// The group that feeds the index, once known.
    main_group: Option<u32>,
    history: History,
    stats: RankStats,
}

impl RankCache {
    /// Of a rank that caches nothing yet. One that is met later starts with [`reset`](Self::reset).
    pub fn new(settings: RankSettings) -> Self {
        let keyed = Keyed::new(&settings.hasher);
        Self {
            plain_root: settings.hasher.root(&settings.model, ""),
            entries: HashMap::with_hasher(keyed.clone()),
            other_groups: HashMap::with_hasher(keyed),
            held: Held::default(),
            main_group: None,
            history: History::Whole,
            stats: RankStats::default(),
            settings,
        }
    }

    /// Applies a batch. Batches must come in order and each once: see [`Sequence`](crate::Sequence).
    pub fn apply(&mut self, batch: &EventBatch) -> Applied {
        let mut applied = Applied::default();
        for event in &batch.events {
            match event {
                EngineEvent::Stored(stored) => self.store(stored, &mut applied),
                EngineEvent::Removed(removed) => self.remove(removed, &mut applied),
                EngineEvent::Cleared => {
                    self.clear();
                    applied.events.push(KvEvent::Cleared);
                }
                EngineEvent::Unknown { tag } => {
                    Fault::UnknownEvent { tag: tag.clone(), events: 1 }.add_to(&mut applied.faults);
                }
            }
        }
        applied
    }

    /// Blocks of ours on the device, each once, chains one after the other: an index keeps together what comes together.
    pub fn snapshot(&self) -> Vec<BlockHash> {
        let count = self.held.blocks()[place(Tier::Device)] as usize;
        // One of those that follow each block.
        let mut after: HashMap<BlockHash, BlockHash, BuildHasherDefault<AsItIs>> =
            HashMap::with_capacity_and_hasher(count, Default::default());
        for entry in self.entries.values().filter(|entry| entry.stored[place(Tier::Device)] > 0) {
            let own = entry.identity.own();
            after.extend(
                entry
                    .before
                    .iter()
                    .chain(own)
                    .copied()
                    .zip(own.iter().skip(entry.before.is_none().into()).copied()),
            );
        }
        let follows: HashSet<BlockHash, BuildHasherDefault<AsItIs>> = after
            .iter()
            .filter(|(before, _)| self.held.holds(Tier::Device, **before))
            .map(|(_, &block)| block)
            .collect();
        let mut blocks = Vec::with_capacity(count);
        for start in self.held.of(Tier::Device).filter(|block| !follows.contains(block)) {
            let chain = std::iter::successors(Some(start), |block| after.get(block).copied());
            blocks.extend(chain.take_while(|&block| self.held.holds(Tier::Device, block)));
        }
        blocks
    }

    /// Figures.
    pub fn stats(&self) -> RankStats {
        let blocks = self.held.blocks();
        RankStats {
            blocks_device: blocks[place(Tier::Device)],
            blocks_host: blocks[place(Tier::Host)],
            blocks_disk: blocks[place(Tier::Disk)],
            blocks_remote: blocks[place(Tier::Remote)],
            engine_blocks: self.entries.len() as u64,
            engine_blocks_other_groups: self.other_groups.len() as u64,
            ..self.stats
        }
    }

    /// Forgets what is cached: the engine restarted, or events were lost for good. What comes next is the engine's first
    /// batch ([`History::Whole`]) or another. Figures since the start stay.
    pub fn reset(&mut self, history: History) {
        self.clear();
        self.history = history;
        self.stats.left_out = 0;
        self.stats.engine_block_size_tokens = 0;
        self.main_group = None;
    }

    /// Everything goes. Engines may mean their own pool alone, so later removals from other tiers are not unknown ones.
    fn clear(&mut self) {
        let elsewhere =
            |entry: &Entry| entry.stored.iter().skip(1).map(|&times| u64::from(times)).sum::<u64>();
        self.stats.left_out = self.entries.values().map(elsewhere).sum();
        self.history = History::Whole;
        self.entries.clear();
        self.other_groups.clear();
        self.held = Held::default();
    }

    /// Whether a store of `group` feeds the index. That is one group with full attention: the first that is seen, and
    /// engines begin with the lowest. Where kinds are not said it is group 0.
    fn feeds_index(&mut self, group: u32, kind: Option<GroupKind>) -> bool {
        let is_full = match kind {
            Some(GroupKind::FullAttention | GroupKind::MlaAttention | GroupKind::SinkFullAttention) => true,
            Some(GroupKind::Unknown) | None => group == 0,
            Some(_) => false,
        };
        if is_full && self.main_group.is_none() {
            self.main_group = Some(group);
        }
        self.main_group == Some(group)
    }

    fn store(&mut self, event: &Stored, applied: &mut Applied) {
        if let Some(group) = event.group
            && !self.feeds_index(group, event.kind)
        {
            return self.store_other_group(event, group, applied);
        }
        if event.tier == Tier::Device {
            self.stats.engine_block_size_tokens = event.block_size_tokens;
        }
        // An engine that moves blocks to another tier may only name them.
        let named_only = event.tokens.is_empty();
        if !named_only && let Some(fault) = self.malformed(event) {
            self.stats.left_out += event.hashes.len() as u64;
            self.stats.malformed += event.hashes.len() as u64;
            return fault.add_to(&mut applied.faults);
        }
        let explained = self.stats.left_out > 0 || self.history == History::Lost;
        let mut chain = if named_only { None } else { self.chain_before(event) };
        let mut unknown = 0;
        let mut own = Own::new();
        for (index, &hash) in event.hashes.iter().enumerate() {
            let before = chain.as_mut().map(|chain| {
                let before = chain.last();
                self.advance(chain, event, index, &mut own);
                before
            });
            let computed = before.zip(chain.as_ref());
            match self.store_one(hash, event.tier, computed, &own, applied) {
                // The hash stands for the whole prefix: what follows it has a place again.
                Stores::Counted if chain.is_none() && !named_only => {
                    chain = self.entries[&hash].identity.chain()
                }
                Stores::Counted => {}
                Stores::LeftOut => self.stats.left_out += 1,
                Stores::Unknown => unknown += 1,
            }
        }
        self.stats.left_out += unknown;
        if let (1.., Some(parent), false) = (unknown, event.parent, named_only) {
            self.stats.orphans += unknown;
            Fault::UnknownParent { parent, blocks: unknown, explained }.add_to(&mut applied.faults);
        }
    }

    fn malformed(&self, event: &Stored) -> Option<Fault> {
        let in_event = event.hashes.len();
        let blocks = in_event as u64;
        let (announced, tokens) = (event.block_size_tokens, event.tokens.len());
        match self.settings.engine_block_size_tokens {
            Some(declared) if declared != announced && event.tier == Tier::Device => {
                return Some(Fault::WrongBlockSize { declared, announced, blocks });
            }
            _ => {}
        }
        if blocks.checked_mul(announced.into()) != Some(tokens as u64) {
            return Some(Fault::WrongTokenCount { in_event, block_size_tokens: announced, tokens, blocks });
        }
        let keys = event.extra_keys.as_ref().map_or(in_event, Vec::len);
        (keys != in_event).then_some(Fault::WrongKeyCount { in_event, keys, blocks })
    }

    /// Where the chain stands that the event goes on with; `None` if that is not known.
    fn chain_before(&self, event: &Stored) -> Option<Chain> {
        match event.parent {
            Some(parent) => self.entries.get(&parent)?.identity.chain(),
            None => {
                let is_plain = event.lora_name.is_none()
                    && event.lora_id.is_none()
                    && event.salt.is_none()
                    && event.extra_keys.as_ref().and_then(|keys| keys.first()).is_none_or(Vec::is_empty);
                Some(if is_plain {
                    Chain::at_root(self.plain_root)
                } else {
                    chain::root(&self.settings.hasher, &self.settings.model, event)
                })
            }
        }
    }

    /// Takes `chain` over the block of `event` at `index`.
    fn advance(&self, chain: &mut Chain, event: &Stored, index: usize, own: &mut Own) {
        // A prompt's first block has its keys in the root.
        let is_first = index == 0 && event.parent.is_none();
        if let Some(keys) = event.extra_keys.as_ref().map(|blocks| &blocks[index][..])
            && !is_first
            && !keys.is_empty()
        {
            let keys = chain::unnamed(keys, event.lora_name.as_deref());
            if keys.clone().next().is_some() {
                chain.make_private(&self.settings.hasher, keys);
            }
        }
        let size = event.block_size_tokens as usize;
        chain.advance(&self.settings.hasher, &event.tokens[index * size..][..size], own);
    }

    /// Counts one store of `hash`. `computed` is our block before it and where the chain stands after it, with `own`
    /// completed by it; `None` if its prefix is not known.
    fn store_one(
        &mut self,
        hash: EngineHash,
        tier: Tier,
        computed: Option<(Option<BlockHash>, &Chain)>,
        own: &Own,
        applied: &mut Applied,
    ) -> Stores {
        let blocks_max = self.settings.blocks_max;
        let blocks = self.entries.len() + self.other_groups.len();
        let entry = match self.entries.entry(hash) {
            hash_map::Entry::Occupied(entry) => {
                let entry = entry.into_mut();
                if computed.is_some_and(|(_, chain)| !entry.identity.agrees(own, chain)) {
                    for tier in [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote] {
                        if entry.stored[place(tier)] > 0 {
                            self.held.release(tier, entry.identity.own(), &mut applied.events);
                        }
                    }
                    entry.identity = Identity::Ambiguous;
                    self.stats.ambiguous += 1;
                    Fault::AmbiguousHash { hash, blocks: 1 }.add_to(&mut applied.faults);
                }
                entry
            }
            hash_map::Entry::Vacant(vacant) => {
                let Some((before, chain)) = computed else {
                    return Stores::Unknown;
                };
                if blocks >= blocks_max || self.held.len() + own.len() > blocks_max {
                    self.stats.refused += 1;
                    Fault::NoRoom { blocks_max, blocks: 1 }.add_to(&mut applied.faults);
                    return Stores::LeftOut;
                }
                vacant.insert(Entry { stored: [0; TIERS], before, identity: Identity::new(own, chain) })
            }
        };
        // No engine holds one block four billion times; one that says so has its removals believed too early.
        let times = &mut entry.stored[place(tier)];
        *times = times.saturating_add(1);
        if *times == 1 {
            self.held.hold(tier, entry.before, entry.identity.own(), &mut applied.events);
        }
        Stores::Counted
    }

    fn store_other_group(&mut self, event: &Stored, group: u32, applied: &mut Applied) {
        for &hash in &event.hashes {
            let blocks = self.entries.len() + self.other_groups.len();
            match self.other_groups.entry((hash, group, event.tier)) {
                hash_map::Entry::Occupied(mut times) => *times.get_mut() = times.get().saturating_add(1),
                hash_map::Entry::Vacant(vacant) if blocks < self.settings.blocks_max => {
                    vacant.insert(1);
                }
                hash_map::Entry::Vacant(_) => {
                    self.stats.left_out += 1;
                    self.stats.refused += 1;
                    Fault::NoRoom { blocks_max: self.settings.blocks_max, blocks: 1 }
                        .add_to(&mut applied.faults);
                }
            }
        }
    }

    fn remove(&mut self, event: &Removed, applied: &mut Applied) {
        let other_group = event.group.filter(|&group| self.main_group != Some(group));
        for &hash in &event.hashes {
            let was_stored = match other_group {
                None => self.remove_one(hash, event.tier, &mut applied.events),
                Some(group) => self.remove_other_group((hash, group, event.tier)),
            };
            if was_stored {
            } else if self.stats.left_out > 0 {
                // Which ones they are is not kept: their number explains as many removals.
                self.stats.left_out -= 1;
            } else if self.history == History::Whole {
                self.stats.removals_unknown += 1;
                Fault::UnknownRemoval { hash, blocks: 1 }.add_to(&mut applied.faults);
            }
        }
    }

    /// Says whether it was stored there.
    fn remove_one(&mut self, hash: EngineHash, tier: Tier, events: &mut Vec<KvEvent>) -> bool {
        let hash_map::Entry::Occupied(mut occupied) = self.entries.entry(hash) else {
            return false;
        };
        let entry = occupied.get_mut();
        let times = &mut entry.stored[place(tier)];
        let Some(left) = times.checked_sub(1) else {
            return false;
        };
        *times = left;
        if left == 0 {
            self.held.release(tier, entry.identity.own(), events);
            if entry.stored == [0; TIERS] {
                occupied.remove();
            }
        }
        true
    }

    fn remove_other_group(&mut self, key: OtherGroup) -> bool {
        let hash_map::Entry::Occupied(mut times) = self.other_groups.entry(key) else {
            return false;
        };
        *times.get_mut() -= 1;
        if *times.get() == 0 {
            times.remove();
        }
        true
    }
}

/// What became of one stored hash.
enum Stores {
    /// It is followed.
    Counted,
    /// There was no room.
    LeftOut,
    /// Its prefix is not known.
    Unknown,
}

#[cfg(test)]
mod tests;
