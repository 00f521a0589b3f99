//! Verdicts under real packets: from clients, pods and the node, to each address of a Service on node 0.
//!
//! Cluster and Local sets, fall-backs and ranges are planned in `plan` and its tests; here sockets answer for them. What is
//! not the Service's is in `strangers`.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use kube_relay::name::Family;

use crate::rig::{Case, FAMILIES, Namespace, Rig, Shape};
use crate::stage::{
    Backends, ClusterIp, ENTRIES, Entry, ExternalIp, LoadBalancerIp, NodePort, Outcome, PORT, Pod, Stage,
    TCP_ONLY_PORT, Web, ask_on, ask_tcp, ask_udp, expect_at,
};

pub(crate) const CASES: &[Case] = cases![
    t093_t094_t095_t125_given_endpoints_that_come_and_go_when_asked_then_all_ways_are_refused_or_served,
    t096_t097_t098_t099_t103_t104_t106_given_two_pods_when_asked_from_everywhere_then_they_answer,
    t101_t102_given_a_pod_that_asks_its_own_service_when_answered_then_it_is_by_itself,
    t107_t108_t109_given_source_ranges_when_asked_then_the_load_balancer_ip_alone_is_silent_to_others,
    t110_given_source_ranges_when_the_node_asks_then_its_own_address_decides,
    t111_given_open_connections_when_source_ranges_change_then_only_new_ones_are_judged_anew,
    t104_given_an_allow_list_when_asked_from_everywhere_then_the_node_and_its_pods_and_those_in_it_are_served,
    t112_given_internal_policy_local_when_asked_then_local_pods_answer_or_nobody,
    t113_t114_t115_given_external_policies_when_asked_then_each_side_gets_its_own_pods,
    t116_t117_t118_t119_t120_t121_given_terminating_pods_when_asked_then_each_side_falls_back,
    t094_given_open_connections_when_verdicts_change_then_each_goes_on,
];

/// Two nodes with two pods each; the relay is on node 0.
pub(crate) fn rig() -> Rig {
    Rig::build(Shape { nodes: 2, pods_per_node: 2, router: true }).expect("the rig builds")
}

pub(crate) fn local(rig: &Rig) -> [Pod; 2] {
    [Pod::of(rig, 0, 0), Pod::of(rig, 0, 1)]
}

pub(crate) fn remote(rig: &Rig) -> [Pod; 2] {
    [Pod::of(rig, 1, 0), Pod::of(rig, 1, 1)]
}

pub(crate) fn backends(rig: &Rig) -> Backends {
    Backends::start((0..2).flat_map(|i| rig.pods(i)))
}

pub(crate) const LOCAL: [&str; 2] = ["pod0-0", "pod0-1"];
const REMOTE: [&str; 2] = ["pod1-0", "pod1-1"];

/// The six ways of T093: who asks, and where.
fn six_ways(rig: &Rig) -> [(&Namespace, Entry); 6] {
    let (pod, client) = (rig.pod(0, 1), rig.client());
    [
        (pod, ClusterIp),
        (client, ExternalIp),
        (pod, NodePort),
        (client, NodePort),
        (pod, LoadBalancerIp),
        (client, LoadBalancerIp),
    ]
}

fn t093_t094_t095_t125_given_endpoints_that_come_and_go_when_asked_then_all_ways_are_refused_or_served() {
    let rig = rig();
    let _running = backends(&rig);
    let served = Web::default().with([Pod::of(&rig, 0, 0)]);
    let stage = Stage::start(rig, &Web::default());

    for _ in 0..2 {
        for (from, entry) in six_ways(&stage.rig) {
            stage.refused(from, entry);
        }
        stage.change(&served);
        let mut open = connect(&stage, stage.rig.client(), LoadBalancerIp);
        for (from, entry) in six_ways(&stage.rig) {
            stage.served(from, entry, &["pod0-0"]);
        }
        stage.change(&Web::default());
        assert_eq!(ask_on(&mut open).expect("it goes on").pod(), Some("pod0-0"));
    }
}

fn t096_t097_t098_t099_t103_t104_t106_given_two_pods_when_asked_from_everywhere_then_they_answer() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with([Pod::of(&rig, 0, 0), Pod::of(&rig, 1, 0)]);
    let stage = Stage::start(rig, &web);
    let Stage { rig, .. } = &stage;

    for from in [rig.client(), rig.pod(0, 1), rig.pod(1, 1), rig.node(0), rig.node(1)] {
        for entry in ENTRIES {
            // Each is reached, in turn: the round robin of a port is one for all ways to it.
            stage.served(from, entry, &["pod0-0"]);
            stage.served(from, entry, &["pod1-0"]);
        }
    }
    for family in FAMILIES {
        let at = |port| SocketAddr::new(stage.at(ClusterIp, family).ip(), port);
        let refused = |outcome: &Outcome| *outcome == Outcome::Refused;
        expect_at(rig.pod(0, 1), at(TCP_ONLY_PORT), ask_tcp, "a port of TCP alone", |outcome| outcome.pod().is_some());
        expect_at(rig.pod(0, 1), at(TCP_ONLY_PORT), ask_udp, "a port of TCP alone, over UDP", refused);
        expect_at(rig.client(), at(7777), ask_tcp, "a port of no Service", refused);
        let from_node = |outcome: &Outcome| {
            let Outcome::Answer { source, .. } = outcome else { return false };
            is_of_node(rig, *source)
        };
        expect_at(rig.client(), at(PORT), ask_tcp, "pods see the node", from_node);
        expect_at(rig.client(), at(PORT), ask_udp, "pods see the node", from_node);
    }
}

/// The node's address towards the others, or its end of the cables to its pods.
fn is_of_node(rig: &Rig, source: IpAddr) -> bool {
    let ends: [IpAddr; 2] = [[10, 82, 0, 1].into(), "fd82::1".parse().expect("an address")];
    ends.contains(&source) || FAMILIES.iter().any(|family| rig.node(0).address(*family) == source)
}

fn t101_t102_given_a_pod_that_asks_its_own_service_when_answered_then_it_is_by_itself() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with([Pod::of(&rig, 0, 0)]);
    let stage = Stage::start(rig, &web);
    let Stage { rig, .. } = &stage;

    for entry in ENTRIES {
        // Answers come from where the question went: both ends are connected sockets.
        stage.expect(
            rig.pod(0, 0),
            entry,
            "is answered by the asking pod itself, which sees the node",
            |outcome| matches!(outcome, Outcome::Answer { pod, source } if pod == "pod0-0" && is_of_node(rig, *source)),
        );
    }
}

pub(crate) fn ranges(of: &[&Namespace]) -> Vec<String> {
    of.iter().flat_map(|part| FAMILIES.map(|family| part.address(family).to_string())).map(host).collect()
}

fn host(address: String) -> String {
    let prefix = if address.contains(':') { 128 } else { 32 };
    format!("{address}/{prefix}")
}

fn t107_t108_t109_given_source_ranges_when_asked_then_the_load_balancer_ip_alone_is_silent_to_others() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web { source_ranges: ranges(&[rig.client(), rig.pod(1, 0)]), ..Web::default() }.with(local(&rig));
    let stage = Stage::start(rig, &web);
    let Stage { rig, .. } = &stage;

    for allowed in [rig.client(), rig.pod(1, 0)] {
        stage.served(allowed, LoadBalancerIp, &LOCAL);
    }
    let all_blocked = [rig.node(1), rig.pod(0, 0), rig.pod(1, 1)];
    stage.all_silent(all_blocked.map(|blocked| (blocked, LoadBalancerIp)));
    for blocked in all_blocked {
        for open in [NodePort, ClusterIp, ExternalIp] {
            stage.served(blocked, open, &LOCAL);
        }
    }
    // The datagram that is heard next tells how many were not.
    stage.served(rig.client(), LoadBalancerIp, &LOCAL);
    assert!(stage.metric("kuberelay_service_dropped_total", "reason=\"denied_address\"") > 0);
    assert_eq!(stage.metric("kuberelay_filter_fallbacks_total", ""), 0);
}

fn t110_given_source_ranges_when_the_node_asks_then_its_own_address_decides() {
    let rig = rig();
    let _running = backends(&rig);
    let without = Web { source_ranges: ranges(&[rig.client()]), ..Web::default() }.with(local(&rig));
    let with = Web { source_ranges: ranges(&[rig.client(), rig.node(0)]), ..without.clone() };
    let stage = Stage::start(rig, &without);
    let node = stage.rig.node(0);
    let from_itself = |family| {
        let to = stage.at(LoadBalancerIp, family);
        move |_| ask_from(SocketAddr::new(to.ip(), 0), to)
    };

    stage.silent(node, LoadBalancerIp);
    for family in FAMILIES {
        let to = stage.at(LoadBalancerIp, family);
        expect_at(node, to, from_itself(family), "its own source", |outcome| *outcome == Outcome::Silence);
    }
    stage.change(&with);
    stage.served(node, LoadBalancerIp, &LOCAL);
    for family in FAMILIES {
        let (to, source) = (stage.at(LoadBalancerIp, family), stage.rig.node(0).address(family));
        expect_at(node, to, from_itself(family), "its own source", |outcome| outcome.pod().is_some());
        let from_node = |_| ask_from(SocketAddr::new(source, 0), to);
        expect_at(node, to, from_node, "the node's address", |outcome| outcome.pod().is_some());
    }
}

/// A new connection from a source address with one question.
pub(crate) fn ask_from(source: SocketAddr, to: SocketAddr) -> Outcome {
    let ask = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
        socket.bind(&source.into())?;
        socket.connect_timeout(&to.into(), Duration::from_millis(500))?;
        ask_on(&mut socket.into())
    };
    ask().unwrap_or_else(|error: io::Error| match error.kind() {
        ErrorKind::TimedOut => Outcome::Silence,
        _ => Outcome::Other(error.to_string()),
    })
}

fn t111_given_open_connections_when_source_ranges_change_then_only_new_ones_are_judged_anew() {
    let rig = rig();
    let _running = backends(&rig);
    let for_client = Web { source_ranges: ranges(&[rig.client()]), ..Web::default() }.with(local(&rig));
    let for_pod = Web { source_ranges: ranges(&[rig.pod(1, 0)]), ..for_client.clone() };
    let for_all = Web { source_ranges: vec![], ..for_client.clone() };
    let stage = Stage::start(rig, &for_client);
    let (client, pod) = (stage.rig.client(), stage.rig.pod(1, 0));
    let mut before = connect(&stage, client, LoadBalancerIp);

    stage.change(&for_pod);
    stage.silent(client, LoadBalancerIp);
    stage.served(pod, LoadBalancerIp, &LOCAL);
    let mut between = connect(&stage, pod, LoadBalancerIp);
    stage.change(&for_client);
    stage.silent(pod, LoadBalancerIp);
    stage.served(client, LoadBalancerIp, &LOCAL);
    stage.change(&for_all);
    stage.served(pod, LoadBalancerIp, &LOCAL);

    for open in [&mut before, &mut between] {
        assert!(ask_on(open).expect("it goes on").pod().is_some());
    }
}

fn t104_given_an_allow_list_when_asked_from_everywhere_then_the_node_and_its_pods_and_those_in_it_are_served() {
    let rig = rig();
    let _running = backends(&rig);
    let of_client = Web { allow_from: Some(ranges(&[rig.client()]).join(",")), ..Web::default() }.with(local(&rig));
    let of_node = Web { allow_from: Some(ranges(&[rig.node(1)]).join(",")), ..of_client.clone() };
    let of_nobody = Web { allow_from: Some("10.80.0.2/33".into()), ..of_client.clone() };
    let stage = Stage::start(rig, &of_client);
    let Stage { rig, .. } = &stage;
    let mut before = connect(&stage, rig.client(), ClusterIp);

    for entry in ENTRIES {
        for allowed in [rig.client(), rig.node(0), rig.pod(0, 0), rig.pod(1, 0)] {
            stage.served(allowed, entry, &LOCAL);
        }
    }
    stage.all_silent(ENTRIES.map(|entry| (rig.node(1), entry)));
    // The datagram that is heard next tells how many were not.
    stage.served(rig.client(), ClusterIp, &LOCAL);
    assert!(stage.metric("kuberelay_service_dropped_total", "reason=\"denied_address\"") > 0);
    assert_eq!(stage.metric("kuberelay_filter_fallbacks_total", ""), 0);
    stage.change(&of_node);
    for entry in ENTRIES {
        stage.served(rig.node(1), entry, &LOCAL);
    }
    stage.all_silent(ENTRIES.map(|entry| (rig.client(), entry)));
    assert!(ask_on(&mut before).expect("it goes on").pod().is_some());
    stage.change(&of_nobody);
    assert!(stage.reports("annotation"));
    stage.silent(rig.client(), ClusterIp);
    stage.served(rig.pod(1, 0), ClusterIp, &LOCAL);
}

fn t112_given_internal_policy_local_when_asked_then_local_pods_answer_or_nobody() {
    let rig = rig();
    let _running = backends(&rig);
    let by_policy = |internal_policy| Web { internal_policy, ..Web::default() };
    let [near, far] = [local(&rig), remote(&rig)];
    let three = [near[0].clone(), far[0].clone(), far[1].clone()];
    let four = [near.clone(), far.clone()].concat();
    let stage = Stage::start(rig, &by_policy("Cluster").with(three.clone()));
    let pod = stage.rig.pod(0, 1);

    for one in ["pod0-0", "pod1-0", "pod1-1"] {
        stage.served(pod, ClusterIp, &[one]);
    }
    stage.change(&by_policy("Local").with(three));
    for from in [pod, stage.rig.client(), stage.rig.node(0)] {
        stage.served(from, ClusterIp, &["pod0-0"]);
        stage.served(from, NodePort, &REMOTE);
    }
    stage.change(&by_policy("Local").with(four));
    for one in LOCAL {
        stage.served(pod, ClusterIp, &[one]);
    }
    stage.change(&by_policy("Local").with(far));
    let everybody = [pod, stage.rig.client(), stage.rig.node(0)];
    stage.all_silent(everybody.map(|from| (from, ClusterIp)));
    for from in everybody {
        stage.served(from, LoadBalancerIp, &REMOTE);
    }
    stage.change(&by_policy("Local"));
    stage.refused(pod, ClusterIp);
}

const EXTERNAL: [Entry; 3] = [NodePort, LoadBalancerIp, ExternalIp];

fn t113_t114_t115_given_external_policies_when_asked_then_each_side_gets_its_own_pods() {
    let rig = rig();
    let _running = backends(&rig);
    let by_policy = |external_policy| Web { external_policy, ..Web::default() };
    let both = [Pod::of(&rig, 0, 0), Pod::of(&rig, 1, 0)];
    let far = remote(&rig);
    let stage = Stage::start(rig, &by_policy("Cluster").with(both.clone()));
    let Stage { rig, .. } = &stage;
    let inside = [rig.pod(0, 1), rig.pod(1, 1), rig.node(0)];

    // T115: all seven ways reach both.
    let ways = EXTERNAL.map(|entry| [(rig.client(), entry), (rig.pod(0, 1), entry)]).concat();
    for (from, entry) in ways.into_iter().chain([(rig.pod(0, 1), ClusterIp)]) {
        stage.served(from, entry, &["pod0-0"]);
        stage.served(from, entry, &["pod1-0"]);
    }

    stage.change(&by_policy("Local").with(both)); // T113
    for entry in EXTERNAL {
        for _ in 0..3 {
            stage.served(rig.client(), entry, &["pod0-0"]);
        }
        for from in inside {
            stage.served(from, entry, &["pod0-0"]);
            stage.served(from, entry, &["pod1-0"]);
        }
    }

    stage.change(&by_policy("Local").with(far)); // T114
    let outside = [rig.client(), rig.node(1)];
    stage.all_silent(EXTERNAL.into_iter().flat_map(|entry| outside.map(|from| (from, entry))));
    for entry in EXTERNAL {
        for from in inside {
            stage.served(from, entry, &REMOTE);
        }
    }
    stage.served(rig.client(), ClusterIp, &REMOTE);
    stage.change(&by_policy("Local"));
    for entry in ENTRIES {
        stage.refused(rig.client(), entry);
    }
}

fn t116_t117_t118_t119_t120_t121_given_terminating_pods_when_asked_then_each_side_falls_back() {
    let rig = Rig::build(Shape { nodes: 2, pods_per_node: 3, router: true }).expect("the rig builds");
    let _running = backends(&rig);
    let third = Pod::of(&rig, 0, 2);
    let web = Web { external_policy: "Local", ..Web::default() };
    let [[near, near_too], [far, far_too]] = [local(&rig), remote(&rig)];
    let (client, pod) = ("client", "pod");
    // Who asks, where, and who answers; nobody is silence.
    type Way<'a> = (&'a str, Entry, &'a [&'a str]);
    let cases: [(Vec<Pod>, Vec<Way<'_>>); 6] = [
        // T116
        (
            vec![near.clone(), near_too, third.terminating(), far.clone()],
            vec![
                (client, LoadBalancerIp, &LOCAL),
                (client, LoadBalancerIp, &LOCAL),
                (client, LoadBalancerIp, &LOCAL),
                (pod, ClusterIp, &["pod0-0"]),
                (pod, ClusterIp, &["pod0-1"]),
                (pod, ClusterIp, &["pod1-0"]),
            ],
        ),
        // T117
        (
            vec![near.clone().terminating(), far.clone()],
            vec![(client, LoadBalancerIp, &["pod0-0"]), (pod, ClusterIp, &["pod1-0"])],
        ),
        // T118
        (vec![near.clone().ended(), far.clone()], vec![(client, LoadBalancerIp, &[]), (pod, ClusterIp, &["pod1-0"])]),
        // T119
        (
            vec![far.clone().terminating(), far_too.ended()],
            vec![(client, LoadBalancerIp, &[]), (pod, ClusterIp, &["pod1-0"])],
        ),
        // T120
        (vec![near.clone().terminating()], vec![(pod, ClusterIp, &["pod0-0"]), (client, ClusterIp, &["pod0-0"])]),
        // T121
        (vec![near.clone().published()], vec![(pod, ClusterIp, &["pod0-0"]), (client, NodePort, &["pod0-0"])]),
    ];
    let stage = Stage::start(rig, &web);

    for (pods, ways) in cases {
        stage.change(&web.clone().with(pods));
        for (from, entry, answering) in ways {
            let from = if from == client { stage.rig.client() } else { stage.rig.pod(0, 1) };
            match answering {
                [] => stage.silent(from, entry),
                answering => stage.served(from, entry, answering),
            }
        }
    }
    stage.change(&web.clone().with([near.clone().ended()])); // T121: no longer published
    stage.refused(stage.rig.pod(0, 1), ClusterIp);
    stage.refused(stage.rig.client(), NodePort);
    stage.change(&web.with([near.published()]));
    stage.served(stage.rig.pod(0, 1), ClusterIp, &["pod0-0"]);
}

fn t094_given_open_connections_when_verdicts_change_then_each_goes_on() {
    let rig = rig();
    let _running = backends(&rig);
    let [near, far] = [local(&rig), remote(&rig)];
    let client_only = ranges(&[rig.client()]);
    let pod_only = ranges(&[rig.pod(1, 0)]);
    let local = Web { external_policy: "Local", internal_policy: "Local", ..Web::default() };
    let states = [
        Web::default().with(near.clone()),
        local.clone().with(far.clone()),
        Web::default(),
        local.clone().with(near.clone()),
        Web { source_ranges: client_only, ..local.clone() }.with(near.clone()),
        Web { source_ranges: pod_only, ..local.clone() }.with(near.clone()),
        local.with(far.clone()),
        Web::default().with(far),
        Web::default(),
        Web::default().with(near),
    ];
    let stage = Stage::start(rig, &states[0]);
    let mut open: Vec<TcpStream> = Vec::new();

    for state in &states {
        stage.change_if_other(state);
        open.extend(connect_everywhere(&stage, [stage.rig.client(), stage.rig.pod(0, 1)]));
        for stream in &mut open {
            assert!(ask_on(stream).expect("it goes on").pod().is_some());
        }
    }

    assert!(open.len() >= 40, "{} connections", open.len());
}

/// An open connection that has been answered.
fn connect(stage: &Stage, from: &Namespace, entry: Entry) -> TcpStream {
    try_connect(stage, from, entry).expect("it is served")
}

/// Open connections from these to each entry where that is served. All try at once: who gets no answer waits for it.
fn connect_everywhere(stage: &Stage, from: [&Namespace; 2]) -> Vec<TcpStream> {
    thread::scope(|scope| {
        let ways = ENTRIES.into_iter().flat_map(|entry| from.map(|from| (from, entry)));
        let connecting: Vec<_> =
            ways.map(|(from, entry)| scope.spawn(move || try_connect(stage, from, entry))).collect();
        connecting.into_iter().filter_map(|thread| thread.join().expect("it does not panic")).collect()
    })
}

fn try_connect(stage: &Stage, from: &Namespace, entry: Entry) -> Option<TcpStream> {
    let to = stage.at(entry, Family::V4);
    let stream = from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(500))?;
        ask_on(&mut stream)?;
        Ok(stream)
    });
    stream.ok()
}
