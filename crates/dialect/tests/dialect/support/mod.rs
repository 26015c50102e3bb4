//! Engines to talk to, a client to talk with, and the same engine without a server as the reference.

pub(crate) mod client;
pub(crate) mod msgpack;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_dialect::{
    ConnectorOptions, Ended, EngineModel, EngineOptions, EngineProcess, EventOptions, KvRole,
};
use forebay_engines::{
    Driver, EngineLimits, Launch, Leg, LegEvent, Prompt, Work,
    embedded::{EmbeddedFleet, EmbeddedLauncher, Weights},
    simulated::{SimulatedFleet, SimulatedLauncher, StepCoefficients},
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_kv_move::{SharedMemoryMover, SharedMemorySettings};
use forebay_text::Tokenizer;
use forebay_types::{EngineName, FinishReason, Incarnation, LegId, RequestId, Role, Sampling, TokenId};
use serde_json::Value;
use tokio::{net::TcpListener, runtime::Handle, sync::oneshot, task::JoinHandle};

use self::client::{Client, Metrics};

/// How long anything may take on a machine that is busy with other tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const BLOCK_SIZE: u32 = 16;

/// A served engine. Dropped, it ends.
pub(crate) struct Engine {
    pub(crate) client: Client,
    pub(crate) addresses: forebay_dialect::Addresses,
    shutdown: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<Ended>,
}

impl Engine {
    pub(crate) async fn start(options: EngineOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let process = EngineProcess::start(options, listener).await.unwrap();
        let addresses = process.addresses().clone();
        let (shutdown, down) = oneshot::channel();
        let task = tokio::spawn(process.serve(async {
            let _dropped = down.await;
        }));
        Self { client: Client::new(addresses.http), addresses, shutdown: Some(shutdown), task }
    }

    pub(crate) async fn stop(mut self) -> Ended {
        drop(self.shutdown.take());
        (&mut self.task).await.unwrap()
    }

    pub(crate) async fn metrics(&self) -> Metrics {
        self.client.metrics().await
    }

    /// Waits until a condition on `/metrics` holds.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&Metrics) -> bool) -> Metrics {
        let begun = Instant::now();
        loop {
            let metrics = self.metrics().await;
            if holds(&metrics) {
                return metrics;
            }
            assert!(begun.elapsed() < PATIENCE, "{what} never came true:\n{}", metrics.text);
            tokio::task::yield_now().await;
        }
    }

    /// Waits until nothing runs and nothing is held.
    pub(crate) async fn until_idle(&self) -> Metrics {
        self.until("idleness", |metrics| {
            let idle = ["vllm:num_requests_running", "vllm:num_requests_waiting", "forebay:legs"];
            idle.iter().all(|name| metrics.value(name) == 0.0)
                && metrics.value("vllm:kv_cache_usage_perc") == 0.0
        })
        .await
    }
}

pub(crate) fn limits() -> EngineLimits {
    EngineLimits { blocks_total: 256, block_size_tokens: BLOCK_SIZE, ..EngineLimits::default() }
}

pub(crate) fn simulated(speed: f64) -> EngineModel {
    EngineModel::Simulated { speed, context_tokens_max: 4096, timing: StepCoefficients::H100_8B }
}

/// An engine with free ports and everything on.
pub(crate) fn options(model: EngineModel) -> EngineOptions {
    EngineOptions {
        limits: limits(),
        events: Some(EventOptions::default()),
        connector: Some(ConnectorOptions::loopback(KvRole::Both)),
        ..EngineOptions::new(model)
    }
}

pub(crate) fn with_role(model: EngineModel, role: KvRole) -> EngineOptions {
    EngineOptions { connector: Some(ConnectorOptions::loopback(role)), ..options(model) }
}

/// Tokens that are text, different for each `seed`.
pub(crate) fn prompt(seed: u32, tokens: u32) -> Vec<TokenId> {
    (0..tokens).map(|index| 97 + (index * 7 + seed * 13 + index * index * seed) % 26).collect()
}

/// What one choice came to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) reason: &'static str,
}

/// The same engine without a server.
pub(crate) async fn in_process(
    model: &EngineModel,
    prompt: &[TokenId],
    sampling: Sampling,
    choices: u32,
) -> Vec<Outcome> {
    let hasher = BlockHasher::new(HashKey([5; 16]), BLOCK_SIZE);
    let mover = Arc::new(SharedMemoryMover::new(SharedMemorySettings::default()).unwrap());
    let (name, runtime) = (EngineName::from("reference"), Handle::current());
    let driver: Arc<dyn Driver> = match model {
        EngineModel::Simulated { speed, context_tokens_max, timing } => {
            let fleet = SimulatedFleet {
                model: "sim".into(),
                context_tokens_max: *context_tokens_max,
                limits: limits(),
                hasher,
                mover,
                runtime,
                candidates: Tokenizer::bytes().plain_tokens().into(),
                timing: *timing,
                speed: *speed,
            };
            SimulatedLauncher::new(name, Role::Both, fleet).launch(Incarnation(1)).await.unwrap()
        }
        EngineModel::RandomTiny => {
            let fleet = EmbeddedFleet {
                model: "random-tiny".into(),
                weights: Weights::random_tiny(1),
                limits: limits(),
                hasher,
                mover,
                runtime,
                prior: StepCoefficients::H100_8B,
            };
            EmbeddedLauncher::new(name, Role::Both, fleet).launch(Incarnation(1)).await.unwrap()
        }
        EngineModel::Gguf(_) => unreachable!("not used here"),
    };
    let root = hasher.root(&driver.facts().model, "");
    let leg = Leg {
        id: LegId(1),
        request: RequestId::from("reference"),
        dp_rank: 0,
        prompt: Prompt {
            tokens: prompt.into(),
            hashes: hasher.chain(root, prompt).into(),
            root,
            salt: "".into(),
        },
        choices: (0..choices).collect(),
        sampling: Arc::new(sampling),
        work: Work::Aggregated,
        body: None,
        deadline: Instant::now() + PATIENCE,
    };
    let mut stream = driver.start(leg).unwrap();
    let mut outcomes = vec![Outcome { tokens: Vec::new(), reason: "" }; choices as usize];
    let mut batch = Vec::new();
    while stream.next_batch(&mut batch).await {
        for event in batch.drain(..) {
            match event {
                LegEvent::Token(token) => outcomes[token.choice as usize].tokens.push(token.token),
                LegEvent::Finished { choice, reason } => {
                    outcomes[choice as usize].reason = match reason {
                        FinishReason::Stop => "stop",
                        FinishReason::Length => "length",
                    };
                }
                LegEvent::Started { .. } | LegEvent::Ended => {}
                other => panic!("{other:?}"),
            }
        }
    }
    driver.stop();
    outcomes
}

pub(crate) fn sampling(temperature: f32, seed: u64, output_tokens_max: u32) -> Sampling {
    Sampling {
        temperature,
        top_p: 0.95,
        top_k: 0,
        seed,
        output_tokens_max,
        stop_tokens: [].into(),
        logprobs: None,
    }
}

/// The request that `sampling` describes, for `/v1/completions`.
pub(crate) fn request(prompt: &[TokenId], sampling: &Sampling, choices: u32) -> Value {
    serde_json::json!({
        "prompt": prompt, "n": choices, "max_tokens": sampling.output_tokens_max, "ignore_eos": true,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed, "return_token_ids": true,
    })
}

/// `base` with other fields.
pub(crate) fn with(base: &Value, changes: &Value) -> Value {
    let mut body = base.clone();
    body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    body
}

/// What an answer of `/v1/completions` says of its choices.
pub(crate) fn outcomes(answer: &Value) -> Vec<Outcome> {
    let choices = answer["choices"].as_array().unwrap_or_else(|| panic!("{answer}"));
    let outcome = |choice: &Value| Outcome {
        tokens: token_ids(&choice["token_ids"]),
        reason: reason(&choice["finish_reason"]),
    };
    choices.iter().map(outcome).collect()
}

pub(crate) fn token_ids(value: &Value) -> Vec<TokenId> {
    value.as_array().unwrap_or(&Vec::new()).iter().map(|token| token.as_u64().unwrap() as TokenId).collect()
}

pub(crate) fn reason(value: &Value) -> &'static str {
    match value.as_str() {
        Some("stop") => "stop",
        Some("length") => "length",
        None => "",
        Some(other) => panic!("{other}"),
    }
}
