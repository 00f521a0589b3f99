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
use crate::stats::Entry;

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
                for flow in &mut flows {
                    flow.place = (number + shards - first_shard(flow.listen, shards)) % shards;
                }
                Some(Ok(flows))
            })
        };
        self.0.iter().cloned().enumerate().flat_map(next)
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
            let place = (first_shard(coming.flow.listen, shards) + coming.flow.place % shards.max(1)) % shards.max(1);
            if let Some(share) = shares.get_mut(place) {
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
