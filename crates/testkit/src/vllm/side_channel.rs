//! Between two vLLM doubles: handshake, reading of blocks, notices and heartbeats.
//!
//! In: loads of a rank ([`Wire`]). Out: HTTP requests to the other double's side channel, and KV. The real side channel
//! is ZMQ with NIXL's metadata and the KV goes by RDMA; no orchestrator ever speaks either, so this protocol is our
//! own. What is real is when it succeeds: the engine id must be that of the engine behind the port, the compatibility
//! hash must match (version, model, cache dtype, mode; not the block size), and a read takes what the blocks hold now,
//! whether the lease still runs or not (vLLM 0.32's `base_worker.py`, `pull_worker.py`).

use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use futures::FutureExt;
use futures::future::BoxFuture;
use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Vllm;
use super::life::TRANSFER_TIMEOUT;
use super::options::ConnectorOptions;
use crate::client;
use crate::engine::nixl::{Arrived, Source, TransferMode};
use crate::engine::pool::BlockId;
use crate::engine::rank::{Neighbours, Rank};
use crate::engine::{Load, Offer};

/// How often a push waits for the prefill to finish looks again, if nothing steps.
const PUSH_POLL: Duration = Duration::from_millis(5);

#[derive(Debug, Serialize, Deserialize)]
struct Read {
    engine_id: String,
    compatibility: String,
    request: String,
    blocks: Vec<BlockId>,
    /// Push: wait until the prefill is done and send its blocks, whatever they are.
    push: bool,
}

/// The side channel of a rank.
pub(super) fn router(rank: Arc<Rank>, compatibility: String) -> Router {
    let state = (rank, compatibility);
    Router::new()
        .route("/read", post(read))
        .route("/notify", post(notify))
        .route("/heartbeat", post(heartbeat))
        .with_state(state)
}

type Side = State<(Arc<Rank>, String)>;

async fn read(State((rank, compatibility)): Side, Json(read): Json<Read>) -> (StatusCode, Json<Value>) {
    let engine_id =
        rank.core.lock().settings().connector.as_ref().map(|connector| connector.engine_id.clone());
    if engine_id.as_deref() != Some(read.engine_id.as_str()) {
        return (StatusCode::CONFLICT, Json(json!({"reason": "another engine is behind this port"})));
    }
    if read.compatibility != compatibility {
        return (StatusCode::CONFLICT, Json(json!({"reason": "compatibility hashes differ"})));
    }
    let blocks = if read.push { pushed(&rank, &read.request).await } else { read.blocks };
    match rank.core.lock().read_blocks(&blocks) {
        Some(entries) => (StatusCode::OK, Json(json!(entries))),
        None => (StatusCode::BAD_REQUEST, Json(json!({"reason": "no such block"}))),
    }
}

/// The blocks of a prefilled request, once it is.
async fn pushed(rank: &Rank, request: &str) -> Vec<BlockId> {
    loop {
        let stepped = rank.stepped.notified();
        let found = rank.core.lock().find_held(request);
        if let Some((_, blocks)) = found {
            return blocks;
        }
        let _timeout_is_a_second_look = tokio::time::timeout(PUSH_POLL, stepped).await;
    }
}

async fn notify(State((rank, _)): Side, Json(request): Json<String>) {
    let mut core = rank.core.lock();
    let id = core.find_held(&request).map_or(request, |(id, _)| id);
    core.release_held(&id);
    rank.wake.notify_one();
}

async fn heartbeat(State((rank, _)): Side, Json(ids): Json<Vec<String>>) {
    let mut core = rank.core.lock();
    let Some(lease) = core.settings().connector.as_ref().map(|connector| connector.lease) else { return };
    core.extend_leases(&ids, Instant::now() + lease * 2 / 3);
}

/// What reaches other vLLM doubles.
#[derive(Debug)]
pub(super) struct Wire {
    vllm: Weak<Vllm>,
    compatibility: String,
    connector: Option<ConnectorOptions>,
}

impl Wire {
    pub(super) fn new(vllm: &Arc<Vllm>) -> Self {
        Self {
            vllm: Arc::downgrade(vllm),
            compatibility: vllm.compatibility(),
            connector: vllm.options.connector.clone(),
        }
    }
}

impl Neighbours for Wire {
    fn fetch(&self, load: Load) -> BoxFuture<'static, Result<Arrived, String>> {
        let (Load::Remote { source, .. }, Some(connector)) = (load, self.connector.clone()) else {
            return futures::future::ready(Err(FAILED.to_owned())).boxed();
        };
        let compatibility = self.compatibility.clone();
        let block_size = self.vllm.upgrade().map_or(0, |vllm| vllm.options.block_size);
        let vllm = self.vllm.clone();
        async move {
            match fetch(&source, &connector, compatibility, block_size).await {
                Ok(arrived) => Ok(arrived),
                Err(Refusal::Fails) => Err(FAILED.to_owned()),
                Err(Refusal::Kills) => {
                    if let Some(vllm) = vllm.upgrade() {
                        vllm.died();
                    }
                    Err(FAILED.to_owned())
                }
            }
        }
        .boxed()
    }

    fn offer(&self, _offer: Offer) {}

    fn died(&self) {
        if let Some(vllm) = self.vllm.upgrade() {
            vllm.died();
        }
    }
}

/// What a client sees of a load that failed.
const FAILED: &str = "Internal server error";

enum Refusal {
    Fails,
    /// An assertion in the worker: fewer blocks were offered than are lacking.
    Kills,
}

async fn fetch(
    source: &Source,
    connector: &ConnectorOptions,
    compatibility: String,
    block_size: usize,
) -> Result<Arrived, Refusal> {
    let deadline = Instant::now() + connector.handshake_timeout;
    let push = connector.mode == TransferMode::Push;
    // The end of the list is read: what comes before is cached here.
    let lacking = source.blocks.len().saturating_sub(source.lacking);
    let read = Read {
        engine_id: source.engine_id.clone(),
        compatibility,
        request: source.request.clone(),
        blocks: source.blocks[lacking..].to_vec(),
        push,
    };
    let base = format!("http://{}:{}", source.host, source.port);
    let body = serde_json::to_value(&read).map_err(|_| Refusal::Fails)?;
    let answer = client::send(Method::POST, &format!("{base}/read"), &[], &body, TRANSFER_TIMEOUT).await;
    let Ok(answer) = answer else {
        tokio::time::sleep_until(deadline).await; // vLLM's handshake waits this long before it gives up
        return Err(Refusal::Fails);
    };
    if answer.status != 200 {
        return Err(Refusal::Fails);
    }
    let mut blocks: Vec<Vec<u64>> = serde_json::from_slice(&answer.body).map_err(|_| Refusal::Fails)?;
    let same_size = blocks.first().is_none_or(|block| block.len() == block_size);
    if blocks.len() < source.lacking && same_size {
        return Err(Refusal::Kills);
    }
    if push {
        blocks.drain(..blocks.len().saturating_sub(source.lacking));
    }
    tokio::time::sleep_until(Instant::now() + connector.transfer_time).await;
    notify_fetched(&base, &source.request).await;
    Ok(Arrived::Blocks(blocks))
}

async fn notify_fetched(base: &str, request: &str) {
    let url = format!("{base}/notify");
    let _lease_frees_the_blocks_otherwise =
        client::send(Method::POST, &url, &[], &json!(request), TRANSFER_TIMEOUT).await;
}

/// A request with these parameters never reached the engine: tells the prefill engine to free its blocks, as vLLM 0.32
/// does for requests that its front end rejects.
pub(super) async fn reject(params: &serde_json::Map<String, Value>) {
    let transfer = crate::engine::request::Transfer::Params(params.clone());
    if let Some((host, port, request)) = crate::engine::nixl::heartbeat_target(&transfer) {
        notify_fetched(&format!("http://{host}:{port}"), &request).await;
    }
}

/// Tells prefill engines, every `period`, that the requests which wait for them are alive.
pub(super) async fn heartbeats(rank: Arc<Rank>, period: Duration) {
    loop {
        tokio::time::sleep_until(Instant::now() + period).await;
        let waited_for = rank.core.lock().waited_for();
        for (host, port, request) in waited_for {
            let url = format!("http://{host}:{port}/heartbeat");
            let _dead_prefill_engines_do_not_care =
                client::send(Method::POST, &url, &[], &json!([request]), period).await;
        }
    }
}
