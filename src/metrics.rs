//! Every metric: its name, kind and help in one table, and the Prometheus text of a running relay.
//!
//! The truth is the atomics in `stats`; nothing is counted here, and no exporter keeps a handle to a series. So a
//! series lives exactly as long as its backend. Serving the text is `admin`.
//!
//! Which series there are: a Service that has carried traffic has all its series for all its backends, at 0 too, but
//! those with a `reason`, which begin with their first event. Other Services have `kuberelay_service_backends` alone. Where
//! so many backends had series that a page would take long, the rest have none: their Service's sums tell of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Write};
use std::net::SocketAddr;

use metrics_exporter_prometheus::formatting::{sanitize_label_value, write_help_line, write_type_line};
use metrics_process::collector;

use crate::apply_stats::{APPLIED, ApplyStats};
use crate::capacity::CAPACITY;
use crate::contact::Contact;
use crate::listen_overflows;
use crate::model::ServicePort;
use crate::name::{ObjectName, Protocol};
use crate::plan::{Listener, ListenerKind, ServicePlan, Verdict};
use crate::serve::balancer::Backend;
use crate::stats::{
    BackendStats, CloseReason, ConnectFailure, DropReason, Entry, EntryCounter, Histogram, PROCESS, PauseReason,
    ProcessStats, SourceFallback, UpgradeResult, VipAddresses,
};
use crate::status::{ListenerState, PortCounters, ServiceStatus, Status};

/// The `Content-Type` of [`render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a metric is to Prometheus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts in buckets: series with `_bucket` (and the label `le`), `_sum` and `_count` behind the name.
    Histogram,
    /// What kube-proxy calls by a counter's name and has go up and down.
    Untyped,
}

impl Kind {
    /// The word of a `# TYPE` line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Untyped => "untyped",
        }
    }
}

/// One row of the table of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Full name, with the unit in it.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its labels, in the order in which they are written.
    pub labels: &'static [&'static str],
    /// What it counts, for people.
    pub help: &'static str,
}

/// Declares the metrics as indices into [`METRICS`], so that a name is written once.
macro_rules! metrics {
    ($($id:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        #[derive(Clone, Copy)]
        #[repr(usize)]
        enum Id { $($id,)+ }

        /// Every metric of this program, in the order of the text.
        pub const METRICS: &[Metric] = &[
            $(Metric { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help },)+
        ];
    };
}

metrics! {
    BuildInfo = Gauge "kuberelay_build_info" ["version"] "Always 1; the label tells the version.";
    Ready = Gauge "kuberelay_ready" [] "1 while nothing keeps the process from being ready.";
    ReloadSuccessful = Gauge "kuberelay_config_last_reload_successful" [] "1 where the last read of the manifests was taken whole.";
    ConfigRevision = Gauge "kuberelay_config_revision" [] "How many different states of the manifests were taken.";
    ObjectsRejected = Counter "kuberelay_objects_rejected_total" ["kind", "reason"] "Objects that could not be read or served, or not wholly, by kind (unknown where it could not be read) and reason; each once for as long as that holds.";
    SourceConnected = Gauge "kuberelay_source_connected" [] "1 while the API server answers; only with an API source.";
    SourceAge = Gauge "kuberelay_source_age_seconds" [] "How old what is served may be: seconds since the API server last said something, of the kind where that is longest ago (up to 65 is normal), or since the saved state was written that is served until it answers.";
    Relists = Counter "kuberelay_kube_relists_total" ["reason"] "Times that all objects of a kind were listed again, by the failure that made it necessary.";
    WatchErrors = Counter "kuberelay_kube_watch_errors_total" ["kind", "reason"] "Requests and watches that failed, by kind of object and reason.";
    KubeEvents = Counter "kuberelay_kube_events_total" ["result"] "Events on Services and the Node that the API server took (sent), or that were too many or refused (dropped); only with an API source.";
    Listeners = Gauge "kuberelay_listeners" ["state"] "Listeners that are serving, parked (port held, connections refused) or failed.";
    ListenerFailures = Gauge "kuberelay_listener_failures" ["reason"] "Listeners that cannot be bound now, by reason.";
    HealthPorts = Gauge "kuberelay_health_ports" ["state"] "Health ports (healthCheckNodePort) that are answered (serving), or cannot be bound (failed).";
    ServiceBackends = Gauge "kuberelay_service_backends" ["namespace", "service", "port", "protocol", "state"] "Backends that get new traffic (ready), or only keep what they have (draining).";
    ServiceAccepted = Counter "kuberelay_service_accepted_total" ["namespace", "service", "port", "protocol"] "Connections accepted from clients, or UDP flows begun.";
    ServiceDropped = Counter "kuberelay_service_dropped_total" ["namespace", "service", "port", "protocol", "reason"] "Connections or datagrams turned away before they reached a backend, by reason.";
    ServiceRetries = Counter "kuberelay_service_retries_total" ["namespace", "service", "port", "protocol"] "Tries to reach a backend after a first failed one.";
    SourcePreserved = Counter "kuberelay_source_preserved_total" ["namespace", "service", "port", "protocol"] "Connections and flows that were begun from the client's own address; only where the Service wants that.";
    SourceFallbacks = Counter "kuberelay_source_fallbacks_total" ["namespace", "service", "port", "protocol", "reason"] "Connections and flows that were begun from the node's address though the Service wants the client's, by reason.";
    AffinityPins = Gauge "kuberelay_affinity_pins" ["namespace", "service", "port", "protocol"] "Clients whose backend session affinity remembers; one whose time is over counts until another takes its place.";
    AffinityEvictions = Counter "kuberelay_affinity_evictions_total" ["namespace", "service", "port", "protocol"] "Clients that lost their backend before their time, as more came than session affinity remembers.";
    ServiceConnections = Counter "kuberelay_service_connections_total" ["namespace", "service", "port", "protocol", "entry"] "TCP connections established to all backends, those that left among them, by where clients came in.";
    ServiceOpen = Gauge "kuberelay_service_open" ["namespace", "service", "port", "protocol"] "TCP connections or UDP flows to all backends, those that left among them, that are open now.";
    ServiceUpstreamBytes = Counter "kuberelay_service_upstream_bytes_total" ["namespace", "service", "port", "protocol", "entry"] "Payload bytes sent to all backends, those that left among them, by where clients came in.";
    ServiceDownstreamBytes = Counter "kuberelay_service_downstream_bytes_total" ["namespace", "service", "port", "protocol", "entry"] "Payload bytes received from all backends, those that left among them, and passed to clients, by where these came in.";
    ServiceConnectFailures = Counter "kuberelay_service_connect_failures_total" ["namespace", "service", "port", "protocol", "reason"] "Tries to reach any of the backends, those that left among them, that failed, by reason.";
    ServiceClosed = Counter "kuberelay_service_closed_total" ["namespace", "service", "port", "protocol", "reason"] "Connections and flows to all backends, those that left among them, that ended, by reason.";
    BackendsFolded = Gauge "kuberelay_backends_folded" [] "Backends without series of their own, as there are 10,000 that have some: the series of their Services tell of them.";
    Connections = Counter "kuberelay_connections_total" ["namespace", "service", "port", "protocol", "backend", "entry"] "TCP connections established to the backend, by where clients came in.";
    ActiveConnections = Gauge "kuberelay_active_connections" ["namespace", "service", "port", "protocol", "backend"] "TCP connections to the backend that are open now.";
    Flows = Counter "kuberelay_flows_total" ["namespace", "service", "port", "protocol", "backend"] "UDP flows begun to the backend.";
    ActiveFlows = Gauge "kuberelay_active_flows" ["namespace", "service", "port", "protocol", "backend"] "UDP flows to the backend that are open now.";
    UpstreamBytes = Counter "kuberelay_upstream_bytes_total" ["namespace", "service", "port", "protocol", "backend", "entry"] "Payload bytes sent to the backend, by where clients came in.";
    DownstreamBytes = Counter "kuberelay_downstream_bytes_total" ["namespace", "service", "port", "protocol", "backend", "entry"] "Payload bytes received from the backend and passed to clients, by where these came in.";
    Datagrams = Counter "kuberelay_datagrams_total" ["namespace", "service", "port", "protocol", "backend", "direction"] "Datagrams sent to the backend (upstream) and passed from it to clients (downstream).";
    ConnectFailures = Counter "kuberelay_connect_failures_total" ["namespace", "service", "port", "protocol", "backend", "reason"] "Tries to reach the backend that failed, by reason.";
    ConnectDuration = Histogram "kuberelay_connect_duration_seconds" ["namespace", "service", "port", "protocol", "backend"] "How long it took to reach the backend, each time that succeeded; from the first on; only over TCP.";
    BackendEjected = Gauge "kuberelay_backend_ejected" ["namespace", "service", "port", "protocol", "backend"] "1 while the backend gets no new connections, as it could not be reached again and again; only over TCP.";
    Ejections = Counter "kuberelay_ejections_total" ["namespace", "service", "port", "protocol", "backend"] "Times that the backend was ejected; only over TCP.";
    Closed = Counter "kuberelay_closed_total" ["namespace", "service", "port", "protocol", "backend", "reason"] "Connections and flows that ended, by reason.";
    AcceptPaused = Counter "kuberelay_accept_paused_seconds_total" ["reason"] "Seconds in which a listener or more accepted nobody though clients waited, by what was lacking.";
    ConnectionsLimit = Gauge "kuberelay_connections_limit" [] "TCP connections that there may be now: --max-connections, or what descriptors and memory are good for, whichever is least; near it, what is left is shared with UDP flows and looked at again.";
    FlowsLimit = Gauge "kuberelay_flows_limit" [] "UDP flows that there may be now, by local ports, descriptors and memory, whichever is least; beyond it new ones take the places of old ones.";
    StalledConnections = Gauge "kuberelay_stalled_connections" [] "Connections that hold bytes which their receiver does not take now; one that is stuck both ways counts twice.";
    SpliceFallbacks = Counter "kuberelay_splice_fallbacks_total" [] "Directions of bulky connections that were copied, as the kernel gave no pipe for splice(2): too many descriptors, or fs.pipe-user-pages-soft.";
    FilterFallbacks = Counter "kuberelay_filter_fallbacks_total" [] "Listeners that judge sources by themselves, with a reset instead of silence for TCP, as the kernel took no filter: CAP_NET_ADMIN is missing, or there are more than about 1,000 networks.";
    VipAddresses = Gauge "kuberelay_vip_addresses" ["state"] "Addresses of Services off loopback that are local by routes of ours (own), as others made them so (foreign), or not (missing).";
    RoutesRepaired = Counter "kuberelay_routes_repaired_total" [] "Addresses of Services that somebody made local no more, and that were made so again.";
    HostReadErrors = Counter "kuberelay_host_read_errors_total" [] "Times that this machine's addresses could not be read, so that the last ones stayed in use.";
    ListenOverflows = Counter "kuberelay_host_listen_overflows_total" [] "Clients that the kernel turned away in this network namespace, since it began and whoever listens, as the queue of a listener was full.";
    GuardedAddresses = Gauge "kuberelay_guarded_addresses" [] "Addresses of Services, local by routes of ours, where what listens on all addresses of the machine is refused.";
    Panics = Counter "kuberelay_panics_total" [] "Panics: each ended one task or step and nothing else, and is a fault to report.";
    LogLinesDropped = Counter "kuberelay_log_lines_dropped_total" ["reason"] "Log lines that were not written: more than ten a second of the same place (storm), or nobody read what came before (unread).";
    AccessLogDropped = Counter "kuberelay_access_log_dropped_total" [] "Lines of the access log that were not written: more ended at once than it takes, or it cannot be written.";
    Upgrades = Counter "kuberelay_upgrades_total" ["result"] "Hot upgrades from or to this process, by what came of them: all but success left the process that ran serving.";
    UpgradeStandstill = Histogram "kuberelay_upgrade_standstill_seconds" [] "How long connections and UDP flows stood still in each hand-over to this process, and to those before it; from the first on.";
    TableSwaps = Counter "kuberelay_table_swaps_total" [] "Tables of backends that were stored, in place of others or as first ones.";
    NetworkProgramming = Histogram "kubeproxy_network_programming_duration_seconds" [] "From a change of endpoints, as the control plane noticed it, to its being served here; only with an API source.";
    SyncDuration = Histogram "kubeproxy_sync_proxy_rules_duration_seconds" [] "How long a batch of changes took to be served, planning included.";
    SyncTime = Gauge "kubeproxy_sync_proxy_rules_last_timestamp_seconds" [] "When the last batch of changes was served, since the Unix epoch in seconds; 0 before the first.";
    SyncQueued = Gauge "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds" [] "When the last change came, since the Unix epoch in seconds; 0 before the first.";
    ServiceChanges = Counter "kubeproxy_sync_proxy_rules_service_changes_total" [] "Services that came, changed or went.";
    ServiceChangesPending = Gauge "kubeproxy_sync_proxy_rules_service_changes_pending" [] "Services that came, changed or went, and are not served so yet.";
    EndpointChanges = Counter "kubeproxy_sync_proxy_rules_endpoint_changes_total" [] "Slices of endpoints that came, changed or went.";
    EndpointChangesPending = Gauge "kubeproxy_sync_proxy_rules_endpoint_changes_pending" [] "Slices of endpoints that came, changed or went, and are not served so yet.";
    NoLocalEndpoints = Untyped "kubeproxy_sync_proxy_rules_no_local_endpoints_total" ["traffic_policy"] "Ports of Services with a traffic policy Local (internal or external) that have endpoints, and none on this node, now.";
    Healthz = Counter "kubeproxy_proxy_healthz_total" ["code"] "Answers of /healthz at the health address, by HTTP code.";
    Livez = Counter "kubeproxy_proxy_livez_total" ["code"] "Answers of /livez at the health address, by HTTP code.";
    CpuSeconds = Counter "process_cpu_seconds_total" [] "User and system CPU time of the process in seconds.";
    OpenFds = Gauge "process_open_fds" [] "Open file descriptors.";
    MaxFds = Gauge "process_max_fds" [] "Limit of open file descriptors.";
    VirtualMemory = Gauge "process_virtual_memory_bytes" [] "Virtual memory size in bytes.";
    ResidentMemory = Gauge "process_resident_memory_bytes" [] "Resident memory size in bytes.";
    StartTime = Gauge "process_start_time_seconds" [] "Start of the process since the Unix epoch in seconds.";
    Threads = Gauge "process_threads" [] "Threads of the process.";
}

/// Backends that have series of their own: with fifteen lines each a page of twenty megabytes, which is made and compressed
/// in a fraction of a second.
const BACKENDS_WITH_SERIES: usize = 10_000;

/// The Prometheus text of a relay as it is now.
///
/// Reads each counter once; work and size are proportional to the backends that have series.
pub fn render(status: &Status, ready: bool) -> String {
    render_with(BACKENDS_WITH_SERIES, &PROCESS, &APPLIED, status, ready)
}

/// The same with series for so many backends, and with what the process as a whole has counted.
pub(crate) fn render_with(
    backends: usize,
    process: &ProcessStats,
    applied: &ApplyStats,
    status: &Status,
    ready: bool,
) -> String {
    let mut page = Page::with_room_for(backends);
    page.sample(Id::BuildInfo, &label("version", env!("CARGO_PKG_VERSION")), 1);
    page.sample(Id::Ready, "", u8::from(ready));
    page.sample(Id::ReloadSuccessful, "", u8::from(status.source.last_reload_successful));
    page.sample(Id::ConfigRevision, "", status.source.config_revision);
    for (kind, reason, count) in status.source.rejections.iter() {
        let labels = format!("{},{}", label("kind", kind), label("reason", reason));
        page.sample(Id::ObjectsRejected, &labels, count);
    }
    page.contact(&status.contact, process);
    page.listeners(status);
    for service in status.services.values() {
        page.service(service);
    }
    let folded = page.folded;
    page.sample(Id::BackendsFolded, "", folded);
    for reason in PauseReason::ALL {
        let seconds = process.accept_paused[usize::from(*reason)].seconds();
        page.sample(Id::AcceptPaused, &label("reason", reason.as_str()), seconds);
    }
    page.sample(Id::ConnectionsLimit, "", process.connections_limit.get());
    if let Some(most) = CAPACITY.flows.most() {
        page.sample(Id::FlowsLimit, "", most);
    }
    page.sample(Id::StalledConnections, "", process.stalled.get());
    page.sample(Id::SpliceFallbacks, "", process.splice_fallbacks.get());
    page.sample(Id::FilterFallbacks, "", process.filter_fallbacks.get());
    page.vip_addresses(&process.vip_addresses);
    page.sample(Id::RoutesRepaired, "", process.routes_repaired.get());
    page.sample(Id::HostReadErrors, "", process.host_read_errors.get());
    if let Some(count) = listen_overflows::read() {
        page.sample(Id::ListenOverflows, "", count);
    }
    page.sample(Id::GuardedAddresses, "", process.guarded_addresses.get());
    page.sample(Id::Panics, "", process.panics.get());
    let lines = &process.log_lines_dropped;
    page.sample(Id::LogLinesDropped, &label("reason", "storm"), lines.storm.get());
    page.sample(Id::LogLinesDropped, &label("reason", "unread"), lines.unread.get());
    page.sample(Id::AccessLogDropped, "", process.access_log_dropped.get());
    for result in UpgradeResult::ALL {
        page.sample(Id::Upgrades, &label("result", result.as_str()), process.upgrades.get(*result));
    }
    if process.standstill.count() > 0 {
        page.histogram(Id::UpgradeStandstill, "", &process.standstill);
    }
    for (id, answers) in [(Id::Healthz, &process.healthz), (Id::Livez, &process.livez)] {
        page.sample(id, &label("code", "200"), answers.healthy.get());
        page.sample(id, &label("code", "503"), answers.unhealthy.get());
    }
    page.applied(applied);
    page.no_local_endpoints(status);
    page.process(&collector::collect());
    page.text()
}

/// The samples of each metric, gathered in one walk over the relay: the format wants them together.
struct Page {
    samples: Vec<String>,
    /// Backends that may still get series of their own.
    room: usize,
    /// Backends that got none.
    folded: usize,
}

impl Page {
    fn with_room_for(backends: usize) -> Self {
        Self { samples: METRICS.iter().map(|_| String::new()).collect(), room: backends, folded: 0 }
    }

    /// Whether all backends of a ServicePort get series: a share is only to be told where all are.
    fn takes(&mut self, backends: usize) -> bool {
        let fits = backends <= self.room;
        let counted = if fits { &mut self.room } else { &mut self.folded };
        *counted = if fits { *counted - backends } else { *counted + backends };
        fits
    }

    /// Adds a sample; `labels` is finished text without the braces.
    fn sample(&mut self, id: Id, labels: &str, value: impl Display) {
        let (name, samples) = (METRICS[id as usize].name, &mut self.samples[id as usize]);
        // Writing to a string cannot fail.
        let _ = match labels {
            "" => writeln!(samples, "{name} {value}"),
            labels => writeln!(samples, "{name}{{{labels}}} {value}"),
        };
    }

    /// Adds the samples of a histogram; `labels` as for [`Page::sample`].
    fn histogram<const N: usize>(&mut self, id: Id, labels: &str, histogram: &Histogram<N>) {
        let (name, samples) = (METRICS[id as usize].name, &mut self.samples[id as usize]);
        let (all, before_le) = match labels {
            "" => (String::new(), String::new()),
            labels => (format!("{{{labels}}}"), format!("{labels},")),
        };
        // What comes in between is in the count, not in the buckets: it may not be less than they.
        let (buckets, count) = (histogram.cumulative().collect::<Vec<_>>(), histogram.count());
        for (bound, sum) in buckets {
            let _ = writeln!(samples, "{name}_bucket{{{before_le}le=\"{bound}\"}} {sum}");
        }
        let _ = writeln!(samples, "{name}_bucket{{{before_le}le=\"+Inf\"}} {count}");
        let _ = writeln!(samples, "{name}_sum{all} {}\n{name}_count{all} {count}", histogram.sum_seconds());
    }

    fn text(self) -> String {
        let mut text = String::with_capacity(self.samples.iter().map(|samples| samples.len() + 200).sum());
        for (metric, samples) in METRICS.iter().zip(&self.samples) {
            if !samples.is_empty() {
                write_help_line(&mut text, metric.name, None, None, metric.help);
                write_type_line(&mut text, metric.name, None, None, metric.kind.as_str());
                text.push_str(samples);
            }
        }
        text
    }

    fn contact(&mut self, contact: &Contact, process: &ProcessStats) {
        if let Some(report) = contact.report() {
            self.histogram(Id::NetworkProgramming, "", &process.network_programming);
            self.sample(Id::SourceConnected, "", u8::from(report.connected));
            self.sample(Id::SourceAge, "", report.age_seconds);
            self.sample(Id::KubeEvents, &label("result", "sent"), contact.events.sent.get());
            self.sample(Id::KubeEvents, &label("result", "dropped"), contact.events.dropped.get());
        }
        for (reason, count) in contact.relists() {
            self.sample(Id::Relists, &label("reason", reason.as_str()), count);
        }
        for (kind, reason, count) in contact.failures() {
            let labels = format!("{},{}", label("kind", kind.as_str()), label("reason", reason.as_str()));
            self.sample(Id::WatchErrors, &labels, count);
        }
    }

    fn applied(&mut self, applied: &ApplyStats) {
        self.sample(Id::TableSwaps, "", applied.swaps.get());
        self.histogram(Id::SyncDuration, "", &applied.time);
        self.sample(Id::SyncTime, "", applied.applied_seconds());
        self.sample(Id::SyncQueued, "", applied.queued_seconds());
        self.sample(Id::ServiceChanges, "", applied.services.total.get());
        self.sample(Id::ServiceChangesPending, "", applied.services.pending.get());
        self.sample(Id::EndpointChanges, "", applied.slices.total.get());
        self.sample(Id::EndpointChangesPending, "", applied.slices.pending.get());
    }

    fn no_local_endpoints(&mut self, status: &Status) {
        let [mut internal, mut external] = [0_u64; 2];
        for plan in status.services.values().map(|service| &service.plan) {
            let [mut inside, mut outside] = [BTreeSet::new(), BTreeSet::new()];
            for (_, listener) in plan.listeners() {
                // A cluster IP has the internal policy on both sides; all else the external one, from outside.
                let ports = if listener.kind == ListenerKind::ClusterIp { &mut inside } else { &mut outside };
                if listener.target.outside.verdict == Verdict::Drop {
                    ports.insert(&listener.port);
                }
            }
            internal += inside.len() as u64;
            external += outside.len() as u64;
        }
        self.sample(Id::NoLocalEndpoints, &label("traffic_policy", "internal"), internal);
        self.sample(Id::NoLocalEndpoints, &label("traffic_policy", "external"), external);
    }

    fn vip_addresses(&mut self, VipAddresses { own, foreign, missing }: &VipAddresses) {
        for (state, count) in [("own", own), ("foreign", foreign), ("missing", missing)] {
            self.sample(Id::VipAddresses, &label("state", state), count.get());
        }
    }

    fn listeners(&mut self, status: &Status) {
        let [mut serving, mut parked] = [0_u64; 2];
        for (key, listener) in status.services.values().flat_map(|service| service.plan.listeners()) {
            match status.listener_state(key, &listener.target) {
                ListenerState::Serving => serving += 1,
                ListenerState::Parked => parked += 1,
                ListenerState::Closed | ListenerState::Failed { .. } => {}
            }
        }
        self.sample(Id::Listeners, &label("state", "serving"), serving);
        self.sample(Id::Listeners, &label("state", "parked"), parked);
        self.sample(Id::Listeners, &label("state", "failed"), status.failed.len());
        self.health_ports(status);
        let mut failures: BTreeMap<&str, u64> = BTreeMap::new();
        for state in status.failed.values() {
            if let ListenerState::Failed { reason, .. } = state {
                *failures.entry(reason.as_ref()).or_default() += 1;
            }
        }
        for (reason, count) in failures {
            self.sample(Id::ListenerFailures, &label("reason", reason), count);
        }
    }

    fn health_ports(&mut self, status: &Status) {
        let wanted = status.services.values().filter(|service| service.plan.open_health_port().is_some());
        let states = wanted.map(|service| status.health_port_state(&service.service.name));
        let serving = states.filter(|state| *state == ListenerState::Serving).count();
        self.sample(Id::HealthPorts, &label("state", "serving"), serving);
        self.sample(Id::HealthPorts, &label("state", "failed"), status.failed_health_ports.len());
    }

    fn service(&mut self, service: &ServiceStatus) {
        let carried = service.ports.iter().any(has_carried_traffic);
        for (port, counters) in service.service.ports.iter().zip(&service.ports) {
            let Some(state) = &counters.state else { continue };
            let labels = port_labels(&service.service.name, port);
            self.backend_states(&labels, &service.plan, port, counters);
            if !carried {
                continue;
            }
            let stats = state.stats.so_far();
            self.sample(Id::ServiceAccepted, &labels, stats.accepted.get());
            self.sample(Id::ServiceRetries, &labels, stats.retries.get());
            let sources = state.preserve.stats.so_far();
            if service.plan.source().is_preserved() || sources.preserved.get() > 0 {
                self.sample(Id::SourcePreserved, &labels, sources.preserved.get());
            }
            for reason in SourceFallback::ALL {
                self.event(Id::SourceFallbacks, &labels, reason.as_str(), sources.fallbacks.get(*reason));
            }
            if service.service.affinity_timeout.is_some() {
                self.sample(Id::AffinityPins, &labels, state.affinity.remembered());
            }
            self.sample(Id::AffinityEvictions, &labels, state.affinity.evicted.get());
            for reason in DropReason::ALL {
                self.event(Id::ServiceDropped, &labels, reason.as_str(), stats.dropped.get(*reason));
            }
            let entries = entries(&service.plan, port);
            self.sums(&labels, port.protocol, &entries, counters);
            if self.takes(counters.backends.len()) {
                for backend in counters.backends.iter() {
                    self.backend(&labels, port.protocol, &entries, backend);
                }
            }
        }
    }

    /// What a ServicePort has carried, over all backends that there were.
    fn sums(&mut self, labels: &str, protocol: Protocol, entries: &BTreeSet<Entry>, counters: &PortCounters) {
        let sums = BackendStats::default();
        counters.carried().for_each(|stats| sums.absorb(stats));
        if protocol == Protocol::Tcp {
            self.by_entry(Id::ServiceConnections, labels, entries, &sums.connections);
        }
        let open = counters.carried().map(|stats| stats.active_connections.get() + stats.active_flows.get());
        self.sample(Id::ServiceOpen, labels, open.sum::<u64>());
        self.by_entry(Id::ServiceUpstreamBytes, labels, entries, &sums.upstream_bytes);
        self.by_entry(Id::ServiceDownstreamBytes, labels, entries, &sums.downstream_bytes);
        self.events(labels, [Id::ServiceConnectFailures, Id::ServiceClosed], &sums);
    }

    fn backend_states(&mut self, labels: &str, plan: &ServicePlan, port: &ServicePort, counters: &PortCounters) {
        let picks = plan.balancers(port).flat_map(|(_, backends)| &*backends.usable.picks);
        let picks: BTreeSet<SocketAddr> = picks.map(|endpoint| endpoint.address()).collect();
        let is_ready = |backend: &Backend| picks.contains(&backend.address());
        let ready = counters.backends.iter().filter(|backend| is_ready(backend)).count();
        let draining = counters.backends.len() - ready;
        self.sample(Id::ServiceBackends, &format!(r#"{labels},state="ready""#), ready);
        self.sample(Id::ServiceBackends, &format!(r#"{labels},state="draining""#), draining);
    }

    fn backend(&mut self, port_labels: &str, protocol: Protocol, entries: &BTreeSet<Entry>, backend: &Backend) {
        let labels = &format!(r#"{port_labels},backend="{}""#, backend.address());
        let stats = backend.stats.so_far();
        if protocol == Protocol::Udp {
            self.sample(Id::Flows, labels, stats.flows.get());
            self.sample(Id::ActiveFlows, labels, stats.active_flows.get());
            let upstream = format!(r#"{labels},direction="upstream""#);
            let downstream = format!(r#"{labels},direction="downstream""#);
            self.sample(Id::Datagrams, &upstream, stats.upstream_datagrams.get());
            self.sample(Id::Datagrams, &downstream, stats.downstream_datagrams.get());
        } else {
            self.by_entry(Id::Connections, labels, entries, &stats.connections);
            self.sample(Id::ActiveConnections, labels, stats.active_connections.get());
            // Most backends of a large cluster are never reached from one node, and it is ten lines for each.
            if stats.connect_time.count() > 0 {
                self.histogram(Id::ConnectDuration, labels, &stats.connect_time);
            }
            self.sample(Id::BackendEjected, labels, u8::from(backend.is_ejected()));
            self.sample(Id::Ejections, labels, stats.ejections.get());
        }
        self.by_entry(Id::UpstreamBytes, labels, entries, &stats.upstream_bytes);
        self.by_entry(Id::DownstreamBytes, labels, entries, &stats.downstream_bytes);
        self.events(labels, [Id::ConnectFailures, Id::Closed], stats);
    }

    /// Failed tries and ends, by reason.
    fn events(&mut self, labels: &str, [failures, closed]: [Id; 2], stats: &BackendStats) {
        for reason in ConnectFailure::ALL {
            self.event(failures, labels, reason.as_str(), stats.connect_failures.get(*reason));
        }
        for reason in CloseReason::ALL {
            self.event(closed, labels, reason.as_str(), stats.closed.get(*reason));
        }
    }

    /// A series for each way in that there is, and for those that were there.
    fn by_entry(&mut self, id: Id, labels: &str, entries: &BTreeSet<Entry>, counter: &EntryCounter) {
        for entry in Entry::ALL {
            let count = counter.of(*entry);
            if count > 0 || entries.contains(entry) {
                self.sample(id, &format!(r#"{labels},entry="{entry}""#), count);
            }
        }
    }

    /// A series with a reason begins with its first event: with all words at 0 a backend would have 20 series more.
    fn event(&mut self, id: Id, labels: &str, reason: &str, count: u64) {
        if count > 0 {
            self.sample(id, &format!(r#"{labels},reason="{reason}""#), count);
        }
    }

    fn process(&mut self, process: &collector::Metrics) {
        if let Some(seconds) = process.cpu_seconds_total {
            self.sample(Id::CpuSeconds, "", seconds);
        }
        let whole = [
            (Id::OpenFds, process.open_fds),
            (Id::MaxFds, process.max_fds),
            (Id::VirtualMemory, process.virtual_memory_bytes),
            (Id::ResidentMemory, process.resident_memory_bytes),
            (Id::StartTime, process.start_time_seconds),
            (Id::Threads, process.threads),
        ];
        for (id, value) in whole {
            if let Some(value) = value {
                self.sample(id, "", value);
            }
        }
    }
}

/// The ways in to a ServicePort.
fn entries(plan: &ServicePlan, port: &ServicePort) -> BTreeSet<Entry> {
    let is_its = |listener: &&Listener| listener.port.port == port.name && listener.port.protocol == port.protocol;
    let listeners = plan.listeners().map(|(_, listener)| listener);
    listeners.filter(is_its).map(|listener| listener.kind.entry()).collect()
}

fn has_carried_traffic(counters: &PortCounters) -> bool {
    let met_clients = counters.state.as_ref().map(|state| state.stats.so_far()).is_some_and(|stats| {
        stats.accepted.get() > 0 || DropReason::ALL.iter().any(|reason| stats.dropped.get(*reason) > 0)
    });
    let mut backends = counters.backends.iter().map(|backend| backend.stats.so_far());
    met_clients || backends.any(|stats| stats.connections.get() + stats.flows.get() > 0)
}

/// The labels that all series of a ServicePort share. Written once for each, as escaping is what costs.
fn port_labels(service: &ObjectName, port: &ServicePort) -> String {
    let pairs = [("namespace", &service.namespace), ("service", &service.name), ("port", &port.name)];
    let mut text = String::with_capacity(128);
    for (name, value) in pairs {
        text.push_str(&label(name, value));
        text.push(',');
    }
    text + &label("protocol", port.protocol.as_str())
}

fn label(name: &str, value: &str) -> String {
    format!(r#"{name}="{}""#, sanitize_label_value(value))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;
    use crate::live::sample;
    use crate::model::{Endpoint, Service, TrafficPolicy};
    use crate::name::Scope;
    use crate::serve::departed::Departed;

    /// One line of the text.
    struct Sample<'a> {
        name: &'a str,
        labels: Vec<&'a str>,
        value: f64,
    }

    /// `name{label="value",…} number`, strictly, for label values without `",`.
    fn parse_sample(line: &str) -> Option<Sample<'_>> {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = match series.split_once('{') {
            None => (series, vec![]),
            Some((name, rest)) => {
                let pairs = rest.strip_suffix("\"}")?.split("\",");
                (name, pairs.map(|pair| pair.split_once("=\"").map(|(label, _)| label)).collect::<Option<_>>()?)
            }
        };
        let legal = |text: &&str| {
            text.starts_with(|c: char| c.is_ascii_lowercase())
                && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        let fine = legal(&name) && labels.iter().all(legal);
        fine.then_some(Sample { name, labels, value: value.parse().ok()? })
    }

    #[test]
    fn given_a_relay_with_traffic_when_rendered_then_each_line_is_in_the_table_and_in_the_grammar() {
        let text = render(&sample::status(), true);

        let mut series = BTreeSet::new();
        let mut lines = text.lines().peekable();
        let mut seen = vec![];
        while let Some(help) = lines.next() {
            let metric = METRICS.iter().find(|metric| help == format!("# HELP {} {}", metric.name, metric.help));
            let metric = metric.unwrap_or_else(|| panic!("not the help of a metric: {help}"));
            assert_eq!(lines.next(), Some(format!("# TYPE {} {}", metric.name, metric.kind.as_str()).as_str()));
            seen.push(metric.name);
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                let sample = parse_sample(line).unwrap_or_else(|| panic!("not a sample: {line}"));
                let suffix = sample.name.strip_prefix(metric.name).unwrap_or_else(|| panic!("of another: {line}"));
                let labels: Vec<_> = sample.labels.into_iter().filter(|label| *label != "le").collect();
                assert_eq!(labels, metric.labels, "{line}");
                match metric.kind {
                    Kind::Histogram => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
                    Kind::Counter | Kind::Gauge | Kind::Untyped => assert_eq!(suffix, "", "{line}"),
                }
                assert!(sample.value >= 0.0, "{line}");
                assert!(series.insert(line.rsplit_once(' ').expect("a sample").0.to_owned()), "twice: {line}");
            }
        }
        let in_order: Vec<_> = METRICS.iter().map(|metric| metric.name).filter(|name| seen.contains(name)).collect();
        assert_eq!(seen, in_order, "each once, in the order of the table");
        assert!(text.ends_with('\n'));
    }

    #[test]
    fn t064_given_an_api_source_when_rendered_then_the_time_to_program_is_a_histogram() {
        let status = sample::status();
        assert!(!render(&status, true).contains("network_programming"), "a static source has no such time");
        status.contact.watch(crate::stats::WatchedKind::Service);

        let text = render(&status, true);

        let lines = text.lines().filter(|line| line.contains("kubeproxy_network_programming_duration_seconds"));
        let lines: Vec<_> = lines.map(|line| line.rsplit_once(' ').map_or("", |(series, _)| series)).collect();
        assert!(lines.contains(&"kubeproxy_network_programming_duration_seconds_bucket{le=\"0.005\"}"), "{lines:?}");
        assert!(lines.contains(&"kubeproxy_network_programming_duration_seconds_bucket{le=\"60\"}"), "{lines:?}");
        assert!(lines.contains(&"kubeproxy_network_programming_duration_seconds_bucket{le=\"+Inf\"}"), "{lines:?}");
        assert_eq!(lines[lines.len() - 2..].concat().matches("_sum").count(), 1, "{lines:?}");
        assert!(text.contains("# TYPE kubeproxy_network_programming_duration_seconds histogram\n"), "{text}");
    }

    #[test]
    fn given_the_table_when_read_then_names_follow_the_conventions() {
        let mut names = BTreeSet::new();
        for metric in METRICS {
            assert!(names.insert(metric.name), "{} twice", metric.name);
            // The names that dashboards for kube-proxy know keep their prefix.
            let prefixes = ["kuberelay_", "kubeproxy_", "process_"];
            assert!(prefixes.iter().any(|prefix| metric.name.starts_with(prefix)), "{}", metric.name);
            let is_counter = matches!(metric.kind, Kind::Counter | Kind::Untyped);
            assert_eq!(is_counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.help.ends_with('.') && !metric.help.contains(['\n', '\\']), "{}", metric.name);
        }
    }

    #[test]
    fn given_a_service_that_carried_traffic_when_rendered_then_its_idle_backend_has_series_at_zero() {
        let text = render(&sample::status(), true);

        let labels = r#"namespace="default",service="web",port="http",protocol="TCP",backend="10.244.0.3:8000""#;
        for line in [
            format!("kuberelay_connections_total{{{labels},entry=\"cluster_ip\"}} 0\n"),
            format!("kuberelay_connections_total{{{labels},entry=\"node_port\"}} 0\n"),
            format!("kuberelay_active_connections{{{labels}}} 0\n"),
            format!("kuberelay_upstream_bytes_total{{{labels},entry=\"cluster_ip\"}} 0\n"),
            format!("kuberelay_connect_failures_total{{{labels},reason=\"refused\"}} 1\n"),
        ] {
            assert!(text.contains(&line), "{line} not in\n{text}");
        }
        assert!(!text.contains("kuberelay_flows_total"), "TCP has no flows");
    }

    #[test]
    fn given_a_backend_that_was_reached_when_rendered_then_it_has_a_histogram_and_the_other_has_none() {
        let status = sample::status();
        let web = &status.services[&ObjectName::parse("web")].ports[0];
        [2, 30, 9_000].iter().for_each(|ms| web.backends[0].stats.connect_time.observe(Duration::from_millis(*ms)));

        let text = render(&status, true);

        let labels = r#"namespace="default",service="web",port="http",protocol="TCP",backend="10.244.0.2:8000""#;
        let name = "kuberelay_connect_duration_seconds";
        for line in [
            format!("{name}_bucket{{{labels},le=\"0.001\"}} 0\n"),
            format!("{name}_bucket{{{labels},le=\"0.1\"}} 2\n"),
            format!("{name}_bucket{{{labels},le=\"+Inf\"}} 3\n"),
            format!("{name}_sum{{{labels}}} 9.032\n{name}_count{{{labels}}} 3\n"),
        ] {
            assert!(text.contains(&line), "{line} not in\n{text}");
        }
        assert!(!text.contains(r#"kuberelay_connect_duration_seconds_count{namespace="default",service="web",port="http",protocol="TCP",backend="10.244.0.3:8000""#));
    }

    #[test]
    fn given_a_backend_that_leaves_when_rendered_then_its_series_end_and_the_sums_of_its_port_stay() {
        let mut web = sample::web();
        let render_web = |web: &ServiceStatus| {
            let services = [(ObjectName::parse("web"), Arc::new(web.clone()))].into();
            render(&Status { services, ..Status::default() }, true)
        };
        let labels = r#"namespace="default",service="web",port="http",protocol="TCP""#;
        let sums = [
            format!("kuberelay_service_connections_total{{{labels},entry=\"cluster_ip\"}} 5\n"),
            format!("kuberelay_service_open{{{labels}}} 1\n"),
            format!("kuberelay_service_upstream_bytes_total{{{labels},entry=\"cluster_ip\"}} 2048\n"),
            format!("kuberelay_service_downstream_bytes_total{{{labels},entry=\"node_port\"}} 3145728\n"),
            format!("kuberelay_service_connect_failures_total{{{labels},reason=\"refused\"}} 1\n"),
            format!("kuberelay_service_closed_total{{{labels},reason=\"finished\"}} 1\n"),
        ];

        let before = render_web(&web);
        let [left, stays] = &*web.ports[0].backends else { panic!("two backends") };
        web.ports[0].departed = Some(Arc::new(Departed::of(Arc::clone(left))));
        web.ports[0].backends = [Arc::clone(stays)].into();
        let after = render_web(&web);

        for text in [&before, &after] {
            let missing: Vec<_> = sums.iter().filter(|sum| !text.contains(*sum)).collect();
            assert!(missing.is_empty(), "{missing:?} not in\n{text}");
        }
        assert!(before.contains("10.244.0.2:8000") && !after.contains("10.244.0.2:8000"), "{after}");
    }

    #[test]
    fn f24_given_more_backends_than_may_have_series_when_rendered_then_their_ports_sums_tell_of_them() {
        let text = |backends| render_with(backends, &PROCESS, &APPLIED, &sample::status(), true);

        let [all, none] = [text(2), text(1)];

        assert!(all.contains("kuberelay_backends_folded 0\n") && all.contains("backend=\"10.244.0.2:8000\""), "{all}");
        assert!(none.contains("kuberelay_backends_folded 2\n") && !none.contains("backend=\""), "{none}");
        assert!(none.contains("kuberelay_service_open{namespace=\"default\",service=\"web\""), "{none}");
    }

    #[test]
    fn given_clients_by_several_ways_in_when_rendered_then_each_way_that_is_or_was_there_has_its_own_number() {
        let status = sample::status();
        status.services[&ObjectName::parse("web")].ports[0].backends[0].stats.connections.add(Entry::Exposed, 3);

        let text = render(&status, true);

        let labels = r#"namespace="default",service="web",port="http",protocol="TCP",backend="10.244.0.2:8000""#;
        let series = format!("kuberelay_connections_total{{{labels},entry=");
        let entries: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(&series)).collect();
        assert_eq!(entries, ["\"cluster_ip\"} 5", "\"node_port\"} 0", "\"exposed\"} 3"]);
    }

    /// Each metric's lines, whatever their order.
    fn families(text: &str) -> BTreeMap<&str, BTreeSet<&str>> {
        let mut families: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        let mut name = "";
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                name = rest.split(' ').next().unwrap_or_default();
            }
            assert!(families.entry(name).or_default().insert(line), "twice: {line}");
        }
        families
    }

    /// What one backend of a thousand has counted: each another number.
    struct Carried {
        address: String,
        number: u64,
    }

    impl Carried {
        fn thousand() -> Vec<Self> {
            let address = |number: u64| format!("10.244.{}.{}:8000", number / 250, number % 250 + 1);
            (0..1_000).map(|number| Self { address: address(number), number }).collect()
        }

        /// In our counters.
        fn count(&self) -> Backend {
            let backend = Backend::new(self.number as u32, self.address.parse().expect("an address"));
            let stats = &*backend.stats;
            stats.connections.add(Entry::ClusterIp, self.number * 7);
            stats.connections.add(Entry::NodePort, self.number);
            (0..self.number % 5).for_each(|_| stats.active_connections.increment());
            stats.upstream_bytes.add(Entry::ClusterIp, self.number << 30);
            stats.connect_failures.add(ConnectFailure::Timeout, self.number + 1);
            [250, 500, 4_000].iter().for_each(|ms| stats.connect_time.observe(Duration::from_millis(*ms)));
            backend
        }

        /// In those of the exporter.
        fn record(&self, service: &str) {
            let backend = [("namespace", "default"), ("service", service), ("port", "http"), ("protocol", "TCP")];
            let mut labels = backend.map(|(name, value)| metrics::Label::new(name, value.to_owned())).to_vec();
            labels.push(metrics::Label::new("backend", self.address.clone()));
            let with = |name: &'static str, value: &'static str| {
                labels.iter().cloned().chain([metrics::Label::new(name, value)]).collect::<Vec<_>>()
            };
            let counter = |name: &'static str, labels: Vec<metrics::Label>, value| {
                metrics::counter!(name, labels).absolute(value)
            };
            counter("kuberelay_connections_total", with("entry", "cluster_ip"), self.number * 7);
            counter("kuberelay_connections_total", with("entry", "node_port"), self.number);
            counter("kuberelay_upstream_bytes_total", with("entry", "cluster_ip"), self.number << 30);
            counter("kuberelay_upstream_bytes_total", with("entry", "node_port"), 0);
            counter("kuberelay_connect_failures_total", with("reason", "timeout"), self.number + 1);
            metrics::gauge!("kuberelay_active_connections", labels.clone()).set((self.number % 5) as f64);
            let times = metrics::histogram!("kuberelay_connect_duration_seconds", labels.clone());
            [0.25, 0.5, 4.0].iter().for_each(|seconds| times.record(*seconds));
        }
    }

    /// A label value with all that has to be escaped.
    const ODD: &str = "we\"b\\\n1";

    #[test]
    fn given_a_thousand_backends_when_rendered_then_the_exporter_writes_the_same_lines() {
        let all = Carried::thousand();
        let mut web = sample::web();
        let service = Service { name: ObjectName::new("default", ODD), ..(*web.service).clone() };
        web.service = Arc::new(service);
        web.ports[0].backends = all.iter().map(|one| Arc::new(one.count())).collect();
        let bounds = [0.001, 0.005, 0.025, 0.1, 0.5, 2.5];
        let builder = PrometheusBuilder::new().set_buckets(&bounds).expect("bounds are there");
        let recorder = builder.build_recorder();
        let exporter = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            for Metric { name, kind, help, .. } in METRICS {
                match kind {
                    Kind::Counter => metrics::describe_counter!(*name, *help),
                    Kind::Gauge => metrics::describe_gauge!(*name, *help),
                    Kind::Histogram => metrics::describe_histogram!(*name, *help),
                    Kind::Untyped => {}
                }
            }
            all.iter().for_each(|one| one.record(ODD));
        });

        let status = Status { services: [(web.service.name.clone(), Arc::new(web))].into(), ..Status::default() };
        let (ours, theirs) = (render(&status, true), exporter.render());

        let (ours, theirs) = (families(&ours), families(&theirs));
        assert_eq!(theirs.len(), 5, "{:?}", theirs.keys());
        for (name, lines) in theirs {
            assert!(lines.len() > 1_000, "{name}");
            let differing: Vec<_> = ours[name].symmetric_difference(&lines).take(4).collect();
            assert!(differing.is_empty(), "{differing:#?}");
        }
    }

    #[test]
    fn given_session_affinity_when_rendered_then_its_pins_are_counted() {
        let mut web = sample::web();
        let state = Arc::clone(web.ports[0].state.as_ref().expect("it is served"));
        state.affinity.set_timeout(Some(Duration::from_secs(60)));
        for host in [1, 2, 2] {
            state.affinity.remember([192, 0, 2, host].into(), Scope::Cluster, 0, None, Instant::now());
        }
        let services = |web: &ServiceStatus| [(ObjectName::parse("web"), Arc::new(web.clone()))].into();
        let without = render(&Status { services: services(&web), ..Status::default() }, true);
        web.service = Arc::new(Service { affinity_timeout: Some(Duration::from_secs(60)), ..(*web.service).clone() });

        let with = render(&Status { services: services(&web), ..Status::default() }, true);

        assert!(!without.contains("kuberelay_affinity_pins"), "{without}");
        let line = r#"kuberelay_affinity_pins{namespace="default",service="web",port="http",protocol="TCP"} 2"#;
        assert!(with.contains(line), "{with}");
    }

    #[test]
    fn given_policy_local_without_an_endpoint_here_when_rendered_then_the_port_is_counted_under_its_policy() {
        let mail = Service {
            internal_policy: TrafficPolicy::Local,
            external_policy: TrafficPolicy::Local,
            ..Service::new("mail").cluster_ip([127, 96, 0, 12]).port("http", 25).node_port(30025)
        };
        let plan = sample::plan(&mail, vec![Endpoint::new([10, 244, 0, 4])]);
        let mail = ServiceStatus { plan, service: Arc::new(mail), ..sample::mail() };
        let status = Status { services: [(mail.service.name.clone(), Arc::new(mail))].into(), ..Status::default() };

        let text = render(&status, true);

        let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
        assert!(text.contains(&format!("{name}{{traffic_policy=\"internal\"}} 1\n")), "{text}");
        assert!(text.contains(&format!("{name}{{traffic_policy=\"external\"}} 1\n")), "{text}");
        assert!(text.contains(&format!("# TYPE {name} untyped\n")), "{text}");
    }

    #[test]
    fn given_a_service_without_traffic_when_rendered_then_it_has_its_number_of_backends_alone() {
        let text = render(&sample::status(), true);

        let dns: Vec<&str> = text.lines().filter(|line| line.contains(r#"service="dns""#)).collect();
        let labels = r#"namespace="default",service="dns",port="",protocol="UDP""#;
        assert_eq!(
            dns,
            [
                format!(r#"kuberelay_service_backends{{{labels},state="ready"}} 0"#),
                format!(r#"kuberelay_service_backends{{{labels},state="draining"}} 0"#),
            ]
        );
    }

    #[test]
    fn given_states_of_listeners_when_rendered_then_each_is_counted_once() {
        let text = render(&sample::status(), false);

        for line in [
            "kuberelay_listeners{state=\"serving\"} 1\n",
            "kuberelay_listeners{state=\"parked\"} 1\n",
            "kuberelay_listeners{state=\"failed\"} 1\n",
            "kuberelay_listener_failures{reason=\"in_use\"} 1\n",
            "kuberelay_ready 0\n",
            "kuberelay_config_last_reload_successful 1\n",
            "kuberelay_config_revision 3\n",
            "kuberelay_objects_rejected_total{kind=\"Service\",reason=\"decode\"} 1\n",
        ] {
            assert!(text.contains(line), "{line} not in\n{text}");
        }
    }

    #[test]
    fn given_health_ports_when_rendered_then_each_is_counted_once() {
        let mail = sample::mail();
        let mut status = Status { services: [(mail.service.name.clone(), Arc::new(mail))].into(), ..Status::default() };

        assert!(render(&status, true).contains("kuberelay_health_ports{state=\"serving\"} 1\n"));
        let failed = ListenerState::Failed { reason: "in_use".into(), message: "ask ss".into() };
        status.failed_health_ports = Arc::new([(ObjectName::parse("mail"), failed)].into());
        let text = render(&status, true);

        assert!(text.contains("kuberelay_health_ports{state=\"serving\"} 0\n"), "{text}");
        assert!(text.contains("kuberelay_health_ports{state=\"failed\"} 1\n"), "{text}");
    }

    #[test]
    fn given_a_backend_that_left_the_picks_when_rendered_then_it_is_draining() {
        let mut web = sample::web();
        let ending = Endpoint { ready: false, terminating: true, ..Endpoint::new([10, 244, 0, 3]) };
        web.plan = sample::plan(&web.service, vec![Endpoint::new([10, 244, 0, 2]), ending]);
        let services = [(ObjectName::parse("web"), Arc::new(web))].into();

        let text = render(&Status { services, ..Status::default() }, true);

        assert!(text.contains(r#"protocol="TCP",state="ready"} 1"#), "{text}");
        assert!(text.contains(r#"protocol="TCP",state="draining"} 1"#), "{text}");
    }

    #[test]
    fn given_no_services_when_rendered_then_build_and_process_are_still_told() {
        let text = render(&Status::default(), false);

        assert!(text.contains(concat!("kuberelay_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1\n")));
        assert!(text.contains("process_resident_memory_bytes "), "{text}");
    }
}
