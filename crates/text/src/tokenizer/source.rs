//! Where vocabularies come from.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use forebay_types::TokenId;
use serde_json::Value;

use super::{GgufVocabulary, LoadError};

/// What to load.
#[derive(Debug, Clone)]
pub enum Source {
    /// A `tokenizer.json` as Hugging Face's libraries write it, or the folder that holds one. Beside it are read, where
    /// they exist: `tokenizer_config.json` (further added tokens, BOS, EOS, chat template), `chat_template.jinja`
    /// and `generation_config.json` (EOS).
    JsonFile(PathBuf),
    /// The vocabulary of a GGUF file.
    Gguf(GgufVocabulary),
}

/// A tokenizer as `tokenizer.json` defines it, with what its neighbours say.
pub(super) struct Definition {
    pub(super) json: Json,
    pub(super) bos: Option<TokenName>,
    pub(super) eos: Vec<TokenName>,
    pub(super) chat_template: Option<String>,
}

/// Token names are resolved against the vocabulary.
pub(super) enum TokenName {
    Id(TokenId),
    Text(String),
}

/// The text of a `tokenizer.json`, and what to call it in errors.
pub(super) struct Json {
    what: String,
    text: String,
}

impl Json {
    pub(super) fn new(what: String, text: String) -> Self {
        Self { what, text }
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn parse(&self) -> Result<Value, LoadError> {
        serde_json::from_str(&self.text).map_err(|cause| LoadError::Json { what: self.what.clone(), cause })
    }
}

impl Source {
    pub(super) fn read(self) -> Result<Definition, LoadError> {
        match self {
            Self::JsonFile(path) => read_json(&path),
            Self::Gguf(vocabulary) => vocabulary.into_definition(),
        }
    }
}

fn read_json(path: &Path) -> Result<Definition, LoadError> {
    let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    let text = fs::read_to_string(&path).map_err(|cause| LoadError::Read { path: path.clone(), cause })?;
    let mut json = Json::new(path.display().to_string(), text);
    let config = neighbour_json(&path, "tokenizer_config.json")?;
    let generation = neighbour_json(&path, "generation_config.json")?;
    if let Some(text) = with_added_tokens(&json, &config)? {
        json.text = text;
    }
    let mut eos: Vec<TokenName> = token_name(&config["eos_token"]).into_iter().collect();
    match &generation["eos_token_id"] {
        Value::Array(ids) => eos.extend(ids.iter().filter_map(token_id).map(TokenName::Id)),
        id => eos.extend(token_id(id).map(TokenName::Id)),
    }
    let chat_template = match neighbour(&path, "chat_template.jinja")? {
        Some(template) => Some(template),
        None => chat_template(&config["chat_template"]),
    };
    Ok(Definition { json, bos: token_name(&config["bos_token"]), eos, chat_template })
}

fn neighbour(path: &Path, name: &str) -> Result<Option<String>, LoadError> {
    let path = path.with_file_name(name);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(LoadError::Read { path, cause }),
    }
}

/// `Null` if there is no such file.
fn neighbour_json(path: &Path, name: &str) -> Result<Value, LoadError> {
    match neighbour(path, name)? {
        Some(text) => serde_json::from_str(&text).map_err(|cause| LoadError::Json {
            what: path.with_file_name(name).display().to_string(),
            cause,
        }),
        None => Ok(Value::Null),
    }
}

/// The definition with the added tokens that only `tokenizer_config.json` lists; `None` if there are none.
fn with_added_tokens(json: &Json, config: &Value) -> Result<Option<String>, LoadError> {
    let Value::Object(decoder) = &config["added_tokens_decoder"] else { return Ok(None) };
    let mut value = json.parse()?;
    let known: Vec<u64> = value["added_tokens"]
        .as_array()
        .map(|tokens| tokens.iter().filter_map(|token| token["id"].as_u64()).collect())
        .unwrap_or_default();
    let mut missing: Vec<(u64, Value)> = decoder
        .iter()
        .filter_map(|(id, token)| Some((id.parse().ok()?, token.clone())))
        .filter(|(id, _)| !known.contains(id))
        .collect();
    if missing.is_empty() {
        return Ok(None);
    }
    missing.sort_by_key(|&(id, _)| id);
    let tokens = value["added_tokens"]
        .as_array_mut()
        .ok_or(LoadError::Field { field: "added_tokens", expected: "an array" })?;
    for (id, mut token) in missing {
        if let Value::Object(members) = &mut token {
            members.remove("__type");
            members.insert("id".to_owned(), Value::from(id));
            tokens.push(token);
        }
    }
    Ok(Some(value.to_string()))
}

/// A special token as configurations write it: its text, or an object with it.
fn token_name(value: &Value) -> Option<TokenName> {
    let text = value.as_str().or_else(|| value["content"].as_str())?;
    Some(TokenName::Text(text.to_owned()))
}

fn token_id(value: &Value) -> Option<TokenId> {
    TokenId::try_from(value.as_u64()?).ok()
}

/// One template, or the default of several.
fn chat_template(value: &Value) -> Option<String> {
    let template = match value {
        Value::Array(templates) => {
            &templates.iter().find(|template| template["name"] == "default")?["template"]
        }
        template => template,
    };
    template.as_str().map(str::to_owned)
}
