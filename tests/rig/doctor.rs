//! What `kube-relay doctor` finds on a node: addresses that nobody makes local, who listens everywhere, what a relay has
//! left, whose rules are there. And that it changes none of it.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Stdio};

use kube_relay::config::DEFAULT_ROUTE_PROTOCOL;
use rustix::process::Signal;
use rustix::thread::CapabilitySet;
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::rig::{Case, Namespace, Rig, find, skip, with_only};
use crate::stage::{Stage, Web};
use crate::sysctls::{changed, sysctls};
use crate::verdicts::{local, rig};

pub(crate) const CASES: &[Case] = cases![
    t236_given_addresses_that_are_nowhere_when_the_doctor_looks_then_the_route_is_told_and_who_listens_everywhere,
    t236_given_a_relay_that_runs_when_the_doctor_looks_then_its_services_and_its_rights_are_judged,
    given_a_relay_that_was_killed_when_the_doctor_looks_then_its_routes_are_left_over,
    given_kube_proxys_table_when_the_doctor_looks_then_it_is_named,
];

/// A port that somebody else serves on all addresses.
const EVERYWHERE: u16 = 2222;
/// Subjects that are settings of the machine, which nobody prepares for a test.
const SETTINGS: [&str; 5] = ["open-files", "source-ports", "queues", "conntrack", "loopback"];
/// `spec.externalIPs` are served, too.
const EXTERNAL: [&str; 2] = ["--allowed-external-cidrs", "10.96.0.0/24,fd96::/64"];

/// What a doctor said.
struct Said {
    findings: Vec<Value>,
    code: Option<i32>,
}

impl Said {
    /// The findings about a subject, with a severity.
    fn about(&self, subject: &str, severity: &str) -> Vec<&str> {
        let of = self.findings.iter().filter(|found| found["subject"] == subject && found["severity"] == severity);
        of.filter_map(|found| found["message"].as_str()).collect()
    }

    fn remedy(&self, subject: &str) -> &str {
        let worst = self.findings.iter().find(|found| found["subject"] == subject);
        worst.and_then(|found| found["remedy"].as_str()).unwrap_or_default()
    }
}

/// Has a doctor look at a node.
fn doctor(node: &Namespace, prepare: impl FnOnce(&mut Command)) -> Said {
    let file = NamedTempFile::new().expect("a file can be made");
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    command.args(["doctor", "-o", "json"]).stdin(Stdio::null());
    command.stdout(file.as_file().try_clone().expect("descriptors are left"));
    prepare(&mut command);
    let code = node.spawn(command).and_then(|mut doctor| doctor.wait()).expect("the doctor comes").code();
    let text = fs::read_to_string(file.path()).expect("it was made");
    let mut said: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let findings = said["findings"].as_array_mut().map(std::mem::take).expect("a list");
    Said { findings, code }
}

fn manifest(web: &Web) -> NamedTempFile {
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().expect("a file can be made");
    fs::write(file.path(), web.to_string()).expect("it can be written");
    file
}

fn t236_given_addresses_that_are_nowhere_when_the_doctor_looks_then_the_route_is_told_and_who_listens_everywhere() {
    let rig = rig();
    let (web, node) = (manifest(&Web::default().with(local(&rig))), rig.node(0));
    let everywhere = node.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, EVERYWHERE))).expect("a free port");
    let asked = |more: &[&str]| {
        doctor(node, |command| {
            command.arg("-f").arg(web.path()).args(EXTERNAL).args(more);
        })
    };
    let before = sysctls(node);

    let by_nobody = asked(&["--vip-routes", "none"]);
    let by_a_relay = asked(&[]);

    let missing = by_nobody.about("vip-routes", "error");
    assert!(
        missing.len() == 1 && missing[0].starts_with("10.96.0.1, 10.96.0.2, 10.96.0.3 and 3 more are"),
        "{missing:?}"
    );
    let remedy = by_nobody.remedy("vip-routes");
    assert!(remedy.contains("`ip route add local 10.96.0.1/32 dev lo`"), "{remedy}");
    assert_eq!(by_nobody.code, Some(1));
    let reached = by_nobody.about("wildcard-listeners", "warning");
    let who = format!("(pid {}) at {EVERYWHERE}/TCP", std::process::id());
    assert!(reached.len() == 1 && reached[0].contains(&who), "{reached:?}");
    assert!(by_a_relay.about("vip-routes", "error").is_empty(), "it may make routes: {:?}", by_a_relay.findings);

    rig.network_local_to_node(0, ("10.96.0.0".parse().expect("an address"), 24)).expect("a route can be added");
    drop(everywhere);
    let routed = asked(&["--vip-routes", "none"]);

    let missing = routed.about("vip-routes", "error");
    assert!(missing.len() == 1 && missing[0].starts_with("fd96::1, fd96::2, fd96::3 are"), "{missing:?}");
    assert!(routed.about("vip-routes", "note")[0].starts_with("10.96.0.0/24 is local by a route of others"));
    assert!(routed.about("wildcard-listeners", "warning").is_empty(), "{:?}", routed.findings);
    assert_eq!(changed(&before, node), [] as [String; 0]);
    assert!(Rig::local_networks(node, DEFAULT_ROUTE_PROTOCOL).expect("routes are listed").is_empty());
}

fn t236_given_a_relay_that_runs_when_the_doctor_looks_then_its_services_and_its_rights_are_judged() {
    let rig = rig();
    let web = Web::default().with(local(&rig));
    let of_a_pod = CapabilitySet::NET_ADMIN | CapabilitySet::NET_BIND_SERVICE;
    let stage = Stage::start_bare(rig, &web, |command| with_only(of_a_pod, command));
    let everywhere = (Ipv4Addr::UNSPECIFIED, EVERYWHERE);
    let _everywhere = stage.rig.node(0).run(|| TcpListener::bind(everywhere)).expect("a free port");

    // Nothing is said of Services: the relay is asked for those.
    let said = doctor(stage.rig.node(0), |command| with_only(CapabilitySet::empty(), command));

    let pid = stage.relay.pids()[0];
    let rights = said.about("capabilities", "ok");
    assert!(rights.len() == 1 && rights[0].starts_with(&format!("the running kube-relay (pid {pid})")), "{rights:?}");
    let routes = said.about("vip-routes", "ok");
    assert!(routes.contains(&"6 addresses of Services: local"), "{:?}", said.findings);
    assert!(routes.iter().any(|found| found.starts_with("6 routes kept by kube-relay")), "{routes:?}");
    let rules = said.about("other-proxies", "note");
    assert!(rules.iter().any(|found| found.contains("CAP_NET_ADMIN only")), "a doctor without rights: {rules:?}");
    let reached = said.about("wildcard-listeners", "note");
    assert!(reached.len() == 1 && reached[0].contains("not known whether they are refused"), "{:?}", said.findings);
    let alarms =
        said.findings.iter().filter(|found| ["error", "warning"].contains(&found["severity"].as_str().unwrap_or("")));
    // Settings of this machine are what they are; all else is as a relay that serves wants it.
    let false_ones: Vec<_> =
        alarms.filter(|found| !SETTINGS.iter().any(|subject| found["subject"] == *subject)).collect();
    assert!(false_ones.is_empty(), "{false_ones:?}");
}

fn given_a_relay_that_was_killed_when_the_doctor_looks_then_its_routes_are_left_over() {
    let rig = rig();
    let web = Web::default().with(local(&rig));
    let mut stage = Stage::start_bare(rig, &web, |_| ());
    stage.end(Signal::KILL);

    let said = doctor(stage.rig.node(0), |_| ());

    let left = said.about("vip-routes", "warning");
    assert!(left.len() == 1 && left[0].starts_with("6 routes of a kube-relay that runs no more"), "{left:?}");
    assert!(said.remedy("vip-routes").starts_with("`kube-relay cleanup`"));
}

fn given_kube_proxys_table_when_the_doctor_looks_then_it_is_named() {
    let Some(nft) = find("nft") else { return skip("nft", "not installed") };
    let rig = rig();
    let (web, node) = (manifest(&Web::default().with(local(&rig))), rig.node(0));
    let load = |rules: &[&str]| -> io::Result<bool> {
        let mut command = Command::new(&nft);
        command.args(rules).stderr(Stdio::null());
        Ok(node.spawn(command)?.wait()?.success())
    };
    if !load(&["add", "table", "ip", "kube-proxy"]).expect("nft starts") {
        return skip("nft", "this kernel has no nftables");
    }
    assert!(load(&["add", "table", "ip", "nat"]).expect("nft starts"));
    assert!(load(&["add", "chain", "ip", "nat", "KUBE-SERVICES"]).expect("nft starts"));

    let asked = |more: &[&str]| {
        doctor(node, |command| {
            command.arg("-f").arg(web.path()).args(more);
        })
    };

    let (alone, beside) = (asked(&[]), asked(&["--proxy-name", "kube-relay"]));

    let told = "kube-proxy is here (nftables table kube-proxy, iptables chains KUBE-SERVICES";
    let found = alone.about("other-proxies", "warning");
    assert!(found.iter().any(|message| message.starts_with(told)), "{found:?}");
    let found = beside.about("other-proxies", "note");
    assert!(
        found.iter().any(|message| message.contains("leaves Services with the label of kube-relay alone")),
        "{found:?}"
    );
}
