//! A TCP connection's socket as its worker knows it: waiting for it, and the calls that a relay makes.
//!
//! It is registered once, and edges are all that the loop tells; so each call here says whether it has emptied or
//! filled the socket, and where that shows in the result, no further call is made only to hear "not now".
//!
//! *Urgent data* splits a stream: a read ends before the mark, and a splice does not come past it, though more is
//! queued behind. The loop tells of it (`PRI`), and then a short read is no sign of an empty socket. The
//! urgent byte itself is not passed on, as with any program that reads the stream alone.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use socket2::SockRef;

use crate::serve::pipe::Pipe;
use crate::serve::reactor::{Party, READABLE, Ready, Unwatched, WRITABLE, Watched};
use crate::serve::worker;

/// A connected (or connecting) socket that does not block. Lives on the worker that it was made on; dropped, it is closed.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: Watched,
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
    /// Registers a socket with the worker of this thread.
    ///
    /// # Errors
    /// [`Unwatched`], with the socket.
    pub(crate) fn new(socket: OwnedFd) -> Result<Self, Unwatched> {
        Ok(Self { socket: worker::watch(socket)? })
    }

    /// Waits until the connection is there, and says why if it will not be.
    ///
    /// Asks the kernel for the error only where the event loop has seen one.
    ///
    /// # Errors
    /// What the network said.
    pub(crate) async fn connected(&self) -> io::Result<()> {
        let ready = poll_fn(|cx| self.socket.poll_ready(cx, WRITABLE)).await;
        if ready == Ready::OUT { Ok(()) } else { Err(self.take_error()) }
    }

    /// Ends when the network has taken the connection away (a reset, a peer that no longer answers), and says how.
    ///
    /// An end of stream is none: a client that has sent its request may close its half and wait for the answer.
    pub(crate) async fn broken(&self) -> io::Error {
        poll_fn(|cx| self.socket.poll_ready(cx, Ready::ERR)).await;
        self.take_error()
    }

    /// The event loop tells of it no more: another process has the socket from now on.
    pub(crate) fn forget(&self) {
        self.socket.forget();
    }

    /// Has its age counted, for who is told of connections that last.
    pub(crate) fn count_age(&self, party: Party) {
        self.socket.count_age(party);
    }

    fn take_error(&self) -> io::Error {
        match SockRef::from(&self.as_fd()).take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => io::ErrorKind::ConnectionReset.into(), // The error itself was met by a read or a write.
        }
    }

    /// Ready where a read may give something, an error or the end included.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_ready(cx, READABLE).map(drop)
    }

    /// Ready where a write may take something.
    pub(crate) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_ready(cx, WRITABLE).map(drop)
    }

    /// Reads what is there; 0 is the end of stream.
    pub(crate) fn poll_receive(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_readable(cx));
            if let Some(count) = self.receive(buffer)? {
                return Poll::Ready(Ok(count));
            }
        }
    }

    /// Looks at what is there and leaves it where it is; 0 is the end of stream.
    pub(crate) fn poll_peek(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_readable(cx));
            let shown = self.socket.attempt(READABLE, |socket| {
                let (_, count) = retry_on_intr(|| rustix::net::recv(socket, &mut *buffer, RecvFlags::PEEK))?;
                Ok(count)
            })?;
            if let Some(count) = shown {
                return Poll::Ready(Ok(count));
            }
        }
    }

    /// Takes what a peek has shown, into the place where it stands.
    ///
    /// # Errors
    /// The connection is gone.
    pub(crate) fn take_shown(&self, mut shown: &mut [u8]) -> io::Result<()> {
        while !shown.is_empty() {
            match self.receive(shown)? {
                Some(count) if count > 0 => shown = &mut shown[count..],
                _ => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Ok(())
    }

    /// One read; `None` where nothing was there after all. A short one has emptied the socket.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let received = self.socket.attempt(READABLE, |socket| {
            let (_, count) = retry_on_intr(|| rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()))?;
            Ok(count)
        })?;
        if received.is_some_and(|count| 0 < count && count < buffer.len()) && !self.is_split() {
            self.socket.clear(Ready::IN);
        }
        Ok(received)
    }

    /// Writes what the socket takes, maybe nothing. A part means that it is full.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self
            .socket
            .attempt(WRITABLE, |socket| retry_on_intr(|| rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)))?;
        let sent = sent.unwrap_or(0);
        if sent < bytes.len() {
            self.socket.clear(Ready::OUT);
        }
        Ok(sent)
    }

    /// Moves what is there into a pipe, as far as there is room.
    pub(crate) fn fill(&self, pipe: &mut Pipe) -> io::Result<Filled> {
        if pipe.room() == 0 {
            return Ok(Filled::Full);
        }
        let tells = pipe.is_empty();
        let filled = self.socket.attempt(READABLE, |socket| match pipe.fill(socket) {
            Ok(0) => Ok(Filled::Stopped),
            Ok(count) => Ok(Filled::Bytes(count)),
            Err(Errno::AGAIN) if !tells => Ok(Filled::Full),
            Err(Errno::AGAIN) if self.is_split() => Ok(Filled::Stopped),
            Err(error) => Err(error),
        })?;
        Ok(filled.unwrap_or(Filled::Empty))
    }

    /// Moves what a pipe holds into the socket, as much as that takes; nothing where it is full.
    pub(crate) fn drain(&self, pipe: &mut Pipe) -> io::Result<usize> {
        match self.socket.attempt(WRITABLE, |socket| pipe.drain(socket))? {
            Some(0) if !pipe.is_empty() => Err(io::ErrorKind::WriteZero.into()), // Never seen, and never to be spun on.
            drained => Ok(drained.unwrap_or(0)),
        }
    }

    /// Tells the peer that nothing more will come.
    pub(crate) fn end(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(self, Shutdown::Write)?)
    }

    /// True where there was urgent data (or the peer has ended its half, and the next read says so).
    fn is_split(&self) -> bool {
        self.socket.ready().intersects(Ready::PRI | Ready::RDHUP | Ready::HUP | Ready::ERR)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
