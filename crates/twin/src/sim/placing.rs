//! Where a request runs: asked at once, or after it has waited for others to share a step with.

use std::{sync::Arc, time::Duration};

use forebay_admission::Admit;
use forebay_fleet::LoadSight;
use forebay_lifecycle::{Event as Happening, PlacementId, Purpose, Terms, Unplaced};
use forebay_placement::{PlaceError, Plan};
use forebay_types::{BlockHash, RankId, TenantId, TokenId};

use super::{Run, agenda::Event, client::Request};
use crate::{clock::Time, gateway::Ask};

/// Shortest silence of a leg of a sampled engine that counts as a stall, and how many times the rank's P99 of token gaps
/// it is at least: the gateway's.
const STALL_SECONDS_MIN: f64 = 2.0;
const STALL_ITL_FACTOR: f64 = 20.0;

impl Run<'_> {
    /// Seeks a place, or lets the request wait for others to share a step with.
    pub(super) fn seek(
        &mut self,
        request: u32,
        placement: PlacementId,
        purpose: Purpose,
        excluded: &[RankId],
    ) {
        self.catch_up_all();
        let live = self.live(request);
        if !(live.is_new() && purpose == Purpose::Prompt) {
            return self.place(request, placement, purpose, excluded);
        }
        let (number, hashes) = (live.gateway, live.hashes.clone());
        let prompt_tokens = self.clients.requests[request as usize].prompt_tokens;
        let tenant = self.clients.tenant(request);
        let ask = self.ask(request, &tenant, &hashes, prompt_tokens, &[]);
        let now = self.now;
        let gateway = self.gateways[number as usize].as_mut().expect("its requests end with it");
        let of_gateway = |batch: u64| (batch << 16) | u64::from(number);
        match gateway.admit(now, &ask) {
            Admit::Now => self.place(request, placement, purpose, &[]),
            Admit::Wait { batch, at } => self.wait(request, placement, of_gateway(batch), Time::of(at)),
            Admit::Release { batch, at } => {
                let (batch, at) = (of_gateway(batch), Time::of(at));
                let others: Vec<u32> =
                    self.waiting.iter().filter(|(waits, _)| *waits == batch).map(|it| it.1).collect();
                for other in others {
                    self.leave_at(other, at);
                }
                self.wait(request, placement, batch, at);
            }
        }
    }

    /// A request leaves so that it reaches its engine at `at`.
    fn wait(&mut self, request: u32, placement: PlacementId, batch: u64, at: Time) {
        self.live_mut(request).waits = Some(placement);
        self.waiting.push((batch, request));
        self.leave_at(request, at);
    }

    fn leave_at(&mut self, request: u32, at: Time) {
        let way = self.way_there(self.clients.requests[request as usize].prompt_tokens);
        let leaves = at.since(Time::from_seconds(way)).max(self.now);
        self.agenda.add(leaves, Event::Leave(request));
    }

    /// It has waited long enough, unless it has left before.
    pub(super) fn leave(&mut self, request: u32) {
        self.waiting.retain(|(_, waits)| *waits != request);
        let live = self.clients.requests[request as usize].live.as_mut();
        if let Some(placement) = live.and_then(|live| live.waits.take()) {
            self.place(request, placement, Purpose::Prompt, &[]);
            self.settle();
        }
    }

    /// What placement is told of a prompt of a request.
    fn ask<'a>(
        &self,
        request: u32,
        tenant: &'a TenantId,
        hashes: &'a [BlockHash],
        prompt_tokens: u32,
        excluded: &'a [RankId],
    ) -> Ask<'a> {
        let given = self.live(request).legs_given;
        let legs = [Request::leg(request, given), Request::leg(request, given + 1)];
        Ask { session_key: self.clients.session_key(request), tenant, prompt_tokens, hashes, legs, excluded }
    }

    fn place(&mut self, request: u32, placement: PlacementId, purpose: Purpose, excluded: &[RankId]) {
        self.catch_up_all();
        let (prompt, hashes) = self.prompt_for(request, purpose);
        let tenant = self.clients.tenant(request);
        let ask = self.ask(request, &tenant, &hashes, prompt.len() as u32, excluded);
        let (now, number) = (self.now, self.live(request).gateway);
        let gateway = self.gateways[number as usize].as_mut().expect("its requests end with it");
        let placed = gateway.place(now, &ask);
        if let Some(checks) = &mut self.checks {
            checks.placed(now, gateway, &ask, placed.as_ref().ok());
        }
        let of = &mut self.clients.requests[request as usize];
        let live = of.live.as_mut().expect("it seeks a place");
        match placed {
            Ok(placed) => {
                live.legs_given += 2;
                live.promised.extend(ask.legs.iter().take(placed.reservations as usize));
                let (legs, plan) = (ask.legs, placed.plan);
                match purpose {
                    Purpose::Prompt => {
                        of.retries = live.lifecycle.placements().saturating_sub(1);
                        of.ttft_predicted = placed.ttft_predicted;
                        of.split = matches!(plan, Plan::Split { .. });
                    }
                    Purpose::Continue { .. } => of.migrations += 1,
                }
                let terms = Terms { continues: true, stall_after: self.stall_after(number, plan) };
                self.say(|| format!("request {request} is placed: {plan:?}"));
                self.tell(request, Happening::Placed { placement, plan, legs, terms });
            }
            Err(error) => {
                let why = match error {
                    PlaceError::TooLong { .. } => Unplaced::TooLong,
                    _ if live.is_new() => Unplaced::Never,
                    PlaceError::Saturated { .. } | PlaceError::NoRank { .. } | PlaceError::NoModel { .. } => {
                        Unplaced::Retry
                    }
                };
                self.say(|| format!("request {request} has no place: {error}"));
                self.tell(request, Happening::NotPlaced { placement, why });
            }
        }
    }

    /// After which silence a leg counts as stalled: of an engine in another process.
    fn stall_after(&mut self, gateway: u32, plan: Plan) -> Option<Duration> {
        if self.settings.gateway.sight == LoadSight::EveryStep {
            return None;
        }
        let now = self.now;
        let view = self.gateways[gateway as usize].as_mut()?.view(now, plan.decode_rank())?;
        Some(Duration::from_secs_f64(STALL_SECONDS_MIN.max(view.itl_p99_seconds * STALL_ITL_FACTOR)))
    }

    /// The prompt that a purpose means, and its hashes.
    pub(super) fn prompt_for(&self, request: u32, purpose: Purpose) -> (Arc<[TokenId]>, Arc<[BlockHash]>) {
        let live = self.live(request);
        match purpose {
            Purpose::Prompt => (live.prompt.clone(), live.hashes.clone()),
            Purpose::Continue { choice, generated_tokens } => {
                let generated = &live.lifecycle.generated(choice)[..generated_tokens as usize];
                let tokens: Arc<[_]> = live.prompt.iter().chain(generated).copied().collect();
                let gateway = self.gateways[live.gateway as usize].as_ref();
                let hashes = gateway.expect("its requests end with it").hashes(&tokens);
                (tokens, hashes)
            }
        }
    }
}
