//! Ranks that are fed by hand: numbered batches in, what changes for the index out.
//!
//! In: batches by our hashes, or by an engine's hashes with their tokens, which [`RankCache`] translates as it does for
//! engines that are followed. Out: [`Taken`]. Start at [`FedRank::take`].
//!
//! Invariants: a batch counts once and in order; after a gap nothing is held until a clearing or a snapshot; what
//! [`FedRank::cached`] says is what the index was told.

use std::{collections::HashSet, time::Instant};

use forebay_engine_events::{
    EngineEvent, EngineHash, EventBatch, Fault, GroupKind, RankCache, RankSettings, Removed, Stored,
};
use forebay_proto::limits::{BATCH_EVENTS_MAX, BATCH_HASHES_MAX};
use forebay_types::{BlockHash, KvEvent, KvEventBatch, RankId, Tier, TokenId, device_blocks};

use super::refused::{Kind, Refused};

/// Tokens in one batch.
pub const BATCH_TOKENS_MAX: usize = 1 << 20;

/// One change of a rank's cache, as whoever feeds it says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FedEvent {
    /// Blocks became reusable: a chain.
    Stored(FedStored),
    /// Blocks went.
    Removed {
        /// In the same kind of hash as they were stored by.
        hashes: Vec<u64>,
        /// From where.
        tier: Tier,
        /// With the engine's hashes: of which group of layers.
        group: Option<u32>,
    },
    /// Nothing is cached any more.
    Cleared,
}

/// Blocks that became reusable, first block first: by our hashes, or by the engine's with `tokens`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FedStored {
    /// The block before them.
    pub parent: Option<u64>,
    /// The blocks.
    pub hashes: Vec<u64>,
    /// Of all blocks; empty with our hashes.
    pub tokens: Vec<TokenId>,
    /// Of the engine's blocks; 0 with our hashes.
    pub block_size_tokens: u32,
    /// The tenant's cache salt.
    pub salt: Option<String>,
    /// The adapter's name.
    pub lora: Option<String>,
    /// Where.
    pub tier: Tier,
    /// With the engine's hashes: of which group of layers.
    pub layers: FedLayers,
}

/// Which group of a model's layers stores blocks; nothing is said for models with one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FedLayers {
    /// The engine's number of it.
    pub group: Option<u32>,
    /// What it caches, in vLLM's words.
    pub kind: Option<String>,
    /// How many tokens back it looks.
    pub window_tokens: Option<u32>,
}

/// One numbered batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FedBatch {
    /// From 0 without gaps.
    pub sequence: u64,
    /// In the order in which they happened.
    pub events: Vec<FedEvent>,
}

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Taken {
    /// For the index; if `anew`, after it has forgotten the rank and expects this number.
    Apply {
        anew: bool,
        batch: KvEventBatch,
        /// What was wrong with it beside; the rest counts.
        notes: Vec<String>,
    },
    /// It had counted before.
    Repeated,
    /// Those before it are missing. The rank holds nothing now; the index is told so by this batch.
    Gap { expected: u64, batch: KvEventBatch },
}

/// Which hashes a rank is told in, and what it holds by them.
#[derive(Debug)]
enum Holds {
    /// Nothing was said yet.
    Nothing,
    /// Our hashes: those on its device.
    Ours(HashSet<BlockHash>),
    /// The engine's.
    Engines(Box<RankCache>),
}

/// One rank.
#[derive(Debug)]
pub(crate) struct FedRank {
    rank: RankId,
    settings: RankSettings,
    holds: Holds,
    next: u64,
    pub(crate) stale: bool,
    pub(crate) batches: u64,
    pub(crate) batches_lost: u64,
    pub(crate) heard: Option<Instant>,
}

impl FedRank {
    pub(crate) fn new(rank: RankId, settings: RankSettings) -> Self {
        Self {
            rank,
            settings,
            holds: Holds::Nothing,
            next: 0,
            stale: false,
            batches: 0,
            batches_lost: 0,
            heard: None,
        }
    }

    pub(crate) fn id(&self) -> RankId {
        self.rank
    }

    /// Takes a batch that came at `now`.
    ///
    /// # Errors
    /// It is malformed: nothing of it counts, and the same number may come again.
    pub(crate) fn take(&mut self, now: Instant, batch: FedBatch) -> Result<Taken, Refused> {
        self.check(&batch)?;
        self.heard = Some(now);
        let FedBatch { sequence, mut events } = batch;
        if sequence < self.next {
            return Ok(Taken::Repeated);
        }
        let cleared = events.iter().rposition(|event| *event == FedEvent::Cleared);
        let anew = match cleared {
            // Whatever was before it does not matter any more.
            Some(at) if self.stale || sequence > self.next => {
                events.drain(..=at);
                self.batches_lost += sequence - self.next;
                self.holds = Holds::Nothing;
                self.stale = false;
                true
            }
            _ if self.stale || sequence > self.next => {
                self.stale = true;
                self.holds = Holds::Nothing;
                let batch = KvEventBatch { rank: self.rank, sequence, events: Vec::new() };
                return Ok(Taken::Gap { expected: self.next, batch });
            }
            _ => false,
        };
        self.next = sequence + 1;
        self.batches += 1;
        let mut notes = Vec::new();
        let events = self.apply(events, &mut notes);
        Ok(Taken::Apply { anew, batch: KvEventBatch { rank: self.rank, sequence, events }, notes })
    }

    /// Takes a snapshot by our hashes: chains. Returns what the index is to begin with.
    ///
    /// # Errors
    /// There are more blocks than one rank may have, or chains that are malformed.
    pub(crate) fn reset(
        &mut self,
        now: Instant,
        sequence_next: u64,
        stored: Vec<FedStored>,
    ) -> Result<Vec<KvEvent>, Refused> {
        let max = self.settings.blocks_max;
        let hashes = stored.iter().map(|stored| stored.hashes.len()).sum();
        if hashes > max {
            return Err(Refused::too_many("stored", "blocks", hashes, max));
        }
        for (index, chain) in stored.iter().enumerate() {
            self.check_stored("stored", index, chain)?;
            if !chain.tokens.is_empty() {
                let message = "a snapshot is by Forebay's hashes, which come without `tokens`".to_owned();
                return Err(Refused::value(format!("stored[{index}].tokens"), message));
            }
        }
        self.heard = Some(now);
        self.batches_lost += sequence_next.saturating_sub(self.next);
        let (mut blocks, mut contents) = (HashSet::new(), Vec::new());
        let events = stored.into_iter().map(FedEvent::Stored).collect();
        apply_ours(&mut blocks, max, events, &mut contents, &mut Vec::new());
        self.holds = Holds::Ours(blocks);
        (self.next, self.stale) = (sequence_next, false);
        Ok(contents)
    }

    /// The blocks on its device.
    pub(crate) fn cached(&self) -> Vec<BlockHash> {
        match &self.holds {
            Holds::Nothing => Vec::new(),
            Holds::Ours(blocks) => blocks.iter().copied().collect(),
            Holds::Engines(cache) => device_blocks(&cache.snapshot()).collect(),
        }
    }

    fn check(&self, batch: &FedBatch) -> Result<(), Refused> {
        let events = &batch.events;
        if batch.sequence == u64::MAX {
            return Err(Refused::value("sequence", "`sequence` is the largest of all numbers; count from 0"));
        }
        if events.len() > BATCH_EVENTS_MAX {
            return Err(Refused::too_many("events", "events in one batch", events.len(), BATCH_EVENTS_MAX));
        }
        let (mut hashes, mut tokens) = (0, 0);
        let mut mixed = match self.holds {
            _ if self.stale => None,
            Holds::Nothing => None,
            Holds::Ours(_) => Some(false),
            Holds::Engines(_) => Some(true),
        };
        for (index, event) in events.iter().enumerate() {
            match event {
                FedEvent::Stored(stored) => {
                    self.check_stored("events", index, stored)?;
                    hashes += stored.hashes.len();
                    tokens += stored.tokens.len();
                    let by_engine = !stored.tokens.is_empty();
                    if *mixed.get_or_insert(by_engine) != by_engine {
                        return Err(mixed_hashes(index));
                    }
                }
                FedEvent::Removed { hashes: removed, .. } if removed.is_empty() => {
                    return Err(no_hashes(index));
                }
                FedEvent::Removed { hashes: removed, .. } => hashes += removed.len(),
                FedEvent::Cleared => mixed = None,
            }
        }
        if hashes > BATCH_HASHES_MAX {
            return Err(Refused::too_many("events", "hashes in one batch", hashes, BATCH_HASHES_MAX));
        }
        if tokens > BATCH_TOKENS_MAX {
            return Err(Refused::too_many("events", "tokens in one batch", tokens, BATCH_TOKENS_MAX));
        }
        Ok(())
    }

    fn check_stored(&self, list: &str, index: usize, stored: &FedStored) -> Result<(), Refused> {
        let FedStored { parent: _, hashes, tokens, block_size_tokens, salt, lora, tier: _, layers } = stored;
        let wrong =
            |field: &str, message: String| Err(Refused::value(format!("{list}[{index}].{field}"), message));
        if hashes.is_empty() {
            return wrong("hashes", "`hashes` is empty; leave the event out".to_owned());
        }
        if tokens.is_empty() {
            let bare = *layers == FedLayers::default() && salt.is_none() && lora.is_none();
            if *block_size_tokens > 0 || !bare {
                let message = "`tokens` is missing: block size, salt, adapter and group belong to an engine's own hashes, which \
                               come with their tokens; leave them out with Forebay's hashes";
                return wrong("tokens", message.to_owned());
            }
            return Ok(());
        }
        let expected = hashes.len().checked_mul(*block_size_tokens as usize);
        if *block_size_tokens == 0 || expected != Some(tokens.len()) {
            let message = format!(
                "{} blocks of {block_size_tokens} tokens do not have {} tokens",
                hashes.len(),
                tokens.len()
            );
            return wrong("tokens", message);
        }
        match self.settings.engine_block_size_tokens {
            Some(size)
                if size != *block_size_tokens
                    && stored.tier == Tier::Device
                    && layers.group.unwrap_or(0) == 0 =>
            {
                wrong(
                    "block_size_tokens",
                    format!(
                        "blocks of {block_size_tokens} tokens, and the engine was registered with {size}"
                    ),
                )
            }
            _ => Ok(()),
        }
    }

    fn apply(&mut self, events: Vec<FedEvent>, notes: &mut Vec<String>) -> Vec<KvEvent> {
        // A clearing within the batch may change the kind of hash for what follows.
        let mut parts: Vec<Vec<FedEvent>> = vec![Vec::new()];
        for event in events {
            let clears = event == FedEvent::Cleared;
            parts.last_mut().expect("there is one").push(event);
            if clears {
                parts.push(Vec::new());
            }
        }
        let mut out = Vec::new();
        for part in parts {
            self.apply_part(part, &mut out, notes);
        }
        out
    }

    /// Events of one kind of hash, at most the last of which clears.
    fn apply_part(&mut self, events: Vec<FedEvent>, out: &mut Vec<KvEvent>, notes: &mut Vec<String>) {
        let stored = events.iter().find_map(|event| match event {
            FedEvent::Stored(stored) => Some(!stored.tokens.is_empty()),
            _ => None,
        });
        if let (Holds::Nothing, Some(by_engine)) = (&self.holds, stored) {
            self.holds = match by_engine {
                true => Holds::Engines(Box::new(RankCache::new(self.settings.clone()))),
                false => Holds::Ours(HashSet::new()),
            };
        }
        let clears = events.last() == Some(&FedEvent::Cleared);
        match &mut self.holds {
            // Nothing is held, so nothing can go.
            Holds::Nothing if clears => out.push(KvEvent::Cleared),
            Holds::Nothing => {}
            Holds::Ours(blocks) => apply_ours(blocks, self.settings.blocks_max, events, out, notes),
            Holds::Engines(cache) => {
                let events = events.into_iter().map(engine_event).collect();
                let applied = cache.apply(&EventBatch { time_seconds: 0.0, events, dp_rank: None });
                out.extend(applied.events);
                notes.extend(applied.faults.iter().map(Fault::to_string));
            }
        }
        if clears {
            // What comes next may be told without groups; a clearing alone keeps them.
            if let Holds::Engines(cache) = &self.holds
                && !cache.snapshot().is_empty()
            {
                out.push(KvEvent::Groups(Vec::new()));
            }
            self.holds = Holds::Nothing;
        }
    }
}

/// Events by our hashes, for the index; what is on the device is kept in `blocks`.
fn apply_ours(
    blocks: &mut HashSet<BlockHash>,
    blocks_max: usize,
    events: Vec<FedEvent>,
    out: &mut Vec<KvEvent>,
    notes: &mut Vec<String>,
) {
    let ours = |hashes: Vec<u64>| hashes.into_iter().map(BlockHash).collect::<Vec<_>>();
    for event in events {
        out.push(match event {
            FedEvent::Cleared => KvEvent::Cleared,
            FedEvent::Removed { hashes, tier, group: _ } => {
                let hashes = ours(hashes);
                if tier == Tier::Device {
                    for hash in &hashes {
                        blocks.remove(hash);
                    }
                }
                KvEvent::Removed { hashes, tier, group: 0 }
            }
            FedEvent::Stored(stored) => {
                let FedStored { parent, hashes, tier, .. } = stored;
                let mut hashes = ours(hashes);
                if tier == Tier::Device {
                    let mut fits = |hash: &BlockHash| {
                        blocks.contains(hash) || blocks.len() < blocks_max && blocks.insert(*hash)
                    };
                    // What follows a block that is left out would have no prefix.
                    let kept = hashes.iter().take_while(|hash| fits(hash)).count();
                    if kept < hashes.len() {
                        let blocks = hashes.len() - kept;
                        notes.push(Fault::NoRoom { blocks_max, blocks: blocks as u64 }.to_string());
                    }
                    hashes.truncate(kept);
                }
                if hashes.is_empty() {
                    continue;
                }
                KvEvent::Stored { parent: parent.map(BlockHash), hashes, tier, group: 0 }
            }
        });
    }
}

fn engine_event(event: FedEvent) -> EngineEvent {
    let engines = |hashes: Vec<u64>| hashes.into_iter().map(EngineHash).collect();
    match event {
        FedEvent::Cleared => EngineEvent::Cleared,
        FedEvent::Removed { hashes, tier, group } => {
            EngineEvent::Removed(Removed { hashes: engines(hashes), tier, group })
        }
        FedEvent::Stored(FedStored {
            parent,
            hashes,
            tokens,
            block_size_tokens,
            salt,
            lora,
            tier,
            layers: FedLayers { group, kind, window_tokens },
        }) => EngineEvent::Stored(Stored {
            hashes: engines(hashes),
            parent: parent.map(EngineHash),
            tokens,
            block_size_tokens,
            lora_id: None,
            lora_name: lora.map(Into::into),
            salt: salt.map(Into::into),
            extra_keys: None,
            tier,
            group,
            kind: kind.map(|kind| GroupKind::from_name(&kind)),
            window_tokens,
        }),
    }
}

fn no_hashes(index: usize) -> Refused {
    Refused::value(format!("events[{index}].hashes"), "`hashes` is empty; leave the event out")
}

fn mixed_hashes(index: usize) -> Refused {
    let message = "blocks of this rank came by the other kind of hash before (Forebay's alone, or the engine's with \
                   `tokens`); keep to one, or clear the rank first";
    Refused::new(Kind::Invalid, "mixed_hashes", message).at(format!("events[{index}].tokens"))
}

#[cfg(test)]
mod tests;
