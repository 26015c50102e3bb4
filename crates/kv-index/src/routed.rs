//! What a rank probably caches, for ranks that announce nothing: what was routed there lately.
//!
//! In: the chains of requests that ran on the rank. Out: [`KvEvent`]s, as if the rank had announced them. A block is
//! forgotten when the rank's pool could not hold it any more, or when it was not used for a while; within a chain the
//! tail goes first, as engines evict.
//!
//! Invariants: the blocks are in one list, the next to go first; it is in the order of their last use.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    time::Duration,
};

use forebay_types::{BlockHash, KvEvent, Tier};

/// Bounds of a [`RoutedCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoutedLimits {
    /// Blocks taken to fit into the rank's pool. Some 60 bytes each.
    pub blocks_max: usize,
    /// How long a block is taken to stay unused.
    pub unused_max: Duration,
}

impl Default for RoutedLimits {
    /// 16,384 blocks, 260,000 tokens at 16 a block: a modest pool on one GPU. Ten minutes.
    fn default() -> Self {
        Self { blocks_max: 16_384, unused_max: Duration::from_secs(600) }
    }
}

/// What one rank probably caches.
#[derive(Debug)]
pub struct RoutedCache {
    limits: RoutedLimits,
    places: HashMap<BlockHash, u32, BuildHasherDefault<Spread>>,
    /// By place. The first is none: what lies before the next to go and behind the last.
    blocks: Vec<Block>,
    /// Places that are free.
    free: Vec<u32>,
    /// The chain that is noted, by place.
    chain: Vec<u32>,
}

/// A block, in the list of all that are held.
#[derive(Debug, Clone, Copy)]
struct Block {
    hash: BlockHash,
    used_at: Duration,
    before: u32,
    behind: u32,
}

/// Block hashes are hashes already, and keyed where clients must not foresee them; this spreads those of engines' own making
/// over all bits.
#[derive(Debug, Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number ^ 0xd1b5_4a32_d192_ed03) * 0x9e37_79b9_7f4a_7c15;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }
}

/// The place of no block.
const ENDS: u32 = 0;

impl RoutedCache {
    /// An empty one.
    pub fn new(limits: RoutedLimits) -> Self {
        let ends = Block { hash: BlockHash(0), used_at: Duration::ZERO, before: ENDS, behind: ENDS };
        Self { limits, places: HashMap::default(), blocks: vec![ends], free: Vec::new(), chain: Vec::new() }
    }

    /// A request with this chain ran on the rank. Returns what changed: chains of stores and at most one event of removals.
    /// O(blocks).
    pub fn note(&mut self, now: Duration, chain: &[BlockHash]) -> Vec<KvEvent> {
        let chain = &chain[..chain.len().min(self.limits.blocks_max)];
        // Events, one for each run of blocks that were not held: what is between them is not announced again.
        let mut events = Vec::new();
        let mut before = None;
        let mut run: Vec<BlockHash> = Vec::new();
        let mut places = std::mem::take(&mut self.chain);
        for &hash in chain {
            match self.find(hash, places.last().copied()) {
                Some(place) => {
                    places.push(place);
                    end_run(&mut run, &mut events);
                }
                None => {
                    places.push(self.hold(hash));
                    if run.is_empty() {
                        events.push(KvEvent::Stored {
                            parent: before,
                            hashes: vec![],
                            tier: Tier::Device,
                            group: 0,
                        });
                    }
                    run.push(hash);
                }
            }
            before = Some(hash);
        }
        end_run(&mut run, &mut events);
        // The tail first, so that it goes first.
        for place in places.drain(..).rev() {
            self.unlink(place);
            self.link_last(place, now);
        }
        self.chain = places;
        events.extend(self.expire(now));
        events
    }

    /// Forgets what is too old or too much.
    pub fn expire(&mut self, now: Duration) -> Option<KvEvent> {
        let mut removed = Vec::new();
        while !self.is_empty() {
            let place = self.at(ENDS).behind;
            let Block { hash, used_at, .. } = *self.at(place);
            let unused = now.saturating_sub(used_at);
            if self.len() <= self.limits.blocks_max && unused <= self.limits.unused_max {
                break;
            }
            self.unlink(place);
            self.places.remove(&hash);
            self.free.push(place);
            removed.push(hash);
        }
        (!removed.is_empty()).then_some(KvEvent::Removed { hashes: removed, tier: Tier::Device, group: 0 })
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Where a block is held; `parent` is the place of the one before it in its chain. A chain that was noted before lies in
    /// the list in one piece, its tail first: so the block is nearly always next to its parent, and memory that is read in
    /// order is many times as fast as the table.
    fn find(&self, hash: BlockHash, parent: Option<u32>) -> Option<u32> {
        let beside = parent.map_or(ENDS, |parent| self.blocks[parent as usize].before);
        if beside != ENDS && self.blocks[beside as usize].hash == hash {
            return Some(beside);
        }
        self.places.get(&hash).copied()
    }

    fn at(&mut self, place: u32) -> &mut Block {
        &mut self.blocks[place as usize]
    }

    /// A place for a block, not in the list yet.
    fn hold(&mut self, hash: BlockHash) -> u32 {
        let place = self.free.pop().unwrap_or_else(|| {
            let place = u32::try_from(self.blocks.len()).expect("a pool has fewer blocks");
            self.blocks.push(self.blocks[0]);
            place
        });
        *self.at(place) = Block { hash, used_at: Duration::ZERO, before: place, behind: place };
        self.places.insert(hash, place);
        place
    }

    /// Takes a block out of the list; one that is alone stays so.
    fn unlink(&mut self, place: u32) {
        let Block { before, behind, .. } = *self.at(place);
        self.at(before).behind = behind;
        self.at(behind).before = before;
    }

    fn link_last(&mut self, place: u32, now: Duration) {
        let last = std::mem::replace(&mut self.at(ENDS).before, place);
        self.at(last).behind = place;
        let block = self.at(place);
        (block.used_at, block.before, block.behind) = (now, last, ENDS);
    }
}

/// Gives the last event its hashes.
fn end_run(run: &mut Vec<BlockHash>, events: &mut [KvEvent]) {
    if let Some(KvEvent::Stored { hashes, .. }) = events.last_mut().filter(|_| !run.is_empty()) {
        *hashes = std::mem::take(run);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn hashes(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
        numbers.into_iter().map(BlockHash).collect()
    }

    fn stored_after(parent: u64, numbers: impl IntoIterator<Item = u64>) -> KvEvent {
        KvEvent::Stored {
            parent: Some(BlockHash(parent)),
            hashes: hashes(numbers),
            tier: Tier::Device,
            group: 0,
        }
    }

    fn stored(numbers: impl IntoIterator<Item = u64>) -> KvEvent {
        KvEvent::Stored { parent: None, hashes: hashes(numbers), tier: Tier::Device, group: 0 }
    }

    fn removed(numbers: impl IntoIterator<Item = u64>) -> KvEvent {
        KvEvent::Removed { hashes: hashes(numbers), tier: Tier::Device, group: 0 }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_chain_is_announced_once_and_goes_tail_first() {
        let mut cache = RoutedCache::new(RoutedLimits { blocks_max: 4, unused_max: seconds(100) });
        assert_eq!(cache.note(seconds(1), &hashes([1, 2, 3])), [stored([1, 2, 3])]);
        assert_eq!(cache.note(seconds(2), &hashes([1, 2])), [], "used again");
        assert_eq!(cache.note(seconds(3), &hashes([1, 7, 8])), [stored_after(1, [7, 8]), removed([3])]);
        assert_eq!(cache.note(seconds(4), &hashes([9])), [stored([9]), removed([2])]);
        assert_eq!(cache.expire(seconds(103)), None);
        assert_eq!(cache.expire(seconds(104)), Some(removed([8, 7, 1])));
        assert_eq!(cache.note(seconds(104), &hashes(20..30)), [stored(20..24), removed([9])]);
    }

    proptest! {
        #[test]
        fn what_is_announced_is_what_is_held(
            notes in prop::collection::vec((0_u64..50, prop::collection::vec(0_u64..40, 0..12)), 0..60),
            blocks_max in 1_usize..20,
        ) {
            let mut cache = RoutedCache::new(RoutedLimits { blocks_max, unused_max: seconds(30) });
            let (mut held, mut now) = (BTreeSet::new(), 0);
            for (passed, chain) in notes {
                now += passed;
                for event in cache.note(seconds(now), &hashes(chain)) {
                    match event {
                        KvEvent::Stored { hashes, .. } => held.extend(hashes),
                        KvEvent::Removed { hashes, .. } => {
                            hashes.iter().for_each(|hash| assert!(held.remove(hash)));
                        }
                        KvEvent::Groups(_) | KvEvent::Cleared => unreachable!(),
                    }
                }
                prop_assert!(cache.len() <= blocks_max);
                prop_assert_eq!(held.len(), cache.len());
                prop_assert!(held.iter().all(|hash| cache.places.contains_key(hash)));
                prop_assert!(cache.blocks.len() <= blocks_max + 12 + 1, "places are used again");
                let (mut place, mut used_at) = (cache.blocks[0].behind, Duration::ZERO);
                for _ in 0..cache.len() {
                    let block = cache.blocks[place as usize];
                    prop_assert!(block.used_at >= used_at && cache.places[&block.hash] == place);
                    (place, used_at) = (block.behind, block.used_at);
                }
                prop_assert_eq!(place, ENDS);
            }
        }
    }
}
