//! Pipes for splice(2): a few idle ones for each thread, and how deep they may be filled.
//!
//! A direction that moves in bulk takes a pipe when its sender has something, and gives it back as soon as it is
//! empty and nothing more is there. So pipes are as many as directions whose receiver is slow, and a few more.
//! When a direction splices at all is decided in `direction`.
//!
//! *Sizes.* The kernel gives a user without privileges 64 MiB of pipes (`fs.pipe-user-pages-soft`), and after that
//! small ones. So a pipe has 1 MiB while that lasts, then 256 KiB, then 64 KiB. A smaller one is worse than copying:
//! it is closed, and the direction copies. Without such a limit, as root, slow receivers could park memory without end:
//! while [`PARKED_DEEP`] pipes wait for theirs, no other is filled beyond [`SHALLOW_BYTES`].

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::{ioctl_fionread, retry_on_intr};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};

use crate::serve::moving_stream::MovingPipe;
use crate::stats::PROCESS;

/// What is asked of the kernel, in this order.
const SIZES_BYTES: [usize; 3] = [1024 * 1024, 256 * 1024, SHALLOW_BYTES];

/// What one read of a copying direction takes: a pipe has to hold as much.
const SHALLOW_BYTES: usize = 64 * 1024;

/// Idle pipes that a thread keeps. It has use for two at a time, and a few more after receivers were slow.
const POOLED: usize = 8;

/// Pipes that may be full of bytes for slow receivers, in the whole process.
const PARKED_DEEP: usize = 64;

thread_local! {
    /// Empty pipes.
    static POOL: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// Pipes whose bytes wait for their receivers.
static PARKED: AtomicUsize = AtomicUsize::new(0);

/// A pipe and what is in it. Dropped, it is closed, and its bytes are gone.
#[derive(Debug)]
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: u32,
    held: u32,
    parked: bool,
}

impl Pipe {
    /// An empty pipe of this thread, or a new one; `None`, and counted, where the kernel gives none that is of use.
    pub(crate) fn take() -> Option<Self> {
        #[cfg(test)]
        if tests::REFUSING.get() {
            PROCESS.splice_fallbacks.increment();
            return None;
        }
        let pipe = POOL.with_borrow_mut(Vec::pop).or_else(|| Self::open(&SIZES_BYTES));
        if pipe.is_none() {
            PROCESS.splice_fallbacks.increment();
        }
        pipe
    }

    /// One that another process has filled.
    ///
    /// # Errors
    /// It is no pipe, or not so much is in it.
    pub(crate) fn take_over(MovingPipe { read, write, held }: MovingPipe) -> io::Result<Self> {
        let capacity = u32::try_from(fcntl_getpipe_size(&write)?).map_err(io::Error::other)?;
        let mut pipe = Self { read, write, capacity, held, parked: false };
        if pipe.count()? != u64::from(held) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a pipe holds more or less than was said"));
        }
        pipe.park();
        Ok(pipe)
    }

    /// For another process. Nothing may move in or out before that has it, or goes without it.
    ///
    /// # Errors
    /// No descriptor is left for copies.
    pub(crate) fn moving(&self) -> io::Result<MovingPipe> {
        Ok(MovingPipe { read: self.read.try_clone()?, write: self.write.try_clone()?, held: self.held })
    }

    /// What is in it, as the kernel counts.
    fn count(&self) -> io::Result<u64> {
        Ok(ioctl_fionread(&self.read)?)
    }

    /// A new pipe of the first size that the kernel allows.
    fn open(sizes_bytes: &[usize]) -> Option<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        let allowed = sizes_bytes.iter().find_map(|size| fcntl_setpipe_size(&write, *size).ok());
        let capacity = allowed.or_else(|| fcntl_getpipe_size(&write).ok())?;
        let pipe = Self { read, write, capacity: u32::try_from(capacity).ok()?, held: 0, parked: false };
        (capacity >= SHALLOW_BYTES).then_some(pipe)
    }

    /// Hands an empty pipe to the next that needs one. One with bytes is closed: they would reach a stranger.
    pub(crate) fn give_back(mut self) {
        if !self.is_empty() {
            return;
        }
        self.unpark();
        POOL.with_borrow_mut(|pool| {
            if pool.len() < POOLED {
                pool.push(self);
            }
        });
    }

    /// True where nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// How much more it may be given now. It may still refuse: it holds so many pages, and each may be half empty.
    pub(crate) fn room(&self) -> usize {
        let deep = self.parked || PARKED.load(Ordering::Relaxed) < PARKED_DEEP;
        let depth = if deep { self.capacity as usize } else { SHALLOW_BYTES };
        depth.saturating_sub(self.held as usize)
    }

    /// Takes what a socket has, as much as there is room for. 0 means an end of stream, or an urgent mark before it.
    ///
    /// Nothing now (`AGAIN`) comes from an empty socket or a full pipe; an empty pipe is not full.
    pub(crate) fn fill(&mut self, from: impl AsFd) -> rustix::io::Result<usize> {
        let count = retry_on_intr(|| splice(&from, None, &self.write, None, self.room(), SpliceFlags::NONBLOCK))?;
        self.held += count as u32; // No more than the room, which is no more than a u32.
        Ok(count)
    }

    /// Gives what it holds to a socket, as much as that takes.
    pub(crate) fn drain(&mut self, to: impl AsFd) -> rustix::io::Result<usize> {
        let held = self.held as usize;
        let count = retry_on_intr(|| splice(&self.read, None, &to, None, held, SpliceFlags::NONBLOCK))?;
        self.held = self.held.saturating_sub(count as u32);
        Ok(count)
    }

    /// Counts it among those that wait for a slow receiver, until it is given back or closed.
    pub(crate) fn park(&mut self) {
        if !self.parked && PARKED.load(Ordering::Relaxed) < PARKED_DEEP {
            PARKED.fetch_add(1, Ordering::Relaxed);
            self.parked = true;
        }
    }

    fn unpark(&mut self) {
        if self.parked {
            PARKED.fetch_sub(1, Ordering::Relaxed);
            self.parked = false;
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.unpark();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::io::Errno;

    use super::*;

    thread_local! {
        /// True where this thread is to be told that there are no pipes.
        pub(crate) static REFUSING: Cell<bool> = const { Cell::new(false) };
    }

    /// Idle pipes of this thread.
    pub(crate) fn pooled() -> usize {
        POOL.with_borrow(Vec::len)
    }

    #[test]
    fn given_no_limit_when_a_pipe_is_opened_then_it_has_the_first_size_that_the_kernel_allows() {
        let pipe = Pipe::open(&SIZES_BYTES).expect("a pipe");

        assert!(SIZES_BYTES.contains(&(pipe.capacity as usize)), "{} bytes", pipe.capacity);
        assert_eq!(fcntl_getpipe_size(&pipe.read), Ok(pipe.capacity as usize));
    }

    #[test]
    fn given_sizes_that_are_refused_when_a_pipe_is_opened_then_the_next_one_is_asked_for() {
        let pipe = Pipe::open(&[usize::MAX / 2, SHALLOW_BYTES]).expect("a pipe");

        assert_eq!(pipe.capacity as usize, SHALLOW_BYTES);
    }

    #[test]
    fn given_a_kernel_that_gives_small_pipes_when_one_is_opened_then_it_is_not_used() {
        assert!(Pipe::open(&[4_096]).is_none());
    }

    #[test]
    fn given_a_pipe_when_it_is_given_back_then_it_is_kept_only_if_it_is_empty() {
        let (mut near, far) = UnixStream::pair().expect("two sockets");
        near.write_all(b"for one receiver only").expect("a socket");
        let mut pipe = Pipe::take().expect("a pipe");

        pipe.fill(&far).expect("bytes");
        pipe.give_back();
        assert_eq!(pooled(), 0);
        Pipe::take().expect("a pipe").give_back();

        assert_eq!(pooled(), 1);
        assert!(Pipe::take().expect("the same").is_empty());
    }

    #[test]
    fn given_more_pipes_than_are_kept_when_given_back_then_the_rest_is_closed() {
        let pipes: Vec<_> = (0..POOLED + 3).map(|_| Pipe::take().expect("a pipe")).collect();

        pipes.into_iter().for_each(Pipe::give_back);

        assert_eq!(pooled(), POOLED);
    }

    #[test]
    fn f25_given_a_pipe_with_bytes_when_another_takes_it_over_then_they_come_out_there_and_only_once() {
        let (mut near, far) = UnixStream::pair().expect("two sockets");
        let (to, mut receiver) = UnixStream::pair().expect("two sockets");
        near.write_all(b"12345").expect("a socket");
        let mut old = Pipe::take().expect("a pipe");
        old.fill(&far).expect("bytes");

        let mut new = Pipe::take_over(old.moving().expect("descriptors")).expect("a pipe with as much");
        drop(old);
        assert_eq!(new.drain(&to), Ok(5));

        let mut received = [0; 5];
        receiver.read_exact(&mut received).expect("what was sent");
        assert_eq!(&received, b"12345");
        let empty = Pipe::take().expect("a pipe").moving().expect("descriptors");
        assert!(Pipe::take_over(MovingPipe { held: 5, ..empty }).is_err(), "there is nothing in it");
        let [read, write] = [(); 2].map(|()| near.try_clone().expect("a descriptor").into());
        assert!(Pipe::take_over(MovingPipe { read, write, held: 0 }).is_err(), "it is no pipe");
    }

    #[test]
    fn given_bytes_when_they_pass_through_a_pipe_then_they_are_counted_in_and_out() {
        let ((mut sender, from), (to, mut receiver)) =
            (UnixStream::pair().expect("two sockets"), UnixStream::pair().expect("two sockets"));
        from.set_nonblocking(true).expect("a flag");
        let mut pipe = Pipe::take().expect("a pipe");
        sender.write_all(b"12345").expect("a socket");

        assert_eq!(pipe.fill(&from), Ok(5));
        assert_eq!(pipe.fill(&from), Err(Errno::AGAIN));
        assert_eq!(pipe.room(), pipe.capacity as usize - 5);
        assert_eq!(pipe.drain(&to), Ok(5));

        let mut received = [0; 5];
        receiver.read_exact(&mut received).expect("what was sent");
        assert_eq!(&received, b"12345");
        assert!(pipe.is_empty());
    }
}
