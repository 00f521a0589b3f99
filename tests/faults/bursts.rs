//! Short connections at a high rate, and what there is of source ports.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use socket2::SockRef;

use crate::rig::{FAMILIES, Namespace, full};
use crate::seen;
use crate::stage::{PODS, Stage, until};
use crate::workload::{Ask, Backend, Bulk, MESSAGE_BYTES};

/// Short connections, each opened when its time has come.
const A_SECOND: u32 = 2_000;
const SECONDS: u32 = 60;
const SHORT_SECONDS: u32 = 1;
/// Threads of the client. Each has one connection at a time: as many as these may be slow at once.
const AT_ONCE: u32 = 32;

/// Longer than any of the steps in which a backend is reached.
const PATIENCE: Duration = Duration::from_secs(10);

/// The client closes first, so that each connection leaves a port of the node in TIME_WAIT: 40,000 for each backend in the
/// long form, where one address has 28,232, and the kernel searches ever longer for a free one: the rate falls to half. So
/// the long form is for four addresses, of which each has 10,000 towards each backend.
pub(crate) fn none_fails() {
    for (sources, seconds) in [(1, SHORT_SECONDS), (4, if full() { SECONDS } else { SHORT_SECONDS })] {
        let count = A_SECOND * seconds;
        let stage = Stage::build();
        let _backends = backends(&stage);
        stage.give_client_ports();
        let relay = stage.relay(&stage.backends(Family::V4), &upstream_sources(&stage, sources));

        let burst = Burst::run(stage.client(), stage.service(Family::V4), count, A_SECOND);

        let waiting = time_wait(stage.node());
        println!("{sources} source addresses: {burst}; TIME_WAIT on the node: {waiting} ({} %)", waiting * 100 / count);
        let failed = relay.metric("kuberelay_connect_failures_total", &[]);
        assert_eq!((burst.failures, failed, relay.dropped(None)), (Vec::new(), 0, 0));
        let closed = || relay.metric("kuberelay_closed_total", &[r#"reason="finished""#]);
        until("all to be counted", || (closed() == u64::from(count)).then_some(()));
        for backend in stage.backends(Family::V4) {
            let label = format!(r#"backend="{backend}""#);
            let share = u64::from(count / u32::from(PODS));
            assert!((share..=share + 1).contains(&relay.metric("kuberelay_connections_total", &[&label])), "{backend}");
        }
    }
}

/// Flags for so many addresses of the node; none for one, which the kernel chooses.
fn upstream_sources(stage: &Stage, count: u8) -> Vec<String> {
    const FIRST: u8 = 100;
    let numbers = if count > 1 { FIRST..FIRST + count } else { 0..0 };
    let address = |number| stage.rig.vip(0, number).expect("the address is added").v4;
    numbers.map(|number| format!("--upstream-source={}", address(number))).collect()
}

/// All ports to all backends are in use, and clients come all the same.
pub(crate) fn ports_of_each_backend_are_used() {
    const PORTS: u32 = 100;
    const LATE: u32 = 100;
    const LATE_A_SECOND: u32 = 50;
    let stage = Stage::build();
    let _backends = backends(&stage);
    let range = format!("40000 {}", 40000 + PORTS - 1);
    stage.node().sysctl("net/ipv4/ip_local_port_range", &range).expect("the namespace is ours");
    let relay = stage.relay(&stage.backends(Family::V4), &[]);

    let service = stage.service(Family::V4);
    let ask = || stage.client().run(|| exchange(service));
    let mut open: Vec<_> = (0..PORTS * u32::from(PODS)).map(|_| ask().expect("there is a port")).collect();
    let before = (seen::run_time(relay.pid()), Instant::now());
    let late = Burst::of(stage.client(), LATE, LATE_A_SECOND, move || match exchange(service) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        other => Err(io::Error::other(format!("there is no port: {other:?}"))),
    });
    let busy = (seen::run_time(relay.pid()) - before.0).as_secs_f64() / before.1.elapsed().as_secs_f64();

    assert_eq!(late.failures, Vec::<String>::new(), "all are reset");
    assert_eq!([Some("local_ports"), None].map(|reason| relay.dropped(reason)), [u64::from(LATE); 2]);
    assert_eq!(relay.metric("kuberelay_ejections_total", &[]), 0, "no backend is at fault");
    let said = stage.said(stage.node());
    assert_eq!(said.matches("local_ports").count(), 1, "once a minute: {said}");
    message(&mut open[0]).expect("an open connection goes on");
    // Who resets leaves no TIME_WAIT behind: the port serves the next client at once.
    let reset = open.pop().expect("many are open");
    SockRef::from(&reset).set_linger(Some(Duration::ZERO)).expect("an option");
    drop(reset);
    let freed = Instant::now();
    until("its port to be free", || ask().ok());

    println!(
        "{} connections over {PORTS} ports; {LATE} more were reset, the slowest after {:?}, for {:.1} % of a processor; \
         served again {:?} after a port was free",
        open.len() + 1,
        late.percentile(100),
        busy * 100.0,
        freed.elapsed(),
    );
    assert!(freed.elapsed() < Duration::from_secs(1), "{:?}", freed.elapsed());
    if cfg!(debug_assertions) {
        println!("times are judged in release builds alone");
        return;
    }
    assert!(late.percentile(100) < Duration::from_millis(50), "after {:?}", late.percentile(100));
    assert!(busy < 0.1, "{busy}");
}

/// A backend in each pod, at both its addresses.
pub(crate) fn backends(stage: &Stage) -> Vec<Backend> {
    let (bulk, numbers) = (Arc::new(Bulk::default()), 0..PODS);
    let start = |number| {
        let addresses = FAMILIES.map(|family| stage.backend(number, family));
        Backend::start(stage.pod(number), &addresses, &bulk).expect("a backend starts")
    };
    numbers.map(start).collect()
}

/// What became of many short connections.
pub(crate) struct Burst {
    count: u32,
    /// Why some have got no answer, each with its number.
    pub(crate) failures: Vec<String>,
    took: Duration,
    /// How long each had to wait for its answer, the slowest last.
    times: Vec<Duration>,
}

impl Burst {
    /// Opens one after the other at an even rate, so many a second, however long each takes.
    pub(crate) fn run(client: &Namespace, service: SocketAddr, count: u32, a_second: u32) -> Self {
        Self::of(client, count, a_second, move || exchange(service).map(drop))
    }

    /// The same for anything else that a client does.
    pub(crate) fn of<E>(client: &Namespace, count: u32, a_second: u32, exchange: E) -> Self
    where
        E: Fn() -> io::Result<()> + Copy + Send + 'static,
    {
        let (next, begin) = (Arc::new(AtomicU32::new(0)), Instant::now());
        let work = move |next: Arc<AtomicU32>| {
            let (mut failures, mut times) = (Vec::new(), Vec::new());
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return (failures, times);
                }
                thread::sleep(
                    (begin + Duration::from_secs(1) * number / a_second).saturating_duration_since(Instant::now()),
                );
                let start = Instant::now();
                if let Err(error) = exchange() {
                    failures.push(format!("{number}: {error}"));
                }
                times.push(start.elapsed());
            }
        };
        let start = |_| {
            client
                .thread({
                    let next = Arc::clone(&next);
                    move || work(next)
                })
                .expect("a thread starts")
        };
        let threads: Vec<_> = (0..AT_ONCE).map(start).collect();
        let mut burst = Self { count, failures: Vec::new(), took: Duration::ZERO, times: Vec::new() };
        for thread in threads {
            let (failures, times) = thread.join().expect("a client does not panic");
            burst.failures.extend(failures);
            burst.times.extend(times);
        }
        burst.took = begin.elapsed();
        burst.times.sort_unstable();
        burst
    }

    /// So many of a hundred waited no longer.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        self.times.get(self.times.len().saturating_sub(1) * percent / 100).copied().unwrap_or_default()
    }
}

impl std::fmt::Display for Burst {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = f64::from(self.count) / self.took.as_secs_f64();
        write!(
            f,
            "{} connections, {rate:.0}/s, {} failed, p99 {:?}, the slowest took {:?}",
            self.count,
            self.failures.len(),
            self.percentile(99),
            self.percentile(100),
        )
    }
}

/// Opens a connection and asks once.
pub(crate) fn exchange(service: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&service, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    message(&mut stream)?;
    Ok(stream)
}

/// Asks once on a connection.
pub(crate) fn message(stream: &mut TcpStream) -> io::Result<()> {
    ask(stream)?;
    answer(stream)
}

/// The question alone.
pub(crate) fn ask(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(&[Ask::Answer.byte(); MESSAGE_BYTES])
}

/// Waits for the answer.
pub(crate) fn answer(stream: &mut TcpStream) -> io::Result<()> {
    stream.read_exact(&mut [0; MESSAGE_BYTES])
}

/// Connections in TIME_WAIT in a namespace.
fn time_wait(inside: &Namespace) -> u32 {
    let text = inside.run(|| fs::read_to_string("/proc/thread-self/net/sockstat")).expect("procfs");
    let tcp = text.lines().find(|line| line.starts_with("TCP:")).expect("a line for TCP");
    let mut words = tcp.split_whitespace().skip_while(|word| *word != "tw").skip(1);
    words.next().and_then(|count| count.parse().ok()).expect("a number behind it")
}
