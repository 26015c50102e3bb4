//! The page with plots: a template that is filled with one JSON document.

use forebay_twin::{Outcome, Record};
use forebay_types::{Leaning, Role};
use serde_json::{Value, json};

use super::{Finished, Input, figures};
use crate::cli::SimulateArgs;

const TEMPLATE: &str = include_str!("report.html");
/// What the document takes the place of.
const PLACE: &str = "/*DATA*/null/*END*/";
/// Steps from one quantile of a distribution to the next.
const QUANTILES: usize = 200;
/// Points of a line over time.
const POINTS: usize = 120;

/// The page, whole.
pub(super) fn render(args: &SimulateArgs, input: &Input, runs: &[Finished]) -> String {
    let document = json!({
        "title": format!("{} on {}", input.arrivals.name, input.fleet),
        "facts": [
            ["arrivals", input.arrivals.name.clone()],
            ["fleet", input.fleet.clone()],
            ["engines", input.engines.len().to_string()],
            ["seconds", format!("{:.1}", input.arrivals.end.seconds())],
            ["seed", args.arrivals.seed.to_string()],
        ],
        "slo": args.slo,
        "runs": runs.iter().map(|run| one(input, run)).collect::<Vec<_>>(),
    });
    fill(&document)
}

fn fill(document: &Value) -> String {
    // Within a script, `</` could end it, and `<!--` could hide its end.
    let text = document.to_string().replace('<', "\\u003c");
    TEMPLATE.replacen(PLACE, &text, 1)
}

fn one(input: &Input, run: &Finished) -> Value {
    let outcomes = &run.ran.outcomes;
    let of = |value: fn(&Outcome) -> Option<f64>| quantiles(outcomes.iter().filter_map(value).collect());
    let empty = Record::default();
    let record = run.ran.record.as_ref().unwrap_or(&empty);
    let engines = input.engines.iter().zip(&record.samples).enumerate().map(|(number, (engine, samples))| {
        let samples: Vec<Value> = samples
            .iter()
            .map(|sample| {
                let at = round(sample.at_seconds, 3);
                json!([at, sample.waiting, sample.running, round(sample.kv_use, 4), leaning(sample.leaning)])
            })
            .collect();
        json!({ "name": format!("engine-{number}"), "role": role(engine.role), "samples": samples })
    });
    let steps = record.steps.iter().map(|step| {
        let (at, seconds) = (round(step.at_seconds, 5), round(step.seconds, 5));
        json!([step.engine, at, seconds, step.prefill_tokens, step.decodes])
    });
    json!({
        "policy": run.rule.to_string(),
        "table": figures::named(run),
        "distributions": {
            "ttft_ms": of(|outcome| Some(1e3 * outcome.seen.ttft()?)),
            "itl_ms": of(|outcome| Some(1e3 * outcome.seen.itl()?)),
            "worst_gap_ms": of(|outcome| (outcome.seen.tokens > 1).then(|| 1e3 * outcome.seen.worst_gap.seconds())),
            "e2e_s": of(|outcome| outcome.is_finished().then(|| outcome.seen.last.since(outcome.seen.arrived).seconds())),
        },
        "cached": cached(outcomes, run.ran.end.seconds()),
        "engines": engines.collect::<Vec<_>>(),
        "steps": steps.collect::<Vec<_>>(),
        "steps_left_out": record.steps_left_out,
    })
}

/// Values at every half per cent, from the least to the most.
fn quantiles(mut values: Vec<f64>) -> Vec<f64> {
    if values.is_empty() {
        return values;
    }
    values.sort_by(f64::total_cmp);
    let at = |step| round(forebay_twin::percentile(&values, step as f64 / QUANTILES as f64), 4);
    (0..=QUANTILES).map(at).collect()
}

/// Share of prompt tokens that were found in caches, of the requests of each stretch of time.
fn cached(outcomes: &[Outcome], end_seconds: f64) -> Vec<(f64, f64)> {
    let stretch = (end_seconds / POINTS as f64).max(1e-9);
    let mut sums = vec![(0_u64, 0_u64); POINTS];
    for outcome in outcomes.iter().filter(|outcome| outcome.seen.first.is_some()) {
        let place = (outcome.seen.arrived.seconds() / stretch) as usize;
        let (cached, all) = &mut sums[place.min(POINTS - 1)];
        *cached += u64::from(outcome.cached_tokens);
        *all += u64::from(outcome.prompt_tokens);
    }
    let points = sums.into_iter().enumerate().filter(|(_, (_, all))| *all > 0);
    points
        .map(|(place, (cached, all))| {
            (round((place as f64 + 0.5) * stretch, 3), round(cached as f64 / all as f64, 4))
        })
        .collect()
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * scale).round() / scale
}

fn leaning(leaning: Leaning) -> u8 {
    match leaning {
        Leaning::Neither => 0,
        Leaning::Prefill => 1,
        Leaning::Decode => 2,
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Both => "both",
        Role::Prefill => "prefill",
        Role::Decode => "decode",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_has_one_place_and_asks_nobody_for_anything() {
        assert_eq!(TEMPLATE.matches(PLACE).count(), 1);
        for outside in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!TEMPLATE.contains(outside), "{outside}");
        }
    }

    #[test]
    fn no_name_ends_the_script() {
        let page = fill(&json!({ "title": "</script><!-- /*DATA*/null/*END*/" }));
        assert_eq!(page.matches("</script>").count(), TEMPLATE.matches("</script>").count());
        assert!(page.contains("\\u003c/script>"), "and it is said all the same");
    }

    #[test]
    fn quantiles_go_from_the_least_to_the_most() {
        let found = quantiles((0..=1000).rev().map(f64::from).collect());
        assert_eq!((found.len(), found[0], found[100], found[200]), (201, 0.0, 500.0, 1000.0));
        assert!(quantiles(Vec::new()).is_empty());
    }
}
