//! Capabilities: one for ports below 1024, one for routes. Which of them matter depends on what is to be served.

use std::ops::RangeInclusive;

use super::duty::Duty;
use super::fact::{Fact, Unreadable, file, sysctl};
use super::finding::{Abridged, Finding, Subject};
use crate::describe::counted;

const SUBJECT: Subject = Subject::Capabilities;

/// A process's capabilities, as far as a relay has use for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rights {
    /// CAP_NET_BIND_SERVICE: ports below 1024.
    pub(super) low_ports: bool,
    /// CAP_NET_ADMIN: routes.
    pub(super) routes: bool,
}

#[derive(Debug)]
pub(super) struct Facts {
    pub(super) rights: Fact<Rights>,
    /// `net.ipv4.ip_unprivileged_port_start`: from here on everybody may bind.
    pub(super) first_free_port: Fact<Option<u16>>,
}

/// Of the process with this folder below `/proc`.
pub(super) fn read(process_folder: &str) -> Facts {
    let path = format!("{process_folder}/status");
    let missing = |what: &str| Unreadable::new(&path, what);
    let rights = file(&path).and_then(|text| {
        let text = text.ok_or_else(|| missing("there is no such process"))?;
        rights(&text).ok_or_else(|| missing("it has no line CapEff"))
    });
    Facts { rights, first_free_port: sysctl("net.ipv4.ip_unprivileged_port_start") }
}

/// From `/proc/PID/status`.
fn rights(status: &str) -> Option<Rights> {
    const NET_BIND_SERVICE: u64 = 1 << 10;
    const NET_ADMIN: u64 = 1 << 12;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(effective.trim(), 16).ok()?;
    Some(Rights { low_ports: effective & NET_BIND_SERVICE != 0, routes: effective & NET_ADMIN != 0 })
}

/// What is missing of routes is told with the addresses that want them (`routes`).
pub(super) fn judge(facts: &Facts, duty: &Duty) -> Vec<Finding> {
    if let Some(why) = duty.out_of_sight() {
        return vec![Finding::unknown(SUBJECT, &why)];
    }
    let rights = match &facts.rights {
        Ok(rights) => rights,
        Err(why) => return vec![Finding::unknown(SUBJECT, why)],
    };
    let first_free = match &facts.first_free_port {
        Ok(port) => port.unwrap_or(1024),
        Err(why) => return vec![Finding::unknown(SUBJECT, why)],
    };
    let low = duty.keys(|key, _| key.port() < first_free);
    let mut findings = Vec::new();
    if let Some(lowest) = low.iter().map(|key| key.port()).min().filter(|_| !rights.low_ports) {
        let (count, takes) = (counted(low.len(), "listener"), if low.len() == 1 { "takes" } else { "take" });
        let (these, process) = (Abridged(&low), duty.process());
        let message =
            format!("{count} below port {first_free} ({these}) {takes} CAP_NET_BIND_SERVICE, which {process} lacks");
        findings.push(Finding::error(SUBJECT, message).remedy(format!(
            "`setcap cap_net_bind_service=ep kube-relay`; in a pod `capabilities: {{add: [NET_BIND_SERVICE]}}`; \
             or for everybody `sysctl -w net.ipv4.ip_unprivileged_port_start={lowest}`"
        )));
    }
    if !duty.is_known()
        && let Some(lacks) = lacking(rights, 0..=first_free.saturating_sub(1))
    {
        findings.push(Finding::note(SUBJECT, format!("{} lacks {lacks}", duty.process())));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(SUBJECT, format!("{} has what its listeners take", duty.process())));
    }
    findings
}

/// What cannot be done, where nobody has said that it is to be done.
fn lacking(rights: &Rights, low_ports: RangeInclusive<u16>) -> Option<String> {
    let ports = format!("CAP_NET_BIND_SERVICE, for ports up to {}", low_ports.end());
    let routes = "CAP_NET_ADMIN, for routes that make addresses of Services local";
    match (rights.low_ports || low_ports.is_empty() || *low_ports.end() == 0, rights.routes) {
        (true, true) => None,
        (false, true) => Some(ports),
        (true, false) => Some(routes.into()),
        (false, false) => Some(format!("{ports}, and {routes}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::duty::Running;
    use super::super::duty::sample::{duty, unknown};
    use super::super::finding::Grade;
    use super::*;

    fn judged(rights: Rights, first_free: u16, duty: &Duty) -> Finding {
        let facts = Facts { rights: Ok(rights), first_free_port: Ok(Some(first_free)) };
        judge(&facts, duty).pop().expect("one finding")
    }

    const NONE: Rights = Rights { low_ports: false, routes: false };

    #[test]
    fn t235_given_a_low_port_without_the_capability_when_judged_then_port_and_both_ways_out_are_named() {
        let duty = duty(&["clusterIP 127.96.0.1:80/TCP", "clusterIP 127.96.0.1:8080/TCP"]);

        let found = judged(NONE, 1024, &duty);

        assert_eq!(found.grade, Grade::Error);
        assert!(
            found.message.starts_with("1 listener below port 1024 (127.96.0.1:80/TCP) takes "),
            "{}",
            found.message
        );
        let remedy = found.remedy.expect("a remedy");
        assert!(remedy.contains("ip_unprivileged_port_start=80`") && remedy.contains("NET_BIND_SERVICE"), "{remedy}");
        assert_eq!(judged(NONE, 80, &duty).grade, Grade::Ok, "everybody may bind it");
        assert_eq!(judged(Rights { low_ports: true, ..NONE }, 1024, &duty).grade, Grade::Ok);
    }

    #[test]
    fn given_unknown_services_when_judged_then_what_is_lacking_is_a_note() {
        let found = judged(NONE, 1024, &unknown());

        assert_eq!(found.grade, Grade::Note);
        assert!(found.message.contains("ports up to 1023, and CAP_NET_ADMIN"), "{}", found.message);
        assert_eq!(judged(Rights { low_ports: true, routes: true }, 1024, &unknown()).grade, Grade::Ok);
        assert!(!judged(NONE, 0, &unknown()).message.contains("BIND"), "there are no low ports");
    }

    #[test]
    fn given_a_relay_that_is_not_seen_when_judged_then_our_own_rights_are_not_taken_for_its() {
        let hidden = Running { pid: 1, visible: false };
        let pod = Duty { running: Some(hidden), ..duty(&["clusterIP 10.96.0.1:80/TCP"]) };

        let found = judged(NONE, 1024, &pod);

        assert_eq!(found.grade, Grade::Note);
        assert!(found.message.starts_with("not known: the running kube-relay (pid 1 where it runs)"), "{found:?}");
    }

    #[test]
    fn given_a_status_file_when_read_then_the_two_capabilities_are_told_apart() {
        let of = |effective: &str| rights(&format!("Name:\tx\nCapEff:\t{effective}\nCapBnd:\t0\n"));

        assert_eq!(of("0000000000000400"), Some(Rights { low_ports: true, routes: false }));
        assert_eq!(of("0000000000001000"), Some(Rights { low_ports: false, routes: true }));
        assert_eq!(of("x"), None);
        assert!(read("/proc/self").rights.is_ok());
        assert!(matches!(&judge(&read("/proc/none"), &unknown())[..], [note] if note.grade == Grade::Note));
    }
}
