#![doc = include_str!("../README.md")]

mod added;
mod boundaries;
mod cuts;
mod definition;
mod encoder;
mod merges;
mod model;
mod normal;
mod split;
mod unicode;
mod words;

pub use cuts::{Cuts, Distance};
pub use encoder::{Added, Encoder};

/// A token's id.
pub type Token = u32;

/// Why a tokenizer cannot be reproduced: some part of its definition is not known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not supported: {what}")]
pub struct Unsupported {
    what: String,
}

impl Unsupported {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into() }
    }
}
