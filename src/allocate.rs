//! Addresses and node ports for Services that name none, as an API server would give them.
//!
//! Pure: the same Services give the same numbers in `check`, in `run` and after a restart, whatever the
//! order of files. A number follows from the name by FNV-1a; where it is taken, the next free one is used,
//! in the order of names. Numbers that manifests write are reserved first, and the lower part of each
//! range, where people pick theirs, is used last: so writing one seldom moves another.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::findings::parse_ip;
use crate::model::{ClusterIps, Service, ServiceKind};
use crate::name::{Family, ObjectName, Protocol};
use crate::plan::{Problem, Severity};

/// Where allocated numbers come from. Owned by the static source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// From `--service-cluster-ip-range` (default `127.96.0.0/16`).
    pub cluster_ips: ClusterIpRange,
    /// From `--service-node-port-range` (default `30000-32767`).
    pub node_ports: NodePortRange,
}

/// Addresses for Services without `clusterIP`; `none` gives them none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterIpRange(pub Option<IpNet>);

impl Default for ClusterIpRange {
    /// Loopback addresses: they are local on each machine, without a route and without root.
    fn default() -> Self {
        Self(IpNet::new(IpAddr::V4(Ipv4Addr::new(127, 96, 0, 0)), 16).ok())
    }
}

/// Numbers for ports without `nodePort`, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodePortRange {
    /// The lowest (1..=65535).
    pub first: u16,
    /// The highest, not below the lowest.
    pub last: u16,
}

impl Default for NodePortRange {
    fn default() -> Self {
        Self { first: 30_000, last: 32_767 }
    }
}

/// Text that is no range.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// For cluster IPs.
    #[error("{0:?} is not a range of addresses; write one like 127.96.0.0/16, or none")]
    ClusterIps(String),
    /// For node ports.
    #[error("{0:?} is not a range of ports; write one like 30000-32767")]
    NodePorts(String),
}

impl FromStr for ClusterIpRange {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        if text.trim().eq_ignore_ascii_case("none") {
            return Ok(Self(None));
        }
        let wrong = || RangeError::ClusterIps(text.to_owned());
        let (ip, bits) = text.trim().split_once('/').ok_or_else(wrong)?;
        let ip = parse_ip(ip).ok_or_else(wrong)?;
        let bits = bits.parse().map_err(|_| wrong())?;
        let range = IpNet::new(ip, bits).map_err(|_| wrong())?.trunc();
        let usable = !range.addr().is_multicast() && range.prefix_len() > 0;
        usable.then_some(Self(Some(range))).ok_or_else(wrong)
    }
}

impl fmt::Display for ClusterIpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(range) => range.fmt(f),
            None => f.write_str("none"),
        }
    }
}

impl FromStr for NodePortRange {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let wrong = || RangeError::NodePorts(text.to_owned());
        let (first, last) = text.trim().split_once('-').ok_or_else(wrong)?;
        let first = first.trim().parse().map_err(|_| wrong())?;
        let last = last.trim().parse().map_err(|_| wrong())?;
        (first > 0 && first <= last).then_some(Self { first, last }).ok_or_else(wrong)
    }
}

impl fmt::Display for NodePortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Gives each Service what it wants and does not name, and tells where that was not possible.
pub fn fill(services: &mut [Arc<Service>], ranges: &Ranges) -> Vec<Problem> {
    let mut by_name: Vec<&mut Arc<Service>> = services.iter_mut().collect();
    by_name.sort_by(|a, b| a.name.cmp(&b.name));
    let mut problems = Vec::new();
    if let Some(range) = ranges.cluster_ips.0 {
        fill_cluster_ips(&mut by_name, range, &mut problems);
    }
    fill_node_ports(&mut by_name, ranges.node_ports, &mut problems);
    problems
}

fn fill_cluster_ips(services: &mut [&mut Arc<Service>], range: IpNet, problems: &mut Vec<Problem>) {
    let family = Family::of(range.addr());
    let mut pool = Pool::of_addresses(range);
    let mut taken: BTreeSet<IpAddr> = services.iter().flat_map(|service| written(service)).collect();
    for service in services.iter_mut().filter(|service| wants_address(service)) {
        if !service.families.is_empty() && !service.families.contains(&family) {
            let text = format!(
                "spec.ipFamilies: no cluster IP, as --service-cluster-ip-range {range} is {family}; write spec.clusterIP or choose a range of the other family"
            );
            problems.push(problem(&service.name, Severity::Note, "family", text));
            continue;
        }
        let hash = fnv1a(&[service.name.namespace.as_bytes(), service.name.name.as_bytes()]);
        let free = pool.probe(hash).map(|offset| address(range, offset)).find(|ip| taken.insert(*ip));
        match free {
            Some(ip) => {
                let cluster_ips = ClusterIps::Addresses { addresses: vec![ip], allocated: true };
                Arc::make_mut(service).cluster_ips = cluster_ips;
            }
            None => {
                pool = Pool::EMPTY;
                let text = format!(
                    "no cluster IP, as --service-cluster-ip-range {range} is used up; choose a larger one or write spec.clusterIP"
                );
                problems.push(problem(&service.name, Severity::Error, "unallocated", text));
            }
        }
    }
}

fn wants_address(service: &Service) -> bool {
    service.cluster_ips == ClusterIps::Unset && service.kind != ServiceKind::ExternalName
}

/// The addresses that a Service's manifest claims.
fn written(service: &Service) -> Vec<IpAddr> {
    let mut all = match &service.cluster_ips {
        ClusterIps::Addresses { addresses, .. } => addresses.clone(),
        ClusterIps::Unset | ClusterIps::Headless => Vec::new(),
    };
    all.extend(&service.external_ips);
    all.extend(&service.load_balancer_ips);
    all
}

fn address(range: IpNet, offset: u128) -> IpAddr {
    match range.network() {
        // An offset of a pool is below the size of the range.
        IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() | offset as u32).into(),
        IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() | offset).into(),
    }
}

fn fill_node_ports(services: &mut [&mut Arc<Service>], range: NodePortRange, problems: &mut Vec<Problem>) {
    let mut pool = Pool::of_ports(range);
    let mut taken = BTreeSet::new();
    for service in services.iter() {
        for (index, number) in service.ports.iter().enumerate().filter_map(|(i, port)| Some((i, port.node_port?))) {
            taken.insert((number, service.ports[index].protocol));
            if !(range.first..=range.last).contains(&number) {
                let text = format!(
                    "spec.ports[{index}].nodePort: {number} is outside --service-node-port-range {range}; it is served, an API server would refuse it"
                );
                problems.push(problem(&service.name, Severity::Note, "outside_range", text));
            }
        }
        taken.extend(service.health_check_node_port.map(|number| (number, Protocol::Tcp)));
    }
    for service in services.iter_mut().filter(|service| wants_node_ports(service)) {
        for index in 0..service.ports.len() {
            fill_node_port(Arc::make_mut(service), index, &mut pool, range, &mut taken, problems);
        }
    }
}

fn wants_node_ports(service: &Service) -> bool {
    let kind = match service.kind {
        ServiceKind::NodePort => true,
        ServiceKind::LoadBalancer => service.allocate_node_ports,
        ServiceKind::ClusterIp | ServiceKind::ExternalName => false,
    };
    kind && service.cluster_ips != ClusterIps::Headless && service.ports.iter().any(|port| port.node_port.is_none())
}

fn fill_node_port(
    service: &mut Service,
    index: usize,
    pool: &mut Pool,
    range: NodePortRange,
    taken: &mut BTreeSet<(u16, Protocol)>,
    problems: &mut Vec<Problem>,
) {
    let port = &service.ports[index];
    if port.node_port.is_some() {
        return;
    }
    let (protocol, number) = (port.protocol, port.port);
    // Clients expect TCP and UDP of one port, as of DNS, on one node port.
    let sibling = service.ports.iter().filter(|other| other.port == number).find_map(|other| other.node_port);
    let shared = sibling.filter(|number| !taken.contains(&(*number, protocol)));
    let free = |number: &u16| {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].iter().all(|protocol| !taken.contains(&(*number, *protocol)))
    };
    let key = [service.name.namespace.as_bytes(), service.name.name.as_bytes(), &number.to_be_bytes()];
    let chosen = shared.or_else(|| pool.probe(fnv1a(&key)).map(|offset| range.first + offset as u16).find(free));
    match chosen {
        Some(number) => {
            taken.insert((number, protocol));
            let port = &mut service.ports[index];
            port.node_port = Some(number);
            port.node_port_allocated = true;
        }
        None => {
            *pool = Pool::EMPTY;
            let text = format!(
                "spec.ports[{index}]: no node port, as --service-node-port-range {range} is used up; choose a larger one or write nodePort"
            );
            problems.push(problem(&service.name, Severity::Error, "unallocated", text));
        }
    }
}

/// Offsets that may be given out: `first` up to `first + size`, the lowest `band` of them last.
#[derive(Clone, Copy, Debug)]
struct Pool {
    first: u128,
    size: u128,
    band: u128,
}

impl Pool {
    /// What a pool is replaced by once nothing is free, so that nobody looks through it again.
    const EMPTY: Self = Self { first: 0, size: 0, band: 0 };

    /// Without the first and the last address, which some stacks take for network and broadcast.
    fn of_addresses(range: IpNet) -> Self {
        let host_bits = u32::from(range.max_prefix_len() - range.prefix_len());
        let all = 1_u128.checked_shl(host_bits).unwrap_or(u128::MAX);
        let (first, size) = if all > 2 { (1, all - 2) } else { (0, all) };
        Self { first, size, band: band(size, 16, 256) }
    }

    fn of_ports(range: NodePortRange) -> Self {
        let size = u128::from(range.last) - u128::from(range.first) + 1;
        Self { first: 0, size, band: band(size, 32, 128) }
    }

    /// All offsets, from the one that the hash points at.
    fn probe(self, hash: u64) -> impl Iterator<Item = u128> {
        let upper = self.size - self.band;
        let start = if upper == 0 { 0 } else { u128::from(hash) % upper };
        let above = (0..upper).map(move |step| self.first + self.band + (start + step) % upper);
        above.chain((0..self.band).map(move |step| self.first + step))
    }
}

/// The part of a range that people pick from: as an API server reserves it.
fn band(size: u128, part: u128, most: u128) -> u128 {
    if size < 16 { 0 } else { (size / part).clamp(16, most).min(size) }
}

/// FNV-1a of 64 bits over the parts, each closed by a byte that no name contains.
///
/// Written out, as it must never change: people remember the addresses that follow from it, and relays of all versions agree
/// on the names of Events.
pub(crate) fn fnv1a(parts: &[&[u8]]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let bytes = parts.iter().flat_map(|part| part.iter().chain(&[0xff]));
    let hash = bytes.fold(OFFSET, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME));
    // The low bits of FNV are weak, and ranges are small: let the high ones count.
    hash ^ (hash >> 32)
}

fn problem(service: &ObjectName, severity: Severity, reason: &'static str, message: String) -> Problem {
    let object = format!("Service {service}");
    Problem { object, file: None, line: None, column: None, reason: reason.into(), message, severity }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::decode::{Content, decode};

    fn services(bodies: &[&str]) -> Vec<Arc<Service>> {
        let documents = bodies.iter().map(|body| {
            let (name, spec) = body.split_once(' ').expect("name and spec");
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {spec}\n")
        });
        let decoded = decode(documents.collect::<Vec<_>>().join("---\n").as_bytes(), "a.yaml");
        assert!(decoded.whole, "{:?}", decoded.problems);
        let contents = decoded.objects.into_iter().map(|entry| match entry.content {
            Content::Service(service) => service,
            Content::Slices(_) => panic!("a slice"),
        });
        contents.collect()
    }

    fn cluster_ip(service: &Service) -> Option<String> {
        service.cluster_ips.of(Family::V4).map(|ip| ip.to_string())
    }

    fn node_ports(service: &Service) -> Vec<Option<u16>> {
        service.ports.iter().map(|port| port.node_port).collect()
    }

    #[test]
    fn given_services_without_numbers_when_filled_then_they_have_the_same_for_ever() {
        let mut all = services(&["web {ports: [{port: 80}]}", "np {type: NodePort, ports: [{port: 80}]}"]);

        let problems = fill(&mut all, &Ranges::default());

        assert_eq!(problems, []);
        assert!(all[0].cluster_ips.allocated() && all[1].ports[0].node_port_allocated);
        // These numbers are in people's notes: a change here breaks them.
        assert_eq!(cluster_ip(&all[0]).as_deref(), Some("127.96.242.228"));
        assert_eq!(cluster_ip(&all[1]).as_deref(), Some("127.96.250.148"));
        assert_eq!((node_ports(&all[0]), node_ports(&all[1])), (vec![None], vec![Some(32_042)]));
    }

    #[test]
    fn t003_t004_t006_given_services_that_want_no_address_when_filled_then_they_get_none() {
        let mut all = services(&[
            "headless {clusterIP: None, type: NodePort, ports: [{port: 80}]}",
            "alias {type: ExternalName, externalName: db.example, ports: [{port: 80}]}",
            "fixed {clusterIP: 10.96.0.1, ports: [{port: 80}]}",
        ]);
        let before = all.clone();

        let problems = fill(&mut all, &Ranges::default());

        assert_eq!(problems, []);
        assert_eq!(all, before);
    }

    #[test]
    fn given_the_range_none_when_filled_then_no_address_is_given() {
        let mut all = services(&["web {ports: [{port: 80}]}"]);

        let ranges = Ranges { cluster_ips: ClusterIpRange(None), ..Ranges::default() };

        assert_eq!(fill(&mut all, &ranges), []);
        assert_eq!(all[0].cluster_ips, ClusterIps::Unset);
    }

    #[test]
    fn given_a_family_that_the_range_has_not_when_filled_then_it_is_noted() {
        let mut all = services(&[
            "six {ipFamilies: [IPv6], ports: [{port: 80}]}",
            "two {ipFamilies: [IPv6, IPv4], ports: [{port: 80}]}",
        ]);

        let problems = fill(&mut all, &Ranges::default());

        assert_eq!(problems.len(), 1);
        assert_eq!((&*problems[0].object, problems[0].severity), ("Service default/six", Severity::Note));
        assert_eq!(all[0].cluster_ips, ClusterIps::Unset);
        assert!(cluster_ip(&all[1]).is_some());
    }

    #[test]
    fn given_an_ipv6_range_when_filled_then_addresses_are_inside() {
        let mut all = services(&["a {ports: [{port: 80}]}", "b {ports: [{port: 80}]}"]);
        let range: ClusterIpRange = "fd00:96::/108".parse().expect("a range");

        fill(&mut all, &Ranges { cluster_ips: range, ..Ranges::default() });

        let net = range.0.expect("a range");
        let ips: BTreeSet<_> = all.iter().filter_map(|service| service.cluster_ips.of(Family::V6)).collect();
        assert!(ips.len() == 2 && ips.iter().all(|ip| net.contains(ip)), "{ips:?}");
    }

    #[test]
    fn given_a_load_balancer_that_wants_no_node_ports_when_filled_then_it_gets_none() {
        let mut all = services(&[
            "lb {type: LoadBalancer, ports: [{port: 80}]}",
            "bare {type: LoadBalancer, allocateLoadBalancerNodePorts: false, ports: [{port: 80}]}",
        ]);

        fill(&mut all, &Ranges::default());

        assert!(node_ports(&all[0])[0].is_some());
        assert_eq!(node_ports(&all[1]), [None]);
    }

    #[test]
    fn given_tcp_and_udp_on_one_port_when_filled_then_they_share_the_number() {
        let mut all = services(&[
            "dns {type: NodePort, ports: [{name: a, port: 53}, {name: b, port: 53, protocol: UDP}, {name: c, port: 54}]}",
            "half {type: NodePort, ports: [{name: a, port: 53, nodePort: 30053}, {name: b, port: 53, protocol: UDP}]}",
        ]);

        fill(&mut all, &Ranges::default());

        let dns = node_ports(&all[0]);
        assert!(dns[0] == dns[1] && dns[0] != dns[2], "{dns:?}");
        assert_eq!(node_ports(&all[1]), [Some(30_053); 2]);
    }

    #[test]
    fn given_a_number_that_is_written_elsewhere_when_filled_then_another_is_chosen() {
        let mut alone = services(&["web {type: NodePort, ports: [{port: 80}]}"]);
        fill(&mut alone, &Ranges::default());
        let (ip, number) = (cluster_ip(&alone[0]).expect("an address"), node_ports(&alone[0])[0].expect("a number"));
        let rival = format!("zzz {{clusterIP: {ip}, type: NodePort, ports: [{{port: 80, nodePort: {number}}}]}}");

        let mut both = services(&["web {type: NodePort, ports: [{port: 80}]}", &rival]);
        fill(&mut both, &Ranges::default());

        assert_ne!(cluster_ip(&both[0]), Some(ip.clone()));
        assert_ne!(node_ports(&both[0]), [Some(number)]);
        assert_eq!((cluster_ip(&both[1]), node_ports(&both[1])), (Some(ip), vec![Some(number)]));
    }

    #[test]
    fn given_full_ranges_when_filled_then_the_object_is_named() {
        let mut all = services(&[
            "a {type: NodePort, ports: [{port: 80}]}",
            "b {type: NodePort, ports: [{port: 80}]}",
            "c {type: NodePort, ports: [{port: 80}]}",
        ]);
        let ranges = Ranges {
            cluster_ips: "127.96.0.0/30".parse().expect("a range"),
            node_ports: "30000-30001".parse().expect("a range"),
        };

        let problems = fill(&mut all, &ranges);

        let told: Vec<_> = problems.iter().map(|problem| (&*problem.object, &*problem.reason)).collect();
        assert_eq!(told, [("Service default/c", "unallocated"); 2]);
        let ips: BTreeSet<_> = all.iter().filter_map(|service| cluster_ip(service)).collect();
        assert_eq!(ips.into_iter().collect::<Vec<_>>(), ["127.96.0.1", "127.96.0.2"]);
    }

    #[test]
    fn given_a_number_outside_the_range_when_filled_then_it_is_a_note() {
        let mut all = services(&["web {type: NodePort, ports: [{port: 80, nodePort: 8080}]}"]);

        let problems = fill(&mut all, &Ranges::default());

        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].severity, Severity::Note);
        assert!(problems[0].message.starts_with("spec.ports[0].nodePort: 8080 is outside"));
        assert_eq!(node_ports(&all[0]), [Some(8080)]);
    }

    #[test]
    fn given_text_when_parsed_as_ranges_then_wrong_ones_say_what_is_right() {
        let ip = |text: &str| text.parse::<ClusterIpRange>().map(|range| range.to_string());
        let ports = |text: &str| text.parse::<NodePortRange>().map(|range| range.to_string());

        assert_eq!(ip("127.96.7.0/16").as_deref(), Ok("127.96.0.0/16"));
        assert_eq!(ip("none").as_deref(), Ok("none"));
        assert_eq!(ClusterIpRange::default().to_string(), "127.96.0.0/16");
        for wrong in ["", "127.96.0.0", "127.96.0.0/33", "0.0.0.0/0", "224.0.0.0/8", "x/8"] {
            assert!(ip(wrong).is_err(), "{wrong}");
        }
        assert_eq!(ports("30000-32767").as_deref(), Ok("30000-32767"));
        assert_eq!(ports("8080-8080").as_deref(), Ok("8080-8080"));
        for wrong in ["", "30000", "0-10", "2-1", "1-65536", "a-b"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

        #[test]
        fn given_any_order_when_filled_then_numbers_are_the_same_and_unique(
            names in proptest::collection::btree_set("s-[a-z]{1,3}", 1..60),
            rotate in 0..60_usize,
        ) {
            let bodies: Vec<String> =
                names.iter().map(|name| format!("{name} {{type: NodePort, ports: [{{port: 80}}]}}")).collect();
            let mut one = services(&bodies.iter().map(|body| &**body).collect::<Vec<_>>());
            let mut other = one.clone();
            let middle = rotate % other.len();
            other.rotate_left(middle);
            let ranges = Ranges {
                cluster_ips: "127.96.0.0/26".parse().expect("a range"),
                node_ports: "30000-30063".parse().expect("a range"),
            };

            prop_assert_eq!(fill(&mut one, &ranges), vec![]);
            prop_assert_eq!(fill(&mut other, &ranges), vec![]);

            let ips: BTreeSet<_> = one.iter().filter_map(|service| cluster_ip(service)).collect();
            let numbers: BTreeSet<_> = one.iter().flat_map(|service| node_ports(service)).collect();
            prop_assert_eq!((ips.len(), numbers.len()), (one.len(), one.len()));
            other.sort_by(|a, b| a.name.cmp(&b.name));
            one.sort_by(|a, b| a.name.cmp(&b.name));
            prop_assert_eq!(one, other);
        }
    }
}
