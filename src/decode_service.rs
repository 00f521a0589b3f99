//! A Service as it is written, and what a proxy reads of it.
//!
//! Rules are those of the API server where a proxy depends on them. Documents, names and other kinds
//! are `decode`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::de::{IgnoredAny, MapAccess};

use crate::decode::Identity;
use crate::findings::{Findings, closest, is_name, name_rule, parse_cidr, parse_ip};
use crate::hints::Preference;
use crate::locate::At;
use crate::model::{ClusterIps, DEFAULT_AFFINITY_TIMEOUT, Service, ServiceKind, ServicePort, TrafficPolicy};
use crate::name::{Family, Protocol};
use crate::rare::Rare;
use crate::yaml::{Fields, List, Object, Scalar, fields};

/// Annotations of ours, behind `kube-relay.dev/`.
pub(crate) const ANNOTATIONS: [&str; 16] = [
    "accept-proxy",
    "affinity-ipv6-prefix",
    "allow-from",
    "balance",
    "connect-timeout",
    "connect-tries",
    "eject-after",
    "half-close-timeout",
    "idle-timeout",
    "max-connection-age",
    "max-connections",
    "proxy-protocol",
    "reset-after",
    "source-address",
    "udp-shards",
    "udp-timeout",
];

/// What [`ANNOTATIONS`] begin with.
pub(crate) const PREFIX: &str = "kube-relay.dev/";

/// Words of `spec.type`.
const KINDS: [(&str, ServiceKind); 4] = [
    ("ClusterIP", ServiceKind::ClusterIp),
    ("NodePort", ServiceKind::NodePort),
    ("LoadBalancer", ServiceKind::LoadBalancer),
    ("ExternalName", ServiceKind::ExternalName),
];

/// Words of `spec.externalTrafficPolicy` and `spec.internalTrafficPolicy`.
const POLICIES: [(&str, TrafficPolicy); 2] = [("Cluster", TrafficPolicy::Cluster), ("Local", TrafficPolicy::Local)];

/// Words of `protocol`.
pub(crate) const PROTOCOLS: [(&str, Protocol); 3] =
    [("TCP", Protocol::Tcp), ("UDP", Protocol::Udp), ("SCTP", Protocol::Sctp)];

fields!(
    /// `spec` of a Service.
    Spec {
        "type" => kind: Scalar,
        "clusterIP" => cluster_ip: Scalar,
        "clusterIPs" => cluster_ips: List<Scalar>,
        "ipFamilies" => families: List<Scalar>,
        "ports" => ports: List<Object<Port>>,
        "externalIPs" => external_ips: List<Scalar>,
        "loadBalancerSourceRanges" => source_ranges: List<Scalar>,
        "sessionAffinity" => affinity: Scalar,
        "sessionAffinityConfig" => affinity_config: Object<AffinityConfig>,
        "externalTrafficPolicy" => external_policy: Scalar,
        "internalTrafficPolicy" => internal_policy: Scalar,
        "healthCheckNodePort" => health_check_node_port: Scalar,
        "allocateLoadBalancerNodePorts" => allocate_node_ports: Scalar,
        "trafficDistribution" => traffic_distribution: Scalar,
        "selector" => selector: Object<Selector>,
        "externalName" => external_name: Scalar,
    }
    unused &[
        "ipFamily",
        "ipFamilyPolicy",
        "loadBalancerClass",
        "loadBalancerIP",
        "publishNotReadyAddresses",
        "topologyKeys",
    ]
);

fields!(Port {
    "name" => name: Scalar,
    "protocol" => protocol: Scalar,
    "port" => port: Scalar,
    "targetPort" => target_port: Scalar,
    "nodePort" => node_port: Scalar,
    "appProtocol" => app_protocol: Scalar,
} unused &[]);

fields!(AffinityConfig { "clientIP" => client_ip: Object<ClientIp>, } unused &[]);
fields!(ClientIp { "timeoutSeconds" => timeout_seconds: Scalar, } unused &[]);

fields!(
    /// `status` of a Service.
    Status { "loadBalancer" => load_balancer: Object<LoadBalancer>, } unused &["conditions"]
);
fields!(LoadBalancer { "ingress" => ingress: List<Object<Ingress>>, } unused &[]);
fields!(Ingress { "ip" => ip: Scalar, "ipMode" => ip_mode: Scalar, } unused &["hostname", "ports"]);

/// `spec.selector`: of interest is only whether it names a label.
#[derive(Debug, Default)]
pub(crate) struct Selector {
    any: bool,
}

impl Fields for Selector {
    const READ: &'static [&'static str] = &[];
    const UNUSED: &'static [&'static str] = &[];
    const FREE: bool = true;

    fn take<'de, A: MapAccess<'de>>(&mut self, _key: &str, map: &mut A) -> Result<bool, A::Error> {
        self.any = true;
        map.next_value::<IgnoredAny>()?;
        Ok(true)
    }
}

/// Reads a Service. Errors go to `found`; with any of them the result is not to be used.
pub(crate) fn service(
    found: &mut Findings,
    at: At<'_>,
    identity: Identity,
    spec: &Object<Spec>,
    status: &Object<Status>,
) -> Option<Service> {
    if matches!(spec, Object::Absent) {
        found.error(at, "spec: missing; a Service needs at least spec.ports");
    }
    let load_balancer_ips = load_balancer_ips(found, at.key("status"), status);
    let annotations = annotations(found, at, &identity);
    let at = at.key("spec");
    let spec = found.object(at, spec)?;
    let kind = found.word(at.key("type"), &spec.kind, &KINDS).unwrap_or_default();
    let cluster_ips = cluster_ips(found, at, spec);
    Some(Service {
        name: identity.name,
        created: identity.created,
        proxy_name: identity.proxy_name,
        slices_hidden: identity.headless,
        kind,
        external_name: found.text(at.key("externalName"), &spec.external_name).filter(|name| !name.is_empty()),
        families: families(found, at.key("ipFamilies"), &spec.families),
        ports: ports(found, at.key("ports"), &spec.ports, kind, cluster_ips == ClusterIps::Headless),
        cluster_ips,
        external_ips: external_ips(found, at.key("externalIPs"), &spec.external_ips),
        load_balancer_ips,
        source_ranges: source_ranges(found, at.key("loadBalancerSourceRanges"), &spec.source_ranges),
        affinity_timeout: affinity_timeout(found, at, spec),
        external_policy: found
            .word(at.key("externalTrafficPolicy"), &spec.external_policy, &POLICIES)
            .unwrap_or_default(),
        internal_policy: found
            .word(at.key("internalTrafficPolicy"), &spec.internal_policy, &POLICIES)
            .unwrap_or_default(),
        health_check_node_port: found.port_or_none(at.key("healthCheckNodePort"), &spec.health_check_node_port),
        allocate_node_ports: found
            .flag(at.key("allocateLoadBalancerNodePorts"), &spec.allocate_node_ports)
            .unwrap_or(true),
        traffic_distribution: traffic_distribution(found, at.key("trafficDistribution"), &spec.traffic_distribution),
        has_selector: found.object(at.key("selector"), &spec.selector).is_some_and(|selector| selector.any),
        annotations,
    })
}

fn annotations(found: &mut Findings, at: At<'_>, identity: &Identity) -> BTreeMap<Arc<str>, Arc<str>> {
    let at = at.key("metadata");
    let at = at.key("annotations");
    let mut ours = BTreeMap::new();
    for (key, value) in &identity.annotations {
        let known = key.strip_prefix(PREFIX).unwrap_or(key);
        if !ANNOTATIONS.contains(&known) {
            let near = closest(known, ANNOTATIONS.into_iter()).map(|near| format!("{PREFIX}{near}"));
            found.unknown(at, key, &near.as_deref().map_or(vec![], |near| vec![near]));
            continue;
        }
        if let Some(value) = found.text(at.key(key), value) {
            ours.insert(known.into(), value);
        }
    }
    ours
}

/// A cluster IP as it is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ClusterIp {
    Headless,
    Address(IpAddr),
}

fn cluster_ips(found: &mut Findings, at: At<'_>, spec: &Spec) -> ClusterIps {
    let single = cluster_ip(found, at.key("clusterIP"), &spec.cluster_ip);
    let list_at = at.key("clusterIPs");
    let mut all = Vec::new();
    for (index, value) in found.list(list_at, &spec.cluster_ips).iter().enumerate() {
        all.extend(cluster_ip(found, list_at.index(index), value));
    }
    match (single, all.first()) {
        (Some(single), None) => all.push(single),
        (Some(single), Some(first)) if single != *first => {
            found.error(list_at.index(0), "differs from spec.clusterIP; both say the same address, or leave one out");
        }
        _ => {}
    }
    if all.is_empty() {
        return ClusterIps::Unset;
    }
    if all == [ClusterIp::Headless] {
        return ClusterIps::Headless;
    }
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(all.len());
    for (index, ip) in all.iter().enumerate() {
        match ip {
            ClusterIp::Address(ip) if !addresses.iter().any(|other| Family::of(*other) == Family::of(*ip)) => {
                addresses.push(*ip);
            }
            _ => found.error(list_at.index(index), "write one IPv4 and one IPv6 address at most, or None alone"),
        }
    }
    ClusterIps::Addresses { addresses, allocated: false }
}

fn cluster_ip(found: &mut Findings, at: At<'_>, value: &Scalar) -> Option<ClusterIp> {
    let text = found.text(at, value).filter(|text| !text.is_empty())?;
    if &*text == "None" {
        return Some(ClusterIp::Headless);
    }
    match parse_ip(&text) {
        Some(ip) if can_listen(ip) => return Some(ClusterIp::Address(ip)),
        Some(_) => found.error(at, format!("{value} is not an address that can be listened on")),
        None => found.error(
            at,
            format!(
                "{value} is neither an IP address nor None, the word for a headless Service; leave it out to get one"
            ),
        ),
    }
    None
}

/// False for addresses that stand for many or none.
fn can_listen(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

fn families(found: &mut Findings, at: At<'_>, list: &List<Scalar>) -> Vec<Family> {
    let words = [("IPv4", Family::V4), ("IPv6", Family::V6)];
    let mut families = Vec::new();
    for (index, value) in found.list(at, list).iter().enumerate() {
        match found.word(at.index(index), value, &words) {
            Some(family) if families.contains(&family) => {
                found.error(at.index(index), format!("{family} is there twice"));
            }
            family => families.extend(family),
        }
    }
    families
}

fn ports(
    found: &mut Findings,
    at: At<'_>,
    list: &List<Object<Port>>,
    kind: ServiceKind,
    headless: bool,
) -> Vec<ServicePort> {
    let items = found.list(at, list);
    if matches!(list, List::Empty) && !headless && kind != ServiceKind::ExternalName {
        found.error(at, "missing; a Service needs at least one entry with a port");
    }
    let mut ports = Vec::with_capacity(items.len());
    let mut seen = Seen::default();
    for (index, item) in items.iter().enumerate() {
        let at = at.index(index);
        let Some(raw) = found.object(at, item) else {
            if matches!(item, Object::Absent) {
                found.error(at, "empty; write at least a port");
            }
            continue;
        };
        let Some(port) = port(found, at, raw) else { continue };
        let nameless = port.name.is_empty() && items.len() > 1;
        if nameless && seen.names.get(&port.name).is_none_or(|(_, protocol)| *protocol != port.protocol) {
            found.warn(at, "decode", "name: missing; an API server wants a name for each of several ports");
        }
        if port.node_port.is_some() && kind == ServiceKind::ClusterIp {
            let text = "an API server refuses it with type ClusterIP; write `type: NodePort` in spec";
            found.warn(at.key("nodePort"), "decode", text);
        }
        seen.check(found, at, index, &port);
        ports.push(port);
    }
    ports
}

fn port(found: &mut Findings, at: At<'_>, raw: &Port) -> Option<ServicePort> {
    let name = found.text(at.key("name"), &raw.name).unwrap_or_default();
    if !name.is_empty() && !is_name(&name, 63) {
        found.error(at.key("name"), format!("{} is not a name; write {}", raw.name, name_rule(63)));
    }
    let protocol = found.word(at.key("protocol"), &raw.protocol, &PROTOCOLS).unwrap_or_default();
    let target_port = target_port(found, at.key("targetPort"), &raw.target_port);
    let node_port = found.port_or_none(at.key("nodePort"), &raw.node_port);
    let app_protocol = found.text(at.key("appProtocol"), &raw.app_protocol);
    if matches!(raw.port, Scalar::Absent | Scalar::Null) {
        found.error(at.key("port"), "missing; write the number that clients connect to");
    }
    let port = found.port(at.key("port"), &raw.port)?;
    Some(ServicePort { name, protocol, port, target_port, node_port, node_port_allocated: false, app_protocol })
}

/// A number, or the name of a container's port.
fn target_port(found: &mut Findings, at: At<'_>, value: &Scalar) -> Option<Arc<str>> {
    match value {
        Scalar::Text(text) if text.is_empty() => None,
        Scalar::Text(text) => {
            if text.parse::<i64>().is_ok() {
                found.warn(at, "decode", format!("{value} is text, and so the name of a port; write {text}"));
            }
            Some(text.clone())
        }
        // An API server fills in `port` for 0.
        value => {
            let port = found.port_or_none(at, value)?;
            Some(port.to_string().into())
        }
    }
}

/// What the ports of a Service have claimed so far, with the entry that did.
#[derive(Default)]
struct Seen {
    names: BTreeMap<Arc<str>, (usize, Protocol)>,
    ports: BTreeMap<(u16, Protocol), usize>,
    node_ports: BTreeMap<(u16, Protocol), usize>,
}

impl Seen {
    fn check(&mut self, found: &mut Findings, at: At<'_>, index: usize, port: &ServicePort) {
        let protocol = port.protocol;
        match self.names.get(&port.name) {
            None => _ = self.names.insert(port.name.clone(), (index, protocol)),
            Some((first, same)) if *same == protocol => {
                let text =
                    format!("{:?} is the name of ports[{first}], too; give each port a name of its own", port.name);
                found.error(at.key("name"), text);
            }
            // Said already, as a name that is missing.
            Some(_) if port.name.is_empty() => {}
            Some((first, _)) => {
                let text = format!("{:?} is the name of ports[{first}], too; an API server refuses that", port.name);
                found.warn(at.key("name"), "decode", text);
            }
        }
        if let Some(first) = claim(&mut self.ports, (port.port, protocol), index) {
            found.error(at.key("port"), format!("{}/{protocol} is taken by ports[{first}]", port.port));
        }
        if let Some(number) = port.node_port
            && let Some(first) = claim(&mut self.node_ports, (number, protocol), index)
        {
            found.error(at.key("nodePort"), format!("{number}/{protocol} is taken by ports[{first}]"));
        }
    }
}

/// Returns who came first, if it was somebody else.
fn claim(taken: &mut BTreeMap<(u16, Protocol), usize>, key: (u16, Protocol), index: usize) -> Option<usize> {
    let first = *taken.entry(key).or_insert(index);
    (first != index).then_some(first)
}

fn external_ips(found: &mut Findings, at: At<'_>, list: &List<Scalar>) -> Rare<IpAddr> {
    let mut ips = Rare::default();
    for (index, value) in found.list(at, list).iter().enumerate() {
        let at = at.index(index);
        let Some(text) = found.text(at, value) else { continue };
        match parse_ip(&text) {
            Some(ip) if can_listen(ip) => ips.push(ip),
            _ => found.warn(
                at,
                "decode",
                format!("{value} is not an IP address that can be listened on, it is left out"),
            ),
        }
    }
    ips
}

fn load_balancer_ips(found: &mut Findings, at: At<'_>, status: &Object<Status>) -> Rare<IpAddr> {
    let Some(status) = found.object(at, status) else { return Rare::default() };
    let at = at.key("loadBalancer");
    let Some(load_balancer) = found.object(at, &status.load_balancer) else { return Rare::default() };
    let at = at.key("ingress");
    let mut ips = Rare::default();
    for (index, item) in found.list(at, &load_balancer.ingress).iter().enumerate() {
        let at = at.index(index);
        let Some(ingress) = found.object(at, item) else { continue };
        // With mode Proxy the balancer answers, and its traffic comes back to a node port.
        let captured =
            found.word(at.key("ipMode"), &ingress.ip_mode, &[("VIP", true), ("Proxy", false)]).unwrap_or(true);
        let Some(text) = found.text(at.key("ip"), &ingress.ip).filter(|text| !text.is_empty()) else { continue };
        match parse_ip(&text) {
            Some(ip) if !can_listen(ip) => found.warn(at.key("ip"), "decode", format!("{ip} cannot be listened on")),
            Some(ip) if captured => ips.push(ip),
            Some(_) => {}
            None => found.warn(at.key("ip"), "decode", format!("{} is not an IP address, it is left out", ingress.ip)),
        }
    }
    ips
}

fn source_ranges(found: &mut Findings, at: At<'_>, list: &List<Scalar>) -> Rare<IpNet> {
    let mut ranges = Rare::default();
    for (index, value) in found.list(at, list).iter().enumerate() {
        let at = at.index(index);
        let Some(text) = found.text(at, value) else { continue };
        match parse_cidr(&text) {
            Some(range) => ranges.push(range),
            // Without a range somebody would be let in or kept out by mistake.
            None => found.error(at, format!("{value} is not a range of addresses; write one like 203.0.113.0/24")),
        }
    }
    ranges
}

/// Other words than Kubernetes' own may mean something to those who write hints.
fn traffic_distribution(found: &mut Findings, at: At<'_>, value: &Scalar) -> Option<Arc<str>> {
    let text = found.text(at, value).filter(|text| !text.is_empty())?;
    let words = Preference::WORDS.map(|(word, _)| word);
    if !words.contains(&&*text) {
        let near = closest(&text, words.into_iter()).map_or(String::new(), |near| format!(", did you mean {near}?"));
        found.warn(at, "decode", format!("{value} has no effect here{near}"));
    }
    Some(text)
}

fn affinity_timeout(found: &mut Findings, at: At<'_>, spec: &Spec) -> Option<Duration> {
    let sticky =
        found.word(at.key("sessionAffinity"), &spec.affinity, &[("None", false), ("ClientIP", true)]).unwrap_or(false);
    let at = at.key("sessionAffinityConfig");
    let mut timeout = None;
    if let Some(config) = found.object(at, &spec.affinity_config) {
        let client = at.key("clientIP");
        if let Some(fields) = found.object(client, &config.client_ip) {
            timeout = found.number(client.key("timeoutSeconds"), &fields.timeout_seconds, 1..=86_400);
        }
        if !sticky {
            found.warn(at, "decode", "without effect; write `sessionAffinity: ClientIP` beside it");
        }
    }
    let seconds = timeout.and_then(|seconds| u64::try_from(seconds).ok());
    sticky.then(|| seconds.map_or(DEFAULT_AFFINITY_TIMEOUT, Duration::from_secs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Content, Decoded, decode};
    use crate::plan::Severity;

    fn decoded(spec: &str) -> Decoded {
        let text = format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec:\n{spec}");
        decode(text.as_bytes(), "a.yaml")
    }

    fn service(spec: &str) -> Service {
        let mut decoded = decoded(spec);
        match decoded.objects.pop().map(|entry| entry.content) {
            Some(Content::Service(service)) => Arc::unwrap_or_clone(service),
            _ => panic!("no Service: {:?}", decoded.problems),
        }
    }

    /// The errors of a Service that is not taken because of them: line, column, message.
    fn errors(spec: &str) -> Vec<(u64, u64, String)> {
        let decoded = decoded(spec);
        assert!(decoded.objects.is_empty() && !decoded.whole, "it was taken");
        told(&decoded, Severity::Error)
    }

    /// The warnings of a Service that is taken.
    fn warnings(spec: &str) -> Vec<(u64, u64, String)> {
        let decoded = decoded(spec);
        assert!(decoded.objects.len() == 1 && decoded.whole, "{:?}", decoded.problems);
        told(&decoded, Severity::Warning)
    }

    fn told(decoded: &Decoded, severity: Severity) -> Vec<(u64, u64, String)> {
        let told = decoded.problems.iter().filter(|problem| problem.severity == severity);
        told.map(|problem| {
            assert_eq!(problem.object, "Service default/web");
            (problem.line.expect("a line"), problem.column.expect("a column"), problem.message.clone())
        })
        .collect()
    }

    fn told_once(told: Vec<(u64, u64, String)>, line: u64, column: u64, message: &str) {
        assert_eq!(told, [(line, column, message.to_owned())]);
    }

    #[test]
    fn given_a_service_as_introductory_texts_write_it_when_read_then_each_field_is_taken() {
        let service = service(
            "  type: NodePort\n  externalTrafficPolicy: Local\n  internalTrafficPolicy: Cluster\n  ipFamilies: [IPv4]\n  ipFamilyPolicy: SingleStack\n  ports:\n  - {name: http, port: 81, protocol: TCP, targetPort: 80}\n  selector: {app: web}\n",
        );

        assert_eq!(service.kind, ServiceKind::NodePort);
        assert_eq!(service.external_policy, TrafficPolicy::Local);
        assert_eq!(service.families, [Family::V4]);
        assert_eq!(service.cluster_ips, ClusterIps::Unset);
        assert_eq!((service.ports[0].port, service.ports[0].target_port.as_deref()), (81, Some("80")));
        assert!(service.has_selector && service.allocate_node_ports && service.affinity_timeout.is_none());
    }

    #[test]
    fn given_wrong_ports_when_read_then_place_value_and_remedy_are_told() {
        let whole = "a whole number from 1 to 65535";
        told_once(
            errors("  ports:\n  - port: eighty\n"),
            6,
            11,
            &format!("spec.ports[0].port: \"eighty\" where {whole} is wanted"),
        );
        told_once(
            errors("  ports:\n  - port: 0\n"),
            6,
            11,
            &format!("spec.ports[0].port: 0 is out of range; write {whole}"),
        );
        told_once(
            errors("  ports:\n  - port: 80\n    nodePort: 70000\n"),
            7,
            15,
            "spec.ports[0].nodePort: 70000 is out of range; write a whole number from 0 to 65535",
        );
        told_once(
            errors("  ports:\n  - port: \"80\"\n"),
            6,
            11,
            "spec.ports[0].port: \"80\" is text; write 80 without quotes",
        );
        told_once(
            errors("  ports:\n  - name: http\n"),
            6,
            5,
            "spec.ports[0].port: missing; write the number that clients connect to",
        );
        told_once(errors("  ports: 80\n"), 5, 10, "spec.ports: 80 where a list is wanted (lines that begin with `- `)");
    }

    #[test]
    fn given_several_mistakes_when_read_then_all_are_told_at_once() {
        let messages = errors("  type: Nodeport\n  ports:\n  - port: 0\n    protocol: tcp\n");

        assert_eq!(messages.len(), 3);
        assert_eq!(messages[0].2, "spec.type: \"Nodeport\" is not known, did you mean NodePort?");
    }

    #[test]
    fn given_no_ports_when_read_then_only_headless_and_external_name_may_do_that() {
        told_once(
            errors("  type: ClusterIP\n"),
            5,
            3,
            "spec.ports: missing; a Service needs at least one entry with a port",
        );
        assert_eq!(service("  clusterIP: None\n").cluster_ips, ClusterIps::Headless);
        let alias = service("  {type: ExternalName, externalName: db.example}\n");
        assert_eq!((alias.kind, alias.external_name.as_deref()), (ServiceKind::ExternalName, Some("db.example")));
    }

    #[test]
    fn given_numbers_written_as_integral_floats_when_read_then_they_are_taken_as_kubectl_does() {
        let service = service("  ports:\n  - {port: 8080., targetPort: 8000.0, nodePort: 3e4}\n");

        assert_eq!((service.ports[0].port, service.ports[0].node_port), (8080, Some(30_000)));
        assert_eq!(service.ports[0].target_port.as_deref(), Some("8000"));
    }

    #[test]
    fn given_a_cluster_ip_that_is_a_word_when_read_then_none_is_named() {
        told_once(
            errors("  clusterIP: node\n  ports: [{port: 80}]\n"),
            5,
            14,
            "spec.clusterIP: \"node\" is neither an IP address nor None, the word for a headless Service; leave it out to get one",
        );
        assert_eq!(errors("  clusterIP: 0.0.0.0\n  ports: [{port: 80}]\n").len(), 1);
    }

    #[test]
    fn t018_given_cluster_ips_of_both_families_when_read_then_each_is_found_by_its_family() {
        let both = service(
            "  clusterIP: fd00::a\n  clusterIPs: ['fd00::a', 10.96.0.010]\n  ipFamilies: [IPv6, IPv4]\n  ports: [{port: 80}]\n",
        );
        let list_only = service("  clusterIPs: [10.96.0.1]\n  ports: [{port: 80}]\n");

        assert_eq!(both.cluster_ips.of(Family::V4).map(|ip| ip.to_string()).as_deref(), Some("10.96.0.10"));
        assert!(list_only.cluster_ips.of(Family::V4).is_some() && !list_only.cluster_ips.allocated());
        assert_eq!(errors("  clusterIP: 10.0.0.1\n  clusterIPs: [10.0.0.2]\n  ports: [{port: 80}]\n").len(), 1);
        assert_eq!(errors("  clusterIPs: [10.0.0.1, 10.0.0.2]\n  ports: [{port: 80}]\n").len(), 1);
        assert_eq!(errors("  clusterIPs: [None, 10.0.0.2]\n  ports: [{port: 80}]\n").len(), 1);
        assert_eq!(service("  clusterIP: \"\"\n  ports: [{port: 80}]\n").cluster_ips, ClusterIps::Unset);
    }

    #[test]
    fn t021_given_an_external_ip_that_is_none_when_read_then_it_is_left_out_with_a_warning() {
        let spec = "  ports: [{port: 80}]\n  externalIPs: [192.0.2.1, 'fd00::1', nonsense]\n";

        assert_eq!(service(spec).external_ips.len(), 2);
        told_once(
            warnings(spec),
            6,
            39,
            "spec.externalIPs[2]: \"nonsense\" is not an IP address that can be listened on, it is left out",
        );
    }

    #[test]
    fn t022_t023_given_load_balancer_ingress_when_read_then_addresses_in_vip_mode_are_captured() {
        let service = service(
            "  ports: [{port: 80}]\nstatus:\n  loadBalancer:\n    ingress:\n    - {ip: 192.0.2.1}\n    - {ip: 'fd00::1', ipMode: VIP}\n    - {ip: 192.0.2.2, ipMode: Proxy}\n    - {hostname: lb.example}\n",
        );

        let ips: Vec<String> = service.load_balancer_ips.iter().map(IpAddr::to_string).collect();
        assert_eq!(ips, ["192.0.2.1", "fd00::1"]);
    }

    #[test]
    fn t024_given_source_ranges_when_read_then_they_are_trimmed_and_a_wrong_one_is_an_error() {
        let ranges = |list: &str| format!("  ports: [{{port: 80}}]\n  loadBalancerSourceRanges: {list}\n");

        assert_eq!(service(&ranges("[' 203.0.113.0/25', '2001:db8::/32']")).source_ranges.len(), 2);
        assert_eq!(errors(&ranges("[203.0.113.0]")).len(), 1);
    }

    #[test]
    fn t025_given_client_ip_affinity_when_read_then_its_timeout_is_taken() {
        let seconds = |lines: &str| {
            service(&format!("  ports: [{{port: 80}}]\n{lines}")).affinity_timeout.map(|timeout| timeout.as_secs())
        };

        assert_eq!(seconds("  sessionAffinity: ClientIP\n"), Some(10_800));
        let config = "  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}\n";
        assert_eq!(seconds(&format!("  sessionAffinity: ClientIP\n{config}")), Some(60));
        assert_eq!(seconds("  sessionAffinity: None\n"), None);
        assert_eq!(warnings(&format!("  ports: [{{port: 80}}]\n{config}")).len(), 1);
    }

    #[test]
    fn t026_given_an_affinity_timeout_out_of_range_when_read_then_it_is_rejected_with_path_and_line() {
        for seconds in [0, 86_401] {
            let spec = format!(
                "  ports: [{{port: 80}}]\n  sessionAffinity: ClientIP\n  sessionAffinityConfig:\n    clientIP:\n      timeoutSeconds: {seconds}\n"
            );
            told_once(
                errors(&spec),
                9,
                23,
                &format!(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is out of range; write a whole number from 1 to 86400"
                ),
            );
        }
    }

    #[test]
    fn t030_given_one_number_for_tcp_and_udp_when_read_then_both_ports_are_there() {
        let ports =
            service("  ports:\n  - {name: dns, port: 53, nodePort: 30053, protocol: UDP}\n  - {name: dns-tcp, port: 53, nodePort: 30053}\n").ports;

        assert_eq!(ports.len(), 2);
    }

    #[test]
    fn given_the_same_name_or_number_twice_when_read_then_the_second_is_an_error() {
        let twice = |second: &str| format!("  ports:\n  - {{name: a, port: 80, nodePort: 30000}}\n  - {second}\n");

        told_once(
            errors(&twice("{name: a, port: 81}")),
            7,
            12,
            "spec.ports[1].name: \"a\" is the name of ports[0], too; give each port a name of its own",
        );
        told_once(errors(&twice("{name: b, port: 80}")), 7, 21, "spec.ports[1].port: 80/TCP is taken by ports[0]");
        assert_eq!(errors(&twice("{name: b, port: 81, nodePort: 30000}")).len(), 1);
    }

    #[test]
    fn t230_given_unknown_fields_when_read_then_the_meant_one_is_suggested() {
        let told = warnings("  ports:\n  - port: 80\n    nodeport: 30000\n  externalips: []\n  weight: 1\n");

        let expected = [
            (7, 5, "spec.ports[0].nodeport: unknown field, did you mean nodePort?"),
            (8, 3, "spec.externalips: unknown field, did you mean externalIPs?"),
            (9, 3, "spec.weight: unknown field, it is ignored"),
        ];
        assert_eq!(told, expected.map(|(line, column, text)| (line, column, text.to_owned())));
    }

    #[test]
    fn given_annotations_when_read_then_ours_are_kept_and_misspelt_ones_told() {
        let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  annotations:\n    kube-relay.dev/balance: p2c\n    kube-relay.dev/udp-timout: 5s\n    other.example/x: y\nspec:\n  ports: [{port: 80}]\n";

        let decoded = decode(text.as_bytes(), "a.yaml");

        told_once(
            told(&decoded, Severity::Warning),
            7,
            5,
            "metadata.annotations[kube-relay.dev/udp-timout]: unknown field, did you mean kube-relay.dev/udp-timeout?",
        );
        let Content::Service(service) = &decoded.objects[0].content else { panic!("a Service") };
        assert_eq!(service.annotations, BTreeMap::from([("balance".into(), "p2c".into())]));
    }
}
