//! Listeners as their Services change: ports that move, addresses that join, places that somebody else holds.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};

use kube_relay::control::RelayOptions;
use kube_relay::status::ListenerState;

use crate::support::backend::Backend;
use crate::support::client;
use crate::support::manifest::Manifest;
use crate::support::relay::Relay;
use crate::support::site::{SERVICE_PORT, Site};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t159_given_a_service_when_its_port_is_updated_then_the_new_one_answers_and_the_old_one_refuses() {
    let site = Site::new(159);
    let _backend = Backend::named(site.backend(1)).await;
    let before = Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string();
    let relay = Relay::start(site, &before).await;
    let (old, new) = (site.service(), SocketAddr::new(site.cluster_ip(), SERVICE_PORT + 1));
    let mut open = client::connect(old).await.expect("the Service answers");
    client::ask_on(&mut open).await.expect("the backend answers");
    assert!(client::refused(new).await);

    relay.edit(before.replacen(&format!("port: {}", old.port()), &format!("port: {}", new.port()), 1));
    relay.until("the old port to close", |_| listening_inode(old).is_none()).await;

    assert_eq!(client::ask(new).await.expect("the new port answers"), site.backend(1));
    assert!(client::refused(old).await);
    assert_eq!(client::ask_on(&mut open).await.expect("an open connection goes on"), site.backend(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t160_given_an_external_ip_when_another_is_added_then_it_answers_and_no_other_listener_is_rebuilt() {
    let site = Site::new(160);
    let _backend = Backend::named(site.backend(1)).await;
    let [first, second] = [1, 2].map(|number| SocketAddr::new(site.client(number), SERVICE_PORT));
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let mut options = RelayOptions::default();
    options.plan.allowed_external_cidrs = [first, second].map(|external| external.ip().into()).into();
    let relay = Relay::start_with(site, manifest.clone().external_ips([first.ip()]), options).await;
    let old = [site.service(), first];
    let sockets = old.map(listening_inode);
    assert!(sockets.iter().all(Option::is_some), "{old:?} are served");

    relay.edit(manifest.external_ips([first.ip(), second.ip()]));
    relay.until("the new address", |_| listening_inode(second).is_some()).await;

    assert_eq!(old.map(listening_inode), sockets, "the sockets of before");
    for service in [site.service(), first, second] {
        assert_eq!(client::ask(service).await.expect("the Service answers"), site.backend(1), "{service}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t169_f32_given_a_port_that_another_socket_holds_when_served_then_only_it_fails_until_it_is_free() {
    let site = Site::new(169);
    let _backend = Backend::named(site.backend(1)).await;
    let holder = TcpListener::bind(site.service()).expect("the test's own address is free");
    let held = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let free = held.clone().named("other").cluster_ip(site.client(1));

    let relay = Relay::start(site, format!("{held}---\n{free}")).await;

    let status = relay.status();
    let failed: Vec<_> = status.failed.iter().collect();
    let [(key, ListenerState::Failed { reason, .. })] = failed[..] else { panic!("one failure, not {failed:?}") };
    assert_eq!((key.address(), &**reason), (site.service(), "in_use"));
    let other = SocketAddr::new(site.client(1), SERVICE_PORT);
    assert_eq!(client::ask(other).await.expect("the other Service answers"), site.backend(1));
    drop(holder);
    relay.until("the port to be taken", |status| status.failed.is_empty()).await;
    assert_eq!(client::ask(site.service()).await.expect("the Service answers"), site.backend(1));
}

/// The socket that listens at an IPv4 address, by its inode.
fn listening_inode(address: SocketAddr) -> Option<String> {
    const LISTEN: &str = "0A";
    let IpAddr::V4(ip) = address.ip() else { return None };
    let local = format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port());
    let table = fs::read_to_string("/proc/net/tcp").expect("procfs");
    let mut sockets = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let socket = sockets.find(|socket| socket.get(1) == Some(&&*local) && socket.get(3) == Some(&LISTEN))?;
    socket.get(9).map(|inode| (*inode).to_owned())
}
