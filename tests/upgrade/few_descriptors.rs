//! Hand-overs where descriptors run out on either side: what cannot move comes to its end where it is, and nothing is lost.

use std::collections::BTreeSet;
use std::fs;

#[cfg(debug_assertions)]
use rustix::process::Signal;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::net::TcpStream;

#[cfg(debug_assertions)]
use crate::faults::{FAULT, stands_still};
use crate::relay::{House, descriptors, lasting_descriptors};
use crate::support::backend::Backend;
use crate::support::client::{ask_on, ask_times, connect};
use crate::support::manifest::Manifest;
use crate::support::site::Site;

/// Connections that are open meanwhile: two descriptors each.
const STREAMS: usize = 60;
/// What the messages themselves take, and a few connections.
const FOR_SOME: usize = 24;
/// Enough for a call, and not for all that goes over in any case: the folder's lock and door, a server's socket, a listener's.
const FOR_A_CALL: usize = 2;
/// With so many a process starts, and half of the connections do not fit.
const OF_A_SMALL_PROCESS: usize = 90;

async fn open(site: Site, backend: &Backend) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = connect(site.service()).await.expect("it serves");
        assert_eq!(ask_on(&mut stream).await.expect("a backend answers"), backend.address);
        streams.push(stream);
    }
    streams
}

async fn all_go_on(streams: &mut [TcpStream], backend: &Backend) {
    for stream in streams {
        assert_eq!(ask_on(stream).await.expect("it goes on"), backend.address);
    }
}

/// Leaves a process so many descriptors beside those that it has. What it had before.
fn leave(pid: u32, more: usize) -> Rlimit {
    let numbers = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten();
    let taken: BTreeSet<u64> = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // The limit is a number that none reaches, not how many there are.
    let last = (0..).filter(|number| !taken.contains(number)).nth(more).expect("numbers go on");
    limit(pid, Rlimit { current: Some(last), ..getrlimit(Resource::Nofile) })
}

fn limit(pid: u32, limit: Rlimit) -> Rlimit {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process");
    prlimit(Some(pid), Resource::Nofile, limit).expect("it is ours")
}

/// A number in a line of the log.
pub(crate) fn number(line: &str, field: &str) -> usize {
    let (_, rest) = line.split_once(&format!("\"{field}\":")).unwrap_or_else(|| panic!("{field} in {line}"));
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|error| panic!("{error}: {line}"))
}

#[tokio::test]
async fn f25_given_few_descriptors_left_when_another_process_takes_over_then_what_cannot_move_ends_in_the_old_one() {
    let site = Site::new(51);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let before = lasting_descriptors(first);
    let mut streams = open(site, &backend).await;

    leave(first, FOR_SOME);
    let second = house.start(|command| _ = command.arg("--take-over"));
    house.until("the second one serves", |house| house.serves() == Some(second) && house.is_ready()).await;

    house.until_told("come to their end in this process").await;
    let warned = house.told("come to their end in this process");
    let [warning] = warned.as_slice() else { panic!("{}", house.log()) };
    assert!(warning.contains(r#""reason":"fd_limit""#) && warning.contains(r#""level":"WARN""#), "{warning}");
    house.until_told("handed over").await;
    let moved = number(&house.told("handed over; what has not moved")[0], "streams");
    println!("{moved} of {STREAMS} connections have moved");
    assert_eq!(moved + number(warning, "left"), STREAMS);
    assert!((1..STREAMS).contains(&moved), "{moved}");
    all_go_on(&mut streams, &backend).await;
    assert!(!house.has_ended(first), "some are there");
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);

    drop(streams);
    house.until("the first one ends", |house| house.has_ended(first)).await;
    assert_eq!(house.code(first), Some(0));
    house.until("no descriptor is left over", |_| lasting_descriptors(second) <= before).await;
}

#[tokio::test]
async fn f25_given_no_descriptor_for_a_copy_when_an_upgrade_is_ordered_then_nothing_moves_until_there_are_some() {
    let site = Site::new(52);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let mut streams = open(site, &backend).await;
    let before = descriptors(first);

    let all = leave(first, FOR_A_CALL);
    let successor = house.start(|command| _ = command.arg("--take-over"));
    house.until("it has ended", |house| house.has_ended(successor)).await;

    assert_eq!(house.code(successor), Some(1));
    for (text, level) in [("nothing was handed over", "WARN"), ("does not hand over", "ERROR")] {
        house.until_told(text).await;
        let [line] = &house.told(text)[..] else { panic!("{}", house.log()) };
        assert!(line.contains("its sockets cannot be handed over: Too many open files"), "{line}");
        assert!(line.contains(r#""reason":"refused""#) && line.contains(level), "{line}");
    }
    assert_eq!(house.metric("kuberelay_upgrades_total", &[r#"result="refused""#]), 1);
    all_go_on(&mut streams, &backend).await;
    house.until("no descriptor is left over", |_| descriptors(first) <= before).await;

    limit(first, all);
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
    all_go_on(&mut streams, &backend).await;
}

#[tokio::test]
async fn f25_given_a_successor_with_few_descriptors_when_it_is_handed_more_then_it_takes_nothing_and_says_why() {
    let site = Site::new(53);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let mut streams = open(site, &backend).await;
    let before = descriptors(first);

    let script = format!(r#"ulimit -n {OF_A_SMALL_PROCESS}; exec "$0" "$@""#);
    let successor = house.start_in("sh", &["-c", &script], |command| _ = command.arg("--take-over"));
    house.until("it has ended", |house| house.has_ended(successor)).await;

    assert_eq!(house.code(successor), Some(1), "{}", house.log());
    for (text, level) in [("nothing was handed over", "WARN"), ("the hand-over broke off", "ERROR")] {
        house.until_told(text).await;
        let lines = house.told(level);
        let [line] = lines.as_slice() else { panic!("{}", house.log()) };
        assert!(line.contains(text) && line.contains("no descriptor was left for one that came"), "{line}");
        assert!(line.contains(r#""reason":"refused""#), "{line}");
    }
    all_go_on(&mut streams, &backend).await;
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
    assert_eq!(house.serves(), Some(first));
    house.until("no descriptor is left over", |_| descriptors(first) <= before).await;
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
    all_go_on(&mut streams, &backend).await;
}

#[cfg(debug_assertions)] // What stops a process at a step is in no build for use.
#[tokio::test]
async fn f25_given_a_successor_without_descriptors_when_it_looks_what_new_sockets_are_like_then_both_say_so() {
    let site = Site::new(64);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let before = descriptors(first);

    let successor = house.start(|command| _ = command.arg("--take-over").env(FAULT, "take:STOP"));
    house.until("it has asked", |_| stands_still(successor)).await;
    leave(successor, 0);
    House::signal(successor, Signal::CONT);
    house.until("it has ended", |house| house.has_ended(successor)).await;

    assert_eq!(house.code(successor), Some(1), "{}", house.log());
    for text in ["nothing was handed over", r#""level":"ERROR""#] {
        house.until_told(text).await;
        let lines = house.told(text);
        let [line] = lines.as_slice() else { panic!("{}", house.log()) };
        assert!(line.contains("no descriptor is left to compare its sockets with new ones"), "{line}");
        assert!(line.contains(r#""reason":"refused""#), "{line}");
    }
    assert_eq!(house.serves(), Some(first));
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
    house.until("no descriptor is left over", |_| descriptors(first) <= before).await;
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
}
