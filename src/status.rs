//! What people and programs see of a plan and of a running relay: one shape for `check`, `/status` and `status`.
//!
//! A report without its live parts is what `check` prints; with them it is what `/status` answers.
//! Its text form is in `describe`; serving it over HTTP is `admin`; Prometheus text is `metrics`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::choice::{Choice, choices};
use crate::contact::Contact;
use crate::model::{Model, Service, ServicePort, Slice};
use crate::name::{ListenKey, ObjectName, Protocol, Scope, ServicePortName};
use crate::plan::{
    Balance, HeaderVersion, HealthPort, Listener, ListenerKind, Plan, PlanOptions, Problem, ServicePlan, Severity,
    Side, SourceAddress,
};
use crate::recent::Recent;
use crate::rejections::Rejections;
use crate::serve::balancer::{Backend, Balancer, PortState};
use crate::serve::departed::Departed;
use crate::stats::{BackendStats, PROCESS};
use crate::timestamp::rfc3339;

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

impl Report {
    /// The report of a plan. `found` is what the source has to say about its input; it comes first.
    pub fn of(model: &Model, plan: &Plan, found: Vec<Problem>) -> Self {
        let all = found.into_iter().chain(plan.problems().cloned());
        let (notes, problems) = all.partition(|problem| problem.severity == Severity::Note);
        let services = model
            .services()
            .map(|service| ServiceReport::of(service, plan.service(&service.name).map(AsRef::as_ref)))
            .collect();
        Self { services, problems, notes }
    }

    /// The same, telling of each ServicePort why its backends are those: with the model, plan and options that it is of.
    pub fn explained(mut self, model: &Model, plan: &Plan, options: &PlanOptions) -> Self {
        for (report, service) in self.services.iter_mut().zip(model.services()) {
            let Some(planned) = plan.service(&service.name) else { continue };
            let slices: Vec<&Slice> = model.slices(&service.name).map(AsRef::as_ref).collect();
            for (report, port) in report.ports.iter_mut().zip(&service.ports) {
                report.choices = choices(service, port, planned, slices.iter().copied(), options);
            }
        }
        self
    }

    /// How many listeners it names.
    pub fn listener_count(&self) -> usize {
        self.services.iter().flat_map(|service| &service.ports).map(|port| port.listeners.len()).sum()
    }
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
    /// From `spec.clusterIPs` in its order, `None` alone for a headless Service; only from a running relay.
    #[serde(rename = "clusterIPs", default, skip_serializing_if = "Vec::is_empty")]
    pub cluster_ips: Vec<String>,
    /// From `spec.externalName`; only from a running relay.
    #[serde(rename = "externalName", default, skip_serializing_if = "Option::is_none")]
    pub external_name: Option<String>,
    /// Session affinity timeout in seconds; `null` without affinity.
    #[serde(rename = "affinitySeconds")]
    pub affinity_seconds: Option<u64>,
    /// What the health checks of a load balancer are to be told; left out where it is not to ask, or cannot.
    #[serde(rename = "healthCheck", default, skip_serializing_if = "Option::is_none")]
    pub health_port: Option<HealthPortReport>,
    /// From the annotation `kube-relay.dev/balance`; left out where it is by turns.
    #[serde(default, skip_serializing_if = "Balance::is_default")]
    pub balance: Balance,
    /// From the annotation `kube-relay.dev/source-address`; left out where backends see the node's.
    #[serde(rename = "sourceAddress", default, skip_serializing_if = "SourceAddress::is_default")]
    pub source_address: SourceAddress,
    /// Why backends see the node's all the same: what the kernel has refused, with the remedy; only from a running relay, left
    /// out where it has not.
    #[serde(rename = "sourceAddressRefused", default, skip_serializing_if = "Option::is_none")]
    pub source_refusal: Option<String>,
    /// One for each entry of `spec.ports`.
    pub ports: Vec<PortReport>,
}

impl ServiceReport {
    /// The report of one Service: the listeners that it really gets, and the backends behind them.
    pub fn of(service: &Service, planned: Option<&ServicePlan>) -> Self {
        let ports = service.ports.iter().map(|port| PortReport::of(port, planned));
        Self {
            namespace: service.name.namespace.to_string(),
            name: service.name.name.to_string(),
            kind: service.kind.as_str().into(),
            skipped: planned.and_then(|planned| planned.skipped).map(Cow::Borrowed),
            cluster_ips: Vec::new(),
            external_name: None,
            affinity_seconds: service.affinity_timeout.map(|timeout| timeout.as_secs()),
            health_port: planned.and_then(HealthPortReport::of),
            balance: planned.map(|planned| planned.balancing().balance).unwrap_or_default(),
            source_address: planned.map(ServicePlan::source).unwrap_or_default(),
            source_refusal: None,
            ports: ports.collect(),
        }
    }

    /// Whose address its backends see now, if anybody's: the node's, where the kernel lets it have no other.
    pub(crate) fn source_in_use(&self) -> SourceAddress {
        if self.source_refusal.is_some() { SourceAddress::Node } else { self.source_address }
    }

    /// The networks that are let in from outside, over all listeners; `None` where everybody is, empty where nobody.
    pub(crate) fn allowed_networks(&self) -> Option<BTreeSet<IpNet>> {
        let listeners = self.ports.iter().flat_map(|port| &port.listeners);
        let mut lists = listeners.filter_map(|listener| listener.allow_from.as_deref()).peekable();
        lists.peek()?;
        Some(lists.flatten().copied().collect())
    }

    /// The balancers in front that tell who its clients are, over all listeners; `None` where nobody is asked, empty where
    /// nobody is believed.
    pub(crate) fn balancers_in_front(&self) -> Option<BTreeSet<IpNet>> {
        let listeners = self.ports.iter().flat_map(|port| &port.listeners);
        let mut lists = listeners.filter_map(|listener| listener.accept_proxy_from.as_deref()).peekable();
        lists.peek()?;
        Some(lists.flatten().copied().collect())
    }

    /// The PROXY header that its backends get over TCP.
    pub(crate) fn header_to_backends(&self) -> Option<HeaderVersion> {
        self.ports.iter().flat_map(|port| &port.listeners).find_map(|listener| listener.proxy_protocol)
    }
}

/// The health port of a Service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthPortReport {
    /// From `spec.healthCheckNodePort`.
    pub port: u16,
    /// How many of its endpoints are on this node and ready: with 0, load balancers are to pass over the node.
    pub local_endpoints: usize,
    /// Where that is answered: `192.0.2.1:31000`. Empty where it cannot be: the problems tell why.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Whether it is answered; only from a running relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ListenerState>,
}

impl HealthPortReport {
    fn of(planned: &ServicePlan) -> Option<Self> {
        let HealthPort { number, local_endpoints, .. } = **planned.health_port.as_ref()?;
        let keys = planned.open_health_port().into_iter().flat_map(|port| port.keys());
        let addresses = keys.map(|key| key.address().to_string()).collect();
        Some(Self { port: number, local_endpoints, addresses, state: None })
    }
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
    /// Why it is these; from a running relay, and where somebody asks (`explain`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<Choice>,
    /// Counters of the ServicePort; only from a running relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<PortTraffic>,
    /// Counters of each backend; only from a running relay.
    #[serde(rename = "backendTraffic", default, skip_serializing_if = "Vec::is_empty")]
    pub backend_traffic: Vec<BackendTraffic>,
}

impl PortReport {
    fn of(port: &ServicePort, planned: Option<&ServicePlan>) -> Self {
        let is_ours = |name: &ServicePortName| name.port == port.name && name.protocol == port.protocol;
        let listeners = planned.into_iter().flat_map(ServicePlan::listeners);
        let listeners = listeners.filter(|(_, listener)| is_ours(&listener.port));
        let mut listeners: Vec<_> = listeners.map(|(key, listener)| ListenerReport::of(key, listener)).collect();
        listeners.sort_by_key(|listener| listener.kind); // stable: by address within a kind
        Self {
            name: port.name.to_string(),
            protocol: port.protocol,
            port: port.port,
            target_port: port.target_port.as_ref().map(ToString::to_string),
            listeners,
            backends: ScopedBackends {
                cluster: planned.and_then(|planned| addresses(planned, port, Scope::Cluster)),
                local: planned.and_then(|planned| addresses(planned, port, Scope::Local)),
            },
            choices: Vec::new(),
            traffic: None,
            backend_traffic: Vec::new(),
        }
    }
}

/// The picks of a ServicePort in one scope, over both families; `None` where nobody asks for the scope.
fn addresses(planned: &ServicePlan, port: &ServicePort, scope: Scope) -> Option<Vec<String>> {
    let mut asked = planned.balancers(port).filter(|(key, _)| key.scope == scope).peekable();
    asked.peek()?;
    let picks = asked.flat_map(|(_, backends)| &*backends.usable.picks);
    Some(picks.map(|endpoint| endpoint.address().to_string()).collect())
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
    /// Who may come at all; left out where everybody may.
    #[serde(rename = "sourceRanges", default, skip_serializing_if = "Vec::is_empty")]
    pub source_ranges: Vec<IpNet>,
    /// Who may come from outside, this node and its pods apart; left out where everybody may, empty where nobody.
    #[serde(rename = "allowFrom", default, skip_serializing_if = "Option::is_none")]
    pub allow_from: Option<Vec<IpNet>>,
    /// The PROXY header that backends get: `v1` or `v2`; left out where they get none.
    #[serde(rename = "proxyProtocol", default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<HeaderVersion>,
    /// The balancers in front whose PROXY headers tell who the clients are; left out where nobody is asked for one.
    #[serde(rename = "acceptProxyFrom", default, skip_serializing_if = "Option::is_none")]
    pub accept_proxy_from: Option<Vec<IpNet>>,
    /// Whether it is bound; only from a running relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ListenerState>,
}

impl ListenerReport {
    fn of(key: &ListenKey, listener: &Listener) -> Self {
        let proxy_protocol = listener.proxy_protocol.as_deref();
        Self {
            kind: listener.kind,
            address: key.address().to_string(),
            allocated: listener.allocated,
            outside: listener.target.outside,
            inside: listener.target.inside,
            source_ranges: listener.source_ranges.to_vec(),
            allow_from: listener.allow_from.as_ref().map(|nets| nets.to_vec()),
            proxy_protocol: proxy_protocol.and_then(|protocol| protocol.send),
            accept_proxy_from: proxy_protocol.and_then(|protocol| protocol.accept_from.as_deref()).map(<[_]>::to_vec),
            state: None,
        }
    }
}

/// Whether a listener of a running relay is bound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "is")]
pub enum ListenerState {
    /// Accepts.
    Serving,
    /// Holds the port and refuses.
    Parked,
    /// Closed for good, as the process is stopping.
    Closed,
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
    /// Clients whose backend session affinity remembers; left out without session affinity.
    #[serde(rename = "affinityPins", default, skip_serializing_if = "Option::is_none")]
    pub affinity_pins: Option<u64>,
    /// Whom backends saw; left out where nobody has asked for clients' addresses.
    #[serde(default, skip_serializing_if = "SourceTraffic::is_empty")]
    pub sources: SourceTraffic,
}

/// Whom the backends of a ServicePort saw that wants its clients' addresses preserved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceTraffic {
    /// Connections and flows that were begun from the client's address.
    pub preserved: u64,
    /// Those that were begun from the node's, by reason; reasons at 0 are left out.
    #[serde(default)]
    pub fallbacks: BTreeMap<Cow<'static, str>, u64>,
}

impl SourceTraffic {
    /// True where there was none.
    pub fn is_empty(&self) -> bool {
        self.preserved == 0 && self.fallbacks.is_empty()
    }
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
    /// Seconds until it is tried again, as it could not be reached again and again; 0: the next client tries it. Left out
    /// where it gets its share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected_seconds: Option<u64>,
    /// Seconds until a client's address is tried again, as its answers to those do not come by this node; 0: the next
    /// connection tries it. Left out where they do, or nobody has asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_way_back_seconds: Option<u64>,
    /// How often it was ejected.
    #[serde(default)]
    pub ejections: u64,
    /// Failed tries, by reason; reasons at 0 are left out.
    pub connect_failures: BTreeMap<Cow<'static, str>, u64>,
    /// Ends, by reason; reasons at 0 are left out.
    pub closed: BTreeMap<Cow<'static, str>, u64>,
}

/// A running relay at one moment. Made by `control` after each change; counters are read when it is rendered.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Grows by one with each batch of events that changed something.
    pub revision: u64,
    /// True once the source has delivered its first complete state.
    pub synced: bool,
    /// True once the listeners are closed for good, as the process is stopping.
    pub stopping: bool,
    /// All Services.
    pub services: BTreeMap<ObjectName, Arc<ServiceStatus>>,
    /// Listeners that could not be bound; all others are bound, unless the process is stopping.
    pub failed: Arc<BTreeMap<ListenKey, ListenerState>>,
    /// Services whose health port could not be bound at one of its addresses; so it is at none.
    pub failed_health_ports: Arc<BTreeMap<ObjectName, ListenerState>>,
    /// What the plan and the source found wrong or worth knowing.
    pub problems: Arc<Vec<Problem>>,
    /// How the source does.
    pub source: SourceStatus,
    /// Whether the source hears from its API server; says nothing with a static source.
    pub contact: Arc<Contact>,
    /// What has happened to Services since the first complete state.
    pub recent: Arc<Recent>,
    /// How this process has taken over from another one; `None` where it has not.
    pub upgrade: Option<Arc<UpgradeStatus>>,
    /// What counts as this node and its pods.
    pub inside: Arc<[IpNet]>,
    /// What shaped the plan besides the objects: to tell why endpoints are not used.
    pub options: Arc<PlanOptions>,
}

/// A hand-over from another process to this one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeStatus {
    /// When it was done, as in RFC 3339.
    pub at: String,
    /// The other process, as it knows itself: the number may be one of another pod.
    pub from_pid: u32,
    /// Version of its program.
    pub from_version: String,
    /// Listeners that go on with its sockets.
    pub listeners: usize,
    /// Connections that go on.
    pub streams: usize,
    /// UDP flows that go on.
    pub flows: usize,
    /// How long these stood still, in milliseconds.
    pub standstill_ms: u64,
    /// How long all of it took, from the question to that this process served, in milliseconds.
    pub elapsed_ms: u64,
}

/// An upgrade from this process that came to nothing: it serves as before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeFailure {
    /// When that was, as in RFC 3339.
    pub at: String,
    /// A word of [`UpgradeResult`](crate::stats::UpgradeResult).
    pub result: Cow<'static, str>,
}

impl UpgradeFailure {
    /// The last one of this process; `None` where there was none.
    pub fn of_process() -> Option<Self> {
        let (result, at) = PROCESS.upgrade_failure.get()?;
        Some(Self { at: rfc3339(at), result: result.as_str().into() })
    }

    /// `upgrade failed 2026-01-02T03:04:05Z (timeout)`: for who has room for a few words.
    pub fn gist(&self) -> String {
        format!("upgrade failed {} ({})", self.at, self.result)
    }
}

impl UpgradeStatus {
    /// `upgraded 2026-01-02T03:04:05Z, stood still 7 ms`: for who has room for a few words.
    pub fn gist(&self) -> String {
        format!("upgraded {}, stood still {} ms", self.at, self.standstill_ms)
    }
}

/// How a source does. Sent by the source with each of its reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceStatus {
    /// `static` or `kubernetes`.
    pub kind: Cow<'static, str>,
    /// True where the last read was taken whole; of an API source, where its server answers.
    pub last_reload_successful: bool,
    /// How many different states were taken as a whole: of an API source, lists that brought something new.
    pub config_revision: u64,
    /// How many versions of objects were rejected since the start, by kind and reason: by the source, which cannot read
    /// them, or by the plan, which cannot serve them or a part of them.
    #[serde(default, skip_serializing_if = "Rejections::is_empty")]
    pub rejections: Rejections,
}

/// One Service of a running relay: what its report is made of when somebody asks.
#[derive(Clone, Debug)]
pub struct ServiceStatus {
    /// What the source says.
    pub service: Arc<Service>,
    /// What was made of it.
    pub plan: Arc<ServicePlan>,
    /// Its slices, shared with the model: endpoints that the plan does not use are told from these.
    pub slices: Box<[Arc<Slice>]>,
    /// For each entry of `service.ports`: where its counters are.
    pub ports: Box<[PortCounters]>,
}

/// Where the counters of one ServicePort are.
#[derive(Clone, Debug, Default)]
pub struct PortCounters {
    /// Counters of the ServicePort; `None` where nothing of it is served.
    pub state: Option<Arc<PortState>>,
    /// Its backends of both scopes and families, by address.
    pub backends: Arc<[Arc<Backend>]>,
    /// Those that were among them; `None` where there are none.
    pub departed: Option<Arc<Departed>>,
    /// Who chooses among them, for each family and scope that a listener asks for.
    pub balancers: Box<[Arc<Balancer>]>,
}

impl PortCounters {
    /// The counters of all its backends, those that left among them: a sum over these does not fall as one of them goes.
    pub fn carried(&self) -> impl Iterator<Item = &BackendStats> {
        let here = self.backends.iter().filter_map(|backend| backend.stats.made());
        here.chain(self.departed.iter().flat_map(|departed| departed.stats()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;
    use crate::model::{ClusterIps, Endpoint, Event, Objects, ServiceKind, Slice, TrafficPolicy};
    use crate::plan::PlanOptions;

    fn report(services: Vec<Service>, slices: Vec<Slice>, found: Vec<Problem>) -> Report {
        let node_port_addresses = vec![[127, 0, 0, 1].into(), "::1".parse().expect("an address")];
        let options = PlanOptions { node_port_addresses, ..PlanOptions::default() };
        let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), BTreeSet::new());
        model.apply(Event::Replace(Objects::new(services, slices)), &mut dirty);
        plan.update(&model, &dirty, &options);
        Report::of(&model, &plan, found)
    }

    #[test]
    fn given_a_plan_when_reported_then_the_document_has_the_published_shape() {
        let mut web = Service::new("default/web").port("http", 80).node_port(30000);
        let addresses = vec![[127, 96, 0, 10].into()];
        web.cluster_ips = ClusterIps::Addresses { addresses, allocated: true };
        web.external_policy = TrafficPolicy::Local;
        web.ports[0].target_port = Some("8000".into());
        let slice = Slice::new("web-1", &web).port("http", 8000).endpoint(Endpoint::new([10, 244, 0, 2]));

        let report = report(vec![web, Service::new("db")], vec![slice], vec![]);

        let serve = json!({"scope": "Cluster", "verdict": "serve"});
        assert_eq!(
            serde_json::to_value(&report).expect("a report is JSON"),
            json!({
                "services": [
                    {
                        "namespace": "default", "name": "db", "type": "ClusterIP",
                        "skipped": "unallocated", "affinitySeconds": null, "ports": [],
                    },
                    {
                        "namespace": "default", "name": "web", "type": "NodePort",
                        "skipped": null, "affinitySeconds": null,
                        "ports": [{
                            "name": "http", "protocol": "TCP", "port": 80, "targetPort": "8000",
                            "listeners": [
                                {
                                    "kind": "clusterIP", "address": "127.96.0.10:80", "allocated": true,
                                    "outside": serve, "inside": serve,
                                },
                                {
                                    "kind": "nodePort", "address": "127.0.0.1:30000", "allocated": false,
                                    "outside": {"scope": "Local", "verdict": "drop"}, "inside": serve,
                                },
                            ],
                            "backends": {"Cluster": ["10.244.0.2:8000"], "Local": []},
                        }],
                    },
                ],
                "problems": [],
            })
        );
    }

    #[test]
    fn given_problems_and_notes_when_reported_then_each_is_in_its_own_list_and_the_sources_come_first() {
        let mut note = Problem::error("web.yaml", "decode", "kind Deployment: passed over");
        note.severity = Severity::Note;
        let broken = Problem::error("db.yaml", "decode", "cannot be read");
        let mut web = Service::new("web").cluster_ip([10, 96, 0, 10]).port("http", 80);
        web.external_ips = vec![[203, 0, 113, 1].into()].into();

        let report = report(vec![web], vec![], vec![note.clone(), broken]);

        assert_eq!(report.notes, [note]);
        let reasons: Vec<_> = report.problems.iter().map(|problem| &*problem.reason).collect();
        assert_eq!(reasons, ["decode", "external_ip"]);
    }

    #[test]
    fn given_a_health_port_when_reported_then_it_is_told_where_it_is_answered() {
        let web = Service {
            kind: ServiceKind::LoadBalancer,
            external_policy: TrafficPolicy::Local,
            health_check_node_port: Some(31000),
            ..Service::new("web").cluster_ip([10, 96, 0, 10]).port("http", 80)
        };

        let report = report(vec![web], vec![], vec![]);

        assert_eq!(
            serde_json::to_value(&report.services[0].health_port).expect("a report is JSON"),
            json!({"port": 31000, "localEndpoints": 0, "addresses": ["127.0.0.1:31000", "[::1]:31000"]})
        );
    }
}
