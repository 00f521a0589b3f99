//! kube-relay as a program beside the test: for what belongs to a process, its memory, limits and rights.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use tokio::sync::{Mutex, MutexGuard};

use super::site::Site;
use super::{DEADLINE, seen};

/// A running `kube-relay run`. Killed when dropped.
pub struct Program {
    child: Child,
    admin: SocketAddr,
}

impl Program {
    /// Starts it with a manifest and waits until it serves. `prepare` may change how it is started.
    pub async fn start(site: Site, manifest: impl Display, prepare: impl FnOnce(&mut Command)) -> Self {
        let mut program = Self::spawn(site, |command| {
            command.args(["-f", "-"]);
            prepare(command);
        });
        let mut stdin = program.child.stdin.take().expect("standard input is a pipe");
        stdin.write_all(manifest.to_string().as_bytes()).expect("the program reads its input");
        drop(stdin);
        program.until("it to be ready", |program| seen::page(program.admin, "/readyz").is_ok()).await;
        program
    }

    /// Starts it with an API server as its source and waits until it serves.
    pub async fn following(site: Site, kubeconfig: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = folder.path().join("config");
        std::fs::write(&path, kubeconfig).expect("the test's folder can be written");
        let program = Self::spawn(site, |command| {
            command.arg("--kubeconfig").arg(&path).args(["--node-name", "node-1"]);
        });
        program.until("it to be ready", |program| seen::page(program.admin, "/readyz").is_ok()).await;
        program
    }

    fn spawn(site: Site, prepare: impl FnOnce(&mut Command)) -> Self {
        let admin = SocketAddr::new(site.client(9), 10249);
        // By descriptor: whoever it runs as may be kept out of the folders above it.
        let binary = File::open(env!("CARGO_BIN_EXE_kube-relay")).expect("cargo has built it");
        let mut command = Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()));
        command.args(["run", "--healthz-bind-address", "none", "--log-level", "error"]);
        command.args(["--vip-routes", "none"]); // The machine is not ours.
        command.args(["--nodeport-addresses", &format!("{}/32", site.node_ip())]);
        command.args(["--metrics-bind-address", &admin.to_string()]).env_clear().stdin(Stdio::piped());
        prepare(&mut command);
        Self { child: command.spawn().expect("the program starts"), admin }
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it answers those who watch it.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// A sum at `/metrics`, over all series with these labels.
    pub fn metric(&self, metric: &str, labels: &[&str]) -> u64 {
        seen::sum(&seen::page(self.admin, "/metrics").expect("it answers"), metric, labels)
    }

    /// The value of one series at `/metrics`, named with its labels if it has any.
    pub fn gauge(&self, metric: &str) -> f64 {
        let metrics = seen::page(self.admin, "/metrics").expect("it answers");
        seen::gauge(&metrics, metric).expect("a metric that is there")
    }

    /// What it answers with 200.
    pub fn page(&self, path: &str) -> io::Result<String> {
        seen::page(self.admin, path)
    }

    /// Leaves it so many descriptors, those that it has among them.
    pub fn limit_descriptors(&self, limit: u64) {
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, limit).expect("our own child can be limited");
    }

    /// How much of one processor it takes while nobody does anything.
    pub async fn busy(&self, span: Duration) -> f64 {
        let (start, before) = (Instant::now(), seen::run_time(self.pid()));
        tokio::time::sleep(span).await;
        (seen::run_time(self.pid()) - before).as_secs_f64() / start.elapsed().as_secs_f64()
    }

    /// Waits for a condition that only looking tells.
    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "waited {DEADLINE:?} for {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill(); // It may have ended by itself.
        let _ = self.child.wait();
    }
}

/// As many descriptors as this process may have, all for one test: those that need thousands take turns.
pub struct Descriptors {
    limit: u64,
    _turn: MutexGuard<'static, ()>,
}

impl Descriptors {
    /// Waits for its turn.
    pub async fn take() -> Self {
        static TURN: Mutex<()> = Mutex::const_new(());
        let _turn = TURN.lock().await;
        let maximum = getrlimit(Resource::Nofile).maximum;
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }); // As many as before are fine, too.
        Self { limit: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), _turn }
    }

    /// How many connections fit that take so many each, of so many that are wanted.
    pub fn fitting(&self, wanted: u64, each: u64) -> u64 {
        wanted.min(self.limit.saturating_sub(SPARE_DESCRIPTORS) / each)
    }
}

/// For everything else in this process.
const SPARE_DESCRIPTORS: u64 = 1_000;
