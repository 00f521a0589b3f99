//! The rows of the table: what is done, what is measured, and what kube-relay is held to.
//!
//! How it is done is in `load`, `datagrams` and `scale`, how it is judged and printed in `report`.

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
    /// Datagrams for a while.
    Datagrams(Datagrams),
    /// So many UDP flows, or as many as the machine's limits allow.
    Flows(u32),
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

/// Load of datagrams of one size over some flows, each of which is a client's socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagrams {
    /// Payload of each.
    pub(crate) bytes: usize,
    /// How many flows.
    pub(crate) flows: usize,
    /// When they are sent.
    pub(crate) pattern: Pattern,
}

/// When datagrams are sent, and what becomes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// What comes back is sent again, with so many outstanding over all flows.
    Window(usize),
    /// The same between ends which join datagrams themselves (UDP_SEGMENT, UDP_GRO), as QUIC does.
    Trains(usize),
    /// So many a second, one by one; each comes back.
    Paced(u32),
    /// The highest rate at which nearly all come back, searched for.
    LossFree,
    /// As many as the sender can; none comes back.
    OneWay,
}

/// Seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Down,
    Up,
    Both,
}

/// What is measured; the unit of work is a GB (10^9 bytes), a connection, a request, an exchange of datagrams or a
/// delivered datagram, as the row has it.
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
    /// Datagrams that did not arrive, of all that were sent (0..=1).
    Lost,
    /// Private memory per connection, in bytes.
    ConnectionMemory,
    /// Private memory per UDP flow, in bytes.
    FlowMemory,
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
    pub(crate) const ALL: [Self; 12] = [
        Self::Rate,
        Self::ProxyCpu,
        Self::AllCpu,
        Self::LatencyMedian,
        Self::LatencyP99,
        Self::Lost,
        Self::ConnectionMemory,
        Self::FlowMemory,
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
            Self::Lost => "lost_share",
            Self::ConnectionMemory => "memory_per_connection_bytes",
            Self::FlowMemory => "memory_per_flow_bytes",
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

/// The rows for UDP.
pub(crate) fn udp() -> Vec<Row> {
    let mut rows: Vec<Row> = [64, 1200]
        .into_iter()
        .flat_map(|bytes| [1, 64, 1000].map(|flows| window(bytes, flows, WINDOW.max(flows))))
        .collect();
    rows.push(window(64, 64, 64));
    rows.push(trains());
    rows.push(paced());
    for (bytes, flows, outstanding) in [(64, 64, WINDOW), (1200, 64, WINDOW), (64, 64, 64)] {
        let v4 = window(bytes, flows, outstanding);
        rows.push(Row { id: format!("{}-v6", v4.id), family: Family::V6, targets: Vec::new(), ..v4 });
    }
    rows.extend([64, 1200].map(loss_free));
    rows.push(flood());
    rows.push(flows());
    rows
}

/// Datagrams outstanding over all flows, where there are not more flows.
const WINDOW: usize = 256;

fn window(bytes: usize, flows: usize, outstanding: usize) -> Row {
    let [rate, cpu] = [Metric::Rate, Metric::ProxyCpu];
    let targets = match (bytes, flows, outstanding) {
        (64, 1, _) => vec![at_least(rate, NGINX, 1.6), at_most(cpu, NGINX, 0.35)],
        (64, 64, 64) => vec![at_least(rate, NGINX, 1.15), at_most(cpu, NGINX, 0.80).goal(0.65)],
        (64, 64, _) => vec![at_least(rate, NGINX, 1.3), at_most(cpu, NGINX, 0.55)],
        (64, 1000, _) => {
            vec![at_least(rate, NGINX, 1.1), at_most(cpu, NGINX, 0.80).goal(0.65), absolute(Metric::Lost, 0.0)]
        }
        _ => Vec::new(),
    };
    let id = if flows == outstanding && flows < WINDOW { "one-each" } else { "window" };
    datagrams(&format!("{id}-{bytes}-{flows}"), bytes, flows, Pattern::Window(outstanding), targets)
}

fn trains() -> Row {
    let targets = vec![at_least(Metric::Rate, NGINX, 10.0), at_most(Metric::ProxyCpu, NGINX, 0.10)];
    datagrams("trains-1200-16", 1200, 16, Pattern::Trains(512), targets)
}

fn paced() -> Row {
    let targets = vec![at_most(Metric::ProxyCpu, NGINX, 1.00).goal(0.85), absolute(Metric::Lost, 0.0)];
    datagrams("paced-64-16", 64, 16, Pattern::Paced(20_000), targets)
}

fn loss_free(bytes: usize) -> Row {
    let targets = vec![at_least(Metric::Rate, NGINX, 1.8), at_least(Metric::Rate, NFT, 0.80)];
    datagrams(&format!("lossfree-{bytes}-16"), bytes, 16, Pattern::LossFree, targets)
}

fn flood() -> Row {
    let targets = vec![
        at_least(Metric::Rate, NGINX, 2.0),
        at_least(Metric::Rate, NFT, 1.0),
        at_most(Metric::ProxyCpu, NGINX, 0.40),
    ];
    datagrams("flood-64-16", 64, 16, Pattern::OneWay, targets)
}

fn flows() -> Row {
    let targets = vec![absolute(Metric::FlowMemory, 1024.0)];
    Row { id: "flows-16000".into(), work: Work::Flows(16_000), family: Family::V4, targets }
}

fn datagrams(id: &str, bytes: usize, flows: usize, pattern: Pattern, targets: Vec<Target>) -> Row {
    Row { id: id.into(), work: Work::Datagrams(Datagrams { bytes, flows, pattern }), family: Family::V4, targets }
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
