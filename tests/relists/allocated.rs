//! How many bytes of the heap are in use. What the allocator keeps beyond them has room for a leak, and so hides it.
#![allow(unsafe_code)] // The trait asks for it; all calls are passed on as they come.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

static BYTES: AtomicU64 = AtomicU64::new(0);

/// What this process has allocated and not freed.
pub(crate) fn bytes() -> u64 {
    BYTES.load(Ordering::Relaxed)
}

struct Counted;

#[global_allocator]
static ALLOCATOR: Counted = Counted;

// SAFETY: it is `System`, which keeps to the contract; counting allocates nothing.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller keeps to the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: as above; it came from `System`.
        unsafe { System.dealloc(place, layout) }
    }
}
