//! Reads the vocabulary out of a GGUF file: just enough of the format for tests and examples of this crate, which
//! must not depend on the engine that owns the real reader.

#[allow(dead_code, reason = "not every test uses it")]
pub(crate) mod families;
#[allow(dead_code, reason = "not every test uses it")]
pub(crate) mod texts;

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

use forebay_text::GgufVocabulary;

/// Where the real model lies, or `None` (with a message) if it was not fetched. In CI its absence is a failure.
#[expect(clippy::disallowed_methods, reason = "a test has no settings: the user's cache folder")]
pub(crate) fn real_model() -> Option<PathBuf> {
    let home = std::env::var_os("HOME")?;
    let path = Path::new(&home).join(".cache/forebay/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.exists() {
        return Some(path);
    }
    missing(&path, "scripts/fetch-model.sh");
    None
}

/// Says which script fetches a file. In CI its absence is a failure.
#[expect(clippy::disallowed_methods, reason = "a test has no settings: CI's own mark")]
fn missing(path: &Path, script: &str) {
    let path = path.display();
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "no {path}: run {script} first");
    eprintln!("skipped: there is no {path}; {script} fetches it");
}

/// Reads the tokenizer's part of the metadata.
pub(crate) fn read_vocabulary(path: &Path) -> io::Result<GgufVocabulary> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    assert_eq!(&magic, b"GGUF");
    let _version = u32(&mut file)?;
    let _tensors = u64(&mut file)?;
    let mut vocabulary = GgufVocabulary::default();
    for _ in 0..u64(&mut file)? {
        let key = string(&mut file)?;
        let kind = u32(&mut file)?;
        let value = value(&mut file, kind)?;
        match (key.as_str(), value) {
            ("tokenizer.ggml.tokens", Value::Texts(tokens)) => vocabulary.tokens = tokens,
            ("tokenizer.ggml.merges", Value::Texts(merges)) => vocabulary.merges = merges,
            ("tokenizer.ggml.token_type", Value::Numbers(types)) => {
                vocabulary.token_types = types.into_iter().map(|kind| kind as i32).collect();
            }
            ("tokenizer.ggml.bos_token_id", Value::Number(id)) => vocabulary.bos = Some(id as u32),
            ("tokenizer.ggml.eos_token_id", Value::Number(id)) => vocabulary.eos = Some(id as u32),
            ("tokenizer.ggml.pre", Value::Text(pre)) => vocabulary.pre = Some(pre),
            ("tokenizer.ggml.add_bos_token", Value::Number(add)) => vocabulary.add_bos = add != 0,
            ("tokenizer.chat_template", Value::Text(template)) => vocabulary.chat_template = Some(template),
            _ => {}
        }
    }
    Ok(vocabulary)
}

enum Value {
    Text(String),
    Number(i64),
    Texts(Vec<String>),
    Numbers(Vec<i64>),
    Other,
}

fn value(file: &mut impl Read, kind: u32) -> io::Result<Value> {
    Ok(match kind {
        0 | 1 | 7 => Value::Number(i64::from(bytes::<1>(file)?[0])),
        2 | 3 => Value::Number(i64::from(u16::from_le_bytes(bytes(file)?))),
        4 => Value::Number(i64::from(u32(file)?)),
        5 => Value::Number(i64::from(i32::from_le_bytes(bytes(file)?))),
        10 | 11 => Value::Number(i64::from_le_bytes(bytes(file)?)),
        6 => drop_value(bytes::<4>(file)?),
        12 => drop_value(bytes::<8>(file)?),
        8 => Value::Text(string(file)?),
        9 => {
            let of = u32(file)?;
            let count = u64(file)?;
            let (mut texts, mut numbers) = (Vec::new(), Vec::new());
            for _ in 0..count {
                match value(file, of)? {
                    Value::Text(text) => texts.push(text),
                    Value::Number(number) => numbers.push(number),
                    _ => {}
                }
            }
            if of == 8 { Value::Texts(texts) } else { Value::Numbers(numbers) }
        }
        other => return Err(io::Error::other(format!("unknown GGUF value type {other}"))),
    })
}

fn drop_value<const N: usize>(_: [u8; N]) -> Value {
    Value::Other
}

fn bytes<const N: usize>(file: &mut impl Read) -> io::Result<[u8; N]> {
    let mut buffer = [0; N];
    file.read_exact(&mut buffer)?;
    Ok(buffer)
}

fn u32(file: &mut impl Read) -> io::Result<u32> {
    Ok(u32::from_le_bytes(bytes(file)?))
}

fn u64(file: &mut impl Read) -> io::Result<u64> {
    Ok(u64::from_le_bytes(bytes(file)?))
}

fn string(file: &mut impl Read) -> io::Result<String> {
    let length = u64(file)?;
    let mut buffer = vec![0; length as usize];
    file.read_exact(&mut buffer)?;
    String::from_utf8(buffer).map_err(io::Error::other)
}
