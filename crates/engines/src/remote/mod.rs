//! Engines in other processes, as their makers ship them: vLLM, SGLang, TensorRT-LLM, anything OpenAI-like.
//!
//! Two halves that meet in [`Reports`](crate::Reports): [`RemoteEngine`] is the data plane (legs as HTTP requests, straight
//! to the engine), and somebody watches the engine: [`observe`] in this process, or the agent beside it. What an engine is
//! and how to speak to it is found out once for each life, by [`attach`], and kept as
//! [`EngineFacts`](crate::EngineFacts) and [`Speech`].

mod attach;
pub mod client;
mod engine;
mod findings;
mod held;
mod launcher;
mod legs;
mod observe;
mod zmq;

use std::sync::Arc;

pub use attach::{
    AttachError, AttachSettings, AttachSpec, Attached, ComparedByGateways, Examination, Overrides,
    TokenizerProbe, attach, examine, look, tokenizers_agree,
};
pub use engine::{RemoteEngine, RemoteLimits, RemoteParts};
pub use findings::{Finding, Findings, Severity};
pub use forebay_engine_wire::discovery::{AddressError, Dialled, KvSource, ZmqAddress};
pub use held::HeldKv;
pub use launcher::{RemoteContext, RemoteLauncher, RemoteSpec};
pub use observe::{
    EventFigures, EventFollower, EventPlan, EventsFollowed, FollowedRank, Heard, HeardBatch, Listener,
    ObservePlan, ObserveSettings, Observer, follow_events, listen, observe,
};
pub use zmq::{MESSAGE_BYTES_MAX, ZmqError};

/// How to speak to one engine in one life; found out, never configured. All that the data plane needs besides
/// [`EngineFacts`](crate::EngineFacts). Agents tell it to gateways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Speech {
    /// Whose words.
    pub dialect: Dialect,
    /// The model's name as the engine knows it; requests name [`EngineFacts::model`](crate::EngineFacts::model).
    pub model: Arc<str>,
    /// Where token ids go in and come out; `None`: it takes only text.
    pub tokens: Option<TokenRoute>,
    /// How KV gets from a prefill leg to a decode leg.
    pub hand_over: HandOver,
    /// How a rank is named, where there are several.
    pub ranks: RankPin,
    /// `cache_salt` is understood: tenants get caches of their own.
    pub salts_cache: bool,
    /// There is a call that aborts by request id, beyond closing the connection.
    pub abort: Abort,
}

/// Whose words an engine speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// `vllm serve`, and what imitates it.
    Vllm,
    /// `sglang.launch_server`.
    Sglang,
    /// `trtllm-serve`.
    Trtllm,
    /// Anything with `/v1/chat/completions` or `/v1/completions`.
    Openai,
}

impl Dialect {
    /// The name that users give it: `vllm`, `sglang`, `trtllm`, `openai`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Trtllm => "trtllm",
            Self::Openai => "openai",
        }
    }

    /// From that name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Vllm, Self::Sglang, Self::Trtllm, Self::Openai]
            .into_iter()
            .find(|dialect| dialect.name() == name)
    }
}

/// Where token ids go in and come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenRoute {
    /// vLLM's `/inference/v1/generate` (`--enable-scale-out`).
    VllmGenerate,
    /// `/v1/completions` with token ids as prompt and `return_token_ids`.
    Completions,
    /// SGLang's `/generate` with `input_ids`.
    SglangGenerate,
}

/// How KV gets from a prefill leg to a decode leg.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HandOver {
    /// It does not.
    None,
    /// vLLM's `kv_transfer_params`: the prefill leg answers them, the decode leg is sent them.
    TransferParams,
    /// SGLang's bootstrap: both legs at once, meeting in a room of this prefill server.
    Bootstrap {
        /// As decode servers reach it.
        host: Arc<str>,
        /// Its bootstrap port.
        port: u16,
    },
}

/// How a request names the rank that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RankPin {
    /// There is one rank, or the engine chooses.
    None,
    /// vLLM's header `X-data-parallel-rank`.
    Header,
    /// SGLang's field `routed_dp_rank`.
    Field,
}

/// How a running leg is called off, besides closing its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Abort {
    /// Not at all.
    Close,
    /// vLLM's `/inference/v1/abort_requests`.
    VllmAbortRequests,
    /// SGLang's `/abort_request`.
    SglangAbortRequest,
}
