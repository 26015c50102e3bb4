//! Segments: runs of up to 64 blocks that follow each other, and who holds which of them.
//!
//! A segment is a [`Block`] of words: a header, then the hashes. Who holds what is a mask of positions for each *holder*,
//! a rank's slot and a [`Plane`] of its; the first holder is in the header, more are in a block of their own. What always
//! holds within one allocation: a position's hash is written once, before the length counts it; a holder's key never
//! changes. So a reader that compares hashes first and loads masks then gets masks of those hashes. And across segments: a
//! hash that any segment names, held or not, is in the table under its one place.

use forebay_types::{BlockHash, KV_GROUPS_MAX, Tier};

use crate::{
    reclaim::{Block, Heap, Pinned, WriterKey, follow},
    sync::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
    },
};

/// Blocks in a segment: positions in a mask.
pub(crate) const SEGMENT_BLOCKS: usize = 64;

/// Where a block is: a segment's number and a position in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) segment: u32,
    pub(crate) position: u32,
}

/// Segments there may be: their numbers have 26 bits.
pub(crate) const SEGMENTS_MAX: u32 = 1 << 26;

impl Place {
    pub(crate) fn to_word(self) -> u32 {
        self.segment << 6 | self.position
    }

    pub(crate) fn from_word(word: u32) -> Self {
        Self { segment: word >> 6, position: word & 63 }
    }
}

/// Tiers there are, in the order of cost.
pub(crate) const ALL_TIERS: [Tier; TIERS] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote];
pub(crate) const TIERS: usize = 4;

/// What of a rank holds: one of its groups of layers, on one of its tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Plane(u8);

const _: () = assert!(KV_GROUPS_MAX * TIERS <= 1 << u8::BITS, "planes have numbers of 8 bits");

impl Plane {
    /// What most ranks have alone.
    pub(crate) const DEVICE: Self = Self(0);

    /// `None` if there can be no such group.
    pub(crate) fn new(tier: Tier, group: u8) -> Option<Self> {
        let tier = ALL_TIERS.iter().position(|&other| other == tier).expect("one of all") as u8;
        (usize::from(group) < KV_GROUPS_MAX).then_some(Self(group * TIERS as u8 + tier))
    }

    /// The place in the rank's groups.
    pub(crate) fn group(self) -> u8 {
        self.0 / TIERS as u8
    }

    /// The tier's place in the order of cost.
    pub(crate) fn tier(self) -> usize {
        usize::from(self.0) % TIERS
    }
}

/// A rank's slot and one of its planes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) slot: u16,
    pub(crate) plane: Plane,
}

impl Holder {
    fn to_word(self) -> u32 {
        u32::from(self.plane.0) << 16 | u32::from(self.slot)
    }

    fn from_word(word: u32) -> Self {
        Self { slot: word as u16, plane: Plane((word >> 16) as u8) }
    }

    /// The holder whose key a word is.
    #[inline]
    pub(crate) fn of_key(key: &AtomicU64) -> Self {
        Self::from_word(key.load(Relaxed) as u32)
    }
}

// Words of a segment. The first has the number of words below and the first holder above, as `Block` says.
const META: usize = 1;
const STAMP: usize = 2;
const FIRST_MASK: usize = 3;
const MORE: usize = 4;
/// Hash of the block before the first position, 0 for none: what a chain goes on from where the segment is read alone.
const AFTER: usize = 5;
const HASHES: usize = 6;
// Words of a block of more holders: length, holders, then a key and a mask for each.
const MORE_LEN: usize = 1;
const MORE_PAIRS: usize = 2;

/// Words of a segment for `blocks`.
pub(crate) const fn segment_words(blocks: usize) -> usize {
    HASHES + blocks
}

/// Positions in use: the low bits of the word `META`. Children are above, the parent's number plus 1 in the upper half.
const LEN: u64 = 0x7f;

/// Children that are counted; who has more is never freed.
const CHILDREN_MAX: u64 = (1 << 25) - 1;

/// One segment.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a>(&'a [AtomicU64]);

impl<'a> Segment<'a> {
    pub(crate) fn new(words: &'a [AtomicU64]) -> Self {
        Self(words)
    }

    /// An empty segment with room for `blocks`, first held by `first`. `parent` is the segment that it continues, if that
    /// is there, and `after` the block.
    pub(crate) fn alloc(
        blocks: usize,
        first: Holder,
        parent: Option<u32>,
        after: Option<BlockHash>,
        heap: &mut Heap,
    ) -> Block {
        let block = heap.alloc(segment_words(blocks), first.to_word());
        let parent = parent.map_or(0, |segment| u64::from(segment) + 1);
        block.words()[META].store(parent << 32, Relaxed);
        block.words()[AFTER].store(after.map_or(0, |hash| hash.0), Relaxed);
        block
    }

    /// The block before the first position.
    pub(crate) fn after(self) -> Option<BlockHash> {
        Some(BlockHash(self.0[AFTER].load(Relaxed))).filter(|hash| hash.0 != 0)
    }

    /// Hashes, by position.
    pub(crate) fn hashes(self) -> &'a [AtomicU64] {
        &self.0[HASHES..HASHES + self.len()]
    }

    pub(crate) fn hash(self, position: u32) -> Option<u64> {
        self.hashes().get(position as usize).map(|word| word.load(Relaxed))
    }

    /// Positions in use.
    pub(crate) fn len(self) -> usize {
        (self.0[META].load(Acquire) & LEN) as usize
    }

    /// Positions there is room for.
    pub(crate) fn capacity(self) -> usize {
        self.0.len() - HASHES
    }

    /// Adds hashes; there is room. They count once all are written.
    pub(crate) fn append(self, hashes: impl Iterator<Item = u64>) {
        let meta = self.0[META].load(Relaxed);
        let free = &self.0[HASHES + (meta & LEN) as usize..];
        let mut added = 0;
        for (word, hash) in free.iter().zip(hashes) {
            word.store(hash, Relaxed);
            added += 1;
        }
        self.0[META].store(meta + added, Release);
    }

    /// The segment that this one continues.
    pub(crate) fn parent(self) -> Option<u32> {
        let parent = (self.0[META].load(Relaxed) >> 32) as u32;
        parent.checked_sub(1)
    }

    pub(crate) fn has_children(self) -> bool {
        self.children() > 0
    }

    fn children(self) -> u64 {
        self.0[META].load(Relaxed) >> 7 & CHILDREN_MAX
    }

    /// One more segment continues this one.
    pub(crate) fn add_child(self) {
        if self.children() < CHILDREN_MAX {
            self.0[META].fetch_add(1 << 7, Relaxed);
        }
    }

    /// One less.
    pub(crate) fn remove_child(self) {
        if (1..CHILDREN_MAX).contains(&self.children()) {
            self.0[META].fetch_sub(1 << 7, Relaxed);
        }
    }

    /// When it was last looked up or written, in the index's ticks.
    pub(crate) fn stamp(self) -> u64 {
        self.0[STAMP].load(Relaxed)
    }

    /// Notes a use. Writes only news: segments that everyone reads stay in everyone's cache.
    pub(crate) fn touch(self, now: u64) {
        if self.0[STAMP].load(Relaxed) != now {
            self.0[STAMP].store(now, Relaxed);
        }
    }

    /// How many hashes from `position` on are those of `chain`.
    #[inline]
    pub(crate) fn common(self, position: usize, chain: impl Iterator<Item = u64>) -> usize {
        let hashes = self.hashes().get(position..).unwrap_or_default();
        let common = hashes.iter().zip(chain).take_while(|(word, hash)| word.load(Relaxed) == *hash).count();
        // What is loaded from here on is at least as new as these hashes.
        crate::sync::fence(Acquire);
        common
    }

    /// How many hashes from `position` down are those of `chain`, as engines evict them.
    pub(crate) fn common_down(self, position: usize, chain: impl Iterator<Item = u64>) -> usize {
        let hashes = self.hashes().get(..=position).unwrap_or_default();
        hashes.iter().rev().zip(chain).take_while(|(word, hash)| word.load(Relaxed) == *hash).count()
    }

    /// The first holder and its mask, and the others with theirs: words for [`Holder::of_key`] and masks.
    #[inline]
    pub(crate) fn first_and_more(
        self,
        pinned: &'a impl Pinned,
    ) -> (Holder, &'a AtomicU64, &'a [[AtomicU64; 2]]) {
        let first = Holder::from_word((self.0[0].load(Relaxed) >> 32) as u32);
        (first, &self.0[FIRST_MASK], follow(&self.0[MORE], pinned).map_or(&[], more_pairs))
    }

    /// Holders and their masks; a mask may be 0.
    #[inline]
    pub(crate) fn holders(
        self,
        pinned: &'a impl Pinned,
    ) -> impl Iterator<Item = (Holder, &'a AtomicU64)> + 'a {
        let (first, mask, more) = self.first_and_more(pinned);
        std::iter::once((first, mask)).chain(more.iter().map(|[key, mask]| (Holder::of_key(key), mask)))
    }

    /// The mask of `holder`, if it ever held anything here.
    #[inline]
    pub(crate) fn mask(self, holder: Holder, key: &'a WriterKey) -> Option<&'a AtomicU64> {
        self.holders(key).find(|(other, _)| *other == holder).map(|(_, mask)| mask)
    }

    /// As [`mask`](Self::mask), with a place made for a holder that has none.
    pub(crate) fn mask_or_new(self, holder: Holder, heap: &mut Heap, key: &'a WriterKey) -> &'a AtomicU64 {
        if let Some(mask) = self.mask(holder, key) {
            return mask;
        }
        let old = follow(&self.0[MORE], key);
        if let Some(words) = old {
            let len = words[MORE_LEN].load(Relaxed) as usize;
            if let Some([key, mask]) = words[MORE_PAIRS..].as_chunks().0.get(len) {
                key.store(u64::from(holder.to_word()), Relaxed);
                words[MORE_LEN].store(len as u64 + 1, Release);
                return mask;
            }
        }
        // Those that hold nothing any more stay behind.
        let live = |pair: &&[AtomicU64; 2]| pair[1].load(Relaxed) != 0;
        let pairs = || old.map_or(&[][..], more_pairs).iter().filter(live);
        let capacity = (pairs().count() + 1).max(2) * 3 / 2;
        let new = heap.alloc(MORE_PAIRS + 2 * capacity, 0);
        let mut len = 0;
        for (to, from) in new.words()[MORE_PAIRS..].as_chunks::<2>().0.iter().zip(pairs()) {
            to[0].store(from[0].load(Relaxed), Relaxed);
            to[1].store(from[1].load(Relaxed), Relaxed);
            len += 1;
        }
        new.words()[MORE_PAIRS + 2 * len].store(u64::from(holder.to_word()), Relaxed);
        new.words()[MORE_LEN].store(len as u64 + 1, Relaxed);
        heap.relink(&self.0[MORE], Some(new));
        &follow(&self.0[MORE], key).expect("just linked")[MORE_PAIRS + 2 * len + 1]
    }

    /// Positions that anyone holds.
    pub(crate) fn held(self, key: &WriterKey) -> u64 {
        self.holders(key).fold(0, |held, (_, mask)| held | mask.load(Relaxed))
    }

    /// A copy with room for `capacity` and with only the first `len` positions. Readers of both see the same holders if
    /// `len` is all of them: then the block of more holders moves over; otherwise it is copied, since positions that are
    /// dropped may be given to other hashes.
    pub(crate) fn copy(self, capacity: usize, len: usize, heap: &mut Heap, key: &WriterKey) -> Block {
        let first = Holder::from_word((self.0[0].load(Relaxed) >> 32) as u32);
        let block = Self::alloc(capacity, first, None, self.after(), heap);
        let words = block.words();
        let kept = if len == SEGMENT_BLOCKS { u64::MAX } else { (1 << len) - 1 };
        words[STAMP].store(self.stamp(), Relaxed);
        words[FIRST_MASK].store(self.0[FIRST_MASK].load(Relaxed) & kept, Relaxed);
        words[META].store(self.0[META].load(Relaxed) & !LEN, Relaxed);
        Segment(words).append(self.hashes()[..len].iter().map(|hash| hash.load(Relaxed)));
        if len == self.len() {
            words[MORE].store(self.0[MORE].load(Relaxed), Relaxed);
        } else if let Some(old) = follow(&self.0[MORE], key) {
            let new = heap.alloc(old.len(), 0);
            new.words()[MORE_LEN].store(old[MORE_LEN].load(Relaxed), Relaxed);
            for (to, from) in new.words()[MORE_PAIRS..].as_chunks::<2>().0.iter().zip(more_pairs(old)) {
                to[0].store(from[0].load(Relaxed), Relaxed);
                to[1].store(from[1].load(Relaxed) & kept, Relaxed);
            }
            words[MORE].store(new.link(), Relaxed);
            heap.retire(self.0[MORE].load(Relaxed));
        }
        block
    }

    /// Retires the block of more holders: the segment goes.
    pub(crate) fn retire_more(self, heap: &mut Heap) {
        heap.retire(self.0[MORE].load(Relaxed));
    }
}

/// Sets bits of a mask.
pub(crate) fn set(mask: &AtomicU64, bits: u64) {
    mask.store(mask.load(Relaxed) | bits, SeqCst);
}

/// Clears bits of a mask. Sequentially consistent, as a slot's next owner relies on it.
pub(crate) fn clear(mask: &AtomicU64, bits: u64) {
    mask.store(mask.load(Relaxed) & !bits, SeqCst);
}

/// `len` bits from `position` on.
pub(crate) fn bits(position: usize, len: usize) -> u64 {
    let ones = if len >= SEGMENT_BLOCKS { u64::MAX } else { (1 << len) - 1 };
    ones << position
}

fn more_pairs(words: &[AtomicU64]) -> &[[AtomicU64; 2]] {
    let len = words[MORE_LEN].load(Acquire) as usize;
    &words[MORE_PAIRS..].as_chunks().0[..len]
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
