//! Processes that are killed in the middle of a hand-over, at each of its steps: somebody serves, and nothing is had twice.
//!
//! The steps are the successor's (`src/handover/fault.rs`): a build for tests stops there, or kills itself.

use std::fs;

use rustix::process::Signal;

use crate::relay::{House, descriptors};
use crate::support::backend::{Backend, Talker};
use crate::support::client::{Caller, ask_on, ask_times, connect};
use crate::support::manifest::Manifest;
use crate::support::seen;
use crate::support::site::Site;

pub(crate) const FAULT: &str = "KUBE_RELAY_FAULT";

/// Starts a successor that has a fault.
fn start_with(house: &mut House, fault: &str) -> u32 {
    house.start(|command| _ = command.arg("--take-over").env(FAULT, fault))
}

pub(crate) fn stands_still(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "))
}

#[tokio::test]
async fn f25_given_a_successor_that_is_killed_at_any_step_when_it_is_gone_then_the_old_one_has_all_as_before() {
    let site = Site::new(30);
    let backend = Backend::named(site.backend(1)).await;
    let _talker = Talker::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().udp().endpoints([backend.address]);
    let (mut house, first) = House::serving(site, &manifest).await;
    let mut long = connect(site.service()).await.expect("it serves");
    assert_eq!(ask_on(&mut long).await.expect("a backend answers"), backend.address);
    let caller = Caller::new(site.service()).await;
    let answer = caller.ask().await;
    let before = descriptors(first);

    for step in ["folder", "stream", "end", "ready", "commit"] {
        let successor = start_with(&mut house, &format!("{step}:KILL"));
        house.until(step, |house| house.has_ended(successor)).await;

        assert_eq!(ask_on(&mut long).await.expect("it goes on"), backend.address, "{step}");
        assert_eq!(caller.ask().await, answer, "{step}");
        assert_eq!(ask_times(2, site.service()).await, [backend.address; 2], "{step}");
        assert_eq!(house.serves(), Some(first), "{step}");
        house.until("no descriptor is left over", |_| descriptors(first) <= before).await;
    }

    let counts = ["ended", "success"];
    let counts = counts.map(|result| house.metric("kuberelay_upgrades_total", &[&format!("result=\"{result}\"")]));
    assert_eq!(counts, [5, 0], "{}", house.log());
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
    assert_eq!(ask_on(&mut long).await.expect("it goes on there"), backend.address);
    assert_eq!(caller.ask().await, answer);
}

#[tokio::test]
async fn f25_given_a_successor_that_stalls_before_its_last_word_when_it_goes_on_then_both_tell_the_same_reason() {
    let site = Site::new(63);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let mut long = connect(site.service()).await.expect("it serves");
    assert_eq!(ask_on(&mut long).await.expect("a backend answers"), backend.address);

    let successor = start_with(&mut house, "commit:STOP");
    house.until_told("nothing was handed over").await;
    assert_eq!(ask_on(&mut long).await.expect("it goes on"), backend.address);
    House::signal(successor, Signal::CONT);
    house.until("it has ended", |house| house.has_ended(successor)).await;

    assert_eq!(house.code(successor), Some(1), "{}", house.log());
    for (text, level) in [("nothing was handed over", "WARN"), ("does not hand over", "ERROR")] {
        let lines = house.told(text);
        let [line] = lines.as_slice() else { panic!("{}", house.log()) };
        assert!(line.contains(r#""reason":"timeout""#) && line.contains(level), "{line}");
        assert!(line.contains("has not answered in time"), "{line}");
    }
    assert_eq!(house.metric("kuberelay_upgrades_total", &[r#"result="timeout""#]), 1);
    assert_eq!(house.metric("kuberelay_upgrades_total", &[]), 1);
    let summary = seen::page(house.admin(), "/status?summary").expect("it answers");
    assert!(summary.contains(r#""result":"timeout""#), "{summary}");
    assert_eq!(house.serves(), Some(first));
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
}

#[tokio::test]
async fn f25_given_a_successor_that_is_killed_once_it_has_taken_over_when_ordered_then_whoever_ordered_it_is_told() {
    let site = Site::new(31);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    let first = house.start(|command| _ = command.env(FAULT, "taken:KILL"));
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;

    let output = house.upgrade(&[]).await;

    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("has taken over and has ended then: nobody serves"), "{told}");
    house.until("the first one has nothing to wait for", |house| house.has_ended(first)).await;
    let third = house.start(|command| _ = command.arg("--take-over"));
    house.until("the third one serves", |house| house.serves() == Some(third) && house.is_ready()).await;
    assert_eq!(ask_times(1, site.service()).await, [backend.address]);
}

#[tokio::test]
async fn f25_given_a_process_that_is_killed_when_it_has_told_all_then_its_successor_goes_on_with_everything() {
    let site = Site::new(32);
    let backend = Backend::named(site.backend(1)).await;
    let _talker = Talker::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().udp().endpoints([backend.address]);
    let (mut house, first) = House::serving(site, &manifest).await;
    let mut long = connect(site.service()).await.expect("it serves");
    assert_eq!(ask_on(&mut long).await.expect("a backend answers"), backend.address);
    let caller = Caller::new(site.service()).await;
    let answer = caller.ask().await;

    let successor = start_with(&mut house, "end:STOP");
    house.until("it has all", |_| stands_still(successor)).await;
    House::signal(first, Signal::KILL);
    house.until("the first one has ended", |house| house.has_ended(first)).await;
    House::signal(successor, Signal::CONT);
    house.until("the second one serves", |house| house.serves() == Some(successor)).await;

    assert_eq!(ask_on(&mut long).await.expect("it goes on"), backend.address);
    assert_eq!(caller.ask().await, answer, "the same flow");
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
    house.until_told("this one goes on with all it has told").await;
    let third = house.start(|command| _ = command.arg("--take-over"));
    house.until("the third one serves", |house| house.serves() == Some(third) && house.is_ready()).await;
    assert_eq!(ask_on(&mut long).await.expect("it goes on there"), backend.address);
}

#[tokio::test]
async fn f25_given_a_process_that_is_killed_at_another_step_when_its_successor_sees_that_then_it_serves() {
    let site = Site::new(33);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, mut last) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;

    for step in ["folder", "stream", "commit"] {
        let mut long = connect(site.service()).await.expect("it serves");
        assert_eq!(ask_on(&mut long).await.expect("a backend answers"), backend.address);
        let successor = start_with(&mut house, &format!("{step}:STOP"));
        house.until(step, |_| stands_still(successor)).await;
        House::signal(last, Signal::KILL);
        house.until("the last one has ended", |house| house.has_ended(last)).await;
        House::signal(successor, Signal::CONT);
        house.until("the next one serves", |house| house.serves() == Some(successor) && house.is_ready()).await;

        assert_eq!(ask_times(2, site.service()).await, [backend.address; 2], "{step}");
        match ask_on(&mut long).await {
            // It may have told all by then, and none of it has been heard yet.
            Ok(answer) => assert!(answer == backend.address && step != "commit", "{step}"),
            Err(error) => println!("{step}: {error}"),
        }
        last = successor;
    }
}
