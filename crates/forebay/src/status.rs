//! `forebay status`: the fleet as a table.
//!
//! In: `/fleet/v1/engines` of the admin address. Out: one row an engine, then one line for all. Start at [`run`].

mod view;

use std::time::Duration;

use forebay_gateway::orchestrator::api::EngineStatus;
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    cli::StatusArgs,
    client::{Client, ClientError},
    exit::{Exit, describe},
    terminal::{Terminal, Tone},
};

/// Where the fleet is described.
const ENGINES_PATH: &str = "/fleet/v1/engines";

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
    let mut looks = interval(args.interval.max(Duration::from_millis(1)));
    // A slow server is asked less often, never twice in a row.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks.tick().await;
    let mut next = Some(first);
    let mut is_first = true;
    loop {
        let picture = match next.take() {
            Some(picture) => picture,
            None => picture(&client, args.json, terminal).await.unwrap_or_else(|error| {
                let text = describe(&error.into());
                format!("{}\n", terminal.paint_out.tone(Tone::Bad, &text))
            }),
        };
        terminal.next_picture(is_first)?;
        terminal.out(&picture)?;
        is_first = false;
        tokio::select! {
            _ = looks.tick() => {}
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                return Ok(Exit::Ok);
            }
        }
    }
}

async fn picture(client: &Client, json: bool, terminal: Terminal) -> Result<String, ClientError> {
    if json {
        let body = client.get(ENGINES_PATH).await?;
        return Ok(format!("{}\n", String::from_utf8_lossy(&body).trim_end()));
    }
    let engines: Vec<EngineStatus> = client.get_list(ENGINES_PATH).await?;
    Ok(view::render(&engines, terminal.width(), terminal.paint_out))
}
