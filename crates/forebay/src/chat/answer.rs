//! One question to an OpenAI-compatible server, and its answer as it streams.

use std::{io, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{signal::unix::Signal, time::Instant};

use super::conversation::Message;
use crate::{
    client::{Client, ErrorObject},
    figures::{count, seconds},
    sse::Event,
    terminal::without_controls,
};

/// The question, as the body of `/v1/chat/completions`.
#[derive(Debug, Serialize)]
pub(super) struct Question<'a> {
    pub(super) model: &'a str,
    pub(super) messages: &'a [Message],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seed: Option<u64>,
}

impl Question<'_> {
    fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        #[derive(Serialize)]
        struct Streamed<'a> {
            #[serde(flatten)]
            question: &'a Question<'a>,
            stream: bool,
            stream_options: StreamOptions,
        }
        #[derive(Serialize)]
        struct StreamOptions {
            include_usage: bool,
        }
        let stream_options = StreamOptions { include_usage: true };
        serde_json::to_vec(&Streamed { question: self, stream: true, stream_options })
    }
}

/// One event of the stream. Servers add fields as they please.
#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<ErrorObject>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Delta,
    finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct PromptDetails {
    #[serde(default)]
    cached_tokens: Option<u64>,
}

/// Why an answer broke off.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnswerError {
    /// The server said so.
    #[error("{message}{}", code.as_ref().map_or(String::new(), |code| format!(" (code {code})")))]
    Reported {
        /// Its sentence.
        message: String,
        /// Its stable code.
        code: Option<String>,
    },
    /// The server did not say so.
    #[error("the answer ended early: the stream closed without [DONE]")]
    CutOff,
    /// The server said something else.
    #[error("the server sent an event that is no part of an answer: {0}")]
    Unreadable(#[source] serde_json::Error),
}

/// How an answer ended that did not break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// By itself.
    Whole,
    /// By Ctrl-C.
    Interrupted,
}

/// What has come of an answer.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// Its text.
    pub(super) text: String,
    /// What the server calls the request.
    pub(super) request_id: Option<String>,
    usage: Option<Usage>,
    was_cut: bool,
    /// Events with text; the number of tokens if the server does not say.
    pieces: u64,
    /// From the question to the first text and to the last.
    times: Option<(Duration, Duration)>,
}

impl Answer {
    /// Sends the question and takes the answer, handing each piece of text to `show`. Ctrl-C closes the connection,
    /// which cancels the request.
    ///
    /// # Errors
    /// Any [`crate::client::ClientError`], any [`AnswerError`], and what `show` says.
    pub(super) async fn receive(
        &mut self,
        client: &Client,
        question: &Question<'_>,
        request_id: Option<&str>,
        interrupts: &mut Signal,
        show: &mut dyn FnMut(&str) -> io::Result<()>,
    ) -> anyhow::Result<End> {
        let asked = Instant::now();
        let mut events = tokio::select! {
            events = client.post_for_events("/v1/chat/completions", question.to_json()?, request_id) => events?,
            _ = interrupts.recv() => return Ok(End::Interrupted),
        };
        self.request_id.clone_from(&events.request_id);
        loop {
            let event = tokio::select! {
                event = events.next() => event?.ok_or(AnswerError::CutOff)?,
                _ = interrupts.recv() => return Ok(End::Interrupted),
            };
            if event.data == "[DONE]" {
                return Ok(End::Whole);
            }
            let text = self.take(&event, asked.elapsed())?;
            if !text.is_empty() {
                show(&text)?;
            }
        }
    }

    /// Takes one event that came `after` the question; returns its text.
    fn take(&mut self, event: &Event, after: Duration) -> Result<String, AnswerError> {
        let chunk: Chunk = serde_json::from_str(&event.data).map_err(AnswerError::Unreadable)?;
        if let Some(error) = chunk.error {
            return Err(AnswerError::Reported { code: error.code_text(), message: error.message });
        }
        if event.name == "error" {
            return Err(AnswerError::Reported { message: event.data.clone(), code: None });
        }
        self.usage = chunk.usage.or(self.usage);
        let mut text = String::new();
        for choice in chunk.choices {
            self.was_cut |= choice.finish_reason.as_deref() == Some("length");
            text.push_str(&choice.delta.content.unwrap_or_default());
        }
        if !text.is_empty() {
            self.pieces += 1;
            self.times = Some((self.times.map_or(after, |(first, _)| first), after));
            self.text.push_str(&text);
        }
        Ok(text)
    }

    /// One line about the answer: tokens, pace, time to the first token, cached share, id.
    pub(super) fn figures(&self) -> String {
        let tokens = self.usage.map_or(self.pieces, |usage| usage.completion_tokens);
        let mut parts = vec![count(tokens, "token")];
        if self.was_cut {
            parts.push("cut at the limit".to_owned());
        }
        if let Some((first, last)) = self.times {
            let pace = (tokens.saturating_sub(1)) as f64 / (last - first).as_secs_f64();
            if pace.is_finite() && pace > 0.0 {
                parts.push(format!("{pace:.1} tok/s"));
            }
            parts.push(format!("first after {}", seconds(first.as_secs_f64())));
        }
        if let Some(usage) = self.usage {
            let cached = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
            parts.push(match cached {
                Some(cached) => format!("{cached} of {} cached", count(usage.prompt_tokens, "prompt token")),
                None => count(usage.prompt_tokens, "prompt token"),
            });
        }
        parts.extend(self.request_id.as_deref().map(without_controls));
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(events: &[(&str, &str)]) -> (Answer, Option<AnswerError>) {
        let mut answer = Answer { request_id: Some("req-1".to_owned()), ..Answer::default() };
        for (at, (name, data)) in events.iter().enumerate() {
            let event = Event { name: (*name).to_owned(), data: (*data).to_owned() };
            if let Err(error) = answer.take(&event, Duration::from_millis(100 * (at as u64 + 1))) {
                return (answer, Some(error));
            }
        }
        (answer, None)
    }

    const HEL: (&str, &str) =
        ("", r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"}}]}"#);
    const LO: (&str, &str) =
        ("", r#"{"choices":[{"delta":{"content":"lo"},"finish_reason":"length"}],"usage":null}"#);

    #[test]
    fn text_and_figures_are_gathered() {
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":32}}}"#;
        let (answer, error) = answer(&[HEL, LO, ("", usage)]);
        assert!(error.is_none(), "{error:?}");
        assert_eq!(answer.text, "Hello");
        assert_eq!(
            answer.figures(),
            "3 tokens, cut at the limit, 20.0 tok/s, first after 100 ms, 32 of 40 prompt tokens cached, req-1"
        );
    }

    #[test]
    fn a_server_that_counts_nothing_is_counted() {
        let (answer, _) = answer(&[HEL, ("", r#"{"choices":[{"delta":{}}]}"#)]);
        assert_eq!(answer.figures(), "1 token, first after 100 ms, req-1");
    }

    #[test]
    fn an_error_in_the_stream_is_the_servers_own_sentence() {
        let check = |event: (&str, &str), expected: &str| {
            let (answer, error) = answer(&[HEL, event]);
            assert_eq!(answer.text, "Hel");
            let error = error.expect(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        check(
            ("error", r#"{"error":{"message":"the engine was lost","code":"engine_lost"}}"#),
            "the engine was lost (code engine_lost)",
        );
        check(("error", r#"{"detail":"no"}"#), r#"{"detail":"no"}"#);
        check(("", r#"{"error":{"message":"too long"}}"#), "too long");
        check(("", "<html>"), "the server sent an event that is no part of an answer");
    }

    #[test]
    fn a_question_is_what_openai_servers_take() {
        let question =
            Question { model: "m", messages: &[], temperature: Some(0.5), max_tokens: None, seed: Some(7) };
        let json = String::from_utf8(question.to_json().unwrap()).unwrap();
        assert_eq!(
            json,
            r#"{"model":"m","messages":[],"temperature":0.5,"seed":7,"stream":true,"stream_options":{"include_usage":true}}"#
        );
    }
}
