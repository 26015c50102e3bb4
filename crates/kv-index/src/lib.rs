#![doc = include_str!("../README.md")]

mod filter;
mod heads;
mod index;
mod lookup;
mod names;
mod notes;
mod overlaps;
#[cfg(all(test, feature = "shuttle"))]
mod races;
mod ranks;
mod reclaim;
mod routed;
mod runs;
mod segment;
mod segments;
mod spread;
mod sync;
mod writer;

pub use index::{Applied, BYTES_MIN, IndexLimits, IndexStats, KvIndex};
pub use overlaps::{Overlaps, TierBlocks};
pub use ranks::RankStats;
pub use routed::{RoutedCache, RoutedLimits};
