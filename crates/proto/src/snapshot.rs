//! Whole caches in pieces: [`snapshot_chunks`] cuts, [`SnapshotReader`] puts together.

use forebay_types::{KvEvent, RankId};

use crate::{
    error::WireError,
    kv::{Life, event_from_wire, wire_hashes},
    limits::{BATCH_EVENTS_MAX, SNAPSHOT_BLOCKS_MAX, SNAPSHOT_CHUNK_HASHES_MAX},
    v1,
};

/// Everything that one rank caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Whose.
    pub rank: RankId,
    /// Number of the first batch that is not in it.
    pub sequence_next: u64,
    /// Events that would make it from nothing.
    pub contents: Vec<KvEvent>,
}

/// The pieces of a snapshot, in order: at least one, even of an empty cache. Chains are cut where a piece is full.
pub fn snapshot_chunks(dp_rank: u16, sequence_next: u64, contents: Vec<KvEvent>) -> Vec<v1::KvSnapshot> {
    let mut pieces = Pieces { done: vec![Vec::new()], hashes: 0, hashes_total: 0 };
    for event in contents {
        let KvEvent::Stored { mut parent, mut hashes, tier, group } = event else {
            pieces.room();
            pieces.add(event);
            continue;
        };
        while !hashes.is_empty() {
            let rest = hashes.split_off(pieces.room().min(hashes.len()));
            let last = hashes.last().copied();
            pieces.add(KvEvent::Stored { parent, hashes, tier, group });
            (parent, hashes) = (last, rest);
        }
    }
    let Pieces { done, hashes_total, .. } = pieces;
    let count = done.len() as u32;
    let piece = |(chunk_index, contents)| v1::KvSnapshot {
        dp_rank: dp_rank.into(),
        sequence_next,
        chunk_index,
        last: chunk_index + 1 == count,
        blocks_total: hashes_total,
        contents,
    };
    (0..).zip(done).map(piece).collect()
}

/// Pieces as they are filled.
struct Pieces {
    done: Vec<Vec<v1::KvEvent>>,
    /// In the last one, and in all.
    hashes: usize,
    hashes_total: u64,
}

impl Pieces {
    fn last(&mut self) -> &mut Vec<v1::KvEvent> {
        self.done.last_mut().expect("there is one from the start")
    }

    /// Hashes, at least one, that the next event may have. Begins another piece if the last one is full.
    fn room(&mut self) -> usize {
        if self.hashes >= SNAPSHOT_CHUNK_HASHES_MAX || self.last().len() >= BATCH_EVENTS_MAX {
            self.done.push(Vec::new());
            self.hashes = 0;
        }
        SNAPSHOT_CHUNK_HASHES_MAX - self.hashes
    }

    fn add(&mut self, event: KvEvent) {
        let event = v1::KvEvent::from(event);
        let hashes = wire_hashes(&event);
        self.hashes += hashes;
        self.hashes_total += hashes as u64;
        self.last().push(event);
    }
}

/// Puts the pieces of one rank's snapshot together. One for each rank of a stream.
#[derive(Debug, Default)]
pub struct SnapshotReader {
    under_way: Option<Partial>,
}

#[derive(Debug)]
struct Partial {
    snapshot: Snapshot,
    blocks: u64,
    blocks_total: u64,
    chunk_next: u32,
}

impl SnapshotReader {
    /// Takes the next piece; gives the whole with the last one. A piece with index 0 begins anew.
    ///
    /// # Errors
    /// A foreign rank, too many blocks, or a piece that does not continue the one before. What was collected is then
    /// forgotten: ask for the snapshot again.
    pub fn take(&mut self, life: &Life, chunk: v1::KvSnapshot) -> Result<Option<Snapshot>, WireError> {
        let before = self.under_way.take();
        let v1::KvSnapshot { dp_rank, sequence_next, chunk_index, last, blocks_total, contents } = chunk;
        let rank = life.rank(dp_rank)?;
        WireError::at_most("a piece of a snapshot", "events", contents.len(), BATCH_EVENTS_MAX)?;
        let hashes = contents.iter().map(wire_hashes).sum();
        WireError::at_most("a piece of a snapshot", "hashes", hashes, SNAPSHOT_CHUNK_HASHES_MAX)?;
        if blocks_total > SNAPSHOT_BLOCKS_MAX {
            let (got, max) = (blocks_total, SNAPSHOT_BLOCKS_MAX);
            return Err(WireError::TooMuch { what: "a snapshot", got, max, unit: "blocks" });
        }
        let broken = |wrong: String| WireError::Sequence { what: "a snapshot", wrong };
        let mut partial = if chunk_index == 0 {
            let snapshot = Snapshot { rank, sequence_next, contents: Vec::new() };
            Partial { snapshot, blocks: 0, blocks_total, chunk_next: 0 }
        } else {
            before.ok_or_else(|| broken(format!("piece {chunk_index} came without a piece 0")))?
        };
        if chunk_index != partial.chunk_next {
            return Err(broken(format!("piece {chunk_index} came after {} pieces", partial.chunk_next)));
        }
        if (rank, sequence_next, blocks_total)
            != (partial.snapshot.rank, partial.snapshot.sequence_next, partial.blocks_total)
        {
            return Err(broken(format!("piece {chunk_index} is of another snapshot")));
        }
        for event in contents {
            match event_from_wire(event)? {
                event @ (KvEvent::Groups(_) | KvEvent::Stored { .. }) => {
                    partial.snapshot.contents.push(event)
                }
                KvEvent::Removed { .. } | KvEvent::Cleared => {
                    return Err(broken(format!("piece {chunk_index} says that something went")));
                }
            }
        }
        partial.chunk_next += 1;
        partial.blocks += hashes as u64;
        let got = partial.blocks;
        if got > blocks_total || (last && got < blocks_total) {
            return Err(broken(format!("{got} blocks came of {blocks_total} announced")));
        }
        if last {
            return Ok(Some(partial.snapshot));
        }
        self.under_way = Some(partial);
        Ok(None)
    }

    /// Whether pieces are under way: deltas of this rank may not come now.
    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use forebay_types::{BlockHash, Incarnation, KvGroup, Tier};

    use super::*;

    const LIFE: Life = Life { incarnation: Incarnation(7), dp_ranks: 2 };

    fn blocks(numbers: std::ops::Range<usize>) -> Vec<BlockHash> {
        numbers.map(|n| BlockHash((n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15))).collect()
    }

    /// A chain on the device, beside what hybrid models and other tiers bring.
    fn contents(count: usize) -> Vec<KvEvent> {
        let stored = |parent, hashes, tier, group| KvEvent::Stored { parent, hashes, tier, group };
        let window = KvGroup { window_blocks: NonZeroU32::new(8), ..KvGroup::FULL };
        vec![
            KvEvent::Groups(vec![KvGroup::FULL, window]),
            stored(None, blocks(0..count), Tier::Device, 0),
            stored(Some(BlockHash(7)), blocks(0..3), Tier::Host, 1),
        ]
    }

    /// Chains as they were before they were cut.
    fn joined(contents: Vec<KvEvent>) -> Vec<KvEvent> {
        let mut joined: Vec<KvEvent> = Vec::new();
        for event in contents {
            match (joined.last_mut(), event) {
                (
                    Some(KvEvent::Stored { hashes: before, tier: on, group: of, .. }),
                    KvEvent::Stored { parent, hashes, tier, group },
                ) if (tier, group) == (*on, *of) && parent == before.last().copied() => before.extend(hashes),
                (_, event) => joined.push(event),
            }
        }
        joined
    }

    #[test]
    fn snapshots_of_all_sizes_come_back() {
        let chunk = SNAPSHOT_CHUNK_HASHES_MAX;
        for (count, pieces) in
            [(1, 1), (chunk - 3, 1), (chunk - 2, 2), (chunk, 2), (3 * chunk, 4), (3 * chunk - 3, 3)]
        {
            let mut reader = SnapshotReader::default();
            let messages = snapshot_chunks(1, 42, contents(count));
            assert_eq!(messages.len(), pieces, "{count} blocks");
            let mut whole = None;
            for message in messages {
                assert!(whole.is_none(), "nothing follows the last piece");
                whole = reader.take(&LIFE, message).expect("in order");
                assert_eq!(reader.is_under_way(), whole.is_none());
            }
            let rank = RankId { incarnation: Incarnation(7), dp_rank: 1 };
            let whole = whole.expect("the last piece came");
            assert_eq!((whole.rank, whole.sequence_next), (rank, 42));
            assert_eq!(joined(whole.contents), contents(count));
        }
        let empty = snapshot_chunks(1, 42, vec![]);
        assert_eq!(empty.len(), 1);
        let whole = SnapshotReader::default().take(&LIFE, empty[0].clone()).expect("in order");
        assert_eq!(whole.expect("the only piece").contents, []);
        // Many short chains fill a piece, too.
        let short =
            |n| KvEvent::Stored { parent: None, hashes: blocks(n..n + 1), tier: Tier::Device, group: 0 };
        assert_eq!(snapshot_chunks(1, 42, (0..40_000).map(short).collect()).len(), 2);
    }

    #[test]
    fn a_lost_repeated_or_foreign_piece_is_noticed_and_a_new_start_is_taken() {
        let pieces = snapshot_chunks(1, 42, contents(3 * SNAPSHOT_CHUNK_HASHES_MAX - 3));
        let refused = |order: &[&v1::KvSnapshot]| {
            let mut reader = SnapshotReader::default();
            let (last, before) = order.split_last().expect("not empty");
            for piece in before {
                assert_eq!(reader.take(&LIFE, (*piece).clone()), Ok(None));
            }
            let error = reader.take(&LIFE, (*last).clone()).expect_err("refused").to_string();
            assert!(!reader.is_under_way());
            // Whatever went wrong, the next whole snapshot is taken.
            let whole =
                pieces.iter().filter_map(|piece| reader.take(&LIFE, piece.clone()).expect("in order"));
            assert_eq!(whole.count(), 1);
            error
        };
        let other = v1::KvSnapshot { sequence_next: 43, ..pieces[1].clone() };
        let short = v1::KvSnapshot { last: true, ..pieces[1].clone() };
        let long = v1::KvSnapshot { blocks_total: 1, ..pieces[0].clone() };
        let huge = v1::KvSnapshot { blocks_total: u64::MAX, ..pieces[0].clone() };
        let taken = v1::KvSnapshot { contents: vec![KvEvent::Cleared.into()], ..pieces[0].clone() };
        let rows: [(&[&v1::KvSnapshot], &str); 8] = [
            (&[&taken], "piece 0 says that something went"),
            (&[&pieces[1]], "piece 1 came without a piece 0"),
            (&[&pieces[0], &pieces[2]], "piece 2 came after 1 pieces"),
            (&[&pieces[0], &pieces[1], &pieces[1]], "piece 1 came after 2 pieces"),
            (&[&pieces[0], &other], "piece 1 is of another snapshot"),
            (&[&pieces[0], &short], "131072 blocks came of 196608 announced"),
            (&[&long], "65536 blocks came of 1 announced"),
            (&[&huge], "blocks, at most 67108864 are allowed"),
        ];
        for (order, wrong) in rows {
            let error = refused(order);
            assert!(error.contains(wrong), "{error}");
        }
    }
}
