//! Whether memory stays flat: stores and removals at a constant number of live blocks, every prompt new, ranks coming
//! and going.

use std::collections::VecDeque;

use serde_json::{Value, json};

use crate::{
    forebay::{Forebay, hashes, rank_id, removed, stored},
    machine,
    options::Options,
    report::rounded,
    workload::{Rng, mix},
};
use forebay_types::{BlockHash, KvEvent, KvEventBatch};

const RANKS: usize = 64;
const LENGTH_MAX: usize = 127;
const REPORTS: u64 = 50;
/// Of the run: not judged, since tables still grow into their size.
const WARM_UP: f64 = 0.2;

/// A prompt whose hashes are made again whenever they are needed.
#[derive(Clone, Copy)]
struct Prompt {
    number: u64,
    length: usize,
}

impl Prompt {
    fn hash(&self, at: usize) -> u64 {
        mix(self.number << 8 | at as u64)
    }

    fn hashes(&self, range: impl Iterator<Item = usize>) -> Vec<BlockHash> {
        hashes(range.map(|at| self.hash(at)))
    }
}

/// One rank's life: what it holds, oldest first.
struct Rank {
    id: u64,
    sequence_next: u64,
    prompts: VecDeque<Prompt>,
}

struct Soak {
    index: Forebay,
    ranks: Vec<Rank>,
    rng: Rng,
    lives: u64,
    prompts: u64,
    live: u64,
    stored: u64,
}

impl Soak {
    fn new(seed: u64) -> Self {
        let rank = |id| Rank { id, sequence_next: 0, prompts: VecDeque::new() };
        let ranks = (0..RANKS as u64).map(rank).collect();
        Self {
            index: Forebay::new(),
            ranks,
            rng: Rng(seed),
            lives: RANKS as u64,
            prompts: 0,
            live: 0,
            stored: 0,
        }
    }

    fn send(&mut self, place: usize, events: Vec<KvEvent>) {
        let rank = &mut self.ranks[place];
        let batch = KvEventBatch { rank: rank_id(rank.id), sequence: rank.sequence_next, events };
        rank.sequence_next += 1;
        self.index.apply_batch(&batch);
    }

    /// Prefill announces most of a prompt at once, decode the rest a block at a time.
    fn store(&mut self) {
        let place = self.rng.below(RANKS);
        let prompt = Prompt { number: self.prompts, length: 1 + self.rng.below(LENGTH_MAX) };
        self.prompts += 1;
        let prefill = prompt.length - prompt.length % 4;
        let mut starts = vec![(0, prefill)];
        starts.extend((prefill..prompt.length).map(|at| (at, at + 1)));
        for (from, to) in starts.into_iter().filter(|(from, to)| from < to) {
            let parent = from.checked_sub(1).map(|at: usize| prompt.hash(at));
            self.send(place, vec![stored(parent, prompt.hashes(from..to))]);
        }
        self.ranks[place].prompts.push_back(prompt);
        self.live += prompt.length as u64;
        self.stored += prompt.length as u64;
    }

    /// The oldest prompt of a random rank goes, its tail first; now and then a hole comes before.
    fn evict(&mut self) {
        let place = self.rng.below(RANKS);
        let Some(prompt) = self.ranks[place].prompts.pop_front() else { return };
        let middle = prompt.length / 2;
        if self.rng.below(8) == 0 {
            self.send(place, vec![removed(prompt.hashes(middle..middle + 1))]);
        }
        self.send(place, vec![removed(prompt.hashes((middle..prompt.length).rev()))]);
        self.send(place, vec![removed(prompt.hashes((0..middle).rev()))]);
        self.live -= prompt.length as u64;
    }

    /// A rank leaves and an empty one comes in its place.
    fn replace_rank(&mut self) {
        let place = self.rng.below(RANKS);
        self.index.remove_rank(rank_id(self.ranks[place].id));
        let lost: usize = self.ranks[place].prompts.iter().map(|prompt| prompt.length).sum();
        self.live -= lost as u64;
        self.ranks[place] = Rank { id: self.lives, sequence_next: 0, prompts: VecDeque::new() };
        self.lives += 1;
    }

    fn evict_to(&mut self, live_max: u64) {
        while self.live > live_max {
            self.evict();
        }
    }
}

pub fn run(options: &Options) -> Result<Value, String> {
    let live_max = options.blocks as u64;
    machine::trim_heap();
    let before = machine::heap_bytes();
    let mut soak = Soak::new(options.seed);
    let mut rows: Vec<Value> = vec![];
    for report in 1..=REPORTS {
        while soak.stored < options.soak / REPORTS * report {
            soak.store();
            // Some 160 replacements for 100 million blocks: each takes a 64th of what lives.
            if soak.rng.below(10_000) == 0 {
                soak.replace_rank();
            }
            soak.evict_to(live_max);
        }
        let stats = soak.index.stats();
        // Every prompt is one rank's alone. What a rank that left still takes is no entry.
        if (stats.entries, stats.refused, stats.gaps) != (soak.live, 0, 0) {
            return Err(format!("WRONG ANSWER: {} blocks live, but {stats:?}", soak.live));
        }
        let (heap, resident) = (machine::heap_bytes().saturating_sub(before), machine::resident_bytes());
        let mib = |bytes: u64| rounded(bytes as f64 / f64::from(1 << 20), 2);
        let share = report as f64 / REPORTS as f64;
        eprintln!(
            "soak {:3.0} %: {} live, heap {} MiB, resident {} MiB, itself says {} MiB",
            share * 100.0,
            soak.live,
            mib(heap),
            mib(resident),
            mib(stats.bytes)
        );
        rows.push(
            json!({"stored": soak.stored, "live": soak.live, "heap_bytes": heap, "resident_bytes": resident,
            "reported_bytes": stats.bytes}),
        );
    }
    Ok(summary(&rows, soak.lives - RANKS as u64))
}

fn summary(rows: &[Value], replaced: u64) -> Value {
    let judged = &rows[(rows.len() as f64 * WARM_UP) as usize..];
    let spread = |figure: &str| {
        let values: Vec<f64> = judged.iter().filter_map(|row| row[figure].as_f64()).collect();
        let (least, most) = values.iter().fold((f64::INFINITY, 0f64), |(a, b), &v| (a.min(v), b.max(v)));
        rounded(most / least, 4)
    };
    let (heap, resident, reported) =
        (spread("heap_bytes"), spread("resident_bytes"), spread("reported_bytes"));
    eprintln!(
        "soak, most over least after warm-up: heap {heap}, resident {resident}, itself says {reported}"
    );
    json!({"ranks_replaced": replaced, "most_over_least": {"heap": heap, "resident": resident, "reported": reported},
        "rows": rows})
}
