//! Where an engine's KV events can be subscribed to.

use std::time::Duration;

use forebay_engine_wire::discovery::{Dialled, KvSource, Server, ZmqAddress};
use tokio::{net::TcpStream, time::timeout};

use crate::{driver::CacheSight, remote::findings::Findings};

/// For a connection that only shows whether somebody listens.
const KNOCK_MAX: Duration = Duration::from_secs(1);

/// Where the ranks' events are, and how much is therefore known of the engine's cache. `sources`: by rank, in order.
pub(super) async fn sight(
    sources: &[KvSource],
    server: Server,
    host: &str,
    findings: &mut Findings,
) -> (CacheSight, Vec<Dialled>) {
    let mut dialled = Vec::with_capacity(sources.len());
    for (rank, source) in (0..).zip(sources) {
        let source = match source.dialled(host) {
            Ok(found) => Dialled { dp_rank: rank, ..found },
            Err(error) => return blind(format!("its KV events cannot be subscribed to: {error}"), findings),
        };
        dialled.push(source);
    }
    for (found, source) in dialled.iter().zip(sources) {
        if let Err(why) = knock(&found.events).await {
            let mut what =
                format!("its KV events cannot be subscribed to: nobody listens at {} ({why})", found.events);
            if server == Server::Vllm && !source.vllm_binds() {
                what += "; vLLM connects to a concrete address instead of listening there: use tcp://*:PORT";
            }
            return blind(what, findings);
        }
    }
    if let Some(first) = dialled.iter().find(|source| source.replay.is_none()) {
        findings.warn(
            format!("KV events of rank {} that are missed cannot be asked for again", first.dp_rank),
            r#"add "replay_endpoint":"tcp://*:PORT" to --kv-events-config"#,
        );
    }
    (CacheSight::Events, dialled)
}

/// The engine publishes none.
pub(super) fn off(dp_ranks: u16, findings: &mut Findings) -> (CacheSight, Vec<Dialled>) {
    // The ports of the ranks count up from both.
    let replay = 5557 + u32::from(dp_ranks.max(1));
    findings.warn(
        "KV events are off, so what it caches is only guessed",
        &format!(
            "start it with --kv-events-config '{{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\
             \"endpoint\":\"tcp://*:5557\",\"replay_endpoint\":\"tcp://*:{replay}\"}}'"
        ),
    );
    (CacheSight::Approximate { why: "its KV events are off".into() }, Vec::new())
}

fn blind(what: String, findings: &mut Findings) -> (CacheSight, Vec<Dialled>) {
    findings.regret(what.clone());
    (CacheSight::Approximate { why: what.into() }, Vec::new())
}

async fn knock(at: &ZmqAddress) -> Result<(), String> {
    match timeout(KNOCK_MAX, TcpStream::connect((at.host.as_str(), at.port))).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no connection in time".to_owned()),
    }
}
