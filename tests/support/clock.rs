//! Another time for programs: clocks that count from the machine's start are set ahead or back (`time_namespaces(7)`).

use std::{fs, io, thread};

use rustix::thread::{UnshareFlags, gettid};

use super::namespace::unshare;

/// Runs `work` on a thread whose programs have their clocks set by so many seconds, from their start on; threads have not.
///
/// The error is the kernel's: it may know of no such namespaces, or the machine may not have run for so long yet.
pub(crate) fn set_by<T: Send>(seconds: i64, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let elsewhen = || -> io::Result<T> {
        unshare(UnshareFlags::NEWTIME)?;
        // That of this thread: its children alone are there.
        let offsets = format!("/proc/{}/timens_offsets", gettid().as_raw_nonzero());
        fs::write(offsets, format!("monotonic {seconds} 0\nboottime {seconds} 0\n"))?;
        Ok(work())
    };
    thread::scope(|scope| scope.spawn(elsewhen).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}
