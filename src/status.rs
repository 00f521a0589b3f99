//! What people and programs see of a plan and of a running relay: one shape for `check`, `/status` and `status`.
//!
//! A report without its live parts is what `check` prints; with them it is what `/status` answers.
//! Serving it over HTTP is `admin`; Prometheus text is `metrics`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::name::{ListenKey, ObjectName, Protocol};
use crate::plan::{ListenerKind, Problem, Side};
use crate::serve::balancer::{Backend, PortState};

/// All Services and all problems: the document that `check -o json` prints.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// By namespace and name.
    pub services: Vec<ServiceReport>,
    /// What a person should mend.
    pub problems: Vec<Problem>,
    /// What a person may want to know: passed-over kinds, Services that wait for slices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<Problem>,
}

/// One Service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceReport {
    /// From `metadata.namespace`.
    pub namespace: String,
    /// From `metadata.name`.
    pub name: String,
    /// From `spec.type`.
    #[serde(rename = "type")]
    pub kind: Cow<'static, str>,
    /// Why it is not served, as a word; `null` where it is.
    pub skipped: Option<Cow<'static, str>>,
    /// Session affinity timeout in seconds; `null` without affinity.
    #[serde(rename = "affinitySeconds")]
    pub affinity_seconds: Option<u64>,
    /// One for each entry of `spec.ports`.
    pub ports: Vec<PortReport>,
}

/// One ServicePort.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PortReport {
    /// From `spec.ports[].name`.
    pub name: String,
    /// From `spec.ports[].protocol`.
    pub protocol: Protocol,
    /// From `spec.ports[].port`.
    pub port: u16,
    /// From `spec.ports[].targetPort`.
    #[serde(rename = "targetPort", default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<String>,
    /// Where it is served.
    pub listeners: Vec<ListenerReport>,
    /// Addresses that may get new traffic.
    pub backends: ScopedBackends,
    /// Counters of the ServicePort; only from a running relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<PortTraffic>,
    /// Counters of each backend; only from a running relay.
    #[serde(rename = "backendTraffic", default, skip_serializing_if = "Vec::is_empty")]
    pub backend_traffic: Vec<BackendTraffic>,
}

/// The backends of a ServicePort by scope; `null` where no listener uses the scope.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ScopedBackends {
    /// For policy Cluster.
    pub cluster: Option<Vec<String>>,
    /// For policy Local.
    pub local: Option<Vec<String>>,
}

/// One listener.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ListenerReport {
    /// Why it exists.
    pub kind: ListenerKind,
    /// `10.96.0.10:80`.
    pub address: String,
    /// True where the static source chose the address or the number.
    pub allocated: bool,
    /// For sources off this node.
    pub outside: Side,
    /// For this node and its pods.
    pub inside: Side,
    /// Whether it is bound; only from a running relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ListenerState>,
}

/// Whether a listener of a running relay is bound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "is")]
pub enum ListenerState {
    /// Accepts.
    Serving,
    /// Holds the port and refuses.
    Parked,
    /// Could not be bound; tried again by itself.
    Failed {
        /// One word of the event vocabulary.
        reason: Cow<'static, str>,
        /// The whole error, with the remedy.
        message: String,
    },
}

/// Counters of one ServicePort.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PortTraffic {
    /// Connections accepted, or flows begun.
    pub accepted: u64,
    /// Tries after a first failed one.
    pub retries: u64,
    /// Turned away, by reason; reasons at 0 are left out.
    pub dropped: BTreeMap<Cow<'static, str>, u64>,
}

/// Counters of one backend.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendTraffic {
    /// `10.244.0.2:8000`.
    pub address: String,
    /// Name of its pod, where a slice says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Connections established.
    pub connections: u64,
    /// Connections open now.
    pub active_connections: u64,
    /// Flows begun.
    pub flows: u64,
    /// Flows open now.
    pub active_flows: u64,
    /// Payload bytes to it.
    pub upstream_bytes: u64,
    /// Payload bytes from it.
    pub downstream_bytes: u64,
    /// Datagrams to it.
    pub upstream_datagrams: u64,
    /// Datagrams from it.
    pub downstream_datagrams: u64,
    /// Failed tries, by reason; reasons at 0 are left out.
    pub connect_failures: BTreeMap<Cow<'static, str>, u64>,
    /// Ends, by reason; reasons at 0 are left out.
    pub closed: BTreeMap<Cow<'static, str>, u64>,
}

/// A running relay at one moment. Made by `control` after each change; counters are read when it is rendered.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Grows by one with each applied batch of events.
    pub revision: u64,
    /// True once the source has delivered its first complete state.
    pub synced: bool,
    /// All Services.
    pub services: BTreeMap<ObjectName, Arc<ServiceStatus>>,
    /// Listeners that could not be bound; all others are bound.
    pub failed: Arc<BTreeMap<ListenKey, ListenerState>>,
    /// What the plan and the source found wrong or worth knowing.
    pub problems: Arc<Vec<Problem>>,
    /// How the source does.
    pub source: SourceStatus,
}

/// How a source does. Sent by the source with each of its reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceStatus {
    /// `static`.
    pub kind: Cow<'static, str>,
    /// True where the last read was taken whole.
    pub last_reload_successful: bool,
    /// How many different states were taken.
    pub config_revision: u64,
}

/// One Service of a running relay.
#[derive(Clone, Debug)]
pub struct ServiceStatus {
    /// The plan's part; states and counters are filled in when it is rendered.
    pub report: ServiceReport,
    /// For each entry of `report.ports`: where its counters are.
    pub ports: Vec<PortCounters>,
}

/// Where the counters of one ServicePort are.
#[derive(Clone, Debug)]
pub struct PortCounters {
    /// Counters of the ServicePort; `None` where nothing of it is served.
    pub state: Option<Arc<PortState>>,
    /// Its backends of both scopes and families, with the pod's name.
    pub backends: Vec<(Arc<Backend>, Option<Arc<str>>)>,
}
