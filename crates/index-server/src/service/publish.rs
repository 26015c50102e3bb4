//! What is fed by hand: batches and snapshots of engines that publish nowhere that could be followed.

use std::{sync::Arc, time::Instant};

use forebay_engine_events::RankSettings;
use forebay_kv_index::{Applied, KvIndex};
use forebay_types::RankId;

use super::{
    Service,
    engine::{Engine, Life},
    fed::{FedBatch, FedRank, FedStored, Taken},
    refused::{Kind, Refused, clipped},
    spec,
};

/// Sentences about one batch that are passed on.
const NOTES_MAX: usize = 8;

/// What became of something that was published by hand.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Published {
    /// Batches and snapshots that counted.
    pub applied: u64,
    /// Batches that had counted before.
    pub repeated: u64,
    /// What was wrong with some of what counted, in sentences.
    pub notes: Vec<String>,
}

/// Whom something that is published by hand is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipient<'a> {
    /// The engine's name.
    pub engine: &'a str,
    /// What its present life is called; empty for whichever it is.
    pub life: &'a str,
    /// Which rank.
    pub dp_rank: u32,
}

impl Service {
    /// Takes one batch of an engine that is fed by hand.
    ///
    /// # Errors
    /// No such engine or rank, a life that is over, a malformed batch, or a gap.
    pub fn publish(&self, to: Recipient<'_>, batch: FedBatch, now: Instant) -> Result<Published, Refused> {
        let sequence = batch.sequence;
        self.with_fed(to, |index, rank| match rank.take(now, batch)? {
            Taken::Repeated => Ok(Published { repeated: 1, ..Published::default() }),
            Taken::Gap { expected, batch } => {
                let _gap = index.apply(&batch);
                let message = format!(
                    "batch {sequence} came where {expected} belongs: the rank counts as empty until a batch that clears \
                     it, or a snapshot (PUT /v1/engines/NAME/ranks/N/snapshot)"
                );
                Err(Refused::new(Kind::Gap, "sequence_gap", message).at("sequence"))
            }
            Taken::Apply { anew, batch, mut notes } => {
                notes.truncate(NOTES_MAX);
                // A rank is known to the index from its batch 0 or a reset on.
                let known = !anew || fits(index.reset(batch.rank, batch.sequence, []))?;
                match known.then(|| index.apply(&batch)) {
                    Some(Applied::Ok) => Ok(Published { applied: 1, notes, ..Published::default() }),
                    _ => {
                        rank.stale = true;
                        Err(too_many_ranks())
                    }
                }
            }
        })
    }

    /// Replaces what is known of a rank that is fed by hand.
    ///
    /// # Errors
    /// As [`Service::publish`].
    pub fn snapshot(
        &self,
        to: Recipient<'_>,
        sequence_next: u64,
        stored: Vec<FedStored>,
        now: Instant,
    ) -> Result<Published, Refused> {
        self.with_fed(to, |index, rank| {
            let contents = rank.reset(now, sequence_next, stored)?;
            fits(index.reset(rank.id(), sequence_next, contents))?;
            Ok(Published { applied: 1, ..Published::default() })
        })
    }

    /// Makes the life of this name the present one. Without a name it is the present one.
    fn enter_life(&self, engine: &Arc<Engine>, life: &mut Life, called: &str) -> Result<(), Refused> {
        if called.is_empty() {
            return Ok(());
        }
        spec::name("life", called)?;
        if life.is_past(called) {
            let message = format!(
                "the life `{}` of this engine is over: another one has begun since; send what the present one does",
                clipped(called)
            );
            return Err(Refused::new(Kind::Conflict, "life_is_over", message).at("life"));
        }
        if life.is_new(called) {
            self.next_life_of(engine, life, None);
        }
        called.clone_into(&mut life.called);
        Ok(())
    }

    fn with_fed<T>(
        &self,
        to: Recipient<'_>,
        act: impl FnOnce(&KvIndex, &mut FedRank) -> Result<T, Refused>,
    ) -> Result<T, Refused> {
        let engine = self.engine(to.engine)?;
        if engine.is_followed() {
            let message = format!(
                "`{}` was registered with addresses and is followed there; only engines without are fed by hand",
                clipped(to.engine)
            );
            return Err(Refused::new(Kind::Conflict, "engine_is_followed", message).at("engine"));
        }
        let ranks = engine.spec.dp_ranks;
        let dp_rank = u16::try_from(to.dp_rank).ok().filter(|rank| *rank < ranks).ok_or_else(|| {
            let message = format!("DP rank {} of an engine that was registered with {ranks}", to.dp_rank);
            Refused::value("dp_rank", message)
        })?;
        let mut life = engine.life.lock();
        if life.over {
            return Err(Refused::no_engine(to.engine));
        }
        self.enter_life(&engine, &mut life, to.life)?;
        let rank = RankId { incarnation: life.incarnation, dp_rank };
        let new = || {
            let settings = RankSettings {
                hasher: self.hasher,
                model: engine.spec.spec.model.clone(),
                engine_block_size_tokens: engine.spec.spec.block_size_tokens,
                blocks_max: self.settings.limits.blocks_max,
            };
            FedRank::new(rank, settings)
        };
        act(&self.index, life.fed.entry(dp_rank).or_insert_with(new))
    }
}

fn fits(applied: Applied) -> Result<bool, Refused> {
    match applied {
        Applied::TooManyRanks => Err(too_many_ranks()),
        _ => Ok(true),
    }
}

fn too_many_ranks() -> Refused {
    Refused::new(
        Kind::Full,
        "too_many_ranks",
        "the index follows as many ranks as it may; unregister engines",
    )
}
