//! What a relay does where the machine has no more to give: descriptors, source ports.
//!
//! Each test runs in a process of its own, this program once more, as limits are the process's; where it needs a network of
//! its own, too, in namespaces of a user who may do everything there, if the kernel lets anybody have those.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use kube_relay::control::RelayOptions;
use kube_relay::serve::connect::{ConnectOptions, Sources};
use kube_relay::serve::socket;
use kube_relay::serve::tcp::TcpOptions;
use kube_relay::stats::{ConnectFailure, DropReason, PROCESS, PauseReason};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};

use crate::support::backend::Backend;
use crate::support::manifest::Manifest;
use crate::support::relay::{Relay, service_of};
use crate::support::site::Site;
use crate::support::{client, skip, within};

/// Says to this program that it is the inner one.
const INNER: &str = "KUBE_RELAY_INNER_TEST";

/// Runs a test of this program in a process of its own, behind the words of a command that starts it.
fn alone(test: &str, command: &[&str]) -> bool {
    let program = std::env::current_exe().expect("this program");
    let mut words = command.to_vec();
    words.push(program.to_str().expect("a path in UTF-8"));
    let status =
        Command::new(words[0]).args(&words[1..]).args(["--exact", test, "--nocapture"]).env(INNER, "1").status();
    status.expect("this program starts again").success()
}

fn is_inner() -> bool {
    std::env::var_os(INNER).is_some()
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(test);
}

fn dropped(relay: &Relay, reason: DropReason) -> u64 {
    let status = relay.status();
    let ports = &service_of(&status, "web").expect("the Service").ports;
    ports.iter().filter_map(|port| port.state.as_ref()).map(|state| state.stats.dropped.get(reason)).sum()
}

#[test]
fn t167_given_no_descriptor_left_when_clients_come_then_they_wait_and_are_served_when_there_is_one() {
    const NAME: &str =
        "limits::t167_given_no_descriptor_left_when_clients_come_then_they_wait_and_are_served_when_there_is_one";
    if !is_inner() {
        assert!(alone(NAME, &[]), "see above");
        return;
    }
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(200), maximum }).expect("a lower limit");
    run(async {
        let site = Site::new(167);
        let _backend = Backend::named(site.backend(1)).await;
        let relay = Relay::start(site, Manifest::new(site).tcp().endpoints([site.backend(1)])).await;
        let mut open = client::connect(site.service()).await.expect("the Service answers");
        client::ask_on(&mut open).await.expect("the backend answers");

        let sockets: Vec<_> = (0..3).map(|_| TcpSocket::new_v4().expect("a socket")).collect();
        let mut hoard = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            hoard.push(file);
        }
        let mut waiting = Vec::new();
        for socket in sockets {
            waiting.push(within("a place in the queue", socket.connect(site.service())).await.expect("a listener"));
        }
        // The kernel has said no, or the relay has seen before that few are left: either way nobody is accepted.
        let paused = &PROCESS.accept_paused[usize::from(PauseReason::FdLimit)];
        relay.until("the lack to be counted", |_| paused.seconds() > 0.0).await;
        client::ask_on(&mut open).await.expect("an open connection goes on");
        drop(hoard);

        for mut stream in waiting {
            assert_eq!(client::ask_on(&mut stream).await.expect("it is served"), site.backend(1));
        }
    });
}

#[test]
fn t168_given_two_sources_of_ten_ports_when_21_clients_stay_then_20_are_served_and_one_is_told_at_once() {
    const NAME: &str =
        "limits::t168_given_two_sources_of_ten_ports_when_21_clients_stay_then_20_are_served_and_one_is_told_at_once";
    const UNSHARE: [&str; 2] = ["unshare", "-Urn"];
    if !is_inner() {
        let may = Command::new(UNSHARE[0]).args([UNSHARE[1], "true"]).status().is_ok_and(|status| status.success());
        if may {
            assert!(alone(NAME, &UNSHARE), "see above");
        } else {
            skip("namespace", "this kernel gives ordinary users no network namespace, or unshare(1) is not installed");
        }
        return;
    }
    run(async {
        raise_loopback().await;
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40009").expect("the namespace is ours");
        let site = Site::new(168);
        let _backend = Backend::named(site.backend(1)).await;
        let connect = ConnectOptions { sources: Sources::new([site.client(8), site.client(9)]), ..Default::default() };
        let options = RelayOptions { tcp: TcpOptions { connect, ..Default::default() }, ..Default::default() };
        let manifest = Manifest::new(site).tcp().endpoints([site.backend(1)]);
        let relay = Relay::start_with(site, manifest, options).await;

        let mut open = Vec::new();
        for number in 0..20 {
            let mut stream =
                connect_from(site.client(number / 10 + 1), site.service()).await.expect("the Service answers");
            assert_eq!(client::ask_on(&mut stream).await.expect("there is a port"), site.backend(1));
            open.push(stream);
        }
        let late = async { connect_from(site.client(3), site.service()).await?.read_to_end(&mut Vec::new()).await };
        let end = within("the end", late).await;

        assert_eq!(end.expect_err("not a clean end").kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(dropped(&relay, DropReason::LocalPorts), 1);
        let backend = relay.backend("web", site.backend(1));
        assert!(backend.stats.connect_failures.get(ConnectFailure::LocalPorts) >= 2, "each source was tried");
        assert_eq!(client::ask_on(&mut open[0]).await.expect("an open connection goes on"), site.backend(1));
    });
}

async fn connect_from(source: IpAddr, service: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket::bind_source(&socket, SocketAddr::new(source, 0))?; // A port that is bound alone serves nobody else.
    within("a connection", socket.connect(service)).await
}

/// A new network namespace has a loopback interface that is down.
async fn raise_loopback() {
    let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
    let netlink = tokio::spawn(connection);
    let up = rtnetlink::LinkUnspec::new_with_index(1).up().build();
    handle.link().set(up).execute().await.expect("the namespace is ours");
    netlink.abort();
}
