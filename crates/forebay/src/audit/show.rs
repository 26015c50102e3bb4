//! The report, for people and for programs.

use forebay_audit::{Band, Metric, Row, Way};
use serde_json::{Value, json};

use super::Audit;
use crate::{
    figures::count,
    table::{Cell, Table},
    terminal::{Paint, Tone},
};

/// An error of the twin above which its figures are to be read with care.
const ERROR_MAX: f64 = 0.15;
/// The same for the share found cached, a difference of shares.
const SHARE_ERROR_MAX: f64 = 0.1;
/// Share of a recording's requests that may be made up before somebody should know.
const MADE_UP_MAX: f64 = 0.2;

/// The report for people.
pub(super) fn table(audit: &Audit<'_>, width: Option<usize>, paint: Paint) -> String {
    let comparison = &audit.replayed.comparison;
    let mut table = Table::default().text("");
    for title in ["TTFT MEAN MS", "TTFT P50 MS", "TTFT P90 MS", "ITL MEAN MS", "CACHED", "BUSY GPU-S"] {
        table = table.number(title);
    }
    let mut row = |name: &str, tone: Tone, cells: Vec<Cell>| {
        table.row(std::iter::once(Cell::new(name, tone)).chain(cells).collect());
    };
    let all = || Metric::ALL.iter().enumerate();
    let measured = all().map(|(nth, &metric)| match comparison.measured[nth] {
        Some(value) => Cell::from(figure(metric, value)),
        None => Cell::new("-", Tone::Faint),
    });
    row("measured", Tone::Strong, measured.collect());
    for way in &comparison.rows {
        let cells = all().map(|(nth, &metric)| Cell::from(band(metric, way.figures[nth])));
        row(way.way.name(), Tone::Strong, cells.collect());
    }
    let error = all().map(|(nth, &metric)| match comparison.error[nth] {
        Some(error) => Cell::new(
            signed(metric, error),
            if is_large(metric, error) { Tone::Warning } else { Tone::Faint },
        ),
        None => Cell::new("-", Tone::Faint),
    });
    row("error of the replay", Tone::Faint, error.collect());
    for way in comparison.rows.iter().filter(|row| row.way != Way::AsSeen) {
        let cells = all().map(|(nth, &metric)| {
            let change = way.change[nth];
            Cell::new(changed(metric, change), tone(metric, change))
        });
        row(&format!("{} against as-seen", way.way.name()), Tone::Plain, cells.collect());
    }
    let mut text = heading(audit);
    text += &table.render(width, paint);
    for note in notes(audit) {
        text += &format!("{} {note}\n", paint.tone(Tone::Warning, "note:"));
    }
    text
}

fn heading(audit: &Audit<'_>) -> String {
    let (sight, measured) = (&audit.inferred.sight, &audit.inferred.measured);
    format!(
        "{:.1} minutes of {} with {}, {} after a warm-up: {:.0} requests, {:.0} of them counted; {} seen in KV events, {} only \
         in counters\n",
        measured.to_seconds / 60.0,
        count(audit.fleet.engines.len() as u64, "engine"),
        crate::terminal::without_controls(&audit.fleet.model),
        format_args!("{:.1}", (measured.to_seconds - measured.from_seconds) / 60.0),
        sight.requests,
        measured.requests,
        sight.by_events,
        sight.made_up,
    )
}

/// What a reader should know beside the figures.
fn notes(audit: &Audit<'_>) -> Vec<String> {
    let (sight, lost, comparison) = (&audit.inferred.sight, &audit.lost, &audit.replayed.comparison);
    let mut notes = Vec::new();
    if audit.replayed.slow != 1.0 {
        notes.push(format!(
            "steps take {:.2} times what {} says, so that the time between tokens is the measured one (--fit)",
            audit.replayed.slow, audit.args.profile
        ));
    }
    for (metric, name) in
        [(Metric::ItlMean, "the time between tokens"), (Metric::TtftP50, "the time to the first token")]
    {
        if let Some(error) = comparison.error_of(metric).filter(|error| error.abs() > ERROR_MAX) {
            let mend = if audit.args.fit {
                "measure a profile of these engines"
            } else {
                "give their own, or --fit"
            };
            notes.push(format!(
                "replayed as it is, the fleet misses {name} by {}: these engines are not what the profile {} says; {mend}",
                signed(metric, error),
                audit.args.profile
            ));
        }
    }
    if sight.blind_ranks > 0 {
        notes.push(format!(
            "no KV events of {} of {} ranks: their prompts are taken to share the measured share, wherever they run, so nothing \
             is gained there by routing to caches",
            sight.blind_ranks, sight.ranks
        ));
    }
    if sight.made_up as f64 > MADE_UP_MAX * sight.requests && sight.blind_ranks < sight.ranks {
        notes.push(format!(
            "{} of {:.0} requests stored no block, and are taken to repeat others: they were cached whole, or shorter than one",
            sight.made_up, sight.requests
        ));
    }
    if sight.rooted > 0 {
        notes.push(format!(
            "{} prompts go on from what was cached before: {} tokens in the mean, by the hit counters; beginnings of two \
             ranks count as one where the same prompt goes on from both",
            sight.rooted, sight.root_tokens
        ));
    }
    let over = sight.by_events as f64 + sight.made_up as f64 - sight.requests;
    if over > 0.1 * sight.requests {
        notes.push(format!(
            "events show {over:.0} more requests than were counted: some answers were taken for prompts"
        ));
    }
    for (number, what) in [
        (lost.batches, "batches of KV events were missed"),
        (lost.requests, "requests were beyond what is recorded"),
        (lost.blocks, "blocks were forgotten for want of room"),
        (lost.malformed, "events contradicted themselves"),
    ] {
        if number > 0 {
            notes.push(format!("{number} {what}"));
        }
    }
    for row in comparison.rows.iter().filter(|row: &&Row| row.unfinished > 0) {
        notes.push(format!(
            "{}: {} of all replays got no complete answer; times are of the others",
            row.way.name(),
            count(row.unfinished as u64, "request")
        ));
    }
    notes
}

fn is_large(metric: Metric, error: f64) -> bool {
    error.abs() > if metric.is_share() { SHARE_ERROR_MAX } else { ERROR_MAX }
}

/// Milliseconds, per cent or seconds.
fn scale(metric: Metric) -> f64 {
    match metric {
        Metric::TtftMean | Metric::TtftP50 | Metric::TtftP90 | Metric::ItlMean => 1e3,
        Metric::CachedShare => 1e2,
        Metric::GpuSeconds => 1.0,
    }
}

fn unit(metric: Metric) -> &'static str {
    if metric.is_share() { "%" } else { "" }
}

fn short(value: f64) -> String {
    match value.abs() {
        size if size < 10.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn figure(metric: Metric, value: f64) -> String {
    format!("{}{}", short(scale(metric) * value), unit(metric))
}

fn band(metric: Metric, band: Band) -> String {
    let scale = scale(metric);
    format!("{} ±{}{}", short(scale * band.mean), short(scale * band.within), unit(metric))
}

/// A difference: of shares in points, of all else in per cent of it.
fn signed(metric: Metric, value: f64) -> String {
    format!("{:+.0}{}", whole(100.0 * value), if metric.is_share() { " pt" } else { "%" })
}

/// Without the sign of what rounds to nothing.
fn whole(value: f64) -> f64 {
    value.round() + 0.0
}

fn changed(metric: Metric, change: Band) -> String {
    format!(
        "{:+.0} ±{:.0}{}",
        whole(100.0 * change.mean),
        100.0 * change.within,
        if metric.is_share() { " pt" } else { "%" }
    )
}

fn tone(metric: Metric, change: Band) -> Tone {
    match (change.is_certain(), (change.mean > 0.0) == metric.is_share()) {
        (false, _) => Tone::Faint,
        (true, true) => Tone::Good,
        (true, false) => Tone::Bad,
    }
}

/// The report for programs.
pub(super) fn document(audit: &Audit<'_>) -> String {
    let (inferred, comparison) = (audit.inferred, &audit.replayed.comparison);
    let by_name = |value: &dyn Fn(usize) -> Value| -> Value {
        Metric::ALL.iter().enumerate().map(|(nth, metric)| (name(*metric), value(nth))).collect()
    };
    let rows = comparison.rows.iter().map(|row| {
        json!({
            "way": row.way, "figures": by_name(&|nth| json!(row.figures[nth])),
            "change": by_name(&|nth| json!(row.change[nth])), "unfinished": row.unfinished,
        })
    });
    let measured = &inferred.measured;
    let lost = audit.lost;
    let document = json!({
        "version": 1,
        "model": audit.fleet.model,
        "engines": audit.fleet.engines.iter().map(|engine| engine.name.as_str()).collect::<Vec<_>>(),
        "seconds": measured.to_seconds,
        "warm_up_seconds": measured.from_seconds,
        "requests_counted": measured.requests,
        "prompt_tokens": measured.prompt_tokens,
        "output_tokens": measured.output_tokens,
        "ranks": measured.seats,
        "sight": inferred.sight,
        "lost": {
            "batches": lost.batches, "requests": lost.requests, "blocks": lost.blocks, "malformed": lost.malformed,
        },
        "profile": audit.args.profile,
        "slow": audit.replayed.slow,
        "seeds": audit.args.seeds,
        "measured": by_name(&|nth| json!(comparison.measured[nth])),
        "error": by_name(&|nth| json!(comparison.error[nth])),
        "ways": rows.collect::<Vec<_>>(),
        "notes": notes(audit),
    });
    format!("{document:#}\n")
}

fn name(metric: Metric) -> String {
    json!(metric).as_str().unwrap_or_default().to_owned()
}
