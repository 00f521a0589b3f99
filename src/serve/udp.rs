//! UDP listeners as the control side sees them: a few shards, each a thread that owns listeners and their flows.
//!
//! The loop of a shard is `shard`, its decisions are `flow`, its sockets (binding, parking) are `mmsg`.

use std::future::Future;
use std::io;
use std::net::UdpSocket;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, getrlimit};
use tokio::sync::oneshot;

use crate::local_ports;
use crate::name::ListenKey;
use crate::plan::UdpSettings;
use crate::serve::TargetCell;
use crate::serve::access::AccessTap;
use crate::serve::filter::Filter;
use crate::serve::flow::IdleTimes;
use crate::serve::gate::FlowGate;
pub(super) use crate::serve::mmsg::settle_passed;
pub use crate::serve::mmsg::{bind_udp, bind_udp_group, hold_udp};
use crate::serve::moving_flow::{Line, ShardLines, first_shard};
use crate::serve::room::FlowLimits;
use crate::serve::shard::{Command, Past, Shard};
use crate::serve::upstream::OwnSources;

/// How UDP is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpOptions {
    /// How long silent flows live. From `--udp-timeout-unreplied`, `-answered` and `-stream`.
    pub idle: IdleTimes,
    /// Flows of the whole process, at least 1; one client address gets a quarter of them in a shard.
    /// Default: [`flow_limit_of_host`].
    pub flow_limit: usize,
    /// Shards that share a listener whose Service does not say (1..=1024); there are never more than the process
    /// has. From `--udp-shards`, default 1: what one thread can do is enough for most.
    pub shards_per_listener: NonZeroU16,
    /// Datagrams of equal length are received and sent as one where the kernel can (UDP_GRO, UDP_SEGMENT). Default
    /// true; there is no flag, as a kernel that cannot says so.
    pub offload: bool,
}

impl Default for UdpOptions {
    /// Looks at the host: to be called after the limit of open files has been raised.
    fn default() -> Self {
        Self {
            idle: IdleTimes::default(),
            flow_limit: flow_limit_of_host(1),
            shards_per_listener: NonZeroU16::MIN,
            offload: true,
        }
    }
}

impl UdpOptions {
    fn idle(&self, settings: &UdpSettings) -> IdleTimes {
        IdleTimes {
            unreplied: settings.unreplied.unwrap_or(self.idle.unreplied),
            answered: settings.answered.unwrap_or(self.idle.answered),
            stream: settings.stream.unwrap_or(self.idle.stream),
        }
    }
}

/// The most flows that this host can bear: each takes a source port and a descriptor.
///
/// 65,536, half of `net.ipv4.ip_local_port_range` for each source address, or a quarter of the limit of open files,
/// whichever is least. Ports count for the whole host, whatever the number of backends.
pub fn flow_limit_of_host(sources: usize) -> usize {
    let ports = local_ports::range().len();
    let files = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |files| files as usize);
    65_536.min(ports / 2 * sources).min(files / 4).max(1)
}

/// The UDP listeners of this process. Owned by `control`; dropping it ends all shards.
///
/// Calls never wait. Commands for one listener are carried out in the order of the calls: removals at once, all others
/// when [`flush`](Self::flush) is called. A change may open thousands of listeners, and each concerns every shard.
#[derive(Debug)]
pub struct UdpShards {
    shards: Vec<Handle>,
    options: UdpOptions,
    /// Those of the options, for all listeners that have no others.
    idle: Arc<IdleTimes>,
    /// Of all shards.
    gate: Arc<FlowGate>,
}

/// A listener that is served: its key, and how many shards share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpServer {
    key: ListenKey,
    shards: usize,
}

/// The control side's end of one shard.
#[derive(Debug)]
struct Handle {
    /// `None` once the shard is to end.
    commands: Option<Arc<Sender<Command>>>,
    wake: Arc<OwnedFd>,
    /// True where commands were queued since the shard was woken last.
    queued: AtomicBool,
    /// True where commands were queued since [`UdpShards::settle`].
    unsettled: AtomicBool,
    /// Resolves when the shard's thread has closed its sockets.
    ended: oneshot::Receiver<()>,
}

impl UdpShards {
    /// Starts so many shards, at least one. Fails where the host has no thread or descriptor left.
    pub fn start(count: usize, options: UdpOptions) -> io::Result<Self> {
        Self::start_with_access_log(count, options, None)
    }

    /// The same, and an access log is told of each flow's end.
    pub fn start_with_access_log(count: usize, options: UdpOptions, access_log: Option<AccessTap>) -> io::Result<Self> {
        let gate = Arc::<FlowGate>::default();
        let limits = FlowLimits::split(options.flow_limit.max(1), count.max(1)).map(|limits| limits.behind(&gate));
        let sources = Arc::new(OwnSources::default());
        let shards = limits.enumerate().map(|(number, limits)| {
            Handle::start(number, |wake, received| {
                Shard::new(wake, received, limits, Arc::clone(&sources), options.offload, access_log.clone())
            })
        });
        let shards = shards.collect::<io::Result<_>>()?;
        Ok(Self { shards, options, idle: Arc::new(options.idle), gate })
    }

    /// How many flows there may be at most. From [`UdpOptions::flow_limit`].
    pub(crate) fn flow_limit(&self) -> usize {
        self.options.flow_limit
    }

    /// Where its flows are counted, and where it is told that there may be no more.
    pub(crate) fn gate(&self) -> Arc<FlowGate> {
        Arc::clone(&self.gate)
    }

    /// The shards, for a hand-over.
    pub(crate) fn lines(&self) -> ShardLines {
        ShardLines::new(self.shards.iter().filter_map(|shard| {
            Some(Line { commands: Arc::downgrade(shard.commands.as_ref()?), wake: Arc::clone(&shard.wake) })
        }))
    }

    /// Opens a listener's sockets and serves there: [`bind`](Self::bind) and [`add`](Self::add) in one.
    pub fn open(&self, key: ListenKey, target: TargetCell, settings: &UdpSettings) -> io::Result<UdpServer> {
        Ok(self.add(key, self.bind(key, settings)?, target, settings))
    }

    /// Opens a listener's sockets, one for each shard that is to share it. The shards are not told yet: datagrams wait.
    ///
    /// The number of shards stays as long as the listener lives: with another one, flows would lose their sockets.
    pub fn bind(&self, key: ListenKey, settings: &UdpSettings) -> io::Result<Vec<UdpSocket>> {
        bind_udp_group(key.address(), self.sockets_of(settings))
    }

    /// How many shards there are.
    pub(super) fn shard_count(&self) -> usize {
        self.shards.len()
    }

    /// How many sockets a listener has: one for each shard that is to share it.
    fn sockets_of(&self, settings: &UdpSettings) -> usize {
        let wanted = settings.shards.unwrap_or(self.options.shards_per_listener).get();
        usize::from(wanted).min(self.shards.len())
    }

    /// Serves a listener on sockets of [`bind`](Self::bind) or [`bind_udp`], no more than there are shards. Takes the
    /// place of one with the same key.
    pub fn add(
        &self,
        key: ListenKey,
        sockets: Vec<UdpSocket>,
        target: TargetCell,
        settings: &UdpSettings,
    ) -> UdpServer {
        self.listen(key, sockets, target, settings, Past::None)
    }

    /// The same, on sockets that another process has served on.
    pub(super) fn take_over(
        &self,
        key: ListenKey,
        sockets: Vec<UdpSocket>,
        target: TargetCell,
        settings: &UdpSettings,
    ) -> UdpServer {
        self.listen(key, sockets, target, settings, Past::Counted)
    }

    fn listen(
        &self,
        key: ListenKey,
        sockets: Vec<UdpSocket>,
        target: TargetCell,
        settings: &UdpSettings,
        past: Past,
    ) -> UdpServer {
        let server = UdpServer { key, shards: sockets.len() };
        self.tell_all(|| Command::Opened(key.address()));
        for (shard, socket) in self.shards_of(server).zip(sockets) {
            shard.queue(Command::Add(key, socket, Arc::clone(&target), self.idle(settings), past));
        }
        server
    }

    /// Has the shards carry out all that they were told.
    pub fn flush(&self) {
        self.shards.iter().for_each(Handle::flush);
    }

    /// Has the shards carry out all that they were told, and resolves when they have: datagrams that come later are
    /// treated by the tables and listeners of now. Does not wait where nothing was told since the last time.
    pub fn settle(&self) -> impl Future<Output = ()> + Send + use<> {
        let settling: Vec<_> = self.shards.iter().filter_map(Handle::settle).collect();
        async move {
            for settled in settling {
                let _ = settled.await; // a shard that has ended treats no datagram
            }
        }
    }

    /// Closes a listener, its flows and its sockets. Done whether or not the future is awaited; when it resolves,
    /// the address is free.
    ///
    /// Flows whose backend may keep them no more end as `endpoint_removed`, others as `drain`.
    pub fn remove(&self, server: UdpServer) -> impl Future<Output = ()> + Send + use<> {
        let closings = self.ask_shards(server, Command::Remove);
        self.tell_all(|| Command::Closed(server.key.address()));
        async move {
            for is_closed in closings {
                let _ = is_closed.await; // a shard that has ended has closed it as well
            }
        }
    }

    /// Further descriptors of a listener's sockets, which are served as before.
    ///
    /// # Errors
    /// No descriptor is left, or a shard has ended.
    pub(super) fn copies(&self, server: UdpServer) -> impl Future<Output = io::Result<Vec<OwnedFd>>> + Send + use<> {
        let copying = self.ask_shards(server, Command::Copy);
        async move {
            let mut copies = Vec::with_capacity(copying.len());
            for copy in copying {
                copies.push(copy.await.unwrap_or_else(|_| Err(io::Error::other("nobody serves there")))?);
            }
            Ok(copies)
        }
    }

    /// Asks each shard that has sockets of a listener; the answers to come.
    fn ask_shards<T>(
        &self,
        server: UdpServer,
        question: impl Fn(ListenKey, oneshot::Sender<T>) -> Command,
    ) -> Vec<oneshot::Receiver<T>> {
        let ask = |shard: &Handle| {
            let (reply, answer) = oneshot::channel();
            shard.queue(question(server.key, reply));
            shard.flush();
            answer
        };
        self.shards_of(server).map(ask).collect()
    }

    /// To be called after the listener's table was swapped or its target stored: the flows whose backend the balancer no
    /// longer [`serves`](crate::serve::balancer::Balancer::serves) part with it, so that their clients' next datagrams go
    /// to a live one.
    pub fn sweep(&self, server: UdpServer) {
        self.shards_of(server).for_each(|shard| shard.queue(Command::Sweep(server.key)));
    }

    /// Gives a listener's flows other idle times, those that are there included.
    pub fn set_idle(&self, server: UdpServer, settings: &UdpSettings) {
        let idle = self.idle(settings);
        self.shards_of(server).for_each(|shard| shard.queue(Command::SetIdle(server.key, Arc::clone(&idle))));
    }

    /// Has the kernel drop what the filter does not pass, or everything come; until that is done, and where the kernel
    /// takes no filter, shards judge each datagram by the target.
    pub(super) fn set_filter(&self, server: UdpServer, filter: Option<Filter>) {
        let filter = filter.map(Arc::new);
        self.shards_of(server).for_each(|shard| shard.queue(Command::SetFilter(server.key, filter.clone())));
    }

    /// Closes everything. When the future resolves, all addresses are free.
    pub async fn stop(mut self) {
        for shard in &mut self.shards {
            shard.end();
        }
        for shard in &mut self.shards {
            let _ = (&mut shard.ended).await; // resolves with an error: the thread has dropped its end
        }
    }

    fn idle(&self, settings: &UdpSettings) -> Arc<IdleTimes> {
        let idle = self.options.idle(settings);
        if idle == *self.idle { Arc::clone(&self.idle) } else { Arc::new(idle) }
    }

    /// The same shards for the same listener, always: so many from a place on that its key tells.
    fn shards_of(&self, server: UdpServer) -> impl Iterator<Item = &Handle> {
        let first = first_shard(server.key, self.shards.len());
        self.shards.iter().cycle().skip(first).take(server.shards.min(self.shards.len()))
    }

    fn tell_all(&self, command: impl Fn() -> Command) {
        self.shards.iter().for_each(|shard| shard.queue(command()));
    }
}

impl Handle {
    fn start(
        number: usize,
        make: impl FnOnce(Arc<OwnedFd>, Receiver<Command>) -> io::Result<Shard>,
    ) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (commands, received) = channel(); // as long as there are listeners to tell about, at most
        let (end, ended) = oneshot::channel::<()>();
        let shard = make(Arc::clone(&wake), received)?;
        thread::Builder::new().name(format!("udp-{number}")).spawn(move || {
            shard.run();
            drop(end);
        })?;
        Ok(Self {
            commands: Some(Arc::new(commands)),
            wake,
            queued: AtomicBool::new(false),
            unsettled: AtomicBool::new(false),
            ended,
        })
    }

    fn queue(&self, command: Command) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(command); // fails only where the shard has ended
            self.queued.store(true, Ordering::Relaxed); // `control` alone reads and writes these
            self.unsettled.store(true, Ordering::Relaxed);
        }
    }

    fn flush(&self) {
        if self.queued.swap(false, Ordering::Relaxed) {
            self.wake();
        }
    }

    fn settle(&self) -> Option<oneshot::Receiver<()>> {
        if !self.unsettled.load(Ordering::Relaxed) {
            return None;
        }
        let (settled, is_settled) = oneshot::channel();
        self.queue(Command::Tell(settled));
        self.unsettled.store(false, Ordering::Relaxed);
        self.flush();
        Some(is_settled)
    }

    fn end(&mut self) {
        self.commands = None;
        self.wake();
    }

    fn wake(&self) {
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes()); // fails only where it is awake anyway
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use std::io::ErrorKind;
    use std::net::{Ipv4Addr, SocketAddr};
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use arc_swap::ArcSwap;

    use super::*;
    use crate::name::{BalancerKey, Family, ObjectName, Protocol, Scope, ServicePortName};
    use crate::serve::balancer::{Backend, Balancer, PortState, Table};
    use crate::serve::mmsg::{BATCH, Batch, Place, To};
    use crate::serve::{Target, Verdict};
    use crate::stats::{CloseReason, DropReason};

    /// For everything that takes no time at all when it works.
    const DEADLINE: Duration = Duration::from_secs(20);

    /// One Service port that is served by shards of its own.
    struct Service {
        shards: UdpShards,
        server: Cell<UdpServer>,
        key: ListenKey,
        balancer: Arc<Balancer>,
        target: TargetCell,
    }

    impl Service {
        fn start(address: &str, backends: &[&Arc<Backend>]) -> Self {
            Self::start_with(address, backends, UdpOptions { flow_limit: 256, ..UdpOptions::default() })
        }

        fn start_with(address: &str, backends: &[&Arc<Backend>], options: UdpOptions) -> Self {
            let address: SocketAddr = address.parse().expect("an address");
            let key = ListenKey::new(address.ip(), address.port(), Protocol::Udp);
            let balancer = balancer(Family::of(address.ip()), backends);
            let service = Self {
                shards: UdpShards::start(2, options).expect("threads"),
                server: Cell::new(UdpServer { key, shards: 0 }),
                key,
                target: Arc::new(ArcSwap::from_pointee(Target::serving(&balancer))),
                balancer,
            };
            service.bind();
            service
        }

        fn bind(&self) {
            self.bind_with(&UdpSettings::default());
        }

        fn bind_with(&self, settings: &UdpSettings) {
            let server = self.shards.open(self.key, Arc::clone(&self.target), settings);
            self.server.set(server.expect("a free address"));
            self.shards.flush();
        }

        /// What `control` does when a Service loses its last endpoint.
        fn park(&self) -> UdpSocket {
            wait(self.shards.remove(self.server.get()));
            hold_udp(self.key.address()).expect("the address is free at once")
        }

        fn swap(&self, backends: &[&Arc<Backend>]) {
            self.balancer.swap(table(backends));
            self.shards.sweep(self.server.get());
            self.shards.flush();
        }

        /// Waits until all commands so far are carried out.
        fn obeyed(&self) {
            wait(self.shards.settle());
        }

        fn client(&self) -> UdpSocket {
            let client = plain(SocketAddr::new(self.key.ip(), 0));
            client.connect(self.key.address()).expect("connected");
            client
        }

        fn accepted(&self) -> u64 {
            self.balancer.port.stats.accepted.get()
        }

        fn dropped(&self, reason: DropReason) -> u64 {
            self.balancer.port.stats.dropped.get(reason)
        }
    }

    /// A balancer of a Service of its own.
    pub(in crate::serve) fn balancer(family: Family, backends: &[&Arc<Backend>]) -> Arc<Balancer> {
        let port = ServicePortName::new(ObjectName::parse("dns"), "dns", Protocol::Udp);
        let state = Arc::new(PortState::new(port.clone()));
        Arc::new(Balancer::new(BalancerKey { port, family, scope: Scope::Cluster }, state, table(backends)))
    }

    fn table(backends: &[&Arc<Backend>]) -> Table {
        Table::new(backends.iter().map(|backend| Arc::clone(backend)).collect(), &[])
    }

    fn wait<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
    }

    fn until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition() {
            assert!(Instant::now() < deadline, "never: {what}");
            thread::sleep(Duration::from_millis(2)); // between two looks
        }
    }

    pub(in crate::serve) fn plain(address: SocketAddr) -> UdpSocket {
        let socket = UdpSocket::bind(address).expect("a loopback address");
        socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        socket
    }

    pub(in crate::serve) fn loopback() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    pub(in crate::serve) fn backend(id: u32, address: SocketAddr) -> Arc<Backend> {
        Arc::new(Backend::new(id, address))
    }

    /// Answers each datagram with itself; an empty one ends it only when it is being dropped.
    struct Echo {
        backend: Arc<Backend>,
        ends: Arc<AtomicBool>,
        thread: Option<thread::JoinHandle<()>>,
    }

    impl Echo {
        fn start(id: u32) -> Self {
            Self::start_on(id, plain(loopback()), Duration::ZERO)
        }

        fn start_on(id: u32, socket: UdpSocket, delay: Duration) -> Self {
            let address = socket.local_addr().expect("bound");
            let ends = Arc::new(AtomicBool::new(false));
            socket.set_read_timeout(None).expect("no deadline");
            let thread = thread::spawn({
                let ends = Arc::clone(&ends);
                move || {
                    let (_never, pause) = mpsc::channel::<()>();
                    let mut buffer = vec![0; 65_536];
                    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                        if ends.load(Ordering::Relaxed) {
                            return;
                        }
                        let _ = pause.recv_timeout(delay);
                        let _ = socket.send_to(&buffer[..length], from);
                    }
                }
            });
            Self { backend: backend(id, address), ends, thread: Some(thread) }
        }
    }

    impl Drop for Echo {
        fn drop(&mut self) {
            self.ends.store(true, Ordering::Relaxed);
            let waker = UdpSocket::bind(SocketAddr::new(self.backend.address().ip(), 0)).expect("a free port");
            let _ = waker.send_to(&[], self.backend.address());
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        }
    }

    fn ask(client: &UdpSocket, text: &[u8]) -> Vec<u8> {
        client.send(text).expect("sent");
        answer(client)
    }

    pub(in crate::serve) fn answer(client: &UdpSocket) -> Vec<u8> {
        let mut buffer = vec![0; 65_536];
        let length = client.recv(&mut buffer).expect("an answer");
        buffer.truncate(length);
        buffer
    }

    #[test]
    fn t180_given_a_service_when_a_client_asks_then_the_answer_comes_from_the_address_it_sent_to() {
        for address in ["127.18.1.1:5300", "[::1]:15310"] {
            let address: SocketAddr = address.parse().expect("an address");
            let echo = Echo::start_on(1, plain(SocketAddr::new(address.ip(), 0)), Duration::ZERO);
            let service = Service::start(&address.to_string(), &[&echo.backend]);
            let client = plain(SocketAddr::new(address.ip(), 0)); // not connected: takes answers from anywhere

            client.send_to(b"hello", address).expect("sent");

            let mut buffer = [0; 16];
            assert_eq!(client.recv_from(&mut buffer).expect("an answer"), (5, address));
            assert_eq!(&buffer[..5], b"hello");
            assert_eq!(service.accepted(), 1);
        }
    }

    #[test]
    fn t181_given_a_silent_flow_when_its_idle_time_is_over_then_it_ends_and_the_gauge_is_zero() {
        let echo = Echo::start(1);
        let second = Duration::from_secs(1);
        let idle = IdleTimes { unreplied: second, answered: second, stream: second };
        let options = UdpOptions { idle, flow_limit: 16, ..UdpOptions::default() };
        let service = Service::start_with("127.18.1.2:5300", &[&echo.backend], options);
        let client = service.client();
        ask(&client, b"hello");
        let stats = &echo.backend.stats;
        assert_eq!(stats.active_flows.get(), 1);

        until("the flow ends", || stats.active_flows.get() == 0);

        assert_eq!(stats.closed.get(CloseReason::Idle), 1);
        assert_eq!(ask(&client, b"again"), b"again");
        assert_eq!(service.accepted(), 2);
    }

    #[test]
    fn t183_given_one_host_with_two_sockets_when_both_send_then_they_have_flows_of_their_own() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.3:5300", &[&echo.backend]);
        let clients = [service.client(), service.client()];

        clients[0].send(b"first").expect("sent");
        clients[1].send(b"second").expect("sent");

        assert_eq!(answer(&clients[0]), b"first");
        assert_eq!(answer(&clients[1]), b"second");
        assert_eq!(echo.backend.stats.active_flows.get(), 2);
    }

    #[test]
    fn t184_given_datagrams_of_any_size_when_relayed_then_they_are_whole_both_ways_and_counted() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.4:5300", &[&echo.backend]);
        let client = service.client();
        let sizes = [0, 1, 1472, 4097, 9000, 65_507];

        for size in sizes {
            let sent: Vec<u8> = (0..size).map(|at| at as u8).collect();
            assert!(ask(&client, &sent) == sent, "{size} bytes");
        }

        let (stats, bytes) = (&echo.backend.stats, sizes.iter().sum::<usize>() as u64);
        until("all is counted", || stats.downstream_datagrams.get() == sizes.len() as u64);
        assert_eq!(stats.upstream_datagrams.get(), sizes.len() as u64);
        assert_eq!((stats.upstream_bytes.get(), stats.downstream_bytes.get()), (bytes, bytes));
    }

    #[test]
    fn t185_given_default_idle_times_when_the_answer_comes_two_seconds_late_then_it_is_delivered() {
        let echo = Echo::start_on(1, plain(loopback()), Duration::from_secs(2));
        let service = Service::start("127.18.1.5:5300", &[&echo.backend]);

        assert_eq!(ask(&service.client(), b"late"), b"late");
    }

    #[test]
    fn t188_given_a_one_way_sender_when_the_service_scales_to_zero_then_it_is_told_and_the_pod_hears_nothing() {
        let pod = plain(loopback());
        let endpoint = backend(1, pod.local_addr().expect("bound"));
        let service = Service::start("127.18.1.6:5300", &[&endpoint]);
        let client = service.client();
        client.send(b"1").expect("sent");
        assert_eq!(pod.recv(&mut [0; 8]).expect("a datagram"), 1);

        service.swap(&[]);
        let _holder = service.park();
        client.send(b"2").expect("sent");

        assert_eq!(client.recv(&mut [0; 8]).expect_err("nobody").kind(), ErrorKind::ConnectionRefused);
        pod.set_nonblocking(true).expect("set");
        assert_eq!(pod.recv(&mut [0; 8]).expect_err("nothing").kind(), ErrorKind::WouldBlock);
        assert_eq!(endpoint.stats.closed.get(CloseReason::EndpointRemoved), 1);
        assert_eq!(endpoint.stats.active_flows.get(), 0);
    }

    #[test]
    fn t189_given_no_endpoint_and_a_client_that_never_stops_when_one_comes_then_its_next_datagram_is_served() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.7:5300", &[]);
        let holder = service.park();
        let client = service.client();
        client.send(b"too early").expect("sent");
        assert_eq!(client.recv(&mut [0; 16]).expect_err("nobody").kind(), ErrorKind::ConnectionRefused);

        drop(holder);
        service.swap(&[&echo.backend]);
        service.bind();

        assert_eq!(ask(&client, b"now"), b"now");
    }

    #[test]
    fn t190_given_two_backends_when_one_leaves_then_only_its_flows_move() {
        let echoes = [Echo::start(1), Echo::start(2)];
        let service = Service::start("127.18.1.8:5300", &[&echoes[0].backend, &echoes[1].backend]);
        let clients: Vec<_> = (0..4).map(|_| service.client()).collect();
        clients.iter().for_each(|client| drop(ask(client, b"hello")));
        let (gone, kept) = (&echoes[0].backend.stats, &echoes[1].backend.stats);
        assert_eq!((gone.active_flows.get(), kept.active_flows.get()), (2, 2), "round robin");

        service.swap(&[&echoes[1].backend]);
        until("its flows are closed", || gone.active_flows.get() == 0);
        clients.iter().for_each(|client| assert_eq!(ask(client, b"again"), b"again"));

        assert_eq!(gone.closed.get(CloseReason::EndpointRemoved), 2);
        assert_eq!((kept.active_flows.get(), kept.flows.get()), (4, 4), "two stayed, two came");
    }

    #[test]
    fn f06_t190_given_questions_on_their_way_when_the_endpoint_leaves_then_the_answers_still_come() {
        let (pod, echo) = (plain(loopback()), Echo::start(2));
        let endpoint = backend(1, pod.local_addr().expect("bound"));
        let service = Service::start("127.18.1.21:5300", &[&endpoint]);
        let clients = [service.client(), service.client()];
        clients[1].send(b"before").expect("sent");
        let mut froms = [loopback(); 2];
        let (_, from) = pod.recv_from(&mut [0; 8]).expect("a datagram");
        pod.send_to(b"it", from).expect("sent");
        assert_eq!(answer(&clients[1]), b"it");
        for (client, from) in clients.iter().zip(&mut froms) {
            client.send(b"who?").expect("sent");
            *from = pod.recv_from(&mut [0; 8]).expect("a datagram").1;
        }

        service.swap(&[&echo.backend]);
        service.obeyed();
        for from in froms {
            assert_eq!(pod.send_to(b"me", from).expect("sent"), 2);
        }

        for client in &clients {
            assert_eq!(answer(client), b"me");
            assert_eq!(ask(client, b"again"), b"again", "from the other one");
        }
        assert_eq!(endpoint.stats.closed.get(CloseReason::EndpointRemoved), 2);
        assert_eq!((endpoint.stats.active_flows.get(), echo.backend.stats.active_flows.get()), (0, 2));
        assert_eq!(service.accepted(), 4, "each has begun a flow more");
        pod.set_nonblocking(true).expect("set");
        assert_eq!(pod.recv(&mut [0; 8]).expect_err("nothing").kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn t191_given_a_backend_answers_port_unreachable_when_the_client_sends_again_then_another_one_answers() {
        let (dead, echo) = (plain(loopback()), Echo::start(2));
        let refusing = backend(1, dead.local_addr().expect("bound"));
        drop(dead);
        let service = Service::start("127.18.1.9:5300", &[&refusing, &echo.backend]);
        let client = service.client();

        client.send(b"lost").expect("sent");
        until("the refusal is heard", || refusing.stats.closed.get(CloseReason::Refused) == 1);

        assert_eq!(ask(&client, b"again"), b"again");
        assert_eq!(refusing.stats.active_flows.get(), 0);
        assert_eq!((service.accepted(), service.balancer.port.stats.retries.get()), (1, 1));
    }

    #[test]
    fn t193_given_two_queries_at_the_same_instant_when_sent_from_one_socket_then_both_are_answered() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.10:5300", &[&echo.backend]);
        let client = service.client();

        client.send(b"A").expect("sent");
        client.send(b"AAAA").expect("sent");

        let answers: BTreeSet<_> = [answer(&client), answer(&client)].into();
        assert_eq!(answers, [b"A".to_vec(), b"AAAA".to_vec()].into());
        assert_eq!(service.accepted(), 1);
    }

    #[test]
    fn t196_given_client_ip_affinity_when_one_client_opens_many_flows_then_all_go_to_one_backend() {
        let echoes = [Echo::start(1), Echo::start(2), Echo::start(3)];
        let backends = [&echoes[0].backend, &echoes[1].backend, &echoes[2].backend];
        let service = Service::start("127.18.1.11:5300", &backends);
        service.balancer.port.affinity.set_timeout(Some(Duration::from_secs(60)));

        for _ in 0..12 {
            ask(&service.client(), b"hello");
        }

        let mut flows = echoes.each_ref().map(|echo| echo.backend.stats.flows.get());
        flows.sort_unstable();
        assert_eq!(flows, [0, 0, 12]);
    }

    #[test]
    fn t197_given_a_service_is_removed_when_its_client_sends_on_then_port_unreachable_is_told() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.12:5300", &[&echo.backend]);
        let client = service.client();
        ask(&client, b"hello");

        wait(service.shards.remove(service.server.get()));
        client.send(b"gone?").expect("sent");

        assert_eq!(client.recv(&mut [0; 8]).expect_err("nobody").kind(), ErrorKind::ConnectionRefused);
        assert_eq!(echo.backend.stats.active_flows.get(), 0);
        assert_eq!(echo.backend.stats.closed.get(CloseReason::Drain), 1);
    }

    #[test]
    fn given_a_listener_is_pointed_to_another_service_when_swept_then_equal_backend_ids_do_not_keep_a_flow() {
        let echoes = [Echo::start(1), Echo::start(1)]; // ids are unique in one ServicePort only
        let service = Service::start("127.18.1.13:5300", &[&echoes[0].backend]);
        let client = service.client();
        ask(&client, b"hello");

        let other = balancer(Family::V4, &[&echoes[1].backend]);
        service.target.store(Arc::new(Target::serving(&other)));
        service.shards.sweep(service.server.get());
        service.shards.flush();
        until("the old flow ends", || echoes[0].backend.stats.active_flows.get() == 0);

        assert_eq!(ask(&client, b"again"), b"again");
        assert_eq!(echoes[1].backend.stats.active_flows.get(), 1);
    }

    #[test]
    fn given_one_side_drops_and_one_rejects_when_they_send_then_each_is_counted_under_its_reason() {
        let service = Service::start("127.18.1.14:5300", &[]);
        let inside_of = ["127.18.7.0/24".parse().expect("a network")].into();
        let serving = Target::serving(&service.balancer);
        let target = Target { outside: Verdict::Drop, inside: Verdict::Reject, inside_of, ..serving };
        service.target.store(Arc::new(target));
        let inside = plain(SocketAddr::from(([127, 18, 7, 1], 0)));

        service.client().send(b"outside").expect("sent");
        inside.send_to(b"inside", service.key.address()).expect("sent");

        until("both are counted", || {
            (service.dropped(DropReason::NoLocalEndpoints), service.dropped(DropReason::NoEndpoints)) == (1, 1)
        });
    }

    #[test]
    fn given_two_services_when_each_is_the_others_client_then_the_loop_ends_with_the_first_answer() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.15:5300", &[&echo.backend]);
        let foreign: SocketAddr = "127.18.1.16:5300".parse().expect("an address");
        let socket = bind_udp(foreign).expect("a free address");
        let spoofed = socket.try_clone().expect("a descriptor");
        let key = ListenKey::new(foreign.ip(), foreign.port(), Protocol::Udp);

        // As if somebody had sent with the other listener's address as the source.
        service.shards.add(key, vec![socket], Arc::clone(&service.target), &UdpSettings::default());
        service.shards.flush();
        service.obeyed();
        spoofed.send_to(b"round and round", service.key.address()).expect("sent");

        until("it is dropped", || service.dropped(DropReason::Loop) == 1);
        assert_eq!(service.accepted(), 0);
    }

    #[test]
    fn t195_given_more_clients_than_flows_when_all_send_then_flows_stay_within_the_limit_and_all_are_answered() {
        let echo = Echo::start(1);
        let options = UdpOptions { flow_limit: 16, ..UdpOptions::default() };
        let service = Service::start_with("127.18.1.17:5300", &[&echo.backend], options);

        for _ in 0..64 {
            ask(&service.client(), b"hello");
        }

        let stats = &echo.backend.stats;
        assert_eq!((service.accepted(), stats.active_flows.get()), (64, 4), "a quarter for one client address");
        assert_eq!(stats.closed.get(CloseReason::Evicted), 60);
    }

    #[test]
    fn given_many_flows_with_many_datagrams_when_relayed_at_once_then_none_is_mixed_up() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.18:5300", &[&echo.backend]);
        let clients: Vec<_> = (0..32).map(|_| service.client()).collect();

        for round in 0..50_u8 {
            for (number, client) in clients.iter().enumerate() {
                client.send(&[number as u8, round]).expect("sent");
            }
            for (number, client) in clients.iter().enumerate() {
                assert_eq!(answer(client), [number as u8, round]);
            }
        }

        assert_eq!(service.accepted(), 32);
    }

    #[test]
    fn f35_given_a_shard_panics_when_clients_go_on_then_their_flows_begin_anew() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.19:5300", &[&echo.backend]);
        let client = service.client();
        ask(&client, b"hello");

        service.shards.tell_all(|| Command::Panic);
        service.shards.flush();
        until("its flow is counted out", || echo.backend.stats.closed.get(CloseReason::Panic) == 1);

        assert_eq!(ask(&client, b"again"), b"again");
        assert_eq!(echo.backend.stats.active_flows.get(), 1);
    }

    #[test]
    fn given_shards_are_stopped_when_done_then_addresses_are_free_and_flows_are_counted_out() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.20:5300", &[&echo.backend]);
        ask(&service.client(), b"hello");

        wait(service.shards.stop());

        bind_udp(service.key.address()).expect("free");
        assert_eq!(echo.backend.stats.closed.get(CloseReason::Drain), 1);
    }

    /// Sends trains of these lengths, which another batch has received one by one.
    fn send_trains(from: &UdpSocket, to: SocketAddr, lengths: &[usize], seed: u8) {
        let (mut batch, source) = (Batch::default(), plain(loopback()));
        let middle = bind_udp(loopback()).expect("a free port");
        for (number, length) in lengths.iter().enumerate() {
            let payload = vec![seed.wrapping_add(number as u8); *length];
            source.send_to(&payload, middle.local_addr().expect("bound")).expect("sent");
        }
        while batch.count() < lengths.len() {
            let _ = batch.receive(middle.as_fd(), BATCH); // on loopback they are here already
        }
        let slots: Vec<u8> = (0..lengths.len() as u8).collect();
        slots.iter().for_each(|slot| batch.set_peer(usize::from(*slot), to));
        let mut at = Place::default();
        while at.position < slots.len() {
            at = match batch.send(from.as_fd(), &slots, at, To::Peers) {
                Ok(end) => end,
                Err(unsent) if batch.take_apart(&unsent) => at, // where the link's MTU is small
                Err(unsent) => panic!("not sent: {}", unsent.error),
            };
        }
    }

    #[test]
    fn t199_given_trains_from_both_ends_when_relayed_with_and_without_joining_then_payloads_and_counts_are_the_same() {
        let lengths = [900, 900, 900, 30, 0, 0, 1200, 1200, 1200, 1200, 7, 65_507, 3000, 3000, 3000, 64, 64, 64];
        let total = lengths.iter().sum::<usize>() as u64;
        for (address, offload) in [("127.18.1.21:5300", true), ("127.18.1.22:5300", false)] {
            let pod = plain(loopback());
            let endpoint = backend(1, pod.local_addr().expect("bound"));
            let options = UdpOptions { flow_limit: 16, offload, ..UdpOptions::default() };
            let service = Service::start_with(address, &[&endpoint], options);
            let client = plain(loopback());

            send_trains(&client, service.key.address(), &lengths, 0);
            let mut buffer = vec![0; 65_536];
            let mut relay = None;
            for (number, length) in lengths.iter().enumerate() {
                let (got, from) = pod.recv_from(&mut buffer).expect("a datagram");
                assert_eq!(got, *length, "datagram {number}, joining: {offload}");
                assert!(buffer[..got].iter().all(|byte| usize::from(*byte) == number));
                relay = Some(from);
            }
            send_trains(&pod, relay.expect("a flow"), &lengths, 100);
            for (number, length) in lengths.iter().enumerate() {
                let (got, from) = client.recv_from(&mut buffer).expect("an answer");
                assert_eq!((got, from), (*length, service.key.address()), "answer {number}, joining: {offload}");
                assert!(buffer[..got].iter().all(|byte| usize::from(*byte) == 100 + number));
            }

            let stats = &endpoint.stats;
            until("all is counted", || stats.downstream_datagrams.get() == lengths.len() as u64);
            assert_eq!(stats.upstream_datagrams.get(), lengths.len() as u64);
            assert_eq!((stats.upstream_bytes.get(), stats.downstream_bytes.get()), (total, total));
        }
    }

    /// The same in a network whose links carry less than some of these datagrams: the kernel splits no train of them,
    /// and sends each in fragments.
    #[test]
    fn f16_given_a_link_with_a_small_mtu_when_trains_are_relayed_then_they_arrive_all_the_same() {
        const SKIPPED: i32 = 77;
        let name = "given_trains_from_both_ends_when_relayed_with_and_without_joining";
        let script = format!("ip link set lo mtu 1500 up || exit {SKIPPED}; exec \"$0\" {name}");

        let own = std::env::current_exe().expect("this test");
        let run = std::process::Command::new("unshare").args(["-Urn", "sh", "-c", &script]).arg(own).output();

        match run.as_ref().map(|run| run.status.code()) {
            Ok(Some(0)) => {}
            Ok(Some(101)) => panic!("{}", String::from_utf8_lossy(&run.expect("it has run").stdout)),
            other => {
                let known = std::env::var("KUBE_RELAY_MAY_SKIP").unwrap_or_default();
                let full = std::env::var("KUBE_RELAY_TEST").is_ok_and(|value| value == "full");
                let reason = format!("no user namespace, or no unshare and ip here: {other:?}");
                assert!(!full || known.split(',').any(|known| known == "namespace"), "skipped (namespace): {reason}");
                println!("skipped (namespace): {reason}");
            }
        }
    }

    /// How many flows each of the two shards took when so many clients asked.
    fn spread(service: &Service, clients: usize) -> Vec<usize> {
        let clients: Vec<_> = (0..clients).map(|_| service.client()).collect();
        clients.iter().for_each(|client| assert_eq!(ask(client, b"hello"), b"hello"));
        service
            .shards
            .shards
            .iter()
            .map(|shard| {
                let (tell, told) = mpsc::channel();
                shard.queue(Command::CountFlows(tell));
                shard.flush();
                told.recv_timeout(DEADLINE).expect("the shard runs")
            })
            .collect()
    }

    #[test]
    fn given_a_service_that_two_shards_share_when_parked_and_revived_then_flows_are_spread_evenly_again() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.23:5300", &[&echo.backend]);
        assert_eq!(spread(&service, 8).iter().filter(|flows| **flows > 0).count(), 1, "one shard by default");
        let shared = UdpSettings { shards: NonZeroU16::new(8), ..UdpSettings::default() };

        for _ in 0..3 {
            let holder = service.park();
            drop(holder);
            service.bind_with(&shared);
            let flows = spread(&service, 48);

            assert_eq!(flows.iter().sum::<usize>(), 48);
            assert!(flows.iter().all(|flows| (8..=40).contains(flows)), "{flows:?}");
        }

        service.swap(&[]);
        until("all flows end", || echo.backend.stats.active_flows.get() == 0);
    }

    #[test]
    fn given_many_services_when_served_then_they_are_spread_over_the_shards() {
        let shards = UdpShards::start(4, UdpOptions { flow_limit: 16, ..UdpOptions::default() }).expect("threads");
        let mut services = [0; 4];

        for host in 0..=255 {
            let server = UdpServer { key: ListenKey::new([10, 96, 0, host].into(), 53, Protocol::Udp), shards: 1 };
            let shard = shards.shards_of(server).next().expect("one shard");
            services[shards.shards.iter().position(|other| std::ptr::eq(other, shard)).expect("one of them")] += 1;
        }

        assert!(services.iter().all(|count| (40..=88).contains(count)), "{services:?}");
    }

    #[test]
    fn t200_given_a_backend_that_is_a_listener_of_ours_when_a_client_sends_then_the_loop_ends_at_once() {
        let echo = Echo::start(1);
        let service = Service::start("127.18.1.24:5300", &[]);
        let inner: SocketAddr = "127.18.1.25:5300".parse().expect("an address");
        let key = ListenKey::new(inner.ip(), inner.port(), Protocol::Udp);
        let real = balancer(Family::V4, &[&echo.backend]);
        let target = Arc::new(ArcSwap::from_pointee(Target::serving(&real)));
        service.shards.open(key, target, &UdpSettings::default()).expect("a free address");
        service.balancer.swap(table(&[&backend(2, inner)]));
        service.obeyed();

        service.client().send(b"round and round").expect("sent");

        until("it is dropped", || real.port.stats.dropped.get(DropReason::Loop) == 1);
        assert_eq!(real.port.stats.accepted.get(), 0);
    }

    #[test]
    fn t195_f18_given_a_sweep_of_sources_when_they_flood_then_flows_stay_bounded_and_an_established_one_loses_nothing()
    {
        const FLOWS: usize = 64;
        let echo = Echo::start(1);
        let options = UdpOptions { flow_limit: FLOWS, ..UdpOptions::default() };
        let service = Service::start_with("127.18.1.26:5300", &[&echo.backend], options);
        let established = service.client();
        ask(&established, b"1");
        ask(&established, b"2"); // a stream from here on

        for sweep in 0..100_u8 {
            for host in 1..=10 {
                let source = UdpSocket::bind((Ipv4Addr::new(127, 19, sweep, host), 0)).expect("a loopback address");
                source.send_to(b"spoofed", service.key.address()).expect("sent");
            }
            assert_eq!(ask(&established, &[sweep]), [sweep]);
        }

        let stats = &echo.backend.stats;
        until("all have been seen", || service.accepted() + service.dropped(DropReason::FlowLimit) == 1001);
        assert!(stats.active_flows.get() <= FLOWS as u64, "{}", stats.active_flows.get());
        assert!(stats.closed.get(CloseReason::Evicted) >= 900);
        assert_eq!(ask(&established, b"still there"), b"still there");
        assert_eq!(stats.closed.get(CloseReason::Idle), 0);
    }

    #[test]
    fn given_this_host_when_asked_how_many_flows_it_bears_then_it_is_some_and_bounded() {
        assert!((1..=65_536).contains(&flow_limit_of_host(1)));
    }
}
