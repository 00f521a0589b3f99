//! `kube-relay top` as people meet it: in a real terminal, which tmux is, and as text where there is none.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::backend::Backend;
use support::manifest::Manifest;
use support::program::Program;
use support::site::Site;
use support::{DEADLINE, client, skip};
use tempfile::TempDir;

mod support;

/// A terminal in which a shell runs `kube-relay top`, writes down how the terminal was set before and after, and waits.
struct Terminal {
    folder: TempDir,
}

impl Terminal {
    /// `None`, with the reason printed, where there is no tmux.
    fn start(site: Site, width: u16, height: u16) -> Option<Self> {
        if Command::new("tmux").arg("-V").stdout(Stdio::null()).status().is_err() {
            skip("tmux", "not installed");
            return None;
        }
        let terminal = Self { folder: tempfile::tempdir().expect("a folder can be made") };
        let (program, server) = (env!("CARGO_BIN_EXE_kube-relay"), admin(site));
        let folder = terminal.folder.path().display();
        let script = format!(
            "stty -g >'{folder}/before'; '{program}' top --interval 200ms --sort name --server {server}; code=$?; \
             stty -g >'{folder}/after'; echo ended with $code; exec sleep 1000"
        );
        let (width, height) = (width.to_string(), height.to_string());
        terminal.tmux(&["new-session", "-d", "-x", &width, "-y", &height, "sh", "-c", &script]);
        Some(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(self.folder.path().join("socket")).args(["-u", "-f", "/dev/null"]).args(arguments);
        command.env_clear().env("LC_ALL", "C.UTF-8").env("PATH", std::env::var_os("PATH").unwrap_or_default());
        let Output { status, stdout, stderr } = command.output().expect("tmux starts");
        assert!(status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8_lossy(&stdout).into_owned()
    }

    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits for a picture.
    async fn until(&self, what: &str, condition: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let screen = self.screen();
            if condition(&screen) {
                return screen;
            }
            assert!(Instant::now() < deadline, "waited {DEADLINE:?} for {what}; the screen is\n{screen}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The process of `top`: the shell's only child.
    fn pid(&self) -> Pid {
        let shell = self.tmux(&["display-message", "-p", "#{pane_pid}"]);
        let shell = shell.trim();
        let path = PathBuf::from(format!("/proc/{shell}/task/{shell}/children"));
        let children = std::fs::read_to_string(path).expect("the shell runs");
        let pid = children.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("top runs");
        Pid::from_raw(pid).expect("a process has a number")
    }

    /// Waits for the end of `top`, and fails unless the terminal is as it was before.
    async fn until_given_back(&self) {
        let screen = self.until("top to end", |screen| screen.contains("ended with ")).await;
        assert!(screen.contains("ended with 0"), "{screen}");
        // Not by what is on the screen: one that had another size meanwhile has its lines broken anew.
        let setting = |name| std::fs::read_to_string(self.folder.path().join(name)).expect("the shell wrote it");
        assert!(setting("before").contains(':'), "{}", setting("before"));
        assert_eq!(setting("before"), setting("after"), "{screen}");
        assert_eq!(self.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]).trim(), "0 1");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Whoever fails has said more than this would.
        let mut command = Command::new("tmux");
        let _ = command.arg("-S").arg(self.folder.path().join("socket")).arg("kill-server").output();
    }
}

fn admin(site: Site) -> SocketAddr {
    SocketAddr::new(site.client(9), 10249)
}

async fn relay(site: Site) -> (Program, [Backend; 2]) {
    let backends = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1), site.backend(2)]);
    (Program::start(site, manifest, |_| {}).await, backends)
}

fn line<'a>(screen: &'a str, start: &str) -> Option<&'a str> {
    screen.lines().find(|line| line.starts_with(start))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_terminal_when_keys_are_pressed_then_services_backends_and_help_come_and_the_terminal_is_given_back() {
    let site = Site::new(1);
    let Some(terminal) = Terminal::start(site, 100, 24) else { return };
    terminal.until("a word about nobody", |screen| screen.contains("nothing answers")).await;
    let (_relay, _backends) = relay(site).await;

    let screen = terminal.until("the Service", |screen| line(screen, "default/web").is_some()).await;
    assert!(screen.contains("1 Service") && screen.contains("serving") && screen.contains("q quit"), "{screen}");
    client::ask_times(10, site.service()).await;
    terminal.keys(&["Enter"]);
    let even = |screen: &str| screen.matches(" 50.0% ").count() == 2;
    let screen = terminal.until("an even split", even).await;
    assert!(line(&screen, &site.backend(2).to_string()).is_some_and(|line| line.contains("ready")), "{screen}");
    assert!(screen.contains("ended: finished 5"), "{screen}");

    terminal.keys(&["?"]);
    terminal.until("help", |screen| screen.contains("Keys") && screen.contains("the other way around")).await;
    terminal.keys(&["x", "Escape"]);
    terminal.until("all Services", |screen| line(screen, "default/web").is_some()).await;
    terminal.keys(&["/", "n", "o", "b", "o", "d", "y", "Enter"]);
    terminal.until("no Service", |screen| line(screen, "default/web").is_none() && screen.contains("nobody")).await;
    terminal.keys(&["Escape"]);
    terminal.until("all Services", |screen| line(screen, "default/web").is_some()).await;

    terminal.tmux(&["resize-window", "-x", "40", "-y", "10"]);
    let narrow = |screen: &str| screen.lines().all(|line| line.chars().count() <= 40) && screen.contains("q quit");
    terminal.until("a narrow table", |screen| narrow(screen) && line(screen, "default/web").is_some()).await;
    terminal.tmux(&["resize-window", "-x", "220", "-y", "60"]);
    terminal.until("a wide table", |screen| screen.contains("TREND")).await;

    terminal.keys(&["q"]);
    terminal.until_given_back().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_relay_that_goes_and_comes_back_when_watched_then_that_is_told_and_no_rate_is_negative() {
    let site = Site::new(2);
    let Some(terminal) = Terminal::start(site, 100, 24) else { return };
    let (first, _backends) = relay(site).await;
    client::ask_times(20, site.service()).await;
    terminal.until("the Service", |screen| line(screen, "default/web").is_some()).await;

    drop(first);
    let away = |screen: &str| screen.contains("no answer for ") && line(screen, "default/web").is_some();
    terminal.until("what it said before", away).await;
    let manifest = Manifest::new(site).tcp().endpoints([site.backend(1), site.backend(2)]);
    let _second = Program::start(site, manifest, |_| {}).await;

    let screen = terminal.until("it to be back", |screen| !screen.contains("no answer")).await;
    let row = line(&screen, "default/web").expect("the Service is there");
    assert!(!row.contains(" -0") && !row.split_whitespace().any(|word| word.starts_with("-1")), "{row}");
    terminal.keys(&["C-c"]);
    terminal.until_given_back().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_terminal_when_a_signal_ends_top_then_the_terminal_is_given_back() {
    let site = Site::new(3);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let Some(terminal) = Terminal::start(site, 100, 24) else { return };
        terminal.until("a word about nobody", |screen| screen.contains("nothing answers")).await;

        kill_process(terminal.pid(), signal).expect("it is ours");

        terminal.until_given_back().await;
    }
}

fn once(site: Site, arguments: &[&str]) -> Output {
    let server = admin(site).to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    command.args(["top", "--server", &server, "--interval", "200ms"]).args(arguments).env_clear();
    command.stdin(Stdio::null()).output().expect("the program starts")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_no_terminal_when_asked_then_the_table_is_text() {
    let site = Site::new(4);
    let (_relay, _backends) = relay(site).await;
    client::ask_times(4, site.service()).await;

    let all = once(site, &["--once"]);
    let one = once(site, &["web"]);
    let nobody = once(site, &["shop/nobody"]);

    let text = |output: &Output| String::from_utf8(output.stdout.clone()).expect("text");
    assert!(line(&text(&all), "default/web ").is_some_and(|line| line.contains(" serving ")), "{}", text(&all));
    assert_eq!(text(&one).matches("  50.0%  ").count(), 2, "{}", text(&one));
    assert!(!text(&all).contains('\u{1b}') && !text(&one).contains('\u{1b}'));
    assert_eq!(nobody.status.code(), Some(1));
    let said = String::from_utf8_lossy(&nobody.stderr);
    assert!(said.contains("there is no Service shop/nobody"), "{said}");
}

#[test]
fn given_a_relay_that_is_not_there_when_asked_once_then_the_address_is_named() {
    let site = Site::new(5);

    let output = once(site, &["--once"]);

    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains(&admin(site).to_string()) && said.contains("nothing answers"), "{said}");
}
