//! What is not the Service's, at each of three nodes: addresses of nobody, second addresses of the nodes, external IPs that
//! are somebody else's.
//!
//! Which of them are refused is decided in `entries` and its tests; here everybody asks there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;

use kube_relay::name::Family;

use crate::addresses::{at, later};
use crate::cluster::{Answer, Cluster};
use crate::rig::{Case, DualAddress, FAMILIES, Namespace, Rig, Shape};
use crate::stage::{
    Backends, ClusterIp, ExternalIp, NodePort, Outcome, PORT, Pod, TCP_BACKEND_PORT, UDP_BACKEND_PORT, Web, ask_tcp,
    ask_udp, expect_at, reports, until,
};
use crate::verdicts::ranges;
use crate::vips::{host, ours};

use Answer::{By, Refused};

pub(crate) const CASES: &[Case] =
    cases![t100_t105_t122_t123_t124_given_three_nodes_when_addresses_of_others_are_asked_then_they_are_theirs];

const NODES: usize = 3;
/// The Service's only pod: on one of the nodes, so that the others lead there.
const POD: Answer = By(&["pod1-0"]);
/// Of the network that cluster IPs are taken from, and no Service's.
const UNALLOCATED: u8 = 77;
/// Outside of what `--allowed-external-cidrs` names.
const NOT_ALLOWED: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 7))];
/// A port of the shared external IP, beside those of `web`.
const SHARED_PORT: u16 = 8080;
/// The networks of the nodes' first and second addresses.
const BOTH: &str = "10.81.0.0/16,198.51.100.0/24,fd81::/16,2001:db8:51::/64";

fn t100_t105_t122_t123_t124_given_three_nodes_when_addresses_of_others_are_asked_then_they_are_theirs() {
    let rig = Rig::build(Shape { nodes: 3, pods_per_node: 1, router: true }).expect("the rig builds");
    // What listens on a node itself has the ports of backends there, and says the node's name.
    let _running = Backends::start((0..NODES).flat_map(|i| rig.pods(i)).chain(rig.nodes()));
    (0..NODES).for_each(|i| give_second_addresses(&rig, i));
    let manifests = manifests(&rig);
    let mut cluster = Cluster::start(rig, &manifests, |command| {
        command.args(["--nodeport-addresses", "primary"]);
    });

    (0..NODES).for_each(|i| what_is_of_others_stays_theirs(&cluster, i));
    addresses_of_nobody_go_their_normal_way(&cluster);
    (0..NODES).for_each(|i| addresses_of_nobody_are_refused_where_all_are_local(&cluster, i));
    (0..NODES).for_each(|i| what_is_named_is_served_but_not_the_node_itself(&mut cluster, i));
}

/// Node ports on first addresses alone, external IPs of one network.
fn what_is_of_others_stays_theirs(cluster: &Cluster, i: usize) {
    cluster.lead_to(i);
    let (client, node) = (cluster.rig.client(), cluster.rig.node(i));
    cluster.expect(client, i, &[ClusterIp, ExternalIp, NodePort], POD, "what is the Service's");
    at_second_addresses(cluster, i, Refused, "not primary (T105)");
    at_the_shared_port(cluster, i);
    at_the_nodes_own_port(cluster, i);
    for reason in ["external_ip", "conflict"] {
        assert!(reports(node, reason), "node{i} reports {reason} (T122, T124)");
    }
    let leads_there = ours(node).iter().any(|address| NOT_ALLOWED.contains(address));
    assert!(!leads_there, "a route of node{i} to what is not allowed (T122)");
}

/// Asked by a pod of each node, all at once: what gets no answer takes its time.
fn addresses_of_nobody_go_their_normal_way(cluster: &Cluster) {
    let unallocated = FAMILIES.map(|family| Rig::vip_address(UNALLOCATED).of(family));
    let all: Vec<IpAddr> = unallocated.into_iter().chain(NOT_ALLOWED).collect();
    thread::scope(|scope| {
        for (i, address) in (0..NODES).flat_map(|i| all.iter().map(move |address| (i, *address))) {
            let (from, to) = (cluster.rig.pod(i, 0), SocketAddr::new(address, PORT));
            for Way { ask, .. } in WAYS {
                let is_nobodys = |outcome: &Outcome| outcome.pod().is_none() && *outcome != Outcome::Refused;
                scope.spawn(move || expect_at(from, to, ask, "there is none beyond the node (T100, T122)", is_nobodys));
            }
        }
    });
}

/// Somebody routes all that cluster IPs are taken from.
fn addresses_of_nobody_are_refused_where_all_are_local(cluster: &Cluster, i: usize) {
    for (network, prefix) in [("10.96.0.0", 24), ("fd96::", 64)] {
        let network = (network.parse().expect("an address"), prefix);
        cluster.rig.network_local_to_node(i, network).expect("a route can be added");
    }
    cluster.lead_to(i);
    let client = cluster.rig.client();
    at_each(|family, Way { ask, .. }| {
        let nobody = SocketAddr::new(Rig::vip_address(UNALLOCATED).of(family), PORT);
        cluster.expect_at(client, i, nobody, ask, Refused, "its network is local (T100)");
    });
    cluster.expect(client, i, &[ClusterIp], POD, "a cluster IP of a network that is local (T100)");
}

/// Node ports on second addresses as well, and external IPs that may be the node's.
fn what_is_named_is_served_but_not_the_node_itself(cluster: &mut Cluster, i: usize) {
    let own = ranges(&[cluster.rig.node(i)]).join(",");
    cluster.end(i);
    cluster.start_again(i, |command| {
        command.args(["--nodeport-addresses", BOTH, "--allowed-external-cidrs", &own]);
    });
    at_second_addresses(cluster, i, POD, "of a network that was named (T105)");
    cluster.expect(cluster.rig.client(), i, &[NodePort], POD, "the first addresses (T105)");
    until("its own addresses to be refused once more, though they are allowed now (T123)", || {
        cluster.log(i).matches("it is an address of this node").count() == 4
    });
    at_the_nodes_own_port(cluster, i);
}

/// How to ask, and where backends listen for that.
#[derive(Clone, Copy)]
struct Way {
    ask: fn(SocketAddr) -> Outcome,
    backend_port: u16,
}

const WAYS: [Way; 2] =
    [Way { ask: ask_tcp, backend_port: TCP_BACKEND_PORT }, Way { ask: ask_udp, backend_port: UDP_BACKEND_PORT }];

/// In both families, over both protocols, at the same time.
fn at_each(work: impl Fn(Family, Way) + Sync) {
    let work = &work;
    thread::scope(|scope| {
        for (family, way) in FAMILIES.into_iter().flat_map(|family| WAYS.map(|way| (family, way))) {
            scope.spawn(move || work(family, way));
        }
    });
}

fn second_addresses(i: usize) -> [IpAddr; 2] {
    later(20 + u8::try_from(i).expect("there are few nodes"))
}

fn give_second_addresses(rig: &Rig, i: usize) {
    for address in second_addresses(i) {
        rig.add_address(i, address).expect("an address can be added");
        rig.network_to_node(i, host(address)).expect("a route can be added");
    }
}

/// The client asks for the node port there.
fn at_second_addresses(cluster: &Cluster, i: usize, answer: Answer, what: &str) {
    at_each(|family, Way { ask, .. }| {
        let address = second_addresses(i).into_iter().find(|address| Family::of(*address) == family);
        let address = address.expect("there is one of each family");
        cluster.expect_at(cluster.rig.client(), i, at(address), ask, answer, what);
    });
}

/// An external IP of two Services, at a port that a third one wants as well: the first by name has it.
fn at_the_shared_port(cluster: &Cluster, i: usize) {
    at_each(|family, Way { ask, .. }| {
        let to = SocketAddr::new(cluster.at(i, ExternalIp, family).ip(), SHARED_PORT);
        let what = "another Service's port of the shared address (T124)";
        cluster.expect_at(cluster.rig.client(), i, to, ask, By(&["pod2-0"]), what);
    });
}

/// What listens at the address of the node goes on, for everybody, and nothing else does.
fn at_the_nodes_own_port(cluster: &Cluster, i: usize) {
    let (rig, next) = (&cluster.rig, (i + 1) % NODES);
    let node = rig.node(i);
    at_each(|family, Way { ask, backend_port }| {
        let [to, nobody] = [backend_port, PORT].map(|port| SocketAddr::new(node.address(family), port));
        cluster.expect_at(rig.client(), i, nobody, ask, Refused, "nobody's port of the node (T123)");
        for from in [rig.client(), node, rig.pod(i, 0), rig.node(next), rig.pod(next, 0)] {
            expect_at(from, to, ask, "the node itself (T123)", |outcome| outcome.pod() == Some(node.name()));
        }
    });
}

fn manifests(rig: &Rig) -> String {
    let of_nodes: Vec<IpAddr> = rig.nodes().flat_map(|node| FAMILIES.map(|family| node.address(family))).collect();
    let shared = FAMILIES.map(|family| Rig::vip_address(2).of(family)); // That of `web`.
    let own_ports = [TCP_BACKEND_PORT, UDP_BACKEND_PORT];
    let more = [
        Other { name: "shares", number: 11, external_ips: &shared, ports: [SHARED_PORT; 2], pod: rig.pod(2, 0) },
        Other { name: "younger", number: 12, external_ips: &shared, ports: [SHARED_PORT; 2], pod: rig.pod(0, 0) },
        Other { name: "takes-node", number: 13, external_ips: &of_nodes, ports: own_ports, pod: rig.pod(0, 0) },
        Other { name: "takes-dns", number: 14, external_ips: &NOT_ALLOWED, ports: [PORT; 2], pod: rig.pod(0, 0) },
    ];
    Web { more: more.map(|other| other.manifests()).concat(), ..Web::default() }.with([Pod::of(rig, 1, 0)]).to_string()
}

/// One more Service, of both families and protocols, and its only pod.
struct Other<'a> {
    name: &'a str,
    /// Of its cluster IPs.
    number: u8,
    external_ips: &'a [IpAddr],
    /// TCP's and UDP's.
    ports: [u16; 2],
    pod: &'a Namespace,
}

impl Other<'_> {
    fn manifests(&self) -> String {
        let Self { name, number, external_ips, ports: [tcp, udp], .. } = self;
        let DualAddress { v4, v6 } = Rig::vip_address(*number);
        let external_ips: Vec<String> = external_ips.iter().map(|ip| format!("'{ip}'")).collect();
        let service = format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  clusterIP: '{v4}'\n  \
             clusterIPs: ['{v4}', '{v6}']\n  ipFamilies: [IPv4, IPv6]\n  externalIPs: [{}]\n  ports:\n  \
             - {{name: tcp, port: {tcp}}}\n  - {{name: udp, protocol: UDP, port: {udp}}}\n",
            external_ips.join(", ")
        );
        FAMILIES.into_iter().fold(service, |text, family| text + &self.slice(family))
    }

    fn slice(&self, family: Family) -> String {
        let (name, address) = (self.name, self.pod.address(family));
        let suffix = family.to_string().to_lowercase();
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{suffix}\n  \
             labels: {{kubernetes.io/service-name: {name}}}\naddressType: {family}\nports:\n\
             - {{name: tcp, port: {TCP_BACKEND_PORT}}}\n- {{name: udp, protocol: UDP, port: {UDP_BACKEND_PORT}}}\n\
             endpoints: [{{addresses: ['{address}']}}]\n"
        )
    }
}
