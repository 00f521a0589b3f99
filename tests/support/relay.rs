//! A relay in this process, fed from a manifest file as `kube-relay run -f FOLDER` would feed it.

use std::fmt::Display;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use kube_relay::allocate::Ranges;
use kube_relay::control::{self, Message, RelayOptions, Setting};
use kube_relay::health::Health;
use kube_relay::manifest::{self, Input, Source};
use kube_relay::name::ObjectName;
use kube_relay::serve::balancer::Backend;
use kube_relay::status::{ServiceStatus, Status};
use tempfile::TempDir;
use tokio::sync::{Notify, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::DEADLINE;
use super::site::Site;

/// The file that [`Relay::edit`] writes.
const FILE: &str = "web.yaml";

/// A running relay and the folder that it is fed from.
pub struct Relay {
    relay: control::Relay,
    status: watch::Receiver<Arc<Status>>,
    folder: TempDir,
    setting: Setting,
    _source: DropGuard,
}

impl Relay {
    /// Starts a relay with a manifest and waits until it serves.
    pub async fn start(site: Site, manifest: impl Display) -> Self {
        Self::start_with(site, manifest, RelayOptions::default()).await
    }

    /// Starts a relay with other options; the site's node address is filled in.
    pub async fn start_with(site: Site, manifest: impl Display, options: RelayOptions) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        replace(folder.path(), FILE, &manifest.to_string());
        Self::start_in(site, folder, options).await
    }

    /// Starts a relay with the manifests of a folder.
    pub async fn start_in(site: Site, folder: TempDir, mut options: RelayOptions) -> Self {
        if options.plan.node_port_addresses.is_empty() {
            options.plan.node_port_addresses = vec![site.node_ip()];
        }
        options.plan.allow_loopback_endpoints = true;
        let setting = Setting { plan: options.plan.clone(), inside: options.inside.clone(), ..Setting::default() };
        let relay = control::Relay::start(options).expect("a relay can be started");
        let cancel = CancellationToken::new();
        let source = Source::new(vec![Input::Path(folder.path().to_owned())], Ranges::default());
        tokio::spawn(manifest::run(source, relay.messages(), Arc::new(Notify::new()), cancel.clone()));
        let relay = Self { status: relay.status(), relay, folder, setting, _source: cancel.drop_guard() };
        relay.until("the first state to be served", |status| status.synced).await;
        relay
    }

    /// Writes the manifest anew, by an atomic rename as editors and tools do it.
    pub fn edit(&self, manifest: impl Display) {
        replace(self.folder.path(), FILE, &manifest.to_string());
    }

    /// Serves node ports elsewhere from now on.
    pub async fn set_node_port_addresses(&self, addresses: Vec<IpAddr>) {
        let mut setting = self.setting.clone();
        setting.plan.node_port_addresses = addresses;
        let sent = self.relay.messages().send(Message::Setting(Box::new(setting))).await;
        sent.expect("the relay runs");
    }

    /// Counts others as this node and its pods from now on, and waits until that is so.
    pub async fn set_inside(&self, inside: Vec<IpNet>) {
        let before = self.status().revision;
        let setting = Setting { inside, ..self.setting.clone() };
        let sent = self.relay.messages().send(Message::Setting(Box::new(setting))).await;
        sent.expect("the relay runs");
        self.until("another inside", |status| status.revision > before).await;
    }

    /// How it keeps up, and what may be told of it.
    pub fn health(&self) -> Health {
        self.relay.health()
    }

    /// The folder with the manifests.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What the relay says now.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status.borrow())
    }

    /// Waits for a condition on the status or on the counters in it.
    pub async fn until(&self, what: &str, condition: impl Fn(&Status) -> bool) {
        let mut status = self.status.clone();
        let wait = async {
            loop {
                if condition(&status.borrow_and_update()) {
                    return;
                }
                // Counters move without a new snapshot: look again soon.
                let _ = tokio::time::timeout(Duration::from_millis(5), status.changed()).await;
            }
        };
        if tokio::time::timeout(DEADLINE, wait).await.is_err() {
            panic!("waited {DEADLINE:?} for {what}; the relay says {:#?}", self.status());
        }
    }

    /// Waits until a change is in use: these are the addresses that may get new traffic.
    pub async fn until_backends(&self, service: &str, backends: &[SocketAddr]) {
        let wanted: Vec<String> = backends.iter().map(ToString::to_string).collect();
        self.until("other backends", |status| picks(status, service) == wanted).await;
    }

    /// The running backend at an address: its counters outlive changes.
    pub fn backend(&self, service: &str, address: SocketAddr) -> Arc<Backend> {
        let status = self.status();
        let service = service_of(&status, service).expect("the Service is known");
        let mut backends = service.ports.iter().flat_map(|port| port.backends.iter());
        let backend = backends.find(|backend| backend.address() == address).expect("the backend is known");
        Arc::clone(backend)
    }

    /// Accepts no more; what is open goes on.
    pub async fn stop_accepting(&self) {
        self.relay.stop_accepting().await;
    }

    /// Ends, and tells how many connections and flows had to be cut.
    pub async fn drain(self, timeout: Duration) -> usize {
        self.relay.drain(timeout).await
    }
}

/// A Service of namespace `default`.
pub fn service_of<'a>(status: &'a Status, service: &str) -> Option<&'a ServiceStatus> {
    status.services.get(&ObjectName::parse(service)).map(|service| &**service)
}

/// The addresses that may get new traffic at the first port of a Service, in the order of addresses.
pub fn picks(status: &Status, service: &str) -> Vec<String> {
    let report = service_of(status, service).map(ServiceStatus::report);
    let port = report.and_then(|report| report.ports.into_iter().next());
    port.and_then(|port| port.backends.cluster).unwrap_or_default()
}

/// The messages of all problems that are shown, one a line, each with its place.
pub fn problems(status: &Status) -> String {
    let mut text = String::new();
    for problem in status.problems.iter() {
        let line = problem.line.map(|line| format!(":{line}")).unwrap_or_default();
        text +=
            &format!("{}{line} {}: {}\n", problem.file.as_deref().unwrap_or_default(), problem.object, problem.message);
    }
    text
}

/// Writes a file beside its place and renames it into it.
pub fn replace(folder: &Path, file: &str, text: &str) {
    let new = folder.join(format!(".{file}.new"));
    fs::write(&new, text).expect("the test's folder can be written");
    fs::rename(&new, folder.join(file)).expect("the test's folder can be written");
}
