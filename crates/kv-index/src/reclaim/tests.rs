use proptest::prelude::*;

use super::*;

/// Bytes of blocks that are not retired.
pub(crate) fn live_bytes(heap: &Heap) -> usize {
    heap.bytes - heap.retired_bytes
}

struct Tested {
    epochs: Epochs,
    heap: Heap,
    key: WriterKey,
    link: AtomicU64,
}

impl Tested {
    fn new() -> Self {
        Self {
            epochs: Epochs::default(),
            heap: Heap::default(),
            key: WriterKey::new(),
            link: AtomicU64::new(0),
        }
    }

    /// Links a block of `words`, each with `value`; what was there is retired.
    fn link(&mut self, words: usize, value: u64) {
        let block = self.heap.alloc(words, 7);
        block.words()[1..].iter().for_each(|word| word.store(value, SeqCst));
        self.heap.relink(&self.link, Some(block));
    }

    fn collect(&mut self) -> Vec<u16> {
        let mut slots = vec![];
        self.heap.collect(&self.epochs, &mut self.key, |slot| slots.push(slot));
        slots
    }
}

impl Drop for Tested {
    fn drop(&mut self) {
        self.heap.relink(&self.link, None);
    }
}

#[test]
fn a_block_is_freed_once_nobody_can_be_in_it() {
    let mut tested = Tested::new();
    tested.link(10, 1);
    let Tested { epochs, heap, key, link } = &mut tested;
    let mut collect = |heap: &mut Heap| heap.collect(epochs, key, |_| unreachable!());

    let reader = epochs.pin();
    let seen = follow(link, &reader).expect("linked");
    heap.relink(link, None);
    assert_eq!(heap.retired_bytes(), block_bytes(10));
    for _ in 0..10 {
        // Others come and go; whoever comes now cannot have seen it.
        let later = epochs.pin();
        assert!(follow(link, &later).is_none());
        collect(heap);
        drop(later);
        collect(heap);
        assert_eq!(heap.retired_bytes(), block_bytes(10), "a reader is in it");
    }
    assert!(seen[1..].iter().all(|word| word.load(SeqCst) == 1));
    drop(reader);
    collect(heap);
    assert_eq!((heap.retired_bytes(), heap.has_retired()), (0, false));
}

#[test]
fn a_reader_from_before_holds_a_slot_back() {
    let mut tested = Tested::new();
    tested.heap.retire_slot(3);
    assert!(tested.heap.has_retired());
    assert_eq!(tested.collect(), [3], "nobody is reading");
    let Tested { epochs, heap, key, .. } = &mut tested;
    let mut slots = vec![];
    let reader = epochs.pin();
    heap.retire_slot(4);
    heap.collect(epochs, key, |slot| slots.push(slot));
    heap.retire_slot(5);
    heap.collect(epochs, key, |slot| slots.push(slot));
    assert_eq!(slots, [0u16; 0]);
    drop(reader);
    heap.collect(epochs, key, |slot| slots.push(slot));
    assert_eq!(slots, [4, 5], "what was waiting, and what came since");
}

#[test]
fn a_stream_of_readers_holds_nothing_back_for_ever() {
    let mut tested = Tested::new();
    tested.link(100, 1);
    let Tested { epochs, heap, key, link } = &mut tested;
    let mut reading = vec![epochs.pin(), epochs.pin()];
    let mut freed = 0;
    for round in 0..1000 {
        // There is always somebody, and each is there for a while.
        reading.push(epochs.pin());
        let before = heap.retired_bytes();
        let block = heap.alloc(100, 0);
        heap.relink(link, Some(block));
        heap.collect(epochs, key, |_| unreachable!());
        freed += usize::from(heap.retired_bytes() < before + block_bytes(100));
        reading.remove(0);
        assert!(heap.retired_bytes() <= 16 * block_bytes(100), "round {round}: {}", heap.retired_bytes());
    }
    assert!(freed > 100, "{freed}");
}

#[test]
fn a_link_may_hold_other_ends() {
    let tested = Tested::new();
    let guard = tested.epochs.pin();
    for word in [0, 1, 2 << 1 | 1, u64::MAX] {
        assert!(follow(&AtomicU64::new(word), &guard).is_none());
    }
    let mut heap = Heap::default();
    [0, 1, 77].into_iter().for_each(|word| heap.retire(word));
    assert!(!heap.has_retired());
}

#[test]
fn a_block_keeps_its_length_and_its_owners_half() {
    let mut heap = Heap::default();
    let block = heap.alloc(12, 0xdead_beef);
    assert_eq!(block.words().len(), 12);
    assert_eq!(block.words()[0].load(SeqCst), 0xdead_beef << 32 | 12);
    assert!(block.words()[1..].iter().all(|word| word.load(SeqCst) == 0));
    heap.retire(block.link());
}

#[test]
fn bytes_are_those_of_glibc() {
    for (words, bytes) in [(0, 16), (1, 16), (2, 32), (3, 32), (4, 48), (5, 48), (69, 560)] {
        assert_eq!(block_bytes(words), bytes, "{words} words");
    }
}

proptest! {
    /// Any order of links, readers and collections: what is counted is what is there, and nothing that a reader can be
    /// in is freed.
    #[test]
    fn bytes_are_counted_exactly(ops in prop::collection::vec((0u8..6, 2usize..200), 0..200)) {
        let mut tested = Tested::new();
        tested.link(5, 0);
        let Tested { epochs, heap, key, link } = &mut tested;
        let (mut linked, mut retired) = (5, vec![]);
        // A guard and what it guards cannot live in one list; slices are looked at while their guards are in it.
        let outlives = WriterKey::new();
        let mut readers: Vec<(Guard<'_>, usize, &[AtomicU64], u64)> = vec![];
        for (now, (op, words)) in (1u64..).zip(ops) {
            match op {
                0 | 1 => {
                    let block = heap.alloc(words, 0);
                    block.words()[1..].iter().for_each(|word| word.store(now, SeqCst));
                    heap.relink(link, Some(block));
                    retired.push(block_bytes(linked));
                    linked = words;
                }
                2 => {
                    let guard = epochs.pin();
                    let seen = follow(link, &outlives).expect("linked");
                    let value = seen[1].load(SeqCst);
                    readers.push((guard, seen.len(), seen, value));
                }
                3 if !readers.is_empty() => {
                    readers.remove(words % readers.len());
                }
                _ => {
                    let before = heap.retired_bytes();
                    heap.collect(epochs, key, |_| unreachable!());
                    if readers.is_empty() {
                        prop_assert_eq!(heap.retired_bytes(), 0);
                    }
                    if heap.retired_bytes() < before {
                        let freed = before - heap.retired_bytes();
                        let mut oldest = 0;
                        while oldest < freed {
                            oldest += retired.remove(0);
                        }
                        prop_assert_eq!(oldest, freed, "in the order of their retirement");
                    }
                }
            }
            prop_assert_eq!(heap.retired_bytes(), retired.iter().sum::<usize>());
            let lists = (heap.fresh.capacity() + heap.waiting.capacity()) * size_of::<Retired>();
            prop_assert_eq!(heap.bytes(), heap.retired_bytes() + block_bytes(linked) + lists);
            for (_, len, seen, value) in &readers {
                prop_assert_eq!(seen.len(), *len);
                prop_assert!(seen[1..].iter().all(|word| word.load(SeqCst) == *value));
            }
        }
    }
}

#[test]
fn after_a_burst_its_list_is_not_kept() {
    let mut tested = Tested::new();
    for _ in 0..100_000 {
        tested.link(2, 0);
    }
    assert!(tested.heap.bytes() > 100_000 * (block_bytes(2) + size_of::<Retired>()));
    tested.collect();
    tested.collect();
    assert!(tested.heap.bytes() < 16 << 10, "{}", tested.heap.bytes());
}
