//! The command line of `audit`.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use super::positive_duration;
use crate::settings::SettingFlags;

/// Flags of `audit`.
#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    /// An engine of the fleet, as `forebay serve` takes it: [KIND=]URL[,key-env=VARIABLE][,events=tcp://HOST:PORT]. Repeat the
    /// flag for each.
    #[arg(long, value_name = "SPEC")]
    engine: Vec<String>,
    /// A settings file of `forebay serve` that names the engines.
    #[arg(long, value_name = "FILE")]
    config: Option<String>,
    /// How long to look on, in minutes. Ctrl-C ends it early.
    #[arg(long, value_name = "N", default_value_t = 30.0, value_parser = super::simulate::positive)]
    pub(crate) minutes: f64,
    /// Time between two looks at an engine's metrics.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = positive_duration)]
    pub(crate) every: Duration,
    /// What the engines take for a step: a profile's name or file.
    #[arg(long, value_name = "PROFILE", default_value = "h100-llama8b")]
    pub(crate) profile: String,
    /// GPUs of one engine; its ranks share them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) gpus: u32,
    /// Make the profile as much slower or faster as brings the time between two tokens to the measured one.
    #[arg(long)]
    pub(crate) fit: bool,
    /// Replays of each way of placing, with what is not known drawn anew.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(2..=1000))]
    pub(crate) seeds: u64,
    /// Keep what arrived here, in the form that `forebay simulate --trace` reads: times, lengths, what is shared; never text.
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,
    /// Write the figures as JSON here; `-` for standard output, in place of the table.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Replays at a time; by default one for each processor.
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<std::num::NonZeroUsize>,
}

impl AuditArgs {
    /// What they say about settings.
    pub(crate) fn settings(&self) -> SettingFlags {
        let config = self.config.iter().cloned().collect();
        SettingFlags::from_texts([("engine", self.engine.clone()), ("config", config)])
    }
}
