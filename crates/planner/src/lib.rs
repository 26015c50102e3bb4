#![doc = include_str!("../README.md")]

mod leanings;

pub use leanings::{LeaningSettings, Leanings, MeanPrompt, Peer};
