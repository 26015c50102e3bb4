//! Why there is no tokenizer, or no tokens.

use std::{error::Error, io, path::PathBuf};

/// Why a vocabulary could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is missing or unreadable.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A file is no JSON, or not the expected JSON.
    #[error("{what} is not valid")]
    Json {
        /// Which file.
        what: String,
        /// Where and why.
        #[source]
        cause: serde_json::Error,
    },
    /// A field of `tokenizer.json` is missing or of the wrong type.
    #[error("the tokenizer's field {field} must be {expected}")]
    Field {
        /// Its path.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// A kind of tokenizer whose tokens cannot be turned into bytes one by one.
    #[error(
        "tokenizers with {what} are not supported; supported are byte-level BPE and byte-fallback models"
    )]
    Unsupported {
        /// What.
        what: String,
    },
    /// A GGUF without `tokenizer.ggml.pre`, or with an unknown one. Guessing would give other tokens, silently.
    #[error(
        "the GGUF file's pre-tokenizer is {}; known are {known}; load the model's tokenizer.json instead",
        pre.as_deref().unwrap_or("not given")
    )]
    UnknownPreTokenizer {
        /// Its name.
        pre: Option<String>,
        /// The known names.
        known: String,
    },
    /// A GGUF vocabulary that contradicts itself.
    #[error("the GGUF file's vocabulary is inconsistent: {problem}")]
    InconsistentGguf {
        /// How.
        problem: String,
    },
    /// `tokenizers` does not accept the definition.
    #[error("the tokenizer's definition was refused")]
    Refused {
        /// Why, in its words.
        #[source]
        cause: Box<dyn Error + Send + Sync>,
    },
}

/// The vocabulary cannot express a text.
#[derive(Debug, thiserror::Error)]
#[error("the text cannot be tokenised")]
pub struct EncodeError {
    /// Why, in the back end's words.
    #[source]
    pub(super) cause: Box<dyn Error + Send + Sync>,
}
