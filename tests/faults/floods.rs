//! More datagrams than a link takes, and from more sources than there is room for.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use kube_relay::serve::udp::flow_limit_of_host;
use socket2::SockRef;

use crate::rig::{Namespace, full, skip};
use crate::seen;
use crate::spoofed;
use crate::stage::{PODS, Relay, Stage, until};

const DATAGRAM_BYTES: usize = 1_200;
/// How long an answer may take that is not lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// The queue to the backend is long, and the socket's buffer fills first; or it is short, and the kernel drops.
pub(crate) fn queue_is_full() {
    const BURST: u64 = 5_000;
    for (queue, told) in [("10mb", true), ("6kb", false)] {
        let stage = Stage::build();
        let backend = Echo::start(stage.pod(0), stage.backend(0, Family::V4));
        let relay = stage.relay(&[backend.address], &[]);
        let mut caller = Caller::new(stage.client(), stage.service(Family::V4));
        assert!(caller.ask(), "the backend answers");
        // The cable to a pod is named after the pod, in its node.
        let slow = ["qdisc", "replace", "dev", stage.pod(0).name(), "root", "tbf", "rate", "40mbit", "burst", "4kb"];
        if let Err(reason) = tc(stage.node(), &[&slow[..], &["limit", queue]].concat()) {
            return skip("tc", &reason);
        }

        for _ in 0..BURST {
            caller.socket.send(&[0; DATAGRAM_BYTES]).expect("the client's own link is fast");
        }
        let sent = || relay.metric("kuberelay_datagrams_total", &[r#"direction="upstream""#]);
        until("all to be sent or counted as lost", || (sent() + relay.dropped(None) == BURST + 1).then_some(()));

        let dropped = relay.dropped(Some("memory"));
        println!("queue of {queue}: {} left, {dropped} were dropped, {} arrived", sent(), backend.received());
        assert_eq!((dropped > 0, relay.dropped(None)), (told, dropped));
        if told {
            until("all that left to arrive", || (backend.received() == sent()).then_some(()));
        } else {
            assert!(backend.received() < sent(), "the queue is too long");
        }
        // The link is as slow as before, but nobody else is on it.
        until("an answer on the same flow", || caller.ask().then_some(()));
        assert_eq!(relay.metric("kuberelay_flows_total", &[]), 1);
        assert_eq!(backend.sources(), 1, "the flow has kept its port");
    }
}

/// `tc` inside a namespace, or why it does not do it.
fn tc(inside: &Namespace, arguments: &[&str]) -> Result<(), String> {
    let run = || Command::new("tc").args(arguments).output();
    match inside.run(run) {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("tc {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("tc: {error}")),
    }
}

pub(crate) fn sources_are_spoofed() {
    const CALLERS: u64 = 20;
    const BYTES_MORE: u64 = 64 << 20;
    // Beside other tests a debug build must have time to spare: what overflows its queue is lost, whoever sent it.
    let (sources, a_millisecond) = if full() { (1_000_000, 20) } else { (20_000, 10) };
    let stage = Stage::build();
    let backends: Vec<_> =
        (0..PODS).map(|number| Echo::start(stage.pod(number), stage.backend(number, Family::V4))).collect();
    let relay = stage.relay(&stage.backends(Family::V4), &[]);
    let limit = flow_limit_of_host(1) as u64;
    let over = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..CALLERS).map(|_| established(&stage, Arc::clone(&over))).collect();
    until("their flows", || (flows(&relay) == CALLERS).then_some(()));
    let before = seen::private_bytes(relay.pid());

    let begin = Instant::now();
    let service = stage.service(Family::V4);
    let flood = stage
        .client()
        .thread(move || spoofed::flood(service, sources, a_millisecond, datagram))
        .expect("a thread starts");
    let (mut most_flows, mut most_bytes) = (0, 0);
    while !flood.is_finished() {
        most_flows = most_flows.max(flows(&relay));
        most_bytes = most_bytes.max(seen::private_bytes(relay.pid()));
        thread::sleep(Duration::from_millis(100));
    }
    flood.join().expect("it does not panic").expect("all are sent");
    let took = begin.elapsed();
    over.store(true, Ordering::Relaxed);
    let (asked, lost) = callers
        .into_iter()
        .map(|caller| caller.join().expect("it does not panic"))
        .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));

    println!(
        "{sources} sources in {took:?}: {} flows begun, {most_flows} at once (limit {limit}), {} datagrams dropped, {} KiB more memory; established flows lost {lost} of {asked}",
        relay.metric("kuberelay_flows_total", &[]),
        relay.dropped(None),
        most_bytes.saturating_sub(before) / 1024,
    );
    assert!(most_flows <= limit, "{most_flows} flows, {limit} are allowed");
    assert!(most_bytes <= before + BYTES_MORE, "{before} bytes before, {most_bytes} at most");
    assert!(lost * 100 < asked, "{lost} of {asked} lost");
    if full() {
        until("only the established flows to be left", || (flows(&relay) <= CALLERS).then_some(()));
    }
    drop(backends);
}

fn flows(relay: &Relay<'_>) -> u64 {
    relay.metric("kuberelay_active_flows", &[])
}

/// A client with a flow of its own that asks 50 times a second until it is over. How often it asked, and how many
/// answers did not come.
fn established(stage: &Stage, over: Arc<AtomicBool>) -> JoinHandle<(u64, u64)> {
    let mut caller = Caller::new(stage.client(), stage.service(Family::V4));
    let asking = move || {
        let (mut asked, mut lost) = (0, 0);
        while !over.load(Ordering::Relaxed) {
            asked += 1;
            lost += u64::from(!caller.ask());
            thread::sleep(Duration::from_millis(20));
        }
        (asked, lost)
    };
    thread::spawn(asking)
}

/// A UDP datagram of no bytes, and without the checksum that it need not have.
fn datagram(source: Ipv4Addr, to: SocketAddrV4) -> [u8; 28] {
    const UDP: u8 = 17;
    const UDP_HEADER_BYTES: u16 = 8;
    const SOURCE_PORT: u16 = 5_353;
    let mut packet = [0; 28];
    spoofed::header(&mut packet, UDP, source, *to.ip());
    let datagram = &mut packet[spoofed::HEADER_BYTES..];
    datagram[0..2].copy_from_slice(&SOURCE_PORT.to_be_bytes());
    datagram[2..4].copy_from_slice(&to.port().to_be_bytes());
    datagram[4..6].copy_from_slice(&UDP_HEADER_BYTES.to_be_bytes());
    packet
}

/// A client with one socket that numbers its questions.
struct Caller {
    socket: UdpSocket,
    number: u64,
}

impl Caller {
    fn new(inside: &Namespace, service: SocketAddr) -> Self {
        let socket = inside.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).expect("a port is free");
        inside.run(|| socket.connect(service)).expect("there is a route");
        socket.set_read_timeout(Some(PATIENCE)).expect("an option");
        Self { socket, number: 0 }
    }

    /// True where the answer came in time.
    fn ask(&mut self) -> bool {
        self.number += 1;
        let question = self.number.to_be_bytes();
        let _ = self.socket.send(&question); // An error tells of an earlier one.
        let (deadline, mut answer) = (Instant::now() + PATIENCE, [0; DATAGRAM_BYTES]);
        while Instant::now() < deadline {
            match self.socket.recv(&mut answer) {
                Ok(length) if answer[..length] == question => return true,
                _ => {}
            }
        }
        false
    }
}

/// A UDP backend that gives small datagrams back, and counts. Ends when dropped.
pub(crate) struct Echo {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    received: AtomicU64,
    sources: Mutex<BTreeSet<SocketAddr>>,
    stop: AtomicBool,
}

impl Echo {
    pub(crate) fn start(inside: &Namespace, address: SocketAddr) -> Self {
        let socket = inside.run(|| UdpSocket::bind(address)).expect("the pod is ours");
        let _ = SockRef::from(&socket).set_recv_buffer_size(4 << 20); // Less will do, too.
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("an option");
        let shared = Arc::<Shared>::default();
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.serve(&socket)
        });
        Self { address, shared, thread: Some(thread) }
    }

    fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// How many sources it has met.
    fn sources(&self) -> usize {
        self.shared.sources.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Shared {
    fn serve(&self, socket: &UdpSocket) {
        let mut buffer = [0; DATAGRAM_BYTES];
        loop {
            let stops = self.stop.load(Ordering::Relaxed);
            if stops {
                socket.set_nonblocking(true).expect("an option"); // What has come is answered.
            }
            let (length, source) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(_) if stops => return,
                Err(_) => continue,
            };
            self.received.fetch_add(1, Ordering::Relaxed);
            self.sources.lock().unwrap_or_else(PoisonError::into_inner).insert(source);
            if length < DATAGRAM_BYTES {
                let _ = socket.send_to(&buffer[..length], source); // Whoever is gone needs no answer.
            }
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
