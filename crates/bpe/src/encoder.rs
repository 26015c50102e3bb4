//! Text to tokens, step by step: added tokens, normalisation, words, each word's tokens.

use std::{fmt, sync::Mutex};

use serde_json::Value;

use crate::{
    Token, Unsupported,
    added::Finder,
    cuts::Cuts,
    definition::Definition,
    model::Scratch,
    split::{Rule, Splitter},
};

/// Which added tokens an encoding recognises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// All: the text of one is that token wherever it stands.
    Recognised,
    /// None: text is only text.
    Ignored,
}

/// A tokenizer's rules. Immutable; encode on as many threads as you like.
pub struct Encoder {
    definition: Definition,
    /// Memory of encodings that are not running, so that words that one saw are known to the next. The one that ended
    /// last is taken first.
    idle: Mutex<Vec<State>>,
}

/// More encodings than this may run at once; the memory of the others is given back when they end.
const IDLE_MAX: usize = 16;

/// What an encoding changes.
struct State {
    scratch: Scratch,
    normalized: String,
}

impl Encoder {
    /// Of a parsed `tokenizer.json`. Post-processing, truncation and padding are not its concern.
    ///
    /// # Errors
    /// [`Unsupported`] if some part of the definition is not known to be reproduced exactly.
    pub fn from_json(json: &Value) -> Result<Self, Unsupported> {
        Ok(Self { definition: Definition::read(json)?, idle: Mutex::new(Vec::new()) })
    }

    /// Appends the tokens of `text` to `out`. A byte that a byte-level vocabulary has no token for is left out.
    pub fn encode(&self, added: Added, text: &str, out: &mut Vec<Token>) {
        let idle = self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        let mut state = idle.unwrap_or_else(|| State { scratch: Scratch::new(), normalized: String::new() });
        // English has four to five bytes a token.
        out.reserve(text.len() / 4 + 8);
        match (&self.definition.added, added) {
            (Some(finder), Added::Recognised) => {
                between(finder, text, out, |text, start, out| {
                    self.piece(added, &text[start..], &mut state, out)
                });
            }
            _ => self.piece(added, text, &mut state, out),
        }
        let mut idle = self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(state);
        }
    }

    /// The places where `text` may be cut: its tokens with [`Added::Recognised`] are those of the parts.
    pub fn cuts<'a>(&'a self, text: &'a str) -> Cuts<'a> {
        Cuts::new(&self.definition, text)
    }

    /// Appends the tokens of a text without added tokens of the first kind.
    fn piece(&self, added: Added, text: &str, state: &mut State, out: &mut Vec<Token>) {
        let State { scratch, normalized } = state;
        let text = if self.definition.normalizer.apply(text, normalized) { normalized } else { text };
        match (&self.definition.added_normalized, added) {
            (Some(finder), Added::Recognised) => {
                between(finder, text, out, |text, start, out| self.words(text, start, scratch, out));
            }
            _ => self.words(text, 0, scratch, out),
        }
    }

    /// Appends the tokens of the words of `text[start..]`, which has no added tokens.
    fn words(&self, text: &str, start: usize, scratch: &mut Scratch, out: &mut Vec<Token>) {
        let text = text.as_bytes();
        match &self.definition.splitter {
            Splitter::Gpt2(rule) => self.words_by(rule, text, start, scratch, out),
            Splitter::Llama(rule) => self.words_by(rule, text, start, scratch, out),
            Splitter::O200k(rule) => self.words_by(rule, text, start, scratch, out),
            Splitter::DeepSeek(rule) => self.words_by(rule, text, start, scratch, out),
            Splitter::Whole => self.definition.model.text(text, start, scratch, out),
        }
    }

    /// Its own copy for each rule, so that rule and look-up become one loop.
    #[inline(never)]
    fn words_by(
        &self,
        rule: &impl Rule,
        text: &[u8],
        start: usize,
        scratch: &mut Scratch,
        out: &mut Vec<Token>,
    ) {
        self.definition.model.words(|text, at| rule.next(text, at), text, start, scratch, out);
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").field("splitter", &self.definition.splitter).finish_non_exhaustive()
    }
}

/// Appends the added tokens of `text`, and calls `other` with what lies between: a text that ends there, and where it
/// begins.
#[inline]
fn between(
    finder: &Finder,
    text: &str,
    out: &mut Vec<Token>,
    mut other: impl FnMut(&str, usize, &mut Vec<Token>),
) {
    let mut from = 0;
    while let Some(found) = finder.next(text, from) {
        if from < found.start {
            other(&text[..found.start], from, out);
        }
        out.push(found.token);
        from = found.end;
    }
    if from < text.len() {
        other(text, from, out);
    }
}
