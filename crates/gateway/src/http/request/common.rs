//! The fields that both bodies share, declared once, and what their values may be.

use std::{collections::BTreeMap, ops::RangeInclusive};

use forebay_types::TokenId;
use serde::{Deserialize, de::IgnoredAny};

use super::{
    Delivery, Spec,
    fields::{OneOrMany, Seed, Text},
};
use crate::http::{
    errors::{ApiError, abridged},
    limits::RequestLimits,
};

/// Below this a temperature would only overflow the softmax; it means "the most likely token" (as in vLLM).
const TEMPERATURE_MIN: f64 = 1e-5;

/// `stream_options`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<bool>,
}

/// `response_format`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ResponseFormat<'a> {
    #[serde(rename = "type", borrow)]
    pub(crate) kind: Text<'a>,
}

/// Declares a body and its [`Shared`] half in one struct. (serde's `flatten` would buffer every value, lose borrowing
/// and the paths of errors.)
macro_rules! declare_bodies {
    (
        shared { $($shared:ident: $shared_type:ty,)* }
        $($(#[$doc:meta])* struct $name:ident { $($(#[$own_attribute:meta])* $own:ident: $own_type:ty,)* })*
    ) => {
        /// The fields that both bodies have.
        #[derive(Debug)]
        pub(crate) struct Shared<'a> { $(pub(crate) $shared: $shared_type,)* }

        $(
            $(#[$doc])*
            #[derive(Debug, Deserialize)]
            pub(crate) struct $name<'a> {
                $($(#[$own_attribute])* pub(crate) $own: $own_type,)*
                $(#[serde(default, borrow = "'a", bound(deserialize = ""))] $shared: $shared_type,)*
            }
        )*
    };
}
