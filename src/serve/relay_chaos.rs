//! Seeded peers that write, read, pause, half-close and reset as they please, on both sides of a relay.
//!
//! The law that each connection is held to: what arrives is what was sent, in order; a clean end comes after all of
//! it; and where nobody reset, all of it comes. Where the relay has something to say before the client, that comes first.
//! `KUBE_RELAY_SEED=n` replays one connection, as far as the kernel's timing
//! lets it; `KUBE_RELAY_TEST=full` has ten times as many.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt, stream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use crate::serve::balancer::Backend;
use crate::serve::limits::LimitOptions;
use crate::serve::proxy_header::Preface;
use crate::serve::relay::Connection;
use crate::serve::scripted::{LOOPBACK, on_worker, pair, registered, reset, soon, spawn};
use crate::stats::{CloseReason, Entry};

const CONNECTIONS: u64 = 1_000;
const AT_ONCE: usize = 16;
const HALF_CLOSE_TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn given_peers_that_do_as_they_please_when_relayed_then_no_byte_is_lost_and_no_truncation_looks_complete() {
    on_worker(async {
        let replay = std::env::var("KUBE_RELAY_SEED").ok().and_then(|seed| seed.parse().ok());
        let full = std::env::var("KUBE_RELAY_TEST").is_ok_and(|value| value == "full");
        let connections = if full { 10 * CONNECTIONS } else { CONNECTIONS };
        let seeds = replay.map_or(0..connections, |seed: u64| seed..seed + 1);
        stream::iter(seeds)
            .for_each_concurrent(AT_ONCE, async |seed| {
                let outcome = AssertUnwindSafe(exchange(seed)).catch_unwind().await;
                assert!(outcome.is_ok(), "failed: replay with KUBE_RELAY_SEED={seed}");
            })
            .await;
    });
}

/// What one peer will do.
struct Part {
    random: StdRng,
    /// What it has to say, as a place in the noise and a length.
    from: usize,
    length: usize,
    /// It writes and reads this much at once, or less.
    chunk: usize,
    /// Resets after so much of its own was written.
    resets_after: Option<usize>,
}

/// What became of it.
struct Outcome {
    /// It has reset, or was met by a reset while it wrote.
    cut: bool,
    received: Result<usize, usize>,
}

impl Part {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let length = match random.random_range(0..20) {
            0 => 0,
            1..11 => random.random_range(1..4_000),
            11..16 => random.random_range(4_000..200_000),
            _ => random.random_range(200_000..3_000_000),
        };
        let smallest = (length / 200).max(1); // A writer of single bytes does not have megabytes to say.
        let chunk = match random.random_range(0..3) {
            0 => smallest,
            1 => random.random_range(smallest..smallest + 20_000),
            _ => 256 * 1024,
        };
        let resets_after = random.random_bool(0.1).then(|| random.random_range(0..=length));
        Self { from: random.random_range(0..NOISE_PERIOD), length, chunk, resets_after, random }
    }

    fn said(&self) -> (usize, usize) {
        (self.from, self.length)
    }

    /// What arrives where so many bytes of the noise come before it.
    fn said_after(&self, before: usize) -> (usize, usize) {
        ((self.from + NOISE_PERIOD - before) % NOISE_PERIOD, before + self.length)
    }

    /// Plays the part against a peer that has so much to say.
    async fn play(mut self, mut stream: TcpStream, expected: (usize, usize)) -> Outcome {
        let mut reader = Self { random: StdRng::seed_from_u64(self.random.random()), ..self };
        let resets = self.resets_after.is_some();
        let (read, write) = stream.split();
        let (cut, received) = if resets {
            // Its reading ends when it resets, wherever that is.
            let cut = self.write(write).await;
            (cut, Err(0))
        } else {
            tokio::join!(self.write(write), reader.read(read, expected))
        };
        if resets {
            reset(stream);
        }
        Outcome { cut: cut || resets, received }
    }

    /// True where it was met by a reset.
    async fn write(&mut self, mut write: WriteHalf<'_>) -> bool {
        let end = self.resets_after.unwrap_or(self.length);
        let mut written = 0;
        while written < end {
            let count = self.random.random_range(1..=self.chunk).min(end - written);
            if soon(write.write_all(noise(self.from + written, count))).await.is_err() {
                return true;
            }
            written += count;
            self.pause().await;
        }
        self.resets_after.is_none() && write.shutdown().await.is_err()
    }

    /// How much came before the end of stream, or before the reset.
    async fn read(&mut self, mut read: ReadHalf<'_>, (from, length): (usize, usize)) -> Result<usize, usize> {
        let mut buffer = vec![0; self.chunk.max(length / 200)]; // Nobody reads megabytes by single bytes.
        let mut received = 0;
        loop {
            match soon(read.read(&mut buffer)).await {
                Ok(0) => return Ok(received),
                Ok(count) => {
                    assert!(received + count <= length, "more than was sent");
                    assert!(buffer[..count] == *noise(from + received, count), "changed at {received}");
                    received += count;
                }
                Err(_) => return Err(received),
            }
            self.pause().await;
        }
    }

    async fn pause(&mut self) {
        match self.random.random_range(0..100) {
            0 => tokio::time::sleep(Duration::from_micros(self.random.random_range(0..3_000))).await,
            1..20 => tokio::task::yield_now().await,
            _ => {}
        }
    }
}

async fn exchange(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let [client, server] = [Part::new(random.random()), Part::new(random.random())];
    let cancelled = random.random_bool(0.03).then(|| Duration::from_micros(random.random_range(0..5_000)));
    let before = if random.random_bool(0.5) { random.random_range(1..=107) } else { 0 };
    let (said, answered) = (client.said_after(before), server.said());
    let (at_client, downstream) = pair().await;
    let (at_server, upstream) = pair().await;
    let backend = Arc::new(Backend::new(1, SocketAddr::from((LOOPBACK, 80))));

    if random.random_bool(0.2) {
        let _ = SockRef::from(&upstream).set_send_buffer_size(4_096); // First bytes that go out in parts.
    }
    let (downstream, upstream) = (registered(downstream), registered(upstream));
    let mut connection = Connection::open(downstream, upstream, backend, Entry::ClusterIp);
    connection.begin_with((before > 0).then(|| Box::new(Preface::any(noise(said.0, before)))));
    let relay = spawn(async move {
        let limits = LimitOptions { half_close_timeout: HALF_CLOSE_TIMEOUT, ..LimitOptions::default() };
        let relayed = connection.relay(&limits);
        tokio::time::timeout(cancelled.unwrap_or(Duration::MAX), relayed).await.ok().flatten()
    });
    let (client, server) = tokio::join!(client.play(at_client, answered), server.play(at_server, said));
    let reason = soon(relay).await;

    let parts = [(&client, answered.1, server.cut), (&server, said.1, client.cut)];
    for (part, expected, other_cut) in parts.into_iter().filter(|(part, ..)| !part.cut) {
        match part.received {
            Ok(received) => assert_eq!(received, expected, "an end of stream before its time"),
            Err(_) => assert!(other_cut || reason.is_none(), "a reset out of nowhere"),
        }
    }
    if !client.cut && !server.cut && cancelled.is_none() {
        assert!(matches!(reason, Some(CloseReason::Finished | CloseReason::ClientAbort)), "{reason:?}");
    }
}

const NOISE_PERIOD: usize = 1_000_003;

/// A stretch of a stream that looks different wherever it is shifted to.
fn noise(from: usize, count: usize) -> &'static [u8] {
    static NOISE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut random = StdRng::seed_from_u64(0);
        let period: Vec<u8> = std::iter::repeat_with(|| random.random()).take(NOISE_PERIOD).collect();
        period.iter().copied().cycle().take(2 * NOISE_PERIOD).collect()
    });
    let from = from % NOISE_PERIOD;
    &NOISE[from..from + count]
}
