//! `forebay size`: the smallest fleet of each shape that keeps a promise, what each further GPU is good for, and how much KV memory
//! the best fleet needs.

mod page;
mod show;

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
    Binds, Bisection, EngineSpec, GatewayEntry, GatewaySettings, KV_PARTS, Promise, Rule, Run, RunSettings,
    Search, Shape, Summary, Trial, between, frontier, with_less_kv,
};
use serde::Serialize;
use serde_json::json;

use super::{
    input::{Arrivals, building_block},
    write_whole,
};
use crate::{cli::SizeArgs, exit::Exit, terminal::Terminal};

/// Engines of the first fleet of each shape that is tried.
const GUESS: u32 = 4;
/// Fleets of the best shape that are tried for the frontier alone, at most.
const FRONTIER_POINTS: u32 = 8;

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
    let found = find(&question, most, terminal);
    terminal.err(&format!("{} fleets simulated in {:.1} s\n", found.fleets, began.elapsed().as_secs_f64()));

    let name = &arrivals.name;
    if let Some(path) = &args.report {
        write_whole(path, page::render(args, name, &found).as_bytes())?;
    }
    let document = json!({
        "version": 1, "arrivals": name, "slo": args.slo, "share": args.percentile, "gpus_max": args.gpus,
        "shapes": found.searches.iter().map(|search| json!({
            "shape": search.shape().to_string(), "smallest": search.found(), "trials": search.trials,
        })).collect::<Vec<_>>(),
        "frontier": found.frontier(), "kv": found.kv,
    });
    let document = format!("{document:#}\n");
    match args.json.as_deref() {
        Some(path) if path == Path::new("-") => terminal.out(&document)?,
        Some(path) => {
            write_whole(path, document.as_bytes())?;
            show::show(args, name, &found, terminal)?;
        }
        None => show::show(args, name, &found, terminal)?,
    }
    match found.best() {
        Some(_) => Ok(Exit::Ok),
        None => Err(show::nobody(args, &found.searches).into()),
    }
}

/// What came of all runs.
struct Found {
    /// Of each shape, the one with the smallest fleet first.
    searches: Vec<Search>,
    /// Fleets of the best shape that were tried for the frontier alone.
    more: Vec<Trial>,
    kv: Option<KvNeed>,
    /// Runs.
    fleets: usize,
}

/// How much of its KV memory a fleet needs.
#[derive(Debug, Serialize)]
struct KvNeed {
    /// Blocks of one engine as it is.
    blocks_total: u32,
    /// The least that keep the promise, to a sixteenth.
    blocks_enough: u32,
    /// What less of them break.
    binds_below: Option<Binds>,
}

impl Found {
    fn best(&self) -> Option<&Trial> {
        self.searches.first().and_then(Search::found)
    }

    fn frontier(&self) -> Vec<&Trial> {
        frontier(self.searches.iter().flat_map(|search| &search.trials).chain(&self.more))
    }
}

struct Question<'a> {
    args: &'a SizeArgs,
    engine: &'a EngineSpec,
    gateway: &'a GatewayEntry,
    arrivals: &'a Arrivals,
}

fn find(question: &Question<'_>, most: u32, terminal: Terminal) -> Found {
    let tried = AtomicUsize::new(0);
    let try_fleet = |shape: Shape, fleet: Vec<EngineSpec>| {
        let engines = fleet.len();
        let trial = try_fleet(question, shape, fleet);
        let tried = tried.fetch_add(1, Ordering::Relaxed) + 1;
        terminal.progress(&format!("{tried} fleets tried; {shape}: {engines} engines"));
        trial
    };
    let jobs = question.args.jobs.map(std::num::NonZeroUsize::get);
    let mut searches = beside_each_other(jobs, &Shape::all(question.engine), |&shape| {
        let mut search = Search::new(shape, most, GUESS);
        while let Some(engines) = search.next()
            && let Some(fleet) = shape.fleet(question.engine, engines)
        {
            search.tried(try_fleet(shape, fleet));
        }
        search
    });
    let key = |search: &Search| search.found().map_or((u32::MAX, 0.0), |found| (found.gpus, -found.goodput));
    searches.sort_by(|one, other| key(one).partial_cmp(&key(other)).unwrap_or(std::cmp::Ordering::Equal));

    let (mut more, mut kv) = (Vec::new(), None);
    if let Some(found) = searches[0].found() {
        let shape = found.shape;
        let counts: Vec<u32> = searches[0].trials.iter().map(|trial| trial.engines).collect();
        let counts = between(&counts, found.engines, most, FRONTIER_POINTS);
        let fleets: Vec<_> = counts.iter().filter_map(|&count| shape.fleet(question.engine, count)).collect();
        more = beside_each_other(jobs, &fleets, |fleet| try_fleet(shape, fleet.clone()));
        kv = shape
            .fleet(question.engine, found.engines)
            .map(|fleet| kv_need(&fleet, |fleet| try_fleet(shape, fleet)));
    }
    terminal.progress("");
    Found { searches, more, kv, fleets: tried.into_inner() }
}

/// The least KV blocks with which `fleet` keeps the promise that it keeps.
fn kv_need(fleet: &[EngineSpec], try_fleet: impl Fn(Vec<EngineSpec>) -> Trial) -> KvNeed {
    let mut parts = Bisection::below(KV_PARTS);
    let mut binds_below = None;
    while let Some(tried) = parts.next() {
        let trial = try_fleet(with_less_kv(fleet, tried));
        parts.tried(tried, trial.keeps());
        // The last that breaks is the one next to what is enough.
        binds_below = trial.binds.or(binds_below);
    }
    let enough = with_less_kv(fleet, parts.found().unwrap_or(KV_PARTS));
    let blocks = |fleet: &[EngineSpec]| fleet[0].kind.scheduler.blocks_total;
    KvNeed { blocks_total: blocks(fleet), blocks_enough: blocks(&enough), binds_below }
}

/// What `one` makes of each item, in their order, as many at a time as there are jobs or processors.
fn beside_each_other<T: Sync, U: Send>(
    jobs: Option<usize>,
    items: &[T],
    one: impl Fn(&T) -> U + Sync,
) -> Vec<U> {
    let processors = || std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.unwrap_or_else(processors).min(items.len()) {
            scope.spawn(|| {
                while let number = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(item) = items.get(number)
                {
                    let made = one(item);
                    done.lock().expect("nobody panics with it").push((number, made));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("nobody panics with it");
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, made)| made).collect()
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
