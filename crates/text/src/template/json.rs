//! JSON into template values, members in the order in which the client sent them, and template values into JSON as
//! Python's `json.dumps` writes it. Models were trained on exactly that text, so both matter.

use std::{fmt, io};

use minijinja::Value;
use serde::{
    Deserialize as _, Serialize as _,
    de::{self, MapAccess, Visitor},
};
use serde_json::{Serializer, ser::Formatter, value::RawValue};

pub(super) fn parse(raw: &RawValue) -> Result<Value, serde_json::Error> {
    serde_json::from_str(raw.get())
}

/// The members of an object; anything else is an error.
pub(super) fn parse_object(raw: &RawValue) -> Result<Vec<(String, Value)>, serde_json::Error> {
    let Members(members) = Members::deserialize(&mut serde_json::Deserializer::from_str(raw.get()))?;
    Ok(members)
}

struct Members(Vec<(String, Value)>);

impl<'de> de::Deserialize<'de> for Members {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Deepest nesting of a value that is written: more than any JSON that is read has, and little enough stack.
const DEPTH_MAX: usize = 512;

/// Why a value is not written.
#[derive(Debug)]
pub(super) enum DumpError {
    /// It takes more bytes than it may, or nests too deeply.
    TooLong,
    /// It has no JSON.
    Other(serde_json::Error),
}

/// `value` as `json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)` writes it, in `bytes_max`
/// bytes. (An indent makes 500 bytes of each in a deep list; a value that holds another twice, over and over, has no end.)
pub(super) fn dump(
    value: &Value,
    indent: Option<usize>,
    separators: Option<[String; 2]>,
    bytes_max: usize,
) -> Result<String, DumpError> {
    let [item, key] =
        separators.unwrap_or_else(|| [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()]);
    let mut text = Bounded { bytes: Vec::new(), bytes_max };
    let layout = PythonLayout { item, key, indent, depth: 0, empty: true };
    let written = value.serialize(&mut Serializer::with_formatter(&mut text, layout));
    written.map_err(|error| if error.is_io() { DumpError::TooLong } else { DumpError::Other(error) })?;
    Ok(String::from_utf8(text.bytes).expect("serde_json writes UTF-8"))
}

/// Fails to write what goes beyond its bound.
struct Bounded {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if more.len() > self.bytes_max - self.bytes.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const SPACES: &[u8] = &[b' '; 64];

struct PythonLayout {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    /// Whether the innermost container has no member yet.
    empty: bool,
}

impl PythonLayout {
    fn open<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        if self.depth > DEPTH_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        out.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.break_line(out)?;
        }
        self.empty = false;
        out.write_all(bracket)
    }

    fn member<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.empty = false;
        self.break_line(out)
    }

    fn break_line<W: ?Sized + io::Write>(&self, out: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => {
                out.write_all(b"\n")?;
                // Not as the width of a format, which panics beyond 65,535.
                let mut spaces = indent.saturating_mul(self.depth);
                while spaces > 0 {
                    let some = spaces.min(SPACES.len());
                    out.write_all(&SPACES[..some])?;
                    spaces -= some;
                }
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Formatter for PythonLayout {
    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }
    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.member(out, first)
    }
    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }
    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.member(out, first)
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
}
