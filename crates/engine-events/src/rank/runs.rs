//! Our blocks in chains, and the engine hash that stands for each: 16 bytes a block, and some 8 to find it by.
//!
//! A *run* has up to 64 blocks that follow each other, each with the engine hash that completes it alone, and masks of
//! positions: what holds which of them. A chain that leaves a run on the way begins one of its own. Start at
//! [`Runs::place`] and [`Runs::find`].
//!
//! Invariants: a block of ours has one place. For a chain leads to it in one way alone: it follows its predecessor within
//! the run, or its run is found by its first block; and a place is kept while it, or anything after it, is held or
//! [pinned](Runs::pin). So whoever knows where a block's predecessor is need not look for the block itself in a table.

use std::hash::BuildHasher;

use forebay_types::BlockHash;
use smallvec::SmallVec;

use super::{
    held::{At, Keyed},
    places::{Contents, Places},
};
use crate::event::EngineHash;

/// Positions in a mask. Few in tests, so that chains go on from run to run.
const RUN_BLOCKS: usize = if cfg!(test) { 3 } else { 64 };
/// Runs are kept by so many, so that no list of all of them is moved when it grows.
const SHELF_RUNS: usize = 1024;

/// Where a block is: the run's number above, the position below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place(u32);

impl Place {
    /// Of a run that begins a prompt: what its first block follows; and of the last of the runs that are free.
    const NONE: Self = Self(u32::MAX);

    fn new(run: u32, position: usize) -> Self {
        Self(run << 6 | position as u32)
    }

    fn run(self) -> u32 {
        self.0 >> 6
    }

    fn position(self) -> usize {
        (self.0 & 63) as usize
    }

    fn is_some(self) -> bool {
        self != Self::NONE
    }
}

/// The most blocks that may be kept, held or not: then every run has a number even if each is alone in its own.
pub(super) const BLOCKS_MAX: usize = (1 << 26) - 1;

/// One block, and an engine's hash for it.
#[derive(Debug, Clone, Copy)]
struct Block {
    own: BlockHash,
    /// Of a meaning while some mask of [`Holder::Named`] has the block.
    engine: EngineHash,
}

/// What holds blocks in a tier, for a group of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Holder {
    /// The engine's block whose hash stands beside ours.
    Named(At),
    /// Engine blocks of other shapes, or under other hashes.
    Others(At),
}

impl Holder {
    pub(super) fn at(self) -> At {
        let (Self::Named(at) | Self::Others(at)) = self;
        at
    }

    pub(super) fn is_named(self) -> bool {
        matches!(self, Self::Named(_))
    }
}

#[derive(Debug, Clone, Copy)]
struct Mask {
    holder: Holder,
    positions: u64,
}

#[derive(Debug)]
struct Run {
    blocks: Vec<Block>,
    /// What the first one follows.
    before: Place,
    /// Runs that go on from this one, and pins.
    kept: u32,
    /// Those that are not empty.
    masks: SmallVec<[Mask; 1]>,
}

impl Run {
    /// The positions that some holder of those has.
    fn any(&self, of: impl Fn(Holder) -> bool) -> u64 {
        self.masks.iter().filter(|mask| of(mask.holder)).fold(0, |any, mask| any | mask.positions)
    }
}

/// All of one rank.
#[derive(Debug)]
pub(super) struct Runs {
    shelves: Vec<Vec<Run>>,
    /// The first of the runs that are free; each leads to the next by what it follows.
    free: Place,
    /// By the engine's hash: those that are named.
    named: Places,
    /// By our hash: first blocks of runs.
    heads: Places,
    /// Blocks in runs, held or not.
    len: usize,
    keyed: Keyed,
}

impl Runs {
    pub(super) fn new(keyed: Keyed) -> Self {
        let (named, heads) = (Places::default(), Places::default());
        Self { shelves: vec![], free: Place::NONE, named, heads, len: 0, keyed }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new(self.keyed.clone());
    }

    /// Blocks that are kept, held or not.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn run(&self, number: u32) -> &Run {
        &self.shelves[number as usize / SHELF_RUNS][number as usize % SHELF_RUNS]
    }

    fn run_mut(&mut self, number: u32) -> &mut Run {
        &mut self.shelves[number as usize / SHELF_RUNS][number as usize % SHELF_RUNS]
    }

    fn block(&self, place: Place) -> &Block {
        block_at(&self.shelves, place)
    }

    pub(super) fn own(&self, place: Place) -> BlockHash {
        self.block(place).own
    }

    /// The place of the block that the one at `place` follows.
    pub(super) fn before(&self, place: Place) -> Option<Place> {
        match place.position() {
            0 => Some(self.run(place.run()).before).filter(|before| before.is_some()),
            position => Some(Place::new(place.run(), position - 1)),
        }
    }

    /// The block that `hash` names.
    pub(super) fn find(&self, hash: EngineHash) -> Option<Place> {
        // Engines whose blocks have another size than ours fill only the groups' maps.
        if self.named.is_empty() {
            return None;
        }
        let found = self.named.find(self.keyed.hash_one(hash), |word| self.block(Place(word)).engine == hash);
        found.map(Place)
    }

    /// The hash that names the block at `place`.
    pub(super) fn name(&self, place: Place) -> Option<EngineHash> {
        let named = self.run(place.run()).any(Holder::is_named);
        (named >> place.position() & 1 == 1).then(|| self.block(place).engine)
    }

    /// The place of `own` after `before`, made if there is none. A new one is kept only while it is held or pinned.
    /// `expected` more may follow: room for them is made at once.
    pub(super) fn place(&mut self, before: Option<Place>, own: BlockHash, expected: usize) -> Place {
        if let Some(before) = before {
            let next = before.position() + 1;
            let run = self.run_mut(before.run());
            match run.blocks.get(next) {
                Some(block) if block.own == own => return Place::new(before.run(), next),
                None if next < RUN_BLOCKS => {
                    // A few more than needed: with decode blocks come one by one.
                    if next == run.blocks.capacity() {
                        run.blocks.reserve_exact((1 + expected).max(next / 8).min(RUN_BLOCKS - next));
                    }
                    let head = self.head(own);
                    if head.is_none() {
                        let run = self.run_mut(before.run());
                        run.blocks.push(Block { own, engine: EngineHash(0) });
                        self.len += 1;
                        return Place::new(before.run(), next);
                    }
                }
                _ => {}
            }
        }
        self.head(own).unwrap_or_else(|| self.begin(before, own, expected))
    }

    fn head(&self, own: BlockHash) -> Option<Place> {
        self.heads.find(own.0, |word| self.block(Place(word)).own == own).map(Place)
    }

    fn begin(&mut self, before: Option<Place>, own: BlockHash, expected: usize) -> Place {
        let mut blocks = Vec::with_capacity((1 + expected).min(RUN_BLOCKS));
        blocks.push(Block { own, engine: EngineHash(0) });
        let run = Run { blocks, before: before.unwrap_or(Place::NONE), kept: 0, masks: SmallVec::new() };
        if let Some(before) = before {
            self.run_mut(before.run()).kept += 1;
        }
        let number = if self.free.is_some() {
            let number = self.free.run();
            self.free = self.run(number).before;
            *self.run_mut(number) = run;
            number
        } else {
            if self.shelves.last().is_none_or(|shelf| shelf.len() == SHELF_RUNS) {
                self.shelves.push(Vec::new());
            }
            let shelves = self.shelves.len() - 1;
            let shelf = &mut self.shelves[shelves];
            shelf.push(run);
            (shelves * SHELF_RUNS + shelf.len() - 1) as u32
        };
        self.len += 1;
        let place = Place::new(number, 0);
        let Self { heads, shelves, .. } = self;
        heads.insert(own.0, place.0, &Heads { shelves });
        place
    }

    /// Lets `hash` name the block at `place`, which has no name yet, and which is held under it from now on.
    pub(super) fn set_name(&mut self, place: Place, hash: EngineHash) {
        self.run_mut(place.run()).blocks[place.position()].engine = hash;
        let Self { named, shelves, keyed, .. } = self;
        named.insert(keyed.hash_one(hash), place.0, &Names { shelves, keyed });
    }

    /// Whether any holder of those has the block at `place`.
    pub(super) fn is_held(&self, place: Place, of: impl Fn(Holder) -> bool) -> bool {
        self.run(place.run()).any(of) >> place.position() & 1 == 1
    }

    /// Says that `holder` has the block at `place`.
    pub(super) fn set(&mut self, place: Place, holder: Holder) {
        let bit = 1 << place.position();
        let masks = &mut self.run_mut(place.run()).masks;
        match masks.iter_mut().find(|mask| mask.holder == holder) {
            Some(mask) => mask.positions |= bit,
            None => masks.push(Mask { holder, positions: bit }),
        }
    }

    /// Says that `holder` has it no more.
    pub(super) fn unset(&mut self, place: Place, holder: Holder) {
        let masks = &mut self.run_mut(place.run()).masks;
        if let Some(at) = masks.iter().position(|mask| mask.holder == holder) {
            masks[at].positions &= !(1 << place.position());
            if masks[at].positions == 0 {
                masks.swap_remove(at);
            }
        }
        if holder.is_named() && self.name(place).is_none() {
            let Self { named, shelves, keyed, .. } = self;
            let names = Names { shelves, keyed };
            named.remove(names.hash(names.key(place.0)), place.0, &names);
        }
        self.prune(place.run());
    }

    /// Keeps `place` until it is unpinned as often.
    pub(super) fn pin(&mut self, place: Place) {
        self.run_mut(place.run()).kept += 1;
    }

    pub(super) fn unpin(&mut self, place: Place) {
        self.run_mut(place.run()).kept -= 1;
        self.prune(place.run());
    }

    /// Gives up the end of a run that nothing needs; all of it, and what that kept, if nothing needs any of it.
    fn prune(&mut self, mut number: u32) {
        loop {
            let run = self.run_mut(number);
            if run.kept > 0 {
                return;
            }
            let len = (u64::BITS - run.any(|_| true).leading_zeros()) as usize;
            let gone = run.blocks.len() - len;
            if len > 0 {
                run.blocks.truncate(len);
                // Late, so that a move is paid by the removals since the last one.
                if run.blocks.capacity() >= 16 && len * 2 <= run.blocks.capacity() {
                    run.blocks.shrink_to(len);
                }
                self.len -= gone;
                return;
            }
            let own = run.blocks[0].own;
            let Self { heads, shelves, .. } = self;
            heads.remove(own.0, Place::new(number, 0).0, &Heads { shelves });
            let free = self.free;
            let run = self.run_mut(number);
            let before = std::mem::replace(&mut run.before, free);
            (run.blocks, run.masks) = (Vec::new(), SmallVec::new());
            self.free = Place::new(number, 0);
            self.len -= gone;
            if !before.is_some() {
                return;
            }
            self.run_mut(before.run()).kept -= 1;
            number = before.run();
        }
    }

    /// Every block that some holder of those has, with the one that it follows.
    pub(super) fn held_by(
        &self,
        of: impl Fn(Holder) -> bool,
    ) -> impl Iterator<Item = (BlockHash, Option<BlockHash>)> {
        self.shelves.iter().flatten().flat_map(move |run| {
            let held = run.any(&of);
            let blocks = run.blocks.iter().enumerate().filter(move |(position, _)| held >> position & 1 == 1);
            blocks.map(move |(position, block)| match position {
                0 => (block.own, run.before.is_some().then(|| self.own(run.before))),
                _ => (block.own, Some(run.blocks[position - 1].own)),
            })
        })
    }

    /// Blocks of each holder of those, added up.
    pub(super) fn count(&self, of: impl Fn(Holder) -> bool) -> u64 {
        let masks = self.shelves.iter().flatten().flat_map(|run| &run.masks);
        masks.filter(|mask| of(mask.holder)).map(|mask| u64::from(mask.positions.count_ones())).sum()
    }
}

/// What the table of names leads to: engines' hashes.
struct Names<'a> {
    shelves: &'a [Vec<Run>],
    keyed: &'a Keyed,
}

impl Contents for Names<'_> {
    fn key(&self, place: u32) -> u64 {
        block_at(self.shelves, Place(place)).engine.0
    }

    fn hash(&self, key: u64) -> u64 {
        self.keyed.hash_one(EngineHash(key))
    }
}

/// What the table of runs leads to: our hashes, which are keyed already.
struct Heads<'a> {
    shelves: &'a [Vec<Run>],
}

impl Contents for Heads<'_> {
    fn key(&self, place: u32) -> u64 {
        block_at(self.shelves, Place(place)).own.0
    }

    fn hash(&self, key: u64) -> u64 {
        key
    }
}

fn block_at(shelves: &[Vec<Run>], place: Place) -> &Block {
    let run = place.run() as usize;
    &shelves[run / SHELF_RUNS][run % SHELF_RUNS].blocks[place.position()]
}
