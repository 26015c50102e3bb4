//! `fastokens`, arranged so that it is fast for the models we serve.

use fastokens::{AddedTokenPolicy, added_tokens::Segment, pre_tokenized::PreTokenizedString};
use forebay_types::TokenId;
use serde_json::Value;

use super::{EncodeError, Mode, vocabulary::byte_of_letter};

pub(super) struct Fast {
    pipeline: fastokens::Tokenizer,
    /// Whether numbers are split into digits here, and not by the pipeline.
    splits_digits: bool,
    /// The bytes without a token. SmolLM2 has none for some control characters and rare planes of Unicode.
    unknown: Option<Box<[bool; 256]>>,
}

impl Fast {
    pub(super) fn load(mut json: Value) -> Result<Self, fastokens::Error> {
        let splits_digits = take_digits_step(&mut json);
        let byte_level = json["normalizer"].is_null() && json["decoder"]["type"] == "ByteLevel";
        let mut pipeline = fastokens::Tokenizer::from_json(json)?;
        pipeline.set_truncation(None);
        pipeline.set_padding(None);
        let unknown = if byte_level { unknown_bytes(&pipeline) } else { None };
        Ok(Self { pipeline, splits_digits, unknown })
    }

    pub(super) fn encode(&self, mode: Mode, text: &str, out: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        let ids = if self.splits_digits && has_digits(text) || self.has_unknown(text) {
            self.encode_in_pieces(mode, text)
        } else {
            let policy = match mode {
                Mode::Plain => AddedTokenPolicy::None,
                Mode::Chat | Mode::Completion => AddedTokenPolicy::All,
            };
            self.pipeline.encode_unpadded(text, mode == Mode::Completion, policy)
        };
        out.extend_from_slice(&ids.map_err(|cause| EncodeError { cause: Box::new(cause) })?);
        Ok(())
    }

    fn has_unknown(&self, text: &str) -> bool {
        self.unknown.as_ref().is_some_and(|unknown| text.bytes().any(|byte| unknown[usize::from(byte)]))
    }

    fn encode_in_pieces(&self, mode: Mode, text: &str) -> Result<Vec<TokenId>, fastokens::Error> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        match self.pipeline.added_tokens().filter(|_| mode != Mode::Plain) {
            Some(added) => {
                for segment in added.split_with(text, false) {
                    match segment {
                        Segment::Token(id) => ids.push(id),
                        Segment::Text(text) => self.append_text(text, &mut ids)?,
                    }
                }
            }
            None => self.append_text(text, &mut ids)?,
        }
        Ok(self.pipeline.post_process(ids, mode == Mode::Completion))
    }

    /// Appends the tokens of text without added tokens.
    fn append_text(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<(), fastokens::Error> {
        let mut rest = text;
        while !rest.is_empty() {
            let end = match rest.find(char::is_numeric).filter(|_| self.splits_digits) {
                None => rest.len(),
                Some(0) => rest.chars().next().map_or(0, char::len_utf8),
                Some(start) => start,
            };
            let (piece, after) = rest.split_at(end);
            if self.has_unknown(piece) {
                self.append_known(piece, ids)?;
            } else {
                let piece: Vec<TokenId> =
                    self.pipeline.encode_unpadded(piece, false, AddedTokenPolicy::None)?;
                ids.extend_from_slice(&piece);
            }
            rest = after;
        }
        Ok(())
    }

    /// Appends the tokens of text with bytes that have none: as in `tokenizers` these are dropped before merging, for
    /// which `fastokens` has only its general way, step by step. Its fast way fails.
    fn append_known(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<(), fastokens::Error> {
        let mut words = PreTokenizedString::from_text(text);
        if let Some(pre_tokenizer) = self.pipeline.pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut words)?;
        }
        let known = words.tokenize(|word, out| self.pipeline.model().tokenize_into(word, out));
        ids.extend_from_slice(&known.map_err(fastokens::Error::Model)?);
        Ok(())
    }
}

fn unknown_bytes(pipeline: &fastokens::Tokenizer) -> Option<Box<[bool; 256]>> {
    let mut unknown = Box::new([true; 256]);
    for letter in '\0'..='\u{17f}' {
        let token = pipeline.model().token_to_id(letter.encode_utf8(&mut [0; 4]));
        if let (Some(byte), Some(_)) = (byte_of_letter(letter), token) {
            unknown[usize::from(byte)] = false;
        }
    }
    unknown.contains(&true).then_some(unknown)
}

/// Takes the first step out of a pipeline that splits off single digits and then splits as GPT-2 does (SmolLM,
/// StarCoder). `fastokens` has a scanner for GPT-2's rule alone; both steps together take its general way, which
/// measured 8 MB/s instead of 90. Between two digits the rule sees the same text either way.
fn take_digits_step(json: &mut Value) -> bool {
    if !json["normalizer"].is_null() {
        return false;
    }
    let pre_tokenizer = &mut json["pre_tokenizer"];
    let Some([digits, byte_level]) = pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice) else {
        return false;
    };
    let splits_digits = pre_tokenizer["type"] == "Sequence"
        && digits["type"] == "Digits"
        && digits["individual_digits"] == true
        && byte_level["type"] == "ByteLevel"
        && byte_level["use_regex"] != false
        && byte_level["add_prefix_space"] == false;
    if splits_digits {
        *pre_tokenizer = byte_level.clone();
    }
    splits_digits
}

fn has_digits(text: &str) -> bool {
    let possible = |byte: u8| byte.is_ascii_digit() || !byte.is_ascii();
    text.bytes().any(possible) && text.contains(char::is_numeric)
}
