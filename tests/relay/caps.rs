//! As many connections as a Service allows: who comes then waits, and nobody is turned away.

use kube_relay::stats::{DropReason, PROCESS, PauseReason};

use crate::support::backend::Backend;
use crate::support::client;
use crate::support::manifest::Manifest;
use crate::support::relay::{Relay, service_of};
use crate::support::site::Site;

/// Clients that were accepted, and that were turned away.
fn counts(relay: &Relay) -> (u64, u64) {
    let status = relay.status();
    let ports = &service_of(&status, "web").expect("the Service").ports;
    let states = || ports.iter().filter_map(|port| port.state.as_ref());
    let dropped = |reason: &DropReason| states().map(|state| state.stats.dropped.get(*reason)).sum::<u64>();
    (states().map(|state| state.stats.accepted.get()).sum(), DropReason::ALL.iter().map(dropped).sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_service_that_allows_two_connections_when_more_come_then_they_wait_until_there_is_room() {
    let site = Site::new(15);
    let _backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let relay = Relay::start(site, manifest.clone().annotation("max-connections", "2")).await;
    let mut first = client::connect(site.service()).await.expect("the Service answers");
    let mut second = client::connect(site.service()).await.expect("the Service answers");
    for stream in [&mut first, &mut second] {
        client::ask_on(stream).await.expect("the backend answers");
    }

    let mut third = client::connect(site.service()).await.expect("a place in the queue");
    let mut fourth = client::connect(site.service()).await.expect("a place in the queue");
    let paused = &PROCESS.accept_paused[usize::from(PauseReason::ServiceLimit)];
    relay.until("nobody to be accepted", |_| paused.seconds() > 0.0).await;
    assert_eq!(counts(&relay), (2, 0));
    drop(second);
    client::ask_on(&mut third).await.expect("there is room");
    assert_eq!(counts(&relay), (3, 0));
    relay.edit(manifest);

    client::ask_on(&mut fourth).await.expect("there is no limit any more");
    client::ask_on(&mut first).await.expect("an open connection goes on");
    assert_eq!(counts(&relay), (4, 0));
}
