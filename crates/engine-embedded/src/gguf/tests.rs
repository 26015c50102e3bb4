use std::io::Cursor;

use proptest::prelude::*;

use super::*;

/// Writes GGUF files, right ones and wrong ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Builder {
    values: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Builder {
    fn value(mut self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        self.values.retain(|(old, _)| old != key);
        self.values.push((key.into(), [&kind.to_le_bytes(), bytes].concat()));
        self
    }

    pub(crate) fn number(self, key: &str, number: u32) -> Self {
        self.value(key, 4, &number.to_le_bytes())
    }

    pub(crate) fn float(self, key: &str, number: f32) -> Self {
        self.value(key, 6, &number.to_le_bytes())
    }

    pub(crate) fn text(self, key: &str, value: &str) -> Self {
        self.value(key, 8, &text(value))
    }

    pub(crate) fn texts(self, key: &str, values: &[String]) -> Self {
        let items: Vec<u8> = values.iter().flat_map(|value| text(value)).collect();
        self.value(key, 9, &[&8_u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes(), &items].concat())
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.values.retain(|(old, _)| old != key);
        self.tensors.retain(|(old, ..)| old != key);
        self
    }

    /// Adds a tensor, or replaces the one of that name.
    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], kind: u32, bytes: Vec<u8>) -> Self {
        self.tensors.retain(|(old, ..)| old != name);
        self.tensors.push((name.into(), shape.to_vec(), kind, bytes));
        self
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            file.extend(text(key));
            file.extend(value);
        }
        let mut data: Vec<u8> = Vec::new();
        for (name, shape, kind, bytes) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            file.extend(text(name));
            file.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|length| file.extend(length.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        file
    }
}

/// A small sound file.
fn small() -> Vec<u8> {
    Builder::default()
        .text("general.name", "small")
        .number("llama.block_count", 2)
        .float("llama.rope.freq_base", 10_000.0)
        .value("tokenizer.ggml.add_bos_token", 7, &[1])
        .texts("tokenizer.ggml.tokens", &["a".into(), "Ġb".into()])
        .number("tokenizer.ggml.bos_token_id", 1)
        .number("tokenizer.ggml.eos_token_id", 7)
        .tensor("one", &[32, 3], 8, vec![7; 34 * 3])
        .tensor("two", &[5], 0, vec![1; 20])
        .tensor("exotic", &[256], 99, vec![0; 40])
        .build()
}

fn parse(bytes: &[u8]) -> Result<GgufMetadata, ModelError> {
    GgufMetadata::parse(&mut Cursor::new(bytes), bytes.len() as u64, Path::new("small.gguf"))
}

#[test]
fn a_sound_file_tells_what_it_holds() {
    let file = small();
    let metadata = parse(&file).expect("sound");
    assert_eq!(metadata.text("general.name"), Some("small"));
    assert_eq!(metadata.unsigned("llama.block_count"), Some(2));
    assert_eq!(metadata.float("llama.rope.freq_base"), Some(10_000.0));
    assert_eq!(metadata.text("llama.block_count"), None);
    let tokenizer = metadata.tokenizer().expect("has one");
    assert_eq!(tokenizer.tokens, ["a", "Ġb"]);
    assert_eq!((tokenizer.bos, tokenizer.eos), (Some(1), None), "an id outside the vocabulary is none");
    assert!(tokenizer.add_bos && tokenizer.merges.is_empty());
    let one = &metadata.tensors()["one"];
    assert_eq!(one.bytes, Some(102));
    assert_eq!(file[one.offset as usize..][..102], [7; 102]);
    assert_eq!(metadata.tensors()["exotic"].bytes, None);
}

#[test]
fn wrong_files_are_refused_with_a_reason() {
    let check = |what: &str, bytes: &[u8], part: &str| {
        let error = parse(bytes).expect_err(what).to_string();
        assert!(error.contains("small.gguf") && error.contains(part), "{what}: {error}");
    };
    check("empty", b"", "not a GGUF file");
    check("something else", b"PK\x03\x04 and more", "not a GGUF file");
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = small();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    check("another version", &patched(4, &[2]), "version 2");
    check("too many tensors", &patched(8, &[255; 8]), "the number of tensors");
    check("a key longer than the file", &patched(24, &[255; 4]), "a metadata key has 4294967295 bytes");
    let build = |builder: Builder| builder.build();
    let plain = Builder::default();
    check("an unknown type", &build(plain.clone().value("k", 77, &[])), "k has the unknown type 77");
    check("no UTF-8", &build(plain.clone().value("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 255])), "not UTF-8");
    let deep = [9_u32.to_le_bytes(); 8].concat();
    let list = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let nested = [list(9, 1), list(9, 1), list(9, 1), deep].concat();
    check("lists in lists", &build(plain.clone().value("k", 9, &nested)), "nests lists");
    check("a list longer than the file", &build(plain.clone().value("k", 9, &list(0, 5_000))), "5000 items");
    check("no dimensions", &build(plain.clone().tensor("t", &[], 0, vec![])), "0 dimensions");
    check("too large", &build(plain.clone().tensor("t", &[1 << 40, 1 << 40], 0, vec![])), "cannot have");
    check("no whole blocks", &build(plain.clone().tensor("t", &[33], 8, vec![0; 99])), "cannot have");
    check("beyond the end", &build(plain.clone().tensor("t", &[1 << 20], 0, vec![0; 99])), "beyond the end");
    check("odd alignment", &build(plain.number("general.alignment", 33)), "alignment");
}

#[test]
fn every_shorter_file_is_an_error() {
    let file = small();
    // The last tensor's encoding is unknown, and so is its length: the two before it are what must be there.
    let end = {
        let metadata = parse(&file).expect("sound");
        let two = &metadata.tensors()["two"];
        (two.offset + 20) as usize
    };
    for length in 0..end {
        let error = parse(&file[..length]).expect_err("it is cut short").to_string();
        assert!(error.contains("small.gguf"), "{error}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = parse(&bytes);
        let _ = parse(&[&small()[..24], &bytes].concat());
    }

    #[test]
    fn no_damage_makes_it_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        let mut file = small();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(metadata) = parse(&file) {
            let _ = metadata.tokenizer();
            for tensor in metadata.tensors().values() {
                prop_assert!(tensor.offset + tensor.bytes.unwrap_or(0) <= file.len() as u64);
            }
        }
    }
}
