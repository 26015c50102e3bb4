//! A decision record as text.

use std::fmt::Write as _;

use forebay_gateway::decisions::{DecisionRecord, LegRecord, Placement, TransferRecord};
use forebay_placement::{Candidate, Explanation, Plan};
use forebay_types::RankId;

use crate::{
    figures::{bandwidth, bytes, count, percent, seconds, utc},
    table::{Align, Cell, Table},
    terminal::{Paint, Tone, without_controls},
};

/// How much is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Detail {
    /// Decisions and what came of them.
    Brief,
    /// Also what was known of each engine.
    WithInputs,
}

/// The whole explanation.
pub(super) fn render(record: &DecisionRecord, detail: Detail, width: Option<usize>, paint: Paint) -> String {
    let mut text = header(record, paint);
    for placement in &record.placements {
        text.push_str(&placement_text(placement, detail, width, paint));
    }
    if !record.legs.is_empty() {
        text.push_str(&title("Legs (ms after arrival)", paint));
        text.push_str(&legs(&record.legs).render(width, paint));
    }
    if !record.transfers.is_empty() {
        text.push_str(&title("KV transfers", paint));
        text.push_str(&transfers(&record.transfers).render(width, paint));
    }
    text
}

fn title(words: &str, paint: Paint) -> String {
    format!("\n{}\n", paint.tone(Tone::Strong, words))
}

fn header(record: &DecisionRecord, paint: Paint) -> String {
    let prompt_tokens = record.prompt_tokens;
    let outcome_tone = match record.outcome.as_str() {
        "finished" => Tone::Good,
        "running" | "cancelled" => Tone::Warning,
        _ => Tone::Bad,
    };
    let choices = if record.choices > 1 { format!(" in {} choices", record.choices) } else { String::new() };
    let lines = [
        ("request", paint.tone(Tone::Strong, &without_controls(record.id.as_str()))),
        ("outcome", paint.tone(outcome_tone, &without_controls(&record.outcome))),
        ("arrived", utc(record.arrived_unix_ms)),
        (
            "model",
            format!(
                "{}, tenant {}",
                without_controls(&record.model),
                without_controls(record.tenant.as_str())
            ),
        ),
        (
            "prompt",
            format!(
                "{}, {} of them from cache ({})",
                count(prompt_tokens.into(), "token"),
                record.cached_tokens,
                percent(record.cached_tokens.into(), prompt_tokens.into())
            ),
        ),
        ("answer", format!("{}{choices}", count(record.output_tokens.into(), "token"))),
        ("TTFT", ttft(record)),
        ("ITL", itl(record)),
        ("total", record.e2e_seconds.map_or_else(|| "–".to_owned(), seconds)),
    ];
    lines.iter().fold(String::new(), |mut text, (name, value)| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}  {value}", paint.tone(Tone::Faint, &format!("{name:<7}")));
        text
    })
}

/// The mean time between tokens beside the one that the placement predicted which led to the first.
fn itl(record: &DecisionRecord) -> String {
    let pace = record.prediction().and_then(|prediction| prediction.itl);
    match (pace, record.itl_seconds()) {
        (Some(pace), _) if pace.seconds > 0.0 => {
            let error = 100.0 * (pace.seconds_real / pace.seconds - 1.0);
            format!("{}, predicted {} ({error:+.0}%)", seconds(pace.seconds_real), seconds(pace.seconds))
        }
        (_, Some(real)) => seconds(real),
        (_, None) => "–".to_owned(),
    }
}

/// The actual time to the first token beside the one that the first placement predicted.
fn ttft(record: &DecisionRecord) -> String {
    let predicted = record.placements.first().map(|first| first.explanation.chosen().ttft_seconds);
    match (record.ttft_seconds, predicted) {
        (Some(actual), Some(predicted)) if predicted > 0.0 => {
            let error = 100.0 * (actual / predicted - 1.0);
            format!("{}, predicted {} ({error:+.0}%)", seconds(actual), seconds(predicted))
        }
        (Some(actual), _) => seconds(actual),
        (None, Some(predicted)) => format!("–, predicted {}", seconds(predicted)),
        (None, None) => "–".to_owned(),
    }
}

fn placement_text(placement: &Placement, detail: Detail, width: Option<usize>, paint: Paint) -> String {
    let explanation = &placement.explanation;
    let mut text = title(
        &format!(
            "Placement: {}, {} after arrival, decided in {} by policy {} (costs in ms)",
            without_controls(&placement.purpose),
            seconds(placement.at_seconds),
            seconds(placement.took_microseconds * 1e-6),
            explanation.policy
        ),
        paint,
    );
    text.push_str(&candidates(explanation).render(width, paint));
    for sentence in verdicts(explanation) {
        let _ = writeln!(text, "{sentence}");
    }
    if detail == Detail::WithInputs {
        text.push_str(&title("Known of the engines then", paint));
        text.push_str(&inputs(explanation).render(width, paint));
    }
    text
}

/// The candidates with their terms, the chosen one first and marked, then what was excluded and why.
fn candidates(explanation: &Explanation) -> Table {
    let source = explanation.table();
    let mut table = Table::default().text("").text("PLAN");
    // The first column is the plan and the last one a note; all between are numbers.
    for column in &source.columns[1..source.columns.len() - 1] {
        table = table.number(column);
    }
    table = table.text("NOTE");
    for row in source.rows {
        let tone = if row.chosen { Tone::Strong } else { Tone::Plain };
        let mark = Cell::new(if row.chosen { "▸" } else { "" }, tone);
        let cells = row.cells.into_iter().map(|cell| Cell::new(without_controls(&cell), tone));
        table.row([mark].into_iter().chain(cells).collect());
    }
    table
}

/// What the comparison came to, in sentences: the best plan of each kind, and the tie-break.
fn verdicts(explanation: &Explanation) -> Vec<String> {
    let is_split = |candidate: &&Candidate| matches!(candidate.plan, Plan::Split { .. });
    let cheapest = |candidates: Vec<&Candidate>| {
        candidates.into_iter().min_by(|a, b| a.total_seconds.total_cmp(&b.total_seconds)).copied()
    };
    let (split, aggregated): (Vec<_>, Vec<_>) = explanation.candidates.iter().partition(is_split);
    let describe = |candidate: &Candidate| {
        format!("{} for {}", plan_name(explanation, candidate.plan), seconds(candidate.total_seconds))
    };
    let mut sentences = Vec::new();
    match (cheapest(aggregated), cheapest(split)) {
        (Some(aggregated), Some(split)) => sentences.push(format!(
            "Best on one engine: {}. Best split: {}. Difference: {}.",
            describe(&aggregated),
            describe(&split),
            seconds((aggregated.total_seconds - split.total_seconds).abs()),
        )),
        (Some(aggregated), None) => {
            sentences.push(format!(
                "Best on one engine: {}. No split was among the cheapest.",
                describe(&aggregated)
            ));
        }
        (None, Some(split)) => {
            sentences.push(format!(
                "Best split: {}. No plan on one engine was among the cheapest.",
                describe(&split)
            ));
        }
        (None, None) => {}
    }
    if explanation.tied > 1 {
        sentences.push(format!(
            "Tie-break: {} candidates were equal; the request's seed chose.",
            explanation.tied
        ));
    }
    sentences
}

fn plan_name(explanation: &Explanation, plan: Plan) -> String {
    let name = |id: RankId| {
        let known = explanation.ranks.iter().find(|inputs| inputs.rank == id);
        let engine = known.map_or_else(|| id.to_string(), |inputs| without_controls(inputs.engine.as_str()));
        if id.dp_rank == 0 { engine } else { format!("{engine}/{}", id.dp_rank) }
    };
    match plan {
        Plan::Aggregated { rank } => name(rank),
        Plan::Split { prefill, decode } => format!("{} → {}", name(prefill), name(decode)),
    }
}

fn inputs(explanation: &Explanation) -> Table {
    let mut table = Table::default()
        .text("ENGINE")
        .number("OVERLAP")
        .number("NEW TOKENS")
        .number("QUEUED TOKENS")
        .number("WAITING")
        .number("DECODES")
        .optional("CONTEXT", Align::Right)
        .number("KV%")
        .optional("PREFILL SHARE", Align::Right)
        .optional("STEPS LEARNED", Align::Right)
        .number("AGE");
    for rank in &explanation.ranks {
        table.row(vec![
            Cell::new(without_controls(rank.engine.as_str()), Tone::Strong),
            count(rank.overlap_blocks.into(), "block").into(),
            rank.new_tokens.to_string().into(),
            rank.queued_tokens.to_string().into(),
            rank.waiting.to_string().into(),
            rank.decodes.to_string().into(),
            rank.context_tokens.to_string().into(),
            percent(rank.kv_use, 1.0).into(),
            percent(rank.prefill_share, 1.0).into(),
            rank.model_samples.to_string().into(),
            seconds(rank.load_age_seconds).into(),
        ]);
    }
    table
}

fn legs(legs: &[LegRecord]) -> Table {
    let mut table = Table::default()
        .text("WORK")
        .text("ENGINE")
        .number("SENT")
        .number("STARTED")
        .number("ENDED")
        .number("CACHED")
        .number("TOKENS")
        .text("OUTCOME");
    let ms = |at: Option<f64>| at.map_or_else(|| "–".to_owned(), |at| format!("{:.1}", at * 1e3));
    for leg in legs {
        let tone = match leg.outcome.as_str() {
            "ended" => Tone::Good,
            "lost" | "refused" => Tone::Bad,
            _ => Tone::Warning,
        };
        table.row(vec![
            without_controls(&leg.work).into(),
            Cell::new(without_controls(leg.engine.as_str()), Tone::Strong),
            ms(Some(leg.at_seconds)).into(),
            ms(leg.started_seconds).into(),
            ms(leg.ended_seconds).into(),
            leg.cached_tokens.to_string().into(),
            leg.output_tokens.to_string().into(),
            Cell::new(without_controls(&leg.outcome), tone),
        ]);
    }
    table
}

fn transfers(transfers: &[TransferRecord]) -> Table {
    let mut table = Table::default()
        .text("FROM")
        .text("TO")
        .number("BLOCKS")
        .number("SIZE")
        .number("PIECES")
        .number("TIME")
        .number("BANDWIDTH")
        .text("OUTCOME");
    for transfer in transfers {
        let tone = if transfer.outcome == "done" { Tone::Good } else { Tone::Bad };
        table.row(vec![
            Cell::new(without_controls(transfer.from.as_str()), Tone::Strong),
            Cell::new(without_controls(transfer.to.as_str()), Tone::Strong),
            transfer.blocks.to_string().into(),
            bytes(transfer.bytes).into(),
            transfer.pieces.to_string().into(),
            seconds(transfer.seconds).into(),
            bandwidth(transfer.bytes, transfer.seconds).into(),
            Cell::new(without_controls(&transfer.outcome), tone),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explain::sample;

    #[test]
    fn a_split_request_is_told_whole() {
        insta::assert_snapshot!(render(&sample::split(), Detail::WithInputs, None, Paint::NONE));
    }

    #[test]
    fn it_fits_a_terminal_of_100_columns() {
        let text = render(&sample::split(), Detail::Brief, Some(100), Paint::NONE);
        for line in text.lines().filter(|line| !line.starts_with("Best") && !line.starts_with("Placement")) {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }

    #[test]
    fn a_retry_that_ended_in_failure_is_told() {
        insta::assert_snapshot!(render(&sample::failed(), Detail::Brief, None, Paint::NONE));
    }
}
