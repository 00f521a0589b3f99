//! Datagrams: who answers, from which address, and what becomes of flows when endpoints come and go.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::time::Duration;

use kube_relay::control::RelayOptions;
use kube_relay::serve::flow::IdleTimes;
use kube_relay::stats::{CloseReason, ServiceStats};
use kube_relay::status::Status;

use crate::support::backend::{Backend, Talk, Talker};
use crate::support::client::{self, Caller};
use crate::support::manifest::Manifest;
use crate::support::relay::{Relay, service_of};
use crate::support::site::Site;
use crate::support::{full, skip};

/// Idle times that a test can wait for.
fn short_idle_times() -> RelayOptions {
    let mut options = RelayOptions::default();
    let short = Duration::from_secs(1);
    options.udp.idle = IdleTimes { unreplied: short, answered: short, stream: short };
    options
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t180_given_several_ways_in_when_a_client_sends_then_the_answer_comes_from_where_it_sent_to() {
    let site = Site::new(180);
    let _backend = Talker::start(site.backend(1), Talk::Echo).await;
    let _relay = Relay::start(site, Manifest::new(site).udp().node_port().endpoints([site.backend(1)])).await;

    for service in [site.service(), site.node_port()] {
        // A connected socket takes datagrams from this address and port alone.
        let caller = Caller::new(service).await;
        assert_eq!(caller.exchange(b"hello").await.expect("an answer"), b"hello", "{service}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t180_given_ipv6_loopback_when_a_client_sends_then_the_answer_comes_from_there() {
    let site = Site::new(4);
    let local = IpAddr::from(Ipv6Addr::LOCALHOST);
    if std::net::UdpSocket::bind((local, 0)).is_err() {
        skip("ipv6", "this machine has no IPv6 loopback");
        return;
    }
    // ::1 is one address for all tests: this one alone uses it, at the Service's and the backend's port.
    let backend = SocketAddr::new(local, site.backend(1).port());
    let _backend = Talker::start(backend, Talk::Echo).await;
    let _relay = Relay::start(site, Manifest::new(site).cluster_ip(local).udp().endpoints([backend])).await;

    let caller = Caller::new(SocketAddr::new(local, site.service().port())).await;

    assert_eq!(caller.exchange(b"hello").await.expect("an answer"), b"hello");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t181_given_a_flow_when_nothing_moves_for_the_idle_time_then_it_is_removed() {
    let site = Site::new(181);
    let _backend = Talker::named(site.backend(1)).await;
    let manifest = Manifest::new(site).udp().endpoints([site.backend(1)]);
    let relay = Relay::start_with(site, manifest, short_idle_times()).await;
    let backend = relay.backend("web", site.backend(1));
    let caller = Caller::new(site.service()).await;

    caller.ask().await;
    assert_eq!(backend.stats.active_flows.get(), 1);
    relay.until("the flow to be removed", |_| backend.stats.active_flows.get() == 0).await;

    assert_eq!(caller.ask().await.backend, site.backend(1));
    assert_eq!(backend.stats.flows.get(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t182_given_a_backend_that_keeps_sending_when_the_client_is_silent_then_the_flow_stays() {
    let site = Site::new(182);
    // Twice the idle time in all, and never near it between two datagrams.
    let talk = Talk::Repeat { times: 8, pause: Duration::from_millis(250) };
    let _backend = Talker::start(site.backend(1), talk).await;
    let manifest = Manifest::new(site).udp().endpoints([site.backend(1)]);
    let relay = Relay::start_with(site, manifest, short_idle_times()).await;
    let caller = Caller::new(site.service()).await;

    caller.send(b"subscribe").await.expect("the port is open");
    for _ in 0..8 {
        assert_eq!(caller.receive().await.expect("the flow is open"), b"subscribe");
    }

    assert_eq!(relay.backend("web", site.backend(1)).stats.flows.get(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t183_given_clients_with_several_addresses_and_ports_when_they_send_then_each_has_its_flow() {
    let site = Site::new(183);
    let _backend = Talker::named(site.backend(1)).await;
    let relay = Relay::start(site, Manifest::new(site).udp().endpoints([site.backend(1)])).await;
    let callers = [
        Caller::from_address(site.client(1), site.service()).await,
        Caller::from_address(site.client(2), site.service()).await,
        Caller::from_address(site.client(2), site.service()).await,
    ];

    let mut source_ports = Vec::new();
    for caller in &callers {
        source_ports.push(caller.ask().await.source_port);
    }

    source_ports.sort_unstable();
    source_ports.dedup();
    assert_eq!(source_ports.len(), 3);
    assert_eq!(relay.backend("web", site.backend(1)).stats.active_flows.get(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t184_given_datagrams_of_all_sizes_when_they_pass_then_they_stay_whole() {
    let site = Site::new(184);
    let _backend = Talker::start(site.backend(1), Talk::Echo).await;
    let _relay = Relay::start(site, Manifest::new(site).udp().endpoints([site.backend(1)])).await;
    let caller = Caller::new(site.service()).await;

    for length in [0, 1, 1472, 4097, 9000, 65_507] {
        let payload: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
        let answer = caller.exchange(&payload).await.expect("an answer");
        assert_eq!(answer.len(), length);
        assert!(answer == payload, "{length} bytes came back changed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t185_given_a_backend_that_takes_2_s_when_a_client_asks_once_then_the_answer_arrives() {
    let site = Site::new(185);
    let _backend = Talker::start(site.backend(1), Talk::Late(Duration::from_secs(2))).await;
    let _relay = Relay::start(site, Manifest::new(site).udp().endpoints([site.backend(1)])).await;
    let caller = Caller::new(site.service()).await;

    assert_eq!(caller.exchange(b"slow?").await.expect("an answer"), b"slow?");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t186_given_a_pod_is_replaced_when_its_client_keeps_its_port_then_the_next_datagram_reaches_the_new_one() {
    let site = Site::new(186);
    let _running = [Talker::named(site.backend(1)).await, Talker::named(site.backend(2)).await];
    let manifest = Manifest::new(site).udp().node_port();
    let relay = Relay::start(site, manifest.clone().endpoints([site.backend(1)])).await;
    let callers = [Caller::new(site.service()).await, Caller::new(site.node_port()).await];
    for caller in &callers {
        assert_eq!(caller.ask().await.backend, site.backend(1));
    }

    relay.edit(manifest.endpoints([site.backend(2)]));
    relay.until_backends("web", &[site.backend(2)]).await;

    for caller in &callers {
        assert_eq!(caller.ask().await.backend, site.backend(2));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t186_given_policies_local_when_a_pod_is_replaced_then_the_next_datagram_reaches_the_new_one() {
    let site = Site::new(86);
    let _running = [Talker::named(site.backend(1)).await, Talker::named(site.backend(2)).await];
    let manifest = Manifest::new(site).udp().node_port().local_to("here");
    let mut options = RelayOptions::default();
    options.plan.node.name = Some("here".into());
    let relay = Relay::start_with(site, manifest.clone().endpoints([site.backend(1)]), options).await;
    let callers = [Caller::new(site.service()).await, Caller::new(site.node_port()).await];
    for caller in &callers {
        assert_eq!(caller.ask().await.backend, site.backend(1));
    }

    relay.edit(manifest.endpoints([site.backend(2)]));
    relay.until("the new pod", |status| local_picks(status) == [site.backend(2).to_string()]).await;

    for caller in &callers {
        assert_eq!(caller.ask_until_answered().await.backend, site.backend(2));
    }
}

/// The addresses that traffic under policy Local may go to.
fn local_picks(status: &Status) -> Vec<String> {
    let ports = service_of(status, "web").map(|service| service.report().ports).unwrap_or_default();
    ports.into_iter().filter_map(|port| port.backends.local).flatten().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t187_given_an_endpoint_that_is_not_ready_when_it_becomes_so_then_a_client_that_sends_is_served() {
    let site = Site::new(187);
    let _backend = Talker::named(site.backend(1)).await;
    let manifest = Manifest::new(site).udp();
    let relay = Relay::start(site, manifest.clone().unready([site.backend(1)])).await;
    let caller = Caller::new(site.service()).await;
    caller.send_until_refused(b"who?").await;

    let asking = tokio::spawn(async move { caller.ask_until_answered().await });
    relay.edit(manifest.endpoints([site.backend(1)]));

    assert_eq!(asking.await.expect("the client does not panic").backend, site.backend(1));
}

/// The black hole of kube-proxy: a sender that never stops kept its connection-tracking entry, and its way to a pod
/// that was gone, for 13 hours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f17_given_a_one_way_sender_when_the_service_goes_to_zero_and_back_then_its_first_datagram_arrives() {
    let site = Site::new(17);
    let gone = Talker::start(site.backend(1), Talk::Silent).await;
    let new = Talker::start(site.backend(2), Talk::Silent).await;
    let manifest = Manifest::new(site).udp();
    let relay = Relay::start(site, manifest.clone().endpoints([gone.address])).await;
    let sender = Caller::new(site.service()).await;
    sender.send(b"to the first pod").await.expect("the port is open");
    relay.until("the first datagram", |_| gone.has_received(b"to the first pod")).await;

    relay.edit(&manifest);
    sender.send_until_refused(b"to nobody").await;
    relay.edit(manifest.endpoints([new.address]));
    relay.until_backends("web", &[new.address]).await;
    sender.send(b"to the new pod").await.expect("the port is open");

    relay.until("the datagram", |_| new.has_received(b"to the new pod")).await;
    assert!(!gone.has_received(b"to the new pod"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f17_t095_given_two_services_that_are_each_others_endpoint_when_a_client_sends_then_it_is_told_at_once() {
    let site = Site::new(18);
    let [one, other] = [site.backend(1), site.backend(2)];
    let at_backends = |text: Manifest| text.to_string().replacen("port: 8080", &format!("port: {}", one.port()), 1);
    let first = at_backends(Manifest::new(site).named("one").cluster_ip(one.ip()).udp().endpoints([other]));
    let second = at_backends(Manifest::new(site).named("other").cluster_ip(other.ip()).udp().endpoints([one]));
    let relay = Relay::start(site, format!("{first}---\n{second}")).await;

    for service in [one, other] {
        let answer = Caller::new(service).await.exchange(b"round and round").await;
        assert_eq!(answer.expect_err("port unreachable").kind(), io::ErrorKind::ConnectionRefused, "{service}");
    }

    for name in ["one", "other"] {
        assert_eq!(states(&relay.status(), name, |stats| stats.accepted.get()), 0, "{name} has passed it on");
    }
}

/// A sum over the ports of a Service.
fn states(status: &Status, service: &str, number: impl Fn(&ServiceStats) -> u64) -> u64 {
    let ports = &service_of(status, service).expect("the Service is known").ports;
    ports.iter().filter_map(|port| port.state.as_ref()).map(|state| number(&state.stats)).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_idle_times_of_a_service_when_its_flow_is_silent_then_they_count_and_can_be_changed() {
    let site = Site::new(5);
    let _backend = Talker::named(site.backend(1)).await;
    let manifest = Manifest::new(site).udp().endpoints([site.backend(1)]);
    let relay = Relay::start(site, manifest.clone().annotation("udp-timeout", "1h")).await;
    let backend = relay.backend("web", site.backend(1));
    let caller = Caller::new(site.service()).await;
    caller.ask().await;

    relay.edit(manifest.annotation("udp-timeout", "answered=1s"));

    relay.until("the flow to be removed", |_| backend.stats.active_flows.get() == 0).await;
    assert_eq!(backend.stats.closed.get(CloseReason::Idle), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_service_with_several_shards_when_it_goes_to_zero_and_back_then_so_many_sockets_serve_it_again() {
    let site = Site::new(6);
    let _backend = Talker::named(site.backend(1)).await;
    let with_shards = |manifest: Manifest| manifest.udp().annotation("udp-shards", "3");
    let without = with_shards(Manifest::new(site));
    let with = without.clone().endpoints([site.backend(1)]);
    let options = RelayOptions { udp_shards: NonZeroUsize::new(4), ..RelayOptions::default() };
    let relay = Relay::start_with(site, &with, options).await;
    assert_eq!(sockets_at(site.service()), 3);

    for _ in 0..2 {
        relay.edit(&without);
        relay.until_backends("web", &[]).await;
        // Each shard closes its own when it comes to it.
        relay.until("one that holds the port", |_| sockets_at(site.service()) == 1).await;
        relay.edit(&with);
        relay.until_backends("web", &[site.backend(1)]).await;
        assert_eq!(sockets_at(site.service()), 3);
        for _ in 0..16 {
            Caller::new(site.service()).await.ask().await;
        }
    }
}

/// UDP sockets that are bound to an IPv4 address and not connected, or connected to themselves.
fn sockets_at(address: SocketAddr) -> usize {
    let IpAddr::V4(ip) = address.ip() else { return 0 };
    let local = format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port());
    let table = std::fs::read_to_string("/proc/net/udp").expect("procfs");
    table.lines().filter(|line| line.split_whitespace().nth(1) == Some(&local)).count()
}

/// DNS as a busy node asks it: each query from a port of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t195_given_500_queries_a_second_from_new_ports_when_relayed_then_none_is_lost_and_flows_stay_bounded() {
    let site = Site::new(195);
    let _backend = Talker::named(site.backend(1)).await;
    let relay = Relay::start(site, Manifest::new(site).udp().endpoints([site.backend(1)])).await;
    let backend = relay.backend("web", site.backend(1));
    let queries = if full() { 30_000 } else { 2_500 };
    let mut pace = tokio::time::interval(Duration::from_millis(2));
    let mut most = 0;

    for _ in 0..queries {
        pace.tick().await;
        Caller::new(site.service()).await.ask().await;
        most = most.max(backend.stats.active_flows.get());
    }

    println!("{queries} queries: {most} flows at once at most");
    assert!(most <= 500 * 12, "{most} flows: 10 s of queries, and what is not yet looked at");
    assert_eq!(backend.stats.upstream_datagrams.get(), queries);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t188_given_a_one_way_sender_when_the_last_endpoint_goes_then_it_is_told_and_nothing_more_gets_through() {
    let site = Site::new(188);
    let backend = Talker::start(site.backend(1), Talk::Silent).await;
    let without = Manifest::new(site).udp();
    let with = without.clone().endpoints([site.backend(1)]);
    let relay = Relay::start(site, &with).await;
    let counters = relay.backend("web", site.backend(1));
    let caller = Caller::new(site.service()).await;
    caller.send(b"early").await.expect("the port is open");
    relay.until("the first datagram", |_| backend.has_received(b"early")).await;

    relay.edit(&without);
    caller.send_until_refused(b"meanwhile").await;
    for _ in 0..10 {
        let _ = caller.send(b"too late").await; // Every other one reports the refusal of the one before.
    }

    relay.until("the flow to be closed", |_| counters.stats.active_flows.get() == 0).await;
    relay.until_backends("web", &[]).await; // the port is refused a little before that is told
    // The endpoint comes back: what was refused does not.
    relay.edit(&with);
    relay.until_backends("web", &[site.backend(1)]).await;
    let later = Caller::new(site.service()).await;
    later.send(b"afterwards").await.expect("the port is open");
    relay.until("the last datagram", |_| backend.has_received(b"afterwards")).await;
    assert!(!backend.has_received(b"too late"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t189_given_a_client_that_never_stops_when_the_first_endpoint_comes_then_it_is_served() {
    let site = Site::new(189);
    let _backend = Talker::named(site.backend(1)).await;
    let without = Manifest::new(site).udp();
    let relay = Relay::start(site, &without).await;
    let caller = Caller::new(site.service()).await;
    caller.send_until_refused(b"who?").await;

    let asking = tokio::spawn(async move { caller.ask_until_answered().await });
    relay.edit(without.endpoints([site.backend(1)]));

    assert_eq!(asking.await.expect("the client does not panic").backend, site.backend(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t190_given_flows_to_two_backends_when_one_goes_then_its_flow_moves_and_the_other_stays() {
    let site = Site::new(190);
    let (stays, goes) = (site.backend(1), site.backend(2));
    let _running = [Talker::named(stays).await, Talker::named(goes).await];
    let manifest = Manifest::new(site).udp();
    let relay = Relay::start(site, manifest.clone().endpoints([stays, goes])).await;
    let callers = [Caller::new(site.service()).await, Caller::new(site.service()).await];
    let before = [callers[0].ask().await, callers[1].ask().await];
    assert_ne!(before[0].backend, before[1].backend);

    relay.edit(manifest.endpoints([stays]));
    relay.until_backends("web", &[stays]).await;

    for (caller, before) in callers.iter().zip(before) {
        let after = caller.ask().await;
        assert_eq!(after.backend, stays);
        // The source port tells a flow that stayed from one that was made anew.
        assert_eq!(after == before, before.backend == stays);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t098_given_one_number_for_both_protocols_when_clients_ask_then_each_protocol_has_its_own_turn() {
    let site = Site::new(98);
    let backends = [site.backend(1), site.backend(2)];
    let _streams = [Backend::named(backends[0]).await, Backend::named(backends[1]).await];
    let _datagrams = [Talker::named(backends[0]).await, Talker::named(backends[1]).await];
    let _relay = Relay::start(site, Manifest::new(site).tcp().udp().endpoints(backends)).await;

    let mut by_tcp = Vec::new();
    let mut by_udp = Vec::new();
    for _ in 0..4 {
        by_tcp.push(client::ask(site.service()).await.expect("a backend answers"));
        by_udp.push(Caller::new(site.service()).await.ask().await.backend);
    }

    for answers in [by_tcp, by_udp] {
        assert_ne!(answers[0], answers[1]);
        assert_eq!(answers[..2], answers[2..]);
    }
}
