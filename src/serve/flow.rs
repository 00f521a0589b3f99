//! UDP flows: which client's datagrams go to which backend, for how long, and who makes room at a limit.
//!
//! Pure: time, seed, datagrams and choices are arguments, verdicts come out. Sockets and batches are in `shard`, who
//! makes room at a limit is `room`, when to look at a flow again is `wheel`. What a flow counts at its begin and its
//! end is counted here, so that gauges and table agree; an access log is told here, too, so that it has the same words.
//!
//! A flow begins with a client's datagram and moves on as both sides speak:
//!
//! ```text
//! unreplied ──answer──▶ answered ──client again──▶ stream      each has its own idle time
//!     ▲                    │                         │
//!     └──── re-picked at the client's next datagram ─┴── backend's port unreachable, or its endpoint has left
//! ```
//!
//! An endpoint that leaves may be asked already: its pod has a while to finish, and the answer on its way is the client's
//! only one. So a flow that may wait for an answer parts with its backend at the client's next datagram, not before.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::SharedSeed;
use foldhash::fast::SeedableRandomState;
use serde::{Deserialize, Serialize};

use crate::serve::access::Draft;
use crate::serve::balancer::{Backend, PortState, Tried};
use crate::serve::room::{Ages, FlowLimits, Place, Room};
use crate::serve::slab::{Chain, Id, Slab};
use crate::serve::wheel::Wheel;
use crate::stats::{CloseReason, ConnectFailure, DropReason, Entry};

/// Names a flow for as long as it lives; [`Id::index`] may index the sockets of a shell.
pub type FlowId = Id;

/// Names a listener of a shard for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(Id);

impl ListenerId {
    /// The slot: below the largest number of listeners that the shard had at once.
    pub fn index(self) -> usize {
        self.0.index()
    }
}

/// How long a flow lives without a datagram in either direction, by what it has seen. Kept to the second: a flow
/// is never closed early, and at most one second late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleTimes {
    /// The backend has not answered. Default 10 s.
    pub unreplied: Duration,
    /// The backend has answered, the client has not spoken again: one exchange, as in DNS. Default 10 s.
    pub answered: Duration,
    /// The client has spoken again after an answer. Default 60 s.
    pub stream: Duration,
}

impl Default for IdleTimes {
    fn default() -> Self {
        let short = Duration::from_secs(10); // twice what resolvers wait for a late answer
        Self { unreplied: short, answered: short, stream: Duration::from_secs(60) }
    }
}

impl IdleTimes {
    /// Flows stay.
    pub(crate) const NEVER: Self = Self { unreplied: Duration::MAX, answered: Duration::MAX, stream: Duration::MAX };

    /// By state, in the order of [`FlowState::ALL`].
    fn seconds(self) -> [u32; 3] {
        [self.unreplied, self.answered, self.stream].map(whole_seconds)
    }
}

/// Where a new flow is to go.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The backend that gets its datagrams.
    pub backend: Arc<Backend>,
    /// The ServicePort that the backend belongs to. A listener may be pointed to another one under a live flow.
    pub port: Arc<PortState>,
    /// Where the client came in.
    pub entry: Entry,
}

/// What to do with a client's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send it over the flow's socket.
    Forward(FlowId),
    /// Open a socket to [`FlowTable::choice`], report [`FlowTable::opened`] or [`FlowTable::failed`], then send it.
    Open {
        /// The flow that begins, or begins anew with another backend.
        flow: FlowId,
        /// The flow that made room: it is gone, its socket must be closed.
        evicted: Option<FlowId>,
    },
    /// Nobody gets it. The caller counts it.
    Drop(DropReason),
}

/// What a flow has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowState {
    /// No answer yet.
    Unreplied,
    /// An answer, and nothing from the client since.
    Answered,
    /// The client spoke again after an answer.
    Stream,
}

/// What becomes of a flow when the table or the target of its listener has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its backend may keep it.
    Stays,
    /// Its endpoint has left: answers that are on their way may come, and the client's next datagram goes elsewhere.
    Parts,
    /// Its client may not reach that backend any more: it ends now.
    Ends,
}

impl FlowState {
    /// Every state, in the order of declaration.
    pub const ALL: [Self; 3] = [Self::Unreplied, Self::Answered, Self::Stream];

    fn close_reason(self) -> CloseReason {
        if self == Self::Unreplied { CloseReason::IdleUnreplied } else { CloseReason::Idle }
    }
}

/// A flow as a plain value: what another process needs to go on with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// The listener that the client sends to.
    pub listener: ListenerId,
    /// The client.
    pub client: SocketAddr,
    /// The address of its backend.
    pub backend: SocketAddr,
    /// What the flow has seen.
    pub state: FlowState,
    /// How long neither side has spoken, in whole seconds.
    pub silent: Duration,
    /// True where its endpoint has left: answers may still come, and the client's next datagram goes elsewhere.
    pub parting: bool,
}

/// The flows of one UDP shard. Owned by the shard's thread, by value.
#[derive(Debug)]
pub struct FlowTable {
    room: Room,
    clock: Clock,
    flows: Slab<Flow, LANES>,
    by_key: HashMap<FlowKey, FlowId, SeedableRandomState>,
    /// All flows, the longest silent first.
    ages: Ages,
    /// The same for each client address.
    clients: HashMap<IpAddr, Ages, SeedableRandomState>,
    listeners: Slab<Listener, 1>,
    wheel: Wheel,
    /// The addresses that this process itself sends replies from.
    own_addresses: HashSet<(IpAddr, u16), SeedableRandomState>,
}

/// The chains that run through a flow.
const LANES: usize = 4;
const AGE: usize = 0;
const CLIENT_AGE: usize = 1;
const LISTENER: usize = 2;
const WHEEL: usize = 3;

/// Seconds. A stream that has been silent for longer may be evicted where nothing lesser is left: a spoofer that
/// sends twice can make streams too, but keeping them busy costs it a datagram each few seconds.
const SILENT_STREAM: u32 = 10;

/// The same where a stream makes room for a new flow of its own client address, and nothing else can: behind the address
/// may be a gateway, whose clients come and go within seconds. Whoever speaks each second keeps its flow.
const SILENT_OWN_STREAM: u32 = 1;

#[derive(Debug)]
struct Flow {
    client: SocketAddr,
    listener: ListenerId,
    choice: Choice,
    leg: Leg,
    state: FlowState,
    /// The second of its last datagram. Chains of age are in the order of it.
    last: u32,
    /// The second in which the wheel looks at it: never after its end.
    due: u32,
    /// Backends that it was given so far, at least 1; counted up to 255.
    tries: u8,
    /// What an access log is told when the way to its backend ends.
    draft: Option<Box<Draft>>,
}

/// The way to a flow's backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leg {
    /// Chosen; the shell is opening a socket.
    Opening {
        /// True where the flow has begun to count with an earlier backend.
        begun: bool,
    },
    Open,
    /// The endpoint has left; answers still come, and the next datagram goes elsewhere.
    Parting,
    /// Nobody listens there, or there is no way there; the next datagram goes elsewhere.
    Refused {
        /// As in `Opening`.
        begun: bool,
    },
}

/// Client and listener as plain numbers, which hash fast. An IPv4 address is its mapped form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FlowKey {
    ip: u128,
    scope_id: u32,
    port: u16,
    listener: ListenerId,
}

impl FlowKey {
    fn new(listener: ListenerId, client: SocketAddr) -> Self {
        let (ip, scope_id) = match client {
            SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), 0),
            SocketAddr::V6(v6) => (*v6.ip(), v6.scope_id()),
        };
        Self { ip: ip.to_bits(), scope_id, port: client.port(), listener }
    }
}

#[derive(Debug)]
struct Listener {
    /// Seconds, by state.
    idle: [u32; 3],
    flows: Chain,
}

/// Whole seconds since an hour before the table was made: room for flows that are older than the process.
#[derive(Clone, Copy, Debug)]
struct Clock {
    zero: Instant,
}

impl Clock {
    const START: u32 = 3600;

    fn second(&self, now: Instant) -> u32 {
        let elapsed = now.saturating_duration_since(self.zero).as_secs();
        Self::START.saturating_add(u32::try_from(elapsed).unwrap_or(u32::MAX))
    }

    /// When a second begins.
    fn instant(&self, second: u32) -> Instant {
        self.zero + Duration::from_secs(u64::from(second.saturating_sub(Self::START)))
    }
}

impl FlowTable {
    /// An empty table. The seed makes its hashes hard to aim at.
    pub fn new(limits: FlowLimits, seed: u64, now: Instant) -> Self {
        let hashes = SeedableRandomState::with_seed(seed, SharedSeed::global_random());
        Self {
            room: Room::new(limits),
            clock: Clock { zero: now },
            flows: Slab::default(),
            by_key: HashMap::with_hasher(hashes.clone()),
            ages: Ages::default(),
            clients: HashMap::with_hasher(hashes.clone()),
            listeners: Slab::default(),
            wheel: Wheel::new(Clock::START),
            own_addresses: HashSet::with_hasher(hashes),
        }
    }

    /// How many flows there are.
    pub fn count(&self) -> usize {
        self.flows.count()
    }

    /// Takes a listener in; its flows live as long as `idle` says.
    pub fn add_listener(&mut self, idle: IdleTimes) -> ListenerId {
        ListenerId(self.listeners.insert(Listener { idle: idle.seconds(), flows: Chain::default() }))
    }

    /// Gives a listener's flows other idle times, those that are there included. Work is proportional to them.
    pub fn set_idle(&mut self, listener: ListenerId, idle: IdleTimes) {
        let Some(found) = self.listeners.get_mut(listener.0) else { return };
        found.idle = idle.seconds();
        self.visit(listener, |table, id| {
            table.unschedule(id);
            table.schedule(id);
        });
    }

    /// Forgets a listener and closes its flows.
    pub fn remove_listener(&mut self, listener: ListenerId, reason: CloseReason, mut close: impl FnMut(FlowId)) {
        self.visit(listener, |table, id| {
            table.close(id, reason);
            close(id);
        });
        self.listeners.remove(listener.0);
    }

    /// Notes an address that this process sends replies from: whoever sends from there is the other end of a loop.
    pub fn add_own_address(&mut self, address: SocketAddr) {
        self.own_addresses.insert((address.ip(), address.port()));
    }

    /// Forgets an address of [`Self::add_own_address`].
    pub fn remove_own_address(&mut self, address: SocketAddr) {
        self.own_addresses.remove(&(address.ip(), address.port()));
    }

    /// Decides on a client's datagram.
    ///
    /// `pick` chooses a backend that is not among the tried ones; it is asked only where the flow is new or its
    /// backend refused, and in the second case once more, with nothing tried, if there is no other.
    pub fn on_datagram(
        &mut self,
        listener: ListenerId,
        client: SocketAddr,
        now: Instant,
        pick: impl FnMut(&Tried) -> Result<Choice, DropReason>,
    ) -> Verdict {
        let second = self.clock.second(now);
        match self.by_key.get(&FlowKey::new(listener, client)) {
            Some(&flow) => self.go_on(flow, second, pick),
            None => self.begin(listener, client, second, pick),
        }
    }

    /// The shell has a socket for the flow: it begins to count. False where it did before, with another backend.
    pub fn opened(&mut self, id: FlowId) -> bool {
        let Some(flow) = self.flows.get_mut(id) else { return false };
        let Leg::Opening { begun } = flow.leg else { return false };
        flow.leg = Leg::Open;
        let (service, backend) = (&flow.choice.port.stats, &flow.choice.backend.stats);
        if !begun {
            service.accepted.increment();
        }
        backend.flows.increment();
        backend.active_flows.increment();
        !begun
    }

    /// Has an access log told of the end of the way to the flow's backend, in place of an earlier backend's; `None`: not.
    /// To be called once it is [`opened`](Self::opened).
    pub(crate) fn tell(&mut self, id: FlowId, draft: Option<Box<Draft>>) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.draft = draft;
        if let Some(draft) = &mut flow.draft {
            draft.tries = flow.tries.into();
        }
    }

    /// What an access log will be told of the flow.
    pub(crate) fn draft(&self, id: FlowId) -> Option<&Draft> {
        self.flows.get(id)?.draft.as_deref()
    }

    /// Where to add what the flow moves, if an access log is to be told of it. After its end with one backend, and until it
    /// has another one, what it told is still there.
    pub(crate) fn draft_mut(&mut self, id: FlowId) -> Option<&mut Draft> {
        self.flows.get_mut(id)?.draft.as_deref_mut()
    }

    /// The shell could not open a socket for the flow. Where there is no way to the backend, the client's next
    /// datagram goes to another one; where this host lacks something, the flow never was.
    pub fn failed(&mut self, id: FlowId, failure: ConnectFailure) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Leg::Opening { begun } = flow.leg else { return };
        flow.choice.backend.stats.connect_failures.count(failure);
        if failure == ConnectFailure::Unreachable {
            flow.leg = Leg::Refused { begun };
        } else {
            self.close(id, CloseReason::Unreachable); // counts nothing: there was no leg
        }
    }

    /// The backend answered: says for which listener and client, if the flow is alive.
    pub fn on_reply(&mut self, id: FlowId, now: Instant) -> Option<(ListenerId, SocketAddr)> {
        let second = self.clock.second(now);
        let flow = self.flows.get(id)?;
        let (peer, state) = ((flow.listener, flow.client), flow.state.max(FlowState::Answered));
        if flow.leg != Leg::Parting {
            self.refresh(id, state, second);
        }
        Some(peer)
    }

    /// The network says that the backend cannot be reached (`Refused`: nobody listens on its port; `Unreachable`).
    ///
    /// The shell closes the socket. The client's next datagram goes to another backend, if there is one.
    pub fn on_refused(&mut self, id: FlowId, reason: CloseReason, now: Instant) {
        let second = self.clock.second(now);
        let Some(flow) = self.flows.get_mut(id) else { return };
        match flow.leg {
            Leg::Open => {}
            Leg::Parting => return self.close(id, CloseReason::EndpointRemoved), // no answer comes any more
            Leg::Opening { .. } | Leg::Refused { .. } => return,
        }
        let failure = match reason {
            CloseReason::Refused => ConnectFailure::Refused,
            _ => ConnectFailure::Unreachable,
        };
        flow.choice.backend.stats.connect_failures.count(failure);
        flow.end_leg(reason);
        flow.leg = Leg::Refused { begun: true };
        self.refresh(id, FlowState::Unreplied, second);
    }

    /// Judges the flows of a listener anew, by client address and choice. Of those that part, the ones that have their
    /// answer are closed at once; the others have as long as an unreplied flow.
    pub fn sweep(
        &mut self,
        listener: ListenerId,
        now: Instant,
        mut judge: impl FnMut(IpAddr, &Choice) -> Fate,
        mut close: impl FnMut(FlowId),
    ) {
        let second = self.clock.second(now);
        self.visit(listener, |table, id| {
            let Some(flow) = table.flows.get_mut(id) else { return };
            match judge(flow.client.ip(), &flow.choice) {
                Fate::Stays => {}
                Fate::Parts if flow.leg == Leg::Parting => {}
                Fate::Parts if flow.may_wait_for_an_answer() => {
                    flow.leg = Leg::Parting;
                    table.refresh(id, FlowState::Unreplied, second);
                }
                Fate::Parts | Fate::Ends => {
                    table.close(id, CloseReason::EndpointRemoved);
                    close(id);
                }
            }
        });
    }

    /// Closes the flows that have been silent for their idle time. Work is proportional to the flows that are looked
    /// at: each about once in its idle time.
    pub fn expire(&mut self, now: Instant, mut close: impl FnMut(FlowId)) {
        let second = self.clock.second(now);
        for passed in self.wheel.turn(second) {
            let mut next = self.flows.first(self.wheel.take(passed));
            while let Some(id) = next {
                next = self.flows.after(WHEEL, id);
                self.look_again(id, second, &mut close);
            }
        }
    }

    /// The time of the next [`Self::expire`] that may have work; `None` without flows.
    pub fn next_expiry(&self) -> Option<Instant> {
        (self.flows.count() > 0).then(|| self.clock.instant(self.wheel.next()))
    }

    /// Where the flow goes, if it is alive.
    pub fn choice(&self, id: FlowId) -> Option<&Choice> {
        self.flows.get(id).map(|flow| &flow.choice)
    }

    /// All flows that have a backend, the longest silent first. One whose backend refused has none: its client's next datagram
    /// begins it anew in any process.
    pub fn export(&self, now: Instant) -> Vec<(FlowId, FlowRecord)> {
        let second = self.clock.second(now);
        let flows = self.ages.iter(&self.flows, AGE).filter(|(_, flow)| flow.has_backend());
        let mut records: Vec<_> = flows.map(|(id, flow)| (id, flow.record(second))).collect();
        records.sort_by_key(|(_, record)| std::cmp::Reverse(record.silent));
        records
    }

    /// Takes over a flow of another process, to the listener that stands for the record's; `None` where the client has a flow
    /// already. It has its place, whatever the limits are here: new ones wait until it ends. It does not begin by that, but
    /// is open: the shell has its socket.
    ///
    /// To be called in the order of [`Self::export`], before datagrams come.
    pub fn import(
        &mut self,
        listener: ListenerId,
        record: &FlowRecord,
        choice: Choice,
        now: Instant,
    ) -> Option<FlowId> {
        let last = self.clock.second(now).saturating_sub(whole_seconds(record.silent));
        if self.by_key.contains_key(&FlowKey::new(listener, record.client)) {
            return None;
        }
        self.room.find_place_anyway(self.flows.count());
        let id = self.insert(listener, record.client, choice, record.state, last);
        let flow = self.flows.get_mut(id)?;
        flow.leg = if record.parting { Leg::Parting } else { Leg::Open };
        flow.choice.backend.stats.active_flows.increment();
        Some(id)
    }

    /// Another process has the flow: it is none of this table's any more, and has not ended. The shell lets go of its socket.
    pub fn release(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        if flow.has_backend() {
            flow.choice.backend.stats.active_flows.decrement();
            flow.leg = Leg::Refused { begun: true };
            flow.draft = None;
        }
        self.close(id, CloseReason::Drain); // Counts nothing: there is no leg.
    }

    /// Ends all flows for a reason and forgets all listeners: for a shell that has lost track of them.
    pub fn reset(&mut self, reason: CloseReason, seed: u64, now: Instant) {
        self.end_all(reason);
        let own_addresses = self.own_addresses.clone();
        *self = Self::new(self.room.limits(), seed, now);
        self.own_addresses = own_addresses;
    }

    fn end_all(&mut self, reason: CloseReason) {
        // Not by a chain: where this follows a panic, a flow may be missing on it.
        mem::take(&mut self.flows).items().for_each(|flow| flow.end_leg(reason));
    }

    /// A datagram of a flow that is there.
    fn go_on(
        &mut self,
        id: FlowId,
        second: u32,
        mut pick: impl FnMut(&Tried) -> Result<Choice, DropReason>,
    ) -> Verdict {
        let Some(flow) = self.flows.get_mut(id) else { return Verdict::Drop(DropReason::Unreachable) };
        match flow.leg {
            Leg::Open | Leg::Opening { .. } => {
                let state = if flow.state == FlowState::Unreplied { FlowState::Unreplied } else { FlowState::Stream };
                self.refresh(id, state, second);
                Verdict::Forward(id)
            }
            Leg::Parting => match pick(&Tried::default()) {
                Ok(choice) => {
                    flow.end_leg(CloseReason::EndpointRemoved);
                    flow.tries = 0; // who asks now begins a flow of its own
                    self.begin_anew(id, choice, false, second)
                }
                Err(reason) => Verdict::Drop(reason), // what was asked before may be answered still
            },
            Leg::Refused { begun } => {
                let mut tried = Tried::default();
                tried.add(&flow.choice.backend);
                match pick(&tried).or_else(|_| pick(&Tried::default())) {
                    Ok(choice) => {
                        choice.port.stats.retries.increment();
                        self.begin_anew(id, choice, begun, second)
                    }
                    Err(reason) => {
                        self.close(id, CloseReason::EndpointRemoved); // counts nothing: the leg has ended before
                        Verdict::Drop(reason)
                    }
                }
            }
        }
    }

    /// The flow goes to another backend from now on. `begun`: it is the same flow for who counts them.
    fn begin_anew(&mut self, id: FlowId, choice: Choice, begun: bool, second: u32) -> Verdict {
        if let Some(flow) = self.flows.get_mut(id) {
            flow.choice = choice;
            flow.leg = Leg::Opening { begun };
            flow.tries = flow.tries.saturating_add(1);
        }
        self.refresh(id, FlowState::Unreplied, second);
        Verdict::Open { flow: id, evicted: None }
    }

    /// A datagram of nobody known.
    fn begin(
        &mut self,
        listener: ListenerId,
        client: SocketAddr,
        second: u32,
        mut pick: impl FnMut(&Tried) -> Result<Choice, DropReason>,
    ) -> Verdict {
        if !may_be_answered(client) {
            return Verdict::Drop(DropReason::DeniedAddress);
        }
        if self.own_addresses.contains(&(client.ip(), client.port())) {
            return Verdict::Drop(DropReason::Loop);
        }
        let choice = match pick(&Tried::default()) {
            Ok(choice) => choice,
            Err(reason) => return Verdict::Drop(reason),
        };
        match self.make_room(client.ip(), second) {
            Ok(evicted) => {
                let flow = self.insert(listener, client, choice, FlowState::Unreplied, second);
                Verdict::Open { flow, evicted }
            }
            Err(reason) => Verdict::Drop(reason),
        }
    }

    /// Takes a place for one more flow of a client, from another flow if need be.
    fn make_room(&mut self, client: IpAddr, second: u32) -> Result<Option<FlowId>, DropReason> {
        let mine = self.clients.get(&client).copied().unwrap_or_default();
        let least = |ages: &Ages, silence| ages.least(&self.flows, |flow| second > flow.last + silence);
        let own = || least(&mine, SILENT_OWN_STREAM);
        let victim = match self.room.place(mine.count(), self.flows.count()) {
            Place::Free => return Ok(None),
            Place::OwnFlow => own(),
            Place::OwnFlowFirst => {
                // Where a flood fills the table, its flows go before streams that were there.
                least(&mine, SILENT_STREAM).or_else(|| least(&self.ages, SILENT_STREAM)).or_else(own)
            }
            Place::AnyFlow => least(&self.ages, SILENT_STREAM),
        };
        let victim = victim.ok_or(DropReason::FlowLimit)?;
        self.remove(victim, CloseReason::Evicted); // its place is the new flow's
        Ok(Some(victim))
    }

    /// Adds a flow to the map and to every chain. Its place is taken.
    fn insert(
        &mut self,
        listener: ListenerId,
        client: SocketAddr,
        choice: Choice,
        state: FlowState,
        last: u32,
    ) -> FlowId {
        let leg = Leg::Opening { begun: false };
        let id = self.flows.insert(Flow { client, listener, choice, leg, state, last, due: 0, tries: 1, draft: None });
        self.room.enter();
        self.by_key.insert(FlowKey::new(listener, client), id);
        self.clients.entry(client.ip()).or_default().enter(&mut self.flows, CLIENT_AGE, state, id);
        self.ages.enter(&mut self.flows, AGE, state, id);
        if let Some(listener) = self.listeners.get_mut(listener.0) {
            self.flows.append(LISTENER, &mut listener.flows, id);
        }
        if self.flows.count() == 1 {
            self.wheel.skip_to(last); // nobody turns the wheel while it is empty
        }
        self.schedule(id);
        id
    }

    /// Notes a datagram: at most once a second for each flow, unless its state changes.
    fn refresh(&mut self, id: FlowId, state: FlowState, second: u32) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let (client, before) = (flow.client.ip(), flow.state);
        if flow.last == second && before == state {
            return;
        }
        flow.last = second;
        flow.state = state;
        self.ages.leave(&mut self.flows, AGE, before, id);
        self.ages.enter(&mut self.flows, AGE, state, id);
        if let Some(mine) = self.clients.get_mut(&client) {
            mine.leave(&mut self.flows, CLIENT_AGE, before, id);
            mine.enter(&mut self.flows, CLIENT_AGE, state, id);
        }
        if before != state && self.flows.get(id).is_some_and(|flow| self.end_of(flow) < flow.due) {
            self.unschedule(id);
            self.schedule(id);
        }
    }

    /// The first second in which a flow is over if it stays silent. It has then been silent for its whole idle time,
    /// since its last datagram came at some point within the second `last`.
    fn end_of(&self, flow: &Flow) -> u32 {
        let idle = self.listeners.get(flow.listener.0).map_or(0, |listener| listener.idle[flow.state as usize]);
        flow.last.saturating_add(idle).saturating_add(1)
    }

    /// Puts a flow on the wheel at its end, or as late as the wheel reaches.
    fn schedule(&mut self, id: FlowId) {
        let Some(end) = self.flows.get(id).map(|flow| self.end_of(flow)) else { return };
        let due = self.wheel.enter(&mut self.flows, WHEEL, end, id);
        if let Some(flow) = self.flows.get_mut(id) {
            flow.due = due;
        }
    }

    fn unschedule(&mut self, id: FlowId) {
        let Some(due) = self.flows.get(id).map(|flow| flow.due) else { return };
        self.wheel.leave(&mut self.flows, WHEEL, due, id);
    }

    /// Closes a flow that is over and puts one that is not on the wheel again. Its slot's chain is taken off already.
    fn look_again(&mut self, id: FlowId, second: u32, close: &mut impl FnMut(FlowId)) {
        let Some(flow) = self.flows.get(id) else { return };
        let (over, reason) = (self.end_of(flow) <= second, flow.state.close_reason());
        self.schedule(id); // also one that is over: closing takes it off a chain
        if over {
            self.close(id, reason);
            close(id);
        }
    }

    /// Does something to each flow of a listener, which may be its end.
    fn visit(&mut self, listener: ListenerId, mut act: impl FnMut(&mut Self, FlowId)) {
        let Some(chain) = self.listeners.get(listener.0).map(|listener| listener.flows) else { return };
        let mut next = self.flows.first(chain);
        while let Some(id) = next {
            next = self.flows.after(LISTENER, id);
            act(self, id);
        }
    }

    /// Ends a flow and gives its place back.
    fn close(&mut self, id: FlowId, reason: CloseReason) {
        self.remove(id, reason);
        self.room.give_back(self.flows.count());
    }

    /// Ends a flow: off every chain, out of every map. Its place stays taken.
    fn remove(&mut self, id: FlowId, reason: CloseReason) {
        let Some(flow) = self.flows.get(id) else { return };
        let (client, listener, state) = (flow.client, flow.listener, flow.state);
        self.unschedule(id);
        self.ages.leave(&mut self.flows, AGE, state, id);
        if let Some(listener) = self.listeners.get_mut(listener.0) {
            self.flows.detach(LISTENER, &mut listener.flows, id);
        }
        if let Some(mine) = self.clients.get_mut(&client.ip()) {
            mine.leave(&mut self.flows, CLIENT_AGE, state, id);
            if mine.count() == 0 {
                self.clients.remove(&client.ip());
            }
        }
        self.by_key.remove(&FlowKey::new(listener, client));
        if let Some(flow) = self.flows.remove(id) {
            self.room.leave();
            flow.end_leg(reason);
        }
    }
}

/// A table that goes ends its flows: the gauges of backends outlive it.
impl Drop for FlowTable {
    fn drop(&mut self) {
        self.end_all(CloseReason::Drain);
    }
}

impl Flow {
    /// Counts the end of the way to the backend, if there is one, and tells an access log of it. What has to part ends for
    /// that reason, whatever else happens to it first.
    fn end_leg(&self, reason: CloseReason) {
        let reason = match self.leg {
            Leg::Open => reason,
            Leg::Parting => CloseReason::EndpointRemoved,
            Leg::Opening { .. } | Leg::Refused { .. } => return,
        };
        self.choice.backend.stats.closed.count(reason);
        self.choice.backend.stats.active_flows.decrement();
        if let Some(draft) = &self.draft {
            draft.closed(self.choice.backend.address(), reason);
        }
    }

    /// True where its socket leads to somebody.
    fn has_backend(&self) -> bool {
        matches!(self.leg, Leg::Open | Leg::Parting)
    }

    /// False where the client has had an answer to all that it has asked, as far as can be known.
    fn may_wait_for_an_answer(&self) -> bool {
        self.leg == Leg::Open && self.state != FlowState::Answered
    }

    fn record(&self, second: u32) -> FlowRecord {
        FlowRecord {
            listener: self.listener,
            client: self.client,
            backend: self.choice.backend.address(),
            state: self.state,
            silent: Duration::from_secs(u64::from(second.saturating_sub(self.last))),
            parting: self.leg == Leg::Parting,
        }
    }
}

/// False for sources that no single sender can have: an answer would reach nobody, or everybody.
fn may_be_answered(client: SocketAddr) -> bool {
    let ip = client.ip().to_canonical();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    client.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

fn whole_seconds(time: Duration) -> u32 {
    let seconds = time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0));
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "flow_simulation.rs"]
mod simulation;

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
