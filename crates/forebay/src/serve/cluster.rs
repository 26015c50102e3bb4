//! The door for agents, put together: listener, certificates, registry.

use std::net::SocketAddr;

use anyhow::{Context as _, anyhow};
use forebay_gateway::{
    cluster::{self, ClusterParts, ClusterSettings, Outbound},
    orchestrator::Orchestrator,
};
use forebay_proto::{HashKey, tls::TlsFiles};
use forebay_registry::{Announcement, Etcd, GatewayRecord, HostPort, Registry as _};
use tokio::{net::TcpListener, task::JoinHandle};

use super::{bind, outside};
use crate::settings::{Settings, groups::Cluster};

/// Heartbeats within the silence that takes an engine out of rotation: one may be late.
const HEARTBEATS_IN_SILENCE: u32 = 2;
/// Engines that agents may bring.
const ENGINES_MAX: usize = 4_096;

/// The door, before it is open: what can fail at the start has not.
pub(super) struct Door {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<TlsFiles>,
    registry: Option<Etcd>,
}

/// The open door.
pub(super) struct Open {
    task: JoinHandle<()>,
    /// Withdraws the gateway when dropped.
    _announcement: Option<Announcement>,
    _registry: Option<Etcd>,
}

impl Door {
    /// Binds and reads the certificates, if agents are to be let in at all.
    pub(super) async fn prepare(settings: &Settings) -> anyhow::Result<Option<Self>> {
        let Some(listen) = settings.cluster.cluster_listen else { return Ok(None) };
        let listener = bind(listen, "cluster_listen").await?;
        let address = listener.local_addr()?;
        let tls = certificates(&settings.cluster)?;
        let registry = match &settings.cluster.registry {
            None => None,
            Some(url) => Some(Etcd::open(url.location.settings(outside::entropy())?)?),
        };
        Ok(Some(Self { listener, address, tls, registry }))
    }

    /// Where agents are listened to.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets agents in, until the answer is dropped.
    pub(super) fn open(
        self,
        settings: &Settings,
        hash_key: HashKey,
        orchestrator: Orchestrator,
        outbound: Outbound,
    ) -> anyhow::Result<Open> {
        let Self { listener, address, tls, registry } = self;
        let advertised =
            settings.cluster.cluster_advertise.clone().unwrap_or_else(|| HostPort::from(address));
        let gateway = advertised.to_string().replace([':', '[', ']'], "-");
        let announcement = match &registry {
            None => None,
            Some(registry) => {
                let record = GatewayRecord::new(gateway.clone(), advertised).map_err(|error| {
                    anyhow!(
                        "{error}; give `cluster_advertise` the address under which agents reach this process"
                    )
                })?;
                Some(registry.announce(record)?)
            }
        };
        let silence_max = settings.cluster.silence_seconds_max;
        let parts = ClusterParts {
            orchestrator,
            settings: ClusterSettings {
                gateway,
                hash_key,
                heartbeat: silence_max / HEARTBEATS_IN_SILENCE,
                silence_max,
                lease: settings.cluster.lease_seconds,
                engines_max: ENGINES_MAX,
            },
            outbound,
            tls,
        };
        let task = tokio::spawn(async move {
            if let Err(error) = cluster::serve(listener, parts, std::future::pending()).await {
                tracing::error!(%error, "agents are not listened to any more");
            }
        });
        Ok(Open { task, _announcement: announcement, _registry: registry })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn certificates(cluster: &Cluster) -> anyhow::Result<Option<TlsFiles>> {
    let (Some(ca), Some(cert), Some(key)) =
        (&cluster.cluster_ca, &cluster.cluster_cert, &cluster.cluster_key)
    else {
        return Ok(None);
    };
    let files = TlsFiles::read(ca, Some((cert, key))).context("the certificates of the cluster")?;
    Ok(Some(files))
}
