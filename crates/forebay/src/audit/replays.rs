//! The replays, as many at a time as there are jobs.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use forebay_audit::{Bench, Comparison, Inferred, Predicted, Way};

use crate::terminal::Terminal;

/// What came of them.
pub(super) struct Replayed {
    pub(super) comparison: Comparison,
    /// So many times as long as the profile says took each step.
    pub(super) slow: f64,
}

/// What is replayed, and how often.
pub(super) struct Plan {
    pub(super) bench: Bench,
    pub(super) inferred: Arc<Inferred>,
    /// Seeds 1 to this one.
    pub(super) seeds: u64,
    pub(super) jobs: Option<NonZeroUsize>,
    /// Whether the profile is brought to the measured time between tokens.
    pub(super) fit: bool,
}

/// Runs every way with every seed. Once `stop` is set what comes out means nothing.
pub(super) fn run(plan: Plan, stop: &AtomicBool, terminal: Terminal) -> Replayed {
    let Plan { mut bench, inferred, seeds, jobs, fit } = plan;
    let inferred = &*inferred;
    if fit {
        terminal.progress("fitting the profile");
        let fitted = bench.fit(inferred, 1, &mut |_| !stop.load(Ordering::Relaxed));
        bench.slow = fitted.unwrap_or(bench.slow);
    }
    let tasks: Vec<(Way, u64)> =
        Way::ALL.iter().flat_map(|&way| (1..=seeds).map(move |seed| (way, seed))).collect();
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let jobs = jobs.map_or(processors, NonZeroUsize::get).min(tasks.len());
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let results: Mutex<Vec<Option<Predicted>>> = Mutex::new(vec![None; tasks.len()]);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let number = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(&(way, seed)) = tasks.get(number)
                {
                    let mut goes_on = |_| !stop.load(Ordering::Relaxed);
                    let predicted = bench.run(inferred, way, seed, &mut goes_on);
                    results.lock().expect("nobody panics with it")[number] = Some(predicted);
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    terminal.progress(&format!("{done} of {} replays", tasks.len()));
                }
            });
        }
    });
    terminal.progress("");
    let results: Vec<Predicted> =
        results.into_inner().expect("nobody panics with it").into_iter().flatten().collect();
    let by_way: Vec<Vec<Predicted>> = results.chunks(seeds as usize).map(<[Predicted]>::to_vec).collect();
    Replayed { comparison: Comparison::of(&by_way, &inferred.measured), slow: bench.slow }
}
