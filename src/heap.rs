//! Memory that is free but kept by the allocator.

/// Has the allocator give back at once what is free at the end of a thread's memory, and take large pieces from the
/// kernel directly. By itself glibc keeps the more the larger the pieces were that it has seen, for each thread; and
/// reading manifests takes large ones on threads that never need them again. To be called once, at the start.
///
/// What carries traffic allocates less than this at a time, or once.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)] // Two calls with numbers; no crate of ours wraps them.
pub fn keep_little() {
    const KEPT_BYTES: libc::c_int = 128 * 1024; // What it begins with.
    // SAFETY: it sets a number of the allocator, under its lock. Refused, everything stays as it was.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES) };
    // SAFETY: as above.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES) };
}

/// Nothing: this allocator is left to itself.
#[cfg(not(target_env = "gnu"))]
pub fn keep_little() {}

/// Gives the kernel back what reading large manifests took and freed: pages that glibc would keep for the next time,
/// which may never come. Takes milliseconds, in which other threads may wait for memory: for quiet moments. Other
/// allocators are left to themselves.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)] // One call without arguments that could be wrong; no crate of ours wraps it.
pub(crate) fn give_back() {
    // SAFETY: it takes the allocator's own locks, and touches no memory that is in use.
    unsafe { libc::malloc_trim(0) };
}

/// Nothing: this allocator is left to itself.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn give_back() {}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;

    #[test]
    fn given_memory_in_use_when_free_memory_is_given_back_then_it_is_as_it_was() {
        let kept: Vec<Vec<u8>> = (0..1_000).map(|number| vec![number as u8; 1_000]).collect();
        drop((0..1_000).map(|number| vec![number as u8; 1_000]).collect::<Vec<_>>());

        keep_little();
        give_back();

        assert!((0..1_000).all(|number| kept[number].iter().all(|byte| *byte == number as u8)));
    }
}
