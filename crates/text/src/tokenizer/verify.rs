//! Whether the fast encoder may be used: only if it gives the ids of the reference on the whole corpus.

use std::{fmt, thread};

use serde_json::Value;

use super::{Encoder, Fast, LoadError, Mode, Reference, corpus, vocabulary::Vocabulary};

/// What completion adds does not look at the text, so some samples are enough; the reference is slow.
const COMPLETION_EVERY: usize = 8;

/// Loads both encoders from the same definition and keeps one. The other's memory is free again on return.
pub(super) fn choose(value: &Value, json: &str, vocabulary: &Vocabulary) -> Result<Encoder, LoadError> {
    let (fast, reference) = thread::scope(|scope| {
        let reference = scope.spawn(|| Reference::load(json));
        let fast = Fast::load(value);
        (fast, reference.join())
    });
    let reference = reference.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let fast = match fast {
        Ok(fast) => fast,
        Err(error) => {
            tracing::warn!(%error, "no fast encoder for this tokenizer; tokenizers encodes, which is slower");
            return Ok(Encoder::Reference(Box::new(reference)));
        }
    };
    let samples = corpus::samples(vocabulary);
    match first_difference(&fast, &reference, &samples) {
        None => Ok(Encoder::Fast(Box::new(fast))),
        Some(difference) => {
            tracing::warn!(%difference, "the fast encoder is not exact here; tokenizers encodes, which is slower");
            Ok(Encoder::Reference(Box::new(reference)))
        }
    }
}

/// A text on which the encoders disagree.
#[derive(Debug)]
pub(super) struct Difference {
    text: String,
    mode: Mode,
    fast: Vec<u32>,
    reference: Result<Vec<u32>, String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, mode, fast, reference } = self;
        write!(f, "{text:?} ({mode:?}) is {fast:?} instead of {reference:?}")
    }
}

pub(super) fn first_difference(fast: &Fast, reference: &Reference, samples: &[String]) -> Option<Difference> {
    for (index, text) in samples.iter().enumerate() {
        let modes: &[Mode] = match index % COMPLETION_EVERY {
            0 => &[Mode::Chat, Mode::Plain, Mode::Completion],
            _ => &[Mode::Chat, Mode::Plain],
        };
        for &mode in modes {
            let (mut ids, mut exact) = (Vec::new(), Vec::new());
            fast.encode(mode, text, &mut ids);
            let exact = match reference.encode(mode, text, &mut exact) {
                Ok(()) => Ok(exact),
                Err(error) => Err(error.cause.to_string()),
            };
            if exact.as_ref() != Ok(&ids) {
                return Some(Difference { text: text.clone(), mode, fast: ids, reference: exact });
            }
        }
    }
    None
}
