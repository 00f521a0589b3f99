//! `--tune-sysctls`: has the kernel stay out of ARP for addresses of Services, where somebody else is to announce them.
//!
//! Two settings, on the interfaces whose neighbours may ask for such an address. kube-proxy's strictARP sets both for `all`
//! interfaces; those to pods would be among them, and some networks of pods live on the node's answering there for an address
//! that it has elsewhere. Nothing else is ever set (`route_localnet` is not needed, as node ports on loopback are sockets), and
//! nothing is set back: routes stay, too, when the process ends, and so must what keeps the machine quiet about them.

use std::collections::BTreeSet;

use crate::arp;
use crate::causes::causes;
use crate::sysctl::Sysctl;

/// Answers for addresses of the asked interface alone.
const QUIET_IGNORE: i32 = 1;
/// Asks in the name of an address of the interface. Below, a machine that answers a client in the name of a Service asks
/// for the client's hardware address in that name as well, and who knew the Service's address by another machine takes it
/// for this one's from then on.
const QUIET_ANNOUNCE: i32 = 2;

/// Sets what is missing. Owned by the keeper of addresses, by value.
#[derive(Debug, Default)]
pub(crate) struct ArpTuning {
    /// What could not be set, as the log says already.
    refused: BTreeSet<Sysctl>,
}

impl ArpTuning {
    /// Has an interface neither answer for addresses that it does not have, nor ask in their name.
    pub(crate) fn quieten(&mut self, interface: &str) {
        for (setting, value) in missing(interface, |setting| arp::in_force(interface, setting)) {
            let old = setting.read();
            match setting.set(value) {
                Ok(()) => {
                    self.refused.remove(&setting);
                    tracing::info!(%setting, old, new = value, "kernel setting changed, as --tune-sysctls asks for");
                }
                Err(error) if !self.refused.contains(&setting) => {
                    tracing::error!(
                        error = causes(&error),
                        remedy = format!("on the machine itself: `sysctl -w {setting}={value}`"),
                        "a kernel setting stays as it is in spite of --tune-sysctls"
                    );
                    self.refused.insert(setting);
                }
                Err(_) => {}
            }
        }
    }
}

/// What to set on an interface; `in_force` tells what holds there.
fn missing(interface: &str, in_force: impl Fn(&str) -> i32) -> Vec<(Sysctl, i32)> {
    let ignore = arp::answers(in_force(arp::IGNORE)).then_some((arp::IGNORE, QUIET_IGNORE));
    let announce = (in_force(arp::ANNOUNCE) < QUIET_ANNOUNCE).then_some((arp::ANNOUNCE, QUIET_ANNOUNCE));
    let missing = ignore.into_iter().chain(announce);
    missing.map(|(setting, value)| (Sysctl::of_interface(interface, setting), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_what_holds_on_an_interface_when_asked_then_only_what_is_missing_is_to_be_set() {
        let missing = |ignore, announce| {
            let in_force = |setting: &str| if setting == arp::IGNORE { ignore } else { announce };
            let missing = missing("eth0", in_force).into_iter();
            missing.map(|(setting, value)| format!("{setting}={value}")).collect::<Vec<_>>().join(" ")
        };
        let (ignore, announce) = ("net.ipv4.conf.eth0.arp_ignore=1", "net.ipv4.conf.eth0.arp_announce=2");

        assert_eq!(missing(0, 0), format!("{ignore} {announce}"));
        assert_eq!(missing(1, 1), announce);
        assert_eq!(missing(0, 2), ignore);
        for stricter in [1, 2, 3, 8] {
            assert_eq!(missing(stricter, 2), "");
        }
    }
}
