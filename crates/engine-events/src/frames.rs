//! The frames of one ZeroMQ message: what surrounds a payload on an engine's event socket and on its replay socket.
//!
//! Both engines publish `[topic, sequence, payload]`. A replay is asked for with `["", sequence]` and answered with one
//! message a batch and one that ends it, of two shapes: vLLM from 0.26 has the topic in them, older ones and SGLang do
//! not. Sequences are 8 bytes, big-endian; -1 ends a replay. A reader may have lost the empty frame in front (sockets of
//! the kind REQ drop it), so it is not insisted on.

use crate::decode::PAYLOAD_BYTES_MAX;

/// Bytes of a topic.
pub const TOPIC_BYTES_MAX: usize = 1024;

/// What ends a replay in place of a sequence number.
pub const REPLAY_END: [u8; 8] = [0xff; 8];

/// Why frames are not a message of an event socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not as many frames as a message has.
    #[error("{found} frames where {expected} belong")]
    Count {
        /// How many belong there.
        expected: &'static str,
        /// How many there are.
        found: usize,
    },
    /// A frame has another length than it must have.
    #[error("a {frame} of {bytes} bytes where {expected} belong")]
    Length {
        /// Which.
        frame: &'static str,
        /// Its length.
        bytes: usize,
        /// What it must be.
        expected: &'static str,
    },
    /// The number that ends a replay on a message that is no end of one.
    #[error("the sequence number that ends a replay on a message with a payload")]
    Ends,
}

/// One batch, not decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// What the engine publishes under; empty where it was not said.
    pub topic: &'a [u8],
    /// The batch's number.
    pub sequence: u64,
    /// For [`decode`](crate::decode).
    pub payload: &'a [u8],
}

/// One message of a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// A batch.
    Batch(Message<'a>),
    /// There are no more.
    End,
}

/// Whether a replay's messages have the topic in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyShape {
    /// vLLM from 0.26.
    WithTopic,
    /// vLLM before, SGLang.
    WithoutTopic,
}

/// Reads a published message.
///
/// # Errors
/// If it has not three frames, the second not 8 bytes, or one is too long.
pub fn published<F: AsRef<[u8]>>(frames: &[F]) -> Result<Message<'_>, FrameError> {
    let [topic, sequence, payload] = frames else {
        return Err(FrameError::Count { expected: "3", found: frames.len() });
    };
    match message(topic.as_ref(), sequence.as_ref(), payload.as_ref())? {
        Reply::Batch(message) => Ok(message),
        Reply::End => Err(FrameError::Ends),
    }
}

/// Reads a message of a replay, of either shape, with or without the empty frame in front.
///
/// # Errors
/// If it has not two to four frames, no 8 bytes where the sequence number belongs, or a frame is too long.
pub fn reply<F: AsRef<[u8]>>(frames: &[F]) -> Result<Reply<'_>, FrameError> {
    match frames {
        [sequence, payload] => message(&[], sequence.as_ref(), payload.as_ref()),
        // Either the empty frame or the topic is in front: where the rest is does not depend on it.
        [front, sequence, payload] => message(front.as_ref(), sequence.as_ref(), payload.as_ref()),
        [front, topic, sequence, payload] => {
            delimiter(front.as_ref())?;
            message(topic.as_ref(), sequence.as_ref(), payload.as_ref())
        }
        _ => Err(FrameError::Count { expected: "2 to 4", found: frames.len() }),
    }
}

fn delimiter(frame: &[u8]) -> Result<(), FrameError> {
    match frame.len() {
        0 => Ok(()),
        bytes => Err(FrameError::Length { frame: "first frame", bytes, expected: "0" }),
    }
}

fn message<'a>(topic: &'a [u8], sequence: &[u8], payload: &'a [u8]) -> Result<Reply<'a>, FrameError> {
    if topic.len() > TOPIC_BYTES_MAX {
        return Err(FrameError::Length { frame: "topic", bytes: topic.len(), expected: "at most 1024" });
    }
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(FrameError::Length {
            frame: "payload",
            bytes: payload.len(),
            expected: "at most 64 MiB",
        });
    }
    match number(sequence)? {
        u64::MAX if payload.is_empty() => Ok(Reply::End),
        u64::MAX => Err(FrameError::Ends),
        sequence => Ok(Reply::Batch(Message { topic, sequence, payload })),
    }
}

fn number(frame: &[u8]) -> Result<u64, FrameError> {
    let wrong = || FrameError::Length { frame: "sequence number", bytes: frame.len(), expected: "8" };
    frame.try_into().map(u64::from_be_bytes).map_err(|_| wrong())
}

/// Asks for all batches from number `from` on that the engine still has: the frames for a socket of the kind DEALER.
pub fn replay_request(from: u64) -> [Vec<u8>; 2] {
    [Vec::new(), from.to_be_bytes().into()]
}

/// Reads a request for a replay, without the identity that a socket of the kind ROUTER puts in front; says from which
/// number on.
///
/// # Errors
/// If it is not `["", sequence]`, or has no 8 bytes where the sequence number belongs.
pub fn replay_requested<F: AsRef<[u8]>>(frames: &[F]) -> Result<u64, FrameError> {
    let [front, from] = frames else {
        return Err(FrameError::Count { expected: "2", found: frames.len() });
    };
    delimiter(front.as_ref())?;
    number(from.as_ref())
}

/// The frames of a published message.
pub fn publication(topic: &str, sequence: u64, payload: Vec<u8>) -> [Vec<u8>; 3] {
    [topic.into(), sequence.to_be_bytes().into(), payload]
}

/// The frames of one message of a replay, without the identity of who asked.
pub fn replayed(shape: ReplyShape, topic: &str, sequence: u64, payload: Vec<u8>) -> Vec<Vec<u8>> {
    shaped(shape, topic.into(), sequence.to_be_bytes(), payload)
}

/// The frames that end a replay, without the identity of who asked.
pub fn replay_end(shape: ReplyShape) -> Vec<Vec<u8>> {
    shaped(shape, Vec::new(), REPLAY_END, Vec::new())
}

fn shaped(shape: ReplyShape, topic: Vec<u8>, sequence: [u8; 8], payload: Vec<u8>) -> Vec<Vec<u8>> {
    match shape {
        ReplyShape::WithTopic => vec![Vec::new(), topic, sequence.into(), payload],
        ReplyShape::WithoutTopic => vec![Vec::new(), sequence.into(), payload],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEVEN: &[u8] = &7_u64.to_be_bytes();

    fn batch<'a>(topic: &'a [u8], payload: &'a [u8]) -> Message<'a> {
        Message { topic, sequence: 7, payload }
    }

    #[test]
    fn published_messages_have_three_frames() {
        assert_eq!(published(&[b"kv", SEVEN, b"x"]), Ok(batch(b"kv", b"x")));
        assert_eq!(published(&publication("kv", 7, b"x".to_vec())), Ok(batch(b"kv", b"x")));
        for (frames, said) in [
            (&[SEVEN, b"x"][..], "2 frames where 3 belong"),
            (&[b"kv", b"7", b"x"], "a sequence number of 1 bytes where 8 belong"),
            (
                &[b"kv", &REPLAY_END, b"x"],
                "the sequence number that ends a replay on a message with a payload",
            ),
            (
                &[b"kv", &REPLAY_END, b""],
                "the sequence number that ends a replay on a message with a payload",
            ),
            (&[&[b'k'; 1025], SEVEN, b"x"], "a topic of 1025 bytes where at most 1024 belong"),
        ] {
            assert_eq!(published(frames).unwrap_err().to_string(), said);
        }
        let long = vec![0; PAYLOAD_BYTES_MAX + 1];
        let said = published(&[b"", SEVEN, &long]).unwrap_err().to_string();
        assert_eq!(said, "a payload of 67108865 bytes where at most 64 MiB belong");
    }

    #[test]
    fn replies_are_read_in_every_shape() {
        let rows: [(&[&[u8]], Reply<'_>); 7] = [
            (&[b"", b"kv", SEVEN, b"x"], Reply::Batch(batch(b"kv", b"x"))),
            (&[b"", SEVEN, b"x"], Reply::Batch(batch(b"", b"x"))),
            (&[b"kv", SEVEN, b"x"], Reply::Batch(batch(b"kv", b"x"))),
            (&[SEVEN, b"x"], Reply::Batch(batch(b"", b"x"))),
            (&[b"", b"", &REPLAY_END, b""], Reply::End),
            (&[b"", &REPLAY_END, b""], Reply::End),
            (&[&REPLAY_END, b""], Reply::End),
        ];
        for (frames, expected) in rows {
            assert_eq!(reply(frames), Ok(expected), "{frames:?}");
        }
        for shape in [ReplyShape::WithTopic, ReplyShape::WithoutTopic] {
            let topic: &[u8] = if shape == ReplyShape::WithTopic { b"kv" } else { b"" };
            let frames = replayed(shape, "kv", 7, b"x".to_vec());
            assert_eq!(reply(&frames), Ok(Reply::Batch(batch(topic, b"x"))));
            assert_eq!(reply(&replay_end(shape)), Ok(Reply::End));
        }
    }

    #[test]
    fn other_replies_are_refused() {
        for (frames, said) in [
            (&[][..], "0 frames where 2 to 4 belong"),
            (&[&b""[..]; 5], "5 frames where 2 to 4 belong"),
            (&[b"?", b"kv", SEVEN, b"x"], "a first frame of 1 bytes where 0 belong"),
            (&[b"", b"kv", b"x"], "a sequence number of 2 bytes where 8 belong"),
            (&[b"", &REPLAY_END, b"x"], "the sequence number that ends a replay on a message with a payload"),
        ] {
            assert_eq!(reply(frames).unwrap_err().to_string(), said);
        }
    }

    #[test]
    fn a_request_is_understood_by_its_server() {
        assert_eq!(replay_requested(&replay_request(7)), Ok(7));
        assert_eq!(replay_request(258)[1], [0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(replay_requested(&[SEVEN]).unwrap_err().to_string(), "1 frames where 2 belong");
        let said = replay_requested(&[b"me", SEVEN]).unwrap_err().to_string();
        assert_eq!(said, "a first frame of 2 bytes where 0 belong");
    }
}
