//! One rolling update after another, a hundred steps a second, under clients that never retry.
//!
//! How soon a step is in use is told by `tests/relay/rollout.rs`, step by step; here nobody waits for it.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use serde_json::Value;

use crate::bursts::{Burst, backends, exchange, message};
use crate::floods::Echo;
use crate::rig::full;
use crate::stage::{PODS, Stage};
use crate::workload::{Backend, Bulk};

/// Endpoints that leave, each for another that comes.
const STEPS_A_SECOND: u32 = 100;
const CONNECTIONS_A_SECOND: u32 = 1_000;
/// Each from a port of its own, so that each begins a flow: in the 30 s that a flow is kept, fewer than one source may have.
const QUESTIONS_A_SECOND: u32 = 100;
const SECONDS: u32 = 60;
const SHORT_SECONDS: u32 = 5;

/// As short as pods may be that do not wait for whoever still comes. A debug build on a machine that does other things as well
/// may not get a processor for as long as that.
const GRACE: Duration = Duration::from_millis(if cfg!(debug_assertions) { 1_000 } else { 100 });
/// How long an answer may take that is not lost.
const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) fn no_client_notices() {
    let seconds = if full() { SECONDS } else { SHORT_SECONDS };
    let stage = Stage::build();
    stage.give_client_ports();
    let mut rollout = Rollout::begin(&stage, GRACE);
    let relay = stage.relay(&rollout.addresses(), &[]);
    let service = stage.service(Family::V4);
    let mut open: Vec<_> =
        (0..PODS).map(|_| stage.client().run(|| exchange(service)).expect("a backend answers")).collect();
    rollout.keep_running();

    let (connections, questions) = thread::scope(|scope| {
        let connections =
            scope.spawn(|| Burst::run(stage.client(), service, seconds * CONNECTIONS_A_SECOND, CONNECTIONS_A_SECOND));
        let questions = scope.spawn(|| {
            let count = seconds * QUESTIONS_A_SECOND;
            Burst::of(stage.client(), count, QUESTIONS_A_SECOND, move || question(service))
        });
        rollout.go_on_while(STEPS_A_SECOND, || !(connections.is_finished() && questions.is_finished()));
        let joined = |burst: thread::ScopedJoinHandle<'_, Burst>| burst.join().expect("a client does not panic");
        (joined(connections), joined(questions))
    });

    println!(
        "{} endpoints replaced, {} states taken; TCP: {connections}; UDP: {questions}",
        rollout.steps,
        relay.metric("kuberelay_config_revision", &[]),
    );
    assert_eq!((connections.failures, questions.failures), (Vec::new(), Vec::new()));
    assert_eq!(relay.dropped(None), 0);
    assert!(rollout.steps >= seconds * STEPS_A_SECOND / 2, "{} steps are no storm", rollout.steps);
    for stream in &mut open {
        message(stream).expect("a stream outlives its endpoint, as long as its pod runs");
    }
    rollout.finish();
}

/// One endpoint stays while all others are replaced again and again; the client of session affinity that has it keeps it.
pub(crate) fn a_sticky_client_stays() {
    let seconds = if full() { 10 } else { 2 };
    let stage = Stage::build();
    let _staying = backends(&stage);
    let stays = stage.backend(0, Family::V4);
    let mut rollout = Rollout::begin(&stage, GRACE);
    let sticky = |others: Vec<SocketAddr>| {
        let mut manifest = stage.manifest(&[&others[..], &[stays]].concat(), &[]);
        manifest["items"][0]["spec"]["sessionAffinity"] = "ClientIP".into();
        manifest
    };
    // Alone at first, so that it is the one.
    let relay = stage.relay_of(&sticky(Vec::new()), &[]);
    let service = stage.service(Family::V4);
    drop(stage.client().run(|| exchange(service)).expect("it answers"));

    let burst = thread::scope(|scope| {
        let burst = scope.spawn(|| Burst::run(stage.client(), service, seconds * STEPS_A_SECOND, STEPS_A_SECOND));
        rollout.publish_as(sticky);
        rollout.go_on_while(STEPS_A_SECOND, || !burst.is_finished());
        burst.join().expect("clients do not panic")
    });

    let connections = || relay.metric("kuberelay_connections_total", &[&format!(r#"backend="{stays}""#)]);
    println!("{} endpoints replaced: {burst}, {} of them to one backend", rollout.steps, connections() - 1);
    assert_eq!(burst.failures, Vec::<String>::new());
    assert_eq!(connections(), u64::from(seconds * STEPS_A_SECOND) + 1);
    rollout.finish();
}

/// Asks once, from a new port, and never again.
pub(crate) fn question(service: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(service)?;
    socket.send(b"who?")?;
    socket.recv(&mut [0; 16]).map(drop)
}

/// The endpoints of now, and those that have left.
pub(crate) struct Rollout<'s> {
    stage: &'s Stage,
    now: VecDeque<Endpoint>,
    /// Processes that go on although their endpoints will have left.
    kept: Vec<Endpoint>,
    leaving: Vec<JoinHandle<()>>,
    /// What a pod has to finish what it was given, once its endpoint has left.
    grace: Duration,
    /// The manifest with these endpoints.
    manifest: Box<dyn Fn(Vec<SocketAddr>) -> Value + 's>,
    /// Endpoints replaced.
    pub(crate) steps: u32,
}

/// A process in a pod that serves both protocols at an address of its own.
struct Endpoint {
    address: SocketAddr,
    tcp: Backend,
    udp: Echo,
}

impl<'s> Rollout<'s> {
    /// Starts one endpoint in each pod.
    pub(crate) fn begin(stage: &'s Stage, grace: Duration) -> Self {
        stage.give_pods_addresses();
        let now = (0..u32::from(PODS)).map(|number| Endpoint::start(stage, number)).collect();
        let manifest = Box::new(|endpoints: Vec<SocketAddr>| stage.manifest(&endpoints, &[]));
        Self { stage, now, kept: Vec::new(), leaving: Vec::new(), grace, manifest, steps: 0 }
    }

    /// Publishes them in another manifest, from now on.
    fn publish_as(&mut self, manifest: impl Fn(Vec<SocketAddr>) -> Value + 's) {
        self.manifest = Box::new(manifest);
        self.publish();
    }

    /// Where they are now.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.now.iter().map(|endpoint| endpoint.address).collect()
    }

    /// Replaces the first endpoints, whose processes go on.
    fn keep_running(&mut self) {
        let new = (self.next()..).take(usize::from(PODS)).map(|number| Endpoint::start(self.stage, number));
        let new: VecDeque<_> = new.collect();
        self.kept.extend(std::mem::replace(&mut self.now, new));
        self.steps += u32::from(PODS);
        self.publish();
    }

    /// Replaces one endpoint after the other, so many a second, the oldest first.
    pub(crate) fn go_on_while(&mut self, a_second: u32, go_on: impl Fn() -> bool) {
        let (begin, before) = (Instant::now(), self.steps);
        while go_on() {
            let due = begin + Duration::from_secs(1) * (self.steps - before) / a_second;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            self.step();
        }
    }

    fn step(&mut self) {
        self.now.push_back(Endpoint::start(self.stage, self.next()));
        let leaving = self.now.pop_front();
        self.steps += 1;
        self.publish();
        let grace = self.grace;
        self.leaving.push(thread::spawn(move || {
            thread::sleep(grace); // What happens next is part of the story, not a wait.
            leaving.into_iter().for_each(Endpoint::retire);
        }));
    }

    /// The number of the next endpoint that nobody has.
    fn next(&self) -> u32 {
        self.steps + u32::from(PODS)
    }

    fn publish(&self) {
        self.stage.edit(&(self.manifest)(self.addresses()));
    }

    /// Waits until all that have left are gone.
    pub(crate) fn finish(self) {
        self.leaving.into_iter().for_each(|endpoint| endpoint.join().expect("it does not panic"));
    }
}

impl Endpoint {
    /// `number` counts all that there ever were; addresses of those long gone are used anew.
    fn start(stage: &Stage, number: u32) -> Self {
        let (pod, address) = Stage::next_backend(number);
        let pod = stage.pod(pod);
        let tcp = Backend::start(pod, &[address], &Arc::new(Bulk::default())).expect("a backend starts");
        Self { address, tcp, udp: Echo::start(pod, address) }
    }

    /// Takes nobody any more, and answers whoever has come. A relay that still sends clients here has to find them another.
    fn retire(self) {
        self.tcp.retire();
        drop(self.udp);
    }
}
