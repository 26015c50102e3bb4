//! Places in a word that no merge crosses.
//!
//! In: the tokens that merges make. Out: for two neighbouring characters, whether a token may hold both. Between two that
//! none holds, no merge ever joins what is left and right, so each side is encoded for itself: long words of scripts
//! without spaces, and texts of models that do not split at all, become short ones.
//!
//! Invariant: `crossed` may say yes for a place that nothing crosses, never no for one that something does.

use crate::unicode::length;

/// Bits for each pair that is known, so that few others look like one (one in 16).
const BITS_A_PAIR: usize = 16;

/// 8 KiB, so that small vocabularies too take few other pairs for known ones.
const WORDS_MIN: usize = 1_024;

#[derive(Debug)]
pub(crate) struct Boundaries {
    /// For the first of two ASCII characters, the second ones.
    ascii: Box<[u128; 128]>,
    /// A hashed set of pairs of characters.
    bits: Box<[u64]>,
    /// Whether a token holds, before a whole or incomplete character, only the end of one that ends with this byte.
    ends: Box<[bool; 256]>,
    /// The same for the begin of a character with this first byte.
    begins: Box<[bool; 256]>,
}

/// What a token knows of the character beside a place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Side(u32);

impl Side {
    fn whole(character: &[u8]) -> Self {
        Self(character.iter().fold(0, |code, &byte| code << 8 | u32::from(byte)))
    }

    /// The first or last byte of a longer character. No character is written with these four bytes.
    fn partial(byte: u8) -> Self {
        Self(0xff00_0000 | u32::from(byte))
    }

    /// The character that ends before `at`; `None` if this cannot be text.
    fn left(token: &[u8], at: usize) -> Option<Self> {
        let start = (at.saturating_sub(4)..at).rev().find(|&start| !is_tail(token[start]));
        match start {
            Some(start) if length(token[start]) == at - start => Some(Self::whole(&token[start..at])),
            None if at < 4 => Some(Self::partial(token[at - 1])),
            _ => None,
        }
    }

    /// The character that begins at `at`.
    fn right(token: &[u8], at: usize) -> Self {
        match token.get(at..at + length(token[at])) {
            Some(character) => Self::whole(character),
            None => Self::partial(token[at]),
        }
    }
}

impl Boundaries {
    /// Of the tokens that merges make, as bytes.
    pub(crate) fn new<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut pairs = Vec::new();
        for token in tokens {
            for at in (1..token.len()).filter(|&at| !is_tail(token[at])) {
                if let Some(left) = Side::left(token, at) {
                    pairs.push((left, Side::right(token, at), token[at - 1], token[at]));
                }
            }
        }
        pairs.sort_unstable();
        pairs.dedup();
        let words = (pairs.len() * BITS_A_PAIR / 64).next_power_of_two().max(WORDS_MIN);
        let mut boundaries = Self {
            ascii: Box::new([0; 128]),
            bits: vec![0; words].into(),
            ends: Box::new([false; 256]),
            begins: Box::new([false; 256]),
        };
        for (left, right, last, first) in pairs {
            if left.0 < 0x80 && right.0 < 0x80 {
                boundaries.ascii[left.0 as usize] |= 1 << right.0;
                continue;
            }
            boundaries.ends[usize::from(last)] |= left == Side::partial(last);
            boundaries.begins[usize::from(first)] |= right == Side::partial(first);
            let (word, bit) = boundaries.place(left, right);
            boundaries.bits[word] |= bit;
        }
        boundaries
    }

    #[inline]
    fn place(&self, left: Side, right: Side) -> (usize, u64) {
        let pair = u64::from(left.0) << 32 | u64::from(right.0);
        let hash = (pair ^ pair >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((hash >> 32) as usize & (self.bits.len() - 1), 1 << (hash >> 26 & 63))
    }

    #[inline]
    fn holds(&self, left: Side, right: Side) -> bool {
        let (word, bit) = self.place(left, right);
        self.bits[word] & bit != 0
    }

    /// Whether a token may hold the end of `text[start..at]` and the begin of `text[at..]`, which are characters.
    #[inline]
    fn crossed(&self, left: &[u8], right: &[u8]) -> bool {
        let (last, first) = (left[left.len() - 1], right[0]);
        if last < 0x80 && first < 0x80 {
            return self.ascii[usize::from(last)] >> first & 1 != 0;
        }
        let (left, right) = (Side::whole(left), Side::whole(right));
        let ends = last >= 0x80 && self.ends[usize::from(last)];
        let begins = first >= 0x80 && self.begins[usize::from(first)];
        self.holds(left, right)
            || ends && self.holds(Side::partial(last), right)
            || begins && self.holds(left, Side::partial(first))
            || ends && begins && self.holds(Side::partial(last), Side::partial(first))
    }

    /// The first place after `start` that nothing crosses, or the end of `text`.
    #[inline]
    pub(crate) fn next(&self, text: &[u8], start: usize) -> usize {
        let mut left = start;
        let mut at = start + length(text[start]);
        while at < text.len() {
            let (last, first) = (text[at - 1], text[at]);
            if last < 0x80 && first < 0x80 {
                if self.ascii[usize::from(last)] >> first & 1 == 0 {
                    return at;
                }
                (left, at) = (at, at + 1);
                continue;
            }
            let after = at + length(first);
            if !self.crossed(&text[left..at], &text[at..after]) {
                return at;
            }
            (left, at) = (at, after);
        }
        at
    }
}

fn is_tail(byte: u8) -> bool {
    byte & 0xc0 == 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(tokens: &[&[u8]], text: &str) -> Vec<String> {
        let boundaries = Boundaries::new(tokens.iter().copied());
        let (mut parts, mut at) = (Vec::new(), 0);
        while at < text.len() {
            let end = boundaries.next(text.as_bytes(), at);
            parts.push(text[at..end].to_owned());
            at = end;
        }
        parts
    }

    #[test]
    fn only_what_some_token_holds_stays_together() {
        assert_eq!(cuts(&[b"ab", b"bcd"], "abcdab"), ["abcd", "ab"]);
        assert_eq!(cuts(&["漢字".as_bytes()], "漢字漢字字"), ["漢字", "漢字", "字"]);
        assert_eq!(cuts(&["é!".as_bytes()], "aé!é"), ["a", "é!", "é"]);
        assert_eq!(cuts(&[], "añ"), ["a", "ñ"]);
    }

    #[test]
    fn tokens_of_incomplete_characters_hold_every_character_that_they_fit() {
        let (kan, ji) = ("漢".as_bytes(), "字".as_bytes());
        let joined = ["漢字"];
        let left = [&kan[2..], ji].concat();
        assert_eq!(cuts(&[&left], "漢字"), joined);
        let right = [kan, &ji[..1]].concat();
        assert_eq!(cuts(&[&right], "漢字"), joined);
        let both = [&kan[1..], &ji[..2]].concat();
        assert_eq!(cuts(&[&both], "漢字"), joined);
        assert_eq!(cuts(&[&both], "字字"), ["字", "字"]);
        assert_eq!(cuts(&[kan], "漢字"), ["漢", "字"], "no place inside a character counts");
        let space = [b" ", &ji[..1]].concat();
        assert_eq!(cuts(&[&space], " 字"), [" 字"]);
    }
}
