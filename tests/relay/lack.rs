//! A relay as a program that has not enough: descriptors, pipes. What is open goes on, nothing spins, no byte is lost.

use std::io;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::support::backend::Backend;
use crate::support::manifest::Manifest;
use crate::support::program::{Descriptors, Program};
use crate::support::site::Site;
use crate::support::{client, full, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f14_given_fewer_descriptors_than_clients_when_they_wait_then_nothing_spins_and_new_ones_are_served_again() {
    const CLIENTS: u64 = 3_000;
    const DESCRIPTORS: u64 = 1_024;
    let site = Site::new(14);
    let _backend = Backend::named(site.backend(1)).await;
    let relay = Program::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)]), |_| ()).await;
    relay.limit_descriptors(DESCRIPTORS);
    let descriptors = Descriptors::take().await;
    let count = descriptors.fitting(CLIENTS, 2);
    let mut served = client::connect(site.service()).await.expect("the Service answers");
    client::ask_on(&mut served).await.expect("the backend answers");
    relay.until("it to see its limit", |relay| relay.gauge("kuberelay_connections_limit") < DESCRIPTORS as f64).await;

    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(client::connect(site.service()).await.expect("a connection, or a place in the queue"));
    }
    relay.until("nobody to be accepted", |relay| paused(relay) > 0.0).await;
    let busy = relay.busy(Duration::from_secs(1)).await;

    let asked = Instant::now();
    let (open, dropped) = (active(&relay), relay.metric("kuberelay_service_dropped_total", &[]));
    println!(
        "{:.2} % of a processor while {count} clients are there, {open} of them served; metrics take {:?}",
        busy * 100.0,
        asked.elapsed()
    );
    assert!(busy < 0.1, "{busy}");
    assert!(open < DESCRIPTORS / 2, "some descriptors are kept for others than clients");
    assert_eq!(dropped, 0, "nobody is turned away");
    client::ask_on(&mut served).await.expect("an open connection goes on");
    drop(clients);
    let freed = Instant::now();
    client::ask(site.service()).await.expect("clients are served again");
    println!("served again after {:?}; it accepted nobody for {:.3} s", freed.elapsed(), paused(&relay));
    assert!(freed.elapsed() < RECOVERY, "{:?}", freed.elapsed());
}

/// From the moment when descriptors are there again to the first answer, behind more than two thousand clients that have gone
/// without one. Twice as long without optimization.
const RECOVERY: Duration = Duration::from_secs(if cfg!(debug_assertions) { 2 } else { 1 });

fn paused(relay: &Program) -> f64 {
    relay.gauge(r#"kuberelay_accept_paused_seconds_total{reason="fd_limit"}"#)
}

fn active(relay: &Program) -> u64 {
    relay.metric("kuberelay_active_connections", &[])
}

/// What an ordinary user may have in pipes is soon used up by streams whose receivers are slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f36_given_more_slow_streams_than_pipes_for_an_ordinary_user_when_relayed_then_all_bytes_arrive_by_copying() {
    let site = Site::new(36);
    let descriptors = Descriptors::take().await;
    // Many times the pipes of 1 MiB that there are. A thousand are more than the kernel's own memory for TCP holds on a
    // machine of 24 GiB (net.ipv4.tcp_mem): then it is the kernel that resets one or the other.
    let streams = descriptors.fitting(if full() { 500 } else { 400 }, 2);
    let go_on = CancellationToken::new();
    let backend = tokio::spawn(pour(site.backend(1)));
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let relay = Program::start(site, manifest, as_ordinary_user).await;

    let mut receivers = JoinSet::new();
    for number in 0..streams {
        let mut stream = narrow(site.service()).await.expect("the Service answers");
        stream.write_all(&[seed(number)]).await.expect("the backend is asked");
        let go_on = go_on.clone();
        receivers.spawn(async move { (number, check(stream, seed(number), go_on).await) });
    }
    relay.until("pipes to be refused", |relay| fallbacks(relay) > 0).await;
    let stalled = async { while relay.busy(Duration::from_millis(500)).await >= 0.01 {} };
    within("all streams to be stuck, and the relay to rest", stalled).await;
    assert!(relay.gauge("kuberelay_stalled_connections") > 0.0);
    go_on.cancel();

    while let Some(received) = receivers.join_next().await {
        let (number, bytes) = received.expect("no stream is changed");
        assert_eq!(bytes.expect("a clean end"), STREAM_BYTES, "stream {number}");
    }
    println!("{streams} streams of {STREAM_BYTES} bytes, {} times no pipe", fallbacks(&relay));
    relay
        .until("all to be counted", |relay| {
            relay.metric("kuberelay_closed_total", &[r#"reason="finished""#]) == streams
        })
        .await;
    assert_eq!(relay.metric("kuberelay_downstream_bytes_total", &[]), streams * STREAM_BYTES);
    relay.until("nothing to be held", |relay| relay.gauge("kuberelay_stalled_connections") == 0.0).await;
    backend.abort();
}

/// More than what is read at once, a pipe and buffers hold.
const STREAM_BYTES: u64 = 4 << 20;
/// What is read at once: enough for the relay to see that it is bulk.
const FAST_BYTES: u64 = 1 << 20;

fn fallbacks(relay: &Program) -> u64 {
    relay.metric("kuberelay_splice_fallbacks_total", &[])
}

/// Somebody whose pipes are counted. Whoever runs the tests without being root is that already.
fn as_ordinary_user(command: &mut Command) {
    const NOBODY: u32 = 65_534;
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
}

/// A connection whose receiving side takes little at a time.
async fn narrow(service: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(BLOCK_BYTES as u32)?;
    within("a connection", socket.connect(service)).await
}

/// A backend that sends each client the stream which its first byte names.
async fn pour(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let mut streams = JoinSet::new();
    loop {
        let (mut stream, _) = listener.accept().await?;
        streams.spawn(async move {
            let seed = stream.read_u8().await?;
            for first in (0..STREAM_BYTES / BLOCK_BYTES).step_by(BLOCKS_AT_ONCE) {
                let blocks: Vec<_> = (first..).take(BLOCKS_AT_ONCE).map(|block| content(seed, block)).collect();
                stream.write_all(&blocks.concat()).await?;
            }
            stream.shutdown().await
        });
    }
}

/// Reads to the end, with a pause until it is told to go on, and compares.
async fn check(mut stream: TcpStream, seed: u8, go_on: CancellationToken) -> io::Result<u64> {
    let (mut block, mut received) = (vec![0; BLOCK_BYTES as usize], 0);
    while received < STREAM_BYTES {
        if received == FAST_BYTES {
            go_on.cancelled().await;
        }
        within("more of the stream", stream.read_exact(&mut block)).await?;
        assert!(
            block == content(seed, received / BLOCK_BYTES),
            "changed within the {BLOCK_BYTES} bytes from {received}"
        );
        received += BLOCK_BYTES;
    }
    assert_eq!(within("the end", stream.read(&mut [0])).await?, 0, "more than was sent");
    Ok(received)
}

/// What is compared at once.
const BLOCK_BYTES: u64 = 64 * 1024;
/// What is written at once, in blocks: more than the relay reads at once, so that it sees bulk however busy the machine is.
const BLOCKS_AT_ONCE: usize = 4;

fn seed(number: u64) -> u8 {
    (number % 251) as u8
}

/// A part of a stream that is like no other part, and like no part of a stream of another seed.
fn content(seed: u8, block: u64) -> &'static [u8] {
    static NOISE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut random = StdRng::seed_from_u64(36);
        std::iter::repeat_with(|| random.random()).take(2 * BLOCK_BYTES as usize).collect()
    });
    let from = usize::from(seed) * 251 + block as usize % 251;
    &NOISE[from..from + BLOCK_BYTES as usize]
}
