//! A GGUF file's vocabulary as the `tokenizer.json` that it was made from.

use std::collections::BTreeSet;

use forebay_types::TokenId;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::{
    LoadError,
    source::{Definition, Json, TokenName},
};

/// The tokenizer's part of a GGUF file's metadata, for `tokenizer.ggml.model` = `gpt2` (byte-level BPE).
#[derive(Debug, Clone, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.tokens`: the text of each token, in GPT-2's alphabet of bytes.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.merges`: `"left right"`, most important first.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.token_type`: for each token, 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<TokenId>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<TokenId>,
    /// `tokenizer.ggml.pre`: how text is split before merging.
    pub pre: Option<String>,
    /// `tokenizer.ggml.add_bos_token`: whether a bare prompt begins with BOS.
    pub add_bos: bool,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Names of `tokenizer.ggml.pre` and whether they split numbers into digits before GPT-2's own rule. A name is added
/// with a test against the original tokenizer.
const PRE_TOKENIZERS: [(&str, bool); 2] = [("gpt-2", false), ("smollm", true)];

impl GgufVocabulary {
    pub(super) fn into_definition(self) -> Result<Definition, LoadError> {
        let pre_tokenizer = self.pre_tokenizer()?;
        self.check()?;
        let added: Vec<Value> = (0_usize..)
            .zip(self.tokens.iter().zip(&self.token_types))
            .filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(id, (text, kind))| {
                json!({
                    "id": id, "content": text, "special": *kind != USER_DEFINED, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
            .collect();
        let definition = TokenizerJson {
            version: "1.0",
            added_tokens: &added,
            normalizer: None,
            pre_tokenizer,
            post_processor: self.post_processor(),
            decoder: byte_level(true),
            model: Bpe {
                kind: "BPE",
                fuse_unk: false,
                byte_fallback: false,
                ignore_merges: false,
                vocab: Vocab(&self.tokens),
                merges: &self.merges,
            },
        };
        let text = serde_json::to_string(&definition)
            .map_err(|cause| LoadError::Json { what: "the GGUF file's vocabulary".to_owned(), cause })?;
        Ok(Definition {
            json: Json::new("the GGUF file's vocabulary".to_owned(), text),
            bos: self.bos.map(TokenName::Id),
            eos: self.eos.map(TokenName::Id).into_iter().collect(),
            chat_template: self.chat_template,
        })
    }

    fn pre_tokenizer(&self) -> Result<Value, LoadError> {
        match PRE_TOKENIZERS.iter().find(|(name, _)| Some(*name) == self.pre.as_deref()) {
            Some((_, false)) => Ok(byte_level(true)),
            Some((_, true)) => Ok(json!({
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)],
            })),
            None => Err(LoadError::UnknownPreTokenizer {
                pre: self.pre.clone(),
                known: PRE_TOKENIZERS.map(|(name, _)| name).join(", "),
            }),
        }
    }

    fn post_processor(&self) -> Option<Value> {
        let bos = self.bos.filter(|_| self.add_bos)?;
        let text = self.tokens.get(bos as usize)?;
        let special = |text: &str| json!({"SpecialToken": {"id": text, "type_id": 0}});
        let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        Some(json!({
            "type": "TemplateProcessing",
            "single": [special(text), sequence("A")],
            "pair": [special(text), sequence("A"), special(text), sequence("B")],
            "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
        }))
    }

    fn check(&self) -> Result<(), LoadError> {
        let problem = |problem: String| Err(LoadError::InconsistentGguf { problem });
        let tokens = self.tokens.len();
        if tokens == 0 {
            return problem("it has no tokens".to_owned());
        }
        if self.merges.is_empty() {
            return problem("it has no merges, so it is not byte-level BPE".to_owned());
        }
        if self.token_types.len() != tokens {
            return problem(format!("{tokens} tokens have {} types", self.token_types.len()));
        }
        for (name, id) in [("BOS", self.bos), ("EOS", self.eos)] {
            if let Some(id) = id.filter(|&id| id as usize >= tokens) {
                return problem(format!("{name} is token {id} of {tokens}"));
            }
        }
        let mut seen = BTreeSet::new();
        match self.tokens.iter().find(|token| !seen.insert(token.as_str())) {
            Some(twice) => problem(format!("token {twice:?} occurs twice")),
            None => Ok(()),
        }
    }
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

#[derive(Serialize)]
struct TokenizerJson<'a> {
    version: &'static str,
    added_tokens: &'a [Value],
    normalizer: Option<Value>,
    pre_tokenizer: Value,
    post_processor: Option<Value>,
    decoder: Value,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct Bpe<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Vocab<'a>,
    merges: &'a [String],
}

/// The tokens as an object of ids by text.
struct Vocab<'a>(&'a [String]);

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().zip(0_usize..))
    }
}
