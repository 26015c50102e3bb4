//! The top-level fields of a JSON object, without a tree of what is in them.
//!
//! In: a client's body. Out: its fields in order, each value as the bytes that it was, to look at, take out, replace and
//! write again. Start at [`Object::parse`], which reads the body once. A long conversation is a range of bytes here.
//!
//! Invariants: what was parsed is JSON, nests no deeper than engines can read, has no halves of characters, and means one
//! thing: no field comes twice.

mod scan;

use std::{fmt, ops::Range};

use bytes::Bytes;

use scan::Scan;

/// Fields that one body may have. OpenAI's chat requests have about 40.
const FIELDS_MAX: usize = 256;

/// Of a field's name in an error.
const NAME_CHARS_MAX: usize = 64;

/// Deepest nesting, the object included. Engines parse with functions that call themselves.
const DEPTH_MAX: u32 = 128;

/// Where in a text, from 1, the column in bytes: as serde_json says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    line: usize,
    column: usize,
}

impl Place {
    fn of(json: &[u8], at: usize) -> Self {
        let before = &json[..at.min(json.len())];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
        Self { line, column }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} column {}", self.line, self.column)
    }
}

/// Why a body is no object that could be passed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// It is no text.
    #[error("the body is not UTF-8 at {place}")]
    Encoding {
        /// Of the first byte that is part of no character.
        place: Place,
    },
    /// It is no JSON, or no object.
    #[error("{expected} is expected at {place}")]
    Syntax {
        /// In a word or two.
        expected: &'static str,
        /// Where.
        place: Place,
    },
    /// It would overflow the stack of a parser that calls itself.
    #[error("the body nests deeper than {DEPTH_MAX} levels at {place}; nest less")]
    Deep {
        /// Of the bracket that is one too many.
        place: Place,
    },
    /// It holds half of a character, which has no encoding.
    #[error(
        "`\\u{unit:04x}` at {place} is half of a surrogate pair and no character; leave it out or send both halves"
    )]
    Surrogate {
        /// The half.
        unit: u16,
        /// Of its escape.
        place: Place,
    },
    /// Engines and we might each believe another of the two.
    #[error("the field `{name}` comes twice")]
    Twice {
        /// Its name, or how it begins.
        name: String,
    },
    /// More than any request needs.
    #[error("the body has more than {FIELDS_MAX} fields")]
    TooMany,
}

/// The fields of one object.
#[derive(Debug, Clone)]
pub struct Object {
    json: Bytes,
    fields: Vec<Field>,
}

#[derive(Debug, Clone)]
struct Field {
    /// Where it is written, with its quotation marks.
    name: Range<usize>,
    /// What that spells, where it is written with escapes.
    spelt: Option<Box<str>>,
    value: Range<usize>,
}

impl Object {
    /// The fields of `json`, which must be one object.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn parse(json: impl Into<Bytes>) -> Result<Self, Flaw> {
        let json = json.into();
        if let Err(error) = std::str::from_utf8(&json) {
            return Err(Flaw::Encoding { place: Place::of(&json, error.valid_up_to()) });
        }
        let mut scan = Scan::new(&json);
        if !scan.take(b'{') {
            return Err(scan.expected("an object"));
        }
        let mut object = Self { json: json.clone(), fields: Vec::with_capacity(8) };
        let mut goes_on = !scan.take(b'}');
        while goes_on {
            let (name, value) = (scan.key()?, scan.value()?);
            object.push(name, value)?;
            goes_on = scan.take(b',');
            if !goes_on && !scan.take(b'}') {
                return Err(scan.expected("`,` or `}`"));
            }
        }
        match scan.peek() {
            None => Ok(object),
            Some(_) => Err(scan.expected("nothing more")),
        }
    }

    fn push(&mut self, name: Range<usize>, value: Range<usize>) -> Result<(), Flaw> {
        if self.fields.len() == FIELDS_MAX {
            return Err(Flaw::TooMany);
        }
        let written = &self.json[name.clone()];
        let spelt = written.contains(&b'\\').then(|| serde_json::from_slice(written));
        let spelt = spelt.transpose().expect("a string that was scanned is one");
        let field = Field { name, spelt, value };
        let name = self.name(&field);
        if self.fields.iter().any(|known| self.name(known) == name) {
            let name = String::from_utf8_lossy(name);
            let cut = name.chars().count() > NAME_CHARS_MAX;
            let name = name.chars().take(NAME_CHARS_MAX).chain(cut.then_some('…')).collect();
            return Err(Flaw::Twice { name });
        }
        self.fields.push(field);
        Ok(())
    }

    fn name<'a>(&'a self, field: &'a Field) -> &'a [u8] {
        match &field.spelt {
            Some(spelt) => spelt.as_bytes(),
            None => &self.json[field.name.start + 1..field.name.end - 1],
        }
    }

    /// A field's value as JSON text.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.entries().find(|(known, _)| *known == name.as_bytes()).map(|(_, value)| value)
    }

    fn entries(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|field| (self.name(field), &self.json[field.value.clone()]))
    }

    /// Takes a field out; whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        let found = self.fields.iter().position(|field| self.name(field) == name.as_bytes());
        found.map(|at| self.fields.remove(at)).is_some()
    }

    /// The object as JSON, with changes: fields that were there keep their places, new ones come last.
    pub fn with(&self, mut changes: Vec<(&str, Change)>) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.json.len() + 256);
        for field in &self.fields {
            let name = self.name(field);
            match changes.iter().position(|(changed, _)| changed.as_bytes() == name) {
                None => self.write(&mut out, field, &self.json[field.value.clone()]),
                Some(at) => {
                    if let Change::Set(json) | Change::Replace(json) = changes.remove(at).1 {
                        self.write(&mut out, field, json.as_bytes());
                    }
                }
            }
        }
        for (name, change) in changes {
            if let Change::Set(json) = change {
                begin(&mut out);
                serde_json::to_writer(&mut out, name).expect("a text is JSON");
                out.push(b':');
                out.extend_from_slice(json.as_bytes());
            }
        }
        if out.is_empty() {
            out.push(b'{');
        }
        out.push(b'}');
        out
    }

    fn write(&self, out: &mut Vec<u8>, field: &Field, value: &[u8]) {
        begin(out);
        out.extend_from_slice(&self.json[field.name.clone()]);
        out.push(b':');
        out.extend_from_slice(value);
    }
}

fn begin(out: &mut Vec<u8>) {
    out.push(if out.is_empty() { b'{' } else { b',' });
}

/// Equal where the same fields hold the same text in the same order.
impl PartialEq for Object {
    fn eq(&self, other: &Self) -> bool {
        self.entries().eq(other.entries())
    }
}

/// What becomes of a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It holds this JSON.
    Set(String),
    /// If it is there, it holds this JSON.
    Replace(String),
    /// It is not there.
    Remove,
}

#[cfg(test)]
mod tests;
