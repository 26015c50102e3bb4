//! Our blocks that are held, by tier, and the events that come of changes.

use std::{
    collections::HashSet,
    hash::{BuildHasher, BuildHasherDefault},
};

use forebay_kv_hash::{AsItIs, BlockHasher, BlockMap};
use forebay_types::{BlockHash, KvEvent, Tier};
use siphasher::sip::SipHasher13;

/// Tiers, as places in an array.
pub(super) const TIERS: usize = 4;
pub(super) const ALL_TIERS: [Tier; TIERS] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote];

pub(super) const fn place(tier: Tier) -> usize {
    match tier {
        Tier::Device => 0,
        Tier::Host => 1,
        Tier::Disk => 2,
        Tier::Remote => 3,
    }
}

/// How many engine blocks of one group that complete a block of ours are held, by tier.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Blocks of which one is, on the device: nearly all.
    once: HashSet<BlockHash, BuildHasherDefault<AsItIs>>,
    /// The others.
    counts: BlockMap<[u32; TIERS]>,
    blocks: [u64; TIERS],
}

/// Once on the device, and nowhere else.
pub(super) const ONCE: [u32; TIERS] = {
    let mut counts = [0; TIERS];
    counts[place(Tier::Device)] = 1;
    counts
};

impl Held {
    /// Distinct blocks.
    pub(super) fn len(&self) -> usize {
        self.once.len() + self.counts.len()
    }

    /// Distinct blocks of each tier.
    pub(super) fn blocks(&self) -> [u64; TIERS] {
        self.blocks
    }

    /// One more engine block that completes `own`, a chain after `before`, is held.
    pub(super) fn hold(
        &mut self,
        at: At,
        before: Option<BlockHash>,
        own: &[BlockHash],
        events: &mut Vec<KvEvent>,
    ) {
        let mut parent = before;
        for &block in own {
            let count = self.change(block, at.tier, |count| count + 1);
            if count == 1 {
                self.blocks[place(at.tier)] += 1;
                stored(parent, block, at, events);
            }
            parent = Some(block);
        }
    }

    /// One engine block that completes `own` is not held any more.
    pub(super) fn release(&mut self, at: At, own: &[BlockHash], events: &mut Vec<KvEvent>) {
        for &block in own {
            if self.change(block, at.tier, |count| count - 1) == 0 {
                self.blocks[place(at.tier)] -= 1;
                removed(block, at, events);
            }
        }
    }

    /// Changes how many there are of a block on a tier; the new number.
    fn change(&mut self, block: BlockHash, tier: Tier, change: impl FnOnce(u32) -> u32) -> u32 {
        let mut counts = match self.once.remove(&block) {
            true => ONCE,
            false if self.counts.is_empty() => [0; TIERS],
            false => self.counts.remove(&block).unwrap_or_default(),
        };
        let count = &mut counts[place(tier)];
        *count = change(*count);
        let count = *count;
        match counts {
            ONCE => drop(self.once.insert(block)),
            [0, 0, 0, 0] => {}
            counts => drop(self.counts.insert(block, counts)),
        }
        count
    }
}

/// Where blocks are, and for which layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct At {
    pub(super) tier: Tier,
    pub(super) group: u8,
}

/// Says that `block` after `parent` was stored, as a link of the chain that was being said if it is one.
fn stored(parent: Option<BlockHash>, block: BlockHash, at: At, events: &mut Vec<KvEvent>) {
    let At { tier, group } = at;
    if let Some(KvEvent::Stored { hashes, tier: last_tier, group: last_group, .. }) = events.last_mut()
        && (*last_tier, *last_group) == (tier, group)
        && parent.is_some()
        && hashes.last() == parent.as_ref()
    {
        hashes.push(block);
        return;
    }
    events.push(KvEvent::Stored { parent, hashes: vec![block], tier, group });
}

fn removed(block: BlockHash, at: At, events: &mut Vec<KvEvent>) {
    let At { tier, group } = at;
    match events.last_mut() {
        Some(KvEvent::Removed { hashes, tier: last_tier, group: last_group })
            if (*last_tier, *last_group) == (tier, group) =>
        {
            hashes.push(block);
        }
        _ => events.push(KvEvent::Removed { hashes: vec![block], tier, group }),
    }
}

/// Spreads engines' hashes over a table: under a key of the fleet's, or an engine that lies could choose hashes that all
/// fall into one place.
#[derive(Debug, Clone)]
pub(super) struct Keyed(SipHasher13);

impl Keyed {
    pub(super) fn new(hasher: &BlockHasher) -> Self {
        let half = |salt| hasher.root("\0forebay/engine-events/1 table", salt).0;
        Self(SipHasher13::new_with_keys(half("0"), half("1")))
    }
}

impl BuildHasher for Keyed {
    type Hasher = SipHasher13;

    fn build_hasher(&self) -> SipHasher13 {
        self.0
    }
}
