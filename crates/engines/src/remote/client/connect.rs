//! Connections: made within a bound, kept for a while, never more idle ones than allowed.

use std::{
    error::Error as StdError,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::Full;
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::{
    client::legacy::{Client, ResponseFuture, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::{net::TcpStream, time::timeout};
use tower_service::Service;

use super::{TlsError, TlsSettings, error::ConnectTimedOut};

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
    client: Client<InTime, Full<Bytes>>,
}

impl HttpClient {
    /// A client without connections. Must be made and used within a Tokio runtime.
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
            InTime { connector: tls.enable_http1().wrap_connector(tcp), limit: settings.connect_timeout };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(settings.idle_timeout)
            .pool_max_idle_per_host(settings.idle_max)
            .build(connector);
        Ok(Arc::new(Self { client }))
    }

    pub(super) fn request(&self, request: Request<Full<Bytes>>) -> ResponseFuture {
        self.client.request(request)
    }
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpClient").finish_non_exhaustive()
    }
}

type Connecting = Pin<Box<dyn Future<Output = Result<Connection, Box<dyn StdError + Send + Sync>>> + Send>>;
type Connection = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Bounds a connector as a whole: the TCP connector's own limit leaves name and TLS out.
#[derive(Clone)]
struct InTime {
    connector: HttpsConnector<HttpConnector>,
    limit: Duration,
}

impl Service<Uri> for InTime {
    type Response = Connection;
    type Error = Box<dyn StdError + Send + Sync>;
    type Future = Connecting;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.connector.poll_ready(cx)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let (connecting, limit) = (self.connector.call(to), self.limit);
        Box::pin(async move {
            timeout(limit, connecting).await.unwrap_or_else(|_| Err(ConnectTimedOut { limit }.into()))
        })
    }
}
