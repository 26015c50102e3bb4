//! From legs to an answer.
//!
//! Start at [`Answer::next`]: what is new of every choice, until all are complete. How that is written is in [`json`]; the
//! two deliveries are in [`deliver`].

mod choice;
mod deliver;
mod json;
mod logprobs;

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

use forebay_engines::{KvHandle, LegEvent};
use forebay_text::Tokenizer;
use forebay_types::TokenId;
use tokio::time::Instant;

pub(crate) use self::{
    choice::{Choice, Finish, News, Stopped},
    deliver::deliver,
    json::{Form, Words},
};
use crate::{
    errors::ApiError, hand_over::Expected, legs::LegReader, options::LoadFailurePolicy, request::StopStrings,
};

/// One request's answer as far as it has come. Dropped early, it ends what is still generated for it.
pub(crate) struct Answer {
    /// One a prompt.
    sources: Vec<Source>,
    /// Choices of the first prompt, then of the second: the order of OpenAI's indices.
    choices: Vec<Choice>,
    choices_each: usize,
    reading: Reading,
    /// KV that a prefill leg holds.
    pub(crate) held: Option<KvHandle>,
    /// Reported as found in a cache.
    pub(crate) cached_tokens: u32,
    /// Released with the answer: by then the engine has fetched, or never will.
    _expected: Option<Expected>,
}

struct Source {
    reader: LegReader,
    over: bool,
}

/// How an answer is read.
pub(crate) struct Reading {
    pub(crate) tokenizer: Tokenizer,
    /// Those that end a choice.
    pub(crate) stop_tokens: Arc<[TokenId]>,
    /// Of those, the client's own.
    pub(crate) client_stop_tokens: Vec<TokenId>,
    pub(crate) stop: Option<StopStrings>,
    /// Whether a prefill leg's KV is waited for.
    pub(crate) holds: bool,
    /// What a failed hand-over means.
    pub(crate) load_failure: LoadFailurePolicy,
    /// Of a decode leg: cached tokens, as its prefill leg reported them.
    pub(crate) remote_cached_tokens: Option<u32>,
    /// When to give up.
    pub(crate) deadline: Instant,
}

/// One step of an answer.
pub(crate) enum Step {
    /// What is new, by index.
    News(Vec<(usize, News)>),
    /// Everything is complete.
    Complete,
    Failed(ApiError),
}

impl Answer {
    pub(crate) fn new(
        readers: Vec<LegReader>,
        choices_each: u32,
        reading: Reading,
        expected: Option<Expected>,
    ) -> Self {
        let choices = (0..readers.len() * choices_each as usize)
            .map(|_| Choice::new(reading.tokenizer.clone(), reading.stop.clone()))
            .collect();
        Self {
            sources: readers.into_iter().map(|reader| Source { reader, over: false }).collect(),
            choices,
            choices_each: choices_each as usize,
            reading,
            held: None,
            cached_tokens: 0,
            _expected: expected,
        }
    }

    /// Tokens delivered, over all choices.
    pub(crate) fn output_tokens(&self) -> u64 {
        self.choices.iter().map(|choice| u64::from(choice.tokens)).sum()
    }

    pub(crate) fn choices(&self) -> usize {
        self.choices.len()
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.reading.tokenizer
    }

    /// Waits for what is new: at least one token or the end of a choice.
    pub(crate) async fn next(&mut self) -> Step {
        let deadline = self.reading.deadline;
        match tokio::time::timeout_at(deadline, self.step()).await {
            Ok(step) => step,
            Err(_late) => Step::Failed(ApiError::timed_out()),
        }
    }

    async fn step(&mut self) -> Step {
        loop {
            if self.is_complete() {
                return Step::Complete;
            }
            let mut batch = Vec::new();
            let Some(source) = poll_fn(|cx| self.poll(cx, &mut batch)).await else {
                return Step::Failed(ApiError::internal(
                    "the engine ended a request before its answer was complete",
                ));
            };
            if let Err(error) = batch.into_iter().try_for_each(|event| self.take(source, event)) {
                return Step::Failed(error);
            }
            let news: Vec<(usize, News)> = self
                .choices
                .iter_mut()
                .map(|choice| std::mem::take(&mut choice.news))
                .enumerate()
                .filter(|(_, news)| !news.tokens.is_empty() || news.finish.is_some())
                .collect();
            if !news.is_empty() {
                return Step::News(news);
            }
        }
    }

    fn is_complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished) && (self.held.is_some() || !self.reading.holds)
    }

    /// The next batch of events and which prompt's they are; `None` if all legs are over.
    fn poll(&mut self, cx: &mut Context<'_>, batch: &mut Vec<LegEvent>) -> Poll<Option<usize>> {
        for (index, source) in self.sources.iter_mut().enumerate().filter(|(_, source)| !source.over) {
            match source.reader.poll_batch(cx, batch) {
                Poll::Ready(true) => return Poll::Ready(Some(index)),
                Poll::Ready(false) => source.over = true,
                Poll::Pending => {}
            }
        }
        if self.sources.iter().all(|source| source.over) { Poll::Ready(None) } else { Poll::Pending }
    }

    fn take(&mut self, source: usize, event: LegEvent) -> Result<(), ApiError> {
        match event {
            LegEvent::Started { cached_tokens } => {
                self.cached_tokens += cached_tokens;
            }
            LegEvent::Token(token) => {
                let number = token.choice;
                let choice = &mut self.choices[source * self.choices_each + number as usize];
                if choice.push(token, &self.reading.stop_tokens) {
                    self.sources[source].reader.stop_choice(number);
                }
            }
            LegEvent::Finished { choice, reason } => {
                let choice = &mut self.choices[source * self.choices_each + choice as usize];
                choice.finish(reason, &self.reading.client_stop_tokens);
            }
            LegEvent::Prefilled(kv) => self.held = Some(kv),
            LegEvent::KvArrived(_) => {
                self.cached_tokens = self.reading.remote_cached_tokens.unwrap_or(self.cached_tokens);
            }
            LegEvent::KvFailed { outcome } => {
                if self.reading.load_failure == LoadFailurePolicy::Fail {
                    tracing::warn!(%outcome, "a request failed with its hand-over, as configured");
                    return Err(ApiError::kv_load_failed());
                }
            }
            LegEvent::Refused(error) => return Err(ApiError::of_start(&error)),
            LegEvent::Lost { reason } => return Err(ApiError::engine_dead(&reason)),
            LegEvent::Ended => {}
            LegEvent::Reply(_) | LegEvent::Usage(_) => {
                return Err(ApiError::internal(
                    "the engine answered a form of request that it was not given",
                ));
            }
        }
        Ok(())
    }
}
