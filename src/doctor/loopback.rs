//! Whether neighbours reach what listens on 127.0.0.1 (CVE-2020-8558). A relay never needs the setting that lets them.

use super::fact::{Fact, file, names_in};
use super::finding::{Abridged, Finding, Subject};

const SUBJECT: Subject = Subject::Loopback;
const INTERFACES: &str = "/proc/sys/net/ipv4/conf";

/// The interfaces where `route_localnet` is set; `all` stands for each.
pub(super) fn read() -> Fact<Vec<String>> {
    let mut open = Vec::new();
    for interface in names_in(INTERFACES)? {
        let value = file(&format!("{INTERFACES}/{interface}/route_localnet"))?;
        // What a new interface begins with is set on none yet.
        if value.is_some_and(|value| value.trim() != "0") && interface != "default" {
            open.push(interface);
        }
    }
    Ok(open)
}

pub(super) fn judge(open: &Fact<Vec<String>>) -> Finding {
    let open = match open {
        Ok(open) if open.is_empty() => {
            return Finding::ok(SUBJECT, "route_localnet is 0: neighbours do not reach loopback");
        }
        Ok(open) => open,
        Err(why) => return Finding::unknown(SUBJECT, why),
    };
    let message = format!(
        "route_localnet is set for {}: neighbours may reach what listens on 127.0.0.1 (CVE-2020-8558); kube-relay needs it nowhere",
        Abridged(open)
    );
    let settings: Vec<String> = open
        .iter()
        .map(|interface| format!("net.ipv4.conf.{}.route_localnet=0", interface.replace('.', "/")))
        .collect();
    let remedy = format!("`sysctl -w {}`; kube-proxy sets it for node ports on localhost", settings.join(" "));
    Finding::warning(SUBJECT, message).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::super::fact::Unreadable;
    use super::super::finding::Grade;
    use super::*;

    #[test]
    fn given_interfaces_that_let_neighbours_in_when_judged_then_each_has_its_setting_in_the_remedy() {
        let found = judge(&Ok(vec!["all".into(), "eth0.7".into()]));

        assert_eq!(found.grade, Grade::Warning);
        let remedy = found.remedy.expect("a remedy");
        assert!(remedy.contains("conf.all.route_localnet=0 net.ipv4.conf.eth0/7.route_localnet=0"), "{remedy}");
        assert_eq!(judge(&Ok(vec![])).grade, Grade::Ok);
        assert_eq!(judge(&Err(Unreadable::new("x", "y"))).grade, Grade::Note);
    }

    #[test]
    fn given_this_machine_when_read_then_what_new_interfaces_begin_with_is_none() {
        assert!(read().is_ok_and(|open| !open.contains(&"default".into())));
    }
}
