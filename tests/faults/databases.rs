//! A database that fails over behind `examples/external-db.yaml`: a real server, its own client, and sessions that are idle,
//! in the midst of a transaction, or new.
//!
//! The example is run as it is: its addresses are those of loopback, and the test has a loopback of its own. Skips where
//! MariaDB is not installed.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::rig::{Namespace, Process, Rig, Shape, find, full, skip};
use crate::seen;
use crate::stage::until;

/// What people copy.
const EXAMPLE: &str = "examples/external-db.yaml";
/// The line of it that a fail-over changes.
const ENDPOINT: &str = "      - ip: ";
/// The line that is the difference between a web server and a database.
const RESET_AFTER: &str = "    kube-relay.dev/reset-after: 0s";

/// Where the example's Service answers.
const SERVICE: Ipv4Addr = Ipv4Addr::new(127, 96, 0, 12);
/// Its two databases.
const PRIMARY: Ipv4Addr = Ipv4Addr::new(127, 244, 2, 1);
const STANDBY: Ipv4Addr = Ipv4Addr::new(127, 244, 2, 2);

/// A reset is told to the backend and to the client at once; the file has to be noticed before.
const AT_ONCE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 2 });

/// How long a session says nothing. Keep-alive asks after a minute, and cuts nobody who is there.
fn silence() -> Duration {
    Duration::from_secs(if full() { 65 } else { 1 })
}

pub(crate) fn mariadb_fails_over() {
    let Some(programs) = Programs::find() else { return skip("mariadb", "not installed") };
    let site = Site::start(&programs);
    let example =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(EXAMPLE)).expect("the example is there");
    assert!(example.contains(RESET_AFTER), "{example}");
    let unsaid: String =
        example.lines().filter(|line| !line.starts_with(RESET_AFTER)).map(|line| line.to_owned() + "\n").collect();
    let _relay = site.relay(&unsaid);

    // Where nothing is said about old sessions, they stay.
    let mut kept = site.session();
    assert_eq!(kept.server(), Some(1));
    site.fail_over(&unsaid, STANDBY);

    // By the example as it is they end.
    site.write(&pointed(&example, STANDBY));
    let (mut idle, mut busy) = (site.session(), site.session());
    busy.ask("CREATE TABLE app.orders (number INT) ENGINE=InnoDB; SELECT 'made'");
    assert_eq!(busy.ask("BEGIN; INSERT INTO app.orders VALUES (1); SELECT COUNT(*) FROM app.orders"), "1");
    assert_eq!((idle.server(), busy.server()), (Some(2), Some(2)));
    thread::sleep(silence()); // That nobody is cut meanwhile is the case.
    assert_eq!((kept.server(), idle.server()), (Some(1), Some(2)), "both were idle for {:?}", silence());
    let mut old = site.session_at(STANDBY);
    let uncommitted = "SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED; SELECT COUNT(*) FROM app.orders";
    assert_eq!((old.others(), old.ask(uncommitted).as_str()), (2, "1"));
    let begin = Instant::now();
    site.write(&pointed(&example, PRIMARY));
    until("the old primary to have no session", || (old.others() == 0).then_some(()));
    let took = begin.elapsed();
    let gone = [idle.server(), busy.server()];

    println!("mariadb: {took:?} after the file was saved the old primary had no session any more");
    assert_eq!(gone, [None, None], "sessions of the old primary");
    assert!([idle, busy].into_iter().all(Session::was_cut), "the client was told of an error");
    assert_eq!(site.session().server(), Some(1), "a new session reaches the new primary");
    assert_eq!(kept.server(), Some(1), "one that was there already goes on");
    assert_eq!(old.ask(uncommitted), "0", "half a transaction is rolled back");
    assert!(took < AT_ONCE, "{took:?}");
}

/// The example after a fail-over to this address: its readers are told to edit one line.
fn pointed(example: &str, primary: Ipv4Addr) -> String {
    let line = format!("{ENDPOINT}{PRIMARY}");
    assert!(example.contains(&line), "{example}");
    example.replace(&line, &format!("{ENDPOINT}{primary}"))
}

/// MariaDB's, where all of them are installed.
pub(crate) struct Programs {
    pub(crate) install: PathBuf,
    pub(crate) server: PathBuf,
    pub(crate) client: PathBuf,
}

impl Programs {
    pub(crate) fn find() -> Option<Self> {
        let [install, server, client] = ["mariadb-install-db", "mariadbd", "mariadb"].map(find);
        Some(Self { install: install?, server: server?, client: client? })
    }
}

/// A machine with two databases.
struct Site<'p> {
    rig: Rig,
    folder: TempDir,
    client: &'p Path,
    _servers: [Process; 2],
}

impl<'p> Site<'p> {
    fn start(programs: &'p Programs) -> Self {
        let rig = Rig::build(Shape { nodes: 1, pods_per_node: 0, router: false }).expect("the rig builds");
        let folder = TempDir::new().expect("a folder can be made");
        install(&programs.install, folder.path());
        let servers = [(1, PRIMARY), (2, STANDBY)]
            .map(|(number, address)| (number, SocketAddr::from((address, 3306))))
            .map(|(number, address)| serve(&programs.server, rig.node(0), folder.path(), number, address, &[]));
        let site = Self { rig, folder, client: &programs.client, _servers: servers };
        for (number, address) in [(1, PRIMARY), (2, STANDBY)] {
            until("a database to serve", || (site.session_at(address).server() == Some(number)).then_some(()));
        }
        site
    }

    /// Starts kube-relay as the example's first lines say.
    fn relay(&self, manifest: &str) -> Process {
        self.write(manifest);
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        command.arg("run").arg("-f").arg(self.manifest()).args(["--log-level", "warn"]).env_clear();
        let relay = spawn(self.rig.node(0), command, &self.folder.path().join("relay.log"));
        until("kube-relay to be ready", || self.page("/readyz"));
        relay
    }

    fn manifest(&self) -> PathBuf {
        self.folder.path().join("external-db.yaml")
    }

    /// Saves the manifest as editors do.
    fn write(&self, manifest: &str) {
        let new = self.folder.path().join("new");
        fs::write(&new, manifest).expect("the folder is ours");
        fs::rename(new, self.manifest()).expect("the folder is ours");
    }

    /// Points the manifest to another primary, and waits until new sessions come there.
    fn fail_over(&self, manifest: &str, primary: Ipv4Addr) {
        self.write(&pointed(manifest, primary));
        let number = if primary == PRIMARY { 1 } else { 2 };
        until("new sessions at the new primary", || (self.session().server() == Some(number)).then_some(()));
    }

    fn page(&self, path: &str) -> Option<String> {
        self.rig.node(0).run(|| seen::page(([127, 0, 0, 1], 10_249).into(), path)).ok()
    }

    fn session(&self) -> Session {
        self.session_at(SERVICE)
    }

    fn session_at(&self, address: Ipv4Addr) -> Session {
        let mut command = Command::new(self.client);
        command.args(["--no-defaults", "--batch", "--skip-column-names", "--unbuffered", "--skip-reconnect"]);
        command.args(["--user=app", "--password=secret", "--port=3306", &format!("--host={address}")]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).env_clear();
        Session(self.rig.node(0).spawn(command).expect("the client starts"))
    }
}

/// What went wrong is often in what the programs have said.
impl Drop for Site<'_> {
    fn drop(&mut self) {
        let files = fs::read_dir(self.folder.path()).into_iter().flatten().flatten().map(|entry| entry.path());
        for log in files.filter(|path| thread::panicking() && path.extension().is_some_and(|kind| kind == "log")) {
            println!("{}: {}", log.display(), fs::read_to_string(&log).unwrap_or_default());
        }
    }
}

/// The client, with one connection for all that it is asked.
struct Session(Process);

impl Session {
    /// The one line that comes back; nothing where the session has ended.
    fn ask(&mut self, query: &str) -> String {
        let asked = self.0.say(&format!("{query};"));
        asked.and_then(|()| self.0.next_line()).unwrap_or_default()
    }

    /// Which server answers.
    fn server(&mut self) -> Option<u32> {
        self.ask("SELECT @@server_id").parse().ok()
    }

    /// How many others its server has.
    fn others(&mut self) -> u32 {
        let count = "SELECT COUNT(*) - 1 FROM information_schema.processlist WHERE user = 'app'";
        self.ask(count).parse().expect("a number")
    }

    /// True where it has ended with an error.
    fn was_cut(mut self) -> bool {
        !self.0.wait().expect("it is our child").success()
    }
}

/// Makes two equal databases, small ones.
pub(crate) fn install(program: &Path, folder: &Path) {
    let first = folder.join("1");
    let mut command = Command::new(program);
    command.args(["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"]);
    command.args(SMALL).args([format!("--datadir={}", first.display()), own_tables(folder)]);
    let made = command.output().expect("the program starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
    let copied = Command::new("cp").arg("-r").arg(&first).arg(folder.join("2")).status();
    assert!(copied.expect("cp starts").success());
    let users = "CREATE USER app@'%' IDENTIFIED BY 'secret';\nGRANT ALL ON *.* TO app@'%';\nCREATE DATABASE app;\n";
    fs::write(folder.join("init.sql"), users).expect("the folder is ours");
}

/// Where temporary tables are: a server takes all away that it finds when it starts.
fn own_tables(folder: &Path) -> String {
    format!("--tmpdir={}", folder.display())
}

/// What makes it fit into a test.
const SMALL: [&str; 4] =
    ["--skip-name-resolve", "--innodb-log-file-size=4M", "--innodb-buffer-pool-size=8M", "--performance-schema=OFF"];

/// Starts one of them, with options of its own.
pub(crate) fn serve(
    program: &Path,
    inside: &Namespace,
    folder: &Path,
    number: u8,
    address: SocketAddr,
    more: &[String],
) -> Process {
    let place = |name: &str| folder.join(name).display().to_string();
    let mut command = Command::new(program);
    command.args(["--no-defaults", "--user=root"]).args(SMALL).args(more); // Root, as there may be nobody else.
    command.args([
        format!("--bind-address={}", address.ip()),
        format!("--port={}", address.port()),
        format!("--server-id={number}"),
        format!("--datadir={}", place(&number.to_string())),
        format!("--socket={}", place(&format!("{number}.sock"))),
        format!("--pid-file={}", place(&format!("{number}.pid"))),
        format!("--init-file={}", place("init.sql")),
        own_tables(folder),
    ]);
    spawn(inside, command, &folder.join(format!("mariadb-{number}.log")))
}

fn spawn(inside: &Namespace, mut command: Command, log: &Path) -> Process {
    let log = File::create(log).expect("a file for its output");
    let log_too = log.try_clone().expect("descriptors are left");
    command.stdin(Stdio::null()).stdout(log).stderr(log_too);
    inside.spawn(command).expect("the program starts")
}
