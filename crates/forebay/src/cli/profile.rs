//! The command line of `profile`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use forebay_perf_model::KvLayout;

use crate::settings::{attach_spec::AttachSpec, engine_spec::EngineSpec};

/// Flags of `profile`.
#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    /// The engine to measure: `[KIND=]URL[,key-env=VARIABLE|key-file=PATH][,ca-file=PATH]`, as `forebay serve` takes it.
    #[arg(long, value_name = "URL", value_parser = attached)]
    pub(crate) engine: AttachSpec,
    /// An engine of the same kind that takes KV from the first, to measure hand-overs.
    #[arg(long, value_name = "URL", value_parser = attached)]
    pub(crate) pair: Option<AttachSpec>,
    /// How the pair lays out KV; engines do not tell it. Cross-layer blocks must be asked for with vLLM.
    #[arg(long, value_enum, value_name = "LAYOUT", default_value_t = LayoutArg::PerLayer, requires = "pair")]
    pub(crate) kv_layout: LayoutArg,
    /// The file to write; by default the model's name with `.profile.json`, in this folder.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// What the profile is called; by default as the model.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// The machine, for whoever reads the profile: "one H100 80GB".
    #[arg(long, value_name = "TEXT")]
    pub(crate) about: Option<String>,
    /// Minutes that it may take. What does not fit is left out, largest first.
    #[arg(long, value_name = "MINUTES", default_value_t = 5.0, value_parser = minutes)]
    pub(crate) minutes: f64,
    /// Tokens that the engine puts into a step at most (vLLM: --max-num-batched-tokens); found out if left out.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) step_tokens: Option<u32>,
    /// Longest prompt to send.
    #[arg(long, value_name = "TOKENS", default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(64..))]
    pub(crate) prompt_tokens_max: u32,
    /// Most sequences to run at once.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub(crate) sequences_max: u32,
    /// Measure although the engine runs requests of others, or one cannot see whether it does. They are slowed down, and the
    /// profile is worse.
    #[arg(long)]
    pub(crate) even_if_busy: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How engines lay out KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutArg {
    /// Every layer's blocks apart.
    PerLayer,
    /// A block's layers together.
    CrossLayer,
}

impl From<LayoutArg> for KvLayout {
    fn from(layout: LayoutArg) -> Self {
        match layout {
            LayoutArg::PerLayer => KvLayout::PerLayerBlocks,
            LayoutArg::CrossLayer => KvLayout::CrossLayerBlocks,
        }
    }
}

fn attached(text: &str) -> Result<AttachSpec, String> {
    match EngineSpec::from_text(text)? {
        EngineSpec::Attached(spec) => Ok(*spec),
        EngineSpec::Local(_) => Err("give the URL of a running engine, such as http://host:8000".to_owned()),
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes = text.parse().ok().filter(|minutes: &f64| (0.05..=600.0).contains(minutes));
    minutes.ok_or_else(|| "give minutes from 0.05 to 600".to_owned())
}
