#![doc = include_str!("../README.md")]

mod driver;
pub mod embedded;
mod local;
pub mod remote;
mod reports;
pub mod simulated;
mod stream;

pub use driver::{
    Accepts, Audit, Bootstrap, CacheSight, ClientBody, ClientRoute, Driver, EngineFacts, EngineLimits,
    FirstToken, KvAbilities, KvHandle, KvPlace, Launch, LaunchError, Leg, LegEvent, LegUsage, Prompt, Reply,
    StartError, TransferOutcome, TransferReport, Work,
};
pub use local::{LocalEngine, LocalFleet, LocalLauncher};
pub use reports::{KvSnapshot, LoadReport, Notice, Report, Reports};
pub use stream::{LegControl, LegStream, Outbox, leg_stream};
