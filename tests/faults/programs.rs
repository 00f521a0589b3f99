//! Programs that people measure with, against servers that people run, through the relay.
//!
//! Each test skips where its programs are not installed.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use kube_relay::name::Family;

use crate::rig::{Namespace, Process, find, full, skip};
use crate::stage::{PODS, PORT, Stage, until};

/// How long each measures, in seconds.
fn span() -> String {
    if full() { "10" } else { "1" }.to_owned()
}

pub(crate) fn iperf3() {
    let Some(program) = find("iperf3") else { return skip("iperf3", "not installed") };
    let stage = Stage::build();
    let mut server = Command::new(&program);
    server.args(["--server", "--forceflush", "--port", &PORT.to_string()]);
    let _server = stage.start(stage.pod(0), server);
    let relay = stage.relay(&[stage.backend(0, Family::V4)], &[]);

    for (ended, direction) in [None, Some("--reverse"), Some("--bidir")].into_iter().enumerate() {
        // It closes its listener after each client, and resets who waits there.
        let listens = || stage.said(stage.pod(0)).matches("Server listening").count() > ended;
        until("iperf3 to listen", || listens().then_some(()));
        let mut client = Command::new(&program);
        client.args(["--client", &stage.service(Family::V4).ip().to_string(), "--port", &PORT.to_string()]);
        client.args(["--time", &span(), "--parallel", "4", "--json"]).args(direction);
        let report: serde_json::Value = serde_json::from_str(&output(stage.client(), client)).expect("it speaks JSON");
        let received = ["sum_received", "sum_received_bidir_reverse"].map(|sum| &report["end"][sum]["bits_per_second"]);
        let rates: Vec<_> = received.iter().filter_map(|rate| rate.as_f64()).map(|rate| rate / 1e9).collect();

        println!("iperf3 {}: {rates:.2?} Gbit/s", direction.unwrap_or("--parallel 4"));
        assert!(report["error"].is_null(), "{}", report["error"]);
        assert_eq!(rates.len(), if direction == Some("--bidir") { 2 } else { 1 });
        assert!(rates.iter().all(|rate| *rate > 0.0), "nothing has arrived");
    }
    assert_eq!(relay.dropped(None), 0);
}

pub(crate) fn wrk() {
    let (Some(nginx), Some(wrk)) = (find("nginx"), find("wrk")) else {
        return skip("wrk", "wrk or nginx not installed");
    };
    let stage = Stage::build();
    let _servers: Vec<_> = (0..PODS).map(|number| serve_http(&stage, number, &nginx)).collect();
    let relay = stage.relay(&stage.backends(Family::V4), &[]);

    let mut client = Command::new(wrk);
    client.args(["--threads", "2", "--connections", "60", "--latency", "--duration", &span()]);
    let said = output(stage.client(), {
        client.arg(format!("http://{}/", stage.service(Family::V4)));
        client
    });

    for line in
        said.lines().filter(|line| ["requests in", "Requests/sec", "99%"].iter().any(|word| line.contains(word)))
    {
        println!("wrk: {}", line.trim());
    }
    assert!(said.contains("requests in"), "{said}");
    assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
    assert_eq!((relay.dropped(None), relay.metric("kuberelay_connect_failures_total", &[])), (0, 0));
    for backend in stage.backends(Family::V4) {
        let label = format!(r#"backend="{backend}""#);
        assert!(relay.metric("kuberelay_connections_total", &[&label]) > 0, "{backend} has got none");
    }
}

/// nginx in a pod, which answers everything with a few bytes.
fn serve_http(stage: &Stage, number: u8, nginx: &Path) -> Process {
    let pid = stage.file(&format!("nginx-{number}.pid"), "");
    let folder = pid.parent().expect("it is in a folder").display();
    // The folders that it was built with are root's, whether it would write there or not.
    let folders: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("  {name}_temp_path {folder};\n"))
        .concat();
    // Root, as there may be nobody else in this user namespace.
    let configuration = format!(
        "user root;\ndaemon off;\nworker_processes 1;\npid {};\nerror_log stderr crit;\nevents {{}}\nhttp {{\n\
         {folders}  access_log off;\n  server {{\n    listen {};\n    location / {{ return 200 \"from pod {number}\"; }}\n  }}\n}}\n",
        pid.display(),
        stage.backend(number, Family::V4),
    );
    let mut command = Command::new(nginx);
    command.args(["-e", "stderr", "-c"]).arg(stage.file(&format!("nginx-{number}.conf"), &configuration));
    let server = stage.start(stage.pod(number), command);
    listening(stage.pod(number), stage.backend(number, Family::V4));
    server
}

pub(crate) fn dnsperf() {
    /// Queries a second: the first rate is taken at which the way without a relay loses none.
    const RATES: [u32; 4] = [10_000, 5_000, 2_000, 500];
    let server = find("knotd").map(|program| (program, knot as fn(&Stage, u8, &Path) -> Command));
    let server = server.or_else(|| find("dnsmasq").map(|program| (program, dnsmasq as _)));
    let (Some((program, command)), Some(dnsperf)) = (server, find("dnsperf")) else {
        return skip("dnsperf", "dnsperf, or knotd and dnsmasq, not installed");
    };
    let stage = Stage::build();
    let start = |number| stage.start(stage.pod(number), command(&stage, number, &program));
    let _servers: Vec<_> = (0..PODS).map(start).collect();
    let queries = stage.file("queries", "www.example.com A\nwww.example.com AAAA\nnowhere.example.com A\n");
    let ask = |server: SocketAddr, rate: u32| {
        let mut client = Command::new(&dnsperf);
        client.args(["-s", &server.ip().to_string(), "-p", &PORT.to_string(), "-l", &span(), "-c", "50", "-t", "2"]);
        let said = output(stage.client(), {
            client.args(["-Q", &rate.to_string(), "-d"]).arg(&queries);
            client
        });
        let number = |line: &str| {
            said.lines().find_map(|said| said.trim().strip_prefix(line)?.split_whitespace().next()?.parse::<u64>().ok())
        };
        let (Some(sent), Some(lost)) = (number("Queries sent:"), number("Queries lost:")) else { panic!("{said}") };
        (sent, lost)
    };
    for number in 0..PODS {
        until(&format!("a DNS server: {}", stage.said(stage.pod(number))), || {
            answers_dns(stage.pod(number), stage.backend(number, Family::V4)).then_some(())
        });
    }
    let relay = stage.relay(&stage.backends(Family::V4), &[]);

    let rate = RATES
        .into_iter()
        .find(|rate| ask(stage.backend(0, Family::V4), *rate).1 == 0)
        .expect("a rate at which none is lost");
    let (sent, lost) = ask(stage.service(Family::V4), rate);

    println!("{} at {rate} queries/s: {lost} of {sent} lost", program.display());
    assert!(sent > 0);
    assert_eq!((lost, relay.dropped(None)), (0, 0));
}

/// Knot DNS with one zone.
fn knot(stage: &Stage, number: u8, program: &Path) -> Command {
    let zone = "$ORIGIN example.com.\n$TTL 60\n@ SOA ns hostmaster 1 60 60 60 60\n@ NS ns\nns A 192.0.2.1\nwww A 192.0.2.2\nwww AAAA 2001:db8::2\n";
    let folder =
        stage.file("example.com.zone", zone).parent().expect("it is in a folder").join(format!("knot-{number}"));
    std::fs::create_dir(&folder).expect("the folder is ours");
    let configuration = format!(
        "server:\n  rundir: {folder}\n  listen: {ip}@{PORT}\n  udp-workers: 1\n  tcp-workers: 1\n  background-workers: 1\n\
         database:\n  storage: {folder}\n\
         zone:\n- domain: example.com\n  file: {folder}/../example.com.zone\n  zonefile-sync: -1\n  journal-content: none\n",
        folder = folder.display(),
        ip = stage.backend(number, Family::V4).ip(),
    );
    let mut command = Command::new(program);
    command.arg("-c").arg(stage.file(&format!("knot-{number}.conf"), &configuration));
    command
}

fn dnsmasq(stage: &Stage, number: u8, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--group=", "--pid-file="]);
    command.args(["--no-resolv", "--no-hosts", "--bind-interfaces", "--local=/example.com/"]);
    command.arg(format!("--port={PORT}")).arg(format!("--listen-address={}", stage.backend(number, Family::V4).ip()));
    command.args(["--host-record=www.example.com,192.0.2.2,2001:db8::2"]);
    command
}

/// True once somebody answers a question there.
fn answers_dns(inside: &Namespace, server: SocketAddr) -> bool {
    // Number 1, a question of one name: www.example.com, type A, class IN.
    const QUESTION: &[u8] = b"\0\x01\0\0\0\x01\0\0\0\0\0\0\x03www\x07example\x03com\0\0\x01\0\x01";
    let ask = || {
        let socket = std::net::UdpSocket::bind((server.ip(), 0))?;
        socket.set_read_timeout(Some(std::time::Duration::from_millis(100)))?;
        socket.connect(server)?;
        socket.send(QUESTION)?;
        socket.recv(&mut [0; 512])
    };
    inside.run(ask).is_ok()
}

/// Waits until somebody listens there.
fn listening(inside: &Namespace, server: SocketAddr) {
    until(&format!("somebody to listen at {server}"), || inside.run(|| std::net::TcpStream::connect(server)).ok());
}

/// What a program prints that ends by itself.
fn output(inside: &Namespace, mut command: Command) -> String {
    let output = inside.run(|| command.output()).unwrap_or_else(|error: io::Error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
