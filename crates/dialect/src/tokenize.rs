//! `/tokenize` and `/detokenize`, and the tokenising of prompts.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use forebay_text::{Conversation, Message, Tokenizer};
use forebay_types::TokenId;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{json, value::RawValue};

use crate::{
    app::{App, read_body},
    errors::{ApiError, json_response},
    request::parse,
};

/// Text that is tokenised on the connection's own thread; longer text goes to the pool for blocking work.
const INLINE_BYTES_MAX: usize = 16 * 1024;

#[derive(Debug, Deserialize)]
struct TokenizeBody<'a> {
    model: Option<String>,
    prompt: Option<String>,
    #[serde(borrow)]
    messages: Option<Vec<Message<'a>>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    return_token_strs: Option<bool>,
    #[serde(borrow)]
    tools: Option<&'a RawValue>,
    #[serde(borrow)]
    chat_template_kwargs: Option<&'a RawValue>,
}

#[derive(Debug, Deserialize)]
struct DetokenizeBody {
    model: Option<String>,
    tokens: Vec<TokenId>,
}

/// What to do about the tokens that a model expects around a bare prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Surroundings {
    /// Add them.
    Added,
    /// The template has written them.
    AsIs,
}

/// The tokens of `text`.
///
/// # Errors
/// 400 if the vocabulary cannot express it.
pub(crate) async fn encode(
    tokenizer: &Tokenizer,
    text: String,
    surroundings: Surroundings,
) -> Result<Vec<TokenId>, ApiError> {
    let tokenizer = tokenizer.clone();
    let long = text.len() > INLINE_BYTES_MAX;
    let encode = move || {
        let mut tokens = Vec::new();
        match surroundings {
            Surroundings::Added => tokenizer.encode_completion(&text, &mut tokens),
            Surroundings::AsIs => tokenizer.encode(&text, &mut tokens),
        }
        .map(|()| tokens)
    };
    let encoded = if long {
        let encoding = tokio::task::spawn_blocking(encode).await;
        encoding.map_err(|error| ApiError::internal(format!("the tokenizer panicked: {error}")))?
    } else {
        encode()
    };
    encoded.map_err(|error| ApiError::field("prompt", error.to_string()))
}

fn is_served(app: &App, model: Option<&str>) -> Result<(), ApiError> {
    match model.filter(|named| *named != &*app.facts().model) {
        Some(named) => Err(ApiError::unknown_model(named)),
        None => Ok(()),
    }
}

pub(crate) async fn tokenize(State(app): State<Arc<App>>, body: Body) -> Response {
    tokenized(&app, body).await.unwrap_or_else(IntoResponse::into_response)
}

async fn tokenized(app: &App, body: Body) -> Result<Response, ApiError> {
    let body = read_body(body, &app.limits).await?;
    let request: TokenizeBody<'_> = parse(&body)?;
    is_served(app, request.model.as_deref())?;
    let surroundings = |added: bool| if added { Surroundings::Added } else { Surroundings::AsIs };
    let (text, surroundings) = match (request.prompt, &request.messages) {
        (Some(prompt), None) => (prompt, surroundings(request.add_special_tokens.unwrap_or(true))),
        (None, Some(messages)) => {
            let conversation = Conversation {
                messages,
                tools: request.tools,
                add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
                extra: request.chat_template_kwargs,
                now: None,
            };
            let rendered = app.text.template.render(&conversation);
            let rendered = rendered.map_err(|error| ApiError::field("messages", error.to_string()))?;
            (rendered, surroundings(request.add_special_tokens.unwrap_or(false)))
        }
        _ => return Err(ApiError::bad("send either prompt or messages")),
    };
    let tokens = encode(&app.text.tokenizer, text, surroundings).await?;
    let strings = request.return_token_strs.unwrap_or(false).then(|| {
        let bytes = tokens.iter().map(|token| app.text.tokenizer.token_bytes(*token));
        bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect::<Vec<_>>()
    });
    let document = json!({
        "count": tokens.len(), "max_model_len": app.facts().context_tokens_max, "tokens": tokens, "token_strs": strings,
    });
    Ok(json_response(StatusCode::OK, document.to_string()))
}

pub(crate) async fn detokenize(State(app): State<Arc<App>>, body: Body) -> Response {
    detokenized(&app, body).await.unwrap_or_else(IntoResponse::into_response)
}

async fn detokenized(app: &App, body: Body) -> Result<Response, ApiError> {
    let body = read_body(body, &app.limits).await?;
    let request: DetokenizeBody = parse(&body)?;
    is_served(app, request.model.as_deref())?;
    let document = json!({"prompt": app.text.tokenizer.decode(&request.tokens)});
    Ok(json_response(StatusCode::OK, document.to_string()))
}
