//! Readers in blocks that are being retired.

use std::sync::Arc;

use shuttle::{Runner, scheduler::DfsScheduler, thread};

use super::{check, config};
use crate::{
    reclaim::{Epochs, Heap, WriterKey, follow},
    sync::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

#[derive(Default)]
struct Shared {
    epochs: Epochs,
    link: AtomicU64,
}

struct Writer {
    shared: Arc<Shared>,
    heap: Heap,
    key: WriterKey,
}

impl Writer {
    fn new(shared: &Arc<Shared>) -> Self {
        let mut writer = Self { shared: Arc::clone(shared), heap: Heap::default(), key: WriterKey::new() };
        writer.link(0);
        writer
    }

    fn link(&mut self, value: u64) {
        let block = self.heap.alloc(3, 0);
        block.words()[1..].iter().for_each(|word| word.store(value, Relaxed));
        self.heap.relink(&self.shared.link, Some(block));
    }

    fn collect(&mut self) {
        self.heap.collect(&self.shared.epochs, &mut self.key, |_| unreachable!("no slots here"));
    }

    /// With no reader left, everything goes.
    fn end(mut self) {
        self.collect();
        assert_eq!((self.heap.retired_bytes(), self.heap.has_retired()), (0, false));
        self.heap.relink(&self.shared.link, None);
    }
}

/// Reads a block; returns its value.
fn read(shared: &Shared) -> u64 {
    let guard = shared.epochs.pin();
    let words = follow(&shared.link, &guard).expect("there is always one");
    let first = words[1].load(SeqCst);
    assert_eq!(words[2].load(SeqCst), first, "overwritten under a reader");
    first
}

/// Every interleaving of one reader and one retirement.
#[test]
fn no_order_of_steps_frees_a_block_under_a_reader() {
    let runner = Runner::new(DfsScheduler::new(None, false), config());
    let tried = runner.run(|| {
        let shared = Arc::new(Shared::default());
        let mut writer = Writer::new(&shared);
        let next = writer.heap.alloc(2, 0);
        let reader = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let guard = shared.epochs.pin();
                let words = follow(&shared.link, &guard).expect("there is always one");
                assert_eq!(words[1].load(SeqCst), 0, "overwritten under a reader");
            }
        });
        writer.heap.relink(&shared.link, Some(next));
        writer.collect();
        reader.join().unwrap();
        writer.end();
    });
    println!("{tried} interleavings");
}

#[test]
fn readers_come_and_go_while_blocks_are_retired() {
    check(4000, || {
        let shared = Arc::new(Shared::default());
        let mut writer = Writer::new(&shared);
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let mut last = 0;
                    for _ in 0..3 {
                        let value = read(&shared);
                        assert!((last..=5).contains(&value), "{value} after {last}");
                        last = value;
                    }
                })
            })
            .collect();
        for value in 1..=5 {
            writer.link(value);
            writer.collect();
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        writer.end();
    });
}

/// A slot is handed back when no reader can have seen its former owner: the number of a word that readers use.
#[test]
fn a_number_is_used_again_after_its_readers() {
    #[derive(Default)]
    struct Owned {
        epochs: Epochs,
        /// Who owns the number, and what stands under it.
        owner: AtomicU64,
        content: AtomicU64,
    }
    check(6000, || {
        let shared = Arc::new(Owned::default());
        shared.owner.store(1, SeqCst);
        shared.content.store(1, SeqCst);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let _guard = shared.epochs.pin();
                    let owner = shared.owner.load(SeqCst);
                    let content = shared.content.load(SeqCst);
                    assert!(content == 0 || owner == 0 || owner == content, "{content} of {owner}");
                })
            })
            .collect();
        let (mut heap, mut key) = (Heap::default(), WriterKey::new());
        for owner in 2..4 {
            shared.owner.store(0, SeqCst);
            shared.content.store(0, SeqCst);
            heap.retire_slot(7);
            let mut free = false;
            while !free {
                heap.collect(&shared.epochs, &mut key, |slot| free = slot == 7);
                thread::yield_now();
            }
            shared.owner.store(owner, SeqCst);
            shared.content.store(owner, SeqCst);
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
}
