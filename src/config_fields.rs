//! The fields of a configuration file: which flag each stands for, and how its value is written.
//!
//! Two kinds are read: ours, with a field for each flag of `run`, and kube-proxy's, whose fields of no use here are known
//! by name. How a file is read is `config_file`; what the values mean is `config`.

/// A kind of configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Ours: `RelayConfiguration`, kube-relay.dev/v1alpha1.
    Relay,
    /// kube-proxy's: `KubeProxyConfiguration`, kubeproxy.config.k8s.io/v1alpha1, as kubeadm writes it.
    KubeProxy,
}

impl Kind {
    pub(crate) const ALL: [Self; 2] = [Self::Relay, Self::KubeProxy];

    /// The word of the field `kind`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Relay => "RelayConfiguration",
            Self::KubeProxy => "KubeProxyConfiguration",
        }
    }

    /// The one version that is read.
    pub(crate) fn version(self) -> &'static str {
        match self {
            Self::Relay => "kube-relay.dev/v1alpha1",
            Self::KubeProxy => "kubeproxy.config.k8s.io/v1alpha1",
        }
    }

    /// The fields that are taken. Where two stand for one flag, the later one counts.
    pub(crate) fn fields(self) -> &'static [Field] {
        match self {
            Self::Relay => RELAY,
            Self::KubeProxy => KUBE_PROXY,
        }
    }

    /// Fields, or whole sections, that the kind has and this program has no use for.
    pub(crate) fn inapplicable(self) -> &'static [&'static str] {
        match self {
            Self::Relay => &[],
            Self::KubeProxy => KUBE_PROXY_INAPPLICABLE,
        }
    }
}

/// A field that is taken.
#[derive(Debug)]
pub(crate) struct Field {
    /// Its way from the document: `udpTimeouts.stream`.
    pub(crate) path: &'static str,
    /// How its value is written.
    pub(crate) form: Form,
    /// The flags whose defaults it sets, by their names in `cli`: `udp_timeout_stream`.
    pub(crate) flags: &'static [&'static str],
}

/// How a value is written. The flag itself judges what is inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Text.
    Text,
    /// A number.
    Number,
    /// A number, or `none`.
    NumberOrNone,
    /// `true` or `false`.
    Switch,
    /// A list of text, or text with commas.
    List,
    /// The same, with an entry at least: without the field another thing holds than a reader of `[]` would think.
    Entries,
    /// `IP:PORT`; an IP alone gets this port, as kube-proxy does it.
    Address(u16),
    /// An IP; a wildcard says nothing.
    NodeAddress,
    /// kube-proxy's `mode`: there is one here.
    Mode,
}

const METRICS: Form = Form::Address(crate::config::DEFAULT_METRICS_ADDRESS.port());
const HEALTHZ: Form = Form::Address(crate::config::DEFAULT_HEALTHZ_ADDRESS.port());

const RELAY: &[Field] = &[
    field("sources", Form::List, &["sources"]),
    #[cfg(feature = "kubernetes")]
    field("clientConnection.kubeconfig", Form::Text, &["kubeconfig"]),
    #[cfg(feature = "kubernetes")]
    field("master", Form::Text, &["master"]),
    field("metricsBindAddress", METRICS, &["metrics_bind_address"]),
    field("statusBindAddress", METRICS, &["status_bind_address"]),
    field("healthzBindAddress", HEALTHZ, &["healthz_bind_address"]),
    field("bindAddressHardFail", Form::Switch, &["bind_address_hard_fail"]),
    field("nodePortAddresses", Form::List, &["nodeport_addresses"]),
    field("expose", Form::List, &["expose"]),
    field("allowedExternalCIDRs", Form::List, &["allowed_external_cidrs"]),
    field("endpointCIDRs", Form::List, &["endpoint_cidrs"]),
    field("requireTargetRef", Form::Switch, &["require_target_ref"]),
    field("allowFrom", Form::Entries, &["allow_from"]),
    field("acceptProxyFrom", Form::List, &["accept_proxy_from"]),
    field("acceptProxyTimeout", Form::Text, &["accept_proxy_timeout"]),
    field("vipRoutes", Form::Text, &["vip_routes"]),
    field("vipRoutesLinger", Form::Text, &["vip_routes_linger"]),
    field("vipRoutesAtExit", Form::Text, &["vip_routes_at_exit"]),
    field("vipGuard", Form::Text, &["vip_guard"]),
    field("routeProtocol", Form::Number, &["route_protocol"]),
    field("replyMark", Form::Text, &["reply_mark"]),
    field("tuneSysctls", Form::Switch, &["tune_sysctls"]),
    field("serviceClusterIPRange", Form::Text, &["service_cluster_ip_range"]),
    field("serviceNodePortRange", Form::Text, &["service_node_port_range"]),
    field("clusterCIDR", Form::List, &["cluster_cidr"]),
    field("proxyName", Form::Text, &["proxy_name"]),
    field("nodeName", Form::Text, &["node_name"]),
    field("zone", Form::Text, &["zone"]),
    field("nodeAddresses", Form::List, &["node_address"]),
    field("upstreamSources", Form::List, &["upstream_source"]),
    field("connectTimeout", Form::Text, &["connect_timeout"]),
    field("connectTries", Form::Number, &["connect_tries"]),
    field("ejectAfter", Form::NumberOrNone, &["eject_after"]),
    field("halfCloseTimeout", Form::Text, &["half_close_timeout"]),
    field("idleTimeout", Form::Text, &["idle_timeout"]),
    field("maxConnectionAge", Form::Text, &["max_connection_age"]),
    field("maxConnections", Form::NumberOrNone, &["max_connections"]),
    field("shutdownDelay", Form::Text, &["shutdown_delay"]),
    field("drainTimeout", Form::Text, &["drain_timeout"]),
    field("udpTimeouts.unreplied", Form::Text, &["udp_timeout_unreplied"]),
    field("udpTimeouts.answered", Form::Text, &["udp_timeout_answered"]),
    field("udpTimeouts.stream", Form::Text, &["udp_timeout_stream"]),
    field("udpShards", Form::Number, &["udp_shards"]),
    field("stateDir", Form::Text, &["state_dir"]),
    field("workers", Form::Number, &["workers"]),
    field("logging.level", Form::Text, &["log_level"]),
    field("logging.format", Form::Text, &["log_format"]),
    field("accessLog.path", Form::Text, &["access_log"]),
    field("accessLog.format", Form::Text, &["access_log_format"]),
    field("accessLog.sample", Form::Number, &["access_log_sample"]),
];

const KUBE_PROXY: &[Field] = &[
    // Not a listener's address in spite of its name: the one that the node goes by.
    field("bindAddress", Form::NodeAddress, &["node_address"]),
    field("bindAddressHardFail", Form::Switch, &["bind_address_hard_fail"]),
    #[cfg(feature = "kubernetes")]
    field("clientConnection.kubeconfig", Form::Text, &["kubeconfig"]),
    field("clusterCIDR", Form::List, &["cluster_cidr"]),
    // Times of conntrack entries: without an answer, and of a flow that goes on.
    field("conntrack.udpTimeout", Form::Text, &["udp_timeout_unreplied", "udp_timeout_answered"]),
    field("conntrack.udpStreamTimeout", Form::Text, &["udp_timeout_stream"]),
    field("healthzBindAddress", HEALTHZ, &["healthz_bind_address"]),
    field("hostnameOverride", Form::Text, &["node_name"]),
    field("logging.format", Form::Text, &["log_format"]),
    field("metricsBindAddress", METRICS, &["metrics_bind_address"]),
    field("mode", Form::Mode, &[]),
    field("nodePortAddresses", Form::List, &["nodeport_addresses"]),
    // Of the userspace mode, until 1.26: for flows in any state.
    field("udpIdleTimeout", Form::Text, &["udp_timeout_unreplied", "udp_timeout_answered", "udp_timeout_stream"]),
];

/// Of all releases that had the kind.
const KUBE_PROXY_INAPPLICABLE: &[&str] = &[
    "clientConnection",
    "configSyncPeriod",
    "conntrack",
    "detectLocal",
    "detectLocalMode",
    "enableProfiling",
    "featureGates",
    "iptables",
    "ipvs",
    "linux",
    "logging",
    "minSyncPeriod",
    "nftables",
    "oomScoreAdj",
    "portRange",
    "resourceContainer",
    "showHiddenMetricsForVersion",
    "syncPeriod",
    "windows",
    "windowsRunAsService",
    "winkernel",
];

const fn field(path: &'static str, form: Form, flags: &'static [&'static str]) -> Field {
    Field { path, form, flags }
}
