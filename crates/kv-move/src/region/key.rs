//! The identity of a region.

use std::{
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use rustix::{
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};

/// Identity of one pool: 128 bits. A pool of a restarted process has another epoch, so a reference to the old one is
/// refused and never taken for some other memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionKey {
    /// Drawn at random, once in each life of a process.
    pub epoch: u64,
    /// Counts the regions that the process made. (A process that forks without exec must not make regions on both
    /// sides: they would share epoch and count.)
    pub id: u64,
}

impl RegionKey {
    /// A key that no region has.
    pub(super) fn next() -> Result<Self, Errno> {
        static EPOCH: OnceLock<u64> = OnceLock::new();
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let epoch = match EPOCH.get() {
            Some(epoch) => *epoch,
            None => {
                let drawn = draw()?;
                *EPOCH.get_or_init(|| drawn)
            }
        };
        // Relaxed: only uniqueness is asked of the counter.
        Ok(Self { epoch, id: NEXT.fetch_add(1, Relaxed) })
    }
}

fn draw() -> Result<u64, Errno> {
    loop {
        let mut bytes = [0; 8];
        match getrandom(&mut bytes, GetRandomFlags::empty()) {
            // Reads of up to 256 bytes are whole (getrandom(2)); before the pool is ready a signal may interrupt.
            Ok(8) => return Ok(u64::from_ne_bytes(bytes)),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

impl fmt::Display for RegionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.{}", self.epoch, self.id)
    }
}
