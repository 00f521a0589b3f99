//! Hand-overs that fail: whatever it is, the process that runs serves on, and it is said why.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Output;
use std::time::Duration;

use rustix::process::Signal;
use socket2::SockRef;

use crate::relay::{BINARY, House, copies, descriptors};
use crate::support::DEADLINE;
use crate::support::backend::Backend;
use crate::support::client::{ask_on, ask_times, connect};
use crate::support::manifest::Manifest;
use crate::support::site::Site;

/// How often a script looks, twenty times a second, whether it may go on: for as long as a test waits for anything, and
/// longer.
const TRIES: u32 = 40 * DEADLINE.as_secs() as u32;

/// A program that is not ours, with this as its text.
fn script(house: &House, text: &str) -> String {
    let path = house.path().join("successor");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("the test's folder can be written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    path.display().to_string()
}

/// The exit code and what was said.
fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn f25_given_a_successor_that_fails_when_an_upgrade_is_ordered_then_the_old_one_serves_and_says_why() {
    let site = Site::new(20);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let serves = async |house: &mut House| {
        assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
        assert_eq!(house.serves(), Some(first));
        assert!(!house.has_ended(first));
    };
    let mut long = connect(site.service()).await.expect("it serves");
    assert_eq!(ask_on(&mut long).await.expect("a backend answers"), backend.address);
    let before = descriptors(first);

    let missing = refused(&house.upgrade(&["--binary", "/nowhere/kube-relay"]).await);
    assert!(missing.contains("/nowhere/kube-relay cannot be started"), "{missing}");
    serves(&mut house).await;

    let wrong = script(&house, "exit 3");
    let ended = refused(&house.upgrade(&["--binary", &wrong]).await);
    assert!(ended.contains("the new process has ended (exit status: 3)"), "{ended}");
    serves(&mut house).await;

    let slow = script(&house, "exec sleep 60");
    let late = refused(&house.upgrade(&["--binary", &slow, "--timeout", "300ms"]).await);
    assert!(late.contains("not ready to take over in time"), "{late}");
    serves(&mut house).await;

    let crashes = script(&house, "kill -9 $$");
    let killed = refused(&house.upgrade(&["--binary", &crashes]).await);
    assert!(killed.contains("signal: 9"), "{killed}");
    serves(&mut house).await;

    let counts = ["not_started", "ended", "timeout", "success"];
    let counts = counts.map(|result| house.metric("kuberelay_upgrades_total", &[&format!("result=\"{result}\"")]));
    assert_eq!(counts, [1, 2, 1, 0]);
    house.until_told("this process serves as before").await;
    house.until("no descriptor is left over", |_| descriptors(first) <= before).await;
    assert_eq!(ask_on(&mut long).await.expect("it goes on"), backend.address);
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
    house.until("another one serves", |house| house.serves().is_some_and(|pid| pid != first)).await;
    assert_eq!(ask_on(&mut long).await.expect("it goes on there"), backend.address);
}

#[tokio::test]
async fn f25_given_a_successor_that_comes_when_its_time_is_over_then_it_is_turned_away_and_the_old_one_serves() {
    let site = Site::new(54);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let go = house.path().join("go");
    // Who is started has another one come, and is all that can be ended.
    // It gives up in the end: a test that fails before it says "go" would leave it there for ever.
    let wait =
        format!("n=0; until [ -e '{}' ]; do n=$((n+1)); [ $n -lt {TRIES} ] || exit 1; sleep 0.05; done", go.display());
    let starts_another = script(&house, &format!("({wait}; exec '{BINARY}' \"$@\") &\nexec sleep 60"));

    let late = refused(&house.upgrade(&["--binary", &starts_another, "--timeout", "300ms"]).await);
    fs::write(&go, "").expect("the test's folder can be written");
    house.until_told("the new process comes too late").await;
    house.until("it has ended", |house| house.relays() == [first]).await;

    assert!(late.contains("no upgrade (timeout): the new process was not ready"), "{late}");
    let told = house.told("comes too late");
    assert!(told.len() == 2 && told.iter().all(|line| line.contains(r#""reason":"timeout""#)), "{told:?}");
    assert_eq!(house.metric("kuberelay_upgrades_total", &[]), 1, "it is the same upgrade");
    assert_eq!((house.serves(), house.is_ready()), (Some(first), true));
    assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
}

/// Changes the listening socket of another process, which nobody does but a test.
fn change(pid: u32, address: SocketAddr, sets: impl Fn(&SockRef<'_>) -> io::Result<()>) {
    let listener = copies(pid, address).into_iter().find(|copy| SockRef::from(copy).is_listener().is_ok_and(|is| is));
    let listener = listener.expect("it listens there");
    sets(&SockRef::from(&listener)).expect("a listener");
}

#[tokio::test]
async fn f25_given_a_listener_with_another_option_when_an_upgrade_is_ordered_then_the_old_one_serves_on_it() {
    let site = Site::new(23);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;
    let mut long = connect(site.service()).await.expect("it serves");
    ask_on(&mut long).await.expect("a backend answers");

    type Sets = fn(&SockRef<'_>, bool) -> io::Result<()>;
    let options: [(&str, Sets); 3] = [
        ("SO_REUSEPORT", |socket, is_set| socket.set_reuse_port(is_set)),
        ("SO_REUSEADDR", |socket, is_set| socket.set_reuse_address(!is_set)),
        ("SO_LINGER", |socket, is_set| socket.set_linger(is_set.then_some(Duration::ZERO))),
    ];
    for (number, (option, sets)) in (1..).zip(options) {
        change(first, site.service(), |socket| sets(socket, true));
        let told = refused(&house.upgrade(&[]).await);
        change(first, site.service(), |socket| sets(socket, false));

        let why = format!(
            "default/web:on-tcp: the socket at {}/TCP cannot be taken over: its {option} is another one",
            site.service()
        );
        assert!(told.contains(&why), "{told}");
        house.until("both have said why", |house| house.told(&why).len() >= 2).await;
        let lines = house.told(&why);
        assert!(lines.len() == 2 && lines.iter().all(|line| line.contains(r#""reason":"refused""#)), "{lines:?}");
        assert_eq!(house.serves(), Some(first));
        assert_eq!(house.metric("kuberelay_upgrades_total", &["result=\"refused\""]), number);
        assert_eq!(ask_times(2, site.service()).await, [backend.address; 2]);
        assert_eq!(ask_on(&mut long).await.expect("it goes on"), backend.address);
    }
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
    assert_eq!(ask_on(&mut long).await.expect("it goes on there"), backend.address);
}

#[tokio::test]
async fn f25_given_a_program_behind_a_link_when_that_leads_elsewhere_by_now_then_this_is_what_is_started() {
    let site = Site::new(35);
    let mut house = House::new(site, &Manifest::new(site).tcp());
    let link = house.path().join("kube-relay");
    symlink(BINARY, &link).expect("the test's folder can be written");
    let first = house.start_program(&link, |_| {});
    house.until("it is ready", |house| house.serves() == Some(first) && house.is_ready()).await;

    fs::remove_file(&link).expect("it is ours");
    symlink(script(&house, "exit 3"), &link).expect("the test's folder can be written");
    let ended = refused(&house.upgrade(&[]).await);

    assert!(ended.contains("the new process has ended (exit status: 3)"), "{ended}");
    fs::remove_file(&link).expect("it is ours");
    symlink(BINARY, &link).expect("the test's folder can be written");
    let done = house.upgrade(&[]).await;
    assert!(done.status.success(), "{done:?}");
    house.until_told(r#""same_program":true"#).await;
}

#[tokio::test]
async fn f25_given_nobody_with_the_folder_when_an_upgrade_is_ordered_then_that_is_said() {
    let site = Site::new(21);
    let house = House::new(site, &Manifest::new(site).tcp());

    let nobody = refused(&house.upgrade(&[]).await);

    assert!(nobody.contains("no kube-relay with this --state-dir runs"), "{nobody}");
}

#[tokio::test]
async fn f21_given_a_process_that_was_killed_when_another_one_starts_to_take_over_then_it_serves_at_once() {
    let site = Site::new(22);
    let backend = Backend::named(site.backend(1)).await;
    let (mut house, first) = House::serving(site, &Manifest::new(site).tcp().endpoints([backend.address])).await;

    House::signal(first, Signal::KILL);
    house.until("it has ended", |house| house.has_ended(first)).await;
    let second = house.start(|command| _ = command.arg("--take-over"));
    house.until("the second one serves", |house| house.serves() == Some(second) && house.is_ready()).await;

    assert_eq!(ask_times(1, site.service()).await, [backend.address]);
}
