//! The figures of runs, for people: a row for each policy.

use forebay_twin::Rule;

use super::{Finished, Input};
use crate::{
    figures::{bytes, percent},
    table::{Align, Cell, Table},
    terminal::{Paint, Tone},
};

/// Every figure of a run, with its name; the same names in the same order for every run.
pub(super) fn named(finished: &Finished) -> Vec<(&'static str, String)> {
    let s = &finished.summary;
    let three = |p50: f64, p90: f64, p99: f64| format!("{} / {} / {}", short(p50), short(p90), short(p99));
    vec![
        ("requests", s.requests.to_string()),
        ("goodput, requests/s within the SLO", format!("{:.2}", finished.goodput)),
        ("within the SLO", percent(s.slo_share, 1.0)),
        ("TTFT P50 / P90 / P99, ms", three(s.ttft_p50_ms, s.ttft_p90_ms, s.ttft_p99_ms)),
        ("ITL P50 / P90 / P99, ms", three(s.itl_p50_ms, s.itl_p90_ms, s.itl_p99_ms)),
        ("worst gap P99, ms", short(s.worst_gap_p99_ms)),
        ("E2E P50 / P90 / P99, s", three(s.e2e_p50_s, s.e2e_p90_s, s.e2e_p99_s)),
        ("found in caches", percent(s.cached_share, 1.0)),
        ("split", percent(s.split_share, 1.0)),
        ("hand-overs", s.engines.transfers.to_string()),
        ("moved", bytes(s.engines.transfer_bytes)),
        ("GPU seconds", format!("{:.0}", s.engines.gpu_seconds)),
        ("of those busy", percent(s.engines.gpu_seconds_busy, s.engines.gpu_seconds)),
        ("preemptions", s.engines.preemptions.to_string()),
        ("Jain's index over tenants", format!("{:.3}", s.tenants_jain)),
        ("rejected", s.rejected.to_string()),
        ("failed", s.failed.to_string()),
        ("placed again before a first token", s.retries.to_string()),
        ("continued elsewhere", s.migrations.to_string()),
        ("hand-overs that broke off", s.engines.transfers_failed.to_string()),
        ("clients that went away", s.left.to_string()),
    ]
}

/// Three figures that matter, or as many as stand before the point.
fn short(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

/// A table with a row for each policy.
pub(super) fn table(input: &Input, runs: &[Finished], width: Option<usize>, paint: Paint) -> String {
    let mut table = Table::default()
        .text("POLICY")
        .number("REQUESTS")
        .number("GOODPUT/S")
        .number("IN SLO")
        .number("TTFT MS P50/P90/P99")
        .number("ITL MS P50/P90/P99")
        .number("E2E S P50/P90/P99")
        .number("CACHED")
        .optional("WORST GAP P99", Align::Right)
        .optional("SPLIT", Align::Right)
        .optional("MOVED", Align::Right)
        .optional("GPU-S", Align::Right)
        .optional("BUSY", Align::Right)
        .optional("JAIN", Align::Right)
        .optional("REJECTED", Align::Right)
        .optional("FAILED", Align::Right)
        .optional("RETRIED", Align::Right);
    for run in runs {
        let s = &run.summary;
        let three = |p50: f64, p90: f64, p99: f64| format!("{}/{}/{}", short(p50), short(p90), short(p99));
        let tone = |lost: usize| if lost > 0 { Tone::Warning } else { Tone::Plain };
        table.row(vec![
            Cell::new(run.rule.to_string(), Tone::Strong),
            s.requests.to_string().into(),
            format!("{:.2}", run.goodput).into(),
            percent(s.slo_share, 1.0).into(),
            three(s.ttft_p50_ms, s.ttft_p90_ms, s.ttft_p99_ms).into(),
            three(s.itl_p50_ms, s.itl_p90_ms, s.itl_p99_ms).into(),
            three(s.e2e_p50_s, s.e2e_p90_s, s.e2e_p99_s).into(),
            percent(s.cached_share, 1.0).into(),
            short(s.worst_gap_p99_ms).into(),
            percent(s.split_share, 1.0).into(),
            bytes(s.engines.transfer_bytes).into(),
            format!("{:.0}", s.engines.gpu_seconds).into(),
            percent(s.engines.gpu_seconds_busy, s.engines.gpu_seconds).into(),
            format!("{:.3}", s.tenants_jain).into(),
            Cell::new(s.rejected.to_string(), tone(s.rejected)),
            Cell::new(s.failed.to_string(), tone(s.failed)),
            (s.retries + s.migrations).to_string().into(),
        ]);
    }
    format!("{} on {}\n{}", input.arrivals.name, input.fleet, table.render(width, paint))
}

/// Predictions beside what was measured, a table for each policy; nothing where nothing is compared.
pub(super) fn compared(runs: &[Finished], width: Option<usize>, paint: Paint) -> String {
    let mut text = String::new();
    for run in runs {
        let Some(fidelity) = &run.fidelity else { continue };
        let mut table =
            Table::default().text("FIGURE").number("MEASURED").number("PREDICTED").number("ERROR");
        for figure in &fidelity.figures {
            table.row(vec![
                figure.figure.into(),
                short(figure.measured).into(),
                short(figure.predicted).into(),
                format!("{:+.1} %", 100.0 * figure.error()).into(),
            ]);
        }
        let off = short(1e3 * fidelity.ttft_off_p50_seconds);
        text.push_str(&format!(
            "\n{}: {} requests of which both are known; half of their TTFTs are within {off} ms\n{}",
            run.rule,
            fidelity.requests,
            table.render(width, paint)
        ));
    }
    text
}

/// How far the runs are, as one line.
pub(super) fn progress(rules: &[Rule], shares: &[f64]) -> String {
    const CELLS: usize = 30;
    let share = shares.iter().sum::<f64>() / shares.len().max(1) as f64;
    let full = (share * CELLS as f64) as usize;
    let running: Vec<String> = rules
        .iter()
        .zip(shares)
        .filter(|(_, share)| (1e-9..1.0).contains(*share))
        .map(|(rule, _)| rule.to_string())
        .collect();
    format!(
        "[{}{}] {:>3.0} %  {}",
        "#".repeat(full.min(CELLS)),
        ".".repeat(CELLS - full.min(CELLS)),
        100.0 * share,
        running.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_keep_three_digits() {
        assert_eq!([0.1234, 12.34, 1234.5].map(short), ["0.12", "12.3", "1234"]);
    }

    #[test]
    fn progress_is_that_of_all_runs_and_names_those_that_run() {
        let rules: Vec<Rule> = ["cost", "sticky"].map(|name| name.parse().unwrap()).into();
        assert_eq!(
            progress(&rules, &[1.0, 0.5]),
            format!("[{}{}]  75 %  sticky", "#".repeat(22), ".".repeat(8))
        );
        assert!(progress(&rules, &[0.0, 0.0]).contains("  0 %"));
    }
}
