//! Rows about much of something: idle connections, UDP flows, and configured Services.
//!
//! Each starts a process of its own, so that nothing that ran before is in its memory.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::{Family, Protocol};

use crate::load::{Span, open};
use crate::measure::{Memory, Reading};
use crate::peers::{KUBE_RELAY, Peer, PeerKind, RELAY_FLAGS, last_words, list, service, slice, start};
use crate::report::Outcome;
use crate::rig::Process;
use crate::rows::Metric;

use crate::stage::{DESCRIPTORS_PER_CONNECTION, PORT, PROXY_NODE, Stage};
use crate::workload::{Ask, MESSAGE_BYTES};

/// How long the largest number of Services may take before we give up.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Room for connections of the row before.
const STILL_CLOSING: u32 = 100;
/// What idleness is measured over, in windows of the other rows.
const IDLE_WINDOWS: u32 = 2;

/// Private memory for each connection that has exchanged one message and does nothing now.
pub(crate) fn idle(wanted: u32, kind: PeerKind, stage: &Stage) -> io::Result<Outcome> {
    let count = stage.fitting(wanted + STILL_CLOSING, DESCRIPTORS_PER_CONNECTION) - STILL_CLOSING;
    let peer = Peer::start(kind, Protocol::Tcp, stage, kind.second_vip()).map_err(io::Error::other)?;
    let before = Memory::of(peer.pids());
    let mut streams = open(stage.rig.client(), peer.targets(Family::V4), count as usize)?;
    streams.iter_mut().try_for_each(exchange)?;
    let after = Memory::of(peer.pids());
    let grown_bytes = after.private_bytes.saturating_sub(before.private_bytes);
    let mut outcome = Outcome::at_scale(count, false);
    outcome.set(Metric::ConnectionMemory, Some(grown_bytes as f64 / f64::from(count)));
    outcome.set(Metric::UserMemory, Some(after.private_bytes as f64));
    Ok(outcome)
}

/// Private memory for each flow that has had one exchange, with as many flows as the peer takes.
pub(crate) fn flows(wanted: u32, kind: PeerKind, stage: &Stage) -> io::Result<Outcome> {
    let peer = Peer::start(kind, Protocol::Udp, stage, kind.second_vip()).map_err(io::Error::other)?;
    let target = *peer.targets(Family::V4).first().ok_or_else(|| io::Error::other("no target"))?;
    let (before, descriptors) = (Memory::of(peer.pids()), descriptors(peer.pids()));
    let flows = 0..stage.fitting(wanted, 1);
    stage.rig.client().run(|| flows.map(|_| stage.next_source()).try_for_each(|source| begin_flow(source, target)))?;
    let (after, flows) = (Memory::of(peer.pids()), self::descriptors(peer.pids()).saturating_sub(descriptors));
    let grown_bytes = after.private_bytes.saturating_sub(before.private_bytes);
    let mut outcome = Outcome::at_scale(flows, false);
    outcome.set(Metric::FlowMemory, (flows > 0).then(|| grown_bytes as f64 / f64::from(flows)));
    outcome.set(Metric::UserMemory, Some(after.private_bytes as f64));
    Ok(outcome)
}

/// One exchange of a client that goes away: the proxy does not know. A flow that is not answered is one, too.
fn begin_flow(source: Ipv4Addr, target: SocketAddr) -> io::Result<()> {
    let client = UdpSocket::bind((source, 0))?;
    client.connect(target)?;
    client.set_read_timeout(Some(Duration::from_millis(200)))?;
    client.send(&[Ask::Answer.byte(); MESSAGE_BYTES])?;
    let _ = client.recv(&mut [0; MESSAGE_BYTES]);
    Ok(())
}

/// Open descriptors of some processes: each flow has one.
fn descriptors(pids: &[u32]) -> u32 {
    let open = |pid: &u32| fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    pids.iter().map(open).sum::<usize>() as u32
}

fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(&[Ask::Answer.byte(); MESSAGE_BYTES])?;
    stream.read_exact(&mut [0; MESSAGE_BYTES])
}

/// Start-up, idleness and memory of kube-relay with Services that have a TCP and a UDP port each.
pub(crate) fn services(wanted: u32, stage: &Stage, span: Span) -> io::Result<Outcome> {
    let count = stage.fitting(wanted, 2);
    let file = stage.folder().join(format!("services-{count}.json"));
    if !file.exists() {
        fs::write(&file, manifest(count, &stage.pods(PROXY_NODE, Family::V4)))?;
    }
    let log = file.with_extension("log");
    let mut command = Command::new(KUBE_RELAY);
    command.args(["run", "-f"]).arg(&file).args(RELAY_FLAGS);

    let node = stage.rig.node(PROXY_NODE);
    let wanted = node.run(in_use)? + 2 * count;
    let started = Instant::now();
    let mut relay = start(command, node, &log)?;
    let start_up = node.run(|| all_bound(&mut relay, count, wanted, started, &log))?;

    thread::sleep(span.warm_up);
    let pids = relay.pids();
    let before = Reading::take(&pids);
    thread::sleep(span.window * IDLE_WINDOWS);
    let cost = Reading::take(&pids).since(&before);
    let memory = Memory::of(&pids);
    let mut outcome = Outcome::at_scale(count, cost.is_disturbed());
    outcome.set(Metric::StartUp, Some(start_up.as_secs_f64()));
    outcome.set(Metric::IdleCpu, Some(cost.proxy.as_secs_f64() / cost.elapsed.as_secs_f64()));
    outcome.set(Metric::UserMemory, Some(memory.private_bytes as f64));
    outcome.set(Metric::ResidentMemory, Some(memory.resident_bytes as f64));
    Ok(outcome)
}

/// Waits until all Services' sockets are bound, in the calling thread's namespace and at little cost to who binds them:
/// the kernel's counts are read at once, its tables only to see that the counts were of these sockets.
fn all_bound(relay: &mut Process, count: u32, wanted: u32, since: Instant, log: &Path) -> io::Result<Duration> {
    let last = SocketAddr::new(cluster_ip(count - 1).into(), PORT);
    let mut start_up = Duration::ZERO;
    while start_up.is_zero() || bound()? < 2 * count {
        if let Some(status) = relay.ended()? {
            return Err(io::Error::other(format!("{status}: {}", last_words(log))));
        }
        if since.elapsed() > START_PATIENCE {
            return Err(io::Error::other(format!("{} of {} sockets bound; {}", bound()?, 2 * count, last_words(log))));
        }
        thread::sleep(Duration::from_millis(1));
        if start_up.is_zero() && in_use()? >= wanted && TcpStream::connect(last).is_ok() {
            start_up = since.elapsed();
        }
    }
    Ok(start_up)
}

/// Services with a TCP and a UDP port, each on a loopback address of its own.
fn manifest(count: u32, backends: &[SocketAddr]) -> String {
    const PORTS: [(Protocol, u16); 2] = [(Protocol::Tcp, PORT), (Protocol::Udp, PORT)];
    let objects = (0..count).flat_map(|number| {
        let name = format!("s{number:05}");
        [service(&name, &[cluster_ip(number).into()], &PORTS), slice(&name, backends, &PORTS)]
    });
    list(objects.collect())
}

fn cluster_ip(number: u32) -> Ipv4Addr {
    let [_, _, high, low] = number.to_be_bytes();
    Ipv4Addr::new(127, 97, high, low)
}

/// How many sockets there are of TCP, those of TIME_WAIT aside, and of UDP, in the calling thread's namespace.
fn in_use() -> io::Result<u32> {
    let text = fs::read_to_string("/proc/thread-self/net/sockstat")?;
    let of = |line: &str| -> Option<u32> {
        let words = line.strip_prefix("TCP: inuse ").or_else(|| line.strip_prefix("UDP: inuse "))?;
        words.split_whitespace().next()?.parse().ok()
    };
    Ok(text.lines().filter_map(of).sum())
}

/// How many sockets of the Services there are, in the calling thread's namespace: listening ones and UDP.
fn bound() -> io::Result<u32> {
    let port = format!("617F:{PORT:04X}"); // 127.97.x.y, as the kernel prints it on little-endian machines
    let mut count = 0;
    for (table, state) in [("tcp", "0A"), ("udp", "07")] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
        for line in text.lines() {
            let mut words = line.split_whitespace().skip(1);
            let is_ours = words.next().is_some_and(|local| local.ends_with(&port));
            count += u32::from(is_ours && words.nth(1) == Some(state));
        }
    }
    Ok(count)
}
