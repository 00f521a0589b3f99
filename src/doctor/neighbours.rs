//! Whether this machine would answer ARP for addresses that others may answer for as well.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::duty::Duty;
use super::fact::{Fact, Unreadable};
use super::finding::{Finding, Subject};
use super::routes;
use crate::arp;
use crate::host::Host;
use crate::sysctl::Sysctl;

const SUBJECT: Subject = Subject::Arp;

#[derive(Debug)]
pub(super) struct Facts {
    /// Interfaces and their networks.
    pub(super) host: Fact<Host>,
    /// The setting that holds for each interface.
    pub(super) arp_ignore: BTreeMap<String, i32>,
    /// Interfaces where this process could set what `--tune-sysctls` sets.
    pub(super) tunable: BTreeSet<String>,
}

pub(super) async fn read() -> Facts {
    let host = Host::read().await.map_err(|error| Unreadable::new("the addresses of this machine", error));
    let interfaces: BTreeSet<String> =
        host.iter().flat_map(|host| &host.interfaces).map(|found| found.interface.clone()).collect();
    let may_set = |interface: &str| {
        [arp::IGNORE, arp::ANNOUNCE].iter().all(|setting| Sysctl::of_interface(interface, setting).may_set())
    };
    let tunable = interfaces.iter().filter(|interface| may_set(interface)).cloned().collect();
    let setting = |interface: String| {
        let ignore = arp::arp_ignore(&interface);
        (interface, ignore)
    };
    Facts { host, arp_ignore: interfaces.into_iter().map(setting).collect(), tunable }
}

impl Facts {
    /// The interface on which neighbours would be answered for an address.
    fn conflict(&self, address: IpAddr) -> Option<String> {
        let ignore = |interface: &str| self.arp_ignore.get(interface).copied().unwrap_or(0);
        arp::conflict(address, self.host.as_ref().ok()?, ignore)
    }

    /// True where a relay that is about to start sets what keeps an interface quiet before it makes an address local.
    fn is_to_be_tuned(&self, interface: &str, duty: &Duty, routes: &routes::Facts) -> bool {
        let begins = duty.tunes && duty.running.is_none() && routes.may_change == Ok(true);
        begins && self.tunable.contains(interface)
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
        let is_local = routes.is_local(address);
        if !is_local && facts.is_to_be_tuned(&interface, duty, routes) {
            let message = format!("{address} is of a network on {interface}, which kube-relay will tune not to answer ARP for it (--tune-sysctls), and then make it local");
            return Some(Finding::note(SUBJECT, message));
        }
        Some(match is_local {
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
    use super::super::duty::Running;
    use super::super::duty::sample::duty;
    use super::super::finding::Grade;
    use super::*;
    use crate::host::InterfaceAddress;
    use crate::vip_routes::LocalRoute;

    fn facts(arp_ignore: i32) -> Facts {
        let address = InterfaceAddress { interface: "eth0".into(), address: [203, 0, 113, 5].into(), prefix: 24 };
        let host = Host { interfaces: vec![address], default_sources: vec![] };
        let eth0 = || "eth0".to_owned();
        Facts { host: Ok(host), arp_ignore: [(eth0(), arp_ignore)].into(), tunable: [eth0()].into() }
    }

    fn routes(local: &[&str]) -> routes::Facts {
        let route = |net: &&str| LocalRoute { net: net.parse().expect("a network"), own: false };
        routes::Facts {
            routes: Ok(local.iter().map(route).collect()),
            holder: None,
            may_change: Ok(true),
            has_filters: false,
        }
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
    fn given_a_relay_that_tunes_when_it_may_and_is_to_begin_then_the_setting_is_left_to_it() {
        let tunes = || Duty { tunes: true, ..duty(&["loadBalancerIP 203.0.113.7:80/TCP"]) };
        let running = Duty { running: Some(Running { pid: 7, visible: true }), ..tunes() };
        let read_only = Facts { tunable: BTreeSet::new(), ..facts(0) };
        let no_rights = routes::Facts { may_change: Ok(false), ..routes(&[]) };
        let grade = |facts: &Facts, duty: &Duty, routes: &routes::Facts| judge(facts, duty, routes)[0].grade;

        let found = &judge(&facts(0), &tunes(), &routes(&[]))[0];

        assert_eq!(found.grade, Grade::Note);
        assert!(found.message.contains("will tune"), "{found:?}");
        assert_eq!(grade(&read_only, &tunes(), &routes(&[])), Grade::Error, "a container's /proc/sys");
        assert_eq!(grade(&facts(0), &tunes(), &no_rights), Grade::Error);
        assert_eq!(grade(&facts(0), &running, &routes(&[])), Grade::Error, "it would have done so");
        assert_eq!(grade(&facts(0), &tunes(), &routes(&["203.0.113.7/32"])), Grade::Warning, "local already");
    }

    #[test]
    fn given_addresses_that_cannot_be_read_when_judged_then_that_is_said() {
        let facts =
            Facts { host: Err(Unreadable::new("x", "y")), arp_ignore: BTreeMap::new(), tunable: BTreeSet::new() };

        assert_eq!(judge(&facts, &duty(&[]), &routes(&[]))[0].grade, Grade::Note);
    }
}
