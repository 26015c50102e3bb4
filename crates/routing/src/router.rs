//! The cores that decide, wired. Start at [`Router::place`].

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use forebay_admission::{Admit, GatherSettings, Gatherer};
use forebay_fleet::{Applied, Event, Fleet, FleetSettings};
use forebay_kv_index::{RoutedCache, RoutedLimits};
use forebay_lifecycle::{Quarantine, QuarantineLimits};
use forebay_perf_model::OutputLengths;
use forebay_placement::{
    Decision, PlaceError, Policy, Request, Snapshot, Weights, beginning, place, sharing,
};
use forebay_planner::{Around, LeaningSettings, Leanings, Peer};
use forebay_types::{BlockHash, Incarnation, KvEventBatch, RankId, TenantId};

use crate::{
    journal::{Journal, Told},
    question::{Known, PromptUnit, Question},
};

/// Tenants whose answers' lengths are remembered, of all models together.
const TENANTS_MAX: usize = 4096;

/// Settings of a [`Router`].
#[derive(Debug, Clone, Copy)]
pub struct RouterSettings {
    /// Breakers, reservations, links.
    pub fleet: FleetSettings,
    /// How long prompts wait to share a step.
    pub gather: GatherSettings,
    /// When engines are kept for a phase.
    pub leaning: LeaningSettings,
    /// Tokens of the fleet's blocks.
    pub block_size_tokens: u32,
    /// Words that the journal keeps; 0: there is none.
    pub journal_max: usize,
}

/// When a request that arrived is to be placed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gathered {
    /// With whom.
    pub admit: Admit,
    /// From leaving until it reaches its engine, seconds.
    pub way_seconds: f64,
}

/// Fleet, what is learned of answers, and what was routed to whom.
#[derive(Debug)]
pub struct Router {
    fleet: Fleet,
    gather: GatherSettings,
    /// By model. Bounded: only served models get here.
    gatherers: BTreeMap<Arc<str>, Gatherer>,
    leaning: LeaningSettings,
    /// By model, likewise.
    leanings: BTreeMap<Arc<str>, Leanings>,
    routed_caches: HashMap<RankId, Routed>,
    /// Requests that engines died of.
    pub quarantine: Quarantine,
    block_size_tokens: u32,
    output_lengths: OutputLengths,
    journal: Journal,
}

/// What was routed to one rank.
#[derive(Debug)]
struct Routed {
    cache: RoutedCache,
    sequence: u64,
    /// The rank announces nothing, so token prompts are followed here too.
    instead_of_events: bool,
}

impl Router {
    /// One that knows no engine.
    pub fn new(settings: RouterSettings) -> Self {
        Self {
            fleet: Fleet::new(settings.fleet),
            gather: settings.gather,
            gatherers: BTreeMap::new(),
            leaning: settings.leaning,
            leanings: BTreeMap::new(),
            routed_caches: HashMap::new(),
            quarantine: Quarantine::new(QuarantineLimits::default()),
            block_size_tokens: settings.block_size_tokens,
            output_lengths: OutputLengths::new(TENANTS_MAX),
            journal: Journal::new(settings),
        }
    }

    /// Takes in what happened.
    pub fn note(&mut self, now: Duration, event: Event) -> Applied {
        self.journal.keep(|| Told::Note { now, event: event.clone() });
        self.fleet.apply(now, event)
    }

    /// The fleet as of `now`.
    pub fn snapshot(&mut self, now: Duration) -> Arc<Snapshot> {
        self.journal.keep(|| Told::Look { now });
        self.fleet.snapshot(now)
    }

    /// Reservations that are held. 0 when no request runs, or one leaked.
    pub fn reservations(&self) -> usize {
        self.fleet.reservations()
    }

    /// Pairs that are to be warmed before they carry requests, `max` at most.
    pub fn cold_pairs(&self, max: usize) -> Vec<(RankId, RankId)> {
        self.fleet.cold_pairs(max)
    }

    /// Where a request goes. `known`: what is cached of it; what stands for announcements is put in. Equal calls between equal
    /// words give equal answers; `seed` decides between equals.
    ///
    /// # Errors
    /// If no rank can take it: why.
    pub fn place(
        &mut self,
        now: Duration,
        question: &Question<'_>,
        known: &mut Known,
        policy: Policy,
        weights: &Weights,
        seed: u64,
    ) -> Result<Decision, PlaceError> {
        let kept = self.journal.is_kept().then(|| known.clone());
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
        let answer = place(&self.fleet.snapshot(now), &request, policy, weights, seed);
        if let Some(known) = kept {
            self.journal.keep(|| Told::ask(now, question, known, policy, weights, seed, &answer));
        }
        answer
    }

    /// A request runs as it was placed: what it adds to the prompts that engines lean by.
    pub fn placed(&mut self, now: Duration, question: &Question<'_>, cached_tokens: u32) {
        self.journal.keep(|| Told::placed(now, question, cached_tokens));
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

    /// A request arrived: whether it is to wait for others to share a step with. `None`: there is nothing to share.
    pub fn admit(&mut self, now: Duration, question: &Question<'_>) -> Option<Gathered> {
        let snapshot = self.snapshot(now);
        let sharing = sharing(&snapshot, &self.request(question))?;
        drop(snapshot);
        let gather = self.gather;
        let gatherer = self.gatherers.entry(question.model.clone()).or_insert_with(|| Gatherer::new(gather));
        let admit = gatherer.arrive(now, question.prompt_tokens, Some(&sharing));
        self.journal.keep(|| Told::admit(now, question, admit));
        Some(Gathered { admit, way_seconds: sharing.way_seconds })
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
    pub fn guess_cache(&mut self, rank: RankId, blocks_total: u32, instead_of_events: bool) {
        self.journal.keep(|| Told::Guess { rank, blocks_total, instead_of_events });
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
    }

    /// A request with this chain runs on `rank`: what that changes in the index of what was routed.
    pub fn note_routed(
        &mut self,
        now: Duration,
        rank: RankId,
        unit: PromptUnit,
        chain: &[BlockHash],
    ) -> Option<KvEventBatch> {
        let routed = self.routed_caches.get_mut(&rank)?;
        if unit == PromptUnit::Tokens && !routed.instead_of_events {
            return None;
        }
        let events = routed.cache.note(now, chain);
        (!events.is_empty()).then(|| {
            let sequence = routed.sequence;
            routed.sequence += 1;
            KvEventBatch { rank, sequence, events }
        })
    }

    /// Forgets what was routed there.
    pub fn forget(&mut self, incarnation: Incarnation) {
        self.journal.keep(|| Told::Forget { incarnation });
        self.routed_caches.retain(|rank, _| rank.incarnation != incarnation);
    }

    /// Learns how long the answers of a tenant are. `cut_off`: this one met its own limit.
    pub fn learn_output(
        &mut self,
        model: &Arc<str>,
        tenant: &TenantId,
        tokens_per_choice: f64,
        cut_off: bool,
    ) {
        self.journal.keep(|| Told::Answer {
            model: model.clone(),
            tenant: tenant.clone(),
            tokens: tokens_per_choice,
            cut_off,
        });
        self.output_lengths.learn(model, tenant, tokens_per_choice, cut_off);
    }

    /// What it was told and answered so far; from now on it keeps nothing.
    pub fn take_journal(&mut self) -> Journal {
        self.journal.take()
    }
}
