//! What kind of SGLang server a double is.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::vllm::ApiKey;
use crate::vllm::seconds;

/// `--disaggregation-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SglangMode {
    /// Both phases here.
    #[default]
    Null,
    /// Prompts only; has a bootstrap server.
    Prefill,
    /// Continues what a prefill server computed.
    Decode,
}

impl SglangMode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// An SGLang server of release 0.5.23. `Default` is one plain engine that publishes KV events.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SglangOptions {
    /// `--served-model-name`.
    pub model: String,
    /// `--model-path`, and the tokenizer's. `None`: the model's name.
    pub model_path: Option<String>,
    /// LoRA adapters, by name.
    pub adapters: Vec<String>,
    /// Stands for the weights: doubles with the same seed give the same tokens, vLLM doubles too.
    pub model_seed: u64,
    /// One generated token in this many is the end token; 0 for never.
    pub eos_one_in: u64,
    /// `--context-length`, tokens. The pool must hold it.
    pub context_length: usize,
    /// `--page-size`, tokens.
    pub page_size: usize,
    /// KV pages of each rank.
    pub pages: usize,
    /// `--max-running-requests`, of each rank.
    pub running_max: usize,
    /// `--dp-size`.
    pub dp: usize,
    /// `--api-key`: guards everything but health, readiness and metrics.
    pub api_key: Option<ApiKey>,
    /// `--kv-events-config`; `None` for no events.
    pub kv_events: Option<SglangEventOptions>,
    /// `--load-publish-endpoint auto`; needs `kv_events`.
    pub load_socket: bool,
    /// `--enable-metrics`.
    pub metrics: bool,
    /// `--disaggregation-mode`.
    pub mode: SglangMode,
    /// `--disaggregation-bootstrap-port`; 0 for any.
    pub bootstrap_port: u16,
    /// How long a request waits for its partner, before it fails. SGLang: 300 s; here 0.5 s.
    #[serde(with = "seconds")]
    pub bootstrap_timeout: Duration,
    /// `SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES`: `x-override-*` headers take effect.
    pub header_overrides: bool,
    /// `--incremental-streaming-output`: a stream's chunks hold what is new. Otherwise each holds everything so far.
    pub incremental_streaming: bool,
    /// Time of a step.
    #[serde(with = "seconds")]
    pub step: Duration,
    /// Time that a step takes longer for each prompt token it computes.
    #[serde(with = "seconds")]
    pub prompt_token: Duration,
    /// A prompt that contains this text kills the server.
    pub poison: Option<String>,
    /// The HTTP port; 0 for any.
    pub port: u16,
}

impl Default for SglangOptions {
    fn default() -> Self {
        Self {
            model: "double".into(),
            model_path: None,
            adapters: Vec::new(),
            model_seed: 1,
            eos_one_in: 0,
            context_length: 4096,
            page_size: 16,
            pages: 512,
            running_max: 256,
            dp: 1,
            api_key: None,
            kv_events: Some(SglangEventOptions::default()),
            load_socket: false,
            metrics: true,
            mode: SglangMode::Null,
            bootstrap_port: 0,
            bootstrap_timeout: Duration::from_millis(500),
            header_overrides: false,
            incremental_streaming: false,
            step: Duration::from_millis(1),
            prompt_token: Duration::ZERO,
            poison: None,
            port: 0,
        }
    }
}

impl SglangOptions {
    /// A prefill server.
    pub fn prefill() -> Self {
        Self { mode: SglangMode::Prefill, ..Self::default() }
    }

    /// A decode server.
    pub fn decode() -> Self {
        Self { mode: SglangMode::Decode, ..Self::default() }
    }
}

/// How KV events are published.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SglangEventOptions {
    /// The first frame.
    pub topic: String,
    /// Whether there is a replay socket.
    pub replay: bool,
    /// Batches kept for replay.
    pub buffer_steps: usize,
    /// Replies to replays carry the topic, as in 0.5.23; earlier releases left it out.
    pub replay_topic: bool,
    /// Port of rank 0's events; rank r has the r-th after it. 0: any ports side by side.
    pub port: u16,
}

impl Default for SglangEventOptions {
    fn default() -> Self {
        Self { topic: String::new(), replay: true, buffer_steps: 10_000, replay_topic: true, port: 0 }
    }
}
