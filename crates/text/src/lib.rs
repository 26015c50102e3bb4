//! scratch
use forebay_types::TokenId;
/// scratch
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct GgufVocabulary {
    pub tokens: Vec<String>, pub merges: Vec<String>, pub token_types: Vec<i32>, pub bos: Option<TokenId>, pub eos: Option<TokenId>,
    pub pre: Option<String>, pub add_bos: bool, pub chat_template: Option<String>,
}
