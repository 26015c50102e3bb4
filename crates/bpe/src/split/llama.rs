//! The rule of Llama 3 and of Qwen 2 and 3, which differ in how many digits make a word.

use std::sync::Arc;

use super::{LETTER, NEWLINE, NUMBER, OTHER, Rule, classes, contraction, digits, white_space};
use crate::unicode::{Classes, ascii_letters};

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
#[derive(Debug)]
pub(crate) struct Llama {
    classes: Arc<Classes>,
    digits_max: usize,
}

impl Llama {
    pub(crate) fn new(digits_max: usize) -> Self {
        Self { classes: classes().build(), digits_max }
    }
}

impl Rule for Llama {
    #[inline]
    fn next(&self, text: &[u8], at: usize) -> usize {
        let classes = &*self.classes;
        let letters = |from| classes.run(text, ascii_letters(text, from), LETTER);
        let others = |from| classes.run(text, classes.run(text, from, OTHER), NEWLINE);
        let (class, length) = classes.at(text, at);
        let after = at + length;
        if class & LETTER != 0 {
            return letters(after);
        }
        if text[at] == b'\'' {
            let length = contraction(text, at);
            if length > 0 {
                return at + length;
            }
        }
        if class & (NUMBER | NEWLINE) == 0 && after < text.len() {
            let (next, length) = classes.at(text, after);
            if next & LETTER != 0 {
                return letters(after + length);
            }
            if text[at] == b' ' && next & OTHER != 0 {
                return others(after + length);
            }
        }
        if class & NUMBER != 0 {
            return digits(classes, text, at, NUMBER, self.digits_max);
        }
        if class & OTHER != 0 {
            return others(after);
        }
        white_space(classes, text, at, |_| false)
    }
}
