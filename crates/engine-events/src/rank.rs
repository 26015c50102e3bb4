//! One rank's cache: what its engine announces in, what changes for the index out.
//!
//! Start at [`RankCache::apply`]. How engine blocks become ours is in `chain`, how one more or less is counted in
//! `count` and `held`, where the hashes of both kinds are kept in `runs`, what groups of layers need in `group`, what can be
//! wrong in `fault`.
//!
//! Invariants: a block of ours is held by a group on a tier exactly while an engine block that completes it is, and that one
//! while it was stored there more often than removed; `Stored` is said when that begins and `Removed` when it ends, so whoever
//! follows the events has what [`RankCache::snapshot`] has; nothing an engine says makes it panic, and memory is bounded
//! by [`RankSettings::blocks_max`].

mod chain;
mod count;
mod fault;
mod group;
mod held;
mod places;
mod runs;

use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, KV_GROUPS_MAX, KvEvent, Tier};

use crate::event::{EngineEvent, EventBatch, Removed, Stored};
use chain::{Chain, Own};
use count::{Computed, End, Entry, Stores};
use group::Group;
use held::{At, Held, Keyed, TIERS, tier_place};
use runs::Holder;

pub use fault::Fault;

/// Two million: a rank of 32 million tokens in blocks of 16, in some 50 MB; or of 2 million in pages of one, in some 200.
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
    /// Engine blocks, and blocks of ours, that are followed, each counted once a group. More are left out and counted. Four
    /// times as many may be kept, for what goes on from them.
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
    /// Blocks of ours that the first group holds: on the device.
    pub blocks_device: u64,
    /// In host memory.
    pub blocks_host: u64,
    /// On disk.
    pub blocks_disk: u64,
    /// Elsewhere.
    pub blocks_remote: u64,
    /// Distinct engine hashes that are followed, of the first group.
    pub engine_blocks: u64,
    /// The same of all other groups of layers.
    pub engine_blocks_other_groups: u64,
    /// Groups of layers that were met.
    pub groups: u32,
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

/// Follows what one DP rank of one life of an engine caches.
#[derive(Debug)]
pub struct RankCache {
    settings: RankSettings,
    plain_root: BlockHash,
    keyed: Keyed,
    held: Held,
    /// In the order in which they were met, which is how the index numbers them.
    groups: Vec<Group>,
    /// Numbers of groups that take no part in reusing prefixes; at most [`KV_GROUPS_MAX`].
    apart: Vec<u32>,
    history: History,
    stats: RankStats,
}

impl RankCache {
    /// Of a rank that caches nothing yet. One that is met later starts with [`reset`](Self::reset).
    pub fn new(settings: RankSettings) -> Self {
        let keyed = Keyed::new(&settings.hasher);
        Self {
            plain_root: settings.hasher.root(&settings.model, ""),
            held: Held::new(keyed.clone()),
            keyed,
            groups: Vec::new(),
            apart: Vec::new(),
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

    /// All that is cached, as the events that would make it from nothing.
    pub fn snapshot(&self) -> Vec<KvEvent> {
        let groups = (0..self.groups.len()).flat_map(|group| group::contents(&self.held, group as u8));
        group::said(&self.groups).into_iter().chain(groups).collect()
    }

    /// Figures.
    pub fn stats(&self) -> RankStats {
        let blocks = self.groups.first().map_or([0; TIERS], |group| group.counts.blocks);
        let mut engine_blocks = self.groups.iter().map(Group::engine_blocks);
        RankStats {
            blocks_device: blocks[tier_place(Tier::Device)],
            blocks_host: blocks[tier_place(Tier::Host)],
            blocks_disk: blocks[tier_place(Tier::Disk)],
            blocks_remote: blocks[tier_place(Tier::Remote)],
            engine_blocks: engine_blocks.next().unwrap_or(0),
            engine_blocks_other_groups: engine_blocks.sum(),
            groups: self.groups.len() as u32,
            ..self.stats
        }
    }

    /// Forgets what is cached, but not which groups of layers there are: the engine restarted, or events were lost for
    /// good. What comes next is the engine's first batch ([`History::Whole`]) or another. Figures since the start stay.
    pub fn reset(&mut self, history: History) {
        self.clear();
        self.history = history;
        self.stats.left_out = 0;
        self.stats.engine_block_size_tokens = 0;
    }

    /// Everything goes. Engines may mean their own pool alone, so later removals from other tiers are not unknown ones.
    fn clear(&mut self) {
        let elsewhere =
            |entry: &Entry| entry.stored.iter().skip(1).map(|&times| u64::from(times)).sum::<u64>();
        let others = self.groups.iter().flat_map(|group| group.others.values());
        let named = |holder: Holder| holder.is_named() && holder.at().tier != Tier::Device;
        self.stats.left_out = others.map(elsewhere).sum::<u64>() + self.held.times_all(named);
        self.held.clear();
        self.history = History::Whole;
        self.groups.iter_mut().for_each(Group::clear);
    }

    /// The place of the group that an event is of; met for the first time, it is announced. `None` if its blocks are left
    /// out.
    fn group_of(&mut self, event: &Stored, applied: &mut Applied) -> Option<u8> {
        let number = event.group.unwrap_or(0);
        let at = self.groups.iter().position(|group| group.number == number);
        // Blocks on other tiers may have another size.
        let settled = at.is_some() && (event.tier != Tier::Device || event.tokens.is_empty());
        let needs = group::needs(event, self.settings.hasher.block_size_tokens()).filter(|_| !settled);
        match (at, needs) {
            (Some(at), Some(needs)) if self.groups[at].needs != needs => self.groups[at].needs = needs,
            (Some(at), _) => return Some(at as u8),
            (None, None) => {
                if !self.apart.contains(&number) && self.apart.len() < KV_GROUPS_MAX {
                    self.apart.push(number);
                }
                return None;
            }
            (None, Some(_)) if self.groups.len() == KV_GROUPS_MAX => {
                let blocks = event.hashes.len() as u64;
                self.stats.left_out += blocks;
                Fault::TooManyGroups { groups_max: KV_GROUPS_MAX, blocks }.add_to(&mut applied.faults);
                return None;
            }
            (None, Some(needs)) => self.groups.push(Group::new(number, needs, self.keyed.clone())),
        }
        applied.events.extend(group::said(&self.groups));
        at.or(Some(self.groups.len() - 1)).map(|at| at as u8)
    }

    fn store(&mut self, event: &Stored, applied: &mut Applied) {
        // An engine that moves blocks to another tier may only name them.
        let named_only = event.tokens.is_empty();
        if !named_only && let Some(fault) = self.malformed(event) {
            self.stats.left_out += event.hashes.len() as u64;
            self.stats.malformed += event.hashes.len() as u64;
            return fault.add_to(&mut applied.faults);
        }
        let Some(group) = self.group_of(event, applied) else { return };
        let at = At { tier: event.tier, group };
        if event.tier == Tier::Device && group == 0 {
            self.stats.engine_block_size_tokens = event.block_size_tokens;
        }
        let explained = self.stats.left_out > 0 || self.history == History::Lost;
        let mut chain = if named_only { None } else { self.chain_before(event, group) };
        // Where the chain stands is kept until it goes on, held or not.
        if let Some(place) = chain.as_ref().and_then(|(_, end)| end.place()) {
            self.held.runs.pin(place);
        }
        let mut unknown = 0;
        let mut own = Own::new();
        for (index, &hash) in event.hashes.iter().enumerate() {
            let computed = chain.as_mut().map(|(chain, end)| {
                self.advance(chain, event, index, &mut own);
                let following = event.hashes.len() - index - 1;
                Computed { end: *end, chain, own: &own, following }
            });
            let pinned = computed.as_ref().and_then(|computed| computed.end.place());
            let stores = self.store_one(hash, at, computed, applied);
            match stores {
                Stores::Counted(end) => match &mut chain {
                    Some((_, after)) => *after = end,
                    // The hash stands for the whole prefix: what follows it has a place again.
                    None if !named_only => chain = self.known(hash, group),
                    None => {}
                },
                Stores::LeftOut => {
                    self.stats.left_out += 1;
                    if let Some((_, end)) = &mut chain {
                        *end = End::NotKept;
                    }
                }
                Stores::Unknown => unknown += 1,
            }
            if let Some(place) = chain.as_ref().and_then(|(_, end)| end.place()) {
                self.held.runs.pin(place);
            }
            if let Some(place) = pinned {
                self.held.runs.unpin(place);
            }
        }
        if let Some(place) = chain.and_then(|(_, end)| end.place()) {
            self.held.runs.unpin(place);
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
            // Of several groups each may have blocks of its own size; the first is the engine's own.
            Some(declared)
                if declared != announced && event.tier == Tier::Device && event.group.unwrap_or(0) == 0 =>
            {
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
    fn chain_before(&self, event: &Stored, group: u8) -> Option<(Chain, End)> {
        match event.parent {
            // A hash ends the same prefix in every group, and one that skips blocks may know it from another only.
            Some(parent) => {
                let others = (0..self.groups.len() as u8).filter(|&other| other != group);
                std::iter::once(group).chain(others).find_map(|group| self.known(parent, group))
            }
            None => {
                let is_plain = event.lora_name.is_none()
                    && event.lora_id.is_none()
                    && event.salt.is_none()
                    && event.extra_keys.as_ref().and_then(|keys| keys.first()).is_none_or(Vec::is_empty);
                let chain = if is_plain {
                    Chain::at_root(self.plain_root)
                } else {
                    chain::root(&self.settings.hasher, &self.settings.model, event)
                };
                Some((chain, End::Root))
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

    fn remove(&mut self, event: &Removed, applied: &mut Applied) {
        // Those that do not say which were met first.
        let number = event.group.or_else(|| Some(self.groups.first()?.number)).unwrap_or(0);
        let group = self.groups.iter().position(|group| group.number == number);
        if group.is_none() && self.apart.contains(&number) {
            return;
        }
        for &hash in &event.hashes {
            let was_stored = group.is_some_and(|group| {
                let at = At { tier: event.tier, group: group as u8 };
                self.remove_one(hash, at, &mut applied.events)
            });
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
}

#[cfg(test)]
mod tests;
