//! Which backend a client gets: session affinity and the annotation `balance`, also when they change live.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::support::backend::{Backend, Talker};
use crate::support::client;
use crate::support::manifest::Manifest;
use crate::support::relay::{Relay, service_of};
use crate::support::site::Site;

fn backends(site: Site) -> [SocketAddr; 3] {
    [1, 2, 3].map(|number| site.backend(number))
}

async fn run(site: Site) -> [Backend; 3] {
    let [one, two, three] = backends(site);
    [Backend::named(one).await, Backend::named(two).await, Backend::named(three).await]
}

fn distinct(answers: Vec<SocketAddr>) -> usize {
    answers.into_iter().collect::<BTreeSet<_>>().len()
}

/// Of six clients, one after the other.
async fn answering(site: Site) -> usize {
    distinct(client::ask_times(6, site.service()).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t143_given_a_live_service_when_affinity_comes_and_goes_then_clients_are_spread_stuck_and_spread() {
    let site = Site::new(143);
    let _running = run(site).await;
    let spread = Manifest::new(site).tcp().endpoints(backends(site));
    let relay = Relay::start(site, &spread).await;
    let mut lasting = client::connect(site.service()).await.expect("the Service answers");
    let its_backend = client::ask_on(&mut lasting).await.expect("a backend answers");
    assert_eq!(answering(site).await, 3);

    for seconds in [600, 60] {
        relay.edit(spread.clone().sticky(seconds));
        relay.until("affinity", |status| affinity(status) == Some(seconds.into())).await;
        assert_eq!(answering(site).await, 1, "{seconds} s");
    }
    relay.edit(&spread);
    relay.until("no affinity", |status| affinity(status).is_none()).await;

    assert_eq!(answering(site).await, 3);
    assert_eq!(client::ask_on(&mut lasting).await.expect("the connection goes on"), its_backend);
}

fn affinity(status: &kube_relay::status::Status) -> Option<u64> {
    service_of(status, "web").and_then(|service| service.report().affinity_seconds)
}

/// The first client of each port meets the first backend; the second client tells the two memories apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t146_given_affinity_when_a_client_uses_tcp_and_udp_then_each_port_has_a_pin_of_its_own() {
    let site = Site::new(146);
    let [one, two, three] = backends(site);
    let _running = run(site).await;
    let _talking = [Talker::named(one).await, Talker::named(two).await, Talker::named(three).await];
    let _relay = Relay::start(site, Manifest::new(site).tcp().udp().sticky(600).endpoints([one, two, three])).await;
    let other = client::Caller::from_address(site.client(1), site.service()).await.ask().await;

    let by_udp = client::Caller::new(site.service()).await.ask().await.backend;
    let by_tcp = client::ask(site.service()).await.expect("a backend answers");

    assert_eq!(other.backend, one);
    assert_eq!((by_udp, by_tcp), (two, one), "the second client of the UDP port, the first of the TCP port");
    assert_eq!(client::Caller::new(site.service()).await.ask().await.backend, two);
    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), one);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t151_given_affinity_when_many_programs_come_over_loopback_then_all_are_one_client() {
    let site = Site::new(151);
    let _running = run(site).await;
    let manifest = Manifest::new(site).tcp().node_port().sticky(600).endpoints(backends(site));
    let _relay = Relay::start(site, manifest).await;

    let clients = (0..8).map(|_| tokio::spawn(client::ask(site.node_port())));
    let mut answers = client::ask_times(8, site.service()).await;
    for client in clients.collect::<Vec<_>>() {
        answers.push(client.await.expect("no panic").expect("a backend answers"));
    }

    assert_eq!(distinct(answers), 1, "127.0.0.1 is all that a relay sees of them");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_least_connections_when_one_backend_is_busy_then_new_clients_go_to_the_others() {
    let site = Site::new(91);
    let _running = run(site).await;
    let by_turns = Manifest::new(site).tcp().endpoints(backends(site));
    let least = by_turns.clone().annotation("balance", "least-connections");
    let relay = Relay::start(site, least.clone().endpoints([])).await;
    let mut open = Vec::new();
    for _ in 0..6 {
        let mut stream = client::connect(site.service()).await.expect("the Service answers");
        open.push((client::ask_on(&mut stream).await.expect("a backend answers"), stream));
    }

    let busy = open[0].0;
    open.retain(|(backend, _)| *backend == busy);
    relay.until("the others to be idle", |status| active(status) == 2).await;
    let answers = client::ask_times(6, site.service()).await;
    relay.edit(&by_turns);
    relay
        .until("turns", |status| {
            service_of(status, "web").is_some_and(|web| web.report().balance == Default::default())
        })
        .await;

    assert!(!answers.contains(&busy), "{answers:?}, and {busy} has two");
    assert_eq!(answering(site).await, 3, "by turns after all");
}

fn active(status: &kube_relay::status::Status) -> u64 {
    let ports = service_of(status, "web").map(|service| &service.ports);
    ports.into_iter().flatten().flat_map(|port| port.backends.iter()).map(|backend| backend.open_count()).sum()
}
