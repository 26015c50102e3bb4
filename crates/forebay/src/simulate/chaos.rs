//! `simulate --chaos`: seed after seed, each a fleet, a load and faults, until what must hold does not.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use forebay_twin::{Chaos, Ending, Ran};

use crate::{
    cli::SimulateArgs,
    exit::{Exit, Failed},
    terminal::Terminal,
};

/// Seeds between two words about how far it is.
const SEEDS_PER_PROGRESS: u64 = 64;

/// What became of the requests of all seeds.
#[derive(Debug, Default)]
struct Tally {
    finished: usize,
    rejected: usize,
    failed: usize,
    left: usize,
    moved: u64,
}

impl Tally {
    fn add(&mut self, ran: &Ran) {
        for outcome in &ran.outcomes {
            match outcome.ending {
                Ending::Finished => self.finished += 1,
                Ending::Rejected => self.rejected += 1,
                Ending::Failed | Ending::Open => self.failed += 1,
                Ending::Left => self.left += 1,
            }
            self.moved += u64::from(outcome.retries + outcome.migrations);
        }
    }
}

/// The command.
///
/// # Errors
/// The first seed, by number, in which something did not hold, and how to repeat it.
pub(super) fn run(args: &SimulateArgs, terminal: Terminal) -> anyhow::Result<Exit> {
    let first = args.arrivals.seed;
    if args.log {
        let Ran { log, .. } = Chaos::draw(first).run(true);
        terminal.out(&log.iter().flat_map(|line| [line, "\n"]).collect::<String>())?;
    }
    let (tally, broken) = run_all(args, terminal);
    if let Some((seed, what)) = broken {
        let sentence =
            format!("seed {seed}: {what}\nrepeat it: forebay simulate --chaos --seed {seed} --log");
        return Err(Failed { exit: Exit::Failure, sentence }.into());
    }
    let Tally { finished, rejected, failed, left, moved } = tally;
    terminal.out(&format!(
        "{} seeds from {first} on: all that must hold did. {finished} requests finished, {moved} legs were placed anew, \
         {rejected} requests were rejected, {failed} failed, {left} clients went away.\n",
        args.seeds
    ))?;
    Ok(Exit::Ok)
}

/// Every seed, as many at a time as there are jobs; what did not hold in the first seed that failed.
fn run_all(args: &SimulateArgs, terminal: Terminal) -> (Tally, Option<(u64, String)>) {
    let (first, seeds) = (args.arrivals.seed, args.seeds);
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let jobs = args.jobs.map_or(processors, std::num::NonZeroUsize::get).min(seeds.max(1) as usize);
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let found: Mutex<(Tally, Option<(u64, String)>)> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed)
                    && let number = next.fetch_add(1, Ordering::Relaxed)
                    && number < seeds
                {
                    let seed = first + number;
                    let ran = catch_unwind(AssertUnwindSafe(|| Chaos::draw(seed).run(false)));
                    let what = match &ran {
                        Ok(ran) => ran
                            .violations
                            .first()
                            .map(|it| format!("at {:.6} s, {}", it.at.seconds(), it.what)),
                        Err(panic) => Some(format!("a panic: {}", words_of(&**panic))),
                    };
                    let mut found = found.lock().expect("nobody panics with it");
                    if let Ok(ran) = &ran {
                        found.0.add(ran);
                    }
                    if let Some(what) = what
                        && found.1.as_ref().is_none_or(|(earlier, _)| seed < *earlier)
                    {
                        found.1 = Some((seed, what));
                        stop.store(true, Ordering::Relaxed);
                    }
                    if number % SEEDS_PER_PROGRESS == 0 {
                        terminal.progress(&format!("seed {seed}, {} of {seeds}", number + 1));
                    }
                }
            });
        }
    });
    terminal.progress("");
    found.into_inner().expect("nobody panics with it")
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<String>().map(String::as_str);
    words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without words").to_owned()
}
