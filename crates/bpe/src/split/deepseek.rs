//! DeepSeek V3's rule: three splits, one inside the pieces of the other.

use std::sync::Arc;

use super::{NEWLINE, Rule, SPACE, digits, white_space};
use crate::unicode::{Builder, Classes, ascii_letters, length};

/// `[\p{L}\p{M}]`
const WORD: u8 = 1;
/// `[\p{P}\p{S}]`
const SYMBOL: u8 = 1 << 1;
/// `\p{N}`, the first split.
const NUMBER: u8 = 1 << 4;
/// `[一-龥぀-ゟ゠-ヿ]`, the second split.
const CJK: u8 = 1 << 5;
/// `[A-Za-z]`
const ASCII_LETTER: u8 = 1 << 6;
/// ``[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]``
const ASCII_SYMBOL: u8 = 1 << 7;

/// `\p{N}{1,3}`; in what is left `[一-龥぀-ゟ゠-ヿ]+`; in each piece
/// `ASCII_SYMBOL[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
///
/// Control characters match nothing there: what lies between two matches is a word too.
#[derive(Debug)]
pub(crate) struct DeepSeek {
    classes: Arc<Classes>,
}

impl DeepSeek {
    pub(crate) fn new() -> Self {
        let classes = Builder::new()
            .class(r"[\p{L}\p{M}]", WORD)
            .class(r"[\p{P}\p{S}]", SYMBOL)
            .class(r"\s", SPACE)
            .class(r"[\r\n]", NEWLINE)
            .class(r"\p{N}", NUMBER)
            .class("[\u{4e00}-\u{9fa5}\u{3040}-\u{30ff}]", CJK)
            .class("[A-Za-z]", ASCII_LETTER)
            .class("[!-/:-@\\[-`{-~]", ASCII_SYMBOL);
        Self { classes: classes.build() }
    }
}

impl Rule for DeepSeek {
    #[inline]
    fn next(&self, text: &[u8], at: usize) -> usize {
        let class = self.classes.at(text, at).0;
        if class & NUMBER != 0 {
            digits(&self.classes, text, at, NUMBER, 3)
        } else if class & CJK != 0 {
            Piece { classes: &self.classes, text, ends: |class| class & CJK == 0 }.word(at)
        } else {
            Piece { classes: &self.classes, text, ends: |class| class & (NUMBER | CJK) != 0 }.word(at)
        }
    }
}

/// A piece of the first two splits. It ends before the first character that `ends` it, and the last split does not see
/// beyond; where that is, nobody looks for until a word comes there, or a long piece would be read once for each word.
struct Piece<'a, F> {
    classes: &'a Classes,
    text: &'a [u8],
    ends: F,
}

impl<F: Fn(u8) -> bool> Piece<'_, F> {
    /// The end of the word at `at`.
    #[inline]
    fn word(&self, at: usize) -> usize {
        let end = self.matched(at);
        if end > at {
            return end;
        }
        let mut end = at + length(self.text[at]);
        while end < self.text.len()
            && !(self.ends)(self.classes.at(self.text, end).0)
            && self.matched(end) == end
        {
            end += length(self.text[end]);
        }
        end
    }

    /// The end of the match of the last pattern at `at`, or `at` if nothing matches there.
    #[inline]
    fn matched(&self, at: usize) -> usize {
        let text = self.text;
        let (class, length) = self.class(at);
        let after = at + length;
        let (next, next_length) = if after < text.len() { self.class(after) } else { (0, 0) };
        if class & ASCII_SYMBOL != 0 && next & ASCII_LETTER != 0 {
            return ascii_letters(text, after);
        }
        if class & WORD != 0 {
            return self.letters(after);
        }
        if class & (NEWLINE | SYMBOL) == 0 && next & WORD != 0 {
            return self.letters(after + next_length);
        }
        if class & SYMBOL != 0 || text[at] == b' ' && next & SYMBOL != 0 {
            return self.run(self.run(after, SYMBOL), NEWLINE);
        }
        if class & SPACE != 0 {
            return white_space(self.classes, text, at, &self.ends);
        }
        at
    }

    #[inline]
    fn letters(&self, at: usize) -> usize {
        let at = if (self.ends)(WORD | ASCII_LETTER) { at } else { ascii_letters(self.text, at) };
        self.run(at, WORD)
    }

    /// Where the characters of the piece that have one of `flags` end.
    #[inline]
    fn run(&self, mut at: usize, flags: u8) -> usize {
        while at < self.text.len() {
            let (class, length) = self.class(at);
            if class & flags == 0 {
                break;
            }
            at += length;
        }
        at
    }

    /// The class of the character at `at`, none if it is not of the piece; its length.
    #[inline]
    fn class(&self, at: usize) -> (u8, usize) {
        let (class, length) = self.classes.at(self.text, at);
        (if (self.ends)(class) { 0 } else { class }, length)
    }
}
