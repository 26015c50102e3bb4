//! CPU time of stores, removals and look-ups: every contender in every repetition, in rotating order.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{
    agreement::{Sample, State},
    contender::{Contender, Entry, OPAQUE, Role, STEPS},
    machine,
    options::Options,
    report,
    workload::{Event, Query, Shape, Workload, blocks_of},
};

/// Figure, in the order measured -> contender -> ns each, a repetition each.
type Measured = Vec<(&'static str, BTreeMap<&'static str, Vec<f64>>)>;

/// Stores and removals of one shape, and the queries, if look-ups are asked for.
struct Phases {
    stores: Vec<Event>,
    removes: Vec<Event>,
    queries: Vec<(&'static str, Vec<Query>)>,
}

/// Events of whole chains and look-ups, for every number of ranks.
pub fn chains(options: &Options, entries: &[Entry]) -> Result<Vec<Value>, String> {
    let entries = &without(entries, &[STEPS, OPAQUE])[..];
    let mut rows = vec![];
    for &ranks in &options.ranks {
        let workload = workload(options, ranks);
        let Shape { depth, shared, seed, .. } = workload.shape;
        let queries = |known, salt| workload.queries(options.queries, known, seed.wrapping_add(salt));
        let phases = Phases {
            stores: workload.stores.clone(),
            removes: workload.removes.clone(),
            queries: vec![
                ("full-hit", queries(depth, 2)),
                ("shared-hit", queries(shared, 3)),
                ("miss", queries(0, 4)),
            ],
        };
        let measured = repeat(options, entries, &workload, &phases)?;
        rows.extend(report::speed_rows("chains", ranks, entries, &measured));
    }
    Ok(rows)
}

/// Events of one block, as decode sends them, at 8 ranks.
pub fn single_blocks(options: &Options, entries: &[Entry]) -> Result<Vec<Value>, String> {
    const RANKS: usize = 8;
    let entries = &without(entries, &[OPAQUE])[..];
    let workload = workload(options, RANKS);
    let phases = Phases {
        stores: workload.one_block_events(&workload.stores),
        removes: workload.one_block_events(&workload.removes),
        queries: vec![],
    };
    let measured = repeat(options, entries, &workload, &phases)?;
    Ok(report::speed_rows("single", RANKS, entries, &measured))
}

fn without(entries: &[Entry], names: &[&str]) -> Vec<Entry> {
    entries.iter().filter(|entry| !names.contains(&entry.name)).copied().collect()
}

pub fn workload(options: &Options, ranks: usize) -> Workload {
    let &Options { blocks, depth, shared, seed, .. } = options;
    Workload::new(Shape { blocks, depth, shared, ranks, seed })
}

fn repeat(
    options: &Options,
    entries: &[Entry],
    workload: &Workload,
    phases: &Phases,
) -> Result<Measured, String> {
    let sample = Sample::new(workload);
    let mut measured = Measured::new();
    for repetition in 0..options.repetitions {
        for place in 0..entries.len() {
            let entry = &entries[(place + repetition) % entries.len()];
            for (figure, ns) in turn(entry, workload, phases, &sample)? {
                if !measured.iter().any(|(known, _)| *known == figure) {
                    measured.push((figure, BTreeMap::new()));
                }
                let (_, contenders) =
                    measured.iter_mut().find(|(known, _)| *known == figure).expect("pushed just now");
                contenders.entry(entry.name).or_default().push(ns);
            }
        }
        eprint!(".");
    }
    eprintln!();
    Ok(measured)
}

/// One contender from empty to full, emptied and full again; its answers are checked in every state.
fn turn(
    entry: &Entry,
    workload: &Workload,
    phases: &Phases,
    sample: &Sample,
) -> Result<Vec<(&'static str, f64)>, String> {
    machine::trim_heap();
    let mut owned = (entry.new)();
    let contender = owned.as_mut();
    let mut figures = vec![("store", apply(contender, workload, &phases.stores))];
    sample.check(entry.name, contender, workload, State::Filled)?;
    for (figure, queries) in &phases.queries {
        contender.prepare_queries(workload, queries);
        let (ns, found) = timed(queries.len(), || contender.look_up());
        if entry.role != Role::Floor && (found > 0) != (*figure != "miss") {
            return Err(format!("WRONG ANSWER: {}, {figure}: {found} ranks found", entry.name));
        }
        figures.push((figure, ns));
    }
    contender.prepare_queries(workload, &[]);
    figures.push(("remove", apply(contender, workload, &phases.removes)));
    sample.check(entry.name, contender, workload, State::Emptied)?;
    figures.push(("refill", apply(contender, workload, &phases.stores)));
    sample.check(entry.name, contender, workload, State::Filled)?;
    Ok(figures)
}

fn apply(contender: &mut dyn Contender, workload: &Workload, events: &[Event]) -> f64 {
    contender.prepare(workload, events);
    timed(blocks_of(events), || contender.apply()).0
}

/// CPU time of `work` in ns, divided by `count`.
fn timed<T>(count: usize, work: impl FnOnce() -> T) -> (f64, T) {
    let began = machine::process_cpu();
    let result = work();
    ((machine::process_cpu() - began).as_nanos() as f64 / count as f64, result)
}

/// The better rival's time over `ours`, repetition by repetition: above 1, ours is faster.
pub fn ratios(entries: &[Entry], ours: &str, contenders: &BTreeMap<&str, Vec<f64>>) -> Option<Value> {
    let of = |name: &str| contenders.get(name);
    let rivals: Vec<_> =
        entries.iter().filter(|entry| entry.role == Role::Rival).filter_map(|entry| of(entry.name)).collect();
    let ours = of(ours)?;
    let better = |at: usize| rivals.iter().map(|times| times[at]).reduce(f64::min);
    let ratios = (0..ours.len()).map(|at| Some(better(at)? / ours[at])).collect::<Option<Vec<f64>>>()?;
    let (worst, best) = (ratios.iter().copied().reduce(f64::min)?, ratios.iter().copied().reduce(f64::max)?);
    let median = report::rounded(report::median(&ratios), 3);
    let repetitions: Vec<f64> = ratios.iter().map(|&each| report::rounded(each, 3)).collect();
    Some(json!({"median": median, "worst": report::rounded(worst, 3), "best": report::rounded(best, 3),
        "repetitions": repetitions}))
}
