//! The rules by which a candidate can be chosen, and their names.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How a candidate is chosen. Every policy obeys the same eligibility.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The least cost in seconds, aggregated or split.
    #[default]
    Cost,
    /// Eligible ranks in turn.
    RoundRobin,
    /// The fewest sequences: waiting, running and reserved.
    LeastLoad,
    /// Any eligible rank, by the seed.
    Random,
    /// The one with fewer sequences of two that are drawn by the seed (Mitzenmacher's two choices).
    PowerOfTwo,
    /// Always the same rank for prompts that begin alike, by rendezvous hashing, passing over ranks with more sequences
    /// than `affinity_load_factor` times the mean.
    PrefixAffinity,
    /// Least `(new prompt tokens + 1) × (batch + 1)`: no rates and no weights (LMetric, arXiv 2603.15202). The sanity
    /// baseline.
    #[serde(rename = "lmetric")]
    LMetric,
    /// Least `prefill blocks - credit for cached ones + decode blocks`, the cost that NVIDIA Dynamo documents; its knobs
    /// are [`DynamoKnobs`](crate::DynamoKnobs).
    Dynamo,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Policy; 8] = [
        Policy::Cost,
        Policy::RoundRobin,
        Policy::LeastLoad,
        Policy::Random,
        Policy::PowerOfTwo,
        Policy::PrefixAffinity,
        Policy::LMetric,
        Policy::Dynamo,
    ];

    /// The name in settings, commands and records.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Cost => "cost",
            Policy::RoundRobin => "round-robin",
            Policy::LeastLoad => "least-load",
            Policy::Random => "random",
            Policy::PowerOfTwo => "power-of-two",
            Policy::PrefixAffinity => "prefix-affinity",
            Policy::LMetric => "lmetric",
            Policy::Dynamo => "dynamo",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A policy of that name does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown policy `{given}`; did you mean `{nearest}`? (policies: cost, round-robin, least-load, random, power-of-two, \
     prefix-affinity, lmetric, dynamo)"
)]
pub struct UnknownPolicy {
    /// What was asked for.
    pub given: String,
    /// The policy whose name is the fewest edits away.
    pub nearest: Policy,
}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        Policy::ALL.into_iter().find(|policy| policy.name() == given).ok_or_else(|| UnknownPolicy {
            given: given.to_owned(),
            nearest: Policy::ALL
                .into_iter()
                .min_by_key(|policy| edits(policy.name(), given))
                .expect("there are policies"),
        })
    }
}

/// Insertions, deletions and substitutions of characters that turn `from` into `to`.
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &b) in to.iter().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_a_wrong_one_names_the_nearest() {
        for policy in Policy::ALL {
            assert_eq!(policy.name().parse(), Ok(policy));
            assert_eq!(serde_json::to_value(policy).unwrap(), policy.name());
        }
        let check = |given: &str, nearest| assert_eq!(given.parse::<Policy>().unwrap_err().nearest, nearest);
        check("roundrobin", Policy::RoundRobin);
        check("least_load", Policy::LeastLoad);
        check("Cost", Policy::Cost);
        check("metric", Policy::LMetric);
        check("rand", Policy::Random);
        check("power-of-2", Policy::PowerOfTwo);
        check("nvidia-dynamo", Policy::Dynamo);
    }

    #[test]
    fn the_error_lists_every_policy() {
        let text = "x".parse::<Policy>().unwrap_err().to_string();
        for policy in Policy::ALL {
            assert!(text.contains(policy.name()), "{text}");
        }
    }
}
