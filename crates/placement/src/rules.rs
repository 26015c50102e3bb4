//! The policies that do not look at seconds: what others do, to compare with, and ways out.
//!
//! In: the eligible ranks. Out: one of them, or a pair. Start at [`pair`].
//!
//! Each is a score per rank, the least of which wins, or a draw by the seed. They split only where no rank may do both
//! phases; then the prompt goes by the rule and the decode leg by the same rule without a prompt.

use forebay_types::Role;

use crate::{
    choose::{Chooser, Pair, draw, mix},
    policy::Policy,
    snapshot::RankView,
    standing,
};

/// What a leg brings to the rank that is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Brings {
    /// A prompt that it has to compute.
    Prompt,
    /// KV that was computed elsewhere.
    Kv,
}

/// What the rule takes, and among how many equals.
pub(crate) fn pair(chooser: &Chooser<'_>, policy: Policy, seed: u64) -> (Pair, u32) {
    let ranks = 0..chooser.priced.len();
    let both: Vec<usize> = ranks.clone().filter(|&rank| chooser.priced[rank].role == Role::Both).collect();
    let rule = Rule { chooser, policy, seed };
    if !both.is_empty() {
        let (rank, tied) = rule.take(&both, Brings::Prompt);
        return (chooser.pair(rank, rank), tied);
    }
    let partners = |prefill: usize| {
        let source = chooser.view(prefill);
        let decodes = ranks.clone().filter(|&rank| chooser.may_decode(rank));
        decodes.filter(move |&rank| chooser.snapshot.pairs(source, chooser.view(rank)))
    };
    let prefills: Vec<usize> =
        ranks.clone().filter(|&rank| chooser.may_prefill(rank) && partners(rank).next().is_some()).collect();
    let (prefill, tied) = rule.take(&prefills, Brings::Prompt);
    let decodes: Vec<usize> = partners(prefill).collect();
    let (decode, tied_decodes) = rule.take(&decodes, Brings::Kv);
    (chooser.pair(prefill, decode), tied * tied_decodes)
}

struct Rule<'a> {
    chooser: &'a Chooser<'a>,
    policy: Policy,
    seed: u64,
}

impl Rule<'_> {
    /// One of `ranks` (not empty) and how many were equal.
    fn take(&self, ranks: &[usize], brings: Brings) -> (usize, u32) {
        let sequences = |rank: usize| f64::from(self.chooser.view(rank).sequences());
        match self.policy {
            Policy::RoundRobin => (ranks[(self.seed % ranks.len() as u64) as usize], 1),
            Policy::Random | Policy::Cost => self.least(ranks, |_| 0.0),
            Policy::LeastLoad => self.least(ranks, sequences),
            Policy::PowerOfTwo => self.least(&self.two_of(ranks), sequences),
            Policy::PrefixAffinity => self.same_for_same(ranks),
            Policy::LMetric => self.least(ranks, |rank| {
                let new_tokens = self.prompt(brings, f64::from(self.chooser.priced[rank].new_tokens));
                let batch = f64::from(standing::decodes(self.chooser.view(rank)));
                (new_tokens + 1.0) * (batch + 1.0)
            }),
            Policy::Dynamo => self.by_blocks(ranks, brings),
        }
    }

    /// What belongs to a prompt that is computed counts only where one is.
    fn prompt(&self, brings: Brings, amount: f64) -> f64 {
        if brings == Brings::Prompt { amount } else { 0.0 }
    }

    fn least(&self, ranks: &[usize], score: impl Fn(usize) -> f64) -> (usize, u32) {
        let least = ranks.iter().map(|&rank| score(rank)).fold(f64::INFINITY, f64::min);
        draw(ranks.iter().copied().filter(|&rank| score(rank) <= least), self.seed)
    }

    /// Two different ones by the seed, or the only one.
    fn two_of(&self, ranks: &[usize]) -> Vec<usize> {
        let first = (mix(self.seed) % ranks.len() as u64) as usize;
        let Some(others) = (ranks.len() as u64).checked_sub(1).filter(|&others| others > 0) else {
            return ranks.to_vec();
        };
        let second = (first + 1 + (mix(self.seed ^ u64::MAX) % others) as usize) % ranks.len();
        vec![ranks[first], ranks[second]]
    }

    /// Rendezvous hashing: each rank draws a number for the prompt's beginning, and the greatest has it, unless that rank
    /// has more than its share. A rank that joins or leaves moves only the prompts that it wins or had.
    fn same_for_same(&self, ranks: &[usize]) -> (usize, u32) {
        let Some(beginning) = self.chooser.beginning else { return self.least(ranks, |_| 0.0) };
        let sequences = |rank: usize| f64::from(self.chooser.view(rank).sequences());
        let mean = ranks.iter().map(|&rank| sequences(rank)).sum::<f64>() / ranks.len() as f64;
        // With this one more, as the published bound has it.
        let most = (self.chooser.weights.affinity_load_factor * (mean + 1.0 / ranks.len() as f64)).ceil();
        let drawn = |rank: usize| {
            let view = self.chooser.view(rank);
            let name = view.engine.as_str().bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
            mix(beginning.0 ^ mix(name ^ u64::from(view.id.dp_rank)))
        };
        let within = ranks.iter().copied().filter(|&rank| sequences(rank) < most.max(1.0));
        let rank = within.max_by_key(|&rank| drawn(rank)).or_else(|| {
            ranks.iter().copied().max_by_key(|&rank| drawn(rank)) // a factor below 1 may leave none
        });
        (rank.expect("there are ranks"), 1)
    }

    /// Dynamo's cost: `scale x max(0, queued and new prefill blocks - credit x cached blocks) + decode blocks + weight x
    /// requests`.
    fn by_blocks(&self, ranks: &[usize], brings: Brings) -> (usize, u32) {
        let knobs = self.chooser.weights.dynamo;
        let cost = |rank: usize| {
            let (priced, view) = (&self.chooser.priced[rank], self.chooser.view(rank));
            let block_tokens = f64::from(view.block_size_tokens.max(1));
            let prompt_tokens = f64::from(priced.new_tokens) + f64::from(priced.cached_tokens);
            let queued = (standing::queued_tokens(view) as f64 + prompt_tokens) / block_tokens;
            let cached = f64::from(priced.cached_tokens) / block_tokens;
            let prefill = (queued - knobs.overlap_credit * cached).max(0.0);
            let decode = active_blocks(view) + f64::from(priced.missing_blocks);
            self.prompt(brings, knobs.prefill_load_scale * prefill)
                + decode
                + knobs.active_request_weight * f64::from(view.sequences())
        };
        if knobs.temperature == 0.0 {
            return self.least(ranks, cost);
        }
        let costs: Vec<f64> = ranks.iter().map(|&rank| cost(rank)).collect();
        let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
        let most = costs.iter().copied().fold(0.0, f64::max);
        let width = if most > least { most - least } else { 1.0 };
        let chance = |cost: f64| (-(cost - least) / width / knobs.temperature).exp();
        let sum: f64 = costs.iter().map(|&cost| chance(cost)).sum();
        let mut left = sum * (mix(self.seed) >> 11) as f64 / (1_u64 << 53) as f64;
        let drawn = costs.iter().position(|&cost| {
            left -= chance(cost);
            left < 0.0
        });
        (ranks[drawn.unwrap_or(ranks.len() - 1)], 1)
    }
}

/// Blocks that sequences of the rank use, or were promised.
fn active_blocks(rank: &RankView) -> f64 {
    let used = rank.load.blocks_total.saturating_sub(rank.load.blocks_free);
    f64::from(used) + f64::from(rank.reserved.blocks)
}
