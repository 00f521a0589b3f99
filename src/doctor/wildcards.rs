//! Programs that listen on all addresses: they answer at addresses of Services, too, and keep their ports from being bound.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::duty::Duty;
use super::fact::{Fact, Unreadable};
use super::finding::{Abridged, Finding, Subject};
use crate::name::{Family, ListenKey, Protocol};
use crate::wildcard::{SocketOwner, WildcardListener, wildcard_listeners};

const SUBJECT: Subject = Subject::WildcardListeners;

/// Also whose they are, as far as this process may know that.
pub(super) fn read() -> Fact<Vec<WildcardListener>> {
    wildcard_listeners().map_err(|error| Unreadable::new("the sockets of this machine", error))
}

/// What decides which of them matter.
#[derive(Debug, Default)]
pub(super) struct Circumstances {
    /// Networks that others have made local as a whole.
    pub(super) foreign_nets: Vec<IpNet>,
    /// What guards, with its verb; `None` where nothing does as yet.
    pub(super) by: Option<&'static str>,
    /// Addresses of Services at which it refuses or drops what is for who is not bound there.
    pub(super) guarded: BTreeSet<IpAddr>,
    /// Addresses at which such a table may be: nobody may tell us.
    pub(super) perhaps_guarded: BTreeSet<IpAddr>,
    /// Ports that clients' own sockets have.
    pub(super) sources: BTreeSet<u16>,
}

pub(super) fn judge(
    listeners: &Fact<Vec<WildcardListener>>,
    duty: &Duty,
    circumstances: &Circumstances,
) -> Vec<Finding> {
    let listeners = match listeners {
        Ok(listeners) => listeners,
        Err(why) => return vec![Finding::unknown(SUBJECT, why)],
    };
    // A client that waits for its answer takes nothing else.
    let is_client = |listener: &WildcardListener| {
        listener.protocol == Protocol::Udp && circumstances.sources.contains(&listener.port)
    };
    let servers: Vec<&WildcardListener> = listeners.iter().filter(|listener| !is_client(listener)).collect();
    let mut findings: Vec<Finding> = judge_ports(&servers, duty).into_iter().collect();
    findings.extend(judge_reach(&servers, duty, circumstances));
    if findings.is_empty() {
        let by = circumstances.by.filter(|_| !servers.is_empty());
        let why = by.map(|by| format!(": {by} what is for who listens on all addresses")).unwrap_or_default();
        findings.push(Finding::ok(SUBJECT, format!("nobody else answers at addresses of Services{why}")));
    }
    findings
}

/// Ports that a listener of ours wants. A relay that runs has bound its own, or tells of it in its status.
fn judge_ports(servers: &[&WildcardListener], duty: &Duty) -> Option<Finding> {
    if duty.running.is_some() {
        return None;
    }
    let held = |key: &ListenKey| {
        let family = Family::of(key.ip());
        servers
            .iter()
            .find(|server| (server.protocol, server.port, server.family) == (key.protocol, key.port(), family))
    };
    let lost = duty.keys(|key, _| held(key).is_some());
    let first = held(lost.first()?)?;
    let message = format!("{} cannot be bound: {} has the port on all addresses", Abridged(&lost), Named::of(first));
    let remedy = "have that program listen on the node's own addresses, or give the Service another port";
    Some(Finding::error(SUBJECT, message).remedy(remedy))
}

fn judge_reach(servers: &[&WildcardListener], duty: &Duty, circumstances: &Circumstances) -> Vec<Finding> {
    let Circumstances { foreign_nets, guarded, perhaps_guarded, .. } = circumstances;
    let vips = duty.vips().into_keys().filter(|vip| !guarded.contains(vip));
    let (unsure, open): (Vec<IpAddr>, Vec<IpAddr>) = vips.partition(|vip| perhaps_guarded.contains(vip));
    let reached = reach(servers, &open, foreign_nets).map(|answers| {
        let remedy = "have each listen on the node's own addresses: `ListenAddress` of sshd, `address` in the kubelet's configuration; --vip-guard auto keeps them from answering at addresses that our routes make local, with CAP_NET_ADMIN and either nf_tables (it refuses) or cls_bpf and sch_ingress (filters of tc drop)";
        Finding::warning(SUBJECT, format!("{answers} as well")).remedy(remedy)
    });
    let unsure = reach(servers, &unsure, &[]).map(|answers| {
        let message =
            format!("{answers} as well, unless kube-relay's rules refuse that: not known whether they are refused");
        Finding::note(SUBJECT, message)
            .remedy("CAP_NET_ADMIN for `kube-relay doctor`, which reads the rules of nftables then")
    });
    reached.into_iter().chain(unsure).collect()
}

/// Who answers at these, in a sentence: `sshd (pid 712) at 22/TCP answers at 10.96.0.1 of a Service`.
fn reach(servers: &[&WildcardListener], vips: &[IpAddr], nets: &[IpNet]) -> Option<String> {
    let reached = |family| {
        let is_of = |address: &IpAddr| Family::of(*address) == family;
        vips.iter().any(is_of) || nets.iter().any(|net| is_of(&net.addr()))
    };
    let (v4, v6) = (reached(Family::V4), reached(Family::V6));
    let there = servers.iter().filter(|server| if server.family == Family::V4 { v4 } else { v6 });
    let named: BTreeMap<(Protocol, u16), Named<'_>> =
        there.map(|server| ((server.protocol, server.port), Named::of(server))).collect();
    if named.is_empty() {
        return None;
    }
    let named: Vec<_> = named.into_values().collect();
    let there = match vips {
        [] => format!("each address of {}", Abridged(nets)),
        [one] => format!("{one} of a Service"),
        vips => format!("{} addresses of Services", vips.len()),
    };
    let answer = if named.len() == 1 { "answers" } else { "answer" };
    Some(format!("{} {answer} at {there}", Abridged(&named)))
}

/// `sshd (pid 712) at 22/TCP`.
struct Named<'a> {
    process: Option<&'a SocketOwner>,
    port: u16,
    protocol: Protocol,
}

impl<'a> Named<'a> {
    fn of(listener: &'a WildcardListener) -> Self {
        Self { process: listener.process.as_ref(), port: listener.port, protocol: listener.protocol }
    }
}

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.process {
            Some(SocketOwner { pid, name }) => write!(f, "{} (pid {pid})", name.escape_debug())?,
            None => f.write_str("somebody")?,
        }
        write!(f, " at {}/{}", self.port, self.protocol)
    }
}

#[cfg(test)]
mod tests {
    use super::super::duty::Running;
    use super::super::duty::sample::{duty, unknown};
    use super::super::finding::Grade;
    use super::*;

    fn listener(protocol: Protocol, port: u16, family: Family, name: &str) -> WildcardListener {
        let process = (!name.is_empty()).then(|| SocketOwner { pid: 712, name: name.into() });
        WildcardListener { protocol, port, family, process }
    }

    fn machine() -> Fact<Vec<WildcardListener>> {
        Ok(vec![
            listener(Protocol::Tcp, 22, Family::V4, "sshd"),
            listener(Protocol::Tcp, 22, Family::V6, "sshd"),
            listener(Protocol::Tcp, 10_250, Family::V6, ""),
            listener(Protocol::Udp, 40_000, Family::V4, "resolver"),
        ])
    }

    fn judged(duty: &Duty, nets: &[&str]) -> Vec<Finding> {
        let foreign_nets = nets.iter().map(|net| net.parse().expect("a network")).collect();
        let sources = (32_768..=60_999).collect();
        judge(&machine(), duty, &Circumstances { foreign_nets, sources, ..Circumstances::default() })
    }

    #[test]
    fn given_addresses_that_are_guarded_when_judged_then_the_others_alone_are_reached() {
        let services = duty(&["clusterIP 10.96.0.1:80/TCP", "clusterIP 10.96.0.2:80/TCP"]);
        let judged = |guarded: &[[u8; 4]]| {
            let guarded = guarded.iter().map(|ip| IpAddr::from(*ip)).collect();
            judge(&machine(), &services, &Circumstances { guarded, ..Circumstances::default() }).remove(0)
        };

        assert_eq!(judged(&[[10, 96, 0, 1], [10, 96, 0, 2]]).grade, Grade::Ok);
        assert!(judged(&[[10, 96, 0, 1]]).message.ends_with("at 10.96.0.2 of a Service as well"));
    }

    #[test]
    fn given_rules_that_cannot_be_read_when_judged_then_what_they_may_refuse_is_a_note() {
        let services = duty(&["clusterIP 10.96.0.1:80/TCP", "clusterIP 10.96.0.2:80/TCP"]);
        let judged = |perhaps: &[[u8; 4]]| {
            let perhaps_guarded = perhaps.iter().map(|ip| IpAddr::from(*ip)).collect();
            judge(&machine(), &services, &Circumstances { perhaps_guarded, ..Circumstances::default() })
        };

        let (all, one) = (judged(&[[10, 96, 0, 1], [10, 96, 0, 2]]), judged(&[[10, 96, 0, 1]]));

        assert_eq!((all.len(), all[0].grade), (1, Grade::Note), "{all:?}");
        assert!(all[0].message.ends_with("not known whether they are refused"), "{all:?}");
        assert_eq!((one.len(), one[0].grade, one[1].grade), (2, Grade::Warning, Grade::Note));
        assert!(one[0].message.ends_with("at 10.96.0.2 of a Service as well"), "{one:?}");
    }

    #[test]
    fn t236_given_addresses_of_services_when_sshd_listens_everywhere_then_it_is_named_once() {
        let found = judged(&duty(&["clusterIP 10.96.0.1:80/TCP", "clusterIP [fd96::1]:80/TCP"]), &[]);

        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].grade, Grade::Warning);
        let told = "sshd (pid 712) at 22/TCP, somebody at 10250/TCP answer at 2 addresses of Services as well";
        assert_eq!(found[0].message, told);
    }

    #[test]
    fn t236_given_a_whole_range_that_is_local_when_services_are_unknown_then_the_range_is_named() {
        let found = judged(&unknown(), &["10.96.0.0/12"]);

        let told = "sshd (pid 712) at 22/TCP answers at each address of 10.96.0.0/12 as well";
        assert_eq!(found[0].message, told);
    }

    #[test]
    fn t236_given_addresses_of_loopback_alone_when_judged_then_nobody_reaches_more_than_before() {
        assert_eq!(judged(&duty(&["clusterIP 127.96.0.1:80/TCP"]), &[])[0].grade, Grade::Ok);
        assert_eq!(judged(&unknown(), &[])[0].grade, Grade::Ok);
    }

    #[test]
    fn given_a_wildcard_on_a_services_port_when_judged_then_that_listener_cannot_be_bound() {
        let services = duty(&["clusterIP 127.96.0.1:22/TCP", "clusterIP 127.96.0.1:22/UDP"]);

        let found = judged(&services, &[]);

        assert_eq!(found[0].grade, Grade::Error);
        let told = "127.96.0.1:22/TCP cannot be bound: sshd (pid 712) at 22/TCP has the port on all addresses";
        assert_eq!(found[0].message, told);
        let running = Duty { running: Some(Running { pid: 7, visible: true }), ..services };
        assert_eq!(judged(&running, &[])[0].grade, Grade::Ok, "its status tells what it could not bind");
    }

    #[test]
    fn given_sockets_that_cannot_be_read_when_judged_then_that_is_said() {
        let unread = Err(Unreadable::new("x", "y"));

        assert_eq!(judge(&unread, &unknown(), &Circumstances::default())[0].grade, Grade::Note);
    }
}
