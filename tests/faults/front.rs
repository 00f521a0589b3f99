//! The front balancers of `examples/front`, before the node ports of three nodes: one of these is drained, and no client
//! notices.
//!
//! What runs are the files that people copy, with the rig's addresses in place of theirs. Each test skips where its program
//! is not installed.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use kube_relay::name::Family;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bursts::{Burst, exchange};
use crate::rig::{Namespace, Process, Rig, Shape, find, full, skip};
use crate::seen;
use crate::stage::{PORT, until};
use crate::workload::{Backend, Bulk};

/// The addresses of nodes in the example files.
const EXAMPLE_NODES: [&str; 3] = ["192.0.2.11", "192.0.2.12", "192.0.2.13"];
/// The node ports of `web` (policy Cluster) and of `shop` (policy Local) there.
const NODE_PORTS: [u16; 2] = [30_080, 30_081];
/// The healthCheckNodePort of `shop` there.
const HEALTH_PORT: u16 = 31_081;
/// Where the fronts listen for them.
const FRONT_PORTS: [u16; 2] = [80, 8080];

/// The node that is drained.
const DRAINED: usize = 0;
/// New connections a second, at all ports of a front together.
const A_SECOND: u32 = 500;
/// Connections that the node has served when its end begins.
const SERVED_BEFORE: u64 = 50;

/// For how long clients come, in seconds, and how long a node serves after it has said that it ends.
fn seconds() -> (u32, &'static str) {
    if full() { (10, "5s") } else { (5, "3s") }
}

pub(crate) fn haproxy_asks_before_each_node_ends() {
    let Some(program) = find("haproxy") else { return skip("haproxy", "not installed") };
    let mut nodes = Nodes::start();
    let mut front = Command::new(program);
    front.arg("-db").arg("-f").arg(nodes.example("haproxy.cfg"));
    let _front = nodes.front(front, &FRONT_PORTS);

    let bursts = nodes.drain_under(&FRONT_PORTS, || {});

    // Not by refused connections: by its questions.
    let said = fs::read_to_string(nodes.log("front")).expect("it was written");
    for backend in ["web", "shop"] {
        let down = format!("Server {backend}/node-1 is DOWN, reason: Layer7 wrong status, code: 503");
        assert!(said.contains(&down), "{said}");
    }
    assert!(bursts.iter().all(|burst| burst.failures.is_empty()), "{:?}", failures(&bursts));
}

pub(crate) fn nginx_is_told_before_a_node_ends() {
    let Some(program) = find("nginx") else { return skip("nginx", "not installed") };
    let Some(module) = stream_module(&program) else { return skip("nginx", "it has no stream module") };
    let mut nodes = Nodes::start();
    let configuration = nodes.example("nginx.conf");
    let mut front = Command::new(program);
    // Root, as there may be nobody else in this user namespace.
    let pid = nodes.folder.path().join("nginx.pid");
    let settings = format!("daemon off; user root; pid {}; error_log stderr;{module}", pid.display());
    front.args(["-e", "stderr", "-g", &settings, "-c"]).arg(&configuration);
    let front = nodes.front(front, &FRONT_PORTS[..1]);
    let node = SocketAddr::new(nodes.address(DRAINED), NODE_PORTS[0]);

    let bursts = nodes.drain_under(&FRONT_PORTS[..1], || {
        let text = fs::read_to_string(&configuration).expect("it was written");
        let line = format!("server {node} max_fails=1 fail_timeout=10s");
        assert!(text.contains(&line), "{text}");
        fs::write(&configuration, text.replace(&line, &format!("{line} down"))).expect("the folder is ours");
        signal(&front, Signal::HUP);
    });

    assert!(bursts.iter().all(|burst| burst.failures.is_empty()), "{:?}", failures(&bursts));
}

fn failures(bursts: &[Burst]) -> Vec<&String> {
    bursts.iter().flat_map(|burst| &burst.failures).collect()
}

/// What makes it know streams: nothing where it is built with them, or the folder that the example includes loads them.
fn stream_module(program: &Path) -> Option<String> {
    let enabled = fs::read_dir("/etc/nginx/modules-enabled").into_iter().flatten().flatten();
    let mut names = enabled.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let options = Command::new(program).arg("-V").output().expect("it tells how it was built");
    let options = String::from_utf8_lossy(&options.stderr).into_owned();
    if names.any(|name| name.contains("stream")) || options.split_whitespace().any(|word| word == "--with-stream") {
        return Some(String::new());
    }
    let module = Path::new("/usr/lib/nginx/modules/ngx_stream_module.so");
    module.exists().then(|| format!(" load_module {};", module.display()))
}

/// Three nodes with a relay and a pod each, and both Services.
struct Nodes {
    rig: Rig,
    folder: TempDir,
    relays: Vec<Process>,
    _backends: Vec<Backend>,
}

impl Nodes {
    fn start() -> Self {
        let rig = Rig::build(Shape { nodes: 3, pods_per_node: 1, router: true }).expect("the rig builds");
        let folder = TempDir::new().expect("a folder can be made");
        let bulk = Arc::new(Bulk::default());
        let backend = |node| {
            let pod = rig.pod(node, 0);
            Backend::start(pod, &[SocketAddr::new(pod.address(Family::V4), PORT)], &bulk).expect("a backend starts")
        };
        let backends = (0..3).map(backend).collect();
        fs::write(folder.path().join("services.json"), manifest(&rig)).expect("the folder is ours");
        let mut nodes = Self { rig, folder, relays: Vec::new(), _backends: backends };
        nodes.relays = (0..3).map(|node| nodes.relay(node)).collect();
        for node in 0..3 {
            until(&format!("relay {node} to be ready"), || nodes.page(node, "/readyz"));
        }
        nodes
    }

    fn relay(&self, node: usize) -> Process {
        let (_, delay) = seconds();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        command.arg("run").arg("-f").arg(self.folder.path().join("services.json")).env_clear();
        command.args(["--node-name", &format!("node-{node}"), "--node-address", &self.address(node).to_string()]);
        command.args(["--nodeport-addresses", "primary", "--healthz-bind-address", "0.0.0.0:10256"]);
        command.args(["--shutdown-delay", delay, "--log-level", "warn"]);
        self.spawn(self.rig.node(node), command, &format!("relay-{node}"))
    }

    /// Starts a front balancer and waits until it serves at these ports.
    fn front(&self, command: Command, ports: &[u16]) -> Process {
        let front = self.spawn(self.front_host(), command, "front");
        for port in ports {
            let served = || self.rig.client().run(|| exchange(self.front_at(*port))).ok();
            until(&format!("the front to serve at {port}"), served);
        }
        front
    }

    fn spawn(&self, inside: &Namespace, mut command: Command, name: &str) -> Process {
        let log = fs::File::create(self.log(name)).expect("a file for its output");
        let log_too = log.try_clone().expect("descriptors are left");
        command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        inside.spawn(command).expect("the program starts")
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.log"))
    }

    /// An example file with the rig's addresses.
    fn example(&self, name: &str) -> PathBuf {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/front").join(name);
        let text = fs::read_to_string(path).expect("the example is there");
        let nodes = EXAMPLE_NODES.iter().enumerate();
        let text = nodes.fold(text, |text, (node, example)| {
            assert!(text.contains(&format!("{example}:{}", NODE_PORTS[0])), "{example} in {name}");
            text.replace(example, &self.address(node).to_string())
        });
        let path = self.folder.path().join(name);
        fs::write(&path, text).expect("the folder is ours");
        path
    }

    /// Clients come at an even rate; in their midst one node is drained, once `before` is done with.
    fn drain_under(&mut self, ports: &[u16], before: impl FnOnce()) -> Vec<Burst> {
        let (seconds, _) = seconds();
        let rate = A_SECOND / ports.len() as u32;
        let this = &*self;
        let bursts = thread::scope(|scope| {
            let burst = |port| move || Burst::run(this.rig.client(), this.front_at(port), seconds * rate, rate);
            let clients: Vec<_> = ports.iter().map(|port| scope.spawn(burst(*port))).collect();
            let served = || this.connections(DRAINED) >= SERVED_BEFORE;
            until("the node to serve its share", || served().then_some(()));
            before();
            this.drain(ports);
            clients.into_iter().map(|client| client.join().expect("clients do not panic")).collect::<Vec<_>>()
        });
        for (port, burst) in ports.iter().zip(&bursts) {
            println!("front port {port}, one of three nodes drained: {burst}");
        }
        let end = self.relays[DRAINED].ended().expect("it is our child");
        assert!(end.is_some_and(|status| status.success()), "clients came while its ports were closed: {end:?}");
        bursts
    }

    /// Ends the relay of a node as its supervisor would. It says so at once, and serves on.
    fn drain(&self, ports: &[u16]) {
        signal(&self.relays[DRAINED], Signal::TERM);
        let from_front = |port, path: &str| {
            let at = SocketAddr::new(self.address(DRAINED), port);
            self.front_host().run(|| seen::page(at, path)).err().map(|error| error.to_string())
        };
        for port in [10_256, HEALTH_PORT] {
            until("health checks to fail", || from_front(port, "/healthz").filter(|said| said.contains(" 503 ")));
        }
        for (_, node_port) in ports.iter().zip(NODE_PORTS) {
            let at = SocketAddr::new(self.address(DRAINED), node_port);
            self.front_host().run(|| exchange(at)).expect("the node serves on");
        }
    }

    /// Where the front balancer runs.
    fn front_host(&self) -> &Namespace {
        self.rig.router().expect("the rig has one")
    }

    fn front_at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.front_host().address(Family::V4), port)
    }

    fn address(&self, node: usize) -> std::net::IpAddr {
        self.rig.node(node).address(Family::V4)
    }

    /// Connections that a node's relay has brought to backends.
    fn connections(&self, node: usize) -> u64 {
        seen::sum(&self.page(node, "/metrics").unwrap_or_default(), "kuberelay_connections_total", &[])
    }

    fn page(&self, node: usize, path: &str) -> Option<String> {
        self.rig.node(node).run(|| seen::page(([127, 0, 0, 1], 10_249).into(), path)).ok()
    }
}

/// What went wrong is often in what the programs have said. Relays that were asked to end would go on for a while.
impl Drop for Nodes {
    fn drop(&mut self) {
        for relay in &mut self.relays {
            if let Ok(None) = relay.ended() {
                signal(relay, Signal::KILL);
            }
        }
        let files = fs::read_dir(self.folder.path()).into_iter().flatten().flatten().map(|entry| entry.path());
        for log in files.filter(|path| thread::panicking() && path.extension().is_some_and(|kind| kind == "log")) {
            println!("{}: {}", log.display(), fs::read_to_string(&log).unwrap_or_default());
        }
    }
}

fn signal(process: &Process, signal: Signal) {
    let pid = process.pids().first().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("a process has a number");
    kill_process(pid, signal).expect("it is our child");
}

/// `web` with policy Cluster and `shop` with policy Local, at the numbers of the examples, on the same pods.
fn manifest(rig: &Rig) -> String {
    let service = |name: &str, policy: &str, node_port: u16| {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {
                "type": "LoadBalancer", "externalTrafficPolicy": policy,
                "healthCheckNodePort": if policy == "Local" { HEALTH_PORT } else { 0 },
                "ports": [{"port": 80, "nodePort": node_port}],
            },
        })
    };
    let endpoint =
        |node: usize| json!({"addresses": [rig.pod(node, 0).address(Family::V4)], "nodeName": format!("node-{node}")});
    let endpoints: Vec<Value> = (0..3).map(endpoint).collect();
    let slice = |name: &str| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "", "port": PORT}],
        })
    };
    let [web, shop] = NODE_PORTS;
    let items = [service("web", "Cluster", web), service("shop", "Local", shop), slice("web"), slice("shop")];
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}
