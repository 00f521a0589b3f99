//! Which endpoints a ServicePort may use on this node: conditions, traffic policy, topology hints.
//!
//! A pure function, one to one the policy of kube-proxy. Nothing here knows listeners or sockets;
//! which addresses may be endpoints at all is decided before, in `admission`. Why an endpoint is not used is told in `choice`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{Endpoint, Service, ServicePort, Slice, TrafficPolicy};
use crate::name::Family;

/// This node, as far as selection needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Own node name; `None` (or empty) makes no endpoint local. From `--node-name`.
    pub name: Option<Arc<str>>,
    /// Own zone, the label `topology.kubernetes.io/zone`; `None` (or empty) never matches a hint. From `--zone`.
    pub zone: Option<Arc<str>>,
}

impl Node {
    fn known_name(&self) -> Option<&str> {
        self.name.as_deref().filter(|name| !name.is_empty())
    }

    /// True for an endpoint on this node.
    pub(crate) fn has(&self, endpoint: &Endpoint) -> bool {
        endpoint.node.is_some() && endpoint.node.as_deref() == self.known_name()
    }

    fn known_zone(&self) -> Option<&str> {
        self.zone.as_deref().filter(|zone| !zone.is_empty())
    }
}

/// An endpoint of one ServicePort that may be used, with what people want to read beside it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsableEndpoint {
    /// From `addresses[0]`. Apart from the port they take a third less than a `SocketAddr`.
    pub ip: IpAddr,
    /// The number that the slice resolved the target port to.
    pub port: u16,
    /// True on this node.
    pub local: bool,
    /// True where it ends, but still serves.
    pub terminating: bool,
    /// From `targetRef.name` of a Pod. What else there is to know of it is in its slice.
    pub pod: Option<Arc<str>>,
}

impl UsableEndpoint {
    /// Where it answers.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

/// The endpoints of one scope. Sorted by address, each address once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usable {
    /// May get new traffic.
    pub picks: Arc<[UsableEndpoint]>,
    /// Keeps what it has: every endpoint of the scope that is ready, or terminating but still serving.
    ///
    /// A superset of `picks`: topology hints steer new traffic only, and a pod that ends keeps its flows while it can.
    /// Mostly it is no more than them, and then both are one list.
    pub serving: Arc<[UsableEndpoint]>,
}

/// What a ServicePort may use in one family. `None`: no listener of the Service asks for this scope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// For policy Cluster.
    pub cluster: Option<Usable>,
    /// For policy Local.
    pub local: Option<Usable>,
    /// True where some endpoint anywhere could serve: it tells *drop* from *reject*.
    pub any: bool,
    /// Those that could, were they not listeners of this process: what is sent there comes back.
    pub own: Vec<SocketAddr>,
}

/// Chooses for one ServicePort and one family among the Service's slices.
///
/// `external` tells that the port is reached at more than its cluster IP; without that the external
/// traffic policy has no meaning. `is_own` tells where this process listens itself, over the port's protocol: such an
/// endpoint is as good as none. The order of the slices does not matter.
pub fn usable<'a>(
    service: &Service,
    port: &ServicePort,
    family: Family,
    external: bool,
    slices: impl Iterator<Item = &'a Slice>,
    node: &Node,
    is_own: impl Fn(SocketAddr) -> bool,
) -> Selection {
    let mut candidates = merge(port, family, slices, node);
    let own: Vec<_> = candidates.extract_if(.., |candidate| is_own(candidate.address)).collect();
    Selection {
        cluster: asks_for_cluster(service, external).then(|| cluster_set(&candidates, node)),
        local: asks_for_local(service, external).then(|| local_set(&candidates)),
        any: candidates.iter().any(Candidate::serves),
        own: own.iter().filter(|candidate| candidate.serves()).map(|candidate| candidate.address).collect(),
    }
}

fn asks_for_cluster(service: &Service, external: bool) -> bool {
    // Under externalTrafficPolicy Local, too: this node and its pods use the Cluster set.
    service.internal_policy == TrafficPolicy::Cluster || external
}

fn asks_for_local(service: &Service, external: bool) -> bool {
    service.internal_policy == TrafficPolicy::Local || (external && service.external_policy == TrafficPolicy::Local)
}

/// An endpoint under one number of the ServicePort, before any choice.
pub(crate) struct Candidate<'a> {
    pub(crate) address: SocketAddr,
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) local: bool,
}

impl Candidate<'_> {
    pub(crate) fn ready(&self) -> bool {
        self.endpoint.ready
    }

    /// Ends, and still answers: used only where nobody is ready.
    pub(crate) fn serves_to_the_end(&self) -> bool {
        self.endpoint.serving && self.endpoint.terminating
    }

    pub(crate) fn serves(&self) -> bool {
        self.ready() || self.serves_to_the_end()
    }

    /// Which of two entries for one address is believed: the greater one. A pod's address may already
    /// belong to its successor, so what does not terminate comes first.
    fn credibility(&self) -> (bool, bool, bool) {
        (!self.endpoint.terminating, self.endpoint.ready, self.endpoint.serving)
    }

    fn to_usable(&self) -> UsableEndpoint {
        UsableEndpoint {
            ip: self.address.ip(),
            port: self.address.port(),
            local: self.local,
            terminating: self.endpoint.terminating,
            pod: self.endpoint.pod.clone(),
        }
    }
}

/// The union over all slices, sorted, each address once.
pub(crate) fn merge<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a Slice>,
    node: &Node,
) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::new();
    for slice in slices.filter(|slice| slice.family == family) {
        let numbers = slice.ports.iter().filter(|known| known.name == port.name && known.protocol == port.protocol);
        for number in numbers.map(|known| known.port) {
            candidates.extend(slice.endpoints.iter().map(|endpoint| Candidate {
                address: SocketAddr::new(endpoint.address, number),
                endpoint,
                local: node.has(endpoint),
            }));
        }
    }
    candidates.sort_by(|a, b| a.address.cmp(&b.address).then_with(|| b.credibility().cmp(&a.credibility())));
    candidates.dedup_by_key(|candidate| candidate.address);
    candidates
}

fn cluster_set(candidates: &[Candidate<'_>], node: &Node) -> Usable {
    let topology = Topology::of(candidates, node);
    choose(candidates, |_| true, |candidate| topology.allows(candidate.endpoint))
}

fn local_set(candidates: &[Candidate<'_>]) -> Usable {
    choose(candidates, |candidate| candidate.local, |_| true)
}

/// Ready endpoints of the scope that are near enough; where there is none, all of it that serve to their end.
fn choose(
    candidates: &[Candidate<'_>],
    in_scope: impl Fn(&Candidate<'_>) -> bool,
    near: impl Fn(&Candidate<'_>) -> bool,
) -> Usable {
    let mut picks = collect(candidates, |candidate| in_scope(candidate) && candidate.ready() && near(candidate));
    if picks.is_empty() {
        picks = collect(candidates, |candidate| in_scope(candidate) && candidate.serves_to_the_end());
    }
    let serving = collect(candidates, |candidate| in_scope(candidate) && candidate.serves());
    if picks.len() == serving.len() {
        picks = Arc::clone(&serving); // Each pick serves: as many are the same ones.
    }
    Usable { picks, serving }
}

fn collect(candidates: &[Candidate<'_>], accept: impl Fn(&Candidate<'_>) -> bool) -> Arc<[UsableEndpoint]> {
    candidates.iter().filter(|candidate| accept(candidate)).map(Candidate::to_usable).collect()
}

/// Which hints narrow the Cluster set down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Topology<'a> {
    /// Those for this node.
    Node(&'a str),
    /// Those for this zone.
    Zone(&'a str),
    /// None of them.
    Everywhere,
}

impl<'a> Topology<'a> {
    /// Hints count only where every ready endpoint has one and some endpoint is meant for us:
    /// half-written hints must not hide endpoints.
    pub(crate) fn of(candidates: &[Candidate<'_>], node: &'a Node) -> Self {
        let hinted = [node.known_name().map(Self::Node), node.known_zone().map(Self::Zone)];
        hinted.into_iter().flatten().find(|topology| topology.complete(candidates)).unwrap_or(Self::Everywhere)
    }

    fn complete(self, candidates: &[Candidate<'_>]) -> bool {
        let mut ready = candidates.iter().filter(|candidate| candidate.ready()).map(|candidate| candidate.endpoint);
        ready.clone().all(|endpoint| !self.hints(endpoint).is_empty()) && ready.any(|endpoint| self.allows(endpoint))
    }

    fn allows(self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Node(own) | Self::Zone(own) => self.hints(endpoint).iter().any(|hint| **hint == *own),
            Self::Everywhere => true,
        }
    }

    fn hints(self, endpoint: &Endpoint) -> &[Arc<str>] {
        match self {
            Self::Node(_) => &endpoint.node_hints,
            Self::Zone(_) => &endpoint.zone_hints,
            Self::Everywhere => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::Protocol;

    const HERE: &str = "node-1";
    const ELSEWHERE: &str = "node-2";

    fn here() -> Node {
        Node { name: Some(HERE.into()), zone: Some("zone-a".into()) }
    }

    /// How an endpoint of the tables below is: on a node, in a condition, with hints.
    #[derive(Clone, Copy, Default)]
    struct With<'a> {
        node: Option<&'a str>,
        unready: bool,
        terminating: bool,
        silent: bool,
        zones: &'a [&'a str],
        nodes: &'a [&'a str],
    }

    const READY: With<'static> =
        With { node: None, unready: false, terminating: false, silent: false, zones: &[], nodes: &[] };
    const UNREADY: With<'static> = With { unready: true, ..READY };
    /// Unready and terminating, and still serving.
    const ENDING: With<'static> = With { unready: true, terminating: true, ..READY };
    /// Unready, terminating, and not serving any more.
    const ENDED: With<'static> = With { silent: true, ..ENDING };

    impl<'a> With<'a> {
        fn on(self, node: &'a str) -> Self {
            Self { node: Some(node), ..self }
        }

        fn zones(self, zones: &'a [&'a str]) -> Self {
            Self { zones, ..self }
        }

        fn nodes(self, nodes: &'a [&'a str]) -> Self {
            Self { nodes, ..self }
        }
    }

    fn endpoint(host: u8, with: With<'_>) -> Endpoint {
        let words = |list: &[&str]| list.iter().map(|word| Arc::from(*word)).collect();
        Endpoint {
            ready: !with.unready,
            serving: !with.silent,
            terminating: with.terminating,
            node: with.node.map(Arc::from),
            zone_hints: words(with.zones),
            node_hints: words(with.nodes),
            ..Endpoint::new([10, 0, 0, host])
        }
    }

    fn cluster_service() -> Service {
        Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80)
    }

    fn service(internal: TrafficPolicy, external: TrafficPolicy) -> Service {
        Service { internal_policy: internal, external_policy: external, ..cluster_service() }
    }

    fn slice(name: &str, endpoints: &[(u8, With<'_>)]) -> Slice {
        let slice = Slice::new(name, &cluster_service()).port("http", 8000);
        endpoints.iter().fold(slice, |slice, (host, with)| slice.endpoint(endpoint(*host, *with)))
    }

    fn select_on(node: &Node, service: &Service, external: bool, slices: &[Slice]) -> Selection {
        usable(service, &service.ports[0], Family::V4, external, slices.iter(), node, |_| false)
    }

    fn select(service: &Service, external: bool, endpoints: &[(u8, With<'_>)]) -> Selection {
        select_on(&here(), service, external, &[slice("web-1", endpoints)])
    }

    fn hosts(endpoints: &[UsableEndpoint]) -> Vec<u8> {
        let last_byte =
            |endpoint: &UsableEndpoint| endpoint.address().to_string().split(['.', ':']).nth(3).map(str::parse);
        endpoints.iter().map(|endpoint| last_byte(endpoint).expect("IPv4").expect("a number")).collect()
    }

    /// Last bytes of the picks of a scope; `None` where nobody asks for the scope.
    fn picks(usable: &Option<Usable>) -> Option<Vec<u8>> {
        usable.as_ref().map(|usable| hosts(&usable.picks))
    }

    /// The picks under policy Cluster on this node.
    fn cluster_picks(endpoints: &[(u8, With<'_>)]) -> Vec<u8> {
        picks(&select(&cluster_service(), false, endpoints).cluster).expect("policy Cluster asks for the Cluster set")
    }

    fn addresses(usable: &Option<Usable>) -> Vec<String> {
        usable.iter().flat_map(|usable| &*usable.picks).map(|endpoint| endpoint.address().to_string()).collect()
    }

    #[test]
    fn t033_given_two_ports_and_three_endpoints_when_chosen_then_each_port_has_all_and_ours_is_local() {
        let service = cluster_service().port("https", 443);
        let endpoints = [(1, READY.on(HERE)), (2, READY.on(ELSEWHERE)), (3, READY)];
        let slices = [slice("web-1", &endpoints).port("https", 8443)];

        let all =
            |port| usable(&service, &service.ports[port], Family::V4, false, slices.iter(), &here(), |_| false).cluster;

        assert_eq!(addresses(&all(0)), ["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]);
        assert_eq!(addresses(&all(1)), ["10.0.0.1:8443", "10.0.0.2:8443", "10.0.0.3:8443"]);
        let local: Vec<_> = all(0).expect("asked for").picks.iter().map(|endpoint| endpoint.local).collect();
        assert_eq!(local, [true, false, false]);
    }

    #[test]
    fn t034_t035_given_slices_that_overlap_when_merged_then_each_address_is_there_once_in_order() {
        let service = cluster_service();
        let slices =
            [slice("b", &[(4, READY), (3, READY), (1, READY), (2, READY)]), slice("a", &[(3, READY), (5, READY)])];

        let selection = select_on(&here(), &service, false, &slices);

        assert_eq!(picks(&selection.cluster), Some(vec![1, 2, 3, 4, 5]));
    }

    #[test]
    fn t036_t037_given_one_address_in_two_slices_when_merged_then_the_better_entry_wins_in_any_order() {
        for (better, worse) in [(READY, UNREADY), (READY, ENDING), (UNREADY, ENDING), (UNREADY, READY.ending())] {
            let slices = [slice("a", &[(1, better)]), slice("b", &[(1, worse)])];
            let reversed = [slices[1].clone(), slices[0].clone()];

            let one = select_on(&here(), &cluster_service(), false, &slices);
            let other = select_on(&here(), &cluster_service(), false, &reversed);

            assert_eq!(one, other);
            assert_eq!(picks(&one.cluster), Some(if better.unready { vec![] } else { vec![1] }));
        }
    }

    impl With<'_> {
        fn ending(self) -> Self {
            Self { terminating: true, ..self }
        }
    }

    #[test]
    fn t038_t081_given_nobody_ready_when_chosen_then_the_set_is_empty_and_there_is_none_anywhere() {
        let selection = select(&cluster_service(), false, &[(1, UNREADY), (2, UNREADY)]);

        assert_eq!(picks(&selection.cluster), Some(vec![]));
        assert!(!selection.any);
        assert_eq!(cluster_picks(&[(1, READY), (2, UNREADY), (3, READY)]), [1, 3]);
    }

    #[test]
    fn t041_t042_given_port_names_when_joined_then_empty_meets_empty_and_unknown_names_meet_nobody() {
        let service = Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("", 80);
        let unnamed = Slice::new("web-1", &service).port("", 8000).endpoint(endpoint(1, READY));
        let unknown = Slice::new("web-2", &service).port("http", 8000).endpoint(endpoint(2, READY));

        let selection = select_on(&here(), &service, false, &[unnamed, unknown]);

        assert_eq!(picks(&selection.cluster), Some(vec![1]));
    }

    #[test]
    fn t043_given_two_numbers_under_one_name_when_merged_then_they_are_two_backends() {
        let mut other = slice("web-2", &[(1, READY)]);
        other.ports[0].port = 80;

        let selection = select_on(&here(), &cluster_service(), false, &[slice("web-1", &[(1, READY)]), other]);

        assert_eq!(addresses(&selection.cluster), ["10.0.0.1:80", "10.0.0.1:8000"]);
    }

    #[test]
    fn t098_given_tcp_and_udp_under_one_name_and_number_when_chosen_then_the_protocol_tells_them_apart() {
        let service = cluster_service().udp_port("http", 80);
        let slices = [slice("web-1", &[(1, READY)]).udp_port("http", 9000)];

        let udp = usable(&service, &service.ports[1], Family::V4, false, slices.iter(), &here(), |_| false);

        assert_eq!(service.ports[1].protocol, Protocol::Udp);
        assert_eq!(addresses(&udp.cluster), ["10.0.0.1:9000"]);
    }

    #[test]
    fn t045_t046_t047_given_conditions_when_judged_then_ready_counts_first_and_serving_only_with_terminating() {
        assert_eq!(cluster_picks(&[(1, READY)]), [1]);
        assert_eq!(cluster_picks(&[(1, ENDING)]), [1]);
        assert_eq!(cluster_picks(&[(1, READY.ending()), (2, ENDING)]), [1], "publishNotReadyAddresses");
        assert_eq!(cluster_picks(&[(1, UNREADY)]), [] as [u8; 0], "serving alone is not enough");
    }

    #[test]
    fn t048_given_node_names_when_compared_then_only_an_equal_and_known_one_is_local() {
        let service = service(TrafficPolicy::Local, TrafficPolicy::Cluster);
        let slices = [slice("web-1", &[(1, READY.on(HERE)), (2, READY.on(ELSEWHERE)), (3, READY), (4, READY.on(""))])];
        let local_on = |name: Option<&str>| {
            let node = Node { name: name.map(Arc::from), zone: None };
            picks(&select_on(&node, &service, false, &slices).local)
        };

        assert_eq!(local_on(Some(HERE)), Some(vec![1]));
        assert_eq!(local_on(Some("")), Some(vec![]));
        assert_eq!(local_on(None), Some(vec![]));
    }

    #[test]
    fn t065_t069_given_zone_hints_on_all_when_some_are_for_us_then_only_those_are_picked() {
        assert_eq!(cluster_picks(&[(1, READY.zones(&["zone-a"])), (2, READY.zones(&["zone-b"]))]), [1]);
        assert_eq!(cluster_picks(&[(1, READY.zones(&["zone-b", "zone-a"])), (2, READY.zones(&["zone-b"]))]), [1]);
    }

    #[test]
    fn t066_t068_given_half_written_hints_when_chosen_then_nothing_is_hidden() {
        let (ours, theirs) = (READY.zones(&["zone-a"]), READY.zones(&["zone-b"]));

        assert_eq!(cluster_picks(&[(1, ours), (2, theirs), (3, READY)]), [1, 2, 3], "one lacks a hint");
        assert_eq!(cluster_picks(&[(1, theirs), (2, theirs)]), [1, 2], "none is for our zone");
    }

    #[test]
    fn t067_given_a_node_without_zone_when_chosen_then_hints_do_not_count() {
        let slices = [slice("web-1", &[(1, READY.zones(&["zone-a"])), (2, READY.zones(&["zone-b"]))])];

        for zone in [None, Some("".into())] {
            let node = Node { zone, ..here() };
            assert_eq!(picks(&select_on(&node, &cluster_service(), false, &slices).cluster), Some(vec![1, 2]));
        }
    }

    #[test]
    fn t070_t071_given_unready_endpoints_when_hints_are_judged_then_they_have_no_voice() {
        let (ours, theirs) = (&["zone-a"][..], &["zone-b"][..]);

        assert_eq!(cluster_picks(&[(1, UNREADY.zones(ours)), (2, READY.zones(ours)), (3, READY.zones(theirs))]), [2]);
        assert_eq!(
            cluster_picks(&[(1, UNREADY.zones(ours)), (2, READY.zones(theirs)), (3, READY.zones(theirs))]),
            [2, 3]
        );
        assert_eq!(cluster_picks(&[(1, UNREADY), (2, READY.zones(ours)), (3, READY.zones(theirs))]), [2]);
    }

    #[test]
    fn t072_t073_t074_given_node_hints_when_complete_and_ours_then_they_go_before_zone_hints() {
        let (ours, theirs) = (READY.zones(&["zone-a"]), READY.zones(&["zone-b"]));

        let complete = [(1, ours.nodes(&[HERE])), (2, ours.nodes(&[ELSEWHERE])), (3, theirs.nodes(&[ELSEWHERE]))];
        assert_eq!(cluster_picks(&complete), [1]);
        let none_for_us =
            [(1, ours.nodes(&[ELSEWHERE])), (2, ours.nodes(&[ELSEWHERE])), (3, theirs.nodes(&["node-3"]))];
        assert_eq!(cluster_picks(&none_for_us), [1, 2]);
        let one_missing = [(1, ours.nodes(&[HERE])), (2, ours), (3, theirs.nodes(&[ELSEWHERE]))];
        assert_eq!(cluster_picks(&one_missing), [1, 2]);
    }

    #[test]
    fn t075_t076_given_a_local_policy_and_zone_hints_when_chosen_then_only_the_cluster_set_is_narrowed() {
        let endpoints = [(1, READY.on(ELSEWHERE).zones(&["zone-a"])), (2, READY.on(HERE).zones(&["zone-b"]))];

        for (internal, external) in
            [(TrafficPolicy::Cluster, TrafficPolicy::Local), (TrafficPolicy::Local, TrafficPolicy::Cluster)]
        {
            let selection = select(&service(internal, external), true, &endpoints);

            assert_eq!((picks(&selection.cluster), picks(&selection.local)), (Some(vec![1]), Some(vec![2])));
        }
    }

    #[test]
    fn t077_t078_t079_t080_given_internal_policy_local_when_chosen_then_there_is_a_local_set_only() {
        let service = service(TrafficPolicy::Local, TrafficPolicy::Cluster);
        let (ours, theirs) = (READY.on(HERE), READY.on(ELSEWHERE));
        let check = |endpoints: &[(u8, With<'_>)], local: &[u8], any: bool| {
            let selection = select(&service, false, endpoints);

            assert_eq!(picks(&selection.cluster), None);
            assert_eq!(picks(&selection.local).as_deref(), Some(local));
            assert_eq!(selection.any, any);
        };

        check(&[], &[], false);
        check(&[(1, theirs), (2, theirs)], &[], true);
        check(&[(1, ours), (2, ours)], &[1, 2], true);
        check(&[(1, ours), (2, theirs)], &[1], true);
    }

    #[test]
    fn t082_t083_given_only_terminating_endpoints_when_chosen_then_those_that_serve_are_used() {
        assert_eq!(cluster_picks(&[(1, ENDING.on(HERE)), (2, ENDING.on(ELSEWHERE))]), [1, 2]);
        assert_eq!(cluster_picks(&[(1, ENDED), (2, ENDED)]), [] as [u8; 0]);
    }

    #[test]
    fn t084_t085_given_either_policy_local_when_chosen_then_both_sets_are_there() {
        let endpoints = [(1, READY.on(HERE)), (2, READY.on(ELSEWHERE))];

        for (internal, external) in
            [(TrafficPolicy::Local, TrafficPolicy::Cluster), (TrafficPolicy::Cluster, TrafficPolicy::Local)]
        {
            let selection = select(&service(internal, external), true, &endpoints);

            assert_eq!((picks(&selection.cluster), picks(&selection.local)), (Some(vec![1, 2]), Some(vec![1])));
        }
    }

    #[test]
    fn t086_t087_given_both_policies_local_when_all_are_remote_then_only_the_cluster_set_has_them() {
        let service = service(TrafficPolicy::Local, TrafficPolicy::Local);

        for condition in [READY, ENDING] {
            let selection = select(&service, true, &[(1, condition.on(ELSEWHERE)), (2, condition.on(ELSEWHERE))]);

            assert_eq!((picks(&selection.cluster), picks(&selection.local)), (Some(vec![1, 2]), Some(vec![])));
            assert!(selection.any);
        }
    }

    #[test]
    fn t088_given_a_remote_ready_and_a_local_ending_endpoint_when_chosen_then_each_set_falls_back_by_itself() {
        let service = service(TrafficPolicy::Cluster, TrafficPolicy::Local);
        let endpoints = [(1, READY.on(ELSEWHERE)), (2, ENDED.on(HERE)), (3, ENDING.on(HERE))];

        let selection = select(&service, true, &endpoints);

        assert_eq!((picks(&selection.cluster), picks(&selection.local)), (Some(vec![1]), Some(vec![3])));
    }

    #[test]
    fn t089_given_external_policy_local_without_external_address_when_chosen_then_it_has_no_meaning() {
        let service = service(TrafficPolicy::Cluster, TrafficPolicy::Local);

        let selection = select(&service, false, &[(1, READY.on(HERE)), (2, READY.on(ELSEWHERE))]);

        assert_eq!((picks(&selection.cluster), picks(&selection.local)), (Some(vec![1, 2]), None));
    }

    #[test]
    fn t090_given_hints_and_nobody_ready_when_chosen_then_terminating_ones_of_all_zones_are_used() {
        assert_eq!(cluster_picks(&[(1, ENDING.zones(&["zone-a"])), (2, ENDING.zones(&["zone-b"]))]), [1, 2]);
    }

    #[test]
    fn t092_given_a_traffic_distribution_without_hints_when_chosen_then_nothing_is_filtered() {
        let service = Service { traffic_distribution: Some("PreferSameZone".into()), ..cluster_service() };

        let selection = select(&service, false, &[(1, READY.on(HERE)), (2, READY.on(ELSEWHERE))]);

        assert_eq!(picks(&selection.cluster), Some(vec![1, 2]));
    }

    #[test]
    fn given_a_terminating_endpoint_beside_a_ready_one_when_chosen_then_it_serves_on_without_being_picked() {
        let endpoints =
            [(1, READY.zones(&["zone-a"])), (2, READY.zones(&["zone-b"])), (3, ENDING), (4, ENDED), (5, UNREADY)];

        let usable = select(&cluster_service(), false, &endpoints).cluster.expect("asked for");

        assert_eq!(hosts(&usable.picks), [1]);
        assert_eq!(hosts(&usable.serving), [1, 2, 3]);
        assert!(usable.serving[2].terminating);
    }

    #[test]
    fn given_a_slice_of_the_other_family_when_chosen_then_it_is_not_looked_at() {
        let mut v6 = slice("web-1", &[]);
        v6.family = Family::V6;
        v6 = v6.endpoint(Endpoint::new("fd00::1".parse::<std::net::IpAddr>().expect("an address")));

        assert_eq!(addresses(&select_on(&here(), &cluster_service(), false, &[v6]).cluster), [] as [&str; 0]);
    }
}
