//! What was found, as tables.

use forebay_twin::{Binds, Search, Trial};

use super::{Found, KvNeed};
use crate::{
    cli::SizeArgs,
    exit::{Exit, Failed},
    figures::percent,
    table::{Align, Cell, Table},
    terminal::{Terminal, Tone},
};

/// Widest bar of the frontier.
const BAR: f64 = 30.0;

/// Every shape's smallest fleet, the frontier, and the memory that the best of them needs.
pub(super) fn show(args: &SizeArgs, name: &str, found: &Found, terminal: Terminal) -> anyhow::Result<()> {
    let percentile = format!("P{}", 100.0 * args.percentile);
    terminal.out(&format!("{name}, {percentile} within {}\n", promised(args)))?;
    let mut table = Table::default()
        .text("SHAPE")
        .number("GPUS")
        .number("ENGINES")
        .number("GOODPUT/S")
        .number("TTFT MS")
        .number("ITL MS")
        .number("BUSY")
        .optional("CACHED", Align::Right)
        .text("ONE LESS BREAKS");
    for search in &found.searches {
        table.row(row(search));
    }
    terminal.out(&table.render(terminal.width(), terminal.paint_out))?;
    terminal.out("\ngoodput by GPUs, fleets that no smaller one outdoes\n")?;
    terminal.out(&frontier(&found.frontier()).render(terminal.width(), terminal.paint_out))?;
    if let Some(kv) = &found.kv {
        terminal.out(&format!("\n{}\n", needed(kv)))?;
    }
    Ok(())
}

/// Of each number of GPUs the fleet with most goodput.
fn frontier(trials: &[&Trial]) -> Table {
    let most = trials.iter().map(|trial| trial.goodput).fold(1e-9, f64::max);
    let mut table = Table::default()
        .number("GPUS")
        .number("GOODPUT/S")
        .optional("", Align::Left)
        .text("SHAPE")
        .text("PROMISE");
    for trial in trials {
        let bar = "#".repeat((BAR * trial.goodput / most).round() as usize);
        let promise = trial.binds.map_or("kept".to_owned(), |binds| format!("broken: {binds}"));
        table.row(vec![
            trial.gpus.to_string().into(),
            format!("{:.2}", trial.goodput).into(),
            Cell::new(bar, Tone::Faint),
            trial.shape.to_string().into(),
            promise.into(),
        ]);
    }
    table
}

/// How much of its KV memory the best fleet needs.
pub(super) fn needed(kv: &KvNeed) -> String {
    let KvNeed { blocks_total, blocks_enough, binds_below } = kv;
    let share = percent(f64::from(*blocks_enough), f64::from(*blocks_total));
    let below = binds_below.map_or_else(String::new, |binds| format!("; with less, what binds is {binds}"));
    format!("KV: {blocks_enough} of the {blocks_total} blocks of an engine ({share}) are enough{below}")
}

fn row(search: &Search) -> Vec<Cell> {
    let binds = |trial: Option<&Trial>| {
        trial.and_then(|trial| trial.binds).map_or("nothing".to_owned(), |binds: Binds| binds.to_string())
    };
    let shape = search.shape().to_string();
    let Some(found) = search.found() else {
        let none = || Cell::new("-", Tone::Faint);
        let mut cells = vec![shape.into()];
        cells.extend((0..7).map(|_| none()));
        cells.push(format!("as many break it: {}", binds(search.one_less())).into());
        return cells;
    };
    let side = &found.summary.engines;
    vec![
        Cell::new(shape, Tone::Strong),
        found.gpus.to_string().into(),
        found.engines.to_string().into(),
        format!("{:.2}", found.goodput).into(),
        ttft_ms(found).into(),
        format!("{:.1}", 1e3 * found.itl_seconds).into(),
        percent(side.gpu_seconds_busy, side.gpu_seconds).into(),
        percent(found.summary.cached_share, 1.0).into(),
        binds(search.one_less()).into(),
    ]
}

/// Milliseconds, where that many got a first token.
pub(super) fn ttft_ms(trial: &Trial) -> String {
    if trial.ttft_seconds.is_finite() { format!("{:.0}", 1e3 * trial.ttft_seconds) } else { "-".to_owned() }
}

pub(super) fn promised(args: &SizeArgs) -> String {
    let ms = |seconds: f64| format!("{}ms", (1e4 * seconds).round() / 10.0);
    let prefills = match args.slo.ttft_prefills {
        0.0 => String::new(),
        prefills => format!(",prefills={prefills}"),
    };
    format!("ttft={}{prefills},itl={}", ms(args.slo.ttft_seconds), ms(args.slo.itl_seconds))
}

/// What to say where nothing keeps the promise: the fleet that comes nearest, and what it would keep.
pub(super) fn nobody(args: &SizeArgs, searches: &[Search]) -> Failed {
    let over = |trial: &Trial| {
        let lost = if trial.binds == Some(Binds::Throughput) { 1e6 } else { 0.0 };
        lost + (trial.ttft_seconds / args.slo.ttft_seconds).max(trial.itl_seconds / args.slo.itl_seconds)
    };
    let trials =
        searches.iter().flat_map(|search| &search.trials).filter(|trial| trial.ttft_seconds.is_finite());
    let nearest = trials.min_by(|one, other| over(one).total_cmp(&over(other)));
    let nearest = nearest.map_or_else(String::new, |trial| {
        format!(
            "; nearest are {} GPUs, {}, which keep ttft={:.0}ms,itl={:.1}ms",
            trial.gpus,
            trial.shape,
            (1e3 * trial.ttft_seconds).ceil(),
            1e3 * trial.itl_seconds
        )
    });
    let sentence = format!("no fleet of up to {} GPUs keeps {}{nearest}", args.gpus, promised(args));
    Failed { exit: Exit::Failure, sentence }
}
