//! What must hold, whatever goes wrong. Looked at after every event of a run that is checked, and at its end.

use std::collections::{BTreeSet, HashMap, HashSet};

use forebay_engine_model::SchedulerConfig;
use forebay_lifecycle::Limits;
use forebay_placement::RankState;
use forebay_types::{BlockHash, KvEvent, RankId};

use super::{Run, client::Request, request::Live, seats::Power};
use crate::{
    clock::Time,
    engine::{EngineSpec, Report},
    gateway::{Ask, Gateway, Placed},
    metrics::Ending,
};

/// Something that must hold, and did not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// When.
    pub at: Time,
    /// A sentence.
    pub what: String,
}

/// What is remembered to compare with.
pub(super) struct Checks {
    limits: Limits,
    /// Where the shortest context of the fleet ends.
    context_tokens_max: u32,
    /// Every block that a rank ever said it stored.
    announced: HashMap<RankId, HashSet<BlockHash>>,
    pub(super) violations: Vec<Violation>,
}

impl Checks {
    pub(super) fn new(limits: Limits, engines: &[EngineSpec]) -> Self {
        let context = |engine: &EngineSpec| {
            let SchedulerConfig { context_tokens_max, blocks_total, block_size_tokens, .. } =
                engine.kind.scheduler;
            context_tokens_max.min(blocks_total.saturating_mul(block_size_tokens))
        };
        let context_tokens_max = engines.iter().map(context).min().unwrap_or(0);
        Self { limits, context_tokens_max, announced: HashMap::new(), violations: Vec::new() }
    }

    fn hold(&mut self, at: Time, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.violations.push(Violation { at, what: what() });
        }
    }

    /// A rank said what changed in its cache.
    pub(super) fn announced(&mut self, report: &Report) {
        for event in report.kv.iter().flat_map(|batch| &batch.events) {
            if let KvEvent::Stored { hashes, .. } = event {
                self.announced.entry(report.rank).or_default().extend(hashes);
            }
        }
    }

    /// A gateway placed a request, or did not.
    pub(super) fn placed(
        &mut self,
        now: Time,
        gateway: &mut Gateway,
        ask: &Ask<'_>,
        placed: Option<&Placed>,
    ) {
        let Some(placed) = placed else { return };
        for rank in [placed.plan.prefill_rank(), placed.plan.decode_rank()] {
            if placed.reservations > 0 {
                let state = gateway.view(now, rank).map(|view| view.state);
                self.hold(now, state == Some(RankState::Ready), || {
                    format!("{rank} was chosen and is {state:?}")
                });
            }
        }
        if placed.reservations == 0 {
            return; // the index was not asked
        }
        for (rank, blocks) in gateway.overlaps().iter() {
            let known = gateway.knows(rank.incarnation);
            self.hold(now, known, || {
                format!("the index says that {rank}, which is gone, has {blocks} blocks")
            });
            let said = self.announced.get(&rank);
            let said = |hash: &BlockHash| said.is_some_and(|said| said.contains(hash));
            let holds = ask.hashes.get(..blocks as usize).is_some_and(|claimed| claimed.iter().all(said));
            self.hold(now, holds, || {
                format!("the index says that {rank} has {blocks} blocks that it never announced")
            });
        }
    }

    /// A request has ended.
    pub(super) fn ended(&mut self, now: Time, request: u32, of: &Request, live: &Live, ending: Ending) {
        let sent = live.lifecycle.generated(0);
        let right = (of.prompt_tokens..).zip(sent).all(|(position, token)| of.token(position) == *token);
        self.hold(now, right, || format!("request {request} was sent a wrong token"));
        let length = of.prompt_tokens + sent.len() as u32;
        let whole = sent.len() as u32 == of.answer.tokens || length >= self.context_tokens_max;
        self.hold(now, whole || ending != Ending::Finished, || {
            format!("request {request} ended after {} of {} tokens", sent.len(), of.answer.tokens)
        });
        self.hold(now, of.seen.tokens as usize == sent.len(), || {
            format!("request {request} was sent {} tokens and its client saw {}", sent.len(), of.seen.tokens)
        });
        let (placements, migrations) = (live.lifecycle.placements(), live.lifecycle.migrations());
        let bounded = placements <= self.limits.placements_max && migrations <= self.limits.migrations_max;
        self.hold(now, bounded, || {
            format!("request {request}: {placements} placements, {migrations} migrations")
        });
    }
}

impl Run<'_> {
    /// After an event: nothing is lost or counted twice.
    pub(super) fn check(&mut self) {
        let Some(mut checks) = self.checks.take() else { return };
        for (engine, seat) in self.seats.iter().enumerate() {
            let total = self.settings.engines[engine].kind.scheduler.blocks_total;
            for (rank, blocks, _) in seat.group.accounts() {
                let sum = blocks.free + blocks.cached + blocks.in_use + blocks.quarantined;
                let holds = sum == total && (blocks.held == 0 || blocks.in_use > 0);
                checks.hold(self.now, holds, || format!("{rank} has {total} blocks, and counts {blocks:?}"));
            }
        }
        let mut promised = vec![0; self.gateways.len()];
        for live in self.clients.requests.iter().filter_map(|request| request.live.as_ref()) {
            promised[live.gateway as usize] += live.promised.len();
        }
        for (number, gateway) in self.gateways.iter().enumerate() {
            let Some(gateway) = gateway else { continue };
            let (held, most) = (gateway.reservations(), promised[number]);
            // A rank that is lost takes the reservations with it.
            checks.hold(self.now, held <= most, || {
                format!("gateway {number} holds {held} reservations for {most} legs")
            });
        }
        self.checks = Some(checks);
    }

    /// At the end, all faults over: nothing is left of any request, and the index says what ranks cache.
    pub(super) fn check_end(&mut self) {
        if self.checks.is_none() {
            return;
        }
        for engine in 0..self.seats.len() as u32 {
            let ranks = self.settings.engines[engine as usize].dp_ranks;
            for dp_rank in 0..ranks {
                if !self.seats[engine as usize].is_up() {
                    continue;
                }
                let report = self.seats[engine as usize].group.report(dp_rank);
                self.happened.reports.push(report);
            }
            self.pass_reports(engine);
        }
        let mut checks = self.checks.take().expect("it was looked for");
        let (now, live) = (self.now, self.clients.live);
        checks.hold(now, live == 0, || format!("{live} requests have not ended"));
        checks.hold(now, self.waiting.is_empty(), || "requests that ended wait for a place".to_owned());
        checks.hold(now, self.links.is_empty(), || "a link still has something to do".to_owned());
        checks.hold(now, self.pulls.is_empty(), || format!("{} hand-overs never ended", self.pulls.len()));
        for (number, gateway) in self.gateways.iter().enumerate() {
            let held = gateway.as_ref().map_or(0, Gateway::reservations);
            checks.hold(now, held == 0, || format!("gateway {number} still holds {held} reservations"));
        }
        for seat in self.seats.iter().filter(|seat| !matches!(seat.power, Power::Down { .. })) {
            for (rank, blocks, is_idle) in seat.group.accounts() {
                let free = blocks.in_use == 0 && blocks.quarantined == 0 && blocks.held == 0;
                checks.hold(now, is_idle && free, || format!("{rank} still holds {blocks:?}"));
                let (sequence_next, cached) = seat.group.cached(rank.dp_rank);
                for gateway in self.gateways.iter().flatten() {
                    // Of the last batches lost, nobody knows before the next one comes.
                    if gateway.cache_sequence(rank) == Some(sequence_next) {
                        let known = gateway.cache_of(rank).unwrap_or_default();
                        let (known, held) = (blocks_of(&known), blocks_of(&cached));
                        checks.hold(now, known == held, || {
                            let (more, less) = (known.difference(&held), held.difference(&known));
                            let (more, less) = (more.count(), less.count());
                            format!("the index has {more} blocks of {rank} that it lacks, and lacks {less}")
                        });
                    }
                }
            }
        }
        self.checks = Some(checks);
    }
}

fn blocks_of(events: &[KvEvent]) -> BTreeSet<BlockHash> {
    let stored = events.iter().filter_map(|event| match event {
        KvEvent::Stored { hashes, .. } => Some(hashes),
        _ => None,
    });
    stored.flatten().copied().collect()
}
