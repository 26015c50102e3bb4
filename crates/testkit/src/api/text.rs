//! An answer's text from its tokens: detokenising and stop strings, as engines' front ends do it.
//!
//! In: tokens, one by one. Out: text that can be sent, and whether a stop string ended it. Text that may be the
//! beginning of a stop string is held back (vLLM 0.32's detokenizer holds back as many characters as the longest stop
//! string has, less one; SGLang's does the same).

use crate::tokenizer::{Detokenizer, Token};

/// Text options of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct TextOptions {
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
}

/// The text of one choice.
#[derive(Debug)]
pub(crate) struct Text {
    options: TextOptions,
    detokenizer: Detokenizer,
    /// Not yet given out.
    held: String,
    stopped: bool,
}

impl Text {
    pub(crate) fn new(options: TextOptions) -> Self {
        Self { options, detokenizer: Detokenizer::default(), held: String::new(), stopped: false }
    }

    /// Whether what ends an answer is part of its text.
    pub(crate) fn includes_stop(&self) -> bool {
        self.options.include_stop
    }

    /// Takes a token; returns the stop string that it completed, if any. Then [`Text::take`] has the last text.
    pub(crate) fn push(&mut self, token: Token) -> Option<String> {
        let text = self.detokenizer.push(token, self.options.skip_special);
        self.held.push_str(&text);
        let found = self.options.stop.iter().filter_map(|stop| self.held.find(stop).map(|at| (at, stop)));
        let (at, stop) = found.min_by_key(|(at, _)| *at).map(|(at, stop)| (at, stop.clone()))?;
        self.held.truncate(if self.options.include_stop { at + stop.len() } else { at });
        self.stopped = true;
        Some(stop)
    }

    /// The text that can be given out now; all of it at the `end`.
    pub(crate) fn take(&mut self, end: bool) -> String {
        if self.stopped {
            return std::mem::take(&mut self.held);
        }
        if end {
            let rest = self.detokenizer.finish();
            return std::mem::take(&mut self.held) + &rest;
        }
        let keep = self.options.stop.iter().map(|stop| stop.chars().count() - 1).max().unwrap_or(0);
        let split = self.held.char_indices().rev().nth(keep.saturating_sub(1)).map_or(0, |(at, _)| at);
        let split = if keep == 0 { self.held.len() } else { split };
        let rest = self.held.split_off(split);
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include_stop: bool, text: &str) -> (String, Option<String>) {
        let stop = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut out = Text::new(TextOptions { stop, include_stop, skip_special: true });
        let mut given = String::new();
        for byte in text.bytes() {
            if let Some(stop) = out.push(Token::from(byte)) {
                return (given + &out.take(true), Some(stop));
            }
            given += &out.take(false);
        }
        (given + &out.take(true), None)
    }

    #[test]
    fn stop_strings_end_the_text_wherever_tokens_split_them() {
        assert_eq!(run(&[], false, "one two"), ("one two".into(), None));
        assert_eq!(run(&["two"], false, "one two three"), ("one ".into(), Some("two".into())));
        assert_eq!(run(&["two"], true, "one two three"), ("one two".into(), Some("two".into())));
        assert_eq!(run(&["twx", "e"], false, "on two"), ("on two".into(), None));
        assert_eq!(run(&["€"], false, "3 € x"), ("3 ".into(), Some("€".into())));
        assert_eq!(run(&["abcd"], false, "abc"), ("abc".into(), None));
    }
}
