#![doc = include_str!("../README.md")]

mod breaker;
mod counters;
mod estimate;
mod event;
mod fleet;
mod pairs;
mod rank;
mod reservation;
mod settings;
mod share;
mod tail;

#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use event::{Applied, EngineFacts, Event, Ignored, LoadSight, Progress};
pub use fleet::Fleet;
pub use settings::{BreakerSettings, FleetSettings};
