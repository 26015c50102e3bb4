//! All policies of a workload beside each other.

use std::time::Instant;

use forebay_placement::Policy;
use serde_json::json;

use forebay_twin::{Rule, Source};

use crate::{
    goodput::{Goodput, SEEDS, search},
    options::Options,
    trial::{self, trial},
};

/// Shares of the rate that least-load can carry, at which the policies are shown.
const SHARES: [f64; 3] = [0.4, 0.7, 0.95];

/// The command `table`: goodput of every policy, then every policy at three rates.
pub fn table(options: &Options, source: &Source) -> Result<(), String> {
    let began = Instant::now();
    eprintln!("{}", trial::heading());
    let rules = options.rules();
    let found: Vec<Goodput> = rules.iter().map(|&rule| search(options, source, rule)).collect();
    let baseline = Rule::Policy(Policy::LeastLoad);
    let capacity = match rules.iter().position(|&rule| rule == baseline) {
        Some(index) => found[index].rate,
        None => search(options, source, baseline).rate,
    };
    let mut cells = Vec::new();
    eprintln!("\nat {SHARES:?} of {capacity}/s, which least-load carries\n{}", trial::heading());
    for share in SHARES {
        for &rule in rules.iter().filter(|_| capacity > 0.0) {
            let trial = trial(options, source, rule, share * capacity, options.seeds(SEEDS));
            eprintln!("{}", trial::line(&trial));
            cells.push(json!({ "share": share, "trial": trial::json(&trial)? }));
        }
    }
    eprintln!("\n{:<18} {:>8} {:>14}", "policy", "goodput", "of least-load");
    for Goodput { policy, rate, .. } in &found {
        eprintln!("{policy:<18} {rate:>8.2} {:>14.2}", rate / capacity.max(f64::MIN_POSITIVE));
    }
    let document = json!({
        "bench": "placement",
        "workload": options.workload.name(),
        "engines": options.engines(),
        "slo": options.slo,
        "capacity": capacity,
        "goodput": found,
        "cells": cells,
        "wall_seconds": began.elapsed().as_secs_f64(),
    });
    println!("{document:#}");
    Ok(())
}
