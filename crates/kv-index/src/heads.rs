//! Hash of a segment's first block -> its place, for readers: where does a chain begin, and where does it go on?
//!
//! Built as [`names`](crate::names), in blocks that any thread may look into while one writes.
//!
//! A directory of 2^depth links leads by a hash's first bits to a *page*; pages have buckets of one cache line: seven
//! entries, a byte of the hash for each (0: empty), and how many entries passed the bucket because it was full. An entry
//! is 32 bits of the hash and a 32-bit place. What it is the place of is for the caller to compare: a table answers with
//! candidates.
//!
//! Pages grow by some 1.4 and split in two at their largest size, so between 60 and 86 % of the entries are in use: 11 to
//! 15 bytes a block. They shrink and merge as entries go. A page that grows, shrinks or splits is replaced; readers in
//! the old one see what was there a moment ago.

use crate::{
    reclaim::{Heap, Pinned, WriterKey, block_bytes, follow, prefetch},
    spread::Spread,
    sync::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// Entries in a bucket.
const BUCKET_ENTRIES: usize = 7;
/// Words in a bucket: a cache line.
const BUCKET_WORDS: usize = 1 + BUCKET_ENTRIES;
/// Buckets of a page, by its size. The last is 32 KiB, which moves in some tens of microseconds.
const SIZES: [u32; 10] = [4, 8, 16, 32, 64, 128, 192, 256, 362, 512];
const SIZE_MAX: usize = SIZES.len() - 1;
/// Size of the halves of a page that splits, and of two pages that merge.
const SIZE_SPLIT: usize = SIZE_MAX - 1;
/// Larger pages that empty get smaller before they merge.
const SIZE_MERGE_MAX: usize = 6;
/// Bits of a hash that may choose a page; the ten that are left choose the bucket. Twelve thousand million entries; a
/// page that cannot split is full.
const DEPTH_MAX: u32 = 22;
/// Words of a page before its buckets: length, shape, entries. The buckets begin at the next cache line.
const PAGE_HEADER: usize = 3;
const PAGE_SHAPE: usize = 1;
const PAGE_LEN: usize = 2;
/// Words of a directory before its links: length, depth.
const DIRECTORY_HEADER: usize = 2;
const DIRECTORY_DEPTH: usize = 1;

/// Entries that a page of `buckets` takes before it grows: six of seven.
const fn page_len_max(buckets: u32) -> u64 {
    buckets as u64 * 6
}

/// One page, seen by a reader or by the writer.
#[derive(Clone, Copy)]
struct Page<'a> {
    words: &'a [AtomicU64],
    buckets: u32,
    depth: u32,
}

impl<'a> Page<'a> {
    fn new(words: &'a [AtomicU64]) -> Self {
        let shape = words[PAGE_SHAPE].load(Relaxed);
        // From here on as if the slice began with the first bucket.
        let first = words.as_ptr().addr() / size_of::<AtomicU64>();
        let start = (first + PAGE_HEADER).next_multiple_of(BUCKET_WORDS) - first;
        Self { words: &words[start..], buckets: shape as u32, depth: (shape >> 32) as u32 }
    }

    /// Words of a page with `buckets`.
    fn words(buckets: u32) -> usize {
        PAGE_HEADER + BUCKET_WORDS - 1 + buckets as usize * BUCKET_WORDS
    }

    fn home(self, tag: u32) -> usize {
        ((u64::from(tag << self.depth) * u64::from(self.buckets)) >> 32) as usize
    }

    fn bucket(self, index: usize) -> &'a [AtomicU64; BUCKET_WORDS] {
        self.words[index * BUCKET_WORDS..].first_chunk().expect("a page ends with a whole bucket")
    }

    fn after(self, index: usize) -> usize {
        if index + 1 == self.buckets as usize { 0 } else { index + 1 }
    }

    /// Goes through the buckets where `spread` may be, in order, and in each through the entries like it: bucket, number
    /// of the entry, place. The first `Some` that `visit` answers ends it.
    #[inline]
    fn walk<T>(self, spread: Spread, mut visit: impl FnMut(usize, usize, u32) -> Option<T>) -> Option<T> {
        let mut index = self.home(spread.tag);
        for _ in 0..self.buckets {
            let bucket = self.bucket(index);
            let marks = bucket[0].load(Acquire);
            let mut like = spread.like(marks);
            while like != 0 {
                let entry = like.trailing_zeros() as usize / 8;
                like &= like - 1;
                let word = bucket[1 + entry].load(Relaxed);
                if (word >> 32) as u32 == spread.tag
                    && let Some(answer) = visit(index, entry, word as u32)
                {
                    return Some(answer);
                }
            }
            if marks >> 56 == 0 {
                return None;
            }
            index = self.after(index);
        }
        None
    }

    /// Adds an entry; there is room.
    fn put(self, spread: Spread, place: u32) {
        let home = self.home(spread.tag);
        let mut index = home;
        loop {
            let bucket = self.bucket(index);
            let marks = bucket[0].load(Relaxed);
            let free = Spread::free(marks);
            if free != 0 {
                let entry = free.trailing_zeros() as usize / 8;
                bucket[1 + entry].store(spread.entry(place), Relaxed);
                bucket[0].store(marks | u64::from(spread.mark) << (8 * entry), Release);
                break;
            }
            index = self.after(index);
        }
        // Only now that it is there may readers be sent past the full buckets.
        self.passed(home, index, |passed| passed.saturating_add(1));
    }

    /// Takes entry `entry` of bucket `index` out, which is of `spread`.
    fn take(self, spread: Spread, index: usize, entry: usize) {
        let marks = &self.bucket(index)[0];
        marks.store(marks.load(Relaxed) & !(0xff << (8 * entry)), Release);
        // A count that reached its end is not true any more: it stays until the page is replaced.
        self.passed(
            self.home(spread.tag),
            index,
            |passed| if passed == u8::MAX { passed } else { passed - 1 },
        );
    }

    /// Changes how many entries passed each bucket from `from` to before `to`.
    fn passed(self, from: usize, to: usize, change: impl Fn(u8) -> u8) {
        let mut index = from;
        while index != to {
            let marks = &self.bucket(index)[0];
            let word = marks.load(Relaxed);
            let passed = change((word >> 56) as u8);
            marks.store(word & !(0xff << 56) | u64::from(passed) << 56, Release);
            index = self.after(index);
        }
    }

    /// Every entry.
    fn entries(self) -> impl Iterator<Item = (Spread, u32)> + 'a {
        (0..self.buckets as usize).flat_map(move |index| {
            let bucket = self.bucket(index);
            let marks = bucket[0].load(Relaxed);
            (0..BUCKET_ENTRIES).filter_map(move |entry| {
                let mark = (marks >> (8 * entry)) as u8;
                let word = bucket[1 + entry].load(Relaxed);
                (mark != 0).then_some((Spread { tag: (word >> 32) as u32, mark }, word as u32))
            })
        })
    }
}

/// What readers share.
#[derive(Debug, Default)]
pub(crate) struct Heads {
    directory: AtomicU64,
}

/// What only the writer needs.
#[derive(Debug, Default)]
pub(crate) struct HeadsState {
    len: u64,
    /// Pages by their depth.
    pages: [u32; DEPTH_MAX as usize + 1],
}

impl Heads {
    fn page<'a>(&self, spread: Spread, pinned: &'a impl Pinned) -> Option<Page<'a>> {
        let directory = follow(&self.directory, pinned)?;
        let depth = directory[DIRECTORY_DEPTH].load(Relaxed) as u32;
        follow(&directory[DIRECTORY_HEADER + spread.page(depth)], pinned).map(Page::new)
    }

    /// The first place under `hash` that `is_it` accepts.
    #[inline]
    pub(crate) fn find(
        &self,
        hash: u64,
        pinned: &impl Pinned,
        mut is_it: impl FnMut(u32) -> bool,
    ) -> Option<u32> {
        let spread = Spread::new(hash);
        self.page(spread, pinned)?.walk(spread, |_, _, place| is_it(place).then_some(place))
    }

    /// Fetches the cache line where `hash` would be.
    #[inline]
    pub(crate) fn prefetch(&self, hash: u64, pinned: &impl Pinned) {
        let spread = Spread::new(hash);
        if let Some(page) = self.page(spread, pinned) {
            prefetch(&page.bucket(page.home(spread.tag))[0]);
        }
    }

    /// The most that one insertion may take: a page split in two and, while it is copied, the directory doubled.
    pub(crate) fn growth_bytes(&self, key: &WriterKey) -> usize {
        let links = follow(&self.directory, key).map_or(0, <[_]>::len);
        2 * block_bytes(Page::words(SIZES[SIZE_MAX])) + 2 * block_bytes(links)
    }

    /// Adds a place under `hash`, which has it not yet. False if there is no room and never will be: too many hashes have
    /// the same first bits.
    pub(crate) fn insert(
        &self,
        hash: u64,
        place: u32,
        state: &mut HeadsState,
        heap: &mut Heap,
        key: &WriterKey,
    ) -> bool {
        let spread = Spread::new(hash);
        loop {
            let words = self.page_words(spread, key);
            if let Some(words) = words {
                let page = Page::new(words);
                let len = words[PAGE_LEN].load(Relaxed);
                if len < page_len_max(page.buckets) {
                    page.put(spread, place);
                    words[PAGE_LEN].store(len + 1, Relaxed);
                    state.len += 1;
                    return true;
                }
            }
            if !self.grow(spread, state, heap, key) {
                return false;
            }
        }
    }

    /// Takes `place` under `hash` out.
    pub(crate) fn remove(
        &self,
        hash: u64,
        place: u32,
        state: &mut HeadsState,
        heap: &mut Heap,
        key: &WriterKey,
    ) -> bool {
        let spread = Spread::new(hash);
        let Some(words) = self.page_words(spread, key) else { return false };
        let page = Page::new(words);
        let found = page.walk(spread, |bucket, entry, found| (found == place).then_some((bucket, entry)));
        let Some((bucket, entry)) = found else { return false };
        page.take(spread, bucket, entry);
        let len = words[PAGE_LEN].load(Relaxed) - 1;
        words[PAGE_LEN].store(len, Relaxed);
        state.len -= 1;
        self.shrink(spread, state, heap, key);
        true
    }

    fn page_words<'a>(&self, spread: Spread, key: &'a WriterKey) -> Option<&'a [AtomicU64]> {
        let directory = follow(&self.directory, key)?;
        let depth = directory[DIRECTORY_DEPTH].load(Relaxed) as u32;
        follow(&directory[DIRECTORY_HEADER + spread.page(depth)], key)
    }

    /// Makes room in the page of `spread`.
    fn grow(&self, spread: Spread, state: &mut HeadsState, heap: &mut Heap, key: &WriterKey) -> bool {
        let Some(page) = self.page(spread, key) else {
            let directory = heap.alloc(DIRECTORY_HEADER + 1, 0);
            let page = new_page(SIZES[0], 0, std::iter::empty(), heap);
            directory.words()[DIRECTORY_HEADER].store(page, Relaxed);
            heap.relink(&self.directory, Some(directory));
            state.pages[0] = 1;
            return true;
        };
        let size = size_of_page(page);
        if size < SIZE_MAX {
            let grown = new_page(SIZES[size + 1], page.depth, page.entries(), heap);
            self.replace(spread, page.depth, grown, heap, key);
            return true;
        }
        // Pages fill evenly unless hashes were chosen to fall together: then the directory does not follow them.
        if page.depth == DEPTH_MAX || 1 << page.depth > 64 + state.len / 32 {
            return false;
        }
        let directory_depth = follow(&self.directory, key)
            .map_or(0, |directory| directory[DIRECTORY_DEPTH].load(Relaxed) as u32);
        if page.depth == directory_depth {
            self.resize_directory(directory_depth + 1, heap, key);
        }
        let bit = 1 << (31 - page.depth);
        let half = |ones: bool| page.entries().filter(move |(spread, _)| (spread.tag & bit != 0) == ones);
        // All entries may fall into one half, so each is as large as it must be.
        let [zeros, ones] = [false, true].map(|ones| {
            let size = size_for(half(ones).count() as u64, SIZE_SPLIT);
            new_page(SIZES[size], page.depth + 1, half(ones), heap)
        });
        state.pages[page.depth as usize] -= 1;
        state.pages[page.depth as usize + 1] += 2;
        let old = self.set_links(Spread { tag: spread.tag & !bit, ..spread }, page.depth + 1, zeros, key);
        self.set_links(Spread { tag: spread.tag | bit, ..spread }, page.depth + 1, ones, key);
        heap.retire(old);
        true
    }

    /// Gives memory back if the page of `spread` is mostly empty: by a smaller page, or one for it and its other half.
    /// Late, so that a page's moves are paid by the removals since its last one.
    #[inline]
    fn shrink(&self, spread: Spread, state: &mut HeadsState, heap: &mut Heap, key: &WriterKey) {
        while let Some(page) = self.page_words(spread, key) {
            let len = page[PAGE_LEN].load(Relaxed);
            let page = Page::new(page);
            let size = size_of_page(page);
            if size == 0 || len * 5 >= page_len_max(SIZES[size - 1]) * 3 {
                return;
            }
            let merges = page.depth > 0 && size <= SIZE_MERGE_MAX;
            if !(merges && self.merge(spread, page, state, heap, key)) {
                let smaller = new_page(SIZES[size - 1], page.depth, page.entries(), heap);
                return self.replace(spread, page.depth, smaller, heap, key);
            }
        }
    }

    /// Puts a page and its other half into one if they fit well.
    fn merge(
        &self,
        spread: Spread,
        page: Page<'_>,
        state: &mut HeadsState,
        heap: &mut Heap,
        key: &WriterKey,
    ) -> bool {
        let other_spread = Spread { tag: spread.tag ^ 1 << (32 - page.depth), ..spread };
        let other = self.page(other_spread, key).expect("a directory has no holes");
        let entries = || page.entries().chain(other.entries());
        let len = entries().count() as u64;
        // To at most seven tenths, so that it does not split again at once.
        if other.depth != page.depth || len * 10 > page_len_max(SIZES[SIZE_SPLIT]) * 7 {
            return false;
        }
        let merged = new_page(SIZES[size_for(len * 10 / 7, 0)], page.depth - 1, entries(), heap);
        state.pages[page.depth as usize] -= 2;
        state.pages[page.depth as usize - 1] += 1;
        let old = [spread, other_spread].map(|half| self.link_of(half, key));
        self.set_links(spread, page.depth - 1, merged, key);
        old.into_iter().for_each(|link| heap.retire(link));
        let deepest = state.pages.iter().rposition(|&pages| pages > 0).unwrap_or(0) as u32;
        let directory = follow(&self.directory, key).expect("there are pages");
        // Twice the links that it needs are no reason to copy it.
        if deepest + 2 <= directory[DIRECTORY_DEPTH].load(Relaxed) as u32 {
            self.resize_directory(deepest, heap, key);
        }
        true
    }

    fn replace(&self, spread: Spread, depth: u32, page: u64, heap: &mut Heap, key: &WriterKey) {
        let old = self.set_links(spread, depth, page, key);
        heap.retire(old);
    }

    fn link_of(&self, spread: Spread, key: &WriterKey) -> u64 {
        let directory = follow(&self.directory, key).expect("there is a page");
        let depth = directory[DIRECTORY_DEPTH].load(Relaxed) as u32;
        directory[DIRECTORY_HEADER + spread.page(depth)].load(Relaxed)
    }

    /// Lets every link that a page of `depth` with `spread` in it has lead to `page`. Returns what the first one was.
    fn set_links(&self, spread: Spread, depth: u32, page: u64, key: &WriterKey) -> u64 {
        use crate::sync::Ordering::SeqCst;
        let directory = follow(&self.directory, key).expect("there is a directory");
        let more = directory[DIRECTORY_DEPTH].load(Relaxed) as u32 - depth;
        let first = DIRECTORY_HEADER + (spread.page(depth) << more);
        let links = &directory[first..first + (1 << more)];
        let old = links[0].load(Relaxed);
        links.iter().for_each(|link| link.store(page, SeqCst));
        old
    }

    /// Copies the directory to one of 2^`depth` links.
    fn resize_directory(&self, depth: u32, heap: &mut Heap, key: &WriterKey) {
        let old = follow(&self.directory, key).expect("there is a directory");
        let old_depth = old[DIRECTORY_DEPTH].load(Relaxed) as u32;
        let new = heap.alloc(DIRECTORY_HEADER + (1 << depth), 0);
        new.words()[DIRECTORY_DEPTH].store(u64::from(depth), Relaxed);
        for (index, link) in new.words()[DIRECTORY_HEADER..].iter().enumerate() {
            let from =
                if depth > old_depth { index >> (depth - old_depth) } else { index << (old_depth - depth) };
            link.store(old[DIRECTORY_HEADER + from].load(Relaxed), Relaxed);
        }
        heap.relink(&self.directory, Some(new));
    }

    /// Unlinks everything.
    pub(crate) fn clear(&self, state: &mut HeadsState, heap: &mut Heap, key: &WriterKey) {
        if let Some(directory) = follow(&self.directory, key) {
            let mut last = 0;
            for link in &directory[DIRECTORY_HEADER..] {
                // The links to one page are neighbours.
                let page = link.load(Relaxed);
                if page != last {
                    heap.retire(page);
                    last = page;
                }
            }
        }
        heap.relink(&self.directory, None);
        *state = HeadsState::default();
    }
}

fn size_of_page(page: Page<'_>) -> usize {
    SIZES.partition_point(|&buckets| buckets < page.buckets)
}

/// The smallest size from `at_least` on with room for `len` entries.
fn size_for(len: u64, at_least: usize) -> usize {
    let size = SIZES.partition_point(|&buckets| page_len_max(buckets) < len);
    size.clamp(at_least, SIZE_MAX)
}

/// A page with these entries; its link.
fn new_page(buckets: u32, depth: u32, entries: impl Iterator<Item = (Spread, u32)>, heap: &mut Heap) -> u64 {
    let block = heap.alloc(Page::words(buckets), 0);
    block.words()[PAGE_SHAPE].store(u64::from(buckets) | u64::from(depth) << 32, Relaxed);
    let page = Page::new(block.words());
    let mut len = 0;
    for (spread, place) in entries {
        page.put(spread, place);
        len += 1;
    }
    block.words()[PAGE_LEN].store(len, Relaxed);
    block.link()
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
