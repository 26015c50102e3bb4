//! The file behind a region: what lies where.
//!
//! ```text
//! offset 0      magic "FBKVREG\0" · version u32 · blocks u32 · block_bytes u64 · key epoch u64 · key id u64
//!               · offset of the payload u64 · zeros up to 64 bytes; all little-endian
//!        4096   generation of each block, u64 in the machine's order (only this host reads it)
//!               checksum of each block, u64 (0: none), right behind
//!        P      block 0, block 1, ..: P is the next multiple of 4096
//! ```
//!
//! Everything follows from the layout; the payload's offset is stored only so that a file written by a program that
//! reckoned otherwise is refused.

use super::{Layout, LayoutError, RegionError, RegionKey};

/// Bytes of the header that have a meaning.
pub(super) const HEADER_BYTES: usize = 64;
/// `f_type` of a file on hugetlbfs, from Linux's `magic.h`.
pub(super) const HUGETLBFS_MAGIC: u64 = 0x9584_58F6;

const MAGIC: [u8; 8] = *b"FBKVREG\0";
const VERSION: u32 = 1;
/// Alignment of the tables and of the payload. The smallest page of the machines that Linux runs on; part of the format,
/// so a host with larger pages reads the same file.
const PAGE_BYTES: u64 = 4096;

/// Offsets within the file, in bytes. Fits the address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) generations: usize,
    pub(super) checksums: usize,
    pub(super) payload: usize,
    pub(super) total_bytes: usize,
}

impl Geometry {
    pub(super) fn of(layout: Layout) -> Result<Self, LayoutError> {
        let Layout { block_bytes, blocks } = layout;
        if blocks == 0 {
            return Err(LayoutError::NoBlocks);
        }
        if block_bytes == 0 || !block_bytes.is_multiple_of(8) {
            return Err(LayoutError::BlockBytes { block_bytes });
        }
        // Tables of at most 2^32 words of 8 bytes: no overflow before the payload.
        let table_bytes = u64::from(blocks) * 8;
        let checksums = PAGE_BYTES + table_bytes;
        let payload = (checksums + table_bytes).next_multiple_of(PAGE_BYTES);
        let total_bytes = block_bytes
            .checked_mul(u64::from(blocks))
            .and_then(|bytes| bytes.checked_add(payload))
            .and_then(|bytes| isize::try_from(bytes).ok())
            .ok_or(LayoutError::TooLarge { blocks, block_bytes })?;
        Ok(Self {
            generations: PAGE_BYTES as usize,
            checksums: checksums as usize,
            payload: payload as usize,
            total_bytes: total_bytes as usize,
        })
    }
}

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) key: RegionKey,
    pub(super) layout: Layout,
}

impl Header {
    pub(super) fn encode(self, geometry: Geometry) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.layout.blocks.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.layout.block_bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.key.epoch.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.key.id.to_le_bytes());
        bytes[40..48].copy_from_slice(&(geometry.payload as u64).to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, RegionError> {
        let word = |at: usize| {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes of a header of 64"))
        };
        let half = |at: usize| {
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes of a header of 64"))
        };
        if bytes[..8] != MAGIC {
            return Err(RegionError::NotRegion);
        }
        if half(8) != VERSION {
            return Err(RegionError::Version { found: half(8), expected: VERSION });
        }
        let layout = Layout { block_bytes: word(16), blocks: half(12) };
        if Geometry::of(layout)?.payload as u64 != word(40) {
            return Err(RegionError::NotRegion);
        }
        Ok(Self { key: RegionKey { epoch: word(24), id: word(32) }, layout })
    }
}
