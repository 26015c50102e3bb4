//! Cache events: batches between `forebay-types` and messages.
//!
//! The hot path of a gateway: hashes are decoded into one vector, which becomes the event's vector without a copy.

use std::num::NonZeroU32;

use forebay_types::{BlockHash, Incarnation, KV_GROUPS_MAX, KvEvent, KvEventBatch, KvGroup, RankId, Tier};

use crate::{
    engine::required,
    error::WireError,
    limits::{BATCH_EVENTS_MAX, BATCH_HASHES_MAX},
    v1,
};

/// Whose stream it is: what the rank numbers in its messages mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// As Hello said.
    pub incarnation: Incarnation,
    /// As the facts said; 0 while they are not known, so that every rank is refused.
    pub dp_ranks: u16,
}

impl Life {
    /// The rank with this number.
    ///
    /// # Errors
    /// The engine has no such rank.
    pub fn rank(&self, dp_rank: u32) -> Result<RankId, WireError> {
        match u16::try_from(dp_rank) {
            Ok(dp_rank) if dp_rank < self.dp_ranks => Ok(RankId { incarnation: self.incarnation, dp_rank }),
            _ => Err(WireError::Rank { got: dp_rank, dp_ranks: self.dp_ranks }),
        }
    }

    /// One batch as the index takes it.
    ///
    /// # Errors
    /// A foreign rank, too much in it, an unknown kind of event or tier, an event without blocks. Nothing of the batch
    /// may then be applied: count it as lost.
    pub fn kv_batch(&self, message: v1::KvDelta) -> Result<KvEventBatch, WireError> {
        let v1::KvDelta { dp_rank, sequence, events } = message;
        let rank = self.rank(dp_rank)?;
        WireError::at_most("a batch of cache events", "events", events.len(), BATCH_EVENTS_MAX)?;
        let hashes = events.iter().map(wire_hashes).sum();
        WireError::at_most("a batch of cache events", "hashes", hashes, BATCH_HASHES_MAX)?;
        let events = events.into_iter().map(event_from_wire).collect::<Result<_, _>>()?;
        Ok(KvEventBatch { rank, sequence, events })
    }
}

pub(crate) fn wire_hashes(event: &v1::KvEvent) -> usize {
    match &event.event {
        Some(v1::kv_event::Event::Stored(stored)) => stored.hashes.len(),
        Some(v1::kv_event::Event::Removed(removed)) => removed.hashes.len(),
        Some(v1::kv_event::Event::Cleared(_) | v1::kv_event::Event::Groups(_)) | None => 0,
    }
}

pub(crate) fn event_from_wire(message: v1::KvEvent) -> Result<KvEvent, WireError> {
    let v1::KvEvent { event } = message;
    Ok(match required(event, "KvEvent", "event of a kind that this version knows")? {
        v1::kv_event::Event::Stored(stored) => {
            let v1::KvStored { parent, hashes, tier, group } = stored;
            KvEvent::Stored {
                parent: parent.map(BlockHash),
                hashes: blocks(hashes)?,
                tier: tier_from_wire(tier)?,
                group: group_from_wire(group)?,
            }
        }
        v1::kv_event::Event::Removed(removed) => {
            let v1::KvRemoved { hashes, tier, group } = removed;
            KvEvent::Removed {
                hashes: blocks(hashes)?,
                tier: tier_from_wire(tier)?,
                group: group_from_wire(group)?,
            }
        }
        v1::kv_event::Event::Cleared(v1::KvCleared {}) => KvEvent::Cleared,
        v1::kv_event::Event::Groups(v1::KvGroups { groups }) => {
            WireError::at_most("the groups of a rank", "groups", groups.len(), KV_GROUPS_MAX)?;
            KvEvent::Groups(groups.into_iter().map(Into::into).collect())
        }
    })
}

fn group_from_wire(number: u32) -> Result<u8, WireError> {
    match u8::try_from(number) {
        Ok(group) if usize::from(group) < KV_GROUPS_MAX => Ok(group),
        _ => Err(WireError::Unknown { what: "the group of a cache event", got: number.into() }),
    }
}

impl From<v1::KvGroup> for KvGroup {
    fn from(group: v1::KvGroup) -> Self {
        let v1::KvGroup { window_blocks, step_blocks } = group;
        Self {
            window_blocks: NonZeroU32::new(window_blocks),
            step_blocks: NonZeroU32::new(step_blocks).unwrap_or(NonZeroU32::MIN),
        }
    }
}

impl From<KvGroup> for v1::KvGroup {
    fn from(group: KvGroup) -> Self {
        let KvGroup { window_blocks, step_blocks } = group;
        Self { window_blocks: window_blocks.map_or(0, NonZeroU32::get), step_blocks: step_blocks.get() }
    }
}

/// Same layout, same allocation: the standard library collects it in place.
fn blocks(hashes: Vec<u64>) -> Result<Vec<BlockHash>, WireError> {
    if hashes.is_empty() {
        return Err(WireError::Missing { message: "a cache event", field: "hashes" });
    }
    Ok(hashes.into_iter().map(BlockHash).collect())
}

fn numbers(hashes: Vec<BlockHash>) -> Vec<u64> {
    hashes.into_iter().map(|BlockHash(hash)| hash).collect()
}

fn tier_from_wire(number: i32) -> Result<Tier, WireError> {
    match v1::Tier::try_from(number) {
        Ok(v1::Tier::Device) => Ok(Tier::Device),
        Ok(v1::Tier::Host) => Ok(Tier::Host),
        Ok(v1::Tier::Disk) => Ok(Tier::Disk),
        Ok(v1::Tier::Remote) => Ok(Tier::Remote),
        Ok(v1::Tier::Unspecified) | Err(_) => {
            Err(WireError::Unknown { what: "the tier of a cache event", got: number.into() })
        }
    }
}

impl From<Tier> for v1::Tier {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Device => Self::Device,
            Tier::Host => Self::Host,
            Tier::Disk => Self::Disk,
            Tier::Remote => Self::Remote,
        }
    }
}

impl From<KvEvent> for v1::KvEvent {
    fn from(event: KvEvent) -> Self {
        let event = match event {
            KvEvent::Stored { parent, hashes, tier, group } => v1::kv_event::Event::Stored(v1::KvStored {
                parent: parent.map(|BlockHash(hash)| hash),
                hashes: numbers(hashes),
                tier: v1::Tier::from(tier).into(),
                group: group.into(),
            }),
            KvEvent::Removed { hashes, tier, group } => v1::kv_event::Event::Removed(v1::KvRemoved {
                hashes: numbers(hashes),
                tier: v1::Tier::from(tier).into(),
                group: group.into(),
            }),
            KvEvent::Cleared => v1::kv_event::Event::Cleared(v1::KvCleared {}),
            KvEvent::Groups(groups) => v1::kv_event::Event::Groups(v1::KvGroups {
                groups: groups.into_iter().map(Into::into).collect(),
            }),
        };
        Self { event: Some(event) }
    }
}

impl TryFrom<KvEventBatch> for v1::KvDelta {
    type Error = WireError;

    /// Events without blocks are left out: they say nothing.
    fn try_from(batch: KvEventBatch) -> Result<Self, WireError> {
        let KvEventBatch { rank: RankId { incarnation: _, dp_rank }, sequence, events } = batch;
        let count = |event: &KvEvent| match event {
            KvEvent::Stored { hashes, .. } | KvEvent::Removed { hashes, .. } => Some(hashes.len()),
            KvEvent::Groups(_) | KvEvent::Cleared => None,
        };
        let hashes = events.iter().filter_map(count).sum();
        if events.len() > BATCH_EVENTS_MAX || hashes > BATCH_HASHES_MAX {
            return Err(WireError::BatchTooLarge { events: events.len(), hashes });
        }
        let events = events.into_iter().filter(|event| count(event) != Some(0)).map(Into::into).collect();
        Ok(Self { dp_rank: dp_rank.into(), sequence, events })
    }
}

/// Puts batches, in their order, into as few messages as the bounds of a single batch allow.
pub fn pack_deltas(deltas: impl IntoIterator<Item = v1::KvDelta>) -> Vec<v1::KvDeltas> {
    let mut messages: Vec<v1::KvDeltas> = Vec::new();
    let (mut events, mut hashes) = (0, 0);
    for delta in deltas {
        // A batch costs bytes even if it is empty: it counts as an event.
        let (more_events, more_hashes) =
            (1 + delta.events.len(), delta.events.iter().map(wire_hashes).sum::<usize>());
        match messages.last_mut() {
            Some(message)
                if events + more_events <= BATCH_EVENTS_MAX && hashes + more_hashes <= BATCH_HASHES_MAX =>
            {
                message.deltas.push(delta);
                (events, hashes) = (events + more_events, hashes + more_hashes);
            }
            _ => {
                messages.push(v1::KvDeltas { deltas: vec![delta] });
                (events, hashes) = (more_events, more_hashes);
            }
        }
    }
    messages
}

#[cfg(test)]
mod tests;
