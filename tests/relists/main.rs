//! Memory, while all objects are listed again a thousand times: as a server has it whose watches expire, again and again.
//!
//! Alone in its process, so that nothing else is measured; the server is in it, too. With a clock that runs ahead: one kind
//! is listed at most once in 6 s, and so a thousand lists take most of an hour, which is the hour that is meant here.
#![cfg(feature = "kubernetes")]

mod allocated;
#[path = "../kubernetes/many.rs"]
mod many;
#[path = "../kubernetes/stage.rs"]
#[allow(dead_code, reason = "shared with `kubernetes`, which uses more of it")]
mod stage;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube_relay::heap;
use kube_relay::stats::PROCESS;
use many::ENDPOINTS;
use serde_json::json;
use stage::{Stage, api_address, node};
use support::api_server::ApiServer;
use support::site::Site;
use support::{DEADLINE, full, seen};
use tokio::task::spawn_blocking;
use tokio::time;

/// In the long form, and else.
const RELISTS: [u64; 2] = [1_000, 60];
const KINDS: [&str; 3] = ["services", "endpointslices", "nodes"];
/// What one list has to bring: small enough for a debug build, large enough for a lost copy of it to show.
const SERVICES: u64 = 100;
/// The part of all relists after which memory has its size.
const WARM_UP: usize = 4;
const SLOPE_BYTES_PER_HOUR: f64 = 1e6;
/// In the short form, which is over before a slope could be told from noise. A copy lost by each list is many times that.
const SHORT_GROWTH_BYTES: u64 = 1_000_000;

#[tokio::test]
async fn f3_given_all_objects_listed_again_and_again_when_warm_then_memory_does_not_grow() {
    heap::keep_little(); // As the program does it.
    let site = Site::new(3);
    let stage = Stage::following(site, large(site).await).await;
    stage.until("watches", |_| KINDS.iter().all(|kind| stage.server.count(kind, true) > 0)).await;
    let (real, clock, mut samples) = (std::time::Instant::now(), Clock::take(), Vec::new());

    for round in 1.. {
        relist(&stage, &clock, round).await;
        samples.push((clock.seconds(), allocated::bytes()));
        if relists(&stage) >= RELISTS[usize::from(!full())] {
            break;
        }
    }

    let warm = &samples[samples.len() / WARM_UP..];
    let (slope, [first, last]) = (slope(warm) * 3_600.0, least_of_first_and_last_third(warm));
    println!(
        "{} relists of {SERVICES} Services in {:.0} s, which took {:?}: {first} bytes in use, then {last}; {slope:.0} an hour; \
         {} bytes resident",
        relists(&stage),
        clock.seconds(),
        real.elapsed(),
        seen::private_bytes(std::process::id())
    );
    if full() {
        assert!(slope < SLOPE_BYTES_PER_HOUR, "{slope:.0} bytes an hour: {samples:?}");
    } else {
        assert!(last < first + SHORT_GROWTH_BYTES, "{samples:?}");
    }
}

async fn large(site: Site) -> ApiServer {
    let server = ApiServer::start(api_address(site)).await;
    for number in 0..SERVICES {
        server.put("services", many::service(number));
        server.put("endpointslices", many::slice(number, ENDPOINTS));
    }
    server.put("nodes", node(site.node_ip(), &[]));
    server.compact();
    server
}

/// One event of each kind, after which a loss is followed by the shortest pause; then all three are lost and listed.
async fn relist(stage: &Stage, clock: &Clock, round: u64) {
    let mut changed = many::slice(0, ENDPOINTS - u8::from(round % 2 == 1));
    changed["metadata"]["annotations"] =
        json!({"endpoints.kubernetes.io/last-change-trigger-time": Timestamp::now().to_string()});
    stage.server.put("services", many::service(0));
    stage.server.put("nodes", node(stage.site.node_ip(), &[]));
    stage.server.put("endpointslices", changed);
    clock.until("the change", || PROCESS.network_programming.count() >= round).await;

    let before = relists(stage);
    stage.server.forget_requests();
    stage.server.expire();
    let watched = || KINDS.iter().all(|kind| stage.server.count(kind, true) > 0);
    clock.until("lists and watches", || relists(stage) >= before + KINDS.len() as u64 && watched()).await;
    stage.server.compact(); // What happened is not to be kept here, either.
}

fn relists(stage: &Stage) -> u64 {
    stage.status().contact.relists().map(|(_, count)| count).sum()
}

/// The clock of this runtime, stopped: it goes on by steps, after which everybody has had their turn.
struct Clock(time::Instant);

/// Short beside each time that a relay waits for an answer, long beside those that it lets pass between questions.
const STEP: Duration = Duration::from_millis(50);
/// What a step takes at least: for threads, and for sockets.
const STEP_TAKES: Duration = Duration::from_micros(100);

impl Clock {
    fn take() -> Self {
        time::pause();
        Self(time::Instant::now())
    }

    fn seconds(&self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }

    async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let deadline = std::time::Instant::now() + DEADLINE;
        while !condition() {
            assert!(std::time::Instant::now() < deadline, "waited {DEADLINE:?} for {what}");
            // A stopped clock jumps by itself when all are idle, but not while somebody waits for another thread.
            spawn_blocking(|| std::thread::sleep(STEP_TAKES)).await.expect("it does not panic");
            time::advance(STEP).await;
        }
    }
}

/// Of memory: what more there was at times was on its way.
fn least_of_first_and_last_third(samples: &[(f64, u64)]) -> [u64; 2] {
    let third = samples.len().div_ceil(3);
    [&samples[..third], &samples[samples.len() - third..]]
        .map(|third| third.iter().map(|sample| sample.1).min().unwrap_or_default())
}

/// Of the straight line through points, by least squares.
fn slope(points: &[(f64, u64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, u64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1 as f64));
    let (rise, run) = points.iter().fold((0.0, 0.0), |(rise, run), point| {
        let off = point.0 - x;
        (rise + off * (point.1 as f64 - y), run + off * off)
    });
    if run > 0.0 { rise / run } else { 0.0 }
}

#[test]
fn given_points_on_a_line_when_its_slope_is_asked_for_then_it_is_that_of_the_line() {
    assert!((slope(&[(0.0, 10), (1.0, 13), (2.0, 16)]) - 3.0).abs() < 1e-9);
    assert_eq!(slope(&[(5.0, 10)]), 0.0);
}
