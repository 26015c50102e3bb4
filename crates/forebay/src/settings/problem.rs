//! What can be wrong with settings, each a sentence that says what to do.

use std::{fmt, path::PathBuf};

use super::layers::Origin;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    /// The file names a setting that does not exist.
    #[error("{}:{line}: unknown setting `{key}`{}", path.display(), did_you_mean(nearest.as_deref()))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// As written.
        key: String,
        /// The known name that it resembles.
        nearest: Option<String>,
    },
    /// The file has a section.
    #[error("{}:{line}: `[{key}]` begins a section, and settings have none; write them without it", path.display())]
    Section {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// As written.
        key: String,
    },
    /// The file holds a setting that only flags and the environment may give.
    #[error("{}:{line}: `{key}` cannot be set in a file; use its flag or environment variable", path.display())]
    NotInFile {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// As written.
        key: String,
    },
    /// The environment names a setting that does not exist.
    #[error("environment variable {name} names no setting{}", did_you_mean(nearest.as_deref()))]
    UnknownVariable {
        /// As set.
        name: String,
        /// The known variable that it resembles.
        nearest: Option<String>,
    },
    /// A value of the wrong type or out of its range.
    #[error("`{name}` is `{value}` ({origin}), expected {expected}{}", in_detail(detail))]
    Wrong {
        /// The setting.
        name: &'static str,
        /// As written; hidden if secret.
        value: String,
        /// What it should be.
        expected: &'static str,
        /// Who gave it.
        origin: Origin,
        /// What exactly is wrong, if more is known.
        detail: String,
    },
    /// The file cannot be read.
    #[error("cannot read the settings file {}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        reason: String,
    },
    /// The file is not TOML.
    #[error("{}:{line}: not valid TOML: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The parser's answer.
        reason: String,
    },
    /// Settings that do not go together.
    #[error("{0}")]
    Together(String),
}

fn did_you_mean(nearest: Option<&str>) -> String {
    match nearest {
        Some(nearest) => format!("; did you mean `{nearest}`?"),
        None => "; `forebay config reference` lists them all".to_owned(),
    }
}

fn in_detail(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(": {detail}") }
}

/// Everything that is wrong with the settings, so that one run is enough to find it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SettingsError(pub(crate) Vec<Problem>);

impl std::error::Error for SettingsError {}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [problem] = self.0.as_slice() {
            return write!(f, "{problem}");
        }
        write!(f, "{} settings are wrong", self.0.len())?;
        for problem in &self.0 {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}
