//! Connections that their own readers drive.
//!
//! In: a request. Out: its answer, on a connection of the pool or a new one. Start at [`Pool::send`].
//!
//! hyper parts a connection from the answers that come over it, so that a task of its own may drive it. Here whoever waits
//! for the answer does: what the kernel has is read, parsed and passed on in one go, where a task between would be woken
//! for every chunk. So nobody drives an idle connection, and whether it still stands is asked when it is needed.
//!
//! Invariants: a connection carries one exchange at a time; one that was dropped within an exchange is closed; idle ones
//! are bounded in number and age.

use std::{
    collections::HashMap,
    error::Error as StdError,
    fmt,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, Weak},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1},
};
use parking_lot::Mutex;
use tokio::time::sleep_until;

use super::connect::{Connection, Connector};

/// Read at once: some twenty tokens. Each open stream keeps so much.
const READ_BYTES: usize = 4096;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum SendError {
    /// No connection: nothing was sent.
    Connect(Box<dyn StdError + Send + Sync>),
    /// The connection broke.
    Broken(hyper::Error),
}

/// One connection. Boxed wherever it is passed on: it is large, and futures keep what they pass on several times.
pub(super) struct Wire {
    sender: http1::SendRequest<Full<Bytes>>,
    connection: http1::Connection<Connection, Full<Bytes>>,
    /// It was driven to its end.
    is_over: bool,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("is_over", &self.is_over).finish_non_exhaustive()
    }
}

impl Wire {
    async fn open(connector: &Connector, to: &Uri) -> Result<Box<Self>, SendError> {
        let stream = connector.connect(to).await.map_err(SendError::Connect)?;
        let made = http1::Builder::new().read_buf_exact_size(Some(READ_BYTES)).handshake(stream).await;
        let (sender, connection) = made.map_err(SendError::Broken)?;
        let mut wire = Box::new(Self { sender, connection, is_over: false });
        poll_fn(|cx| {
            wire.drive(cx);
            wire.sender.poll_ready(cx)
        })
        .await
        .map_err(SendError::Broken)?;
        Ok(wire)
    }

    /// Reads and writes what can be read and written now.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) {
        // An error is told to whoever waits for an answer.
        self.is_over = self.is_over || Pin::new(&mut self.connection).poll(cx).is_ready();
    }

    /// Whether another exchange can begin, as far as can be seen without waiting.
    fn is_free(&mut self, cx: &mut Context<'_>) -> bool {
        self.drive(cx);
        !self.is_over && matches!(self.sender.poll_ready(cx), Poll::Ready(Ok(())))
    }

    async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Full<Bytes>>>> {
        let mut answer = pin!(self.sender.try_send_request(request));
        let (connection, is_over) = (&mut self.connection, &mut self.is_over);
        poll_fn(|cx| {
            *is_over = *is_over || Pin::new(&mut *connection).poll(cx).is_ready();
            answer.as_mut().poll(cx)
        })
        .await
    }
}

/// Connections that wait for their next exchange, by where they go.
pub(super) struct Pool {
    connector: Connector,
    idle_max: usize,
    idle_timeout: Duration,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    wires: HashMap<Uri, Vec<(Instant, Box<Wire>)>>,
    /// Somebody closes those that are too old.
    is_swept: bool,
}

impl Pool {
    pub(super) fn new(connector: Connector, idle_max: usize, idle_timeout: Duration) -> Arc<Self> {
        Arc::new(Self { connector, idle_max, idle_timeout, idle: Mutex::default() })
    }

    /// Sends a request to the engine at `to`, and gives its answer as soon as the head is here, with the connection that
    /// brings the rest.
    pub(super) async fn send(
        &self,
        to: &Uri,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Box<Wire>), SendError> {
        while let Some(mut wire) = self.take(to) {
            match wire.send(request).await {
                Ok(response) => return Ok((response, wire)),
                // It had been closed before a byte was written: as if it had never been there.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(SendError::Broken(error.into_error())),
                },
            }
        }
        let mut wire = Wire::open(&self.connector, to).await?;
        match wire.send(request).await {
            Ok(response) => Ok((response, wire)),
            Err(error) => Err(SendError::Broken(error.into_error())),
        }
    }

    /// The idle connection that was used last and still stands.
    fn take(&self, to: &Uri) -> Option<Box<Wire>> {
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            let (since, mut wire) = self.idle.lock().wires.get_mut(to)?.pop()?;
            if since.elapsed() < self.idle_timeout && wire.is_free(&mut cx) {
                return Some(wire);
            }
        }
    }

    /// Takes back a connection whose answer has ended; closes one that cannot be used again.
    pub(super) fn put(self: &Arc<Self>, to: &Uri, mut wire: Box<Wire>, cx: &mut Context<'_>) {
        if !wire.is_free(cx) {
            return;
        }
        let mut idle = self.idle.lock();
        let wires = match idle.wires.get_mut(to) {
            Some(wires) => wires,
            None => idle.wires.entry(to.clone()).or_default(),
        };
        if wires.len() < self.idle_max {
            wires.push((Instant::now(), wire));
        }
        if !std::mem::replace(&mut idle.is_swept, true) {
            tokio::spawn(sweep(Arc::downgrade(self), self.idle_timeout));
        }
    }

    /// Closes connections that have been idle for too long; whether any is left.
    fn close_old(&self) -> bool {
        let mut idle = self.idle.lock();
        idle.wires.retain(|_, wires| {
            wires.retain(|(since, _)| since.elapsed() < self.idle_timeout);
            !wires.is_empty()
        });
        idle.is_swept = !idle.wires.is_empty();
        idle.is_swept
    }
}

/// Ends with the last idle connection, or with the pool.
async fn sweep(pool: Weak<Pool>, idle_timeout: Duration) {
    loop {
        sleep_until(tokio::time::Instant::now() + idle_timeout).await;
        if !pool.upgrade().is_some_and(|pool| pool.close_old()) {
            return;
        }
    }
}
