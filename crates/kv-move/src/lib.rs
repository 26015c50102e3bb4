#![doc = include_str!("../README.md")]
#![allow(unsafe_code, reason = "shared memory has no safe interface; `region::mapping` holds all of it")]
#![deny(clippy::undocumented_unsafe_blocks)]

mod checksum;
pub mod conformance;
pub mod exchange;
pub mod faulty;
mod lease;
mod mover;
mod owner;
mod plan;
mod region;
mod shm;
mod transfer;

pub use exchange::{ExchangeError, KvDescriptor, Received, recv_region, send_region};
pub use faulty::{Fault, Faults, FaultyMover, Gate};
pub use lease::{Expired, LeaseError, LeaseId, LeaseTable};
pub use mover::{
    Callback, Cancel, Checksum, Completion, MoveError, Mover, Options, Outcome, Report, SubmitError, Ticket,
    TicketId, block_on_move,
};
pub use plan::{BlockPair, BlockRef, CopyPlan, Piece, PlanError, Source};
pub use region::{Layout, LayoutError, Region, RegionError, RegionKey};
pub use shm::{MoverStats, SharedMemoryMover, SharedMemorySettings};
