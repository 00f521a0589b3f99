//! The namespace rig: a client, a router, nodes and their pods, wired with veth pairs, IPv4 and IPv6.
//!
//! ```text
//! client ── router ─┬─ node0 ─┬─ pod0-0       client  10.80.0.2      fd80::2
//!                   │         ├─ pod0-1       node i  10.81.i.2      fd81:i::2
//!                   │         └─ pod0-2       pod i,j 10.82.i.10+j   fd82:i::10+j
//!                   ├─ node1 …                VIP n   10.96.0.n      fd96::n
//!                   └─ node2 …
//! ```
//!
//! Binaries that use it are `harness = false` and call [`run`] (or [`isolate`]) first in `main`. Proxies are children
//! ([`Namespace::spawn`]), clients and backends are threads ([`Namespace::thread`]). Nothing is left behind: a
//! namespace ends with its last descriptor, thread and process. [`Rig::loopback`] has the same parts on loopback.
#![allow(dead_code)] // shared by several binaries, each of which uses its part

mod bridge;
mod cases;
mod clock;
mod distance;
mod lan;
mod links;
mod namespace;
mod process;
mod rights;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use kube_relay::name::Family;

#[allow(unused_imports)] // as above
pub(crate) use self::{
    cases::{Case, full, run, skip},
    clock::set_by,
    distance::LongCable,
    lan::{Hardware, LAN, Lan},
    namespace::{DualAddress, FAMILIES, Namespace, Unavailable, isolate},
    process::{Process, find},
    rights::{NOBODY, as_nobody_with, on_a_read_only_root, with_only, with_settings_read_only, without_netfilter},
};

/// How many nodes and pods, and what lies before them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Nodes, at most 200.
    pub(crate) nodes: u8,
    /// Pods on each node, at most 200.
    pub(crate) pods_per_node: u8,
    /// With a router between client and nodes; without one the client has a cable to each node.
    pub(crate) router: bool,
}

impl Default for Shape {
    /// Three nodes behind a router, three pods each.
    fn default() -> Self {
        Self { nodes: 3, pods_per_node: 3, router: true }
    }
}

/// A small network in one process. Dropping it takes it down.
#[derive(Debug)]
pub(crate) struct Rig {
    client: Namespace,
    router: Option<Namespace>,
    nodes: Vec<Node>,
    on_loopback: bool,
}

#[derive(Debug)]
struct Node {
    namespace: Namespace,
    pods: Vec<Namespace>,
}

impl Rig {
    /// Builds the network; the process must be [isolated](isolate).
    pub(crate) fn build(shape: Shape) -> io::Result<Self> {
        let client = namespace("client", client_address(shape))?;
        let router = shape.router.then(|| namespace("router", ROUTER)).transpose()?;
        if let Some(router) = &router {
            cable(router, "client", &client, (CLIENT_SIDE, CLIENT))?;
        }
        let hub = router.as_ref().unwrap_or(&client);
        let nodes = (0..shape.nodes).map(|i| node(hub, i, shape.pods_per_node)).collect::<io::Result<_>>()?;
        Ok(Self { client, router, nodes, on_loopback: false })
    }

    /// The same parts without namespaces, each with a loopback address of its own; IPv6 has only `::1`.
    pub(crate) fn loopback(shape: Shape) -> Self {
        let here = |name: String, i, j| {
            let v4 = IpAddr::from([127, 82, i, j]);
            Namespace::here(name, DualAddress { v4, v6: Ipv6Addr::LOCALHOST.into() })
        };
        let nodes = (0..shape.nodes).map(|i| Node {
            namespace: here(format!("node{i}"), i, 1),
            pods: (0..shape.pods_per_node).map(|j| here(format!("pod{i}-{j}"), i, 10 + j)).collect(),
        });
        Self { client: here("client".into(), 255, 2), router: None, nodes: nodes.collect(), on_loopback: true }
    }

    /// True where everything shares one namespace.
    pub(crate) fn on_loopback(&self) -> bool {
        self.on_loopback
    }

    /// The families in which each part has an address of its own.
    pub(crate) fn families(&self) -> &'static [Family] {
        if self.on_loopback { &[Family::V4] } else { &FAMILIES }
    }

    /// Where clients run.
    pub(crate) fn client(&self) -> &Namespace {
        &self.client
    }

    /// What lies between client and nodes, if anything.
    pub(crate) fn router(&self) -> Option<&Namespace> {
        self.router.as_ref()
    }

    /// Where all cables to nodes begin: the router, or the client.
    pub(crate) fn hub(&self) -> &Namespace {
        self.router.as_ref().unwrap_or(&self.client)
    }

    /// Where a proxy runs.
    pub(crate) fn node(&self, i: usize) -> &Namespace {
        &self.nodes[i].namespace
    }

    /// All nodes.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &Namespace> {
        self.nodes.iter().map(|node| &node.namespace)
    }

    /// Where a backend runs: pod `j` of node `i`.
    pub(crate) fn pod(&self, i: usize, j: usize) -> &Namespace {
        &self.nodes[i].pods[j]
    }

    /// All pods of a node.
    pub(crate) fn pods(&self, i: usize) -> &[Namespace] {
        &self.nodes[i].pods
    }

    /// Everything that there is, from the client to the last pod.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &Namespace> {
        let nodes = self.nodes.iter().flat_map(|node| std::iter::once(&node.namespace).chain(&node.pods));
        std::iter::once(&self.client).chain(&self.router).chain(nodes)
    }

    /// A part that is so far from node `i` that an answer takes `round_trip` to come, for as long as the cable is there.
    /// IPv4 alone.
    pub(crate) fn far_from_node(&self, i: usize, round_trip: Duration) -> io::Result<(Namespace, LongCable)> {
        const DEVICE: &str = "far";
        let (node, far) = (self.node(i), namespace(DEVICE, FAR)?);
        let cable = LongCable::lay([node, &far], DEVICE, round_trip / 2)?;
        for (end, own, other) in [(node, FAR_SIDE.v4, (FAR.v4, 32)), (&far, FAR.v4, (ANY.v4, 0))] {
            links::address(end, DEVICE, own, 32)?;
            links::device_up(end, DEVICE)?;
            links::route(end, other, DEVICE, None)?;
        }
        Ok((far, cable))
    }

    /// Makes virtual address `number` (1..=254) local to node `i` and routes it there from everywhere.
    pub(crate) fn vip(&self, i: usize, number: u8) -> io::Result<DualAddress> {
        if self.on_loopback {
            return Ok(DualAddress { v4: [127, 96, 255, number].into(), v6: Ipv6Addr::LOCALHOST.into() });
        }
        let vip = Self::vip_address(number);
        let hub = self.hub();
        let node = self.node(i);
        for family in FAMILIES {
            links::address(node, "lo", vip.of(family), host_prefix(family))?;
            let to_vip = (vip.of(family), host_prefix(family));
            links::route(hub, to_vip, node.name(), Some(node.address(family)))?;
        }
        Ok(vip)
    }

    /// Virtual address `number`, wherever it leads to.
    pub(crate) fn vip_address(number: u8) -> DualAddress {
        dual([10, 96, 0, number], [0xfd96, 0, 0, 0, 0, 0, 0, number.into()])
    }

    /// Makes 65,536 IPv4 addresses local to the client, and says which is the first.
    pub(crate) fn many_sources(&self) -> io::Result<Ipv4Addr> {
        if self.on_loopback {
            return Ok(Ipv4Addr::new(127, 83, 0, 0));
        }
        let first = Ipv4Addr::new(10, 83, 0, 0);
        links::address(&self.client, "lo", first.into(), 16)?; // on loopback the whole prefix is local
        Ok(first)
    }

    /// Like [`vip`](Self::vip), but local by a route alone (AnyIP): it is no address of the node then.
    pub(crate) fn routed_vip(&self, i: usize, number: u8) -> io::Result<DualAddress> {
        let vip = Self::vip_address(number);
        for family in FAMILIES {
            let network = (vip.of(family), host_prefix(family));
            self.network_to_node(i, network)?;
            self.network_local_to_node(i, network)?;
        }
        Ok(vip)
    }

    /// Routes a whole network to node `i` from everywhere.
    pub(crate) fn network_to_node(&self, i: usize, network: (IpAddr, u8)) -> io::Result<()> {
        let hub = self.hub();
        let node = self.node(i);
        links::route(hub, network, node.name(), Some(node.address(Family::of(network.0))))
    }

    /// Makes all addresses of a network local to node `i` by one route (AnyIP).
    pub(crate) fn network_local_to_node(&self, i: usize, network: (IpAddr, u8)) -> io::Result<()> {
        links::local_route(self.node(i), network)
    }

    /// Makes all addresses of a network local to pod `j` of node `i`, and routes them there from the node.
    pub(crate) fn network_of_pod(&self, i: usize, j: usize, network: (IpAddr, u8)) -> io::Result<()> {
        let (node, pod) = (self.node(i), self.pod(i, j));
        links::local_route(pod, network)?;
        links::route(node, network, pod.name(), Some(pod.address(Family::of(network.0))))
    }

    /// Takes away what makes a network local to node `i`, whoever made it so.
    pub(crate) fn network_foreign_to_node(&self, i: usize, network: (IpAddr, u8)) -> io::Result<()> {
        links::delete_local_route(self.node(i), network)
    }

    /// Has everybody look for the addresses of a network among the neighbours of node `i`, by ARP.
    pub(crate) fn network_by_link(&self, i: usize, network: (IpAddr, u8)) -> io::Result<()> {
        links::route(self.hub(), network, self.node(i).name(), None)
    }

    /// Makes the neighbours of node `i` on its way to the client those of a network.
    pub(crate) fn network_on_link(&self, i: usize, own: IpAddr, prefix: u8) -> io::Result<()> {
        links::address(self.node(i), UPLINK, own, prefix)
    }

    /// Sets the cable of node `i` down at its own end: its IPv6 addresses go, and all routes by it.
    pub(crate) fn uplink_down(&self, i: usize) -> io::Result<()> {
        links::device_down(self.node(i), UPLINK)
    }

    /// Sets it up again, with all that has gone.
    pub(crate) fn uplink_up(&self, i: u8) -> io::Result<()> {
        let node = self.node(i.into());
        links::device_up(node, UPLINK)?;
        connect_far_end(node, node_side(i), node_address(i))
    }

    /// Gives node `i` one more address on its cable, usable at once.
    pub(crate) fn add_address(&self, i: usize, address: IpAddr) -> io::Result<()> {
        links::address(self.node(i), UPLINK, address, host_prefix(Family::of(address)))
    }

    /// The same, but neighbours are asked first whether it is theirs. IPv6 alone.
    pub(crate) fn add_address_in_doubt(&self, i: usize, address: IpAddr) -> io::Result<()> {
        self.node(i).sysctl(&format!("net/ipv6/conf/{UPLINK}/accept_dad"), "1")?;
        links::address_in_doubt(self.node(i), UPLINK, address, host_prefix(Family::of(address)))
    }

    /// Whether node `i` can use the address: `None` while that is being found out.
    pub(crate) fn address_is_usable(&self, i: usize, address: IpAddr) -> io::Result<Option<bool>> {
        links::is_usable(self.node(i), UPLINK, address)
    }

    /// Gives the neighbour of node `i` an address on their cable.
    pub(crate) fn add_address_of_neighbour(&self, i: usize, address: IpAddr) -> io::Result<()> {
        links::address(self.hub(), self.node(i).name(), address, host_prefix(Family::of(address)))
    }

    /// Takes an address of node `i` on its cable away.
    pub(crate) fn remove_address(&self, i: usize, address: IpAddr) -> io::Result<()> {
        links::delete_address(self.node(i), UPLINK, address)
    }

    /// The networks that are local to a part by routes with this number.
    pub(crate) fn local_networks(part: &Namespace, protocol: u8) -> io::Result<Vec<(IpAddr, u8)>> {
        links::local_routes(part, protocol)
    }

    /// How many rules of a part, of both families, lead into a table of routes.
    pub(crate) fn rules_into(part: &Namespace, table: u32) -> io::Result<usize> {
        links::rules_into(part, table)
    }

    /// Removes the rules of a part, of both families, that lead into a table of routes.
    pub(crate) fn remove_rules_into(part: &Namespace, table: u32) -> io::Result<()> {
        links::remove_rules_into(part, table)
    }

    /// Sets a part's loopback device down, and up again.
    pub(crate) fn flap_loopback(part: &Namespace) -> io::Result<()> {
        links::loopback_down(part)?;
        links::loopback_up(part)
    }

    /// Lays one more cable between node `i` and its pod `j`, which sends by it what is for this IPv4 address.
    pub(crate) fn spare_cable(&self, i: usize, j: usize, to: Ipv4Addr) -> io::Result<()> {
        const DEVICE: &str = "spare";
        let (node, pod) = (self.node(i), self.pod(i, j));
        let [near, far] = [1, 2].map(|host| IpAddr::from([198, 18, 0, host]));
        links::cable(node, DEVICE, pod, DEVICE)?;
        links::address(node, DEVICE, near, 30)?;
        links::address(pod, DEVICE, far, 30)?;
        links::route(pod, (to.into(), 32), DEVICE, Some(near))
    }

    /// Unplugs the cable between node `i` and the hub: the node's end has no carrier, the other's routes are gone.
    pub(crate) fn unplug(&self, i: u8) -> io::Result<()> {
        links::device_down(self.hub(), self.node(i.into()).name())
    }

    /// Plugs it in again. What was routed to the node beyond its own networks is to be routed anew.
    pub(crate) fn plug(&self, i: u8) -> io::Result<()> {
        let (hub, node) = (self.hub(), self.node(i.into()));
        links::device_up(hub, node.name())?;
        near_end_of(hub, node.name(), (node_side(i), node_address(i)))?;
        lead_to_pods(hub, node, i)
    }

    /// Makes so many addresses local to node `i`, one after another, and takes each away again.
    pub(crate) fn churn(&self, i: usize, count: u16) -> io::Result<()> {
        links::churn(self.node(i), count)
    }

    /// Takes 127.0.0.1 away from node `i`: all IPv4 routes by its loopback device go with it, and nobody is told.
    pub(crate) fn take_loopback_address(&self, i: usize) -> io::Result<()> {
        links::delete_address(self.node(i), "lo", Ipv4Addr::LOCALHOST.into())
    }

    /// How many network devices a part has.
    pub(crate) fn devices(namespace: &Namespace) -> io::Result<usize> {
        links::devices(namespace)
    }
}

const fn dual(v4: [u8; 4], v6: [u16; 8]) -> DualAddress {
    let [a, b, c, d] = v4;
    let [s, t, u, v, w, x, y, z] = v6;
    DualAddress { v4: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), v6: IpAddr::V6(Ipv6Addr::new(s, t, u, v, w, x, y, z)) }
}

const ANY: DualAddress = dual([0; 4], [0; 8]);
/// What is far from a node, and the node's end of the way there.
const FAR: DualAddress = dual([10, 85, 0, 2], [0xfd85, 0, 0, 0, 0, 0, 0, 2]);
const FAR_SIDE: DualAddress = dual([10, 85, 0, 1], [0xfd85, 0, 0, 0, 0, 0, 0, 1]);
/// The client's end of its cable to the router, and the router's.
const CLIENT: DualAddress = dual([10, 80, 0, 2], [0xfd80, 0, 0, 0, 0, 0, 0, 2]);
const CLIENT_SIDE: DualAddress = dual([10, 80, 0, 1], [0xfd80, 0, 0, 0, 0, 0, 0, 1]);
const ROUTER: DualAddress = CLIENT_SIDE;

/// Without a router the client is known by its end of the cable to node 0.
fn client_address(shape: Shape) -> DualAddress {
    if shape.router { CLIENT } else { node_side(0) }
}

/// The end at the router (or client) of the cable to node `i`.
fn node_side(i: u8) -> DualAddress {
    dual([10, 81, i, 1], [0xfd81, i.into(), 0, 0, 0, 0, 0, 1])
}

fn node_address(i: u8) -> DualAddress {
    dual([10, 81, i, 2], [0xfd81, i.into(), 0, 0, 0, 0, 0, 2])
}

/// The node's end of the cables to its pods: the same address on each.
fn pod_side(i: u8) -> DualAddress {
    dual([10, 82, i, 1], [0xfd82, i.into(), 0, 0, 0, 0, 0, 1])
}

fn pod_address(i: u8, j: u8) -> DualAddress {
    dual([10, 82, i, 10 + j], [0xfd82, i.into(), 0, 0, 0, 0, 0, 0x10 + u16::from(j)])
}

/// The prefix length of all pods of a node.
fn pods_prefix(family: Family) -> u8 {
    match family {
        Family::V4 => 24,
        Family::V6 => 64,
    }
}

fn host_prefix(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

/// A namespace that forwards, with its loopback up.
fn namespace(name: impl Into<String>, addresses: DualAddress) -> io::Result<Namespace> {
    let namespace = Namespace::create(name, addresses)?;
    for (path, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        // No search for duplicate addresses: until it ends nobody can ask for neighbours, for a second or two.
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
    ] {
        namespace.sysctl(path, value)?;
    }
    links::loopback_up(&namespace)?;
    Ok(namespace)
}

/// A node with its pods, wired to the hub.
fn node(hub: &Namespace, i: u8, pods: u8) -> io::Result<Node> {
    let node = namespace(format!("node{i}"), node_address(i))?;
    cable(hub, node.name(), &node, (node_side(i), node_address(i)))?;
    lead_to_pods(hub, &node, i)?;
    let pods = (0..pods).map(|j| pod(&node, i, j)).collect::<io::Result<_>>()?;
    Ok(Node { namespace: node, pods })
}

/// Routes a node's pods from everywhere.
fn lead_to_pods(hub: &Namespace, node: &Namespace, i: u8) -> io::Result<()> {
    for family in FAMILIES {
        let its_pods = (pod_side(i).of(family), pods_prefix(family));
        links::route(hub, network(its_pods), node.name(), Some(node.address(family)))?;
    }
    Ok(())
}

/// A pod, wired to its node as point-to-point plugins do it: a host route there, a default route back.
fn pod(node: &Namespace, i: u8, j: u8) -> io::Result<Namespace> {
    let pod = namespace(format!("pod{i}-{j}"), pod_address(i, j))?;
    cable(node, pod.name(), &pod, (pod_side(i), pod_address(i, j)))?;
    Ok(pod)
}

/// Lays a cable named after its far end, gives both ends their address, and the far end its default route.
fn cable(
    near: &Namespace,
    device: &str,
    far: &Namespace,
    (near_end, far_end): (DualAddress, DualAddress),
) -> io::Result<()> {
    links::cable(near, device, far, UPLINK)?;
    near_end_of(near, device, (near_end, far_end))?;
    connect_far_end(far, near_end, far_end)
}

/// Gives the far end of a cable its address, and its default route through the near one.
fn connect_far_end(far: &Namespace, near_end: DualAddress, far_end: DualAddress) -> io::Result<()> {
    for family in FAMILIES {
        links::address(far, UPLINK, far_end.of(family), host_prefix(family))?;
        links::route(far, (near_end.of(family), host_prefix(family)), UPLINK, None)?;
        links::route(far, (ANY.of(family), 0), UPLINK, Some(near_end.of(family)))?;
    }
    Ok(())
}

/// What goes with a cable's near end where that goes down.
fn near_end_of(near: &Namespace, device: &str, (near_end, far_end): (DualAddress, DualAddress)) -> io::Result<()> {
    for family in FAMILIES {
        links::address(near, device, near_end.of(family), host_prefix(family))?;
        links::route(near, (far_end.of(family), host_prefix(family)), device, None)?;
    }
    Ok(())
}

/// What every part calls the cable towards the client.
const UPLINK: &str = "uplink";

/// Clears the host bits, as routes want it.
fn network((address, prefix): (IpAddr, u8)) -> (IpAddr, u8) {
    let net = ipnet::IpNet::new(address, prefix).expect("prefixes here fit their family");
    (net.network(), prefix)
}
