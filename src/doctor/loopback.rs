//! Whether neighbours reach what listens on 127.0.0.1 (CVE-2020-8558). A relay never needs the setting that lets them.

use super::fact::{self, Fact};
use super::finding::{Abridged, Finding, Subject};

const SUBJECT: Subject = Subject::Loopback;
const SETTING: &str = "route_localnet";

/// Settings that hold for interfaces that nobody has named: `all` for each, `default` for each that is new.
const WIDE: [&str; 2] = ["all", "default"];

/// The interfaces where it is set, and of `all` and `default` those that are.
pub(super) fn read() -> Fact<Vec<String>> {
    fact::interfaces_with(SETTING)
}

pub(super) fn judge(open: &Fact<Vec<String>>) -> Finding {
    let open = match open {
        Ok(open) => open,
        Err(why) => return Finding::unknown(SUBJECT, why),
    };
    let Some(first) = open.first() else {
        return Finding::ok(SUBJECT, "route_localnet is 0: neighbours do not reach loopback");
    };
    let message = format!(
        "route_localnet is set for {}: neighbours there may reach what listens on 127.0.0.1 (CVE-2020-8558); kube-relay needs it nowhere",
        Abridged(open)
    );
    let wide: Vec<String> = WIDE.iter().filter(|wide| open.iter().any(|name| name == *wide)).map(off).collect();
    if wide.is_empty() {
        // Each pod with a host port has it set there: no exposure that the node's owner did not ask for.
        return Finding::note(SUBJECT, message).remedy(format!(
            "mostly the CNI plugin portmap sets it there, for host ports of pods at the node's 127.0.0.1, which end without it; \
             where there are none: `sysctl -w {}`",
            off(first)
        ));
    }
    Finding::warning(SUBJECT, message).remedy(format!(
        "`sysctl -w {}`; kube-proxy sets it for node ports on localhost, unless it has `--iptables-localhost-nodeports=false`. \
         Host ports of pods at 127.0.0.1 need it, but set for their own interfaces, as the CNI plugin portmap does: leave it there",
        wide.join(" ")
    ))
}

fn off(interface: impl AsRef<str>) -> String {
    fact::off(SETTING, interface.as_ref())
}

#[cfg(test)]
mod tests {
    use super::super::fact::Unreadable;
    use super::super::finding::Grade;
    use super::*;

    fn judged(open: &[&str]) -> Finding {
        judge(&Ok(open.iter().map(|name| (*name).to_owned()).collect()))
    }

    #[test]
    fn given_a_setting_for_all_or_new_interfaces_when_judged_then_that_one_is_to_be_taken_back() {
        let found = judged(&["all", "cni0", "eth0.7"]);

        assert_eq!(found.grade, Grade::Warning);
        let remedy = found.remedy.expect("a remedy");
        assert!(remedy.starts_with("`sysctl -w net.ipv4.conf.all.route_localnet=0`;"), "{remedy}");
        assert!(remedy.contains("portmap does: leave it there"), "{remedy}");
        assert_eq!(judged(&["default"]).grade, Grade::Warning);
        assert_eq!(judged(&[]).grade, Grade::Ok);
        assert_eq!(judge(&Err(Unreadable::new("x", "y"))).grade, Grade::Note);
    }

    #[test]
    fn given_interfaces_of_pods_with_host_ports_when_judged_then_who_sets_it_and_what_ends_without_it_is_told() {
        let found = judged(&["cni0.7", "veth1"]);

        assert_eq!(found.grade, Grade::Note);
        assert!(found.message.starts_with("route_localnet is set for cni0.7, veth1: "), "{found:?}");
        let remedy = found.remedy.expect("a remedy");
        assert!(remedy.contains("portmap") && remedy.contains("which end without it"), "{remedy}");
        assert!(remedy.ends_with("`sysctl -w net.ipv4.conf.cni0/7.route_localnet=0`"), "{remedy}");
    }

    #[test]
    fn given_this_machine_when_read_then_the_setting_is_known() {
        assert!(read().is_ok());
    }
}
