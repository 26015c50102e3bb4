//! One choice: its tokens become text, up to a stop string.

use std::time::Duration;

use forebay_text::{Detokenizer, StopMatcher, Tokenizer};
use forebay_types::SampledToken;

use super::logprobs::Logprobs;

/// What is known of one choice while it is generated.
#[derive(Debug)]
pub(crate) struct Choice {
    detokenizer: Detokenizer,
    /// Absent when there is nothing to stop at, which is the usual case.
    matcher: Option<StopMatcher>,
    /// Text on its way from the detokenizer to the matcher; kept for its capacity.
    piece: String,
    /// Text that may be written. A stream takes it away after each chunk, a whole answer lets it grow.
    pub(crate) text: String,
    pub(crate) logprobs: Option<Logprobs>,
    /// A part of it was written.
    pub(crate) begun: bool,
    pub(crate) finished: bool,
    pub(crate) last_token_at: Option<Duration>,
}

impl Choice {
    pub(crate) fn new(
        tokenizer: Tokenizer,
        matcher: Option<StopMatcher>,
        logprobs: Option<Logprobs>,
    ) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer),
            matcher,
            piece: String::new(),
            text: String::new(),
            logprobs,
            begun: false,
            finished: false,
            last_token_at: None,
        }
    }

    /// Adds a token that has text. `true` if a stop string is now complete: the text ends before it.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: &SampledToken) -> bool {
        if let Some(logprobs) = &mut self.logprobs {
            logprobs.push(tokenizer, token);
        }
        let Some(matcher) = &mut self.matcher else {
            self.detokenizer.push(token.token, &mut self.text);
            return false;
        };
        self.piece.clear();
        self.detokenizer.push(token.token, &mut self.piece);
        matcher.push(&self.piece, &mut self.text).is_some()
    }

    /// Releases what was held back. `true` if that completed a stop string.
    pub(crate) fn finish(&mut self) -> bool {
        self.finished = true;
        let Some(matcher) = &mut self.matcher else {
            self.detokenizer.finish(&mut self.text);
            return false;
        };
        self.piece.clear();
        self.detokenizer.finish(&mut self.piece);
        let stopped = matcher.push(&self.piece, &mut self.text).is_some();
        matcher.finish(&mut self.text);
        stopped
    }
}
