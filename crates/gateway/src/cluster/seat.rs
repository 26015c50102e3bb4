//! One engine name at this gateway, across the streams of its agents.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use forebay_engines::{Notice, Reports};
use forebay_types::Incarnation;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::keeper::Asker;
use crate::orchestrator::Member;

/// One engine name, across streams.
pub(super) struct Seat {
    pub(super) member: Member,
    /// Reaches the agent of the moment.
    pub(super) asker: Arc<Asker>,
    /// The stream that speaks for it now: streams are numbered, a later one takes the seat.
    stream: AtomicU64,
    pub(super) life: Mutex<Option<Life>>,
}

/// The life that the seat's engine has.
pub(super) struct Life {
    pub(super) incarnation: Incarnation,
    /// Once it serves.
    pub(super) serving: Option<Serving>,
    /// When its agent was last heard.
    pub(super) heard: Instant,
    pub(super) is_silent: bool,
    /// A stream speaks for it.
    pub(super) is_attached: bool,
}

/// A life that takes requests.
#[derive(Clone)]
pub(super) struct Serving {
    pub(super) reports: Arc<Reports>,
    pub(super) dp_ranks: u16,
}

/// Why a Hello cannot have the seat.
pub(super) enum Occupied {
    /// Another engine of this name lives and is heard.
    NameTaken,
}

impl Seat {
    pub(super) fn new(member: Member) -> Self {
        let asker = Arc::new(Asker::default());
        member.kept_by(Some(Arc::new(asker.clone())));
        Self { member, asker, stream: AtomicU64::new(0), life: Mutex::new(None) }
    }

    /// A stream takes the seat for a life. The same life goes on; another one ends the one before.
    pub(super) fn take(&self, incarnation: Incarnation, now: Instant) -> Result<u64, Occupied> {
        let mut life = self.life.lock();
        match &mut *life {
            Some(life) if life.incarnation == incarnation => {
                life.heard = now;
                life.is_attached = true;
            }
            Some(life) if life.is_attached && !life.is_silent => return Err(Occupied::NameTaken),
            other => {
                if let Some(before) = other.take() {
                    before.end(&Over::Lapsed("another life began".to_owned()));
                }
                *other = Some(Life {
                    incarnation,
                    serving: None,
                    heard: now,
                    is_silent: false,
                    is_attached: true,
                });
            }
        }
        Ok(self.stream.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Whether this stream still speaks for the seat.
    pub(super) fn is_held_by(&self, stream: u64) -> bool {
        self.stream.load(Ordering::Acquire) == stream
    }

    /// The agent said something.
    pub(super) fn heard(&self, now: Instant) {
        let mut life = self.life.lock();
        let Some(life) = &mut *life else { return };
        life.heard = now;
        if std::mem::take(&mut life.is_silent)
            && let Some(serving) = &life.serving
        {
            serving.reports.put_notice(Notice::Heard);
        }
    }

    /// Nothing was heard for too long, or the stream broke.
    pub(super) fn silent(&self, why: &str) {
        let mut life = self.life.lock();
        let Some(life) = &mut *life else { return };
        if !std::mem::replace(&mut life.is_silent, true)
            && let Some(serving) = &life.serving
        {
            serving.reports.put_notice(Notice::Silent { why: why.into() });
        }
    }

    /// The stream that spoke for it ended.
    pub(super) fn detached(&self) {
        if let Some(life) = &mut *self.life.lock() {
            life.is_attached = false;
        }
    }

    /// The life is over.
    pub(super) fn end(&self, incarnation: Incarnation, over: &Over) {
        let mut life = self.life.lock();
        if life.as_ref().is_some_and(|life| life.incarnation == incarnation)
            && let Some(life) = life.take()
        {
            let was_serving = life.serving.is_some();
            let why = over.why();
            life.end(over);
            if !was_serving {
                self.member.left(why);
            }
        }
    }

    /// Whether nobody needs the seat any more.
    pub(super) fn is_free(&self) -> bool {
        self.life.lock().is_none()
    }
}

/// How a life came to its end.
pub(super) enum Over {
    /// The engine is dead.
    Died(String),
    /// Nothing was heard for too long, or another life began: it may have died or not.
    Lapsed(String),
}

impl Over {
    fn why(&self) -> &str {
        match self {
            Self::Died(why) | Self::Lapsed(why) => why,
        }
    }
}

impl Life {
    fn end(self, over: &Over) {
        let Some(Serving { reports, .. }) = self.serving else { return };
        match over {
            Over::Died(why) => reports.put_death(why.as_str().into()),
            Over::Lapsed(why) => reports.put_lapse(why.as_str().into()),
        }
    }
}
