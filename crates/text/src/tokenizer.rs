//! Text to tokens, and tokens to bytes.
//!
//! In: a vocabulary (built in, from `tokenizer.json`, or a GGUF's). Out: a [`Tokenizer`]. Start at [`Tokenizer::load`];
//! where vocabularies come from is in [`source`] and [`gguf`], the encoders are [`bytes`], [`fast`] and [`reference`],
//! and [`verify`] decides whether the fast one may be used.
//!
//! Invariants: the ids are those of Hugging Face's `tokenizers`; a tokenizer never changes once it was loaded.

mod bytes;
mod corpus;
mod error;
mod fast;
mod fingerprint;
mod gguf;
mod prefix_cache;
mod reference;
mod source;
#[cfg(test)]
mod tests;
mod verify;
mod vocabulary;

use std::{fmt, path::Path, sync::Arc};

use forebay_types::TokenId;

pub use error::{EncodeError, LoadError};
pub use fingerprint::Fingerprint;
pub use gguf::GgufVocabulary;
pub use prefix_cache::{PrefixCache, PrefixCacheLimits, PrefixCacheStats};
pub use source::Source;

use crate::Detokenizer;
use fast::Fast;
use reference::Reference;
use source::{Definition, TokenName};
use vocabulary::Vocabulary;

/// Which code encodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The built-in byte tokenizer.
    Bytes,
    /// `forebay-bpe`, which gave the same ids as `tokenizers` on the whole corpus when the vocabulary was loaded.
    Bpe,
    /// `tokenizers`, about a hundred times slower.
    Tokenizers,
}

/// Which back end to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preference {
    /// `forebay-bpe` if it agrees with `tokenizers`, otherwise `tokenizers`.
    #[default]
    FastIfExact,
    /// `tokenizers`, for comparison and when in doubt.
    Reference,
}

/// Which added tokens an encoding recognises and adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Recognise all, add none.
    Chat,
    /// Recognise all, add what the model expects around a bare prompt.
    Completion,
    /// Recognise none, add none.
    Plain,
}

/// A model's tokenizer. Immutable; clones share everything; encode on as many threads as you like.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    encoder: Encoder,
    vocabulary: Vocabulary,
    fingerprint: Fingerprint,
    bos: Option<TokenId>,
    eos: Vec<TokenId>,
    chat_template: Option<String>,
}

enum Encoder {
    Bytes,
    Fast(Box<Fast>),
    Reference(Box<Reference>),
}

impl Tokenizer {
    /// The built-in tokenizer, for engines without a vocabulary of their own: ids 0 to 255 are bytes, 256
    /// `<|endoftext|>`, 257 `<|im_start|>`, 258 `<|im_end|>`, 259 `<|pad|>`, 260 to 263 reserved.
    pub fn bytes() -> Self {
        let vocabulary = bytes::vocabulary();
        Self(Arc::new(Inner {
            encoder: Encoder::Bytes,
            fingerprint: fingerprint::of_bytes(&vocabulary),
            vocabulary,
            bos: None,
            eos: vec![bytes::IM_END, bytes::END_OF_TEXT],
            chat_template: None,
        }))
    }

    /// Loads a `tokenizer.json`, or a folder with one and its neighbours; see [`Source::JsonFile`].
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_json_file(path: &Path) -> Result<Self, LoadError> {
        Self::load(Source::JsonFile(path.to_owned()), Preference::default())
    }

    /// Builds the tokenizer of a GGUF file from the vocabulary in its metadata.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_gguf_parts(vocabulary: GgufVocabulary) -> Result<Self, LoadError> {
        Self::load(Source::Gguf(vocabulary), Preference::default())
    }

    /// Loads a vocabulary and chooses the back end. Takes about 0.4 CPU seconds for 49,000 tokens, on two
    /// threads.
    ///
    /// # Errors
    /// [`LoadError`] if a file cannot be read, is malformed, or needs something that is not supported.
    pub fn load(source: Source, preference: Preference) -> Result<Self, LoadError> {
        let Definition { json, bos, eos, chat_template } = source.read()?;
        let value = json.parse()?;
        let vocabulary = Vocabulary::from_json(&value)?;
        let fingerprint = fingerprint::of_json(&value, &vocabulary);
        let resolve = |name: TokenName| match name {
            TokenName::Id(id) => Some(id),
            TokenName::Text(text) => vocabulary.added(&text),
        };
        let bos = bos.and_then(resolve);
        let mut ends = Vec::new();
        for token in eos.into_iter().filter_map(resolve) {
            if !ends.contains(&token) {
                ends.push(token);
            }
        }
        let encoder = match preference {
            Preference::FastIfExact => verify::choose(&value, json.text(), &vocabulary)?,
            Preference::Reference => Encoder::Reference(Box::new(Reference::load(json.text())?)),
        };
        Ok(Self(Arc::new(Inner { encoder, vocabulary, fingerprint, bos, eos: ends, chat_template })))
    }

    /// Appends the tokens of `text`, the output of a chat template, to `out`. The text of an added token (such as
    /// `<|im_end|>`) is that token wherever it stands, in a user's words too: Transformers and vLLM do so, and
    /// prompts must not depend on which server tokenised them. Nothing is added; templates write BOS themselves.
    /// A byte that a byte-level vocabulary has no token for is left out, as `tokenizers` does.
    ///
    /// # Errors
    /// [`EncodeError`] if the vocabulary cannot express the text, which does not happen with byte-level ones.
    pub fn encode(&self, text: &str, out: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        self.encode_as(Mode::Chat, text, out)
    }

    /// Like [`Tokenizer::encode`] for a bare prompt (`/v1/completions`): the tokens that the model expects around one,
    /// such as BOS, are added as its files say.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_completion(&self, text: &str, out: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        self.encode_as(Mode::Completion, text, out)
    }

    /// Like [`Tokenizer::encode`], but text is only text: `<|im_end|>` becomes the tokens of its characters.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str, out: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        self.encode_as(Mode::Plain, text, out)
    }

    fn encode_as(&self, mode: Mode, text: &str, out: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        match &self.0.encoder {
            Encoder::Bytes => bytes::encode(mode, text, out),
            Encoder::Fast(fast) => fast.encode(mode, text, out),
            Encoder::Reference(reference) => reference.encode(mode, text, out)?,
        }
        Ok(())
    }

    /// The text of `tokens` without special tokens; bytes that are no text become U+FFFD. For whole answers: tokens
    /// that arrive one by one go through a [`Detokenizer`]. A space before the first word stays, which SentencePiece
    /// models write and `tokenizers` strips: here the first token usually continues a prompt.
    pub fn decode(&self, tokens: &[TokenId]) -> String {
        let mut detokenizer = Detokenizer::new(self.clone());
        let mut text = String::new();
        for &token in tokens {
            detokenizer.push(token, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    /// The bytes that `token` stands for, perhaps part of a character. A special token has the bytes of its name, for
    /// logs; see [`Tokenizer::is_special`]. Reserved ids and those outside the vocabulary have none.
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.0.vocabulary.bytes(token)
    }

    /// Whether `token` is no part of the text (end of turn, padding and the like).
    pub fn is_special(&self, token: TokenId) -> bool {
        self.0.vocabulary.is_special(token)
    }

    /// One more than the largest id. A model's output layer may be wider, for alignment.
    pub fn vocab_size(&self) -> usize {
        self.0.vocabulary.size()
    }

    /// The id of an added token, special or not, by its text: `special_id("<|im_end|>")`.
    pub fn special_id(&self, text: &str) -> Option<TokenId> {
        self.0.vocabulary.added(text)
    }

    /// What begins a sequence, if the model has such a token.
    pub fn bos(&self) -> Option<TokenId> {
        self.0.bos
    }

    /// The tokens that end an answer according to the files that came with the vocabulary. May be empty.
    pub fn eos(&self) -> &[TokenId] {
        &self.0.eos
    }

    /// The chat template that came with the vocabulary: Jinja, not compiled yet.
    pub fn chat_template(&self) -> Option<&str> {
        self.0.chat_template.as_deref()
    }

    /// The tokens whose bytes are, each on its own, whole printable characters: any sequence of them is text. Computed
    /// anew at each call, in order of ids.
    pub fn plain_tokens(&self) -> Vec<TokenId> {
        self.0.vocabulary.plain()
    }

    /// Which code encodes.
    pub fn backend(&self) -> Backend {
        match self.0.encoder {
            Encoder::Bytes => Backend::Bytes,
            Encoder::Fast(_) => Backend::Bpe,
            Encoder::Reference(_) => Backend::Tokenizers,
        }
    }

    /// The identity of vocabulary and rules: engines with equal ones understand each other's tokens. Independent of
    /// the back end and of how the files are formatted.
    pub fn fingerprint(&self) -> Fingerprint {
        self.0.fingerprint
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("backend", &self.backend())
            .field("vocab_size", &self.vocab_size())
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}
