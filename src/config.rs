//! What the program works with, as checked values; every default is a constant here.
//!
//! How people write it is `cli` (flags and environment) and `value` (grammar). Each value is parsed once, there.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16, NonZeroU32, NonZeroUsize};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

use crate::access_log::AccessLogOptions;
use crate::allocate::{ClusterIpRange, NodePortRange, Ranges};
#[cfg(feature = "kubernetes")]
use crate::api_client::ApiOptions;
use crate::control::RelayOptions;
use crate::endpoints::Node;
use crate::guard::VipGuard;
use crate::host::{Host, NodePortSelector, node_port_addresses};
use crate::lifecycle::ShutdownTimes;
use crate::logs::LogOptions;
use crate::manifest::Input;
use crate::plan::{AllowFrom, Expose, PlanOptions};
use crate::reply_path::ReplyPathOptions;
use crate::serve::connect::{ConnectOptions, Sources, Steps};
use crate::serve::flow::IdleTimes;
use crate::serve::limits::LimitOptions;
use crate::serve::tcp::TcpOptions;
use crate::serve::udp::UdpOptions;
use crate::vips::VipOptions;

/// `--metrics-bind-address` and `--status-bind-address`: metrics, status and readiness, on loopback since they tell a lot.
pub const DEFAULT_METRICS_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// `--healthz-bind-address` with a static source. kube-proxy's port.
pub const DEFAULT_HEALTHZ_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);
/// `--healthz-bind-address` with an API server: load balancers ask from outside.
pub const CLUSTER_HEALTHZ_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 10256);
/// `--nodeport-addresses` with a static source: nobody else can reach a laptop by accident.
pub const DEFAULT_NODE_PORT_ADDRESSES: NodePortSelector = NodePortSelector::Localhost;
/// `--nodeport-addresses` with an API server.
pub const CLUSTER_NODE_PORT_ADDRESSES: [NodePortSelector; 2] = [NodePortSelector::Primary, NodePortSelector::Localhost];
/// `--service-cluster-ip-range`: inside 127.0.0.0/8, so that addresses need no root.
pub const DEFAULT_SERVICE_RANGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(127, 96, 0, 0), 16);
/// `--service-node-port-range`: the API server's.
pub const DEFAULT_NODE_PORT_RANGE: RangeInclusive<u16> = 30000..=32767;
/// `--shutdown-delay` with a static source: no load balancer watches it.
pub const DEFAULT_SHUTDOWN_DELAY: Duration = Duration::ZERO;
/// `--shutdown-delay` with an API server: load balancers look at `/healthz` every few seconds.
pub const CLUSTER_SHUTDOWN_DELAY: Duration = Duration::from_secs(5);
/// `--drain-timeout`.
pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// `--udp-timeout-unreplied`: a flow that no backend has answered.
pub const DEFAULT_UDP_TIMEOUT_UNREPLIED: Duration = Duration::from_secs(10);
/// `--udp-timeout-answered`: one exchange, as DNS has it.
pub const DEFAULT_UDP_TIMEOUT_ANSWERED: Duration = Duration::from_secs(10);
/// `--udp-timeout-stream`: a client that sent again after an answer.
pub const DEFAULT_UDP_TIMEOUT_STREAM: Duration = Duration::from_secs(60);
/// `--connect-timeout`: the first step of the ladder; the others are 500 ms, 1 s and 2 s.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_millis(250);
/// `--connect-tries`.
pub const DEFAULT_CONNECT_TRIES: u8 = 4;
/// `--eject-after`.
pub const DEFAULT_EJECT_AFTER: NonZeroU8 = NonZeroU8::new(5).expect("5 is not 0");
/// `--accept-proxy-timeout`: a packet that is lost comes again after one to three seconds.
pub const DEFAULT_ACCEPT_PROXY_TIMEOUT: Duration = Duration::from_secs(5);
/// `--half-close-timeout`.
pub const DEFAULT_HALF_CLOSE_TIMEOUT: Duration = Duration::from_secs(3_600);
/// `--udp-shards`: what one thread can do is enough for most ports.
pub const DEFAULT_UDP_SHARDS: u16 = 1;
/// `--route-protocol`: known to no other program that says so.
pub const DEFAULT_ROUTE_PROTOCOL: u8 = 107;
/// `--vip-routes-linger`: the kernel goes on for about as long with what a closed connection has left.
pub const DEFAULT_VIP_ROUTES_LINGER: Duration = Duration::from_secs(60);
/// `upgrade --timeout`: an API server may take its time.
pub const DEFAULT_UPGRADE_TIMEOUT: Duration = Duration::from_secs(60);
/// `--log-level`.
pub const DEFAULT_LOG_LEVEL: &str = "info";
/// `--access-log-sample`: all of them.
pub const DEFAULT_ACCESS_LOG_SAMPLE: u32 = 1;

/// What `run` works with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunConfig {
    /// Where Services come from.
    pub source: SourceConfig,
    /// What shapes the plan.
    pub plan: PlanConfig,
    /// Where metrics are served; `None`: nowhere. A wildcard means each address of this machine, of both families.
    pub metrics_address: Option<SocketAddr>,
    /// Where status is served beside metrics, in the same way. From `--status-bind-address`.
    pub status_address: Option<SocketAddr>,
    /// Where health is served, in the same way.
    pub healthz_address: Option<SocketAddr>,
    /// True where the process is to end if one of these cannot be bound.
    pub bind_address_hard_fail: bool,
    /// How addresses of Services are made local; `None`: others do that. From `--vip-routes`.
    pub vips: Option<VipOptions>,
    /// What keeps sockets of all addresses from answering there. From `--vip-guard`.
    pub vip_guard: VipGuard,
    /// How answers to clients' addresses are led here. From `--route-protocol`, `--reply-mark` and `--vip-routes-at-exit`.
    pub reply_path: ReplyPathOptions,
    /// How TCP backends are reached.
    pub upstream: UpstreamConfig,
    /// How long TCP connections may last.
    pub limits: LimitOptions,
    /// How long a balancer in front may take for its PROXY header. From `--accept-proxy-timeout`.
    pub header_timeout: Duration,
    /// TCP connections at once; `None`: as many as there are descriptors and memory for. From `--max-connections`.
    pub max_connections: Option<NonZeroU32>,
    /// How long the end may take.
    pub shutdown: ShutdownTimes,
    /// How long idle UDP flows live.
    pub udp_timeouts: UdpTimeouts,
    /// Threads that share a UDP port whose Service does not say (1..=1024). From `--udp-shards`.
    pub udp_shards: NonZeroU16,
    /// Folder that is this process's alone, with an API server also that of the last state; `None`: it is not kept. From
    /// `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// True where another process with this folder is to hand over what it serves with. From `--take-over`.
    pub take_over: bool,
    /// The pod that this process runs in, by its UID; `None`: nobody says. From `--pod-uid`.
    pub pod_uid: Option<String>,
    /// How to log.
    pub logs: LogOptions,
    /// What to write of each connection and flow; `None`: nothing. From `--access-log`.
    pub access_log: Option<AccessLogOptions>,
    /// Worker threads (1..=1024); `None`: as many as this process may use processors.
    pub workers: Option<usize>,
}

/// Where Services come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// Files and folders; `-` is standard input. At least one. From `--source`.
    Manifests(Vec<Input>),
    /// An API server. From `--kubeconfig`, `--master` and the environment of a pod.
    #[cfg(feature = "kubernetes")]
    Api {
        /// Which one.
        server: ApiOptions,
        /// The address that the cluster gives its own server, in a pod: one of a Service, like 10.96.0.1. From
        /// `KUBERNETES_SERVICE_HOST`.
        service_host: Option<IpAddr>,
    },
}

impl SourceConfig {
    /// True where a whole cluster is served, not what one person wrote: more addresses, and more caution.
    pub fn is_cluster(&self) -> bool {
        !matches!(self, Self::Manifests(_))
    }
}

/// How TCP backends are reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Addresses that they see, in turn; empty: the kernel chooses. From `--upstream-source`.
    pub sources: Vec<IpAddr>,
    /// How long they are waited for. From `--connect-timeout` and `--connect-tries`.
    pub steps: Steps,
    /// Failures in a row after which one gets nothing for a time; `None`: never. From `--eject-after`.
    pub eject_after: Option<NonZeroU8>,
}

/// Idle times of UDP flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpTimeouts {
    /// No backend has answered. From `--udp-timeout-unreplied`.
    pub unreplied: Duration,
    /// One exchange. From `--udp-timeout-answered`.
    pub answered: Duration,
    /// The client sent again after an answer. From `--udp-timeout-stream`.
    pub stream: Duration,
}

/// What `check` works with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckConfig {
    /// Files and folders; `-` is standard input. None where a configuration file alone is checked.
    pub sources: Vec<Input>,
    /// What shapes the plan.
    pub plan: PlanConfig,
}

/// What shapes a plan besides the objects, before this machine's addresses are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanConfig {
    /// Where node ports are served. From `--nodeport-addresses`.
    pub node_port_addresses: Vec<NodePortSelector>,
    /// Extra listeners; a wildcard means each address of this machine. From `--expose`.
    pub expose: Vec<Expose>,
    /// Where external IPs are served. From `--allowed-external-cidrs`.
    pub allowed_external_cidrs: Vec<IpNet>,
    /// Where endpoints may be; empty: anywhere. From `--endpoint-cidrs`.
    pub endpoint_cidrs: Vec<IpNet>,
    /// Whether endpoints have to name a pod. From `--require-target-ref`.
    pub require_target_ref: bool,
    /// Who may come from outside, networks of both families; empty: everybody. From `--allow-from`.
    pub allow_from: Vec<IpNet>,
    /// The balancers that are believed when they say who their clients are; empty: nobody. From `--accept-proxy-from`.
    pub accept_proxy_from: Vec<IpNet>,
    /// Where the static source takes cluster IPs from; `None`: it gives none. From `--service-cluster-ip-range`.
    pub service_cluster_ip_range: Option<IpNet>,
    /// Where the static source takes node ports from. From `--service-node-port-range`.
    pub service_node_port_range: RangeInclusive<u16>,
    /// The pods' networks; empty: unknown. From `--cluster-cidr`.
    pub cluster_cidrs: Vec<IpNet>,
    /// Whose Services to take. From `--proxy-name`.
    pub proxy_name: Option<String>,
    /// This node. From `--node-name` and `--zone`.
    pub node: Node,
    /// The addresses that this node goes by; may be empty. From `--node-address`.
    pub node_addresses: Vec<IpAddr>,
    /// True where a backend may be on loopback: whoever writes endpoints into a cluster must not reach what listens
    /// there (CVE-2021-25737).
    pub allow_loopback_endpoints: bool,
}

impl RunConfig {
    /// Everything that a relay wants to know, on this machine, but the running access log. After the limit of open files has been raised.
    pub fn relay_options(&self, host: &Host) -> RelayOptions {
        let UdpTimeouts { unreplied, answered, stream } = self.udp_timeouts;
        let UpstreamConfig { sources, steps, eject_after } = self.upstream.clone();
        RelayOptions {
            plan: self.plan.resolve(host),
            inside: self.plan.inside(host),
            tcp: TcpOptions {
                connect: ConnectOptions { steps, eject_after, sources: Sources::new(sources) },
                limits: self.limits,
                header_timeout: self.header_timeout,
                max_connections: self.max_connections,
                workers: self.workers.and_then(NonZeroUsize::new).unwrap_or(TcpOptions::default().workers),
                ..TcpOptions::default()
            },
            udp: UdpOptions {
                idle: IdleTimes { unreplied, answered, stream },
                shards_per_listener: self.udp_shards,
                ..UdpOptions::default()
            },
            udp_shards: self.workers.and_then(NonZeroUsize::new),
            awaits_node: self.source.is_cluster(),
            vips: self.vips.clone(),
            vip_guard: self.vip_guard,
            reply_path: Some(self.reply_path),
            access_log: None,
        }
    }
}

impl PlanConfig {
    /// One for tests: node ports on addresses that `nodeport_addresses` selects, and nothing else said.
    #[cfg(test)]
    pub(crate) fn with_node_ports(nodeport_addresses: Vec<NodePortSelector>) -> Self {
        Self {
            node_port_addresses: nodeport_addresses,
            expose: vec![],
            allowed_external_cidrs: vec![],
            endpoint_cidrs: vec![],
            require_target_ref: false,
            allow_from: vec![],
            accept_proxy_from: vec![],
            service_cluster_ip_range: None,
            service_node_port_range: DEFAULT_NODE_PORT_RANGE,
            cluster_cidrs: vec![],
            proxy_name: None,
            node: Node::default(),
            node_addresses: vec![],
            allow_loopback_endpoints: true,
        }
    }

    /// What the plan needs, now that this machine's addresses are known.
    pub fn resolve(&self, host: &Host) -> PlanOptions {
        PlanOptions {
            node: self.node.clone(),
            node_port_addresses: node_port_addresses(&self.node_port_addresses, host, &self.node_addresses),
            cluster_cidrs: self.cluster_cidrs.clone(),
            allowed_external_cidrs: self.allowed_external_cidrs.clone(),
            endpoint_cidrs: self.endpoint_cidrs.clone(),
            require_target_ref: self.require_target_ref,
            allow_from: (!self.allow_from.is_empty()).then(|| AllowFrom::new(&self.allow_from)),
            accept_proxy_from: self.accept_proxy_from.clone(),
            proxy_name: self.proxy_name.clone(),
            expose: self.expose.clone(),
            // Each once: interfaces that have the same one come and go with pods, which is no reason to plan anew.
            node_addresses: each_once(host.own_addresses().chain(self.node_addresses.iter().copied())),
            lent_addresses: each_once(host.lent_addresses(&self.node_addresses)),
            allow_loopback_endpoints: self.allow_loopback_endpoints,
        }
    }

    /// Where the static source takes addresses from.
    pub fn ranges(&self) -> Ranges {
        let (first, last) = self.service_node_port_range.clone().into_inner();
        Ranges { cluster_ips: ClusterIpRange(self.service_cluster_ip_range), node_ports: NodePortRange { first, last } }
    }

    /// What counts as this node and its pods: its addresses, all of loopback, and the pods' networks.
    ///
    /// All of its addresses, also those on `lo` that are only there for Services: what comes from one comes from here.
    pub fn inside(&self, host: &Host) -> Vec<IpNet> {
        let loopback = [IpNet::new_assert([127, 0, 0, 0].into(), 8), IpNet::from(IpAddr::from(Ipv6Addr::LOCALHOST))];
        let own = host.addresses().into_iter().chain(self.node_addresses.iter().copied()).map(IpNet::from);
        loopback.into_iter().chain(own).chain(self.cluster_cidrs.iter().copied()).collect()
    }
}

fn each_once(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    addresses.collect::<BTreeSet<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::InterfaceAddress;

    fn host() -> Host {
        let address = |interface: &str, ip: [u8; 4], prefix| InterfaceAddress {
            interface: interface.into(),
            address: ip.into(),
            prefix,
        };
        let interfaces = vec![address("lo", [127, 0, 0, 1], 8), address("eth0", [10, 0, 0, 5], 24)];
        Host { interfaces, default_sources: vec![[10, 0, 0, 5].into()] }
    }

    fn config() -> PlanConfig {
        let service_cluster_ip_range = Some(IpNet::V4(DEFAULT_SERVICE_RANGE));
        PlanConfig { service_cluster_ip_range, ..PlanConfig::with_node_ports(vec![DEFAULT_NODE_PORT_ADDRESSES]) }
    }

    #[test]
    fn t216_given_the_static_default_when_resolved_then_node_ports_are_on_loopback_alone() {
        let options = config().resolve(&host());

        assert_eq!(options.node_port_addresses, [IpAddr::from([127, 0, 0, 1])]);
        assert!(options.allow_loopback_endpoints);
    }

    #[test]
    fn t123_given_an_address_on_lo_for_a_service_when_resolved_then_it_is_not_the_nodes_own_and_yet_inside() {
        let vip = IpAddr::from([198, 51, 100, 7]);
        let mut host = host();
        host.interfaces.push(InterfaceAddress { interface: "lo".into(), address: vip, prefix: 32 });

        assert!(!config().resolve(&host).node_addresses.contains(&vip));
        assert!(config().inside(&host).contains(&vip.into()));
        let named = PlanConfig { node_addresses: vec![vip], ..config() };
        assert!(named.resolve(&host).node_addresses.contains(&vip), "--node-address says that it is");
        assert!(config().resolve(&host).lent_addresses.contains(&vip));
        assert!(!named.resolve(&host).lent_addresses.contains(&vip));
    }

    #[test]
    fn given_an_address_of_this_machine_when_asked_then_it_is_inside_and_its_neighbour_is_not() {
        let inside = PlanConfig { cluster_cidrs: vec![IpNet::new_assert([10, 244, 0, 0].into(), 16)], ..config() }
            .inside(&host());

        let is_inside = |ip: [u8; 4]| inside.iter().any(|net| net.contains(&IpAddr::from(ip)));
        assert!(is_inside([10, 0, 0, 5]) && is_inside([127, 96, 0, 1]) && is_inside([10, 244, 3, 2]));
        assert!(!is_inside([10, 0, 0, 6]));
    }

    #[test]
    fn given_the_defaults_when_compared_then_no_two_servers_share_an_address() {
        assert_ne!(DEFAULT_METRICS_ADDRESS, DEFAULT_HEALTHZ_ADDRESS);
        assert!(DEFAULT_SERVICE_RANGE.network().is_loopback(), "addresses need no root");
    }
}
