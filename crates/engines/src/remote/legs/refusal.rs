//! What an answer that is none means for the leg.

use std::sync::Arc;

use forebay_engine_wire::answer::{Fault, is_full, message_of};

use super::{LegTask, Setback};
use crate::{
    driver::StartError,
    remote::client::{EXCERPT_BYTES_MAX, Streaming},
    reports::Notice,
};

/// Statuses that say something about the request itself.
fn is_of_request(status: u16) -> bool {
    matches!(status, 400 | 404 | 413 | 422)
}

/// Statuses of which a client that is given the engine's own words is told: those about its request. Not those about our
/// key, about the engine's load, or about what lies between us and it.
pub(super) fn is_of_client(status: u16) -> bool {
    (400..500).contains(&status) && !matches!(status, 401 | 403 | 407 | 408 | 421 | 425 | 429)
}

/// vLLM's words when its engine process has died under its server: whoever asked may be the cause.
fn is_death(message: &str) -> bool {
    message.contains("EngineDead") || message.contains("EngineCore encountered")
}

impl LegTask {
    /// What an answer with another status than 200 means.
    pub(super) async fn refused(&self, answer: Streaming) -> Setback {
        let status = answer.status;
        let message = message_of(&answer.excerpt(EXCERPT_BYTES_MAX).await);
        self.refusal(status, &message)
    }

    pub(super) fn refusal(&self, status: u16, message: &str) -> Setback {
        let engine = self.engine_name();
        if is_full(status, message) {
            let waiting_max = self.engine.facts.waiting_max;
            return Setback::Refused(StartError::QueueFull { waiting_max });
        }
        if is_of_request(status) {
            return Setback::Refused(StartError::Rejected { status, message: message.into() });
        }
        if matches!(status, 401 | 403) {
            let why: Arc<str> =
                format!("{engine} refuses our key with status {status}; give it the engine's own").into();
            self.engine.reports.put_notice(Notice::Note(why.clone()));
            return Setback::failed(why);
        }
        if status >= 500 {
            self.engine.trouble();
        }
        if is_death(message) {
            return Setback::Lost(format!("{engine} died: {message}").into());
        }
        Setback::failed(format!("{engine} answered status {status}: {message}"))
    }

    /// What a complaint inside an answer with status 200 means.
    ///
    /// SGLang checks a streamed request after its head went out, so its complaints about requests come here. vLLM checks
    /// before: what comes here is its own failure, whatever status it names.
    pub(super) fn complaint(&self, fault: &Fault) -> Setback {
        let Fault { status, message } = fault;
        match *status {
            _ if self.spoke() => {
                Setback::Lost(format!("{} gave the answer up: {message}", self.engine_name()).into())
            }
            Some(status) if self.is_sglang() || status >= 500 => self.refusal(status, message),
            _ => self.refusal(500, message),
        }
    }
}
