#![doc = include_str!("../README.md")]

mod gather;

pub use gather::{Admit, GatherSettings, Gatherer, NotAWeight};
