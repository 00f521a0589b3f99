//! Whom backends see of a Service that wants its clients' addresses preserved: from everywhere, at every entry, and where that
//! cannot be; and what is left of it when the relay has ended.
//!
//! What is judged how is in `serve::preserve`; here a kernel and its routes are asked.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::cleanup::{Removed, remove_routes};
use kube_relay::config::{DEFAULT_EJECT_AFTER, DEFAULT_ROUTE_PROTOCOL};
use kube_relay::name::Family;
use kube_relay::reply_message::route_table;
use kube_relay::reply_path::{self, CHECK_INTERVAL};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::CapabilitySet;

use crate::beside::load;
use crate::rig::{Case, FAMILIES, Lan, Namespace, Rig, Shape, find, full, skip, with_only, without_netfilter};
use crate::stage::{
    Backends, ClusterIp, ENTRIES, Entry, ExternalIp, Outcome, Pod, Stage, UDP_BACKEND_PORT, Web, answer, ask_on,
    ask_tcp, ask_udp, ask_udp_on, expect_at, until,
};
use crate::verdicts::{backends, local, rig};
use crate::vips::in_runtime;

pub(crate) const CASES: &[Case] = cases![
    t126_given_a_pod_that_answers_nobody_when_a_client_goes_on_then_it_is_seen_until_the_service_wants_that_no_more,
    t126_given_one_client_that_a_pod_drops_when_others_ask_then_they_stay_seen_and_it_is_served_from_the_node,
    t126_t113_given_backends_here_when_clients_ask_at_every_entry_then_backends_see_them_and_the_node_itself_never,
    t126_given_no_annotation_when_clients_ask_then_backends_see_the_node_and_nothing_is_changed_on_it,
    t126_given_a_backend_elsewhere_when_it_answers_past_this_node_then_it_sees_the_node_soon_and_the_reason_is_told,
    t126_given_pods_that_are_answered_here_when_a_neighbour_is_answered_past_this_node_then_it_is_served_soon,
    t126_given_one_client_that_a_pod_refuses_when_others_are_let_in_then_it_alone_is_not_served,
    t126_given_a_pod_that_refuses_all_but_the_node_when_clients_ask_then_they_are_served_from_the_node,
    f07_t126_given_a_pod_that_refuses_when_clients_ask_then_another_one_sees_them_at_once_and_it_is_ejected,
    t126_given_a_client_on_the_backends_own_link_when_it_asks_then_the_backend_sees_the_node,
    t126_given_a_pod_that_asks_its_own_service_when_it_is_the_backend_then_it_sees_the_node,
    t126_given_a_balancer_in_front_when_it_names_a_client_then_the_backend_sees_that_one,
    t126_given_no_right_to_lead_answers_when_clients_ask_then_they_are_served_and_the_reason_is_told,
    t126_given_a_kernel_without_netfilter_when_clients_ask_then_they_are_served_and_the_reason_is_told,
    t126_given_a_service_that_comes_to_preserve_when_clients_ask_then_new_connections_are_seen_so,
    f15_given_two_source_ports_when_one_client_has_many_connections_then_each_has_the_clients_own_port,
    f15_given_two_source_ports_when_several_clients_have_flows_then_each_client_has_both,
    f15_given_a_client_that_holds_all_ports_of_the_nodes_range_when_the_node_connects_then_it_has_a_port,
    t126_f25_given_streams_and_flows_with_clients_addresses_when_upgraded_then_they_go_on_and_answers_still_come,
    given_a_relay_that_was_killed_when_another_runs_then_rules_are_there_once_and_cleanup_takes_them_away,
    given_routes_that_go_at_exit_when_the_relay_ends_then_so_does_what_leads_answers_here,
];

pub(crate) const MEASURING: &[Case] = cases![
    given_somebody_who_takes_the_rules_away_when_clients_ask_then_they_are_served_and_seen_again,
    given_somebody_who_takes_the_rules_of_routes_away_when_a_connection_is_open_then_it_goes_on,
];

/// What a client may notice of a way back that is not there: far less than a retry of its own.
const BOUND: Duration = Duration::from_millis(1_000);

pub(crate) fn preserving() -> Web {
    Web { preserves: true, ..Web::default() }
}

/// True where the kernel of this machine can lead answers anywhere at all.
pub(crate) fn is_possible(node: &Namespace) -> bool {
    let probe = node.run(|| reply_path::remove(DEFAULT_ROUTE_PROTOCOL));
    probe.inspect_err(|error| skip("nf_tables", &error.to_string())).is_ok()
}

/// A relay with one backend on its node, whose Service preserves. `None` where that cannot be, or where `prepare` says that
/// what the case needs of the rig cannot.
pub(crate) fn preserved(prepare: impl FnOnce(&Rig) -> bool) -> Option<(Stage, Backends)> {
    let rig = rig();
    if !is_possible(rig.node(0)) || !prepare(&rig) {
        return None;
    }
    let running = backends(&rig);
    let pods = [Pod::of(&rig, 0, 0)];
    Some((Stage::start(rig, &preserving().with(pods)), running))
}

/// As [`preserved`], with nothing to prepare.
pub(crate) fn preserved_at_once() -> Option<(Stage, Backends)> {
    preserved(|_| true)
}

/// Asks at an entry in both families, over TCP and UDP, until backends see this address of a part.
pub(crate) fn sees(stage: &Stage, from: &Namespace, entry: Entry, seen: &Namespace) {
    thread::scope(|scope| {
        for family in FAMILIES {
            let to = stage.at(entry, family);
            let right = move |outcome: &Outcome| is_from(outcome, seen.address(family));
            let what = format!("{entry:?}: the backend sees {seen:?}");
            let of_udp = what.clone();
            scope.spawn(move || expect_at(from, to, ask_tcp, &what, right));
            scope.spawn(move || expect_at(from, to, ask_udp, &of_udp, right));
        }
    });
}

/// The same, where the node that the relay is on is seen: by any of its addresses.
fn sees_node(stage: &Stage, from: &Namespace, entry: Entry) {
    let rig = &stage.rig;
    let strangers: Vec<IpAddr> = rig
        .parts()
        .filter(|part| part.name() != rig.node(0).name())
        .flat_map(|part| FAMILIES.map(|family| part.address(family)))
        .collect();
    let right = |outcome: &Outcome| match outcome {
        Outcome::Answer { source, .. } => !strangers.contains(source),
        _ => false,
    };
    stage.expect(from, entry, "the backend sees the node", right);
}

pub(crate) fn is_from(outcome: &Outcome, address: IpAddr) -> bool {
    matches!(outcome, Outcome::Answer { source, .. } if *source == address)
}

fn t126_t113_given_backends_here_when_clients_ask_at_every_entry_then_backends_see_them_and_the_node_itself_never() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = backends(&rig);
    let one = [Pod::of(&rig, 0, 0)];
    let stage = Stage::start(rig, &preserving().with(one.clone()));
    let Stage { rig, .. } = &stage;

    for external_policy in ["", "Local"] {
        stage.change_if_other(&Web { external_policy, ..preserving().with(one.clone()) });
        for entry in ENTRIES {
            for client in [rig.client(), rig.pod(0, 1), rig.pod(1, 1), rig.node(1)] {
                sees(&stage, client, entry, client);
            }
            sees_node(&stage, rig.node(0), entry);
        }
    }

    assert!(stage.metric("kuberelay_source_preserved_total", "") > 0);
    assert!(stage.metric("kuberelay_source_fallbacks_total", "reason=\"node_local\"") > 0);
    assert_eq!(stage.metric("kuberelay_source_fallbacks_total", "reason=\"no_way_back\""), 0);
}

fn t126_given_no_annotation_when_clients_ask_then_backends_see_the_node_and_nothing_is_changed_on_it() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = Stage::start(rig, &web);
    let Stage { rig, .. } = &stage;

    for entry in ENTRIES {
        for client in [rig.client(), rig.pod(0, 1), rig.node(0)] {
            sees_node(&stage, client, entry);
        }
    }

    assert_eq!(rules(rig.node(0)), 0);
    assert_eq!(stage.metric("kuberelay_source_", ""), 0);
}

fn t126_given_a_backend_elsewhere_when_it_answers_past_this_node_then_it_sees_the_node_soon_and_the_reason_is_told() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = backends(&rig);
    let far = [Pod::of(&rig, 1, 0)];
    let stage = Stage::start(rig, &preserving().with(far));
    let Stage { rig, .. } = &stage;

    for family in FAMILIES {
        let (to, begin) = (stage.at(ClusterIp, family), Instant::now());
        let outcome = rig.client().run(|| Ok(ask_tcp(to))).expect("the namespace is ours");
        assert!(is_from(&outcome, rig.node(0).address(family)), "{outcome:?}");
        assert!(begin.elapsed() < BOUND, "the very first connection has waited for {:?}", begin.elapsed());
    }
    sees_node(&stage, rig.client(), ClusterIp);
    sees_node(&stage, rig.pod(1, 1), ExternalIp);
    // A pod of this node has no other way.
    for entry in ENTRIES {
        sees(&stage, rig.pod(0, 0), entry, rig.pod(0, 0));
    }

    let of = |labels: &str| stage.metric("kuberelay_source_fallbacks_total", labels);
    assert!(of("protocol=\"TCP\",reason=\"no_way_back\"") > 0 && of("protocol=\"UDP\",reason=\"no_way_back\"") > 0);
    assert_eq!(stage.metric("kuberelay_connect_failures_total", ""), 0, "that is no fault of the backend");
    assert_eq!(stage.metric("kuberelay_ejections_total", ""), 0);
    assert!(stage.log().contains("no_way_back"), "it is said why");
}

fn t126_given_pods_that_are_answered_here_when_a_neighbour_is_answered_past_this_node_then_it_is_served_soon() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let lan = match Lan::lay(&rig) {
        Ok(lan) => lan,
        Err(error) => return skip("bridge", &error.to_string()),
    };
    let _running = backends(&rig);
    let far = [Pod::of(&rig, 1, 0)];
    let stage = Stage::start(rig, &preserving().with(far));
    let Stage { rig, .. } = &stage;
    let (neighbour, pod, is_over) = (rig.client(), rig.pod(0, 0), AtomicBool::new(false));

    thread::scope(|scope| {
        let stop = StopAtEnd(&is_over);
        for family in FAMILIES {
            let to = stage.at(ClusterIp, family);
            lan.lead(neighbour, to.ip(), 0).expect("a route can be added");
            expect_at(pod, to, ask_udp, "the pod is seen", |outcome| is_from(outcome, pod.address(family)));
            let is_over = &is_over;
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let outcome = pod.run(|| Ok(ask_udp(to))).expect("the namespace is ours");
                    assert!(is_from(&outcome, pod.address(family)), "{outcome:?}");
                }
            });
        }
        for family in FAMILIES {
            let (to, node) = (stage.at(ClusterIp, family), rig.node(0).address(family));
            let (outcome, questions) = neighbour.run(|| ask_again_and_again(to)).expect("it is served");
            assert!(is_from(&outcome, node) && questions <= 2, "{outcome:?} after {questions} questions");

            let outcome = neighbour.run(|| Ok(ask_udp(to))).expect("the namespace is ours");
            assert!(is_from(&outcome, node), "by its first question from then on: {outcome:?}");
            let outcome = neighbour.run(|| Ok(ask_tcp(to))).expect("the namespace is ours");
            assert!(is_from(&outcome, node), "{outcome:?}");
        }
        drop(stop);
    });
}

/// Ends those who ask all the time, also where a case fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Asks over one socket, as resolvers do that ask again; tells how many questions it took.
fn ask_again_and_again(to: SocketAddr) -> io::Result<(Outcome, usize)> {
    const MOST: usize = 4;
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_millis(400)))?;
    let mut buffer = [0; 256];
    for number in 1..=MOST {
        socket.send(b"?")?;
        if let Ok(length) = socket.recv(&mut buffer) {
            return Ok((answer(&String::from_utf8_lossy(&buffer[..length])), number));
        }
    }
    Ok((Outcome::Silence, MOST))
}

/// Gives the first pod a policy, by a program that can write it. False, and says why, where there is none.
fn has_policy(rig: &Rig, rules: &str) -> bool {
    let Some(nft) = find("nft") else {
        skip("nft", "not installed");
        return false;
    };
    let table = format!("table inet trial {{\nchain input {{\ntype filter hook input priority 0; {rules}\n}}\n}}\n");
    match load(&nft, rig.pod(0, 0), &table) {
        Ok(()) => true,
        Err(reason) => {
            assert!(reason.contains("Could not process"), "{reason}");
            skip("nft", &reason);
            false
        }
    }
}

/// What is known of a way back is known by family: one need not wait for the other.
fn in_both_families(work: impl Fn(Family) + Sync) {
    let work = &work;
    thread::scope(|scope| {
        for family in FAMILIES {
            scope.spawn(move || work(family));
        }
    });
}

/// Who it is, for a policy.
fn named(part: &Namespace) -> [String; 2] {
    [("ip", Family::V4), ("ip6", Family::V6)].map(|(word, family)| format!("{word} saddr {}", part.address(family)))
}

fn t126_given_one_client_that_a_pod_drops_when_others_ask_then_they_stay_seen_and_it_is_served_from_the_node() {
    // More than the failures in a row that eject a backend.
    let rounds = if full() { 8 } else { DEFAULT_EJECT_AFTER.get() + 1 };
    let drops = |rig: &Rig| {
        let [v4, v6] = named(rig.client());
        has_policy(rig, &format!("{v4} drop; {v6} drop;"))
    };
    let Some((stage, _running)) = preserved(drops) else { return };
    let Stage { rig, .. } = &stage;
    let (denied, allowed) = (rig.client(), rig.pod(1, 1));

    for family in FAMILIES {
        let to = stage.at(ClusterIp, family);
        let is_node = |outcome: &Outcome| outcome.pod().is_some() && !is_from(outcome, denied.address(family));
        for _ in 0..rounds {
            let outcome = denied.run(|| Ok(ask_tcp(to))).expect("the namespace is ours");
            assert!(is_node(&outcome), "{outcome:?}");
            let (outcome, questions) = denied.run(|| ask_again_and_again(to)).expect("it is served");
            assert!(is_node(&outcome) && questions <= 2, "{outcome:?} after {questions} questions");
            for ask in [ask_tcp, ask_udp] {
                let outcome = allowed.run(|| Ok(ask(to))).expect("the namespace is ours");
                assert!(is_from(&outcome, allowed.address(family)), "{outcome:?}");
            }
        }
    }
    assert_eq!(stage.metric("kuberelay_ejections_total", ""), 0);
}

fn t126_given_one_client_that_a_pod_refuses_when_others_are_let_in_then_it_alone_is_not_served() {
    let refuses = |rig: &Rig| {
        let of = |client| format!("{client} meta l4proto tcp reject with tcp reset; {client} reject;");
        has_policy(rig, &named(rig.client()).map(of).concat())
    };
    let Some((stage, _running)) = preserved(refuses) else { return };
    let Stage { rig, .. } = &stage;
    let (denied, allowed) = (rig.client(), rig.pod(1, 1));

    sees(&stage, allowed, ClusterIp, allowed);
    in_both_families(|family| {
        let to = stage.at(ClusterIp, family);
        for ask in [ask_tcp, ask_udp].into_iter().cycle().take(12) {
            let outcome = denied.run(|| Ok(ask(to))).expect("the namespace is ours");
            assert!(outcome.pod().is_none(), "{outcome:?}");
        }
    });

    sees(&stage, allowed, ClusterIp, allowed);
    assert!(stage.metric("kuberelay_service_dropped_total", "reason=\"denied_address\"") > 0);
    assert_eq!(stage.metric("kuberelay_ejections_total", ""), 0, "that is no fault of the backend");
}

fn t126_given_a_pod_that_answers_nobody_when_a_client_goes_on_then_it_is_seen_until_the_service_wants_that_no_more() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let pods = [Pod::of(&rig, 0, 0)];
    let stage = Stage::start(rig, &preserving().with(pods.clone()));
    let (client, pod, to) = (stage.rig.client(), stage.rig.pod(0, 0), stage.at(ClusterIp, Family::V4));
    let sink = pod.run(|| UdpSocket::bind((pod.address(Family::V4), UDP_BACKEND_PORT))).expect("the port is free");
    sink.set_read_timeout(Some(Duration::from_millis(50))).expect("an option");
    let socket = client.run(|| UdpSocket::bind(("0.0.0.0", 0))).expect("a port is free");
    socket.connect(to).expect("there is a route");
    let heard = |time: Duration| -> Vec<bool> {
        let begin = Instant::now();
        let told = std::iter::from_fn(|| {
            thread::sleep(Duration::from_millis(5)); // The pace of the client.
            socket.send(b"line").expect("it is sent");
            (begin.elapsed() < time).then(|| sink.recv_from(&mut [0; 16]).map(|(_, from)| from.ip()))
        });
        told.flatten().map(|source| source == client.address(Family::V4)).collect()
    };

    let first = heard(Duration::from_secs(4));

    let as_client = first.iter().filter(|is_client| **is_client).count();
    let changes = first.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(as_client * 2 > first.len() && changes <= 8, "{as_client} of {}, {changes} changes", first.len());

    stage.change(&Web::default().with(pods));

    until("the node is seen", || heard(Duration::from_millis(50)).last() == Some(&false));
    let later = heard(Duration::from_millis(1_500));
    assert!(!later.is_empty() && !later.contains(&true), "no flow shows its client again");
}

fn t126_given_a_pod_that_refuses_all_but_the_node_when_clients_ask_then_they_are_served_from_the_node() {
    let refuses = |rig: &Rig| {
        let rules = [rig.client(), rig.pod(1, 1)].map(|part| {
            let [v4, v6] = named(part);
            format!("{v4} reject with icmp type admin-prohibited; {v6} reject with icmpv6 type admin-prohibited;")
        });
        has_policy(rig, &rules.concat())
    };
    let Some((stage, _running)) = preserved(refuses) else { return };
    let Stage { rig, .. } = &stage;

    for family in FAMILIES {
        let to = stage.at(ClusterIp, family);
        for client in [rig.client(), rig.pod(1, 1)].into_iter().cycle().take(6) {
            let (outcome, questions) = client.run(|| ask_again_and_again(to)).expect("it is served");
            assert!(outcome.pod().is_some() && questions <= 2, "{outcome:?} after {questions} questions");
            let outcome = client.run(|| Ok(ask_tcp(to))).expect("the namespace is ours");
            assert!(outcome.pod().is_some() && !is_from(&outcome, client.address(family)), "{outcome:?}");
        }
    }

    assert!(stage.metric("kuberelay_source_fallbacks_total", "reason=\"refused\"") > 0);
    assert_eq!(stage.metric("kuberelay_ejections_total", ""), 0);
}

fn f07_t126_given_a_pod_that_refuses_when_clients_ask_then_another_one_sees_them_at_once_and_it_is_ejected() {
    const ENOUGH: usize = 4 * DEFAULT_EJECT_AFTER.get() as usize;
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = Backends::start([rig.pod(0, 0)]);
    let web = preserving().with(local(&rig));
    let stage = Stage::start(rig, &web);
    let client = stage.rig.client();

    for family in FAMILIES {
        let to = stage.at(ClusterIp, family);
        for _ in 0..ENOUGH {
            let outcome = client.run(|| Ok(ask_tcp(to))).expect("the namespace is ours");
            assert!(is_from(&outcome, client.address(family)), "{outcome:?}");
        }
    }
    assert_eq!(stage.metric("kuberelay_ejections_total", ""), 2, "one in each family");
    let tries = stage.metric("kuberelay_connect_failures_total", "reason=\"refused\"");
    assert_eq!(tries, 2 * u64::from(DEFAULT_EJECT_AFTER.get()), "each a connection that the other pod has got");
}

fn t126_given_a_client_on_the_backends_own_link_when_it_asks_then_the_backend_sees_the_node() {
    let rig = Rig::build(Shape { nodes: 2, pods_per_node: 1, router: true }).expect("the rig builds");
    if !is_possible(rig.node(0)) {
        return;
    }
    let lan = match Lan::lay(&rig) {
        Ok(lan) => lan,
        Err(error) => return skip("bridge", &error.to_string()),
    };
    let _running = Backends::start_at(rig.node(1), Lan::node(1));
    let stage = Stage::start(rig, &preserving().with([Pod::at(Lan::node(1), "node1")]));
    let Stage { rig, .. } = &stage;
    for family in FAMILIES {
        lan.lead(rig.client(), stage.at(ClusterIp, family).ip(), 0).expect("a route can be added");
    }

    for family in FAMILIES {
        let (to, node) = (stage.at(ClusterIp, family), Lan::node(0).of(family));
        for ask in [ask_tcp, ask_udp] {
            let begin = Instant::now();
            expect_at(rig.client(), to, ask, "the node is seen", |outcome| is_from(outcome, node));
            assert!(begin.elapsed() < BOUND, "nobody had to find that out");
        }
    }

    assert!(stage.metric("kuberelay_source_fallbacks_total", "reason=\"same_link\"") >= 4);
    assert_eq!(stage.metric("kuberelay_source_preserved_total", ""), 0);
}

fn t126_given_a_pod_that_asks_its_own_service_when_it_is_the_backend_then_it_sees_the_node() {
    let Some((stage, _running)) = preserved_at_once() else { return };

    for entry in ENTRIES {
        sees_node(&stage, stage.rig.pod(0, 0), entry);
    }
    assert_eq!(stage.metric("kuberelay_source_preserved_total", ""), 0);
}

fn t126_given_a_balancer_in_front_when_it_names_a_client_then_the_backend_sees_that_one() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = backends(&rig);
    let balancers = FAMILIES.map(|family| rig.client().address(family).to_string()).join(",");
    let web = Web { accepts_proxy: true, ..preserving().with([Pod::of(&rig, 0, 0)]) };
    let flags = ["--nodeport-addresses", "primary", "--accept-proxy-from", &balancers];
    let stage = Stage::start_with(rig, &web, &flags);
    let (balancer, named) = (stage.rig.client(), stage.rig.pod(1, 1));

    for family in FAMILIES {
        let to = stage.at(ClusterIp, family);
        let mut stream = balancer.run(|| TcpStream::connect(to)).expect("it is served");
        let word = if to.is_ipv4() { "TCP4" } else { "TCP6" };
        let header = format!("PROXY {word} {} {} 40000 {}\r\n", named.address(family), to.ip(), to.port());
        stream.write_all(header.as_bytes()).expect("a connection");

        let outcome = ask_on(&mut stream).expect("it answers");

        assert!(is_from(&outcome, named.address(family)), "{outcome:?}");
    }
    for family in FAMILIES {
        let stranger = stage.rig.pod(1, 1).run(|| Ok(ask_tcp(stage.at(ClusterIp, family))));
        let outcome = stranger.expect("the namespace is ours");
        assert!(outcome.pod().is_none(), "who is no balancer is not served: {outcome:?}");
    }
}

fn t126_given_no_right_to_lead_answers_when_clients_ask_then_they_are_served_and_the_reason_is_told() {
    served_without_preserving(|command| with_only(CapabilitySet::NET_BIND_SERVICE, command), "CAP_NET_ADMIN");
}

fn t126_given_a_kernel_without_netfilter_when_clients_ask_then_they_are_served_and_the_reason_is_told() {
    served_without_preserving(without_netfilter, "nft_socket");
}

/// Starts a relay in such a way: it serves from the node's address, and says why, with a remedy.
fn served_without_preserving(prepare: fn(&mut Command), remedy: &str) {
    let rig = rig();
    let _running = backends(&rig);
    let web = preserving().with(local(&rig));

    let stage = {
        for number in [1, 3] {
            rig.vip(0, number).expect("an address can be added");
        }
        rig.routed_vip(0, 2).expect("a route can be added");
        Stage::start_bare(rig, &web, prepare)
    };

    sees_node(&stage, stage.rig.client(), ClusterIp);
    assert!(stage.metric("kuberelay_source_fallbacks_total", "reason=\"reply_path\"") > 0);
    assert!(stage.reports("reply_path"), "status tells it, too");
    let is_said = |log: &str| log.lines().any(|line| line.contains("preserved") && line.contains(remedy));
    assert!(is_said(&stage.log()), "it is said, with the remedy");
    let report = stage.report_of("default/web");
    assert!(report.contains("\"sourceAddressRefused\":\"") && report.contains(remedy), "{report}");
    assert_eq!(rules(stage.rig.node(0)), 0, "nothing is left of what was tried");
}

fn t126_given_a_service_that_comes_to_preserve_when_clients_ask_then_new_connections_are_seen_so() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = backends(&rig);
    let pods = [Pod::of(&rig, 0, 0)];
    let stage = Stage::start(rig, &Web::default().with(pods.clone()));
    let client = stage.rig.client();
    let to = stage.at(ClusterIp, Family::V4);
    let is_seen = |stream: &mut TcpStream| {
        let outcome = ask_on(stream).expect("it answers");
        assert!(outcome.pod().is_some(), "{outcome:?}");
        is_from(&outcome, client.address(Family::V4))
    };
    let mut open = client.run(|| TcpStream::connect(to)).expect("it is served");
    assert!(!is_seen(&mut open));

    stage.change(&preserving().with(pods.clone()));

    sees(&stage, client, ClusterIp, client);
    assert!(!is_seen(&mut open), "it goes on as it was");
    let mut preserved = client.run(|| TcpStream::connect(to)).expect("it is served");
    assert!(is_seen(&mut preserved));

    stage.change(&Web::default().with(pods));

    sees_node(&stage, client, ClusterIp);
    assert!(is_seen(&mut preserved), "it goes on as it was");
}

fn f15_given_two_source_ports_when_one_client_has_many_connections_then_each_has_the_clients_own_port() {
    const CONNECTIONS: usize = 16;
    let has_two_ports = |rig: &Rig| {
        rig.node(0).sysctl("net/ipv4/ip_local_port_range", "61000 61001").expect("it is ours");
        true
    };
    let Some((stage, _running)) = preserved(has_two_ports) else { return };
    let client = stage.rig.client();

    for family in FAMILIES {
        let to: SocketAddr = stage.at(ClusterIp, family);
        let mut open = client
            .run(|| (0..CONNECTIONS).map(|_| TcpStream::connect(to)).collect::<Result<Vec<_>, _>>())
            .expect("it listens");
        for stream in &mut open {
            assert!(is_from(&ask_on(stream).expect("it answers"), client.address(family)));
        }
    }
    assert_eq!(stage.metric("kuberelay_source_preserved_total", "protocol=\"TCP\""), 2 * CONNECTIONS as u64);
    assert_eq!(stage.metric("kuberelay_source_fallbacks_total", ""), 0);
}

fn f15_given_a_client_that_holds_all_ports_of_the_nodes_range_when_the_node_connects_then_it_has_a_port() {
    const PORTS: usize = 10;
    let have_few_ports = |rig: &Rig| {
        for part in [rig.node(0), rig.client()] {
            part.sysctl("net/ipv4/ip_local_port_range", "61000 61009").expect("it is ours");
        }
        true
    };
    let Some((stage, _running)) = preserved(have_few_ports) else { return };
    let (client, node) = (stage.rig.client(), stage.rig.node(0));

    for family in FAMILIES {
        let to = stage.at(ClusterIp, family);
        let mut open = client
            .run(|| (0..PORTS).map(|_| TcpStream::connect(to)).collect::<Result<Vec<_>, _>>())
            .expect("it has so many ports");
        for stream in &mut open {
            assert!(is_from(&ask_on(stream).expect("it answers"), client.address(family)));
        }

        let outcome = node.run(|| Ok(ask_tcp(to))).expect("the namespace is ours");

        assert!(outcome.pod().is_some(), "{outcome:?}");
    }
}

fn f15_given_two_source_ports_when_several_clients_have_flows_then_each_client_has_both() {
    const PORTS: [u16; 2] = [40_000, 40_001];
    let Some((stage, _running)) = preserved_at_once() else { return };
    let Stage { rig, .. } = &stage;
    let clients = [rig.client(), rig.pod(0, 1), rig.pod(1, 1), rig.node(1)];
    clients.into_iter().for_each(|client| sees(&stage, client, ClusterIp, client));
    rig.node(0).sysctl("net/ipv4/ip_local_port_range", "40000 40001").expect("it is ours");

    let each = FAMILIES.into_iter().flat_map(|family| clients.map(|client| (family, client)));
    let each = each.flat_map(|(family, client)| PORTS.map(|port| (family, client, port)));
    let flows: Vec<_> = each
        .map(|(family, client, port)| {
            let flow = client.run(|| UdpSocket::bind((client.address(family), port))).expect("its own port is free");
            flow.connect(stage.at(ClusterIp, family)).expect("there is a route");
            (client.address(family), flow)
        })
        .collect();

    for (client, flow) in flows.iter().chain(&flows) {
        let outcome = ask_udp_on(flow).expect("it answers");
        assert!(is_from(&outcome, *client), "{outcome:?}");
    }
    assert_eq!(stage.metric("kuberelay_source_fallbacks_total", "reason=\"local_ports\""), 0);
}

/// Has a client's stream and flow be answered, whose backend sees the client.
fn are_seen(client: &Namespace, family: Family, stream: &mut TcpStream, flow: &UdpSocket) {
    for outcome in [ask_on(stream), ask_udp_on(flow)] {
        let outcome = outcome.expect("it goes on");
        assert!(is_from(&outcome, client.address(family)), "{outcome:?}");
    }
}

/// The process that serves after upgrades, which is nobody's child here. Ended with the test.
struct Serving(Option<Pid>);

impl Serving {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.0 {
            let _ = kill_process(pid, signal); // It may have ended.
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Has the relay on a node replaced by another one; that one's process.
fn upgrade(stage: &Stage, state: &Path) -> Pid {
    let mut order = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    order.args(["upgrade", "--state-dir"]).arg(state);
    let output = stage.rig.node(0).run(|| order.output()).expect("it starts");
    assert!(output.status.success(), "{output:?}\n{}", stage.log());
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let pid = told.split(' ').nth(1).and_then(|pid| Pid::from_raw(pid.parse().ok()?));
    pid.unwrap_or_else(|| panic!("no process is told: {told}"))
}

fn t126_f25_given_streams_and_flows_with_clients_addresses_when_upgraded_then_they_go_on_and_answers_still_come() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let (_running, state) = (backends(&rig), tempfile::tempdir().expect("a folder can be made"));
    let pods = [Pod::of(&rig, 0, 0)];
    let stage = Stage::start_bare(rig, &preserving().with(pods), |command| {
        command.args(["--vip-routes-at-exit", "remove", "--state-dir"]).arg(state.path());
    });
    let (client, node) = (stage.rig.client(), stage.rig.node(0));
    let mut open = FAMILIES.map(|family| {
        let (to, own) = (stage.at(ClusterIp, family), SocketAddr::new(client.address(family), 0));
        let both = client.run(|| {
            let flow = UdpSocket::bind(own)?;
            flow.connect(to)?;
            Ok((TcpStream::connect(to)?, flow))
        });
        (family, both.expect("it is served"))
    });
    for (family, (stream, flow)) in &mut open {
        are_seen(client, *family, stream, flow);
    }

    let mut serving = Serving(None);
    for _ in 0..2 {
        serving.0 = Some(upgrade(&stage, state.path()));

        for (family, (stream, flow)) in &mut open {
            are_seen(client, *family, stream, flow);
        }
        sees(&stage, client, ClusterIp, client);
        assert_eq!(rules(node), 2, "the last one has left them");
    }
    drop(open); // It would wait for these.
    serving.signal(Signal::TERM);
    until("the last one takes them along", || rules(node) == 0);
}

/// How many rules lead answers here, of both families.
pub(crate) fn rules(node: &Namespace) -> usize {
    Rig::rules_into(node, route_table(DEFAULT_ROUTE_PROTOCOL)).expect("rules are listed")
}

fn given_a_relay_that_was_killed_when_another_runs_then_rules_are_there_once_and_cleanup_takes_them_away() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = backends(&rig);
    let pods = [Pod::of(&rig, 0, 0)];
    let mut stage = Stage::start_bare(rig, &preserving().with(pods), |_| ());
    assert_eq!(rules(stage.rig.node(0)), 2, "one for each family");

    for _ in 0..2 {
        stage.end(Signal::KILL);
        assert_eq!(rules(stage.rig.node(0)), 2, "they stay");
        stage.start_again(|_| ());
        sees(&stage, stage.rig.client(), ClusterIp, stage.rig.client());
        assert_eq!(rules(stage.rig.node(0)), 2, "and are there once");
    }
    stage.end(Signal::KILL);

    let removed = in_runtime(stage.rig.node(0), remove_routes(DEFAULT_ROUTE_PROTOCOL)).expect("nobody runs");
    assert!(removed.reply_path && removed.routes > 0, "{removed:?}");
    assert_eq!(rules(stage.rig.node(0)), 0);
    let again = in_runtime(stage.rig.node(0), remove_routes(DEFAULT_ROUTE_PROTOCOL)).expect("nobody runs");
    assert_eq!(again, Removed::default());
}

fn given_routes_that_go_at_exit_when_the_relay_ends_then_so_does_what_leads_answers_here() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = backends(&rig);
    let pods = [Pod::of(&rig, 0, 0)];
    let web = preserving().with(pods);
    let mut stage = Stage::start_bare(rig, &web, |_| ());
    stage.end(Signal::TERM);
    assert_eq!(rules(stage.rig.node(0)), 2, "they stay where routes do");

    stage.write(&Web { preserves: false, ..web.clone() }.to_string());
    stage.start_again(|_| ());
    until("a relay that needs none takes them back", || rules(stage.rig.node(0)) == 0);
    stage.end(Signal::TERM);

    stage.write(&web.to_string());
    stage.start_again(|command| {
        command.args(["--vip-routes-at-exit", "remove"]);
    });
    assert_eq!(rules(stage.rig.node(0)), 2);
    stage.end(Signal::TERM);
    assert_eq!(rules(stage.rig.node(0)), 0);
    let left = stage.rig.node(0).run(|| reply_path::remove(DEFAULT_ROUTE_PROTOCOL));
    assert!(!left.expect("it may"), "nothing is left");
}

fn given_somebody_who_takes_the_rules_away_when_clients_ask_then_they_are_served_and_seen_again() {
    let Some((stage, _running)) = preserved_at_once() else { return };
    let (client, to) = (stage.rig.client(), stage.at(ClusterIp, Family::V4));
    sees(&stage, client, ClusterIp, client);

    assert!(stage.rig.node(0).run(|| reply_path::remove(DEFAULT_ROUTE_PROTOCOL)).expect("it may"));
    let begin = Instant::now();
    let outcome = client.run(|| Ok(ask_tcp(to))).expect("the namespace is ours");

    assert!(outcome.pod().is_some(), "{outcome:?}");
    assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
    until("the rules are back", || rules(stage.rig.node(0)) == 2);
    assert!(begin.elapsed() < CHECK_INTERVAL + BOUND, "{:?}", begin.elapsed());
    sees(&stage, client, ClusterIp, client);
    assert!(stage.log().contains("somebody has changed"), "it is said");
}

fn given_somebody_who_takes_the_rules_of_routes_away_when_a_connection_is_open_then_it_goes_on() {
    let Some((stage, _running)) = preserved_at_once() else { return };
    let (client, node, to) = (stage.rig.client(), stage.rig.node(0), stage.at(ClusterIp, Family::V4));
    let mut open = client.run(|| TcpStream::connect(to)).expect("it is served");
    assert!(is_from(&ask_on(&mut open).expect("it answers"), client.address(Family::V4)));

    Rig::remove_rules_into(node, route_table(DEFAULT_ROUTE_PROTOCOL)).expect("it may");
    let outcome = ask_on(&mut open).expect("an answer, later");

    assert!(is_from(&outcome, client.address(Family::V4)), "{outcome:?}");
    assert_eq!(rules(node), 2, "they are back");
}
