//! The GGUF container, version 3: metadata, tensor directory, where each tensor's bytes lie.
//!
//! In: a reader and the file's length. Out: [`GgufMetadata`], every range of which lies within the file, or an error
//! that names the file and the byte. No input makes it panic, loop, or hold more memory than a few times the file.

mod reader;
mod tokenizer;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

pub use tokenizer::GgufTokenizer;

use crate::{
    ModelError,
    gguf::reader::Source,
    quant::{BLOCK, Encoding},
};

/// Entries of the metadata, tensors of a file: far more than any model has.
const ENTRIES_MAX: u64 = 65_536;
/// Dimensions of a tensor, as GGML has them.
const DIMENSIONS_MAX: u32 = 4;
const VERSION: u32 = 3;

/// What a GGUF file says about itself; no weights.
#[derive(Debug, Clone)]
pub struct GgufMetadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorEntry>,
}

/// One metadata value. Integers of any width are one kind, and so are floats.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

/// Where a tensor lies and how it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorEntry {
    /// Innermost first: `[inputs, outputs]` of a matrix.
    pub(crate) shape: Vec<u64>,
    /// GGUF's number of the encoding, which may be one that this engine does not read.
    pub(crate) kind: u32,
    /// From the start of the file.
    pub(crate) offset: u64,
    /// Length, if the encoding is known; then the range is within the file.
    pub(crate) bytes: Option<u64>,
}

impl GgufMetadata {
    /// Reads the metadata of a file, which takes milliseconds: a megabyte or two at its front.
    ///
    /// # Errors
    /// If the file cannot be read, is not GGUF 3, or is corrupt.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let (mut file, bytes) = open(path)?;
        Self::parse(&mut file, bytes, path)
    }

    /// A text value, such as `general.name`.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.values.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A whole number that is not negative, such as `llama.block_count`.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.values.get(key) {
            Some(Value::Integer(number)) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// A number with a fraction, such as `llama.rope.freq_base`.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.values.get(key) {
            Some(Value::Float(number)) => Some(*number),
            _ => None,
        }
    }

    /// A truth value, such as `tokenizer.ggml.add_bos_token`.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.values.get(key) {
            Some(Value::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }

    pub(crate) fn list(&self, key: &str) -> Option<&[Value]> {
        match self.values.get(key) {
            Some(Value::List(values)) => Some(values),
            _ => None,
        }
    }

    /// What the file says about its tokenizer.
    ///
    /// # Errors
    /// If the vocabulary is missing or not a list of texts.
    pub fn tokenizer(&self) -> Result<GgufTokenizer, ModelError> {
        GgufTokenizer::of(self)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    pub(crate) fn missing(&self, what: impl Into<String>) -> ModelError {
        ModelError::Missing { path: self.path.clone(), what: what.into() }
    }

    pub(crate) fn unsupported(&self, what: impl Into<String>) -> ModelError {
        ModelError::Unsupported { path: self.path.clone(), what: what.into() }
    }

    /// Parses the front of a file of `bytes` bytes.
    pub(crate) fn parse(reader: &mut dyn Read, bytes: u64, path: &Path) -> Result<Self, ModelError> {
        let mut source = Source::new(reader, bytes, path);
        if bytes < 4 || source.array::<4>("the magic")? != *b"GGUF" {
            return Err(ModelError::NotGguf { path: path.into() });
        }
        let version = source.u32("the version")?;
        if version != VERSION {
            let what = format!("it is GGUF version {version}, and this engine reads version {VERSION}");
            return Err(ModelError::Unsupported { path: path.into(), what });
        }
        let tensor_count = source.count("the number of tensors", ENTRIES_MAX)?;
        let value_count = source.count("the number of metadata entries", ENTRIES_MAX)?;
        let mut values = BTreeMap::new();
        for _ in 0..value_count {
            let key = source.text("a metadata key")?;
            let value = source.value(&key)?;
            values.insert(key, value);
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let name = source.text("a tensor's name")?;
            let entry = source.tensor(&name)?;
            tensors.insert(name, entry);
        }
        let mut metadata = Self { path: path.into(), values, tensors };
        metadata.place_tensors(&source)?;
        Ok(metadata)
    }

    /// Turns offsets within the data section into offsets within the file, and holds them to it.
    fn place_tensors(&mut self, source: &Source<'_>) -> Result<(), ModelError> {
        let alignment = self.unsigned("general.alignment").unwrap_or(32);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(source.corrupt(format!("the alignment of tensors is {alignment}")));
        }
        let data = source.offset().next_multiple_of(alignment);
        for (name, entry) in &mut self.tensors {
            if entry.offset % alignment != 0 {
                return Err(source.corrupt(format!("tensor {name} is not aligned to {alignment} bytes")));
            }
            let start = data.checked_add(entry.offset);
            let end = start.and_then(|start| start.checked_add(entry.bytes.unwrap_or(0)));
            match (start, end) {
                (Some(start), Some(end)) if end <= source.bytes() => entry.offset = start,
                _ => {
                    let what = format!(
                        "tensor {name} reaches beyond the end of the file, which has {} bytes",
                        source.bytes()
                    );
                    return Err(source.corrupt(what));
                }
            }
        }
        Ok(())
    }
}

impl TensorEntry {
    fn new(shape: Vec<u64>, kind: u32, offset: u64) -> Option<Self> {
        let numbers = shape.iter().try_fold(1_u64, |product, length| product.checked_mul(*length))?;
        let bytes = match Encoding::of_gguf(kind) {
            // Plain numbers may come in any count; encoded ones fill whole blocks.
            Some(Encoding::F32) => Some(numbers.checked_mul(4)?),
            Some(Encoding::F16) => Some(numbers.checked_mul(2)?),
            Some(encoding) => {
                let blocks = shape.first()?.is_multiple_of(BLOCK as u64).then_some(numbers / BLOCK as u64)?;
                Some(blocks.checked_mul(encoding.block_bytes() as u64)?)
            }
            None => None,
        };
        Some(Self { shape, kind, offset, bytes })
    }
}

/// Opens a model file; with its length.
pub(crate) fn open(path: &Path) -> Result<(BufReader<File>, u64), ModelError> {
    let open = |source| ModelError::Open { path: path.into(), source };
    let file = File::open(path).map_err(open)?;
    let metadata = file.metadata().map_err(open)?;
    if !metadata.is_file() {
        return Err(ModelError::NotGguf { path: path.into() });
    }
    Ok((BufReader::with_capacity(1 << 16, file), metadata.len()))
}

#[cfg(test)]
pub(crate) mod tests;
