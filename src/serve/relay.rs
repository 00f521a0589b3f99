//! Moves bytes between a client and its backend until both have said all, or one of them is gone.
//!
//! One task polls both directions by hand. A direction reads into a scratch buffer of the thread,
//! which is used within one poll only, and writes at once; what the receiver does not take is kept
//! on the heap, and nothing more is read until it is gone: that is the back-pressure. So an idle
//! connection holds no buffer, and a slow reader costs what one read gave.
//!
//! *How a stream ends.* An end of stream is passed on once everything before it is (half-close), and
//! the other direction goes on. A reset is passed on as a reset, at once, also where nothing is being
//! read from that side: truncated bytes never look complete. So does every other untimely end,
//! be it a cancelled task or a panic: unless both sides have finished, the sockets are closed by reset.
//!
//! How a backend is reached is in `connect`; who may connect at all is in `tcp`.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::serve::balancer::Backend;
use crate::serve::socket;
use crate::stats::{BackendStats, CloseReason};

/// How much is read at once.
const SCRATCH_BYTES: usize = 64 * 1024;

/// What a direction may move before other connections of the thread get their turn.
const BUDGET_BYTES: usize = 1024 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
}

/// A client and the backend that was reached for it. Counts on the backend, whatever happens to it.
pub struct Connection {
    pair: Pair, // Dropped before the account: what is counted as closed is closed.
    account: Account,
}

impl Connection {
    /// Counts a new connection of the backend.
    pub fn open(client: TcpStream, upstream: TcpStream, backend: Arc<Backend>) -> Self {
        Self { pair: Pair { client, upstream, finished: false }, account: Account::open(backend) }
    }

    /// Moves bytes until the end of the connection and tells why it ended.
    ///
    /// `half_close_timeout`: how long one side may keep silent after the other has closed its half.
    pub async fn relay(&mut self, half_close_timeout: Duration) -> CloseReason {
        let Self { pair, account } = self;
        let mut relay = Relay::new(pair, account, half_close_timeout);
        let reason = poll_fn(|cx| SCRATCH.with_borrow_mut(|scratch| relay.poll(cx, scratch))).await;
        drop(relay);
        pair.finished = reason == CloseReason::Finished;
        account.reason = Some(reason);
        reason
    }

    /// The backend.
    pub fn backend(&self) -> &Backend {
        &self.account.backend
    }

    /// Payload bytes that the backend's socket and the client's socket took.
    pub fn bytes(&self) -> (u64, u64) {
        (self.account.upstream.moved, self.account.downstream.moved)
    }
}

/// Ends when the network has taken the connection away (a reset, a peer that no longer answers), and says how.
///
/// An end of stream is none: a client that has sent its request may close its half and wait for the answer.
pub async fn broken(stream: &TcpStream) -> io::Error {
    match stream.ready(Interest::ERROR).await {
        Ok(_) => match stream.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => io::ErrorKind::ConnectionReset.into(), // The error itself was met by a read or a write.
        },
        Err(error) => error,
    }
}

/// The two sockets of a connection. Unless both sides have finished, they are closed by reset.
struct Pair {
    client: TcpStream,
    upstream: TcpStream,
    finished: bool,
}

impl Drop for Pair {
    fn drop(&mut self) {
        if !self.finished {
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
}

/// The bytes of one direction.
#[derive(Default)]
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
    fn open(backend: Arc<Backend>) -> Self {
        backend.stats.connections.increment();
        backend.stats.active_connections.increment();
        Self { backend, upstream: Tab::default(), downstream: Tab::default(), reason: None }
    }

    /// Costs two shared writes at most: once for each turn of the connection, not for each write.
    fn publish(&mut self) {
        let BackendStats { upstream_bytes, downstream_bytes, .. } = &self.backend.stats;
        for (counter, tab) in [(upstream_bytes, &mut self.upstream), (downstream_bytes, &mut self.downstream)] {
            let amount = tab.unpublished();
            if amount > 0 {
                counter.add(amount);
            }
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.publish();
        let dropped = if std::thread::panicking() { CloseReason::Panic } else { CloseReason::Drain };
        self.backend.stats.closed.count(self.reason.unwrap_or(dropped));
        self.backend.stats.active_connections.decrement();
    }
}

/// Whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Party {
    Client,
    Backend,
}

/// A party's connection has failed.
#[derive(Debug)]
struct Broken {
    party: Party,
    error: io::Error,
}

impl Broken {
    fn reason(&self) -> CloseReason {
        match Errno::from_io_error(&self.error) {
            Some(Errno::TIMEDOUT) => CloseReason::Timeout,
            Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::NETDOWN) => CloseReason::Unreachable,
            _ => match self.party {
                Party::Client => CloseReason::ClientAbort,
                Party::Backend => CloseReason::Reset,
            },
        }
    }
}

/// A party with its socket.
#[derive(Clone, Copy)]
struct End<'s> {
    party: Party,
    stream: &'s TcpStream,
}

impl End<'_> {
    fn broken(self, error: io::Error) -> Broken {
        Broken { party: self.party, error }
    }
}

/// Both directions of one connection.
struct Relay<'s> {
    client: End<'s>,
    upstream: End<'s>,
    account: &'s mut Account,
    up: Direction,
    down: Direction,
    half_close_timeout: Duration,
    rare: Option<Box<Rare<'s>>>,
}

impl<'s> Relay<'s> {
    fn new(pair: &'s Pair, account: &'s mut Account, half_close_timeout: Duration) -> Self {
        Self {
            client: End { party: Party::Client, stream: &pair.client },
            upstream: End { party: Party::Backend, stream: &pair.upstream },
            account,
            up: Direction::default(),
            down: Direction::default(),
            half_close_timeout,
            rare: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<CloseReason> {
        let outcome = match self.poll_directions(cx, scratch) {
            Poll::Ready(Ok(())) => Poll::Ready(CloseReason::Finished),
            Poll::Ready(Err(broken)) => Poll::Ready(broken.reason()),
            Poll::Pending => self.poll_rare(cx),
        };
        self.account.publish();
        outcome
    }

    fn poll_directions(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<Result<(), Broken>> {
        let Account { upstream, downstream, .. } = &mut *self.account;
        let up = Path { from: self.client, to: self.upstream, last: self.down.is_done() };
        let up = self.up.poll(cx, up, scratch, &mut upstream.moved)?;
        let down = Path { from: self.upstream, to: self.client, last: self.up.is_done() };
        let down = self.down.poll(cx, down, scratch, &mut downstream.moved)?;
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// What a connection needs only where a party is not being read: nobody would notice that it is gone.
    fn poll_rare(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        let ends = [(self.client, self.up.is_reading()), (self.upstream, self.down.is_reading())];
        if ends.iter().all(|(_, is_read)| *is_read) {
            return Poll::Pending;
        }
        let rare = self.rare.get_or_insert_default();
        for ((end, is_read), watch) in ends.into_iter().zip(&mut rare.watches) {
            if is_read {
                continue; // A read gives what came before the reset, then the reset.
            }
            let watch = watch.get_or_insert_with(|| Box::pin(broken(end.stream)));
            if let Poll::Ready(error) = watch.as_mut().poll(cx) {
                return Poll::Ready(end.broken(error).reason());
            }
        }
        if self.up.is_done() || self.down.is_done() {
            let moved = self.account.upstream.moved + self.account.downstream.moved;
            let silence = rare.silence.get_or_insert_with(|| Silence::new(self.half_close_timeout, moved));
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
}

type Watch<'s> = Pin<Box<dyn Future<Output = io::Error> + Send + 's>>;

/// Waits for a time without progress. The timer is set anew when it fires, not at each progress.
struct Silence {
    limit: Duration,
    moved: u64,
    since: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Silence {
    fn new(limit: Duration, moved: u64) -> Self {
        Self { limit, moved, since: Instant::now(), timer: Box::pin(tokio::time::sleep(limit)) }
    }

    fn poll(&mut self, cx: &mut Context<'_>, moved: u64) -> Poll<()> {
        if moved != self.moved {
            self.moved = moved;
            self.since = Instant::now();
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            if self.since.elapsed() >= self.limit {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(self.since + self.limit);
        }
    }
}

/// Where a direction goes.
#[derive(Clone, Copy)]
struct Path<'s> {
    from: End<'s>,
    to: End<'s>,
    /// The other direction is done: the close that follows says it all.
    last: bool,
}

/// One direction of a connection.
#[derive(Default)]
struct Direction {
    phase: Phase,
    rest: Option<Box<Rest>>,
}

/// How far a direction is. (A cheaper way to move bulk is one more phase beside `Copying`.)
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    /// The sender may have more.
    #[default]
    Copying,
    /// The sender has said all; the receiver does not know yet.
    Ending,
    /// The receiver knows, too.
    Done,
}

/// What was read and could not be written yet.
struct Rest {
    bytes: Box<[u8]>,
    sent: usize,
}

impl Direction {
    fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// True where it waits for its sender, and so would notice its end.
    fn is_reading(&self) -> bool {
        self.phase == Phase::Copying && self.rest.is_none()
    }

    /// Moves what can be moved now. Ready once it is done.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        path: Path<'_>,
        scratch: &mut [u8],
        moved: &mut u64,
    ) -> Poll<Result<(), Broken>> {
        let mut budget = BUDGET_BYTES;
        loop {
            let read = ready!(match self.phase {
                Phase::Done => return Poll::Ready(Ok(())),
                _ if self.rest.is_some() => self.flush(cx, path.to, moved),
                Phase::Ending => Poll::Ready(self.end(path)),
                Phase::Copying if budget == 0 => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                Phase::Copying => self.copy(cx, path, scratch, moved),
            })?;
            budget = budget.saturating_sub(read);
        }
    }

    /// Reads once and writes it. Returns how much was read.
    fn copy(
        &mut self,
        cx: &mut Context<'_>,
        Path { from, to, .. }: Path<'_>,
        scratch: &mut [u8],
        moved: &mut u64,
    ) -> Poll<Result<usize, Broken>> {
        let count = ready!(poll_receive(cx, from.stream, scratch)).map_err(|error| from.broken(error))?;
        if count == 0 {
            self.phase = Phase::Ending;
            return Poll::Ready(Ok(0));
        }
        let bytes = &scratch[..count];
        let sent = send(to.stream, bytes).map_err(|error| to.broken(error))?;
        *moved += sent as u64;
        if sent < count {
            self.rest = Some(Box::new(Rest { bytes: bytes[sent..].into(), sent: 0 }));
        }
        Poll::Ready(Ok(count))
    }

    /// Writes what is left of the last read. Returns 0, as nothing more was read.
    fn flush(&mut self, cx: &mut Context<'_>, to: End<'_>, moved: &mut u64) -> Poll<Result<usize, Broken>> {
        while let Some(rest) = &mut self.rest {
            ready!(to.stream.poll_write_ready(cx)).map_err(|error| to.broken(error))?;
            let sent = send(to.stream, &rest.bytes[rest.sent..]).map_err(|error| to.broken(error))?;
            *moved += sent as u64;
            rest.sent += sent;
            if rest.sent == rest.bytes.len() {
                self.rest = None;
            }
        }
        Poll::Ready(Ok(0))
    }

    /// Passes the end of stream on. Returns 0, as nothing more was read.
    fn end(&mut self, Path { to, last, .. }: Path<'_>) -> Result<usize, Broken> {
        if !last {
            rustix::net::shutdown(to.stream, Shutdown::Write).map_err(|error| to.broken(error.into()))?;
        }
        self.phase = Phase::Done;
        Ok(0)
    }
}

/// Reads what is there; 0 is the end of stream.
///
/// A short read has emptied the socket, so its readiness is cleared without another call that only says so. It is
/// cleared as it was *before* the read (`try_io` sees to it): what arrives in between wakes the task.
fn poll_receive(cx: &mut Context<'_>, from: &TcpStream, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
    loop {
        ready!(from.poll_read_ready(cx))?;
        let mut received = None;
        let outcome = from.try_io(Interest::READABLE, || {
            let (_, count) = retry_on_intr(|| rustix::net::recv(from, &mut *buffer, RecvFlags::empty()))?;
            received = Some(count);
            if 0 < count && count < buffer.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match (received, outcome) {
            (Some(count), _) => return Poll::Ready(Ok(count)),
            (None, Err(error)) if error.kind() != io::ErrorKind::WouldBlock => return Poll::Ready(Err(error)),
            (None, _) => {} // Nothing there after all: ask to be woken.
        }
    }
}

/// Writes what the socket takes, maybe nothing. A part means that it is full, and clears its readiness as above.
fn send(to: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    let outcome = to.try_io(Interest::WRITABLE, || {
        sent = retry_on_intr(|| rustix::net::send(to, bytes, SendFlags::NOSIGNAL))?;
        if sent < bytes.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match outcome {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(sent),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::thread;

    use socket2::SockRef;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinHandle;

    use super::*;
    use crate::serve::scripted::{LOOPBACK, expect_reset, pair, read_all, reset, soon, until};

    const HOUR: Duration = Duration::from_secs(3600);

    /// A relay with both of its peers in the hands of the test.
    struct Line {
        client: TcpStream,
        server: TcpStream,
        backend: Arc<Backend>,
        relay: JoinHandle<Ended>,
    }

    /// What became of it.
    struct Ended {
        reason: CloseReason,
        upstream_bytes: u64,
        downstream_bytes: u64,
    }

    impl Line {
        async fn open() -> Self {
            Self::with_half_close_timeout(HOUR).await
        }

        async fn with_half_close_timeout(limit: Duration) -> Self {
            let (client, downstream) = pair().await;
            let (server, upstream) = pair().await;
            let backend = Arc::new(Backend::new(1, SocketAddr::from((LOOPBACK, 80))));
            let mut connection = Connection::open(downstream, upstream, Arc::clone(&backend));
            let relay = tokio::spawn(async move {
                let reason = connection.relay(limit).await;
                let (upstream_bytes, downstream_bytes) = connection.bytes();
                Ended { reason, upstream_bytes, downstream_bytes }
            });
            Self { client, server, backend, relay }
        }

        /// The end of a relay whose peers are gone, after a look at its counters.
        async fn ended(relay: JoinHandle<Ended>, backend: &Backend) -> Ended {
            let ended = soon(relay).await.expect("no panic");
            assert_eq!(backend.stats.closed.get(ended.reason), 1);
            assert_eq!(backend.stats.active_connections.get(), 0);
            assert_eq!(backend.stats.connections.get(), 1);
            assert_eq!(backend.stats.upstream_bytes.get(), ended.upstream_bytes);
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

    #[tokio::test]
    async fn t152_given_one_byte_each_way_when_relayed_then_it_is_the_same() {
        both_ways(1).await;
    }

    #[tokio::test]
    async fn t152_given_64_kib_each_way_when_relayed_then_they_are_the_same() {
        both_ways(64 * 1024).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn t152_given_100_mib_each_way_when_relayed_then_they_are_the_same() {
        both_ways(100 * 1024 * 1024).await;
    }

    #[tokio::test]
    async fn t153_given_a_client_that_closes_its_half_when_the_server_answers_then_the_whole_answer_arrives() {
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
    }

    #[tokio::test]
    async fn given_a_server_that_closes_its_half_when_the_client_goes_on_then_all_arrives() {
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
    }

    #[tokio::test]
    async fn given_a_thousand_half_closed_exchanges_when_relayed_then_none_loses_a_byte() {
        for round in 0..1_000 {
            let Line { mut client, server, relay, .. } = Line::open().await;
            client.write_all(&[round as u8; 10]).await.expect("a connection");
            client.shutdown().await.expect("a connection");

            let (at_server, at_client) = tokio::join!(exchange(server, &[1; 20_000]), read_all(&mut client));

            assert_eq!(at_server, [round as u8; 10]);
            assert_eq!((at_client.0.len(), at_client.1.is_ok()), (20_000, true), "round {round}");
            assert_eq!(soon(relay).await.expect("no panic").reason, CloseReason::Finished);
        }
    }

    #[tokio::test]
    async fn t155_given_a_client_that_resets_when_relayed_then_the_server_sees_a_reset() {
        let Line { mut client, mut server, backend, relay } = Line::open().await;
        client.write_all(b"half a requ").await.expect("a connection");
        server.read_exact(&mut [0; 11]).await.expect("what was sent");

        reset(client);

        expect_reset(&mut server).await;
        assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::ClientAbort);
    }

    #[tokio::test]
    async fn t155_given_a_server_that_resets_when_relayed_then_the_client_sees_a_reset() {
        let Line { mut client, mut server, backend, relay } = Line::open().await;
        server.write_all(b"half an ans").await.expect("a connection");
        client.read_exact(&mut [0; 11]).await.expect("what was sent");

        reset(server);

        expect_reset(&mut client).await;
        assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Reset);
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

    #[tokio::test]
    async fn given_a_relay_that_only_waits_to_write_when_the_sender_resets_then_it_is_passed_on() {
        let Line { mut client, mut server, backend, relay } = Line::open().await;
        fill(&mut client).await;

        reset(client);

        assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::ClientAbort);
        expect_reset(&mut server).await;
    }

    #[tokio::test]
    async fn given_a_client_that_has_closed_its_half_when_it_resets_then_it_is_passed_on() {
        let Line { mut client, mut server, backend, relay } = Line::open().await;
        client.shutdown().await.expect("a connection");
        assert_eq!(soon(server.read(&mut [0])).await.expect("an end of stream"), 0);

        reset(client);

        assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::ClientAbort);
        // The server's end has got the end of stream before: a reset shows as a failed write.
        until(|| SockRef::from(&server).take_error().expect("an option").is_some()).await;
    }

    #[tokio::test]
    async fn given_a_server_that_has_closed_its_half_when_it_resets_then_it_is_passed_on() {
        let Line { mut client, mut server, backend, relay } = Line::open().await;
        server.shutdown().await.expect("a connection");
        assert_eq!(soon(client.read(&mut [0])).await.expect("an end of stream"), 0);

        reset(server);

        assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Reset);
    }

    #[tokio::test]
    async fn given_a_slow_reader_when_the_sender_goes_on_then_it_is_held_back_and_nothing_is_lost() {
        let Line { mut client, server, backend, relay } = Line::open().await;

        let written = fill(&mut client).await;
        client.shutdown().await.expect("a connection");

        assert!(written < 32 * 1024 * 1024, "{written} bytes: only kernel buffers and one read are full");
        let received = exchange(server, b"").await;
        assert_eq!(received.len(), written);
        assert!(received.iter().all(|byte| *byte == 7));
        assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::Finished);
    }

    #[tokio::test]
    async fn given_a_half_closed_stream_when_nothing_moves_for_the_limit_then_it_is_ended_by_reset() {
        let line = Line::with_half_close_timeout(Duration::from_millis(50)).await;
        let Line { mut client, mut server, backend, relay } = line;

        server.shutdown().await.expect("a connection");

        assert_eq!(Line::ended(relay, &backend).await.reason, CloseReason::HalfClose);
        assert_eq!(soon(client.read(&mut [0])).await.expect("an end of stream"), 0);
        expect_reset(&mut server).await;
    }

    #[tokio::test]
    async fn given_a_half_closed_stream_when_bytes_move_then_the_limit_starts_anew() {
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
    }

    #[tokio::test]
    async fn given_an_open_stream_when_it_is_idle_then_its_bytes_are_published() {
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
    }

    #[tokio::test]
    async fn given_an_open_stream_when_its_task_is_cancelled_then_both_peers_see_a_reset() {
        let Line { mut client, mut server, backend, relay } = Line::open().await;
        client.write_all(b"x").await.expect("a connection");
        server.read_exact(&mut [0]).await.expect("what was sent");

        relay.abort();

        expect_reset(&mut client).await;
        expect_reset(&mut server).await;
        until(|| backend.stats.closed.get(CloseReason::Drain) == 1).await;
        assert_eq!(backend.stats.active_connections.get(), 0);
    }

    #[test]
    fn given_a_task_that_panics_when_it_unwinds_then_the_connection_is_counted_as_such() {
        let backend = Arc::new(Backend::new(1, SocketAddr::from((LOOPBACK, 80))));
        let account = Account::open(Arc::clone(&backend));

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
    fn given_what_broke_when_told_then_the_word_says_who_or_what_it_was() {
        let reason = |party, errno: Errno| Broken { party, error: errno.into() }.reason();

        assert_eq!(reason(Party::Client, Errno::CONNRESET), CloseReason::ClientAbort);
        assert_eq!(reason(Party::Client, Errno::PIPE), CloseReason::ClientAbort);
        assert_eq!(reason(Party::Backend, Errno::PIPE), CloseReason::Reset);
        assert_eq!(reason(Party::Client, Errno::TIMEDOUT), CloseReason::Timeout);
        assert_eq!(reason(Party::Backend, Errno::HOSTUNREACH), CloseReason::Unreachable);
    }
}
