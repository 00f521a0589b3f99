//! Beside kube-proxy's nftables mode: its rules drop what a node itself sends to addresses of the service range that it
//! does not know, and ours are such. The rules that the overlay for that mode loads let it pass.
//!
//! What kube-proxy does to these packets is written anew here. That the overlay loads its file is in `deployment`.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use kube_relay::name::Family;

use crate::rig::{Case, FAMILIES, Namespace, Rig, find, skip};
use crate::stage::{
    Backends, ClusterIp, Outcome, PORT, Stage, TCP_BACKEND_PORT, UDP_BACKEND_PORT, Web, ask_tcp, ask_udp, expect_at,
};
use crate::verdicts::{LOCAL, ask_from, backends, local, rig};

pub(crate) const CASES: &[Case] = cases![
    given_kube_proxys_nftables_rules_when_our_service_is_asked_then_pods_are_served_and_the_node_is_not,
    given_the_overlays_rules_when_kube_proxy_writes_its_own_anew_then_the_node_is_served_as_well,
    given_the_overlays_rules_when_the_node_asks_kube_proxys_service_then_it_is_served_as_before,
];

/// What the overlay loads on each node.
const OVERLAY: &str = include_str!("../../examples/kubernetes/beside-kube-proxy-nftables/node-processes.nft");

/// Where kube-proxy judges what a node sends: close behind its DNAT or, in later versions, where most filters are.
const PRIORITIES: [i32; 2] = [-90, 0];

fn given_kube_proxys_nftables_rules_when_our_service_is_asked_then_pods_are_served_and_the_node_is_not() {
    let Some(Beside { stage, nft, .. }) = &Beside::start() else { return };

    stage.served(stage.rig.node(0), ClusterIp, &LOCAL);
    for priority in PRIORITIES {
        load(nft, stage.rig.node(0), &kube_proxy(&stage.rig, priority)).expect("rules as kube-proxy's");

        for from in [stage.rig.pod(0, 0), stage.rig.client()] {
            stage.served(from, ClusterIp, &LOCAL);
        }
        for family in FAMILIES {
            assert_dropped(stage.rig.node(0), stage.at(ClusterIp, family));
        }
    }
}

fn given_the_overlays_rules_when_kube_proxy_writes_its_own_anew_then_the_node_is_served_as_well() {
    let Some(Beside { stage, nft, .. }) = &Beside::start() else { return };
    let node = stage.rig.node(0);
    load(nft, node, FIREWALL).expect("rules of a firewall");
    for _ in 0..2 {
        load(nft, node, &overlay()).expect("the overlay's rules");
    }

    for priority in PRIORITIES {
        load(nft, node, &kube_proxy(&stage.rig, priority)).expect("rules as kube-proxy's");

        for from in [node, stage.rig.pod(0, 0), stage.rig.client()] {
            stage.served(from, ClusterIp, &LOCAL);
        }
        for family in FAMILIES {
            let (source, to) = (SocketAddr::new(node.address(family), 0), stage.at(ClusterIp, family));
            let from_source = |_| ask_from(source, to);
            expect_at(node, to, from_source, "from the node's address", |outcome| outcome.pod().is_some());
        }
    }
}

fn given_the_overlays_rules_when_the_node_asks_kube_proxys_service_then_it_is_served_as_before() {
    let Some(Beside { stage, nft, .. }) = &Beside::start() else { return };
    let node = stage.rig.node(0);
    load(nft, node, &overlay()).expect("the overlay's rules");

    for priority in PRIORITIES {
        load(nft, node, &kube_proxy(&stage.rig, priority)).expect("rules as kube-proxy's");

        for family in FAMILIES {
            for ask in [ask_tcp, ask_udp] {
                expect_at(node, theirs(family), ask, "kube-proxy's", |outcome| outcome.pod() == Some("pod0-0"));
            }
            assert_dropped(node, nobodys(family));
        }
    }
}

/// TCP tries in vain, and UDP is told at once.
fn assert_dropped(from: &Namespace, to: SocketAddr) {
    expect_at(from, to, ask_tcp, "dropped on its way out", |outcome| *outcome == Outcome::Silence);
    expect_at(from, to, ask_udp, "dropped on its way out", |outcome| *outcome == Outcome::Forbidden);
}

/// A relay on a node that has nftables, with a Service that is labelled as ours.
struct Beside {
    stage: Stage,
    nft: PathBuf,
    _running: Backends,
}

impl Beside {
    /// `None`, and says why, where there is no nftables.
    fn start() -> Option<Self> {
        let Some(nft) = find("nft") else {
            skip("nft", "not installed");
            return None;
        };
        let rig = rig();
        if let Err(reason) = load(&nft, rig.node(0), "table inet trial") {
            skip("nft", &reason);
            return None;
        }
        let running = backends(&rig);
        let web = Web { proxy_name: "kube-relay", ..Web::default() }.with(local(&rig));
        let stage = Stage::start_with(rig, &web, &["--proxy-name", "kube-relay"]);
        Some(Self { stage, nft, _running: running })
    }
}

/// Loads rules on a node; the error is what `nft` says.
pub(crate) fn load(nft: &Path, node: &Namespace, rules: &str) -> Result<(), String> {
    let output = node.run(|| Command::new(nft).arg(rules).output()).map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// The overlay's rules for the service ranges of the rig.
fn overlay() -> String {
    assert!(OVERLAY.contains(service_range(Family::V4)), "the rig's range is kubeadm's");
    OVERLAY.replace("fd00:10:96::/112", service_range(Family::V6))
}

fn service_range(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.96.0.0/12",
        Family::V6 => "fd96::/64",
    }
}

/// A cluster IP that kube-proxy serves.
fn theirs(family: Family) -> SocketAddr {
    in_service_range(family, 10)
}

/// A cluster IP that nobody has.
fn nobodys(family: Family) -> SocketAddr {
    in_service_range(family, 77)
}

fn in_service_range(family: Family, number: u8) -> SocketAddr {
    let ip: IpAddr = match family {
        Family::V4 => [10, 96, 0, number].into(),
        Family::V6 => [0xfd96, 0, 0, 0, 0, 0, 0, number.into()].into(),
    };
    SocketAddr::new(ip, PORT)
}

/// What many firewalls do, and what a connection must not meet of which one direction alone is tracked.
const FIREWALL: &str = "table inet firewall {
    chain input {
        type filter hook input priority filter
        ct state invalid drop
    }
}";

/// Its table from scratch, with a Service of its own in pod 0 and the judgement at `priority`.
fn kube_proxy(rig: &Rig, priority: i32) -> String {
    FAMILIES.map(|family| kube_proxy_table(family, rig.pod(0, 0).address(family), priority)).concat()
}

fn kube_proxy_table(family: Family, pod: IpAddr, priority: i32) -> String {
    let (ip, of_addresses) = match family {
        Family::V4 => ("ip", "ipv4_addr"),
        Family::V6 => ("ip6", "ipv6_addr"),
    };
    let (cluster_ip, range) = (theirs(family).ip(), service_range(family));
    let [tcp, udp] = [TCP_BACKEND_PORT, UDP_BACKEND_PORT].map(|port| SocketAddr::new(pod, port));
    format!(
        "
table {ip} kube-proxy
delete table {ip} kube-proxy
table {ip} kube-proxy {{
    set cluster-ips {{
        type {of_addresses}
        elements = {{ {cluster_ip} }}
    }}
    chain cluster-ips-check {{
        {ip} daddr @cluster-ips reject
        {ip} daddr {range} drop
    }}
    chain nat-output {{
        type nat hook output priority -100
        {ip} daddr {cluster_ip} tcp dport {PORT} dnat to {tcp}
        {ip} daddr {cluster_ip} udp dport {PORT} dnat to {udp}
    }}
    chain filter-output {{
        type filter hook output priority {priority}
        ct state new jump cluster-ips-check
    }}
    chain filter-forward {{
        type filter hook forward priority 0
        ct state new jump cluster-ips-check
    }}
}}
"
    )
}
