//! What prompts are made of: pieces with a name each, whose tokens follow from the name.
//!
//! Nobody stores tokens: a prompt is written out when it is sent, and the token that a model "draws" at a position is
//! that of the piece which the next turn of the conversation will send for it. So equal names give equal blocks, on
//! every engine and in every run.

use std::sync::Arc;

use forebay_types::TokenId;

use crate::draw::mix;

/// A run of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Equal names, equal tokens.
    pub name: u64,
    /// How many.
    pub tokens: u32,
}

/// Keeps pieces of different kinds apart.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    System = 1,
    User,
    Answer,
    TraceBlock,
}

/// A piece's name, from its kind and two numbers of the workload.
pub(crate) fn name(kind: Kind, first: u64, second: u64) -> u64 {
    mix(mix(mix(kind as u64) ^ first) ^ second)
}

/// Tokens that one drawn number gives.
const TOKENS_PER_NUMBER: u32 = 3;
/// As a vocabulary has.
const TOKEN_BITS: u32 = 17;

/// The token at `index` of a piece.
pub(crate) fn token(name: u64, index: u32) -> TokenId {
    nth(number(name, index / TOKENS_PER_NUMBER), index % TOKENS_PER_NUMBER)
}

fn number(name: u64, index: u32) -> u64 {
    mix(name ^ u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn nth(number: u64, place: u32) -> TokenId {
    ((number >> (TOKEN_BITS * place)) & ((1 << TOKEN_BITS) - 1)) as TokenId
}

/// A prompt written out.
pub(crate) fn write<'a>(pieces: impl Iterator<Item = &'a Piece> + Clone) -> Arc<[TokenId]> {
    let all: u32 = pieces.clone().map(|piece| piece.tokens).sum();
    // Of known length, so that it is written where it stays.
    let mut prompt: Arc<[TokenId]> = std::iter::repeat_n(0, all as usize).collect();
    let mut rest = Arc::get_mut(&mut prompt).expect("nobody else has it yet");
    for piece in pieces {
        let tokens = rest.split_off_mut(..piece.tokens as usize).expect("counted above");
        for (index, tokens) in (0..).zip(tokens.chunks_mut(TOKENS_PER_NUMBER as usize)) {
            let number = number(piece.name, index);
            for (place, token) in (0..).zip(tokens) {
                *token = nth(number, place);
            }
        }
    }
    prompt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_give_equal_tokens_and_others_do_not() {
        let piece = |name| Piece { name, tokens: 64 };
        let a = write([piece(1), piece(2)].iter());
        let b = write([piece(1), piece(3)].iter());
        assert_eq!(a[..64], b[..64]);
        assert_ne!(a[64..], b[64..]);
        assert_eq!(a[64], token(2, 0));
        let whole: Vec<TokenId> = (0..64).map(|index| token(2, index)).collect();
        assert_eq!(a[64..], whole);
        let parts = write([Piece { name: 2, tokens: 7 }, piece(2)].iter());
        assert_eq!((parts.len(), &parts[..7], &parts[7..]), (71, &whole[..7], &whole[..]));
        assert_ne!(name(Kind::User, 1, 2), name(Kind::Answer, 1, 2));
        assert_ne!(name(Kind::User, 1, 2), name(Kind::User, 2, 1));
    }
}
