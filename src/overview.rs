//! What `kube-relay status` prints: a line for each Service, or one Service in the layout of `kubectl describe service`.
//!
//! Made from what `/status` answers (`live`), so that it says of another process what that process says of itself.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Write};

use crate::describe::{allowed, counted, meaning};
use crate::live::{LiveReport, PauseReport};
use crate::name::{Protocol, Scope};
use crate::plan::{ListenerKind, Problem, Side, SourceAddress, Verdict};
use crate::printable::Printable;
use crate::problem::Listed;
use crate::recent::Happened;
use crate::source_matrix::{self, Row};
use crate::status::{
    BackendTraffic, HealthPortReport, ListenerReport, ListenerState, PortReport, Report, ServiceReport, UpgradeStatus,
};

/// Between columns, as `kubectl` has it.
const GAP: &str = "   ";
/// Of the values behind a label, as `kubectl describe` has it.
const INDENT: usize = 19;

/// A line for each Service, then why clients wait, which listeners failed, and the problems.
pub fn table(live: &LiveReport) -> String {
    overview(live, &HEADER, row)
}

/// The same, with what goes through each Service and how its clients are spread.
pub fn wide(live: &LiveReport) -> String {
    let header: Vec<_> = HEADER.into_iter().chain(["UP", "DOWN", "RETRIES", "AFFINITY", "BALANCE"]).collect();
    overview(live, &header, |service| [row(service), more(service)].concat()) + &upgrade(live.upgrade.as_ref())
}

const HEADER: [&str; 9] =
    ["NAMESPACE", "NAME", "TYPE", "CLUSTER-IP", "PORT(S)", "BACKENDS", "ACTIVE", "CONNS", "FAILED"];

fn overview(
    live: &LiveReport,
    header: &[&'static str],
    row: impl Fn(&ServiceReport) -> Vec<Cow<'static, str>>,
) -> String {
    let mut rows: Vec<Vec<Cow<'static, str>>> = vec![header.iter().copied().map(Cow::Borrowed).collect()];
    rows.extend(live.report.services.iter().map(row));
    let mut text = match live.report.services.is_empty() {
        true => "No Services.\n".to_owned(),
        false => columns(&rows),
    };
    if !live.synced {
        text += "\nThe source has not delivered its first complete state yet.\n";
    } else if !live.source.last_reload_successful {
        text +=
            "\nNot all that the source says is in use: the problems tell what is left out, and what stays as it was.\n";
    }
    text + &pauses(&live.pauses) + &failures(&live.report) + &problems("Problems", &live.report.problems)
}

/// One Service with its listeners, backends and counters, for a report that [`Report::only`] has reduced to it.
pub fn describe(report: &Report) -> String {
    let mut text: String = report.services.iter().map(describe_service).collect();
    text += &problems("Problems", &report.problems);
    text + &problems("Notes", &report.notes)
}

/// What has happened lately, as `kubectl describe` puts it below all else; nothing where nothing has.
pub fn events(recent: &[Happened]) -> String {
    let row = |event: &Happened| -> Vec<Cow<'static, str>> { vec![event.at.clone().into(), event.what.clone().into()] };
    let rows: Vec<_> = recent.iter().map(row).collect();
    let lines: String = columns(&rows).lines().map(|line| format!("  {line}\n")).collect();
    if lines.is_empty() { lines } else { format!("\nEvents:\n{lines}") }
}

fn row(service: &ServiceReport) -> Vec<Cow<'static, str>> {
    let (namespace, name) = (service.namespace.clone().into(), service.name.clone().into());
    let mut row = vec![namespace, name, service.kind.clone()];
    if let Some(reason) = &service.skipped {
        let cluster_ip = if reason == "headless" { "None" } else { "<none>" };
        row.extend([cluster_ip.into(), format!("<{reason}>").into()]);
        row.extend(["-"; 4].map(Cow::Borrowed));
        return row;
    }
    let sums = Sums::of(service);
    row.extend([cluster_ips(service).into(), ports(service).into()]);
    row.extend([backends(service), sums.active, sums.total, sums.failed].map(|count| count.to_string().into()));
    row
}

/// The further cells of a wide row.
fn more(service: &ServiceReport) -> Vec<Cow<'static, str>> {
    if service.skipped.is_some() {
        return ["-"; 5].map(Cow::Borrowed).to_vec();
    }
    let backends = || service.ports.iter().flat_map(|port| &port.backend_traffic);
    let traffic = service.ports.iter().filter_map(|port| port.traffic.as_ref());
    let retries: u64 = traffic.map(|traffic| traffic.retries).sum();
    vec![
        bytes(backends().map(|backend| backend.upstream_bytes).sum()).into(),
        bytes(backends().map(|backend| backend.downstream_bytes).sum()).into(),
        retries.to_string().into(),
        service.affinity_seconds.map_or("None".into(), |seconds| format!("{seconds}s").into()),
        service.balance.as_str().into(),
    ]
}

/// Connections and flows of a Service, together: one is TCP, the other UDP, and a line has room for one number.
#[derive(Default)]
struct Sums {
    active: u64,
    total: u64,
    /// Turned away; a failed try that another backend made good is not among them.
    failed: u64,
}

impl Sums {
    fn of(service: &ServiceReport) -> Self {
        let mut sums = Self::default();
        for port in &service.ports {
            sums.failed += port.traffic.as_ref().map_or(0, |traffic| traffic.dropped.values().sum());
            for backend in &port.backend_traffic {
                sums.active += backend.active_connections + backend.active_flows;
                sums.total += backend.connections + backend.flows;
            }
        }
        sums
    }
}

fn cluster_ips(service: &ServiceReport) -> String {
    let listeners = service.ports.iter().flat_map(|port| &port.listeners);
    let ips =
        listeners.filter(|listener| listener.kind == ListenerKind::ClusterIp).map(|listener| host(&listener.address));
    or_none(join(ips.collect::<BTreeSet<_>>(), ","))
}

/// `80:30080/TCP,53/UDP`.
fn ports(service: &ServiceReport) -> String {
    let port = |port: &PortReport| match node_port(port) {
        Some(number) => format!("{}:{number}/{}", port.port, port.protocol),
        None => format!("{}/{}", port.port, port.protocol),
    };
    or_none(join(service.ports.iter().map(port), ","))
}

/// Distinct addresses, so that a pod with two ports counts once for each of them.
fn backends(service: &ServiceReport) -> u64 {
    let addresses: BTreeSet<&str> = service.ports.iter().flat_map(picks).collect();
    addresses.len() as u64
}

fn picks(port: &PortReport) -> BTreeSet<&str> {
    let scopes = [&port.backends.cluster, &port.backends.local];
    scopes.into_iter().flatten().flatten().map(String::as_str).collect()
}

pub(crate) fn node_port(port: &PortReport) -> Option<&str> {
    let listener = port.listeners.iter().find(|listener| listener.kind == ListenerKind::NodePort)?;
    listener.address.rsplit_once(':').map(|(_, number)| number)
}

fn pauses(pauses: &[PauseReport]) -> String {
    let line = |PauseReport { reason, seconds, remedy }: &PauseReport| {
        format!("\nTCP clients wait to be accepted ({reason}, for {seconds} s). What helps: {remedy}.\n")
    };
    pauses.iter().map(line).collect()
}

/// From whom it has taken over, and what.
fn upgrade(upgrade: Option<&UpgradeStatus>) -> String {
    let Some(upgrade) = upgrade else { return String::new() };
    let UpgradeStatus { at, from_pid, from_version, standstill_ms, elapsed_ms, .. } = upgrade;
    let listeners = counted(upgrade.listeners, "listener");
    let (streams, flows) = (counted(upgrade.streams, "connection"), counted(upgrade.flows, "UDP flow"));
    format!(
        "\nTaken over from pid {from_pid} (kube-relay {from_version}) at {at} in {elapsed_ms} ms: {listeners}, {streams} and \
         {flows}, which stood still for {standstill_ms} ms.\n"
    )
}

fn failures(report: &Report) -> String {
    let failed = |state: &Option<ListenerState>| match state {
        Some(ListenerState::Failed { reason, .. }) => Some(reason.clone()),
        _ => None,
    };
    let mut rows: Vec<Vec<Cow<'static, str>>> = Vec::new();
    for service in &report.services {
        let name = format!("{}/{}", service.namespace, service.name);
        let listeners = service.ports.iter().flat_map(|port| &port.listeners);
        let listeners = listeners.filter_map(|listener| Some((listener.address.clone(), failed(&listener.state)?)));
        let health = service.health_port.iter();
        let health = health.filter_map(|port| Some((format!("health port {}", port.port), failed(&port.state)?)));
        let row = |(what, reason): (String, Cow<'static, str>)| vec![what.into(), name.clone().into(), reason];
        rows.extend(listeners.chain(health).map(row));
    }
    if rows.is_empty() {
        return String::new();
    }
    let lines: String = columns(&rows).lines().map(|line| format!("  {line}\n")).collect();
    format!("\nNot bound (`kube-relay status NAMESPACE/NAME` tells what to do):\n{lines}")
}

fn problems(title: &'static str, problems: &[Problem]) -> String {
    if problems.is_empty() { String::new() } else { format!("\n{}", Listed(title, problems)) }
}

fn describe_service(service: &ServiceReport) -> String {
    let mut text = String::new();
    field(&mut text, "Name", &service.name);
    field(&mut text, "Namespace", &service.namespace);
    field(&mut text, "Type", &service.kind);
    if let Some(name) = &service.external_name {
        field(&mut text, "External Name", Printable(name));
    }
    if let Some(reason) = &service.skipped {
        field(&mut text, "Not served", format!("{reason}, {}", meaning(reason)));
        return text;
    }
    field(&mut text, "IP", cluster_ips(service));
    match service.affinity_seconds {
        Some(seconds) => field(&mut text, "Session Affinity", format!("ClientIP ({seconds}s)")),
        None => field(&mut text, "Session Affinity", "None"),
    }
    if let Some(policies) = local_policies(service) {
        field(&mut text, "Traffic Policy", policies);
    }
    if !service.balance.is_default() {
        field(&mut text, "Balance", service.balance);
    }
    if service.source_address.is_preserved() {
        field(&mut text, "Source Address", source_address(service));
    }
    if let Some(nets) = service.allowed_networks() {
        field(&mut text, "From Outside", allowed(&nets));
    }
    if let Some(nets) = service.balancers_in_front() {
        field(&mut text, "In Front", allowed(&nets));
    }
    if let Some(version) = service.header_to_backends() {
        field(&mut text, "PROXY Header", version);
    }
    describe_sources(&mut text, service);
    if let Some(health_port) = &service.health_port {
        describe_health_port(&mut text, health_port);
    }
    for port in &service.ports {
        describe_port(&mut text, port);
    }
    text
}

/// `external Local, internal Local`; `None` where both are Cluster, as nearly always.
fn local_policies(service: &ServiceReport) -> Option<String> {
    let is_local = |is_internal: bool| {
        let mut listeners = service.ports.iter().flat_map(|port| &port.listeners);
        let is_of = |listener: &ListenerReport| (listener.kind == ListenerKind::ClusterIp) == is_internal;
        listeners.any(|listener| is_of(listener) && listener.outside.scope == Scope::Local)
    };
    let policies = [("external Local", is_local(false)), ("internal Local", is_local(true))];
    let policies: Vec<_> = policies.into_iter().filter_map(|(words, applies)| applies.then_some(words)).collect();
    (!policies.is_empty()).then(|| policies.join(", "))
}

/// What a Service that preserves gets.
fn source_address(service: &ServiceReport) -> Cow<'static, str> {
    match &service.source_refusal {
        None => "preserve".into(),
        Some(why) => format!("preserve, but backends see this node: {why}").into(),
    }
}

/// Whom backends see, as it is and as it could be.
fn describe_sources(text: &mut String, service: &ServiceReport) {
    let rows = source_matrix::rows(service);
    if rows.is_empty() {
        return;
    }
    let now = service.source_in_use();
    let (other, choice) = match now {
        SourceAddress::Node if service.source_address.is_preserved() => (SourceAddress::Preserve, "WITH THE REMEDY"),
        SourceAddress::Node => (SourceAddress::Preserve, "WITH preserve"),
        SourceAddress::Preserve => (SourceAddress::Node, "WITHOUT preserve"),
    };
    let has_header = service.header_to_backends().is_some();
    let header = if has_header { "IN THE PROXY HEADER" } else { "WITH proxy-protocol" };
    let header = service.ports.iter().any(|port| port.protocol == Protocol::Tcp).then_some(header);
    let cells = |row: Row| -> Vec<Cow<'static, str>> {
        let entries = join(row.entries.iter().map(|kind| kind.as_str()), ",");
        let backends = if row.scope == Scope::Local { "on this node" } else { "every" };
        let seen = [now, other].map(|source| source_matrix::seen(row.client, row.scope, source));
        let named = header.map(|_| source_matrix::named(row.client));
        let seen = seen.into_iter().chain(named).map(|seen| seen.to_string());
        [row.client.to_string(), entries, backends.to_owned()].into_iter().chain(seen).map(Into::into).collect()
    };
    let titles = ["CLIENT", "AT", "BACKENDS", "NOW", choice].into_iter().chain(header);
    let titles: Vec<Cow<'static, str>> = titles.map(Cow::Borrowed).collect();
    let table: Vec<_> = std::iter::once(titles).chain(rows.into_iter().map(cells)).collect();
    field(text, "Backends See", columns(&table));
}

fn describe_health_port(text: &mut String, health_port: &HealthPortReport) {
    let HealthPortReport { port, local_endpoints, addresses, state } = health_port;
    let advice = if *local_endpoints == 0 { ", so load balancers pass over it" } else { "" };
    field(text, "Health Port", format!("{port}: {} on this node{advice}", counted(*local_endpoints, "endpoint")));
    match state {
        Some(ListenerState::Failed { message, .. }) => field(text, "Not answered", message),
        Some(ListenerState::Closed) => field(text, "Not answered", "the process is stopping"),
        _ if addresses.is_empty() => field(text, "Not answered", "see the problems"),
        _ => field(text, "Answered at", addresses.join(",")),
    }
}

fn describe_port(text: &mut String, port: &PortReport) {
    let name = if port.name.is_empty() { "<unset>" } else { &port.name };
    text.push('\n');
    field(text, "Port", format!("{name}  {}/{}", port.port, port.protocol));
    if let Some(target) = &port.target_port {
        field(text, "TargetPort", format!("{}/{}", Printable(target), port.protocol));
    }
    if let Some(number) = node_port(port) {
        field(text, "NodePort", format!("{name}  {number}/{}", port.protocol));
    }
    field(text, "Endpoints", or_none(join(picks(port), ",")));
    if let Some(traffic) = &port.traffic {
        field(text, "Accepted", traffic.accepted);
        field(text, "Retries", traffic.retries);
        field(text, "Dropped", reasons(&traffic.dropped));
        if !traffic.sources.is_empty() {
            field(text, "Clients Seen", traffic.sources.preserved);
            field(text, "Node Seen", reasons(&traffic.sources.fallbacks));
        }
    }
    let listeners = table_of(["ADDRESS", "KIND", "STATE"], port.listeners.iter().map(listener_row));
    field(text, "Listeners", listeners.trim_start());
    for listener in &port.listeners {
        if let Some(ListenerState::Failed { message, .. }) = &listener.state {
            field(text, "Not bound", message);
        }
    }
    if !port.backend_traffic.is_empty() {
        let header = ["BACKEND", "POD", "STATE", "ACTIVE", "TOTAL", "UP", "DOWN", "FAILED TRIES", "ENDED"];
        let backends = table_of(header, port.backend_traffic.iter().map(|backend| backend_row(port, backend)));
        field(text, "Backends", backends.trim_start());
    }
}

fn listener_row(listener: &ListenerReport) -> Vec<Cow<'static, str>> {
    let kind = serde_json::to_value(listener.kind).ok().and_then(|kind| kind.as_str().map(str::to_owned));
    let state = match &listener.state {
        Some(ListenerState::Failed { reason, .. }) => format!("failed ({reason}), see below"),
        Some(ListenerState::Parked) => "parked: connections are refused, no backend".to_owned(),
        Some(ListenerState::Closed) => "closed: the process is stopping".to_owned(),
        Some(ListenerState::Serving) | None => sides(listener),
    };
    let allocated = if listener.allocated { ", allocated" } else { "" };
    vec![listener.address.clone().into(), format!("{}{allocated}", kind.unwrap_or_default()).into(), state.into()]
}

fn sides(listener: &ListenerReport) -> String {
    if listener.outside == listener.inside {
        return side(listener.outside).to_owned();
    }
    format!("outside: {}; from this node: {}", side(listener.outside), side(listener.inside))
}

fn side(side: Side) -> &'static str {
    match side.verdict {
        Verdict::Serve => "serving",
        Verdict::Reject => "refusing, no backend",
        Verdict::Drop => "silent, no backend on this node",
    }
}

fn backend_row(port: &PortReport, backend: &BackendTraffic) -> Vec<Cow<'static, str>> {
    vec![
        backend.address.clone().into(),
        backend.pod.as_deref().map_or("-".into(), |pod| Printable(pod).to_string()).into(),
        backend_state(port, backend),
        (backend.active_connections + backend.active_flows).to_string().into(),
        (backend.connections + backend.flows).to_string().into(),
        bytes(backend.upstream_bytes).into(),
        bytes(backend.downstream_bytes).into(),
        reasons(&backend.connect_failures).into(),
        reasons(&backend.closed).into(),
    ]
}

fn backend_state(port: &PortReport, backend: &BackendTraffic) -> Cow<'static, str> {
    let state = use_of(port, backend);
    match backend.no_way_back_seconds {
        None => state,
        Some(seconds) => format!("{state}; no way back to clients, tried again in {seconds} s").into(),
    }
}

fn use_of(port: &PortReport, backend: &BackendTraffic) -> Cow<'static, str> {
    match (picks(port).contains(backend.address.as_str()), backend.ejected_seconds) {
        (false, _) => "draining".into(),
        (true, None) => "ready".into(),
        (true, Some(0)) => "ejected, next client tries".into(),
        (true, Some(seconds)) => format!("ejected, {seconds} s").into(),
    }
}

/// `refused 3, timeout 1`.
fn reasons(counts: &BTreeMap<Cow<'static, str>, u64>) -> String {
    match counts.is_empty() {
        true => "0".into(),
        false => join(counts.iter().map(|(reason, count)| format!("{reason} {count}")), ", "),
    }
}

/// `999 B`, `1.5 MiB`: four significant characters at most, exact numbers are in the JSON.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut amount = count as f64 / 1024.0;
    let mut units = UNITS.into_iter();
    let mut unit = units.next().unwrap_or_default();
    while amount >= 1023.5
        && let Some(next) = units.next()
    {
        (amount, unit) = (amount / 1024.0, next);
    }
    if amount < 99.95 { format!("{amount:.1} {unit}") } else { format!("{amount:.0} {unit}") }
}

/// `Label:             value`; further lines of the value are put below its first.
pub(crate) fn field(text: &mut String, label: &str, value: impl Display) {
    let value = value.to_string().trim_end().replace('\n', &format!("\n{:INDENT$}", ""));
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{:<INDENT$}{value}", format!("{label}:"));
}

fn table_of<const N: usize>(header: [&'static str; N], rows: impl Iterator<Item = Vec<Cow<'static, str>>>) -> String {
    let rows: Vec<_> = std::iter::once(header.map(Cow::Borrowed).to_vec()).chain(rows).collect();
    columns(&rows)
}

/// Rows with each column as wide as its widest cell, but the last.
pub(crate) fn columns(rows: &[Vec<Cow<'static, str>>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text += join(cells, GAP).trim_end();
        text.push('\n');
    }
    text
}

/// The address without its port: `10.96.0.10`, `fd00::10`.
fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host).trim_start_matches('[').trim_end_matches(']')
}

fn join(items: impl IntoIterator<Item = impl AsRef<str>>, separator: &str) -> String {
    let mut text = String::new();
    for (index, item) in items.into_iter().enumerate() {
        text.push_str(if index > 0 { separator } else { "" });
        text.push_str(item.as_ref());
    }
    text
}

fn or_none(text: String) -> String {
    if text.is_empty() { "<none>".into() } else { text }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::live::sample;
    use crate::name::ObjectName;
    use crate::plan::HeaderVersion;
    use crate::status::Status;

    #[test]
    fn given_a_running_relay_when_tabled_then_each_service_has_a_line() {
        let text = table(&LiveReport::of(&sample::status()));

        insta::assert_snapshot!(text, @r"
        NAMESPACE   NAME       TYPE        CLUSTER-IP    PORT(S)        BACKENDS   ACTIVE   CONNS   FAILED
        default     dns        ClusterIP   127.96.0.11   53/UDP         0          0        0       0
        default     headless   ClusterIP   None          <headless>     -          -        -       -
        default     web        NodePort    127.96.0.10   80:30080/TCP   2          1        5       1

        Not bound (`kube-relay status NAMESPACE/NAME` tells what to do):
          127.0.0.1:30080   default/web   in_use

        Problems:
          Service default/web: something about Service default/web [field_unknown]
        ");
    }

    #[test]
    fn t234_given_a_process_that_has_taken_over_when_shown_wide_then_it_says_from_whom_and_what() {
        let upgrade = UpgradeStatus {
            at: "2026-01-02T03:04:05Z".into(),
            from_pid: 41,
            from_version: "0.1.0".into(),
            listeners: 2,
            streams: 1,
            flows: 0,
            standstill_ms: 7,
            elapsed_ms: 19,
        };
        let live = LiveReport { upgrade: Some(upgrade), ..LiveReport::of(&sample::status()) };

        assert!(wide(&live).ends_with(
            "\nTaken over from pid 41 (kube-relay 0.1.0) at 2026-01-02T03:04:05Z in 19 ms: 2 listeners, 1 connection and \
             0 UDP flows, which stood still for 7 ms.\n"
        ));
    }

    #[test]
    fn given_a_running_relay_when_tabled_widely_then_traffic_and_balance_are_told_too() {
        let text = wide(&LiveReport::of(&sample::status()));

        let further = |line: usize| {
            let cells = text.lines().nth(line).expect("a line").split("   ").map(str::trim);
            cells.filter(|cell| !cell.is_empty()).skip(HEADER.len()).collect::<Vec<_>>()
        };
        assert_eq!(further(0), ["UP", "DOWN", "RETRIES", "AFFINITY", "BALANCE"]);
        assert_eq!(further(2), ["-"; 5]);
        assert_eq!(further(3), ["2.0 KiB", "3.0 MiB", "1", "None", "round-robin"]);
    }

    #[test]
    fn given_one_service_when_described_then_listeners_and_backends_have_live_numbers() {
        let report = sample::status().report().only(&ObjectName::parse("web")).expect("web is there");

        insta::assert_snapshot!(describe(&report), @r"
        Name:              web
        Namespace:         default
        Type:              NodePort
        IP:                127.96.0.10
        Session Affinity:  None
        Backends See:      CLIENT                        AT                   BACKENDS   NOW         WITH preserve                             WITH proxy-protocol
                           pod of this node              clusterIP,nodePort   every      this node   client unless hostNetwork or one bridge   client
                           other pod in --cluster-cidr   clusterIP,nodePort   every      this node   client if here, unless hostNetwork        client
                           outside, other nodes          clusterIP,nodePort   every      this node   client if here, unless hostNetwork        client
                           this node                     clusterIP,nodePort   every      this node   this node                                 this node, or the VIP

        Port:              http  80/TCP
        TargetPort:        8000/TCP
        NodePort:          http  30080/TCP
        Endpoints:         10.244.0.2:8000,10.244.0.3:8000
        Accepted:          6
        Retries:           1
        Dropped:           client_abort 1
        Listeners:         ADDRESS           KIND                   STATE
                           127.96.0.10:80    clusterIP, allocated   serving
                           127.0.0.1:30080   nodePort, allocated    failed (in_use), see below
        Not bound:         address in use; ask ss
        Backends:          BACKEND           POD     STATE   ACTIVE   TOTAL   UP        DOWN      FAILED TRIES   ENDED
                           10.244.0.2:8000   web-1   ready   1        5       2.0 KiB   3.0 MiB   0              finished 1
                           10.244.0.3:8000   -       ready   0        0       0 B       0 B       refused 1      0

        Problems:
          Service default/web: something about Service default/web [field_unknown]
        ");
    }

    #[test]
    fn given_what_has_happened_when_told_then_each_has_a_line_with_its_time() {
        let happened = |what: &str| {
            let (at, service) = ("2026-11-21T10:00:00Z".into(), "default/web".into());
            Happened { at, service, what: what.into() }
        };

        assert_eq!(events(&[]), "");
        assert_eq!(
            events(&[happened("added"), happened("deleted")]),
            "\nEvents:\n  2026-11-21T10:00:00Z   added\n  2026-11-21T10:00:00Z   deleted\n"
        );
    }

    #[test]
    fn given_an_allow_list_when_described_then_who_may_come_from_outside_is_told() {
        let described = |nets: &[&str]| {
            let mut report = sample::status().report().only(&ObjectName::parse("web")).expect("web is there");
            let nets: Vec<_> = nets.iter().map(|net| net.parse().expect("a net")).collect();
            report.services[0].ports[0].listeners[0].allow_from = Some(nets);
            describe(&report)
        };

        assert!(described(&["203.0.113.0/24"]).contains("\nFrom Outside:      only 203.0.113.0/24\n"));
        assert!(described(&[]).contains("\nFrom Outside:      nobody\n"));
    }

    #[test]
    fn t126_given_choices_that_are_made_when_described_then_the_table_tells_what_is_and_what_the_other_would_be() {
        let described = |change: fn(&mut ServiceReport)| {
            let mut report = sample::status().report().only(&ObjectName::parse("web")).expect("web is there");
            change(&mut report.services[0]);
            describe(&report)
        };
        let titles = |text: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with("Backends See:")).expect("a table");
            line.split("   ").map(str::trim).filter(|title| !title.is_empty()).skip(5).map(str::to_owned).collect()
        };

        let made = titles(&described(|web| {
            web.source_address = SourceAddress::Preserve;
            web.ports[0].listeners[0].proxy_protocol = Some(HeaderVersion::V2);
        }));
        assert_eq!(made, ["WITHOUT preserve", "IN THE PROXY HEADER"]);
        let refused: fn(&mut ServiceReport) = |web| {
            web.source_address = SourceAddress::Preserve;
            web.source_refusal = Some("it may not: let it".to_owned());
        };
        assert_eq!(titles(&described(refused)), ["WITH THE REMEDY", "WITH proxy-protocol"]);
        let row = described(refused).lines().find(|line| line.contains("outside, other nodes")).map(str::to_owned);
        assert!(row.is_some_and(|row| row.contains("every      this node   client if here, unless hostNetwork")));
        let why = "\nSource Address:    preserve, but backends see this node: it may not: let it\n";
        assert!(described(refused).contains(why));
        let over_udp = titles(&described(|web| web.ports[0].protocol = Protocol::Udp));
        assert_eq!(over_udp, ["WITH preserve"], "no header over UDP");
    }

    #[test]
    fn given_policies_that_are_local_when_described_then_they_are_named_and_others_are_not() {
        let described = |local: &[usize]| {
            let mut report = sample::status().report().only(&ObjectName::parse("web")).expect("web is there");
            let listeners = &mut report.services[0].ports[0].listeners;
            local.iter().for_each(|place| listeners[*place].outside.scope = Scope::Local);
            describe(&report)
        };

        assert!(!described(&[]).contains("Policy"));
        assert!(described(&[1]).contains("\nTraffic Policy:    external Local\n"));
        assert!(described(&[0, 1]).contains("\nTraffic Policy:    external Local, internal Local\n"));
    }

    #[test]
    fn given_an_alias_when_described_then_the_other_name_is_told_as_it_is_and_moves_no_cursor() {
        let mut report = sample::status().report().only(&ObjectName::parse("headless")).expect("it is there");
        report.services[0].external_name = Some("db.example\u{1b}[2J".into());

        assert!(describe(&report).contains("\nExternal Name:     db.example\\u{1b}[2J\n"));
    }

    /// `default/mail` alone, described.
    fn mail(change: impl FnOnce(&mut Status)) -> String {
        let mail = sample::mail();
        let mut status = Status { synced: true, ..Status::default() };
        status.services = [(mail.service.name.clone(), Arc::new(mail))].into();
        change(&mut status);
        describe(&status.report())
    }

    #[test]
    fn given_a_health_port_when_described_then_what_load_balancers_hear_and_where_is_told() {
        let text = mail(|_| {});

        let lines: Vec<_> = text.lines().skip_while(|line| !line.starts_with("Health Port")).take(2).collect();
        assert_eq!(
            lines,
            [
                "Health Port:       31025: 0 endpoints on this node, so load balancers pass over it",
                "Answered at:       127.0.0.1:31025",
            ]
        );
    }

    #[test]
    fn t207_given_a_health_port_that_is_taken_when_described_or_tabled_then_it_is_told() {
        let fail = |status: &mut Status| {
            let failed = ListenerState::Failed { reason: "in_use".into(), message: "ask ss".into() };
            status.failed_health_ports = Arc::new([(ObjectName::parse("mail"), failed)].into());
            assert!(table(&LiveReport::of(status)).contains("  health port 31025   default/mail   in_use\n"));
        };

        assert!(mail(fail).contains("Not answered:      ask ss\n"));
    }

    #[test]
    fn given_a_skipped_service_when_described_then_the_reason_stands_there() {
        let report = sample::status().report().only(&ObjectName::parse("headless")).expect("it is there");

        insta::assert_snapshot!(describe(&report), @r"
        Name:              headless
        Namespace:         default
        Type:              ClusterIP
        Not served:        headless, its clients find the backends by DNS
        ");
    }

    #[test]
    fn given_a_relay_that_has_just_begun_when_tabled_then_it_says_so() {
        let text = table(&LiveReport::of(&Status::default()));

        assert_eq!(text, "No Services.\n\nThe source has not delivered its first complete state yet.\n");
    }

    #[test]
    fn f14_given_clients_that_wait_when_tabled_then_why_how_long_and_what_helps_is_told() {
        let mut live = LiveReport::of(&Status { synced: true, ..Status::default() });
        let pause = |reason, seconds, remedy| PauseReport { reason, seconds, remedy };
        live.pauses = vec![pause("fd_limit".into(), 12, "more of them".into())];

        let text = table(&live);

        assert!(
            text.ends_with("\nTCP clients wait to be accepted (fd_limit, for 12 s). What helps: more of them.\n"),
            "{text}"
        );
    }

    #[test]
    fn given_numbers_of_bytes_when_printed_then_they_are_short() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536 * 1024, "1.5 MiB"),
            (150 * 1024 * 1024, "150 MiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn given_addresses_of_both_families_when_the_port_is_cut_off_then_brackets_go_too() {
        assert_eq!(host("10.96.0.10:80"), "10.96.0.10");
        assert_eq!(host("[fd00::10]:80"), "fd00::10");
    }
}
