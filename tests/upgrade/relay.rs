//! The program with a state folder, started by hand or by its predecessor.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open};
use socket2::{SockRef, Type};

#[cfg(feature = "kubernetes")]
use crate::support::api_server::ApiServer;
use crate::support::manifest::Manifest;
use crate::support::site::Site;
use crate::support::{DEADLINE, seen};

/// The program as cargo has built it.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_kube-relay");

/// The file of its manifests.
const MANIFEST: &str = "web.yaml";

/// A folder with manifests and state, and all processes that were started with it. These are killed when it is dropped,
/// whoever started them.
pub(crate) struct House {
    site: Site,
    folder: tempfile::TempDir,
    /// Where its objects come from.
    source: Vec<OsString>,
    node_addresses: String,
    started: Vec<Child>,
}

impl House {
    pub(crate) fn new(site: Site, manifest: &Manifest) -> Self {
        Self::of_all(site, &[manifest])
    }

    fn of_all(site: Site, manifests: &[&Manifest]) -> Self {
        let house = Self::empty(site);
        let manifests: Vec<_> = manifests.iter().map(ToString::to_string).collect();
        fs::write(house.manifest(), manifests.join("\n---\n")).expect("the test's folder can be written");
        house
    }

    fn empty(site: Site) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        fs::create_dir(folder.path().join("state")).expect("the test's folder can be written");
        let source = vec!["-f".into(), folder.path().join(MANIFEST).into()];
        Self { site, folder, source, node_addresses: format!("{}/32", site.node_ip()), started: Vec::new() }
    }

    /// With node ports at addresses that this machine has: of the site's own it has none.
    pub(crate) fn with_node_addresses(mut self, networks: &str) -> Self {
        networks.clone_into(&mut self.node_addresses);
        self
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub(crate) fn manifest(&self) -> PathBuf {
        self.folder.path().join(MANIFEST)
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        SocketAddr::new(self.site.client(9), 10249)
    }

    /// Starts one that takes over, or the first one; does not wait for it.
    pub(crate) fn start(&mut self, prepare: impl FnOnce(&mut Command)) -> u32 {
        self.spawn(Command::new(BINARY), prepare)
    }

    /// The same, by another name.
    pub(crate) fn start_program(&mut self, program: &Path, prepare: impl FnOnce(&mut Command)) -> u32 {
        self.spawn(Command::new(program), prepare)
    }

    /// The same, by another program; that one's process.
    pub(crate) fn start_in(&mut self, program: &str, arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> u32 {
        let mut command = Command::new(program);
        command.args(arguments).arg(BINARY);
        self.spawn(command, prepare)
    }

    fn spawn(&mut self, mut command: Command, prepare: impl FnOnce(&mut Command)) -> u32 {
        let path = std::env::var_os("PATH").unwrap_or_default();
        command
            .env_clear()
            .env("PATH", path)
            // As under systemd, which is told of a successor's number: then nobody has to stay for the next one.
            .env("NOTIFY_SOCKET", self.folder.path().join("supervisor"))
            .arg("run")
            .args(&self.source)
            .arg("--state-dir")
            .arg(self.state());
        command.args(["--healthz-bind-address", "none", "--vip-routes", "none", "--log-level", "info"]);
        command.args(["--metrics-bind-address", &self.admin().to_string(), "--workers", "2"]);
        command.args(["--nodeport-addresses", &self.node_addresses]).stdin(Stdio::null());
        let log =
            fs::File::options().create(true).append(true).open(self.log_path()).expect("the folder can be written");
        command.stderr(log);
        prepare(&mut command);
        let child = command.spawn().expect("the program starts");
        self.started.push(child);
        self.started.last().map_or(0, Child::id)
    }

    /// The first one, ready.
    pub(crate) async fn serving(site: Site, manifest: &Manifest) -> (Self, u32) {
        Self::serving_all(site, &[manifest]).await
    }

    /// The same, with several Services.
    pub(crate) async fn serving_all(site: Site, manifests: &[&Manifest]) -> (Self, u32) {
        let mut house = Self::of_all(site, manifests);
        let pid = house.begin().await;
        (house, pid)
    }

    /// One that follows an API server, ready.
    #[cfg(feature = "kubernetes")]
    pub(crate) async fn following(site: Site, server: &ApiServer) -> Self {
        let mut house = Self::empty(site);
        let kubeconfig = house.path().join("config");
        fs::write(&kubeconfig, server.kubeconfig()).expect("the test's folder can be written");
        house.source = vec!["--kubeconfig".into(), kubeconfig.into(), "--node-name".into(), "node-1".into()];
        house.begin().await;
        house
    }

    async fn begin(&mut self) -> u32 {
        let pid = self.start(|_| {});
        self.until("it is ready", |house| house.serves() == Some(pid) && house.is_ready()).await;
        pid
    }

    /// The process that answers.
    pub(crate) fn serves(&self) -> Option<u32> {
        // It comes in pieces: what is near the beginning is in the first one.
        let status = seen::page(self.admin(), "/status").ok()?;
        let (_, pid) = status.split_once("\"pid\":")?;
        pid.split(|byte: char| !byte.is_ascii_digit()).next()?.parse().ok()
    }

    pub(crate) fn is_ready(&self) -> bool {
        seen::page(self.admin(), "/readyz").is_ok()
    }

    pub(crate) fn metric(&self, metric: &str, labels: &[&str]) -> u64 {
        seen::sum(&seen::page(self.admin(), "/metrics").expect("it answers"), metric, labels)
    }

    /// What was turned away or cut off since the first one, and why.
    pub(crate) fn losses(&self) -> Vec<String> {
        let page = seen::page(self.admin(), "/metrics").expect("it answers");
        let names = ["dropped", "connect_failures", "closed"].map(|name| format!("kuberelay_service_{name}_total"));
        let is_one = |line: &&str| names.iter().any(|name| line.starts_with(name)) && !line.ends_with(" 0");
        page.lines().filter(is_one).map(str::to_owned).collect()
    }

    /// Runs `kube-relay upgrade`.
    pub(crate) async fn upgrade(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(BINARY);
        command.env_clear().arg("upgrade").arg("--state-dir").arg(self.state()).args(arguments);
        tokio::task::spawn_blocking(move || command.output()).await.expect("no panic").expect("the program starts")
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub(crate) fn signal(pid: u32, signal: Signal) {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process");
        kill_process(pid, signal).expect("it runs");
    }

    /// True where a process that was started here, or by one of these, has ended.
    pub(crate) fn has_ended(&mut self, pid: u32) -> bool {
        for child in &mut self.started {
            if child.id() == pid {
                return child.try_wait().expect("it is our own child").is_some();
            }
        }
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    }

    /// The one that was started last, of those that run.
    pub(crate) fn newest(&self) -> Option<u32> {
        let started = |pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            after_name.split(' ').nth(19).and_then(|ticks| ticks.parse::<u64>().ok()).unwrap_or_default()
        };
        self.relays().into_iter().max_by_key(|pid| (started(pid), *pid))
    }

    /// The exit code of one that was started here and has ended.
    pub(crate) fn code(&mut self, pid: u32) -> Option<i32> {
        let child = self.started.iter_mut().find(|child| child.id() == pid)?;
        child.try_wait().expect("it is our own child")?.code()
    }

    /// Waits for a condition that only looking tells.
    pub(crate) async fn until(&mut self, what: &str, condition: impl Fn(&mut Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "waited {DEADLINE:?} until {what}; the log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the log says this: a process writes it down somewhat later than it acts.
    pub(crate) async fn until_told(&mut self, text: &str) {
        self.until(text, |house| house.log().contains(text)).await;
    }

    /// Lines of the log with this in them.
    pub(crate) fn told(&self, text: &str) -> Vec<String> {
        self.log().lines().filter(|line| line.contains(text)).map(ToOwned::to_owned).collect()
    }

    /// Processes that were started by order, whatever became of them.
    pub(crate) fn successors(&self) -> Vec<u32> {
        let number = |line: &String| {
            let (_, rest) = line.split_once(r#""pid":"#)?;
            rest.split(|byte: char| !byte.is_ascii_digit()).next()?.parse().ok()
        };
        self.told("upgrade: a new process is started").iter().filter_map(number).collect()
    }

    /// The relays among [`all`](Self::all), not who has started them.
    pub(crate) fn relays(&self) -> Vec<u32> {
        let is_relay = |pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.trim_end() == "kube-relay"
        };
        self.all().into_iter().filter(is_relay).collect()
    }

    /// Processes with our state folder among their arguments, and not `kube-relay upgrade`: also those that no test has started.
    fn all(&self) -> Vec<u32> {
        let state = self.state();
        let state = state.as_os_str().as_encoded_bytes();
        let all = fs::read_dir("/proc").expect("it is there").flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_ours = |pid: &u32| {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.split(|byte| *byte == 0).any(|argument| argument == state)
        };
        pids.filter(is_ours).collect()
    }
}

impl Drop for House {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the log:\n{}", self.log());
        }
        for pid in self.all() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL); // It may have ended by itself.
            }
        }
        self.started.iter_mut().for_each(|child| drop(child.wait()));
    }
}

/// Copies of the sockets of a process that clients come to at this address.
pub(crate) fn copies(pid: u32, address: SocketAddr) -> Vec<OwnedFd> {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process");
    let process = pidfd_open(process, PidfdFlags::empty()).expect("it runs");
    let numbers = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let copies = numbers.filter_map(|number| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).ok());
    let is_one = |copy: &OwnedFd| {
        let socket = SockRef::from(copy);
        let is_there = socket.local_addr().is_ok_and(|local| local.as_socket() == Some(address));
        is_there && (socket.is_listener().is_ok_and(|is| is) || socket.r#type().is_ok_and(|kind| kind == Type::DGRAM))
    };
    copies.filter(is_one).collect()
}

/// The number of open descriptors, but for pipes: idle ones of these are kept, some more or less.
pub(crate) fn lasting_descriptors(pid: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten();
    let is_pipe = |target: PathBuf| target.as_os_str().as_encoded_bytes().starts_with(b"pipe:");
    open.filter(|entry| !fs::read_link(entry.path()).is_ok_and(is_pipe)).count()
}

/// The number of open descriptors.
pub(crate) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count()
}
