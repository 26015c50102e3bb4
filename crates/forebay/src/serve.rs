//! `forebay serve`: puts engines, orchestrator and HTTP together, and takes them apart again.

mod attached;
mod cluster;
mod fleet;
mod outside;
mod profiles;
mod texts;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use forebay_gateway::{
    arrivals::ArrivalRecorder,
    decisions::{DecisionSink, SinkPlan},
    http::{ApiKeys, Gateway, Parts, serve_admin, serve_public},
    metrics::Metrics,
    orchestrator::{Orchestrator, OrchestratorSettings},
};
use forebay_kv_hash::ChainLimits;
use forebay_kv_index::IndexLimits;
use forebay_lifecycle::Limits;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time::timeout,
};

pub(crate) use attached::{client as attached_client, key as attached_key};
pub(crate) use fleet::examiners as attached_launchers;
pub(crate) use outside::entropy;
pub(crate) use profiles::profile_named;

use crate::settings::Settings;

/// Serves until a signal to stop, then finishes what runs within `shutdown_seconds_max`.
pub(crate) async fn run(settings: &Settings, environment: &BTreeMap<String, String>) -> anyhow::Result<()> {
    // The doors first: a busy port is known before a model is loaded.
    let listener = bind(settings.doors.listen, "listen").await?;
    let admin_listener = bind(settings.doors.admin_listen, "admin_listen").await?;
    let door = cluster::Door::prepare(settings).await?;
    let keys = api_keys(settings)?;
    let mut stop = Stop::new()?;

    let fleet = fleet::build(settings, environment, &Handle::current())?;
    let metrics = Arc::new(Metrics::new());
    let orchestrator = Orchestrator::start(
        OrchestratorSettings {
            decisions: decisions_file(settings)?,
            arrivals: arrivals_file(settings)?,
            profiles: profiles::load(&settings.engines.profile)?,
            ..orchestrator_settings(settings)
        },
        fleet.launchers,
        fleet.hasher,
        metrics.clone(),
        &Handle::current(),
    );
    let gateway = Gateway::new(Parts {
        orchestrator: Arc::new(orchestrator.clone()),
        models: fleet.models,
        attached: fleet.attached,
        keys,
        metrics,
        http_limits: settings.http.http_limits(),
        request_limits: settings.http.request_limits(),
        clock: Arc::new(outside::SystemClock::new()),
        seeds: Arc::new(outside::EntropySeeds::new()),
    });
    let _door = match door {
        None => None,
        Some(door) => {
            tracing::info!(agents = %door.address(), "listening to agents");
            Some(door.open(settings, fleet.hash_key, orchestrator.clone(), fleet.outbound)?)
        }
    };
    let (public_address, admin_address) = (listener.local_addr()?, admin_listener.local_addr()?);
    tracing::info!(public = %public_address, admin = %admin_address, "serving");

    let (close_admin, admin_closed) = watch::channel(false);
    let admin = tokio::spawn(serve_admin(admin_listener, gateway.clone(), closed(admin_closed)));
    let stopping = orchestrator.clone();
    let ended = serve_public(listener, gateway, async move {
        stop.wait().await;
        tracing::info!("stopping: no new requests, running ones finish");
        stopping.close();
    })
    .await;
    tracing::info!(?ended, "public address closed");

    // Requests of broken-off connections end at once; this bound is for those that do not.
    let _ = timeout(Duration::from_secs(1), orchestrator.idle()).await;
    orchestrator.stop_engines();
    close_admin.send_replace(true);
    let _ = timeout(Duration::from_secs(1), admin).await;
    Ok(())
}

async fn bind(address: SocketAddr, setting: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {address} (setting `{setting}`): choose another port, or end what uses this one"
        )
    })
}

fn api_keys(settings: &Settings) -> anyhow::Result<Option<ApiKeys>> {
    let Some(path) = &settings.doors.api_keys else { return Ok(None) };
    let text = std::fs::read_to_string(path).with_context(|| {
        format!("cannot read the API keys {}: `forebay keys add TENANT` prints a line for it", path.display())
    })?;
    let keys = ApiKeys::parse(&text).map_err(|error| anyhow!("API keys {}: {error}", path.display()))?;
    Ok(Some(keys))
}

fn decisions_file(settings: &Settings) -> anyhow::Result<Option<Arc<DecisionSink>>> {
    let Some(path) = settings.process.decisions_file.clone() else { return Ok(None) };
    let plan = SinkPlan {
        path,
        bytes_max: settings.limits.decisions_file_bytes_max.as_usize() as u64,
        files_max: settings.limits.decisions_files_max.get(),
    };
    let context = format!("cannot write decisions to {} (setting `decisions_file`)", plan.path.display());
    DecisionSink::open(plan, "decisions_file").map(|sink| Some(Arc::new(sink))).context(context)
}

fn arrivals_file(settings: &Settings) -> anyhow::Result<Option<Arc<ArrivalRecorder>>> {
    let Some(path) = settings.process.record.clone() else { return Ok(None) };
    let plan = SinkPlan {
        path,
        bytes_max: settings.limits.record_bytes_max.as_usize() as u64,
        files_max: settings.limits.record_files_max.get(),
    };
    let context = format!("cannot write arrivals to {} (setting `record`)", plan.path.display());
    let block_tokens = settings.engines.block_size_tokens.get();
    ArrivalRecorder::open(plan, block_tokens).map(|recorder| Some(Arc::new(recorder))).context(context)
}

fn orchestrator_settings(settings: &Settings) -> OrchestratorSettings {
    let total_max = settings.limits.request_seconds_max;
    OrchestratorSettings {
        requests_in_flight_max: settings.limits.requests_in_flight_max.get(),
        decisions_max: settings.limits.decisions_max.get(),
        limits: Limits {
            placements_max: settings.routing.placements_max.get(),
            migrations_max: settings.routing.migrations_max,
            first_token_max: total_max,
            total_max,
            ..Limits::default()
        },
        index: IndexLimits {
            bytes_max: settings.limits.index_bytes_max.as_usize(),
            ..IndexLimits::default()
        },
        chains: ChainLimits { bytes_max: settings.limits.chain_bytes_max.as_usize() },
        stall_min: settings.cluster.stall_seconds_min,
        stall_itl_factor: settings.cluster.stall_itl_factor,
        weights: settings.routing.weights(),
        gather: settings.routing.gather(),
        leaning: settings.routing.leaning(),
        policy: settings.routing.policy,
        seed: outside::entropy(),
        unix_ms: outside::unix_ms(),
        ..OrchestratorSettings::default()
    }
}

async fn closed(mut admin: watch::Receiver<bool>) {
    let _ = admin.wait_for(|closed| *closed).await;
}

/// The signals that end a server.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
