//! The same as in `guard`, where the kernel has no nf_tables: filters of tc drop what is for who listens on all addresses.
//!
//! What they do is in `guard_program`, and what is changed when in `guard_filters`; here a kernel is asked.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use kube_relay::config::DEFAULT_ROUTE_PROTOCOL;
use kube_relay::guard::{self, CHECK_INTERVAL, VipGuard};
use kube_relay::name::Family;
use rustix::process::Signal;
use rustix::thread::CapabilitySet;

use crate::guard::{Everywhere, WILDCARD_PORT, ask_unconnected, guard_and_remove, is_machine, of_the_node, trap};
use crate::rig::{Case, FAMILIES, Namespace, Rig, skip, with_only, without_netfilter};
use crate::stage::{
    ClusterIp, ExternalIp, LoadBalancerIp, Outcome, Stage, Web, ask_on, ask_tcp, ask_udp, expect_at, until,
};
use crate::verdicts::{LOCAL, backends, local, rig};
use crate::vips::SOON;

pub(crate) const CASES: &[Case] = cases![
    t236_given_no_nf_tables_when_an_address_of_a_service_is_asked_then_who_listens_on_all_addresses_does_not_answer,
    t236_given_filters_when_something_begins_to_listen_or_ends_then_that_is_followed,
    t236_given_filters_when_the_doctor_looks_then_it_tells_what_guards,
    given_filters_that_somebody_removes_when_looked_at_then_they_are_back_and_streams_go_on,
    given_an_interface_that_is_new_when_somebody_asks_by_it_then_it_has_filters,
    given_a_relay_that_was_killed_when_its_routes_stay_then_so_do_filters_until_both_are_cleaned_up,
    given_filters_of_the_last_run_when_nf_tables_guards_then_they_go,
    given_a_filter_of_others_with_a_number_of_ours_when_guarded_and_cleaned_up_then_it_is_as_it_was,
];

pub(crate) const MEASURING: &[Case] = cases![given_ten_thousand_addresses_when_required_then_filters_guard_them_soon];

fn is_silent(outcome: &Outcome) -> bool {
    *outcome == Outcome::Silence
}

/// True where the kernel of this machine has what filters need. Leaves nothing behind.
fn is_possible(rig: &Rig) -> bool {
    let tc = |arguments: &[&str]| rig.node(1).run(|| Command::new("tc").args(arguments).output());
    let add = ["filter", "add", "dev", "lo", "ingress", "bpf", "da", "bytecode", "1,6 0 0 0"];
    let can = match tc(&["qdisc", "add", "dev", "lo", "clsact"]) {
        Err(_) => return true, // Nobody to ask: it has to be.
        Ok(output) => output.status.success() && tc(&add).is_ok_and(|output| output.status.success()),
    };
    let _ = tc(&["qdisc", "del", "dev", "lo", "clsact"]);
    if !can {
        skip("tc", "this kernel lacks sch_ingress or cls_bpf");
    }
    can
}

fn start(rig: Rig, web: &Web) -> Stage {
    let stage = Stage::start_bare(rig, web, by_filters);
    until("each address is guarded", || stage.metric("kuberelay_guarded_addresses", "") == 6);
    stage
}

fn by_filters(command: &mut Command) {
    command.args(["--vip-guard", "tc"]);
}

/// At each address of the Service, what listens on all addresses does not answer.
fn expect_guarded(stage: &Stage, from: &Namespace) {
    for (entry, family) in
        [ClusterIp, ExternalIp, LoadBalancerIp].into_iter().flat_map(|entry| FAMILIES.map(|f| (entry, f)))
    {
        let to = trap(stage.at(entry, family));
        expect_at(from, to, ask_tcp, "silent over TCP", is_silent);
        expect_at(from, to, ask_udp, "silent over UDP", is_silent);
    }
}

fn t236_given_no_nf_tables_when_an_address_of_a_service_is_asked_then_who_listens_on_all_addresses_does_not_answer() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let _running = backends(&rig);
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let of_a_pod = CapabilitySet::NET_ADMIN | CapabilitySet::NET_BIND_SERVICE;
    let stage = Stage::start_bare(rig, &web, |command| {
        with_only(of_a_pod, command);
        without_netfilter(command);
    });
    let Stage { rig, .. } = &stage;
    until("each address is guarded", || stage.metric("kuberelay_guarded_addresses", "") == 6);

    for from in [rig.client(), rig.pod(0, 1), rig.pod(1, 0), rig.node(0), rig.node(1)] {
        expect_guarded(&stage, from);
        for family in FAMILIES {
            expect_at(from, of_the_node(rig, family), ask_tcp, "the node's own address", is_machine);
        }
        for entry in [ClusterIp, ExternalIp, LoadBalancerIp] {
            stage.served(from, entry, &LOCAL);
        }
    }
    for family in FAMILIES {
        expect_at(rig.client(), of_the_node(rig, family), ask_udp, "the node's own address", is_machine);
        for port in [0, 2_000, 61_001] {
            let ask = |to| ask_unconnected(port, to);
            let is_answer = |outcome: &Outcome| outcome.pod().is_some();
            expect_at(rig.node(0), stage.at(ClusterIp, family), ask, "as a resolver asks, or NTP", is_answer);
        }
        let closed = SocketAddr::new(stage.at(ClusterIp, family).ip(), WILDCARD_PORT + 1);
        expect_at(rig.client(), closed, ask_tcp, "where nobody listens", |outcome| *outcome == Outcome::Refused);
    }
    assert!(!stage.log().contains("it is made again"), "nobody has changed it: {}", stage.log());
}

fn t236_given_filters_when_something_begins_to_listen_or_ends_then_that_is_followed() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = start(rig, &web);
    let from = stage.rig.client();

    let sshd = Everywhere::start(stage.rig.node(0));
    expect_guarded(&stage, from);
    expect_guarded(&stage, stage.rig.node(0));

    drop(sshd);
    stage.write(&web.to_string().replace("{name: only, port: 81,", &format!("{{name: only, port: {WILDCARD_PORT},")));
    for family in FAMILIES {
        let to = trap(stage.at(ClusterIp, family));
        expect_at(from, to, ask_tcp, "the Service", |outcome| outcome.pod().is_some_and(|pod| LOCAL.contains(&pod)));
    }
    assert!(!stage.log().contains("it is made again"), "nobody has changed it: {}", stage.log());
}

fn t236_given_filters_when_the_doctor_looks_then_it_tells_what_guards() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let stage = start(rig, &web);
    let node = stage.rig.node(0);
    let told = || {
        let mut doctor = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        doctor.args(["doctor", "-o", "json"]);
        without_netfilter(&mut doctor);
        let output = node.run(|| doctor.output()).expect("it starts");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };

    until("it tells of filters", || told().contains("filters of tc drop what is for who listens on all addresses"));

    stage.signal(Signal::STOP); // Nobody sets them again.
    assert!(node.run(|| guard::remove_filters(DEFAULT_ROUTE_PROTOCOL)).expect("they may be removed"));
    let web = tempfile::TempDir::new().expect("a folder");
    std::fs::write(web.path().join("web.yaml"), Web::default().with(local(&stage.rig)).to_string()).expect("a file");
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    doctor.args(["doctor", "-o", "json", "-f"]).arg(web.path());
    without_netfilter(&mut doctor);
    let output = node.run(|| doctor.output()).expect("it starts");
    let told = String::from_utf8_lossy(&output.stdout);
    stage.signal(Signal::CONT);
    assert!(told.contains(&format!("at {WILDCARD_PORT}/TCP")) && told.contains("of Services as well"), "{told}");
}

fn given_filters_that_somebody_removes_when_looked_at_then_they_are_back_and_streams_go_on() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let _running = backends(&rig);
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let stage = start(rig, &web);
    let mut open = FAMILIES.map(|family| {
        let to = stage.at(ClusterIp, family);
        stage.rig.client().run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).expect("it is served")
    });
    let mut goes_on = || {
        for stream in &mut open {
            let outcome = ask_on(stream).expect("the stream goes on");
            assert!(outcome.pod().is_some(), "{outcome:?}");
        }
    };
    goes_on();

    let removed = stage.rig.node(0).run(|| guard::remove_filters(DEFAULT_ROUTE_PROTOCOL));
    assert!(removed.expect("they may be removed"), "there are some");
    let began = Instant::now();

    until("that is told", || stage.log().contains("it is made again"));
    assert!(began.elapsed() < CHECK_INTERVAL + Duration::from_secs(1), "{:?}", began.elapsed());
    expect_guarded(&stage, stage.rig.client());
    goes_on();
    stage.write("apiVersion: v1\nkind: List\nitems: []\n");
    until("only what the streams hold is guarded", || stage.metric("kuberelay_guarded_addresses", "") == 2);
    goes_on();
}

fn given_an_interface_that_is_new_when_somebody_asks_by_it_then_it_has_filters() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let _running = backends(&rig);
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let stage = start(rig, &web);
    let pod = stage.rig.pod(0, 0);

    let to = trap(stage.at(ClusterIp, Family::V4));
    let IpAddr::V4(vip) = to.ip() else { panic!("{to} is of IPv4") };
    stage.rig.spare_cable(0, 0, vip).expect("a cable can be laid");

    expect_at(pod, to, ask_tcp, "by the new cable", is_silent);
    stage.served(pod, ClusterIp, &LOCAL);
}

fn given_a_relay_that_was_killed_when_its_routes_stay_then_so_do_filters_until_both_are_cleaned_up() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let _running = backends(&rig);
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let mut stage = start(rig, &web);

    for signal in [Signal::KILL, Signal::TERM] {
        stage.end(signal);
        expect_guarded(&stage, stage.rig.client());
        stage.start_again(by_filters);
        expect_guarded(&stage, stage.rig.client());
        assert!(!stage.log().contains("it is made again"), "nobody has changed it: {}", stage.log());
    }

    stage.end(Signal::KILL);
    let mut cleanup = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    cleanup.arg("cleanup");
    without_netfilter(&mut cleanup);
    let output = stage.rig.node(0).run(|| cleanup.output()).expect("it starts");
    assert!(output.status.success(), "{output:?}");
    let node = stage.rig.node(0);
    assert_eq!(Rig::local_networks(node, DEFAULT_ROUTE_PROTOCOL).expect("routes are listed"), []);
    assert!(
        !node.run(|| guard::remove_filters(DEFAULT_ROUTE_PROTOCOL)).expect("they may be asked for"),
        "none is left"
    );
    match node.run(|| Command::new("tc").args(["qdisc", "show"]).output()) {
        Ok(output) => assert!(!String::from_utf8_lossy(&output.stdout).contains("clsact"), "{output:?}"),
        Err(error) => skip("tc", &error.to_string()),
    }
}

fn given_filters_of_the_last_run_when_nf_tables_guards_then_they_go() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let possible = rig.node(0).run(|| guard::remove(DEFAULT_ROUTE_PROTOCOL));
    if possible.inspect_err(|error| skip("nf_tables", &error.to_string())).is_err() {
        return;
    }
    let _running = backends(&rig);
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let mut stage = start(rig, &web);
    stage.end(Signal::KILL);

    stage.start_again(|_| ());

    let to = trap(stage.at(ClusterIp, Family::V4));
    expect_at(stage.rig.client(), to, ask_tcp, "by the table", |outcome| *outcome == Outcome::Refused);
    let node = stage.rig.node(0);
    assert!(
        !node.run(|| guard::remove_filters(DEFAULT_ROUTE_PROTOCOL)).expect("they may be asked for"),
        "none is left"
    );
}

fn given_a_filter_of_others_with_a_number_of_ours_when_guarded_and_cleaned_up_then_it_is_as_it_was() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let tc = |rig: &Rig, arguments: &[&str]| rig.node(0).run(|| Command::new("tc").args(arguments).output());
    let made = match tc(&rig, &["qdisc", "add", "dev", "lo", "clsact"]) {
        Ok(made) => made,
        Err(error) => return skip("tc", &error.to_string()),
    };
    assert!(made.status.success(), "{made:?}");
    for number in ["10700", "10701"] {
        let pass_on = "1,6 0 0 4294967295";
        let add = ["filter", "add", "dev", "lo", "ingress", "pref", number, "protocol", "ip", "bpf", "da", "bytecode"];
        let made = tc(&rig, &[&add[..], &[pass_on]].concat()).expect("it was there before");
        assert!(made.status.success(), "{made:?}");
    }
    let show = |rig: &Rig| {
        let shown = tc(rig, &["filter", "show", "dev", "lo", "ingress"]).expect("it was there before").stdout;
        String::from_utf8_lossy(&shown).lines().filter(|line| line.contains("handle")).map(String::from).collect()
    };
    let theirs: Vec<String> = show(&rig);
    let _running = backends(&rig);
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let mut stage = start(rig, &web);
    expect_guarded(&stage, stage.rig.node(0));
    let all: Vec<String> = show(&stage.rig);
    assert!(all.len() == theirs.len() + 2 && theirs.iter().all(|line| all.contains(line)), "{all:?}");

    stage.end(Signal::KILL);
    assert!(stage.rig.node(0).run(|| guard::remove_filters(DEFAULT_ROUTE_PROTOCOL)).expect("they may be removed"));

    assert_eq!(show(&stage.rig), theirs);
}

fn given_ten_thousand_addresses_when_required_then_filters_guard_them_soon() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }

    // A machine that has other things to do as well gets another try.
    let mut tries = (0..3).map(|_| guard_and_remove(rig.node(0), VipGuard::Tc, 10_000));

    let soon = SOON * 3; // With each part of the routes that is told, all filters are made anew.
    assert!(tries.any(|guarded| guarded < soon), "never within {soon:?}");
}
