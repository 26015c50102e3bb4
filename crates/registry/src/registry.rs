//! The trait, and what it gives.

use std::{fmt, sync::Arc, time::Duration};

use tokio::sync::watch;

use crate::{
    announcement::Announcement,
    record::{GatewayRecord, Gateways, RecordError},
};

/// Where gateways are made known and found. Object safe; every method returns at once, what takes time runs in tasks of
/// the tokio runtime in which it is called.
pub trait Registry: Send + Sync + 'static {
    /// Makes a gateway known and keeps it known until the answer is dropped. It need not be registered yet when this
    /// returns ([`Announcement::registered`] waits for that), so that a gateway can start while the registry is away.
    ///
    /// # Errors
    /// The record cannot be used by anybody.
    fn announce(&self, record: GatewayRecord) -> Result<Announcement, RegistryError>;

    /// Follows the set of gateways.
    fn watch(&self) -> Watch;

    /// How good the set is.
    fn state(&self) -> RegistryState;
}

/// Why a registry cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A record that nobody could use.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Settings that cannot work.
    #[error("{reason}")]
    Settings {
        /// A sentence.
        reason: String,
    },
    /// A file of TLS.
    #[error(transparent)]
    Tls(#[from] forebay_proto::tls::TlsError),
    /// A file with a password.
    #[error("cannot read the password file {}", path.display())]
    PasswordFile {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
}

/// How good the known set is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryState {
    /// In a word.
    pub health: Health,
    /// Since the set was last known to be the truth; absent if it never was.
    pub age: Option<Duration>,
    /// For people: what is so, and if it is bad, why.
    pub sentence: String,
}

/// How good the known set is, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Health {
    /// No set is known yet.
    Starting,
    /// The set is the truth, up to the time that news take.
    Current,
    /// The registry does not answer, or not in full; the last set stands.
    Away,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Current => "current",
            Self::Away => "away",
        })
    }
}

/// A follower of the set. It holds the latest set only: whoever reads slowly skips those in between.
#[derive(Debug, Clone)]
pub struct Watch {
    receiver: watch::Receiver<Option<Arc<Gateways>>>,
}

impl Watch {
    /// A follower whose first [`Watch::next`] gives the set of now.
    pub(crate) fn new(mut receiver: watch::Receiver<Option<Arc<Gateways>>>) -> Self {
        receiver.mark_changed();
        Self { receiver }
    }

    /// The set as it is now; `None` while none is known.
    pub fn current(&self) -> Option<Arc<Gateways>> {
        self.receiver.borrow().clone()
    }

    /// The set, when it is another than the one given before; at first, as soon as one is known. `None`: the registry
    /// was dropped, nothing changes any more. Cancel-safe.
    pub async fn next(&mut self) -> Option<Arc<Gateways>> {
        loop {
            self.receiver.changed().await.ok()?;
            if let Some(set) = self.receiver.borrow_and_update().clone() {
                return Some(set);
            }
        }
    }
}
