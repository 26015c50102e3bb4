//! One server under load: its connections, and one request on one of them.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_engine_wire::sse::{SseDecoder, SseLimits};
use forebay_loadgen::{Failure, Outcome, Recorder};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, Response, body::Incoming, client::conn::http1::SendRequest, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::time::timeout;

use super::body::{Reading, failure};
use crate::{
    client::{Client, ClientError, refused},
    exit::{Exit, Failed},
};

/// Bytes of a whole answer; a server that sends more is broken.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Bytes of one event, and of its line.
const SSE_LIMITS: SseLimits = SseLimits { line_bytes_max: 1 << 20, event_bytes_max: 1 << 20 };
/// Models named in an error.
const NAMED_MAX: usize = 5;

/// The clock of a run: seconds since it began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn now(self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }

    pub(super) fn at(self, seconds: f64) -> tokio::time::Instant {
        (self.0 + Duration::from_secs_f64(seconds.max(0.0))).into()
    }
}

/// A server.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) url: String,
    pub(super) model: String,
    client: Client,
    time_max: Duration,
    /// Connections that wait for a request. Never more than there were requests at once.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

impl Target {
    /// Finds the server, and its model unless one is named.
    ///
    /// # Errors
    /// No server, no leave, another model.
    pub(super) async fn attach(
        url: &str,
        key: Option<String>,
        model: Option<&str>,
        time_max: Duration,
    ) -> anyhow::Result<Self> {
        let client = Client::new(url, key)?;
        let listed = match client.get_list::<Model>("/v1/models").await {
            // Not every server has a list; whoever names the model needs none.
            Err(ClientError::Refused { status: 404, .. }) if model.is_some() => None,
            listed => Some(listed?.into_iter().map(|model| model.id).collect::<Vec<_>>()),
        };
        let not_found = |sentence| anyhow::Error::from(Failed { exit: Exit::NotFound, sentence });
        let names = |listed: &[String]| listed[..listed.len().min(NAMED_MAX)].join(", ");
        let model = match (model, listed) {
            (Some(model), Some(listed)) if !listed.iter().any(|listed| listed == model) => {
                let sentence =
                    format!("{url} has no model `{model}`; give --model one of: {}", names(&listed));
                return Err(not_found(sentence));
            }
            (Some(model), _) => model.to_owned(),
            (None, Some(listed)) => match listed.as_slice() {
                [only] => only.clone(),
                [] => return Err(not_found(format!("{url} lists no model; is it still loading?"))),
                several => {
                    let sentence =
                        format!("{url} has several models; give --model one of: {}", names(several));
                    return Err(Failed { exit: Exit::Usage, sentence }.into());
                }
            },
            (None, None) => unreachable!("a list is done without only where a model is named"),
        };
        Ok(Self { url: url.to_owned(), model, client, time_max, idle: Mutex::default() })
    }

    /// Sends one request and reads its answer. `due` is when it should have been sent.
    pub(super) async fn exchange(
        &self,
        body: Bytes,
        due: f64,
        keeps_text: bool,
        clock: Clock,
    ) -> (Outcome, String) {
        let mut recorder = Recorder::new(due, clock.now());
        let mut reading = Reading { keeps_text, ..Reading::default() };
        let failed = match timeout(self.time_max, self.converse(body, &mut recorder, &mut reading, clock))
            .await
        {
            Ok(done) => done.err(),
            Err(_) => {
                Some(failure("timeout", &format!("no whole answer within {} s", self.time_max.as_secs_f64())))
            }
        };
        (recorder.end(clock.now(), reading.usage, failed), reading.text)
    }

    async fn converse(
        &self,
        body: Bytes,
        recorder: &mut Recorder,
        reading: &mut Reading,
        clock: Clock,
    ) -> Result<(), Failure> {
        let (sender, response) = self.send(body).await?;
        let status = response.status();
        let is_events = response
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        if is_events && status.is_success() {
            read_events(response.into_body(), recorder, reading, clock).await?;
        } else {
            let whole = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            let whole = whole.map_err(|cause| failure("lost", &cause.to_string()))?.to_bytes();
            if !status.is_success() {
                let kind = format!("status {}", status.as_u16());
                return Err(failure(kind, &refused(status, &whole).to_string()));
            }
            if !reading.take(&whole) {
                return Err(failure("strange", "the answer is no chat completion"));
            }
        }
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        Ok(())
    }

    /// Sends on a connection that waits, or on a new one.
    async fn send(&self, body: Bytes) -> Result<(SendRequest<Full<Bytes>>, Response<Incoming>), Failure> {
        let lost = |cause: hyper::Error| failure("lost", &described(&cause));
        loop {
            let waiting = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut sender) = waiting else { break };
            // Servers close connections that wait; that is nobody's error.
            if sender.ready().await.is_err() {
                continue;
            }
            match sender.try_send_request(self.request(body.clone())?).await {
                Ok(response) => return Ok((sender, response)),
                Err(mut error) => {
                    if error.take_message().is_none() {
                        return Err(lost(error.into_error()));
                    }
                }
            }
        }
        let stream = self.client.connect().await.map_err(|error| failure("refused", &error.to_string()))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        // It ends with its sender; its errors reach whoever waits for the response.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let response = sender.send_request(self.request(body)?).await.map_err(lost)?;
        Ok((sender, response))
    }

    fn request(&self, body: Bytes) -> Result<Request<Full<Bytes>>, Failure> {
        let request = self.client.request(Method::POST, "/v1/chat/completions");
        let request = request.header(header::CONTENT_TYPE, "application/json").body(Full::new(body));
        request.map_err(|cause| failure("not sent", &cause.to_string()))
    }
}

async fn read_events(
    mut body: Incoming,
    recorder: &mut Recorder,
    reading: &mut Reading,
    clock: Clock,
) -> Result<(), Failure> {
    let mut decoder = SseDecoder::new(SSE_LIMITS);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|cause| failure("lost", &described(&cause)))?;
        let Some(bytes) = frame.data_ref() else { continue };
        let at = clock.now();
        decoder
            .push(bytes, |event| reading.event(event.name, event.data, at, recorder))
            .map_err(|error| failure("strange", &error.to_string()))?;
    }
    match reading.failure.take() {
        Some(failure) => Err(failure),
        None if !reading.done => Err(failure("cut off", "the stream ended without [DONE]")),
        None => Ok(()),
    }
}

/// An error with its causes: hyper's own words alone say little.
fn described(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
