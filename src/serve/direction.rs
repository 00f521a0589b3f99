//! One direction of a connection: from one party's socket to the other's, copied or spliced.
//!
//! It copies first: into a scratch buffer of the thread, which is used within one poll only, and out at once. What the
//! receiver does not take is kept on the heap, and nothing more is read until it is gone: that is the back-pressure.
//! When [`BULKY_READS`] reads came back full, in one burst or in bursts with a short end, it splices: through a pipe that
//! it holds only while something is on the way, filled on while the receiver is not ready. When [`THIN_SPLICES`] in a row
//! moved little, it copies again: small messages cost two system calls less that way.
//!
//! What the receiver is to get before the sender's first byte, a preface, is the first load.
//!
//! So a direction that waits for its sender holds neither buffer nor pipe. What is in a pipe comes before the end of
//! stream; a pipe that still holds bytes when the connection breaks is closed with them.
//!
//! Both directions together are `relay`; the system calls are `stream` and `pipe`.

use std::io;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::serve::moving_stream::MovingDirection;
use crate::serve::pipe::Pipe;
use crate::serve::proxy_header::Preface;
use crate::serve::socket;
use crate::serve::stream::{Filled, Stream};
use crate::stats::{CloseReason, PROCESS};

/// How much is read at once.
pub(crate) const SCRATCH_BYTES: usize = 64 * 1024;

/// What a direction may move before other connections of the thread get their turn.
const BUDGET_BYTES: usize = 1024 * 1024;

/// Full reads after which a direction splices.
const BULKY_READS: i16 = 3;

/// Full reads that a direction copies after no pipe was to be had, before it asks again: 64 MiB.
const READS_AFTER_REFUSAL: i16 = 1_024;

/// A splice that moved less than this would have been cheaper as a copy.
const THIN_BYTES: usize = 16 * 1024;

/// Thin splices in a row after which a direction copies.
const THIN_SPLICES: u8 = 8;

/// Whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Party {
    Client,
    Backend,
}

/// A party's connection has failed.
#[derive(Debug)]
pub(crate) struct Broken {
    party: Party,
    error: io::Error,
}

impl Broken {
    pub(crate) fn new(party: Party, error: io::Error) -> Self {
        Self { party, error }
    }

    pub(crate) fn reason(&self) -> CloseReason {
        match Errno::from_io_error(&self.error) {
            Some(Errno::TIMEDOUT) => CloseReason::Timeout,
            Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::NETDOWN) => CloseReason::Unreachable,
            _ => match self.party {
                Party::Client => CloseReason::ClientAbort,
                Party::Backend => CloseReason::Reset,
            },
        }
    }
}

/// A party with its socket.
#[derive(Clone, Copy)]
pub(crate) struct End<'s> {
    pub(crate) party: Party,
    pub(crate) stream: &'s Stream,
}

impl End<'_> {
    pub(crate) fn broken(self, error: io::Error) -> Broken {
        Broken::new(self.party, error)
    }
}

/// Where a direction goes.
#[derive(Clone, Copy)]
pub(crate) struct Path<'s> {
    pub(crate) from: End<'s>,
    pub(crate) to: End<'s>,
    /// The other direction is done: the close that follows says it all.
    pub(crate) last: bool,
}

/// One direction of a connection.
#[derive(Default)]
pub(crate) struct Direction {
    phase: Phase,
    nagle: Nagle,
    /// Thin splices in a row.
    thin: u8,
    /// The last read was a full one.
    was_full: bool,
    /// Full reads without two short ones in a row; below 0: so many to go before counting begins.
    full: i16,
    load: Load,
    /// There while it holds something between polls.
    stalled: Option<Stalled>,
}

/// How far a direction is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// The sender may have more; it comes in small amounts, or is not known to come in bulk.
    #[default]
    Copying,
    /// The sender may have more, in bulk.
    Splicing,
    /// What is in the pipe goes first; then it copies.
    Leaving,
    /// The sender has said all; the receiver does not know yet.
    Ending,
    /// The receiver knows, too.
    Done,
}

/// What was taken from the sender, and not yet by the receiver.
#[derive(Default)]
enum Load {
    #[default]
    Nothing,
    /// What the receiver gets before the sender's first byte.
    Preface(Box<Preface>),
    /// What is left of a read.
    Rest(Box<Rest>),
    /// A pipe, empty only within a poll.
    Pipe(Pipe),
}

/// Counts a direction as one whose receiver takes nothing now, for as long as it is there.
struct Stalled(());

impl Stalled {
    fn begin() -> Self {
        PROCESS.stalled.increment();
        Self(())
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        PROCESS.stalled.decrement();
    }
}

/// What was read and could not be written yet.
struct Rest {
    bytes: Box<[u8]>,
    sent: usize,
    /// So many of the next bytes are a preface: no payload.
    preface: usize,
}

impl Rest {
    /// Notes what was sent, and tells how much of it was payload.
    fn note(&mut self, sent: usize) -> usize {
        let preface = sent.min(self.preface);
        self.preface -= preface;
        self.sent += sent;
        sent - preface
    }
}

/// Whether the receiver's socket holds small writes back until earlier ones are acknowledged (no TCP_NODELAY).
///
/// That harms no first write, and a short connection has no other: so the option waits for the second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Nagle {
    /// It never did: accepted sockets inherit TCP_NODELAY.
    #[default]
    Off,
    /// Nothing was written yet.
    Harmless,
    /// The next write could be held back.
    On,
}

impl Direction {
    /// To a socket that has TCP_NODELAY.
    pub(crate) fn to_client() -> Self {
        Self::default()
    }

    /// To a socket that does not have it yet.
    ///
    /// The preface goes before the first byte of the sender, together with what that has said by then. It counts as
    /// nothing that was moved.
    pub(crate) fn to_backend(preface: Option<Box<Preface>>) -> Self {
        let load = preface.map_or(Load::Nothing, Load::Preface);
        Self { nagle: Nagle::Harmless, load, ..Self::default() }
    }

    /// As it was in another process. A pipe comes first.
    ///
    /// # Errors
    /// The pipe is none, or holds something else.
    pub(crate) fn go_on(moving: MovingDirection) -> io::Result<Self> {
        let MovingDirection { phase, nagle, rest, preface, pipe, .. } = moving;
        let load = match pipe {
            Some(pipe) => Load::Pipe(Pipe::take_over(pipe)?),
            None if rest.is_empty() => Load::Nothing,
            None => Load::Rest(Box::new(Rest { bytes: rest.into(), sent: 0, preface })),
        };
        Ok(Self { phase, nagle, load, ..Self::default() })
    }

    /// What another process needs to go on with it, between two polls. So much has moved so far.
    ///
    /// # Errors
    /// No descriptor is left for copies.
    pub(crate) fn moving(&self, moved: u64) -> io::Result<MovingDirection> {
        let Self { phase, nagle, .. } = *self;
        let none = MovingDirection { phase, nagle, moved, ..MovingDirection::default() };
        Ok(match &self.load {
            Load::Nothing => none,
            Load::Preface(preface) => {
                let rest = preface.as_bytes().to_vec();
                MovingDirection { preface: rest.len(), rest, ..none }
            }
            Load::Rest(rest) => {
                MovingDirection { rest: rest.bytes[rest.sent..].to_vec(), preface: rest.preface, ..none }
            }
            Load::Pipe(pipe) => MovingDirection { pipe: Some(pipe.moving()?), ..none },
        })
    }

    pub(crate) fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// True where it waits for its sender alone, and so would notice its end.
    pub(crate) fn is_reading(&self) -> bool {
        matches!(self.phase, Phase::Copying | Phase::Splicing) && matches!(self.load, Load::Nothing)
    }

    /// Moves what can be moved now. Ready once it is done.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        path: Path<'_>,
        scratch: &mut [u8],
        moved: &mut u64,
    ) -> Poll<Result<(), Broken>> {
        let outcome = self.advance(cx, path, scratch, moved);
        self.let_go_of_pipe();
        self.note_stall();
        outcome
    }

    fn advance(
        &mut self,
        cx: &mut Context<'_>,
        path: Path<'_>,
        scratch: &mut [u8],
        moved: &mut u64,
    ) -> Poll<Result<(), Broken>> {
        let mut budget = BUDGET_BYTES;
        loop {
            let taken = ready!(match (self.phase, &self.load) {
                (Phase::Done, _) => return Poll::Ready(Ok(())),
                (_, Load::Preface(_)) => Poll::Ready(self.begin(cx, path, scratch, moved)),
                (_, Load::Rest(_)) => self.flush(cx, path.to, moved),
                (Phase::Ending, _) => Poll::Ready(self.end(path)),
                _ if budget == 0 => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                (Phase::Copying, _) => self.copy(cx, path, scratch, moved),
                (Phase::Splicing | Phase::Leaving, _) => self.splice(cx, path, moved),
            })?;
            budget = budget.saturating_sub(taken);
        }
    }

    // ---- The first bytes ----

    /// Sends the preface, and with it, in one write and so in one packet, what the sender has said by now. Where that is
    /// nothing it goes alone, at once: some senders wait for the receiver to speak first. Returns how much was read.
    fn begin(
        &mut self,
        cx: &mut Context<'_>,
        Path { from, to, .. }: Path<'_>,
        scratch: &mut [u8],
        moved: &mut u64,
    ) -> Result<usize, Broken> {
        let Load::Preface(preface) = std::mem::take(&mut self.load) else { return Ok(0) };
        let preface = preface.as_bytes();
        let (head, room) = scratch.split_at_mut(preface.len());
        head.copy_from_slice(preface);
        let count = match from.stream.poll_receive(cx, room) {
            Poll::Pending => 0, // The next read asks to be woken.
            Poll::Ready(Ok(0)) => {
                self.phase = Phase::Ending;
                0
            }
            Poll::Ready(Ok(count)) => count,
            Poll::Ready(Err(error)) => return Err(from.broken(error)),
        };
        let full = count == room.len();
        let bytes = &scratch[..preface.len() + count];
        let sent = self.send(to, bytes)?;
        *moved += sent.saturating_sub(preface.len()) as u64;
        if sent < bytes.len() {
            let preface = preface.len().saturating_sub(sent);
            self.load = Load::Rest(Box::new(Rest { bytes: bytes[sent..].into(), sent: 0, preface }));
        }
        if count > 0 {
            self.note_read(full);
        }
        Ok(count)
    }

    // ---- Copying ----

    /// Reads once and writes it. Returns how much was read.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        Path { from, to, .. }: Path<'_>,
        scratch: &mut [u8],
        moved: &mut u64,
    ) -> Poll<Result<usize, Broken>> {
        let count = ready!(from.stream.poll_receive(cx, scratch)).map_err(|error| from.broken(error))?;
        if count == 0 {
            self.phase = Phase::Ending;
            return Poll::Ready(Ok(0));
        }
        let bytes = &scratch[..count];
        let sent = self.send(to, bytes)?;
        *moved += sent as u64;
        if sent < count {
            self.load = Load::Rest(Box::new(Rest { bytes: bytes[sent..].into(), sent: 0, preface: 0 }));
        }
        self.note_read(count == scratch.len());
        Poll::Ready(Ok(count))
    }

    /// A full read counts; the short one that ends its burst does not speak against bulk, the next one does.
    fn note_read(&mut self, full: bool) {
        match (self.was_full, full) {
            (_, true) => self.full += 1,
            (false, false) => self.full = self.full.min(0),
            (true, false) => {}
        }
        self.was_full = full;
        if self.full == BULKY_READS {
            self.full = 0;
            self.thin = 0;
            self.phase = Phase::Splicing;
        }
    }

    /// Writes what is left of the last read. Returns 0, as nothing more was read.
    fn flush(&mut self, cx: &mut Context<'_>, to: End<'_>, moved: &mut u64) -> Poll<Result<usize, Broken>> {
        while let Load::Rest(mut rest) = std::mem::take(&mut self.load) {
            if to.stream.poll_writable(cx).is_pending() {
                self.load = Load::Rest(rest);
                return Poll::Pending;
            }
            let sent = self.send(to, &rest.bytes[rest.sent..])?;
            *moved += rest.note(sent) as u64;
            if rest.sent < rest.bytes.len() {
                self.load = Load::Rest(rest);
            }
        }
        Poll::Ready(Ok(0))
    }

    /// Writes what the socket takes. Returns how much that was.
    fn send(&mut self, to: End<'_>, bytes: &[u8]) -> Result<usize, Broken> {
        if self.nagle == Nagle::On {
            socket::send_small_at_once(to.stream).map_err(|error| to.broken(error))?;
            self.nagle = Nagle::Off;
        }
        let sent = to.stream.send(bytes).map_err(|error| to.broken(error))?;
        if self.nagle == Nagle::Harmless && sent > 0 {
            self.nagle = Nagle::On;
        }
        Ok(sent)
    }

    // ---- Splicing ----

    /// Fills the pipe once, then empties it once. Returns how much went in; ready where anything moved at all.
    fn splice(
        &mut self,
        cx: &mut Context<'_>,
        Path { from, to, .. }: Path<'_>,
        moved: &mut u64,
    ) -> Poll<Result<usize, Broken>> {
        let filled = self.fill(cx, from)?;
        let drained = self.drain(cx, to)?;
        *moved += drained as u64;
        if self.phase == Phase::Copying {
            self.let_go_of_pipe();
        }
        match filled {
            Poll::Ready(Filled::Bytes(count)) => Poll::Ready(Ok(count)),
            _ if drained > 0 || self.phase == Phase::Copying => Poll::Ready(Ok(0)),
            _ => Poll::Pending, // Each of the sockets that it waits for will wake it.
        }
    }

    /// Pending where nothing is there to be read. [`Filled::Full`] where it waits for the receiver alone.
    fn fill(&mut self, cx: &mut Context<'_>, from: End<'_>) -> Result<Poll<Filled>, Broken> {
        if self.phase == Phase::Leaving {
            return Ok(Poll::Ready(Filled::Full));
        }
        loop {
            if from.stream.poll_readable(cx).is_pending() {
                return Ok(Poll::Pending);
            }
            let Some(pipe) = self.pipe() else {
                self.copy_again(-READS_AFTER_REFUSAL);
                return Ok(Poll::Ready(Filled::Full));
            };
            let filled = from.stream.fill(pipe).map_err(|error| from.broken(error))?;
            match filled {
                Filled::Empty => continue, // Asks to be woken.
                Filled::Bytes(count) => self.note_splice(count),
                Filled::Stopped => self.copy_again(0),
                Filled::Full => {}
            }
            return Ok(Poll::Ready(filled));
        }
    }

    fn note_splice(&mut self, count: usize) {
        self.thin = if count < THIN_BYTES { self.thin + 1 } else { 0 };
        if self.thin == THIN_SPLICES {
            self.copy_again(0);
        }
    }

    /// Passes on what is in the pipe. 0 where the receiver takes nothing now, or there is nothing.
    fn drain(&mut self, cx: &mut Context<'_>, to: End<'_>) -> Result<usize, Broken> {
        let Load::Pipe(pipe) = &mut self.load else { return Ok(0) };
        let mut drained = 0;
        while drained == 0 && !pipe.is_empty() {
            if to.stream.poll_writable(cx).is_pending() {
                return Ok(0);
            }
            drained = to.stream.drain(pipe).map_err(|error| to.broken(error))?;
        }
        if self.phase == Phase::Leaving && pipe.is_empty() {
            self.phase = Phase::Copying;
        }
        Ok(drained)
    }

    /// The pipe that it has or gets.
    fn pipe(&mut self) -> Option<&mut Pipe> {
        if matches!(self.load, Load::Nothing) {
            self.load = Load::Pipe(Pipe::take()?);
        }
        match &mut self.load {
            Load::Pipe(pipe) => Some(pipe),
            _ => None,
        }
    }

    /// Copies once the pipe is empty, and splices after so many full reads less [`BULKY_READS`].
    fn copy_again(&mut self, full: i16) {
        self.full = full;
        let holds = matches!(&self.load, Load::Pipe(pipe) if !pipe.is_empty());
        self.phase = if holds { Phase::Leaving } else { Phase::Copying };
    }

    /// Between polls it holds no pipe without bytes, and one with bytes is known to be stuck.
    fn let_go_of_pipe(&mut self) {
        let Load::Pipe(pipe) = &mut self.load else { return };
        if !pipe.is_empty() {
            pipe.park();
        } else if let Load::Pipe(pipe) = std::mem::take(&mut self.load) {
            pipe.give_back();
        }
    }

    /// Between polls it holds only what its receiver does not take.
    fn note_stall(&mut self) {
        let holds = !matches!(self.load, Load::Nothing);
        if holds != self.stalled.is_some() {
            self.stalled = holds.then(Stalled::begin);
        }
    }

    // ---- Ending ----

    /// Passes the end of stream on. Returns 0, as nothing more was read.
    fn end(&mut self, Path { to, last, .. }: Path<'_>) -> Result<usize, Broken> {
        if !last {
            to.stream.end().map_err(|error| to.broken(error))?;
        }
        self.phase = Phase::Done;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t126_given_a_preface_that_goes_out_in_parts_when_noted_then_only_what_is_behind_it_is_payload() {
        let mut rest = Rest { bytes: [0; 10].into(), sent: 0, preface: 4 };

        let payload = [3, 0, 3, 4].map(|sent| rest.note(sent));

        assert_eq!(payload, [0, 0, 2, 4]);
        assert_eq!((rest.sent, rest.preface), (10, 0));
    }

    fn after_reads(full: &[bool]) -> Direction {
        let mut direction = Direction::default();
        for full in full {
            direction.note_read(*full);
        }
        direction
    }

    #[test]
    fn given_full_reads_when_three_came_without_two_short_ones_in_a_row_then_it_splices() {
        assert_eq!(after_reads(&[true, true]).phase, Phase::Copying);
        assert_eq!(after_reads(&[true, true, false, false, true, true]).phase, Phase::Copying);
        assert_eq!(after_reads(&[true, true, true]).phase, Phase::Splicing);
        assert_eq!(after_reads(&[true, false, true, false, true]).phase, Phase::Splicing);
    }

    #[test]
    fn given_thin_splices_when_eight_came_in_a_row_then_it_copies() {
        let mut direction = after_reads(&[true, true, true]);

        (1..THIN_SPLICES).for_each(|_| direction.note_splice(THIN_BYTES - 1));
        direction.note_splice(THIN_BYTES);
        (1..THIN_SPLICES).for_each(|_| direction.note_splice(1));
        assert_eq!(direction.phase, Phase::Splicing);
        direction.note_splice(1);

        assert_eq!(direction.phase, Phase::Copying);
    }

    #[test]
    fn given_a_direction_without_a_pipe_when_it_stays_bulky_then_it_asks_again_after_64_mib() {
        let mut direction = after_reads(&[true, true, true]);

        direction.copy_again(-READS_AFTER_REFUSAL);

        let reads = (1..).find(|_| {
            direction.note_read(false);
            direction.note_read(true);
            direction.note_read(true);
            direction.note_read(true);
            direction.phase == Phase::Splicing
        });
        assert_eq!(reads, Some(i32::from(READS_AFTER_REFUSAL) / 3 + 2));
    }

    #[test]
    fn f11_given_a_direction_that_holds_bytes_when_its_receiver_takes_them_then_it_is_stalled_no_more() {
        let mut direction = Direction::default();
        direction.note_stall();
        assert!(direction.stalled.is_none());

        direction.load = Load::Rest(Box::new(Rest { bytes: [1].into(), sent: 0, preface: 0 }));
        direction.note_stall();
        direction.note_stall();
        assert!(direction.stalled.is_some() && PROCESS.stalled.get() > 0);

        direction.load = Load::Nothing;
        direction.note_stall();
        assert!(direction.stalled.is_none());
    }

    #[test]
    fn given_what_broke_when_told_then_the_word_says_who_or_what_it_was() {
        let reason = |party, errno: Errno| Broken::new(party, errno.into()).reason();

        assert_eq!(reason(Party::Client, Errno::CONNRESET), CloseReason::ClientAbort);
        assert_eq!(reason(Party::Client, Errno::PIPE), CloseReason::ClientAbort);
        assert_eq!(reason(Party::Backend, Errno::PIPE), CloseReason::Reset);
        assert_eq!(reason(Party::Client, Errno::TIMEDOUT), CloseReason::Timeout);
        assert_eq!(reason(Party::Backend, Errno::HOSTUNREACH), CloseReason::Unreachable);
    }
}
