#![doc = include_str!("../README.md")]

mod choice;
mod failure;
mod lifecycle;
mod run;
mod words;

pub use failure::{Deadline, Failure};
pub use forebay_placement::Plan;
pub use lifecycle::Lifecycle;
pub use words::{
    Accepted, Action, Event, Health, LegOrder, Limits, Outcome, PlacementId, Purpose, Refusal, Start,
    Unplaced, Work,
};
