//! A Service's health port (`spec.healthCheckNodePort`): where load balancers ask this node for it, and how many of its
//! endpoints they are told of.
//!
//! The rule and the number, pure. Who answers there is `healthcheck`; whether the proxy and its node are well is `health`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use crate::endpoints::Node;
use crate::model::{Service, ServiceKind, Slice, TrafficPolicy};
use crate::name::{ListenKey, Protocol};

/// The health port of one Service on this node. A load balancer is to send traffic here while there are endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthPort {
    /// From `spec.healthCheckNodePort` (1..=65535).
    pub number: u16,
    /// Where it is to be answered: on the addresses of node ports, all or none. Empty where it cannot be, for a reason
    /// that is among the Service's problems.
    pub addresses: Arc<[IpAddr]>,
    /// Distinct ready addresses on this node, over all ports and both families. One that terminates does not count,
    /// though it may still get traffic: the balancer is to look elsewhere.
    pub local_endpoints: usize,
}

impl HealthPort {
    /// Where it is to be answered.
    pub fn keys(&self) -> impl Iterator<Item = ListenKey> {
        keys(self.number, &self.addresses)
    }
}

/// A health port at some addresses.
pub(crate) fn keys(number: u16, addresses: &[IpAddr]) -> impl Iterator<Item = ListenKey> {
    addresses.iter().map(move |ip| ListenKey::new(*ip, number, Protocol::Tcp))
}

/// The number at which a load balancer asks: only one under policy Local has to. `Err` says what is wrong where it has
/// none and cannot; the Service is served all the same.
pub(crate) fn number_of(service: &Service) -> Result<Option<u16>, &'static str> {
    if service.kind != ServiceKind::LoadBalancer || service.external_policy != TrafficPolicy::Local {
        return Ok(None);
    }
    let missing = "spec.healthCheckNodePort: none, so a load balancer cannot ask which nodes have endpoints";
    service.health_check_node_port.map(Some).ok_or(missing)
}

/// What load balancers are told of a Service's slices. An endpoint whose ports are all `refused` is never sent traffic.
pub(crate) fn local_endpoints<'a>(
    slices: impl Iterator<Item = &'a Slice>,
    node: &Node,
    refused: impl Fn(&ListenKey) -> bool,
) -> usize {
    let mut addresses = BTreeSet::new();
    for slice in slices {
        let is_used = |address: IpAddr| {
            let mut ports = slice.ports.iter();
            ports.any(|port| !refused(&ListenKey::new(address, port.port, port.protocol)))
        };
        let here = slice.endpoints.iter().filter(|endpoint| endpoint.ready && !endpoint.terminating);
        let here = here.filter(|endpoint| node.has(endpoint)).map(|endpoint| endpoint.address);
        addresses.extend(here.filter(|address| is_used(*address)));
    }
    addresses.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Endpoint;

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

    fn count_but(slices: &[Slice], refused: &[ListenKey]) -> usize {
        let node = Node { name: Some(HERE.into()), zone: None };
        local_endpoints(slices.iter(), &node, |key| refused.contains(key))
    }

    fn count(slices: &[Slice]) -> usize {
        count_but(slices, &[])
    }

    #[test]
    fn t027_t028_given_other_types_policies_or_no_number_when_asked_then_there_is_no_health_port() {
        let changed = |change: fn(&mut Service)| {
            let mut service = balanced();
            change(&mut service);
            number_of(&service)
        };

        assert_eq!(changed(|_| {}), Ok(Some(345)));
        assert_eq!(changed(|service| service.kind = ServiceKind::NodePort), Ok(None));
        assert_eq!(changed(|service| service.external_policy = TrafficPolicy::Cluster), Ok(None));
        assert!(changed(|service| service.health_check_node_port = None).is_err());
    }

    #[test]
    fn t059_given_two_local_addresses_over_four_ports_when_counted_then_there_are_two() {
        let one = slice([on(HERE, 1), on(HERE, 2), on("node-2", 3)]).port("https", 8443);
        let other = Slice::new("web-2", &balanced()).port("admin", 81).udp_port("quic", 8443).endpoint(on(HERE, 2));

        assert_eq!(count(&[one, other]), 2);
        assert_eq!(count(&[slice([on("node-2", 3)])]), 0);
    }

    #[test]
    fn t059_given_endpoints_of_both_families_when_counted_then_each_address_counts() {
        let v6 = Endpoint { address: "fd00:1::1".parse().expect("an address"), ..on(HERE, 1) };
        let slices = [slice([on(HERE, 1)]), Slice::new("web-2", &balanced()).port("http", 8000).endpoint(v6)];

        assert_eq!(count(&slices), 2);
    }

    #[test]
    fn given_a_slice_without_ports_when_counted_then_nobody_can_be_reached_there() {
        assert_eq!(count(&[Slice::new("web-1", &balanced()).endpoint(on(HERE, 1))]), 0);
    }

    #[test]
    fn t060_t214_given_endpoints_that_are_not_ready_or_end_when_counted_then_they_are_none() {
        let unready = Endpoint { ready: false, ..on(HERE, 1) };
        let ending = Endpoint { ready: false, terminating: true, ..on(HERE, 2) };
        let published = Endpoint { terminating: true, ..on(HERE, 3) };

        assert_eq!(count(&[slice([unready.clone(), ending.clone(), on(HERE, 4)])]), 1);
        assert_eq!(count(&[slice([unready, ending, published])]), 0);
    }

    #[test]
    fn given_an_endpoint_that_is_a_listener_of_ours_when_counted_then_it_counts_by_its_other_ports_alone() {
        let own = ListenKey::new([10, 0, 0, 1].into(), 8000, Protocol::Tcp);

        assert_eq!(count_but(&[slice([on(HERE, 1), on(HERE, 2)])], &[own]), 1);
        assert_eq!(count_but(&[slice([on(HERE, 1)]).port("https", 8443)], &[own]), 1);
    }
}
