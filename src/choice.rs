//! Why the backends of a ServicePort are those: the rule that chose them, and what speaks against each of the others.
//!
//! Made when somebody asks, from the slices and the plan as they are: what is used is the plan's to say (`endpoints`), and is
//! never decided anew here. How it reads as a sentence is in `explain`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::admission::{self, Demands};
use crate::endpoints::{Candidate, Topology, Usable, UsableEndpoint, merge};
use crate::model::{Service, ServicePort, Slice};
use crate::name::{BalancerKey, Family, Scope};
use crate::plan::{Backends, PlanOptions, ServicePlan};

/// How the backends of a ServicePort were chosen in one family and scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Choice {
    /// The family of the listeners that use it.
    pub family: Family,
    /// The endpoints that the traffic policy allows.
    pub scope: Scope,
    /// What made the choice among them.
    pub rule: Rule,
    /// Who gets the next client that no pin binds, unless something changes before; only from a running relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<SocketAddr>,
    /// Where session affinity keeps the client that was asked about; only from a running relay, and where one was asked about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<Pin>,
    /// All endpoints of the ServicePort in that family, used or not, by address.
    pub endpoints: Vec<Judged>,
}

/// What session affinity knows of one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The client.
    pub client: IpAddr,
    /// Whom its next connection goes to unless that one is ejected; left out where that is as for a client that is new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
}

/// The backend that a client is kept at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// One of the endpoints that are used.
    pub backend: SocketAddr,
    /// How long it is kept there if it does not come back, in whole seconds.
    pub seconds: u64,
}

/// What chose the backends of a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Rule {
    /// Every ready endpoint of the scope.
    Ready,
    /// The ready ones whose hints name this node. From `hints.forNodes`.
    NodeHints,
    /// The ready ones whose hints name this node's zone. From `hints.forZones`.
    ZoneHints,
    /// None is ready: those that end and still answer.
    Terminating,
    /// There is none to choose.
    Nobody,
}

/// One endpoint, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Judged {
    /// Address, and the number that the target port stands for there.
    pub address: SocketAddr,
    /// Name of its pod, where a slice says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Why it gets nothing new; left out where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unused: Option<Unused>,
    /// Seconds until it is tried again, as it could not be reached again and again; 0: the next client tries it. Left out
    /// where it gets its share; only from a running relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected_seconds: Option<u64>,
}

/// Why an endpoint gets no new traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Unused {
    /// Its slice says `ready: false`.
    NotReady,
    /// It ends and still answers, but others are ready.
    Terminating,
    /// It ends and does not answer any more.
    Ended,
    /// It is on another node, and the policy is Local.
    OtherNode,
    /// Hints mean it for other nodes.
    NodeHints,
    /// Hints mean it for other zones.
    ZoneHints,
    /// Its address is one that no endpoint may have.
    Refused,
    /// Its address is the cluster IP of a Service: what is sent there would come back.
    ClusterIp,
    /// This very process listens there. Known to a running relay only.
    OwnListener,
}

impl fmt::Display for Unused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "not ready",
            Self::Terminating => "terminating, and others are ready",
            Self::Ended => "terminating, and not serving any more",
            Self::OtherNode => "on another node, and the policy is Local",
            Self::NodeHints => "its hints name other nodes",
            Self::ZoneHints => "its hints name other zones",
            Self::Refused => "an address that no endpoint may have, see the problems",
            Self::ClusterIp => "the cluster IP of a Service: a loop",
            Self::OwnListener => "a listener of this process: a loop",
        })
    }
}

/// The choices of one port of a Service: one for each family and scope that a listener asks for.
pub(crate) fn choices<'s>(
    service: &Service,
    port: &ServicePort,
    plan: &ServicePlan,
    slices: impl Iterator<Item = &'s Slice> + Clone,
    options: &PlanOptions,
) -> Vec<Choice> {
    let seen = slices.filter(|_| !service.slices_hidden);
    let choice = |(key, backends): (&BalancerKey, &Backends)| {
        let candidates = merge(port, key.family, seen.clone(), &options.node);
        let (rule, endpoints) = judge(candidates, key, &backends.usable, options);
        Choice { family: key.family, scope: key.scope, rule, next: None, pin: None, endpoints }
    };
    plan.balancers(port).map(choice).collect()
}

fn judge(
    mut candidates: Vec<Candidate<'_>>,
    &BalancerKey { family, scope, .. }: &BalancerKey,
    usable: &Usable,
    options: &PlanOptions,
) -> (Rule, Vec<Judged>) {
    let in_scope = |candidate: &Candidate<'_>| scope == Scope::Cluster || candidate.local;
    let refused = |candidate: &mut Candidate<'_>| {
        admission::refuses(candidate.address.ip(), candidate.endpoint.pod.is_some(), family, Demands::of(options))
    };
    // What would serve and is not among those that do was taken out before anything was chosen: it is a loop.
    let looping = |candidate: &mut Candidate<'_>| {
        in_scope(&*candidate) && candidate.serves() && !holds(&usable.serving, candidate.address)
    };
    let out = |candidate: Candidate<'_>, why| judged(&candidate, Some(why));
    let mut all: Vec<_> = candidates.extract_if(.., refused).map(|candidate| out(candidate, Unused::Refused)).collect();
    all.extend(candidates.extract_if(.., looping).map(|candidate| out(candidate, Unused::ClusterIp)));
    let topology = match scope {
        Scope::Cluster => Topology::of(&candidates, &options.node),
        Scope::Local => Topology::Everywhere,
    };
    let picked = |candidate: &Candidate<'_>| holds(&usable.picks, candidate.address);
    let rule = match candidates.iter().find(|candidate| picked(candidate)) {
        None => Rule::Nobody,
        // Those that are ready and those that end are never chosen together: one tells for all.
        Some(any) if !any.ready() => Rule::Terminating,
        Some(_) => rule_of(topology),
    };
    let unused = |candidate: &Candidate<'_>| match candidate {
        used if picked(used) => None,
        other if !in_scope(other) => Some(Unused::OtherNode),
        other if other.ready() => Some(passed_over(topology)),
        other if other.serves_to_the_end() => Some(Unused::Terminating),
        other if other.endpoint.terminating => Some(Unused::Ended),
        _ => Some(Unused::NotReady),
    };
    all.extend(candidates.iter().map(|candidate| judged(candidate, unused(candidate))));
    all.sort_by_key(|one| one.address);
    (rule, all)
}

fn judged(candidate: &Candidate<'_>, unused: Option<Unused>) -> Judged {
    let pod = candidate.endpoint.pod.as_deref().map(str::to_owned);
    Judged { address: candidate.address, pod, unused, ejected_seconds: None }
}

/// Both lists of a [`Usable`] are sorted by address.
fn holds(endpoints: &[UsableEndpoint], address: SocketAddr) -> bool {
    endpoints.binary_search_by_key(&address, |endpoint| endpoint.address()).is_ok()
}

fn rule_of(topology: Topology<'_>) -> Rule {
    match topology {
        Topology::Node(_) => Rule::NodeHints,
        Topology::Zone(_) => Rule::ZoneHints,
        Topology::Everywhere => Rule::Ready,
    }
}

/// Why a ready endpoint of the scope was not chosen: only hints pass one over.
fn passed_over(topology: Topology<'_>) -> Unused {
    if matches!(topology, Topology::Node(_)) { Unused::NodeHints } else { Unused::ZoneHints }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::Node;
    use crate::model::{Endpoint, TrafficPolicy};
    use crate::name::ListenKey;
    use crate::service_plan::Asked;

    const HERE: &str = "node-1";
    const ELSEWHERE: &str = "node-2";

    fn options() -> PlanOptions {
        let node = Node { name: Some(HERE.into()), zone: Some("zone-a".into()) };
        PlanOptions { node, ..PlanOptions::default() }
    }

    fn web(policy: TrafficPolicy) -> Service {
        let web = Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80);
        Service { internal_policy: policy, ..web }
    }

    /// `10.0.0.HOST`, ready, on a node.
    fn ready(host: u8, node: &str) -> Endpoint {
        Endpoint { node: Some(node.into()), ..Endpoint::new([10, 0, 0, host]) }
    }

    fn unready(host: u8) -> Endpoint {
        Endpoint { ready: false, ..ready(host, HERE) }
    }

    fn ending(host: u8) -> Endpoint {
        Endpoint { terminating: true, ..unready(host) }
    }

    fn ended(host: u8) -> Endpoint {
        Endpoint { serving: false, ..ending(host) }
    }

    fn zoned(host: u8, zone: &str) -> Endpoint {
        Endpoint { zone_hints: vec![zone.into()].into(), ..ready(host, HERE) }
    }

    fn meant_for(host: u8, node: &str) -> Endpoint {
        Endpoint { node_hints: vec![node.into()].into(), ..ready(host, HERE) }
    }

    /// The one choice of a Service with these endpoints; `10.0.0.99` is the cluster IP of another Service.
    fn chosen(service: &Service, endpoints: Vec<Endpoint>) -> Choice {
        chosen_with(&options(), service, endpoints)
    }

    fn chosen_with(options: &PlanOptions, service: &Service, endpoints: Vec<Endpoint>) -> Choice {
        let slice = Slice::new("web-1", service).port("http", 8000);
        let slice = endpoints.into_iter().fold(slice, Slice::endpoint);
        let is_cluster_ip = |key: &ListenKey| key.ip().to_string() == "10.0.0.99";
        let plan = Asked::of(service, options).plan([&slice].into_iter(), is_cluster_ip);
        let mut all = choices(service, &service.ports[0], &plan, [&slice].into_iter(), options);
        assert_eq!(all.len(), 1, "one family, one scope");
        all.remove(0)
    }

    /// The last byte of each endpoint, with why it is not used.
    fn fates(choice: &Choice) -> Vec<(u8, Option<Unused>)> {
        let last = |address: SocketAddr| match address {
            SocketAddr::V4(v4) => v4.ip().octets()[3],
            SocketAddr::V6(_) => 0,
        };
        choice.endpoints.iter().map(|one| (last(one.address), one.unused)).collect()
    }

    #[test]
    fn given_endpoints_of_each_kind_when_judged_then_the_rule_and_each_reason_are_told() {
        use Unused::*;
        let cases = [
            (vec![], Rule::Nobody, vec![]),
            (vec![ready(1, HERE), ready(2, ELSEWHERE)], Rule::Ready, vec![(1, None), (2, None)]),
            (
                vec![ready(1, HERE), unready(2), ending(3), ended(4)],
                Rule::Ready,
                vec![(1, None), (2, Some(NotReady)), (3, Some(Terminating)), (4, Some(Ended))],
            ),
            (
                vec![unready(1), ending(2), ended(3)],
                Rule::Terminating,
                vec![(1, Some(NotReady)), (2, None), (3, Some(Ended))],
            ),
            (vec![unready(1), ended(2)], Rule::Nobody, vec![(1, Some(NotReady)), (2, Some(Ended))]),
            (vec![zoned(1, "zone-a"), zoned(2, "zone-b")], Rule::ZoneHints, vec![(1, None), (2, Some(ZoneHints))]),
            (vec![meant_for(1, HERE), meant_for(2, ELSEWHERE)], Rule::NodeHints, vec![(1, None), (2, Some(NodeHints))]),
            // Half-written hints hide nobody.
            (vec![zoned(1, "zone-b"), ready(2, HERE)], Rule::Ready, vec![(1, None), (2, None)]),
        ];
        for (endpoints, rule, expected) in cases {
            let choice = chosen(&web(TrafficPolicy::Cluster), endpoints);

            assert_eq!((choice.rule, fates(&choice)), (rule, expected), "{choice:?}");
        }
    }

    #[test]
    fn given_policy_local_when_judged_then_those_on_other_nodes_are_out_and_hints_do_not_count() {
        let choice = chosen(&web(TrafficPolicy::Local), vec![zoned(1, "zone-b"), ready(2, ELSEWHERE), unready(3)]);

        assert_eq!((choice.scope, choice.rule), (Scope::Local, Rule::Ready));
        let expected = [(1, None), (2, Some(Unused::OtherNode)), (3, Some(Unused::NotReady))];
        assert_eq!(fates(&choice), expected);
    }

    #[test]
    fn given_addresses_that_no_endpoint_may_have_when_judged_then_they_hide_no_hints_of_others() {
        let loopback = Endpoint { address: [127, 0, 0, 1].into(), ..ready(0, HERE) };
        let endpoints = vec![zoned(2, "zone-a"), zoned(3, "zone-b"), ready(99, HERE), loopback];

        let choice = chosen(&web(TrafficPolicy::Cluster), endpoints);

        assert_eq!(choice.rule, Rule::ZoneHints);
        let expected = [
            (2, None),
            (3, Some(Unused::ZoneHints)),
            (99, Some(Unused::ClusterIp)),
            (1, Some(Unused::Refused)), // 127.0.0.1
        ];
        assert_eq!(fates(&choice), expected);
    }

    #[test]
    fn given_networks_that_endpoints_are_to_be_in_when_judged_then_others_are_refused_and_no_loop() {
        let service = web(TrafficPolicy::Cluster);
        let within = PlanOptions { endpoint_cidrs: vec!["10.0.0.0/30".parse().expect("a net")], ..options() };

        let choice = chosen_with(&within, &service, vec![ready(1, HERE), ready(9, HERE)]);

        assert_eq!(fates(&choice), [(1, None), (9, Some(Unused::Refused))]);
    }

    #[test]
    fn given_a_service_that_hides_its_slices_when_judged_then_there_is_nobody() {
        let hidden = Service { slices_hidden: true, ..web(TrafficPolicy::Cluster) };

        let choice = chosen(&hidden, vec![ready(1, HERE)]);

        assert_eq!((choice.rule, choice.endpoints), (Rule::Nobody, vec![]));
    }

    #[test]
    fn given_a_choice_when_sent_as_json_then_it_is_read_back_and_what_is_used_has_no_reason() {
        let choice = chosen(&web(TrafficPolicy::Cluster), vec![ready(1, HERE), unready(2)]);

        let text = serde_json::to_string(&choice).expect("JSON");

        assert_eq!(
            text,
            r#"{"family":"IPv4","scope":"Cluster","rule":"ready","endpoints":[{"address":"10.0.0.1:8000"},{"address":"10.0.0.2:8000","unused":"notReady"}]}"#
        );
        assert_eq!(serde_json::from_str::<Choice>(&text).expect("the same shape"), choice);
    }
}
