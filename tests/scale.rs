//! Many Services at once, and many changes at once. A program of its own, for its many descriptors and for its CPU time.
//!
//! `cargo bench --bench plan` has the figures of a release build; here is what holds in any build.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kube_relay::control::{Message, Relay, RelayOptions};
use kube_relay::host;
use kube_relay::model::{Endpoint, Event, Objects, Service, Slice};
use kube_relay::plan::PlanOptions;
use kube_relay::status::Status;

use crate::support::{client, full, within};

#[path = "support/mod.rs"]
mod support;

const SERVICES: u16 = 10_000;
const SHORT_SERVICES: u16 = 1_000;
const ENDPOINTS: u8 = 10;
/// Descriptors that are no listener.
const SPARE_DESCRIPTORS: u64 = 300;
/// The storm of the case.
const EVENTS: u16 = 5_000;
const STORM: Duration = Duration::from_secs(1);
/// A batch takes what comes within so long.
const BATCH_WINDOW: Duration = Duration::from_millis(20);

/// T231 T232, in one program one after the other: both want the machine for themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t231_t232_given_many_services_when_they_come_and_change_then_each_change_is_one_swap_and_a_storm_is_few() {
    let descriptors = host::raise_open_files().expect("a limit").unwrap_or(u64::MAX);
    let room = u16::try_from(descriptors.saturating_sub(SPARE_DESCRIPTORS)).unwrap_or(u16::MAX);
    let count = room.min(if full() { SERVICES } else { SHORT_SERVICES });
    let plan = PlanOptions { allow_loopback_endpoints: true, ..PlanOptions::default() };
    let relay = Relay::start(RelayOptions { plan, ..RelayOptions::default() }).expect("a relay can be started");

    let began = Instant::now();
    send(&relay, Message::Event(Event::Replace(objects(count)))).await;
    send(&relay, Message::Synced).await;
    let status = until(&relay, "all Services to be served", |status| status.synced).await;
    println!("{count} Services of {ENDPOINTS} endpoints: served after {:?}", began.elapsed());
    assert!(status.failed.is_empty(), "{:?}", status.failed);
    for number in [0, count / 2, count - 1] {
        // Nobody answers behind it: the relay has accepted, and says so by its reset.
        let error = client::ask(address(number)).await.expect_err("no backend runs");
        assert_ne!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{number} is not listened on");
    }

    let before = status.revision;
    send(&relay, resized(0, ENDPOINTS - 1)).await;
    let status =
        until(&relay, "one endpoint to leave", |status| backends(status, 0) == usize::from(ENDPOINTS - 1)).await;
    assert_eq!(status.revision, before + 1, "one change is one batch");

    let began = tokio::time::Instant::now();
    for number in 0..EVENTS {
        tokio::time::sleep_until(began + STORM * u32::from(number) / u32::from(EVENTS)).await;
        let endpoints = if number / count % 2 == 0 { ENDPOINTS - 2 } else { ENDPOINTS - 1 };
        send(&relay, resized(number % count, endpoints)).await;
    }
    send(&relay, resized(count - 1, 1)).await;
    let status = until(&relay, "the last change", |status| backends(status, count - 1) == 1).await;

    let batches = status.revision - before - 1;
    println!("{EVENTS} changes within {:?}: {batches} batches", began.elapsed());
    let windows = began.elapsed().as_millis() / BATCH_WINDOW.as_millis();
    assert!(u128::from(batches) <= windows + 2, "{batches} batches in {windows} windows");
}

async fn send(relay: &Relay, message: Message) {
    relay.messages().send(message).await.expect("the control task runs");
}

async fn until(relay: &Relay, what: &str, condition: impl Fn(&Arc<Status>) -> bool) -> Arc<Status> {
    let mut status = relay.status();
    Arc::clone(&*within(what, status.wait_for(condition)).await.expect("the control task runs"))
}

/// How many backends a Service has.
fn backends(status: &Status, number: u16) -> usize {
    let ports = status.services.get(&service(number).name).map(|service| &service.ports);
    ports.into_iter().flatten().map(|port| port.backends.len()).sum()
}

fn objects(count: u16) -> Objects {
    let slices = (0..count).map(|number| slice(number, ENDPOINTS)).collect();
    Objects::new((0..count).map(service).collect::<Vec<_>>(), slices)
}

fn address(number: u16) -> SocketAddr {
    let [high, low] = number.to_be_bytes();
    SocketAddr::new(IpAddr::from([127, 94, high, low]), 7601)
}

fn service(number: u16) -> Service {
    let address = address(number);
    Service::new(&format!("s{number:05}")).cluster_ip(address.ip()).port("http", address.port())
}

fn slice(number: u16, endpoints: u8) -> Slice {
    let service = service(number);
    let slice = Slice::new(&format!("{}-1", service.name.name), &service).port("http", 9);
    let pod = |host| Endpoint::new(Ipv4Addr::new(127, 95, 0, host));
    (1..=endpoints).fold(slice, |slice, host| slice.endpoint(pod(host)))
}

/// The same Service's slice with another number of endpoints.
fn resized(number: u16, endpoints: u8) -> Message {
    Message::Event(Event::ApplySlice(Arc::new(slice(number, endpoints))))
}
