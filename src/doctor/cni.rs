//! Networks of pods whose own programs in the kernel may carry packets past the node's tables: then what is local by a
//! route alone is not local to them.

use std::collections::BTreeMap;

use super::duty::Duty;
use super::fact::{Fact, file, names_in};
use super::finding::{Finding, Subject};

const SUBJECT: Subject = Subject::Cni;

#[derive(Debug)]
pub(super) struct Facts {
    /// Of this network namespace.
    pub(super) interfaces: Fact<Vec<String>>,
    /// What is pinned at `/sys/fs/bpf`.
    pub(super) pinned: Fact<Vec<String>>,
    /// Cilium's settings (ConfigMap `cilium-config`), where the API server tells them.
    pub(super) cilium: Option<BTreeMap<String, String>>,
}

pub(super) fn read(interfaces: Fact<Vec<String>>, cilium: Option<BTreeMap<String, String>>) -> Facts {
    let pinned = names_in("/sys/fs/bpf")
        .and_then(|names| Ok([names, names_in("/sys/fs/bpf/tc/globals")?, names_in("/sys/fs/bpf/calico")?].concat()));
    Facts { interfaces, pinned, cilium }
}

/// The interfaces of this network namespace.
pub(super) fn interfaces() -> Fact<Vec<String>> {
    let table = file("/proc/self/net/dev")?.unwrap_or_default();
    Ok(table.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect())
}

pub(super) fn judge(facts: &Facts, duty: &Duty) -> Vec<Finding> {
    let interfaces = match &facts.interfaces {
        Ok(interfaces) => interfaces,
        Err(why) => return vec![Finding::unknown(SUBJECT, why)],
    };
    // What is pinned is seen by few: where it is not, interfaces tell.
    let pinned = || facts.pinned.iter().flatten();
    let has = |prefix: &str| interfaces.iter().any(|name| name.starts_with(prefix));
    let cilium = has("cilium_host") || facts.cilium.is_some() || pinned().any(|name| name.starts_with("cilium"));
    let calico = has("bpfin.cali") || has("bpfout.cali") || pinned().any(|name| name.starts_with("cali_"));
    let mut findings = Vec::new();
    if cilium {
        findings.push(judge_cilium(facts.cilium.as_ref(), duty));
    }
    if calico {
        findings.push(
            Finding::warning(SUBJECT, "Calico's eBPF data plane is here: it serves Services itself, and packets of pods may pass by the node's local table")
                .remedy("`linuxDataplane: Iptables` in Calico's Installation; or serve node ports and `--expose` alone"),
        );
    }
    if findings.is_empty() {
        findings.push(Finding::ok(SUBJECT, "no network of pods that passes by the node's own tables"));
    }
    findings
}

fn judge_cilium(settings: Option<&BTreeMap<String, String>>, duty: &Duty) -> Finding {
    let Some(settings) = settings else {
        return Finding::note(
            SUBJECT,
            "Cilium is here, its settings are not told: with host routing by BPF, packets of pods pass by the routes that make addresses of Services local",
        )
        .remedy("`kubectl -n kube-system get configmap cilium-config -o yaml`: enable-host-legacy-routing should be \"true\"");
    };
    let is_on = |name: &str| settings.get(name).is_some_and(|value| matches!(value.as_str(), "true" | "strict"));
    if is_on("kube-proxy-replacement") && duty.proxy_name.is_none() {
        let message = "Cilium serves Services itself (kube-proxy-replacement): its pods never ask kube-relay for one";
        let remedy = "`kubeProxyReplacement: false` in its Helm values; or share the Services by label: `--proxy-name kube-relay`";
        return Finding::warning(SUBJECT, message).remedy(remedy);
    }
    if is_on("enable-host-legacy-routing") {
        return Finding::ok(
            SUBJECT,
            "Cilium's packets pass through the node's own tables (enable-host-legacy-routing)",
        );
    }
    let message =
        "Cilium may route by BPF: then packets of pods pass by the routes that make addresses of Services local";
    Finding::warning(SUBJECT, message).remedy("`bpf.hostLegacyRouting: true` in its Helm values")
}

#[cfg(test)]
mod tests {
    use super::super::duty::sample::unknown;
    use super::super::fact::Unreadable;
    use super::super::finding::Grade;
    use super::*;

    fn facts(interfaces: &[&str]) -> Facts {
        let interfaces = interfaces.iter().map(|name| (*name).to_owned()).collect();
        Facts { interfaces: Ok(interfaces), pinned: Ok(vec![]), cilium: None }
    }

    fn cilium(settings: &[(&str, &str)]) -> Finding {
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        judge(&Facts { cilium: Some(settings), ..facts(&["cilium_host"]) }, &unknown()).remove(0)
    }

    #[test]
    fn given_cilium_when_judged_then_its_settings_decide() {
        assert_eq!(judge(&facts(&["lo", "cilium_host"]), &unknown())[0].grade, Grade::Note, "not told");
        assert_eq!(cilium(&[("kube-proxy-replacement", "true")]).grade, Grade::Warning);
        assert_eq!(cilium(&[("kube-proxy-replacement", "false")]).grade, Grade::Warning, "by BPF is its default");
        assert_eq!(cilium(&[("enable-host-legacy-routing", "true")]).grade, Grade::Ok);
        let settings = [("kube-proxy-replacement".to_owned(), "true".to_owned())].into();
        let beside = Duty { proxy_name: Some("kube-relay".into()), ..unknown() };
        let found = judge_cilium(Some(&settings), &beside);
        assert!(found.message.starts_with("Cilium may route by BPF"), "{found:?}");
    }

    #[test]
    fn given_calicos_bpf_when_judged_then_it_is_warned_of_and_its_plain_interfaces_are_not() {
        assert_eq!(judge(&facts(&["bpfin.cali"]), &unknown())[0].grade, Grade::Warning);
        assert_eq!(judge(&facts(&["lo", "cali1234", "eth0"]), &unknown())[0].grade, Grade::Ok);
    }

    #[test]
    fn given_interfaces_that_cannot_be_read_when_judged_then_that_is_said() {
        let facts = Facts { interfaces: Err(Unreadable::new("x", "y")), ..facts(&[]) };

        assert_eq!(judge(&facts, &unknown())[0].grade, Grade::Note);
        assert!(interfaces().is_ok_and(|names| names.contains(&"lo".into())));
    }
}
