//! The relay ends under load: killed, and started anew as its supervisor would; or asked to, and in the order that it owes.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use rustix::process::Signal;

use crate::bursts::{Burst, backends, exchange, message};
use crate::many::Many;
use crate::rig::full;
use crate::stage::{Relay, Stage, until};

const A_SECOND: u32 = 1_000;
/// Streams that are open when it ends.
const STREAMS: usize = 200;

/// How long a supervisor takes to start it anew.
const SUPERVISOR: Duration = Duration::from_millis(200);

/// For how long clients come.
fn seconds() -> u32 {
    if full() { 2 } else { 1 }
}

/// Killed: how soon all is served again.
pub(crate) fn killed_and_started_anew() {
    restart(10, Duration::from_millis(500), true);
    if full() {
        restart(10_000, Duration::from_secs(3), !cfg!(debug_assertions));
    }
}

/// `judged`: a debug build may take longer for many Services.
fn restart(services: u16, limit: Duration, judged: bool) {
    let stage = Stage::build();
    let _backends = backends(&stage);
    let many = Many::on(&stage, services);
    let manifest = many.manifest(&stage.backends(Family::V4));
    let relay = stage.relay_of(&manifest, &[]);
    let mut streams = open(&stage, |number| Many::service(number as u16 % services));

    let (back, burst) = thread::scope(|scope| {
        let burst = || Burst::run(stage.client(), Many::service(0), seconds() * A_SECOND, A_SECOND);
        let burst = scope.spawn(burst);
        until("it to be under load", || (connections(&relay) > STREAMS as u64 + 200).then_some(()));
        relay.signal(Signal::KILL);
        assert!(!relay.end().success());
        thread::sleep(SUPERVISOR); // What happens next is part of the story, not a wait.
        let begin = Instant::now();
        let relay = stage.relay_of(&manifest, &[]);
        let last = until("the last Service", || stage.client().run(|| exchange(Many::service(services - 1))).ok());
        drop(last);
        ((relay, begin.elapsed()), burst.join().expect("clients do not panic"))
    });
    let (relay, took) = back;

    println!("killed with {services} Services: served again {took:?} after the start; meanwhile: {burst}");
    assert!(!judged || took < limit, "{took:?}");
    assert!(!burst.failures.is_empty(), "nobody came while it was away: that proves nothing");
    let lost = streams.iter_mut().map(message).filter(Result::is_err).count();
    assert_eq!(lost, STREAMS, "a stream cannot outlive its process");
    assert_eq!(relay.metric("kuberelay_listeners", &[r#"state="failed""#]), 0, "{}", stage.said(stage.node()));
    let after = Burst::run(stage.client(), Many::service(0), A_SECOND, A_SECOND);
    assert_eq!(after.failures, Vec::<String>::new());
}

/// Streams that have been served, each at a Service by its number.
fn open(stage: &Stage, service: impl Fn(usize) -> std::net::SocketAddr) -> Vec<std::net::TcpStream> {
    let open = |number| {
        let service = service(number);
        stage.client().run(|| exchange(service)).expect("a backend answers")
    };
    (0..STREAMS).map(open).collect()
}

fn connections(relay: &Relay<'_>) -> u64 {
    relay.metric("kuberelay_connections_total", &[])
}

/// From its being asked to end to its accepting no more, and from there to its cutting what is left.
fn delay_and_drain() -> [Duration; 2] {
    if full() { [4, 2] } else { [3, 1] }.map(Duration::from_secs)
}

/// Streams that do not end by themselves.
const TO_CUT: usize = 3;

/// Asked to end: unready at once, closed later, and only what stays open for long is cut.
pub(crate) fn drained() {
    let stage = Stage::build();
    let _backends = backends(&stage);
    let service = stage.service(Family::V4);
    let [delay, drain] = delay_and_drain();
    let flags = [("--shutdown-delay", delay), ("--drain-timeout", drain)];
    let flags = flags.map(|(flag, time)| format!("{flag}={}s", time.as_secs()));
    let relay = stage.relay(&stage.backends(Family::V4), &flags);
    let mut streams = open(&stage, |_| service);

    let (asked, unready, burst) = thread::scope(|scope| {
        let burst = scope.spawn(|| Burst::run(stage.client(), service, seconds() * A_SECOND, A_SECOND));
        until("it to be under load", || (connections(&relay) > STREAMS as u64 + 200).then_some(()));
        relay.signal(Signal::TERM);
        let asked = Instant::now();
        until_unready(&relay);
        (asked, asked.elapsed(), burst.join().expect("clients do not panic"))
    });
    assert!(asked.elapsed() < delay, "the burst took too long to prove anything: {burst}");
    assert_eq!(burst.failures, Vec::<String>::new());
    until("no more to be accepted", || refuses(&stage).then_some(()));
    let closed = asked.elapsed();
    for stream in &mut streams {
        message(stream).expect("what is open goes on");
    }
    streams.truncate(TO_CUT);
    let end = relay.end();
    let ended = asked.elapsed();

    println!(
        "SIGTERM with {STREAMS} streams: unready after {unready:?}, closed after {closed:?}, ended after {ended:?} with \
         {TO_CUT} cut; {burst}"
    );
    assert!(end.success(), "{end:?}");
    assert!(unready < Duration::from_millis(500), "{unready:?}");
    assert!((delay..delay + Duration::from_secs(1)).contains(&closed), "{closed:?}");
    assert!((delay + drain..delay + drain + Duration::from_secs(2)).contains(&ended), "{ended:?}");
    let said = stage.said(stage.node());
    assert!(said.contains(&format!("\"cut\":{TO_CUT}")), "{said}");
    assert!(streams.iter_mut().all(|stream| message(stream).is_err()), "these are reset");
}

fn until_unready(relay: &Relay<'_>) {
    until("it to be unready", || relay.page("/readyz").err().filter(|error| error.to_string().contains(" 503 ")));
}

fn refuses(stage: &Stage) -> bool {
    let service = stage.service(Family::V4);
    stage.client().run(|| exchange(service)).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Asked twice: now.
pub(crate) fn asked_twice() {
    /// A second signal that comes sooner is taken for an echo of the first.
    const NO_ECHO: Duration = Duration::from_millis(200);
    /// Others run beside it; what it is not to wait for would take ten minutes.
    const NOW: Duration = Duration::from_secs(5);
    let stage = Stage::build();
    let _backends = backends(&stage);
    let service = stage.service(Family::V4);
    let flags = ["--shutdown-delay", "10m"].map(str::to_owned);
    let relay = stage.relay(&stage.backends(Family::V4), &flags);
    let _open = stage.client().run(|| exchange(service)).expect("a backend answers");

    relay.signal(Signal::TERM);
    until_unready(&relay); // From here on it knows.
    thread::sleep(NO_ECHO); // What happens next is part of the story, not a wait.
    stage.client().run(|| exchange(service)).expect("it serves on");
    relay.signal(Signal::TERM);
    let asked = Instant::now();
    let end = relay.end();

    println!("ended {:?} after the second SIGTERM", asked.elapsed());
    assert!(end.success(), "{end:?}");
    assert!(asked.elapsed() < NOW, "{:?}", asked.elapsed());
}
