//! The same as in `guard`, where the kernel has no nf_tables: filters of tc drop what is for who listens on all addresses.
//!
//! What they do is in `guard_program`, and what is changed when in `guard_filters`; here a kernel is asked.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use kube_relay::config::DEFAULT_ROUTE_PROTOCOL;
use kube_relay::guard::{self, VipGuard};
use kube_relay::name::Family;
use rustix::process::Signal;
use rustix::thread::CapabilitySet;

use crate::guard::{
    Everywhere, Guarded, Means, WILDCARD_PORT, ask_unconnected, assert_is_as_it_was_made, guard_and_remove,
    has_nf_tables, is_served_at_its_port, trap,
};
use crate::rig::{Case, FAMILIES, Namespace, Rig, skip, with_only, without_netfilter};
use crate::stage::{ClusterIp, Outcome, Stage, Web, ask_tcp, expect_at, until};
use crate::verdicts::{LOCAL, backends, local, rig};
use crate::vips::SOON;

pub(crate) const CASES: &[Case] = cases![
    given_filters_that_somebody_removes_when_looked_at_then_they_are_back_and_streams_go_on,
    t236_given_no_nf_tables_when_an_address_of_a_service_is_asked_then_who_listens_on_all_addresses_does_not_answer,
    t236_given_filters_when_something_begins_to_listen_or_ends_then_that_is_followed,
    t236_given_filters_when_the_doctor_looks_then_it_tells_what_guards,
    given_an_interface_that_is_new_when_somebody_asks_by_it_then_it_has_filters,
    given_a_relay_that_was_killed_when_its_routes_stay_then_so_do_filters_until_both_are_cleaned_up,
    given_filters_of_the_last_run_when_nf_tables_guards_then_they_go,
    given_a_filter_of_others_with_a_number_of_ours_when_guarded_and_cleaned_up_then_it_is_as_it_was,
];

pub(crate) const MEASURING: &[Case] = cases![given_ten_thousand_addresses_when_required_then_filters_guard_them_soon];

/// Filters, although the kernel may have nf_tables.
const FILTERS: Means = Means {
    is_possible,
    ask_for: |command| {
        command.args(["--vip-guard", "tc"]);
    },
    remove: guard::remove_filters,
    is_kept_away: is_silent,
};

/// Filters, as the kernel has no nf_tables.
const FILTERS_FOR_WANT_OF_A_TABLE: Means = Means { ask_for: without_netfilter, ..FILTERS };

/// Filters, where a table can follow them.
const FILTERS_BEFORE_A_TABLE: Means = Means { is_possible: |rig| is_possible(rig) && has_nf_tables(rig), ..FILTERS };

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

fn is_silent(outcome: &Outcome) -> bool {
    *outcome == Outcome::Silence
}

fn t236_given_no_nf_tables_when_an_address_of_a_service_is_asked_then_who_listens_on_all_addresses_does_not_answer() {
    let of_a_pod = CapabilitySet::NET_ADMIN | CapabilitySet::NET_BIND_SERVICE;
    let started = Guarded::start(&FILTERS_FOR_WANT_OF_A_TABLE, |command| with_only(of_a_pod, command));
    let Some(guarded) = started else { return };
    let stage = &guarded.stage;
    let Stage { rig, .. } = stage;

    guarded.keeps_them_apart();

    for family in FAMILIES {
        for port in [0, 2_000, 61_001] {
            let ask = |to| ask_unconnected(port, to);
            let is_answer = |outcome: &Outcome| outcome.pod().is_some();
            expect_at(rig.node(0), stage.at(ClusterIp, family), ask, "as a resolver asks, or NTP", is_answer);
        }
        let closed = SocketAddr::new(stage.at(ClusterIp, family).ip(), WILDCARD_PORT + 1);
        expect_at(rig.client(), closed, ask_tcp, "where nobody listens", |outcome| *outcome == Outcome::Refused);
    }
    assert_is_as_it_was_made(stage);
}

fn t236_given_filters_when_something_begins_to_listen_or_ends_then_that_is_followed() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = FILTERS.start(rig, &web, |_| ());

    let sshd = Everywhere::start(stage.rig.node(0));
    FILTERS.guards(&stage, stage.rig.client());
    FILTERS.guards(&stage, stage.rig.node(0));

    drop(sshd);
    is_served_at_its_port(&stage);
    assert_is_as_it_was_made(&stage);
}

fn t236_given_filters_when_the_doctor_looks_then_it_tells_what_guards() {
    let rig = rig();
    if !is_possible(&rig) {
        return;
    }
    let _sshd = Everywhere::start(rig.node(0));
    let web = Web::default().with(local(&rig));
    let mut stage = FILTERS.start(rig, &web, |_| ());
    let told = |node: &Namespace| {
        let mut doctor = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        doctor.args(["doctor", "-o", "json"]);
        without_netfilter(&mut doctor);
        let output = node.run(|| doctor.output()).expect("it starts");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };

    until("it tells of filters", || {
        told(stage.rig.node(0)).contains("filters of tc drop what is for who listens on all addresses")
    });

    stage.end(Signal::KILL); // Nobody sets them again.
    let node = stage.rig.node(0);
    assert!(node.run(|| guard::remove_filters(DEFAULT_ROUTE_PROTOCOL)).expect("they may be removed"));
    let web = tempfile::TempDir::new().expect("a folder");
    std::fs::write(web.path().join("web.yaml"), Web::default().with(local(&stage.rig)).to_string()).expect("a file");
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    doctor.args(["doctor", "-o", "json", "-f"]).arg(web.path());
    without_netfilter(&mut doctor);
    let output = node.run(|| doctor.output()).expect("it starts");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains(&format!("at {WILDCARD_PORT}/TCP")) && told.contains("of Services as well"), "{told}");
}

fn given_filters_that_somebody_removes_when_looked_at_then_they_are_back_and_streams_go_on() {
    let Some(guarded) = Guarded::start(&FILTERS, |_| ()) else { return };

    guarded.comes_back_when_removed();
}

fn given_an_interface_that_is_new_when_somebody_asks_by_it_then_it_has_filters() {
    let Some(guarded) = Guarded::start(&FILTERS, |_| ()) else { return };
    let stage = &guarded.stage;
    let pod = stage.rig.pod(0, 0);

    let to = trap(stage.at(ClusterIp, Family::V4));
    let IpAddr::V4(vip) = to.ip() else { panic!("{to} is of IPv4") };
    stage.rig.spare_cable(0, 0, vip).expect("a cable can be laid");

    expect_at(pod, to, ask_tcp, "by the new cable", is_silent);
    stage.served(pod, ClusterIp, &LOCAL);
}

fn given_a_relay_that_was_killed_when_its_routes_stay_then_so_do_filters_until_both_are_cleaned_up() {
    let Some(mut guarded) = Guarded::start(&FILTERS, |_| ()) else { return };

    guarded.outlives_its_relays();

    let mut cleanup = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    cleanup.arg("cleanup");
    without_netfilter(&mut cleanup);
    let node = guarded.stage.rig.node(0);
    let output = node.run(|| cleanup.output()).expect("it starts");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(Rig::local_networks(node, DEFAULT_ROUTE_PROTOCOL).expect("routes are listed"), []);
    assert_no_filter_is_left(node);
    match node.run(|| Command::new("tc").args(["qdisc", "show"]).output()) {
        Ok(output) => assert!(!String::from_utf8_lossy(&output.stdout).contains("clsact"), "{output:?}"),
        Err(error) => skip("tc", &error.to_string()),
    }
}

fn assert_no_filter_is_left(node: &Namespace) {
    let removed = node.run(|| guard::remove_filters(DEFAULT_ROUTE_PROTOCOL));
    assert!(!removed.expect("they may be asked for"), "there are some");
}

fn given_filters_of_the_last_run_when_nf_tables_guards_then_they_go() {
    let Some(mut guarded) = Guarded::start(&FILTERS_BEFORE_A_TABLE, |_| ()) else { return };
    let stage = &mut guarded.stage;
    stage.end(Signal::KILL);

    stage.start_again(|_| ());

    let to = trap(stage.at(ClusterIp, Family::V4));
    expect_at(stage.rig.client(), to, ask_tcp, "by the table", |outcome| *outcome == Outcome::Refused);
    assert_no_filter_is_left(stage.rig.node(0));
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
    let mut stage = FILTERS.start(rig, &web, |_| ());
    FILTERS.guards(&stage, stage.rig.node(0));
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
