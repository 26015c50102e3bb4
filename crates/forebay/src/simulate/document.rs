//! The figures as JSON.

use serde_json::{Value, json};

use super::{Finished, Input};
use crate::cli::SimulateArgs;

/// One document, the same to the byte for the same flags and files.
pub(super) fn render(args: &SimulateArgs, input: &Input, runs: &[Finished]) -> String {
    let runs: Vec<Value> = runs
        .iter()
        .map(|run| {
            let mut of_run =
                json!({ "policy": run.rule.to_string(), "goodput": run.goodput, "summary": run.summary });
            if let Some(fidelity) = &run.fidelity {
                of_run["against"] = json!(fidelity);
            }
            of_run
        })
        .collect();
    let document = json!({
        "version": 1,
        "arrivals": input.arrivals.name,
        "lines_left_out": input.arrivals.skipped,
        "fleet": input.fleet,
        "engines": input.engines.len(),
        "gpus": input.engines.iter().map(|engine| engine.gpus).sum::<u32>(),
        "seed": args.arrivals.seed,
        "warm_up_seconds": input.arrivals.warm_up.seconds(),
        "seconds": input.arrivals.end.seconds(),
        "slo": args.slo,
        "runs": runs,
    });
    format!("{document:#}\n")
}
