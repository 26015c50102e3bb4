//! Payload frames to [`EventBatch`]es.
//!
//! In: the bytes of one payload frame, from an engine that may be old, new or lying. Out: the batch, or what is wrong with
//! it and where. Start at [`decode`]; the wire's shapes are in `fields`, msgpack itself in `reader`.
//!
//! Taken are: batches as list or map; events as map with `type` (vLLM from 0.24 at the latest, SGLang) or as list that
//! begins with the type (vLLM to 0.22, SGLang's first ones); hashes as integers of either sign or as bytes. Unknown keys, elements past the
//! known ones and unknown types of events are passed over.
//!
//! Invariants: never panics; reserves no more than the payload's bytes justify, and nothing for what exceeds a bound;
//! passing over a value takes no stack.

mod fields;
mod reader;

use forebay_types::{Tier, TokenId};

use crate::event::{EngineEvent, EngineHash, EventBatch};
use fields::Fields;
use reader::{Integer, Reader};

/// Bytes of one payload. A prompt of a million tokens takes 3 to 5 MB.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 20;
/// Events in one batch. SGLang with pages of one token and an event a page sends one for each token of a step.
pub const EVENTS_MAX: usize = 1 << 18;
/// Block hashes in one batch; what else went into a block's hash counts like one.
pub const HASHES_MAX: usize = 1 << 20;
/// Token ids in one batch.
pub const TOKENS_MAX: usize = 1 << 23;

/// Why a payload is no batch of KV events. What its rank caches is unknown from there on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Longer than [`PAYLOAD_BYTES_MAX`].
    #[error("a payload of {bytes} bytes, more than {PAYLOAD_BYTES_MAX}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The batch around the events is wrong.
    #[error("{field} of the batch: {problem}")]
    Batch {
        /// Which part.
        field: &'static str,
        /// What about it.
        problem: Problem,
    },
    /// One event is wrong.
    #[error("{field} of event {index}: {problem}")]
    Event {
        /// Its place in the batch, from 0.
        index: usize,
        /// The engines' name of the field.
        field: &'static str,
        /// What about it.
        problem: Problem,
    },
}

/// What is wrong with one field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The payload ends in it, or it says to be longer than the payload.
    #[error("it goes on past the end of the payload")]
    Truncated,
    /// Another type, or out of range.
    #[error("{found} where {expected} belongs")]
    Wrong {
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: &'static str,
    },
    /// A text is not UTF-8.
    #[error("text that is not UTF-8")]
    NotUtf8,
    /// It is not there.
    #[error("missing")]
    Missing,
    /// A bound of this crate.
    #[error("more than {max} {what} in one batch")]
    TooMany {
        /// The bound.
        max: usize,
        /// Of what.
        what: &'static str,
    },
    /// Something follows the batch.
    #[error("bytes after it")]
    Trailing,
}

/// Reads one payload frame.
///
/// # Errors
/// Says which field of which event is wrong. No event of a batch with an error is returned: what comes after the mistake
/// cannot be trusted either.
pub fn decode(payload: &[u8]) -> Result<EventBatch, DecodeError> {
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(DecodeError::TooLong { bytes: payload.len() });
    }
    let mut decoder =
        Decoder { reader: Reader::new(payload), hashes_left: HASHES_MAX, tokens_left: TOKENS_MAX };
    decoder.batch()
}

/// A reader and what one batch may still have.
struct Decoder<'a> {
    reader: Reader<'a>,
    hashes_left: usize,
    tokens_left: usize,
}

fn in_batch(field: &'static str) -> impl Fn(Problem) -> DecodeError {
    move |problem| DecodeError::Batch { field, problem }
}

impl<'a> Decoder<'a> {
    fn batch(&mut self) -> Result<EventBatch, DecodeError> {
        const PARTS: [&str; 3] = ["ts", "events", "data_parallel_rank"];
        let mut parts = Parts { time_seconds: None, events: None, dp_rank: None };
        if matches!(self.reader.peek(), Ok(rmp::Marker::FixMap(_) | rmp::Marker::Map16 | rmp::Marker::Map32))
        {
            for _ in 0..self.reader.map("a batch").map_err(in_batch("shape"))? {
                let key = self.key().map_err(in_batch("keys"))?;
                self.part(key.unwrap_or_default(), &mut parts)?;
            }
        } else {
            let elements = self.reader.array("a list or a map").map_err(in_batch("shape"))?;
            for index in 0..elements {
                self.part(PARTS.get(index).copied().unwrap_or_default(), &mut parts)?;
            }
        }
        if self.reader.bytes_left() > 0 {
            return Err(in_batch("end")(Problem::Trailing));
        }
        let missing = |field: &'static str| move || in_batch(field)(Problem::Missing);
        Ok(EventBatch {
            time_seconds: parts.time_seconds.ok_or_else(missing("ts"))?,
            events: parts.events.ok_or_else(missing("events"))?,
            dp_rank: parts.dp_rank,
        })
    }

    /// The next key of a map; `None` if it is no text.
    fn key(&mut self) -> Result<Option<&'a str>, Problem> {
        use rmp::Marker::{FixStr, Str8, Str16, Str32};
        match self.reader.peek()? {
            FixStr(_) | Str8 | Str16 | Str32 => self.reader.text("a key").map(Some),
            _ => self.reader.raw().map(|_| None),
        }
    }

    fn part(&mut self, name: &str, parts: &mut Parts) -> Result<(), DecodeError> {
        match name {
            "ts" => {
                let time = self.reader.number("seconds").map_err(in_batch("ts"))?;
                parts.time_seconds = Some(time);
            }
            "events" => parts.events = Some(self.events()?),
            "data_parallel_rank" | "attn_dp_rank" => {
                parts.dp_rank = match self.reader.nil() {
                    true => None,
                    false => {
                        let rank = self.reader.unsigned("a rank (0 to 65535)");
                        Some(rank.map_err(in_batch("data_parallel_rank"))?)
                    }
                };
            }
            _ => drop(self.reader.raw().map_err(in_batch("unknown part"))?),
        }
        Ok(())
    }

    fn events(&mut self) -> Result<Vec<EngineEvent>, DecodeError> {
        let count = self.reader.array("a list").map_err(in_batch("events"))?;
        if count > EVENTS_MAX {
            return Err(in_batch("events")(Problem::TooMany { max: EVENTS_MAX, what: "events" }));
        }
        // An event takes a hundred times the room of the byte that promises it.
        let mut events = Vec::with_capacity(count.min(256));
        for index in 0..count {
            let event = Fields::read(self).and_then(Fields::event);
            events.push(event.map_err(|(field, problem)| DecodeError::Event { index, field, problem })?);
        }
        Ok(events)
    }

    fn hash(&mut self) -> Result<EngineHash, Problem> {
        use rmp::Marker::{Bin8, Bin16, Bin32};
        const EXPECTED: &str = "a hash (an integer or 1 to 64 bytes)";
        if !matches!(self.reader.peek()?, Bin8 | Bin16 | Bin32) {
            return Ok(EngineHash(match self.reader.integer(EXPECTED)? {
                Integer::Unsigned(value) => value,
                Integer::Negative(value) => value.cast_unsigned(),
            }));
        }
        let bytes = self.reader.binary(EXPECTED)?;
        if bytes.is_empty() || bytes.len() > 64 {
            return Err(Problem::Wrong { expected: EXPECTED, found: "bytes of another length" });
        }
        // A big-endian integer of any length; what is shifted out are its high bytes.
        Ok(EngineHash(bytes.iter().fold(0, |hash, &byte| hash << 8 | u64::from(byte))))
    }

    fn count_hashes(&mut self, count: usize) -> Result<(), Problem> {
        let left = self.hashes_left.checked_sub(count);
        self.hashes_left = left.ok_or(Problem::TooMany { max: HASHES_MAX, what: "block hashes" })?;
        Ok(())
    }

    fn hashes(&mut self) -> Result<Vec<EngineHash>, Problem> {
        let count = self.reader.array("a list of hashes")?;
        self.count_hashes(count)?;
        let mut hashes = Vec::with_capacity(count);
        for _ in 0..count {
            hashes.push(self.hash()?);
        }
        Ok(hashes)
    }

    fn tokens(&mut self) -> Result<Vec<TokenId>, Problem> {
        let count = self.reader.array("a list of token ids")?;
        let left = self.tokens_left.checked_sub(count);
        self.tokens_left = left.ok_or(Problem::TooMany { max: TOKENS_MAX, what: "token ids" })?;
        let mut tokens = Vec::with_capacity(count);
        for _ in 0..count {
            tokens.push(self.reader.token()?);
        }
        Ok(tokens)
    }
}

struct Parts {
    time_seconds: Option<f64>,
    events: Option<Vec<EngineEvent>>,
    dp_rank: Option<u16>,
}

/// Where a medium is. `None`: the engine has only one, its own pool.
///
/// A name that is not known is taken for the costliest tier: it is then never an overlap, and a store and a removal there
/// still belong together.
fn tier(medium: Option<&str>) -> Tier {
    let Some(medium) = medium else {
        return Tier::Device;
    };
    let begins_with = |prefix: &str| {
        medium
            .as_bytes()
            .get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()))
    };
    if begins_with("GPU") {
        Tier::Device
    } else if begins_with("CPU") {
        Tier::Host
    } else if begins_with("DISK") || begins_with("STORAGE") || begins_with("FS") {
        Tier::Disk
    } else {
        Tier::Remote
    }
}

#[cfg(test)]
mod tests;
