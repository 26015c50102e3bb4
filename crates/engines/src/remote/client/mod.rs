//! HTTP to one engine.
//!
//! In: a base URL, a key, TLS settings. Out: bounded answers or bodies piece by piece. Start at [`Endpoint`]; connections
//! are made and kept by [`HttpClient`] (how in [`wire`]); why there is no answer is an [`HttpError`], a sentence each.
//!
//! Invariants: nothing waits longer than its deadline or reads more than its limit; no key and no user part of a URL is
//! ever printed.

mod connect;
mod endpoint;
mod error;
mod secret;
mod tls;
mod wire;

pub use connect::{ClientSettings, HttpClient};
pub(super) use endpoint::EXCERPT_BYTES_MAX;
pub use endpoint::{Answer, Endpoint, Limits, Streaming, UrlError};
pub use error::{HttpError, Unreachable};
pub use secret::Secret;
pub use tls::{TlsError, TlsSettings};
