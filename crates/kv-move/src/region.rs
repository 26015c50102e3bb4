//! Regions: one pool of KV blocks in shared memory.
//!
//! In: a [`Layout`], or a file descriptor from another process. Out: a [`Region`], whose blocks can be addressed,
//! generation by generation. The file's layout is in [`format`](self::format); the mapping, and with it all
//! `unsafe` of this crate, in [`mapping`].
//!
//! # The generation of a block is a seqlock
//!
//! *Writer* (the pool's owner, one thread per block at a time), when block `b` gets new content:
//! `generation[b].store(new)`, then a release fence, then the first byte. [`Region::set_generation`] does both steps. The
//! fence matters: a release *store* alone orders what comes before it, so the bytes could become visible first.
//!
//! *Reader*: `generation[b].load(Acquire)` must equal the one it was promised; copy; an acquire fence; load again, must
//! still be equal. Suppose that the copy read a byte of newer content. That byte was stored after the writer's release
//! fence and loaded before the reader's acquire fence, so the fences synchronise and the second load sees the new
//! generation (or a later one; generations only rise, so the old number cannot come back). Therefore equal generations
//! mean that no byte is newer. That no byte is *older* follows from how the reader came by its [`BlockRef`]: the owner
//! hands it over, by channel or socket, only after the content is complete.
//!
//! This crate's own loads and stores of the payload are relaxed atomic words, so a reader that loses the race reads a
//! value that is torn over words and then discarded, which is defined. An owner in the same process that writes
//! plainly through [`Region::block_ptr`] must not do so while a lease is live; the generations catch the mistake,
//! they do not excuse it.
//!
//! [`BlockRef`]: crate::BlockRef

mod format;
mod key;
mod mapping;
#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
            fence,
        },
    },
};

use rustix::fs::{MemfdFlags, SealFlags};

pub use self::key::RegionKey;
use self::{
    format::{Geometry, Header},
    mapping::{Access, Mapping},
};
use crate::checksum::xxh64;

/// Size of a pool. All blocks are of one size and lie one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Bytes of one block: a positive multiple of 8.
    pub block_bytes: u64,
    /// Number of blocks, at least one.
    pub blocks: u32,
}

/// Why a layout cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A pool without blocks.
    #[error("a region needs at least one block")]
    NoBlocks,
    /// Blocks are read and written in words of 8 bytes.
    #[error("a block of {block_bytes} bytes cannot be: its size must be a positive multiple of 8")]
    BlockBytes {
        /// The size that was asked for.
        block_bytes: u64,
    },
    /// More than the address space holds.
    #[error("{blocks} blocks of {block_bytes} bytes do not fit an address space: ask for fewer")]
    TooLarge {
        /// Number of blocks.
        blocks: u32,
        /// Bytes of one block.
        block_bytes: u64,
    },
}

/// Why a region was not created or opened.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The layout is impossible, or that of a file that was made up.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The operating system refused.
    #[error("{call} failed: check the limits on memory and descriptors of this process")]
    System {
        /// The system call.
        call: &'static str,
        /// Its error.
        #[source]
        cause: io::Error,
    },
    /// Its size could change under a reader, which would then die of SIGBUS.
    #[error("the descriptor is no memfd of sealed size: only regions made by this program can be opened")]
    NotSealed,
    /// Its pages could be missing when touched, which is SIGBUS too.
    #[error("the descriptor is backed by reserved huge pages: make the region without them")]
    HugePages,
    /// The file has no region's header.
    #[error("the descriptor holds no KV region")]
    NotRegion,
    /// Another version wrote it.
    #[error(
        "the region has format version {found}, this program reads {expected}: run the same version on both sides"
    )]
    Version {
        /// The file's.
        found: u32,
        /// Ours.
        expected: u32,
    },
    /// The header promises another size than the file has.
    #[error(
        "the region's file has {found} bytes where its layout needs {expected}: ask its owner for a new one"
    )]
    Size {
        /// By the layout in the header.
        expected: u64,
        /// The file's.
        found: u64,
    },
}

impl RegionError {
    fn system(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::System { call, cause: errno.into() }
    }
}

/// One pool of KV blocks. Cloning is cheap and shares the mapping, which goes with the last clone.
///
/// Who writes a block first calls [`set_generation`](Self::set_generation); who reads one compares
/// [`generation`](Self::generation) before and [`generation_after_reads`](Self::generation_after_reads) afterwards. Why
/// that suffices is argued at the top of `region.rs`.
#[derive(Clone)]
pub struct Region {
    inner: Arc<Inner>,
}

struct Inner {
    mapping: Mapping,
    fd: OwnedFd,
    key: RegionKey,
    layout: Layout,
    geometry: Geometry,
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("key", &self.inner.key)
            .field("layout", &self.inner.layout)
            .field("writable", &self.is_writable())
            .finish()
    }
}

impl Region {
    /// Makes a region of zeros, with every generation 0, that this process may write. `name` shows in `/proc/PID/maps`.
    ///
    /// No page exists before it is first touched. Afterwards the file can neither shrink, grow nor be mapped for
    /// writing again, so this mapping (and its clones) stays the only one that writes.
    ///
    /// # Errors
    /// `Layout` if the layout is impossible, `System` if a call fails (needs Linux 5.1 or later).
    pub fn create(name: &str, layout: Layout) -> Result<Self, RegionError> {
        let geometry = Geometry::of(layout)?;
        let key = RegionKey::next().map_err(RegionError::system("getrandom"))?;
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(RegionError::system("memfd_create"))?;
        rustix::fs::ftruncate(&fd, geometry.total_bytes as u64).map_err(RegionError::system("ftruncate"))?;
        let header = Header { key, layout }.encode(geometry);
        let written = rustix::io::pwrite(&fd, &header, 0).map_err(RegionError::system("pwrite"))?;
        if written != header.len() {
            return Err(RegionError::System { call: "pwrite", cause: io::ErrorKind::WriteZero.into() });
        }
        let mapping = Mapping::new(&fd, geometry.total_bytes, Access::ReadWrite)
            .map_err(RegionError::system("mmap"))?;
        // After the mapping above: FUTURE_WRITE refuses writable ones from here on, ours stays.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(RegionError::system("fcntl(F_ADD_SEALS)"))?;
        Ok(Self { inner: Arc::new(Inner { mapping, fd, key, layout, geometry }) })
    }

    /// Maps a region that another process made, for reading only.
    ///
    /// Trusts nothing: the size must be sealed (so no later truncation can raise SIGBUS here) and must be exactly what
    /// the header's layout needs. The header is read once, into private memory; a peer that changes it later
    /// changes nothing here.
    ///
    /// # Errors
    /// Any [`RegionError`]; the descriptor is closed then.
    pub fn open(fd: OwnedFd) -> Result<Self, RegionError> {
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_no_memfd| RegionError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(RegionError::NotSealed);
        }
        let file_system = rustix::fs::fstatfs(&fd).map_err(RegionError::system("fstatfs"))?;
        if file_system.f_type as u64 & 0xFFFF_FFFF == format::HUGETLBFS_MAGIC {
            return Err(RegionError::HugePages);
        }
        let stat = rustix::fs::fstat(&fd).map_err(RegionError::system("fstat"))?;
        let found = u64::try_from(stat.st_size).unwrap_or(0);
        let mut bytes = [0; format::HEADER_BYTES];
        let read = rustix::io::pread(&fd, &mut bytes, 0).map_err(RegionError::system("pread"))?;
        if read != bytes.len() {
            return Err(RegionError::NotRegion);
        }
        let header = Header::decode(&bytes)?;
        let geometry = Geometry::of(header.layout)?;
        if found != geometry.total_bytes as u64 {
            return Err(RegionError::Size { expected: geometry.total_bytes as u64, found });
        }
        let mapping =
            Mapping::new(&fd, geometry.total_bytes, Access::Read).map_err(RegionError::system("mmap"))?;
        Ok(Self { inner: Arc::new(Inner { mapping, fd, key: header.key, layout: header.layout, geometry }) })
    }

    /// Identity of this pool, unlike that of any other process or of an earlier life of this one.
    pub fn key(&self) -> RegionKey {
        self.inner.key
    }

    /// Size of the pool.
    pub fn layout(&self) -> Layout {
        self.inner.layout
    }

    /// The memfd, to be passed to another process ([`send_region`](crate::send_region)).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }

    /// Whether this process made the region. Any other may only read it.
    pub fn is_writable(&self) -> bool {
        self.inner.mapping.access() == Access::ReadWrite
    }

    /// Which content block `block` has, with `Acquire`: what the caller reads next is not older than this answer.
    ///
    /// # Panics
    /// If there is no such block. So do all methods that take one.
    pub fn generation(&self, block: u32) -> u64 {
        self.generation_word(block).load(Acquire)
    }

    /// The reader's second look: which generation the block had after everything the caller read so far. Equal to the
    /// first look means that those bytes are that generation's (see the module's argument).
    pub fn generation_after_reads(&self, block: u32) -> u64 {
        fence(Acquire);
        self.generation_word(block).load(Relaxed)
    }

    /// Announces that the block's content is about to change: call it *before* the first write, never after. Forgets
    /// the block's checksum. Generations must rise for as long as the region lives.
    ///
    /// # Panics
    /// If the region was opened for reading.
    pub fn set_generation(&self, block: u32, generation: u64) {
        self.assert_writable();
        let word = self.generation_word(block);
        debug_assert!(
            word.load(Relaxed) <= generation,
            "block {block} would fall to generation {generation}: readers of an old content could not tell"
        );
        word.store(generation, Release);
        // Orders the store above before all later stores of this thread, checksum and payload.
        fence(Release);
        // After the generation, so that a reader that still sees the old generation at its second look has not seen
        // the checksum go.
        self.checksum_word(block).store(0, Relaxed);
    }

    /// Computes and publishes the checksum of a complete block, for receivers that ask for
    /// [`Checksum::Published`](crate::Checksum::Published): XXH64 of its bytes, seeded with its generation. Costs one
    /// reading of the block.
    ///
    /// # Panics
    /// If the region was opened for reading.
    pub fn publish_checksum(&self, block: u32) {
        self.assert_writable();
        let checksum = self.compute_checksum(block, self.generation(block));
        self.checksum_word(block).store(checksum, Release);
    }

    /// The checksum that the owner published for the block's present generation, if it did.
    pub fn published_checksum(&self, block: u32) -> Option<u64> {
        Some(self.checksum_word(block).load(Acquire)).filter(|checksum| *checksum != 0)
    }

    /// What [`publish_checksum`](Self::publish_checksum) would publish for these bytes as that generation. Never 0,
    /// which in the table means that there is none.
    pub(crate) fn compute_checksum(&self, block: u32, generation: u64) -> u64 {
        xxh64(self.words(block, 1), generation).max(1)
    }

    /// The first byte of a block; the block's bytes follow it, then those of the next block. Blocks are aligned to 8
    /// bytes, block 0 to a page.
    ///
    /// Writing through it is sound only in the process that made the region, by the one thread that owns the block,
    /// after [`set_generation`](Self::set_generation), and while no transfer reads or writes the block; and the
    /// pointer lives no longer than the region's last clone.
    pub fn block_ptr(&self, block: u32) -> NonNull<u8> {
        self.inner.mapping.pointer(self.payload_offset(block, 1))
    }

    /// Copies a block's bytes out, for tests and tools. The caller checks generations if it needs to.
    ///
    /// # Panics
    /// If `bytes` is not as long as a block.
    pub fn copy_out(&self, block: u32, bytes: &mut [u8]) {
        let words = self.words(block, 1);
        assert_eq!(bytes.len(), size_of_val(words), "copy_out takes exactly one block");
        for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.load(Relaxed).to_ne_bytes();
        }
    }

    /// Copies bytes into a block, for tests and tools. Publish the generation first.
    ///
    /// # Panics
    /// If `bytes` is not as long as a block, or the region was opened for reading.
    pub fn copy_in(&self, block: u32, bytes: &[u8]) {
        self.assert_writable();
        let words = self.words(block, 1);
        assert_eq!(bytes.len(), size_of_val(words), "copy_in takes exactly one block");
        for (bytes, word) in bytes.as_chunks().0.iter().zip(words) {
            word.store(u64::from_ne_bytes(*bytes), Relaxed);
        }
    }

    /// The words of `blocks` blocks from `first` on. Of a region that was opened they may only be loaded.
    pub(crate) fn words(&self, first: u32, blocks: u32) -> &[AtomicU64] {
        let offset = self.payload_offset(first, blocks);
        self.inner.mapping.words(offset, blocks as usize * self.inner.layout.block_bytes as usize / 8)
    }

    /// Where `blocks` blocks from `first` on lie in the file. No overflow: `Geometry::of` reckoned the whole region's
    /// size, and these are in it.
    fn payload_offset(&self, first: u32, blocks: u32) -> usize {
        let Layout { block_bytes, blocks: all } = self.inner.layout;
        assert!(
            u64::from(first) + u64::from(blocks) <= u64::from(all),
            "blocks {first}..+{blocks} are not in a region of {all} blocks"
        );
        self.inner.geometry.payload + first as usize * block_bytes as usize
    }

    fn generation_word(&self, block: u32) -> &AtomicU64 {
        self.table_word(self.inner.geometry.generations, block)
    }

    fn checksum_word(&self, block: u32) -> &AtomicU64 {
        self.table_word(self.inner.geometry.checksums, block)
    }

    fn table_word(&self, table: usize, block: u32) -> &AtomicU64 {
        let blocks = self.inner.layout.blocks;
        assert!(block < blocks, "block {block} is not in a region of {blocks} blocks");
        &self.inner.mapping.words(table + block as usize * 8, 1)[0]
    }

    pub(crate) fn assert_writable(&self) {
        assert!(self.is_writable(), "region {} was opened for reading: only its creator writes", self.key());
    }
}
