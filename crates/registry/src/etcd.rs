//! The registry of fleets with an etcd.
//!
//! A gateway is a key `/forebay/v1/<fleet>/gateways/<name>` under a lease. [`Etcd`] follows all of them in one task:
//! it lists, then watches from the revision of the list; whatever ends the watch (an etcd that stops, is compacted, loses
//! its leader or its data) leads back to the list. Each announcement is a task of its own with its own connection.
//!
//! One endpoint is used at a time and the next is tried when it fails, because a balanced channel prefers a dead
//! endpoint, which has the fewest requests in flight. Every call has a deadline, every loop a pause.
//!
//! Start at [`Etcd::open`]; `follow` and `keep` are the tasks, [`View`] is how listings and events become a set.

mod dial;
mod follow;
mod keep;
mod record;
mod view;

use std::{fmt, sync::Arc, sync::atomic::AtomicU64, sync::atomic::Ordering, time::Duration};

use forebay_proto::{Secret, tls::TlsFiles};

use crate::{
    announcement::Announcement,
    publish::{OwnedTask, Publisher},
    record::{GatewayRecord, HostPort, check_name},
    registry::{Registry, RegistryError, RegistryState, Watch},
};

pub use view::View;

/// Time to live of a gateway's record without a sign of life, unless set.
pub const LEASE_DEFAULT: Duration = Duration::from_secs(10);
/// The leases that may be set. etcd's own minimum is 1.5 of its election timeouts, 2 s unless it was tuned; it raises
/// shorter ones.
pub const LEASE_RANGE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);
/// Endpoints of one etcd.
pub const ENDPOINTS_MAX: usize = 16;

/// How to reach an etcd, and which fleet it is.
#[derive(Clone)]
pub struct EtcdSettings {
    /// Its members; one is used at a time.
    pub endpoints: Vec<HostPort>,
    /// Fleets that share an etcd do not see each other.
    pub fleet: String,
    /// If it asks for them.
    pub credentials: Option<Credentials>,
    /// If it speaks TLS.
    pub tls: Option<EtcdTls>,
    /// Time to live of a record; in whole seconds, the rest is rounded up.
    pub lease: Duration,
    /// Of the jitter between attempts. Processes of a fleet have different ones.
    pub seed: u64,
}

impl EtcdSettings {
    /// Those of an etcd without credentials and TLS, with the default lease.
    pub fn plain(endpoints: Vec<HostPort>, fleet: impl Into<String>, seed: u64) -> Self {
        Self { endpoints, fleet: fleet.into(), credentials: None, tls: None, lease: LEASE_DEFAULT, seed }
    }

    fn check(&self) -> Result<(), RegistryError> {
        let Self { endpoints, fleet, credentials: _, tls: _, lease, seed: _ } = self;
        check_name("fleet", fleet)?;
        if endpoints.is_empty() || endpoints.len() > ENDPOINTS_MAX {
            let reason =
                format!("{} endpoints of etcd: give 1 to {ENDPOINTS_MAX}, as HOST:PORT", endpoints.len());
            return Err(RegistryError::Settings { reason });
        }
        if !LEASE_RANGE.contains(lease) {
            let (shortest, longest) = (LEASE_RANGE.start().as_secs(), LEASE_RANGE.end().as_secs());
            let reason = format!("a lease of {lease:?}: give {shortest} to {longest} seconds");
            return Err(RegistryError::Settings { reason });
        }
        Ok(())
    }

    /// What every gateway's key begins with.
    fn prefix(&self) -> String {
        format!("/forebay/v1/{}/gateways/", self.fleet)
    }

    /// The lease as etcd takes it.
    fn lease_seconds(&self) -> i64 {
        self.lease.as_millis().div_ceil(1_000) as i64
    }

    /// How long one call may take: three of them, and a lease is still alive.
    fn call_max(&self) -> Duration {
        (self.lease / 3).clamp(Duration::from_millis(500), Duration::from_secs(3))
    }

    /// Longest pause between attempts: short enough to be back within a lease.
    fn pause_max(&self) -> Duration {
        self.lease / 3
    }
}

impl fmt::Debug for EtcdSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoints, fleet, credentials, tls, lease, seed: _ } = self;
        f.debug_struct("EtcdSettings")
            .field("endpoints", endpoints)
            .field("fleet", fleet)
            .field("credentials", credentials)
            .field("tls", tls)
            .field("lease", lease)
            .finish_non_exhaustive()
    }
}

/// Who one is to etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The user's password.
    pub password: Secret,
}

/// TLS towards etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// The CA, and a certificate of one's own if etcd asks for one.
    pub files: TlsFiles,
    /// What etcd's certificate names, if not the host of the endpoint.
    pub server_name: Option<String>,
}

/// Gateways by their records in etcd.
#[derive(Debug)]
pub struct Etcd {
    settings: Arc<EtcdSettings>,
    publisher: Publisher,
    announced: AtomicU64,
    _task: OwnedTask,
}

impl Etcd {
    /// Begins to follow the gateways of a fleet. etcd need not be there yet. Needs a tokio runtime.
    ///
    /// # Errors
    /// Settings that cannot work, whatever etcd does.
    pub fn open(settings: EtcdSettings) -> Result<Self, RegistryError> {
        settings.check()?;
        let settings = Arc::new(settings);
        let listed = settings.endpoints.iter().map(HostPort::to_string).collect::<Vec<_>>().join(", ");
        let publisher = Publisher::new(format!("dialling etcd at {listed}"));
        let following = follow::follow(Arc::clone(&settings), publisher.clone());
        let task = OwnedTask(tokio::spawn(following));
        Ok(Self { settings, publisher, announced: AtomicU64::new(0), _task: task })
    }
}

impl Registry for Etcd {
    fn announce(&self, record: GatewayRecord) -> Result<Announcement, RegistryError> {
        record.check()?;
        // Only has to differ between the announcements of one process.
        let seed = self.settings.seed.wrapping_add(1 + self.announced.fetch_add(1, Ordering::Relaxed));
        let settings = Arc::clone(&self.settings);
        let kept = record.clone();
        Ok(Announcement::spawn(record, move |state, ended| keep::keep(settings, seed, kept, state, ended)))
    }

    fn watch(&self) -> Watch {
        self.publisher.watch()
    }

    fn state(&self) -> RegistryState {
        self.publisher.state()
    }
}

#[cfg(test)]
mod tests;
