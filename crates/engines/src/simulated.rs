//! The simulated engine: `engine-model`'s scheduler over KV blocks that hold digests instead of tensors.
//!
//! Each token is a function of the blocks that the engine really holds, so stale, foreign or missing KV gives wrong
//! tokens; steps take the time that a model of a real engine says, or none.

use std::{collections::HashMap, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use forebay_engine_model::{StepPlan, content};
use forebay_kv_hash::BlockHasher;
use forebay_kv_move::{Layout, Mover, Region};
pub use forebay_perf_model::StepCoefficients;
use forebay_types::{EngineName, Incarnation, LegId, Role, SampledToken, Sampling, TokenId, TokenLogprobs};
use futures::FutureExt;
use tokio::runtime::Handle;

use crate::{
    driver::{Accepts, CacheSight, EngineFacts, EngineLimits, KvAbilities, LaunchError},
    local::{Backend, LocalEngine, LocalFleet, LocalLauncher, Parts, copy_blocks, panic_text},
};

/// Equal for all simulated engines of one block size: their digests mean the same.
const KV_LAYOUT: u64 = 0x51_6d_6b_76;
/// Bytes of one token's digest.
const SLOT_BYTES: u64 = 8;

/// What all simulated engines of a process share.
#[derive(Clone)]
pub struct SimulatedFleet {
    /// Model id that requests name.
    pub model: Arc<str>,
    /// Longest sequence, prompt and output.
    pub context_tokens_max: u32,
    /// Sizes and bounds of each engine.
    pub limits: EngineLimits,
    /// The fleet's block hash function.
    pub hasher: BlockHasher,
    /// What moves KV between pools.
    pub mover: Arc<dyn Mover>,
    /// Where the engines run.
    pub runtime: Handle,
    /// Tokens to draw from: those that are text on their own. Never empty.
    pub candidates: Arc<[TokenId]>,
    /// Time of a step at speed 1.
    pub timing: StepCoefficients,
    /// 1 is real time, 2 twice as fast, 0 unpaced.
    pub speed: f64,
}

/// Starts lives of one simulated engine.
pub type SimulatedLauncher = LocalLauncher<SimulatedFleet>;

impl LocalFleet for SimulatedFleet {
    const KIND: &'static str = "sim";

    fn start(
        &self,
        name: &EngineName,
        role: Role,
        incarnation: Incarnation,
    ) -> Result<Arc<LocalEngine>, LaunchError> {
        let fleet = self.clone();
        let limits = fleet.limits;
        let block_bytes = SLOT_BYTES * u64::from(limits.block_size_tokens);
        let layout = Layout { block_bytes, blocks: limits.blocks_total };
        let region = Region::create(name.as_str(), layout)
            .map_err(|error| LaunchError { engine: name.clone(), reason: error.to_string() })?;
        let facts = EngineFacts {
            engine: name.clone(),
            kind: Self::KIND,
            incarnation,
            model: fleet.model,
            role,
            dp_ranks: 1,
            block_size_tokens: limits.block_size_tokens,
            block_bytes,
            blocks_total: limits.blocks_total,
            step_tokens_max: limits.step_tokens_max,
            context_tokens_max: fleet.context_tokens_max.min(limits.blocks_total * limits.block_size_tokens),
            waiting_max: limits.waiting_max,
            kv: KvAbilities {
                layout: KV_LAYOUT ^ u64::from(limits.block_size_tokens),
                can_export: true,
                can_import: true,
                needs_warming: false,
            },
            accepts: Accepts::TOKENS,
            continues_sampling: true,
            cache_sight: CacheSight::Events,
            notes: Vec::new(),
            prior: prior(&fleet.timing, fleet.speed),
        };
        let backend = SimulatedBackend {
            candidates: fleet.candidates,
            timing: fleet.timing,
            speed: fleet.speed,
            block_size_tokens: limits.block_size_tokens,
            legs: HashMap::new(),
        };
        let parts = Parts { facts, limits, hasher: fleet.hasher, backend, region, mover: fleet.mover };
        let (engine, shell, last_words) = parts.assemble();
        fleet.runtime.spawn(async move {
            match AssertUnwindSafe(shell.run()).catch_unwind().await {
                Ok(()) => last_words.say("stopped"),
                Err(panic) => last_words.say(&panic_text(&*panic)),
            }
        });
        Ok(engine)
    }
}

/// What placement expects of a simulated step before it has seen one.
fn prior(timing: &StepCoefficients, speed: f64) -> StepCoefficients {
    // Unpaced engines take the time of the loop itself: some microseconds a step.
    let scale = if speed > 0.0 { 1.0 / speed } else { 1e-3 };
    StepCoefficients {
        base_seconds: timing.base_seconds * scale,
        per_prefill_token_seconds: timing.per_prefill_token_seconds * scale,
        per_attention_seconds: timing.per_attention_seconds * scale,
        per_decode_seconds: timing.per_decode_seconds * scale,
        per_context_token_seconds: timing.per_context_token_seconds * scale,
    }
}

struct SimulatedBackend {
    candidates: Arc<[TokenId]>,
    timing: StepCoefficients,
    speed: f64,
    block_size_tokens: u32,
    legs: HashMap<LegId, Arc<Sampling>>,
}

impl Backend for SimulatedBackend {
    fn add_leg(&mut self, leg: LegId, sampling: &Arc<Sampling>) {
        self.legs.insert(leg, sampling.clone());
    }

    fn remove_leg(&mut self, leg: LegId) {
        self.legs.remove(&leg);
    }

    fn execute(&mut self, plan: &StepPlan, pool: &Region, sampled: &mut Vec<(LegId, SampledToken)>) {
        copy_blocks(plan, pool);
        let size = self.block_size_tokens;
        for chunk in &plan.chunks {
            let table = plan.blocks(chunk);
            let slot = |position: u32| (table[(position / size) as usize], (position % size) as usize);
            let mut position = chunk.start;
            let mut previous = match position.checked_sub(1) {
                None => 0,
                Some(before) => {
                    let (block, index) = slot(before);
                    pool.word(block, index)
                }
            };
            for &token in plan.tokens(chunk) {
                previous = content::digest_next(previous, token, position);
                let (block, index) = slot(position);
                pool.set_word(block, index, previous);
                position += 1;
            }
            let Some(sampling) = self.legs.get(&chunk.leg) else { continue };
            for &choice in plan.samples(chunk) {
                let held = (0..position.div_ceil(size)).map(|block| {
                    let last = (position - block * size).min(size) - 1;
                    pool.word(table[block as usize], last as usize)
                });
                let token = content::sampled_token(held, choice, sampling, &self.candidates);
                let logprobs =
                    sampling.logprobs.map(|_| Box::new(TokenLogprobs { chosen: 0.0, top: Vec::new() }));
                sampled.push((chunk.leg, SampledToken { choice, position, token, logprobs }));
            }
        }
    }

    fn pace(&self, plan: &StepPlan) -> Duration {
        if self.speed <= 0.0 {
            return Duration::ZERO;
        }
        let seconds = self.timing.step_seconds(
            plan.prefill_tokens,
            plan.prefill_attention,
            plan.decodes,
            plan.context_tokens,
        );
        Duration::from_secs_f64(seconds / self.speed)
    }
}
