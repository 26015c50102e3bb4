//! What one dialect server is told: every bound, address and secret.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use forebay_text::{ChatTemplate, Tokenizer};
use forebay_types::TokenId;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// The key that clients of `/v1` must send as `Authorization: Bearer KEY`. Only its hash is kept.
#[derive(Clone)]
pub struct ApiKey([u8; 32]);

impl ApiKey {
    /// Keeps the hash of `key`.
    pub fn new(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Whether `presented` is this key. Takes the same time wherever they differ.
    pub fn is(&self, presented: &str) -> bool {
        let presented: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        let difference = self.0.iter().zip(&presented).fold(0, |sum, (a, b)| sum | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Text of the served model.
#[derive(Debug, Clone)]
pub struct ModelText {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to a prompt.
    pub template: ChatTemplate,
    /// The model's own end-of-turn tokens, which end an answer unless the request says `ignore_eos`.
    pub stop_tokens: Arc<[TokenId]>,
    /// Token ids that the engine can compute are below this.
    pub vocabulary_tokens: u32,
}

/// `kv_role` of the connector. As with vLLM's NIXL connector it forbids nothing: every engine takes plain requests, prefill
/// legs and decode legs. It decides which gauges are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvRole {
    /// `kv_producer`: meant for prefill legs.
    #[serde(rename = "kv_producer")]
    Producer,
    /// `kv_consumer`: meant for decode legs.
    #[serde(rename = "kv_consumer")]
    Consumer,
    /// `kv_both`.
    #[serde(rename = "kv_both")]
    Both,
}

impl KvRole {
    /// Whether it is meant to take KV from others.
    pub fn consumes(self) -> bool {
        matches!(self, Self::Consumer | Self::Both)
    }
}

/// What a decode leg does when its KV cannot be had (`kv_load_failure_policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFailurePolicy {
    /// Compute the prompt here: costs time, not the request.
    #[default]
    Recompute,
    /// Answer 500.
    Fail,
}

/// How KV is handed over: the counterpart of vLLM's NIXL connector in pull mode, over TCP.
#[derive(Debug, Clone)]
pub struct ConnectorOptions {
    /// `kv_role`.
    pub role: KvRole,
    /// `kv_load_failure_policy`.
    pub load_failure: LoadFailurePolicy,
    /// Where the side channel listens.
    pub bind: IpAddr,
    /// Its port; 0 takes a free one.
    pub port: u16,
    /// How decode engines reach it (`remote_host`); `None`: the address that it is bound to.
    pub advertise_host: Option<String>,
    /// Decode engines that may read at one time. More wait to be accepted.
    pub connections_max: usize,
}

impl ConnectorOptions {
    /// Loopback, a free port.
    pub fn loopback(role: KvRole) -> Self {
        Self {
            role,
            load_failure: LoadFailurePolicy::default(),
            bind: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            advertise_host: None,
            connections_max: 256,
        }
    }
}

/// KV events over ZMQ, as with vLLM's `--kv-events-config`.
#[derive(Debug, Clone)]
pub struct EventOptions {
    /// Where both sockets are bound.
    pub bind: IpAddr,
    /// Of the PUB socket; 0 takes a free one.
    pub port: u16,
    /// Of the ROUTER socket; 0 takes a free one.
    pub replay_port: u16,
    /// First frame of every message.
    pub topic: String,
    /// Batches kept for replay.
    pub buffer_steps: usize,
    /// Bytes of those, at most. vLLM has no such bound; a batch may be large.
    pub buffer_bytes_max: usize,
}

impl Default for EventOptions {
    fn default() -> Self {
        Self {
            bind: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            replay_port: 0,
            topic: "kv-events".to_owned(),
            buffer_steps: 10_000,
            buffer_bytes_max: 64 * 1024 * 1024,
        }
    }
}

/// Bounds of one server.
#[derive(Debug, Clone)]
pub struct HttpLimits {
    /// Open connections; more wait in the kernel's queue.
    pub connections_max: usize,
    /// Requests that generate at one time; more are answered with 503, as vLLM's `--max-num-queued-reqs` does.
    pub requests_max: usize,
    /// Bytes of one body; more is answered with 413.
    pub body_bytes_max: usize,
    /// Bytes of one request's head.
    pub header_bytes_max: usize,
    /// Time to send a head, and how long a connection may stay idle.
    pub header_read_timeout: Duration,
    /// Time to send a body.
    pub body_read_timeout: Duration,
    /// Time that a client may take no byte of its answer.
    pub write_stall_timeout: Duration,
    /// Time that one request may take in all.
    pub request_time_max: Duration,
    /// Time that running answers have after shutdown began.
    pub shutdown_max: Duration,
    /// `n`.
    pub choices_max: u32,
    /// Prompts of one `/v1/completions` request, and of those times `n`.
    pub sequences_max: usize,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections_max: 4_096,
            requests_max: 2_048,
            body_bytes_max: 16 * 1024 * 1024,
            header_bytes_max: 32 * 1024,
            header_read_timeout: Duration::from_secs(60),
            body_read_timeout: Duration::from_secs(60),
            write_stall_timeout: Duration::from_secs(60),
            request_time_max: Duration::from_secs(3_600),
            shutdown_max: Duration::from_secs(30),
            choices_max: 64,
            sequences_max: 256,
        }
    }
}
