//! Classes of characters, one look-up each.

use std::sync::Arc;

use regex_syntax::hir::{Class, HirKind};

/// Characters in one block of the table; blocks that are equal are stored once.
const BLOCK: usize = 256;
const CODES: usize = 0x11_0000;

/// For each character a set of flags, whose meaning is their user's.
#[derive(Debug)]
pub(crate) struct Classes {
    /// Flags of ASCII; those of bytes beyond are never read.
    ascii: [u8; 256],
    /// The block of a character's code by its upper bits.
    blocks: Box<[u16]>,
    flags: Box<[[u8; BLOCK]]>,
}

/// Collects flags by class.
pub(crate) struct Builder(Vec<u8>);

impl Builder {
    pub(crate) fn new() -> Self {
        Self(vec![0; CODES])
    }

    /// Sets `flags` for the characters of a class as regular expressions write it: `\p{L}`, `[\r\n]`.
    pub(crate) fn class(mut self, class: &str, flags: u8) -> Self {
        for (first, last) in ranges(class) {
            for code in &mut self.0[first as usize..=last as usize] {
                *code |= flags;
            }
        }
        self
    }

    /// Changes the flags of every character.
    pub(crate) fn map(mut self, change: impl Fn(char, u8) -> u8) -> Self {
        for (code, flags) in (0..).zip(&mut self.0) {
            if let Some(character) = char::from_u32(code) {
                *flags = change(character, *flags);
            }
        }
        self
    }

    pub(crate) fn build(self) -> Arc<Classes> {
        let mut ascii = [0; 256];
        ascii[..128].copy_from_slice(&self.0[..128]);
        let mut flags: Vec<[u8; BLOCK]> = Vec::new();
        let mut blocks = Vec::with_capacity(CODES / BLOCK);
        for block in self.0.as_chunks::<BLOCK>().0 {
            // Long stretches of Unicode are alike: the last blocks are the likeliest.
            let index = flags.iter().rposition(|known| known == block).unwrap_or_else(|| {
                flags.push(*block);
                flags.len() - 1
            });
            blocks.push(u16::try_from(index).expect("there are 4,352 blocks"));
        }
        Arc::new(Classes { ascii, blocks: blocks.into(), flags: flags.into() })
    }
}

impl Classes {
    /// The flags of an ASCII character.
    #[inline]
    pub(crate) fn ascii(&self, byte: u8) -> u8 {
        self.ascii[usize::from(byte)]
    }

    #[inline]
    pub(crate) fn of(&self, code: u32) -> u8 {
        let code = code as usize;
        self.flags[usize::from(self.blocks[code / BLOCK])][code % BLOCK]
    }

    /// The flags of the character that begins at `at`, and its length.
    #[inline(always)]
    pub(crate) fn at(&self, text: &[u8], at: usize) -> (u8, usize) {
        let byte = text[at];
        if byte < 0x80 { (self.ascii(byte), 1) } else { self.beyond_ascii(text, at) }
    }

    /// Apart, so that what is asked for ASCII stays small enough to become part of every rule.
    #[inline(never)]
    fn beyond_ascii(&self, text: &[u8], at: usize) -> (u8, usize) {
        let (code, length) = decode(text, at);
        (self.of(code), length)
    }

    /// Where the characters that have one of `flags` end, from `at` on.
    #[inline]
    pub(crate) fn run(&self, text: &[u8], mut at: usize, flags: u8) -> usize {
        while at < text.len() {
            let (class, length) = self.at(text, at);
            if class & flags == 0 {
                break;
            }
            at += length;
        }
        at
    }
}

/// The character that begins at `at` of well-formed UTF-8, beyond ASCII, and its length.
#[inline]
pub(crate) fn decode(text: &[u8], at: usize) -> (u32, usize) {
    let tail = |offset: usize| u32::from(text[at + offset] & 0x3f);
    let lead = u32::from(text[at]);
    match lead {
        0..0xe0 => ((lead & 0x1f) << 6 | tail(1), 2),
        0xe0..0xf0 => ((lead & 0x0f) << 12 | tail(1) << 6 | tail(2), 3),
        _ => ((lead & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
    }
}

/// The length of a character by its first byte.
#[inline]
pub(crate) fn length(lead: u8) -> usize {
    match lead {
        0..0xc0 => 1,
        0xc0..0xe0 => 2,
        0xe0..0xf0 => 3,
        _ => 4,
    }
}

/// Where the ASCII letters end, from `at` on: eight bytes at a time, because a loop of single bytes ends at a place that
/// the processor cannot predict, once for each word.
#[inline]
pub(crate) fn ascii_letters(text: &[u8], mut at: usize) -> usize {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = 0x80 * ONES;
    while let Some(bytes) = text.get(at..at + 8) {
        let bytes = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let lower = (bytes | (0x20 * ONES)) & !HIGH;
        let from_a = lower + (0x80 - u64::from(b'a')) * ONES;
        let beyond_z = lower + (0x7f - u64::from(b'z')) * ONES;
        let others = !(from_a & !beyond_z & !bytes) & HIGH;
        if others != 0 {
            return at + others.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    while text.get(at).is_some_and(u8::is_ascii_alphabetic) {
        at += 1;
    }
    at
}

/// Where the spaces end, from `at` on: code is indented.
#[inline]
pub(crate) fn spaces(text: &[u8], mut at: usize) -> usize {
    while let Some(bytes) = text.get(at..at + 8) {
        let others = u64::from_le_bytes(bytes.try_into().expect("eight bytes")) ^ 0x2020_2020_2020_2020;
        if others != 0 {
            return at + others.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    while text.get(at) == Some(&b' ') {
        at += 1;
    }
    at
}

/// The first and last codes of the ranges of a class.
fn ranges(class: &str) -> Vec<(u32, u32)> {
    let parsed = regex_syntax::parse(class).expect("classes are constants of this crate");
    match parsed.kind() {
        HirKind::Class(Class::Unicode(class)) => {
            class.iter().map(|range| (range.start().into(), range.end().into())).collect()
        }
        HirKind::Class(Class::Bytes(class)) => {
            class.iter().map(|range| (range.start().into(), range.end().into())).collect()
        }
        other => panic!("{class} is not a class but {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_those_of_the_class() {
        let classes = Builder::new().class(r"\p{L}", 1).class(r"\s", 2).class("[é-ë0-9]", 4).build();
        for code in (0..=u32::from(char::MAX)).filter_map(char::from_u32) {
            let flags = classes.of(code.into());
            assert_eq!(flags & 2 != 0, code.is_whitespace(), "{code:?}");
            assert_eq!(flags & 4 != 0, code.is_ascii_digit() || ('é'..='ë').contains(&code), "{code:?}");
            let mut text = [0; 4];
            let text = code.encode_utf8(&mut text).as_bytes();
            assert_eq!(classes.at(text, 0), (flags, text.len()));
            assert_eq!(length(text[0]), text.len());
        }
        assert_eq!((classes.of('ſ'.into()), classes.of('7'.into()), classes.of('²'.into())), (1, 4, 0));
        assert_eq!(classes.run("aé字!".as_bytes(), 0, 1), 6);
    }

    #[test]
    fn spaces_end_where_a_loop_says() {
        for text in ["", " ", "a ", "        ", "         x", "   \u{a0}      ", "       \n        !   "] {
            for at in 0..=text.len() {
                let expected = text.as_bytes()[at..].iter().take_while(|byte| **byte == b' ').count();
                assert_eq!(spaces(text.as_bytes(), at), at + expected, "{text:?} from {at}");
            }
        }
    }

    #[test]
    fn letters_end_where_a_loop_says() {
        for text in
            ["", "a", "abcdefgh", "abcdefghi", "abcdefghijklmnop z", "ab@cd[ef`gh{", "Zzé", "zZaA{AzZa"]
        {
            for at in 0..=text.len() {
                let bytes = &text.as_bytes()[at..];
                let expected = bytes.iter().take_while(|byte| byte.is_ascii_alphabetic()).count();
                assert_eq!(ascii_letters(text.as_bytes(), at), at + expected, "{text:?} from {at}");
            }
        }
    }
}
