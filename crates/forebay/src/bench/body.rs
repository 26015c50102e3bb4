//! What is sent and what is read: chat completions, without a tree of JSON for each event.

use bytes::Bytes;
use forebay_loadgen::{Failure, Recorder, Usage};
use serde::{Deserialize, Serialize};

/// Characters of a server's message that are kept.
const MESSAGE_CHARS_MAX: usize = 300;

/// One message of a conversation.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Message {
    pub(super) role: &'static str,
    pub(super) content: String,
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: &'a [Message],
    max_tokens: u32,
    ignore_eos: bool,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// The body of a request.
pub(super) fn body(model: &str, messages: &[Message], max_tokens: u32, stream: bool) -> Bytes {
    let stream_options = stream.then_some(StreamOptions { include_usage: true });
    let body = Body { model, messages, max_tokens, ignore_eos: true, stream, stream_options };
    serde_json::to_vec(&body).expect("texts and numbers are JSON").into()
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<WireUsage>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(alias = "delta")]
    message: Option<Text>,
}

#[derive(Deserialize)]
struct Text {
    content: Option<String>,
}

#[derive(Deserialize)]
struct WireUsage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

impl From<WireUsage> for Usage {
    fn from(usage: WireUsage) -> Self {
        let WireUsage { prompt_tokens, completion_tokens, prompt_tokens_details } = usage;
        let cached_tokens = prompt_tokens_details.and_then(|details| details.cached_tokens);
        Self { prompt_tokens, cached_tokens, output_tokens: completion_tokens }
    }
}

/// What was read of one answer.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// Keep the text: the next turn of the conversation sends it back.
    pub(super) keeps_text: bool,
    pub(super) text: String,
    pub(super) usage: Option<Usage>,
    /// The stream said that it is whole.
    pub(super) done: bool,
    /// The stream said what went wrong.
    pub(super) failure: Option<Failure>,
}

impl Reading {
    /// Takes an event that came at `at`.
    pub(super) fn event(&mut self, name: &str, data: &str, at: f64, recorder: &mut Recorder) {
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        if name == "error" || data.starts_with("{\"error\"") {
            self.failure.get_or_insert_with(|| failure("error in the stream", data));
            return;
        }
        let has_content = has_content(data);
        if has_content {
            recorder.content(at);
        }
        if data.contains("\"usage\":{") || data.contains("\"usage\": {") || has_content && self.keeps_text {
            self.take(data.as_bytes());
        }
    }

    /// Takes an answer that came whole, or an event; whether it can be read.
    pub(super) fn take(&mut self, json: &[u8]) -> bool {
        let Ok(answer) = serde_json::from_slice::<Answer>(json) else { return false };
        if let Some(usage) = answer.usage {
            self.usage = Some(usage.into());
        }
        let text = answer.choices.into_iter().next().and_then(|choice| choice.message?.content);
        if let Some(text) = text.filter(|_| self.keeps_text) {
            self.text.push_str(&text);
        }
        true
    }
}

/// Whether an event brings a piece of the answer. Within a JSON string these keys would have escaped quotes, so that an answer
/// that speaks of them is not mistaken for them.
fn has_content(data: &str) -> bool {
    ["\"content\":", "\"reasoning_content\":", "\"reasoning\":", "\"arguments\":"].iter().any(|key| {
        data.find(key).is_some_and(|at| {
            let value = data[at + key.len()..].trim_start();
            value.starts_with('"') && !value.starts_with("\"\"")
        })
    })
}

/// A failure in the server's words.
pub(super) fn failure(kind: impl Into<String>, message: &str) -> Failure {
    let message = crate::terminal::without_controls(message).replace(['\n', '\t'], " ");
    Failure { kind: kind.into(), message: message.trim().chars().take(MESSAGE_CHARS_MAX).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_with_content_are_told_from_others() {
        let check = |data: &str, expected: bool| assert_eq!(has_content(data), expected, "{data}");
        check(r#"{"choices":[{"delta":{"content":"a"}}]}"#, true);
        check(r#"{"choices": [{"delta": {"content": "a"}}]}"#, true);
        check(r#"{"choices":[{"delta":{"content":null,"reasoning_content":"a"}}]}"#, true);
        check(r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, false);
        check(r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#, false);
        check(r#"{"choices":[],"note":"\"content\":\"x\""}"#, false);
    }

    #[test]
    fn an_answer_is_read_from_its_events() {
        let mut reading = Reading { keeps_text: true, ..Reading::default() };
        let mut recorder = Recorder::new(0.0, 0.0);
        for data in [
            r#"{"choices":[{"delta":{"content":"a\"b"}}],"usage":null}"#,
            r#"{"choices":[{"delta":{"content":"c"}}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":8}}}"#,
            "[DONE]",
        ] {
            reading.event("", data, 1.0, &mut recorder);
        }
        assert_eq!((reading.text.as_str(), reading.done, reading.failure.as_ref()), ("a\"bc", true, None));
        let usage = Usage { prompt_tokens: 9, cached_tokens: Some(8), output_tokens: 4 };
        assert_eq!(reading.usage, Some(usage));
        assert_eq!(recorder.end(1.0, None, None).output_tokens, 2);
        reading.event("", r#"{"error":{"message":"gone"}}"#, 1.0, &mut Recorder::new(0.0, 0.0));
        assert!(reading.failure.is_some_and(|failure| failure.message.contains("gone")));
    }
}
