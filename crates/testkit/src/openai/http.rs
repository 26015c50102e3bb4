//! The HTTP surface of a plain OpenAI-like server.

use std::sync::Arc;
use std::time::SystemTime;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::OpenAi;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, chat_messages};
use crate::api::generation::{Delta, Finish, Generation, Wanted};
use crate::api::stream::{Shape, Usage, Whole};
use crate::api::text::TextOptions;
use crate::api::{Ask, header, read_body, stream};
use crate::double::fault::Fault;
use crate::engine::pool::Identity;
use crate::engine::request::{Sampling, Transfer, Work};
use crate::kv::mix;
use crate::tokenizer;

pub(super) fn router(openai: &Arc<OpenAi>) -> Router {
    let mut router = Router::new()
        .route("/health", get(health))
        .route("/v1/models", get(models))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat));
    if openai.options.props {
        router = router.route("/props", get(props));
    }
    if openai.options.tokenize {
        router = router.route("/tokenize", post(tokenize)).route("/detokenize", post(detokenize));
    }
    router
        .fallback(|| async {
            let error = ApiError {
                status: 404,
                kind: "not_found_error",
                message: "File Not Found".into(),
                param: None,
            };
            refusal(&error)
        })
        .layer(middleware::from_fn_with_state(openai.clone(), authenticate))
        .with_state(openai.clone())
}

type Shared = State<Arc<OpenAi>>;

async fn authenticate(State(openai): Shared, request: Request, next: Next) -> Response {
    let Some(key) = &openai.options.api_key else { return next.run(request).await };
    let given = header(request.headers(), "authorization").unwrap_or_default();
    let right = given.strip_prefix("Bearer ").is_some_and(|token| token == key.0);
    if request.uri().path().starts_with("/v1") && !right {
        let message = "Invalid API Key".to_owned();
        return refusal(&ApiError { status: 401, kind: "authentication_error", message, param: None });
    }
    next.run(request).await
}

/// `{"error": {"code", "message", "type"}}`.
fn error_body(error: &ApiError) -> Value {
    let kind = match error.status {
        400 => "invalid_request_error",
        500 => "server_error",
        _ => error.kind,
    };
    json!({"error": {"code": error.status, "message": error.message, "type": kind}})
}

fn refusal(error: &ApiError) -> Response {
    let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(error_body(error))).into_response()
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

async fn models(State(openai): Shared) -> Json<Value> {
    let model = match openai.body.fault() {
        Some(Fault::WrongModel { name }) => name,
        _ => openai.options.model.clone(),
    };
    Json(json!({"object": "list", "data": [{
        "id": model, "object": "model", "created": now(), "owned_by": "llamacpp",
        "meta": {"n_vocab": tokenizer::VOCABULARY, "n_ctx_train": openai.options.context_length},
    }]}))
}

async fn props(State(openai): Shared) -> Json<Value> {
    Json(json!({
        "default_generation_settings": {"n_ctx": openai.options.context_length},
        "total_slots": openai.options.slots, "model_path": openai.options.model,
        "chat_template": tokenizer::CHAT_TEMPLATE,
    }))
}

async fn tokenize(State(openai): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let tokens = async {
        let body = read_body(&openai.body, &uri, &headers, body).await?;
        let text = Fields::of(&body)?.text("content")?.unwrap_or_default();
        Ok(json!({"tokens": Fault::shown_tokens(openai.body.fault().as_ref(), tokenizer::encode(&text))}))
    };
    tokens.await.map_or_else(|error: ApiError| refusal(&error), |value: Value| Json(value).into_response())
}

async fn detokenize(State(openai): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let text = async {
        let body = read_body(&openai.body, &uri, &headers, body).await?;
        let tokens = Fields::of(&body)?.tokens("tokens")?.unwrap_or_default();
        Ok(json!({"content": tokenizer::decode(&tokens, false)}))
    };
    text.await.map_or_else(|error: ApiError| refusal(&error), |value: Value| Json(value).into_response())
}

async fn completions(State(openai): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let asked = async {
        let body = read_body(&openai.body, &uri, &headers, body).await?;
        let fields = Fields::of(&body)?;
        let prompt = match fields.get("prompt") {
            Some(Value::String(text)) => tokenizer::encode(text),
            Some(Value::Array(_)) => fields.tokens("prompt")?.unwrap_or_default(),
            _ => return Err(ApiError::invalid("\"prompt\" must be provided")),
        };
        ask(&fields, prompt, &openai)
    };
    answer(&openai, asked.await, Worded { chat: false, created: now() }).await
}

async fn chat(State(openai): Shared, uri: Uri, headers: HeaderMap, body: Body) -> Response {
    let asked = async {
        let body = read_body(&openai.body, &uri, &headers, body).await?;
        let fields = Fields::of(&body)?;
        let messages = chat_messages(&fields)?;
        ask(&fields, tokenizer::encode(&tokenizer::render_chat(&messages, true)), &openai)
    };
    answer(&openai, asked.await, Worded { chat: true, created: now() }).await
}

fn ask(fields: &Fields<'_>, prompt: Vec<u32>, openai: &OpenAi) -> Result<Ask, ApiError> {
    let context = openai.options.context_length;
    if prompt.is_empty() || prompt.len() >= context {
        let message = "the request exceeds the available context size. try increasing the context size";
        return Err(ApiError::invalid(message));
    }
    if prompt.iter().any(|token| !tokenizer::known(*token)) {
        return Err(ApiError::invalid("Prompt contains invalid tokens"));
    }
    let room = context - prompt.len();
    let asked =
        fields.int("max_completion_tokens")?.or(fields.int("max_tokens")?).filter(|tokens| *tokens >= 0);
    let temperature = fields.number("temperature")?.unwrap_or(0.8);
    let seed = fields.int("seed")?;
    let usage = fields.object("stream_options")?.and_then(|options| options.get("include_usage"));
    Ok(Ask {
        model: fields.text("model")?.unwrap_or_else(|| openai.options.model.clone()),
        adapter: None,
        prompts: vec![prompt],
        choices: fields.int("n")?.unwrap_or(1).clamp(1, 8) as usize,
        stream: fields.flag("stream")?,
        include_usage: usage.is_some_and(|usage| *usage == true),
        continuous_usage: false,
        return_token_ids: false,
        echo: false,
        logprobs: None,
        text: TextOptions { stop: fields.texts("stop")?, include_stop: false, skip_special: true },
        text_mode: false,
        sampling: Sampling {
            max_tokens: asked.map_or(room, |tokens| (tokens as usize).clamp(1, room)),
            min_tokens: 0,
            ignore_eos: fields.flag("ignore_eos")?,
            stop_token_ids: Vec::new(),
            generator: (temperature > 0.0).then(|| seed.unwrap_or(0).cast_unsigned()),
        },
        unseeded: temperature > 0.0 && seed.is_none(),
        salt: None,
        session: None,
        priority: 0,
        transfer: Transfer::None,
        request_id: None,
    })
}

async fn answer(openai: &Arc<OpenAi>, asked: Result<Ask, ApiError>, shape: Worded) -> Response {
    let ask = match asked {
        Ok(ask) => ask,
        Err(error) => return refusal(&error),
    };
    let started = openai.clone();
    stream::answer(&openai.body, ask.stream, shape, move || start(&started, ask)).await
}

fn start(openai: &OpenAi, ask: Ask) -> Result<Generation, ApiError> {
    let Some(life) = openai.body.life().filter(|life| !life.dead()) else {
        return Err(ApiError::engine_dead());
    };
    let id = format!("chatcmpl-{:032x}", u128::from(openai.body.unique()));
    let choice = |choice: usize| {
        let mut sampling = ask.sampling.clone();
        sampling.generator = sampling.generator.map(|seed| match ask.unseeded {
            true => openai.body.unique(),
            false => mix(seed, choice as u64),
        });
        let work = Work {
            id: format!("{id}-{choice}"),
            prompt: ask.prompts[0].clone(),
            identity: Identity::default(),
            sampling,
            priority: 0,
            transfer: Transfer::None,
        };
        Wanted { work, text: ask.text.clone(), rank: None }
    };
    let wanted = (0..ask.choices).map(choice).collect();
    Ok(Generation::start(&life, ask, id, wanted))
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// OpenAI's wording of both routes.
#[derive(Debug)]
struct Worded {
    chat: bool,
    created: u64,
}

impl Worded {
    fn chunk(&self, generation: &Generation, choices: Value) -> Value {
        let object = if self.chat { "chat.completion.chunk" } else { "text_completion" };
        json!({
            "id": generation.id, "object": object, "created": self.created, "model": generation.ask.model,
            "system_fingerprint": "b0-double", "choices": choices,
        })
    }

    fn usage_object(usage: Usage) -> Value {
        json!({
            "completion_tokens": usage.completion, "prompt_tokens": usage.prompt,
            "total_tokens": usage.prompt + usage.completion,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
        })
    }
}

impl Shape for Worded {
    fn head(&mut self, generation: &Generation) -> Vec<Value> {
        if !self.chat {
            return Vec::new();
        }
        let first = |index: usize| {
            let delta = json!({"role": "assistant", "content": null});
            self.chunk(generation, json!([{"finish_reason": null, "index": index, "delta": delta}]))
        };
        (0..generation.ask.choices).map(first).collect()
    }

    fn delta(&mut self, generation: &Generation, delta: &Delta, _usage: Option<Usage>) -> Vec<Value> {
        let choice = |text: Option<&str>, finish: Option<&Finish>| {
            let finish = finish.map(Finish::reason);
            match (self.chat, text) {
                (true, Some(text)) => {
                    json!([{"finish_reason": finish, "index": delta.choice, "delta": {"content": text}}])
                }
                (true, None) => json!([{"finish_reason": finish, "index": delta.choice, "delta": {}}]),
                (false, text) => {
                    let text = text.unwrap_or_default();
                    json!([{"text": text, "index": delta.choice, "logprobs": null, "finish_reason": finish}])
                }
            }
        };
        let mut chunks = Vec::new();
        if !delta.text.is_empty() {
            chunks.push(self.chunk(generation, choice(Some(&delta.text), None)));
        }
        if let Some(finish) = &delta.finish {
            chunks.push(self.chunk(generation, choice(None, Some(finish))));
        }
        chunks
    }

    fn usage(&mut self, generation: &Generation, usage: Usage) -> Value {
        let mut chunk = self.chunk(generation, json!([]));
        chunk["usage"] = Self::usage_object(usage);
        chunk
    }

    fn error(&self, error: &ApiError, _streaming: bool) -> Value {
        error_body(error)
    }

    fn whole(&mut self, generation: &Generation, choices: &[Whole], usage: Usage, _transfer: Value) -> Value {
        let choice = |(index, whole): (usize, &Whole)| {
            let finish = whole.finish.as_ref().map(Finish::reason);
            if self.chat {
                json!({"finish_reason": finish, "index": index,
                       "message": {"role": "assistant", "content": whole.text}})
            } else {
                json!({"text": whole.text, "index": index, "logprobs": null, "finish_reason": finish})
            }
        };
        let object = if self.chat { "chat.completion" } else { "text_completion" };
        let mut answer = self.chunk(generation, choices.iter().enumerate().map(choice).collect());
        answer["object"] = json!(object);
        answer["usage"] = Self::usage_object(usage);
        answer
    }
}
