//! What the HTTP surfaces of all doubles share: reading fields, running a request, streaming its answer.

pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod generation;
pub(crate) mod stream;
pub(crate) mod text;

use axum::body::{Body as HttpBody, Bytes};
use axum::http::{HeaderMap, Uri};
use serde_json::Value;

use crate::double::Body;
use crate::engine::request::{Sampling, Transfer};
use crate::tokenizer::Token;
use error::ApiError;
use text::TextOptions;

/// Bytes of a request's body.
const BODY_BYTES_MAX: usize = 32 << 20;

/// What a client wants, whatever the dialect.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// As the answer names it.
    pub(crate) model: String,
    pub(crate) adapter: Option<String>,
    pub(crate) prompts: Vec<Vec<Token>>,
    /// Choices for each prompt.
    pub(crate) choices: usize,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) echo: bool,
    /// Alternatives for each token; `Some(0)`: the token's own only.
    pub(crate) logprobs: Option<usize>,
    pub(crate) text: TextOptions,
    /// vLLM's `/inference/v1/generate` with `output_mode: "text"`.
    pub(crate) text_mode: bool,
    pub(crate) sampling: Sampling,
    /// Temperature above 0 and no seed: each choice draws its own state.
    pub(crate) unseeded: bool,
    pub(crate) salt: Option<String>,
    pub(crate) session: Option<String>,
    pub(crate) priority: i64,
    pub(crate) transfer: Transfer,
    pub(crate) request_id: Option<String>,
}

/// Reads a JSON body, remembers the request, and refuses what is no JSON.
pub(crate) async fn read_body(
    body: &Body,
    uri: &Uri,
    headers: &HeaderMap,
    content: HttpBody,
) -> Result<Value, ApiError> {
    let bytes = axum::body::to_bytes(content, BODY_BYTES_MAX).await.unwrap_or_else(|_| Bytes::new());
    let parsed = serde_json::from_slice(&bytes);
    body.seen.add(uri.path(), headers, parsed.as_ref().unwrap_or(&Value::Null));
    parsed.map_err(|_| ApiError::malformed("body", "json_invalid", "JSON decode error"))
}

/// A header as text.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}
