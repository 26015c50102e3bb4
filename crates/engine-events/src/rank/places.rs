//! Hash -> place, four bytes an entry and a byte of its hash: the rest is compared where the place leads.
//!
//! Extendible hashing: a directory of 2^depth numbers leads by a hash's first bits to a page, pages have buckets of one
//! cache line. A page that is full grows by a quarter, and at its largest splits in two, so an insertion moves one page of
//! at most some 750 entries; which size is the largest differs from page to page, so that not all are half empty at
//! once. Between 70 and 92 % of the entries are in use, unless entries went: pages shrink, but do not merge.

/// Entries in a bucket: with their marks, one cache line.
const BUCKET_ENTRIES: usize = 12;
/// Of them, on average, in use when a page grows, and when it is made.
const FULL: usize = 11;
const MADE_FULL: usize = 10;
/// The least number of buckets at which a page splits. Others do at up to twice as many.
const SPLITS_AT: usize = 28;
/// Bits of a hash that may choose a page. Pages that cannot split grow on.
const DEPTH_MAX: u32 = 22;

#[derive(Debug, Clone, Default)]
#[repr(align(64))]
struct Bucket {
    /// A byte of each entry's hash, never 0; 0 for one that is free.
    marks: [u8; BUCKET_ENTRIES],
    /// Entries that went on to the next bucket, as this one was full. Stays at its greatest number once it is there.
    passed: u8,
    places: [u32; BUCKET_ENTRIES],
}

#[derive(Debug, Clone, Default)]
struct Page {
    buckets: Box<[Bucket]>,
    len: usize,
    depth: u32,
}

fn mark(hash: u64) -> u8 {
    (hash as u8).max(1)
}

impl Page {
    fn with_buckets(buckets: usize, depth: u32) -> Self {
        Self { buckets: vec![Bucket::default(); buckets].into(), len: 0, depth }
    }

    /// The bucket where a hash belongs: by the bits after those that chose the page.
    fn home(&self, hash: u64) -> usize {
        ((u128::from(hash << self.depth) * self.buckets.len() as u128) >> 64) as usize
    }

    fn after(&self, bucket: usize) -> usize {
        if bucket + 1 == self.buckets.len() { 0 } else { bucket + 1 }
    }

    /// Bucket and entry of the first place under `hash` that `is_it` accepts.
    fn find(&self, hash: u64, mut is_it: impl FnMut(u32) -> bool) -> Option<(usize, usize)> {
        let mark = mark(hash);
        let mut index = self.home(hash);
        for _ in 0..self.buckets.len() {
            let bucket = &self.buckets[index];
            for entry in 0..BUCKET_ENTRIES {
                if bucket.marks[entry] == mark && is_it(bucket.places[entry]) {
                    return Some((index, entry));
                }
            }
            if bucket.passed == 0 {
                return None;
            }
            index = self.after(index);
        }
        None
    }

    /// Adds an entry; there is room.
    fn put(&mut self, hash: u64, place: u32) {
        let mut index = self.home(hash);
        loop {
            let bucket = &mut self.buckets[index];
            if let Some(entry) = bucket.marks.iter().position(|&mark| mark == 0) {
                (bucket.marks[entry], bucket.places[entry]) = (mark(hash), place);
                self.len += 1;
                return;
            }
            bucket.passed = bucket.passed.saturating_add(1);
            index = self.after(index);
        }
    }

    fn take(&mut self, hash: u64, (at, entry): (usize, usize)) {
        self.buckets[at].marks[entry] = 0;
        self.len -= 1;
        let mut index = self.home(hash);
        while index != at {
            let passed = &mut self.buckets[index].passed;
            *passed -= u8::from(*passed < u8::MAX);
            index = self.after(index);
        }
    }

    fn places(&self) -> impl Iterator<Item = u32> + '_ {
        let entries =
            |bucket: &'_ Bucket| (0..BUCKET_ENTRIES).filter(|&entry| bucket.marks[entry] != 0).collect();
        self.buckets.iter().flat_map(move |bucket| {
            let entries: smallvec::SmallVec<[usize; BUCKET_ENTRIES]> = entries(bucket);
            entries.into_iter().map(|entry| bucket.places[entry])
        })
    }

    fn entries(&self, contents: &impl Contents) -> Vec<(u64, u32)> {
        let mut entries = Vec::with_capacity(self.len);
        entries.extend(self.places().map(|place| (contents.key(place), place)));
        entries.iter_mut().for_each(|(key, _)| *key = contents.hash(*key));
        entries
    }

    /// The same entries in `buckets`, or as many as they need.
    fn with(buckets: usize, depth: u32, entries: &[(u64, u32)]) -> Self {
        let mut page = Self::with_buckets(buckets.max(entries.len().div_ceil(FULL)), depth);
        entries.iter().for_each(|&(hash, place)| page.put(hash, place));
        page
    }
}

/// What is at places: how a page's entries get their hashes again when it moves.
pub(super) trait Contents {
    /// What is at a place. Read for all entries before any is hashed, so that the reads overlap.
    fn key(&self, place: u32) -> u64;
    fn hash(&self, key: u64) -> u64;
}

/// Places by hash. What is at a place is for the caller to compare.
#[derive(Debug)]
pub(super) struct Places {
    /// Numbers of pages, by the first `depth` bits.
    directory: Vec<u32>,
    depth: u32,
    pages: Vec<Page>,
}

impl Default for Places {
    fn default() -> Self {
        Self { directory: vec![0], depth: 0, pages: vec![Page::default()] }
    }
}

impl Places {
    fn page_number(&self, hash: u64) -> usize {
        // A shift by all bits is none, hence in two.
        self.directory[(hash >> 1 >> (63 - self.depth)) as usize] as usize
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.len() == 1 && self.pages[0].len == 0
    }

    /// The first place under `hash` that `is_it` accepts.
    pub(super) fn find(&self, hash: u64, is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let page = &self.pages[self.page_number(hash)];
        let (bucket, entry) = page.find(hash, is_it)?;
        Some(page.buckets[bucket].places[entry])
    }

    /// Adds a place under `hash`, where it is not yet.
    pub(super) fn insert(&mut self, hash: u64, place: u32, contents: &impl Contents) {
        loop {
            let number = self.page_number(hash);
            let page = &mut self.pages[number];
            if page.len < page.buckets.len() * FULL {
                return page.put(hash, place);
            }
            self.grow(number, hash, contents);
        }
    }

    /// Takes `place` under `hash` out.
    pub(super) fn remove(&mut self, hash: u64, place: u32, contents: &impl Contents) {
        let number = self.page_number(hash);
        let page = &mut self.pages[number];
        let Some(found) = page.find(hash, |found| found == place) else { return };
        page.take(hash, found);
        if page.len * 3 < page.buckets.len() * BUCKET_ENTRIES {
            let entries = page.entries(contents);
            *page = Page::with(entries.len().div_ceil(MADE_FULL), page.depth, &entries);
        }
    }

    /// Makes room in page `number`, where `hash` belongs.
    #[cold]
    fn grow(&mut self, number: usize, hash: u64, contents: &impl Contents) {
        let page = &self.pages[number];
        let (buckets, depth) = (page.buckets.len(), page.depth);
        let entries = page.entries(contents);
        if buckets < SPLITS_AT + number * 37 % SPLITS_AT || depth == DEPTH_MAX {
            self.pages[number] = Page::with(buckets + buckets / 4 + 1, depth, &entries);
            return;
        }
        if depth == self.depth {
            self.directory = self.directory.iter().flat_map(|&number| [number; 2]).collect();
            self.depth += 1;
        }
        let bit = 1 << (63 - depth);
        let (ones, zeros): (Vec<_>, Vec<_>) = entries.into_iter().partition(|(hash, _)| hash & bit != 0);
        let half = |entries: &[_]| Page::with(entries.len().div_ceil(MADE_FULL), depth + 1, entries);
        self.pages[number] = half(&zeros);
        let other = self.pages.len() as u32;
        self.pages.push(half(&ones));
        let links = 1 << (self.depth - depth - 1);
        let first = ((hash | bit) >> (63 - depth) << (self.depth - depth - 1)) as usize;
        self.directory[first..first + links].fill(other);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// A place's hash: with few enough first bits, hashes fall together.
    fn hash_of(place: u32, bits: u32) -> u64 {
        let mixed = u64::from(place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> (64 - bits) << (64 - bits)
    }

    struct Mixed {
        bits: u32,
    }

    impl Contents for Mixed {
        fn key(&self, place: u32) -> u64 {
            u64::from(place)
        }

        fn hash(&self, key: u64) -> u64 {
            hash_of(key as u32, self.bits)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_put_in_is_found_until_it_is_taken_out(
            steps in prop::collection::vec((any::<bool>(), 0..20_000_u32, 1..3000_u32), 1..24),
            bits in prop::sample::select(vec![3, 12, 64]),
        ) {
            // Where all fall together each look-up walks all.
            let most = if bits < 12 { 200 } else { 20_000 };
            let (mut places, mut model) = (Places::default(), BTreeSet::new());
            for (inserts, first, count) in steps {
                for place in (first..first + count).map(|place| place % most) {
                    let hash = hash_of(place, bits);
                    let is_new = places.find(hash, |found| found == place).is_none();
                    prop_assert_eq!(is_new, !model.contains(&place));
                    if inserts && is_new {
                        places.insert(hash, place, &Mixed { bits });
                        model.insert(place);
                    } else if !inserts {
                        places.remove(hash, place, &Mixed { bits });
                        model.remove(&place);
                    }
                }
                prop_assert_eq!(places.pages.iter().map(|page| page.len).sum::<usize>(), model.len());
                let buckets = places.pages.iter().map(|page| page.buckets.len()).sum::<usize>();
                prop_assert!(buckets * BUCKET_ENTRIES <= 3 * model.len() + BUCKET_ENTRIES * places.pages.len());
            }
        }
    }
}
