//! Ways of a packet on one machine: to the backend that sent it, and to ports that nobody has.

use std::net::SocketAddr;

use support::backend::{Backend, Talker};
use support::client::{Caller, refused};
use support::manifest::Manifest;
use support::relay::Relay;
use support::site::Site;
use support::within;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};

mod support;

#[tokio::test]
async fn t099_given_a_tcp_port_when_another_number_or_udp_is_tried_then_it_is_refused() {
    let site = Site::new(99);
    let _backend = Backend::named(site.backend(1)).await;
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;

    assert!(!refused(site.service()).await);
    assert!(refused(SocketAddr::new(site.cluster_ip(), site.service().port() + 1)).await);
    Caller::new(site.service()).await.send_until_refused(b"who?").await;
}

#[tokio::test]
async fn t101_given_one_backend_when_it_calls_its_own_service_then_it_answers_itself_and_sees_the_node() {
    let site = Site::new(101);
    let listener = TcpListener::bind(site.backend(1)).await.expect("the test's own address is free");
    let _relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let caller = TcpSocket::new_v4().expect("a socket");
    caller.bind((site.backend(1).ip(), 0).into()).expect("a port of the backend's own address");

    let mut calling = within("its own Service", caller.connect(site.service())).await.expect("the Service answers");
    let (mut called, source) = within("itself", listener.accept()).await.expect("a connection");

    calling.write_all(b"me").await.expect("the stream is open");
    let mut heard = [0; 2];
    within("its own words", called.read_exact(&mut heard)).await.expect("the stream is open");
    assert_eq!(&heard, b"me");
    assert_ne!(source.ip(), site.backend(1).ip(), "the relay stands between");
}

#[tokio::test]
async fn t102_given_one_backend_when_it_sends_to_its_own_service_then_the_answer_comes_from_the_cluster_ip() {
    let site = Site::new(102);
    let _backend = Talker::named(site.backend(1)).await;
    let _relay = Relay::start(site, Manifest::new(site).udp().endpoints([site.backend(1)])).await;

    // Connected to the Service: datagrams of anybody else would not arrive.
    let caller = Caller::from_address(site.backend(1).ip(), site.service()).await;

    assert_eq!(caller.ask().await.backend, site.backend(1));
}
