//! The Node that the relay runs on: what it changes for load balancers and for listeners, and what it does not.

use std::net::IpAddr;

use kube_relay::status::Status;
use serde_json::json;

use crate::stage::{Setup, Stage, api_address, node, slice, web};
use crate::support::api_server::ApiServer;
use crate::support::client;
use crate::support::relay::service_of;
use crate::support::site::Site;

/// True where `web` is exposed at an address.
fn listens_at(status: &Status, ip: IpAddr) -> bool {
    service_of(status, "web").is_some_and(|web| web.plan.listeners().any(|(key, _)| key.address() == (ip, 8081).into()))
}

/// A server with the Service `web` and its first backend.
async fn serving(site: Site) -> ApiServer {
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    server
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t211_t221_given_the_own_node_when_it_is_about_to_go_or_gone_then_load_balancers_are_told_and_traffic_goes_on()
{
    let site = Site::new(221);
    let server = serving(site).await;
    server.put("nodes", node(site.node_ip(), &["node.kubernetes.io/unschedulable"]));
    let stage = Stage::following(site, server).await;
    stage.until_backends(&[site.backend(1)]).await;
    assert!(stage.is_eligible(), "a cordon keeps pods away, not traffic");

    stage.server.put("nodes", node(site.node_ip(), &["ToBeDeletedByClusterAutoscaler"]));
    stage.until("the taint", |_| !stage.is_eligible()).await;
    stage.server.put("nodes", node(site.node_ip(), &[]));
    stage.until("the taint to go", |_| stage.is_eligible()).await;
    stage.server.delete("nodes", "default/node-1");
    stage.until("the Node to go", |_| !stage.is_eligible()).await;

    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(1));
    stage.server.put("nodes", node(site.node_ip(), &[]));
    stage.until("the Node to come back", |_| stage.is_eligible()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t211_given_nodes_of_other_names_when_followed_then_services_are_served_and_load_balancers_are_not_called() {
    let site = Site::new(31);
    let server = serving(site).await;
    server.put("nodes", node(site.node_ip(), &[]));
    let mut other = Setup::default();
    other.selection.node_name = "node-2".into();

    let stage = Stage::following_with(site, server, other).await;

    stage.until_backends(&[site.backend(1)]).await;
    assert!(!stage.is_eligible());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_server_that_refuses_nodes_when_followed_then_services_are_served_all_the_same() {
    let site = Site::new(32);
    let server = serving(site).await;
    server.refuse_only(Some("nodes"));

    let stage = Stage::following(site, server).await;

    stage.until_backends(&[site.backend(1)]).await;
    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(1));
    assert!(!stage.is_eligible() && !stage.status().contact.is_connected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_a_node_with_fields_of_another_type_when_followed_then_the_rest_of_it_counts() {
    let site = Site::new(38);
    let server = serving(site).await;
    let mut odd = node(site.node_ip(), &[]);
    odd["metadata"]["labels"] = json!(["a", 7]);
    odd["status"]["capacity"] = json!({"cpu": []});
    server.put("nodes", odd.clone());

    let stage = Stage::following(site, server).await;

    stage.until_backends(&[site.backend(1)]).await;
    stage.until("the Node", |status| status.contact.is_connected() && stage.is_eligible()).await;
    odd["spec"]["taints"] = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": 7}]);
    stage.server.put("nodes", odd);
    stage.until("the taint", |_| !stage.is_eligible()).await;
    assert_eq!(stage.status().contact.failures().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t091_given_hints_for_two_zones_when_the_own_node_moves_to_the_other_then_its_backends_are_picked() {
    let site = Site::new(191);
    let server = ApiServer::start(api_address(site)).await;
    let mut hinted = slice("web-1", &[site.backend(1), site.backend(2)]);
    for (number, zone) in ["zone-1", "zone-2"].into_iter().enumerate() {
        hinted["endpoints"][number]["hints"] = json!({"forZones": [{"name": zone}]});
    }
    server.put("services", web(site));
    server.put("endpointslices", hinted);
    server.put("nodes", node(site.node_ip(), &[]));
    let stage = Stage::following(site, server).await;
    stage.until_backends(&[site.backend(1)]).await;

    let mut elsewhere = node(site.node_ip(), &[]);
    elsewhere["metadata"]["labels"]["topology.kubernetes.io/zone"] = "zone-2".into();
    stage.server.put("nodes", elsewhere);

    stage.until_backends(&[site.backend(2)]).await;
    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(2));
}

/// With a listener at port 8081 of the Node's address. In 127/8 no address is `primary`: a wildcard follows it as well.
async fn exposed_at(site: Site, node_ip: IpAddr) -> Stage {
    let server = serving(site).await;
    server.put("nodes", node(node_ip, &[]));
    let setup = Setup { flags: "--expose 0.0.0.0:8081=web:http", ..Setup::default() };
    let stage = Stage::following_with(site, server, setup).await;
    stage.until_backends(&[site.backend(1)]).await;
    stage
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t220_given_another_node_address_when_it_is_known_then_listeners_move_and_open_connections_are_kept() {
    let site = Site::new(220);
    let [old, new] = [site.client(51), site.client(52)];
    let stage = exposed_at(site, old).await;
    let mut open = client::connect((old, 8081).into()).await.expect("the Node's address");
    assert_eq!(client::ask_on(&mut open).await.expect("an answer"), site.backend(1));

    stage.server.put("nodes", node(new, &[]));
    stage.until("the move", |status| listens_at(status, new)).await;

    assert_eq!(client::ask((new, 8081).into()).await.expect("a backend answers"), site.backend(1));
    assert!(client::refused((old, 8081).into()).await);
    assert_eq!(client::ask_on(&mut open).await.expect("it goes on"), site.backend(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t220_given_a_node_that_is_registered_anew_when_it_has_no_addresses_yet_then_listeners_stay_where_they_are() {
    let site = Site::new(77);
    let [old, new] = [site.client(51), site.client(52)];
    let stage = exposed_at(site, old).await;
    stage.until("the Node", |_| stage.is_eligible()).await;

    stage.server.delete("nodes", "default/node-1");
    stage.until("the Node to go", |_| !stage.is_eligible()).await;
    stage.server.put("nodes", json!({"metadata": {"name": "node-1", "uid": "another"}, "spec": {}, "status": {}}));
    stage.until("the Node to come back", |_| stage.is_eligible()).await;
    assert_eq!(client::ask((old, 8081).into()).await.expect("a backend answers"), site.backend(1));

    stage.server.put("nodes", node(new, &[]));
    stage.until("the move", |status| listens_at(status, new)).await;
    assert!(!listens_at(&stage.status(), old));
}
