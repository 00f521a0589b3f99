//! A large cluster, from the program's start to one change in it.

use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::stage::{api_address, service};
use crate::support::api_server::ApiServer;
use crate::support::full;
use crate::support::program::{Descriptors, Program};
use crate::support::seen;
use crate::support::site::Site;

const SERVICES: u64 = 10_000;
const SHORT_SERVICES: u64 = 300;
const ENDPOINTS: u8 = 10;
/// One by one: each is a batch by itself.
const CHANGES: u64 = 20;
const PACE: Duration = Duration::from_millis(50);
/// What the program may hold in memory, debug builds too.
const MEMORY_BYTES: u64 = 200_000_000;

fn name(number: u64) -> String {
    format!("s{number:05}")
}

/// A slice as a real server sends it, with all that a proxy does not read.
fn slice(number: u64, endpoints: u8) -> Value {
    let pod = |host: u8| {
        let pod = format!("{}-5d4f8c7b9d-{host:05}", name(number));
        json!({
            "addresses": [format!("10.{}.{}.{host}", number / 250, number % 250)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{host}"), "zone": "zone-1",
            "targetRef": {"kind": "Pod", "name": pod, "namespace": "default", "uid": "11111111-2222-3333-4444-555555555555"},
        })
    };
    json!({
        "metadata": {
            "name": format!("{}-abcde", name(number)), "namespace": "default", "generation": 3,
            "labels": {"kubernetes.io/service-name": name(number), "app": name(number)},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name(number), "uid": "u", "controller": true}],
        },
        "addressType": "IPv4", "ports": [{"name": "http", "protocol": "TCP", "port": 8000}],
        "endpoints": (1..=endpoints).map(pod).collect::<Vec<_>>(),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t231_f19_given_a_large_cluster_when_the_program_starts_and_one_slice_changes_then_both_cost_what_they_may() {
    let (site, descriptors) = (Site::new(35), Descriptors::take().await);
    let services = descriptors.fitting(if full() { SERVICES } else { SHORT_SERVICES }, 1);
    let server = ApiServer::start(api_address(site)).await;
    for number in 0..services {
        server.put("services", service(&name(number), &format!("127.135.{}.{}", number / 250, number % 250 + 1)));
        server.put("endpointslices", slice(number, ENDPOINTS));
    }
    server.compact();

    let began = Instant::now();
    let program = Program::following(site, &server.kubeconfig()).await;
    let (took, memory) = (began.elapsed(), seen::private_bytes(program.pid()));
    let before = seen::run_time(program.pid());
    for change in 1..=CHANGES {
        let mut slice = slice(change, ENDPOINTS - 1);
        slice["metadata"]["annotations"] =
            json!({"endpoints.kubernetes.io/last-change-trigger-time": Timestamp::now().to_string()});
        server.put("endpointslices", slice);
        tokio::time::sleep(PACE).await;
    }
    // Before anybody asks: to tell of ten thousand Services costs more than a change.
    let each = (seen::run_time(program.pid()) - before) / u32::try_from(CHANGES).unwrap_or(1);
    let served = "kubeproxy_network_programming_duration_seconds_count";
    program.until("the changes to be served", |program| program.metric(served, &[]) == CHANGES).await;

    println!(
        "{services} Services of {ENDPOINTS} endpoints: served after {took:?}, {memory} bytes, {each:?} CPU a change"
    );
    assert_eq!(program.metric("kuberelay_listeners", &["state=\"serving\""]), services);
    assert!(memory < MEMORY_BYTES, "{memory} bytes");
    assert_eq!(["services", "endpointslices"].map(|kind| server.count(kind, false)), [1, 1], "each in one piece");
}
