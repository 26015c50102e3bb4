//! From settings to engines that can be launched.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Context as _;
use forebay_engines::{
    EngineLimits, Launch,
    embedded::{EmbeddedFleet, EmbeddedLauncher, probe},
    simulated::{SimulatedFleet, SimulatedLauncher, StepCoefficients},
};
use forebay_gateway::http::ModelText;
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_kv_move::{Mover, SharedMemoryMover, SharedMemorySettings};
use forebay_types::EngineName;
use tokio::runtime::Handle;

use super::texts;
use crate::settings::{
    Settings,
    engine_spec::{EngineKind, EngineSpec},
};

/// Model id of simulated engines.
const SIMULATED_MODEL: &str = "sim";
/// Context of the model that simulated engines stand for; their pools may hold less.
const SIMULATED_CONTEXT_TOKENS: u32 = 131_072;

/// What a process serves.
pub(super) struct Fleet {
    pub(super) launchers: Vec<Arc<dyn Launch>>,
    pub(super) models: Vec<ModelText>,
    pub(super) hasher: BlockHasher,
}

/// Loads what the engines share and prepares each of them; nothing runs yet.
pub(super) fn build(
    settings: &Settings,
    environment: &BTreeMap<String, String>,
    runtime: &Handle,
) -> anyhow::Result<Fleet> {
    let engines = &settings.engines;
    let key = match settings.kv.hash_key {
        Some(key) => key,
        None => {
            let mut key = [0; 16];
            getrandom::fill(&mut key)
                .context("the system gives no entropy for the hash key; set `hash_key`")?;
            HashKey(key)
        }
    };
    let hasher = BlockHasher::new(key, engines.block_size_tokens.get());
    let mover: Arc<dyn Mover> = Arc::new(
        SharedMemoryMover::new(SharedMemorySettings::default())
            .context("the KV mover cannot start its threads")?,
    );
    let of_kind = |kind: EngineKind| engines.engine.iter().filter(move |spec| spec.kind == kind);
    let mut fleet = Fleet { launchers: Vec::new(), models: Vec::new(), hasher };

    if of_kind(EngineKind::Embedded).next().is_some() {
        let model = texts::load_model(settings, environment)?;
        let text = texts::text_of_model(&model, engines.tokenizer.as_deref())?;
        let limits = limits(settings, engines.engine_blocks.get(), engines.step_tokens_max.get());
        let context_tokens_max = text.context_tokens_max.min(limits.blocks_total * limits.block_size_tokens);
        let shared = EmbeddedFleet {
            model: model.id,
            prior: probe(&model.weights, limits.block_size_tokens),
            weights: model.weights,
            limits,
            hasher,
            mover: mover.clone(),
            runtime: runtime.clone(),
        };
        for (name, spec) in named(of_kind(EngineKind::Embedded), "embedded") {
            fleet.launchers.push(Arc::new(EmbeddedLauncher::new(name, spec.role, shared.clone())));
        }
        fleet.models.push(ModelText { context_tokens_max, ..text });
    }
    if of_kind(EngineKind::Sim).next().is_some() {
        let limits = limits(settings, engines.sim_blocks.get(), engines.sim_step_tokens_max.get());
        let context_tokens_max =
            SIMULATED_CONTEXT_TOKENS.min(limits.blocks_total.saturating_mul(limits.block_size_tokens));
        let id: Arc<str> = SIMULATED_MODEL.into();
        let text = texts::text_of_simulation(id.clone(), engines.tokenizer.as_deref(), context_tokens_max)?;
        let shared = SimulatedFleet {
            model: id,
            context_tokens_max,
            limits,
            hasher,
            mover,
            runtime: runtime.clone(),
            candidates: text.tokenizer.plain_tokens().into(),
            timing: StepCoefficients::H100_8B,
            speed: engines.sim_speed,
        };
        for (name, spec) in named(of_kind(EngineKind::Sim), "sim") {
            fleet.launchers.push(Arc::new(SimulatedLauncher::new(name, spec.role, shared.clone())));
        }
        fleet.models.push(text);
    }
    Ok(fleet)
}

fn limits(settings: &Settings, blocks_total: u32, step_tokens_max: u32) -> EngineLimits {
    let engines = &settings.engines;
    EngineLimits {
        blocks_total,
        block_size_tokens: engines.block_size_tokens.get(),
        step_tokens_max,
        sequences_max: engines.sequences_max.get(),
        waiting_max: engines.waiting_max.get(),
        kv_lease: settings.kv.kv_lease_seconds,
        transfer_deadline: settings.kv.transfer_seconds_max,
    }
}

/// Every engine of the specs, numbered through: `embedded-0`, `embedded-1`, ...
fn named<'a>(
    specs: impl Iterator<Item = &'a EngineSpec>,
    kind: &str,
) -> impl Iterator<Item = (EngineName, &'a EngineSpec)> {
    let each = specs.flat_map(|spec| std::iter::repeat_n(spec, spec.count.get() as usize));
    each.enumerate().map(move |(number, spec)| (EngineName::from(format!("{kind}-{number}")), spec))
}
