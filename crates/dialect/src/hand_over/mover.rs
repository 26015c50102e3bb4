//! The decode engine's mover: fetches the prompt's blocks from another process straight into the engine's pool.
//!
//! A decode leg is started with a stand-in for the other engine's pool: a region of the right shape whose pages are never
//! touched. When the scheduler has found out which blocks the local cache lacks, it submits a plan from that region, and
//! this mover fetches those blocks over the side channel. So nothing is fetched that is here already, nothing is stored
//! twice, and the engine's own rules for hand-overs (deadline, quarantine, recomputing) hold.
//!
//! Invariants: a block is written only after its check; each ticket ends once; nothing is written after that; whatever
//! way a hand-over ends, the prefill engine is told that it may free the KV, if it can be reached.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use forebay_kv_move::{
    BlockPair, BlockRef, Callback, Cancel, Completion, CopyPlan, Layout, MoveError, Mover, Options, Outcome,
    Region, RegionError, RegionKey, Report, SubmitError, Ticket,
};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Notify, time::timeout};

use super::{
    params::PullFrom,
    pull::{Connection, FREE_TIME_MAX, PullError},
    stats::TransferStats,
    wire::{Hello, KvShape, PromptIdentity},
};

/// One hand-over that a decode leg waits for.
#[derive(Debug, Clone)]
pub(crate) struct Pull {
    from: PullFrom,
    hello: Hello,
    prompt: PromptIdentity,
    /// Blocks of the whole prompt.
    blocks: u32,
}

/// Fetches KV for one engine.
pub(crate) struct Puller {
    runtime: Handle,
    /// By stand-in. Each belongs to a running request, which takes it out again.
    expected: Mutex<HashMap<RegionKey, Pull>>,
    stats: Arc<TransferStats>,
}

/// What a decode leg is started with. Dropped before the engine asked for the blocks, it lets the source free them.
pub(crate) struct Expected {
    pub(crate) stand_in: Region,
    pub(crate) blocks: Arc<[BlockRef]>,
    puller: Arc<Puller>,
}

impl Drop for Expected {
    fn drop(&mut self) {
        let never_asked_for = self.puller.expected.lock().remove(&self.stand_in.key());
        if let Some(pull) = never_asked_for {
            self.puller.runtime.spawn(free(pull));
        }
    }
}

impl Puller {
    pub(super) fn new(runtime: Handle, stats: Arc<TransferStats>) -> Arc<Self> {
        Arc::new(Self { runtime, expected: Mutex::default(), stats })
    }

    /// Prepares a hand-over: the first `tokens` tokens' blocks of a prompt, from `from`. `prompt` is the whole prompt's
    /// identity and length.
    ///
    /// # Errors
    /// If the system gives no memory for the stand-in.
    pub(crate) fn expect(
        self: &Arc<Self>,
        from: &PullFrom,
        shape: KvShape,
        prompt: (PromptIdentity, u32),
        tokens: u32,
    ) -> Result<Expected, RegionError> {
        let blocks = tokens.div_ceil(shape.block_size_tokens).max(1);
        let layout = Layout { block_bytes: shape.block_bytes, blocks };
        let stand_in = Region::create("forebay-pull", layout)?;
        let hello = Hello::new(&from.engine_id, &from.request_id, shape, prompt);
        let all = prompt.1.div_ceil(shape.block_size_tokens);
        let pull = Pull { from: from.clone(), hello, prompt: prompt.0, blocks: all };
        self.expected.lock().insert(stand_in.key(), pull);
        let blocks = (0..blocks).map(|block| BlockRef { block, generation: 0 }).collect();
        Ok(Expected { stand_in, blocks, puller: self.clone() })
    }

    /// Lets the source free KV that will not be fetched at all.
    pub(crate) fn decline(&self, from: &PullFrom, shape: KvShape, prompt: (PromptIdentity, u32)) {
        let hello = Hello::new(&from.engine_id, &from.request_id, shape, prompt);
        self.runtime.spawn(free(Pull { from: from.clone(), hello, prompt: prompt.0, blocks: 0 }));
    }
}

impl Mover for Puller {
    fn submit(&self, plan: CopyPlan, options: Options, done: Callback) -> Result<Ticket, SubmitError> {
        let key = plan.source().key();
        let pull = self.expected.lock().remove(&key).ok_or(SubmitError::Unreachable { key })?;
        let control = Arc::new(Control::default());
        let ticket = Ticket::new(control.clone());
        let completion = Completion::new(done);
        self.runtime.spawn(run(pull, plan, options.deadline, control, completion, self.stats.clone()));
        Ok(ticket)
    }
}

#[derive(Default)]
struct Control {
    cancelled: AtomicBool,
    wake: Notify,
}

impl Cancel for Control {
    fn cancel(&self) {
        // Before the wake-up, which orders it for whoever is woken.
        self.cancelled.store(true, Relaxed);
        self.wake.notify_one();
    }
}

impl Control {
    async fn until_cancelled(&self) {
        while !self.cancelled.load(Relaxed) {
            self.wake.notified().await;
        }
    }
}

/// One ticket from its beginning to its end.
async fn run(
    pull: Pull,
    plan: CopyPlan,
    deadline: Instant,
    control: Arc<Control>,
    completion: Completion,
    stats: Arc<TransferStats>,
) {
    let begun = Instant::now();
    let fetched = tokio::select! {
        biased;
        () = control.until_cancelled() => Err(Outcome::Cancelled),
        fetched = tokio::time::timeout_at(deadline.into(), fetch(&pull, &plan)) => match fetched {
            Ok(fetched) => Ok(fetched),
            Err(_late) => Err(Outcome::TimedOut),
        },
    };
    // Nothing writes to the pool from here on: whatever did was dropped with its future.
    let (outcome, connection, free_later) = match fetched {
        Ok(Ok(connection)) => {
            let report = Report {
                blocks: plan.blocks(),
                bytes: plan.bytes(),
                pieces: plan.pieces().len() as u32,
                seconds: begun.elapsed().as_secs_f64(),
            };
            stats.done(&report);
            (Outcome::Done(report), Some(connection), false)
        }
        Ok(Err(error)) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, cause, request = pull.from.request_id, "a hand-over failed");
            stats.failed(error.reason());
            (Outcome::Failed(of_pull(&error)), None, error.leaves_kv_held())
        }
        Err(outcome) => {
            stats.failed(if outcome == Outcome::TimedOut { "timed_out" } else { "cancelled" });
            (outcome, None, true)
        }
    };
    drop(plan);
    completion.end(outcome);
    let freed = match connection {
        Some(connection) => matches!(timeout(FREE_TIME_MAX, connection.free()).await, Ok(Ok(()))),
        None => !free_later,
    };
    if !freed {
        free(pull).await;
    }
}

async fn fetch(pull: &Pull, plan: &CopyPlan) -> Result<Connection, PullError> {
    let (host, port) = (pull.from.host.as_str(), pull.from.port);
    let mut connection = Connection::open(host, port, &pull.hello, pull.prompt).await?;
    if connection.blocks != pull.blocks {
        return Err(PullError::Blocks { expected: pull.blocks, found: connection.blocks });
    }
    let indices: Vec<u32> = plan.pairs().iter().map(|pair| pair.source.block).collect();
    let destination = plan.destination();
    connection.read(&indices, |nth, bytes| write(destination, &plan.pairs()[nth], bytes)).await?;
    Ok(connection)
}

/// Writes a block that was checked, if it still belongs to this hand-over.
fn write(destination: &Region, pair: &BlockPair, bytes: &[u8]) -> Result<(), PullError> {
    let BlockRef { block, generation } = pair.destination;
    if destination.generation(block) != generation {
        return Err(PullError::Reallocated { block });
    }
    destination.copy_in(block, bytes);
    if destination.generation_after_reads(block) != generation {
        return Err(PullError::Reallocated { block });
    }
    Ok(())
}

/// Tells the prefill engine that nobody will read any more. Best effort: its lease ends by itself.
async fn free(pull: Pull) {
    let Pull { from, mut hello, prompt, blocks: _ } = pull;
    hello.only_free = true;
    let told = async {
        let connection = Connection::open(&from.host, from.port, &hello, prompt).await?;
        connection.free().await.map_err(PullError::Broken)
    };
    match timeout(FREE_TIME_MAX, told).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "KV elsewhere is left to its lease"),
        Err(_late) => tracing::debug!("KV elsewhere is left to its lease: its engine does not answer"),
    }
}

/// In the mover's words; the sentence is in the log.
fn of_pull(error: &PullError) -> MoveError {
    match error {
        PullError::Damaged { index } => MoveError::ChecksumMismatch { block: *index },
        PullError::Stale { index } => MoveError::Stale { block: *index, expected: 0, found: 0 },
        PullError::Reallocated { block } => {
            MoveError::DestinationReallocated { block: *block, expected: 0, found: 0 }
        }
        PullError::Unreachable(_)
        | PullError::Refused { .. }
        | PullError::Blocks { .. }
        | PullError::Broken(_) => MoveError::PeerGone,
    }
}
