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

/// `value` as `json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)` writes it.
pub(super) fn dump(
    value: &Value,
    indent: Option<usize>,
    separators: Option<[String; 2]>,
) -> Result<String, serde_json::Error> {
    let [item, key] =
        separators.unwrap_or_else(|| [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()]);
    let mut text = Vec::new();
    let layout = PythonLayout { item, key, indent, depth: 0, empty: true };
    value.serialize(&mut Serializer::with_formatter(&mut text, layout))?;
    Ok(String::from_utf8(text).expect("serde_json writes UTF-8"))
}

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
            Some(indent) => write!(out, "\n{:1$}", "", indent * self.depth),
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
