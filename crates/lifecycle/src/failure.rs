//! Why a request has no (whole) answer.

use std::{fmt, time::Duration};

/// Which bound on time a request met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deadline {
    /// `first_token_max`.
    FirstToken,
    /// `total_max`.
    Total,
}

impl fmt::Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Deadline::FirstToken => "first_token_max",
            Deadline::Total => "total_max",
        })
    }
}

/// Why a request has no (whole) answer. The shell turns this into a response, and has the cause at hand where a rank or
/// the placement gave one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No rank could take it, and none had tried. The placement's error says why, and whether waiting helps.
    #[error("no rank could take the request")]
    NotPlaced,
    /// Ranks were chosen, but their engines did not take it. Waiting helps if they were full.
    #[error("the request was refused {attempts} times and no other engine can take it; retry")]
    Refused {
        /// Placements that were tried.
        attempts: u32,
    },
    /// An engine says that the request itself cannot be served.
    #[error("the engine rejected the request")]
    Rejected,
    /// Lost before its first token, as often as is allowed: nothing was sent, so the client may retry.
    #[error("the request was lost {attempts} times before its first token; retry")]
    LostUnanswered {
        /// Placements that were tried.
        attempts: u32,
    },
    /// Lost after tokens were sent, and no other engine could continue. A retry starts anew.
    #[error("the engine was lost after {tokens_sent} tokens and no other could continue; retry the request")]
    LostMidStream {
        /// Tokens of all choices that were sent.
        tokens_sent: u64,
    },
    /// A bound on its time was met.
    #[error("the request took longer than {} s, the limit `{deadline}`", .limit.as_secs_f64())]
    DeadlineExceeded {
        /// Which.
        deadline: Deadline,
        /// Its value.
        limit: Duration,
    },
    /// Nobody listens any more.
    #[error("the client closed the connection")]
    ClientGone,
}
