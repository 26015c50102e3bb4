//! Look-ups: down a chain, segment by segment, with the ranks that held everything so far.

use forebay_types::BlockHash;

use crate::{
    notes,
    overlaps::Overlaps,
    ranks::SlotsRead,
    reclaim::Guard,
    segment::{Holder, Plane, Segment, bits},
    sync::{
        AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    writer::Shared,
};

/// See [`KvIndex::overlaps`](crate::KvIndex::overlaps).
pub(crate) fn overlaps(shared: &Shared, chain: &[BlockHash], out: &mut Overlaps) {
    out.clear();
    // Ranks that need only a prefix's end may have dropped its beginning.
    let any_gapped = || shared.slots.any_gapped();
    if chain.first().is_none_or(|hash| !shared.filter.may_have(hash.0)) && !any_gapped() {
        return;
    }
    let guard = shared.epochs.pin();
    let now = shared.now.load(Relaxed);
    let given_up = shared.slots.given_up();
    let slots = shared.slots.read(&guard);
    let mut depth = 0;
    while let Some(&hash) = chain.get(depth) {
        let Some((segment, position)) = shared.head(hash, &guard) else {
            if !any_gapped() {
                break;
            }
            if let Some(ahead) = chain.get(depth + PROBES_AHEAD) {
                shared.heads.prefetch(ahead.0, &guard);
            }
            depth += 1;
            continue;
        };
        // While this segment is compared, the place of what follows it comes closer.
        if let Some(next) = chain.get(depth + segment.len().saturating_sub(position)) {
            shared.heads.prefetch(next.0, &guard);
        }
        let run = segment.common(position, chain[depth..].iter().map(|hash| hash.0));
        segment.touch(now);
        if run == 0 {
            break;
        }
        let held = Held { segment, position, run };
        let any =
            if depth == 0 { held.begin(slots, out, &guard) } else { held.go_on(depth, slots, out, &guard) };
        let noted = slots.any_noted() && held.note(slots, depth as u32, out, &guard);
        if !(any | noted || any_gapped()) {
            break;
        }
        depth += run;
    }
    if !out.scratch.notes.is_empty() {
        notes::sum(slots, out, &guard);
    }
    if shared.slots.given_up() != given_up {
        list_once(out);
    }
}

/// How far ahead heads are fetched where block after block is asked for.
const PROBES_AHEAD: usize = 8;

/// Keeps one answer of a rank that was met in two slots, since it was cleared and went on in between. Both were right.
#[cold]
fn list_once(out: &mut Overlaps) {
    let Overlaps { found, len, tiers, .. } = out;
    found.truncate(*len);
    found.sort_unstable_by_key(|&(rank, blocks)| (rank, std::cmp::Reverse(blocks)));
    found.dedup_by_key(|(rank, _)| *rank);
    *len = found.len();
    tiers.sort_by_key(|&(rank, blocks)| (rank, std::cmp::Reverse(blocks.remote)));
    tiers.dedup_by_key(|(rank, _)| *rank);
}

/// A run of blocks of the chain, where a segment has it.
struct Held<'a> {
    segment: Segment<'a>,
    position: usize,
    run: usize,
}

impl Held<'_> {
    /// Blocks of the run that a mask has, as a mask from bit 0 on.
    #[inline]
    fn of(&self, mask: &AtomicU64) -> u64 {
        mask.load(SeqCst) >> self.position & bits(0, self.run)
    }

    /// Lists each rank that holds the first block of the run and has no groups. Says whether any holds them all.
    #[inline]
    fn begin(&self, slots: SlotsRead<'_>, out: &mut Overlaps, guard: &Guard<'_>) -> bool {
        let (first, mask, more) = self.segment.first_and_more(guard);
        out.reserve(more.len() + 1, slots.len());
        let found = &mut out.found[..];
        let places = &mut out.scratch.place[..];
        let all = bits(0, self.run);
        let mut len = 0;
        let mut any = false;
        let mut list = |holder: Holder, mask: &AtomicU64| {
            let held = self.of(mask);
            if held & 1 == 0 || holder.plane != Plane::DEVICE {
                return;
            }
            let Some(rank) = slots.ungrouped(holder.slot) else { return };
            let Some(place) = places.get_mut(usize::from(holder.slot)) else { return };
            *place = len as u16;
            let blocks = held.trailing_ones();
            any |= held == all;
            found[len] = (rank, blocks);
            len += 1;
        };
        list(first, mask);
        for [key, mask] in more {
            list(Holder::of_key(key), mask);
        }
        out.len = len;
        any
    }

    /// Notes what those ranks hold of the run that are summed at the end. Says whether there is any.
    #[cold]
    fn note(&self, slots: SlotsRead<'_>, depth: u32, out: &mut Overlaps, guard: &Guard<'_>) -> bool {
        let mut any = false;
        for (holder, mask) in self.segment.holders(guard) {
            let held = self.of(mask);
            if held != 0 && slots.is_noted(holder.slot) {
                any = true;
                out.scratch.notes.add(holder, depth, self.run as u8, held);
            }
        }
        any
    }

    /// Adds to each rank that held everything before `depth` what it holds of the run. Says whether any holds it all.
    #[inline]
    fn go_on(&self, depth: usize, slots: SlotsRead<'_>, out: &mut Overlaps, guard: &Guard<'_>) -> bool {
        let (first, mask, more) = self.segment.first_and_more(guard);
        let Overlaps { found, len, scratch, .. } = out;
        let found = &mut found[..*len];
        let mut any = false;
        let mut add = |holder: Holder, mask: &AtomicU64| {
            let held = self.of(mask);
            if held & 1 == 0 || holder.plane != Plane::DEVICE {
                return;
            }
            let (Some(&place), Some(rank)) =
                (scratch.place.get(usize::from(holder.slot)), slots.rank(holder.slot))
            else {
                return;
            };
            let Some((_, blocks)) = found.get_mut(usize::from(place)).filter(|(listed, _)| *listed == rank)
            else {
                return;
            };
            if *blocks as usize == depth {
                *blocks += held.trailing_ones();
                any |= held == bits(0, self.run);
            }
        };
        add(first, mask);
        for [key, mask] in more {
            add(Holder::of_key(key), mask);
        }
        any
    }
}
