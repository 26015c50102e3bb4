#![doc = include_str!("../README.md")]

mod arrivals;
mod compare;
mod histogram;
mod prompts;
mod record;
mod tally;

pub use arrivals::Arrivals;
pub use compare::{Comparison, Verdict, compare, median};
pub use histogram::{Histogram, Quantiles};
pub use prompts::{Prompts, Shape, derived_seed};
pub use record::{Failure, Outcome, Promise, Recorder, Usage};
pub use tally::{ErrorCount, Figures, Goodput, Tally};
