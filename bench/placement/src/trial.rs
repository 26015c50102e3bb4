//! One figure: a policy at a rate, over one seed or several.

use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use forebay_twin::{EngineSide, Outcome, Ran, Rule, Run, Source, Summary};

use crate::options::Options;

/// A policy at a rate. The requests of all seeds are taken together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trial {
    pub workload: &'static str,
    pub policy: String,
    pub rate: f64,
    pub seeds: Vec<u64>,
    /// Requests within the SLO, a second.
    pub goodput: f64,
    pub summary: Summary,
}

/// Runs it.
pub fn trial(
    options: &Options,
    source: &Source,
    rule: Rule,
    rate: f64,
    seeds: impl Iterator<Item = u64>,
) -> Trial {
    let (mut outcomes, mut sides, mut given_up) = (Vec::<Outcome>::new(), Vec::new(), None);
    let mut seeds_run = Vec::new();
    let mut seconds = 0.0;
    for seed in seeds {
        let settings = options.run_settings(rule, seed);
        let sessions = source.sessions(rate, settings.end, seed);
        let Ran { outcomes: more, engines, given_up: why, .. } = Run::new(&settings, &sessions).go();
        seconds += settings.end.since(settings.warm_up).seconds();
        outcomes.extend(more);
        sides.push(engines);
        seeds_run.push(seed);
        given_up = given_up.or(why);
    }
    let mut summary = Summary::of(&outcomes, &options.slo, mean_side(&sides), given_up);
    if given_up.is_some() {
        // What the early requests of a run saw that was given up says nothing about it.
        summary.slo_share = 0.0;
    }
    let goodput = summary.slo_share * outcomes.len() as f64 / seconds;
    Trial {
        workload: options.workload.name(),
        policy: rule.to_string(),
        rate,
        seeds: seeds_run,
        goodput,
        summary,
    }
}

fn mean_side(sides: &[EngineSide]) -> EngineSide {
    let mean = |of: fn(&EngineSide) -> f64| sides.iter().map(of).sum::<f64>() / sides.len().max(1) as f64;
    EngineSide {
        busiest_over_mean: mean(|side| side.busiest_over_mean),
        most_tokens_over_mean: mean(|side| side.most_tokens_over_mean),
        busy: mean(|side| side.busy),
        preemptions: sides.iter().map(|side| side.preemptions).sum(),
        transfers: sides.iter().map(|side| side.transfers).sum(),
        transfers_failed: sides.iter().map(|side| side.transfers_failed).sum(),
        transfer_bytes: sides.iter().map(|side| side.transfer_bytes).sum(),
        gpu_seconds: sides.iter().map(|side| side.gpu_seconds).sum(),
        gpu_seconds_busy: sides.iter().map(|side| side.gpu_seconds_busy).sum(),
    }
}

/// The command `run`.
pub fn run(options: &Options, source: &Source) -> Result<(), String> {
    if !options.json {
        println!("{}", heading());
    }
    for rule in options.rules() {
        let began = Instant::now();
        let trial = trial(options, source, rule, options.rate(), options.seeds(1));
        let wall_seconds = began.elapsed().as_secs_f64();
        if options.json {
            println!("{}", with_wall(&trial, wall_seconds)?);
        } else {
            println!("{}  {wall_seconds:.1}", line(&trial));
        }
    }
    Ok(())
}

fn with_wall(trial: &Trial, wall_seconds: f64) -> Result<Value, String> {
    let mut value = json(trial)?;
    value["wall_seconds"] = json!(wall_seconds);
    Ok(value)
}

/// As JSON.
pub fn json(value: &impl Serialize) -> Result<Value, String> {
    serde_json::to_value(value).map_err(|error| format!("not JSON: {error}"))
}

/// Headings of [`line`].
pub fn heading() -> String {
    format!(
        "{:<18} {:>6} {:>6} {:>7} {:>7} {:>7} {:>7} {:>6} {:>6} {:>7} {:>6} {:>5} {:>5} {:>5} {:>5} {:>6} {:>5} {:>5}",
        "policy",
        "rate",
        "n",
        "ttft",
        "p50",
        "p90",
        "p99",
        "itl",
        "p50",
        "gap99",
        "e2e50",
        "hit",
        "slo",
        "split",
        "busy",
        "b/mean",
        "err50",
        "left"
    )
}

/// One trial for people. Milliseconds, end to end in seconds.
pub fn line(trial: &Trial) -> String {
    let Trial { policy, rate, summary: s, .. } = trial;
    format!(
        "{policy:<18} {rate:>6.2} {:>6} {:>7.1} {:>7.1} {:>7.1} {:>7.1} {:>6.2} {:>6.2} {:>7.1} {:>6.3} {:>5.3} {:>5.3} \
         {:>5.3} {:>5.3} {:>6.3} {:>5.1} {:>5}{}",
        s.requests,
        s.ttft_mean_ms,
        s.ttft_p50_ms,
        s.ttft_p90_ms,
        s.ttft_p99_ms,
        s.itl_mean_ms,
        s.itl_p50_ms,
        s.worst_gap_p99_ms,
        s.e2e_p50_s,
        s.cached_share,
        s.slo_share,
        s.split_share,
        s.engines.busy,
        s.engines.busiest_over_mean,
        s.ttft_beyond_prediction_p50_ms,
        s.unfinished,
        s.given_up.map(|why| format!("  ({why})")).unwrap_or_default()
    )
}
