//! `forebay index-server`: the KV prefix index alone, for those who have a router.
//!
//! In: flags, the settings that are shared with `serve`, signals. Out: two servers, and their addresses as one line of JSON
//! on standard output. Start at [`run`].

use std::net::SocketAddr;

use anyhow::Context as _;
use forebay_index_server::{
    IndexServer, ListenLimits, serve_grpc, serve_http,
    service::{Limits, ServiceSettings},
};
use forebay_kv_hash::{ChainLimits, HashKey};
use forebay_kv_index::IndexLimits;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    cli::IndexServerArgs,
    exit::Exit,
    settings::{
        Settings, is_exposed,
        problem::{Problem, SettingsError},
    },
    terminal::Terminal,
};

/// Serves until a signal to stop.
///
/// # Errors
/// What kept it from starting.
pub(crate) async fn run(
    args: &IndexServerArgs,
    settings: &Settings,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    check(args, settings)?;
    let http = bind(args.listen, "--listen").await?;
    let grpc = bind(args.grpc_listen, "--grpc-listen").await?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);

    let server = IndexServer::new(service_settings(args, settings)?);
    for spec in &args.engine {
        server.register(spec.clone()).with_context(|| format!("--engine {spec}"))?;
    }
    let limits = ListenLimits {
        connections_max: settings.http.connections_max.get(),
        body_bytes_max: settings.http.body_bytes_max.as_usize(),
        ..ListenLimits::default()
    };
    let (http_address, grpc_address) = (http.local_addr()?, grpc.local_addr()?);
    tracing::info!(http = %http_address, grpc = %grpc_address, "serving the index");
    let line = serde_json::json!({ "http": format!("http://{http_address}"), "grpc": grpc_address });
    let _ = terminal.out(&format!("{line}\n")); // nobody may be reading

    let (stop, stopped) = watch::channel(false);
    let wait = |mut stopped: watch::Receiver<bool>| async move {
        let _stopped = stopped.wait_for(|stopped| *stopped).await;
    };
    let signals = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: no new connections, running answers finish");
        stop.send_replace(true);
    };
    tokio::join!(
        serve_http(http, server.clone(), limits.clone(), wait(stopped.clone())),
        serve_grpc(grpc, server.clone(), limits, wait(stopped)),
        signals,
    );
    Ok(Exit::Ok)
}

/// The rules of `serve` for addresses that other machines can reach.
fn check(args: &IndexServerArgs, settings: &Settings) -> Result<(), SettingsError> {
    let mut problems = Vec::new();
    let IndexServerArgs { listen, grpc_listen, .. } = args;
    for (flag, address) in [("listen", listen), ("grpc-listen", grpc_listen)] {
        if is_exposed(*address) && !settings.doors.insecure {
            problems.push(Problem::Together(format!(
                "`{flag}` is {address}, which other machines can reach, and the index asks for no key: use a loopback \
                 address, or set `insecure` if that is meant"
            )));
        }
    }
    if listen == grpc_listen && listen.port() != 0 {
        problems.push(Problem::Together(format!(
            "`listen` and `grpc-listen` are both {listen}; they need an address each"
        )));
    }
    if problems.is_empty() { Ok(()) } else { Err(SettingsError(problems)) }
}

fn service_settings(args: &IndexServerArgs, settings: &Settings) -> anyhow::Result<ServiceSettings> {
    let key = match settings.kv.hash_key {
        Some(key) => key,
        None => {
            let mut key = [0; 16];
            getrandom::fill(&mut key)
                .context("the system gives no entropy for the hash key; set `hash_key`")?;
            tracing::info!(
                "no hash key is set, so one was drawn: hashes mean something to this process only"
            );
            HashKey(key)
        }
    };
    Ok(ServiceSettings {
        key,
        block_size_tokens: settings.engines.block_size_tokens.get(),
        index: IndexLimits {
            bytes_max: settings.limits.index_bytes_max.as_usize(),
            ..IndexLimits::default()
        },
        chains: ChainLimits { bytes_max: settings.limits.chain_bytes_max.as_usize() },
        limits: Limits {
            engines_max: args.engines_max,
            blocks_max: args.rank_blocks_max,
            lease: args.lease,
            ..Limits::default()
        },
    })
}

async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address} ({flag}): choose another port, or end what uses this one")
    })
}
