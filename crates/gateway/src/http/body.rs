//! Reading a request's body within its bounds: of size, of time, and of the memory that all bodies take together.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header::CONTENT_LENGTH},
};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::{Instant, timeout_at};

use super::{
    errors::{ApiError, ErrorType},
    limits::HttpLimits,
};

/// A body of up to so many bytes is copied out of the connection's buffer of 8 KiB, which it would keep from being used again
/// for as long as its answer takes.
const COPIED_BYTES_MAX: usize = 4096;
/// Bodies up to this size are not counted: with `connections_max` of them they take 1 GiB at most, and most bodies are
/// so small. Those that are larger are counted from here on.
const UNCOUNTED_BYTES: usize = 64 * 1024;
/// Time that a body has before its rate counts: as much as a slow start and a lost packet or two take.
const RATE_GRACE: Duration = Duration::from_secs(10);

/// The memory that large bodies take together, while they are read and until the last of them is done with.
#[derive(Debug)]
pub(crate) struct Bodies {
    bytes: AtomicUsize,
    bytes_max: usize,
    gauge: Gauge,
}

impl Bodies {
    pub(crate) fn new(bytes_max: usize, gauge: Gauge) -> Arc<Self> {
        Arc::new(Self { bytes: AtomicUsize::new(0), bytes_max, gauge })
    }

    /// Takes `more` of what is left, if there is as much.
    fn take(&self, more: usize) -> bool {
        let taken = |bytes: usize| bytes.checked_add(more).filter(|bytes| *bytes <= self.bytes_max);
        // Relaxed: the number guards nothing but itself.
        let took = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok();
        if took {
            self.gauge.inc_by(more as i64);
        }
        took
    }
}

/// What one body takes of [`Bodies`].
struct Share {
    bodies: Arc<Bodies>,
    bytes: usize,
}

impl Share {
    fn grow(&mut self, more: usize) -> Result<(), ApiError> {
        if self.bodies.take(more) {
            self.bytes += more;
            return Ok(());
        }
        Err(too_many(self.bodies.bytes_max))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.bodies.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bodies.gauge.dec_by(self.bytes as i64);
    }
}

/// A large body: its last clone gives its share back.
struct Counted {
    body: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

/// Reads all of `body`.
///
/// A body beyond the bound is read on and thrown away, up to as much again: a client that is still sending when its
/// connection closes may never look at the answer that tells it why.
///
/// Its memory is taken as it arrives, not as it is declared, so a client holds as much of `bodies_bytes_max` as it sent.
/// Beyond that it is refused at once rather than made to wait: bodies that wait for each other would all wait for ever.
///
/// # Errors
/// 413 beyond `body_bytes_max`, 408 beyond `body_read_timeout` or below `body_bytes_per_second_min`, 503 beyond
/// `bodies_bytes_max`, 400 if the client breaks off.
pub(crate) async fn read(
    headers: &HeaderMap,
    body: Body,
    limits: &HttpLimits,
    bodies: &Arc<Bodies>,
) -> Result<Bytes, ApiError> {
    let declared = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let declared = declared.map(|length| usize::try_from(length).unwrap_or(usize::MAX));
    if declared.is_some_and(|length| length > limits.body_bytes_max.saturating_mul(2)) {
        return Err(too_large(limits.body_bytes_max));
    }
    let began = Instant::now();
    let mut parts = Parts::new(declared, limits.body_bytes_max);
    let mut frames = body;
    loop {
        let deadline = deadline(began, parts.received, limits);
        let Ok(frame) = timeout_at(deadline, frames.frame()).await else {
            return Err(too_slow(began, parts.received, limits));
        };
        let Some(frame) = frame else { return parts.whole() };
        let frame = frame.map_err(|error| {
            ApiError::invalid("incomplete_body", format!("the body could not be read to its end: {error}"))
        })?;
        if let Ok(data) = frame.into_data() {
            parts.add(data, bodies)?;
        }
    }
}

/// When a body of which so much is there must be complete, or have more.
fn deadline(began: Instant, received: usize, limits: &HttpLimits) -> Instant {
    let by_rate = match limits.body_bytes_per_second_min {
        0 => Duration::MAX,
        rate => RATE_GRACE.saturating_add(Duration::from_secs((received / rate) as u64)),
    };
    began + limits.body_read_timeout.min(by_rate)
}

/// A body on its way.
struct Parts {
    declared: Option<usize>,
    bytes_max: usize,
    received: usize,
    /// Most bodies come in one piece, which is then used as it is.
    first: Bytes,
    joined: BytesMut,
    share: Option<Share>,
}

impl Parts {
    fn new(declared: Option<usize>, bytes_max: usize) -> Self {
        Self { declared, bytes_max, received: 0, first: Bytes::new(), joined: BytesMut::new(), share: None }
    }

    fn add(&mut self, data: Bytes, bodies: &Arc<Bodies>) -> Result<(), ApiError> {
        self.received = self.received.saturating_add(data.len());
        if self.received > self.bytes_max.saturating_mul(2) {
            return Err(too_large(self.bytes_max));
        }
        if self.received > self.bytes_max {
            // Nobody will read it any more.
            (self.first, self.joined, self.share) = (Bytes::new(), BytesMut::new(), None);
            return Ok(());
        }
        if self.received > UNCOUNTED_BYTES {
            let share = self.share.get_or_insert_with(|| Share { bodies: bodies.clone(), bytes: 0 });
            share.grow(self.received - share.bytes)?;
        }
        if self.first.is_empty() && self.joined.is_empty() {
            self.first = data;
            return Ok(());
        }
        if self.joined.is_empty() {
            let size = self.declared.unwrap_or(self.received).clamp(self.received, self.bytes_max);
            self.joined.reserve(size);
            self.joined.extend_from_slice(&self.first);
        }
        self.joined.extend_from_slice(&data);
        Ok(())
    }

    fn whole(self) -> Result<Bytes, ApiError> {
        if self.received > self.bytes_max {
            return Err(too_large(self.bytes_max));
        }
        let body = match self.joined.is_empty() {
            true if self.first.len() <= COPIED_BYTES_MAX => Bytes::copy_from_slice(&self.first),
            true => self.first,
            false => self.joined.freeze(),
        };
        Ok(match self.share {
            None => body,
            Some(share) => Bytes::from_owner(Counted { body, _share: share }),
        })
    }
}

fn too_slow(began: Instant, received: usize, limits: &HttpLimits) -> ApiError {
    let message = if began.elapsed() >= limits.body_read_timeout {
        format!("the body did not arrive within {} s", limits.body_read_timeout.as_secs_f64())
    } else {
        let (rate, seconds) = (limits.body_bytes_per_second_min, began.elapsed().as_secs());
        format!(
            "{received} bytes of the body arrived in {seconds} s, less than {rate} a second, the limit \
             `body_bytes_per_second_min`; send faster"
        )
    };
    ApiError::invalid("body_timeout", message).with_status(StatusCode::REQUEST_TIMEOUT)
}

fn too_large(bytes_max: usize) -> ApiError {
    let message = format!("the body has more than {bytes_max} bytes, the limit `body_bytes_max`; send less");
    ApiError::invalid("body_too_large", message).with_status(StatusCode::PAYLOAD_TOO_LARGE)
}

/// The bodies of others are done with in a moment, or cut off when their time is over.
fn too_many(bytes_max: usize) -> ApiError {
    let message = format!(
        "the large bodies that are being worked on have {bytes_max} bytes, the limit `bodies_bytes_max`; try again"
    );
    ApiError {
        kind: ErrorType::ServerError,
        retry_after_seconds: Some(1),
        ..ApiError::invalid("too_many_bodies", message).with_status(StatusCode::SERVICE_UNAVAILABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a body that the client sends at will.
    struct Sent {
        parts: tokio::sync::mpsc::Sender<Bytes>,
        /// What came of it, and when.
        reading: tokio::task::JoinHandle<(Result<Bytes, ApiError>, Instant)>,
    }

    impl Sent {
        async fn read(self) -> Result<Bytes, ApiError> {
            drop(self.parts);
            self.reading.await.unwrap().0
        }
    }

    fn bodies(bytes_max: usize) -> Arc<Bodies> {
        Bodies::new(bytes_max, Gauge::default())
    }

    fn send(limits: HttpLimits, bodies: &Arc<Bodies>) -> Sent {
        let (parts, received) = tokio::sync::mpsc::channel::<Bytes>(1);
        let bodies = bodies.clone();
        let reading = tokio::spawn(async move {
            let frames = futures::stream::unfold(received, |mut received| async {
                let part = received.recv().await?;
                Some((Ok::<_, std::io::Error>(part), received))
            });
            let read = read(&HeaderMap::new(), Body::from_stream(frames), &limits, &bodies).await;
            (read, Instant::now())
        });
        Sent { parts, reading }
    }

    #[tokio::test(start_paused = true)]
    async fn a_trickle_is_cut_after_its_grace_and_a_slow_line_is_not() {
        let check = async |bytes: usize, every: Duration, expected: Result<usize, u64>| {
            let limits = HttpLimits { body_bytes_per_second_min: 1_000, ..HttpLimits::default() };
            let began = Instant::now();
            let sent = send(limits, &bodies(1 << 30));
            let mut clock = tokio::time::interval(every);
            for _ in 0..40 {
                clock.tick().await;
                if sent.parts.send(vec![b' '; bytes].into()).await.is_err() {
                    break;
                }
            }
            drop(sent.parts);
            let (read, ended) = sent.reading.await.unwrap();
            assert_eq!(read.map(|body| body.len()).map_err(|_| (ended - began).as_secs()), expected);
        };
        // A byte a second: cut after 10 s, not after the 60 s that a whole body may take.
        check(1, Duration::from_secs(1), Err(10)).await;
        check(1_000, Duration::from_secs(1), Ok(40_000)).await;
        // Faster than the least, but not done in time.
        check(100_000, Duration::from_secs(2), Err(60)).await;
    }

    #[tokio::test]
    async fn large_bodies_share_a_bound_until_the_last_clone_is_gone() {
        let (limits, bodies) = (HttpLimits::default(), bodies(300_000));
        let taken = || bodies.bytes.load(Ordering::Relaxed);
        let whole = async |bytes: usize| {
            let sent = send(limits.clone(), &bodies);
            for part in vec![b' '; bytes].chunks(50_000) {
                let _refused = sent.parts.send(Bytes::copy_from_slice(part)).await;
            }
            sent.read().await
        };
        let small = whole(60_000).await.unwrap();
        assert_eq!((small.len(), taken()), (60_000, 0), "small ones are not counted");
        let first = whole(200_000).await.unwrap();
        assert_eq!(taken(), 200_000);
        let refused = whole(150_000).await.unwrap_err();
        assert_eq!((refused.status, refused.code), (StatusCode::SERVICE_UNAVAILABLE, "too_many_bodies"));
        assert_eq!((refused.retry_after_seconds, taken()), (Some(1), 200_000), "it gave back what it had");
        let part = first.slice(10..20);
        drop(first);
        assert_eq!(taken(), 200_000);
        drop(part);
        assert_eq!((taken(), bodies.gauge.get()), (0, 0));
        assert_eq!(whole(150_000).await.unwrap().len(), 150_000);
    }

    #[tokio::test]
    async fn what_is_thrown_away_is_not_held() {
        let (limits, bodies) =
            (HttpLimits { body_bytes_max: 200_000, ..HttpLimits::default() }, bodies(200_000));
        let sent = send(limits, &bodies);
        for _ in 0..5 {
            sent.parts.send(vec![b' '; 50_000].into()).await.unwrap();
        }
        // The sixth is only taken once the fifth was looked at.
        sent.parts.send(Bytes::new()).await.unwrap();
        sent.parts.send(Bytes::new()).await.unwrap();
        assert_eq!(bodies.bytes.load(Ordering::Relaxed), 0);
        assert_eq!(sent.read().await.unwrap_err().status, StatusCode::PAYLOAD_TOO_LARGE);
    }
}
