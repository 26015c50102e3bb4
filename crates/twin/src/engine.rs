//! Engines in virtual time: the schedulers that ship, with a profile for a clock.
//!
//! A [`Group`] is one engine: ranks that step together, in most cases one. It does what the loop of a local engine does
//! (`forebay-engines`): plan, report what began, compute, take what was drawn, report. The caller owns time: it asks for a
//! step ([`Group::turn`]), which says when it will be over, and then for its end ([`Group::finish`]).
//!
//! A hand-over begins with the step that admits the decode leg, which it lengthens; the scheduler hears of its end at the
//! second boundary between steps after it, or at once if the engine is idle.

mod quiet;

use std::sync::Arc;

use forebay_engine_model::{Accounting, Job, Output, Scheduler, SchedulerConfig, StepPlan, SubmitError};
use forebay_kv_hash::BlockHasher;
use forebay_perf_model::{KvLayout, Profile, StepShape};
use forebay_types::{KvEvent, KvEventBatch, LegId, RankId, RankLoad, Role, StepObservation, TokenId};

use crate::clock::Time;
pub(crate) use quiet::Quiet;

/// Boundaries between steps from the end of a hand-over to the first step that knows of it. What vLLM's connector took on
/// a loaded engine beyond the bytes.
const NOTICED_AFTER_STEPS: u32 = 2;

/// What all engines of a run are like.
#[derive(Debug, Clone)]
pub struct EngineKind {
    /// Seconds of its steps, of hand-overs and of a request's way.
    pub profile: Arc<Profile>,
    /// How KV lies in memory, which decides how long a hand-over takes; `None`: there are none.
    pub layout: Option<KvLayout>,
    /// What a hand-over takes over this engine's link; `None`: what the profile measured.
    pub link: Option<Link>,
    /// Bytes of one token's KV, all layers.
    pub kv_bytes_per_token: u32,
    /// Blocks, budgets and bounds of each rank.
    pub scheduler: SchedulerConfig,
}

/// What a hand-over over a rank's link takes with the link to itself: `start`, then for each block its descriptors and its bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Before anything moves: finding the blocks, telling the other end.
    pub start_seconds: f64,
    /// For each piece of memory that is moved, beside its bytes.
    pub descriptor_seconds: f64,
    /// In each direction.
    pub bytes_per_second: f64,
    /// Layers of the model, each with keys and values.
    pub layers: u32,
}

impl Link {
    /// Pieces of memory that a block lies in.
    fn block_descriptors(&self, layout: KvLayout) -> u32 {
        match layout {
            KvLayout::CrossLayerBlocks => 1,
            KvLayout::PerLayerBlocks => 2 * self.layers,
        }
    }
}

/// One engine of a fleet.
#[derive(Debug, Clone)]
pub struct EngineSpec {
    /// What it is like.
    pub kind: EngineKind,
    /// Its ranks, which step together.
    pub dp_ranks: u16,
    /// The work it may be given.
    pub role: Role,
    /// GPUs that it takes.
    pub gpus: u32,
    /// From the start of a process in place of one that died until it serves: loading weights, compiling, capturing graphs.
    pub startup: Time,
}

impl EngineKind {
    /// Whether engines can hand KV to each other: whether that was measured, or a link is given.
    pub fn hands_over(&self) -> bool {
        let takes = |layout| self.link.is_some() || self.profile.handover_seconds(layout, 1).is_some();
        self.layout.is_some_and(takes)
    }

    /// What a hand-over of so many blocks takes with the link to itself.
    pub(crate) fn handover(&self, blocks: u32) -> HandOverCost {
        let Some(layout) = self.layout else { return HandOverCost::default() };
        let tokens = blocks * self.scheduler.block_size_tokens;
        let begins_seconds = self.profile.handover_start_seconds(layout, tokens).unwrap_or(0.0);
        let (seconds, moving_seconds) = match self.link {
            Some(link) => {
                let block = f64::from(link.block_descriptors(layout)) * link.descriptor_seconds
                    + self.block_bytes() as f64 / link.bytes_per_second;
                let moving = f64::from(blocks) * block;
                (link.start_seconds + moving, moving)
            }
            None => {
                let measured = |tokens| self.profile.handover_seconds(layout, tokens).unwrap_or(0.0);
                (measured(tokens), measured(tokens) - measured(0))
            }
        };
        HandOverCost { seconds, moving_seconds, begins_seconds }
    }

    /// Bytes of a block's KV, all layers.
    pub fn block_bytes(&self) -> u64 {
        u64::from(self.kv_bytes_per_token) * u64::from(self.scheduler.block_size_tokens)
    }
}

/// Seconds of a hand-over that has the link to itself.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct HandOverCost {
    /// From its beginning to its end.
    pub seconds: f64,
    /// Of these, the last, in which it takes its part of the link.
    pub moving_seconds: f64,
    /// By how much it lengthens the step that begins it.
    pub begins_seconds: f64,
}

/// What a rank says of itself, all at once.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub rank: RankId,
    pub load: RankLoad,
    pub step: Option<StepObservation>,
    pub kv: Option<KvEventBatch>,
}

/// A hand-over that has begun.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pull {
    pub leg: LegId,
    /// Takes it in.
    pub rank: RankId,
    pub blocks: u32,
    pub cost: HandOverCost,
}

/// What came of a call; a buffer that is used again.
#[derive(Debug, Default)]
pub(crate) struct Happened {
    /// Legs whose work began, and what they found cached.
    pub started: Vec<(LegId, u32)>,
    pub pulls: Vec<Pull>,
    /// Decode legs whose hand-over is over, and whether they have their KV.
    pub imported: Vec<(LegId, bool)>,
    pub reports: Vec<Report>,
    /// Of quiet steps: whose, when they ended, and what they took.
    pub steps: Vec<(RankId, Time, StepObservation)>,
    pub outputs: Vec<Output>,
}

impl Happened {
    pub(crate) fn clear(&mut self) {
        let Self { started, pulls, imported, reports, steps, outputs } = self;
        started.clear();
        pulls.clear();
        imported.clear();
        reports.clear();
        steps.clear();
        outputs.clear();
    }
}

/// A step that has begun.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Begun {
    pub seconds: f64,
    /// Prompt tokens that it computes, of all ranks.
    pub prefill_tokens: u32,
    /// Sequences that decode, of all ranks.
    pub decodes: u32,
}

/// One engine.
pub(crate) struct Group {
    kind: EngineKind,
    ranks: Vec<Rank>,
    running: Option<Begun>,
    busy_seconds: f64,
    /// Of the lives before: tokens computed by each rank, and preemptions.
    tokens_before: Vec<u64>,
    preemptions_before: u64,
}

struct Rank {
    id: RankId,
    scheduler: Scheduler,
    plan: StepPlan,
    /// Something came since the last report that whoever places requests should see before the step is over.
    notable: bool,
    /// Legs whose KV is there, or will not come, and the boundaries left until the scheduler hears of it.
    arrived: Vec<(LegId, bool, u32)>,
    batches: u64,
    computed_tokens: u64,
    drawn: Vec<(LegId, u32, TokenId)>,
}

impl Group {
    /// An idle engine whose ranks have these ids.
    pub(crate) fn new(kind: EngineKind, ids: impl Iterator<Item = RankId>, hasher: BlockHasher) -> Self {
        let rank = |id| Rank {
            id,
            scheduler: Scheduler::new(kind.scheduler, hasher),
            plan: StepPlan::of_shapes(),
            notable: false,
            arrived: Vec::new(),
            batches: 0,
            computed_tokens: 0,
            drawn: Vec::new(),
        };
        let ranks: Vec<Rank> = ids.map(rank).collect();
        let tokens_before = vec![0; ranks.len()];
        Self { ranks, running: None, busy_seconds: 0.0, tokens_before, preemptions_before: 0, kind }
    }

    /// The next life of an engine: what the one before did is not forgotten.
    pub(crate) fn after(mut self, before: &Self) -> Self {
        self.busy_seconds = before.busy_seconds;
        self.preemptions_before = before.preemptions();
        for (tokens, before) in self.tokens_before.iter_mut().zip(before.computed_tokens()) {
            *tokens = before;
        }
        self
    }

    /// Whether a step is being computed.
    pub(crate) fn is_stepping(&self) -> bool {
        self.running.is_some()
    }

    /// Seconds of all steps so far.
    pub(crate) fn busy_seconds(&self) -> f64 {
        self.busy_seconds
    }

    /// Tokens that each rank computed so far, prompts and decodes alike.
    pub(crate) fn computed_tokens(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranks.iter().zip(&self.tokens_before).map(|(rank, before)| before + rank.computed_tokens)
    }

    /// Preemptions of all ranks so far.
    pub(crate) fn preemptions(&self) -> u64 {
        let now: u64 = self.ranks.iter().map(|rank| rank.scheduler.load().preemptions).sum();
        self.preemptions_before + now
    }

    /// What each rank's metrics say to one who asks for them: how many sequences run and wait, and how full the pool is.
    /// Not which of them still compute their prompts, nor how much of those is left; what those that wait will need is
    /// taken from the mean of others.
    pub(crate) fn samples(&self) -> impl Iterator<Item = (RankId, RankLoad)> + '_ {
        self.ranks.iter().map(|rank| {
            let load = rank.scheduler.load();
            let used = load.blocks_total - load.blocks_free;
            let queued = u64::from(load.waiting + load.running - load.decoding).max(1);
            let sample = RankLoad {
                decoding: load.running,
                prefill_tokens: load.prefill_tokens * u64::from(load.waiting) / queued,
                context_tokens: u64::from(used) * u64::from(self.kind.scheduler.block_size_tokens),
                ..load
            };
            (rank.id, sample)
        })
    }

    /// Loads of its ranks as they are.
    pub(crate) fn loads(&self) -> impl Iterator<Item = RankLoad> + '_ {
        self.ranks.iter().map(|rank| rank.scheduler.load())
    }

    /// What ranks report when they join.
    pub(crate) fn introduce(&mut self, happened: &mut Happened) {
        for rank in &mut self.ranks {
            happened.reports.push(rank.report(None));
        }
    }

    /// Queues a leg.
    ///
    /// # Errors
    /// As the scheduler's.
    pub(crate) fn submit(&mut self, dp_rank: u16, job: Job) -> Result<(), SubmitError> {
        let rank = &mut self.ranks[usize::from(dp_rank)];
        rank.notable = true;
        rank.scheduler.submit(job)
    }

    /// The KV that a decode leg waits for is there, or will not come.
    pub(crate) fn arrived(&mut self, dp_rank: u16, leg: LegId, ok: bool) {
        self.ranks[usize::from(dp_rank)].arrived.push((leg, ok, NOTICED_AFTER_STEPS));
    }

    /// Forgets a leg, held or not.
    pub(crate) fn cancel(&mut self, dp_rank: u16, leg: LegId) {
        let rank = &mut self.ranks[usize::from(dp_rank)];
        rank.notable = true;
        rank.scheduler.cancel(leg);
    }

    /// What a rank says of itself when it is asked.
    pub(crate) fn report(&mut self, dp_rank: u16) -> Report {
        self.ranks[usize::from(dp_rank)].report(None)
    }

    /// All that a rank caches, and the number of the first batch of events that is not in it. To be asked right after
    /// [`Group::report`].
    pub(crate) fn cached(&self, dp_rank: u16) -> (u64, Vec<KvEvent>) {
        let rank = &self.ranks[usize::from(dp_rank)];
        (rank.batches, rank.scheduler.cached())
    }

    /// Each rank's id, blocks by state, and whether it has nothing to do.
    pub(crate) fn accounts(&self) -> impl Iterator<Item = (RankId, Accounting, bool)> + '_ {
        self.ranks.iter().map(|rank| (rank.id, rank.scheduler.accounting(), rank.scheduler.is_idle()))
    }

    /// Frees what a prefill leg holds.
    pub(crate) fn release_held(&mut self, dp_rank: u16, leg: LegId) {
        let rank = &mut self.ranks[usize::from(dp_rank)];
        rank.notable = true;
        rank.scheduler.release_held(leg);
    }

    /// Begins the next step, if there is anything to compute. To be called only between steps.
    /// Its steps take `slow` times as long as they should.
    pub(crate) fn turn(&mut self, slow: f64, happened: &mut Happened) -> Option<Begun> {
        debug_assert!(self.running.is_none());
        loop {
            let first_pull = happened.pulls.len();
            for rank in &mut self.ranks {
                rank.plan(&self.kind, happened);
            }
            if self.ranks.iter().any(|rank| !rank.plan.chunks.is_empty()) {
                let mut begun = self.begin(&happened.pulls[first_pull..]);
                begun.seconds *= slow;
                self.running = Some(begun);
                self.busy_seconds += begun.seconds;
                return Some(begun);
            }
            // Nobody waits for the end of a step that does not run.
            let mut noticed = false;
            for rank in &mut self.ranks {
                noticed |= rank.notice(u32::MAX, happened);
            }
            if !noticed {
                return None;
            }
        }
    }

    fn begin(&self, pulls: &[Pull]) -> Begun {
        let config = &self.kind.scheduler;
        let shapes = self.ranks.iter().map(|rank| StepShape {
            prefill_tokens: rank.plan.prefill_tokens,
            prefill_attention: rank.plan.prefill_attention,
            decodes: rank.plan.decodes,
            context_tokens: rank.plan.context_tokens,
            group_decodes: 0,
            budget_tokens: config.step_tokens_max,
        });
        let shape = StepShape::of_group(shapes);
        let starting = pulls.iter().map(|pull| pull.cost.begins_seconds);
        let seconds = self.kind.profile.step_seconds(&shape) + starting.sum::<f64>();
        let sum = |of: fn(&StepPlan) -> u32| self.ranks.iter().map(|rank| of(&rank.plan)).sum();
        Begun { seconds, prefill_tokens: sum(|plan| plan.prefill_tokens), decodes: sum(|plan| plan.decodes) }
    }

    /// Ends the step that runs: `token_of` says which token a leg has at a position.
    pub(crate) fn finish(&mut self, token_of: impl Fn(LegId, u32) -> TokenId, happened: &mut Happened) {
        let begun = self.running.take().expect("a step runs");
        for rank in &mut self.ranks {
            rank.complete(begun.seconds, &token_of, happened);
            rank.notice(1, happened);
        }
    }
}

impl Rank {
    /// Plans the next step and says what begins with it.
    fn plan(&mut self, kind: &EngineKind, happened: &mut Happened) {
        self.scheduler.plan(&mut self.plan);
        happened.started.extend(self.plan.started.iter().map(|started| (started.leg, started.cached_tokens)));
        for import in &self.plan.imports {
            let blocks = import.blocks.len() as u32;
            happened.pulls.push(Pull { leg: import.leg, rank: self.id, blocks, cost: kind.handover(blocks) });
        }
        if std::mem::take(&mut self.notable) || !self.plan.started.is_empty() {
            happened.reports.push(self.report(None));
        }
    }

    fn complete(&mut self, seconds: f64, token_of: &impl Fn(LegId, u32) -> TokenId, happened: &mut Happened) {
        let plan = &self.plan;
        if plan.chunks.is_empty() {
            return;
        }
        self.drawn.clear();
        for chunk in &plan.chunks {
            self.computed_tokens += u64::from(chunk.count);
            let position = chunk.start + chunk.count;
            let drawn =
                plan.samples(chunk).iter().map(|&choice| (chunk.leg, choice, token_of(chunk.leg, position)));
            self.drawn.extend(drawn);
        }
        let step = StepObservation {
            prefill_tokens: plan.prefill_tokens,
            prefill_attention: plan.prefill_attention,
            decodes: plan.decodes,
            context_tokens: plan.context_tokens,
            seconds,
        };
        self.scheduler.complete(&self.drawn, &mut happened.outputs);
        happened.reports.push(self.report(Some(step)));
    }

    /// Counts a boundary between steps, or many; tells the scheduler of KV whose time has come. Whether there was any.
    fn notice(&mut self, boundaries: u32, happened: &mut Happened) -> bool {
        let before = happened.imported.len();
        let scheduler = &mut self.scheduler;
        self.arrived.retain_mut(|(leg, ok, left)| {
            *left = left.saturating_sub(boundaries);
            if *left == 0 {
                scheduler.import_finished(*leg, *ok);
                happened.imported.push((*leg, *ok));
            }
            *left > 0
        });
        let noticed = happened.imported.len() > before;
        self.notable |= noticed;
        noticed
    }

    fn report(&mut self, step: Option<StepObservation>) -> Report {
        let mut events = Vec::new();
        self.scheduler.drain_events(&mut events);
        let kv = (!events.is_empty()).then(|| {
            let sequence = self.batches;
            self.batches += 1;
            KvEventBatch { rank: self.id, sequence, events }
        });
        Report { rank: self.id, load: self.scheduler.load(), step, kv }
    }
}

/// When a leg's tokens reach the edge of an engine that sends them asynchronously: the step before has to be handled
/// while the next one runs, which holds them up if that one has prefill. Seen in recorded runs: a response's worst gaps
/// are 20 to 35 ms shorter than the longest steps. First tokens get 0.4 of the delay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// As measured with vLLM 0.25.
    Asynchronous,
    /// With the step's end.
    WithStep,
}

impl Delivery {
    /// Seconds after the end of a step until its first tokens, and its other ones, leave the engine.
    pub fn seconds(self, next: Option<Begun>) -> (f64, f64) {
        match (self, next) {
            (Self::Asynchronous, Some(Begun { seconds, prefill_tokens: 1.., .. })) => {
                let later = (seconds / 2.0).min(0.024);
                (0.4 * later, later)
            }
            _ => (0.0, 0.0),
        }
    }
}

#[cfg(test)]
mod tests;
