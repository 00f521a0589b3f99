//! Addresses of Services that are nowhere before a relay makes them local: who reaches them, for how long, and what
//! becomes of the routes when somebody deletes them, when the relay ends, when it may not make any.
//!
//! When a route must be there is decided in `vip_routes` and its tests; here a kernel is asked.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use kube_relay::cleanup::remove_routes;
use kube_relay::config::{DEFAULT_ROUTE_PROTOCOL, DEFAULT_VIP_ROUTES_LINGER};
use kube_relay::name::Family;
use kube_relay::vips::{AtExit, VipOptions, Vips, Wanted};
use rustix::process::Signal;
use rustix::thread::CapabilitySet;

use crate::rig::{Case, FAMILIES, Namespace, Rig, with_only};
use crate::stage::{
    ClusterIp, Entry, ExternalIp, LINGER, LoadBalancerIp, Outcome, PORT, Stage, Web, ask_on, ask_tcp, ask_udp,
    expect_at, until,
};
use crate::sysctls::{changed, sysctls};
use crate::verdicts::{LOCAL, backends, local, rig};

pub(crate) const CASES: &[Case] = cases![
    t096_t100_t104_t178_given_addresses_that_are_nowhere_when_served_then_each_has_a_route_and_no_other,
    f28_given_routes_when_somebody_deletes_them_then_they_are_back_and_streams_go_on,
    f28_given_a_network_that_others_made_local_when_they_take_it_back_then_routes_of_ours_take_its_place,
    f28_given_loopback_that_goes_down_when_it_is_up_again_then_the_addresses_are_served,
    given_open_streams_when_their_service_is_deleted_then_they_go_on_and_each_route_goes_with_its_last_one,
    f21_given_a_relay_that_was_killed_when_another_starts_then_it_adopts_what_it_needs_and_removes_the_rest,
    given_routes_of_a_relay_when_cleaned_up_then_they_alone_are_removed_once_it_has_ended,
    t237_given_a_relay_that_runs_when_a_second_one_starts_then_it_names_the_first_and_removes_none_of_its_routes,
    t236_given_no_right_to_change_routes_when_others_made_addresses_local_then_they_are_relied_on_and_named,
    given_a_load_balancer_ip_of_the_neighbours_when_arp_would_be_answered_then_it_gets_no_route,
    given_a_kernel_that_binds_what_is_not_local_when_arp_would_be_answered_then_that_is_told_all_the_same,
    given_an_ip_of_the_neighbours_that_others_made_local_when_they_take_it_back_then_no_route_has_arp_answered,
    f28_given_a_route_that_others_replace_when_theirs_goes_then_ours_is_back,
    given_a_node_without_ipv6_when_a_service_has_both_families_then_the_other_one_is_served,
];

pub(crate) const MEASURING: &[Case] = cases![
    f28_given_loopback_that_loses_its_addresses_when_its_routes_go_silently_then_they_are_back,
    given_ten_thousand_addresses_when_required_then_they_are_local_soon_and_gone_after_cleanup,
];

pub(crate) const VIPS: [Entry; 3] = [ClusterIp, ExternalIp, LoadBalancerIp];

/// Nothing is served any more.
const NO_SERVICE: &str = "apiVersion: v1\nkind: List\nitems: []\n";

pub(crate) fn bare(web: &Web, rig: Rig) -> Stage {
    Stage::start_bare(rig, web, |_| ())
}

/// The addresses that the node has routes of ours to.
pub(crate) fn ours(node: &Namespace) -> Vec<IpAddr> {
    let networks = Rig::local_networks(node, DEFAULT_ROUTE_PROTOCOL).expect("routes are listed");
    networks.into_iter().map(|(address, _)| address).collect()
}

pub(crate) fn of(stage: &Stage, entries: &[Entry]) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> =
        entries.iter().flat_map(|entry| FAMILIES.map(|family| stage.at(*entry, family).ip())).collect();
    addresses.sort();
    addresses
}

pub(crate) fn host(address: IpAddr) -> (IpAddr, u8) {
    (address, if address.is_ipv4() { 32 } else { 128 })
}

/// A connection from the client that has been answered.
pub(crate) fn connect(stage: &Stage, to: SocketAddr) -> TcpStream {
    let stream = stage.rig.client().run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        ask_on(&mut stream)?;
        Ok(stream)
    });
    stream.expect("it is served")
}

fn goes_on(stream: &mut TcpStream) {
    let outcome = ask_on(stream).expect("the stream goes on");
    assert!(outcome.pod().is_some(), "{outcome:?}");
}

fn t096_t100_t104_t178_given_addresses_that_are_nowhere_when_served_then_each_has_a_route_and_no_other() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let before = sysctls(rig.node(0));
    let of_a_pod = CapabilitySet::NET_ADMIN | CapabilitySet::NET_BIND_SERVICE;
    let mut stage = Stage::start_bare(rig, &web, |command| with_only(of_a_pod, command));
    let Stage { rig, .. } = &stage;

    for from in [rig.client(), rig.pod(0, 1), rig.pod(1, 0), rig.node(0), rig.node(1)] {
        for entry in VIPS {
            stage.served(from, entry, &LOCAL);
        }
    }

    assert_eq!(ours(rig.node(0)), of(&stage, &VIPS));
    let states = ["own", "foreign", "missing"].map(|state| stage.metric("kuberelay_vip_addresses", state));
    assert_eq!(states, [6, 0, 0]);
    let unallocated = SocketAddr::from(([10, 96, 0, 77], PORT));
    let outcome = rig.client().run(|| Ok(ask_tcp(unallocated))).expect("the namespace is ours");
    assert!(outcome.pod().is_none() && outcome != Outcome::Refused, "it goes its normal way: {outcome:?}");
    assert_eq!(changed(&before, rig.node(0)), [] as [String; 0], "while it runs");
    stage.end(Signal::TERM);
    assert_eq!(changed(&before, stage.rig.node(0)), [] as [String; 0], "and afterwards");
}

fn f28_given_routes_when_somebody_deletes_them_then_they_are_back_and_streams_go_on() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = bare(&web, rig);
    let node = stage.rig.node(0);
    let mut open = FAMILIES.map(|family| connect(&stage, stage.at(ClusterIp, family)));

    let began = Instant::now();
    for address in of(&stage, &VIPS) {
        stage.rig.network_foreign_to_node(0, host(address)).expect("it is there");
    }
    until("all are back", || ours(node) == of(&stage, &VIPS));

    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    open.iter_mut().for_each(goes_on);
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
    until("each is counted", || stage.metric("kuberelay_routes_repaired_total", "") == 6);
}

fn f28_given_a_network_that_others_made_local_when_they_take_it_back_then_routes_of_ours_take_its_place() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let network = ("10.96.0.0".parse().expect("an address"), 24);
    rig.network_local_to_node(0, network).expect("a route can be added");
    let stage = bare(&web, rig);
    let (node, to) = (stage.rig.node(0), stage.at(ClusterIp, Family::V4));
    let mut open = connect(&stage, to);
    assert!(ours(node).iter().all(IpAddr::is_ipv6), "{:?}", ours(node));
    assert_eq!(stage.metric("kuberelay_vip_addresses", "foreign"), 3);

    stage.rig.network_foreign_to_node(0, network).expect("it is there");

    until("all have routes of ours", || ours(node) == of(&stage, &VIPS));
    goes_on(&mut open);
}

fn f28_given_loopback_that_goes_down_when_it_is_up_again_then_the_addresses_are_served() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = bare(&web, rig);

    for _ in 0..2 {
        Rig::flap_loopback(stage.rig.node(0)).expect("the device can be set");

        until("all are back", || ours(stage.rig.node(0)) == of(&stage, &VIPS));
        stage.served(stage.rig.client(), ClusterIp, &LOCAL);
    }
}

fn given_open_streams_when_their_service_is_deleted_then_they_go_on_and_each_route_goes_with_its_last_one() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = bare(&web, rig);
    let node = stage.rig.node(0);
    let [to, other] = FAMILIES.map(|family| stage.at(ClusterIp, family));
    let mut open = [to, other].map(|to| connect(&stage, to));

    stage.write(NO_SERVICE);

    until("the routes that nobody needs are gone", || ours(node) == [to.ip(), other.ip()]);
    open.iter_mut().for_each(goes_on);
    for to in [to, other] {
        expect_at(stage.rig.client(), to, ask_tcp, "nobody listens", |outcome| *outcome == Outcome::Refused);
    }
    let [first, mut second] = open;
    drop(first);
    until("its route is gone", || ours(node) == [other.ip()]);
    goes_on(&mut second);
    drop(second);
    until("the last route is gone", || ours(node).is_empty());

    stage.change(&web);
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
}

fn f21_given_a_relay_that_was_killed_when_another_starts_then_it_adopts_what_it_needs_and_removes_the_rest() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let mut stage = bare(&web, rig);
    let to = stage.at(ClusterIp, Family::V4);
    let foreign = ("10.99.0.9".parse().expect("an address"), 32);
    stage.rig.network_local_to_node(0, foreign).expect("a route can be added");

    stage.end(Signal::KILL);
    assert_eq!(ours(stage.rig.node(0)), of(&stage, &VIPS));
    expect_at(stage.rig.client(), to, ask_tcp, "at once", |outcome| *outcome == Outcome::Refused);
    let has_other_addresses = |line: &&str| line.contains("externalIPs") || line.contains("status:");
    let cluster_ip_alone: Vec<String> =
        web.to_string().lines().filter(|line| !has_other_addresses(line)).map(|line| format!("{line}\n")).collect();
    stage.write(&cluster_ip_alone.concat());
    stage.start_again(|_| ());

    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
    until("the others are gone", || ours(stage.rig.node(0)) == of(&stage, &[ClusterIp]));
    let others = Rig::local_networks(stage.rig.node(0), 4).expect("routes are listed"); // RTPROT_STATIC
    assert!(others.contains(&foreign), "{others:?}");

    stage.end(Signal::TERM);
    assert_eq!(ours(stage.rig.node(0)), of(&stage, &[ClusterIp]), "they stay, for the next one");
    stage.start_again(|command| {
        command.args(["--vip-routes-at-exit", "remove"]);
    });
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
    stage.end(Signal::TERM);
    assert!(ours(stage.rig.node(0)).is_empty(), "as was asked for");
}

fn given_routes_of_a_relay_when_cleaned_up_then_they_alone_are_removed_once_it_has_ended() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let mut stage = bare(&web, rig);
    let foreign = ("10.99.0.9".parse().expect("an address"), 32);
    stage.rig.network_local_to_node(0, foreign).expect("a route can be added");
    let clean_up = |stage: &Stage| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        let output = stage.rig.node(0).run(|| command.arg("cleanup").output()).expect("it starts");
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        (output.status.code(), said)
    };

    let (code, said) = clean_up(&stage);
    assert!(code == Some(1) && said.contains(&format!("with pid {}", stage.relay.pids()[0])), "{said}");
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);

    stage.end(Signal::KILL);
    assert_eq!(clean_up(&stage), (Some(0), "removed 6 routes (protocol 107)\n".into()));
    assert!(ours(stage.rig.node(0)).is_empty());
    let others = Rig::local_networks(stage.rig.node(0), 4).expect("routes are listed");
    assert!(others.contains(&foreign), "{others:?}");
    assert_eq!(clean_up(&stage).0, Some(0), "nothing is left to do");
}

fn t237_given_a_relay_that_runs_when_a_second_one_starts_then_it_names_the_first_and_removes_none_of_its_routes() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = bare(&web, rig);
    let node = stage.rig.node(0);

    let _second = stage.start_beside(NO_SERVICE); // It needs none of them.

    let named = format!("with pid {} (pid", stage.relay.pids()[0]);
    until("it says whom it has met", || {
        stage.log().lines().any(|line| line.contains("no route is removed") && line.contains(&named))
    });
    let began = Instant::now();
    while began.elapsed() < 3 * LINGER {
        assert_eq!(ours(node), of(&stage, &VIPS));
        stage.served(stage.rig.client(), ClusterIp, &LOCAL);
    }
    stage.write(NO_SERVICE);
    until("the first one removes its own", || ours(node).is_empty());
}

fn t236_given_no_right_to_change_routes_when_others_made_addresses_local_then_they_are_relied_on_and_named() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let networks = [("10.96.0.0", 29), ("fd96::", 125)].map(|(ip, prefix)| (ip.parse().expect("an address"), prefix));
    for network in networks {
        rig.network_local_to_node(0, network).expect("a route can be added");
    }
    let stage = Stage::start_bare(rig, &web, |command| with_only(CapabilitySet::NET_BIND_SERVICE, command));

    for entry in VIPS {
        stage.served(stage.rig.client(), entry, &LOCAL);
    }
    assert!(ours(stage.rig.node(0)).is_empty());
    until("what it relies on is named", || stage.log().contains("10.96.0.0/29, fd96::/125"));
    assert_eq!(stage.metric("kuberelay_vip_addresses", "foreign"), 6);

    stage.rig.network_foreign_to_node(0, networks[0]).expect("it is there");

    until("that it cannot help itself is said", || stage.log().contains("no right to change routes"));
    until("that addresses are missing is counted", || stage.metric("kuberelay_vip_addresses", "missing") == 3);
    stage.rig.network_local_to_node(0, networks[0]).expect("a route can be added");
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
}

/// The node's address in a network of neighbours, and the neighbour's that a load balancer has given to a Service.
const NEIGHBOURS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1)), IpAddr::V4(Ipv4Addr::new(198, 18, 0, 7))];

/// A relay on a node that answers ARP for all that is local, whatever the machine does that the tests run on.
fn among_neighbours(web: &Web, rig: Rig) -> Stage {
    for interface in ["all", "uplink"] {
        rig.node(0).sysctl(&format!("net/ipv4/conf/{interface}/arp_ignore"), "0").expect("it is ours");
    }
    rig.network_on_link(0, NEIGHBOURS[0], 24).expect("an address can be added");
    let stage = bare(web, rig);
    stage.write(&web.to_string().replace("10.96.0.3", "198.18.0.7"));
    stage
}

fn given_a_load_balancer_ip_of_the_neighbours_when_arp_would_be_answered_then_it_gets_no_route() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let [_, neighbour] = NEIGHBOURS;
    let stage = among_neighbours(&web, rig);
    until("it is told", || stage.reports("arp_conflict"));
    let (node, hub) = (stage.rig.node(0), stage.rig.hub());
    let to = SocketAddr::new(neighbour, PORT);
    let is_answered = |outcome: &Outcome| outcome.pod().is_some();
    assert!(!ours(node).contains(&neighbour));
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);

    node.sysctl("net/ipv4/conf/all/arp_ignore", "1").expect("it is ours");

    until("it has a route", || ours(node).contains(&neighbour));
    expect_at(node, to, ask_tcp, "served here", is_answered);
    let all_neighbours = ("198.18.0.0".parse().expect("an address"), 24);
    stage.rig.network_by_link(0, all_neighbours).expect("a route can be added");
    let outcome = hub.run(|| Ok(ask_tcp(to))).expect("the namespace is ours");
    assert!(!is_answered(&outcome) && outcome != Outcome::Refused, "ARP is not answered: {outcome:?}");
    stage.rig.network_to_node(0, (neighbour, 32)).expect("a route can be added");
    for ask in [ask_tcp, ask_udp] {
        expect_at(stage.rig.client(), to, ask, "served to who knows the way", is_answered);
    }
}

fn given_a_kernel_that_binds_what_is_not_local_when_arp_would_be_answered_then_that_is_told_all_the_same() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    rig.node(0).sysctl("net/ipv4/ip_nonlocal_bind", "1").expect("it is ours");

    let stage = among_neighbours(&web, rig);

    until("it is told", || stage.reports("arp_conflict"));
    assert!(!ours(stage.rig.node(0)).contains(&NEIGHBOURS[1]));
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
}

fn given_an_ip_of_the_neighbours_that_others_made_local_when_they_take_it_back_then_no_route_has_arp_answered() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let [_, neighbour] = NEIGHBOURS;
    rig.network_local_to_node(0, host(neighbour)).expect("a route can be added");
    let stage = among_neighbours(&web, rig);
    let node = stage.rig.node(0);
    let to = SocketAddr::new(neighbour, PORT);
    expect_at(node, to, ask_tcp, "who made it local answers for it", |outcome| outcome.pod().is_some());

    stage.rig.network_foreign_to_node(0, host(neighbour)).expect("it is there");

    until("it is told", || stage.log().contains("an address of a Service is local no more"));
    assert!(!ours(node).contains(&neighbour));
    node.sysctl("net/ipv4/conf/all/arp_ignore", "1").expect("it is ours");
    until("it has a route", || ours(node).contains(&neighbour));
}

fn f28_given_a_route_that_others_replace_when_theirs_goes_then_ours_is_back() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = bare(&web, rig);
    let node = stage.rig.node(0);
    let to = stage.at(ClusterIp, Family::V4);
    stage.rig.network_local_to_node(0, host(to.ip())).expect("a route can be replaced");
    assert!(!ours(node).contains(&to.ip()), "it has another number now");
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);

    let began = Instant::now();
    stage.rig.network_foreign_to_node(0, host(to.ip())).expect("it is there");

    until("it is back", || ours(node) == of(&stage, &VIPS));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

fn f28_given_loopback_that_loses_its_addresses_when_its_routes_go_silently_then_they_are_back() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    let stage = bare(&web, rig);

    let began = Instant::now();
    stage.rig.take_loopback_address(0).expect("it is there");

    until("all are back", || ours(stage.rig.node(0)) == of(&stage, &VIPS));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    expect_at(stage.rig.client(), stage.at(ClusterIp, Family::V4), ask_tcp, "served", |outcome| {
        outcome.pod().is_some()
    });
}

fn given_a_node_without_ipv6_when_a_service_has_both_families_then_the_other_one_is_served() {
    let rig = rig();
    let _running = backends(&rig);
    let web = Web::default().with(local(&rig));
    rig.node(0).sysctl("net/ipv6/conf/lo/disable_ipv6", "1").expect("it is ours");
    let stage = bare(&web, rig);
    let of_ipv4 = || of(&stage, &VIPS).into_iter().filter(IpAddr::is_ipv4).collect::<Vec<_>>();

    assert_eq!(ours(stage.rig.node(0)), of_ipv4());
    until("missing ones are counted", || stage.metric("kuberelay_vip_addresses", "missing") == 3);
    stage.rig.network_foreign_to_node(0, host(of_ipv4()[0])).expect("it is there");

    until("it is back", || ours(stage.rig.node(0)) == of_ipv4());
    expect_at(stage.rig.client(), stage.at(ClusterIp, Family::V4), ask_tcp, "served", |outcome| {
        outcome.pod().is_some()
    });
    assert!(!stage.log().contains("no right to change routes"), "{}", stage.log());
    // Failed listeners try again meanwhile, each after half a second at first.
    let until_tried = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until_tried {
        assert_eq!(stage.metric("kuberelay_vip_addresses", "missing"), 3);
    }
    assert_eq!(stage.log().matches("the kernel refuses a route, trying again").count(), 1, "{}", stage.log());
}

/// A second, for what is built to be used; a debug build has three times that, on machines that are busy.
pub(crate) const SOON: Duration = Duration::from_secs(if cfg!(debug_assertions) { 3 } else { 1 });

fn given_ten_thousand_addresses_when_required_then_they_are_local_soon_and_gone_after_cleanup() {
    let rig = rig();

    // A machine that has other things to do as well gets another try.
    let mut tries = (0..3).map(|_| set_and_remove(rig.node(0), 10_000));

    assert!(tries.any(|(set, gone)| set < SOON && gone < SOON), "never within {SOON:?}");
}

/// How long it takes to make so many addresses local, and to clean up after that.
fn set_and_remove(node: &Namespace, count: u16) -> (Duration, Duration) {
    let address = |number: u16| -> IpAddr {
        let [high, low] = number.to_be_bytes();
        if number.is_multiple_of(2) { [10, 97, high, low].into() } else { [0xfd97, 0, 0, 0, 0, 0, 0, number].into() }
    };
    let wanted = move || (0..count).map(move |number| Wanted { address: address(number), announced: false });

    let set = in_runtime(node, async move {
        let (protocol, linger) = (DEFAULT_ROUTE_PROTOCOL, DEFAULT_VIP_ROUTES_LINGER);
        let vips = Vips::start(VipOptions { protocol, linger, at_exit: AtExit::Keep, tune_sysctls: false });
        let began = Instant::now();
        let granted = vips.require(wanted().collect()).await;
        let took = began.elapsed();
        let refused = wanted().filter(|wanted| granted.refused(wanted.address).is_some()).count();
        vips.end().await;
        assert_eq!(refused, 0);
        took
    });
    assert_eq!(ours(node).len(), usize::from(count));
    let (removed, gone) = in_runtime(node, async {
        let began = Instant::now();
        (remove_routes(DEFAULT_ROUTE_PROTOCOL).await.expect("nobody runs"), began.elapsed())
    });
    println!("{count} routes set in {set:?}, removed in {gone:?}");
    assert_eq!(removed.routes, usize::from(count));
    assert!(ours(node).is_empty());
    (set, gone)
}

pub(crate) fn in_runtime<T: Send>(node: &Namespace, work: impl Future<Output = T> + Send) -> T {
    let outcome = node.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(work))
    });
    outcome.expect("the namespace is ours")
}
