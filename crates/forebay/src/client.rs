//! A small HTTP/1.1 client for talking to Forebay and to other OpenAI-compatible servers over `http://`.
//!
//! One connection a request; dropping a response closes its connection, which is how a request is cancelled.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use crate::sse::{Event, EventParser};

/// A connection is made or refused within this.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// A whole answer that is no stream arrives within this.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// A stream says something at least this often. A request may wait in a queue for as long before its first token.
const SILENCE_TIME_MAX: Duration = Duration::from_secs(600);
/// Size of an answer that is no stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The address makes no sense.
    #[error("`{url}` is not an address to talk to: {reason}")]
    BadUrl {
        /// As given.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No connection.
    #[error("nothing answers at {authority}; is `forebay serve` running?")]
    Unreachable {
        /// Host and port.
        authority: String,
        /// The system's answer.
        #[source]
        cause: std::io::Error,
    },
    /// A connection, and then nothing.
    #[error("{authority} did not answer within {seconds} s")]
    Slow {
        /// Host and port.
        authority: String,
        /// The limit.
        seconds: u64,
    },
    /// The connection broke.
    #[error("the connection to {authority} broke before the end of the answer")]
    Lost {
        /// Host and port.
        authority: String,
        /// The protocol's answer.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A status other than 2xx.
    #[error("{message} (status {status}{})", code.as_ref().map_or(String::new(), |code| format!(", code {code}")))]
    Refused {
        /// HTTP status.
        status: u16,
        /// The stable code of an OpenAI-shaped error.
        code: Option<String>,
        /// The server's sentence.
        message: String,
    },
    /// A good status with a strange body.
    #[error("{authority} sent something else than was asked for; is it a Forebay address?")]
    Strange {
        /// Host and port.
        authority: String,
        /// What could not be read.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The body of an OpenAI-shaped error. Some servers send the inner object alone.
#[derive(Debug, Deserialize)]
struct ErrorBody {
    error: ErrorObject,
}

/// The error object itself.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ErrorObject {
    /// A sentence.
    pub(crate) message: String,
    /// A stable name. OpenAI sends a string, some servers a number.
    #[serde(default)]
    pub(crate) code: Option<serde_json::Value>,
}

impl ErrorObject {
    /// The code as text.
    pub(crate) fn code_text(&self) -> Option<String> {
        match self.code.as_ref()? {
            serde_json::Value::Null => None,
            serde_json::Value::String(code) => Some(code.clone()),
            other => Some(other.to_string()),
        }
    }
}

/// One server.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    host: String,
    port: u16,
    authority: String,
    /// Put before every path: empty, or `/something`.
    base: String,
    api_key: Option<String>,
}

impl Client {
    /// A client of the server at `url`: `http://host[:port][/base]`. A base that ends in `/v1`, as OpenAI clients write
    /// it, means the same as one without.
    ///
    /// # Errors
    /// [`ClientError::BadUrl`].
    pub(crate) fn new(url: &str, api_key: Option<String>) -> Result<Self, ClientError> {
        let bad = |reason| ClientError::BadUrl { url: url.to_owned(), reason };
        if url.starts_with("https://") {
            return Err(bad(
                "https is not available in this version; use http://, or a local proxy that speaks TLS",
            ));
        }
        let rest = url.strip_prefix("http://").ok_or_else(|| bad("it must begin with http://"))?;
        let (authority, base) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
        let parsed: hyper::http::uri::Authority =
            authority.parse().map_err(|_| bad("after http:// there must be a host, or host:port"))?;
        if authority.contains('@') {
            return Err(bad("user names are not used; keys are given by FOREBAY_API_KEY"));
        }
        if base.contains(['?', '#'])
            || base.parse::<hyper::http::uri::PathAndQuery>().is_err() && !base.is_empty()
        {
            return Err(bad("the path is not valid"));
        }
        let host = parsed.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(bad("after http:// there must be a host, or host:port"));
        }
        // `Authority::port` hides a port that is out of range.
        let port = match authority.strip_prefix(parsed.host()).and_then(|rest| rest.strip_prefix(':')) {
            Some(port) => port.parse().map_err(|_| bad("the port must be 1 to 65535"))?,
            None => 80,
        };
        let base = base.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base).to_owned();
        Ok(Self { host, port, authority: authority.to_owned(), base, api_key })
    }

    /// Host and port, for messages.
    pub(crate) fn authority(&self) -> &str {
        &self.authority
    }

    /// The body of the answer to a GET.
    ///
    /// # Errors
    /// Any [`ClientError`] but a strange body.
    pub(crate) async fn get(&self, path: &str) -> Result<Bytes, ClientError> {
        let request = self.request(Method::GET, path).body(Full::default());
        let (response, _connection) = self.send(request, ANSWER_TIME_MAX).await?;
        self.body(response).await
    }

    /// The answer to a GET of a list, read as JSON: `{"object": "list", "data": [...]}`, as OpenAI has it.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub(crate) async fn get_list<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<Vec<T>, ClientError> {
        #[derive(Deserialize)]
        struct List<T> {
            data: Vec<T>,
        }
        Ok(self.get_json::<List<T>>(path).await?.data)
    }

    /// The answer to a GET, read as JSON.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub(crate) async fn get_json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<T, ClientError> {
        let body = self.get(path).await?;
        serde_json::from_slice(&body).map_err(|cause| self.strange(cause))
    }

    /// The answer to a POST without a body, read as JSON.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub(crate) async fn post_json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<T, ClientError> {
        let request = self.request(Method::POST, path).body(Full::default());
        let (response, _connection) = self.send(request, ANSWER_TIME_MAX).await?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|cause| self.strange(cause))
    }

    /// The answer to a PUT of JSON, read as JSON.
    ///
    /// # Errors
    /// Any [`ClientError`].
    pub(crate) async fn put_json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        value: &impl serde::Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(value).map_err(|cause| self.strange(cause))?;
        let request = self.request(Method::PUT, path).header(header::CONTENT_TYPE, "application/json");
        let (response, _connection) = self.send(request.body(Full::from(body)), ANSWER_TIME_MAX).await?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|cause| self.strange(cause))
    }

    /// Posts JSON and reads the answer as a stream of events.
    ///
    /// # Errors
    /// Any [`ClientError`]; here those that are known before the first event.
    pub(crate) async fn post_for_events(
        &self,
        path: &str,
        body: Vec<u8>,
        request_id: Option<&str>,
    ) -> Result<EventStream, ClientError> {
        let mut request = self
            .request(Method::POST, path)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "text/event-stream");
        if let Some(id) = request_id {
            request = request.header("x-request-id", id);
        }
        let (response, connection) = self.send(request.body(Full::from(body)), SILENCE_TIME_MAX).await?;
        let is_events = response
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|value| value.starts_with("text/event-stream"));
        if !is_events {
            return Err(self.strange("the answer is not a stream of events"));
        }
        let request_id = response
            .headers()
            .get("x-request-id")
            .and_then(|value| value.to_str().ok())
            .map(ToOwned::to_owned);
        Ok(EventStream {
            request_id,
            authority: self.authority.clone(),
            body: response.into_body(),
            parser: EventParser::default(),
            ready: Vec::new().into_iter(),
            _connection: connection,
        })
    }

    /// An answer that is not what was asked for.
    pub(crate) fn strange(&self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Strange { authority: self.authority.clone(), cause: cause.into() }
    }

    /// The beginning of a request, with address and key.
    pub(crate) fn request(&self, method: Method, path: &str) -> hyper::http::request::Builder {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::HOST, &self.authority)
            .header(header::USER_AGENT, concat!("forebay/", env!("CARGO_PKG_VERSION")));
        match &self.api_key {
            Some(key) => request.header(header::AUTHORIZATION, format!("Bearer {key}")),
            None => request,
        }
    }

    /// Connects, sends and waits for a good status.
    async fn send(
        &self,
        request: Result<Request<Full<Bytes>>, hyper::http::Error>,
        answer_time_max: Duration,
    ) -> Result<(Response<Incoming>, Connection), ClientError> {
        let request = request.map_err(|cause| ClientError::BadUrl {
            url: self.authority.clone(),
            reason: if self.api_key.is_some() && cause.to_string().contains("header") {
                "the key in FOREBAY_API_KEY cannot be sent in a header"
            } else {
                "the request cannot be written"
            },
        })?;
        let stream = self.connect().await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|cause| self.lost(cause))?;
        let connection = Connection(tokio::spawn(async move {
            // Its errors reach whoever waits for the response.
            let _ = connection.await;
        }));
        let response = timeout(answer_time_max, sender.send_request(request))
            .await
            .map_err(|_| self.slow(answer_time_max))?
            .map_err(|cause| self.lost(cause))?;
        if response.status().is_success() {
            return Ok((response, connection));
        }
        let status = response.status();
        let body = self.body(response).await?;
        Err(refused(status, &body))
    }

    /// A new connection.
    pub(crate) async fn connect(&self) -> Result<TcpStream, ClientError> {
        let unreachable = |cause| ClientError::Unreachable { authority: self.authority.clone(), cause };
        let stream = timeout(CONNECT_TIME_MAX, TcpStream::connect((self.host.as_str(), self.port)))
            .await
            .map_err(|_| unreachable(std::io::ErrorKind::TimedOut.into()))?
            .map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        Ok(stream)
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect();
        match timeout(ANSWER_TIME_MAX, body).await {
            Err(_) => Err(self.slow(ANSWER_TIME_MAX)),
            Ok(Err(cause)) => Err(ClientError::Lost { authority: self.authority.clone(), cause }),
            Ok(Ok(body)) => Ok(body.to_bytes()),
        }
    }

    fn slow(&self, limit: Duration) -> ClientError {
        ClientError::Slow { authority: self.authority.clone(), seconds: limit.as_secs() }
    }

    fn lost(&self, cause: hyper::Error) -> ClientError {
        ClientError::Lost { authority: self.authority.clone(), cause: Box::new(cause) }
    }
}

/// What a status other than 2xx means, with the server's own words if it has any.
pub(crate) fn refused(status: StatusCode, body: &[u8]) -> ClientError {
    let object = serde_json::from_slice::<ErrorBody>(body)
        .map(|body| body.error)
        .or_else(|_| serde_json::from_slice::<ErrorObject>(body))
        .ok();
    let code = object.as_ref().and_then(ErrorObject::code_text);
    let message = object.map_or_else(
        || format!("the server answered {}", status.canonical_reason().unwrap_or("with an error")),
        |object| object.message,
    );
    let message = match status {
        StatusCode::UNAUTHORIZED => {
            format!("{message}; give a key by the environment variable FOREBAY_API_KEY")
        }
        _ => message,
    };
    ClientError::Refused { status: status.as_u16(), code, message }
}

/// The task that drives a connection. Dropping it closes the connection at once.
#[derive(Debug)]
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An answer that comes as events. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct EventStream {
    /// What the server calls the request.
    pub(crate) request_id: Option<String>,
    authority: String,
    body: Incoming,
    parser: EventParser,
    ready: std::vec::IntoIter<Event>,
    _connection: Connection,
}

impl EventStream {
    /// The next event; `None` at the end of the answer. Cancel-safe: a dropped call loses nothing.
    ///
    /// # Errors
    /// The connection broke, the server fell silent, or an event is too long.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(event) = self.ready.next() {
                return Ok(Some(event));
            }
            let lost = |cause| ClientError::Lost { authority: self.authority.clone(), cause };
            let frame = timeout(SILENCE_TIME_MAX, self.body.frame()).await.map_err(|_| {
                ClientError::Slow { authority: self.authority.clone(), seconds: SILENCE_TIME_MAX.as_secs() }
            })?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|cause| lost(Box::new(cause)))?;
            let mut events = Vec::new();
            if let Some(bytes) = frame.data_ref() {
                self.parser.feed(bytes, &mut events).map_err(|cause| lost(Box::new(cause)))?;
            }
            self.ready = events.into_iter();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them() {
        let check =
            |url: &str, expected: Result<(&str, u16, &str), &str>| match (Client::new(url, None), expected) {
                (Ok(client), Ok(expected)) => {
                    assert_eq!((client.host.as_str(), client.port, client.base.as_str()), expected, "{url}");
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{url}: {error}"),
                (result, _) => panic!("{url}: {result:?}"),
            };
        check("http://127.0.0.1:8080", Ok(("127.0.0.1", 8_080, "")));
        check("http://localhost:8000/v1", Ok(("localhost", 8_000, "")));
        check("http://localhost:8000/v1/", Ok(("localhost", 8_000, "")));
        check("http://gateway/team/v1", Ok(("gateway", 80, "/team")));
        check("http://[::1]:9/", Ok(("::1", 9, "")));
        check("https://api.example.com", Err("https is not available"));
        check("127.0.0.1:8080", Err("must begin with http://"));
        check("http://", Err("there must be a host"));
        check("http://:80", Err("there must be a host"));
        check("http://a b", Err("there must be a host"));
        check("http://h:99999", Err("port must be"));
        check("http://me@h", Err("FOREBAY_API_KEY"));
        check("http://h/?a=b", Err("path is not valid"));
    }

    #[test]
    fn a_refusal_is_told_in_the_servers_words() {
        let check = |status: u16, body: &str, expected: &str| {
            let status = StatusCode::from_u16(status).expect("a status");
            assert_eq!(refused(status, body.as_bytes()).to_string(), expected, "{body}");
        };
        check(
            404,
            r#"{"error":{"message":"no such model","code":"model_not_found"}}"#,
            "no such model (status 404, code model_not_found)",
        );
        check(400, r#"{"object":"error","message":"bad","code":400}"#, "bad (status 400, code 400)");
        check(500, "<html>", "the server answered Internal Server Error (status 500)");
        check(
            401,
            r#"{"error":{"message":"no key","code":null}}"#,
            "no key; give a key by the environment variable FOREBAY_API_KEY (status 401)",
        );
    }
}
