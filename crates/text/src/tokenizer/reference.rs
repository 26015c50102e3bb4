//! Hugging Face's `tokenizers`: by definition exact.

use std::error::Error;

use forebay_types::TokenId;
use tokenizers::{
    Model as _, NormalizedString, Normalizer as _, OffsetType, PreTokenizedString, PreTokenizer as _,
};

use super::{EncodeError, LoadError, Mode};

pub(super) struct Reference(tokenizers::Tokenizer);

impl Reference {
    pub(super) fn load(json: &str) -> Result<Self, LoadError> {
        let refused = |cause| LoadError::Refused { cause };
        let mut tokenizer: tokenizers::Tokenizer = json.parse().map_err(refused)?;
        // Some files carry the lengths of their training; a server must not cut prompts silently.
        tokenizer.with_padding(None).with_truncation(None).map_err(refused)?;
        Ok(Self(tokenizer))
    }

    pub(super) fn encode(&self, mode: Mode, text: &str, out: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        let encoding = match mode {
            Mode::Chat => self.0.encode_fast(text, false),
            Mode::Completion => self.0.encode_fast(text, true),
            Mode::Plain => self.encode_plain(text),
        };
        out.extend_from_slice(encoding.map_err(|cause| EncodeError { cause })?.get_ids());
        Ok(())
    }

    /// The steps of `encode_fast` without the one that finds added tokens, which cannot be switched off for one call.
    fn encode_plain(&self, text: &str) -> Result<tokenizers::Encoding, Box<dyn Error + Send + Sync>> {
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = self.0.get_normalizer() {
            normalizer.normalize(&mut normalized)?;
        }
        let mut pieces = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = self.0.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|piece| self.0.get_model().tokenize(piece.get()))?;
        pieces.into_encoding(None, 0, OffsetType::None)
    }
}
