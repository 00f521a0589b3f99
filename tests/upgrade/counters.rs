//! What is counted goes on over upgrades, whoever counts it: none is less, gone, or counted once more.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;

use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::relay::House;
use crate::support::backend::{Backend, BlackHole, Script, Talker, refusing};
use crate::support::client::{Caller, ask, ask_on, ask_times, connect};
use crate::support::manifest::Manifest;
use crate::support::seen;
use crate::support::site::{SERVICE_PORT, Site};

/// What a successor does itself, and so counts: it plans, stores tables, and has taken over. And what the kernel
/// counts.
const OF_SUCCESSORS: [&str; 6] = [
    "kuberelay_table_swaps_total",
    "kubeproxy_sync_proxy_rules_",
    "kuberelay_upgrades_total{result=\"success\"}",
    "kuberelay_upgrade_standstill_seconds",
    "kuberelay_kube_events_total",
    "kuberelay_host_listen_overflows_total",
];

/// Each series of a counter or a histogram, with its number; but for what is a process's own.
pub(crate) fn counted(house: &House) -> BTreeMap<String, f64> {
    let page = seen::page(house.admin(), "/metrics").expect("it answers");
    let (mut counted, mut counts) = (BTreeMap::new(), false);
    for line in page.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let is_own = kind.starts_with("process_");
            counts = !is_own && [" counter", " histogram"].iter().any(|wanted| kind.ends_with(wanted));
        } else if let (true, Some((series, number))) = (counts && !line.starts_with('#'), line.rsplit_once(' ')) {
            counted.insert(series.to_owned(), number.parse().expect("a number"));
        }
    }
    counted
}

/// Those that are less than before, or are not there any more.
pub(crate) fn fallen(before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>) -> Vec<String> {
    let has_fallen = |(series, count): &(&String, &f64)| after.get(*series).is_none_or(|now| now < *count);
    before.iter().filter(has_fallen).map(|(series, count)| told(series, *count, after)).collect()
}

fn told(series: &str, count: f64, after: &BTreeMap<String, f64>) -> String {
    format!("{series}: {count}, then {:?}", after.get(series))
}

/// Those that have grown though nothing has happened but an upgrade.
fn counted_again(before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>) -> Vec<String> {
    let is_ones = |series: &str| OF_SUCCESSORS.iter().any(|name| series.starts_with(name));
    let has_grown = |(series, count): &(&String, &f64)| after.get(*series).is_some_and(|now| now > *count);
    let grown = before.iter().filter(has_grown).filter(|(series, _)| !is_ones(series));
    grown.map(|(series, count)| told(series, *count, after)).collect()
}

/// Upgrades twice, and looks at all counters each time.
async fn upgrade_twice(house: &mut House) {
    for _ in 0..2 {
        let (before, last) = (counted(house), house.serves().expect("somebody serves"));
        let output = house.upgrade(&[]).await;
        assert!(output.status.success(), "{output:?}\n{}", house.log());
        house.until("the last one ends", |house| house.has_ended(last)).await;
        let after = counted(house);

        assert_eq!(fallen(&before, &after), Vec::<String>::new());
        assert_eq!(counted_again(&before, &after), Vec::<String>::new());
    }
}

async fn until_counted(house: &mut House, metric: &'static str, labels: &[&str]) {
    house.until(metric, |house| house.metric(metric, labels) > 0).await;
}

/// A Service with a port that is not served, and an object that cannot be read.
const REJECTED: &str = "
---
{apiVersion: v1, kind: Service, metadata: {name: odd}, spec: {ports: [{name: a, port: 1, protocol: SCTP}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: wrong}, spec: 7}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_given_some_of_everything_that_is_counted_when_upgraded_twice_then_no_counter_falls_or_counts_again() {
    let site = Site::new(56);
    let (_one, _talker) = (Backend::named(site.backend(1)).await, Talker::named(site.backend(1)).await);
    let (_refusing, _gone) = (refusing(site.backend(2)), refusing(site.backend(4)));
    let _resetting = Backend::start(site.backend(3), Script::Reset).await;
    let web = Manifest::new(site).tcp().udp().endpoints([site.backend(1), site.backend(2)]);
    let resets = Manifest::new(site).named("resets").cluster_ip(site.client(1)).tcp().endpoints([site.backend(3)]);
    let gone = Manifest::new(site).named("gone").cluster_ip(site.client(2)).tcp().endpoints([site.backend(4)]);
    let (mut house, first) = House::serving_all(site, &[&web, &resets, &gone]).await;
    fs::write(house.manifest(), format!("{web}\n---\n{resets}\n---\n{gone}{REJECTED}")).expect("it can be written");
    House::signal(first, Signal::HUP);
    ask_times(12, site.service()).await;
    Caller::new(site.service()).await.ask_until_answered().await;
    let mut reset = connect(SocketAddr::new(site.client(1), SERVICE_PORT)).await.expect("it serves");
    reset.write_all(b"?").await.expect("it is taken");
    reset.read_u8().await.expect_err("the backend resets it");
    ask(SocketAddr::new(site.client(2), SERVICE_PORT)).await.expect_err("nobody is there");
    for (metric, labels) in [
        ("kuberelay_objects_rejected_total", &["reason=\"sctp\""] as &[_]),
        ("kuberelay_objects_rejected_total", &["reason=\"decode\""]),
        ("kuberelay_service_dropped_total", &["reason=\"ejected_all\""]),
        ("kuberelay_service_retries_total", &[]),
        ("kuberelay_connect_failures_total", &["reason=\"refused\""]),
        ("kuberelay_connect_duration_seconds_count", &[]),
        ("kuberelay_closed_total", &["reason=\"finished\""]),
        ("kuberelay_closed_total", &["reason=\"reset\""]),
        ("kuberelay_flows_total", &[]),
        ("kuberelay_datagrams_total", &["direction=\"downstream\""]),
    ] {
        until_counted(&mut house, metric, labels).await;
    }
    let upgrading = ["result=\"not_started\""];
    assert!(!house.upgrade(&["--binary", "/nowhere"]).await.status.success());
    assert_eq!(house.metric("kuberelay_upgrades_total", &upgrading), 1);

    upgrade_twice(&mut house).await;

    let another = REJECTED.replace("odd", "odder");
    let pid = house.serves().expect("somebody serves");
    fs::write(house.manifest(), format!("{web}{REJECTED}{another}")).expect("it can be written");
    House::signal(pid, Signal::HUP);
    let refused = ["reason=\"sctp\""];
    house.until("one more is rejected", |house| house.metric("kuberelay_objects_rejected_total", &refused) == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_given_a_connection_that_stays_behind_when_others_serve_then_all_of_it_is_counted_there_and_once() {
    let site = Site::new(57);
    let hole = BlackHole::open(site.backend(1));
    let web = Manifest::new(site).tcp().annotation("connect-timeout", "25s").endpoints([site.backend(1)]);
    let (mut house, first) = House::serving(site, &web).await;
    let mut client = connect(site.service()).await.expect("it serves");
    until_counted(&mut house, "kuberelay_service_accepted_total", &[]).await;
    let count = |house: &House, name: &str| house.metric(&format!("kuberelay_{name}"), &["service=\"web\""]);

    let upgraded = house.upgrade(&[]).await;
    assert!(upgraded.status.success(), "{upgraded:?}");
    let backend = hole.open_up(Script::Name);
    assert_eq!(ask_on(&mut client).await.expect("it goes on"), backend.address);

    // It is open there, and what it does is told here.
    house.until("it is counted", |house| count(house, "service_downstream_bytes_total") > 0).await;
    assert_eq!((count(&house, "service_connections_total"), count(&house, "service_open")), (1, 0));
    assert!(!house.has_ended(first));
    let before = counted(&house);
    let upgraded = house.upgrade(&[]).await;
    assert!(upgraded.status.success(), "{upgraded:?}");
    assert_eq!(fallen(&before, &counted(&house)), Vec::<String>::new());
    assert_eq!(ask_on(&mut client).await.expect("it goes on"), backend.address);
    drop(client);
    house.until("the first one ends", |house| house.has_ended(first)).await;
    house.until("its end is counted", |house| count(house, "service_closed_total") == 1).await;
    let line = format!("{}\n", backend.address).len() as u64;
    assert_eq!(count(&house, "service_downstream_bytes_total"), 2 * line);
    for name in ["service_accepted_total", "service_connections_total", "connections_total", "closed_total"] {
        assert_eq!(count(&house, name), 1, "{name}");
    }
}

#[cfg(feature = "kubernetes")]
mod with_an_api_server {
    use std::net::IpAddr;

    use k8s_openapi::jiff::Timestamp;
    use serde_json::{Value, json};

    use super::*;
    use crate::support::api_server::{ApiServer, Mood};

    fn service(name: &str, ip: IpAddr, protocol: &str) -> Value {
        json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip],
                "ports": [{"name": "http", "protocol": protocol, "port": SERVICE_PORT}],
            },
        })
    }

    /// What the Service `web` has, from this moment on. Nobody asks this backend: a cluster has none on loopback.
    fn slice_of_now(backend: &str) -> Value {
        let now = Timestamp::now().to_string();
        json!({
            "metadata": {
                "name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"},
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": now},
            },
            "addressType": "IPv4", "ports": [{"name": "http", "protocol": "TCP", "port": 8000}],
            "endpoints": [{"addresses": [backend]}],
        })
    }

    async fn api_server(site: Site) -> ApiServer {
        let server = ApiServer::start(SocketAddr::new(site.client(8), 6443)).await;
        server.put("services", service("web", site.cluster_ip(), "TCP"));
        server.put("endpointslices", slice_of_now("192.0.2.1"));
        server
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn t234_given_an_api_server_that_has_failed_when_upgraded_twice_then_no_counter_falls_or_counts_again() {
        let site = Site::new(58);
        let mut server = api_server(site).await;
        server.put("services", service("odd", site.client(3), "SCTP"));
        server.put("endpointslices", json!({"metadata": {"name": "wrong", "namespace": "default"}}));
        let mut house = House::following(site, &server).await;

        server.put("endpointslices", slice_of_now("192.0.2.2"));
        until_counted(&mut house, "kubeproxy_network_programming_duration_seconds_count", &[]).await;
        server.expire();
        until_counted(&mut house, "kuberelay_kube_relists_total", &["reason=\"expired\""]).await;
        server.mood(Mood::Refuse(500));
        server.cut().await;
        until_counted(&mut house, "kuberelay_kube_watch_errors_total", &["reason=\"server\""]).await;
        server.mood(Mood::Well);
        until_counted(&mut house, "kuberelay_objects_rejected_total", &["reason=\"sctp\""]).await;
        until_counted(&mut house, "kuberelay_objects_rejected_total", &["reason=\"decode\""]).await;
        house.until("it is heard again", |house| house.metric("kuberelay_source_connected", &[]) == 1).await;

        upgrade_twice(&mut house).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn t064_given_a_change_that_the_old_process_has_served_when_the_next_one_reads_it_then_its_time_counts_once()
    {
        let site = Site::new(59);
        let server = api_server(site).await;
        let mut house = House::following(site, &server).await;
        let programmed = |house: &House| house.metric("kubeproxy_network_programming_duration_seconds_count", &[]);
        // What the next one lists is refused for a while; the watches of the one that serves are open.
        house
            .until("it watches", |_| ["services", "endpointslices"].iter().all(|kind| server.count(kind, true) > 0))
            .await;
        server.refuse_only(Some("endpointslices"));
        let lists = server.count("endpointslices", false);
        let second = house.start(|command| _ = command.arg("--take-over"));
        house.until("the next one asks", |_| server.count("endpointslices", false) > lists).await;

        server.put("endpointslices", slice_of_now("192.0.2.2"));
        house.until("it is served", |house| programmed(house) == 1).await;
        server.refuse_only(None);
        house.until("the next one serves", |house| house.serves() == Some(second) && house.is_ready()).await;
        house.until("it has read all", |house| house.metric("kuberelay_source_connected", &[]) == 1).await;
        server.put("endpointslices", slice_of_now("192.0.2.3"));
        let knows = |text: &'static str| {
            move |house: &mut House| seen::page(house.admin(), "/status").is_ok_and(|page| page.contains(text))
        };
        house.until("another change is served", knows("192.0.2.3")).await;
        server.put("services", service("later", site.client(3), "TCP"));
        house.until("all before is counted", knows("later")).await;

        assert_eq!(programmed(&house), 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn t064_given_a_change_that_the_old_process_has_not_heard_of_when_the_next_one_serves_it_then_it_counts() {
        let site = Site::new(65);
        let server = api_server(site).await;
        let mut house = House::following(site, &server).await;
        let programmed = |house: &House| house.metric("kubeproxy_network_programming_duration_seconds_count", &[]);
        // Another replica of the API server, which is ahead of the first one.
        let ahead = ApiServer::start(SocketAddr::new(site.client(7), 6443)).await;
        ahead.put("services", service("web", site.cluster_ip(), "TCP"));
        ahead.refuse_only(Some("endpointslices"));
        fs::write(house.path().join("config"), ahead.kubeconfig()).expect("the test's folder can be written");
        let second = house.start(|command| _ = command.arg("--take-over"));
        house.until("the next one asks", |_| ahead.count("endpointslices", false) > 0).await;
        assert_eq!(programmed(&house), 0);

        ahead.put("endpointslices", slice_of_now("192.0.2.2"));
        ahead.refuse_only(None);
        house.until("the next one serves", |house| house.serves() == Some(second) && house.is_ready()).await;
        house.until("it is measured", |house| programmed(house) > 0).await;
        ahead.put("services", service("later", site.client(3), "TCP"));
        let knows = |house: &mut House| seen::page(house.admin(), "/status").is_ok_and(|page| page.contains("later"));
        house.until("all before is counted", knows).await;

        assert_eq!(programmed(&house), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn t234_f02_given_rejected_objects_when_a_saved_state_is_taken_over_with_then_each_counts_once() {
        let site = Site::new(62);
        let server = api_server(site).await;
        server.put("services", service("odd", site.client(3), "SCTP"));
        server.put("endpointslices", json!({"metadata": {"name": "wrong", "namespace": "default"}}));
        let mut house = House::following(site, &server).await;
        let rejected = |house: &House| {
            ["reason=\"sctp\"", "reason=\"decode\""].map(|why| house.metric("kuberelay_objects_rejected_total", &[why]))
        };
        house.until("both are rejected", |house| rejected(house) == [1, 1]).await;
        let saved = house.state().join("last-known-good.json");
        house.until("the state is saved", |_| saved.exists()).await;

        server.mood(Mood::Refuse(500));
        let second = house.start(|command| _ = command.arg("--take-over"));
        house.until("the next one serves what is saved", |house| house.serves() == Some(second)).await;
        assert_eq!(rejected(&house), [1, 1]);
        server.mood(Mood::Well);
        house.until("the server is heard", |house| house.metric("kuberelay_source_connected", &[]) == 1).await;
        server.put("endpointslices", json!({"metadata": {"name": "as-wrong", "namespace": "default"}}));

        house.until("what comes now counts", |house| rejected(house)[1] >= 2).await;
        assert_eq!(rejected(&house), [1, 2]);
    }
}
