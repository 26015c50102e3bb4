//! Whole caches in pieces: [`snapshot_chunks`] cuts, [`SnapshotReader`] puts together.

use forebay_types::{BlockHash, RankId};

use crate::{
    error::WireError,
    kv::Life,
    limits::{SNAPSHOT_BLOCKS_MAX, SNAPSHOT_CHUNK_HASHES_MAX},
    v1,
};

/// Blocks for which room is made on the word of a first piece; beyond that it grows with what really comes.
const RESERVE_BLOCKS_MAX: u64 = 1 << 20;

/// Everything that one rank caches on its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Whose.
    pub rank: RankId,
    /// Number of the first batch that is not in it.
    pub sequence_next: u64,
    /// In any order.
    pub blocks: Vec<BlockHash>,
}

/// The pieces of a snapshot, in order: at least one, even of an empty cache.
pub fn snapshot_chunks(
    dp_rank: u16,
    sequence_next: u64,
    blocks: &[BlockHash],
) -> impl ExactSizeIterator<Item = v1::KvSnapshot> + '_ {
    let chunks = blocks.len().div_ceil(SNAPSHOT_CHUNK_HASHES_MAX).max(1);
    (0..chunks).map(move |index| {
        let start = index * SNAPSHOT_CHUNK_HASHES_MAX;
        let end = blocks.len().min(start + SNAPSHOT_CHUNK_HASHES_MAX);
        v1::KvSnapshot {
            dp_rank: dp_rank.into(),
            sequence_next,
            chunk_index: index as u32,
            last: index + 1 == chunks,
            blocks_total: blocks.len() as u64,
            hashes: blocks[start..end].iter().map(|&BlockHash(hash)| hash).collect(),
        }
    })
}

/// Puts the pieces of one rank's snapshot together. One for each rank of a stream.
#[derive(Debug, Default)]
pub struct SnapshotReader {
    under_way: Option<Partial>,
}

#[derive(Debug)]
struct Partial {
    snapshot: Snapshot,
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
        let v1::KvSnapshot { dp_rank, sequence_next, chunk_index, last, blocks_total, hashes } = chunk;
        let rank = life.rank(dp_rank)?;
        WireError::at_most("a piece of a snapshot", "hashes", hashes.len(), SNAPSHOT_CHUNK_HASHES_MAX)?;
        if blocks_total > SNAPSHOT_BLOCKS_MAX {
            let (got, max) = (blocks_total, SNAPSHOT_BLOCKS_MAX);
            return Err(WireError::TooMuch { what: "a snapshot", got, max, unit: "blocks" });
        }
        let broken = |wrong: String| WireError::Sequence { what: "a snapshot", wrong };
        let mut partial = if chunk_index == 0 {
            let room = blocks_total.min(RESERVE_BLOCKS_MAX) as usize;
            let snapshot = Snapshot { rank, sequence_next, blocks: Vec::with_capacity(room) };
            Partial { snapshot, blocks_total, chunk_next: 0 }
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
        partial.snapshot.blocks.extend(hashes.into_iter().map(BlockHash));
        partial.chunk_next += 1;
        let got = partial.snapshot.blocks.len() as u64;
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
    use forebay_types::Incarnation;

    use super::*;

    const LIFE: Life = Life { incarnation: Incarnation(7), dp_ranks: 2 };

    fn blocks(count: usize) -> Vec<BlockHash> {
        (0..count as u64).map(|n| BlockHash(n.wrapping_mul(0x9E37_79B9_7F4A_7C15))).collect()
    }

    #[test]
    fn snapshots_of_all_sizes_come_back() {
        let chunk = SNAPSHOT_CHUNK_HASHES_MAX;
        for (count, pieces) in
            [(0, 1), (1, 1), (chunk, 1), (chunk + 1, 2), (3 * chunk, 3), (3 * chunk + 5, 4)]
        {
            let blocks = blocks(count);
            let mut reader = SnapshotReader::default();
            let messages: Vec<_> = snapshot_chunks(1, 42, &blocks).collect();
            assert_eq!(messages.len(), pieces, "{count} blocks");
            let mut whole = None;
            for message in messages {
                assert!(whole.is_none(), "nothing follows the last piece");
                whole = reader.take(&LIFE, message).expect("in order");
                assert_eq!(reader.is_under_way(), whole.is_none());
            }
            let rank = RankId { incarnation: Incarnation(7), dp_rank: 1 };
            assert_eq!(whole, Some(Snapshot { rank, sequence_next: 42, blocks }));
        }
    }

    #[test]
    fn a_lost_repeated_or_foreign_piece_is_noticed_and_a_new_start_is_taken() {
        let blocks = blocks(3 * SNAPSHOT_CHUNK_HASHES_MAX);
        let pieces: Vec<_> = snapshot_chunks(1, 42, &blocks).collect();
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
        let rows: [(&[&v1::KvSnapshot], &str); 7] = [
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
