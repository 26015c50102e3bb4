#![doc = include_str!("../README.md")]

mod choose;
mod cost;
mod error;
mod explain;
mod filter;
mod group;
mod pace;
mod place;
mod policy;
mod rules;
mod sharing;
mod snapshot;
mod standing;
mod weights;

#[cfg(test)]
mod tests;

pub use error::{Missing, PlaceError};
pub use explain::{
    Candidate, Excluded, Explanation, RankCost, RankInputs, RequestInputs, Row, Savings, Table, Terms,
};
pub use filter::{Exclusion, Relaxed};
pub use place::{Decision, Form, Plan, Request, Reservations, beginning, place};
pub use policy::{Policy, UnknownPolicy};
pub use sharing::{Sharing, sharing};
pub use snapshot::{Breaker, Links, RankState, RankView, Reserved, Snapshot};
pub use weights::{DynamoKnobs, Weights, WeightsError};
