//! What a relay may do where it makes addresses local itself: as root in a pod and as nobody under systemd, with two
//! capabilities and nothing to write to.
//!
//! What it does without the right to change routes is in `vips`.

use std::fs;
use std::process::Command;

use kube_relay::config::DEFAULT_ROUTE_PROTOCOL;
use rustix::process::Signal;
use rustix::thread::CapabilitySet;

use crate::rig::{Case, NOBODY, Rig, as_nobody_with, on_a_read_only_root, skip, with_only};
use crate::stage::{ClusterIp, ExternalIp, LoadBalancerIp, Stage, Web, until};
use crate::verdicts::{LOCAL, backends, local, rig};

pub(crate) const CASES: &[Case] = cases![
    given_a_pods_rights_and_a_read_only_root_when_a_relay_runs_then_it_makes_routes_and_serves,
    given_a_system_services_rights_and_a_read_only_root_when_a_relay_runs_then_it_makes_routes_and_serves,
];

/// Routes; ports below 1024.
const NEEDED: CapabilitySet = CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_BIND_SERVICE);

fn given_a_pods_rights_and_a_read_only_root_when_a_relay_runs_then_it_makes_routes_and_serves() {
    serves_with_what_it_needs(0, |command| with_only(NEEDED, command));
}

fn given_a_system_services_rights_and_a_read_only_root_when_a_relay_runs_then_it_makes_routes_and_serves() {
    let users = fs::read_to_string("/proc/self/uid_map").expect("it is ours");
    let mapped = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let (Some(Ok(first)), Some(Ok(_)), Some(Ok(count))) = (numbers.next(), numbers.next(), numbers.next()) else {
            return false;
        };
        (first..first.saturating_add(count)).contains(&NOBODY)
    };
    if !users.lines().any(mapped) {
        return skip("nobody", "there is no other user in this user namespace: run it as root");
    }
    serves_with_what_it_needs(NOBODY, |command| as_nobody_with(NEEDED, command));
}

fn serves_with_what_it_needs(user: u32, become_it: impl FnOnce(&mut Command)) {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));

    let mut stage = Stage::start_bare(rig, &web, |command| {
        command.args(["--vip-routes-at-exit", "remove"]);
        on_a_read_only_root(command);
        become_it(command);
    });

    assert_eq!(rights(&stage), (user, NEEDED.bits(), true));
    for entry in [ClusterIp, ExternalIp, LoadBalancerIp] {
        stage.served(stage.rig.client(), entry, &LOCAL);
    }
    let ours =
        |stage: &Stage| Rig::local_networks(stage.rig.node(0), DEFAULT_ROUTE_PROTOCOL).expect("routes are listed");
    let all = ours(&stage);
    assert_eq!(all.len(), 6, "{all:?}");
    stage.rig.network_foreign_to_node(0, all[0]).expect("it is there");
    until("it is back", || ours(&stage) == all);
    stage.end(Signal::TERM);
    assert_eq!(ours(&stage), [], "as was asked for");
}

/// Whose the relay is, with which capabilities, and whether its root file system is read-only.
fn rights(stage: &Stage) -> (u32, u64, bool) {
    let pid = stage.relay.pids()[0];
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).expect("it runs");
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("each process has one");
        line.split_whitespace().next().expect("it is not empty").to_owned()
    };
    let mounts = read("mounts");
    let mut root = mounts.lines().filter_map(|line| line.split(' ').nth(1).zip(line.split(' ').nth(3)));
    let is_read_only = root.any(|(at, options)| at == "/" && options.split(',').any(|option| option == "ro"));
    let capabilities = u64::from_str_radix(&field("CapPrm:"), 16).expect("a number");
    (field("Uid:").parse().expect("a number"), capabilities, is_read_only)
}
