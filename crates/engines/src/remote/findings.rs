//! What was found out about an engine that somebody should read, a sentence each: for `forebay doctor` and
//! [`EngineFacts::notes`](crate::EngineFacts::notes).

use std::{fmt, sync::Arc};

/// Findings kept of one examination; an engine that is wrong in more ways is wrong enough.
const FINDINGS_MAX: usize = 64;

/// How much it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// Good to know.
    Info,
    /// Something works worse than it could, or is left out.
    Warning,
    /// The engine cannot be used like this.
    Error,
}

impl Severity {
    /// `info`, `warning` or `error`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One thing that was found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// A sentence without its full stop.
    pub what: Arc<str>,
    /// What to do about it, where something can be done: a sentence without its full stop that names the flag to add.
    pub mend: Option<Arc<str>>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.mend {
            Some(mend) => write!(f, "{}: {mend}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// Findings of one examination, in the order in which they were made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    /// Adds one, up to a bound.
    pub fn add(&mut self, severity: Severity, what: impl Into<Arc<str>>, mend: Option<&str>) {
        if self.0.len() < FINDINGS_MAX {
            self.0.push(Finding { severity, what: what.into(), mend: mend.map(Into::into) });
        }
    }

    /// Good to know.
    pub(super) fn info(&mut self, what: impl Into<Arc<str>>) {
        self.add(Severity::Info, what, None);
    }

    /// Works worse than it could; `mend` says how to change that.
    pub(super) fn warn(&mut self, what: impl Into<Arc<str>>, mend: &str) {
        self.add(Severity::Warning, what, Some(mend));
    }

    /// Works worse than it could, and nothing can be said against it.
    pub(super) fn regret(&mut self, what: impl Into<Arc<str>>) {
        self.add(Severity::Warning, what, None);
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Finding> {
        self.0.iter()
    }

    /// The sentences of what operators should act on: all but [`Severity::Info`].
    pub fn notes(&self) -> Vec<Arc<str>> {
        let matters = self.0.iter().filter(|finding| finding.severity > Severity::Info);
        matters.map(|finding| finding.to_string().into()).collect()
    }
}
