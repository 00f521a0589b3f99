//! The access log: a line for each end, with what went each way and the word that counted it.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kube_relay::access_log::{AccessFormat, AccessLog, AccessLogOptions};
use kube_relay::control::RelayOptions;
use kube_relay::serve::flow::IdleTimes;
use kube_relay::stats::CloseReason;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::backend::{Backend, Script, Talk, Talker, refusing};
use crate::support::client::{self, Caller};
use crate::support::manifest::Manifest;
use crate::support::program::Program;
use crate::support::relay::Relay;
use crate::support::site::Site;
use crate::support::within;

/// A relay that writes an access log.
struct Logging {
    relay: Relay,
    log: AccessLog,
    path: PathBuf,
    _folder: TempDir,
}

impl Logging {
    async fn start(site: Site, manifest: Manifest) -> Self {
        Self::start_with(site, manifest, 1, Duration::from_secs(1)).await
    }

    /// One line for so many ends, and another idle time of flows.
    async fn start_with(site: Site, manifest: Manifest, sample: u32, idle: Duration) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = folder.path().join("access.log");
        let sample = NonZeroU32::new(sample).expect("not 0");
        let options = AccessLogOptions { output: path.clone().into(), format: AccessFormat::Json, sample };
        let log = AccessLog::start(&options).expect("the test's folder can be written");
        let mut options = RelayOptions { access_log: Some(log.tap()), ..RelayOptions::default() };
        options.udp.idle = IdleTimes { unreplied: idle, answered: idle, stream: idle };
        Self { relay: Relay::start_with(site, manifest, options).await, log, path, _folder: folder }
    }

    /// The lines, once there are so many.
    async fn lines(&self, count: usize) -> Vec<Value> {
        self.relay.until("lines of the access log", |_| read(&self.path).len() >= count).await;
        let lines = read(&self.path);
        assert_eq!(lines.len(), count, "{lines:?}");
        lines
    }
}

/// The whole lines of a file, none where there is no file yet.
fn read(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// Asks who answers, and ends as a client does that has all it wanted.
async fn exchange(stream: &mut TcpStream) {
    client::ask_on(stream).await.expect("a backend answers");
    stream.shutdown().await.expect("the stream is open");
    within("the end of the stream", stream.read_to_end(&mut Vec::new())).await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_connection_when_both_sides_have_finished_then_its_line_tells_who_where_and_how_much() {
    let site = Site::new(60);
    let _backend = Backend::named(site.backend(1)).await;
    let logging = Logging::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let mut stream = client::connect(site.service()).await.expect("the Service answers");
    let client = stream.local_addr().expect("a connection");

    exchange(&mut stream).await;

    let line = &logging.lines(1).await[0];
    let texts = [
        ("protocol", "TCP".to_owned()),
        ("client", client.to_string()),
        ("listen", site.service().to_string()),
        ("entry", "cluster_ip".to_owned()),
        ("namespace", "default".to_owned()),
        ("service", "web".to_owned()),
        ("port", "on-tcp".to_owned()),
        ("backend", site.backend(1).to_string()),
        ("reason", "finished".to_owned()),
    ];
    for (field, value) in texts {
        assert_eq!(line[field], value.as_str(), "{field} of {line}");
    }
    let answer = site.backend(1).to_string().len() + 1;
    assert_eq!((line["upstream_bytes"].as_u64(), line["downstream_bytes"].as_u64()), (Some(5), Some(answer as u64)));
    assert_eq!(line["tries"], 1);
    assert!(line["duration_ms"].as_f64().is_some_and(|duration| duration > 0.0), "{line}");
    assert_eq!(line["upstream_datagrams"], Value::Null, "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_node_port_when_a_client_comes_there_then_the_line_names_the_way_in() {
    let site = Site::new(61);
    let _backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().node_port().endpoints([site.backend(1)]);
    let logging = Logging::start(site, manifest).await;

    exchange(&mut client::connect(site.node_port()).await.expect("the Service answers")).await;

    let line = &logging.lines(1).await[0];
    assert_eq!(line["entry"], "node_port");
    assert_eq!(line["listen"], site.node_port().to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_backend_that_refuses_when_another_is_reached_then_the_line_tells_of_two_tries() {
    let site = Site::new(62);
    let _refusing = refusing(site.backend(1));
    let _backend = Backend::named(site.backend(2)).await;
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1), site.backend(2)]);
    let logging = Logging::start(site, manifest).await;

    // By turns: one of two connections meets the one that refuses first.
    for _ in 0..2 {
        exchange(&mut client::connect(site.service()).await.expect("the Service answers")).await;
    }

    let lines = logging.lines(2).await;
    assert!(lines.iter().all(|line| line["backend"] == site.backend(2).to_string().as_str()), "{lines:?}");
    assert!(lines.iter().any(|line| line["tries"] == 2), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_no_backend_that_can_be_reached_when_a_client_comes_then_its_line_has_none_and_the_reason() {
    let site = Site::new(63);
    let _refusing = refusing(site.backend(1));
    let logging = Logging::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;

    let visit = async {
        let mut stream = client::connect(site.service()).await?; // It may be reset while it still connects.
        stream.read_to_end(&mut Vec::new()).await
    };
    within("the reset", visit).await.expect_err("a reset");

    let line = &logging.lines(1).await[0];
    assert_eq!((&line["backend"], line["reason"].as_str()), (&Value::Null, Some("ejected_all")), "{line}");
    assert_eq!(line["tries"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_ends_of_all_kinds_when_the_relay_is_drained_then_each_line_has_the_word_that_was_counted() {
    let site = Site::new(64);
    let _backend = Backend::start(site.backend(1), Script::Reset).await;
    let logging = Logging::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
    let _open = client::connect(site.service()).await.expect("the Service answers");
    let backend = logging.relay.backend("web", site.backend(1));
    logging.relay.until("an open connection", |_| backend.stats.active_connections.get() == 1).await;
    let mut reset = client::connect(site.service()).await.expect("the Service answers");
    reset.write_all(b"x").await.expect("the stream is open");
    within("the reset", reset.read_to_end(&mut Vec::new())).await.expect_err("a reset");
    logging.lines(1).await;

    let Logging { relay, log, path, _folder } = logging;
    relay.stop_accepting().await;
    assert_eq!(relay.drain(Duration::ZERO).await, 1);
    log.end().await;

    let lines = read(&path);
    let reasons: Vec<_> = lines.iter().filter_map(|line| line["reason"].as_str()).collect();
    assert_eq!(reasons, ["reset", "drain"]);
    assert_eq!((&lines[0]["upstream_bytes"], &lines[1]["upstream_bytes"]), (&Value::from(1), &Value::from(0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_flow_when_it_was_answered_and_falls_silent_then_its_line_counts_datagrams_and_bytes() {
    let site = Site::new(65);
    let _backend = Talker::start(site.backend(1), Talk::Echo).await;
    let logging = Logging::start(site, Manifest::new(site).udp().endpoints([site.backend(1)])).await;
    let caller = Caller::new(site.service()).await;

    for payload in [&b"hello"[..], b"hi"] {
        assert_eq!(caller.exchange(payload).await.expect("an answer"), payload);
    }

    let line = &logging.lines(1).await[0];
    assert_eq!((line["protocol"].as_str(), line["reason"].as_str()), (Some("UDP"), Some("idle")), "{line}");
    assert_eq!((line["port"].as_str(), line["entry"].as_str()), (Some("on-udp"), Some("cluster_ip")), "{line}");
    let number = |field: &str| line[field].as_u64();
    assert_eq!([number("upstream_datagrams"), number("downstream_datagrams")], [Some(2); 2], "{line}");
    assert_eq!([number("upstream_bytes"), number("downstream_bytes")], [Some(7); 2], "{line}");
    assert!(line["duration_ms"].as_f64().is_some_and(|duration| duration >= 1_000.0), "the idle time counts: {line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_flows_that_nobody_answers_or_that_are_refused_when_they_end_then_their_words_differ() {
    let site = Site::new(67);
    // Long enough for the flow that is refused to be there when its client sends again.
    let idle = Duration::from_secs(5);
    let logging = Logging::start_with(site, Manifest::new(site).udp().endpoints([site.backend(1)]), 1, idle).await;
    let (silent, refused) = (Caller::new(site.service()).await, Caller::new(site.service()).await);

    refused.send(b"who?").await.expect("the port is open"); // Nobody is there: the kernel says so.
    let line = &logging.lines(1).await[0];
    assert_eq!((line["reason"].as_str(), line["tries"].as_u64()), (Some("refused"), Some(1)), "{line}");

    let _backend = Talker::start(site.backend(1), Talk::Silent).await;
    silent.send(b"who?").await.expect("the port is open");
    refused.send(b"who?").await.expect("the port is open");

    let lines = logging.lines(3).await;
    assert!(lines[1..].iter().all(|line| line["reason"] == "idle_unreplied"), "{lines:?}");
    let mut tries: Vec<_> = lines[1..].iter().filter_map(|line| line["tries"].as_u64()).collect();
    tries.sort_unstable();
    assert_eq!(tries, [1, 2], "{lines:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_sample_of_one_in_three_when_six_connections_end_then_two_have_lines() {
    let site = Site::new(68);
    let _backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let Logging { relay, log, path, _folder } = Logging::start_with(site, manifest, 3, Duration::from_secs(1)).await;

    for _ in 0..6 {
        exchange(&mut client::connect(site.service()).await.expect("the Service answers")).await;
    }
    relay.stop_accepting().await;
    relay.drain(Duration::from_secs(10)).await;
    log.end().await;

    assert_eq!(read(&path).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_program_whose_file_was_moved_away_when_it_gets_sighup_then_it_goes_on_in_another() {
    let site = Site::new(69);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (path, moved) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
    let _backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let program = Program::start(site, manifest, |command| _ = command.arg("--access-log").arg(&path)).await;
    exchange(&mut client::connect(site.service()).await.expect("the Service answers")).await;
    program.until("the first line", |_| read(&path).len() == 1).await;

    fs::rename(&path, &moved).expect("the test's folder can be written");
    let pid = Pid::from_raw(program.pid().cast_signed()).expect("a process has a number");
    kill_process(pid, Signal::HUP).expect("our own child can be signalled");
    program.until("another file", |_| path.exists()).await;
    exchange(&mut client::connect(site.service()).await.expect("the Service answers")).await;
    program.until("the second line", |_| read(&path).len() == 1).await;

    assert_eq!(read(&moved).len(), 1);
    assert_eq!(program.metric("kuberelay_access_log_dropped_total", &[]), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_flow_that_is_open_when_the_relay_is_drained_then_its_line_is_written_before_the_end() {
    let site = Site::new(80);
    let _backend = Talker::start(site.backend(1), Talk::Echo).await;
    let manifest = Manifest::new(site).udp().endpoints([site.backend(1)]);
    let idle = Duration::from_secs(60);
    let Logging { relay, log, path, _folder } = Logging::start_with(site, manifest, 1, idle).await;
    let caller = Caller::new(site.service()).await;
    caller.exchange(b"hello").await.expect("an answer");

    relay.stop_accepting().await;
    relay.drain(Duration::ZERO).await;
    log.end().await;

    let lines = read(&path);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!((lines[0]["reason"].as_str(), &lines[0]["downstream_bytes"]), (Some("drain"), &Value::from(5)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_sample_when_flows_go_to_a_second_backend_then_each_has_the_lines_of_both_or_none() {
    let site = Site::new(81);
    let idle = Duration::from_secs(60);
    let manifest = Manifest::new(site).udp().endpoints([site.backend(1)]);
    let Logging { relay, log, path, _folder } = Logging::start_with(site, manifest, 2, idle).await;
    let backend = relay.backend("web", site.backend(1));
    let mut callers = Vec::new();
    for _ in 0..8 {
        callers.push(Caller::new(site.service()).await);
    }

    for caller in &callers {
        caller.send(b"who?").await.expect("the port is open"); // Nobody is there: the kernel says so.
    }
    relay.until("all to be refused", |_| backend.stats.closed.get(CloseReason::Refused) == 8).await;
    let _backend = Talker::start(site.backend(1), Talk::Silent).await;
    for caller in &callers {
        caller.send(b"who?").await.expect("the port is open");
    }
    relay.until("all to go on", |_| backend.stats.active_flows.get() == 8).await;
    relay.stop_accepting().await;
    relay.drain(Duration::ZERO).await;
    log.end().await;

    let mut lines = BTreeMap::<_, Vec<_>>::new();
    for line in read(&path) {
        lines.entry(line["client"].to_string()).or_default().push(line["tries"].clone());
    }
    assert_eq!(lines.len(), 4, "one flow in two: {lines:?}");
    assert!(lines.values().all(|tries| *tries == [Value::from(1), Value::from(2)]), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_program_that_drains_when_it_gets_sighup_then_its_last_lines_go_to_another_file() {
    let site = Site::new(82);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (path, moved) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
    let _backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let program = Program::start(site, manifest, |command| _ = command.arg("--access-log").arg(&path)).await;
    let mut stream = client::connect(site.service()).await.expect("the Service answers");
    client::ask_on(&mut stream).await.expect("a backend answers");
    let pid = Pid::from_raw(program.pid().cast_signed()).expect("a process has a number");

    kill_process(pid, Signal::TERM).expect("our own child can be signalled");
    program.until("it to drain", |program| program.page("/readyz").is_err()).await;
    fs::rename(&path, &moved).expect("the test's folder can be written");
    kill_process(pid, Signal::HUP).expect("our own child can be signalled");
    program.until("another file", |_| path.exists()).await;
    drop(stream);

    program.until("the last line", |_| read(&path).len() == 1).await;
    assert_eq!(read(&moved).len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_standard_output_that_nobody_reads_when_many_connections_end_then_all_are_served() {
    let site = Site::new(83);
    let _backend = Backend::named(site.backend(1)).await;
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
    let (read_end, write_end) = std::io::pipe().expect("a pipe");
    drop(read_end);
    let program = Program::start(site, manifest, |command| {
        _ = command.args(["--access-log", "-"]).stdout(write_end);
    })
    .await;

    for _ in 0..20 {
        exchange(&mut client::connect(site.service()).await.expect("the Service answers")).await;
    }

    let closed = "kuberelay_closed_total";
    program.until("all to end", |program| program.metric(closed, &["reason=\"finished\""]) == 20).await;
}
