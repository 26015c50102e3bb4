//! Reads the bodies of the three ways to ask SGLang for tokens, and refuses what SGLang refuses.
//!
//! In: a JSON body, headers and the server's options. Out: an [`Asked`], or the error that SGLang would answer.
//!
//! Evidence: SGLang 0.5.23's `managers/io_struct.py`, `managers/tokenizer_manager.py`, `entrypoints/request_headers.py`,
//! `entrypoints/openai/protocol.py`. Not modelled: batches, media, sessions, grammar, penalties.

use axum::http::HeaderMap;
use serde_json::Value;

use crate::api::error::ApiError;
use crate::api::fields::Fields;
use crate::api::text::TextOptions;
use crate::api::{Ask, header};
use crate::engine::request::{Room, Sampling, Transfer};
use crate::sglang::bootstrap::FAKE_HOST;
use crate::sglang::options::{SglangMode, SglangOptions};
use crate::tokenizer::{self, Token};

/// `max_new_tokens` of `/generate` if it is not given.
const NATIVE_TOKENS: i64 = 128;
/// `max_tokens` of `/v1/completions` if it is not given.
const COMPLETION_TOKENS: i64 = 16;
/// `--disaggregation-bootstrap-port` if a request names a host alone.
const BOOTSTRAP_PORT: i64 = 8998;

/// An [`Ask`] with what only SGLang has.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) ask: Ask,
    pub(crate) rank: Option<i64>,
    pub(crate) has_room: bool,
}

/// `/generate`.
pub(super) fn native(body: &Value, headers: &HeaderMap, options: &SglangOptions) -> Result<Asked, ApiError> {
    let fields = Fields::of(body)?;
    let prompt = native_prompt(&fields)?;
    let empty = serde_json::Map::new();
    let sampling = fields.object("sampling_params")?.unwrap_or(&empty);
    let sampling = Fields::nested(sampling, "body.sampling_params");
    let max_tokens = sampling.int("max_new_tokens")?.unwrap_or(NATIVE_TOKENS);
    let min_tokens = sampling.int("min_new_tokens")?.unwrap_or(0);
    let mut ask = common(&fields, &sampling, "sampling_seed", options)?;
    ask.request_id = fields.text("rid")?;
    ask.adapter = fields.text("lora_path")?;
    ask.logprobs = fields.flag("return_logprob")?.then_some(0);
    ask.text.include_stop = sampling.flag("no_stop_trim")?;
    ask.sampling.min_tokens = min_tokens.max(0) as usize;
    ask.prompts = vec![prompt];
    limits(&mut ask, Some(max_tokens), options)?;
    let rank = fields.int("routed_dp_rank")?.or(fields.int("data_parallel_rank")?);
    route(ask, rank, &fields, headers, options)
}

/// `/v1/completions`.
pub(super) fn completion(
    body: &Value,
    headers: &HeaderMap,
    options: &SglangOptions,
) -> Result<Asked, ApiError> {
    let fields = Fields::of(body)?;
    let prompt = match fields.get("prompt") {
        Some(Value::String(text)) if !text.is_empty() => tokenizer::encode(text),
        Some(Value::Array(_)) => fields.tokens("prompt")?.unwrap_or_default(),
        _ => return Err(ApiError::invalid("Prompt cannot be empty")),
    };
    let max_tokens = fields.int("max_tokens")?.unwrap_or(COMPLETION_TOKENS);
    let mut ask = common(&fields, &fields, "seed", options)?;
    ask.echo = fields.flag("echo")?;
    ask.logprobs = fields.int("logprobs")?.map(|top| top.max(0) as usize);
    ask.prompts = vec![prompt];
    limits(&mut ask, Some(max_tokens), options)?;
    openai(ask, &fields, headers, options)
}

/// `/v1/chat/completions`.
pub(super) fn chat(body: &Value, headers: &HeaderMap, options: &SglangOptions) -> Result<Asked, ApiError> {
    let fields = Fields::of(body)?;
    let messages = crate::api::fields::chat_messages(&fields)?;
    let max_tokens = fields.int("max_completion_tokens")?.or(fields.int("max_tokens")?);
    let mut ask = common(&fields, &fields, "seed", options)?;
    ask.logprobs = fields.flag("logprobs")?.then_some(0);
    ask.prompts = vec![tokenizer::encode(&tokenizer::render_chat(&messages, true))];
    limits(&mut ask, max_tokens, options)?;
    openai(ask, &fields, headers, options)
}

fn openai(
    mut ask: Ask,
    fields: &Fields<'_>,
    headers: &HeaderMap,
    options: &SglangOptions,
) -> Result<Asked, ApiError> {
    ask.model = fields.text("model")?.unwrap_or_else(|| options.model.clone());
    // `model:adapter` names an adapter; any other model name is accepted as it is.
    ask.adapter =
        ask.model.split_once(':').map(|(_, adapter)| adapter.to_owned()).or(fields.text("lora_path")?);
    ask.return_token_ids = fields.flag("return_token_ids")?;
    let body_rank = fields.int("routed_dp_rank")?.or(fields.int("data_parallel_rank")?);
    let rank = match header(headers, "x-data-parallel-rank") {
        None => body_rank,
        Some(text) => Some(text.parse::<i64>().map_err(|_| {
            ApiError::invalid(format!(
                "Invalid X-Data-Parallel-Rank header: must be an integer, got '{text}'"
            ))
        })?),
    };
    route(ask, rank, fields, headers, options)
}

fn native_prompt(fields: &Fields<'_>) -> Result<Vec<Token>, ApiError> {
    let batch = || ApiError::invalid("this double takes no batches");
    match (fields.get("text"), fields.get("input_ids")) {
        (Some(Value::String(text)), None) => Ok(tokenizer::encode(text)),
        (None, Some(Value::Array(items))) if items.first().is_some_and(Value::is_array) => Err(batch()),
        (None, Some(_)) => Ok(fields.tokens("input_ids")?.unwrap_or_default()),
        (Some(Value::Array(_)), None) => Err(batch()),
        _ => Err(ApiError::invalid(
            "Either text, input_ids or input_embeds should be provided, and only one of them.",
        )),
    }
}

fn common(
    fields: &Fields<'_>,
    sampling: &Fields<'_>,
    seed: &str,
    options: &SglangOptions,
) -> Result<Ask, ApiError> {
    let temperature = sampling.number("temperature")?.unwrap_or(1.0);
    if temperature < 0.0 {
        return Err(ApiError::invalid(format!("temperature must be non-negative, got {temperature}.")));
    }
    if sampling.number("top_p")?.is_some_and(|top_p| !(top_p > 0.0 && top_p <= 1.0)) {
        return Err(ApiError::invalid("top_p must be in (0, 1]."));
    }
    let seed = sampling.int(seed)?;
    let usage = fields.object("stream_options")?;
    let include_usage = usage.is_some_and(|map| map.get("include_usage").is_some_and(|value| value == true));
    Ok(Ask {
        model: options.model.clone(),
        adapter: None,
        prompts: Vec::new(),
        choices: sampling.int("n")?.unwrap_or(1).clamp(1, 64) as usize,
        stream: fields.flag("stream")?,
        include_usage,
        continuous_usage: false,
        return_token_ids: false,
        echo: false,
        logprobs: None,
        text: TextOptions {
            stop: sampling.texts("stop")?,
            include_stop: false,
            skip_special: !sampling.has("skip_special_tokens") || sampling.flag("skip_special_tokens")?,
        },
        text_mode: false,
        sampling: Sampling {
            max_tokens: 0,
            min_tokens: 0,
            ignore_eos: sampling.flag("ignore_eos")?,
            stop_token_ids: sampling.tokens("stop_token_ids")?.unwrap_or_default(),
            generator: (temperature > 0.0).then(|| seed.unwrap_or(0).cast_unsigned()),
        },
        unseeded: temperature > 0.0 && seed.is_none(),
        salt: fields.text("cache_salt")?,
        session: fields.text("session_id")?,
        priority: fields.int("priority")?.unwrap_or(0),
        transfer: Transfer::None,
        request_id: fields.text("rid")?,
    })
}

fn limits(ask: &mut Ask, max_tokens: Option<i64>, options: &SglangOptions) -> Result<(), ApiError> {
    let (context, prompt) = (options.context_length, &ask.prompts[0]);
    if prompt.is_empty() {
        return Err(ApiError::invalid("The input is empty."));
    }
    if let Some(token) = prompt.iter().find(|token| !tokenizer::known(**token)) {
        return Err(ApiError::invalid(format!(
            "The input_ids contain {token}, which is out of the vocabulary."
        )));
    }
    let length = prompt.len();
    if length >= context {
        let message = format!(
            "The input ({length} tokens) is longer than the model's context length ({context} tokens)."
        );
        return Err(ApiError::invalid(message));
    }
    let room = (context - length) as i64;
    let max_tokens = max_tokens.unwrap_or(room);
    if max_tokens > room {
        let total = length as i64 + max_tokens;
        let message = format!(
            "Requested token count exceeds the model's maximum context length of {context} tokens. You requested a \
             total of {total} tokens: {length} tokens from the input messages and {max_tokens} tokens for the completion."
        );
        return Err(ApiError::invalid(message));
    }
    if max_tokens < 0 {
        return Err(ApiError::invalid(format!("max_new_tokens must be at least 0, got {max_tokens}.")));
    }
    ask.sampling.max_tokens = max_tokens.max(1) as usize;
    Ok(())
}

/// Where the request runs, and whom it meets.
fn route(
    mut ask: Ask,
    mut rank: Option<i64>,
    fields: &Fields<'_>,
    headers: &HeaderMap,
    options: &SglangOptions,
) -> Result<Asked, ApiError> {
    let over = |name: &str| header(headers, name).filter(|_| options.header_overrides);
    let number = |name: &str| -> Result<Option<i64>, ApiError> {
        let parse = |text: &str| {
            text.parse().map_err(|_| ApiError::invalid(format!("invalid {name} header '{text}'")))
        };
        over(name).map(parse).transpose()
    };
    let host = over("x-override-bootstrap-host").map(str::to_owned).or(fields.text("bootstrap_host")?);
    let port =
        number("x-override-bootstrap-port")?.or(fields.int("bootstrap_port")?).unwrap_or(BOOTSTRAP_PORT);
    let room = match over("x-override-bootstrap-room") {
        Some(_) => number("x-override-bootstrap-room")?.map(i64::cast_unsigned),
        None => fields.get("bootstrap_room").and_then(Value::as_u64),
    };
    rank = number("x-override-routed-dp-rank")?.or(rank);
    let prefill_rank = number("x-override-disagg-prefill-dp-rank")?.or(fields.int("disagg_prefill_dp_rank")?);
    ask.priority = number("x-override-priority")?.unwrap_or(ask.priority);
    ask.request_id = over("x-override-rid").map(str::to_owned).or(ask.request_id);
    let ranks = options.dp as i64;
    if let Some(rank) = rank.filter(|rank| !(0..ranks).contains(rank)) {
        return Err(ApiError::invalid(format!("routed_dp_rank={rank} out of range [0, {ranks})")));
    }
    let has_room = room.is_some();
    if let Some(room) = room {
        let fake = host.as_deref() == Some(FAKE_HOST);
        if rank.is_none() && options.mode == SglangMode::Prefill {
            rank = Some((room % options.dp as u64) as i64); // follow_bootstrap_room
        }
        let room = Room {
            host: host.unwrap_or_default(),
            port: u16::try_from(port).unwrap_or(0),
            room,
            prefill_rank: prefill_rank.and_then(|rank| u32::try_from(rank).ok()),
            fake,
        };
        match options.mode {
            SglangMode::Null => {}
            SglangMode::Prefill => {
                ask.sampling.max_tokens = 1; // a prefill server's answer is the first token
                ask.transfer = Transfer::Offer(room);
            }
            SglangMode::Decode => ask.transfer = Transfer::Room(room),
        }
    }
    Ok(Asked { ask, rank, has_room })
}
