//! `forebay status`: the fleet as a table.
//!
//! In: `/fleet/v1/engines` and `/fleet/v1/predictions` of the admin address. Out: one row an engine, then one line for all and one
//! for each model's predictions. Start at [`run`].

mod view;

use std::time::Duration;

use anyhow::Context as _;
use forebay_gateway::{decisions::Accuracy, orchestrator::api::EngineStatus};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{MissedTickBehavior, interval},
};

use crate::{
    cli::StatusArgs,
    client::{Client, ClientError},
    exit::{Exit, describe},
    terminal::{Terminal, Tone},
};

/// Where the fleet is described.
const ENGINES_PATH: &str = "/fleet/v1/engines";
/// How far its predictions are off.
const PREDICTIONS_PATH: &str = "/fleet/v1/predictions";

/// A watch looks no more often than this.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// Shows the fleet, once or until Ctrl-C.
///
/// # Errors
/// No server, or a strange one. With `--watch` only the first look can fail: a server that restarts is waited for.
pub(crate) async fn run(args: &StatusArgs, terminal: Terminal) -> anyhow::Result<Exit> {
    let client = Client::new(&args.admin_url, None)?;
    let first = picture(&client, args.json, terminal).await?;
    if !args.watch {
        terminal.out(&first)?;
        return Ok(Exit::Ok);
    }
    // One listener for the whole watch: a Ctrl-C while a picture is fetched must not be lost.
    let mut interrupts = signal(SignalKind::interrupt()).context("cannot listen to Ctrl-C")?;
    tokio::select! {
        result = watch(&client, args, first, terminal) => match result? {},
        _ = interrupts.recv() => Ok(Exit::Ok),
    }
}

/// Shows the fleet again and again.
async fn watch(
    client: &Client,
    args: &StatusArgs,
    first: String,
    terminal: Terminal,
) -> anyhow::Result<std::convert::Infallible> {
    let mut looks = interval(args.interval.max(INTERVAL_MIN));
    // A slow server is asked less often, never twice in a row.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks.tick().await;
    terminal.next_picture(true)?;
    terminal.out(&first)?;
    loop {
        looks.tick().await;
        let picture = picture(client, args.json, terminal).await.unwrap_or_else(|error| {
            let text = describe(&error.into());
            format!("{}\n", terminal.paint_out.tone(Tone::Bad, &text))
        });
        terminal.next_picture(false)?;
        terminal.out(&picture)?;
    }
}

async fn picture(client: &Client, json: bool, terminal: Terminal) -> Result<String, ClientError> {
    if json {
        let body = client.get(ENGINES_PATH).await?;
        return Ok(format!("{}\n", String::from_utf8_lossy(&body).trim_end()));
    }
    let engines: Vec<EngineStatus> = client.get_list(ENGINES_PATH).await?;
    let predictions: Vec<Accuracy> = match client.get_list(PREDICTIONS_PATH).await {
        // A gateway of an earlier build does not say.
        Err(ClientError::Refused { status: 404, .. }) => Vec::new(),
        listed => listed?,
    };
    Ok(view::render(&engines, &predictions, terminal.width(), terminal.paint_out))
}
