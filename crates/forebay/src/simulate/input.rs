//! What a simulation is given: the fleet and what arrives, from files or flags.

use std::{fs::File, io::Read as _, path::Path, sync::Arc};

use anyhow::{Context as _, bail};
use forebay_perf_model::Profile;
use forebay_twin::{
    EngineEntry, EngineSpec, Excerpt, Fault, FleetFile, GatewayEntry, Observed, Session, Source, Time, Trace,
    TraceForm, Workload,
};

use super::clients::client_mix;
use crate::{
    cli::{ArrivalArgs, SimulateArgs, SizeArgs},
    serve::profile_named,
};

/// Largest trace that is read: some ten million requests.
const TRACE_BYTES_MAX: u64 = 8 << 30;
/// Largest fleet file.
const FLEET_BYTES_MAX: u64 = 1 << 20;

/// A fleet and what arrives.
pub(crate) struct Input {
    /// The fleet, for people.
    pub(crate) fleet: String,
    pub(crate) engines: Vec<EngineSpec>,
    pub(crate) gateway: GatewayEntry,
    pub(crate) faults: Vec<Fault>,
    pub(crate) arrivals: Arrivals,
}

impl Input {
    /// Reads what the flags name.
    ///
    /// # Errors
    /// A file that cannot be read, or says what cannot be: with its name, the line or the entry.
    pub(crate) fn load(args: &SimulateArgs) -> anyhow::Result<Self> {
        let file = match &args.fleet {
            Some(path) => fleet_file(path)?,
            None => FleetFile::of(args.engines),
        };
        let origin = || args.fleet.as_ref().map_or("--engines".to_owned(), |path| path.display().to_string());
        let engines = file.engines(&|name| profile(name)).with_context(origin)?;
        let faults = file.faults(engines.len()).with_context(origin)?;
        let fleet = file
            .engine
            .iter()
            .filter(|entry| entry.count > 0)
            .map(|entry| format!("{} x {}", entry.count, entry.profile))
            .collect::<Vec<_>>()
            .join(", ");
        let arrivals = match &args.against {
            Some(path) => of_recording(&args.arrivals, path)?,
            None => Arrivals::load(&args.arrivals)?,
        };
        Ok(Self { fleet, engines, gateway: file.gateway, faults, arrivals })
    }
}

/// The engine that a fleet is built from, and what stands before it.
///
/// # Errors
/// As [`Input::load`].
pub(crate) fn building_block(args: &SizeArgs) -> anyhow::Result<(EngineSpec, GatewayEntry)> {
    let file = match &args.fleet {
        Some(path) => fleet_file(path)?,
        None => {
            let entry = EngineEntry { profile: args.profile.clone(), ..EngineEntry::default() };
            FleetFile { engine: vec![entry], gateway: GatewayEntry::default(), fault: Vec::new() }
        }
    };
    let origin = || args.fleet.as_ref().map_or("--profile".to_owned(), |path| path.display().to_string());
    let mut engines = file.engines(&|name| profile(name)).with_context(origin)?;
    if !file.fault.is_empty() {
        bail!("{}: a fleet that is to be sized has no faults; take `[[fault]]` out", origin());
    }
    Ok((engines.swap_remove(0), file.gateway))
}

/// What arrives, and when it counts.
pub(crate) struct Arrivals {
    /// For people.
    pub(crate) name: String,
    pub(crate) sessions: Vec<Session>,
    /// Lines of the trace that were left out.
    pub(crate) skipped: usize,
    pub(crate) warm_up: Time,
    pub(crate) end: Time,
    /// What each request was really like, in the order of sessions; empty where nothing is compared.
    pub(crate) observed: Vec<Option<Observed>>,
}

impl Arrivals {
    /// Reads a trace, or draws a workload.
    ///
    /// # Errors
    /// A trace that cannot be read, or has lines that are wrong.
    pub(crate) fn load(args: &ArrivalArgs) -> anyhow::Result<Self> {
        match (&args.trace, args.workload) {
            (Some(path), _) if path.is_dir() => of_clients(args, path),
            (Some(path), _) => of_trace(args, path),
            (None, Some(workload)) => of_workload(args, workload),
            (None, None) => bail!("give --trace FILE or --workload NAME"),
        }
    }

    /// Seconds in which requests count.
    pub(crate) fn window_seconds(&self) -> f64 {
        self.end.since(self.warm_up).seconds().max(1e-9)
    }
}

fn fleet_file(path: &Path) -> anyhow::Result<FleetFile> {
    let text = read(path, FLEET_BYTES_MAX)?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

fn profile(name: &str) -> Result<Arc<Profile>, String> {
    profile_named(Path::new(name)).map(Arc::new).map_err(|error| format!("profile {name}: {error:#}"))
}

fn of_trace(args: &ArrivalArgs, path: &Path) -> anyhow::Result<Arrivals> {
    let trace = trace(args, path)?;
    let speed = args.speed.or_else(|| args.rate.map(|rate| trace.speed_of(rate))).unwrap_or(1.0);
    Ok(of(args, path, &trace, speed, replayed(args, &trace, speed)))
}

/// A recording, at its own pace, with what was measured.
fn of_recording(args: &ArrivalArgs, path: &Path) -> anyhow::Result<Arrivals> {
    let trace = trace(args, path)?;
    let observed: Vec<_> = trace.requests.iter().map(|request| request.observed).collect();
    if observed.iter().all(Option::is_none) {
        bail!(
            "{}: no line says `ttft` and `e2e`: there is nothing to compare with. `forebay serve --record` writes them",
            path.display()
        );
    }
    Ok(Arrivals { observed, ..of(args, path, &trace, 1.0, replayed(args, &trace, 1.0)) })
}

fn trace(args: &ArrivalArgs, path: &Path) -> anyhow::Result<Trace> {
    let text = read(path, TRACE_BYTES_MAX)?;
    let form = args.form.or_else(|| TraceForm::guess(&text)).with_context(|| {
        format!("{}: its first line is of no known form; name it with --form", path.display())
    })?;
    let mut trace = Trace::parse(&text, form, args.skip_bad).with_context(|| path.display().to_string())?;
    if args.from > 0.0 {
        let seconds = trace.seconds();
        trace.begin_at(args.from);
        if trace.requests.is_empty() {
            bail!(
                "{}: --from {} s is beyond its last request, {seconds} s after the first",
                path.display(),
                args.from
            );
        }
    }
    Ok(trace)
}

/// Drawn from a mix of clients: `--speed` lets its time pass faster, `--rate` scales every client.
fn of_clients(args: &ArrivalArgs, path: &Path) -> anyhow::Result<Arrivals> {
    if args.form.is_some() || args.skip_bad {
        bail!("{}: --form and --skip-bad are for files; a directory holds a mix of clients", path.display());
    }
    let mix = client_mix(path)?;
    let speed = args.speed.unwrap_or(1.0);
    let whole = (mix.end_seconds() - args.from).max(0.0) / speed;
    let seconds = args.seconds.map_or(whole, |seconds| seconds.min(whole));
    let excerpt = Excerpt { from_seconds: args.from, seconds: seconds * speed, rate: args.rate };
    let trace = mix.trace(&excerpt, args.seed).map_err(anyhow::Error::msg);
    let trace = trace.with_context(|| path.display().to_string())?;
    let arrivals = of(args, path, &trace, speed, Time::from_seconds(seconds));
    let silent = if mix.silent > 0 { format!(", {} silent", mix.silent) } else { String::new() };
    Ok(Arrivals {
        name: format!("{}: {} clients{silent}", arrivals.name, mix.sending() + mix.silent),
        ..arrivals
    })
}

/// When a replay of a trace is over.
fn replayed(args: &ArrivalArgs, trace: &Trace, speed: f64) -> Time {
    // The last request counts too.
    let whole = Time(Time::from_seconds(trace.seconds() / speed).0 + 1);
    args.seconds.map_or(whole, |seconds| whole.min(Time::from_seconds(seconds)))
}

fn of(args: &ArrivalArgs, path: &Path, trace: &Trace, speed: f64, end: Time) -> Arrivals {
    Arrivals {
        name: path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        sessions: trace.sessions(speed, end),
        skipped: trace.skipped,
        warm_up: Time::from_seconds(args.warm_up.unwrap_or(0.0)).min(end),
        end,
        observed: Vec::new(),
    }
}

fn of_workload(args: &ArrivalArgs, workload: Workload) -> anyhow::Result<Arrivals> {
    let defaults = workload.defaults();
    let warm_up = args.warm_up.unwrap_or(defaults.warm_up_seconds);
    let end = Time::from_seconds(warm_up + args.seconds.unwrap_or(defaults.seconds));
    let rate = args.rate.unwrap_or(defaults.rate);
    let source = Source::new(workload, None).map_err(anyhow::Error::msg)?;
    Ok(Arrivals {
        name: format!("{workload} at {rate}/s"),
        sessions: source.sessions(rate, end, args.seed),
        skipped: 0,
        warm_up: Time::from_seconds(warm_up),
        end,
        observed: Vec::new(),
    })
}

pub(super) fn read(path: &Path, bytes_max: u64) -> anyhow::Result<String> {
    let named = || path.display().to_string();
    let file = File::open(path).with_context(named)?;
    let mut text = String::new();
    file.take(bytes_max + 1).read_to_string(&mut text).with_context(named)?;
    if text.len() as u64 > bytes_max {
        bail!("{}: more than {bytes_max} bytes", named());
    }
    Ok(text)
}
