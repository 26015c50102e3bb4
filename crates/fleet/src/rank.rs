//! One rank: everything kept about it, and how that becomes its view in a snapshot.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use forebay_perf_model::RankModel;
use forebay_placement::{RankState, RankView, Reserved};
use forebay_types::{Leaning, RankId, RankLoad, ReservationId, StepObservation};

use crate::{
    breaker::Breaker,
    estimate::LoadEstimate,
    event::{EngineFacts, LoadSight},
    reservation::{OnRank, Reservation},
    settings::FleetSettings,
    share::PrefillShare,
    tail::Tail,
};

#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) id: RankId,
    facts: Arc<EngineFacts>,
    pub(crate) state: RankState,
    pub(crate) leaning: Leaning,
    pub(crate) breaker: Breaker,
    load: LoadEstimate,
    load_at: Duration,
    /// Sum of what its reservations hold that `load` does not show.
    pub(crate) reserved: Reserved,
    /// Reservations that the next load report may show more of or, where reports are samples, all of them.
    pub(crate) watched: BTreeSet<ReservationId>,
    prefill_share: PrefillShare,
    perf: Arc<RankModel>,
    /// Steps that decoded something.
    itl: Tail,
    /// Whether its view in the snapshot is out of date.
    pub(crate) dirty: bool,
}

impl Rank {
    pub(crate) fn new(id: RankId, facts: Arc<EngineFacts>, now: Duration, settings: &FleetSettings) -> Self {
        let blocks = facts.blocks_total;
        Self {
            id,
            state: RankState::Starting,
            leaning: Leaning::Neither,
            breaker: Breaker::new(&settings.breaker),
            load: LoadEstimate::new(RankLoad {
                blocks_total: blocks,
                blocks_free: blocks,
                ..RankLoad::default()
            }),
            load_at: now,
            reserved: Reserved::default(),
            watched: BTreeSet::new(),
            prefill_share: PrefillShare::default(),
            perf: Arc::new(match &facts.profile {
                Some(profile) => RankModel::profiled(profile.clone(), facts.step_tokens_max),
                None => RankModel::learned(facts.step_prior),
            }),
            itl: Tail::default(),
            dirty: false,
            facts,
        }
    }

    pub(crate) fn sight(&self) -> LoadSight {
        self.facts.load_sight
    }

    /// A load report as of `as_of`, and the legs that are promised or on the rank by now, of those that are watched.
    pub(crate) fn report<'a>(
        &mut self,
        load: RankLoad,
        as_of: Duration,
        legs: impl Iterator<Item = &'a Reservation>,
    ) {
        self.load_at = self.load_at.max(as_of);
        match self.sight() {
            LoadSight::EveryStep => self.load = LoadEstimate::new(load),
            LoadSight::Sampled => self.load.report(load, legs.filter(|leg| leg.is_shown(as_of))),
        }
    }

    /// A load that is said with every step is believed until the next.
    fn load_now(&self, now: Duration) -> RankLoad {
        self.load.now(match self.sight() {
            LoadSight::EveryStep => Duration::ZERO,
            LoadSight::Sampled => now.saturating_sub(self.load_at),
        })
    }

    fn others(&self) -> u32 {
        match self.sight() {
            LoadSight::EveryStep => 0,
            LoadSight::Sampled => self.load.others(),
        }
    }

    /// A leg of this process on it changed, from nothing or to nothing included.
    pub(crate) fn leg_changed(&mut self, before: (Reserved, OnRank), after: (Reserved, OnRank)) {
        self.reserved -= before.0;
        self.reserved += after.0;
        self.load.changed(before.1, after.1);
    }

    /// Learns from a step. Its prefill is what it took beyond a step of the same decodes alone, by what was known
    /// before it.
    pub(crate) fn observe(&mut self, now: Duration, step: &StepObservation, settings: &FleetSettings) {
        if !step.seconds.is_finite() || step.seconds < 0.0 {
            return;
        }
        if step.prefill_tokens > 0 {
            let decodes_alone = self.perf.decode_step_seconds(step.decodes, step.context_tokens);
            let on_prefill = (step.seconds - decodes_alone).clamp(0.0, step.seconds);
            self.prefill_share.observe(now, on_prefill, settings.prefill_share_half_life);
        }
        if step.decodes > 0 {
            self.itl.observe(step.seconds);
        }
        // A step of a group is as long as its fullest rank makes it, so one rank's part of it teaches nothing.
        if !self.facts.steps_together || self.facts.profile.is_none() {
            Arc::make_mut(&mut self.perf).observe(step);
        }
    }

    /// A view from nothing.
    pub(crate) fn view(&self, now: Duration, settings: &FleetSettings) -> RankView {
        let facts = &self.facts;
        RankView {
            id: self.id,
            engine: facts.engine.clone(),
            model: facts.model.clone(),
            role: facts.role,
            leaning: self.leaning,
            state: self.state,
            breaker: self.breaker.view(now),
            load: self.load_now(now),
            load_age: now.saturating_sub(self.load_at),
            others: self.others(),
            reserved: self.reserved,
            prefill_share: self.prefill_share.at(now, settings.prefill_share_half_life),
            perf: self.perf.clone(),
            steps_together: facts.steps_together,
            block_size_tokens: facts.block_size_tokens,
            block_bytes: facts.block_bytes,
            step_tokens_max: facts.step_tokens_max,
            context_tokens_max: facts.context_tokens_max,
            waiting_max: facts.waiting_max,
            kv_layout: facts.kv_layout,
            can_export: facts.can_export,
            can_import: facts.can_import,
            needs_warming: facts.needs_warming,
            first_token: facts.first_token,
            takes_tokens: facts.takes_tokens,
            takes_body: facts.takes_body,
            itl_p99_seconds: self.itl.p99_seconds(),
        }
    }

    /// From now on it is given no tokens; whether that is new.
    pub(crate) fn take_text_alone(&mut self) -> bool {
        self.facts.takes_tokens && {
            Arc::make_mut(&mut self.facts).takes_tokens = false;
            true
        }
    }

    pub(crate) fn needs_warming(&self) -> bool {
        self.facts.needs_warming
    }

    /// Whether KV that it computes could continue on `decode`, by what both are.
    pub(crate) fn may_hand_over_to(&self, decode: &Rank) -> bool {
        let (own, other) = (&self.facts, &decode.facts);
        self.id.incarnation != decode.id.incarnation
            && own.model == other.model
            && own.can_export
            && own.role.prefills()
            && other.can_import
            && other.role.decodes()
            && own.kv_layout == other.kv_layout
            && own.block_size_tokens == other.block_size_tokens
    }

    /// Brings everything up to date in `view` that events change.
    pub(crate) fn update(&self, view: &mut RankView, now: Duration, settings: &FleetSettings) {
        view.state = self.state;
        view.leaning = self.leaning;
        view.others = self.others();
        view.itl_p99_seconds = self.itl.p99_seconds();
        view.reserved = self.reserved;
        if !Arc::ptr_eq(&view.perf, &self.perf) {
            view.perf = self.perf.clone();
        }
        self.age(view, now, settings);
    }

    /// Brings everything up to date in `view` that time alone changes.
    pub(crate) fn age(&self, view: &mut RankView, now: Duration, settings: &FleetSettings) {
        view.breaker = self.breaker.view(now);
        view.load = self.load_now(now);
        view.load_age = now.saturating_sub(self.load_at);
        view.prefill_share = self.prefill_share.at(now, settings.prefill_share_half_life);
    }
}
