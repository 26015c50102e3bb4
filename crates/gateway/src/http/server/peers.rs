//! Which connections could be closed for the sake of a new one.
//!
//! In: what each connection does ([`Peer::begin`], [`Busy`]). Out: the one that has done nothing for longest
//! ([`Peers::ask_idlest`]), which is asked to close ([`Peer::asked_to_close`]).
//!
//! Invariant: a connection with a request that is being read, worked on or answered is never asked. One that sends its
//! head a byte at a time has no request yet.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::{sync::Notify, task::Id};

use crate::http::app::Clock;

/// Instead of a time: in the middle of a request.
const BUSY: u64 = u64::MAX;

/// What all connections of a listener share.
pub(super) struct Room {
    clock: Arc<dyn Clock>,
    /// Somebody waits for a connection to become idle.
    wanted: AtomicBool,
    made: Notify,
}

impl Room {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, wanted: AtomicBool::new(false), made: Notify::new() }
    }

    /// Resolves once a connection has become idle, if [`Peers::ask_idlest`] found none before.
    pub(super) async fn made(&self) {
        self.made.notified().await;
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.now().as_nanos()).unwrap_or(BUSY - 1)
    }
}

/// One connection, as it tells others about itself.
pub(super) struct Peer {
    room: Arc<Room>,
    /// When it was accepted or ended its last request, or [`BUSY`].
    idle_since: AtomicU64,
    close: Notify,
}

impl Peer {
    pub(super) fn new(room: Arc<Room>) -> Arc<Self> {
        let idle_since = AtomicU64::new(room.now());
        Arc::new(Self { room, idle_since, close: Notify::new() })
    }

    /// A request begins.
    pub(super) fn begin(self: &Arc<Self>) -> Busy {
        // Sequential consistency, here and below: who looks for room says so before looking, and who becomes idle says so
        // before asking whether somebody looks; one of them sees the other.
        self.idle_since.store(BUSY, Ordering::SeqCst);
        Busy(self.clone())
    }

    /// Resolves when the connection should close, while it is idle.
    pub(super) async fn asked_to_close(&self) {
        loop {
            self.close.notified().await;
            if self.idle_since.load(Ordering::SeqCst) != BUSY {
                return;
            }
            // A request came first. Whoever asked must ask another.
            self.room.made.notify_one();
        }
    }
}

/// While it lives its connection is left alone.
pub(super) struct Busy(Arc<Peer>);

impl Drop for Busy {
    fn drop(&mut self) {
        let Peer { room, idle_since, .. } = &*self.0;
        idle_since.store(room.now(), Ordering::SeqCst);
        if room.wanted.swap(false, Ordering::SeqCst) {
            room.made.notify_one();
        }
    }
}

/// The connections of a listener.
#[derive(Default)]
pub(super) struct Peers(HashMap<Id, Known>);

struct Known {
    peer: Arc<Peer>,
    /// Since when it was idle when it was asked to close.
    asked: u64,
}

impl Peers {
    pub(super) fn add(&mut self, id: Id, peer: Arc<Peer>) {
        self.0.insert(id, Known { peer, asked: BUSY });
    }

    pub(super) fn remove(&mut self, id: Id) {
        self.0.remove(&id);
    }

    /// Asks the connection that has been idle for longest to close. Looks at each: only at the bound, once for each
    /// client beyond it.
    pub(super) fn ask_idlest(&mut self, room: &Room) {
        room.wanted.store(true, Ordering::SeqCst);
        let since = |known: &Known| known.peer.idle_since.load(Ordering::SeqCst);
        let idle = self.0.values_mut().filter_map(|known| match since(known) {
            BUSY => None,
            since if since == known.asked => None,
            since => Some((since, known)),
        });
        if let Some((since, known)) = idle.min_by_key(|(since, _)| *since) {
            room.wanted.store(false, Ordering::SeqCst);
            known.asked = since;
            known.peer.close.notify_one();
        }
    }
}

/// An answer's body: until it is gone its connection is busy.
pub(super) struct Answer {
    body: Body,
    _busy: Busy,
}

impl Answer {
    pub(super) fn new(body: Body, busy: Busy) -> Self {
        Self { body, _busy: busy }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
