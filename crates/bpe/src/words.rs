//! Words to tokens by looking them up: the vocabulary, and what longer words became lately.
//!
//! Both tables keep a word's bytes beside its tokens and compare them whole, so a hash decides where to look and never
//! what is found.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

use crate::{Token, merges::TOKEN_BITS};

/// A word of up to [`KEY_BYTES_MAX`] bytes: its bytes, zeros, and its length in the last byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(u64, u64);

pub(crate) const KEY_BYTES_MAX: usize = 15;

/// No word: one of no bytes that has a length.
const NO_KEY: Key = Key(0, u64::MAX);

impl Key {
    /// Of `text[start..end]`, 1 to 15 bytes.
    #[inline]
    pub(crate) fn of(text: &[u8], start: usize, end: usize) -> Self {
        let length = end - start;
        let bytes = match text.get(start..start + 16) {
            Some(bytes) => u128::from_le_bytes(bytes.try_into().expect("16 bytes")),
            None => {
                let mut bytes = [0; 16];
                bytes[..length].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(bytes)
            }
        };
        let (low, high) = MASKS[length & 15];
        Self(bytes as u64 & low, (bytes >> 64) as u64 & high | (length as u64) << 56)
    }

    #[inline]
    pub(crate) fn hashed(self) -> Hashed {
        Hashed { key: self, hash: self.hash() }
    }

    #[inline]
    fn hash(self) -> u64 {
        mix(self.0 ^ 0x9e37_79b9_7f4a_7c15, self.1 ^ 0xd1b5_4a32_d192_ed03)
    }
}

/// A key with its hash, for whoever asks two tables.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hashed {
    key: Key,
    hash: u64,
}

/// For each length the bits of its bytes.
static MASKS: [(u64, u64); 16] = {
    let mut masks = [(0, 0); 16];
    let mut length = 0;
    while length < 16 {
        let bits = (1_u128 << (8 * length)) - 1;
        masks[length] = (bits as u64, (bits >> 64) as u64);
        length += 1;
    }
    masks
};

/// Both halves of a product, folded: every bit of it depends on most bits of both factors.
#[inline]
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// A token found by its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found(u32);

impl Found {
    const NOTHING: Self = Self(u32::MAX);
    /// The token's bytes do not become this token by merging.
    const ONLY_WHOLE: u32 = 1 << 31;

    /// The token, where it stands for a whole word.
    #[inline]
    pub(crate) fn whole(self) -> Option<Token> {
        (self != Self::NOTHING).then_some(self.0 & !Self::ONLY_WHOLE)
    }

    /// The token, where it stands for a part of a word: only if merging would make it.
    #[inline]
    pub(crate) fn merged(self) -> Option<Token> {
        (self.0 & Self::ONLY_WHOLE == 0).then_some(self.0)
    }
}

/// The tokens that a lookup may give, by their bytes.
///
/// Kept small, since what is slow is memory: the slots of 128,000 tokens are 1 MB, and the keys of common tokens lie
/// together, because vocabularies list tokens from common to rare.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    /// A token and some more bits of its hash. Open addressing, linear probing, at most half full.
    slots: Box<[Slot]>,
    /// By token.
    keys: Box<[Key]>,
    long: HashMap<Box<[u8]>, Found, BuildHasherDefault<ByteHasher>>,
    bytes_max: usize,
}

/// From the lowest bit: a token, whether it stands only for a whole word, bits of its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot(u32);

impl Slot {
    const EMPTY: Self = Self(u32::MAX);
    const ONLY_WHOLE: u32 = 1 << TOKEN_BITS;
    /// The bits of a hash, which are its highest.
    const TAG: u32 = !(2 * Self::ONLY_WHOLE - 1);

    #[inline]
    fn found(self) -> Found {
        let token = self.0 & (Self::ONLY_WHOLE - 1);
        Found(if self.0 & Self::ONLY_WHOLE != 0 { token | Found::ONLY_WHOLE } else { token })
    }

    #[inline]
    fn token(self) -> usize {
        (self.0 & (Self::ONLY_WHOLE - 1)) as usize
    }
}

impl Vocabulary {
    /// Of tokens with their bytes, and whether merging these makes the token.
    pub(crate) fn new(tokens: &[(Token, &[u8], bool)]) -> Self {
        let short = |bytes: &[u8]| (1..=KEY_BYTES_MAX).contains(&bytes.len());
        let count = tokens.iter().filter(|(_, bytes, _)| short(bytes)).count();
        let largest = tokens.iter().map(|(token, ..)| *token as usize).max().unwrap_or(0);
        let mut vocabulary = Self {
            slots: vec![Slot::EMPTY; (count * 2 + 1).next_power_of_two()].into(),
            // One more, which no word has: what an empty slot refers to.
            keys: vec![NO_KEY; largest + 2].into(),
            long: HashMap::default(),
            bytes_max: tokens.iter().map(|(_, bytes, _)| bytes.len()).max().unwrap_or(0),
        };
        for &(token, bytes, merges) in tokens {
            if !short(bytes) {
                let found = Found(if merges { token } else { token | Found::ONLY_WHOLE });
                vocabulary.long.insert(bytes.into(), found);
                continue;
            }
            let Hashed { key, hash } = Key::of(bytes, 0, bytes.len()).hashed();
            let mut index = hash as usize & (vocabulary.slots.len() - 1);
            while vocabulary.slots[index] != Slot::EMPTY {
                index = (index + 1) & (vocabulary.slots.len() - 1);
            }
            let whole = if merges { 0 } else { Slot::ONLY_WHOLE };
            vocabulary.slots[index] = Slot((hash >> 32) as u32 & Slot::TAG | whole | token);
            vocabulary.keys[token as usize] = key;
        }
        vocabulary
    }

    #[inline]
    pub(crate) fn short(&self, Hashed { key, hash }: Hashed) -> Found {
        let tag = (hash >> 32) as u32 & Slot::TAG;
        let mut index = hash as usize & (self.slots.len() - 1);
        loop {
            let slot = self.slots[index];
            if slot.0 & Slot::TAG == tag && self.keys[slot.token().min(self.keys.len() - 1)] == key {
                return slot.found();
            }
            if slot == Slot::EMPTY {
                return Found::NOTHING;
            }
            index = (index + 1) & (self.slots.len() - 1);
        }
    }

    pub(crate) fn long(&self, word: &[u8]) -> Found {
        if word.len() > self.bytes_max {
            return Found::NOTHING;
        }
        self.long.get(word).copied().unwrap_or(Found::NOTHING)
    }
}

/// 512 KiB: half of a core's second cache.
const HOT_WORDS: usize = 16_384;
const HOT_TOKENS_MAX: usize = 3;

/// Short words that came last, together, with what they became: one look-up for nearly all words of a text. The
/// vocabulary has them scattered over megabytes, and those of several tokens not at all.
#[derive(Debug)]
pub(crate) struct Hot(Box<[HotWord]>);

/// Half a line of the processor's cache. The number of tokens stands behind them.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
struct HotWord {
    key: Key,
    tokens: [Token; HOT_TOKENS_MAX + 1],
}

impl Hot {
    pub(crate) fn new() -> Self {
        Self(vec![HotWord { key: NO_KEY, tokens: [0; HOT_TOKENS_MAX + 1] }; HOT_WORDS].into())
    }

    /// Up to three tokens and, last, how many.
    #[inline]
    pub(crate) fn get(&self, Hashed { key, hash }: Hashed) -> Option<[Token; HOT_TOKENS_MAX + 1]> {
        let word = &self.0[(hash >> 32) as usize % HOT_WORDS];
        (word.key == key).then_some(word.tokens)
    }

    #[inline]
    pub(crate) fn insert(&mut self, Hashed { key, hash }: Hashed, tokens: &[Token]) {
        if tokens.len() <= HOT_TOKENS_MAX {
            let word = &mut self.0[(hash >> 32) as usize % HOT_WORDS];
            word.key = key;
            word.tokens[..tokens.len()].copy_from_slice(tokens);
            word.tokens[HOT_TOKENS_MAX] = tokens.len() as u32;
        }
    }
}

/// Where tokens are appended: a vector that is longer than what it holds, so that appending some is one store.
#[derive(Debug)]
pub(crate) struct Sink<'a> {
    tokens: &'a mut Vec<Token>,
    length: usize,
}

/// By how much a sink grows at once.
const SINK_STEP: usize = 1_024;

impl<'a> Sink<'a> {
    pub(crate) fn new(tokens: &'a mut Vec<Token>) -> Self {
        let length = tokens.len();
        Self { tokens, length }
    }

    /// Appends as many of the first three as the fourth says.
    #[inline]
    pub(crate) fn push_counted(&mut self, tokens: [Token; HOT_TOKENS_MAX + 1]) {
        if self.length + tokens.len() > self.tokens.len() {
            self.tokens.resize(self.length + SINK_STEP, 0);
        }
        self.tokens[self.length..self.length + tokens.len()].copy_from_slice(&tokens);
        self.length += tokens[HOT_TOKENS_MAX] as usize;
    }

    #[inline]
    pub(crate) fn push(&mut self, token: Token) {
        self.push_counted([token, 0, 0, 1]);
    }

    pub(crate) fn extend(&mut self, tokens: &[Token]) {
        let end = self.length + tokens.len();
        if end > self.tokens.len() {
            self.tokens.resize(end + SINK_STEP, 0);
        }
        self.tokens[self.length..end].copy_from_slice(tokens);
        self.length = end;
    }
}

impl Drop for Sink<'_> {
    fn drop(&mut self) {
        self.tokens.truncate(self.length);
    }
}

/// Words of up to this many bytes and tokens are remembered.
pub(crate) const CACHED_BYTES_MAX: usize = 31;
const CACHED_TOKENS_MAX: usize = 7;

/// 8,192 words are 512 KiB, which fits into a core's second cache beside what else is hot.
const CACHED_WORDS: usize = 8_192;

/// What words that are no token became. Each word has one place, where the last one stays.
#[derive(Debug)]
pub(crate) struct Cache(Box<[Entry]>);

/// One line of the processor's cache.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Entry {
    low: Key,
    /// The length of the whole word is in the last byte here.
    high: Key,
    tokens: [Token; CACHED_TOKENS_MAX],
    count: u32,
}

impl Cache {
    pub(crate) fn new() -> Self {
        let nothing = Entry { low: NO_KEY, high: NO_KEY, tokens: [0; CACHED_TOKENS_MAX], count: 0 };
        Self(vec![nothing; CACHED_WORDS].into())
    }

    /// The place of a word: the key of a short one, or of both halves of a longer one.
    #[inline]
    pub(crate) fn place(low: Key, high: Key) -> Place {
        let hash = low.hash() ^ high.hash().rotate_left(32);
        Place { low, high, index: hash as usize & (CACHED_WORDS - 1) }
    }

    #[inline]
    pub(crate) fn get(&self, place: Place) -> Option<&[Token]> {
        let entry = &self.0[place.index];
        (entry.low == place.low && entry.high == place.high).then(|| &entry.tokens[..entry.count as usize])
    }

    pub(crate) fn insert(&mut self, place: Place, tokens: &[Token]) {
        if tokens.len() > CACHED_TOKENS_MAX {
            return;
        }
        let entry = &mut self.0[place.index];
        (entry.low, entry.high) = (place.low, place.high);
        entry.tokens[..tokens.len()].copy_from_slice(tokens);
        entry.count = u32::try_from(tokens.len()).expect("at most seven");
    }
}

/// Where a word is in the cache, and the word.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    low: Key,
    high: Key,
    index: usize,
}

impl Place {
    /// Of `text[start..end]`, 1 to 31 bytes. The halves of 16 bytes and more are its first 15 and the rest, at most
    /// 16, of which the last byte takes the place of a length: together they have one meaning, as the word's length
    /// is mixed in.
    #[inline]
    pub(crate) fn of(text: &[u8], start: usize, end: usize) -> Self {
        if end - start <= KEY_BYTES_MAX {
            return Cache::place(Key::of(text, start, end), Key(0, 0));
        }
        let middle = start + KEY_BYTES_MAX;
        let low = Key::of(text, start, middle);
        if end - middle <= KEY_BYTES_MAX {
            return Cache::place(low, Key::of(text, middle, end));
        }
        let bytes = u128::from_le_bytes(text[middle..end].try_into().expect("16 bytes"));
        // Told from shorter words by a length that no word has.
        Cache::place(Key(low.0, low.1 | 1 << 63), Key(bytes as u64, (bytes >> 64) as u64))
    }
}

/// For the few words that are long.
#[derive(Debug, Default)]
pub(crate) struct ByteHasher(u64);

impl Hasher for ByteHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = mix(self.0 ^ u64::from_le_bytes(word), 0x9e37_79b9_7f4a_7c15 ^ chunk.len() as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_word_wherever_it_stands() {
        let text = b"0123456789abcdefghijklmnopqrstuv";
        for start in 0..16 {
            for length in 1..=KEY_BYTES_MAX.min(text.len() - start) {
                let word = &text[start..start + length];
                assert_eq!(Key::of(text, start, start + length), Key::of(word, 0, length));
                let followed = [word, &[0; 3]].concat();
                assert_eq!(Key::of(text, start, start + length), Key::of(&followed, 0, length));
                if length < KEY_BYTES_MAX {
                    assert_ne!(Key::of(&followed, 0, length), Key::of(&followed, 0, length + 1), "{length}");
                }
            }
        }
    }

    #[test]
    fn a_vocabulary_knows_its_words_and_no_others() {
        let long = [b'x'; 40];
        let vocabulary =
            Vocabulary::new(&[(7, b"a", true), (8, b"ab", false), (9, &long, true), (10, &long[1..], false)]);
        let short = |word: &[u8]| vocabulary.short(Key::of(word, 0, word.len()).hashed());
        assert_eq!((short(b"a").whole(), short(b"a").merged()), (Some(7), Some(7)));
        assert_eq!((short(b"ab").whole(), short(b"ab").merged()), (Some(8), None));
        assert_eq!((short(b"a\0").whole(), short(b"abc").merged()), (None, None));
        assert_eq!(vocabulary.long(&long).merged(), Some(9));
        assert_eq!(
            (vocabulary.long(&long[1..]).whole(), vocabulary.long(&long[1..]).merged()),
            (Some(10), None)
        );
        assert_eq!(vocabulary.long(&long[2..]).whole(), None);
    }

    #[test]
    fn a_cache_gives_back_what_the_same_word_became() {
        let mut cache = Cache::new();
        let text = b"the quick brown fox jumps over the lazy dog, twice.";
        let mut words = Vec::new();
        for length in 1..=CACHED_BYTES_MAX {
            for start in 0..text.len() - length {
                let (place, word) = (Place::of(text, start, start + length), &text[start..start + length]);
                let tokens: Vec<Token> = word.iter().take(7).map(|&byte| byte.into()).collect();
                cache.insert(place, &tokens);
                assert_eq!(cache.get(place), Some(&tokens[..]));
                words.push((place, word));
            }
        }
        for (place, word) in &words {
            if let Some(tokens) = cache.get(*place) {
                assert!(tokens.iter().zip(*word).all(|(&token, &byte)| token == u32::from(byte)));
            }
            assert!(words.iter().all(|(other, known)| (other.low, other.high) != (place.low, place.high) || known == word));
        }
        let place = Place::of(text, 0, 9);
        cache.insert(place, &[1]);
        cache.insert(place, &[2; 8]);
        assert_eq!(cache.get(place), Some(&[1][..]), "what is too long is not kept");
    }
}
