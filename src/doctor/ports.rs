//! The ports that the kernel gives to outgoing connections: apart from node ports, and enough of them.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use super::duty::Duty;
use super::fact::{Fact, sysctl, sysctl_pair};
use super::finding::{Abridged, Finding, Subject};
use crate::plan::ListenerKind;

/// With fewer, a busy backend is out of reach at times: each connection to it takes one.
const FEW_PORTS: usize = 16_000;

#[derive(Debug)]
pub(super) struct Facts {
    /// `net.ipv4.ip_local_port_range`, for both families.
    pub(super) range: Fact<Option<(u16, u16)>>,
    /// `net.ipv4.ip_local_reserved_ports`, which are given to nobody who does not ask for them.
    pub(super) reserved: Fact<Option<String>>,
    /// `net.ipv4.tcp_tw_reuse`: 0 never, 1 always, 2 on loopback.
    pub(super) reuse: Fact<Option<u8>>,
}

pub(super) fn read() -> Facts {
    Facts {
        range: sysctl_pair("net.ipv4.ip_local_port_range"),
        reserved: sysctl("net.ipv4.ip_local_reserved_ports"),
        reuse: sysctl("net.ipv4.tcp_tw_reuse"),
    }
}

impl Facts {
    /// Ports that a connection may come from.
    pub(super) fn sources(&self) -> BTreeSet<u16> {
        let (first, last) = self.range.as_ref().ok().copied().flatten().unwrap_or((32_768, 60_999));
        let reserved = self.reserved.as_ref().ok().and_then(Option::as_deref).map(port_list).unwrap_or_default();
        (first..=last).filter(|port| !reserved.contains(port)).collect()
    }
}

pub(super) fn judge(facts: &Facts, duty: &Duty) -> Vec<Finding> {
    let unread = [facts.range.as_ref().err(), facts.reserved.as_ref().err()];
    if let Some(why) = unread.into_iter().flatten().next() {
        return vec![Finding::unknown(Subject::NodePorts, why)];
    }
    vec![judge_node_ports(facts, duty), judge_sources(facts)]
}

/// A connection that has a node port for its source keeps others from binding it (kubernetes#111682).
fn judge_node_ports(facts: &Facts, duty: &Duty) -> Finding {
    let sources = facts.sources();
    let used = duty.keys(|key, kind| kind == ListenerKind::NodePort && sources.contains(&key.port()));
    let shared: BTreeSet<u16> = duty.node_ports.clone().chain(used.iter().map(|key| key.port())).collect();
    let shared = runs(shared.intersection(&sources).copied());
    let range = text_of(&duty.node_ports);
    if shared.is_empty() {
        return Finding::ok(Subject::NodePorts, format!("node ports ({range}) are no source ports"));
    }
    let listed = listed(&shared);
    let message = match used.as_slice() {
        [] => format!("node ports {listed} are source ports of connections, too: one may be taken before it is bound"),
        used => {
            format!("node ports {listed} are source ports of connections, too, those of {} among them", Abridged(used))
        }
    };
    let reserved = facts.reserved.as_ref().ok().and_then(Option::as_deref).map(str::trim).unwrap_or_default();
    let all = if reserved.is_empty() { listed } else { format!("{reserved},{listed}") };
    let finding = if used.is_empty() { Finding::note } else { Finding::warning };
    let remedy = format!("`sysctl -w net.ipv4.ip_local_reserved_ports={all}`");
    finding(Subject::NodePorts, message).remedy(remedy)
}

fn judge_sources(facts: &Facts) -> Finding {
    let count = facts.sources().len();
    let message = format!("{count} source ports: as many connections at once to one backend");
    if count < FEW_PORTS {
        let remedy = "`sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\"`, or more addresses to come from: --upstream-source";
        return Finding::warning(Subject::SourcePorts, message).remedy(remedy);
    }
    match facts.reuse {
        Ok(Some(0)) => Finding::note(
            Subject::SourcePorts,
            format!("{message}, and each that the client closes first waits a minute, also on loopback"),
        )
        .remedy("`sysctl -w net.ipv4.tcp_tw_reuse=2` (loopback), or 1 (everywhere)"),
        _ => Finding::ok(Subject::SourcePorts, message),
    }
}

/// Reads `8080,9148-9150`.
fn port_list(text: &str) -> BTreeSet<u16> {
    let item = |item: &str| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        Some(first.trim().parse::<u16>().ok()?..=last.trim().parse::<u16>().ok()?)
    };
    text.split(',').filter_map(item).flatten().collect()
}

/// Numbers that rise, as ranges.
fn runs(ports: impl Iterator<Item = u16>) -> Vec<RangeInclusive<u16>> {
    let mut runs: Vec<RangeInclusive<u16>> = Vec::new();
    for port in ports {
        match runs.last_mut() {
            Some(run) if port.checked_sub(1) == Some(*run.end()) => *run = *run.start()..=port,
            _ => runs.push(port..=port),
        }
    }
    runs
}

fn listed(runs: &[RangeInclusive<u16>]) -> String {
    runs.iter().map(text_of).collect::<Vec<_>>().join(",")
}

fn text_of(range: &RangeInclusive<u16>) -> String {
    match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::duty::sample::{duty, unknown};
    use super::super::fact::Unreadable;
    use super::super::finding::Grade;
    use super::*;

    fn facts(first: u16, last: u16, reserved: &str) -> Facts {
        Facts { range: Ok(Some((first, last))), reserved: Ok(Some(reserved.into())), reuse: Ok(Some(2)) }
    }

    #[test]
    fn given_a_default_kernel_when_judged_then_node_ports_are_no_source_ports() {
        let found = judge(&facts(32_768, 60_999, ""), &unknown());

        assert!(found.iter().all(|finding| finding.grade == Grade::Ok), "{found:?}");
        assert_eq!(found[0].message, "node ports (30000-32767) are no source ports");
    }

    #[test]
    fn given_source_ports_among_node_ports_when_judged_then_the_reserved_list_is_told_with_what_is_in_it() {
        let web = duty(&["nodePort 192.0.2.5:32100/TCP"]);

        let found = judge_node_ports(&facts(32_000, 60_999, "8080,32200-32299"), &web);

        assert_eq!(found.grade, Grade::Warning);
        assert!(found.message.contains("192.0.2.5:32100/TCP"), "{}", found.message);
        let right = "`sysctl -w net.ipv4.ip_local_reserved_ports=8080,32200-32299,32000-32199,32300-32767`";
        assert_eq!(found.remedy.as_deref(), Some(right));
        assert_eq!(judge_node_ports(&facts(32_000, 60_999, ""), &unknown()).grade, Grade::Note, "nobody uses one yet");
        assert_eq!(judge_node_ports(&facts(32_000, 60_999, "30000-32767"), &web).grade, Grade::Ok);
    }

    #[test]
    fn given_a_node_port_outside_the_range_when_it_is_a_source_port_then_it_is_named() {
        let found = judge_node_ports(&facts(32_768, 60_999, ""), &duty(&["nodePort 192.0.2.5:40000/TCP"]));

        assert_eq!(found.remedy.as_deref(), Some("`sysctl -w net.ipv4.ip_local_reserved_ports=40000`"));
    }

    #[test]
    fn f15_given_few_source_ports_when_judged_then_a_wider_range_is_advised() {
        let found = judge_sources(&facts(40_000, 40_999, ""));

        assert_eq!((found.grade, found.message.split(':').next()), (Grade::Warning, Some("1000 source ports")));
        let never = Facts { reuse: Ok(Some(0)), ..facts(32_768, 60_999, "") };
        assert_eq!(judge_sources(&never).grade, Grade::Note);
    }

    #[test]
    fn given_a_range_that_cannot_be_read_when_judged_then_that_is_said() {
        let facts = Facts { range: Err(Unreadable::new("range", "no")), ..facts(1, 2, "") };

        assert_eq!(judge(&facts, &unknown())[0].message, "not known: range: no");
    }
}
