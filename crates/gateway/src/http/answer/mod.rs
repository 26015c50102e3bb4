//! From events to bytes: the text of every choice, and the two ways to deliver it.
//!
//! In: the responses to one request. Out: a document ([`whole`]) or a stream ([`stream`]). Start at [`Answer::take`],
//! which both deliveries call for every event.
//!
//! Invariants: text is whole characters; nothing of a matched stop string is delivered; a choice finishes once; an
//! answer that is dropped cancels what is still generated for it.

mod choice;
mod frames;
mod json;
mod logprobs;
mod sources;
mod stream;
mod whole;

use std::{future::poll_fn, sync::Arc, time::Duration};

use forebay_text::{StopMatcher, Tokenizer};
use forebay_types::{FinishReason, SampledToken, TokenId};

pub(crate) use frames::{Frames, Identity, push_error};
pub(crate) use stream::AnswerBody;
pub(crate) use whole::collect;

use self::{choice::Choice, logprobs::Logprobs, sources::Sources};
use super::{context::Context, live::LiveId, observation::Observation};
use crate::{
    metrics::Outcome,
    orchestrator::api::{Response, ResponseEvent, RouteError, Usage},
};

/// What an answer needs to know of its request.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) tokenizer: Tokenizer,
    /// Their tokens have no text.
    pub(crate) stop_tokens: Arc<[TokenId]>,
    /// An unused one, cloned for every choice.
    pub(crate) matcher: Option<StopMatcher>,
    pub(crate) logprobs: bool,
    /// `n`.
    pub(crate) choices: u32,
}

/// One request's answer as far as it has come.
#[derive(Debug)]
pub(crate) struct Answer {
    sources: Sources,
    tokenizer: Tokenizer,
    stop_tokens: Arc<[TokenId]>,
    /// Choices of the first prompt, then of the second, and so on: the order of OpenAI's indices.
    choices: Vec<Choice>,
    choices_each: u32,
    sources_done: usize,
    usage: Usage,
    observation: Observation,
    /// In use for as long as the answer lives.
    _ids: Ids,
}

/// The ids of a request and of its parts, where it has several prompts.
#[derive(Debug)]
#[expect(dead_code, reason = "held so that the ids stay in use, not read")]
pub(crate) struct Ids {
    pub(crate) whole: Context,
    pub(crate) parts: Vec<LiveId>,
}

/// What one event means.
#[derive(Debug)]
enum Step {
    /// Nothing to write yet.
    Quiet,
    /// The choice at this index has new text.
    Text(usize),
    /// The choice at this index is complete; its last text is ready.
    Finished(usize, FinishReason),
    /// Everything is complete.
    Complete,
    /// Nothing more follows.
    Failed(RouteError),
}

impl Answer {
    pub(crate) fn new(
        responses: impl IntoIterator<Item = Response>,
        reading: Reading,
        frames: &Frames,
        observation: Observation,
        ids: Ids,
    ) -> Self {
        let Reading { tokenizer, stop_tokens, matcher, logprobs, choices } = reading;
        let sources = Sources::new(responses);
        let choice = || {
            let logprobs = logprobs.then(|| Logprobs::new(frames.form()));
            Choice::new(tokenizer.clone(), matcher.clone(), logprobs)
        };
        let all = (0..sources.len() * choices as usize).map(|_| choice()).collect();
        Self {
            sources,
            stop_tokens,
            choices: all,
            choices_each: choices,
            sources_done: 0,
            usage: Usage::default(),
            observation,
            tokenizer,
            _ids: ids,
        }
    }

    /// Waits for the first events. No byte of the answer has been sent until then, so a failure among them can still
    /// be told by an HTTP status.
    ///
    /// # Errors
    /// The failure.
    pub(crate) async fn first_batch(&mut self) -> Result<(usize, Vec<ResponseEvent>), RouteError> {
        let mut batch = Vec::new();
        let source = self.next_batch(&mut batch).await;
        match batch.iter().find_map(|event| match event {
            ResponseEvent::Failed(error) => Some(error.clone()),
            _ => None,
        }) {
            Some(error) => Err(error),
            None => Ok((source, batch)),
        }
    }

    async fn next_batch(&mut self, batch: &mut Vec<ResponseEvent>) -> usize {
        poll_fn(|cx| self.sources.poll(cx, batch)).await
    }

    /// Takes one event of the response to prompt `source`, which arrived at `now`.
    fn take(&mut self, source: usize, event: ResponseEvent, now: Duration) -> Step {
        match event {
            ResponseEvent::Token(token) => match self.index(source, token.choice) {
                Ok(index) => self.token(source, index, &token, now),
                Err(error) => Step::Failed(error),
            },
            ResponseEvent::Finished { choice, reason } => match self.index(source, choice) {
                Ok(index) => self.finish(index, reason),
                Err(error) => Step::Failed(error),
            },
            // Only what is asked for as a body is answered so.
            ResponseEvent::Reply(_) => Step::Quiet,
            ResponseEvent::Done(usage) => self.source_done(source, usage),
            ResponseEvent::Failed(error) => Step::Failed(error),
        }
    }

    fn index(&self, source: usize, choice: u32) -> Result<usize, RouteError> {
        if choice < self.choices_each {
            return Ok(source * self.choices_each as usize + choice as usize);
        }
        let detail = format!("an engine answered for choice {choice} of {}", self.choices_each);
        Err(RouteError::Internal { detail })
    }

    fn token(&mut self, source: usize, index: usize, token: &SampledToken, now: Duration) -> Step {
        let choice = &mut self.choices[index];
        if choice.finished {
            // Generated between the match of a stop string and the engine's hearing of it.
            return Step::Quiet;
        }
        self.observation.token(now, choice.last_token_at.replace(now));
        if self.stop_tokens.contains(&token.token) {
            return Step::Quiet;
        }
        if choice.push(&self.tokenizer, token) {
            choice.finished = true;
            self.sources.stop_choice(source, token.choice);
            return Step::Finished(index, FinishReason::Stop);
        }
        if choice.text.is_empty() { Step::Quiet } else { Step::Text(index) }
    }

    fn finish(&mut self, index: usize, reason: FinishReason) -> Step {
        let choice = &mut self.choices[index];
        if choice.finished {
            return Step::Quiet;
        }
        let reason = if choice.finish() { FinishReason::Stop } else { reason };
        Step::Finished(index, reason)
    }

    fn source_done(&mut self, source: usize, usage: Usage) -> Step {
        let each = self.choices_each as usize;
        if let Some(open) = (0..each).find(|choice| !self.choices[source * each + choice].finished) {
            let detail = format!("the response ended before its choice {open} did");
            return Step::Failed(RouteError::Internal { detail });
        }
        // Output is counted here, token by token: what engines generated past a stop string was not delivered.
        self.usage.prompt_tokens += usage.prompt_tokens;
        self.usage.cached_tokens += usage.cached_tokens;
        self.sources_done += 1;
        if self.sources_done < self.sources.len() {
            return Step::Quiet;
        }
        self.usage.output_tokens = self.observation.output_tokens();
        self.observation.succeed(self.usage);
        Step::Complete
    }

    /// Ends the observation of an answer that failed.
    pub(crate) fn conclude(&mut self, outcome: Outcome) {
        self.observation.conclude(outcome);
    }
}
