//! Reads along a ZMTP stream, and stops it at what is too large.
//!
//! In: bytes as they come from a peer, in pieces of any length. Out: whether they may pass. Only the greeting and the
//! headers of frames are looked at; what they mean is for the ZMQ library behind. (RFC 23, ZMTP 3.0.)

/// Of the greeting.
const GREETING_BYTES: u8 = 64;
/// Of a command: a handshake has a few short properties.
const COMMAND_BYTES_MAX: u64 = 16 << 10;
/// Frames of one message; engines send four at most.
const FRAMES_MAX: u32 = 16;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Why a stream may not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// It is not ZMTP 3.
    NotZmtp,
    /// A message of more bytes or frames than allowed.
    TooLarge,
}

/// What comes next in the stream.
#[derive(Debug)]
enum State {
    Greeting { seen: u8 },
    Flags,
    Length { flags: u8, bytes_left: u8, length: u64 },
    Body { bytes_left: u64 },
}

/// One connection's stream.
#[derive(Debug)]
pub(super) struct Screen {
    state: State,
    message_bytes_max: u64,
    /// Of the message that is being read.
    message_bytes: u64,
    frames: u32,
}

impl Screen {
    pub(super) fn new(message_bytes_max: u64) -> Self {
        Self { state: State::Greeting { seen: 0 }, message_bytes_max, message_bytes: 0, frames: 0 }
    }

    /// Reads the next bytes.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> Result<(), Stop> {
        while let Some((&byte, rest)) = bytes.split_first() {
            match &mut self.state {
                State::Body { bytes_left } => {
                    let passed = (bytes.len() as u64).min(*bytes_left);
                    *bytes_left -= passed;
                    if *bytes_left == 0 {
                        self.state = State::Flags;
                    }
                    bytes = &bytes[passed as usize..];
                    continue;
                }
                State::Greeting { seen } => {
                    let fits = match seen {
                        0 => byte == 0xff,
                        9 => byte & 1 == 1,
                        10 => byte >= 3,
                        _ => true,
                    };
                    if !fits {
                        return Err(Stop::NotZmtp);
                    }
                    *seen += 1;
                    if *seen == GREETING_BYTES {
                        self.state = State::Flags;
                    }
                }
                State::Flags => {
                    if byte & !(MORE | LONG | COMMAND) != 0 {
                        return Err(Stop::NotZmtp);
                    }
                    let bytes_left = if byte & LONG != 0 { 8 } else { 1 };
                    self.state = State::Length { flags: byte, bytes_left, length: 0 };
                }
                State::Length { flags, bytes_left, length } => {
                    *length = *length << 8 | u64::from(byte);
                    *bytes_left -= 1;
                    if *bytes_left == 0 {
                        let (flags, length) = (*flags, *length);
                        self.frame(flags, length)?;
                    }
                }
            }
            bytes = rest;
        }
        Ok(())
    }

    /// A frame's header is complete.
    fn frame(&mut self, flags: u8, length: u64) -> Result<(), Stop> {
        self.state = if length == 0 { State::Flags } else { State::Body { bytes_left: length } };
        if flags & COMMAND != 0 {
            return if length <= COMMAND_BYTES_MAX { Ok(()) } else { Err(Stop::TooLarge) };
        }
        self.message_bytes = self.message_bytes.saturating_add(length);
        self.frames += 1;
        if self.message_bytes > self.message_bytes_max || self.frames > FRAMES_MAX {
            return Err(Stop::TooLarge);
        }
        if flags & MORE == 0 {
            self.message_bytes = 0;
            self.frames = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn greeting() -> Vec<u8> {
        let mut greeting = vec![0; 64];
        greeting[0] = 0xff;
        greeting[9] = 0x7f;
        greeting[10] = 3;
        greeting
    }

    fn frame(flags: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![flags];
        if flags & LONG != 0 {
            bytes.extend((length as u64).to_be_bytes());
        } else {
            bytes.push(length as u8);
        }
        bytes.resize(bytes.len() + length, 7);
        bytes
    }

    fn screened(parts: &[Vec<u8>]) -> Result<(), Stop> {
        Screen::new(1000).read(&parts.concat())
    }

    #[test]
    fn an_engines_stream_passes() {
        let message = [frame(MORE, 9), frame(MORE, 8), frame(LONG, 900)].concat();
        assert_eq!(screened(&[greeting(), frame(COMMAND, 40), message.clone(), message]), Ok(()));
    }

    #[test]
    fn what_is_too_large_is_stopped_at_its_header() {
        let header = |length: u64| [&[LONG][..], &length.to_be_bytes()].concat();
        assert_eq!(screened(&[greeting(), header(1 << 40)]), Err(Stop::TooLarge));
        assert_eq!(screened(&[greeting(), header(u64::MAX)]), Err(Stop::TooLarge));
        let command = [&[LONG | COMMAND][..], &(1_u64 << 20).to_be_bytes()].concat();
        assert_eq!(screened(&[greeting(), command]), Err(Stop::TooLarge));
        let parts = [greeting(), frame(LONG | MORE, 600), frame(LONG, 600)];
        assert_eq!(screened(&parts), Err(Stop::TooLarge), "together");
        let frames = [greeting(), frame(MORE, 0).repeat(FRAMES_MAX as usize), frame(0, 0)];
        assert_eq!(screened(&frames), Err(Stop::TooLarge), "in number");
    }

    #[test]
    fn other_protocols_are_told_at_once() {
        assert_eq!(screened(&[b"HTTP/1.1 400 Bad Request".to_vec()]), Err(Stop::NotZmtp));
        let mut old = greeting();
        old[10] = 1;
        assert_eq!(screened(&[old]), Err(Stop::NotZmtp));
        assert_eq!(screened(&[greeting(), vec![0x80]]), Err(Stop::NotZmtp));
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            frames in prop::collection::vec((prop_oneof![Just(0u8), Just(MORE), Just(LONG), Just(COMMAND), any::<u8>()], 0usize..400), 0..8),
            cut in 1usize..40,
        ) {
            let mut stream = greeting();
            for (flags, length) in frames {
                stream.extend(frame(flags, length));
            }
            let whole = Screen::new(1000).read(&stream);
            let mut screen = Screen::new(1000);
            let pieces = stream.chunks(cut).try_for_each(|piece| screen.read(piece));
            prop_assert_eq!(whole, pieces);
        }

        #[test]
        fn nothing_panics(bytes: Vec<u8>) {
            let _ = screened(&[greeting(), bytes]);
        }
    }
}
