//! The first process of a line of upgrades where nobody is told of the next one's number: as a container's first process, as
//! the child of a small init, as a job of a shell. It stays, with nothing of its own, until the last one has ended.

use std::fs;
use std::process::Command;

use rustix::process::{Signal, geteuid};

use crate::relay::{House, descriptors};
use crate::support::backend::Backend;
use crate::support::client::{ask_on, ask_times, connect};
use crate::support::manifest::Manifest;
use crate::support::site::Site;
use crate::support::skip;

/// What a process keeps that has handed over: its runtime, standard streams, and who it waits for. One that serves has twice that.
const KEPT_DESCRIPTORS: usize = 16;
const KEPT_THREADS: usize = 8;

fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").count()
}

/// Orders an upgrade; who serves then.
async fn upgraded(house: &mut House, last: u32) -> u32 {
    let output = house.upgrade(&[]).await;
    assert!(output.status.success(), "{output:?}");
    house.until("another one serves", |house| house.newest() != Some(last)).await;
    house.newest().expect("somebody serves")
}

#[tokio::test]
async fn f25_given_a_process_that_a_shell_has_started_when_upgraded_twice_then_it_stays_for_the_last_one_alone() {
    let site = Site::new(26);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    let first = house.start(|command| _ = command.env_remove("NOTIFY_SOCKET"));
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;
    let mut long = connect(site.service()).await.expect("it serves");
    ask_on(&mut long).await.expect("a backend answers");

    let second = upgraded(&mut house, first).await;
    let third = upgraded(&mut house, second).await;
    house.until("the second one ends", |house| house.has_ended(second)).await;

    house
        .until("the first one has let go", |_| descriptors(first) <= KEPT_DESCRIPTORS && threads(first) <= KEPT_THREADS)
        .await;
    assert_eq!(ask_on(&mut long).await.expect("it goes on"), backend.address);
    drop(long);
    House::signal(first, Signal::TERM);
    house.until("all end", |house| house.has_ended(first) && house.has_ended(third)).await;
    assert_eq!(house.code(first), Some(0));
}

#[tokio::test]
async fn f25_given_a_successor_that_is_killed_when_somebody_waits_for_the_first_one_then_that_one_fails() {
    let site = Site::new(24);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    let first = house.start(|command| _ = command.env_remove("NOTIFY_SOCKET"));
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;
    let second = upgraded(&mut house, first).await;

    House::signal(second, Signal::KILL);

    house.until("the first one ends", |house| house.has_ended(first)).await;
    assert_eq!(house.code(first), Some(1), "whoever supervises it starts another one");
    assert!(house.log().contains("signal: 9"), "{}", house.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_given_the_first_process_of_a_container_when_upgraded_twice_then_the_container_lives_and_ends_with_the_last()
 {
    let unshare = Command::new("unshare").args(["--pid", "--fork", "true"]).status();
    if !geteuid().is_root() || !unshare.is_ok_and(|status| status.success()) {
        return skip("pods", "needs root and unshare");
    }
    let site = Site::new(25);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    let container = house.start_in("unshare", &["--pid", "--fork", "--mount-proc", "--kill-child"], |command| {
        command.env_remove("NOTIFY_SOCKET");
    });
    house.until("it is ready", |house| house.is_ready()).await;
    let first = house.newest().expect("it serves");
    let mut long = connect(site.service()).await.expect("it serves");
    ask_on(&mut long).await.expect("a backend answers");

    let second = upgraded(&mut house, first).await;
    let third = upgraded(&mut house, second).await;
    house.until("the second one ends", |house| house.has_ended(second)).await;

    assert!(!house.has_ended(container) && !house.has_ended(first));
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
    ask_on(&mut long).await.expect("it goes on");
    drop(long);
    House::signal(first, Signal::TERM);
    house.until("the container ends", |house| house.has_ended(container) && house.has_ended(third)).await;
    assert_eq!(house.code(container), Some(0));
}
