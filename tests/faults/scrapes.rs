//! Somebody who asks for metrics all the time, on a node with a hundred thousand backends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::bursts::{Burst, exchange};
use crate::many::Many;
use crate::rig::full;
use crate::stage::{PODS, PORT, Relay, Stage};
use crate::workload::{Backend, Bulk};

const SERVICES: u16 = 10_000;
const SHORT_SERVICES: u16 = 1_000;
const ENDPOINTS: u32 = 10;
/// Services that have carried traffic: each backend of these has its series.
const USED: u16 = 100;

const SCRAPES_A_SECOND: u32 = 5;
const A_SECOND: u32 = 500;
/// How long a page may take, in a release build.
const LIMIT: Duration = Duration::from_millis(500);

pub(crate) fn nobody_waits_for_it() {
    let services = if full() { SERVICES } else { SHORT_SERVICES };
    let seconds = if full() { 10 } else { 2 };
    let stage = Stage::build();
    stage.give_pods_addresses();
    let any = SocketAddr::from(([0, 0, 0, 0], PORT));
    let start = |pod| Backend::start(stage.pod(pod), &[any], &Arc::new(Bulk::default())).expect("a backend starts");
    let _backends: Vec<_> = (0..PODS).map(start).collect();
    let backends: Vec<_> = (0..ENDPOINTS).map(|number| Stage::next_backend(number).1).collect();
    let relay = stage.relay_of(&Many::on(&stage, services).manifest(&backends), &[]);
    for number in 0..USED {
        drop(stage.client().run(|| exchange(Many::service(number))).expect("a backend answers"));
    }
    let burst = || Burst::run(stage.client(), Many::service(0), seconds * A_SECOND, A_SECOND);

    let quiet = burst();
    let over = AtomicBool::new(false);
    let (scraped, scrapes) = thread::scope(|scope| {
        let scrapes = scope.spawn(|| scrape(&relay, &over));
        let scraped = burst();
        over.store(true, Ordering::Relaxed);
        (scraped, scrapes.join().expect("it does not panic"))
    });

    let slowest = scrapes.iter().map(|(took, _)| *took).max().unwrap_or_default();
    let series = scrapes.last().map_or(0, |(_, series)| *series);
    println!(
        "{} backends, {series} series: {} scrapes, the slowest took {slowest:?}; without them {quiet}; with them {scraped}",
        u32::from(services) * ENDPOINTS,
        scrapes.len(),
    );
    assert_eq!((quiet.failures.len(), &scraped.failures), (0, &Vec::new()));
    assert!(series >= usize::from(USED) * ENDPOINTS as usize, "{series} series");
    if cfg!(debug_assertions) {
        println!("times are judged in release builds alone");
        return;
    }
    assert!(slowest < LIMIT, "{slowest:?}");
    // Half as much again, and what a processor takes to change between two programs.
    let (before, after) = (quiet.percentile(99), scraped.percentile(99));
    assert!(after < before * 3 / 2 + Duration::from_millis(1), "p99 was {before:?} and is {after:?}");
}

/// How long each page took, and how many series it had.
fn scrape(relay: &Relay<'_>, over: &AtomicBool) -> Vec<(Duration, usize)> {
    let (mut scrapes, begin) = (Vec::new(), Instant::now());
    while !over.load(Ordering::Relaxed) {
        let due = begin + Duration::from_secs(1) * scrapes.len() as u32 / SCRAPES_A_SECOND;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let start = Instant::now();
        let page = relay.page("/metrics").expect("it answers");
        let took = start.elapsed();
        scrapes.push((took, page.lines().filter(|line| !line.starts_with('#')).count()));
    }
    scrapes
}
