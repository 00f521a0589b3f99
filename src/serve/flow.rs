//! UDP flows: which client's datagrams go to which backend, for how long, and who makes room at a limit.
//!
//! Pure: time, seed, datagrams and choices are arguments, verdicts come out. Sockets and batches are in
//! `shard`; what a flow counts at its begin and its end is counted here, so that gauges and table agree.
//!
//! A flow begins with a client's datagram and moves on as both sides speak:
//!
//! ```text
//! unreplied ──answer──▶ answered ──client again──▶ stream      each has its own idle time
//!     ▲                    │                         │
//!     └──── re-picked at the client's next datagram ─┴── backend's port unreachable
//! ```

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::SharedSeed;
use foldhash::fast::SeedableRandomState;

use crate::serve::balancer::{Backend, PortState, Tried};
use crate::serve::room::{Ages, FlowLimits, Place, Room};
use crate::serve::slab::{Chain, Id, Slab};
use crate::stats::{CloseReason, ConnectFailure, DropReason};

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

/// Where a new flow is to go.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The backend that gets its datagrams.
    pub backend: Arc<Backend>,
    /// The ServicePort that the backend belongs to. A listener may be pointed to another one under a live flow.
    pub port: Arc<PortState>,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowState {
    /// No answer yet.
    Unreplied,
    /// An answer, and nothing from the client since.
    Answered,
    /// The client spoke again after an answer.
    Stream,
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
    /// Flows by the second in which to look at them again.
    wheel: [Chain; WHEEL_SLOTS],
    /// The addresses that this process itself sends replies from.
    own_addresses: HashSet<SocketAddr, SeedableRandomState>,
}

/// The chains that run through a flow.
const LANES: usize = 4;
const AGE: usize = 0;
const CLIENT_AGE: usize = 1;
const LISTENER: usize = 2;
const WHEEL: usize = 3;

const WHEEL_SLOTS: usize = 64;

/// Seconds. A stream that has been silent for longer may be evicted where nothing lesser is left: a spoofer that
/// sends twice can make streams too, but keeping them busy costs it a datagram each few seconds.
const SILENT_STREAM: u32 = 10;

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
}

/// The way to a flow's backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leg {
    /// Chosen; the shell is opening a socket.
    Opening {
        /// True where an earlier backend refused.
        again: bool,
    },
    Open,
    /// The backend's host said that nobody listens; the next datagram goes elsewhere.
    Refused,
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
#[derive(Debug)]
struct Clock {
    zero: Instant,
    /// The second up to which the wheel has been turned.
    turned: u32,
}

impl Clock {
    const START: u32 = 3600;

    fn second(&self, now: Instant) -> u32 {
        let elapsed = now.saturating_duration_since(self.zero).as_secs();
        Self::START.saturating_add(u32::try_from(elapsed).unwrap_or(u32::MAX))
    }
}

impl FlowTable {
    /// An empty table. The seed makes its hashes hard to aim at.
    pub fn new(limits: FlowLimits, seed: u64, now: Instant) -> Self {
        let hashes = SeedableRandomState::with_seed(seed, SharedSeed::global_random());
        Self {
            room: Room::new(limits),
            clock: Clock { zero: now, turned: Clock::START },
            flows: Slab::default(),
            by_key: HashMap::with_hasher(hashes.clone()),
            ages: Ages::default(),
            clients: HashMap::with_hasher(hashes.clone()),
            listeners: Slab::default(),
            wheel: [Chain::default(); WHEEL_SLOTS],
            own_addresses: HashSet::with_hasher(hashes),
        }
    }

    /// How many flows there are.
    pub fn count(&self) -> usize {
        self.flows.count()
    }

    /// Takes a listener in; its flows live as long as `idle` says.
    pub fn add_listener(&mut self, idle: IdleTimes) -> ListenerId {
        let idle = [idle.unreplied, idle.answered, idle.stream].map(whole_seconds);
        ListenerId(self.listeners.insert(Listener { idle, flows: Chain::default() }))
    }

    /// Forgets a listener and closes its flows.
    pub fn remove_listener(&mut self, listener: ListenerId, reason: CloseReason, mut close: impl FnMut(FlowId)) {
        self.close_where(listener, reason, |_, _| true, &mut close);
        self.listeners.remove(listener.0);
    }

    /// Notes an address that this process sends replies from: whoever sends from there is the other end of a loop.
    pub fn add_own_address(&mut self, address: SocketAddr) {
        self.own_addresses.insert(address);
    }

    /// Forgets an address of [`Self::add_own_address`].
    pub fn remove_own_address(&mut self, address: SocketAddr) {
        self.own_addresses.remove(&address);
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

    /// The shell has a socket for the flow: it begins to count.
    pub fn opened(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let Leg::Opening { again } = flow.leg else { return };
        flow.leg = Leg::Open;
        let (service, backend) = (&flow.choice.port.stats, &flow.choice.backend.stats);
        if again {
            service.retries.increment()
        } else {
            service.accepted.increment()
        }
        backend.flows.increment();
        backend.active_flows.increment();
    }

    /// The shell could not open a socket for the flow: it never was.
    pub fn failed(&mut self, id: FlowId, failure: ConnectFailure) {
        let Some(flow) = self.flows.get(id).filter(|flow| matches!(flow.leg, Leg::Opening { .. })) else { return };
        flow.choice.backend.stats.connect_failures.count(failure);
        self.close(id, CloseReason::Unreachable);
    }

    /// The backend answered: says for which listener and client, if the flow is alive.
    pub fn on_reply(&mut self, id: FlowId, now: Instant) -> Option<(ListenerId, SocketAddr)> {
        let second = self.clock.second(now);
        let flow = self.flows.get(id)?;
        let peer = (flow.listener, flow.client);
        let state = flow.state.max(FlowState::Answered);
        self.refresh(id, state, second);
        Some(peer)
    }

    /// The network says that the backend cannot be reached (`Refused`: nobody listens on its port; `Unreachable`).
    ///
    /// The shell closes the socket. The client's next datagram goes to another backend, if there is one.
    pub fn on_refused(&mut self, id: FlowId, reason: CloseReason, now: Instant) {
        let second = self.clock.second(now);
        let Some(flow) = self.flows.get_mut(id).filter(|flow| flow.leg == Leg::Open) else { return };
        let failure = match reason {
            CloseReason::Refused => ConnectFailure::Refused,
            _ => ConnectFailure::Unreachable,
        };
        flow.choice.backend.stats.connect_failures.count(failure);
        flow.end_leg(reason);
        flow.leg = Leg::Refused;
        self.refresh(id, FlowState::Unreplied, second);
    }

    /// Closes the flows of a listener whose client's backend may not keep them, so that the client's next datagram
    /// begins a flow to one that may.
    pub fn sweep(
        &mut self,
        listener: ListenerId,
        mut keeps: impl FnMut(IpAddr, &Choice) -> bool,
        mut close: impl FnMut(FlowId),
    ) {
        let leaves = |client, choice: &Choice| !keeps(client, choice);
        self.close_where(listener, CloseReason::EndpointRemoved, leaves, &mut close);
    }

    /// Closes the flows that have been silent for their idle time. Work is proportional to the flows that are looked
    /// at: each about once in its idle time.
    pub fn expire(&mut self, now: Instant, mut close: impl FnMut(FlowId)) {
        let second = self.clock.second(now);
        let from = (self.clock.turned + 1).max(second.saturating_sub(WHEEL_SLOTS as u32 - 1));
        self.clock.turned = self.clock.turned.max(second);
        for slot in (from..=second).map(wheel_slot) {
            let mut next = self.flows.first(std::mem::take(&mut self.wheel[slot]));
            while let Some(id) = next {
                next = self.flows.after(WHEEL, id);
                self.look_again(id, second, &mut close);
            }
        }
    }

    /// The time of the next [`Self::expire`] that may have work; `None` without flows.
    pub fn next_expiry(&self) -> Option<Instant> {
        let next = u64::from(self.clock.turned + 1 - Clock::START);
        (self.flows.count() > 0).then(|| self.clock.zero + Duration::from_secs(next))
    }

    /// Where the flow goes, if it is alive.
    pub fn choice(&self, id: FlowId) -> Option<&Choice> {
        self.flows.get(id).map(|flow| &flow.choice)
    }

    /// All flows that have a backend, the longest silent first.
    pub fn export(&self, now: Instant) -> Vec<FlowRecord> {
        let second = self.clock.second(now);
        let flows = self.ages.iter(&self.flows, AGE).map(|(_, flow)| flow);
        let mut records: Vec<_> = flows.filter(|flow| flow.leg == Leg::Open).map(|flow| flow.record(second)).collect();
        records.sort_by_key(|record| std::cmp::Reverse(record.silent));
        records
    }

    /// Takes over a flow of another process, to the listener that stands for the record's; `None` at a limit or where
    /// the client has a flow already. The shell goes on as after [`Verdict::Open`].
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
        let mine = self.clients.get(&record.client.ip()).map_or(0, Ages::count);
        let known = self.by_key.contains_key(&FlowKey::new(listener, record.client));
        if known || self.room.place(mine, self.flows.count()) != Place::Free {
            return None;
        }
        Some(self.insert(listener, record.client, choice, record.state, last))
    }

    /// Ends all flows for a reason and forgets all listeners: for a shell that has lost track of them.
    pub fn reset(&mut self, reason: CloseReason, seed: u64, now: Instant) {
        self.end_all(reason);
        let own_addresses = self.own_addresses.clone();
        *self = Self::new(self.room.limits(), seed, now);
        self.own_addresses = own_addresses;
    }

    fn end_all(&mut self, reason: CloseReason) {
        self.ages.iter(&self.flows, AGE).for_each(|(_, flow)| flow.end_leg(reason));
        self.ages = Ages::default();
    }

    /// A datagram of a flow that is there.
    fn go_on(
        &mut self,
        id: FlowId,
        second: u32,
        mut pick: impl FnMut(&Tried) -> Result<Choice, DropReason>,
    ) -> Verdict {
        let Some(flow) = self.flows.get_mut(id) else { return Verdict::Drop(DropReason::Unreachable) };
        if flow.leg != Leg::Refused {
            let state = if flow.state == FlowState::Unreplied { FlowState::Unreplied } else { FlowState::Stream };
            self.refresh(id, state, second);
            return Verdict::Forward(id);
        }
        let mut tried = Tried::default();
        tried.add(&flow.choice.backend);
        match pick(&tried).or_else(|_| pick(&Tried::default())) {
            Ok(choice) => {
                flow.choice = choice;
                flow.leg = Leg::Opening { again: true };
                self.refresh(id, FlowState::Unreplied, second);
                Verdict::Open { flow: id, evicted: None }
            }
            Err(reason) => {
                self.close(id, CloseReason::EndpointRemoved); // counts nothing: the leg has ended before
                Verdict::Drop(reason)
            }
        }
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
        if self.own_addresses.contains(&client) {
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
        let least = |ages: &Ages| ages.least(&self.flows, |flow| second > flow.last + SILENT_STREAM);
        let victim = match self.room.place(mine.count(), self.flows.count()) {
            Place::Free => return Ok(None),
            Place::OwnFlow => least(&mine),
            Place::OwnFlowFirst => least(&mine).or_else(|| least(&self.ages)),
            Place::AnyFlow => least(&self.ages),
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
        let leg = Leg::Opening { again: false };
        let id = self.flows.insert(Flow { client, listener, choice, leg, state, last, due: 0 });
        self.by_key.insert(FlowKey::new(listener, client), id);
        self.clients.entry(client.ip()).or_default().enter(&mut self.flows, CLIENT_AGE, state, id);
        self.ages.enter(&mut self.flows, AGE, state, id);
        if let Some(listener) = self.listeners.get_mut(listener.0) {
            self.flows.append(LISTENER, &mut listener.flows, id);
        }
        if self.flows.count() == 1 {
            self.clock.turned = self.clock.turned.max(last); // nobody turns the wheel while it is empty
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
        let Some(flow) = self.flows.get(id) else { return };
        let due = self.end_of(flow).clamp(self.clock.turned + 1, self.clock.turned + WHEEL_SLOTS as u32 - 1);
        self.flows.append(WHEEL, &mut self.wheel[wheel_slot(due)], id);
        if let Some(flow) = self.flows.get_mut(id) {
            flow.due = due;
        }
    }

    fn unschedule(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id) else { return };
        self.flows.detach(WHEEL, &mut self.wheel[wheel_slot(flow.due)], id);
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

    fn close_where(
        &mut self,
        listener: ListenerId,
        reason: CloseReason,
        mut leaves: impl FnMut(IpAddr, &Choice) -> bool,
        close: &mut impl FnMut(FlowId),
    ) {
        let Some(chain) = self.listeners.get(listener.0).map(|listener| listener.flows) else { return };
        let mut next = self.flows.first(chain);
        while let Some(id) = next {
            next = self.flows.after(LISTENER, id);
            if self.flows.get(id).is_some_and(|flow| leaves(flow.client.ip(), &flow.choice)) {
                self.close(id, reason);
                close(id);
            }
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
    /// Counts the end of the way to the backend, if there is one.
    fn end_leg(&self, reason: CloseReason) {
        if self.leg == Leg::Open {
            self.choice.backend.stats.closed.count(reason);
            self.choice.backend.stats.active_flows.decrement();
        }
    }

    fn record(&self, second: u32) -> FlowRecord {
        FlowRecord {
            listener: self.listener,
            client: self.client,
            backend: self.choice.backend.address,
            state: self.state,
            silent: Duration::from_secs(u64::from(second.saturating_sub(self.last))),
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
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

fn wheel_slot(second: u32) -> usize {
    second as usize % WHEEL_SLOTS
}

#[cfg(test)]
#[path = "flow_simulation.rs"]
mod simulation;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{ObjectName, Protocol, ServicePortName};
    use crate::stats::BackendStats;

    /// A table with one listener, and a clock that moves by hand.
    struct Bench {
        table: FlowTable,
        listener: ListenerId,
        now: Instant,
        port: Arc<PortState>,
        closed: Vec<FlowId>,
    }

    impl Bench {
        fn new(flows: usize) -> Self {
            let now = Instant::now();
            let limits = FlowLimits::split(flows, 1).next().expect("one shard");
            let mut table = FlowTable::new(limits, 1, now);
            let listener = table.add_listener(IdleTimes::default());
            let name =
                ServicePortName { service: ObjectName::parse("dns"), port: "dns".into(), protocol: Protocol::Udp };
            Self { table, listener, now, port: Arc::new(PortState::new(name)), closed: Vec::new() }
        }

        fn backend(id: u32) -> Arc<Backend> {
            let address = SocketAddr::from(([10, 0, 0, 1], 53));
            Arc::new(Backend { id, address, stats: BackendStats::default() })
        }

        fn choose(&self, backend: &Arc<Backend>) -> Choice {
            Choice { backend: Arc::clone(backend), port: Arc::clone(&self.port) }
        }

        /// A datagram; a flow that it opens gets its socket.
        fn datagram(&mut self, from: &str, backend: &Arc<Backend>) -> Verdict {
            let choice = self.choose(backend);
            let client = from.parse().expect("an address");
            let verdict = self.table.on_datagram(self.listener, client, self.now, |_| Ok(choice.clone()));
            if let Verdict::Open { flow, .. } = verdict {
                self.table.opened(flow);
            }
            self.table.check();
            verdict
        }

        fn flow(&mut self, from: &str, backend: &Arc<Backend>) -> FlowId {
            match self.datagram(from, backend) {
                Verdict::Open { flow, .. } | Verdict::Forward(flow) => flow,
                Verdict::Drop(reason) => panic!("dropped: {reason}"),
            }
        }

        fn reply(&mut self, flow: FlowId) {
            assert!(self.table.on_reply(flow, self.now).is_some(), "the flow is alive");
            self.table.check();
        }

        fn pass(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
            self.table.expire(self.now, |flow| self.closed.push(flow));
            self.table.check();
        }
    }

    #[test]
    fn t181_given_a_flow_when_nobody_speaks_for_its_idle_time_then_it_ends_and_the_gauge_is_zero() {
        let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
        let flow = bench.flow("10.9.0.1:1000", &backend);

        bench.pass(10);
        assert_eq!((bench.closed.len(), backend.stats.active_flows.get()), (0, 1), "not early");
        bench.pass(1);

        assert_eq!(bench.closed, [flow]);
        assert_eq!(backend.stats.active_flows.get(), 0);
        assert_eq!(backend.stats.closed.get(CloseReason::IdleUnreplied), 1);
        assert_eq!(bench.table.next_expiry(), None, "an empty table needs no clock");
    }

    #[test]
    fn t181_given_each_state_when_time_passes_then_its_own_idle_time_counts() {
        let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
        let answered = bench.flow("10.9.0.1:1000", &backend);
        let stream = bench.flow("10.9.0.1:1001", &backend);
        bench.reply(answered);
        bench.reply(stream);
        bench.flow("10.9.0.1:1001", &backend);

        bench.pass(11);
        assert_eq!(bench.closed, [answered]);
        bench.pass(49);
        assert_eq!(bench.closed.len(), 1);
        bench.pass(1);

        assert_eq!(bench.closed, [answered, stream]);
        assert_eq!(backend.stats.closed.get(CloseReason::Idle), 2);
    }

    #[test]
    fn t182_given_a_flow_when_either_side_speaks_then_its_idle_time_begins_anew() {
        let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
        let flow = bench.flow("10.9.0.1:1000", &backend);

        for _ in 0..20 {
            bench.pass(9);
            assert_eq!(bench.datagram("10.9.0.1:1000", &backend), Verdict::Forward(flow));
        }
        for _ in 0..20 {
            bench.pass(9);
            bench.reply(flow);
        }

        assert!(bench.closed.is_empty());
        bench.pass(11);
        assert_eq!(bench.closed, [flow]);
    }

    #[test]
    fn t183_given_two_clients_ports_and_scopes_when_they_send_then_each_has_its_own_flow() {
        let (mut bench, backend) = (Bench::new(32), Bench::backend(1));
        let clients = ["10.9.0.1:1000", "10.9.0.1:1001", "10.9.0.2:1000", "[fe80::1%1]:1000", "[fe80::1%2]:1000"];

        let flows: HashSet<_> = clients.iter().map(|client| bench.flow(client, &backend)).collect();

        assert_eq!(flows.len(), clients.len());
        assert_eq!(bench.port.stats.accepted.get(), clients.len() as u64);
    }

    #[test]
    fn t191_given_a_backend_refuses_when_the_client_sends_again_then_another_backend_is_picked() {
        let (mut bench, [first, second]) = (Bench::new(8), [1, 2].map(Bench::backend));
        let flow = bench.flow("10.9.0.1:1000", &first);
        bench.table.on_refused(flow, CloseReason::Refused, bench.now);
        bench.table.check();
        let choices = [bench.choose(&first), bench.choose(&second)];
        let pick = |tried: &Tried| {
            choices.iter().find(|choice| !tried.contains(&choice.backend)).cloned().ok_or(DropReason::NoEndpoints)
        };

        let client = "10.9.0.1:1000".parse().expect("an address");
        let verdict = bench.table.on_datagram(bench.listener, client, bench.now, pick);
        bench.table.opened(flow);

        assert_eq!(verdict, Verdict::Open { flow, evicted: None });
        assert_eq!(bench.table.choice(flow).map(|choice| choice.backend.id), Some(2));
        assert_eq!((first.stats.active_flows.get(), second.stats.active_flows.get()), (0, 1));
        assert_eq!(first.stats.closed.get(CloseReason::Refused), 1);
        assert_eq!((bench.port.stats.accepted.get(), bench.port.stats.retries.get()), (1, 1));
    }

    #[test]
    fn t191_given_the_only_backend_refuses_when_the_client_sends_again_then_it_is_tried_again() {
        let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
        let flow = bench.flow("10.9.0.1:1000", &backend);
        bench.table.on_refused(flow, CloseReason::Refused, bench.now);
        let choice = bench.choose(&backend);

        let client = "10.9.0.1:1000".parse().expect("an address");
        let verdict = bench.table.on_datagram(bench.listener, client, bench.now, |tried| {
            if tried.contains(&choice.backend) { Err(DropReason::NoEndpoints) } else { Ok(choice.clone()) }
        });

        assert_eq!(verdict, Verdict::Open { flow, evicted: None });
    }

    #[test]
    fn t190_given_an_endpoint_leaves_when_swept_then_its_flows_end_and_others_stay() {
        let (mut bench, [gone, kept]) = (Bench::new(8), [1, 2].map(Bench::backend));
        let (first, second) = (bench.flow("10.9.0.1:1000", &gone), bench.flow("10.9.0.1:1001", &kept));

        let mut closed = Vec::new();
        bench.table.sweep(bench.listener, |_, choice| choice.backend.id == 2, |flow| closed.push(flow));
        bench.table.check();

        assert_eq!(closed, [first]);
        assert_eq!(gone.stats.closed.get(CloseReason::EndpointRemoved), 1);
        assert!(matches!(bench.datagram("10.9.0.1:1000", &kept), Verdict::Open { .. }));
        assert_eq!(bench.datagram("10.9.0.1:1001", &kept), Verdict::Forward(second));
    }

    #[test]
    fn t194_given_a_full_table_when_new_clients_come_then_the_oldest_unreplied_flow_goes_first() {
        let (mut bench, backend) = (Bench::new(4), Bench::backend(1));
        let flows: Vec<_> = (1..=4).map(|host| bench.flow(&format!("10.9.0.{host}:1000"), &backend)).collect();
        bench.reply(flows[0]);

        let evicted = |verdict| match verdict {
            Verdict::Open { evicted, .. } => evicted,
            other => panic!("{other:?}"),
        };
        assert_eq!(evicted(bench.datagram("10.9.1.1:1000", &backend)), Some(flows[1]));
        assert_eq!(evicted(bench.datagram("10.9.1.2:1000", &backend)), Some(flows[2]));

        assert_eq!(backend.stats.closed.get(CloseReason::Evicted), 2);
        assert_eq!(backend.stats.active_flows.get(), 4);
    }

    #[test]
    fn t194_given_a_full_table_of_finished_exchanges_when_new_clients_come_then_one_under_way_is_kept() {
        let (mut bench, backend) = (Bench::new(4), Bench::backend(1));
        let flows: Vec<_> = (1..=4).map(|host| bench.flow(&format!("10.9.0.{host}:1000"), &backend)).collect();
        flows[1..].iter().for_each(|flow| bench.reply(*flow));

        let verdict = bench.datagram("10.9.1.1:1000", &backend);

        assert!(matches!(verdict, Verdict::Open { evicted, .. } if evicted == Some(flows[1])), "{verdict:?}");
        bench.reply(flows[0]);
    }

    #[test]
    fn t194_given_a_table_full_of_busy_streams_when_a_client_comes_then_it_is_refused_until_one_falls_silent() {
        let (mut bench, backend) = (Bench::new(4), Bench::backend(1));
        for host in 1..=4 {
            let flow = bench.flow(&format!("10.9.0.{host}:1000"), &backend);
            bench.reply(flow);
            bench.flow(&format!("10.9.0.{host}:1000"), &backend);
        }

        assert_eq!(bench.datagram("10.9.1.1:1000", &backend), Verdict::Drop(DropReason::FlowLimit));
        bench.pass(11);

        assert!(matches!(bench.datagram("10.9.1.1:1000", &backend), Verdict::Open { evicted: Some(_), .. }));
    }

    #[test]
    fn t195_given_one_client_sweeps_its_source_ports_when_others_have_flows_then_it_evicts_only_its_own() {
        let (mut bench, backend) = (Bench::new(64), Bench::backend(1));
        let others: Vec<_> = (1..=8).map(|host| bench.flow(&format!("10.9.0.{host}:1000"), &backend)).collect();

        for port in 1..=2000 {
            bench.flow(&format!("10.9.1.1:{port}"), &backend);
        }

        assert_eq!(bench.table.count(), others.len() + 16, "a quarter of 64, and the others'");
        assert!(others.iter().all(|flow| bench.table.choice(*flow).is_some()));
    }

    #[test]
    fn given_a_flood_from_many_sources_when_a_light_client_opens_more_flows_then_it_never_evicts_its_own() {
        let (mut bench, backend) = (Bench::new(256), Bench::backend(1));
        let stream = bench.flow("10.8.0.1:1000", &backend);
        bench.reply(stream);
        bench.flow("10.8.0.1:1000", &backend);

        for round in 0..200_u32 {
            let (a, aaaa) = (format!("10.8.0.1:{}", 2000 + 2 * round), format!("10.8.0.1:{}", 2001 + 2 * round));
            let queries = [bench.flow(&a, &backend), bench.flow(&aaaa, &backend)];
            for spoofed in 0..32 {
                bench.flow(&format!("10.9.{round}.{spoofed}:1000"), &backend);
            }
            queries.into_iter().for_each(|flow| bench.reply(flow)); // both are alive
            if round % 20 == 0 {
                bench.pass(1);
                bench.reply(stream);
            }
        }

        assert_eq!(bench.table.count(), 256);
    }

    #[test]
    fn t200_given_a_source_that_no_sender_has_when_it_sends_then_the_datagram_is_dropped() {
        let (mut bench, backend) = (Bench::new(8), Bench::backend(1));

        for source in ["255.255.255.255:9", "224.0.0.1:9", "0.0.0.0:9", "10.0.0.1:0", "[ff02::1]:9", "[::]:9"] {
            assert_eq!(bench.datagram(source, &backend), Verdict::Drop(DropReason::DeniedAddress), "{source}");
        }
        assert_eq!(bench.table.count(), 0);
    }

    #[test]
    fn given_a_source_that_is_a_listener_of_ours_when_it_sends_then_the_loop_ends_here() {
        let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
        let listener = "10.96.0.10:53";
        bench.table.add_own_address(listener.parse().expect("an address"));

        assert_eq!(bench.datagram(listener, &backend), Verdict::Drop(DropReason::Loop));
    }

    #[test]
    fn given_a_socket_cannot_be_opened_when_reported_then_the_flow_never_was() {
        let (mut bench, backend) = (Bench::new(8), Bench::backend(1));
        let (client, choice) = ("10.9.0.1:1000".parse().expect("an address"), bench.choose(&backend));
        let verdict = bench.table.on_datagram(bench.listener, client, bench.now, |_| Ok(choice.clone()));
        let Verdict::Open { flow, .. } = verdict else { panic!("{verdict:?}") };

        bench.table.failed(flow, ConnectFailure::FdLimit);
        bench.table.check();

        assert_eq!((bench.table.count(), bench.port.stats.accepted.get(), backend.stats.flows.get()), (0, 0, 0));
        assert_eq!(backend.stats.connect_failures.get(ConnectFailure::FdLimit), 1);
        assert!(CloseReason::ALL.iter().all(|reason| backend.stats.closed.get(*reason) == 0));
    }

    #[test]
    fn t192_given_exported_flows_when_imported_then_backend_state_and_silence_are_kept() {
        let (mut old, backend) = (Bench::new(8), Bench::backend(1));
        let stream = old.flow("10.9.0.1:1000", &backend);
        old.reply(stream);
        old.flow("10.9.0.1:1000", &backend);
        old.pass(7);
        old.flow("10.9.0.2:1000", &backend);

        let records = old.table.export(old.now);
        let mut new = Bench::new(8);
        for record in &records {
            let choice = new.choose(&backend);
            let flow = new.table.import(new.listener, record, choice, new.now).expect("room");
            new.table.opened(flow);
            new.table.check();
        }

        assert_eq!(records.iter().map(|record| record.silent.as_secs()).collect::<Vec<_>>(), [7, 0]);
        assert_eq!(new.table.export(new.now), records);
        drop(old);
        assert_eq!(backend.stats.active_flows.get(), 2, "the old table counted its own out");
        new.pass(53);
        assert_eq!((new.table.count(), new.closed.len()), (1, 1), "unreplied is over, the stream has a second left");
        new.pass(1);
        assert_eq!(new.table.count(), 0);
    }

    #[test]
    fn given_two_shards_when_one_is_flooded_then_the_other_keeps_its_guaranteed_places() {
        let mut limits = FlowLimits::split(64, 2);
        let (mut flooded, mut quiet, backend) = (Bench::new(1), Bench::new(1), Bench::backend(1));
        for bench in [&mut flooded, &mut quiet] {
            bench.table = FlowTable::new(limits.next().expect("two shards"), 1, bench.now);
            bench.listener = bench.table.add_listener(IdleTimes::default());
        }

        for host in 0..200 {
            flooded.flow(&format!("10.9.0.{host}:1000"), &backend);
        }
        for host in 0..200 {
            quiet.flow(&format!("10.9.0.{host}:1000"), &backend);
        }

        assert_eq!((flooded.table.count(), quiet.table.count()), (48, 16));
        flooded.pass(11);
        quiet.flow("10.9.1.1:1000", &backend);
        assert_eq!(quiet.table.count(), 17, "shared places come back");
    }
}
