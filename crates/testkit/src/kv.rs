//! What the doubles compute instead of attention: KV entries, and the token that follows them.
//!
//! In: the tokens of a request, and the KV entries that it really has. Out: KV entries for new tokens ([`Model::entry`])
//! and the next token ([`Model::next`]). Start at [`Model`].
//!
//! Always holds: an entry depends on every entry before it, so the same tokens give the same entries in any engine with
//! the same model, whatever its block size; and a request whose blocks hold another prompt's entries (or nothing)
//! continues with other tokens, under status 200, as a real engine does (captured in
//! `fixtures/vllm/nixl_pd/garbage_when_block_sizes_differ.json`).

use crate::tokenizer::{IM_END, Token};

/// The entry of a position that was never written.
pub(crate) const UNWRITTEN: u64 = 0;

/// Everything that a request's KV says so far, folded into one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Context(u64);

/// Stands for the weights: two engines with equal models give equal tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Model {
    weights: u64,
    /// One token in this many is the end token; 0 for never.
    eos_one_in: u64,
}

/// How a token is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Draw {
    /// Temperature 0: the context alone decides.
    Greedy,
    /// Any other temperature: the context and this state of the request's random generator.
    Sampled(u64),
}

impl Model {
    pub(crate) fn new(seed: u64, eos_one_in: u64) -> Self {
        Self { weights: mix(seed, 0x6d6f_6465_6c00), eos_one_in }
    }

    /// The same weights with an adapter (LoRA) on them: other KV, other tokens.
    pub(crate) fn with_adapter(self, name: &str) -> Self {
        let weights =
            name.bytes().fold(mix(self.weights, 0x6c6f_7261), |hash, byte| mix(hash, u64::from(byte)));
        Self { weights, ..self }
    }

    /// The context before the first token.
    pub(crate) fn start(&self) -> Context {
        Context(self.weights)
    }

    /// The KV entry of `token` after `context`.
    pub(crate) fn entry(&self, context: Context, token: Token) -> u64 {
        mix(context.0, u64::from(token) + 1) | 1
    }

    /// The context once attention has read `entry`.
    pub(crate) fn attend(&self, context: Context, entry: u64) -> Context {
        Context(mix(context.0, entry))
    }

    /// The token after `context`. `tail` is the text so far: a character of several bytes that was begun is completed,
    /// so that answers are valid UTF-8 and still split characters over tokens.
    pub(crate) fn next(&self, context: Context, tail: &[Token], draw: Draw, end_allowed: bool) -> Token {
        match tail {
            [.., 0xE2, 0x82] => return 0xAC, // the euro sign
            [.., 0xE2] => return 0x82,
            [.., 0xC3] => return 0x80 | Token::from((mix(context.0, 3) & 0x3F) as u8),
            _ => {}
        }
        let state = if let Draw::Sampled(state) = draw { state } else { 0 };
        let hash = mix(mix(context.0, state), 0x6e65_7874);
        if end_allowed && self.eos_one_in > 0 && hash.is_multiple_of(self.eos_one_in) {
            return IM_END;
        }
        match (hash >> 32) % 64 {
            0 => 0xC3,
            1 => 0xE2,
            2..=10 => Token::from(b' '),
            letter => Token::from(b'a') + (letter % 26) as Token,
        }
    }
}

/// One step of a mixing function: the finaliser of splitmix64 over both words.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(25) ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0xD1B5_4A32_D192_ED03);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fold(model: &Model, tokens: &[Token]) -> Context {
        tokens
            .iter()
            .fold(model.start(), |context, token| model.attend(context, model.entry(context, *token)))
    }

    #[test]
    fn the_same_tokens_give_the_same_continuation_and_others_do_not() {
        let (model, other) = (Model::new(1, 0), Model::new(2, 0));
        assert_eq!(fold(&model, b"abc".map(Token::from).as_slice()), fold(&model, &[97, 98, 99]));
        assert_ne!(fold(&model, &[97, 98, 99]), fold(&model, &[97, 99, 98]));
        assert_ne!(fold(&model, &[97]), fold(&other, &[97]));
        assert_ne!(fold(&model, &[97]), fold(&model.with_adapter("a"), &[97]));
    }

    #[test]
    fn a_wrong_entry_changes_what_follows() {
        let model = Model::new(1, 0);
        let right = fold(&model, &[1, 2, 3]);
        let wrong = model.attend(model.attend(model.attend(model.start(), 77), 78), 79);
        let continuation = |mut context: Context| -> Vec<Token> {
            let mut tokens = Vec::new();
            for _ in 0..16 {
                let token = model.next(context, &tokens, Draw::Greedy, true);
                context = model.attend(context, model.entry(context, token));
                tokens.push(token);
            }
            tokens
        };
        assert_ne!(continuation(right), continuation(wrong));
    }

    #[test]
    fn answers_are_valid_utf8_with_characters_over_several_tokens() {
        let model = Model::new(5, 0);
        let (mut context, mut bytes, mut tokens) = (model.start(), Vec::new(), Vec::new());
        for _ in 0..2000 {
            let token = model.next(context, &tokens, Draw::Greedy, true);
            context = model.attend(context, model.entry(context, token));
            bytes.push(u8::try_from(token).expect("only bytes without end tokens"));
            tokens.push(token);
        }
        while !matches!(bytes.last(), Some(0..0x80)) {
            bytes.pop();
        }
        let text = String::from_utf8(bytes).expect("valid UTF-8");
        assert!(text.contains('€') && text.chars().any(|c| ('À'..='ÿ').contains(&c)), "{text}");
    }
}
