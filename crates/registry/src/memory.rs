//! The registry of one process: gateways and agents share a value.
//!
//! It keeps the promises of the others, leases included, so that a program tried in one process meets no surprise in
//! two. [`Memory::set_away`] makes it unreachable, to see what its users do then.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    announcement::{Abandon, Announcement, AnnouncementState},
    publish::{OwnedTask, Publisher},
    record::{GATEWAYS_MAX, GatewayRecord, Gateways},
    registry::{Registry, RegistryError, RegistryState, Watch},
};

/// A registry in this process. Clones are one registry.
#[derive(Debug, Clone)]
pub struct Memory {
    shared: Arc<Shared>,
    _sweeper: Arc<OwnedTask>,
}

#[derive(Debug)]
struct Shared {
    lease: Duration,
    inner: Mutex<Inner>,
    publisher: Publisher,
}

#[derive(Debug, Default)]
struct Inner {
    entries: BTreeMap<String, Entry>,
    owner_next: u64,
    away: bool,
}

#[derive(Debug)]
struct Entry {
    record: GatewayRecord,
    owner: u64,
    expires: Instant,
}

impl Memory {
    /// An empty registry whose announcements live `lease` beyond their last sign of life. Needs a tokio runtime.
    pub fn new(lease: Duration) -> Self {
        let publisher = Publisher::new(String::new());
        let shared = Arc::new(Shared { lease, inner: Mutex::default(), publisher });
        shared.publish(&shared.inner.lock());
        let sweeper = tokio::spawn({
            let shared = Arc::downgrade(&shared);
            async move {
                let mut tick = interval(lease / 4);
                tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
                while let Some(shared) = shared.upgrade() {
                    shared.sweep();
                    drop(shared);
                    tick.tick().await;
                }
            }
        });
        Self { shared, _sweeper: Arc::new(OwnedTask(sweeper)) }
    }

    /// Makes it unreachable: nothing that is announced or withdrawn from now on is seen. When it comes back, every lease
    /// starts afresh, as etcd's do after its restart.
    pub fn set_away(&self, away: bool) {
        let mut inner = self.shared.inner.lock();
        inner.away = away;
        if away {
            self.shared.publisher.trouble("the registry was made unreachable".to_owned());
            return;
        }
        let expires = Instant::now() + self.shared.lease;
        for entry in inner.entries.values_mut() {
            entry.expires = expires;
        }
        self.shared.publish(&inner);
    }
}

impl Registry for Memory {
    fn announce(&self, record: GatewayRecord) -> Result<Announcement, RegistryError> {
        record.check()?;
        let owner = {
            let mut inner = self.shared.inner.lock();
            inner.owner_next += 1;
            inner.owner_next
        };
        let shared = Arc::clone(&self.shared);
        let kept = record.clone();
        Ok(Announcement::spawn(record, move |state, ended| shared.keep(kept, owner, state, ended)))
    }

    fn watch(&self) -> Watch {
        self.shared.publisher.watch()
    }

    fn state(&self) -> RegistryState {
        if !self.shared.inner.lock().away {
            self.shared.publisher.confirm_again();
        }
        self.shared.publisher.state()
    }
}

impl Shared {
    /// A keeper's life.
    async fn keep(
        self: Arc<Self>,
        record: GatewayRecord,
        owner: u64,
        state: watch::Sender<AnnouncementState>,
        mut ended: oneshot::Receiver<Abandon>,
    ) {
        let mut tick = interval(self.lease / 3);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_registered = false;
        loop {
            tokio::select! {
                end = &mut ended => match end {
                    Ok(Abandon) => return,
                    Err(_) => break,
                },
                _ = tick.tick() => {}
            }
            let stands = self.claim(&record, owner, !was_registered);
            was_registered |= stands == AnnouncementState::Registered;
            state.send_if_modified(|known| {
                *known != stands && {
                    *known = stands;
                    true
                }
            });
        }
        let mut inner = self.inner.lock();
        if !inner.away && inner.entries.get(&record.name).is_some_and(|entry| entry.owner == owner) {
            inner.entries.remove(&record.name);
            self.publish(&inner);
        }
    }

    /// Registers or renews.
    fn claim(&self, record: &GatewayRecord, owner: u64, take_over: bool) -> AnnouncementState {
        let mut inner = self.inner.lock();
        if inner.away {
            return AnnouncementState::Pending { why: "the registry was made unreachable".to_owned() };
        }
        let GatewayRecord { name, .. } = record;
        match inner.entries.get(name) {
            Some(other) if other.owner != owner && !take_over => {
                return AnnouncementState::superseded(&record.name, Some(&other.record.address));
            }
            None if inner.entries.len() >= GATEWAYS_MAX => {
                let why = format!("there are {GATEWAYS_MAX} gateways already");
                return AnnouncementState::Pending { why };
            }
            _ => {}
        }
        let expires = Instant::now() + self.lease;
        inner.entries.insert(name.clone(), Entry { record: record.clone(), owner, expires });
        self.publish(&inner);
        AnnouncementState::Registered
    }

    fn sweep(&self) {
        let mut inner = self.inner.lock();
        if !inner.away {
            let now = Instant::now();
            inner.entries.retain(|_, entry| entry.expires > now);
            self.publish(&inner);
        }
    }

    fn publish(&self, inner: &Inner) {
        self.publisher.publish(Gateways::new(inner.entries.values().map(|entry| entry.record.clone())));
        self.publisher.confirm(format!("gateways of this process: {}", inner.entries.len()));
    }
}
