//! The two deliveries: one document, or server-sent events.

use std::collections::VecDeque;

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::stream;
use http::{HeaderValue, StatusCode, header};
use serde_json::Value;

use super::{
    Answer, News, Step,
    json::{ChunkState, Collected, Form, Usage, Words},
};
use crate::{
    errors::{ApiError, json_response},
    hand_over::HeldParams,
    request::Delivery,
};

/// Ends every stream, failed ones included, as with vLLM.
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Answers. `offer` makes the parameters of a prefill leg's held KV public; `keep` is dropped with the answer.
pub(crate) async fn deliver<K: Send + 'static>(
    mut answer: Answer,
    words: Words,
    delivery: Delivery,
    prompt_tokens: u64,
    offer: impl FnOnce(&Answer) -> Option<HeldParams>,
    keep: K,
) -> Response {
    // Nothing is sent before the first tokens, so that a failure until then has a status of its own.
    let first = match answer.next().await {
        Step::Failed(error) => return error.into_response(),
        Step::News(news) => news,
        Step::Complete => Vec::new(),
    };
    match delivery {
        Delivery::Whole => match collect(&mut answer, first).await {
            Ok(choices) => {
                let held = offer(&answer);
                let usage = usage(&answer, prompt_tokens);
                let document = words.whole(answer.tokenizer(), &choices, usage, held.as_ref());
                json_response(StatusCode::OK, document.to_string())
            }
            Err(error) => error.into_response(),
        },
        Delivery::Stream { include_usage } => {
            let mut stream = Stream {
                states: vec![ChunkState::default(); answer.choices()],
                answer,
                words,
                usage_of: include_usage.then_some(prompt_tokens),
                ready: VecDeque::new(),
                ended: false,
                _keep: keep,
            };
            stream.open();
            stream.write(&first);
            let mut response = Response::new(Body::from_stream(stream::unfold(stream, Stream::next)));
            let headers = response.headers_mut();
            headers
                .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            response
        }
    }
}

fn usage(answer: &Answer, prompt_tokens: u64) -> Usage {
    Usage { prompt_tokens, output_tokens: answer.output_tokens(), cached_tokens: answer.cached_tokens }
}

async fn collect(answer: &mut Answer, first: Vec<(usize, News)>) -> Result<Vec<Collected>, ApiError> {
    let mut choices: Vec<Collected> = (0..answer.choices()).map(|_| Collected::default()).collect();
    let mut news = first;
    loop {
        for (index, News { text, tokens, finish }) in news {
            let choice = &mut choices[index];
            choice.text.push_str(&text);
            choice.tokens.extend(tokens);
            choice.finish = finish.or(choice.finish.take());
        }
        news = match answer.next().await {
            Step::News(news) => news,
            Step::Complete => return Ok(choices),
            Step::Failed(error) => return Err(error),
        };
    }
}

/// A stream's body: polled only as fast as the client reads.
struct Stream<K> {
    answer: Answer,
    words: Words,
    states: Vec<ChunkState>,
    /// The prompt's length, if counts were asked for.
    usage_of: Option<u64>,
    /// Rendered, not yet given away.
    ready: VecDeque<Bytes>,
    ended: bool,
    _keep: K,
}

impl<K> Stream<K> {
    async fn next(mut self) -> Option<(Result<Bytes, std::convert::Infallible>, Self)> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Some((Ok(bytes), self));
            }
            if self.ended {
                return None;
            }
            match self.answer.next().await {
                Step::News(news) => self.write(&news),
                Step::Complete => {
                    if let Some(prompt_tokens) = self.usage_of {
                        let usage = self.words.usage(usage(&self.answer, prompt_tokens));
                        self.push(&usage);
                    }
                    self.end();
                }
                Step::Failed(error) => {
                    self.ready.push_back(Bytes::from(format!("data: {}\n\n", error.to_json())));
                    self.end();
                }
            }
        }
    }

    fn open(&mut self) {
        if self.words.form == Form::Chat {
            for index in 0..self.states.len() {
                let opening = self.words.opening(index);
                self.push(&opening);
            }
        }
    }

    fn write(&mut self, news: &[(usize, News)]) {
        for (index, news) in news {
            let chunk = self.words.chunk(self.answer.tokenizer(), *index, news, &mut self.states[*index]);
            self.push(&chunk);
        }
    }

    fn push(&mut self, event: &Value) {
        self.ready.push_back(Bytes::from(format!("data: {event}\n\n")));
    }

    fn end(&mut self) {
        self.ended = true;
        self.ready.push_back(Bytes::from_static(DONE));
    }
}
