//! Addresses of Services: whether they are local to this machine, by whom, and what a relay has left behind.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::Duration;

use ipnet::IpNet;

use super::duty::Duty;
use super::fact::{Fact, Unreadable};
use super::finding::{Abridged, Finding, Subject};
use crate::config::DEFAULT_ROUTE_PROTOCOL;
use crate::describe::counted;
use crate::guard;
use crate::guard_addresses::GuardAddresses;
use crate::name::Family;
use crate::route_claim::name_of;
use crate::route_socket::RouteSocket;
use crate::vip_routes::LocalRoute;

const SUBJECT: Subject = Subject::VipRoutes;
/// How long a relay may take to say who it is.
const PATIENCE: Duration = Duration::from_millis(300);
/// The longest answer that is read.
const LONGEST_ANSWER: u64 = 200;

#[derive(Debug)]
pub(super) struct Facts {
    /// What is local by the kernel's table, addresses of interfaces among them.
    pub(super) routes: Fact<Vec<LocalRoute>>,
    /// The relay that keeps routes of our number, as it says itself.
    pub(super) holder: Option<String>,
    /// True where this process could change routes.
    pub(super) may_change: Fact<bool>,
    /// True where filters of tc drop what is sent to who listens on all addresses, at each address that is guarded.
    pub(super) has_filters: bool,
}

/// For a number of our routes. Changes none.
pub(super) fn read(protocol: Option<u8>, may_change: Fact<bool>) -> Facts {
    let protocol = protocol.unwrap_or(DEFAULT_ROUTE_PROTOCOL);
    let routes = RouteSocket::open(protocol).and_then(|mut socket| socket.look());
    let routes = routes.map_err(|error| Unreadable::new("rtnetlink", error));
    let mut facts = Facts { routes, holder: holder(&name_of(protocol)).ok(), may_change, has_filters: false };
    facts.has_filters = guard::has_filters(protocol, &facts.guarded_addresses()).unwrap_or(false);
    facts
}

/// Asks who has this claim, without taking it.
fn holder(name: &str) -> io::Result<String> {
    let stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = Vec::new();
    // One that does not say who it is has the claim all the same.
    let _ = stream.take(LONGEST_ANSWER).read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).escape_debug().to_string();
    Ok(if answer.is_empty() { "another process".into() } else { answer })
}

impl Facts {
    /// Networks that others have made local as a whole: not one address, and not loopback.
    pub(super) fn foreign_nets(&self) -> Vec<IpNet> {
        let routes = self.routes.iter().flatten().filter(|route| !route.own && !is_host(&route.net));
        routes.map(|route| route.net).filter(|net| !net.network().is_loopback()).collect()
    }

    /// Addresses that routes with our number make local.
    pub(super) fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.routes.iter().flatten().filter_map(LocalRoute::own_address)
    }

    /// Of these, the ones that a guard would guard.
    pub(super) fn guarded_addresses(&self) -> BTreeSet<IpAddr> {
        let mut addresses = GuardAddresses::default();
        addresses.note_all(self.routes.as_deref().unwrap_or_default());
        addresses.wanted().clone()
    }

    /// True where filters guard, for a relay that makes routes of this number.
    pub(super) fn drops(&self, duty: &Duty) -> bool {
        duty.routes.is_some() && self.has_filters
    }

    pub(super) fn is_local(&self, address: IpAddr) -> bool {
        self.routes.iter().flatten().any(|route| route.net.contains(&address))
    }
}

fn is_host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// `conflicts` get no route, whoever may make some (`neighbours`).
pub(super) fn judge(facts: &Facts, duty: &Duty, conflicts: &BTreeSet<IpAddr>) -> Vec<Finding> {
    if let Err(why) = &facts.routes {
        return vec![Finding::unknown(SUBJECT, why)];
    }
    let mut findings = vec![judge_missing(facts, duty, conflicts)];
    findings.extend(judge_left(facts, duty));
    let foreign = facts.foreign_nets();
    if !foreign.is_empty() {
        let message = format!(
            "{} is local by a route of others: whatever listens on all addresses answers at each of them, also where no Service is",
            Abridged(&foreign)
        );
        let remedy = "leave it to kube-relay, which makes each Service's address local by itself (--vip-routes auto)";
        findings.push(Finding::note(SUBJECT, message).remedy(remedy));
    }
    findings
}

fn judge_missing(facts: &Facts, duty: &Duty, conflicts: &BTreeSet<IpAddr>) -> Finding {
    let vips = duty.vips();
    let missing: Vec<IpAddr> =
        vips.keys().copied().filter(|vip| !facts.is_local(*vip) && !conflicts.contains(vip)).collect();
    let Some(first) = missing.first() else {
        return Finding::ok(
            SUBJECT,
            match vips.len() {
                0 => "no address of a Service has to be made local".to_owned(),
                1 => "1 address of a Service: local".to_owned(),
                count => format!("{count} addresses of Services: local"),
            },
        );
    };
    let these = Abridged(&missing);
    let are = if missing.len() == 1 { "is" } else { "are" };
    let by_hand = format!("`{}`", route_command(*first));
    match (duty.routes, &facts.may_change, duty.running) {
        (None, ..) => {
            let message = format!("{these} {are} not local, and --vip-routes none leaves that to others");
            Finding::error(SUBJECT, message).remedy(format!("{by_hand}, or --vip-routes auto"))
        }
        (Some(_), Ok(false), _) => {
            let message = format!("{these} {are} not local, and {} lacks CAP_NET_ADMIN to make routes", duty.process());
            let remedy =
                "in a pod `capabilities: {add: [NET_ADMIN]}`, with systemd `AmbientCapabilities=CAP_NET_ADMIN`";
            Finding::error(SUBJECT, message).remedy(format!("{remedy}; or yourself {by_hand}"))
        }
        (Some(_), _, Some(running)) => {
            let message = format!("{these} {are} not local, though kube-relay runs (pid {})", running.pid);
            Finding::warning(SUBJECT, message).remedy("`kube-relay status NAMESPACE/NAME` and its log tell why")
        }
        (Some(_), Err(why), None) => Finding::unknown(SUBJECT, why),
        (Some(_), Ok(true), None) => Finding::ok(SUBJECT, format!("kube-relay is to make {these} local, and may")),
    }
}

/// `10.96.0.10/32` for one address; the whole range would be everybody's.
fn route_command(address: IpAddr) -> String {
    let (family, bits) = match Family::of(address) {
        Family::V4 => ("", 32),
        Family::V6 => ("-6 ", 128),
    };
    format!("ip {family}route add local {address}/{bits} dev lo")
}

/// Routes of ours that nobody keeps.
fn judge_left(facts: &Facts, duty: &Duty) -> Option<Finding> {
    let own: Vec<IpAddr> = facts.own_addresses().collect();
    if let Some(holder) = &facts.holder {
        return Some(Finding::ok(SUBJECT, format!("{} kept by {holder}", counted(own.len(), "route"))));
    }
    let vips = duty.vips();
    let left: Vec<IpAddr> = own.into_iter().filter(|address| !vips.contains_key(address)).collect();
    if left.is_empty() {
        return None;
    }
    let message = format!(
        "{} of a kube-relay that runs no more: clients of {} are refused here",
        counted(left.len(), "route"),
        Abridged(&left)
    );
    Some(Finding::warning(SUBJECT, message).remedy(match duty.routes {
        Some(protocol) if protocol != DEFAULT_ROUTE_PROTOCOL => {
            format!("`kube-relay cleanup --route-protocol {protocol}`")
        }
        _ => "`kube-relay cleanup`; or start one, which removes what it has no use for".into(),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::duty::Running;
    use super::super::duty::sample::{duty, unknown};
    use super::super::finding::Grade;
    use super::*;

    fn facts(routes: &[(&str, bool)]) -> Facts {
        let route = |(net, own): &(&str, bool)| LocalRoute { net: net.parse().expect("a network"), own: *own };
        Facts { routes: Ok(routes.iter().map(route).collect()), holder: None, may_change: Ok(true), has_filters: false }
    }

    fn web() -> Duty {
        duty(&["clusterIP 10.96.0.10:80/TCP", "clusterIP [fd96::10]:80/TCP", "clusterIP 127.96.0.1:80/TCP"])
    }

    fn only(facts: &Facts, duty: &Duty) -> Finding {
        let mut found = judge(facts, duty, &BTreeSet::new());
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    #[test]
    fn given_an_address_that_an_interface_has_too_when_asked_what_is_guarded_then_it_is_not() {
        let facts = facts(&[("10.96.0.10/32", true), ("10.96.0.11/32", true), ("10.96.0.11/32", false)]);

        assert_eq!(facts.guarded_addresses(), [IpAddr::from([10, 96, 0, 10])].into());
    }

    #[test]
    fn t236_given_addresses_that_are_nowhere_when_nobody_makes_them_local_then_the_command_is_told() {
        let by_others = Duty { routes: None, ..web() };
        let forbidden = Facts { may_change: Ok(false), ..facts(&[]) };

        let none = only(&facts(&[]), &by_others);
        let lacks = only(&forbidden, &web());

        assert_eq!((none.grade, lacks.grade), (Grade::Error, Grade::Error));
        assert!(none.message.starts_with("10.96.0.10, fd96::10 are not local, and --vip-routes none"), "{none:?}");
        assert!(lacks.message.contains("lacks CAP_NET_ADMIN"), "{lacks:?}");
        let remedy = lacks.remedy.expect("a remedy");
        assert!(remedy.ends_with("`ip route add local 10.96.0.10/32 dev lo`"), "{remedy}");
        let six = duty(&["clusterIP [fd96::10]:80/TCP"]);
        let remedy = only(&forbidden, &six).remedy.expect("a remedy");
        assert!(remedy.contains("`ip -6 route add local fd96::10/128 dev lo`"), "{remedy}");
    }

    #[test]
    fn t236_given_addresses_that_are_nowhere_when_a_relay_may_make_them_local_then_it_is_fine_unless_one_runs() {
        assert_eq!(only(&facts(&[]), &web()).grade, Grade::Ok);

        let running = Duty { running: Some(Running { pid: 7, visible: true }), ..web() };

        assert_eq!(only(&facts(&[]), &running).grade, Grade::Warning);
    }

    #[test]
    fn given_addresses_that_are_local_when_judged_then_it_does_not_matter_by_whom() {
        let routes = [("10.96.0.10/32", true), ("fd96::10/128", false), ("127.0.0.0/8", false)];

        let found = only(&facts(&routes), &Duty { routes: None, ..web() });

        assert_eq!((found.grade, found.message.as_str()), (Grade::Ok, "2 addresses of Services: local"));
    }

    #[test]
    fn given_an_address_that_neighbours_conflict_about_when_judged_then_it_is_not_told_twice() {
        let balancer = Duty { routes: None, ..duty(&["loadBalancerIP 203.0.113.7:80/TCP"]) };

        let found = judge(&facts(&[]), &balancer, &[[203, 0, 113, 7].into()].into());

        assert_eq!(found[0].grade, Grade::Ok);
    }

    #[test]
    fn given_a_whole_range_of_others_when_judged_then_its_trap_is_told() {
        let facts = facts(&[("10.96.0.0/12", false), ("127.0.0.0/8", false), ("192.0.2.5/32", false)]);

        let found = judge(&facts, &unknown(), &BTreeSet::new());

        assert_eq!(found[1].grade, Grade::Note);
        assert!(found[1].message.starts_with("10.96.0.0/12 is local by a route of others"), "{found:?}");
    }

    #[test]
    fn given_routes_of_ours_when_nobody_keeps_them_then_those_without_a_service_are_left_over() {
        let facts = facts(&[("10.96.0.10/32", true), ("10.96.0.77/32", true), ("fd96::10/128", true)]);

        let found = judge(&facts, &web(), &BTreeSet::new());
        let kept = judge(&Facts { holder: Some("kube-relay with pid 7".into()), ..facts }, &web(), &BTreeSet::new());

        assert_eq!(found[1].grade, Grade::Warning);
        assert!(found[1].message.contains("clients of 10.96.0.77 are refused"), "{found:?}");
        assert_eq!((kept[1].grade, kept[1].message.as_str()), (Grade::Ok, "3 routes kept by kube-relay with pid 7"));
    }

    #[test]
    fn given_nobody_with_a_claim_when_asked_then_there_is_no_holder() {
        let name = format!("kube-relay/test/{}/doctor", std::process::id());

        assert!(holder(&name).is_err());
    }
}
