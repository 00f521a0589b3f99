//! A long time of ordinary work: endpoints come and go, connections and questions come, and nothing of them stays.
//!
//! `KUBE_RELAY_SOAK` says for how many minutes; without it a few seconds show that all is given back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;

use crate::bursts::Burst;
use crate::rig::full;
use crate::rollout::Rollout;
use crate::seen;
use crate::stage::{Relay, Stage, until};

const A_SECOND: u32 = 100;
const SHORT_SECONDS: u64 = 3;
const FULL_SECONDS: u64 = 20;
/// Growth that is no leak.
const BYTES_AN_HOUR: f64 = 1e6;
/// Shorter runs say nothing about an hour.
const LONG_ENOUGH: Duration = Duration::from_secs(600);
/// What caches and pools take at first is no growth: a fifth of the time is for that.
const WARM_UP: usize = 5;

pub(crate) fn nothing_stays() {
    let time = time();
    let stage = Stage::build();
    let mut rollout = Rollout::begin(&stage);
    let relay = stage.relay(&rollout.addresses(), &[]);
    burst(&stage, 1); // What is made once for all is made now.
    until_idle(&relay);
    let descriptors = seen::descriptors(relay.pid());
    let over = AtomicBool::new(false);

    let (bursts, sizes) = thread::scope(|scope| {
        let sizes = scope.spawn(|| sizes(&relay, time, &over));
        let bursts = scope.spawn(|| bursts(&stage, time));
        rollout.go_on_while(1, || !bursts.is_finished());
        over.store(true, Ordering::Relaxed);
        (bursts.join().expect("clients do not panic"), sizes.join().expect("it does not panic"))
    });
    until_idle(&relay);
    until("descriptors to be back", || (seen::descriptors(relay.pid()) <= descriptors).then_some(()));

    let slope = slope_an_hour(&sizes[sizes.len() / WARM_UP..]);
    println!(
        "{time:?}: {} connections, {} failed, {} endpoints replaced; {descriptors} descriptors before, {} after; {} KiB of \
         memory in the end, {:.0} KiB more an hour",
        bursts.0,
        bursts.1.len(),
        rollout.steps,
        seen::descriptors(relay.pid()),
        sizes.last().map_or(0, |(_, bytes)| bytes / 1_024),
        slope / 1_024.0,
    );
    assert_eq!(bursts.1, Vec::<String>::new());
    if time >= LONG_ENOUGH {
        assert!(slope < BYTES_AN_HOUR, "{slope} bytes an hour: {sizes:?}");
    }
    rollout.finish();
}

fn time() -> Duration {
    let minutes = std::env::var("KUBE_RELAY_SOAK").ok();
    match minutes.map(|minutes| minutes.parse::<u64>().expect("KUBE_RELAY_SOAK: a number of minutes")) {
        Some(minutes) => Duration::from_secs(60 * minutes),
        None => Duration::from_secs(if full() { FULL_SECONDS } else { SHORT_SECONDS }),
    }
}

/// How many connections there were in this time, and what became of those that failed.
fn bursts(stage: &Stage, time: Duration) -> (u64, Vec<String>) {
    const SECONDS: u32 = 1;
    let (begin, mut count, mut failures) = (Instant::now(), 0, Vec::new());
    while begin.elapsed() < time {
        failures.extend(burst(stage, SECONDS).failures);
        count += u64::from(SECONDS * A_SECOND);
    }
    (count, failures)
}

fn burst(stage: &Stage, seconds: u32) -> Burst {
    Burst::run(stage.client(), stage.service(Family::V4), seconds * A_SECOND, A_SECOND)
}

/// Memory of the process at even times, a hundred times in all.
fn sizes(relay: &Relay<'_>, time: Duration, over: &AtomicBool) -> Vec<(Duration, u64)> {
    const SAMPLES: u32 = 100;
    let (begin, mut sizes) = (Instant::now(), Vec::new());
    while !over.load(Ordering::Relaxed) || sizes.len() < 2 {
        sizes.push((begin.elapsed(), seen::private_bytes(relay.pid())));
        thread::sleep(time / SAMPLES);
    }
    sizes
}

fn until_idle(relay: &Relay<'_>) {
    until("no connection to be open", || (relay.metric("kuberelay_active_connections", &[]) == 0).then_some(()));
}

/// The slope of the line through all points that has the least squares, in bytes an hour.
fn slope_an_hour(sizes: &[(Duration, u64)]) -> f64 {
    let points: Vec<_> = sizes.iter().map(|(at, bytes)| (at.as_secs_f64() / 3_600.0, *bytes as f64)).collect();
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / points.len() as f64;
    let (time, size) = (mean(|point| point.0), mean(|point| point.1));
    let together: f64 = points.iter().map(|(at, bytes)| (at - time) * (bytes - size)).sum();
    let alone: f64 = points.iter().map(|(at, _)| (at - time).powi(2)).sum();
    if alone > 0.0 { together / alone } else { 0.0 }
}
