//! Memory that readers walk while a writer changes it: blocks of atomic words, links to them, and when an unlinked block
//! may be freed.
//!
//! Everything that readers see is a [`Block`]: words on the heap, never moved, reached through a *link*, a word that holds
//! its address or 0. A reader is [`pin`](Epochs::pin)ned while it walks. The writer replaces a link and
//! [`retire`](Heap::retire)s the block that it led to; the block is freed when every counter of pinned readers was seen
//! at zero since. Nobody waits: a reader pins by one addition, and the writer looks at the counters when it comes by.
//!
//! Why that is enough: all that follows is sequentially consistent. A reader that found the old link had counted itself
//! before it read, so a writer that replaced the link first and then reads that counter finds it above zero, until the
//! reader is gone. There are two counters a shard and new readers go to those that the writer is not waiting for, so a
//! stream of readers cannot keep one above zero for ever.
//!
//! This is the one module with `unsafe` in it. What its callers in this crate must keep: a word that is given to
//! [`follow`] only ever held links of this index's own heap, and a block is retired once, after no link leads to it.
#![allow(unsafe_code)]

use crate::sync::{AtomicU64, Ordering::SeqCst, thread_number};

/// Independent pairs of counters, so that readers on different threads seldom meet. A power of two.
const SHARDS: usize = if cfg!(feature = "shuttle") { 2 } else { 8 };

/// Two cache lines: hardware fetches lines in pairs.
#[repr(align(128))]
#[derive(Debug, Default)]
struct Padded<T>(T);

/// Who is reading.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    /// Which counter of a pair new readers use: 0 or 1.
    phase: Padded<AtomicU64>,
    readers: [Padded<[AtomicU64; 2]>; SHARDS],
}

/// A reader that is walking. Blocks that it can reach are not freed while it lives.
#[derive(Debug)]
pub(crate) struct Guard<'a> {
    counter: &'a AtomicU64,
}

impl Epochs {
    /// Counts the caller among the readers.
    pub(crate) fn pin(&self) -> Guard<'_> {
        let shard = thread_number() % SHARDS;
        let counter = &self.readers[shard].0[(self.phase.0.load(SeqCst) & 1) as usize];
        counter.fetch_add(1, SeqCst);
        Guard { counter }
    }

    /// Marks in `seen`, one bit a counter, those that are at zero, and sends new readers to the pair's other half.
    fn observe(&self, seen: &mut u32) {
        for (index, counter) in self.readers.iter().flat_map(|pair| &pair.0).enumerate() {
            if *seen & 1 << index == 0 && counter.load(SeqCst) == 0 {
                *seen |= 1 << index;
            }
        }
        // Even bits are the first halves. While one of them is awaited readers go to the second.
        let awaiting_first = *seen & ALL_SEEN & EVEN != ALL_SEEN & EVEN;
        self.phase.0.store(u64::from(awaiting_first), SeqCst);
    }
}

const ALL_SEEN: u32 = (1 << (2 * SHARDS)) - 1;
const EVEN: u32 = 0x5555_5555;

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, SeqCst);
    }
}

/// That whoever holds it may follow links: a pinned reader, or the writer.
pub(crate) trait Pinned {}

impl Pinned for Guard<'_> {}

/// The writer's right to follow links: blocks are freed only by [`Heap::collect`], which borrows it alone.
#[derive(Debug)]
pub(crate) struct WriterKey(());

impl WriterKey {
    /// One an index.
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Pinned for WriterKey {}

/// Words on the heap. The first says in its low half how many there are; its upper half is the owner's.
#[derive(Debug)]
#[must_use = "a block that is not linked or retired is lost"]
pub(crate) struct Block(*mut AtomicU64);

// SAFETY: a block owns its words, and atomics may go anywhere.
unsafe impl Send for Block {}

impl Block {
    /// What a link to it holds.
    pub(crate) fn link(&self) -> u64 {
        self.0.expose_provenance() as u64
    }

    /// Its words, before it is linked.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: a `Block` value exists only before its block is linked and after it is unlinked; it is not freed
        // while the value can be borrowed.
        unsafe { whole(self.0) }
    }

    /// Frees it.
    fn free(self) {
        // SAFETY: `words` has the pointer and the length that `Heap::alloc` made; the caller is done with it.
        drop(unsafe { Box::from_raw(std::ptr::from_ref(self.words()).cast_mut()) });
    }
}

/// All words of the block at `first`.
///
/// # Safety
/// `first` was made by `Heap::alloc`, and the block is not freed within `'a`.
unsafe fn whole<'a>(first: *mut AtomicU64) -> &'a [AtomicU64] {
    // SAFETY: the first word is there in every block, and its low half never changes.
    unsafe {
        let words = (*first).load(SeqCst) as u32 as usize;
        std::slice::from_raw_parts(first, words)
    }
}

/// The block that `link` leads to now; `None` for 0 and for odd words, which a link may hold for other ends.
#[inline]
pub(crate) fn follow<'a>(link: &AtomicU64, _: &'a impl Pinned) -> Option<&'a [AtomicU64]> {
    at(link.load(SeqCst))
}

/// The block at an address read from a link.
fn at<'a>(address: u64) -> Option<&'a [AtomicU64]> {
    if address == 0 || address & 1 == 1 {
        return None;
    }
    // SAFETY: a link holds the address of a block (the module's contract). A pinned reader's block is not freed before
    // its counter was zero, and the writer frees none while its key is borrowed; see the module.
    Some(unsafe { whole(std::ptr::with_exposed_provenance_mut(address as usize)) })
}

/// Asks for a cache line that will be needed soon.
#[inline]
pub(crate) fn prefetch<T>(line: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is harmless, and this one is valid.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>((&raw const *line).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Bytes that the allocator takes for `words`: glibc's header and rounding.
pub(crate) const fn block_bytes(words: usize) -> usize {
    (words * size_of::<u64>() + 8).next_multiple_of(16)
}

/// What the writer allocates and has not yet freed.
#[derive(Debug, Default)]
pub(crate) struct Heap {
    bytes: usize,
    retired_bytes: usize,
    /// Unlinked since the last look at the counters began.
    fresh: Vec<Retired>,
    /// Waiting for the counters that are not in `seen`.
    waiting: Vec<Retired>,
    seen: u32,
    /// What was freed: overwritten and kept, so that a reader that still looks there is found out.
    #[cfg(feature = "shuttle")]
    freed: Vec<Block>,
}

/// What nobody may find any more.
#[derive(Debug)]
enum Retired {
    Block(Block),
    /// The number of a rank's slot, for `Ranks` to use again.
    Slot(u16),
}

impl Heap {
    /// A block of `words` words, all zero but the first. `upper` goes into the first word's upper half.
    pub(crate) fn alloc(&mut self, words: usize, upper: u32) -> Block {
        let block: Box<[AtomicU64]> = (0..words).map(|_| AtomicU64::new(0)).collect();
        block[0].store(words as u64 | u64::from(upper) << 32, SeqCst);
        self.bytes += block_bytes(words);
        Block(Box::into_raw(block).cast())
    }

    /// Bytes allocated, retired blocks included.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes + (self.fresh.capacity() + self.waiting.capacity()) * size_of::<Retired>()
    }

    /// Those of them that are retired.
    pub(crate) fn retired_bytes(&self) -> usize {
        self.retired_bytes
    }

    /// Makes `link` lead to `to` and retires what it led to.
    pub(crate) fn relink(&mut self, link: &AtomicU64, to: Option<Block>) {
        let from = link.swap(to.map_or(0, |block| block.link()), SeqCst);
        self.retire(from);
    }

    /// Frees the block at `link`, a link's former value, when no reader can be in it.
    pub(crate) fn retire(&mut self, link: u64) {
        if link != 0 && link & 1 == 0 {
            let block = Block(std::ptr::with_exposed_provenance_mut(link as usize));
            self.retired_bytes += block_bytes(block.words().len());
            self.fresh.push(Retired::Block(block));
        }
    }

    /// Hands the slot back by `collect` when no reader can have seen its former owner.
    pub(crate) fn retire_slot(&mut self, slot: u16) {
        self.fresh.push(Retired::Slot(slot));
    }

    /// Whether anything is retired.
    pub(crate) fn has_retired(&self) -> bool {
        !self.fresh.is_empty() || !self.waiting.is_empty()
    }

    /// Whether so much is retired that a look at the counters is worth it.
    pub(crate) fn wants_collecting(&self) -> bool {
        self.fresh.len() + self.waiting.len() >= 64
    }

    /// Frees what no reader can be in any more, and gives back slots to use again.
    pub(crate) fn collect(&mut self, epochs: &Epochs, _: &mut WriterKey, mut slots: impl FnMut(u16)) {
        // Twice: what was waiting, and then what is fresh, if nobody is reading.
        for _ in 0..2 {
            if self.waiting.is_empty() {
                std::mem::swap(&mut self.waiting, &mut self.fresh);
                self.seen = 0;
            }
            if self.waiting.is_empty() {
                return;
            }
            epochs.observe(&mut self.seen);
            if self.seen != ALL_SEEN {
                return;
            }
            let mut waiting = std::mem::take(&mut self.waiting);
            for retired in waiting.drain(..) {
                match retired {
                    Retired::Block(block) => {
                        let bytes = block_bytes(block.words().len());
                        self.bytes -= bytes;
                        self.retired_bytes -= bytes;
                        self.release(block);
                    }
                    Retired::Slot(slot) => slots(slot),
                }
            }
            // A burst of retirements is no reason to keep its list.
            waiting.shrink_to(256);
            self.waiting = waiting;
        }
    }

    #[cfg(not(feature = "shuttle"))]
    fn release(&mut self, block: Block) {
        block.free();
    }

    #[cfg(feature = "shuttle")]
    fn release(&mut self, block: Block) {
        // As a length, a mask or a hash, each is wrong.
        block.words().iter().skip(1).take(8).for_each(|word| word.store(u64::MAX, SeqCst));
        self.freed.push(block);
    }

    /// Frees everything retired: nobody reads any more.
    fn free_all(&mut self) {
        #[cfg(feature = "shuttle")]
        self.freed.drain(..).for_each(Block::free);
        for retired in self.fresh.drain(..).chain(self.waiting.drain(..)) {
            if let Retired::Block(block) = retired {
                block.free();
            }
        }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        self.free_all();
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
pub(crate) mod tests;
