//! Readers and writers of a whole index.

use std::{num::NonZeroU32, sync::Arc};

use forebay_types::{BlockHash, Incarnation, KvEvent, KvEventBatch, KvGroup, RankId, Tier};
use shuttle::{
    rand::{Rng, rngs::ThreadRng},
    thread,
};

use super::{check, history::History};
use crate::{Applied, IndexLimits, KvIndex, Overlaps};

#[derive(Debug)]
struct World {
    index: KvIndex,
    history: History,
}

/// One rank's events, in the order of their numbers.
struct Feed {
    world: Arc<World>,
    rank: RankId,
    sequence: u64,
}

fn rank(number: u64) -> RankId {
    RankId { incarnation: Incarnation(number), dp_rank: 0 }
}

fn blocks(hashes: &[u64]) -> Vec<BlockHash> {
    hashes.iter().copied().map(BlockHash).collect()
}

impl World {
    fn new() -> Arc<Self> {
        let index = KvIndex::new(IndexLimits { ranks_max: 16, ..IndexLimits::default() });
        Arc::new(Self { index, history: History::default() })
    }

    fn feed(self: &Arc<Self>, number: u64) -> Feed {
        Feed { world: Arc::clone(self), rank: rank(number), sequence: 0 }
    }

    /// Looks `chains` up, one after the other, with one answer that is used again.
    fn look(&self, chains: &[&[u64]]) {
        let mut out = Overlaps::default();
        for chain in chains {
            let chain = blocks(chain);
            let from = self.history.now();
            self.index.overlaps(&chain, &mut out);
            let to = self.history.now();
            self.history.check(&chain, out.as_slice(), from, to);
        }
    }

    fn reader(self: &Arc<Self>, chains: &'static [&'static [u64]]) -> thread::JoinHandle<()> {
        let world = Arc::clone(self);
        thread::spawn(move || world.look(chains))
    }

    fn tidy(&self) {
        while self.index.tidy() {}
    }

    /// With nobody else: answers are exact, and nothing is left when all ranks have gone.
    fn end(&self, chains: &[&[u64]]) {
        self.look(chains);
        for number in 0..16 {
            self.index.remove_rank(rank(number));
        }
        self.tidy();
        let stats = self.index.stats();
        assert_eq!((stats.blocks, stats.entries, stats.segments, stats.ranks), (0, 0, 0, 0), "{stats:?}");
    }
}

impl Feed {
    fn apply(&mut self, event: KvEvent) {
        let batch = KvEventBatch { rank: self.rank, sequence: self.sequence, events: vec![event] };
        self.sequence += 1;
        assert_eq!(self.world.index.apply(&batch), Applied::Ok);
    }

    fn store(&mut self, parent: Option<u64>, hashes: &[u64]) {
        let world = Arc::clone(&self.world);
        let stored = KvEvent::Stored {
            parent: parent.map(BlockHash),
            hashes: blocks(hashes),
            tier: Tier::Device,
            group: 0,
        };
        world.history.storing(self.rank, hashes, || self.apply(stored));
    }

    fn remove(&mut self, hashes: &[u64]) {
        let world = Arc::clone(&self.world);
        let removed = KvEvent::Removed { hashes: blocks(hashes), tier: Tier::Device, group: 0 };
        world.history.removing(self.rank, hashes, || self.apply(removed));
    }

    fn clear(&mut self) {
        let world = Arc::clone(&self.world);
        world.history.removing(self.rank, &world.history.held(self.rank), || self.apply(KvEvent::Cleared));
    }

    fn reset(&mut self, hashes: &[u64]) {
        let world = Arc::clone(&self.world);
        let reset = |hashes: &[u64], sequence| {
            let contents = hashes.iter().map(|&hash| KvEvent::Stored {
                parent: None,
                hashes: blocks(&[hash]),
                tier: Tier::Device,
                group: 0,
            });
            assert_eq!(world.index.reset(self.rank, sequence, contents), Applied::Ok);
        };
        world.history.removing(self.rank, &world.history.held(self.rank), || reset(&[], self.sequence));
        world.history.storing(self.rank, hashes, || reset(hashes, self.sequence));
    }

    fn leave(&mut self) {
        let world = Arc::clone(&self.world);
        world.history.removing(self.rank, &world.history.held(self.rank), || {
            world.index.remove_rank(self.rank);
        });
        self.sequence = 0;
    }
}

/// The same position of the same segment means one block, and then another of another rank.
#[test]
fn a_tail_is_cut_and_another_grows_in_its_place() {
    const CHAINS: &[&[u64]] = &[&[1, 2, 3, 4], &[1, 2, 5, 6], &[1, 2, 3, 4]];
    check(4000, || {
        let world = World::new();
        let (mut a, mut b) = (world.feed(1), world.feed(2));
        a.store(None, &[1, 2, 3, 4]);
        b.store(None, &[1, 2]);
        let readers = [world.reader(CHAINS), world.reader(CHAINS)];
        a.remove(&[4, 3]);
        b.store(Some(2), &[5, 6]);
        b.remove(&[6, 5]);
        a.store(Some(2), &[3]);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        world.end(CHAINS);
    });
}

/// The same, where removal itself moves the front to less memory.
#[test]
fn a_long_tail_is_cut_and_another_grows_in_its_place() {
    const OLD: [u64; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
    const NEW: [u64; 16] = [1, 2, 3, 4, 5, 6, 7, 28, 29, 30, 31, 32, 33, 34, 35, 36];
    const CHAINS: &[&[u64]] = &[&OLD, &NEW];
    check(1500, || {
        let world = World::new();
        let (mut a, mut b) = (world.feed(1), world.feed(2));
        a.store(None, &OLD);
        b.store(None, &OLD[..7]);
        let readers = [world.reader(CHAINS), world.reader(CHAINS)];
        a.remove(&OLD[7..]);
        b.store(Some(7), &NEW[7..]);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        world.end(CHAINS);
    });
}

/// A number of a segment means one chain, and then another.
#[test]
fn a_segments_number_is_used_again() {
    const CHAINS: &[&[u64]] = &[&[1, 2], &[11, 12], &[1, 2], &[21]];
    check(4000, || {
        let world = World::new();
        let (mut a, mut b) = (world.feed(1), world.feed(2));
        a.store(None, &[1, 2]);
        let readers = [world.reader(CHAINS), world.reader(CHAINS)];
        a.remove(&[2, 1]);
        b.store(None, &[11, 12]);
        b.remove(&[11, 12]);
        a.store(None, &[21, 22]);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        world.end(CHAINS);
    });
}

/// A slot means one rank, and then another, which holds other blocks.
#[test]
fn a_slot_is_used_again() {
    const CHAINS: &[&[u64]] = &[&[1, 2, 3], &[1, 2, 3], &[1]];
    check(4000, || {
        let world = World::new();
        let (mut a, mut b) = (world.feed(1), world.feed(2));
        a.store(None, &[1, 2, 3]);
        b.store(None, &[1, 2]);
        let readers = [world.reader(CHAINS), world.reader(CHAINS)];
        a.leave();
        for _ in 0..4 {
            world.index.tidy();
        }
        let mut c = world.feed(3);
        c.store(None, &[1]);
        b.clear();
        world.index.tidy();
        world.feed(4).store(None, &[1, 2]);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        world.end(CHAINS);
    });
}

/// A rank that is cleared goes on under another slot, which the segment may name already, from its owner before.
#[test]
fn a_rank_that_changes_its_slot_is_listed_once() {
    const CHAINS: &[&[u64]] = &[&[1, 2], &[1, 2]];
    check(2000, || {
        let world = World::new();
        let (mut a, mut b) = (world.feed(1), world.feed(2));
        a.store(None, &[1, 2]);
        b.store(None, &[1, 2]);
        world.feed(3).store(None, &[1, 2]);
        b.leave();
        world.tidy();
        let readers = [world.reader(CHAINS), world.reader(CHAINS)];
        a.clear();
        a.store(None, &[1]);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        world.end(CHAINS);
    });
}

/// More ranks come to hold a block than its list has places for, while others let go.
#[test]
fn a_list_of_holders_grows_under_its_readers() {
    const CHAINS: &[&[u64]] = &[&[1, 2], &[1, 2]];
    check(2000, || {
        let world = World::new();
        let mut feeds: Vec<Feed> = (1..8).map(|number| world.feed(number)).collect();
        feeds[..4].iter_mut().for_each(|feed| feed.store(None, &[1, 2]));
        let readers = [world.reader(CHAINS), world.reader(CHAINS)];
        feeds[1].remove(&[2]);
        feeds[2].remove(&[1, 2]);
        feeds[4..].iter_mut().for_each(|feed| feed.store(None, &[1, 2]));
        feeds[2].store(None, &[1]);
        feeds[0].leave();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        world.end(CHAINS);
    });
}

/// Blocks come one by one, as in decoding: the segment moves to more room under its readers.
#[test]
fn a_segment_grows_under_its_readers() {
    const CHAINS: &[&[u64]] = &[&[1, 2, 3, 4, 5, 6, 7, 8], &[1, 2, 3, 4, 5, 6, 7, 8]];
    check(2000, || {
        let world = World::new();
        let (mut a, mut b) = (world.feed(1), world.feed(2));
        a.store(None, &[1, 2, 3]);
        b.store(None, &[1, 2, 3]);
        let readers = [world.reader(CHAINS), world.reader(CHAINS)];
        for block in 4..9 {
            a.store(Some(block - 1), &[block]);
            if block == 5 {
                b.store(None, &[1, 2, 3, 4, 5]);
            }
        }
        b.remove(&[5, 4]);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        world.end(CHAINS);
    });
}

/// A rank says of what groups its layers are, says so again, and loses its slot in between.
#[test]
fn groups_change_under_readers() {
    check(2000, || {
        let world = World::new();
        let mut feed = world.feed(1);
        let last_block = |group| KvEvent::Stored {
            parent: Some(BlockHash(3)),
            hashes: blocks(&[4]),
            tier: Tier::Device,
            group,
        };
        let last = |blocks| KvGroup { window_blocks: NonZeroU32::new(blocks), ..KvGroup::FULL };
        feed.store(None, &[1, 2, 3]);
        let readers = [(); 2].map(|()| {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut out = Overlaps::default();
                let mut before = 3;
                for _ in 0..4 {
                    world.index.overlaps(&blocks(&[1, 2, 3, 4]), &mut out);
                    let now = out.as_slice().first().map_or(0, |&(_, blocks)| blocks);
                    // Alone; with a group that holds nothing, or the end; emptied; by the last block alone.
                    let steps: &[u32] = match before {
                        3 => &[3, 0, 4],
                        0 => &[0, 4],
                        _ => &[4],
                    };
                    assert!(steps.contains(&now), "{now} after {before}");
                    before = now;
                }
            })
        });
        feed.apply(KvEvent::Groups(vec![KvGroup::FULL, last(2)]));
        feed.apply(last_block(1));
        feed.apply(KvEvent::Cleared);
        feed.apply(KvEvent::Groups(vec![last(1)]));
        feed.apply(last_block(0));
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        let mut out = Overlaps::default();
        world.index.overlaps(&blocks(&[1, 2, 3, 4]), &mut out);
        assert_eq!(out.get(feed.rank), 4);
    });
}

const PATHS: &[&[u64]] =
    &[&[1, 2, 3, 4, 5, 6], &[1, 2, 3, 14, 15], &[1, 22], &[31, 32, 33, 34, 35, 36, 37, 38]];

fn change(feed: &mut Feed, random: &mut impl Rng) {
    let path = PATHS[random.gen_range(0..PATHS.len())];
    let at = random.gen_range(0..path.len());
    match random.gen_range(0..12) {
        0..4 => feed.store(None, &path[..=at]),
        4..6 => feed.store(at.checked_sub(1).map(|before| path[before]), &path[at..]),
        6..8 => feed.remove(&path[at..].iter().rev().copied().collect::<Vec<_>>()),
        8 => feed.remove(&path[..=at]),
        9 => feed.clear(),
        10 => feed.leave(),
        _ => feed.reset(&path[..=at].iter().rev().copied().collect::<Vec<_>>()),
    }
    if random.gen_range(0..3) == 0 {
        feed.world.index.tidy();
    }
}

/// Two threads of changes, of three ranks each, and two of look-ups, all chosen at random.
#[test]
fn whatever_changes_no_claim_is_wrong() {
    check(4000, || {
        let world = World::new();
        let mut random = ThreadRng::default();
        for number in [1, 4, 7, 8] {
            world.feed(number).store(None, PATHS[random.gen_range(0..PATHS.len())]);
        }
        let writers = [2, 5].map(|first| {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut random = ThreadRng::default();
                let mut feeds = [world.feed(first), world.feed(first + 1)];
                for _ in 0..6 {
                    change(&mut feeds[random.gen_range(0..2)], &mut random);
                }
            })
        });
        let readers = [world.reader(PATHS), world.reader(PATHS)];
        writers.into_iter().chain(readers).for_each(|thread| thread.join().unwrap());
        world.end(PATHS);
    });
}
