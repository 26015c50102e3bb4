//! `--tokenizer [MODEL=]PATH`, `--profile [MODEL=]PATH`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use super::value::{Form, Value};

/// A file, and the model that it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModelPath {
    /// `None`: any model that no other one is for.
    pub(crate) model: Option<String>,
    pub(crate) path: PathBuf,
}

impl ModelPath {
    /// The one that is for `model`, or for any.
    pub(crate) fn find<'a>(model: &str, among: &'a [Self]) -> Option<&'a Path> {
        let named = among.iter().find(|spec| spec.model.as_deref() == Some(model));
        Some(&named.or_else(|| among.iter().find(|spec| spec.model.is_none()))?.path)
    }
}

impl fmt::Display for ModelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.model {
            Some(model) => write!(f, "{model}={}", self.path.display()),
            None => write!(f, "{}", self.path.display()),
        }
    }
}

fn one(text: &str) -> Result<ModelPath, String> {
    let (model, path) = match text.split_once('=') {
        Some((model, path)) => (Some(model.to_owned()), path),
        None => (None, text),
    };
    if path.is_empty() || model.as_deref() == Some("") {
        return Err(format!("`{text}` names no path; write PATH or MODEL=PATH"));
    }
    Ok(ModelPath { model, path: path.into() })
}

/// In an environment variable, separated by spaces.
impl Value for Vec<ModelPath> {
    const FORM: Form = Form::List;
    const EXPECTED: &'static str = "[MODEL=]PATH such as org/model=/some/file";
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
    fn paths_read_and_show_themselves() {
        let read = Vec::<ModelPath>::parse("org/m=/a/tokenizer.json /b").expect("two");
        assert_eq!(read[0].model.as_deref(), Some("org/m"));
        assert_eq!((read[1].model.as_deref(), read[1].path.as_path()), (None, std::path::Path::new("/b")));
        assert_eq!(read.show(), "org/m=/a/tokenizer.json /b");
        assert!(Vec::<ModelPath>::parse("=x").is_err());
        assert!(Vec::<ModelPath>::parse("m=").is_err());
    }
}
