//! The running listeners and balancers, and how each step of a plan becomes true.
//!
//! Owned by `control`, by value; server tasks hold only their target cells and balancers. Which steps to
//! take, and in what order, is decided in `plan`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::endpoints::UsableEndpoint;
use crate::name::{BalancerKey, Family, ListenKey, Protocol, Scope, ServicePortName};
use crate::plan::{self, Backends, Listener, Side, Step};
use crate::serve::balancer::{Backend, Balancer, PortState, Table};
use crate::serve::tcp::{TcpServer, TcpShared};
use crate::serve::udp::UdpShards;
use crate::serve::{Target, TargetCell, Verdict, socket, udp};

/// A failed bind is tried again after this time at first,
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// and never later than this: a port that becomes free is taken within 5 s.
const LAST_RETRY: Duration = Duration::from_secs(4);

/// An address could not be listened on. Its Service's other listeners are not affected.
#[derive(Debug, thiserror::Error)]
#[error("{service}: cannot listen on {key}")]
pub struct BindError {
    /// Whose listener it is.
    pub service: ServicePortName,
    /// Where it should be.
    pub key: ListenKey,
    /// What the kernel said.
    pub source: io::Error,
}

/// A listener that should run and could not be bound.
#[derive(Debug)]
struct FailedListener {
    wanted: Listener,
    error: BindError,
    wait: Duration,
    due: Instant,
}

/// What runs. Steps change it; nothing else does.
#[derive(Debug)]
pub struct Listeners {
    listeners: BTreeMap<ListenKey, Running>,
    failed: BTreeMap<ListenKey, FailedListener>,
    balancers: BTreeMap<BalancerKey, Arc<Balancer>>,
    ports: BTreeMap<ServicePortName, Port>,
    inside: Arc<[IpNet]>,
    outside_only: Arc<[IpNet]>,
    tcp: Arc<TcpShared>,
    udp: UdpShards,
}

/// A bound listener.
#[derive(Debug)]
struct Running {
    port: ServicePortName,
    target: TargetCell,
    socket: Socket,
}

/// Who holds a bound listener's socket.
#[derive(Debug)]
enum Socket {
    /// A task accepts from it.
    Tcp(Arc<OwnedFd>, TcpServer),
    /// Nobody: its port is held, connects are refused.
    ParkedTcp(Arc<OwnedFd>),
    /// A shard reads from it.
    Udp,
    /// Nobody: senders get port unreachable.
    ParkedUdp(UdpSocket),
}

/// A ServicePort's state, its backends and its listeners.
#[derive(Debug)]
struct Port {
    state: Arc<PortState>,
    backends: HashMap<SocketAddr, Arc<Backend>>,
    listeners: BTreeSet<ListenKey>,
    next_backend: u32,
}

impl Listeners {
    /// Nothing runs yet. `inside` is what counts as this node and its pods.
    pub fn new(inside: Arc<[IpNet]>, tcp: Arc<TcpShared>, udp: UdpShards) -> Self {
        Self {
            listeners: BTreeMap::new(),
            failed: BTreeMap::new(),
            balancers: BTreeMap::new(),
            ports: BTreeMap::new(),
            inside,
            outside_only: Arc::from([]),
            tcp,
            udp,
        }
    }

    /// Carries steps out, in their order. A listener that cannot be bound becomes [`Listeners::failed`] and hurts no other.
    pub async fn apply(&mut self, steps: Vec<Step>, now: Instant) {
        for step in steps {
            match step {
                Step::Swap(key, backends) => self.swap(key, &backends),
                Step::Bind(key, listener) => self.bind(key, listener, FIRST_RETRY, now).await,
                Step::Point(key, listener) | Step::Revive(key, listener) | Step::Park(key, listener) => {
                    self.point(key, listener, now).await;
                }
                Step::Unbind(key) => self.unbind(key).await,
                Step::Retire(key) => self.retire(&key),
            }
        }
    }

    /// The listeners that should run and do not, with the error of the last try.
    pub fn failed(&self) -> impl Iterator<Item = (&ListenKey, &BindError)> {
        self.failed.iter().map(|(key, failed)| (key, &failed.error))
    }

    /// True where the listener is bound.
    pub fn is_bound(&self, key: &ListenKey) -> bool {
        self.listeners.contains_key(key)
    }

    /// When the next failed listener is due for another try.
    pub fn next_retry(&self) -> Option<Instant> {
        self.failed.values().map(|failed| failed.due).min()
    }

    /// Tries the failed listeners that are due. True when something changed.
    pub async fn retry(&mut self, now: Instant) -> bool {
        let due: Vec<_> = self.failed.iter().filter(|(_, failed)| failed.due <= now).map(|(key, _)| *key).collect();
        let before = self.failed.len();
        for key in due {
            if let Some(failed) = self.failed.remove(&key) {
                self.bind(key, failed.wanted, (failed.wait * 2).min(LAST_RETRY), now).await;
            }
        }
        self.failed.len() != before
    }

    /// The state of a ServicePort: for status.
    pub fn port(&self, name: &ServicePortName) -> Option<&Arc<PortState>> {
        self.ports.get(name).map(|port| &port.state)
    }

    /// A backend of a ServicePort: for status.
    pub fn backend(&self, port: &ServicePortName, address: SocketAddr) -> Option<&Arc<Backend>> {
        self.ports.get(port)?.backends.get(&address)
    }

    /// How many listeners are bound.
    pub fn bound_count(&self) -> usize {
        self.listeners.len()
    }

    /// Closes every listener; open connections go on.
    pub async fn unbind_all(&mut self) {
        self.failed.clear();
        let keys: Vec<_> = self.listeners.keys().copied().collect();
        for key in keys {
            self.unbind(key).await;
        }
    }

    fn swap(&mut self, key: BalancerKey, wanted: &Backends) {
        let port = self.ports.entry(key.port.clone()).or_insert_with(|| Port::new(key.port.clone()));
        port.state.affinity.set_timeout(wanted.affinity_timeout);
        let table = port.table(wanted);
        match self.balancers.get(&key) {
            Some(balancer) => balancer.swap(table),
            None => {
                let balancer = Balancer::new(key.clone(), Arc::clone(&port.state), table);
                self.balancers.insert(key.clone(), Arc::new(balancer));
            }
        }
        self.forget_backends(&key.port);
        if key.port.protocol == Protocol::Udp {
            self.sweep(&key);
        }
    }

    /// Flows of backends that left `serving` end now, so that their next datagram reaches a live one.
    fn sweep(&self, key: &BalancerKey) {
        let Some(port) = self.ports.get(&key.port) else { return };
        for listener in port.listeners.iter().filter(|listener| Family::of(listener.address.ip()) == key.family) {
            self.udp.sweep(*listener);
        }
    }

    /// Drops the backends that no table of the ServicePort names any more; connections keep theirs alive.
    fn forget_backends(&mut self, name: &ServicePortName) {
        let tables: Vec<_> = self.balancers_of(name).map(|balancer| balancer.table()).collect();
        if let Some(port) = self.ports.get_mut(name) {
            port.backends.retain(|_, backend| tables.iter().any(|table| table.serves(backend)));
        }
    }

    fn balancers_of(&self, name: &ServicePortName) -> impl Iterator<Item = &Arc<Balancer>> {
        let first = BalancerKey { port: name.clone(), family: Family::V4, scope: Scope::Cluster };
        let last = BalancerKey { port: name.clone(), family: Family::V6, scope: Scope::Local };
        self.balancers.range(first..=last).map(|(_, balancer)| balancer)
    }

    /// Opens a listener, or notes why it could not be opened and when to try again.
    async fn bind(&mut self, key: ListenKey, wanted: Listener, retry_after: Duration, now: Instant) {
        let Some(target) = self.target(&key, &wanted) else {
            debug_assert!(false, "{key}: planned without a balancer");
            return;
        };
        let target: TargetCell = Arc::new(ArcSwap::from_pointee(target));
        match self.open(key, &wanted, &target) {
            Ok(socket) => {
                if let Some(port) = self.ports.get_mut(&wanted.port) {
                    port.listeners.insert(key);
                }
                self.listeners.insert(key, Running { port: wanted.port, target, socket });
            }
            Err(source) => self.fail(key, wanted, source, retry_after, now),
        }
    }

    fn fail(&mut self, key: ListenKey, wanted: Listener, source: io::Error, retry_after: Duration, now: Instant) {
        let error = BindError { service: wanted.port.clone(), key, source };
        self.failed.insert(key, FailedListener { wanted, error, wait: retry_after, due: now + retry_after });
    }

    fn open(&self, key: ListenKey, wanted: &Listener, target: &TargetCell) -> io::Result<Socket> {
        match (key.protocol, wanted.target.parked()) {
            (Protocol::Tcp, parked) => {
                let listener = Arc::new(socket::listen_tcp(key)?);
                if parked {
                    socket::park_tcp(&listener)?;
                    return Ok(Socket::ParkedTcp(listener));
                }
                self.accept_from(key, listener, &wanted.target, target)
            }
            (Protocol::Udp, true) => Ok(Socket::ParkedUdp(udp::hold_udp(key.address)?)),
            (Protocol::Udp, false) => {
                self.udp.add(key, udp::bind_udp(key.address)?, Arc::clone(target));
                Ok(Socket::Udp)
            }
            (Protocol::Sctp, _) => Err(io::Error::new(io::ErrorKind::Unsupported, "SCTP is not served")),
        }
    }

    fn accept_from(
        &self,
        key: ListenKey,
        listener: Arc<OwnedFd>,
        planned: &plan::Target,
        target: &TargetCell,
    ) -> io::Result<Socket> {
        filter(&listener, planned)?;
        let server = TcpServer::start(Arc::clone(&listener), key, Arc::clone(target), Arc::clone(&self.tcp))?;
        Ok(Socket::Tcp(listener, server))
    }

    /// Gives a listener another target, and its socket the state that the target asks for.
    async fn point(&mut self, key: ListenKey, wanted: Listener, now: Instant) {
        if let Some(failed) = self.failed.get_mut(&key) {
            failed.error.service = wanted.port.clone();
            failed.wanted = wanted;
            return;
        }
        let Some(target) = self.target(&key, &wanted) else {
            debug_assert!(false, "{key}: planned without a balancer");
            return;
        };
        let Some(running) = self.listeners.remove(&key) else { return };
        running.target.store(Arc::new(target));
        self.disown(&running.port, &key);
        match self.settle(key, running.socket, &wanted, &running.target).await {
            Ok(socket) => {
                if let Some(port) = self.ports.get_mut(&wanted.port) {
                    port.listeners.insert(key);
                }
                self.listeners.insert(key, Running { port: wanted.port, target: running.target, socket });
            }
            Err(source) => self.fail(key, wanted, source, FIRST_RETRY, now),
        }
    }

    /// Parks or revives a bound socket as its new target says.
    async fn settle(
        &self,
        key: ListenKey,
        socket: Socket,
        wanted: &Listener,
        target: &TargetCell,
    ) -> io::Result<Socket> {
        match (socket, wanted.target.parked()) {
            (Socket::Tcp(listener, server), true) => {
                server.stop().await; // A parked socket that is still registered makes its event loop spin.
                socket::park_tcp(&listener)?;
                Ok(Socket::ParkedTcp(listener))
            }
            (Socket::Tcp(listener, server), false) => {
                filter(&listener, &wanted.target)?;
                Ok(Socket::Tcp(listener, server))
            }
            (Socket::ParkedTcp(listener), false) => {
                socket::revive_tcp(&listener)?;
                self.accept_from(key, listener, &wanted.target, target)
            }
            (Socket::Udp, true) => {
                self.udp.remove(key).await;
                Ok(Socket::ParkedUdp(udp::hold_udp(key.address)?))
            }
            (Socket::ParkedUdp(holder), false) => {
                drop(holder);
                self.udp.add(key, udp::bind_udp(key.address)?, Arc::clone(target));
                Ok(Socket::Udp)
            }
            (socket, _) => Ok(socket),
        }
    }

    async fn unbind(&mut self, key: ListenKey) {
        self.failed.remove(&key);
        let Some(running) = self.listeners.remove(&key) else { return };
        self.disown(&running.port, &key);
        match running.socket {
            Socket::Tcp(_, server) => drop(server.stop().await),
            Socket::Udp => self.udp.remove(key).await,
            Socket::ParkedTcp(_) | Socket::ParkedUdp(_) => {}
        }
    }

    fn disown(&mut self, port: &ServicePortName, key: &ListenKey) {
        if let Some(port) = self.ports.get_mut(port) {
            port.listeners.remove(key);
        }
    }

    fn retire(&mut self, key: &BalancerKey) {
        self.balancers.remove(key);
        self.forget_backends(&key.port);
        if self.balancers_of(&key.port).next().is_none() {
            self.ports.remove(&key.port);
        }
    }

    /// The running form of a planned target; `None` where a side names a balancer that is not there.
    fn target(&self, key: &ListenKey, wanted: &Listener) -> Option<Target> {
        let port = Arc::clone(&self.ports.get(&wanted.port)?.state);
        let family = Family::of(key.address.ip());
        let verdict = |side: &Side| -> Option<Verdict> {
            Some(match side.verdict {
                plan::Verdict::Serve => {
                    let key = BalancerKey { port: wanted.port.clone(), family, scope: side.scope };
                    Verdict::Serve(Arc::clone(self.balancers.get(&key)?))
                }
                plan::Verdict::Reject => Verdict::Reject,
                plan::Verdict::Drop => Verdict::Drop,
            })
        };
        let plan::Target { outside, inside } = &wanted.target;
        let inside_of = if outside == inside { &self.outside_only } else { &self.inside };
        Some(Target { port, outside: verdict(outside)?, inside: verdict(inside)?, inside_of: Arc::clone(inside_of) })
    }
}

/// Where both sides drop, the kernel does it: clients time out, as they would without anybody there.
///
/// Where only one side does, the server task turns its connections away (a reset).
fn filter(listener: &OwnedFd, target: &plan::Target) -> io::Result<()> {
    let drops = |side: &Side| side.verdict == plan::Verdict::Drop;
    if drops(&target.outside) && drops(&target.inside) {
        socket::drop_all(listener)
    } else {
        socket::drop_none(listener)
    }
}

impl Port {
    fn new(name: ServicePortName) -> Self {
        Self {
            state: Arc::new(PortState::new(name)),
            backends: HashMap::new(),
            listeners: BTreeSet::new(),
            next_backend: 0,
        }
    }

    /// A table of the planned endpoints: a backend that is known keeps its counters and its id.
    fn table(&mut self, wanted: &Backends) -> Table {
        let picks = wanted.usable.picks.iter().map(|endpoint| self.backend(endpoint)).collect();
        let serving: Vec<_> = wanted.usable.serving.iter().map(|endpoint| self.backend(endpoint)).collect();
        Table::new(picks, &serving)
    }

    fn backend(&mut self, endpoint: &UsableEndpoint) -> Arc<Backend> {
        let next = &mut self.next_backend;
        let backend = self.backends.entry(endpoint.address).or_insert_with(|| {
            *next = next.wrapping_add(1);
            Arc::new(Backend::new(*next, endpoint.address))
        });
        Arc::clone(backend)
    }
}
