//! The prefix index against those of dynamo-kv-router, in one run on the same stream of events.
//!
//! One JSON document out, readable lines on standard error. `bench/README.md` says what the figures mean, `bench/index.py`
//! holds them against their bars. Start at [`measure`]; what is compared is in [`contender`], with what in [`workload`].

mod agreement;
mod churn;
mod contender;
mod dynamo;
mod forebay;
mod machine;
mod memory;
mod opaque;
mod options;
mod pauses;
mod report;
mod soak;
mod speed;
mod turn;
mod workload;

use std::process::ExitCode;

use serde_json::{Value, json};

use crate::{
    contender::{CONTENDERS, Entry, Role},
    options::Options,
};

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).and_then(|options| measure(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), String> {
    let cores = machine::cores();
    let core = options.core.or(cores.last().copied()).ok_or("no core to run on")?;
    let entries = entries(options)?;
    let mut document = json!({
        "bench": "index",
        "rival": "dynamo-kv-router 1.6.1",
        "machine": {"processor": machine::processor(), "cores": cores.len(), "core": core},
        "workload": {"blocks": options.blocks, "depth": options.depth, "shared": options.shared,
            "queries": options.queries, "repetitions": options.repetitions, "seed": options.seed},
    });
    // Churn comes first, while threads may still use every core.
    if options.runs("churn") {
        document["churn"] = churn::run(options, &cores);
    }
    machine::pin(&[core]);
    let mut speed = vec![];
    if options.runs("speed") {
        speed.extend(speed::chains(options, &entries)?);
    }
    if options.runs("single") {
        speed.extend(speed::single_blocks(options, &entries)?);
    }
    document["speed"] = json!(speed);
    if options.runs("memory") {
        document["memory"] = json!(memory::run(options, &entries));
    }
    if options.runs("pauses") {
        document["pauses"] = json!(pauses::run(options, &entries));
    }
    if options.runs("turn") {
        document["turn"] = turn::run(options);
    }
    if options.soak > 0 && options.runs("soak") {
        document["soak"] = soak::run(options)?;
    }
    write(options, &document)
}

fn entries(options: &Options) -> Result<Vec<Entry>, String> {
    let asked = &options.contenders;
    let known = |name: &String| CONTENDERS.iter().any(|entry| entry.name == name);
    if let Some(name) = asked.iter().find(|name| !known(name)) {
        return Err(format!("--contenders {name}: no such contender\n{}", options::USAGE));
    }
    let runs = |entry: &&Entry| {
        if asked.is_empty() { entry.role != Role::Extra } else { asked.iter().any(|name| name == entry.name) }
    };
    Ok(CONTENDERS.iter().filter(runs).copied().collect())
}

fn write(options: &Options, document: &Value) -> Result<(), String> {
    let text = format!("{document:#}\n");
    match &options.out {
        Some(path) => std::fs::write(path, text).map_err(|problem| format!("{}: {problem}", path.display())),
        None => {
            print!("{text}");
            Ok(())
        }
    }
}
