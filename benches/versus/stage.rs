//! Where everything happens: the rig, the backends in its pods, a folder for configurations, the limits found.
//!
//! Node 0 is for the proxies; node 1 with pods of its own is for in-kernel DNAT, whose connection tracking would
//! otherwise burden everybody else's packets.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kube_relay::name::Family;
use rustix::process::{Resource, Rlimit};
use tempfile::TempDir;

use crate::echo::Echo;
use crate::measure::cpus;
use crate::peers::Peer;
use crate::rig::{Namespace, Rig, Shape};
use crate::workload::{Backend, Bulk};

/// Where proxies run.
pub(crate) const PROXY_NODE: usize = 0;
/// Where the kernel forwards.
pub(crate) const DNAT_NODE: usize = 1;
/// Every listener and backend has it.
pub(crate) const PORT: u16 = 7000;
/// UDP backends whose ends join datagrams have it.
pub(crate) const TRAINS_PORT: u16 = 7001;
/// A proxied connection has two, and HAProxy reckons with half a pipe beside them.
pub(crate) const DESCRIPTORS_PER_CONNECTION: u64 = 3;
/// Addresses that the client has beside its own.
const SOURCES: u32 = 1 << 16;
/// Nothing for so long means that nothing will come.
const QUIET: Duration = Duration::from_millis(5);
/// Descriptors for everything that is not a connection.
const SPARE_DESCRIPTORS: u64 = 300;

/// The scene of all rows.
#[derive(Debug)]
pub(crate) struct Stage {
    // In this order they are dropped: backends before the namespaces that they are in.
    _backends: Vec<Backend>,
    _echoes: Vec<Echo>,
    swallowed: Arc<AtomicU64>,
    /// What the backends' bulk threads have done.
    pub(crate) bulk: Arc<Bulk>,
    /// The network.
    pub(crate) rig: Rig,
    first_source: Ipv4Addr,
    sources_taken: AtomicU32,
    folder: TempDir,
    descriptors: u64,
    congestion_control: &'static str,
}

impl Stage {
    /// Builds the rig, or its stand-in on loopback, and starts the backends.
    pub(crate) fn build(isolated: bool) -> io::Result<Self> {
        let descriptors = raise_descriptor_limit();
        let shape = Shape { nodes: 2, pods_per_node: 3, router: false };
        let rig = if isolated { Rig::build(shape)? } else { Rig::loopback(shape) };
        if isolated {
            widen(rig.client())?;
            widen(rig.node(PROXY_NODE))?;
        }
        let congestion_control = if isolated { unpaced(&rig)? } else { "the host's congestion control" };
        let bulk = Arc::new(Bulk::default());
        let pods = || [PROXY_NODE, DNAT_NODE].into_iter().flat_map(|node| rig.pods(node));
        let backends = pods().map(|pod| backend(pod, &rig, &bulk)).collect::<io::Result<_>>()?;
        let swallowed = Arc::default();
        let echoes = pods().map(|pod| Echo::start(pod, rig.families(), &swallowed)).collect::<io::Result<_>>()?;
        Ok(Self {
            _backends: backends,
            _echoes: echoes,
            swallowed,
            bulk,
            first_source: rig.many_sources()?,
            sources_taken: AtomicU32::new(0),
            rig,
            folder: TempDir::new()?,
            descriptors,
            congestion_control,
        })
    }

    /// Where the pods of a node answer.
    pub(crate) fn pods(&self, node: usize, family: Family) -> Vec<SocketAddr> {
        self.rig.pods(node).iter().map(|pod| SocketAddr::new(pod.address(family), PORT)).collect()
    }

    /// A folder that goes with the stage.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// How many of `wanted` things fit, where each takes so many descriptors of one process.
    pub(crate) fn fitting(&self, wanted: u32, descriptors_each: u64) -> u32 {
        let room = self.descriptors.saturating_sub(SPARE_DESCRIPTORS) / descriptors_each;
        wanted.min(u32::try_from(room).unwrap_or(u32::MAX))
    }

    /// Waits until no stream of the row before is alive.
    pub(crate) fn settle(&self) -> io::Result<()> {
        wait_until(Duration::from_secs(5), || Ok(self.bulk.threads() == 0))
    }

    /// An address of the client that nobody has used for long: proxies bound the flows of one address.
    pub(crate) fn next_source(&self) -> Ipv4Addr {
        let number = self.sources_taken.fetch_add(1, Ordering::Relaxed) % SOURCES;
        Ipv4Addr::from_bits(self.first_source.to_bits() + number)
    }

    /// Datagrams that asked for no answer and have reached a backend.
    pub(crate) fn swallowed(&self) -> u64 {
        self.swallowed.load(Ordering::Relaxed)
    }

    /// Waits until no datagram of the row before is under way to a backend.
    pub(crate) fn drained(&self) -> io::Result<()> {
        let mut before = None;
        wait_until(Duration::from_secs(5), || {
            std::thread::sleep(QUIET);
            let now = Some(self.swallowed());
            Ok(std::mem::replace(&mut before, now) == now)
        })
    }

    /// The lines above the table: date, machine, limits, versions.
    pub(crate) fn describe(&self, peers: &[Peer]) -> io::Result<String> {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let network = if self.rig.on_loopback() { "loopback" } else { "veth: client, node, three pods" };
        let mut lines = vec![format!(
            "{}, kernel {}, {} CPUs, {network}, {}, nofile {}",
            date(SystemTime::now()),
            kernel.trim(),
            cpus(),
            self.congestion_control,
            self.descriptors
        )];
        lines.extend(peers.iter().map(|peer| format!("{}: {}", peer.kind, peer.describe())));
        Ok(lines.join("\n") + "\n")
    }
}

/// Sets a congestion control that does not pace, and says which.
///
/// Under BBR, some hosts' default, streams stop at 4 GB/s where they reach 8, and proxies differ by its timers more
/// than by their own work. Cubic is what nodes have; where a user namespace may not choose it, Reno always can be.
fn unpaced(rig: &Rig) -> io::Result<&'static str> {
    let set = |name| rig.parts().try_for_each(|part| part.sysctl("net/ipv4/tcp_congestion_control", name));
    set("cubic").map(|()| "cubic").or_else(|_| set("reno").map(|()| "reno"))
}

/// Source ports for a connection rate that uses up the default range within seconds.
fn widen(namespace: &Namespace) -> io::Result<()> {
    namespace.sysctl("net/ipv4/ip_local_port_range", "10000 65535")?;
    namespace.sysctl("net/ipv4/tcp_tw_reuse", "1")
}

fn backend(pod: &Namespace, rig: &Rig, bulk: &Arc<Bulk>) -> io::Result<Backend> {
    let listen: Vec<_> = rig.families().iter().map(|family| SocketAddr::new(pod.address(*family), PORT)).collect();
    Backend::start(pod, &listen, bulk)
}

/// Raises the soft limit to the hard one, for us and our children.
fn raise_descriptor_limit() -> u64 {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(1 << 20)
}

/// Waits for a condition that no descriptor tells of.
pub(crate) fn wait_until(patience: Duration, mut condition: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    while !condition()? {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The first line that a program prints when asked for its version.
pub(crate) fn version(program: &Path, flag: &str) -> String {
    let Ok(output) = Command::new(program).arg(flag).output() else { return "version unknown".into() };
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().next().unwrap_or("version unknown").to_owned()
}

/// The UTC date, as 2026-01-31.
fn date(now: SystemTime) -> String {
    let mut day = now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() / 86_400);
    let mut year = 1970;
    while day >= days_of(year) {
        day -= days_of(year);
        year += 1;
    }
    let february = days_of(year) - 337;
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", day + 1)
}

fn days_of(year: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    365 + u64::from(leap)
}
