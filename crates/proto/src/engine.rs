//! What an agent says of its engine: checked forms of `Hello`, `Ready` and what is in them.
//!
//! Each has a `TryFrom` of its message, which checks, and a `From` into it, which trusts: whoever fills a form keeps to
//! the bounds in [`limits`](crate::limits), or the other side refuses the message. Sentences are cut in both directions.

use std::{collections::BTreeMap, fmt};

use forebay_engines::remote::Speech;
use forebay_perf_model::StepCoefficients;
use forebay_types::{EngineName, Incarnation, Role};

use crate::secret::Secret;

mod speech;
mod wire;

pub(crate) use wire::required;

/// Who is there: the first message of every stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Hello {
    /// The highest wire version that the agent speaks; see [`agree`](crate::agree).
    pub wire_version: u32,
    /// Of the agent's program, for people.
    pub agent_version: String,
    /// The engine's stable name.
    pub engine: EngineName,
    /// `vllm`, `sglang`, ...
    pub kind: String,
    /// This life of the engine; never 0.
    pub incarnation: Incarnation,
    /// What it may be asked to do.
    pub role: Role,
    /// Where it is in its life.
    pub progress: Progress,
    /// What was found out about it; present if it is ready.
    pub facts: Option<EngineFacts>,
    /// Where requests go.
    pub data_plane: DataPlane,
    /// What operators wrote on it.
    pub labels: BTreeMap<String, String>,
    /// How much is known of its cache.
    pub cache_sight: CacheSight,
}

/// Where an engine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EngineState {
    /// The process starts and reads weights.
    Loading,
    /// Kernels and graphs are compiled.
    Compiling,
    /// It answers its health check and is tried out.
    Warming,
    /// It serves.
    Ready,
    /// It finishes what runs and takes nothing new.
    Draining,
}

impl fmt::Display for EngineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loading => "loading",
            Self::Compiling => "compiling",
            Self::Warming => "warming",
            Self::Ready => "ready",
            Self::Draining => "draining",
        })
    }
}

/// A step of an engine's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Which.
    pub state: EngineState,
    /// More of it, for people; may be empty.
    pub sentence: String,
}

/// The engine serves.
#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    /// What was found out.
    pub facts: EngineFacts,
    /// How much is known of its cache, now that it runs.
    pub cache_sight: CacheSight,
}

/// What an engine is and can do; constant for its incarnation once it is ready.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineFacts {
    /// Model id that requests name.
    pub model: String,
    /// Other names it answers to.
    pub served_aliases: Vec<String>,
    /// Its schedulers, numbered from 0. At least 1.
    pub dp_ranks: u16,
    /// Tokens of a KV block. At least 1.
    pub block_size_tokens: u32,
    /// Bytes of a KV block over all layers; 0 if nobody knows.
    pub block_bytes: u64,
    /// Blocks in each rank's pool; 0 if nobody knows.
    pub blocks_total: u32,
    /// Token budget of one scheduler step. At least 1.
    pub step_tokens_max: u32,
    /// Longest sequence, prompt and output, in tokens. At least 1.
    pub context_tokens_max: u32,
    /// Requests that may wait at a rank.
    pub waiting_max: u32,
    /// What it can do with KV of others, and others with its own.
    pub kv: KvAbilities,
    /// In which forms it takes a request.
    pub accepts: Accepts,
    /// Whether any request can go on elsewhere, token for token, however it samples.
    pub continues_sampling: bool,
    /// The HTTP dialect it speaks.
    pub dialect: Dialect,
    /// First guess at the cost of a step.
    pub step_prior: StepCoefficients,
    /// Sentences for operators: what is missing or off, and the flag that mends it.
    pub notes: Vec<String>,
}

/// What an engine can do with KV beyond its own pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvAbilities {
    /// Engines may exchange KV only if this is equal.
    pub layout: u64,
    /// Others can continue from what it computed.
    pub can_export: bool,
    /// It can continue from what others computed.
    pub can_import: bool,
    /// A pair is warmed before it is used.
    pub needs_warming: bool,
}

/// In which forms an engine takes a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepts {
    /// Token ids in, token ids out.
    pub tokens: bool,
    /// The client's own body, answered in the engine's own words.
    pub body: bool,
}

/// An engine's HTTP dialect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialect {
    /// As the engine says it; may be empty.
    pub version: String,
    /// How to speak to it.
    pub speech: Speech,
}

/// Where requests for an incarnation go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataPlane {
    /// `http://host:port` or `https://host:port`.
    pub url: String,
    /// Minted for this incarnation; absent if the engine asks for none.
    pub api_key: Option<Secret>,
}

/// How much is known of what an engine caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheSight {
    /// It announces every change.
    Events,
    /// It announces nothing.
    Approximate {
        /// Why, as a sentence.
        why: String,
    },
}

#[cfg(test)]
mod tests;
