//! Why a call is refused: one table for both protocols.

use std::{borrow::Cow, fmt};

/// What kind of refusal it is, which decides its status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request must change.
    Invalid,
    /// There is no such thing.
    NotFound,
    /// There is one already.
    Exists,
    /// It does not fit the state of things.
    Conflict,
    /// Batches are missing.
    Gap,
    /// A bound is reached; later it may not be.
    Full,
    /// The body is larger than allowed.
    TooLarge,
    /// The body came too slowly.
    TooSlow,
    /// No such path.
    NoPath,
    /// A path without this method.
    WrongMethod,
}

/// A refusal as a client sees it. Codes are stable, messages are not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Decides the status.
    pub kind: Kind,
    /// Stable, for programs.
    pub code: &'static str,
    /// What is wrong and what to do, for people.
    pub message: String,
    /// The field at fault, as a path: `events[2].hashes`.
    pub param: Option<Cow<'static, str>>,
}

impl Refused {
    /// A refusal.
    pub fn new(kind: Kind, code: &'static str, message: impl Into<String>) -> Self {
        Self { kind, code, message: message.into(), param: None }
    }

    /// A value that cannot be.
    pub fn value(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, "invalid_value", message).at(param)
    }

    /// Names the field at fault.
    #[must_use]
    pub fn at(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// More of something than is allowed.
    pub fn too_many(param: &'static str, what: &str, got: usize, max: usize) -> Self {
        let message = format!("{got} {what}, and at most {max} are taken: ask in parts");
        Self::new(Kind::Invalid, "too_many_values", message).at(param)
    }

    /// No engine of this name.
    pub fn no_engine(name: &str) -> Self {
        let message =
            format!("no engine `{}` is registered; GET /v1/engines lists those that are", clipped(name));
        Self::new(Kind::NotFound, "engine_not_found", message).at("engine")
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refused {}

/// A client's own words in a message, bounded.
pub(crate) fn clipped(text: &str) -> Cow<'_, str> {
    const CHARS_MAX: usize = 200;
    match text.char_indices().nth(CHARS_MAX) {
        None => Cow::Borrowed(text),
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
    }
}
