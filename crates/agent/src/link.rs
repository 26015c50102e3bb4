//! One agent's stream to one gateway, for as long as the gateway is listed.
//!
//! In: the gateway's address, the [`Board`]. Out: its messages over one stream after the other, and what the gateway asks
//! for. Start at [`Link::keep`]; a stream's life is in [`session`].
//!
//! Invariants: at most one stream at a time; what waits for a slow gateway is a few messages; a stream that is silent for a
//! lease is given up; a gateway for which the lease lapsed sees the engine again only under a higher incarnation.

mod session;

use std::{sync::Arc, time::Duration};

use forebay_proto::{
    EngineState, Hello, VersionError, WIRE_VERSION, Welcome, WireError, agree, fleet_client,
    tls::TlsFiles,
    v1::{self, RejectReason, from_agent::Body as Said, from_gateway::Body as Heard},
};
use forebay_registry::GatewayRecord;
use forebay_types::{EngineName, Incarnation, Role};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::{
    board::{Board, Opening, Told},
    entropy,
    incarnation::Minter,
    keys::{FleetKey, Holding, KeyConflict},
    logs::LogRing,
};

/// How long a connection may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long a gateway may take to answer Hello.
const WELCOME_MAX: Duration = Duration::from_secs(10);
/// Messages that wait for the connection. More would only be older when they arrive.
const WAITING_MAX: usize = 4;
/// First pause before a stream is tried again, doubled up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Pause after a refusal that only an operator can mend.
const PAUSE_REFUSED: Duration = Duration::from_secs(15);

/// What all links of an agent share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: EngineName,
    pub(crate) role: Role,
    pub(crate) labels: std::collections::BTreeMap<String, String>,
    pub(crate) board: Board,
    pub(crate) key: Arc<FleetKey>,
    pub(crate) minter: Mutex<Minter>,
    pub(crate) log: LogRing,
    pub(crate) tokenizer: watch::Receiver<crate::tokenizer::Source>,
    pub(crate) tls: Option<TlsFiles>,
    /// Gateways on other hosts are dialled without TLS.
    pub(crate) insecure: bool,
    /// A gateway's operator asked for a drain.
    pub(crate) drains: mpsc::Sender<String>,
}

impl Shared {
    /// An incarnation above all before.
    pub(crate) fn mint(&self) -> Incarnation {
        self.minter.lock().next(entropy::unix_ms(), entropy::random())
    }
}

/// How a link stands, for `status` and for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkState {
    /// No stream; why, as a sentence.
    Down(String),
    /// The gateway has taken the engine in under this incarnation.
    Up(Incarnation),
}

/// Why a stream ended or did not begin.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(
        "{address} is not on this host and there is no TLS: give --tls-ca, --tls-cert and --tls-key, or say --insecure"
    )]
    Insecure { address: String },
    #[error("{0} cannot be dialled")]
    Address(String),
    #[error("no connection: {0}")]
    Connect(#[source] tonic::transport::Error),
    #[error("no connection within {} s", CONNECT_MAX.as_secs())]
    ConnectTimeout,
    #[error("the stream broke: {}", .0.message())]
    Broken(Box<Status>),
    #[error("the gateway closed the stream")]
    Closed,
    #[error("no answer to Hello within {} s", WELCOME_MAX.as_secs())]
    NoWelcome,
    #[error("the gateway answered Hello with something else")]
    NotWelcome,
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Version(#[from] VersionError),
    #[error("refused: {sentence}")]
    Rejected { reason: RejectReason, sentence: String },
    #[error(transparent)]
    Key(#[from] KeyConflict),
    #[error("gateway {0} is connected already, under another of its addresses")]
    Twin(String),
    #[error("the gateway has said nothing for its lease of {} s", .0.as_secs_f64())]
    Silent(Duration),
}

impl LinkError {
    /// Trying again soon is of no use.
    fn is_for_operators(&self) -> bool {
        matches!(
            self,
            Self::Insecure { .. }
                | Self::Address(_)
                | Self::Version(_)
                | Self::Key(_)
                | Self::Twin(_)
                | Self::Rejected { reason: RejectReason::WireVersion | RejectReason::TooManyEngines, .. }
        )
    }
}

/// What a session ended with that is no error.
enum Ended {
    /// The engine's life is over, or its agent leaves.
    Said,
}

/// One gateway's link.
pub(crate) struct Link {
    shared: Arc<Shared>,
    record: GatewayRecord,
    state: watch::Sender<LinkState>,
    /// The life that was last presented, and as what.
    presented: Option<(u64, Incarnation)>,
    /// The name that the gateway gave itself.
    known_as: Option<String>,
    /// When the gateway was last heard in a stream that it had welcomed, and its lease.
    heard: Option<(Instant, Duration)>,
}

impl Link {
    pub(crate) fn new(shared: Arc<Shared>, record: GatewayRecord) -> (Self, watch::Receiver<LinkState>) {
        let (state, follow) = watch::channel(LinkState::Down("not tried yet".to_owned()));
        (Self { shared, record, state, presented: None, known_as: None, heard: None }, follow)
    }

    /// Opens streams until `listed` says that the gateway is no longer listed. A stream that stands is then kept: the
    /// list may be wrong, the stream is not.
    pub(crate) async fn keep(mut self, mut listed: watch::Receiver<bool>) {
        let mut pause = PAUSE_FIRST;
        let mut changes = self.shared.board.changes();
        let mut sentence = String::new();
        while *listed.borrow_and_update() {
            let Some((opening, told)) = self.shared.board.opening() else {
                // No life to speak of.
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    _ = listed.changed() => {}
                }
                continue;
            };
            let began = Instant::now();
            let error = match self.stream(opening, told).await {
                Ok(Ended::Said) => {
                    pause = PAUSE_FIRST;
                    self.state.send_replace(LinkState::Down("the engine's life ended".to_owned()));
                    continue;
                }
                Err(error) => error,
            };
            if let LinkError::Rejected { reason: RejectReason::Lapsed, .. } = &error {
                self.lapse();
            }
            let why = error.to_string();
            self.state.send_replace(LinkState::Down(why.clone()));
            if why == sentence {
                tracing::debug!(gateway = %self.record.name, reason = %why, "still no stream to this gateway");
            } else {
                tracing::warn!(gateway = %self.record.name, reason = %why, "no stream to this gateway");
                sentence = why;
            }
            if self.heard.is_some_and(|(heard, _)| heard > began) {
                (pause, sentence) = (PAUSE_FIRST, String::new());
            }
            let wait = if error.is_for_operators() {
                PAUSE_REFUSED
            } else {
                pause.mul_f64(0.5 + 0.5 * entropy::share())
            };
            pause = (pause * 2).min(PAUSE_MAX);
            tokio::select! {
                () = sleep_until(Instant::now() + wait) => {}
                _ = listed.changed() => {}
            }
        }
    }

    /// The incarnation to present: the life's own, or a new one if the lease that this gateway had on it lapsed.
    fn incarnation(&mut self, opening: &Opening) -> Incarnation {
        match self.presented {
            Some((life, incarnation)) if life == opening.life => {
                let lapsed = self.heard.is_some_and(|(heard, lease)| heard.elapsed() > lease);
                if !lapsed {
                    return incarnation;
                }
                self.lapse();
            }
            _ => {
                self.presented = Some((opening.life, opening.incarnation));
                self.heard = None;
            }
        }
        self.presented.expect("set above or by a lapse").1
    }

    /// What this gateway knew of the life is void: it comes back as a new one.
    fn lapse(&mut self) {
        if let Some((_, incarnation)) = &mut self.presented {
            *incarnation = self.shared.mint();
            tracing::info!(gateway = %self.record.name, %incarnation, "the lease lapsed; the engine returns as a new incarnation");
        }
        self.heard = None;
    }

    async fn stream(&mut self, opening: Opening, mut told: Told) -> Result<Ended, LinkError> {
        if let Some(name) = self.known_as.as_ref().filter(|name| self.shared.key.is_held_by(name)) {
            return Err(LinkError::Twin(name.clone()));
        }
        let incarnation = self.incarnation(&opening);
        let url = opening.data_plane.url.clone();
        let channel = self.connect().await?;
        let (sender, receiver) = mpsc::channel::<v1::FromAgent>(WAITING_MAX);
        let hello = Said::Hello(self.hello(opening, incarnation).into());
        sender.try_send(hello.into()).expect("the channel is new");
        let (mut inbound, welcome) =
            timeout(WELCOME_MAX, welcome(channel, receiver)).await.unwrap_or(Err(LinkError::NoWelcome))?;
        agree(WIRE_VERSION, welcome.wire_version)?;
        // Two addresses of one gateway, as a name's IPv4 and IPv6 ones: one stream is enough.
        self.known_as = Some(welcome.gateway.clone());
        if self.shared.key.is_held_by(&welcome.gateway) {
            return Err(LinkError::Twin(welcome.gateway));
        }
        let _holding: Holding = self.shared.key.hold(&welcome.gateway, &welcome.hash_key)?;
        told.welcomed(welcome.hash_key.clone());
        if !self.is_here() && is_loopback(&url) {
            tracing::warn!(gateway = %self.record.name, %url, "this gateway is told an address of the engine that only this host reaches: say how others reach it by --advertise");
        }
        tracing::info!(gateway = %self.record.name, %incarnation, "a gateway took the engine in");
        self.heard = Some((Instant::now(), welcome.lease));
        self.state.send_replace(LinkState::Up(incarnation));
        let mut session = session::Session::new(&self.shared, &welcome, sender);
        let ended = session.run(&mut told, &mut inbound).await;
        self.heard = Some((session.heard(), welcome.lease));
        ended
    }

    /// Whether the gateway is on this host.
    fn is_here(&self) -> bool {
        let address = &self.record.address;
        address.ip().map_or_else(|| address.host() == "localhost", |ip| ip.is_loopback())
    }

    async fn connect(&self) -> Result<Channel, LinkError> {
        let GatewayRecord { name: _, address, server_name } = &self.record;
        if self.shared.tls.is_none() && !self.shared.insecure && !self.is_here() {
            return Err(LinkError::Insecure { address: address.to_string() });
        }
        let scheme = if self.shared.tls.is_some() { "https" } else { "http" };
        let malformed = |_| LinkError::Address(address.to_string());
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(malformed)?
            .connect_timeout(CONNECT_MAX)
            .tcp_nodelay(true);
        if let Some(tls) = &self.shared.tls {
            endpoint = endpoint.tls_config(tls.client(server_name.as_deref())).map_err(LinkError::Connect)?;
        }
        let connected =
            timeout(CONNECT_MAX, endpoint.connect()).await.map_err(|_| LinkError::ConnectTimeout)?;
        connected.map_err(LinkError::Connect)
    }

    fn hello(&self, opening: Opening, incarnation: Incarnation) -> Hello {
        let Opening { life: _, incarnation: _, kind, data_plane, progress, facts, sight } = opening;
        debug_assert!(progress.state != EngineState::Ready || facts.is_some());
        Hello {
            wire_version: WIRE_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            engine: self.shared.engine.clone(),
            kind,
            incarnation,
            role: self.shared.role,
            progress,
            facts,
            data_plane,
            labels: self.shared.labels.clone(),
            cache_sight: sight,
        }
    }
}

type Inbound = Streaming<v1::FromGateway>;

/// Opens the stream and waits for the answer to the Hello that is in it.
async fn welcome(
    channel: Channel,
    outbound: mpsc::Receiver<v1::FromAgent>,
) -> Result<(Inbound, Welcome), LinkError> {
    let attached = fleet_client(channel).attach(ReceiverStream::new(outbound)).await.map_err(broken)?;
    let mut inbound = attached.into_inner();
    loop {
        match inbound.message().await.map_err(broken)?.ok_or(LinkError::Closed)?.body {
            Some(Heard::Welcome(welcome)) => return Ok((inbound, welcome.try_into()?)),
            Some(Heard::Reject(reject)) => return Err(rejected(&reject)),
            Some(_) => return Err(LinkError::NotWelcome),
            // A message of a later version.
            None => {}
        }
    }
}

fn is_loopback(url: &str) -> bool {
    let host = url.split_once("://").map_or(url, |(_, rest)| rest);
    ["127.", "localhost", "[::1]"].iter().any(|loopback| host.starts_with(loopback))
}

fn broken(status: Status) -> LinkError {
    LinkError::Broken(Box::new(status))
}

fn rejected(reject: &v1::Reject) -> LinkError {
    let reason = reject.reason();
    LinkError::Rejected {
        reason,
        sentence: forebay_proto::clip(&reject.sentence, forebay_proto::limits::SENTENCE_BYTES_MAX),
    }
}

#[cfg(test)]
mod tests;
