//! `kube-relay top` as people meet it: in a real terminal, which tmux is, and as text where there is none.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
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

/// What the shell says where `top` was stopped, before it has it go on at the next line that it reads.
const STOPPED: &str = "top is stopped";

impl Terminal {
    /// `None`, with the reason printed, where there is no tmux.
    fn start(site: Site, width: u16, height: u16) -> Option<Self> {
        Self::start_with(site, [width, height], "", "")
    }

    /// With variables for `top`, and words for the shell before and after it.
    fn start_with(site: Site, size: [u16; 2], variables: &str, after: &str) -> Option<Self> {
        let (program, server) = (env!("CARGO_BIN_EXE_kube-relay"), admin(site));
        let top = format!("{variables} '{program}' top --interval 200ms --sort name --server {server}; {after}");
        Self::run(size, |_| top)
    }

    /// Runs something else in place of `top`; it is told of a folder of its own.
    fn run([width, height]: [u16; 2], command: impl FnOnce(&Path) -> String) -> Option<Self> {
        if Command::new("tmux").arg("-V").stdout(Stdio::null()).status().is_err() {
            skip("tmux", "not installed");
            return None;
        }
        let terminal = Self { folder: tempfile::tempdir().expect("a folder can be made") };
        let (command, folder) = (command(terminal.folder.path()), terminal.folder.path().display());
        let script = format!(
            "stty -g >'{folder}/before'; {command} code=$?; stty -g >'{folder}/after'; echo ended with $code; \
             exec sleep 1000"
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
        self.until_given_back_with(0).await;
    }

    async fn until_given_back_with(&self, code: u8) -> String {
        let screen = self.until("top to end", |screen| screen.contains("ended with ")).await;
        assert!(screen.contains(&format!("ended with {code}")), "{screen}");
        self.assert_as_before("after", &screen);
        screen
    }

    /// Fails unless the terminal is, and by a file was, as it was before.
    fn assert_as_before(&self, file: &str, screen: &str) {
        // Not by what is on the screen: one that had another size meanwhile has its lines broken anew.
        let setting = |name| std::fs::read_to_string(self.folder.path().join(name)).expect("the shell wrote it");
        assert!(setting("before").contains(':'), "{}", setting("before"));
        assert_eq!(setting("before"), setting(file), "{screen}");
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
    // Not the one Service, whose page has that line, too: what is pressed with Escape is another key.
    let all = |screen: &str| line(screen, "default/web").is_some() && !screen.contains("Esc back");
    terminal.until("all Services", all).await;
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
async fn given_a_relay_that_hangs_when_it_goes_on_then_that_is_seen_soon() {
    let site = Site::new(12);
    let Some(terminal) = Terminal::start(site, 100, 24) else { return };
    let (hanging, _backends) = relay(site).await;
    let pid = Pid::from_raw(hanging.pid().cast_signed()).expect("a process has a number");
    terminal.until("the Service", |screen| line(screen, "default/web").is_some()).await;

    kill_process(pid, Signal::STOP).expect("it is ours");
    terminal.until("a word about it", |screen| screen.contains("no answer within")).await;
    terminal.keys(&["?"]);
    terminal.until("help all the same", |screen| screen.contains("the other way around")).await;
    terminal.keys(&["x"]);
    kill_process(pid, Signal::CONT).expect("it is ours");

    terminal.until("it to be back", |screen| !screen.contains("no answer") && screen.contains("serving")).await;
    terminal.keys(&["q"]);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_terminal_when_top_is_stopped_and_goes_on_then_the_shell_has_the_terminal_in_between() {
    let site = Site::new(6);
    let (_relay, _backends) = relay(site).await;
    // With job control, so that the shell is there when its job stops; where it is written how the terminal is, it is free.
    let after = format!("stty -g >stopped; echo {STOPPED}; read line; fg;");
    let Some(terminal) = Terminal::run([100, 24], |folder| {
        let (program, server, folder) = (env!("CARGO_BIN_EXE_kube-relay"), admin(site), folder.display());
        format!("cd '{folder}'; set -m; '{program}' top --interval 200ms --server {server}; {after}")
    }) else {
        return;
    };
    terminal.until("the Service", |screen| line(screen, "default/web").is_some()).await;

    terminal.keys(&["C-z"]);
    let screen = terminal.until("the shell", |screen| screen.contains(STOPPED)).await;
    terminal.assert_as_before("stopped", &screen);
    terminal.keys(&["Enter"]);

    terminal.until("the Service again", |screen| line(screen, "default/web").is_some()).await;
    terminal.keys(&["Enter"]);
    terminal.until("its backends", |screen| line(screen, &site.backend(2).to_string()).is_some()).await;
    terminal.keys(&["q"]);
    terminal.until_given_back().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_nobody_who_could_have_it_go_on_when_ctrl_z_is_pressed_then_top_is_not_stopped() {
    let site = Site::new(7);
    let Some(terminal) = Terminal::start(site, 100, 24) else { return };
    terminal.until("a word about nobody", |screen| screen.contains("nothing answers")).await;

    terminal.keys(&["C-z"]);
    terminal.keys(&["?"]);
    terminal.until("help", |screen| screen.contains("the other way around")).await;
    // Others may stop it all the same, and have it go on.
    for signal in [Signal::STOP, Signal::CONT] {
        kill_process(terminal.pid(), signal).expect("it is ours");
    }
    terminal.keys(&["x"]);
    terminal.until("the table", |screen| screen.contains("q quit") && !screen.contains("Keys")).await;

    terminal.keys(&["q"]);
    terminal.until_given_back().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_terminal_that_goes_away_when_shown_then_top_ends() {
    let site = Site::new(8);
    let Some(terminal) = Terminal::start(site, 100, 24) else { return };
    terminal.until("a word about nobody", |screen| screen.contains("nothing answers")).await;
    let pid = terminal.pid();

    terminal.tmux(&["kill-server"]);

    // Its shell has ended, too: where nobody waits for the children of others, a zombie stays.
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    let runs = || std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
    let deadline = Instant::now() + DEADLINE;
    while runs() {
        assert!(Instant::now() < deadline, "it still runs");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_terminal_that_can_only_go_on_when_asked_then_the_table_is_text() {
    let site = Site::new(9);
    let (_relay, _backends) = relay(site).await;
    let Some(terminal) = Terminal::start_with(site, [100, 24], "TERM=dumb", "") else { return };

    let screen = terminal.until_given_back_with(0).await;

    assert!(line(&screen, "default/web ").is_some_and(|line| line.contains(" serving ")), "{screen}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_no_color_when_something_is_wrong_then_it_is_told_without_any() {
    let site = Site::new(10);
    for (variables, is_red) in [("", true), ("NO_COLOR=1", false)] {
        let Some(terminal) = Terminal::start_with(site, [100, 24], variables, "") else { return };
        terminal.until("a word about nobody", |screen| screen.contains("nothing answers")).await;

        let screen = terminal.tmux(&["capture-pane", "-e", "-p"]);

        let said = screen.lines().find(|line| line.contains("nothing answers")).expect("it was there");
        assert_eq!(said.contains("[31m") || said.contains("38;5;"), is_red, "{said:?}");
    }
}

/// Where this is set the test below is the program: it shows `top`, and panics once there is a file of that name.
#[cfg(feature = "tui")]
const PANIC_AT: &str = "KUBE_RELAY_TEST_PANIC_AT";

#[cfg(feature = "tui")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_terminal_when_something_panics_then_it_is_given_back_and_the_message_can_be_read() {
    let site = Site::new(11);
    if let Some(file) = std::env::var_os(PANIC_AT) {
        return panic_behind_a_screen(site, Path::new(&file)).await;
    }
    let this = std::env::current_exe().expect("it runs");
    let name = "given_a_terminal_when_something_panics_then_it_is_given_back_and_the_message_can_be_read";
    let Some(terminal) = Terminal::run([100, 24], |folder| {
        let (file, this) = (folder.join("panic"), this.display());
        format!("{PANIC_AT}='{}' '{this}' --exact {name} --nocapture;", file.display())
    }) else {
        return;
    };
    terminal.until("a word about nobody", |screen| screen.contains("nothing answers")).await;

    std::fs::write(terminal.folder.path().join("panic"), "").expect("the test's folder can be written");

    let screen = terminal.until_given_back_with(101).await;
    assert!(screen.contains("it panics on purpose"), "{screen}");
}

#[cfg(feature = "tui")]
async fn panic_behind_a_screen(site: Site, file: &Path) {
    use kube_relay::top::{DEFAULT_INTERVAL, TopOptions, run};
    let (server, interval) = (admin(site), DEFAULT_INTERVAL);
    let (sort, filter, service) = (Default::default(), String::new(), None);
    let options = TopOptions { server, interval, sort, filter, service };
    let panic = async {
        while !file.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("it panics on purpose");
    };
    tokio::select! {
        outcome = run(&options) => outcome.expect("it goes on"),
        () = panic => {}
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
