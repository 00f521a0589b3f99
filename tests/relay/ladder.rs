//! Backends that cannot be reached: no client fails where another backend is left, none waits for long, and who fails
//! again and again is left out for a time.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kube_relay::stats::ConnectFailure;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::support::backend::{Backend, BlackHole, refusing};
use crate::support::manifest::Manifest;
use crate::support::relay::{Relay, service_of};
use crate::support::site::Site;
use crate::support::{client, full, within};

/// Failures in a row after which a backend is out.
const FAILURES: u64 = 5;

/// Clients, one after the other: in less than the ten seconds after which a backend that is out is tried again.
const CLIENTS: usize = 400;

/// Who is refused waits for no step of the ladder, of which the first has 250 ms. What a retry costs in fact is measured by
/// `tests/faults`, where nothing else runs.
const NO_STEP: Duration = Duration::from_millis(100);

fn four(site: Site) -> [SocketAddr; 4] {
    [1, 2, 3, 4].map(|number| site.backend(number))
}

/// Those behind the first one.
async fn run_others(site: Site) -> [Backend; 3] {
    let [_, two, three, four] = four(site);
    [Backend::named(two).await, Backend::named(three).await, Backend::named(four).await]
}

fn retries(relay: &Relay) -> u64 {
    let status = relay.status();
    let ports = &service_of(&status, "web").expect("the Service").ports;
    ports.iter().filter_map(|port| port.state.as_ref()).map(|state| state.stats.retries.get()).sum()
}

/// How long each of so many clients waited, one after the other, and how many tries it took beyond the first.
async fn ask_on_and_on(relay: &Relay, site: Site, count: usize) -> Vec<(Duration, u64)> {
    let mut asked = Vec::new();
    for _ in 0..count {
        let (before, start) = (retries(relay), Instant::now());
        client::ask(site.service()).await.expect("no client fails");
        asked.push((start.elapsed(), retries(relay) - before));
    }
    asked
}

fn split(asked: &[(Duration, u64)]) -> (Vec<Duration>, Vec<Duration>) {
    let times = |met: bool| {
        let mut times: Vec<_> = asked.iter().filter(|(_, tries)| (*tries > 0) == met).map(|(took, _)| *took).collect();
        times.sort_unstable();
        times
    };
    (times(true), times(false))
}

fn p99(sorted: &[Duration]) -> Duration {
    sorted[sorted.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f07_t161_given_one_of_four_that_refuses_when_clients_come_then_none_fails_and_it_is_asked_five_times() {
    let site = Site::new(37);
    let _running = run_others(site).await;
    let refusal = refusing(site.backend(1));
    let relay = Relay::start(site, Manifest::new(site).tcp().endpoints(four(site))).await;
    let dead = relay.backend("web", site.backend(1));

    let asked = ask_on_and_on(&relay, site, CLIENTS).await;

    let (met, others) = split(&asked);
    let (with, without) = (met[met.len() / 2], others[others.len() / 2]);
    println!("{} clients, 0 failed; {with:?} with a refusal, {without:?} without (medians)", asked.len());
    assert!(with < without + NO_STEP, "a retry adds {:?}", with - without);
    assert_eq!(dead.stats.connect_failures.get(ConnectFailure::Refused), FAILURES);
    assert_eq!((retries(&relay), dead.stats.ejections.get()), (FAILURES, 1));
    assert!(dead.is_ejected());

    if full() {
        drop(refusal);
        let _alive = Backend::named(site.backend(1)).await;
        let returned = async {
            while dead.is_ejected() {
                client::ask(site.service()).await.expect("no client fails");
            }
        };
        within("the backend to be tried again", returned).await;
        assert_eq!(dead.stats.connect_failures.get(ConnectFailure::Refused), FAILURES, "it is back at the first try");
    }
}

/// How close to the 250 ms of the first step is for the rig to say, where nothing else runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f08_t162_given_one_black_hole_of_four_when_clients_come_then_each_waits_for_one_step_until_it_is_ejected() {
    let site = Site::new(38);
    let _running = run_others(site).await;
    let _hole = BlackHole::open(site.backend(1));
    let relay = Relay::start(site, Manifest::new(site).tcp().endpoints(four(site))).await;
    let hole = relay.backend("web", site.backend(1));

    let asked = ask_on_and_on(&relay, site, CLIENTS).await;

    let (met, others) = split(&asked);
    println!(
        "{} clients, 0 failed; the slowest waited {:?}; p99 of the others {:?}",
        asked.len(),
        met.last(),
        p99(&others)
    );
    assert_eq!(met.len() as u64, FAILURES);
    assert!(met.iter().all(|waited| (250..700).contains(&waited.as_millis())), "{met:?}");
    assert_eq!(hole.stats.connect_failures.get(ConnectFailure::Timeout), FAILURES);
    assert!(hole.is_ejected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t163_given_only_backends_that_refuse_when_a_client_connects_then_it_is_reset_and_never_ended_cleanly() {
    let site = Site::new(39);
    let _refusing = [refusing(site.backend(1)), refusing(site.backend(2))];
    let relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1), site.backend(2)])).await;

    for _ in 0..20 {
        let end = async { client::connect(site.service()).await?.read_to_end(&mut Vec::new()).await };
        let end = within("the end", end).await;
        assert_eq!(end.expect_err("not a clean end").kind(), io::ErrorKind::ConnectionReset);
    }

    let out = [1, 2].map(|number| relay.backend("web", site.backend(number)).is_ejected());
    assert_eq!(out.into_iter().filter(|out| *out).count(), 1, "half of them");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f33_t140_given_a_sticky_client_when_its_backend_refuses_then_another_answers_at_once_and_keeps_it() {
    let site = Site::new(33);
    let mut running = vec![Backend::named(site.backend(1)).await];
    running.extend(run_others(site).await);
    let _relay = Relay::start(site, Manifest::new(site).tcp().sticky(600).endpoints(four(site))).await;
    let first = client::ask(site.service()).await.expect("a backend answers");
    let other = client_from(site.client(1), site.service()).await;

    running.retain(|backend| backend.address != first);
    within("the backend to be gone", async { while !client::refused(first).await {} }).await;
    let mut answers = client::ask_times(10, site.service()).await;

    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_ne!(answers[0], first);
    assert_eq!(client_from(site.client(1), site.service()).await, other, "nobody else moves");
}

/// The backend that answers a client at an address of its own.
async fn client_from(source: std::net::IpAddr, service: SocketAddr) -> SocketAddr {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind((source, 0).into()).expect("a loopback address");
    let mut stream = within("a connection", socket.connect(service)).await.expect("the Service answers");
    client::ask_on(&mut stream).await.expect("a backend answers")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_settings_by_annotation_when_they_come_and_go_then_they_are_used_at_once() {
    let site = Site::new(40);
    let _running = run_others(site).await;
    let _refusal = refusing(site.backend(1));
    let never = Manifest::new(site).tcp().annotation("eject-after", "none").endpoints(four(site));
    let twice = Manifest::new(site).tcp().annotation("eject-after", "2").endpoints(four(site));
    let relay = Relay::start(site, &never).await;
    let dead = relay.backend("web", site.backend(1));

    client::ask_times(40, site.service()).await;
    assert!(dead.stats.connect_failures.get(ConnectFailure::Refused) >= 10 && !dead.is_ejected());
    let revision = relay.status().revision;
    relay.edit(&twice);
    relay.until("the change", |status| status.revision > revision).await;
    client::ask_times(40, site.service()).await;
    assert!(dead.is_ejected());
    let revision = relay.status().revision;
    relay.edit(&never);
    relay.until("the change", |status| status.revision > revision).await;

    assert!(!dead.is_ejected(), "it is in again");
}

/// A connection that has been served by a backend.
async fn open(site: Site) -> (TcpStream, SocketAddr) {
    let mut stream = client::connect(site.service()).await.expect("the Service answers");
    let backend = client::ask_on(&mut stream).await.expect("a backend answers");
    (stream, backend)
}

/// Waits for the end of a connection, which is to be a reset.
async fn reset_of(stream: &mut TcpStream) {
    let end = within("the end", stream.read_to_end(&mut Vec::new())).await;
    assert_eq!(end.expect_err("not a clean end").kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t171_given_reset_after_when_an_endpoint_leaves_then_its_connections_end_in_time_and_without_it_they_go_on() {
    let site = Site::new(171);
    let [one, two] = [site.backend(1), site.backend(2)];
    let _running = [Backend::named(one).await, Backend::named(two).await];
    let plain = Manifest::new(site).tcp();
    let relay = Relay::start(site, plain.clone().endpoints([one])).await;
    let fail_over = async |reset_after: Option<&'static str>, to: SocketAddr| {
        let begin = Instant::now();
        let manifest = reset_after.map_or(plain.clone(), |time| plain.clone().annotation("reset-after", time));
        relay.edit(manifest.endpoints([to]));
        relay.until_backends("web", &[to]).await;
        [begin, Instant::now()]
    };

    let (mut kept, _) = open(site).await;
    fail_over(None, two).await;
    let (mut at_once, _) = open(site).await;
    let [_, left] = fail_over(Some("0s"), one).await;
    reset_of(&mut at_once).await;
    println!("reset {:?} after the endpoint had left", left.elapsed());
    assert!(left.elapsed() < Duration::from_millis(500), "{:?}", left.elapsed());
    let (mut later, _) = open(site).await;
    let [leaves, _] = fail_over(Some("1s"), two).await;
    assert_eq!(client::ask_on(&mut later).await.expect("its time is not up"), one);
    reset_of(&mut later).await;

    // The clock begins with the swap, somewhere between the edit and its being seen.
    assert!(leaves.elapsed() >= Duration::from_secs(1), "{:?}", leaves.elapsed());
    assert_eq!(client::ask_on(&mut kept).await.expect("it was left when nothing was said"), one);
    assert_eq!(open(site).await.1, two);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t172_given_a_greatest_age_when_a_connection_is_as_old_then_it_ends_and_its_client_is_spread_anew() {
    let site = Site::new(172);
    let [one, two] = [site.backend(1), site.backend(2)];
    let _running = [Backend::named(one).await, Backend::named(two).await];
    let manifest = Manifest::new(site).tcp().annotation("max-connection-age", "1s");
    let relay = Relay::start(site, manifest.clone().endpoints([one])).await;

    let begin = Instant::now();
    let ((mut quiet, _), (mut busy, _)) = (open(site).await, open(site).await);
    relay.edit(manifest.endpoints([one, two]));
    relay.until_backends("web", &[one, two]).await;
    let talk = async { while client::ask_on(&mut busy).await.is_ok() {} };
    let ends = tokio::join!(
        async {
            reset_of(&mut quiet).await;
            begin.elapsed()
        },
        async {
            within("the end of the busy one", talk).await;
            begin.elapsed()
        }
    );

    println!("of 1 s: ended after {:?} (quiet) and {:?} (busy)", ends.0, ends.1);
    assert!(ends.0.min(ends.1) >= Duration::from_millis(900), "{ends:?}");
    assert!(ends.0.max(ends.1) < Duration::from_secs(5), "{ends:?}");
    assert_ne!(open(site).await.1, open(site).await.1, "both backends get clients");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t173_given_an_idle_limit_when_connections_are_silent_or_not_then_only_the_silent_one_ends() {
    let site = Site::new(173);
    let _backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let relay = Relay::start(site, &manifest).await;
    let (mut unlimited, _) = open(site).await;
    let revision = relay.status().revision;
    relay.edit(manifest.annotation("idle-timeout", "1s"));
    relay.until("the change", |status| status.revision > revision).await;

    let begin = Instant::now();
    let ((mut silent, _), (mut busy, _)) = (open(site).await, open(site).await);
    let end = reset_of(&mut silent);
    let talk = async {
        loop {
            client::ask_on(&mut busy).await.expect("it is not silent");
        }
    };
    tokio::select! {
        () = end => {}
        () = talk => {}
    }

    assert!(begin.elapsed() >= Duration::from_secs(1), "{:?}", begin.elapsed());
    client::ask_on(&mut busy).await.expect("it goes on");
    client::ask_on(&mut unlimited).await.expect("it began without a limit");
}
