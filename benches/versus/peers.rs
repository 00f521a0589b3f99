//! Who takes part: how each is configured, started, recognised as ready, and ended.
//!
//! Each gets as many workers as there are CPUs. "As shipped" means the defaults that a package or a first page of the
//! manual gives; "at its best" means what its manual offers for this work.

use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use kube_relay::name::{Family, Protocol};
use kube_relay::serve::mmsg::connect_udp;

use crate::measure::cpus;
use crate::rig::{DualAddress, Namespace, Process};
use crate::stage::{DESCRIPTORS_PER_CONNECTION, DNAT_NODE, PORT, PROXY_NODE, Stage, TRAINS_PORT, version};
use crate::workload::{Ask, MESSAGE_BYTES};

/// How long a peer has until it answers.
const PATIENCE: Duration = Duration::from_secs(5);

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum PeerKind {
    /// The client talks to the pods: nothing in between but the node's forwarding.
    Direct,
    /// In-kernel DNAT, round robin: the floor for everything that forwards.
    Nft,
    /// Ours.
    KubeRelay,
    /// HAProxy as shipped: mode tcp, `option splice-auto`.
    Haproxy,
    /// HAProxy at its best for bulk: forced splice, pipes of 1 MiB.
    HaproxyBest,
    /// nginx stream as shipped; for UDP with `reuseport`, as several workers need it.
    Nginx,
    /// nginx stream with `reuseport` and larger buffers: of its own for TCP, of its listening socket for UDP.
    NginxBest,
    /// Ours, with a PROXY header for backends. Takes part only where it is named.
    KubeRelayHeader,
    /// Ours, with backends that see the client's own address. Takes part only where it is named.
    KubeRelayPreserve,
}

impl PeerKind {
    /// Everybody, in the order of the table.
    pub(crate) const ALL: [Self; 9] = [
        Self::Direct,
        Self::Nft,
        Self::KubeRelay,
        Self::KubeRelayHeader,
        Self::KubeRelayPreserve,
        Self::Haproxy,
        Self::HaproxyBest,
        Self::Nginx,
        Self::NginxBest,
    ];

    /// False for one that is compared with ourselves, and so is no peer.
    pub(crate) fn is_invited(self) -> bool {
        self.annotation().is_none()
    }

    fn is_ours(self) -> bool {
        self == Self::KubeRelay || self.annotation().is_some()
    }

    /// What its Service asks for, where that is what it is compared for.
    fn annotation(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::KubeRelayHeader => Some(("kube-relay.dev/proxy-protocol", "v2")),
            Self::KubeRelayPreserve => Some(("kube-relay.dev/source-address", "preserve")),
            _ => None,
        }
    }

    /// False where nothing but the kernel forwards.
    pub(crate) fn is_proxy(self) -> bool {
        !matches!(self, Self::Direct | Self::Nft)
    }

    /// False where it knows nothing of a protocol.
    pub(crate) fn speaks(self, protocol: Protocol) -> bool {
        protocol == Protocol::Tcp || !matches!(self, Self::Haproxy | Self::HaproxyBest | Self::KubeRelayHeader)
    }

    /// The number of its virtual address.
    pub(crate) fn vip(self) -> u8 {
        10 + self as u8
    }

    /// The number of the address for an instance that runs beside the first one.
    pub(crate) fn second_vip(self) -> u8 {
        100 + self as u8
    }

    /// Where it listens.
    fn node(self) -> usize {
        if self == Self::Nft { DNAT_NODE } else { PROXY_NODE }
    }
}

impl fmt::Display for PeerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Nft => "nft",
            Self::KubeRelay => "kube-relay",
            Self::Haproxy => "haproxy",
            Self::HaproxyBest => "haproxy-best",
            Self::Nginx => "nginx",
            Self::NginxBest => "nginx-best",
            Self::KubeRelayHeader => "kube-relay-header",
            Self::KubeRelayPreserve => "kube-relay-preserve",
        })
    }
}

/// A peer that is ready. Dropping it ends its processes.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Who it is.
    pub(crate) kind: PeerKind,
    protocol: Protocol,
    _process: Option<Process>,
    pids: Vec<u32>,
    v4: Vec<SocketAddr>,
    v6: Vec<SocketAddr>,
}

/// Why a peer does not take part.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Absence {
    /// The program was not found.
    #[error("{0} is not installed")]
    NotInstalled(&'static str),
    /// It needs a network of its own.
    #[error("not on loopback")]
    OnLoopback,
    /// It was started and did not answer.
    #[error("does not serve: {0}")]
    Silent(String),
    /// It could not be started.
    #[error("cannot be started: {0}")]
    Failed(#[source] io::Error),
}

impl Peer {
    /// Starts a peer on a virtual address and waits until it answers there.
    pub(crate) fn start(kind: PeerKind, protocol: Protocol, stage: &Stage, vip: u8) -> Result<Self, Absence> {
        if kind == PeerKind::Direct {
            let (v4, v6) = (stage.pods(PROXY_NODE, Family::V4), stage.pods(PROXY_NODE, Family::V6));
            return Ok(Self { kind, protocol, _process: None, pids: Vec::new(), v4, v6 });
        }
        let setting = Setting::new(kind, protocol, stage, vip).map_err(Absence::Failed)?;
        let (mut process, log) = setting.launch()?;
        let target = SocketAddr::new(setting.vip.v4, PORT);
        if kind == PeerKind::Nft {
            loaded(&mut process, &log)?;
        }
        let running = if kind == PeerKind::Nft { None } else { Some(&mut process) };
        answers(stage.rig.client(), (protocol, target), running, &log)?;
        let process = kind.is_proxy().then_some(process);
        let pids = process.as_ref().map(Process::pids).unwrap_or_default();
        let (v4, v6) = (vec![target], vec![SocketAddr::new(setting.vip.v6, PORT)]);
        Ok(Self { kind, protocol, _process: process, pids, v4, v6 })
    }

    /// The processes that do its work; none where the kernel does it.
    pub(crate) fn pids(&self) -> &[u32] {
        &self.pids
    }

    /// Where clients connect, in turn.
    pub(crate) fn targets(&self, family: Family) -> &[SocketAddr] {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// Its version and how it is set.
    pub(crate) fn describe(&self) -> String {
        let of = |program: &'static str| find(program).map_or_else(|_| program.into(), |path| version(&path, "-v"));
        match self.kind {
            PeerKind::Direct => "client to pods, forwarded by the node".into(),
            PeerKind::Nft => format!("{}, numgen inc dnat, own node", of("nft")),
            PeerKind::KubeRelay => version(Path::new(KUBE_RELAY), "--version"),
            PeerKind::KubeRelayHeader => "the same, with kube-relay.dev/proxy-protocol: v2".into(),
            PeerKind::KubeRelayPreserve => "the same, with kube-relay.dev/source-address: preserve".into(),
            PeerKind::Haproxy => format!("{}; mode tcp, splice-auto", of("haproxy")),
            PeerKind::HaproxyBest => "splice-request, splice-response, tune.pipesize 1048576".into(),
            PeerKind::Nginx if self.protocol == Protocol::Udp => format!("{}; stream, reuseport", of("nginx")),
            PeerKind::Nginx => format!("{}; stream", of("nginx")),
            PeerKind::NginxBest if self.protocol == Protocol::Udp => "reuseport, rcvbuf 4m, sndbuf 4m".into(),
            PeerKind::NginxBest => "proxy_buffer_size 256k, reuseport".into(),
        }
    }
}

/// The binary under test.
pub(crate) const KUBE_RELAY: &str = env!("CARGO_BIN_EXE_kube-relay");

/// What a configuration is made of.
struct Setting<'a> {
    kind: PeerKind,
    protocol: Protocol,
    stage: &'a Stage,
    vip: DualAddress,
    /// A prefix for its files.
    files: PathBuf,
}

impl<'a> Setting<'a> {
    fn new(kind: PeerKind, protocol: Protocol, stage: &'a Stage, vip_number: u8) -> io::Result<Self> {
        let vip = stage.rig.vip(kind.node(), vip_number)?;
        Ok(Self { kind, protocol, stage, vip, files: stage.folder().join(format!("{kind}-{vip_number}")) })
    }

    /// Starts the program; its output goes to the file that is returned.
    fn launch(&self) -> Result<(Process, PathBuf), Absence> {
        let (program, arguments, configuration) = match self.kind {
            PeerKind::Nft if self.stage.rig.on_loopback() => return Err(Absence::OnLoopback),
            PeerKind::Nft => (find("nft")?, vec!["-f"], self.nft()),
            PeerKind::Haproxy | PeerKind::HaproxyBest => (find("haproxy")?, vec!["-db", "-f"], self.haproxy()),
            PeerKind::Nginx | PeerKind::NginxBest => (find("nginx")?, vec!["-e", "stderr", "-c"], self.nginx()),
            PeerKind::KubeRelay | PeerKind::KubeRelayHeader | PeerKind::KubeRelayPreserve => {
                (KUBE_RELAY.into(), vec!["run", "-f"], self.manifest())
            }
            PeerKind::Direct => unreachable!("nothing is started for it"),
        };
        let file = self.files.with_extension(if self.kind.is_ours() { "json" } else { "conf" });
        fs::write(&file, configuration).map_err(Absence::Failed)?;
        let mut command = Command::new(program);
        command.args(arguments).arg(&file);
        if self.kind.is_ours() {
            command.args(RELAY_FLAGS);
        }
        let log = self.files.with_extension("log");
        let process = start(command, self.stage.rig.node(self.kind.node()), &log).map_err(Absence::Failed)?;
        Ok((process, log))
    }

    fn pods(&self, family: Family) -> Vec<SocketAddr> {
        self.stage.pods(self.kind.node(), family)
    }

    /// The families that have addresses of their own here.
    fn families(&self) -> &'static [Family] {
        self.stage.rig.families()
    }

    fn ports(&self) -> &'static [u16] {
        if self.protocol == Protocol::Udp { &[PORT, TRAINS_PORT] } else { &[PORT] }
    }

    fn listen(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.vip.of(family), PORT)
    }

    fn nft(&self) -> String {
        let dnat = |family: Family| {
            let (ip, pods) = (if family == Family::V4 { "ip" } else { "ip6" }, self.pods(family));
            let map: Vec<_> = pods.iter().enumerate().map(|(i, pod)| format!("{i} : {}", pod.ip())).collect();
            let ports: Vec<_> = self.ports().iter().map(u16::to_string).collect();
            format!(
                "    {ip} daddr {} {} dport {{ {} }} dnat {ip} to numgen inc mod {} map {{ {} }}",
                self.vip.of(family),
                self.protocol.to_string().to_lowercase(),
                ports.join(", "),
                pods.len(),
                map.join(", ")
            )
        };
        let rules: Vec<_> = self.families().iter().map(|&family| dnat(family)).collect();
        format!(
            "table inet versus {{\n  chain prerouting {{\n    type nat hook prerouting priority dstnat;\n{}\n  }}\n}}\n",
            rules.join("\n")
        )
    }

    fn haproxy(&self) -> String {
        let best = self.kind == PeerKind::HaproxyBest;
        let connections = self.stage.fitting(20_000, DESCRIPTORS_PER_CONNECTION);
        let mut text = format!("global\n  nbthread {}\n  maxconn {connections}\n", cpus());
        text += if best { "  tune.pipesize 1048576\n" } else { "" };
        text += "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n";
        text += if best { "  option splice-request\n  option splice-response\n" } else { "  option splice-auto\n" };
        for &family in self.families() {
            let _ = write!(text, "listen {family:?}\n  bind {}\n  balance roundrobin\n", self.listen(family));
            for (i, pod) in self.pods(family).iter().enumerate() {
                let _ = writeln!(text, "  server pod{i} {pod}");
            }
        }
        text
    }

    fn nginx(&self) -> String {
        let best = self.kind == PeerKind::NginxBest;
        let (listening, proxying) = match (self.protocol, best) {
            (Protocol::Udp, true) => (" udp reuseport rcvbuf=4m sndbuf=4m", "    proxy_timeout 60s;\n"),
            (Protocol::Udp, false) => (" udp reuseport", "    proxy_timeout 60s;\n"),
            (_, true) => (" reuseport", "    proxy_buffer_size 256k;\n"),
            (_, false) => ("", ""),
        };
        let mut text = format!(
            "{}user root;\ndaemon off;\nworker_processes {};\npid {};\nerror_log stderr crit;\nevents {{\n  \
             worker_connections {};\n}}\nstream {{\n",
            stream_module(),
            cpus(),
            self.files.with_extension("pid").display(),
            self.stage.fitting(20_000, 1),
        );
        for (family, port) in
            self.families().iter().flat_map(|family| self.ports().iter().map(move |port| (family, port)))
        {
            let _ = writeln!(text, "  upstream {family:?}_{port} {{");
            for mut pod in self.pods(*family) {
                pod.set_port(*port);
                let _ = writeln!(text, "    server {pod};");
            }
            let listen = SocketAddr::new(self.vip.of(*family), *port);
            let _ = write!(
                text,
                "  }}\n  server {{\n    listen {listen}{listening};\n    proxy_pass {family:?}_{port};\n{proxying}  }}\n"
            );
        }
        text + "}\n"
    }

    fn manifest(&self) -> String {
        let ips: Vec<_> = self.families().iter().map(|&family| self.vip.of(family)).collect();
        let ports: Vec<_> = self.ports().iter().map(|&port| (self.protocol, port)).collect();
        let mut service = service("versus", &ips, &ports);
        if let Some((annotation, value)) = self.kind.annotation() {
            service["metadata"]["annotations"] = serde_json::json!({ annotation: value });
        }
        let mut items = vec![service];
        items.extend(self.families().iter().map(|&family| slice("versus", &self.pods(family), &ports)));
        list(items)
    }
}

/// What every run of kube-relay gets: the Services of the file, nothing else.
pub(crate) const RELAY_FLAGS: [&str; 6] =
    ["--nodeport-addresses", "localhost", "--metrics-bind-address", "none", "--healthz-bind-address", "none"];

/// A Service with these ports.
pub(crate) fn service(name: &str, ips: &[IpAddr], of: &[(Protocol, u16)]) -> serde_json::Value {
    let families: Vec<_> = ips.iter().map(|&ip| Family::of(ip)).collect();
    serde_json::json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "default" },
        "spec": {
            "clusterIP": ips.first(), "clusterIPs": ips, "ipFamilies": families,
            "ipFamilyPolicy": if ips.len() > 1 { "PreferDualStack" } else { "SingleStack" },
            "ports": ports(of),
        },
    })
}

/// The EndpointSlice of one family for it.
pub(crate) fn slice(service: &str, backends: &[SocketAddr], of: &[(Protocol, u16)]) -> serde_json::Value {
    let family = backends.first().map_or(Family::V4, |backend| Family::of(backend.ip()));
    let endpoints: Vec<_> = backends.iter().map(|backend| serde_json::json!({ "addresses": [backend.ip()] })).collect();
    serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{}", family.to_string().to_lowercase()), "namespace": "default",
            "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": family, "endpoints": endpoints, "ports": ports(of),
    })
}

fn ports(of: &[(Protocol, u16)]) -> Vec<serde_json::Value> {
    let port = |&(protocol, port): &(Protocol, u16)| {
        let protocol = protocol.to_string();
        let name = format!("{}-{port}", protocol.to_lowercase());
        serde_json::json!({ "name": name, "port": port, "protocol": protocol })
    };
    of.iter().map(port).collect()
}

/// One document with all of them.
pub(crate) fn list(items: Vec<serde_json::Value>) -> String {
    serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()
}

/// Starts a program in a namespace, with its output in a file.
pub(crate) fn start(mut command: Command, inside: &Namespace, log: &Path) -> io::Result<Process> {
    let output = File::create(log)?;
    command.stdout(output.try_clone()?).stderr(output);
    inside.spawn(command)
}

/// Looks where programs are, also those that are only root's by custom.
fn find(program: &'static str) -> Result<PathBuf, Absence> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    let mut places = folders.map(|folder| folder.join(program));
    places.find(|place| place.is_file()).ok_or(Absence::NotInstalled(program))
}

/// Distributions ship nginx's stream as a module to load; elsewhere it is built in.
fn stream_module() -> String {
    let folders = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/local/lib/nginx/modules"];
    let mut modules = folders.iter().map(|folder| Path::new(folder).join("ngx_stream_module.so"));
    modules
        .find(|module| module.exists())
        .map_or(String::new(), |module| format!("load_module {};\n", module.display()))
}

/// Waits for a program that only loads rules.
fn loaded(process: &mut Process, log: &Path) -> Result<(), Absence> {
    match process.wait().map_err(Absence::Failed)? {
        status if status.success() => Ok(()),
        _ => Err(Absence::Silent(last_words(log))),
    }
}

/// Waits until a message is answered, as long as the program runs.
fn answers(
    client: &Namespace,
    (protocol, target): (Protocol, SocketAddr),
    mut process: Option<&mut Process>,
    log: &Path,
) -> Result<(), Absence> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let exchange = if protocol == Protocol::Udp { exchange_datagrams } else { exchange };
        let Err(error) = client.run(|| exchange(target)) else { return Ok(()) };
        if let Some(process) = process.as_deref_mut()
            && let Some(status) = process.ended().map_err(Absence::Failed)?
        {
            return Err(Absence::Silent(format!("{status}: {}", last_words(log))));
        }
        if Instant::now() > deadline {
            return Err(Absence::Silent(format!("{target}: {error}; {}", last_words(log))));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn exchange(target: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[Ask::Answer.byte(); MESSAGE_BYTES])?;
    stream.read_exact(&mut [0; MESSAGE_BYTES])
}

fn exchange_datagrams(target: SocketAddr) -> io::Result<()> {
    let socket = connect_udp(target)?;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    socket.send(&[Ask::Answer.byte(); MESSAGE_BYTES])?;
    socket.recv(&mut [0; MESSAGE_BYTES]).map(drop)
}

/// The end of what a program has printed, on one line.
pub(crate) fn last_words(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().rev().take(2).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join(" / ")
}
