//! Our blocks that are held, by tier, and the events that come of changes.

use std::{
    collections::HashMap,
    hash::{BuildHasher, BuildHasherDefault, Hasher},
};

use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, KvEvent, Tier};
use siphasher::sip::SipHasher13;

/// Tiers, as places in an array.
pub(super) const TIERS: usize = 4;

pub(super) fn place(tier: Tier) -> usize {
    match tier {
        Tier::Device => 0,
        Tier::Host => 1,
        Tier::Disk => 2,
        Tier::Remote => 3,
    }
}

/// How many engine blocks that complete a block of ours are held, by tier.
#[derive(Debug, Default)]
pub(super) struct Held {
    counts: HashMap<BlockHash, [u32; TIERS], BuildHasherDefault<AsItIs>>,
    blocks: [u64; TIERS],
}

impl Held {
    /// Distinct blocks.
    pub(super) fn len(&self) -> usize {
        self.counts.len()
    }

    /// Distinct blocks of each tier.
    pub(super) fn blocks(&self) -> [u64; TIERS] {
        self.blocks
    }

    pub(super) fn holds(&self, tier: Tier, block: BlockHash) -> bool {
        self.counts.get(&block).is_some_and(|counts| counts[place(tier)] > 0)
    }

    pub(super) fn of(&self, tier: Tier) -> impl Iterator<Item = BlockHash> + '_ {
        self.counts.iter().filter(move |(_, counts)| counts[place(tier)] > 0).map(|(&block, _)| block)
    }

    /// One more engine block that completes `own`, a chain after `before`, is held.
    pub(super) fn hold(
        &mut self,
        tier: Tier,
        before: Option<BlockHash>,
        own: &[BlockHash],
        events: &mut Vec<KvEvent>,
    ) {
        let mut parent = before;
        for &block in own {
            let count = &mut self.counts.entry(block).or_default()[place(tier)];
            *count += 1;
            if *count == 1 {
                self.blocks[place(tier)] += 1;
                stored(parent, block, tier, events);
            }
            parent = Some(block);
        }
    }

    /// One engine block that completes `own` is not held any more.
    pub(super) fn release(&mut self, tier: Tier, own: &[BlockHash], events: &mut Vec<KvEvent>) {
        for &block in own {
            let counts = self.counts.get_mut(&block).expect("what an engine block completes is held with it");
            counts[place(tier)] -= 1;
            if counts[place(tier)] == 0 {
                if *counts == [0; TIERS] {
                    self.counts.remove(&block);
                }
                self.blocks[place(tier)] -= 1;
                removed(block, tier, events);
            }
        }
    }
}

/// Says that `block` after `parent` was stored, as a link of the chain that was being said if it is one.
fn stored(parent: Option<BlockHash>, block: BlockHash, tier: Tier, events: &mut Vec<KvEvent>) {
    if let Some(KvEvent::Stored { hashes, tier: last_tier, .. }) = events.last_mut()
        && *last_tier == tier
        && parent.is_some()
        && hashes.last() == parent.as_ref()
    {
        hashes.push(block);
        return;
    }
    events.push(KvEvent::Stored { parent, hashes: vec![block], tier });
}

fn removed(block: BlockHash, tier: Tier, events: &mut Vec<KvEvent>) {
    match events.last_mut() {
        Some(KvEvent::Removed { hashes, tier: last_tier }) if *last_tier == tier => hashes.push(block),
        _ => events.push(KvEvent::Removed { hashes: vec![block], tier }),
    }
}

/// Our hashes are keyed already: what spreads them over a table is in them.
#[derive(Debug, Default)]
pub(super) struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("a block hash is one word")
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
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
