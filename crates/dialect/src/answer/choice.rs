//! One choice: its tokens become text, up to a stop token or a stop string.

use forebay_text::{Detokenizer, Tokenizer};
use forebay_types::{FinishReason, SampledToken, TokenId};

use crate::request::StopStrings;

/// Why a choice ended, in vLLM's two fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finish {
    pub(crate) reason: FinishReason,
    /// `stop_reason`: the stop string or the token of `stop_token_ids` that ended it.
    pub(crate) stop: Option<Stopped>,
}

/// See [`Finish::stop`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stopped {
    Text(String),
    Token(TokenId),
}

/// What is new of one choice.
#[derive(Debug, Default)]
pub(crate) struct News {
    pub(crate) text: String,
    pub(crate) tokens: Vec<SampledToken>,
    pub(crate) finish: Option<Finish>,
}

/// What is known of one choice while it is generated.
pub(crate) struct Choice {
    detokenizer: Detokenizer,
    stop: Option<StopStrings>,
    /// Text on its way from the detokenizer to the matcher; kept for its capacity.
    piece: String,
    pub(crate) news: News,
    last: Option<TokenId>,
    pub(crate) finished: bool,
    /// Tokens that were delivered.
    pub(crate) tokens: u32,
}

impl Choice {
    pub(crate) fn new(tokenizer: Tokenizer, stop: Option<StopStrings>) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer),
            stop,
            piece: String::new(),
            news: News::default(),
            last: None,
            finished: false,
            tokens: 0,
        }
    }

    /// Adds a token. `true` if a stop string is now complete: the text ends before it.
    pub(crate) fn push(&mut self, token: SampledToken, stop_tokens: &[TokenId]) -> bool {
        if self.finished {
            return false; // drawn between the match of a stop string and the engine's hearing of it
        }
        let id = token.token;
        self.last = Some(id);
        self.tokens += 1;
        self.news.tokens.push(token);
        if stop_tokens.contains(&id) {
            return false; // it ends the choice and has no text
        }
        self.piece.clear();
        self.detokenizer.push(id, &mut self.piece);
        self.matches()
    }

    /// The engine says that no more tokens follow.
    pub(crate) fn finish(&mut self, reason: FinishReason, client_stop_tokens: &[TokenId]) {
        if self.finished {
            return;
        }
        self.piece.clear();
        self.detokenizer.finish(&mut self.piece);
        if self.matches() {
            return;
        }
        if let Some(StopStrings { matcher, .. }) = &mut self.stop {
            matcher.finish(&mut self.news.text);
        }
        let by_client = self.last.filter(|token| client_stop_tokens.contains(token));
        let stop = by_client.filter(|_| reason == FinishReason::Stop).map(Stopped::Token);
        self.end(Finish { reason, stop });
    }

    /// Passes `piece` on. `true` if it completes a stop string, which ends the choice.
    fn matches(&mut self) -> bool {
        let Some(StopStrings { matcher, strings }) = &mut self.stop else {
            self.news.text.push_str(&self.piece);
            return false;
        };
        let Some(which) = matcher.push(&self.piece, &mut self.news.text) else { return false };
        let stop = Some(Stopped::Text(strings[which].clone()));
        self.end(Finish { reason: FinishReason::Stop, stop });
        true
    }

    fn end(&mut self, finish: Finish) {
        self.finished = true;
        self.news.finish = Some(finish);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use forebay_text::StopMatcher;

    use super::*;

    fn choice(stop: &[&str]) -> Choice {
        let strings: Arc<[String]> = stop.iter().map(|text| (*text).to_owned()).collect();
        let stop =
            (!stop.is_empty()).then(|| StopStrings { matcher: StopMatcher::new(&strings).unwrap(), strings });
        Choice::new(Tokenizer::bytes(), stop)
    }

    fn push(choice: &mut Choice, text: &str) -> bool {
        let tokens = text.bytes().map(u32::from);
        tokens
            .map(|token| SampledToken { choice: 0, position: 0, token, logprobs: None })
            .any(|token| choice.push(token, &[]))
    }

    #[test]
    fn text_ends_before_a_stop_string_and_says_which() {
        let mut choice = choice(&["END", "xyz"]);
        assert!(!push(&mut choice, "hello E"));
        assert_eq!(choice.news.text, "hello ");
        assert!(push(&mut choice, "ND and more"));
        assert_eq!(choice.news.text, "hello ");
        let finish = Finish { reason: FinishReason::Stop, stop: Some(Stopped::Text("END".to_owned())) };
        assert_eq!((choice.news.finish.clone(), choice.tokens), (Some(finish), 9));
        assert!(!push(&mut choice, "x"), "nothing is taken after the end");
        assert_eq!(choice.tokens, 9);
    }

    #[test]
    fn what_was_held_back_comes_at_the_end() {
        let mut choice = choice(&["END"]);
        push(&mut choice, "the E");
        choice.finish(FinishReason::Length, &[]);
        assert_eq!(choice.news.text, "the E");
        assert_eq!(choice.news.finish, Some(Finish { reason: FinishReason::Length, stop: None }));
    }

    #[test]
    fn a_stop_token_has_no_text_and_is_named_if_the_client_gave_it() {
        for (of_client, named) in
            [(vec![], None), (vec![u32::from(b'!')], Some(Stopped::Token(u32::from(b'!'))))]
        {
            let mut choice = choice(&[]);
            for byte in *b"a!" {
                let token = SampledToken { choice: 0, position: 0, token: byte.into(), logprobs: None };
                choice.push(token, &[u32::from(b'!')]);
            }
            choice.finish(FinishReason::Stop, &of_client);
            assert_eq!((choice.news.text.as_str(), choice.tokens), ("a", 2));
            assert_eq!(choice.news.finish, Some(Finish { reason: FinishReason::Stop, stop: named }));
        }
    }
}
