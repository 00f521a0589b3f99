//! EndpointSlices and Endpoints as they are written, and the slices that a proxy reads in them.
//!
//! Which endpoints get traffic is decided in `endpoints`; documents, names and other kinds are `decode`.

use std::net::IpAddr;
use std::sync::Arc;

use crate::decode::Identity;
use crate::decode_service::PROTOCOLS;
use crate::findings::{Findings, parse_ip};
use crate::locate::At;
use crate::model::{Endpoint, Slice, SliceName, SlicePort};
use crate::name::Family;
use crate::rare::Rare;
use crate::yaml::{List, Object, Scalar, fields};

fields!(
    /// One of `endpoints` of an EndpointSlice; `topology` is what v1beta1 had for `nodeName` and `zone`.
    SliceEndpoint {
        "addresses" => addresses: List<Scalar>,
        "conditions" => conditions: Object<Conditions>,
        "nodeName" => node_name: Scalar,
        "zone" => zone: Scalar,
        "hints" => hints: Object<Hints>,
        "targetRef" => target_ref: Object<TargetRef>,
        "topology" => topology: Object<Topology>,
        "hostname" => hostname: Scalar,
    }
    unused &["deprecatedTopology"]
);

fields!(Conditions {
    "ready" => ready: Scalar,
    "serving" => serving: Scalar,
    "terminating" => terminating: Scalar,
} unused &[]);

fields!(Hints { "forZones" => zones: List<Object<Hint>>, "forNodes" => nodes: List<Object<Hint>>, } unused &[]);
fields!(Hint { "name" => name: Scalar, } unused &[]);

fields!(TargetRef { "kind" => kind: Scalar, "name" => name: Scalar, }
    unused &["apiVersion", "fieldPath", "namespace", "resourceVersion", "uid"]);

fields!(Topology { "kubernetes.io/hostname" => node: Scalar, "topology.kubernetes.io/zone" => zone: Scalar, } free);

fields!(
    /// One of `ports` of an EndpointSlice or of a subset.
    EndpointPort { "name" => name: Scalar, "protocol" => protocol: Scalar, "port" => port: Scalar, }
    unused &["appProtocol"]
);

fields!(
    /// One of `subsets` of an Endpoints object.
    Subset {
        "addresses" => addresses: List<Object<Address>>,
        "notReadyAddresses" => not_ready: List<Object<Address>>,
        "ports" => ports: List<Object<EndpointPort>>,
    }
    unused &[]
);

fields!(Address {
    "ip" => ip: Scalar,
    "nodeName" => node_name: Scalar,
    "targetRef" => target_ref: Object<TargetRef>,
    "hostname" => hostname: Scalar,
} unused &[]);

/// The fields of an EndpointSlice beside its metadata.
pub(crate) struct RawSlice<'v> {
    /// From `addressType`.
    pub(crate) address_type: &'v Scalar,
    /// From `endpoints`.
    pub(crate) endpoints: &'v List<Object<SliceEndpoint>>,
    /// From `ports`.
    pub(crate) ports: &'v List<Object<EndpointPort>>,
}

/// Reads an EndpointSlice. `None` where it is wrong, or nothing for a proxy.
pub(crate) fn slice(found: &mut Findings, at: At<'_>, identity: &Identity, raw: &RawSlice<'_>) -> Option<Slice> {
    let Some(service) = identity.service.clone() else {
        let metadata = at.key("metadata");
        let text = "label kubernetes.io/service-name is missing; it names the Service of these endpoints";
        found.error(metadata.key("labels"), text);
        return None;
    };
    let type_at = at.key("addressType");
    let types = [("IPv4", Some(Family::V4)), ("IPv6", Some(Family::V6)), ("FQDN", None)];
    let family = match found.word(type_at, raw.address_type, &types) {
        Some(Some(family)) => family,
        Some(None) => {
            found.warn(
                type_at,
                "family",
                "names are not proxied, the slice is left out; write addresses and IPv4 or IPv6",
            );
            return None;
        }
        None => {
            if matches!(raw.address_type, Scalar::Absent | Scalar::Null) {
                found.error(type_at, "missing; write IPv4 or IPv6");
            }
            return None;
        }
    };
    let list_at = at.key("endpoints");
    let items = found.list(list_at, raw.endpoints);
    let mut endpoints = Vec::with_capacity(items.len());
    let mut unreadable = false;
    for (index, item) in items.iter().enumerate() {
        let at = list_at.index(index);
        let Some(raw) = found.object(at, item) else { continue };
        match endpoint(found, at, raw, family) {
            Ok(endpoint) => endpoints.extend(endpoint),
            Err(Unreadable) => unreadable = true,
        }
    }
    refuse_if_all_unreadable(found, list_at, unreadable, &endpoints);
    let ports = ports(found, at.key("ports"), raw.ports);
    if ports.is_empty() && !endpoints.is_empty() {
        let text = "no usable entry, so nobody is reached through this slice; write name (\"\" if the Service port has none) and port";
        found.warn(at.key("ports"), "decode", text);
    }
    let name = SliceName::EndpointSlice(identity.name.clone());
    let service = found.texts.name(Arc::clone(&identity.name.namespace), service);
    Some(Slice { name, service, family, ports, endpoints })
}

/// An address is no IP address.
struct Unreadable;

/// `None` for an endpoint without an address, or of another family.
fn endpoint(
    found: &mut Findings,
    at: At<'_>,
    raw: &SliceEndpoint,
    family: Family,
) -> Result<Option<Endpoint>, Unreadable> {
    let addresses_at = at.key("addresses");
    let addresses = found.list(addresses_at, &raw.addresses);
    if addresses.len() > 1 {
        let text = "only the first address is used; write one entry of endpoints for each address";
        found.warn(addresses_at, "decode", text);
    }
    let address = addresses.first().map_or(Ok(None), |value| address(found, addresses_at.index(0), value));
    let topology_at = at.key("topology");
    let topology = found.object(topology_at, &raw.topology);
    let node = found.text(at.key("nodeName"), &raw.node_name);
    let node = node
        .or_else(|| topology.and_then(|labels| found.text(topology_at.key("kubernetes.io/hostname"), &labels.node)));
    let zone = found.text(at.key("zone"), &raw.zone);
    let zone = zone.or_else(|| {
        topology.and_then(|labels| found.text(topology_at.key("topology.kubernetes.io/zone"), &labels.zone))
    });
    let (ready, serving, terminating) = conditions(found, at.key("conditions"), &raw.conditions);
    let (zone_hints, node_hints) = hints(found, at.key("hints"), &raw.hints);
    let pod = pod(found, at.key("targetRef"), &raw.target_ref);
    let hostname = hostname(found, at, &raw.hostname);
    let Some(address) = address? else { return Ok(None) };
    if Family::of(address) != family {
        let text = format!("{address} is not {family}, it is left out; addresses of each family have their own slice");
        found.warn(addresses_at.index(0), "family", text);
        return Ok(None);
    }
    Ok(Some(Endpoint { address, ready, serving, terminating, node, zone, zone_hints, node_hints, pod, hostname }))
}

fn address(found: &mut Findings, at: At<'_>, value: &Scalar) -> Result<Option<IpAddr>, Unreadable> {
    let Some(text) = found.text(at, value) else { return Ok(None) };
    let Some(ip) = parse_ip(&text) else {
        found.warn(at, "decode", format!("{value} is not an IP address, the endpoint is left out"));
        return Err(Unreadable);
    };
    Ok(Some(ip))
}

/// Ready, serving, terminating.
fn conditions(found: &mut Findings, at: At<'_>, value: &Object<Conditions>) -> (bool, bool, bool) {
    let Some(raw) = found.object(at, value) else { return (true, true, false) };
    (
        found.flag(at.key("ready"), &raw.ready).unwrap_or(true),
        found.flag(at.key("serving"), &raw.serving).unwrap_or(true),
        found.flag(at.key("terminating"), &raw.terminating).unwrap_or(false),
    )
}

/// For zones, for nodes.
fn hints(found: &mut Findings, at: At<'_>, value: &Object<Hints>) -> (Rare<Arc<str>>, Rare<Arc<str>>) {
    let Some(raw) = found.object(at, value) else { return Default::default() };
    (names(found, at.key("forZones"), &raw.zones), names(found, at.key("forNodes"), &raw.nodes))
}

fn names(found: &mut Findings, at: At<'_>, list: &List<Object<Hint>>) -> Rare<Arc<str>> {
    let mut names = Rare::default();
    for (index, item) in found.list(at, list).iter().enumerate() {
        let at = at.index(index);
        if let Some(hint) = found.object(at, item) {
            names.extend(found.text(at.key("name"), &hint.name));
        }
    }
    names
}

fn pod(found: &mut Findings, at: At<'_>, value: &Object<TargetRef>) -> Option<Arc<str>> {
    let raw = found.object(at, value)?;
    let kind = found.text(at.key("kind"), &raw.kind)?;
    let name = found.text(at.key("name"), &raw.name)?;
    (&*kind == "Pod").then_some(name)
}

/// Nobody has to write one; an empty one says the same.
fn hostname(found: &mut Findings, at: At<'_>, value: &Scalar) -> Rare<Arc<str>> {
    found.text(at.key("hostname"), value).filter(|name| !name.is_empty()).into_iter().collect()
}

fn ports(found: &mut Findings, at: At<'_>, list: &List<Object<EndpointPort>>) -> Vec<SlicePort> {
    let items = found.list(at, list);
    let mut ports = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let at = at.index(index);
        if let Some(raw) = found.object(at, item) {
            ports.extend(port(found, at, raw));
        }
    }
    ports
}

fn port(found: &mut Findings, at: At<'_>, raw: &EndpointPort) -> Option<SlicePort> {
    let protocol = found.word(at.key("protocol"), &raw.protocol, &PROTOCOLS).unwrap_or_default();
    // An API server fills in the empty name where none is written; a null that is still there is none.
    let name = found.text(at.key("name"), &raw.name).unwrap_or_default();
    if matches!(raw.name, Scalar::Null) {
        found.warn(
            at.key("name"),
            "decode",
            "null, the port is left out; write the name of the Service's port, or \"\"",
        );
        return None;
    }
    let port = found.port_or_none(at.key("port"), &raw.port);
    if port.is_none() && matches!(raw.port, Scalar::Absent | Scalar::Null | Scalar::Whole(0)) {
        found.warn(
            at.key("port"),
            "decode",
            "no number, the port is left out; write the one that the backends listen on",
        );
    }
    Some(SlicePort { name, protocol, port: port? })
}

/// Reads an Endpoints object: one slice for each subset and family.
pub(crate) fn endpoints(
    found: &mut Findings,
    at: At<'_>,
    identity: &Identity,
    subsets: &List<Object<Subset>>,
) -> Vec<Slice> {
    let mut slices = Vec::new();
    if identity.headless {
        return slices;
    }
    let at = at.key("subsets");
    for (index, item) in found.list(at, subsets).iter().enumerate() {
        let at = at.index(index);
        let Some(raw) = found.object(at, item) else { continue };
        let ports = ports(found, at.key("ports"), &raw.ports);
        let mut all = addresses(found, at.key("addresses"), &raw.addresses, true);
        all.extend(addresses(found, at.key("notReadyAddresses"), &raw.not_ready, false));
        let (v4, v6): (Vec<_>, Vec<_>) = all.into_iter().partition(|endpoint| endpoint.address.is_ipv4());
        for (family, endpoints) in [(Family::V4, v4), (Family::V6, v6)] {
            if !endpoints.is_empty() {
                let name = SliceName::Endpoints(identity.name.clone(), index, family);
                slices.push(Slice { name, service: identity.name.clone(), family, ports: ports.clone(), endpoints });
            }
        }
    }
    slices
}

fn addresses(found: &mut Findings, at: At<'_>, list: &List<Object<Address>>, ready: bool) -> Vec<Endpoint> {
    let items = found.list(at, list);
    let mut endpoints = Vec::with_capacity(items.len());
    let mut unreadable = false;
    for (index, item) in items.iter().enumerate() {
        let at = at.index(index);
        let Some(raw) = found.object(at, item) else { continue };
        let ip = at.key("ip");
        if matches!(raw.ip, Scalar::Absent | Scalar::Null) {
            found.error(ip, "missing; write the address of a backend");
        }
        let address = address(found, ip, &raw.ip);
        let node = found.text(at.key("nodeName"), &raw.node_name);
        let pod = pod(found, at.key("targetRef"), &raw.target_ref);
        let hostname = hostname(found, at, &raw.hostname);
        unreadable |= address.is_err();
        let Ok(Some(address)) = address else { continue };
        endpoints.push(Endpoint {
            address,
            ready,
            serving: ready,
            terminating: false,
            node,
            zone: None,
            zone_hints: Rare::default(),
            node_hints: Rare::default(),
            pod,
            hostname,
        });
    }
    refuse_if_all_unreadable(found, at, unreadable, &endpoints);
    endpoints
}

/// Without backends, a Service would turn everybody away for a slip of the pen.
fn refuse_if_all_unreadable(found: &mut Findings, at: At<'_>, unreadable: bool, endpoints: &[Endpoint]) {
    if unreadable && endpoints.is_empty() {
        found.error(at, "no address that can be read");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Content, Decoded, decode};
    use crate::name::ObjectName;

    fn decoded(body: &str) -> Decoded {
        let head = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-1\n  labels: {kubernetes.io/service-name: web}\n";
        decode(format!("{head}{body}").as_bytes(), "a.yaml")
    }

    fn slices(decoded: &Decoded) -> Vec<Arc<Slice>> {
        let contents = decoded.objects.iter().map(|entry| match &entry.content {
            Content::Slices(slices) => slices.to_vec(),
            Content::Service(_) => panic!("a Service"),
        });
        contents.flatten().collect()
    }

    fn slice(body: &str) -> Arc<Slice> {
        let decoded = decoded(body);
        slices(&decoded).pop().unwrap_or_else(|| panic!("no slice: {:?}", decoded.problems))
    }

    fn messages(decoded: &Decoded) -> Vec<&str> {
        decoded.problems.iter().map(|problem| &*problem.message).collect()
    }

    #[test]
    fn given_a_full_slice_when_read_then_each_field_is_taken() {
        let slice = slice(
            "addressType: IPv4\nports: [{name: http, port: 8000, appProtocol: http}]\nendpoints:\n- addresses: [10.0.0.1]\n  conditions: {ready: false, serving: true, terminating: true}\n  nodeName: here\n  zone: a\n  hints: {forZones: [{name: a}], forNodes: [{name: here}]}\n  targetRef: {kind: Pod, name: web-x}\n  hostname: x\n",
        );

        let endpoint = &slice.endpoints[0];
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), (false, true, true));
        assert_eq!((endpoint.node.as_deref(), endpoint.zone.as_deref()), (Some("here"), Some("a")));
        assert_eq!((endpoint.zone_hints.len(), endpoint.node_hints.len()), (1, 1));
        assert_eq!(endpoint.pod.as_deref(), Some("web-x"));
        assert_eq!(slice.ports, [SlicePort { name: "http".into(), protocol: Default::default(), port: 8000 }]);
        assert_eq!(slice.service, ObjectName::parse("default/web"));
    }

    #[test]
    fn t040_t041_given_ports_without_name_or_number_when_read_then_they_are_left_out() {
        let decoded = decoded(
            "addressType: IPv4\nports:\n- {name: null, port: 1}\n- {name: a}\n- {name: b, port: 0}\n- {name: '', port: 2}\n- {port: 3}\nendpoints: []\n",
        );

        let numbers: Vec<u16> = slices(&decoded)[0].ports.iter().map(|port| port.port).collect();
        assert_eq!(numbers, [2, 3]);
        assert_eq!(decoded.problems.len(), 3);
        assert!(decoded.whole);
    }

    #[test]
    fn t044_given_more_or_no_addresses_when_read_then_the_first_counts() {
        let decoded = decoded(
            "addressType: IPv4\nports: [{port: 1}]\nendpoints:\n- addresses: [10.0.0.1, 10.0.0.2]\n- addresses: []\n",
        );

        assert_eq!(slices(&decoded)[0].endpoints.len(), 1);
        assert!(messages(&decoded)[0].starts_with("endpoints[0].addresses: only the first address is used"));
    }

    #[test]
    fn t045_given_no_conditions_when_read_then_ready_serving_and_not_terminating() {
        let slice = slice("addressType: IPv4\nports: [{port: 1}]\nendpoints: [{addresses: [10.0.0.1]}]\n");

        let endpoint = &slice.endpoints[0];
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), (true, true, false));
    }

    #[test]
    fn t049_given_fqdn_or_a_wrong_family_when_read_then_it_is_left_out_with_a_warning() {
        let names = decoded("addressType: FQDN\nports: [{port: 1}]\nendpoints: [{addresses: [db.example]}]\n");
        let mixed = decoded(
            "addressType: IPv4\nports: [{port: 1}]\nendpoints: [{addresses: ['fd00::1']}, {addresses: [10.0.0.1]}]\n",
        );

        assert!(slices(&names).is_empty() && names.whole && names.problems.len() == 1);
        assert_eq!(slices(&mixed)[0].endpoints.len(), 1);
        assert_eq!(mixed.problems[0].reason, "family");
    }

    #[test]
    fn t050_given_zeros_in_front_when_read_then_they_are_decimal() {
        let slice = slice(
            "addressType: IPv4\nports: [{port: 1}]\nendpoints: [{addresses: [10.0.0.011]}, {addresses: ['::ffff:10.0.0.12']}]\n",
        );

        let addresses: Vec<String> = slice.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
        assert_eq!(addresses, ["10.0.0.11", "10.0.0.12"]);
    }

    #[test]
    fn t051_given_no_service_label_when_read_then_the_slice_is_refused() {
        let text = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1}\naddressType: IPv4\n";

        let decoded = decode(text.as_bytes(), "a.yaml");

        assert!(slices(&decoded).is_empty() && !decoded.whole);
        assert!(messages(&decoded)[0].contains("kubernetes.io/service-name is missing"));
    }

    #[test]
    fn given_no_address_type_when_read_then_the_slice_is_refused_with_its_path() {
        let missing = decoded("ports: [{port: 1}]\nendpoints: [{addresses: [10.0.0.1]}]\n");

        assert_eq!(messages(&missing), ["addressType: missing; write IPv4 or IPv6"]);
        assert!(missing.objects.is_empty());
    }

    #[test]
    fn f4_given_addresses_none_of_which_can_be_read_when_read_then_the_slice_is_refused_as_a_whole() {
        let decoded = decoded("addressType: IPv4\nports: [{port: 1}]\nendpoints: [{addresses: [10.0.0.300]}]\n");

        assert!(decoded.objects.is_empty() && !decoded.whole, "the last good one stays");
        assert!(messages(&decoded).contains(&"endpoints: no address that can be read"), "{decoded:?}");
    }

    #[test]
    fn f4_given_an_address_that_is_none_when_read_then_that_endpoint_is_left_out_and_the_others_stay() {
        let endpoints = "endpoints: [{addresses: [10.0.0.1]}, {addresses: [10.0.0.300]}, {addresses: [10.0.0.2]}]\n";

        let decoded = decoded(&format!("addressType: IPv4\nports: [{{port: 1}}]\n{endpoints}"));

        assert_eq!(slices(&decoded)[0].endpoints.len(), 2);
        let said = "endpoints[1].addresses[0]: \"10.0.0.300\" is not an IP address, the endpoint is left out";
        assert_eq!(messages(&decoded), [said]);
        assert!(decoded.whole && decoded.rejected.is_empty());
    }

    #[test]
    fn given_null_lists_when_read_then_they_are_empty() {
        let slice = slice("addressType: IPv4\nports: null\nendpoints: null\n");

        assert!(slice.ports.is_empty() && slice.endpoints.is_empty());
    }

    #[test]
    fn given_a_slice_of_a_headless_service_when_read_then_it_is_kept_for_dns_alone() {
        let text = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-1\n  labels: {kubernetes.io/service-name: web, service.kubernetes.io/headless: ''}\naddressType: IPv4\nendpoints: [{addresses: [10.0.0.1], hostname: web-0}]\nports: [{name: http, port: 80}]\n";

        let decoded = decode(text.as_bytes(), "a.yaml");

        assert!(slices(&decoded).is_empty() && decoded.problems.is_empty());
        let headless = decoded.objects[0].headless.as_ref().expect("it is kept");
        assert_eq!(headless.service.to_string(), "default/web");
        assert_eq!(headless.endpoints[0].hostname.first().map(|name| &**name), Some("web-0"));
    }

    #[test]
    fn given_a_v1beta1_slice_when_read_then_topology_stands_for_node_and_zone() {
        let text = "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata:\n  name: web-1\n  labels: {kubernetes.io/service-name: web}\naddressType: IPv4\nendpoints:\n- addresses: [10.0.0.1]\n  topology: {kubernetes.io/hostname: here, topology.kubernetes.io/zone: a}\nports: [{name: '', port: 1}]\n";

        let decoded = decode(text.as_bytes(), "a.yaml");

        let endpoint = &slices(&decoded)[0].endpoints[0];
        assert_eq!((endpoint.node.as_deref(), endpoint.zone.as_deref()), (Some("here"), Some("a")));
        assert!(decoded.problems.is_empty());
    }

    #[test]
    fn t229_given_endpoints_when_read_then_each_subset_and_family_is_a_slice() {
        let text = "apiVersion: v1\nkind: Endpoints\nmetadata: {name: mysql, namespace: db}\nsubsets:\n- addresses: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]\n  notReadyAddresses: [{ip: 10.0.0.2}]\n  ports: [{port: 3306}]\n- addresses: [{ip: 10.0.0.3}]\n  ports: [{port: 3307}]\n";

        let decoded = decode(text.as_bytes(), "a.yaml");

        let slices = slices(&decoded);
        let owner = ObjectName::parse("db/mysql");
        let names: Vec<_> = slices.iter().map(|slice| slice.name.clone()).collect();
        assert_eq!(
            names,
            [(0, Family::V4), (0, Family::V6), (1, Family::V4)].map(|(subset, family)| SliceName::Endpoints(
                owner.clone(),
                subset,
                family
            ))
        );
        assert_eq!(slices[0].service, owner);
        assert_eq!(slices[0].endpoints.iter().map(|endpoint| endpoint.ready).collect::<Vec<_>>(), [true, false]);
        assert_eq!((&*slices[2].ports[0].name, slices[2].ports[0].port), ("", 3307));
        assert!(decoded.problems.is_empty());
    }
}
