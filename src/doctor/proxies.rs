//! Signs of other proxies: their rules come before any socket, and what those lead elsewhere never reaches a relay.
//!
//! Only what is there for Services alone is such a sign: kube-router and Cilium also run for policies or as a network of
//! pods. What Cilium does is told by its settings (`cni`).

use std::collections::BTreeMap;

use super::duty::Duty;
use super::fact::{Fact, file, names_in};
use super::finding::{Abridged, Finding, Subject};
use super::nft::{self, Named};
use crate::guard_socket::table_name;

const SUBJECT: Subject = Subject::OtherProxies;

/// Names of processes, as the kernel shortens them, and whose they are.
const PROCESSES: [(&str, &str); 1] = [("kube-proxy", "kube-proxy")];
/// Interfaces that a proxy makes for its addresses.
const INTERFACES: [(&str, &str); 2] = [("kube-ipvs0", "kube-proxy"), ("kube-dummy-if", "kube-router")];
/// Chains of a proxy. Others of kubernetes are the kubelet's, others of kube-router are for policies.
const CHAINS: [(&str, &str); 3] =
    [("KUBE-SERVICES", "kube-proxy"), ("KUBE-NODEPORTS", "kube-proxy"), ("KUBE-ROUTER-SERVICES", "kube-router")];
/// kube-proxy's own table in its mode of that name.
const TABLE: &str = "kube-proxy";

#[derive(Debug)]
pub(super) struct Facts {
    /// nftables, with what `iptables` makes there.
    pub(super) rules: Fact<Option<Vec<Named>>>,
    /// Tables of the old iptables, of both families: what is in them is told to their own program alone.
    pub(super) legacy: Fact<Vec<String>>,
    /// Addresses that IPVS balances; `None`: there is no IPVS.
    pub(super) ipvs: Fact<Option<usize>>,
    pub(super) interfaces: Fact<Vec<String>>,
    /// Names and pids of processes that are seen from here.
    pub(super) processes: Vec<(String, u32)>,
}

pub(super) fn read(interfaces: Fact<Vec<String>>) -> Facts {
    Facts { rules: nft::read(), legacy: legacy(), ipvs: ipvs(), interfaces, processes: processes() }
}

impl Facts {
    fn rules(&self) -> impl Iterator<Item = &Named> {
        self.rules.iter().flatten().flatten()
    }

    /// True where the kernel has nftables, and this process may use it.
    pub(super) fn has_nftables(&self) -> bool {
        matches!(self.rules, Ok(Some(_)))
    }

    /// True where there is the table that guards addresses which routes of our number make local.
    pub(super) fn has_guard(&self, duty: &Duty) -> bool {
        let Some(table) = duty.routes.map(table_name) else { return false };
        self.rules().any(|named| named.chain.is_none() && named.table == table)
    }
}

fn legacy() -> Fact<Vec<String>> {
    let tables = [file("/proc/self/net/ip_tables_names")?, file("/proc/self/net/ip6_tables_names")?];
    let mut names: Vec<String> = tables.iter().flatten().flat_map(|text| text.lines()).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

fn ipvs() -> Fact<Option<usize>> {
    Ok(file("/proc/self/net/ip_vs")?.map(|text| virtual_services(&text)))
}

/// Three lines of headings, then one for each address, and one for each backend that begins with an arrow.
fn virtual_services(text: &str) -> usize {
    text.lines().filter(|line| ["TCP ", "UDP ", "SCTP", "FWM "].iter().any(|word| line.starts_with(word))).count()
}

fn processes() -> Vec<(String, u32)> {
    let pids = names_in("/proc").unwrap_or_default().into_iter().filter_map(|name| name.parse::<u32>().ok());
    let name = |pid: u32| Some((file(&format!("/proc/{pid}/comm")).ok()??.trim_end().to_owned(), pid));
    pids.filter_map(name).filter(|(name, _)| PROCESSES.iter().any(|(known, _)| known == name)).collect()
}

pub(super) fn judge(facts: &Facts, duty: &Duty) -> Vec<Finding> {
    let mut findings: Vec<Finding> = signs(facts)
        .into_iter()
        .map(|(proxy, signs)| judge_proxy(proxy, &signs, duty))
        .chain(facts.rules.as_ref().err().map(|why| Finding::unknown(SUBJECT, why)))
        .chain(judge_legacy(&facts.legacy, duty))
        .collect();
    if findings.is_empty() {
        findings.push(Finding::ok(SUBJECT, "no other proxy's rules are here"));
    }
    findings
}

/// By proxy, what tells of it.
fn signs(facts: &Facts) -> BTreeMap<&'static str, Vec<String>> {
    let mut signs: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    let mut add = |proxy, sign: String| {
        let known = signs.entry(proxy).or_default();
        if !known.contains(&sign) {
            known.push(sign);
        }
    };
    for Named { table, chain } in facts.rules() {
        match chain {
            None if table == TABLE => add("kube-proxy", format!("nftables table {TABLE}")),
            None => {}
            Some(chain) => {
                let known = CHAINS.iter().filter(|(name, _)| name == chain);
                known.for_each(|(name, proxy)| add(proxy, format!("iptables chains {name}")));
            }
        }
    }
    for interface in facts.interfaces.iter().flatten() {
        let known = INTERFACES.iter().filter(|(name, _)| name == interface);
        known.for_each(|(name, proxy)| add(proxy, format!("interface {name}")));
    }
    for (name, pid) in &facts.processes {
        let known = PROCESSES.iter().filter(|(known, _)| known == name);
        known.for_each(|(_, proxy)| add(proxy, format!("process {pid}")));
    }
    if let Ok(Some(count @ 1..)) = facts.ipvs {
        add("IPVS", format!("{count} of its virtual services"));
    }
    signs
}

fn judge_proxy(proxy: &str, signs: &[String], duty: &Duty) -> Finding {
    let told = format!("{proxy} is here ({})", Abridged(signs));
    let has_table = signs.iter().any(|sign| sign.contains("nftables table"));
    match &duty.proxy_name {
        Some(name) if has_table => Finding::note(
            SUBJECT,
            format!("{told}: it leaves Services with the label of {name} alone, but its rules drop what this node's own processes send to them"),
        )
        .remedy("`kubectl apply -k examples/kubernetes/beside-kube-proxy-nftables`, which exempts them"),
        Some(name) => Finding::ok(SUBJECT, format!("{told}: it leaves Services with the label of {name} alone")),
        None if duty.is_alone() => Finding::warning(SUBJECT, format!("{told}: what its rules lead elsewhere never reaches kube-relay"))
            .remedy(remedy(proxy)),
        None => Finding::note(SUBJECT, format!("{told}: of no concern to Services on loopback")),
    }
}

fn remedy(proxy: &str) -> &'static str {
    match proxy {
        "kube-proxy" => {
            "stop it, then `kube-proxy --cleanup`; or share the Services by label: `--proxy-name kube-relay`"
        }
        "kube-router" => {
            "run it with `--run-service-proxy=false`, then `kube-router --cleanup-config`; or `--proxy-name kube-relay`"
        }
        _ => "`ipvsadm -Ln` shows them, `ipvsadm --clear` removes all",
    }
}

fn judge_legacy(tables: &Fact<Vec<String>>, duty: &Duty) -> Option<Finding> {
    match tables {
        // Nothing else is told to who is not root.
        Err(why) => Some(Finding::unknown(SUBJECT, why)),
        Ok(tables) if tables.iter().any(|table| table == "nat") && duty.is_alone() => Some(
            Finding::note(
                SUBJECT,
                "the old iptables has a table nat: whose rules are in it is told to its own program alone",
            )
            .remedy("`iptables-legacy-save -t nat | grep KUBE-SERVICES` shows those of kube-proxy"),
        ),
        Ok(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::duty::sample::{duty, unknown};
    use super::super::fact::Unreadable;
    use super::super::finding::Grade;
    use super::*;

    fn facts() -> Facts {
        Facts { rules: Ok(Some(vec![])), legacy: Ok(vec![]), ipvs: Ok(None), interfaces: Ok(vec![]), processes: vec![] }
    }

    fn with_rules(rules: &[(&str, Option<&str>)]) -> Facts {
        let rules = rules.iter().map(|(table, chain)| Named { table: (*table).into(), chain: chain.map(Into::into) });
        Facts { rules: Ok(Some(rules.collect())), ..facts() }
    }

    fn web() -> Duty {
        duty(&["clusterIP 10.96.0.1:80/TCP"])
    }

    fn beside() -> Duty {
        Duty { proxy_name: Some("kube-relay".into()), ..web() }
    }

    #[test]
    fn given_kube_proxys_rules_when_it_is_to_be_replaced_then_they_are_warned_of_and_beside_it_they_are_fine() {
        let facts = with_rules(&[("nat", None), ("nat", Some("KUBE-SERVICES")), ("nat", Some("KUBE-NODEPORTS"))]);

        let alone = &judge(&facts, &web())[0];

        assert_eq!(alone.grade, Grade::Warning);
        let told = "kube-proxy is here (iptables chains KUBE-SERVICES, iptables chains KUBE-NODEPORTS): ";
        assert!(alone.message.starts_with(told), "{}", alone.message);
        assert!(alone.remedy.as_deref().is_some_and(|remedy| remedy.contains("kube-proxy --cleanup")));
        assert_eq!(judge(&facts, &beside())[0].grade, Grade::Ok);
        assert_eq!(judge(&facts, &duty(&["clusterIP 127.96.0.1:80/TCP"]))[0].grade, Grade::Note);
    }

    #[test]
    fn given_kube_proxys_own_table_when_we_are_beside_it_then_its_trap_is_told() {
        let found = &judge(&with_rules(&[("kube-proxy", None)]), &beside())[0];

        assert_eq!(found.grade, Grade::Note);
        assert!(found.message.contains("drop what this node's own processes send"), "{}", found.message);
    }

    #[test]
    fn given_rules_of_the_kubelet_and_others_when_judged_then_they_are_no_proxys() {
        let facts = with_rules(&[("mangle", Some("KUBE-KUBELET-CANARY")), ("filter", Some("DOCKER"))]);

        assert_eq!(judge(&facts, &web())[0].grade, Grade::Ok);
    }

    #[test]
    fn given_kube_router_and_cilium_when_they_serve_no_services_then_they_are_no_proxies() {
        let policies = ["KUBE-ROUTER-INPUT", "KUBE-ROUTER-FORWARD", "KUBE-ROUTER-OUTPUT", "CILIUM_INPUT"];
        let policies = policies.map(|chain| ("filter", Some(chain)));
        let proxying = [
            with_rules(&[("filter", Some("KUBE-ROUTER-INPUT")), ("filter", Some("KUBE-ROUTER-SERVICES"))]),
            Facts { interfaces: Ok(vec!["kube-dummy-if".into()]), ..with_rules(&policies) },
        ];

        assert_eq!(judge(&with_rules(&policies), &web())[0].grade, Grade::Ok, "k3s has those for policies");
        for facts in proxying {
            let found = judge(&facts, &web());
            assert_eq!((found.len(), found[0].grade), (1, Grade::Warning), "{found:?}");
            assert!(found[0].message.starts_with("kube-router is here ("), "{found:?}");
        }
    }

    #[test]
    fn given_ipvs_a_process_and_an_interface_when_judged_then_each_proxy_is_told_once() {
        let facts = Facts {
            ipvs: Ok(Some(2)),
            interfaces: Ok(vec!["eth0".into(), "kube-ipvs0".into()]),
            processes: vec![("kube-proxy".into(), 7)],
            ..facts()
        };

        let found = judge(&facts, &web());

        assert_eq!(found.len(), 2);
        assert!(found[0].message.starts_with("IPVS is here (2 of its virtual services)"), "{found:?}");
        assert!(found[1].message.starts_with("kube-proxy is here (interface kube-ipvs0, process 7)"), "{found:?}");
    }

    #[test]
    fn given_old_iptables_or_nothing_to_read_when_judged_then_what_is_not_known_is_a_note() {
        let old = Facts { legacy: Ok(vec!["filter".into(), "nat".into()]), ..facts() };
        let unread = Facts { rules: Err(Unreadable::new("x", "y")), ..facts() };

        assert_eq!(judge(&old, &web())[0].grade, Grade::Note);
        assert_eq!(judge(&old, &unknown())[0].grade, Grade::Ok, "nothing comes from elsewhere");
        assert_eq!(judge(&unread, &web())[0].message, "not known: x: y");
    }

    #[test]
    fn given_the_table_of_ipvs_when_counted_then_backends_are_not() {
        let text = "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port\n\
                    TCP  0A600001:0050 rr\n  -> 0AF40002:1F40      Masq    1      0          0\nUDP  0A60000A:0035 rr\n";

        assert_eq!(virtual_services(text), 2);
    }
}
