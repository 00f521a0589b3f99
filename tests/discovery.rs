//! What `kube-relay env` prints: variables for programs, and zones that a real DNS server loads and answers from.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use process::{Process, find};
use support::site::Site;
use support::{DEADLINE, skip};
use tempfile::TempDir;

#[path = "support/process.rs"]
#[allow(dead_code, reason = "of a program that runs nothing more is asked here")]
mod process;
mod support;

/// A Service of both families, a headless one as a cluster writes it (of an endpoint that ends and is published all the
/// same, too), and an alias.
const MANIFEST: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIPs: [10.96.0.10, "fd00:10::10"]
  ports: [{name: http, port: 80}, {name: dns, port: 53, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: pg, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db, service.kubernetes.io/headless: ""}}
addressType: IPv4
endpoints:
- {addresses: [10.244.0.5], hostname: db-0}
- {addresses: [10.244.0.6], conditions: {ready: true, serving: false, terminating: true}}
- {addresses: [10.244.0.7], hostname: db-2, conditions: {ready: false}}
ports: [{name: pg, port: 5432}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-2, namespace: shop, labels: {kubernetes.io/service-name: db, service.kubernetes.io/headless: ""}}
addressType: IPv6
endpoints: [{addresses: ["fd00:244::"]}]
ports: [{name: pg, port: 5433}]
---
apiVersion: v1
kind: Service
metadata: {name: mail, namespace: shop}
spec: {type: ExternalName, externalName: mail.example}
"#;

/// The networks of [`MANIFEST`], each of which is a zone.
const NETWORKS: [&str; 4] = ["10.96.0.0/16", "10.244.0.0/16", "fd00:10::/32", "fd00:244::/32"];

#[test]
fn given_manifests_when_asked_for_the_variables_of_a_namespace_then_only_cluster_ips_have_them() {
    let folder = folder(MANIFEST);

    let shop = text(&env(&folder, &["shop"]));
    let other = text(&env(&folder, &["other"]));

    assert!(shop.starts_with("WEB_SERVICE_HOST=10.96.0.10\nWEB_SERVICE_PORT=80\nWEB_SERVICE_PORT_HTTP=80\n"), "{shop}");
    assert!(shop.ends_with("\nWEB_PORT_53_UDP_ADDR=10.96.0.10\n"), "{shop}");
    assert!(shop.lines().all(|line| line.starts_with("WEB_")), "{shop}");
    assert_eq!(other, "");
}

#[test]
fn given_a_wrong_manifest_when_asked_for_a_zone_then_there_is_none_and_the_mistake_is_told() {
    let folder = folder(&MANIFEST.replace("port: 80", "port: 0"));

    let Output { status, stdout, stderr } = env(&folder, &["--format", "zone"]);

    assert_eq!((status.code(), stdout.len()), (Some(1), 0));
    assert!(String::from_utf8_lossy(&stderr).contains("spec.ports[0].port"));
}

#[test]
fn given_a_zone_of_each_kind_when_a_dns_server_loads_them_then_it_answers_as_a_cluster_would() {
    let (Some(knotd), Some(kdig)) = (find("knotd"), find("kdig")) else {
        return skip("knot", "knotd or kdig is not installed (packages knot and knot-dnsutils)");
    };
    let folder = folder(MANIFEST);
    let zone = |more: &[&str]| text(&env(&folder, &[&["--format", "zone"], more].concat()));
    let mut zones = vec![zone(&[])];
    zones.extend(NETWORKS.map(|network| zone(&["--reverse", network])));

    let server = DnsServer::start(&knotd, kdig, Site::new(1).backend(1), &zones);

    let cases: [(&[&str], &[&str]); 19] = [
        (&["web.shop.svc.cluster.local", "A"], &["10.96.0.10"]),
        (&["web.shop.svc.cluster.local", "AAAA"], &["fd00:10::10"]),
        (&["_http._tcp.web.shop.svc.cluster.local", "SRV"], &["0 100 80 web.shop.svc.cluster.local."]),
        (&["_dns._udp.web.shop.svc.cluster.local", "SRV"], &["0 100 53 web.shop.svc.cluster.local."]),
        (&["db.shop.svc.cluster.local", "A"], &["10.244.0.5", "10.244.0.6"]),
        (&["db-0.db.shop.svc.cluster.local", "A"], &["10.244.0.5"]),
        (&["10-244-0-6.db.shop.svc.cluster.local", "A"], &["10.244.0.6"]),
        (&["db-2.db.shop.svc.cluster.local", "A"], &[]),
        (
            &["_pg._tcp.db.shop.svc.cluster.local", "SRV"],
            &[
                "0 100 5432 10-244-0-6.db.shop.svc.cluster.local.",
                "0 100 5432 db-0.db.shop.svc.cluster.local.",
                "0 100 5433 fd00-244--0.db.shop.svc.cluster.local.",
            ],
        ),
        (&["db.shop.svc.cluster.local", "AAAA"], &["fd00:244::"]),
        (&["fd00-244--0.db.shop.svc.cluster.local", "AAAA"], &["fd00:244::"]),
        (&["DB-0.db.Shop.svc.cluster.local", "A"], &["10.244.0.5"]),
        (&["mail.shop.svc.cluster.local", "CNAME"], &["mail.example."]),
        (&["dns-version.cluster.local", "TXT"], &["\"1.1.0\""]),
        (&["-x", "10.96.0.10"], &["web.shop.svc.cluster.local."]),
        (&["-x", "10.244.0.5"], &["db-0.db.shop.svc.cluster.local."]),
        (&["-x", "10.244.0.7"], &[]),
        (&["-x", "fd00:10::10"], &["web.shop.svc.cluster.local."]),
        (&["-x", "fd00:244::"], &["fd00-244--0.db.shop.svc.cluster.local."]),
    ];
    for (question, answers) in cases {
        assert_eq!(server.ask(question), answers, "{question:?}");
    }
    let said = server.said();
    assert!(!said.contains(" check, ") && !said.contains("semantic"), "the server finds fault with a zone: {said}");
}

/// A folder with this manifest.
fn folder(manifest: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("all.yaml"), manifest).expect("a file");
    folder
}

/// What `kube-relay env` says of the manifest in a folder.
fn env(folder: &TempDir, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    command.arg("env").arg("-f").arg(folder.path()).args(arguments).env_clear().stdin(Stdio::null());
    command.output().expect("the program starts")
}

/// What it prints where nothing is wrong.
fn text(Output { status, stdout, stderr }: &Output) -> String {
    let stderr = String::from_utf8_lossy(stderr);
    assert!(status.success() && stderr.is_empty(), "{status}: {stderr}");
    String::from_utf8_lossy(stdout).into_owned()
}

/// A running knotd. It ends when this is dropped, and then its folder goes.
struct DnsServer {
    process: Process,
    folder: TempDir,
    address: SocketAddr,
    kdig: PathBuf,
}

impl DnsServer {
    /// Starts with these zones, and waits until each of them is answered for.
    fn start(knotd: &Path, kdig: PathBuf, address: SocketAddr, zones: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let names: Vec<&str> = zones.iter().map(|zone| origin(zone)).collect();
        for (name, zone) in names.iter().zip(zones) {
            fs::write(folder.path().join(format!("{name}zone")), zone).expect("a file");
        }
        let configuration = folder.path().join("knot.conf");
        fs::write(&configuration, knot_configuration(folder.path(), address, &names)).expect("a file");
        let log = File::create(folder.path().join("log")).expect("a file");
        let mut command = Command::new(knotd);
        command.arg("-c").arg(&configuration).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = Process::new(command.spawn().expect("knotd starts"));
        let mut server = Self { process, folder, address, kdig };
        names.iter().for_each(|name| server.await_zone(name));
        server
    }

    fn await_zone(&mut self, name: &str) {
        let deadline = Instant::now() + DEADLINE;
        while self.ask(&[name, "SOA"]).is_empty() {
            let ended = self.process.ended().expect("our own child can be asked");
            assert!(ended.is_none() && Instant::now() < deadline, "{name} is not answered for: {}", self.said());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The answers, sorted; none also where nobody answers yet.
    fn ask(&self, question: &[&str]) -> Vec<String> {
        let mut command = Command::new(&self.kdig);
        command.arg(format!("@{}", self.address.ip())).args(["-p", &self.address.port().to_string()]);
        let output = command.args(["+short", "+timeout=1", "+retry=9"]).args(question).output().expect("kdig starts");
        if !output.status.success() {
            return Vec::new();
        }
        let mut answers: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        answers.sort();
        answers
    }

    /// Its log so far.
    fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

/// The name of a zone, with the dot at its end.
fn origin(zone: &str) -> &str {
    let first = zone.lines().next().unwrap_or_default();
    first.strip_prefix("$ORIGIN ").expect("a zone begins with its name")
}

/// A server of these zones, out of files of their names, that writes nothing outside of the folder.
fn knot_configuration(folder: &Path, address: SocketAddr, zones: &[&str]) -> String {
    let (folder, ip, port) = (folder.display(), address.ip(), address.port());
    let zone = |name: &&str| format!("  - domain: \"{name}\"\n    file: \"{name}zone\"\n");
    let zones: String = zones.iter().map(zone).collect();
    format!(
        "\
server:
    rundir: \"{folder}\"
    listen: \"{ip}@{port}\"
    udp-workers: 1
    tcp-workers: 1
    background-workers: 1
database:
    storage: \"{folder}\"
log:
  - target: stderr
    any: info
template:
  - id: default
    storage: \"{folder}\"
    semantic-checks: on
    zonefile-sync: -1
    zonefile-load: whole
    journal-content: none
zone:
{zones}"
    )
}
