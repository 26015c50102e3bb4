#![doc = include_str!("../README.md")]

mod journal;
mod question;
mod router;

pub use journal::{Differs, Journal};
pub use question::{Known, PromptUnit, Question};
pub use router::{Gathered, Router, RouterSettings};
