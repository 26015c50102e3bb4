//! The embedded engine: `engine-embedded`'s arithmetic under `engine-model`'s scheduler, on a thread of its own.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::NonNull,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_engine_embedded::{ChunkInput, Executor, KvPool, Logits, SampleParams, VecPool, sample};
pub use forebay_engine_embedded::{GgufMetadata, GgufTokenizer, Weights};
use forebay_engine_model::StepPlan;
use forebay_kv_hash::BlockHasher;
use forebay_kv_move::{Layout, Mover, Region};
use forebay_perf_model::StepCoefficients;
use forebay_types::{EngineName, Incarnation, LegId, Role, SampledToken, Sampling};
use tokio::runtime::Handle;

use crate::{
    driver::{Accepts, CacheSight, EngineFacts, EngineLimits, KvAbilities, LaunchError},
    local::{Backend, LocalEngine, LocalFleet, LocalLauncher, Parts, copy_blocks, panic_text},
};

/// What all embedded engines of a process share.
#[derive(Clone)]
pub struct EmbeddedFleet {
    /// Model id that requests name.
    pub model: Arc<str>,
    /// One copy for all.
    pub weights: Arc<Weights>,
    /// Sizes and bounds of each engine.
    pub limits: EngineLimits,
    /// The fleet's block hash function.
    pub hasher: BlockHasher,
    /// What moves KV between pools.
    pub mover: Arc<dyn Mover>,
    /// Where timers run.
    pub runtime: Handle,
    /// From [`probe`].
    pub prior: StepCoefficients,
}

/// Starts lives of one embedded engine.
pub type EmbeddedLauncher = LocalLauncher<EmbeddedFleet>;

impl LocalFleet for EmbeddedFleet {
    const KIND: &'static str = "embedded";

    fn start(
        &self,
        name: &EngineName,
        role: Role,
        incarnation: Incarnation,
    ) -> Result<Arc<LocalEngine>, LaunchError> {
        let failed = |reason: String| LaunchError { engine: name.clone(), reason };
        let EmbeddedFleet { model, weights, limits, hasher, mover, runtime, prior } = self.clone();
        let block_bytes = weights.kv_block_bytes(limits.block_size_tokens);
        let layout = Layout { block_bytes, blocks: limits.blocks_total };
        let region = Region::create(name.as_str(), layout).map_err(|error| failed(error.to_string()))?;
        let facts = EngineFacts {
            engine: name.clone(),
            kind: Self::KIND,
            incarnation,
            model,
            role,
            dp_ranks: 1,
            block_size_tokens: limits.block_size_tokens,
            block_bytes,
            blocks_total: limits.blocks_total,
            step_tokens_max: limits.step_tokens_max,
            context_tokens_max: context_tokens_max(&weights, &limits),
            waiting_max: limits.waiting_max,
            kv: KvAbilities {
                layout: weights.fingerprint() ^ u64::from(limits.block_size_tokens),
                can_export: true,
                can_import: true,
                needs_warming: false,
            },
            accepts: Accepts::TOKENS,
            continues_sampling: true,
            cache_sight: CacheSight::Events,
            notes: Vec::new(),
            prior,
        };
        let backend = EmbeddedBackend::new(weights, limits.block_size_tokens);
        let (engine, shell, last_words) = Parts { facts, limits, hasher, backend, region, mover }.assemble();
        let run = move || {
            let ended = catch_unwind(AssertUnwindSafe(|| runtime.block_on(shell.run())));
            match ended {
                Ok(()) => last_words.say("stopped"),
                Err(panic) => last_words.say(&panic_text(&*panic)),
            }
        };
        let thread = std::thread::Builder::new().name(name.to_string());
        thread.spawn(run).map_err(|error| failed(format!("no thread: {error}")))?;
        Ok(engine)
    }
}

/// Longest sequence that the model and the pool both hold.
fn context_tokens_max(weights: &Weights, limits: &EngineLimits) -> u32 {
    weights.config().context_tokens_max.min(limits.blocks_total * limits.block_size_tokens)
}

struct EmbeddedBackend {
    executor: Executor,
    logits: Logits,
    block_size_tokens: u32,
    legs: HashMap<LegId, Arc<Sampling>>,
}

impl EmbeddedBackend {
    fn new(weights: Arc<Weights>, block_size_tokens: u32) -> Self {
        let executor = Executor::new(weights, block_size_tokens);
        Self { executor, logits: Logits::new(), block_size_tokens, legs: HashMap::new() }
    }
}

impl Backend for EmbeddedBackend {
    fn add_leg(&mut self, leg: LegId, sampling: &Arc<Sampling>) {
        self.legs.insert(leg, sampling.clone());
    }

    fn remove_leg(&mut self, leg: LegId) {
        self.legs.remove(&leg);
    }

    fn execute(&mut self, plan: &StepPlan, pool: &Region, sampled: &mut Vec<(LegId, SampledToken)>) {
        copy_blocks(plan, pool);
        let inputs: Vec<ChunkInput<'_>> = plan
            .chunks
            .iter()
            .map(|chunk| ChunkInput {
                start: chunk.start,
                tokens: plan.tokens(chunk),
                blocks: plan.blocks(chunk),
                want_logits: !plan.samples(chunk).is_empty(),
            })
            .collect();
        let mut pool = RegionPool { region: pool, block_size_tokens: self.block_size_tokens };
        self.executor.execute(&mut pool, &inputs, &mut self.logits);
        let wanted = plan.chunks.iter().filter(|chunk| !plan.samples(chunk).is_empty());
        for (row, chunk) in wanted.enumerate() {
            let Some(sampling) = self.legs.get(&chunk.leg) else { continue };
            let position = chunk.start + chunk.count;
            for &choice in plan.samples(chunk) {
                let params = SampleParams {
                    temperature: sampling.temperature,
                    top_p: sampling.top_p,
                    top_k: sampling.top_k,
                    seed: sampling.seed,
                    choice,
                    position,
                    logprobs: sampling.logprobs,
                };
                let (token, logprobs) = sample(self.logits.row(row), &params);
                let logprobs = logprobs.map(Box::new);
                sampled.push((chunk.leg, SampledToken { choice, position, token, logprobs }));
            }
        }
    }

    fn pace(&self, _: &StepPlan) -> Duration {
        Duration::ZERO
    }
}

/// The engine's pool as the executor sees it.
struct RegionPool<'a> {
    region: &'a Region,
    block_size_tokens: u32,
}

// SAFETY: a region's blocks are disjoint, aligned to 8 bytes, mapped for as long as a clone of the region lives (the
// shell holds one) and zero before they are first written. Only this engine's thread writes blocks that the scheduler
// has given to a sequence, and only through its executor; imports write blocks of sequences that do not run yet. Other
// engines read blocks of finished prefills, which nobody writes before their generation rises; what a reader may still
// read after that, the mover detects and drops.
#[allow(unsafe_code, reason = "the bridge between kv-move's memory and the executor")]
unsafe impl KvPool for RegionPool<'_> {
    fn block(&mut self, index: u32) -> NonNull<f32> {
        self.region.block_ptr(index).cast()
    }

    fn blocks(&self) -> u32 {
        self.region.layout().blocks
    }

    fn block_bytes(&self) -> u64 {
        self.region.layout().block_bytes
    }

    fn block_size_tokens(&self) -> u32 {
        self.block_size_tokens
    }
}

/// Measures a few steps to give placement first values; later steps refine them.
///
/// Takes a fraction of a second: one prefill of 64 tokens and decodes of 1 and 4 sequences behind it.
pub fn probe(weights: &Arc<Weights>, block_size_tokens: u32) -> StepCoefficients {
    const PROMPT_TOKENS: u32 = 64;
    let sequences = 4;
    let blocks_each = (PROMPT_TOKENS + 8).div_ceil(block_size_tokens);
    let mut pool =
        VecPool::new(blocks_each * sequences, weights.kv_block_bytes(block_size_tokens), block_size_tokens);
    let mut executor = Executor::new(weights.clone(), block_size_tokens);
    let mut logits = Logits::new();
    let tables: Vec<Vec<u32>> =
        (0..sequences).map(|s| (s * blocks_each..(s + 1) * blocks_each).collect()).collect();
    let vocabulary = weights.config().vocab;
    let prompt: Vec<u32> = (0..PROMPT_TOKENS).map(|i| (i * 37 + 11) % vocabulary).collect();
    let mut time = |chunks: &[ChunkInput<'_>]| {
        let began = Instant::now();
        executor.execute(&mut pool, chunks, &mut logits);
        began.elapsed().as_secs_f64()
    };
    let chunk =
        |table: usize| ChunkInput { start: 0, tokens: &prompt, blocks: &tables[table], want_logits: true };
    time(&[chunk(0)]); // touches pages and caches
    let prefill = (0..sequences as usize).map(|table| time(&[chunk(table)])).fold(f64::INFINITY, f64::min);
    let next = [7_u32];
    let decode = |table: usize, step: u32| ChunkInput {
        start: PROMPT_TOKENS + step,
        tokens: &next,
        blocks: &tables[table],
        want_logits: true,
    };
    let one = (0..3).map(|step| time(&[decode(0, step)])).fold(f64::INFINITY, f64::min);
    let all: Vec<_> = (0..sequences as usize).map(|table| decode(table, 3)).collect();
    let four = (0..3).map(|_| time(&all)).fold(f64::INFINITY, f64::min);
    let per_decode = ((four - one) / f64::from(sequences - 1)).max(one * 0.05);
    let per_prefill_token = ((prefill - one) / f64::from(PROMPT_TOKENS)).max(one * 0.01);
    StepCoefficients {
        base_seconds: (one - per_decode).max(one * 0.1),
        per_prefill_token_seconds: per_prefill_token,
        // Attention is a small part at these lengths; what is observed corrects it.
        per_attention_seconds: per_prefill_token * 1e-4,
        per_decode_seconds: per_decode,
        per_context_token_seconds: per_decode * 1e-4,
    }
}
