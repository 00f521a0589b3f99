//! The side that hands over: what it says, in which order, and when it is too late to go on as before.
//!
//! Blocking, on a thread of its own (`host`). The control task stands still meanwhile: a listener that was closed or parked
//! under way would be another one than was told. Connections and flows stand still from the last moment on that does, and for
//! as long as the successor takes to read what is said of them.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::warn;

use super::exporter::{self, Exporter};
use super::introduction::Introduction;
use super::late::{LateCounts, Ledger};
use super::office::Office;
use super::parcel::{Kind, Parcel};
use super::post::{Post, PostError};
use super::refusal::Refusal;
use super::sockets;
use super::source::{SourceCounts, SourceSaid};
use crate::serve::estate::Estate;
use crate::serve::moving_flow::Unanswered;
use crate::serve::passed::Passed;

/// How long the successor may take for all listeners. Traffic flows meanwhile, but no change is followed.
const LENDING_LIMIT: Duration = Duration::from_secs(10);

/// What the control task is asked for.
#[derive(Debug)]
pub(crate) enum Ask {
    /// All that it has.
    Lend(Handing),
    /// To count what a process has counted that was taken over from.
    Count(LateCounts),
}

/// To lend what it has: copies of its sockets, and to change nothing until the end is told.
///
/// The end is either a `oneshot::Sender`, to be told once everything is closed here, or nothing: then all goes on as before.
#[derive(Debug)]
pub(crate) struct Handing {
    /// What there is.
    pub(crate) lent: oneshot::Sender<io::Result<Lent>>,
    /// How it ends.
    pub(crate) end: oneshot::Receiver<oneshot::Sender<()>>,
}

/// What the control task has, as it stands still.
#[derive(Debug)]
pub(crate) struct Lent {
    /// Copies of its sockets.
    pub(crate) passed: Vec<Passed>,
    /// The same of health ports.
    pub(crate) health_ports: Vec<Passed>,
    /// What runs.
    pub(crate) estate: Estate,
    /// What was counted of the source.
    pub(crate) source: SourceCounts,
}

/// How much was handed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) listeners: usize,
    /// Connections that go on there.
    pub(super) streams: usize,
    /// UDP flows, likewise.
    pub(super) flows: usize,
}

/// The other end of a [`Handing`]. Dropped, everything goes on as before.
#[derive(Debug)]
pub(super) struct Loan {
    lent: Lent,
    /// What was said of the source.
    source_said: SourceSaid,
    /// What stands still here; `None` before it does, and where the successor does not know what to do with it.
    frozen: Option<Exporter>,
    end: oneshot::Sender<oneshot::Sender<()>>,
}

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub(super) enum GiveError {
    /// The relay itself cannot do it now.
    #[error("its sockets cannot be handed over")]
    Lend(#[source] io::Error),
    /// It stops, or has stopped.
    #[error("it is about to end")]
    Ending,
    /// What runs does not come to a standstill.
    #[error("its connections cannot be handed over")]
    Standstill(#[from] Unanswered),
    /// The conversation broke off.
    #[error("it broke off at {at:?}")]
    Post {
        /// What was to be said or heard.
        at: Kind,
        /// Why.
        source: PostError,
    },
    /// The successor will not.
    #[error("the successor will not: {}", .0.why)]
    Refused(Refusal),
    /// It says what it should not.
    #[error("the successor says {0:?} out of turn")]
    OutOfTurn(Kind),
}

impl Loan {
    /// Asks the control task, and waits for its answer. It stands still from then on.
    pub(super) fn take(control: impl Fn(Ask) -> bool) -> Result<Self, GiveError> {
        let (lent, is_lent) = oneshot::channel();
        let (end, ends) = oneshot::channel();
        if !control(Ask::Lend(Handing { lent, end: ends })) {
            return Err(GiveError::Ending);
        }
        let lent = is_lent.blocking_recv().map_err(|_| GiveError::Ending)?.map_err(GiveError::Lend)?;
        Ok(Self { lent, source_said: SourceSaid::default(), frozen: None, end })
    }

    /// Offers everything, and returns once it is the successor's. Nothing stands still here for longer than `standstill` by that.
    /// Where it fails, it is ours as before, once this is dropped.
    pub(super) fn offer(
        &mut self,
        post: &Post,
        to: &Introduction,
        office: &Office,
        admin: &BTreeMap<SocketAddr, Arc<OwnedFd>>,
        standstill: Duration,
    ) -> Result<(), GiveError> {
        let mut talk = Talk { post, to, until: Instant::now() + LENDING_LIMIT };
        for parcel in office.parcels(admin).map_err(GiveError::Lend)? {
            talk.say(parcel)?;
        }
        let health_ports = sockets::parcels(Kind::HealthPort, &self.lent.health_ports);
        for parcel in sockets::parcels(Kind::Listener, &self.lent.passed).chain(health_ports) {
            talk.say(parcel.map_err(GiveError::Lend)?)?;
        }
        self.source_said = (&self.lent.source).into();
        talk.say(self.source_said.parcel())?;
        self.say_what_moves(&mut talk, standstill)?;
        talk.say(Parcel::new(Kind::End, &()))?;
        talk.agree()
    }

    /// Has traffic stand still and says what there is of it. Where the successor would not know what to do with a part of
    /// it, all of it comes to its end here: what is told of is let go of, whether it was understood or not.
    fn say_what_moves(&mut self, talk: &mut Talk<'_>, standstill: Duration) -> Result<(), GiveError> {
        if !Kind::ALL.iter().filter(|kind| kind.moves()).all(|kind| talk.to.understands(*kind)) {
            return Ok(());
        }
        let now = Instant::now();
        exporter::pins(&self.lent.estate, now).try_for_each(|parcel| talk.say(parcel))?;
        talk.until = Instant::now() + standstill;
        let frozen = self.frozen.insert(Exporter::freeze(self.lent.estate.clone(), now)?);
        frozen.parcels().try_for_each(|parcel| talk.say(parcel?))
    }

    /// It is theirs: lets go of what moves, has everything else closed here, and returns once it is. How much it was,
    /// and what goes on counting; `None` where nobody was told of counters.
    ///
    /// `say_so` is called as soon as the other process may let clients in: they wait until then, and to close ten thousand
    /// listeners takes a while.
    pub(super) fn release(self, say_so: impl FnOnce()) -> (Moved, Option<Ledger>) {
        let Self { lent: Lent { passed, health_ports, estate, source }, source_said, frozen, end } = self;
        let counted = frozen.as_ref().map(Exporter::take_counted);
        let (streams, flows) = frozen.as_ref().map(Exporter::told).unwrap_or_default();
        let moved = Moved { listeners: passed.len(), streams, flows };
        let mut say_so = Some(say_so);
        if looks_away(frozen) {
            say_so.take().into_iter().for_each(|say_so| say_so());
        }
        let ledger = counted.map(|counted| Ledger::new(&estate, source.contact, counted, source_said));
        drop((passed, health_ports, estate));
        let (done, is_done) = oneshot::channel();
        if end.send(done).is_ok() {
            let _ = is_done.blocking_recv(); // An error means that control is gone, and what it had with it.
        }
        say_so.into_iter().for_each(|say_so| say_so());
        (moved, ledger)
    }
}

/// Lets go of what moves. False where threads may look at listeners still, until these are closed.
fn looks_away(frozen: Option<Exporter>) -> bool {
    match frozen.map(Exporter::release) {
        Some(Ok(())) => true,
        Some(Err(error)) => {
            warn!(%error, "what was handed over is let go of late"); // It cannot be taken back any more.
            false
        }
        None => false,
    }
}

/// What is said and heard, up to a time: however slow the other side is, it cannot have this one wait for longer.
struct Talk<'a> {
    post: &'a Post,
    to: &'a Introduction,
    until: Instant,
}

impl Talk<'_> {
    /// Says it, where the other side knows what it means.
    fn say(&self, parcel: Parcel) -> Result<(), GiveError> {
        let at = parcel.kind;
        if !self.to.understands(at) {
            return Ok(());
        }
        self.left().and_then(|left| self.post.send(parcel, left)).map_err(|source| {
            let said = matches!(source, PostError::Closed).then(|| last_word(self.post)).flatten();
            said.unwrap_or(GiveError::Post { at, source })
        })
    }

    fn hear(&self, wanted: Kind) -> Result<(), GiveError> {
        let heard = self.left().and_then(|left| self.post.receive(left));
        let parcel = heard.map_err(|source| GiveError::Post { at: wanted, source })?;
        match parcel.kind {
            kind if kind == wanted => Ok(()),
            Kind::Refused => Err(GiveError::Refused(Refusal::of(&parcel))),
            kind => Err(GiveError::OutOfTurn(kind)),
        }
    }

    /// All was said: has the other side take it, or be certain that it does not.
    fn agree(&self) -> Result<(), GiveError> {
        self.hear(Kind::Ready)?;
        self.say(Parcel::new(Kind::Commit, &()))?;
        self.hear(Kind::Taken).or_else(|error| {
            // It may have said so in this very moment. From here on it is told that nobody hears, and then why.
            match self.post.settle().map(|parcel| parcel.kind) {
                Some(Kind::Taken) => Ok(()),
                _ => Err(error),
            }
        })
    }

    /// A message that could go at once is too late as well: many of them would make any time long.
    fn left(&self) -> Result<Duration, PostError> {
        match self.until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(PostError::Limit),
            left => Ok(left),
        }
    }
}

/// Why the other side has hung up, where it has said so.
fn last_word(post: &Post) -> Option<GiveError> {
    let said = post.settle().filter(|parcel| parcel.kind == Kind::Refused)?;
    Some(GiveError::Refused(Refusal::of(&said)))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn f25_given_a_successor_that_reads_one_message_now_and_then_when_many_are_said_then_it_ends_in_time() {
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (own, theirs) = pair.expect("descriptors are left");
        let (post, theirs) = (Post::new(own), Post::new(theirs));
        let pace = Duration::from_millis(50);
        let slow = thread::spawn(move || {
            while theirs.receive(pace * 100).is_ok() {
                thread::sleep(pace)
            }
        }); // Its pace.
        let began = Instant::now();
        let limit = 6 * pace;

        let to = Introduction::own();
        let talk = Talk { post: &post, to: &to, until: began + limit };
        let mut messages = std::iter::repeat_with(|| Parcel::new(Kind::Pins, &"x".repeat(60_000)));
        let failed = messages.find_map(|message| talk.say(message).err()).expect("it ends");

        assert!(matches!(failed, GiveError::Post { at: Kind::Pins, source: PostError::Limit }), "{failed}");
        assert!((limit..100 * pace).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert!(matches!(talk.hear(Kind::Ready), Err(GiveError::Post { source: PostError::Limit, .. })));
        drop(post);
        slow.join().expect("no panic");
    }
}
