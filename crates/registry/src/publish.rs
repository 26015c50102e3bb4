//! How a registry's own task tells watchers and askers what it knows.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{sync::watch, task::JoinHandle, time::Instant};

use crate::{
    record::Gateways,
    registry::{Health, RegistryState, Watch},
};

/// The latest set and how good it is. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    set: watch::Sender<Option<Arc<Gateways>>>,
    status: Arc<Mutex<Status>>,
}

#[derive(Debug)]
struct Status {
    confirmed: Option<Instant>,
    /// Why the set may be old; absent while it is current.
    trouble: Option<String>,
    /// What is so while all is well.
    sentence: String,
}

impl Publisher {
    /// Knows nothing yet; `sentence` says what is tried.
    pub(crate) fn new(sentence: String) -> Self {
        let status = Status { confirmed: None, trouble: None, sentence };
        Self { set: watch::Sender::new(None), status: Arc::new(Mutex::new(status)) }
    }

    /// Watchers hear of it if it differs.
    pub(crate) fn publish(&self, set: Gateways) {
        self.set.send_if_modified(|known| {
            let changed = known.as_deref() != Some(&set);
            if changed {
                *known = Some(Arc::new(set));
            }
            changed
        });
    }

    /// The set is the truth now; `sentence` says so.
    pub(crate) fn confirm(&self, sentence: String) {
        let mut status = self.status.lock();
        if status.trouble.is_some() {
            tracing::info!("the registry answers again: {sentence}");
        }
        *status = Status { confirmed: Some(Instant::now()), trouble: None, sentence };
    }

    /// As [`Publisher::confirm`], with the sentence of before.
    pub(crate) fn confirm_again(&self) {
        self.status.lock().confirmed = Some(Instant::now());
    }

    /// The set may be old from now on. Logged once an outage: what is wrong differs from one endpoint to the next.
    pub(crate) fn trouble(&self, trouble: String) {
        let mut status = self.status.lock();
        if status.trouble.is_none() {
            tracing::warn!("the registry is away, the known gateways stand: {trouble}");
        } else {
            tracing::debug!("the registry is still away: {trouble}");
        }
        status.trouble = Some(trouble);
    }

    pub(crate) fn watch(&self) -> Watch {
        Watch::new(self.set.subscribe())
    }

    pub(crate) fn state(&self) -> RegistryState {
        let status = self.status.lock();
        let age = status.confirmed.map(|confirmed| confirmed.elapsed());
        let known = self.set.borrow().is_some();
        let (health, sentence) = match (&status.trouble, known) {
            (None, true) => (Health::Current, status.sentence.clone()),
            (None, false) => (Health::Starting, status.sentence.clone()),
            (Some(trouble), false) => (Health::Starting, trouble.clone()),
            (Some(trouble), true) => {
                let age = age.unwrap_or(Duration::ZERO).as_secs();
                (Health::Away, format!("{trouble}; the gateways known {age} s ago stand"))
            }
        };
        RegistryState { health, age, sentence }
    }
}

/// A task that ends with its owner.
#[derive(Debug)]
pub(crate) struct OwnedTask(pub(crate) JoinHandle<()>);

impl Drop for OwnedTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}
