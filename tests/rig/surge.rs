//! Two pods of a node while one takes the place of the other, as a DaemonSet with surge has them: both on the node's
//! network, with one folder, and neither sees the other's processes. What becomes of clients, routes and the guard, and who
//! is ready when; what becomes of pods that are ended, deleted or started again at the wrong time.
//!
//! How it is handed over is in `handover` and the tests `upgrade`; here a whole node is asked.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::guard::{Guarded, TABLE};
use crate::rig::{Case, FAMILIES, Namespace, Process, find, skip};
use crate::stage::{
    Backends, ClusterIp, ENTRIES, Entry, NodePort, Outcome, PATIENCE, Stage, Web, ask_on, ask_tcp, expect_at, until,
};
use crate::verdicts::{LOCAL, backends, local, rig};
use crate::vips::{VIPS, connect, of, ours};

pub(crate) const CASES: &[Case] = cases![
    t234_given_two_pods_on_a_node_when_the_second_takes_over_then_no_client_notices_and_routes_and_guard_stay,
    t234_given_a_pod_that_is_deleted_when_the_next_comes_before_it_stops_then_no_client_notices,
    t234_given_a_pod_that_drains_when_the_next_comes_then_open_streams_go_on_there,
    t234_given_a_pod_whose_place_another_has_taken_when_it_is_started_again_then_it_takes_nothing_back,
];

/// The program, as cargo has built it.
const RELAY: &str = env!("CARGO_BIN_EXE_kube-relay");
/// Between the questions of one client.
const PAUSE: Duration = Duration::from_millis(2);

/// A node on which pods of the relay come and go.
struct Node {
    stage: Stage,
    /// Both pods' `--state-dir`.
    state: TempDir,
    _backends: Backends,
}

/// One pod of the relay: its container's first process has the number 1 there.
struct RelayPod {
    uid: String,
    container: Process,
    /// The relay's number out here.
    pid: u32,
}

impl RelayPod {
    fn of(uid: &str, container: Process) -> Self {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let is_relay = |pid: &&u32| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "kube-relay")
            };
            if let Some(pid) = container.pids().iter().find(is_relay) {
                return Self { pid: *pid, uid: uid.to_owned(), container };
            }
            assert!(Instant::now() < deadline, "no relay starts in the pod");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    /// Ends it as the kubelet does, and says how it has ended.
    fn end(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.await_end()
    }

    fn await_end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.container.ended().expect("it is ours") {
                return status;
            }
            assert!(Instant::now() < deadline, "the pod does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn runs(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid)).is_ok_and(|stat| !stat.contains(") Z "))
    }
}

/// Has a relay be started as the first process of a pod with this UID.
fn as_pod(uid: &str, state: &Path, flags: &[&str], command: &mut Command) {
    command.args(["--nodeport-addresses", "primary", "--take-over", "--pod-uid", uid, "--state-dir"]).arg(state);
    command.args(["--vip-routes-at-exit", "remove"]).args(flags);
    let mut pod = Command::new("unshare");
    pod.args(["--pid", "--fork", "--kill-child", "--"]).arg(command.get_program()).args(command.get_args());
    *command = pod;
}

/// False, and says why, where pods cannot be had.
fn has_pods() -> bool {
    let lacks = ["unshare", "nsenter"].into_iter().find(|program| find(program).is_none());
    if let Some(program) = lacks {
        skip("pods", &format!("{program} is not installed"));
    }
    lacks.is_none()
}

impl Node {
    /// With the first pod, ready; `None` where there can be none.
    fn with_pod(uid: &str, flags: &[&str]) -> Option<(Self, RelayPod)> {
        if !has_pods() {
            return None;
        }
        let rig = rig();
        let (_backends, state) = (backends(&rig), tempfile::tempdir().expect("a folder can be made"));
        let web = Web::default().with(local(&rig));
        let mut stage = Stage::start_bare(rig, &web, |command| as_pod(uid, state.path(), flags, command));
        let pod = RelayPod::of(uid, stage.take_relay());
        let node = Self { stage, state, _backends };
        node.until_ready(&pod);
        Some((node, pod))
    }

    fn start_pod(&self, uid: &str, flags: &[&str]) -> RelayPod {
        RelayPod::of(uid, self.stage.start_next(|command| as_pod(uid, self.state.path(), flags, command)))
    }

    /// What the readiness probe in a pod says.
    fn is_ready(&self, pod: &RelayPod) -> bool {
        is_ready(self.stage.rig.node(0), pod, self.state.path())
    }

    fn until_ready(&self, pod: &RelayPod) {
        until("the pod is ready", || self.is_ready(pod));
    }

    fn routes(&self) -> Vec<IpAddr> {
        ours(self.stage.rig.node(0))
    }
}

fn is_ready(node: &Namespace, pod: &RelayPod, state: &Path) -> bool {
    let mut probe = Command::new("nsenter");
    probe.args(["--target", &pod.pid.to_string(), "--pid", "--", RELAY, "ready", "--state-dir"]).arg(state);
    probe.env("KUBE_RELAY_POD_UID", &pod.uid);
    node.run(|| probe.output()).expect("it starts").status.success()
}

/// Streams from the client by each way, that have been answered.
fn streams(stage: &Stage) -> Vec<(TcpStream, Outcome)> {
    let ways = ENTRIES.into_iter().flat_map(|entry| FAMILIES.map(|family| stage.at(entry, family)));
    ways.map(|to| {
        let mut stream = connect(stage, to);
        let outcome = ask_on(&mut stream).expect("it is open");
        (stream, outcome)
    })
    .collect()
}

fn go_on(streams: &mut [(TcpStream, Outcome)]) {
    for (stream, before) in streams {
        assert_eq!(&ask_on(stream).expect("the stream goes on"), before, "with its backend");
    }
}

/// Clients that ask by each way all the time, over a new connection each time, and flows that never change. And one who
/// looks at the node's routes.
struct Clients {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    /// What each has met that was no answer.
    threads: Vec<JoinHandle<Vec<String>>>,
}

impl Clients {
    fn start(stage: &Stage) -> Self {
        let mut clients = Self { stop: Arc::default(), answered: Arc::default(), threads: Vec::new() };
        for (entry, family) in ENTRIES.into_iter().flat_map(|entry| FAMILIES.map(|family| (entry, family))) {
            let to = stage.at(entry, family);
            clients.add(stage.rig.client(), move || failure(entry, to, ask_tcp(to)));
            if [ClusterIp, NodePort].contains(&entry) {
                let mut flow = Flow::open(stage.rig.client(), to);
                clients.add(stage.rig.client(), move || flow.ask());
            }
        }
        let all = of(stage, &VIPS);
        let node = stage.rig.node(0);
        let held = node.descriptor().expect("it has one").try_clone().expect("descriptors are left");
        let addresses = crate::rig::DualAddress { v4: node.address(FAMILIES[0]), v6: node.address(FAMILIES[1]) };
        let node = Namespace::held("node", addresses, held);
        clients.add(stage.rig.client(), move || {
            let there = ours(&node);
            (there != all).then(|| format!("routes: {there:?}"))
        });
        clients
    }

    fn add(&mut self, place: &Namespace, mut ask: impl FnMut() -> Option<String> + Send + 'static) {
        let (stop, answered) = (Arc::clone(&self.stop), Arc::clone(&self.answered));
        let asking = move || {
            let mut failures = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                failures.extend(ask());
                answered.fetch_add(1, Ordering::Relaxed);
                thread::sleep(PAUSE);
            }
            failures
        };
        self.threads.push(place.thread(asking).expect("threads are left"));
    }

    /// Waits until so many more questions were asked.
    fn ask(&self, more: u64) {
        let wanted = self.answered.load(Ordering::Relaxed) + more;
        until("clients are answered", || self.answered.load(Ordering::Relaxed) >= wanted);
    }

    /// What was no answer.
    fn end(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        println!("{} questions", self.answered.load(Ordering::Relaxed));
        self.threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    }
}

fn failure(entry: Entry, to: SocketAddr, outcome: Outcome) -> Option<String> {
    outcome.pod().is_none().then(|| format!("{entry:?} {to}: {outcome:?}"))
}

/// A UDP flow from one port, and the backend that has answered it first.
struct Flow {
    socket: UdpSocket,
    to: SocketAddr,
    backend: Option<Vec<u8>>,
}

impl Flow {
    fn open(client: &Namespace, to: SocketAddr) -> Self {
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
        let socket = client.run(|| {
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        });
        Self { socket: socket.expect("a port is left"), to, backend: None }
    }

    /// One datagram there, and one back.
    fn ask(&mut self) -> Option<String> {
        let mut buffer = [0; 256];
        let answer = self.socket.send(b"?").and_then(|_| self.socket.recv(&mut buffer));
        let answer = match answer {
            Ok(length) => &buffer[..length],
            Err(error) => return Some(format!("flow to {}: {error}", self.to)),
        };
        let first = self.backend.get_or_insert_with(|| answer.to_vec());
        (first != answer).then(|| format!("flow to {}: {} has answered", self.to, String::from_utf8_lossy(answer)))
    }
}

fn t234_given_two_pods_on_a_node_when_the_second_takes_over_then_no_client_notices_and_routes_and_guard_stay() {
    if !has_pods() {
        return;
    }
    let state = tempfile::tempdir().expect("a folder can be made");
    let prepare = |command: &mut Command| as_pod("old", state.path(), &[], command);
    let Some(mut guarded) = Guarded::start(&TABLE, prepare) else { return };
    let mut old = RelayPod::of("old", guarded.stage.take_relay());
    let stage = &guarded.stage;
    let (node, probe) = (stage.rig.node(0), |pod: &RelayPod| is_ready(stage.rig.node(0), pod, state.path()));
    until("the first pod is ready", || probe(&old));
    let mut streams = streams(stage);
    let clients = Clients::start(stage);
    clients.ask(500);

    let mut new = RelayPod::of("new", stage.start_next(|command| as_pod("new", state.path(), &[], command)));
    until("the second pod is ready", || {
        let (is_old, is_new) = (probe(&old), probe(&new));
        // Asked one after the other: it may have come to it in between, but never goes back.
        assert!(!is_new || !probe(&old), "one alone is ready");
        assert!(is_old || is_new || stage.log().contains("handed over"), "and one of them always");
        is_new
    });
    clients.ask(500);

    assert!(old.runs(), "it waits to be ended");
    assert!(!probe(&old) && probe(&new));
    go_on(&mut streams);
    let status = old.end(Signal::TERM);
    assert!(status.success(), "{status}");
    clients.ask(500);
    let failures = clients.end();
    assert_eq!(failures, [] as [String; 0]);
    go_on(&mut streams);
    assert_eq!(ours(node), of(stage, &VIPS), "the old one has removed none, though its own are to go");
    assert!(probe(&new));
    guarded.keeps_them_apart();
    let log = guarded.stage.log();
    assert!(!log.contains("no route is removed") && !log.contains("cannot listen"), "nobody stands in the way");

    drop(streams);
    let status = new.end(Signal::TERM);
    assert!(status.success(), "{status}");
    assert_eq!(ours(guarded.stage.rig.node(0)), [] as [IpAddr; 0], "as is asked for, and with its own claim");
}

fn t234_given_a_pod_that_is_deleted_when_the_next_comes_before_it_stops_then_no_client_notices() {
    let Some((node, mut old)) = Node::with_pod("old", &["--shutdown-delay", "10s"]) else { return };
    let stage = &node.stage;
    let mut streams = streams(stage);
    let clients = Clients::start(stage);

    old.signal(Signal::TERM);
    until("it is about to end", || stage.log().contains("shutting down"));
    assert!(!node.is_ready(&old));
    let new = node.start_pod("new", &[]);
    node.until_ready(&new);
    let status = old.await_end();
    clients.ask(500);

    assert!(status.success(), "{status}");
    assert_eq!(clients.end(), [] as [String; 0]);
    go_on(&mut streams);
    assert_eq!(node.routes(), of(stage, &VIPS));
}

fn t234_given_a_pod_that_drains_when_the_next_comes_then_open_streams_go_on_there() {
    let times = ["--shutdown-delay", "0s", "--drain-timeout", "60s"];
    let Some((node, mut old)) = Node::with_pod("old", &times) else { return };
    let stage = &node.stage;
    let mut streams = streams(stage);
    let to = stage.at(ClusterIp, FAMILIES[0]);

    old.signal(Signal::TERM);
    expect_at(stage.rig.client(), to, ask_tcp, "nobody listens", |outcome| *outcome == Outcome::Refused);
    go_on(&mut streams);
    let new = node.start_pod("new", &[]);
    node.until_ready(&new);
    let status = old.await_end();

    assert!(status.success(), "{status}: nothing is left to wait for");
    go_on(&mut streams);
    for entry in ENTRIES {
        stage.served(stage.rig.client(), entry, &LOCAL);
    }
    assert_eq!(node.routes(), of(stage, &VIPS));
}

fn t234_given_a_pod_whose_place_another_has_taken_when_it_is_started_again_then_it_takes_nothing_back() {
    let Some((node, mut old)) = Node::with_pod("old", &[]) else { return };
    let stage = &node.stage;
    let mut new = node.start_pod("new", &[]);
    node.until_ready(&new);
    let handed_over = || stage.log().matches("handed over").count();
    assert_eq!(handed_over(), 1);

    old.end(Signal::KILL);
    let mut again = node.start_pod("old", &[]);
    until("it sees that it is past", || stage.log().contains("another pod has taken this one's place"));
    assert!(node.is_ready(&new) && !node.is_ready(&again));

    // The way back to the older program is a pod as well, and a new one.
    let mut back = node.start_pod("back", &[]);
    node.until_ready(&back);
    assert!(new.end(Signal::TERM).success());
    assert_eq!(handed_over(), 2);
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);

    assert!(!node.is_ready(&again));
    back.end(Signal::KILL);
    node.until_ready(&again);
    stage.served(stage.rig.client(), ClusterIp, &LOCAL);
    assert!(again.end(Signal::TERM).success());
}
