//! An established TCP connection on its way to another process: what `relay` and `direction` have of it, as plain values with
//! descriptors.
//!
//! Bytes in user memory travel as they are. Bytes in a pipe stay where they are, and the pipe travels: reading it out would
//! need memory for it here and there, and whoever goes on after a failure would have to put it back. Which bytes the kernel
//! holds in the sockets is nobody's matter: the sockets are the same.
//!
//! How workers come to a standstill is `standstill`; how a connection is written down is in `handover`.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::name::ServicePortName;
use crate::serve::access::DraftRecord;
use crate::serve::direction::{Nagle, Phase};
use crate::serve::limits::{LimitOptions, Lived};
use crate::serve::mailbox::Mailbox;
use crate::serve::moving_flow::{PATIENCE, Unanswered, answer};
use crate::serve::standstill;
use crate::stats::Entry;

/// A connection. Dropped, its descriptors are closed; nothing else happens to the sockets, which another process has, too.
#[derive(Debug)]
pub(crate) struct MovingStream {
    pub(crate) client: OwnedFd,
    pub(crate) upstream: OwnedFd,
    pub(crate) port: ServicePortName,
    pub(crate) backend: SocketAddr,
    pub(crate) entry: Entry,
    /// Towards the backend.
    pub(crate) up: MovingDirection,
    /// Towards the client.
    pub(crate) down: MovingDirection,
    pub(crate) ends: MovingEnds,
    pub(crate) draft: Option<DraftRecord>,
}

/// What may end a connection though nothing is wrong with it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MovingEnds {
    /// The client ended before anybody had said anything.
    pub(crate) mute: bool,
    /// Those that it has, where its Service is not there any more to say so.
    pub(crate) limits: LimitOptions,
    /// How far it is with them; `None` where it has none.
    pub(crate) lived: Option<Lived>,
    /// How long nothing has moved since one side has ended, if that was a while ago.
    pub(crate) half_silent: Option<Duration>,
    /// When it ends as its endpoint has left, if that was said.
    pub(crate) leaves_in: Option<Duration>,
}

/// One direction.
#[derive(Debug, Default)]
pub(crate) struct MovingDirection {
    pub(crate) phase: Phase,
    pub(crate) nagle: Nagle,
    /// Bytes that the receiver has taken so far.
    pub(crate) moved: u64,
    /// What the sender has given and the receiver has yet to take, in memory,
    pub(crate) rest: Vec<u8>,
    /// or in a pipe. Never both.
    pub(crate) pipe: Option<MovingPipe>,
    /// So many of the first bytes in memory are a preface: no payload.
    pub(crate) preface: usize,
}

/// The workers of a process, for whoever has them come to a standstill. Keeps none of them running.
#[derive(Clone, Debug, Default)]
pub(crate) struct WorkerLines(Vec<Arc<Mailbox>>);

impl WorkerLines {
    pub(super) fn new(workers: Vec<Arc<Mailbox>>) -> Self {
        Self(workers)
    }

    /// Has all connections come to a standstill, but for those that are on their way to a backend, and lets nobody in. How
    /// many stand still.
    ///
    /// # Errors
    /// A worker does not answer. Then all are to go on, with [`go_on`](Self::go_on).
    pub(crate) fn rest(&self) -> Result<usize, Unanswered> {
        let (told, counts) = channel();
        for line in &self.0 {
            let told = told.clone();
            line.order(move |worker| standstill::rest(worker, move |count| _ = told.send(count)));
        }
        drop(told);
        self.0.iter().map(|_| answer(counts.recv_timeout(PATIENCE))).sum()
    }

    /// What those that stand still have, about so many at once; while they are written down, the next ones are asked. Who has
    /// no descriptor left for copies is left out, and goes on.
    ///
    /// An error is the last there is: a worker does not answer, and may tell of some later that nobody will hear of. So
    /// nothing of it may be another process's then.
    pub(crate) fn streams(&self, at_once: usize) -> impl Iterator<Item = Result<Vec<MovingStream>, Unanswered>> {
        let mut lines = self.0.iter();
        let mut line = lines.next();
        let mut coming = line.map(|line| ask(line, at_once));
        std::iter::from_fn(move || {
            loop {
                let (streams, is_last) = match coming.take()?.recv_timeout(PATIENCE) {
                    Ok(told) => told,
                    Err(RecvTimeoutError::Disconnected) => (Vec::new(), true), // It has ended.
                    Err(RecvTimeoutError::Timeout) => return Some(Err(Unanswered)),
                };
                if is_last {
                    line = lines.next();
                }
                coming = line.map(|line| ask(line, at_once));
                if !streams.is_empty() {
                    return Some(Ok(streams));
                }
            }
        })
    }

    /// Has all go on as before.
    pub(crate) fn go_on(&self) {
        self.0.iter().for_each(|line| line.order(|_| standstill::go_on()));
    }

    /// Has those that have told of what they have leave, which is another process's now, and the others go on. Nobody is let
    /// in any more.
    ///
    /// # Errors
    /// A worker does not answer; it will do so when it can.
    pub(crate) fn leave(&self) -> Result<(), Unanswered> {
        let (told, left) = channel();
        for line in &self.0 {
            let told = told.clone();
            line.order(move |worker| standstill::leave(worker, move || _ = told.send(())));
        }
        drop(told);
        self.0.iter().try_for_each(|_| answer(left.recv_timeout(PATIENCE)))
    }
}

/// Asks a worker what the next have, and whether these are the last.
fn ask(line: &Mailbox, at_once: usize) -> Receiver<(Vec<MovingStream>, bool)> {
    let (told, streams) = channel();
    line.order(move |worker| {
        standstill::tell(worker, at_once, move |streams, is_last| _ = told.send((streams, is_last)));
    });
    streams
}

/// A pipe and how much is in it.
#[derive(Debug)]
pub(crate) struct MovingPipe {
    pub(crate) read: OwnedFd,
    pub(crate) write: OwnedFd,
    pub(crate) held: u32,
}
