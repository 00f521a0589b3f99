//! Sockets that outlive their process, as a supervisor keeps them: who comes meanwhile waits, and nobody waits where
//! nobody will serve.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::is_measured;
use crate::load::Load;
use crate::relay::House;
use crate::supervisor::Supervisor;
use crate::support::backend::{Backend, Talker};
use crate::support::client::{Caller, ask_on, ask_times, connect, refused};
use crate::support::manifest::Manifest;
use crate::support::site::{SERVICE_PORT, Site};

/// How soon listeners are back after a crash, with a few Services (F21).
const BACK: Duration = Duration::from_millis(500);

/// What a Service's sockets are called.
fn names(ip: IpAddr, protocols: &[&str]) -> BTreeSet<String> {
    protocols.iter().map(|protocol| format!("{protocol}-{ip}-{SERVICE_PORT}")).collect()
}

/// Starts one and waits until it serves and all of this is kept.
async fn start(supervisor: &Supervisor, house: &mut House, wanted: &BTreeSet<String>) -> u32 {
    let pid = supervisor.start(house);
    house.until("it is ready", |house| house.serves() == Some(pid) && house.is_ready()).await;
    house.until("its sockets are kept", |_| supervisor.names() == *wanted).await;
    pid
}

async fn end(house: &mut House, pid: u32, signal: Signal) {
    House::signal(pid, signal);
    // Its first thread may have ended while others still have its state folder.
    house.until("it has ended", |house| house.has_ended(pid) && threads(pid) <= 1).await;
}

fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// Gives the one that runs other manifests.
fn rewrite(house: &House, pid: u32, manifests: &[&dyn Display]) {
    let manifests: Vec<_> = manifests.iter().map(ToString::to_string).collect();
    fs::write(house.manifest(), manifests.join("\n---\n")).expect("the test's folder can be written");
    House::signal(pid, Signal::HUP);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f21_given_kept_sockets_when_killed_under_load_then_nobody_is_refused_and_who_waits_is_served() {
    let site = Site::new(41);
    let backend = Backend::named(site.backend(1)).await;
    let _talker = Talker::named(site.backend(1)).await;
    let supervisor = Supervisor::new(64);
    let mut house = House::new(site, &Manifest::new(site).tcp().udp().endpoints([backend.address]));
    let kept = names(site.cluster_ip(), &["tcp", "udp"]);
    let first = start(&supervisor, &mut house, &kept).await;
    let load = Load::start(site.service(), 200);
    load.answered(100).await;

    let killed = Instant::now();
    end(&mut house, first, Signal::KILL).await;
    let mut waiting = Vec::new();
    for _ in 0..100 {
        waiting.push(connect(site.service()).await.expect("the kernel lets it in"));
    }
    let caller = Caller::new(site.service()).await;
    caller.send(b"who?").await.expect("the kernel keeps it");
    let down = killed.elapsed();
    supervisor.start(&mut house);

    for client in &mut waiting {
        assert_eq!(ask_on(client).await.expect("it has waited"), backend.address);
    }
    let back = killed.elapsed() - down;
    assert!(caller.receive().await.expect("it has waited").starts_with(b"127."));
    load.answered(100).await;
    let outcome = load.end().await;
    println!("nobody served for {down:?}; {back:?} later all who waited were answered: {outcome:?}");
    assert!(!is_measured() || back < BACK, "{back:?}");
    // Those that were open at that moment are lost, and no other.
    assert!(outcome.failed.iter().all(|why| !why.contains("refused")), "{outcome:?}");
    assert!(outcome.failed.len() <= 20, "{outcome:?}");
    house.until("they are kept as before", |_| supervisor.names() == kept).await;
    let log = house.log();
    assert!(log.contains("sockets that were kept are served again") && !log.contains("cannot listen"), "{log}");
    assert!(log.contains(r#""adopted":2,"differing":0,"unwanted":0"#), "{log}");
}

#[tokio::test]
async fn f21_given_a_service_that_goes_while_nobody_runs_when_the_next_one_starts_then_its_socket_is_closed_for_good() {
    let site = Site::new(42);
    let backend = Backend::named(site.backend(1)).await;
    let stays = Manifest::new(site).tcp().endpoints([backend.address]);
    let goes = Manifest::new(site).named("goes").cluster_ip(site.client(1)).tcp().udp().endpoints([backend.address]);
    let gone = SocketAddr::new(site.client(1), SERVICE_PORT);
    let supervisor = Supervisor::new(64);
    let mut house = House::new(site, &stays);
    fs::write(house.manifest(), format!("{stays}\n---\n{goes}")).expect("the test's folder can be written");
    let of_stays = names(site.cluster_ip(), &["tcp"]);
    let both = &of_stays | &names(site.client(1), &["tcp", "udp"]);
    let first = start(&supervisor, &mut house, &both).await;

    end(&mut house, first, Signal::TERM).await;
    let mut waits = connect(site.service()).await.expect("the kernel lets it in");
    let mut in_vain = connect(gone).await.expect("the kernel lets it in");
    supervisor.put_a_file("stored");
    fs::write(house.manifest(), stays.to_string()).expect("the test's folder can be written");
    start(&supervisor, &mut house, &of_stays).await;

    assert_eq!(ask_on(&mut waits).await.expect("it has waited"), backend.address);
    ask_on(&mut in_vain).await.expect_err("nobody serves it");
    assert!(refused(gone).await);
    let log = house.log();
    assert!(log.contains("nobody wants these listeners any more"), "{log}");
    assert!(log.contains(&format!("{gone}/TCP")) && log.contains(&format!("{gone}/UDP")), "{log}");
    assert!(log.contains("that no listener could have"), "{log}");
}

#[tokio::test]
async fn t234_given_listeners_that_park_and_go_when_they_do_then_only_those_that_let_somebody_in_are_kept() {
    let site = Site::new(43);
    let backend = Backend::named(site.backend(1)).await;
    let _talker = Talker::named(site.backend(1)).await;
    let web = Manifest::new(site).tcp().udp();
    let serving = Manifest::new(site).tcp().udp().endpoints([backend.address]);
    let other = Manifest::new(site).named("other").cluster_ip(site.client(1)).tcp().endpoints([backend.address]);
    let supervisor = Supervisor::new(64);
    let mut house = House::new(site, &serving);
    let of_web = names(site.cluster_ip(), &["tcp", "udp"]);
    let pid = start(&supervisor, &mut house, &of_web).await;
    let of_other = names(site.client(1), &["tcp"]);

    for _ in 0..3 {
        rewrite(&house, pid, &[&web, &other]);
        house.until("it is parked", |_| supervisor.names() == of_other).await;
        assert!(refused(site.service()).await);
        rewrite(&house, pid, &[&serving]);
        house.until("it serves again", |_| supervisor.names() == of_web).await;
        assert_eq!(ask_times(1, site.service()).await, [backend.address]);
        assert_eq!(Caller::new(site.service()).await.ask_until_answered().await.backend, site.backend(1));
        rewrite(&house, pid, &[&other]);
        house.until("it is gone", |_| supervisor.names() == of_other).await;
        assert!(refused(site.service()).await);
        rewrite(&house, pid, &[&serving]);
        house.until("it is there again", |_| supervisor.names() == of_web).await;
        assert_eq!(ask_times(1, site.service()).await, [backend.address]);
    }

    assert!(!house.log().contains("cannot listen"), "{}", house.log());
}

#[tokio::test]
async fn f25_given_kept_sockets_when_upgraded_and_then_killed_then_the_supervisor_has_them_still() {
    let site = Site::new(44);
    let backend = Backend::named(site.backend(1)).await;
    let supervisor = Supervisor::new(64);
    let mut house = House::new(site, &Manifest::new(site).tcp().udp().endpoints([backend.address]));
    let kept = names(site.cluster_ip(), &["tcp", "udp"]);
    let first = start(&supervisor, &mut house, &kept).await;

    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}\n{}", house.log());
    house.until("the first one ends", |house| house.has_ended(first)).await;
    house.until("the second one answers", |house| house.serves().is_some()).await;
    let second = house.serves().expect("somebody serves");
    assert_eq!(supervisor.names(), kept);
    end(&mut house, second, Signal::KILL).await;
    let mut waits = connect(site.service()).await.expect("the kernel lets it in");
    start(&supervisor, &mut house, &kept).await;

    assert_eq!(ask_on(&mut waits).await.expect("it has waited"), backend.address);
}
