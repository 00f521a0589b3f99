//! The scene: a client, a node with kube-relay, and three pods, wired without a router in between.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
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

    /// A file with this text.
    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).expect("the folder can be written");
        path
    }

    /// Starts a program that serves until it is dropped. What it says goes to a file.
    pub(crate) fn start(&self, inside: &Namespace, mut command: Command) -> Process {
        let log =
            File::create(self.folder.path().join(format!("{}.log", inside.name()))).expect("a file for its output");
        let log_too = log.try_clone().expect("descriptors are left");
        command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        inside.spawn(command).expect("the program starts")
    }

    /// What the program in a namespace has said so far.
    pub(crate) fn said(&self, inside: &Namespace) -> String {
        fs::read_to_string(self.folder.path().join(format!("{}.log", inside.name()))).unwrap_or_default()
    }

    /// Starts kube-relay with a Service for these backends, and waits until it serves. More flags are the test's.
    pub(crate) fn relay(&self, backends: &[SocketAddr], flags: &[String]) -> Relay<'_> {
        let manifest = self.file("web.json", &manifest(self.vip, backends));
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        command.arg("run").arg("-f").arg(manifest).env_clear();
        command.args(["--nodeport-addresses", "localhost", "--healthz-bind-address", "none", "--log-level", "warn"]);
        command.args(["--metrics-bind-address", &SocketAddr::from(ADMIN).to_string()]).args(flags);
        let relay = Relay { process: self.start(self.node(), command), stage: self };
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

    fn page(&self, path: &str) -> io::Result<String> {
        self.stage.node().run(|| seen::page(ADMIN.into(), path))
    }
}

/// A Service of both families, with a port of both protocols, and where it leads.
fn manifest(vip: DualAddress, backends: &[SocketAddr]) -> String {
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
    json!({"apiVersion": "v1", "kind": "List", "items": [service, v4, v6]}).to_string()
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
