//! Block hash -> place, for the writer alone: where is the block that an engine stores again or removes?
//!
//! Extendible hashing with pages of bounded size, so that no single insertion moves more than a page. A directory of
//! 2^depth numbers leads by a hash's first bits to a page; pages have buckets of one cache line: seven entries, a byte of
//! the hash for each (0: empty), and how many entries passed the bucket because it was full. An entry is 32 bits of the
//! hash and a 32-bit place. What it is the place of is for the caller to compare: a table answers with candidates.
//!
//! Pages grow by some 1.4 and split in two at their largest size, so between 60 and 86 % of the entries are in use: 11 to
//! 15 bytes a block. They shrink and merge when somebody
//! [`tidies`](Names::tidy).

use forebay_types::BlockHash;

use crate::{
    reclaim::{block_bytes, prefetch},
    spread::Spread,
};

/// Entries in a bucket.
const BUCKET_ENTRIES: usize = 7;
/// Buckets of a page, by its size; even numbers. The last is 32 KiB, which moves in some tens of microseconds.
const SIZES: [u32; 10] = [4, 8, 16, 32, 64, 128, 192, 256, 362, 512];
const SIZE_MAX: usize = SIZES.len() - 1;
/// Size of the halves of a page that splits, and of two pages that merge.
const SIZE_SPLIT: usize = SIZE_MAX - 1;
/// Bits of a hash that may choose a page; the ten that are left choose the bucket. Twelve thousand million entries.
const DEPTH_MAX: u32 = 22;
/// Hashes whose buckets are fetched ahead: a few memory latencies of work. A power of two.
const AHEAD: usize = 16;
/// Pages in a step of tidying: some tens of microseconds.
const TIDY_PAGES: usize = 4;

/// Entries that a page of `buckets` takes at most before it grows: six of seven.
const fn page_len_max(buckets: u32) -> u32 {
    buckets * 6
}

/// One cache line.
#[derive(Debug, Clone, Default)]
#[repr(align(64))]
struct Bucket {
    /// A byte for each entry; the highest is how many entries passed.
    marks: u64,
    /// A tag above, a place below.
    entries: [u64; BUCKET_ENTRIES],
}

impl Bucket {
    /// Puts an entry into the first of the `free` ones.
    #[inline]
    fn put(&mut self, free: u64, spread: Spread, place: u32) {
        let entry = free.trailing_zeros() as usize / 8;
        self.entries[entry] = spread.entry(place);
        self.marks |= u64::from(spread.mark) << (8 * entry);
    }
}

#[derive(Debug, Default)]
struct Page {
    buckets: Box<[Bucket]>,
    len: u32,
    depth: u32,
    size: u32,
}

/// What became of an insertion.
enum Put {
    /// Added.
    New,
    /// It is there already.
    Known,
}

impl Page {
    fn new(size: usize, depth: u32) -> Self {
        Self {
            buckets: vec![Bucket::default(); SIZES[size] as usize].into(),
            len: 0,
            depth,
            size: size as u32,
        }
    }

    #[inline]
    fn home(&self, tag: u32) -> usize {
        ((u64::from(tag << self.depth) * self.buckets.len() as u64) >> 32) as usize
    }

    /// The bucket where one goes that finds no room in `index`: first the other of the pair of lines that hardware fetches
    /// together, then the pairs that follow.
    #[inline]
    fn after(&self, index: usize, home: usize) -> usize {
        let next = if index == home {
            home ^ 1
        } else if index == home ^ 1 {
            (home | 1) + 1
        } else {
            index + 1
        };
        if next == self.buckets.len() { 0 } else { next }
    }

    fn len_max(&self) -> u32 {
        page_len_max(self.buckets.len() as u32)
    }

    /// Bucket and entry of the first place under `spread` that `is_it` accepts.
    #[inline]
    fn find(&self, spread: Spread, mut is_it: impl FnMut(u32) -> bool) -> Option<(usize, usize)> {
        let home = self.home(spread.tag);
        let mut index = home;
        for _ in 0..self.buckets.len() {
            let bucket = &self.buckets[index];
            let mut like = spread.like(bucket.marks);
            while like != 0 {
                let entry = like.trailing_zeros() as usize / 8;
                like &= like - 1;
                let word = bucket.entries[entry];
                if (word >> 32) as u32 == spread.tag && is_it(word as u32) {
                    return Some((index, entry));
                }
            }
            if bucket.marks >> 56 == 0 {
                return None;
            }
            index = self.after(index, home);
        }
        None
    }

    /// Adds an entry, unless `is_it` accepts one; there is room.
    #[inline]
    fn find_or_put(&mut self, spread: Spread, place: u32, is_it: impl FnMut(u32) -> bool) -> Put {
        // Most are new and at home there.
        let home = self.home(spread.tag);
        let bucket = &mut self.buckets[home];
        let free = Spread::free(bucket.marks);
        if spread.like(bucket.marks) == 0 && bucket.marks >> 56 == 0 && free != 0 {
            bucket.put(free, spread, place);
            self.len += 1;
            return Put::New;
        }
        if self.find(spread, is_it).is_some() {
            return Put::Known;
        }
        self.put(spread, place);
        Put::New
    }

    #[inline]
    fn put(&mut self, spread: Spread, place: u32) {
        let home = self.home(spread.tag);
        let mut index = home;
        loop {
            let bucket = &mut self.buckets[index];
            let free = Spread::free(bucket.marks);
            if free != 0 {
                bucket.put(free, spread, place);
                break;
            }
            // Saturates: then it stays until the page is replaced.
            if bucket.marks >> 56 < 0xff {
                bucket.marks += 1 << 56;
            }
            index = self.after(index, home);
        }
        self.len += 1;
    }

    fn take(&mut self, spread: Spread, at: usize, entry: usize) {
        self.buckets[at].marks &= !(0xff << (8 * entry));
        let home = self.home(spread.tag);
        let mut index = home;
        while index != at {
            let marks = &mut self.buckets[index].marks;
            // One that was saturated is not true any more.
            if *marks >> 56 < 0xff {
                *marks -= 1 << 56;
            }
            index = self.after(index, home);
        }
        self.len -= 1;
    }

    /// Every entry.
    fn entries(&self) -> impl Iterator<Item = (Spread, u32)> + '_ {
        self.buckets.iter().flat_map(|bucket| {
            (0..BUCKET_ENTRIES).filter_map(move |entry| {
                let mark = (bucket.marks >> (8 * entry)) as u8;
                let word = bucket.entries[entry];
                (mark != 0).then_some((Spread { tag: (word >> 32) as u32, mark }, word as u32))
            })
        })
    }

    fn filled(size: usize, depth: u32, entries: impl Iterator<Item = (Spread, u32)>) -> Self {
        let mut page = Self::new(size, depth);
        entries.for_each(|(spread, place)| page.put(spread, place));
        page
    }

    fn bytes(&self) -> usize {
        block_bytes(self.buckets.len() * size_of::<Bucket>() / 8) + 64
    }
}

/// Places of blocks.
#[derive(Debug)]
pub(crate) struct Names {
    directory: Vec<u32>,
    depth: u32,
    pages: Vec<Page>,
    /// Numbers of `pages` that are not in use.
    free: Vec<u32>,
    /// Pages by their depth.
    depths: [u32; DEPTH_MAX as usize + 1],
    len: u64,
    /// Entries that the pages take before they grow.
    room: u64,
    bytes: usize,
    tidied: Tidied,
}

/// How far pages were looked through, the entries when that began, and the room when it last ended.
#[derive(Debug, Clone, Copy)]
struct Tidied {
    /// The tag with which the next page begins; 2^32 at the end.
    next: u64,
    len: u64,
    room: u64,
}

impl Default for Names {
    fn default() -> Self {
        let page = Page::new(0, 0);
        let mut depths = [0; DEPTH_MAX as usize + 1];
        depths[0] = 1;
        let room = u64::from(page.len_max());
        Self {
            directory: vec![0],
            depth: 0,
            bytes: page.bytes(),
            pages: vec![page],
            free: vec![],
            depths,
            len: 0,
            room,
            tidied: Tidied { next: 1 << 32, len: 0, room },
        }
    }
}

impl Names {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes + 4 * self.directory.capacity() + size_of::<Page>() * self.pages.capacity()
    }

    /// The most that one insertion may take: a page split in two and, while it is copied, the directory doubled.
    pub(crate) fn growth_bytes(&self) -> usize {
        2 * block_bytes(SIZES[SIZE_MAX] as usize * 8) + 2 * (4 * self.directory.len() + 32 * self.pages.len())
    }

    #[inline]
    fn page_number(&self, spread: Spread) -> usize {
        self.directory[spread.page(self.depth)] as usize
    }

    /// The first place under `hash` that `is_it` accepts.
    #[inline]
    pub(crate) fn find(&self, hash: u64, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let spread = Spread::new(hash);
        let page = &self.pages[self.page_number(spread)];
        let (bucket, entry) = page.find(spread, &mut is_it)?;
        Some(page.buckets[bucket].entries[entry] as u32)
    }

    /// Asks for the line where `spread` would be.
    #[inline]
    fn prefetch(&self, spread: Spread) {
        let page = &self.pages[self.page_number(spread)];
        let home = page.home(spread.tag);
        prefetch(&page.buckets[home]);
        prefetch(&page.buckets[home ^ 1]);
    }

    /// Asks for the line where `hash` would be.
    #[inline]
    pub(crate) fn fetch(&self, hash: u64) {
        self.prefetch(Spread::new(hash));
    }

    /// Adds `hashes` under `first`, `first` + 1, …, up to the first that is there already by `is_it` (a hash and a place),
    /// and says how many. Fewer also if a page is full and cannot split: too many hashes have the same first bits.
    pub(crate) fn insert_run(
        &mut self,
        hashes: &[BlockHash],
        first: u32,
        mut is_it: impl FnMut(u64, u32) -> bool,
    ) -> usize {
        let mut ahead = Ahead::new(self, hashes.iter().map(|hash| hash.0));
        for (done, hash) in hashes.iter().enumerate() {
            let spread = ahead.next(self);
            let mut number = self.page_number(spread);
            while self.pages[number].len >= self.grows_at(number) {
                if !self.grow(spread) {
                    return done;
                }
                number = self.page_number(spread);
            }
            match self.pages[number].find_or_put(spread, first + done as u32, |place| is_it(hash.0, place)) {
                Put::New => self.len += 1,
                Put::Known => return done,
            }
        }
        hashes.len()
    }

    /// Takes `hashes` out, which are under `first`, `first` + 1, …
    pub(crate) fn remove_run(&mut self, first: u32, hashes: impl ExactSizeIterator<Item = u64>) {
        let count = hashes.len() as u32;
        let mut ahead = Ahead::new(self, hashes);
        for place in first..first + count {
            let spread = ahead.next(self);
            self.remove(spread, place);
        }
    }

    #[inline]
    fn remove(&mut self, spread: Spread, place: u32) {
        let number = self.page_number(spread);
        let page = &mut self.pages[number];
        let Some((bucket, entry)) = page.find(spread, |found| found == place) else { return };
        page.take(spread, bucket, entry);
        self.len -= 1;
    }

    fn count_page(&mut self, page: &Page) {
        self.bytes += page.bytes();
        self.room += u64::from(page.len_max());
    }

    fn uncount_page(&mut self, page: &Page) {
        self.bytes -= page.bytes();
        self.room -= u64::from(page.len_max());
    }

    fn set_page(&mut self, number: usize, page: Page) {
        self.count_page(&page);
        let old = std::mem::replace(&mut self.pages[number], page);
        self.uncount_page(&old);
    }

    /// Entries at which a page grows. Not the same for all: hashes fill pages evenly, and if all were full at once a single
    /// event would meet many of them.
    #[inline]
    fn grows_at(&self, number: usize) -> u32 {
        let page = &self.pages[number];
        page.len_max() - page.buckets.len() as u32 * (number as u32 % 8) / 8
    }

    /// Makes room in the page of `spread`. False if it cannot.
    #[cold]
    fn grow(&mut self, spread: Spread) -> bool {
        let number = self.page_number(spread);
        let page = &self.pages[number];
        let (size, depth) = (page.size as usize, page.depth);
        if size < SIZE_MAX {
            let grown = Page::filled(size + 1, depth, page.entries());
            self.set_page(number, grown);
            return true;
        }
        // Pages fill evenly unless hashes were chosen to fall together: then the directory does not follow them.
        if depth == DEPTH_MAX || 1 << depth > 64 + self.len / 32 {
            return false;
        }
        let bit = 1 << (31 - depth);
        let half = |ones: bool| page.entries().filter(move |(spread, _)| (spread.tag & bit != 0) == ones);
        // All entries may fall into one half, so each is as large as it must be.
        let [zeros, ones] = [false, true]
            .map(|ones| Page::filled(size_for(half(ones).count() as u32, SIZE_SPLIT), depth + 1, half(ones)));
        if depth == self.depth {
            self.directory = self.directory.iter().flat_map(|&number| [number; 2]).collect();
            self.depth += 1;
        }
        self.depths[depth as usize] -= 1;
        self.depths[depth as usize + 1] += 2;
        self.set_page(number, zeros);
        let other = self.add_page(ones);
        self.set_links(Spread { tag: spread.tag | bit, ..spread }, depth + 1, other);
        true
    }

    fn add_page(&mut self, page: Page) -> u32 {
        self.count_page(&page);
        if let Some(number) = self.free.pop() {
            self.pages[number as usize] = page;
            return number;
        }
        self.pages.push(page);
        self.pages.len() as u32 - 1
    }

    /// Lets every link that a page of `depth` with `spread` in it has lead to page `number`.
    fn set_links(&mut self, spread: Spread, depth: u32, number: u32) {
        let more = self.depth - depth;
        let first = spread.page(depth) << more;
        self.directory[first..first + (1 << more)].fill(number);
    }

    /// Looks at a few more pages and gives memory back where they are mostly empty. False if there is nothing to do.
    ///
    /// Removals leave that for later: what an engine removes now it soon stores something else in place of, and pages
    /// would shrink and grow all the time.
    pub(crate) fn tidy(&mut self) -> bool {
        let sparse = self.len * 2 < self.room;
        let changed = self.len * 10 < self.tidied.len * 9 || self.room > self.tidied.room;
        if self.tidied.next > u64::from(u32::MAX) {
            if !sparse || !changed {
                return false;
            }
            // What goes from pages that were looked at by then is a reason to look again.
            self.tidied = Tidied { next: 0, len: self.len, ..self.tidied };
        }
        for _ in 0..TIDY_PAGES {
            let Ok(tag) = u32::try_from(self.tidied.next) else { break };
            let spread = Spread { tag, mark: 1 };
            self.shrink(spread);
            let below = 32 - self.pages[self.page_number(spread)].depth;
            self.tidied.next = ((u64::from(tag) >> below) + 1) << below;
        }
        if self.tidied.next > u64::from(u32::MAX) {
            self.tidied.room = self.room;
        }
        true
    }

    /// Gives memory back if the page of `spread` is mostly empty: by a smaller page, or one for it and its other half.
    fn shrink(&mut self, spread: Spread) {
        loop {
            let number = self.page_number(spread);
            let page = &self.pages[number];
            let size = size_for(page.len * 10 / 7, 0);
            if size >= page.size as usize && page.size > 0 {
                return;
            }
            if page.depth == 0 || !self.merge(spread, number) {
                let page = &self.pages[number];
                if size < page.size as usize {
                    let smaller = Page::filled(size, page.depth, page.entries());
                    self.set_page(number, smaller);
                }
                return;
            }
        }
    }

    /// Puts a page and its other half into one if they fit well.
    fn merge(&mut self, spread: Spread, number: usize) -> bool {
        let page = &self.pages[number];
        let depth = page.depth;
        let other_number = self.page_number(Spread { tag: spread.tag ^ 1 << (32 - depth), ..spread });
        let other = &self.pages[other_number];
        let len = page.len + other.len;
        // To at most seven tenths, so that it does not split again at once.
        if other.depth != depth || len * 10 > page_len_max(SIZES[SIZE_SPLIT]) * 7 {
            return false;
        }
        let merged =
            Page::filled(size_for(len * 10 / 7, 0), depth - 1, page.entries().chain(other.entries()));
        self.set_page(number, merged);
        let gone = std::mem::take(&mut self.pages[other_number]);
        self.uncount_page(&gone);
        self.free.push(other_number as u32);
        self.depths[depth as usize] -= 2;
        self.depths[depth as usize - 1] += 1;
        self.set_links(spread, depth - 1, number as u32);
        let deepest = self.depths.iter().rposition(|&pages| pages > 0).unwrap_or(0) as u32;
        // Twice the links that it needs are no reason to copy it.
        if deepest + 2 <= self.depth {
            let step = 1 << (self.depth - deepest);
            self.directory = self.directory.iter().copied().step_by(step).collect();
            self.depth = deepest;
        }
        true
    }
}

/// Hashes, spread, while the lines of those that follow are on their way.
struct Ahead<I> {
    hashes: I,
    ring: [Spread; AHEAD],
    next: usize,
}

impl<I: Iterator<Item = u64>> Ahead<I> {
    #[inline]
    fn new(names: &Names, mut hashes: I) -> Self {
        let mut ring = [Spread::default(); AHEAD];
        for (place, hash) in ring.iter_mut().zip(hashes.by_ref()) {
            *place = Spread::new(hash);
            names.prefetch(*place);
        }
        Self { hashes, ring, next: 0 }
    }

    /// The next one, of which there is one.
    #[inline]
    fn next(&mut self, names: &Names) -> Spread {
        let place = &mut self.ring[self.next % AHEAD];
        self.next += 1;
        let spread = *place;
        if let Some(hash) = self.hashes.next() {
            *place = Spread::new(hash);
            names.prefetch(*place);
        }
        spread
    }
}

/// The smallest size from `at_least` on with room for `len` entries.
fn size_for(len: u32, at_least: usize) -> usize {
    SIZES.partition_point(|&buckets| page_len_max(buckets) < len).clamp(at_least, SIZE_MAX)
}

#[cfg(test)]
mod tests;
