#![doc = include_str!("../README.md")]

mod chaos;
mod clock;
mod content;
mod draw;
mod engine;
mod faults;
mod fidelity;
mod fleet_file;
mod gateway;
mod links;
mod metrics;
mod record;
mod rule;
mod scenario;
mod sim;
mod sizing;
mod workload;

pub use chaos::Chaos;
pub use clock::Time;
pub use content::Piece;
pub use draw::{Draw, mix};
pub use engine::{Delivery, EngineKind, EngineSpec, Link};
pub use faults::{Bounds, Fault, FaultEntry, FaultKind, Trouble};
pub use fidelity::{Compared, Fidelity};
pub use fleet_file::{
    EngineEntry, FleetFile, FleetProblem, GatewayEntry, HandOver, LinkEntry, SendsFirst, Sight,
};
pub use gateway::{Ask, Gateway, GatewaySettings, Placed};
pub use metrics::{Ending, EngineSide, Outcome, Seen, Slo, Summary, mean, percentile};
pub use record::{Record, RecordSettings, Sample, StepRecord};
pub use rule::Rule;
pub use scenario::{BUDGET_TOKENS, Defaults, SLO, Source, Workload};
pub use sim::{Ran, Run, RunSettings, Violation};
pub use sizing::{
    Binds, Bisection, KV_PARTS, Promise, Search, Shape, Trial, between, frontier, with_less_kv,
};
pub use workload::{
    Chat, ClientError, ClientMix, Excerpt, Fresh, Lengths, Measured, Observed, Session, StandIn, Trace,
    TraceError, TraceForm, TraceRequest, Turn, recorded,
};
