//! Hand-overs from one set of threads to another in one process, over descriptors of their own: as between two processes, but
//! for the way that parcels take.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use serde_json::Value;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::contact::Contact;
use crate::handover::exporter::Exporter;
use crate::handover::giving::{Ask, Handing, Lent};
use crate::handover::importer::{Importer, TakenOver};
use crate::handover::parcel::Kind;
use crate::handover::taking::{TakeError, Taken};
use crate::handover::{Decision, Handed, Host, Office, TakeOver};
use crate::lifecycle::Readiness;
use crate::name::{ListenKey, Protocol};
use crate::plan::UdpSettings;
use crate::reply_path::ReplyPath;
use crate::serve::Target;
use crate::serve::balancer::{Backend, Balancer};
use crate::serve::estate::{Estate, PortParts};
use crate::serve::limits::LimitOptions;
use crate::serve::passed::WantedSockets;
use crate::serve::scripted::{LOOPBACK, balancer, black_hole, echo, expect_reset, read_all, reset, soon, until};
use crate::serve::tcp::{TcpOptions, TcpServer, TcpShared};
use crate::serve::udp::{UdpOptions, UdpServer, UdpShards};
use crate::serve::{TargetCell, socket};
use crate::state_lock::{Holder, StateLock};
use crate::stats::{CloseReason, ConnectFailure, DropReason, Entry};
use crate::vips::Vips;

mod flows;

/// What serves in one process: all that is handed over from and to.
struct Process {
    tcp: Arc<TcpShared>,
    udp: UdpShards,
    balancer: Arc<Balancer>,
    backends: Vec<Arc<Backend>>,
    target: TargetCell,
}

impl Process {
    fn serving(addresses: &[SocketAddr]) -> Self {
        Self::with_limits(addresses, LimitOptions::default())
    }

    fn with_limits(addresses: &[SocketAddr], limits: LimitOptions) -> Self {
        let backends: Vec<_> = addresses.iter().zip(1..).map(|(at, id)| Arc::new(Backend::new(id, *at))).collect();
        let balancer = balancer(&backends);
        let workers = NonZeroUsize::new(2).expect("not 0");
        let tcp = TcpShared::new(TcpOptions { workers, limits, ..TcpOptions::default() }).expect("threads");
        let udp = UdpShards::start(2, UdpOptions { flow_limit: 256, ..UdpOptions::default() }).expect("threads");
        let target = Arc::new(ArcSwap::from_pointee(Target::serving(&balancer)));
        Self { tcp: Arc::new(tcp), udp, balancer, backends, target }
    }

    fn listen(&self, listener: &Listener) -> TcpServer {
        let copy = Arc::new(listener.socket.try_clone().expect("a descriptor"));
        TcpServer::start(copy, listener.key, Arc::clone(&self.target), Arc::clone(&self.tcp))
            .expect("a listening socket")
    }

    fn estate(&self) -> Estate {
        let state = Arc::clone(&self.balancer.port);
        let mut backends = self.backends.clone();
        backends.sort_unstable_by_key(|backend| backend.address());
        let name = state.name.clone();
        let balancers = [Arc::clone(&self.balancer)].into();
        let parts = PortParts { state, balancers, backends: backends.into(), departed: None, tcp: None };
        self.estate_of(BTreeMap::from([(name, parts)]))
    }

    /// As if its plan had no such Service.
    fn estate_without_services(&self) -> Estate {
        self.estate_of(BTreeMap::new())
    }

    fn estate_of(&self, ports: BTreeMap<crate::name::ServicePortName, PortParts>) -> Estate {
        let (vips, reply_path) = (Vips::default(), ReplyPath::default());
        Estate { ports, tcp: Arc::clone(&self.tcp), udp: self.udp.lines(), vips, reply_path }
    }

    fn closed(&self, reason: CloseReason) -> u64 {
        self.backends.iter().map(|backend| backend.stats.closed.get(reason)).sum()
    }

    fn open(&self) -> u64 {
        self.backends.iter().map(|backend| backend.stats.active_connections.get()).sum()
    }

    fn upstream_bytes(&self) -> u64 {
        self.backends.iter().map(|backend| backend.stats.upstream_bytes.get()).sum()
    }

    fn downstream_bytes(&self) -> u64 {
        self.backends.iter().map(|backend| backend.stats.downstream_bytes.get()).sum()
    }

    /// Fails where a connection or flow has ended for another reason than that all was said.
    fn assert_that_nothing_broke(&self) {
        for reason in CloseReason::ALL.iter().filter(|reason| **reason != CloseReason::Finished) {
            assert_eq!(self.closed(*reason), 0, "{reason}");
        }
    }
}

/// A listening socket that all processes have.
struct Listener {
    key: ListenKey,
    socket: OwnedFd,
}

impl Listener {
    fn at(number: u8) -> Self {
        let key = ListenKey::new([127, 86, 0, number].into(), 7600, Protocol::Tcp);
        Self { key, socket: socket::listen_tcp(key).expect("a free address") }
    }

    async fn connect(&self) -> TcpStream {
        soon(TcpStream::connect(self.key.address())).await.expect("a listener")
    }
}

/// Everything that the old process tells, in the hands of the new one.
fn take(exporter: &Exporter, new: Estate) -> (Importer, Vec<Value>) {
    let (mut importer, mut streams) = (Importer::new(new), Vec::new());
    for parcel in exporter.parcels() {
        let parcel = parcel.expect("threads that answer");
        if parcel.kind == Kind::Stream {
            streams.extend(parcel.said::<Vec<Value>>().expect("what was written"));
        }
        importer.take(parcel).expect("what was written");
    }
    (importer, streams)
}

/// A hand-over that succeeds; listeners are the caller's to begin with.
fn hand_over(old: &Process, new: &Process) -> (TakenOver, Vec<Value>) {
    hand_over_to(old, new.estate())
}

fn hand_over_to(old: &Process, new: Estate) -> (TakenOver, Vec<Value>) {
    let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
    let (importer, streams) = take(&exporter, new);
    let committed = importer.commit();
    exporter.release().expect("threads that answer");
    (committed.finish(), streams)
}

/// Bytes that look different wherever they are shifted to.
fn pattern(seed: u64, position: u64, count: usize) -> &'static [u8] {
    const PERIOD: u64 = 1_000_003;
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let byte = |number: u64| ((number % PERIOD).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8;
        (0..PERIOD + PIECE as u64).map(byte).collect()
    });
    let from = ((seed % PERIOD + position) % PERIOD) as usize;
    &BYTES[from..from + count]
}

/// The most that is said or heard at once.
const PIECE: usize = 256 * 1024;

/// Says bytes until it is told to come to an end, and ends its half. How many.
async fn say(
    mut write: OwnedWriteHalf,
    seed: u64,
    piece: usize,
    mut over: watch::Receiver<bool>,
    said: Arc<AtomicU64>,
) {
    let mut at = 0;
    while !*over.borrow_and_update() {
        write.write_all(pattern(seed, at, piece)).await.expect("a connection that lasts");
        at += piece as u64;
        said.store(at, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(1)).await; // Its pace: nobody waits for this.
    }
    write.shutdown().await.expect("a connection that lasts");
}

/// Reads to the end of stream, and checks each byte. How many.
async fn hear(mut read: OwnedReadHalf, seed: u64) -> u64 {
    let (mut at, mut bytes) = (0, vec![0; PIECE]);
    loop {
        let count = read.read(&mut bytes).await.expect("no reset");
        if count == 0 {
            return at;
        }
        assert!(bytes[..count] == *pattern(seed, at, count), "a wrong byte between {at} and {}", at + count as u64);
        at += count as u64;
    }
}

/// What becomes of one way of a talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Small pieces, to the end.
    Steady,
    /// Ends after the first piece.
    Short,
    /// As much as goes in, and nobody reads before the end has come.
    Stuck,
}

/// How the talks of a test are, by number: upstream and downstream.
const WAYS: [[Way; 2]; 6] = [
    [Way::Steady, Way::Steady],
    [Way::Short, Way::Steady],
    [Way::Steady, Way::Short],
    [Way::Stuck, Way::Steady],
    [Way::Steady, Way::Stuck],
    [Way::Stuck, Way::Stuck],
];

/// One party of a talk.
struct Party {
    said: Arc<AtomicU64>,
    saying: JoinHandle<()>,
    hearing: JoinHandle<u64>,
}

impl Party {
    fn begin(stream: TcpStream, seed: u64, [out, back]: [Way; 2], over: &watch::Receiver<bool>) -> Self {
        let (read, write) = stream.into_split();
        let said = Arc::<AtomicU64>::default();
        let at_once = watch::channel(false);
        let (piece, until) = match out {
            Way::Steady => (700, over.clone()),
            Way::Short => (700, at_once.1.clone()),
            Way::Stuck => (PIECE, over.clone()),
        };
        let saying = tokio::spawn(say(write, seed, piece, until, Arc::clone(&said)));
        if out == Way::Short {
            let said = Arc::clone(&said);
            tokio::spawn(async move {
                until_said(&said).await;
                at_once.0.send_replace(true);
            });
        }
        let mut over = over.clone();
        let hearing = tokio::spawn(async move {
            if back == Way::Stuck {
                over.wait_for(|over| *over).await.expect("the test");
            }
            hear(read, !seed).await
        });
        Self { said, saying, hearing }
    }

    /// Waits for the end. What it has said and heard.
    async fn end(self) -> (u64, u64) {
        soon(self.saying).await.expect("no panic");
        let heard = soon(self.hearing).await.expect("no panic");
        (self.said.load(Ordering::Relaxed), heard)
    }
}

async fn until_said(said: &AtomicU64) {
    until(|| said.load(Ordering::Relaxed) > 0).await;
}

/// Parties that talk through the relay.
struct Talks {
    over: watch::Sender<bool>,
    clients: Vec<Party>,
    servers: Vec<Party>,
}

impl Talks {
    /// Each by its number; those that get stuck soon are.
    async fn begin(count: usize, listener: &Listener, server: TcpListener) -> Self {
        let (over, is_over) = watch::channel(false);
        let (mut clients, mut servers) = (Vec::new(), Vec::new());
        for number in 0..count {
            let ways = WAYS[number % WAYS.len()];
            let socket = TcpSocket::new_v4().expect("a socket");
            socket.set_recv_buffer_size(64 * 1024).expect("an option");
            let (client, accepted) =
                soon(async { tokio::join!(socket.connect(listener.key.address()), server.accept()) }).await;
            let (client, far) = (client.expect("a listener"), accepted.expect("a connection").0);
            SockRef::from(&far).set_recv_buffer_size(64 * 1024).expect("an option");
            let seed = number as u64 * 1_000_003;
            clients.push(Party::begin(client, seed, ways, &is_over));
            servers.push(Party::begin(far, !seed, [ways[1], ways[0]], &is_over));
        }
        let talks = Self { over, clients, servers };
        talks.until_stuck().await;
        talks
    }

    fn stuck(&self) -> Vec<u64> {
        let of = |parties: &[Party], side: usize| -> Vec<u64> {
            let is_stuck = |(number, _): &(usize, &Party)| WAYS[number % WAYS.len()][side] == Way::Stuck;
            parties.iter().enumerate().filter(is_stuck).map(|(_, party)| party.said.load(Ordering::Relaxed)).collect()
        };
        [of(&self.clients, 0), of(&self.servers, 1)].concat()
    }

    async fn until_stuck(&self) {
        for party in self.clients.iter().chain(&self.servers) {
            until_said(&party.said).await;
        }
        let (mut last, mut same) = (Vec::new(), 0);
        until(|| {
            let now = self.stuck();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            same > 40
        })
        .await;
    }

    /// Ends all, and checks that each has heard what the other has said. Bytes up and down.
    async fn end(self) -> (u64, u64) {
        self.over.send_replace(true);
        let (mut up, mut down) = (0, 0);
        for (client, server) in self.clients.into_iter().zip(self.servers) {
            let ((client_said, client_heard), (server_said, server_heard)) = tokio::join!(client.end(), server.end());
            assert_eq!((client_heard, server_heard), (server_said, client_said));
            (up, down) = (up + client_said, down + server_said);
        }
        (up, down)
    }
}

async fn server() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.expect("a free port");
    let address = listener.local_addr().expect("a bound socket");
    (listener, address)
}

/// Directions that hold bytes in memory, and those that hold a pipe.
fn loads(streams: &[Value]) -> (usize, usize) {
    let directions = || streams.iter().flat_map(|stream| [&stream["up"], &stream["down"]]);
    let rests = directions().filter(|direction| direction["rest"].as_u64() > Some(0)).count();
    (rests, directions().filter(|direction| direction["pipe"].is_u64()).count())
}

/// Streams of every kind go through so many hand-overs.
async fn t234_streams(number: u8, streams: usize, hand_overs: usize, copying: bool) {
    let (server, address) = server().await;
    let listener = Listener::at(number);
    let mut processes = vec![Process::serving(&[address])];
    if copying {
        processes[0].tcp.refuse_pipes();
    }
    let _accepting = processes[0].listen(&listener);
    let talks = Talks::begin(streams, &listener, server).await;
    let mut pauses = Vec::new();

    for _ in 0..hand_overs {
        let old = processes.last().expect("one at least");
        let new = Process::serving(&[address]);
        if copying {
            new.tcp.refuse_pipes();
        }
        let begun = Instant::now();
        let (taken, said) = hand_over(old, &new);
        pauses.push(begun.elapsed());
        let (rests, pipes) = loads(&said);
        assert_eq!((taken.streams, said.len()), (streams, streams));
        assert!(if copying { rests > 0 && pipes == 0 } else { pipes > 0 }, "{rests} rests, {pipes} pipes");
        assert_eq!((old.open(), old.tcp.open_connections()), (0, 0));
        assert_eq!(new.balancer.port.stats.open.get(), streams as u64);
        until(|| new.open() == streams as u64).await;
        let moved = new.upstream_bytes() + new.downstream_bytes();
        until(|| new.upstream_bytes() + new.downstream_bytes() > moved).await;
        processes.push(new);
    }

    println!("{streams} streams: standing still for {pauses:?}");
    let moved = talks.end().await;
    let last = processes.last().expect("one at least");
    until(|| last.closed(CloseReason::Finished) == streams as u64).await;
    assert_eq!((last.upstream_bytes(), last.downstream_bytes()), moved);
    assert_eq!(last.backends[0].stats.connections.of(Entry::ClusterIp), streams as u64, "none was counted twice");
    assert_eq!(last.open(), 0);
    processes.iter().for_each(Process::assert_that_nothing_broke);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_f25_given_streams_of_every_kind_when_they_are_handed_over_again_and_again_then_no_byte_is_lost() {
    t234_streams(1, 24, 5, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_f25_given_streams_that_copy_when_they_are_handed_over_then_what_they_hold_comes_along() {
    t234_streams(2, 12, 3, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_f25_given_two_hundred_streams_when_they_are_handed_over_then_they_stand_still_for_a_moment_only() {
    crate::host::raise_open_files().expect("a limit"); // Four for each stream, and two more for a moment.
    let address = echo().await;
    let listener = Listener::at(3);
    let (old, new) = (Process::serving(&[address]), Process::serving(&[address]));
    let _accepting = old.listen(&listener);
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut client = listener.connect().await;
        ping(&mut client).await;
        clients.push(client);
    }

    let begun = Instant::now();
    let (taken, _) = hand_over(&old, &new);
    let pause = begun.elapsed();

    println!("200 streams: standing still for {pause:?}");
    assert_eq!(taken.streams, 200);
    for client in &mut clients {
        ping(client).await;
    }
    assert!(pause < Duration::from_secs(1), "{pause:?}");
}

/// Sends a byte and waits until it comes back.
async fn ping(stream: &mut TcpStream) {
    stream.write_all(b"x").await.expect("a connection");
    soon(stream.read_exact(&mut [0])).await.expect("an echo");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_a_hand_over_that_fails_when_all_was_told_then_everything_goes_on_in_the_old_process() {
    let (server, address) = server().await;
    let listener = Listener::at(4);
    let (old, new) = (Process::serving(&[address]), Process::serving(&[address]));
    let _accepting = old.listen(&listener);
    let talks = Talks::begin(12, &listener, server).await;

    for round in 0..3 {
        let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
        assert_eq!(exporter.streams(), 12);
        let parcels = exporter.parcels().take(if round == 0 { 1 } else { usize::MAX });
        let mut importer = Importer::new(new.estate());
        parcels.for_each(|parcel| importer.take(parcel.expect("threads that answer")).expect("what was written"));
        match round {
            0 | 1 => drop(exporter),
            _ => {
                drop(importer); // The other one is gone first.
                drop(exporter);
            }
        }
        let moved = old.upstream_bytes();
        until(|| old.upstream_bytes() > moved).await;
    }

    let moved = talks.end().await;
    until(|| old.closed(CloseReason::Finished) == 12).await;
    assert_eq!((old.upstream_bytes(), old.downstream_bytes()), moved);
    assert_eq!((new.open(), new.upstream_bytes()), (0, 0));
    old.assert_that_nothing_broke();
}

fn holder(pid: u32) -> Holder {
    Holder { pid, admin: None, since: SystemTime::UNIX_EPOCH }
}

/// Answers in a folder for a process whose listeners stay with the test.
fn attend(old: &Arc<Process>, folder: &Path) -> oneshot::Receiver<Handed> {
    let lock = StateLock::take(folder, holder(1)).expect("nobody has it");
    let office = Office::found(folder, lock).expect("a socket can be made");
    let admin = watch::Sender::default().subscribe();
    let (readiness, folder) = (Readiness::default(), folder.to_owned());
    let host = Host { office, folder, admin, readiness, cannot_start: None, pod: None };
    let old = Arc::clone(old);
    let control = move |ask: Ask| {
        let Ask::Lend(Handing { lent, end }) = ask else { return false };
        let estate = old.estate();
        thread::spawn(move || {
            let (passed, health_ports, source) = Default::default();
            let lending = Lent { passed, health_ports, estate, source };
            let _ = lent.send(Ok(lending)); // Who asked may be gone.
            end.blocking_recv().map(|done| done.send(()))
        });
        true
    };
    host.attend(control).expect("a thread")
}

/// Does on another thread what blocks.
async fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> Result<T, TakeError> + Send + 'static) -> T {
    soon(spawn_blocking(work)).await.expect("no panic").expect("it is given")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_a_successor_that_goes_away_with_all_it_was_told_when_the_next_one_asks_then_that_one_goes_on() {
    let (server, address) = server().await;
    let listener = Listener::at(11);
    let (old, new) = (Arc::new(Process::serving(&[address])), Process::serving(&[address]));
    let _accepting = old.listen(&listener);
    let talks = Talks::begin(12, &listener, server).await;
    let folder = tempfile::tempdir().expect("a folder can be made");
    let handed = attend(&old, folder.path());
    let take_over =
        TakeOver { folder: folder.path().to_owned(), holder: holder(2), pod: None, decision: Decision::default() };
    let ask = || {
        let (take_over, estate) = (take_over.clone(), new.estate());
        elsewhere(move || take_over.ask(&WantedSockets::default(), estate))
    };

    drop(ask().await.expect("somebody is there"));
    let moved = old.upstream_bytes();
    until(|| old.upstream_bytes() > moved).await;
    assert_eq!((new.open(), new.upstream_bytes()), (0, 0));

    let mut offer = ask().await.expect("somebody is there");
    offer.prepare().await;
    let Taken { moving, from, .. } = elsewhere(move || offer.accept(holder(2))).await;
    let from = from.expect("there was one");
    let committed = moving.expect("there was one").commit();
    assert!(elsewhere(move || Ok(from.released())).await, "it has let go");
    let taken = committed.finish();

    assert_eq!((taken.streams, old.open()), (12, 0));
    assert_eq!(soon(handed).await.expect("it was handed over").pid, std::process::id().cast_signed());
    let moved = talks.end().await;
    until(|| new.closed(CloseReason::Finished) == 12).await;
    assert_eq!((new.upstream_bytes(), new.downstream_bytes()), moved);
    old.assert_that_nothing_broke();
    new.assert_that_nothing_broke();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_a_standstill_when_clients_come_then_they_wait_and_one_of_the_processes_lets_them_in() {
    let address = echo().await;
    let listener = Listener::at(5);
    let (old, new) = (Process::serving(&[address]), Process::serving(&[address]));
    let _accepting = old.listen(&listener);
    ping(&mut listener.connect().await).await;

    let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
    let mut first = listener.connect().await;
    first.write_all(b"x").await.expect("the kernel has let it in");
    let accepted = old.balancer.port.stats.accepted.get();
    drop(exporter);
    soon(first.read_exact(&mut [0])).await.expect("an echo");
    assert_eq!(old.balancer.port.stats.accepted.get(), accepted + 1, "not before");

    let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
    let mut second = listener.connect().await;
    let (importer, _) = take(&exporter, new.estate());
    let committed = importer.commit();
    exporter.release().expect("threads that answer");
    let _heir = new.listen(&listener);
    committed.finish();
    ping(&mut second).await;
    for _ in 0..50 {
        ping(&mut listener.connect().await).await;
    }

    assert_eq!(old.balancer.port.stats.accepted.get(), accepted + 1);
    assert_eq!(new.balancer.port.stats.accepted.get(), accepted + 1 + 51, "its own, and those of before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_streams_that_were_handed_over_when_a_party_resets_then_the_other_is_reset() {
    let (server, address) = server().await;
    let listener = Listener::at(6);
    let (old, new) = (Process::serving(&[address]), Process::serving(&[address]));
    let _accepting = old.listen(&listener);
    let mut pairs = Vec::new();
    for _ in 0..3 {
        let (client, accepted) = soon(async { tokio::join!(listener.connect(), server.accept()) }).await;
        pairs.push((client, accepted.expect("a connection").0));
    }
    until(|| old.open() == 3).await;
    let (early, mut early_far) = pairs.remove(0);

    let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
    reset(early); // While nobody looks.
    let (importer, _) = take(&exporter, new.estate());
    let committed = importer.commit();
    exporter.release().expect("threads that answer");
    assert_eq!(committed.finish().streams, 3);

    expect_reset(&mut early_far).await;
    let (client, mut far) = pairs.remove(0);
    reset(client);
    expect_reset(&mut far).await;
    let (mut client, far) = pairs.remove(0);
    reset(far);
    expect_reset(&mut client).await;
    until(|| new.open() == 0).await;
    assert_eq!((new.closed(CloseReason::ClientAbort), new.closed(CloseReason::Reset)), (2, 1));
    old.assert_that_nothing_broke();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_a_connection_on_its_way_to_a_backend_when_others_are_handed_over_then_it_stays_and_ends_here() {
    let (held, silent) = black_hole();
    let listener = Listener::at(7);
    let (old, new) = (Process::serving(&[silent]), Process::serving(&[silent]));
    let _accepting = old.listen(&listener);
    let mut client = listener.connect().await;
    until(|| old.tcp.open_connections() == 1).await;

    let (taken, _) = hand_over(&old, &new);

    assert_eq!((taken.streams, old.tcp.open_connections()), (0, 1));
    drop(held);
    expect_reset(&mut client).await;
    soon(old.tcp.drained()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_given_a_connection_that_stays_when_it_ends_then_whoever_serves_counts_its_end_and_nothing_twice() {
    let (held, silent) = black_hole();
    let listener = Listener::at(13);
    let (old, new) = (Arc::new(Process::serving(&[silent])), Process::serving(&[silent]));
    let _accepting = old.listen(&listener);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let handed = attend(&old, folder.path());
    let mut client = listener.connect().await;
    until(|| old.tcp.open_connections() == 1).await;
    let take_over =
        TakeOver { folder: folder.path().to_owned(), holder: holder(2), pod: None, decision: Decision::default() };
    let estate = new.estate();
    let asking = elsewhere(move || take_over.ask(&WantedSockets::default(), estate));
    let offer = asking.await.expect("somebody is there");
    let Taken { office, moving, .. } = elsewhere(move || offer.accept(holder(2))).await;
    moving.expect("there was one").commit().finish();
    let (admin, folder) = (watch::Sender::default().subscribe(), folder.path().to_owned());
    let host = Host { office, folder, admin, readiness: Readiness::default(), cannot_start: None, pod: None };
    let (tell, told) = std::sync::mpsc::channel();
    let serving = host.attend(move |ask| match ask {
        Ask::Count(late) => tell.send(late).is_ok(),
        Ask::Lend(_) => false,
    });
    let _serving = serving.expect("a thread");
    let mut handed = soon(handed).await.expect("it was handed over");

    drop(held);
    expect_reset(&mut client).await;
    soon(old.tcp.drained()).await;
    soon(handed.settle()).await;
    let late = spawn_blocking(move || told.recv().expect("it is told"));
    soon(late).await.expect("no panic").of_services().commit(&new.estate(), &Contact::default(), Instant::now());

    let [before, after] = [&*old, &new].map(|process| {
        let (port, backend) = (&process.balancer.port.stats, &process.backends[0].stats);
        let failures: u64 = ConnectFailure::ALL.iter().map(|reason| backend.connect_failures.get(*reason)).sum();
        (port.accepted.get(), port.dropped.get(DropReason::EjectedAll), port.retries.get(), failures)
    });
    assert_eq!((before, after.0, after.1), (after, 1, 1));
    assert_eq!((new.open(), new.balancer.port.stats.open.get()), (0, 0), "it never was open here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t156_given_a_stream_whose_service_is_gone_when_it_is_handed_over_then_it_goes_on() {
    let address = echo().await;
    let listener = Listener::at(8);
    let (old, new) = (Process::serving(&[address]), Process::serving(&[address]));
    let _accepting = old.listen(&listener);
    let mut client = listener.connect().await;
    ping(&mut client).await;

    let (taken, _) = hand_over_to(&old, new.estate_without_services());

    assert_eq!(taken.streams, 1);
    ping(&mut client).await;
    assert_eq!((new.open(), new.tcp.open_connections()), (0, 1), "it is nobody's here, and is known all the same");
    hand_over(&new, &old); // And back, where its Service is.
    assert_eq!((old.tcp.open_connections(), new.tcp.open_connections()), (1, 0));
    until(|| old.open() == 1).await;
    client.shutdown().await.expect("a connection");
    let (_, end) = read_all(&mut client).await;
    end.expect("an end of stream");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_an_old_process_that_aborts_when_another_has_its_streams_then_these_are_untouched() {
    let address = echo().await;
    let listener = Listener::at(9);
    let (old, new) = (Process::serving(&[address]), Process::serving(&[address]));
    let _accepting = old.listen(&listener);
    let mut client = listener.connect().await;
    ping(&mut client).await;

    let exporter = Exporter::freeze(old.estate(), Instant::now()).expect("threads that answer");
    let (importer, _) = take(&exporter, new.estate());
    old.tcp.abort_connections();
    soon(old.tcp.drained()).await;
    importer.commit().finish();
    drop(exporter);

    ping(&mut client).await;
    client.shutdown().await.expect("a connection");
    let (_, end) = read_all(&mut client).await;
    end.expect("an end of stream, no reset");
    old.assert_that_nothing_broke();
    until(|| new.closed(CloseReason::Finished) == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_given_a_half_closed_stream_when_it_is_handed_over_then_its_silence_counts_from_before() {
    let (server, address) = server().await;
    let limits = LimitOptions { half_close_timeout: Duration::from_secs(3), ..LimitOptions::default() };
    let listener = Listener::at(10);
    let (old, new) = (Process::with_limits(&[address], limits), Process::with_limits(&[address], limits));
    let _accepting = old.listen(&listener);
    let (mut client, accepted) = soon(async { tokio::join!(listener.connect(), server.accept()) }).await;
    let mut far = accepted.expect("a connection").0;
    client.write_all(b"x").await.expect("a connection");
    client.shutdown().await.expect("a connection");
    assert_eq!(read_all(&mut far).await.0, b"x");
    let silent_since = Instant::now();
    until(|| silent_since.elapsed() > Duration::from_millis(1_500)).await;

    let (taken, said) = hand_over(&old, &new);

    assert_eq!(taken.streams, 1);
    assert_eq!(said[0]["up"]["phase"], "done");
    expect_reset(&mut client).await;
    let silent = silent_since.elapsed();
    assert!((2_900..4_400).contains(&silent.as_millis()), "{silent:?}");
    until(|| new.closed(CloseReason::HalfClose) == 1).await;
}
