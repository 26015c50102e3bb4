//! GPT-2's rule, with or without single digits split off before (SmolLM, StarCoder).

use std::sync::Arc;

use super::{LETTER, NUMBER, OTHER, Rule, SPACE, classes, white_space_alone};
use crate::unicode::{Classes, ascii_letters};

/// A character that is a piece of its own before the pattern sees text.
const DIGIT: u8 = 1 << 5;

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
#[derive(Debug)]
pub(crate) struct Gpt2 {
    classes: Arc<Classes>,
}

impl Gpt2 {
    /// `single_digits`: the `Digits` step of `tokenizers` comes first, which asks Rust what is numeric.
    pub(crate) fn new(single_digits: bool) -> Self {
        let digits = |character: char, flags| if character.is_numeric() { DIGIT } else { flags };
        let builder = classes();
        Self { classes: if single_digits { builder.map(digits) } else { builder }.build() }
    }
}

impl Rule for Gpt2 {
    #[inline]
    fn next(&self, text: &[u8], at: usize) -> usize {
        let classes = &*self.classes;
        let (class, length) = classes.at(text, at);
        if class & DIGIT != 0 {
            return at + length;
        }
        if text[at] == b'\'' {
            let length = contraction(text, at);
            if length > 0 {
                return at + length;
            }
        }
        let (mut class, mut after) = (class, at + length);
        if text[at] == b' ' && after < text.len() {
            let (next, length) = classes.at(text, after);
            if next & (LETTER | NUMBER | OTHER) != 0 {
                (class, after) = (next, after + length);
            }
        }
        if class & LETTER != 0 {
            return classes.run(text, ascii_letters(text, after), LETTER);
        }
        if class & SPACE != 0 {
            return white_space_alone(classes, text, at, |next| next & DIGIT != 0);
        }
        classes.run(text, after, class & (NUMBER | OTHER))
    }
}

/// The length of `'s|'t|'re|'ve|'m|'ll|'d` at `at`; 0 if it does not match.
#[inline]
fn contraction(text: &[u8], at: usize) -> usize {
    match (text.get(at + 1), text.get(at + 2)) {
        (Some(b's' | b't' | b'm' | b'd'), _) => 2,
        (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => 3,
        _ => 0,
    }
}
