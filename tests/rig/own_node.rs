//! The Node object of a relay in place of kube-proxy: its addresses, its pods' networks, and its end.
//!
//! What a Node says is read in `own_node` and its tests; on loopback the same is in `kubernetes/node`.

use std::net::{IpAddr, SocketAddr};

use kube_relay::name::Family;
use serde_json::{Value, json};

use crate::addresses::{at, connect, later, sockets, status_line};
use crate::bootstrap::{Cluster, endpoint, slice};
use crate::rig::Case;
use crate::stage::{NODE_PORT, Outcome, PORT, ask_on, ask_tcp, expect_at, until};
use crate::verdicts::{backends, rig};

pub(crate) const CASES: &[Case] = cases![
    t220_t221_given_a_node_whose_address_changes_when_it_is_deleted_then_listeners_moved_and_traffic_goes_on,
    t222_given_networks_of_pods_when_they_are_known_late_or_change_then_clients_there_are_inside_or_not,
];

fn t220_t221_given_a_node_whose_address_changes_when_it_is_deleted_then_listeners_moved_and_traffic_goes_on() {
    let rig = rig();
    let _running = backends(&rig);
    let cluster = Cluster::on(&rig);
    let node = rig.node(0);
    let (old, [new, _]) = (node.address(Family::V4), later(1));
    rig.add_address(0, new).expect("an address can be added");
    cluster.server.put("services", node_port());
    cluster.server.put("nodes", node_object(old, None));
    let mut relay = cluster.relay(node, cluster.server_address);
    answers_tcp(&cluster, old);
    let localhost = sockets(node, at([127, 0, 0, 1].into()));
    assert!(sockets(node, at(new)).is_empty(), "it is not the Node's");
    let mut open = connect(rig.client(), at(old));

    cluster.server.put("nodes", node_object(new, None));
    until("node ports to move", || !sockets(node, at(new)).is_empty());

    answers_tcp(&cluster, new);
    until("the old address to be left", || sockets(node, at(old)).is_empty());
    assert!(ask_on(&mut open).expect("it goes on").pod().is_some());
    assert!(!localhost.is_empty() && sockets(node, at([127, 0, 0, 1].into())) == localhost, "not bound anew");
    assert!(status_line(node, new, 10256).is_some_and(|line| line.contains(" 200 ")));

    cluster.server.delete("nodes", "default/node0");
    until("load balancers to be told", || status_line(node, new, 10256).is_some_and(|line| line.contains(" 503 ")));

    answers_tcp(&cluster, new);
    assert!(ask_on(&mut open).expect("it goes on").pod().is_some());
    assert!(relay.ended().expect("it is ours").is_none(), "it was never restarted");
}

fn answers_tcp(cluster: &Cluster<'_>, ip: IpAddr) {
    expect_at(cluster.rig().node(0), at(ip), ask_tcp, "is answered", |outcome| outcome.pod().is_some());
}

fn t222_given_networks_of_pods_when_they_are_known_late_or_change_then_clients_there_are_inside_or_not() {
    let rig = rig();
    let _running = backends(&rig);
    let cluster = Cluster::on(&rig);
    let (node, pod) = (rig.node(0), rig.pod(0, 1));
    let to = SocketAddr::new(rig.vip(0, 3).expect("an address can be added").v4, PORT);
    cluster.server.put("services", balanced(to.ip()));
    let mut elsewhere = slice("web", "http", endpoint(rig.pod(1, 0)));
    elsewhere["endpoints"][0]["nodeName"] = "node1".into();
    cluster.server.put("endpointslices", elsewhere);
    let ip = node.address(Family::V4);
    cluster.server.put("nodes", node_object(ip, None));
    let _relay = cluster.relay(node, cluster.server_address);

    for (cidr, is_inside) in [(None, false), (Some("10.82.0.0/24"), true), (Some("10.99.0.0/24"), false)] {
        cluster.server.put("nodes", node_object(ip, cidr));
        expect_at(pod, to, ask_tcp, &format!("with {cidr:?}"), |outcome| match is_inside {
            true => outcome.pod() == Some("pod1-0"),
            false => *outcome == Outcome::Silence,
        });
    }
}

fn node_object(ip: IpAddr, pod_cidr: Option<&str>) -> Value {
    json!({
        "metadata": {"name": "node0"},
        "spec": {"podCIDR": pod_cidr, "podCIDRs": pod_cidr.into_iter().collect::<Vec<_>>()},
        "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
    })
}

fn node_port() -> Value {
    json!({
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "type": "NodePort", "clusterIP": "10.96.0.2", "clusterIPs": ["10.96.0.2"],
            "ports": [{"name": "http", "port": PORT, "nodePort": NODE_PORT}],
        },
    })
}

fn balanced(ip: IpAddr) -> Value {
    let mut service = node_port();
    service["spec"]["type"] = "LoadBalancer".into();
    service["spec"]["externalTrafficPolicy"] = "Local".into();
    service["spec"]["healthCheckNodePort"] = 31025.into();
    service["status"] = json!({"loadBalancer": {"ingress": [{"ip": ip}]}});
    service
}
