//! What can be run, by name: a workload with the engines and the promise that belong to it.

use std::{fmt, str::FromStr, sync::Arc};

use forebay_engine_model::SchedulerConfig;
use forebay_perf_model::{KvLayout, Profile};

use crate::{
    clock::Time,
    engine::EngineKind,
    metrics::Slo,
    workload::{Chat, Fresh, Lengths, Session, StandIn, Trace, TraceForm},
};

/// The names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Conversations that share system prompts.
    FiveTurn,
    /// Prompts that share nothing.
    Fresh,
    /// A trace in Mooncake's form.
    Trace,
    /// A synthetic trace in that form.
    StandIn,
    /// Prompts for a mixture of experts.
    Moe,
    /// Agents that call tools.
    Agent,
    /// Questions about long documents.
    Document,
    /// Prompts that share nothing, in bursts.
    Bursts,
}

/// What holds for a workload unless the command line says otherwise.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// Requests a second.
    pub rate: f64,
    /// How many.
    pub engines: usize,
    /// Ranks of each engine, which step together.
    pub dp_ranks: u16,
    /// Seconds before requests count.
    pub warm_up_seconds: f64,
    /// Seconds in which they do.
    pub seconds: f64,
    /// Between the rates that a search tries.
    pub rate_step: f64,
    profile: &'static str,
    blocks: u32,
}

/// KV blocks of 16 tokens on an 80 GB H100: 90 % of its memory less 16 GB of weights and some 2 GB of activations and
/// graphs leave 54 GiB, at 2 MiB a block of an 8B model in bf16. 448,000 tokens.
const BLOCKS_8B: u32 = 28_000;
/// The same for a 30B mixture of experts on eight ranks: some 10 GB of weights each, 1.5 MiB a block.
const BLOCKS_MOE: u32 = 38_000;
/// KV of a token of an 8B model in bf16: 32 layers, 8 heads of 128, keys and values.
const KV_BYTES_PER_TOKEN: u32 = 131_072;
const BLOCK_SIZE_TOKENS: u32 = 16;
/// Sequences in a batch: vLLM's default for a server on this GPU.
const SEQUENCES_MAX: u32 = 256;
/// Longer than any prompt of a workload.
const CONTEXT_TOKENS_MAX: u32 = 131_072;
/// vLLM's queue has no bound; this one is never reached by a run that is not given up.
const WAITING_MAX: u32 = 4096;
/// Prompt and decode tokens in a step: vLLM's default for a server on this GPU.
pub const BUDGET_TOKENS: u32 = 8192;

impl Workload {
    /// Every one.
    pub const ALL: [Self; 8] = [
        Self::FiveTurn,
        Self::Fresh,
        Self::Trace,
        Self::StandIn,
        Self::Moe,
        Self::Agent,
        Self::Document,
        Self::Bursts,
    ];

    /// What the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::FiveTurn => "five-turn",
            Self::Fresh => "fresh",
            Self::Trace => "trace",
            Self::StandIn => "stand-in",
            Self::Moe => "moe",
            Self::Agent => "agent",
            Self::Document => "document",
            Self::Bursts => "bursts",
        }
    }

    /// What holds for it.
    pub fn defaults(self) -> Defaults {
        let dense = Defaults {
            rate: 6.0,
            engines: 2,
            dp_ranks: 1,
            warm_up_seconds: 10.0,
            seconds: 100.0,
            rate_step: 0.5,
            profile: "h100-llama8b",
            blocks: BLOCKS_8B,
        };
        match self {
            Self::FiveTurn => Defaults { rate: 22.0, engines: 4, warm_up_seconds: 40.0, ..dense },
            Self::Fresh => dense,
            Self::Agent => Defaults { rate: 20.0, engines: 4, warm_up_seconds: 60.0, ..dense },
            Self::Document => Defaults { rate: 3.0, engines: 4, warm_up_seconds: 60.0, ..dense },
            Self::Bursts => Defaults { engines: 4, ..dense },
            Self::Trace | Self::StandIn => {
                Defaults { rate: 8.0, engines: 8, warm_up_seconds: 60.0, seconds: 120.0, ..dense }
            }
            Self::Moe => Defaults {
                rate: 16.0,
                engines: 4,
                dp_ranks: 8,
                warm_up_seconds: 15.0,
                seconds: 60.0,
                profile: "h100x2-qwen3-30b-a3b",
                blocks: BLOCKS_MOE,
                ..dense
            },
        }
    }

    /// The engines that belong to it.
    pub fn engine_kind(self, budget_tokens: u32, blocks: Option<u32>) -> EngineKind {
        let defaults = self.defaults();
        EngineKind {
            profile: Arc::new(Profile::built_in(defaults.profile).expect("its name is built in")),
            layout: Some(KvLayout::CrossLayerBlocks),
            link: None,
            kv_bytes_per_token: KV_BYTES_PER_TOKEN,
            scheduler: SchedulerConfig {
                chunk_tokens_max: u32::MAX,
                imports_first: false,
                block_size_tokens: BLOCK_SIZE_TOKENS,
                blocks_total: blocks.unwrap_or(defaults.blocks),
                step_tokens_max: budget_tokens,
                sequences_max: SEQUENCES_MAX,
                waiting_max: WAITING_MAX,
                context_tokens_max: CONTEXT_TOKENS_MAX,
            },
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|workload| workload.name() == text)
            .ok_or_else(|| format!("unknown workload {text}; there are {}", names()))
    }
}

/// The promise: a first token in half a second, or twice the time that an idle engine takes for the whole prompt more;
/// and 40 tokens a second.
pub const SLO: Slo = Slo { ttft_seconds: 0.5, ttft_prefills: 2.0, itl_seconds: 0.025 };

/// Where sessions come from.
pub enum Source {
    /// Conversations.
    Chat(Chat),
    /// See [`Workload::Fresh`].
    Fresh(Fresh),
    /// See [`Workload::StandIn`].
    StandIn(StandIn),
    /// Of a trace.
    Trace(Trace),
}

impl Source {
    /// Of a workload; `trace`: the contents of the file for [`Workload::Trace`].
    ///
    /// # Errors
    /// Says what is wrong with the trace.
    pub fn new(workload: Workload, trace: Option<&str>) -> Result<Self, String> {
        let lengths = |median, sigma| Lengths { median, sigma };
        Ok(match workload {
            Workload::FiveTurn => Self::Chat(Chat::default()),
            Workload::Fresh => {
                Self::Fresh(Fresh { input: lengths(4000.0, 0.4), output: lengths(200.0, 0.4), bursts: None })
            }
            // Of a lognormal of sigma 1 the mean is exp(1/2) times the median.
            Workload::Moe => Self::Fresh(Fresh {
                input: lengths(3000.0 * (-0.5_f64).exp(), 1.0),
                output: lengths(200.0, 0.0),
                bursts: None,
            }),
            Workload::Agent => Self::Chat(Chat::AGENT),
            Workload::Document => Self::Chat(Chat::DOCUMENT),
            Workload::Bursts => Self::Fresh(Fresh {
                input: lengths(2000.0, 0.6),
                output: lengths(200.0, 0.4),
                bursts: Some((5.0, 15.0)),
            }),
            Workload::StandIn => Self::StandIn(StandIn::default()),
            Workload::Trace => {
                let text = trace.ok_or("no trace was given")?;
                let trace = Trace::parse(text, TraceForm::Mooncake, false);
                Self::Trace(trace.map_err(|error| error.to_string())?)
            }
        })
    }

    /// `rate` requests a second up to `end`. What is asked depends on the seed alone, not on the rate.
    pub fn sessions(&self, rate: f64, end: Time, seed: u64) -> Vec<Session> {
        match self {
            Self::Chat(chat) => chat.sessions(rate, end, seed),
            Self::Fresh(fresh) => fresh.sessions(rate, end, seed),
            // Half an hour at its own pace, some 2.7 requests a second; more where that is not enough for the run.
            Self::StandIn(stand_in) => {
                let trace = stand_in.trace(1800.0, seed);
                let enough = trace.requests.len() as f64 >= rate * end.seconds();
                let trace = if enough { trace } else { stand_in.trace(rate * end.seconds() / 2.0, seed) };
                trace.sessions(trace.speed_of(rate), end)
            }
            Self::Trace(trace) => trace.sessions(trace.speed_of(rate), end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for workload in Workload::ALL {
            assert_eq!(workload.to_string().parse(), Ok(workload));
        }
        assert!("mooncake".parse::<Workload>().unwrap_err().contains("stand-in"));
    }

    #[test]
    fn every_workload_brings_its_rate() {
        let end = Time::from_seconds(200.0);
        for workload in Workload::ALL.into_iter().filter(|&workload| workload != Workload::Trace) {
            let sessions = Source::new(workload, None).unwrap().sessions(10.0, end, 1);
            let turns: usize = sessions.iter().map(|session| session.turns.len()).sum();
            assert!((turns as f64 / 2000.0 - 1.0).abs() < 0.15, "{workload}: {turns}");
        }
        assert!(Source::new(Workload::Trace, None).is_err());
    }
}
