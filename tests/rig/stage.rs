//! A relay on node 0 of the rig, backends in pods, and clients that tell what they met.
//!
//! What is asked, and what should come of it, is in the cases (`verdicts`).

use std::fmt::{self, Write as _};
use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::mem;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use rustix::process::{Pid, Signal, kill_process};
use socket2::SockRef;
use tempfile::{NamedTempFile, TempDir};

use crate::rig::{DualAddress, FAMILIES, Namespace, Process, Rig};

/// No case waits longer for anything. Reached only where something is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// What hears nothing for so long gets no answer: on these cables an answer takes a thousandth of it.
const SILENCE: Duration = Duration::from_millis(500);

/// How long a relay leaves routes that nobody needs: cases wait for them to go.
pub(crate) const LINGER: Duration = Duration::from_secs(1);

/// The Service's port, and its pods'.
pub(crate) const PORT: u16 = 80;
pub(crate) const TCP_BACKEND_PORT: u16 = 8000;
pub(crate) const UDP_BACKEND_PORT: u16 = 8053;
pub(crate) const NODE_PORT: u16 = 30_080;
/// A second port of the Service, of TCP alone.
pub(crate) const TCP_ONLY_PORT: u16 = 81;
/// A port where nobody listens: the kernel itself answers there.
pub(crate) const CLOSED: u16 = 9;

/// How a client reaches the Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    ClusterIp,
    ExternalIp,
    LoadBalancerIp,
    NodePort,
}

pub(crate) use Entry::{ClusterIp, ExternalIp, LoadBalancerIp, NodePort};

/// All of them.
pub(crate) const ENTRIES: [Entry; 4] = [ClusterIp, ExternalIp, LoadBalancerIp, NodePort];

/// What became of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A pod answered, and told its name and the source that it saw.
    Answer { pod: String, source: IpAddr },
    /// Connection refused, port unreachable.
    Refused,
    /// No answer at all.
    Silence,
    /// The asking side's own kernel did not let it out.
    Forbidden,
    /// Anything else.
    Other(String),
}

impl Outcome {
    fn of(error: &io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::Silence,
            ErrorKind::PermissionDenied => Self::Forbidden,
            _ => Self::Other(error.to_string()),
        }
    }

    /// The pod that answered.
    pub(crate) fn pod(&self) -> Option<&str> {
        match self {
            Self::Answer { pod, .. } => Some(pod),
            _ => None,
        }
    }
}

/// A relay on node 0 and the virtual addresses that lead there.
pub(crate) struct Stage {
    pub(crate) rig: Rig,
    pub(crate) relay: Process,
    folder: TempDir,
    log: Log,
    cluster_ip: DualAddress,
    external_ip: DualAddress,
    load_balancer_ip: DualAddress,
}

impl Stage {
    /// Starts a relay with a Service, node ports on the node's own addresses.
    pub(crate) fn start(rig: Rig, web: &Web) -> Self {
        Self::start_with(rig, web, &["--nodeport-addresses", "primary"])
    }

    /// Starts a relay with more flags.
    pub(crate) fn start_with(rig: Rig, web: &Web, flags: &[&str]) -> Self {
        let vip = |number| rig.vip(0, number).expect("an address can be added");
        let [cluster_ip, load_balancer_ip] = [vip(1), vip(3)];
        // An external IP that is an address of the node is refused.
        let external_ip = rig.routed_vip(0, 2).expect("a route can be added");
        let with_flags = |command: &mut Command| {
            command.args(flags);
        };
        Self::launch(rig, [cluster_ip, external_ip, load_balancer_ip], web, with_flags)
    }

    /// As [`start_with`](Self::start_with), but no address of the Service is local to the node: that is left to the relay.
    /// Everybody's way to them is by the node.
    pub(crate) fn start_bare(rig: Rig, web: &Web, prepare: impl FnOnce(&mut Command)) -> Self {
        let addresses = [1, 2, 3].map(Rig::vip_address);
        lead_to_node(&rig, 0);
        Self::launch(rig, addresses, web, prepare)
    }

    fn launch(rig: Rig, addresses: [DualAddress; 3], web: &Web, prepare: impl FnOnce(&mut Command)) -> Self {
        let [cluster_ip, external_ip, load_balancer_ip] = addresses;
        let folder = readable_folder();
        let node = rig.node(0);
        tell_of_each_closed_port(node);
        fs::write(folder.path().join("web.yaml"), web.to_string()).expect("the folder can be written");
        let log = Log::default();
        let relay = spawn(node, folder.path(), &log, prepare);
        let stage = Self { rig, relay, folder, log, cluster_ip, external_ip, load_balancer_ip };
        stage.until_ready();
        stage
    }

    /// Starts another relay with the same manifests, on another node.
    pub(crate) fn start_on(&self, i: usize, flags: &[&str]) -> Process {
        spawn(self.rig.node(i), self.folder.path(), &self.log, |command| {
            command.args(flags);
        })
    }

    /// Gives the relay away. In its place is a program that ends at once.
    pub(crate) fn take_relay(&mut self) -> Process {
        let ended = self.rig.node(0).spawn(Command::new("true")).expect("it starts");
        mem::replace(&mut self.relay, ended)
    }

    /// Starts another relay with the same manifests on the same node.
    pub(crate) fn start_next(&self, prepare: impl FnOnce(&mut Command)) -> Process {
        spawn(self.rig.node(0), self.folder.path(), &self.log, prepare)
    }

    /// Starts another relay, after the last has [ended](Self::end).
    pub(crate) fn start_again(&mut self, prepare: impl FnOnce(&mut Command)) {
        self.relay = self.start_next(prepare);
        self.until_ready();
    }

    /// Starts another relay beside this one, with other manifests. It logs to the same place.
    pub(crate) fn start_beside(&self, manifests: &str) -> Neighbour {
        let folder = readable_folder();
        fs::write(folder.path().join("web.yaml"), manifests).expect("the folder can be written");
        let relay = spawn(self.rig.node(0), folder.path(), &self.log, |command| {
            command.args(["--metrics-bind-address", "127.0.0.1:10349", "--healthz-bind-address", "127.0.0.1:10356"]);
        });
        Neighbour { _relay: relay, _folder: folder }
    }

    /// Sends the relay a signal that it does not end by.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it is ours");
    }

    /// Ends the relay by a signal.
    pub(crate) fn end(&mut self, signal: Signal) {
        self.signal(signal);
        self.relay.wait().expect("it is ours");
    }

    fn pid(&self) -> Pid {
        i32::try_from(self.relay.pids()[0]).ok().and_then(Pid::from_raw).expect("a pid")
    }

    /// What the relay has logged.
    pub(crate) fn log(&self) -> String {
        self.log.text()
    }

    fn until_ready(&self) {
        until("the first state is served", || is_ready(self.rig.node(0)));
    }

    /// Changes the Service, and waits until the relay has done what follows.
    pub(crate) fn change(&self, web: &Web) {
        let before = self.revision();
        self.write(&web.to_string());
        until("the change is made", || self.revision() > before);
    }

    /// Writes the manifests anew, and waits for nothing.
    pub(crate) fn write(&self, manifests: &str) {
        write(self.folder.path(), manifests);
    }

    /// As [`change`](Self::change), where it is another state than the last one.
    pub(crate) fn change_if_other(&self, web: &Web) {
        let last = fs::read_to_string(self.folder.path().join("web.yaml")).expect("it was written");
        if last != web.to_string() {
            self.change(web);
        }
    }

    /// Where an entry is.
    pub(crate) fn at(&self, entry: Entry, family: Family) -> SocketAddr {
        match entry {
            ClusterIp => SocketAddr::new(self.cluster_ip.of(family), PORT),
            ExternalIp => SocketAddr::new(self.external_ip.of(family), PORT),
            LoadBalancerIp => SocketAddr::new(self.load_balancer_ip.of(family), PORT),
            NodePort => SocketAddr::new(self.rig.node(0).address(family), NODE_PORT),
        }
    }

    /// Asks at an entry in both families, over TCP and UDP, until each outcome is as it should be.
    pub(crate) fn expect(
        &self,
        from: &Namespace,
        entry: Entry,
        expected: &str,
        right: impl Fn(&Outcome) -> bool + Sync,
    ) {
        thread::scope(|scope| {
            for family in FAMILIES {
                let (to, right) = (self.at(entry, family), &right);
                scope.spawn(move || expect_at(from, to, ask_tcp, &format!("{entry:?} over TCP {expected}"), right));
                scope.spawn(move || expect_at(from, to, ask_udp, &format!("{entry:?} over UDP {expected}"), right));
            }
        });
    }

    /// One of these pods answers.
    pub(crate) fn served(&self, from: &Namespace, entry: Entry, pods: &[&str]) {
        let right = |outcome: &Outcome| outcome.pod().is_some_and(|pod| pods.contains(&pod));
        self.expect(from, entry, &format!("is answered by one of {pods:?}"), right);
    }

    /// The kernel says that nobody is there.
    pub(crate) fn refused(&self, from: &Namespace, entry: Entry) {
        self.expect(from, entry, "is refused", |outcome| *outcome == Outcome::Refused);
    }

    /// Nobody says anything.
    pub(crate) fn silent(&self, from: &Namespace, entry: Entry) {
        self.expect(from, entry, "gets no answer", |outcome| *outcome == Outcome::Silence);
    }

    /// The same at each of these ways, asked all at once: who gets no answer waits for it.
    pub(crate) fn all_silent<'a>(&self, ways: impl IntoIterator<Item = (&'a Namespace, Entry)>) {
        thread::scope(|scope| {
            for (from, entry) in ways {
                scope.spawn(move || self.silent(from, entry));
            }
        });
    }

    /// Nanoseconds of CPU that the relay has used.
    pub(crate) fn cpu_time(&self) -> Duration {
        let pid = self.relay.pids()[0];
        let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the relay runs").flatten();
        let used = threads.filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok());
        used.filter_map(|text| text.split(' ').next()?.parse().ok()).map(Duration::from_nanos).sum()
    }

    /// A number from the relay's metrics, summed over series whose text contains `label`.
    pub(crate) fn metric(&self, name: &str, label: &str) -> u64 {
        metric(self.rig.node(0), name, label)
    }

    /// True where the relay's report names a problem so.
    pub(crate) fn reports(&self, reason: &str) -> bool {
        reports(self.rig.node(0), reason)
    }

    /// What the relay answers of a Service, as JSON; empty where it does not.
    pub(crate) fn report_of(&self, service: &str) -> String {
        get(self.rig.node(0), &format!("/status/{service}")).unwrap_or_default()
    }

    fn revision(&self) -> u64 {
        revision(self.rig.node(0))
    }
}

/// A second relay on the node. Ends when dropped.
pub(crate) struct Neighbour {
    _relay: Process,
    _folder: TempDir,
}

/// A folder that every user can read: a relay may run as another one.
fn readable_folder() -> TempDir {
    let everybody = Permissions::from_mode(0o755);
    tempfile::Builder::new().permissions(everybody).tempdir().expect("a folder can be made")
}

/// Routes what the virtual addresses are taken from to node `i`, from everywhere: one route for each family.
pub(crate) fn lead_to_node(rig: &Rig, i: usize) {
    for (network, prefix) in [("10.96.0.0", 12), ("fd96::", 64)] {
        let network = (network.parse().expect("an address"), prefix);
        rig.network_to_node(i, network).expect("a route can be added");
    }
}

/// Otherwise the kernel tells of a closed UDP port once a second.
pub(crate) fn tell_of_each_closed_port(node: &Namespace) {
    for limit in ["net/ipv4/icmp_ratelimit", "net/ipv6/icmp/ratelimit"] {
        node.sysctl(limit, "0").expect("it is ours");
    }
}

/// Puts manifests in place of those of a folder, at once.
pub(crate) fn write(folder: &Path, manifests: &str) {
    let new = folder.join(".web.yaml.new");
    fs::write(&new, manifests).expect("the folder can be written");
    fs::rename(&new, folder.join("web.yaml")).expect("the folder can be written");
}

/// A number from the metrics of the relay on a node, summed over series whose text contains `label`.
pub(crate) fn metric(node: &Namespace, name: &str, label: &str) -> u64 {
    let text = get(node, "/metrics").unwrap_or_default();
    let series = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
    series.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// True where the report of the relay on a node names a problem so.
pub(crate) fn reports(node: &Namespace, reason: &str) -> bool {
    get(node, "/status").is_some_and(|status| status.contains(&format!("\"reason\":\"{reason}\"")))
}

/// How many states the relay on a node has taken so far.
pub(crate) fn revision(node: &Namespace) -> u64 {
    let status = get(node, "/status").unwrap_or_default();
    let after = status.split("\"revision\":").nth(1).unwrap_or_default();
    after.split(|byte: char| !byte.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// True where the relay on a node serves its first state.
pub(crate) fn is_ready(node: &Namespace) -> bool {
    get(node, "/readyz").is_some_and(|answer| answer.contains(" 200 "))
}

/// What the relay on a node answers, head and body; `None` where nobody does.
fn get(node: &Namespace, path: &str) -> Option<String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let answer = node.run(|| {
        let mut stream = TcpStream::connect("127.0.0.1:10249")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    answer.ok()
}

/// What a relay logs. Printed where a case fails.
pub(crate) struct Log(NamedTempFile);

impl Default for Log {
    fn default() -> Self {
        Self(NamedTempFile::new().expect("a file can be made"))
    }
}

impl Log {
    /// All of it, so far.
    pub(crate) fn text(&self) -> String {
        fs::read_to_string(self.0.path()).expect("it was made")
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the relay's log:\n{}", self.text());
        }
    }
}

/// Starts a relay on a node. `prepare` may change how.
pub(crate) fn spawn(node: &Namespace, folder: &Path, log: &Log, prepare: impl FnOnce(&mut Command)) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    command.args(["run", "--node-name", node.name(), "--cluster-cidr", "10.82.0.0/16,fd82::/16"]);
    command.args(["--allowed-external-cidrs", "10.96.0.0/24,fd96::/64"]);
    command.arg("--node-address").arg(format!("{},{}", node.address(Family::V4), node.address(Family::V6)));
    command.arg("-f").arg(folder).args(["--log-level", "info", "--log-format", "text"]);
    command.arg("--vip-routes-linger").arg(format!("{}s", LINGER.as_secs()));
    prepare(&mut command);
    command.stderr(log.0.as_file().try_clone().expect("descriptors are left"));
    node.spawn(command).expect("the relay starts")
}

/// Asks at one address until the outcome is right.
pub(crate) fn expect_at(
    from: &Namespace,
    to: SocketAddr,
    ask: impl Fn(SocketAddr) -> Outcome + Sync,
    what: &str,
    right: impl Fn(&Outcome) -> bool,
) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let outcome = from.run(|| Ok(ask(to))).expect("the namespace is ours");
        if right(&outcome) {
            return;
        }
        // What is sent while a shard takes a change up may be lost, or heard: it is asked again.
        assert!(Instant::now() < deadline, "from {from:?}, {to}, {what}: {outcome:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A new connection with one question.
pub(crate) fn ask_tcp(to: SocketAddr) -> Outcome {
    let outcome = TcpStream::connect_timeout(&to, SILENCE).and_then(|mut stream| ask_on(&mut stream));
    outcome.unwrap_or_else(|error| Outcome::of(&error))
}

/// A question on an open connection.
pub(crate) fn ask_on(stream: &mut TcpStream) -> io::Result<Outcome> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"?\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(answer(line.trim_end()))
}

/// A datagram from a port of its own. Only an answer from where it was sent to counts.
pub(crate) fn ask_udp(to: SocketAddr) -> Outcome {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let exchange = || {
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        ask_udp_on(&socket)
    };
    exchange().unwrap_or_else(|error| Outcome::of(&error))
}

/// A datagram of a flow.
pub(crate) fn ask_udp_on(socket: &UdpSocket) -> io::Result<Outcome> {
    socket.set_read_timeout(Some(SILENCE))?;
    socket.send(b"?")?;
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer)?;
    Ok(answer(&String::from_utf8_lossy(&buffer[..length])))
}

pub(crate) fn answer(text: &str) -> Outcome {
    let parsed = text.split_once(' ').and_then(|(pod, source)| Some((pod.to_owned(), source.parse().ok()?)));
    match parsed {
        Some((pod, source)) => Outcome::Answer { pod, source },
        None => Outcome::Other(format!("answered {text:?}")),
    }
}

/// Backends in a pod, of both families and protocols, which tell the pod's name and whom they see. End when dropped.
pub(crate) struct Backends {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Backends {
    /// Starts them in some pods of the rig.
    pub(crate) fn start<'a>(pods: impl IntoIterator<Item = &'a Namespace>) -> Self {
        let mut backends = Self { stop: Arc::default(), threads: Vec::new() };
        pods.into_iter().for_each(|pod| backends.start_in(pod));
        backends
    }

    /// Starts them on one machine, at these addresses of it.
    pub(crate) fn start_at(machine: &Namespace, addresses: DualAddress) -> Self {
        let mut backends = Self { stop: Arc::default(), threads: Vec::new() };
        backends.start_on(machine, addresses);
        backends
    }

    fn start_in(&mut self, pod: &Namespace) {
        self.start_on(pod, DualAddress { v4: pod.address(Family::V4), v6: pod.address(Family::V6) });
    }

    fn start_on(&mut self, pod: &Namespace, addresses: DualAddress) {
        for family in FAMILIES {
            let [tcp, udp] =
                [TCP_BACKEND_PORT, UDP_BACKEND_PORT].map(|port| SocketAddr::new(addresses.of(family), port));
            let listener = pod.run(|| TcpListener::bind(tcp)).expect("the pod's address is free");
            let socket = pod.run(|| UdpSocket::bind(udp)).expect("the pod's address is free");
            let (name, stop) = (pod.name().to_owned(), Arc::clone(&self.stop));
            self.threads.push(thread::spawn(move || serve_tcp(&listener, &name, &stop)));
            let (name, stop) = (pod.name().to_owned(), Arc::clone(&self.stop));
            self.threads.push(thread::spawn(move || serve_udp(&socket, &name, &stop)));
        }
    }
}

impl Drop for Backends {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // A panic has been printed.
        }
    }
}

/// How soon a backend sees that it is to end.
const TICK: Duration = Duration::from_millis(50);

/// Tells each client a name and whom it sees, line by line.
pub(crate) fn serve_tcp(listener: &TcpListener, name: &str, stop: &AtomicBool) {
    SockRef::from(listener).set_read_timeout(Some(TICK)).expect("an option"); // It limits accept, too.
    thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) {
            let Ok((stream, peer)) = listener.accept() else { continue };
            scope.spawn(move || answer_lines(stream, &format!("{name} {}\n", peer.ip()), stop));
        }
    });
}

fn answer_lines(mut stream: TcpStream, line: &str, stop: &AtomicBool) {
    let mut buffer = [0; 256];
    stream.set_read_timeout(Some(TICK)).expect("an option");
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) if stream.write_all(line.as_bytes()).is_err() => return,
            Err(error) if error.kind() != ErrorKind::WouldBlock => return,
            _ => {}
        }
    }
}

/// The same, datagram by datagram.
pub(crate) fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = [0; 256];
    socket.set_read_timeout(Some(TICK)).expect("an option");
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer);
        }
    }
}

/// The Service `web` and its slices, in both families. Its text is YAML.
#[derive(Clone, Debug, Default)]
pub(crate) struct Web {
    /// From `internalTrafficPolicy`; empty: the default.
    pub(crate) internal_policy: &'static str,
    /// From `externalTrafficPolicy`; empty: the default.
    pub(crate) external_policy: &'static str,
    /// From the label `service.kubernetes.io/service-proxy-name`; empty: none.
    pub(crate) proxy_name: &'static str,
    /// From `loadBalancerSourceRanges`.
    pub(crate) source_ranges: Vec<String>,
    /// From the annotation `kube-relay.dev/allow-from`.
    pub(crate) allow_from: Option<String>,
    /// True with the annotation `kube-relay.dev/source-address: preserve`.
    pub(crate) preserves: bool,
    /// True with the annotation `kube-relay.dev/accept-proxy: "true"`.
    pub(crate) accepts_proxy: bool,
    /// In the order of the rig.
    pub(crate) pods: Vec<Pod>,
    /// More documents.
    pub(crate) more: String,
}

/// An endpoint.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    addresses: DualAddress,
    node: String,
    conditions: &'static str,
}

impl Pod {
    /// A ready one: pod `j` of node `i`.
    pub(crate) fn of(rig: &Rig, i: usize, j: usize) -> Self {
        let pod = rig.pod(i, j);
        let addresses = DualAddress { v4: pod.address(Family::V4), v6: pod.address(Family::V6) };
        Self { addresses, node: format!("node{i}"), conditions: "ready: true" }
    }

    /// A ready one that is a machine of its own.
    pub(crate) fn at(addresses: DualAddress, node: &str) -> Self {
        Self { addresses, node: node.to_owned(), conditions: "ready: true" }
    }

    /// Ends, and still serves.
    pub(crate) fn terminating(self) -> Self {
        Self { conditions: "ready: false, serving: true, terminating: true", ..self }
    }

    /// As `ended`, of a Service that publishes pods that are not ready: its slices call them ready.
    pub(crate) fn published(self) -> Self {
        Self { conditions: "ready: true, serving: false, terminating: true", ..self }
    }

    /// Ends, and serves no more.
    pub(crate) fn ended(self) -> Self {
        Self { conditions: "ready: false, serving: false, terminating: true", ..self }
    }
}

impl Web {
    /// With these endpoints.
    pub(crate) fn with(self, pods: impl Into<Vec<Pod>>) -> Self {
        Self { pods: pods.into(), ..self }
    }
}

impl fmt::Display for Web {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n")?;
        if !self.proxy_name.is_empty() {
            writeln!(f, "  labels: {{service.kubernetes.io/service-proxy-name: {}}}", self.proxy_name)?;
        }
        let allowed = self.allow_from.iter().map(|list| format!("kube-relay.dev/allow-from: '{list}'"));
        let preserves = self.preserves.then(|| "kube-relay.dev/source-address: preserve".to_owned());
        let accepts = self.accepts_proxy.then(|| "kube-relay.dev/accept-proxy: 'true'".to_owned());
        let annotations: Vec<String> = allowed.chain(preserves).chain(accepts).collect();
        if !annotations.is_empty() {
            writeln!(f, "  annotations: {{{}}}", annotations.join(", "))?;
        }
        f.write_str("spec:\n  type: LoadBalancer\n")?;
        f.write_str("  clusterIPs: [10.96.0.1, 'fd96::1']\n  clusterIP: 10.96.0.1\n")?;
        f.write_str("  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n")?;
        f.write_str("  externalIPs: [10.96.0.2, 'fd96::2']\n")?;
        for (field, policy) in [("internal", self.internal_policy), ("external", self.external_policy)] {
            if !policy.is_empty() {
                writeln!(f, "  {field}TrafficPolicy: {policy}")?;
            }
        }
        if !self.source_ranges.is_empty() {
            writeln!(f, "  loadBalancerSourceRanges: ['{}']", self.source_ranges.join("', '"))?;
        }
        f.write_str("  ports:\n")?;
        writeln!(f, "  - {{name: tcp, port: {PORT}, targetPort: {TCP_BACKEND_PORT}, nodePort: {NODE_PORT}}}")?;
        writeln!(
            f,
            "  - {{name: udp, protocol: UDP, port: {PORT}, targetPort: {UDP_BACKEND_PORT}, nodePort: {NODE_PORT}}}"
        )?;
        writeln!(f, "  - {{name: only, port: {TCP_ONLY_PORT}, targetPort: {TCP_BACKEND_PORT}}}")?;
        f.write_str("status: {loadBalancer: {ingress: [{ip: 10.96.0.3}, {ip: 'fd96::3'}]}}\n")?;
        for family in FAMILIES {
            self.slice(f, family)?;
        }
        f.write_str(&self.more)
    }
}

impl Web {
    fn slice(&self, f: &mut fmt::Formatter<'_>, family: Family) -> fmt::Result {
        write!(
            f,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-{}, ",
            format!("{family}").to_lowercase()
        )?;
        writeln!(f, "labels: {{kubernetes.io/service-name: web}}}}\naddressType: {family}\nports:")?;
        writeln!(f, "- {{name: tcp, port: {TCP_BACKEND_PORT}}}\n- {{name: only, port: {TCP_BACKEND_PORT}}}")?;
        writeln!(f, "- {{name: udp, protocol: UDP, port: {UDP_BACKEND_PORT}}}\nendpoints:")?;
        let mut endpoints = String::new();
        for Pod { addresses, node, conditions } in &self.pods {
            let address = addresses.of(family);
            writeln!(endpoints, "- {{addresses: ['{address}'], nodeName: {node}, conditions: {{{conditions}}}}}")?;
        }
        f.write_str(&endpoints)
    }
}

/// Waits for a condition that no descriptor tells of.
pub(crate) fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
