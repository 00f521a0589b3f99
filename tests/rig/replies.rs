//! What leads answers to clients' addresses to the relay, beside what others do on its node: marks of theirs, rules that they
//! flush, relays that need the same; and what answers there are.
//!
//! Whom backends see in general is in `preserve`.

use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::cleanup::{CleanupError, remove_routes};
use kube_relay::config::DEFAULT_ROUTE_PROTOCOL;
use kube_relay::name::Family;
use kube_relay::reply_message::{filter_table, route_table};
use kube_relay::reply_path::CHECK_INTERVAL;
use rustix::process::Signal;
use socket2::{Domain, SockRef, Socket, Type};

use crate::preserve::{is_from, is_possible, preserved_at_once, preserving, rules, sees};
use crate::rig::{Case, FAMILIES, Namespace, Rig, find, skip};
use crate::stage::{
    ClusterIp, LoadBalancerIp, Outcome, PORT, Pod, Stage, TCP_BACKEND_PORT, UDP_BACKEND_PORT, Web, ask_on, ask_tcp,
    expect_at, until,
};
use crate::verdicts::{backends, rig};
use crate::vips::in_runtime;

pub(crate) const CASES: &[Case] = cases![
    given_packets_with_marks_of_others_when_a_service_preserves_then_they_go_where_those_have_sent_them,
    given_a_relay_with_another_mark_when_it_takes_over_then_it_alone_leads_answers,
    given_answers_of_4000_bytes_when_nobody_tracks_connections_then_all_of_them_come_to_clients,
    given_ipv6_switched_off_on_loopback_when_clients_ask_over_ipv4_then_backends_see_them,
    given_two_relays_that_need_answers_led_here_when_one_removes_its_own_then_the_others_stay,
    f15_given_a_client_that_asks_from_one_port_again_and_elsewhere_when_it_is_served_then_it_is_seen_each_time,
];

pub(crate) const MEASURING: &[Case] =
    cases![given_somebody_who_flushes_rules_when_that_is_heard_then_they_are_back_before_anything_is_sent_again];

/// How soon rules are to be back that somebody has flushed: a sender repeats what is lost after this, at the soonest.
const RETRANSMIT: Duration = Duration::from_millis(200);

/// The program, and what it says to rules on a node.
struct Nft(PathBuf);

impl Nft {
    /// `None`, and says why, where there is none.
    fn find() -> Option<Self> {
        let found = find("nft").map(Self);
        if found.is_none() {
            skip("nft", "not installed");
        }
        found
    }

    fn run(&self, node: &Namespace, words: &[&str]) -> Result<(), String> {
        let Self(program): &Self = self;
        let program: &Path = program;
        let output = node.run(|| Command::new(program).args(words).output()).map_err(|error| error.to_string())?;
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }
}

/// As the portmap plugin does it for a `hostPort`: it marks, and sends to a pod.
fn host_port(rig: &Rig, port: u16, mark: u32) -> String {
    let lines = FAMILIES.map(|family| {
        let (node, pod) =
            (rig.node(0).address(family), SocketAddr::new(rig.pod(0, 0).address(family), TCP_BACKEND_PORT));
        let word = if family == Family::V4 { "ip" } else { "ip6" };
        format!("{word} daddr {node} tcp dport {port} meta mark set meta mark | {mark:#x} dnat {word} to {pod}; ")
    });
    let hook = "type nat hook prerouting priority dstnat";
    format!("table inet portmap-{port} {{ chain prerouting {{ {hook}; {} }}\n}}", lines.concat())
}

fn given_packets_with_marks_of_others_when_a_service_preserves_then_they_go_where_those_have_sent_them() {
    const FIRST: u16 = 8_088;
    // Of portmap and podman, Cilium's IPsec with keys 2 and 3, kube-proxy, the VPC CNI; all bits, and all but ours.
    const MARKS: [u32; 7] = [0x2000, 0x2e00, 0x3e00, 0x4000, 0x80, 0x3fff, 0x2ff4];
    let Some(nft) = Nft::find() else { return };
    let Some((stage, _running)) = preserved_at_once() else { return };
    let Stage { rig, .. } = &stage;
    sees(&stage, rig.client(), ClusterIp, rig.client());

    for (port, mark) in (FIRST..).zip(MARKS) {
        if let Err(reason) = nft.run(rig.node(0), &[&host_port(rig, port, mark)]) {
            return skip("nat", &reason);
        }
        for family in FAMILIES {
            for from in [rig.client(), rig.pod(0, 1), rig.pod(1, 0)] {
                let to = SocketAddr::new(rig.node(0).address(family), port);
                let what = format!("mark {mark:#x} goes to the pod");
                expect_at(from, to, ask_tcp, &what, |outcome| is_from(outcome, from.address(family)));
            }
        }
    }
    sees(&stage, rig.client(), ClusterIp, rig.client());
}

fn given_a_relay_with_another_mark_when_it_takes_over_then_it_alone_leads_answers() {
    let Some((mut stage, _running)) = preserved_at_once() else { return };
    assert_eq!(rules(stage.rig.node(0)), 2, "one for each family");

    for flags in [&["--reply-mark", "0x2/0xf"][..], &[]] {
        stage.end(Signal::KILL);
        stage.start_again(|command| {
            command.args(flags);
        });

        assert_eq!(rules(stage.rig.node(0)), 2, "those of the one before are gone");
        sees(&stage, stage.rig.client(), ClusterIp, stage.rig.client());
    }
    stage.end(Signal::KILL);
    let removed = in_runtime(stage.rig.node(0), remove_routes(DEFAULT_ROUTE_PROTOCOL)).expect("nobody runs");
    assert!(removed.reply_path && rules(stage.rig.node(0)) == 0, "{removed:?}");
}

/// Answers each datagram with the address that it came from, and so many bytes.
fn answer_at_length(socket: &UdpSocket, length: usize, stop: &AtomicBool) {
    let mut buffer = [0; 256];
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("an option");
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let mut answer = format!("{} ", peer.ip()).into_bytes();
            answer.resize(length, b'.');
            let _ = socket.send_to(&answer, peer);
        }
    }
}

/// Asks for one, on a socket of its own: as whom it was asked, and how many bytes came.
fn ask_at_length(to: SocketAddr) -> Outcome {
    let exchange = || {
        let any: SocketAddr =
            if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        socket.send(b"?")?;
        let mut buffer = vec![0; 65_536];
        let length = socket.recv(&mut buffer)?;
        Ok((length, String::from_utf8_lossy(&buffer[..length]).into_owned()))
    };
    match exchange() {
        Ok((length, text)) => match text.split(' ').next().and_then(|source| source.parse().ok()) {
            Some(source) => Outcome::Answer { pod: length.to_string(), source },
            None => Outcome::Other(text),
        },
        Err(error) => Outcome::Other(std::io::Error::to_string(&error)),
    }
}

fn given_answers_of_4000_bytes_when_nobody_tracks_connections_then_all_of_them_come_to_clients() {
    const LENGTH: usize = 4_000;
    const TIMES: usize = 20;
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let (stop, pods) = (AtomicBool::new(false), [Pod::of(&rig, 0, 0)]);
    let stage = Stage::start(rig, &preserving().with(pods));
    let Stage { rig, .. } = &stage;

    thread::scope(|scope| {
        for family in FAMILIES {
            let at = SocketAddr::new(rig.pod(0, 0).address(family), UDP_BACKEND_PORT);
            let socket = rig.pod(0, 0).run(|| UdpSocket::bind(at)).expect("the pod's address is free");
            let stop = &stop;
            scope.spawn(move || answer_at_length(&socket, LENGTH, stop));
        }
        let outcomes = FAMILIES.map(|family| {
            let (client, to) = (rig.client(), stage.at(ClusterIp, family));
            let whole = |outcome: &Outcome| {
                is_from(outcome, client.address(family)) && outcome.pod() == Some(&*LENGTH.to_string())
            };
            (0..TIMES).filter(|_| whole(&client.run(|| Ok(ask_at_length(to))).expect("ours"))).count()
        });
        stop.store(true, Ordering::Relaxed);
        assert_eq!(outcomes, [TIMES; 2], "of IPv4 and of IPv6");
    });
}

fn given_ipv6_switched_off_on_loopback_when_clients_ask_over_ipv4_then_backends_see_them() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = backends(&rig);
    let pods = [Pod::of(&rig, 0, 0)];
    let stage = Stage::start(rig, &Web::default().with(pods.clone()));
    let (client, node) = (stage.rig.client(), stage.rig.node(0));
    node.sysctl("net/ipv6/conf/lo/disable_ipv6", "1").expect("it is ours");

    stage.change(&preserving().with(pods));

    let to = stage.at(ClusterIp, Family::V4);
    expect_at(client, to, ask_tcp, "the client is seen", |outcome| is_from(outcome, client.address(Family::V4)));
}

/// A Service of its own that preserves, for a second relay.
const OTHER: &str = "\
apiVersion: v1
kind: Service
metadata: {name: other, annotations: {kube-relay.dev/source-address: preserve}}
spec: {clusterIP: 10.96.0.77, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: other-1, labels: {kubernetes.io/service-name: other}}
addressType: IPv4
ports: [{port: 8000}]
endpoints: [{addresses: [10.82.0.10], nodeName: node0, conditions: {ready: true}}]
";

fn given_two_relays_that_need_answers_led_here_when_one_removes_its_own_then_the_others_stay() {
    let rig = rig();
    if !is_possible(rig.node(0)) {
        return;
    }
    let _running = backends(&rig);
    let pods = [Pod::of(&rig, 0, 0)];
    let mut stage = Stage::start_bare(rig, &preserving().with(pods), |command| {
        command.args(["--vip-routes-at-exit", "remove"]);
    });
    let second = stage.start_beside(OTHER);
    let to = SocketAddr::new(Ipv4Addr::new(10, 96, 0, 77).into(), PORT);
    let seen = |stage: &Stage| {
        let client = stage.rig.client();
        expect_at(client, to, ask_tcp, "the second is served", |outcome| is_from(outcome, client.address(Family::V4)));
    };
    seen(&stage);

    stage.end(Signal::TERM);
    assert_eq!(rules(stage.rig.node(0)), 2, "the second one needs them");
    seen(&stage);
    stage.write("# No Service.\n");
    stage.start_again(|_| ());
    stage.end(Signal::TERM);
    assert_eq!(rules(stage.rig.node(0)), 2, "one that begins without such a Service leaves them, too");

    let error = in_runtime(stage.rig.node(0), remove_routes(DEFAULT_ROUTE_PROTOCOL)).expect_err("the second one runs");
    assert!(matches!(error, CleanupError::Runs(_)), "{error}");
    seen(&stage);
    drop(second);
    let removed = in_runtime(stage.rig.node(0), remove_routes(DEFAULT_ROUTE_PROTOCOL)).expect("nobody runs");
    assert!(removed.reply_path && rules(stage.rig.node(0)) == 0, "{removed:?}");
}

/// Connects from one port, also where an earlier connection had it.
fn connect_from(client: &Namespace, port: u16, to: SocketAddr) -> TcpStream {
    let connect = || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(client.address(Family::of(to.ip())), port).into())?;
        socket.connect(&to.into())?;
        Ok(TcpStream::from(socket))
    };
    client.run(connect).expect("it is served")
}

fn f15_given_a_client_that_asks_from_one_port_again_and_elsewhere_when_it_is_served_then_it_is_seen_each_time() {
    const CLIENTS_PORT: u16 = 45_678;
    let Some((stage, _running)) = preserved_at_once() else { return };
    let client = stage.rig.client();

    for family in FAMILIES {
        let is_seen = |stream: &mut TcpStream| {
            let outcome = ask_on(stream).expect("it answers");
            assert!(is_from(&outcome, client.address(family)), "{outcome:?}");
        };
        let [one, other] = [ClusterIp, LoadBalancerIp].map(|entry| stage.at(entry, family));
        let mut first = connect_from(client, CLIENTS_PORT, one);
        is_seen(&mut first);
        let mut second = connect_from(client, CLIENTS_PORT, other);
        is_seen(&mut second); // To the same backend: it cannot have the same port there.
        is_seen(&mut first);

        // Ended by the client: what is left of it waits at the relay, between that and the backend.
        for mut stream in [first, second] {
            SockRef::from(&stream).shutdown(std::net::Shutdown::Write).expect("it is open");
            assert_eq!(stream.read(&mut [0; 16]).expect("its end"), 0);
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option"); // And nothing at the client.
        }
        let begin = Instant::now();
        is_seen(&mut connect_from(client, CLIENTS_PORT, one));
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    }
    assert_eq!(stage.metric("kuberelay_source_fallbacks_total", ""), 0);
}

fn given_somebody_who_flushes_rules_when_that_is_heard_then_they_are_back_before_anything_is_sent_again() {
    const TIMES: usize = 10;
    let Some(nft) = Nft::find() else { return };
    let Some((stage, _running)) = preserved_at_once() else { return };
    let (client, node, to) = (stage.rig.client(), stage.rig.node(0), stage.at(ClusterIp, Family::V4));
    let table = filter_table(DEFAULT_ROUTE_PROTOCOL);
    let is_there = || nft.run(node, &["list", "table", "inet", &table]).is_ok();
    let gap = |take: &dyn Fn(), is_back: &dyn Fn() -> bool| {
        take();
        let begin = Instant::now();
        until("all is back", is_back);
        begin.elapsed()
    };
    sees(&stage, client, ClusterIp, client);
    let mut open = client.run(|| TcpStream::connect(to)).expect("it is served");

    let mut gaps = Vec::new();
    for _ in 0..TIMES {
        let flushed = gap(&|| nft.run(node, &["flush", "ruleset"]).expect("it may"), &is_there);
        assert!(is_from(&ask_on(&mut open).expect("it goes on"), client.address(Family::V4)));
        let removed =
            gap(&|| Rig::remove_rules_into(node, route_table(DEFAULT_ROUTE_PROTOCOL)).expect("it may"), &|| {
                rules(node) == 2
            });
        gaps.push((flushed, removed));
    }

    println!("  back after a flush of nf_tables, and after a removal of rules: {gaps:?}");
    gaps.sort();
    let (flushed, removed) = gaps[TIMES / 2];
    assert!(flushed < RETRANSMIT && removed < RETRANSMIT, "{gaps:?}");
    assert!(gaps.iter().all(|(flushed, removed)| *flushed.max(removed) < CHECK_INTERVAL / 2), "{gaps:?}");
}
