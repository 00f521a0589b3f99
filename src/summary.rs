//! A running relay at a glance: a line for each Service, cheap enough to be asked for every other second.
//!
//! A report of ten thousand Services with a hundred thousand backends (`live`) is tens of megabytes, and a person looks
//! at one Service at a time. Here is what a list needs, and that one Service. The shapes of a report are in `status`;
//! over HTTP this is served by `admin`, and shown by `page`.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::capacity::{CAPACITY, LimitReport};
use crate::contact::ContactReport;
use crate::model::ServicePort;
use crate::name::ObjectName;
use crate::plan::{Problem, Severity};
use crate::recent::Happened;
use crate::stats::{BackendStats, CloseReason, ConnectFailure, DropReason, PROCESS, PauseReason, ServiceStats, Tally};
use crate::status::{ListenerState, Report, ServiceStatus, SourceStatus, Status, UpgradeFailure, UpgradeStatus};
use crate::timestamp::rfc3339;

/// Problems that are told word by word. Where there are more they have few causes; all of them are in `/status`.
const PROBLEM_LIMIT: usize = 200;
/// What has happened, in a summary: a rollout tells hundreds of things, and nobody reads them all at once.
const RECENT_LIMIT: usize = 100;
const HOUR: Duration = Duration::from_secs(3_600);

/// What `/status?summary` answers: all Services, without their listeners and backends.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// When it was made, in milliseconds since 1970: counters of two summaries make a rate.
    pub at_ms: u64,
    /// Version of the running program.
    pub version: Cow<'static, str>,
    /// Process id of the running program. With another one, all counters have begun anew, but after an upgrade.
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
    /// How this process has taken over from another one, whose counters go on; left out where it has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeStatus>,
    /// The last try to upgrade this process that came to nothing; left out where there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade_failure: Option<UpgradeFailure>,
    /// Of all Services together: connections and datagrams that were turned away, by reason; reasons at 0 are left out.
    pub dropped: Counts,
    /// Of all backends together, those that left among them: failed tries, by reason; reasons at 0 are left out.
    pub connect_failures: Counts,
    /// Of all backends together, those that left among them: ends of connections and flows, by reason; reasons at 0 are left out.
    pub closed: Counts,
    /// Seconds in which clients waited as nobody was accepted, by what was lacking; what never was is left out.
    pub accept_paused_seconds: BTreeMap<Cow<'static, str>, f64>,
    /// How much there is of what connections and flows need, and how much of it is taken.
    pub limits: Vec<LimitReport>,
    /// How many problems there are.
    pub problem_count: usize,
    /// The first 200 of them, the worst first.
    pub problems: Vec<Problem>,
    /// How many notes there are: worth knowing, nothing wrong. A [`Closeup`] has those of its Service.
    pub note_count: usize,
    /// What has happened to Services within the last hour, the oldest first; the last 100 of it.
    pub recent: Vec<Happened>,
    /// By namespace and name.
    pub services: Vec<ServiceSummary>,
}

/// How often something happened, by reason.
type Counts = BTreeMap<Cow<'static, str>, u64>;

/// One Service in a list. Numbers at 0 and empty lists are left out: of a large cluster's Services, most are idle on one
/// node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSummary {
    /// From `metadata.namespace`.
    pub namespace: String,
    /// From `metadata.name`.
    pub name: String,
    /// From `spec.type`.
    #[serde(rename = "type")]
    pub kind: Cow<'static, str>,
    /// The worst of what is true of its listeners and its health port.
    pub state: ServiceState,
    /// Cluster, external and load-balancer IPs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// `80:30080/TCP`, as `kubectl get services` has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<String>,
    /// How many problems name it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub problem_count: u64,
    /// Addresses that may get new traffic, each once.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub backends: u64,
    /// Backends that get no new connections, as they could not be reached again and again.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ejected: u64,
    /// Connections and flows that are open now, at backends that left too.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub active: u64,
    /// Connections and flows that reached a backend. Like the sums below it is over all backends that there were: none falls
    /// as a backend goes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub total: u64,
    /// Payload bytes to backends.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub upstream_bytes: u64,
    /// Payload bytes from backends.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub downstream_bytes: u64,
    /// Connections and datagrams that were turned away.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped: u64,
    /// Tries to reach a backend that failed; another backend may have made them good.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed_tries: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// How a Service does, in one word; the worst first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceState {
    /// A listener, or the health port, could not be bound.
    Failed,
    /// A listener refuses whoever comes: there is no backend.
    Refusing,
    /// The process is stopping.
    Closed,
    /// All listeners accept.
    Serving,
    /// There is no listener: it is not to be served, or others have its addresses (then it has a problem).
    #[default]
    Unserved,
}

/// What `/status/NAMESPACE/NAME` answers: one Service with all that is known of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Closeup {
    /// When it was made, in milliseconds since 1970.
    pub at_ms: u64,
    /// What has happened to it within the last hour, the oldest first.
    pub recent: Vec<Happened>,
    /// What it asks for by annotations `kube-relay.dev/…`, by what follows there.
    pub settings: BTreeMap<String, String>,
    /// The Service alone, and what is said about it.
    #[serde(flatten)]
    pub report: Report,
}

impl Closeup {
    /// One Service as it is now; `None` where there is none of that name.
    pub fn of(status: &Status, name: &ObjectName, now: SystemTime) -> Option<Self> {
        let report = status.report_of(name)?;
        let settings = status.services.get(name)?.service.annotations.iter();
        let name = name.to_string();
        let recent = last_hour(status, now).filter(|happened| happened.service == name).cloned().collect();
        let settings = settings.map(|(key, value)| (key.to_string(), value.to_string())).collect();
        Some(Self { at_ms: milliseconds(now), recent, settings, report })
    }
}

impl Summary {
    /// This process's relay as it is now.
    pub fn of(status: &Status, now: SystemTime) -> Self {
        let unpreserved = status.unpreserved();
        let all = status.problems.iter().chain(&unpreserved);
        let mut problems: Vec<&Problem> = all.filter(|problem| is_wrong(problem)).collect();
        let said = counts_by_subject(&problems);
        problems.sort_by_key(|problem| Reverse(problem.severity)); // stable: those of the source come first
        let mut totals = Totals::default();
        let services = status.services.values().map(|service| {
            totals.add(service);
            ServiceSummary::of(service, status, &said)
        });
        let services = services.collect();
        let mut recent: Vec<_> = last_hour(status, now).cloned().collect();
        recent.drain(..recent.len().saturating_sub(RECENT_LIMIT));
        Self {
            at_ms: milliseconds(now),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            revision: status.revision,
            synced: status.synced,
            source: status.source.clone(),
            contact: status.contact.report(),
            upgrade: status.upgrade.as_deref().cloned(),
            upgrade_failure: UpgradeFailure::of_process(),
            dropped: totals.dropped,
            connect_failures: totals.connect_failures,
            closed: totals.closed,
            accept_paused_seconds: accept_paused_seconds(),
            limits: CAPACITY.report(),
            problem_count: problems.len(),
            note_count: status.problems.len() + unpreserved.len() - problems.len(),
            problems: problems.into_iter().take(PROBLEM_LIMIT).cloned().collect(),
            recent,
            services,
        }
    }
}

impl ServiceSummary {
    fn of(service: &ServiceStatus, status: &Status, said: &BTreeMap<&str, u64>) -> Self {
        let ServiceStatus { service: wanted, plan, ports, slices: _ } = service;
        let picks = wanted.ports.iter().flat_map(move |port| plan.balancers(port));
        let picks = picks.flat_map(|(_, backends)| &*backends.usable.picks).map(|endpoint| endpoint.address());
        let mut summary = Self {
            namespace: wanted.name.namespace.to_string(),
            name: wanted.name.name.to_string(),
            kind: wanted.kind.as_str().into(),
            state: ServiceState::of(service, status),
            addresses: wanted.addresses().collect(),
            ports: wanted.ports.iter().map(numbers).collect(),
            problem_count: said.get(wanted.name.to_string().as_str()).copied().unwrap_or_default(),
            backends: picks.collect::<BTreeSet<SocketAddr>>().len() as u64,
            ..Self::default()
        };
        for port in ports {
            if let Some(state) = &port.state {
                summary.dropped += sum(&state.stats.so_far().dropped, DropReason::ALL);
            }
            summary.ejected += port.backends.iter().filter(|backend| backend.is_ejected()).count() as u64;
            port.carried().for_each(|stats| summary.add(stats));
        }
        summary
    }

    fn add(&mut self, stats: &BackendStats) {
        self.active += stats.active_connections.get() + stats.active_flows.get();
        self.total += stats.connections.get() + stats.flows.get();
        self.upstream_bytes += stats.upstream_bytes.get();
        self.downstream_bytes += stats.downstream_bytes.get();
        self.failed_tries += sum(&stats.connect_failures, ConnectFailure::ALL);
    }
}

impl ServiceState {
    fn of(service: &ServiceStatus, status: &Status) -> Self {
        let plan = &service.plan;
        let listeners = plan.listeners().map(|(key, listener)| status.listener_state(key, &listener.target));
        let health_port = plan.open_health_port().map(|_| status.health_port_state(&service.service.name));
        listeners.chain(health_port).map(Self::from).min().unwrap_or_default()
    }
}

impl From<ListenerState> for ServiceState {
    fn from(state: ListenerState) -> Self {
        match state {
            ListenerState::Failed { .. } => Self::Failed,
            ListenerState::Parked => Self::Refusing,
            ListenerState::Closed => Self::Closed,
            ListenerState::Serving => Self::Serving,
        }
    }
}

/// What all Services count together, by reason.
#[derive(Default)]
struct Totals {
    dropped: Counts,
    connect_failures: Counts,
    closed: Counts,
}

impl Totals {
    fn add(&mut self, service: &ServiceStatus) {
        for port in &service.ports {
            if let Some(state) = &port.state {
                let ServiceStats { dropped, .. } = state.stats.so_far();
                tally(&mut self.dropped, dropped, DropReason::ALL, DropReason::as_str);
            }
            for BackendStats { connect_failures, closed, .. } in port.carried() {
                tally(&mut self.connect_failures, connect_failures, ConnectFailure::ALL, ConnectFailure::as_str);
                tally(&mut self.closed, closed, CloseReason::ALL, CloseReason::as_str);
            }
        }
    }
}

fn tally<const N: usize, W: Copy + Into<usize>>(
    counts: &mut Counts,
    tally: &Tally<N>,
    words: &[W],
    text: fn(W) -> &'static str,
) {
    for word in words {
        let count = tally.get(*word);
        if count > 0 {
            *counts.entry(Cow::Borrowed(text(*word))).or_default() += count;
        }
    }
}

fn sum<const N: usize, W: Copy + Into<usize>>(tally: &Tally<N>, words: &[W]) -> u64 {
    words.iter().map(|word| tally.get(*word)).sum()
}

fn accept_paused_seconds() -> BTreeMap<Cow<'static, str>, f64> {
    let seconds = PauseReason::ALL.iter().map(|reason| {
        let paused = PROCESS.accept_paused[usize::from(*reason)].seconds();
        (Cow::Borrowed(reason.as_str()), paused)
    });
    seconds.filter(|(_, seconds)| *seconds > 0.0).collect()
}

/// Times in this form sort as text.
fn last_hour(status: &Status, now: SystemTime) -> impl Iterator<Item = &Happened> {
    let since = rfc3339(now.checked_sub(HOUR).unwrap_or(UNIX_EPOCH));
    status.recent.iter().filter(move |happened| happened.at >= since)
}

fn is_wrong(problem: &Problem) -> bool {
    problem.severity != Severity::Note
}

/// How many problems there are of each `namespace/name`.
fn counts_by_subject<'a>(problems: &[&'a Problem]) -> BTreeMap<&'a str, u64> {
    let mut counts = BTreeMap::new();
    for problem in problems {
        *counts.entry(problem.subject()).or_default() += 1;
    }
    counts
}

/// `80:30080/TCP`.
fn numbers(port: &ServicePort) -> String {
    match port.node_port {
        Some(number) => format!("{}:{number}/{}", port.port, port.protocol),
        None => format!("{}/{}", port.port, port.protocol),
    }
}

fn milliseconds(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU8;
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;
    use crate::live::sample;
    use crate::recent::Recent;
    use crate::serve::departed::Departed;
    use crate::stats::Entry;

    fn summary(status: &Status) -> Summary {
        Summary::of(status, UNIX_EPOCH + Duration::from_millis(1_500))
    }

    #[test]
    fn given_a_running_relay_when_summed_up_then_each_service_has_a_line_in_one_word() {
        let summary = summary(&sample::status());

        let states: Vec<_> = summary.services.iter().map(|service| (service.name.as_str(), service.state)).collect();
        assert_eq!(
            states,
            [("dns", ServiceState::Refusing), ("headless", ServiceState::Unserved), ("web", ServiceState::Failed)]
        );
        assert_eq!((summary.at_ms, summary.pid, summary.revision), (1_500, std::process::id(), 7));
    }

    #[test]
    fn t234_given_a_process_that_has_taken_over_when_summed_up_then_that_is_told_and_else_takes_no_room() {
        let never = serde_json::to_string(&summary(&sample::status())).expect("JSON");
        let upgrade = UpgradeStatus { standstill_ms: 7, ..UpgradeStatus::default() };
        let status = Status { upgrade: Some(Arc::new(upgrade.clone())), ..sample::status() };

        assert!(!never.contains("\"upgrade\""), "{never}");
        assert_eq!(summary(&status).upgrade, Some(upgrade));
    }

    #[test]
    fn given_traffic_when_summed_up_then_numbers_of_ports_and_backends_are_added() {
        let summary = summary(&sample::status());

        let web = summary.services.iter().find(|service| service.name == "web").expect("web is there");
        assert_eq!((web.backends, web.active, web.total), (2, 1, 5));
        assert_eq!((web.upstream_bytes, web.downstream_bytes), (2_048, 3 << 20));
        assert_eq!((web.dropped, web.failed_tries, web.problem_count), (1, 1, 1));
        assert_eq!(web.ports, ["80:30080/TCP"]);
        assert_eq!(summary.dropped, [("client_abort".into(), 1)].into());
        assert_eq!(summary.connect_failures, [("refused".into(), 1)].into());
        assert_eq!(summary.closed, [("finished".into(), 1)].into());
    }

    #[test]
    fn given_a_backend_that_leaves_when_summed_up_then_what_it_carried_stays_and_it_is_no_backend_any_more() {
        let mut status = sample::status();
        let before = summary(&status);
        let mut web = (*status.services[&ObjectName::parse("web")]).clone();
        let [left, stays] = &*web.ports[0].backends else { panic!("two backends") };
        left.stats.upstream_bytes.add(Entry::ClusterIp, 1);
        web.ports[0].departed = Some(Arc::new(Departed::of(Arc::clone(left))));
        web.ports[0].backends = [Arc::clone(stays)].into();
        status.services.insert(ObjectName::parse("web"), Arc::new(web));

        let after = summary(&status);

        let [before_web, web] = [&before, &after].map(|summary| summary.services[2].clone());
        assert_eq!((web.active, web.total), (before_web.active, before_web.total));
        assert_eq!((web.upstream_bytes, web.downstream_bytes), (before_web.upstream_bytes + 1, 3 << 20));
        assert_eq!(after.closed, before.closed);
    }

    #[test]
    fn given_an_idle_service_when_sent_then_what_is_zero_takes_no_room_and_comes_back() {
        let text = serde_json::to_string(&summary(&sample::status()).services[0]).expect("JSON");

        assert_eq!(
            text,
            r#"{"namespace":"default","name":"dns","type":"ClusterIP","state":"refusing","addresses":["127.96.0.11"],"ports":["53/UDP"]}"#
        );
        let back: ServiceSummary = serde_json::from_str(&text).expect("the same shape");
        assert_eq!((back.active, back.kind.as_ref()), (0, "ClusterIP"));
    }

    #[test]
    fn given_more_problems_than_are_told_when_summed_up_then_the_worst_come_first_and_all_are_counted() {
        let warning = Problem { severity: Severity::Warning, ..Problem::error("Service default/web", "decode", "odd") };
        let mut problems = vec![warning; PROBLEM_LIMIT];
        problems.push(Problem::note("Service default/web", "no_slices", "nobody"));
        problems.push(Problem::error("EndpointSlice default/web", "decode", "unreadable"));

        let summary = summary(&Status { problems: Arc::new(problems), ..sample::status() });

        assert_eq!((summary.problem_count, summary.note_count), (PROBLEM_LIMIT + 1, 1));
        assert_eq!(summary.problems.len(), PROBLEM_LIMIT);
        assert_eq!(summary.problems[0].severity, Severity::Error);
        let web = summary.services.iter().find(|service| service.name == "web").expect("web is there");
        assert_eq!(web.problem_count, PROBLEM_LIMIT as u64 + 1);
    }

    #[test]
    fn given_a_process_that_stops_when_summed_up_then_what_listened_is_closed() {
        let summary = summary(&Status { stopping: true, ..sample::status() });

        let states: Vec<_> = summary.services.iter().map(|service| service.state).collect();
        assert_eq!(states, [ServiceState::Closed, ServiceState::Unserved, ServiceState::Closed]);
    }

    #[test]
    fn given_things_that_happened_when_summed_up_then_those_of_the_last_hour_are_told_and_a_closeup_has_its_own() {
        let now = UNIX_EPOCH + 3 * HOUR;
        let mut recent = Recent::default();
        let mut add = |at: Duration, service, news: &[String]| {
            recent.add(&rfc3339(UNIX_EPOCH + at), &ObjectName::parse(service), news.to_vec());
        };
        add(HOUR, "web", &["long ago".into()]);
        add(2 * HOUR, "web", &["came".into()]);
        add(2 * HOUR, "dns", &[const { String::new() }; RECENT_LIMIT - 1]);
        let mut status = sample::status();
        status.recent = Arc::new(recent.clone());

        let summary = Summary::of(&status, now);
        let closeup = Closeup::of(&status, &ObjectName::parse("web"), now).expect("web is there");

        assert_eq!((summary.recent.len(), summary.recent[0].what.as_str()), (RECENT_LIMIT, "came"));
        assert_eq!((closeup.recent.len(), closeup.recent[0].what.as_str()), (1, "came"));
        recent.add(&rfc3339(now), &ObjectName::parse("dns"), vec!["news".into()]);
        status.recent = Arc::new(recent);
        assert_eq!(Summary::of(&status, now).recent.len(), RECENT_LIMIT);
        assert_eq!(Summary::of(&status, now).recent[0].what, "");
    }

    #[test]
    fn given_a_backend_that_is_ejected_when_summed_up_then_it_is_counted_where_it_is() {
        let status = sample::status();
        let web = &status.services[&ObjectName::parse("web")].ports[0];

        web.balancers[0].note_failure(&web.backends[0], ConnectFailure::Refused, NonZeroU8::MIN, Instant::now());

        let ejected: Vec<_> = summary(&status).services.iter().map(|service| service.ejected).collect();
        assert_eq!(ejected, [0, 0, 1]);
    }

    #[test]
    fn given_one_service_when_looked_at_closely_then_it_is_there_alone_with_what_is_said_about_it() {
        let status = sample::status();

        let closeup = Closeup::of(&status, &ObjectName::parse("default/web"), UNIX_EPOCH).expect("web is there");

        let whole = status.report().only(&ObjectName::parse("default/web")).expect("web is there");
        let [closeup, whole] = [&closeup.report, &whole].map(|report| serde_json::to_value(report).expect("JSON"));
        assert_eq!(closeup, whole);
        assert!(Closeup::of(&status, &ObjectName::parse("nowhere/web"), UNIX_EPOCH).is_none());
    }
}
