//! The `forebay` binary: settings, composition and commands. It decides nothing; decisions are made by the crates that
//! it composes.
//!
//! Start at [`main`]: it alone touches arguments, environment and exit code.
#![doc = include_str!("../README.md")]

mod agent;
mod audit;
mod bench;
mod chat;
mod cli;
mod client;
mod config;
mod decisions;
mod doctor;
mod engine;
mod exit;
mod explain;
mod figures;
mod files;
mod fleet_commands;
mod index_server;
mod keys;
mod policy;
mod profile;
mod serve;
mod settings;
mod simulate;
mod sse;
mod status;
mod table;
mod telemetry;
mod terminal;

use std::{collections::BTreeMap, ffi::OsString, process::ExitCode};

use clap::CommandFactory as _;
use cli::{Cli, Command};
use exit::Exit;
use settings::{SettingFlags, Settings};
use terminal::Terminal;

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let environment: BTreeMap<String, String> = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .collect();
    let cli = match cli::parse(&arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // A reader that has gone needs no help.
            let _ = error.print();
            return cli::exit_of(&error).into();
        }
    };
    let terminal = Terminal::of_this_process(cli.color, &environment);
    let exit = run(&cli.command, &environment, terminal).unwrap_or_else(|error| {
        let exit = Exit::of(&error);
        if exit != Exit::Ok {
            let label = terminal.paint_err.tone(terminal::Tone::Bad, "error:");
            terminal.err(&format!("{label} {}\n", exit::describe(&error)));
        }
        exit
    });
    exit.into()
}

/// Every command, in one line where that is enough.
fn run(
    command: &Command,
    environment: &BTreeMap<String, String>,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    match command {
        Command::Serve { settings } => {
            let settings = Settings::load(settings, environment)?;
            telemetry::init(&settings.process, terminal);
            server_runtime(&settings)?.block_on(serve::run(&settings, environment))?;
            Ok(Exit::Ok)
        }
        Command::Engine(args) => {
            telemetry::init(&Settings::load(&SettingFlags::default(), environment)?.process, terminal);
            tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(engine::run(
                args,
                environment,
                terminal,
            ))
        }
        Command::IndexServer(args) => {
            let settings = Settings::load(args.shared.flags(), environment)?;
            telemetry::init(&settings.process, terminal);
            server_runtime(&settings)?.block_on(index_server::run(args, &settings, terminal))
        }
        Command::Agent(args) => {
            telemetry::init(&Settings::load(&SettingFlags::default(), environment)?.process, terminal);
            client_runtime()?.block_on(agent::run(args, environment))
        }
        Command::Audit(args) => client_runtime()?.block_on(audit::run(args, environment, terminal)),
        Command::Doctor { args, settings } => {
            let settings = Settings::load(settings, environment)?;
            client_runtime()?.block_on(doctor::run(&settings, environment, args.json, terminal))
        }
        Command::Profile(args) => {
            // Not `client_runtime`: a batch's streams must be read while one of them is parsed.
            tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(profile::run(
                args,
                environment,
                terminal,
            ))
        }
        Command::Bench(args) => {
            // Not `client_runtime`: many streams are read at once.
            tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(bench::run(
                args,
                environment,
                terminal,
            ))
        }
        Command::Simulate(args) => simulate::run(args, terminal),
        Command::Size(args) => simulate::size(args, terminal),
        Command::Chat(args) => client_runtime()?.block_on(chat::run(args, environment, terminal)),
        Command::Status(args) => client_runtime()?.block_on(status::run(args, terminal)),
        Command::Explain(args) => client_runtime()?.block_on(explain::run(args, terminal)),
        Command::Decisions(args) => client_runtime()?.block_on(decisions::run(args, terminal)),
        Command::Policy(command) => client_runtime()?.block_on(policy::run(command, terminal)),
        Command::Drain(args) => client_runtime()?.block_on(fleet_commands::drain(args, terminal)),
        Command::Logs(args) => client_runtime()?.block_on(fleet_commands::logs(args, terminal)),
        Command::Config(command) => config::run(command, environment, terminal),
        Command::Keys(cli::KeysCommand::Add { tenant }) => keys::add(tenant, terminal),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "forebay", &mut script);
            terminal.out(&String::from_utf8_lossy(&script))?;
            Ok(Exit::Ok)
        }
        Command::Version => {
            terminal.out(concat!("forebay ", env!("CARGO_PKG_VERSION"), "\n"))?;
            Ok(Exit::Ok)
        }
    }
}

fn server_runtime(settings: &Settings) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = settings.process.threads {
        builder.worker_threads(threads.get());
    }
    builder.thread_name("forebay").enable_all().build()
}

fn client_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
