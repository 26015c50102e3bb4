//! The shell of an in-process engine: one loop around the pure scheduler of `engine-model`.
//!
//! Each turn: take commands, plan a step, publish block generations, start imports, let the [`Backend`] compute, hand
//! out what came of it, report. The embedded engine runs it on a thread of its own, the simulated one as a task.

mod inbox;
mod shell;

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use forebay_engine_model::{Scheduler, SchedulerConfig, StepPlan};
use forebay_kv_hash::BlockHasher;
use forebay_kv_move::{Mover, Region};
use forebay_types::{EngineName, Incarnation, LegId, Role, SampledToken, Sampling};
use futures::future::BoxFuture;
use parking_lot::Mutex;

use inbox::{Command, Inbox};
use shell::Shell;

use crate::{
    driver::{Driver, EngineFacts, EngineLimits, Launch, LaunchError, Leg, StartError},
    reports::Reports,
    stream::{LegStream, leg_stream},
};

/// What computes the steps that the scheduler plans.
pub(crate) trait Backend: Send + 'static {
    /// A leg was taken: how its tokens are drawn.
    fn add_leg(&mut self, leg: LegId, sampling: &Arc<Sampling>);
    /// A leg is over.
    fn remove_leg(&mut self, leg: LegId);
    /// Computes the plan's copies and chunks in `pool` and appends one token for every choice that a chunk samples.
    fn execute(&mut self, plan: &StepPlan, pool: &Region, sampled: &mut Vec<(LegId, SampledToken)>);
    /// How long the step should take beyond its computation; zero for a real engine.
    fn pace(&self, plan: &StepPlan) -> Duration;
}

/// Copies whole blocks inside one pool: the partial last block of a prompt, once for each further choice.
pub(crate) fn copy_blocks(plan: &StepPlan, pool: &Region) {
    for copy in &plan.copies {
        pool.copy_block(copy.from, copy.to);
    }
}

/// What one life of an in-process engine is made of.
pub(crate) struct Parts<B> {
    pub(crate) facts: EngineFacts,
    pub(crate) limits: EngineLimits,
    pub(crate) hasher: BlockHasher,
    pub(crate) backend: B,
    pub(crate) region: Region,
    pub(crate) mover: Arc<dyn Mover>,
}

impl<B: Backend> Parts<B> {
    /// The handle, the loop to run, and what to say when it has ended.
    pub(crate) fn assemble(self) -> (Arc<LocalEngine>, Shell<B>, LastWords) {
        let Self { facts, limits, hasher, backend, region, mover } = self;
        let config = SchedulerConfig {
            chunk_tokens_max: u32::MAX,
            imports_first: true,
            block_size_tokens: limits.block_size_tokens,
            blocks_total: limits.blocks_total,
            step_tokens_max: limits.step_tokens_max,
            sequences_max: limits.sequences_max,
            waiting_max: limits.waiting_max,
            context_tokens_max: facts.context_tokens_max,
        };
        let inbox = Arc::new(Inbox::new(limits.waiting_max));
        let reports = Arc::new(Reports::default());
        let engine = LocalEngine { facts: facts.clone(), inbox: inbox.clone(), reports: reports.clone() };
        let last_words = LastWords { inbox: inbox.clone(), reports: reports.clone() };
        let shell = Shell {
            facts,
            limits,
            scheduler: Scheduler::new(config, hasher),
            backend,
            region,
            mover,
            inbox,
            reports,
            live: shell::Live::default(),
            events_sequence: 0,
            heard_at: tokio::time::Instant::now(),
        };
        (Arc::new(engine), shell, last_words)
    }
}

/// What all in-process engines of one kind share: how to start a life of one of them.
pub trait LocalFleet: Send + Sync + 'static {
    /// `embedded`, `sim`.
    const KIND: &'static str;
    /// Starts a life.
    ///
    /// # Errors
    /// What kept it from starting.
    fn start(
        &self,
        name: &EngineName,
        role: Role,
        incarnation: Incarnation,
    ) -> Result<Arc<LocalEngine>, LaunchError>;
}

/// Starts lives of one in-process engine.
pub struct LocalLauncher<F> {
    name: EngineName,
    role: Role,
    fleet: F,
    current: Mutex<Weak<LocalEngine>>,
}

impl<F: LocalFleet> LocalLauncher<F> {
    /// An engine called `name`; nothing runs until it is launched.
    pub fn new(name: EngineName, role: Role, fleet: F) -> Self {
        Self { name, role, fleet, current: Mutex::new(Weak::new()) }
    }

    /// The life that runs now.
    pub fn current(&self) -> Option<Arc<LocalEngine>> {
        self.current.lock().upgrade()
    }
}

impl<F: LocalFleet> Launch for LocalLauncher<F> {
    fn name(&self) -> &EngineName {
        &self.name
    }

    fn kind(&self) -> &'static str {
        F::KIND
    }

    fn role(&self) -> Role {
        self.role
    }

    fn launch(&self, incarnation: Incarnation) -> BoxFuture<'_, Result<Arc<dyn Driver>, LaunchError>> {
        Box::pin(async move {
            let engine = self.fleet.start(&self.name, self.role, incarnation)?;
            *self.current.lock() = Arc::downgrade(&engine);
            Ok(engine as Arc<dyn Driver>)
        })
    }
}

/// The driver of an in-process engine: a handle on the loop.
pub struct LocalEngine {
    facts: EngineFacts,
    inbox: Arc<Inbox>,
    reports: Arc<Reports>,
}

impl LocalEngine {
    /// Makes the engine's loop panic at its next turn, as a bug in it would. For tests and drills.
    pub fn crash(&self) {
        self.inbox.tell(Command::Crash);
    }
}

impl Driver for LocalEngine {
    fn facts(&self) -> &EngineFacts {
        &self.facts
    }

    fn start(&self, leg: Leg) -> Result<LegStream, StartError> {
        if leg.body.is_some() {
            return Err(StartError::WrongForm);
        }
        let needed_tokens = u32::try_from(leg.prompt.tokens.len()).unwrap_or(u32::MAX).saturating_add(1);
        if needed_tokens > self.facts.context_tokens_max {
            let context_tokens_max = self.facts.context_tokens_max;
            return Err(StartError::TooLong { needed_tokens, context_tokens_max });
        }
        let control = Arc::new(inbox::InboxControl(self.inbox.clone()));
        let (outbox, stream) = leg_stream(leg.id, control);
        match self.inbox.submit(leg, outbox) {
            Ok(()) => Ok(stream),
            Err((error, outbox)) => {
                drop(stream); // before the outbox, so that nobody is told of a loss
                drop(outbox);
                Err(error)
            }
        }
    }

    fn is_in_process(&self) -> bool {
        true
    }

    fn release_kv(&self, leg: LegId) {
        self.inbox.tell(Command::Release(leg));
    }

    fn reports(&self) -> &Reports {
        &self.reports
    }

    fn request_snapshot(&self, _dp_rank: u16) {
        self.inbox.tell(Command::Snapshot);
    }

    fn stop(&self) {
        self.inbox.tell(Command::Stop);
    }
}

/// Ends an engine's life whatever way its loop ended: closes the inbox and reports the death.
pub(crate) struct LastWords {
    inbox: Arc<Inbox>,
    reports: Arc<Reports>,
}

impl LastWords {
    pub(crate) fn say(&self, reason: &str) {
        self.inbox.close();
        self.reports.put_death(reason.into());
    }
}

/// The text of a caught panic.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a text".to_owned())
}
