//! What one Service asks for: its listeners, its balancers, and what is wrong with it by itself.
//!
//! Of other Services, only their cluster IPs are known here: who gets a listen key that two ask for is settled in `plan`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use crate::admission::{self, Demands};
use crate::allow_from::AllowFrom;
use crate::balancing::Balancing;
use crate::claims::Claimant;
use crate::endpoints::{self, Selection, Usable, UsableEndpoint};
use crate::entries::{Entries, Entry};
use crate::frozen::Frozen;
use crate::health_port::{self, HealthPort};
use crate::layout::{Backends, Layout, Listener, ListenerKind, Side, Target, Verdict};
use crate::model::{ClusterIps, Service, ServiceKind, ServicePort, Slice, TrafficPolicy};
use crate::name::{BalancerKey, Family, ListenKey, Protocol, Scope, ServicePortName};
use crate::plan::PlanOptions;
use crate::problem::Problem;
use crate::proxy_protocol::{ProxyProtocol, Wish};
use crate::rare::Rare;
use crate::source_address::SourceAddress;
use crate::source_ranges::SourceRanges;
use crate::tcp_settings::TcpSettings;
use crate::udp_settings::UdpSettings;

/// What is planned for one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// Why nothing of it is served, as a word; `None` where it is.
    pub skipped: Option<&'static str>,
    /// Its listeners and balancers, before conflicts with other Services are settled.
    pub wanted: Wanted,
    /// Where load balancers ask for its health and what they are told; `None` where they are not to ask, or cannot.
    /// Before conflicts with other Services are settled.
    pub health_port: Option<Arc<HealthPort>>,
    /// What is wrong with it by itself.
    pub problems: Rare<Problem>,
    /// The addresses that it does not get, since another Service has them.
    pub conflicts: Rare<Problem>,
    /// Those of the keys that it asks for that it does not get.
    pub(crate) lost: Rare<ListenKey>,
}

/// The listeners and balancers of one Service: a [`Layout`] that does not change any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// What to choose from.
    pub balancers: Frozen<BalancerKey, Backends>,
    /// Where to listen.
    pub listeners: Frozen<ListenKey, Listener>,
}

impl From<Layout> for Wanted {
    fn from(layout: Layout) -> Self {
        Self { balancers: layout.balancers.into(), listeners: layout.listeners.into() }
    }
}

impl ServicePlan {
    /// The listeners that it really gets, by key.
    pub fn listeners(&self) -> impl Iterator<Item = (&ListenKey, &Listener)> {
        self.wanted.listeners.iter().filter(|(key, _)| !self.lost.contains(key))
    }

    /// The health port, where it is really to be answered: on all of its addresses, or not at all. One that is lost at
    /// one address keeps its claims to the others: it comes back as soon as the rival goes.
    pub fn open_health_port(&self) -> Option<&Arc<HealthPort>> {
        let granted =
            |port: &&Arc<HealthPort>| !port.addresses.is_empty() && !port.keys().any(|key| self.lost.contains(&key));
        self.health_port.as_ref().filter(granted)
    }

    /// All keys that it asks for.
    pub(crate) fn keys(&self) -> impl Iterator<Item = ListenKey> {
        let health = self.health_port.iter().flat_map(|port| port.keys());
        self.wanted.listeners.keys().copied().chain(health)
    }

    /// How the clients of its balancers are spread.
    pub fn balancing(&self) -> Balancing {
        self.wanted.balancers.values().next().map(|backends| backends.balancing).unwrap_or_default()
    }

    /// Whose address its backends see.
    pub fn source(&self) -> SourceAddress {
        self.wanted.balancers.values().next().map(|backends| backends.source).unwrap_or_default()
    }

    /// The backends of one of its ports, for each family and scope that is asked for.
    pub fn balancers(&self, port: &ServicePort) -> impl Iterator<Item = (&BalancerKey, &Backends)> {
        let of_port = |key: &BalancerKey| key.port.port == port.name && key.port.protocol == port.protocol;
        self.wanted.balancers.iter().filter(move |(key, _)| of_port(key))
    }

    /// The endpoints of one of its ports that keep what they have, of all families and scopes; one may be there twice.
    pub(crate) fn endpoints(&self, port: &ServicePort) -> impl Iterator<Item = &UsableEndpoint> {
        self.balancers(port).flat_map(|(_, backends)| &*backends.usable.serving)
    }

    /// All that is wrong with it, by itself and among the others.
    pub fn own_problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter().chain(&self.conflicts)
    }
}

/// Where one Service asks to be reached. It does not depend on endpoints: so it is known of all Services before the
/// endpoints of any are looked at, and none that is a listener of this process is chosen.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    service: &'a Service,
    options: &'a PlanOptions,
    /// As in [`ServicePlan::skipped`].
    skipped: Option<&'static str>,
    /// `None` where it is skipped without a look at its addresses.
    entries: Option<Entries<'a>>,
}

impl<'a> Asked<'a> {
    pub(crate) fn of(service: &'a Service, options: &'a PlanOptions) -> Self {
        let skipped = skip_word(service, options);
        let entries = skipped.is_none().then(|| Entries::of(service, options));
        let nowhere = entries.as_ref().is_some_and(|entries| entries.families.is_empty());
        Self { service, options, skipped: skipped.or(nowhere.then_some("family")), entries }
    }

    /// Its name and age among those who ask for the same.
    pub(crate) fn claimant(&self) -> Claimant {
        Claimant::of(self.service)
    }

    /// The keys that it asks for; one may be there twice.
    pub(crate) fn keys(&self) -> impl Iterator<Item = ListenKey> {
        self.entries.iter().flat_map(Entries::keys)
    }

    /// As what it asks for a key.
    pub(crate) fn kind(&self, key: &ListenKey) -> Option<ListenerKind> {
        self.entries.iter().flat_map(|entries| &entries.list).find(|entry| entry.key == *key).map(|entry| entry.kind)
    }

    /// Plans the Service from its slices. `is_cluster_ip` tells which addresses are those of Services, not of pods.
    pub(crate) fn plan<'s>(
        &self,
        slices: impl Iterator<Item = &'s Slice>,
        is_cluster_ip: impl Fn(&ListenKey) -> bool,
    ) -> ServicePlan {
        let Self { service, options, skipped, entries } = self;
        let mut plan = ServicePlan { skipped: *skipped, ..ServicePlan::default() };
        let Some(entries) = entries else { return plan };
        plan.problems.extend(entries.problems.iter().cloned());
        if plan.skipped.is_some() {
            return plan;
        }
        plan.problems.extend(service.slices_hidden.then(|| hidden(service)));
        let slices = slices.filter(|_| !service.slices_hidden);
        let (slices, refused) = admission::admit(slices, Demands::of(options));
        plan.problems.extend(refused);
        plan.health_port = entries.health_port.as_ref().map(|(number, addresses)| {
            let slices = slices.iter().map(AsRef::as_ref);
            let local_endpoints = health_port::local_endpoints(slices, &options.node, &is_cluster_ip);
            Arc::new(HealthPort { number: *number, addresses: Arc::clone(addresses), local_endpoints })
        });
        let mut layout = Layout::default();
        let mut problems = Vec::new();
        let manner = Manner::of(service, &mut problems);
        let guards = Guards {
            source_ranges: SourceRanges { service, node_addresses: &options.node_addresses },
            allow_from: AllowFrom::of(service, options.allow_from.as_ref(), &mut problems),
        };
        let announcing =
            Announcing { wish: Wish::of(service, options, &mut problems), balancers: &options.accept_proxy_from };
        problems.extend((announcing.wish.sends() && manner.source.is_preserved()).then(|| told_twice(service)));
        plan.problems.extend(problems);
        let mut loops = BTreeSet::new();
        let targets = choose_backends(&mut layout, service, &manner, &entries.list, |port, family, external| {
            let port = &service.ports[port];
            let key = |address| ListenKey::at(address, port.protocol);
            let slices = slices.iter().map(AsRef::as_ref);
            let is_own = |address| is_cluster_ip(&key(address));
            let selection = endpoints::usable(service, port, family, external, slices, &options.node, is_own);
            loops.extend(selection.own.iter().map(|address| key(*address)));
            selection
        });
        plan.problems.extend(loops.iter().map(|key| looping(service, key)));
        plan.problems.extend(listen(&mut layout, service, &entries.list, &targets, &guards, &announcing));
        plan.wanted = layout.into();
        plan
    }
}

fn told_twice(service: &Service) -> Problem {
    let text = "annotations kube-relay.dev/proxy-protocol and kube-relay.dev/source-address: PROXY headers come from \
                addresses of clients; a backend that believes this node's alone takes them for what the client says";
    Problem::note(format_args!("Service {}", service.name), "annotation", text)
}

fn hidden(service: &Service) -> Problem {
    let text = "label service.kubernetes.io/headless hides its slices: without the label they are used";
    Problem::note(format_args!("Service {}", service.name), "headless", text)
}

/// Whose listener it is is not said: that may change without a listener that comes or goes.
fn looping(service: &Service, key: &ListenKey) -> Problem {
    let text = format!("endpoint {key} is not used: it is the cluster IP of a Service");
    Problem::error(format_args!("Service {}", service.name), "loop", text)
}

/// What a Service says about all its balancers by annotations.
struct Manner {
    balancing: Balancing,
    source: SourceAddress,
    tcp: Option<Arc<TcpSettings>>,
}

impl Manner {
    fn of(service: &Service, problems: &mut Vec<Problem>) -> Self {
        let (balancing, tcp) = (Balancing::of(service, problems), TcpSettings::of(service, problems));
        let source = SourceAddress::of(service, problems);
        Self { balancing, source, tcp: (tcp != TcpSettings::default()).then(|| Arc::new(tcp)) }
    }
}

/// Chooses backends for each port and family that has an entry, and what follows for its listeners.
fn choose_backends(
    layout: &mut Layout,
    service: &Service,
    manner: &Manner,
    entries: &[Entry],
    mut select: impl FnMut(usize, Family, bool) -> Selection,
) -> BTreeMap<(usize, Family), Targets> {
    let mut external = BTreeMap::<_, bool>::new();
    for entry in entries {
        *external.entry((entry.port, entry.family())).or_default() |= entry.kind != ListenerKind::ClusterIp;
    }
    let chosen = external.into_iter().map(|((port, family), external)| {
        let selection = select(port, family, external);
        let targets = Targets::of(service, port_name(service, port), &selection);
        add_balancers(layout, service, manner, (&targets.port, family), selection);
        ((port, family), targets)
    });
    chosen.collect()
}

fn add_balancers(
    layout: &mut Layout,
    service: &Service,
    manner: &Manner,
    (port, family): (&ServicePortName, Family),
    selection: Selection,
) {
    for (scope, usable) in [(Scope::Cluster, selection.cluster), (Scope::Local, selection.local)] {
        if let Some(usable) = usable {
            let key = BalancerKey { port: port.clone(), family, scope };
            // The same number over TCP and UDP has the same endpoints: both are one list.
            let known = layout.balancers.values().map(|known| &known.usable).find(|known| **known == usable);
            let usable = known.cloned().unwrap_or(usable);
            let tcp = manner.tcp.clone().filter(|_| key.port.protocol == Protocol::Tcp);
            let (affinity_timeout, balancing) = (service.affinity_timeout, manner.balancing);
            let backends = Backends { affinity_timeout, balancing, source: manner.source, tcp, usable };
            layout.balancers.insert(key, backends);
        }
    }
}

/// Who is kept out of a Service's listeners. Where both have something to say, both must let a client in.
struct Guards<'a> {
    source_ranges: SourceRanges<'a>,
    allow_from: Option<AllowFrom>,
}

impl Guards<'_> {
    /// Source ranges and who is allowed from outside, for a listener. `announced`: balancers in front tell who its clients
    /// are.
    fn at(&self, entry: &Entry, announced: bool) -> (Arc<[IpNet]>, Option<Arc<[IpNet]>>) {
        let (listen, kind) = (entry.key.ip(), entry.kind);
        let allow_from = self.allow_from.as_ref();
        match announced {
            true => (self.source_ranges.behind_balancers(listen, kind), allow_from.map(AllowFrom::of_both_families)),
            false => (self.source_ranges.at(listen, kind), allow_from.map(|allowed| allowed.at(entry.family()))),
        }
    }
}

/// How the connections of a Service say who their clients are.
struct Announcing<'a> {
    wish: Wish,
    /// From `--accept-proxy-from`.
    balancers: &'a [IpNet],
}

impl Announcing<'_> {
    fn at(&self, family: Family, protocol: Protocol) -> Option<Arc<ProxyProtocol>> {
        (protocol == Protocol::Tcp).then(|| self.wish.at(family, self.balancers)).flatten()
    }
}

/// Makes a listener of each entry; of two on one key the first is served, and the other is a problem.
fn listen(
    layout: &mut Layout,
    service: &Service,
    entries: &[Entry],
    targets: &BTreeMap<(usize, Family), Targets>,
    guards: &Guards<'_>,
    announcing: &Announcing<'_>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let udp_settings = UdpSettings::of(service, &mut problems);
    let udp_settings = (udp_settings != UdpSettings::default()).then(|| Arc::new(udp_settings));
    let mut taken = BTreeSet::new();
    for entry in entries {
        let targets = targets.get(&(entry.port, entry.family())).expect("chosen for every entry");
        let port = &targets.port;
        match layout.listeners.get(&entry.key) {
            // Two ways to one port are none too many: a load-balancer IP may be an external IP, too.
            Some(first) if first.port == *port => {}
            // Said once, on however many node addresses it happens.
            Some(first) => drop(taken.insert((entry.kind, entry.port, first.kind, first.port.port.clone()))),
            None => {
                let target = targets.of_kind(entry.kind);
                let udp = udp_settings.clone().filter(|_| port.protocol == Protocol::Udp);
                let (source_ranges, allow_from) = guards.at(entry, announcing.wish.accepts(port.protocol));
                let proxy_protocol = announcing.at(entry.family(), port.protocol);
                let (port, kind, allocated) = (port.clone(), entry.kind, entry.allocated);
                let listener =
                    Listener { port, kind, allocated, target, source_ranges, allow_from, proxy_protocol, udp };
                layout.listeners.insert(entry.key, listener);
            }
        }
    }
    let problem = |(kind, port, first_kind, first_port): (ListenerKind, usize, ListenerKind, Arc<str>)| {
        let port = &service.ports[port];
        let number = if kind == ListenerKind::NodePort { port.node_port.unwrap_or_default() } else { port.port };
        let message = format!(
            "{} {number}/{} of port {:?} is taken by port {first_port:?} ({}): give one of them another number",
            kind.in_words(),
            port.protocol,
            port.name,
            first_kind.in_words(),
        );
        Problem::error(format_args!("Service {}", service.name), "conflict", message)
    };
    problems.extend(taken.into_iter().map(problem));
    problems
}

fn skip_word(service: &Service, options: &PlanOptions) -> Option<&'static str> {
    if service.proxy_name.as_deref() != options.proxy_name.as_deref() {
        return Some("proxy_name");
    }
    if service.kind == ServiceKind::ExternalName {
        return Some("external_name");
    }
    match service.cluster_ips {
        ClusterIps::Headless => Some("headless"),
        ClusterIps::Unset => Some("unallocated"),
        ClusterIps::Addresses { .. } => None,
    }
}

fn port_name(service: &Service, port: usize) -> ServicePortName {
    let port = &service.ports[port];
    ServicePortName::new(service.name.clone(), Arc::clone(&port.name), port.protocol)
}

/// Where the listeners of one port and family lead.
#[derive(Clone, Debug)]
struct Targets {
    port: ServicePortName,
    /// At the cluster IP.
    internal: Target,
    /// At all other addresses.
    external: Target,
}

impl Targets {
    fn of(service: &Service, port: ServicePortName, selection: &Selection) -> Self {
        let internal = judge(selection, scope_of(service.internal_policy));
        let external = judge(selection, scope_of(service.external_policy));
        // This node and its pods need no second hop and no source address: they may use every endpoint.
        let from_inside = judge(selection, Scope::Cluster);
        Self {
            port,
            internal: Target { outside: internal, inside: internal },
            external: Target { outside: external, inside: from_inside },
        }
    }

    fn of_kind(&self, kind: ListenerKind) -> Target {
        if kind == ListenerKind::ClusterIp { self.internal } else { self.external }
    }
}

fn scope_of(policy: TrafficPolicy) -> Scope {
    match policy {
        TrafficPolicy::Cluster => Scope::Cluster,
        TrafficPolicy::Local => Scope::Local,
    }
}

/// Serve where the scope has an endpoint; else drop where only the policy forbids one, reject where there is none.
fn judge(selection: &Selection, scope: Scope) -> Side {
    let usable: &Option<Usable> = match scope {
        Scope::Cluster => &selection.cluster,
        Scope::Local => &selection.local,
    };
    let verdict = match usable {
        Some(usable) if !usable.picks.is_empty() => Verdict::Serve,
        _ if selection.any => Verdict::Drop,
        _ => Verdict::Reject,
    };
    Side { scope, verdict }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Duration;

    use super::*;
    use crate::endpoints::Node;
    use crate::model::{DEFAULT_AFFINITY_TIMEOUT, Endpoint};

    const HERE: &str = "node-1";
    const ELSEWHERE: &str = "node-2";

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn options() -> PlanOptions {
        PlanOptions {
            node: Node { name: Some(HERE.into()), zone: None },
            node_port_addresses: vec![ip("192.0.2.1")],
            ..PlanOptions::default()
        }
    }

    /// One port, reached at a cluster IP and a node port.
    fn web(internal: TrafficPolicy, external: TrafficPolicy) -> Service {
        let service = Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80).node_port(30000);
        Service { internal_policy: internal, external_policy: external, ..service }
    }

    fn ready(host: u8, node: &str) -> Endpoint {
        Endpoint { node: Some(node.into()), ..Endpoint::new([10, 0, 0, host]) }
    }

    fn ending(host: u8, node: &str) -> Endpoint {
        Endpoint { ready: false, terminating: true, ..ready(host, node) }
    }

    fn planned(service: &Service, slices: &[Slice], options: &PlanOptions) -> ServicePlan {
        Asked::of(service, options).plan(slices.iter(), |_| false)
    }

    fn plan(service: &Service, endpoints: Vec<Endpoint>) -> ServicePlan {
        let slice = Slice::new("web-1", service).port("http", 8000);
        let slice = endpoints.into_iter().fold(slice, Slice::endpoint);
        planned(service, &[slice], &options())
    }

    /// What the cluster IP, the node port from outside and the node port from inside lead to.
    fn verdicts(service: &Service, endpoints: Vec<Endpoint>) -> [String; 3] {
        let plan = plan(service, endpoints);
        let said = |kind, inside: bool| {
            let found = plan.wanted.listeners.iter().find(|(_, listener)| listener.kind == kind);
            let (key, listener) = found.expect("a listener of that kind");
            let [outer, inner] = listener.balancers(key);
            let (side, balancer) =
                if inside { (listener.target.inside, inner) } else { (listener.target.outside, outer) };
            let picks = &plan.wanted.balancers[&balancer].usable.picks;
            let hosts: Vec<_> = picks.iter().map(|e| e.address().ip().to_string().replace("10.0.0.", "")).collect();
            match side.verdict {
                Verdict::Serve => hosts.join(" "),
                Verdict::Reject => "reject".into(),
                Verdict::Drop => "drop".into(),
            }
        };
        [said(ListenerKind::ClusterIp, false), said(ListenerKind::NodePort, false), said(ListenerKind::NodePort, true)]
    }

    const CLUSTER: TrafficPolicy = TrafficPolicy::Cluster;
    const LOCAL: TrafficPolicy = TrafficPolicy::Local;

    #[test]
    fn t003_t004_t006_given_a_service_that_is_not_proxied_when_planned_then_a_word_says_why() {
        let word = |change: fn(&mut Service)| {
            let mut service = web(CLUSTER, CLUSTER);
            change(&mut service);
            let plan = plan(&service, vec![ready(1, HERE)]);
            assert_eq!(plan.wanted, Wanted::default());
            plan.skipped
        };

        assert_eq!(word(|service| service.cluster_ips = ClusterIps::Headless), Some("headless"));
        assert_eq!(
            word(|service| (service.cluster_ips, service.ports) = (ClusterIps::Headless, vec![])),
            Some("headless")
        );
        assert_eq!(word(|service| service.cluster_ips = ClusterIps::Unset), Some("unallocated"));
        assert_eq!(word(|service| service.kind = ServiceKind::ExternalName), Some("external_name"));
        assert_eq!(word(|service| service.families = vec![Family::V6]), Some("family"));
    }

    #[test]
    fn t016_given_a_proxy_name_when_planned_then_exactly_the_services_labelled_so_are_taken() {
        let skipped = |label: Option<&str>, own: Option<&str>| {
            let service = Service { proxy_name: label.map(Arc::from), ..web(CLUSTER, CLUSTER) };
            let options = PlanOptions { proxy_name: own.map(String::from), ..options() };
            planned(&service, &[], &options).skipped
        };

        assert_eq!(skipped(None, None), None);
        assert_eq!(skipped(Some("other"), None), Some("proxy_name"));
        assert_eq!(skipped(Some(""), None), Some("proxy_name"), "any value counts");
        assert_eq!(skipped(None, Some("kube-relay")), Some("proxy_name"));
        assert_eq!(skipped(Some("kube-relay"), Some("kube-relay")), None);
    }

    #[test]
    fn t093_t095_given_no_endpoint_anywhere_when_judged_then_every_side_rejects_and_is_parked() {
        for (internal, external) in [(CLUSTER, CLUSTER), (LOCAL, LOCAL), (CLUSTER, LOCAL), (LOCAL, CLUSTER)] {
            let service = web(internal, external);

            assert_eq!(verdicts(&service, vec![]), ["reject", "reject", "reject"]);
            assert!(plan(&service, vec![]).wanted.listeners.values().all(|listener| listener.target.parked()));
        }
    }

    #[test]
    fn t115_given_policy_cluster_when_judged_then_every_path_reaches_every_endpoint() {
        let endpoints = vec![ready(1, HERE), ready(2, ELSEWHERE)];

        assert_eq!(verdicts(&web(CLUSTER, CLUSTER), endpoints), ["1 2", "1 2", "1 2"]);
    }

    #[test]
    fn t112_given_internal_policy_local_when_judged_then_it_is_for_the_cluster_ip_alone() {
        let service = web(LOCAL, CLUSTER);

        assert_eq!(verdicts(&service, vec![ready(1, HERE), ready(2, ELSEWHERE)]), ["1", "1 2", "1 2"]);
        assert_eq!(verdicts(&service, vec![ready(1, ELSEWHERE), ready(2, ELSEWHERE)]), ["drop", "1 2", "1 2"]);
    }

    #[test]
    fn t113_t114_given_external_policy_local_when_judged_then_inside_sources_use_the_cluster_set() {
        let service = web(CLUSTER, LOCAL);

        assert_eq!(verdicts(&service, vec![ready(1, HERE), ready(2, ELSEWHERE)]), ["1 2", "1", "1 2"]);
        assert_eq!(verdicts(&service, vec![ready(1, ELSEWHERE)]), ["1", "drop", "1"]);
    }

    #[test]
    fn t106_given_any_policies_when_this_node_uses_its_own_node_port_then_every_endpoint_is_there_for_it() {
        for (internal, external) in [(CLUSTER, CLUSTER), (LOCAL, LOCAL), (CLUSTER, LOCAL), (LOCAL, CLUSTER)] {
            let endpoints = vec![ready(1, HERE), ready(2, ELSEWHERE)];

            let [_, _, from_inside] = verdicts(&web(internal, external), endpoints);

            assert_eq!(from_inside, "1 2");
        }
    }

    #[test]
    fn t116_t117_t118_t119_given_terminating_endpoints_when_judged_then_each_scope_falls_back_by_itself() {
        let service = web(CLUSTER, LOCAL);
        let all = vec![ready(1, HERE), ready(2, HERE), ending(3, HERE), ready(4, ELSEWHERE)];
        let ended = Endpoint { serving: false, ..ending(1, HERE) };

        assert_eq!(verdicts(&service, all), ["1 2 4", "1 2", "1 2 4"]);
        assert_eq!(verdicts(&service, vec![ending(1, HERE), ready(2, ELSEWHERE)]), ["2", "1", "2"]);
        assert_eq!(verdicts(&service, vec![ended, ready(2, ELSEWHERE)]), ["2", "drop", "2"]);
        assert_eq!(verdicts(&service, vec![ending(1, ELSEWHERE)]), ["1", "drop", "1"]);
    }

    #[test]
    fn t089_given_no_external_address_when_planned_then_external_policy_local_makes_no_balancer() {
        let mut service = web(CLUSTER, LOCAL);
        service.ports[0].node_port = None;

        let plan = plan(&service, vec![ready(1, HERE)]);

        let scopes: Vec<_> = plan.wanted.balancers.keys().map(|key| key.scope).collect();
        assert_eq!(scopes, [Scope::Cluster]);
    }

    #[test]
    fn t025_given_session_affinity_when_planned_then_each_balancer_has_its_timeout() {
        let service = Service { affinity_timeout: Some(DEFAULT_AFFINITY_TIMEOUT), ..web(CLUSTER, LOCAL) };

        let plan = plan(&service, vec![ready(1, HERE)]);

        let timeouts: Vec<_> = plan.wanted.balancers.values().map(|backends| backends.affinity_timeout).collect();
        assert_eq!(timeouts, [Some(Duration::from_secs(10_800)); 2]);
    }

    #[test]
    fn given_two_families_when_planned_then_each_listener_leads_to_backends_of_its_own() {
        let service =
            Service::new("default/web").cluster_ip([10, 96, 0, 10]).cluster_ip(ip("fd00::10")).port("http", 80);
        let v4 = Slice::new("v4", &service).port("http", 8000).endpoint(Endpoint::new([10, 0, 0, 1]));
        let mut v6 = Slice::new("v6", &service).port("http", 8000).endpoint(Endpoint::new(ip("fd00:1::1")));
        v6.family = Family::V6;

        let plan = planned(&service, &[v4, v6], &options());

        let backends: Vec<_> = plan
            .wanted
            .balancers
            .iter()
            .map(|(key, backends)| format!("{} {}", key.family, backends.usable.picks[0].address()))
            .collect();
        assert_eq!(backends, ["IPv4 10.0.0.1:8000", "IPv6 [fd00:1::1]:8000"]);
    }

    #[test]
    fn given_one_node_port_for_two_ports_when_planned_then_the_first_has_it_and_the_other_is_said_once() {
        let mut service = web(CLUSTER, CLUSTER).port("https", 443).node_port(30000);
        service.external_ips = vec![ip("10.96.0.10")].into(); // the cluster IP again: the same port, no conflict
        let options = PlanOptions {
            node_port_addresses: vec![ip("192.0.2.1"), ip("192.0.2.2")],
            allowed_external_cidrs: vec!["10.0.0.0/8".parse().expect("a net")],
            ..options()
        };

        let plan = planned(&service, &[], &options);

        assert_eq!(plan.wanted.listeners.len(), 4);
        let on_node = plan.wanted.listeners.iter().filter(|(key, _)| key.port() == 30000);
        assert!(on_node.into_iter().all(|(_, listener)| &*listener.port.port == "http"));
        let problems: Vec<_> = plan.problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            problems,
            [
                r#"Service default/web: node port 30000/TCP of port "https" is taken by port "http" (node port): give one of them another number"#
            ]
        );
    }

    #[test]
    fn given_any_service_when_planned_then_each_side_of_each_listener_names_a_balancer_that_is_there() {
        for (internal, external) in [(CLUSTER, CLUSTER), (LOCAL, LOCAL), (CLUSTER, LOCAL), (LOCAL, CLUSTER)] {
            for endpoints in [vec![], vec![ready(1, HERE)], vec![ready(1, ELSEWHERE)]] {
                let wanted = plan(&web(internal, external), endpoints).wanted;

                let named = wanted.listeners.iter().flat_map(|(key, listener)| listener.balancers(key));
                assert!(named.into_iter().all(|balancer| wanted.balancers.get(&balancer).is_some()));
            }
        }
    }
}
