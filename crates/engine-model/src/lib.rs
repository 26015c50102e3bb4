#![doc = include_str!("../README.md")]

pub mod content;
mod job;
mod plan;
mod pool;
mod scheduler;

pub use job::{Job, Output, SchedulerConfig, SubmitError, Work};
pub use plan::{BlockCopy, Chunk, Import, Started, StepPlan};
pub use pool::{Accounting, Generation};
pub use scheduler::Scheduler;
