use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::reclaim::{Epochs, tests::live_bytes};

fn holder(slot: u16, plane: u8) -> Holder {
    Holder { slot, plane: Plane(plane) }
}

/// A segment beside what it should say.
struct Tested {
    heap: Heap,
    key: WriterKey,
    link: AtomicU64,
    hashes: Vec<u64>,
    masks: BTreeMap<(u16, u8), u64>,
}

const AFTER_IT: BlockHash = BlockHash(u64::MAX);

impl Tested {
    fn new(capacity: usize, first: Holder, parent: Option<u32>) -> Self {
        let mut heap = Heap::default();
        let block = Segment::alloc(capacity, first, parent, Some(AFTER_IT), &mut heap);
        let link = AtomicU64::new(0);
        heap.relink(&link, Some(block));
        Self { heap, key: WriterKey::new(), link, hashes: vec![], masks: BTreeMap::new() }
    }

    fn segment(&self) -> Segment<'_> {
        Segment::new(follow(&self.link, &self.key).expect("linked"))
    }

    fn append(&mut self, hashes: &[u64]) {
        self.segment().append(hashes.iter().copied());
        self.hashes.extend(hashes);
    }

    fn hold(&mut self, holder: Holder, held: u64) {
        let segment = Segment::new(follow(&self.link, &self.key).expect("linked"));
        let mask = segment.mask_or_new(holder, &mut self.heap, &self.key);
        set(mask, held);
        *self.masks.entry((holder.slot, holder.plane.0)).or_default() |= held;
    }

    fn release(&mut self, holder: Holder, released: u64) {
        if let Some(mask) = self.segment().mask(holder, &self.key) {
            clear(mask, released);
        }
        *self.masks.entry((holder.slot, holder.plane.0)).or_default() &= !released;
    }

    fn copy(&mut self, capacity: usize, len: usize) {
        let copy = {
            let segment = Segment::new(follow(&self.link, &self.key).expect("linked"));
            segment.copy(capacity, len, &mut self.heap, &self.key)
        };
        self.heap.relink(&self.link, Some(copy));
        self.hashes.truncate(len);
        self.masks.values_mut().for_each(|mask| *mask &= bits(0, len));
    }

    fn check(&self) {
        let segment = self.segment();
        assert_eq!(segment.len(), self.hashes.len());
        assert!(segment.hashes().iter().map(|hash| hash.load(Relaxed)).eq(self.hashes.iter().copied()));
        assert_eq!(segment.hash(self.hashes.len() as u32), None);
        let mut held = BTreeMap::new();
        for (holder, mask) in segment.holders(&self.key).filter(|(_, mask)| mask.load(Relaxed) != 0) {
            let twice = held.insert((holder.slot, holder.plane.0), mask.load(Relaxed));
            assert_eq!(twice, None, "a holder stands once");
        }
        let expected: BTreeMap<_, _> =
            self.masks.clone().into_iter().filter(|(_, mask)| *mask != 0).collect();
        assert_eq!(held, expected);
        assert_eq!(segment.held(&self.key), expected.values().fold(0, |held, mask| held | mask));
    }
}

impl Drop for Tested {
    fn drop(&mut self) {
        let segment = Segment::new(follow(&self.link, &self.key).expect("linked"));
        segment.retire_more(&mut self.heap);
        self.heap.relink(&self.link, None);
        self.heap.collect(&Epochs::default(), &mut self.key, |_| unreachable!());
        if !std::thread::panicking() {
            assert_eq!((live_bytes(&self.heap), self.heap.retired_bytes()), (0, 0), "each is retired once");
        }
    }
}

#[derive(Debug, Clone)]
enum Op {
    Append(usize),
    Hold(u16, u8, u64),
    Release(u16, u8, u64),
    Trim(usize),
    Grow(usize),
}

fn ops() -> impl Strategy<Value = Op> {
    let mask = || prop_oneof![any::<u64>(), Just(u64::MAX), (0u32..64).prop_map(|bit| 1 << bit)];
    prop_oneof![
        3 => (0usize..20).prop_map(Op::Append),
        6 => (0u16..12, 0u8..2, mask()).prop_map(|(slot, plane, mask)| Op::Hold(slot, plane, mask)),
        4 => (0u16..12, 0u8..2, mask()).prop_map(|(slot, plane, mask)| Op::Release(slot, plane, mask)),
        1 => (0usize..64).prop_map(Op::Trim),
        1 => (0usize..64).prop_map(Op::Grow),
    ]
}

proptest! {
    #[test]
    fn a_segment_says_who_holds_what(trace in prop::collection::vec(ops(), 0..100)) {
        let mut tested = Tested::new(4, holder(3, 0), Some(9));
        let mut next = 0;
        for op in trace {
            let len = tested.hashes.len();
            match op {
                Op::Append(more) => {
                    let more = more.min(tested.segment().capacity() - len);
                    tested.append(&(next..next + more as u64).collect::<Vec<_>>());
                    next += more as u64;
                }
                Op::Hold(slot, plane, mask) => tested.hold(holder(slot, plane), mask & bits(0, len)),
                Op::Release(slot, plane, mask) => tested.release(holder(slot, plane), mask),
                Op::Trim(to) => tested.copy(to.min(len).max(4).next_multiple_of(2), to.min(len)),
                Op::Grow(by) => tested.copy((len + by).clamp(4, SEGMENT_BLOCKS).next_multiple_of(2), len),
            }
            tested.check();
            prop_assert_eq!(tested.segment().parent(), Some(9));
        }
    }
}

#[test]
fn very_many_holders_have_a_place_each() {
    let mut tested = Tested::new(64, holder(0, 0), None);
    tested.append(&(100..164).collect::<Vec<_>>());
    for slot in 0..3000u16 {
        tested.hold(holder(slot, (slot % 4) as u8), 1 << (slot % 64));
    }
    tested.check();
    for slot in (0..3000u16).filter(|slot| slot % 3 != 0) {
        tested.release(holder(slot, (slot % 4) as u8), u64::MAX);
    }
    // Those that hold nothing leave once the list moves; those that do stay.
    for slot in 3000..5000u16 {
        tested.hold(holder(slot, 0), 2);
    }
    tested.check();
    assert!(tested.segment().holders(&tested.key).count() < 5000, "places are used again");
}

#[test]
fn a_holder_that_held_nothing_comes_back() {
    let mut tested = Tested::new(4, holder(0, 0), None);
    tested.append(&[7, 8]);
    tested.hold(holder(1, 0), 3);
    tested.hold(holder(2, 0), 3);
    tested.release(holder(1, 0), 3);
    tested.hold(holder(1, 0), 1);
    tested.check();
    // Also after its place was given away.
    tested.release(holder(1, 0), 3);
    (3..20).for_each(|slot| tested.hold(holder(slot, 0), 2));
    assert!(tested.segment().mask(holder(1, 0), &tested.key).is_none());
    tested.hold(holder(1, 0), 2);
    // And the first one, whose place is always there.
    tested.hold(holder(0, 0), 1);
    tested.release(holder(0, 0), 1);
    tested.hold(holder(0, 0), 3);
    tested.check();
}

#[test]
fn one_rank_holds_on_each_plane_by_itself() {
    let mut tested = Tested::new(4, holder(5, 0), None);
    tested.append(&[1, 2, 3, 4]);
    for plane in 0..4 {
        tested.hold(holder(5, plane), 1 << plane);
    }
    tested.check();
    let word = holder(u16::MAX, 3).to_word();
    assert_eq!(Holder::from_word(word), holder(u16::MAX, 3));
}

#[test]
fn a_copy_that_cuts_leaves_what_readers_of_the_old_one_see() {
    let mut tested = Tested::new(4, holder(0, 0), None);
    tested.append(&[1, 2, 3, 4]);
    (0..4).for_each(|slot| tested.hold(holder(slot, 0), 0xf));
    let old_link = AtomicU64::new(tested.link.load(SeqCst));
    tested.copy(8, 2);
    tested.append(&[30, 40]);
    (4..9).for_each(|slot| tested.hold(holder(slot, 0), 0xc));
    // Nothing was collected: a reader of the old one still finds the old hashes, and under them nobody new.
    let old = Segment::new(follow(&old_link, &tested.key).expect("not freed"));
    assert_eq!((old.len(), old.hash(2), old.hash(3)), (4, Some(3), Some(4)));
    for (holder, mask) in old.holders(&tested.key) {
        assert!(holder.slot < 4 && mask.load(Relaxed) == 0xf, "{holder:?}");
    }
    tested.check();
}

#[test]
fn a_copy_of_the_whole_shares_what_its_holders_do() {
    let mut tested = Tested::new(4, holder(0, 0), None);
    tested.append(&[1, 2, 3, 4]);
    (0..3).for_each(|slot| tested.hold(holder(slot, 0), 0xf));
    let old_link = AtomicU64::new(tested.link.load(SeqCst));
    tested.copy(8, 4);
    tested.release(holder(2, 0), 0b1000);
    let old = Segment::new(follow(&old_link, &tested.key).expect("not freed"));
    let mask = old.mask(holder(2, 0), &tested.key).expect("a holder");
    assert_eq!(mask.load(Relaxed), 0b0111, "readers of the old one see what goes");
    tested.check();
}

#[test]
fn a_header_keeps_its_parts_apart() {
    for parent in [None, Some(0), Some(SEGMENTS_MAX - 1)] {
        let mut tested = Tested::new(4, holder(u16::MAX, 1), parent);
        tested.append(&[1, 2, 3]);
        tested.segment().touch(77);
        (0..1000).for_each(|_| tested.segment().add_child());
        tested.copy(64, 3);
        let segment = tested.segment();
        assert_eq!((segment.parent(), segment.after(), segment.len()), (parent, Some(AFTER_IT), 3));
        assert_eq!((segment.stamp(), segment.children(), segment.capacity()), (77, 1000, 64));
        (0..1000).for_each(|_| segment.remove_child());
        assert!(!segment.has_children());
        segment.remove_child();
        assert_eq!((segment.children(), segment.len(), segment.parent()), (0, 3, parent), "never below none");
    }
}

#[test]
fn children_beyond_counting_are_there_for_ever() {
    let tested = Tested::new(4, holder(0, 0), Some(5));
    let segment = tested.segment();
    segment.0[META].fetch_or((CHILDREN_MAX - 1) << 7, Relaxed);
    segment.add_child();
    segment.add_child();
    assert_eq!((segment.children(), segment.parent()), (CHILDREN_MAX, Some(5)));
    (0..3).for_each(|_| segment.remove_child());
    assert!(segment.has_children());
}

#[test]
fn runs_are_compared_both_ways() {
    let mut tested = Tested::new(6, holder(0, 0), None);
    tested.append(&[1, 2, 3, 4]);
    let segment = tested.segment();
    //                from      chain              common, down
    for (position, chain, common, down) in [
        (0usize, &[1u64, 2, 3, 4, 5][..], 4, 1),
        (1, &[2, 3, 9], 2, 1),
        (3, &[4, 3, 2, 1, 0], 1, 4),
        (2, &[9], 0, 0),
        (4, &[5], 0, 0),
        (0, &[], 0, 0),
    ] {
        assert_eq!(segment.common(position, chain.iter().copied()), common, "{chain:?}");
        assert_eq!(segment.common_down(position, chain.iter().copied()), down, "{chain:?} down");
    }
}

#[test]
fn bits_reach_to_the_end() {
    assert_eq!((bits(0, 0), bits(0, 1), bits(0, 64)), (0, 1, u64::MAX));
    assert_eq!((bits(63, 1), bits(3, 2), bits(63, 64)), (1 << 63, 0b11000, 1 << 63));
}

#[test]
fn a_place_is_a_word() {
    for place in [
        Place { segment: 0, position: 0 },
        Place { segment: SEGMENTS_MAX - 1, position: 63 },
        Place { segment: 12345, position: 17 },
    ] {
        assert_eq!(Place::from_word(place.to_word()), place);
    }
}
