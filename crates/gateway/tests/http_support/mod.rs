//! A fleet of one scripted line, and clients that ask it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

pub mod sockets;

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Request, StatusCode},
};
use forebay_gateway::{
    decisions::{Accuracy, DecisionLog, DecisionQuery, DecisionRecord},
    http::{AttachedTexts, Clock, Gateway, HttpLimits, ModelText, Parts, RequestLimits, Seeds},
    metrics::Metrics,
    orchestrator::api::{
        EngineStatus, Feedback, GenerateRequest, LinkStatus, LogsAnswer, Orchestrate, Response,
        ResponseEvent, ResponseSender, RouteError, ServedModel, Usage, WhatIf, response,
    },
};
use forebay_text::{ChatTemplate, Tokenizer};
use forebay_types::{FinishReason, Leaning, RankLoad, RequestId, Role, SampledToken, TokenId, TokenLogprobs};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tower::ServiceExt;

/// End of turn of the built-in byte tokenizer.
pub const END: TokenId = 258;
/// The model's context.
pub const CONTEXT: u32 = 500;
pub const MODEL: &str = "tiny";

type Behaviour = Box<dyn FnMut(&GenerateRequest) -> Result<Response, RouteError> + Send>;

/// Does what the test says, and remembers what it was asked.
pub struct Fake {
    behaviour: Mutex<Behaviour>,
    pub requests: Mutex<Vec<GenerateRequest>>,
    pub ready: std::sync::atomic::AtomicBool,
    /// Its engines take no tokens, but requests as they come.
    pub takes_bodies: std::sync::atomic::AtomicBool,
    pub decisions: DecisionLog,
    policy: Mutex<&'static str>,
}

impl Fake {
    pub fn new(
        behaviour: impl FnMut(&GenerateRequest) -> Result<Response, RouteError> + Send + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            behaviour: Mutex::new(Box::new(behaviour)),
            requests: Mutex::default(),
            ready: true.into(),
            takes_bodies: false.into(),
            decisions: DecisionLog::new(100, None),
            policy: Mutex::new("cost"),
        })
    }

    /// Sends these events to every request at once.
    pub fn saying(events: impl Fn(&GenerateRequest) -> Vec<ResponseEvent> + Send + 'static) -> Arc<Self> {
        Self::new(move |request| {
            let (sender, receiver) = response();
            sender.send(events(request));
            Ok(receiver)
        })
    }

    /// Hands the sending halves to the test.
    pub fn by_hand() -> (Arc<Self>, Arc<Mutex<Vec<ResponseSender>>>) {
        let senders = Arc::new(Mutex::new(Vec::new()));
        let kept = senders.clone();
        let fake = Self::new(move |_| {
            let (sender, receiver) = response();
            kept.lock().push(sender);
            Ok(receiver)
        });
        (fake, senders)
    }

    pub fn last_request(&self) -> GenerateRequest {
        self.requests.lock().last().cloned().expect("a request was submitted")
    }
}

impl Orchestrate for Fake {
    fn submit(&self, request: GenerateRequest) -> Result<Response, RouteError> {
        self.requests.lock().push(request.clone());
        (self.behaviour.lock())(&request)
    }
    fn what_if(&self, request: &GenerateRequest) -> Result<WhatIf, RouteError> {
        self.requests.lock().push(request.clone());
        Err(RouteError::NoEngine { model: request.model.clone(), detail: "asked only".into() })
    }
    fn models(&self) -> Vec<ServedModel> {
        ["org/other", MODEL]
            .map(|id| ServedModel {
                id: id.into(),
                context_tokens_max: CONTEXT,
                created: 7,
                takes_tokens: !self.takes_bodies.load(Ordering::Relaxed),
                takes_body: self.takes_bodies.load(Ordering::Relaxed),
            })
            .into()
    }
    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
    fn engines(&self) -> Vec<EngineStatus> {
        vec![EngineStatus {
            engine: "embedded-0".into(),
            kind: "embedded".into(),
            incarnation: 3,
            state: "ready".into(),
            detail: String::new(),
            role: Role::Both,
            model: MODEL.into(),
            load: RankLoad { running: 2, blocks_total: 64, blocks_free: 60, ..RankLoad::default() },
            breaker: "closed".into(),
            leaning: Leaning::Neither,
            prefill_share: 0.25,
            indexed_blocks: 9,
            restarts: 1,
            ranks: Vec::new(),
            cache_sight: "events".into(),
            notes: Vec::new(),
        }]
    }
    fn accuracy(&self) -> Vec<Accuracy> {
        self.decisions.accuracy()
    }
    fn links(&self) -> Vec<LinkStatus> {
        vec![LinkStatus {
            from: "embedded-0".into(),
            to: "embedded-1".into(),
            state: "ready".into(),
            latency_seconds: 0.004,
            tokens_per_second: 1.45e6,
            bytes_per_second: Some(1.9e11),
            transfers: 3,
        }]
    }
    fn decisions(&self, query: &DecisionQuery) -> Vec<Arc<DecisionRecord>> {
        self.decisions.find(query)
    }
    fn drain(&self, engine: &str) -> bool {
        engine == "embedded-0"
    }
    fn logs(&self, engine: &str, lines: usize) -> LogsAnswer {
        match engine {
            "embedded-0" => LogsAnswer::NotKept,
            "kept" => LogsAnswer::Asked(Box::pin(async move { Ok(vec!["a line".to_owned(); lines]) })),
            _ => LogsAnswer::UnknownEngine,
        }
    }
    fn decision(&self, id: &RequestId) -> Option<Arc<DecisionRecord>> {
        self.decisions.get(id)
    }
    fn policy(&self) -> &'static str {
        *self.policy.lock()
    }
    fn set_policy(&self, name: &str) -> Result<(), String> {
        match ["cost", "round-robin"].into_iter().find(|known| *known == name) {
            Some(known) => {
                *self.policy.lock() = known;
                Ok(())
            }
            None => Err(format!("unknown policy `{name}`; did you mean `cost`?")),
        }
    }
}

/// Moves only when told to, except by a millisecond at each look, so that durations are never all zero.
#[derive(Default)]
pub struct TestClock(AtomicU64);

impl Clock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.fetch_add(1, Ordering::Relaxed))
    }
    fn unix_seconds(&self) -> u64 {
        1_760_000_000
    }
}

#[derive(Default)]
pub struct TestSeeds(AtomicU64);

impl Seeds for TestSeeds {
    fn draw(&self) -> u64 {
        0xabcd_0000_0000 + self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// Everything but the fleet, as a test wants it.
pub struct Setup {
    pub http_limits: HttpLimits,
    pub request_limits: RequestLimits,
    pub keys: Option<&'static str>,
    pub template: Option<&'static str>,
}

impl Default for Setup {
    fn default() -> Self {
        let http_limits = HttpLimits { body_bytes_max: 64 * 1024, ..HttpLimits::default() };
        Self { http_limits, request_limits: RequestLimits::default(), keys: None, template: None }
    }
}

impl Setup {
    pub fn gateway(self, fake: &Arc<Fake>) -> (Gateway, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new());
        let tokenizer = Tokenizer::bytes();
        let template = match self.template {
            None => ChatTemplate::chatml(),
            Some(source) => ChatTemplate::new(source, &tokenizer).unwrap(),
        };
        let text = |id: &str| ModelText {
            id: id.into(),
            tokenizer: tokenizer.clone(),
            template: template.clone(),
            context_tokens_max: CONTEXT,
            stop_tokens: vec![END],
        };
        let gateway = Gateway::new(Parts {
            orchestrator: fake.clone(),
            models: vec![text(MODEL), text("org/other")],
            attached: AttachedTexts::default(),
            keys: self.keys.map(|keys| forebay_gateway::http::ApiKeys::parse(keys).unwrap()),
            metrics: metrics.clone(),
            http_limits: self.http_limits,
            request_limits: self.request_limits,
            clock: Arc::new(TestClock::default()),
            seeds: Arc::new(TestSeeds::default()),
        });
        (gateway, metrics)
    }
}

/// A gateway with defaults.
pub fn gateway(fake: &Arc<Fake>) -> Gateway {
    Setup::default().gateway(fake).0
}

pub fn token(choice: u32, token: TokenId) -> ResponseEvent {
    ResponseEvent::Token(SampledToken { choice, position: 0, token, logprobs: None })
}

pub fn token_with_logprobs(
    choice: u32,
    token: TokenId,
    chosen: f32,
    top: &[(TokenId, f32)],
) -> ResponseEvent {
    let logprobs = Some(Box::new(TokenLogprobs { chosen, top: top.to_vec() }));
    ResponseEvent::Token(SampledToken { choice, position: 0, token, logprobs })
}

pub fn finished(choice: u32, reason: FinishReason) -> ResponseEvent {
    ResponseEvent::Finished { choice, reason }
}

pub fn done(prompt_tokens: u32, cached_tokens: u32, output_tokens: u32) -> ResponseEvent {
    ResponseEvent::Done(Usage { prompt_tokens, cached_tokens, output_tokens })
}

/// The bytes of `text` as tokens of one choice, its end of turn and its end.
pub fn spoken(choice: u32, text: &str) -> Vec<ResponseEvent> {
    let mut events: Vec<ResponseEvent> =
        text.bytes().map(|byte| token(choice, TokenId::from(byte))).collect();
    events.push(token(choice, END));
    events.push(finished(choice, FinishReason::Stop));
    events
}

/// An answer of one choice.
pub fn answer(text: &str) -> Vec<ResponseEvent> {
    let mut events = spoken(0, text);
    events.push(done(12, 4, text.len() as u32 + 1));
    events
}

/// A fleet that says `hi` to everybody.
pub fn greeter() -> Arc<Fake> {
    Fake::saying(|request| {
        let mut events: Vec<ResponseEvent> =
            (0..request.choices).flat_map(|choice| spoken(choice, "hi")).collect();
        events.push(done(request.prompt.len() as u32, 0, 3 * request.choices));
        events
    })
}

/// The sending half of the request that was submitted last, once there is one.
pub async fn next_sender(senders: &Arc<Mutex<Vec<ResponseSender>>>) -> ResponseSender {
    loop {
        if let Some(sender) = senders.lock().pop() {
            return sender;
        }
        tokio::task::yield_now().await;
    }
}

/// Waits until the response that belongs to `sender` was dropped; passes over other feedback.
pub async fn client_gone(sender: &ResponseSender) {
    while poll_fn(|cx| sender.poll_feedback(cx)).await != Feedback::ClientGone {}
}

#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of every server-sent event; an event with a name has it before its data.
    pub fn events(&self) -> Vec<String> {
        assert!(self.body.ends_with("\n\n"), "{}", self.body);
        self.body
            .split_terminator("\n\n")
            .map(|event| event.replace("data: ", "").replace('\n', " "))
            .collect()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

pub async fn ask(router: Router, request: Request<Body>) -> Reply {
    let response = router.oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Reply { status: parts.status, headers: parts.headers, body: String::from_utf8(body.to_vec()).unwrap() }
}

pub fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

pub fn get(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

/// A chat request with `more` members.
pub fn chat_body(more: &str) -> String {
    format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":"hello"}}]{more}}}"#)
}

pub async fn chat(gateway: &Gateway, more: &str) -> Reply {
    ask(gateway.public_router(), post("/v1/chat/completions", chat_body(more))).await
}

pub async fn complete(gateway: &Gateway, members: &str) -> Reply {
    ask(gateway.public_router(), post("/v1/completions", format!(r#"{{"model":"tiny",{members}}}"#))).await
}
