//! What relaying datagrams costs: an echo through one shard over loopback, in one process, with and without joining
//! datagrams (UDP_GRO, UDP_SEGMENT). The baseline beside it is the echo without a relay.
//!
//! Rounds of the three ways are interleaved; printed are medians, and the spread of the rate. CPU is the shard
//! thread's own (schedstat), per datagram that it forwarded: two for each exchange. Loopback is for finding the way;
//! claims are made over veth, against peers, in `versus`.

use std::error::Error;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use kube_relay::name::{BalancerKey, Family, ListenKey, ObjectName, Protocol, Scope, ServicePortName};
use kube_relay::plan::UdpSettings;
use kube_relay::serve::Target;
use kube_relay::serve::balancer::{Backend, Balancer, PortState, Table};
use kube_relay::serve::flow::IdleTimes;
use kube_relay::serve::mmsg::{BATCH, Batch, Place, To, connect_udp, receive_trains};
use kube_relay::serve::udp::{UdpOptions, UdpShards, bind_udp};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(600);
const WARM_UP: Duration = Duration::from_millis(100);
/// Without any answer for so long, what is outstanding is lost.
const STALL: Duration = Duration::from_millis(150);

/// A kind of traffic.
struct Work {
    name: &'static str,
    bytes: usize,
    flows: usize,
    /// Datagrams outstanding, over all flows.
    window: usize,
    /// True where the ends themselves join datagrams, as QUIC does.
    ends_join: bool,
}

const WORKS: [Work; 6] = [
    Work { name: "64 B, 1 flow, window 256", bytes: 64, flows: 1, window: 256, ends_join: false },
    Work { name: "64 B, 64 flows, window 256", bytes: 64, flows: 64, window: 256, ends_join: false },
    Work { name: "64 B, 64 flows, one each", bytes: 64, flows: 64, window: 64, ends_join: false },
    Work { name: "64 B, 1,000 flows, one each", bytes: 64, flows: 1000, window: 1000, ends_join: false },
    Work { name: "1,200 B, 16 flows, window 256", bytes: 1200, flows: 16, window: 256, ends_join: false },
    Work { name: "1,200 B, 16 flows, ends join", bytes: 1200, flows: 16, window: 512, ends_join: true },
];

/// One round of one way.
struct Outcome {
    exchanges_per_second: f64,
    cpu_us: f64,
    lost: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    for work in WORKS.iter().filter(|work| work.name.contains(&wanted)) {
        compare(work)?;
    }
    if wanted.is_empty() || wanted == "memory" {
        measure_memory()?;
    }
    Ok(())
}

fn compare(work: &Work) -> Result<(), Box<dyn Error>> {
    let echo = Echo::start(work.ends_join)?;
    let relays = [Relay::start(echo.address, false)?, Relay::start(echo.address, true)?];
    let mut rounds = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        rounds[0].push(run(work, echo.address, None)?);
        for (relay, rounds) in relays.iter().zip(&mut rounds[1..]) {
            rounds.push(run(work, relay.address, Some(relay))?);
        }
    }
    println!("{}", work.name);
    let [direct, off, on] = &mut rounds;
    let rate = median(direct, |outcome| outcome.exchanges_per_second);
    report(work, "direct", direct, rate);
    report(work, "joining off", off, rate);
    report(work, "joining on", on, rate);
    Ok(())
}

fn report(work: &Work, way: &str, rounds: &mut [Outcome], direct: f64) {
    let rate = median(rounds, |outcome| outcome.exchanges_per_second);
    let spread = (rounds[rounds.len() - 1].exchanges_per_second - rounds[0].exchanges_per_second) / rate;
    let cpu = median(rounds, |outcome| outcome.cpu_us);
    let lost: u64 = rounds.iter().map(|outcome| outcome.lost).sum();
    let share = rate / direct;
    println!(
        r#"{{"work": {:?}, "way": {way:?}, "exchanges_per_second": {rate:.0}, "of_direct": {share:.2}, "spread": {spread:.2}, "cpu_us_per_datagram": {cpu:.2}, "lost": {lost}}}"#,
        work.name
    );
}

fn median(rounds: &mut [Outcome], figure: impl Fn(&Outcome) -> f64) -> f64 {
    rounds.sort_by(|a, b| figure(a).total_cmp(&figure(b)));
    figure(&rounds[rounds.len() / 2])
}

/// Plays the clients: keeps the window full, and counts what comes back.
fn run(work: &Work, service: SocketAddr, relay: Option<&Relay>) -> io::Result<Outcome> {
    let mut clients = Clients::connect(work, service)?;
    clients.exchange(WARM_UP)?;
    let (lost_before, cpu_before, began) = (clients.lost, cpu_of(relay), Instant::now());
    let exchanges = clients.exchange(ROUND)?;
    let (cpu, elapsed) = (cpu_of(relay) - cpu_before, began.elapsed());
    Ok(Outcome {
        exchanges_per_second: exchanges as f64 / elapsed.as_secs_f64(),
        cpu_us: cpu.as_secs_f64() * 1e6 / (2 * exchanges).max(1) as f64,
        lost: clients.lost - lost_before,
    })
}

fn cpu_of(relay: Option<&Relay>) -> Duration {
    let Some(relay) = relay else { return Duration::ZERO };
    let text = fs::read_to_string(format!("/proc/self/task/{}/schedstat", relay.thread)).unwrap_or_default();
    Duration::from_nanos(text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0))
}

/// One socket for each flow. What comes back is sent again.
struct Clients<'a> {
    work: &'a Work,
    sockets: Vec<UdpSocket>,
    outstanding: Vec<usize>,
    epoll: OwnedFd,
    batch: Batch,
    lost: u64,
}

impl<'a> Clients<'a> {
    fn connect(work: &'a Work, service: SocketAddr) -> io::Result<Self> {
        let sockets = (0..work.flows).map(|_| connect_udp(service)).collect::<io::Result<Vec<_>>>()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (number, socket) in sockets.iter().enumerate() {
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&epoll, socket, data, epoll::EventFlags::IN)?;
            if work.ends_join {
                receive_trains(socket)?;
            }
        }
        let outstanding = vec![0; work.flows];
        Ok(Self { work, sockets, outstanding, epoll, batch: batch_of(work.ends_join), lost: 0 })
    }

    fn exchange(&mut self, time: Duration) -> io::Result<u64> {
        self.fill()?;
        let (end, mut exchanges) = (Instant::now() + time, 0);
        let mut events = Vec::with_capacity(256);
        let stall = Timespec { tv_sec: 0, tv_nsec: STALL.as_nanos() as i64 };
        while Instant::now() < end {
            events.clear();
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&stall))?;
            if events.is_empty() {
                self.lost += self.outstanding.iter().sum::<usize>() as u64;
                self.outstanding.fill(0);
                self.fill()?;
            }
            for event in &events {
                exchanges += self.bounce(event.data.u64() as usize) as u64;
            }
        }
        Ok(exchanges)
    }

    fn fill(&mut self) -> io::Result<()> {
        let payload = vec![7; self.work.bytes];
        for (socket, outstanding) in self.sockets.iter().zip(&mut self.outstanding) {
            while *outstanding < self.work.window / self.work.flows {
                socket.send(&payload)?;
                *outstanding += 1;
            }
        }
        Ok(())
    }

    fn bounce(&mut self, number: usize) -> usize {
        let socket = &self.sockets[number];
        let Ok(received) = self.batch.receive(socket.as_fd(), BATCH) else { return 0 };
        let count = (0..received).map(|slot| self.batch.datagrams(slot)).sum();
        send_back(&mut self.batch, socket, To::Connected);
        count
    }
}

fn batch_of(joins: bool) -> Batch {
    if joins { Batch::default() } else { Batch::without_joining() }
}

/// Sends all that a batch holds, and empties it. What the kernel will not take is lost.
fn send_back(batch: &mut Batch, socket: &UdpSocket, to: To) {
    let slots: [u8; BATCH] = std::array::from_fn(|slot| slot as u8);
    let slots = &slots[..batch.count()];
    let mut at = Place::default();
    while at.position < slots.len() {
        at = batch.send(socket.as_fd(), slots, at, to).unwrap_or_else(|unsent| unsent.end);
    }
    batch.clear();
}

/// The backend: gives everything back.
struct Echo {
    address: SocketAddr,
    ends: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Echo {
    fn start(joins: bool) -> io::Result<Self> {
        let socket = bind_udp((Ipv4Addr::LOCALHOST, 0).into())?;
        if joins {
            receive_trains(&socket)?;
        }
        let (address, ends) = (socket.local_addr()?, Arc::new(AtomicBool::new(false)));
        let thread = thread::spawn({
            let ends = Arc::clone(&ends);
            move || {
                let mut batch = batch_of(joins);
                let look = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                while !ends.load(Ordering::Relaxed) {
                    if batch.receive(socket.as_fd(), BATCH).is_ok() {
                        send_back(&mut batch, &socket, To::Peers);
                    } else {
                        let _ = poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&look));
                    }
                }
            }
        });
        Ok(Self { address, ends, thread: Some(thread) })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One Service on one shard.
struct Relay {
    address: SocketAddr,
    thread: u64,
    backend: Arc<Backend>,
    _shards: UdpShards,
}

impl Relay {
    fn start(backend: SocketAddr, offload: bool) -> io::Result<Self> {
        static RELAYS: AtomicU64 = AtomicU64::new(0);
        let number = RELAYS.fetch_add(1, Ordering::Relaxed) as u8;
        let idle = IdleTimes { unreplied: Duration::from_secs(60), ..IdleTimes::default() };
        let options = UdpOptions { idle, flow_limit: 65_536, shards_per_listener: NonZeroU16::MIN, offload };
        let before = threads()?;
        let shards = UdpShards::start(1, options)?;
        let thread = threads()?.into_iter().find(|thread| !before.contains(thread)).ok_or(io::ErrorKind::NotFound)?;
        let name = ServicePortName::new(ObjectName::parse("echo"), "udp", Protocol::Udp);
        let port = Arc::new(PortState::new(name.clone()));
        let backend = Arc::new(Backend::new(1, backend));
        let key = BalancerKey { port: name, family: Family::V4, scope: Scope::Cluster };
        let table = Table::new(vec![Arc::clone(&backend)].into(), &[]);
        let target = Target::serving(&Arc::new(Balancer::new(key, port, table)));
        let address = SocketAddr::from(([127, 30, 0, number], 5300));
        let key = ListenKey::new(address.ip(), address.port(), Protocol::Udp);
        shards.open(key, Arc::new(ArcSwap::from_pointee(target)), &UdpSettings::default())?;
        shards.flush();
        Ok(Self { address, thread, backend, _shards: shards })
    }
}

fn threads() -> io::Result<Vec<u64>> {
    let names = fs::read_dir("/proc/self/task")?.flatten().map(|entry| entry.file_name());
    Ok(names.filter_map(|name| name.to_str()?.parse().ok()).collect())
}

/// What a flow takes of this process's memory: as many one-way senders as descriptors and ports allow.
fn measure_memory() -> Result<(), Box<dyn Error>> {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1024);
    let flows = files.saturating_sub(200).min(20_000);
    let silent = bind_udp((Ipv4Addr::LOCALHOST, 0).into())?;
    let relay = Relay::start(silent.local_addr()?, true)?;
    let mut batch = Batch::default();
    let before = resident_bytes()?;
    for flow in 0..flows {
        let source = UdpSocket::bind((Ipv4Addr::from(0x7f1f_0000 + flow as u32), 0))?;
        source.send_to(b"hello", relay.address)?;
        while flow - relay.backend.stats.active_flows.get().min(flow) > 32 {
            thread::yield_now(); // so that nothing is lost
        }
        while batch.receive(silent.as_fd(), BATCH).is_ok() {
            batch.clear();
        }
    }
    let (after, open) = (resident_bytes()?, relay.backend.stats.active_flows.get());
    let each = after.saturating_sub(before) / open.max(1);
    println!(r#"{{"work": "memory", "flows": {open}, "resident_bytes_per_flow": {each}}}"#);
    Ok(())
}

fn resident_bytes() -> Result<u64, Box<dyn Error>> {
    let text = fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split_whitespace().nth(1).ok_or("no second number in statm")?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}
