//! The links of a fleet file.

use forebay_perf_model::{KvLayout, Profile};
use serde::Deserialize;

use crate::engine::Link;

/// What one piece costs beside its bytes, where nothing is said: the difference of the two layouts that were measured of an 8B
/// model on NVLink (h100-llama8b), of 1 and of 64 pieces a block: 0.0147 ms a token x 16 tokens / 63.
const DESCRIPTOR_US: f64 = 3.7;

/// The link of each rank: what a hand-over takes that has it to itself is `start_ms`, then `descriptor_us` for each piece and
/// the bytes. Hand-overs that move over it at the same time share it.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkEntry {
    /// 10^9 bytes a second, in each direction.
    pub gigabytes_per_second: f64,
    /// Milliseconds before anything moves; left out: as the profile measured.
    #[serde(default)]
    pub start_ms: Option<f64>,
    /// Microseconds of each piece: one a block in cross-layer blocks, two a layer and block in per-layer ones.
    #[serde(default = "descriptor_us")]
    pub descriptor_us: f64,
    /// Layers of the model.
    #[serde(default = "layers")]
    pub layers: u32,
}

fn descriptor_us() -> f64 {
    DESCRIPTOR_US
}

/// As of an 8B model.
fn layers() -> u32 {
    32
}

impl LinkEntry {
    /// As engines take it.
    ///
    /// # Errors
    /// A number out of bounds; engines without hand-overs; a layout of which `profile` measured none, without `start_ms`.
    pub(super) fn link(&self, layout: Option<KvLayout>, profile: &Profile) -> Result<Link, String> {
        let Self { gigabytes_per_second, start_ms, descriptor_us, layers } = *self;
        let layout = layout.ok_or("`link` is given, and `hand_over` is none: leave one of them out")?;
        let bounds = [
            ("gigabytes_per_second", gigabytes_per_second, 0.001, 1e6),
            ("start_ms", start_ms.unwrap_or(0.0), 0.0, 60_000.0),
            ("descriptor_us", descriptor_us, 0.0, 1e6),
            ("layers", f64::from(layers), 1.0, 1024.0),
        ];
        for (name, value, least, most) in bounds {
            if !(least..=most).contains(&value) {
                return Err(format!("`link.{name}` is {value}; give {least} to {most}"));
            }
        }
        let start_seconds = match start_ms {
            Some(start_ms) => start_ms / 1e3,
            None => profile.handover_seconds(layout, 0).ok_or_else(|| {
                format!("the profile {} measured no such hand-over: give `link.start_ms`", profile.name())
            })?,
        };
        Ok(Link {
            start_seconds,
            descriptor_seconds: descriptor_us / 1e6,
            bytes_per_second: gigabytes_per_second * 1e9,
            layers,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        engine::EngineSpec,
        fleet_file::{EngineEntry, FleetFile, FleetProblem, HandOver},
    };

    const LINK: LinkEntry =
        LinkEntry { gigabytes_per_second: 20.0, start_ms: None, descriptor_us: 2.0, layers: 32 };

    fn engine(change: impl FnOnce(&mut EngineEntry)) -> Result<EngineSpec, FleetProblem> {
        let mut file = FleetFile::of(1);
        file.engine[0].link = Some(LINK);
        change(&mut file.engine[0]);
        let profile = |name: &str| Ok(Arc::new(Profile::built_in(name).unwrap()));
        Ok(file.engines(&profile)?.remove(0))
    }

    #[test]
    fn a_link_says_what_a_hand_over_takes() {
        let takes = |hand_over, start_ms, blocks| {
            let link = Some(LinkEntry { start_ms, ..LINK });
            let engine = engine(|entry| (entry.link, entry.hand_over) = (link, hand_over));
            let cost = engine.unwrap().kind.handover(blocks);
            [cost.seconds, cost.moving_seconds].map(|seconds| (1e9 * seconds).round() as u64)
        };
        // 2 MiB at 20 GB/s are 104,857.6 ns.
        assert_eq!(takes(HandOver::CrossLayer, Some(3.0), 10), [3_000_000 + 1_068_576, 1_068_576]);
        assert_eq!(takes(HandOver::PerLayer, Some(3.0), 10), [3_000_000 + 2_328_576, 2_328_576]);
        assert_eq!(takes(HandOver::CrossLayer, None, 0), [6_500_000, 0], "the profile's start");
        // Without one, all is as measured.
        let measured = engine(|entry| entry.link = None).unwrap().kind.handover(100);
        assert!((measured.seconds - 6.5e-3 - 1600.0 * 1.93e-6).abs() < 1e-12, "{measured:?}");
        assert!((measured.moving_seconds - 1600.0 * 1.93e-6).abs() < 1e-12, "{measured:?}");
    }

    #[test]
    fn impossible_links_are_refused_with_what_to_do() {
        let check = |change: &dyn Fn(&mut EngineEntry), expected: &str| {
            let error = engine(change).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        let linked = |change: fn(&mut LinkEntry), expected: &str| {
            check(&|entry| change(entry.link.as_mut().unwrap()), expected);
        };
        linked(|link| link.gigabytes_per_second = 0.0, "`link.gigabytes_per_second` is 0; give 0.001 to");
        linked(|link| link.start_ms = Some(-1.0), "`link.start_ms` is -1; give 0 to 60000");
        linked(|link| link.descriptor_us = f64::NAN, "`link.descriptor_us` is NaN");
        linked(|link| link.layers = 0, "`link.layers` is 0; give 1 to 1024");
        check(&|entry| entry.hand_over = HandOver::None, "`link` is given, and `hand_over` is none");
        check(
            &|entry| entry.profile = "h100x2-qwen3-30b-a3b".to_owned(),
            "h100x2-qwen3-30b-a3b measured no such hand-over: give `link.start_ms`",
        );
    }
}
