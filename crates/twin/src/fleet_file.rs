//! A fleet, described in a file.
//!
//! In: [`FleetFile`], as a shell read it from TOML. Out: [`EngineSpec`]s, or what is wrong with which entry. What is left out
//! is as vLLM starts an 8B model on an 80 GB GPU.

mod link;

use std::sync::Arc;

use forebay_engine_model::SchedulerConfig;
use forebay_fleet::LoadSight;
use forebay_perf_model::{KvLayout, Profile};
use forebay_types::{FirstToken, Role};
use serde::Deserialize;

use crate::{
    clock::Time,
    engine::{EngineKind, EngineSpec},
    faults::{Bounds, Fault, FaultEntry},
};
pub use link::LinkEntry;

const GIB: f64 = (1_u64 << 30) as f64;

/// Engines of one file, all together: far beyond any fleet that a run gets through.
const ENGINES_MAX: usize = 16_384;
const STARTUP_SECONDS_MAX: f64 = 86_400.0;

/// A fleet file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetFile {
    /// Kinds of engines, and how many of each.
    pub engine: Vec<EngineEntry>,
    /// What stands before them.
    #[serde(default)]
    pub gateway: GatewayEntry,
    /// What goes wrong.
    #[serde(default)]
    pub fault: Vec<FaultEntry>,
}

/// Engines of one kind.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineEntry {
    /// How many.
    pub count: u32,
    /// What its steps take: a profile's name or file.
    pub profile: String,
    /// The work that each may be given.
    pub role: Role,
    /// Ranks of each, which step together.
    pub dp_ranks: u16,
    /// GPUs of each; 0: as many as it has ranks.
    pub gpus: u32,
    /// KV blocks of each rank; 0: as many as fit into its memory.
    pub blocks: u32,
    /// Memory of a rank's GPUs, GiB.
    pub memory_gib: f64,
    /// Share of it that the engine may take.
    pub memory_share: f64,
    /// What weights take of that, GiB.
    pub weights_gib: f64,
    /// What activations and graphs take of that, GiB.
    pub activations_gib: f64,
    /// Bytes of a token's KV, all layers.
    pub kv_bytes_per_token: u32,
    /// Tokens of a KV block.
    pub block_size_tokens: u32,
    /// Tokens that one step computes at most.
    pub step_tokens_max: u32,
    /// Tokens of one prompt in a step; 0: as many as there is room for.
    pub chunk_tokens_max: u32,
    /// Sequences that run at a time.
    pub sequences_max: u32,
    /// Sequences that wait at most.
    pub waiting_max: u32,
    /// Tokens of prompt and answer that one sequence may have.
    pub context_tokens_max: u32,
    /// How KV moves to other engines.
    pub hand_over: HandOver,
    /// Its ranks' links, in place of what the profile measured of hand-overs.
    pub link: Option<LinkEntry>,
    /// Whether hand-overs begin before prompts that wait.
    pub imports_first: bool,
    /// Seconds that a process takes to serve which is started in place of one that died.
    pub startup_seconds: f64,
}

/// How KV moves between engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandOver {
    /// Not at all.
    None,
    /// In pieces of one layer's block.
    PerLayer,
    /// In pieces of a block's layers together.
    CrossLayer,
}

/// What stands before the engines.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GatewayEntry {
    /// Gateways, of which none knows the others' requests.
    pub count: u32,
    /// How the load of engines is known.
    pub sight: Sight,
    /// Which leg of a split sends the first token.
    pub first_token: SendsFirst,
    /// From an engine's report until the gateway has it, milliseconds.
    pub report_delay_ms: f64,
}

/// How the load of engines is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sight {
    /// Engines say it with every step.
    Steps,
    /// Engines are asked once a second.
    Sampled,
}

/// Which leg of a split sends the first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SendsFirst {
    /// The one that computed the prompt.
    Prefill,
    /// The one that continues, as vLLM's connectors have it.
    Decode,
}

impl Default for EngineEntry {
    fn default() -> Self {
        Self {
            count: 1,
            profile: "h100-llama8b".to_owned(),
            role: Role::Both,
            dp_ranks: 1,
            gpus: 0,
            blocks: 0,
            memory_gib: 80.0,
            memory_share: 0.9,
            weights_gib: 15.0,
            activations_gib: 2.0,
            kv_bytes_per_token: 131_072,
            block_size_tokens: 16,
            step_tokens_max: 8192,
            chunk_tokens_max: 0,
            sequences_max: 256,
            waiting_max: 4096,
            context_tokens_max: 131_072,
            hand_over: HandOver::CrossLayer,
            link: None,
            imports_first: false,
            startup_seconds: 0.0,
        }
    }
}

impl Default for GatewayEntry {
    fn default() -> Self {
        Self { count: 1, sight: Sight::Steps, first_token: SendsFirst::Prefill, report_delay_ms: 0.0 }
    }
}

/// An entry of a fleet file that no engine can have.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{entry}: {problem}")]
pub struct FleetProblem {
    /// `engine 1` or `fault 1`, counted from 1, or `gateway`.
    pub entry: String,
    /// What is wrong and what to do.
    pub problem: String,
}

impl FleetFile {
    /// `count` engines of the usual kind.
    pub fn of(count: u32) -> Self {
        Self {
            engine: vec![EngineEntry { count, ..EngineEntry::default() }],
            gateway: GatewayEntry::default(),
            fault: Vec::new(),
        }
    }

    /// What goes wrong, in a fleet of so many engines.
    ///
    /// # Errors
    /// The first entry that names no engine or gateway of the fleet, or a number out of bounds.
    pub fn faults(&self, engines: usize) -> Result<Vec<Fault>, FleetProblem> {
        let bounds = Bounds { engines: engines as u32, gateways: self.gateway.count };
        let of = |(number, entry): (usize, &FaultEntry)| {
            let at = |problem| FleetProblem { entry: format!("fault {}", number + 1), problem };
            entry.fault(bounds).map_err(at)
        };
        self.fault.iter().enumerate().map(of).collect()
    }

    /// The engines; `profile` finds the profile of a name.
    ///
    /// # Errors
    /// The first entry that no engine can have: nothing left for KV beside the weights, a step without room for its
    /// sequences, an unknown profile, other block sizes than the rest.
    pub fn engines(
        &self,
        profile: &dyn Fn(&str) -> Result<Arc<Profile>, String>,
    ) -> Result<Vec<EngineSpec>, FleetProblem> {
        let mut engines = Vec::new();
        for (number, entry) in self.engine.iter().enumerate() {
            let at = |problem| FleetProblem { entry: format!("engine {}", number + 1), problem };
            let spec = profile(&entry.profile).and_then(|profile| entry.spec(profile)).map_err(at)?;
            if entry.block_size_tokens != self.engine[0].block_size_tokens {
                let (other, first) = (entry.block_size_tokens, self.engine[0].block_size_tokens);
                return Err(at(format!(
                    "blocks of {other} tokens beside blocks of {first}: give all the same"
                )));
            }
            if engines.len() + entry.count as usize > ENGINES_MAX {
                return Err(at(format!("more than {ENGINES_MAX} engines together")));
            }
            engines.extend(std::iter::repeat_n(spec, entry.count as usize));
        }
        if engines.is_empty() {
            let problem = "there is no engine; give one [[engine]] with a count of at least 1".to_owned();
            return Err(FleetProblem { entry: "fleet".to_owned(), problem });
        }
        let gateway =
            |problem: &str| FleetProblem { entry: "gateway".to_owned(), problem: problem.to_owned() };
        if !(1..=1024).contains(&self.gateway.count) {
            return Err(gateway("`count` must be 1 to 1024"));
        }
        if !(self.gateway.report_delay_ms.is_finite() && self.gateway.report_delay_ms >= 0.0) {
            return Err(gateway("`report_delay_ms` must be a number from 0 up"));
        }
        Ok(engines)
    }
}

impl GatewayEntry {
    /// As the fleet core takes it.
    pub fn sight(&self) -> LoadSight {
        match self.sight {
            Sight::Steps => LoadSight::EveryStep,
            Sight::Sampled => LoadSight::Sampled,
        }
    }

    /// As placement takes it.
    pub fn first_token(&self) -> FirstToken {
        match self.first_token {
            SendsFirst::Prefill => FirstToken::Handed,
            SendsFirst::Decode => FirstToken::OfDecode,
        }
    }
}

impl EngineEntry {
    fn spec(&self, profile: Arc<Profile>) -> Result<EngineSpec, String> {
        let positive = [
            ("dp_ranks", u32::from(self.dp_ranks)),
            ("block_size_tokens", self.block_size_tokens),
            ("kv_bytes_per_token", self.kv_bytes_per_token),
            ("step_tokens_max", self.step_tokens_max),
            ("sequences_max", self.sequences_max),
            ("waiting_max", self.waiting_max),
            ("context_tokens_max", self.context_tokens_max),
        ];
        if let Some((name, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return Err(format!("`{name}` is 0; give at least 1"));
        }
        if self.step_tokens_max < self.sequences_max {
            return Err(format!(
                "`step_tokens_max` is {}, less than `sequences_max`, {}: a step could not give each sequence a token",
                self.step_tokens_max, self.sequences_max
            ));
        }
        if self.dp_ranks > 1 && !profile.is_of_group() {
            return Err(format!(
                "`dp_ranks` is {}, and the profile {} says nothing of ranks that step together",
                self.dp_ranks, self.profile
            ));
        }
        let layout = match self.hand_over {
            HandOver::None => None,
            HandOver::PerLayer => Some(KvLayout::PerLayerBlocks),
            HandOver::CrossLayer => Some(KvLayout::CrossLayerBlocks),
        };
        let link = self.link.map(|link| link.link(layout, &profile)).transpose()?;
        let kind = EngineKind {
            profile,
            layout,
            link,
            kv_bytes_per_token: self.kv_bytes_per_token,
            scheduler: SchedulerConfig {
                chunk_tokens_max: if self.chunk_tokens_max == 0 { u32::MAX } else { self.chunk_tokens_max },
                imports_first: self.imports_first,
                block_size_tokens: self.block_size_tokens,
                blocks_total: if self.blocks > 0 { self.blocks } else { self.blocks_in_memory()? },
                step_tokens_max: self.step_tokens_max,
                sequences_max: self.sequences_max,
                waiting_max: self.waiting_max,
                context_tokens_max: self.context_tokens_max,
            },
        };
        let pins = self.role != Role::Both;
        if pins && !kind.hands_over() {
            return Err(
                "a role needs hand-overs, and these engines have none: leave out `role`, or set `hand_over`"
                    .to_owned(),
            );
        }
        let gpus = if self.gpus > 0 { self.gpus } else { u32::from(self.dp_ranks) };
        if !(0.0..=STARTUP_SECONDS_MAX).contains(&self.startup_seconds) {
            return Err(format!(
                "`startup_seconds` is {}; give 0 to {STARTUP_SECONDS_MAX}",
                self.startup_seconds
            ));
        }
        let startup = Time::from_seconds(self.startup_seconds);
        Ok(EngineSpec { kind, dp_ranks: self.dp_ranks, role: self.role, gpus, startup })
    }

    /// What is left of the memory for KV, in blocks.
    fn blocks_in_memory(&self) -> Result<u32, String> {
        let Self { memory_gib, memory_share, weights_gib, activations_gib, .. } = *self;
        let all = [memory_gib, memory_share, weights_gib, activations_gib];
        if !all.iter().all(|value| value.is_finite() && *value >= 0.0) || memory_share > 1.0 {
            return Err("`memory_gib`, `weights_gib` and `activations_gib` must be numbers from 0 up, \
                        `memory_share` one from 0 to 1"
                .to_owned());
        }
        let left = memory_gib * memory_share - weights_gib - activations_gib;
        let block = f64::from(self.kv_bytes_per_token) * f64::from(self.block_size_tokens);
        let blocks = (left * GIB / block).floor();
        if blocks < 1.0 {
            return Err(format!(
                "weights of {weights_gib} GiB and {activations_gib} GiB of activations leave nothing for KV of {memory_gib} \
                 GiB x {memory_share}: give more memory, or fewer weights to each rank"
            ));
        }
        Ok(blocks.min(f64::from(u32::MAX)) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(name: &str) -> Result<Arc<Profile>, String> {
        Profile::built_in(name).map(Arc::new).ok_or_else(|| format!("unknown profile {name}"))
    }

    fn one(change: impl FnOnce(&mut EngineEntry)) -> FleetFile {
        let mut file = FleetFile::of(2);
        change(&mut file.engine[0]);
        file
    }

    #[test]
    fn what_is_left_of_memory_holds_kv() {
        let engines = FleetFile::of(3).engines(&profile).unwrap();
        assert_eq!(engines.len(), 3);
        // 72 - 17 GiB at 2 MiB a block.
        assert_eq!(engines[0].kind.scheduler.blocks_total, 28_160);
        assert_eq!(engines[0].gpus, 1);
        let given = one(|entry| (entry.blocks, entry.gpus) = (77, 4)).engines(&profile).unwrap();
        assert_eq!((given[1].kind.scheduler.blocks_total, given[1].gpus), (77, 4));
    }

    #[test]
    fn impossible_engines_are_refused_with_what_to_do() {
        let check = |file: FleetFile, expected: &str| {
            let error = file.engines(&profile).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(
            one(|entry| entry.weights_gib = 75.0),
            "engine 1: weights of 75 GiB and 2 GiB of activations leave nothing",
        );
        check(one(|entry| entry.memory_gib = f64::NAN), "must be numbers");
        check(one(|entry| entry.block_size_tokens = 0), "`block_size_tokens` is 0");
        check(one(|entry| entry.step_tokens_max = 100), "less than `sequences_max`, 256");
        check(one(|entry| entry.dp_ranks = 8), "says nothing of ranks that step together");
        check(one(|entry| entry.profile = "x".to_owned()), "engine 1: unknown profile x");
        for seconds in [-1.0, f64::NAN, 1e9] {
            check(one(|entry| entry.startup_seconds = seconds), "`startup_seconds` is");
        }
        check(one(|entry| entry.count = 0), "there is no engine");
        check(one(|entry| entry.count = 20_000), "more than 16384 engines");
        check(
            one(|entry| (entry.role, entry.hand_over) = (Role::Prefill, HandOver::None)),
            "a role needs hand-overs",
        );
        let mut mixed = FleetFile::of(1);
        mixed.engine.push(EngineEntry { block_size_tokens: 32, ..EngineEntry::default() });
        check(mixed, "engine 2: blocks of 32 tokens beside blocks of 16");
        let mut none = FleetFile::of(1);
        none.gateway.count = 0;
        check(none, "gateway: `count` must be 1");
    }
}
