//! Moves bytes between a client and its backend until both have said all, or one of them is gone.
//!
//! One task polls both directions by hand, each of them a `direction`; so an idle connection holds no buffer, no pipe
//! and no timer, and a slow reader costs what is on the way to it.
//!
//! *How a stream ends.* An end of stream is passed on once everything before it is (half-close), and
//! the other direction goes on. A reset is passed on as a reset, at once, also where nothing is being
//! read from that side: truncated bytes never look complete. So does every other untimely end,
//! be it a cancelled task or a panic: unless both sides have finished, the sockets are closed by reset.
//!
//! How a backend is reached is in `connect`; who may connect at all is in `tcp`; what a connection may last in `limits`.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use crate::serve::access::Draft;
use crate::serve::balancer::{Backend, PortState};
use crate::serve::direction::{Broken, Direction, End, Party, Path, SCRATCH_BYTES};
use crate::serve::limits::{LimitOptions, Limits, Silence};
use crate::serve::mmsg::Tally;
use crate::serve::moving_stream::{MovingDirection, MovingEnds, MovingStream};
use crate::serve::proxy_header::Preface;
use crate::serve::sleep::Sleep;
use crate::serve::socket;
use crate::serve::standstill::{Bidding, Standing};
use crate::serve::stream::Stream;
use crate::serve::worker::sleep_until;
use crate::stats::{BackendStats, CloseReason, Entry};

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
}

/// A client and the backend that was reached for it. Counts on the backend, whatever happens to it.
pub(crate) struct Connection {
    pair: Pair, // Dropped before the account: what is counted as closed is closed.
    account: Account,
    /// Where its Service has some of its own; few have.
    limits: Option<Box<LimitOptions>>,
    /// Whose backend it is; without that, no other process can take it over.
    port: Option<Arc<PortState>>,
    beginning: Beginning,
}

/// What the relay of a connection begins with. The relay has it from then on.
enum Beginning {
    /// What the backend gets first; most get nothing.
    Anew(Option<Box<Preface>>),
    /// Where another process has left it.
    SoFar(Box<SoFar>),
}

/// A relay as another process has left it. The account knows what was moved.
pub(crate) struct SoFar {
    up: Direction,
    down: Direction,
    ends: MovingEnds,
}

impl SoFar {
    /// Of both directions, and what may end it. With that, how much each of the directions has moved.
    ///
    /// # Errors
    /// A pipe is not what was said of it.
    pub(crate) fn new(up: MovingDirection, down: MovingDirection, ends: MovingEnds) -> io::Result<(Self, [u64; 2])> {
        let moved = [up.moved, down.moved];
        Ok((Self { up: Direction::go_on(up)?, down: Direction::go_on(down)?, ends }, moved))
    }
}

impl Connection {
    /// Counts a new connection of the backend, from a client that came in there. The client's socket has TCP_NODELAY.
    pub(crate) fn open(client: Stream, upstream: Stream, backend: Arc<Backend>, entry: Entry) -> Self {
        let (pair, account) = (Pair::new(client, upstream), Account::open(backend, entry));
        Self { pair, account, limits: None, port: None, beginning: Beginning::Anew(None) }
    }

    /// Goes on with one of another process, which has counted it as new.
    pub(crate) fn go_on(
        client: Stream,
        upstream: Stream,
        backend: Arc<Backend>,
        entry: Entry,
        (so_far, moved): (SoFar, [u64; 2]),
    ) -> Self {
        let (pair, account) = (Pair::new(client, upstream), Account::go_on(backend, entry, moved));
        Self { pair, account, limits: None, port: None, beginning: Beginning::SoFar(Box::new(so_far)) }
    }

    /// Says whose backend it is, so that another process can take it over.
    pub(crate) fn of(self, port: &Arc<PortState>) -> Self {
        Self { port: Some(Arc::clone(port)), ..self }
    }

    /// Has the backend get this before the client's first byte. No payload.
    pub(crate) fn begin_with(&mut self, preface: Option<Box<Preface>>) {
        self.beginning = Beginning::Anew(preface);
    }

    /// Has it end by these limits, whatever [`Connection::relay`] is told.
    pub(crate) fn limited(self, limits: LimitOptions) -> Self {
        Self { limits: Some(Box::new(limits)), ..self }
    }

    /// Has an access log told of its end, whatever that will be.
    pub(crate) fn tell(&mut self, draft: Option<Box<Draft>>) {
        self.account.draft = draft;
    }

    /// Moves bytes until the end of the connection and tells why it ended; `None` where another process goes on with it.
    pub(crate) async fn relay(&mut self, limits: &LimitOptions) -> Option<CloseReason> {
        let Self { pair, account, limits: own, port, beginning } = self;
        let beginning = mem::replace(beginning, Beginning::Anew(None));
        let mut relay = Relay::new(pair, account, beginning, own.as_deref().unwrap_or(limits));
        let outcome = poll_fn(|cx| relay.obey(cx, port.as_deref())).await?;
        let mute = relay.mute;
        drop(relay);
        pair.finished = outcome.is_ok();
        let reason = match outcome {
            Ok(()) if mute && account.is_empty() => CloseReason::ClientAbort,
            Ok(()) => CloseReason::Finished,
            Err(reason) => reason,
        };
        account.reason = Some(reason);
        Some(reason)
    }

    /// The backend.
    pub(crate) fn backend(&self) -> &Backend {
        &self.account.backend
    }

    /// Payload bytes that the backend's socket and the client's socket took, those of processes before this one included.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.account.upstream.moved, self.account.downstream.moved)
    }
}

/// The two sockets of a connection. Unless both sides have finished, they are closed by reset.
struct Pair {
    client: Stream,
    upstream: Stream,
    finished: bool,
    /// Another process has been told of it: it may have it already, and what is done to a socket is done to it there, too.
    told: Cell<bool>,
}

impl Pair {
    fn new(client: Stream, upstream: Stream) -> Self {
        Self { client, upstream, finished: false, told: Cell::new(false) }
    }

    fn ends(&self) -> (End<'_>, End<'_>) {
        let client = End { party: Party::Client, stream: &self.client };
        (client, End { party: Party::Backend, stream: &self.upstream })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if self.told.get() {
            self.client.forget();
            self.upstream.forget();
        } else if !self.finished {
            socket::reset_on_close(&self.client);
            socket::reset_on_close(&self.upstream);
        }
    }
}

/// What a connection adds to its backend's counters: now and then while it runs, the rest when it is dropped.
struct Account {
    backend: Arc<Backend>,
    upstream: Tab,
    downstream: Tab,
    reason: Option<CloseReason>,
    /// What an access log is told at the end.
    draft: Option<Box<Draft>>,
    entry: Entry,
    /// As [`Pair::told`]: its end is counted and told of there.
    told: bool,
}

/// The bytes of one direction.
struct Tab {
    moved: u64,
    published: u64,
}

impl Tab {
    fn unpublished(&mut self) -> u64 {
        let amount = self.moved - self.published;
        self.published = self.moved;
        amount
    }
}

impl Account {
    fn open(backend: Arc<Backend>, entry: Entry) -> Self {
        backend.stats.connections.add(entry, 1);
        Self::go_on(backend, entry, [0, 0])
    }

    /// Of one that another process has counted as new, and so many bytes of it.
    fn go_on(backend: Arc<Backend>, entry: Entry, moved: [u64; 2]) -> Self {
        backend.stats.active_connections.increment();
        let [upstream, downstream] = moved.map(|moved| Tab { moved, published: moved });
        Self { backend, upstream, downstream, reason: None, draft: None, entry, told: false }
    }

    /// Bytes, both ways.
    fn moved(&self) -> u64 {
        self.upstream.moved + self.downstream.moved
    }

    /// True where nothing has moved.
    fn is_empty(&self) -> bool {
        self.moved() == 0
    }

    /// Costs two shared writes at most: once when the connection falls idle and once per budget of a direction, not
    /// for each write.
    fn publish(&mut self) {
        let BackendStats { upstream_bytes, downstream_bytes, .. } = &*self.backend.stats;
        for (counter, tab) in [(upstream_bytes, &mut self.upstream), (downstream_bytes, &mut self.downstream)] {
            let amount = tab.unpublished();
            if amount > 0 {
                counter.add(self.entry, amount);
            }
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.publish();
        self.backend.stats.active_connections.decrement();
        if self.told {
            return;
        }
        let dropped = if std::thread::panicking() { CloseReason::Panic } else { CloseReason::Drain };
        let reason = self.reason.unwrap_or(dropped);
        self.backend.stats.closed.count(reason);
        if let Some(mut draft) = self.draft.take() {
            draft.upstream = Tally { datagrams: 0, bytes: self.upstream.moved };
            draft.downstream = Tally { datagrams: 0, bytes: self.downstream.moved };
            draft.closed(self.backend.address(), reason);
        }
    }
}

/// Both directions of one connection.
struct Relay<'s> {
    pair: &'s Pair,
    account: &'s mut Account,
    up: Direction,
    down: Direction,
    options: &'s LimitOptions,
    /// What it has of them; most have none.
    limits: Option<Box<Limits>>,
    /// The client ended before anybody had said anything, as a health check of a load balancer does.
    mute: bool,
    /// Whether it may move anything now.
    standing: Standing,
    rare: Option<Box<Rare<'s>>>,
}

impl<'s> Relay<'s> {
    fn new(pair: &'s Pair, account: &'s mut Account, beginning: Beginning, options: &'s LimitOptions) -> Self {
        let (preface, so_far) = match beginning {
            Beginning::Anew(preface) => (preface, None),
            Beginning::SoFar(so_far) => (None, Some(so_far)),
        };
        let begun = Self {
            pair,
            account,
            up: Direction::to_backend(preface),
            down: Direction::to_client(),
            options,
            limits: None,
            mute: false,
            standing: Standing::default(),
            rare: None,
        };
        match so_far {
            Some(so_far) => begun.go_on_from(*so_far),
            None => Self { limits: Limits::begin(options, rand::random), ..begun },
        }
    }

    fn go_on_from(self, SoFar { up, down, ends }: SoFar) -> Self {
        let (options, moved) = (self.options, self.account.moved());
        let limits = match ends.lived {
            Some(lived) => Limits::go_on(options, lived, moved),
            None => Limits::begin(options, rand::random),
        };
        let rare = ends.half_silent.map(|silent| {
            let silence = Some(Silence::go_on(options.half_close_timeout, moved, silent));
            Box::new(Rare { silence, ..Rare::default() })
        });
        Self { up, down, limits, mute: ends.mute, rare, ..self }
    }

    /// Moves what can be moved, unless the worker is at a standstill. Ready with `None` once another process has it.
    fn obey(&mut self, cx: &mut Context<'_>, port: Option<&PortState>) -> Poll<Option<Result<(), CloseReason>>> {
        match self.standing.ask(cx) {
            Bidding::Move => {}
            Bidding::Wait => {
                self.note_told();
                return Poll::Pending;
            }
            Bidding::Tell => {
                let stream = port.and_then(|port| self.moving(port).ok());
                self.standing.tell(cx, stream);
                self.note_told();
                if self.standing != Standing::Flowing {
                    return Poll::Pending;
                }
            }
            Bidding::Leave => return Poll::Ready(None),
        }
        self.note_told();
        SCRATCH.with_borrow_mut(|scratch| self.poll(cx, scratch)).map(Some)
    }

    /// What ends from here on ends as it has to: quietly where another process may have it, and as ever where not.
    fn note_told(&mut self) {
        let told = self.standing.is_told();
        if self.account.told != told {
            self.pair.told.set(told);
            self.account.told = told;
        }
    }

    /// What another process needs to go on with it. All that it has moved is counted already.
    ///
    /// # Errors
    /// No descriptor is left for copies.
    fn moving(&self, port: &PortState) -> io::Result<MovingStream> {
        let Self { pair, account, .. } = self;
        let now = Instant::now();
        Ok(MovingStream {
            client: pair.client.as_fd().try_clone_to_owned()?,
            upstream: pair.upstream.as_fd().try_clone_to_owned()?,
            port: port.name.clone(),
            backend: account.backend.address(),
            entry: account.entry,
            up: self.up.moving(account.upstream.moved)?,
            down: self.down.moving(account.downstream.moved)?,
            ends: MovingEnds {
                mute: self.mute,
                limits: *self.options,
                lived: self.limits.as_ref().map(|limits| limits.lived()),
                half_silent: self.rare.as_ref().and_then(|rare| Some(rare.silence.as_ref()?.lasts())),
                leaves_in: account.backend.leaves_at().map(|at| at.saturating_duration_since(now)),
            },
            draft: account.draft.as_ref().map(|draft| draft.record(now)),
        })
    }

    /// Ready when both sides have said all, or with the reason why they have not.
    fn poll(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<Result<(), CloseReason>> {
        let outcome = match self.poll_directions(cx, scratch) {
            Poll::Ready(outcome) => Poll::Ready(outcome.map_err(|broken| broken.reason())),
            Poll::Pending => self.poll_ends(cx).map(Err),
        };
        self.mute |= self.up.is_done() && !self.down.is_done() && self.account.is_empty();
        self.account.publish();
        outcome
    }

    fn poll_directions(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<Result<(), Broken>> {
        let (client, backend) = self.pair.ends();
        let Account { upstream, downstream, .. } = &mut *self.account;
        let up = Path { from: client, to: backend, last: self.down.is_done() };
        let up = self.up.poll(cx, up, scratch, &mut upstream.moved)?;
        let down = Path { from: backend, to: client, last: self.up.is_done() };
        let down = self.down.poll(cx, down, scratch, &mut downstream.moved)?;
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// What may end it though nothing moves. For most that is nothing but a look at three places that are empty.
    fn poll_ends(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        if let Poll::Ready(reason) = self.poll_rare(cx) {
            return Poll::Ready(reason);
        }
        let moved = self.account.moved();
        if let Some(limits) = &mut self.limits
            && let Poll::Ready(reason) = limits.poll(cx, moved)
        {
            return Poll::Ready(reason);
        }
        self.poll_parting(cx).map(|()| CloseReason::EndpointRemoved)
    }

    /// Ready when connections to the backend have to end. Whoever says so wakes all.
    fn poll_parting(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(at) = self.account.backend.leaves_at() else { return Poll::Pending };
        let parting = &mut self.rare.get_or_insert_default().parting;
        Pin::new(parting.get_or_insert_with(|| sleep_until(at))).poll(cx)
    }

    /// What a connection needs only where a party is not being read: nobody would notice that it is gone.
    fn poll_rare(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        let (client, backend) = self.pair.ends();
        let ends = [(client, self.up.is_reading()), (backend, self.down.is_reading())];
        if ends.iter().all(|(_, is_read)| *is_read) {
            return Poll::Pending;
        }
        let rare = self.rare.get_or_insert_default();
        for ((end, is_read), watch) in ends.into_iter().zip(&mut rare.watches) {
            if is_read {
                continue; // A read gives what came before the reset, then the reset.
            }
            let watch = watch.get_or_insert_with(|| Box::pin(end.stream.broken()));
            if let Poll::Ready(error) = watch.as_mut().poll(cx) {
                return Poll::Ready(end.broken(error).reason());
            }
        }
        if self.up.is_done() || self.down.is_done() {
            let moved = self.account.moved();
            let silence = rare.silence.get_or_insert_with(|| Silence::new(self.options.half_close_timeout, moved));
            ready!(silence.poll(cx, moved));
            return Poll::Ready(CloseReason::HalfClose);
        }
        Poll::Pending
    }
}

/// Kept off the connection, as few have it: see [`Relay::poll_rare`].
#[derive(Default)]
struct Rare<'s> {
    /// Of the client and of the backend. Once made it stays: a stream that was stuck gets stuck again.
    watches: [Option<Watch<'s>>; 2],
    /// From the first half-close on.
    silence: Option<Silence>,
    /// Once the backend's endpoint is not wanted any more, where that ends connections.
    parting: Option<Sleep>,
}

type Watch<'s> = Pin<Box<dyn Future<Output = io::Error> + 's>>;

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::thread;
    use std::time::{Duration, Instant};

    use socket2::SockRef;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::serve::scripted::{
        LOOPBACK, Spawned, expect_reset, on_worker, pair, read_all, registered, reset, soon, spawn, until,
    };
    use crate::serve::{pipe, worker};
    use crate::stats::PROCESS;

    /// A relay with both of its peers in the hands of the test.
    struct Line {
        client: TcpStream,
        server: TcpStream,
        backend: Arc<Backend>,
        relay: Spawned<Ended>,
    }

    /// What became of it.
    struct Ended {
        reason: CloseReason,
        upstream_bytes: u64,
        downstream_bytes: u64,
    }

    impl Line {
        async fn open() -> Self {
            Self::limited(LimitOptions::default()).await
        }

        async fn with_preface(preface: &[u8]) -> Self {
            Self::start(LimitOptions::default(), Some(Box::new(Preface::any(preface)))).await
        }

        async fn with_half_close_timeout(limit: Duration) -> Self {
            Self::limited(LimitOptions { half_close_timeout: limit, ..LimitOptions::default() }).await
        }

        async fn limited(limits: LimitOptions) -> Self {
            Self::start(limits, None).await
        }

        async fn start(limits: LimitOptions, preface: Option<Box<Preface>>) -> Self {
            let (client, downstream) = pair().await;
            let (server, upstream) = pair().await;
            for stream in [&client, &downstream, &server] {
                stream.set_nodelay(true).expect("an option"); // Accepted sockets of the relay inherit it.
            }
            let backend = Arc::new(Backend::new(1, SocketAddr::from((LOOPBACK, 80))));
            let (downstream, upstream, entry) = (registered(downstream), registered(upstream), Entry::NodePort);
            let mut connection = Connection::open(downstream, upstream, Arc::clone(&backend), entry);
            connection.begin_with(preface);
            let relay = spawn(async move {
                let reason = connection.relay(&limits).await.expect("nobody takes it over");
                let (upstream_bytes, downstream_bytes) = connection.bytes();
                Ended { reason, upstream_bytes, downstream_bytes }
            });
            Self { client, server, backend, relay }
        }

        /// The end of a relay whose peers are gone, after a look at its counters.
        async fn ended(relay: Spawned<Ended>, backend: &Backend) -> Ended {
            let ended = soon(relay).await;
            assert_eq!(backend.stats.closed.get(ended.reason), 1);
            assert_eq!(backend.stats.active_connections.get(), 0);
            assert_eq!(backend.stats.connections.get(), 1);
            assert_eq!(backend.stats.upstream_bytes.of(Entry::NodePort), ended.upstream_bytes);
            assert_eq!(backend.stats.downstream_bytes.get(), ended.downstream_bytes);
            ended
        }
    }

    /// Bytes that look different wherever they are shifted to.
    fn pattern(count: usize, seed: u8) -> Vec<u8> {
        const PERIOD: usize = 1_000_003;
        let mut state = u32::from(seed) | 1;
        let block: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .take(PERIOD.min(count))
        .collect();
        block.iter().copied().cycle().take(count).collect()
    }

    /// Sends all, closes its half and reads to the end.
    async fn exchange(mut stream: TcpStream, send: &[u8]) -> Vec<u8> {
        let (mut read, mut write) = stream.split();
        let mut received = Vec::new();
        let sending = async {
            write.write_all(send).await.expect("a peer that reads");
            write.shutdown().await.expect("a connection");
        };
        soon(async { tokio::join!(sending, async { read.read_to_end(&mut received).await.expect("no reset") }) }).await;
        received
    }

    async fn both_ways(count: usize) {
        let Line { client, server, backend, relay } = Line::open().await;
        let (up, down) = (pattern(count, 1), pattern(count, 2));

        let (at_client, at_server) = tokio::join!(exchange(client, &up), exchange(server, &down));

        assert!(at_client == down, "what the client got");
        assert!(at_server == up, "what the server got");
        let ended = Line::ended(relay, &backend).await;
        assert_eq!(ended.reason, CloseReason::Finished);
        assert_eq!((ended.upstream_bytes, ended.downstream_bytes), (count as u64, count as u64));
    }

    #[test]
    fn t152_given_one_byte_each_way_when_relayed_then_it_is_the_same() {
        on_worker(async {
            both_ways(1).await;
        });
    }

    #[test]
    fn t152_given_64_kib_each_way_when_relayed_then_they_are_the_same() {
        on_worker(async {
            both_ways(64 * 1024).await;
        });
    }

    #[test]
    fn t152_given_100_mib_each_way_when_relayed_then_they_are_the_same() {
        on_worker(async {
            both_ways(100 * 1024 * 1024).await;
        });
    }

    #[test]
    fn t126_given_a_preface_when_a_client_speaks_then_it_comes_before_the_clients_bytes_and_they_alone_count() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::with_preface(b"PROXY ").await;
            client.write_all(b"hello").await.expect("a connection");
            client.shutdown().await.expect("a connection");

            let (received, outcome) = read_all(&mut server).await;

            outcome.expect("an end of stream");
            assert_eq!(received, b"PROXY hello");
            drop((client, server));
            let ended = Line::ended(relay, &backend).await;
            assert_eq!((ended.upstream_bytes, ended.downstream_bytes), (5, 0));
        });
    }

    #[test]
    fn t126_given_a_preface_when_the_client_waits_for_the_backend_to_speak_then_the_backend_gets_it_alone() {
        on_worker(async {
            let Line { client, mut server, backend, relay } = Line::with_preface(b"PROXY ").await;

            let mut preface = [0; 6];
            soon(server.read_exact(&mut preface)).await.expect("a preface");

            assert_eq!(&preface, b"PROXY ");
            drop(client);
            read_all(&mut server).await.1.expect("an end of stream");
            drop(server);
            let ended = Line::ended(relay, &backend).await;
            assert_eq!((ended.upstream_bytes, ended.reason), (0, CloseReason::ClientAbort), "it said nothing");
        });
    }

    #[test]
    fn t126_f25_given_a_preface_that_was_not_sent_yet_when_another_process_goes_on_then_it_comes_first_and_is_no_payload()
     {
        on_worker(async {
            let begun = Direction::to_backend(Some(Box::new(Preface::any(b"PROXY "))));
            let mut up = begun.moving(0).expect("no descriptor is needed");
            assert_eq!((up.rest.as_slice(), up.preface), (b"PROXY ".as_slice(), 6));
            up.rest.extend(b"hel"); // What was read with it.
            let so_far = SoFar::new(up, MovingDirection::default(), MovingEnds::default()).expect("no pipe");
            let (mut client, downstream) = pair().await;
            let (mut server, upstream) = pair().await;
            let backend = Arc::new(Backend::new(1, SocketAddr::from((LOOPBACK, 80))));
            let (downstream, upstream, entry) = (registered(downstream), registered(upstream), Entry::NodePort);
            let mut connection = Connection::go_on(downstream, upstream, Arc::clone(&backend), entry, so_far);
            let relay = spawn(async move {
                let reason = connection.relay(&LimitOptions::default()).await;
                (reason, connection.bytes())
            });

            client.write_all(b"lo").await.expect("a connection");
            client.shutdown().await.expect("a connection");
            let (received, outcome) = read_all(&mut server).await;

            outcome.expect("an end of stream");
            assert_eq!(received, b"PROXY hello");
            drop((client, server));
            assert_eq!(soon(relay).await.1, (5, 0));
            assert_eq!(backend.stats.upstream_bytes.of(Entry::NodePort), 5);
        });
    }

    #[test]
    fn t152_given_a_preface_when_100_mib_follow_then_it_comes_before_all_of_them_and_they_alone_count() {
        on_worker(async {
            let Line { client, server, backend, relay } = Line::with_preface(&pattern(107, 5)).await;
            let (up, down) = (pattern(100 * 1024 * 1024, 1), pattern(1, 2));

            let (_, at_server) = tokio::join!(exchange(client, &up), exchange(server, &down));

            let (preface, payload) = at_server.split_at(107);
            assert!(preface == pattern(107, 5) && payload == up, "what the server got");
            assert_eq!(Line::ended(relay, &backend).await.upstream_bytes, up.len() as u64);
        });
    }

    #[test]
    fn t153_given_a_client_that_closes_its_half_when_the_server_answers_then_the_whole_answer_arrives() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            let answer = pattern(3_000_000, 3);

            client.write_all(b"request").await.expect("a connection");
            client.shutdown().await.expect("a connection");
            let (request, outcome) = read_all(&mut server).await;
            outcome.expect("an end of stream");
            let (_, at_client) = tokio::join!(exchange(server, &answer), read_all(&mut client));

            assert_eq!(request, b"request");
            at_client.1.expect("an end of stream");
            assert!(at_client.0 == answer);
            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Finished);
        });
    }

    #[test]
    fn given_a_server_that_closes_its_half_when_the_client_goes_on_then_all_arrives() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            let upload = pattern(3_000_000, 4);

            server.write_all(b"banner").await.expect("a connection");
            server.shutdown().await.expect("a connection");
            let (banner, outcome) = read_all(&mut client).await;
            outcome.expect("an end of stream");
            let (_, at_server) = tokio::join!(exchange(client, &upload), read_all(&mut server));

            assert_eq!(banner, b"banner");
            at_server.1.expect("an end of stream");
            assert!(at_server.0 == upload);
            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Finished);
        });
    }

    #[test]
    fn f10_given_a_thousand_half_closed_exchanges_when_relayed_then_none_loses_a_byte() {
        on_worker(async {
            for round in 0..1_000 {
                let Line { mut client, server, relay, .. } = Line::open().await;
                client.write_all(&[round as u8; 10]).await.expect("a connection");
                client.shutdown().await.expect("a connection");

                let (at_server, at_client) = tokio::join!(exchange(server, &[1; 20_000]), read_all(&mut client));

                assert_eq!(at_server, [round as u8; 10]);
                assert_eq!((at_client.0.len(), at_client.1.is_ok()), (20_000, true), "round {round}");
                assert_eq!(soon(relay).await.reason, CloseReason::Finished);
            }
        });
    }

    #[test]
    fn t155_given_a_client_that_resets_when_relayed_then_the_server_sees_a_reset() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            client.write_all(b"half a requ").await.expect("a connection");
            server.read_exact(&mut [0; 11]).await.expect("what was sent");

            reset(client);

            expect_reset(&mut server).await;
            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::ClientAbort);
        });
    }

    #[test]
    fn t155_given_a_server_that_resets_when_relayed_then_the_client_sees_a_reset() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            server.write_all(b"half an ans").await.expect("a connection");
            client.read_exact(&mut [0; 11]).await.expect("what was sent");

            reset(server);

            expect_reset(&mut client).await;
            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Reset);
        });
    }

    /// Writes until nothing has moved for a while: all buffers on the way are full.
    async fn fill(stream: &mut TcpStream) -> usize {
        let mut written = 0;
        let chunk = vec![7; 256 * 1024];
        while let Ok(count) = tokio::time::timeout(Duration::from_millis(200), stream.write(&chunk)).await {
            written += count.expect("a connection");
        }
        written
    }

    #[test]
    fn given_a_relay_that_only_waits_to_write_when_the_sender_resets_then_it_is_passed_on() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            fill(&mut client).await;

            reset(client);

            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::ClientAbort);
            expect_reset(&mut server).await;
        });
    }

    #[test]
    fn given_a_client_that_has_closed_its_half_when_it_resets_then_it_is_passed_on() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            client.shutdown().await.expect("a connection");
            assert_eq!(soon(server.read(&mut [0])).await.expect("an end of stream"), 0);

            reset(client);

            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::ClientAbort);
            // The server's end has got the end of stream before: a reset shows as a failed write.
            until(|| SockRef::from(&server).take_error().expect("an option").is_some()).await;
        });
    }

    /// The leak of the classic userspace mode (kubernetes#18354).
    #[test]
    fn t154_given_a_server_that_writes_and_never_ends_when_the_client_goes_then_both_connections_end() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            server.write_all(b"more").await.expect("a connection");
            soon(client.read_exact(&mut [0; 4])).await.expect("what was written");

            drop(client); // With nothing unread: it ends cleanly, and only later bytes are answered by a reset.

            let writing = async { while server.write_all(b"and more").await.is_ok() {} };
            soon(writing).await;
            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::ClientAbort);
        });
    }

    #[test]
    fn given_a_server_that_has_closed_its_half_when_it_resets_then_it_is_passed_on() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            server.shutdown().await.expect("a connection");
            assert_eq!(soon(client.read(&mut [0])).await.expect("an end of stream"), 0);

            reset(server);

            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Reset);
        });
    }

    #[test]
    fn t174_given_a_slow_reader_when_the_sender_goes_on_then_it_is_held_back_and_nothing_is_lost() {
        on_worker(async {
            let Line { mut client, server, backend, relay } = Line::open().await;

            let written = fill(&mut client).await;
            client.shutdown().await.expect("a connection");

            assert!(written < 32 * 1024 * 1024, "{written} bytes: only kernel buffers and one read are full");
            let received = exchange(server, b"").await;
            assert_eq!(received.len(), written);
            assert!(received.iter().all(|byte| *byte == 7));
            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Finished);
        });
    }

    /// CPU time of this thread, which is the whole runtime of a test.
    fn cpu_time() -> Duration {
        let times = std::fs::read_to_string("/proc/thread-self/schedstat").expect("procfs");
        Duration::from_nanos(times.split(' ').next().expect("a first word").parse().expect("a number"))
    }

    /// F36: the pipe is full, the receiver's buffer, too, and the sender has more.
    #[test]
    fn given_a_full_pipe_when_nothing_moves_then_the_relay_sleeps() {
        on_worker(async {
            let Line { mut client, server, relay, .. } = Line::open().await;
            fill(&mut client).await;

            let begin = cpu_time();
            let window = Duration::from_millis(300);
            tokio::time::sleep(window).await; // Nothing to wait for: that nothing happens is the point.
            let busy = cpu_time() - begin;

            assert!(busy < window / 10, "{busy:?}");
            drop((client, server));
            soon(relay).await;
        });
    }

    #[test]
    fn given_a_full_pipe_when_its_connection_is_reset_then_no_other_gets_what_is_in_it() {
        on_worker(async {
            let Line { mut client, server, relay, .. } = Line::open().await;
            fill(&mut client).await;
            let pooled = pipe::tests::pooled();

            reset(client);

            assert_eq!(soon(relay).await.reason, CloseReason::ClientAbort);
            assert_eq!(pipe::tests::pooled(), pooled);
            drop(server);
        });
    }

    #[test]
    fn given_a_full_pipe_when_the_receiver_resets_then_the_sender_sees_a_reset() {
        on_worker(async {
            let Line { mut client, server, backend, relay } = Line::open().await;
            fill(&mut client).await;

            reset(server);

            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Reset);
            until(|| SockRef::from(&client).take_error().expect("an option").is_some()).await;
        });
    }

    #[test]
    fn given_bulk_when_all_of_it_has_moved_then_its_pipe_is_for_others() {
        on_worker(async {
            let Line { mut client, mut server, relay, .. } = Line::open().await;
            let sent = pattern(4_000_000, 5);

            let mut received = vec![0; sent.len()];
            let (outcome, read) =
                soon(async { tokio::join!(client.write_all(&sent), server.read_exact(&mut received)) }).await;
            outcome.expect("a connection");
            read.expect("a connection");

            assert!(received == sent);
            until(|| pipe::tests::pooled() > 0).await;
            drop((client, server));
            soon(relay).await;
        });
    }

    #[test]
    fn given_no_pipe_when_bulk_is_relayed_then_it_is_copied_and_counted() {
        on_worker(async {
            pipe::tests::REFUSING.set(true);
            let before = PROCESS.splice_fallbacks.get();

            both_ways(3_000_000).await;

            assert!(PROCESS.splice_fallbacks.get() >= before + 2, "one for each direction");
            pipe::tests::REFUSING.set(false);
        });
    }

    #[test]
    fn given_bulk_and_then_small_messages_when_relayed_then_none_waits_for_another() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            for round in 0..3_u8 {
                let bulk = pattern(2_000_000, round);
                let mut received = vec![0; bulk.len()];
                let moved = async { tokio::join!(client.write_all(&bulk), server.read_exact(&mut received)) };
                soon(moved).await.1.expect("a connection");
                assert!(received == bulk);
                for message in 0..50 {
                    client.write_all(&[message]).await.expect("a connection");
                    let mut received = [0];
                    soon(server.read_exact(&mut received)).await.expect("a connection");
                    assert_eq!(received, [message]);
                }
            }

            client.shutdown().await.expect("a connection");
            server.shutdown().await.expect("a connection");
            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Finished);
        });
    }

    #[test]
    fn t176_given_urgent_data_when_more_is_queued_behind_it_then_that_arrives_too() {
        on_worker(async {
            let Line { client, mut server, relay, .. } = Line::open().await;

            // All is there before the relay's first turn: nothing comes later to wake it.
            client.try_write(b"before").expect("a connection");
            SockRef::from(&client).send_out_of_band(b"!").expect("a connection");
            client.try_write(b"behind").expect("a connection");

            let mut received = [0; 12];
            soon(server.read_exact(&mut received)).await.expect("the whole stream");
            assert_eq!(&received, b"beforebehind");
            drop((client, server));
            soon(relay).await;
        });
    }

    /// A splice stops at the mark, and where the sender has ended behind it, it claims the end of the stream there.
    #[test]
    fn t176_given_urgent_data_within_bulk_when_spliced_then_the_stream_is_whole() {
        on_worker(async {
            for behind in [3_000_000, 4] {
                let Line { client, mut server, backend, relay } = Line::open().await;
                let (before, behind) = (pattern(3_000_000, 6), pattern(behind, 7));
                let whole = [&before[..], &behind].concat();
                let mut sender = client.into_std().expect("a socket");
                sender.set_nonblocking(false).expect("a flag");
                let sending = thread::spawn(move || {
                    io::Write::write_all(&mut sender, &before).expect("a connection");
                    SockRef::from(&sender).send_out_of_band(b"!").expect("a connection");
                    io::Write::write_all(&mut sender, &behind).expect("a connection");
                    sender.shutdown(std::net::Shutdown::Write).expect("a connection");
                    sender
                });

                let (received, outcome) = read_all(&mut server).await;

                outcome.expect("an end of stream");
                assert_eq!(received.len(), whole.len());
                assert!(received == whole);
                drop((sending.join().expect("no panic"), server));
                assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Finished);
            }
        });
    }

    #[test]
    fn t176_given_writes_of_no_bytes_when_relayed_then_they_do_no_harm() {
        on_worker(async {
            let Line { client, mut server, relay, .. } = Line::open().await;

            for part in [&b""[..], b"one", b"", b"", b"two", b""] {
                assert_eq!(SockRef::from(&client).send(part).expect("a connection"), part.len());
                tokio::task::yield_now().await;
            }

            let mut received = [0; 6];
            soon(server.read_exact(&mut received)).await.expect("the stream goes on");
            assert_eq!(&received, b"onetwo");
            drop((client, server));
            soon(relay).await;
        });
    }

    /// A write that waits for the acknowledgement of the last one waits 40 ms for a peer that delays it.
    #[test]
    fn t175_given_messages_of_one_byte_when_they_go_back_and_forth_then_none_is_held_back() {
        on_worker(async {
            let Line { mut client, mut server, relay, .. } = Line::open().await;
            let begin = Instant::now();

            for _ in 0..100 {
                for _ in 0..2 {
                    client.write_all(b"x").await.expect("a connection"); // Two in a row, as they would be held back.
                    soon(server.read_exact(&mut [0])).await.expect("a connection");
                }
                server.write_all(b"y").await.expect("a connection");
                soon(client.read_exact(&mut [0])).await.expect("a connection");
            }

            assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
            drop((client, server));
            soon(relay).await;
        });
    }

    #[test]
    fn f10_given_a_half_closed_stream_when_nothing_moves_for_the_limit_then_it_is_ended_by_reset() {
        on_worker(async {
            let line = Line::with_half_close_timeout(Duration::from_millis(50)).await;
            let Line { mut client, mut server, backend, relay } = line;

            server.shutdown().await.expect("a connection");

            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::HalfClose);
            assert_eq!(soon(client.read(&mut [0])).await.expect("an end of stream"), 0);
            expect_reset(&mut server).await;
        });
    }

    #[test]
    fn given_a_half_closed_stream_when_bytes_move_then_the_limit_starts_anew() {
        on_worker(async {
            let limit = Duration::from_secs(1);
            let Line { mut client, mut server, backend, relay } = Line::with_half_close_timeout(limit).await;
            server.shutdown().await.expect("a connection");
            let begin = Instant::now();

            let mut last = begin;
            while begin.elapsed() < limit + limit / 4 {
                tokio::time::sleep(limit / 20).await; // A client that is slow, but not silent.
                last = Instant::now();
                client.write_all(b"x").await.expect("a connection that is not idle");
                server.read_exact(&mut [0]).await.expect("a connection that is not idle");
            }

            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::HalfClose);
            assert!(last.elapsed() >= limit, "{:?}", last.elapsed());
        });
    }

    #[test]
    fn t173_given_an_idle_limit_when_nothing_moves_then_both_peers_see_a_reset() {
        on_worker(async {
            let limits = LimitOptions { idle_timeout: Some(Duration::from_millis(50)), ..LimitOptions::default() };
            let Line { mut client, mut server, backend, relay } = Line::limited(limits).await;
            client.write_all(b"x").await.expect("a connection");
            server.read_exact(&mut [0]).await.expect("what was sent");

            expect_reset(&mut client).await;
            expect_reset(&mut server).await;

            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Idle);
        });
    }

    #[test]
    fn t172_given_an_age_limit_when_a_connection_is_as_old_then_both_peers_see_a_reset() {
        on_worker(async {
            let age = Duration::from_millis(100);
            let limits = LimitOptions { max_connection_age: Some(age), ..LimitOptions::default() };
            let Line { mut client, mut server, backend, relay } = Line::limited(limits).await;

            expect_reset(&mut client).await;
            expect_reset(&mut server).await;

            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::MaxAge);
        });
    }

    #[test]
    fn t171_given_a_backend_that_leaves_when_its_connection_is_woken_then_it_is_reset_at_that_time_and_not_before() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            client.write_all(b"x").await.expect("a connection");
            server.read_exact(&mut [0]).await.expect("what was sent");
            let at = Instant::now() + Duration::from_millis(100);

            backend.leave(at);
            worker::current().wake_all();
            server.write_all(b"y").await.expect("a connection that goes on");
            client.read_exact(&mut [0]).await.expect("what was sent");
            expect_reset(&mut client).await;

            assert!(Instant::now() + Duration::from_millis(2) > at, "before its time");
            expect_reset(&mut server).await;
            assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::EndpointRemoved);
        });
    }

    #[test]
    fn given_an_open_stream_when_it_is_idle_then_its_bytes_are_published() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;

            client.write_all(b"12345").await.expect("a connection");
            server.read_exact(&mut [0; 5]).await.expect("what was sent");
            server.write_all(b"123").await.expect("a connection");
            client.read_exact(&mut [0; 3]).await.expect("what was sent");

            let stats = &backend.stats;
            until(|| (stats.upstream_bytes.get(), stats.downstream_bytes.get()) == (5, 3)).await;
            assert_eq!(stats.active_connections.get(), 1);
            drop((client, server));
            Line::ended(relay, &backend).await;
        });
    }

    #[test]
    fn given_an_open_stream_when_its_task_is_cancelled_then_both_peers_see_a_reset() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            client.write_all(b"x").await.expect("a connection");
            server.read_exact(&mut [0]).await.expect("what was sent");

            relay.cancel();

            expect_reset(&mut client).await;
            expect_reset(&mut server).await;
            until(|| backend.stats.closed.get(CloseReason::Drain) == 1).await;
            assert_eq!(backend.stats.active_connections.get(), 0);
        });
    }

    #[test]
    fn given_a_task_that_panics_when_it_unwinds_then_the_connection_is_counted_as_such() {
        let backend = Arc::new(Backend::new(1, SocketAddr::from((LOOPBACK, 80))));
        let account = Account::open(Arc::clone(&backend), Entry::ClusterIp);

        let outcome = thread::spawn(move || {
            let _account = account;
            std::panic::resume_unwind(Box::new("on purpose"));
        })
        .join();

        assert!(outcome.is_err());
        assert_eq!(backend.stats.closed.get(CloseReason::Panic), 1);
        assert_eq!(backend.stats.active_connections.get(), 0);
    }

    #[test]
    fn f35_given_two_connections_of_a_worker_when_the_task_of_one_panics_then_only_that_is_reset() {
        on_worker(async {
            let Line { mut client, mut server, backend, relay } = Line::open().await;
            let (mut far, near) = pair().await;
            let (_other_far, other_near) = pair().await;
            let (near, other_near, entry) = (registered(near), registered(other_near), Entry::ClusterIp);
            let connection = Connection::open(near, other_near, Arc::clone(&backend), entry);

            let panicking: Spawned<()> = spawn(async move {
                let _connection = connection;
                std::panic::resume_unwind(Box::new("on purpose"))
            });
            drop(panicking);

            expect_reset(&mut far).await;
            assert_eq!(backend.stats.closed.get(CloseReason::Panic), 1);
            client.write_all(b"x").await.expect("a connection");
            soon(server.read_exact(&mut [0])).await.expect("what was sent");
            drop((client, server));
            soon(relay).await;
        });
    }
}
