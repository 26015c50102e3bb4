//! A small HTTP client: a connection a request.

use std::{collections::BTreeMap, net::SocketAddr};

use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, StatusCode, body::Bytes, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinHandle};

/// Asks one server.
#[derive(Clone)]
pub(crate) struct Client {
    address: SocketAddr,
    pub(crate) key: Option<String>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) request_id: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{} {}", self.status, self.body))
    }

    /// The JSON of a good answer.
    pub(crate) fn good(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The events of a stream, `[DONE]` checked and left out.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let mut events: Vec<&str> = self
            .body
            .split_terminator("\n\n")
            .map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}")))
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// An answer that is being read. Dropped, its connection closes.
pub(crate) struct Open {
    pub(crate) response: Response<Incoming>,
    connection: JoinHandle<()>,
}

impl Open {
    /// The next piece of the body.
    pub(crate) async fn piece(&mut self) -> Option<String> {
        loop {
            let frame = self.response.body_mut().frame().await?.ok()?;
            if let Ok(data) = frame.into_data() {
                return Some(String::from_utf8(data.to_vec()).unwrap());
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, key: None }
    }

    pub(crate) async fn open(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Open {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(async move {
            let _ended = connection.await;
        });
        let mut request = Request::builder().method(method).uri(path).header("host", "engine");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let response = sender.send_request(request).await.unwrap();
        Open { response, connection }
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Answer {
        let mut open = self.open(method, path, headers, body).await;
        let status = open.response.status().as_u16();
        let request_id = open.response.headers().get("x-request-id");
        let request_id = request_id.map_or_else(String::new, |id| id.to_str().unwrap().to_owned());
        let mut body = Vec::new();
        while let Some(frame) = open.response.body_mut().frame().await {
            if let Ok(data) = frame.unwrap().into_data() {
                body.extend_from_slice(&data);
            }
        }
        Answer { status, request_id, body: String::from_utf8(body).unwrap() }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], Vec::new()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::POST, path, &[], body.to_string().into_bytes()).await
    }

    /// A stream whose first piece has arrived.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Open {
        let mut open = self.open(Method::POST, path, &[], body.to_string().into_bytes()).await;
        assert_eq!(open.response.status(), StatusCode::OK);
        open.piece().await.expect("a stream begins");
        open
    }

    pub(crate) async fn metrics(&self) -> Metrics {
        Metrics::parse(self.get("/metrics").await.body)
    }
}

/// `/metrics`, read.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) text: String,
    /// By name and every label but engine and model.
    values: BTreeMap<String, f64>,
}

impl Metrics {
    fn parse(text: String) -> Self {
        let mut values = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let labels = labels.trim_end_matches('}').split(',');
            let own: Vec<&str> = labels
                .filter(|label| {
                    !label.starts_with("engine=") && !label.starts_with("model_name=") && !label.is_empty()
                })
                .collect();
            let key = if own.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", own.join(",")) };
            values.insert(key, value.parse().unwrap());
        }
        Self { text, values }
    }

    /// 0 for a series that is not there yet.
    pub(crate) fn value(&self, series: &str) -> f64 {
        self.values.get(series).copied().unwrap_or(0.0)
    }

    pub(crate) fn has(&self, series: &str) -> bool {
        self.values.contains_key(series)
    }
}
