//! What becomes of addresses and streams where the network around a relay fails, or the kernel tells more of it than
//! there is room for.
//!
//! Who may take which route away, and what follows, is in `vips`.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::cleanup::{Removed, remove_routes};
use kube_relay::config::{DEFAULT_ROUTE_PROTOCOL, DEFAULT_VIP_ROUTES_LINGER};
use kube_relay::vips::{AtExit, VipOptions, Vips, Wanted};
use rustix::process::Signal;

use crate::rig::{Case, DualAddress, FAMILIES, Namespace, full};
use crate::stage::{CLOSED, ClusterIp, Outcome, Stage, Web, ask_on, ask_tcp, expect_at, lead_to_node, until};
use crate::verdicts::{LOCAL, backends, local, rig};
use crate::vips::{VIPS, bare, connect, host, in_runtime, of, ours};

pub(crate) const CASES: &[Case] =
    cases![f28_given_loopback_that_was_never_up_when_addresses_are_required_then_they_are_made_local,];

pub(crate) const MEASURING: &[Case] = cases![
    f28_given_a_cable_that_is_unplugged_when_plugged_again_then_streams_go_on_and_clients_are_served_within_a_second,
    f28_given_more_news_than_there_is_room_for_when_a_route_went_among_them_then_all_are_looked_at_and_it_is_back,
];

fn f28_given_a_cable_that_is_unplugged_when_plugged_again_then_streams_go_on_and_clients_are_served_within_a_second() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = bare(&web, rig);
    let mut open = FAMILIES.map(|family| connect(&stage, stage.at(ClusterIp, family)));

    for _ in 0..if full() { 3 } else { 1 } {
        stage.rig.unplug(0).expect("it can be");
        let (served, went_on) = thread::scope(|scope| {
            // Asked while nobody hears it.
            let open = open.each_mut().map(|stream| scope.spawn(move || goes_on(stream)));
            until("clients notice", || asked(&stage).iter().all(|served| !served));

            let plugged = Instant::now();
            stage.rig.plug(0).expect("it can be");
            lead_to_node(&stage.rig, 0);
            reach_node(&stage);
            let reached = Instant::now();

            stage.served(stage.rig.client(), ClusterIp, &LOCAL);
            let served = reached.elapsed();
            open.into_iter().for_each(|stream| stream.join().expect("the stream goes on"));
            (served, plugged.elapsed())
        });
        println!(
            "served {served:?} after the node was reached, open streams {went_on:?} after the cable was plugged in"
        );
        assert!(served < Duration::from_secs(1) && went_on < Duration::from_secs(5), "{served:?}, {went_on:?}");
    }
    assert_eq!(ours(stage.rig.node(0)), of(&stage, &VIPS));
}

/// Waits until the node's kernel hears the client: links are set to work once a second at most, all namespaces together.
fn reach_node(stage: &Stage) {
    for family in FAMILIES {
        let closed = SocketAddr::new(stage.rig.node(0).address(family), CLOSED);
        expect_at(stage.rig.client(), closed, ask_tcp, "is reached", |outcome| *outcome == Outcome::Refused);
    }
}

/// Whether new connections are served, by family.
fn asked(stage: &Stage) -> [bool; 2] {
    FAMILIES.map(|family| {
        let to = stage.at(ClusterIp, family);
        let outcome = stage.rig.client().run(|| Ok(ask_tcp(to))).expect("the namespace is ours");
        outcome.pod().is_some()
    })
}

fn goes_on(stream: &mut TcpStream) {
    let outcome = ask_on(stream).expect("the stream goes on");
    assert!(outcome.pod().is_some(), "{outcome:?}");
}

fn f28_given_more_news_than_there_is_room_for_when_a_route_went_among_them_then_all_are_looked_at_and_it_is_back() {
    const MUCH: u16 = 3_000;
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = bare(&web, rig);
    let node = stage.rig.node(0);
    let all = of(&stage, &VIPS);

    // More than once: a look that is due anyway may happen to come next, but not each time.
    for _ in 0..3 {
        let before = lost_news(node);
        stage.signal(Signal::STOP);
        stage.rig.churn(0, MUCH).expect("routes can be added");
        stage.rig.network_foreign_to_node(0, host(all[0])).expect("it is there");
        assert!(lost_news(node) > before, "all of them had room");

        let began = Instant::now();
        stage.signal(Signal::CONT);

        until("it is back", || ours(node) == all);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
}

fn f28_given_loopback_that_was_never_up_when_addresses_are_required_then_they_are_made_local() {
    let address = Ipv4Addr::new(10, 96, 0, 1).into();
    let nowhere = DualAddress { v4: Ipv4Addr::UNSPECIFIED.into(), v6: Ipv6Addr::UNSPECIFIED.into() };
    let node = Namespace::create("node", nowhere).expect("namespaces can be made");

    let removed = in_runtime(&node, remove_routes(DEFAULT_ROUTE_PROTOCOL));
    assert_eq!(removed.expect("there is nothing to remove"), Removed::default());
    let granted = in_runtime(&node, async {
        let (protocol, linger) = (DEFAULT_ROUTE_PROTOCOL, DEFAULT_VIP_ROUTES_LINGER);
        let vips = Vips::start(VipOptions { protocol, linger, at_exit: AtExit::Keep, tune_sysctls: false });
        vips.require(vec![Wanted { address, announced: false }]).await
    });

    assert_eq!(granted.refused(address), None);
    assert!(granted.hold(address).is_some());
    assert_eq!(ours(&node), [address]);
}

/// How many messages about routes and the like had no room, at any listener of a namespace.
fn lost_news(node: &Namespace) -> u64 {
    let table: io::Result<String> = node.run(|| fs::read_to_string("/proc/thread-self/net/netlink"));
    let table = table.expect("the kernel tells its sockets");
    // sk, Eth (0: rtnetlink), Pid, Groups, Rmem, Wmem, Dump, Locks, Drops, Inode
    let sockets = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    sockets.filter(|fields| fields.get(1) == Some(&"0")).filter_map(|fields| fields.get(8)?.parse::<u64>().ok()).sum()
}
