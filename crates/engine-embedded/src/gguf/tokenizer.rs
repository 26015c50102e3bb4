//! What a GGUF file says about its tokenizer.

use forebay_types::TokenId;

use super::{GgufMetadata, Value};
use crate::ModelError;

/// Vocabulary, merges, special tokens and chat template, as the file has them. Nothing in here tokenises.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GgufTokenizer {
    /// By id. In a byte-level vocabulary, in its alphabet (a space is `Ġ`); control tokens as plain text.
    pub tokens: Vec<String>,
    /// Pairs of tokens with a space between, the first to apply first. Empty if every token is a byte.
    pub merges: Vec<String>,
    /// By id: 1 normal, 3 control, 6 byte (GGUF's `token_type`); empty if the file does not say.
    pub token_types: Vec<i32>,
    /// Start of a sequence.
    pub bos: Option<TokenId>,
    /// End of a turn.
    pub eos: Option<TokenId>,
    /// Jinja source.
    pub chat_template: Option<String>,
    /// Name of the rule that cuts text before merging, such as `smollm`.
    pub pre: Option<String>,
    /// Kind of vocabulary, such as `gpt2` (byte-level BPE).
    pub model: Option<String>,
    /// Whether `bos` goes in front of every prompt that is not a chat.
    pub add_bos: bool,
}

impl GgufTokenizer {
    pub(super) fn of(metadata: &GgufMetadata) -> Result<Self, ModelError> {
        let texts = |key: &str| -> Option<Vec<String>> {
            let text = |value: &Value| match value {
                Value::Text(text) => Some(text.clone()),
                _ => None,
            };
            metadata.list(key)?.iter().map(text).collect()
        };
        let number = |value: &Value| match value {
            Value::Integer(number) => i32::try_from(*number).ok(),
            _ => None,
        };
        let tokens = texts("tokenizer.ggml.tokens")
            .ok_or_else(|| metadata.missing("the vocabulary, a list of texts named tokenizer.ggml.tokens"))?;
        let token = |key: &str| {
            let id = TokenId::try_from(metadata.unsigned(key)?).ok()?;
            ((id as usize) < tokens.len()).then_some(id)
        };
        Ok(Self {
            merges: texts("tokenizer.ggml.merges").unwrap_or_default(),
            token_types: metadata
                .list("tokenizer.ggml.token_type")
                .and_then(|values| values.iter().map(number).collect())
                .unwrap_or_default(),
            bos: token("tokenizer.ggml.bos_token_id"),
            eos: token("tokenizer.ggml.eos_token_id"),
            chat_template: metadata.text("tokenizer.chat_template").map(Into::into),
            pre: metadata.text("tokenizer.ggml.pre").map(Into::into),
            model: metadata.text("tokenizer.ggml.model").map(Into::into),
            add_bos: metadata.flag("tokenizer.ggml.add_bos_token").unwrap_or(false),
            tokens,
        })
    }
}
