//! Who chooses: a policy of `forebay-placement`, one over engines with fixed roles, a sticky router, or what was seen.

use std::{fmt, str::FromStr};

use forebay_placement::Policy;
use forebay_types::Role;

/// How requests find their engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Every engine takes everything; the policy chooses.
    Policy(Policy),
    /// The first engines prefill and the others decode; the policy chooses within that. `static-2p6d` takes the fewest
    /// sequences, `static-2p6d-cost` the least cost.
    Static {
        /// Engines that only prefill; the first ones.
        prefill: usize,
        /// Engines that only decode.
        decode: usize,
        /// What chooses among them.
        policy: Policy,
    },
    /// The engine that a hash of the session names, whatever it carries. What routers with session affinity do.
    Sticky,
    /// The engine whose number is the session's key: a replay of where requests went. No name on the command line means it,
    /// for only who makes the sessions can know their keys.
    Pinned,
}

impl Rule {
    /// Every policy, the sticky router and, if engines can hand over, a quarter and a half of them for prefill.
    pub fn all(engines: usize, hands_over: bool) -> Vec<Self> {
        let policies = Policy::ALL.into_iter().map(Self::Policy);
        let mut prefills = vec![(engines / 4).max(1), engines / 2];
        prefills.dedup();
        let splits = prefills.into_iter().filter(|&prefill| hands_over && prefill > 0 && prefill < engines);
        let splits = splits.map(|prefill| Self::Static {
            prefill,
            decode: engines - prefill,
            policy: Policy::LeastLoad,
        });
        policies.chain([Self::Sticky]).chain(splits).collect()
    }

    /// The policy to ask; `None` for the sticky router and for pinned requests, which ask nobody.
    pub fn policy(self) -> Option<Policy> {
        match self {
            Self::Policy(policy) | Self::Static { policy, .. } => Some(policy),
            Self::Sticky | Self::Pinned => None,
        }
    }

    /// What engine `number` does.
    pub fn role(self, number: usize) -> Role {
        match self {
            Self::Policy(_) | Self::Sticky | Self::Pinned => Role::Both,
            Self::Static { prefill, .. } if number < prefill => Role::Prefill,
            Self::Static { .. } => Role::Decode,
        }
    }

    /// Engines that it needs exactly, if it does.
    pub fn engines(self) -> Option<usize> {
        match self {
            Self::Static { prefill, decode, .. } => Some(prefill + decode),
            Self::Policy(_) | Self::Sticky | Self::Pinned => None,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => f.write_str(policy.name()),
            Self::Static { prefill, decode, policy: Policy::LeastLoad } => {
                write!(f, "static-{prefill}p{decode}d")
            }
            Self::Static { prefill, decode, policy } => write!(f, "static-{prefill}p{decode}d-{policy}"),
            Self::Sticky => f.write_str("sticky"),
            Self::Pinned => f.write_str("pinned"),
        }
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "sticky" {
            return Ok(Self::Sticky);
        }
        let Some(split) = text.strip_prefix("static-") else {
            return text.parse().map(Self::Policy).map_err(|error| format!("{error}, sticky, static-2p6d"));
        };
        let (counts, policy) = match split.split_once('-') {
            Some((counts, policy)) => (counts, policy.parse().map_err(|error| format!("{text}: {error}"))?),
            None => (split, Policy::LeastLoad),
        };
        let numbers = counts.strip_suffix('d').and_then(|counts| counts.split_once('p'));
        let numbers =
            numbers.and_then(|(prefill, decode)| Some((prefill.parse().ok()?, decode.parse().ok()?)));
        match numbers {
            Some((prefill, decode)) if prefill > 0 && decode > 0 => {
                Ok(Self::Static { prefill, decode, policy })
            }
            _ => Err(format!("{text}: expected a name like static-2p6d")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for rule in Rule::all(8, true) {
            assert_eq!(rule.to_string().parse(), Ok(rule));
        }
        let costed = Rule::Static { prefill: 2, decode: 6, policy: Policy::Cost };
        assert_eq!("static-2p6d-cost".parse(), Ok(costed));
        assert_eq!(costed.to_string().parse(), Ok(costed));
        for wrong in ["static-2p", "static-0p4d", "static-2p6d-best", "nearest"] {
            assert!(wrong.parse::<Rule>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_first_engines_of_a_static_split_prefill() {
        let rule: Rule = "static-2p6d".parse().unwrap();
        assert_eq!((rule.role(1), rule.role(2), rule.engines()), (Role::Prefill, Role::Decode, Some(8)));
        assert_eq!(Rule::all(1, true).len(), Rule::all(1, false).len());
    }
}
