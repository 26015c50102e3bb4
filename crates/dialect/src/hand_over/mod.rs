//! Hand-over of KV between dialect servers, in the words of vLLM's NIXL connector (pull mode).
//!
//! A prefill leg's KV is held by its engine under a lease; the answer's `kv_transfer_params` ([`params`]) name it. The
//! decode leg's engine connects to the side channel ([`wire`], [`source`]), and fetches the blocks that it lacks
//! ([`pull`], [`mover`]). Start at [`KvConnector`].
//!
//! The decode leg draws the first token itself, as with vLLM: the engine is told that it has the KV of all prompt tokens
//! but the last, which it computes again. So sampling parameters, several choices and log probabilities need not travel.

mod held;
mod mover;
mod params;
mod pull;
mod source;
mod stats;
#[cfg(test)]
mod tests;
mod wire;

use std::{net::SocketAddr, sync::Arc};

use forebay_engines::{Driver, EngineFacts, KvHandle, KvPlace};
use forebay_kv_move::Mover;
use forebay_types::LegId;
use tokio::{net::TcpListener, runtime::Handle, sync::watch};

use self::held::{Held, HeldTable};
pub(crate) use self::{
    mover::{Expected, Puller},
    params::{HeldParams, PullFrom, Transfer},
    stats::{TransferStats, Transfers},
    wire::{KvShape, PromptIdentity},
};
use crate::options::ConnectorOptions;

/// One engine's end of hand-overs. Made before the engine, which is built with [`KvConnector::mover`].
pub struct KvConnector {
    options: ConnectorOptions,
    puller: Arc<Puller>,
    stats: Arc<TransferStats>,
}

impl KvConnector {
    /// A connector whose transfers run on `runtime`.
    pub fn new(options: ConnectorOptions, runtime: Handle) -> Self {
        let stats = Arc::new(TransferStats::default());
        Self { options, puller: Puller::new(runtime, stats.clone()), stats }
    }

    /// What the engine is to be built with: it moves KV of decode legs that a dialect server started, and no other.
    pub fn mover(&self) -> Arc<dyn Mover> {
        self.puller.clone()
    }
}

/// What the side channel's tasks share.
struct Shared {
    /// This life, unlike any other.
    engine_id: String,
    shape: KvShape,
    held: HeldTable,
    /// Frees what a leg holds.
    release: Box<dyn Fn(LegId) + Send + Sync>,
}

/// A connector at work.
pub(crate) struct Exchange {
    shared: Arc<Shared>,
    pub(crate) options: ConnectorOptions,
    pub(crate) puller: Arc<Puller>,
    stats: Arc<TransferStats>,
    model: Arc<str>,
    /// As decode engines reach it.
    host: String,
    address: SocketAddr,
}

impl Exchange {
    /// Binds the side channel and serves it until `stopping` closes.
    ///
    /// # Errors
    /// If its address cannot be bound.
    pub(crate) async fn open(
        connector: KvConnector,
        driver: Arc<dyn Driver>,
        engine_id: String,
        stopping: watch::Receiver<()>,
    ) -> std::io::Result<Self> {
        let KvConnector { options, puller, stats } = connector;
        let listener = TcpListener::bind((options.bind, options.port)).await?;
        let address = listener.local_addr()?;
        let EngineFacts { model, block_size_tokens, block_bytes, kv, .. } = driver.facts().clone();
        let shape = KvShape { layout: kv.layout, block_size_tokens, block_bytes };
        let release = Box::new(move |leg| driver.release_kv(leg));
        let shared = Arc::new(Shared { engine_id, shape, held: HeldTable::default(), release });
        tokio::spawn(source::serve(listener, shared.clone(), options.connections_max, stopping));
        let host = options.advertise_host.clone().unwrap_or_else(|| address.ip().to_string());
        Ok(Self { shared, options, puller, stats, model, host, address })
    }

    /// Where the side channel listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn shape(&self) -> KvShape {
        self.shared.shape
    }

    /// Identity of a prompt for this engine's model.
    pub(crate) fn identity(&self, salt: &str, tokens: &[u32]) -> PromptIdentity {
        PromptIdentity::of(&self.model, salt, tokens)
    }

    /// Offers the KV that a prefill leg holds. `id` must be unguessable. `None` if the engine holds it elsewhere than in a
    /// pool of this process.
    pub(crate) fn offer(
        &self,
        id: String,
        kv: &KvHandle,
        prompt: PromptIdentity,
        cached_tokens: u32,
    ) -> Option<HeldParams> {
        let KvPlace::Pool { region, blocks, layout: _ } = &kv.place else { return None };
        let held = Held {
            leg: kv.leg,
            region: region.clone(),
            blocks: blocks.clone(),
            tokens: kv.tokens,
            prompt,
            until: kv.held_until,
        };
        self.shared.held.insert(id.clone(), held, std::time::Instant::now());
        Some(HeldParams {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_block_ids: [blocks.iter().map(|block| block.block).collect()],
            remote_engine_id: self.shared.engine_id.clone(),
            remote_request_id: id,
            remote_host: self.host.clone(),
            remote_port: self.address.port(),
            tp_size: 1,
            dcp_size: 1,
            pp_size: 1,
            remote_num_tokens: kv.tokens,
            remote_blocks_expiry_time: None,
            transfer_mode: "pull",
            remote_prefill_cached_tokens: cached_tokens,
        })
    }

    /// Counters, and leases that ended without a hand-over.
    pub(crate) fn transfers(&self) -> (Transfers, u64) {
        (self.stats.read(), self.shared.held.expired(std::time::Instant::now()))
    }
}
