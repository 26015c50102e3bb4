//! The loop itself.

use std::{
    collections::HashMap,
    sync::Arc,
    time::Duration,
};

use forebay_engine_model::{Import, Job, Output, Scheduler, StepPlan, SubmitError, Work as JobWork};
use forebay_kv_move::{BlockRef, CopyPlan, Mover, Options, Outcome, Region, Ticket};
use forebay_types::{KvEventBatch, LegId, RankLoad, SampledToken, StepObservation};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::{
    driver::{
        EngineFacts, EngineLimits, KvHandle, Leg, LegEvent, StartError, TransferOutcome, TransferReport, Work,
    },
    local::{Backend, Command, Inbox},
    reports::{KvSnapshot, Reports},
    stream::Outbox,
};

/// One engine's loop and everything that it owns.
pub(crate) struct Shell<B> {
    facts: EngineFacts,
    limits: EngineLimits,
    scheduler: Scheduler,
    backend: B,
    region: Region,
    mover: Arc<dyn Mover>,
    inbox: Arc<Inbox>,
    reports: Arc<Reports>,
    legs: HashMap<LegId, LiveLeg>,
    /// Prefill legs whose KV is held, by the end of their leases.
    leases: HashMap<LegId, Instant>,
    /// Hand-overs in flight, of cancelled legs too.
    transfers: HashMap<LegId, Ticket>,
    events_sequence: u64,
}

struct LiveLeg {
    outbox: Outbox,
    /// Where a decode leg's KV comes from.
    source: Option<KvHandle>,
}

/// What a turn of the loop came to.
enum Turn {
    /// A step was computed; it should last this long at least.
    Stepped(Duration),
    /// Nothing to compute.
    Idle,
    Stop,
}

impl<B: Backend> Shell<B> {
    #[expect(clippy::too_many_arguments, reason = "called by two launchers only, with parts that each own")]
    pub(crate) fn new(
        facts: EngineFacts,
        limits: EngineLimits,
        scheduler: Scheduler,
        backend: B,
        region: Region,
        mover: Arc<dyn Mover>,
        inbox: Arc<Inbox>,
        reports: Arc<Reports>,
    ) -> Self {
        Self {
            facts,
            limits,
            scheduler,
            backend,
            region,
            mover,
            inbox,
            reports,
            legs: HashMap::new(),
            leases: HashMap::new(),
            transfers: HashMap::new(),
            events_sequence: 0,
        }
    }

    /// Runs until told to stop.
    pub(crate) async fn run(mut self) {
        let mut commands = Vec::new();
        let mut sampled = Vec::new();
        self.report(None, true);
        loop {
            let began = Instant::now();
            match self.turn(&mut commands, &mut sampled, began) {
                Turn::Stop => return,
                Turn::Stepped(pace) if pace.is_zero() => tokio::task::yield_now().await,
                Turn::Stepped(pace) => sleep_until(began + pace).await,
                Turn::Idle => self.wait().await,
            }
        }
    }

    /// Until a command comes or a lease ends.
    async fn wait(&self) {
        match self.leases.values().min() {
            None => self.inbox.wait().await,
            Some(first) => {
                let _ = timeout_at(*first, self.inbox.wait()).await;
            }
        }
    }

    fn turn(
        &mut self,
        commands: &mut Vec<Command>,
        sampled: &mut Vec<(LegId, SampledToken)>,
        began: Instant,
    ) -> Turn {
        self.inbox.take(self.scheduler.load().waiting, commands);
        let mut notable = !commands.is_empty();
        for command in commands.drain(..) {
            if matches!(command, Command::Stop) {
                return Turn::Stop;
            }
            self.obey(command, began);
        }
        notable |= self.end_leases(began);

        let plan = self.scheduler.plan();
        for &(block, generation) in &plan.rewritten {
            self.region.set_generation(block, generation.0);
        }
        for started in &plan.started {
            if let Some(leg) = self.legs.get(&started.leg) {
                leg.outbox.put(LegEvent::Started { cached_tokens: started.cached_tokens });
            }
        }
        for import in &plan.imports {
            self.import(import, began);
        }
        notable |= !plan.started.is_empty();
        if plan.chunks.is_empty() && plan.copies.is_empty() {
            let announced = self.report(None, notable);
            return if announced && !plan.started.is_empty() { Turn::Stepped(Duration::ZERO) } else { Turn::Idle };
        }
        sampled.clear();
        self.backend.execute(&plan, &self.region, sampled);
        let pace = self.backend.pace(&plan);
        notable |= self.finish_step(sampled);
        let observation = observation(&plan, began.elapsed().max(pace));
        self.report(Some(observation), notable);
        Turn::Stepped(pace)
    }

    fn obey(&mut self, command: Command, now: Instant) {
        match command {
            Command::Submit(leg, outbox) => self.submit(*leg, outbox),
            Command::Cancel(leg) => self.forget(leg),
            Command::StopChoice(leg, choice) => self.scheduler.stop_choice(leg, choice),
            Command::Release(leg) => {
                self.leases.remove(&leg);
                self.scheduler.release_held(leg);
            }
            Command::Imported(leg, outcome) => self.imported(leg, outcome),
            Command::Snapshot => self.reports.put_snapshot(KvSnapshot {
                rank: self.facts.rank(),
                sequence_next: self.events_sequence,
                blocks: self.scheduler.cached_blocks(),
            }),
            Command::Crash => panic!("told to crash at {now:?}"),
            Command::Stop => {}
        }
    }

    fn submit(&mut self, leg: Leg, outbox: Outbox) {
        let (work, source) = match leg.work {
            Work::Aggregated => (JobWork::Aggregated, None),
            Work::Prefill => (JobWork::Prefill, None),
            Work::Decode { kv, first } => (JobWork::Decode { first }, Some(kv)),
        };
        if source.as_ref().is_some_and(|kv| kv.kv_layout != self.facts.kv_layout) {
            outbox.put(LegEvent::Refused(StartError::ForeignKv));
            return;
        }
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
                self.legs.insert(leg.id, LiveLeg { outbox, source });
            }
            Err(error) => outbox.put(LegEvent::Refused(self.refusal(&error))),
        }
    }

    fn refusal(&self, error: &SubmitError) -> StartError {
        match *error {
            SubmitError::QueueFull { waiting_max } => StartError::QueueFull { waiting_max },
            SubmitError::TooLong { .. } | SubmitError::NeverFits { .. } | SubmitError::Malformed { .. } => {
                StartError::TooLong { needed_tokens: 0, context_tokens_max: self.facts.context_tokens_max }
            }
        }
    }

    /// Drops a leg wherever it is.
    fn forget(&mut self, leg: LegId) {
        if let Some(ticket) = self.transfers.get(&leg) {
            ticket.cancel(); // its blocks stay quarantined until the mover confirms
        }
        self.scheduler.cancel(leg);
        self.leases.remove(&leg);
        if self.legs.remove(&leg).is_some() {
            self.backend.remove_leg(leg);
        }
    }

    fn end_leases(&mut self, now: Instant) -> bool {
        if self.leases.is_empty() {
            return false;
        }
        let over: Vec<LegId> = self.leases.iter().filter(|(_, end)| **end <= now).map(|(leg, _)| *leg).collect();
        for leg in &over {
            tracing::warn!(leg = %leg, engine = %self.facts.engine, "KV lease ended before the hand-over");
            self.leases.remove(leg);
            self.scheduler.release_held(*leg);
        }
        !over.is_empty()
    }

    fn import(&mut self, import: &Import, now: Instant) {
        let Some(kv) = self.legs.get(&import.leg).and_then(|leg| leg.source.clone()) else {
            self.scheduler.import_finished(import.leg, false);
            return;
        };
        let pairs = import.blocks.iter().map(|&(index, local)| {
            let source = kv.blocks.get(index as usize).copied()?;
            Some((source, BlockRef { block: local, generation: self.region.generation(local) }))
        });
        let Some(pairs) = pairs.collect::<Option<Vec<_>>>() else {
            self.imported(import.leg, Outcome::Cancelled);
            return;
        };
        let plan = CopyPlan { source: kv.region, destination: self.region.clone(), pairs };
        let options = Options { deadline: (now + self.limits.transfer_deadline).into_std(), ..Options::default() };
        let (inbox, leg) = (self.inbox.clone(), import.leg);
        let done = Box::new(move |outcome| inbox.tell(Command::Imported(leg, outcome)));
        match self.mover.submit(plan, options, done) {
            Ok(ticket) => {
                self.transfers.insert(import.leg, ticket);
            }
            Err(error) => {
                tracing::warn!(leg = %import.leg, %error, "hand-over refused; the prompt is computed again");
                self.imported(import.leg, Outcome::Cancelled);
            }
        }
    }

    fn imported(&mut self, leg: LegId, outcome: Outcome) {
        self.transfers.remove(&leg);
        self.scheduler.import_finished(leg, matches!(outcome, Outcome::Done(_)));
        let Some(live) = self.legs.get(&leg) else { return };
        let event = match outcome {
            Outcome::Done(report) => LegEvent::KvArrived(TransferReport {
                blocks: report.blocks,
                bytes: report.bytes,
                pieces: report.pieces,
                seconds: report.seconds,
            }),
            Outcome::Failed(error) => {
                LegEvent::KvFailed { outcome: TransferOutcome::Failed(error.to_string()) }
            }
            Outcome::TimedOut => LegEvent::KvFailed { outcome: TransferOutcome::TimedOut },
            Outcome::Cancelled => LegEvent::KvFailed { outcome: TransferOutcome::Cancelled },
        };
        live.outbox.put(event);
    }

    /// Hands out what the step produced; whether anything but tokens came of it.
    fn finish_step(&mut self, sampled: &mut Vec<(LegId, SampledToken)>) -> bool {
        let tokens: Vec<_> = sampled.iter().map(|(leg, token)| (*leg, token.choice, token.token)).collect();
        let mut notable = false;
        for output in self.scheduler.complete(&tokens) {
            match output {
                Output::Token { leg, choice, position, token } => {
                    let drawn = sampled.iter_mut().find(|(l, drawn)| *l == leg && drawn.choice == choice);
                    let logprobs = drawn.and_then(|(_, drawn)| drawn.logprobs.take());
                    self.put(leg, LegEvent::Token(SampledToken { choice, position, token, logprobs }));
                }
                Output::Finished { leg, choice, reason } => self.put(leg, LegEvent::Finished { choice, reason }),
                Output::Held { leg, blocks, tokens } => {
                    notable = true;
                    self.leases.insert(leg, Instant::now() + self.limits.kv_lease);
                    let block_ref = |(block, generation): (u32, forebay_engine_model::Generation)| BlockRef {
                        block,
                        generation: generation.0,
                    };
                    let kv = KvHandle {
                        from: self.facts.rank(),
                        leg,
                        region: self.region.clone(),
                        blocks: blocks.into_iter().map(block_ref).collect(),
                        tokens,
                        kv_layout: self.facts.kv_layout,
                    };
                    self.put(leg, LegEvent::Prefilled(kv));
                }
                Output::Ended { leg } => {
                    notable = true;
                    self.put(leg, LegEvent::Ended);
                    self.legs.remove(&leg);
                    self.backend.remove_leg(leg);
                }
            }
        }
        notable
    }

    fn put(&self, leg: LegId, event: LegEvent) {
        if let Some(live) = self.legs.get(&leg) {
            live.outbox.put(event);
        }
    }

    /// Load, step time and cache changes to whoever watches; whether there were cache changes.
    fn report(&mut self, step: Option<StepObservation>, notable: bool) -> bool {
        let mut events = Vec::new();
        self.scheduler.drain_events(&mut events);
        let load: RankLoad = self.scheduler.load();
        let batch = (!events.is_empty()).then(|| {
            let sequence = self.events_sequence;
            self.events_sequence += 1;
            KvEventBatch { rank: self.facts.rank(), sequence, events }
        });
        let announced = batch.is_some();
        if step.is_some() || announced || notable {
            self.reports.put_step(load, step, batch, notable);
        }
        announced
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
