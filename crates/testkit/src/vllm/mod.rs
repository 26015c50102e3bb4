//! The double of a vLLM server.
//!
//! In: [`VllmOptions`]. Out: a server on loopback that answers, publishes KV events, hands KV to other doubles, and can
//! be made to misbehave. Start at [`VllmDouble::start`]; the HTTP surface is in `http`, one life of the engine in
//! `life`, NIXL's rules in the crate's `engine::nixl`.

mod http;
mod life;
mod metrics;
mod options;
mod side_channel;

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use axum::Router;
use futures::FutureExt;
use futures::future::BoxFuture;

pub(crate) use self::options::seconds;
pub use self::options::{
    ApiKey, ConnectorOptions, HashFormat, KvEventOptions, KvRole, LoadFailure, TransferMode, VllmOptions,
    VllmVersion,
};
use crate::double::{Body, BodyOptions, Life, Running, Species};

/// What lives as long as the double.
#[derive(Debug)]
pub(crate) struct Vllm {
    pub(crate) options: VllmOptions,
    pub(crate) body: Arc<Body>,
    pub(crate) sleeping: AtomicBool,
}

impl Vllm {
    /// What two engines' handshake compares.
    fn compatibility(&self) -> String {
        let connector = self.options.connector.as_ref();
        let (mode, dtype) =
            connector.map_or(("", ""), |connector| (connector.mode.name(), connector.cache_dtype.as_str()));
        format!("{} {} {mode} {dtype}", self.options.version.name(), self.root())
    }

    fn root(&self) -> &str {
        self.options.root.as_deref().unwrap_or(&self.options.model)
    }

    /// The engine core is dead: requests fail with 500, `/health` says 503, and soon the server closes.
    fn died(&self) {
        self.body.engine_died(self.options.death_linger);
    }
}

impl Species for Vllm {
    fn body(&self) -> &Arc<Body> {
        &self.body
    }

    fn start_life(self: Arc<Self>, number: u64) -> BoxFuture<'static, io::Result<Life>> {
        async move { life::start(&self, number).await }.boxed()
    }

    fn router(self: Arc<Self>) -> Router {
        http::router(&self)
    }
}

/// A vLLM server that is none. Derefs to [`Running`]; stops when dropped.
#[derive(Debug)]
pub struct VllmDouble {
    running: Running,
    vllm: Arc<Vllm>,
}

impl VllmDouble {
    /// Starts a server on loopback; returns when it answers.
    ///
    /// # Panics
    /// If a port is taken, or the pool cannot hold `max_model_len` tokens (at which vLLM refuses to start as well).
    pub async fn start(options: VllmOptions) -> Self {
        Self::try_start(options).await.expect("a double needs loopback ports")
    }

    /// As [`VllmDouble::start`].
    ///
    /// # Errors
    /// If a port is taken.
    ///
    /// # Panics
    /// If the pool cannot hold `max_model_len` tokens.
    pub async fn try_start(options: VllmOptions) -> io::Result<Self> {
        assert!(
            options.dp > 0 && options.block_size > 0,
            "an engine has at least one rank, a block one token"
        );
        assert!(
            (options.blocks - 1) * options.block_size >= options.max_model_len,
            "the KV pool must hold one request of max_model_len tokens"
        );
        let body = Body::new(BodyOptions {
            port: options.port,
            ports: life::port_plan(&options).take()?,
            block_size: options.block_size,
            topic: options.kv_events.as_ref().map(|events| events.topic.clone()).unwrap_or_default(),
            death_linger: options.death_linger,
            step: options.step,
            prompt_token: options.prompt_token,
        })?;
        let vllm = Arc::new(Vllm { options, body: Arc::new(body), sleeping: AtomicBool::new(false) });
        Ok(Self { running: Running::start(vllm.clone()).await?, vllm })
    }

    /// What it was started with.
    pub fn options(&self) -> &VllmOptions {
        &self.vllm.options
    }

    /// Each rank's engine id of NIXL; new ones after a restart. Empty while the engine is down.
    pub fn engine_ids(&self) -> Vec<String> {
        self.vllm.body.life().map(|life| life.engine_ids.clone()).unwrap_or_default()
    }
}

impl Deref for VllmDouble {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}
