//! The words that threads share: the standard library's, or those of a checker that tries interleavings.

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering, fence},
};
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering, fence},
};

/// A number that differs between most threads.
#[inline]
pub(crate) fn thread_number() -> usize {
    #[cfg(feature = "shuttle")]
    return shuttle::current::me().into();
    #[cfg(not(feature = "shuttle"))]
    {
        // Threads have stacks megabytes apart: the address of a local tells them apart well enough to share little.
        let local = 0u8;
        ((&raw const local).addr() >> 16).wrapping_mul(0x9e37_79b9) >> 16
    }
}

/// Lets others run.
pub(crate) fn yield_now() {
    #[cfg(feature = "shuttle")]
    shuttle::thread::yield_now();
    #[cfg(not(feature = "shuttle"))]
    std::hint::spin_loop();
}
