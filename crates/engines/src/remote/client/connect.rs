//! Connections: made within a bound, kept for a while, never more idle ones than allowed.

use std::{error::Error as StdError, sync::Arc, time::Duration};

use http::Uri;
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::{net::TcpStream, time::timeout};
use tower_service::Service as _;

use super::{TlsError, TlsSettings, error::ConnectTimedOut, wire::Pool};

/// How connections are made and kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientSettings {
    /// For name, TCP and TLS together.
    pub connect_timeout: Duration,
    /// Idle connections kept to one engine.
    pub idle_max: usize,
    /// How long. Uvicorn, in front of vLLM and SGLang, closes idle connections after 5 s: closing them first means that
    /// no request is written to a connection that is just being closed.
    pub idle_timeout: Duration,
    /// Trust, for `https`.
    pub tls: TlsSettings,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(1),
            idle_max: 64,
            idle_timeout: Duration::from_secs(4),
            tls: TlsSettings::default(),
        }
    }
}

/// Makes connections and keeps them for the next request. Engines with the same settings may share one.
pub struct HttpClient {
    pub(super) pool: Arc<Pool>,
}

impl HttpClient {
    /// A client without connections. Must be used within a Tokio runtime.
    ///
    /// # Errors
    /// If the TLS settings cannot be used.
    pub fn new(settings: &ClientSettings) -> Result<Arc<Self>, TlsError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(settings.connect_timeout));
        let mut tls = HttpsConnectorBuilder::new().with_tls_config(settings.tls.config()?).https_or_http();
        if let Some(name) = settings.tls.name()? {
            tls = tls.with_server_name_resolver(FixedServerNameResolver::new(name));
        }
        let connector =
            Connector { connector: tls.enable_http1().wrap_connector(tcp), limit: settings.connect_timeout };
        Ok(Arc::new(Self { pool: Pool::new(connector, settings.idle_max, settings.idle_timeout) }))
    }
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpClient").finish_non_exhaustive()
    }
}

pub(super) type Connection = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Bounds a connector as a whole: the TCP connector's own limit leaves name and TLS out.
pub(super) struct Connector {
    connector: HttpsConnector<HttpConnector>,
    limit: Duration,
}

impl Connector {
    pub(super) async fn connect(&self, to: &Uri) -> Result<Connection, Box<dyn StdError + Send + Sync>> {
        let connecting = self.connector.clone().call(to.clone());
        timeout(self.limit, connecting)
            .await
            .unwrap_or_else(|_| Err(ConnectTimedOut { limit: self.limit }.into()))
    }
}
