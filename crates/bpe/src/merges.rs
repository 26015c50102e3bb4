//! Merges of two tokens into one, and what a word becomes by them.
//!
//! In: the ids of a word's bytes or characters. Out: the ids of its tokens. Start at [`Merges::apply`].
//!
//! Invariant: of all neighbours that can merge, those of the lowest rank merge first, of equals the leftmost, until none
//! can: the definition of byte-pair encoding, and what `tokenizers` does.

use std::{cmp::Reverse, collections::BinaryHeap};

use crate::Token;

/// What does not merge has this rank.
pub(crate) const NEVER: u32 = u32::MAX;

/// Up to this many symbols, looking at all of them for each merge is faster than a heap (measured at 16 to 128).
const FEW: usize = 48;

/// Bits of a token in a slot, and of a rank. A slot is one word so that the table of 280,000 merges is 4 MB: where the
/// second cache ends is where looking up becomes slow.
pub(crate) const TOKEN_BITS: u32 = 20;
const RANK_BITS: u32 = 64 - 2 * TOKEN_BITS;
pub(crate) const MERGES_MAX: usize = (1 << RANK_BITS) - 1;

/// The rank of each pair, and what the pair becomes.
#[derive(Debug)]
pub(crate) struct Merges {
    /// A pair and its rank. Open addressing, linear probing, at most two thirds full.
    slots: Box<[u64]>,
    shift: u32,
    /// By rank.
    merged: Box<[Token]>,
}

const EMPTY: u64 = u64::MAX;

/// Memory for the symbols of a word.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// The word: symbols in, tokens out.
    pub(crate) symbols: Vec<Token>,
    /// The rank of each symbol and its right neighbour; of the last one there is none.
    pub(crate) ranks: Vec<u32>,
    links: Vec<Link>,
    queue: BinaryHeap<Reverse<(u32, u32)>>,
}

/// A symbol's neighbours by index.
#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

/// No neighbour.
const END: u32 = u32::MAX;

impl Merges {
    /// The pairs with what they become, most important first. Of a pair that occurs twice, the last counts.
    pub(crate) fn new(merges: &[(Token, Token, Token)]) -> Self {
        let size = (merges.len() * 3 / 2 + 2).next_power_of_two();
        let merged = merges.iter().map(|merge| merge.2).collect();
        let mut table = Self { slots: vec![EMPTY; size].into(), shift: 64 - size.trailing_zeros(), merged };
        for (rank, &(left, right, _)) in (0_u64..).zip(merges) {
            let pair = pair(left, right);
            let mut index = table.first(pair);
            while table.slots[index] != EMPTY && table.slots[index] >> RANK_BITS != pair {
                index = (index + 1) % size;
            }
            table.slots[index] = pair << RANK_BITS | rank;
        }
        table
    }

    #[inline]
    fn first(&self, pair: u64) -> usize {
        // The upper bits of a product depend on all bits of its factors.
        ((pair ^ pair >> TOKEN_BITS).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }

    /// The rank of a pair; `NEVER` if it does not merge.
    #[inline]
    pub(crate) fn rank(&self, left: Token, right: Token) -> u32 {
        let pair = pair(left, right);
        let mut index = self.first(pair);
        loop {
            let slot = self.slots[index];
            if slot >> RANK_BITS == pair {
                return slot as u32 & MERGES_MAX as u32;
            }
            if slot == EMPTY {
                return NEVER;
            }
            index = (index + 1) & (self.slots.len() - 1);
        }
    }

    /// Merges the symbols of `work`, whose ranks are known, until no two neighbours can.
    pub(crate) fn apply(&self, work: &mut Work) {
        match work.symbols.len() {
            0 | 1 => (),
            2..=FEW => self.apply_to_few(work),
            _ => self.apply_to_many(work),
        }
    }

    fn apply_to_few(&self, work: &mut Work) {
        let Work { symbols, ranks, .. } = work;
        ranks.truncate(symbols.len() - 1);
        while let Some(&rank) = ranks.iter().min()
            && rank != NEVER
        {
            let at = ranks.iter().position(|&other| other == rank).expect("it is one of them");
            symbols[at] = self.merged[rank as usize];
            symbols.remove(at + 1);
            ranks.remove(at);
            if at < ranks.len() {
                ranks[at] = self.rank(symbols[at], symbols[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = self.rank(symbols[at - 1], symbols[at]);
            }
        }
    }

    /// A queue of possible merges by rank and place. One whose symbols have changed since is recognised by its rank: a
    /// pair has one rank, and a rank one pair.
    fn apply_to_many(&self, work: &mut Work) {
        let Work { symbols, ranks, links, queue } = work;
        let count = u32::try_from(symbols.len()).expect("a text has less than 4 GiB");
        links.clear();
        links.extend((0..count).map(|at| Link {
            previous: at.wrapping_sub(1),
            next: if at + 1 < count { at + 1 } else { END },
        }));
        queue.clear();
        let possible = (0..count - 1).zip(&*ranks).filter(|&(_, &rank)| rank != NEVER);
        queue.extend(possible.map(|(at, &rank)| Reverse((rank, at))));
        while let Some(Reverse((rank, at))) = queue.pop() {
            let left = at as usize;
            let next = links[left].next;
            if next == END || symbols[left] == GONE {
                continue;
            }
            let right = next as usize;
            if self.rank(symbols[left], symbols[right]) != rank {
                continue;
            }
            symbols[left] = self.merged[rank as usize];
            symbols[right] = GONE;
            let after = links[right].next;
            links[left].next = after;
            if after != END {
                links[after as usize].previous = at;
                self.enqueue(queue, symbols, at, after);
            }
            let before = links[left].previous;
            if before != END {
                self.enqueue(queue, symbols, before, at);
            }
        }
        symbols.retain(|&symbol| symbol != GONE);
    }

    fn enqueue(&self, queue: &mut BinaryHeap<Reverse<(u32, u32)>>, symbols: &[Token], left: u32, right: u32) {
        let rank = self.rank(symbols[left as usize], symbols[right as usize]);
        if rank != NEVER {
            queue.push(Reverse((rank, left)));
        }
    }
}

fn pair(left: Token, right: Token) -> u64 {
    u64::from(left) << TOKEN_BITS | u64::from(right)
}

/// A symbol that became part of the one before it. No id: ids have a bound.
const GONE: Token = Token::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, word for word.
    fn by_definition(merges: &[(Token, Token, Token)], mut symbols: Vec<Token>) -> Vec<Token> {
        loop {
            let rank =
                |pair: &[Token]| merges.iter().rposition(|merge| (merge.0, merge.1) == (pair[0], pair[1]));
            let possible = symbols.windows(2).enumerate().filter_map(|(at, pair)| Some((rank(pair)?, at)));
            let Some((rank, at)) = possible.min() else { return symbols };
            symbols[at] = merges[rank].2;
            symbols.remove(at + 1);
        }
    }

    #[test]
    fn few_and_many_symbols_merge_as_defined() {
        let mut state = 1_u64;
        let mut draw = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for _ in 0..200 {
            let mut merges: Vec<(Token, Token, Token)> = Vec::new();
            for merged in 4..24 {
                let mut part = || Token::try_from(draw(merged)).unwrap();
                merges.push((part(), part(), Token::try_from(merged).unwrap()));
            }
            // Some rules are listed before those that make their parts.
            let (a, b) = (draw(merges.len()), draw(merges.len()));
            merges.swap(a, b);
            let table = Merges::new(&merges);
            for length in [0, 1, 2, 3, 7, 30, FEW, FEW + 1, 120] {
                let symbols: Vec<Token> = (0..length).map(|_| Token::try_from(draw(4)).unwrap()).collect();
                let ranks = symbols.windows(2).map(|pair| table.rank(pair[0], pair[1])).collect();
                let mut work = Work { symbols: symbols.clone(), ranks, ..Work::default() };
                table.apply(&mut work);
                assert_eq!(work.symbols, by_definition(&merges, symbols), "{merges:?}");
            }
        }
    }
}
