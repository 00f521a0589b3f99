//! What floods cost a relay whose listener gives no answer, or refuses: nothing to speak of.
//!
//! How such a listener comes to be is in `verdicts`.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;

use crate::rig::{Case, full};
use crate::stage::{ClusterIp, LoadBalancerIp, Stage, Web};
use crate::verdicts::{LOCAL, backends, local, ranges, remote, rig};

pub(crate) const CASES: &[Case] = cases![given_floods_when_a_listener_is_parked_or_drops_then_the_relay_uses_no_cpu];

/// Within so long a listener has to show what it costs.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long each flood lasts.
fn flood() -> Duration {
    Duration::from_millis(if full() { 1_000 } else { 250 })
}

fn given_floods_when_a_listener_is_parked_or_drops_then_the_relay_uses_no_cpu() {
    let rig = rig();
    let _running = backends(&rig);
    let [near, far] = [local(&rig), remote(&rig)];
    let kept_out = ranges(&[rig.node(1)]);
    let states = [
        ("parked", Web::default(), LoadBalancerIp),
        ("parked again", Web::default(), ClusterIp),
        ("dropping outside", Web { external_policy: "Local", ..Web::default() }.with(far.clone()), LoadBalancerIp),
        ("dropping on both sides", Web { internal_policy: "Local", ..Web::default() }.with(far), ClusterIp),
        ("denying", Web { source_ranges: kept_out, ..Web::default() }.with(near.clone()), LoadBalancerIp),
    ];
    let served = Web::default().with(near);
    let stage = Stage::start(rig, &served);

    for (what, web, entry) in states {
        stage.change(&web);
        let to = stage.at(entry, Family::V4);
        assert_cheap(&stage, &format!("{what}, SYNs"), || syn(to));
        assert_cheap(&stage, &format!("{what}, datagrams"), || datagram(to));
        stage.change(&served);
        stage.served(stage.rig.client(), entry, &LOCAL);
        assert_cheap(&stage, &format!("{what}, then revived and idle"), || thread::sleep(Duration::from_micros(100)));
    }
}

/// The relay uses less than a hundredth of a CPU. Who shares the machine may make one flood dearer, and no more than that; a
/// loop that spins makes all of them so.
fn assert_cheap(stage: &Stage, what: &str, packet: impl Fn() + Sync) {
    let tries = PATIENCE.as_millis() / flood().as_millis();
    let mut floods = (0..tries).map(|_| flooded(stage, &packet)).inspect(|(used, sent)| {
        println!("{what}: {sent} in {:?}, {used:?} of CPU", flood());
        assert!(*sent > 1_000, "that is no flood");
    });
    assert!(floods.any(|(used, _)| used < flood() / 100), "{what}: too much CPU");
}

/// Two threads of the client do it over and over: what the relay used meanwhile, and how often they did it.
fn flooded(stage: &Stage, packet: impl Fn() + Sync) -> (Duration, u64) {
    let (ends, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let client = stage.rig.client();
    let used = thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                client.enter().expect("the namespace is ours");
                while !ends.load(Ordering::Relaxed) {
                    packet();
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let before = stage.cpu_time();
        let end = Instant::now() + flood();
        thread::sleep(end - Instant::now()); // What is measured is what happens in this time.
        let used = stage.cpu_time() - before;
        ends.store(true, Ordering::Relaxed);
        used
    });
    (used, sent.into_inner())
}

/// The first packet of a connection; what comes of it is not waited for.
fn syn(to: SocketAddr) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM.nonblocking(), None);
    let socket = socket.expect("descriptors are left");
    let _ = socket.connect(&to.into()); // It is on its way, or refused already.
}

fn datagram(to: SocketAddr) {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a port is free");
    let _ = socket.send_to(b"flood", to); // Of an earlier one's refusal nobody wants to know.
}
