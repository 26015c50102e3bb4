//! The shared-memory mover against `memcpy`, as JSON on standard output.
//!
//! `cargo run --release -p forebay-kv-move --example bandwidth`
//!
//! Limit and candidate take turns in slices within one process, over the same pools and the same scattered order of
//! blocks, so whatever else the machine does falls on both. The figure to compare by is processor time: `ratio_cpu` is
//! the candidate's CPU-seconds per GB over the limit's (the whole process counts, submission and callback included).
//! `limit_spread` above 0.15 means that the machine was too busy for the wall-clock figures.

#![allow(clippy::print_stdout, reason = "a tool whose output is its purpose")]
#![allow(unsafe_code, reason = "the limit is a plain memcpy between two pools")]

use std::time::{Duration, Instant};

use forebay_kv_move::{
    BlockPair, BlockRef, CopyPlan, Layout, Options, Outcome, Region, SharedMemoryMover, SharedMemorySettings,
    block_on_move,
};
use rustix::time::{ClockId, clock_gettime};

const SLICES: usize = 15;
/// Of both pools together: far above the caches.
const WORKING_SET_BYTES: u64 = 256 << 20;

fn main() {
    let cases: Vec<String> = [64 << 10, 720 << 10].into_iter().map(case).collect();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    println!("{{\"load\":\"{load}\",\"cases\":[{}]}}", cases.join(","));
}

fn case(block_bytes: u64) -> String {
    let blocks = (WORKING_SET_BYTES / 2 / block_bytes) as u32;
    let layout = Layout { block_bytes, blocks };
    let create = |name| Region::create(name, layout).expect("256 MiB of memory");
    let (source, destination) = (create("kv-from"), create("kv-to"));
    let bytes = vec![1; block_bytes as usize];
    for block in 0..blocks {
        source.copy_in(block, &bytes);
        destination.copy_in(block, &bytes);
    }
    let order = scattered(blocks);
    let mover = SharedMemoryMover::new(SharedMemorySettings::default()).expect("one thread");
    let (mut limit, mut candidate) = (Vec::new(), Vec::new());
    for _ in 0..SLICES {
        limit.push(Sample::of(|| memcpy(&source, &destination, &order)));
        candidate.push(Sample::of(|| transfer(&mover, &source, &destination, &order)));
    }
    let total = block_bytes * u64::from(blocks);
    let (limit, candidate) = (Summary::of(&limit, total), Summary::of(&candidate, total));
    format!(
        "{{\"block_bytes\":{block_bytes},\"blocks\":{blocks},\"memcpy\":{},\"mover\":{},\"ratio_cpu\":{:.3},\
         \"ratio_wall\":{:.3},\"limit_spread\":{:.3}}}",
        limit.json(),
        candidate.json(),
        candidate.cpu_seconds_per_gb / limit.cpu_seconds_per_gb,
        candidate.median / limit.median,
        limit.spread,
    )
}

fn memcpy(source: &Region, destination: &Region, order: &[u32]) {
    let bytes = source.layout().block_bytes as usize;
    for (from, to) in order.iter().zip(0..) {
        // SAFETY: both are whole blocks of different mappings, and this program alone uses them, one thread at a time.
        unsafe { source.block_ptr(*from).copy_to_nonoverlapping(destination.block_ptr(to), bytes) };
    }
}

fn transfer(mover: &SharedMemoryMover, source: &Region, destination: &Region, order: &[u32]) {
    let reference = |block| BlockRef { block, generation: 0 };
    let pair = |(from, to): (&u32, u32)| BlockPair { source: reference(*from), destination: reference(to) };
    let pairs = order.iter().zip(0..).map(pair).collect();
    let plan = CopyPlan::new(source.clone(), destination.clone(), pairs).expect("a valid plan");
    let options = Options::until(Instant::now() + Duration::from_secs(60));
    let outcome = block_on_move(mover, plan, options).expect("an idle mover accepts");
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
}

/// A fixed permutation without neighbours to merge: a multiplicative step prime to the number of blocks.
fn scattered(blocks: u32) -> Vec<u32> {
    let blocks = u64::from(blocks);
    let step = [7919, 7907].into_iter().find(|prime| !blocks.is_multiple_of(*prime)).expect("two primes");
    (0..blocks).map(|block| (block * step % blocks) as u32).collect()
}

struct Sample {
    wall: f64,
    cpu: f64,
}

impl Sample {
    fn of(work: impl FnOnce()) -> Self {
        let cpu = || {
            let time = clock_gettime(ClockId::ProcessCPUTime);
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        };
        let (wall_before, cpu_before) = (Instant::now(), cpu());
        work();
        Self { wall: wall_before.elapsed().as_secs_f64(), cpu: cpu() - cpu_before }
    }
}

struct Summary {
    best: f64,
    median: f64,
    cpu_seconds_per_gb: f64,
    spread: f64,
}

impl Summary {
    fn of(samples: &[Sample], bytes: u64) -> Self {
        let gigabytes = bytes as f64 / 1e9;
        let mut rates: Vec<f64> = samples.iter().map(|sample| gigabytes / sample.wall).collect();
        let mut cpu: Vec<f64> = samples.iter().map(|sample| sample.cpu / gigabytes).collect();
        rates.sort_by(f64::total_cmp);
        cpu.sort_by(f64::total_cmp);
        let quarter = rates.len() / 4;
        let median = rates[rates.len() / 2];
        Self {
            best: rates[rates.len() - 1],
            median,
            cpu_seconds_per_gb: cpu[cpu.len() / 2],
            spread: (rates[rates.len() - 1 - quarter] - rates[quarter]) / median,
        }
    }

    fn json(&self) -> String {
        let Self { best, median, cpu_seconds_per_gb, .. } = self;
        format!(
            "{{\"best_gb_per_s\":{best:.2},\"median_gb_per_s\":{median:.2},\"cpu_s_per_gb\":{cpu_seconds_per_gb:.4}}}"
        )
    }
}
