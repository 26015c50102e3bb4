//! The two generating routes: read, check, tokenise, submit, answer.
//!
//! Start at [`chat`] or [`completions`]; both end in [`respond`], where nothing depends on the endpoint any more.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use forebay_engines::ClientBody;
use forebay_text::{EncodeError, StopMatcher};
use forebay_types::{RequestId, Sampling, TenantId, TokenId};
use smallvec::SmallVec;

use super::{
    answer::{Answer, AnswerBody, Frames, Identity, Ids, Reading, collect},
    app::{Gateway, ModelText, Shared},
    body,
    context::Context,
    errors::ApiError,
    live::LiveId,
    observation::Observation,
    passed::{self, Passed, Peek},
    request::{self, Delivery, Lengths, Spec, chat::ChatBody, completions::CompletionsBody, fields::Prompt},
};
use crate::{
    metrics::Endpoint,
    orchestrator::api::{GenerateRequest, PromptUnit, Response as Generated, RouteError},
};

/// What OpenAI's `/v1/completions` generates when the request does not say.
const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// A request that is ready to be submitted.
enum Ready {
    /// As tokens.
    Tokens(Job),
    /// As it came.
    Passed(Arc<str>, Passed),
}

/// A request as tokens.
struct Job {
    endpoint: Endpoint,
    model: Arc<ModelText>,
    spec: Spec,
    matcher: Option<StopMatcher>,
    prompts: Vec<(Arc<[TokenId]>, Sampling)>,
    /// See [`GenerateRequest::sampling_is_particular`].
    sampling_is_particular: bool,
    /// See [`GenerateRequest::audit`].
    audit: Option<Arc<ClientBody>>,
}

/// `POST /v1/chat/completions`
pub(crate) async fn chat(State(gateway): State<Gateway>, request: Request) -> Response {
    handle(gateway, request, Endpoint::Chat).await
}

/// `POST /v1/completions`
pub(crate) async fn completions(State(gateway): State<Gateway>, request: Request) -> Response {
    handle(gateway, request, Endpoint::Completions).await
}

async fn handle(gateway: Gateway, request: Request, endpoint: Endpoint) -> Response {
    let app = &*gateway.0;
    let mut observation = Observation::new(app.metrics.clone(), app.clock.clone(), endpoint);
    let (parts, body) = request.into_parts();
    let context = parts.extensions.get::<Context>().expect("the middleware put it there").clone();
    let mut named = None;
    let prepared = match body::read(&parts.headers, body, &app.http_limits, &app.bodies).await {
        Ok(body) => prepare(app, &context.tenant, endpoint, &body, &mut named).await,
        Err(error) => Err(error),
    };
    if let Some(model) = named {
        observation.names_model(model);
    }
    match prepared {
        Ok(Ready::Tokens(job)) => respond(app, &context, job, observation).await,
        Ok(Ready::Passed(model, passed)) => pass_on(app, context, model, passed, endpoint, observation).await,
        Err(error) => {
            observation.conclude(error.outcome());
            tracing::debug!(code = error.code, error = %error.message, "request refused");
            error.into_response()
        }
    }
}

/// Reads a request as far as it can be submitted. `named` is the served model that it names, even if it is refused.
/// (Names of other models would let a client add labels to metrics.)
async fn prepare(
    app: &Shared,
    tenant: &TenantId,
    endpoint: Endpoint,
    body: &Bytes,
    named: &mut Option<Arc<str>>,
) -> Result<Ready, ApiError> {
    if let Some(ready) = prepare_for_attached(app, tenant, endpoint, body, named).await? {
        return Ok(ready);
    }
    prepare_tokens(app, tenant, endpoint, body, named).await.map(Ready::Tokens)
}

/// The request that a body would submit, of several prompts the first one: for those who only want to know.
pub(super) async fn would_submit(
    app: &Shared,
    context: &Context,
    endpoint: Endpoint,
    body: &Bytes,
) -> Result<GenerateRequest, ApiError> {
    match prepare(app, &context.tenant, endpoint, body, &mut None).await? {
        Ready::Passed(model, passed) => Ok(passed_request(context, model, passed)),
        Ready::Tokens(job) => Ok(token_request(context, &job, context.id().clone(), &job.prompts[0])),
    }
}

async fn prepare_tokens(
    app: &Shared,
    tenant: &TenantId,
    endpoint: Endpoint,
    body: &Bytes,
    named: &mut Option<Arc<str>>,
) -> Result<Job, ApiError> {
    match endpoint {
        Endpoint::Chat => prepare_chat(app, tenant, body, named).await,
        Endpoint::Completions => prepare_completions(app, tenant, body, named).await,
    }
}

/// Decides whether a request for a model of attached engines goes to them as tokens or as it came; `None` if the model
/// has no such engine. Tokens where they can say all that the request says, and every engine takes them.
async fn prepare_for_attached(
    app: &Shared,
    tenant: &TenantId,
    endpoint: Endpoint,
    body: &Bytes,
    named: &mut Option<Arc<str>>,
) -> Result<Option<Ready>, ApiError> {
    if !app.orchestrator.takes_bodies() {
        return Ok(None);
    }
    let Some(peek) = Peek::of(body)? else { return Ok(None) };
    let Some(served) = peek.model.as_deref().and_then(|name| app.orchestrator.served(name)) else {
        return Ok(None);
    };
    if !served.takes_body {
        return Ok(None);
    }
    let text = app.text(&served.id, Some(&served));
    if served.takes_tokens && text.is_some() && !peek.has_tools() {
        match prepare_tokens(app, tenant, endpoint, body, named).await {
            Err(error) if PASSED_ON.contains(&error.code) => {}
            prepared => {
                let audit = app.audits.is_due().then(|| peek.words(endpoint));
                return prepared.map(|job| Some(Ready::Tokens(Job { audit, ..job })));
            }
        }
    }
    *named = Some(served.id.clone());
    let text = text.as_deref().map(|model| passed::Text { model, texts: &app.texts, tenant });
    let passed = passed::prepare(endpoint, peek, text.as_ref())?;
    Ok(Some(Ready::Passed(served.id, passed)))
}

/// What tokens cannot express and an engine may: it is passed on, and the engine judges it.
const PASSED_ON: &[&str] = &["unsupported_parameter", "template_error", "invalid_type"];

async fn pass_on(
    app: &Shared,
    context: Context,
    model: Arc<str>,
    passed: Passed,
    endpoint: Endpoint,
    mut observation: Observation,
) -> Response {
    let prompt_param = prompt_param(endpoint);
    match app.orchestrator.submit(passed_request(&context, model, passed)) {
        Ok(generated) => passed::respond(generated, context, observation, prompt_param).await,
        Err(error) => {
            let error = ApiError::from_route(&error, prompt_param);
            tracing::info!(code = error.code, error = %error.message, "request failed");
            observation.conclude(error.outcome());
            error.into_response()
        }
    }
}

fn passed_request(context: &Context, model: Arc<str>, passed: Passed) -> GenerateRequest {
    let Passed { body, prompt, unit, choices, sampling } = passed;
    GenerateRequest {
        id: context.id().clone(),
        tenant: context.tenant.clone(),
        salt: context.salt.clone(),
        model,
        prompt,
        unit,
        body: Some(body),
        audit: None,
        choices,
        sampling,
        sampling_is_particular: true,
    }
}

async fn prepare_chat(
    app: &Shared,
    tenant: &TenantId,
    body: &Bytes,
    named: &mut Option<Arc<str>>,
) -> Result<Job, ApiError> {
    let (model, spec, text) = {
        let mut body: ChatBody<'_> = request::parse(body)?;
        let shared = body.take_shared();
        let model = known_model(app, shared.model.as_deref())?;
        *named = Some(model.id.clone());
        let chat = body.check(shared, &app.request_limits)?;
        let text = chat.render(&model.template)?;
        (model, chat.spec, text)
    };
    let tokens = encode(app, tenant, Endpoint::Chat, &model, text).await?;
    let default = app.request_limits.output_tokens_default_max;
    job(app, Endpoint::Chat, model, spec, vec![("messages".to_owned(), tokens)], default)
}

async fn prepare_completions(
    app: &Shared,
    tenant: &TenantId,
    body: &Bytes,
    named: &mut Option<Arc<str>>,
) -> Result<Job, ApiError> {
    let (model, completions) = {
        let mut body: CompletionsBody<'_> = request::parse(body)?;
        let shared = body.take_shared();
        let model = known_model(app, shared.model.as_deref())?;
        *named = Some(model.id.clone());
        (model, body.check(shared, &app.request_limits)?)
    };
    let mut prompts = Vec::with_capacity(completions.prompts.len());
    for (index, prompt) in completions.prompts.iter().enumerate() {
        let path = completions.prompt_path(index);
        let tokens = match prompt {
            Prompt::Text(text) => {
                encode(app, tenant, Endpoint::Completions, &model, text.clone().into_owned()).await?
            }
            Prompt::Tokens(tokens) => within_vocabulary(tokens, &model, &path)?,
        };
        if tokens.is_empty() {
            return Err(ApiError::invalid_value(
                path.clone(),
                format!("{path} is empty; send at least one token"),
            ));
        }
        prompts.push((path, tokens));
    }
    job(app, Endpoint::Completions, model, completions.spec, prompts, COMPLETION_TOKENS_DEFAULT)
}

fn known_model(app: &Shared, name: Option<&str>) -> Result<Arc<ModelText>, ApiError> {
    let unknown = |name| {
        let names = app.model_names();
        ApiError::unknown_model(name, names.iter().map(|id| &**id))
    };
    match name {
        None => {
            let error = unknown("");
            let message =
                format!("model is missing; {}", error.message.rsplit("; ").next().unwrap_or_default());
            Err(ApiError::invalid("missing_required_parameter", message).at("model"))
        }
        Some(name) => app.text(name, app.orchestrator.served(name).as_ref()).ok_or_else(|| unknown(name)),
    }
}

/// Short texts are encoded where they are; a long one would hold up every other stream of this thread.
async fn encode(
    app: &Shared,
    tenant: &TenantId,
    endpoint: Endpoint,
    model: &Arc<ModelText>,
    text: String,
) -> Result<Arc<[TokenId]>, ApiError> {
    let text_bytes = text.len();
    let encoding = {
        let (model, texts, tenant) = (model.clone(), app.texts.clone(), tenant.clone());
        move || {
            // English has about four bytes a token.
            let mut tokens = Vec::with_capacity(text.len() / 3);
            let (tokenizer, tenant) = (&model.tokenizer, tenant.as_str());
            match endpoint {
                Endpoint::Chat => texts.encode(tokenizer, tenant, &text, &mut tokens)?,
                Endpoint::Completions => texts.encode_completion(tokenizer, tenant, &text, &mut tokens)?,
            }
            Ok::<Arc<[TokenId]>, EncodeError>(tokens.into())
        }
    };
    let encoded = if text_bytes <= app.request_limits.inline_text_bytes_max {
        encoding()
    } else {
        tokio::task::spawn_blocking(encoding)
            .await
            .map_err(|_| internal("the tokenizer failed on this text"))?
    };
    encoded.map_err(|error| {
        let field = prompt_param(endpoint);
        ApiError::invalid_value(field, format!("{field} cannot be tokenised: {error}"))
    })
}

fn internal(detail: &str) -> ApiError {
    ApiError::from_route(&RouteError::Internal { detail: detail.to_owned() }, "prompt")
}

fn within_vocabulary(tokens: &[TokenId], model: &ModelText, path: &str) -> Result<Arc<[TokenId]>, ApiError> {
    let size = model.tokenizer.vocab_size();
    match tokens.iter().position(|token| *token as usize >= size) {
        None => Ok(tokens.into()),
        Some(at) => {
            let message = format!("{path}[{at}] is {}, but token ids go from 0 to {}", tokens[at], size - 1);
            Err(ApiError::invalid_value(format!("{path}[{at}]"), message))
        }
    }
}

/// `prompts` come with the names that errors use for them.
fn job(
    app: &Shared,
    endpoint: Endpoint,
    model: Arc<ModelText>,
    spec: Spec,
    prompts: Vec<(String, Arc<[TokenId]>)>,
    output_tokens_default: u32,
) -> Result<Job, ApiError> {
    let matcher = match &*spec.stop {
        [] => None,
        strings => Some(
            StopMatcher::new(strings).map_err(|error| ApiError::invalid_value("stop", error.to_string()))?,
        ),
    };
    let sampling_is_particular =
        (spec.seed.is_some() && spec.temperature > 0.0) || spec.choices > 1 || spec.logprobs.is_some();
    let seed = spec.seed.unwrap_or_else(|| app.seeds.draw());
    let sampled = prompts.into_iter().map(|(param, tokens)| {
        let lengths = Lengths {
            prompt_tokens: tokens.len(),
            context_tokens_max: model.context_tokens_max,
            output_tokens_default,
            prompt_param: &param,
        };
        let sampling = spec.sampling(lengths, &model.stop_tokens, seed)?;
        Ok((tokens, sampling))
    });
    let prompts = sampled.collect::<Result<Vec<_>, ApiError>>()?;
    Ok(Job { endpoint, model, spec, matcher, prompts, sampling_is_particular, audit: None })
}

/// The name that errors use for the prompt when an engine refuses it.
fn prompt_param(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::Chat => "messages",
        Endpoint::Completions => "prompt",
    }
}

async fn respond(app: &Shared, context: &Context, job: Job, mut observation: Observation) -> Response {
    let prompt_param = prompt_param(job.endpoint);
    let refuse = |error: &RouteError| {
        let error = ApiError::from_route(error, prompt_param);
        tracing::info!(code = error.code, error = %error.message, "request failed");
        error
    };
    let (responses, ids) = match submit(app, context, &job) {
        Ok(submitted) => submitted,
        Err(error) => {
            let error = refuse(&error);
            observation.conclude(error.outcome());
            return error.into_response();
        }
    };
    let identity = Identity {
        request_id: context.id().as_str(),
        created: app.clock.unix_seconds(),
        model: &job.model.id,
    };
    let frames = Frames::new(job.endpoint, job.spec.delivery, identity);
    let reading = Reading {
        tokenizer: job.model.tokenizer.clone(),
        stop_tokens: job.prompts[0].1.stop_tokens.clone(),
        matcher: job.matcher,
        logprobs: job.spec.logprobs.is_some(),
        choices: job.spec.choices,
    };
    let mut answer = Answer::new(responses, reading, &frames, observation, ids);
    let written = match job.spec.delivery {
        Delivery::Whole => collect(&mut answer, &frames).await.map(document),
        Delivery::Stream { .. } => match answer.first_batch().await {
            Ok(first) => return events(AnswerBody::new(answer, frames, prompt_param, first)),
            Err(error) => Err(error),
        },
    };
    written.unwrap_or_else(|error| {
        let error = refuse(&error);
        answer.conclude(error.outcome());
        error.into_response()
    })
}

/// Hands every prompt over at once. If one is refused, those before it are cancelled by being dropped.
fn submit(app: &Shared, context: &Context, job: &Job) -> Result<(SmallVec<[Generated; 1]>, Ids), RouteError> {
    let parts: Vec<LiveId> = match job.prompts.len() {
        1 => Vec::new(),
        count => {
            (0..count).map(|index| app.live.take_part(context.id(), index, || app.seeds.draw())).collect()
        }
    };
    let mut responses = SmallVec::new();
    for (index, prompt) in job.prompts.iter().enumerate() {
        let id = parts.get(index).map_or(context.id(), LiveId::id).clone();
        responses.push(app.orchestrator.submit(token_request(context, job, id, prompt))?);
    }
    Ok((responses, Ids { whole: context.clone(), parts }))
}

fn token_request(
    context: &Context,
    job: &Job,
    id: RequestId,
    (prompt, sampling): &(Arc<[TokenId]>, Sampling),
) -> GenerateRequest {
    GenerateRequest {
        id,
        tenant: context.tenant.clone(),
        salt: context.salt.clone(),
        model: job.model.id.clone(),
        prompt: prompt.clone(),
        unit: PromptUnit::Tokens,
        body: None,
        audit: job.audit.clone().filter(|_| job.prompts.len() == 1),
        choices: job.spec.choices,
        sampling: sampling.clone(),
        sampling_is_particular: job.sampling_is_particular,
    }
}

fn document(json: Bytes) -> Response {
    let mut response = Response::new(Body::from(json));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn events(body: AnswerBody) -> Response {
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks nginx not to gather chunks.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
