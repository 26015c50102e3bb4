//! Bytes a block: what malloc has handed out after filling, less before, at several phases of growth.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::{
    contender::{Contender, Entry, Role, STEPS},
    machine,
    options::Options,
    report::rounded,
    workload::{Event, Shape, Workload, blocks_of},
};

/// Shares of `--blocks` distinct blocks at which bytes are read: a growing table is fullest just before it grows.
const PHASES: [f64; 4] = [0.55, 0.7, 0.85, 1.0];
/// Events prepared at a time, so that what holds them stays small beside the index.
const EVENTS_AT_A_TIME: usize = 512;

pub fn run(options: &Options, entries: &[Entry]) -> Vec<Value> {
    let indexes: Vec<&Entry> =
        entries.iter().filter(|entry| entry.role != Role::Floor && entry.name != STEPS).collect();
    let mut rows = vec![];
    for &ranks in &options.ranks {
        // Distinct blocks are what counts here: a longer stream makes up for those that sequences share.
        let blocks = options.blocks * options.depth / (options.depth - options.shared) + options.depth;
        let &Options { depth, shared, seed, .. } = options;
        let workload = Workload::new(Shape { blocks, depth, shared, ranks, seed });
        for entry in &indexes {
            rows.extend(fill(options, entry, &workload));
        }
    }
    rows
}

fn apply(contender: &mut dyn Contender, workload: &Workload, events: &[Event]) {
    for some in events.chunks(EVENTS_AT_A_TIME) {
        contender.prepare(workload, some);
        contender.apply();
    }
}

/// Fills one index, phase by phase; with one rank, then repeats the same chains on a second and a third.
fn fill(options: &Options, entry: &Entry, workload: &Workload) -> Vec<Value> {
    machine::trim_heap();
    let ends = phase_ends(options.blocks, workload);
    let before = machine::heap_bytes();
    let mut contender = (entry.new)();
    let (mut rows, mut from, mut pairs) = (vec![], 0, 0);
    for (distinct, end) in ends {
        let events = &workload.stores[from..end];
        apply(contender.as_mut(), workload, events);
        (from, pairs) = (end, pairs + blocks_of(events));
        let bytes = machine::heap_bytes().saturating_sub(before);
        rows.push(row(entry, workload.shape.ranks, contender.as_ref(), bytes, distinct, pairs));
    }
    if workload.shape.ranks == 1 {
        let mut filled = machine::heap_bytes();
        for rank in 1..3 {
            let again: Vec<Event> =
                workload.stores[..from].iter().map(|event| Event { rank, ..*event }).collect();
            let own = machine::heap_bytes().saturating_sub(filled);
            apply(contender.as_mut(), workload, &again);
            let now = machine::heap_bytes().saturating_sub(own);
            let each = now.saturating_sub(filled) as f64 / blocks_of(&again) as f64;
            eprintln!("memory, {}: {each:.1} B a block on rank {}, which another has", entry.name, rank + 1);
            rows.push(json!({"contender": entry.name, "figure": "further-rank", "rank": rank + 1,
                "bytes_per_block": rounded(each, 2)}));
            drop(again);
            filled = machine::heap_bytes();
        }
    }
    contender.check().expect("the workload is sound");
    rows
}

fn row(
    entry: &Entry,
    ranks: usize,
    contender: &dyn Contender,
    bytes: u64,
    distinct: usize,
    pairs: usize,
) -> Value {
    let (per_block, per_pair) = (bytes as f64 / distinct as f64, bytes as f64 / pairs as f64);
    let reported = contender.reported();
    eprint!("memory, {}, {ranks} ranks, {distinct} blocks: {per_block:.1} B a distinct block, ", entry.name);
    eprint!("{per_pair:.1} a pair");
    let said = reported.as_ref().map(|said| said.bytes as f64 / distinct as f64);
    said.iter().for_each(|said| eprint!("; itself says {said:.1}"));
    let names = reported.as_ref().map_or(0, |said| said.bytes_names);
    let without_names = bytes.saturating_sub(names) as f64 / distinct as f64;
    if names > 0 {
        eprint!("; {without_names:.1} without its table of all blocks");
    }
    eprintln!();
    json!({"contender": entry.name, "figure": "fill", "ranks": ranks, "distinct_blocks": distinct, "pairs": pairs,
        "heap_bytes": bytes, "bytes_per_distinct_block": rounded(per_block, 2), "bytes_per_pair": rounded(per_pair, 2),
        "without_names_per_block": rounded(without_names, 2),
        "reported_bytes": reported.as_ref().map(|said| said.bytes), "reported_blocks": reported.map(|said| said.blocks)})
}

/// For each phase: how many distinct blocks there are, and after which event.
fn phase_ends(blocks: usize, workload: &Workload) -> Vec<(usize, usize)> {
    let mut seen = HashSet::new();
    let mut distinct = 0;
    let mut ends = vec![];
    let mut phases = PHASES.iter().map(|share| (share * blocks as f64) as usize).peekable();
    for (number, event) in workload.stores.iter().enumerate() {
        let sequence = &workload.sequences[event.sequence as usize];
        let first_of_group = event.from == 0 && seen.insert(sequence.chained[0]);
        let known = if event.from == 0 && !first_of_group { workload.shape.shared } else { 0 };
        distinct += event.blocks() - known;
        while phases.next_if(|&phase| distinct >= phase).is_some() {
            ends.push((distinct, number + 1));
        }
    }
    ends
}
