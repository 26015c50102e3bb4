//! An answer as server-sent events: the path that every streamed token takes.
//!
//! A token costs a look into its own response (one uncontended lock, taken once a batch), its text, one copy of the
//! chunk's fixed parts and one write. Nothing is shared with other requests.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use forebay_types::FinishReason;
use http_body::{Body, Frame};
use tracing::Span;

use super::{
    Answer, Step,
    frames::{Frames, Part, push_error},
};
use crate::{
    http::errors::ApiError,
    orchestrator::api::{ResponseEvent, RouteError},
};

/// Room for a few chunks. Once hyper has written and dropped the chunks that were split off, `BytesMut` takes the same
/// memory again, so a paced stream allocates nothing per token.
const BUFFER_BYTES: usize = 1024;

/// The body of a streamed answer. Dropping it, as hyper does when the client has gone, cancels the request.
#[derive(Debug)]
pub(crate) struct AnswerBody {
    answer: Answer,
    frames: Frames,
    /// What the endpoint calls its prompt, for errors.
    prompt_param: &'static str,
    span: Span,
    batch: Vec<ResponseEvent>,
    buffer: BytesMut,
    ready: VecDeque<Chunk>,
    /// A token's chunk was handed over and hyper had no occasion to write it yet.
    unwritten: bool,
    ended: bool,
}

#[derive(Debug)]
struct Chunk {
    bytes: Bytes,
    carries_token: bool,
}

impl AnswerBody {
    /// `first` are the events that [`Answer::first_batch`] waited for.
    pub(crate) fn new(
        answer: Answer,
        frames: Frames,
        prompt_param: &'static str,
        first: (usize, Vec<ResponseEvent>),
    ) -> Self {
        let (source, batch) = first;
        let mut body = Self {
            answer,
            frames,
            prompt_param,
            span: Span::current(),
            batch,
            buffer: BytesMut::with_capacity(BUFFER_BYTES),
            ready: VecDeque::new(),
            unwritten: false,
            ended: false,
        };
        body.render_batch(source);
        body
    }

    /// Turns the events in `batch` into chunks.
    fn render_batch(&mut self, source: usize) {
        let now = self.answer.observation.now();
        let mut batch = std::mem::take(&mut self.batch);
        for event in batch.drain(..) {
            match self.answer.take(source, event, now) {
                Step::Quiet => {}
                Step::Text(index) => self.part(index, None),
                Step::Finished(index, reason) => self.part(index, Some(reason)),
                Step::Complete => {
                    self.frames.end(&mut self.buffer, self.answer.usage);
                    self.split(false);
                    self.ended = true;
                }
                Step::Failed(error) => self.fail(&error),
            }
            if self.ended {
                break;
            }
        }
        batch.clear();
        self.batch = batch;
    }

    fn part(&mut self, index: usize, finish: Option<FinishReason>) {
        let choice = &mut self.answer.choices[index];
        let part = Part {
            index: index as u32,
            names_role: !std::mem::replace(&mut choice.begun, true),
            text: &choice.text,
            logprobs: choice.logprobs.as_mut(),
            finish,
        };
        self.frames.chunk(&mut self.buffer, part);
        choice.text.clear();
        self.split(finish.is_none());
    }

    fn fail(&mut self, error: &RouteError) {
        let error = ApiError::from_route(error, self.prompt_param);
        self.span.in_scope(|| tracing::warn!(code = error.code, error = %error.message, "stream failed"));
        self.answer.conclude(error.outcome());
        push_error(&mut self.buffer, &error);
        self.split(false);
        self.ended = true;
    }

    fn split(&mut self, carries_token: bool) {
        self.ready.push_back(Chunk { bytes: self.buffer.split().freeze(), carries_token });
    }

    /// The next chunk, unless hyper should write the last one first: hyper joins everything that is ready into one
    /// write, and a client shall have each token as soon as it exists. Whoever wants fewer writes under load changes
    /// this decision, and only this one.
    fn next_ready(&mut self, cx: &mut Context<'_>) -> Option<Poll<Bytes>> {
        let next = self.ready.front()?;
        if next.carries_token && std::mem::take(&mut self.unwritten) {
            cx.waker().wake_by_ref();
            return Some(Poll::Pending);
        }
        let chunk = self.ready.pop_front()?;
        self.unwritten = chunk.carries_token;
        Some(Poll::Ready(chunk.bytes))
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        loop {
            if let Some(next) = this.next_ready(cx) {
                return next.map(|bytes| Some(Ok(Frame::data(bytes))));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            match this.answer.sources.poll(cx, &mut this.batch) {
                Poll::Ready(source) => this.render_batch(source),
                Poll::Pending => {
                    this.unwritten = false;
                    return Poll::Pending;
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.ready.is_empty()
    }
}
