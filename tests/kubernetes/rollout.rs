//! Objects that come, change and go.

use std::net::SocketAddr;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube_relay::stats::PROCESS;
use kube_relay::status::Status;
use serde_json::{Value, json};

use crate::stage::{Stage, api_address, service, slice, slice_of, web};
use crate::support::api_server::ApiServer;
use crate::support::client;
use crate::support::program::Program;
use crate::support::relay::picks;
use crate::support::site::Site;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_start_when_all_is_listed_then_it_comes_from_the_servers_cache_and_in_one_piece() {
    let stage = Stage::serving(Site::new(16)).await;
    let kinds = ["services", "endpointslices", "nodes"];

    stage.until("watches", |_| kinds.iter().all(|kind| stage.server.count(kind, true) > 0)).await;

    let asked = stage.server.asked();
    let lists: Vec<_> = asked.iter().filter(|asked| !asked.watch).collect();
    assert_eq!(lists.len(), kinds.len(), "{asked:#?}");
    for list in lists {
        let parameters: Vec<_> = list.query.split('&').collect();
        assert!(parameters.contains(&"resourceVersion=0"), "no quorum read: {list:?}");
        assert!(!parameters.iter().any(|parameter| parameter.starts_with("limit=")), "no page of etcd: {list:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_service_of_an_api_server_when_its_slice_changes_then_clients_follow() {
    let stage = Stage::serving(Site::new(11)).await;
    let site = stage.site;
    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(1));

    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.until_backends(&[site.backend(2)]).await;

    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(2));
    stage.server.delete("services", "default/web");
    stage.until_known("web", false).await;
    assert!(client::refused(site.service()).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t224_given_services_without_their_slices_when_one_list_fails_then_nothing_is_bound_until_both_are_there() {
    bound_with_the_last_list(Site::new(224), "endpointslices", "EndpointSlice", "services").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t224_given_slices_without_their_services_when_one_list_fails_then_nothing_is_bound_until_both_are_there() {
    bound_with_the_last_list(Site::new(80), "services", "Service", "endpointslices").await;
}

/// The server refuses one resource, of this kind, and has sent the other.
async fn bound_with_the_last_list(site: Site, refused: &'static str, kind: &str, sent: &str) {
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));
    server.refuse_only(Some(refused));
    let stage = Stage::following(site, server).await;
    stage
        .until("the list that is not refused", |status| {
            status.contact.failures().any(|(failed, _, _)| failed.as_str() == kind)
                && stage.server.count(sent, true) > 0
        })
        .await;
    assert!(!stage.status().synced);
    assert!(client::refused(site.service()).await);

    stage.server.refuse_only(None);

    stage.until_backends(&[site.backend(1)]).await;
    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(1));
}

/// What `web` has on a server without slices.
fn endpoints(site: Site, number: u8) -> Value {
    let addresses = json!([{"ip": site.backend(number).ip().to_string()}]);
    let ports = json!([{"name": "http", "port": site.backend(number).port()}]);
    json!({"metadata": {"name": "web"}, "subsets": [{"addresses": addresses, "ports": ports}]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t229_given_a_server_without_endpoint_slices_when_followed_then_endpoints_are_read() {
    let site = Site::new(14);
    let server = ApiServer::start(api_address(site)).await;
    server.unknown("endpointslices");
    server.put("services", web(site));
    server.put("endpoints", endpoints(site, 1));

    let stage = Stage::following(site, server).await;

    stage.until_backends(&[site.backend(1)]).await;
    assert_eq!(client::ask(site.service()).await.expect("a backend answers"), site.backend(1));
    stage.until("contact", |status| status.contact.is_connected()).await;
    assert_eq!(stage.server.count("apis", false), 1, "asked once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t229_given_slices_that_are_not_found_for_a_while_when_the_server_has_them_then_endpoints_are_not_read() {
    let site = Site::new(78);
    let server = ApiServer::start(api_address(site)).await;
    server.lose("endpointslices");
    server.put("services", web(site));
    server.put("endpoints", endpoints(site, 2));
    server.put("endpointslices", slice("web-1", &[site.backend(1)]));

    let stage = Stage::following(site, server).await;
    stage.until("two tries", |_| stage.server.count("endpointslices", false) >= 2).await;
    assert!(!stage.status().synced);
    stage.server.refuse_only(None);

    stage.until_backends(&[site.backend(1)]).await;
    stage.until("contact", |status| status.contact.is_connected()).await;
    assert_eq!(stage.server.count("endpoints", false), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t229_given_a_server_that_is_upgraded_when_endpoints_are_not_found_then_slices_take_over_and_none_is_missed() {
    let site = Site::new(79);
    let server = ApiServer::start(api_address(site)).await;
    server.unknown("endpointslices");
    server.put("services", web(site));
    server.put("endpoints", endpoints(site, 1));
    let mut stage = Stage::following(site, server).await;
    stage.until_backends(&[site.backend(1)]).await;
    stage.until("a watch", |_| stage.server.count("endpoints", true) > 0).await;

    stage.server.lose("endpoints");
    stage.server.put("endpointslices", slice("web-1", &[site.backend(1), site.backend(2)]));
    stage.server.compact(); // So that everything has to be listed.
    stage.server.cut().await;
    stage.until_backends_without_a_gap(&[site.backend(1), site.backend(2)]).await;

    stage.until("contact", |status| status.contact.is_connected()).await;
    stage.server.put("endpointslices", slice("web-1", &[site.backend(2)]));
    stage.until_backends(&[site.backend(2)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_given_a_bad_object_among_good_ones_when_it_comes_then_the_others_are_applied_and_it_is_told() {
    let stage = Stage::serving(Site::new(13)).await;
    let mut bad = service("bad", "127.0.13.9");
    bad["spec"]["ports"] = json!([{"port": "http"}]);

    stage.server.put("services", bad);
    stage.server.put("services", service("good", "127.0.13.10"));
    stage.until_known("good", true).await;

    stage.until("the problem", |status| !status.problems.is_empty()).await;
    let problems = stage.status().problems.clone();
    assert!(problems.iter().any(|problem| problem.object == "Service default/bad"), "{problems:?}");
    assert_eq!(stage.status().source.rejections.iter().collect::<Vec<_>>(), [("Service", "decode", 1)]);
}

/// The items of a list as a server of release 1.20 sent it.
fn recorded(resource: &str) -> Vec<Value> {
    let path = format!("{}/tests/manifests/recorded/{resource}.json", env!("CARGO_MANIFEST_DIR"));
    let list: Value = serde_json::from_slice(&std::fs::read(path).expect("a recorded list")).expect("JSON");
    list["items"].as_array().expect("items").clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t229_given_what_a_server_of_1_20_sends_when_followed_then_each_service_has_its_endpoints() {
    let site = Site::new(15);
    let server = ApiServer::start(api_address(site)).await;
    server.unknown("endpointslices");
    for resource in ["services", "endpoints"] {
        recorded(resource).into_iter().for_each(|object| server.put(resource, object));
    }

    let stage = Stage::following(site, server).await;

    stage.until("the first state", |status| status.synced).await;
    let status = stage.status();
    let three = ["10.200.0.11:8080", "10.200.0.12:8080", "10.200.0.13:8080"];
    assert_eq!(picks(&status, "web"), three);
    assert_eq!(picks(&status, "web-lb"), three[..2]);
    assert_eq!(picks(&status, "manual"), [three[0], three[2]], "written by hand");
    assert_eq!(picks(&status, "kubernetes"), ["10.200.0.1:16443"]);
    assert!(picks(&status, "empty").is_empty());
    let refused: Vec<_> = status.source.rejections.iter().collect();
    assert_eq!(refused, [("Service", "external_ip", 1)], "one has an external IP that nobody allowed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t064_given_changes_of_1970_before_the_start_and_to_come_when_they_are_served_then_none_of_them_is_measured() {
    let site = Site::new(88);
    let server = ApiServer::start(api_address(site)).await;
    server.put("services", web(site));
    let program = Program::following(site, &server.kubeconfig()).await;
    let [count, sum] = ["count", "sum"].map(|part| format!("kubeproxy_network_programming_duration_seconds_{part}"));
    let pods = |count| (1..=count).map(|host| SocketAddr::from(([10, 135, 0, host], 8000))).collect::<Vec<_>>();
    let change = |host: u8, at: Timestamp| {
        let mut slice = slice("web-1", &pods(host)); // Each is another one than before.
        slice["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": at.to_string()});
        server.put("endpointslices", slice);
    };

    let (now, hour) = (Timestamp::now(), Duration::from_secs(3_600));
    change(1, Timestamp::UNIX_EPOCH);
    change(2, now - hour);
    change(3, now + hour);
    change(4, Timestamp::now());
    program.until("the last of them", |program| program.metric(&count, &[]) > 0).await;

    assert_eq!(program.metric(&count, &[]), 1, "those before it have been served by then");
    assert!((0.0..60.0).contains(&program.gauge(&sum)), "{} s", program.gauge(&sum));
    assert_eq!(program.metric("kuberelay_service_backends", &["state=\"ready\""]), 4);
}

/// How many Services come, and how many at once.
const MANY: (usize, usize) = (200, 15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t064_given_many_new_services_when_they_come_then_each_is_measured_once() {
    let site = Site::new(64);
    let stage = Stage::serving(site).await;
    let (before, count_before) = (measured(), PROCESS.network_programming.count());

    for first in (0..MANY.0).step_by(MANY.1) {
        let names: Vec<_> = (first..MANY.0.min(first + MANY.1)).map(|number| format!("s{number}")).collect();
        for (number, name) in names.iter().enumerate() {
            let ip = format!("127.64.{}.{}", first / MANY.1, number + 1);
            stage.server.put("services", service(name, &ip));
            let mut slice = slice_of(name, site.backend(1));
            let now = Timestamp::now().to_string();
            slice["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": now});
            stage.server.put("endpointslices", slice);
        }
        let served = |status: &Status| names.iter().all(|name| !picks(status, name).is_empty());
        stage.until("new Services", served).await;
    }

    let count = || PROCESS.network_programming.count() - count_before;
    stage.until("measurements", |_| count() == MANY.0 as u64).await;
    let within: Vec<_> = measured().into_iter().zip(before).map(|(now, before)| (now.0, now.1 - before.1)).collect();
    let enough = |share: f64| within.iter().find(|(_, done)| *done as f64 >= share * count() as f64);
    let [p50, p99] = [0.50, 0.99].map(|share| enough(share).map_or(f64::INFINITY, |(seconds, _)| *seconds));
    println!("{} new Services, {} at once: p50 at most {p50} s, p99 at most {p99} s; {within:?}", MANY.0, MANY.1);
    if cfg!(debug_assertions) {
        println!("times are judged in release builds alone: cargo test --release --test kubernetes t064");
        return;
    }
    assert!(p50 <= 0.010 && p99 <= 0.100, "{within:?}");
}

/// How many changes took no longer than each of the bounds, in seconds. No other test here has any.
fn measured() -> Vec<(f64, u64)> {
    PROCESS.network_programming.cumulative().collect()
}
