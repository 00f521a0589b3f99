//! What `spec.healthCheckNodePort` tells a load balancer about this node: how many of the Service's endpoints are here.
//!
//! The rule and the number; who answers at the port is not decided here.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::endpoints::Node;
use crate::model::{Service, ServiceKind, Slice, TrafficPolicy};
use crate::problem::Problem;

/// The health check of one Service on this node. A load balancer is to send traffic here while there are endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheck {
    /// From `spec.healthCheckNodePort` (1..=65535).
    pub port: u16,
    /// Distinct ready addresses on this node, over all ports and both families. One that terminates does not count,
    /// though it may still get traffic: the balancer is to look elsewhere.
    pub local_endpoints: usize,
}

impl HealthCheck {
    /// Only a load balancer under policy Local has to ask. Without a number it cannot, which is an error; the Service
    /// is served all the same.
    pub(crate) fn of<'a>(
        service: &Service,
        slices: impl Iterator<Item = &'a Slice>,
        node: &Node,
    ) -> (Option<Self>, Option<Problem>) {
        if service.kind != ServiceKind::LoadBalancer || service.external_policy != TrafficPolicy::Local {
            return (None, None);
        }
        match service.health_check_node_port {
            Some(port) => (Some(Self { port, local_endpoints: local_endpoints(slices, node) }), None),
            None => (None, Some(missing(service))),
        }
    }
}

fn local_endpoints<'a>(slices: impl Iterator<Item = &'a Slice>, node: &Node) -> usize {
    let served = slices.filter(|slice| !slice.ports.is_empty());
    let here = served.flat_map(|slice| &slice.endpoints).filter(|endpoint| node.has(endpoint) && endpoint.ready);
    here.filter(|endpoint| !endpoint.terminating).map(|endpoint| endpoint.address).collect::<BTreeSet<IpAddr>>().len()
}

fn missing(service: &Service) -> Problem {
    let text = "spec.healthCheckNodePort: none, so a load balancer cannot ask which nodes have endpoints";
    Problem::error(format_args!("Service {}", service.name), "health_check", text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Endpoint;
    use crate::problem::Severity;

    const HERE: &str = "node-1";

    fn balanced() -> Service {
        Service {
            kind: ServiceKind::LoadBalancer,
            external_policy: TrafficPolicy::Local,
            health_check_node_port: Some(345),
            ..Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80)
        }
    }

    fn on(node: &str, host: u8) -> Endpoint {
        Endpoint { node: Some(node.into()), ..Endpoint::new([10, 0, 0, host]) }
    }

    fn slice(endpoints: impl IntoIterator<Item = Endpoint>) -> Slice {
        endpoints.into_iter().fold(Slice::new("web-1", &balanced()).port("http", 8000), Slice::endpoint)
    }

    fn of(service: &Service, slices: &[Slice]) -> (Option<HealthCheck>, Option<Problem>) {
        HealthCheck::of(service, slices.iter(), &Node { name: Some(HERE.into()), zone: None })
    }

    fn count(slices: &[Slice]) -> usize {
        of(&balanced(), slices).0.expect("it is to be asked").local_endpoints
    }

    #[test]
    fn t027_t028_given_other_types_policies_or_no_number_when_asked_then_there_is_no_health_check() {
        let changed = |change: fn(&mut Service)| {
            let mut service = balanced();
            change(&mut service);
            let (health_check, problem) = of(&service, &[]);
            (health_check.is_some(), problem.map(|problem| (problem.reason.to_string(), problem.severity)))
        };
        let missing = ("health_check".to_owned(), Severity::Error);

        assert_eq!(changed(|_| {}), (true, None));
        assert_eq!(changed(|service| service.kind = ServiceKind::NodePort), (false, None));
        assert_eq!(changed(|service| service.external_policy = TrafficPolicy::Cluster), (false, None));
        assert_eq!(changed(|service| service.health_check_node_port = None), (false, Some(missing)));
    }

    #[test]
    fn t059_given_two_local_addresses_over_four_ports_when_counted_then_there_are_two() {
        let one = slice([on(HERE, 1), on(HERE, 2), on("node-2", 3)]).port("https", 8443);
        let other = Slice::new("web-2", &balanced()).port("admin", 81).udp_port("quic", 8443).endpoint(on(HERE, 2));

        assert_eq!(count(&[one, other]), 2);
        assert_eq!(count(&[slice([on("node-2", 3)])]), 0);
    }

    #[test]
    fn t060_t214_given_endpoints_that_are_not_ready_or_end_when_counted_then_they_are_none() {
        let unready = Endpoint { ready: false, ..on(HERE, 1) };
        let ending = Endpoint { ready: false, terminating: true, ..on(HERE, 2) };
        let published = Endpoint { terminating: true, ..on(HERE, 3) };

        assert_eq!(count(&[slice([unready.clone(), ending.clone(), on(HERE, 4)])]), 1);
        assert_eq!(count(&[slice([unready, ending, published])]), 0);
    }
}
