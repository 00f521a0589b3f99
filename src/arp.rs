//! Whether a route that makes an address local would have this machine answer ARP for it.
//!
//! A machine answers on each interface whose `arp_ignore` is 0 for every address that is local, be it by a route alone. For
//! an address of a network on that interface, each node that serves it would answer then, and its neighbours would
//! reach whichever came last. IPv6 is not concerned: there a machine answers for addresses of its interfaces alone.
//! Nothing is set here, only read.

use std::fs;
use std::net::IpAddr;

use crate::host::Host;

/// The interface on which a neighbour would be answered; `None` where nobody would ask for the address, or is answered.
///
/// `arp_ignore` tells the setting that holds for an interface.
pub(crate) fn conflict(address: IpAddr, host: &Host, arp_ignore: impl Fn(&str) -> u8) -> Option<String> {
    if !address.is_ipv4() || address.is_loopback() {
        return None;
    }
    let mut neighbours =
        host.interfaces.iter().filter(|found| found.interface != "lo" && found.net().contains(&address));
    neighbours.find(|found| arp_ignore(&found.interface) == 0).map(|found| found.interface.clone())
}

/// What the kernel goes by on an interface: the larger one of its own setting and that of all. 0 where nobody has set it.
pub(crate) fn arp_ignore(interface: &str) -> u8 {
    let setting = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/arp_ignore")).ok()?;
        text.trim().parse::<u8>().ok()
    };
    setting("all").max(setting(interface)).unwrap_or(0)
}

/// What an operator can do about it.
pub(crate) fn remedy(interface: &str) -> String {
    format!(
        "`sysctl -w net.ipv4.conf.{}.arp_ignore=1` has it answer for the addresses of its interfaces alone; or make the \
         address local yourself, on the one node that is to answer",
        interface.replace('.', "/") // As sysctl wants it: a dot there begins another name.
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
        ];
        Host { interfaces, default_sources: vec![] }
    }

    fn conflict_at(address: &str, ignores: &[&str]) -> Option<String> {
        let ignores = |interface: &str| u8::from(ignores.contains(&interface));
        conflict(address.parse().expect("an address"), &host(), ignores)
    }

    #[test]
    fn given_addresses_when_judged_then_only_those_of_a_network_whose_neighbours_are_answered_conflict() {
        assert_eq!(conflict_at("192.0.2.7", &[]).as_deref(), Some("eth0"));
        assert_eq!(conflict_at("203.0.113.7", &["eth0"]).as_deref(), Some("eth1"));
        assert_eq!(conflict_at("192.0.2.7", &["eth0"]), None, "it does not answer there");
        for elsewhere in ["10.96.0.1", "127.96.0.1", "198.51.100.7", "2001:db8::7"] {
            assert_eq!(conflict_at(elsewhere, &[]), None, "{elsewhere}");
        }
    }

    #[test]
    fn given_an_interface_with_a_dot_when_the_remedy_is_told_then_sysctl_understands_it() {
        let remedy = remedy("eth0.100");

        assert!(remedy.contains("`sysctl -w net.ipv4.conf.eth0/100.arp_ignore=1`"), "{remedy}");
    }

    #[test]
    fn given_this_machine_when_asked_for_an_interface_that_is_not_there_then_the_setting_of_all_counts() {
        assert_eq!(arp_ignore("nothing-is-called-so"), arp_ignore("all"));
    }
}
