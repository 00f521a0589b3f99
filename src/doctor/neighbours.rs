//! Whether this machine would answer ARP for addresses that others may answer for as well.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::duty::Duty;
use super::fact::{Fact, Unreadable};
use super::finding::{Finding, Subject};
use super::routes;
use crate::arp;
use crate::host::Host;

const SUBJECT: Subject = Subject::Arp;

#[derive(Debug)]
pub(super) struct Facts {
    /// Interfaces and their networks.
    pub(super) host: Fact<Host>,
    /// The setting that holds for each interface.
    pub(super) arp_ignore: BTreeMap<String, i32>,
}

pub(super) async fn read() -> Facts {
    let host = Host::read().await.map_err(|error| Unreadable::new("the addresses of this machine", error));
    let interfaces: BTreeSet<String> =
        host.iter().flat_map(|host| &host.interfaces).map(|found| found.interface.clone()).collect();
    let setting = |interface: String| {
        let ignore = arp::arp_ignore(&interface);
        (interface, ignore)
    };
    Facts { host, arp_ignore: interfaces.into_iter().map(setting).collect() }
}

impl Facts {
    /// The interface on which neighbours would be answered for an address.
    fn conflict(&self, address: IpAddr) -> Option<String> {
        let ignore = |interface: &str| self.arp_ignore.get(interface).copied().unwrap_or(0);
        arp::conflict(address, self.host.as_ref().ok()?, ignore)
    }

    /// Addresses that get no route for that.
    pub(super) fn conflicts(&self, duty: &Duty) -> BTreeSet<IpAddr> {
        let announced = duty.vips().into_iter().filter(|(_, announced)| *announced).map(|(address, _)| address);
        announced.filter(|address| self.conflict(*address).is_some()).collect()
    }
}

pub(super) fn judge(facts: &Facts, duty: &Duty, routes: &routes::Facts) -> Vec<Finding> {
    if let Err(why) = &facts.host {
        return vec![Finding::unknown(SUBJECT, why)];
    }
    let conflicts = facts.conflicts(duty);
    if conflicts.is_empty() {
        return vec![Finding::ok(SUBJECT, "neighbours are answered for no address of a Service")];
    }
    let told = conflicts.into_iter().filter_map(|address| {
        let interface = facts.conflict(address)?;
        let remedy = arp::remedy(&interface);
        Some(match routes.is_local(address) {
            true => Finding::warning(
                SUBJECT,
                format!("{address} is local, and this machine answers ARP for it on {interface}, as others may, too"),
            ),
            false => Finding::error(
                SUBJECT,
                format!("{address} gets no route: this machine would answer ARP for it on {interface}, as each node that serves it"),
            ),
        }
        .remedy(remedy))
    });
    told.collect()
}

#[cfg(test)]
mod tests {
    use super::super::duty::sample::duty;
    use super::super::finding::Grade;
    use super::*;
    use crate::host::InterfaceAddress;
    use crate::vip_routes::LocalRoute;

    fn facts(arp_ignore: i32) -> Facts {
        let address = InterfaceAddress { interface: "eth0".into(), address: [203, 0, 113, 5].into(), prefix: 24 };
        let host = Host { interfaces: vec![address], default_sources: vec![] };
        Facts { host: Ok(host), arp_ignore: [("eth0".to_owned(), arp_ignore)].into() }
    }

    fn routes(local: &[&str]) -> routes::Facts {
        let route = |net: &&str| LocalRoute { net: net.parse().expect("a network"), own: false };
        routes::Facts { routes: Ok(local.iter().map(route).collect()), holder: None, may_change: Ok(true) }
    }

    #[test]
    fn given_a_balancers_address_among_neighbours_when_judged_then_the_setting_is_told() {
        let balancer = duty(&["loadBalancerIP 203.0.113.7:80/TCP", "clusterIP 203.0.113.8:80/TCP"]);

        let found = judge(&facts(0), &balancer, &routes(&[]));

        assert_eq!(found.len(), 1, "a cluster IP is nobody's neighbour: {found:?}");
        assert_eq!(found[0].grade, Grade::Error);
        assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("net.ipv4.conf.eth0.arp_ignore=1")));
        assert_eq!(judge(&facts(0), &balancer, &routes(&["203.0.113.7/32"]))[0].grade, Grade::Warning);
        assert_eq!(judge(&facts(1), &balancer, &routes(&[]))[0].grade, Grade::Ok);
    }

    #[test]
    fn given_addresses_that_cannot_be_read_when_judged_then_that_is_said() {
        let facts = Facts { host: Err(Unreadable::new("x", "y")), arp_ignore: BTreeMap::new() };

        assert_eq!(judge(&facts, &duty(&[]), &routes(&[]))[0].grade, Grade::Note);
    }
}
