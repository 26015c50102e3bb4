//! What changes the index: stores, removals, what goes with a rank, and what goes for lack of room. One at a time.

mod contents;
mod removal;
mod room;

use forebay_types::{BlockHash, KV_GROUPS_MAX, KvEvent, KvGroup, RankId};
use room::Sweep;

use crate::{
    filter::{Filter, FilterState},
    heads::{Heads, HeadsState},
    names::Names,
    ranks::{Ranks, Slots},
    reclaim::{Epochs, Heap, Pinned, WriterKey},
    segment::{Holder, Place, Plane, SEGMENT_BLOCKS, Segment, bits, set},
    segments::{Segments, SegmentsState},
    sync::{AtomicU64, Ordering::Relaxed},
};

/// What readers and the writer share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) epochs: Epochs,
    pub(crate) filter: Filter,
    pub(crate) heads: Heads,
    pub(crate) segments: Segments,
    pub(crate) slots: Slots,
    /// Ticks so far: how far apart uses are told apart.
    pub(crate) now: AtomicU64,
}

impl Shared {
    /// The segment where `hash` is a head, and its position there.
    #[inline]
    pub(crate) fn head<'a>(
        &'a self,
        hash: BlockHash,
        pinned: &'a impl Pinned,
    ) -> Option<(Segment<'a>, usize)> {
        let mut found = None;
        self.heads.find(hash.0, pinned, |word| {
            let place = Place::from_word(word);
            let segment = self.segments.get(place.segment, pinned);
            found = segment
                .filter(|segment| segment.hash(place.position) == Some(hash.0))
                .map(|segment| (segment, place.position as usize));
            found.is_some()
        });
        found
    }

    #[inline]
    fn is_at(&self, hash: u64, place: Place, pinned: &impl Pinned) -> bool {
        let segment = self.segments.get(place.segment, pinned);
        segment.and_then(|segment| segment.hash(place.position)) == Some(hash)
    }
}

/// Counted since the start.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) refused: u64,
    pub(crate) evicted: u64,
    pub(crate) removals_unknown: u64,
}

/// The writer's side of an index.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) ranks: Ranks,
    pub(crate) counts: Counts,
    key: WriterKey,
    heap: Heap,
    names: Names,
    heads: HeadsState,
    filter: FilterState,
    segments: SegmentsState,
    /// Distinct blocks that anyone holds. The table has those beside that nobody does and that a segment still names.
    blocks: u64,
    bytes_max: usize,
    /// Blocks in a tick, and stored in this one.
    tick_blocks: u64,
    ticked: u64,
    /// Where the search for cold segments goes on.
    hand: u32,
    sweep: Option<Sweep>,
    /// A segment that is not freed while room is made for what comes to it.
    keep: Option<u32>,
}

impl Writer {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            ranks: Ranks::default(),
            counts: Counts::default(),
            key: WriterKey::new(),
            heap: Heap::default(),
            names: Names::default(),
            heads: HeadsState::default(),
            filter: FilterState::default(),
            segments: SegmentsState::default(),
            blocks: 0,
            bytes_max,
            // A thousandth of what fits tells hot from cold well enough.
            tick_blocks: (bytes_max as u64 / (24 * 1024)).max(1),
            ticked: 0,
            hand: 0,
            sweep: None,
            keep: None,
        }
    }

    /// Distinct blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(crate) fn segments(&self) -> u32 {
        self.segments.len()
    }

    pub(crate) fn names_bytes(&self) -> usize {
        self.names.bytes()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.heap.bytes()
            + self.names.bytes()
            + self.segments.bytes()
            + self.ranks.bytes()
            + self.filter.bytes()
            + Filter::BYTES
    }

    /// Applies one event of a rank that is known and has this slot. Returns its slot from now on.
    pub(crate) fn apply(&mut self, shared: &Shared, rank: RankId, slot: u16, event: &KvEvent) -> u16 {
        let holder = |tier, group| Plane::new(tier, group).map(|plane| Holder { slot, plane });
        match event {
            KvEvent::Groups(groups) => self.set_groups(slot, groups, shared),
            KvEvent::Stored { parent, hashes, tier, group } => match holder(*tier, *group) {
                Some(holder) => self.store(shared, holder, *parent, hashes),
                None => self.counts.refused += hashes.len() as u64,
            },
            KvEvent::Removed { hashes, tier, group } => match holder(*tier, *group) {
                Some(holder) => self.remove(shared, holder, hashes),
                None => self.counts.removals_unknown += hashes.len() as u64,
            },
            KvEvent::Cleared => return self.clear_rank(rank, shared),
        }
        slot
    }

    /// Makes a rank known. False if there are `ranks_max` others.
    pub(crate) fn add_rank(&mut self, rank: RankId, shared: &Shared, ranks_max: u16) -> bool {
        if self.ranks.find(rank).is_some() {
            return true;
        }
        if self.ranks.len() >= usize::from(ranks_max) {
            return false;
        }
        while !self.ranks.add(rank, &shared.slots, &mut self.heap, &self.key) {
            self.free_slots(shared);
        }
        true
    }

    /// Forgets a rank.
    pub(crate) fn remove_rank(&mut self, rank: RankId, shared: &Shared) {
        self.ranks.remove(rank, &shared.slots, &self.key);
    }

    /// Says which groups of layers the rank of a slot has.
    pub(crate) fn set_groups(&mut self, slot: u16, groups: &[KvGroup], shared: &Shared) {
        let groups = &groups[..groups.len().min(KV_GROUPS_MAX)];
        self.ranks.set_groups(slot, groups, &shared.slots, &mut self.heap, &self.key);
    }

    /// Empties a rank that is known. Returns its slot from now on.
    pub(crate) fn clear_rank(&mut self, rank: RankId, shared: &Shared) -> u16 {
        while !self.ranks.clear(rank, &shared.slots, &mut self.heap, &self.key) {
            self.free_slots(shared);
        }
        self.ranks.find(rank).expect("a rank that is known").slot
    }

    /// Takes what ranks left behind out of the index until a slot is free: they come and go faster than it is swept.
    /// There are twice as many slots as ranks, so there is something to sweep or to wait for.
    #[cold]
    fn free_slots(&mut self, shared: &Shared) {
        while self.sweep_step(shared) {}
        // Readers are through in a moment; nothing else in the index waits for them.
        while self.heap.has_retired() {
            self.collect(shared);
            crate::sync::yield_now();
        }
    }

    /// Asks for the lines where what `event` names first would be.
    #[inline]
    pub(crate) fn fetch(&self, event: &KvEvent) {
        let (first, parent) = match event {
            KvEvent::Stored { parent, hashes, .. } => (hashes.first(), parent.as_ref()),
            KvEvent::Removed { hashes, .. } => (hashes.first(), None),
            KvEvent::Groups(_) | KvEvent::Cleared => return,
        };
        for hash in first.into_iter().chain(parent) {
            self.names.fetch(hash.0);
        }
    }

    /// Records that `holder` holds `chain`, which follows `parent`.
    pub(crate) fn store(
        &mut self,
        shared: &Shared,
        holder: Holder,
        parent: Option<BlockHash>,
        chain: &[BlockHash],
    ) {
        if holder.plane != Plane::DEVICE {
            self.ranks.set_noted(holder.slot, &shared.slots, &self.key);
        }
        let mut before: Option<Place> = None;
        let mut rest = chain;
        while let Some(&hash) = rest.first() {
            let next = before.and_then(|before| self.next_in_segment(shared, before, hash));
            if let Some(place) = next.or_else(|| self.find(shared, hash)) {
                let segment = shared.segments.get(place.segment, &self.key).expect("found");
                let run = segment.common(place.position as usize, rest.iter().map(|hash| hash.0));
                self.hold(shared, holder, place, run);
                before = Some(Place { position: place.position + run as u32 - 1, ..place });
                rest = &rest[run..];
                continue;
            }
            let before_new = before.or_else(|| self.find(shared, parent?));
            let after = chain[..chain.len() - rest.len()].last().copied().or(parent);
            let Some((last, run)) = self.insert(shared, holder, before_new, after, rest) else {
                // What follows a block without room could not be matched before it.
                self.counts.refused += rest.len() as u64;
                return;
            };
            before = Some(last);
            rest = &rest[run..];
        }
        self.tick(shared, chain.len() as u64);
    }

    /// Where `hash` is.
    #[inline]
    fn find(&self, shared: &Shared, hash: BlockHash) -> Option<Place> {
        let is_it = |word| shared.is_at(hash.0, Place::from_word(word), &self.key);
        self.names.find(hash.0, is_it).map(Place::from_word)
    }

    fn tick(&mut self, shared: &Shared, blocks: u64) {
        self.ticked += blocks;
        if self.ticked >= self.tick_blocks {
            self.ticked = 0;
            shared.now.fetch_add(1, Relaxed);
        }
    }

    fn next_in_segment(&self, shared: &Shared, before: Place, hash: BlockHash) -> Option<Place> {
        let next = Place { position: before.position + 1, ..before };
        let segment = shared.segments.get(before.segment, &self.key)?;
        (segment.hash(next.position) == Some(hash.0)).then_some(next)
    }

    /// Records that `holder` holds the `run` blocks from `place` on, which are there.
    fn hold(&mut self, shared: &Shared, holder: Holder, place: Place, run: usize) {
        if !self.make_room(shared, Some(place.segment)) {
            // Without room for a list of holders nothing is recorded of this one.
            let known = shared.segments.get(place.segment, &self.key);
            if known.is_none_or(|segment| segment.mask(holder, &self.key).is_none()) {
                self.counts.refused += run as u64;
                return;
            }
        }
        let segment = shared.segments.get(place.segment, &self.key).expect("a segment that was protected");
        let mask = segment.mask_or_new(holder, &mut self.heap, &self.key);
        // It may have been cut when room was made.
        let there = bits(0, segment.len());
        let new = bits(place.position as usize, run) & there & !mask.load(Relaxed);
        segment.touch(shared.now.load(Relaxed));
        if new == 0 {
            return;
        }
        let run = bits(place.position as usize, run);
        self.counts.refused += u64::from((run & !there).count_ones());
        self.blocks += u64::from((new & !segment.held(&self.key)).count_ones());
        set(mask, new);
        self.ranks.count(holder, i64::from(new.count_ones()));
    }

    /// Records new blocks, the first of which follows `after`, which is at `before` if it is known: as many as fit into one
    /// segment and are new. Returns where the last is and how many; `None` if there is no room.
    fn insert(
        &mut self,
        shared: &Shared,
        holder: Holder,
        before: Option<Place>,
        after: Option<BlockHash>,
        chain: &[BlockHash],
    ) -> Option<(Place, usize)> {
        if !self.make_room(shared, before.map(|place| place.segment)) {
            return None;
        }
        let (number, room) = match before.and_then(|before| self.make_tail(shared, before, chain.len())) {
            Some(tail) => tail,
            None => self.add_segment(shared, holder, before, after, chain.len())?,
        };
        let segment = shared.segments.get(number, &self.key).expect("made or found above");
        let start = segment.len();
        let chain = &chain[..chain.len().min(room)];
        let first = Place { segment: number, position: start as u32 };
        let (key, segments) = (&self.key, &shared.segments);
        let run = self.names.insert_run(chain, first.to_word(), |hash, word| {
            let place = Place::from_word(word);
            // Those of this run are not in the segment yet.
            match place.position.checked_sub(first.position).filter(|_| place.segment == number) {
                Some(index) => chain[index as usize].0 == hash,
                None => {
                    let segment = segments.get(place.segment, key);
                    segment.and_then(|segment| segment.hash(place.position)) == Some(hash)
                }
            }
        });
        if run == 0 {
            self.free(shared, number);
            return None;
        }
        segment.append(chain[..run].iter().map(|hash| hash.0));
        let mask = segment.mask_or_new(holder, &mut self.heap, &self.key);
        set(mask, bits(start, run));
        segment.touch(shared.now.load(Relaxed));
        self.ranks.count(holder, run as i64);
        self.blocks += run as u64;
        // Readers find it from here on.
        let is_root = segment.parent().is_none();
        if start == 0 && !self.add_head(shared, chain[0].0, first, is_root) {
            // Too many hashes with the same first bits. It is kept, and never found.
            self.counts.refused += run as u64;
        }
        Some((Place { position: (start + run - 1) as u32, ..first }, run))
    }

    /// Lets readers find the segment that begins with `hash` at `first`; `is_root` if it may begin a prompt.
    fn add_head(&mut self, shared: &Shared, hash: u64, first: Place, is_root: bool) -> bool {
        let is_new = shared.heads.insert(hash, first.to_word(), &mut self.heads, &mut self.heap, &self.key);
        if is_new && is_root {
            self.filter.add(&shared.filter, hash);
        }
        is_new
    }

    /// Makes room for up to `blocks` more after `before` in its own segment, if it ends there or if nobody holds what
    /// comes after. Returns the segment and the room; `None` if the chain needs another segment.
    fn make_tail(&mut self, shared: &Shared, before: Place, blocks: usize) -> Option<(u32, usize)> {
        let segment = shared.segments.get(before.segment, &self.key)?;
        let len = before.position as usize + 1;
        // It may have been cut to before that when room was made.
        if len == SEGMENT_BLOCKS || segment.len() < len {
            return None;
        }
        let blocks = blocks.min(SEGMENT_BLOCKS - len);
        let is_tail = segment.len() == len;
        if is_tail && segment.capacity() >= len + blocks {
            return Some((before.segment, blocks));
        }
        if !is_tail && segment.held(&self.key) >> len != 0 {
            return None;
        }
        self.forget(shared, before.segment, len);
        let segment = shared.segments.get(before.segment, &self.key)?;
        // Decoding adds a block at a time: doubling makes that cheap.
        let capacity = (len + blocks).max((2 * len).min(SEGMENT_BLOCKS)).next_multiple_of(2);
        let copy = segment.copy(capacity, len, &mut self.heap, &self.key);
        shared.segments.replace(before.segment, copy, &mut self.heap);
        Some((before.segment, blocks))
    }

    fn add_segment(
        &mut self,
        shared: &Shared,
        holder: Holder,
        before: Option<Place>,
        after: Option<BlockHash>,
        blocks: usize,
    ) -> Option<(u32, usize)> {
        let blocks = blocks.min(SEGMENT_BLOCKS);
        let parent = before.map(|place| place.segment);
        let block = Segment::alloc(blocks.max(4).next_multiple_of(2), holder, parent, after, &mut self.heap);
        let number = shared.segments.add(block, &mut self.segments, &mut self.heap)?;
        if let Some(parent) = parent.and_then(|parent| shared.segments.get(parent, &self.key)) {
            parent.add_child();
        }
        Some((number, blocks))
    }

    /// Retires everything: the index goes.
    pub(crate) fn clear(&mut self, shared: &Shared) {
        for number in 0..self.segments.numbers() {
            shared.segments.remove(number, &mut self.segments, &mut self.heap, &self.key);
        }
        self.ranks.clear_slots(&shared.slots, &mut self.heap, &self.key);
        shared.heads.clear(&mut self.heads, &mut self.heap, &self.key);
    }
}
