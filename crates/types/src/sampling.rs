//! How tokens are drawn and what comes out.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::TokenId;

/// How one request's tokens are drawn. The draw for a token is a function of (seed, choice, position) alone, so a
/// response can continue on another engine without a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probabilities reach this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: u32,
    /// Chosen by the client or drawn by the gateway; never absent, so that a retry repeats.
    pub seed: u64,
    /// Tokens to generate for each choice, at most.
    pub output_tokens_max: u32,
    /// Tokens that end a choice (the model's end-of-turn tokens unless the client ignores them).
    pub stop_tokens: Arc<[TokenId]>,
    /// `Some(k)`: report each token's log probability and those of the `k` most likely.
    pub logprobs: Option<u8>,
}

/// Log probabilities (natural logarithm, after temperature 1 softmax over the whole vocabulary) at one position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// Of the token that was drawn.
    pub chosen: f32,
    /// The most likely tokens, most likely first.
    pub top: Vec<(TokenId, f32)>,
}

/// One token as an engine drew it.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Which of the request's `n` answers, from 0.
    pub choice: u32,
    /// Index in the whole sequence, prompt included: the first generated token has the prompt's length.
    pub position: u32,
    /// The token.
    pub token: TokenId,
    /// Present if asked for. Boxed: most requests do not ask.
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token or stop string.
    Stop,
    /// The token limit or the model's context was reached.
    Length,
}

/// Which leg of a split request delivers the first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FirstToken {
    /// The prefill leg has; the decode leg goes on after it.
    Handed,
    /// The decode leg draws it itself; what the prefill leg drew is dropped.
    OfDecode,
}
