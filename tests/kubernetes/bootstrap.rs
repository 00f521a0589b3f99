//! A relay in place of kube-proxy: the cluster's own address of the API server is a cluster IP, which nobody serves before
//! the relay does.

use std::net::SocketAddr;

use ipnet::IpNet;

use crate::log::Log;
use crate::stage::{Setup, Stage, api_address, service, slice, slice_of, web};
use crate::support::api_server::ApiServer;
use crate::support::site::{SERVICE_PORT, Site};
use crate::support::{client, within};

/// Where `default/kubernetes` is reached: what 10.96.0.1:443 is in a cluster.
fn cluster_address(site: Site) -> SocketAddr {
    SocketAddr::new(site.client(50), SERVICE_PORT)
}

/// A server that knows itself, and the Service `web`.
async fn knowing_itself(site: Site) -> ApiServer {
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", service("kubernetes", &cluster_address(site).ip().to_string()));
    server.put("endpointslices", slice_of("kubernetes", api_address(site)));
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    server
}

/// A relay that is told the cluster's own address alone.
fn by_cluster_address(site: Site, mut setup: Setup) -> Setup {
    setup.selection.service_nets = vec![IpNet::from(cluster_address(site).ip())];
    setup.master = Some(cluster_address(site));
    setup
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t227_given_a_first_start_by_the_real_address_when_restarted_by_the_cluster_ip_then_it_finds_the_server_through_itself()
 {
    let site = Site::new(33);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let setup = Setup::keeping_in(folder.path());
    let server = knowing_itself(site).await;
    assert!(client::refused(cluster_address(site)).await, "nobody serves it yet");

    let first = Stage::following_with(site, server, setup.clone()).await;
    first.until_backends(&[site.backend(1)]).await;
    client::connect(cluster_address(site)).await.expect("the cluster's address leads to the server now");
    first.until("the state to be saved", |_| folder.path().join("last-known-good.json").exists()).await;
    let server = first.end().await;
    until_refused(cluster_address(site)).await;
    let stage = Stage::following_with(site, server, by_cluster_address(site, setup)).await;

    stage.until("contact", |status| status.contact.is_connected()).await;
    assert_eq!(stage.status().contact.failures().count(), 0, "it was served before it was asked");
    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.until_backends(&[site.backend(2)]).await;
    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(2));
}

/// Listeners of a relay that is gone are closed by its threads, as these end.
async fn until_refused(address: SocketAddr) {
    let wait = async {
        while !client::refused(address).await {
            tokio::task::yield_now().await;
        }
    };
    within("a listener to be closed", wait).await;
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn f2_given_the_cluster_ip_alone_and_no_state_when_started_then_one_line_says_what_is_wrong_and_what_to_do() {
    let (site, (log, _logging)) = (Site::new(34), Log::of_this_thread());
    let server = knowing_itself(site).await;

    let stage = Stage::following_with(site, server, by_cluster_address(site, Setup::default())).await;
    stage
        .until("two tries of each", |status| status.contact.failures().filter(|(_, _, count)| *count > 1).count() == 3)
        .await;

    assert!(!stage.status().synced);
    let told = log.lines_with("an address of the service range, which this relay does not serve before it knows more");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("unless another proxy on this node serves it"), "{told:?}");
    assert!(told[0].contains("give the server's own address with --master") && told[0].contains(" WARN "), "{told:?}");
    assert!(told[0].contains(&cluster_address(site).to_string()), "{told:?}");
    assert_eq!(log.lines_with(" WARN ").len(), 1, "nothing else");
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn f2_given_the_cluster_ip_and_a_saved_state_when_the_server_is_away_then_the_line_says_who_serves_the_address() {
    let (site, (log, _logging)) = (Site::new(75), Log::of_this_thread());
    let folder = tempfile::tempdir().expect("a folder can be made");
    let setup = Setup::keeping_in(folder.path());
    let first = Stage::following_with(site, knowing_itself(site).await, setup.clone()).await;
    first.until_backends(&[site.backend(1)]).await;
    first.until("the state to be saved", |_| folder.path().join("last-known-good.json").exists()).await;
    let mut server = first.end().await;
    until_refused(cluster_address(site)).await;
    server.stop().await;

    let mut stage = Stage::following_with(site, server, by_cluster_address(site, setup)).await;
    stage.until("a line", |_| !log.lines_with("an address of the service range").is_empty()).await;

    let told = log.lines_with("an address of the service range");
    assert!(told[0].contains("which this relay serves from the saved state"), "{told:?}");
    assert!(log.lines_with("another proxy").is_empty());
    stage.server.resume().await;
    stage.until("contact", |status| status.contact.is_connected()).await;
    assert_eq!(log.lines_with("an address of the service range").len(), 1);
}

/// On one thread, so that all it logs is seen.
#[tokio::test]
async fn f2_given_the_cluster_ip_beside_another_proxy_when_the_server_is_away_then_nothing_is_said_of_the_address() {
    let (site, (log, _logging)) = (Site::new(76), Log::of_this_thread());
    let server = knowing_itself(site).await;
    let mut setup = by_cluster_address(site, Setup::default());
    setup.selection.proxy_name = Some("kube-relay".into());

    let stage = Stage::following_with(site, server, setup).await;
    stage.until("a line", |_| !log.lines_with("the API server does not answer").is_empty()).await;

    assert!(log.lines_with("an address of the service range").is_empty());
    assert!(!stage.status().synced);
}
