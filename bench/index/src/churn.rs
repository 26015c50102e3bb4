//! The longest look-up on one thread while another adds a rank with a million blocks and removes it, again and again.
//!
//! The same look-ups run with the other thread idle, and with it busy on an index of its own: what that does to them is
//! the machine's doing, not the index's. So is a look-up during which the thread lost its core: those are told apart.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use forebay_kv_index::{Applied, KvIndex, Overlaps};
use forebay_types::{BlockHash, KvEventBatch};
use serde_json::{Value, json};

use crate::{
    forebay::{batch, hashes, new_index, rank_id},
    machine,
    options::Options,
    report::rounded,
    speed,
    workload::Workload,
};

const RANKS: usize = 8;
const ROUNDS: usize = 3;
/// Ids of the ranks that come and go: none of the workload's.
const FIRST_GUEST: u64 = 1 << 32;

/// What the other thread does meanwhile.
#[derive(Clone, Copy)]
enum Other {
    Idle,
    ChurnsElsewhere,
    ChurnsHere,
}

pub fn run(options: &Options, cores: &[usize]) -> Value {
    let workload = speed::workload(options, RANKS);
    let index = new_index();
    fill(&index, &workload);
    let elsewhere = new_index();
    let queries: Vec<Vec<BlockHash>> = [(options.depth, 5), (options.shared, 6), (0, 7)]
        .iter()
        .flat_map(|&(known, salt)| workload.queries(10_000, known, options.seed.wrapping_add(salt)))
        .map(|query| hashes(workload.query_chained(&query)))
        .collect();
    let guest = guest_batches(options.blocks, options.depth);
    let mut rows = vec![];
    for round in 0..ROUNDS {
        for (name, other) in
            [("idle", Other::Idle), ("elsewhere", Other::ChurnsElsewhere), ("churn", Other::ChurnsHere)]
        {
            let churned = match other {
                Other::ChurnsElsewhere => &elsewhere,
                Other::Idle | Other::ChurnsHere => &index,
            };
            let span = Duration::from_secs(options.churn_seconds);
            let slice = slice(&index, churned, &queries, &guest, span, matches!(other, Other::Idle), cores);
            eprintln!("churn, round {}, other thread {name}: {slice}", round + 1);
            rows.push(json!({"round": round, "other_thread": name, "look_ups": slice}));
        }
    }
    let smallest = |name: &str, figure: &str| {
        let of = rows.iter().filter(|row| row["other_thread"] == name);
        of.filter_map(|row| row["look_ups"][figure].as_f64()).fold(f64::INFINITY, f64::min)
    };
    let all = |figure: &str| {
        json!({"idle": smallest("idle", figure), "elsewhere": smallest("elsewhere", figure),
            "churn": smallest("churn", figure)})
    };
    json!({"smallest_of_rounds": {"longest_us": all("longest_us"), "longest_kept_core_us": all("longest_kept_core_us"),
        "p999_us": all("p999_us")}, "cores": cores.len(), "guest_blocks": options.blocks, "rounds": rows})
}

fn fill(index: &KvIndex, workload: &Workload) {
    let mut sequence_next = [0; RANKS];
    for event in &workload.stores {
        let next = &mut sequence_next[event.rank as usize];
        apply(index, &batch(workload, event, *next));
        *next += 1;
    }
}

fn apply(index: &KvIndex, batch: &KvEventBatch) {
    let applied = index.apply(batch);
    assert!(matches!(applied, Applied::Ok), "batch {} of {}: {applied:?}", batch.sequence, batch.rank);
}

/// A million blocks of prompts that nobody asks for.
fn guest_batches(blocks: usize, depth: usize) -> Vec<KvEventBatch> {
    let chain =
        |number: usize| (number * depth..(number + 1) * depth).map(|at| crate::workload::mix(at as u64));
    let events = |number| vec![crate::forebay::stored(None, hashes(chain(number)))];
    let batch =
        |number| KvEventBatch { rank: rank_id(FIRST_GUEST), sequence: number as u64, events: events(number) };
    (0..blocks / depth).map(batch).collect()
}

/// Looks up for `span` of wall time; the other thread, if not idle, adds and removes guests in `churned` throughout.
fn slice(
    index: &KvIndex,
    churned: &KvIndex,
    queries: &[Vec<BlockHash>],
    guest: &[KvEventBatch],
    span: Duration,
    idle: bool,
    cores: &[usize],
) -> Value {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            machine::pin(&cores[..1]);
            if idle { 0 } else { churn(churned, guest, &stop) }
        });
        machine::pin(&cores[cores.len() - 1..]);
        let mut row = look_up(index, queries, span).summary();
        stop.store(true, Relaxed);
        let guests = writer.join().expect("the churning thread does not panic");
        machine::pin(cores);
        row["guests"] = json!(guests);
        row
    })
}

/// Adds guests and removes them; returns how many came.
fn churn(index: &KvIndex, guest: &[KvEventBatch], stop: &AtomicBool) -> u64 {
    let mut guests = 0;
    let mut own = guest.to_vec();
    while !stop.load(Relaxed) {
        let rank = rank_id(FIRST_GUEST + guests);
        for batch in &mut own {
            batch.rank = rank;
            apply(index, batch);
            if stop.load(Relaxed) {
                break;
            }
        }
        index.remove_rank(rank);
        guests += 1;
    }
    guests
}

fn look_up(index: &KvIndex, queries: &[Vec<BlockHash>], span: Duration) -> Times {
    let mut times = Times::new();
    let mut answer = Overlaps::default();
    let began = Instant::now();
    let mut last = began;
    for query in queries.iter().cycle() {
        index.overlaps(query, &mut answer);
        let now = Instant::now();
        times.record((now - last).as_nanos() as u64);
        // What keeping the record took is no part of the next look-up.
        last = Instant::now();
        if now - began > span {
            break;
        }
    }
    times
}

/// Look-ups longer than this are examined: was the core lost meanwhile?
const SUSPECT_NS: u64 = 50_000;
/// How often, in look-ups, lost cores are counted anew, so that a loss is not blamed for a later stall.
const COUNT_EVERY: u64 = 256;

/// All times, and the longest of those during which the thread kept its core.
struct Times {
    histogram: Histogram,
    count: u64,
    longest_kept_core: u64,
    over_1_ms: u64,
    over_1_ms_kept_core: u64,
    core_lost: i64,
    waits_before: i64,
}

impl Times {
    fn new() -> Self {
        let (core_lost, waits_before) = machine::thread_switches();
        Self {
            histogram: Histogram::default(),
            count: 0,
            longest_kept_core: 0,
            over_1_ms: 0,
            over_1_ms_kept_core: 0,
            core_lost,
            waits_before,
        }
    }

    fn record(&mut self, ns: u64) {
        self.histogram.record(ns);
        self.count += 1;
        if ns > SUSPECT_NS || self.count.is_multiple_of(COUNT_EVERY) {
            let (core_lost, _) = machine::thread_switches();
            let kept = core_lost == self.core_lost;
            self.core_lost = core_lost;
            let over = u64::from(ns > 1_000_000);
            self.over_1_ms += over;
            self.over_1_ms_kept_core += if kept { over } else { 0 };
            self.longest_kept_core = self.longest_kept_core.max(if kept { ns } else { 0 });
        }
    }

    fn summary(&self) -> Value {
        let us = |ns: u64| rounded(ns as f64 / 1e3, 2);
        let at = |share| us(self.histogram.percentile(share));
        let waits = machine::thread_switches().1 - self.waits_before;
        json!({"count": self.count, "p50_us": at(0.5), "p99_us": at(0.99), "p999_us": at(0.999), "p9999_us": at(0.9999),
            "longest_us": us(self.histogram.longest), "longest_kept_core_us": us(self.longest_kept_core),
            "over_1_ms": self.over_1_ms, "over_1_ms_kept_core": self.over_1_ms_kept_core, "waits": waits})
    }
}

/// Times in buckets of a 32nd of a power of two: fixed memory for any number of look-ups.
struct Histogram {
    counts: Vec<u64>,
    longest: u64,
}

const STEPS: u64 = 32;

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; 64 * STEPS as usize], longest: 0 }
    }
}

impl Histogram {
    fn record(&mut self, ns: u64) {
        let power = ns.max(STEPS).ilog2();
        let step = (ns >> (power - STEPS.ilog2())) & (STEPS - 1);
        self.counts[(u64::from(power) * STEPS + step) as usize] += 1;
        self.longest = self.longest.max(ns);
    }

    /// The upper end, in ns, of the bucket that holds the value of this share.
    fn percentile(&self, share: f64) -> u64 {
        let total: u64 = self.counts.iter().sum();
        let mut left = (total as f64 * share) as u64;
        for (bucket, &count) in self.counts.iter().enumerate() {
            if count > left {
                let (power, step) = (bucket as u64 / STEPS, bucket as u64 % STEPS);
                return ((STEPS + step + 1) << power >> STEPS.ilog2()).min(self.longest);
            }
            left -= count;
        }
        self.longest
    }
}
