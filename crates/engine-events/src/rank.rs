//! One rank's cache: what its engine announces in, what changes for the index out.
//!
//! Start at [`RankCache::apply`]. How engine blocks become ours is in `chain`, how they are counted in `held`, what groups
//! of layers need in `group`, what can be wrong in `fault`.
//!
//! Invariants: a block of ours is held by a group on a tier exactly while an engine block that completes it is, and that one
//! while it was stored there more often than removed; `Stored` is said when that begins and `Removed` when it ends, so whoever
//! follows the events has what [`RankCache::snapshot`] has; nothing an engine says makes it panic, and memory is bounded
//! by [`RankSettings::blocks_max`].

mod chain;
mod entries;
mod fault;
mod group;
mod held;

use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, KV_GROUPS_MAX, KvEvent, Tier};

use crate::event::{EngineEvent, EngineHash, EventBatch, Removed, Stored};
use chain::{Chain, Identity, Own};
use entries::Entry;
use group::Group;
use held::{ALL_TIERS, At, Keyed, TIERS, place};

pub use fault::Fault;

/// Two million: a rank of 32 million tokens in blocks of 16, or of 2 million in pages of one. Where an engine's
/// blocks are as large as ours they take some 100 MB; others take more.
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
    /// Engine blocks, and blocks of ours, that are followed, each counted once a group. More are left out and counted.
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
        Self {
            plain_root: settings.hasher.root(&settings.model, ""),
            keyed: Keyed::new(&settings.hasher),
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
        let groups = (0..).zip(&self.groups).flat_map(|(place, group)| group.contents(place));
        group::said(&self.groups).into_iter().chain(groups).collect()
    }

    /// Figures.
    pub fn stats(&self) -> RankStats {
        let blocks = self.groups.first().map_or([0; TIERS], |group| group.held.blocks());
        let mut engine_blocks = self.groups.iter().map(|group| group.entries.len() as u64);
        RankStats {
            blocks_device: blocks[place(Tier::Device)],
            blocks_host: blocks[place(Tier::Host)],
            blocks_disk: blocks[place(Tier::Disk)],
            blocks_remote: blocks[place(Tier::Remote)],
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
        self.stats.left_out = self.groups.iter().map(|group| group.entries.stored_elsewhere()).sum();
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
        let mut unknown = 0;
        let mut own = Own::new();
        for (index, &hash) in event.hashes.iter().enumerate() {
            let before = chain.as_mut().map(|chain| {
                let before = chain.last();
                self.advance(chain, event, index, &mut own);
                before
            });
            let computed = before.zip(chain.as_ref());
            match self.store_one(hash, at, computed, &own, applied) {
                // The hash stands for the whole prefix: what follows it has a place again.
                Stores::Counted if chain.is_none() && !named_only => {
                    chain = self.groups[usize::from(group)].entries.chain(hash);
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
    fn chain_before(&self, event: &Stored, group: u8) -> Option<Chain> {
        match event.parent {
            // A hash ends the same prefix in every group, and one that skips blocks may know it from another only.
            Some(parent) => {
                let (before, rest) = self.groups.split_at(group.into());
                let (own, after) = rest.split_first()?;
                let mut all = [own].into_iter().chain(before).chain(after);
                all.find_map(|group| group.entries.chain(parent))
            }
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
        at: At,
        computed: Option<(Option<BlockHash>, &Chain)>,
        own: &Own,
        applied: &mut Applied,
    ) -> Stores {
        let blocks_max = self.settings.blocks_max;
        let blocks: usize = self.groups.iter().map(|group| group.entries.len()).sum();
        let held: usize = self.groups.iter().map(|group| group.held.len()).sum();
        let group = &mut self.groups[usize::from(at.group)];
        let mut entry = match group.entries.take(hash) {
            Some(mut entry) => {
                if computed.is_some_and(|(_, chain)| !entry.identity.agrees(own, chain)) {
                    for tier in ALL_TIERS {
                        if entry.stored[place(tier)] > 0 {
                            group.held.release(At { tier, ..at }, entry.identity.own(), &mut applied.events);
                        }
                    }
                    entry.identity = Identity::Ambiguous;
                    self.stats.ambiguous += 1;
                    Fault::AmbiguousHash { hash, blocks: 1 }.add_to(&mut applied.faults);
                }
                entry
            }
            None => {
                let Some((before, chain)) = computed else {
                    return Stores::Unknown;
                };
                if blocks >= blocks_max || held + own.len() > blocks_max {
                    self.stats.refused += 1;
                    Fault::NoRoom { blocks_max, blocks: 1 }.add_to(&mut applied.faults);
                    return Stores::LeftOut;
                }
                Entry { stored: [0; TIERS], before, identity: Identity::new(own, chain) }
            }
        };
        // No engine holds one block four billion times; one that says so has its removals believed too early.
        let times = &mut entry.stored[place(at.tier)];
        *times = times.saturating_add(1);
        if *times == 1 {
            group.held.hold(at, entry.before, entry.identity.own(), &mut applied.events);
        }
        group.entries.put(hash, entry);
        Stores::Counted
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
                self.groups[group].remove(hash, at, &mut applied.events)
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

impl Group {
    /// Counts one removal of `hash`. Says whether it was stored there.
    fn remove(&mut self, hash: EngineHash, at: At, events: &mut Vec<KvEvent>) -> bool {
        let Some(mut entry) = self.entries.take(hash) else { return false };
        let times = &mut entry.stored[place(at.tier)];
        let was_stored = *times > 0;
        *times = times.saturating_sub(1);
        if was_stored && *times == 0 {
            self.held.release(at, entry.identity.own(), events);
        }
        if entry.stored != [0; TIERS] {
            self.entries.put(hash, entry);
        }
        was_stored
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
