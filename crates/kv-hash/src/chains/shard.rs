//! One part of what is remembered: pieces by name, bounded, the least useful given up first.
//!
//! Everything that grows is reserved at the first piece or in chunks of [`CHUNK_PIECES`], so no call copies or rehashes
//! what is there: each takes time for its own piece and nothing else.

use forebay_types::BlockHash;

/// Pieces whose hashes are allocated together: 32 KiB at 64 blocks a piece, so that allocating is rare and short.
const CHUNK_PIECES: usize = 64;

/// Pieces that one eviction may pass over because they were used again. Past that it takes the next even so: a bound on
/// one call, met only where nearly everything is in use and any choice is as good.
const SECOND_CHANCES_MAX: usize = 64;

/// A position in `pieces` plus one; 0 is none. So an empty table is zeroed memory, which costs nothing until touched.
type Link = u32;

/// A remembered piece, without its hashes: those of position p are at p modulo [`CHUNK_PIECES`] in a chunk.
struct Piece {
    name: u64,
    next_in_bucket: Link,
    /// Wanted since it was remembered, or since the hand last passed.
    is_used_again: bool,
}

/// Bytes that one piece of `piece_blocks` blocks takes, everything included: its hashes, itself, its bucket, and its part
/// of the chunks' vector.
const fn piece_bytes(piece_blocks: usize) -> usize {
    piece_blocks * size_of::<BlockHash>()
        + size_of::<Piece>()
        + size_of::<Link>()
        + CHUNK_BYTES.div_ceil(CHUNK_PIECES)
}

/// Bytes of one chunk itself, without its pieces.
const CHUNK_BYTES: usize = size_of::<Vec<BlockHash>>();

/// Pieces that one shard can hold in `bytes`: a chunk begins with its first piece, so one more may be needed.
pub(super) fn pieces_in(bytes: usize, piece_blocks: usize) -> usize {
    (bytes.saturating_sub(CHUNK_BYTES) / piece_bytes(piece_blocks)).min(Link::MAX as usize - 1)
}

/// Pieces by name.
pub(super) struct Shard {
    piece_blocks: usize,
    pieces_max: usize,
    /// As many as `pieces_max`: chains are one piece long on average. Names are keyed hashes, so nobody can lengthen one.
    buckets: Vec<Link>,
    pieces: Vec<Piece>,
    chunks: Vec<Vec<BlockHash>>,
    /// Where the next eviction looks first.
    hand: usize,
    evictions: u64,
}

impl Shard {
    /// Holds up to `pieces_max` pieces, at least one, of `piece_blocks` blocks. Allocates nothing yet.
    pub(super) fn new(piece_blocks: usize, pieces_max: usize) -> Self {
        assert!(pieces_max > 0 && pieces_max < Link::MAX as usize, "links reach every piece");
        Self {
            piece_blocks,
            pieces_max,
            buckets: Vec::new(),
            pieces: Vec::new(),
            chunks: Vec::new(),
            hand: 0,
            evictions: 0,
        }
    }

    /// Copies the hashes of the piece called `name` to `hashes`; `false` if it is not known.
    pub(super) fn copy(&mut self, name: u64, hashes: &mut [BlockHash]) -> bool {
        let Some(position) = self.find(name) else { return false };
        self.pieces[position].is_used_again = true;
        let start = position % CHUNK_PIECES * self.piece_blocks;
        hashes.copy_from_slice(&self.chunks[position / CHUNK_PIECES][start..start + self.piece_blocks]);
        true
    }

    /// Remembers a piece, at the expense of another one if there is no room. Nothing changes if it is known: another
    /// thread had the same prompt.
    pub(super) fn remember(&mut self, name: u64, hashes: &[BlockHash]) {
        debug_assert_eq!(hashes.len(), self.piece_blocks);
        if self.find(name).is_some() {
            return;
        }
        if self.pieces.capacity() == 0 {
            self.reserve();
        }
        // A new piece has no second chance: prompts that never come back do not push out conversations.
        let new = Piece { name, next_in_bucket: 0, is_used_again: false };
        let position = if self.pieces.len() < self.pieces_max {
            self.append(hashes);
            self.pieces.push(new);
            self.pieces.len() - 1
        } else {
            let position = self.evict();
            let start = position % CHUNK_PIECES * self.piece_blocks;
            self.chunks[position / CHUNK_PIECES][start..start + self.piece_blocks].copy_from_slice(hashes);
            self.pieces[position] = new;
            position
        };
        let bucket = self.bucket(name);
        self.pieces[position].next_in_bucket = self.buckets[bucket];
        self.buckets[bucket] = position as Link + 1;
    }

    /// Pieces remembered.
    pub(super) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Pieces given up for others so far.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Bytes allocated; no more than those for which [`pieces_in`] gave `pieces_max`.
    pub(super) fn bytes(&self) -> usize {
        let hashes: usize = self.chunks.iter().map(Vec::capacity).sum();
        hashes * size_of::<BlockHash>()
            + self.pieces.capacity() * size_of::<Piece>()
            + self.buckets.capacity() * size_of::<Link>()
            + self.chunks.capacity() * size_of::<Vec<BlockHash>>()
    }

    fn reserve(&mut self) {
        self.buckets = vec![0; self.pieces_max];
        self.pieces.reserve_exact(self.pieces_max);
        self.chunks.reserve_exact(self.pieces_max.div_ceil(CHUNK_PIECES));
    }

    fn append(&mut self, hashes: &[BlockHash]) {
        if self.pieces.len().is_multiple_of(CHUNK_PIECES) {
            let pieces = CHUNK_PIECES.min(self.pieces_max - self.pieces.len());
            self.chunks.push(Vec::with_capacity(pieces * self.piece_blocks));
        }
        self.chunks[self.pieces.len() / CHUNK_PIECES].extend_from_slice(hashes);
    }

    /// Where chains of `name` start. From the upper half of the name: the shard was chosen by the lower.
    fn bucket(&self, name: u64) -> usize {
        (((name >> 32) * self.buckets.len() as u64) >> 32) as usize
    }

    fn find(&self, name: u64) -> Option<usize> {
        if self.buckets.is_empty() {
            return None;
        }
        let mut link = self.buckets[self.bucket(name)];
        while let Some(position) = link.checked_sub(1) {
            let piece = &self.pieces[position as usize];
            if piece.name == name {
                return Some(position as usize);
            }
            link = piece.next_in_bucket;
        }
        None
    }

    /// Forgets a piece and returns its position. CLOCK: the hand goes round and takes the first piece that nobody wanted
    /// since it last passed. A list in order of use would be exact, but writes to two more places at every use.
    fn evict(&mut self) -> usize {
        for _ in 0..SECOND_CHANCES_MAX {
            if !std::mem::take(&mut self.pieces[self.hand].is_used_again) {
                break;
            }
            self.advance();
        }
        let position = self.hand;
        self.advance();
        self.unlink(position);
        self.evictions += 1;
        position
    }

    fn advance(&mut self) {
        self.hand = (self.hand + 1) % self.pieces.len();
    }

    fn unlink(&mut self, position: usize) {
        let own = position as Link + 1;
        let Piece { name, next_in_bucket: after, .. } = self.pieces[position];
        let bucket = self.bucket(name);
        if self.buckets[bucket] == own {
            self.buckets[bucket] = after;
            return;
        }
        let mut link = self.buckets[bucket];
        while let Some(before) = link.checked_sub(1) {
            let before = &mut self.pieces[before as usize];
            if before.next_in_bucket == own {
                before.next_in_bucket = after;
                return;
            }
            link = before.next_in_bucket;
        }
    }
}

#[cfg(test)]
mod tests;
