//! Bounded reading of GGUF's primitives: every length is held against what is left of the file before it is believed.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::{DIMENSIONS_MAX, TensorEntry, Value};
use crate::ModelError;

/// Items of one list: 16 times the largest vocabulary in use.
const ITEMS_MAX: u64 = 1 << 22;
/// Lists within lists. Files in use have one level.
const DEPTH_MAX: u32 = 3;

pub(super) struct Source<'a> {
    reader: &'a mut dyn Read,
    bytes: u64,
    offset: u64,
    path: PathBuf,
}

impl<'a> Source<'a> {
    pub(super) fn new(reader: &'a mut dyn Read, bytes: u64, path: &Path) -> Self {
        Self { reader, bytes, offset: 0, path: path.into() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    fn left(&self) -> u64 {
        self.bytes - self.offset
    }

    pub(super) fn corrupt(&self, what: impl Into<String>) -> ModelError {
        ModelError::Corrupt { path: self.path.clone(), offset: self.offset, what: what.into() }
    }

    fn failed(&self, what: &str, source: io::Error) -> ModelError {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return self.corrupt(format!("the file ends within {what}"));
        }
        ModelError::Read { path: self.path.clone(), source }
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let mut bytes = [0; N];
        if self.left() < N as u64 {
            return Err(self.corrupt(format!("the file ends within {what}")));
        }
        self.reader.read_exact(&mut bytes).map_err(|source| self.failed(what, source))?;
        self.offset += N as u64;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(super) fn count(&mut self, what: &str, most: u64) -> Result<u64, ModelError> {
        let count = self.u64(what)?;
        if count > most {
            return Err(self.corrupt(format!("{what} is {count}, more than {most}")));
        }
        Ok(count)
    }

    pub(super) fn text(&mut self, what: &str) -> Result<String, ModelError> {
        let length = self.u64(what)?;
        if length > self.left() {
            let left = self.left();
            return Err(self.corrupt(format!("{what} has {length} bytes, and the file only {left} more")));
        }
        let mut bytes = Vec::new();
        let read = (&mut *self.reader).take(length).read_to_end(&mut bytes);
        let read = read.map_err(|source| self.failed(what, source))? as u64;
        if read != length {
            return Err(self.corrupt(format!("the file ends within {what}")));
        }
        self.offset += length;
        String::from_utf8(bytes).map_err(|_| self.corrupt(format!("{what} is not UTF-8")))
    }

    /// A metadata value with its type in front.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, ModelError> {
        let kind = self.u32(key)?;
        self.value_of(kind, key, 0)
    }

    fn value_of(&mut self, kind: u32, key: &str, depth: u32) -> Result<Value, ModelError> {
        let integer = |number: i128| Ok(Value::Integer(number));
        match kind {
            0 => integer(u8::from_le_bytes(self.array(key)?).into()),
            1 => integer(i8::from_le_bytes(self.array(key)?).into()),
            2 => integer(u16::from_le_bytes(self.array(key)?).into()),
            3 => integer(i16::from_le_bytes(self.array(key)?).into()),
            4 => integer(u32::from_le_bytes(self.array(key)?).into()),
            5 => integer(i32::from_le_bytes(self.array(key)?).into()),
            6 => Ok(Value::Float(f32::from_le_bytes(self.array(key)?).into())),
            7 => Ok(Value::Bool(self.array::<1>(key)? != [0])),
            8 => self.text(key).map(Value::Text),
            9 => self.list(key, depth),
            10 => integer(u64::from_le_bytes(self.array(key)?).into()),
            11 => integer(i64::from_le_bytes(self.array(key)?).into()),
            12 => Ok(Value::Float(f64::from_le_bytes(self.array(key)?))),
            other => Err(self.corrupt(format!("{key} has the unknown type {other}"))),
        }
    }

    fn list(&mut self, key: &str, depth: u32) -> Result<Value, ModelError> {
        if depth >= DEPTH_MAX {
            return Err(self.corrupt(format!("{key} nests lists more than {DEPTH_MAX} deep")));
        }
        let kind = self.u32(key)?;
        let count = self.count(key, ITEMS_MAX)?;
        // Every item takes at least a byte, so a false count is noticed before it costs anything.
        if count > self.left() {
            return Err(self.corrupt(format!("{key} has {count} items, more than the file has bytes left")));
        }
        let mut values = Vec::new();
        for _ in 0..count {
            values.push(self.value_of(kind, key, depth + 1)?);
        }
        Ok(Value::List(values))
    }

    /// A tensor's entry in the directory; its offset still counts from the data section.
    pub(super) fn tensor(&mut self, name: &str) -> Result<TensorEntry, ModelError> {
        let dimensions = self.u32(name)?;
        if dimensions == 0 || dimensions > DIMENSIONS_MAX {
            return Err(self.corrupt(format!("tensor {name} has {dimensions} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64(name)?);
        }
        let kind = self.u32(name)?;
        let offset = self.u64(name)?;
        TensorEntry::new(shape.clone(), kind, offset)
            .ok_or_else(|| self.corrupt(format!("tensor {name} cannot have the shape {shape:?}")))
    }
}
