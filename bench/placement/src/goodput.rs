//! The highest rate at which a policy keeps its promise.

use serde::Serialize;
use serde_json::json;

use forebay_twin::{Rule, Source};

use crate::{
    options::Options,
    trial::{self, Trial, trial},
};

/// Share of requests that must be within the SLO.
pub const SHARE_MIN: f64 = 0.95;
/// Seeds of a search, unless told otherwise.
pub const SEEDS: u64 = 3;
/// Steps of the rate up to which a search goes.
const STEPS_MAX: u32 = 4096;

/// What a search found.
#[derive(Debug, Clone, Serialize)]
pub struct Goodput {
    pub policy: String,
    /// Requests a second; 0 if the lowest rate was too much.
    pub rate: f64,
    pub rate_step: f64,
    /// Of the highest rate that held; nothing if none did.
    pub at: Option<Trial>,
    pub trials: u32,
}

/// Searches for it: from the workload's usual rate up or down, then by halves, in whole steps. Where more load is not
/// worse the answer is the highest; else it is one above which the next step failed.
pub fn search(options: &Options, source: &Source, rule: Rule) -> Goodput {
    let step = options.rate_step();
    let mut trials = 0;
    let mut held: Option<Trial> = None;
    let mut try_at = |steps: u32| {
        trials += 1;
        let trial = trial(options, source, rule, f64::from(steps) * step, options.seeds(SEEDS));
        eprintln!("{}", trial::line(&trial));
        let holds = trial.summary.slo_share >= SHARE_MIN;
        if holds && held.as_ref().is_none_or(|held| held.rate < trial.rate) {
            held = Some(trial);
        }
        holds
    };
    let usual = ((options.rate() / step).round() as u32).max(1);
    let steps = highest(usual, &mut try_at);
    Goodput { policy: rule.to_string(), rate: f64::from(steps) * step, rate_step: step, at: held, trials }
}

/// The highest number that `holds`, if every lower one does; 0 if none.
fn highest(first: u32, mut holds: impl FnMut(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, first);
    while holds(high) {
        low = high;
        if high >= STEPS_MAX {
            return high;
        }
        high += (high / 3).max(1);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

/// The command `goodput`.
pub fn goodput(options: &Options, source: &Source) -> Result<(), String> {
    eprintln!("{}", trial::heading());
    let found: Vec<Goodput> = options.rules().into_iter().map(|rule| search(options, source, rule)).collect();
    println!("{:#}", json!({ "bench": "placement", "workload": options.workload.name(), "goodput": found }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_that_holds_is_found_in_few_tries() {
        for limit in 0..200 {
            for first in [1, 7, 44, 150] {
                let mut tries = 0;
                let found = highest(first, |steps| {
                    tries += 1;
                    steps <= limit
                });
                assert_eq!(found, limit, "from {first}");
                assert!(tries <= 26, "{tries} tries for {limit} from {first}");
            }
        }
    }
}
