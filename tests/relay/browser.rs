//! A real browser without a window, driven as a person would: through the pipe of its debugging protocol.
//!
//! Each command is a JSON object with a zero byte behind it, and so is each answer. What the page is to show is `page`'s.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::DEADLINE;

/// What Debian, Google and the builds for tests call it.
const NAMES: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "chrome-headless-shell"];
/// Its ends of the pipe are the descriptors 3 and 4.
const START: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >&2"#;
/// It shows pages of this machine and asks nobody else for anything.
const ARGUMENTS: [&str; 11] = [
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--lang=en-US",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.*",
];

/// One that is installed; `None` where none is.
pub(crate) fn installed() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&path).collect();
    let find = |name: &&str| folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
    NAMES.iter().find_map(find)
}

/// A browser with one page. It ends when this is dropped.
pub(crate) struct Browser {
    child: Child,
    commands: ChildStdin,
    answers: Receiver<Value>,
    session: Option<String>,
    last_id: u64,
    /// What its console says: errors of scripts, and what the policy of a page kept them from.
    pub(crate) console: Vec<String>,
    _folder: TempDir,
}

impl Browser {
    /// Starts it and shows what is there.
    pub(crate) fn at(browser: PathBuf, server: SocketAddr) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let log = fs::File::create(folder.path().join("log")).expect("the test's folder can be written");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", START, "sh"]).arg(browser).args(ARGUMENTS);
        command.arg(format!("--user-data-dir={}", folder.path().join("profile").display()));
        if rustix::process::geteuid().is_root() {
            command.arg("--no-sandbox"); // It refuses to be root with one; what it shows is ours.
        }
        command.env("HOME", folder.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().expect("the browser starts");
        let commands = child.stdin.take().expect("standard input is a pipe");
        let answers = messages(child.stdout.take().expect("standard output is a pipe"));
        let mut this =
            Self { child, commands, answers, session: None, last_id: 0, console: Vec::new(), _folder: folder };
        this.open(server);
        this
    }

    fn open(&mut self, server: SocketAddr) {
        let target = self.order("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = self.order("Target.attachToTarget", attach);
        self.session = session["sessionId"].as_str().map(str::to_owned);
        self.order("Runtime.enable", json!({}));
        self.order("Log.enable", json!({}));
        self.order("Page.navigate", json!({ "url": format!("http://{server}/") }));
    }

    /// What an expression of the page is.
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        let answer = self.order("Runtime.evaluate", json!({ "expression": expression, "returnByValue": true }));
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer:#}");
        answer["result"]["value"].clone()
    }

    /// The text of an element, as it is in sight.
    pub(crate) fn text(&mut self, selector: &str) -> String {
        let text = self.value(&format!("document.querySelector({selector:?})?.innerText ?? ''"));
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until an element shows all of these.
    pub(crate) fn sees(&mut self, selector: &str, texts: &[&str]) {
        let mut shown = String::new();
        let is_there = |browser: &mut Self| {
            shown = browser.text(selector);
            texts.iter().all(|text| shown.contains(text))
        };
        let fine = self.until(is_there);
        assert!(fine, "{selector} does not show all of {texts:?}, {:?}: {shown}", self.console);
    }

    /// Waits until an expression of the page is true.
    pub(crate) fn holds(&mut self, expression: &str) {
        let fine = self.until(|browser| browser.value(expression) == true);
        let body = if fine { String::new() } else { self.text("body") };
        assert!(fine, "{expression} does not hold, {:?}: {body}", self.console);
    }

    fn until(&mut self, mut condition: impl FnMut(&mut Self) -> bool) -> bool {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// Clicks where an element is.
    pub(crate) fn click(&mut self, selector: &str) {
        let place = format!(
            "(() => {{ const element = document.querySelector({selector:?}); element.scrollIntoView({{ block: 'center' }}); \
             const box = element.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})()"
        );
        let place = self.value(&place);
        for kind in ["mousePressed", "mouseReleased"] {
            let click = json!({ "type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1 });
            self.order("Input.dispatchMouseEvent", click);
        }
    }

    /// Writes where the focus is.
    pub(crate) fn write(&mut self, text: &str) {
        self.order("Input.insertText", json!({ "text": text }));
    }

    /// Presses a key, and lets it go.
    pub(crate) fn press(&mut self, key: &str, code: u32) {
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let press = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
            self.order("Input.dispatchKeyEvent", press);
        }
    }

    /// Has a screen of so many points from now on, and wants this scheme of colours.
    pub(crate) fn becomes(&mut self, width: u32, height: u32, scheme: &str) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.order("Emulation.setDeviceMetricsOverride", metrics);
        let scheme = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.order("Emulation.setEmulatedMedia", scheme);
    }

    /// What a screen reader is told: role and name of each thing on the page.
    pub(crate) fn accessible(&mut self) -> Vec<(String, String)> {
        let tree = self.order("Accessibility.getFullAXTree", json!({}));
        let nodes = tree["nodes"].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value["value"].as_str().unwrap_or_default().to_owned();
        nodes
            .iter()
            .filter(|node| node["ignored"] != true)
            .map(|node| (text(&node["role"]), text(&node["name"])))
            .collect()
    }

    /// Gives an order and waits for its answer.
    fn order(&mut self, method: &str, parameters: Value) -> Value {
        self.last_id += 1;
        let mut order = json!({ "id": self.last_id, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            order["sessionId"] = session.as_str().into();
        }
        let mut bytes = order.to_string().into_bytes();
        bytes.push(0);
        self.commands.write_all(&bytes).expect("the browser takes orders");
        loop {
            let message = self.answers.recv_timeout(DEADLINE);
            let message = message.unwrap_or_else(|error| panic!("{method}: the browser does not answer: {error}"));
            if message["id"] == self.last_id {
                assert!(message["error"].is_null(), "{order:#}: {message:#}");
                return message["result"].clone();
            }
            self.hear(&message);
        }
    }

    fn hear(&mut self, message: &Value) {
        let method = message["method"].as_str().unwrap_or_default();
        // Whether somebody answers, and with what, is the page's to tell.
        let is_of_network = message["params"]["entry"]["source"] == "network";
        if ["Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"].contains(&method) && !is_of_network
        {
            self.console.push(message["params"].to_string());
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // With its end of the pipe gone, the others of its processes end as well.
        let _ = self.child.kill(); // It may have ended by itself.
        let _ = self.child.wait();
    }
}

/// Reads what comes, on a thread of its own: so that whoever waits can give up.
fn messages(output: ChildStdout) -> Receiver<Value> {
    let (sender, receiver) = channel();
    let read = move || {
        let messages = BufReader::new(output).split(0).map_while(Result::ok);
        for message in messages.filter_map(|bytes| serde_json::from_slice(&bytes).ok()) {
            if sender.send(message).is_err() {
                return;
            }
        }
    };
    thread::spawn(read);
    receiver
}
