//! What becomes of a client of one address: whose it is, where its traffic goes, and why there.
//!
//! A pure function over a report with its choices (`choice`), be it a running relay's or that of manifests. It decides
//! nothing: verdicts and backends are the plan's, and who is let in on which side is asked of the rule that the data plane
//! goes by (`entrance`).

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::choice::{Choice, Judged, Kept, Pin, Rule};
use crate::describe::{abridged, counted};
use crate::entrance::{Arrival, Entrance, List, Origin, inside_at};
use crate::name::{Family, Scope};
use crate::overview::{columns, field, node_port};
use crate::plan::{ListenerKind, Side, Target, Verdict};
use crate::printable::Printable;
use crate::source_matrix::{self, ClientPlace};
use crate::status::{ListenerReport, ListenerState, PortReport, Report, ServiceReport};
use crate::value::Destination;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// Where the client connects to.
    pub destination: Destination,
    /// Its address, as a balancer in front would name it, too; `None`: whoever it is.
    pub from: Option<IpAddr>,
}

/// Why there is nothing to explain.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unexplained {
    /// No listener of a Service has the address.
    #[error("{address}: no Service is served there{near}")]
    Nobody {
        /// What was asked for: `10.96.0.10:80`, or `10.96.0.10:80/TCP`.
        address: String,
        /// What there is instead, as the end of a sentence; may be empty.
        near: String,
    },
    /// Client and address cannot meet.
    #[error("{address}: {client} cannot connect there: one is IPv4, the other IPv6")]
    Family {
        /// The client.
        client: IpAddr,
        /// Where to.
        address: SocketAddr,
    },
}

/// What there is to say of one listener.
#[derive(Clone, Debug)]
pub struct Explanation<'a> {
    service: &'a ServiceReport,
    port: &'a PortReport,
    listener: &'a ListenerReport,
    /// One for each kind of client that fares otherwise than the others.
    cases: Vec<Case<'a>>,
}

/// Some clients, and what becomes of them.
#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    who: Who,
    fate: Fate,
    /// How the backends of their side were chosen; `None` where the report does not tell.
    choice: Option<&'a Choice>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Anybody,
    /// Anybody, or one client, that is neither this node nor one of its pods.
    Outside(Option<IpAddr>),
    /// This node and its pods, or one of them.
    Inside(Option<IpAddr>),
}

/// What a client meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// A backend.
    Served,
    /// Connection refused, port unreachable.
    Rejected,
    /// No answer, or a reset where a balancer in front brings it: the policy forbids the endpoints that there are.
    Dropped,
    /// A reset: balancers in front are to name each client, and none is believed.
    Unannounced,
    /// No answer, or a reset where a balancer in front brings it: a list does not have the client.
    KeptOut(List),
    /// Nobody of ours: the listener is not bound.
    Unbound,
}

/// Explains each listener at an address: one, or two where TCP and UDP share it.
///
/// `inside` are the networks of this node and its pods: what `--from` is compared with.
///
/// # Errors
/// Where no Service is served there, and where the client is of the other family.
pub fn explain<'a>(
    report: &'a Report,
    inside: &[IpNet],
    question: &Question,
) -> Result<Vec<Explanation<'a>>, Unexplained> {
    let Destination { address, protocol } = question.destination;
    let from = question.from.map(|client| client.to_canonical());
    let (text, family) = (address.to_string(), Family::of(address.ip()));
    let asked_for = |(_, port, listener): &Place<'_>| {
        listener.address == text && protocol.is_none_or(|protocol| protocol == port.protocol)
    };
    let mut places: Vec<_> = places(report).filter(asked_for).collect();
    if places.is_empty() {
        return Err(nobody(report, question.destination));
    }
    if let Some(client) = from.filter(|client| Family::of(*client) != family) {
        // It can reach a balancer in front, which reaches us by the other family.
        places.retain(|(_, _, listener)| listener.accept_proxy_from.is_some());
        if places.is_empty() {
            return Err(Unexplained::Family { client, address });
        }
    }
    let inside_of: Vec<_> = inside_at(inside, address.ip()).collect();
    let explain = |(service, port, listener): Place<'a>| Explanation {
        service,
        port,
        listener,
        cases: cases(port, listener, family, &inside_of, from),
    };
    Ok(places.into_iter().map(explain).collect())
}

/// A listener, and whose it is.
type Place<'a> = (&'a ServiceReport, &'a PortReport, &'a ListenerReport);

fn places(report: &Report) -> impl Iterator<Item = Place<'_>> {
    let ports = report.services.iter().flat_map(|service| service.ports.iter().map(move |port| (service, port)));
    ports.flat_map(|(service, port)| port.listeners.iter().map(move |listener| (service, port, listener)))
}

fn cases<'a>(
    port: &'a PortReport,
    listener: &ListenerReport,
    family: Family,
    inside_of: &[IpNet],
    from: Option<IpAddr>,
) -> Vec<Case<'a>> {
    let ListenerReport { source_ranges, allow_from, .. } = listener;
    let entrance = Entrance { source_ranges, inside_of, allow_from: allow_from.as_deref() };
    let one_sided = listener.outside == listener.inside && allow_from.is_none();
    let asked = match from.map(|client| (client, entrance.origin(client))) {
        Some((client, Origin::Inside)) => vec![Who::Inside(Some(client))],
        Some((client, Origin::Outside)) => vec![Who::Outside(Some(client))],
        None if one_sided => vec![Who::Anybody],
        None => vec![Who::Outside(None), Who::Inside(None)],
    };
    let case = |who: Who| {
        let side = who.side(listener);
        let choice = port.choices.iter().find(|choice| (choice.family, choice.scope) == (family, side.scope));
        Case { who, fate: fate(who, listener, &entrance), choice }
    };
    asked.into_iter().map(case).collect()
}

fn fate(who: Who, listener: &ListenerReport, entrance: &Entrance<'_>) -> Fate {
    let target = Target { outside: listener.outside, inside: listener.inside };
    match listener.state {
        Some(ListenerState::Failed { .. } | ListenerState::Closed) => return Fate::Unbound,
        // Nobody listens on a parked socket: the kernel refuses without a look at any list.
        _ if target.parked() => return Fate::Rejected,
        // Balancers get none either, so that nobody comes by them.
        _ if listener.accept_proxy_from.is_some() && listener.outside.verdict == Verdict::Drop => return Fate::Dropped,
        _ if listener.accept_proxy_from.as_ref().is_some_and(Vec::is_empty) => return Fate::Unannounced,
        _ => {}
    }
    let kept_out = match who {
        Who::Outside(None) if entrance.allow_from == Some(&[]) => Some(List::AllowFrom),
        _ => who.client().and_then(|client| entrance.admit(client).err()),
    };
    match (kept_out, who.side(listener).verdict) {
        (Some(list), _) => Fate::KeptOut(list),
        (None, Verdict::Serve) => Fate::Served,
        (None, Verdict::Reject) => Fate::Rejected,
        (None, Verdict::Drop) => Fate::Dropped,
    }
}

impl Who {
    fn side(self, listener: &ListenerReport) -> Side {
        match self {
            Self::Anybody | Self::Outside(_) => listener.outside,
            Self::Inside(_) => listener.inside,
        }
    }

    fn client(self) -> Option<IpAddr> {
        match self {
            Self::Anybody => None,
            Self::Outside(client) | Self::Inside(client) => client,
        }
    }
}

/// What is served at the same IP, or else under the same number, as far as it fits into a line.
fn nobody(report: &Report, Destination { address, protocol }: Destination) -> Unexplained {
    let at = |other: &str| other.parse::<SocketAddr>().ok();
    let health = report.services.iter().find(|service| {
        let mut addresses = service.health_port.iter().flat_map(|port| &port.addresses);
        addresses.any(|other| at(other) == Some(address))
    });
    let all: Vec<_> = places(report).filter_map(|place| Some((at(&place.2.address)?, place))).collect();
    let here = all.iter().filter(|(at, _)| at.ip() == address.ip());
    let here =
        here.map(|(at, (service, port, _))| format!("{}/{} ({})", at.port(), port.protocol, name(service, port)));
    let elsewhere = all.iter().filter(|(at, _)| at.port() == address.port());
    let elsewhere =
        elsewhere.map(|(at, (service, port, _))| format!("{at}/{} ({})", port.protocol, name(service, port)));
    let (here, elsewhere): (Vec<_>, Vec<_>) = (here.collect(), elsewhere.collect());
    let near = match health {
        Some(service) => format!("; it is the health port of {}/{}", service.namespace, service.name),
        None if !here.is_empty() => format!("; at {} are {}", address.ip(), abridged(&here)),
        None if !elsewhere.is_empty() => format!("; port {} is served at {}", address.port(), abridged(&elsewhere)),
        None => String::new(),
    };
    let protocol = protocol.map(|protocol| format!("/{protocol}")).unwrap_or_default();
    Unexplained::Nobody { address: format!("{address}{protocol}"), near }
}

/// `default/web:http`, as everywhere.
fn name(service: &ServiceReport, port: &PortReport) -> String {
    let colon = if port.name.is_empty() { "" } else { ":" };
    format!("{}/{}{colon}{}", service.namespace, service.name, port.name)
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, port, listener, cases } = self;
        let mut text = String::new();
        field(&mut text, "Service", format!("{}, {}", name(service, port), service.kind));
        let (address, kind) = (&listener.address, listener.kind.in_words());
        field(&mut text, "Address", format!("{address}/{}, {kind}, {}", port.protocol, state(listener)));
        field(&mut text, "Port", numbers(port, cases));
        for (list, who) in lists(listener) {
            field(&mut text, list.label(), who);
        }
        if let Some(balancers) = self.in_front() {
            field(&mut text, "In Front", balancers);
        }
        if let Some(version) = listener.proxy_protocol {
            field(&mut text, "PROXY Header", format!("{version}, to backends: it names the client"));
        }
        for case in cases {
            field(&mut text, case.who.label(), self.outcome(case));
            let endpoints = case.choice.map(|choice| self.rows(choice, case.fate)).unwrap_or_default();
            if !endpoints.is_empty() {
                field(&mut text, "Endpoints", columns(&endpoints));
            }
            if case.fate == Fate::Served {
                field(&mut text, "Backends See", self.seen(case));
                if let Some(pin) = case.choice.and_then(|choice| choice.pin) {
                    field(&mut text, "Affinity", affinity(pin, case.choice));
                }
            }
        }
        if cases.iter().any(|case| case.fate == Fate::Served) {
            field(&mut text, "Balance", self.balance());
        }
        f.write_str(&text)
    }
}

impl Explanation<'_> {
    /// False where the listener is not bound: nobody is served there then, whatever the plan says.
    pub fn is_served(&self) -> bool {
        self.cases.iter().all(|case| case.fate != Fate::Unbound)
    }

    fn outcome(&self, case: &Case<'_>) -> String {
        match case.fate {
            Fate::Served => self.rule(case),
            Fate::Rejected => "refused: no endpoint can serve".into(),
            Fate::Dropped => {
                let how = self.how_kept_out();
                format!("{how}: {} is Local, and no endpoint on this node can serve", self.policy())
            }
            Fate::KeptOut(list) => format!("{}: not in {}", self.how_kept_out(), list.in_words()),
            Fate::Unannounced => "reset: no balancer is there that may name it".into(),
            Fate::Unbound => "not served by this relay: see the address above".into(),
        }
    }

    /// What becomes of clients that are not even refused. The kernel can keep out a peer, not whom it names.
    fn how_kept_out(&self) -> &'static str {
        let ListenerReport { accept_proxy_from, outside, .. } = self.listener;
        if accept_proxy_from.is_none() || outside.verdict == Verdict::Drop { "no answer" } else { "reset" }
    }

    /// Through whom clients come, where a balancer in front names each; all else here is about these clients.
    fn in_front(&self) -> Option<String> {
        let balancers = self.listener.accept_proxy_from.as_ref()?;
        if balancers.is_empty() {
            let why = "--accept-proxy-from names none of this family, or an annotation has a mistake";
            return Some(format!("nobody is believed, so nobody is served: {why}"));
        }
        let nets: Vec<_> = balancers.iter().map(ToString::to_string).collect();
        let text = format!("clients are those that {} name in a PROXY header; others are reset", abridged(&nets));
        let Some(client) = self.cases.iter().find_map(|case| case.who.client()) else { return Some(text) };
        Some(match Arrival::of(client, Some(balancers)) {
            Arrival::Announced => format!("{text}; {client} is one of these balancers"),
            Arrival::InPerson | Arrival::Unannounced => format!("{text}, so is {client} where none of them names it"),
        })
    }

    /// Whose address the backends of such clients see.
    fn seen(&self, case: &Case<'_>) -> String {
        let (source, scope) = (self.service.source_in_use(), case.who.side(self.listener).scope);
        let seen = |place: ClientPlace| source_matrix::seen(place, scope, source);
        let places = case.who.places();
        match places {
            [first, others @ ..] if others.iter().all(|place| seen(*place) == seen(*first)) => seen(*first).to_string(),
            _ => {
                let lines: Vec<_> = places.iter().map(|place| format!("{place}: {}", seen(*place))).collect();
                lines.join("\n")
            }
        }
    }

    /// What chose the backends, and how many they are.
    fn rule(&self, case: &Case<'_>) -> String {
        let Some(choice) = case.choice else { return "served; by which rule, the relay does not tell".into() };
        let rule = match (choice.rule, choice.scope) {
            (Rule::Ready, Scope::Cluster) if self.is_exempt(case) => {
                format!("every ready endpoint: {} Local does not bind this node and its pods", self.policy())
            }
            (Rule::Ready, Scope::Cluster) => "every ready endpoint".into(),
            (Rule::Ready, Scope::Local) => format!("the ready endpoints on this node: {} is Local", self.policy()),
            (Rule::NodeHints, _) => "the ready endpoints whose hints name this node".into(),
            (Rule::ZoneHints, _) => "the ready endpoints whose hints name this node's zone".into(),
            (Rule::Terminating, Scope::Cluster) => "no endpoint is ready: those that end, and still serve".into(),
            (Rule::Terminating, Scope::Local) => {
                format!(
                    "none on this node is ready: those there that end, and still serve ({} is Local)",
                    self.policy()
                )
            }
            (Rule::Nobody, _) => "none any more".into(),
        };
        let used = choice.endpoints.iter().filter(|one| one.unused.is_none()).count();
        format!("{rule} ({used} of {})", counted(choice.endpoints.len(), "endpoint"))
    }

    /// True for clients that use every endpoint where others may not.
    fn is_exempt(&self, case: &Case<'_>) -> bool {
        matches!(case.who, Who::Inside(_)) && self.listener.outside.scope == Scope::Local
    }

    /// The field that says which endpoints may be used at such an address.
    fn policy(&self) -> &'static str {
        if self.listener.kind == ListenerKind::ClusterIp { "internalTrafficPolicy" } else { "externalTrafficPolicy" }
    }

    /// Address, pod and what becomes of it: those that are used first.
    fn rows(&self, choice: &Choice, fate: Fate) -> Vec<Vec<Cow<'static, str>>> {
        if matches!(fate, Fate::KeptOut(_) | Fate::Unannounced | Fate::Unbound) {
            return Vec::new();
        }
        let row = |one: &Judged| {
            let pod = one.pod.as_deref().map_or("-".into(), |pod| Printable(pod).to_string().into());
            vec![one.address.to_string().into(), pod, self.use_of(one, choice.next)]
        };
        let (used, unused): (Vec<_>, Vec<_>) = choice.endpoints.iter().partition(|one| one.unused.is_none());
        used.into_iter().chain(unused).map(row).collect()
    }

    fn use_of(&self, one: &Judged, next: Option<SocketAddr>) -> Cow<'static, str> {
        match (one.unused, one.ejected_seconds) {
            (Some(why), _) => format!("not used: {why}").into(),
            (None, _) if next == Some(one.address) && self.service.affinity_seconds.is_some() => {
                "next, for a client that is new".into()
            }
            (None, _) if next == Some(one.address) => "next".into(),
            (None, Some(0)) => "ejected, as it could not be reached: the next client tries it".into(),
            (None, Some(seconds)) => format!("ejected, as it could not be reached: tried again in {seconds} s").into(),
            (None, None) => "used".into(),
        }
    }

    fn balance(&self) -> String {
        let balance = self.service.balance;
        match self.service.affinity_seconds {
            Some(seconds) => format!("{balance}; a client that was here in the last {seconds} s keeps its backend"),
            None => balance.to_string(),
        }
    }
}

/// Where session affinity keeps a client, and for how long.
fn affinity(Pin { client, kept }: Pin, choice: Option<&Choice>) -> String {
    let Some(Kept { backend, seconds }) = kept else { return format!("{client} has no backend kept") };
    let mut endpoints = choice.into_iter().flat_map(|choice| &choice.endpoints);
    // With 0 its time is over: whoever comes next may try it.
    let is_out = endpoints.any(|one| one.address == backend && one.ejected_seconds.is_some_and(|seconds| seconds > 0));
    let moves =
        if is_out { "; as that one is ejected, its next connection goes to another and stays there" } else { "" };
    format!("{client} is kept at {backend} for another {seconds} s{moves}")
}

impl Who {
    fn label(self) -> &'static str {
        match self {
            Self::Anybody => "Any Client",
            Self::Outside(None) => "From Outside",
            Self::Inside(None) => "From This Node",
            Self::Outside(Some(_)) => "Client Outside",
            Self::Inside(Some(_)) => "Client Inside",
        }
    }

    /// Where such a client may be. By its address alone, this node and pods are not told apart.
    fn places(self) -> &'static [ClientPlace] {
        match self {
            Self::Anybody => &ClientPlace::ALL,
            Self::Outside(_) => &[ClientPlace::Elsewhere],
            Self::Inside(_) => &[ClientPlace::PodHere, ClientPlace::PodElsewhere, ClientPlace::Node],
        }
    }
}

impl List {
    fn label(self) -> &'static str {
        match self {
            Self::SourceRanges => "Source Ranges",
            Self::AllowFrom => "Allow From",
        }
    }

    fn in_words(self) -> &'static str {
        match self {
            Self::SourceRanges => "spec.loadBalancerSourceRanges",
            Self::AllowFrom => "kube-relay.dev/allow-from or --allow-from",
        }
    }
}

fn state(listener: &ListenerReport) -> Cow<'static, str> {
    match &listener.state {
        None => "planned".into(),
        Some(ListenerState::Serving) => "serving".into(),
        Some(ListenerState::Parked) => "parked".into(),
        Some(ListenerState::Closed) => "closed, as the process is stopping".into(),
        Some(ListenerState::Failed { message, .. }) => format!("not bound: {message}").into(),
    }
}

/// `80 → nodePort 30080 → targetPort http (8000)`: from the Service's number to those of the backends.
fn numbers(port: &PortReport, cases: &[Case<'_>]) -> String {
    let used = cases.iter().filter_map(|case| case.choice).flat_map(|choice| &choice.endpoints);
    let behind: BTreeSet<_> = used.filter(|one| one.unused.is_none()).map(|one| one.address.port()).collect();
    let behind: Vec<_> = behind.iter().map(u16::to_string).collect();
    let node_port = node_port(port).map(|number| format!(" → nodePort {number}")).unwrap_or_default();
    let target = match (port.target_port.as_deref().map(Printable), behind.as_slice()) {
        (Some(target), [only]) if *only == target.0 => format!(" → targetPort {target}"),
        (Some(target), []) => format!(" → targetPort {target}"),
        (Some(target), some) => format!(" → targetPort {target} ({})", abridged(some)),
        (None, []) => String::new(),
        (None, some) => format!(" → {}", abridged(some)),
    };
    format!("{}{node_port}{target}", port.port)
}

/// Who may come, where not everybody may.
fn lists(listener: &ListenerReport) -> Vec<(List, String)> {
    let texts = |nets: &[IpNet]| abridged(&nets.iter().map(ToString::to_string).collect::<Vec<_>>());
    let mut lists = Vec::new();
    if !listener.source_ranges.is_empty() {
        lists.push((List::SourceRanges, format!("only {}", texts(&listener.source_ranges))));
    }
    match listener.allow_from.as_deref() {
        Some([]) => lists.push((List::AllowFrom, "nobody from outside".into())),
        Some(nets) => lists.push((List::AllowFrom, format!("from outside only {}", texts(nets)))),
        None => {}
    }
    lists
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::Node;
    use crate::live::sample;
    use crate::model::{Endpoint, Event, Model, Objects, Service, ServiceKind, Slice, TrafficPolicy};
    use crate::plan::{AllowFrom, Plan, PlanOptions};
    use crate::value::destination;

    const INSIDE: &str = "10.244.0.0/16";
    const POD: &str = "10.244.0.7";
    const STRANGER: &str = "203.0.113.9";

    fn net(text: &str) -> IpNet {
        text.parse().expect("a net")
    }

    fn options() -> PlanOptions {
        PlanOptions {
            node: Node { name: Some("here".into()), zone: None },
            node_port_addresses: vec![[192, 0, 2, 1].into()],
            ..PlanOptions::default()
        }
    }

    fn web() -> Service {
        let mut web = Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80).node_port(30080);
        web.ports[0].target_port = Some("web".into());
        web
    }

    fn on(host: u8, node: &str) -> Endpoint {
        let pod = format!("web-{host}");
        Endpoint { node: Some(node.into()), pod: Some(pod.into()), ..Endpoint::new([10, 0, 0, host]) }
    }

    fn planned(service: &Service, endpoints: Vec<Endpoint>, options: &PlanOptions) -> Report {
        let slice = Slice::new("web-1", service).port("http", 8000);
        let slice = endpoints.into_iter().fold(slice, Slice::endpoint);
        let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), BTreeSet::new());
        model.apply(Event::Replace(Objects::new(vec![service.clone()], vec![slice])), &mut dirty);
        plan.update(&model, &dirty, options);
        Report::of(&model, &plan, vec![]).explained(&model, &plan, options)
    }

    fn question(to: &str, from: Option<&str>) -> Question {
        let from = from.map(|ip| ip.parse().expect("an address"));
        Question { destination: destination(to).expect("a destination"), from }
    }

    fn fates(report: &Report, to: &str, from: Option<&str>) -> Vec<Fate> {
        let explained = explain(report, &[net(INSIDE)], &question(to, from)).expect("a Service is there");
        explained.iter().flat_map(|one| &one.cases).map(|case| case.fate).collect()
    }

    fn told(report: &Report, to: &str, from: Option<&str>) -> String {
        let explained = explain(report, &[net(INSIDE)], &question(to, from)).expect("a Service is there");
        explained.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn given_policies_and_endpoints_when_asked_then_each_side_has_the_fate_that_the_plan_gives_it() {
        const CLUSTER_IP: &str = "10.96.0.10:80";
        const NODE_PORT: &str = "192.0.2.1:30080";
        let local = Service { external_policy: TrafficPolicy::Local, ..web() };
        let internal = Service { internal_policy: TrafficPolicy::Local, ..web() };
        let (here, there) = (|| vec![on(1, "here")], || vec![on(1, "there")]);
        let cases = [
            (web(), there(), CLUSTER_IP, None, vec![Fate::Served]),
            (web(), vec![], CLUSTER_IP, None, vec![Fate::Rejected]),
            (web(), there(), NODE_PORT, Some(STRANGER), vec![Fate::Served]),
            (local.clone(), here(), NODE_PORT, None, vec![Fate::Served, Fate::Served]),
            (local.clone(), there(), NODE_PORT, None, vec![Fate::Dropped, Fate::Served]),
            (local.clone(), there(), NODE_PORT, Some(STRANGER), vec![Fate::Dropped]),
            (local.clone(), there(), NODE_PORT, Some(POD), vec![Fate::Served]),
            (local.clone(), there(), CLUSTER_IP, Some(STRANGER), vec![Fate::Served]),
            (local, vec![], NODE_PORT, Some(STRANGER), vec![Fate::Rejected]),
            (internal.clone(), there(), CLUSTER_IP, Some(POD), vec![Fate::Dropped]),
            (internal, there(), NODE_PORT, Some(STRANGER), vec![Fate::Served]),
        ];
        for (service, endpoints, to, from, expected) in cases {
            let report = planned(&service, endpoints, &options());

            assert_eq!(fates(&report, to, from), expected, "{to} from {from:?}: {service:?}");
        }
    }

    #[test]
    fn given_lists_of_who_may_come_when_asked_for_a_client_then_the_one_that_lacks_it_is_named() {
        let guarded = Service {
            kind: ServiceKind::LoadBalancer,
            load_balancer_ips: vec![[198, 51, 100, 1].into()].into(),
            source_ranges: vec![net("198.18.0.0/15"), net(INSIDE)].into(),
            ..web()
        };
        let allowing = PlanOptions { allow_from: Some(AllowFrom::new(&[net("198.18.0.0/16")])), ..options() };
        let (ranges, allow_from) = (Fate::KeptOut(List::SourceRanges), Fate::KeptOut(List::AllowFrom));
        let cases = [
            (options(), "198.51.100.1:80", STRANGER, ranges),
            (options(), "198.51.100.1:80", "198.19.0.1", Fate::Served),
            (options(), "198.51.100.1:80", POD, Fate::Served),
            (options(), "10.96.0.10:80", STRANGER, Fate::Served),
            (allowing.clone(), "10.96.0.10:80", STRANGER, allow_from),
            (allowing.clone(), "10.96.0.10:80", POD, Fate::Served),
            (allowing.clone(), "10.96.0.10:80", "10.96.0.10", Fate::Served), // A program here that connects to it.
            (allowing.clone(), "10.96.0.10:80", "10.96.0.11", allow_from),
            (allowing.clone(), "198.51.100.1:80", "198.19.0.1", allow_from),
            (allowing, "198.51.100.1:80", "198.18.0.1", Fate::Served),
        ];
        for (options, to, from, expected) in cases {
            let report = planned(&guarded, vec![on(1, "there")], &options);

            assert_eq!(fates(&report, to, Some(from)), [expected], "{to} from {from}");
        }
    }

    #[test]
    fn given_ranges_when_nobody_can_serve_then_those_outside_of_them_are_refused_like_all() {
        let guarded = Service {
            kind: ServiceKind::LoadBalancer,
            load_balancer_ips: vec![[198, 51, 100, 1].into()].into(),
            source_ranges: vec![net("198.18.0.0/15")].into(),
            ..web()
        };

        let parked = planned(&guarded, vec![], &options());

        assert_eq!(fates(&parked, "198.51.100.1:80", Some(STRANGER)), [Fate::Rejected]);
    }

    #[test]
    fn given_a_listener_that_is_not_bound_when_told_then_nobody_is_served_and_the_reason_is_told() {
        let mut report = sample::status().report();
        let web = report.services.iter_mut().find(|service| service.name == "web").expect("web is there");
        let message = "ask ss who has it".to_owned();
        web.ports[0].listeners[0].state = Some(ListenerState::Failed { reason: "in_use".into(), message });

        let explained = explain(&report, &[], &question("127.96.0.10:80", None)).expect("a Service is there");

        assert!(!explained[0].is_served());
        let text = explained[0].to_string();
        assert!(text.contains("not bound: ask ss who has it\n") && text.contains("not served by this relay"), "{text}");
        assert!(!text.contains("Endpoints:") && !text.contains("Balance:"), "{text}");
    }

    #[test]
    fn given_texts_of_others_when_told_then_they_move_no_cursor_and_begin_no_line() {
        let mut odd = web();
        odd.ports[0].target_port = Some("web\u{1b}[2J".into());
        let pod = Endpoint { pod: Some("a\nService: b".into()), ..on(1, "here") };

        let text = told(&planned(&odd, vec![pod], &options()), "10.96.0.10:80", None);

        assert!(text.contains(r"targetPort web\u{1b}[2J (8000)") && text.contains(r"a\nService: b"), "{text}");
        assert!(text.chars().all(|letter| letter == '\n' || !letter.is_control()), "{text:?}");
    }

    #[test]
    fn given_session_affinity_when_told_then_next_is_meant_for_new_clients_alone() {
        let mut report = sample::status().report();
        let web = report.services.iter_mut().find(|service| service.name == "web").expect("web is there");
        web.affinity_seconds = Some(60);

        let text = told(&report, "127.96.0.10:80", None);

        assert!(text.contains("web-1   next, for a client that is new\n"), "{text}");
        assert!(text.ends_with("round-robin; a client that was here in the last 60 s keeps its backend\n"), "{text}");
    }

    #[test]
    fn given_session_affinity_when_told_of_one_client_then_it_is_said_where_that_one_is_kept() {
        let mut report = sample::status().report();
        let web = report.services.iter_mut().find(|service| service.name == "web").expect("web is there");
        web.affinity_seconds = Some(60);
        let client = STRANGER.parse().expect("an address");
        let mut told_with = |kept, ejected_seconds| {
            let web = report.services.iter_mut().find(|service| service.name == "web").expect("web is there");
            let choice = &mut web.ports[0].choices[0];
            choice.pin = Some(Pin { client, kept });
            choice.endpoints[0].ejected_seconds = ejected_seconds;
            let text = told(&report, "127.96.0.10:80", Some(STRANGER));
            let line = text.lines().find_map(|line| line.strip_prefix("Affinity:"));
            line.unwrap_or_else(|| panic!("{text}")).trim().to_owned()
        };
        let kept = Some(Kept { backend: "10.244.0.2:8000".parse().expect("an address"), seconds: 41 });

        assert_eq!(told_with(None, None), "203.0.113.9 has no backend kept");
        assert_eq!(told_with(kept, None), "203.0.113.9 is kept at 10.244.0.2:8000 for another 41 s");
        assert_eq!(told_with(kept, Some(0)), told_with(kept, None));
        let moves = "for another 41 s; as that one is ejected, its next connection goes to another and stays there";
        assert!(told_with(kept, Some(9)).ends_with(moves));
    }

    #[test]
    fn given_a_node_port_under_policy_local_when_told_then_both_sides_and_each_endpoint_are() {
        let local = Service { external_policy: TrafficPolicy::Local, ..web() };
        let ending = Endpoint { ready: false, terminating: true, ..on(3, "here") };

        let report = planned(&local, vec![on(1, "here"), on(2, "there"), ending], &options());

        let text = told(&report, "192.0.2.1:30080", None);

        insta::assert_snapshot!(text, @r"
        Service:           default/web:http, NodePort
        Address:           192.0.2.1:30080/TCP, node port, planned
        Port:              80 → nodePort 30080 → targetPort web (8000)
        From Outside:      the ready endpoints on this node: externalTrafficPolicy is Local (1 of 3 endpoints)
        Endpoints:         10.0.0.1:8000   web-1   used
                           10.0.0.2:8000   web-2   not used: on another node, and the policy is Local
                           10.0.0.3:8000   web-3   not used: terminating, and others are ready
        Backends See:      this node
        From This Node:    every ready endpoint: externalTrafficPolicy Local does not bind this node and its pods (2 of 3 endpoints)
        Endpoints:         10.0.0.1:8000   web-1   used
                           10.0.0.2:8000   web-2   used
                           10.0.0.3:8000   web-3   not used: terminating, and others are ready
        Backends See:      this node
        Balance:           round-robin
        ");
    }

    #[test]
    fn t126_given_balancers_in_front_and_a_header_when_told_then_both_are_and_lists_are_about_clients() {
        let annotations = [("accept-proxy", "true"), ("proxy-protocol", "v2")];
        let web = Service { annotations: annotations.map(|(key, value)| (key.into(), value.into())).into(), ..web() };
        let allow_from = Some(AllowFrom::new(&[net("198.18.0.0/16")]));
        let options = PlanOptions { allow_from, accept_proxy_from: vec![net("10.0.0.9/32")], ..options() };

        let report = planned(&web, vec![on(1, "there")], &options);

        insta::assert_snapshot!(told(&report, "10.96.0.10:80", Some(STRANGER)), @r"
        Service:           default/web:http, NodePort
        Address:           10.96.0.10:80/TCP, cluster IP, planned
        Port:              80 → nodePort 30080 → targetPort web (8000)
        Allow From:        from outside only 198.18.0.0/16
        In Front:          clients are those that 10.0.0.9/32 name in a PROXY header; others are reset, so is 203.0.113.9 where none of them names it
        PROXY Header:      v2, to backends: it names the client
        Client Outside:    reset: not in kube-relay.dev/allow-from or --allow-from
        ");
        assert!(told(&report, "10.96.0.10:80", Some("10.0.0.9")).contains("; 10.0.0.9 is one of these balancers\n"));
        assert!(told(&report, "10.96.0.10:80", None).contains("; others are reset\n"));
        let v6 = told(&report, "10.96.0.10:80", Some("fd00::1"));
        assert!(v6.contains("\nClient Outside:    reset: not in kube-relay.dev/allow-from"), "named by one: {v6}");
    }

    #[test]
    fn t126_given_balancers_of_whom_none_is_believed_when_asked_then_nobody_is_served() {
        let annotations = [("accept-proxy".into(), "true".into())].into();
        let report = planned(&Service { annotations, ..web() }, vec![on(1, "there")], &options());

        assert_eq!(fates(&report, "10.96.0.10:80", Some(STRANGER)), [Fate::Unannounced]);
        let text = told(&report, "10.96.0.10:80", Some(POD));
        assert!(text.contains("\nClient Inside:     reset: ") && !text.contains("Endpoints:"), "{text}");
    }

    #[test]
    fn t126_given_a_balancer_in_front_and_policy_local_when_nobody_here_can_serve_then_nobody_gets_an_answer() {
        let annotations = [("accept-proxy".into(), "true".into())].into();
        let local = Service { annotations, external_policy: TrafficPolicy::Local, ..web() };
        let options = PlanOptions { accept_proxy_from: vec![net("10.0.0.9/32")], ..options() };

        let report = planned(&local, vec![on(1, "there")], &options);

        assert_eq!(fates(&report, "192.0.2.1:30080", None), [Fate::Dropped; 2]);
        let text = told(&report, "192.0.2.1:30080", Some(POD));
        assert!(text.contains("\nClient Inside:     no answer: externalTrafficPolicy is Local, "), "{text}");
    }

    #[test]
    fn t126_given_a_service_that_preserves_when_told_then_whom_backends_see_depends_on_where_the_client_is() {
        let annotations = [("source-address".into(), "preserve".into())].into();
        let local = Service { annotations, external_policy: TrafficPolicy::Local, ..web() };
        let report = planned(&local, vec![on(1, "here")], &options());
        let seen = |to, from| {
            let text = told(&report, to, from);
            let lines = text.lines().skip_while(|line| !line.starts_with("Backends See:")).map(str::trim);
            lines.take_while(|line| !line.starts_with("Balance:")).collect::<Vec<_>>().join(" | ")
        };

        assert_eq!(seen("192.0.2.1:30080", Some(STRANGER)), "Backends See:      client unless hostNetwork");
        assert_eq!(seen("10.96.0.10:80", Some(STRANGER)), "Backends See:      client if here, unless hostNetwork");
        assert_eq!(
            seen("10.96.0.10:80", Some(POD)),
            "Backends See:      pod of this node: client unless hostNetwork or one bridge \
             | other pod in --cluster-cidr: client if here, unless hostNetwork | this node: this node"
        );
    }

    #[test]
    fn given_a_running_relay_when_told_then_the_backend_that_is_next_is_named() {
        let text = told(&sample::status().report(), "127.96.0.10:80/TCP", Some(STRANGER));

        insta::assert_snapshot!(text, @r"
        Service:           default/web:http, NodePort
        Address:           127.96.0.10:80/TCP, cluster IP, serving
        Port:              80 → nodePort 30080 → targetPort 8000
        Client Outside:    every ready endpoint (2 of 2 endpoints)
        Endpoints:         10.244.0.2:8000   web-1   next
                           10.244.0.3:8000   -       used
        Backends See:      this node
        Balance:           round-robin
        ");
    }

    #[test]
    fn given_an_address_of_nobody_when_asked_then_what_is_near_is_told() {
        let report = planned(&web(), vec![], &options());
        let error = |to, from| explain(&report, &[], &question(to, from)).expect_err("nobody").to_string();

        assert_eq!(
            error("10.96.0.10:81", None),
            "10.96.0.10:81: no Service is served there; at 10.96.0.10 are 80/TCP (default/web:http)"
        );
        assert!(error("10.96.0.10:80/UDP", None).starts_with("10.96.0.10:80/UDP: no Service is served there; "));
        assert_eq!(error("10.96.0.11:81", None), "10.96.0.11:81: no Service is served there");
        assert_eq!(
            error("192.0.2.2:30080", None),
            "192.0.2.2:30080: no Service is served there; port 30080 is served at 192.0.2.1:30080/TCP (default/web:http)"
        );
        assert!(error("10.96.0.10:80", Some("fd00::1")).contains("one is IPv4, the other IPv6"));
    }

    #[test]
    fn given_a_health_port_when_asked_for_it_then_it_is_told_apart() {
        let mail = sample::mail();
        let report = Report { services: vec![mail.report()], ..Report::default() };

        let error = explain(&report, &[], &question("127.0.0.1:31025", None)).expect_err("no listener");

        assert!(error.to_string().ends_with("; it is the health port of default/mail"), "{error}");
    }
}
