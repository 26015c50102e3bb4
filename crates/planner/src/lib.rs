#![doc = include_str!("../README.md")]

mod leanings;

pub use leanings::{Around, LeaningSettings, Leanings, MeanPrompt, Peer};
