//! `/v1/completions` and `/v1/chat/completions`: from a body to legs to an answer.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use forebay_engines::{FirstToken, KvHandle, KvPlace, Leg, Prompt as LegPrompt, Work};
use forebay_types::{LegId, RankId, RequestId, Sampling, TokenId};
use http::HeaderMap;

use crate::{
    answer::{Answer, Form, Reading, Words, deliver},
    app::{App, random_hex, read_body, request_id, unix_time},
    errors::{ApiError, too_long},
    hand_over::{Exchange, Expected, PullFrom, Transfer},
    legs::{LegReader, Order, WholePrompt},
    options::LoadFailurePolicy,
    request::{self, Prompt, Spec},
    tokenize::{Surroundings, encode},
};

/// vLLM's header for one of several schedulers.
const RANK: &str = "x-data-parallel-rank";
/// Bytes of entropy behind a prefill leg's public id: whoever knows it may read the KV.
const HELD_ID_BYTES: usize = 16;

pub(crate) async fn completions(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    completed(&app, &headers, body).await.unwrap_or_else(IntoResponse::into_response)
}

async fn completed(app: &Arc<App>, headers: &HeaderMap, body: Body) -> Result<Response, ApiError> {
    check_rank(headers)?;
    let body = read_body(body, &app.limits).await?;
    let (spec, prompts) = request::completions(&body, &app.facts().model, &app.limits)?;
    let mut tokens = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        tokens.push(match prompt {
            Prompt::Text(text) => encode(&app.text.tokenizer, text, Surroundings::Added).await?,
            Prompt::Tokens(tokens) => tokens,
        });
    }
    generate(app, Form::Completion, request_id(headers), spec, tokens).await
}

pub(crate) async fn chat(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    chatted(&app, &headers, body).await.unwrap_or_else(IntoResponse::into_response)
}

async fn chatted(app: &Arc<App>, headers: &HeaderMap, body: Body) -> Result<Response, ApiError> {
    check_rank(headers)?;
    let body = read_body(body, &app.limits).await?;
    let (spec, prompt) = request::chat(&body, &app.facts().model, &app.text, &app.limits)?;
    let tokens = encode(&app.text.tokenizer, prompt, Surroundings::AsIs).await?;
    generate(app, Form::Chat, request_id(headers), spec, vec![tokens]).await
}

async fn generate(
    app: &Arc<App>,
    form: Form,
    request: String,
    spec: Spec,
    prompts: Vec<Vec<TokenId>>,
) -> Result<Response, ApiError> {
    let admitted = app.admit()?;
    prompts.iter().try_for_each(|prompt| check(app, prompt))?;
    let id = format!("{}{request}", form.id_prefix());
    let started = start(app, &id, &spec, &prompts)?;
    let words = Words {
        form,
        id: id.clone(),
        created: unix_time().as_secs(),
        model: app.facts().model.to_string(),
        logprobs: spec.logprobs.is_some(),
        prompts: if spec.return_token_ids { prompts.clone() } else { Vec::new() },
        choices_each: spec.choices as usize,
    };
    let reading = Reading {
        tokenizer: app.text.tokenizer.clone(),
        stop_tokens: started.stop_tokens,
        client_stop_tokens: spec.stop_token_ids.clone(),
        stop: spec.stop.clone(),
        holds: started.holds,
        load_failure: app.exchange.as_ref().map_or(LoadFailurePolicy::Recompute, |e| e.options.load_failure),
        remote_cached_tokens: started.remote_cached_tokens,
        deadline: (started.since + app.limits.request_time_max).into(),
    };
    let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let answer = Answer::new(started.readers, spec.choices, reading, started.expected);
    let offering = app.clone();
    let offer = move |answer: &Answer| {
        let (exchange, kv) = (offering.exchange.as_ref()?, answer.held.as_ref()?);
        let held = format!("{id}-{}", random_hex(HELD_ID_BYTES));
        let identity = exchange.identity(&spec.salt, prompts.first()?);
        exchange.offer(held, kv, identity, answer.cached_tokens)
    };
    Ok(deliver(answer, words, spec.delivery, prompt_tokens, offer, admitted).await)
}

/// There is one scheduler, number 0.
fn check_rank(headers: &HeaderMap) -> Result<(), ApiError> {
    match headers.get(RANK).map(|rank| rank.to_str().unwrap_or_default()) {
        None | Some("0") => Ok(()),
        Some(rank) => {
            let rank: String = rank.chars().take(20).collect();
            Err(ApiError::bad(format!("data_parallel_rank {rank} is out of range [0, 1).")))
        }
    }
}

/// What no engine should be asked to compute.
fn check(app: &App, prompt: &[TokenId]) -> Result<(), ApiError> {
    if prompt.is_empty() {
        return Err(ApiError::field("prompt", "the prompt is empty"));
    }
    let vocabulary = app.text.vocabulary_tokens;
    match prompt.iter().find(|token| **token >= vocabulary) {
        Some(token) => {
            let message = format!("token id {token} is out of vocabulary: the model has {vocabulary} tokens");
            Err(ApiError::field("prompt", message))
        }
        None => Ok(()),
    }
}

/// Legs that run.
struct Started {
    readers: Vec<LegReader>,
    stop_tokens: Arc<[TokenId]>,
    holds: bool,
    remote_cached_tokens: Option<u32>,
    expected: Option<Expected>,
    since: Instant,
}

fn start(app: &App, id: &str, spec: &Spec, prompts: &[Vec<TokenId>]) -> Result<Started, ApiError> {
    let own = if spec.ignore_eos { &[][..] } else { &app.text.stop_tokens };
    let stop_tokens: Arc<[TokenId]> = own.iter().chain(&spec.stop_token_ids).copied().collect();
    // One seed for all prompts, as vLLM has it where the request names one.
    let seed = spec.seed.unwrap_or_else(random_seed);
    let mut started = Started {
        readers: Vec::new(),
        stop_tokens,
        holds: false,
        remote_cached_tokens: None,
        expected: None,
        since: Instant::now(),
    };
    for prompt in prompts {
        let sampling = sampling(app, spec, prompt.len(), started.stop_tokens.clone(), seed)?;
        let order = order(app, id, spec, prompt, sampling, &mut started)?;
        started.readers.push(app.legs.start(order).map_err(|error| ApiError::of_start(&error))?);
    }
    Ok(started)
}

fn random_seed() -> u64 {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).expect("the system gives entropy");
    u64::from_le_bytes(seed)
}

fn sampling(
    app: &App,
    spec: &Spec,
    prompt_tokens: usize,
    stop_tokens: Arc<[TokenId]>,
    seed: u64,
) -> Result<Sampling, ApiError> {
    let context = app.facts().context_tokens_max;
    let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
    let room = context.saturating_sub(prompt_tokens);
    let wanted = spec.output_tokens_max.unwrap_or(room);
    if room == 0 || wanted > room {
        return Err(too_long(context, prompt_tokens.saturating_add(wanted.max(1))));
    }
    Ok(Sampling {
        temperature: spec.temperature,
        top_p: spec.top_p,
        top_k: spec.top_k,
        seed,
        output_tokens_max: wanted,
        stop_tokens,
        logprobs: spec.logprobs,
    })
}

fn order(
    app: &App,
    id: &str,
    spec: &Spec,
    prompt: &[TokenId],
    sampling: Sampling,
    started: &mut Started,
) -> Result<Order, ApiError> {
    let root = app.hasher.root(&app.facts().model, &spec.salt);
    let prompt = LegPrompt {
        hashes: app.hasher.chain(root, prompt).into(),
        tokens: prompt.into(),
        root,
        salt: spec.salt.clone(),
    };
    let leg = Leg {
        id: LegId(0),
        request: RequestId::from(id),
        dp_rank: 0,
        prompt,
        choices: (0..spec.choices).collect(),
        sampling: Arc::new(sampling),
        work: Work::Aggregated,
        body: None,
        deadline: started.since + app.limits.request_time_max,
    };
    match (&app.exchange, &spec.transfer) {
        // Without a connector the parameters mean nothing, as with vLLM.
        (None, _) | (_, Transfer::None) => Ok(Order { leg, whole_prompt: None }),
        (Some(_), Transfer::Hold) => {
            started.holds = true;
            Ok(Order { leg: Leg { work: Work::Prefill, ..leg }, whole_prompt: None })
        }
        (Some(exchange), Transfer::Pull(from)) => pull(exchange, from, &spec.salt, leg, started),
    }
}

/// A decode leg that draws the first token itself, as vLLM's does: the engine is told that the KV of all prompt tokens but
/// the last comes from elsewhere, and that the last is the first of the answer.
fn pull(
    exchange: &Exchange,
    from: &PullFrom,
    salt: &str,
    leg: Leg,
    started: &mut Started,
) -> Result<Order, ApiError> {
    let whole = WholePrompt { tokens: leg.prompt.tokens.clone(), hashes: leg.prompt.hashes.clone() };
    let (shape, all) = (exchange.shape(), whole.tokens.len() as u32);
    let identity = (exchange.identity(salt, &whole.tokens), all);
    let (last, before) = whole.tokens.split_last().expect("prompts are not empty");
    // In-process engines take no hand-over whose first token would end the answer, nor one of nothing.
    if before.is_empty() || leg.sampling.stop_tokens.contains(last) {
        exchange.puller.decline(from, shape, identity);
        return Ok(Order { leg, whole_prompt: None });
    }
    let expected = exchange.puller.expect(from, shape, identity, all - 1).map_err(|error| {
        tracing::warn!(%error, "no memory for a hand-over");
        ApiError::internal("the hand-over could not be prepared")
    })?;
    let kv = KvHandle {
        from: RankId { incarnation: forebay_types::Incarnation(0), dp_rank: 0 },
        leg: LegId(0),
        tokens: all - 1,
        // The prefill engine keeps its own time: it refuses, or sends nothing, when its lease is over.
        held_until: leg.deadline,
        first: FirstToken::Handed,
        place: KvPlace::Pool {
            region: expected.stand_in.clone(),
            blocks: expected.blocks.clone(),
            layout: shape.layout,
        },
    };
    let full = before.len() / shape.block_size_tokens as usize;
    let prompt = LegPrompt { tokens: before.into(), hashes: whole.hashes[..full].into(), ..leg.prompt };
    let sampling = Sampling {
        // The engine counts the last prompt token as the first of the answer.
        output_tokens_max: leg.sampling.output_tokens_max.saturating_add(1),
        ..(*leg.sampling).clone()
    };
    let first = leg.choices.iter().map(|&choice| (choice, *last)).collect();
    started.remote_cached_tokens = Some(from.cached_tokens);
    started.expected = Some(expected);
    let leg = Leg { prompt, sampling: Arc::new(sampling), work: Work::Decode { kv, first }, ..leg };
    Ok(Order { leg, whole_prompt: Some(whole) })
}
