//! One rank's KV events: messages in, numbered batches for the index out. No socket, no clock.
//!
//! Start at [`Feed::published`] and [`Feed::replayed`]. What an engine says is believed until it cannot be true: then the
//! index is emptied for this rank and nothing more of it is heard ([`Step::Distrusted`]), or the engine is fenced
//! altogether ([`Step::Fenced`]).
//!
//! Invariants: batches are numbered from 0 without gaps, whatever the engine's own numbers do; whoever applies all of them
//! has what [`Feed::snapshot`] has.

use std::sync::Arc;

use bytes::Bytes;
use forebay_engine_events::{
    EngineEvent, EventBatch, Fault, History, Observed, RankCache, RankSettings, RankStats, Sequence, Via,
    decode, frames,
};
use forebay_types::{KvEvent, KvEventBatch, RankId};

use crate::reports::KvSnapshot;

/// Messages of one life that may be unreadable, or hold events that are.
const UNREADABLE_MAX: u32 = 8;
/// Blocks that may be out of place (after an unknown parent, removed but not stored) before anything is made of it.
const MISPLACED_MIN: u64 = 64;
/// One in so many stored blocks may be.
const MISPLACED_SHARE: u64 = 20;

/// What to do after a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Go on.
    Taken,
    /// Messages are missing, and this one was not taken: ask for a replay from this number and feed it, then this message
    /// again. If there is no replay, or it does not help, [`Feed::give_up_gap`].
    Missing { from: u64 },
    /// The publisher is another one than before.
    Restarted,
    /// What the rank says cannot be followed. It counts as empty; nothing more of it may be fed.
    Distrusted(Arc<str>),
    /// What the rank says makes the whole engine unsafe.
    Fenced(Arc<str>),
}

/// What came of the messages since the last call of [`Feed::take`].
#[derive(Debug, Default)]
pub(super) struct Out {
    /// For the index.
    pub(super) batches: Vec<KvEventBatch>,
    /// For operators.
    pub(super) notes: Vec<Arc<str>>,
}

/// One rank's events in one life of its engine.
#[derive(Debug)]
pub(super) struct Feed {
    rank: RankId,
    /// Whether the rank's own number must be in its messages: where there are several.
    one_of_many: bool,
    cache: RankCache,
    sequence: Sequence,
    next: u64,
    out: Out,
    /// A replay brought something.
    replays: bool,
    /// Something was lost for good.
    lossy: bool,
    /// Batches that were, since the start.
    lost: u64,
    /// When the newest batch was published, by the engine's clock.
    newest_seconds: Option<f64>,
    stored: u64,
    misplaced: u64,
    unreadable: u32,
    /// Kinds of faults that operators were told of.
    told: Vec<std::mem::Discriminant<Fault>>,
}

impl Feed {
    pub(super) fn new(rank: RankId, one_of_many: bool, settings: RankSettings) -> Self {
        Self {
            rank,
            one_of_many,
            cache: RankCache::new(settings),
            sequence: Sequence::new(),
            next: 0,
            out: Out::default(),
            replays: false,
            lossy: false,
            lost: 0,
            newest_seconds: None,
            stored: 0,
            misplaced: 0,
            unreadable: 0,
            told: Vec::new(),
        }
    }

    /// The first number that was not taken: where a replay begins.
    pub(super) fn replay_from(&self) -> u64 {
        self.sequence.next()
    }

    /// The last number that was taken, if a replay should show that the publisher still is the one that had it. Only a
    /// publisher whose replay brought something before is known to keep what it published.
    pub(super) fn proof_from(&self) -> Option<u64> {
        if self.replays { self.sequence.next().checked_sub(1) } else { None }
    }

    /// What came since the last call.
    pub(super) fn take(&mut self) -> Out {
        std::mem::take(&mut self.out)
    }

    /// Everything that the rank caches. Batches that were not taken yet are in it, so they must be passed on before.
    pub(super) fn snapshot(&self) -> KvSnapshot {
        KvSnapshot { rank: self.rank, sequence_next: self.next, contents: self.cache.snapshot() }
    }

    /// When the newest batch was published, in seconds since 1970 by the engine's clock.
    pub(super) fn newest_seconds(&self) -> Option<f64> {
        self.newest_seconds
    }

    /// Batches that were lost for good, since the start.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether blocks may be cached that are not known, because what announced them was lost.
    pub(super) fn is_lossy(&self) -> bool {
        self.lossy
    }

    pub(super) fn stats(&self) -> RankStats {
        self.cache.stats()
    }

    /// A published message.
    pub(super) fn published(&mut self, message: &[Bytes]) -> Step {
        match frames::published(message) {
            Ok(message) => self.batch(message, Via::Published),
            Err(error) => self.unreadable(&error.to_string()),
        }
    }

    /// A message of a replay; `None` after its last one.
    pub(super) fn replayed(&mut self, message: &[Bytes]) -> Option<Step> {
        match frames::reply(message) {
            Ok(frames::Reply::Batch(message)) => {
                self.replays = true;
                Some(self.batch(message, Via::Replay))
            }
            Ok(frames::Reply::End) => None,
            Err(error) => Some(self.unreadable(&error.to_string())),
        }
    }

    /// Takes a published message though those before it are lost.
    pub(super) fn give_up_gap(&mut self, message: &[Bytes]) -> Step {
        match frames::published(message) {
            Ok(message) => {
                self.forget_before(message.sequence);
                self.batch(message, Via::Published)
            }
            Err(error) => self.unreadable(&error.to_string()),
        }
    }

    /// The same for a message of a replay.
    pub(super) fn give_up_gap_of_replay(&mut self, message: &[Bytes]) -> Step {
        if let Ok(frames::Reply::Batch(message)) = frames::reply(message) {
            self.forget_before(message.sequence);
        }
        self.replayed(message).unwrap_or(Step::Taken)
    }

    /// The rank counts as empty; what it stores from `number` on is learned.
    fn forget_before(&mut self, number: u64) {
        let from = self.sequence.next();
        self.lost += number.saturating_sub(from);
        self.note(format!(
            "KV events {from} to {} of rank {} are lost: what it cached by then is learned only as it is stored again",
            number.saturating_sub(1),
            self.rank.dp_rank
        ));
        self.forget();
        self.sequence.skip_to(number);
    }

    fn forget(&mut self) {
        // Before anything was said there is nothing to take back.
        if self.next > 0 {
            self.emit(vec![KvEvent::Cleared]);
        }
        self.cache.reset(History::Lost);
        self.lossy = true;
    }

    fn emit(&mut self, events: Vec<KvEvent>) {
        if !events.is_empty() {
            self.out.batches.push(KvEventBatch { rank: self.rank, sequence: self.next, events });
            self.next += 1;
        }
    }

    fn note(&mut self, sentence: impl Into<Arc<str>>) {
        self.out.notes.push(sentence.into());
    }

    fn batch(&mut self, message: frames::Message<'_>, via: Via) -> Step {
        let batch = match decode(message.payload) {
            Ok(batch) => batch,
            Err(error) => return self.undecodable(message.sequence, via, &error.to_string()),
        };
        if let Some(said) = batch.dp_rank
            && said != self.rank.dp_rank
            && self.one_of_many
        {
            let own = self.rank.dp_rank;
            return self.distrust(&format!("those of rank {own} say that they are of rank {said}"));
        }
        match self.sequence.observe(message.sequence, batch.time_seconds, via) {
            Observed::InOrder => self.apply(&batch),
            Observed::Duplicate => Step::Taken,
            Observed::Restarted => Step::Restarted,
            Observed::Gap { from } => Step::Missing { from },
        }
    }

    fn apply(&mut self, batch: &EventBatch) -> Step {
        self.newest_seconds = Some(batch.time_seconds);
        for event in &batch.events {
            match event {
                EngineEvent::Stored(stored) => self.stored += stored.hashes.len() as u64,
                EngineEvent::Cleared => self.lossy = false,
                _ => {}
            }
        }
        let applied = self.cache.apply(batch);
        self.emit(applied.events);
        let mut step = Step::Taken;
        for fault in applied.faults {
            // The worst verdict counts; a fence is the worst.
            match self.judge(&fault) {
                Step::Taken => {}
                verdict if matches!(step, Step::Fenced(_)) => drop(verdict),
                verdict => step = verdict,
            }
        }
        step
    }

    fn judge(&mut self, fault: &Fault) -> Step {
        match fault {
            Fault::WrongBlockSize { .. } => {
                // Blocks of another size than said corrupt a hand-over without any error.
                let sentence = self.sentence(&fault.to_string());
                self.forget();
                return Step::Fenced(sentence);
            }
            // To be expected: what it follows may be among what was lost or left out.
            Fault::UnknownParent { .. } if self.is_incomplete() => return Step::Taken,
            Fault::UnknownParent { blocks, .. } | Fault::UnknownRemoval { blocks, .. } => {
                self.misplaced += blocks;
                if self.misplaced > MISPLACED_MIN.max(self.stored / MISPLACED_SHARE) {
                    return self.distrust(&fault.to_string());
                }
            }
            Fault::WrongTokenCount { .. } | Fault::WrongKeyCount { .. } => {
                return self.unreadable(&fault.to_string());
            }
            // Of SGLang's hashes that is no lie: two salts may share one.
            Fault::AmbiguousHash { .. }
            | Fault::NoRoom { .. }
            | Fault::TooManyGroups { .. }
            | Fault::UnknownEvent { .. } => {}
        }
        let kind = std::mem::discriminant(fault);
        if !self.told.contains(&kind) {
            self.told.push(kind);
            let sentence = self.sentence(&fault.to_string());
            self.note(sentence);
        }
        Step::Taken
    }

    /// Whether blocks are missing that the engine did announce. ([`Fault::UnknownParent`] says so itself, but it takes
    /// blocks that were left out for their unknown parent as a reason as well.)
    fn is_incomplete(&self) -> bool {
        let stats = self.cache.stats();
        self.lossy || stats.refused > 0 || stats.malformed > 0
    }

    /// A message with a number, and a payload that is no batch. A published one proves nothing: if it is the one that comes
    /// next, the following one shows a gap, and a replay may bring it whole. If the replay has it like this, it is lost.
    fn undecodable(&mut self, number: u64, via: Via, why: &str) -> Step {
        let step = self.unreadable(why);
        if step == Step::Taken && via == Via::Replay && number == self.sequence.next() {
            self.forget_before(number.saturating_add(1));
        }
        step
    }

    /// A message that cannot be read, or not all of it.
    fn unreadable(&mut self, why: &str) -> Step {
        self.unreadable += 1;
        if self.unreadable > UNREADABLE_MAX {
            return self.distrust(why);
        }
        let sentence = self.sentence(why);
        self.note(sentence);
        Step::Taken
    }

    fn distrust(&mut self, why: &str) -> Step {
        self.forget();
        Step::Distrusted(self.sentence(&format!("{why}; they are no longer listened to")))
    }

    fn sentence(&self, what: &str) -> Arc<str> {
        format!("KV events of rank {} cannot be right: {what}", self.rank.dp_rank).into()
    }
}

#[cfg(test)]
mod tests;
