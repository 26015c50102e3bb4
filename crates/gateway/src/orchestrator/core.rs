//! The cores that decide, behind one lock that is held for microseconds: at a placement, at the turns of a leg and once
//! in some tens of tokens, never per token.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use forebay_fleet::{Event, Fleet};
use forebay_kv_index::{RoutedCache, RoutedLimits};
use forebay_lifecycle::{Quarantine, QuarantineLimits};
use forebay_perf_model::OutputLengths;
use forebay_placement::{Decision, Form, PlaceError, Policy, Request, Weights, beginning, place, sharing};
use forebay_planner::{Around, LeaningSettings, Leanings, Peer};
use forebay_types::{BlockHash, Incarnation, KvEventBatch, RankId, TenantId};
use tokio::time::Instant;

use super::{
    OrchestratorSettings,
    api::{GenerateRequest, PromptUnit},
    caches::{Caches, Known},
    gather::{Departure, Gathering},
};

/// Tenants whose answers' lengths are remembered, of all models together.
const TENANTS_MAX: usize = 4096;

/// Fleet, index and what is learned of output lengths.
pub(super) struct Core {
    pub(super) fleet: Fleet,
    gathering: Gathering,
    leaning: LeaningSettings,
    /// By model. Bounded: only served models get here.
    leanings: BTreeMap<Arc<str>, Leanings>,
    caches: Arc<Caches>,
    routed_caches: HashMap<RankId, Routed>,
    pub(super) quarantine: Quarantine,
    block_size_tokens: u32,
    output_lengths: OutputLengths,
}

/// What was routed to one rank.
struct Routed {
    cache: RoutedCache,
    sequence: u64,
    /// The rank announces nothing, so token prompts are followed here too.
    instead_of_events: bool,
}

/// What a placement is asked.
pub(super) struct Question<'a> {
    pub(super) model: &'a Arc<str>,
    pub(super) tenant: &'a TenantId,
    pub(super) prompt_tokens: u32,
    pub(super) unit: PromptUnit,
    pub(super) form: Form,
    pub(super) output_tokens_max: u32,
    pub(super) choices: u32,
    pub(super) excluded: &'a [RankId],
    /// Its blocks.
    pub(super) chain: &'a [BlockHash],
}

impl Core {
    pub(super) fn new(settings: &OrchestratorSettings, caches: Arc<Caches>, block_size_tokens: u32) -> Self {
        Self {
            fleet: Fleet::new(settings.fleet),
            gathering: Gathering::new(settings.gather),
            leaning: settings.leaning,
            leanings: BTreeMap::new(),
            caches,
            routed_caches: HashMap::new(),
            quarantine: Quarantine::new(QuarantineLimits::default()),
            block_size_tokens,
            output_lengths: OutputLengths::new(TENANTS_MAX),
        }
    }

    /// Applies an event of which nothing more needs to be done.
    pub(super) fn note(&mut self, now: Duration, event: Event) {
        self.fleet.apply(now, event);
    }

    pub(super) fn place(
        &mut self,
        now: Duration,
        question: &Question<'_>,
        known: &mut Known,
        policy: Policy,
        weights: &Weights,
        seed: u64,
    ) -> Result<Decision, PlaceError> {
        let overlaps = match question.unit {
            PromptUnit::Text => &known.routed,
            PromptUnit::Tokens => {
                let caches = &self.routed_caches;
                let guessed = |rank: &RankId| caches.get(rank).is_some_and(|routed| routed.instead_of_events);
                known.announced.extend(known.routed.iter().filter(|(rank, _)| guessed(rank)));
                &known.announced
            }
        };
        if policy == Policy::Cost {
            self.review_leanings(now, question.model);
        }
        let request = Request { overlaps: overlaps.as_slice(), ..self.request(question) };
        place(&self.fleet.snapshot(now), &request, policy, weights, seed)
    }

    /// A request runs as it was placed: what it adds to the prompts that engines lean by.
    pub(super) fn note_placed(&mut self, now: Duration, question: &Question<'_>, cached_tokens: u32) {
        let request = self.request(question);
        let output_tokens = request.output_tokens_expected.min(request.output_tokens_max);
        if let Some(leanings) = self.leanings.get_mut(question.model) {
            let new_tokens = question.prompt_tokens.saturating_sub(cached_tokens);
            leanings.placed(now, new_tokens, cached_tokens, output_tokens);
        }
    }

    /// Now and then: which engines of the model are kept for which phase.
    fn review_leanings(&mut self, now: Duration, model: &Arc<str>) {
        let Some(leanings) = self.leanings.get_mut(model) else {
            // Whatever a client asks for gets here; only what is served is kept.
            if self.fleet.snapshot(now).ranks().iter().any(|rank| rank.model == *model) {
                self.leanings.insert(model.clone(), Leanings::new(self.leaning));
            }
            return;
        };
        if !leanings.is_due(now) {
            return;
        }
        let snapshot = self.fleet.snapshot(now);
        let peers = Peer::of(&snapshot, model, leanings.prompt());
        let around = Around::of(&snapshot, model);
        drop(snapshot);
        for (incarnation, leaning) in leanings.review(now, &peers, &around) {
            self.fleet.apply(now, Event::Leans(incarnation, leaning));
        }
    }

    /// A request arrived (times are since `origin`): until when it waits for others to share a step with, if it does.
    pub(super) fn gather(
        &mut self,
        origin: Instant,
        now: Duration,
        question: &Question<'_>,
    ) -> Option<Departure> {
        let snapshot = self.fleet.snapshot(now);
        let sharing = sharing(&snapshot, &self.request(question))?;
        self.gathering.arrive(origin, now, question.model, question.prompt_tokens, &sharing)
    }

    /// What placement knows of a request, but for what is cached of it.
    fn request<'a>(&self, question: &Question<'a>) -> Request<'a> {
        let expected = self.output_lengths.expected(question.model, question.tenant);
        Request {
            model: question.model,
            prompt_tokens: question.prompt_tokens,
            overlaps: &[],
            overlap_block_tokens: self.block_size_tokens,
            form: question.form,
            output_tokens_expected: expected.ceil() as u32,
            output_tokens_max: question.output_tokens_max,
            choices: question.choices,
            excluded: question.excluded,
            beginning: beginning(question.chain, self.block_size_tokens),
        }
    }

    /// From now on the rank's cache is, or is not, guessed from what is routed there. `blocks_total` 0: unknown.
    pub(super) fn guess_cache(&mut self, rank: RankId, blocks_total: u32, instead_of_events: bool) {
        let limits = match blocks_total as usize {
            0 => RoutedLimits::default(),
            blocks_max => RoutedLimits { blocks_max, ..RoutedLimits::default() },
        };
        let routed = self.routed_caches.entry(rank).or_insert_with(|| Routed {
            cache: RoutedCache::new(limits),
            sequence: 0,
            instead_of_events,
        });
        routed.instead_of_events = instead_of_events;
        if instead_of_events {
            self.caches.index.remove_rank(rank);
        }
    }

    /// A request with this chain runs on `rank`.
    pub(super) fn note_routed(&mut self, now: Duration, rank: RankId, unit: PromptUnit, chain: &[BlockHash]) {
        let Some(routed) = self.routed_caches.get_mut(&rank) else { return };
        if unit == PromptUnit::Tokens && !routed.instead_of_events {
            return;
        }
        let events = routed.cache.note(now, chain);
        if !events.is_empty() {
            let batch = KvEventBatch { rank, sequence: routed.sequence, events };
            routed.sequence += 1;
            let _ = self.caches.routed.apply(&batch); // numbered here: only a full index refuses, and then it claims less
        }
    }

    /// Forgets what was cached there.
    pub(super) fn forget(&mut self, incarnation: Incarnation) {
        self.caches.forget(incarnation);
        self.routed_caches.retain(|rank, _| rank.incarnation != incarnation);
    }

    /// Learns how long the answers of a tenant are.
    pub(super) fn learn_output(&mut self, request: &GenerateRequest, tokens_per_choice: f64, cut_off: bool) {
        self.output_lengths.learn(&request.model, &request.tenant, tokens_per_choice, cut_off);
    }
}
