//! Objects of a saved state as manifests: only what a proxy reads of them.
//!
//! The file that they are in is `last_good`; `decode` reads them back.

use serde_json::{Map, Value, json};

use crate::decode_service::PREFIX;
use crate::model::{ClusterIps, Endpoint, Service, ServicePort, Slice, SliceName, TrafficPolicy};
use crate::name::Family;

/// A Service, as far as a proxy reads it.
pub(crate) fn service_manifest(service: &Service) -> Value {
    let text = |text: &std::sync::Arc<str>| Value::from(&**text);
    let labels = present([
        ("service.kubernetes.io/service-proxy-name", service.proxy_name.as_ref().map(text)),
        ("service.kubernetes.io/headless", service.slices_hidden.then(|| "".into())),
    ]);
    let annotations: Map<String, Value> =
        service.annotations.iter().map(|(key, value)| (format!("{PREFIX}{key}"), text(value))).collect();
    let metadata = present([
        ("name", Some(text(&service.name.name))),
        ("namespace", Some(text(&service.name.namespace))),
        ("creationTimestamp", (!service.created.is_empty()).then(|| text(&service.created))),
        ("labels", labels.as_object().is_some_and(|labels| !labels.is_empty()).then_some(labels)),
        ("annotations", (!annotations.is_empty()).then(|| annotations.into())),
    ]);
    let (cluster_ip, cluster_ips) = match &service.cluster_ips {
        ClusterIps::Unset => (None, None),
        ClusterIps::Headless => (Some("None".into()), None),
        ClusterIps::Addresses { addresses, .. } => {
            (addresses.first().map(|ip| ip.to_string().into()), list(addresses, |ip| ip.to_string().into()))
        }
    };
    let local = |policy| (policy == TrafficPolicy::Local).then(|| "Local".into());
    let affinity = service.affinity_timeout.map(|time| json!({"clientIP": {"timeoutSeconds": time.as_secs()}}));
    let spec = present([
        ("type", Some(service.kind.as_str().into())),
        ("externalName", service.external_name.as_ref().map(text)),
        ("clusterIP", cluster_ip),
        ("clusterIPs", cluster_ips),
        ("ipFamilies", list(&service.families, |family| family.to_string().into())),
        ("ports", list(&service.ports, port_manifest)),
        ("externalIPs", list(&service.external_ips, |ip| ip.to_string().into())),
        ("loadBalancerSourceRanges", list(&service.source_ranges, |net| net.to_string().into())),
        ("sessionAffinity", affinity.as_ref().map(|_| "ClientIP".into())),
        ("sessionAffinityConfig", affinity),
        ("externalTrafficPolicy", local(service.external_policy)),
        ("internalTrafficPolicy", local(service.internal_policy)),
        ("healthCheckNodePort", service.health_check_node_port.map(Value::from)),
        ("allocateLoadBalancerNodePorts", (!service.allocate_node_ports).then_some(false.into())),
        ("trafficDistribution", service.traffic_distribution.as_ref().map(text)),
        // That there is one is all that a proxy reads of it.
        ("selector", service.has_selector.then(|| json!({"saved": "true"}))),
    ]);
    let ingress = list(&service.load_balancer_ips, |ip| json!({"ip": ip.to_string()}));
    present([
        ("apiVersion", Some("v1".into())),
        ("kind", Some("Service".into())),
        ("metadata", Some(metadata)),
        ("spec", Some(spec)),
        ("status", ingress.map(|ingress| json!({"loadBalancer": {"ingress": ingress}}))),
    ])
}

fn port_manifest(port: &ServicePort) -> Value {
    let target = |text: &std::sync::Arc<str>| text.parse::<u16>().map_or_else(|_| Value::from(&**text), Value::from);
    present([
        ("name", (!port.name.is_empty()).then(|| Value::from(&*port.name))),
        ("protocol", Some(port.protocol.as_str().into())),
        ("port", Some(port.port.into())),
        ("targetPort", port.target_port.as_ref().map(target)),
        ("nodePort", port.node_port.map(Value::from)),
        ("appProtocol", port.app_protocol.as_ref().map(|text| Value::from(&**text))),
    ])
}

/// A slice; one that comes of Endpoints gets a name of its own.
pub(crate) fn slice_manifest(slice: &Slice) -> Value {
    let (namespace, name) = match &slice.name {
        SliceName::EndpointSlice(name) => (&name.namespace, name.name.to_string()),
        SliceName::Endpoints(name, subset, family) => {
            let family = if *family == Family::V4 { 4 } else { 6 };
            (&name.namespace, format!("{}.endpoints-{subset}-v{family}", name.name))
        }
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": **namespace, "labels": {"kubernetes.io/service-name": *slice.service.name},
        },
        "addressType": slice.family.to_string(),
        "ports": slice.ports.iter().map(|port| {
            json!({"name": *port.name, "protocol": port.protocol.as_str(), "port": port.port})
        }).collect::<Vec<_>>(),
        "endpoints": slice.endpoints.iter().map(endpoint_manifest).collect::<Vec<_>>(),
    })
}

fn endpoint_manifest(endpoint: &Endpoint) -> Value {
    let text = |text: &Option<std::sync::Arc<str>>| text.as_ref().map(|text| Value::from(&**text));
    let names = |names: &[std::sync::Arc<str>]| list(names, |name| json!({"name": **name}));
    let (zones, nodes) = (names(&endpoint.zone_hints), names(&endpoint.node_hints));
    let hints = (zones.is_some() || nodes.is_some()).then(|| present([("forZones", zones), ("forNodes", nodes)]));
    let Endpoint { ready, serving, terminating, .. } = endpoint;
    present([
        ("addresses", Some(json!([endpoint.address.to_string()]))),
        ("conditions", Some(json!({"ready": ready, "serving": serving, "terminating": terminating}))),
        ("nodeName", text(&endpoint.node)),
        ("zone", text(&endpoint.zone)),
        ("hints", hints),
        ("targetRef", endpoint.pod.as_ref().map(|pod| json!({"kind": "Pod", "name": **pod}))),
        ("hostname", endpoint.hostname.first().map(|name| Value::from(&**name))),
    ])
}

/// An object with what is there of its fields.
fn present<const N: usize>(fields: [(&str, Option<Value>); N]) -> Value {
    fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect::<Map<_, _>>().into()
}

/// A list that says something.
fn list<T>(items: &[T], each: impl Fn(&T) -> Value) -> Option<Value> {
    (!items.is_empty()).then(|| items.iter().map(each).collect())
}
