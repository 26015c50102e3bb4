//! One gateway's being known, as its announcer holds it.

use std::{fmt, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

use crate::record::{GatewayRecord, HostPort};

/// How long [`Announcement::withdraw`] waits for the registry to take it.
pub const WITHDRAW_MAX: Duration = Duration::from_secs(2);

/// Where an announcement stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnnouncementState {
    /// Not registered, or perhaps no longer; it is being tried.
    Pending {
        /// A sentence.
        why: String,
    },
    /// Others see it.
    Registered,
    /// Another process announced this name later. This one waits until the name is free.
    Superseded {
        /// A sentence.
        why: String,
    },
    /// This registry has no use for announcements.
    NotNeeded {
        /// A sentence.
        why: String,
    },
}

impl AnnouncementState {
    /// Somebody else, at `address` if that is known, has the name.
    pub(crate) fn superseded(name: &str, address: Option<&HostPort>) -> Self {
        let place = address.map(|address| format!(" at {address}")).unwrap_or_default();
        let why = format!(
            "another process{place} announced gateway {name} later: give each gateway a name of its own"
        );
        Self::Superseded { why }
    }
}

impl fmt::Display for AnnouncementState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registered => f.write_str("registered"),
            Self::Pending { why } | Self::Superseded { why } | Self::NotNeeded { why } => f.write_str(why),
        }
    }
}

/// A gateway is known for as long as this lives. Dropping it withdraws the record in the background, as far as the
/// runtime still runs; [`Announcement::withdraw`] waits for that.
#[derive(Debug)]
#[must_use = "a dropped announcement is withdrawn"]
pub struct Announcement {
    record: GatewayRecord,
    state: watch::Receiver<AnnouncementState>,
    /// Absent where there is nothing to keep alive.
    keeper: Option<Keeper>,
}

#[derive(Debug)]
struct Keeper {
    /// Its drop is the task's sign to withdraw.
    end: oneshot::Sender<Abandon>,
    task: JoinHandle<()>,
}

/// Tells a keeper to end without withdrawing.
#[derive(Debug)]
pub(crate) struct Abandon;

impl Announcement {
    /// Spawns a keeper: `keep` registers the record, keeps it alive, says how it stands, and ends when the receiver
    /// resolves: with [`Abandon`] at once, with an error after withdrawing.
    pub(crate) fn spawn<F: Future<Output = ()> + Send + 'static>(
        record: GatewayRecord,
        keep: impl FnOnce(watch::Sender<AnnouncementState>, oneshot::Receiver<Abandon>) -> F,
    ) -> Self {
        let why = format!("gateway {} is being registered", record.name);
        let (state_sender, state) = watch::channel(AnnouncementState::Pending { why });
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(keep(state_sender, ended));
        Self { record, state, keeper: Some(Keeper { end, task }) }
    }

    /// An announcement that does nothing, and says so.
    pub(crate) fn not_needed(record: GatewayRecord, why: String) -> Self {
        let (_, state) = watch::channel(AnnouncementState::NotNeeded { why });
        Self { record, state, keeper: None }
    }

    /// What is announced.
    pub fn record(&self) -> &GatewayRecord {
        &self.record
    }

    /// Where it stands.
    pub fn state(&self) -> AnnouncementState {
        self.state.borrow().clone()
    }

    /// Waits until it stands elsewhere than when this was last asked; for good if that cannot happen any more.
    /// Cancel-safe.
    pub async fn changed(&mut self) -> AnnouncementState {
        if self.state.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.state.borrow_and_update().clone()
    }

    /// Waits until others see it, or until it is clear that they need not. Cancel-safe.
    pub async fn registered(&mut self) {
        let stands = |state: &AnnouncementState| {
            matches!(state, AnnouncementState::Registered | AnnouncementState::NotNeeded { .. })
        };
        if self.state.wait_for(stands).await.is_err() && !stands(&self.state()) {
            std::future::pending::<()>().await;
        }
    }

    /// Withdraws it and waits until the registry has taken that, at most [`WITHDRAW_MAX`]; after that its lease ends it.
    pub async fn withdraw(self) {
        if let Some(Keeper { end, task }) = self.keeper {
            drop(end);
            _ = tokio::time::timeout(WITHDRAW_MAX, task).await;
        }
    }

    /// Stops keeping it alive without withdrawing it, which is what a killed process does: it stays known until its
    /// lease lapses.
    pub fn abandon(self) {
        if let Some(Keeper { end, task: _ }) = self.keeper {
            // A keeper that is gone already has nothing to withdraw either.
            _ = end.send(Abandon);
        }
    }
}
