#![doc = include_str!("../README.md")]

mod driver;
pub mod embedded;
mod local;
mod reports;
pub mod simulated;
mod stream;

pub use driver::{
    Driver, EngineFacts, EngineLimits, KvHandle, Launch, LaunchError, Leg, LegEvent, Prompt, StartError,
    TransferOutcome, TransferReport, Work,
};
pub use local::{LocalEngine, LocalFleet, LocalLauncher};
pub use reports::{KvSnapshot, Report, Reports};
pub use stream::LegStream;
