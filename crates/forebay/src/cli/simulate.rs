//! The command lines of `simulate` and `size`.

use std::{path::PathBuf, str::FromStr};

use clap::Args;
use forebay_twin::{Rule, SLO, Slo, TraceForm, Workload};

use crate::settings::parse_duration;

/// What arrives at a simulated fleet.
#[derive(Debug, Args)]
pub(crate) struct ArrivalArgs {
    /// What arrives: a trace, or a directory of clients as ServeGen publishes them.
    #[arg(long, value_name = "FILE", conflicts_with = "workload")]
    pub(crate) trace: Option<PathBuf>,
    /// The trace's form: mooncake, azure or forebay; by its first line if left out.
    #[arg(long, value_name = "FORM", requires = "trace")]
    pub(crate) form: Option<TraceForm>,
    /// Leave out lines of the trace that are wrong, and say how many.
    #[arg(long, requires = "trace")]
    pub(crate) skip_bad: bool,
    /// What arrives: a generator. five-turn, fresh, stand-in, moe, agent, document or bursts.
    #[arg(long, value_name = "NAME", value_parser = workload)]
    pub(crate) workload: Option<Workload>,
    /// Seconds of the trace's own time at which to begin.
    #[arg(long, value_name = "SECONDS", requires = "trace", default_value_t = 0.0, value_parser = not_negative)]
    pub(crate) from: f64,
    /// The trace's pace, such as x2 for twice as fast.
    #[arg(long, value_name = "SPEED", requires = "trace", conflicts_with = "rate", value_parser = speed)]
    pub(crate) speed: Option<f64>,
    /// Requests a second, in the mean.
    #[arg(long, value_name = "RATE", value_parser = positive)]
    pub(crate) rate: Option<f64>,
    /// Seconds of arrivals.
    #[arg(long, value_name = "SECONDS", value_parser = positive)]
    pub(crate) seconds: Option<f64>,
    /// Seconds before requests count.
    #[arg(long, value_name = "SECONDS", value_parser = not_negative)]
    pub(crate) warm_up: Option<f64>,
    /// First of the numbers that workloads and ties are drawn from. One seed, one result, to the byte.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

/// Flags of `simulate`.
#[derive(Debug, Args)]
pub(crate) struct SimulateArgs {
    /// The fleet: a TOML file with `[[engine]]` tables.
    ///
    /// Each has `count`, `profile` (a name built in, or a file), and where it is not as vLLM starts an 8B model on an 80 GB GPU:
    /// `role`, `dp_ranks`, `gpus`, `blocks` or `memory_gib`, `memory_share`, `weights_gib` and `activations_gib`,
    /// `kv_bytes_per_token`, `block_size_tokens`, `step_tokens_max`, `chunk_tokens_max`, `sequences_max`, `waiting_max`,
    /// `context_tokens_max`, `hand_over` (cross-layer, per-layer, none), `imports_first`, `startup_seconds`, and `link` with
    /// `gigabytes_per_second`, `start_ms`, `descriptor_us` and `layers`. A `[gateway]` table has `count`, `sight` (steps, sampled),
    /// `first_token` (prefill, decode) and `report_delay_ms`. Each `[[fault]]` table has `at`,
    /// `seconds` and `kind` (crash, vanish, hang, slow, drain, events, stale-load, transfers, gateway-loss, registry-away, skew,
    /// clients-leave), and `engine`, `to`, `gateway`, `factor`, `share`, `doubled`, `late` or `skew`, as the kind needs.
    #[arg(long, value_name = "FILE")]
    pub(crate) fleet: Option<PathBuf>,
    /// So many engines of the usual kind, in place of a fleet file.
    #[arg(long, value_name = "N", conflicts_with = "fleet", default_value_t = 4)]
    pub(crate) engines: u32,
    /// What arrives.
    #[command(flatten)]
    pub(crate) arrivals: ArrivalArgs,
    /// Who chooses engines. Repeat the flag or separate with commas to compare; `all` for every policy.
    #[arg(long, value_name = "POLICY", value_delimiter = ',', default_value = "cost")]
    pub(crate) policy: Vec<String>,
    /// What a client is promised, such as ttft=500ms,itl=25ms. `prefills=2` adds twice an idle engine's time for the prompt.
    #[arg(long, value_name = "SLO", default_value = "ttft=500ms,prefills=2,itl=25ms", value_parser = slo)]
    pub(crate) slo: Slo,
    /// Write a page with plots here. It needs nothing but a browser.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) report: Option<PathBuf>,
    /// Write the figures as JSON here; `-` for standard output, in place of the table.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Runs at a time; by default one for each processor.
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<std::num::NonZeroUsize>,
    /// Replay a file that `forebay serve --record` wrote, and compare: what is predicted beside what was measured.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["trace", "workload", "chaos", "speed", "rate"])]
    pub(crate) against: Option<PathBuf>,
    /// Draw fleet, load and faults from the seed, and check after every event what must hold; seed after seed, from `--seed`
    /// on, until one fails.
    #[arg(long, conflicts_with_all = ["trace", "workload", "fleet", "report", "json"])]
    pub(crate) chaos: bool,
    /// Seeds to run.
    #[arg(long, value_name = "N", requires = "chaos", default_value_t = 1)]
    pub(crate) seeds: u64,
    /// Print all that happens.
    #[arg(long, requires = "chaos")]
    pub(crate) log: bool,
}

/// Flags of `size`.
#[derive(Debug, Args)]
pub(crate) struct SizeArgs {
    /// What the engines take: a profile's name or file. Otherwise they are as vLLM starts an 8B model on an 80 GB GPU.
    #[arg(long, value_name = "PROFILE", default_value = "h100-llama8b")]
    pub(crate) profile: String,
    /// A fleet file whose first `[[engine]]` is what the fleet is built from, in place of a profile.
    #[arg(long, value_name = "FILE", conflicts_with = "profile")]
    pub(crate) fleet: Option<PathBuf>,
    /// What arrives.
    #[command(flatten)]
    pub(crate) arrivals: ArrivalArgs,
    /// What a client is promised. `prefills=2` adds twice an idle engine's time for the prompt to `ttft`.
    #[arg(long, value_name = "SLO", default_value = "ttft=500ms,itl=30ms", value_parser = slo)]
    pub(crate) slo: Slo,
    /// Of how many requests each of them is kept: p50 to p99.9.
    #[arg(long, value_name = "P", default_value = "p90", value_parser = share)]
    pub(crate) percentile: f64,
    /// GPUs of the largest fleet to try.
    #[arg(long, value_name = "N", default_value_t = std::num::NonZeroU32::new(64).expect("not 0"))]
    pub(crate) gpus: std::num::NonZeroU32,
    /// Write a page with the frontier, goodput by GPUs, here. It needs nothing but a browser.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) report: Option<PathBuf>,
    /// Write every fleet tried as JSON here; `-` for standard output, in place of the tables.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Runs at a time; by default one for each processor.
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<std::num::NonZeroUsize>,
}

impl SimulateArgs {
    /// The rules to compare, in the order given.
    ///
    /// # Errors
    /// Names one that is none.
    pub(crate) fn rules(&self) -> Result<Vec<Rule>, String> {
        let mut rules = Vec::new();
        for name in &self.policy {
            let named = match name.as_str() {
                "all" => Rule::all(1, false),
                name => vec![name.parse()?],
            };
            for rule in named {
                if rule.engines().is_some() {
                    return Err(format!("{rule}: roles are the fleet's; set `role` in the fleet file"));
                }
                if !rules.contains(&rule) {
                    rules.push(rule);
                }
            }
        }
        Ok(rules)
    }
}

fn workload(text: &str) -> Result<Workload, String> {
    match Workload::from_str(text)? {
        Workload::Trace => Err("give the file with --trace".to_owned()),
        workload => Ok(workload),
    }
}

pub(super) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("expected a number above 0".to_owned()),
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a number from 0 up".to_owned()),
    }
}

fn speed(text: &str) -> Result<f64, String> {
    positive(text.strip_prefix('x').unwrap_or(text)).map_err(|_| "expected a pace such as x2".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    match text.strip_prefix('p').unwrap_or(text).parse::<f64>() {
        Ok(percent) if (50.0..=99.9).contains(&percent) => Ok(percent / 100.0),
        _ => Err("expected a percentile from p50 to p99.9".to_owned()),
    }
}

pub(super) fn slo(text: &str) -> Result<Slo, String> {
    let mut slo = Slo { ttft_prefills: 0.0, ..SLO };
    for part in text.split(',') {
        let (name, value) =
            part.split_once('=').ok_or_else(|| format!("`{part}` is not NAME=VALUE, such as ttft=500ms"))?;
        let duration = || {
            let duration = parse_duration(value).map(|duration| duration.as_secs_f64());
            duration.ok_or_else(|| format!("`{value}` is no duration such as 500ms"))
        };
        match name {
            "ttft" => slo.ttft_seconds = duration()?,
            "itl" => slo.itl_seconds = duration()?,
            "prefills" => slo.ttft_prefills = not_negative(value)?,
            _ => return Err(format!("unknown promise `{name}`; there are ttft, itl and prefills")),
        }
    }
    Ok(slo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_are_read() {
        let read = slo("ttft=300ms,itl=20ms").unwrap();
        assert_eq!((read.ttft_seconds, read.itl_seconds, read.ttft_prefills), (0.3, 0.02, 0.0));
        assert_eq!(slo("prefills=2").unwrap(), SLO);
        for wrong in ["", "ttft", "ttft=x", "e2e=2s", "prefills=-1"] {
            assert!(slo(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn paces_and_workloads_are_read() {
        assert_eq!((speed("x2"), speed("0.5")), (Ok(2.0), Ok(0.5)));
        assert!(speed("x0").is_err() && speed("fast").is_err());
        assert_eq!(workload("agent"), Ok(Workload::Agent));
        assert_eq!((share("p90"), share("99")), (Ok(0.9), Ok(0.99)));
        assert!(share("p100").is_err() && share("half").is_err());
        assert!(workload("trace").unwrap_err().contains("--trace"));
        assert!(workload("x").unwrap_err().contains("five-turn"));
    }
}
