//! Load-balancer addresses that are the neighbours' of several nodes: whom the neighbours find there, and what keeps the others
//! quiet.
//!
//! When a route is made at all is in `vips`; here neighbours are asked, too. Node 0 announces the address as keepalived does:
//! it is one of its interface. Node 1 serves it by a route, if at all.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use kube_relay::name::Family;

use crate::cluster::{Answer, Cluster};
use crate::neighbours::{answering, claiming};
use crate::rig::{Case, DualAddress, FAMILIES, LAN, Lan, Namespace, Rig, Shape, skip, with_settings_read_only};
use crate::stage::{Backends, ClusterIp, PORT, Web, ask_tcp, expect_at, metric, reports, until};
use crate::sysctls::{changed, sysctls};
use crate::verdicts::{ask_from, backends, local, remote};
use crate::vips::ours;

pub(crate) const CASES: &[Case] = cases![
    given_an_ip_of_the_neighbours_when_one_of_two_nodes_announces_it_then_it_alone_answers_in_both_families,
    given_an_ip_of_the_neighbours_when_settings_are_tuned_then_two_are_set_and_nobody_takes_it_for_this_nodes,
    given_settings_that_cannot_be_changed_when_they_are_to_be_tuned_then_the_file_is_named_and_all_else_is_served,
];

const PODS: Answer = Answer::By(&["pod0-0", "pod0-1", "pod1-0", "pod1-1"]);

/// Two nodes with a relay each, the client and a load balancer's address on one network.
struct Neighbours {
    cluster: Cluster,
    lan: Lan,
    shared: DualAddress,
    /// The settings of node 1 before there was a relay.
    before: BTreeMap<String, String>,
    _running: Backends,
}

impl Neighbours {
    /// `None`, and says why, where the kernel knows no bridges.
    fn start(prepare: impl Fn(&mut Command)) -> Option<Self> {
        let rig = Rig::build(Shape { nodes: 2, pods_per_node: 2, router: true }).expect("the rig builds");
        let lan = match Lan::lay(&rig) {
            Ok(lan) => lan,
            Err(error) => {
                skip("bridge", &error.to_string());
                return None;
            }
        };
        // Whatever the machine does that the tests run on.
        for node in rig.nodes() {
            ["all", LAN].into_iter().for_each(|interface| set_arp(node, interface, 0, 0));
        }
        let shared = Lan::shared(77);
        lan.announce(rig.node(0), shared).expect("an address can be added");
        let running = backends(&rig);
        let web = Web::default().with([local(&rig), remote(&rig)].concat()).to_string();
        let web = FAMILIES.into_iter().fold(web, |web, family| {
            let last = Rig::vip_address(3).of(family).to_string();
            web.replace(&last, &shared.of(family).to_string())
        });
        let before = sysctls(rig.node(1));
        let cluster = Cluster::start(rig, &web, prepare);
        Some(Self { cluster, lan, shared, before, _running: running })
    }

    fn node(&self, i: usize) -> &Namespace {
        self.cluster.rig.node(i)
    }

    fn answering(&self, family: Family) -> Vec<String> {
        answering(&self.cluster.rig, &self.lan, self.shared.of(family))
    }

    fn has_route(&self, i: usize, family: Family) -> bool {
        ours(self.node(i)).contains(&self.shared.of(family))
    }

    /// All pods answer there, by the relay of node `i`.
    fn served_by(&self, i: usize, from: &Namespace, family: Family) {
        let to = SocketAddr::new(self.shared.of(family), PORT);
        self.cluster.expect_at(from, i, to, ask_tcp, PODS, "the address of the neighbours");
    }
}

fn set_arp(node: &Namespace, interface: &str, ignore: u8, announce: u8) {
    for (setting, value) in [("arp_ignore", ignore), ("arp_announce", announce)] {
        node.sysctl(&format!("net/ipv4/conf/{interface}/{setting}"), &value.to_string()).expect("it is ours");
    }
}

/// IPv6 needs none of it: a route alone makes no kernel answer, as is asked for here by multicast and directly.
fn given_an_ip_of_the_neighbours_when_one_of_two_nodes_announces_it_then_it_alone_answers_in_both_families() {
    let Some(neighbours) = &Neighbours::start(|_| ()) else { return };
    let Neighbours { cluster, shared, before, .. } = neighbours;
    let (rig, other) = (&cluster.rig, neighbours.node(1));
    until("node 1 tells why not", || reports(other, "arp_conflict"));
    assert_eq!(metric(other, "kuberelay_listener_failures", "reason=\"arp_conflict\""), 3, "one for each port");
    let line = "`sysctl -w net.ipv4.conf.lan.arp_ignore=1 net.ipv4.conf.lan.arp_announce=2`";
    until("node 1 tells the remedy", || cluster.log(1).contains(line));
    assert!(!neighbours.has_route(1, Family::V4) && neighbours.has_route(1, Family::V6));

    for family in FAMILIES {
        assert_eq!(neighbours.answering(family), ["node0"]);
        neighbours.served_by(0, rig.client(), family);
    }
    neighbours.served_by(1, rig.pod(1, 0), Family::V6);

    // A route that somebody else has made is relied on, and shows what ours would do.
    let by_hand = (shared.of(Family::V4), 32);
    rig.network_local_to_node(1, by_hand).expect("a route can be added");
    assert_eq!(neighbours.answering(Family::V4), ["node0", "node1"]);
    rig.network_foreign_to_node(1, by_hand).expect("it is there");

    assert_eq!(changed(before, other), [] as [String; 0], "no setting is changed unasked");
    set_arp(other, LAN, 1, 0);
    until("node 1 has a route", || neighbours.has_route(1, Family::V4));
    assert_eq!(neighbours.answering(Family::V4), ["node0"]);
    neighbours.served_by(1, rig.pod(1, 0), Family::V4);
    neighbours.served_by(0, rig.client(), Family::V4);

    set_arp(other, LAN, 0, 0);
    until("node 1 tells what was changed behind its back", || {
        cluster.log(1).contains("now answers ARP for an address")
    });
    assert!(neighbours.has_route(1, Family::V4), "streams may be open there");
}

fn given_an_ip_of_the_neighbours_when_settings_are_tuned_then_two_are_set_and_nobody_takes_it_for_this_nodes() {
    let Some(mut neighbours) = Neighbours::start(|_| ()) else { return };
    let IpAddr::V4(shared) = neighbours.shared.of(Family::V4) else { unreachable!("it is of IPv4") };
    let [known, second, third] = Lan::CLIENTS.map(|client| SocketAddr::new(client.of(Family::V4), 0));
    set_arp(neighbours.node(1), LAN, 1, 0);
    until("node 1 has a route", || neighbours.has_route(1, Family::V4));
    neighbours.lan.lead(neighbours.cluster.rig.client(), shared.into(), 1).expect("a route can be added");
    // A client that node 1 has not met yet: it has to ask for its hardware address before it can answer.
    let who_claims = |neighbours: &Neighbours, source| {
        let client = neighbours.cluster.rig.client();
        claiming(client, &neighbours.lan, shared, || {
            let to = SocketAddr::new(shared.into(), PORT);
            expect_at(client, to, |to| ask_from(source, to), "by node 1", |outcome| outcome.pod().is_some());
        })
    };
    who_claims(&neighbours, known); // From now on the client knows where node 1 is, and need not say who itself is.
    assert_eq!(who_claims(&neighbours, second), ["node1"], "it asks in the name of the Service");

    neighbours.cluster.end(1);
    set_arp(neighbours.node(1), LAN, 0, 0);
    let before = sysctls(neighbours.node(1));
    neighbours.cluster.start_again(1, |command| {
        command.arg("--tune-sysctls");
    });

    until("node 1 has a route", || neighbours.has_route(1, Family::V4));
    let set = ["arp_announce: 2", "arp_ignore: 1"].map(|set| format!("/proc/sys/net/ipv4/conf/lan/{set}"));
    assert_eq!(changed(&before, neighbours.node(1)), set);
    let log = neighbours.cluster.log(1);
    for told in
        ["setting=net.ipv4.conf.lan.arp_ignore old=0 new=1", "setting=net.ipv4.conf.lan.arp_announce old=0 new=2"]
    {
        assert_eq!(log.matches(told).count(), 1, "{told}");
    }
    assert_eq!(who_claims(&neighbours, third), [] as [&str; 0]);
    assert_eq!(neighbours.answering(Family::V4), ["node0"]);
    set_arp(neighbours.node(1), LAN, 0, 0);
    until("both are set again", || changed(&before, neighbours.node(1)) == set);
    neighbours.cluster.end(1);
    assert_eq!(changed(&before, neighbours.node(1)), set, "its routes stay, and so does what keeps it quiet");
}

fn given_settings_that_cannot_be_changed_when_they_are_to_be_tuned_then_the_file_is_named_and_all_else_is_served() {
    let prepare = |command: &mut Command| {
        command.arg("--tune-sysctls");
        with_settings_read_only(command);
    };
    let Some(neighbours) = &Neighbours::start(prepare) else { return };
    let Neighbours { cluster, before, .. } = neighbours;
    until("node 1 tells why not", || reports(neighbours.node(1), "arp_conflict"));

    cluster.lead_to(1);
    cluster.expect(cluster.rig.client(), 1, &[ClusterIp], PODS, "all else");

    let log = cluster.log(1);
    let told = "cannot set /proc/sys/net/ipv4/conf/lan/arp_ignore to 1: Read-only file system";
    assert_eq!(log.matches(told).count(), 1, "{log}");
    assert_eq!(changed(before, neighbours.node(1)), [] as [String; 0]);
    assert_eq!(neighbours.answering(Family::V4), ["node0"]);
}
