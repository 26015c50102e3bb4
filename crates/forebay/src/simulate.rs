//! `forebay simulate` and `forebay size`: a trace or a generator against a fleet in virtual time, under one policy or several.
//!
//! In: files and flags. Out: a table, JSON, a page with plots. The twin decides everything; this reads, runs the policies
//! beside each other on threads, and writes. Start at [`run`].

mod chaos;
mod clients;
mod document;
mod figures;
mod input;
mod page;
mod sizing;

use std::{
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Instant,
};

use forebay_twin::{Fidelity, GatewaySettings, Ran, RecordSettings, Rule, Run, RunSettings, Summary};

use self::input::Input;
pub(crate) use self::sizing::size;
use crate::{
    cli::SimulateArgs,
    exit::{Exit, Failed},
    files::write_whole,
    terminal::Terminal,
};

/// Samples of each engine in a page's timeline.
const SAMPLES: f64 = 250.0;
/// Steps of each run that a page shows.
const STEPS_MAX: usize = 20_000;

/// One policy's run, summed up.
pub(crate) struct Finished {
    rule: Rule,
    summary: Summary,
    /// Requests within the promise, a second of arrivals.
    goodput: f64,
    ran: Ran,
    /// Beside what was measured, where that is known.
    fidelity: Option<Fidelity>,
}

/// The command.
///
/// # Errors
/// Whatever is wrong with the flags or the files they name, and files that cannot be written.
pub(crate) fn run(args: &SimulateArgs, terminal: Terminal) -> anyhow::Result<Exit> {
    let usage = |sentence: String| Failed { exit: Exit::Usage, sentence };
    if args.chaos {
        return chaos::run(args, terminal);
    }
    let arrives = args.arrivals.trace.is_some() || args.arrivals.workload.is_some() || args.against.is_some();
    if !arrives {
        return Err(usage("give --trace FILE, --workload NAME, --against FILE or --chaos".to_owned()).into());
    }
    let rules = args.rules().map_err(|problem| usage(format!("--policy {problem}")))?;
    let input = Input::load(args)?;
    if input.arrivals.skipped > 0 {
        terminal.err(&format!("{}: {} lines were left out\n", input.arrivals.name, input.arrivals.skipped));
    }
    let began = Instant::now();
    let finished = run_all(args, &rules, &input, terminal);
    let seconds = began.elapsed().as_secs_f64();
    if let Some(path) = &args.report {
        write_whole(path, page::render(args, &input, &finished).as_bytes())?;
    }
    let to_standard_output = args.json.as_deref() == Some(Path::new("-"));
    if let Some(path) = &args.json {
        let text = document::render(args, &input, &finished);
        if to_standard_output { terminal.out(&text)? } else { write_whole(path, text.as_bytes())? }
    }
    if !to_standard_output {
        terminal.out(&figures::table(&input, &finished, terminal.width(), terminal.paint_out))?;
        terminal.out(&figures::compared(&finished, terminal.width(), terminal.paint_out))?;
    }
    let requests: usize = finished.iter().map(|finished| finished.summary.requests).sum();
    let speed = requests as f64 / seconds.max(1e-9);
    terminal.err(&format!("{requests} requests simulated in {seconds:.1} s, {speed:.0} a second\n"));
    Ok(Exit::Ok)
}

/// Every rule's run, in the order of `rules`, as many at a time as there are jobs.
fn run_all(args: &SimulateArgs, rules: &[Rule], input: &Input, terminal: Terminal) -> Vec<Finished> {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let jobs = args.jobs.map_or(processors, std::num::NonZeroUsize::get).min(rules.len());
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<Finished>>> = Mutex::new(rules.iter().map(|_| None).collect());
    let (tell, told) = mpsc::sync_channel::<(usize, f64)>(64);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            let (tell, next, done) = (tell.clone(), &next, &done);
            scope.spawn(move || {
                while let number = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(&rule) = rules.get(number)
                {
                    let finished = run_one(args, rule, input, &mut |share| {
                        // Whoever shows it may be slow: what it misses is overtaken anyway.
                        let _ = tell.try_send((number, share));
                        true
                    });
                    done.lock().expect("nobody panics with it")[number] = Some(finished);
                    let _ = tell.send((number, 1.0));
                }
            });
        }
        drop(tell);
        let mut shares = vec![0.0; rules.len()];
        for (number, share) in told {
            shares[number] = share;
            terminal.progress(&figures::progress(rules, &shares));
        }
        terminal.progress("");
    });
    done.into_inner().expect("nobody panics with it").into_iter().flatten().collect()
}

fn run_one(
    args: &SimulateArgs,
    rule: Rule,
    input: &Input,
    progress: &mut dyn FnMut(f64) -> bool,
) -> Finished {
    let gateway = GatewaySettings {
        sight: input.gateway.sight(),
        first_token: input.gateway.first_token(),
        ..GatewaySettings::new(rule, args.arrivals.seed)
    };
    let span = input.arrivals.end.seconds().max(1e-3);
    let settings = RunSettings {
        gateway,
        gateways: input.gateway.count as usize,
        report_delay_seconds: input.gateway.report_delay_ms / 1e3,
        gives_up: false,
        record: args
            .report
            .as_ref()
            .map(|_| RecordSettings { sample_seconds: span / SAMPLES, steps_max: STEPS_MAX }),
        faults: input.faults.clone(),
        warm_up: input.arrivals.warm_up,
        ..RunSettings::new(input.engines.clone(), rule, args.arrivals.seed, input.arrivals.end)
    };
    let ran = Run::new(&settings, &input.arrivals.sessions).go_with(progress);
    let summary = Summary::of(&ran.outcomes, &args.slo, ran.engines, ran.given_up);
    let goodput = summary.slo_share * summary.requests as f64 / input.arrivals.window_seconds();
    let before = input.arrivals.sessions.iter().take_while(|session| session.at < input.arrivals.warm_up);
    let observed = input.arrivals.observed.get(before.count()..).unwrap_or_default();
    let fidelity = (!observed.is_empty()).then(|| Fidelity::of(observed, &ran.outcomes));
    Finished { rule, summary, goodput, ran, fidelity }
}
