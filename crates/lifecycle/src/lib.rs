#![doc = include_str!("../README.md")]

mod choice;
mod failure;
mod lifecycle;
mod quarantine;
mod run;
mod words;

pub use failure::{Deadline, Failure};
pub use forebay_placement::Plan;
pub use lifecycle::Lifecycle;
pub use quarantine::{Quarantine, QuarantineLimits};
pub use words::{
    Accepted, Action, Event, Form, Health, LegOrder, Limits, Outcome, PlacementId, Purpose, Refusal, Start,
    Terms, Unplaced, Work,
};
