//! Ranks that have more than full attention on a device: what they hold is noted segment by segment and summed at the
//! end of a look-up.
//!
//! Start at [`sum`]. Each rank's notes are gone through once, in order of the chain, with a few words of state for each of
//! its groups: O(notes), and a look-up that finds no such rank does none of it.

use forebay_types::KvGroup;

use crate::{
    overlaps::{Overlaps, TierBlocks},
    ranks::SlotsRead,
    reclaim::Guard,
    segment::{Holder, Plane, TIERS, bits},
};

/// What is noted, a list for each rank through all of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Notes {
    notes: Vec<Note>,
    ranks: Vec<NotedRank>,
    /// By slot: where its rank is in `ranks`, if that is below its length and has this slot.
    place: Vec<u16>,
}

/// What one rank holds of a run of blocks in one plane.
#[derive(Debug, Clone, Copy)]
struct Note {
    plane: Plane,
    /// Blocks in the run, and before it.
    run: u8,
    depth: u32,
    /// From bit 0 on.
    held: u64,
    /// The rank's next one; the last has its own.
    next: u32,
}

#[derive(Debug, Clone, Copy)]
struct NotedRank {
    slot: u16,
    first: u32,
    last: u32,
}

impl Notes {
    pub(crate) fn clear(&mut self) {
        self.notes.clear();
        self.ranks.clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.notes.is_empty()
    }

    /// Notes that `holder` holds `held` of the `run` blocks after the first `depth`. Depths never fall.
    pub(crate) fn add(&mut self, holder: Holder, depth: u32, run: u8, held: u64) {
        let number = self.notes.len() as u32;
        self.notes.push(Note { plane: holder.plane, run, depth, held, next: number });
        let slot = usize::from(holder.slot);
        if self.place.len() <= slot {
            self.place.resize(slot + 1, 0);
        }
        match self.ranks.get_mut(usize::from(self.place[slot])).filter(|rank| rank.slot == holder.slot) {
            Some(rank) => {
                self.notes[rank.last as usize].next = number;
                rank.last = number;
            }
            None => {
                self.place[slot] = self.ranks.len() as u16;
                self.ranks.push(NotedRank { slot: holder.slot, first: number, last: number });
            }
        }
    }

    /// A rank's notes in order.
    fn of(&self, rank: NotedRank) -> impl Iterator<Item = &Note> {
        let mut next = Some(rank.first);
        std::iter::from_fn(move || {
            let number = next?;
            let note = &self.notes[number as usize];
            next = (note.next != number).then_some(note.next);
            Some(note)
        })
    }
}

/// Makes answers of what was noted.
#[cold]
pub(crate) fn sum(slots: SlotsRead<'_>, out: &mut Overlaps, guard: &Guard<'_>) {
    let Overlaps { found, len, tiers, scratch } = out;
    found.truncate(*len);
    let mut served = Served::default();
    for &noted in &scratch.notes.ranks {
        let Some(rank) = slots.rank(noted.slot) else { continue };
        let groups = slots.groups(noted.slot, guard);
        let has_groups = groups.is_some();
        served.begin(groups.into_iter().flatten());
        served.go_through(scratch.notes.of(noted));
        let blocks = served.longest;
        if blocks[TIERS - 1] > 0 {
            tiers.push((rank, TierBlocks::from(blocks)));
        }
        // Those without groups were listed on the way; and so was one that said its groups just now.
        if has_groups {
            let place = scratch.place.get(usize::from(noted.slot)).map_or(0, |&place| usize::from(place));
            match found.get_mut(place).filter(|(listed, _)| *listed == rank) {
                Some((_, listed)) => *listed = blocks[0],
                None => found.push((rank, blocks[0])),
            }
        }
    }
    found.retain(|(_, blocks)| *blocks > 0);
    *len = found.len();
}

/// How long a prefix every group of one rank can serve, by the farthest tier that it needs.
#[derive(Default)]
struct Served {
    groups: Vec<Group>,
    /// Prefixes end at a multiple of this.
    step: u32,
    longest: [u32; TIERS],
}

/// One group, as far as its rank's notes were gone through.
struct Group {
    window: Option<u32>,
    /// What it holds of the present run, by tier.
    held: [u64; TIERS],
    /// By the farthest tier: up to where it was gone through, and how many blocks before that follow each other.
    tails: [(u32, u32); TIERS],
}

impl Served {
    fn begin(&mut self, groups: impl Iterator<Item = KvGroup>) {
        self.groups.clear();
        self.step = 1;
        self.longest = [0; TIERS];
        for KvGroup { window_blocks, step_blocks } in groups {
            let window = window_blocks.map(Into::into);
            self.groups.push(Group { window, held: [0; TIERS], tails: [(0, 0); TIERS] });
            self.step = lcm(self.step, step_blocks.get());
        }
        if self.groups.is_empty() {
            self.groups.push(Group { window: None, held: [0; TIERS], tails: [(0, 0); TIERS] });
        }
    }

    fn go_through<'a>(&mut self, notes: impl Iterator<Item = &'a Note>) {
        let mut run: Option<(u32, u8)> = None;
        for note in notes {
            if run.is_some_and(|(depth, _)| depth != note.depth) {
                self.end_run(run);
            }
            run = Some((note.depth, note.run));
            // What is of no group that was said counts for none.
            if let Some(group) = self.groups.get_mut(usize::from(note.plane.group())) {
                group.held[note.plane.tier()] |= note.held;
            }
        }
        self.end_run(run);
    }

    /// Takes what all groups hold of one run.
    fn end_run(&mut self, run: Option<(u32, u8)>) {
        let Some((depth, run)) = run else { return };
        for farthest in 0..TIERS {
            let mut ends = bits(0, run.into());
            for group in &mut self.groups {
                let held = group.held[..=farthest].iter().fold(0, |all, held| all | held);
                ends &= group.ends(farthest, held, depth, run.into());
            }
            if let Some(longest) = self.last_end(ends, depth) {
                self.longest[farthest] = longest;
            }
        }
        self.groups.iter_mut().for_each(|group| group.held = [0; TIERS]);
    }

    /// The longest prefix among those that end with a block of `ends`, which are after the first `depth`.
    fn last_end(&self, mut ends: u64, depth: u32) -> Option<u32> {
        while ends != 0 {
            let last = 63 - ends.leading_zeros();
            let length = depth + last + 1;
            let past = length % self.step;
            if past == 0 {
                return Some(length);
            }
            // The next shorter one that it may be.
            let kept = (last + 1).saturating_sub(past);
            ends &= bits(0, kept as usize);
        }
        None
    }
}

impl Group {
    /// The blocks of a run of `run` after the first `depth` with which a prefix may end that this group can serve.
    fn ends(&mut self, farthest: usize, held: u64, depth: u32, run: usize) -> u64 {
        let (until, tail) = self.tails[farthest];
        let before = if until == depth { tail } else { 0 };
        let needs = |length: u32| self.window.map_or(length, |window| window.min(length));
        let mut ends = 0;
        let mut left = held;
        while left != 0 {
            let start = left.trailing_zeros();
            let ones = (left >> start).trailing_ones();
            left &= !bits(start as usize, ones as usize);
            let before = if start == 0 { before } else { 0 };
            // The i-th of these is good if `before + i >= needs(depth + start + i)`: from some i on all are, since the
            // left side rises by one and the right side by at most one.
            let least = match before == depth + start {
                true => 1,
                false => self.window.map_or(u32::MAX, |window| window.saturating_sub(before).max(1)),
            };
            debug_assert!(least > ones || before + least >= needs(depth + start + least));
            if least <= ones {
                ends |= bits((start + least - 1) as usize, (ones - least + 1) as usize);
            }
        }
        let leading = (held | !bits(0, run)).leading_ones() as usize - (64 - run);
        let tail = if leading == run { before + run as u32 } else { leading as u32 };
        self.tails[farthest] = (depth + run as u32, tail);
        ends
    }
}

/// The least common multiple; what exceeds all lengths there are is as good as any that does.
fn lcm(a: u32, b: u32) -> u32 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x).saturating_mul(b)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
