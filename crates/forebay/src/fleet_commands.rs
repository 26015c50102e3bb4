//! `forebay drain` and `forebay logs`: one engine of a running server.
//!
//! In and out: `/fleet/v1/drain` and `/fleet/v1/logs` of the admin address.

use serde::Deserialize;

use crate::{
    cli::{DrainArgs, LogsArgs},
    client::Client,
    exit::Exit,
    terminal::{Terminal, without_controls},
};

#[derive(Deserialize)]
struct Drained {
    status: String,
}

/// Lets an engine finish what runs and gives it nothing new.
///
/// # Errors
/// No server, or no such engine.
pub(crate) async fn drain(args: &DrainArgs, terminal: Terminal) -> anyhow::Result<Exit> {
    let client = Client::new(&args.door.admin_url, None)?;
    let path = format!("/fleet/v1/drain?engine={}", encoded(&args.engine));
    let drained: Drained = client.post_json(&path).await?;
    terminal.out(&format!("{}: {}\n", args.engine, drained.status))?;
    Ok(Exit::Ok)
}

/// Prints an engine's last log lines.
///
/// # Errors
/// No server, no such engine, or nobody beside it who keeps its log.
pub(crate) async fn logs(args: &LogsArgs, terminal: Terminal) -> anyhow::Result<Exit> {
    let client = Client::new(&args.door.admin_url, None)?;
    let path = format!("/fleet/v1/logs?engine={}&lines={}", encoded(&args.engine), args.lines);
    let lines: Vec<String> = client.get_list(&path).await?;
    for line in lines {
        terminal.out(&format!("{}\n", without_controls(&line)))?;
    }
    Ok(Exit::Ok)
}

/// A name as a query's value.
pub(crate) fn encoded(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let one = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    name.bytes().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::encoded;

    #[test]
    fn names_are_encoded() {
        assert_eq!(encoded("host:8000/a b&c"), "host%3A8000%2Fa%20b%26c");
    }
}
