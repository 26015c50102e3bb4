//! The orchestrator over real (simulated) engines: what a client sees while engines die, clients leave and load moves.

mod conversation;
mod disconnects;
mod migration;
mod replayed;
mod rig;
mod splitting;
