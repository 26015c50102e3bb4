//! What engines answer: chunks of tokens, counts, complaints.
//!
//! In: the data of one event, or a whole document. Out: a [`Chunk`] in one shape for all engines, borrowed where it can
//! be. Start at [`TokenReader`] for answers in tokens; [`glance`] finds what matters in an answer that is passed on
//! unread; [`Fault`] is what an engine says instead of an answer.
//!
//! Invariants: unknown fields are ignored, fields that are read must be what they should be; a chunk of few tokens without
//! log probabilities allocates nothing.

mod completions;
mod fault;
mod generate;
mod glance;
mod ids;
mod sglang;

use forebay_types::{FinishReason, TokenId, TokenLogprobs};
use serde::{Deserialize, Deserializer, de};
use smallvec::SmallVec;

pub use fault::{Fault, is_full, message_of};
pub use glance::{Glance, glance};
pub use ids::PromptEcho;

use sglang::SglangReader;

/// The data of the event that ends a stream.
const DONE: &str = "[DONE]";

/// Whether an event's data is the end of the stream.
pub fn is_done(data: &str) -> bool {
    data.trim() == DONE
}

/// One event of an answer in tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chunk<'a> {
    /// What choices grew by.
    pub deltas: SmallVec<[Delta; 1]>,
    /// The engine's count, where the event has one.
    pub usage: Option<Usage>,
    /// The engine says that there is no (whole) answer.
    pub fault: Option<Fault>,
    /// The prompt as the engine read it.
    pub prompt: Option<PromptEcho<'a>>,
}

impl Chunk<'_> {
    /// What a document that should have been a stream complains about, if it does.
    pub fn fault_of(body: &[u8]) -> Option<Fault> {
        std::str::from_utf8(body).ok().and_then(Fault::in_document)
    }
}

/// What one choice grew by.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Which of the engine's choices, from 0.
    pub index: u32,
    /// Its new tokens; a stop token is one of them.
    pub tokens: SmallVec<[TokenId; 8]>,
    /// Of each new token, if asked for; else empty.
    pub logprobs: Vec<TokenLogprobs>,
    /// Nothing follows.
    pub finish: Option<FinishReason>,
}

/// An engine's count of an answer. What it does not say is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(from = "RawUsage")]
pub struct Usage {
    /// Length of the prompt.
    pub prompt_tokens: Option<u32>,
    /// Of those, from a prefix cache.
    pub cached_tokens: Option<u32>,
    /// Generated.
    pub output_tokens: Option<u32>,
}

/// What is wrong with an answer in tokens: the engine does not keep to its own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// It cannot be read. The place is told, what stands there is not: it may be somebody's text.
    #[error("an event cannot be read: {kind} at column {column}")]
    Unreadable {
        /// `no JSON`, `cut off`, `of an unexpected shape`.
        kind: &'static str,
        /// Where in the event's data.
        column: usize,
    },
    /// It is neither tokens nor a count nor an error.
    #[error("an event is neither tokens nor a count nor an error")]
    Unexpected,
    /// A choice came without token ids.
    #[error("a choice came without token ids")]
    NoTokenIds,
    /// Log probabilities were asked for and are not there, or not for each token.
    #[error("log probabilities are missing")]
    NoLogprobs,
    /// The engine's count of tokens contradicts the tokens.
    #[error("{ids} token ids after {known} do not add up to {total}")]
    Count {
        /// Ids in the event.
        ids: usize,
        /// Tokens before it.
        known: u32,
        /// What the engine says that there are.
        total: u32,
    },
    /// A choice ended for a reason that is not known.
    #[error("a choice ended for an unknown reason")]
    UnknownFinish,
}

impl AnswerError {
    fn json(error: &serde_json::Error) -> Self {
        use serde_json::error::Category;
        let kind = match error.classify() {
            Category::Io | Category::Syntax => "no JSON",
            Category::Eof => "cut off",
            Category::Data => "of an unexpected shape",
        };
        Self::Unreadable { kind, column: error.column() }
    }
}

/// Reads the events of one answer in tokens.
#[derive(Debug)]
pub struct TokenReader {
    /// How many of the most likely tokens were asked for with each.
    logprobs: Option<u8>,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Completions,
    Generate,
    Sglang(SglangReader),
}

impl TokenReader {
    /// Of `/v1/completions` with `return_token_ids`. `logprobs` as it was asked for.
    pub fn completions(logprobs: Option<u8>) -> Self {
        Self { logprobs, form: Form::Completions }
    }

    /// Of vLLM's `/inference/v1/generate`.
    pub fn vllm_generate(logprobs: Option<u8>) -> Self {
        Self { logprobs, form: Form::Generate }
    }

    /// Of SGLang's `/generate`.
    pub fn sglang_generate(logprobs: Option<u8>) -> Self {
        Self { logprobs, form: Form::Sglang(SglangReader::default()) }
    }

    /// Reads one event that is not the end ([`is_done`]).
    ///
    /// # Errors
    /// What is wrong with it. Nothing more of this answer can be believed.
    pub fn read<'a>(&mut self, data: &'a str) -> Result<Chunk<'a>, AnswerError> {
        match &mut self.form {
            Form::Completions => completions::read(data, self.logprobs),
            Form::Generate => generate::read(data, self.logprobs),
            Form::Sglang(reader) => reader.read(data, self.logprobs),
        }
    }
}

/// The most likely of several tokens, in order, `k` at most.
fn top(mut tokens: Vec<(TokenId, f32)>, k: u8) -> Vec<(TokenId, f32)> {
    tokens.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    tokens.truncate(usize::from(k));
    tokens
}

/// What engines send for a probability of nothing, and what stands here where they send `null`.
const LOGPROB_MIN: f32 = -9999.0;

#[derive(Deserialize)]
struct RawUsage {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    prompt_tokens_details: Option<RawDetails>,
}

#[derive(Deserialize)]
struct RawDetails {
    cached_tokens: Option<u32>,
}

impl From<RawUsage> for Usage {
    fn from(raw: RawUsage) -> Self {
        let RawUsage { prompt_tokens, completion_tokens, prompt_tokens_details } = raw;
        let cached_tokens = prompt_tokens_details.and_then(|details| details.cached_tokens);
        Self { prompt_tokens, cached_tokens, output_tokens: completion_tokens }
    }
}

/// `finish_reason` as vLLM and OpenAI write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finish {
    Ended(FinishReason),
    /// The engine gave up: `abort`, `error`.
    Failed,
    Unknown,
}

impl<'de> Deserialize<'de> for Finish {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Finish;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a finish reason")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Finish, E> {
                Ok(Finish::named(text))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

impl Finish {
    fn named(text: &str) -> Self {
        match text {
            // `repetition` is vLLM's, for a check that is off unless asked for.
            "stop" | "repetition" => Self::Ended(FinishReason::Stop),
            "length" => Self::Ended(FinishReason::Length),
            "abort" | "error" => Self::Failed,
            _ => Self::Unknown,
        }
    }

    /// The reason, or the fault that it is.
    fn reason(this: Option<Self>, fault: &mut Option<Fault>) -> Result<Option<FinishReason>, AnswerError> {
        match this {
            None => Ok(None),
            Some(Self::Ended(reason)) => Ok(Some(reason)),
            Some(Self::Unknown) => Err(AnswerError::UnknownFinish),
            Some(Self::Failed) => {
                fault.get_or_insert_with(|| Fault::new(None, "the engine gave the request up"));
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests;
