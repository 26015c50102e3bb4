//! Server-sent events from bytes: <https://html.spec.whatwg.org/multipage/server-sent-events.html>.
//!
//! Fields other than `event` and `data` are skipped; they matter to browsers that reconnect.

/// Bytes of one line, and of one event's data. A server that sends more is broken or hostile.
const LINE_BYTES_MAX: usize = 1 << 20;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Event {
    /// Its type; empty means `message`.
    pub(crate) name: String,
    /// Its lines of data, joined.
    pub(crate) data: String,
}

/// An event that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an event of more than {LINE_BYTES_MAX} bytes")]
pub(crate) struct TooLong;

/// Reads events from bytes in any pieces.
#[derive(Debug, Default)]
pub(crate) struct EventParser {
    line: Vec<u8>,
    /// The last byte was a carriage return, which may be half of a line's end.
    after_return: bool,
    event: Event,
    has_data: bool,
}

impl EventParser {
    /// Takes the next bytes; appends the events that they complete.
    ///
    /// # Errors
    /// [`TooLong`]; nothing more can be read then.
    pub(crate) fn feed(&mut self, bytes: &[u8], events: &mut Vec<Event>) -> Result<(), TooLong> {
        for byte in bytes {
            let is_second_half = std::mem::replace(&mut self.after_return, *byte == b'\r') && *byte == b'\n';
            match byte {
                b'\n' if is_second_half => {}
                b'\n' | b'\r' => self.end_line(events)?,
                _ if self.line.len() == LINE_BYTES_MAX => return Err(TooLong),
                _ => self.line.push(*byte),
            }
        }
        Ok(())
    }

    fn end_line(&mut self, events: &mut Vec<Event>) -> Result<(), TooLong> {
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                events.push(std::mem::take(&mut self.event));
            }
            self.event = Event::default();
            return Ok(());
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "data" if self.event.data.len() + value.len() > LINE_BYTES_MAX => return Err(TooLong),
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: &str) -> Event {
        Event { name: name.to_owned(), data: data.to_owned() }
    }

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let text = ": hello\ndata: {\"a\":1}\n\nevent: error\r\ndata: é\r\ndata:two\r\rid: 7\n\ndata\n\ndata: [DONE]\n\ndata: cut";
        let expected =
            vec![event("", "{\"a\":1}"), event("error", "é\ntwo"), event("", ""), event("", "[DONE]")];
        for size in 1..text.len() {
            let (mut parser, mut events) = (EventParser::default(), Vec::new());
            for piece in text.as_bytes().chunks(size) {
                parser.feed(piece, &mut events).expect("short lines");
            }
            assert_eq!(events, expected, "pieces of {size}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let endless = |unit: &[u8]| {
            let (mut parser, mut events) = (EventParser::default(), Vec::new());
            (0..3 << 20).try_for_each(|_| parser.feed(unit, &mut events))
        };
        assert_eq!(endless(b"x"), Err(TooLong));
        assert_eq!(endless(b"data: xxxxxxxx\n"), Err(TooLong));
    }
}
