//! What relaying a stream costs: bulk, ping-pong and short connections over loopback, directly and through the relay.
//!
//! ```text
//! cargo bench --bench relay
//! ```
//!
//! The relay is the real program in a process of its own, so that its CPU (schedstat of all its threads) is told from
//! that of client and backend. Rounds of the two ways are interleaved; printed are medians, and the spread of the rate.
//! Loopback is for finding the way; claims are made over veth, against peers, in `versus`.

use std::error::Error;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(600);
/// A fixed number in each round: as many ports wait in TIME_WAIT afterwards.
const CONNECTIONS: u64 = 1_500;
const MESSAGE_BYTES: usize = 64;
const BLOCK_BYTES: usize = 128 * 1024;
const READY_WITHIN: Duration = Duration::from_secs(10);

/// A kind of traffic, and what one unit of it is.
#[derive(Clone, Copy)]
enum Work {
    /// The backend sends as much as it can. Unit: GB.
    Bulk,
    /// One connection, one message outstanding. Unit: exchange.
    PingPong,
    /// Open, one exchange, close. Unit: connection.
    Short,
}

impl Work {
    const ALL: [Self; 3] = [Self::Bulk, Self::PingPong, Self::Short];

    fn name(self) -> &'static str {
        match self {
            Self::Bulk => "bulk down, 1 stream (GB)",
            Self::PingPong => "ping-pong 64 B, 1 connection (exchanges)",
            Self::Short => "open, 64 B, close (connections)",
        }
    }

    /// Does it for one round; says how many units that were.
    fn run(self, service: SocketAddr) -> io::Result<f64> {
        match self {
            Self::Bulk => download(service),
            Self::PingPong => {
                let (mut stream, began, mut exchanges) = (open(service)?, Instant::now(), 0.0);
                while began.elapsed() < ROUND {
                    exchange(&mut stream)?;
                    exchanges += 1.0;
                }
                Ok(exchanges)
            }
            Self::Short => {
                (0..CONNECTIONS).try_for_each(|_| exchange(&mut open(service)?))?;
                Ok(CONNECTIONS as f64)
            }
        }
    }
}

/// One round of one way.
struct Outcome {
    units_per_second: f64,
    cpu_us_per_unit: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let backend = start_backend()?;
    let relay = Relay::start(backend)?;
    for work in Work::ALL.into_iter().filter(|work| work.name().contains(&wanted)) {
        let mut rounds = [const { Vec::new() }; 2];
        for _ in 0..ROUNDS {
            rounds[0].push(measure(work, backend, None)?);
            rounds[1].push(measure(work, relay.service, Some(&relay))?);
        }
        let [direct, relayed] = &mut rounds;
        let baseline = report(work, "direct", direct, None);
        report(work, "kube-relay", relayed, Some(baseline));
    }
    Ok(())
}

fn measure(work: Work, service: SocketAddr, relay: Option<&Relay>) -> io::Result<Outcome> {
    let cpu = || relay.map_or(Duration::ZERO, Relay::cpu);
    let (cpu_before, began) = (cpu(), Instant::now());
    let units = work.run(service)?;
    let elapsed = began.elapsed();
    let spent = cpu() - cpu_before;
    Ok(Outcome { units_per_second: units / elapsed.as_secs_f64(), cpu_us_per_unit: spent.as_secs_f64() * 1e6 / units })
}

/// Prints medians; gives the rate back.
fn report(work: Work, way: &str, rounds: &mut [Outcome], baseline: Option<f64>) -> f64 {
    rounds.sort_by(|a, b| a.cpu_us_per_unit.total_cmp(&b.cpu_us_per_unit));
    let cpu = rounds[rounds.len() / 2].cpu_us_per_unit;
    rounds.sort_by(|a, b| a.units_per_second.total_cmp(&b.units_per_second));
    let rate = rounds[rounds.len() / 2].units_per_second;
    let spread = (rounds[rounds.len() - 1].units_per_second - rounds[0].units_per_second) / rate;
    let of_direct = rate / baseline.unwrap_or(rate);
    println!(
        r#"{{"work": {:?}, "way": {way:?}, "per_second": {rate:.2}, "of_direct": {of_direct:.2}, "spread": {spread:.2}, "relay_cpu_us_each": {cpu:.2}}}"#,
        work.name()
    );
    rate
}

fn open(service: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(service)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    let mut message = [b'A'; MESSAGE_BYTES];
    stream.write_all(&message)?;
    stream.read_exact(&mut message)
}

fn download(service: SocketAddr) -> io::Result<f64> {
    let mut stream = open(service)?;
    stream.write_all(&[b'D'; MESSAGE_BYTES])?;
    let (mut block, mut bytes, began) = (vec![0; 8 * BLOCK_BYTES], 0, Instant::now());
    while began.elapsed() < ROUND {
        bytes += stream.read(&mut block)?;
    }
    Ok(bytes as f64 / 1e9)
}

/// Answers each message with the same, or a `D` with all that the connection takes.
fn start_backend() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream)); // Its end is the client's: errors say no more than that.
        }
    });
    Ok(address)
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE_BYTES];
    loop {
        stream.read_exact(&mut message)?;
        if message[0] != b'D' {
            stream.write_all(&message)?;
            continue;
        }
        let block = vec![0; BLOCK_BYTES];
        loop {
            stream.write_all(&block)?;
        }
    }
}

/// The program with one Service, until it is dropped.
struct Relay {
    process: Child,
    service: SocketAddr,
}

impl Relay {
    fn start(backend: SocketAddr) -> Result<Self, Box<dyn Error>> {
        let service = SocketAddr::from(([127, 97, 255, 1], 7700));
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        command.args(["run", "-f", "-", "--metrics-bind-address", "none", "--healthz-bind-address", "none"]);
        let process = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let mut relay = Self { process, service };
        let mut input = relay.process.stdin.take().ok_or("standard input is piped")?;
        input.write_all(manifest(service, backend).as_bytes())?;
        drop(input);
        let began = Instant::now();
        while open(service).and_then(|mut stream| exchange(&mut stream)).is_err() {
            if began.elapsed() > READY_WITHIN {
                return Err(format!("nobody answers at {service}").into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(relay)
    }

    /// Run time of all its threads.
    fn cpu(&self) -> Duration {
        let threads = fs::read_dir(format!("/proc/{}/task", self.process.id())).into_iter().flatten().flatten();
        let times = threads.filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok());
        Duration::from_nanos(times.filter_map(|times| times.split_whitespace().next()?.parse::<u64>().ok()).sum())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.process.kill(); // gone already: fine
        let _ = self.process.wait();
    }
}

fn manifest(service: SocketAddr, backend: SocketAddr) -> String {
    format!(
        r#"{{"apiVersion": "v1", "kind": "List", "items": [
            {{"apiVersion": "v1", "kind": "Service", "metadata": {{"name": "web"}},
              "spec": {{"clusterIP": "{}", "ports": [{{"port": {}}}]}}}},
            {{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
              "metadata": {{"name": "web-1", "labels": {{"kubernetes.io/service-name": "web"}}}},
              "ports": [{{"port": {}}}], "endpoints": [{{"addresses": ["{}"]}}]}}]}}"#,
        service.ip(),
        service.port(),
        backend.port(),
        backend.ip(),
    )
}
