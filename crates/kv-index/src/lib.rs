#![doc = include_str!("../README.md")]

mod holders;
mod index;
mod overlaps;
mod ranks;
mod routed;
mod table;

pub use index::{Applied, IndexLimits, IndexStats, KvIndex};
pub use overlaps::Overlaps;
pub use ranks::RankStats;
pub use routed::{RoutedCache, RoutedLimits};
