//! The families whose tokenizers are proved exact, and where their files lie.

use std::path::{Path, PathBuf};

use forebay_text::Source;
use serde_json::Value;

/// A family, and the texts of its added tokens.
pub(crate) struct Family {
    pub(crate) source: Source,
    pub(crate) added: Vec<String>,
}

pub(crate) const SMOLLM: &str = "smollm-2";

/// The others lie in folders of these names.
#[allow(dead_code, reason = "not every user of this module wants all")]
pub(crate) const FAMILIES: [&str; 7] =
    ["llama-3.1", "qwen-3", "deepseek-v3", "gpt-oss", "gemma-3", "mistral-tekken", SMOLLM];

impl Family {
    /// `None` (with a message) if its file was not fetched. In CI that is a failure.
    pub(crate) fn find(name: &str) -> Option<Self> {
        if name == SMOLLM {
            let vocabulary = super::read_vocabulary(&super::real_model()?).expect("a readable GGUF");
            let kinds = vocabulary.tokens.iter().zip(&vocabulary.token_types);
            let added =
                kinds.filter(|(_, kind)| matches!(kind, 2..=4)).map(|(text, _)| text.clone()).collect();
            return Some(Self { source: Source::Gguf(vocabulary), added });
        }
        let path = folder().join(name).join("tokenizer.json");
        if !path.exists() {
            super::missing(&path, "scripts/fetch-tokenizers.sh");
            return None;
        }
        let text = std::fs::read_to_string(&path).expect("a readable file");
        let json: Value = serde_json::from_str(&text).expect("JSON");
        let tokens = json["added_tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
        let added = tokens.iter().filter_map(|token| token["content"].as_str()).map(str::to_owned).collect();
        Some(Self { source: Source::JsonFile(path), added })
    }
}

/// As in `scripts/fetch-tokenizers.sh`.
#[expect(clippy::disallowed_methods, reason = "a test has no settings: the folder that the script fills")]
fn folder() -> PathBuf {
    let cache = || {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        cache.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")))
    };
    std::env::var_os("FOREBAY_TOKENIZERS_FOLDER")
        .map(PathBuf::from)
        .or_else(|| Some(cache()?.join("forebay/tokenizers")))
        .unwrap_or_default()
}
