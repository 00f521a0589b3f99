//! A long time of ordinary work: endpoints come and go, clients connect, ask, and break off, and nothing of them stays.
//!
//! `KUBE_RELAY_SOAK` says for how many minutes; without it a few seconds show that all is given back. A machine that is
//! busy with other things makes it slower and proves as much: no time is judged here.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use socket2::SockRef;

use crate::bursts::{Burst, exchange};
use crate::rig::full;
use crate::rollout::{Rollout, question};
use crate::seen;
use crate::stage::{PATIENCE, Relay, Stage, until};

const SHORT_SECONDS: u64 = 3;
const FULL_SECONDS: u64 = 20;

/// Endpoints that are replaced in a second, and what their pods have to finish: long for a busy machine.
const STEPS_A_SECOND: u32 = 1;
const GRACE: Duration = Duration::from_secs(2);

/// What clients do all the time, and how often in a second.
const WORK: [(&str, u32, Deed); 3] =
    [("connections", 100, connection), ("resets", 20, reset), ("questions", 50, question)];
type Deed = fn(SocketAddr) -> io::Result<()>;
/// Of a thousand questions so many may have no answer: nobody sends a datagram again that a full queue has lost.
const LOST_OF_A_THOUSAND: usize = 1;

/// Growth that is no leak: of a run of any length, and as a slope.
const BYTES_MORE: u64 = 1 << 20;
const BYTES_AN_HOUR: f64 = 1e6;
/// Shorter runs say nothing about an hour.
const LONG_ENOUGH: Duration = Duration::from_secs(600);
/// How often memory is looked at, all in all.
const SAMPLES: u32 = 300;
/// What caches and pools take at first is no growth: a third of the time is for that.
const WARM_UP: usize = 3;

pub(crate) fn nothing_stays() {
    let time = time();
    let stage = Stage::build();
    let mut rollout = Rollout::begin(&stage, GRACE);
    // Nobody waits for these; and where a question comes from the port of one before, it is a stream.
    let flags = ["unreplied", "answered", "stream"].map(|state| format!("--udp-timeout-{state}=1s"));
    let relay = stage.relay(&rollout.addresses(), &flags);
    // What is made once is made now.
    thread::scope(|scope| drop(WORK.map(|work| scope.spawn(Done::by(&stage, work, Duration::ZERO)))));
    look_at_it(&relay);
    until_idle(&relay);
    let descriptors = seen::descriptors(relay.pid());
    let over = AtomicBool::new(false);

    let (done, looks, sizes) = thread::scope(|scope| {
        let sizes = scope.spawn(|| sizes(&relay, time, &over));
        let looks = scope.spawn(|| looks(&relay, &over));
        let clients = WORK.map(|work| scope.spawn(Done::by(&stage, work, time)));
        rollout.go_on_while(STEPS_A_SECOND, || clients.iter().any(|client| !client.is_finished()));
        over.store(true, Ordering::Relaxed);
        let done = clients.map(|client| client.join().expect("clients do not panic"));
        let joined = "it does not panic";
        (done, looks.join().expect(joined), sizes.join().expect(joined))
    });
    until_idle(&relay);
    until("descriptors to be back", || (seen::descriptors(relay.pid()) <= descriptors).then_some(()));

    let growth = Growth::of(&sizes);
    println!(
        "{time:?}: {}, {}, {}; {} endpoints replaced, {looks} pages read; {descriptors} descriptors before, {} after; {growth}",
        done[0],
        done[1],
        done[2],
        rollout.steps,
        seen::descriptors(relay.pid()),
    );
    let [connections, resets, questions] = &done;
    assert_eq!((&connections.failures, &resets.failures), (&Vec::new(), &Vec::new()));
    assert!(questions.failures.len() * 1_000 <= questions.count * LOST_OF_A_THOUSAND, "{:?}", questions.failures);
    assert_eq!(relay.metric("kuberelay_panics_total", &[]), 0);
    assert!(growth.most <= growth.warm + BYTES_MORE, "{growth}: {sizes:?}");
    if time >= LONG_ENOUGH {
        assert!(growth.bytes_an_hour < BYTES_AN_HOUR, "{growth}: {sizes:?}");
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

fn connection(service: SocketAddr) -> io::Result<()> {
    exchange(service).map(drop)
}

/// Breaks off what has begun well.
fn reset(service: SocketAddr) -> io::Result<()> {
    let stream = exchange(service)?;
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))
}

/// What clients of one kind have done.
struct Done {
    what: &'static str,
    count: usize,
    /// What became of those that failed.
    failures: Vec<String>,
}

impl Done {
    /// What to start one of them by.
    fn by<'s>(stage: &'s Stage, work: (&'static str, u32, Deed), time: Duration) -> impl FnOnce() -> Self + Send + 's {
        move || Self::of(stage, work, time)
    }

    /// Second after second, at least one.
    fn of(stage: &Stage, (what, a_second, deed): (&'static str, u32, Deed), time: Duration) -> Self {
        let (begin, mut done) = (Instant::now(), Self { what, count: 0, failures: Vec::new() });
        let service = stage.service(Family::V4);
        loop {
            let burst = Burst::of(stage.client(), a_second, a_second, move || deed(service));
            done.failures.extend(burst.failures);
            done.count += a_second as usize;
            if begin.elapsed() >= time {
                return done;
            }
        }
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({} failed)", self.count, self.what, self.failures.len())
    }
}

/// Somebody who watches it all the time. How many pages were read.
fn looks(relay: &Relay<'_>, over: &AtomicBool) -> u64 {
    let mut pages = 0;
    while !over.load(Ordering::Relaxed) {
        pages += look_at_it(relay);
        thread::sleep(Duration::from_secs(1)); // That time passes is the point.
    }
    pages
}

fn look_at_it(relay: &Relay<'_>) -> u64 {
    ["/metrics", "/status"].map(|path| relay.page(path).unwrap_or_else(|error| panic!("{path}: {error}"))).len() as u64
}

fn until_idle(relay: &Relay<'_>) {
    let begin = Instant::now();
    loop {
        let open = ["kuberelay_active_connections", "kuberelay_active_flows"].map(|gauge| relay.metric(gauge, &[]));
        if open == [0, 0] {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{open:?} connections and flows are open still");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Memory of the process that it shares with nobody, at even times.
fn sizes(relay: &Relay<'_>, time: Duration, over: &AtomicBool) -> Vec<(Duration, u64)> {
    let (begin, mut sizes) = (Instant::now(), Vec::new());
    while !over.load(Ordering::Relaxed) || sizes.len() < 2 {
        sizes.push((begin.elapsed(), seen::private_bytes(relay.pid())));
        thread::sleep(time / SAMPLES);
    }
    sizes
}

/// How memory has grown once all was warm.
#[derive(Debug)]
struct Growth {
    warm: u64,
    most: u64,
    end: u64,
    /// The slope of the line through all points that has the least squares.
    bytes_an_hour: f64,
}

impl Growth {
    fn of(sizes: &[(Duration, u64)]) -> Self {
        let warm = &sizes[sizes.len() / WARM_UP..];
        let bytes = || warm.iter().map(|(_, bytes)| *bytes);
        Self {
            warm: bytes().next().unwrap_or(0),
            most: bytes().max().unwrap_or(0),
            end: bytes().next_back().unwrap_or(0),
            bytes_an_hour: slope_an_hour(warm),
        }
    }
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [warm, most, end] = [self.warm, self.most, self.end].map(|bytes| bytes / 1_024);
        let slope = self.bytes_an_hour / 1_024.0;
        write!(f, "{warm} KiB of memory when warm, {most} at most, {end} in the end: {slope:.0} KiB more an hour")
    }
}

fn slope_an_hour(sizes: &[(Duration, u64)]) -> f64 {
    let points: Vec<_> = sizes.iter().map(|(at, bytes)| (at.as_secs_f64() / 3_600.0, *bytes as f64)).collect();
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / points.len() as f64;
    let (time, size) = (mean(|point| point.0), mean(|point| point.1));
    let together: f64 = points.iter().map(|(at, bytes)| (at - time) * (bytes - size)).sum();
    let alone: f64 = points.iter().map(|(at, _)| (at - time).powi(2)).sum();
    if alone > 0.0 { together / alone } else { 0.0 }
}
