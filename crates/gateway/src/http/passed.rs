//! Requests that are passed on as they came: to engines that take text, and what tokens cannot express (tools that the
//! engine parses, structured output, media).
//!
//! In: a body. Out: the same body without the fields that could harm an engine, what is needed to route it, and later the
//! engine's own answer, unchanged. Start at [`Peek`] and [`prepare`]; the answer's way out is [`PassedBody`].
//!
//! Invariants: contents are never parsed into a tree and never changed; a field that names KV, a rank or a cache of
//! another tenant never reaches an engine.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{body::Body, http::StatusCode, response::Response};
use bytes::Bytes;
use forebay_engine_wire::object::{Flaw, Object};
use forebay_engines::{ClientBody, ClientRoute, Reply};
use forebay_text::{Conversation, Message, PrefixCache};
use forebay_types::{Sampling, TenantId, TokenId};
use http_body::Frame;
use serde::Deserialize;
use tracing::Span;

use super::{
    answer::push_error, app::ModelText, context::Context as Surroundings, errors::ApiError,
    observation::Observation,
};
use crate::{
    metrics::Endpoint,
    orchestrator::api::{PromptUnit, Response as Generated, ResponseEvent, RouteError, Usage},
};

/// Fields that steer an engine's insides. A client that sends one is told so: with the wrong value it would kill the engine
/// or read another's cache.
const FORBIDDEN: &[&str] = &[
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "disagg_prefill_dp_rank",
];
/// Fields that are the gateway's to set: taken out, for they change nothing that a client may decide.
const STRIPPED: &[&str] = &[
    "cache_salt",
    "priority",
    "rid",
    "request_id",
    "routed_dp_rank",
    "data_parallel_rank",
    "extra_key",
    "session_id",
];
/// Bytes of text that stand for a token where nobody here knows the tokens: English has about four.
const TEXT_UNIT_BYTES: usize = 4;
/// Fewer bytes than a token of most texts has, so that memory for tokens is taken once.
const TEXT_BYTES_A_TOKEN: usize = 3;
/// Answer assumed where the request does not limit it, for load accounting alone.
const OUTPUT_TOKENS_GUESSED: u32 = 1024;

/// A body's fields, and what they say about its route, leniently: what is wrong with the rest is the engine's to say.
pub(crate) struct Peek {
    fields: Object,
    pub(crate) model: Option<String>,
    streams: bool,
}

impl Peek {
    /// `None` if the body is no JSON object or its `model` and `stream` are not what they should be: who reads it as a
    /// request says it best.
    ///
    /// # Errors
    /// 400 if it is an object that no engine should be given.
    pub(crate) fn of(body: &Bytes) -> Result<Option<Self>, ApiError> {
        let fields = match Object::parse(body.clone()) {
            Ok(fields) => fields,
            Err(Flaw::Syntax { .. }) => return Ok(None),
            Err(flaw) => return Err(ApiError::invalid("invalid_json", flaw.to_string())),
        };
        let (Ok(model), Ok(stream)) = (read(&fields, "model"), read::<bool>(&fields, "stream")) else {
            return Ok(None);
        };
        Ok(Some(Self { fields, model, streams: stream.unwrap_or(false) }))
    }

    /// Whether the request brings tools that its engine should parse.
    pub(crate) fn has_tools(&self) -> bool {
        self.fields.get("tools").is_some_and(|tools| !matches!(tools, b"null" | b"[]"))
    }

    /// The client's own words.
    pub(crate) fn words(&self, endpoint: Endpoint) -> Arc<ClientBody> {
        let route = match endpoint {
            Endpoint::Chat => ClientRoute::Chat,
            Endpoint::Completions => ClientRoute::Completions,
        };
        Arc::new(ClientBody { route, json: self.fields.clone(), streams: self.streams })
    }

    fn prompt_text(&self, endpoint: Endpoint) -> &[u8] {
        let text = self.fields.get(match endpoint {
            Endpoint::Chat => "messages",
            Endpoint::Completions => "prompt",
        });
        // Without its closing bracket: the next turn's text then begins with this one's.
        let text = text.unwrap_or_default();
        let end = text.iter().rposition(|byte| !matches!(byte, b']' | b'"'));
        &text[..end.map_or(0, |last| last + 1)]
    }

    fn number(&self, name: &str) -> Option<u32> {
        read(&self.fields, name).ok()?
    }
}

/// What a field holds; `None` if it is not there, or null.
fn read<'a, T: Deserialize<'a>>(fields: &'a Object, name: &str) -> Result<Option<T>, serde_json::Error> {
    fields.get(name).map_or(Ok(None), serde_json::from_slice)
}

/// A request to pass on.
pub(crate) struct Passed {
    pub(crate) body: Arc<ClientBody>,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) unit: PromptUnit,
    /// For load accounting.
    pub(crate) choices: u32,
    pub(crate) sampling: Sampling,
}

/// What makes tokens of a tenant's text.
pub(crate) struct Text<'a> {
    pub(crate) model: &'a ModelText,
    pub(crate) texts: &'a PrefixCache,
    pub(crate) tenant: &'a TenantId,
}

/// Makes a body fit to be passed on.
///
/// # Errors
/// 400 if it holds a field that no client may send.
pub(crate) fn prepare(
    endpoint: Endpoint,
    mut peek: Peek,
    text: Option<&Text<'_>>,
) -> Result<Passed, ApiError> {
    if let Some(field) = FORBIDDEN.iter().find(|field| peek.fields.get(field).is_some()) {
        return Err(forbidden(field));
    }
    for field in STRIPPED {
        peek.fields.remove(field);
    }
    let (prompt, unit) = match text.and_then(|text| known_tokens(endpoint, &peek.fields, text)) {
        Some(tokens) => (tokens, PromptUnit::Tokens),
        None => (text_units(peek.prompt_text(endpoint)), PromptUnit::Text),
    };
    let asked = peek.number("max_completion_tokens").or_else(|| peek.number("max_tokens"));
    Ok(Passed {
        body: peek.words(endpoint),
        prompt,
        unit,
        choices: peek.number("n").unwrap_or(1).clamp(1, 128),
        sampling: Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            output_tokens_max: asked.unwrap_or(OUTPUT_TOKENS_GUESSED).max(1),
            stop_tokens: [].into(),
            logprobs: None,
        },
    })
}

/// The error for a field that no client may send.
pub(crate) fn forbidden(field: &'static str) -> ApiError {
    let message = format!("{field} is set by the server alone; leave it out");
    ApiError::invalid("forbidden_parameter", message).at(field)
}

/// The prompt's tokens, if this process can tell them: for routing, so any difficulty just means that it cannot.
fn known_tokens(endpoint: Endpoint, fields: &Object, text: &Text<'_>) -> Option<Arc<[TokenId]>> {
    let Text { model, texts, tenant } = *text;
    let (tokenizer, tenant) = (&model.tokenizer, tenant.as_str());
    let mut tokens = Vec::new();
    match endpoint {
        Endpoint::Chat => {
            let messages: Vec<Message<'_>> = read(fields, "messages").ok()??;
            let conversation = Conversation {
                messages: &messages,
                tools: read(fields, "tools").ok()?,
                add_generation_prompt: true,
                extra: read(fields, "chat_template_kwargs").ok()?,
                now: None,
            };
            let rendered = model.template.render(&conversation).ok()?;
            tokens.reserve(rendered.len() / TEXT_BYTES_A_TOKEN);
            texts.encode(tokenizer, tenant, &rendered, &mut tokens).ok()?;
        }
        Endpoint::Completions => match fields.get("prompt")? {
            prompt @ [b'"', ..] => {
                let prompt: String = serde_json::from_slice(prompt).ok()?;
                tokens.reserve(prompt.len() / TEXT_BYTES_A_TOKEN);
                texts.encode_completion(tokenizer, tenant, &prompt, &mut tokens).ok()?;
            }
            prompt => tokens = serde_json::from_slice(prompt).ok()?,
        },
    }
    (!tokens.is_empty()).then(|| tokens.into())
}

/// Numbers that stand for stretches of text, equal for equal stretches. Never empty.
fn text_units(text: &[u8]) -> Arc<[TokenId]> {
    let units = text.chunks(TEXT_UNIT_BYTES).map(|chunk| {
        let mut bytes = [0; TEXT_UNIT_BYTES];
        bytes[..chunk.len()].copy_from_slice(chunk);
        TokenId::from_le_bytes(bytes)
    });
    if text.is_empty() { [0].into() } else { units.collect() }
}

/// Waits for the engine's first words and answers with them.
pub(crate) async fn respond(
    mut generated: Generated,
    surroundings: Surroundings,
    mut observation: Observation,
    prompt_param: &'static str,
) -> Response {
    let mut batch = Vec::new();
    let refuse = |observation: &mut Observation, error: &RouteError| {
        let error = ApiError::from_route(error, prompt_param);
        tracing::info!(code = error.code, error = %error.message, "request failed");
        observation.conclude(error.outcome());
        axum::response::IntoResponse::into_response(error)
    };
    let (status, content_type) = loop {
        if !generated.next_batch(&mut batch).await && batch.is_empty() {
            let detail = "the response ended without a result".to_owned();
            return refuse(&mut observation, &RouteError::Internal { detail });
        }
        match batch.first() {
            Some(ResponseEvent::Reply(Reply::Head { status, content_type })) => {
                break (*status, content_type.clone());
            }
            Some(ResponseEvent::Failed(error)) => return refuse(&mut observation, &error.clone()),
            Some(_) => {
                batch.remove(0);
            }
            None => {}
        }
    };
    batch.remove(0);
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    let streams = content_type.starts_with("text/event-stream");
    let body = PassedBody {
        generated,
        observation,
        _surroundings: surroundings,
        prompt_param,
        span: Span::current(),
        batch: batch.into(),
        scratch: Vec::new(),
        streams,
        status,
        ended: false,
    };
    let mut response = Response::new(Body::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if let Ok(value) = content_type.parse() {
        headers.insert(axum::http::header::CONTENT_TYPE, value);
    }
    if streams {
        headers.insert(axum::http::header::CACHE_CONTROL, axum::http::HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    }
    response
}

/// An engine's answer on its way out. Dropping it, as hyper does when the client has gone, cancels the request.
struct PassedBody {
    generated: Generated,
    observation: Observation,
    /// Keeps the request's id taken.
    _surroundings: Surroundings,
    prompt_param: &'static str,
    span: Span,
    batch: std::collections::VecDeque<ResponseEvent>,
    scratch: Vec<ResponseEvent>,
    streams: bool,
    status: StatusCode,
    ended: bool,
}

impl PassedBody {
    fn done(&mut self, usage: Usage) {
        self.ended = true;
        if self.status.is_success() {
            self.observation.passed_on(usage.output_tokens);
            self.observation.succeed(usage);
        } else {
            self.observation.conclude(crate::metrics::Outcome::ClientError);
        }
    }

    /// The last bytes of an answer that broke off. A document cannot say so: its connection is broken off as well.
    fn failed(&mut self, error: &RouteError) -> Result<Bytes, io::Error> {
        self.ended = true;
        let error = ApiError::from_route(error, self.prompt_param);
        self.span.in_scope(|| tracing::warn!(code = error.code, error = %error.message, "answer broke off"));
        self.observation.conclude(error.outcome());
        if self.streams {
            let mut bytes = bytes::BytesMut::new();
            push_error(&mut bytes, &error);
            return Ok(bytes.freeze());
        }
        Err(io::Error::other(error.message))
    }
}

impl http_body::Body for PassedBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        loop {
            if this.ended {
                return Poll::Ready(None);
            }
            match this.batch.pop_front() {
                Some(ResponseEvent::Reply(Reply::Data(data))) => {
                    let now = this.observation.now();
                    this.observation.first_words(now);
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(ResponseEvent::Done(usage)) => this.done(usage),
                Some(ResponseEvent::Failed(error)) => {
                    return Poll::Ready(Some(this.failed(&error).map(Frame::data)));
                }
                Some(_) => {}
                None => match this.generated.poll_batch(cx, &mut this.scratch) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(more) => {
                        if !more && this.scratch.is_empty() {
                            let detail = "the response ended without a result".to_owned();
                            this.scratch.push(ResponseEvent::Failed(RouteError::Internal { detail }));
                        }
                        this.batch.extend(this.scratch.drain(..));
                    }
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
