//! Groups of layers: which an engine's events are of, what each needs of a prefix, and its blocks.

use std::{collections::HashMap, num::NonZeroU32};

use forebay_kv_hash::Run;
use forebay_types::{KvEvent, KvGroup};

use super::{
    count::Entry,
    held::{ALL_TIERS, At, Counts, Held, Keyed},
};
use crate::event::{EngineHash, GroupKind, Stored};

/// One group of layers of one rank.
#[derive(Debug)]
pub(super) struct Group {
    /// As the engine numbers it.
    pub(super) number: u32,
    pub(super) needs: KvGroup,
    /// Engine blocks that are held under the hashes beside ours.
    pub(super) named: u64,
    /// Engine blocks that do not complete just one of ours, or one that another hash names, or that stand for nothing.
    pub(super) others: HashMap<EngineHash, Entry, Keyed>,
    pub(super) counts: Counts,
}

impl Group {
    pub(super) fn new(number: u32, needs: KvGroup, keyed: Keyed) -> Self {
        Self { number, needs, named: 0, others: HashMap::with_hasher(keyed), counts: Counts::default() }
    }

    /// Forgets what is cached, not what it is.
    pub(super) fn clear(&mut self) {
        (self.named, self.counts) = (0, Counts::default());
        self.others = HashMap::with_hasher(self.others.hasher().clone());
    }

    /// Distinct engine hashes that are followed.
    pub(super) fn engine_blocks(&self) -> u64 {
        self.named + self.others.len() as u64
    }
}

/// What the group in place `group` holds, as chains in the order of tiers.
pub(super) fn contents(held: &Held, group: u8) -> impl Iterator<Item = KvEvent> + '_ {
    ALL_TIERS.into_iter().flat_map(move |tier| {
        let blocks = held.runs.held_by(move |holder| holder.at() == At { tier, group });
        let event = move |Run { parent, hashes }| KvEvent::Stored { parent, hashes, tier, group };
        forebay_kv_hash::join(blocks).into_iter().map(event)
    })
}

/// What a group needs of a prefix by what an event says of it, with own blocks of `own` tokens. `None` if it takes no
/// part in reusing prefixes.
///
/// A sliding window of `w` tokens needs the last `w - 1`, in whole blocks of the engine's. Kinds that are not said or not
/// known, beside the first group, are held to the least that any needs: a prefix's last block. So are chunked layers,
/// whose chunks' size the events do not say.
pub(super) fn needs(event: &Stored, own: u32) -> Option<KvGroup> {
    use GroupKind::{
        ChunkedLocalAttention, CrossAttention, EncoderOnlyAttention, FullAttention, Mamba, MlaAttention,
        Other, SinkFullAttention, SlidingWindow, SlidingWindowMla, Unknown,
    };
    let engine = event.block_size_tokens.max(1);
    let full = KvGroup {
        window_blocks: None,
        step_blocks: NonZeroU32::new(engine / own)
            .filter(|_| engine.is_multiple_of(own))
            .unwrap_or(NonZeroU32::MIN),
    };
    let last = |tokens: u32| {
        let engine_blocks = tokens.div_ceil(engine).max(1);
        let blocks = engine_blocks.saturating_mul(engine).div_ceil(own);
        KvGroup { window_blocks: NonZeroU32::new(blocks), step_blocks: step(engine, own) }
    };
    let state = KvGroup { window_blocks: Some(NonZeroU32::MIN), step_blocks: step(engine, own) };
    Some(match event.kind {
        Some(FullAttention | MlaAttention | SinkFullAttention) => full,
        Some(Unknown) | None if event.group.unwrap_or(0) == 0 => full,
        Some(SlidingWindow | SlidingWindowMla) => last(event.window_tokens.unwrap_or(1).saturating_sub(1)),
        Some(Mamba) => state,
        Some(ChunkedLocalAttention | Other | Unknown) | None => last(1),
        Some(EncoderOnlyAttention | CrossAttention) => return None,
    })
}

/// Own blocks between places where an engine's block and one of ours both end.
fn step(engine: u32, own: u32) -> NonZeroU32 {
    let (mut a, mut b) = (engine, own);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    NonZeroU32::new(engine / a.max(1)).unwrap_or(NonZeroU32::MIN)
}

/// The event that says which groups there are. `None` if that goes without saying.
pub(super) fn said(groups: &[Group]) -> Option<KvEvent> {
    match groups {
        [] => None,
        [only] if only.needs.window_blocks.is_none() => None,
        groups => Some(KvEvent::Groups(groups.iter().map(|group| group.needs).collect())),
    }
}
