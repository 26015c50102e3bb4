//! What was measured, for people and for programs.

use forebay_loadgen::{Comparison, Figures, Quantiles, Verdict, compare};
use serde_json::{Value, json};

use super::{Side, watch};
use crate::{
    cli::BenchArgs,
    figures::{bytes, count, percent, seconds},
    table::{Align, Cell, Table},
    terminal::{Paint, Tone, without_controls},
};

/// A run that has ended.
pub(super) struct Ran<'a> {
    pub(super) args: &'a BenchArgs,
    pub(super) seed: u64,
    pub(super) interrupted: bool,
    pub(super) own_cpu_seconds: Option<f64>,
    pub(super) sides: &'a [Side],
}

/// A figure of a slice that targets are compared by.
struct Compared {
    name: &'static str,
    of: fn(&Figures) -> Option<f64>,
}

const COMPARED: [Compared; 5] = [
    Compared { name: "TTFT P50", of: |figures| Some(figures.ttft?.p50) },
    Compared { name: "ITL P50", of: |figures| Some(figures.itl?.p50) },
    Compared { name: "E2E P50", of: |figures| Some(figures.e2e?.p50) },
    Compared { name: "requests/s", of: |figures| Some(figures.requests_per_second) },
    Compared { name: "output tokens/s", of: |figures| Some(figures.output_tokens_per_second) },
];

fn comparisons(sides: &[Side]) -> Vec<(&'static str, Comparison)> {
    let [first, second] = sides else { return Vec::new() };
    let found = |compared: &Compared| {
        let of = |side: &Side| {
            side.slices.iter().map(|slice| (compared.of)(slice).unwrap_or(0.0)).collect::<Vec<_>>()
        };
        Some((compared.name, compare(&of(first), &of(second))?))
    };
    COMPARED.iter().filter_map(found).collect()
}

/// All of it as JSON.
pub(super) fn document(ran: &Ran<'_>) -> String {
    let Ran { args, seed, interrupted, own_cpu_seconds, sides } = ran;
    let targets: Vec<Value> = sides.iter().map(|side| target(args, side)).collect();
    let comparison: Vec<Value> = comparisons(sides)
        .into_iter()
        .map(|(figure, comparison)| json!({"figure": figure, "second_over_first": comparison}))
        .collect();
    let asked = json!({
        "concurrency": args.rate.is_none().then_some(args.concurrency),
        "rate": args.rate,
        "requests": args.requests,
        "duration_seconds": args.duration.map(|duration| duration.as_secs_f64()),
        "warmup": args.warmup,
        "stream": !args.no_stream,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "shared_tokens": args.shared_tokens,
        "groups": args.groups,
        "turns": args.turns,
        "think_seconds": args.think.as_secs_f64(),
    });
    let document = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "seed": seed,
        "interrupted": interrupted,
        "asked": asked,
        "targets": targets,
        "comparison": comparison,
        "own_cpu_seconds": own_cpu_seconds,
    });
    format!("{document:#}\n")
}

fn target(args: &BenchArgs, side: &Side) -> Value {
    let watched: Vec<Value> = (args.watch.iter().zip(&side.cpu_seconds))
        .map(|((name, pid), cpu_seconds)| {
            json!({
                "name": name,
                "pid": pid,
                "cpu_seconds": cpu_seconds,
                "cpu_seconds_per_1000_requests": per_thousand(*cpu_seconds, side),
                "peak_rss_bytes": watch::peak_rss_bytes(*pid),
            })
        })
        .collect();
    json!({
        "url": side.target.url,
        "model": side.target.model,
        "figures": side.total.figures(),
        "slices": side.slices,
        "watched": watched,
    })
}

fn per_thousand(cpu_seconds: f64, side: &Side) -> Option<f64> {
    let requests = side.total.requests();
    (requests > 0).then(|| cpu_seconds * 1_000.0 / requests as f64)
}

/// All of it as tables.
pub(super) fn text(ran: &Ran<'_>, width: Option<usize>, paint: Paint) -> String {
    let mut text = String::new();
    for side in ran.sides {
        text.push_str(&side_text(ran.args, side, width, paint));
        text.push('\n');
    }
    let comparisons = comparisons(ran.sides);
    if !comparisons.is_empty() {
        text.push_str("The second against the first, by medians of slices:\n");
        text.push_str(&comparison_table(&comparisons).render(width, paint));
        text.push('\n');
    }
    let own = ran.own_cpu_seconds.map_or(String::new(), |own| format!(", {own:.2} CPU seconds of its own"));
    let cut = if ran.interrupted { ", interrupted" } else { "" };
    text.push_str(&format!("seed {}{own}{cut}\n", ran.seed));
    text
}

fn side_text(args: &BenchArgs, side: &Side, width: Option<usize>, paint: Paint) -> String {
    let figures = side.total.figures();
    let errors = figures.requests - figures.answered;
    let head = format!("{}, {}", side.target.url, without_controls(&side.target.model));
    let mut text = format!("{}\n", paint.tone(Tone::Strong, &head));
    text.push_str(&format!(
        "{} in {}, {}: {:.2} requests/s, {:.1} output tokens/s\n",
        count(figures.requests, "request"),
        seconds(figures.seconds),
        count(errors, "error"),
        figures.requests_per_second,
        figures.output_tokens_per_second,
    ));
    if let Some(goodput) = figures.goodput {
        text.push_str(&format!(
            "goodput {:.2} requests/s, {} of requests\n",
            goodput.requests_per_second,
            percent(goodput.share, 1.0)
        ));
    }
    let cached =
        figures.cached_share.map_or(String::new(), |share| format!(", {} cached", percent(share, 1.0)));
    text.push_str(&format!(
        "{} of prompts{cached}, {} of answers\n",
        count(figures.prompt_tokens, "token"),
        count(figures.output_tokens, "token")
    ));
    text.push_str(&times(&figures).render(width, paint));
    for (kind, errors) in &figures.errors {
        let line = format!("{} x {kind}: {}", errors.count, errors.first_message);
        text.push_str(&format!("{}\n", paint.tone(Tone::Bad, &line)));
    }
    for ((name, pid), cpu_seconds) in args.watch.iter().zip(&side.cpu_seconds) {
        let cpu = per_thousand(*cpu_seconds, side).map_or("–".to_owned(), |cpu| format!("{cpu:.2}"));
        let peak = watch::peak_rss_bytes(*pid).map_or("–".to_owned(), bytes);
        text.push_str(&format!("{name}: {cpu} CPU seconds for 1,000 requests, at most {peak} of memory\n"));
    }
    text
}

fn times(figures: &Figures) -> Table {
    let mut table = Table::default().text("").number("P50").number("P90").number("P99").number("max");
    let rows: [(&str, Option<Quantiles>); 5] = [
        ("TTFT", figures.ttft),
        ("ITL", figures.itl),
        ("worst gap", figures.worst_gap),
        ("E2E", figures.e2e),
        ("lateness", figures.lateness),
    ];
    for (name, quantiles) in rows {
        let Some(Quantiles { p50, p90, p99, max }) = quantiles else { continue };
        let cells = [p50, p90, p99, max].map(|time| Cell::from(seconds(time)));
        table.row([Cell::from(name)].into_iter().chain(cells).collect());
    }
    table
}

fn comparison_table(comparisons: &[(&'static str, Comparison)]) -> Table {
    let mut table = Table::default().text("").number("ratio").number("range").optional("", Align::Left);
    for (name, Comparison { ratio, lowest, highest, verdict }) in comparisons {
        let (words, tone) = match verdict {
            Verdict::Differs => ("more than noise", Tone::Strong),
            Verdict::Noise => ("no more than noise", Tone::Plain),
            Verdict::TooFewSlices => ("too few slices to tell", Tone::Faint),
        };
        table.row(vec![
            Cell::from(*name),
            Cell::from(format!("{ratio:.3}")),
            Cell::from(format!("{lowest:.3} to {highest:.3}")),
            Cell::new(words, tone),
        ]);
    }
    table
}
