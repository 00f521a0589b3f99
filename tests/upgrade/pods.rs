//! Two containers with the machine's network and one state folder, as two pods of a DaemonSet have them while one takes the
//! place of the other: neither sees the other's processes, and both are number 1.

use std::fs;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use kube_relay::state_lock::{Holder, StateLock};
use rustix::process::{Signal, geteuid};

use crate::load::Load;
use crate::relay::{BINARY, House};
use crate::support::backend::Backend;
use crate::support::client::{ask_on, ask_times, connect};
use crate::support::manifest::Manifest;
use crate::support::site::Site;
use crate::support::skip;

/// Starts one in a namespace of processes of its own; its number out here.
async fn start_pod(house: &mut House) -> u32 {
    let before = house.relays();
    house.start_in("unshare", &["--pid", "--fork", "--mount-proc", "--kill-child"], |command| {
        command.arg("--take-over").env("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    });
    house.until("it has started", |house| house.relays().len() > before.len()).await;
    house.relays().into_iter().find(|pid| !before.contains(pid)).expect("one more")
}

/// What a probe in the pod says.
fn is_ready(house: &House, pid: u32) -> (bool, String) {
    let mut probe = Command::new("nsenter");
    probe.args(["--target", &pid.to_string(), "--pid", "--mount", BINARY, "ready", "--state-dir"]).arg(house.state());
    let output = probe.env_clear().output().expect("util-linux is there");
    let told = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&told).into_owned())
}

#[tokio::test]
async fn t234_given_a_folder_of_one_that_cannot_hand_over_when_a_process_is_to_take_over_then_it_waits_for_its_end() {
    let site = Site::new(18);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    let older = Holder { pid: 1, admin: None, since: SystemTime::now() };
    let lock = StateLock::take(&house.state(), older).expect("nobody has it");

    let ended = house.start(|command| _ = command.arg("--take-over"));
    house.until("it says that it waits", |house| house.log().contains("does not hand over")).await;
    House::signal(ended, Signal::TERM);
    house.until("it ends", |house| house.has_ended(ended)).await;
    let next = house.start(|command| _ = command.arg("--take-over"));
    house.until("it waits as well", |house| house.log().matches("does not hand over").count() == 2).await;
    assert_eq!(house.serves(), None);
    drop(lock);

    house.until("it serves", |house| house.serves() == Some(next) && house.is_ready()).await;
    assert_eq!(ask_times(1, site.service()).await, [backend.address]);
}

#[tokio::test]
async fn given_nobody_to_take_over_from_when_the_first_state_is_long_in_coming_then_it_answers_for_itself_meanwhile() {
    let site = Site::new(19);
    let mut house = House::new(site, &Manifest::new(site).tcp());

    let first = house.start(|command| _ = command.arg("--take-over").args(["-f", "-"]).stdin(Stdio::piped()));

    house.until("it answers", |house| house.serves() == Some(first)).await;
    assert!(!house.is_ready(), "its manifests are not all there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t234_given_two_pods_on_a_node_when_the_second_takes_over_then_none_fails_and_each_knows_who_serves() {
    let unshared = Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).status();
    if !geteuid().is_root() || !unshared.is_ok_and(|status| status.success()) {
        return skip("pods", "needs root, unshare and nsenter");
    }
    let site = Site::new(15);
    let backend = Backend::named(site.backend(1)).await;
    let mut house = House::new(site, &Manifest::new(site).tcp().endpoints([backend.address]));
    let first = start_pod(&mut house).await;
    house.until("it is ready", |house| house.is_ready()).await;
    assert_eq!(is_ready(&house, first), (true, "kube-relay 0.1.0 (pid 1) serves\n".into()));
    let mut long = connect(site.service()).await.expect("it serves");
    ask_on(&mut long).await.expect("a backend answers");
    let load = Load::start(site.service(), 500);
    load.answered(100).await;

    let second = start_pod(&mut house).await;
    house.until_told(r#""message":"taken over""#).await;
    load.answered(100).await;

    assert_eq!(is_ready(&house, second), (true, "kube-relay 0.1.0 (pid 1) serves\n".into()));
    let (of_first, told) = is_ready(&house, first);
    assert!(!of_first && told.contains("in another container"), "{told}");
    let outcome = load.end().await;
    println!("{outcome:?}");
    assert_eq!(outcome.failed, Vec::<String>::new());
    house.until("nothing is open there", |house| house.log().contains("the last connection has ended")).await;
    ask_on(&mut long).await.expect("it goes on");
    assert!(fs::exists(format!("/proc/{first}")).is_ok_and(|runs| runs), "it waits to be ended");
    House::signal(first, Signal::TERM);
    house.until("it ends", |house| house.has_ended(first)).await;
    assert!(is_ready(&house, second).0);
}
