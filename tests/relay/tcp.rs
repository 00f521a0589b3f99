//! Connections: bytes, ends, retries, and what changes of the manifest do to them.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::backend::{Backend, BlackHole, Script, reset_on_drop};
use crate::support::manifest::Manifest;
use crate::support::relay::Relay;
use crate::support::site::Site;
use crate::support::{client, full, within};

/// Bytes that show a place that was lost, doubled or swapped: they do not repeat in any power of two.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8).collect()
}

/// Sends the payload while it reads what comes back, and ends the stream.
async fn echo(service: SocketAddr, payload: Vec<u8>) -> Vec<u8> {
    let (mut read, mut write) = client::connect(service).await.expect("the Service answers").into_split();
    let sender = tokio::spawn(async move {
        write.write_all(&payload).await?;
        write.shutdown().await
    });
    let mut answer = Vec::new();
    within("the echo", read.read_to_end(&mut answer)).await.expect("the stream ends cleanly");
    sender.await.expect("the sender does not panic").expect("everything can be sent");
    answer
}

async fn echo_is_whole(service: SocketAddr, length: usize) {
    let payload = pattern(length);
    let answer = echo(service, payload.clone()).await;
    assert_eq!(answer.len(), length);
    assert!(answer == payload, "{length} bytes came back changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t152_given_an_echo_backend_when_bytes_are_sent_then_the_same_bytes_come_back() {
    let site = Site::new(152);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;

    for length in [0, 1, 64 * 1024, if full() { 100 << 20 } else { 10 << 20 }] {
        echo_is_whole(site.service(), length).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t153_given_a_backend_that_answers_at_the_end_when_the_client_ends_writing_then_the_answer_arrives() {
    let site = Site::new(153);
    let mut backend = Backend::start(site.backend(1), Script::CountThenAnswer).await;
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let mut stream = client::connect(site.service()).await.expect("the Service answers");

    stream.write_all(&pattern(100_000)).await.expect("the request can be sent");
    stream.shutdown().await.expect("the writing side can be closed");

    let mut answer = String::new();
    within("the answer", stream.read_to_string(&mut answer)).await.expect("the stream ends cleanly");
    assert_eq!(answer, "100000 bytes");
    backend.end_of_connection().await.expect("the backend sees a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_backend_that_ends_writing_first_when_the_client_goes_on_then_its_bytes_arrive() {
    let site = Site::new(1);
    let mut backend = Backend::start(site.backend(1), Script::HalfClose).await;
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let mut stream = client::connect(site.service()).await.expect("the Service answers");

    let mut greeting = String::new();
    within("the greeting", stream.read_to_string(&mut greeting)).await.expect("the backend's end arrives");
    stream.write_all(&pattern(100_000)).await.expect("the other direction is open");
    stream.shutdown().await.expect("the writing side can be closed");

    assert_eq!(greeting, "that was all");
    backend.end_of_connection().await.expect("the backend sees a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f12_t155_given_an_open_connection_when_the_client_resets_it_then_the_backend_sees_a_reset() {
    let site = Site::new(155);
    let mut backend = Backend::start(site.backend(1), Script::Silent).await;
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let mut stream = client::connect(site.service()).await.expect("the Service answers");
    stream.write_all(b"x").await.expect("the request can be sent");

    reset_on_drop(&stream).expect("the socket is open");
    drop(stream);

    let end = backend.end_of_connection().await;
    assert_eq!(end.expect_err("not a clean end").kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f12_t155_given_an_open_connection_when_the_backend_resets_it_then_the_client_sees_a_reset() {
    let site = Site::new(255);
    let _backend = Backend::start(site.backend(1), Script::Reset).await;
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let mut stream = client::connect(site.service()).await.expect("the Service answers");

    stream.write_all(b"x").await.expect("the request can be sent");

    let end = within("the end", stream.read_to_end(&mut Vec::new())).await;
    assert_eq!(end.expect_err("not a clean end").kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t156_given_an_open_connection_when_its_service_goes_then_it_goes_on_and_new_ones_are_refused() {
    let site = Site::new(156);
    let _backend = Backend::named(site.backend(1)).await;
    let relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let mut open = client::connect(site.service()).await.expect("the Service answers");
    client::ask_on(&mut open).await.expect("the backend answers");

    relay.edit(Manifest::new(site).tcp().named("other").cluster_ip(site.client(1)));
    relay.until("the Service to go", |status| status.services.keys().all(|name| &*name.name == "other")).await;

    assert!(client::refused(site.service()).await);
    assert_eq!(client::ask_on(&mut open).await.expect("the old connection is open"), site.backend(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t156_given_an_open_connection_when_the_relay_stops_accepting_then_it_goes_on_until_it_is_cut() {
    let site = Site::new(2);
    let _backend = Backend::named(site.backend(1)).await;
    let relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let mut open = client::connect(site.service()).await.expect("the Service answers");
    client::ask_on(&mut open).await.expect("the backend answers");

    relay.stop_accepting().await;
    assert!(client::refused(site.service()).await);
    assert_eq!(client::ask_on(&mut open).await.expect("the old connection is open"), site.backend(1));
    let cut = relay.drain(Duration::ZERO).await;

    assert_eq!(cut, 1);
    let end = within("the end", open.read_to_end(&mut Vec::new())).await;
    assert_eq!(end.expect_err("not a clean end").kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t162_given_a_black_hole_when_clients_connect_then_the_next_backend_answers_after_the_first_step() {
    let site = Site::new(162);
    let _hole = BlackHole::open(site.backend(1));
    let _backend = Backend::named(site.backend(2)).await;
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1), site.backend(2)])).await;

    for _ in 0..2 {
        let start = Instant::now();
        assert_eq!(client::ask(site.service()).await.expect("no client fails"), site.backend(2));
        // One step of the ladder has 250 ms, all of them have 3.75 s.
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t163_given_only_black_holes_when_a_client_connects_then_it_is_reset_at_the_end_of_the_ladder() {
    let site = Site::new(163);
    let _holes = [BlackHole::open(site.backend(1)), BlackHole::open(site.backend(2))];
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1), site.backend(2)])).await;
    let mut stream = client::connect(site.service()).await.expect("the relay accepts");

    let end = within("the end", stream.read_to_end(&mut Vec::new())).await;

    assert_eq!(end.expect_err("not a clean end").kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t164_given_a_client_that_waits_on_a_black_hole_when_others_connect_then_they_do_not_wait() {
    let site = Site::new(164);
    let _hole = BlackHole::open(site.backend(1));
    let _backend = Backend::named(site.backend(2)).await;
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1), site.backend(2)])).await;

    // The turn of picks is exact: of two clients one gets the black hole first.
    let start = Instant::now();
    let clients = [tokio::spawn(timed_ask(site.service())), tokio::spawn(timed_ask(site.service()))];
    let mut waited = Vec::new();
    for client in clients {
        waited.push(client.await.expect("a client does not panic") - start);
    }

    waited.sort_unstable();
    assert!(waited[0] < Duration::from_millis(200), "the other client waited {:?}", waited[0]);
    assert!(waited[1] >= Duration::from_millis(200), "no client met the black hole: {:?}", waited[1]);
}

/// Asks once and tells when the answer was there.
async fn timed_ask(service: SocketAddr) -> Instant {
    client::ask(service).await.expect("a backend answers");
    Instant::now()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t129_given_three_backends_when_300_clients_come_by_both_ways_then_each_gets_exactly_100() {
    let site = Site::new(129);
    let backends = [site.backend(1), site.backend(2), site.backend(3)];
    let _running =
        [Backend::named(backends[0]).await, Backend::named(backends[1]).await, Backend::named(backends[2]).await];
    let _relay = Relay::start(site, Manifest::new(site).tcp().node_port().endpoints(backends)).await;

    for service in [site.service(), site.node_port()] {
        let answers = client::ask_times(300, service).await;
        for backend in backends {
            assert_eq!(answers.iter().filter(|answer| **answer == backend).count(), 100, "{backend} by {service}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t135_given_session_affinity_when_a_client_comes_by_both_ways_then_one_backend_answers() {
    let site = Site::new(135);
    let backends = [site.backend(1), site.backend(2), site.backend(3)];
    let _running =
        [Backend::named(backends[0]).await, Backend::named(backends[1]).await, Backend::named(backends[2]).await];
    let _relay = Relay::start(site, Manifest::new(site).tcp().node_port().sticky(600).endpoints(backends)).await;

    let mut answers = client::ask_times(10, site.service()).await;
    answers.extend(client::ask_times(10, site.node_port()).await);

    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t094_given_no_endpoints_when_some_come_and_go_then_clients_are_refused_served_and_refused_again() {
    let site = Site::new(94);
    let _backend = Backend::named(site.backend(1)).await;
    let without = Manifest::new(site).tcp().node_port();
    let with = without.clone().endpoints([site.backend(1)]);
    let relay = Relay::start(site, &without).await;
    let both = [site.service(), site.node_port()];

    for service in both {
        assert!(client::refused(service).await, "{service} without endpoints");
    }
    for _ in 0..2 {
        relay.edit(&with);
        relay.until_backends("web", &[site.backend(1)]).await;
        let mut open = Vec::new();
        for service in both {
            let mut stream = client::connect(service).await.expect("the Service answers");
            client::ask_on(&mut stream).await.expect("the backend answers");
            open.push(stream);
        }
        relay.edit(&without);
        relay.until_backends("web", &[]).await;
        for service in both {
            assert!(client::refused(service).await, "{service} without endpoints");
        }
        go_on(&mut open).await;
    }
}

/// Open connections live on, whatever became of the listener.
async fn go_on(open: &mut [TcpStream]) {
    for stream in open {
        client::ask_on(stream).await.expect("an open connection goes on");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_traffic_when_it_has_ended_then_the_counters_tell_what_happened() {
    let site = Site::new(3);
    let _backend = Backend::start(site.backend(1), Script::Echo).await;
    let relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let backend = relay.backend("web", site.backend(1));

    for _ in 0..3 {
        echo_is_whole(site.service(), 1000).await;
    }
    relay.until("all connections to end", |_| backend.stats.active_connections.get() == 0).await;

    assert_eq!(backend.stats.connections.get(), 3);
    assert_eq!(backend.stats.upstream_bytes.get(), 3000);
    assert_eq!(backend.stats.downstream_bytes.get(), 3000);
}

/// Each would be the other's client without end, until descriptors are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t093_given_two_services_that_are_each_others_endpoint_when_a_client_connects_then_it_is_refused() {
    let site = Site::new(19);
    let [one, other] = [site.backend(1), site.backend(2)];
    let at_backends = |text: Manifest| text.to_string().replacen("port: 8080", &format!("port: {}", one.port()), 1);
    let first = at_backends(Manifest::new(site).named("one").cluster_ip(one.ip()).tcp().endpoints([other]));
    let second = at_backends(Manifest::new(site).named("other").cluster_ip(other.ip()).tcp().endpoints([one]));
    let _relay = Relay::start(site, format!("{first}---\n{second}")).await;

    for service in [one, other] {
        let end = within("the end", client::connect(service)).await;
        assert_eq!(end.expect_err("nobody to relay to").kind(), io::ErrorKind::ConnectionRefused, "{service}");
    }
}
