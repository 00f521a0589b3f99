//! Programs that take and give PROXY headers, as people have them behind the relay and before it.
//!
//! Each test skips where its programs are not installed.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kube_relay::name::Family;
use socket2::{Domain, Socket, Type};

use crate::databases::{self, Programs};
use crate::rig::{FAMILIES, Namespace, Process, find, skip};
use crate::stage::{NODE_PORT, PORT, Stage, until};

const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn nginx_logs_the_client() {
    let Some(nginx) = find("nginx") else { return skip("nginx", "not installed") };
    let stage = Stage::build();
    let web = Web::start(&stage, &nginx);
    let node = stage.node().address(Family::V4);
    let flags = ["--nodeport-addresses", "primary", "--node-address", &node.to_string()].map(str::to_owned);

    for version in ["v1", "v2"] {
        let relay = stage.relay_of(&stage.manifest(&web.addresses, &[("proxy-protocol", version)]), &flags);
        for family in FAMILIES {
            let service = stage.service(family);
            for from in [stage.client(), stage.pod(1)] {
                let told = format!("{} {} {PORT}", from.address(family), service.ip());
                assert_eq!(get(from, None, service).expect("an answer"), told, "{version} from {}", from.name());
            }
        }
        // At a node port, too; and a program on the node has the very address that it connects to.
        let entry = SocketAddr::new(node, NODE_PORT);
        let told = format!("{} {node} {NODE_PORT}", stage.client().address(Family::V4));
        assert_eq!(get(stage.client(), None, entry).expect("an answer"), told, "{version}");
        let service = stage.service(Family::V4);
        let told = format!("{ip} {ip} {PORT}", ip = service.ip());
        assert_eq!(get(stage.node(), None, service).expect("an answer"), told, "{version}");
        assert_eq!(relay.dropped(None), 0);
    }

    let logged = web.logged();
    let times = |ip: IpAddr| logged.iter().filter(|line| line.starts_with(&format!("{ip} "))).count();
    assert_eq!(FAMILIES.map(|family| times(stage.client().address(family))), [4, 2], "{logged:?}");
    assert_eq!(FAMILIES.map(|family| times(stage.pod(1).address(family))), [2, 2], "{logged:?}");
}

pub(crate) fn mariadb_logs_the_client() {
    let Some(programs) = Programs::find() else { return skip("mariadb", "not installed") };
    let stage = Stage::build();
    let folder = stage.file("databases", "").with_file_name("mariadb");
    fs::create_dir(&folder).expect("the folder is ours");
    databases::install(&programs.install, &folder);
    let (server, log) = (stage.backend(0, Family::V4), folder.join("general.log"));
    let more = ["--proxy-protocol-networks=*".to_owned(), format!("--general-log-file={}", log.display())];
    let more = [&more[..], &["--general-log=1".to_owned()]].concat();
    let _server = databases::serve(&programs.server, stage.pod(0), &folder, 1, server, &more);
    let ask = |from: &Namespace, to: SocketAddr| {
        let mut client = Command::new(&programs.client);
        client.args(["--no-defaults", "--batch", "--skip-column-names", "--user=app", "--password=secret"]);
        client.args([format!("--host={}", to.ip()), format!("--port={}", to.port())]).env_clear();
        let output = from.run(|| client.args(["--execute", "SELECT USER()"]).output()).expect("the client starts");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    until("the database to serve", || ask(stage.pod(0), server));

    for version in ["v1", "v2"] {
        let _relay = stage.relay_of(&stage.manifest(&[server], &[("proxy-protocol", version)]), &[]);
        for from in [stage.client(), stage.pod(1)] {
            let user = format!("app@{}", from.address(Family::V4));
            assert_eq!(ask(from, stage.service(Family::V4)), Some(user), "{version} from {}", from.name());
        }
    }

    let logged = fs::read_to_string(log).expect("it was written");
    for from in [stage.client(), stage.pod(1)] {
        let user = format!("app@{} ", from.address(Family::V4));
        let connects = logged.lines().filter(|line| line.contains("Connect") && line.contains(&user)).count();
        assert_eq!(connects, 2, "{logged}");
    }
}

pub(crate) fn haproxy_in_front_names_the_client() {
    let (Some(haproxy), Some(nginx)) = (find("haproxy"), find("nginx")) else {
        return skip("haproxy", "haproxy or nginx not installed");
    };
    let stage = Stage::build();
    let web = Web::start(&stage, &nginx);
    let annotations = [("accept-proxy", "true"), ("proxy-protocol", "v2")];
    let balancers = FAMILIES.map(|family| stage.client().address(family).to_string()).join(",");
    let flags = ["--accept-proxy-from".to_owned(), balancers];
    let relay = stage.relay_of(&stage.manifest(&web.addresses, &annotations), &flags);
    let mut front = Command::new(haproxy);
    front.arg("-db").arg("-f").arg(stage.file("haproxy.cfg", &in_front(&stage)));
    let _front = stage.start(stage.client(), front);
    let source = IpAddr::from(stage.rig.many_sources().expect("addresses of the client"));

    // A client of IPv6 has the balancer's own address here.
    for (family, client) in [(Family::V4, source), (Family::V6, stage.client().address(Family::V6))] {
        for (port, _) in FRONTS {
            let entry = SocketAddr::new(stage.client().address(family), port);
            let answer = until("the front to serve", || get(stage.client(), Some(client), entry).ok());
            assert_eq!(answer, format!("{client} {} {port}", entry.ip()));
        }
    }
    let logged = web.logged();
    assert!(logged.iter().any(|line| line.starts_with(&format!("{source} "))), "{logged:?}");
    // Its health checks name nobody, and are understood.
    let checks = || relay.metric("kuberelay_connections_total", &[]) >= 4 + FRONTS.len() as u64;
    until("health checks", || checks().then_some(()));
    assert_eq!(relay.dropped(Some("proxy_header")), 0);

    let forged = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.0\r\n\r\n";
    let outcome = stage.client().run(|| exchange(Some(source), stage.service(Family::V4), forged));
    assert_eq!(outcome.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(relay.dropped(Some("unknown_balancer")), 1);
}

/// Where HAProxy listens, and what it sends.
const FRONTS: [(u16, &str); 2] = [(8001, "send-proxy"), (8002, "send-proxy-v2 proxy-v2-options crc32c")];

fn in_front(stage: &Stage) -> String {
    let mut text = "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1m\n  timeout server 1m\n".to_owned();
    for family in FAMILIES {
        for (port, sends) in FRONTS {
            let (listen, service) = (SocketAddr::new(stage.client().address(family), port), stage.service(family));
            text +=
                &format!("listen {family}-{port}\n  bind {listen}\n  server web {service} check inter 200 {sends}\n");
        }
    }
    text
}

/// nginx in a pod, which expects a header and answers with what it says.
struct Web {
    addresses: [SocketAddr; 2],
    log: PathBuf,
    _server: Process,
}

impl Web {
    fn start(stage: &Stage, nginx: &Path) -> Self {
        let addresses = FAMILIES.map(|family| stage.backend(0, family));
        let log = stage.file("access.log", "");
        let folder = log.parent().expect("it is in a folder").display();
        // The folders that it was built with are root's, whether it would write there or not.
        let folders: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("  {name}_temp_path {folder};\n"))
            .concat();
        let [v4, v6] = addresses;
        // Root, as there may be nobody else in this user namespace.
        let configuration = format!(
            "user root;\ndaemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log stderr crit;\nevents {{}}\n\
             http {{\n{folders}  access_log {log};\n  default_type text/plain;\n  server {{\n    \
             listen {v4} proxy_protocol;\n    listen {v6} proxy_protocol;\n    \
             set_real_ip_from 0.0.0.0/0;\n    set_real_ip_from ::/0;\n    real_ip_header proxy_protocol;\n    \
             location / {{ return 200 \"$remote_addr $proxy_protocol_server_addr $proxy_protocol_server_port\"; }}\n  \
             }}\n}}\n",
            log = log.display(),
        );
        let mut command = Command::new(nginx);
        command.args(["-e", "stderr", "-c"]).arg(stage.file("nginx.conf", &configuration));
        let server = stage.start(stage.pod(0), command);
        for address in addresses {
            until(&format!("nginx: {}", stage.said(stage.pod(0))), || {
                stage.pod(0).run(|| TcpStream::connect(address)).ok()
            });
        }
        Self { addresses, log, _server: server }
    }

    /// Its access log, a line for each request.
    fn logged(&self) -> Vec<String> {
        fs::read_to_string(&self.log).expect("it was made").lines().map(str::to_owned).collect()
    }
}

/// What a web server answers to a client there, maybe to one of its addresses.
fn get(inside: &Namespace, source: Option<IpAddr>, to: SocketAddr) -> io::Result<String> {
    let answer = inside.run(|| exchange(source, to, b"GET / HTTP/1.0\r\n\r\n"))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(io::Error::other(answer)),
    }
}

fn exchange(source: Option<IpAddr>, to: SocketAddr, said: &[u8]) -> io::Result<String> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(said)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
