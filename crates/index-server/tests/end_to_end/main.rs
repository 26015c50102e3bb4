//! The server over real sockets: HTTP, gRPC, and engines that publish over ZMQ.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "helpers of tests fail as tests do")]

mod doors;
mod engines;
mod rig;
