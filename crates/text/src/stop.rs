//! Stop strings across chunk borders.
//!
//! In: the text of one choice, in chunks of any size. Out: the part of it that the client may see, and which stop
//! string ended it. Start at [`StopMatcher::push`].
//!
//! Invariants: the result does not depend on how the text was cut into chunks; nothing of the stop string that ended
//! the text is ever released; text is held back only while it is the beginning of some stop string.

#[cfg(test)]
mod tests;

use std::sync::Arc;

/// Stop strings that one request may give (OpenAI allows 4).
pub const STOP_STRINGS_MAX: usize = 16;

/// Length of one stop string, in bytes.
pub const STOP_STRING_BYTES_MAX: usize = 1024;

/// Why stop strings were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// More than [`STOP_STRINGS_MAX`].
    #[error("{count} stop strings were given; give at most {STOP_STRINGS_MAX}")]
    TooMany {
        /// How many were given.
        count: usize,
    },
    /// Longer than [`STOP_STRING_BYTES_MAX`].
    #[error("stop string {index} has {bytes} bytes; give at most {STOP_STRING_BYTES_MAX}")]
    TooLong {
        /// Which, from 0.
        index: usize,
        /// Its length.
        bytes: usize,
    },
    /// It would match everywhere.
    #[error("stop string {index} is empty; leave it out")]
    Empty {
        /// Which, from 0.
        index: usize,
    },
}

/// Finds the first stop string to be completed in the text of one choice. Clone an unused one for each choice.
///
/// If two are completed by the same character, the longer one counts, so as little as possible is released.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Arc<[Pattern]>,
    /// For each pattern, how many of its bytes the text ends with: the longest proper beginning of it.
    matched: Vec<u16>,
    /// The text not yet released: the longest of those beginnings.
    held: String,
    stopped: Option<usize>,
}

/// A stop string with its Knuth-Morris-Pratt table. One automaton over all strings would save work for many of them,
/// but requests have one to four, and this is built for every request.
#[derive(Debug)]
struct Pattern {
    bytes: Box<[u8]>,
    /// For each beginning, by its last index: the length of its longest proper beginning that is also its end.
    fallback: Box<[u16]>,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes: Box<[u8]> = text.as_bytes().into();
        let mut fallback = vec![0_u16; bytes.len()];
        for index in 1..bytes.len() {
            let mut length = fallback[index - 1];
            while length > 0 && bytes[index] != bytes[usize::from(length)] {
                length = fallback[usize::from(length) - 1];
            }
            fallback[index] = length + u16::from(bytes[index] == bytes[usize::from(length)]);
        }
        Self { bytes, fallback: fallback.into() }
    }

    /// How many bytes of the pattern the text ends with after `byte`, if it ended with `matched` before.
    fn step(&self, matched: u16, byte: u8) -> u16 {
        let mut matched = matched;
        while matched > 0 && self.bytes[usize::from(matched)] != byte {
            matched = self.fallback[usize::from(matched) - 1];
        }
        matched + u16::from(self.bytes[usize::from(matched)] == byte)
    }
}

impl StopMatcher {
    /// A matcher at the beginning of an answer. Without stop strings it lets everything through.
    ///
    /// # Errors
    /// If there are too many stop strings, or one is empty or too long.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<Self, StopError> {
        if stops.len() > STOP_STRINGS_MAX {
            return Err(StopError::TooMany { count: stops.len() });
        }
        for (index, stop) in stops.iter().enumerate() {
            match stop.as_ref().len() {
                0 => return Err(StopError::Empty { index }),
                bytes if bytes > STOP_STRING_BYTES_MAX => return Err(StopError::TooLong { index, bytes }),
                _ => {}
            }
        }
        let patterns: Arc<[Pattern]> = stops.iter().map(|stop| Pattern::new(stop.as_ref())).collect();
        Ok(Self { matched: vec![0; patterns.len()], patterns, held: String::new(), stopped: None })
    }

    /// Takes the next text and appends to `out` what can no longer belong to a stop string. Returns the index of the
    /// stop string that ended the text, now or earlier; from then on nothing is released.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<usize> {
        if self.stopped.is_some() {
            return self.stopped;
        }
        if self.patterns.is_empty() {
            out.push_str(text);
            return None;
        }
        for (index, byte) in text.bytes().enumerate() {
            if let Some(which) = self.step(byte) {
                let visible = self.held.len() + index + 1 - self.patterns[which].bytes.len();
                self.release(visible, text, out);
                self.held = String::new();
                self.stopped = Some(which);
                return self.stopped;
            }
        }
        // The longest beginning of a stop string that the text ends with starts where a character starts, since it
        // starts with a stop string's first byte.
        let kept = usize::from(self.matched.iter().copied().max().unwrap_or(0));
        let visible = self.held.len() + text.len() - kept;
        self.release(visible, text, out);
        if visible < self.held.len() {
            self.held.drain(..visible);
            self.held.push_str(text);
        } else {
            let start = visible - self.held.len();
            self.held.clear();
            self.held.push_str(&text[start..]);
        }
        None
    }

    /// Ends the text: releases what was held back, unless a stop string ended it before.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.matched.fill(0);
    }

    /// Which stop string ended the text, if one did.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }

    /// Advances every pattern by one byte; returns the longest pattern that it completes (the first of equals).
    fn step(&mut self, byte: u8) -> Option<usize> {
        let mut completed: Option<usize> = None;
        for (index, (pattern, matched)) in self.patterns.iter().zip(&mut self.matched).enumerate() {
            *matched = pattern.step(*matched, byte);
            let longer = completed.is_none_or(|best| pattern.bytes.len() > self.patterns[best].bytes.len());
            if usize::from(*matched) == pattern.bytes.len() && longer {
                completed = Some(index);
            }
        }
        completed
    }

    /// Appends the first `visible` bytes of what is held followed by `text`.
    fn release(&self, visible: usize, text: &str, out: &mut String) {
        let from_held = visible.min(self.held.len());
        out.push_str(&self.held[..from_held]);
        out.push_str(&text[..visible - from_held]);
    }
}
