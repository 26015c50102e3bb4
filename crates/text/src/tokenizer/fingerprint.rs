//! The identity of a tokenizer.

use std::fmt;

use forebay_types::TokenId;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::vocabulary::Vocabulary;

/// 128 bits of SHA-256 over everything that decides which tokens a text has and which text tokens have. Printed as 32
/// hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 16]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

pub(super) fn of_bytes(vocabulary: &Vocabulary) -> Fingerprint {
    let mut hash = Sha256::new();
    hash.update(b"bytes");
    absorb_vocabulary(&mut hash, vocabulary);
    finish(hash)
}

/// Of a `tokenizer.json`: its rules, and `vocabulary` in place of its tables.
pub(super) fn of_json(json: &Value, vocabulary: &Vocabulary) -> Fingerprint {
    let mut hash = Sha256::new();
    hash.update(b"json");
    absorb_vocabulary(&mut hash, vocabulary);
    for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"] {
        absorb(&mut hash, &json[part]);
    }
    if let Value::Object(model) = &json["model"] {
        let mut settings: Vec<_> = model.iter().filter(|(name, _)| *name != "vocab").collect();
        settings.sort_by_key(|(name, _)| *name);
        for (name, value) in settings {
            absorb_text(&mut hash, name);
            if name == "merges" { absorb_merges(&mut hash, value) } else { absorb(&mut hash, value) }
        }
    }
    finish(hash)
}

fn finish(hash: Sha256) -> Fingerprint {
    let digest = hash.finalize();
    Fingerprint(digest[..16].try_into().expect("SHA-256 has 32 bytes"))
}

fn absorb_vocabulary(hash: &mut Sha256, vocabulary: &Vocabulary) {
    for token in (0..).take(vocabulary.size()) {
        let token: TokenId = token;
        let bytes = vocabulary.bytes(token);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
        hash.update([u8::from(vocabulary.is_special(token))]);
    }
}

/// Merges are written as `"a b"` or as `["a", "b"]`; both mean the same.
fn absorb_merges(hash: &mut Sha256, merges: &Value) {
    for merge in merges.as_array().map(Vec::as_slice).unwrap_or_default() {
        match merge {
            Value::Array(pair) if pair.len() == 2 => {
                hash.update(pair[0].as_str().unwrap_or_default());
                hash.update(b" ");
                hash.update(pair[1].as_str().unwrap_or_default());
            }
            merge => hash.update(merge.as_str().unwrap_or_default()),
        }
        hash.update(b"\n");
    }
}

/// Absorbs `value` unambiguously and independently of the order of members.
fn absorb(hash: &mut Sha256, value: &Value) {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(name, _)| *name);
            hash.update(b"{");
            for (name, value) in members {
                absorb_text(hash, name);
                absorb(hash, value);
            }
            hash.update(b"}");
        }
        Value::Array(items) => {
            hash.update(b"[");
            items.iter().for_each(|item| absorb(hash, item));
            hash.update(b"]");
        }
        Value::String(text) => absorb_text(hash, text),
        other => absorb_text(hash, &other.to_string()),
    }
}

fn absorb_text(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
}
