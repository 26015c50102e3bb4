//! A reader of msgpack over a slice: takes values off its front, allocates nothing, trusts no length.
//!
//! Every value takes at least one byte, so a length greater than the bytes left is refused before anything is reserved
//! for it, and skipping counts what is still to skip instead of recursing.

use rmp::Marker;

use super::Problem;

#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

/// An integer of msgpack: one of its unsigned formats, or a negative one.
pub(super) enum Integer {
    Unsigned(u64),
    Negative(i64),
}

type Read<T> = Result<T, Problem>;

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn bytes_left(&self) -> usize {
        self.rest.len()
    }

    /// What the next value is, without taking it.
    pub(super) fn peek(&self) -> Read<Marker> {
        self.rest.first().map(|&byte| Marker::from_u8(byte)).ok_or(Problem::Truncated)
    }

    fn bytes(&mut self, count: usize) -> Read<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Problem::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// `N` bytes that follow the marker, which is taken too.
    fn after_marker<const N: usize>(&mut self) -> Read<[u8; N]> {
        let (taken, rest) =
            self.rest.get(1..).and_then(<[u8]>::split_first_chunk::<N>).ok_or(Problem::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn length<const N: usize>(&mut self) -> Read<usize> {
        let taken = self.after_marker::<N>()?;
        Ok(taken.iter().fold(0, |length, &byte| length << 8 | usize::from(byte)))
    }

    /// Takes nil if it is next; says whether it was.
    pub(super) fn nil(&mut self) -> bool {
        match self.rest {
            [0xc0, rest @ ..] => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    pub(super) fn array(&mut self, expected: &'static str) -> Read<usize> {
        let length = match self.peek()? {
            Marker::FixArray(length) => self.bytes(1).map(|_| usize::from(length))?,
            Marker::Array16 => self.length::<2>()?,
            Marker::Array32 => self.length::<4>()?,
            found => return Err(wrong(expected, found)),
        };
        if length > self.rest.len() { Err(Problem::Truncated) } else { Ok(length) }
    }

    /// The number of pairs.
    pub(super) fn map(&mut self, expected: &'static str) -> Read<usize> {
        let pairs = match self.peek()? {
            Marker::FixMap(pairs) => self.bytes(1).map(|_| usize::from(pairs))?,
            Marker::Map16 => self.length::<2>()?,
            Marker::Map32 => self.length::<4>()?,
            found => return Err(wrong(expected, found)),
        };
        if pairs > self.rest.len() / 2 { Err(Problem::Truncated) } else { Ok(pairs) }
    }

    pub(super) fn text(&mut self, expected: &'static str) -> Read<&'a str> {
        let length = match self.peek()? {
            Marker::FixStr(length) => self.bytes(1).map(|_| usize::from(length))?,
            Marker::Str8 => self.length::<1>()?,
            Marker::Str16 => self.length::<2>()?,
            Marker::Str32 => self.length::<4>()?,
            found => return Err(wrong(expected, found)),
        };
        std::str::from_utf8(self.bytes(length)?).map_err(|_| Problem::NotUtf8)
    }

    pub(super) fn binary(&mut self, expected: &'static str) -> Read<&'a [u8]> {
        let length = match self.peek()? {
            Marker::Bin8 => self.length::<1>()?,
            Marker::Bin16 => self.length::<2>()?,
            Marker::Bin32 => self.length::<4>()?,
            found => return Err(wrong(expected, found)),
        };
        self.bytes(length)
    }

    pub(super) fn integer(&mut self, expected: &'static str) -> Read<Integer> {
        let signed = |value: i64| u64::try_from(value).map_or(Integer::Negative(value), Integer::Unsigned);
        Ok(match self.peek()? {
            Marker::FixPos(value) => self.bytes(1).map(|_| Integer::Unsigned(value.into()))?,
            Marker::FixNeg(value) => self.bytes(1).map(|_| Integer::Negative(value.into()))?,
            Marker::U8 => Integer::Unsigned(u8::from_be_bytes(self.after_marker()?).into()),
            Marker::U16 => Integer::Unsigned(u16::from_be_bytes(self.after_marker()?).into()),
            Marker::U32 => Integer::Unsigned(u32::from_be_bytes(self.after_marker()?).into()),
            Marker::U64 => Integer::Unsigned(u64::from_be_bytes(self.after_marker()?)),
            Marker::I8 => signed(i8::from_be_bytes(self.after_marker()?).into()),
            Marker::I16 => signed(i16::from_be_bytes(self.after_marker()?).into()),
            Marker::I32 => signed(i32::from_be_bytes(self.after_marker()?).into()),
            Marker::I64 => signed(i64::from_be_bytes(self.after_marker()?)),
            found => return Err(wrong(expected, found)),
        })
    }

    /// An integer from 0 to the greatest `T`.
    pub(super) fn unsigned<T: TryFrom<u64>>(&mut self, expected: &'static str) -> Read<T> {
        match self.integer(expected)? {
            Integer::Unsigned(value) => T::try_from(value).map_err(|_| out_of_range(expected)),
            Integer::Negative(_) => Err(out_of_range(expected)),
        }
    }

    /// A token id; the first of a pair.
    pub(super) fn token(&mut self) -> Read<u32> {
        const EXPECTED: &str = "a token id (0 to 4294967295)";
        // Nearly all that an engine sends are these: spared the general way.
        let (token, rest) = match *self.rest {
            [token @ ..0x80, ref rest @ ..] => (u32::from(token), rest),
            [0xcd, high, low, ref rest @ ..] => (u32::from(u16::from_be_bytes([high, low])), rest),
            [0xcc, token, ref rest @ ..] => (u32::from(token), rest),
            [0xce, a, b, c, d, ref rest @ ..] => (u32::from_be_bytes([a, b, c, d]), rest),
            [0x92, ..] => {
                self.rest = &self.rest[1..];
                let first = self.unsigned(EXPECTED)?;
                self.unsigned::<u32>(EXPECTED)?;
                return Ok(first);
            }
            _ => return self.unsigned(EXPECTED),
        };
        self.rest = rest;
        Ok(token)
    }

    /// A number of any format.
    pub(super) fn number(&mut self, expected: &'static str) -> Read<f64> {
        Ok(match self.peek()? {
            Marker::F64 => f64::from_be_bytes(self.after_marker()?),
            Marker::F32 => f32::from_be_bytes(self.after_marker()?).into(),
            _ => match self.integer(expected)? {
                Integer::Unsigned(value) => value as f64,
                Integer::Negative(value) => value as f64,
            },
        })
    }

    /// Takes one value of any kind, with all that is in it, as it is.
    pub(super) fn raw(&mut self) -> Read<&'a [u8]> {
        let from = self.rest;
        let mut values = 1_usize;
        while values > 0 {
            // Each takes at least one byte, and none promises more parts than there are bytes: this ends, and in a number.
            values = values - 1 + self.head()?;
        }
        Ok(&from[..from.len() - self.rest.len()])
    }

    /// Takes a value except what it contains; says how many values that is.
    fn head(&mut self) -> Read<usize> {
        let marker = self.peek()?;
        let bytes = match marker {
            Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => return self.array(""),
            Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => return Ok(self.map("")? * 2),
            Marker::FixPos(_) | Marker::FixNeg(_) | Marker::Null | Marker::True | Marker::False => 1,
            Marker::U8 | Marker::I8 => 2,
            Marker::U16 | Marker::I16 | Marker::FixExt1 => 3,
            Marker::FixExt2 => 4,
            Marker::U32 | Marker::I32 | Marker::F32 => 5,
            Marker::FixExt4 => 6,
            Marker::U64 | Marker::I64 | Marker::F64 => 9,
            Marker::FixExt8 => 10,
            Marker::FixExt16 => 18,
            Marker::FixStr(length) => 1 + usize::from(length),
            Marker::Str8 | Marker::Bin8 => self.length::<1>()?,
            Marker::Str16 | Marker::Bin16 => self.length::<2>()?,
            Marker::Str32 | Marker::Bin32 => self.length::<4>()?,
            // The type's byte comes after the length.
            Marker::Ext8 => self.length::<1>()? + 1,
            Marker::Ext16 => self.length::<2>()? + 1,
            Marker::Ext32 => self.length::<4>()? + 1,
            Marker::Reserved => return Err(wrong("a value", marker)),
        };
        self.bytes(bytes).map(|_| 0)
    }
}

fn wrong(expected: &'static str, found: Marker) -> Problem {
    Problem::Wrong { expected, found: name(found) }
}

fn out_of_range(expected: &'static str) -> Problem {
    Problem::Wrong { expected, found: "another integer" }
}

fn name(marker: Marker) -> &'static str {
    match marker {
        Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => "a list",
        Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => "a map",
        Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => "a text",
        Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => "bytes",
        Marker::F32 | Marker::F64 => "a fraction",
        Marker::Null => "nothing",
        Marker::True | Marker::False => "a truth value",
        Marker::Reserved => "a byte that starts no value",
        Marker::FixExt1
        | Marker::FixExt2
        | Marker::FixExt4
        | Marker::FixExt8
        | Marker::FixExt16
        | Marker::Ext8
        | Marker::Ext16
        | Marker::Ext32 => "an extension",
        _ => "an integer",
    }
}
