//! `forebay audit`: what a fleet that runs without Forebay would gain, from what its engines show anyway.
//!
//! In: engines by URL. Out: a table, JSON, a trace. Nothing is asked of an engine but its documents and its KV events; the
//! inference and the replays are `forebay-audit`'s. Start at [`run`]: it finds the engines ([`fleet`]), looks on
//! ([`watch`]), replays ([`replays`]) and shows ([`show`]).

mod fleet;
mod replays;
mod show;
mod watch;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use forebay_audit::{Inferred, Lost};
use forebay_twin::TraceRequest;

use self::{
    fleet::Fleet,
    replays::{Plan, Replayed},
};
use crate::{
    cli::AuditArgs,
    exit::{Exit, Failed},
    files::write_whole,
    settings::Settings,
    terminal::Terminal,
};

/// Everything that there is to show.
struct Audit<'a> {
    args: &'a AuditArgs,
    fleet: &'a Fleet,
    inferred: &'a Inferred,
    lost: Lost,
    replayed: &'a Replayed,
}

/// The command.
///
/// # Errors
/// Settings that cannot be used; engines that cannot be reached, do not say enough or are of different kinds; too few requests.
pub(crate) async fn run(
    args: &AuditArgs,
    environment: &BTreeMap<String, String>,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    let settings = Settings::load(&args.settings(), environment)?;
    // A profile that does not exist is said before half an hour has passed.
    let profile = Arc::new(crate::serve::profile_named(Path::new(&args.profile))?);
    if profile.is_of_group() {
        let sentence =
            format!("the profile {} is of ranks that step together; audit takes one rank's", args.profile);
        return Err(Failed { exit: Exit::Usage, sentence }.into());
    }
    let fleet = Fleet::find(&settings, environment, terminal).await?;
    let recorder =
        watch::record(&fleet, Duration::from_secs_f64(60.0 * args.minutes), args.every, terminal).await;
    let inferred = recorder.infer().map_err(|too_little| {
        let seen = recorder.requests();
        let sentence = format!(
            "{too_little}; {seen:.0} came in all: look on for longer (--minutes), or when there is more"
        );
        Failed { exit: Exit::Failure, sentence }
    })?;
    if let Some(path) = &args.record {
        let requests = forebay_audit::trace(&inferred.sessions(1), inferred.block_tokens);
        let text: String =
            requests.iter().map(TraceRequest::line).flat_map(|line| [line, "\n".to_owned()]).collect();
        write_whole(path, text.as_bytes())?;
    }
    let inferred = Arc::new(inferred);
    let bench = fleet.bench(&inferred, args, &profile)?;
    let stop = Arc::new(AtomicBool::new(false));
    let plan = Plan { bench, inferred: inferred.clone(), seeds: args.seeds, jobs: args.jobs, fit: args.fit };
    let stopped = stop.clone();
    let replaying = tokio::task::spawn_blocking(move || replays::run(plan, &stopped, terminal));
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
        stop.store(true, Ordering::Relaxed);
    };
    let replayed = tokio::select! {
        replayed = replaying => replayed?,
        () = interrupted => return Ok(Exit::Interrupted),
    };
    let audit =
        Audit { args, fleet: &fleet, inferred: &inferred, lost: recorder.lost(), replayed: &replayed };
    let to_standard_output = args.json.as_deref() == Some(Path::new("-"));
    if let Some(path) = &args.json {
        let text = show::document(&audit);
        if to_standard_output { terminal.out(&text)? } else { write_whole(path, text.as_bytes())? }
    }
    if !to_standard_output {
        terminal.out(&show::table(&audit, terminal.width(), terminal.paint_out))?;
    }
    Ok(Exit::Ok)
}
