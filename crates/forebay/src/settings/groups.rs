//! Every setting, declared once.
//!
//! A row is `name: Type = default => audience;`. To add one, add a row: its flag, environment name, file key, help text
//! and reference text follow. Then write the page anew: `forebay config reference > docs/reference/settings.md`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use forebay_kv_hash::HashKey;
use forebay_placement::Policy;
use forebay_types::Role;

use super::{
    choices::{LogFilter, LogFormat, ModelChoice},
    declare::settings,
    engine_spec::{EngineKind, EngineSpec},
    value::ByteCount,
};

settings! {
    /// Where `forebay serve` listens, and who may use it.
    pub(crate) struct Doors from "Addresses and keys" {
        /// Address of the public API. An address that other machines can reach needs `api_keys`, or `insecure` said
        /// aloud.
        listen: SocketAddr = loopback(8080) => common;
        /// Address of metrics, decisions and the fleet, for operators. It asks for no key: an address that other
        /// machines can reach needs `insecure`.
        admin_listen: SocketAddr = loopback(8081) => common;
        /// File with the hashes of API keys, one tenant a line; `forebay keys add TENANT` makes a line. Without it every
        /// request belongs to the tenant `anonymous`.
        api_keys: Option<PathBuf> = None => common;
        /// Allow an address that other machines can reach without keys.
        insecure: bool = false => common;
    }
}

settings! {
    /// What computes, and what it computes.
    pub(crate) struct Engines from "Engines and model" {
        /// Engines to start: KIND[:N][,role=prefill|decode|both], where KIND is `embedded` (real, small, on the CPU) or
        /// `sim` (simulated). Repeat the flag for several kinds or roles; separate with spaces in the environment.
        engine: Vec<EngineSpec> =
            vec![EngineSpec { kind: EngineKind::Embedded, count: at_least_one(4), role: Role::Both }] => common;
        /// Model to serve: `smollm2-135m`, `random-tiny` (seeded random weights, nothing to download) or the path of a
        /// GGUF file.
        model: ModelChoice = ModelChoice::Smollm2 => common;
        /// Folder in which models are looked up by name. The default is `forebay` in the user's cache folder
        /// (`$XDG_CACHE_HOME` or `~/.cache`).
        model_folder: Option<PathBuf> = None => advanced;
        /// Tokenizer file (`tokenizer.json`). By default the model's own; simulated engines alone use a built-in byte
        /// tokenizer.
        tokenizer: Option<PathBuf> = None => common;
        /// Pace of simulated engines: 1 is real time, 2 twice as fast, 0 does not wait at all.
        sim_speed: f64 = 1.0 => common;
        /// KV blocks of each simulated engine.
        sim_blocks: NonZeroU32 = at_least_one(8_192) => advanced;
        /// KV blocks of each embedded engine.
        engine_blocks: NonZeroU32 = at_least_one(512) => advanced;
        /// Tokens in one KV block.
        block_size_tokens: NonZeroU32 = at_least_one(16) => advanced;
        /// Token budget of one scheduler step of an engine: decodes first, then chunks of prompts. Smaller steps keep
        /// running answers smooth while prompts are computed, and make prompts take longer.
        step_tokens_max: NonZeroU32 = at_least_one(256) => advanced;
        /// Sequences that one engine runs at a time.
        sequences_max: NonZeroU32 = at_least_one(64) => advanced;
        /// Sequences that may wait at one engine before it refuses more.
        waiting_max: NonZeroU32 = at_least_one(256) => advanced;
    }
}

settings! {
    /// How an engine, or a pair of engines, is chosen for a request.
    pub(crate) struct Routing from "Routing" {
        /// How requests are placed: by predicted cost in seconds, or one of the simple rules to compare it with.
        policy: Policy = Policy::Cost => common;
        /// Engines that one request is tried on before its first token was sent.
        placements_max: NonZeroU32 = at_least_one(3) => advanced;
        /// Times that a running answer may move to another engine because its own was lost.
        migrations_max: u32 = 3 => advanced;
    }
}

settings! {
    /// Identity and hand-over of KV blocks.
    pub(crate) struct Kv from "KV cache" {
        /// Secret under which KV blocks are hashed, for processes that share hashes. By default each process draws its
        /// own. Give it by environment or file: flags are visible to every user of the machine.
        hash_key: Option<HashKey> = None => advanced secret;
        /// Time for which a prefill engine keeps a prompt's KV for the engine that will decode. After it, that engine
        /// computes the prompt again.
        kv_lease_seconds: Duration = Duration::from_secs(30) => advanced;
        /// Longest time that one transfer of KV may take. After it, the decode engine computes the prompt again.
        transfer_seconds_max: Duration = Duration::from_secs(10) => advanced;
    }
}

settings! {
    /// Everything has a bound. What goes past one is refused with an error that names the setting.
    pub(crate) struct Limits from "Limits" {
        /// Requests that are worked on or wait at a time, over all engines. One more is answered with status 429.
        requests_in_flight_max: NonZeroUsize = at_least_one_usize(1_024) => advanced;
        /// Size of one request's body. A larger one is answered with status 413.
        body_bytes_max: ByteCount = ByteCount(4 << 20) => advanced;
        /// Connections open at a time on the public address.
        connections_max: NonZeroUsize = at_least_one_usize(4_096) => advanced;
        /// Longest time from a request's arrival to the end of its answer.
        request_seconds_max: Duration = Duration::from_secs(600) => advanced;
        /// Longest time that running requests get to finish after a signal to stop.
        shutdown_seconds_max: Duration = Duration::from_secs(30) => advanced;
        /// Decisions kept for `forebay explain`; older ones are forgotten.
        decisions_max: NonZeroUsize = at_least_one_usize(1_024) => advanced;
    }
}

settings! {
    /// The process itself.
    pub(crate) struct Process from "Process and logs" {
        /// Threads that serve requests. By default one for each core.
        threads: Option<NonZeroUsize> = None => advanced;
        /// Which log lines are written: a level, or directives such as `info,forebay_gateway=debug`.
        log_filter: LogFilter = LogFilter::literal("info") => common;
        /// How log lines are written, to standard error: `text` for people, `json` for machines.
        log_format: LogFormat = LogFormat::Text => common;
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn at_least_one(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).expect("a default of at least 1")
}

fn at_least_one_usize(number: usize) -> NonZeroUsize {
    NonZeroUsize::new(number).expect("a default of at least 1")
}
