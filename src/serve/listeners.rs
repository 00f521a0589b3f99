//! The running listeners and balancers, and how each step of a plan becomes true.
//!
//! Owned by `control`, by value; server tasks hold only their target cells and balancers. Which steps to
//! take, and in what order, is decided in `plan`. Balancers and backends are kept in `ports`, sockets follow their
//! targets in `bound`.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use futures_util::future::{join_all, try_join_all};
use ipnet::IpNet;
use tokio::task::coop::consume_budget;
use tracing::info;

use crate::entrance::inside_at;
use crate::fd_store::FdStore;
use crate::frozen::add_all;
use crate::name::{BalancerKey, Family, ListenKey, Protocol, ServicePortName};
use crate::parts::in_parts;
use crate::plan::{self, Backends, Listener, ListenerKind, Side, Step};
use crate::reply_path::ReplyPath;
use crate::serve::balancer::{Backend, Balancer, PortState};
use crate::serve::bound::{Bound, Opened, Servers};
use crate::serve::departed::Departed;
use crate::serve::estate::Estate;
use crate::serve::failures::{Due, Failures};
use crate::serve::fresh::Fresh;
use crate::serve::passed::{Passed, WantedSockets};
use crate::serve::ports::Ports;
use crate::serve::tcp::TcpShared;
use crate::serve::udp::UdpShards;
use crate::serve::{Target, TargetCell, Verdict};
use crate::vips::{Granted, Hold, NoRoute, Vips, Wanted};

pub use crate::serve::failures::BindError;

/// Steps after which the UDP shards are woken: often enough for those who wait, and a hundredth of the wakes.
const FLUSH_AFTER: usize = 64;

/// Listeners that are opened in one go, in which this thread does nothing else: some milliseconds.
const BINDS_AT_ONCE: usize = 512;
/// What makes another thread worth its while: it is begun in a few dozen microseconds, and a listener is opened in ten.
const BINDS_PER_THREAD: usize = 64;
/// More threads would only wait for each other in the kernel: for its tables of ports and of this process's descriptors.
const MOST_BINDERS: usize = 4;

/// Listeners that are named when many are closed that nobody wants.
const TOLD_AT_ONCE: usize = 10;

/// What runs. Steps change it; nothing else does.
#[derive(Debug)]
pub struct Listeners {
    listeners: BTreeMap<ListenKey, Running>,
    /// Those that this batch of steps has bound. They come to the others all at once: a map that grows by thousands of
    /// single ones leaves holes in memory where its first nodes were.
    opened: Vec<(ListenKey, Running)>,
    failures: Failures,
    /// Keys that were bound or closed, or met as a backend, in this batch of steps.
    turned: HashSet<ListenKey, RandomState>,
    /// True from [`Listeners::close`] on: nothing is opened any more.
    closed: bool,
    ports: Ports,
    inside: Arc<[IpNet]>,
    servers: Servers,
    /// How many threads may open listeners at once.
    binders: usize,
    vips: Vips,
    reply_path: ReplyPath,
    /// True once a Service has wanted its clients' addresses preserved.
    is_reply_path_required: bool,
    /// What keeps addresses local that this batch of steps binds.
    granted: Granted,
    /// What is to be bound once [`Listeners::begin`] says so; `None` where it is bound at once.
    held_back: Option<Vec<HeldBack>>,
}

/// A listener that is to be opened.
#[derive(Debug)]
struct Bind {
    key: ListenKey,
    wanted: Listener,
    /// How long it had to wait for this try, if it has failed before.
    waited: Option<Duration>,
}

/// A listener that is to be opened later, with what keeps its address local.
#[derive(Debug)]
struct HeldBack {
    bind: Bind,
    target: Target,
    refused: Option<NoRoute>,
}

/// What has become of sockets that another process has had until now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inherited {
    /// Listeners that are served on them.
    pub(crate) adopted: usize,
    /// Listeners that need others, as these have other options.
    pub(crate) differing: usize,
    /// Listeners that nobody wants any more: theirs are closed.
    pub(crate) unwanted: usize,
}

/// A bound listener.
#[derive(Debug)]
struct Running {
    port: Arc<PortState>,
    target: TargetCell,
    bound: Bound,
}

impl Listeners {
    /// Nothing runs yet. `inside` is what counts as this node and its pods.
    pub fn new(inside: Arc<[IpNet]>, tcp: Arc<TcpShared>, udp: UdpShards) -> Self {
        Self {
            listeners: BTreeMap::new(),
            opened: Vec::new(),
            failures: Failures::default(),
            turned: HashSet::default(),
            closed: false,
            ports: Ports::default(),
            inside,
            servers: Servers::new(tcp, udp),
            binders: available_parallelism().map_or(1, usize::from).min(MOST_BINDERS),
            vips: Vips::default(),
            reply_path: ReplyPath::default(),
            is_reply_path_required: false,
            granted: Granted::default(),
            held_back: None,
        }
    }

    /// Has what is to be bound from now on wait for [`begin`](Self::begin); all else is done as ever.
    pub(crate) fn hold_back(&mut self) {
        self.held_back.get_or_insert_default();
    }

    /// What sockets of another process have to be like for what is held back.
    pub(crate) fn wanted(&self) -> WantedSockets {
        let held_back = self.held_back.iter().flatten();
        let wanted = |HeldBack { bind: Bind { key, wanted, .. }, .. }: &HeldBack| {
            (*key, (wanted.port.clone(), self.servers.most_sockets(key.protocol)))
        };
        WantedSockets { listeners: held_back.map(wanted).collect() }
    }

    /// The sockets of all listeners, for another process. They are served as before.
    ///
    /// # Errors
    /// No descriptor is left for copies.
    pub(crate) async fn lend(&self) -> io::Result<Vec<Passed>> {
        // Asked for at once: each has to wait for a shard that may be busy.
        try_join_all(self.listeners.iter().map(|(key, running)| self.servers.lend(*key, &running.bound))).await
    }

    /// Backends of another process that are none here: their ServicePorts' sums do not fall for want of them.
    pub(crate) fn inherit(&mut self, departed: &BTreeMap<ServicePortName, Vec<Arc<Backend>>>, now: Instant) {
        departed.iter().for_each(|(port, backends)| self.ports.inherit(port, backends, now));
    }

    /// Binds what was held back, on sockets that another process has had where there are some that fit: others here are
    /// like `fresh` ones. That process has let go of them.
    pub(crate) async fn begin(&mut self, passed: Vec<Passed>, fresh: &Fresh, now: Instant) -> Inherited {
        let held_back = self.held_back.take().unwrap_or_default();
        let wanted: HashSet<_, RandomState> = held_back.iter().map(|held_back| held_back.bind.key).collect();
        let passed = passed.into_iter().map(|passed| (passed.key, passed));
        let (mut passed, unwanted) = passed.partition::<BTreeMap<_, _>, _>(|(key, _)| wanted.contains(key));
        let mut count = Inherited { unwanted: unwanted.len(), ..Inherited::default() };
        self.discard(unwanted); // Before others are kept in their place.
        for HeldBack { bind, target, refused } in held_back {
            consume_budget().await;
            let Some(sockets) = passed.remove(&bind.key) else {
                self.open_late(bind, target, refused, now);
                continue;
            };
            match sockets.check(self.servers.most_sockets(bind.key.protocol), fresh) {
                Ok(()) => {
                    count.adopted += 1;
                    self.adopt(bind, target, sockets, now).await;
                }
                Err(difference) => {
                    count.differing += 1;
                    info!(listen = %bind.key, %difference, "the last process's socket is not taken over: it is opened anew");
                    self.servers.discard(sockets);
                    self.servers.store.settled().await; // Until then the address is not free.
                    self.open_late(bind, target, refused, now);
                }
            }
        }
        self.finish().await;
        count
    }

    fn discard(&mut self, unwanted: BTreeMap<ListenKey, Passed>) {
        if unwanted.is_empty() {
            return;
        }
        let told: Vec<_> = unwanted.keys().take(TOLD_AT_ONCE).map(ToString::to_string).collect();
        info!(sockets = unwanted.len(), listen = told.join(", "), "nobody wants these listeners any more: closed");
        unwanted.into_values().for_each(|sockets| self.servers.discard(sockets));
    }

    async fn adopt(&mut self, bind: Bind, target: Target, sockets: Passed, now: Instant) {
        let (port, hold) = (Arc::clone(&target.port), target.address.clone());
        let target: TargetCell = Arc::new(ArcSwap::from_pointee(target));
        let bound = self.servers.take_over(sockets, &bind.wanted, &target).await;
        self.note_bound(bind, port, target, hold, bound, now);
    }

    fn open_late(&mut self, bind: Bind, target: Target, refused: Option<NoRoute>, now: Instant) {
        let opened = match refused {
            Some(reason) => Err(reason.into()),
            None => self.servers.open(bind.key, &bind.wanted, &target),
        };
        self.serve(bind, target, opened, now);
    }

    /// Has somebody make the addresses of Services local before they are bound.
    pub fn with_vips(self, vips: Vips) -> Self {
        Self { vips, ..self }
    }

    /// Has answers to clients' addresses led here where a Service needs that.
    pub fn with_reply_path(self, reply_path: ReplyPath) -> Self {
        Self { reply_path, ..self }
    }

    /// Has sockets kept for the process that comes after a crash of this one.
    pub(crate) fn with_store(mut self, store: FdStore) -> Self {
        self.servers.store = store;
        self
    }

    /// What is called so is not kept any more, whoever has had it kept.
    pub(crate) fn forget_kept(&mut self, name: String) {
        self.servers.store.forget_name(name);
    }

    /// Says how much of what runs is kept, where anything may be.
    pub(crate) fn tell_of_kept(&self) {
        self.servers.store.tell();
    }

    /// Sets what counts as this node and its pods, for targets made from now on. True where it is something else.
    pub fn set_inside(&mut self, inside: Arc<[IpNet]>) -> bool {
        let changed = self.inside != inside;
        self.inside = inside;
        changed
    }

    /// Carries steps out, in their order. A listener that cannot be bound [fails](Listeners::failure) and hurts no other.
    pub async fn apply(&mut self, steps: Vec<Step>, now: Instant) {
        let mut changed_ports = Vec::new();
        let vips = steps.iter().filter_map(|step| match step {
            Step::Bind(key, wanted) => vip(key, wanted),
            _ => None,
        });
        self.require(vips.collect()).await;
        let preserves = |step: &Step| matches!(step, Step::Swap(_, backends) if backends.source.is_preserved());
        if !self.is_reply_path_required && steps.iter().any(preserves) {
            self.reply_path.require().await;
            self.is_reply_path_required = true;
        }
        self.ports.expect(steps.iter().filter_map(|step| match step {
            Step::Swap(key, _) => Some(&key.port),
            _ => None,
        }));
        let mut binds = Vec::new();
        for (count, step) in steps.into_iter().enumerate() {
            consume_budget().await; // Ten thousand steps in one go would keep this thread from what else it is for.
            if count % FLUSH_AFTER == 0 {
                self.servers.udp.flush();
            }
            if binds.len() == BINDS_AT_ONCE || !matches!(step, Step::Bind(..)) {
                self.bind_all(std::mem::take(&mut binds), now).await;
            }
            match step {
                Step::Swap(key, backends) => {
                    changed_ports.push(key.port.clone());
                    self.swap(key, &backends);
                }
                Step::Bind(key, wanted) => binds.push(Bind { key, wanted, waited: None }),
                Step::Point(key, listener) | Step::Revive(key, listener) | Step::Park(key, listener) => {
                    self.point(key, listener, now).await;
                }
                Step::Unbind(key) => self.unbind(key, now).await,
                Step::Retire(key) => {
                    self.ports.retire(&key);
                    changed_ports.push(key.port);
                }
            }
        }
        self.bind_all(binds, now).await;
        // Not at each swap: a backend may leave one scope and come to the other in the same batch.
        let ends = changed_ports.iter().fold(false, |ends, port| self.ports.forget(port, now) | ends);
        if ends {
            self.servers.look_at_backends();
        }
        self.finish().await;
    }

    /// Why a listener that should run does not: the error of the last try.
    pub fn failure(&self, key: &ListenKey) -> Option<&BindError> {
        self.failures.get(key)
    }

    /// The keys whose [failure](Listeners::failure) may be another one than when this was asked last.
    pub fn take_failure_news(&mut self) -> BTreeSet<ListenKey> {
        self.failures.take_news()
    }

    /// The ServicePort that a bound listener belongs to; `None` where it is not bound.
    pub fn owner(&self, key: &ListenKey) -> Option<&ServicePortName> {
        self.listeners.get(key).map(|running| &running.port.name)
    }

    /// When the next failed listener is due for another try.
    pub fn next_retry(&self) -> Option<Instant> {
        self.failures.next_due()
    }

    /// These addresses are local from now on: failed listeners there are due.
    pub fn hasten(&mut self, came: &BTreeSet<IpAddr>, now: Instant) {
        self.failures.hasten(|key| came.contains(&key.ip()), now);
    }

    /// All that failed for another process's sake is due: it has let go.
    pub(crate) fn hasten_all(&mut self, now: Instant) {
        self.failures.hasten(|_| true, now);
    }

    /// Tries the failed listeners that are due.
    pub async fn retry(&mut self, now: Instant) {
        let due = self.failures.take_due(now);
        self.require(due.iter().filter_map(|due| vip(&due.key, &due.wanted)).collect()).await;
        for Due { key, wanted, hold, waited } in due {
            consume_budget().await;
            self.bind_all(vec![Bind { key, wanted, waited: Some(waited) }], now).await;
            drop(hold); // Not before: an address that nobody holds in between would count as one never tried.
        }
        self.finish().await;
    }

    /// What ends each batch of changes. What is told of it afterwards is so: the next datagram goes by the new tables.
    async fn finish(&mut self) {
        self.granted = Granted::default();
        add_all(&mut self.listeners, std::mem::take(&mut self.opened));
        self.servers.udp.settle().await;
        let turned = std::mem::take(&mut self.turned);
        if !turned.is_empty() {
            self.ports.mark_own_backends(&turned, |key| self.listeners.contains_key(key));
        }
    }

    /// The state of a ServicePort: for status.
    pub fn port(&self, name: &ServicePortName) -> Option<&Arc<PortState>> {
        self.ports.get(name).map(|port| &port.state)
    }

    /// A backend of a ServicePort: for status.
    pub fn backend(&self, port: &ServicePortName, address: SocketAddr) -> Option<&Arc<Backend>> {
        self.ports.get(port)?.known_backend(address)
    }

    /// All backends of a ServicePort, of both scopes and families, by address: for status.
    pub fn backends(&self, port: &ServicePortName) -> Arc<[Arc<Backend>]> {
        self.ports.get(port).map(|port| Arc::clone(&port.backends)).unwrap_or_default()
    }

    /// What backends have carried that left a ServicePort; `None` where none has: for status.
    pub fn departed(&self, port: &ServicePortName) -> Option<Arc<Departed>> {
        self.ports.get(port)?.departed.clone()
    }

    /// The balancers of a ServicePort, one for each family and scope that is asked for: for status.
    pub fn balancers(&self, port: &ServicePortName) -> Box<[Arc<Balancer>]> {
        self.ports.get(port).map(|port| port.balancers().into()).unwrap_or_default()
    }

    /// What runs now, for a hand-over.
    pub(crate) fn estate(&self) -> Estate {
        Estate {
            ports: self.ports.parts(),
            tcp: Arc::clone(self.servers.tcp()),
            udp: self.servers.udp.lines(),
            vips: self.vips.clone(),
            reply_path: self.reply_path.clone(),
        }
    }

    /// How many listeners are bound.
    pub fn bound_count(&self) -> usize {
        self.listeners.len()
    }

    /// To be called once the first state of all Services is carried out: addresses that nobody of it needs may go.
    pub fn all_required(&self) {
        self.vips.all_known();
        if !self.is_reply_path_required {
            self.reply_path.clear();
        }
    }

    /// To be called once another process has what is served here, and before it is told to begin: that one keeps addresses
    /// local from then on, and leads answers here.
    pub(crate) async fn leave_addresses(&self) {
        self.reply_path.leave();
        let _ = self.vips.leave().await; // An error means that nobody here keeps any.
    }

    /// Closes every listener here, and opens none from now on: what is kept for the next process stays open for it. Open
    /// connections go on, flows end; tables still follow.
    pub async fn close(&mut self) {
        self.closed = true;
        self.vips.stop();
        self.failures.forget_all();
        self.ports.disown_all();
        // At once, not one after another: each has to wait for a task or a shard that may be busy.
        let running = std::mem::take(&mut self.listeners);
        join_all(running.into_values().map(|running| self.servers.release(running.bound))).await;
        self.servers.udp.flush();
    }

    /// Has addresses made local, all of a batch at once.
    async fn require(&mut self, wanted: Vec<Wanted>) {
        if !self.closed {
            self.granted = self.vips.require(wanted).await;
        }
    }

    fn swap(&mut self, key: BalancerKey, wanted: &Backends) {
        let protocol = key.port.protocol;
        let keys = wanted.usable.serving.iter().map(|endpoint| ListenKey::at(endpoint.address(), protocol));
        let own: Vec<_> = keys.filter(|key| self.listeners.contains_key(key)).collect();
        self.ports.swap(key.clone(), wanted, &self.reply_path);
        if !own.is_empty() {
            // Not only at the end of the batch: until then each connection would come back here again and again.
            self.turned.extend(own);
            self.ports.mark_own_backends(&self.turned, |key| self.listeners.contains_key(key));
        }
        if protocol == Protocol::Udp {
            self.sweep(&key);
        }
    }

    /// Flows of backends that left `serving` end now, so that their next datagram reaches a live one.
    fn sweep(&self, key: &BalancerKey) {
        let Some(port) = self.ports.get(&key.port) else { return };
        for listener in port.listeners.iter().filter(|listener| Family::of(listener.ip()) == key.family) {
            if let Some(Running { bound: Bound::Udp { server, .. }, .. }) = self.listeners.get(listener) {
                self.servers.udp.sweep(*server);
            }
        }
    }

    /// Opens listeners, or notes why they could not be opened. What the kernel has to do is shared among threads where it
    /// is much, as that is most of a start; all else is done here and in the order of the binds.
    async fn bind_all(&mut self, binds: Vec<Bind>, now: Instant) {
        if self.closed || binds.is_empty() {
            return;
        }
        if self.held_back.is_some() {
            return self.keep_for_later(binds);
        }
        self.servers.store.settled().await; // One of the addresses may have been another listener's until now.
        let (this, threads) = (&*self, self.binders.min(binds.len() / BINDS_PER_THREAD));
        let opened = in_parts(&binds, threads, |part| part.iter().map(|bind| this.open(bind)).collect::<Vec<_>>());
        let opened: Vec<_> = opened.into_iter().flatten().collect();
        for (bind, opened) in binds.into_iter().zip(opened) {
            match opened {
                Some((target, opened)) => self.serve(bind, target, opened, now),
                None => debug_assert!(false, "{}: planned without a balancer", bind.key),
            }
        }
    }

    fn keep_for_later(&mut self, binds: Vec<Bind>) {
        let with_target = |bind: Bind| {
            let refused = self.granted.refused(bind.key.ip()).cloned();
            Some(HeldBack { target: self.target(&bind.key, &bind.wanted)?, refused, bind })
        };
        let kept: Vec<_> = binds.into_iter().filter_map(with_target).collect();
        self.held_back.get_or_insert_default().extend(kept);
    }

    /// Opens a listener's sockets; `None` where a side names a balancer that is not there.
    ///
    /// Not where its address could not be made local: with `net.ipv4.ip_nonlocal_bind` the kernel would have it bound, and
    /// nobody would ever come there.
    fn open(&self, Bind { key, wanted, .. }: &Bind) -> Option<(Target, io::Result<Opened>)> {
        let target = self.target(key, wanted)?;
        let opened = match self.granted.refused(key.ip()) {
            Some(reason) => Err(reason.clone().into()),
            None => self.servers.open(*key, wanted, &target),
        };
        Some((target, opened))
    }

    /// Has a listener served that was opened, or notes why it was not: again, if it had `waited` for this try.
    fn serve(&mut self, bind: Bind, target: Target, opened: io::Result<Opened>, now: Instant) {
        let (port, hold) = (Arc::clone(&target.port), target.address.clone());
        let target: TargetCell = Arc::new(ArcSwap::from_pointee(target));
        let bound = opened.and_then(|opened| self.servers.serve(bind.key, opened, &bind.wanted, &target));
        self.note_bound(bind, port, target, hold, bound, now);
    }

    fn note_bound(
        &mut self,
        bind: Bind,
        port: Arc<PortState>,
        target: TargetCell,
        hold: Option<Hold>,
        bound: io::Result<Bound>,
        now: Instant,
    ) {
        let Bind { key, wanted, waited } = bind;
        match bound {
            Ok(bound) => {
                self.turned.insert(key);
                self.own(&key, &port);
                self.opened.push((key, Running { port, target, bound }));
            }
            Err(source) => {
                self.servers.store.forget(&key);
                self.failures.note(key, wanted, hold, source, waited, now);
            }
        }
    }

    fn own(&mut self, key: &ListenKey, port: &PortState) {
        if key.protocol == Protocol::Udp {
            self.ports.own(&port.name, *key);
        }
    }

    /// Gives a listener another target, and its socket the state that the target asks for.
    async fn point(&mut self, key: ListenKey, wanted: Listener, now: Instant) {
        let Some(wanted) = self.failures.want(&key, wanted) else { return };
        let Some(mut target) = self.target(&key, &wanted) else {
            debug_assert!(false, "{key}: planned without a balancer");
            return;
        };
        let Some(running) = self.listeners.remove(&key) else { return };
        target.address.clone_from(&running.target.load().address);
        let port = Arc::clone(&target.port);
        running.target.store(Arc::new(target));
        self.ports.disown(&running.port.name, &key);
        match self.servers.settle(key, running.bound, &wanted, &running.target).await {
            Ok(bound) => {
                self.own(&key, &port);
                self.listeners.insert(key, Running { port, target: running.target, bound });
            }
            Err(source) => {
                self.turned.insert(key);
                self.servers.store.forget(&key);
                let hold = running.target.load().address.clone();
                self.failures.note_closed(now);
                self.failures.note(key, wanted, hold, source, None, now);
            }
        }
    }

    async fn unbind(&mut self, key: ListenKey, now: Instant) {
        self.failures.forget(&key);
        let Some(running) = self.listeners.remove(&key) else { return };
        self.failures.note_closed(now);
        self.turned.insert(key);
        self.ports.disown(&running.port.name, &key);
        self.servers.end(key, running.bound).await;
    }

    /// The running form of a planned target; `None` where a side names a balancer that is not there.
    fn target(&self, key: &ListenKey, wanted: &Listener) -> Option<Target> {
        let port = self.ports.get(&wanted.port)?;
        let family = Family::of(key.ip());
        let verdict = |side: &Side| -> Option<Verdict> {
            Some(match side.verdict {
                plan::Verdict::Serve => Verdict::Serve(Arc::clone(port.balancer(family, side.scope)?)),
                plan::Verdict::Reject => Verdict::Reject,
                plan::Verdict::Drop => Verdict::Drop,
            })
        };
        let plan::Target { outside, inside } = &wanted.target;
        let inside_of =
            if wanted.is_two_sided() { inside_at(&self.inside, key.ip()).collect() } else { Arc::default() };
        Some(Target {
            port: Arc::clone(&port.state),
            kind: wanted.kind,
            outside: verdict(outside)?,
            inside: verdict(inside)?,
            inside_of,
            source_ranges: Arc::clone(&wanted.source_ranges),
            allow_from: wanted.allow_from.clone(),
            proxy_protocol: wanted.proxy_protocol.clone(),
            address: self.granted.hold(key.ip()),
        })
    }
}

/// The address of a listener where it belongs to a Service, not to this machine.
fn vip(key: &ListenKey, wanted: &Listener) -> Option<Wanted> {
    let announced = match wanted.kind {
        ListenerKind::ClusterIp => false,
        ListenerKind::ExternalIp | ListenerKind::LoadBalancerIp => true,
        ListenerKind::NodePort | ListenerKind::Exposed => return None,
    };
    Some(Wanted { address: key.ip(), announced })
}

#[cfg(test)]
#[path = "listeners_tests.rs"]
mod tests;
