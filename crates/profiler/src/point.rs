//! What is measured, and what a measurement says.

use std::fmt;

/// One thing to measure. All lengths are in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Point {
    /// A prompt alone on the engine, until its first token.
    Prefill {
        /// Tokens to compute.
        new_tokens: u32,
        /// Tokens before them that the prefix cache holds.
        cached_tokens: u32,
    },
    /// A step of sequences that all decode.
    Decode {
        /// How many.
        sequences: u32,
        /// Length of each one's prompt.
        context_tokens: u32,
    },
    /// A step that computes a whole prompt beside sequences that decode.
    Mixed {
        /// Length of the prompt.
        new_tokens: u32,
        /// How many sequences decode.
        sequences: u32,
        /// Length of each one's prompt.
        context_tokens: u32,
    },
    /// A prompt whose KV another engine computed, until the first token here.
    Handover {
        /// Its length.
        tokens: u32,
    },
}

/// Points that show the same terms, and share their errors in a summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Prompts of which nothing is cached.
    Prefill,
    /// Prompts with a cached share.
    Cached,
    /// Decode steps.
    Decode,
    /// Steps with a prefill beside decodes.
    Mixed,
    /// Hand-overs.
    Handover,
}

impl Kind {
    /// All, in the order of a report.
    pub const ALL: [Kind; 5] = [Kind::Prefill, Kind::Cached, Kind::Decode, Kind::Mixed, Kind::Handover];

    /// For people and documents.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Prefill => "prefill",
            Kind::Cached => "cached prefix",
            Kind::Decode => "decode",
            Kind::Mixed => "prefill beside decodes",
            Kind::Handover => "hand-over",
        }
    }
}

impl Point {
    /// Of which kind it is.
    pub fn kind(&self) -> Kind {
        match self {
            Point::Prefill { cached_tokens: 0, .. } => Kind::Prefill,
            Point::Prefill { .. } => Kind::Cached,
            Point::Decode { .. } => Kind::Decode,
            Point::Mixed { .. } => Kind::Mixed,
            Point::Handover { .. } => Kind::Handover,
        }
    }

    /// Whether an engine that is too small for `other` is too small for this one as well.
    pub fn needs_at_least(&self, other: &Point) -> bool {
        let (mine, its) = (self.needs(), other.needs());
        mine.0 >= its.0 && mine.1 >= its.1
    }

    /// Sequences at once, and the length of the longest.
    fn needs(&self) -> (u32, u32) {
        match *self {
            Point::Prefill { new_tokens, cached_tokens } => (1, new_tokens.saturating_add(cached_tokens)),
            Point::Decode { sequences, context_tokens } => (sequences, context_tokens),
            Point::Mixed { new_tokens, sequences, context_tokens } => {
                (sequences.saturating_add(1), context_tokens.max(new_tokens))
            }
            Point::Handover { tokens } => (1, tokens),
        }
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Point::Prefill { new_tokens, cached_tokens: 0 } => write!(f, "{new_tokens}"),
            Point::Prefill { new_tokens, cached_tokens } => {
                write!(f, "{new_tokens} after {cached_tokens} cached")
            }
            Point::Decode { sequences, context_tokens } => write!(f, "{sequences} of {context_tokens}"),
            Point::Mixed { new_tokens, sequences, context_tokens } => {
                write!(f, "{new_tokens} beside {sequences} of {context_tokens}")
            }
            Point::Handover { tokens } => write!(f, "{tokens}"),
        }
    }
}

/// What one measurement of a point showed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sample {
    /// Of a prompt and of a hand-over: until its first token. Of the others: of the step.
    pub seconds: f64,
    /// Of a prompt: tokens that were found cached, as the engine tells it.
    pub cached_tokens: u32,
    /// Of a step: tokens of context that all sequences together read.
    pub context_tokens: f64,
    /// Of a hand-over, where it was seen: by how much it lengthened a step of the engine that takes the KV.
    pub start_seconds: Option<f64>,
}
