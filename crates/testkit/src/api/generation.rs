//! A request on its way through the engine: its choices, their tokens and text.
//!
//! In: pieces of work ([`Wanted`]). Out: [`Delta`]s until every choice has ended ([`Generation::next`]). Dropping it
//! aborts what still runs, which is what a client's disconnect does.

use std::sync::Arc;

use serde_json::Value;
use tokio::sync::Notify;

use super::Ask;
use super::error::ApiError;
use super::text::{Text, TextOptions};
use crate::double::Life;
use crate::engine::rank::Rank;
use crate::engine::request::{Ending, Outlet, Sampled, Work};
use crate::tokenizer::Token;

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Finish {
    /// The model's end token.
    End,
    StopToken(Token),
    StopString(String),
    Length,
    Abort,
}

impl Finish {
    /// In OpenAI's words.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::End | Self::StopToken(_) | Self::StopString(_) => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }

    /// What the client had named and the answer ended with.
    pub(crate) fn matched(&self) -> Value {
        match self {
            Self::StopToken(token) => Value::from(*token),
            Self::StopString(text) => Value::from(text.as_str()),
            Self::End | Self::Length | Self::Abort => Value::Null,
        }
    }
}

/// What is new of one choice.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    pub(crate) choice: usize,
    pub(crate) text: String,
    pub(crate) tokens: Vec<Sampled>,
    pub(crate) finish: Option<Finish>,
    pub(crate) cached_tokens: usize,
    pub(crate) transfer_params: Option<Value>,
}

/// One choice to run.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) work: Work,
    pub(crate) text: TextOptions,
    /// The rank that the client asked for.
    pub(crate) rank: Option<usize>,
}

struct Choice {
    id: String,
    rank: Arc<Rank>,
    outlet: Arc<Outlet>,
    text: Text,
    done: bool,
}

/// See the module's documentation.
pub(crate) struct Generation {
    pub(crate) ask: Ask,
    /// The id in the answer.
    pub(crate) id: String,
    choices: Vec<Choice>,
    notify: Arc<Notify>,
}

impl Generation {
    /// Submits all choices of `ask`.
    pub(crate) fn start(life: &Life, ask: Ask, id: String, wanted: Vec<Wanted>) -> Self {
        let notify = Arc::new(Notify::new());
        let choice = |wanted: Wanted| {
            let outlet = Outlet::new(notify.clone());
            let id = wanted.work.id.clone();
            let rank = life.submit(wanted.rank, wanted.work, outlet.clone());
            Choice { id, rank, outlet, text: Text::new(wanted.text), done: false }
        };
        let choices = wanted.into_iter().map(choice).collect();
        Self { ask, id, choices, notify }
    }

    /// The rank that runs a choice.
    pub(crate) fn rank_of(&self, choice: usize) -> u32 {
        self.choices[choice].rank.index
    }

    /// What is new; waits until something is. `None` when all choices have ended.
    ///
    /// # Errors
    /// If the request failed inside the engine, or the engine died.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<Delta>>, ApiError> {
        loop {
            let mut deltas = Vec::new();
            for (index, choice) in self.choices.iter_mut().enumerate().filter(|(_, choice)| !choice.done) {
                deltas.extend(choice.look(index)?);
            }
            if !deltas.is_empty() {
                return Ok(Some(deltas));
            }
            if self.choices.iter().all(|choice| choice.done) {
                return Ok(None);
            }
            self.notify.notified().await;
        }
    }
}

impl Choice {
    fn look(&mut self, index: usize) -> Result<Option<Delta>, ApiError> {
        let output = self.outlet.take();
        let mut delta =
            Delta { choice: index, cached_tokens: output.cached_tokens.unwrap_or(0), ..Delta::default() };
        let last = output.tokens.len().saturating_sub(1);
        for (place, sampled) in output.tokens.into_iter().enumerate() {
            delta.tokens.push(sampled);
            let ends = place == last && matches!(output.ending, Some(Ending::Stop(_)));
            if ends && !self.text.includes_stop() {
                continue; // the token that ended the answer has no text
            }
            if let Some(stop) = self.text.push(sampled.token) {
                // The front end finds stop strings and tells the engine to drop the request: nothing is handed over.
                self.done = true;
                self.rank.core.lock().abort(&self.id, true);
                delta.text = self.text.take(true);
                delta.finish = Some(Finish::StopString(stop));
                return Ok(Some(delta));
            }
        }
        delta.finish = match output.ending {
            None => None,
            Some(Ending::Stop(None)) => Some(Finish::End),
            Some(Ending::Stop(Some(token))) => Some(Finish::StopToken(token)),
            Some(Ending::Length) => Some(Finish::Length),
            Some(Ending::Abort) => Some(Finish::Abort),
            Some(Ending::Failed(message)) => {
                self.done = true;
                return Err(ApiError::failed(&message));
            }
            Some(Ending::EngineDead) => {
                self.done = true;
                return Err(ApiError::engine_dead());
            }
        };
        self.done = delta.finish.is_some();
        delta.text = self.text.take(self.done);
        delta.transfer_params = output.transfer_params;
        Ok((!delta.tokens.is_empty() || self.done).then_some(delta))
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for choice in self.choices.iter().filter(|choice| !choice.done) {
            choice.rank.core.lock().abort(&choice.id, false);
            choice.rank.wake.notify_one();
        }
    }
}
