//! The unit under `examples/systemd`: systemd takes it, and what it says fits the program that it starts.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kube_relay::cli::{self, UpgradeArgs};
use kube_relay::config::RunConfig;
use kube_relay::flag_defaults;

use crate::support::skip;

const NAME: &str = "kube-relay.service";
const PROGRAM: &str = env!("CARGO_BIN_EXE_kube-relay");
/// Where systemd makes what `StateDirectory=` names.
const STATE_DIRECTORIES: &str = "/var/lib";
/// Ports below 1024, and routes that make addresses of Services local.
const CAPABILITIES: [&str; 2] = ["CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"];

/// What the unit says, by section and key.
struct Unit(BTreeMap<(String, String), String>);

impl Unit {
    fn text() -> String {
        let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "examples/systemd", NAME].iter().collect();
        fs::read_to_string(path).expect("it is there")
    }

    /// Read as simply as it is written: each key once, and each value on one line.
    fn read() -> Self {
        let (mut section, mut values) = (String::new(), BTreeMap::new());
        for line in Self::text().lines().filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                name.clone_into(&mut section);
                continue;
            }
            let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("{line}"));
            assert!(!value.ends_with('\\'), "this test reads no value of several lines: {line}");
            let before = values.insert((section.clone(), key.to_owned()), value.to_owned());
            assert_eq!(before, None, "{line}");
        }
        Self(values)
    }

    /// A value of `[Service]`; empty where there is none.
    fn service(&self, key: &str) -> &str {
        self.0.get(&("Service".to_owned(), key.to_owned())).map_or("", String::as_str)
    }

    fn says(&self, key: &str) -> bool {
        ["1", "yes", "true", "on"].contains(&self.service(key))
    }

    fn words(&self, key: &str) -> BTreeSet<&str> {
        self.service(key).split_whitespace().collect()
    }

    /// The command line at a key, which systemd has nothing to put into.
    fn line(&self, key: &str) -> Vec<&str> {
        let line = self.service(key);
        assert!(line.starts_with('/') && !line.contains(['%', '$', '"', '\'', '\\', ';']), "{key}={line}");
        line.split_whitespace().collect()
    }

    fn run(&self) -> RunConfig {
        let cli::Command::Run(args) = command(&self.line("ExecStart")) else { panic!("not run") };
        RunConfig::try_from(*args).expect("a fine configuration")
    }

    fn upgrade(&self) -> UpgradeArgs {
        let cli::Command::Upgrade(args) = command(&self.line("ExecReload")) else { panic!("not upgrade") };
        args
    }
}

/// What the program makes of a command line.
fn command(line: &[&str]) -> cli::Command {
    flag_defaults::parse(line.iter().map(OsString::from)).unwrap_or_else(|error| panic!("{error}")).command
}

/// What a command knows, as its help tells.
fn flags(command: &str) -> BTreeSet<String> {
    let help = Command::new(PROGRAM).args([command, "--help"]).stdin(Stdio::null()).output().expect("it starts");
    let help = String::from_utf8(help.stdout).expect("text");
    let words = help.split(|letter: char| letter.is_whitespace() || [',', '='].contains(&letter));
    words.filter(|word| word.starts_with('-')).map(str::to_owned).collect()
}

#[test]
fn given_the_unit_when_systemd_verifies_it_then_it_finds_nothing() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (unit, installed) = (folder.path().join(NAME), Unit::read());
    // What it starts has to be there.
    fs::write(&unit, Unit::text().replace(installed.line("ExecStart")[0], PROGRAM)).expect("a file");

    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).arg(&unit).stdin(Stdio::null());
    let Ok(output) = verify.output() else { return skip("systemd", "there is no systemd-analyze here") };

    // A key that it does not know is no failure to it. What it says of other units is the machine's affair.
    let said = String::from_utf8_lossy(&output.stderr);
    let of_ours: Vec<_> = said.lines().filter(|line| line.contains(NAME)).collect();
    assert_eq!(of_ours, [""; 0], "{said}");
    assert!(output.status.success(), "{said}");
}

#[test]
fn f21_f25_given_the_unit_when_read_then_systemd_hears_each_process_and_keeps_its_sockets() {
    let unit = Unit::read();

    assert!(["notify", "notify-reload"].contains(&unit.service("Type")), "ready is told, and who is the main process");
    assert_eq!(unit.service("NotifyAccess"), "all", "a successor is heard before it is the main process");
    let kept: u32 = unit.service("FileDescriptorStoreMax").parse().expect("a number");
    assert!(kept > 0);
    assert_eq!(unit.service("Environment"), format!("FDSTORE={kept}"), "one number, for each version of systemd");
    assert_eq!(unit.service("FileDescriptorStorePreserve"), "", "stopped is stopped: nobody waits for nobody");
    assert_eq!((unit.service("Restart"), unit.service("KillMode")), ("always", "mixed"));
    let shutdown = unit.run().shutdown;
    let limit = unit.service("TimeoutStopSec").strip_suffix('s').and_then(|limit| limit.parse::<u64>().ok());
    assert!(limit.expect("seconds") > (shutdown.delay + shutdown.drain_timeout).as_secs(), "it may drain to the end");
}

#[test]
fn t234_given_the_units_command_lines_when_the_program_reads_them_then_a_reload_upgrades_what_was_started() {
    let unit = Unit::read();
    let (start, reload) = (unit.line("ExecStart"), unit.line("ExecReload"));

    for line in [&start, &reload] {
        let known = flags(line[1]);
        for flag in line.iter().filter_map(|word| word.split('=').next()).filter(|word| word.starts_with('-')) {
            assert!(known.contains(flag), "{flag} is not in the help of {}", line[1]);
        }
    }
    assert_eq!((start[0], start[1], reload[1]), (reload[0], "run", "upgrade"));
    let (run, upgrade) = (unit.run(), unit.upgrade());
    let folder = Path::new(STATE_DIRECTORIES).join(unit.service("StateDirectory"));
    assert!(run.take_over, "who was started beside an older one takes over from it");
    assert_eq!((run.state_dir.as_ref(), &upgrade.state_dir), (Some(&folder), &folder));
    assert_eq!(upgrade.binary, None, "the one that is in its place by then");
}

#[test]
fn given_the_unit_when_read_then_it_is_no_root_and_has_the_rights_that_it_needs() {
    let unit = Unit::read();

    let has_own_user = !["", "root", "0"].contains(&unit.service("User"));
    assert!(unit.says("DynamicUser") || has_own_user, "not root");
    for key in ["AmbientCapabilities", "CapabilityBoundingSet"] {
        assert_eq!(unit.words(key), BTreeSet::from(CAPABILITIES), "{key}");
    }
    assert!(unit.says("NoNewPrivileges") && unit.says("MemoryDenyWriteExecute") && unit.says("RestrictNamespaces"));
    assert_eq!((unit.service("ProtectSystem"), unit.service("ProtectHome")), ("strict", "yes"));
    assert!(!unit.service("StateDirectory").is_empty(), "all that it may write");
    assert_eq!(unit.service("StateDirectoryMode"), "0700", "who may write there may ask for its sockets");
    let families = BTreeSet::from(["AF_INET", "AF_INET6", "AF_NETLINK", "AF_UNIX"]);
    assert_eq!(
        unit.words("RestrictAddressFamilies"),
        families,
        "clients, addresses and routes, systemd and hand-overs"
    );
}
