//! Where a request runs: asked at once, or after it has waited for others to share a step with.

use std::{
    sync::{Arc, atomic::Ordering},
    task::Context,
    time::Duration,
};

use forebay_engines::{Driver, Prompt};
use forebay_fleet::Event as FleetEvent;
use forebay_lifecycle::{Event, PlacementId, Purpose, Terms, Unplaced};
use forebay_placement::{Decision, Form as PlacedForm, PlaceError, Plan, Policy, Snapshot};
use forebay_routing::{Known, Question};
use forebay_types::RankId;
use tokio::time::Instant;

use super::{Live, RequestRun};
use crate::{
    metrics::{DecisionKind, DecisionLabels},
    orchestrator::{Shared, api::GenerateRequest, gather::Departure},
};

/// A request that waits for others.
pub(super) struct Waits {
    placement: PlacementId,
    purpose: Purpose,
    until: Departure,
}

impl RequestRun {
    /// Places it, or lets it wait for others to share a step with.
    pub(super) fn place(&mut self, placement: PlacementId, purpose: Purpose, excluded: &[RankId]) {
        let Some(live) = &mut self.live else { return };
        let shared = &self.shared;
        if live.is_new() && purpose == Purpose::Prompt && *shared.policy.read() == Policy::Cost {
            let question = question(&self.request, &self.prompt, self.request.choices, 0, excluded);
            let (origin, now) = (Instant::from_std(shared.origin), shared.now());
            // Taken first and kept: who completes a batch must find all who were admitted to it before.
            let mut gathering = shared.gathering.lock();
            let gathered = shared.core.lock().admit(now, &question);
            let depart = |gathered| gathering.depart(origin, &self.request.model, gathered);
            if let Some(until) = gathered.and_then(depart) {
                live.waits = Some(Waits { placement, purpose, until });
                return;
            }
        }
        self.place_now(placement, purpose, excluded);
    }

    /// Places it if it has waited long enough; whether it did.
    pub(super) fn waited(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(live) = &mut self.live else { return false };
        let Some(mut waits) = live.waits.take() else { return false };
        if waits.until.as_mut().poll(cx).is_pending() {
            live.waits = Some(waits);
            return false;
        }
        self.shared.metrics.gathered.observe(self.age());
        self.place_now(waits.placement, waits.purpose, &[]);
        true
    }

    fn place_now(&mut self, placement: PlacementId, purpose: Purpose, excluded: &[RankId]) {
        let Some(live) = &self.live else { return };
        let shared = self.shared.clone();
        let prompt = self.prompt_for(live, purpose);
        let (choices, generated_tokens) = match purpose {
            Purpose::Prompt => (self.request.choices, 0),
            Purpose::Continue { generated_tokens, .. } => (1, generated_tokens),
        };
        let question = question(&self.request, &prompt, choices, generated_tokens, excluded);
        let turn = shared.next_turn.fetch_add(1, Ordering::Relaxed);
        let policy = *shared.policy.read();
        let (asked, age) = (shared.now(), self.age());
        let mut known = Known::default();
        shared.caches.look_up(question.unit, &prompt.hashes, &mut known);
        let mut core = shared.core.lock();
        let answer = core.place(asked, &question, &mut known, policy, &shared.settings.weights, turn);
        let kind = match &answer {
            Ok(Decision { plan: Plan::Aggregated { .. }, .. }) => DecisionKind::Aggregated,
            Ok(Decision { plan: Plan::Split { .. }, .. }) => DecisionKind::Split,
            Err(_) => DecisionKind::None,
        };
        let labels = DecisionLabels { policy: policy.name(), kind };
        shared.metrics.decisions.get_or_create(&labels).inc();
        let Some(live) = &mut self.live else { return };
        match answer {
            Ok(Decision { plan, reservations, explanation, cached_tokens, .. }) => {
                core.placed(asked, &question, cached_tokens);
                let legs = [shared.leg_id(), shared.leg_id()];
                let promised = std::iter::once(reservations.prefill).chain(reservations.decode);
                for (leg, (rank, amount)) in legs.into_iter().zip(promised) {
                    let id = shared.reservation_id();
                    core.note(asked, FleetEvent::Reserved { id, rank, amount });
                    live.reservations.insert(leg, id);
                }
                let terms = terms(&shared, &self.request, &core.snapshot(asked), plan);
                drop(core);
                let took = shared.now().saturating_sub(asked);
                if let Some(savings) = explanation.savings(&shared.settings.weights) {
                    shared.metrics.note_split(&self.request.model, savings);
                }
                live.trail.placed(age, took, purpose, explanation);
                match purpose {
                    Purpose::Continue { .. } => shared.metrics.migrations.inc(),
                    Purpose::Prompt if live.lifecycle.placements() > 1 => shared.metrics.retries.inc(),
                    Purpose::Prompt => 0,
                };
                live.events.push_back(Event::Placed { placement, plan, legs, terms });
            }
            Err(error) => {
                drop(core);
                let why = match error {
                    PlaceError::TooLong { .. } => Unplaced::TooLong,
                    // A new client can wait better than we: it is told when. For one that has been taken an engine
                    // may come back soon; the lifecycle bounds how often that is asked.
                    _ if live.is_new() => Unplaced::Never,
                    PlaceError::Saturated { .. } | PlaceError::NoRank { .. } | PlaceError::NoModel { .. } => {
                        Unplaced::Retry
                    }
                };
                live.unplaced = Some(error);
                live.events.push_back(Event::NotPlaced { placement, why });
            }
        }
    }
}

impl Live {
    /// Whether nothing has been tried for the request yet.
    fn is_new(&self) -> bool {
        self.lifecycle.placements() <= 1 && self.lifecycle.tokens_sent() == 0
    }
}

/// What placement is asked for `prompt`, of which so many tokens are the answer's.
fn question<'a>(
    request: &'a GenerateRequest,
    prompt: &'a Prompt,
    choices: u32,
    generated_tokens: u32,
    excluded: &'a [RankId],
) -> Question<'a> {
    Question {
        model: &request.model,
        tenant: &request.tenant,
        prompt_tokens: prompt.tokens.len() as u32,
        unit: request.unit,
        form: if request.body.is_some() { PlacedForm::Body } else { PlacedForm::Tokens },
        output_tokens_max: request.sampling.output_tokens_max.saturating_sub(generated_tokens),
        choices,
        excluded,
        chain: &prompt.hashes,
    }
}

/// What holds for the legs of `plan`.
fn terms(shared: &Shared, request: &GenerateRequest, fleet: &Snapshot, plan: Plan) -> Terms {
    let [prefill, decode] =
        [plan.prefill_rank(), plan.decode_rank()].map(|rank| shared.driver(rank.incarnation));
    let continues = |driver: &Option<Arc<dyn Driver>>| {
        driver.as_ref().is_some_and(|driver| driver.facts().continues_sampling)
    };
    let can_stall = decode.as_ref().is_some_and(|driver| !driver.is_in_process());
    let settings = &shared.settings;
    let stall_after = can_stall.then(|| {
        let p99 = fleet.rank(plan.decode_rank()).map_or(0.0, |rank| rank.itl_p99_seconds);
        settings.stall_min.max(Duration::from_secs_f64(p99 * settings.stall_itl_factor))
    });
    let moves = !request.sampling_is_particular || (continues(&prefill) && continues(&decode));
    Terms { continues: moves, stall_after }
}
