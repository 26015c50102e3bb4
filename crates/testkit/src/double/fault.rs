//! Ways to misbehave that all doubles share.

use serde::{Deserialize, Serialize};

use super::net::Door;
use crate::tokenizer::Token;

/// What a double does wrong, until it is healed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// New connections are accepted and never answered.
    Hang,
    /// New connections are accepted and closed at once.
    CloseAfterAccept,
    /// Every request that would generate is answered with 500 at once: a black hole for whoever routes by load.
    InternalError,
    /// Steps take this many times as long.
    Slow {
        /// 10 for ten times slower.
        factor: f64,
    },
    /// An answer's stream stops after this many tokens and stays open.
    StallAfter {
        /// Of the answer.
        tokens: usize,
    },
    /// An answer's connection breaks after this many tokens, without the end of the body.
    CloseAfter {
        /// Of the answer.
        tokens: usize,
    },
    /// A stream's first line never ends.
    EndlessLine,
    /// A stream's first event is no UTF-8.
    InvalidUtf8,
    /// Status 200 with an error as its body.
    ErrorBody,
    /// `/v1/models` names another model.
    WrongModel {
        /// The name that is shown.
        name: String,
    },
    /// `/tokenize` answers with the ids of another tokenizer.
    OtherTokenizer,
    /// KV events give another block size than the one the server has.
    WrongEventBlockSize {
        /// The size that is told, tokens.
        tokens: usize,
    },
    /// KV events name parents that were never stored.
    UnknownParents,
}

impl Fault {
    pub(crate) fn door(fault: Option<&Self>) -> Door {
        match fault {
            Some(Self::Hang) => Door::Hangs,
            Some(Self::CloseAfterAccept) => Door::Slams,
            _ => Door::Open,
        }
    }

    pub(crate) fn slowness(fault: Option<&Self>) -> f64 {
        match fault {
            Some(Self::Slow { factor }) => *factor,
            _ => 1.0,
        }
    }

    /// The ids that `/tokenize` gives for these.
    pub(crate) fn shown_tokens(fault: Option<&Self>, tokens: Vec<Token>) -> Vec<Token> {
        match fault {
            Some(Self::OtherTokenizer) => tokens.into_iter().map(|token| (token + 1) % 256).collect(),
            _ => tokens,
        }
    }

    /// Block size and unknown parents of events.
    pub(crate) fn event_lies(fault: Option<&Self>) -> (Option<usize>, bool) {
        match fault {
            Some(Self::WrongEventBlockSize { tokens }) => (Some(*tokens), false),
            Some(Self::UnknownParents) => (None, true),
            _ => (None, false),
        }
    }
}
