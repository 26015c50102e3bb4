//! The quality of placement, in virtual time: the crates that decide and schedule in production, with profiles of real
//! engines for a clock.
//!
//! JSON or a table on standard output, progress on standard error. `README.md` says what is modelled. Start at [`main`];
//! a run is `forebay_twin::Run`.

mod check;
mod goodput;
mod options;
mod table;
mod time;
mod trial;

use std::{path::PathBuf, process::ExitCode};

use forebay_twin::{Source, Workload};
use options::{Command, Options};

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
    let text = match trace.filter(|_| options.workload == Workload::Trace) {
        Some(path) => {
            Some(std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?)
        }
        None => None,
    };
    let source = Source::new(options.workload, text.as_deref())?;
    match options.command {
        Command::Run => trial::run(options, &source),
        Command::Goodput => goodput::goodput(options, &source),
        Command::Table => table::table(options, &source),
        Command::Check | Command::Time => unreachable!("it was obeyed above"),
    }
}
