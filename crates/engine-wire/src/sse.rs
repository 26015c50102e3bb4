//! Server-sent events, decoded as they come.
//!
//! In: bytes in pieces of any size. Out: whole events, borrowed from the piece where they lie in one. Start at
//! [`SseDecoder`].
//!
//! Invariants: how the bytes are cut into pieces changes nothing; what is kept between pieces is bounded by [`SseLimits`].

use std::str;

/// Bounds of a stream of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SseLimits {
    /// Bytes of one line, its end not counted.
    pub line_bytes_max: usize,
    /// Bytes of one event's data.
    pub event_bytes_max: usize,
}

/// What is wrong with a stream of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// A line does not end.
    #[error("a line of the stream is longer than {limit_bytes} bytes")]
    LineTooLong {
        /// [`SseLimits::line_bytes_max`].
        limit_bytes: usize,
    },
    /// An event does not end.
    #[error("an event of the stream is longer than {limit_bytes} bytes")]
    EventTooLong {
        /// [`SseLimits::event_bytes_max`].
        limit_bytes: usize,
    },
    /// A line is no text.
    #[error("the stream is not UTF-8")]
    NotUtf8,
}

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SseEvent<'a> {
    /// Its `event` field; empty for none.
    pub name: &'a str,
    /// Its `data` lines, joined by `\n`.
    pub data: &'a str,
}

/// The decoder of one stream.
#[derive(Debug)]
pub struct SseDecoder {
    limits: SseLimits,
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// The event whose blank line has not come.
    open: Open,
    /// The last byte was a carriage return: a line feed that follows ends the same line.
    after_return: bool,
    /// Nothing was read yet: a byte order mark may come.
    at_start: bool,
}

#[derive(Debug, Default)]
struct Open {
    name: String,
    data: String,
    has_data: bool,
}

const BYTE_ORDER_MARK: &str = "\u{feff}";

impl SseDecoder {
    /// The decoder of a stream that begins.
    pub fn new(limits: SseLimits) -> Self {
        Self { limits, line: Vec::new(), open: Open::default(), after_return: false, at_start: true }
    }

    /// Whether nothing of an unfinished event is held: a stream that ends here was not cut off.
    pub fn is_between_events(&self) -> bool {
        self.line.is_empty() && !self.open.has_data
    }

    /// Takes the next bytes and hands out the events that end in them. Answers how many of these bytes belong to events
    /// that have ended, comments included; the rest is the beginning of one that has not.
    ///
    /// # Errors
    /// What is wrong with the stream; nothing more can be read of it.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(SseEvent<'_>)) -> Result<usize, SseError> {
        let mut rest = bytes;
        // The data of an event that has but one line of it, in this piece: it is handed out without a copy.
        let mut borrowed: Option<&str> = None;
        let mut ended = 0;
        if self.after_return && !rest.is_empty() {
            self.after_return = false;
            if rest[0] == b'\n' {
                rest = &rest[1..];
                ended = usize::from(self.is_between_events() && self.open.name.is_empty());
            }
        }
        while let Some(end) = memchr::memchr2(b'\n', b'\r', rest) {
            let (line, after) = rest.split_at(end);
            let length = if after.starts_with(b"\r\n") { 2 } else { 1 };
            self.after_return = after == b"\r";
            rest = &after[length..];
            let is_blank = if self.line.is_empty() {
                self.take_line(line, &mut borrowed)?
            } else {
                self.end_line(line)?
            };
            if is_blank {
                self.dispatch(borrowed.take(), &mut each);
                ended = bytes.len() - rest.len();
            }
        }
        if let Some(data) = borrowed {
            self.open.data.push_str(data);
        }
        self.keep(rest)?;
        Ok(ended)
    }

    fn keep(&mut self, rest: &[u8]) -> Result<(), SseError> {
        if self.line.len() + rest.len() > self.limits.line_bytes_max {
            return Err(SseError::LineTooLong { limit_bytes: self.limits.line_bytes_max });
        }
        self.line.extend_from_slice(rest);
        Ok(())
    }

    /// Takes a line that began in an earlier piece; whether it is blank (a byte order mark may be all of it).
    fn end_line(&mut self, rest: &[u8]) -> Result<bool, SseError> {
        self.keep(rest)?;
        let line = std::mem::take(&mut self.line);
        let mut borrowed = None;
        let is_blank = self.take_line(&line, &mut borrowed)?;
        if let Some(data) = borrowed {
            self.open.data.push_str(data);
        }
        self.line = line;
        self.line.clear();
        Ok(is_blank)
    }

    /// Takes one line; whether it is blank.
    fn take_line<'a>(&mut self, line: &'a [u8], borrowed: &mut Option<&'a str>) -> Result<bool, SseError> {
        if line.len() > self.limits.line_bytes_max {
            return Err(SseError::LineTooLong { limit_bytes: self.limits.line_bytes_max });
        }
        let mut line = str::from_utf8(line).map_err(|_| SseError::NotUtf8)?;
        if std::mem::take(&mut self.at_start) {
            line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
        }
        if line.is_empty() {
            return Ok(true);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => self.take_data(value, borrowed)?,
            "event" => value.clone_into(&mut self.open.name),
            _ => {} // a comment, `id`, `retry`, or nothing that is known
        }
        Ok(false)
    }

    fn take_data<'a>(&mut self, value: &'a str, borrowed: &mut Option<&'a str>) -> Result<(), SseError> {
        let before = self.open.data.len() + borrowed.map_or(0, str::len) + usize::from(self.open.has_data);
        if before + value.len() > self.limits.event_bytes_max {
            return Err(SseError::EventTooLong { limit_bytes: self.limits.event_bytes_max });
        }
        if !std::mem::replace(&mut self.open.has_data, true) {
            *borrowed = Some(value);
            return Ok(());
        }
        if let Some(first) = borrowed.take() {
            self.open.data.push_str(first);
        }
        self.open.data.push('\n');
        self.open.data.push_str(value);
        Ok(())
    }

    fn dispatch(&mut self, borrowed: Option<&str>, each: &mut impl FnMut(SseEvent<'_>)) {
        if std::mem::take(&mut self.open.has_data) {
            let data = borrowed.unwrap_or(&self.open.data);
            each(SseEvent { name: &self.open.name, data });
        }
        self.open.name.clear();
        self.open.data.clear();
    }
}

#[cfg(test)]
mod tests;
