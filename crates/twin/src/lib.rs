#![doc = include_str!("../README.md")]

mod clock;
mod content;
mod draw;
mod engine;
mod fleet_file;
mod gateway;
mod metrics;
mod record;
mod rule;
mod scenario;
mod sim;
mod sizing;
mod workload;

pub use clock::Time;
pub use content::Piece;
pub use draw::{Draw, mix};
pub use engine::{Delivery, EngineKind, EngineSpec};
pub use fleet_file::{EngineEntry, FleetFile, FleetProblem, GatewayEntry, HandOver, SendsFirst, Sight};
pub use gateway::{Ask, Gateway, GatewaySettings, Placed};
pub use metrics::{EngineSide, Outcome, Seen, Slo, Summary, mean, percentile};
pub use record::{Record, RecordSettings, Sample, StepRecord};
pub use rule::Rule;
pub use scenario::{BUDGET_TOKENS, Defaults, SLO, Source, Workload};
pub use sim::{Ran, Run, RunSettings};
pub use sizing::{Binds, Promise, Search, Shape, Trial};
pub use workload::{
    Chat, Fresh, Lengths, Measured, Session, StandIn, Trace, TraceError, TraceForm, TraceRequest, Turn,
    recorded,
};
