//! One engine's address.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST},
    uri::{PathAndQuery, Scheme},
};
use http_body::{Body as _, Frame};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::timeout_at;

use super::{
    HttpClient, HttpError, Secret,
    wire::{Pool, Wire},
};

/// Bytes of a refused request's answer that are kept.
pub(crate) const EXCERPT_BYTES_MAX: usize = 64 * 1024;

/// An engine's address, and how it is spoken to.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Scheme, host and port.
    base: Uri,
    host: HeaderValue,
    /// What stands before every path; without a slash at its end.
    prefix: Arc<str>,
    client: Arc<HttpClient>,
    authorization: Option<HeaderValue>,
    name: Arc<str>,
}

/// Why a URL cannot be an engine's. None of them quotes the URL: it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not a URL.
    #[error("an engine's URL is http://HOST:PORT or https://HOST:PORT")]
    Malformed,
    /// It has a user part.
    #[error("an engine's URL holds no user and no password; give the key as the engine's key")]
    Credentials,
    /// It has a query.
    #[error("an engine's URL has no `?`")]
    Query,
    /// The key has characters that no header may carry.
    #[error("the engine's key has characters that an HTTP header cannot carry")]
    Key,
}

/// Bounds of one exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the answer's body.
    pub body_bytes_max: usize,
    /// For all of it.
    pub deadline: Instant,
}

/// A whole answer with a status of 2xx.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// `content-type`, or nothing.
    pub content_type: Arc<str>,
    /// All of it.
    pub body: Bytes,
}

impl Endpoint {
    /// The engine at `url`. A `/v1` at its end is dropped, as every path here says it itself.
    ///
    /// # Errors
    /// If it is no such URL.
    pub fn new(url: &str, client: Arc<HttpClient>, key: Option<&Secret>) -> Result<Self, UrlError> {
        let uri: Uri = url.trim().parse().map_err(|_| UrlError::Malformed)?;
        let parts = uri.into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
            return Err(UrlError::Malformed);
        };
        if authority.as_str().contains('@') {
            return Err(UrlError::Credentials);
        }
        if (scheme != Scheme::HTTP && scheme != Scheme::HTTPS) || authority.host().is_empty() {
            return Err(UrlError::Malformed);
        }
        let path = parts.path_and_query.as_ref();
        if path.and_then(PathAndQuery::query).is_some() {
            return Err(UrlError::Query);
        }
        let prefix = path.map_or("", PathAndQuery::path).trim_end_matches('/');
        let prefix = prefix.strip_suffix("/v1").unwrap_or(prefix).into();
        let authorization = key.map(bearer).transpose()?;
        let name = authority.as_str().into();
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| UrlError::Malformed)?;
        let base = Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build();
        let base = base.map_err(|_| UrlError::Malformed)?;
        Ok(Self { base, host, prefix, client, authorization, name })
    }

    /// Host and port, for people.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Its host, as in the URL.
    pub fn host(&self) -> &str {
        self.base.host().unwrap_or_default()
    }

    /// The same engine with another key.
    ///
    /// # Errors
    /// If no header can carry the key.
    pub fn with_key(&self, key: Option<&Secret>) -> Result<Self, UrlError> {
        Ok(Self { authorization: key.map(bearer).transpose()?, ..self.clone() })
    }

    /// Asks for a document.
    ///
    /// # Errors
    /// Anything but a whole answer with a status of 2xx within the limits.
    pub async fn get(&self, path: &str, limits: Limits) -> Result<Answer, HttpError> {
        let request = self.request(Method::GET, path, &HeaderMap::new(), Bytes::new())?;
        self.exchange(request, limits).await
    }

    /// Sends a JSON document and reads the answer.
    ///
    /// # Errors
    /// As [`Endpoint::get`].
    pub async fn post_json(&self, path: &str, body: Bytes, limits: Limits) -> Result<Answer, HttpError> {
        let request = self.request(Method::POST, path, &HeaderMap::new(), body)?;
        self.exchange(request, limits).await
    }

    /// Sends a JSON document; gives the answer as soon as its head is here, whatever its status. Dropping it closes the
    /// connection. The caller keeps the deadline.
    ///
    /// # Errors
    /// If no head comes.
    pub async fn post_stream(
        &self,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Streaming, HttpError> {
        let request = self.request(Method::POST, path, headers, body)?;
        self.send(request).await
    }

    async fn exchange(&self, request: Request<Full<Bytes>>, limits: Limits) -> Result<Answer, HttpError> {
        let whole = async {
            let streaming = self.send(request).await?;
            if (200..300).contains(&streaming.status) {
                return streaming.whole(limits.body_bytes_max).await;
            }
            let status = streaming.status;
            let body = streaming.excerpt(limits.body_bytes_max.min(EXCERPT_BYTES_MAX)).await;
            Err(HttpError::Status { at: self.name.clone(), status, body })
        };
        let slow = |_| Err(HttpError::TooSlow { at: self.name.clone() });
        timeout_at(limits.deadline.into(), whole).await.unwrap_or_else(slow)
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Streaming, HttpError> {
        let pool = &self.client.pool;
        match pool.send(&self.base, request).await {
            Ok((response, wire)) => {
                let back = Back { wire, pool: pool.clone(), to: self.base.clone() };
                Ok(Streaming::new(response, back, self.name.clone()))
            }
            Err(error) => Err(HttpError::of_request(&self.name, &error)),
        }
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, HttpError> {
        let bad = |detail: http::Error| {
            let why = super::Unreachable::Other(detail.to_string().into());
            HttpError::Unreachable { at: self.name.clone(), why }
        };
        let uri = Uri::builder().path_and_query(format!("{}{path}", self.prefix)).build().map_err(bad)?;
        let is_post = method == Method::POST;
        let mut request = Request::builder().method(method).uri(uri).body(Full::new(body)).map_err(bad)?;
        let into = request.headers_mut();
        into.insert(HOST, self.host.clone());
        into.extend(headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        if is_post {
            into.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        if let Some(authorization) = &self.authorization {
            into.insert(AUTHORIZATION, authorization.clone());
        }
        Ok(request)
    }
}

fn bearer(key: &Secret) -> Result<HeaderValue, UrlError> {
    let mut value = HeaderValue::from_str(&format!("Bearer {}", key.expose())).map_err(|_| UrlError::Key)?;
    value.set_sensitive(true);
    Ok(value)
}

/// An answer whose body is still coming. Dropped before its end, it closes the connection.
#[derive(Debug)]
pub struct Streaming {
    /// HTTP status.
    pub status: u16,
    /// `content-type`, or nothing.
    pub content_type: Arc<str>,
    body: Incoming,
    /// What brings the body; `None` once it has ended.
    back: Option<Back>,
    at: Arc<str>,
}

/// A connection, and where it goes when its answer has ended.
struct Back {
    wire: Box<Wire>,
    pool: Arc<Pool>,
    to: Uri,
}

impl std::fmt::Debug for Back {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Back").field("wire", &self.wire).finish_non_exhaustive()
    }
}

impl Streaming {
    fn new(response: Response<Incoming>, back: Back, at: Arc<str>) -> Self {
        let (head, body) = response.into_parts();
        let content_type = head.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        Self {
            status: head.status.as_u16(),
            content_type: content_type.unwrap_or_default().into(),
            body,
            back: Some(back),
            at,
        }
    }

    /// Whether the body is server-sent events.
    pub fn is_events(&self) -> bool {
        let kind = self.content_type.split(';').next().unwrap_or_default().trim();
        kind.eq_ignore_ascii_case("text/event-stream")
    }

    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// If the connection breaks before the end.
    pub fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, HttpError>>> {
        loop {
            let frame = match ready!(self.poll_frame(cx)) {
                None => {
                    if let Some(Back { wire, pool, to }) = self.back.take() {
                        pool.put(&to, wire, cx);
                    }
                    return Poll::Ready(None);
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(HttpError::of_body(&self.at, &error)))),
                Some(Ok(frame)) => frame,
            };
            if let Ok(data) = frame.into_data() {
                return Poll::Ready(Some(Ok(data)));
            }
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut body = Pin::new(&mut self.body);
        match (body.as_mut().poll_frame(cx), &mut self.back) {
            // Asked for more, the connection hands over what it has read and reads on.
            (Poll::Pending, Some(back)) => {
                back.wire.drive(cx);
                body.poll_frame(cx)
            }
            (polled, _) => polled,
        }
    }

    /// As [`Streaming::poll_piece`], to await.
    ///
    /// # Errors
    /// As there.
    pub async fn piece(&mut self) -> Option<Result<Bytes, HttpError>> {
        std::future::poll_fn(|cx| self.poll_piece(cx)).await
    }

    /// The whole answer, whatever its status.
    ///
    /// # Errors
    /// If the connection breaks, or the body is longer than `body_bytes_max`.
    pub async fn whole(mut self, body_bytes_max: usize) -> Result<Answer, HttpError> {
        let too_large = HttpError::TooLarge { at: self.at.clone(), limit_bytes: body_bytes_max };
        if self.body.size_hint().lower() > body_bytes_max as u64 {
            return Err(too_large);
        }
        let Some(first) = self.piece().await.transpose()? else {
            return Ok(self.answer(Bytes::new()));
        };
        let mut body = BytesMut::new();
        let mut piece = first;
        loop {
            if body.len() + piece.len() > body_bytes_max {
                return Err(too_large);
            }
            match self.piece().await.transpose()? {
                None if body.is_empty() => return Ok(self.answer(piece)),
                None => {
                    body.extend_from_slice(&piece);
                    return Ok(self.answer(body.freeze()));
                }
                Some(next) => {
                    body.extend_from_slice(&piece);
                    piece = next;
                }
            }
        }
    }

    /// The beginning of the body, as far as it comes: of an answer that says why there is none.
    pub async fn excerpt(mut self, body_bytes_max: usize) -> Bytes {
        let mut body = BytesMut::new();
        while let Some(Ok(piece)) = self.piece().await {
            let room = body_bytes_max - body.len();
            body.extend_from_slice(&piece[..piece.len().min(room)]);
            if body.len() == body_bytes_max {
                break;
            }
        }
        body.freeze()
    }

    fn answer(&self, body: Bytes) -> Answer {
        Answer { status: self.status, content_type: self.content_type.clone(), body }
    }
}
