//! The command lines of `engine`, `agent` and `doctor`.

use std::{net::IpAddr, num::NonZeroU32, path::PathBuf};

use clap::{Args, ValueEnum};
use forebay_types::Role;

/// Flags of `engine`. They are named as vLLM names its own where there is such a one.
#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// What computes: `embedded` (real, small, on the CPU) or `sim` (simulated).
    #[arg(value_enum, default_value_t = EngineKindArg::Embedded)]
    pub(crate) kind: EngineKindArg,
    /// Whose words it speaks.
    #[arg(long, value_enum, default_value_t = DialectArg::Vllm)]
    pub(crate) dialect: DialectArg,
    /// Address to listen on. One that other machines can reach needs a key in FOREBAY_ENGINE_API_KEY, and `--insecure` for
    /// KV events and hand-over, which know no key.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port of the HTTP server; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub(crate) port: u16,
    /// Port of KV events; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub(crate) kv_events_port: u16,
    /// Port at which KV events are replayed; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub(crate) kv_replay_port: u16,
    /// Port at which other engines fetch KV; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub(crate) side_channel_port: u16,
    /// What it is for: a prefill engine hands KV over, a decode engine takes it in.
    #[arg(long, value_enum, default_value_t = RoleArg::Both)]
    pub(crate) role: RoleArg,
    /// Model of an embedded engine: `random-tiny` or the path of a GGUF file.
    #[arg(long, value_name = "PATH|NAME", default_value = "random-tiny")]
    pub(crate) model: String,
    /// Id that requests name; by default `random-tiny`, the file's stem, or `sim`.
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Option<String>,
    /// Tokenizer (`tokenizer.json`, its folder, or a GGUF file); by default the model's own.
    #[arg(long, value_name = "PATH")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// KV blocks.
    #[arg(long, value_name = "N", default_value = "512")]
    pub(crate) blocks: NonZeroU32,
    /// Tokens in one KV block.
    #[arg(long, value_name = "N", default_value = "16")]
    pub(crate) block_size: NonZeroU32,
    /// Pace of a simulated engine: 1 is real time, 0 does not wait at all.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(crate) sim_speed: f64,
    /// Allow sockets that other machines can reach and that ask for no key.
    #[arg(long)]
    pub(crate) insecure: bool,
}

/// Kinds of engines in this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineKindArg {
    /// Real, small, on the CPU.
    Embedded,
    /// Simulated: real scheduling, no arithmetic.
    Sim,
}

/// Whose words an engine speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DialectArg {
    /// Those of `vllm serve`.
    Vllm,
}

/// What an engine is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArg {
    /// Computes prompts for others.
    Prefill,
    /// Continues from what others computed.
    Decode,
    /// Anything.
    Both,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Prefill => Role::Prefill,
            RoleArg::Decode => Role::Decode,
            RoleArg::Both => Role::Both,
        }
    }
}

/// Flags of `agent`.
#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// Gateways to dial: HOST:PORT of their `cluster_listen`, several with commas between. A name with several addresses is
    /// several gateways, and is resolved again and again.
    #[arg(long, value_name = "HOST:PORT", required_unless_present_any = ["registry", "stop_engine"])]
    pub(crate) join: Option<String>,
    /// Where gateways announce themselves.
    #[arg(long, value_name = "etcd://HOST:PORT/FLEET", conflicts_with = "join")]
    pub(crate) registry: Option<String>,
    /// Name of the engine, one of its own in the fleet; by default the host's name and the engine's port.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// What the engine is for.
    #[arg(long, value_enum, default_value_t = RoleArg::Both)]
    pub(crate) role: RoleArg,
    /// Something to know the engine by: KEY=VALUE. Repeat for more.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<String>,
    /// How gateways and other engines reach this host.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub(crate) advertise: String,
    /// Where the engine listens, if its command does not say: http://127.0.0.1:PORT.
    #[arg(long, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// Folder for what the next agent of this engine needs; by default `forebay/agents` in the user's state folder.
    #[arg(long, value_name = "PATH")]
    pub(crate) state_folder: Option<PathBuf>,
    /// Folder with the model's `tokenizer.json`, where it is not the model's own.
    #[arg(long, value_name = "PATH")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Add nothing for the transfer of KV between engines.
    #[arg(long)]
    pub(crate) no_transfer: bool,
    /// PEM file of the authority that signed the gateways' certificates.
    #[arg(long, value_name = "PATH", requires_all = ["cluster_cert", "cluster_key"])]
    pub(crate) cluster_ca: Option<PathBuf>,
    /// PEM file with this agent's certificate.
    #[arg(long, value_name = "PATH", requires = "cluster_ca")]
    pub(crate) cluster_cert: Option<PathBuf>,
    /// PEM file with that certificate's key.
    #[arg(long, value_name = "PATH", requires = "cluster_ca")]
    pub(crate) cluster_key: Option<PathBuf>,
    /// Allow gateways on other hosts without certificates: the engine's key then travels readable.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// End the engine too when this agent is told to end. Alone, with `--name`: end a running engine and its agent.
    #[arg(long)]
    pub(crate) stop_engine: bool,
    /// Repeat the engine's log lines among the agent's own.
    #[arg(long)]
    pub(crate) echo: bool,
    /// The engine's command.
    #[arg(last = true, value_name = "COMMAND", required_unless_present = "stop_engine")]
    pub(crate) command: Vec<String>,
}

/// Flags of `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
