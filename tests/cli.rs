//! The program as people meet it: what it prints, what it says about mistakes, how it ends.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use support::manifest::Manifest;
use support::relay::replace;
use support::site::Site;
use support::{DEADLINE, skip};

mod support;

/// A command that runs where the examples are, so that what it prints names no folder of this machine.
fn kube_relay(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// What a command said, as one text, and its exit code.
struct Said {
    text: String,
    code: Option<i32>,
}

fn say(mut command: Command) -> Said {
    let output = command.output().expect("the program starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Said { text: format!("{out}{err}"), code: output.status.code() }
}

/// Fails unless the command ends with the code and says all of the words.
fn refuses(arguments: &[&str], code: i32, words: &[&str]) {
    let said = say(kube_relay(arguments));
    for word in words {
        assert!(said.text.contains(word), "{arguments:?} does not say {word:?}: {}", said.text);
    }
    assert_eq!(said.code, Some(code), "{arguments:?}: {}", said.text);
}

#[test]
fn given_what_kubeadm_writes_when_checked_then_each_field_without_meaning_is_a_note() {
    let said = say(kube_relay(&["check", "--config", "tests/configs/kubeadm.conf"]));

    let told = "tests/configs/kubeadm.conf:58:20: KubeProxyConfiguration: nodePortAddresses: none named";
    assert!(said.text.contains(told), "{}", said.text);
    assert_eq!(said.code, Some(0), "{}", said.text);
}

#[test]
fn given_a_file_an_environment_and_a_flag_when_checked_then_the_later_ones_override() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("relay.yaml");
    let fields = "nodePortAddresses: [192.0.2.0/24, '2001:db8::/64']\nsources: [examples/whoami.yaml]\n";
    fs::write(&path, format!("apiVersion: kube-relay.dev/v1alpha1\nkind: RelayConfiguration\n{fields}"))
        .expect("a file");
    let check = |environment: &str, more: &[&str]| {
        let mut command = kube_relay(&["check", "--config", path.to_str().expect("a path of letters")]);
        command.args(more).env("KUBE_RELAY_NODEPORT_ADDRESSES", environment);
        if environment.is_empty() {
            command.env_remove("KUBE_RELAY_NODEPORT_ADDRESSES");
        }
        say(command).text
    };
    let on_loopback = "nodePort   127.0.0.1:30000";

    let (file, environment) = (check("", &[]), check("localhost", &[]));
    let flag = check("localhost", &["--nodeport-addresses", "192.0.2.0/24,2001:db8::/64"]);

    assert!(file.contains("default/whoami") && !file.contains(on_loopback), "{file}");
    assert!(environment.contains(on_loopback), "{environment}");
    assert!(!flag.contains(on_loopback), "{flag}");
}

#[test]
fn given_kube_proxys_file_with_fields_of_no_use_when_run_then_one_line_names_them_all() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.conf");
    let text = fs::read_to_string("tests/configs/kubeadm.conf").expect("what kubeadm writes");
    fs::write(&path, text.replace("mode: \"\"", "mode: ipvs").replace("qps: 0", "qps: 5")).expect("a file");
    let mut command = run_command(&["-"]);
    command.args(["--config", path.to_str().expect("a path of letters")]);

    let running = Running::start(command);

    running.until_says(&["configuration taken", "clientConnection.qps, mode, nodePortAddresses"]);
    running.until_says(&["ready"]);
}

#[test]
fn given_a_configuration_file_with_mistakes_when_used_then_each_is_told_with_its_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("relay.yaml");
    let head = "apiVersion: kube-relay.dev/v1alpha1\nkind: RelayConfiguration\n";
    let path = path.to_str().expect("a path of letters");

    fs::write(path, format!("{head}workers: 0\ndrainTimeout: soon\n")).expect("a file");
    refuses(&["run", "--config", path, "-f", "x"], 1, &["relay.yaml:3:10: ", "relay.yaml:4:15: ", "1..=1024", "10s"]);
    refuses(&["check", "--config", path, "examples/whoami.yaml"], 1, &["relay.yaml:3:10: "]);
    fs::write(path, format!("{head}worker: 1\n")).expect("a file");
    refuses(
        &["check", "--config", path, "examples/whoami.yaml"],
        1,
        &[":3:1: ", "did you mean workers?", "default/whoami"],
    );
    fs::write(path, head).expect("a file");
    refuses(&["run", "--config", path], 64, &["--source", "--config"]);
}

/// What a doctor says here, for programs.
fn doctor(arguments: &[&str]) -> (serde_json::Value, Option<i32>) {
    let output = kube_relay(&[&["doctor", "-o", "json", "--status-bind-address", "none"], arguments].concat())
        .output()
        .expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout);
    (serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")), output.status.code())
}

#[test]
fn given_a_machine_when_the_doctor_looks_then_each_subject_is_told_worst_first_and_the_exit_code_follows() {
    let (said, code) = doctor(&["-f", "examples/whoami.yaml"]);

    let findings = said["findings"].as_array().expect("a list");
    let subjects: BTreeSet<&str> = findings.iter().filter_map(|found| found["subject"].as_str()).collect();
    let of_every_machine = [
        "arp",
        "capabilities",
        "cni",
        "conntrack",
        "kernel",
        "loopback",
        "node-ports",
        "open-files",
        "other-proxies",
        "queues",
        "source-address",
        "source-ports",
        "upgrade",
        "vip-routes",
        "wildcard-listeners",
    ];
    assert_eq!(subjects.into_iter().collect::<Vec<_>>(), of_every_machine);
    let rank = |found: &serde_json::Value| {
        ["error", "warning", "note", "ok"].iter().position(|word| found["severity"] == *word)
    };
    let ranks: Vec<_> = findings.iter().map(|found| rank(found).expect("a severity")).collect();
    assert!(ranks.is_sorted(), "{findings:#?}");
    for (count, place) in [("errors", 0), ("warnings", 1), ("notes", 2), ("ok", 3)] {
        assert_eq!(said[count], ranks.iter().filter(|rank| **rank == place).count(), "{count}");
    }
    assert_eq!(code, Some(i32::from(ranks.iter().any(|rank| *rank < 2))), "{findings:#?}");
    let fine = "no address of a Service has to be made local";
    assert!(findings.iter().any(|found| found["message"] == fine), "they are on loopback: {findings:#?}");
}

#[test]
fn given_a_machine_when_the_doctor_tells_people_then_what_is_fine_is_counted_unless_it_is_asked_for() {
    let say = |all: &[&str]| say(kube_relay(&[&["doctor", "--status-bind-address", "none"], all].concat())).text;

    let (short, all) = (say(&[]), say(&["--all"]));

    let last = short.lines().last().expect("a summary");
    assert!(
        last.ends_with(" fine (--all shows them)") && last.contains(" errors, ") | last.contains(" error, "),
        "{short}"
    );
    assert!(!short.contains("ok       "), "{short}");
    assert!(all.contains("\nok       kernel: ") && all.ends_with(" fine\n"), "{all}");
}

#[test]
fn given_options_that_lead_nowhere_when_the_doctor_is_asked_then_that_is_said() {
    refuses(&["doctor", "-f", "nothing/here.yaml"], 1, &["nothing/here.yaml: no such file or folder"]);
    refuses(&["doctor", "-o", "yaml"], 64, &["text", "json"]);
}

/// `run` without admin servers: those have fixed ports, and tests run side by side. And without routes: the machine is
/// not ours.
fn run_command(sources: &[&str]) -> Command {
    let mut arguments = vec!["run", "--metrics-bind-address", "none", "--healthz-bind-address", "none"];
    arguments.extend(["--vip-routes", "none"]);
    for source in sources {
        arguments.extend(["-f", source]);
    }
    kube_relay(&arguments)
}

/// A running `kube-relay run`. Killed when dropped.
struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Running {
    fn start(command: Command) -> Self {
        Self::start_with_input(command, b"")
    }

    fn start_with_input(mut command: Command, input: &[u8]) -> Self {
        command.stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let mut stdin = child.stdin.take().expect("standard input is a pipe");
        stdin.write_all(input).expect("the program reads its input");
        let stderr = child.stderr.take().expect("standard error is a pipe");
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { child, lines }
    }

    /// Waits until one line of the log holds all of the words.
    fn until_says(&self, words: &[&str]) {
        let deadline = Instant::now() + DEADLINE;
        let mut heard = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            if words.iter().all(|word| line.contains(word)) {
                return;
            }
            heard.push(line);
        }
        panic!("waited for {words:?}, but it said: {heard:#?}");
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("our own child can be signalled");
    }

    fn end(mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("our own child can be waited for") {
                return status;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("it does not end");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A backend that tells its address, for the life of the test process.
fn start_backend(address: SocketAddr) {
    let listener = TcpListener::bind(address).expect("the test's own address is free");
    let answer = move |mut stream: TcpStream| {
        // The relay goes away where the endpoint left while it was being reached: no news to a backend.
        let _ = write!(stream, "{address}");
    };
    thread::spawn(move || listener.incoming().flatten().for_each(answer));
}

/// The same for datagrams: each is answered with the address.
fn start_udp_backend(address: SocketAddr) {
    let socket = UdpSocket::bind(address).expect("the test's own address is free");
    thread::spawn(move || {
        let mut payload = [0; 16];
        while let Ok((_, client)) = socket.recv_from(&mut payload) {
            // A client that is gone is no news to a backend.
            let _ = socket.send_to(address.to_string().as_bytes(), client);
        }
    });
}

/// The backend that answers a datagram of a new client.
fn ask_over_udp(service: SocketAddr) -> SocketAddr {
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of loopback");
    client.set_read_timeout(Some(DEADLINE)).expect("a time above zero");
    client.send_to(b"who", service).expect("loopback takes it");
    let mut answer = [0; 64];
    let length = client.recv(&mut answer).expect("an answer");
    String::from_utf8_lossy(&answer[..length]).parse().expect("an address")
}

/// The backend that answers, once somebody listens.
fn ask_until_answered(service: SocketAddr) -> SocketAddr {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(backend) = ask(service) {
            return backend;
        }
        assert!(Instant::now() < deadline, "{service} never answered");
        thread::sleep(Duration::from_millis(5));
    }
}

fn ask(service: SocketAddr) -> Option<SocketAddr> {
    let mut answer = String::new();
    TcpStream::connect(service).ok()?.read_to_string(&mut answer).ok()?;
    answer.parse().ok()
}

fn folder_with(manifest: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder can be made");
    replace(folder.path(), "web.yaml", manifest);
    let path = folder.path().display().to_string();
    (folder, path)
}

mod check {
    use super::*;

    /// What `check` says about an example, as a person reads it.
    fn example(name: &str) -> String {
        let path = format!("examples/{name}.yaml");
        let said = say(kube_relay(&["check", &path]));
        assert_eq!(said.code, Some(0), "{}", said.text);
        format!("$ kube-relay check {path}\n{}", said.text)
    }

    #[test]
    fn given_each_example_when_checked_then_a_person_can_read_what_would_be_served() {
        let names =
            ["dns", "external-db", "least-connections", "loadbalancer", "nodeport", "scale", "sticky", "whoami"];
        for name in names {
            insta::assert_snapshot!(name, example(name));
        }
    }

    #[test]
    fn given_an_example_when_checked_for_a_program_then_the_document_has_the_promised_shape() {
        let said = say(kube_relay(&["check", "examples/whoami.yaml", "-o", "json"]));

        let document: serde_json::Value = serde_json::from_str(&said.text).expect("JSON and nothing else");
        insta::assert_json_snapshot!("whoami_for_programs", document);
        assert_eq!(said.code, Some(0));
    }

    #[test]
    fn given_objects_as_an_api_server_sends_them_when_checked_then_all_are_understood() {
        // Recorded from 1.20: slices of v1beta1, lists that are null, a headless Service with two families.
        let files = ["services", "endpointslices-v1beta1"].map(|name| format!("tests/manifests/recorded/{name}.json"));

        let said = say(kube_relay(&["check", &files[0], &files[1], "--allowed-external-cidrs", "10.200.2.100/32"]));

        insta::assert_snapshot!("recorded", said.text);
        assert_eq!(said.code, Some(0));
    }

    #[test]
    fn given_a_service_without_addresses_when_checked_twice_then_the_same_are_allocated_in_any_order_of_files() {
        let alone = say(kube_relay(&["check", "examples/nodeport.yaml", "-o", "json"]));
        let among_others = say(kube_relay(&["check", "examples/whoami.yaml", "examples/nodeport.yaml", "-o", "json"]));

        assert_eq!(allocated(&alone.text), allocated(&among_others.text));
        assert_eq!(allocated(&alone.text).len(), 2, "a cluster IP and a node port: {}", alone.text);
    }

    fn allocated(document: &str) -> Vec<String> {
        let document: kube_relay::status::Report = serde_json::from_str(document).expect("the document of `check`");
        let ports = document.services.into_iter().flat_map(|service| service.ports);
        let listeners = ports.flat_map(|port| port.listeners).filter(|listener| listener.allocated);
        listeners.map(|listener| listener.address).collect()
    }
}

mod bad_input {
    use super::*;

    #[test]
    fn given_a_path_that_is_not_there_when_checked_or_run_then_it_is_named() {
        refuses(&["check", "no/such/file.yaml"], 1, &["no/such/file.yaml", "no such file"]);
        refuses(&["run", "-f", "no/such/file.yaml"], 1, &["no/such/file.yaml", "no such file"]);
    }

    #[test]
    fn given_objects_and_files_that_would_forge_lines_when_checked_then_they_are_spelled_out() {
        let forged = r"x\n2026-01-01T00:00:00Z ERROR forged\e[2J";
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a\n\u{1b}[2J.yaml");
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, annotations: {{\"kube-relay.dev/{forged}\": \"1\", \
             kube-relay.dev/balance: \"{forged}\"}}}}\nspec: {{type: \"{forged}\", clusterIP: \"{forged}\", \"{forged}\": 1, \
             ports: [{{name: \"{forged}\", port: 80, targetPort: \"{forged}\", protocol: \"{forged}\"}}]}}\n"
        );
        let good = format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: good}}\n\
             spec: {{clusterIP: 127.96.9.9, ports: [{{port: 80, targetPort: \"{forged}\"}}]}}\n"
        );
        let others = format!(
            "---\napiVersion: v1\nkind: \"{forged}\"\nmetadata: {{name: x}}\n---\napiVersion: discovery.k8s.io/v1\n\
             kind: EndpointSlice\nmetadata: {{name: \"{forged}\", labels: {{kubernetes.io/service-name: web}}}}\naddressType: \
             IPv4\nendpoints: [{{addresses: [\"{forged}\"]}}]\n---\n\"{forged}\": 1\n---\n\"{forged}\"\n"
        );
        fs::write(&file, [service, good, others].concat()).expect("a file");

        for output in ["text", "json"] {
            let said = say(kube_relay(&["check", "-o", output, file.to_str().expect("text")]));

            assert_eq!(said.code, Some(1), "{}", said.text);
            assert!(said.text.contains("forged"), "{}", said.text);
            let odd = said.text.lines().find(|line| line.contains(char::is_control) || line.starts_with("2026"));
            assert_eq!(odd, None, "{}", said.text);
        }
    }

    #[test]
    fn given_an_empty_folder_when_checked_then_it_says_what_it_looked_for() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = folder.path().display().to_string();

        refuses(&["check", &path], 1, &[&path, "yaml"]);
    }

    #[test]
    fn given_a_file_that_may_not_be_read_when_checked_then_it_is_named_and_the_others_are_checked() {
        if rustix::process::geteuid().is_root() {
            skip("unreadable_file", "root may read every file");
            return;
        }
        let site = Site::new(30);
        let (folder, path) = folder_with(&Manifest::new(site).tcp().to_string());
        let locked = folder.path().join("locked.yaml");
        fs::write(&locked, "").expect("the test's folder can be written");
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o000)).expect("our own file");

        refuses(&["check", &path], 1, &["locked.yaml", "permission denied", "default/web"]);
    }

    #[test]
    fn given_only_other_kinds_when_checked_then_they_are_counted_by_kind() {
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: b}\n";
        let (_folder, path) = folder_with(pod);

        let said = say(kube_relay(&["check", &path]));

        assert!(said.text.contains("Pod") && said.text.contains("Deployment"), "{}", said.text);
    }

    #[test]
    fn given_a_value_of_the_wrong_type_when_checked_then_place_and_path_are_named() {
        let site = Site::new(32);
        let manifest = Manifest::new(site).tcp().to_string().replacen("port: 8080", "port: eighty", 1);
        let (_folder, path) = folder_with(&manifest);
        let line = 1 + manifest.lines().position(|line| line.contains("eighty")).expect("the mistake");

        refuses(&["check", &path], 1, &[&format!("web.yaml:{line}:"), "spec.ports[0].port", "eighty"]);
    }

    #[test]
    fn given_a_cluster_ip_that_is_no_address_when_checked_then_field_value_and_none_are_named() {
        let manifest =
            "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: node, ports: [{port: 80}]}\n";
        let (_folder, path) = folder_with(manifest);

        refuses(&["check", &path], 1, &["default/web", "clusterIP", "node", "None"]);
    }

    #[test]
    fn given_a_node_port_that_two_services_want_when_checked_then_both_are_named() {
        refuses(
            &["check", "examples/whoami.yaml", "examples/scale.yaml"],
            1,
            &["examples/whoami.yaml:7: Service default/whoami: node port 30000/TCP", "Service default/scale"],
        );
    }

    #[test]
    fn given_a_slip_in_kind_when_checked_then_it_is_no_other_kind() {
        let (_folder, path) = folder_with("apiVersion: v1\nkind: service\nmetadata: {name: web}\n");

        refuses(&["check", &path], 1, &["web.yaml:2:7: service default/web", "did you mean Service?"]);
    }

    #[test]
    fn given_endpoints_of_a_service_that_is_not_there_when_checked_then_it_is_noted() {
        let manifest = Manifest::new(Site::new(33)).tcp().to_string();
        let (_service, slice) = manifest.split_once("---\n").expect("a Service and a slice");
        let (_folder, path) = folder_with(slice);

        refuses(&["check", &path], 0, &["EndpointSlice default/", "there is no Service default/web"]);
    }

    #[test]
    fn given_a_service_without_endpoints_when_the_lines_of_check_are_pasted_then_it_has_one() {
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{port: 8080}]}\n";
        let (folder, path) = folder_with(service);
        let said = say(kube_relay(&["check", &path])).text;
        let lines = said.lines().skip_while(|line| *line != "---").take_while(|line| !line.is_empty());

        let pasted = lines.fold(service.to_owned(), |text, line| format!("{text}{line}\n"));
        replace(folder.path(), "web.yaml", &pasted);

        refuses(&["check", &path], 0, &["→ 127.0.0.1:8080", "1 Service, 1 listener, 0 problems"]);
    }

    #[test]
    fn given_a_wrong_command_line_when_run_then_the_code_is_64() {
        refuses(&["run"], 64, &["--source"]);
        refuses(&["check"], 64, &["PATH"]);
        refuses(&["serve"], 64, &["serve"]);
        refuses(&["new", "service", "web", "--port", "80", "--backend", "localhost:80"], 64, &["10.0.0.1:8000"]);
        refuses(&["run", "-f", "examples/whoami.yaml", "--drain-timeout", "soon"], 64, &["--drain-timeout", "soon"]);
    }
}

mod ask {
    use super::*;

    /// A `kube-relay run` that serves a manifest and answers questions at the second address.
    fn answering(site: Site, path: &str) -> (Running, String) {
        let server = SocketAddr::new(site.node_ip(), 10249).to_string();
        let mut command = run_command(&[path]);
        command.args(["--status-bind-address", &server]);
        let running = Running::start(command);
        running.until_says(&["ready"]);
        (running, server)
    }

    #[test]
    fn given_manifests_when_an_address_is_explained_then_each_backend_is_told_without_a_relay() {
        let said = say(kube_relay(&["explain", "-f", "examples/whoami.yaml", "127.96.0.10:8080/TCP"]));

        insta::assert_snapshot!(said.text, @r"
        Service:           default/whoami:http, NodePort
        Address:           127.96.0.10:8080/TCP, cluster IP, planned
        Port:              8080 → nodePort 30000 → targetPort 8000
        Any Client:        every ready endpoint (3 of 3 endpoints)
        Endpoints:         127.244.1.1:8000   whoami-1   used
                           127.244.1.2:8000   whoami-2   used
                           127.244.1.3:8000   whoami-3   used
        Backends See:      this node
        Balance:           round-robin
        ");
        assert_eq!(said.code, Some(0));
    }

    #[test]
    fn given_tcp_and_udp_on_one_number_when_explained_without_a_protocol_then_both_are_told() {
        let said = say(kube_relay(&["explain", "-f", "examples/whoami.yaml", "127.96.0.10:8080"]));

        assert!(said.text.contains("default/whoami:http, NodePort\n"), "{}", said.text);
        assert!(said.text.contains("\n\nService:           default/whoami:echo, NodePort\n"), "{}", said.text);
    }

    #[test]
    fn given_an_address_of_nobody_when_explained_then_what_is_near_is_told_and_the_code_is_1() {
        let line = ["explain", "-f", "examples/whoami.yaml"];

        refuses(&[&line[..], &["127.96.0.10:81"]].concat(), 1, &["127.96.0.10:81", "8080/TCP (default/whoami:http)"]);
        refuses(&[&line[..], &["web:80"]].concat(), 64, &["10.96.0.10:80"]);
        refuses(&["explain", "127.96.0.10:80", "--server", "127.0.0.1:1"], 1, &["127.0.0.1:1", "--server"]);
    }

    #[test]
    fn given_a_running_relay_when_an_address_is_explained_then_the_backend_it_names_is_the_next_one() {
        let site = Site::new(51);
        [1, 2].into_iter().for_each(|number| start_backend(site.backend(number)));
        let manifest = Manifest::new(site).tcp().endpoints([1, 2].map(|number| site.backend(number)));
        let (_folder, path) = folder_with(&manifest.unready([site.backend(3)]).to_string());
        let (_running, server) = answering(site, &path);
        let explained = || say(kube_relay(&["explain", &site.service().to_string(), "--server", &server])).text;
        let next = || {
            let text = explained();
            let line = text.lines().find(|line| line.ends_with(" next")).map(str::to_owned);
            line.unwrap_or_else(|| panic!("nobody is next: {text}"))
        };

        for _ in 0..3 {
            let announced = next();
            let answered = ask(site.service()).expect("it is served").to_string();
            assert!(announced.contains(&answered), "{announced} is not {answered}");
        }
        assert!(explained().contains("not used: not ready"), "{}", explained());
    }

    #[test]
    fn given_session_affinity_when_an_address_is_explained_for_a_client_then_its_backend_is_told_and_not_renewed() {
        let site = Site::new(55);
        [1, 2].into_iter().for_each(|number| start_backend(site.backend(number)));
        let manifest = Manifest::new(site).tcp().sticky(60).endpoints([1, 2].map(|number| site.backend(number)));
        let (_folder, path) = folder_with(&manifest.to_string());
        let (_running, server) = answering(site, &path);
        let affinity = |client: &str| {
            let said =
                say(kube_relay(&["explain", &site.service().to_string(), "--from", client, "--server", &server]));
            let line =
                said.text.lines().find_map(|line| line.strip_prefix("Affinity:")).map(|line| line.trim().to_owned());
            line.unwrap_or_else(|| panic!("it says nothing of affinity: {}", said.text))
        };
        let mut stream = TcpStream::connect(site.service()).expect("it is served");
        let client = stream.local_addr().expect("it is connected").ip();
        let mut backend = String::new();
        stream.read_to_string(&mut backend).expect("a backend answers");

        let text = affinity(&client.to_string());

        assert!(text.starts_with(&format!("{client} is kept at {backend} for another ")), "{text}");
        assert_eq!(affinity("192.0.2.7"), "192.0.2.7 has no backend kept");
    }

    #[test]
    fn given_a_running_relay_when_one_service_is_asked_for_then_that_one_alone_is_told_in_the_shape_of_all() {
        let site = Site::new(54);
        let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
        let other = "---\napiVersion: v1\nkind: Service\nmetadata: {name: other}\nspec: {clusterIP: None, ports: [{port: 80}]}\n";
        let (_folder, path) = folder_with(&format!("{manifest}\n{other}"));
        let (_running, server) = answering(site, &path);
        let status = |more: &[&str]| say(kube_relay(&[&["status", "--server", &server], more].concat()));
        let json = |more: &[&str]| -> serde_json::Value {
            let said = status(&[&["-o", "json"], more].concat());
            serde_json::from_str(&said.text).unwrap_or_else(|error| panic!("{error}: {}", said.text))
        };

        let (all, one) = (json(&[]), json(&["default/web"]));
        let nobody = status(&["shop/web"]);

        assert_eq!((&all["services"][0]["name"], &all["services"][1]["name"]), (&"other".into(), &"web".into()));
        assert_eq!(one["services"], serde_json::json!([all["services"][1]]));
        for part in ["version", "pid", "revision", "synced", "source", "inside"] {
            assert!(!one[part].is_null() && one[part] == all[part], "{part}: {one}");
        }
        assert!(status(&["web"]).text.contains(&site.service().ip().to_string()));
        assert!(nobody.text.contains(": there is no Service shop/web, but default/web\n"), "{}", nobody.text);
        assert_eq!(nobody.code, Some(1));
    }

    #[test]
    fn given_a_running_relay_when_manifests_are_compared_then_the_code_says_whether_they_differ() {
        let site = Site::new(52);
        let manifest = |numbers: &[u8]| {
            let backends = numbers.iter().map(|number| site.backend(*number));
            Manifest::new(site).tcp().endpoints(backends).to_string()
        };
        let (_folder, path) = folder_with(&manifest(&[1, 2]));
        let (_other_folder, other) = folder_with(&manifest(&[2, 3]));
        let (running, server) = answering(site, &path);
        let diff = |path: &str| say(kube_relay(&["diff", path, "--server", &server]));

        let (_broken_folder, broken) = folder_with(&format!("{}---\nkind: Service: x\n", manifest(&[1, 2])));
        let (same, different, unsure) = (diff(&path), diff(&other), diff(&broken));

        assert_eq!((same.text.as_str(), same.code), ("", Some(0)));
        assert_eq!(unsure.code, Some(2), "{}", unsure.text);
        assert!(unsure.text.contains("not certain, as manifests have errors"), "{}", unsure.text);
        assert_eq!(different.code, Some(1), "{}", different.text);
        let (went, came) = (format!("-     → {}", site.backend(1)), format!("+     → {}", site.backend(3)));
        assert!(different.text.contains(&went) && different.text.contains(&came), "{}", different.text);
        drop(running);
        assert_eq!(diff(&path).code, Some(2), "nobody can tell");
    }

    #[test]
    fn given_nothing_to_compare_with_when_a_difference_is_asked_for_then_the_code_is_not_that_of_a_difference() {
        refuses(&["diff", "missing.yaml"], 2, &["missing.yaml: no such file"]);
        refuses(&["diff", "--config", "missing.yaml", "examples/whoami.yaml"], 2, &["missing.yaml"]);
        refuses(&["diff", "examples/whoami.yaml", "--server", "127.0.0.1:1"], 2, &["127.0.0.1:1: nothing answers"]);
        refuses(&["diff"], 64, &["<PATH>"]);
    }

    #[test]
    fn given_a_folder_of_nobody_when_an_upgrade_or_readiness_is_asked_for_then_the_codes_are_those_of_the_help() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path().to_str().expect("a path of letters");

        for command in ["upgrade", "ready"] {
            refuses(&[command, "--state-dir", folder], 1, &[folder, "no kube-relay with this --state-dir runs"]);
            refuses(&[command], 64, &["--state-dir <FOLDER>"]);
            refuses(&[command, "--help"], 0, &["Exits with 0 ", "/var/lib/kube-relay"]);
            refuses(&["man", command], 0, &["Exits with 0 ", "with 1 ", "EXAMPLES", "/var/lib/kube\\-relay"]);
        }
        refuses(&["run", "-f", "x", "--take-over"], 64, &["--take-over", "--state-dir"]);
    }

    #[test]
    fn given_a_shell_or_a_command_when_its_script_or_page_is_asked_for_then_it_is_printed() {
        for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
            assert!(say(kube_relay(&["completions", shell])).text.contains("kube-relay"), "{shell}");
        }
        assert!(say(kube_relay(&["man", "new", "service"])).text.contains(".SH NAME"), "roff");
        refuses(&["man", "nothing"], 1, &["no command", "nothing"]);
        refuses(&["completions", "cobol"], 64, &["bash"]);
    }

    #[test]
    fn given_a_bash_with_the_script_when_a_line_is_completed_then_commands_flags_and_values_are_offered() {
        const ASK: &str = r#"
            source "$1"; shift
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
            function=$(complete -p kube-relay); function=${function#*-F }; function=${function%% *}
            "$function" kube-relay "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            echo "${COMPREPLY[*]}""#;
        let folder = tempfile::tempdir().expect("a folder");
        let script = folder.path().join("script");
        fs::write(&script, say(kube_relay(&["completions", "bash"])).text).expect("a file");
        if Command::new("bash").arg("--version").output().is_err() {
            return skip("bash", "there is none here");
        }
        let offered = |words: &[&str]| {
            let mut command = Command::new("bash");
            command.args(["--norc", "-c", ASK, "bash"]).arg(&script).arg("kube-relay").args(words);
            say(command).text.trim().to_owned()
        };

        assert_eq!(offered(&["ex"]), "explain");
        assert_eq!(offered(&["new", "ser"]), "service");
        assert_eq!(offered(&["status", "--o"]), "--output");
        assert_eq!(offered(&["status", "-o", "w"]), "wide");
        assert_eq!(offered(&["new", "service", "web", "--type", "Node"]), "NodePort");
    }
}

mod run {
    use super::*;

    #[test]
    fn given_new_service_when_its_manifest_is_piped_to_run_then_it_serves() {
        let site = Site::new(40);
        start_backend(site.backend(1));
        let backend = site.backend(1).to_string();
        let made = kube_relay(&["new", "service", "web", "--port", "8080", "--backend", &backend]).output();
        let manifest = made.expect("the program starts").stdout;
        let (_folder, path) = folder_with(&String::from_utf8_lossy(&manifest));
        let planned = say(kube_relay(&["check", &path, "-o", "json"]));
        let plan: kube_relay::status::Report = serde_json::from_str(&planned.text).expect("the document of `check`");
        let service: SocketAddr = plan.services[0].ports[0].listeners[0].address.parse().expect("an address");

        let running = Running::start_with_input(run_command(&["-"]), &manifest);

        assert_eq!(ask_until_answered(service), site.backend(1));
        running.signal(rustix::process::Signal::TERM);
        assert!(running.end().success());
    }

    #[test]
    fn given_an_address_of_another_machine_when_run_then_it_is_reported_and_the_rest_serves() {
        let site = Site::new(41);
        start_backend(site.backend(1));
        let good = Manifest::new(site).tcp().endpoints([site.backend(1)]);
        // TEST-NET-1: on no machine.
        let bad = Manifest::new(site).named("far").cluster_ip(Ipv4Addr::new(192, 0, 2, 1).into()).tcp();
        let bad = bad.endpoints([site.backend(1)]);
        let (_folder, path) = folder_with(&format!("{good}---\n{bad}"));

        let running = Running::start(run_command(&[&path]));

        running.until_says(&["default/far", "192.0.2.1:8080", "ip address add 192.0.2.1/32 dev lo"]);
        assert_eq!(ask_until_answered(site.service()), site.backend(1));
    }

    #[test]
    fn given_a_port_below_1024_without_the_capability_when_run_then_the_remedy_is_named_and_the_rest_serves() {
        let site = Site::new(42);
        if TcpListener::bind((site.node_ip(), 81)).is_ok() {
            skip("low_port", "this process may bind ports below 1024");
            return;
        }
        start_backend(site.backend(1));
        let good = Manifest::new(site).tcp().endpoints([site.backend(1)]);
        let bad = Manifest::new(site).named("low").cluster_ip(site.client(1)).tcp().endpoints([site.backend(1)]);
        let bad = bad.to_string().replacen("port: 8080", "port: 81", 1);
        let (_folder, path) = folder_with(&format!("{good}---\n{bad}"));

        let running = Running::start(run_command(&[&path]));

        running.until_says(&["default/low", ":81", "NET_BIND_SERVICE", "ip_unprivileged_port_start"]);
        assert_eq!(ask_until_answered(site.service()), site.backend(1));
    }

    #[test]
    fn given_the_example_of_a_load_balancer_when_run_then_it_answers_at_that_address_and_at_the_cluster_ip() {
        if !low_ports_are_ours() {
            return;
        }
        let backends: [SocketAddr; 2] = [([127, 244, 4, 1], 80).into(), ([127, 244, 4, 2], 80).into()];
        backends.into_iter().for_each(start_backend);

        let _running = Running::start(run_command(&["examples/loadbalancer.yaml"]));

        for service in [([127, 0, 90, 1], 82).into(), ([127, 96, 0, 82], 82).into()] {
            let first = ask_until_answered(service);
            let second = ask_until_answered(service);
            assert!(first != second && backends.contains(&first) && backends.contains(&second), "{first} {second}");
        }
    }

    #[test]
    fn given_the_example_of_dns_when_run_then_udp_tcp_and_the_metrics_beside_them_answer() {
        if !low_ports_are_ours() {
            return;
        }
        let host = |number| Ipv4Addr::new(127, 244, 5, number);
        for number in [1, 2] {
            [53, 9153].into_iter().for_each(|port| start_backend((host(number), port).into()));
            start_udp_backend((host(number), 53).into());
        }

        let _running = Running::start(run_command(&["examples/dns.yaml"]));

        let service = Ipv4Addr::new(127, 96, 0, 53);
        for port in [53, 9153] {
            let answered = [(); 2].map(|()| ask_until_answered((service, port).into()));
            assert_eq!(BTreeSet::from(answered), [1, 2].map(|number| (host(number), port).into()).into());
        }
        let answered = [(); 2].map(|()| ask_over_udp((service, 53).into()));
        assert_eq!(BTreeSet::from(answered), [1, 2].map(|number| (host(number), 53).into()).into());
    }

    /// False, with a word of why, for an ordinary user.
    fn low_ports_are_ours() -> bool {
        let ours = TcpListener::bind((Ipv4Addr::new(127, 0, 90, 2), 81)).is_ok();
        if !ours {
            skip("low_port", "this process may not bind ports below 1024");
        }
        ours
    }

    #[test]
    fn given_two_proxies_on_the_same_addresses_when_the_first_ends_then_the_second_takes_over() {
        let site = Site::new(43);
        start_backend(site.backend(1));
        let (_folder, path) = folder_with(&Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string());
        let first = Running::start(run_command(&[&path]));
        assert_eq!(ask_until_answered(site.service()), site.backend(1));

        let second = Running::start(run_command(&[&path]));
        second.until_says(&["default/web", &site.service().to_string(), "another socket holds it"]);
        assert_eq!(ask(site.service()), Some(site.backend(1)), "the first goes on");
        first.signal(rustix::process::Signal::INT);
        assert!(first.end().success());

        assert_eq!(ask_until_answered(site.service()), site.backend(1));
    }

    #[test]
    fn t237_given_a_relay_with_a_state_folder_when_a_second_one_has_it_too_then_that_refuses_and_names_the_first() {
        let site = Site::new(49);
        start_backend(site.backend(1));
        let (_folder, path) = folder_with(&Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string());
        let state = tempfile::tempdir().expect("a folder can be made");
        let command = || {
            let mut command = run_command(&[&path]);
            command.arg("--state-dir").arg(state.path());
            command
        };
        let mut first = Running::start(command());
        assert_eq!(ask_until_answered(site.service()), site.backend(1));
        let pid = first.child.id();

        let refused = say(command());

        let told = format!("kube-relay with pid {pid}, no admin server, since 20");
        assert!(
            refused.text.contains(&told) && refused.text.contains(&*state.path().to_string_lossy()),
            "{}",
            refused.text
        );
        assert_eq!(refused.code, Some(1), "{}", refused.text);
        assert_eq!(ask(site.service()), Some(site.backend(1)), "the first goes on");

        first.child.kill().expect("our own child");
        first.child.wait().expect("our own child");
        let next = Running::start(command());
        assert_eq!(ask_until_answered(site.service()), site.backend(1), "at once: nobody cleans up");
        next.signal(rustix::process::Signal::TERM);
        assert!(next.end().success());
    }

    #[test]
    fn t237_given_a_state_folder_that_cannot_be_locked_when_run_then_that_is_told_and_all_is_served() {
        let site = Site::new(50);
        start_backend(site.backend(1));
        let (folder, path) = folder_with(&Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string());
        let missing = folder.path().join("missing");
        let mut command = run_command(&[&path]);
        command.arg("--state-dir").arg(&missing);

        let running = Running::start(command);

        running.until_says(&[&missing.display().to_string(), "cannot lock kube-relay.lock", "No such file"]);
        assert_eq!(ask_until_answered(site.service()), site.backend(1));
    }

    #[test]
    fn given_a_broken_file_when_run_then_it_waits_for_it_to_be_mended() {
        let site = Site::new(44);
        start_backend(site.backend(1));
        let (folder, path) = folder_with("kind: [Service\n");

        let running = Running::start(run_command(&[&path]));
        running.until_says(&["web.yaml"]);
        replace(Path::new(&path), "web.yaml", &Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string());

        assert_eq!(ask_until_answered(site.service()), site.backend(1));
        drop(folder);
    }

    #[test]
    fn given_a_service_when_its_file_breaks_and_is_mended_then_it_serves_all_along_and_the_log_tells() {
        let site = Site::new(46);
        start_backend(site.backend(1));
        let good = Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string();
        let (folder, path) = folder_with(&good);
        let running = Running::start(run_command(&[&path]));
        running.until_says(&["listening", "default/web", &site.service().to_string()]);

        replace(folder.path(), "web.yaml", &good.replacen("port: 8080", "port: eighty", 1));
        running.until_says(&["web.yaml:", "Service default/web: spec.ports[0].port", "eighty"]);
        running.until_says(&["Service default/web: its last good version stays in use"]);
        assert_eq!(ask(site.service()), Some(site.backend(1)));
        replace(folder.path(), "web.yaml", &good);

        running.until_says(&["no longer:", "its last good version"]);
        assert_eq!(ask(site.service()), Some(site.backend(1)));
    }

    #[test]
    fn given_a_path_from_the_working_folder_when_its_file_changes_then_it_is_seen_at_once() {
        let site = Site::new(47);
        let with = |backend| Manifest::new(site).tcp().endpoints([site.backend(backend)]).to_string();
        start_backend(site.backend(1));
        start_backend(site.backend(2));
        let (folder, _) = folder_with(&with(1));
        let mut command = run_command(&["web.yaml"]);
        command.current_dir(folder.path());
        let _running = Running::start(command);
        assert_eq!(ask_until_answered(site.service()), site.backend(1));

        // Five changes: looking at the file now and then, as is done where the kernel does not tell, takes 25 s.
        let begin = Instant::now();
        for backend in [2, 1, 2, 1, 2] {
            replace(folder.path(), "web.yaml", &with(backend));
            while ask(site.service()) != Some(site.backend(backend)) {
                assert!(begin.elapsed() < DEADLINE, "change to backend {backend} is not seen");
            }
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "changes are seen late: {:?}", begin.elapsed());
    }

    #[test]
    fn t157_given_an_open_connection_when_sigterm_comes_then_it_may_end_by_itself_and_the_code_is_0() {
        let site = Site::new(45);
        let backend = TcpListener::bind(site.backend(1)).expect("the test's own address is free");
        let (_folder, path) = folder_with(&Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string());
        let running = Running::start(run_command(&[&path]));
        let mut client = connect_until_accepted(site.service());
        let (mut upstream, _) = backend.accept().expect("the relay connects");
        drop(backend); // Whoever connects from now on is refused, and no other stream holds up the end.

        running.signal(rustix::process::Signal::TERM);
        until_refused(site.service());
        upstream.write_all(b"bye").expect("the connection is open");
        drop(upstream);

        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("a clean end");
        assert_eq!(answer, "bye");
        drop(client);
        assert!(running.end().success());
    }

    #[test]
    fn t157_given_a_connection_that_does_not_end_when_the_drain_is_over_then_it_is_reset_and_the_code_is_0() {
        let site = Site::new(48);
        let backend = TcpListener::bind(site.backend(1)).expect("the test's own address is free");
        let (_folder, path) = folder_with(&Manifest::new(site).tcp().endpoints([site.backend(1)]).to_string());
        let mut command = run_command(&[&path]);
        command.args(["--drain-timeout", "1s"]);
        let running = Running::start(command);
        let mut client = connect_until_accepted(site.service());
        let (mut upstream, _) = backend.accept().expect("the relay connects");
        drop(backend);

        running.signal(rustix::process::Signal::TERM);
        until_refused(site.service());
        upstream.write_all(b"still here").expect("the connection is open");
        client.read_exact(&mut [0; 10]).expect("it goes on meanwhile");

        for mut end in [client, upstream] {
            let error = end.read(&mut [0]).expect_err("not a clean end");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        assert!(running.end().success());
    }

    #[cfg(feature = "kubernetes")]
    #[test]
    fn given_an_api_server_as_the_source_when_sighup_comes_then_the_log_says_that_nothing_is_to_be_read_again() {
        let mut command = run_command(&[]);
        command.args(["--master", "http://127.0.0.1:1", "--node-name", "node-1"]);
        let running = Running::start(command);
        running.until_says(&["asking the API server", "http://127.0.0.1:1"]);

        running.signal(rustix::process::Signal::HUP);

        running.until_says(&["SIGHUP changes nothing"]);
    }

    fn connect_until_accepted(service: SocketAddr) -> TcpStream {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match TcpStream::connect(service) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "{service}: {error}"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn until_refused(service: SocketAddr) {
        let deadline = Instant::now() + DEADLINE;
        while TcpStream::connect(service).is_ok() {
            assert!(Instant::now() < deadline, "{service} still accepts");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
