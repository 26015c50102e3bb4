//! Segment number -> segment. Numbers are used again; readers tell by the hashes whether a number still means what it did.

use crate::{
    reclaim::{Block, Heap, Pinned, WriterKey, follow},
    runs::Runs,
    segment::{SEGMENTS_MAX, Segment},
    sync::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

/// Enough for all but the last 64 numbers.
type Links = Runs<20>;

const _: () = assert!(Links::WORDS_MAX <= SEGMENTS_MAX as usize, "numbers that fit into a place");

/// All segments.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    links: Links,
}

/// Which numbers are free.
#[derive(Debug, Default)]
pub(crate) struct SegmentsState {
    /// Numbers from here on were never used.
    unused: u32,
    /// The number that was freed last, plus 1. Its link holds the one freed before, in the same way, as an odd word.
    freed: u32,
    len: u32,
    bytes: usize,
}

impl SegmentsState {
    /// Segments there are.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// One more than the highest number ever used.
    pub(crate) fn numbers(&self) -> u32 {
        self.unused
    }

    /// Bytes of the links. They are kept: 8 bytes for each of the most segments that there ever were, at most twice.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Segments {
    /// The segment with this number, if there is one.
    #[inline]
    pub(crate) fn get<'a>(&self, number: u32, pinned: &'a impl Pinned) -> Option<Segment<'a>> {
        follow(self.links.get(number as usize)?, pinned).map(Segment::new)
    }

    #[expect(clippy::needless_pass_by_value, reason = "the link owns the block from here on")]
    /// Numbers `block`. `None` if all numbers are taken; then the block is retired.
    pub(crate) fn add(&self, block: Block, state: &mut SegmentsState, heap: &mut Heap) -> Option<u32> {
        let number = match state.freed.checked_sub(1) {
            Some(number) => {
                state.freed = (self.link(number).load(Relaxed) >> 1) as u32;
                number
            }
            None if state.unused as usize == Links::WORDS_MAX => {
                heap.retire(block.link());
                return None;
            }
            None => {
                state.unused += 1;
                state.unused - 1
            }
        };
        self.links.get_or_make(number as usize, &mut state.bytes).store(block.link(), SeqCst);
        state.len += 1;
        Some(number)
    }

    /// Replaces a segment by a copy of it; the old one is retired.
    pub(crate) fn replace(&self, number: u32, block: Block, heap: &mut Heap) {
        heap.relink(self.link(number), Some(block));
    }

    /// Retires a segment; its number is free.
    pub(crate) fn remove(&self, number: u32, state: &mut SegmentsState, heap: &mut Heap, key: &WriterKey) {
        let Some(segment) = self.get(number, key) else { return };
        segment.retire_more(heap);
        heap.retire(self.link(number).swap(u64::from(state.freed) << 1 | 1, SeqCst));
        state.freed = number + 1;
        state.len -= 1;
    }

    fn link(&self, number: u32) -> &AtomicU64 {
        self.links.get(number as usize).expect("the link of a number that was used")
    }
}
