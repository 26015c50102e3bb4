//! Identities.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// A token's number in its model's vocabulary. An alias, not a newtype: prompts travel as `&[u32]` through tokenizers,
/// hashing and engines, and no other `u32` of this workspace is called a token.
pub type TokenId = u32;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Arc<str>);

        impl $name {
            /// The text of the id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }
        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

text_id! {
    /// The name users see of an engine (`embedded-0`, a host and port). Survives restarts; an [`Incarnation`] does not.
    EngineName
}
text_id! {
    /// The id of one client request: taken from `x-request-id` or made by the gateway. Unique among live requests.
    RequestId
}
text_id! {
    /// Who pays: the name behind an API key, or `anonymous`. Tenants never share KV.
    TenantId
}
number_id! {
    /// One life of an engine, from lease to lapse. A restarted engine gets a new one, so a late message from the old
    /// can never be credited to the new.
    Incarnation
}
number_id! {
    /// One piece of a request's work on one rank (both phases, a prefill, a decode). Unique in the process.
    LegId
}
number_id! {
    /// One reservation of load on one rank.
    ReservationId
}

/// Identity of one full KV block given every block before it, the tenant's salt and the fleet's key. Comparable only
/// within one model and block size. It routes; whoever reuses KV under it also compares the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockHash(pub u64);

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// One independent scheduler and KV pool: what placement chooses. Void with its incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RankId {
    /// The life of the engine that this rank belongs to.
    pub incarnation: Incarnation,
    /// Data-parallel rank within the engine, from 0.
    pub dp_rank: u16,
}

impl fmt::Display for RankId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.incarnation, self.dp_rank)
    }
}
