//! `--tokenizer [MODEL=]PATH`.

use std::{fmt, path::PathBuf};

use super::value::{Form, Value};

/// A tokenizer, and the model that it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenizerSpec {
    /// `None`: any model that no other tokenizer is for.
    pub(crate) model: Option<String>,
    /// A `tokenizer.json`, its folder, or a GGUF file.
    pub(crate) path: PathBuf,
}

impl fmt::Display for TokenizerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.model {
            Some(model) => write!(f, "{model}={}", self.path.display()),
            None => write!(f, "{}", self.path.display()),
        }
    }
}

fn one(text: &str) -> Result<TokenizerSpec, String> {
    let (model, path) = match text.split_once('=') {
        Some((model, path)) => (Some(model.to_owned()), path),
        None => (None, text),
    };
    if path.is_empty() || model.as_deref() == Some("") {
        return Err(format!("`{text}` names no path; write PATH or MODEL=PATH"));
    }
    Ok(TokenizerSpec { model, path: path.into() })
}

/// In an environment variable, separated by spaces.
impl Value for Vec<TokenizerSpec> {
    const FORM: Form = Form::List;
    const EXPECTED: &'static str = "[MODEL=]PATH such as /models/qwen3/tokenizer.json";
    const PLACEHOLDER: &'static str = "[MODEL=]PATH";

    fn parse(text: &str) -> Result<Self, String> {
        text.split_whitespace().map(one).collect()
    }

    fn parse_all(texts: &[String]) -> Result<Self, String> {
        // A path may hold spaces, so each text of several is one.
        match texts {
            [text] => Self::parse(text),
            texts => texts.iter().map(|text| one(text)).collect(),
        }
    }

    fn show(&self) -> String {
        match self.as_slice() {
            [] => super::value::UNSET.to_owned(),
            specs => specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokenizers_read_and_show_themselves() {
        let read = Vec::<TokenizerSpec>::parse("org/m=/a/tokenizer.json /b").expect("two");
        assert_eq!(read[0].model.as_deref(), Some("org/m"));
        assert_eq!((read[1].model.as_deref(), read[1].path.as_path()), (None, std::path::Path::new("/b")));
        assert_eq!(read.show(), "org/m=/a/tokenizer.json /b");
        assert!(Vec::<TokenizerSpec>::parse("=x").is_err());
        assert!(Vec::<TokenizerSpec>::parse("m=").is_err());
    }
}
