//! The gateway behind a real socket, and clients that speak to it byte by byte.

use std::{net::SocketAddr, sync::Arc};

use forebay_gateway::{
    http::{Ended, Gateway, HttpLimits, serve_admin, serve_public},
    metrics::Metrics,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

use super::{Fake, Setup};

/// Longest wait for anything; a bound on hanging, not a measurement.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

pub const STREAM: &str = r#"{"model":"tiny","prompt":"x","stream":true}"#;
pub const WHOLE: &str = r#"{"model":"tiny","prompt":"x"}"#;

pub struct Server {
    pub address: SocketAddr,
    /// Of the admin address, if it is served.
    pub admin: Option<SocketAddr>,
    shutdown: Option<oneshot::Sender<()>>,
    pub serving: JoinHandle<Ended>,
    pub gateway: Gateway,
    pub metrics: Arc<Metrics>,
}

impl Server {
    pub async fn start(fake: &Arc<Fake>, http_limits: HttpLimits) -> Self {
        Self::of(fake, Setup { http_limits, ..Setup::default() }).await
    }

    pub async fn of(fake: &Arc<Fake>, setup: Setup) -> Self {
        let (gateway, metrics) = setup.gateway(fake);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let (shutdown, asked) = oneshot::channel();
        let serving = tokio::spawn(serve_public(listener, gateway.clone(), async {
            let _asked_or_dropped = asked.await;
        }));
        Self { address, admin: None, shutdown: Some(shutdown), serving, gateway, metrics }
    }

    /// Serves operators too, until the test ends.
    pub async fn with_admin(mut self) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        self.admin = Some(listener.local_addr().expect("it is bound"));
        tokio::spawn(serve_admin(listener, self.gateway.clone(), std::future::pending()));
        self
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("something listens")
    }

    pub async fn ask(&self, body: &str) -> TcpStream {
        let mut stream = self.connect().await;
        send(&mut stream, body).await;
        stream
    }

    pub fn stop(&mut self) {
        self.shutdown.take().expect("it was not stopped").send(()).expect("it serves");
    }

    /// Waits until every connection is closed and everything they held is released.
    pub async fn until_idle(&self) {
        while self.metrics.connections.get() != 0 || self.gateway.live_requests() != 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(self.metrics.requests_in_flight.get(), 0);
    }

    pub async fn until_connections(&self, count: i64) {
        while self.metrics.connections.get() != count {
            tokio::task::yield_now().await;
        }
    }

    /// Another client is served as if nothing were.
    pub async fn serves_another(&self) {
        let mut client = self.ask(WHOLE).await;
        read_until(&mut client, "\"text\":\"hi\"").await;
    }
}

pub async fn send(stream: &mut TcpStream, body: &str) {
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await.expect("it is read");
}

/// Reads until `text` was received; returns everything so far.
pub async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut received = Vec::new();
    loop {
        let read = stream.read_buf(&mut received).await.expect("it is open");
        let so_far = String::from_utf8_lossy(&received).into_owned();
        if so_far.contains(text) {
            return so_far;
        }
        assert_ne!(read, 0, "closed after {so_far}");
    }
}

pub async fn read_to_end(mut stream: TcpStream) -> String {
    let mut received = String::new();
    stream.read_to_string(&mut received).await.expect("it is text");
    received
}

/// What came of a request that was written while the answer was read.
pub struct Exchange {
    /// Everything until the server closed, or reset after it had answered.
    pub answer: String,
    /// How much of the request the server, or the kernel for it, took.
    pub taken: usize,
}

impl Exchange {
    pub fn status(&self) -> u16 {
        let status = self.answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        status.unwrap_or(0)
    }

    /// How many answers there are.
    pub fn answers(&self) -> usize {
        self.answer.matches("HTTP/1.1 ").count()
    }

    pub fn error(&self) -> serde_json::Value {
        let body = self.answer.split_once("\r\n\r\n").expect("a head").1;
        let body: serde_json::Value =
            serde_json::from_str(body).unwrap_or_else(|_| panic!("{}", self.answer));
        body["error"].clone()
    }
}

/// Writes `parts` until the server takes no more, then reads what it had said: as a client does that writes first.
pub async fn exchange(address: SocketAddr, parts: impl IntoIterator<Item = Vec<u8>>) -> Exchange {
    let mut stream = TcpStream::connect(address).await.expect("something listens");
    let mut taken = 0;
    'write: for part in parts {
        let mut rest = &part[..];
        while !rest.is_empty() {
            match stream.write(rest).await {
                Ok(wrote) => {
                    taken += wrote;
                    rest = &rest[wrote..];
                }
                Err(_) => break 'write,
            }
        }
    }
    let mut answer = Vec::new();
    let reading = async { while stream.read_buf(&mut answer).await.is_ok_and(|read| read > 0) {} };
    tokio::time::timeout(PATIENCE, reading).await.expect("the server closes");
    Exchange { answer: String::from_utf8_lossy(&answer).into_owned(), taken }
}

/// The same of a body, with its length.
pub async fn post_raw(address: SocketAddr, path: &str, body: &[u8]) -> Exchange {
    let length = body.len();
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    exchange(address, [head.into_bytes(), body.to_vec()]).await
}
