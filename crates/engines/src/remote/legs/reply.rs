//! A leg in the client's own words: its body goes to the engine, the engine's answer to the client, as it is.
//!
//! Nothing is passed on before the first event (or the whole document) was looked at: what an engine complains about with
//! status 200 is then still a refusal, and another engine may be asked.

use bytes::{Bytes, BytesMut};
use forebay_engine_wire::{
    answer::{Fault, Usage, glance, is_done},
    body::{ClientEdits, Kv, SeveralChoices, rewrite},
    sse::{SseDecoder, SseLimits},
};

use super::{Done, LegTask, PIECES_MAX, Setback, piece_at_once, refusal::is_of_client};
use crate::{
    driver::{ClientBody, KvHandle, LegEvent, LegUsage, Reply, StartError},
    remote::client::{EXCERPT_BYTES_MAX, HttpError, Streaming},
};

/// Bytes of one event of an engine's own answer. Tool calls and log probabilities make long ones.
const EVENT_BYTES_MAX: usize = 16 << 20;

impl LegTask {
    /// The client's body with what must be changed.
    pub(super) fn client_request(&self, body: &ClientBody, kv: Kv<'_>) -> Result<Vec<u8>, Setback> {
        let edits = ClientEdits {
            model: &self.engine.speech.model,
            id: self.is_sglang().then_some(&*self.id),
            salt: self.salt(),
            dp_rank: self.rank_field(),
            kv,
        };
        rewrite(&body.json, &edits).map_err(|SeveralChoices| {
            Setback::Refused(StartError::Malformed { reason: "KV is handed over for one choice at a time" })
        })
    }
}

pub(super) async fn run(
    task: &LegTask,
    body: &ClientBody,
    kv: Kv<'_>,
    source: Option<&KvHandle>,
) -> Result<Done, Setback> {
    let request = task.client_request(body, kv)?;
    let answer = task.open(body.route.path(), request).await?;
    let passing = Passing { task, source, usage: None, events: Vec::new(), joined: Joined::default() };
    match answer.status {
        200..=299 if answer.is_events() => passing.stream(answer).await,
        200..=299 => passing.document(answer).await,
        status if is_of_client(status) => {
            let kind = answer.content_type.clone();
            let body = answer.excerpt(EXCERPT_BYTES_MAX).await;
            let mut passing = passing;
            passing.rejection(status, &kind, body);
            Ok(Done::Whole)
        }
        _ => Err(task.refused(answer).await),
    }
}

struct Passing<'a> {
    task: &'a LegTask,
    source: Option<&'a KvHandle>,
    usage: Option<Usage>,
    events: Vec<LegEvent>,
    /// Follows them.
    joined: Joined,
}

/// Pieces that go on together, so that what came at once leaves at once: one as it is, several as a copy.
#[derive(Default)]
struct Joined {
    first: Bytes,
    several: BytesMut,
}

impl Joined {
    fn push(&mut self, data: Bytes) {
        if self.several.is_empty() {
            if self.first.is_empty() {
                self.first = data;
                return;
            }
            self.several.reserve((self.first.len() + data.len()).next_power_of_two());
            self.several.extend_from_slice(&self.first);
            self.first = Bytes::new();
        }
        self.several.extend_from_slice(&data);
    }

    fn take(&mut self) -> Option<Bytes> {
        let first = std::mem::take(&mut self.first);
        let data = if self.several.is_empty() { first } else { self.several.split().freeze() };
        (!data.is_empty()).then_some(data)
    }
}

impl Passing<'_> {
    /// An answer that comes whole.
    async fn document(mut self, answer: Streaming) -> Result<Done, Setback> {
        let (status, kind) = (answer.status, answer.content_type.clone());
        let whole = answer.whole(self.task.engine.limits.answer_bytes_max).await;
        let body = whole.map_err(|error| self.task.broken(&error))?.body;
        if let Ok(text) = std::str::from_utf8(&body) {
            let seen = glance(text);
            self.usage = seen.usage;
            if let Some(fault) = seen.fault {
                return self.complaint(&fault, body.clone());
            }
        }
        self.speak(status, &kind);
        self.events.push(LegEvent::Reply(Reply::Data(body)));
        self.conclude();
        Ok(Done::Whole)
    }

    /// An answer of events: whole ones are passed on as they come.
    async fn stream(mut self, mut answer: Streaming) -> Result<Done, Setback> {
        let limits = SseLimits { line_bytes_max: EVENT_BYTES_MAX, event_bytes_max: EVENT_BYTES_MAX };
        let mut decoder = SseDecoder::new(limits);
        let (status, kind) = (answer.status, answer.content_type.clone());
        // Bytes of events that have not ended, and of comments before the first event.
        let mut kept = BytesMut::new();
        let room = self.task.engine.limits.reply_pieces_max;
        loop {
            self.task.outbox.room(room).await;
            let mut piece = answer.piece().await;
            for left in (0..PIECES_MAX).rev() {
                let bytes = match piece {
                    Some(Ok(bytes)) => bytes,
                    None => return Err(self.cut_off()),
                    Some(Err(error)) => return Err(self.broken(&error)),
                };
                let (ended, seen) = self.look(&mut decoder, &bytes)?;
                if let Some((fault, data)) = seen.fault {
                    self.put();
                    return self.complaint(&fault, data);
                }
                if seen.any && !self.task.spoke() {
                    self.speak(status, &kind);
                }
                self.pass(&mut kept, &bytes, ended)?;
                if seen.done {
                    self.conclude();
                    return Ok(Done::Rest(answer));
                }
                if left == 0 {
                    break; // a piece that was asked for must be taken
                }
                match piece_at_once(&mut answer).await {
                    Some(next) => piece = next,
                    None => break,
                }
            }
            self.put();
        }
    }

    fn join(&mut self) {
        self.events.extend(self.joined.take().map(|data| LegEvent::Reply(Reply::Data(data))));
    }

    fn put(&mut self) {
        self.join();
        self.task.outbox.put_all(&mut self.events);
    }

    /// Looks at the events that end in a piece, and says how many of its bytes have ended with them.
    fn look(&mut self, decoder: &mut SseDecoder, bytes: &Bytes) -> Result<(usize, Seen), Setback> {
        let mut seen = Seen::default();
        let usage = &mut self.usage;
        let pushed = decoder.push(bytes, |event| {
            if seen.done || seen.fault.is_some() {
                return;
            }
            seen.any = true;
            if is_done(event.data) {
                seen.done = true;
                return;
            }
            let found = glance(event.data);
            *usage = found.usage.or(*usage);
            seen.fault = found.fault.map(|fault| (fault, Bytes::copy_from_slice(event.data.as_bytes())));
        });
        let ended = pushed.map_err(|error| Setback::lie(self.task.engine_name(), error))?;
        Ok((ended, seen))
    }

    /// Passes on what has ended of the kept bytes and these, and keeps the rest.
    fn pass(&mut self, kept: &mut BytesMut, bytes: &Bytes, ended: usize) -> Result<(), Setback> {
        if self.task.spoke() && ended > 0 {
            let data = if kept.is_empty() {
                bytes.slice(..ended)
            } else {
                kept.extend_from_slice(&bytes[..ended]);
                kept.split().freeze()
            };
            self.joined.push(data);
            kept.extend_from_slice(&bytes[ended..]);
        } else {
            kept.extend_from_slice(bytes);
        }
        if kept.len() > EVENT_BYTES_MAX {
            return Err(Setback::lie(self.task.engine_name(), "sends an event without end"));
        }
        Ok(())
    }

    /// The head of the answer, and what is known with its first piece.
    fn speak(&mut self, status: u16, kind: &str) {
        let cached_tokens = self.usage.and_then(|usage| usage.cached_tokens).unwrap_or(0);
        self.task.speaks(cached_tokens, self.source, &mut self.events);
        let kind = if kind.is_empty() { "application/json" } else { kind };
        self.events.push(LegEvent::Reply(Reply::Head { status, content_type: kind.into() }));
    }

    fn conclude(&mut self) {
        self.join();
        if let Some(Usage { prompt_tokens, cached_tokens, output_tokens }) = self.usage {
            self.events.push(LegEvent::Usage(LegUsage {
                prompt_tokens: prompt_tokens.unwrap_or(0),
                cached_tokens: cached_tokens.unwrap_or(0),
                output_tokens: output_tokens.unwrap_or(0),
            }));
        }
        self.task.outbox.put_all(&mut self.events);
    }

    /// What the engine says is wrong with the client's request.
    fn rejection(&mut self, status: u16, kind: &str, body: Bytes) {
        let kind = if kind.is_empty() { "application/json" } else { kind };
        self.events.push(LegEvent::Reply(Reply::Head { status, content_type: kind.into() }));
        self.events.push(LegEvent::Reply(Reply::Data(body)));
        self.task.outbox.put_all(&mut self.events);
    }

    /// A complaint with status 200: if it is about the client's request and nothing was passed on, it is the answer.
    fn complaint(mut self, fault: &Fault, data: Bytes) -> Result<Done, Setback> {
        match fault.status {
            Some(status) if !self.task.spoke() && is_of_client(status) => {
                self.rejection(status, "application/json", data);
                Ok(Done::Whole)
            }
            _ => Err(self.task.complaint(fault)),
        }
    }

    fn cut_off(&mut self) -> Setback {
        self.put();
        self.task.engine.trouble();
        Setback::Lost(format!("{} ended the stream before the answer", self.task.engine_name()).into())
    }

    fn broken(&mut self, error: &HttpError) -> Setback {
        self.put();
        self.task.broken(error)
    }
}

/// What the events of one piece are.
#[derive(Default)]
struct Seen {
    any: bool,
    done: bool,
    /// A complaint, and the event that it came in.
    fault: Option<(Fault, Bytes)>,
}
