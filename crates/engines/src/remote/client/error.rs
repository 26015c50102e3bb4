//! Why an engine gave no answer.

use std::{error::Error as StdError, io, sync::Arc, time::Duration};

use bytes::Bytes;

use super::wire::SendError;

/// Bytes of a refused answer's body that its sentence quotes.
const QUOTE_BYTES_MAX: usize = 512;

/// Why an engine gave no answer. `at` is its host and port, never with user or password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// No connection: nothing was sent.
    #[error("{at} {why}")]
    Unreachable {
        /// Which engine.
        at: Arc<str>,
        /// What kept the connection from being made.
        why: Unreachable,
    },
    /// The answer's status is not 2xx.
    #[error("{at} answered status {status}: {}", quote(.body))]
    Status {
        /// Which engine.
        at: Arc<str>,
        /// HTTP status.
        status: u16,
        /// The body, as far as the limit allowed.
        body: Bytes,
    },
    /// The answer's body passes the limit.
    #[error("the answer of {at} is longer than {limit_bytes} bytes")]
    TooLarge {
        /// Which engine.
        at: Arc<str>,
        /// The limit.
        limit_bytes: usize,
    },
    /// The connection broke after the request went out.
    #[error("{at} broke the connection off: {detail}")]
    BrokenOff {
        /// Which engine.
        at: Arc<str>,
        /// The cause, as the client library says it.
        detail: Arc<str>,
    },
    /// The deadline came first.
    #[error("{at} did not answer in time")]
    TooSlow {
        /// Which engine.
        at: Arc<str>,
    },
}

/// What kept a connection from being made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// Nobody listens there.
    #[error("refuses the connection: nothing listens on that port")]
    Refused,
    /// No answer to the connection, TLS included.
    #[error("does not take the connection within {} s", .limit.as_secs_f64())]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// The name has no address.
    #[error("cannot be found: its name has no address")]
    Name,
    /// The TLS handshake failed.
    #[error("fails the TLS handshake: {0}")]
    Tls(Arc<str>),
    /// Something else.
    #[error("cannot be reached: {0}")]
    Other(Arc<str>),
}

/// The connection was not made within the limit.
#[derive(Debug, thiserror::Error)]
#[error("not within {limit:?}")]
pub(super) struct ConnectTimedOut {
    pub(super) limit: Duration,
}

impl HttpError {
    /// Whether the engine itself is in doubt: it is not there, breaks off or is silent. Its observer should look at once.
    pub fn is_trouble(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::BrokenOff { .. } | Self::TooSlow { .. })
    }

    /// Whether the engine cannot have seen the request.
    pub fn is_unsent(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }

    pub(super) fn of_request(at: &Arc<str>, error: &SendError) -> Self {
        match error {
            SendError::Connect(error) => Self::Unreachable { at: at.clone(), why: why(&**error) },
            SendError::Broken(error) => Self::of_body(at, error),
        }
    }

    pub(super) fn of_body(at: &Arc<str>, error: &hyper::Error) -> Self {
        Self::BrokenOff { at: at.clone(), detail: root(error) }
    }
}

/// The last of an error's causes: the first ones only say which layer passed it on.
fn root(error: &(dyn StdError + 'static)) -> Arc<str> {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string().into()
}

fn why(error: &(dyn StdError + 'static)) -> Unreachable {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(timed_out) = error.downcast_ref::<ConnectTimedOut>() {
            return Unreachable::TimedOut { limit: timed_out.limit };
        }
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Unreachable::Tls(tls.to_string().into());
        }
        if error.to_string().starts_with("dns error") {
            return Unreachable::Name;
        }
        cause = error.source();
        if let Some(io) = error.downcast_ref::<io::Error>() {
            if io.kind() == io::ErrorKind::ConnectionRefused {
                return Unreachable::Refused;
            }
            // What an `io::Error` wraps is not its source, only its source's source is.
            cause = io.get_ref().map(|inner| inner as &(dyn StdError + 'static)).or(cause);
        }
    }
    Unreachable::Other(root(error))
}

fn quote(body: &Bytes) -> String {
    let shown = &body[..body.len().min(QUOTE_BYTES_MAX)];
    let text = String::from_utf8_lossy(shown);
    let text = text.trim();
    if text.is_empty() { "(no body)".to_owned() } else { text.to_owned() }
}
