//! From a body's bytes to what shall be generated.
//!
//! In: the body of `/v1/completions` or `/v1/chat/completions`. Out: a [`Spec`], checked, and the prompts. Start at
//! [`completions`] and [`chat`].
//!
//! Invariants: unknown fields are ignored, as vLLM does; a known field that this server cannot honour is refused by
//! name. (vLLM honours more: penalties, grammars, logit bias, `best_of`, media.)

mod fields;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use forebay_text::{Conversation, Message, StopMatcher};
use forebay_types::TokenId;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

pub(crate) use self::fields::Prompt;
use self::fields::{OneOrMany, Prompts, seed};
use crate::{
    errors::ApiError,
    hand_over::Transfer,
    options::{HttpLimits, ModelText},
};

/// Ids in `stop_token_ids`.
const STOP_TOKEN_IDS_MAX: usize = 256;
/// Alternatives for each token. vLLM's default bound too.
const LOGPROBS_MAX: u8 = 20;
/// Tokens of a completion whose request names no limit, as vLLM has it.
const COMPLETION_TOKENS_DEFAULT: u32 = 16;
/// Bytes of `cache_salt`.
const SALT_BYTES_MAX: usize = 1_024;
/// Below this vLLM samples greedily too.
const TEMPERATURE_MIN: f32 = 1e-5;

/// Everything about a request but its prompts, checked.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) delivery: Delivery,
    /// `n`.
    pub(crate) choices: u32,
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    /// 0 keeps all.
    pub(crate) top_k: u32,
    pub(crate) seed: Option<u64>,
    /// `None`: as many as the context holds.
    pub(crate) output_tokens_max: Option<u32>,
    pub(crate) stop: Option<StopStrings>,
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) ignore_eos: bool,
    pub(crate) logprobs: Option<u8>,
    pub(crate) return_token_ids: bool,
    /// `cache_salt`; empty for none.
    pub(crate) salt: Arc<str>,
    pub(crate) transfer: Transfer,
}

/// Stop strings, and what finds them.
#[derive(Debug, Clone)]
pub(crate) struct StopStrings {
    /// An unused one, to be cloned for every choice.
    pub(crate) matcher: StopMatcher,
    /// For `stop_reason`.
    pub(crate) strings: Arc<[String]>,
}

/// How the answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    Whole,
    Stream {
        /// `stream_options.include_usage`.
        include_usage: bool,
    },
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
}

/// What both bodies have. All optional, and `null` means absent.
#[derive(Debug, Default, Deserialize)]
struct Shared {
    model: Option<String>,
    n: Option<u32>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    #[serde(default, deserialize_with = "seed")]
    seed: Option<u64>,
    stop: Option<OneOrMany>,
    stop_token_ids: Option<Vec<TokenId>>,
    ignore_eos: Option<bool>,
    min_tokens: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    return_token_ids: Option<bool>,
    cache_salt: Option<String>,
    kv_transfer_params: Option<Box<RawValue>>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    min_p: Option<f64>,
    logit_bias: Option<BTreeMap<String, IgnoredAny>>,
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<IgnoredAny>,
    include_stop_str_in_output: Option<bool>,
    echo: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct CompletionsBody {
    prompt: Option<Prompts>,
    logprobs: Option<u8>,
    suffix: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ChatBody<'a> {
    #[serde(borrow)]
    messages: Vec<Message<'a>>,
    logprobs: Option<bool>,
    top_logprobs: Option<u8>,
    #[serde(borrow)]
    tools: Option<&'a RawValue>,
    tool_choice: Option<serde_json::Value>,
    #[serde(borrow)]
    chat_template_kwargs: Option<&'a RawValue>,
    add_generation_prompt: Option<bool>,
}

/// The body of `/v1/completions`.
///
/// # Errors
/// 400 or 404, naming the field.
pub(crate) fn completions(
    body: &[u8],
    model: &str,
    limits: &HttpLimits,
) -> Result<(Spec, Vec<Prompt>), ApiError> {
    let own: CompletionsBody = parse(body)?;
    let shared: Shared = parse(body)?;
    if own.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::field("suffix", "suffix is not supported"));
    }
    let Some(prompts) = own.prompt else { return Err(ApiError::field("prompt", "prompt is missing")) };
    let prompts = prompts.into_vec();
    let mut spec = check(shared, own.logprobs, model, limits)?;
    spec.output_tokens_max = spec.output_tokens_max.or(Some(COMPLETION_TOKENS_DEFAULT));
    let sequences = prompts.len() * spec.choices as usize;
    if prompts.is_empty() || sequences > limits.sequences_max {
        let most = limits.sequences_max;
        return Err(ApiError::field("prompt", format!("prompts times n are {sequences}; send 1 to {most}")));
    }
    if prompts.len() > 1 && !matches!(spec.transfer, Transfer::None) {
        return Err(ApiError::field("kv_transfer_params", "kv_transfer_params need a single prompt"));
    }
    Ok((spec, prompts))
}

/// The body of `/v1/chat/completions`, its messages rendered.
///
/// # Errors
/// 400 or 404, naming the field.
pub(crate) fn chat(
    body: &[u8],
    model: &str,
    text: &ModelText,
    limits: &HttpLimits,
) -> Result<(Spec, String), ApiError> {
    let own: ChatBody<'_> = parse(body)?;
    let shared: Shared = parse(body)?;
    let logprobs = match (own.logprobs.unwrap_or(false), own.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(ApiError::field("top_logprobs", "top_logprobs needs `logprobs: true`"));
        }
    };
    let tools = match own.tool_choice.as_ref().map(serde_json::Value::as_str) {
        None | Some(Some("auto")) => own.tools,
        Some(Some("none")) => None,
        Some(_) => {
            return Err(ApiError::field(
                "tool_choice",
                "tool_choice other than auto and none is not supported",
            ));
        }
    };
    let spec = check(shared, logprobs, model, limits)?;
    let conversation = Conversation {
        messages: &own.messages,
        tools,
        add_generation_prompt: own.add_generation_prompt.unwrap_or(true),
        extra: own.chat_template_kwargs,
        now: None,
    };
    let prompt = text
        .template
        .render(&conversation)
        .map_err(|error| ApiError::field("messages", error.to_string()))?;
    Ok((spec, prompt))
}

/// Reads a body.
///
/// # Errors
/// 400 in serde's words.
pub(crate) fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    // serde also reads a struct from the list of its values.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(ApiError::bad("the body must be a JSON object"));
    }
    serde_json::from_slice(body).map_err(|error| ApiError::bad(format!("the body cannot be read: {error}")))
}

fn check(shared: Shared, logprobs: Option<u8>, model: &str, limits: &HttpLimits) -> Result<Spec, ApiError> {
    refuse_unsupported(&shared)?;
    if let Some(named) = shared.model.as_deref().filter(|named| *named != model) {
        return Err(ApiError::unknown_model(named));
    }
    let transfer = Transfer::parse(shared.kv_transfer_params.as_deref())?;
    let delivery = delivery(&shared, &transfer)?;
    let choices = shared.n.unwrap_or(1);
    if !(1..=limits.choices_max).contains(&choices) {
        return Err(ApiError::field("n", format!("n is {choices}; it must be 1 to {}", limits.choices_max)));
    }
    let output_tokens_max = shared.max_completion_tokens.or(shared.max_tokens);
    if output_tokens_max == Some(0) {
        return Err(ApiError::field("max_tokens", "max_tokens must be at least 1"));
    }
    if matches!(transfer, Transfer::Hold) && output_tokens_max != Some(1) {
        let message = "a prefill leg (do_remote_decode) draws one token here; send max_tokens 1";
        return Err(ApiError::field("max_tokens", message));
    }
    let temperature = shared.temperature.unwrap_or(1.0);
    let top_p = shared.top_p.unwrap_or(1.0);
    if !(0.0..=2.0).contains(&temperature) {
        return Err(ApiError::field("temperature", "temperature must be 0 to 2"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(ApiError::field("top_p", "top_p must be above 0 and at most 1"));
    }
    let top_k = match shared.top_k.unwrap_or(0) {
        -1 => 0, // another way to say "all"
        k => u32::try_from(k).map_err(|_| ApiError::field("top_k", "top_k must be -1 or more"))?,
    };
    if logprobs.is_some_and(|count| count > LOGPROBS_MAX) {
        return Err(ApiError::field(
            "logprobs",
            format!("at most {LOGPROBS_MAX} log probabilities are given"),
        ));
    }
    let salt = shared.cache_salt.unwrap_or_default();
    if salt.len() > SALT_BYTES_MAX {
        return Err(ApiError::field(
            "cache_salt",
            format!("cache_salt has more than {SALT_BYTES_MAX} bytes"),
        ));
    }
    let stop_token_ids = shared.stop_token_ids.unwrap_or_default();
    if stop_token_ids.len() > STOP_TOKEN_IDS_MAX {
        return Err(ApiError::field("stop_token_ids", format!("give at most {STOP_TOKEN_IDS_MAX} ids")));
    }
    let stop = stop(shared.stop)?;
    let ignore_eos = shared.ignore_eos.unwrap_or(false);
    let ends_early = !ignore_eos || stop.is_some() || !stop_token_ids.is_empty();
    if shared.min_tokens.is_some_and(|least| least > 0 && ends_early) {
        let message = "min_tokens needs ignore_eos, and neither stop nor stop_token_ids, here";
        return Err(ApiError::field("min_tokens", message));
    }
    Ok(Spec {
        delivery,
        choices,
        temperature: if temperature < TEMPERATURE_MIN { 0.0 } else { temperature },
        top_p,
        top_k,
        seed: shared.seed,
        output_tokens_max,
        stop,
        stop_token_ids,
        ignore_eos,
        logprobs,
        return_token_ids: shared.return_token_ids.unwrap_or(false),
        salt: salt.into(),
        transfer,
    })
}

fn delivery(shared: &Shared, transfer: &Transfer) -> Result<Delivery, ApiError> {
    match (shared.stream.unwrap_or(false), &shared.stream_options) {
        // vLLM's chunks have no place for the parameters that a prefill leg answers.
        (true, _) if matches!(transfer, Transfer::Hold) => {
            Err(ApiError::field("stream", "a prefill leg (do_remote_decode) is not streamed"))
        }
        (true, options) => {
            let include_usage = options.as_ref().and_then(|options| options.include_usage).unwrap_or(false);
            Ok(Delivery::Stream { include_usage })
        }
        (false, None) => Ok(Delivery::Whole),
        (false, Some(_)) => Err(ApiError::field("stream_options", "stream_options needs `stream: true`")),
    }
}

fn stop(given: Option<OneOrMany>) -> Result<Option<StopStrings>, ApiError> {
    let strings: Arc<[String]> = given.map(OneOrMany::into_vec).unwrap_or_default().into();
    if strings.is_empty() {
        return Ok(None);
    }
    let matcher = StopMatcher::new(&strings).map_err(|error| ApiError::field("stop", error.to_string()))?;
    Ok(Some(StopStrings { matcher, strings }))
}

/// Fields that change the answer and that in-process engines cannot honour, unless their value changes nothing.
fn refuse_unsupported(shared: &Shared) -> Result<(), ApiError> {
    let neutral = [
        ("presence_penalty", shared.presence_penalty, 0.0),
        ("frequency_penalty", shared.frequency_penalty, 0.0),
        ("repetition_penalty", shared.repetition_penalty, 1.0),
        ("min_p", shared.min_p, 0.0),
    ];
    let refused = |field: &'static str| Err(ApiError::field(field, format!("{field} is not supported here")));
    for (field, value, neutral) in neutral {
        if value.is_some_and(|value| value != neutral) {
            return refused(field);
        }
    }
    if shared.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty()) {
        return refused("logit_bias");
    }
    if shared.response_format.as_ref().is_some_and(|format| format.kind != "text") {
        return refused("response_format");
    }
    if shared.structured_outputs.is_some() {
        return refused("structured_outputs");
    }
    if shared.include_stop_str_in_output == Some(true) {
        return refused("include_stop_str_in_output");
    }
    if shared.echo == Some(true) {
        return refused("echo");
    }
    Ok(())
}
