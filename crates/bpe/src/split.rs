//! Splits text into words, as the regular expressions of the known families do, without a regular expression.
//!
//! In: text. Out: for each word where it begins and ends; words cover the text. Start at [`Splitter`].
//!
//! Invariant: the words are those of the pattern beside each rule. A rule is that pattern read by hand: its alternatives
//! in order, at each place the first that matches. The exhaustive comparison is in `tests.rs`.

mod deepseek;
mod gpt2;
mod llama;
mod o200k;
#[cfg(test)]
mod tests;

use crate::unicode::{Builder, Classes, spaces};

pub(crate) use deepseek::DeepSeek;
pub(crate) use gpt2::Gpt2;
pub(crate) use llama::Llama;
pub(crate) use o200k::O200k;

/// `\p{L}`
const LETTER: u8 = 1;
/// `\p{N}`
const NUMBER: u8 = 1 << 1;
/// `\s`
const SPACE: u8 = 1 << 2;
/// `[\r\n]`, spaces too.
const NEWLINE: u8 = 1 << 3;
/// `[^\s\p{L}\p{N}]`
const OTHER: u8 = 1 << 4;

/// How a tokenizer splits text.
#[derive(Debug)]
pub(crate) enum Splitter {
    Gpt2(Gpt2),
    Llama(Llama),
    O200k(O200k),
    DeepSeek(DeepSeek),
    /// Not at all: the model finds places that no merge crosses.
    Whole,
}

/// One way of splitting.
pub(crate) trait Rule {
    /// Where the word ends that begins at `at`, which is before the end of `text`.
    fn next(&self, text: &[u8], at: usize) -> usize;
}

/// The classes that most patterns use.
fn classes() -> Builder {
    Builder::new()
        .class(r"\p{L}", LETTER)
        .class(r"\p{N}", NUMBER)
        .class(r"\s", SPACE)
        .class(r"[\r\n]", NEWLINE)
        .class(r"[^\s\p{L}\p{N}]", OTHER)
}

/// `\s*[\r\n]+|\s+(?!\S)|\s+` at white space, which never fails: up to the last line break of the run; without one, the
/// run, but for its last character if a word follows. `ends` says whether the text ends before a character of a class.
#[inline]
fn white_space(classes: &Classes, text: &[u8], at: usize, ends: impl Fn(u8) -> bool) -> usize {
    let mut end = spaces(text, at);
    let (mut last, mut after_newline) = (end.saturating_sub(1).max(at), at);
    let ended = loop {
        if end == text.len() {
            break true;
        }
        let (class, length) = classes.at(text, end);
        if class & SPACE == 0 {
            break ends(class);
        }
        last = end;
        end += length;
        if class & NEWLINE != 0 {
            after_newline = end;
        }
    };
    if after_newline > at {
        after_newline
    } else if ended || last == at {
        end
    } else {
        last
    }
}

/// `\s+(?!\S)|\s+` at white space.
#[inline]
fn white_space_alone(classes: &Classes, text: &[u8], at: usize, ends: impl Fn(u8) -> bool) -> usize {
    let mut end = spaces(text, at);
    let mut last = end.saturating_sub(1).max(at);
    loop {
        if end == text.len() {
            return end;
        }
        let (class, length) = classes.at(text, end);
        if class & SPACE == 0 {
            return if last == at || ends(class) { end } else { last };
        }
        last = end;
        end += length;
    }
}

/// The length of `(?i:'s|'t|'re|'ve|'m|'ll|'d)` at `at`, where an apostrophe is; 0 if it does not match. In Unicode a
/// long `ſ` is an `s` in lower case too; none of the other letters has a third form.
#[inline]
fn contraction(text: &[u8], at: usize) -> usize {
    let lower = |offset: usize| text.get(at + offset).map_or(0, |byte| byte | 0x20);
    match (lower(1), lower(2)) {
        (b's' | b't' | b'm' | b'd', _) => 2,
        (b'r' | b'v', b'e') | (b'l', b'l') => 3,
        // The two bytes of ſ, of which `lower` changes neither's meaning: 0xc5 has become 0xe5.
        (0xe5, 0xbf) if text[at + 1] == 0xc5 && text[at + 2] == 0xbf => 3,
        _ => 0,
    }
}

/// `\p{N}{1,max}` at a character of the class `number`.
#[inline]
fn digits(classes: &Classes, text: &[u8], at: usize, number: u8, max: usize) -> usize {
    let mut end = at;
    for _ in 0..max {
        if end == text.len() {
            break;
        }
        let (class, length) = classes.at(text, end);
        if class & number == 0 {
            break;
        }
        end += length;
    }
    end
}
