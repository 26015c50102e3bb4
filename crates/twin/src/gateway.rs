//! The deciding half of the gateway: router, index and chains, as the orchestrator of `forebay-gateway` has them, without its
//! sockets and locks.
//!
//! In: requests to place, progress of legs, reports of ranks. Out: a place for each request. Nothing here models anything;
//! whatever decides is the crate that decides in production.

use std::{collections::BTreeMap, sync::Arc};

use forebay_admission::{Admit, GatherSettings};
use forebay_fleet::{EngineFacts, Event, FleetSettings, LoadSight, Progress};
use forebay_kv_hash::{BlockHasher, ChainLimits, HashKey, SessionChains};
use forebay_kv_index::{Applied, IndexLimits, KvIndex, Overlaps};
use forebay_lifecycle::Health;
use forebay_perf_model::{LinkPrior, Profile, StepCoefficients, StepShape};
use forebay_placement::{Form, PlaceError, Plan, Policy, RankView, Weights};
use forebay_planner::LeaningSettings;
use forebay_routing::{Known, PromptUnit, Question, Router, RouterSettings};
use forebay_types::{
    BlockHash, EngineName, FirstToken, Incarnation, KvEvent, KvEventBatch, Leaning, LegId, RankId, RankLoad,
    ReservationId, StepObservation, TenantId, Tier, TokenId,
};

use crate::{
    clock::Time,
    draw::mix,
    engine::{EngineSpec, Report},
    rule::Rule,
};

/// The model's name; every engine serves it.
pub(crate) const MODEL: &str = "model";
/// What clients allow an answer: more than it will have, so that its length is learned, not told.
const OUTPUT_TOKENS_MAX: u32 = 8192;

/// Settings of the deciding half.
#[derive(Debug, Clone)]
pub struct GatewaySettings {
    /// Who chooses.
    pub rule: Rule,
    /// Of the cost.
    pub weights: Weights,
    /// How long prompts wait to share a step.
    pub gather: GatherSettings,
    /// When engines are kept for a phase.
    pub leanings: LeaningSettings,
    /// Which leg of a split sends the first token.
    pub first_token: FirstToken,
    /// How the load of ranks is known: of an engine in its own process, or of one elsewhere.
    pub sight: LoadSight,
    /// Whether placement has the engines' profile to begin with, or five rates.
    pub profiled: bool,
    /// First of the numbers that decide between equals.
    pub seed: u64,
}

impl GatewaySettings {
    /// A gateway as it is set up without settings, that knows every step of its engines and their profiles.
    pub fn new(rule: Rule, seed: u64) -> Self {
        Self {
            rule,
            weights: Weights::default(),
            gather: GatherSettings::default(),
            leanings: LeaningSettings::default(),
            first_token: FirstToken::Handed,
            sight: LoadSight::EveryStep,
            profiled: true,
            seed,
        }
    }
}

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// What a sticky router would hash.
    pub session_key: u64,
    /// Whose it is.
    pub tenant: &'a TenantId,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Of its full blocks.
    pub hashes: &'a [BlockHash],
    /// Ids of the leg that computes the prompt and of a decode leg; their reservations have the same.
    pub legs: [LegId; 2],
    /// Ranks that failed it.
    pub excluded: &'a [RankId],
}

/// Where a request runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placed {
    /// The ranks.
    pub plan: Plan,
    /// Seconds to the first token, as the placement expects them; a sticky router expects nothing.
    pub ttft_predicted: Option<f64>,
    /// Legs whose reservations are held: 1, or 2 of a split; a sticky router promises nothing.
    pub reservations: u32,
}

/// What becomes of an engine that lives on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Silent,
    Ready,
    Draining,
}

/// The deciding half of one gateway.
pub struct Gateway {
    settings: GatewaySettings,
    model: Arc<str>,
    /// What decides.
    pub(crate) router: Router,
    index: KvIndex,
    chains: SessionChains,
    root: BlockHash,
    /// Every rank, in order of ids.
    pub ranks: Vec<RankId>,
    known: Known,
    turn: u64,
    /// Numbers of the next batches of events, of ranks whose caches were told by hand.
    batches: BTreeMap<RankId, u64>,
}

impl Gateway {
    /// A gateway whose fleet are these engines, ready. They have one block size.
    pub fn new(settings: GatewaySettings, engines: &[EngineSpec]) -> Self {
        let mut gateway = Self::empty(settings, engines);
        for (number, engine) in engines.iter().enumerate() {
            gateway.join(Time::ZERO, engine, number, Incarnation(number as u64 + 1));
        }
        gateway
    }

    /// A gateway for these engines that knows of none yet.
    pub(crate) fn empty(settings: GatewaySettings, engines: &[EngineSpec]) -> Self {
        let block_size_tokens = engines.first().map_or(1, |engine| engine.kind.scheduler.block_size_tokens);
        let hasher = Self::hasher(block_size_tokens);
        let fleet_settings = FleetSettings { link_prior: LinkPrior::NVLINK, ..FleetSettings::default() };
        let router = RouterSettings {
            fleet: fleet_settings,
            gather: settings.gather,
            leaning: settings.leanings,
            block_size_tokens,
            journal_max: 0,
        };
        Self {
            router: Router::new(router),
            index: KvIndex::new(IndexLimits::default()),
            chains: SessionChains::new(hasher, ChainLimits::default()),
            root: hasher.root(MODEL, ""),
            ranks: Vec::new(),
            known: Known::default(),
            turn: settings.seed,
            batches: BTreeMap::new(),
            model: MODEL.into(),
            settings,
        }
    }

    /// The fleet's block hashes.
    pub fn hasher(block_size_tokens: u32) -> BlockHasher {
        BlockHasher::new(HashKey::GOLDEN, block_size_tokens)
    }

    /// Root of all chains.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Engine `number` is there and serves; an earlier life of it has ended.
    pub(crate) fn join(&mut self, now: Time, engine: &EngineSpec, number: usize, incarnation: Incarnation) {
        let facts = facts(engine, &self.model, number, incarnation, &self.settings);
        self.note(now, Event::Joined(facts));
        self.note(now, Event::Ready(incarnation));
        let ranks = (0..engine.dp_ranks).map(|dp_rank| RankId { incarnation, dp_rank });
        self.ranks.extend(ranks);
        self.ranks.sort_unstable();
    }

    /// A life of an engine has ended; `is_dead`: it is known to have died, and is not only unheard of.
    pub(crate) fn lost(&mut self, now: Time, incarnation: Incarnation, is_dead: bool) {
        self.note(now, Event::Lost(incarnation));
        self.index.remove_incarnation(incarnation);
        self.ranks.retain(|rank| rank.incarnation != incarnation);
        if is_dead {
            self.router.quarantine.died(now.duration(), incarnation);
        }
    }

    /// Whether this life of an engine is one of the fleet.
    pub(crate) fn knows(&self, incarnation: Incarnation) -> bool {
        self.ranks.iter().any(|rank| rank.incarnation == incarnation)
    }

    /// An engine missed a deadline, is heard of again, or is to finish what it has.
    pub(crate) fn turned(&mut self, now: Time, turn: Turn, incarnation: Incarnation) {
        self.note(
            now,
            match turn {
                Turn::Silent => Event::Silent(incarnation),
                Turn::Ready => Event::Ready(incarnation),
                Turn::Draining => Event::Draining(incarnation),
            },
        );
    }

    /// Hashes of a prompt's full blocks.
    pub fn hashes(&self, prompt: &[TokenId]) -> Arc<[BlockHash]> {
        let mut hashes = Vec::new();
        self.chains.chain_into(self.root, prompt, &mut hashes);
        hashes.into()
    }

    /// Whether a request that arrived is placed at once, or waits for others.
    pub fn admit(&mut self, now: Time, ask: &Ask<'_>) -> Admit {
        // As in the gateway: the policies that look at no seconds have nothing to weigh.
        if self.settings.rule.policy() != Some(Policy::Cost) {
            return Admit::Now;
        }
        let gathered = self.router.admit(now.duration(), &question(&self.model, ask));
        gathered.map_or(Admit::Now, |gathered| gathered.admit)
    }

    /// Places a request and promises its load to the ranks.
    ///
    /// # Errors
    /// If no rank takes it: as placement says it.
    pub fn place(&mut self, now: Time, ask: &Ask<'_>) -> Result<Placed, PlaceError> {
        let Some(policy) = self.settings.rule.policy() else { return self.stick(ask) };
        self.index.overlaps(ask.hashes, &mut self.known.announced);
        let turn = self.turn;
        self.turn += 1;
        let (question, weights) = (question(&self.model, ask), &self.settings.weights);
        let decision =
            self.router.place(now.duration(), &question, &mut self.known, policy, weights, turn)?;
        self.router.placed(now.duration(), &question, decision.cached_tokens);
        let promised = std::iter::once(decision.reservations.prefill).chain(decision.reservations.decode);
        let mut reservations = 0;
        for (leg, (rank, amount)) in ask.legs.into_iter().zip(promised) {
            self.note(now, Event::Reserved { id: ReservationId(leg.0), rank, amount });
            reservations += 1;
        }
        let ttft_predicted = Some(decision.predicted_ttft_seconds);
        Ok(Placed { plan: decision.plan, ttft_predicted, reservations })
    }

    /// The rank that the session names, by a hash of its key or as it is, among those that have not failed the request.
    fn stick(&self, ask: &Ask<'_>) -> Result<Placed, PlaceError> {
        let left = || self.ranks.iter().filter(|rank| !ask.excluded.contains(rank));
        let key = match self.settings.rule {
            Rule::Pinned => ask.session_key,
            _ => mix(ask.session_key),
        };
        let Some(nth) = key.checked_rem(left().count() as u64) else {
            return Err(PlaceError::NoModel { model: MODEL.to_owned(), known: Vec::new() });
        };
        let rank = *left().nth(nth as usize).expect("it is below their number");
        Ok(Placed { plan: Plan::Aggregated { rank }, ttft_predicted: None, reservations: 0 })
    }

    /// A leg got further.
    pub fn progress(&mut self, now: Time, leg: LegId, progress: Progress) {
        self.note(now, Event::Progress { id: ReservationId(leg.0), progress });
    }

    /// What was promised for a leg is not needed any more.
    pub fn release(&mut self, now: Time, leg: LegId) {
        self.note(now, Event::Released(ReservationId(leg.0)));
    }

    /// How a leg ended, for the breaker of its rank.
    pub(crate) fn ended(&mut self, now: Time, rank: RankId, health: Health) {
        self.note(
            now,
            match health {
                Health::Ok => Event::LegOk(rank),
                Health::Failed => Event::LegFailed(rank),
            },
        );
    }

    /// KV moved.
    pub fn transferred(&mut self, now: Time, from: RankId, to: RankId, bytes: u64, seconds: f64) {
        self.note(now, Event::Transferred { from, to, bytes, seconds });
    }

    /// A hand-over failed by the fault of its pair.
    pub(crate) fn transfer_failed(&mut self, now: Time, from: RankId, to: RankId) {
        self.note(now, Event::TransferFailed { from, to });
    }

    /// A rank's metrics were read.
    pub fn sample(&mut self, now: Time, rank: RankId, load: RankLoad) {
        self.note(now, Event::Load { rank, load, as_of: now.duration() });
    }

    /// A rank said how it was at `as_of`. Of one whose load is sampled, only its steps are news.
    pub(crate) fn report(&mut self, now: Time, as_of: Time, report: &Report) {
        let &Report { rank, load, step, kv: _ } = report;
        if self.settings.sight == LoadSight::EveryStep {
            self.note(now, Event::Load { rank, load, as_of: as_of.duration() });
        }
        if let Some(step) = step {
            self.observed(now, rank, step);
        }
    }

    /// A rank's step took so long.
    pub(crate) fn observed(&mut self, now: Time, rank: RankId, step: StepObservation) {
        self.note(now, Event::Step { rank, step });
    }

    /// A rank's cache changed.
    pub(crate) fn cache_changed(&self, batch: &KvEventBatch) -> Applied {
        self.index.apply(batch)
    }

    /// All that a rank caches, before its batch `sequence_next`.
    pub(crate) fn cache_told(&self, rank: RankId, sequence_next: u64, contents: Vec<KvEvent>) -> Applied {
        self.index.reset(rank, sequence_next, contents)
    }

    /// All that the index knows of a rank, as events that would make it.
    pub(crate) fn cache_of(&self, rank: RankId) -> Option<Vec<KvEvent>> {
        self.index.contents(rank)
    }

    /// The number of the next batch of a rank that the index expects; `None` if it waits to be told everything.
    pub(crate) fn cache_sequence(&self, rank: RankId) -> Option<u64> {
        self.index.rank(rank).filter(|stats| !stats.stale).map(|stats| stats.sequence_next)
    }

    /// What the index answered for the request that was placed last.
    pub(crate) fn overlaps(&self) -> &Overlaps {
        &self.known.announced
    }

    /// The rank as placement sees it.
    pub(crate) fn view(&mut self, now: Time, rank: RankId) -> Option<RankView> {
        self.router.snapshot(now.duration()).rank(rank).cloned()
    }

    /// A rank holds this prompt's blocks: the next batch of its events.
    pub fn cached(&mut self, rank: RankId, hashes: Vec<BlockHash>) {
        let stored = KvEvent::Stored { parent: None, hashes, tier: Tier::Device, group: 0 };
        let sequence = self.batches.entry(rank).or_default();
        let applied = self.index.apply(&KvEventBatch { rank, sequence: *sequence, events: vec![stored] });
        assert_eq!(applied, Applied::Ok, "its batches are in order");
        *sequence += 1;
    }

    /// Learns how long a tenant's answers are.
    pub fn learn_output(&mut self, tenant: &TenantId, tokens: u32) {
        self.router.learn_output(&self.model, tenant, f64::from(tokens), false);
    }

    /// What the engine of `rank` is kept for, as of the last placement.
    pub fn leaning(&mut self, now: Time, rank: RankId) -> Leaning {
        self.router.snapshot(now.duration()).rank(rank).map_or(Leaning::Neither, |rank| rank.leaning)
    }

    /// Reservations that are held; 0 when nothing runs.
    pub(crate) fn reservations(&self) -> usize {
        self.router.reservations()
    }

    fn note(&mut self, now: Time, event: Event) {
        self.router.note(now.duration(), event);
    }
}

fn question<'a>(model: &'a Arc<str>, ask: &Ask<'a>) -> Question<'a> {
    Question {
        model,
        tenant: ask.tenant,
        prompt_tokens: ask.prompt_tokens,
        unit: PromptUnit::Tokens,
        form: Form::Tokens,
        output_tokens_max: OUTPUT_TOKENS_MAX,
        choices: 1,
        excluded: ask.excluded,
        chain: ask.hashes,
    }
}

fn facts(
    engine: &EngineSpec,
    model: &Arc<str>,
    number: usize,
    incarnation: Incarnation,
    settings: &GatewaySettings,
) -> EngineFacts {
    let EngineSpec { kind, dp_ranks, role, gpus: _, startup: _ } = engine;
    let (dp_ranks, role) = (*dp_ranks, *role);
    let config = kind.scheduler;
    let hands_over = kind.hands_over();
    EngineFacts {
        engine: EngineName::from(format!("engine-{number}").as_str()),
        incarnation,
        model: model.clone(),
        role,
        dp_ranks,
        block_size_tokens: config.block_size_tokens,
        block_bytes: kind.block_bytes(),
        blocks_total: config.blocks_total,
        step_tokens_max: config.step_tokens_max,
        context_tokens_max: config.context_tokens_max,
        waiting_max: config.waiting_max,
        kv_layout: 1,
        can_export: hands_over,
        can_import: hands_over,
        needs_warming: false,
        first_token: settings.first_token,
        takes_tokens: true,
        takes_body: false,
        steps_together: dp_ranks > 1,
        profile: settings.profiled.then(|| kind.profile.clone()),
        load_sight: settings.sight,
        step_prior: prior(&kind.profile),
    }
}

/// What a probe at start-up would find: the five rates nearest to the profile.
fn prior(profile: &Profile) -> StepCoefficients {
    let prefill = |prefill_tokens, prefill_attention| {
        profile.step_seconds(&StepShape { prefill_tokens, prefill_attention, ..StepShape::default() })
    };
    let base = profile.decode_step_seconds(1, 0);
    StepCoefficients {
        base_seconds: base,
        per_prefill_token_seconds: (prefill(4096, 0.0) - base) / 4096.0,
        per_attention_seconds: (prefill(1024, 1e9) - prefill(1024, 0.0)) / 1e9,
        per_decode_seconds: (profile.decode_step_seconds(65, 0) - base) / 64.0,
        per_context_token_seconds: (profile.decode_step_seconds(1, 100_000) - base) / 1e5,
    }
}
