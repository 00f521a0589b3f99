//! Addresses of a node that come and go under a relay: where node ports are served, how soon, and what is not touched.
//!
//! Which addresses are chosen is decided in `host` and its tests, when the machine is read in `host_watch`.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use kube_relay::name::Family;

use crate::rig::{Case, FAMILIES, Namespace, Rig, Shape, find, skip};
use crate::stage::{
    Backends, CLOSED, ClusterIp, ExternalIp, NODE_PORT, NodePort, Outcome, PORT, Pod, Stage, Web, ask_on, ask_tcp,
    ask_udp, expect_at, until,
};
use crate::verdicts::{LOCAL, backends, local, rig};

pub(crate) const CASES: &[Case] = cases![
    t105_t218_given_primary_and_localhost_when_asked_then_both_families_and_protocols_answer_there_alone,
    t218_given_all_when_asked_then_every_address_but_loopback_answers,
    t219_f31_given_own_servers_on_all_addresses_when_one_comes_and_goes_then_they_do_so_as_well,
    t219_given_an_ipv6_address_in_doubt_when_it_is_usable_then_it_is_bound_and_one_of_somebody_else_never,
    f31_given_an_address_that_is_asked_for_by_name_when_it_comes_then_it_is_bound_within_a_second,
    t123_f31_given_an_external_ip_that_is_served_when_somebody_gives_it_to_the_node_then_it_is_served_all_along,
    f32_given_a_node_port_that_another_process_holds_when_it_is_freed_then_it_is_taken_within_five_seconds,
    given_a_node_port_when_the_machine_is_asked_who_listens_there_then_it_names_us,
    given_a_relay_on_each_node_when_node_ports_are_asked_then_all_answer_and_by_policy_local_those_with_pods,
];

pub(crate) const MEASURING: &[Case] = cases![
    t219_f31_given_no_address_that_matches_when_one_comes_and_goes_then_its_listeners_do_and_no_others,
    t220_f31_given_no_node_address_when_the_default_route_has_another_source_then_node_ports_move_there,
    f28_given_the_nodes_own_link_when_it_flaps_then_listeners_stay_and_streams_go_on,
];

/// How soon a listener follows its address (F31).
const SOON: Duration = Duration::from_secs(1);
/// Networks of which the node has no address at first.
const LATER: &str = "198.51.100.0/24,2001:db8:51::/64";

pub(crate) fn later(number: u8) -> [IpAddr; 2] {
    [[198, 51, 100, number].into(), [0x2001, 0xdb8, 0x51, 0, 0, 0, 0, number.into()].into()]
}

pub(crate) fn at(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, NODE_PORT)
}

fn is_answered(outcome: &Outcome) -> bool {
    outcome.pod().is_some()
}

/// Asks on the node itself, over both protocols.
fn answers(node: &Namespace, to: SocketAddr) {
    for ask in [ask_tcp, ask_udp] {
        expect_at(node, to, ask, "is answered", is_answered);
    }
}

fn refuses(node: &Namespace, to: SocketAddr) {
    for ask in [ask_tcp, ask_udp] {
        expect_at(node, to, ask, "is refused", |outcome| *outcome == Outcome::Refused);
    }
}

/// The sockets that are bound exactly there, TCP and UDP, by their inodes.
pub(crate) fn sockets(node: &Namespace, at: SocketAddr) -> Vec<String> {
    let (address, suffix) = match at.ip() {
        IpAddr::V4(ip) => (format!("{:08X}", u32::from_ne_bytes(ip.octets())), ""),
        IpAddr::V6(ip) => {
            let words = ip.octets();
            let (words, _) = words.as_chunks::<4>();
            (words.iter().map(|word| format!("{:08X}", u32::from_ne_bytes(*word))).collect(), "6")
        }
    };
    let local = format!("{address}:{:04X}", at.port());
    let bound = |protocol: &str, state: &str| {
        let table = node.run(|| fs::read_to_string(format!("/proc/thread-self/net/{protocol}{suffix}")));
        let table = table.expect("procfs");
        let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let rows = rows.filter(|row| row.get(1) == Some(&&*local) && row.get(3) == Some(&state));
        rows.filter_map(|row| Some(format!("{protocol} {}", row.get(9)?))).collect::<Vec<_>>()
    };
    // TCP_LISTEN; of UDP, those that are not connected.
    [bound("tcp", "0A"), bound("udp", "07")].concat()
}

/// Waits until sockets of both protocols are bound there, or none is, and tells how long that took.
fn until_bound(node: &Namespace, at: SocketAddr, wanted: bool) -> Duration {
    let (count, began) = (if wanted { 2 } else { 0 }, Instant::now());
    until(&format!("{at} to have {count} sockets"), || sockets(node, at).len() == count);
    began.elapsed()
}

pub(crate) fn connect(node: &Namespace, to: SocketAddr) -> TcpStream {
    let stream = node.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        ask_on(&mut stream)?;
        Ok(stream)
    });
    stream.expect("it is served")
}

fn t105_t218_given_primary_and_localhost_when_asked_then_both_families_and_protocols_answer_there_alone() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let [v4, v6] = later(9);
    [v4, v6].iter().for_each(|ip| rig.add_address(0, *ip).expect("an address can be added"));
    let stage = Stage::start_with(rig, &web, &["--nodeport-addresses", "primary,localhost"]);
    let node = stage.rig.node(0);

    for loopback in ["127.0.0.1", "::1"] {
        answers(node, at(loopback.parse().expect("an address")));
    }
    for from in [stage.rig.client(), stage.rig.pod(0, 1), stage.rig.pod(1, 0), stage.rig.node(1), node] {
        stage.served(from, NodePort, &LOCAL);
    }
    for other in [v4, v6] {
        refuses(node, at(other));
    }
}

fn t218_given_all_when_asked_then_every_address_but_loopback_answers() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let others = later(9);
    others.iter().for_each(|ip| rig.add_address(0, *ip).expect("an address can be added"));
    let stage = Stage::start_with(rig, &web, &["--nodeport-addresses", "all"]);
    let node = stage.rig.node(0);

    stage.served(stage.rig.client(), NodePort, &LOCAL);
    others.into_iter().for_each(|ip| answers(node, at(ip)));
    for loopback in ["127.0.0.1", "::1"] {
        refuses(node, at(loopback.parse().expect("an address")));
    }
    assert!(stage.log().contains("open on each network that this machine is in"), "{}", stage.log());
}

fn t219_f31_given_no_address_that_matches_when_one_comes_and_goes_then_its_listeners_do_and_no_others() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = Stage::start_with(rig, &web, &["--nodeport-addresses", LATER]);
    let (rig, node) = (&stage.rig, stage.rig.node(0));
    assert!(stage.log().contains("no node port is served until one is"), "{}", stage.log());
    assert_eq!(stage.metric("kuberelay_listeners", "failed"), 0, "that is no error");
    let cluster_ips = FAMILIES.map(|family| stage.at(ClusterIp, family));
    let of_cluster_ips = cluster_ips.map(|at| sockets(node, at));

    for ip in later(1) {
        rig.add_address(0, ip).expect("an address can be added");
        let took = until_bound(node, at(ip), true);
        println!("{ip}: bound after {took:?}");
        assert!(took < SOON, "{ip}: {took:?}");
        answers(node, at(ip));
    }
    let first = later(1).map(|ip| sockets(node, at(ip)));
    let mut open = later(1).map(|ip| connect(node, at(ip)));
    for ip in later(2) {
        rig.add_address(0, ip).expect("an address can be added");
        let took = until_bound(node, at(ip), true);
        assert!(took < SOON, "{ip}: {took:?}");
        answers(node, at(ip));
    }
    for ip in later(2) {
        rig.remove_address(0, ip).expect("it is there");
        let took = until_bound(node, at(ip), false);
        println!("{ip}: left after {took:?}");
        assert!(took < SOON, "{ip}: {took:?}");
    }

    assert_eq!(later(1).map(|ip| sockets(node, at(ip))), first, "they were not bound anew");
    assert_eq!(cluster_ips.map(|at| sockets(node, at)), of_cluster_ips, "nor were these");
    open.iter_mut().for_each(|stream| assert!(is_answered(&ask_on(stream).expect("it goes on"))));
    assert!(!stage.log().contains("cannot listen"), "{}", stage.log());
    assert_eq!(stage.metric("kuberelay_host_read_errors_total", ""), 0);
}

/// A load balancer asks for it at 31025.
const MAIL: &str = "---
apiVersion: v1
kind: Service
metadata: {name: mail}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.5
  externalTrafficPolicy: Local
  healthCheckNodePort: 31025
  ports: [{name: smtp, port: 25}]
";

fn t219_f31_given_own_servers_on_all_addresses_when_one_comes_and_goes_then_they_do_so_as_well() {
    let rig = rig();
    let web = Web { more: MAIL.into(), ..Web::default() };
    let stage =
        Stage::start_with(rig, &web, &["--nodeport-addresses", LATER, "--healthz-bind-address", "0.0.0.0:10256"]);
    let node = stage.rig.node(0);
    let [first, second] = [later(1), later(2)];
    for ip in first.into_iter().chain(second) {
        stage.rig.add_address(0, ip).expect("an address can be added");
    }

    for ip in first.into_iter().chain(second) {
        until("health is told", || status_line(node, ip, 10256).is_some_and(|line| line.contains(" 200 ")));
        until("the health port answers", || status_line(node, ip, 31025).is_some_and(|line| line.contains(" 503 ")));
    }
    let stay = first.map(|ip| [10256, 31025].map(|port| sockets(node, SocketAddr::new(ip, port))));
    for ip in second {
        stage.rig.remove_address(0, ip).expect("it is there");
    }

    for ip in second {
        let gone = || [10256, 31025].iter().all(|port| sockets(node, SocketAddr::new(ip, *port)).is_empty());
        until("nobody answers there", gone);
    }
    assert_eq!(first.map(|ip| [10256, 31025].map(|port| sockets(node, SocketAddr::new(ip, port)))), stay);
}

/// What a server on the node answers to a question after its health.
pub(crate) fn status_line(node: &Namespace, ip: IpAddr, port: u16) -> Option<String> {
    let answer = node.run(|| {
        let mut stream = TcpStream::connect((ip, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    answer.ok()?.lines().next().map(str::to_owned)
}

fn t219_given_an_ipv6_address_in_doubt_when_it_is_usable_then_it_is_bound_and_one_of_somebody_else_never() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = Stage::start_with(rig, &web, &["--nodeport-addresses", LATER]);
    let (rig, node) = (&stage.rig, stage.rig.node(0));
    let [[_, ours], [_, theirs]] = [later(1), later(2)];
    rig.add_address_of_neighbour(0, theirs).expect("an address can be added");

    for ip in [theirs, ours] {
        rig.add_address_in_doubt(0, ip).expect("an address can be added");
    }
    assert!(rig.address_is_usable(0, ours).expect("it is there").is_none(), "it takes a while");
    until("the neighbour to object", || rig.address_is_usable(0, theirs).expect("it is there") == Some(false));

    until_bound(node, at(ours), true);
    answers(node, at(ours));
    assert!(sockets(node, at(theirs)).is_empty());
    assert!(!stage.log().contains("cannot listen"), "{}", stage.log());
}

/// Has a relay find out by itself what its node's addresses are.
fn without_node_address(command: &mut Command) {
    let arguments: Vec<OsString> = command.get_args().map(Into::into).collect();
    let place = arguments.iter().position(|argument| argument == "--node-address").expect("it is given");
    let mut fresh = Command::new(command.get_program());
    fresh.args(&arguments[..place]).args(&arguments[place + 2..]);
    *command = fresh;
}

fn t220_f31_given_no_node_address_when_the_default_route_has_another_source_then_node_ports_move_there() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = Stage::start_bare(rig, &web, |command| {
        without_node_address(command);
        command.args(["--nodeport-addresses", "primary"]);
    });
    let (rig, node) = (&stage.rig, stage.rig.node(0));
    let (old, [new, _]) = (node.address(Family::V4), later(1));
    answers(node, at(old));
    let of_other_family = sockets(node, stage.at(NodePort, Family::V6));

    rig.add_address(0, new).expect("an address can be added");
    rig.remove_address(0, old).expect("it is there");

    let took = until_bound(node, at(new), true);
    assert!(took < SOON, "{took:?}");
    answers(node, at(new));
    until_bound(node, at(old), false);
    assert!(!of_other_family.is_empty());
    assert_eq!(sockets(node, stage.at(NodePort, Family::V6)), of_other_family, "not bound anew");
}

fn f28_given_the_nodes_own_link_when_it_flaps_then_listeners_stay_and_streams_go_on() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = Stage::start(rig, &web);
    let (rig, node) = (&stage.rig, stage.rig.node(0));
    let node_ports = FAMILIES.map(|family| stage.at(NodePort, family));
    let bound = node_ports.map(|at| sockets(node, at));
    let mut open = node_ports.map(|at| connect(rig.client(), at));
    let told = |change: &str, times| stage.log().matches(&format!("{change}=\"fd81::2")).count() == times;

    for round in 1..=2 {
        rig.uplink_down(0).expect("the node is ours");
        until("the loss to be noticed", || told("gone", round));
        rig.uplink_up(0).expect("the node is ours");
        // The kernel sets links to work once a second at most, all namespaces together: until then nobody there is reached.
        for to in node_ports {
            let closed = SocketAddr::new(to.ip(), CLOSED);
            expect_at(rig.client(), closed, ask_tcp, "is reached", |outcome| *outcome == Outcome::Refused);
        }
        let began = Instant::now();

        for to in node_ports {
            expect_at(rig.client(), to, ask_tcp, "is back", is_answered);
        }
        println!("served {:?} after the node is reached", began.elapsed());
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        open.iter_mut().for_each(|stream| assert!(is_answered(&ask_on(stream).expect("it goes on"))));
        assert_eq!(node_ports.map(|at| sockets(node, at)), bound, "not bound anew");
        until("the address to be noticed", || told("came", round));
    }
}

fn f31_given_an_address_that_is_asked_for_by_name_when_it_comes_then_it_is_bound_within_a_second() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let [ip, _] = later(1);
    let expose = format!("{ip}:{NODE_PORT}=default/web:{PORT}");
    let stage = Stage::start_with(rig, &web, &["--expose", &expose]);
    assert_eq!(stage.metric("kuberelay_listener_failures", "not_local"), 2);
    // It is tried after 0.5, 1.5, 3.5 and 7.5 s by itself.
    let began = Instant::now();
    until("the next try to be far away", || began.elapsed() > Duration::from_secs(4));

    stage.rig.add_address(0, ip).expect("an address can be added");

    let took = until_bound(stage.rig.node(0), at(ip), true);
    assert!(took < SOON, "{took:?}");
    answers(stage.rig.node(0), at(ip));
}

fn t123_f31_given_an_external_ip_that_is_served_when_somebody_gives_it_to_the_node_then_it_is_served_all_along() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = Stage::start_bare(rig, &web, |_| ());
    let (rig, node) = (&stage.rig, stage.rig.node(0));
    let external_ips = FAMILIES.map(|family| stage.at(ExternalIp, family));
    let bound = external_ips.map(|at| sockets(node, at));
    let mut open = external_ips.map(|at| connect(rig.client(), at));

    // As keepalived does where it takes over, and where it gives back.
    for given in [true, false] {
        for to in external_ips {
            let changed = if given { rig.add_address(0, to.ip()) } else { rig.remove_address(0, to.ip()) };
            changed.expect("the node is ours");
        }
        let words = if given { "came=\"10.96.0.2" } else { "gone=\"10.96.0.2" };
        until("that is noticed", || stage.log().contains(words));

        stage.served(rig.client(), ExternalIp, &LOCAL);
        assert_eq!(external_ips.map(|at| sockets(node, at)), bound, "not bound anew");
        open.iter_mut().for_each(|stream| assert!(is_answered(&ask_on(stream).expect("it goes on"))));
    }
}

fn f32_given_a_node_port_that_another_process_holds_when_it_is_freed_then_it_is_taken_within_five_seconds() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let held = FAMILIES.map(|family| at(rig.node(0).address(family)));
    let holders = held.map(|at| {
        let bind = || Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?));
        rig.node(0).run(bind).expect("the port is free")
    });

    let stage = Stage::start_with(rig, &web, &["--nodeport-addresses", "primary,localhost"]);
    let node = stage.rig.node(0);

    assert_eq!(stage.metric("kuberelay_listener_failures", "in_use"), 4);
    assert!(stage.reports("in_use"));
    for other in ["127.0.0.1", "::1"] {
        answers(node, at(other.parse().expect("an address")));
    }
    stage.served(node, ClusterIp, &LOCAL);
    drop(holders);
    for at in held {
        let took = until_bound(node, at, true);
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
    stage.served(stage.rig.client(), NodePort, &LOCAL);
    assert_eq!(stage.metric("kuberelay_listener_failures", "in_use"), 0);
}

fn given_a_relay_on_each_node_when_node_ports_are_asked_then_all_answer_and_by_policy_local_those_with_pods() {
    let rig = Rig::build(Shape { nodes: 3, pods_per_node: 1, router: true }).expect("the rig builds");
    let _running = Backends::start((0..2).flat_map(|i| rig.pods(i)));
    let web = Web::default().with([Pod::of(&rig, 0, 0), Pod::of(&rig, 1, 0)]);
    let stage = Stage::start(rig, &web);
    let _others = [1, 2].map(|i| stage.start_on(i, &["--nodeport-addresses", "primary"]));
    let rig = &stage.rig;
    let asked = |i: usize, what: &str, right: &(dyn Fn(&Outcome) -> bool + Sync)| {
        for family in FAMILIES {
            for ask in [ask_tcp, ask_udp] {
                expect_at(rig.client(), at(rig.node(i).address(family)), ask, what, right);
            }
        }
    };

    for i in 0..3 {
        for pod in ["pod0-0", "pod1-0"] {
            asked(i, "each pod answers", &|outcome| outcome.pod() == Some(pod));
        }
    }

    stage.change(&Web { external_policy: "Local", ..web });

    asked(2, "no pod is here", &|outcome| *outcome == Outcome::Silence);
    for (i, pod) in [(0, "pod0-0"), (1, "pod1-0")] {
        asked(i, "its own pod answers", &|outcome| outcome.pod() == Some(pod));
    }
}

fn given_a_node_port_when_the_machine_is_asked_who_listens_there_then_it_names_us() {
    let rig = rig();
    let web = Web::default().with(local(&rig));
    let stage = Stage::start(rig, &web);
    let pid = stage.relay.pids()[0];
    let port = NODE_PORT.to_string();

    for (program, arguments, names_us) in [
        ("ss", vec!["-ltnp".to_owned(), format!("sport = :{port}")], format!("pid={pid},")),
        ("ss", vec!["-lunp".to_owned(), format!("sport = :{port}")], format!("pid={pid},")),
        ("lsof", vec!["-nP".to_owned(), "-i".to_owned(), format!("tcp:{port}")], format!("{pid} ")),
    ] {
        let Some(path) = find(program) else {
            skip(program, "not installed");
            continue;
        };
        let output = stage.rig.node(0).run(|| Command::new(path).args(&arguments).output()).expect("it starts");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains(&names_us) && said.contains(&port), "{program} {arguments:?}: {said}");
        for family in FAMILIES {
            assert!(said.contains(&stage.rig.node(0).address(family).to_string()), "{program}: {said}");
        }
    }
}
