//! What `top` keeps of a relay's answers: names that a terminal can have, and numbers.
//!
//! The answers are `summary`'s: a line for each Service, and one Service with its backends. Names come from whoever may
//! write a Service: nothing in them may steer a terminal.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::AddAssign;

use crate::status::{BackendTraffic, ListenerReport, PortReport};
use crate::summary::{Closeup, ServiceState, ServiceSummary, Summary};

/// One answer about all Services.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Version of the program that answered.
    pub version: String,
    /// Its process. Another one has begun to count anew, but after an upgrade.
    pub pid: u32,
    /// When it has taken over from another process, in a few words; empty where it has not.
    pub upgrade: String,
    /// When another one has last failed to take over from it; empty where none has.
    pub upgrade_failure: String,
    /// True once its source has delivered the first complete state.
    pub synced: bool,
    /// How many problems it tells of.
    pub problem_count: usize,
    /// Its Services.
    pub services: Vec<ServiceReading>,
}

/// One Service.
#[derive(Clone, Debug, Default)]
pub struct ServiceReading {
    /// `namespace/name`.
    pub name: String,
    /// `ClusterIP`, `NodePort`…
    pub kind: String,
    /// The worst of what is true of its listeners and its health port.
    pub state: ServiceState,
    /// Cluster, external and load-balancer IPs.
    pub addresses: Vec<IpAddr>,
    /// `80:30080/TCP`.
    pub ports: Vec<String>,
    /// Addresses that may get new traffic, each once.
    pub ready: u64,
    /// What all backends carried that it ever had.
    pub counts: Counts,
    /// Connections and datagrams that were turned away before they reached a backend.
    pub turned_away: u64,
}

/// One answer about one Service.
#[derive(Clone, Debug, Default)]
pub struct CloseReading {
    /// Where it listens: `127.96.0.10:80/TCP clusterIP serving`.
    pub listeners: Vec<String>,
    /// Its backends, port by port.
    pub backends: Vec<BackendReading>,
}

/// One backend of one port.
#[derive(Clone, Debug, Default)]
pub struct BackendReading {
    /// Name of the ServicePort, or its number: `http`, `53/UDP`.
    pub port: String,
    /// `10.244.0.2:8000`.
    pub address: String,
    /// Name of its pod; empty where no slice says it.
    pub pod: String,
    /// Whether it gets new traffic.
    pub state: BackendState,
    /// What it carried.
    pub counts: Counts,
    /// Tries to reach it that failed: `refused 3, timeout 1`; empty where there were none.
    pub failures: String,
    /// How its connections and flows ended: `finished 10`; empty where none has.
    pub ends: String,
}

/// Numbers of a backend since its relay started, but for what is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections and flows that are open now.
    pub open: u64,
    /// Connections and flows that were begun.
    pub begun: u64,
    /// Payload bytes to it.
    pub upstream_bytes: u64,
    /// Payload bytes from it.
    pub downstream_bytes: u64,
    /// Tries to reach it that failed; another backend may have made them good.
    pub failed: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.open += other.open;
        self.begun += other.begun;
        self.upstream_bytes += other.upstream_bytes;
        self.downstream_bytes += other.downstream_bytes;
        self.failed += other.failed;
    }
}

/// Whether a backend gets new traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendState {
    /// It does.
    #[default]
    Ready,
    /// It only keeps what it has.
    Draining,
    /// Not for a time, as it could not be reached again and again.
    Ejected,
}

impl BackendState {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Ejected => "ejected",
        }
    }
}

impl Reading {
    /// What there is to show of an answer.
    pub fn of(summary: Summary) -> Self {
        Self {
            version: printable(&summary.version),
            upgrade: summary.upgrade.as_ref().map(|upgrade| printable(&upgrade.gist())).unwrap_or_default(),
            upgrade_failure: summary.upgrade_failure.map(|failure| printable(&failure.gist())).unwrap_or_default(),
            pid: summary.pid,
            synced: summary.synced,
            problem_count: summary.problem_count,
            services: summary.services.into_iter().map(ServiceReading::of).collect(),
        }
    }
}

impl ServiceReading {
    fn of(service: ServiceSummary) -> Self {
        Self {
            name: printable(&format!("{}/{}", service.namespace, service.name)),
            kind: printable(&service.kind),
            state: service.state,
            addresses: service.addresses,
            ports: service.ports.iter().map(|port| printable(port)).collect(),
            ready: service.backends,
            counts: Counts {
                open: service.active,
                begun: service.total,
                upstream_bytes: service.upstream_bytes,
                downstream_bytes: service.downstream_bytes,
                failed: service.failed_tries,
            },
            turned_away: service.dropped,
        }
    }
}

impl CloseReading {
    /// What there is to show of an answer.
    pub fn of(closeup: &Closeup) -> Self {
        let ports = || closeup.report.services.iter().flat_map(|service| &service.ports);
        let listeners = ports().flat_map(|port| port.listeners.iter().map(move |listener| told(port, listener)));
        Self { listeners: listeners.collect(), backends: ports().flat_map(backends).collect() }
    }
}

/// The word of a state as a table has it.
pub fn word(state: ServiceState) -> &'static str {
    match state {
        ServiceState::Failed => "failed",
        ServiceState::Refusing => "refusing",
        ServiceState::Closed => "closed",
        ServiceState::Serving => "serving",
        ServiceState::Unserved => "-",
    }
}

fn told(port: &PortReport, listener: &ListenerReport) -> String {
    let state = listener.state.clone().map(ServiceState::from).unwrap_or_default();
    let PortReport { protocol, .. } = port;
    printable(&format!("{}/{protocol} {} {}", listener.address, listener.kind.as_str(), word(state)))
}

fn picks(port: &PortReport) -> BTreeSet<&str> {
    let scopes = [&port.backends.cluster, &port.backends.local];
    scopes.into_iter().flatten().flatten().map(String::as_str).collect()
}

fn backends(port: &PortReport) -> Vec<BackendReading> {
    let picks = picks(port);
    let name = if port.name.is_empty() { format!("{}/{}", port.port, port.protocol) } else { printable(&port.name) };
    let backend = |traffic: &BackendTraffic| BackendReading {
        port: name.clone(),
        address: printable(&traffic.address),
        pod: printable(traffic.pod.as_deref().unwrap_or_default()),
        state: match traffic.ejected_seconds {
            Some(_) => BackendState::Ejected,
            None if picks.contains(traffic.address.as_str()) => BackendState::Ready,
            None => BackendState::Draining,
        },
        counts: Counts {
            open: traffic.active_connections + traffic.active_flows,
            begun: traffic.connections + traffic.flows,
            upstream_bytes: traffic.upstream_bytes,
            downstream_bytes: traffic.downstream_bytes,
            failed: traffic.connect_failures.values().sum(),
        },
        failures: reasons(&traffic.connect_failures),
        ends: reasons(&traffic.closed),
    };
    port.backend_traffic.iter().map(backend).collect()
}

fn reasons(counts: &BTreeMap<Cow<'static, str>, u64>) -> String {
    let each: Vec<_> = counts.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    printable(&each.join(", "))
}

/// Text from elsewhere as a terminal may have it. What steers a terminal, turns the direction of text around or has no
/// width becomes U+FFFD: a name is shown as it is, or seen to be odd.
pub fn printable(text: &str) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
            || matches!(c, '\u{61c}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
    };
    text.chars().map(|c| if steers(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::live::sample;
    use crate::name::ObjectName;

    fn closeup() -> Closeup {
        Closeup::of(&sample::status(), &ObjectName::parse("web"), UNIX_EPOCH).expect("web is there")
    }

    #[test]
    fn given_an_answer_when_read_then_each_service_has_its_state_and_its_numbers() {
        let reading = Reading::of(Summary::of(&sample::status(), UNIX_EPOCH));

        let states: Vec<_> =
            reading.services.iter().map(|service| (service.name.as_str(), word(service.state))).collect();
        assert_eq!(states, [("default/dns", "refusing"), ("default/headless", "-"), ("default/web", "failed")]);
        let web = &reading.services[2];
        let counts = Counts { open: 1, begun: 5, upstream_bytes: 2048, downstream_bytes: 3 << 20, failed: 1 };
        assert_eq!((web.kind.as_str(), web.ready, web.turned_away, web.counts), ("NodePort", 2, 1, counts));
        assert_eq!(web.ports, ["80:30080/TCP"]);
        assert_eq!((reading.pid, reading.problem_count), (std::process::id(), 1));
    }

    #[test]
    fn given_one_service_when_read_then_each_backend_has_its_numbers_and_reasons() {
        let reading = CloseReading::of(&closeup());

        assert_eq!(reading.listeners, ["127.96.0.10:80/TCP clusterIP serving", "127.0.0.1:30080/TCP nodePort failed"]);
        let [first, second] = &reading.backends[..] else { panic!("two backends") };
        let counts = Counts { open: 1, begun: 5, upstream_bytes: 2048, downstream_bytes: 3 << 20, failed: 0 };
        assert_eq!((first.port.as_str(), first.pod.as_str(), first.counts), ("http", "web-1", counts));
        assert_eq!((first.ends.as_str(), first.failures.as_str()), ("finished 1", ""));
        assert_eq!((second.counts.failed, second.failures.as_str()), (1, "refused 1"));
        assert_eq!(second.state, BackendState::Ready);
    }

    #[test]
    fn given_names_with_control_characters_when_read_then_none_is_left() {
        let mut summary = Summary::of(&sample::status(), UNIX_EPOCH);
        summary.services[2].name = "we\u{1b}]0;b\u{7}".into();
        let mut closeup = closeup();
        closeup.report.services[0].ports[0].backend_traffic[0].pod = Some("a\u{9b}2J\r\n\u{202e}b".into());

        let (reading, close) = (Reading::of(summary), CloseReading::of(&closeup));

        assert_eq!(reading.services[2].name, "default/we\u{fffd}]0;b\u{fffd}");
        assert_eq!(close.backends[0].pod, "a\u{fffd}2J\u{fffd}\u{fffd}\u{fffd}b");
        assert_eq!(printable("żółw-1.例え"), "żółw-1.例え");
    }
}
