//! The last state of an API server that was served, kept in a file: what a relay begins with when the server is away.
//!
//! The file is a manifest, one JSON object a line, and `run -f` reads it, too. Only what a proxy reads of an object is in it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::Instant;

use crate::decode::decode;
use crate::decode_service::PREFIX;
use crate::model::{ClusterIps, Endpoint, Objects, Service, ServiceKind, ServicePort, Slice, SliceName, TrafficPolicy};
use crate::name::Family;
use crate::own_node::OwnNode;
use crate::timestamp::rfc3339;

/// Its name in `--state-dir`.
const FILE: &str = "last-known-good.json";
/// How often the state is saved, where it changed.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// What is kept.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Services and endpoints.
    pub(crate) objects: Objects,
    /// The Node that the relay ran on.
    pub(crate) node: Option<OwnNode>,
}

/// A state that was read back.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) state: State,
    /// When it was written.
    pub(crate) at: SystemTime,
}

/// Who keeps the last state in its file.
#[derive(Debug)]
pub(crate) struct Keeper {
    path: Option<PathBuf>,
    /// When to save next.
    due: Option<Instant>,
    running: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Of the file at this path; of none, without.
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        Self { path, due: None, running: None }
    }

    /// When to save next.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The first change is saved at once, others with those that follow it.
    pub(crate) fn note(&mut self, changed: bool) {
        if changed && self.path.is_some() && self.due.is_none() {
            let wait = if self.running.is_some() { SAVE_INTERVAL } else { Duration::ZERO };
            self.due = Some(Instant::now() + wait);
        }
    }

    /// On a thread of its own, as disks may be slow.
    pub(crate) fn save(&mut self, state: State) {
        self.due = None;
        let Some(path) = self.path.clone() else { return };
        if self.running.as_ref().is_some_and(|running| !running.is_finished()) {
            self.due = Some(Instant::now() + SAVE_INTERVAL);
            return;
        }
        self.running = Some(spawn_blocking(move || {
            if let Err(error) = save(&path, &state) {
                tracing::warn!(file = %path.display(), %error, "the state cannot be saved for the next start");
            }
        }));
    }
}

/// Where the file of a state folder is.
pub(crate) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// Reads a state; `None` where none was ever saved. What of it cannot be used is left out.
pub(crate) fn load(path: &Path) -> io::Result<Option<Saved>> {
    let (text, at) = match fs::read(path) {
        Ok(text) => (text, fs::metadata(path)?.modified()?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut objects = Objects::default();
    decode(&text, FILE).objects.iter().for_each(|entry| objects.add(&entry.content));
    let empty = objects.services.is_empty() && objects.slices.is_empty();
    let state = State { objects, node: node(&text) };
    Ok((!empty).then_some(Saved { state, at }))
}

/// The Node stands in one of the first lines.
fn node(text: &[u8]) -> Option<OwnNode> {
    let lines = text.split(|byte| *byte == b'\n').take(2);
    let is_node = |value: &Value| value["kind"] == "Node";
    let node = lines.filter_map(|line| serde_json::from_slice(line).ok()).find(is_node)?;
    Some(OwnNode::of(&node))
}

/// Writes a state beside its place and renames it into it: whoever reads sees a whole one, whenever power fails.
pub(crate) fn save(path: &Path, state: &State) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = BufWriter::new(File::create(&new)?);
    let head =
        json!({"apiVersion": "kube-relay.dev/v1alpha1", "kind": "SavedState", "savedAt": rfc3339(SystemTime::now())});
    writeln!(file, "{head}")?;
    if let Some(node) = &state.node {
        writeln!(file, "{}", node.manifest())?;
    }
    for service in &state.objects.services {
        writeln!(file, "{}", service_manifest(service))?;
    }
    for slice in &state.objects.slices {
        writeln!(file, "{}", slice_manifest(slice))?;
    }
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(new, path)
}

/// An object with what is there of its fields.
fn present<const N: usize>(fields: [(&str, Option<Value>); N]) -> Value {
    fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect::<Map<_, _>>().into()
}

/// A list that says something.
fn list<T>(items: &[T], each: impl Fn(&T) -> Value) -> Option<Value> {
    (!items.is_empty()).then(|| items.iter().map(each).collect())
}

fn service_manifest(service: &Service) -> Value {
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
        ("externalName", (service.kind == ServiceKind::ExternalName).then(|| "saved.invalid".into())),
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

fn slice_manifest(slice: &Slice) -> Value {
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
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(text: &[u8]) -> Objects {
        let mut objects = Objects::default();
        decode(text, "a.yaml").objects.iter().for_each(|entry| objects.add(&entry.content));
        objects
    }

    #[test]
    fn given_every_field_when_saved_and_loaded_then_nothing_changed() {
        let folder = tempfile::tempdir().expect("a folder");
        let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/every_field.yaml");
        let state = objects(&fs::read(manifests).expect("the test's manifest"));
        let node = OwnNode { name: "worker-1".into(), zone: Some("eu-1a".into()), ..OwnNode::default() };
        assert!(!state.services.is_empty() && !state.slices.is_empty());
        let named = |state: &Objects| -> Vec<Slice> {
            let plain = |slice: &std::sync::Arc<Slice>| matches!(slice.name, SliceName::EndpointSlice(_));
            state.slices.iter().filter(|slice| plain(slice)).map(|slice| (**slice).clone()).collect()
        };

        let whole = State { objects: state.clone(), node: Some(node.clone()) };
        save(&path(folder.path()), &whole).expect("saved");
        let State { objects: saved, node: saved_node } =
            load(&path(folder.path())).expect("read").expect("there is one").state;

        assert_eq!(saved.services, state.services);
        assert_eq!(named(&saved)[..named(&state).len()], named(&state));
        assert_eq!(saved.slices.len(), state.slices.len());
        assert_eq!(saved_node, Some(node));
    }

    #[test]
    fn f2_given_no_file_or_one_that_is_no_manifest_when_loaded_then_there_is_no_state() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(load(&path(folder.path())).expect("no file is fine").is_none());

        fs::write(path(folder.path()), b"\xff{{{").expect("a file");

        assert!(load(&path(folder.path())).expect("it can be read").is_none());
    }
}
