//! The scene: a client, a node with kube-relay, and three pods, wired without a router in between.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::rig::{DualAddress, FAMILIES, Namespace, Process, Rig, Shape};
use crate::seen;

/// Every Service and every backend has it.
pub(crate) const PORT: u16 = 7000;
/// Pods, and so backends.
pub(crate) const PODS: u8 = 3;
/// How long anything may take that should not take long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Where the Service answers on its node's loopback addresses.
pub(crate) const NODE_PORT: u16 = 30_000;

/// The file that a relay follows.
const MANIFEST: &str = "web.json";
/// What each pod has of addresses beside its own: 10.84.`pod`.1 to 250.
const MORE_ADDRESSES: u32 = 250;

/// The number of the one virtual address.
const VIP: u8 = 10;
/// Where the relay tells of itself, inside its node.
const ADMIN: ([u8; 4], u16) = ([127, 0, 0, 1], 10249);

/// The network, and a folder for what programs want as files.
pub(crate) struct Stage {
    pub(crate) rig: Rig,
    vip: DualAddress,
    folder: TempDir,
}

impl Stage {
    /// Builds it. All processes from here on may have as many descriptors as this one could.
    pub(crate) fn build() -> Self {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }); // As many as before are fine, too.
        let rig = Rig::build(Shape { nodes: 1, pods_per_node: PODS, router: false }).expect("the rig builds");
        let vip = rig.vip(0, VIP).expect("the address is added");
        let folder = TempDir::new().expect("a folder can be made");
        Self { rig, vip, folder }
    }

    /// Where the client finds the Service.
    pub(crate) fn service(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.vip.of(family), PORT)
    }

    pub(crate) fn client(&self) -> &Namespace {
        self.rig.client()
    }

    pub(crate) fn node(&self) -> &Namespace {
        self.rig.node(0)
    }

    pub(crate) fn pod(&self, number: u8) -> &Namespace {
        self.rig.pod(0, number.into())
    }

    /// Where a pod answers.
    pub(crate) fn backend(&self, number: u8, family: Family) -> SocketAddr {
        SocketAddr::new(self.pod(number).address(family), PORT)
    }

    pub(crate) fn backends(&self, family: Family) -> Vec<SocketAddr> {
        (0..PODS).map(|number| self.backend(number, family)).collect()
    }

    /// Gives the pods many addresses more, for [`next_backend`](Self::next_backend).
    pub(crate) fn give_pods_addresses(&self) {
        for pod in 0..PODS {
            let network = ([10, 84, pod, 0].into(), 24);
            self.rig.network_of_pod(0, pod.into(), network).expect("the pod is ours");
        }
    }

    /// Lets clients open thousands of connections a second for minutes: each port that one has closed waits for a minute
    /// otherwise, and where most of them wait, the kernel searches long for another.
    pub(crate) fn give_client_ports(&self) {
        for (setting, value) in [("net/ipv4/ip_local_port_range", "10000 65535"), ("net/ipv4/tcp_tw_reuse", "1")] {
            self.client().sysctl(setting, value).expect("the namespace is ours");
        }
    }

    /// Backend `number` of all that there ever are, by turns in each pod, and the number of that pod. The first of each pod
    /// has its address for ever; the others' are used anew after some hundreds.
    pub(crate) fn next_backend(number: u32) -> (u8, SocketAddr) {
        let pods = u32::from(PODS);
        let pod = (number % pods) as u8;
        let host = if number < pods { 1 } else { ((number / pods - 1) % (MORE_ADDRESSES - 1)) as u8 + 2 };
        (pod, SocketAddr::from(([10, 84, pod, host], PORT)))
    }

    /// The objects of the Service `web`, with annotations of ours, whose prefix is left out.
    pub(crate) fn manifest(&self, backends: &[SocketAddr], annotations: &[(&str, &str)]) -> Value {
        let mut objects = manifest(self.vip, backends);
        for (name, value) in annotations {
            objects["items"][0]["metadata"]["annotations"][format!("kube-relay.dev/{name}")] = (*value).into();
        }
        objects
    }

    /// Writes the manifest anew, by an atomic rename.
    pub(crate) fn edit(&self, manifest: &Value) {
        let new = self.file("new", &manifest.to_string());
        fs::rename(new, self.folder.path().join(MANIFEST)).expect("the folder is ours");
    }

    /// A file with this text.
    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).expect("the folder can be written");
        path
    }

    /// Starts a program that serves until it is dropped. What it says goes to a file.
    pub(crate) fn start(&self, inside: &Namespace, mut command: Command) -> Process {
        let log = self.log(inside);
        let log_too = log.try_clone().expect("descriptors are left");
        command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        inside.spawn(command).expect("the program starts")
    }

    /// An empty file for what the program in a namespace says.
    fn log(&self, inside: &Namespace) -> File {
        File::create(self.folder.path().join(format!("{}.log", inside.name()))).expect("a file for its output")
    }

    /// What the program in a namespace has said so far.
    pub(crate) fn said(&self, inside: &Namespace) -> String {
        fs::read_to_string(self.folder.path().join(format!("{}.log", inside.name()))).unwrap_or_default()
    }

    /// Starts kube-relay with a Service for these backends, and waits until it serves. More flags are the test's.
    pub(crate) fn relay(&self, backends: &[SocketAddr], flags: &[String]) -> Relay<'_> {
        self.relay_of(&self.manifest(backends, &[]), flags)
    }

    /// The same for a whole manifest.
    pub(crate) fn relay_of(&self, manifest: &Value, flags: &[String]) -> Relay<'_> {
        self.relay_heard_by(manifest, "warn", flags, self.log(self.node()).into())
    }

    /// The same, with another level of its log, and somebody else who reads that.
    pub(crate) fn relay_heard_by(&self, manifest: &Value, level: &str, flags: &[String], log: Stdio) -> Relay<'_> {
        self.edit(manifest);
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        command.arg("run").arg("-f").arg(self.folder.path().join(MANIFEST)).env_clear();
        command.args(["--nodeport-addresses", "localhost", "--healthz-bind-address", "none", "--log-level", level]);
        command.args(["--metrics-bind-address", &SocketAddr::from(ADMIN).to_string()]).args(flags);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = self.node().spawn(command).expect("the program starts");
        let relay = Relay { process, stage: self };
        until(&format!("kube-relay to be ready: {}", self.said(self.node())), || relay.page("/readyz").ok());
        relay
    }
}

/// A running kube-relay.
pub(crate) struct Relay<'s> {
    process: Process,
    stage: &'s Stage,
}

impl Relay<'_> {
    /// The number of its process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pids()[0]
    }

    /// Has its process get a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("a process has a number");
        kill_process(pid, signal).expect("it is our child");
    }

    /// Waits until its process has ended.
    pub(crate) fn end(mut self) -> ExitStatus {
        until("kube-relay to end", || self.process.ended().expect("it is our child"))
    }

    /// A sum at `/metrics`, over all series with these labels.
    pub(crate) fn metric(&self, metric: &str, labels: &[&str]) -> u64 {
        let page = self.page("/metrics").unwrap_or_else(|error| panic!("no metrics: {error}"));
        seen::sum(&page, metric, labels)
    }

    /// The value of one series at `/metrics`, with its labels as they are written there.
    pub(crate) fn gauge(&self, series: &str) -> f64 {
        let page = self.page("/metrics").unwrap_or_else(|error| panic!("no metrics: {error}"));
        seen::gauge(&page, series).expect("a series that is there")
    }

    /// What it has turned away, for any reason or for one.
    pub(crate) fn dropped(&self, reason: Option<&str>) -> u64 {
        let label = reason.map(|reason| format!(r#"reason="{reason}""#)).unwrap_or_default();
        self.metric("kuberelay_service_dropped_total", &[&label])
    }

    /// What it answers with 200.
    pub(crate) fn page(&self, path: &str) -> io::Result<String> {
        self.stage.node().run(|| seen::page(ADMIN.into(), path))
    }
}

/// A Service of both families, with a port of both protocols, and where it leads.
fn manifest(vip: DualAddress, backends: &[SocketAddr]) -> Value {
    let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "port": PORT, "protocol": protocol});
    let ports = ["TCP", "UDP"].map(port);
    let node_ports = ports.clone().map(|mut port| {
        port["nodePort"] = NODE_PORT.into();
        port
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {
            "type": "NodePort", "ports": node_ports, "ipFamilyPolicy": "PreferDualStack",
            "clusterIP": vip.v4, "clusterIPs": [vip.v4, vip.v6], "ipFamilies": FAMILIES,
        },
    });
    let slice = |family: Family| {
        let of_family = backends.iter().filter(|backend| Family::of(backend.ip()) == family);
        let endpoints: Vec<_> = of_family.map(|backend| json!({"addresses": [backend.ip()]})).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("web-{family}").to_lowercase(), "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": family, "endpoints": endpoints, "ports": ports,
        })
    };
    let [v4, v6] = FAMILIES.map(slice);
    json!({"apiVersion": "v1", "kind": "List", "items": [service, v4, v6]})
}

/// Waits for a condition that only looking tells.
pub(crate) fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
