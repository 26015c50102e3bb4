//! The rule of gpt-oss (`o200k`) and that of Mistral's Tekken, which knows no contractions and splits every digit off.

use std::sync::Arc;

use super::{LETTER, NEWLINE, NUMBER, OTHER, Rule, classes, contraction, digits, white_space};
use crate::unicode::{Classes, ascii_letters};

/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`
const UPPER: u8 = 1 << 5;
/// `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`
const LOWER: u8 = 1 << 6;
/// `[\r\n/]`
const LINE_END: u8 = 1 << 7;

/// In four parts, the contraction `(?i:'s|'t|'re|'ve|'m|'ll|'d)` being `'…`:
/// `[^\r\n\p{L}\p{N}]?UPPER*LOWER+'…?`, `[^\r\n\p{L}\p{N}]?UPPER+LOWER*'…?`, `\p{N}{1,3}`,
/// ` ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`
#[derive(Debug)]
pub(crate) struct O200k {
    classes: Arc<Classes>,
    digits_max: usize,
    contractions: bool,
}

impl O200k {
    pub(crate) fn new(digits_max: usize, contractions: bool) -> Self {
        let builder = classes()
            .class(r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", UPPER)
            .class(r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", LOWER)
            .class(r"[\r\n/]", LINE_END);
        Self { classes: builder.build(), digits_max, contractions }
    }

    /// `UPPER*LOWER+|UPPER+LOWER*` at `at`, where one of them matches. The first wins where it can: `UPPER*` takes all
    /// it can and gives back only what `LOWER+` needs, the last character of the run that is both.
    #[inline]
    fn word(&self, text: &[u8], at: usize) -> usize {
        let classes = &*self.classes;
        let (mut end, mut after_both) = (at, at);
        while end < text.len() {
            let (class, length) = classes.at(text, end);
            if class & UPPER == 0 {
                if class & LOWER != 0 {
                    let end = ascii_lower_letters(text, end + length);
                    return self.contraction(text, classes.run(text, end, LOWER));
                }
                break;
            }
            end += length;
            if class & LOWER != 0 {
                after_both = end;
            }
        }
        self.contraction(text, if after_both > at { after_both } else { end })
    }

    #[inline]
    fn contraction(&self, text: &[u8], at: usize) -> usize {
        if self.contractions && text.get(at) == Some(&b'\'') { at + contraction(text, at) } else { at }
    }
}

impl Rule for O200k {
    #[inline]
    fn next(&self, text: &[u8], at: usize) -> usize {
        let classes = &*self.classes;
        let (class, length) = classes.at(text, at);
        let after = at + length;
        // A mark may be what stands before a word, or begin one: if no word follows, it is one.
        if class & (LETTER | NUMBER | NEWLINE) == 0 && after < text.len() {
            let (next, _) = classes.at(text, after);
            if next & (UPPER | LOWER) != 0 {
                return self.word_after(text, class, after);
            }
            if text[at] == b' ' && next & OTHER != 0 {
                return classes.run(text, classes.run(text, after, OTHER), LINE_END);
            }
        }
        if class & (UPPER | LOWER) != 0 {
            return self.word(text, at);
        }
        if class & NUMBER != 0 {
            return digits(classes, text, at, NUMBER, self.digits_max);
        }
        if class & OTHER != 0 {
            return classes.run(text, classes.run(text, after, OTHER), LINE_END);
        }
        white_space(classes, text, at, |_| false)
    }
}

impl O200k {
    /// The end of the word at `after`, before which stands a character of `class` that is no letter.
    #[inline]
    fn word_after(&self, text: &[u8], class: u8, after: usize) -> usize {
        if class & UPPER != 0 && !self.has_lower(text, after) {
            // `UPPER*LOWER+` fails behind the mark, and matches the mark itself before `UPPER+LOWER*` is tried.
            return self.contraction(text, after);
        }
        self.word(text, after)
    }

    /// Whether `UPPER*LOWER+` matches at `at`.
    fn has_lower(&self, text: &[u8], at: usize) -> bool {
        let mut end = at;
        while end < text.len() {
            let (class, length) = self.classes.at(text, end);
            if class & LOWER != 0 {
                return true;
            }
            if class & UPPER == 0 {
                return false;
            }
            end += length;
        }
        false
    }
}

/// Where the lower-case ASCII letters end.
#[inline]
fn ascii_lower_letters(text: &[u8], at: usize) -> usize {
    let letters = &text[at..ascii_letters(text, at)];
    at + letters.iter().position(u8::is_ascii_uppercase).unwrap_or(letters.len())
}
