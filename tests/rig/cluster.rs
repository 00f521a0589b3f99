//! A relay on each node, as in a cluster: all with the same Service, whose addresses each makes local to its own node by
//! routes. A client off the nodes reaches them by one route, to one node at a time.
//!
//! A relay on one node alone, with more ways to start it, is a `stage`.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::rig::{FAMILIES, Namespace, Process, Rig};
use crate::stage::{
    ClusterIp, Entry, ExternalIp, LoadBalancerIp, Log, NODE_PORT, NodePort, Outcome, PATIENCE, PORT, ask_tcp, ask_udp,
    expect_at, is_ready, lead_to_node, revision, spawn, tell_of_each_closed_port, until, write,
};

/// The nodes of a rig, with a relay each.
pub(crate) struct Cluster {
    pub(crate) rig: Rig,
    relays: Vec<Relay>,
    folder: TempDir,
}

struct Relay {
    process: Process,
    log: Log,
}

/// What is to come of a question.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    /// Each of these pods answers, no other does, and all of them see the node whose relay was asked.
    By(&'static [&'static str]),
    /// Connection refused, port unreachable.
    Refused,
    /// Nobody says anything.
    Silence,
}

impl Cluster {
    /// Starts the relays; `prepare` may change how.
    pub(crate) fn start(rig: Rig, manifests: &str, prepare: impl Fn(&mut Command)) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        write(folder.path(), manifests);
        let relay = |node: &Namespace| {
            tell_of_each_closed_port(node);
            let log = Log::default();
            Relay { process: spawn(node, folder.path(), &log, &prepare), log }
        };
        let relays = rig.nodes().map(relay).collect();
        let cluster = Self { rig, relays, folder };
        cluster.rig.nodes().for_each(|node| until("the first state is served", || is_ready(node)));
        cluster.lead_to(0);
        cluster
    }

    /// Changes the Service where it is to be another one, and waits until all relays have done what follows.
    pub(crate) fn change(&self, manifests: &str) {
        let last = fs::read_to_string(self.folder.path().join("web.yaml")).expect("it was written");
        if last == manifests {
            return;
        }
        let before: Vec<u64> = self.rig.nodes().map(revision).collect();
        write(self.folder.path(), manifests);
        for (node, before) in self.rig.nodes().zip(before) {
            until("the change is made", || revision(node) > before);
        }
    }

    /// Has the client reach the addresses of Services by node `i`.
    pub(crate) fn lead_to(&self, i: usize) {
        lead_to_node(&self.rig, i);
    }

    /// Where an entry is at node `i`.
    pub(crate) fn at(&self, i: usize, entry: Entry, family: Family) -> SocketAddr {
        let vip = |number| SocketAddr::new(Rig::vip_address(number).of(family), PORT);
        match entry {
            ClusterIp => vip(1),
            ExternalIp => vip(2),
            LoadBalancerIp => vip(3),
            NodePort => SocketAddr::new(self.rig.node(i).address(family), NODE_PORT),
        }
    }

    /// Asks at some entries of node `i`, in both families, over TCP and UDP, until each answer is as it should be.
    pub(crate) fn expect(&self, from: &Namespace, i: usize, entries: &[Entry], answer: Answer, what: &str) {
        thread::scope(|scope| {
            for (entry, family) in entries.iter().flat_map(|entry| FAMILIES.map(|family| (*entry, family))) {
                let to = self.at(i, entry, family);
                let what = move |protocol| format!("{what}: {entry:?} of node{i} over {protocol}, {answer:?}");
                scope.spawn(move || self.expect_at(from, i, to, ask_tcp, answer, &what("TCP")));
                scope.spawn(move || self.expect_at(from, i, to, ask_udp, answer, &what("UDP")));
            }
        });
    }

    /// Asks at one address, as [`expect`](Self::expect) does.
    pub(crate) fn expect_at(
        &self,
        from: &Namespace,
        i: usize,
        to: SocketAddr,
        ask: impl Fn(SocketAddr) -> Outcome + Sync,
        answer: Answer,
        what: &str,
    ) {
        match answer {
            Answer::By(pods) => self.expect_each(from, i, to, ask, pods, what),
            Answer::Refused => expect_at(from, to, ask, what, |outcome| *outcome == Outcome::Refused),
            Answer::Silence => expect_at(from, to, ask, what, |outcome| *outcome == Outcome::Silence),
        }
    }

    /// Asks in rounds that are long enough for each pod to have its turn, until a whole round is right: others may ask there
    /// as well, and what is sent while a shard takes a change up may be lost.
    fn expect_each(
        &self,
        from: &Namespace,
        i: usize,
        to: SocketAddr,
        ask: impl Fn(SocketAddr) -> Outcome + Sync,
        pods: &[&str],
        what: &str,
    ) {
        let deadline = Instant::now() + PATIENCE;
        let wanted: BTreeSet<&str> = pods.iter().copied().collect();
        loop {
            let round = from.run(|| Ok((0..2 * pods.len()).map(|_| ask(to)).collect::<Vec<_>>()));
            let round = round.expect("the namespace is ours");
            let answering: BTreeSet<&str> = round.iter().filter_map(Outcome::pod).collect();
            if answering == wanted && round.iter().all(|outcome| self.comes_from(i, outcome)) {
                return;
            }
            assert!(Instant::now() < deadline, "from {from:?}, {to}, {what}: {round:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// True where a pod has answered that saw node `i`: its address towards the others, or its end of the cables to its pods.
    fn comes_from(&self, i: usize, outcome: &Outcome) -> bool {
        let Outcome::Answer { source, .. } = outcome else { return false };
        let number = u8::try_from(i).expect("there are few nodes");
        let to_pods: [IpAddr; 2] = [[10, 82, number, 1].into(), [0xfd82, number.into(), 0, 0, 0, 0, 0, 1_u16].into()];
        to_pods.contains(source) || FAMILIES.iter().any(|family| self.rig.node(i).address(*family) == *source)
    }

    /// What the relay on node `i` has logged.
    pub(crate) fn log(&self, i: usize) -> String {
        self.relays[i].log.text()
    }

    /// Ends the relay on node `i`.
    pub(crate) fn end(&mut self, i: usize) {
        let process = &mut self.relays[i].process;
        let pid = i32::try_from(process.pids()[0]).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, Signal::TERM).expect("it is ours");
        process.wait().expect("it is ours");
    }

    /// Starts another one there.
    pub(crate) fn start_again(&mut self, i: usize, prepare: impl FnOnce(&mut Command)) {
        let node = self.rig.node(i);
        self.relays[i].process = spawn(node, self.folder.path(), &self.relays[i].log, prepare);
        until("the first state is served", || is_ready(node));
    }
}
