//! Whether a route that makes an address local would have this machine answer ARP for it.
//!
//! A machine answers on each interface whose `arp_ignore` is 0 for every address that is local, be it by a route alone. For
//! an address of a network on that interface, each node that serves it would answer then, and its neighbours would
//! reach whichever came last. IPv6 is not concerned: there a machine answers for addresses of its interfaces alone, whether
//! it is asked by multicast or directly (kernel 6.18; asked again by each run of the rig, `tests/rig/arp`).
//! Nothing is set here, only read; what sets it is `arp_tuning`.

use std::net::IpAddr;

use crate::host::Host;
use crate::sysctl::Sysctl;

/// For which local addresses an interface answers.
pub(crate) const IGNORE: &str = "arp_ignore";
/// In the name of which address an interface asks.
pub(crate) const ANNOUNCE: &str = "arp_announce";

/// The interface on which a neighbour would be answered; `None` where nobody would ask for the address, or is answered.
///
/// `arp_ignore` tells the setting that holds for an interface.
pub(crate) fn conflict(address: IpAddr, host: &Host, arp_ignore: impl Fn(&str) -> i32) -> Option<String> {
    asked_on(address, host).find(|interface| answers(arp_ignore(interface))).map(str::to_owned)
}

/// The interfaces on which neighbours may ask for an address, as it is of a network there. One with two such addresses comes
/// twice.
pub(crate) fn asked_on(address: IpAddr, host: &Host) -> impl Iterator<Item = &str> {
    let asked_for = address.is_ipv4() && !address.is_loopback();
    let interfaces = host.interfaces.iter().filter(move |found| asked_for && found.net().contains(&address));
    // Without a name it went away while we asked.
    interfaces.map(|found| &*found.interface).filter(|interface| !["", "lo"].contains(interface))
}

/// True where an interface with this setting answers for what is local by a route alone: all numbers do that have no
/// meaning yet.
pub(crate) fn answers(arp_ignore: i32) -> bool {
    !matches!(arp_ignore, 1..=3 | 8)
}

/// The `arp_ignore` that holds for an interface.
pub(crate) fn arp_ignore(interface: &str) -> i32 {
    in_force(interface, IGNORE)
}

/// What the kernel goes by on an interface: the larger one of its own setting and that of all. 0 where neither can be read.
pub(crate) fn in_force(interface: &str, setting: &str) -> i32 {
    let read = |interface| Sysctl::of_interface(interface, setting).read();
    read("all").max(read(interface)).unwrap_or(0)
}

/// What an operator can do about it.
pub(crate) fn remedy(interface: &str) -> String {
    let [ignore, announce] = [IGNORE, ANNOUNCE].map(|setting| Sysctl::of_interface(interface, setting));
    format!(
        "`sysctl -w {ignore}=1 {announce}=2`, which --tune-sysctls does, has it answer for the addresses of its interfaces \
         alone; or make the address local yourself, on the one node that is to answer"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::InterfaceAddress;

    fn host() -> Host {
        let found = |interface: &str, address: &str, prefix| InterfaceAddress {
            interface: interface.into(),
            address: address.parse().expect("an address"),
            prefix,
        };
        let interfaces = vec![
            found("lo", "127.0.0.1", 8),
            found("lo", "198.51.100.1", 24),
            found("eth0", "192.0.2.5", 24),
            found("eth0", "2001:db8::5", 64),
            found("eth1", "203.0.113.5", 24),
            found("", "233.252.0.5", 24),
        ];
        Host { interfaces, default_sources: vec![] }
    }

    fn conflict_at(address: &str, ignores: &[&str]) -> Option<String> {
        let ignores = |interface: &str| i32::from(ignores.contains(&interface));
        conflict(address.parse().expect("an address"), &host(), ignores)
    }

    #[test]
    fn given_addresses_when_judged_then_only_those_of_a_network_whose_neighbours_are_answered_conflict() {
        assert_eq!(conflict_at("192.0.2.7", &[]).as_deref(), Some("eth0"));
        assert_eq!(conflict_at("203.0.113.7", &["eth0"]).as_deref(), Some("eth1"));
        assert_eq!(conflict_at("192.0.2.7", &["eth0"]), None, "it does not answer there");
        for elsewhere in ["10.96.0.1", "127.96.0.1", "198.51.100.7", "2001:db8::7", "233.252.0.7"] {
            assert_eq!(conflict_at(elsewhere, &[]), None, "{elsewhere}");
        }
    }

    #[test]
    fn given_each_setting_of_arp_ignore_when_judged_then_those_without_a_meaning_answer_like_0() {
        let answering: Vec<i32> = (-1..=9).filter(|setting| answers(*setting)).collect();

        assert_eq!(answering, [-1, 0, 4, 5, 6, 7, 9]);
    }

    #[test]
    fn given_an_interface_with_a_dot_when_the_remedy_is_told_then_it_is_one_line_that_sysctl_understands() {
        let remedy = remedy("eth0.100");

        let line = "`sysctl -w net.ipv4.conf.eth0/100.arp_ignore=1 net.ipv4.conf.eth0/100.arp_announce=2`";
        assert!(remedy.starts_with(line), "{remedy}");
    }

    #[test]
    fn given_this_machine_when_asked_for_an_interface_that_is_not_there_then_the_setting_of_all_counts() {
        assert_eq!(arp_ignore("nothing-is-called-so"), arp_ignore("all"));
    }
}
