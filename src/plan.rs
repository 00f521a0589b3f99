//! Desired state and its difference: who listens where, on which backends, and the steps to get there.
//!
//! Pure: no clock, no socket. Endpoints are chosen in `endpoints`; steps are carried out in `serve`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::endpoints::{Node, Usable};
use crate::model::Model;
use crate::name::{BalancerKey, ListenKey, ObjectName, Scope, ServicePortName};

/// What shapes a plan besides the objects. Owned by `control`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// This node.
    pub node: Node,
    /// The addresses that node ports are served on: `--nodeport-addresses`, resolved by `host`.
    pub node_port_addresses: Vec<IpAddr>,
    /// External IPs are served only inside these. From `--allowed-external-cidrs`; empty refuses all.
    pub allowed_external_cidrs: Vec<IpNet>,
    /// Take exactly the Services that are labelled so; `None`: exactly those without the label. From `--proxy-name`.
    pub proxy_name: Option<String>,
    /// Extra listeners. From `--expose`.
    pub expose: Vec<Expose>,
    /// Take endpoints on loopback addresses: true in static mode, false with the API source (CVE-2021-25737).
    pub allow_loopback_endpoints: bool,
}

/// One `--expose LISTEN=NAMESPACE/SERVICE:PORT`: a Service port on one more local address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expose {
    /// The local address and port.
    pub listen: std::net::SocketAddr,
    /// The Service.
    pub service: ObjectName,
    /// Name or number of its port.
    pub port: String,
}

/// Why a listener exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ListenerKind {
    /// `spec.clusterIPs` and `ports[].port`.
    #[serde(rename = "clusterIP")]
    ClusterIp,
    /// A node address and `ports[].nodePort`.
    NodePort,
    /// `spec.externalIPs` and `ports[].port`.
    #[serde(rename = "externalIP")]
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip` and `ports[].port`.
    #[serde(rename = "loadBalancerIP")]
    LoadBalancerIp,
    /// `--expose`.
    Exposed,
}

/// What happens to new traffic on one side of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// A backend of the scope gets it.
    Serve,
    /// Nobody can: connection refused, port unreachable.
    Reject,
    /// Somebody on another node could, but policy Local forbids it: no answer at all.
    Drop,
}

/// One side of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The endpoints that the traffic policy allows.
    pub scope: Scope,
    /// What follows from them.
    pub verdict: Verdict,
}

/// Where a listener's traffic goes. *Inside* is a source on this node or in one of its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// For everybody else.
    pub outside: Side,
    /// For this node and its pods. Differs from `outside` only under externalTrafficPolicy Local.
    pub inside: Side,
}

impl Target {
    /// True where no side serves and none drops: the port is held, and connections are refused.
    pub fn parked(&self) -> bool {
        self.outside.verdict == Verdict::Reject && self.inside.verdict == Verdict::Reject
    }
}

/// A listener as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Whose traffic arrives there. With the key's family and a side's scope this names the balancer.
    pub port: ServicePortName,
    /// Why it exists.
    pub kind: ListenerKind,
    /// True where the static source chose the address or the number.
    pub allocated: bool,
    /// Where its traffic goes.
    pub target: Target,
}

/// A balancer as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backends {
    /// How long a client stays with its backend; `None` without affinity.
    pub affinity_timeout: Option<Duration>,
    /// Its endpoints.
    pub usable: Usable,
}

/// Desired state: listeners and balancers, ordered by their keys.
///
/// Each listener's sides that serve name a balancer that is in the same layout.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// What to choose from.
    pub balancers: BTreeMap<BalancerKey, Backends>,
    /// Where to listen.
    pub listeners: BTreeMap<ListenKey, Listener>,
}

/// One change of the running state. A list of steps is carried out in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Store a balancer's table; make the balancer where it is new.
    Swap(BalancerKey, Backends),
    /// Give a live listener another target or owner; it stays bound.
    Point(ListenKey, Listener),
    /// A parked listener serves (or drops) again.
    Revive(ListenKey, Listener),
    /// Close a listener; its open connections go on.
    Unbind(ListenKey),
    /// Open a listener (parked at once where its target says so).
    Bind(ListenKey, Listener),
    /// Hold the port, refuse what comes.
    Park(ListenKey, Listener),
    /// No listener needs this balancer any more.
    Retire(BalancerKey),
}

/// The steps from one layout to another.
///
/// Order: swaps, points, revives, the unbinds, binds, parks, retirements: no listener is ever without a target.
pub fn diff(from: &Layout, to: &Layout) -> Vec<Step> {
    let _ = (from, to);
    Vec::new()
}

/// Something about an object that a person should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Kind and name: `Service default/web`; a file's path where no object could be read.
    pub object: String,
    /// The file that the object came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Line in the file, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// Column in the line, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<u64>,
    /// One word of the event vocabulary.
    pub reason: Cow<'static, str>,
    /// What is wrong, with field and value, and what to do.
    pub message: String,
    /// How bad it is.
    pub severity: Severity,
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Probably a mistake; the rest of the object is used.
    Warning,
    /// The object, or a part of it, is not used.
    Error,
}

/// What is planned for one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// Why nothing of it is served, as a word; `None` where it is.
    pub skipped: Option<&'static str>,
    /// Its listeners and balancers, before conflicts with other Services are settled.
    pub wanted: Layout,
    /// What is wrong with it by itself.
    pub problems: Vec<Problem>,
}

/// The plan of all Services. Owned by `control`, by value.
#[derive(Debug, Default)]
pub struct Plan {
    services: BTreeMap<ObjectName, ServicePlan>,
}

impl Plan {
    /// Plans the dirty Services anew and returns the steps from the old plan to the new one.
    ///
    /// Work is proportional to the dirty Services and to who shares a listen key with them.
    pub fn update(&mut self, model: &Model, dirty: &BTreeSet<ObjectName>, options: &PlanOptions) -> Vec<Step> {
        let _ = (model, dirty, options, &self.services);
        Vec::new()
    }
}
