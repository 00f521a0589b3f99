//! The rows of the table: what is done, what is measured, and what kube-relay is held to.
//!
//! How it is done is in `load` and `scale`, how it is judged and printed in `report`.

use kube_relay::name::Family;

use crate::peers::PeerKind;

/// One row.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Name for `--only` and the JSON lines.
    pub(crate) id: String,
    /// What happens.
    pub(crate) work: Work,
    /// IPv4 or IPv6.
    pub(crate) family: Family,
    /// What kube-relay is held to.
    pub(crate) targets: Vec<Target>,
}

/// What happens in a row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// Load for a while.
    Traffic(Workload),
    /// So many connections that do nothing.
    Idle(u32),
    /// So many Services configured.
    Services(u32),
}

/// Load of one kind.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Workload {
    /// Streams that move as much as they can.
    Bulk { direction: Direction, streams: usize },
    /// Open, 64 bytes there and back, close; so many at a time.
    ShortConnections { at_a_time: usize },
    /// 64 bytes there and back, over and over, on so many connections.
    PingPong { connections: usize },
}

/// Seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Down,
    Up,
    Both,
}

/// What is measured; the unit of work is a GB (10^9 bytes), a connection or a request, as the row has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Metric {
    /// Units per second.
    Rate,
    /// Run time of all the proxy's threads per unit, in seconds.
    ProxyCpu,
    /// Busy time of all CPUs per unit, in seconds.
    AllCpu,
    /// Median of the time that one unit takes, in seconds.
    LatencyMedian,
    /// 99th percentile of it.
    LatencyP99,
    /// Private memory per connection, in bytes.
    ConnectionMemory,
    /// From exec until every port answers, in seconds.
    StartUp,
    /// Run time per second with nothing to do, in seconds.
    IdleCpu,
    /// Private memory (RssAnon), in bytes.
    UserMemory,
    /// Resident memory (VmRSS), in bytes.
    ResidentMemory,
}

impl Metric {
    /// All of them, in the order of the JSON lines.
    pub(crate) const ALL: [Self; 10] = [
        Self::Rate,
        Self::ProxyCpu,
        Self::AllCpu,
        Self::LatencyMedian,
        Self::LatencyP99,
        Self::ConnectionMemory,
        Self::StartUp,
        Self::IdleCpu,
        Self::UserMemory,
        Self::ResidentMemory,
    ];

    /// The field of the JSON lines: its unit is the last word.
    pub(crate) fn field(self) -> &'static str {
        match self {
            Self::Rate => "units_per_second",
            Self::ProxyCpu => "proxy_cpu_per_unit_seconds",
            Self::AllCpu => "all_cpu_per_unit_seconds",
            Self::LatencyMedian => "latency_p50_seconds",
            Self::LatencyP99 => "latency_p99_seconds",
            Self::ConnectionMemory => "memory_per_connection_bytes",
            Self::StartUp => "start_up_seconds",
            Self::IdleCpu => "idle_cpu_per_second_seconds",
            Self::UserMemory => "user_memory_bytes",
            Self::ResidentMemory => "resident_memory_bytes",
        }
    }
}

/// What one measure of a row is held to.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Which measure.
    pub(crate) metric: Metric,
    /// What it is compared with.
    pub(crate) against: Against,
    /// On which side of the limit it is met.
    pub(crate) side: Side,
    /// The limit: a ratio, or the metric's own unit.
    pub(crate) limit: f64,
    /// What we would be proud of.
    pub(crate) goal: Option<f64>,
}

/// What a measure is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Against {
    /// The better one of these peers, by its median.
    Best(&'static [PeerKind]),
    /// Nobody: the figure stands for itself.
    Nobody,
}

/// On which side of its limit a target is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    AtMost,
    AtLeast,
}

const HAPROXY: &[PeerKind] = &[PeerKind::Haproxy];
const HAPROXY_BEST: &[PeerKind] = &[PeerKind::HaproxyBest];
const NGINX: &[PeerKind] = &[PeerKind::Nginx];
const NFT: &[PeerKind] = &[PeerKind::Nft];
/// As shipped: what forces splice for bulk costs 20–30 % here.
const HAPROXY_OR_NGINX: &[PeerKind] = &[PeerKind::Haproxy, PeerKind::Nginx];

/// The rows for TCP.
pub(crate) fn tcp() -> Vec<Row> {
    let mut rows: Vec<Row> = [Direction::Down, Direction::Up, Direction::Both]
        .into_iter()
        .flat_map(|direction| [1, 4].map(|streams| bulk(direction, streams)))
        .collect();
    rows.push(untargeted("bulk-down-4-v6", Workload::Bulk { direction: Direction::Down, streams: 4 }, Family::V6));
    rows.push(short_connections());
    rows.push(ping_pong_alone());
    rows.push(ping_pong_crowd());
    rows.push(untargeted("ping-64-v6", Workload::PingPong { connections: 64 }, Family::V6));
    rows.push(idle());
    rows.extend([1, 100, 1_000, 10_000].map(services));
    rows
}

fn bulk(direction: Direction, streams: usize) -> Row {
    let mut targets = Vec::new();
    if direction != Direction::Up {
        targets.push(at_most(Metric::ProxyCpu, HAPROXY, 0.15));
        targets.push(at_most(Metric::ProxyCpu, HAPROXY_BEST, 1.05).goal(0.95));
    }
    if streams == 4 {
        targets.push(at_least(Metric::Rate, HAPROXY, 3.5));
        targets.push(at_least(Metric::Rate, HAPROXY_BEST, 0.95));
        targets.push(at_least(Metric::Rate, NFT, 0.75).goal(0.85));
    }
    let word = match direction {
        Direction::Down => "down",
        Direction::Up => "up",
        Direction::Both => "both",
    };
    traffic(&format!("bulk-{word}-{streams}"), Workload::Bulk { direction, streams }, targets)
}

fn short_connections() -> Row {
    let targets = vec![at_most(Metric::ProxyCpu, HAPROXY_OR_NGINX, 1.00).goal(0.93)];
    traffic("connections-64", Workload::ShortConnections { at_a_time: 64 }, targets)
}

fn ping_pong_alone() -> Row {
    let targets = vec![at_most(Metric::ProxyCpu, HAPROXY, 0.90), at_most(Metric::ProxyCpu, NGINX, 1.05).goal(0.90)];
    traffic("ping-1", Workload::PingPong { connections: 1 }, targets)
}

fn ping_pong_crowd() -> Row {
    let targets = vec![
        at_most(Metric::ProxyCpu, HAPROXY_OR_NGINX, 1.00).goal(0.95),
        at_least(Metric::Rate, HAPROXY_OR_NGINX, 0.97),
    ];
    traffic("ping-64", Workload::PingPong { connections: 64 }, targets)
}

fn idle() -> Row {
    let targets = vec![absolute(Metric::ConnectionMemory, 1.6 * 1024.0).goal(1.2 * 1024.0)];
    Row { id: "idle-5000".into(), work: Work::Idle(5_000), family: Family::V4, targets }
}

fn services(count: u32) -> Row {
    // Idle is not quite nothing: a runtime's timer tick. A thousandth of a CPU is taken for zero.
    let targets = match count {
        10_000 => {
            vec![absolute(Metric::StartUp, 0.5), absolute(Metric::IdleCpu, 0.001), absolute(Metric::UserMemory, 30e6)]
        }
        _ => Vec::new(),
    };
    Row { id: format!("services-{count}"), work: Work::Services(count), family: Family::V4, targets }
}

fn traffic(id: &str, workload: Workload, targets: Vec<Target>) -> Row {
    Row { id: id.into(), work: Work::Traffic(workload), family: Family::V4, targets }
}

fn untargeted(id: &str, workload: Workload, family: Family) -> Row {
    Row { family, ..traffic(id, workload, Vec::new()) }
}

fn at_most(metric: Metric, peers: &'static [PeerKind], limit: f64) -> Target {
    Target { metric, against: Against::Best(peers), side: Side::AtMost, limit, goal: None }
}

fn at_least(metric: Metric, peers: &'static [PeerKind], limit: f64) -> Target {
    Target { metric, against: Against::Best(peers), side: Side::AtLeast, limit, goal: None }
}

fn absolute(metric: Metric, limit: f64) -> Target {
    Target { metric, against: Against::Nobody, side: Side::AtMost, limit, goal: None }
}

impl Target {
    fn goal(self, goal: f64) -> Self {
        Self { goal: Some(goal), ..self }
    }
}
