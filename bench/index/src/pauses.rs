//! The longest that a single event takes while an index grows from empty: wall time, one rank.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    contender::{Entry, EventTimes, Role, STEPS},
    machine,
    options::Options,
    report::rounded,
    workload::{Shape, Workload, blocks_of},
};

/// Other processes take the core now and then: of so many runs, the smallest of the longest events is the structure's.
const RUNS: usize = 3;

pub fn run(options: &Options, entries: &[Entry]) -> Vec<Value> {
    let &Options { pause_blocks, depth, shared, seed, .. } = options;
    let blocks = pause_blocks * depth / (depth - shared);
    let workload = Workload::new(Shape { blocks, depth, shared, ranks: 1, seed });
    let mut rows = vec![];
    for entry in entries.iter().filter(|entry| entry.role != Role::Floor && entry.name != STEPS) {
        let runs: Option<Vec<Value>> = (0..RUNS).map(|_| grow(entry, &workload)).collect();
        let Some(runs) = runs else {
            eprintln!("pauses, {}: single events cannot be timed from outside", entry.name);
            continue;
        };
        let of = |figure: &str| runs.iter().filter_map(|run| run[figure].as_f64()).collect::<Vec<f64>>();
        let smallest = |figure| of(figure).into_iter().fold(f64::INFINITY, f64::min);
        let (structure, seen) = (smallest("longest_us"), of("longest_us").into_iter().fold(0.0, f64::max));
        eprintln!(
            "pauses, {}: longest event {structure} us (seen: {seen}; by CPU time: {}), p50 {}, p99 {}",
            entry.name,
            smallest("longest_cpu_us"),
            smallest("p50_us"),
            smallest("p99_us")
        );
        rows.push(json!({"contender": entry.name, "blocks": blocks_of(&workload.stores),
            "events": workload.stores.len(), "structure_us": structure, "seen_us": seen,
            "structure_cpu_us": smallest("longest_cpu_us"), "runs": runs}));
    }
    let idle = machine_stall(Duration::from_secs(2));
    eprintln!("pauses, a loop that only reads the clock: {idle} us");
    rows.push(json!({"contender": "clock-only", "seen_us": idle}));
    rows
}

fn grow(entry: &Entry, workload: &Workload) -> Option<Value> {
    machine::trim_heap();
    let mut contender = (entry.new)();
    let mut times = EventTimes::default();
    times.wall_ns.reserve(workload.stores.len());
    for events in workload.stores.chunks(8192) {
        contender.prepare(workload, events);
        if !contender.apply_timed(&mut times) {
            contender.apply();
            return None;
        }
    }
    contender.check().expect("the workload is sound");
    let mut sorted = times.wall_ns;
    sorted.sort_unstable();
    let us = |ns: u64| rounded(ns as f64 / 1e3, 2);
    let at = |share: f64| us(sorted[((sorted.len() - 1) as f64 * share) as usize]);
    let over = sorted.iter().filter(|&&ns| ns > 500_000).count();
    Some(json!({"p50_us": at(0.5), "p99_us": at(0.99), "p999_us": at(0.999), "longest_us": at(1.0),
        "longest_cpu_us": us(times.cpu_longest.as_nanos() as u64), "events_over_500_us": over}))
}

/// What the machine itself does to a thread: the longest gap between two readings of the clock.
pub fn machine_stall(span: Duration) -> f64 {
    let began = Instant::now();
    let (mut last, mut longest) = (began, Duration::ZERO);
    while last - began < span {
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
    }
    rounded(longest.as_nanos() as f64 / 1e3, 2)
}
