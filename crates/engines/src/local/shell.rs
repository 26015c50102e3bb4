//! The loop itself.

use std::{collections::HashMap, sync::Arc, time::Duration};

use forebay_engine_model::{Import, Job, Output, Scheduler, StepPlan, SubmitError, Work as JobWork};
use forebay_kv_move::{BlockPair, BlockRef, CopyPlan, Mover, Options, Outcome, Region, Report, Ticket};
use forebay_types::{FirstToken, KvEventBatch, LegId, SampledToken, StepObservation, TokenId};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::{
    driver::{
        EngineFacts, EngineLimits, KvHandle, KvPlace, Leg, LegEvent, StartError, TransferOutcome,
        TransferReport, Work,
    },
    local::{
        Backend,
        inbox::{Command, Inbox},
    },
    reports::{KvSnapshot, LoadReport, Reports},
    stream::Outbox,
};

/// One engine's loop and everything that it owns.
pub(crate) struct Shell<B> {
    pub(super) facts: EngineFacts,
    pub(super) limits: EngineLimits,
    pub(super) scheduler: Scheduler,
    pub(super) backend: B,
    pub(super) region: Region,
    pub(super) mover: Arc<dyn Mover>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) reports: Arc<Reports>,
    pub(super) live: Live,
    pub(super) events_sequence: u64,
    /// When the inbox was last emptied.
    pub(super) heard_at: Instant,
}

/// What is under way outside the scheduler.
#[derive(Default)]
pub(super) struct Live {
    legs: HashMap<LegId, LiveLeg>,
    /// Prefill legs whose KV is held, by the end of their leases.
    leases: HashMap<LegId, Instant>,
    /// Hand-overs in flight, of cancelled legs too.
    transfers: HashMap<LegId, Ticket>,
}

/// What one turn works with, kept from turn to turn.
#[derive(Default)]
struct Buffers {
    commands: Vec<Command>,
    plan: StepPlan,
    sampled: Vec<(LegId, SampledToken)>,
    drawn: Vec<(LegId, u32, TokenId)>,
    outputs: Vec<Output>,
}

struct LiveLeg {
    outbox: Outbox,
    /// Where a decode leg's KV comes from.
    source: Option<Source>,
}

/// KV of another engine that this one can read.
#[derive(Clone)]
struct Source {
    region: Region,
    blocks: Arc<[BlockRef]>,
    held_until: std::time::Instant,
}

/// What a turn of the loop came to.
enum Turn {
    /// A step was computed; it shall last this long at least before anyone sees what came of it.
    Computed {
        /// Zero for a real engine.
        pace: Duration,
    },
    /// Nothing to compute, but there may be at once: an import ended before it began.
    Again,
    /// Nothing to compute until something comes.
    Idle,
    Stop,
}

impl<B: Backend> Shell<B> {
    /// Runs until told to stop.
    pub(crate) async fn run(mut self) {
        let mut buffers = Buffers::default();
        self.report(None, true);
        loop {
            let began = Instant::now();
            match self.turn(&mut buffers, began) {
                Turn::Stop => return,
                Turn::Computed { pace } => {
                    if !pace.is_zero() {
                        sleep_until(began + pace).await;
                    }
                    self.finish_step(&mut buffers, began.elapsed());
                    tokio::task::yield_now().await;
                }
                Turn::Again => tokio::task::yield_now().await,
                Turn::Idle => self.wait().await,
            }
        }
    }

    /// Until a command comes or a lease ends.
    async fn wait(&self) {
        match self.live.leases.values().min() {
            None => self.inbox.wait().await,
            Some(first) => {
                let _ = timeout_at(*first, self.inbox.wait()).await;
            }
        }
    }

    fn turn(&mut self, buffers: &mut Buffers, began: Instant) -> Turn {
        self.heard_at = began;
        self.inbox.take(self.scheduler.load().waiting, &mut buffers.commands);
        let mut notable = !buffers.commands.is_empty();
        for command in buffers.commands.drain(..) {
            if matches!(command, Command::Stop) {
                return Turn::Stop;
            }
            self.obey(command, began);
        }
        notable |= self.end_leases(began);

        let plan = &mut buffers.plan;
        self.scheduler.plan(plan);
        for &(block, generation) in &plan.rewritten {
            self.region.set_generation(block, generation.0);
        }
        for started in &plan.started {
            self.put(started.leg, LegEvent::Started { cached_tokens: started.cached_tokens });
        }
        let mut refused = false;
        for import in &plan.imports {
            refused |= !self.import(import, began);
        }
        notable |= !plan.started.is_empty();
        // Whoever places requests sees what runs before the step is over, which may take a while.
        if notable {
            self.report(None, notable);
        }
        if plan.is_empty() {
            return if refused { Turn::Again } else { Turn::Idle };
        }
        buffers.sampled.clear();
        self.backend.execute(plan, &self.region, &mut buffers.sampled);
        Turn::Computed { pace: self.backend.pace(plan) }
    }

    fn obey(&mut self, command: Command, now: Instant) {
        match command {
            Command::Submit(leg, outbox) => self.submit(*leg, outbox),
            Command::Cancel(leg) => self.forget(leg),
            Command::StopChoice(leg, choice) => {
                if self.scheduler.stop_choice(leg, choice) {
                    self.put(leg, LegEvent::Ended);
                    self.forget(leg);
                }
            }
            Command::Release(leg) => {
                self.live.leases.remove(&leg);
                self.scheduler.release_held(leg);
            }
            Command::Imported(leg, outcome) => self.imported(leg, transfer_result(outcome)),
            Command::Snapshot => {
                self.report(None, true); // what the snapshot contains is not announced again after it
                self.reports.put_snapshot(KvSnapshot {
                    rank: self.facts.rank(0),
                    sequence_next: self.events_sequence,
                    contents: self.scheduler.cached(),
                });
            }
            Command::Crash => panic!("told to crash at {now:?}"),
            Command::Stop => {}
        }
    }

    fn submit(&mut self, leg: Leg, outbox: Outbox) {
        let (work, source) = match leg.work {
            Work::Aggregated => (JobWork::Aggregated, None),
            Work::Prefill => (JobWork::Prefill, None),
            Work::Decode { kv, first } => match Source::of(kv, self.facts.kv.layout) {
                Some(source) => (JobWork::Decode { first }, Some(source)),
                None => return outbox.put(LegEvent::Refused(StartError::ForeignKv)),
            },
        };
        let job = Job {
            leg: leg.id,
            prompt: leg.prompt.tokens,
            hashes: leg.prompt.hashes,
            root: leg.prompt.root,
            choices: leg.choices,
            output_tokens_max: leg.sampling.output_tokens_max,
            stop_tokens: leg.sampling.stop_tokens.clone(),
            work,
        };
        match self.scheduler.submit(job) {
            Ok(()) => {
                tracing::debug!(request = %leg.request, leg = %leg.id, engine = %self.facts.engine, "leg taken");
                self.backend.add_leg(leg.id, &leg.sampling);
                self.live.legs.insert(leg.id, LiveLeg { outbox, source });
            }
            Err(error) => outbox.put(LegEvent::Refused(Self::refusal(error))),
        }
    }

    fn refusal(error: SubmitError) -> StartError {
        match error {
            SubmitError::QueueFull { waiting_max } => StartError::QueueFull { waiting_max },
            SubmitError::TooLong { prompt_tokens, context_tokens_max } => {
                StartError::TooLong { needed_tokens: prompt_tokens + 1, context_tokens_max }
            }
            SubmitError::Malformed { reason } => StartError::Malformed { reason },
        }
    }

    /// Drops a leg wherever it is.
    fn forget(&mut self, leg: LegId) {
        if let Some(ticket) = self.live.transfers.get(&leg) {
            ticket.cancel(); // its blocks stay quarantined until the mover confirms
        }
        self.scheduler.cancel(leg);
        self.live.leases.remove(&leg);
        if self.live.legs.remove(&leg).is_some() {
            self.backend.remove_leg(leg);
        }
    }

    fn end_leases(&mut self, now: Instant) -> bool {
        if self.live.leases.is_empty() {
            return false;
        }
        let over: Vec<LegId> =
            self.live.leases.iter().filter(|(_, end)| **end <= now).map(|(leg, _)| *leg).collect();
        for leg in &over {
            tracing::warn!(leg = %leg, engine = %self.facts.engine, "KV lease ended before the hand-over");
            self.live.leases.remove(leg);
            self.scheduler.release_held(*leg);
        }
        !over.is_empty()
    }

    /// Starts to bring in KV. `false` if that is impossible: the rank then computes the prompt itself.
    fn import(&mut self, import: &Import, now: Instant) -> bool {
        match self.hand_over(import, now) {
            Ok(ticket) => {
                self.live.transfers.insert(import.leg, ticket);
                true
            }
            Err(reason) => {
                tracing::warn!(leg = %import.leg, %reason, "hand-over refused; the prompt is computed again");
                self.imported(import.leg, Err(TransferOutcome::Failed(reason)));
                false
            }
        }
    }

    fn hand_over(&self, import: &Import, now: Instant) -> Result<Ticket, String> {
        let source = self.live.legs.get(&import.leg).and_then(|leg| leg.source.clone());
        let kv = source.ok_or("the leg has no KV to bring in")?;
        let pair = |&(index, local): &(u32, u32)| {
            let source = kv.blocks.get(index as usize).copied()?;
            let destination = BlockRef { block: local, generation: self.region.generation(local) };
            Some(BlockPair { source, destination })
        };
        let pairs = import.blocks.iter().map(pair).collect::<Option<Vec<_>>>();
        let pairs = pairs.ok_or("the KV has fewer blocks than the prompt")?;
        let plan = CopyPlan::new(kv.region, self.region.clone(), pairs).map_err(|error| error.to_string())?;
        // Never longer than the lease: after it the source may be written to while it is read.
        let options = Options::until((now + self.limits.transfer_deadline).into_std().min(kv.held_until));
        let (inbox, leg) = (self.inbox.clone(), import.leg);
        let done = Box::new(move |outcome| inbox.tell(Command::Imported(leg, outcome)));
        self.mover.submit(plan, options, done).map_err(|error| error.to_string())
    }

    fn imported(&mut self, leg: LegId, result: Result<TransferReport, TransferOutcome>) {
        self.live.transfers.remove(&leg);
        self.scheduler.import_finished(leg, result.is_ok());
        self.put(
            leg,
            match result {
                Ok(report) => LegEvent::KvArrived(report),
                Err(outcome) => LegEvent::KvFailed { outcome },
            },
        );
    }

    /// Hands out what the step produced and reports it.
    fn finish_step(&mut self, buffers: &mut Buffers, took: Duration) {
        let Buffers { plan, sampled, drawn, outputs, .. } = buffers;
        drawn.clear();
        drawn.extend(sampled.iter().map(|(leg, token)| (*leg, token.choice, token.token)));
        self.scheduler.complete(drawn, outputs);
        let mut notable = false;
        for output in outputs.drain(..) {
            match output {
                Output::Token { leg, choice, position, token } => {
                    let drawn = sampled.iter_mut().find(|(l, drawn)| *l == leg && drawn.choice == choice);
                    let logprobs = drawn.and_then(|(_, drawn)| drawn.logprobs.take());
                    self.put(leg, LegEvent::Token(SampledToken { choice, position, token, logprobs }));
                }
                Output::Finished { leg, choice, reason } => {
                    self.put(leg, LegEvent::Finished { choice, reason })
                }
                Output::Held { leg, blocks, tokens } => {
                    notable = true;
                    let held_until = Instant::now() + self.limits.kv_lease;
                    self.live.leases.insert(leg, held_until);
                    let block_ref = |(block, generation): (u32, forebay_engine_model::Generation)| BlockRef {
                        block,
                        generation: generation.0,
                    };
                    let kv = KvHandle {
                        from: self.facts.rank(0),
                        leg,
                        tokens,
                        held_until: held_until.into_std(),
                        first: FirstToken::Handed,
                        place: KvPlace::Pool {
                            region: self.region.clone(),
                            blocks: blocks.into_iter().map(block_ref).collect(),
                            layout: self.facts.kv.layout,
                        },
                    };
                    self.put(leg, LegEvent::Prefilled(kv));
                }
                Output::Ended { leg } => {
                    notable = true;
                    self.put(leg, LegEvent::Ended);
                    self.live.legs.remove(&leg);
                    self.backend.remove_leg(leg);
                }
            }
        }
        self.report(Some(observation(plan, took)), notable);
    }

    fn put(&self, leg: LegId, event: LegEvent) {
        if let Some(live) = self.live.legs.get(&leg) {
            live.outbox.put(event);
        }
    }

    /// Load, step time and cache changes to whoever watches; whether there were cache changes.
    fn report(&mut self, step: Option<StepObservation>, notable: bool) -> bool {
        let mut events = Vec::new();
        self.scheduler.drain_events(&mut events);
        let load = self.scheduler.load();
        let batch = (!events.is_empty()).then(|| {
            let sequence = self.events_sequence;
            self.events_sequence += 1;
            KvEventBatch { rank: self.facts.rank(0), sequence, events }
        });
        let announced = batch.is_some();
        if step.is_some() || announced || notable {
            let load = LoadReport { dp_rank: 0, load, as_of: self.heard_at };
            self.reports.put_step(load, step, batch, notable);
        }
        announced
    }
}

impl Source {
    /// `None` if this engine cannot read it.
    fn of(kv: KvHandle, own_layout: u64) -> Option<Self> {
        match kv.place {
            KvPlace::Pool { region, blocks, layout } if layout == own_layout => {
                Some(Self { region, blocks, held_until: kv.held_until })
            }
            KvPlace::Pool { .. } | KvPlace::Params(_) | KvPlace::Bootstrap(_) => None,
        }
    }
}

fn transfer_result(outcome: Outcome) -> Result<TransferReport, TransferOutcome> {
    match outcome {
        Outcome::Done(Report { blocks, bytes, pieces, seconds }) => {
            Ok(TransferReport { blocks, bytes, pieces, seconds })
        }
        Outcome::Failed(error) => Err(TransferOutcome::Failed(error.to_string())),
        Outcome::TimedOut => Err(TransferOutcome::TimedOut),
        Outcome::Cancelled => Err(TransferOutcome::Cancelled),
    }
}

fn observation(plan: &StepPlan, took: Duration) -> StepObservation {
    StepObservation {
        prefill_tokens: plan.prefill_tokens,
        prefill_attention: plan.prefill_attention,
        decodes: plan.decodes,
        context_tokens: plan.context_tokens,
        seconds: took.as_secs_f64(),
    }
}
