//! `forebay bench`: puts load on a server and says how it bears it.
//!
//! In: flags. Out: a report. What is sent, and what the times come to, is decided by `forebay-loadgen`; this sends it and
//! reads the clock. Start at [`run`].
//!
//! Invariants: an open loop sends on schedule whatever the server does; no two slices send the same prompt.

mod body;
mod load;
mod report;
mod target;
mod watch;

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use forebay_loadgen::{Figures, Outcome, Prompts, Shape, Tally, derived_seed};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc::channel,
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use self::{
    load::{Load, Pace, drive},
    target::{Clock, Target},
};
use crate::{
    cli::BenchArgs,
    exit::{Exit, Failed, unless_interrupted},
    files::{folder_of, write_whole},
    serve::{attached_key, entropy},
    terminal::Terminal,
};

/// Where a key is looked for if no flag says.
const KEY_VARIABLE: &str = "FOREBAY_API_KEY";
/// How long requests are started if nothing says when to end.
const DURATION: Duration = Duration::from_secs(30);
/// Outcomes that wait to be counted.
const OUTCOMES_MAX: usize = 4_096;
/// Between two looks at the progress.
const TICK: Duration = Duration::from_millis(200);
/// Parts of a seed: warming up, then the slices, two for each.
const WARM_UP_PART: u64 = 10;
const SLICES_PART: u64 = 100;

/// The command.
///
/// # Errors
/// A server that does not answer, refuses or has another model; a file that cannot be written.
pub(crate) async fn run(
    args: &BenchArgs,
    environment: &BTreeMap<String, String>,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    if let Some(out) = &args.out {
        check_out(out)?;
    }
    for (name, pid) in &args.watch {
        watch::cpu_seconds(*pid).ok_or_else(|| {
            usage(format!("--watch {name}={pid}: there is no such process to see on this host"))
        })?;
    }
    let key = key(args, environment)?;
    let seed = args.seed.unwrap_or_else(entropy);
    let attached = async {
        let mut sides = Vec::new();
        for url in [Some(&args.url), args.against.as_ref()].into_iter().flatten() {
            let target = Target::attach(url, key.clone(), args.model.as_deref(), args.timeout).await?;
            sides.push(Side::new(target, args));
        }
        anyhow::Ok(sides)
    };
    let Some(sides) = unless_interrupted(&mut interrupts, attached).await.transpose()? else {
        return Ok(Exit::Interrupted);
    };
    let mut bench = Bench { args, terminal, seed, clock: Clock::start(), sides, interrupts };
    let cpu_before = watch::own_cpu_seconds();
    let interrupted = bench.measure().await.is_err();
    terminal.progress("");
    let own_cpu_seconds = watch::own_cpu_seconds().zip(cpu_before).map(|(after, before)| after - before);
    let ran = report::Ran { args, seed, interrupted, own_cpu_seconds, sides: &bench.sides };
    let document = report::document(&ran);
    if args.json {
        terminal.out(&document)?;
    } else {
        terminal.out(&report::text(&ran, terminal.width(), terminal.paint_out))?;
    }
    if let Some(out) = &args.out {
        write_whole(out, document.as_bytes())?;
    }
    let idle = bench.sides.iter().find(|side| side.total.requests() == side.total.failed());
    match idle {
        _ if interrupted => Ok(Exit::Interrupted),
        Some(side) => {
            let sentence = format!("{} answered no request; the errors say why", side.target.url);
            Err(Failed { exit: Exit::Failure, sentence }.into())
        }
        None => Ok(Exit::Ok),
    }
}

/// Ctrl-C was pressed.
struct Interrupted;

/// A target and what was measured of it.
struct Side {
    target: Arc<Target>,
    total: Tally,
    slices: Vec<Figures>,
    /// CPU seconds that each watched process used in its slices.
    cpu_seconds: Vec<f64>,
}

impl Side {
    fn new(target: Target, args: &BenchArgs) -> Self {
        Self {
            target: Arc::new(target),
            total: Tally::new(args.slo),
            slices: Vec::new(),
            cpu_seconds: vec![0.0; args.watch.len()],
        }
    }
}

/// One run of the command, once its targets are known.
struct Bench<'a> {
    args: &'a BenchArgs,
    terminal: Terminal,
    seed: u64,
    clock: Clock,
    sides: Vec<Side>,
    interrupts: Signal,
}

impl Bench<'_> {
    async fn measure(&mut self) -> Result<(), Interrupted> {
        if self.args.warmup > 0 {
            for side in 0..self.sides.len() {
                let mut load = self.load(side, derived_seed(self.seed, WARM_UP_PART + side as u64));
                (load.requests, load.until) = (Some(self.args.warmup), None);
                load.pace = Pace::Closed { concurrency: self.args.concurrency };
                self.send(load, &mut Tally::new(None), "warming up").await?;
            }
        }
        let slices = if self.sides.len() > 1 { self.args.slices } else { 1 };
        for slice in 0..slices {
            for turn in 0..self.sides.len() {
                // Whoever was second is first in the next: what drifts favours neither.
                let side = if slice % 2 == 0 { turn } else { self.sides.len() - 1 - turn };
                self.slice(slice, slices, side).await?;
            }
        }
        Ok(())
    }

    /// Measures one slice. One that is interrupted counts in the totals, but not among the slices.
    async fn slice(&mut self, slice: u32, slices: u32, side: usize) -> Result<(), Interrupted> {
        let seed = match self.sides.len() {
            1 => self.seed,
            _ => derived_seed(self.seed, SLICES_PART + 2 * u64::from(slice) + side as u64),
        };
        let label = if slices > 1 {
            format!("slice {} of {slices}, {}", slice + 1, self.sides[side].target.url)
        } else {
            self.sides[side].target.url.clone()
        };
        let before = self.watched();
        let mut tally = Tally::new(self.args.slo);
        let sent = self.send(self.load(side, seed), &mut tally, &label).await;
        let after = self.watched();
        let side = &mut self.sides[side];
        for (used, (after, before)) in side.cpu_seconds.iter_mut().zip(after.iter().zip(before)) {
            *used += (after - before).max(0.0);
        }
        side.total.merge(&tally);
        sent?;
        side.slices.push(tally.figures());
        Ok(())
    }

    /// CPU seconds of the watched processes; of one that has gone, none.
    fn watched(&self) -> Vec<f64> {
        self.args.watch.iter().map(|(_, pid)| watch::cpu_seconds(*pid).unwrap_or(0.0)).collect()
    }

    fn load(&self, side: usize, seed: u64) -> Load {
        let args = self.args;
        let duration = args.duration.or(args.requests.is_none().then_some(DURATION));
        let shape = Shape {
            prompt_tokens: args.prompt_tokens,
            shared_tokens: args.shared_tokens,
            groups: args.groups,
        };
        Load {
            target: self.sides[side].target.clone(),
            clock: self.clock,
            pace: match args.rate {
                Some(rate) => Pace::Open { rate },
                None => Pace::Closed { concurrency: args.concurrency },
            },
            prompts: Prompts::new(shape, seed),
            seed,
            turns: args.turns,
            think: args.think,
            output_tokens: args.output_tokens,
            stream: !args.no_stream,
            requests: args.requests,
            until: duration.map(|duration| self.clock.now() + duration.as_secs_f64()),
        }
    }

    /// Sends a load and counts what comes of it. Ctrl-C cancels what runs.
    async fn send(&mut self, load: Load, tally: &mut Tally, label: &str) -> Result<(), Interrupted> {
        let (outcomes, mut counted) = channel::<Outcome>(OUTCOMES_MAX);
        let began = self.clock.now();
        let mut driver = JoinSet::new();
        driver.spawn(drive(Arc::new(load), outcomes));
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                _ = self.interrupts.recv() => return Err(Interrupted),
                outcome = counted.recv() => match outcome {
                    Some(outcome) => tally.add(&outcome),
                    None => return Ok(()),
                },
                _ = ticks.tick() => {
                    let seconds = self.clock.now() - began;
                    self.terminal.progress(&format!(
                        "{label}: {seconds:.0} s, {} requests, {} failed. Ctrl-C ends it.",
                        tally.requests(),
                        tally.failed()
                    ));
                }
            }
        }
    }
}

fn usage(sentence: String) -> anyhow::Error {
    Failed { exit: Exit::Usage, sentence }.into()
}

fn key(args: &BenchArgs, environment: &BTreeMap<String, String>) -> anyhow::Result<Option<String>> {
    let text = match (&args.key_env, &args.key_file) {
        (None, None) => return Ok(environment.get(KEY_VARIABLE).filter(|key| !key.is_empty()).cloned()),
        (Some(variable), _) => {
            let value = environment.get(variable).filter(|key| !key.is_empty());
            value.cloned().ok_or_else(|| usage(format!("--key-env {variable}: the variable is not set")))?
        }
        (None, Some(file)) => attached_key(None, Some(file), environment)
            .with_context(|| format!("--key-file {}: give a file with a key", file.display()))?
            .map(|key| key.expose().to_owned())
            .unwrap_or_default(),
    };
    Ok(Some(text))
}

/// Whether a file can be written there: known before the load, not after it.
fn check_out(out: &Path) -> anyhow::Result<()> {
    let writable = !out.is_dir() && tempfile::tempfile_in(folder_of(out)).is_ok();
    let refuse =
        || usage(format!("--out {}: give a file in a folder that exists and can be written", out.display()));
    writable.then_some(()).ok_or_else(refuse)
}
