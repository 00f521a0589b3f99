//! What would change if a relay served these manifests: two reports compared, Service by Service, line by line.
//!
//! Pure. Compared is what a plan says: listeners, backends, settings. Counters, failures and problems are of a moment, and no
//! difference.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::describe::{counted, words};
use crate::name::Scope;
use crate::plan::{Side, Verdict};
use crate::printable::Printable;
use crate::status::{ListenerReport, PortReport, Report, ServiceReport};

/// What differs. Printed as `diff` does it; nothing at all where nothing does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    services: Vec<(Change, String, Vec<Section>)>,
}

/// Lines under a title. Those of a Service itself come first, without a title; then those of each of its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Section {
    change: Change,
    title: String,
    lines: Vec<(Change, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    Removed,
    Added,
    Changed,
}

impl Change {
    fn sign(self) -> char {
        match self {
            Self::Removed => '-',
            Self::Added => '+',
            Self::Changed => ' ',
        }
    }
}

/// What changes from what is `running` to what is `wanted`.
pub fn difference(running: &Report, wanted: &Report) -> Difference {
    let (before, after) = (by_name(running), by_name(wanted));
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let compared = names.into_iter().filter_map(|name| {
        let (before, after) = (before.get(name), after.get(name));
        let sections = sections(before.map(|service| facts(service)), after.map(|service| facts(service)));
        let change = change_of(before.is_some(), after.is_some());
        (!sections.is_empty()).then(|| (change, name.clone(), sections))
    });
    Difference { services: compared.collect() }
}

impl Difference {
    /// True where nothing differs.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }
}

fn by_name(report: &Report) -> BTreeMap<String, &ServiceReport> {
    report.services.iter().map(|service| (format!("{}/{}", service.namespace, service.name), service)).collect()
}

/// Lines by the title of their section.
type Facts = BTreeMap<String, BTreeSet<String>>;

/// All that a plan says of a Service.
fn facts(service: &ServiceReport) -> Facts {
    let mut own = BTreeSet::from([format!("type {}", service.kind)]);
    own.extend(service.skipped.iter().map(|word| format!("not served: {word}")));
    own.extend(service.affinity_seconds.map(|seconds| format!("ClientIP affinity {seconds} s")));
    own.extend((!service.balance.is_default()).then(|| format!("balance {}", service.balance)));
    own.extend(service.source_address.is_preserved().then(|| "clients' addresses preserved".to_owned()));
    own.extend(service.health_port.iter().map(|health| format!("health port {}", health.port)));
    let mut facts = Facts::from([(String::new(), own)]);
    for port in &service.ports {
        facts.entry(title(port)).or_default().extend(lines(port));
    }
    facts
}

fn title(port: &PortReport) -> String {
    let name = if port.name.is_empty() { "port" } else { &port.name };
    format!("{name} {}/{}", port.port, port.protocol)
}

fn lines(port: &PortReport) -> impl Iterator<Item = String> {
    let target = port.target_port.iter().map(|target| format!("target port {}", Printable(target)));
    let listeners = port.listeners.iter().map(listener);
    let everywhere = port.backends.cluster.iter().flatten().map(|address| format!("→ {address}"));
    let here = port.backends.local.iter().flatten().map(|address| format!("→ on this node {address}"));
    target.chain(listeners).chain(everywhere).chain(here)
}

/// Without its verdicts: these follow from the backends, and would tell the same twice.
fn listener(listener: &ListenerReport) -> String {
    let everything = |side: Side| words(Side { verdict: Verdict::Serve, ..side });
    let mut text = format!("{} {}", listener.kind.as_str(), listener.address);
    if [listener.outside.scope, listener.inside.scope] != [Scope::Cluster; 2] {
        text += &format!(", outside: {}, inside: {}", everything(listener.outside), everything(listener.inside));
    }
    for net in &listener.source_ranges {
        text += &format!(", from {net}");
    }
    match listener.allow_from.as_deref() {
        Some([]) => text += ", from outside nobody",
        Some(nets) => nets.iter().for_each(|net| text += &format!(", from outside {net}")),
        None => {}
    }
    match listener.accept_proxy_from.as_deref() {
        Some([]) => text += ", through no balancer",
        Some(nets) => nets.iter().for_each(|net| text += &format!(", through the balancer {net}")),
        None => {}
    }
    if let Some(version) = listener.proxy_protocol {
        text += &format!(", PROXY {version} to backends");
    }
    text
}

fn sections(before: Option<Facts>, after: Option<Facts>) -> Vec<Section> {
    let (mut before, mut after) = (before.unwrap_or_default(), after.unwrap_or_default());
    let titles: BTreeSet<String> = before.keys().chain(after.keys()).cloned().collect();
    let section = |title: String| {
        let (old, new) = (before.remove(&title), after.remove(&title));
        let change = change_of(old.is_some(), new.is_some());
        let lines = changes(&old.unwrap_or_default(), &new.unwrap_or_default());
        (!lines.is_empty()).then_some(Section { change, title, lines })
    };
    titles.into_iter().filter_map(section).collect()
}

/// What went, then what came; what stays is not told.
fn changes(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Vec<(Change, String)> {
    let went = before.difference(after).map(|line| (Change::Removed, line.clone()));
    let came = after.difference(before).map(|line| (Change::Added, line.clone()));
    went.chain(came).collect()
}

fn change_of(before: bool, after: bool) -> Change {
    match before.cmp(&after) {
        Ordering::Less => Change::Added,
        Ordering::Greater => Change::Removed,
        Ordering::Equal => Change::Changed,
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (change, name, sections) in &self.services {
            writeln!(f, "{} {name}", change.sign())?;
            for Section { change, title, lines } in sections {
                if !title.is_empty() {
                    writeln!(f, "{}   {title}", change.sign())?;
                }
                let indent = if title.is_empty() { "  " } else { "    " };
                for (change, line) in lines {
                    writeln!(f, "{} {indent}{line}", change.sign())?;
                }
            }
        }
        let count = |wanted: Change| self.services.iter().filter(|(change, ..)| *change == wanted).count();
        let counts = [(Change::Added, "added"), (Change::Removed, "removed"), (Change::Changed, "changed")];
        let counts: Vec<_> = counts.into_iter().map(|(change, word)| (count(change), word)).collect();
        let told = counts.iter().filter(|(count, _)| *count > 0);
        let told: Vec<_> = told.map(|(count, word)| format!("{} {word}", counted(*count, "Service"))).collect();
        if told.is_empty() { Ok(()) } else { writeln!(f, "\n{}", told.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{Endpoint, Event, Model, Objects, Service, ServiceKind, Slice, TrafficPolicy};
    use crate::plan::{Plan, PlanOptions};
    use crate::status::{BackendTraffic, ListenerState, PortTraffic};

    fn web(name: &str, host: u8) -> Service {
        Service::new(name).cluster_ip([10, 96, 0, host]).port("http", 80)
    }

    fn backends<const N: usize>(service: &Service, hosts: [u8; N]) -> Slice {
        let slice = Slice::new(&service.name.name, service).port("http", 8000);
        hosts.into_iter().fold(slice, |slice, host| slice.endpoint(Endpoint::new([10, 244, 0, host])))
    }

    fn report(services: Vec<Service>, slices: Vec<Slice>) -> Report {
        let options = PlanOptions { node_port_addresses: vec![[127, 0, 0, 1].into()], ..PlanOptions::default() };
        let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), BTreeSet::new());
        model.apply(Event::Replace(Objects::new(services, slices)), &mut dirty);
        plan.update(&model, &dirty, &options);
        Report::of(&model, &plan, vec![])
    }

    #[test]
    fn given_services_that_come_go_and_change_when_compared_then_each_line_of_it_is_told() {
        let (web, old, new) = (web("web", 10), web("old", 11), web("new", 12));
        let minute = Some(Duration::from_secs(60));
        let changed = Service { affinity_timeout: minute, ..web.clone().node_port(30080) };
        let running = report(vec![web.clone(), old.clone()], vec![backends(&web, [1, 2]), backends(&old, [3])]);
        let wanted = report(vec![changed.clone(), new.clone()], vec![backends(&changed, [2, 4]), backends(&new, [])]);

        insta::assert_snapshot!(difference(&running, &wanted).to_string(), @r"
        + default/new
        +   type ClusterIP
        +   http 80/TCP
        +     clusterIP 10.96.0.12:80
        - default/old
        -   type ClusterIP
        -   http 80/TCP
        -     clusterIP 10.96.0.11:80
        -     → 10.244.0.3:8000
          default/web
        -   type ClusterIP
        +   ClientIP affinity 60 s
        +   type NodePort
            http 80/TCP
        -     → 10.244.0.1:8000
        +     nodePort 127.0.0.1:30080
        +     → 10.244.0.4:8000

        1 Service added, 1 Service removed, 1 Service changed
        ");
    }

    #[test]
    fn given_a_running_relay_when_compared_with_what_it_serves_then_counters_and_failures_are_no_difference() {
        let web = web("web", 10);
        let wanted = report(vec![web.clone()], vec![backends(&web, [1])]);
        let mut running = wanted.clone();
        let port = &mut running.services[0].ports[0];
        port.traffic = Some(PortTraffic { accepted: 7, ..PortTraffic::default() });
        port.backend_traffic = vec![BackendTraffic { connections: 7, ..BackendTraffic::default() }];
        let failed = ListenerState::Failed { reason: "in_use".into(), message: "ask ss".into() };
        port.listeners[0].state = Some(failed);

        let same = difference(&running, &wanted);

        assert!(same.is_empty());
        assert_eq!(same.to_string(), "");
    }

    #[test]
    fn t126_given_a_service_that_comes_to_preserve_when_compared_then_it_is_told() {
        let web = web("web", 10);
        let annotations = [("source-address".into(), "preserve".into())].into();
        let preserving = Service { annotations, ..web.clone() };

        let text = difference(&report(vec![web], vec![]), &report(vec![preserving], vec![])).to_string();

        assert!(text.contains("\n+   clients' addresses preserved\n"), "{text}");
    }

    #[test]
    fn given_another_policy_or_list_when_compared_then_the_listener_is_another() {
        let web = web("web", 10).node_port(30080);
        let local = Service { external_policy: TrafficPolicy::Local, ..web.clone() };
        let balancer = |ranges: &[&str]| Service {
            kind: ServiceKind::LoadBalancer,
            load_balancer_ips: vec![[198, 51, 100, 1].into()].into(),
            source_ranges: ranges.iter().map(|net| net.parse().expect("a net")).collect(),
            ..web.clone()
        };
        let lines = |before: Service, after: Service| {
            let text = difference(&report(vec![before], vec![]), &report(vec![after], vec![])).to_string();
            text.lines().filter(|line| line.contains("    ")).map(|line| line.trim_end().to_owned()).collect::<Vec<_>>()
        };

        assert_eq!(
            lines(web.clone(), local),
            [
                "    http 80/TCP",
                "-     nodePort 127.0.0.1:30080",
                "+     nodePort 127.0.0.1:30080, outside: backends on this node, inside: every backend",
            ]
        );
        let headers =
            [("accept-proxy", "true"), ("proxy-protocol", "v1")].map(|(key, value)| (key.into(), value.into()));
        let told = lines(web.clone(), Service { annotations: headers.into(), ..web.clone() }).join("\n");
        let line = "+     nodePort 127.0.0.1:30080, through no balancer, PROXY v1 to backends";
        assert!(told.contains(line), "{told}");
        assert_eq!(
            lines(balancer(&[]), balancer(&["203.0.113.0/24"])),
            [
                "    http 80/TCP",
                "-     loadBalancerIP 198.51.100.1:80",
                "+     loadBalancerIP 198.51.100.1:80, from 203.0.113.0/24",
            ]
        );
    }
}
