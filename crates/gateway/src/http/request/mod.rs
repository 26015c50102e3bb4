//! From a body's bytes to what shall be generated and how it shall be answered.
//!
//! Start at [`parse`]; the two bodies are in [`chat`] and [`completions`], the fields that they share in [`common`].
//!
//! Invariants: unknown fields are ignored, as OpenAI does; a known field with a value that cannot be honoured is
//! refused by name, never silently ignored; nothing of the client's reaches an engine except through [`Spec`].

pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod completions;
pub(crate) mod fields;

use std::sync::Arc;

use forebay_types::{Sampling, TokenId};
use serde::Deserialize;
use serde_json::error::Category;

use super::errors::ApiError;

/// How the answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// One JSON document.
    Whole,
    /// Server-sent events.
    Stream {
        /// `stream_options.include_usage`: a last chunk with the counts.
        include_usage: bool,
    },
}

/// Everything about a request that does not depend on its prompt's length, checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spec {
    pub(crate) delivery: Delivery,
    /// `n`.
    pub(crate) choices: u32,
    /// 0 takes the most likely token.
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    /// 0 keeps all.
    pub(crate) top_k: u32,
    /// Absent: the gateway draws one.
    pub(crate) seed: Option<u64>,
    /// What the client asked for, and under which name.
    pub(crate) output_tokens_max: Option<(u32, &'static str)>,
    pub(crate) stop: Arc<[String]>,
    /// Besides the model's own, unless `ignore_eos`.
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) ignore_eos: bool,
    pub(crate) logprobs: Option<u8>,
}

/// What [`Spec::sampling`] must know of one prompt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lengths<'a> {
    /// Length of the prompt.
    pub(crate) prompt_tokens: usize,
    /// Longest sequence of the model.
    pub(crate) context_tokens_max: u32,
    /// Tokens to generate when the request does not say.
    pub(crate) output_tokens_default: u32,
    /// The prompt's field, for errors.
    pub(crate) prompt_param: &'a str,
}

impl Spec {
    /// How engines shall sample for one prompt.
    ///
    /// # Errors
    /// 400 if prompt and output cannot fit into the context; the message says both lengths.
    pub(crate) fn sampling(
        &self,
        lengths: Lengths<'_>,
        eos: &[TokenId],
        seed: u64,
    ) -> Result<Sampling, ApiError> {
        let Lengths { prompt_tokens, context_tokens_max, output_tokens_default, prompt_param } = lengths;
        let room = (context_tokens_max as usize).saturating_sub(prompt_tokens);
        let too_long = |message: String, param: &str| {
            Err(ApiError::invalid("context_length_exceeded", message).at(param.to_owned()))
        };
        if room == 0 {
            let message = format!(
                "the prompt has {prompt_tokens} tokens; this model's context is {context_tokens_max} tokens, prompt \
                 and output together; shorten the prompt"
            );
            return too_long(message, prompt_param);
        }
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        let output_tokens_max = match self.output_tokens_max {
            None => output_tokens_default.min(room),
            Some((wanted, _)) if wanted <= room => wanted,
            Some((wanted, param)) => {
                let message = format!(
                    "the prompt has {prompt_tokens} tokens and {param} asks for {wanted} more; this model's context \
                     is {context_tokens_max} tokens; shorten the prompt or lower {param} to at most {room}"
                );
                return too_long(message, param);
            }
        };
        let own = if self.ignore_eos { &[] } else { eos };
        Ok(Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            seed: self.seed.unwrap_or(seed),
            output_tokens_max,
            stop_tokens: own.iter().chain(&self.stop_token_ids).copied().collect(),
            logprobs: self.logprobs,
        })
    }
}

/// Reads a body.
///
/// Malformed JSON is told apart from a value of the wrong type, which is named by its path. The path costs a second
/// pass, paid only by bodies that failed the first.
///
/// # Errors
/// 400 with `invalid_json` or `invalid_type`.
pub(crate) fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    let parsed = serde_json::from_slice(body).map_err(|error| explain::<T>(body, &error))?;
    // serde also reads a struct from the list of its values, in the order of their declaration.
    if body.trim_ascii_start().first() == Some(&b'{') { Ok(parsed) } else { Err(not_an_object()) }
}

fn not_an_object() -> ApiError {
    ApiError::invalid("invalid_type", "the body must be a JSON object")
}

fn explain<'a, T: Deserialize<'a>>(body: &'a [u8], error: &serde_json::Error) -> ApiError {
    if body.is_empty() {
        return ApiError::invalid("invalid_json", "the body is empty; send a JSON object");
    }
    if body.starts_with("\u{feff}".as_bytes()) {
        let message = "the body begins with a byte-order mark; send UTF-8 without one";
        return ApiError::invalid("invalid_json", message);
    }
    // serde_json calls a number that fits no f64 a matter of syntax; it is one field's matter.
    let of_a_field =
        error.classify() == Category::Data || error.to_string().starts_with("number out of range");
    if !of_a_field {
        return ApiError::invalid("invalid_json", format!("the body is not valid JSON: {error}"));
    }
    let reason = in_words(&error.to_string());
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let path = match serde_path_to_error::deserialize::<_, T>(&mut deserializer) {
        Err(located) if located.path().iter().next().is_some() => located.path().to_string(),
        _ if body.trim_ascii_start().first() != Some(&b'{') => return not_an_object(),
        _ => return ApiError::invalid("invalid_type", reason),
    };
    let code =
        if reason.starts_with("missing field") { "missing_required_parameter" } else { "invalid_type" };
    ApiError::invalid(code, format!("{path}: {reason}")).at(path)
}

/// A reason for people who do not write Rust, bounded.
fn in_words(reason: &str) -> String {
    let reason =
        reason.replace("expected i64", "expected an integer").replace("expected f64", "expected a number");
    super::errors::abridged(&reason).into_owned()
}
