//! Machines that have run for a moment, a day or two months: nothing that lasts for a time depends on how long.
//!
//! The wall clock cannot be set for a test. That the data plane never asks for it is a test beside it, in `src/serve.rs`.

use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kube_relay::name::Family;

use crate::bursts::{backends, exchange};
use crate::rig::{set_by, skip};
use crate::stage::{PATIENCE, Relay, Stage, until};

const DAY: i64 = 24 * 3_600;
/// By then a word of 32 bits that counts milliseconds has begun anew.
const TWO_MONTHS: i64 = 60 * DAY;
/// What has passed since the machine's start, where that is set to be a moment ago.
const MOMENT: i64 = 10;

const CLIENTS: u64 = 30;
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(1);

pub(crate) fn nothing_depends_on_them() {
    for (what, seconds) in
        [("a moment ago", MOMENT - uptime()), ("a day earlier", DAY), ("two months earlier", TWO_MONTHS)]
    {
        match set_by(seconds, lasting) {
            Ok(Lasted { idle }) => {
                println!("started {what}: one backend for {CLIENTS} clients, idle ended after {idle:?}")
            }
            Err(error) => return skip("time", &format!("no clock of our own: {error}")),
        }
    }
}

/// Whole seconds since the machine's start.
fn uptime() -> i64 {
    let text = fs::read_to_string("/proc/uptime").expect("procfs");
    text.split('.').next().and_then(|seconds| seconds.parse().ok()).expect("a number")
}

struct Lasted {
    idle: Duration,
}

/// Session affinity lasts, a dead backend stays out, and an idle connection ends when its time is up.
fn lasting() -> Lasted {
    let stage = Stage::build();
    let mut running = backends(&stage);
    let mut manifest = stage.manifest(&stage.backends(Family::V4), &[("idle-timeout", "1s")]);
    manifest["items"][0]["spec"]["sessionAffinity"] = "ClientIP".into();
    let relay = stage.relay_of(&manifest, &[]);
    assert_ne!(clock_of(&relay.pid().to_string()), clock_of("self"), "the relay has a clock of its own");
    let ask = || stage.client().run(|| exchange(stage.service(Family::V4))).expect("a backend answers");

    let begin = Instant::now();
    let mut open = ask();
    open.set_read_timeout(Some(PATIENCE)).expect("an option");
    let end = open.read(&mut [0]).expect_err("it is reset").kind();
    let idle = begin.elapsed();
    (1..CLIENTS).for_each(|_| drop(ask()));
    until("all to be counted", || (connections(&stage, &relay).iter().sum::<u64>() == CLIENTS).then_some(()));

    assert_eq!(end, io::ErrorKind::ConnectionReset);
    assert!((IDLE..2 * IDLE).contains(&idle), "{idle:?}");
    let mut shares = connections(&stage, &relay);
    shares.sort_unstable();
    assert_eq!(shares, [0, 0, CLIENTS], "the client stays with its backend");

    running.truncate(1); // Two of three refuse from now on; half of them may be out.
    drop(relay);
    let relay = stage.relay(&stage.backends(Family::V4), &[]);
    (0..CLIENTS).for_each(|_| drop(ask()));
    let out = |relay: &Relay<'_>| relay.metric("kuberelay_backend_ejected", &[]);
    assert_eq!(out(&relay), 1);
    (0..CLIENTS).for_each(|_| drop(ask()));
    assert_eq!(out(&relay), 1, "its ten seconds are not over");
    Lasted { idle }
}

/// Which clock a process goes by.
fn clock_of(process: &str) -> PathBuf {
    fs::read_link(format!("/proc/{process}/ns/time")).expect("procfs")
}

/// How many connections each backend has got.
fn connections(stage: &Stage, relay: &Relay<'_>) -> Vec<u64> {
    let of = |backend| relay.metric("kuberelay_connections_total", &[&format!(r#"backend="{backend}""#)]);
    stage.backends(Family::V4).into_iter().map(of).collect()
}
