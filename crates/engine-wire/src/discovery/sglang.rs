//! SGLang's own documents: `/server_info` and `/model_info`. Written from its sources; never read from a real server.

use serde_json::Value;

use super::{
    KvSource, Unreadable, ZmqAddress,
    json::{array, document, flag, number, object, text},
};

/// The `bootstrap_host` with which a prefill or decode server accepts a request without a partner, for health checks and
/// warming up.
pub const FAKE_BOOTSTRAP_HOST: &str = "2.2.2.2";
/// Where a prefill server listens for decode servers, unless told otherwise.
pub const BOOTSTRAP_PORT_DEFAULT: u16 = 8998;

/// Which phases an SGLang server runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disaggregation {
    /// Both, without hand-over.
    Off,
    /// Prefill legs only; plain requests fail an assertion.
    Prefill,
    /// Decode legs only.
    Decode,
}

/// What `/server_info` says, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundSglang {
    /// Of the server.
    pub version: Option<String>,
    /// What requests name.
    pub served_model: Option<String>,
    /// Folder or repository of the weights.
    pub model_path: Option<String>,
    /// Of the weights' arithmetic; `auto` is the model's own.
    pub dtype: Option<String>,
    /// `auto` is the dtype above.
    pub cache_dtype: Option<String>,
    /// DP ranks behind this server.
    pub dp_ranks: u16,
    /// Tokens of a page: what SGLang calls a block.
    pub page_size_tokens: Option<u32>,
    /// Longest sequence, if the server was told one.
    pub context_tokens_max: Option<u32>,
    /// Token budget of one prefill chunk.
    pub chunk_tokens: Option<u32>,
    /// Sequences that run at a time.
    pub sequences_max: Option<u32>,
    /// Tokens of a rank's KV pool.
    pub pool_tokens: Option<u64>,
    /// Which phases.
    pub disaggregation: Disaggregation,
    /// Where a prefill server listens for decode servers.
    pub bootstrap_port: u16,
    /// What moves KV: `mooncake`, `nixl`, ...
    pub transfer_backend: Option<String>,
    /// Whether equal beginnings are computed once.
    pub prefix_caching: bool,
    /// Where rank 0 publishes KV events.
    pub kv_events: Option<KvSource>,
}

/// Reads `/server_info` (`/get_server_info` before 0.5).
///
/// # Errors
/// If neither of the fields is there that all versions have: it is somebody else's `/server_info`.
pub fn server_info(body: &[u8]) -> Result<FoundSglang, Unreadable> {
    let document = document(body)?;
    // All arguments are at the top. An argument that only SGLang has tells it from others' documents.
    if document.get("disaggregation_mode").is_none() && document.get("disable_radix_cache").is_none() {
        return Err(Unreadable::Shape { missing: "argument of SGLang" });
    }
    let states = array(&document, "internal_states").unwrap_or_default();
    let state = states.first().unwrap_or(&Value::Null);
    Ok(FoundSglang {
        version: text(&document, "version"),
        served_model: text(&document, "served_model_name"),
        model_path: text(&document, "model_path"),
        dtype: text(&document, "dtype"),
        cache_dtype: text(&document, "kv_cache_dtype"),
        dp_ranks: number(&document, "dp_size").unwrap_or(1).max(1),
        page_size_tokens: number(&document, "page_size"),
        context_tokens_max: number(&document, "context_length"),
        chunk_tokens: number(&document, "chunked_prefill_size"),
        sequences_max: number(state, "effective_max_running_requests_per_dp")
            .or_else(|| number(&document, "max_running_requests")),
        pool_tokens: number(&document, "max_total_num_tokens"),
        disaggregation: match text(&document, "disaggregation_mode").as_deref() {
            Some("prefill") => Disaggregation::Prefill,
            Some("decode") => Disaggregation::Decode,
            _ => Disaggregation::Off,
        },
        bootstrap_port: number(&document, "disaggregation_bootstrap_port").unwrap_or(BOOTSTRAP_PORT_DEFAULT),
        transfer_backend: text(&document, "disaggregation_transfer_backend"),
        prefix_caching: !flag(&document, "disable_radix_cache").unwrap_or(false),
        kv_events: kv_events(object(&document, "kv_events")),
    })
}

fn kv_events(found: &Value) -> Option<KvSource> {
    (text(found, "publisher").as_deref() == Some("zmq")).then_some(())?;
    let host = text(found, "endpoint_host")?;
    let endpoint = |port: u16| ZmqAddress { host: host.clone(), port }.to_string();
    Some(KvSource {
        dp_rank: 0,
        events: endpoint(number(found, "endpoint_port_base")?),
        replay: number(found, "replay_endpoint_port_base").map(endpoint),
        topic: text(found, "topic").unwrap_or_default(),
    })
}
