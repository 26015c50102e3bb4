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

use forebay_admission::GatherSettings;
use forebay_gateway::http::{HttpLimits, RequestLimits};
use forebay_kv_hash::{ChainLimits, HashKey};
use forebay_kv_index::IndexLimits;
use forebay_placement::{DynamoKnobs, Policy, Weights};
use forebay_planner::LeaningSettings;
use forebay_types::Role;

use super::{
    choices::{HostPort, LogFilter, LogFormat, ModelChoice, RegistryUrl},
    declare::settings,
    engine_spec::{EngineKind, EngineSpec, LocalSpec},
    model_path::ModelPath,
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
        /// Engines: to start, KIND[:N][,role=prefill|decode|both] with KIND `embedded` (real, small, on the CPU) or `sim`
        /// (simulated); to attach, [KIND=]URL[,OPTION=VALUE...] with KIND `vllm`, `sglang`, `trtllm` or `openai` (found out
        /// if left out) and options `role=`, `name=`, `key-env=` or `key-file=` (its API key), `ca-file=`, `events=` and
        /// `replay=` (where it publishes KV events), `weight=` and `label=KEY:VALUE`. `none` where agents bring them all.
        /// Repeat the flag; separate with spaces in the environment; in a file also tables `[[engine]]`.
        engine: Vec<EngineSpec> = vec![EngineSpec::Local(LocalSpec {
            kind: EngineKind::Embedded,
            count: at_least_one(4),
            role: Role::Both,
        })] => common;
        /// Model to serve: `smollm2-135m`, `random-tiny` (seeded random weights, nothing to download) or the path of a
        /// GGUF file.
        model: ModelChoice = ModelChoice::Smollm2 => common;
        /// Folder in which models are looked up by name. The default is `forebay/models` in the user's cache folder
        /// (`$XDG_CACHE_HOME` or `~/.cache`).
        model_folder: Option<PathBuf> = None => advanced;
        /// Tokenizer: [MODEL=]PATH of a `tokenizer.json`, of the folder it is in, or of a GGUF file. For the engines that this
        /// process starts the default is the model's own, or a byte tokenizer for simulated ones. Engines that agents bring bring
        /// theirs; engines by URL have none without it: their requests are then passed on as text. Repeat the flag for several
        /// models.
        tokenizer: Vec<ModelPath> = Vec::new() => common;
        /// What engines elsewhere take for their steps, as measured: [MODEL=]NAME or [MODEL=]PATH of a profile in JSON. Built
        /// in are `h100-llama8b` and `h100x2-qwen3-30b-a3b`, a mixture of experts; the ranks of an engine whose profile is
        /// a group's are taken to step together. Without one, five rates are learned from each engine. Repeat the flag for
        /// several models.
        profile: Vec<ModelPath> = Vec::new() => common;
        /// Pace of simulated engines: 1 is real time, 2 twice as fast, 0 does not wait at all.
        sim_speed: f64 = 1.0 => common;
        /// KV blocks of each simulated engine.
        sim_blocks: NonZeroU32 = at_least_one(8_192) => advanced;
        /// Token budget of one scheduler step of a simulated engine.
        sim_step_tokens_max: NonZeroU32 = at_least_one(8_192) => advanced;
        /// KV blocks of each embedded engine.
        engine_blocks: NonZeroU32 = at_least_one(512) => advanced;
        /// Tokens in one KV block.
        block_size_tokens: NonZeroU32 = at_least_one(16) => advanced;
        /// Token budget of one scheduler step of an embedded engine: decodes first, then chunks of prompts. Smaller steps keep
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
        /// What a second of KV transfer counts for. The first token does not wait for the transfer, so less than 1.
        transfer_weight: f64 = Weights::default().transfer => advanced;
        /// What a second of the request's own decoding counts for. With 0 no request would ever be split.
        decode_weight: f64 = Weights::default().decode => advanced;
        /// What each second counts for that a running answer stalls behind a new prompt.
        harm_weight: f64 = Weights::default().harm => advanced;
        /// The same where the stalled engine's ranks step together, and prompts can share their steps.
        group_harm_weight: f64 = Weights::default().group_harm => advanced;
        /// Longest that a prompt waits for others to share a step with, where ranks step together: one prompt stops the
        /// decodes of all ranks as long as eight do. How long it is worth is worked out; 0 turns it off.
        gather_seconds_max: Duration = GatherSettings::default().wait_max => advanced;
        /// What a second of a stalled decode is worth in seconds of waiting for the first token.
        gather_stall_weight: f64 = GatherSettings::default().stall_weight => advanced;
        /// What each second counts for that it takes to compute again what a split pushes out of a cache: its prompt lies in two.
        second_copy_weight: f64 = Weights::default().second_copy => advanced;
        /// Whether some of several like engines are kept for prefill while prompts are long, so that the others' answers are
        /// left alone. How many follows the load.
        lean: bool = true => advanced;
        /// What a half-full KV pool counts for, in seconds.
        kv_pressure_weight_seconds: f64 = Weights::default().kv_pressure_seconds => advanced;
        /// Decode steps that a hand-over costs beside its bytes.
        handover_steps: f64 = Weights::default().handover_steps => advanced;
        /// Ceiling of the share of an engine's time that prefills are taken to steal from decodes. Less than 1.
        prefill_share_max: f64 = Weights::default().prefill_share_max => advanced;
        /// Of `prefix-affinity`: how many times the mean of requests an engine may have before a prompt goes elsewhere.
        affinity_load_factor: f64 = Weights::default().affinity_load_factor => advanced;
        /// Of `dynamo`: what a cached block takes off the blocks to compute.
        dynamo_overlap_credit: f64 = DynamoKnobs::default().overlap_credit => advanced;
        /// Of `dynamo`: what a block to compute counts for.
        dynamo_prefill_load_scale: f64 = DynamoKnobs::default().prefill_load_scale => advanced;
        /// Of `dynamo`: what a request counts for beside its blocks.
        dynamo_active_request_weight: f64 = DynamoKnobs::default().active_request_weight => advanced;
        /// Of `dynamo`: above 0 engines are drawn, the cheaper the likelier.
        dynamo_temperature: f64 = DynamoKnobs::default().temperature => advanced;
        /// Costs within this share of the least are equal, and chance decides among them.
        tie_share: f64 = Weights::default().tie_epsilon => advanced;
    }
}

impl Routing {
    /// How long prompts wait to share a step.
    pub(crate) fn gather(&self) -> GatherSettings {
        GatherSettings { wait_max: self.gather_seconds_max, stall_weight: self.gather_stall_weight }
    }

    /// When engines are kept for a phase.
    pub(crate) fn leaning(&self) -> LeaningSettings {
        LeaningSettings { enabled: self.lean, ..LeaningSettings::default() }
    }

    /// The weights of the cost, as the placement core takes them.
    pub(crate) fn weights(&self) -> Weights {
        Weights {
            transfer: self.transfer_weight,
            decode: self.decode_weight,
            harm: self.harm_weight,
            group_harm: self.group_harm_weight,
            second_copy: self.second_copy_weight,
            kv_pressure_seconds: self.kv_pressure_weight_seconds,
            handover_steps: self.handover_steps,
            prefill_share_max: self.prefill_share_max,
            affinity_load_factor: self.affinity_load_factor,
            dynamo: DynamoKnobs {
                overlap_credit: self.dynamo_overlap_credit,
                prefill_load_scale: self.dynamo_prefill_load_scale,
                active_request_weight: self.dynamo_active_request_weight,
                temperature: self.dynamo_temperature,
            },
            tie_epsilon: self.tie_share,
        }
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
    /// Engines on other hosts: agents beside them dial this process.
    pub(crate) struct Cluster from "Cluster" {
        /// Address at which agents report their engines (`forebay agent --join`). Without it only the engines of `engine` are
        /// served. An address that other machines can reach needs `cluster_cert`, `cluster_key` and `cluster_ca`, or
        /// `insecure`.
        cluster_listen: Option<SocketAddr> = None => common;
        /// PEM file with the certificate that this process shows to agents.
        cluster_cert: Option<PathBuf> = None => common;
        /// PEM file with that certificate's key.
        cluster_key: Option<PathBuf> = None => common;
        /// PEM file of the authority that signed the agents' certificates: only those are let in.
        cluster_ca: Option<PathBuf> = None => common;
        /// Where gateways announce themselves to agents: `etcd://HOST:PORT[,HOST:PORT...][/FLEET]`. Not needed where agents
        /// are told names to dial.
        registry: Option<RegistryUrl> = None => common;
        /// Address under which agents reach `cluster_listen`, as the registry tells them. By default `cluster_listen` itself.
        cluster_advertise: Option<HostPort> = None => advanced;
        /// Silence of an agent after which nothing new goes to its engine.
        silence_seconds_max: Duration = Duration::from_secs(2) => advanced;
        /// Silence of an agent after which its engine's life counts as over.
        lease_seconds: Duration = Duration::from_secs(10) => advanced;
        /// Silence within a running answer after which it is continued elsewhere, at least.
        stall_seconds_min: Duration = Duration::from_secs(2) => advanced;
        /// The same, in token gaps of the engine: how many times its P99.
        stall_itl_factor: f64 = 20.0 => advanced;
    }
}

settings! {
    /// Everything has a bound. What goes past one is refused with an error that names the setting.
    pub(crate) struct Limits from "Limits" {
        /// Requests that are worked on or wait at a time, over all engines. One more is answered with status 429.
        requests_in_flight_max: NonZeroUsize = at_least_one_usize(1_024) => advanced;
        /// Longest time from a request's arrival to the end of its answer.
        request_seconds_max: Duration = Duration::from_secs(600) => advanced;
        /// Decisions kept for `forebay explain`; older ones are forgotten.
        decisions_max: NonZeroUsize = at_least_one_usize(1_024) => advanced;
        /// Bytes of one file of `decisions_file`; a full one is renamed to `NAME.1`, that one to `NAME.2` and so on.
        decisions_file_bytes_max: ByteCount = byte_count(64 << 20) => advanced;
        /// Files of `decisions_file` at a time; the oldest goes.
        decisions_files_max: NonZeroUsize = at_least_one_usize(4) => advanced;
        /// Bytes of one file of `record`; a full one is renamed to `NAME.1`, that one to `NAME.2` and so on.
        record_bytes_max: ByteCount = byte_count(256 << 20) => advanced;
        /// Files of `record` at a time; the oldest goes.
        record_files_max: NonZeroUsize = at_least_one_usize(4) => advanced;
        /// Memory of the index of what engines say that they cache, and as much again for what was routed to engines that
        /// say nothing. Some 24 bytes a block; beyond it the blocks that nobody asked for lately are forgotten.
        index_bytes_max: ByteCount = byte_count(IndexLimits::default().bytes_max) => advanced;
        /// Memory of the hashes of recent prompts: 8.4 bytes a block. A conversation's next turn then costs as much as
        /// what is new in it.
        chain_bytes_max: ByteCount = byte_count(ChainLimits::default().bytes_max) => advanced;
    }
}

settings! {
    /// What one connection and one request may ask of the public address.
    pub(crate) struct Http from "HTTP limits" {
        /// Connections open at a time on one address. One more takes the place of the one that has been idle for longest, and
        /// waits if none is idle.
        connections_max: NonZeroUsize = at_least_one_usize(HttpLimits::default().connections_max) => advanced;
        /// Size of one request's body. A larger one is answered with status 413.
        body_bytes_max: ByteCount = byte_count(HttpLimits::default().body_bytes_max) => advanced;
        /// Memory of all bodies above 64 KiB together, while they are read and worked on. A body beyond it is answered with
        /// status 503, to be sent again.
        bodies_bytes_max: ByteCount = byte_count(HttpLimits::default().bodies_bytes_max) => advanced;
        /// Size of one request's head. A larger one is answered with status 431.
        header_bytes_max: ByteCount = byte_count(HttpLimits::default().header_bytes_max) => advanced;
        /// Longest time that a client may take to send a head, and that a connection may stay idle.
        header_read_seconds_max: Duration = HttpLimits::default().header_read_timeout => advanced;
        /// Longest time that a client may take to send a body. A slower one is answered with status 408.
        body_read_seconds_max: Duration = HttpLimits::default().body_read_timeout => advanced;
        /// Bytes of a body that must arrive each second, on average and after ten seconds of grace. A slower body is answered
        /// with status 408; 0 takes any.
        body_bytes_per_second_min: ByteCount = byte_count(HttpLimits::default().body_bytes_per_second_min) => advanced;
        /// Longest time that a client may take no byte of its answer before its connection is closed.
        write_stall_seconds_max: Duration = HttpLimits::default().write_stall_timeout => advanced;
        /// Longest time that running answers get to finish after a signal to stop.
        shutdown_seconds_max: Duration = HttpLimits::default().shutdown_max => advanced;
        /// Answers to one prompt (`n`).
        choices_max: NonZeroU32 = at_least_one(RequestLimits::default().choices_max) => advanced;
        /// Prompts of one `/v1/completions` request.
        prompts_max: NonZeroUsize = at_least_one_usize(RequestLimits::default().prompts_max) => advanced;
        /// Answers of one request: prompts times `n`.
        answers_max: NonZeroUsize = at_least_one_usize(RequestLimits::default().sequences_max) => advanced;
        /// Strings in `stop`.
        stop_strings_max: NonZeroUsize =
            at_least_one_usize(RequestLimits::default().stop_strings_max) => advanced;
        /// Size of one string in `stop`. That much text may be held back while an answer streams.
        stop_string_bytes_max: ByteCount = byte_count(RequestLimits::default().stop_string_bytes_max) => advanced;
        /// Ids in `stop_token_ids`.
        stop_token_ids_max: NonZeroUsize =
            at_least_one_usize(RequestLimits::default().stop_token_ids_max) => advanced;
        /// Alternatives reported for each token (`top_logprobs`).
        top_logprobs_max: u8 = RequestLimits::default().top_logprobs_max => advanced;
        /// Tokens that a chat answer may have when the request names no limit. The context bounds it too.
        output_tokens_default_max: NonZeroU32 =
            at_least_one(RequestLimits::default().output_tokens_default_max) => advanced;
        /// Size of a prompt's text up to which it is tokenised on the connection's own thread. Longer ones go to other
        /// threads, so that they do not hold up running answers.
        inline_text_bytes_max: ByteCount = byte_count(RequestLimits::default().inline_text_bytes_max) => advanced;
        /// Memory of the texts of recent prompts and their tokens: a conversation's earlier turns are not tokenised again.
        text_cache_bytes_max: ByteCount = byte_count(RequestLimits::default().text_cache_bytes_max) => advanced;
    }
}

impl Http {
    /// Bounds of connections and bodies, as the gateway takes them.
    pub(crate) fn http_limits(&self) -> HttpLimits {
        HttpLimits {
            connections_max: self.connections_max.get(),
            body_bytes_max: self.body_bytes_max.as_usize(),
            bodies_bytes_max: self.bodies_bytes_max.as_usize(),
            header_bytes_max: self.header_bytes_max.as_usize(),
            header_read_timeout: self.header_read_seconds_max,
            body_read_timeout: self.body_read_seconds_max,
            body_bytes_per_second_min: self.body_bytes_per_second_min.as_usize(),
            write_stall_timeout: self.write_stall_seconds_max,
            shutdown_max: self.shutdown_seconds_max,
        }
    }

    /// Bounds of requests, as the gateway takes them.
    pub(crate) fn request_limits(&self) -> RequestLimits {
        RequestLimits {
            choices_max: self.choices_max.get(),
            prompts_max: self.prompts_max.get(),
            sequences_max: self.answers_max.get(),
            stop_strings_max: self.stop_strings_max.get(),
            stop_string_bytes_max: self.stop_string_bytes_max.as_usize(),
            stop_token_ids_max: self.stop_token_ids_max.get(),
            top_logprobs_max: self.top_logprobs_max,
            output_tokens_default_max: self.output_tokens_default_max.get(),
            inline_text_bytes_max: self.inline_text_bytes_max.as_usize(),
            text_cache_bytes_max: self.text_cache_bytes_max.as_usize(),
        }
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
        /// File to which every decision record goes as a line of JSON, when its request ends.
        decisions_file: Option<PathBuf> = None => advanced;
        /// File to which every request goes as a line of a trace that `forebay simulate` reads: when it came, how long prompt and
        /// answer were, and salted ids of the prompt's blocks. Never text.
        record: Option<PathBuf> = None => advanced;
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

fn byte_count(bytes: usize) -> ByteCount {
    ByteCount(bytes as u64)
}
