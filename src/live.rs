//! A running relay as a report: states of listeners and counters filled in at the moment of asking.
//!
//! The shapes are in `status`; over HTTP it is served by `admin` (in pieces: `report_pieces`), as text by `overview`, for
//! Prometheus by `metrics`. A line for each Service is all that `summary` tells.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::choice::{self, Choice, Kept, Pin, Unused};
use crate::contact::ContactReport;
use crate::describe::abridged;
use crate::model::ClusterIps;
use crate::name::{ListenKey, ObjectName};
use crate::plan::{Problem, Severity, Target};
use crate::recent::Happened;
use crate::serve::balancer::{Backend, Balancer, PortState};
use crate::serve::gate::remedy;
use crate::serve::moment::Moment;
use crate::stats::{
    BackendStats, CloseReason, ConnectFailure, DropReason, PROCESS, PauseReason, SourceFallback, Tally, WallTime,
};
use crate::status::{
    BackendTraffic, ListenerState, PortCounters, PortTraffic, Report, ServiceReport, ServiceStatus, SourceStatus,
    SourceTraffic, Status, UpgradeStatus,
};

/// What `/status` answers: a report with its live parts, and who answers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LiveReport {
    /// Version of the running program.
    pub version: Cow<'static, str>,
    /// Process id of the running program.
    pub pid: u32,
    /// Grows by one with each batch of events that changed something.
    pub revision: u64,
    /// True once the source has delivered its first complete state.
    pub synced: bool,
    /// How the source does.
    pub source: SourceStatus,
    /// Whether the API server is heard; absent with a static source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contact: Option<ContactReport>,
    /// How this process has taken over from another one; left out where it has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeStatus>,
    /// Why TCP clients wait to be accepted now; left out where none does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pauses: Vec<PauseReport>,
    /// What has happened to Services lately, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recent: Vec<Happened>,
    /// What counts as this node and its pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inside: Vec<IpNet>,
    /// Services and problems.
    #[serde(flatten)]
    pub report: Report,
}

/// That one listener or more accepts nobody, for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseReport {
    /// A word of [`PauseReason`].
    pub reason: Cow<'static, str>,
    /// How long it has been so, in whole seconds.
    pub seconds: u64,
    /// What an operator can do.
    pub remedy: Cow<'static, str>,
}

impl PauseReport {
    /// Those of this process that last at an instant.
    pub(crate) fn of_process(now: Instant) -> Vec<Self> {
        Self::all(&PROCESS.accept_paused, now)
    }

    /// All that last at an instant. The times are by [`PauseReason`].
    fn all(times: &[WallTime; PauseReason::ALL.len()], now: Instant) -> Vec<Self> {
        let lasting = |reason: &PauseReason| {
            let time = times[usize::from(*reason)].lasting(Moment::of(now).0)?;
            Some(Self { reason: reason.as_str().into(), seconds: time.as_secs(), remedy: remedy(*reason).into() })
        };
        PauseReason::ALL.iter().filter_map(lasting).collect()
    }
}

impl LiveReport {
    /// This process's relay as it is now, without its pauses.
    pub fn of(status: &Status) -> Self {
        Self::about(status, status.report())
    }

    /// The same, with this as its report.
    pub(crate) fn about(status: &Status, report: Report) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            revision: status.revision,
            synced: status.synced,
            source: status.source.clone(),
            contact: status.contact.report(),
            upgrade: status.upgrade.as_deref().cloned(),
            pauses: Vec::new(),
            recent: status.recent.iter().cloned().collect(),
            inside: status.inside.to_vec(),
            report,
        }
    }
}

/// A Service that a relay does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{NO_SERVICE}{name}{namesakes}")]
pub struct NoService {
    name: ObjectName,
    /// `, but shop/web`: those of this name in other namespaces; empty where there are none.
    namesakes: String,
}

/// How a [`NoService`] begins.
pub(crate) const NO_SERVICE: &str = "there is no Service ";

impl NoService {
    /// With what there is instead.
    pub(crate) fn of<'n>(name: &ObjectName, all: impl Iterator<Item = &'n ObjectName>) -> Self {
        let same: Vec<_> = all.filter(|other| other.name == name.name).map(ToString::to_string).collect();
        let namesakes = if same.is_empty() { String::new() } else { format!(", but {}", abridged(&same)) };
        Self { name: name.clone(), namesakes }
    }
}

impl LiveReport {
    /// Keeps one Service and what is said about it.
    ///
    /// # Errors
    /// Where there is no such Service.
    pub fn only(mut self, name: &ObjectName) -> Result<Self, NoService> {
        let services = self.report.services.iter();
        let all: Vec<_> = services.map(|service| ObjectName::new(&*service.namespace, &*service.name)).collect();
        self.keep_what_concerns(name);
        if self.report.services.is_empty() { Err(NoService::of(name, all.iter())) } else { Ok(self) }
    }

    /// The same, of one that may not be there.
    pub(crate) fn keep_what_concerns(&mut self, name: &ObjectName) {
        let object = name.to_string();
        self.recent.retain(|happened| happened.service == object);
        self.report.keep_what_concerns(name);
    }
}

impl Report {
    /// Keeps one Service and what is said about it; `None` where there is no such Service.
    pub fn only(mut self, name: &ObjectName) -> Option<Self> {
        self.keep_what_concerns(name);
        if self.services.is_empty() { None } else { Some(self) }
    }

    fn keep_what_concerns(&mut self, name: &ObjectName) {
        let object = name.to_string();
        let concerned = |problem: &Problem| problem.subject() == object;
        self.services.retain(|service| *service.namespace == *name.namespace && *service.name == *name.name);
        self.problems.retain(concerned);
        self.notes.retain(concerned);
    }
}

impl Status {
    /// The report with the state of each listener and all counters, read now.
    pub fn report(&self) -> Report {
        let (notes, problems) = self.notes_and_problems();
        let services = self.services.values().map(|service| service.live(self)).collect();
        Report { services, problems, notes }
    }

    /// What is worth knowing, and what is wrong.
    pub(crate) fn notes_and_problems(&self) -> (Vec<Problem>, Vec<Problem>) {
        let all = self.problems.iter().cloned().chain(self.unpreserved());
        all.partition(|problem| problem.severity == Severity::Note)
    }

    /// Of each Service that wants its clients' addresses preserved, why the kernel does not let it; none where it does.
    pub(crate) fn unpreserved(&self) -> Vec<Problem> {
        let refused =
            |service: &Arc<ServiceStatus>| Some(unpreserved(&service.service.name, &service.source_refusal()?));
        self.services.values().filter_map(refused).collect()
    }

    /// The same of one Service, without the work for all others; `None` where there is none of that name.
    pub fn report_of(&self, name: &ObjectName) -> Option<Report> {
        let services = vec![self.services.get(name)?.live(self)];
        let object = name.to_string();
        let (mut notes, mut problems) = self.notes_and_problems();
        [&mut notes, &mut problems].into_iter().for_each(|said| said.retain(|problem| problem.subject() == object));
        Some(Report { services, problems, notes })
    }

    /// `Serving`, unless both sides refuse (`Parked`), the address is among the failed ones or the process is stopping.
    pub(crate) fn listener_state(&self, key: &ListenKey, target: &Target) -> ListenerState {
        if self.stopping {
            return ListenerState::Closed;
        }
        match self.failed.get(key) {
            Some(state) => state.clone(),
            None if target.parked() => ListenerState::Parked,
            None => ListenerState::Serving,
        }
    }

    /// Of a health port that is to be answered: it is never parked.
    pub(crate) fn health_port_state(&self, service: &ObjectName) -> ListenerState {
        match self.failed_health_ports.get(service) {
            _ if self.stopping => ListenerState::Closed,
            Some(state) => state.clone(),
            None => ListenerState::Serving,
        }
    }
}

fn unpreserved(service: &ObjectName, why: &str) -> Problem {
    let message = format!("kube-relay.dev/source-address: preserve is not done, backends see this node: {why}");
    Problem { severity: Severity::Warning, ..Problem::error(format!("Service {service}"), "reply_path", message) }
}

impl ServiceStatus {
    /// Its report without states and counters.
    pub fn report(&self) -> ServiceReport {
        ServiceReport::of(&self.service, Some(&self.plan))
    }

    /// Why its backends see the node's address, where it wants them to see its clients'.
    fn source_refusal(&self) -> Option<String> {
        let states = self.ports.iter().filter_map(|counters| counters.state.as_ref());
        states.filter_map(|state| state.preserve.refusal()).next()
    }

    /// Its report with states and counters, read now.
    pub(crate) fn live(&self, status: &Status) -> ServiceReport {
        self.live_to(status, None)
    }

    /// The same, with where session affinity keeps this client.
    pub(crate) fn live_to(&self, status: &Status, client: Option<IpAddr>) -> ServiceReport {
        let mut report = self.report();
        report.cluster_ips = match &self.service.cluster_ips {
            ClusterIps::Unset => Vec::new(),
            ClusterIps::Headless => vec!["None".to_owned()],
            ClusterIps::Addresses { addresses, .. } => addresses.iter().map(ToString::to_string).collect(),
        };
        report.external_name = self.service.external_name.as_ref().map(ToString::to_string);
        report.source_refusal = self.source_refusal();
        if let Some(health_port) = report.health_port.as_mut().filter(|port| !port.addresses.is_empty()) {
            health_port.state = Some(status.health_port_state(&self.service.name));
        }
        for port in &mut report.ports {
            for listener in &mut port.listeners {
                let Ok(address) = listener.address.parse() else { continue };
                let target = Target { outside: listener.outside, inside: listener.inside };
                let key = ListenKey::at(address, port.protocol);
                listener.state = Some(status.listener_state(&key, &target));
            }
        }
        let sticky = self.service.affinity_timeout.is_some();
        for ((port, counters), of) in report.ports.iter_mut().zip(&self.ports).zip(&self.service.ports) {
            port.traffic = counters.state.as_ref().map(|state| PortTraffic::of(state, sticky));
            let pods: BTreeMap<_, _> = self.plan.endpoints(of).map(|known| (known.address(), &known.pod)).collect();
            let traffic = |backend: &Arc<Backend>| {
                BackendTraffic::of(backend, pods.get(&backend.address()).and_then(|pod| pod.as_deref()))
            };
            port.backend_traffic = counters.backends.iter().map(traffic).collect();
            let slices = self.slices.iter().map(AsRef::as_ref);
            port.choices = choice::choices(&self.service, of, &self.plan, slices, &status.options);
            let client = client.filter(|_| sticky);
            port.choices.iter_mut().for_each(|choice| counters.complete(choice, client));
        }
        report
    }
}

impl PortCounters {
    /// Adds what only a running relay knows of a choice.
    fn complete(&self, choice: &mut Choice, client: Option<IpAddr>) {
        let of_choice = |balancer: &&Arc<Balancer>| (balancer.family, balancer.scope) == (choice.family, choice.scope);
        let balancer = self.balancers.iter().find(of_choice);
        let now = Instant::now();
        choice.next = balancer.and_then(|balancer| balancer.upcoming(now)).map(|next| next.address());
        choice.pin = balancer.zip(client).map(|(balancer, client)| {
            let kept = balancer.kept(client, now);
            Pin { client, kept: kept.map(|(at, left)| Kept { backend: at.address(), seconds: left.as_secs() }) }
        });
        let backends: BTreeMap<_, _> = self.backends.iter().map(|known| (known.address(), known)).collect();
        for one in choice.endpoints.iter_mut().filter(|one| one.unused.is_none()) {
            let Some(backend) = backends.get(&one.address) else { continue };
            one.unused = backend.is_own().then_some(Unused::OwnListener);
            one.ejected_seconds = ejected_seconds(backend, now);
        }
    }
}

impl PortTraffic {
    fn of(state: &PortState, sticky: bool) -> Self {
        let (stats, sources) = (state.stats.so_far(), state.preserve.stats.so_far());
        Self {
            accepted: stats.accepted.get(),
            retries: stats.retries.get(),
            dropped: counted(&stats.dropped, DropReason::ALL, DropReason::as_str),
            affinity_pins: sticky.then(|| state.affinity.remembered()),
            sources: SourceTraffic {
                preserved: sources.preserved.get(),
                fallbacks: counted(&sources.fallbacks, SourceFallback::ALL, SourceFallback::as_str),
            },
        }
    }
}

impl BackendTraffic {
    fn of(backend: &Backend, pod: Option<&str>) -> Self {
        let BackendStats {
            connections,
            active_connections,
            flows,
            active_flows,
            upstream_bytes,
            downstream_bytes,
            upstream_datagrams,
            downstream_datagrams,
            ejections,
            connect_failures,
            closed,
            connect_us: _,   // For the connect ladder, not for people.
            connect_time: _, // For `metrics`.
        } = backend.stats.so_far();
        Self {
            address: backend.address().to_string(),
            pod: pod.map(str::to_owned),
            connections: connections.get(),
            active_connections: active_connections.get(),
            flows: flows.get(),
            active_flows: active_flows.get(),
            upstream_bytes: upstream_bytes.get(),
            downstream_bytes: downstream_bytes.get(),
            upstream_datagrams: upstream_datagrams.get(),
            downstream_datagrams: downstream_datagrams.get(),
            ejected_seconds: ejected_seconds(backend, Instant::now()),
            no_way_back_seconds: backend.no_way_back_for(Instant::now()).map(whole_seconds),
            ejections: ejections.get(),
            connect_failures: counted(connect_failures, ConnectFailure::ALL, ConnectFailure::as_str),
            closed: counted(closed, CloseReason::ALL, CloseReason::as_str),
        }
    }
}

/// For how long nobody will try a backend; `None` where it gets its share.
fn ejected_seconds(backend: &Backend, now: Instant) -> Option<u64> {
    backend.out_for(now).map(whole_seconds)
}

/// No less than it is.
fn whole_seconds(time: Duration) -> u64 {
    time.as_secs_f64().ceil() as u64
}

/// The words of a tally that were counted at all.
fn counted<const N: usize, W: Copy + Into<usize>>(
    tally: &Tally<N>,
    words: &[W],
    text: fn(W) -> &'static str,
) -> BTreeMap<Cow<'static, str>, u64> {
    let counts = words.iter().map(|word| (Cow::Borrowed(text(*word)), tally.get(*word)));
    counts.filter(|(_, count)| *count > 0).collect()
}

/// A relay made by hand, for the tests of everything that reads a [`Status`].
#[cfg(test)]
pub(crate) mod sample {
    use super::*;
    use crate::model::{Endpoint, Service, ServiceKind, Slice, TrafficPolicy};
    use crate::name::{BalancerKey, Family, Protocol, Scope, ServicePortName};
    use crate::plan::{PlanOptions, ServicePlan};
    use crate::rejections::Rejections;
    use crate::serve::balancer::Table;
    use crate::service_plan::Asked;
    use crate::stats::Entry;

    /// `default/web`: TCP 80 on a cluster IP and a (failed) node port, two backends, some traffic; `default/dns`: UDP, idle, parked.
    pub(crate) fn status() -> Status {
        let services = [web(), dns(), headless()].map(|service| (service.service.name.clone(), Arc::new(service)));
        let failed = ListenerState::Failed { reason: "in_use".into(), message: "address in use; ask ss".into() };
        let key = ListenKey::at("127.0.0.1:30080".parse().expect("an address"), Protocol::Tcp);
        let mut rejections = Rejections::default();
        rejections.count(Some("Service"), "decode");
        Status {
            revision: 7,
            synced: true,
            stopping: false,
            services: services.into(),
            failed: Arc::new([(key, failed)].into()),
            failed_health_ports: Arc::default(),
            problems: Arc::new(vec![
                problem("Service default/web", "field_unknown", Severity::Warning),
                problem("Service default/dns", "no_slices", Severity::Note),
            ]),
            source: SourceStatus {
                kind: "static".into(),
                last_reload_successful: true,
                config_revision: 3,
                rejections,
            },
            contact: Arc::default(),
            recent: Arc::default(),
            upgrade: None,
            inside: Arc::from(["127.0.0.0/8".parse::<IpNet>().expect("a net")]),
            options: Arc::default(),
        }
    }

    /// `default/web` alone: its state and its two backends.
    pub(crate) fn web() -> ServiceStatus {
        let backends = [backend(0, "10.244.0.2:8000"), backend(1, "10.244.0.3:8000")];
        backends[0].stats.connections.add(Entry::ClusterIp, 5);
        backends[0].stats.active_connections.increment();
        backends[0].stats.upstream_bytes.add(Entry::ClusterIp, 2048);
        backends[0].stats.downstream_bytes.add(Entry::NodePort, 3 * 1024 * 1024);
        backends[0].stats.closed.count(CloseReason::Finished);
        backends[1].stats.connect_failures.count(ConnectFailure::Refused);
        let state = state("web", "http", Protocol::Tcp);
        state.stats.accepted.add(6);
        state.stats.retries.increment();
        state.stats.dropped.count(DropReason::ClientAbort);
        let mut web = Service::new("web").port("http", 80).node_port(30080);
        web.ports[0].target_port = Some("8000".into());
        web.ports[0].node_port_allocated = true;
        let mut endpoints = vec![Endpoint::new([10, 244, 0, 2]), Endpoint::new([10, 244, 0, 3])];
        endpoints[0].pod = Some("web-1".into());
        let table = Table::new(backends.to_vec().into(), &[]);
        let key = BalancerKey { port: state.name.clone(), family: Family::V4, scope: Scope::Cluster };
        let balancers = [Arc::new(Balancer::new(key, Arc::clone(&state), table))].into();
        let counters = PortCounters { state: Some(state), backends: backends.into(), departed: None, balancers };
        service(allocated(web, 10), endpoints, [counters].into())
    }

    fn dns() -> ServiceStatus {
        let counters = PortCounters { state: Some(state("dns", "", Protocol::Udp)), ..PortCounters::default() };
        service(allocated(Service::new("dns").udp_port("", 53), 11), vec![], [counters].into())
    }

    /// `default/mail` alone: a load balancer asks at 31025 for its one endpoint, which is elsewhere.
    pub(crate) fn mail() -> ServiceStatus {
        let mail = Service {
            kind: ServiceKind::LoadBalancer,
            external_policy: TrafficPolicy::Local,
            health_check_node_port: Some(31025),
            ..Service::new("mail").port("smtp", 25)
        };
        service(allocated(mail, 12), vec![Endpoint::new([10, 244, 0, 4])], [PortCounters::default()].into())
    }

    fn headless() -> ServiceStatus {
        let headless = Service { cluster_ips: ClusterIps::Headless, ..Service::new("headless") };
        service(headless, vec![], [].into())
    }

    fn allocated(service: Service, host: u8) -> Service {
        let addresses = vec![[127, 96, 0, host].into()];
        Service { cluster_ips: ClusterIps::Addresses { addresses, allocated: true }, ..service }
    }

    fn service(service: Service, endpoints: Vec<Endpoint>, ports: Box<[PortCounters]>) -> ServiceStatus {
        let slice = Arc::new(slice(&service, endpoints));
        let plan = plan_of(&service, &slice);
        ServiceStatus { plan, service: Arc::new(service), slices: [slice].into(), ports }
    }

    /// The plan of a Service whose port `http` leads to 8000 at these endpoints.
    pub(crate) fn plan(service: &Service, endpoints: Vec<Endpoint>) -> Arc<ServicePlan> {
        plan_of(service, &slice(service, endpoints))
    }

    fn slice(service: &Service, endpoints: Vec<Endpoint>) -> Slice {
        endpoints.into_iter().fold(Slice::new("1", service).port("http", 8000), Slice::endpoint)
    }

    fn plan_of(service: &Service, slice: &Slice) -> Arc<ServicePlan> {
        let node_port_addresses = vec![[127, 0, 0, 1].into()];
        let options = PlanOptions { node_port_addresses, ..PlanOptions::default() };
        Arc::new(Asked::of(service, &options).plan([slice].into_iter(), |_| false))
    }

    fn backend(id: u32, address: &str) -> Arc<Backend> {
        Arc::new(Backend::new(id, address.parse().expect("an address")))
    }

    fn state(service: &str, port: &str, protocol: Protocol) -> Arc<PortState> {
        let service = ObjectName::new("default", service);
        Arc::new(PortState::new(ServicePortName::new(service, port, protocol)))
    }

    fn problem(object: &str, reason: &'static str, severity: Severity) -> Problem {
        let message = format!("something about {object}");
        Problem {
            object: object.into(),
            file: None,
            line: None,
            column: None,
            reason: reason.into(),
            message,
            severity,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU8;
    use std::time::Duration;

    use super::*;
    use crate::stats::Entry;

    #[test]
    fn given_a_running_relay_when_reported_then_each_listener_has_its_state() {
        let report = sample::status().report();

        let listeners = report.services.iter().flat_map(|service| &service.ports).flat_map(|port| &port.listeners);
        let states: Vec<_> = listeners.map(|listener| (listener.address.as_str(), listener.state.clone())).collect();
        assert_eq!(states[0], ("127.96.0.11:53", Some(ListenerState::Parked)));
        assert_eq!(states[1], ("127.96.0.10:80", Some(ListenerState::Serving)));
        assert!(
            matches!(&states[2], ("127.0.0.1:30080", Some(ListenerState::Failed { reason, .. })) if reason == "in_use")
        );
    }

    #[test]
    fn given_a_running_relay_when_reported_then_counters_are_read_now_and_zero_reasons_are_left_out() {
        let status = sample::status();
        let web = &status.services[&ObjectName::parse("default/web")];
        web.ports[0].backends[0].stats.connections.add(Entry::NodePort, 1);

        let report = status.report();

        let port = &report.services.iter().find(|service| service.name == "web").expect("web").ports[0];
        assert_eq!(port.backend_traffic[0].connections, 6);
        assert_eq!(port.backend_traffic[0].pod.as_deref(), Some("web-1"));
        assert_eq!(port.backend_traffic[1].connect_failures, [("refused".into(), 1)].into());
        let traffic = port.traffic.as_ref().expect("live");
        assert_eq!((traffic.accepted, traffic.retries), (6, 1));
        assert_eq!(traffic.dropped, [("client_abort".into(), 1)].into());
    }

    #[test]
    fn t207_given_a_health_port_when_reported_then_its_state_is_told() {
        let mail = sample::mail();
        let mut status = Status { services: [(mail.service.name.clone(), Arc::new(mail))].into(), ..Status::default() };
        let state = |status: &Status| status.report().services[0].health_port.as_ref()?.state.clone();
        assert_eq!(state(&status), Some(ListenerState::Serving));

        let failed = ListenerState::Failed { reason: "in_use".into(), message: "ask ss".into() };
        status.failed_health_ports = Arc::new([(ObjectName::parse("mail"), failed.clone())].into());
        assert_eq!(state(&status), Some(failed));
        status.stopping = true;
        assert_eq!(state(&status), Some(ListenerState::Closed));
    }

    #[test]
    fn f14_given_a_pause_that_lasts_when_reported_then_its_reason_age_and_remedy_are_told() {
        let times = <[WallTime; PauseReason::ALL.len()]>::default();
        let (begin, after) = (Instant::now(), |seconds| Duration::from_secs(seconds));
        for second in 0..12 {
            times[usize::from(PauseReason::FdLimit)].add(Moment::of(begin + after(second)).0, 1_000);
        }

        let told = PauseReport::all(&times, begin + after(11));

        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!((&*told[0].reason, told[0].seconds), ("fd_limit", 11));
        assert!(told[0].remedy.contains("open files"));
        assert!(PauseReport::all(&times, begin + after(60)).is_empty(), "it is over");
    }

    #[test]
    fn given_a_live_report_when_sent_as_json_then_it_is_read_back_whole() {
        let live = LiveReport::of(&sample::status());

        let text = serde_json::to_string(&live).expect("JSON");
        let back: LiveReport = serde_json::from_str(&text).expect("the same shape");

        assert_eq!(serde_json::to_string(&back).expect("JSON"), text);
        assert_eq!((back.revision, back.pid), (7, std::process::id()));
        let source =
            r#"{"kind":"static","lastReloadSuccessful":true,"configRevision":3,"rejections":{"Service":{"decode":1}}}"#;
        assert!(text.contains(&format!(r#""source":{source}"#)), "{text}");
        assert!(text.contains(r#""state":{"is":"parked"}"#), "{text}");
    }

    #[test]
    fn given_a_running_relay_when_reported_then_it_is_told_who_is_next_and_who_is_a_loop() {
        let status = sample::status();
        let web = &status.services[&ObjectName::parse("default/web")];
        let seen = || {
            let report = status.report().only(&ObjectName::parse("web")).expect("web is there");
            let choice = report.services[0].ports[0].choices[0].clone();
            let unused: Vec<_> = choice.endpoints.iter().map(|one| one.unused).collect();
            (choice.next.map(|next| next.to_string()), unused)
        };
        assert_eq!(seen(), (Some("10.244.0.2:8000".into()), vec![None, None]));

        web.ports[0].backends[0].set_own(true);

        assert_eq!(seen(), (Some("10.244.0.3:8000".into()), vec![Some(Unused::OwnListener), None]));
    }

    #[test]
    fn given_a_backend_that_is_ejected_when_reported_then_another_is_next_and_it_is_told_for_how_long() {
        let status = sample::status();
        let web = &status.services[&ObjectName::parse("default/web")].ports[0];

        web.balancers[0].note_failure(&web.backends[0], ConnectFailure::Refused, NonZeroU8::MIN, Instant::now());

        let report = status.report().only(&ObjectName::parse("web")).expect("web is there");
        let choice = &report.services[0].ports[0].choices[0];
        let ejected: Vec<_> = choice.endpoints.iter().map(|one| one.ejected_seconds).collect();
        assert_eq!(ejected, [Some(10), None]);
        assert_eq!(choice.next.map(|next| next.to_string()), Some("10.244.0.3:8000".into()));
    }

    #[test]
    fn given_notes_and_problems_when_reported_then_they_are_apart() {
        let report = sample::status().report();

        assert_eq!(report.problems.len(), 1);
        assert_eq!(report.notes.len(), 1);
    }

    #[test]
    fn given_one_service_is_asked_for_when_reduced_then_only_what_concerns_it_is_left() {
        let report = sample::status().report().only(&ObjectName::parse("dns")).expect("dns is there");

        assert_eq!(report.services.len(), 1);
        assert!(report.problems.is_empty());
        assert_eq!(report.notes[0].object, "Service default/dns");
        assert!(sample::status().report().only(&ObjectName::parse("nowhere/dns")).is_none());
    }
}
