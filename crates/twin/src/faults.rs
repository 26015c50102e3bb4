//! What goes wrong in a run, and when: a plan, as a file gives it or as it was drawn from a seed.
//!
//! Invariants: a plan is data; the same plan in the same run gives the same course of events. Every fault ends, except
//! engines and gateways that are not to come back.

use serde::{Deserialize, Serialize};

use crate::clock::Time;

/// Longest hang that an engine survives: whoever watches it takes it for dead then, and its keeper kills it. The gateway's.
pub(crate) const HANG_SECONDS_MAX: f64 = 10.0;

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fault {
    /// When it begins.
    pub at: Time,
    /// How long it lasts; `None`: to the end of the run.
    pub lasts: Option<Time>,
    /// What it is.
    pub trouble: Trouble,
}

/// What may go wrong. Engines and gateways are numbered from 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trouble {
    /// An engine's process dies, its connections break; at the end another serves in its place, with an empty cache.
    Crash {
        /// Which engine.
        engine: u32,
    },
    /// An engine's host is gone: nothing breaks, nothing is heard of it. At the end another serves in its place.
    Vanish {
        /// Which engine.
        engine: u32,
    },
    /// An engine does nothing, and goes on where it was. One that hangs for more than 10 s is killed then.
    Hang {
        /// Which engine.
        engine: u32,
    },
    /// An engine's steps take so many times as long.
    Slow {
        /// Which engine.
        engine: u32,
        /// At least 1.
        factor: f64,
    },
    /// An operator drains an engine, and takes it back.
    Drain {
        /// Which engine.
        engine: u32,
    },
    /// An engine's KV events get lost, come twice, or come late and so out of order, each with this chance, to each gateway
    /// on its own.
    Events {
        /// Which engine.
        engine: u32,
        /// 0 to 1.
        lost: f64,
        /// 0 to 1.
        doubled: f64,
        /// 0 to 1.
        late: f64,
    },
    /// An engine's loads are not heard of.
    StaleLoad {
        /// Which engine.
        engine: u32,
    },
    /// Hand-overs between two engines break off half-way.
    Transfers {
        /// Which holds the KV.
        from: u32,
        /// Which takes it in.
        to: u32,
    },
    /// A gateway dies with all that it holds; its clients see their connections break. At the end another takes its place,
    /// which knows nothing.
    GatewayLoss {
        /// Which gateway.
        gateway: u32,
    },
    /// Nobody is told of engines that come: gateways keep to those that they know.
    RegistryAway,
    /// An engine's clock is off: what it reports as of now is as of so many seconds later, or earlier.
    Skew {
        /// Which engine.
        engine: u32,
        /// How far.
        seconds: f64,
    },
    /// Each client that sends meanwhile goes away before the end with this chance.
    ClientsLeave {
        /// 0 to 1.
        share: f64,
    },
}

/// What an engine that is told of in a fault is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Engines of the fleet.
    pub engines: u32,
    /// Gateways before it.
    pub gateways: u32,
}

/// A fault as a file gives it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultEntry {
    /// When it begins, in seconds from the first arrival.
    pub at: f64,
    /// How long it lasts, in seconds; left out: to the end.
    #[serde(default)]
    pub seconds: Option<f64>,
    /// What goes wrong.
    pub kind: FaultKind,
    /// The engine, from 0, in order of the file.
    #[serde(default)]
    pub engine: Option<u32>,
    /// The engine that takes KV in, of `transfers`.
    #[serde(default)]
    pub to: Option<u32>,
    /// The gateway, of `gateway-loss`.
    #[serde(default)]
    pub gateway: u32,
    /// How many times as long steps take, of `slow`.
    #[serde(default = "twice")]
    pub factor: f64,
    /// Share of events that get lost, of `events`; of clients that leave, of `clients-leave`.
    #[serde(default)]
    pub share: Option<f64>,
    /// Share of events that come twice.
    #[serde(default)]
    pub doubled: f64,
    /// Share of events that come late.
    #[serde(default)]
    pub late: f64,
    /// How far a clock is off, in seconds, of `skew`.
    #[serde(default)]
    pub skew: f64,
}

fn twice() -> f64 {
    2.0
}

/// The kinds of faults by their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "they are those of `Trouble`")]
pub enum FaultKind {
    Crash,
    Vanish,
    Hang,
    Slow,
    Drain,
    Events,
    StaleLoad,
    Transfers,
    GatewayLoss,
    RegistryAway,
    Skew,
    ClientsLeave,
}

impl FaultEntry {
    /// The fault.
    ///
    /// # Errors
    /// A sentence: what is missing or out of bounds.
    pub fn fault(&self, bounds: Bounds) -> Result<Fault, String> {
        let moment = |name: &str, seconds: f64| {
            let sane = seconds.is_finite() && (0.0..=1e9).contains(&seconds);
            sane.then(|| Time::from_seconds(seconds))
                .ok_or(format!("`{name}` is {seconds}; give seconds, 0 or more"))
        };
        let known = |name: &str, engine: Option<u32>| match engine {
            None => Err(format!("it needs `{name}`, the number of an engine from 0")),
            Some(engine) if engine >= bounds.engines => Err(format!(
                "`{name}` is {engine}, and the engines are 0 to {}",
                bounds.engines.saturating_sub(1)
            )),
            Some(engine) => Ok(engine),
        };
        let share = |name: &str, share: f64| {
            (0.0..=1.0).contains(&share).then_some(share).ok_or(format!("`{name}` is {share}; give 0 to 1"))
        };
        let engine = || known("engine", self.engine);
        let trouble = match self.kind {
            FaultKind::Crash => Trouble::Crash { engine: engine()? },
            FaultKind::Vanish => Trouble::Vanish { engine: engine()? },
            FaultKind::Hang => Trouble::Hang { engine: engine()? },
            FaultKind::Slow if self.factor.is_finite() && self.factor >= 1.0 => {
                Trouble::Slow { engine: engine()?, factor: self.factor }
            }
            FaultKind::Slow => return Err(format!("`factor` is {}; give 1 or more", self.factor)),
            FaultKind::Drain => Trouble::Drain { engine: engine()? },
            FaultKind::Events => Trouble::Events {
                engine: engine()?,
                lost: share("share", self.share.unwrap_or(0.0))?,
                doubled: share("doubled", self.doubled)?,
                late: share("late", self.late)?,
            },
            FaultKind::StaleLoad => Trouble::StaleLoad { engine: engine()? },
            FaultKind::Transfers => Trouble::Transfers { from: engine()?, to: known("to", self.to)? },
            FaultKind::GatewayLoss if self.gateway < bounds.gateways => {
                Trouble::GatewayLoss { gateway: self.gateway }
            }
            FaultKind::GatewayLoss => {
                let last = bounds.gateways.saturating_sub(1);
                return Err(format!("`gateway` is {}, and the gateways are 0 to {last}", self.gateway));
            }
            FaultKind::RegistryAway => Trouble::RegistryAway,
            FaultKind::Skew if self.skew.is_finite() => {
                Trouble::Skew { engine: engine()?, seconds: self.skew }
            }
            FaultKind::Skew => return Err(format!("`skew` is {}; give seconds", self.skew)),
            FaultKind::ClientsLeave => {
                Trouble::ClientsLeave { share: share("share", self.share.unwrap_or(0.1))? }
            }
        };
        let lasts = self.seconds.map(|seconds| moment("seconds", seconds)).transpose()?;
        Ok(Fault { at: moment("at", self.at)?, lasts, trouble })
    }
}

impl Fault {
    /// When it is over.
    pub(crate) fn end(&self) -> Option<Time> {
        self.lasts.map(|lasts| self.at + lasts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { engines: 2, gateways: 1 };

    fn entry(kind: FaultKind) -> FaultEntry {
        FaultEntry {
            at: 1.0,
            seconds: Some(2.0),
            kind,
            engine: None,
            to: None,
            gateway: 0,
            factor: 2.0,
            share: None,
            doubled: 0.0,
            late: 0.0,
            skew: 0.0,
        }
    }

    #[test]
    fn a_fault_names_what_it_lacks() {
        let crash = entry(FaultKind::Crash);
        assert_eq!(crash.fault(BOUNDS).unwrap_err(), "it needs `engine`, the number of an engine from 0");
        let crash = FaultEntry { engine: Some(2), ..crash };
        assert_eq!(crash.fault(BOUNDS).unwrap_err(), "`engine` is 2, and the engines are 0 to 1");
        let fault = FaultEntry { engine: Some(1), ..crash }.fault(BOUNDS).unwrap();
        assert_eq!(fault.end(), Some(Time::from_seconds(3.0)));
        assert_eq!(fault.trouble, Trouble::Crash { engine: 1 });
    }

    #[test]
    fn numbers_out_of_bounds_are_refused() {
        let of = |change: fn(&mut FaultEntry)| {
            let mut entry = FaultEntry { engine: Some(0), to: Some(1), ..entry(FaultKind::Slow) };
            change(&mut entry);
            entry.fault(BOUNDS).unwrap_err()
        };
        assert_eq!(of(|it| it.factor = 0.5), "`factor` is 0.5; give 1 or more");
        assert_eq!(of(|it| it.at = -1.0), "`at` is -1; give seconds, 0 or more");
        assert_eq!(of(|it| it.seconds = Some(f64::NAN)), "`seconds` is NaN; give seconds, 0 or more");
        assert_eq!(of(|it| (it.kind, it.late) = (FaultKind::Events, 1.5)), "`late` is 1.5; give 0 to 1");
        assert_eq!(
            of(|it| (it.kind, it.gateway) = (FaultKind::GatewayLoss, 1)),
            "`gateway` is 1, and the gateways are 0 to 0"
        );
        assert!(of(|it| (it.kind, it.to) = (FaultKind::Transfers, None)).contains("`to`"));
        assert!(of(|it| (it.kind, it.skew) = (FaultKind::Skew, f64::INFINITY)).contains("`skew`"));
    }
}
