//! One UDP shard as it runs: an epoll loop of its own that moves datagrams in batches.
//!
//! What becomes of a datagram is decided in `flow`, system calls are in `mmsg`, what their errors mean is in `fault`,
//! flows' sockets are kept in `upstream`, whose address they have is judged in `preserve`, and the control side's handle is
//! `udp`. No task, no lock and no allocation per datagram; nothing here needs a tokio runtime.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use tokio::sync::oneshot;
use tracing::{debug, error, warn};

use crate::name::ListenKey;
use crate::plan::ListenerKind;
use crate::serve::access::AccessTap;
use crate::serve::balancer::Tried;
use crate::serve::doubt::{Doubt, Said};
use crate::serve::fault::{count_unsent, why_lost, why_not_opened};
use crate::serve::filter::Filter;
use crate::serve::flow::{self, Choice, Fate, FlowId, FlowRecord, FlowTable, IdleTimes, ListenerId};
use crate::serve::mmsg::{BATCH, Batch, Place, Tally, To, connect_udp, connect_udp_as, equip, receive_trains};
use crate::serve::moving_flow::{ComingFlow, MovingFlow, MovingLosses};
use crate::serve::outbound::send_all;
use crate::serve::room::FlowLimits;
use crate::serve::socket::dropped_packets;
use crate::serve::upstream::{OwnSources, Owner, Upstreams};
use crate::serve::way_back::{ClientKey, Evidence, Turn};
use crate::serve::{Target, TargetCell, Verdict};
use crate::stats::{CloseReason, DropReason, PROCESS, ServiceStats, SourceFallback};

/// What the control side asks of a shard. Obeyed in the order of sending.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve a listener, or a share of its datagrams.
    Add(ListenKey, UdpSocket, TargetCell, Arc<IdleTimes>, Past),
    /// Close a listener and its flows, then tell.
    Remove(ListenKey, oneshot::Sender<()>),
    /// The listener's table or target has changed: close the flows that may not stay.
    Sweep(ListenKey),
    /// The listener's flows live as long as this from now on.
    SetIdle(ListenKey, Arc<IdleTimes>),
    /// Tell that all earlier commands are carried out.
    Tell(oneshot::Sender<()>),
    /// The kernel is to drop what this does not pass; `None`: nothing.
    SetFilter(ListenKey, Option<Arc<Filter>>),
    /// Give another descriptor of the listener's socket. Nobody is told where there is no such listener.
    Copy(ListenKey, oneshot::Sender<io::Result<OwnedFd>>),
    /// A listener of this process, of any shard, is open: its address is no client.
    Opened(SocketAddr),
    /// A listener of this process, of any shard, is closed.
    Closed(SocketAddr),
    /// Receive and send nothing until told to go on or to leave; and say so.
    Rest(Sender<()>),
    /// While it rests: tell of the next flows, so many at most; of none where all were told of.
    TellFlows(usize, Sender<Vec<MovingFlow>>),
    /// While it rests: tell what was dropped at its sockets.
    TellLosses(Sender<Vec<MovingLosses>>),
    /// End the rest: all goes on as before.
    GoOn,
    /// End the rest: the flows that were told of, and all listeners, are another process's.
    Leave(Sender<()>),
    /// Go on with flows of another process, once their listeners are there.
    TakeOver(Vec<ComingFlow>),
    /// Count what is dropped at sockets of another process on from there, once these are served.
    GoOnFrom(Vec<MovingLosses>),
    /// Let go of those whose listeners have not come, and tell how many flows were taken over.
    ForgetTheRest(Sender<usize>),
    /// Tell how many flows there are.
    #[cfg(test)]
    CountFlows(std::sync::mpsc::Sender<usize>),
    /// Panic, to see what happens then.
    #[cfg(test)]
    Panic,
}

/// A shard. Owned by its thread.
pub(super) struct Shard {
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    commands: Receiver<Command>,
    table: FlowTable,
    keys: HashMap<ListenKey, ListenerId>,
    /// By [`ListenerId::index`].
    listeners: Vec<Option<Listener>>,
    upstreams: Upstreams,
    /// Empty between turns, as is `order`.
    batch: Batch,
    /// The flows of what is in the batch.
    order: Vec<Outgoing>,
    /// True where the kernel is to join datagrams that it hands over.
    takes_trains: bool,
    complaints: Complaints,
    /// Flows of another process whose listeners are not there yet, and how many were taken over.
    heritage: Heritage,
    /// Told of each flow's end; without it, flows have no drafts and nobody looks for them.
    access_log: Option<AccessTap>,
}

/// What comes from another process.
#[derive(Default)]
struct Heritage {
    /// Whose listeners are not there yet.
    waiting: HashMap<ListenKey, Heir>,
    taken: usize,
    /// From where what is dropped at their sockets is to be counted; `None` where the other process has not said so.
    losses: Option<HashMap<ListenKey, Losses>>,
}

/// The flows of a listener that is to come, and their sockets.
struct Heir {
    listener: ListenerId,
    sockets: Vec<(FlowId, UdpSocket, Option<Doubt>)>,
}

impl Heritage {
    /// What stands for a listener that is to come. Its idle times are not known yet, and its flows wait for it however long
    /// they were silent.
    fn listener(&mut self, key: ListenKey, table: &mut FlowTable) -> ListenerId {
        let heir = || Heir { listener: table.add_listener(IdleTimes::NEVER), sockets: Vec::new() };
        self.waiting.entry(key).or_insert_with(heir).listener
    }

    /// From where what is dropped at a socket is to be counted.
    fn losses(&mut self, key: &ListenKey, past: Past, socket: &UdpSocket) -> Losses {
        match (past, &mut self.losses) {
            (Past::None, _) => Losses::NONE,
            (Past::Counted, Some(told)) => told.remove(key).unwrap_or(Losses::NONE),
            (Past::Counted, None) => Losses::up_to_now(socket),
        }
    }
}

struct Listener {
    id: ListenerId,
    key: ListenKey,
    socket: UdpSocket,
    target: TargetCell,
    /// Those of the flags, for all that have no others.
    idle: Arc<IdleTimes>,
    losses: Losses,
    /// True once its socket has all its options.
    equipped: bool,
}

impl Listener {
    fn count_losses(&mut self) {
        if let Ok(dropped) = dropped_packets(&self.socket) {
            self.losses.count(dropped, &self.target.load().port.stats);
        }
    }
}

/// Whether somebody has served on a socket before, and has counted what was dropped there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// It is new.
    None,
    /// Another process has, up to a moment that it may have told.
    Counted,
}

/// What the kernel drops at a listener's socket. It tells one number for what its filter drops and for what finds no
/// room: where there is a filter, all of it is taken for the filter's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Losses {
    /// How many datagrams it had dropped when it last said so.
    counted: u32,
    reason: DropReason,
}

impl Losses {
    const NONE: Self = Self { counted: 0, reason: DropReason::Memory };

    /// All of it is counted.
    fn up_to_now(socket: &UdpSocket) -> Self {
        Self { counted: dropped_packets(socket).unwrap_or(0), ..Self::NONE }
    }

    /// Takes the number that the kernel tells. One that came with a datagram may be older than the last one.
    fn count(&mut self, dropped: u32, stats: &ServiceStats) {
        let lost = dropped.wrapping_sub(self.counted);
        if lost <= u32::MAX / 2 {
            self.counted = dropped;
            stats.dropped.add(self.reason, u64::from(lost));
        }
    }
}

/// A slot of the batch. Sorted, those of one listener are together, in them those for one backend, in them those of one
/// flow, in the order of their arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Outgoing {
    listener: ListenerId,
    /// The backend's id; 0 for answers. A pod of this node wakes once for what comes to it without a pause.
    backend: u32,
    flow: FlowId,
    slot: u8,
}

/// Tells listeners from flows in the numbers that epoll hands back; a flow's id leaves this bit free.
const LISTENER_BIT: u64 = 1 << 63;

/// Commands are waiting.
const WAKE: u64 = u64::MAX;

/// Events taken at once. What is ready beyond these comes next: epoll goes round.
const EVENTS: usize = 256;

/// A flow is asked for so many answers first: most have one, and each header that is asked for costs a little.
const FIRST_ASK: usize = 8;

impl Shard {
    pub(super) fn new(
        wake: Arc<OwnedFd>,
        commands: Receiver<Command>,
        limits: FlowLimits,
        sources: Arc<OwnSources>,
        offload: bool,
        access_log: Option<AccessTap>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &*wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        Ok(Self {
            epoll,
            wake,
            commands,
            table: FlowTable::new(limits, rand::random(), Instant::now()),
            keys: HashMap::new(),
            listeners: Vec::new(),
            upstreams: Upstreams::new(sources),
            batch: if offload { Batch::default() } else { Batch::without_joining() },
            order: Vec::with_capacity(BATCH),
            takes_trains: offload,
            complaints: Complaints::default(),
            heritage: Heritage::default(),
            access_log,
        })
    }

    /// Serves until the control side is gone. Sleeps while nothing comes and no flow is left to end.
    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            events.clear();
            let timeout = self.table.next_expiry().map(time_until);
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return error!(error = %errno, "a UDP shard cannot wait for its sockets: it stops"),
            }
            match catch_unwind(AssertUnwindSafe(|| self.turn(&events, Instant::now()))) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(_) => self.begin_anew(),
            }
        }
    }

    /// Answers first: what waits at a flow's socket is lost when a client's datagram closes it, by eviction or by
    /// meeting a refusal. Then commands, so that datagrams that came after a change are treated by it. An event of a
    /// listener that is gone by then finds nobody, or one that came in its place and has nothing to be received.
    fn turn(&mut self, events: &[epoll::Event], now: Instant) -> ControlFlow<()> {
        let tokens = || events.iter().map(|event| event.data.u64());
        for token in tokens().filter(|token| *token & LISTENER_BIT == 0) {
            self.collect(FlowId::from_bits(token), now);
        }
        self.answer();
        if tokens().any(|token| token == WAKE) {
            self.obey(now)?;
        }
        for token in tokens().filter(|token| *token & LISTENER_BIT != 0 && *token != WAKE) {
            self.forward((token ^ LISTENER_BIT) as usize, now);
        }
        self.table.expire(now, |flow| self.upstreams.close(flow));
        ControlFlow::Continue(())
    }

    /// Moves one batch of a listener's datagrams to backends. What else waits comes in the next turn, after others.
    fn forward(&mut self, index: usize, now: Instant) {
        let Some(listener) = self.listeners.get_mut(index).and_then(Option::as_mut) else { return };
        if !mem::replace(&mut listener.equipped, true) {
            equip(&listener.socket, listener.key.address(), self.takes_trains);
        }
        let received = match self.batch.receive(listener.socket.as_fd(), BATCH) {
            Ok(received) => received,
            Err(error) => return debug!(listen = %listener.key, %error, "nothing received"),
        };
        let target = listener.target.load_full(); // one moment for the whole batch
        if let Some(dropped) = self.batch.overflow() {
            listener.losses.count(dropped, &target.port.stats);
        }
        let visit = Visit { listener: listener.id, key: listener.key, target, now };
        for slot in 0..received {
            let datagrams = self.batch.datagrams(slot) as u64;
            let flow = self.batch.peer(slot).and_then(|client| self.admit(&visit, client, datagrams));
            self.order.extend(flow.map(|flow| {
                let backend = self.table.choice(flow).map_or(0, |choice| choice.backend.id);
                Outgoing { listener: visit.listener, backend, flow, slot: slot as u8 }
            }));
        }
        let mut order = mem::take(&mut self.order);
        order.sort_unstable();
        for run in order.chunk_by(|a, b| a.flow == b.flow) {
            self.deliver(&visit, run);
        }
        order.clear();
        self.order = order;
        self.batch.clear();
    }

    /// The flow of a client's datagrams, opened if it is new; `None` where nobody gets them.
    fn admit(&mut self, visit: &Visit, client: SocketAddr, datagrams: u64) -> Option<FlowId> {
        let pick = |tried: &Tried| {
            if self.upstreams.is_own(client) {
                return Err(DropReason::Loop); // a backend of ours is a listener of ours
            }
            choose(&visit.target, client.ip(), tried, visit.now)
        };
        match self.table.on_datagram(visit.listener, client, visit.now, pick) {
            flow::Verdict::Forward(flow) => {
                if self.upstreams.has_doubts() {
                    self.go_on_in_doubt(visit, flow, client);
                }
                Some(flow)
            }
            flow::Verdict::Open { flow, evicted } => {
                if let Some(evicted) = evicted {
                    self.upstreams.close(evicted);
                    self.complaints.say(DropReason::FlowLimit, visit);
                }
                self.open(visit, flow, client, datagrams)
            }
            flow::Verdict::Drop(reason) => {
                visit.target.port.stats.dropped.add(reason, datagrams);
                self.complaints.say(reason, visit);
                None
            }
        }
    }

    fn open(&mut self, visit: &Visit, flow: FlowId, client: SocketAddr, datagrams: u64) -> Option<FlowId> {
        let choice = self.table.choice(flow)?.clone();
        self.upstreams.close(flow); // To a backend that it has parted with.
        match self.connect(flow, client, &choice, visit.now) {
            Ok(()) => {
                let begins = self.table.opened(flow);
                if let Some(tap) = &self.access_log {
                    // A sample takes a flow whole: there is a line for each of its backends, or for none.
                    let is_told = if begins { tap.takes_next() } else { self.table.draft_mut(flow).is_some() };
                    let draft = is_told.then(|| tap.draft(client, visit.key, visit.target.kind, &choice.port));
                    self.table.tell(flow, draft);
                }
                debug!(service = %choice.port.name, listen = %visit.key, %client, backend = %choice.backend.address(), "flow opened");
                Some(flow)
            }
            Err(error) => {
                let (failure, reason) = why_not_opened(&error);
                self.table.failed(flow, failure);
                choice.port.stats.dropped.add(reason, datagrams);
                self.complaints.say(reason, visit);
                None
            }
        }
    }

    fn connect(&mut self, flow: FlowId, client: SocketAddr, choice: &Choice, now: Instant) -> io::Result<()> {
        let backend = &choice.backend;
        let mut doubt = None;
        if choice.port.preserve.is_wanted() {
            match self.connect_as(flow, client, choice, now) {
                Ok(()) => return Ok(()),
                Err((reason, of_node)) => {
                    choice.port.preserve.stats.fallbacks.count(reason);
                    doubt = of_node;
                }
            }
        }
        self.keep(flow, connect_udp(backend.address())?, Owner::Node, doubt)
    }

    /// From the client's own address; or why not, and what an answer to this node would tell.
    fn connect_as(
        &mut self,
        flow: FlowId,
        client: SocketAddr,
        choice: &Choice,
        now: Instant,
    ) -> Result<(), (SourceFallback, Option<Doubt>)> {
        let (backend, preserve) = (&choice.backend, &choice.port.preserve);
        let side = preserve.side(client.ip(), backend, now).map_err(|reason| (reason, None))?;
        if let Turn::Node(tells) = backend.turn(side, client.ip(), now) {
            return Err((SourceFallback::NoWayBack, tells.map(|tells| Doubt::of_node(side, tells, now))));
        }
        let doubt = Doubt::of_client(side, ClientKey::of(client.ip()), now);
        let socket = connect_udp_as(client, backend.address());
        socket.and_then(|socket| self.keep(flow, socket, Owner::Client, Some(doubt))).map_err(|error| {
            debug!(service = %choice.port.name, %client, %error, "no socket at the client's address");
            backend.note_not_asked(side, client.ip(), now);
            (SourceFallback::LocalPorts, None)
        })?;
        preserve.stats.preserved.increment();
        Ok(())
    }

    /// The client sends again, though an answer would have told something that is not known yet: none has come.
    fn go_on_in_doubt(&mut self, visit: &Visit, flow: FlowId, client: SocketAddr) {
        let Some((doubt, choice)) = self.upstreams.doubt(flow).zip(self.table.choice(flow)) else { return };
        let is_missing = choice.backend.lacks_way_back(doubt.side);
        let Some(next) = doubt.moved(ClientKey::of(client.ip()), is_missing, visit.now) else { return };
        let choice = choice.clone();
        let moved = if !next.as_client {
            self.move_to_node(flow, &choice, Some(next))
        } else if may_be_seen(next, client.ip(), &choice, visit.now) {
            let socket = connect_udp_as(client, choice.backend.address());
            socket.and_then(|socket| self.keep(flow, socket, Owner::Client, Some(next)))
        } else {
            self.upstreams.take_doubt(flow); // It stays with the node.
            Ok(())
        };
        if let Err(error) = moved {
            debug!(service = %choice.port.name, %client, %error, "the flow stays as it is");
            self.upstreams.replace_doubt(flow, doubt.again(visit.now));
        }
    }

    fn move_to_node(&mut self, flow: FlowId, choice: &Choice, doubt: Option<Doubt>) -> io::Result<()> {
        self.keep(flow, connect_udp(choice.backend.address())?, Owner::Node, doubt)
    }

    /// The first answer over a flow's socket has come.
    fn conclude(&mut self, flow: FlowId, now: Instant) {
        let (Some(doubt), Some(choice)) = (self.upstreams.take_doubt(flow), self.table.choice(flow)) else { return };
        let (backend, side) = (&choice.backend, doubt.side);
        match doubt.answered(now) {
            Said::WayBack => backend.note_way_back(side, now),
            Said::AnswersNode => backend.note_answer_to_node(side),
            Said::NoWayBack(client, evidence) => {
                backend.note_no_way_back(side, client, evidence, &choice.port.name, now);
            }
        }
    }

    /// Waits for what comes over a flow's socket, in the place of the one that it may have.
    fn keep(&mut self, flow: FlowId, socket: UdpSocket, owner: Owner, doubt: Option<Doubt>) -> io::Result<()> {
        let data = epoll::EventData::new_u64(flow.to_bits());
        epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN)?;
        self.prefer_trains(&socket);
        self.upstreams.insert(flow, socket, owner, doubt)
    }

    /// Sends a run of one flow's datagrams. If it turns out that earlier ones were refused, the rest goes to another
    /// backend at once.
    fn deliver(&mut self, visit: &Visit, run: &[Outgoing]) {
        let Some(flow) = run.first().map(|outgoing| outgoing.flow) else { return };
        let mut slots = [0; BATCH];
        let slots = slots_of(run, &mut slots);
        let Some(lost) = self.send_upstream(visit, flow, slots, Place::default()) else { return };
        let client = self.batch.peer(usize::from(slots[lost.position]));
        let flow = client.and_then(|client| self.admit(visit, client, self.left(slots, lost)));
        if let Some(lost) = flow.and_then(|flow| self.send_upstream(visit, flow, slots, lost)) {
            visit.target.port.stats.dropped.add(DropReason::Unreachable, self.left(slots, lost));
        }
    }

    /// Sends datagrams to a flow's backend. What the network will not take is counted and left out.
    ///
    /// Returns the first datagram that is not dealt with: the backend is lost, and the flow needs another.
    fn send_upstream(&mut self, visit: &Visit, flow: FlowId, slots: &[u8], from: Place) -> Option<Place> {
        let service = &visit.target.port.stats;
        let (Some(socket), Some(choice)) = (self.upstreams.get(flow), self.table.choice(flow)) else {
            service.dropped.add(DropReason::FlowLimit, self.left(slots, from)); // evicted by its own batch
            return None;
        };
        let (mut moved, mut lost) = (Tally::default(), None);
        let sent = |batch: &Batch, from, end| moved += batch.measure(slots, from, end);
        send_all(&mut self.batch, socket, slots, from, To::Connected, sent, |refusal| {
            lost = why_lost(refusal.error).map(|reason| (refusal.at, reason));
            if lost.is_some() {
                return ControlFlow::Break(());
            }
            count_unsent(refusal, |reason, count| service.dropped.add(reason, count))
        });
        choice.backend.stats.upstream_datagrams.add(moved.datagrams);
        choice.backend.stats.upstream_bytes.add(choice.entry, moved.bytes);
        if self.access_log.is_some()
            && let Some(draft) = self.table.draft_mut(flow)
        {
            draft.upstream += moved;
        }
        let (at, reason) = lost?;
        self.refuse(flow, reason, visit.now);
        Some(at)
    }

    /// Datagrams from a place on.
    fn left(&self, slots: &[u8], from: Place) -> u64 {
        self.batch.measure(slots, from, Place { position: slots.len(), offset: 0 }).datagrams
    }

    /// Takes a flow's answers into the batch: at most a batch in one turn.
    fn collect(&mut self, flow: FlowId, now: Instant) {
        if self.batch.room() == 0 {
            self.answer();
        }
        let (mut ask, mut lost) = (FIRST_ASK, None);
        while self.table.choice(flow).is_some() && self.batch.room() > 0 {
            let Some(socket) = self.upstreams.get(flow) else { break };
            ask = ask.min(self.batch.room());
            match self.batch.receive(socket.as_fd(), ask) {
                Ok(received) => {
                    if self.upstreams.has_doubts() {
                        self.conclude(flow, now);
                    }
                    self.address(flow, received, now);
                    if received < ask {
                        break;
                    }
                    ask = BATCH;
                }
                Err(error) => match why_lost(&error) {
                    // The kernel tells an error before the answers that came earlier: they are read all the same.
                    Some(reason) if lost.is_none() => lost = Some(reason),
                    _ => break,
                },
            }
        }
        if let Some(reason) = lost {
            self.answer(); // What came before is the flow's: it is counted before its end is.
            self.refuse(flow, reason, now);
        }
    }

    /// Addresses the datagrams that were received last to the flow's client.
    fn address(&mut self, flow: FlowId, received: usize, now: Instant) {
        let Some((listener, client)) = self.table.on_reply(flow, now) else { return };
        for slot in self.batch.count() - received..self.batch.count() {
            self.batch.set_peer(slot, client);
            self.order.push(Outgoing { listener, backend: 0, flow, slot: slot as u8 });
        }
    }

    /// Sends the answers in the batch to their clients, each from the address that the client sent to.
    fn answer(&mut self) {
        let mut order = mem::take(&mut self.order);
        order.sort_unstable();
        for answers in order.chunk_by(|a, b| a.listener == b.listener) {
            self.send_downstream(answers);
        }
        order.clear();
        self.order = order;
        self.batch.clear();
    }

    fn send_downstream(&mut self, answers: &[Outgoing]) {
        let index = answers.first().map_or(usize::MAX, |answer| answer.listener.index());
        let Some(listener) = self.listeners.get(index).and_then(Option::as_ref) else { return };
        let choice_at = |position: usize| self.table.choice(answers.get(position)?.flow);
        let mut slots = [0; BATCH];
        let slots = slots_of(answers, &mut slots);
        let mut moved = [Tally::default(); BATCH];
        let sent = |batch: &Batch, from, end| {
            batch.measure_each(slots, from, end, |position, tally| moved[position] += tally);
        };
        send_all(&mut self.batch, &listener.socket, slots, Place::default(), To::Peers, sent, |refusal| {
            let choice = choice_at(refusal.at.position);
            count_unsent(refusal, |reason, count| {
                if let Some(choice) = choice {
                    choice.port.stats.dropped.add(reason, count);
                }
            })
        });
        let mut begin = 0;
        for run in answers.chunk_by(|a, b| a.flow == b.flow) {
            let end = begin + run.len();
            let sum = moved[begin..end].iter().fold(Tally::default(), |sum, tally| sum + *tally);
            self.count_downstream(run[0].flow, sum);
            begin = end;
        }
    }

    fn count_downstream(&mut self, flow: FlowId, moved: Tally) {
        let Some(choice) = self.table.choice(flow) else { return };
        choice.backend.stats.downstream_datagrams.add(moved.datagrams);
        choice.backend.stats.downstream_bytes.add(choice.entry, moved.bytes);
        if self.access_log.is_some()
            && let Some(draft) = self.table.draft_mut(flow)
        {
            draft.downstream += moved;
        }
    }

    /// The network says that the flow's backend is not there.
    fn refuse(&mut self, flow: FlowId, reason: CloseReason, now: Instant) {
        if self.upstreams.has_doubts() && self.asks_as_node_instead(flow, reason, now) {
            return;
        }
        self.table.on_refused(flow, reason, now);
        self.upstreams.close(flow);
    }

    /// Who refuses a client's address may mean that client alone, or none that is not this node's: where nobody was let in, the
    /// flow goes on from there, for good. True where it does.
    fn asks_as_node_instead(&mut self, flow: FlowId, reason: CloseReason, now: Instant) -> bool {
        let (Some(doubt), Some(choice)) = (self.upstreams.doubt(flow), self.table.choice(flow)) else { return false };
        if !doubt.as_client {
            if reason == CloseReason::Refused {
                self.conclude(flow, now); // That came from the backend.
            }
            return false;
        }
        if choice.backend.has_way_back(doubt.side, now) {
            return false;
        }
        choice.backend.note_no_way_back(doubt.side, doubt.of, Evidence::Late, &choice.port.name, now);
        let choice = choice.clone();
        self.move_to_node(flow, &choice, None).is_ok()
    }

    /// Does what the control side has asked for; breaks off when it is gone.
    fn obey(&mut self, now: Instant) -> ControlFlow<()> {
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]); // before looking, so that no command is missed
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.carry_out(command, now)?,
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
                Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
            }
        }
    }

    fn carry_out(&mut self, command: Command, now: Instant) -> ControlFlow<()> {
        match command {
            Command::Add(key, socket, target, idle, past) => self.add(key, socket, target, idle, past, now),
            Command::Remove(key, closed) => {
                self.remove(&key, now);
                let _ = closed.send(()); // nobody may wait for it
            }
            Command::Sweep(key) => self.sweep(&key, now),
            Command::SetIdle(key, idle) => self.set_idle(&key, idle),
            Command::Tell(settled) => drop(settled.send(())), // nobody may wait for it
            Command::SetFilter(key, filter) => self.set_filter(&key, filter.as_deref()),
            Command::Copy(key, reply) => self.copy(&key, reply),
            Command::Opened(address) => self.table.add_own_address(address),
            Command::Closed(address) => self.table.remove_own_address(address),
            Command::Rest(resting) => return self.rest(resting, now),
            // It does not rest: what it told would be over at once.
            Command::TellFlows(_, told) => drop(told),
            Command::TellLosses(told) => drop(told),
            Command::GoOn | Command::Leave(_) => {}
            Command::TakeOver(flows) => self.take_over(flows, now),
            Command::GoOnFrom(losses) => self.heritage.losses = Some(losses_by_key(losses)),
            Command::ForgetTheRest(told) => drop(told.send(self.forget_the_rest())),
            #[cfg(test)]
            Command::CountFlows(tell) => drop(tell.send(self.table.count())),
            #[cfg(test)]
            Command::Panic => panic!("asked to"),
        }
        ControlFlow::Continue(())
    }

    // ---- Another process ----

    /// Rests until the hand-over has come to its end, one way or the other. What comes meanwhile waits in the kernel.
    fn rest(&mut self, resting: Sender<()>, now: Instant) -> ControlFlow<()> {
        self.count_losses(); // What it counts goes to the other process.
        let mut flows = self.table.export(now).into_iter();
        let mut told = Vec::new();
        let _ = resting.send(()); // nobody may wait for it
        loop {
            match self.commands.recv() {
                Ok(Command::TellFlows(at_once, tell)) => {
                    let some = self.move_some(&mut flows, at_once, &mut told, now);
                    let _ = tell.send(some); // nobody may wait for it
                }
                Ok(Command::TellLosses(tell)) => {
                    let _ = tell.send(self.losses()); // nobody may wait for it
                }
                Ok(Command::Leave(left)) => {
                    self.leave(told);
                    let _ = left.send(()); // nobody may wait for it
                    return ControlFlow::Continue(());
                }
                Ok(Command::GoOn) => return ControlFlow::Continue(()),
                Ok(Command::Rest(resting)) => _ = resting.send(()),
                Ok(command) => self.carry_out(command, now)?,
                Err(_) => return ControlFlow::Break(()),
            }
        }
    }

    /// What is counted of what was dropped, but for sockets at which nothing was.
    fn losses(&self) -> Vec<MovingLosses> {
        let of = |listener: &Listener| {
            let Losses { counted, reason } = listener.losses;
            // Who knows all shards knows the place.
            let losses = MovingLosses { listen: listener.key, place: 0, counted, reason };
            (listener.losses != Losses::NONE).then_some(losses)
        };
        self.listeners.iter().flatten().filter_map(of).collect()
    }

    /// The next flows, so many at most, and notes which they are. One for whose socket there is no other descriptor ends here.
    fn move_some(
        &self,
        flows: &mut impl Iterator<Item = (FlowId, FlowRecord)>,
        at_once: usize,
        told: &mut Vec<FlowId>,
        now: Instant,
    ) -> Vec<MovingFlow> {
        let moving = flows.filter_map(|(id, record)| Some((id, self.moving(id, record, now)?)));
        let (ids, flows): (Vec<_>, _) = moving.take(at_once).unzip();
        told.extend(ids);
        flows
    }

    fn moving(&self, id: FlowId, record: FlowRecord, now: Instant) -> Option<MovingFlow> {
        let (socket, choice) = (self.upstreams.get(id)?, self.table.choice(id)?);
        let listener = self.listeners.get(record.listener.index())?.as_ref()?;
        Some(MovingFlow {
            listen: listener.key,
            place: 0, // who knows all shards knows which one this is
            client: record.client,
            port: choice.port.name.clone(),
            backend: record.backend,
            entry: choice.entry,
            state: record.state,
            silent: record.silent,
            parting: record.parting,
            draft: self.table.draft(id).map(|draft| draft.record(now)),
            doubt: self.upstreams.doubt(id).map(|doubt| doubt.record(now)),
            socket: socket.as_fd().try_clone_to_owned().ok()?,
        })
    }

    /// Lets go of what another process has from now on. What was not told of ends: its clients' datagrams go there.
    fn leave(&mut self, told: Vec<FlowId>) {
        for flow in told {
            self.table.release(flow);
            self.upstreams.release(flow, &self.epoll);
        }
        self.keys.clear();
        for listener in mem::take(&mut self.listeners).into_iter().flatten() {
            self.table.remove_listener(listener.id, CloseReason::Drain, |flow| self.upstreams.close(flow));
            let _ = epoll::delete(&self.epoll, &listener.socket); // closing alone would not do
        }
    }

    /// Takes flows over, the longest silent first, be they of several shards. Their sockets are looked at once their listeners
    /// are there: an answer has to leave from somewhere.
    fn take_over(&mut self, mut flows: Vec<ComingFlow>, now: Instant) {
        flows.sort_by_key(|coming| std::cmp::Reverse(coming.flow.silent));
        let mut served = BTreeSet::new();
        for ComingFlow { flow: moving, choice } in flows {
            let key = moving.listen;
            let listener = self.keys.get(&key).copied().unwrap_or_else(|| self.heritage.listener(key, &mut self.table));
            let Some(flow) = self.import(listener, &moving, choice, now) else { continue };
            let doubt = moving.doubt.map(|doubt| Doubt::go_on(doubt, now));
            match self.heritage.waiting.get_mut(&key) {
                Some(heir) => heir.sockets.push((flow, moving.socket.into(), doubt)),
                None => {
                    self.inherit(flow, moving.socket.into(), doubt);
                    served.insert(key);
                }
            }
        }
        served.iter().for_each(|key| self.sweep(key, now));
    }

    fn import(&mut self, listener: ListenerId, moving: &MovingFlow, choice: Choice, now: Instant) -> Option<FlowId> {
        let MovingFlow { listen, client, backend, state, silent, parting, .. } = *moving;
        let (port, entry) = (Arc::clone(&choice.port), choice.entry);
        let record = FlowRecord { listener, client, backend, state, silent, parting };
        let flow = self.table.import(listener, &record, choice, now)?;
        if let (Some(tap), Some(so_far)) = (&self.access_log, moving.draft) {
            self.table.tell(flow, Some(tap.go_on(client, listen, ListenerKind::of(entry), &port, so_far)));
            if let Some(draft) = self.table.draft_mut(flow) {
                draft.tries = so_far.tries; // The table knows of none but its own.
            }
        }
        Some(flow)
    }

    /// Keeps the socket of a flow that was taken over, unless its time was over before its listener came.
    fn inherit(&mut self, flow: FlowId, socket: UdpSocket, doubt: Option<Doubt>) {
        if self.table.choice(flow).is_none() {
            return;
        }
        match Owner::of(&socket).and_then(|owner| self.keep(flow, socket, owner, doubt)) {
            Ok(()) => self.heritage.taken += 1,
            Err(error) => {
                debug!(%error, "a flow of the last process is lost");
                self.table.release(flow);
                self.upstreams.close(flow);
            }
        }
    }

    /// Nobody serves the listeners that have not come: their flows end. How many others were taken over.
    fn forget_the_rest(&mut self) -> usize {
        let Heritage { waiting, taken, losses: _ } = mem::take(&mut self.heritage);
        for heir in waiting.into_values() {
            self.table.remove_listener(heir.listener, CloseReason::Drain, |_| {});
        }
        taken
    }

    // ---- Listeners ----

    fn add(
        &mut self,
        key: ListenKey,
        socket: UdpSocket,
        target: TargetCell,
        idle: Arc<IdleTimes>,
        past: Past,
        now: Instant,
    ) {
        self.remove(&key, now); // one socket for each key
        let losses = self.heritage.losses(&key, past, &socket);
        let Some(heir) = self.heritage.waiting.remove(&key) else {
            let id = self.table.add_listener(*idle);
            return self.listen(id, key, socket, target, idle, losses);
        };
        self.table.set_idle(heir.listener, *idle);
        self.listen(heir.listener, key, socket, target, idle, losses);
        heir.sockets.into_iter().for_each(|(flow, socket, doubt)| self.inherit(flow, socket, doubt));
        self.sweep(&key, now); // what may not stay goes as it goes after any change
    }

    /// Asks for trains where they are wanted. A kernel that has none hands over single datagrams, which do as well.
    fn prefer_trains(&self, socket: &UdpSocket) {
        if self.takes_trains {
            let _ = receive_trains(socket);
        }
    }

    fn listen(
        &mut self,
        id: ListenerId,
        key: ListenKey,
        socket: UdpSocket,
        target: TargetCell,
        idle: Arc<IdleTimes>,
        losses: Losses,
    ) {
        let data = epoll::EventData::new_u64(LISTENER_BIT | id.index() as u64);
        if let Err(errno) = epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN) {
            error!(listen = %key, error = %errno, "cannot wait for datagrams: this listener does not serve");
            return self.table.remove_listener(id, CloseReason::Drain, |_| {});
        }
        if self.listeners.len() <= id.index() {
            self.listeners.resize_with(id.index() + 1, || None);
        }
        self.listeners[id.index()] = Some(Listener { id, key, socket, target, idle, losses, equipped: false });
        self.keys.insert(key, id);
    }

    fn remove(&mut self, key: &ListenKey, now: Instant) {
        self.sweep(key, now); // what goes for its endpoint's sake is counted so
        let Some(id) = self.keys.remove(key) else { return };
        self.table.remove_listener(id, CloseReason::Drain, |flow| self.upstreams.close(flow));
        if let Some(listener) = self.listeners[id.index()].take() {
            // Closing alone would not do where the control side, or another process, holds a copy of the descriptor.
            let _ = epoll::delete(&self.epoll, &listener.socket);
        }
    }

    fn copy(&self, key: &ListenKey, reply: oneshot::Sender<io::Result<OwnedFd>>) {
        let Some(Some(listener)) = self.keys.get(key).and_then(|id| self.listeners.get(id.index())) else { return };
        let _ = reply.send(listener.socket.as_fd().try_clone_to_owned()); // nobody may wait for it
    }

    fn set_idle(&mut self, key: &ListenKey, idle: Arc<IdleTimes>) {
        let Some(&id) = self.keys.get(key) else { return };
        self.table.set_idle(id, *idle);
        if let Some(Some(listener)) = self.listeners.get_mut(id.index()) {
            listener.idle = idle;
        }
    }

    fn count_losses(&mut self) {
        for listener in self.listeners.iter_mut().flatten() {
            listener.count_losses();
        }
    }

    /// What the kernel has dropped up to now is counted for the filter that the socket had.
    fn set_filter(&mut self, key: &ListenKey, filter: Option<&Filter>) {
        let Some(id) = self.keys.get(key) else { return };
        let Some(Some(listener)) = self.listeners.get_mut(id.index()) else { return };
        listener.count_losses();
        let target = listener.target.load();
        let attached = filter.map_or(Ok(false), |filter| filter.attach(&listener.socket).map(|()| true));
        let attached = attached.unwrap_or_else(|error| {
            PROCESS.filter_fallbacks.increment();
            debug!(listen = %key, %error, "no filter: each datagram is judged here");
            false
        });
        if !attached && let Err(error) = Filter::detach(&listener.socket) {
            warn!(listen = %key, %error, "a filter stays that should go: some senders may be unheard");
        }
        listener.losses.reason = if attached { target.reason_of_silence() } else { DropReason::Memory };
    }

    fn sweep(&mut self, key: &ListenKey, now: Instant) {
        let Some(&id) = self.keys.get(key) else { return };
        let Some(Some(listener)) = self.listeners.get(id.index()) else { return };
        let target = listener.target.load();
        let judge = |client, choice: &Choice| match target.judge(client) {
            // Ids of backends tell them apart within one ServicePort only.
            Verdict::Serve(balancer) if Arc::ptr_eq(&balancer.port, &choice.port) => {
                if balancer.serves(&choice.backend) { Fate::Stays } else { Fate::Parts }
            }
            Verdict::Serve(_) | Verdict::Reject | Verdict::Drop => Fate::Ends,
        };
        self.table.sweep(id, now, judge, |flow| self.upstreams.close(flow));
    }

    /// After a panic: all flows of this shard begin anew, its listeners stay.
    fn begin_anew(&mut self) {
        error!("a UDP shard panicked: its flows begin anew");
        self.upstreams.clear();
        self.batch.clear();
        self.order.clear();
        self.keys.clear();
        self.heritage = Heritage::default();
        self.table.reset(CloseReason::Panic, rand::random(), Instant::now());
        for listener in mem::take(&mut self.listeners).into_iter().flatten() {
            let _ = epoll::delete(&self.epoll, &listener.socket); // its index may be another one now
            let id = self.table.add_listener(*listener.idle);
            self.listen(id, listener.key, listener.socket, listener.target, listener.idle, listener.losses);
        }
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes()); // commands may be left
    }
}

fn losses_by_key(losses: Vec<MovingLosses>) -> HashMap<ListenKey, Losses> {
    let of = |MovingLosses { listen, counted, reason, .. }| (listen, Losses { counted, reason });
    losses.into_iter().map(of).collect()
}

/// What the datagrams of one batch have in common.
struct Visit {
    listener: ListenerId,
    key: ListenKey,
    target: Arc<Target>,
    now: Instant,
}

/// Whether a flow that had no answer may show its client again: the Service still wants that, answers are still led here, and
/// nothing is known against it.
fn may_be_seen(doubt: Doubt, client: IpAddr, choice: &Choice, now: Instant) -> bool {
    let Choice { backend, port, .. } = choice;
    port.preserve.is_wanted()
        && port.preserve.side(client, backend, now) == Ok(doubt.side)
        && backend.may_be_seen(doubt.side, client, now)
}

/// Chooses a backend for a client. *Port unreachable* towards one side of a listener cannot be told by a socket that
/// serves the other side, so that side's datagrams are dropped and counted.
fn choose(target: &Target, client: IpAddr, tried: &Tried, now: Instant) -> Result<Choice, DropReason> {
    let balancer = target.balancer_for(client)?;
    let backend = balancer.pick(client, tried, now).ok_or(DropReason::NoEndpoints)?;
    Ok(Choice { backend, port: Arc::clone(&balancer.port), entry: target.kind.entry() })
}

fn slots_of<'a>(run: &[Outgoing], slots: &'a mut [u8; BATCH]) -> &'a [u8] {
    let count = run.len().min(BATCH);
    slots.iter_mut().zip(run).for_each(|(slot, outgoing)| *slot = outgoing.slot);
    &slots[..count]
}

/// A little more than until then, as a wait that ends too early would be repeated at once.
fn time_until(then: Instant) -> Timespec {
    let time = then.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

/// Says each limit that is reached at most once a minute: under a flood there would be a line per datagram.
#[derive(Default)]
struct Complaints([Option<Instant>; DropReason::ALL.len()]);

impl Complaints {
    const PAUSE: Duration = Duration::from_secs(60);

    fn say(&mut self, reason: DropReason, visit: &Visit) {
        use DropReason::{FdLimit, FlowLimit, LocalPorts, Memory};
        let said = &mut self.0[usize::from(reason)];
        let is_limit = matches!(reason, FdLimit | FlowLimit | LocalPorts | Memory);
        if is_limit && said.is_none_or(|then| visit.now.saturating_duration_since(then) >= Self::PAUSE) {
            *said = Some(visit.now);
            warn!(service = %visit.target.port.name, listen = %visit.key, %reason, "UDP flows give way at a limit");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use arc_swap::ArcSwap;
    use ipnet::IpNet;
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::name::{Family, Protocol};
    use crate::serve::balancer::{Backend, Balancer};
    use crate::serve::flow::FlowState;
    use crate::serve::mmsg::bind_udp;
    use crate::serve::udp::tests::{answer, backend, balancer, loopback, plain};
    use crate::stats::Entry;

    /// A shard whose loop does not run: its steps are called by hand.
    fn still_shard() -> Shard {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("a descriptor");
        let (_, commands) = channel();
        let limits = FlowLimits::split(8, 1).next().expect("one shard");
        Shard::new(Arc::new(wake), commands, limits, Arc::default(), true, None).expect("a descriptor")
    }

    /// A flow as another process tells of it, through this socket.
    fn coming(listen: ListenKey, balancer: &Balancer, backend: &Arc<Backend>, socket: UdpSocket) -> ComingFlow {
        let flow = MovingFlow {
            listen,
            place: 0,
            client: SocketAddr::from(([10, 9, 0, 1], 1_000)),
            port: balancer.port.name.clone(),
            backend: backend.address(),
            entry: Entry::ClusterIp,
            state: FlowState::Stream,
            silent: Duration::from_secs(100),
            parting: false,
            draft: None,
            doubt: None,
            socket: socket.into(),
        };
        let choice = Choice { backend: Arc::clone(backend), port: Arc::clone(&balancer.port), entry: Entry::ClusterIp };
        ComingFlow { flow, choice }
    }

    #[test]
    fn t192_given_a_flow_that_may_be_silent_for_long_when_it_waits_for_its_listener_then_it_is_there_when_that_comes() {
        let (near, far) = (plain(loopback()), plain(loopback()));
        near.connect(far.local_addr().expect("bound")).expect("connected");
        let backend = Arc::new(Backend::new(1, far.local_addr().expect("bound")));
        let balancer = balancer(Family::V4, &[&backend]);
        let target = Arc::new(ArcSwap::from_pointee(Target::serving(&balancer)));
        let key = ListenKey::new([127, 87, 3, 1].into(), 5300, Protocol::Udp);
        let (mut shard, now) = (still_shard(), Instant::now());

        shard.take_over(vec![coming(key, &balancer, &backend, near)], now);
        let later = now + Duration::from_secs(5);
        shard.table.expire(later, |_| panic!("nobody has said how long it may be silent"));
        let long = IdleTimes { stream: Duration::from_secs(300), ..IdleTimes::default() };
        shard.add(key, bind_udp(key.address()).expect("a free address"), target, Arc::new(long), Past::None, later);

        assert_eq!(shard.forget_the_rest(), 1);
        shard.table.expire(now + Duration::from_secs(190), |_| panic!("it has ten seconds left"));
        let mut closed = 0;
        shard.table.expire(now + Duration::from_secs(202), |_| closed += 1);
        assert_eq!(closed, 1);
    }

    #[test]
    fn f25_given_a_socket_that_has_dropped_datagrams_when_it_was_another_process_s_then_they_are_not_counted_again() {
        let balancer = balancer(Family::V4, &[&Arc::new(Backend::new(1, SocketAddr::from(([127, 0, 0, 1], 9))))]);
        let target: TargetCell = Arc::new(ArcSwap::from_pointee(Target::serving(&balancer)));
        let dropped = || balancer.port.stats.dropped.get(DropReason::Memory);
        for (number, past) in [(2, Past::Counted), (3, Past::None)] {
            let key = ListenKey::new([127, 87, 3, number].into(), 5300, Protocol::Udp);
            let socket = bind_udp(key.address()).expect("a free address");
            socket2::SockRef::from(&socket).set_recv_buffer_size(1).expect("an option");
            let client = plain(loopback());
            while dropped_packets(&socket).expect("a number") == 0 {
                client.send_to(&[0; 512], key.address()).expect("sent");
            }
            let mut shard = still_shard();

            shard.add(key, socket, Arc::clone(&target), Arc::default(), past, Instant::now());
            shard.count_losses();

            assert_eq!(dropped() > 0, past == Past::None, "{past:?}");
        }
    }

    #[test]
    fn f25_given_a_process_that_says_how_far_it_has_counted_losses_when_another_serves_then_it_counts_those_in_between()
    {
        let balancer = balancer(Family::V4, &[&Arc::new(Backend::new(1, SocketAddr::from(([127, 0, 0, 1], 9))))]);
        let target: TargetCell = Arc::new(ArcSwap::from_pointee(Target::serving(&balancer)));
        let dropped = |reason| balancer.port.stats.dropped.get(reason);
        let key = ListenKey::new([127, 87, 3, 4].into(), 5300, Protocol::Udp);
        let socket = bind_udp(key.address()).expect("a free address");
        socket2::SockRef::from(&socket).set_recv_buffer_size(1).expect("an option");
        let client = plain(loopback());
        let flood = |more: u32| {
            let wanted = dropped_packets(&socket).expect("a number") + more;
            while dropped_packets(&socket).expect("a number") < wanted {
                client.send_to(&[0; 512], key.address()).expect("sent");
            }
        };
        let copy = socket.try_clone().expect("a descriptor");
        let (mut old, mut new) = (still_shard(), still_shard());
        flood(3);
        old.add(
            key,
            copy.try_clone().expect("a descriptor"),
            Arc::clone(&target),
            Arc::default(),
            Past::None,
            Instant::now(),
        );
        old.count_losses();
        let counted = dropped(DropReason::Memory);
        let told = old.losses();

        flood(2);
        new.heritage.losses = Some(losses_by_key(told));
        new.add(key, copy, Arc::clone(&target), Arc::default(), Past::Counted, Instant::now());
        new.count_losses();

        assert_eq!((counted, dropped(DropReason::Memory)), (3, 5));
    }

    /// A still shard that serves one address.
    struct Still {
        shard: Shard,
        address: SocketAddr,
        balancer: Arc<Balancer>,
    }

    impl Still {
        fn start(address: [u8; 4], backends: &[&Arc<Backend>]) -> Self {
            let address = SocketAddr::from((address, 5300));
            let balancer = balancer(Family::V4, backends);
            let target = Arc::new(ArcSwap::from_pointee(Target::serving(&balancer)));
            let mut still = Self { shard: still_shard(), address, balancer };
            let socket = bind_udp(address).expect("a free address");
            still.shard.add(still.key(), socket, target, Arc::default(), Past::None, Instant::now());
            still
        }

        fn key(&self) -> ListenKey {
            ListenKey::new(self.address.ip(), self.address.port(), Protocol::Udp)
        }

        fn client(&self) -> UdpSocket {
            let client = plain(loopback());
            client.connect(self.address).expect("connected");
            client
        }

        /// One turn with everything that is ready: on loopback, what was sent before has come.
        fn turn(&mut self) {
            let mut events = Vec::with_capacity(EVENTS);
            let timeout = Timespec { tv_sec: 0, tv_nsec: 0 };
            epoll::wait(&self.shard.epoll, spare_capacity(&mut events), Some(&timeout)).expect("events");
            let _ = self.shard.turn(&events, Instant::now()); // nobody is there to command it
        }
    }

    fn forwarded(backend: &UdpSocket) -> SocketAddr {
        backend.recv_from(&mut [0; 16]).expect("a datagram").1
    }

    #[test]
    fn given_an_answer_waits_when_its_flow_is_evicted_in_the_same_turn_then_the_client_still_gets_it() {
        let pod = plain(loopback());
        let endpoint = backend(1, pod.local_addr().expect("bound"));
        let mut still = Still::start([127, 18, 2, 2], &[&endpoint]);
        let clients = [still.client(), still.client(), still.client()];
        for client in &clients[..2] {
            client.send(b"question").expect("sent");
            still.turn();
            pod.send_to(b"answer", forwarded(&pod)).expect("sent");
        }

        clients[2].send(b"question").expect("sent");
        still.turn();

        assert_eq!(endpoint.stats.closed.get(CloseReason::Evicted), 1, "two flows for one client address");
        assert_eq!(answer(&clients[0]), b"answer");
        assert_eq!(answer(&clients[1]), b"answer");
    }

    #[test]
    fn given_an_answer_waits_behind_a_refusal_when_both_are_heard_then_the_client_still_gets_it() {
        let pod = plain(loopback());
        let endpoint = backend(1, pod.local_addr().expect("bound"));
        let mut still = Still::start([127, 18, 2, 3], &[&endpoint]);
        let client = still.client();
        client.send(b"question").expect("sent");
        still.turn();
        pod.send_to(b"answer", forwarded(&pod)).expect("sent");
        drop(pod);
        client.send(b"too late").expect("sent");
        still.shard.forward(0, Instant::now()); // refused before the answer was read

        still.turn();

        assert_eq!(answer(&client), b"answer");
        assert_eq!(endpoint.stats.closed.get(CloseReason::Refused), 1);
        assert_eq!(endpoint.stats.downstream_datagrams.get(), 1);
    }

    #[test]
    fn given_a_copy_of_a_listeners_socket_when_the_listener_is_removed_then_the_shard_hears_of_it_no_more() {
        let mut still = Still::start([127, 18, 2, 4], &[]);
        let copy = still.shard.listeners[0].as_ref().expect("a listener").socket.try_clone().expect("a descriptor");

        still.shard.remove(&still.key(), Instant::now());
        still.client().send(b"for the copy").expect("sent");

        let mut events = Vec::with_capacity(EVENTS);
        let timeout = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&still.shard.epoll, spare_capacity(&mut events), Some(&timeout)).expect("no event");
        assert!(events.is_empty(), "it would be awake for ever");
        assert_eq!(copy.recv(&mut [0; 16]).expect("a datagram"), 12);
    }

    #[test]
    fn f35_given_a_socket_has_lost_datagrams_when_its_shard_begins_anew_then_they_are_not_counted_again() {
        let mut still = Still::start([127, 18, 2, 5], &[]);
        let socket = &still.shard.listeners[0].as_ref().expect("a listener").socket;
        socket2::SockRef::from(socket).set_recv_buffer_size(4096).expect("a small queue");
        let client = still.client();
        let lost = |still: &Still| still.balancer.port.stats.dropped.get(DropReason::Memory);
        for _ in 0..BATCH {
            client.send(&[0; 512]).expect("sent");
        }
        still.turn();
        client.send(b"brings the number").expect("sent");
        still.turn();
        let before = lost(&still);
        assert!(before > 0, "the queue was too small");

        still.shard.begin_anew();
        client.send(b"brings it again").expect("sent");
        still.turn();

        assert_eq!(lost(&still), before);
    }

    #[test]
    fn t107_given_a_filter_that_comes_and_goes_when_datagrams_are_dropped_then_each_is_counted_once_for_its_reason() {
        let mut still = Still::start([127, 18, 2, 6], &[]);
        let (key, client, stranger) = (still.key(), still.client(), plain(SocketAddr::from(([127, 18, 2, 7], 0))));
        let only: IpNet = client.local_addr().expect("bound").ip().into();
        let guarded = Target { source_ranges: [only].into(), ..Target::serving(&still.balancer) };
        let filter = Filter::of_target(&guarded, Family::V4).expect("short");
        let counted = |still: &Still, reason| still.balancer.port.stats.dropped.get(reason);
        still.shard.listeners[0].as_ref().expect("a listener").target.store(Arc::new(guarded));
        client.send(b"waits with an older number").expect("sent");

        still.shard.set_filter(&key, filter.as_ref());
        for _ in 0..3 {
            stranger.send_to(b"unheard", still.address).expect("sent");
        }
        still.shard.set_filter(&key, filter.as_ref()); // reads the number, and puts the same in its place
        assert_eq!(counted(&still, DropReason::DeniedAddress), 3);
        still.turn();
        stranger.send_to(b"unheard", still.address).expect("sent");
        client.send(b"brings the number").expect("sent");
        still.turn();
        assert_eq!(counted(&still, DropReason::DeniedAddress), 4);
        still.shard.set_filter(&key, None);
        stranger.send_to(b"judged by the shard", still.address).expect("sent");
        still.turn();

        assert_eq!(counted(&still, DropReason::DeniedAddress), 5);
        assert_eq!(counted(&still, DropReason::Memory), 0);
    }

    #[test]
    fn t191_given_a_refusal_is_met_only_when_sending_when_a_run_is_sent_then_all_of_it_goes_to_another_backend() {
        let (dead, alive) = (plain(loopback()), plain(loopback()));
        let refusing = backend(1, dead.local_addr().expect("bound"));
        let serving = backend(2, alive.local_addr().expect("bound"));
        drop(dead);
        let balancer = balancer(Family::V4, &[&refusing, &serving]);
        let address = SocketAddr::from(([127, 18, 2, 1], 5300));
        let mut shard = still_shard();
        let key = ListenKey::new(address.ip(), address.port(), Protocol::Udp);
        let target = Arc::new(ArcSwap::from_pointee(Target::serving(&balancer)));
        shard.add(key, bind_udp(address).expect("a free address"), target, Arc::default(), Past::None, Instant::now());
        let client = plain(loopback());

        client.send_to(b"lost", address).expect("sent");
        shard.forward(0, Instant::now()); // on loopback, the refusal has come before this returns
        client.send_to(b"first", address).expect("sent");
        client.send_to(b"second", address).expect("sent");
        shard.forward(0, Instant::now());

        let mut buffer = [0; 16];
        assert_eq!(alive.recv(&mut buffer).expect("a datagram"), 5);
        assert_eq!(alive.recv(&mut buffer).expect("a datagram"), 6);
        assert_eq!(refusing.stats.closed.get(CloseReason::Refused), 1);
        assert_eq!(serving.stats.upstream_datagrams.get(), 2);
        assert_eq!(balancer.port.stats.retries.get(), 1);
    }

    #[test]
    fn f16_given_a_datagram_that_the_kernel_will_not_take_when_a_batch_is_sent_then_the_others_leave() {
        let (sender, receiver) = (plain(loopback()), plain(loopback()));
        let mut batch = Batch::default();
        for payload in [b"a", b"b", b"c"] {
            let own = sender.local_addr().expect("bound");
            receiver.send_to(payload, own).expect("sent");
        }
        while batch.count() < 3 {
            batch.receive(sender.as_fd(), BATCH).expect("on loopback they are here already");
        }
        batch.set_peer(1, SocketAddr::from(([127, 0, 0, 1], 0))); // nobody can be sent to there

        let (mut moved, mut failed) = (Tally::default(), Vec::new());
        let slots = [0, 1, 2];
        let sent = |batch: &Batch, from, end| moved += batch.measure(&slots, from, end);
        send_all(&mut batch, &sender, &slots, Place::default(), To::Peers, sent, |refusal| {
            failed.push(refusal.at.position);
            count_unsent(refusal, |reason, count| assert_eq!((reason, count), (DropReason::Unreachable, 1)))
        });

        assert_eq!((moved, failed), (Tally { datagrams: 2, bytes: 2 }, vec![1]));
    }
}
