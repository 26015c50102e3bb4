//! The double of a plain OpenAI-like server, such as llama.cpp's: models, completions, chat, and little else.
//!
//! In: [`OpenAiOptions`]. Out: a server on loopback without KV events and without metrics. Start at
//! [`OpenAiDouble::start`].
//!
//! Evidence: OpenAI's public API, and what llama.cpp's server documents of its own routes (`/props`, `/tokenize`, the
//! shape of errors, the empty last delta). Nothing was captured.

mod http;

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::double::ports::PortPlan;
use crate::double::{Body, BodyOptions, Life, Running, Species};
use crate::engine::nixl::Arrived;
use crate::engine::pool::Style;
use crate::engine::rank::{EventFormat, Neighbours, Rank};
use crate::engine::{Core, Load, Offer, Settings};
use crate::events::wire::{HashFormat, Shape};
use crate::kv::Model;
use crate::vllm::{ApiKey, seconds};

/// Tokens of a block of the pool that nobody sees.
const BLOCK_SIZE: usize = 16;

/// A plain server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OpenAiOptions {
    /// The model's name; requests may name any.
    pub model: String,
    /// Stands for the weights: doubles with the same seed give the same tokens.
    pub model_seed: u64,
    /// One generated token in this many is the end token; 0 for never.
    pub eos_one_in: u64,
    /// Context length, tokens.
    pub context_length: usize,
    /// Requests that run at once; more wait.
    pub slots: usize,
    /// The key that `/v1` asks for.
    pub api_key: Option<ApiKey>,
    /// Whether `/props` answers.
    pub props: bool,
    /// Whether `/tokenize` and `/detokenize` answer.
    pub tokenize: bool,
    /// Time of a step.
    #[serde(with = "seconds")]
    pub step: Duration,
    /// Time that a step takes longer for each prompt token it computes.
    #[serde(with = "seconds")]
    pub prompt_token: Duration,
    /// The HTTP port; 0 for any.
    pub port: u16,
}

impl Default for OpenAiOptions {
    fn default() -> Self {
        Self {
            model: "double".into(),
            model_seed: 1,
            eos_one_in: 0,
            context_length: 4096,
            slots: 4,
            api_key: None,
            props: true,
            tokenize: true,
            step: Duration::from_millis(1),
            prompt_token: Duration::ZERO,
            port: 0,
        }
    }
}

/// What lives as long as the double.
#[derive(Debug)]
pub(crate) struct OpenAi {
    options: OpenAiOptions,
    body: Arc<Body>,
}

/// A server that knows no other.
#[derive(Debug)]
struct Alone;

impl Neighbours for Alone {
    fn fetch(&self, _load: Load) -> BoxFuture<'static, Result<Arrived, String>> {
        futures::future::ready(Err("this server loads no KV".to_owned())).boxed()
    }

    fn offer(&self, _offer: Offer) {}

    fn died(&self) {}
}

impl Species for OpenAi {
    fn body(&self) -> &Arc<Body> {
        &self.body
    }

    fn start_life(self: Arc<Self>, number: u64) -> BoxFuture<'static, io::Result<Life>> {
        let options = &self.options;
        let blocks = (options.context_length / BLOCK_SIZE + 1) * options.slots + 1;
        let settings = Settings {
            block_size: BLOCK_SIZE,
            blocks,
            prefix_caching: true,
            style: Style::Table,
            running_max: options.slots,
            by_priority: false,
            model: Model::new(options.model_seed, options.eos_one_in),
            hash_root: number,
            connector: None,
        };
        let rank = Arc::new(Rank {
            index: 0,
            core: Mutex::new(Core::new(settings)),
            wake: tokio::sync::Notify::new(),
            pace: self.body.pace.clone(),
            lies: self.body.lies.clone(),
            publisher: None,
            load_publisher: None,
            last_load: Mutex::new(None),
            format: EventFormat { shape: Shape::Maps, hashes: HashFormat::Unsigned },
            stepped: self.body.stepped.clone(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(rank.clone().run(Arc::new(Alone)));
        futures::future::ready(Ok(Life::new(vec![rank], Vec::new(), tasks, Vec::new()))).boxed()
    }

    fn router(self: Arc<Self>) -> Router {
        http::router(&self)
    }
}

/// A plain server that is none. Derefs to [`Running`]; stops when dropped.
#[derive(Debug)]
pub struct OpenAiDouble {
    running: Running,
    openai: Arc<OpenAi>,
}

impl OpenAiDouble {
    /// Starts a server on loopback; returns when it answers.
    ///
    /// # Panics
    /// If a port is taken.
    pub async fn start(options: OpenAiOptions) -> Self {
        Self::try_start(options).await.expect("a double needs a loopback port")
    }

    /// As [`OpenAiDouble::start`].
    ///
    /// # Errors
    /// If a port is taken.
    pub async fn try_start(options: OpenAiOptions) -> io::Result<Self> {
        let body = Body::new(BodyOptions {
            port: options.port,
            ports: PortPlan { ranks: 1, ..PortPlan::default() }.take()?,
            block_size: BLOCK_SIZE,
            topic: String::new(),
            death_linger: Duration::ZERO,
            step: options.step,
            prompt_token: options.prompt_token,
        })?;
        let openai = Arc::new(OpenAi { options, body: Arc::new(body) });
        Ok(Self { running: Running::start(openai.clone()).await?, openai })
    }

    /// What it was started with.
    pub fn options(&self) -> &OpenAiOptions {
        &self.openai.options
    }
}

impl Deref for OpenAiDouble {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}
