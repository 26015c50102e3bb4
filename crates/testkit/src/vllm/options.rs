//! What kind of vLLM server a double is.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use crate::engine::nixl::TransferMode;
pub use crate::events::wire::HashFormat;

/// The releases that are told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum VllmVersion {
    /// Events as arrays, replies to replays without a topic, no `/kv_event_sources`.
    #[serde(rename = "0.22")]
    V0_22,
    /// Events as maps; token routes that nothing guards, and that pass transfer parameters over.
    #[serde(rename = "0.25")]
    V0_25,
    /// Events as maps; no `/kv_event_sources`, no pause routes guarded by `--enable-scale-out`.
    #[serde(rename = "0.26")]
    V0_26,
    /// The release of the captures.
    #[default]
    #[serde(rename = "0.32")]
    V0_32,
}

impl VllmVersion {
    /// As `/version` says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V0_22 => "0.22.1",
            Self::V0_25 => "0.25.0",
            Self::V0_26 => "0.26.0",
            Self::V0_32 => "0.32.0",
        }
    }
}

/// A secret that does not print itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ApiKey(pub String);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A vLLM server. `Default` is one plain engine that publishes KV events.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VllmOptions {
    /// Which release it behaves like.
    pub version: VllmVersion,
    /// `--served-model-name`.
    pub model: String,
    /// `root` in `/v1/models`: the model's folder or name. `None`: the model's name.
    pub root: Option<String>,
    /// LoRA adapters, by name.
    pub adapters: Vec<String>,
    /// Stands for the weights: doubles with the same seed give the same tokens.
    pub model_seed: u64,
    /// One generated token in this many is the end token; 0 for never.
    pub eos_one_in: u64,
    /// `--max-model-len`, tokens. The pool must hold it.
    pub max_model_len: usize,
    /// `--block-size`, tokens.
    pub block_size: usize,
    /// KV blocks of each rank, block 0 included, which is never used.
    pub blocks: usize,
    /// `--enable-prefix-caching`.
    pub prefix_caching: bool,
    /// `--max-num-seqs`, of each rank.
    pub running_max: usize,
    /// `--scheduling-policy priority`.
    pub priority_scheduling: bool,
    /// `--data-parallel-size`.
    pub dp: usize,
    /// `--api-key`.
    pub api_key: Option<ApiKey>,
    /// `--kv-events-config`; `None` for no events.
    pub kv_events: Option<KvEventOptions>,
    /// `--kv-transfer-config` with a NIXL connector.
    pub connector: Option<ConnectorOptions>,
    /// `--enable-scale-out`: `/inference/v1/generate` works.
    pub scale_out: bool,
    /// `VLLM_SERVER_DEV_MODE=1`: `/reset_prefix_cache`, `/sleep`, `/pause`, `/server_info` and their kin.
    pub dev_mode: bool,
    /// `--enable-prompt-tokens-details`.
    pub prompt_tokens_details: bool,
    /// `--enable-server-load-tracking`.
    pub load_tracking: bool,
    /// `--enable-request-id-headers`.
    pub request_id_headers: bool,
    /// Time of a step.
    #[serde(with = "seconds")]
    pub step: Duration,
    /// Time that a step takes longer for each prompt token it computes.
    #[serde(with = "seconds")]
    pub prompt_token: Duration,
    /// A prompt that contains this text kills the engine.
    pub poison: Option<String>,
    /// How long a dead engine's server still answers (500, 503) before it closes.
    #[serde(with = "seconds")]
    pub death_linger: Duration,
    /// The HTTP port; 0 for any.
    pub port: u16,
}

impl Default for VllmOptions {
    fn default() -> Self {
        Self {
            version: VllmVersion::default(),
            model: "double".into(),
            root: None,
            adapters: Vec::new(),
            model_seed: 1,
            eos_one_in: 0,
            max_model_len: 4096,
            block_size: 16,
            blocks: 513,
            prefix_caching: true,
            running_max: 256,
            priority_scheduling: false,
            dp: 1,
            api_key: None,
            kv_events: Some(KvEventOptions::default()),
            connector: None,
            scale_out: false,
            dev_mode: true,
            prompt_tokens_details: true,
            load_tracking: false,
            request_id_headers: false,
            step: Duration::from_millis(1),
            prompt_token: Duration::ZERO,
            poison: None,
            death_linger: Duration::from_millis(200),
            port: 0,
        }
    }
}

impl VllmOptions {
    /// A prefill server of a NIXL pair.
    pub fn prefill() -> Self {
        Self { connector: Some(ConnectorOptions::new(KvRole::Producer)), ..Self::default() }
    }

    /// A decode server of a NIXL pair.
    pub fn decode() -> Self {
        Self { connector: Some(ConnectorOptions::new(KvRole::Consumer)), ..Self::default() }
    }
}

/// How KV events are published.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvEventOptions {
    /// The first frame.
    pub topic: String,
    /// Whether there is a replay socket.
    pub replay: bool,
    /// Batches kept for replay.
    pub buffer_steps: usize,
    /// How hashes are written.
    pub hashes: HashFormat,
    /// Port of rank 0's events; rank r has the r-th after it. 0: any ports side by side, as an operator would
    /// configure them. See `os_ports`.
    pub port: u16,
    /// Each rank gets any port, as vLLM does for `tcp://*:0`: they are known from `/kv_event_sources` alone, where
    /// they stand with a concrete host. Otherwise endpoints there are `tcp://*:PORT`.
    pub os_ports: bool,
}

impl Default for KvEventOptions {
    fn default() -> Self {
        Self {
            topic: "kv-events".into(),
            replay: true,
            buffer_steps: 10_000,
            hashes: HashFormat::Unsigned,
            port: 0,
            os_ports: false,
        }
    }
}

/// `kv_role`. NIXL does not act on it: any engine with the connector serves prefill legs, decode legs and plain
/// requests (vLLM 0.32 source); 0.32 warns that `kv_both` is deprecated for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvRole {
    /// Prefill.
    #[serde(rename = "kv_producer")]
    Producer,
    /// Decode.
    #[serde(rename = "kv_consumer")]
    Consumer,
    /// Either.
    #[serde(rename = "kv_both")]
    Both,
}

/// `kv_load_failure_policy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadFailure {
    /// The request ends with status 500.
    Fail,
    /// The prompt is computed here.
    Recompute,
}

/// A NIXL connector.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectorOptions {
    /// `kv_role`.
    pub role: KvRole,
    /// `NixlConnector` or `NixlPushConnector`.
    #[serde(default = "pull")]
    pub mode: TransferMode,
    /// `kv_lease_duration`; vLLM's default is 30 s.
    #[serde(with = "seconds", default = "lease")]
    pub lease: Duration,
    /// `kv_load_failure_policy`.
    #[serde(default = "fail")]
    pub load_failure: LoadFailure,
    /// How long a side channel that does not answer is waited for. vLLM: 5 s; here 0.2 s.
    #[serde(with = "seconds", default = "handshake")]
    pub handshake_timeout: Duration,
    /// How long a transfer takes.
    #[serde(with = "seconds", default)]
    pub transfer_time: Duration,
    /// `VLLM_NIXL_SIDE_CHANNEL_PORT`; rank r has the r-th after it. 0: any ports side by side.
    #[serde(default)]
    pub side_channel_port: u16,
    /// Part of what the handshake compares, beside version, model and mode.
    #[serde(default = "cache_dtype")]
    pub cache_dtype: String,
}

impl ConnectorOptions {
    /// A pulling connector with vLLM's policy and the doubles' short times.
    pub fn new(role: KvRole) -> Self {
        Self {
            role,
            mode: pull(),
            lease: lease(),
            load_failure: fail(),
            handshake_timeout: handshake(),
            transfer_time: Duration::ZERO,
            side_channel_port: 0,
            cache_dtype: cache_dtype(),
        }
    }
}

fn pull() -> TransferMode {
    TransferMode::Pull
}

fn lease() -> Duration {
    Duration::from_secs(30)
}

fn fail() -> LoadFailure {
    LoadFailure::Fail
}

fn handshake() -> Duration {
    Duration::from_millis(200)
}

fn cache_dtype() -> String {
    "auto".into()
}

/// Durations as seconds, with fractions.
pub(crate) mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(crate) fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(time.as_secs_f64())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}
