//! What engines are asked.
//!
//! In: tokens and how to sample, or a client's own body. Out: one JSON object. Start at [`TokenRequest`] and the function of
//! the route ([`completions`], [`vllm_generate`], [`sglang_generate`]); [`ClientEdits`] changes what must be changed in a
//! client's body and nothing else.
//!
//! Invariants: engines are told everything that bears on the draw, so that none of their own defaults does; a client's
//! values pass through byte for byte.

mod client;
mod tokens;

pub use client::{ClientEdits, SeveralChoices, rewrite};
pub use tokens::{completions, sglang_generate, vllm_generate};

use forebay_types::{Sampling, TokenId};
use serde::Serialize;
use serde_json::value::RawValue;

/// A request for tokens after tokens.
#[derive(Debug, Clone, Copy)]
pub struct TokenRequest<'a> {
    /// Unique among all requests of that engine; it is aborted by it.
    pub id: &'a str,
    /// The model's name as the engine knows it.
    pub model: &'a str,
    /// Not empty.
    pub prompt: &'a [TokenId],
    /// Answers to draw.
    pub choices: u32,
    /// How.
    pub sampling: &'a Sampling,
    /// Separates tenants in the engine's prefix cache.
    pub salt: Option<&'a str>,
    /// The rank, for engines that take it in a field.
    pub dp_rank: Option<u16>,
    /// What becomes of the KV.
    pub kv: Kv<'a>,
}

/// What becomes of a request's KV.
#[derive(Debug, Clone, Copy)]
pub enum Kv<'a> {
    /// Nothing: the engine computes the prompt and answers.
    Own,
    /// vLLM: compute the prompt, hold its KV for another engine. One token is drawn, the answer is one document.
    Export,
    /// vLLM: take the KV that these `kv_transfer_params` describe.
    Import(&'a RawValue),
    /// SGLang: meet the other engine there.
    Meet {
        /// Where.
        room: Room<'a>,
        /// In which part.
        part: Part,
    },
}

/// Where an SGLang pair meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room<'a> {
    /// The prefill server, as the decode server reaches it.
    pub host: &'a str,
    /// Its bootstrap port.
    pub port: u16,
    /// Unique to the request; less than 2^63.
    pub room: u64,
    /// The rank of the prefill server that computes the prompt.
    pub prefill_dp_rank: Option<u16>,
}

/// What an SGLang server does in a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// It computes the prompt. Its answer is one document, of no interest.
    Prefill,
    /// It goes on from there.
    Decode,
}

impl Kv<'_> {
    /// Whether the answer is events rather than one document.
    pub fn streams(&self) -> bool {
        !matches!(self, Self::Export | Self::Meet { part: Part::Prefill, .. })
    }
}

/// What asks vLLM to hold a prompt's KV.
#[derive(Debug, Clone, Copy, Serialize)]
struct ExportParams {
    do_remote_decode: bool,
    do_remote_prefill: bool,
}

const EXPORT: ExportParams = ExportParams { do_remote_decode: true, do_remote_prefill: false };

#[cfg(test)]
mod tests;
