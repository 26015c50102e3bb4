//! Reads a `tokenizer.json`, and refuses whatever is not known to be reproduced exactly.
//!
//! Invariant: a field that changes tokens is either understood or an [`Unsupported`]. Patterns are compared as text:
//! one that differs in a character is another pattern.

use std::collections::HashMap;

use serde_json::Value;

use crate::{
    Token, Unsupported,
    added::{AddedToken, Finder},
    cuts::holds_a_place,
    merges::{MERGES_MAX, TOKEN_BITS},
    model::{Alphabet, Model, code},
    normal::{Nfc, Normalizer, SPACE_MARK},
    split::{DeepSeek, Gpt2, Llama, O200k, Splitter},
};

/// Four times the largest vocabulary that is known.
const TOKEN_MAX: Token = 1 << TOKEN_BITS;

/// All that encoding needs.
pub(crate) struct Definition {
    pub(crate) added: Option<Finder>,
    /// Added tokens that are looked for in normalised text.
    pub(crate) added_normalized: Option<Finder>,
    /// Words may be cut from each other: see [`crate::cuts`].
    pub(crate) cuts_between_words: bool,
    pub(crate) normalizer: Normalizer,
    pub(crate) splitter: Splitter,
    pub(crate) model: Model,
}

/// How a vocabulary writes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writing {
    /// Each byte as a letter of GPT-2's alphabet.
    ByteLevel,
    /// As text; spaces as `▁`.
    SpaceMarks,
}

impl Definition {
    pub(crate) fn read(json: &Value) -> Result<Self, Unsupported> {
        let normalizer = normalizer(&json["normalizer"])?;
        let (splitter, writing) = splitter(&json["pre_tokenizer"])?;
        let marks = matches!(normalizer, Normalizer::SpaceMark);
        if (writing == Writing::SpaceMarks) != marks {
            return Err(Unsupported::new("this normalizer with this pre-tokenizer"));
        }
        let vocabulary = vocabulary(&json["model"]["vocab"])?;
        let model = model(&json["model"], &vocabulary, writing)?;
        let (added, added_normalized) = added_tokens(&json["added_tokens"], &vocabulary, &normalizer)?;
        let cuts_between_words =
            added_normalized.as_ref().is_none_or(|finder| !finder.tokens().iter().any(holds_a_place));
        Ok(Self { added, added_normalized, cuts_between_words, normalizer, splitter, model })
    }
}

fn normalizer(json: &Value) -> Result<Normalizer, Unsupported> {
    if json.is_null() {
        return Ok(Normalizer::Nothing);
    }
    let unknown = || Unsupported::new(format!("the normalizer {}", shortened(json)));
    match json["type"].as_str() {
        Some("NFC") => Ok(Normalizer::Nfc(Nfc::new())),
        Some("Replace") if json["pattern"]["String"] == " " && json["content"] == SPACE_MARK => {
            Ok(Normalizer::SpaceMark)
        }
        Some("Sequence") => match json["normalizers"].as_array().map(Vec::as_slice) {
            Some([]) => Ok(Normalizer::Nothing),
            Some([one]) => normalizer(one),
            _ => Err(unknown()),
        },
        _ => Err(unknown()),
    }
}

/// The patterns of which a rule was written. What they match covers every text, except DeepSeek's.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_NUMBERS: &str = r"\p{N}{1,3}";
const DEEPSEEK_CJK: &str = "[一-龥\u{3040}-ゟ゠-ヿ]+";
const DEEPSEEK_WORDS: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";

fn splitter(json: &Value) -> Result<(Splitter, Writing), Unsupported> {
    let unknown = || Unsupported::new(format!("the pre-tokenizer {}", shortened(json)));
    let steps = match json["type"].as_str() {
        Some("Sequence") => json["pretokenizers"].as_array().map(Vec::as_slice).ok_or_else(unknown)?,
        Some(_) => std::slice::from_ref(json),
        None if json.is_null() => return Ok((Splitter::Whole, Writing::SpaceMarks)),
        None => return Err(unknown()),
    };
    // The normalizer left no space to split at.
    if let [step] = steps
        && step["type"] == "Split"
        && step["pattern"]["String"] == " "
        && step["invert"] == false
    {
        return Ok((Splitter::Whole, Writing::SpaceMarks));
    }
    let Some((bytes, splits)) = steps.split_last() else { return Err(unknown()) };
    if bytes["type"] != "ByteLevel" || bytes["add_prefix_space"] != false {
        return Err(unknown());
    }
    let splitter = if bytes["use_regex"] == false {
        let patterns: Option<Vec<(&str, bool)>> = splits.iter().map(pattern).collect();
        match patterns.as_deref() {
            Some([(LLAMA_3, _)]) => Splitter::Llama(Llama::new(3)),
            Some([(QWEN_2, _)]) => Splitter::Llama(Llama::new(1)),
            Some([(O200K, _)]) => Splitter::O200k(O200k::new(3, true)),
            Some([(TEKKEN, _)]) => Splitter::O200k(O200k::new(1, false)),
            Some([(DEEPSEEK_NUMBERS, true), (DEEPSEEK_CJK, true), (DEEPSEEK_WORDS, true)]) => {
                Splitter::DeepSeek(DeepSeek::new())
            }
            _ => return Err(unknown()),
        }
    } else {
        match splits {
            [] => Splitter::Gpt2(Gpt2::new(false)),
            [digits] if digits["type"] == "Digits" && digits["individual_digits"] == true => {
                Splitter::Gpt2(Gpt2::new(true))
            }
            _ => return Err(unknown()),
        }
    };
    Ok((splitter, Writing::ByteLevel))
}

/// The regular expression of a split, and whether what it does not match is kept.
fn pattern(step: &Value) -> Option<(&str, bool)> {
    let keeps = match (step["behavior"].as_str()?, step["invert"].as_bool()?) {
        ("Isolated", _) => true,
        ("Removed", true) => false,
        _ => return None,
    };
    (step["type"] == "Split").then_some((step["pattern"]["Regex"].as_str()?, keeps))
}

/// Tokens by their text, as the file writes it.
type Texts<'a> = HashMap<&'a str, Token>;

/// Tokens with the bytes of the words that they stand for.
type Words = Vec<(Token, Vec<u8>)>;

fn vocabulary(json: &Value) -> Result<Texts<'_>, Unsupported> {
    let json = json.as_object().ok_or_else(|| Unsupported::new("a vocabulary that is no object"))?;
    let mut ids = Vec::with_capacity(json.len());
    let mut texts = Texts::with_capacity(json.len());
    for (text, id) in json {
        let id = token(id).ok_or_else(|| Unsupported::new(format!("the id {id} of {text:?}")))?;
        ids.push(id);
        texts.insert(text, id);
    }
    ids.sort_unstable();
    if ids.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Unsupported::new("two tokens of one id"));
    }
    Ok(texts)
}

fn token(id: &Value) -> Option<Token> {
    id.as_u64().and_then(|id| Token::try_from(id).ok()).filter(|&id| id < TOKEN_MAX)
}

fn model(json: &Value, texts: &Texts<'_>, writing: Writing) -> Result<Model, Unsupported> {
    let nothing = |value: &Value| value.is_null() || value == "";
    if json["type"] != "BPE" {
        return Err(Unsupported::new(format!("the model {}", shortened(&json["type"]))));
    }
    if !json["dropout"].is_null() {
        return Err(Unsupported::new("dropout"));
    }
    if !nothing(&json["continuing_subword_prefix"]) || !nothing(&json["end_of_word_suffix"]) {
        return Err(Unsupported::new("affixes of subwords"));
    }
    let is_set = |name: &str| json[name].as_bool().unwrap_or(false);
    let merges = merges(&json["merges"], texts)?;
    let (alphabet, tokens) = match writing {
        Writing::ByteLevel => {
            let (bytes, tokens) = byte_level(texts);
            let incomplete = bytes.iter().any(Option::is_none);
            if incomplete && (is_set("byte_fallback") || !json["unk_token"].is_null()) {
                return Err(Unsupported::new("tokens for bytes that have none"));
            }
            (Alphabet::Bytes(bytes), tokens)
        }
        Writing::SpaceMarks => {
            if !is_set("byte_fallback") || is_set("ignore_merges") {
                return Err(Unsupported::new("characters without byte_fallback, or with ignore_merges"));
            }
            space_marks(texts, &merges)?
        }
    };
    Ok(Model::new(alphabet, &tokens, &merges, is_set("ignore_merges")))
}

/// The pairs with what they become. A merge is two texts, or one with a space between.
fn merges(json: &Value, texts: &Texts<'_>) -> Result<Vec<(Token, Token, Token)>, Unsupported> {
    let malformed = || Unsupported::new("merges that are not pairs of tokens whose text is a token");
    let json = json.as_array().filter(|json| json.len() < MERGES_MAX).ok_or_else(malformed)?;
    let mut merges = Vec::with_capacity(json.len());
    let mut both = String::new();
    for merge in json {
        let (left, right) = match merge {
            // `tokenizers` leaves lines out that begin so.
            Value::String(text) if text.starts_with("#version") => None,
            Value::String(text) => text.split_once(' ').filter(|(_, right)| !right.contains(' ')),
            Value::Array(pair) => match pair.as_slice() {
                [left, right] => left.as_str().zip(right.as_str()),
                _ => None,
            },
            _ => None,
        }
        .ok_or_else(malformed)?;
        both.clear();
        both.push_str(left);
        both.push_str(right);
        let id = |text: &str| texts.get(text).copied().ok_or_else(malformed);
        merges.push((id(left)?, id(right)?, id(&both)?));
    }
    Ok(merges)
}

/// The tokens that are bytes, and all tokens that are made of bytes.
fn byte_level(texts: &Texts<'_>) -> (Box<[Option<Token>; 256]>, Words) {
    let mut bytes = Box::new([None; 256]);
    let mut tokens = Vec::with_capacity(texts.len());
    for (text, &token) in texts {
        // What has other characters is no word of this alphabet.
        let Some(word) = text.chars().map(byte_of_letter).collect::<Option<Vec<u8>>>() else { continue };
        if let [byte] = *word {
            bytes[usize::from(byte)] = Some(token);
        }
        if !word.is_empty() {
            tokens.push((token, word));
        }
    }
    (bytes, tokens)
}

/// The byte that a letter of GPT-2's alphabet stands for: printable Latin-1 characters stand for themselves, and the
/// other bytes, in order, are the characters from U+0100 on.
fn byte_of_letter(letter: char) -> Option<u8> {
    let itself = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(letter);
    match code.checked_sub(0x100) {
        Some(index) => (0..=u8::MAX).filter(|&byte| !itself(byte)).nth(index as usize),
        None => u8::try_from(code).ok().filter(|&byte| itself(byte)),
    }
}

/// Characters, the 256 tokens of bytes, and all tokens that a text without spaces can become; spaces for `▁`.
fn space_marks(
    texts: &Texts<'_>,
    merges: &[(Token, Token, Token)],
) -> Result<(Alphabet, Words), Unsupported> {
    let mut bytes = Box::new([0; 256]);
    for byte in 0..=u8::MAX {
        let name = format!("<0x{byte:02X}>");
        let token = texts.get(&*name).ok_or_else(|| Unsupported::new(format!("no token {name}")))?;
        bytes[usize::from(byte)] = *token;
    }
    if merges.iter().any(|merge| [merge.0, merge.1].iter().any(|part| bytes.contains(part))) {
        return Err(Unsupported::new("merges of bytes that no character has"));
    }
    let mut characters = HashMap::new();
    let mut tokens = Vec::with_capacity(texts.len());
    for (text, &token) in texts {
        if text.is_empty() || text.contains(' ') {
            continue;
        }
        let word = text.replace(SPACE_MARK, " ").into_bytes();
        if text.chars().count() == 1 {
            characters.insert(code(&word), token);
        }
        tokens.push((token, word));
    }
    if !characters.contains_key(&code(b" ")) {
        return Err(Unsupported::new("no token for spaces"));
    }
    Ok((Alphabet::of_characters(characters, bytes), tokens))
}

/// Those that are looked for in the text, and those in the normalised text.
fn added_tokens(
    json: &Value,
    texts: &Texts<'_>,
    normalizer: &Normalizer,
) -> Result<(Option<Finder>, Option<Finder>), Unsupported> {
    let none = Vec::new();
    let (mut raw, mut normalized) = (Vec::new(), Vec::new());
    // `tokenizers` numbers those that the vocabulary has not itself, whatever the file says.
    let mut next_id = Token::try_from(texts.len()).unwrap_or(TOKEN_MAX);
    let mut seen = HashMap::new();
    for added in json.as_array().unwrap_or(&none) {
        let text = added["content"].as_str().unwrap_or_default();
        let id = token(&added["id"]);
        let expected = texts.get(text).copied().unwrap_or_else(|| {
            next_id += 1;
            next_id - 1
        });
        if text.is_empty() || id != Some(expected) || seen.insert(text, expected).is_some() {
            return Err(Unsupported::new(format!("the added token {}", shortened(added))));
        }
        let is_set = |name: &str, default| added[name].as_bool().unwrap_or(default);
        let mut token = AddedToken {
            id: expected,
            text: text.to_owned(),
            single_word: is_set("single_word", false),
            strips_left: is_set("lstrip", false),
            strips_right: is_set("rstrip", false),
        };
        if is_set("normalized", true) {
            let mut normal = String::new();
            if normalizer.apply(text, &mut normal) {
                token.text = normal;
            }
            normalized.push(token);
        } else {
            raw.push(token);
        }
    }
    let mut ids: Vec<Token> = seen.into_values().collect();
    ids.sort_unstable();
    if ids.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Unsupported::new("two added tokens of one id"));
    }
    Ok((Finder::new(raw)?, Finder::new(normalized)?))
}

/// For messages: a definition may be long.
fn shortened(json: &Value) -> String {
    let mut text = json.to_string();
    if let Some((end, _)) = text.char_indices().nth(300) {
        text.truncate(end);
        text.push('…');
    }
    text
}
