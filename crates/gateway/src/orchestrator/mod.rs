//! From a tokenised request to a stream of tokens: the shell around the cores.
//!
//! [`Orchestrator::submit`] places a request and returns a response that its reader drives: `request` performs what the
//! lifecycle core says, leg by leg. `engines` keeps engines alive and feeds what they report to the router (`forebay-routing`).
//! [`api`] is the seam to HTTP.

pub mod api;
mod caches;
mod engines;
mod gather;
mod request;
mod status;
mod trail;
mod warming;
mod what_if;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use forebay_admission::GatherSettings;
use forebay_engines::{Driver, Launch, Prompt};
use forebay_fleet::FleetSettings;
use forebay_kv_hash::{BlockHasher, ChainLimits};
use forebay_kv_index::IndexLimits;
use forebay_lifecycle::Limits;
use forebay_perf_model::Profile;
use forebay_placement::{Policy, Weights};
use forebay_planner::LeaningSettings;
use forebay_routing::{Journal, Router, RouterSettings};
use forebay_types::{EngineName, Incarnation, LegId, RankId, RequestId, ReservationId, Role};
use parking_lot::{Mutex, RwLock};
use tokio::{runtime::Handle, sync::Notify};

use self::{
    api::{
        EngineStatus, GenerateRequest, LinkStatus, LogsAnswer, Orchestrate, PromptUnit, Response, RouteError,
        ServedModel, WhatIf,
    },
    caches::Caches,
    engines::Slot,
    gather::Gathering,
    request::RequestRun,
};
use crate::{
    arrivals::ArrivalRecorder,
    decisions::{Accuracy, DecisionLog, DecisionQuery, DecisionRecord, DecisionSink},
    metrics::Metrics,
};

/// Bounds and weights of an orchestrator.
#[derive(Debug, Clone)]
pub struct OrchestratorSettings {
    /// Requests at once; one more is answered with 429.
    pub requests_in_flight_max: usize,
    /// Decision records kept.
    pub decisions_max: usize,
    /// Where all of them are written.
    pub decisions: Option<Arc<DecisionSink>>,
    /// Where arrivals are written, for replay.
    pub arrivals: Option<Arc<ArrivalRecorder>>,
    /// Attempts and time of one request.
    pub limits: Limits,
    /// What a second of each cost term counts for.
    pub weights: Weights,
    /// What engines elsewhere take, by model.
    pub profiles: Vec<ModelProfile>,
    /// How long prompts wait to share a step.
    pub gather: GatherSettings,
    /// When engines are kept for a phase.
    pub leaning: LeaningSettings,
    /// How a candidate is chosen.
    pub policy: Policy,
    /// Breakers, reservations, links.
    pub fleet: FleetSettings,
    /// Memory of each of the two KV indexes, of what engines announce and of what was routed to them.
    pub index: IndexLimits,
    /// Memory of the hashes of recent prompts.
    pub chains: ChainLimits,
    /// Shortest silence after which a response that has begun counts as stalled, where its engine is another process.
    pub stall_min: Duration,
    /// And in token gaps of the rank: how many times its P99.
    pub stall_itl_factor: f64,
    /// First pause before an engine that died is started again; it doubles with each early death.
    pub restart_back_off: Duration,
    /// Longest such pause.
    pub restart_back_off_max: Duration,
    /// First of the numbers that decide between equals.
    pub seed: u64,
    /// Words that the router's journal keeps; 0: there is none.
    pub journal_max: usize,
    /// Milliseconds since the Unix epoch, now.
    pub unix_ms: u64,
}

impl OrchestratorSettings {
    /// What engines of `model` take, if that is known.
    fn profile_of(&self, model: &str) -> Option<Arc<Profile>> {
        let named = self.profiles.iter().find(|of| of.model.as_deref() == Some(model));
        let found = named.or_else(|| self.profiles.iter().find(|of| of.model.is_none()))?;
        Some(found.profile.clone())
    }
}

impl Default for OrchestratorSettings {
    fn default() -> Self {
        Self {
            requests_in_flight_max: 4096,
            decisions_max: 1024,
            decisions: None,
            arrivals: None,
            limits: Limits::default(),
            weights: Weights::default(),
            profiles: Vec::new(),
            gather: GatherSettings::default(),
            leaning: LeaningSettings::default(),
            policy: Policy::default(),
            fleet: FleetSettings::default(),
            index: IndexLimits::default(),
            chains: ChainLimits::default(),
            stall_min: Duration::from_secs(2),
            stall_itl_factor: 20.0,
            restart_back_off: Duration::from_millis(200),
            restart_back_off_max: Duration::from_secs(30),
            seed: 0,
            journal_max: 0,
            unix_ms: 0,
        }
    }
}

pub use self::engines::{Keeper, Member};

/// What the engines of a model take for their steps, as it was measured.
#[derive(Debug, Clone)]
pub struct ModelProfile {
    /// `None`: of any model that no other profile is for.
    pub model: Option<Arc<str>>,
    /// The measurements.
    pub profile: Arc<Profile>,
}

/// The fleet as one value: what HTTP submits requests to.
#[derive(Clone)]
pub struct Orchestrator(Arc<Shared>);

struct Shared {
    settings: OrchestratorSettings,
    hasher: BlockHasher,
    origin: Instant,
    caches: Arc<Caches>,
    /// What decides. Held for microseconds: at a placement, at the turns of a leg and once in some tens of tokens, never per
    /// token.
    core: Mutex<Router>,
    gathering: Mutex<Gathering>,
    drivers: RwLock<HashMap<Incarnation, Arc<dyn Driver>>>,
    slots: RwLock<Vec<Arc<Slot>>>,
    /// The models of `drivers`, sorted.
    serving: RwLock<Arc<[ServedModel]>>,
    /// Told when engines join: pairs may have to be warmed.
    joined: Notify,
    runtime: Handle,
    policy: RwLock<Policy>,
    metrics: Arc<Metrics>,
    log: DecisionLog,
    in_flight: AtomicUsize,
    /// Told when a request ends, for whoever waits for none to be left.
    ended: Notify,
    closing: AtomicBool,
    next_incarnation: AtomicU64,
    next_leg: AtomicU64,
    next_reservation: AtomicU64,
    next_turn: AtomicU64,
}

/// What must be zero when nothing runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaks {
    /// Requests in flight.
    pub requests: usize,
    /// Reservations of load.
    pub reservations: usize,
    /// KV blocks of all engines that are in use, as they last reported.
    pub blocks: u64,
}

impl Orchestrator {
    /// Starts every engine and begins to follow it. Engines that do not start are tried again.
    pub fn start(
        settings: OrchestratorSettings,
        launchers: Vec<Arc<dyn Launch>>,
        hasher: BlockHasher,
        metrics: Arc<Metrics>,
        runtime: &Handle,
    ) -> Self {
        let caches = Caches::new(settings.index, settings.chains, hasher);
        let shared = Arc::new(Shared {
            origin: Instant::now(),
            core: Mutex::new(Router::new(RouterSettings {
                fleet: settings.fleet,
                gather: settings.gather,
                leaning: settings.leaning,
                block_size_tokens: hasher.block_size_tokens(),
                journal_max: settings.journal_max,
            })),
            gathering: Mutex::default(),
            caches,
            drivers: RwLock::new(HashMap::new()),
            slots: RwLock::default(),
            serving: RwLock::new([].into()),
            joined: Notify::new(),
            runtime: runtime.clone(),
            policy: RwLock::new(settings.policy),
            metrics,
            log: DecisionLog::new(settings.decisions_max, settings.decisions.clone()),
            in_flight: AtomicUsize::new(0),
            ended: Notify::new(),
            closing: AtomicBool::new(false),
            next_incarnation: AtomicU64::new(1),
            next_leg: AtomicU64::new(1),
            next_reservation: AtomicU64::new(1),
            next_turn: AtomicU64::new(settings.seed),
            settings,
            hasher,
        });
        runtime.spawn(warming::keep_warm(Arc::downgrade(&shared)));
        runtime.spawn(caches::keep_tidy(Arc::downgrade(&shared)));
        let orchestrator = Self(shared);
        launchers.into_iter().for_each(|launcher| orchestrator.attach(launcher));
        orchestrator
    }

    /// Adds an engine that this process starts or finds, and keeps it alive.
    pub fn attach(&self, launcher: Arc<dyn Launch>) {
        let slot = Arc::new(Slot::new(launcher.name().clone(), launcher.kind(), launcher.role()));
        self.0.slots.write().push(slot.clone());
        self.0.runtime.spawn(engines::keep_alive(self.0.clone(), slot, launcher));
    }

    /// Adds an engine whose lives are reported by somebody else. It leaves when the member is dropped.
    pub fn member(&self, name: EngineName, kind: &'static str, role: Role) -> Member {
        Member::new(self.0.clone(), name, kind, role)
    }

    /// Takes no more requests. What runs goes on.
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::Release);
    }

    /// Ends when no request is in flight.
    pub async fn idle(&self) {
        loop {
            let ended = self.0.ended.notified();
            if self.0.in_flight.load(Ordering::Acquire) == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Stops every engine, after [`Orchestrator::close`].
    pub fn stop_engines(&self) {
        for driver in self.0.drivers.read().values() {
            driver.stop();
        }
    }

    /// What the router was told and answered so far; from now on it keeps nothing.
    pub fn take_journal(&self) -> Journal {
        self.0.core.lock().take_journal()
    }

    /// What is held now; all zero when nothing runs and nothing leaks.
    pub fn leaks(&self) -> Leaks {
        let engines = self.engines();
        let reservations = self.0.core.lock().reservations();
        Leaks {
            requests: self.0.in_flight.load(Ordering::Acquire),
            reservations,
            blocks: engines
                .iter()
                .map(|e| u64::from(e.load.blocks_total.saturating_sub(e.load.blocks_free)))
                .sum(),
        }
    }
}

impl Orchestrate for Orchestrator {
    fn submit(&self, request: GenerateRequest) -> Result<Response, RouteError> {
        let shared = &self.0;
        if shared.closing.load(Ordering::Acquire) {
            return Err(RouteError::ShuttingDown);
        }
        let limit = shared.settings.requests_in_flight_max;
        let place = shared
            .in_flight
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| (count < limit).then_some(count + 1));
        if place.is_err() {
            return Err(RouteError::TooManyInFlight { limit, retry_after_seconds: 1.0 });
        }
        // From here on the run gives the place back.
        RequestRun::start(shared.clone(), request).map(Response::new)
    }

    fn what_if(&self, request: &GenerateRequest) -> Result<WhatIf, RouteError> {
        what_if::what_if(&self.0, request)
    }

    fn models(&self) -> Vec<ServedModel> {
        self.0.serving.read().to_vec()
    }

    fn served(&self, model: &str) -> Option<ServedModel> {
        self.0.serving.read().iter().find(|served| *served.id == *model).cloned()
    }

    fn takes_bodies(&self) -> bool {
        self.0.serving.read().iter().any(|served| served.takes_body)
    }

    fn is_ready(&self) -> bool {
        !self.0.closing.load(Ordering::Acquire) && self.0.can_serve()
    }

    fn engines(&self) -> Vec<EngineStatus> {
        status::status(&self.0)
    }

    fn links(&self) -> Vec<LinkStatus> {
        status::links(&self.0)
    }

    fn decisions(&self, query: &DecisionQuery) -> Vec<Arc<DecisionRecord>> {
        self.0.log.find(query)
    }

    fn accuracy(&self) -> Vec<Accuracy> {
        self.0.log.accuracy()
    }

    fn decision(&self, id: &RequestId) -> Option<Arc<DecisionRecord>> {
        self.0.log.get(id)
    }

    fn drain(&self, engine: &str) -> bool {
        let slot = self.0.slots.read().iter().find(|slot| slot.name.as_str() == engine).cloned();
        slot.inspect(|slot| engines::drain(&self.0, slot)).is_some()
    }

    fn logs(&self, engine: &str, lines: usize) -> LogsAnswer {
        let slot = self.0.slots.read().iter().find(|slot| slot.name.as_str() == engine).cloned();
        let Some(slot) = slot else { return LogsAnswer::UnknownEngine };
        let keeper = slot.keeper.lock().clone();
        keeper.map_or(LogsAnswer::NotKept, |keeper| LogsAnswer::Asked(keeper.logs(lines)))
    }

    fn policy(&self) -> &'static str {
        self.0.policy.read().name()
    }

    fn set_policy(&self, name: &str) -> Result<(), String> {
        let policy: Policy =
            name.parse().map_err(|error: forebay_placement::UnknownPolicy| error.to_string())?;
        *self.0.policy.write() = policy;
        tracing::info!(%policy, "placement policy set");
        Ok(())
    }
}

impl Shared {
    /// Whether some model has engines for both halves of a request.
    fn can_serve(&self) -> bool {
        let drivers = self.drivers.read();
        let has = |model: &Arc<str>, can: fn(Role) -> bool| {
            drivers.values().any(|driver| driver.facts().model == *model && can(driver.facts().role))
        };
        self.serving
            .read()
            .iter()
            .any(|model| has(&model.id, Role::prefills) && has(&model.id, Role::decodes))
    }

    /// Says anew which models are served: an engine came or went.
    fn count_models(&self, core: &mut Router) {
        let mut models: Vec<ServedModel> = Vec::new();
        let snapshot = core.snapshot(self.now());
        for driver in self.drivers.read().values() {
            let facts = driver.facts();
            let found_out = snapshot.rank(facts.rank(0)).is_none_or(|rank| rank.takes_tokens);
            let takes_tokens = facts.accepts.tokens && found_out;
            match models.iter_mut().find(|model| model.id == facts.model) {
                Some(model) => {
                    model.context_tokens_max = model.context_tokens_max.max(facts.context_tokens_max);
                    model.takes_tokens &= takes_tokens;
                    model.takes_body |= facts.accepts.body;
                }
                None => models.push(ServedModel {
                    id: facts.model.clone(),
                    context_tokens_max: facts.context_tokens_max,
                    created: self.settings.unix_ms / 1000,
                    takes_tokens,
                    takes_body: facts.accepts.body,
                }),
            }
        }
        models.sort_by(|one, other| one.id.cmp(&other.id));
        *self.serving.write() = models.into();
    }

    /// From now on the rank's cache is, or is not, guessed from what is routed there.
    fn guess_cache(&self, core: &mut Router, rank: RankId, blocks_total: u32, instead_of_events: bool) {
        core.guess_cache(rank, blocks_total, instead_of_events);
        if instead_of_events {
            self.caches.index.remove_rank(rank);
        }
    }

    /// Time since the start: what the cores are told.
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn leg_id(&self) -> LegId {
        LegId(self.next_leg.fetch_add(1, Ordering::Relaxed))
    }

    fn reservation_id(&self) -> ReservationId {
        ReservationId(self.next_reservation.fetch_add(1, Ordering::Relaxed))
    }

    /// A request's prompt with its block hashes.
    fn prompt(&self, request: &GenerateRequest) -> Prompt {
        let root = match request.unit {
            PromptUnit::Tokens => self.hasher.root(&request.model, &request.salt),
            PromptUnit::Text => self.hasher.root(&request.model, &format!("{}\0text", request.salt)),
        };
        let hashes = self.caches.hashes(root, &request.prompt);
        Prompt { tokens: request.prompt.clone(), hashes, root, salt: request.salt.clone() }
    }

    /// When a request that began at `began` is given up.
    fn deadline(&self, began: Duration) -> Instant {
        let total = began.saturating_add(self.settings.limits.total_max);
        let now = Instant::now();
        self.origin.checked_add(total).unwrap_or(now + Duration::from_secs(86_400))
    }

    fn driver(&self, incarnation: Incarnation) -> Option<Arc<dyn Driver>> {
        self.drivers.read().get(&incarnation).cloned()
    }

    fn request_ended(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.ended.notify_waiters();
    }
}
