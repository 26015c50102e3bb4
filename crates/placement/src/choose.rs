//! The candidates of a request, and the rules that choose among them.
//!
//! In: the eligible ranks, priced. Out: every candidate worth looking at, and the chosen one. Start at [`Chooser::choose`].
//!
//! Aggregated candidates are all listed. Pairs are all listed in a small fleet; in a large one only the best few ranks
//! of each side are paired: the price of a pair is the prefill part of one rank plus the decode part of another plus a
//! transfer, so with equal links no pair beats the best rank of each side (nor, where that is one rank, both phases on
//! it), and the rest of the margin is for links that differ.

use forebay_types::{BlockHash, Leaning, Role};

use crate::{
    cost::Priced,
    explain::Terms,
    place::Plan,
    policy::Policy,
    rules,
    snapshot::{RankView, Snapshot},
    weights::Weights,
};

/// Pairs up to which all are compared: eight ranks that may both prefill and decode.
const PAIRS_EXACT_MAX: usize = 64;

/// Ranks of each side (and KV layout) that are paired in larger fleets.
const SIDE_RANKS_MAX: usize = 8;

/// Requests of others that a rank may have got since it was heard of, where nearly all are others'. With 2 the fullest of
/// eight engines stays mostly within 1.5 times the mean among sixteen gateways (with 0 up to 4 times), and prompts still
/// follow their caches; with 3 they begin to lose them.
const UNHEARD_REQUESTS: f64 = 2.0;

/// One candidate: indices of priced ranks, equal for an aggregated one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pair {
    pub(crate) prefill: usize,
    pub(crate) decode: usize,
    pub(crate) total_seconds: f64,
}

impl Pair {
    fn is_split(&self) -> bool {
        self.prefill != self.decode
    }

    pub(crate) fn plan(&self, priced: &[Priced]) -> Plan {
        let (prefill, decode) = (priced[self.prefill].id, priced[self.decode].id);
        if prefill == decode { Plan::Aggregated { rank: prefill } } else { Plan::Split { prefill, decode } }
    }
}

/// The candidates and the chosen one of them.
#[derive(Debug)]
pub(crate) struct Choice {
    pub(crate) pairs: Vec<Pair>,
    /// Index in `pairs`.
    pub(crate) chosen: usize,
    /// Candidates among which the seed chose; 1 if the rule left no choice.
    pub(crate) tied: u32,
}

/// What every step of a choice looks at.
pub(crate) struct Chooser<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) weights: &'a Weights,
    /// The eligible ranks.
    pub(crate) priced: &'a [Priced],
    /// What prompts that begin alike have in common; see [`Request::beginning`](crate::Request::beginning).
    pub(crate) beginning: Option<BlockHash>,
}

impl Chooser<'_> {
    /// Lists the candidates and takes one by `policy`; `None` if there is none.
    pub(crate) fn choose(&self, policy: Policy, seed: u64) -> Option<Choice> {
        let mut pairs = self.candidates(policy == Policy::Cost);
        if pairs.is_empty() {
            return None;
        }
        if policy == Policy::Cost {
            let (chosen, tied) = self.least_cost(&pairs, seed);
            return Some(Choice { pairs, chosen, tied });
        }
        let (pair, tied) = rules::pair(self, policy, seed);
        let chosen = pairs.iter().position(|&listed| listed == pair).unwrap_or_else(|| {
            pairs.push(pair);
            pairs.len() - 1
        });
        Some(Choice { pairs, chosen, tied })
    }

    /// A candidate's price, term by term.
    pub(crate) fn terms(&self, prefill: usize, decode: usize) -> Terms {
        let (p, d) = (&self.priced[prefill], &self.priced[decode]);
        if prefill == decode {
            return p.aggregated();
        }
        p.split(d, self.snapshot.links.get(p.id.incarnation, d.id.incarnation), self.weights)
    }

    /// A candidate's time to the first token.
    pub(crate) fn ttft(&self, prefill: usize, decode: usize) -> f64 {
        self.terms(prefill, decode).ttft(self.view(prefill).first_token)
    }

    pub(crate) fn view(&self, rank: usize) -> &RankView {
        &self.snapshot.ranks()[self.priced[rank].index]
    }

    pub(crate) fn pair(&self, prefill: usize, decode: usize) -> Pair {
        Pair { prefill, decode, total_seconds: self.terms(prefill, decode).total() }
    }

    /// With `leanings`, ranks that lean to prefill decode nothing and those that lean to decode prefill for no other.
    fn candidates(&self, leanings: bool) -> Vec<Pair> {
        let all = 0..self.priced.len();
        let leans = |rank: usize, to: Leaning| leanings && self.priced[rank].leaning == to;
        let (mut prefills, mut decodes) = (Vec::with_capacity(all.len()), Vec::with_capacity(all.len()));
        prefills.extend(all.clone().filter(|&rank| self.may_prefill(rank) && !leans(rank, Leaning::Decode)));
        decodes.extend(all.filter(|&rank| self.may_decode(rank) && !leans(rank, Leaning::Prefill)));
        if prefills.len() * decodes.len() > PAIRS_EXACT_MAX {
            self.keep_best(&mut prefills, |rank| rank.prefill_side());
            self.keep_best(&mut decodes, |rank| rank.decode_side(self.snapshot.links.prior(), self.weights));
        }
        let mut pairs = Vec::with_capacity(self.priced.len() + prefills.len() * decodes.len());
        for (rank, priced) in self.priced.iter().enumerate() {
            if priced.role == Role::Both && !(leans(rank, Leaning::Prefill) && self.hands_over(rank)) {
                pairs.push(Pair { prefill: rank, decode: rank, total_seconds: priced.aggregated().total() });
            }
        }
        for &prefill in &prefills {
            let (p, source) = (&self.priced[prefill], self.view(prefill));
            let links = self.snapshot.links.leaving(source.id.incarnation);
            let partners = decodes.iter().filter(|&&decode| self.snapshot.pairs(source, self.view(decode)));
            pairs.extend(partners.map(|&decode| {
                let d = &self.priced[decode];
                let terms = p.split(d, links.to(d.id.incarnation), self.weights);
                Pair { prefill, decode, total_seconds: terms.total() }
            }));
        }
        pairs
    }

    /// Whether a rank that leans to prefill has another to hand over to now; else it keeps both phases.
    fn hands_over(&self, rank: usize) -> bool {
        let takes = |other: usize| {
            let view = self.view(other);
            self.may_decode(other)
                && view.leaning != Leaning::Prefill
                && self.snapshot.pairs(self.view(rank), view)
        };
        self.may_prefill(rank) && (0..self.priced.len()).any(takes)
    }

    pub(crate) fn may_prefill(&self, rank: usize) -> bool {
        let view = self.view(rank);
        view.role.prefills() && view.can_export
    }

    pub(crate) fn may_decode(&self, rank: usize) -> bool {
        let view = self.view(rank);
        view.role.decodes() && view.can_import
    }

    /// Keeps the cheapest ranks of each KV layout: those of different layouts cannot stand in for each other.
    fn keep_best(&self, side: &mut Vec<usize>, seconds: impl Fn(&Priced) -> f64) {
        let layout = |rank: usize| (self.view(rank).kv_layout, self.view(rank).block_size_tokens);
        let mut keyed: Vec<((u64, u32), f64, usize)> =
            side.iter().map(|&rank| (layout(rank), seconds(&self.priced[rank]), rank)).collect();
        if !keyed.is_sorted_by_key(|&(layout, _, _)| layout) {
            keyed.sort_unstable_by_key(|&(layout, _, _)| layout);
        }
        side.clear();
        for layout in keyed.chunk_by_mut(|a, b| a.0 == b.0) {
            if layout.len() > SIDE_RANKS_MAX {
                layout.select_nth_unstable_by(SIDE_RANKS_MAX - 1, |a, b| {
                    a.1.total_cmp(&b.1).then(a.2.cmp(&b.2))
                });
            }
            side.extend(layout.iter().take(SIDE_RANKS_MAX).map(|&(_, _, rank)| rank));
        }
    }

    /// The least total; among equals the seed decides.
    ///
    /// Where others send requests that are not heard of at once, all of them take the same rank for the best until it is
    /// told how full it became. What is not known there is some share of what two requests like this one add to a rank. So
    /// totals are equal that differ by less, and of two that the seed draws the cheaper is taken: two choices keep the
    /// fullest rank near the mean (Mitzenmacher, 2001), where the best of all would not. And a split has to save more than
    /// that: the least of so many pairs is too often one that is only thought to be idle.
    fn least_cost(&self, pairs: &[Pair], seed: u64) -> (usize, u32) {
        let least = |splits: bool| {
            let of_kind = pairs.iter().filter(|pair| pair.is_split() == splits);
            of_kind.min_by(|a, b| a.total_seconds.total_cmp(&b.total_seconds))
        };
        let (alone, split) = (least(false), least(true));
        let unknown = |best: &Pair| {
            UNHEARD_REQUESTS * self.snapshot.others_share() * self.priced[best.prefill].prefill_seconds()
        };
        let total = |best: Option<&Pair>| best.map_or(f64::INFINITY, |best| best.total_seconds);
        let splits = total(split) + alone.map_or(0.0, unknown) < total(alone);
        let best = if splits { split } else { alone }.or(alone).or(split).expect("there are candidates");
        let unknown = unknown(best);
        let bound = best.total_seconds * (1.0 + self.weights.tie_epsilon) + unknown;
        let near = || {
            let near = |pair: &Pair| {
                pair.total_seconds <= bound && (unknown == 0.0 || pair.is_split() == best.is_split())
            };
            pairs.iter().enumerate().filter(move |(_, pair)| near(pair)).map(|(index, _)| index)
        };
        let (one, tied) = draw(near(), seed);
        let (other, _) = if unknown > 0.0 { draw(near(), mix(!seed)) } else { (one, tied) };
        (if pairs[other].total_seconds < pairs[one].total_seconds { other } else { one }, tied)
    }
}

/// One of `equals` (not empty) by the seed, and how many there were.
pub(crate) fn draw(mut equals: impl Iterator<Item = usize> + Clone, seed: u64) -> (usize, u32) {
    let tied = equals.clone().count();
    let nth = if tied > 1 { (mix(seed) % tied as u64) as usize } else { 0 };
    (equals.nth(nth).expect("there are equals"), tied as u32)
}

/// SplitMix64's output function: neighbouring seeds give unrelated numbers.
pub(crate) fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
