//! Reads the bodies of the three ways to ask vLLM for tokens, and refuses what vLLM refuses.
//!
//! In: a JSON body and the server's options. Out: an [`Ask`], or the error that vLLM would answer. Start at
//! [`completion`], [`chat`] and [`tokens`].
//!
//! Evidence: the request schemas in `fixtures/vllm/http/openapi.json`; limits and messages from vLLM 0.32's
//! `completion/protocol.py`, `chat_completion/protocol.py`, `sampling_params.py`, `renderers/params.py`. Not modelled:
//! beam search, prompt logprobs, echo without generation, media, penalties (accepted, without effect).

use serde_json::Value;

use crate::api::Ask;
use crate::api::error::ApiError;
use crate::api::fields::{self, Fields};
use crate::api::text::TextOptions;
use crate::engine::request::{Sampling, Transfer};
use crate::tokenizer::{self, Token};
use crate::vllm::options::{VllmOptions, VllmVersion};

/// The default of `max_tokens` on `/v1/completions`.
const COMPLETION_TOKENS: i64 = 16;
/// `VLLM_MAX_COMPLETION_PROMPTS`.
const PROMPTS_MAX: usize = 1024;
/// Characters of a cache salt.
const SALT_MAX: usize = 1024;

/// Which of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Completion,
    Chat,
    Tokens,
}

/// `/v1/completions`.
pub(crate) fn completion(body: &Value, options: &VllmOptions) -> Result<Ask, ApiError> {
    let fields = Fields::of(body)?;
    let prompts = completion_prompts(&fields)?;
    let max_tokens = fields.int("max_tokens")?.unwrap_or(COMPLETION_TOKENS);
    let logprobs = fields.int("logprobs")?;
    if logprobs.is_some_and(|logprobs| logprobs < -1) {
        return Err(ApiError::refused("logprobs", "`logprobs` must be a positive value or -1."));
    }
    let mut ask = common(Kind::Completion, &fields, &fields, options)?;
    ask.logprobs = logprobs.map(|logprobs| logprobs.max(0) as usize);
    ask.echo = fields.flag("echo")?;
    ask.prompts = prompts;
    limits(&mut ask, Some(max_tokens), "max_tokens", options)?;
    Ok(ask)
}

/// `/v1/chat/completions`.
pub(crate) fn chat(body: &Value, options: &VllmOptions) -> Result<Ask, ApiError> {
    let fields = Fields::of(body)?;
    let messages = fields::chat_messages(&fields)?;
    let newer = fields.int("max_completion_tokens")?;
    let max_tokens = newer.or(fields.int("max_tokens")?);
    let top = fields.int("top_logprobs")?;
    let logprobs = fields.flag("logprobs")?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        let message = "when using `top_logprobs`, `logprobs` must be set to true.";
        return Err(ApiError::refused("top_logprobs", message));
    }
    check_tools(&fields)?;
    let add_prompt = !fields.has("add_generation_prompt") || fields.flag("add_generation_prompt")?;
    if fields.flag("continue_final_message")? && add_prompt {
        let message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True.";
        return Err(ApiError::refused("continue_final_message", message));
    }
    let mut ask = common(Kind::Chat, &fields, &fields, options)?;
    ask.logprobs = logprobs.then(|| top.unwrap_or(0).max(0) as usize);
    ask.prompts = vec![tokenizer::encode(&tokenizer::render_chat(&messages, add_prompt))];
    let name = if newer.is_some() { "max_completion_tokens" } else { "max_tokens" };
    limits(&mut ask, max_tokens, name, options)?;
    Ok(ask)
}

/// `/inference/v1/generate`.
pub(crate) fn tokens(body: &Value, options: &VllmOptions) -> Result<Ask, ApiError> {
    let fields = Fields::of(body)?;
    let prompt = fields.tokens("token_ids")?.ok_or_else(|| fields.missing("token_ids"))?;
    let sampling = fields.object("sampling_params")?.ok_or_else(|| fields.missing("sampling_params"))?;
    let sampling = Fields::nested(sampling, "body.sampling_params");
    let mut ask = common(Kind::Tokens, &fields, &sampling, options)?;
    ask.text_mode = match fields.text("output_mode")?.as_deref() {
        None | Some("tokens") => false,
        Some("text") => true,
        Some(_) => {
            let message = "Input should be ''tokens'' or ''text''";
            return Err(ApiError::malformed("body.output_mode", "literal_error", message));
        }
    };
    ask.logprobs = sampling.int("logprobs")?.map(|logprobs| logprobs.max(0) as usize);
    if options.version == VllmVersion::V0_25 {
        ask.transfer = Transfer::None;
    }
    ask.prompts = vec![prompt];
    limits(&mut ask, sampling.int("max_tokens")?, "max_tokens", options)?;
    Ok(ask)
}

fn completion_prompts(fields: &Fields<'_>) -> Result<Vec<Vec<Token>>, ApiError> {
    let empty =
        || ApiError::refused("prompt", "Either prompt or prompt_embeds must be provided and non-empty.");
    let wrong = || ApiError::malformed("body.prompt", "string_type", "Input should be a valid string");
    match fields.get("prompt") {
        None => Err(empty()),
        Some(Value::String(text)) if text.is_empty() => Err(empty()),
        Some(Value::String(text)) => Ok(vec![tokenizer::encode(text)]),
        Some(Value::Array(items)) => {
            if let Some(tokens) = fields::tokens(items) {
                return Ok(vec![tokens]);
            }
            if items.len() > PROMPTS_MAX {
                return Err(ApiError::refused(
                    "prompt",
                    "prompt list length exceeds the maximum allowed count",
                ));
            }
            let prompt = |item: &Value| match item {
                Value::String(text) => Some(tokenizer::encode(text)),
                Value::Array(tokens) => fields::tokens(tokens),
                _ => None,
            };
            items.iter().map(prompt).collect::<Option<Vec<_>>>().ok_or_else(wrong)
        }
        Some(_) => Err(wrong()),
    }
}

fn check_tools(fields: &Fields<'_>) -> Result<(), ApiError> {
    let tools = fields.list("tools")?;
    if tools.is_some_and(Vec::is_empty) {
        let message = "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.";
        return Err(ApiError::refused("tools", message));
    }
    let choice = fields.get("tool_choice");
    if tools.is_none() && choice.is_some_and(|choice| choice != "none") {
        return Err(ApiError::refused("tool_choice", "When using `tool_choice`, `tools` must be set."));
    }
    if let Some(format) = fields.object("response_format")?
        && format.get("type").is_some_and(|kind| kind == "json_schema")
        && format.get("json_schema").is_none_or(Value::is_null)
    {
        let message = "When response_format type is 'json_schema', the 'json_schema' field must be provided.";
        return Err(ApiError::refused("response_format", message));
    }
    Ok(())
}

/// What all three have: `fields` of the body, `sampling` of the body or its `sampling_params`.
fn common(
    kind: Kind,
    fields: &Fields<'_>,
    sampling: &Fields<'_>,
    options: &VllmOptions,
) -> Result<Ask, ApiError> {
    let stream = fields.flag("stream")?;
    let stream_options = fields.object("stream_options")?;
    if kind != Kind::Tokens && stream_options.is_some_and(|fields| !fields.is_empty()) && !stream {
        let message = "Stream options can only be defined when `stream=True`.";
        return Err(ApiError::refused("stream_options", message));
    }
    let stream_options = stream_options.map(|map| Fields::nested(map, "body.stream_options"));
    let option = |name: &str| stream_options.as_ref().map_or(Ok(false), |options| options.flag(name));
    let include_usage = option("include_usage")?;
    let salt = fields.text("cache_salt")?;
    if salt.as_ref().is_some_and(|salt| salt.is_empty() || salt.chars().count() > SALT_MAX) {
        return Err(ApiError::malformed(
            "body.cache_salt",
            "string_too_short",
            "String should have 1 to 1024 characters",
        ));
    }
    let transfer = fields.object("kv_transfer_params")?.cloned().map_or(Transfer::None, Transfer::Params);
    let (model, adapter) = model(fields, options)?;
    let temperature = sampling.number("temperature")?.unwrap_or(1.0);
    let seed = sampling.int("seed")?;
    let choices = sampling.int("n")?.unwrap_or(1);
    check_sampling(sampling, temperature, choices, options)?;
    Ok(Ask {
        model,
        adapter,
        prompts: Vec::new(),
        choices: choices as usize,
        stream,
        include_usage,
        continuous_usage: include_usage && option("continuous_usage_stats")?,
        return_token_ids: fields.flag("return_token_ids")?,
        echo: false,
        logprobs: None,
        text: TextOptions {
            stop: sampling.texts("stop")?,
            include_stop: sampling.flag("include_stop_str_in_output")?,
            skip_special: !sampling.has("skip_special_tokens") || sampling.flag("skip_special_tokens")?,
        },
        text_mode: false,
        sampling: Sampling {
            max_tokens: 0,
            min_tokens: sampling.int("min_tokens")?.unwrap_or(0) as usize,
            ignore_eos: sampling.flag("ignore_eos")?,
            stop_token_ids: sampling.tokens("stop_token_ids")?.unwrap_or_default(),
            generator: (temperature > 0.0).then(|| seed.unwrap_or(0).cast_unsigned()),
        },
        unseeded: temperature > 0.0 && seed.is_none(),
        salt,
        session: fields.text("session_id")?.filter(|session| !session.is_empty()),
        priority: fields.int("priority")?.unwrap_or(0),
        transfer,
        request_id: fields.text("request_id")?,
    })
}

/// The model's name in the answer, and the adapter that it means.
fn model(fields: &Fields<'_>, options: &VllmOptions) -> Result<(String, Option<String>), ApiError> {
    match fields.text("model")? {
        None => Ok((options.model.clone(), None)),
        Some(name) if name.is_empty() || name == options.model => Ok((options.model.clone(), None)),
        Some(name) if options.adapters.contains(&name) => Ok((name.clone(), Some(name))),
        Some(name) => Err(ApiError::unknown_model(&name, &options.model)),
    }
}

fn check_sampling(
    sampling: &Fields<'_>,
    temperature: f64,
    choices: i64,
    options: &VllmOptions,
) -> Result<(), ApiError> {
    let range = |name: &str, low: f64, high: f64| -> Result<(), ApiError> {
        let value = sampling.number(name)?;
        match value {
            Some(value) if !(low..=high).contains(&value) => {
                Err(ApiError::invalid(format!("{name} must be in [{low}, {high}], got {value}."))
                    .with_param(name))
            }
            _ => Ok(()),
        }
    };
    if temperature < 0.0 {
        let message = format!(
            "temperature must be non-negative, got {temperature}. (parameter=temperature, value={temperature})"
        );
        return Err(ApiError::invalid(message).with_param("temperature"));
    }
    range("temperature", 0.0, 2.0)?;
    range("presence_penalty", -2.0, 2.0)?;
    range("frequency_penalty", -2.0, 2.0)?;
    range("min_p", 0.0, 1.0)?;
    if let Some(top_p) = sampling.number("top_p")?
        && !(top_p > 0.0 && top_p <= 1.0)
    {
        let message = format!("top_p must be in (0, 1], got {top_p}. (parameter=top_p, value={top_p})");
        return Err(ApiError::invalid(message).with_param("top_p"));
    }
    if sampling.int("top_k")?.is_some_and(|top_k| top_k < -1) {
        return Err(ApiError::invalid("top_k must be 0 (disable), or at least 1."));
    }
    if choices < 1 || choices as usize > options.running_max {
        return Err(ApiError::invalid(format!("n must be at least 1, got {choices}.")).with_param("n"));
    }
    if choices > 1 && temperature == 0.0 {
        return Err(ApiError::invalid(format!("n must be 1 when using greedy sampling, got {choices}.")));
    }
    if sampling.int("min_tokens")?.is_some_and(|tokens| tokens < 0) {
        return Err(ApiError::invalid("min_tokens must be greater than or equal to 0."));
    }
    if sampling.texts("stop")?.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop cannot contain an empty string."));
    }
    Ok(())
}

/// Checks the prompts and sets `max_tokens`.
fn limits(ask: &mut Ask, max_tokens: Option<i64>, name: &str, options: &VllmOptions) -> Result<(), ApiError> {
    let context = options.max_model_len;
    if let Some(max_tokens) = max_tokens
        && max_tokens > context as i64
    {
        let message = format!(
            "{name}={max_tokens} cannot be greater than max_model_len={context}. Please request fewer output tokens. \
             (parameter={name}, value={max_tokens})"
        );
        return Err(ApiError::invalid(message).with_param(name));
    }
    let mut longest = 0;
    for prompt in &ask.prompts {
        if prompt.is_empty() {
            return Err(ApiError::invalid("The decoder prompt cannot be empty"));
        }
        if let Some(token) = prompt.iter().find(|token| !tokenizer::known(**token)) {
            return Err(
                ApiError::invalid(format!("Token id {token} is out of vocabulary")).with_param("prompt")
            );
        }
        if prompt.len() > context {
            let message = format!(
                "This model's maximum context length is {context} tokens. However, your prompt contains {} input \
                 tokens, which exceeds this limit even without any output tokens. Please reduce the length of the \
                 input prompt. (parameter=input_tokens, value={})",
                prompt.len(),
                prompt.len()
            );
            return Err(ApiError::invalid(message).with_param("input_tokens"));
        }
        longest = longest.max(prompt.len());
    }
    let room = (context - longest) as i64;
    let max_tokens = max_tokens.map_or(room, |max_tokens| max_tokens.min(room));
    if max_tokens < 1 {
        let message = format!(
            "max_tokens must be at least 1, got {max_tokens}. (parameter=max_tokens, value={max_tokens})"
        );
        return Err(ApiError::invalid(message).with_param("max_tokens"));
    }
    ask.sampling.max_tokens = max_tokens as usize;
    if ask.sampling.min_tokens > ask.sampling.max_tokens {
        let message = format!("min_tokens must be less than or equal to max_tokens={max_tokens}.");
        return Err(ApiError::invalid(message));
    }
    Ok(())
}
