//! From a tokenised request to a stream of tokens: the shell around the cores.
//!
//! Start at [`api`], the seam to HTTP.

pub mod api;
