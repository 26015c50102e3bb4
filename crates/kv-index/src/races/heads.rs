//! Readers in a table that is being changed.

use std::sync::Arc;

use shuttle::thread;

use super::check;
use crate::{
    heads::{Heads, HeadsState},
    reclaim::{Epochs, Heap, WriterKey},
    spread::tests::hash_of,
};

#[derive(Default)]
struct Shared {
    epochs: Epochs,
    heads: Heads,
}

/// Some share all bits that a table sees, some only their bucket.
fn hash(number: u32) -> u64 {
    hash_of(0xffff_0000 | number % 3, 1 + (number % 2) as u8, number)
}

const STAYS: [u32; 4] = [3, 9, 16, 22];

/// Pages grow, shrink and move under readers, buckets overflow and empty: what stays is found at any time.
#[test]
fn what_stays_is_found_at_any_time() {
    check(1000, || {
        let shared = Arc::new(Shared::default());
        let (mut state, mut heap, mut key) = (HeadsState::default(), Heap::default(), WriterKey::new());
        // The last of them stand behind full buckets.
        for number in 0..STAYS[3] + 1 {
            assert!(shared.heads.insert(hash(number), number, &mut state, &mut heap, &key));
        }
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    for stays in STAYS {
                        let guard = shared.epochs.pin();
                        let found = shared.heads.find(hash(stays), &guard, |place| place == stays);
                        assert_eq!(found, Some(stays));
                    }
                })
            })
            .collect();
        for number in (0..STAYS[3]).filter(|number| !STAYS.contains(number)) {
            assert!(shared.heads.remove(hash(number), number, &mut state, &mut heap, &key));
        }
        for number in 100..126 {
            assert!(shared.heads.insert(hash(number), number, &mut state, &mut heap, &key));
            heap.collect(&shared.epochs, &mut key, |_| unreachable!());
        }
        for number in 100..126 {
            assert!(shared.heads.remove(hash(number), number, &mut state, &mut heap, &key));
        }
        heap.collect(&shared.epochs, &mut key, |_| unreachable!());
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        shared.heads.clear(&mut state, &mut heap, &key);
    });
}
