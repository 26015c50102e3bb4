#![doc = include_str!("../README.md")]

mod chains;
mod forgetful;
mod infer;
mod meter;
mod recorder;
mod replay;
mod report;
mod sessions;

#[cfg(test)]
mod tests;

pub use infer::{Inferred, Sight, TooLittle};
pub use meter::{Measured, Reading, SeatMeasured};
pub use recorder::{Limits, Lost, Recorder};
pub use replay::{Bench, Predicted, Way};
pub use report::{Band, Comparison, Metric, Row};
pub use sessions::trace;
