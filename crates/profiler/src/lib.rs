#![doc = include_str!("../README.md")]

mod budget;
mod fit;
mod jumps;
mod least_squares;
mod plan;
mod point;
mod survey;
pub mod trace;

pub use budget::{probe_tokens, step_tokens};
pub use fit::{Errors, Fit, FitError, Fitted, Subject, fit};
pub use plan::{Scope, plan};
pub use point::{Kind, Point, Sample};
pub use survey::{Outcome, Pace, Progress, Survey, Why};
