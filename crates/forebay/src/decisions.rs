//! `forebay decisions`: the decisions that a running server keeps, in a table.
//!
//! In: `/fleet/v1/decisions` of the admin address. Out: one line a request; `forebay explain` tells all about one.

use forebay_gateway::decisions::{DecisionRecord, Prediction};
use serde_json::value::RawValue;

use crate::{
    cli::DecisionsArgs,
    client::Client,
    exit::Exit,
    fleet_commands::encoded,
    table::{Align, Cell, Table},
    terminal::{Paint, Terminal, Tone, without_controls},
};

/// A prediction that is further off than this share of the time is shown as a warning.
const ERROR_SHARE_NOTED: f64 = 0.5;

/// Lists decisions.
///
/// # Errors
/// No server, or a strange one.
pub(crate) async fn run(args: &DecisionsArgs, terminal: Terminal) -> anyhow::Result<Exit> {
    let client = Client::new(&args.door.admin_url, None)?;
    let order = match (args.worst_error, args.slowest) {
        (true, _) => "worst-error",
        (_, true) => "slowest",
        _ => "newest",
    };
    let mut path = format!("/fleet/v1/decisions?limit={}&order={order}", args.limit);
    if let Some(engine) = &args.engine {
        path.push_str(&format!("&engine={}", encoded(engine)));
    }
    let records: Vec<Box<RawValue>> = client.get_list(&path).await?;
    if args.json {
        for record in &records {
            terminal.out(&format!("{}\n", record.get()))?;
        }
        return Ok(Exit::Ok);
    }
    let read = |record: &RawValue| serde_json::from_str(record.get()).map_err(|cause| client.strange(cause));
    let records = records.iter().map(|record| read(record)).collect::<Result<Vec<_>, _>>()?;
    terminal.out(&render(&records, terminal.width(), terminal.paint_out))?;
    Ok(Exit::Ok)
}

fn render(records: &[DecisionRecord], width: Option<usize>, paint: Paint) -> String {
    let mut table = Table::default()
        .text("request")
        .text("ran on")
        .number("prompt")
        .number("cached")
        .optional("predicted", Align::Right)
        .number("TTFT ms")
        .number("predicted")
        .number("total ms")
        .text("outcome");
    for record in records {
        table.row(row(record));
    }
    table.render(width, paint)
}

fn row(record: &DecisionRecord) -> Vec<Cell> {
    let milliseconds =
        |seconds: Option<f64>| seconds.map_or_else(|| "–".to_owned(), |it| format!("{:.1}", it * 1e3));
    let mut engines: Vec<&str> = record.legs.iter().map(|leg| leg.engine.as_str()).collect();
    engines.dedup();
    let prediction = record.prediction();
    let is_off = |it: &Prediction| it.error_seconds().abs() > ERROR_SHARE_NOTED * it.ttft_seconds_real;
    let tone = if prediction.as_ref().is_some_and(is_off) { Tone::Warning } else { Tone::Plain };
    let cached_predicted = prediction.map_or_else(|| "–".to_owned(), |it| it.cached_tokens.to_string());
    vec![
        without_controls(record.id.as_str()).into(),
        without_controls(&engines.join(" → ")).into(),
        record.prompt_tokens.to_string().into(),
        record.cached_tokens.to_string().into(),
        cached_predicted.into(),
        milliseconds(record.ttft_seconds).into(),
        Cell::new(milliseconds(prediction.map(|it| it.ttft_seconds)), tone),
        milliseconds(record.e2e_seconds).into(),
        without_controls(&record.outcome).into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explain::sample;

    #[test]
    fn one_line_a_request() {
        let records = [sample::split(), sample::failed()];
        insta::assert_snapshot!(render(&records, Some(120), Paint::NONE));
    }
}
