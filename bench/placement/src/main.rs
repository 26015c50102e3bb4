//! The quality of placement, in virtual time: the crates that decide and schedule in production, with profiles of real
//! engines for a clock.
//!
//! JSON or a table on standard output, progress on standard error. `README.md` says what is modelled. Start at [`main`];
//! a run is [`sim::Run`], what is asked in [`workload`], what comes out in [`metrics`].

mod check;
mod clock;
mod content;
mod draw;
mod engine;
mod gateway;
mod goodput;
mod metrics;
mod options;
mod rule;
mod scenario;
mod sim;
mod table;
mod time;
mod trial;
mod workload;

use std::{path::PathBuf, process::ExitCode};

use options::{Command, Options};
use scenario::{Source, Workload};

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).and_then(|options| obey(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn obey(options: &Options) -> Result<(), String> {
    match options.command {
        Command::Check => return check::check(options),
        Command::Time => return time::time(options),
        Command::Run | Command::Goodput | Command::Table => {}
    }
    let trace =
        std::env::vars_os().find(|(name, _)| name == "MOONCAKE_TRACE").map(|(_, path)| PathBuf::from(path));
    if options.workload == Workload::Trace && trace.is_none() {
        eprintln!("skipped: no trace at hand; MOONCAKE_TRACE names the file, in the published JSONL format");
        println!(r#"{{"skipped": ["MOONCAKE_TRACE"]}}"#);
        return Ok(());
    }
    let source = Source::new(options.workload, trace.as_ref())?;
    match options.command {
        Command::Run => trial::run(options, &source),
        Command::Goodput => goodput::goodput(options, &source),
        Command::Table => table::table(options, &source),
        Command::Check | Command::Time => unreachable!("it was obeyed above"),
    }
}
