//! Who may reach the load-balancer addresses of a Service.
//!
//! Only the question of who is allowed is answered here; how others are kept out is up to `serve`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::layout::ListenerKind;
use crate::model::Service;
use crate::name::Family;

/// The `spec.loadBalancerSourceRanges` of a Service, seen from this node.
pub(crate) struct SourceRanges<'a> {
    /// Whose ranges they are.
    pub(crate) service: &'a Service,
    /// The addresses that this node is reached at.
    pub(crate) node_addresses: &'a [IpAddr],
}

impl SourceRanges<'_> {
    /// The sources that are let in at an address; empty lets everybody in.
    ///
    /// A list without a range of the address's family says nothing about that family. What is not a
    /// load-balancer address is open, whatever the ranges say, and so are node ports on it; one that is an external
    /// IP, too, is not.
    pub(crate) fn at(&self, listen: IpAddr, kind: ListenerKind) -> Arc<[IpNet]> {
        if !self.are_asked(listen, kind) {
            return Arc::default();
        }
        let mut ranges = self.of_family(Family::of(listen));
        if self.node_addresses.iter().any(|own| ranges.iter().any(|net| net.contains(own))) {
            // The source of a program on this node that connects to it; with IPv6, where the address is local by a
            // route alone, that is ::1.
            ranges.push(listen.into());
            ranges.extend(listen.is_ipv6().then(|| IpNet::from(IpAddr::from(Ipv6Addr::LOCALHOST))));
        }
        IpNet::aggregate(&ranges).into()
    }

    /// The same where balancers in front tell who a client is: it may be of the other family than the address.
    pub(crate) fn behind_balancers(&self, listen: IpAddr, kind: ListenerKind) -> Arc<[IpNet]> {
        let other = match Family::of(listen) {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        };
        let of_own = self.at(listen, kind);
        let of_other = if self.are_asked(listen, kind) { IpNet::aggregate(&self.of_family(other)) } else { vec![] };
        if of_own.is_empty() && of_other.is_empty() {
            return Arc::default();
        }
        // Of a family that no range is of, everybody: as at an address of that family.
        let or_all = |nets: Vec<IpNet>, family| if nets.is_empty() { vec![everybody(family)] } else { nets };
        [or_all(of_own.to_vec(), Family::of(listen)), or_all(of_other, other)].concat().into()
    }

    fn are_asked(&self, listen: IpAddr, kind: ListenerKind) -> bool {
        kind != ListenerKind::NodePort && self.service.load_balancer_ips.contains(&listen)
    }

    fn of_family(&self, family: Family) -> Vec<IpNet> {
        let of_family = |net: &&IpNet| Family::of(net.addr()) == family;
        self.service.source_ranges.iter().filter(of_family).copied().collect()
    }
}

fn everybody(family: Family) -> IpNet {
    match family {
        Family::V4 => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
        Family::V6 => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// The ranges at an address of a balancer that has `198.51.100.1` and `2001:db8:1::1`, on node `192.0.2.1`.
    fn allowed(ranges: &[&str], listen: &str) -> Vec<String> {
        allowed_at(ranges, listen, ListenerKind::LoadBalancerIp)
    }

    fn allowed_at(ranges: &[&str], listen: &str, kind: ListenerKind) -> Vec<String> {
        let service = Service {
            load_balancer_ips: vec![ip("198.51.100.1"), ip("2001:db8:1::1")].into(),
            external_ips: vec![ip("203.0.113.1"), ip("198.51.100.1")].into(),
            source_ranges: ranges.iter().map(|net| net.parse().expect("a net")).collect(),
            ..Service::new("default/web").cluster_ip([10, 96, 0, 10])
        };
        let ranges = SourceRanges { service: &service, node_addresses: &[ip("192.0.2.1"), ip("2001:db8:2::1")] };
        ranges.at(ip(listen), kind).iter().map(IpNet::to_string).collect()
    }

    #[test]
    fn t024_given_ranges_of_both_families_when_asked_then_each_address_has_those_of_its_own() {
        let both = ["203.0.113.0/25", "2001:db8::/64"];

        assert_eq!(allowed(&both, "198.51.100.1"), ["203.0.113.0/25"]);
        assert_eq!(allowed(&both, "2001:db8:1::1"), ["2001:db8::/64"]);
        assert_eq!(allowed(&both[..1], "2001:db8:1::1"), [] as [&str; 0], "nothing is said about IPv6");
    }

    #[test]
    fn t108_t109_given_ranges_when_asked_for_other_addresses_then_everybody_is_let_in() {
        for other in ["10.96.0.10", "192.0.2.1", "203.0.113.1"] {
            assert_eq!(allowed(&["10.0.0.0/24"], other), [] as [&str; 0]);
        }
        assert_eq!(allowed_at(&["10.0.0.0/24"], "198.51.100.1", ListenerKind::NodePort), [] as [&str; 0]);
    }

    #[test]
    fn t110_given_a_range_with_the_node_when_asked_then_the_address_itself_is_a_source_too() {
        assert_eq!(allowed(&["192.0.2.0/24"], "198.51.100.1"), ["192.0.2.0/24", "198.51.100.1/32"]);
        assert_eq!(allowed(&["192.0.2.128/25"], "198.51.100.1"), ["192.0.2.128/25"]);
        let with_loopback = ["::1/128", "2001:db8:1::1/128", "2001:db8:2::/64"];
        assert_eq!(allowed(&["2001:db8:2::/64"], "2001:db8:1::1"), with_loopback);
    }

    #[test]
    fn given_balancers_in_front_when_asked_then_clients_of_both_families_are_judged_as_at_their_own_addresses() {
        let behind = |ranges: &[&str], listen: &str| {
            let service = Service {
                load_balancer_ips: vec![ip("198.51.100.1")].into(),
                source_ranges: ranges.iter().map(|net| net.parse().expect("a net")).collect(),
                ..Service::new("default/web")
            };
            let ranges = SourceRanges { service: &service, node_addresses: &[] };
            let nets = ranges.behind_balancers(ip(listen), ListenerKind::LoadBalancerIp);
            nets.iter().map(IpNet::to_string).collect::<Vec<_>>()
        };

        let both = ["203.0.113.0/25", "2001:db8::/64"];
        assert_eq!(behind(&both, "198.51.100.1"), both);
        assert_eq!(behind(&both[1..], "198.51.100.1"), ["0.0.0.0/0", "2001:db8::/64"]);
        assert_eq!(behind(&both[..1], "198.51.100.1"), ["203.0.113.0/25", "::/0"]);
        assert_eq!(behind(&[], "198.51.100.1"), [] as [&str; 0]);
        assert_eq!(behind(&both, "10.96.0.10"), [] as [&str; 0]);
    }

    #[test]
    fn given_ranges_that_overlap_when_asked_then_the_wider_one_is_left() {
        assert_eq!(allowed(&["10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8"], "198.51.100.1"), ["10.0.0.0/8"]);
    }
}
