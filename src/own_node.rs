//! What the cluster says of the node that this relay runs on: where it is, how it is reached, and whether it stays.
//!
//! Pure. Who asks for the Node is `kubernetes`; what is told of it to load balancers and to the log is `node_report`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::control::Setting;
use crate::health::{NodeSigns, node_is_eligible};
use crate::place::Place;
use crate::timestamp::rfc3339;

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Types of `status.addresses` that are IPs, the better ones first.
const ADDRESS_TYPES: [&str; 2] = ["InternalIP", "ExternalIP"];

/// A Node object, as far as a proxy on that node reads it. Owned by the API source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnNode {
    /// From `metadata.name`.
    pub name: Arc<str>,
    /// From the label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// From `status.addresses`: the internal ones, then the external ones; in the order of the object, as the first of a
    /// family is the node's main one.
    pub addresses: Vec<IpAddr>,
    /// The networks of its pods. From `spec.podCIDRs`; empty until the cluster has given it some.
    pub pod_cidrs: Vec<IpNet>,
    /// True with `metadata.deletionTimestamp`.
    pub deleting: bool,
    /// The keys of `spec.taints`.
    pub taints: Vec<String>,
}

impl OwnNode {
    /// Reads an object. What is no address or network in it is passed over, and so is a field of another type than the
    /// API's: one of them must not hide all others.
    pub fn of(node: &Value) -> Self {
        let (metadata, spec) = (&node["metadata"], &node["spec"]);
        let zone = metadata["labels"][ZONE_LABEL].as_str();
        let taints = items(&spec["taints"]).filter_map(|taint| taint["key"].as_str());
        Self {
            name: metadata["name"].as_str().unwrap_or_default().into(),
            zone: zone.filter(|zone| !zone.is_empty()).map(Into::into),
            addresses: addresses(&node["status"]),
            pod_cidrs: pod_cidrs(spec),
            deleting: !metadata["deletionTimestamp"].is_null(),
            taints: taints.map(str::to_owned).collect(),
        }
    }

    /// Whether load balancers should send traffic here.
    pub fn is_eligible(&self) -> bool {
        let taints: Vec<&str> = self.taints.iter().map(String::as_str).collect();
        node_is_eligible(Some(NodeSigns { deleting: self.deleting, taints: &taints }))
    }

    /// Keeps what every node has and this object does not say yet: a kubelet that registers its node anew begins without.
    /// All else may go, like the label of a zone.
    pub(crate) fn keep_missing(&mut self, before: &Self) {
        if self.addresses.is_empty() {
            self.addresses.clone_from(&before.addresses);
        }
        if self.pod_cidrs.is_empty() {
            self.pod_cidrs.clone_from(&before.pod_cidrs);
        }
    }

    /// What shapes the plan on this node. The zone and the networks of pods are the Node's where no flag names them; its
    /// addresses come before those of `--node-address`.
    pub fn setting(&self, place: &Place) -> Setting {
        let Place { mut plan, hosts } = place.clone();
        plan.node.zone = plan.node.zone.or_else(|| self.zone.clone());
        plan.node_addresses.splice(0..0, self.addresses.iter().copied());
        if plan.cluster_cidrs.is_empty() {
            plan.cluster_cidrs.clone_from(&self.pod_cidrs);
        }
        Place { plan, hosts }.setting()
    }

    /// An object that says the same.
    pub(crate) fn manifest(&self) -> Value {
        let addresses: Vec<_> =
            self.addresses.iter().map(|ip| json!({"type": ADDRESS_TYPES[0], "address": ip.to_string()})).collect();
        let taints: Vec<_> = self.taints.iter().map(|key| json!({"key": key, "effect": "NoSchedule"})).collect();
        let labels = self.zone.as_ref().map(|zone| json!({ZONE_LABEL: **zone}));
        // When it began is not kept.
        let deleting = self.deleting.then(|| rfc3339(SystemTime::now()));
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": *self.name, "labels": labels, "deletionTimestamp": deleting},
            "spec": {"podCIDRs": self.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(), "taints": taints},
            "status": {"addresses": addresses},
        })
    }
}

fn pod_cidrs(spec: &Value) -> Vec<IpNet> {
    let list = &spec["podCIDRs"];
    let old_field = std::iter::once(&spec["podCIDR"]).filter(|_| items(list).next().is_none());
    items(list).chain(old_field).filter_map(|cidr| cidr.as_str()?.parse().ok()).collect()
}

fn addresses(status: &Value) -> Vec<IpAddr> {
    let of_type = |kind: &'static str| items(&status["addresses"]).filter(move |address| address["type"] == kind);
    let ips = ADDRESS_TYPES.into_iter().flat_map(of_type);
    ips.filter_map(|address| address["address"].as_str()?.parse().ok()).collect()
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PlanConfig;
    use crate::host::{Host, NodePortSelector};
    use crate::host_watch::Hosts;

    fn node(object: Value) -> OwnNode {
        OwnNode::of(&object)
    }

    #[test]
    fn f4_given_fields_of_another_type_when_read_then_all_others_count() {
        let node = node(json!({
            "metadata": {"name": "worker-1", "labels": {(ZONE_LABEL): 7, "x": "y"}},
            "spec": {"podCIDRs": "10.244.1.0/24", "podCIDR": "10.244.2.0/24", "taints": [7, {"key": "a", "effect": []}]},
            "status": {"addresses": [{"type": "InternalIP", "address": 5}, {"type": "InternalIP", "address": "10.0.0.5"}]},
        }));

        assert_eq!((&*node.name, node.zone.as_deref()), ("worker-1", None));
        assert_eq!(node.taints, ["a"]);
        assert_eq!(node.addresses.map_to_text(), ["10.0.0.5"]);
        assert_eq!(node.pod_cidrs.map_to_text(), ["10.244.2.0/24"]);
        assert_eq!(OwnNode::of(&json!({"metadata": [], "spec": 1, "status": "x"})), OwnNode::default());
    }

    #[test]
    fn given_a_node_of_a_real_server_when_read_then_zone_and_addresses_are_there() {
        let list: Value = serde_json::from_str(include_str!("../tests/api/nodes-1.20.json")).expect("a list");

        let node = node(list["items"][0].clone());

        assert_eq!((&*node.name, node.zone.as_deref()), ("node-1", Some("zone-1")));
        assert_eq!(node.addresses, [IpAddr::from([10, 200, 0, 1])], "no host name among them");
        assert!(node.is_eligible(), "not ready keeps pods away, not traffic");
    }

    #[test]
    fn t216_given_external_and_internal_addresses_when_read_then_internal_ones_come_first_in_their_order() {
        let address = |kind: &str, ip: &str| json!({"type": kind, "address": ip});

        let node = node(json!({"metadata": {}, "status": {"addresses": [
            address("ExternalIP", "203.0.113.5"), address("Hostname", "worker-1"),
            address("InternalIP", "10.0.0.5"), address("InternalIP", "fd00::5"),
        ]}}));

        assert_eq!(node.addresses.map_to_text(), ["10.0.0.5", "fd00::5", "203.0.113.5"]);
    }

    #[test]
    fn t222_given_pod_networks_when_read_then_the_list_counts_before_the_old_field() {
        let with = |spec: Value| node(json!({"metadata": {}, "spec": spec})).pod_cidrs.map_to_text();

        assert!(with(json!({})).is_empty());
        assert_eq!(with(json!({"podCIDR": "10.244.1.0/24"})), ["10.244.1.0/24"]);
        let both = json!({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd01::/64", "x"]});
        assert_eq!(with(both), ["10.244.1.0/24", "fd01::/64"]);
    }

    #[test]
    fn t211_given_signs_of_its_end_when_judged_then_no_traffic_is_wanted() {
        let with =
            |key: &str| node(json!({"metadata": {}, "spec": {"taints": [{"key": key, "effect": "NoSchedule"}]}}));

        assert!(with("node.kubernetes.io/unschedulable").is_eligible());
        assert!(!with("ToBeDeletedByClusterAutoscaler").is_eligible());
        assert!(!node(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})).is_eligible());
    }

    #[test]
    fn given_a_node_when_written_and_read_then_it_says_the_same() {
        let full = OwnNode {
            name: "worker-1".into(),
            zone: Some("eu-1a".into()),
            addresses: vec![[10, 0, 0, 5].into(), "fd00::5".parse().expect("an address")],
            pod_cidrs: vec!["10.244.1.0/24".parse().expect("a network")],
            deleting: true,
            taints: vec!["example.com/gpu".into()],
        };

        for original in [full, OwnNode { name: "bare".into(), ..OwnNode::default() }] {
            assert_eq!(node(original.manifest()), original);
        }
    }

    #[test]
    fn t220_t222_given_a_node_that_is_registered_anew_when_it_has_no_addresses_yet_then_the_last_ones_count() {
        let with = |zone: Option<&str>, address: Option<[u8; 4]>, cidr: Option<&str>| OwnNode {
            zone: zone.map(Into::into),
            addresses: address.map(Into::into).into_iter().collect(),
            pod_cidrs: cidr.map(|cidr| cidr.parse().expect("a network")).into_iter().collect(),
            ..OwnNode::default()
        };
        let before = with(Some("eu-1a"), Some([10, 0, 0, 5]), Some("10.244.1.0/24"));

        let kept = |mut node: OwnNode| {
            node.keep_missing(&before);
            node
        };

        let bare = kept(with(None, None, None));
        assert_eq!(bare, with(None, Some([10, 0, 0, 5]), Some("10.244.1.0/24")), "a zone may go");
        let new = with(Some("eu-1b"), Some([10, 0, 0, 6]), Some("10.244.2.0/24"));
        assert_eq!(kept(new.clone()), new);
    }

    fn place(zone: Option<&str>, cluster_cidrs: &[&str]) -> Place {
        let plan = PlanConfig {
            cluster_cidrs: cluster_cidrs.iter().map(|cidr| cidr.parse().expect("a network")).collect(),
            node: crate::endpoints::Node { name: Some("worker-1".into()), zone: zone.map(Into::into) },
            node_addresses: vec![[10, 0, 0, 9].into()],
            allow_loopback_endpoints: false,
            ..PlanConfig::with_node_ports(vec![NodePortSelector::Primary])
        };
        Place { plan, hosts: Hosts::fixed(Host { interfaces: vec![], default_sources: vec![[10, 0, 0, 8].into()] }) }
    }

    #[test]
    fn t220_t222_given_a_node_when_a_relay_is_placed_then_the_node_fills_what_no_flag_says() {
        let node = OwnNode {
            zone: Some("eu-1a".into()),
            addresses: vec![[10, 0, 0, 5].into()],
            pod_cidrs: vec!["10.244.1.0/24".parse().expect("a network")],
            ..OwnNode::default()
        };

        let setting = node.setting(&place(None, &[]));
        assert_eq!(setting.plan.node.zone.as_deref(), Some("eu-1a"));
        assert_eq!(setting.plan.node_port_addresses, node.addresses, "before --node-address and the default route");
        assert!(setting.inside.contains(&node.pod_cidrs[0]) && setting.inside.contains(&node.addresses[0].into()));

        let setting = node.setting(&place(Some("eu-1b"), &["10.0.0.0/8"]));
        assert_eq!(setting.plan.node.zone.as_deref(), Some("eu-1b"));
        assert!(!setting.inside.contains(&node.pod_cidrs[0]));

        let setting = OwnNode::default().setting(&place(None, &[]));
        assert_eq!(setting.plan.node_port_addresses.map_to_text(), ["10.0.0.9"], "a Node without addresses yet");
    }

    /// For short comparisons.
    trait MapToText {
        fn map_to_text(&self) -> Vec<String>;
    }

    impl<T: ToString> MapToText for Vec<T> {
        fn map_to_text(&self) -> Vec<String> {
            self.iter().map(ToString::to_string).collect()
        }
    }
}
