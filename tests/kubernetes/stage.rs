//! A relay that follows an API server, and the objects that it is told of.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kube_relay::admin::Unbound;
use kube_relay::api_client::{Api, ApiOptions};
use kube_relay::cli::{Cli, Command};
use kube_relay::config::RunConfig;
use kube_relay::control;
use kube_relay::host::Host;
use kube_relay::host_watch::Hosts;
use kube_relay::kubernetes::{self, Selection, Source};
use kube_relay::place::Place;
use kube_relay::stats::WatchFailure;
use kube_relay::status::Status;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::api_server::ApiServer;
use crate::support::relay::{picks, service_of};
use crate::support::site::{SERVICE_PORT, Site};
use crate::support::{DEADLINE, backend::Backend};

/// How long a watch of [`Setup::hasty`] lives.
pub(crate) const WATCH_SECONDS: u32 = 3;

/// How a relay follows.
#[derive(Clone)]
pub(crate) struct Setup {
    /// What it takes, for a start that of a relay on `node-1`.
    pub(crate) selection: Selection,
    /// More flags.
    pub(crate) flags: &'static str,
    /// Where it asks, in place of the address of the server.
    pub(crate) master: Option<SocketAddr>,
    /// The folder of its kubeconfig, where that is to stay.
    pub(crate) kubeconfig_in: Option<PathBuf>,
    /// The certificate, among those of the tests, that is to vouch for the server.
    pub(crate) authority: Option<&'static str>,
    /// What of the program's own servers cannot be bound.
    pub(crate) unbound: watch::Receiver<Vec<Unbound>>,
}

impl Default for Setup {
    fn default() -> Self {
        let event_delay = Duration::ZERO..=Duration::ZERO;
        let selection = Selection { node_name: "node-1".into(), event_delay, ..Selection::default() };
        let unbound = watch::Sender::new(Vec::new()).subscribe();
        Self { selection, flags: "", master: None, kubeconfig_in: None, authority: None, unbound }
    }
}

impl Setup {
    /// One that keeps its state.
    pub(crate) fn keeping_in(folder: &Path) -> Self {
        let mut setup = Self::default();
        setup.selection.state_dir = Some(folder.to_owned());
        setup
    }

    /// One whose watches live for [`WATCH_SECONDS`].
    pub(crate) fn hasty() -> Self {
        let mut setup = Self::default();
        setup.selection.watch_seconds = WATCH_SECONDS..=WATCH_SECONDS;
        setup
    }
}

/// A server and a relay that follows it.
pub(crate) struct Stage {
    /// Where all of it is.
    pub(crate) site: Site,
    /// The server.
    pub(crate) server: ApiServer,
    relay: control::Relay,
    _source: DropGuard,
    _backends: [Backend; 2],
}

impl Stage {
    /// The Service `web` with its first backend, served.
    pub(crate) async fn serving(site: Site) -> Self {
        Self::serving_with(site, Setup::default()).await
    }

    /// The same, set up in another way.
    pub(crate) async fn serving_with(site: Site, setup: Setup) -> Self {
        let server = ApiServer::start(api_address(site)).await;
        server.put("services", web(site));
        server.put("endpointslices", slice("web-1", &[site.backend(1)]));
        let stage = Self::following_with(site, server, setup).await;
        stage.until_backends(&[site.backend(1)]).await;
        stage
    }

    /// A relay that has just begun to follow a server.
    pub(crate) async fn following(site: Site, server: ApiServer) -> Self {
        Self::following_with(site, server, Setup::default()).await
    }

    /// The same, set up in another way.
    pub(crate) async fn following_with(site: Site, server: ApiServer, setup: Setup) -> Self {
        let kubeconfig = server.kubeconfig();
        Self::following_by(site, server, &kubeconfig, setup).await
    }

    /// The same, with another kubeconfig than the server's.
    pub(crate) async fn following_by(site: Site, server: ApiServer, kubeconfig: &str, setup: Setup) -> Self {
        let config = config(setup.flags);
        // No address of the machine that tests run on.
        let host = Host { interfaces: Vec::new(), default_sources: Vec::new() };
        let relay = control::Relay::start(config.relay_options(&host)).expect("a relay can be started");
        let cancel = CancellationToken::new();
        let place = Place { plan: config.plan, hosts: Hosts::fixed(host) };
        let source = source(kubeconfig, &setup, &relay, place).await.telling_of(setup.unbound);
        tokio::spawn(kubernetes::run(source, cancel.clone()));
        let backends = [Backend::named(site.backend(1)).await, Backend::named(site.backend(2)).await];
        Self { site, server, relay, _source: cancel.drop_guard(), _backends: backends }
    }

    /// Ends the relay; the server stays.
    pub(crate) async fn end(self) -> ApiServer {
        let (messages, server) = (self.relay.messages(), self.server);
        drop((self._source, self.relay, self._backends));
        messages.closed().await;
        server
    }

    /// What the relay says now.
    pub(crate) fn status(&self) -> Arc<Status> {
        Arc::clone(&self.relay.status().borrow())
    }

    /// True where load balancers may send traffic to this node.
    pub(crate) fn is_eligible(&self) -> bool {
        self.relay.health().check(tokio::time::Instant::now()).node_eligible
    }

    /// Waits for a condition on the status or on the counters in it.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&Status) -> bool) {
        let mut status = self.relay.status();
        let wait = async {
            while !condition(&status.borrow_and_update()) {
                // Counters move without a new snapshot: look again soon.
                let _ = tokio::time::timeout(Duration::from_millis(5), status.changed()).await;
            }
        };
        if tokio::time::timeout(DEADLINE, wait).await.is_err() {
            let failures: Vec<_> = self.status().contact.failures().collect();
            panic!("waited {DEADLINE:?} for {what}; {failures:?}; asked {:#?}", self.server.asked());
        }
    }

    /// Waits until these are the backends of `web`.
    pub(crate) async fn until_backends(&self, backends: &[SocketAddr]) {
        let wanted: Vec<String> = backends.iter().map(ToString::to_string).collect();
        self.until("other backends", |status| picks(status, "web") == wanted).await;
    }

    /// The same; and until then it has some all the time.
    pub(crate) async fn until_backends_without_a_gap(&self, backends: &[SocketAddr]) {
        let wanted: Vec<String> = backends.iter().map(ToString::to_string).collect();
        let picked = |status: &Status| {
            let picks = picks(status, "web");
            assert!(!picks.is_empty(), "nothing is taken out of use");
            picks == wanted
        };
        self.until("other backends", picked).await;
    }

    /// Waits until a Service is known, or is not any more.
    pub(crate) async fn until_known(&self, service: &str, known: bool) {
        self.until("a Service to come or go", |status| service_of(status, service).is_some() == known).await;
    }

    /// Waits until all objects of a kind were listed again so often for a reason.
    pub(crate) async fn until_relists(&self, reason: WatchFailure, times: u64) {
        let often = |status: &Status| status.contact.relists().any(|(why, count)| why == reason && count >= times);
        self.until("lists", often).await;
    }
}

/// Where the server of a site is.
pub(crate) fn api_address(site: Site) -> SocketAddr {
    SocketAddr::new(site.client(8), 6443)
}

/// A static source's, as backends are on loopback here. Without routes: the machine is not ours.
fn config(flags: &str) -> RunConfig {
    let line = format!("kube-relay run -f - --node-name node-1 --vip-routes none {flags}");
    match Cli::try_parse_from(line.split_whitespace()).expect("a command line").command {
        Command::Run(args) => RunConfig::try_from(*args).expect("a fine command line"),
        other => panic!("not run: {other:?}"),
    }
}

async fn source(text: &str, setup: &Setup, relay: &control::Relay, place: Place) -> Source {
    let temporary = tempfile::tempdir().expect("a folder can be made");
    let kubeconfig = setup.kubeconfig_in.as_deref().unwrap_or(temporary.path()).join("config");
    std::fs::write(&kubeconfig, with_authority(text, setup.authority)).expect("a folder of the test");
    let options =
        ApiOptions { kubeconfig: Some(kubeconfig), master: setup.master.map(|master| format!("http://{master}")) };
    let api = Api::find(&options).await.expect("a kubeconfig that can be used");
    Source::new(&api, &setup.selection, relay, place).expect("credentials that can be used")
}

fn with_authority(kubeconfig: &str, authority: Option<&str>) -> String {
    let mut kubeconfig: Value = serde_json::from_str(kubeconfig).expect("JSON");
    if let Some(authority) = authority {
        let path = format!("{}/tests/api/{authority}", env!("CARGO_MANIFEST_DIR"));
        kubeconfig["clusters"][0]["cluster"]["certificate-authority"] = path.into();
    }
    kubeconfig.to_string()
}

/// The Service `web` at the site's cluster IP.
pub(crate) fn web(site: Site) -> Value {
    service("web", &site.cluster_ip().to_string())
}

/// A slice of another Service, with one backend.
pub(crate) fn slice_of(service: &str, backend: SocketAddr) -> Value {
    let mut slice = slice(service, &[backend]);
    slice["metadata"]["labels"]["kubernetes.io/service-name"] = service.into();
    slice
}

/// The Node `node-1`.
pub(crate) fn node(address: IpAddr, taints: &[&str]) -> Value {
    let taints: Vec<_> = taints.iter().map(|key| json!({"key": key, "effect": "NoSchedule"})).collect();
    json!({
        "metadata": {"name": "node-1", "uid": "n", "labels": {"topology.kubernetes.io/zone": "zone-1"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"], "taints": taints},
        "status": {"addresses": [{"type": "InternalIP", "address": address.to_string()}, {"type": "Hostname", "address": "node-1"}]},
    })
}

/// A Service with one TCP port.
pub(crate) fn service(name: &str, cluster_ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "type": "ClusterIP", "clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "selector": {"app": name},
            "ports": [{"name": "http", "protocol": "TCP", "port": SERVICE_PORT, "targetPort": 8000}],
        },
        "status": {"loadBalancer": {}},
    })
}

/// A slice of the Service `web`.
pub(crate) fn slice(name: &str, backends: &[SocketAddr]) -> Value {
    let port = backends.first().map_or(1, SocketAddr::port);
    let endpoints: Vec<_> = backends.iter().map(|backend| json!({"addresses": [backend.ip().to_string()]})).collect();
    json!({
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "http", "protocol": "TCP", "port": port}], "endpoints": endpoints,
    })
}
