//! One shared mapping of a whole file, seen as words.
//!
//! All that the rest of the crate gets from here is `&[AtomicU64]`, so everything above is safe code, and bytes that
//! another process changes meanwhile are merely other values, never undefined behaviour.

use std::{
    os::fd::AsFd,
    ptr::{self, NonNull},
    sync::atomic::AtomicU64,
};

use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

/// What the pages may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    ReadWrite,
}

pub(super) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    access: Access,
}

// SAFETY: the mapping belongs to no thread: it is memory at a fixed address until the value is dropped, and it is read
// and written through atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared reference gives nothing but `&[AtomicU64]`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` of the file. Pages come into being when they are first touched.
    ///
    /// The caller knows that the file is that long and cannot shrink; otherwise touching the end raises SIGBUS.
    pub(super) fn new(fd: impl AsFd, bytes: usize, access: Access) -> Result<Self, Errno> {
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, protection, flags, fd, 0)? };
        let base = NonNull::new(base.cast()).expect("mmap without an address wish never gives page 0");
        Ok(Self { base, bytes, access })
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    /// The byte at `offset`, with leave to reach every byte of the mapping from it.
    ///
    /// # Panics
    /// If it does not lie in the mapping.
    pub(super) fn pointer(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.bytes, "outside of the mapping");
        // SAFETY: in bounds of one mapping (asserted).
        unsafe { self.base.add(offset) }
    }

    /// `words` words from byte `offset` on. Of a mapping for reading they may only be loaded: a store is a SIGSEGV.
    ///
    /// # Panics
    /// If they do not lie in the mapping, or not on a word's boundary.
    pub(super) fn words(&self, offset: usize, words: usize) -> &[AtomicU64] {
        let end = words.checked_mul(8).and_then(|bytes| bytes.checked_add(offset));
        assert!(
            offset.is_multiple_of(8) && end.is_some_and(|end| end <= self.bytes),
            "outside of the mapping"
        );
        // SAFETY: in bounds (asserted) of a mapping that lives as long as `self`; aligned, since the base is aligned
        // to a page and the offset to a word; every bit pattern is an `AtomicU64`; and nothing in this crate makes a
        // plain reference to these bytes. Loads from pages mapped for reading are allowed by "Atomic accesses to
        // read-only memory" of `std::sync::atomic`: no wider than a pointer, relaxed or acquire.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset).cast::<AtomicU64>(), words) }
    }
}

// That rule is given for words of a pointer's width.
const _: () = assert!(size_of::<usize>() == 8, "regions need a 64-bit machine");

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, and no reference into it outlives `self`. It cannot fail for a mapping
        // that exists, and there is nobody to tell.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
