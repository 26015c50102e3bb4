//! What engines say instead of an answer.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::AnswerError;

/// Characters of an engine's sentence that are kept.
const MESSAGE_CHARS_MAX: usize = 500;

/// An engine's complaint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The HTTP status that it stands for, where the engine says one.
    pub status: Option<u16>,
    /// The engine's own sentence, cut if it is long.
    pub message: String,
}

/// The shapes that engines have for errors: OpenAI's, older vLLM's (`{"object":"error","message":..,"code":..}`), FastAPI's
/// (`{"detail":..}`), SGLang's (`{"error":".."}` and `{"error":{..}}`).
#[derive(Deserialize)]
struct Document<'a> {
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    object: Option<&'a RawValue>,
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    #[serde(borrow)]
    code: Option<&'a RawValue>,
    #[serde(borrow)]
    detail: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Inner<'a> {
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    #[serde(borrow)]
    code: Option<&'a RawValue>,
}

impl Fault {
    pub(super) fn new(status: Option<u16>, message: &str) -> Self {
        Self { status, message: cut(message.trim()) }
    }

    /// What an event complains about, if it does. `is_answer`: it has the fields of an answer.
    pub(super) fn in_event(
        error: Option<&RawValue>,
        data: &str,
        is_answer: bool,
    ) -> Result<Option<Self>, AnswerError> {
        match error {
            Some(error) => Ok(Some(Self::of_error(error))),
            None if is_answer => Ok(None),
            None => Self::in_document(data).map(Some).ok_or(AnswerError::Unexpected),
        }
    }

    /// What a document complains about, if it does.
    pub(crate) fn in_document(text: &str) -> Option<Self> {
        let document: Document<'_> = serde_json::from_str(text).ok()?;
        if let Some(error) = document.error {
            return Some(Self::of_error(error));
        }
        if document.object.is_some_and(|object| object.get() == "\"error\"") {
            let message = document.message.map(text_of).unwrap_or_default();
            return Some(Self::new(document.code.and_then(status_of), &message));
        }
        document.detail.map(|detail| Self::new(None, &text_of(detail)))
    }

    fn of_error(error: &RawValue) -> Self {
        match serde_json::from_str::<Inner<'_>>(error.get()) {
            Ok(Inner { message: Some(message), code }) => {
                Self::new(code.and_then(status_of), &text_of(message))
            }
            _ => Self::new(None, &text_of(error)),
        }
    }
}

/// What an engine says in the body of a refused request: its sentence, or the beginning of whatever it sent.
pub fn message_of(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let said = Fault::in_document(&text).map(|fault| fault.message).filter(|message| !message.is_empty());
    said.unwrap_or_else(|| {
        let text = text.trim();
        if text.is_empty() { "no reason given".to_owned() } else { cut(text) }
    })
}

/// Whether an engine means that it has enough to do for now, not that something is wrong with it. 429 says so; 503 is also
/// what proxies and starting or dying servers say, so there the sentence decides: vLLM's are "The engine is currently busy"
/// and "reached its prefill token backlog limit", SGLang's "The request queue is full".
pub fn is_full(status: u16, message: &str) -> bool {
    const WORDS: [&str; 9] =
        ["queue", "busy", "backlog", "capacity", "overload", "too many", "limit", "throttl", "scaling"];
    match status {
        429 => true,
        503 => {
            let message = message.to_ascii_lowercase();
            WORDS.iter().any(|word| message.contains(word))
        }
        _ => false,
    }
}

/// A string's text, or the JSON of anything else.
fn text_of(raw: &RawValue) -> String {
    serde_json::from_str::<String>(raw.get()).unwrap_or_else(|_| raw.get().to_owned())
}

/// 400 and "400".
fn status_of(raw: &RawValue) -> Option<u16> {
    raw.get().trim_matches('"').parse().ok().filter(|status| (100..600).contains(status))
}

fn cut(text: &str) -> String {
    text.chars().take(MESSAGE_CHARS_MAX).collect()
}
