//! Connections to etcd: one endpoint at a time, deadlines, pauses, and errors as sentences.

use std::{error::Error as _, sync::Arc, time::Duration};

use etcd_client::{Client, ConnectOptions, Error};
use tokio::time::{Instant, sleep_until, timeout};

use super::{Credentials, EtcdSettings, EtcdTls};
use crate::{backoff::Backoff, record::HostPort};

/// How long logging in may take. etcd makes passwords expensive on purpose: a tenth of a second of a core that is free.
const LOGIN_MAX: Duration = Duration::from_secs(3);

/// What went wrong, as a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble(pub(super) String);

impl From<Error> for Trouble {
    /// The message without the noise of the types around it, and what is behind it.
    fn from(error: Error) -> Self {
        let (mut text, mut source) = match &error {
            Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
            Error::TransportError(transport) => (transport.to_string(), transport.source()),
            other => (other.to_string(), None),
        };
        if text.is_empty() {
            text = error.to_string();
        }
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !text.contains(&cause_text) && cause_text != "transport error" {
                text = format!("{text}: {cause_text}");
            }
            source = cause.source();
        }
        Self(text)
    }
}

/// `call`, within the deadline of all calls.
pub(super) async fn call<T>(
    settings: &EtcdSettings,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Trouble> {
    within(settings.call_max(), call).await
}

async fn within<T>(max: Duration, call: impl Future<Output = Result<T, Error>>) -> Result<T, Trouble> {
    match timeout(max, call).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(Trouble(format!("no answer in {max:?}"))),
    }
}

/// Makes connections, each to the next endpoint, and pauses between rounds.
#[derive(Debug)]
pub(super) struct Dialer {
    settings: Arc<EtcdSettings>,
    /// Of the endpoint to dial next.
    next: usize,
    /// Failed since the last pause.
    failed: usize,
    backoff: Backoff,
}

impl Dialer {
    pub(super) fn new(settings: Arc<EtcdSettings>, seed: u64) -> Self {
        // Processes begin with different members of the cluster.
        let next = seed as usize % settings.endpoints.len();
        let backoff = Backoff::new(seed, settings.pause_max());
        Self { settings, next, failed: 0, backoff }
    }

    /// The endpoint that is or was dialled.
    pub(super) fn endpoint(&self) -> &HostPort {
        &self.settings.endpoints[self.next]
    }

    /// A connection to the endpoint whose turn it is. With credentials it logs in; without, the first call dials.
    pub(super) async fn connect(&self) -> Result<Client, Trouble> {
        let EtcdSettings { credentials, tls, .. } = &*self.settings;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.settings.call_max())
            // Without a quorum a member's answers and silences mean nothing.
            .with_require_leader(true);
        if let Some(EtcdTls { files, server_name }) = tls {
            options = options.with_tls(files.client(server_name.as_deref()));
        }
        if let Some(Credentials { user, password }) = credentials {
            options = options.with_user(user, password.expose()).with_auto_token_refresh(true);
        }
        let url = format!("{scheme}://{}", self.endpoint());
        within(LOGIN_MAX, Client::connect([url], Some(options))).await
    }

    /// It works: the next pause is a short one.
    pub(super) fn works(&mut self) {
        self.failed = 0;
        self.backoff.reset();
    }

    /// It failed: the next endpoint is next, after a pause if it has failed too.
    pub(super) async fn next_endpoint(&mut self) {
        self.next = (self.next + 1) % self.settings.endpoints.len();
        self.failed += 1;
        if self.failed >= self.settings.endpoints.len() {
            self.failed = 0;
            let pause: Duration = self.backoff.pause();
            sleep_until(Instant::now() + pause).await;
        }
    }
}
