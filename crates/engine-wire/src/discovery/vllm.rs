//! vLLM's own documents: `/kv_event_sources` (from 0.32) and `/server_info` (with `VLLM_SERVER_DEV_MODE=1`).

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    KvSource, Unreadable,
    json::{array, document, flag, number, object, text},
};

/// DP ranks that are read of one answer.
const RANKS_MAX: usize = 1024;

/// What `/kv_event_sources` says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FoundKvSources {
    /// By DP rank: those that publish over ZMQ.
    pub sources: BTreeMap<u16, KvSource>,
    /// Ranks that were listed, publishing or not.
    pub ranks: u16,
}

/// Reads `/kv_event_sources`: an object by DP rank. Ranks that publish nothing are left out of the sources.
///
/// # Errors
/// If it is no JSON object.
pub fn kv_event_sources(body: &[u8]) -> Result<FoundKvSources, Unreadable> {
    let document = document(body)?;
    let ranks = document.as_object().ok_or(Unreadable::Shape { missing: "object by DP rank" })?;
    let mut found = FoundKvSources::default();
    for (rank, config) in ranks.iter().take(RANKS_MAX) {
        let Ok(dp_rank) = rank.parse::<u16>() else {
            continue;
        };
        found.ranks += 1;
        if let Some(source) = kv_source(dp_rank, config) {
            found.sources.insert(dp_rank, source);
        }
    }
    Ok(found)
}

/// A `KVEventsConfig`; `None` if it publishes nothing that can be subscribed to.
fn kv_source(dp_rank: u16, config: &Value) -> Option<KvSource> {
    let publishes = flag(config, "enable_kv_cache_events").unwrap_or(false)
        && config.get("publisher").and_then(Value::as_str) == Some("zmq");
    publishes.then_some(())?;
    Some(KvSource {
        dp_rank,
        events: text(config, "endpoint")?,
        replay: text(config, "replay_endpoint"),
        topic: text(config, "topic").unwrap_or_default(),
    })
}

/// What `/server_info?config_format=json` says, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FoundVllm {
    /// Of the weights' arithmetic: `bfloat16`, `float32`, ...
    pub dtype: Option<String>,
    /// `auto` is the dtype above.
    pub cache_dtype: Option<String>,
    /// Tokens of a block.
    pub block_size_tokens: Option<u32>,
    /// Whether equal beginnings are computed once.
    pub prefix_caching: Option<bool>,
    /// Token budget of one scheduler step.
    pub step_tokens_max: Option<u32>,
    /// Sequences of one scheduler step.
    pub sequences_max: Option<u32>,
    /// DP ranks behind this server.
    pub dp_ranks: Option<u16>,
    /// Whether it exchanges KV with others; `Some(None)`: it says that it does not.
    pub connector: Option<Option<FoundConnector>>,
    /// Where rank 0 publishes KV events; `Some(None)`: it says that it does not.
    pub kv_events: Option<Option<KvSource>>,
}

/// A `KVTransferConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundConnector {
    /// Its class: `NixlConnector`, `MultiConnector`, ...
    pub class: String,
    /// `kv_producer`, `kv_consumer` or `kv_both`.
    pub role: Option<String>,
    /// What a decode engine does when the KV does not arrive: `fail` or `recompute`.
    pub load_failure_policy: Option<String>,
    /// Blocks are one piece over all layers. Missing in the configuration means no.
    pub cross_layers: bool,
    /// It is NIXL's, alone or among others.
    pub is_nixl: bool,
}

/// Reads `/server_info` of a vLLM server in development mode. Versions that answer with Python's text of the
/// configuration give a value with nothing in it.
///
/// # Errors
/// If there is no `vllm_config`: it is somebody else's `/server_info`.
pub fn server_info(body: &[u8]) -> Result<FoundVllm, Unreadable> {
    let document = document(body)?;
    let config = document.get("vllm_config").ok_or(Unreadable::Shape { missing: "field `vllm_config`" })?;
    if !config.is_object() {
        return Ok(FoundVllm::default());
    }
    let (model, cache) = (object(config, "model_config"), object(config, "cache_config"));
    let (scheduler, parallel) = (object(config, "scheduler_config"), object(config, "parallel_config"));
    Ok(FoundVllm {
        dtype: text(model, "dtype").map(|dtype| dtype.trim_start_matches("torch.").to_owned()),
        cache_dtype: text(cache, "cache_dtype"),
        block_size_tokens: number(cache, "block_size"),
        prefix_caching: flag(cache, "enable_prefix_caching"),
        step_tokens_max: number(scheduler, "max_num_batched_tokens"),
        sequences_max: number(scheduler, "max_num_seqs"),
        dp_ranks: number(parallel, "data_parallel_size"),
        connector: config.get("kv_transfer_config").map(connector),
        kv_events: config.get("kv_events_config").map(|config| kv_source(0, config)),
    })
}

fn connector(config: &Value) -> Option<FoundConnector> {
    let extra = object(config, "kv_connector_extra_config");
    // vLLM takes the flag as a JSON boolean and as the text of one.
    let cross_layers = match extra.get("enable_cross_layers_blocks") {
        Some(Value::Bool(value)) => *value,
        Some(Value::String(value)) => value.eq_ignore_ascii_case("true"),
        _ => false,
    };
    let class = text(config, "kv_connector")?;
    let parts = array(extra, "connectors").unwrap_or_default();
    let is_nixl = |class: &str| class.starts_with("Nixl");
    Some(FoundConnector {
        is_nixl: is_nixl(&class)
            || parts.iter().any(|part| text(part, "kv_connector").as_deref().is_some_and(is_nixl)),
        class,
        role: text(config, "kv_role"),
        load_failure_policy: text(config, "kv_load_failure_policy"),
        cross_layers,
    })
}
