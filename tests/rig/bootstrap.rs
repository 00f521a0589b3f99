//! A relay in place of kube-proxy, at the addresses of a cluster: 10.96.0.1 is on its node, and leads to the API server once
//! the relay serves it, which has to hear of it from the API server.
//!
//! The same on loopback, with what the log says, is in `kubernetes/bootstrap`.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use kube_relay::name::Family;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::api_server::ApiServer;
use crate::rig::{Case, DualAddress, Namespace, Process, Rig};
use crate::stage::{Outcome, PORT, TCP_BACKEND_PORT, ask_tcp, expect_at, until};
use crate::verdicts::{backends, rig};

pub(crate) const CASES: &[Case] = cases![
    t227_given_the_real_address_at_first_and_later_the_cluster_ip_alone_when_started_then_the_relay_follows_both_times,
];

fn t227_given_the_real_address_at_first_and_later_the_cluster_ip_alone_when_started_then_the_relay_follows_both_times()
{
    let rig = rig();
    let _running = backends(&rig);
    let cluster = Cluster::on(&rig);
    let (node, pod) = (rig.node(0), rig.pod(0, 1));
    assert_eq!(node.run(|| Ok(ask_tcp(cluster.api))).expect("ours"), Outcome::Refused, "nobody serves it yet");

    let first = cluster.relay(node, cluster.server_address);
    cluster.until_answered_by("pod0-0");
    assert!(answers_lists(pod, cluster.api).expect("an answer"), "the API server, for all pods of the node");
    until("the state to be saved", || cluster.folder.path().join("last-known-good.json").exists());
    drop(first);
    expect_at(node, cluster.api, ask_tcp, "nobody serves it", |outcome| *outcome == Outcome::Refused);

    let _second = cluster.relay(node, cluster.api);
    cluster.until_answered_by("pod0-0");
    cluster.server.put("endpointslices", slice("web", "http", endpoint(rig.pod(1, 0))));
    cluster.until_answered_by("pod1-0");
}

/// An API server on the second node, which knows itself and the Service `web`.
pub(crate) struct Cluster<'a> {
    rig: &'a Rig,
    pub(crate) server: ApiServer,
    /// Where it is.
    pub(crate) server_address: SocketAddr,
    /// Where its cluster asks it.
    api: SocketAddr,
    web: SocketAddr,
    folder: TempDir,
    /// Of the server; on one thread, which is in the node.
    _runtime: Runtime,
}

impl<'a> Cluster<'a> {
    /// On a rig of two nodes or more.
    pub(crate) fn on(rig: &'a Rig) -> Self {
        let vip = |number| rig.vip(0, number).expect("an address can be added").v4;
        let (kubernetes, web, place) = (vip(1), vip(2), rig.node(1));
        let server_address = SocketAddr::new(place.address(Family::V4), 6443);
        let runtime = runtime_in(place);
        let started = runtime.block_on(async { tokio::spawn(ApiServer::start(server_address)).await });
        let server = started.expect("it starts");
        server.put("services", service("kubernetes", kubernetes, "https", 443));
        server.put("endpointslices", slice("kubernetes", "https", server_address));
        server.put("services", service("web", web, "http", PORT));
        server.put("endpointslices", slice("web", "http", endpoint(rig.pod(0, 0))));
        let folder = tempfile::tempdir().expect("a folder can be made");
        let (api, web) = (SocketAddr::new(kubernetes, 443), SocketAddr::new(web, PORT));
        Self { rig, server, server_address, api, web, folder, _runtime: runtime }
    }

    /// What it is on.
    pub(crate) fn rig(&self) -> &Rig {
        self.rig
    }

    /// A relay that is told one address of the server.
    pub(crate) fn relay(&self, node: &Namespace, server: SocketAddr) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
        command.args(["run", "--node-name", "node0", "--log-level", "error"]);
        command.args(["--shutdown-delay", "0s", "--drain-timeout", "0s"]);
        command.arg("--kubeconfig").arg(self.kubeconfig(server)).arg("--state-dir").arg(self.folder.path());
        command.env("KUBERNETES_SERVICE_HOST", self.api.ip().to_string()); // As pods have it.
        node.spawn(command).expect("the relay starts")
    }

    fn kubeconfig(&self, server: SocketAddr) -> PathBuf {
        let path = self.folder.path().join("kubeconfig");
        let text = self.server.kubeconfig().replace(&self.server_address.to_string(), &server.to_string());
        fs::write(&path, text).expect("the folder can be written");
        path
    }

    fn until_answered_by(&self, pod: &str) {
        let what = format!("is answered by {pod}");
        expect_at(self.rig.client(), self.web, ask_tcp, &what, |outcome| outcome.pod() == Some(pod));
    }
}

/// A runtime whose tasks are inside.
fn runtime_in(place: &Namespace) -> Runtime {
    let descriptor = place.descriptor().expect("it has one").try_clone().expect("descriptors are left");
    let addresses = DualAddress { v4: place.address(Family::V4), v6: place.address(Family::V6) };
    let place = Namespace::held(place.name(), addresses, descriptor);
    let enter = move || place.enter().expect("the namespace is ours");
    Builder::new_multi_thread().worker_threads(1).enable_all().on_thread_start(enter).build().expect("threads are left")
}

/// True where what is behind an address lists Services.
fn answers_lists(from: &Namespace, to: SocketAddr) -> io::Result<bool> {
    from.run(|| {
        let mut stream = TcpStream::connect(to)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET /api/v1/services HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200") && answer.contains("ServiceList"))
    })
}

pub(crate) fn endpoint(pod: &Namespace) -> SocketAddr {
    SocketAddr::new(pod.address(Family::V4), TCP_BACKEND_PORT)
}

fn service(name: &str, cluster_ip: IpAddr, port_name: &str, port: u16) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ports": [{"name": port_name, "port": port}]},
    })
}

pub(crate) fn slice(service: &str, port_name: &str, endpoint: SocketAddr) -> Value {
    json!({
        "metadata": {"name": service, "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"name": port_name, "port": endpoint.port()}],
        "endpoints": [{"addresses": [endpoint.ip()]}],
    })
}
