//! What each token stands for. Both back ends know it too, but as strings in an alphabet of their own, and this is
//! looked up for every generated token.

use std::collections::BTreeMap;

use forebay_types::TokenId;
use serde_json::Value;

use super::LoadError;

/// Ids above this are a broken file, not a vocabulary (the largest known have 262,144 tokens).
const TOKEN_ID_MAX: TokenId = 4_000_000;

/// The bytes of all tokens in one allocation.
#[derive(Debug)]
pub(super) struct Vocabulary {
    /// Token `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Box<[u32]>,
    bytes: Box<[u8]>,
    special: Box<[bool]>,
    added: BTreeMap<String, TokenId>,
}

impl Vocabulary {
    pub(super) fn builder(size: usize) -> Builder {
        Builder { tokens: vec![Vec::new(); size], special: vec![false; size], added: BTreeMap::new() }
    }

    /// Reads the `model.vocab`, `added_tokens` and `decoder` of a `tokenizer.json`.
    pub(super) fn from_json(json: &Value) -> Result<Self, LoadError> {
        let alphabet = Alphabet::of(json)?;
        let vocab = &json["model"]["vocab"];
        let mut tokens: Vec<(TokenId, &str)> = Vec::new();
        match vocab {
            Value::Object(vocab) => {
                for (text, id) in vocab {
                    tokens.push((token_id(id, "model.vocab")?, text));
                }
            }
            Value::Array(vocab) => {
                for (id, piece) in (0..).zip(vocab) {
                    let text = piece[0].as_str().ok_or(MALFORMED_VOCAB)?;
                    tokens.push((id, text));
                }
            }
            _ => return Err(MALFORMED_VOCAB),
        }
        let mut added = Vec::new();
        for token in json["added_tokens"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let id = token_id(&token["id"], "added_tokens[].id")?;
            let text = token["content"]
                .as_str()
                .ok_or(LoadError::Field { field: "added_tokens[].content", expected: "a string" })?;
            added.push((id, text, token["special"].as_bool().unwrap_or(false)));
        }
        let ids = tokens.iter().map(|&(id, _)| id).chain(added.iter().map(|&(id, ..)| id));
        let size = ids.max().map_or(0, |id| id as usize + 1);
        let mut builder = Self::builder(size);
        for (id, text) in tokens {
            builder.token(id, alphabet.bytes(text));
        }
        for (id, text, special) in added {
            builder.added(id, text, special);
        }
        Ok(builder.build())
    }

    pub(super) fn size(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn bytes(&self, token: TokenId) -> &[u8] {
        let index = token as usize;
        match self.ends.get(index) {
            Some(&end) => {
                let start = if index == 0 { 0 } else { self.ends[index - 1] };
                &self.bytes[start as usize..end as usize]
            }
            None => &[],
        }
    }

    pub(super) fn is_special(&self, token: TokenId) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }

    pub(super) fn added(&self, text: &str) -> Option<TokenId> {
        self.added.get(text).copied()
    }

    /// The texts of added tokens, in order.
    pub(super) fn added_texts(&self) -> impl Iterator<Item = &str> {
        self.added.keys().map(String::as_str)
    }

    pub(super) fn plain(&self) -> Vec<TokenId> {
        let printable = |text: &str| {
            !text.is_empty() && !text.chars().any(|c| c.is_control() || c == char::REPLACEMENT_CHARACTER)
        };
        (0..)
            .take(self.size())
            .filter(|&token| !self.is_special(token))
            .filter(|&token| str::from_utf8(self.bytes(token)).is_ok_and(printable))
            .collect()
    }
}

const MALFORMED_VOCAB: LoadError = LoadError::Field {
    field: "model.vocab",
    expected: "an object of ids by text, or an array of [text, score]",
};

fn token_id(id: &Value, field: &'static str) -> Result<TokenId, LoadError> {
    let id = id.as_u64().and_then(|id| TokenId::try_from(id).ok()).filter(|&id| id <= TOKEN_ID_MAX);
    id.ok_or(LoadError::Field { field, expected: "a token id (0 to 4,000,000)" })
}

/// Collects tokens in any order.
pub(super) struct Builder {
    tokens: Vec<Vec<u8>>,
    special: Vec<bool>,
    added: BTreeMap<String, TokenId>,
}

impl Builder {
    pub(super) fn token(&mut self, id: TokenId, bytes: Vec<u8>) {
        self.tokens[id as usize] = bytes;
    }

    /// A token whose text is recognised before anything else. Its text is itself, in no alphabet.
    pub(super) fn added(&mut self, id: TokenId, text: &str, special: bool) {
        self.token(id, text.as_bytes().to_vec());
        self.special[id as usize] = special;
        self.added.insert(text.to_owned(), id);
    }

    /// A special token without text.
    pub(super) fn reserved(&mut self, id: TokenId) {
        self.special[id as usize] = true;
    }

    pub(super) fn build(self) -> Vocabulary {
        let mut end = 0_usize;
        let ends = self.tokens.iter().map(|token| {
            end += token.len();
            u32::try_from(end).expect("a vocabulary has far less than 4 GiB")
        });
        Vocabulary {
            ends: ends.collect(),
            bytes: self.tokens.concat().into(),
            special: self.special.into(),
            added: self.added,
        }
    }
}

/// How a vocabulary writes bytes as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    /// GPT-2's: every byte is a printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte.
    ByteFallback,
}

impl Alphabet {
    fn of(json: &Value) -> Result<Self, LoadError> {
        let decoder = &json["decoder"];
        let kind = |kind: &str| {
            let in_sequence = decoder["decoders"].as_array().map(Vec::as_slice).unwrap_or_default();
            decoder["type"] == kind || in_sequence.iter().any(|decoder| decoder["type"] == kind)
        };
        if kind("ByteLevel") {
            Ok(Self::ByteLevel)
        } else if kind("ByteFallback") || kind("Metaspace") {
            Ok(Self::ByteFallback)
        } else {
            let name = decoder["type"].as_str().unwrap_or("none");
            Err(LoadError::Unsupported { what: format!("the decoder {name}") })
        }
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            // A token with characters outside the alphabet stands for itself, as in `tokenizers`.
            Self::ByteLevel => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of_letter).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::ByteFallback => match fallback_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

/// `<0x0A>` is the byte 10.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a letter of GPT-2's alphabet stands for: printable Latin-1 characters stand for themselves, and the
/// 68 other bytes, in order, are the characters from U+0100 on.
fn byte_of_letter(letter: char) -> Option<u8> {
    const OTHERS: [u8; 68] = other_bytes();
    let code = u32::from(letter);
    match code.checked_sub(0x100) {
        Some(index) => OTHERS.get(index as usize).copied(),
        None => u8::try_from(code).ok().filter(|&byte| stands_for_itself(byte)),
    }
}

const fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff)
}

const fn other_bytes<const N: usize>() -> [u8; N] {
    let mut others = [0; N];
    let (mut byte, mut count) = (0_u8, 0);
    while count < N {
        if !stands_for_itself(byte) {
            others[count] = byte;
            count += 1;
        }
        byte += 1;
    }
    others
}
