//! A small HTTP client for loopback, for side channels between doubles and for the suite.
//!
//! In: method, URL, body. Out: status, headers and body, or a body that is read piece by piece. One connection a
//! request; `http` only. Every body has a bound.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Bytes of an answer that are read at most.
const BODY_BYTES_MAX: usize = 64 << 20;

/// An answer that was read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The `data:` fields of a stream of events, in order.
    pub fn events(&self) -> Vec<String> {
        self.text().lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}

/// An answer whose body is still coming. Dropping it closes the connection.
#[derive(Debug)]
pub struct Open {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    body: Incoming,
    connection: JoinHandle<()>,
}

impl Open {
    /// The next piece of the body; `None` at its proper end.
    ///
    /// # Errors
    /// If the connection breaks.
    pub async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(io::Error::other(error)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Sends `body` as JSON (nothing if it is null) and waits for the whole answer.
///
/// # Errors
/// If the connection fails, the answer is too long, or `timeout` passes.
pub async fn send(
    method: Method,
    url: &str,
    headers: &[(&str, &str)],
    body: &Value,
    timeout: Duration,
) -> io::Result<Answer> {
    let answer = async {
        let mut open = open(method, url, headers, body).await?;
        let mut limited = Limited::new(&mut open.body, BODY_BYTES_MAX);
        let collected = (&mut limited).collect().await.map_err(io::Error::other)?;
        Ok(Answer { status: open.status, headers: open.headers.clone(), body: collected.to_bytes() })
    };
    tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Sends `body` as JSON (nothing if it is null) and returns when the answer's head is there.
///
/// # Errors
/// If the connection fails or the URL is not `http://host:port/...`.
pub async fn open(method: Method, url: &str, headers: &[(&str, &str)], body: &Value) -> io::Result<Open> {
    let uri: Uri = url.parse().map_err(io::Error::other)?;
    let authority = uri.authority().ok_or_else(|| io::Error::other(format!("no host in {url}")))?;
    let stream = TcpStream::connect((authority.host(), authority.port_u16().unwrap_or(80))).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let connection = tokio::spawn(async move {
        let _shows_as_an_error_of_the_answer = connection.await;
    });
    let payload = if body.is_null() { Vec::new() } else { serde_json::to_vec(body)? };
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::builder().method(method).uri(path).header("host", authority.as_str());
    if !body.is_null() {
        request = request.header("content-type", "application/json");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(payload))).map_err(io::Error::other)?;
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let (head, body) = response.into_parts();
    Ok(Open { status: head.status.as_u16(), headers: head.headers, body, connection })
}
