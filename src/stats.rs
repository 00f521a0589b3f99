//! Counters as atomics, and the words for every end.
//!
//! The truth about traffic lives here; `metrics` and `status` only read it. All counters are
//! `Relaxed`: each is true by itself, and no decision rests on two of them agreeing.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use once_cell::race::OnceBox;
use serde::Serialize;

/// A word of the event vocabulary.
pub(crate) trait Word: Copy + Into<usize> + 'static {
    /// Every word of its kind.
    const ALL: &'static [Self];

    fn as_str(self) -> &'static str;

    /// The one that is written so; `None` where this version knows none.
    fn of(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|known| known.as_str() == word)
    }
}

/// Declares an enum whose variants are words of the event vocabulary.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        pub enum $name { $($(#[$doc])* #[serde(rename = $word)] $variant,)+ }

        impl $name {
            /// Every word, in the order of declaration (the index into [`Tally`]).
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The word: the same in log, metric and status.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl Word for $name {
            const ALL: &'static [Self] = Self::ALL;

            fn as_str(self) -> &'static str { Self::as_str(self) }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl From<$name> for usize {
            fn from(word: $name) -> Self { word as usize }
        }
    };
}

words! {
    /// Why a connection or a flow that had reached a backend came to its end.
    CloseReason {
        /// Both sides said that they were done.
        Finished = "finished",
        /// The client went away or reset the connection.
        ClientAbort = "client_abort",
        /// The backend reset the connection.
        Reset = "reset",
        /// Nothing moved for the idle limit.
        Idle = "idle",
        /// A flow that no backend answered ran out of time.
        IdleUnreplied = "idle_unreplied",
        /// One side had closed and the other said nothing for the half-close limit.
        HalfClose = "half_close",
        /// It was as old as a connection may get.
        MaxAge = "max_age",
        /// The endpoint left what the Service may use.
        EndpointRemoved = "endpoint_removed",
        /// The backend's host answered port unreachable.
        Refused = "refused",
        /// The network lost the peer.
        Unreachable = "unreachable",
        /// A peer stopped answering.
        Timeout = "timeout",
        /// A newer flow needed the place.
        Evicted = "evicted",
        /// The process stopped before the stream did.
        Drain = "drain",
        /// The task that carried it panicked.
        Panic = "panic",
    }
}

words! {
    /// Why a try to reach a backend failed.
    ConnectFailure {
        /// Nobody listens there.
        Refused = "refused",
        /// No answer within the time of this try.
        Timeout = "timeout",
        /// No way there.
        Unreachable = "unreachable",
        /// The backend reset the connection while it was being made.
        Reset = "reset",
        /// This host has no source port left towards it.
        LocalPorts = "local_ports",
        /// This process has no descriptor left.
        FdLimit = "fd_limit",
        /// The kernel has no memory for a socket.
        Memory = "memory",
    }
}

words! {
    /// Why a connection or datagram of a client was turned away before it reached a backend.
    DropReason {
        /// No endpoint anywhere.
        NoEndpoints = "no_endpoints",
        /// Policy Local, and endpoints only on other nodes.
        NoLocalEndpoints = "no_local_endpoints",
        /// Every backend that was tried failed.
        EjectedAll = "ejected_all",
        /// The source may not use this listener; or each backend, or a policy before it, refuses that client's address alone.
        DeniedAddress = "denied_address",
        /// A balancer in front did not begin the connection with a PROXY header: it is missing, malformed, too long or late.
        ProxyHeader = "proxy_header",
        /// The listener is for balancers in front, and the source is none of them.
        UnknownBalancer = "unknown_balancer",
        /// The table of flows is full and nothing in it may go.
        FlowLimit = "flow_limit",
        /// This process has no descriptor left.
        FdLimit = "fd_limit",
        /// This host has no source port left.
        LocalPorts = "local_ports",
        /// The kernel has no memory for it.
        Memory = "memory",
        /// The network would not take the datagram.
        Unreachable = "unreachable",
        /// The client was gone before a backend was reached.
        ClientAbort = "client_abort",
        /// The source is a socket of this process: an answer would come back as a request.
        Loop = "loop",
        /// The process is stopping.
        Drain = "drain",
        /// The task that was to serve it panicked.
        Panic = "panic",
    }
}

words! {
    /// What came of a hand-over to another process, or of one from it.
    UpgradeResult {
        /// Everything was handed over, or taken over.
        Success = "success",
        /// The next program could not be started.
        NotStarted = "not_started",
        /// The next process ended before it had taken over.
        Ended = "ended",
        /// It took too long.
        Timeout = "timeout",
        /// The two have no version of the hand-over in common, or are in two network namespaces.
        Version = "version",
        /// One of the two could not, or would not.
        Refused = "refused",
    }
}

words! {
    /// Why a listener accepts nobody for a time: clients wait, in the kernel.
    PauseReason {
        /// Few descriptors are left, or none.
        FdLimit = "fd_limit",
        /// Most of the memory is taken that this process may have, or the kernel has none.
        Memory = "memory",
        /// There are as many connections as the process may have.
        ConnectionLimit = "connection_limit",
        /// There are as many as the Service allows.
        ServiceLimit = "service_limit",
    }
}

words! {
    /// How a client came in: why there is the listener. `cluster_ip` tells traffic within the cluster from traffic into it.
    Entry {
        /// A cluster IP.
        ClusterIp = "cluster_ip",
        /// A node port.
        NodePort = "node_port",
        /// An external IP.
        ExternalIp = "external_ip",
        /// An address of a load balancer.
        LoadBalancerIp = "lb_vip",
        /// An address of `--expose`.
        Exposed = "exposed",
    }
}

words! {
    /// Why a backend of a Service that wants clients' addresses preserved sees the node's in place of one.
    SourceFallback {
        /// The client is on this node itself: its address is one of the node's.
        NodeLocal = "node_local",
        /// The client is on the link by which the backend is reached: the backend would answer it past this node.
        SameLink = "same_link",
        /// The client is of the other family than the backend, as a balancer in front may name it.
        OtherFamily = "other_family",
        /// The backend is this node itself, as a pod with `hostNetwork` is: it would answer the client by another way.
        HostBackend = "host_backend",
        /// An answer to a client's address did not come back here: the backend has another way to it.
        NoWayBack = "no_way_back",
        /// The backend, or a policy before it, refused the client's address, and not the node's; no other client was let in.
        Refused = "refused",
        /// Nothing leads answers to clients' addresses to this process: the kernel has refused that.
        ReplyPath = "reply_path",
        /// The kernel gave no socket at the client's address, or did not let it out.
        LocalPorts = "local_ports",
    }
}

words! {
    /// A kind of objects that is asked for at an API server.
    WatchedKind {
        /// `Service`, v1.
        Service = "Service",
        /// `EndpointSlice`, discovery.k8s.io/v1.
        EndpointSlice = "EndpointSlice",
        /// `Endpoints`, v1: where the server has no slices.
        Endpoints = "Endpoints",
        /// The `Node` that this relay runs on, v1.
        Node = "Node",
    }
}

words! {
    /// Why a request to the API server, or a watch, came to nothing.
    WatchFailure {
        /// What we ask to continue from is too old: everything has to be listed anew.
        Expired = "expired",
        /// The server has too much to do (429) and says when to come back.
        Throttled = "throttled",
        /// The server does not know us, or does not let us read this (401, 403).
        Forbidden = "forbidden",
        /// The server failed (5xx), or refused for another reason.
        Server = "server",
        /// No connection, or it broke.
        Unreachable = "unreachable",
        /// The server was silent for too long.
        Timeout = "timeout",
        /// The answer is not what the API says.
        Decode = "decode",
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Adds what another has counted.
    fn absorb(&self, other: &Self) {
        let amount = other.get();
        if amount > 0 {
            self.add(amount);
        }
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number of things that are open now.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more.
    pub fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// One more, unless that would be more than `most`. Of threads that want the last place one gets it.
    pub fn increment_up_to(&self, most: u64) -> bool {
        let one_more = |value| (value < most).then(|| value + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// One less.
    pub fn decrement(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The last measured value of something that varies.
#[derive(Debug, Default)]
pub struct Latest(AtomicU64);

impl Latest {
    pub(crate) const fn new() -> Self {
        Self::at(0)
    }

    pub(crate) const fn at(value: u64) -> Self {
        Self(AtomicU64::new(value))
    }

    /// Replaces the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The last value; 0 before the first.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often durations were how long, in spans up to `N` bounds and one beyond.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    /// The longest duration of each span, in milliseconds, increasing.
    bounds_ms: &'static [u64; N],
    counts: [Counter; N],
    beyond: Counter,
    sum_us: Counter,
}

impl<const N: usize> Histogram<N> {
    pub(crate) const fn new(bounds_ms: &'static [u64; N]) -> Self {
        Self { bounds_ms, counts: [const { Counter::new() }; N], beyond: Counter::new(), sum_us: Counter::new() }
    }

    /// Counts one.
    pub fn observe(&self, took: Duration) {
        let span = self.bounds_ms.partition_point(|bound| Duration::from_millis(*bound) < took);
        self.counts.get(span).unwrap_or(&self.beyond).increment();
        self.sum_us.add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    /// Adds what another of the same bounds has counted.
    fn absorb(&self, other: &Self) {
        self.counts.iter().zip(&other.counts).for_each(|(ours, theirs)| ours.absorb(theirs));
        self.beyond.absorb(&other.beyond);
        self.sum_us.absorb(&other.sum_us);
    }

    /// Each bound in seconds, with how many durations were no longer.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let sums = self.counts.iter().scan(0, |sum, count| {
            *sum += count.get();
            Some(*sum)
        });
        self.bounds_ms.iter().map(|bound| Duration::from_millis(*bound).as_secs_f64()).zip(sums)
    }

    /// How many were how long: each span by its bound in milliseconds, then what is beyond them all.
    pub(crate) fn spans(&self) -> impl Iterator<Item = (Option<u64>, &Counter)> {
        let bounds = self.bounds_ms.iter().map(|bound| Some(*bound)).chain([None]);
        bounds.zip(self.counts.iter().chain([&self.beyond]))
    }

    /// The sum of all, in microseconds.
    pub(crate) fn sum_us(&self) -> &Counter {
        &self.sum_us
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(Counter::get).sum::<u64>() + self.beyond.get()
    }

    /// Their sum in seconds.
    pub fn sum_seconds(&self) -> f64 {
        Duration::from_micros(self.sum_us.get()).as_secs_f64()
    }
}

/// How long something has lasted that many say at once: where their times overlap, the time counts once.
///
/// Times are told as they begin, so it is ahead of the clock by what is left of them.
#[derive(Debug, Default)]
pub struct WallTime {
    /// The end of all times so far, on the clock of those who tell.
    end_ms: AtomicU64,
    /// When the last of them began that followed no other.
    since_ms: AtomicU64,
    sum_ms: Counter,
}

impl WallTime {
    const fn new() -> Self {
        Self { end_ms: AtomicU64::new(0), since_ms: AtomicU64::new(0), sum_ms: Counter::new() }
    }

    /// Who tells of one time after another may be so late.
    const BREAK_MS: u64 = 1_000;

    /// It lasts from now on, for so long. All who tell have one clock.
    pub fn add(&self, now_ms: u64, length_ms: u64) {
        let end = now_ms.saturating_add(length_ms);
        let known = self.end_ms.fetch_max(end, Ordering::Relaxed);
        if known.saturating_add(Self::BREAK_MS) < now_ms {
            // One alone of those who tell at once sees the old end.
            self.since_ms.store(now_ms, Ordering::Relaxed);
        }
        self.sum_ms.add(end.saturating_sub(known.max(now_ms)));
    }

    /// How long it has lasted by now without a break; `None` where it does not last, or was over a second ago.
    pub fn lasting(&self, now_ms: u64) -> Option<Duration> {
        let end = self.end_ms.load(Ordering::Relaxed);
        let lasts = end > 0 && now_ms <= end.saturating_add(Self::BREAK_MS);
        lasts.then(|| Duration::from_millis(now_ms.saturating_sub(self.since_ms.load(Ordering::Relaxed))))
    }

    /// The sum in seconds.
    pub fn seconds(&self) -> f64 {
        Duration::from_millis(self.sum_ms.get()).as_secs_f64()
    }

    /// The sum in milliseconds.
    pub(crate) fn sum_ms(&self) -> &Counter {
        &self.sum_ms
    }
}

/// A gauge on cache lines of its own, for what all threads count often.
#[derive(Debug)]
#[repr(align(128))]
pub struct BusyGauge(Gauge);

impl Deref for BusyGauge {
    type Target = Gauge;

    fn deref(&self) -> &Gauge {
        &self.0
    }
}

/// One counter for each word of a vocabulary of at most `N` words.
#[derive(Debug)]
pub struct Tally<const N: usize>([Counter; N]);

impl<const N: usize> Tally<N> {
    const fn new() -> Self {
        Self([const { Counter::new() }; N])
    }

    /// Counts one event under its word.
    pub fn count(&self, word: impl Into<usize>) {
        self.add(word, 1);
    }

    /// Counts so many events under their word.
    pub fn add(&self, word: impl Into<usize>, amount: u64) {
        self.0[word.into()].add(amount);
    }

    /// Adds what another has counted.
    fn absorb(&self, other: &Self) {
        self.0.iter().zip(&other.0).for_each(|(ours, theirs)| ours.absorb(theirs));
    }

    /// How often the word was counted.
    pub fn get(&self, word: impl Into<usize>) -> u64 {
        self.of(word).get()
    }

    /// The counter of a word.
    pub(crate) fn of(&self, word: impl Into<usize>) -> &Counter {
        &self.0[word.into()]
    }
}

impl<const N: usize> Default for Tally<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// A counter for each way in.
#[derive(Debug)]
pub struct EntryCounter(Tally<{ Entry::ALL.len() }>);

impl EntryCounter {
    const fn new() -> Self {
        Self(Tally::new())
    }

    /// Adds `amount` for what came in there.
    pub fn add(&self, entry: Entry, amount: u64) {
        self.0.add(entry, amount);
    }

    /// Adds what another has counted.
    fn absorb(&self, other: &Self) {
        self.0.absorb(&other.0);
    }

    /// For what came in there.
    pub fn of(&self, entry: Entry) -> u64 {
        self.0.get(entry)
    }

    /// The counters of all ways in.
    pub(crate) fn tally(&self) -> &Tally<{ Entry::ALL.len() }> {
        &self.0
    }

    /// For all that came in.
    pub fn get(&self) -> u64 {
        Entry::ALL.iter().map(|entry| self.of(*entry)).sum()
    }
}

/// One counter for each [`CloseReason`].
pub type CloseTally = Tally<{ CloseReason::ALL.len() }>;
/// One counter for each [`ConnectFailure`].
pub type ConnectFailureTally = Tally<{ ConnectFailure::ALL.len() }>;
/// One counter for each [`WatchFailure`].
pub type WatchFailureTally = Tally<{ WatchFailure::ALL.len() }>;
/// One counter for each [`DropReason`].
pub type DropTally = Tally<{ DropReason::ALL.len() }>;

/// Counters that take memory from the first count on. Tens of thousands of backends wait behind the Services of a large
/// cluster, and most of them carry nothing on one node.
///
/// Whoever counts dereferences it, which makes them; whoever only looks asks for [`so_far`](Self::so_far). Of threads that
/// come at once with the first count of all, each may make some, and all count in those that were there first. It is one
/// pointer and one load of it: a `OnceLock` would take a word more, and look there first.
#[derive(Debug)]
pub struct OnDemand<T>(OnceBox<T>);

impl<T: Zeros> OnDemand<T> {
    /// The counters, all 0 where nothing was counted.
    pub fn so_far(&self) -> &T {
        self.made().unwrap_or(T::zeros())
    }

    /// The counters; `None` where nothing was counted.
    pub fn made(&self) -> Option<&T> {
        self.0.get()
    }
}

impl<T> Default for OnDemand<T> {
    fn default() -> Self {
        Self(OnceBox::new())
    }
}

impl<T: Default> Deref for OnDemand<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.get_or_init(Box::default)
    }
}

/// Counters that can show what nothing looks like.
pub trait Zeros: 'static {
    /// All at 0, for ever: nobody counts here.
    fn zeros() -> &'static Self;
}

/// What happened on one ServicePort before a backend was chosen. Shared by its listeners and both scopes.
///
/// On cache lines of its own: cores that count here must not slow down those that read what lies beside it.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct ServiceStats {
    /// Connections accepted from clients (TCP) or flows begun (UDP).
    pub accepted: Counter,
    /// TCP connections that are open or on their way to a backend, now.
    pub open: Gauge,
    /// Connections or datagrams turned away, by reason.
    pub dropped: DropTally,
    /// Tries after a first failed one.
    pub retries: Counter,
}

/// What backends of a ServicePort saw that wants clients' addresses preserved.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct SourceStats {
    /// Connections and flows that were begun from the client's own address.
    pub preserved: Counter,
    /// Those that were begun from the node's, by reason.
    pub fallbacks: Tally<{ SourceFallback::ALL.len() }>,
}

impl Zeros for SourceStats {
    fn zeros() -> &'static Self {
        static ZEROS: SourceStats = SourceStats { preserved: Counter::new(), fallbacks: Tally::new() };
        &ZEROS
    }
}

impl Zeros for ServiceStats {
    fn zeros() -> &'static Self {
        static ZEROS: ServiceStats = ServiceStats {
            accepted: Counter::new(),
            open: Gauge::new(),
            dropped: Tally::new(),
            retries: Counter::new(),
        };
        &ZEROS
    }
}

/// What happened in this process as a whole.
pub static PROCESS: ProcessStats = ProcessStats::new();

/// See [`PROCESS`].
#[derive(Debug)]
pub struct ProcessStats {
    /// Directions of bulky connections that were copied, as the kernel gave no pipe that is of use for splice(2).
    pub splice_fallbacks: Counter,
    /// Filters of listeners that the kernel did not take, or that would be too long: sources are judged by the process.
    pub filter_fallbacks: Counter,
    /// Addresses of Services, by who makes them local.
    pub vip_addresses: VipAddresses,
    /// Addresses of Services that somebody made local no more, and that are so again.
    pub routes_repaired: Counter,
    /// Times that this machine's addresses could not be read, so that the last ones stayed in use.
    pub host_read_errors: Counter,
    /// Addresses of Services where what listens on all addresses of this machine is refused.
    pub guarded_addresses: Latest,
    /// How long a listener or more accepted nobody though clients waited, by [`PauseReason`].
    pub accept_paused: [WallTime; PauseReason::ALL.len()],
    /// How many TCP connections there may be now, by what is left and what the operator allows; `u64::MAX` without a limit.
    pub connections_limit: Latest,
    /// Directions of connections that hold bytes which their receiver does not take.
    pub stalled: BusyGauge,
    /// Panics of any thread, where [`panics::log_and_count`](crate::panics::log_and_count) was called.
    pub panics: Counter,
    /// Lines that the log does not have.
    pub log_lines_dropped: LogLinesDropped,
    /// Lines of the access log that were not written: more ended than could be written, or nothing could.
    pub access_log_dropped: Counter,
    /// Hand-overs by what came of them: of the process that hands over, and of the one that has taken over.
    pub upgrades: Tally<{ UpgradeResult::ALL.len() }>,
    /// The last one from this process that came to nothing.
    pub upgrade_failure: LastFailure,
    /// Listeners whose sockets the service manager keeps: a crash does not close them.
    pub kept_listeners: Latest,
    /// How long connections and flows stood still in each hand-over to this process, and to those before it.
    pub standstill: Histogram<12>,
    /// Answers of `/healthz` at the health address.
    pub healthz: HealthAnswers,
    /// Answers of `/livez` there.
    pub livez: HealthAnswers,
    /// From a change of endpoints, as the control plane noticed it, to its being served here.
    pub network_programming: Histogram<15>,
}

impl ProcessStats {
    pub(crate) const fn new() -> Self {
        Self {
            splice_fallbacks: Counter::new(),
            filter_fallbacks: Counter::new(),
            vip_addresses: VipAddresses { own: Latest::new(), foreign: Latest::new(), missing: Latest::new() },
            routes_repaired: Counter::new(),
            host_read_errors: Counter::new(),
            guarded_addresses: Latest::new(),
            accept_paused: [const { WallTime::new() }; PauseReason::ALL.len()],
            connections_limit: Latest::new(),
            stalled: BusyGauge(Gauge::new()),
            panics: Counter::new(),
            log_lines_dropped: LogLinesDropped { storm: Counter::new(), unread: Counter::new() },
            access_log_dropped: Counter::new(),
            upgrades: Tally::new(),
            upgrade_failure: LastFailure::new(),
            kept_listeners: Latest::new(),
            // Clients wait meanwhile: what is long for one of them is above 50 ms.
            standstill: Histogram::new(&[1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000]),
            healthz: HealthAnswers::new(),
            livez: HealthAnswers::new(),
            // Ours from 5 ms to 100 ms; from there on some of kube-proxy's bounds, so that both can be read side by
            // side.
            network_programming: Histogram::new(&[
                5, 10, 25, 50, 100, 250, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000, 120_000, 300_000,
            ]),
        }
    }
}

/// What came of the last upgrade that failed, and when. In one number, so that both are of the same one.
#[derive(Debug)]
pub struct LastFailure(AtomicU64);

impl LastFailure {
    /// A number for the word, in the lowest bits.
    const WORD_BITS: u32 = 8;

    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// In place of the one before. The time is kept in whole seconds.
    pub fn note(&self, result: UpgradeResult, at: SystemTime) {
        let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        self.0.store(seconds << Self::WORD_BITS | usize::from(result) as u64, Ordering::Relaxed);
    }

    /// `None` where there was none.
    pub fn get(&self) -> Option<(UpgradeResult, SystemTime)> {
        let (seconds, word) = match self.0.load(Ordering::Relaxed) {
            0 => return None,
            noted => (noted >> Self::WORD_BITS, noted & ((1 << Self::WORD_BITS) - 1)),
        };
        let result = UpgradeResult::ALL.get(usize::try_from(word).ok()?)?;
        Some((*result, SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)))
    }
}

/// Lines that were not logged, by why.
#[derive(Debug)]
pub struct LogLinesDropped {
    /// Too many of the same place in the data plane in one second. The next line of that place says how many.
    pub storm: Counter,
    /// Nobody has read what was written before. The next line of all says how many.
    pub unread: Counter,
}

/// How many addresses of Services are local at all, and by whom.
#[derive(Debug)]
pub struct VipAddresses {
    /// By routes of ours.
    pub own: Latest,
    /// Because others made them so.
    pub foreign: Latest,
    /// Not.
    pub missing: Latest,
}

/// Answers by their code.
#[derive(Debug)]
pub struct HealthAnswers {
    /// 200.
    pub healthy: Counter,
    /// 503.
    pub unhealthy: Counter,
}

impl HealthAnswers {
    const fn new() -> Self {
        Self { healthy: Counter::new(), unhealthy: Counter::new() }
    }
}

/// What one backend carried. Lives as long as the backend, over all swaps of tables.
///
/// On cache lines of its own, and in this order: what is counted most are the first two, which processors that fetch lines
/// in pairs fetch together. In the first is what begins and ends, in the second what moves: all of it for a datagram at a
/// cluster IP. The tallies at the end, which hardly change, keep them from the next backend.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct BackendStats {
    /// TCP connections established to it.
    pub connections: EntryCounter,
    /// TCP connections open now.
    pub active_connections: Gauge,
    /// UDP flows begun.
    pub flows: Counter,
    /// UDP flows open now.
    pub active_flows: Gauge,
    /// Datagrams sent to it.
    pub upstream_datagrams: Counter,
    /// Datagrams received from it and passed to clients.
    pub downstream_datagrams: Counter,
    /// Payload bytes sent to it.
    pub upstream_bytes: EntryCounter,
    /// Payload bytes received from it and passed to clients.
    pub downstream_bytes: EntryCounter,
    /// Microseconds that the last successful connect took; 0 before the first. A far backend is given time by it.
    pub connect_us: Latest,
    /// Times that it was left out, as it could not be reached again and again.
    pub ejections: Counter,
    /// How long it took to reach it, each time that succeeded.
    pub connect_time: Histogram<6>,
    /// Tries to reach it that failed, by reason.
    pub connect_failures: ConnectFailureTally,
    /// Connections and flows that ended, by reason.
    pub closed: CloseTally,
}

impl BackendStats {
    const fn new() -> Self {
        Self {
            connections: EntryCounter::new(),
            active_connections: Gauge::new(),
            flows: Counter::new(),
            active_flows: Gauge::new(),
            upstream_bytes: EntryCounter::new(),
            downstream_bytes: EntryCounter::new(),
            upstream_datagrams: Counter::new(),
            downstream_datagrams: Counter::new(),
            connect_us: Latest::new(),
            ejections: Counter::new(),
            // A neighbour; the same zone; another zone, or a busy backend; far away; one lost SYN (1 s), or a second try.
            connect_time: Histogram::new(&[1, 5, 25, 100, 500, 2_500]),
            connect_failures: Tally::new(),
            closed: Tally::new(),
        }
    }
}

impl BackendStats {
    /// Adds what another has counted: not what is open there now, nor how long it took to reach it last.
    pub(crate) fn absorb(&self, other: &Self) {
        let Self {
            connections,
            active_connections: _,
            flows,
            active_flows: _,
            upstream_bytes,
            downstream_bytes,
            upstream_datagrams,
            downstream_datagrams,
            connect_us: _,
            ejections,
            connect_time,
            connect_failures,
            closed,
        } = other;
        self.connections.absorb(connections);
        self.flows.absorb(flows);
        self.upstream_bytes.absorb(upstream_bytes);
        self.downstream_bytes.absorb(downstream_bytes);
        self.upstream_datagrams.absorb(upstream_datagrams);
        self.downstream_datagrams.absorb(downstream_datagrams);
        self.ejections.absorb(ejections);
        self.connect_time.absorb(connect_time);
        self.connect_failures.absorb(connect_failures);
        self.closed.absorb(closed);
    }
}

impl Default for BackendStats {
    fn default() -> Self {
        Self::new()
    }
}

impl Zeros for BackendStats {
    fn zeros() -> &'static Self {
        static ZEROS: BackendStats = BackendStats::new();
        &ZEROS
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn given_failures_when_noted_then_the_last_one_is_known_with_its_time() {
        let (failure, at) = (LastFailure::new(), SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        assert_eq!(failure.get(), None);

        for result in UpgradeResult::ALL {
            failure.note(*result, at);

            assert_eq!(failure.get(), Some((*result, at)));
        }
    }

    #[test]
    fn given_durations_when_observed_then_each_counts_up_to_its_bound_and_beyond() {
        let histogram = Histogram::new(&[10, 100]);

        for ms in [0, 10, 11, 100, 5_000] {
            histogram.observe(Duration::from_millis(ms));
        }

        assert_eq!(histogram.cumulative().collect::<Vec<_>>(), [(0.01, 2), (0.1, 4)]);
        assert_eq!((histogram.count(), histogram.sum_seconds()), (5, 5.121));
    }

    #[test]
    fn given_as_many_threads_as_take_the_last_places_at_once_when_counted_then_no_more_have_one_than_there_may_be() {
        let gauge = Gauge::new();
        gauge.increment();

        let taken = std::thread::scope(|scope| {
            let takers = [(); 4].map(|()| scope.spawn(|| (0..1_000).filter(|_| gauge.increment_up_to(1_001)).count()));
            takers.map(|taker| taker.join().expect("it does not panic")).iter().sum::<usize>()
        });

        assert_eq!((taken, gauge.get()), (1_000, 1_001));
        gauge.decrement();
        assert!(gauge.increment_up_to(1_001), "there is room again");
    }

    #[test]
    fn given_the_counters_of_a_backend_when_laid_out_then_what_moves_through_a_cluster_ip_is_on_one_cache_line() {
        assert_eq!(offset_of!(BackendStats, upstream_datagrams), 64);
        assert_eq!(offset_of!(BackendStats, downstream_bytes) + 8 * Entry::ClusterIp as usize, 120);
        assert_eq!(align_of::<BackendStats>(), 128);
    }

    #[test]
    fn given_counters_on_demand_when_only_looked_at_then_they_take_no_memory_and_are_zero() {
        let stats = OnDemand::<BackendStats>::default();

        assert_eq!((stats.so_far().connections.get(), stats.so_far().closed.get(CloseReason::Reset)), (0, 0));
        assert!(stats.0.get().is_none());
    }

    #[test]
    fn given_counters_on_demand_when_threads_count_first_at_once_then_nothing_is_lost() {
        let stats = OnDemand::<ServiceStats>::default();

        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1_000).for_each(|_| stats.accepted.increment()));
            }
        });

        assert_eq!(stats.so_far().accepted.get(), 4_000);
        assert_eq!(ServiceStats::zeros().accepted.get(), 0, "nobody counts there");
    }

    #[test]
    fn f14_given_times_that_overlap_when_told_by_many_then_no_moment_counts_twice() {
        let time = WallTime::default();
        let after = |now_ms, length_ms| {
            time.add(now_ms, length_ms);
            time.seconds()
        };

        assert_eq!(after(1_000, 500), 0.5);
        assert_eq!(after(1_200, 100), 0.5, "within the first");
        assert_eq!(after(1_400, 200), 0.6, "beyond its end");
        assert_eq!(after(5_000, 1_000), 1.6, "nothing in between");
        assert_eq!(after(5_000, 1_000), 1.6, "at the same time");
        assert_eq!(after(u64::MAX, 1), 1.6);
    }

    #[test]
    fn f14_given_times_that_follow_each_other_when_asked_then_it_lasts_since_the_first_of_them() {
        let time = WallTime::default();
        let lasting = |now_ms| time.lasting(now_ms).map(|time| time.as_millis());
        assert_eq!(lasting(0), None);

        time.add(5_000, 500);
        time.add(5_600, 500);
        assert_eq!([5_000, 6_100, 7_100].map(lasting), [Some(0), Some(1_100), Some(2_100)]);
        assert_eq!(lasting(7_101), None, "nobody has said more");

        time.add(9_000, 5);
        assert_eq!(lasting(9_004), Some(4), "a new one");
    }

    #[test]
    fn given_each_close_reason_when_counted_then_only_its_own_word_moves() {
        let tally = CloseTally::default();

        tally.count(CloseReason::Reset);

        for reason in CloseReason::ALL {
            assert_eq!(tally.get(*reason), u64::from(*reason == CloseReason::Reset), "{reason}");
        }
    }
}
