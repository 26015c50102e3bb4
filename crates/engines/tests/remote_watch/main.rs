//! Attaching to engines and watching them: against the doubles of `testkit`, servers of a few lines, and pyzmq.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "helpers of tests fail as tests do")]

mod attach;
mod observe;
mod pyzmq;
mod rig;
