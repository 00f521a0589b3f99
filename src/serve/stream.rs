//! A TCP connection's socket as the event loop knows it: waiting for it, and the calls that a relay makes.
//!
//! It is registered once, and edges are all that the loop tells; so each call here says whether it has emptied or
//! filled the socket, and where that shows in the result, no further call is made only to hear "not now". Readiness is
//! cleared as it was *before* the call (`try_io` sees to it): what arrives in between wakes the task.
//!
//! *Urgent data* splits a stream: a read ends before the mark, and a splice does not come past it, though more is
//! queued behind. The loop tells of it ([`Interest::PRIORITY`]), and then a short read is no sign of an empty socket. The
//! urgent byte itself is not passed on, as with any program that reads the stream alone.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::serve::pipe::Pipe;
use crate::serve::socket;

/// A connected (or connecting) socket that does not block. Dropped, it is deregistered and closed.
#[derive(Debug)]
pub struct Stream {
    socket: AsyncFd<Arc<OwnedFd>>,
}

/// What a pipe got from a socket.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// So many bytes.
    Bytes(usize),
    /// The socket has nothing now: ask to be woken.
    Empty,
    /// The pipe takes no more before it is drained, or the socket has nothing: only an empty pipe tells them apart.
    Full,
    /// It does not go on this way: the stream ends here, or goes on behind an urgent mark. A read tells.
    Stopped,
}

impl Stream {
    /// Registers a socket with the event loop. Needs a tokio runtime.
    ///
    /// # Errors
    /// The event loop takes no more: no memory, or its limit of watched descriptors.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: socket::watch_connection(Arc::new(socket))? })
    }

    /// The socket, for its options: it may outlive the connection a little where somebody else holds it.
    pub fn socket(&self) -> &Arc<OwnedFd> {
        self.socket.get_ref()
    }

    /// Waits until the connection is there, and says why if it will not be.
    ///
    /// Asks the kernel for the error only where the event loop has seen one.
    ///
    /// # Errors
    /// What the network said.
    pub async fn connected(&self) -> io::Result<()> {
        let mut guard = self.socket.ready(Interest::WRITABLE | Interest::ERROR).await?;
        let ready = guard.ready();
        guard.retain_ready();
        if !ready.is_error() && !ready.is_write_closed() {
            return Ok(());
        }
        Err(self.take_error())
    }

    /// Ends when the network has taken the connection away (a reset, a peer that no longer answers), and says how.
    ///
    /// An end of stream is none: a client that has sent its request may close its half and wait for the answer.
    pub async fn broken(&self) -> io::Error {
        match self.socket.ready(Interest::ERROR).await {
            Ok(mut guard) => {
                guard.retain_ready();
                self.take_error()
            }
            Err(error) => error,
        }
    }

    fn take_error(&self) -> io::Error {
        match SockRef::from(&self.as_fd()).take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => io::ErrorKind::ConnectionReset.into(), // The error itself was met by a read or a write.
        }
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            poll_fn(|cx| self.poll_writable(cx)).await?;
            bytes = &bytes[self.send(bytes)?..];
        }
        Ok(())
    }

    /// Ready where a read may give something, an error or the end included.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.socket.poll_read_ready(cx))?.retain_ready();
        Poll::Ready(Ok(()))
    }

    /// Ready where a write may take something.
    pub(crate) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.socket.poll_write_ready(cx))?.retain_ready();
        Poll::Ready(Ok(()))
    }

    /// Reads what is there; 0 is the end of stream.
    pub(crate) fn poll_receive(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_readable(cx))?;
            if let Some(count) = self.receive(buffer)? {
                return Poll::Ready(Ok(count));
            }
        }
    }

    /// One read; `None` where nothing was there after all. A short one has emptied the socket.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut received = None;
        let outcome = self.socket.try_io(Interest::READABLE, |socket| {
            let (_, count) = retry_on_intr(|| rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()))?;
            received = Some(count);
            let emptied = 0 < count && count < buffer.len() && !self.is_split();
            if emptied { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        now_or_later(outcome)?;
        Ok(received)
    }

    /// Writes what the socket takes, maybe nothing. A part means that it is full.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        let outcome = self.socket.try_io(Interest::WRITABLE, |socket| {
            sent = retry_on_intr(|| rustix::net::send(socket, bytes, SendFlags::NOSIGNAL))?;
            if sent < bytes.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        now_or_later(outcome)?;
        Ok(sent)
    }

    /// Moves what is there into a pipe, as far as there is room.
    pub(crate) fn fill(&self, pipe: &mut Pipe) -> io::Result<Filled> {
        if pipe.room() == 0 {
            return Ok(Filled::Full);
        }
        let tells = pipe.is_empty();
        let outcome = self.socket.try_io(Interest::READABLE, |socket| match pipe.fill(socket) {
            Ok(0) => Ok(Filled::Stopped),
            Ok(count) => Ok(Filled::Bytes(count)),
            Err(Errno::AGAIN) if !tells => Ok(Filled::Full),
            Err(Errno::AGAIN) if self.is_split() => Ok(Filled::Stopped),
            Err(error) => Err(error.into()), // `AGAIN` clears the readiness.
        });
        Ok(now_or_later(outcome)?.unwrap_or(Filled::Empty))
    }

    /// Moves what a pipe holds into the socket, as much as that takes; nothing where it is full.
    pub(crate) fn drain(&self, pipe: &mut Pipe) -> io::Result<usize> {
        let outcome = self.socket.try_io(Interest::WRITABLE, |socket| match pipe.drain(socket)? {
            0 if !pipe.is_empty() => Err(io::ErrorKind::WriteZero.into()), // Never seen, and never to be spun on.
            count => Ok(count),
        });
        Ok(now_or_later(outcome)?.unwrap_or(0))
    }

    /// Tells the peer that nothing more will come.
    pub(crate) fn end(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(self, Shutdown::Write)?)
    }

    /// True where there was urgent data (or the peer has ended its half, and the next read says so).
    fn is_split(&self) -> bool {
        self.socket.try_io(Interest::PRIORITY, |_| Ok(())).is_ok()
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// `None` where the kernel says "not now".
fn now_or_later<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
