//! Figures as JSON, and as lines on standard error.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    contender::{Entry, Role},
    speed::ratios,
};

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

pub fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

/// One row a figure: each contender's times, and what the better rival takes over each configuration of ours.
pub fn speed_rows(
    events: &str,
    ranks: usize,
    entries: &[Entry],
    measured: &[(&str, BTreeMap<&str, Vec<f64>>)],
) -> Vec<Value> {
    print_heading(events, ranks, entries);
    let row = |(figure, times): &(&str, BTreeMap<&str, Vec<f64>>)| {
        let mut contenders = Map::new();
        for (name, each) in times {
            let repetitions: Vec<f64> = each.iter().map(|&ns| rounded(ns, 1)).collect();
            let figures = json!({"median": rounded(median(each), 1), "repetitions": repetitions});
            contenders.insert((*name).to_owned(), figures);
        }
        let mut ours = Map::new();
        for entry in entries.iter().filter(|entry| entry.role == Role::Ours) {
            if let Some(ratio) = ratios(entries, entry.name, times) {
                ours.insert(entry.name.to_owned(), ratio);
            }
        }
        print_row(figure, entries, times, &ours);
        json!({"events": events, "ranks": ranks, "figure": figure, "ns": contenders, "ratio": ours})
    };
    measured.iter().map(row).collect()
}

fn print_heading(events: &str, ranks: usize, entries: &[Entry]) {
    eprint!("{:<24}", format!("{events}, {ranks} ranks, ns"));
    entries.iter().for_each(|entry| eprint!("{:>15}", entry.name));
    eprintln!("  ratio: median (worst-best)");
}

fn print_row(figure: &str, entries: &[Entry], times: &BTreeMap<&str, Vec<f64>>, ours: &Map<String, Value>) {
    eprint!("{figure:<24}");
    for entry in entries {
        eprint!("{:>15.1}", times.get(entry.name).map_or(f64::NAN, |each| median(each)));
    }
    for ratio in ours.values() {
        eprint!("  {} ({}-{})", ratio["median"], ratio["worst"], ratio["best"]);
    }
    eprintln!();
}
