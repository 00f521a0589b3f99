//! More to say than anybody reads: a thousand failures a second, and a log that is full.

use std::collections::BTreeMap;
use std::io::{self, PipeReader, Read, Write};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use rustix::process::Signal;
use serde_json::Value;

use crate::bursts::{Burst, backends};
use crate::rig::full;
use crate::stage::{Relay, Stage};

const A_SECOND: u32 = 1_000;
/// What the relay says for each try that fails, at level `debug`.
const MESSAGE: &str = "backend not reached";
/// Lines of one place in a second. The relay's seconds begin at another time than those of its stamps: each of these may
/// have lines of two.
const LINES: usize = 2 * 10;

/// The first pod refuses, and is never out: each third client meets it.
pub(crate) fn nobody_reads() {
    let stage = Stage::build();
    stage.give_client_ports();
    let _others = backends(&stage).split_off(1);
    let manifest = stage.manifest(&stage.backends(Family::V4), &[("eject-after", "none")]);
    let (log, input) = full_pipe().expect("a pipe");
    let relay = stage.relay_heard_by(&manifest, "debug", &[], input);
    let seconds = if full() { 10 } else { 2 };

    let unread = burst(&stage, seconds);
    let failures = failures(&relay);
    let reading = thread::spawn(move || read_to_end(log));
    let read = burst(&stage, seconds);
    let [storm, lost] = ["storm", "unread"]
        .map(|reason| relay.metric("kuberelay_log_lines_dropped_total", &[&format!(r#"reason="{reason}""#)]));
    drop(relay);
    let lines = reading.join().expect("it does not panic");
    let of_storm: Vec<_> = lines.iter().filter(|line| line["message"] == MESSAGE).collect();

    println!(
        "{failures} failures while nobody reads: {unread}; then {} lines were read, {storm} were too many, {lost} lost; \
         while they are read: {read}",
        lines.len()
    );
    assert_eq!((unread.failures.len(), &read.failures), (0, &Vec::new()));
    assert!(failures > u64::from(seconds * A_SECOND / 4), "{failures} are no storm");
    assert!(storm > failures / 2, "{storm} lines of {failures} were kept back");
    assert!(!of_storm.is_empty());
    let mut by_second = BTreeMap::<&str, usize>::new();
    for line in &of_storm {
        let second = line["timestamp"].as_str().and_then(|stamp| stamp.get(..19)).expect("a stamp");
        *by_second.entry(second).or_default() += 1;
    }
    assert!(by_second.values().all(|count| *count <= LINES), "{by_second:?}");
    let suppressed: u64 = of_storm.iter().filter_map(|line| line["suppressed"].as_u64()).sum();
    assert!(suppressed > 0 && suppressed <= storm, "{suppressed} said to be kept back, {storm} were");
}

/// A reader that has stopped does not keep the process from its end.
pub(crate) fn nobody_reads_the_end() {
    let stage = Stage::build();
    let _backends = backends(&stage);
    let manifest = stage.manifest(&stage.backends(Family::V4), &[]);
    let (_log, input) = full_pipe().expect("a pipe");
    let relay = stage.relay_heard_by(&manifest, "info", &[], input);

    let asked = Instant::now();
    relay.signal(Signal::TERM);
    let end = relay.end();

    println!("ended {:?} after SIGTERM, with a log that nobody reads", asked.elapsed());
    assert!(end.success(), "{end:?}");
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
}

fn burst(stage: &Stage, seconds: u32) -> Burst {
    Burst::run(stage.client(), stage.service(Family::V4), seconds * A_SECOND, A_SECOND)
}

fn failures(relay: &Relay<'_>) -> u64 {
    relay.metric("kuberelay_connect_failures_total", &[r#"reason="refused""#])
}

/// A small pipe without room: who writes to it waits until somebody reads.
fn full_pipe() -> io::Result<(PipeReader, Stdio)> {
    let (log, mut input) = io::pipe()?;
    let bytes = rustix::pipe::fcntl_setpipe_size(&input, 4_096)?;
    input.write_all(&vec![b'\n'; bytes])?;
    Ok((log, input.into()))
}

/// The objects that a log has, up to the end of whoever writes it.
fn read_to_end(mut log: PipeReader) -> Vec<Value> {
    let mut text = Vec::new();
    log.read_to_end(&mut text).expect("a pipe can be read");
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    // The last one may be cut where its writer has ended.
    lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
}
