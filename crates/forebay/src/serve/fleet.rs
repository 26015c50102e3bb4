//! From settings to engines that can be launched.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Context as _;
use forebay_engines::{
    EngineLimits, Launch,
    embedded::{EmbeddedFleet, EmbeddedLauncher, probe},
    remote::{
        HeldKv, RemoteLauncher,
        client::{ClientSettings, HttpClient},
    },
    simulated::{SimulatedFleet, SimulatedLauncher, StepCoefficients},
};
use forebay_gateway::{
    cluster::Outbound,
    http::{AttachedTexts, ModelText},
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_kv_move::{Mover, SharedMemoryMover, SharedMemorySettings};
use forebay_types::EngineName;
use tokio::runtime::Handle;

use super::{attached, outside, texts};
use crate::settings::{
    Settings,
    engine_spec::{EngineKind, EngineSpec, LocalSpec},
};

/// Model id of simulated engines.
const SIMULATED_MODEL: &str = "sim";
/// Context of the model that simulated engines stand for; their pools may hold less.
const SIMULATED_CONTEXT_TOKENS: u32 = 131_072;

/// What a process serves.
pub(super) struct Fleet {
    pub(super) launchers: Vec<Arc<dyn Launch>>,
    pub(super) models: Vec<ModelText>,
    /// Text of models that attached engines may serve.
    pub(super) attached: AttachedTexts,
    pub(super) hasher: BlockHasher,
    /// What agents hash with.
    pub(super) hash_key: forebay_proto::HashKey,
    /// What speaks to attached engines.
    pub(super) outbound: Outbound,
}

/// Loads what the engines share and prepares each of them; nothing runs yet.
pub(super) fn build(
    settings: &Settings,
    environment: &BTreeMap<String, String>,
    runtime: &Handle,
) -> anyhow::Result<Fleet> {
    let engines = &settings.engines;
    let mut fleet = empty(settings)?;
    let hasher = fleet.hasher;
    let of_kind = |kind: EngineKind| {
        engines.engine.iter().filter_map(EngineSpec::local).filter(move |spec| spec.kind == kind)
    };
    let mover: Arc<dyn Mover> = Arc::new(
        SharedMemoryMover::new(SharedMemorySettings::default())
            .context("the KV mover cannot start its threads")?,
    );
    if of_kind(EngineKind::Embedded).next().is_some() {
        let model = texts::load_model(settings, environment)?;
        let text = texts::text_of_model(&model, &engines.tokenizer)?;
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
        let text = texts::text_of_simulation(id.clone(), &engines.tokenizer, context_tokens_max)?;
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
    for launcher in attached_launchers(settings, environment, &fleet, runtime)? {
        fleet.launchers.push(Arc::new(launcher));
    }
    Ok(fleet)
}

/// The launchers of attached engines, in the order of their specifications.
fn attached_launchers(
    settings: &Settings,
    environment: &BTreeMap<String, String>,
    fleet: &Fleet,
    runtime: &Handle,
) -> anyhow::Result<Vec<RemoteLauncher>> {
    let context = attached::context(settings, fleet.hasher, &fleet.outbound, runtime);
    let specs = settings.engines.engine.iter().filter_map(EngineSpec::attached);
    specs.map(|spec| attached::launcher(spec, &fleet.attached, environment, &context)).collect()
}

/// The launchers of attached engines alone, for looking at them.
///
/// # Errors
/// As [`build`].
pub(crate) fn examiners(
    settings: &Settings,
    environment: &BTreeMap<String, String>,
    runtime: &Handle,
) -> anyhow::Result<Vec<RemoteLauncher>> {
    let fleet = empty(settings)?;
    attached_launchers(settings, environment, &fleet, runtime)
}

/// A fleet without engines: identity of blocks, and what speaks to engines elsewhere.
fn empty(settings: &Settings) -> anyhow::Result<Fleet> {
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
    let block_size_tokens = engines.block_size_tokens.get();
    let hasher = BlockHasher::new(key, block_size_tokens);
    let hash_key = forebay_proto::HashKey { key: key.0, block_size_tokens };
    let attached = AttachedTexts::new(texts::texts_of_attached(&engines.tokenizer)?);
    let outbound = Outbound {
        http: HttpClient::new(&ClientSettings::default()).context("the HTTP client for engines")?,
        held: HeldKv::new(),
        draw: Arc::new(outside::entropy),
        tokenizers: Arc::new(attached::SharedTexts(attached.clone())),
    };
    Ok(Fleet { launchers: Vec::new(), models: Vec::new(), attached, hasher, hash_key, outbound })
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
fn named(
    specs: impl Iterator<Item = LocalSpec>,
    kind: &str,
) -> impl Iterator<Item = (EngineName, LocalSpec)> {
    let each = specs.flat_map(|spec| std::iter::repeat_n(spec, spec.count.get() as usize));
    each.enumerate().map(move |(number, spec)| (EngineName::from(format!("{kind}-{number}")), spec))
}
