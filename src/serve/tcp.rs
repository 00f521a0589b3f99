//! TCP servers: accept clients of one listener, and carry each connection from its first to its last moment.
//!
//! A server owns nothing but the watch that workers keep on its listening socket: that belongs to `Listeners`, and
//! outlives the server when it is parked. Connections outlive both; they are tasks of the `worker` threads, known to
//! [`TcpShared`], which waits for them or ends them when the process stops.
//!
//! The life of a connection: accepted here, its client known by `introduction` (mostly at once, by its address), a backend
//! reached in `connect`, bytes moved in `relay`. A client that is turned away gets a reset, never a clean end of stream, and is
//! counted with the reason. Where this host lacks something, or a limit is reached (`gate`), nobody is turned away: who accepts
//! rests, and clients wait in the kernel.
//!
//! # The system calls of a short connection
//! Open, a request, a response, close; 14 calls, and a share of those that serve many connections under load (of
//! `epoll_wait`, of the `accept4` that says "nobody waits").
//!
//! | call | why |
//! |---|---|
//! | `accept4` | the client; not blocking at once, TCP_NODELAY from the listener; keep-alive after five seconds (`lasting`) |
//! | `epoll_ctl` add | its only registration |
//! | `recvfrom`, twice | where balancers in front say who comes: a look at the header, and the header |
//! | `socket`, `connect` | the backend; no option before the second write (`direction`) or the fifth second (`lasting`) |
//! | `epoll_ctl` add | its only registration; the loop tells of success, so SO_ERROR is read after failures alone |
//! | `recvfrom`, `sendto` | the request; a short read says that the socket is empty |
//! | `recvfrom`, `sendto` | the response |
//! | `recvfrom`, `shutdown` | the client's end of stream, and passing it on |
//! | `recvfrom` | the backend's; closing the client's socket passes it on |
//! | `close`, twice | takes the socket out of the event loop, too |
//!
//! Who closes first keeps the TIME_WAIT: where it is the client, that is this host's port towards the backend, as the
//! relay passes the end on before the backend's comes. `Sources` in `connect` multiplies those ports.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::thread::{available_parallelism, panicking};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use socket2::SockRef;
use tokio::select;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{Level, debug, enabled, warn};

use crate::name::{ListenKey, Protocol, ServicePortName};
use crate::plan::{ListenerKind, TcpSettings};
use crate::serve::access::{AccessTap, Draft, DraftRecord};
use crate::serve::balancer::{Backend, Balancer, Counted, PortState};
use crate::serve::connect::{ConnectOptions, Reached, dial};
use crate::serve::gate::{Allowance, Gate, remedy};
use crate::serve::introduction::{Admission, Introduced};
use crate::serve::lasting::{IfLasting, KeepAlive, LastingOptions, set_if_they_last};
use crate::serve::limits::LimitOptions;
use crate::serve::mailbox::Seat;
use crate::serve::moment::Moment;
use crate::serve::moving_stream::WorkerLines;
use crate::serve::pool::{Listening, Pool};
use crate::serve::proxy_header::Parties;
use crate::serve::reactor::{Foreign, Unwatched};
use crate::serve::relay::{Connection, SoFar};
use crate::serve::stream::Stream;
use crate::serve::worker::{Readable, Worker};
use crate::serve::{TargetCell, socket, standstill};
use crate::stats::{CloseReason, DropReason, Entry, PROCESS, PauseReason};
use crate::vips::Hold;

/// How TCP is served.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// How backends are connected to.
    pub connect: ConnectOptions,
    /// What upstream connections get that last.
    pub lasting: LastingOptions,
    /// How long connections may last.
    pub limits: LimitOptions,
    /// How long a balancer in front may take for the header that says who its client is. Default 5 s, as a packet that is
    /// lost comes again after one to three. From `--accept-proxy-timeout`.
    pub header_timeout: Duration,
    /// Silence after which a client is asked whether it is still there. Whole seconds. Default 60 s.
    pub keepalive_idle: Duration,
    /// How often it is asked, a third of `keepalive_idle` apart, before it is given up (1..=127). Default 3.
    pub keepalive_probes: u32,
    /// Connections at once; more wait. `None`, the default: as many as there are descriptors and memory for. From
    /// `--max-connections`.
    pub max_connections: Option<NonZeroU32>,
    /// Threads that carry connections. From `--workers`; default: the CPUs that this process may use.
    pub workers: NonZeroUsize,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            connect: ConnectOptions::default(),
            lasting: LastingOptions::default(),
            limits: LimitOptions::default(),
            header_timeout: Duration::from_secs(5),
            keepalive_idle: Duration::from_secs(60),
            keepalive_probes: 3,
            max_connections: None,
            workers: available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

impl TcpOptions {
    fn if_lasting(&self) -> IfLasting {
        let client = KeepAlive { idle: self.keepalive_idle, probes: self.keepalive_probes };
        IfLasting { client, backend: self.lasting }
    }
}

/// What all TCP servers of a process share: the options, the threads, and the connections that are open.
#[derive(Debug)]
pub struct TcpShared {
    options: TcpOptions,
    workers: Pool,
    connections: TaskTracker,
    aborting: AtomicBool,
    gate: Gate,
    lack_of_ports: News,
    /// That the gate is closed: for all listeners at once.
    lack_of_room: News,
    lack_of_headers: News,
    access_log: Option<AccessTap>,
}

impl TcpShared {
    /// Starts the threads. No connection yet.
    ///
    /// # Errors
    /// No thread, descriptor or memory is left.
    pub fn new(options: TcpOptions) -> io::Result<Self> {
        let workers = Pool::start(options.workers.get())?;
        let gate = Gate::new(options.max_connections);
        let [lack_of_ports, lack_of_room, lack_of_headers] = [(); 3].map(|()| News::since(Instant::now()));
        let (connections, aborting) = (TaskTracker::new(), AtomicBool::new(false));
        Ok(Self {
            options,
            workers,
            connections,
            aborting,
            gate,
            lack_of_ports,
            lack_of_room,
            lack_of_headers,
            access_log: None,
        })
    }

    /// Says how many connections there may be from now on.
    pub(crate) fn allow(&self, allowance: Allowance) {
        self.gate.allow(allowance);
    }

    /// How many there may be now; `usize::MAX` without a limit.
    pub(crate) fn most_connections(&self) -> usize {
        self.gate.most()
    }

    /// Has an access log told of each connection's end, also of those that reach no backend.
    pub fn with_access_log(self, access_log: Option<AccessTap>) -> Self {
        Self { access_log, ..self }
    }

    /// Connections that are open or being made.
    pub fn open_connections(&self) -> usize {
        self.connections.len()
    }

    /// Waits until the last connection has ended. New ones may still come: stop the servers first.
    pub async fn drained(&self) {
        self.connections.close();
        self.connections.wait().await;
    }

    /// Ends all connections by reset, with the reason `drain`, and those that would come.
    pub fn abort_connections(&self) {
        self.aborting.store(true, Ordering::Release); // Pairs with the load in `unless_aborted`.
        self.workers.wake_all();
    }

    /// Has every connection look whether its backend [has left](crate::serve::balancer::Backend::leave).
    pub(crate) fn look_at_backends(&self) {
        self.workers.wake_all();
    }

    /// The workers, for a hand-over.
    pub(crate) fn lines(&self) -> WorkerLines {
        self.workers.lines()
    }

    /// Has the workers find no pipes, so that they copy.
    #[cfg(test)]
    pub(crate) fn refuse_pipes(&self) {
        self.workers.ask(|| crate::serve::pipe::tests::REFUSING.set(true));
    }

    /// Goes on with a connection of another process.
    pub(crate) fn take_over(self: &Arc<Self>, mut coming: ComingStream) {
        let (shared, open, counted) = (Arc::clone(self), self.connections.token(), Counted::go_on(&coming.port));
        let address = coming.address.take();
        self.workers.place_anywhere(move |seat| {
            let stay = Stay { _open: open, _seat: seat, _counted: counted, _address: address };
            go_on(coming, shared, stay)
        });
    }

    /// Tells an operator of what turns clients away and only he can change.
    fn complain(&self, reason: DropReason, service: &ServicePortName, client: SocketAddr) {
        let now = Instant::now();
        match reason {
            DropReason::LocalPorts if self.lack_of_ports.is_news(now) => {
                let remedy = "another --upstream-source, or a wider net.ipv4.ip_local_port_range";
                warn!(%service, %reason, remedy, "no source port is left towards any backend: clients are reset");
            }
            DropReason::ProxyHeader if self.lack_of_headers.is_news(now) => {
                let remedy = "have it send one (send-proxy, send-proxy-v2), or take it out of --accept-proxy-from";
                let balancer = client.ip();
                warn!(
                    %service, client = %balancer, %reason, remedy,
                    "a balancer in front does not begin with a PROXY header in time: its clients are reset"
                );
            }
            _ => {}
        }
    }

    /// Runs a connection until its end or until all are aborted, whichever comes first.
    async fn unless_aborted(&self, mut connection: Pin<&mut impl Future<Output = ()>>) {
        poll_fn(|cx| match self.aborting.load(Ordering::Acquire) {
            true => Poll::Ready(()),
            false => connection.as_mut().poll(cx),
        })
        .await;
    }
}

/// Accepts the clients of one listener. Made and stopped by `Listeners`; dropping it stops it, too.
#[derive(Debug)]
pub struct TcpServer(Listening);

impl TcpServer {
    /// Has workers accept from a listening socket (see [`socket::listen_tcp`]).
    ///
    /// # Errors
    /// The event loops or the socket do not take it: no memory, no watch, no listening socket.
    pub fn start(
        listener: Arc<OwnedFd>,
        key: ListenKey,
        target: TargetCell,
        shared: Arc<TcpShared>,
    ) -> io::Result<Self> {
        let lack = News::since(Instant::now());
        let server = Server { listener: Arc::clone(&listener), key, target, shared: Arc::clone(&shared), lack };
        let server = Arc::new(server);
        let listening = shared.workers.listen(&listener, move |number| Acceptor {
            number,
            server: Arc::clone(&server),
            pace: Cell::new(Pace::start()),
        })?;
        Ok(Self(listening))
    }

    /// Stops to accept and gives the socket back, watched by nobody: it may now be parked, handed over or closed.
    /// Connections go on.
    pub async fn stop(self) -> Arc<OwnedFd> {
        self.0.end().await
    }
}

/// What the workers' acceptors of one listener share.
struct Server {
    listener: Arc<OwnedFd>,
    key: ListenKey,
    target: TargetCell,
    shared: Arc<TcpShared>,
    /// That it cannot accept: all workers find out at once.
    lack: News,
}

/// Accepts on one worker.
struct Acceptor {
    number: Foreign,
    server: Arc<Server>,
    pace: Cell<Pace>,
}

/// How many an acceptor takes in one go before other tasks get their turn, and how long it rests when it cannot. Four bytes,
/// as each listener has one for each worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pace {
    burst: u8,
    /// Somebody was accepted since the last rest.
    has_accepted: bool,
    pause: Pause,
}

impl Pace {
    /// The most that are accepted in one go. It begins with one, doubles when so many were there, and halves when not: so
    /// that few calls are made only to hear that nobody waits.
    const BURST: u8 = 16;

    fn start() -> Self {
        Self { burst: 1, has_accepted: false, pause: Pause::default() }
    }

    /// So many were there. Only after a longest burst pauses are short again: at the limit each client that is turned away
    /// leaves a descriptor for the next, and pauses that begin anew with each of them would never grow.
    fn after_burst(self) -> Self {
        let pause = if self.burst == Self::BURST { Pause::default() } else { self.pause };
        Self { burst: (self.burst * 2).min(Self::BURST), pause, ..self }
    }

    /// Nobody waits any more.
    fn after_last(self) -> Self {
        Self { burst: (self.burst / 2).max(1), pause: Pause::default(), ..self }
    }

    /// Somebody has come.
    fn after_accept(self) -> Self {
        Self { has_accepted: true, ..self }
    }

    /// The Service has as many as it allows. Each that ends makes room for one, and nobody else takes that: pauses begin anew
    /// with each that comes, and stay about as short as its connections are.
    fn after_last_place(self) -> Self {
        if self.has_accepted { Self::start().after_lack() } else { self.after_lack() }
    }

    /// It could not accept.
    fn after_lack(self) -> Self {
        Self { burst: 1, has_accepted: false, pause: self.pause.next() }
    }
}

impl Readable for Acceptor {
    fn readable(&self, worker: &Rc<Worker>) {
        if let Some(pause) = self.accept(worker) {
            worker.mute(self.number, &self.server.listener, pause);
        }
    }

    fn unwatch(&self, epoll: &OwnedFd) {
        let _ = epoll::delete(epoll, &self.server.listener); // Not there where it was muted.
    }

    fn stays_mute(&self) -> Option<Duration> {
        if !standstill::accepts() {
            return Some(standstill::PAUSE);
        }
        let reason = self.server.closed()?;
        // Another worker may have let in who waited: then there is no pause to be counted.
        socket::has_waiting(&self.server.listener).then(|| self.wait_for_room(reason))
    }
}

impl Acceptor {
    /// Lets in some of those who wait. For how long to rest, where it cannot.
    fn accept(&self, worker: &Rc<Worker>) -> Option<Duration> {
        if !standstill::accepts() {
            return Some(standstill::PAUSE);
        }
        for _ in 0..self.pace.get().burst {
            let counted = match self.server.take_place() {
                Ok(counted) => counted,
                Err(reason) => return Some(self.wait_for_room(reason)),
            };
            match socket::accept(&self.server.listener) {
                Ok((socket, peer)) => {
                    self.server.admit(worker, socket, peer, counted);
                    self.pace.set(self.pace.get().after_accept());
                }
                Err(error) => match Refusal::of(&error) {
                    Refusal::Empty => {
                        self.pace.set(self.pace.get().after_last());
                        return None;
                    }
                    Refusal::Gone => {}
                    Refusal::Lack(reason) => {
                        self.server.target.load().port.stats.dropped.count(reason);
                        return Some(self.wait_for_kernel(&error, Some(reason)));
                    }
                    Refusal::Broken => return Some(self.wait_for_kernel(&error, None)),
                },
            }
        }
        self.pace.set(self.pace.get().after_burst());
        None
    }

    /// The kernel has said no. `reason` is what it lacks. For how long to rest.
    fn wait_for_kernel(&self, error: &io::Error, reason: Option<DropReason>) -> Duration {
        if self.server.lack.is_news(Instant::now()) {
            let service = &self.server.target.load().port.name;
            let reason = reason.map(tracing::field::display);
            warn!(%service, listen = %self.server.key, reason, %error, "cannot accept, clients wait");
        }
        let reason = reason.map(|reason| match reason {
            DropReason::FdLimit => PauseReason::FdLimit,
            _ => PauseReason::Memory,
        });
        self.rest(self.pace.get().after_lack(), reason, Pause::LONGEST)
    }

    /// There are as many connections as there may be. For how long to rest.
    fn wait_for_room(&self, reason: PauseReason) -> Duration {
        let of_service = reason == PauseReason::ServiceLimit;
        let news = if of_service { &self.server.lack } else { &self.server.shared.lack_of_room };
        if news.is_news(Instant::now()) {
            let service = of_service.then(|| self.server.target.load().port.name.to_string());
            let (open, remedy) = (self.server.shared.open_connections(), remedy(reason));
            warn!(service, %reason, open, remedy, "no room for more connections, clients wait");
        }
        let pace = self.pace.get();
        // What all listeners share is nobody's own: one with short pauses would take it before the others look.
        let pace = if of_service { pace.after_last_place() } else { pace.after_lack() };
        self.rest(pace, Some(reason), Pause::LONGEST_FOR_ROOM)
    }

    /// Does not look for clients for a time, longer each time up to the longest.
    fn rest(&self, pace: Pace, reason: Option<PauseReason>, longest: Duration) -> Duration {
        self.pace.set(pace);
        let length = pace.pause.length().min(longest);
        if let Some(reason) = reason {
            let now = Moment::of(Instant::now());
            PROCESS.accept_paused[usize::from(reason)].add(now.0, length.as_millis() as u64);
        }
        length
    }
}

impl Server {
    /// Why nobody may come in now; `None` where one may.
    fn closed(&self) -> Option<PauseReason> {
        let shared = &self.shared;
        let reason = shared.gate.closed(shared.open_connections());
        reason.or_else(|| self.target.load().port.is_full().then_some(PauseReason::ServiceLimit))
    }

    /// Counts the next client before it is there, so that of workers that see the last place only one takes it.
    fn take_place(&self) -> Result<Counted, PauseReason> {
        match self.shared.gate.closed(self.shared.open_connections()) {
            Some(reason) => Err(reason),
            None => Counted::begin(&self.target.load().port).ok_or(PauseReason::ServiceLimit),
        }
    }

    /// Gives a client to a task of its own, or turns it away.
    fn admit(&self, worker: &Rc<Worker>, socket: OwnedFd, peer: SocketAddr, counted: Counted) {
        let target = self.target.load();
        let port = &target.port;
        port.stats.accepted.increment();
        let access_log = self.shared.access_log.as_ref();
        let told = access_log.filter(|tap| tap.takes_next());
        let draft = told.map(|tap| tap.draft(peer, self.key, target.kind, port));
        let admission = match Admission::of(&self.target, &target, peer) {
            Ok(admission) => admission,
            Err(reason) => return turn_away(&socket, peer, port, reason, draft.as_deref()),
        };
        let mut guest = Guest::new(socket, peer, port, target.kind.entry());
        guest.draft = draft;
        let (listen, shared, open) = (self.key, Arc::clone(&self.shared), self.shared.connections.token());
        let address = target.address.clone();
        self.shared.workers.place(worker, move |seat| {
            let stay = Stay { _open: open, _seat: seat, _counted: counted, _address: address };
            serve(guest, listen, admission, shared, stay)
        });
    }
}

/// A client that was let in and has no backend yet, be it on its way to its worker. Dropped, it is turned away.
struct Guest<S: AsFd> {
    client: Option<S>,
    /// Who it is, as far as is known: a balancer in front, until its header was read.
    peer: SocketAddr,
    port: Arc<PortState>,
    /// Where it came in.
    entry: Entry,
    /// Why, if it comes to that: that the task was cancelled, as long as nobody says otherwise.
    reason: DropReason,
    /// Backends that were tried.
    tries: u32,
    /// What an access log is told at the end.
    draft: Option<Box<Draft>>,
}

impl Guest<OwnedFd> {
    fn new(client: OwnedFd, peer: SocketAddr, port: &Arc<PortState>, entry: Entry) -> Self {
        let port = Arc::clone(port);
        Self { client: Some(client), peer, port, entry, reason: DropReason::Drain, tries: 0, draft: None }
    }

    /// Has the worker of this thread watch the client; `None` where the kernel takes no more.
    fn register(mut self) -> Option<Guest<Stream>> {
        match Stream::new(self.client.take()?) {
            Ok(client) => {
                let port = Arc::clone(&self.port);
                let draft = self.draft.take();
                Some(Guest {
                    client: Some(client),
                    peer: self.peer,
                    port,
                    entry: self.entry,
                    reason: self.reason,
                    tries: self.tries,
                    draft,
                })
            }
            Err(Unwatched { socket, .. }) => {
                self.client = Some(socket);
                self.reason = DropReason::Memory;
                None
            }
        }
    }
}

impl<S: AsFd> Guest<S> {
    /// What an access log is to be told, up to here.
    fn take_draft(&mut self) -> Option<Box<Draft>> {
        let mut draft = self.draft.take()?;
        draft.tries = self.tries;
        Some(draft)
    }
}

impl<S: AsFd> Drop for Guest<S> {
    fn drop(&mut self) {
        let draft = self.take_draft();
        if let Some(client) = &self.client {
            let reason = if panicking() { DropReason::Panic } else { self.reason };
            turn_away(client, self.peer, &self.port, reason, draft.as_deref());
        }
    }
}

/// Counts a connection for as long as it is there: as an open one, as its worker's, as its ServicePort's, and as one that
/// needs the address where it came in.
struct Stay {
    _open: TaskTrackerToken,
    _seat: Seat,
    _counted: Counted,
    _address: Option<Hold>,
}

/// Why accept gave no connection.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// Nobody waits.
    Empty,
    /// One client is gone before it was served; the next one may be fine.
    Gone,
    /// This host lacks something; clients wait meanwhile. Each pause for it is counted, not each client.
    Lack(DropReason),
    /// It is no listening socket (any more).
    Broken,
}

impl Refusal {
    fn of(error: &io::Error) -> Self {
        match Errno::from_io_error(error) {
            Some(Errno::AGAIN) => Self::Empty,
            Some(Errno::MFILE | Errno::NFILE) => Self::Lack(DropReason::FdLimit),
            Some(Errno::NOMEM | Errno::NOBUFS) => Self::Lack(DropReason::Memory),
            Some(Errno::INVAL | Errno::BADF | Errno::NOTSOCK | Errno::FAULT) | None => Self::Broken,
            // What the network did to a connection that was waiting comes out of accept, too.
            Some(_) => Self::Gone,
        }
    }
}

/// The pause of a listener that cannot accept, or may not: 5 ms, doubling to 1 s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pause {
    /// 0 where none was needed since all who waited were accepted, or many in a row.
    length_ms: u16,
}

impl Pause {
    const FIRST_MS: u16 = 5;
    const LONGEST_MS: u16 = 1_000;
    const LONGEST: Duration = Duration::from_millis(Self::LONGEST_MS as u64);
    /// Whether there is room costs no system call to ask. Beside the time from one look at what is left to the next
    /// (`headroom`) it is what recovery takes, which has a second.
    const LONGEST_FOR_ROOM: Duration = Duration::from_millis(500);

    fn next(self) -> Self {
        Self { length_ms: (self.length_ms * 2).clamp(Self::FIRST_MS, Self::LONGEST_MS) }
    }

    fn length(self) -> Duration {
        Duration::from_millis(self.length_ms.into())
    }
}

/// Something that several workers find out, and that is told by one of them, and by none again for a time: at the
/// limit, pauses and accepts come by turns.
#[derive(Debug)]
struct News {
    since: Instant,
    /// Not to be told before, in milliseconds.
    next_ms: AtomicU64,
}

impl News {
    const TOLD_AGAIN_AFTER: Duration = Duration::from_secs(10);

    fn since(since: Instant) -> Self {
        Self { since, next_ms: AtomicU64::new(0) }
    }

    fn is_news(&self, now: Instant) -> bool {
        let now = now.duration_since(self.since);
        let again = (now + Self::TOLD_AGAIN_AFTER).as_millis() as u64;
        let next = self.next_ms.load(Ordering::Relaxed);
        now.as_millis() as u64 >= next
            && self.next_ms.compare_exchange(next, again, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// Closes a client's connection by reset and counts why. (A drop without any answer is made by a filter on the listener.)
fn turn_away(client: &impl AsFd, peer: SocketAddr, port: &PortState, reason: DropReason, draft: Option<&Draft>) {
    debug!(service = %port.name, client = %peer, %reason, "client turned away");
    port.stats.dropped.count(reason);
    if let Some(draft) = draft {
        draft.turned_away(reason);
    }
    socket::reset_on_close(client);
}

/// One connection, from its client on.
fn serve(
    guest: Guest<OwnedFd>,
    listen: ListenKey,
    admission: Admission,
    shared: Arc<TcpShared>,
    stay: Stay,
) -> impl Future<Output = ()> {
    carry(reach(guest, listen, admission, Arc::clone(&shared)), shared, stay)
}

/// One connection that another process has begun.
fn go_on(coming: ComingStream, shared: Arc<TcpShared>, stay: Stay) -> impl Future<Output = ()> {
    let this = Arc::clone(&shared);
    let registering = async move {
        let named = named(|| (Arc::clone(&coming.port), coming.listen(), coming.client_named()));
        Some((coming.register(&this)?, named))
    };
    carry(registering, shared, stay)
}

/// One connection. Its future is paid for by each open connection: what ends early lives in a box.
fn carry(
    reaching: impl Future<Output = Option<(Connection, Named)>>,
    shared: Arc<TcpShared>,
    stay: Stay,
) -> impl Future<Output = ()> {
    let reaching = Box::pin(reaching);
    async move {
        let _stay = stay;
        let carry = pin!(async {
            let Some((mut connection, named)) = reaching.await else { return };
            let Some(reason) = connection.relay(&shared.options.limits).await else { return };
            let Some((port, listen, peer)) = named.as_deref() else { return };
            let (upstream_bytes, downstream_bytes) = connection.bytes();
            debug!(
                service = %port.name, %listen, client = %peer, backend = %connection.backend().address(), %reason,
                upstream_bytes, downstream_bytes, "connection closed"
            );
        });
        shared.unless_aborted(carry).await;
    }
}

/// What the log is told of a connection at its end; `None` where it is told nothing.
type Named = Option<Box<(Arc<PortState>, ListenKey, SocketAddr)>>;

fn named(names: impl FnOnce() -> (Arc<PortState>, ListenKey, SocketAddr)) -> Named {
    enabled!(Level::DEBUG).then(|| Box::new(names()))
}

/// Finds out who the client is and reaches a backend.
async fn reach(
    guest: Guest<OwnedFd>,
    listen: ListenKey,
    admission: Admission,
    shared: Arc<TcpShared>,
) -> Option<(Connection, Named)> {
    let mut guest = guest.register()?;
    match guest.reach(listen, admission, &shared).await {
        Ok(connection) => {
            let named = named(|| (Arc::clone(&guest.port), listen, guest.peer));
            Some((connection, named))
        }
        Err(reason) => {
            shared.complain(reason, &guest.port.name, guest.peer);
            guest.reason = reason;
            None
        }
    }
}

impl Guest<Stream> {
    async fn reach(
        &mut self,
        listen: ListenKey,
        admission: Admission,
        shared: &TcpShared,
    ) -> Result<Connection, DropReason> {
        let TcpOptions { connect, limits, header_timeout, .. } = &shared.options;
        let introduced = self.introduce(listen, admission, *header_timeout).await?;
        let Reached { backend, stream } = self.dial(&introduced.balancer, connect).await?;
        let client = self.client.take().ok_or(self.reason)?;
        set_if_they_last(&client, &stream, shared.options.if_lasting());
        let mut connection = Connection::open(client, stream, backend, self.entry).of(&self.port);
        connection.begin_with(introduced.preface);
        connection.tell(self.take_draft());
        let own = introduced.balancer.tcp_settings().map(|settings| limits.of_service(&settings));
        Ok(match own.filter(|own| own != limits) {
            Some(own) => connection.limited(own),
            None => connection,
        })
    }

    /// Finds out who it is, and whether it may come.
    async fn introduce(
        &mut self,
        listen: ListenKey,
        admission: Admission,
        header_timeout: Duration,
    ) -> Result<Introduced, DropReason> {
        let (stream, peer) = (self.client.as_ref().ok_or(self.reason)?, self.peer);
        let parties = Parties { client: peer, destination: listen.address() };
        let parties = admission.parties(stream, parties, header_timeout).await?;
        self.note_client(parties.client);
        admission.judge(peer.ip(), &self.port, &parties)
    }

    /// It is whom a balancer in front says, not that balancer.
    fn note_client(&mut self, client: SocketAddr) {
        if client != self.peer
            && let Some(draft) = &mut self.draft
        {
            draft.introduce(client);
        }
        self.peer = client;
    }

    /// Reaches a backend, unless the client goes away meanwhile.
    async fn dial(&mut self, balancer: &Balancer, options: &ConnectOptions) -> Result<Reached, DropReason> {
        let (client, peer) = (self.client.as_ref().ok_or(self.reason)?, self.peer);
        let source = balancer.port.preserve.source_for(peer);
        select! {
            biased;
            reached = dial(balancer, peer.ip(), source, options, &mut self.tries) => reached,
            _ = client.broken() => Err(DropReason::ClientAbort),
        }
    }
}

/// A connection of another process, with what it belongs to here. Dropped, it goes on where it comes from.
pub(crate) struct ComingStream {
    pub(crate) client: OwnedFd,
    pub(crate) upstream: OwnedFd,
    pub(crate) entry: Entry,
    pub(crate) port: Arc<PortState>,
    pub(crate) backend: Arc<Backend>,
    /// What the Service says about its connections,
    pub(crate) settings: Option<Arc<TcpSettings>>,
    /// or what the connection had where there is no such Service any more.
    pub(crate) departed_with: Option<LimitOptions>,
    pub(crate) so_far: (SoFar, [u64; 2]),
    pub(crate) draft: Option<DraftRecord>,
    /// What keeps the address local where the client came in.
    pub(crate) address: Option<Hold>,
}

impl ComingStream {
    /// Where the client came in. A connection that is broken may not know any more.
    pub(crate) fn listen(&self) -> ListenKey {
        let address = SockRef::from(&self.client).local_addr().ok().and_then(|address| address.as_socket());
        ListenKey::at(address.unwrap_or(NOWHERE), Protocol::Tcp)
    }

    fn peer(&self) -> SocketAddr {
        let address = SockRef::from(&self.client).peer_addr().ok().and_then(|address| address.as_socket());
        address.unwrap_or(NOWHERE)
    }

    /// Who the client is, as far as it was noted that a balancer in front has said so.
    fn client_named(&self) -> SocketAddr {
        self.draft.and_then(|draft| draft.client).unwrap_or_else(|| self.peer())
    }

    /// Has the worker of this thread watch it; `None` where the kernel takes no more: then it is reset, as it is nobody
    /// else's any more.
    fn register(self, shared: &TcpShared) -> Option<Connection> {
        let draft = self.draft.and_then(|so_far| self.draft(shared, so_far));
        let options = shared.options.limits;
        let own = self.departed_with.or_else(|| Some(options.of_service(self.settings.as_deref()?)));
        let Self { client, upstream, entry, port, backend, so_far, .. } = self;
        let (client, upstream) = match (Stream::new(client), Stream::new(upstream)) {
            (Ok(client), Ok(upstream)) => (client, upstream),
            (client, upstream) => {
                for stream in [&client, &upstream] {
                    socket::reset_on_close(match stream {
                        Ok(stream) => stream.as_fd(),
                        Err(unwatched) => unwatched.socket.as_fd(),
                    });
                }
                backend.stats.closed.count(CloseReason::Drain);
                warn!(service = %port.name, backend = %backend.address(), "cannot watch a connection of the last process: it is reset");
                return None;
            }
        };
        set_if_they_last(&client, &upstream, shared.options.if_lasting());
        let mut connection = Connection::go_on(client, upstream, backend, entry, so_far).of(&port);
        connection.tell(draft);
        Some(match own.filter(|own| *own != options) {
            Some(own) => connection.limited(own),
            None => connection,
        })
    }

    fn draft(&self, shared: &TcpShared, so_far: DraftRecord) -> Option<Box<Draft>> {
        let tap = shared.access_log.as_ref()?;
        Some(tap.go_on(self.peer(), self.listen(), ListenerKind::of(self.entry), &self.port, so_far))
    }
}

/// For what has no address any more.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

#[cfg(test)]
mod tests {
    use std::thread;

    use arc_swap::ArcSwap;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::name::Family;
    use crate::serve::balancer::Table;
    use crate::serve::connect::Steps;
    use crate::serve::scripted::{
        LOOPBACK, backend, backends, balancer, black_hole, echo, expect_reset, expect_turned_away, named, on_worker,
        pair, read_all, refusing, reset, soon, until,
    };
    use crate::serve::worker;
    use crate::serve::{Target, Verdict};
    use crate::stats::ConnectFailure;

    /// A listener with its server, on an address of the test's own.
    struct Served {
        key: ListenKey,
        target: TargetCell,
        shared: Arc<TcpShared>,
        balancer: Arc<Balancer>,
        server: TcpServer,
    }

    impl Served {
        fn start(address: &str, backends: &[Arc<Backend>]) -> Self {
            Self::with_options(address, backends, TcpOptions::default())
        }

        fn with_options(address: &str, backends: &[Arc<Backend>], options: TcpOptions) -> Self {
            let key = ListenKey::at(address.parse().expect("an address"), Protocol::Tcp);
            let balancer = balancer(backends);
            let target = Arc::new(ArcSwap::from_pointee(Target::serving(&balancer)));
            let shared = Arc::new(TcpShared::new(options).expect("threads"));
            let listener = Arc::new(socket::listen_tcp(key).expect("a free address"));
            let server =
                TcpServer::start(listener, key, Arc::clone(&target), Arc::clone(&shared)).expect("a listening socket");
            Self { key, target, shared, balancer, server }
        }

        async fn connect(&self) -> TcpStream {
            soon(TcpStream::connect(self.key.address())).await.expect("a listener")
        }

        /// What the backend says to a client that says nothing.
        async fn ask(&self) -> String {
            let mut client = self.connect().await;
            client.shutdown().await.expect("a connection");
            let (bytes, outcome) = read_all(&mut client).await;
            outcome.expect("an end of stream");
            String::from_utf8(bytes).expect("a name")
        }

        /// Waits until whoever was accepted has a task (a turn), on its worker (another), that was polled (a third).
        fn settle(&self) {
            (0..3).for_each(|_| drop(self.shared.workers.ask(|| ())));
        }

        fn dropped(&self, reason: DropReason) -> u64 {
            self.balancer.port.stats.dropped.get(reason)
        }
    }

    /// Sends a byte and waits until it comes back.
    async fn ping(stream: &mut TcpStream) {
        stream.write_all(b"x").await.expect("a connection");
        soon(stream.read_exact(&mut [0])).await.expect("an echo");
    }

    #[tokio::test]
    async fn t152_given_an_echo_backend_when_a_client_talks_to_it_then_all_comes_back() {
        let [web] = backends([echo().await]);
        let served = Served::start("127.83.0.1:7300", std::slice::from_ref(&web));
        let mut client = served.connect().await;
        let sent: Vec<u8> = (0..300_000_u32).map(|number| (number * 31 / 8) as u8).collect();

        let (mut read, mut write) = client.split();
        let sending = async {
            write.write_all(&sent).await.expect("a connection");
            write.shutdown().await.expect("a connection");
        };
        let mut received = Vec::new();
        soon(async { tokio::join!(sending, read.read_to_end(&mut received)) }).await.1.expect("an end of stream");

        assert!(received == sent);
        until(|| web.stats.closed.get(CloseReason::Finished) == 1).await;
        assert_eq!(served.balancer.port.stats.accepted.get(), 1);
        assert_eq!(web.stats.downstream_bytes.get(), 300_000);
    }

    #[tokio::test]
    async fn t129_given_three_backends_when_clients_come_then_they_are_served_in_turn() {
        let all = backends([named("one").await, named("two").await, named("three").await]);
        let served = Served::start("127.83.0.2:7300", &all);

        for _ in 0..2 {
            assert_eq!([served.ask().await, served.ask().await, served.ask().await], ["one", "two", "three"]);
        }
    }

    #[tokio::test]
    async fn t178_given_an_ipv6_listener_when_a_client_comes_then_it_is_served() {
        let served = Served::start("[::1]:7303", &backends([named("one").await]));

        assert_eq!(served.ask().await, "one");
    }

    #[tokio::test]
    async fn t156_given_an_open_connection_when_its_server_stops_then_it_goes_on_and_the_port_can_be_closed() {
        let served = Served::start("127.83.0.3:7300", &backends([echo().await]));
        let mut client = served.connect().await;
        ping(&mut client).await;

        let listener = served.server.stop().await;
        assert_eq!(Arc::strong_count(&listener), 1, "nobody else holds the socket");
        drop(listener);

        ping(&mut client).await;
        let refused = TcpStream::connect(served.key.address()).await.expect_err("nobody listens");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn given_an_open_connection_when_a_server_is_parked_and_revived_then_it_goes_on_and_new_ones_are_served() {
        let Served { key, target, shared, server, .. } = Served::start("127.83.0.4:7300", &backends([echo().await]));
        let mut before = soon(TcpStream::connect(key.address())).await.expect("a listener");
        ping(&mut before).await;

        let mut server = server;
        for _ in 0..3 {
            let listener = server.stop().await;
            socket::park_tcp(&listener).expect("a listener");
            let refused = TcpStream::connect(key.address()).await.expect_err("parked");
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            socket::revive_tcp(&listener).expect("a parked listener");
            server = TcpServer::start(listener, key, Arc::clone(&target), Arc::clone(&shared)).expect("revived");
            ping(&mut soon(TcpStream::connect(key.address())).await.expect("a listener")).await;
        }

        ping(&mut before).await;
    }

    /// CPU time of all workers.
    fn cpu_time(shared: &TcpShared) -> Duration {
        let of_a_worker = || {
            let times = std::fs::read_to_string("/proc/thread-self/schedstat").expect("procfs");
            Duration::from_nanos(times.split(' ').next().expect("a first word").parse().expect("a number"))
        };
        shared.workers.ask(of_a_worker).into_iter().sum()
    }

    #[tokio::test]
    async fn given_a_parked_and_then_a_revived_server_when_nobody_comes_then_neither_uses_the_cpu() {
        let window = Duration::from_millis(300);
        let Served { key, target, shared, server, .. } = Served::start("127.83.0.5:7300", &backends([echo().await]));
        let listener = server.stop().await;
        socket::park_tcp(&listener).expect("a listener");

        let begin = cpu_time(&shared);
        tokio::time::sleep(window).await; // Nothing to wait for: that nothing happens is the point.
        let parked = cpu_time(&shared) - begin;
        socket::revive_tcp(&listener).expect("a parked listener");
        let _server = TcpServer::start(listener, key, target, Arc::clone(&shared)).expect("revived");
        ping(&mut soon(TcpStream::connect(key.address())).await.expect("a listener")).await;
        let begin = cpu_time(&shared);
        tokio::time::sleep(window).await;
        let revived = cpu_time(&shared) - begin;

        assert!(parked < window / 10 && revived < window / 10, "{parked:?} parked, {revived:?} revived");
    }

    #[tokio::test]
    async fn given_verdicts_when_clients_come_then_they_are_reset_and_counted_with_the_reason() {
        let served = Served::start("127.83.0.6:7300", &backends([named("one").await]));
        let port = &served.balancer.port;

        served.target.store(Arc::new(Target::both_sides(port, Verdict::Reject)));
        expect_turned_away(served.key.address()).await;
        served.target.store(Arc::new(Target::both_sides(port, Verdict::Drop)));
        expect_turned_away(served.key.address()).await;
        served.target.store(Arc::new(Target::serving(&served.balancer)));

        assert_eq!(served.ask().await, "one");
        assert_eq!(served.dropped(DropReason::NoEndpoints), 1);
        assert_eq!(served.dropped(DropReason::NoLocalEndpoints), 1);
        assert_eq!(port.stats.accepted.get(), 3);
    }

    #[tokio::test]
    async fn given_a_target_of_two_sides_when_a_client_of_this_node_comes_then_it_gets_the_inside() {
        let served = Served::start("127.83.0.7:7300", &backends([named("one").await]));
        let inside_of = ["127.0.0.0/8".parse().expect("a network")];
        let two_sided =
            Target { outside: Verdict::Drop, inside_of: Arc::new(inside_of), ..Target::serving(&served.balancer) };

        served.target.store(Arc::new(two_sided));

        assert_eq!(served.ask().await, "one");
    }

    #[tokio::test]
    async fn t155_given_a_client_that_resets_when_relayed_then_the_backend_sees_it() {
        let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let address = backend(move |mut stream| {
            let told = told.clone();
            async move {
                let (bytes, outcome) = read_all(&mut stream).await;
                if !bytes.is_empty() {
                    let _ = told.send(outcome.map_err(|error| error.kind())); // Not of a stranger that came by.
                }
            }
        });
        let [web] = backends([address.await]);
        let served = Served::start("127.83.0.8:7300", std::slice::from_ref(&web));
        let mut client = served.connect().await;
        client.write_all(b"half a requ").await.expect("a connection");
        until(|| web.stats.upstream_bytes.get() == 11).await;

        reset(client);

        assert_eq!(soon(heard.recv()).await, Some(Err(io::ErrorKind::ConnectionReset)));
        until(|| web.stats.closed.get(CloseReason::ClientAbort) == 1).await;
    }

    #[tokio::test]
    async fn t179_given_a_health_check_that_connects_and_closes_when_counted_then_it_is_no_connection_of_use() {
        let [web] = backends([echo().await]);
        let served = Served::start("127.83.0.18:7300", std::slice::from_ref(&web));

        drop(served.connect().await);

        until(|| web.stats.closed.get(CloseReason::ClientAbort) == 1).await;
        assert_eq!(web.stats.closed.get(CloseReason::Finished), 0);
    }

    #[tokio::test]
    async fn t161_given_one_dead_backend_when_clients_come_then_all_are_served() {
        let (_held, dead) = refusing();
        let all = backends([dead, named("one").await]);
        let served = Served::start("127.83.0.9:7300", &all);

        for _ in 0..4 {
            assert_eq!(served.ask().await, "one");
        }
        assert!(all[0].stats.connect_failures.get(ConnectFailure::Refused) >= 2);
    }

    fn quick() -> TcpOptions {
        steps(Duration::from_millis(10)) // 150 ms in all.
    }

    fn patient() -> TcpOptions {
        steps(Duration::from_secs(3_600))
    }

    fn steps(first: Duration) -> TcpOptions {
        let steps = Steps { first, ..Steps::default() };
        TcpOptions { connect: ConnectOptions { steps, ..ConnectOptions::default() }, ..TcpOptions::default() }
    }

    #[tokio::test]
    async fn t163_given_only_a_black_hole_when_a_client_comes_then_it_is_reset_after_all_steps() {
        let (_held, silent) = black_hole();
        let served = Served::with_options("127.83.0.10:7300", &backends([silent]), quick());
        let begin = Instant::now();

        expect_turned_away(served.key.address()).await;

        assert!(begin.elapsed() >= quick().connect.steps.total());
        assert_eq!(served.dropped(DropReason::EjectedAll), 1);
    }

    #[tokio::test]
    async fn t164_given_a_client_stuck_at_a_black_hole_when_others_come_then_they_do_not_wait_for_it() {
        let (_held, silent) = black_hole();
        let all = backends([silent, named("one").await]);
        let served = Served::with_options("127.83.0.11:7300", &all, patient());

        let stuck = served.connect().await;
        until(|| served.balancer.port.stats.accepted.get() == 1).await;
        served.settle();

        assert_eq!(served.ask().await, "one");
        drop(stuck);
    }

    #[tokio::test]
    async fn given_a_client_that_resets_while_a_backend_is_dialed_then_the_dial_ends_and_it_is_counted() {
        let (_held, silent) = black_hole();
        let served = Served::with_options("127.83.0.12:7300", &backends([silent]), patient());
        let client = served.connect().await;
        until(|| served.shared.open_connections() == 1).await;

        reset(client);

        until(|| served.shared.open_connections() == 0).await;
        assert_eq!(served.dropped(DropReason::ClientAbort), 1);
    }

    #[tokio::test]
    async fn given_a_client_that_closed_its_half_while_a_backend_was_dialed_then_it_is_served() {
        let (_held, silent) = black_hole();
        let all = backends([silent, echo().await]);
        let served = Served::with_options("127.83.0.13:7300", &all, quick());
        let mut client = served.connect().await;

        client.write_all(b"request").await.expect("a connection");
        client.shutdown().await.expect("a connection");

        assert_eq!(read_all(&mut client).await.0, b"request");
    }

    #[tokio::test]
    async fn t166_given_a_client_stuck_at_a_black_hole_when_its_endpoint_is_removed_then_it_is_served_by_another() {
        let (_held, silent) = black_hole();
        let [silent, one] = backends([silent, named("one").await]);
        let served = Served::with_options("127.83.0.14:7300", &[silent], patient());
        let mut client = served.connect().await;
        until(|| served.balancer.port.stats.accepted.get() == 1).await;

        served.balancer.swap(Table::new(vec![one].into(), &[]));

        client.shutdown().await.expect("a connection");
        assert_eq!(read_all(&mut client).await.0, b"one");
    }

    #[tokio::test]
    async fn t171_given_connections_to_two_backends_when_one_leaves_then_its_own_are_reset_and_the_others_go_on() {
        let all = backends([echo().await, echo().await]);
        let served = Served::start("127.83.0.19:7300", &all);
        let mut leaving = served.connect().await;
        ping(&mut leaving).await;
        let mut staying = served.connect().await;
        ping(&mut staying).await;

        all[0].leave(Instant::now());
        served.shared.look_at_backends();

        expect_reset(&mut leaving).await;
        until(|| all[0].stats.closed.get(CloseReason::EndpointRemoved) == 1).await;
        ping(&mut staying).await;
    }

    #[tokio::test]
    async fn given_open_connections_when_all_are_aborted_then_peers_see_resets_and_the_drain_ends() {
        let (_held, silent) = black_hole();
        let all = backends([echo().await, silent]);
        let served = Served::with_options("127.83.0.15:7300", &all, patient());
        let mut relayed = served.connect().await;
        ping(&mut relayed).await;
        let mut dialing = served.connect().await;
        until(|| served.shared.open_connections() == 2).await;
        served.server.stop().await;

        served.shared.abort_connections();

        expect_reset(&mut relayed).await;
        expect_reset(&mut dialing).await;
        soon(served.shared.drained()).await;
        assert_eq!(all[0].stats.closed.get(CloseReason::Drain), 1);
        assert_eq!(served.balancer.port.stats.dropped.get(DropReason::Drain), 1);
    }

    /// The first stays, the second is handed to the other worker; none has been polled before.
    #[test]
    fn given_clients_on_their_way_to_a_worker_when_all_are_aborted_then_they_are_reset_and_counted() {
        on_worker(async {
            let workers = NonZeroUsize::MIN;
            let shared = Arc::new(TcpShared::new(TcpOptions { workers, ..TcpOptions::default() }).expect("threads"));
            let balancer = balancer(&[]);
            let target = Arc::new(ArcSwap::from_pointee(Target::serving(&balancer)));
            let key = ListenKey::new(LOOPBACK, 80, Protocol::Tcp);
            let listener = socket::open_tcp(Family::V4).expect("a socket").into(); // Not asked: the clients are there.
            let lack = News::since(Instant::now());
            let server = Server { listener, key, target, shared: Arc::clone(&shared), lack };
            shared.abort_connections();

            let mut clients = [pair().await, pair().await].map(|(client, accepted)| {
                let peer = accepted.peer_addr().expect("a connection");
                let (socket, counted) = (accepted.into_std().expect("a registered socket"), server.take_place());
                server.admit(&worker::current(), socket.into(), peer, counted.expect("no limit"));
                client
            });

            for client in &mut clients {
                expect_reset(client).await;
            }

            soon(shared.drained()).await;
            assert_eq!(balancer.port.stats.dropped.get(DropReason::Drain), 2);
        });
    }

    #[tokio::test]
    async fn given_a_client_that_no_event_loop_takes_when_served_then_it_is_counted_with_the_reason() {
        let balancer = balancer(&[]);
        let shared = Arc::new(TcpShared::new(TcpOptions::default()).expect("threads"));
        let unwatchable = || std::fs::File::open("/proc/self/exe").expect("this program").into();
        let counted = Arc::clone(&balancer.port);

        let ended = thread::spawn(move || {
            on_worker(async move {
                let guest =
                    Guest::new(unwatchable(), SocketAddr::from((LOOPBACK, 9)), &balancer.port, Entry::ClusterIp);
                let listen = ListenKey::new(LOOPBACK, 80, Protocol::Tcp);
                reach(guest, listen, Admission::Granted { balancer, send: None }, shared).await.is_none()
            })
        });

        assert!(ended.join().expect("no panic"));
        assert_eq!(counted.stats.dropped.get(DropReason::Memory), 1);
    }

    #[tokio::test]
    async fn given_a_client_without_a_backend_when_its_task_panics_then_it_is_reset_and_counted_as_such() {
        let (mut client, accepted) = pair().await;
        let port = Arc::clone(&balancer(&[]).port);
        let guest = Guest::new(
            accepted.into_std().expect("a registered socket").into(),
            SocketAddr::from((LOOPBACK, 9)),
            &port,
            Entry::ClusterIp,
        );

        let outcome = thread::spawn(move || {
            let _guest = guest;
            std::panic::resume_unwind(Box::new("on purpose"));
        })
        .join();

        assert!(outcome.is_err());
        expect_reset(&mut client).await;
        assert_eq!(port.stats.dropped.get(DropReason::Panic), 1);
    }

    #[tokio::test]
    async fn given_open_connections_when_they_end_by_themselves_then_the_drain_ends() {
        let served = Served::start("127.83.0.16:7300", &backends([echo().await]));
        let mut client = served.connect().await;
        ping(&mut client).await;
        served.server.stop().await;
        let drained = tokio::spawn({
            let shared = Arc::clone(&served.shared);
            async move { shared.drained().await }
        });

        assert!(!drained.is_finished());
        client.shutdown().await.expect("a connection");

        soon(drained).await.expect("no panic");
    }

    #[tokio::test]
    async fn given_a_burst_of_clients_when_they_come_at_once_then_all_are_served() {
        let served = Served::start("127.83.0.17:7300", &backends([named("one").await]));

        let clients: Vec<_> = (0..100).map(|_| served.ask()).collect();

        let answers = soon(futures_util::future::join_all(clients)).await;
        assert!(answers.iter().all(|answer| answer == "one"));
    }

    fn at_most(connections: u32) -> TcpOptions {
        TcpOptions { max_connections: NonZeroU32::new(connections), ..TcpOptions::default() }
    }

    /// A client that has asked, and waits: the workers have looked, and have accepted no more than so many.
    async fn waiting(served: &Served, accepted: u64) -> TcpStream {
        let mut client = served.connect().await;
        client.write_all(b"x").await.expect("the kernel takes it");
        served.settle();
        assert_eq!(served.balancer.port.stats.accepted.get(), accepted);
        client
    }

    #[tokio::test]
    async fn f14_given_as_many_connections_as_may_be_when_another_client_comes_then_it_waits_until_one_has_gone() {
        let served = Served::with_options("127.83.0.20:7300", &backends([echo().await]), at_most(2));
        let mut first = served.connect().await;
        let mut second = served.connect().await;
        ping(&mut first).await;
        ping(&mut second).await;

        let mut third = waiting(&served, 2).await;
        ping(&mut first).await;
        drop(second);

        soon(third.read_exact(&mut [0])).await.expect("an echo");
        assert!(DropReason::ALL.iter().all(|reason| served.dropped(*reason) == 0), "nobody was turned away");
        let paused = &PROCESS.accept_paused[usize::from(PauseReason::ConnectionLimit)];
        assert!(paused.seconds() > 0.0);
    }

    #[tokio::test]
    async fn given_as_many_connections_as_a_service_allows_when_another_comes_then_it_waits_and_other_services_go_on() {
        let served = Served::start("127.83.0.21:7300", &backends([echo().await]));
        let other = Served::start("127.83.0.22:7300", &backends([echo().await]));
        served.balancer.port.cap.set(NonZeroU32::new(1));
        let mut first = served.connect().await;
        ping(&mut first).await;

        let mut second = waiting(&served, 1).await;
        ping(&mut other.connect().await).await;
        drop(first);

        soon(second.read_exact(&mut [0])).await.expect("an echo");
        drop(second);
        until(|| served.balancer.port.stats.open.get() == 0).await;
    }

    #[tokio::test]
    async fn f22_given_no_room_when_a_client_comes_then_it_waits_until_there_is_and_open_connections_go_on() {
        let served = Served::start("127.83.0.23:7300", &backends([echo().await]));
        let mut before = served.connect().await;
        ping(&mut before).await;

        served.shared.allow(Allowance { by_descriptors: usize::MAX, by_memory: 0 });
        let mut late = waiting(&served, 1).await;
        ping(&mut before).await;
        served.shared.allow(Allowance { by_descriptors: usize::MAX, by_memory: usize::MAX });

        soon(late.read_exact(&mut [0])).await.expect("an echo");
    }

    #[test]
    fn given_a_connection_when_its_future_is_measured_then_it_is_small() {
        on_worker(async {
            let (_far, client) = pair().await;
            let peer = client.peer_addr().expect("a connection");
            let socket = client.into_std().expect("a registered socket").into();
            let listen = ListenKey::new(IpAddr::from([127, 0, 0, 1]), 80, Protocol::Tcp);
            let shared = Arc::new(TcpShared::new(TcpOptions::default()).expect("threads"));
            let (here, open) = (worker::current(), shared.connections.token());
            let (told, size) = std::sync::mpsc::channel();
            let options = Arc::clone(&shared);

            shared.workers.place(&here, move |seat| {
                let balancer = balancer(&[]);
                let guest = Guest::new(socket, peer, &balancer.port, Entry::ClusterIp);
                let counted = Counted::begin(&balancer.port).expect("no limit");
                let stay = Stay { _open: open, _seat: seat, _counted: counted, _address: None };
                let admission = Admission::Granted { balancer, send: None };
                let connection = serve(guest, listen, admission, options, stay);
                told.send(size_of_val(&connection)).expect("the test");
                connection
            });

            let size = size.recv().expect("a size");
            assert!(size <= 512, "{size} bytes");
        });
    }

    #[test]
    fn given_what_accept_says_when_judged_then_only_a_lack_pauses() {
        let refusal = |errno: Errno| Refusal::of(&errno.into());

        assert_eq!(refusal(Errno::AGAIN), Refusal::Empty);
        assert_eq!(refusal(Errno::CONNABORTED), Refusal::Gone);
        assert_eq!(refusal(Errno::NETUNREACH), Refusal::Gone);
        assert_eq!(refusal(Errno::INTR), Refusal::Gone);
        assert_eq!(refusal(Errno::MFILE), Refusal::Lack(DropReason::FdLimit));
        assert_eq!(refusal(Errno::NOBUFS), Refusal::Lack(DropReason::Memory));
        assert_eq!(refusal(Errno::INVAL), Refusal::Broken);
    }

    #[test]
    fn given_accepts_that_fail_when_they_go_on_then_pauses_double_to_a_second_and_begin_anew() {
        let pauses = std::iter::successors(Some(Pause::default()), |pause| Some(pause.next()));

        let lengths: Vec<_> = pauses.skip(1).take(10).map(|pause| pause.length().as_millis()).collect();

        assert_eq!(lengths, [5, 10, 20, 40, 80, 160, 320, 640, 1_000, 1_000]);
    }

    #[test]
    fn f14_given_accepts_that_fail_and_succeed_by_turns_when_they_go_on_then_pauses_grow_until_many_are_accepted() {
        let by_turns = (0..9).fold(Pace::start(), |pace, _| pace.after_burst().after_lack());
        assert_eq!(by_turns.pause.length(), Duration::from_secs(1));

        let bursts = std::iter::successors(Some(by_turns), |pace| Some(pace.after_burst()));
        let shown: Vec<_> = bursts.take(6).map(|pace| (pace.burst, pace.pause.length_ms)).collect();
        assert_eq!(shown, [(1, 1_000), (2, 1_000), (4, 1_000), (8, 1_000), (16, 1_000), (16, 0)]);
        assert_eq!(by_turns.after_last(), Pace::start());
    }

    #[test]
    fn given_a_service_with_room_now_and_then_when_one_comes_in_then_pauses_are_short_again() {
        let full = (0..9).fold(Pace::start(), |pace, _| pace.after_last_place());
        assert_eq!(full.pause.length(), Duration::from_secs(1));

        let came = full.after_accept().after_burst().after_last_place();

        let pauses: Vec<_> = std::iter::successors(Some(came), |pace| Some(pace.after_last_place()))
            .map(|pace| (pace.burst, pace.pause.length_ms))
            .take(3)
            .collect();
        assert_eq!(pauses, [(1, 5), (1, 10), (1, 20)]);
        assert_eq!(
            full.after_accept().after_lack().pause,
            full.pause,
            "where this host lacks something they stay long"
        );
        assert_eq!(size_of::<Pace>(), 4);
    }

    #[test]
    fn given_accepts_that_fail_and_succeed_by_turns_when_told_then_it_is_news_every_ten_seconds() {
        let now = Instant::now();
        let lack = News::since(now);

        let news = [0, 1, 9, 10, 11, 20].map(|second| lack.is_news(now + Duration::from_secs(second)));

        assert_eq!(news, [true, false, false, true, false, true]);
    }
}
