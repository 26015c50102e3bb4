//! Normalisation: what a tokenizer changes in a text before it splits it.

use std::sync::Arc;

use unicode_normalization_alignments::{
    UnicodeNormalization,
    char::{canonical_combining_class, decompose_canonical},
};

use crate::unicode::{Builder, Classes, decode};

/// What is done to a text between added tokens.
#[derive(Debug)]
pub(crate) enum Normalizer {
    Nothing,
    Nfc(Nfc),
    /// Spaces become `▁`. Here it is the other way round, and the vocabulary has spaces for its `▁` too: no space is left
    /// in such a text, so it is the same, and a text without `▁` stays as it is.
    SpaceMark,
}

/// What SentencePiece writes for a space.
pub(crate) const SPACE_MARK: &str = "\u{2581}";

impl Normalizer {
    /// Writes the normalised text to `buffer`; `false` if it is `text` itself.
    pub(crate) fn apply(&self, text: &str, buffer: &mut String) -> bool {
        match self {
            Self::Nothing => false,
            Self::Nfc(nfc) => nfc.apply(text, buffer),
            Self::SpaceMark => {
                let changes = memchr::memmem::find(text.as_bytes(), SPACE_MARK.as_bytes()).is_some();
                if changes {
                    buffer.clear();
                    for part in text.split(SPACE_MARK) {
                        buffer.push_str(part);
                        buffer.push(' ');
                    }
                    buffer.pop();
                }
                changes
            }
        }
    }
}

/// Characters are composed, in the tables of the crate that `tokenizers` uses.
#[derive(Debug)]
pub(crate) struct Nfc {
    classes: Arc<Classes>,
}

/// A character that stays itself and has nothing to do with the one before it. Between any character and such a one,
/// composition sees two texts.
const ALONE: u8 = 1;

/// Beyond, only what was composed tells whether a text changes: nothing common is there.
const CODES: u32 = 0x3_0000;

impl Nfc {
    pub(crate) fn new() -> Self {
        let decomposed = |character: char| {
            let mut parts = Vec::new();
            decompose_canonical(character, |part| parts.push(part));
            parts
        };
        // What can follow in a composition: the last part of a character that has parts.
        let mut follows: Vec<char> = (0..CODES)
            .filter_map(char::from_u32)
            .map(decomposed)
            .filter(|parts| parts.len() > 1)
            .filter_map(|parts| parts.last().copied())
            .collect();
        follows.sort_unstable();
        follows.dedup();
        let alone = |character: char| {
            u32::from(character) < CODES
                && decomposed(character).first().is_some_and(|&first| {
                    canonical_combining_class(first) == 0 && follows.binary_search(&first).is_err()
                })
                && canonical_combining_class(character) == 0
                && is_itself(character)
        };
        Self { classes: Builder::new().map(|character, _| u8::from(alone(character))).build() }
    }

    fn apply(&self, text: &str, buffer: &mut String) -> bool {
        let bytes = text.as_bytes();
        // The first character that may change, with the one before it, which it may join.
        let Some((mut from, mut at)) = self.next(bytes, 0) else { return false };
        buffer.clear();
        let mut copied = 0;
        loop {
            let end = self.run(bytes, at);
            buffer.push_str(&text[copied..from]);
            buffer.extend(text[from..end].nfc().map(|(character, _)| character));
            copied = end;
            match self.next(bytes, end) {
                Some(next) => (from, at) = next,
                None => break,
            }
        }
        buffer.push_str(&text[copied..]);
        true
    }

    /// The next character that is not alone, from `from` on, and where the character before it begins.
    fn next(&self, text: &[u8], from: usize) -> Option<(usize, usize)> {
        let (mut previous, mut at) = (from, from);
        while at < text.len() {
            if text[at] < 0x80 {
                (previous, at) = (at, at + 1);
                continue;
            }
            let (code, length) = decode(text, at);
            if self.classes.of(code) & ALONE == 0 {
                return Some((previous, at));
            }
            (previous, at) = (at, at + length);
        }
        None
    }

    /// Where the characters that are not alone end.
    fn run(&self, text: &[u8], mut at: usize) -> usize {
        while at < text.len() {
            let (class, length) = self.classes.at(text, at);
            if class & ALONE != 0 {
                break;
            }
            at += length;
        }
        at
    }
}

fn is_itself(character: char) -> bool {
    let mut text = [0; 4];
    let text = character.encode_utf8(&mut text);
    text.nfc().map(|(part, _)| part).eq([character])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(nfc: &Normalizer, text: &str) {
        let mut buffer = "old".to_owned();
        let normal = if nfc.apply(text, &mut buffer) { &buffer } else { text };
        let expected: String = text.nfc().map(|(character, _)| character).collect();
        assert!(normal == expected, "{text:?} is {normal:?} instead of {expected:?}");
    }

    #[test]
    fn texts_are_composed_as_by_the_crate() {
        let nfc = Normalizer::Nfc(Nfc::new());
        let mut buffer = String::new();
        assert!(!nfc.apply("plain, naïve Ångström, 漢字, 각, नमस्ते".replace('्', "").as_str(), &mut buffer));
        for text in [
            "",
            "e\u{301}",
            "\u{301}e",
            "ae\u{301}\u{323}b",
            "\u{1100}\u{1161}\u{11a8}",
            "각\u{11a8}",
            "Å\u{212b}",
            "क\u{93c}",
        ] {
            check(&nfc, text);
        }
        let every: Vec<char> = (0..0x3_4000).filter_map(char::from_u32).collect();
        for &character in &every {
            check(
                &nfc,
                &format!("e{character}\u{301}{character}{character}\u{323}\u{1100}\u{1161}{character}"),
            );
        }
        let mut state = 3_u64;
        let marks: Vec<char> =
            every.iter().copied().filter(|&c| !is_itself(c) || canonical_combining_class(c) > 0).collect();
        for _ in 0..50_000 {
            let mut draw = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as usize
            };
            let text: String = (0..8)
                .map(|_| match draw() % 3 {
                    0 => marks[draw() % marks.len()],
                    1 => ['a', 'e', 'o', 'ᄀ', 'ᅡ', 'ᆨ', 'ে', 'া'][draw() % 8],
                    _ => every[draw() % every.len()],
                })
                .collect();
            check(&nfc, &text);
        }
    }

    #[test]
    fn marks_of_spaces_become_spaces() {
        let mut buffer = String::new();
        assert!(!Normalizer::SpaceMark.apply("a b", &mut buffer));
        assert!(Normalizer::SpaceMark.apply("▁a ▁b▁▁", &mut buffer));
        assert_eq!(buffer, " a  b  ");
    }
}
