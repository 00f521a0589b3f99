//! What a person should know of an object of the cluster, as far as it is seen here: of which object, under which reason, and
//! in what words.
//!
//! Pure. When it is told, and how often, is `event_ledger`; to whom, `events`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::sync::Arc;

use crate::admin::{Surface, Unbound};
use crate::name::ObjectName;
use crate::plan::{Problem, Severity};
use crate::remedy::BindFailure;
use crate::status::{ListenerState, Status};

/// Problems that the owner of a Service can mend: our word, and what the Event has for it. All others are for who operates
/// the relay, and in its log.
const REASONS: [(&str, Reason); 7] = [
    ("annotation", Reason("InvalidAnnotation", "Serve")),
    ("conflict", Reason("PortConflict", "Serve")),
    ("external_ip", Reason("ExternalIPRefused", "Serve")),
    ("family", Reason("IPFamilyMismatch", "Serve")),
    ("health_check", HEALTH_PORT),
    ("loop", Reason("EndpointLoop", "Serve")),
    ("sctp", Reason("UnsupportedProtocol", "Serve")),
];
const LISTENER: Reason = Reason("FailedToListen", "Listen");
const ARP: Reason = Reason("ARPConflict", "Listen");
/// kube-proxy's words, as for our own servers.
const HEALTH_PORT: Reason = Reason("FailedToStartServiceHealthcheck", "Listen");
/// The longest note that a server takes.
const NOTE_BYTES: usize = 1024;
/// The end of a note where there is more under its topic. Without a number: each other note is another Event.
const AND_OTHERS: &str = " (and others like it: `kube-relay status` lists all)";
/// What a message says where it is true of one node alone. All others are the same on each.
const OF_ONE_NODE: &str = "this node";

/// What an Event is about, and why. However much there is under it, it is told as one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Topic {
    /// The object.
    pub(crate) regarding: Regarding,
    /// Why.
    pub(crate) reason: Reason,
}

/// Why, and what is not done because of it: each one word in CamelCase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Reason(pub(crate) &'static str, pub(crate) &'static str);

/// An object that there is news of. In the order of importance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Regarding {
    /// The Node with this name, which is our own.
    Node(Arc<str>),
    /// A Service.
    Service(ObjectName),
}

/// `Service default/web`, as problems name their objects.
impl fmt::Display for Regarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "Node {name}"),
            Self::Service(name) => write!(f, "Service {name}"),
        }
    }
}

/// All that a person should know now, with one note for each topic. Nothing of a Node without a name.
pub(crate) fn news(status: &Status, unbound: &[Unbound], node: &Arc<str>) -> BTreeMap<Topic, String> {
    let mut notes = Notes { node, by_topic: BTreeMap::new() };
    for problem in status.problems.iter() {
        if let Some(topic) = topic_of(problem) {
            notes.add(topic, first_line(&problem.message), problem.message.contains(OF_ONE_NODE));
        }
    }
    for (service, reason, message) in failed_listeners(status) {
        notes.add_failure(service, reason_of_listener(reason), reason, message);
    }
    for (service, state) in status.failed_health_ports.iter() {
        if let ListenerState::Failed { reason, message } = state {
            notes.add_failure(service, HEALTH_PORT, reason, message);
        }
    }
    for Unbound { surface, error, .. } in unbound {
        notes.add(Topic { regarding: Regarding::Node(Arc::clone(node)), reason: reason_of(*surface) }, error, false);
    }
    if node.is_empty() {
        notes.by_topic.retain(|topic, _| matches!(topic.regarding, Regarding::Service(_)));
    }
    notes.by_topic.into_iter().map(|(topic, note)| (topic, note.text())).collect()
}

/// What the owner of a Service should know of a problem.
fn topic_of(problem: &Problem) -> Option<Topic> {
    let (_, reason) = REASONS.iter().find(|(word, _)| *word == problem.reason)?;
    let service = problem.object.strip_prefix("Service ").filter(|_| problem.severity != Severity::Note)?;
    Some(Topic { regarding: Regarding::Service(ObjectName::parse(service)), reason: *reason })
}

/// Listeners that cannot be bound: whose, with the word and the whole error.
fn failed_listeners(status: &Status) -> impl Iterator<Item = (&ObjectName, &str, &str)> {
    // Where nothing has failed, ten thousand Services need not be looked through.
    let services = (!status.failed.is_empty()).then(|| status.services.values()).into_iter().flatten();
    let listeners = services.flat_map(|service| service.plan.listeners());
    listeners.filter_map(|(key, listener)| match status.failed.get(key)? {
        ListenerState::Failed { reason, message } => Some((&listener.port.service, &**reason, &**message)),
        _ => None,
    })
}

/// True where the machine or this process lacks something, be it for ten thousand Services, and none of them is to blame.
fn is_of_the_machine(reason: &str) -> bool {
    ![BindFailure::InUse, BindFailure::Other].iter().any(|failure| failure.as_str() == reason)
}

/// An address that is left out on purpose has a word of its own: a setting mends it.
fn reason_of_listener(reason: &str) -> Reason {
    if reason == BindFailure::ArpConflict.as_str() { ARP } else { LISTENER }
}

/// kube-proxy's words.
fn reason_of(surface: Surface) -> Reason {
    match surface {
        Surface::Health => Reason("FailedToStartProxierHealthcheck", "Listen"),
        Surface::Metrics | Surface::Status => Reason("FailedToStartMetricServer", "Listen"),
    }
}

/// The notes so far.
struct Notes<'a> {
    node: &'a Arc<str>,
    by_topic: BTreeMap<Topic, Note>,
}

/// What there is under one topic.
struct Note {
    first: String,
    others: bool,
}

impl Notes<'_> {
    /// What cannot be bound for a Service: news of it, or of the Node.
    fn add_failure(&mut self, service: &ObjectName, reason: Reason, why: &str, message: &str) {
        if is_of_the_machine(why) {
            self.add(Topic { regarding: Regarding::Node(Arc::clone(self.node)), reason }, message, false);
        } else {
            self.add(Topic { regarding: Regarding::Service(service.clone()), reason }, message, true);
        }
    }

    /// `of_one_node`: it is not so on all nodes, so that it is said on which. Only the first note of a topic is made: there
    /// may be ten thousand.
    fn add(&mut self, topic: Topic, note: &str, of_one_node: bool) {
        match self.by_topic.entry(topic) {
            Entry::Occupied(mut known) => known.get_mut().others = true,
            Entry::Vacant(place) => {
                let first = if of_one_node { format!("node {}: {note}", self.node) } else { note.to_owned() };
                place.insert(Note { first, others: false });
            }
        }
    }
}

impl Note {
    fn text(self) -> String {
        if self.others {
            return shortened(&self.first, NOTE_BYTES - AND_OTHERS.len()) + AND_OTHERS;
        }
        shortened(&self.first, NOTE_BYTES)
    }
}

/// Lines to paste are for a terminal.
fn first_line(text: &str) -> &str {
    text.split_once('\n').map_or(text, |(first, _)| first.trim_end_matches(':'))
}

/// The text, and where it has more bytes, its beginning and an ellipsis.
fn shortened(text: &str, bytes: usize) -> String {
    const ELLIPSIS: &str = "…";
    if text.len() <= bytes {
        return text.to_owned();
    }
    beginning(text, bytes.saturating_sub(ELLIPSIS.len())).to_owned() + ELLIPSIS
}

/// As much of a text as has no more bytes: whole letters.
pub(crate) fn beginning(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::model::{Model, Service};
    use crate::name::{ListenKey, Protocol};
    use crate::plan::{Plan, PlanOptions};
    use crate::status::ServiceStatus;

    fn problem(service: &str, reason: &'static str, message: &str) -> Problem {
        Problem::error(format_args!("Service {service}"), reason, message)
    }

    fn status(problems: Vec<Problem>) -> Status {
        Status { problems: Arc::new(problems), ..Status::default() }
    }

    /// As `object reason: note`.
    fn told_with(status: &Status, unbound: &[Unbound]) -> Vec<String> {
        let news = news(status, unbound, &"here".into());
        news.iter().map(|(topic, note)| format!("{} {}: {note}", topic.regarding, topic.reason.0)).collect()
    }

    fn told(problems: Vec<Problem>) -> Vec<String> {
        told_with(&status(problems), &[])
    }

    #[test]
    fn given_problems_when_told_then_those_that_the_owner_can_mend_are_news_under_a_reason_of_their_own() {
        let note = Problem::note("Service default/c", "family", "fine");
        let slice = Problem::error("EndpointSlice default/web-1", "family", "not the owner's");
        let operators = problem("d", "decode", "for the log");

        let told = told(vec![problem("b", "sctp", "SCTP:\nlines to paste"), note, slice, operators]);

        assert_eq!(told, ["Service default/b UnsupportedProtocol: SCTP"]);
    }

    #[test]
    fn given_many_problems_of_one_service_and_reason_when_told_then_they_are_one_topic() {
        let all = (0..3).map(|port| problem("a", "sctp", &format!("port {port}"))).chain([problem("a", "loop", "x")]);

        let told = told(all.collect());

        assert_eq!(
            told,
            [
                "Service default/a EndpointLoop: x",
                "Service default/a UnsupportedProtocol: port 0 (and others like it: `kube-relay status` lists all)",
            ]
        );
    }

    #[test]
    fn given_what_is_so_on_one_node_when_told_then_it_is_said_on_which() {
        let all = ["it is an address of this node", "allow it"].map(|message| problem("a", "external_ip", message));

        let [own, other] = all.map(|problem| told(vec![problem]));

        assert_eq!(own, ["Service default/a ExternalIPRefused: node here: it is an address of this node"]);
        assert_eq!(other, ["Service default/a ExternalIPRefused: allow it"]);
    }

    #[test]
    fn given_a_node_port_that_two_services_want_when_told_on_two_nodes_then_both_say_the_same() {
        let service =
            |name, last| Arc::new(Service::new(name).cluster_ip([10, 96, 0, last]).port("http", 80).node_port(30000));
        let on = |address: [u8; 4]| {
            let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), Default::default());
            for (name, last) in [("default/a", 10), ("default/b", 11)] {
                model.apply(crate::model::Event::ApplyService(service(name, last)), &mut dirty);
            }
            let options = PlanOptions { node_port_addresses: vec![address.into()], ..PlanOptions::default() };
            plan.update(&model, &dirty, &options);
            told(plan.problems().cloned().collect())
        };

        let here = on([192, 0, 2, 1]);

        assert!(here[0].starts_with("Service default/b PortConflict: "), "{here:?}");
        assert_eq!(here, on([192, 0, 2, 2]));
    }

    #[test]
    fn given_long_texts_when_told_then_they_are_cut_to_what_a_server_takes() {
        let long = "ü".repeat(1000);

        let news = news(&status(vec![problem("a", "sctp", &long), problem("a", "sctp", "b")]), &[], &"here".into());

        let note = news.values().next().expect("a note");
        assert!(
            note.len() <= NOTE_BYTES && note.ends_with("… (and others like it: `kube-relay status` lists all)"),
            "{note}"
        );
        assert_eq!(shortened(&long, NOTE_BYTES).len(), NOTE_BYTES - 1, "never half a letter");
        assert_eq!((beginning("ü", 1), beginning("ab", 1), beginning("a", 5)), ("", "a", "a"));
    }

    /// A Service whose listener has failed.
    fn failing(reason: &'static str) -> Status {
        let service = Arc::new(Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80));
        let (mut model, mut plan, mut dirty) = (Model::default(), Plan::default(), Default::default());
        model.apply(crate::model::Event::ApplyService(Arc::clone(&service)), &mut dirty);
        plan.update(&model, &dirty, &PlanOptions::default());
        let planned = Arc::clone(plan.service(&service.name).expect("planned"));
        let key = ListenKey::new([10, 96, 0, 10].into(), 80, Protocol::Tcp);
        let failed = ListenerState::Failed { reason: reason.into(), message: "cannot listen".into() };
        let one = ServiceStatus {
            service: Arc::clone(&service),
            plan: planned,
            slices: Box::default(),
            ports: Box::default(),
        };
        Status {
            services: [(service.name.clone(), Arc::new(one))].into(),
            failed: Arc::new([(key, failed)].into()),
            ..Status::default()
        }
    }

    #[test]
    fn t169_given_a_port_that_somebody_holds_when_told_then_it_is_of_the_service_and_names_the_node() {
        assert_eq!(
            told_with(&failing("in_use"), &[]),
            ["Service default/web FailedToListen: node here: cannot listen"]
        );
    }

    #[test]
    fn t207_given_a_health_port_that_somebody_holds_when_told_then_the_service_has_the_reason_of_kube_proxy() {
        let failed = ListenerState::Failed { reason: "in_use".into(), message: "cannot answer".into() };
        let failed_health_ports = Arc::new([(ObjectName::parse("web"), failed)].into());

        let told = told_with(&Status { failed_health_ports, ..Status::default() }, &[]);

        assert_eq!(told, ["Service default/web FailedToStartServiceHealthcheck: node here: cannot answer"]);
    }

    #[test]
    fn given_what_the_machine_lacks_when_told_then_it_is_of_the_node() {
        for reason in ["fd_limit", "memory", "permission", "not_local", "family"] {
            assert_eq!(told_with(&failing(reason), &[]), ["Node here FailedToListen: cannot listen"], "{reason}");
        }
    }

    #[test]
    fn given_an_address_that_neighbours_would_be_answered_for_when_told_then_the_node_has_a_reason_of_its_own() {
        assert_eq!(told_with(&failing("arp_conflict"), &[]), ["Node here ARPConflict: cannot listen"]);
    }

    #[test]
    fn given_admin_addresses_that_are_taken_when_told_then_the_node_has_the_reasons_of_kube_proxy() {
        let address: SocketAddr = "127.0.0.1:10256".parse().expect("an address");
        let unbound = |surface| Unbound { surface, address, error: "taken".into() };
        let both = [unbound(Surface::Health), unbound(Surface::Metrics)];

        let told = told_with(&status(vec![]), &both);

        assert_eq!(
            told,
            ["Node here FailedToStartMetricServer: taken", "Node here FailedToStartProxierHealthcheck: taken"]
        );
        assert!(news(&status(vec![]), &both, &"".into()).is_empty(), "nobody to tell it of");
    }
}
