//! A set of rank slots: which ranks hold one block.

/// Ranks in a word.
pub(crate) const WORD_RANKS: usize = 64;

/// The first 64 slots are inline; fleets beyond that pay for a bitmap on the blocks that later slots hold.
#[derive(Debug, Clone, Default)]
pub(crate) struct Holders {
    first: u64,
    rest: Option<Box<Bitmap>>,
}

/// Words after the first. A struct of its own, boxed, because a boxed slice would widen every slot of the table by its
/// length.
#[derive(Debug, Clone, Default)]
struct Bitmap {
    words: Box<[u64]>,
}

/// What changing a set did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Changed {
    /// Whether the slot was not in the set before (insert), or was (remove).
    pub(crate) changed: bool,
    /// Heap bytes of the set before and after.
    pub(crate) heap_bytes: (usize, usize),
}

impl Holders {
    pub(crate) fn word(&self, index: usize) -> u64 {
        match index {
            0 => self.first,
            _ => self.rest.as_ref().and_then(|rest| rest.words.get(index - 1)).copied().unwrap_or(0),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        // `rest` is dropped when its last bit goes.
        self.first == 0 && self.rest.is_none()
    }

    pub(crate) fn contains(&self, slot: u16) -> bool {
        let (word, bit) = position(slot);
        self.word(word) & bit != 0
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.rest.as_ref().map_or(0, |rest| size_of::<Bitmap>() + size_of_val(&*rest.words))
    }

    /// Heap bytes that [`insert`](Self::insert) of `slot` will leave.
    pub(crate) fn heap_bytes_with(&self, slot: u16) -> usize {
        match position(slot) {
            (0, _) => self.heap_bytes(),
            (word, _) => self.heap_bytes().max(size_of::<Bitmap>() + word * size_of::<u64>()),
        }
    }

    pub(crate) fn insert(&mut self, slot: u16) -> Changed {
        let before = self.heap_bytes();
        let (word, bit) = position(slot);
        let target = if word == 0 {
            &mut self.first
        } else {
            let Bitmap { words } = &mut **self.rest.get_or_insert_default();
            if words.len() < word {
                let mut longer = std::mem::take(words).into_vec();
                longer.resize(word, 0);
                *words = longer.into_boxed_slice();
            }
            &mut words[word - 1]
        };
        let changed = *target & bit == 0;
        *target |= bit;
        Changed { changed, heap_bytes: (before, self.heap_bytes()) }
    }

    pub(crate) fn remove(&mut self, slot: u16) -> Changed {
        let before = self.heap_bytes();
        let changed = self.contains(slot);
        let (word, bit) = position(slot);
        if word == 0 {
            self.first &= !bit;
        } else if changed && let Some(rest) = &mut self.rest {
            rest.words[word - 1] &= !bit;
            if rest.words.iter().all(|&word| word == 0) {
                self.rest = None;
            }
        }
        Changed { changed, heap_bytes: (before, self.heap_bytes()) }
    }
}

fn position(slot: u16) -> (usize, u64) {
    let slot = usize::from(slot);
    (slot / WORD_RANKS, 1 << (slot % WORD_RANKS))
}
