//! HTTP: the OpenAI-compatible public address and the admin address.
//!
//! In: requests from clients. Out: tokenised requests to [`Orchestrate`](crate::orchestrator::api::Orchestrate), and
//! its events as text. Start at [`Gateway`]; a request's way is `server` → `routes` → `context` → `generate` →
//! `request` (parse and check) → `answer` (text and bytes), or `passed` for what engines answer in their own words. What a failure looks like is decided in [`errors`] alone.
//!
//! Invariants: every answer carries `x-request-id`; a client that goes away drops its response, which cancels the
//! request wherever it is; a stream that fails after its first byte ends with one `error` event and without `[DONE]`;
//! nothing on the path of a token is shared with another request.
//!
//! It knows nothing of engines, placement or KV.

mod answer;
mod app;
mod body;
mod context;
pub mod errors;
mod generate;
mod keys;
mod limits;
mod live;
mod observation;
mod pages;
mod passed;
mod request;
mod routes;
mod server;
mod what_if;

pub use app::{AttachedText, AttachedTexts, Clock, Gateway, ModelText, Parts, Seeds};
pub use keys::{ApiKeys, KeysError};
pub use limits::{HttpLimits, RequestLimits};
pub use server::{Ended, serve_admin, serve_public};
