//! The simulation against recorded runs of a real engine.

use std::time::Instant;

use forebay_placement::Policy;
use serde_json::{Value, json};

use forebay_twin::{
    Measured, Outcome, Ran, Rule, Run, RunSettings, Time, Workload, mean, percentile, recorded,
};

use crate::options::Options;

/// The command `check`: replays each file on one engine.
pub fn check(options: &Options) -> Result<(), String> {
    if options.files.is_empty() {
        return Err("check needs the file of a recorded run".to_owned());
    }
    for path in &options.files {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let began = Instant::now();
        let (measured, outcomes) =
            replay(options, &text).map_err(|problem| format!("{}: {problem}", path.display()))?;
        let rows = compare(&measured, &outcomes);
        if options.json {
            let rows: Vec<Value> = rows.iter().map(Row::json).collect();
            let wall_seconds = began.elapsed().as_secs_f64();
            println!(
                "{}",
                json!({ "file": path.file_name().map(|name| name.to_string_lossy()), "requests": measured.len(),
                    "rows": rows, "wall_seconds": wall_seconds })
            );
            continue;
        }
        println!("{}: {} requests", path.display(), measured.len());
        println!("{:<12} {:<5} {:>10} {:>10} {:>8}", "ms", "", "measured", "simulated", "error");
        for row in rows {
            let Row { what, figure, measured, simulated } = row;
            println!(
                "{what:<12} {figure:<5} {measured:>10.1} {simulated:>10.1} {:>+7.1}%",
                100.0 * row.error()
            );
        }
    }
    Ok(())
}

fn replay(options: &Options, text: &str) -> Result<(Vec<Measured>, Vec<Outcome>), String> {
    let (measured, sessions) = recorded(text)?;
    let last = measured.last().ok_or("no requests")?.at;
    let one = Options { workload: Workload::Fresh, engines: Some(1), ..options.clone() };
    let settings = RunSettings {
        warm_up: Time::ZERO,
        end: Time::from_seconds(last + 1.0),
        ..one.run_settings(Rule::Policy(Policy::RoundRobin), 1)
    };
    let Ran { outcomes, given_up, .. } = Run::new(&settings, &sessions).go();
    match given_up {
        Some(why) => Err(why.to_owned()),
        None => Ok((measured, outcomes)),
    }
}

struct Row {
    what: &'static str,
    figure: &'static str,
    measured: f64,
    simulated: f64,
}

impl Row {
    fn error(&self) -> f64 {
        self.simulated / self.measured - 1.0
    }

    fn json(&self) -> Value {
        let Self { what, figure, measured, simulated } = self;
        json!({ "what": what, "figure": figure, "measured_ms": measured, "simulated_ms": simulated, "error": self.error() })
    }
}

fn compare(measured: &[Measured], outcomes: &[Outcome]) -> Vec<Row> {
    let sorted = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values
    };
    let of = |value: fn(&Measured) -> f64| sorted(measured.iter().map(value).collect());
    let ours = |value: fn(&Outcome) -> Option<f64>| {
        sorted(outcomes.iter().filter_map(value).map(|seconds| 1e3 * seconds).collect())
    };
    let pairs = [
        ("ttft", of(|it| it.ttft), ours(|it| it.seen.ttft())),
        ("itl", of(|it| it.itl_mean), ours(|it| it.seen.itl())),
        ("e2e", of(|it| it.e2e), ours(|it| Some(it.seen.last.since(it.seen.arrived).seconds()))),
        ("worst gap", of(|it| it.itl_max), ours(|it| Some(it.seen.worst_gap.seconds()))),
    ];
    let rows = pairs.into_iter().flat_map(|(what, measured, simulated)| {
        let row = |figure, of: fn(&[f64]) -> f64| Row {
            what,
            figure,
            measured: of(&measured),
            simulated: of(&simulated),
        };
        [
            row("mean", mean),
            row("p50", |values| percentile(values, 0.5)),
            row("p90", |values| percentile(values, 0.9)),
        ]
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options::parse(["check".to_owned()].into_iter()).unwrap()
    }

    /// Bounds as measured, rounded up: the model must not get worse unnoticed.
    #[test]
    fn recorded_runs_are_met_within_their_bounds() {
        let runs = [
            (include_str!("../../../crates/twin/recorded/agg1-r2-i2000-o200.jsonl"), 0.06),
            (include_str!("../../../crates/twin/recorded/agg1-r6-i2000-o200.jsonl"), 0.06),
        ];
        for (text, bound) in runs {
            let (measured, outcomes) = replay(&options(), text).unwrap();
            for row in compare(&measured, &outcomes).into_iter().filter(|row| row.what != "worst gap") {
                assert!(row.error().abs() < bound, "{} {}: {:+.3}", row.what, row.figure, row.error());
            }
        }
    }
}
