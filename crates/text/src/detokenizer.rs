//! Tokens to text, one token at a time.
//!
//! In: the tokens of one choice, in order. Out: the text that they complete. Start at [`Detokenizer::push`].
//!
//! Invariants: what was released is whole characters; released text plus [`Detokenizer::finish`] equals
//! `String::from_utf8_lossy` of the bytes of all tokens that are not special.

#[cfg(test)]
mod tests;

use std::str;

use forebay_types::TokenId;

use crate::Tokenizer;

/// The longest beginning of a UTF-8 character that is not yet the character.
const HELD_BYTES_MAX: usize = 3;

/// Turns the tokens of one choice into text as they arrive. Byte-level tokens may end anywhere inside a character, so
/// up to three bytes are held back until the next token shows what they are.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    held: [u8; HELD_BYTES_MAX],
    held_len: usize,
}

impl Detokenizer {
    /// A detokenizer at the beginning of an answer.
    pub fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, held: [0; HELD_BYTES_MAX], held_len: 0 }
    }

    /// Appends to `out` the text that `token` completes: possibly none. Special tokens and ids outside the vocabulary
    /// have no text. O(bytes of the token).
    pub fn push(&mut self, token: TokenId, out: &mut String) {
        if self.tokenizer.is_special(token) {
            return;
        }
        let Self { tokenizer, held, held_len } = self;
        push_bytes(held, held_len, tokenizer.token_bytes(token), out);
    }

    /// Ends the answer: a character that never became whole is one U+FFFD. The detokenizer is as new afterwards.
    pub fn finish(&mut self, out: &mut String) {
        if self.held_len > 0 {
            out.push(char::REPLACEMENT_CHARACTER);
            self.held_len = 0;
        }
    }
}

fn push_bytes(held: &mut [u8; HELD_BYTES_MAX], held_len: &mut usize, bytes: &[u8], out: &mut String) {
    let mut rest = bytes;
    while *held_len > 0 {
        let Some((&next, after)) = rest.split_first() else { return };
        let mut candidate = [0; HELD_BYTES_MAX + 1];
        candidate[..*held_len].copy_from_slice(&held[..*held_len]);
        candidate[*held_len] = next;
        match str::from_utf8(&candidate[..=*held_len]) {
            Ok(character) => {
                out.push_str(character);
                *held_len = 0;
                rest = after;
            }
            Err(error) if error.error_len().is_none() => {
                held[*held_len] = next;
                *held_len += 1;
                rest = after;
            }
            // `next` does not continue what is held, so that was no character; `next` itself is looked at afresh.
            Err(_) => {
                out.push(char::REPLACEMENT_CHARACTER);
                *held_len = 0;
            }
        }
    }
    for chunk in rest.utf8_chunks() {
        out.push_str(chunk.valid());
        let invalid = chunk.invalid();
        let at_end = invalid.as_ptr_range().end == rest.as_ptr_range().end;
        if at_end && is_beginning(invalid) {
            held[..invalid.len()].copy_from_slice(invalid);
            *held_len = invalid.len();
        } else if !invalid.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Whether more bytes could make `bytes` a character.
fn is_beginning(bytes: &[u8]) -> bool {
    !bytes.is_empty() && matches!(str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}
