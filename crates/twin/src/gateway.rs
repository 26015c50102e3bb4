//! The deciding half of the gateway: fleet, index, chains, placement, wired as the orchestrator of `forebay-gateway`
//! wires them, without its sockets and locks.
//!
//! In: requests to place, progress of legs, reports of ranks. Out: a place for each request. Nothing here models
//! anything; whatever decides is the crate that decides in production.

use std::{collections::BTreeMap, sync::Arc};

use forebay_admission::{Admit, GatherSettings, Gatherer};
use forebay_fleet::{EngineFacts, Event, Fleet, FleetSettings, LoadSight, Progress};
use forebay_kv_hash::{BlockHasher, ChainLimits, HashKey, SessionChains};
use forebay_kv_index::{Applied, IndexLimits, KvIndex, Overlaps};
use forebay_perf_model::{LinkPrior, Profile, StepCoefficients, StepShape};
use forebay_placement::{Form, Policy, Request, Weights, beginning, place, sharing};
use forebay_planner::{Around, LeaningSettings, Leanings, Peer};
use forebay_types::{
    BlockHash, EngineName, FirstToken, Incarnation, KvEvent, KvEventBatch, Leaning, LegId, RankId, RankLoad,
    ReservationId, Tier, TokenId,
};

use crate::{
    clock::Time,
    draw::mix,
    engine::{EngineSpec, Report},
    rule::Rule,
};

/// The model's name; every engine serves it.
pub(crate) const MODEL: &str = "model";
/// Output expected of an answer before any has ended, and the weight of the newest in the running mean: the gateway's.
const OUTPUT_TOKENS_PRIOR: f64 = 64.0;
const OUTPUT_NEWEST_WEIGHT: f64 = 0.02;
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
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Of its full blocks.
    pub hashes: &'a [BlockHash],
    /// Ids of the leg that computes the prompt and of a decode leg; their reservations have the same.
    pub legs: [LegId; 2],
}

/// Where a request runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placed {
    /// Computes the prompt.
    pub prefill: RankId,
    /// The same rank: both phases there.
    pub decode: RankId,
    /// Seconds to the first token, as the placement expects them; a sticky router expects nothing.
    pub ttft_predicted: Option<f64>,
}

impl Placed {
    /// Whether another rank continues it.
    pub fn is_split(&self) -> bool {
        self.prefill != self.decode
    }
}

/// The deciding half of one gateway.
pub struct Gateway {
    settings: GatewaySettings,
    fleet: Fleet,
    gatherer: Gatherer,
    leanings: Leanings,
    index: KvIndex,
    chains: SessionChains,
    root: BlockHash,
    block_size_tokens: u32,
    /// Every rank, in order of ids.
    pub ranks: Vec<RankId>,
    overlaps: Overlaps,
    turn: u64,
    output_tokens: f64,
    /// Numbers of the next batches of events, of ranks whose caches were told by hand.
    batches: BTreeMap<RankId, u64>,
    /// Batches of events that the index could not take.
    pub batches_refused: u64,
}

impl Gateway {
    /// A gateway whose fleet are these engines, ready. They have one block size.
    pub fn new(settings: GatewaySettings, engines: &[EngineSpec]) -> Self {
        let block_size_tokens = engines.first().map_or(1, |engine| engine.kind.scheduler.block_size_tokens);
        let hasher = Self::hasher(block_size_tokens);
        let fleet_settings = FleetSettings { link_prior: LinkPrior::NVLINK, ..FleetSettings::default() };
        let mut gateway = Self {
            fleet: Fleet::new(fleet_settings),
            gatherer: Gatherer::new(settings.gather),
            leanings: Leanings::new(settings.leanings),
            index: KvIndex::new(IndexLimits::default()),
            chains: SessionChains::new(hasher, ChainLimits::default()),
            root: hasher.root(MODEL, ""),
            block_size_tokens,
            ranks: Vec::new(),
            overlaps: Overlaps::default(),
            turn: settings.seed,
            output_tokens: OUTPUT_TOKENS_PRIOR,
            batches: BTreeMap::new(),
            batches_refused: 0,
            settings,
        };
        let model: Arc<str> = MODEL.into();
        for (number, engine) in engines.iter().enumerate() {
            gateway.join(facts(engine, &model, number, &gateway.settings));
        }
        gateway
    }

    /// The fleet's block hashes.
    pub fn hasher(block_size_tokens: u32) -> BlockHasher {
        BlockHasher::new(HashKey::GOLDEN, block_size_tokens)
    }

    /// Root of all chains.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    fn join(&mut self, facts: EngineFacts) {
        let (incarnation, dp_ranks) = (facts.incarnation, facts.dp_ranks);
        self.fleet.apply(Time::ZERO.duration(), Event::Joined(facts));
        self.fleet.apply(Time::ZERO.duration(), Event::Ready(incarnation));
        self.ranks.extend((0..dp_ranks).map(|dp_rank| RankId { incarnation, dp_rank }));
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
        let snapshot = self.fleet.snapshot(now.duration());
        let request = self.request(ask);
        let sharing = sharing(&snapshot, &request);
        self.gatherer.arrive(now.duration(), ask.prompt_tokens, sharing.as_ref())
    }

    fn request<'a>(&'a self, ask: &Ask<'a>) -> Request<'a> {
        Request {
            model: MODEL,
            prompt_tokens: ask.prompt_tokens,
            overlaps: self.overlaps.as_slice(),
            overlap_block_tokens: self.block_size_tokens,
            form: Form::Tokens,
            output_tokens_expected: self.output_tokens.ceil() as u32,
            output_tokens_max: OUTPUT_TOKENS_MAX,
            choices: 1,
            excluded: &[],
            beginning: beginning(ask.hashes, self.block_size_tokens),
        }
    }

    /// Places a request and promises its load to the ranks; `None` if no rank takes it.
    pub fn place(&mut self, now: Time, ask: &Ask<'_>) -> Option<Placed> {
        let Some(policy) = self.settings.rule.policy() else {
            let rank = self.ranks[(mix(ask.session_key) % self.ranks.len() as u64) as usize];
            return Some(Placed { prefill: rank, decode: rank, ttft_predicted: None });
        };
        self.index.overlaps(ask.hashes, &mut self.overlaps);
        let turn = self.turn;
        self.turn += 1;
        let mut snapshot = self.fleet.snapshot(now.duration());
        if policy == Policy::Cost && self.leanings.is_due(now.duration()) {
            let peers = Peer::of(&snapshot, MODEL, self.leanings.prompt());
            let around = Around::of(&snapshot, MODEL);
            for (incarnation, leaning) in self.leanings.review(now.duration(), &peers, &around) {
                self.fleet.apply(now.duration(), Event::Leans(incarnation, leaning));
            }
            snapshot = self.fleet.snapshot(now.duration());
        }
        let request = self.request(ask);
        let decision = place(&snapshot, &request, policy, &self.settings.weights, turn).ok()?;
        drop(snapshot);
        let new_tokens = ask.prompt_tokens.saturating_sub(decision.cached_tokens);
        self.leanings.placed(
            now.duration(),
            new_tokens,
            decision.cached_tokens,
            self.output_tokens.ceil() as u32,
        );
        let reservations = decision.reservations;
        let promised = std::iter::once(reservations.prefill).chain(reservations.decode);
        for (leg, (rank, amount)) in ask.legs.into_iter().zip(promised) {
            self.note(now, Event::Reserved { id: ReservationId(leg.0), rank, amount });
        }
        let (prefill, decode) = (decision.plan.prefill_rank(), decision.plan.decode_rank());
        Some(Placed { prefill, decode, ttft_predicted: Some(decision.predicted_ttft_seconds) })
    }

    /// A leg got further.
    pub fn progress(&mut self, now: Time, leg: LegId, progress: Progress) {
        self.note(now, Event::Progress { id: ReservationId(leg.0), progress });
    }

    /// A leg ended as it should.
    pub fn ended(&mut self, now: Time, leg: LegId, rank: RankId) {
        self.note(now, Event::Released(ReservationId(leg.0)));
        self.note(now, Event::LegOk(rank));
    }

    /// KV moved.
    pub fn transferred(&mut self, now: Time, from: RankId, to: RankId, bytes: u64, seconds: f64) {
        self.note(now, Event::Transferred { from, to, bytes, seconds });
    }

    /// A rank's metrics were read.
    pub fn sample(&mut self, now: Time, rank: RankId, load: RankLoad) {
        self.note(now, Event::Load { rank, load, as_of: now.duration() });
    }

    /// A rank said how it was at `as_of`. Of one whose load is sampled, only its steps and its cache are news.
    pub fn report(&mut self, now: Time, as_of: Time, report: Report) {
        let Report { rank, load, step, kv } = report;
        if let Some(batch) = kv
            && self.index.apply(&batch) != Applied::Ok
        {
            self.batches_refused += 1;
        }
        if self.settings.sight == LoadSight::EveryStep {
            self.note(now, Event::Load { rank, load, as_of: as_of.duration() });
        }
        if let Some(step) = step {
            self.note(now, Event::Step { rank, step });
        }
    }

    /// A rank holds this prompt's blocks: the next batch of its events.
    pub fn cached(&mut self, rank: RankId, hashes: Vec<BlockHash>) {
        let stored = KvEvent::Stored { parent: None, hashes, tier: Tier::Device, group: 0 };
        let sequence = self.batches.entry(rank).or_default();
        let applied = self.index.apply(&KvEventBatch { rank, sequence: *sequence, events: vec![stored] });
        assert_eq!(applied, Applied::Ok, "its batches are in order");
        *sequence += 1;
    }

    /// Learns how long answers are.
    pub fn learn_output(&mut self, tokens: u32) {
        self.output_tokens += OUTPUT_NEWEST_WEIGHT * (f64::from(tokens) - self.output_tokens);
    }

    /// What the engine of `rank` is kept for, as of the last placement.
    pub fn leaning(&mut self, now: Time, rank: RankId) -> Leaning {
        self.fleet.snapshot(now.duration()).rank(rank).map_or(Leaning::Neither, |rank| rank.leaning)
    }

    /// Reservations that are held; 0 when nothing runs.
    #[cfg(test)]
    pub fn reservations(&self) -> usize {
        self.fleet.reservations()
    }

    fn note(&mut self, now: Time, event: Event) {
        self.fleet.apply(now.duration(), event);
    }
}

fn facts(engine: &EngineSpec, model: &Arc<str>, number: usize, settings: &GatewaySettings) -> EngineFacts {
    let EngineSpec { kind, dp_ranks, role, gpus: _ } = engine;
    let (dp_ranks, role) = (*dp_ranks, *role);
    let config = kind.scheduler;
    let hands_over = kind.hands_over();
    EngineFacts {
        engine: EngineName::from(format!("engine-{number}").as_str()),
        incarnation: Incarnation(number as u64 + 1),
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
