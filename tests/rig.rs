//! The rig itself: everybody reaches whom they should, in both families, and nothing is left behind. Then a relay in
//! it: `verdicts`, `vips`, `repairs`, `rights`, `guard`, clients whose addresses it is to `preserve` and whose `replies` it leads
//! back, the `matrix` of whom backends see, node `addresses`, a `registry`, `floods`, a `surge` of pods and `beside` kube-proxy, on
//! the `stage` that they share, and in place of it: `bootstrap`, `own_node`; and what the `doctor` says of it. Then one on each of
//! its `nodes`, among `strangers`, and among neighbours (`arp`), in the `cluster` that these share.
//!
//! Needs namespaces of its own (no root where the kernel gives them to everyone); skips with the reason otherwise.

#[cfg(feature = "kubernetes")]
#[path = "support/api_server.rs"]
#[allow(dead_code, unreachable_pub, reason = "it can do more than is asked of it here, and is exported to nobody")]
mod api_server;
#[path = "support/rig.rs"]
mod rig;

/// Test cases that are called what their functions are called.
macro_rules! cases {
    ($($case:ident),+ $(,)?) => { &[$((stringify!($case), $case)),+] };
}

#[path = "rig/addresses.rs"]
mod addresses;
#[path = "rig/arp.rs"]
mod arp;
#[path = "rig/beside.rs"]
mod beside;
#[cfg(feature = "kubernetes")]
#[path = "rig/bootstrap.rs"]
mod bootstrap;
#[path = "rig/cluster.rs"]
mod cluster;
#[path = "rig/doctor.rs"]
mod doctor;
#[path = "rig/floods.rs"]
mod floods;
#[path = "rig/guard.rs"]
mod guard;
#[path = "rig/guard_filters.rs"]
mod guard_filters;
#[path = "rig/matrix.rs"]
mod matrix;
#[path = "rig/neighbours.rs"]
mod neighbours;
#[path = "rig/nodes.rs"]
mod nodes;
#[cfg(feature = "kubernetes")]
#[path = "rig/own_node.rs"]
mod own_node;
#[path = "rig/preserve.rs"]
mod preserve;
#[path = "rig/registry.rs"]
mod registry;
#[path = "rig/repairs.rs"]
mod repairs;
#[path = "rig/replies.rs"]
mod replies;
#[path = "rig/rights.rs"]
mod rights;
#[path = "rig/stage.rs"]
mod stage;
#[path = "rig/strangers.rs"]
mod strangers;
#[path = "rig/surge.rs"]
mod surge;
#[path = "rig/sysctls.rs"]
mod sysctls;
#[path = "rig/verdicts.rs"]
mod verdicts;
#[path = "rig/vips.rs"]
mod vips;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use rig::{FAMILIES, Namespace, Rig, Shape};

const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let network: [rig::Case; 5] = [
        ("given_the_full_rig_when_parts_connect_then_they_reach_each_other", parts_reach_each_other),
        ("given_no_router_when_the_client_connects_then_it_reaches_nodes_and_pods", the_client_needs_no_router),
        ("given_a_vip_on_a_node_when_the_client_connects_then_the_node_answers", a_vip_answers),
        ("given_a_child_in_a_node_when_it_is_dropped_then_it_is_gone", a_child_ends_with_its_owner),
        ("given_a_rig_when_it_is_dropped_then_its_cables_are_gone", a_dropped_rig_is_gone),
    ];
    #[cfg(feature = "kubernetes")]
    let bootstrap = &[bootstrap::CASES, own_node::CASES].concat();
    #[cfg(not(feature = "kubernetes"))]
    let bootstrap: &[rig::Case] = &[];
    let beside_others = [beside::CASES, bootstrap].concat();
    // Files with long cases first: those which are left at the end are to be short.
    let in_cluster = [arp::CASES, nodes::CASES, strangers::CASES].concat();
    let on_stage = [
        matrix::CASES,
        guard_filters::CASES,
        surge::CASES,
        registry::CASES,
        preserve::CASES,
        vips::CASES,
        addresses::CASES,
        verdicts::CASES,
        doctor::CASES,
        guard::CASES,
        repairs::CASES,
        rights::CASES,
        replies::CASES,
    ]
    .concat();
    // A kernel tells all namespaces together of cables, once a second where many change.
    let measuring = [
        addresses::MEASURING,
        repairs::MEASURING,
        vips::MEASURING,
        guard::MEASURING,
        guard_filters::MEASURING,
        preserve::MEASURING,
        replies::MEASURING,
        floods::CASES,
    ]
    .concat();
    rig::run(&[&in_cluster[..], &on_stage, &beside_others, &network].concat(), &measuring)
}

fn parts_reach_each_other() {
    let rig = Rig::build(Shape::default()).expect("the rig builds");

    for i in 0..3 {
        assert_reaches(rig.client(), rig.node(i));
        assert_reaches(rig.node(i), rig.client());
        for j in 0..3 {
            assert_reaches(rig.node(i), rig.pod(i, j));
        }
    }
    assert_reaches(rig.client(), rig.pod(2, 2));
    assert_reaches(rig.pod(0, 0), rig.pod(0, 1));
    assert_reaches(rig.pod(0, 0), rig.pod(1, 2));
    assert_reaches(rig.pod(1, 0), rig.node(2));
}

fn the_client_needs_no_router() {
    let rig = Rig::build(Shape { nodes: 2, pods_per_node: 1, router: false }).expect("the rig builds");

    assert!(rig.router().is_none());
    for i in 0..2 {
        assert_reaches(rig.client(), rig.node(i));
        assert_reaches(rig.client(), rig.pod(i, 0));
        assert_reaches(rig.pod(i, 0), rig.client());
    }
}

fn a_vip_answers() {
    for router in [true, false] {
        let rig = Rig::build(Shape { nodes: 2, pods_per_node: 1, router }).expect("the rig builds");

        let vip = rig.vip(1, 7).expect("the address is added");
        let again = rig.vip(1, 7).expect("adding it again is fine");

        assert_eq!(vip, again);
        for family in FAMILIES {
            assert_connects(rig.client(), rig.node(1), vip.of(family));
            assert_connects(rig.pod(0, 0), rig.node(1), vip.of(family));
        }
    }
}

fn a_child_ends_with_its_owner() {
    let rig = Rig::build(Shape { nodes: 1, pods_per_node: 0, router: false }).expect("the rig builds");
    let mut shell = Command::new("sh");
    shell.args(["-c", "readlink /proc/self/ns/net; sleep 600 & wait"]).stdout(Stdio::piped());

    let mut child = rig.node(0).spawn(shell).expect("a shell starts");
    let inside = child.next_line().expect("it says where it is");
    let here = fs::read_link("/proc/self/ns/net").expect("we are somewhere");
    assert_ne!(inside, here.to_string_lossy());
    // What has told where it is may be its child still.
    let sleeps = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n");
    let pids = until("the shell has started its own child", || {
        Some(child.pids()).filter(|pids| pids.len() == 2 && sleeps(&pids[1]))
    });
    drop(child);

    until("the shell and its child are gone", || (!pids.iter().any(runs)).then_some(()));
}

fn a_dropped_rig_is_gone() {
    let rig = Rig::build(Shape { nodes: 1, pods_per_node: 1, router: true }).expect("the rig builds");
    let pod = rig.pod(0, 0);
    let addresses = rig::DualAddress { v4: pod.address(Family::V4), v6: pod.address(Family::V6) };
    let kept = pod.descriptor().expect("it has one").try_clone().expect("descriptors are left");
    let kept = Namespace::held("kept", addresses, kept);
    let cables = Rig::devices(&kept).expect("devices are listed");

    drop(rig);

    until("the far end of the cable takes ours along", || {
        (Rig::devices(&kept).expect("devices are listed") < cables).then_some(())
    });
}

/// True while a process is neither gone nor a zombie that waits for its parent.
fn runs(pid: &u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !state.is_empty() && !state.contains(") Z ")
}

fn assert_reaches(from: &Namespace, to: &Namespace) {
    for family in FAMILIES {
        assert_connects(from, to, to.address(family));
    }
}

/// A byte goes there and back, and the answering side sees where it came from.
fn assert_connects(from: &Namespace, to: &Namespace, address: IpAddr) {
    let listener = to.run(|| TcpListener::bind((address, 0))).expect("its own address can be bound");
    let address = listener.local_addr().expect("it is bound");
    let answerer = thread::spawn(move || answer_one(&listener));

    let answer = from.run(|| ask(address)).unwrap_or_else(|error| panic!("{from:?} to {to:?} at {address}: {error}"));

    assert_eq!(answer, b'!');
    answerer.join().expect("it does not panic").expect("it answers");
}

fn answer_one(listener: &TcpListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut question = [0];
    stream.read_exact(&mut question)?;
    stream.write_all(b"!")
}

fn ask(address: SocketAddr) -> io::Result<u8> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"?")?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    Ok(answer[0])
}

/// Waits for a condition that no descriptor tells of.
fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
