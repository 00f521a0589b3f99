//! A large cluster, from the program's start to one change in it.

use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use crate::many::{ENDPOINTS, service, slice};
use crate::stage::api_address;
use crate::support::api_server::ApiServer;
use crate::support::program::{Descriptors, Program};
use crate::support::site::Site;
use crate::support::{full, seen, skip};

const SERVICES: u64 = 10_000;
const SHORT_SERVICES: u64 = 300;
/// One by one: each is a batch by itself.
const CHANGES: u64 = 20;
const PACE: Duration = Duration::from_millis(50);
/// What the program may hold in memory, debug builds too.
const MEMORY_BYTES: u64 = 200_000_000;
/// From the program's start to all Services served, in a release build.
const START: Duration = Duration::from_secs(5);
/// What one change may cost of a processor, with its decoding, in a release build.
const CHANGE: Duration = Duration::from_millis(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t231_f19_given_a_large_cluster_when_the_program_starts_and_one_slice_changes_then_both_cost_what_they_may() {
    let (site, descriptors) = (Site::new(35), Descriptors::take().await);
    let services = descriptors.fitting(if full() { SERVICES } else { SHORT_SERVICES }, 1);
    let server = ApiServer::start(api_address(site)).await;
    for number in 0..services {
        server.put("services", service(number));
        server.put("endpointslices", slice(number, ENDPOINTS));
    }
    server.compact();

    let began = Instant::now();
    let program = Program::following(site, &server.kubeconfig()).await;
    let (took, [memory, peak]) = (began.elapsed(), seen::resident_bytes(program.pid()));
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
        "{services} Services of {ENDPOINTS} endpoints: served after {took:?}, {memory} bytes, {peak} at most, {each:?} CPU a change"
    );
    assert_eq!(program.metric("kuberelay_listeners", &["state=\"serving\""]), services);
    assert!(peak < MEMORY_BYTES, "{peak} bytes");
    assert_eq!(["services", "endpointslices"].map(|kind| server.count(kind, false)), [1, 1], "each in one piece");
    if full() && services < SERVICES {
        skip("descriptors", &format!("room for {services} of {SERVICES} Services"));
    }
    if cfg!(debug_assertions) {
        println!("times are judged in release builds alone");
        return;
    }
    assert!(took < START, "{took:?}");
    assert!(each < CHANGE, "{each:?}");
}
