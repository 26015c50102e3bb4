//! `forebay size`: the smallest fleet of each shape that keeps a promise.

use std::{
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use anyhow::bail;
use forebay_placement::Policy;
use forebay_twin::{
    Binds, EngineSpec, GatewayEntry, GatewaySettings, Promise, Rule, Run, RunSettings, Search, Shape,
    Summary, Trial,
};
use serde_json::json;

use super::{
    input::{Arrivals, building_block},
    write_whole,
};
use crate::{
    cli::SizeArgs,
    exit::{Exit, Failed},
    figures::percent,
    table::{Align, Cell, Table},
    terminal::{Terminal, Tone},
};

/// Engines of the first fleet of each shape that is tried.
const GUESS: u32 = 4;
/// Widest bar of the frontier.
const BAR: f64 = 40.0;

/// The command.
///
/// # Errors
/// Whatever is wrong with the flags or the files they name; a promise that no fleet keeps.
pub(crate) fn size(args: &SizeArgs, terminal: Terminal) -> anyhow::Result<Exit> {
    let (engine, gateway) = building_block(args)?;
    let arrivals = Arrivals::load(&args.arrivals)?;
    if arrivals.skipped > 0 {
        terminal.err(&format!("{}: {} lines were left out\n", arrivals.name, arrivals.skipped));
    }
    let most = args.gpus.get() / engine.gpus.max(1);
    if most == 0 {
        bail!("one engine takes {} GPUs, more than the {} of --gpus", engine.gpus, args.gpus);
    }
    let began = Instant::now();
    let question = Question { args, engine: &engine, gateway: &gateway, arrivals: &arrivals };
    let mut searches = search_all(&question, most, terminal);
    let trials: usize = searches.iter().map(|search| search.trials.len()).sum();
    let key = |search: &Search| search.found().map_or((u32::MAX, 0.0), |found| (found.gpus, -found.goodput));
    searches.sort_by(|one, other| key(one).partial_cmp(&key(other)).unwrap_or(std::cmp::Ordering::Equal));
    terminal.err(&format!("{trials} fleets simulated in {:.1} s\n", began.elapsed().as_secs_f64()));

    let document = json!({
        "version": 1, "arrivals": arrivals.name, "slo": args.slo, "share": args.percentile, "gpus_max": args.gpus,
        "shapes": searches.iter().map(|search| json!({
            "shape": search.shape().to_string(), "smallest": search.found(), "trials": search.trials,
        })).collect::<Vec<_>>(),
    });
    let document = format!("{document:#}\n");
    match args.json.as_deref() {
        Some(path) if path == Path::new("-") => terminal.out(&document)?,
        Some(path) => {
            write_whole(path, document.as_bytes())?;
            show(args, &arrivals, &searches, terminal)?;
        }
        None => show(args, &arrivals, &searches, terminal)?,
    }
    match searches.first().and_then(Search::found) {
        Some(_) => Ok(Exit::Ok),
        None => Err(nobody(args, &searches).into()),
    }
}

struct Question<'a> {
    args: &'a SizeArgs,
    engine: &'a EngineSpec,
    gateway: &'a GatewayEntry,
    arrivals: &'a Arrivals,
}

/// Every shape's search to its end, as many at a time as there are jobs.
fn search_all(question: &Question<'_>, most: u32, terminal: Terminal) -> Vec<Search> {
    let shapes = Shape::all(question.engine);
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let jobs = question.args.jobs.map_or(processors, std::num::NonZeroUsize::get).min(shapes.len());
    let (next, tried) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let number = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(&shape) = shapes.get(number)
                {
                    let mut search = Search::new(shape, most, GUESS);
                    while let Some(engines) = search.next()
                        && let Some(fleet) = shape.fleet(question.engine, engines)
                    {
                        search.tried(try_fleet(question, shape, fleet));
                        let tried = tried.fetch_add(1, Ordering::Relaxed) + 1;
                        terminal.progress(&format!("{tried} fleets tried; {shape}: {engines} engines"));
                    }
                    done.lock().expect("nobody panics with it").push((number, search));
                }
            });
        }
    });
    terminal.progress("");
    let mut searches = done.into_inner().expect("nobody panics with it");
    searches.sort_by_key(|(number, _)| *number);
    searches.into_iter().map(|(_, search)| search).collect()
}

fn try_fleet(question: &Question<'_>, shape: Shape, fleet: Vec<EngineSpec>) -> Trial {
    let Question { args, gateway, arrivals, .. } = question;
    // Fixed roles are what the fewest sequences are chosen within elsewhere; placement by cost does it better.
    let rule = Rule::Policy(Policy::Cost);
    let seed = args.arrivals.seed;
    let settings = RunSettings {
        gateway: GatewaySettings {
            sight: gateway.sight(),
            first_token: gateway.first_token(),
            ..GatewaySettings::new(rule, seed)
        },
        gateways: gateway.count as usize,
        report_delay_seconds: gateway.report_delay_ms / 1e3,
        warm_up: arrivals.warm_up,
        ..RunSettings::new(fleet, rule, seed, arrivals.end)
    };
    let ran = Run::new(&settings, &arrivals.sessions).go();
    let promise = Promise { slo: args.slo, share: args.percentile };
    let summary = Summary::of(&ran.outcomes, &args.slo, ran.engines, ran.given_up);
    Trial::judge(shape, &settings.engines, &ran.outcomes, summary, &promise, arrivals.window_seconds())
}

fn show(args: &SizeArgs, arrivals: &Arrivals, searches: &[Search], terminal: Terminal) -> anyhow::Result<()> {
    let percentile = format!("P{}", 100.0 * args.percentile);
    terminal.out(&format!("{}, {percentile} within {}\n", arrivals.name, promised(args)))?;
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
    for search in searches {
        table.row(row(search));
    }
    terminal.out(&table.render(terminal.width(), terminal.paint_out))?;
    if let Some(best) = searches.first().filter(|search| search.found().is_some()) {
        terminal.out(&frontier(best))?;
    }
    Ok(())
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
        format!("{:.0}", 1e3 * found.ttft_seconds).into(),
        format!("{:.1}", 1e3 * found.itl_seconds).into(),
        percent(side.gpu_seconds_busy, side.gpu_seconds).into(),
        percent(found.summary.cached_share, 1.0).into(),
        binds(search.one_less()).into(),
    ]
}

/// Requests within the promise by GPUs, of the fleets that were tried of one shape.
fn frontier(search: &Search) -> String {
    let mut trials: Vec<&Trial> = search.trials.iter().collect();
    trials.sort_by_key(|trial| trial.gpus);
    let most = trials.iter().map(|trial| trial.goodput).fold(1e-9, f64::max);
    let mut text = format!("\ngoodput by GPUs, {}\n", search.shape());
    for trial in trials {
        let bar = "#".repeat((BAR * trial.goodput / most).round() as usize);
        let kept = if trial.keeps() { "kept" } else { "broken" };
        text += &format!("{:>5} GPUs {:>9.2}/s {bar:<40} {kept}\n", trial.gpus, trial.goodput);
    }
    text
}

fn promised(args: &SizeArgs) -> String {
    let ms = |seconds: f64| format!("{}ms", (1e4 * seconds).round() / 10.0);
    let prefills = match args.slo.ttft_prefills {
        0.0 => String::new(),
        prefills => format!(",prefills={prefills}"),
    };
    format!("ttft={}{prefills},itl={}", ms(args.slo.ttft_seconds), ms(args.slo.itl_seconds))
}

/// What to say where nothing keeps the promise: the fleet that comes nearest, and what it would keep.
fn nobody(args: &SizeArgs, searches: &[Search]) -> Failed {
    let over = |trial: &Trial| {
        let lost = if trial.binds == Some(Binds::Throughput) { 1e6 } else { 0.0 };
        lost + (trial.ttft_seconds / args.slo.ttft_seconds).max(trial.itl_seconds / args.slo.itl_seconds)
    };
    let trials = searches.iter().flat_map(|search| &search.trials);
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
