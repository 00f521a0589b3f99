//! A UDP flow on its way to another process, and the shards as whoever moves flows sees them.
//!
//! What a flow is, is `flow`; a shard that rests and tells is `shard`; how a flow is written down is in `handover`.

use std::hash::BuildHasher;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::name::{ListenKey, ServicePortName};
use crate::serve::access::DraftRecord;
use crate::serve::doubt::DoubtRecord;
use crate::serve::flow::{Choice, FlowState};
use crate::serve::shard::Command;
use crate::stats::{DropReason, Entry};

/// A flow as a plain value, with its socket. Dropped, a descriptor of that is closed, and nothing else.
#[derive(Debug)]
pub(crate) struct MovingFlow {
    /// The listener that the client sends to.
    pub(crate) listen: ListenKey,
    /// Which of the listener's sockets its datagrams come to: there is one for each shard that shares it.
    pub(crate) place: usize,
    pub(crate) client: SocketAddr,
    pub(crate) port: ServicePortName,
    pub(crate) backend: SocketAddr,
    pub(crate) entry: Entry,
    pub(crate) state: FlowState,
    /// How long neither side has spoken, in whole seconds.
    pub(crate) silent: Duration,
    /// Its endpoint has left.
    pub(crate) parting: bool,
    pub(crate) draft: Option<DraftRecord>,
    /// What the first answer is to tell, if anything.
    pub(crate) doubt: Option<DoubtRecord>,
    /// Connected to the backend.
    pub(crate) socket: OwnedFd,
}

/// A flow that comes from another process, and the backend that it has here.
#[derive(Debug)]
pub(crate) struct ComingFlow {
    pub(crate) flow: MovingFlow,
    pub(crate) choice: Choice,
}

/// What the kernel has dropped at a listener's socket, as far as it is counted: what is dropped until another process
/// serves is counted there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MovingLosses {
    pub(crate) listen: ListenKey,
    /// As in [`MovingFlow`].
    pub(crate) place: usize,
    /// The kernel's own number.
    pub(crate) counted: u32,
    /// Why more may be dropped.
    pub(crate) reason: DropReason,
}

/// The shards of a process, for whoever has them rest. Keeps none of them running.
#[derive(Clone, Debug, Default)]
pub(crate) struct ShardLines(Vec<Line>);

#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) commands: Weak<Sender<Command>>,
    pub(super) wake: Arc<OwnedFd>,
}

/// A thread has not answered for so long that it never may.
#[derive(Debug, thiserror::Error)]
#[error("hand-over: a thread that carries traffic does not answer")]
pub(crate) struct Unanswered;

/// How long a thread may be busy with something else. It answers within a turn of its loop.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Which shard has a listener's first socket. The others have the next ones, in turn.
pub(super) fn first_shard(key: ListenKey, shards: usize) -> usize {
    foldhash::fast::FixedState::default().hash_one(key) as usize % shards.max(1)
}

/// Which of a listener's sockets a shard has.
fn place(shard: usize, key: ListenKey, shards: usize) -> usize {
    (shard + shards - first_shard(key, shards)) % shards.max(1)
}

/// Which shard has the socket at this place.
fn shard_at(place: usize, key: ListenKey, shards: usize) -> usize {
    (first_shard(key, shards) + place % shards.max(1)) % shards.max(1)
}

impl ShardLines {
    pub(super) fn new(lines: impl Iterator<Item = Line>) -> Self {
        Self(lines.collect())
    }

    /// Has all shards rest: from the return on none of them receives or sends anything, nor closes a flow for its age.
    ///
    /// # Errors
    /// One does not answer. Then they are to go on, with [`go_on`](Self::go_on).
    pub(crate) fn rest(&self) -> Result<(), Unanswered> {
        self.have_all(Command::Rest)
    }

    /// All flows of shards that rest, the longest silent first in each, so many of them at once.
    ///
    /// After an error nothing of it may be another process's: a shard that answers later tells of some that nobody will hear of.
    pub(crate) fn flows(&self, at_once: usize) -> impl Iterator<Item = Result<Vec<MovingFlow>, Unanswered>> {
        let next = move |(number, line): (usize, Line)| {
            let shards = self.0.len();
            std::iter::from_fn(move || {
                let (told, flows) = channel();
                line.order(Command::TellFlows(at_once, told)).then_some(())?;
                let mut flows = match flows.recv_timeout(PATIENCE) {
                    Ok(flows) if !flows.is_empty() => flows,
                    Ok(_) | Err(RecvTimeoutError::Disconnected) => return None,
                    Err(RecvTimeoutError::Timeout) => return Some(Err(Unanswered)),
                };
                flows.iter_mut().for_each(|flow| flow.place = place(number, flow.listen, shards));
                Some(Ok(flows))
            })
        };
        self.0.iter().cloned().enumerate().flat_map(next)
    }

    /// What has been dropped at sockets of shards that rest, where anything was or more is to be.
    ///
    /// # Errors
    /// One does not answer.
    pub(crate) fn losses(&self) -> Result<Vec<MovingLosses>, Unanswered> {
        let mut all = Vec::new();
        for (number, line) in self.0.iter().enumerate() {
            let (tell, told) = channel();
            if line.order(Command::TellLosses(tell)) {
                let losses: Vec<MovingLosses> = answer(told.recv_timeout(PATIENCE))?;
                let place_of = |listen| place(number, listen, self.0.len());
                all.extend(losses.into_iter().map(|one| MovingLosses { place: place_of(one.listen), ..one }));
            }
        }
        Ok(all)
    }

    /// Has shards count on from there: of listeners that are added later, and that are not among them, nothing is
    /// counted yet. To be called once.
    pub(crate) fn go_on_from(&self, losses: Vec<MovingLosses>) {
        let shards = self.0.len();
        let mut shares: Vec<_> = self.0.iter().map(|_| Vec::new()).collect();
        for one in losses {
            if let Some(share) = shares.get_mut(shard_at(one.place, one.listen, shards)) {
                share.push(one);
            }
        }
        self.0.iter().zip(shares).for_each(|(line, share)| _ = line.order(Command::GoOnFrom(share)));
    }

    /// Has shards that rest go on as before.
    pub(crate) fn go_on(&self) {
        self.0.iter().for_each(|line| _ = line.order(Command::GoOn));
    }

    /// Has shards that rest let go of the flows that they have told of, and of all listeners: they are another process's.
    ///
    /// # Errors
    /// One does not answer; it will do so when it can.
    pub(crate) fn leave(&self) -> Result<(), Unanswered> {
        self.have_all(Command::Leave)
    }

    fn have_all(&self, command: impl Fn(Sender<()>) -> Command) -> Result<(), Unanswered> {
        let (done, answers) = channel();
        let asked = self.0.iter().filter(|line| line.order(command(done.clone()))).count();
        drop(done);
        (0..asked).try_for_each(|_| answer(answers.recv_timeout(PATIENCE)))
    }

    /// Gives flows to the shards that serve, or are going to serve, their listeners' sockets. In the order of the calls on
    /// `UdpShards`: a listener that is added later has its flows before its first datagram.
    pub(crate) fn take_over(&self, flows: Vec<ComingFlow>) {
        let shards = self.0.len();
        let mut shares: Vec<_> = self.0.iter().map(|_| Vec::new()).collect();
        for coming in flows {
            let shard = shard_at(coming.flow.place, coming.flow.listen, shards);
            if let Some(share) = shares.get_mut(shard) {
                share.push(coming);
            }
        }
        for (line, share) in self.0.iter().zip(shares).filter(|(_, share)| !share.is_empty()) {
            line.order(Command::TakeOver(share));
        }
    }

    /// Closes the sockets of flows whose listener nobody has added. How many flows were taken over.
    pub(crate) fn forget_the_rest(&self) -> usize {
        let (told, counts) = channel();
        self.0.iter().for_each(|line| _ = line.order(Command::ForgetTheRest(told.clone())));
        drop(told);
        self.0.iter().map_while(|_| counts.recv_timeout(PATIENCE).ok()).sum()
    }
}

impl Line {
    /// False where the shard has ended.
    fn order(&self, command: Command) -> bool {
        let sent = self.commands.upgrade().is_some_and(|commands| commands.send(command).is_ok());
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes()); // Fails only where it is awake anyway.
        sent
    }
}

/// Who has ended has nothing more to say.
pub(crate) fn answer<T: Default>(received: Result<T, RecvTimeoutError>) -> Result<T, Unanswered> {
    match received {
        Ok(answer) => Ok(answer),
        Err(RecvTimeoutError::Disconnected) => Ok(T::default()),
        Err(RecvTimeoutError::Timeout) => Err(Unanswered),
    }
}
