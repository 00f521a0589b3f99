//! A seeded adversary for the flow table: random steps, a shadow of what must be true, and a check after each.
//!
//! `KUBE_RELAY_SEED=n` replays one seed.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::name::{ObjectName, Protocol, ServicePortName};

/// Seeds and steps of each; the long form is for `KUBE_RELAY_TEST=full`.
const SHORT: (u64, usize) = (50, 1_000);
const LONG: (u64, usize) = (200, 2_000);
const FLOWS: usize = 48;

/// True where the long forms are asked for.
pub(super) fn full() -> bool {
    std::env::var("KUBE_RELAY_TEST").is_ok_and(|value| value == "full")
}

#[test]
fn given_an_adversary_when_it_takes_random_steps_then_the_table_never_contradicts_itself() {
    let replay = std::env::var("KUBE_RELAY_SEED").ok().and_then(|seed| seed.parse().ok());
    let (count, steps) = if full() { LONG } else { SHORT };
    let seeds = replay.map_or(0..count, |seed: u64| seed..seed + 1);
    let began = Instant::now();
    for seed in seeds.clone() {
        let outcome = std::panic::catch_unwind(|| Simulation::new(seed).run(steps));
        assert!(outcome.is_ok(), "failed: replay with KUBE_RELAY_SEED={seed}");
    }
    println!("simulation: {} seeds of {steps} steps in {:.1?}", seeds.count(), began.elapsed());
}

/// The world around a table: listeners, backends, clients, and the sockets that a shell would hold.
struct Simulation {
    random: StdRng,
    now: Instant,
    limits: FlowLimits,
    table: FlowTable,
    listeners: Vec<ListenerId>,
    /// Of every listener that ever was.
    idle: BTreeMap<ListenerId, IdleTimes>,
    port: Arc<PortState>,
    backends: Vec<Arc<Backend>>,
    /// Backends that may be picked, by index.
    live: Vec<usize>,
    sockets: BTreeMap<FlowId, Shadow>,
}

#[derive(Debug, Clone)]
struct Shadow {
    listener: ListenerId,
    client: SocketAddr,
    backend: u32,
    last: Instant,
    state: FlowState,
    refused: bool,
    /// Its endpoint has left: it takes answers, and no datagram.
    parting: bool,
    /// How often it was handed over: each time may round its silence down by a second.
    moves: u64,
}

impl Shadow {
    /// True where datagrams go both ways.
    fn is_open(&self) -> bool {
        !self.refused && !self.parting
    }
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let name = ServicePortName::new(ObjectName::parse("web"), "", Protocol::Udp);
        let limits = FlowLimits::split(FLOWS, 2).next().expect("two shards"); // the other shard stays empty
        let backends = (0..5).map(|id| {
            let address = SocketAddr::from(([10, 0, 0, id as u8], 53));
            Arc::new(Backend::new(id, address))
        });
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            now,
            table: FlowTable::new(limits.clone(), seed, now),
            limits,
            listeners: Vec::new(),
            idle: BTreeMap::new(),
            port: Arc::new(PortState::new(name)),
            backends: backends.collect(),
            live: vec![0, 1, 2, 3, 4],
            sockets: BTreeMap::new(),
        };
        (0..3).for_each(|_| world.add_listener());
        world
    }

    fn run(mut self, steps: usize) {
        for _ in 0..steps {
            match self.random.random_range(0..1000) {
                0..490 => self.known_client_sends(),
                490..500 => self.everybody_talks(),
                500..650 => self.anybody_sends(),
                650..850 => self.backend_answers(),
                850..900 => self.backend_refuses(),
                900..970 => self.time_passes(),
                970..985 => self.endpoints_change(),
                985..990 => self.listener_goes(),
                990..994 => self.add_listener(),
                994..996 => self.other_idle_times(),
                _ => self.hand_over(),
            }
            self.check();
        }
        let backends = self.backends.clone();
        drop(self.table);
        assert!(backends.iter().all(|backend| backend.stats.active_flows.get() == 0), "a gauge outlived its table");
        assert_eq!(self.limits.free(), FLOWS / 2, "shared places outlived their table");
    }

    fn known_client_sends(&mut self) {
        let [host, port] = [self.random.random_range(0..6), self.random.random_range(1..12)];
        self.datagram(SocketAddr::from(([10, 9, 0, host], 1000 + u16::from(port))));
    }

    fn anybody_sends(&mut self) {
        let ip: [u8; 4] = self.random.random();
        let port = self.random.random();
        self.datagram(SocketAddr::from((ip, port)));
    }

    /// Every open flow becomes a stream.
    fn everybody_talks(&mut self) {
        let open: Vec<_> = self.sockets.iter().filter(|(_, socket)| socket.is_open()).map(|(flow, _)| *flow).collect();
        for flow in open {
            self.answer(flow);
            let socket = self.sockets[&flow].clone();
            self.datagram_to(socket.listener, socket.client);
        }
    }

    fn datagram(&mut self, client: SocketAddr) {
        if let Some(listener) = self.any_listener() {
            self.datagram_to(listener, client);
        }
    }

    fn datagram_to(&mut self, listener: ListenerId, client: SocketAddr) {
        let first = self.random.random_range(0..5);
        let choices: Vec<Choice> = (first..first + 5)
            .map(|index| index % 5)
            .filter(|index| self.live.contains(index))
            .map(|index| Choice {
                backend: Arc::clone(&self.backends[index]),
                port: Arc::clone(&self.port),
                entry: Entry::ClusterIp,
            })
            .collect();
        let mut asked = false;
        let verdict = self.table.on_datagram(listener, client, self.now, |tried| {
            asked = true;
            let untried = choices.iter().find(|choice| !tried.contains(&choice.backend));
            untried.cloned().ok_or(DropReason::NoEndpoints)
        });
        match verdict {
            Verdict::Forward(flow) => {
                assert!(!asked, "a live flow needs no pick");
                let socket = self.sockets.get_mut(&flow).expect("a socket to forward to");
                assert_eq!((socket.listener, socket.client, socket.is_open()), (listener, client, true));
                socket.last = self.now;
                if socket.state != FlowState::Unreplied {
                    socket.state = FlowState::Stream;
                }
            }
            Verdict::Open { flow, evicted } => self.open(listener, client, flow, evicted),
            Verdict::Drop(DropReason::NoEndpoints) => {
                assert!(self.live.is_empty());
                self.sockets.retain(|_, socket| !(socket.refused && socket.client == client));
            }
            Verdict::Drop(DropReason::DeniedAddress) => assert!(!may_be_answered(client)),
            Verdict::Drop(reason) => {
                assert_eq!(reason, DropReason::FlowLimit);
                self.check_need(client);
            }
        }
    }

    /// Nobody is refused where a flow could make room. Silence is kept to the second.
    fn check_need(&self, client: SocketAddr) {
        let own = || self.sockets.values().filter(|socket| socket.client.ip() == client.ip());
        let is_busy = |socket: &Shadow, seconds: u64| {
            socket.state == FlowState::Stream
                && self.now - socket.last < Duration::from_secs(seconds + 1 + socket.moves)
        };
        if own().count() >= FLOWS / 4 {
            return assert!(own().all(|socket| is_busy(socket, 1)), "refused though an own flow could go");
        }
        assert!(self.sockets.len() >= FLOWS * 3 / 4, "refused without need");
        assert!(self.sockets.values().all(|socket| is_busy(socket, 10)), "refused though a flow could go");
        let is_heavy = own().count() >= 2; // an eighth of its share
        assert!(!is_heavy || own().all(|socket| is_busy(socket, 1)), "refused though an own flow could go");
    }

    fn open(&mut self, listener: ListenerId, client: SocketAddr, flow: FlowId, evicted: Option<FlowId>) {
        if let Some(evicted) = evicted {
            let victim = self.sockets.remove(&evicted).expect("an evicted flow was alive");
            let silent = self.now - victim.last;
            let protected = Duration::from_secs(if victim.client.ip() == client.ip() { 1 } else { 10 });
            let is_busy_stream = victim.state == FlowState::Stream && silent < protected;
            assert!(!is_busy_stream, "evicted a stream after {silent:?}");
        }
        if let Some(before) = self.sockets.remove(&flow) {
            assert!(!before.is_open() && before.client == client && before.listener == listener);
            let chosen = self.table.choice(flow).expect("opened").backend.id;
            let other = chosen != before.backend || self.live.len() == 1 || before.parting;
            assert!(other, "the same backend, though there are others");
        }
        let (last, state) = (self.now, FlowState::Unreplied);
        let backend = self.table.choice(flow).expect("opened").backend.id;
        assert!(self.live.contains(&(backend as usize)), "no datagram to an endpoint that left");
        let socket = Shadow { listener, client, backend, last, state, refused: false, parting: false, moves: 0 };
        if self.random.random_bool(0.05) {
            self.table.failed(flow, ConnectFailure::Unreachable);
            self.sockets.insert(flow, Shadow { refused: true, ..socket });
            return;
        }
        if self.random.random_bool(0.05) {
            self.table.failed(flow, ConnectFailure::FdLimit);
            assert!(self.table.choice(flow).is_none());
            return;
        }
        self.table.opened(flow);
        self.sockets.insert(flow, socket);
    }

    fn backend_answers(&mut self) {
        let Some((flow, socket)) = self.any_socket() else { return };
        if !socket.refused {
            self.answer(flow);
        }
    }

    fn answer(&mut self, flow: FlowId) {
        let socket = self.sockets.get_mut(&flow).expect("it was there");
        assert_eq!(self.table.on_reply(flow, self.now), Some((socket.listener, socket.client)));
        if !socket.parting {
            socket.last = self.now;
            socket.state = socket.state.max(FlowState::Answered);
        }
    }

    fn backend_refuses(&mut self) {
        let Some((flow, _)) = self.any_socket() else { return };
        self.table.on_refused(flow, CloseReason::Refused, self.now);
        let socket = self.sockets.get_mut(&flow).expect("it was there");
        if socket.parting {
            self.sockets.remove(&flow);
        } else if !socket.refused {
            (socket.refused, socket.state, socket.last) = (true, FlowState::Unreplied, self.now);
        }
    }

    fn time_passes(&mut self) {
        let millis = match self.random.random_range(0..20) {
            0 => 200_000,
            1..4 => self.random.random_range(10_000..20_000),
            _ => self.random.random_range(0..2_500),
        };
        self.now += Duration::from_millis(millis);
        let mut closed = Vec::new();
        self.table.expire(self.now, |flow| closed.push(flow));
        for flow in closed {
            let socket = self.sockets.remove(&flow).expect("an expired flow was alive, once");
            assert!(self.now - socket.last >= self.idle_time(&socket), "{socket:?} was closed early");
        }
        let is_late =
            |socket: &&Shadow| self.now - socket.last > self.idle_time(socket) + Duration::from_secs(1 + socket.moves);
        let late = self.sockets.values().find(is_late);
        assert!(late.is_none(), "{late:?} should be over");
        assert!(!self.table.is_overdue(self.now));
    }

    fn idle_time(&self, socket: &Shadow) -> Duration {
        let idle = &self.idle[&socket.listener];
        [idle.unreplied, idle.answered, idle.stream][socket.state as usize]
    }

    fn other_idle_times(&mut self) {
        let Some(listener) = self.any_listener() else { return };
        let [unreplied, answered, stream] =
            [0; 3].map(|_| Duration::from_millis(self.random.random_range(1_000..90_000)));
        let idle = IdleTimes { unreplied, answered, stream };
        self.table.set_idle(listener, idle);
        // Kept to the second, upwards.
        let whole = |time: Duration| Duration::from_secs(time.as_millis().div_ceil(1000) as u64);
        let idle = IdleTimes { unreplied: whole(unreplied), answered: whole(answered), stream: whole(stream) };
        self.idle.insert(listener, idle);
        self.now += Duration::from_secs(1); // who is over by the new times ends in the next second
    }

    fn endpoints_change(&mut self) {
        self.live = (0..5).filter(|_| self.random.random_bool(0.6)).collect();
        let mut closed = Vec::new();
        for listener in self.listeners.clone() {
            let is_live = |choice: &Choice| self.live.contains(&(choice.backend.id as usize));
            let judge = |_, choice: &Choice| if is_live(choice) { Fate::Stays } else { Fate::Parts };
            self.table.sweep(listener, self.now, judge, |flow| closed.push(flow));
        }
        for flow in closed {
            let socket = self.sockets.remove(&flow).expect("a swept flow was alive, once");
            assert!(!self.live.contains(&(socket.backend as usize)), "its backend is still there");
            assert!(socket.refused || socket.state == FlowState::Answered, "{socket:?} may wait for an answer");
        }
        let is_live = |socket: &Shadow| self.live.contains(&(socket.backend as usize));
        for socket in self.sockets.values_mut().filter(|socket| !is_live(socket) && !socket.parting) {
            assert!(!socket.refused && socket.state != FlowState::Answered, "{socket:?} should be over");
            (socket.parting, socket.state, socket.last) = (true, FlowState::Unreplied, self.now);
        }
    }

    fn listener_goes(&mut self) {
        if self.listeners.is_empty() {
            return;
        }
        let listener = self.listeners.swap_remove(self.random.random_range(0..self.listeners.len()));
        let mut closed = Vec::new();
        self.table.remove_listener(listener, CloseReason::Drain, |flow| closed.push(flow));
        for flow in closed {
            assert_eq!(self.sockets.remove(&flow).expect("alive, once").listener, listener);
        }
        assert!(self.sockets.values().all(|socket| socket.listener != listener));
    }

    fn add_listener(&mut self) {
        if self.listeners.len() < 4 {
            let listener = self.table.add_listener(IdleTimes::default());
            self.listeners.push(listener);
            self.idle.insert(listener, IdleTimes::default());
        }
    }

    /// Another process takes the flows over.
    fn hand_over(&mut self) {
        let records = self.table.export(self.now);
        assert_eq!(records.len(), self.sockets.values().filter(|socket| !socket.refused).count());
        self.limits = FlowLimits::split(FLOWS, 2).next().expect("two shards");
        let mut table = FlowTable::new(self.limits.clone(), self.random.random(), self.now);
        let renamed: BTreeMap<_, _> =
            self.listeners.iter().map(|old| (*old, table.add_listener(self.idle[old]))).collect();
        let idle = renamed.iter().map(|(old, new)| (*new, self.idle[old])).collect();
        let mut sockets = BTreeMap::new();
        for (old, record) in &records {
            self.table.release(*old);
            let backend = self.backends.iter().find(|backend| backend.address() == record.backend).expect("known");
            let choice = Choice { backend: Arc::clone(backend), port: Arc::clone(&self.port), entry: Entry::ClusterIp };
            let flow = table.import(renamed[&record.listener], record, choice, self.now).expect("room for all");
            table.check();
            let same = |socket: &&Shadow| (socket.listener, socket.client) == (record.listener, record.client);
            let mut socket = self.sockets.values().find(same).expect("exported from a socket").clone();
            socket.listener = renamed[&record.listener];
            socket.moves += 1;
            assert_eq!((socket.backend, socket.state), (backend.id, record.state));
            sockets.insert(flow, socket);
        }
        (self.table, self.sockets, self.idle) = (table, sockets, idle);
        self.listeners = renamed.into_values().collect();
    }

    fn check(&self) {
        self.table.check();
        assert_eq!(self.table.count(), self.sockets.len(), "a flow without a socket, or the other way round");
        assert!(self.sockets.len() <= FLOWS * 3 / 4, "more flows than this shard may have");
        assert_eq!(self.table.next_expiry().is_some(), !self.sockets.is_empty());
        for backend in &self.backends {
            let open = |socket: &&Shadow| !socket.refused && socket.backend == backend.id;
            let expected = self.sockets.values().filter(open).count() as u64;
            let stats = &backend.stats;
            assert_eq!(stats.active_flows.get(), expected, "the gauge of backend {}", backend.id);
            let closed: u64 = CloseReason::ALL.iter().map(|reason| stats.closed.get(*reason)).sum();
            assert_eq!(stats.flows.get(), expected + closed, "each flow that began is open or has ended once");
        }
    }

    fn any_listener(&mut self) -> Option<ListenerId> {
        let count = self.listeners.len();
        (count > 0).then(|| self.listeners[self.random.random_range(0..count)])
    }

    fn any_socket(&mut self) -> Option<(FlowId, Shadow)> {
        let count = self.sockets.len();
        let nth = (count > 0).then(|| self.random.random_range(0..count))?;
        self.sockets.iter().nth(nth).map(|(flow, socket)| (*flow, socket.clone()))
    }
}

impl FlowTable {
    /// Panics where the table contradicts itself. To be called between any two steps.
    pub(super) fn check(&self) {
        let count = self.flows.count();
        assert_eq!(self.by_key.len(), count, "each flow has one key");
        assert_eq!(self.ages.count(), count);
        self.check_ages(AGE, &self.ages, |_| true);
        self.check_clients();
        self.check_listeners();
        self.check_wheel();
        self.room.check(count);
        for (id, flow) in self.ages.iter(&self.flows, AGE) {
            assert_eq!(self.by_key.get(&FlowKey::new(flow.listener, flow.client)), Some(&id), "{id:?} is found");
        }
    }

    fn check_clients(&self) {
        let mut total = 0;
        for (ip, mine) in &self.clients {
            assert!((1..=self.room.per_client()).contains(&mine.count()), "{ip} has {} flows", mine.count());
            self.check_ages(CLIENT_AGE, mine, |flow| flow.client.ip() == *ip);
            total += mine.count();
        }
        assert_eq!(total, self.flows.count(), "each flow belongs to one client address");
    }

    fn check_ages(&self, lane: usize, ages: &Ages, belongs: impl Fn(&Flow) -> bool) {
        for state in FlowState::ALL {
            let (mut last, mut count) = (0, 0);
            for (id, flow) in ages.of_state(state, &self.flows, lane) {
                assert!(flow.state == state && belongs(flow), "{id:?} is on a foreign chain");
                assert!(flow.last >= last, "{id:?} is older than the one before it");
                (last, count) = (flow.last, count + 1);
            }
            assert_eq!(count, ages.count_of(state), "{state:?}");
        }
    }

    fn check_listeners(&self) {
        let mut owners: Vec<_> = self.ages.iter(&self.flows, AGE).map(|(_, flow)| flow.listener).collect();
        owners.sort_unstable();
        owners.dedup();
        let mut total = 0;
        for owner in owners {
            let listener = self.listeners.get(owner.0).expect("flows end with their listener");
            let flows = self.flows.iter(LISTENER, listener.flows);
            total += flows.inspect(|(id, flow)| assert_eq!(flow.listener, owner, "{id:?}")).count();
        }
        assert_eq!(total, self.flows.count(), "each flow is found by its listener");
    }

    fn check_wheel(&self) {
        let mut total = 0;
        for (due, id) in self.wheel.iter(&self.flows, WHEEL) {
            let flow = self.flows.get(id).expect("alive");
            assert_eq!(flow.due, due, "the wheel comes to {id:?} when it says");
            assert!(due <= self.end_of(flow).max(self.wheel.next()), "{id:?} is looked at before it is overdue");
            total += 1;
        }
        assert_eq!(total, self.flows.count(), "each flow is on the wheel");
    }

    fn is_overdue(&self, now: Instant) -> bool {
        let second = self.clock.second(now);
        self.ages.iter(&self.flows, AGE).any(|(_, flow)| self.end_of(flow) <= second)
    }
}
