//! The command line: commands, flags, environment and help, and how they become checked values.
//!
//! Defaults and what the values mean are in `config`; the grammar of single values is in `value`.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16, NonZeroU32};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::FalseyValueParser;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use ipnet::IpNet;

use crate::access_log::{AccessFormat, AccessLogOptions};
use crate::allocate::{ClusterIpRange, Ranges};
#[cfg(feature = "kubernetes")]
use crate::api_client::ApiOptions;
use crate::config::{
    CLUSTER_HEALTHZ_ADDRESS, CLUSTER_NODE_PORT_ADDRESSES, CLUSTER_SHUTDOWN_DELAY, CheckConfig,
    DEFAULT_ACCEPT_PROXY_TIMEOUT, DEFAULT_ACCESS_LOG_SAMPLE, DEFAULT_CONNECT_TIMEOUT, DEFAULT_CONNECT_TRIES,
    DEFAULT_DRAIN_TIMEOUT, DEFAULT_EJECT_AFTER, DEFAULT_HALF_CLOSE_TIMEOUT, DEFAULT_HEALTHZ_ADDRESS, DEFAULT_LOG_LEVEL,
    DEFAULT_METRICS_ADDRESS, DEFAULT_NODE_PORT_ADDRESSES, DEFAULT_NODE_PORT_RANGE, DEFAULT_ROUTE_PROTOCOL,
    DEFAULT_SERVICE_RANGE, DEFAULT_SHUTDOWN_DELAY, DEFAULT_UDP_SHARDS, DEFAULT_UDP_TIMEOUT_ANSWERED,
    DEFAULT_UDP_TIMEOUT_STREAM, DEFAULT_UDP_TIMEOUT_UNREPLIED, DEFAULT_UPGRADE_TIMEOUT, DEFAULT_VIP_ROUTES_LINGER,
    PlanConfig, RunConfig, SourceConfig, UdpTimeouts, UpstreamConfig,
};
use crate::config_file::ConfigFile;
use crate::discovery::{DiscoveryConfig, DiscoverySource, Form};
use crate::dns_zone::ReverseNetwork;
use crate::doctor::DoctorConfig;
use crate::endpoints::Node;
use crate::explain::Question;
use crate::guard::VipGuard;
use crate::host::NodePortSelector;
use crate::lifecycle::ShutdownTimes;
use crate::logs::{LogFormat, LogLevel, LogOptions};
use crate::manifest::Input;
use crate::model::ServiceKind;
use crate::name::ObjectName;
use crate::plan::Expose;
use crate::reply_mark::ReplyMark;
use crate::reply_path::ReplyPathOptions;
use crate::scaffold::{NewNodePort, NewService};
use crate::serve::connect::Steps;
use crate::serve::limits::LimitOptions;
use crate::tcp_settings::{CONNECT_TIMEOUTS, CONNECT_TRIES, LASTING};
use crate::top::order::Sort;
use crate::top::{DEFAULT_INTERVAL, SHORTEST_INTERVAL, TopOptions};
use crate::value::{
    Destination, OrNone, PortRange, Time, destination, domain, expose, label, namespace, network, reverse_network,
    socket_address,
};
use crate::vips::{AtExit, VipOptions};

/// Exit code: all is well.
pub const EXIT_FINE: u8 = 0;
/// Exit code: problems were found, or the command failed.
pub const EXIT_PROBLEMS: u8 = 1;
/// Exit code of `diff`: the command failed, so that nobody knows what differs.
pub const EXIT_UNKNOWN: u8 = 2;
/// Exit code: the command line is wrong (`EX_USAGE`).
pub const EXIT_USAGE: u8 = 64;

/// A userspace L4 proxy for Kubernetes Services.
#[derive(Debug, Parser)]
#[command(
    name = "kube-relay",
    version,
    about = "Relays TCP and UDP from Service addresses to their endpoints",
    long_about = "Relays TCP and UDP from the addresses of Kubernetes Services to their endpoints, with real sockets:\n\
                  exact round robin, retries, numbers for each backend, no netfilter, no cluster needed.",
    after_long_help = "Examples:
  Serve the Services of a folder, on loopback addresses, without root:
    kube-relay run -f manifests/

  Serve one without writing a manifest:
    kube-relay new service web --port 8080 --backend 192.168.1.5:80 | kube-relay run -f -

  See what is served, and how it goes:
    kube-relay status

Exit codes: 0 fine, 1 problems found or failed, 64 wrong command line.",
    arg_required_else_help = true,
    infer_subcommands = false
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve Services until a signal ends it
    #[command(
        long_about = "Serves the Services that the manifests describe until SIGTERM or SIGINT.\n\n\
                      Files are read again when they change, and on SIGHUP; an object that is wrong keeps its \
                      last good version and holds up no other. A Service without an address gets one: the log tells it, and so does \
                      `kube-relay check` beforehand.",
        after_long_help = "Examples:
  A folder of YAML or JSON: Service, EndpointSlice, Endpoints, List.
    kube-relay run -f manifests/

  From standard input, with node ports for the whole network:
    cat web.yaml dns.yaml | kube-relay run -f - --nodeport-addresses primary,localhost

  A Service on one more address of this machine:
    kube-relay run -f web.yaml --expose 0.0.0.0:8080=default/web:http

  With the settings that kubeadm wrote for kube-proxy, but for one:
    kube-relay run --config config.conf --nodeport-addresses all -f manifests/

Signals: SIGTERM drains and ends; a second one, or Ctrl-C on a terminal, ends at once;
         SIGHUP reads the manifests again, and opens the access log anew."
    )]
    Run(Box<RunArgs>),

    /// Show what would be served, and what is wrong with manifests
    #[command(
        long_about = "Reads manifests as `run` does and prints who would listen where, on which backends, \
                      without opening a socket.\n\n\
                      Exits with 1 where something is wrong with them.",
        after_long_help = "Examples:
  Before a commit:
    kube-relay check manifests/

  As the node with that name and zone would serve them, for a program:
    kube-relay check manifests/ --node-name worker-1 --zone eu-1a -o json

  The addresses that were allocated:
    kube-relay check web.yaml | grep allocated

  What of kube-proxy's configuration applies here:
    kube-relay check --config config.conf"
    )]
    Check(Box<CheckArgs>),

    /// Show what a running kube-relay serves, with live numbers
    #[command(
        long_about = "Asks a running kube-relay what it serves. Without a name: a line for each Service.\n\
                      With one: its addresses, backends and counters, in the layout of `kubectl describe service`.",
        after_long_help = "Examples:
  All Services:
    kube-relay status

  The same with traffic, affinity and balance:
    kube-relay status -o wide

  One of them, with the state of each listener and backend:
    kube-relay status default/web

  Bytes sent to each backend, for a program:
    kube-relay status default/web -o json | jq '.services[].ports[].backendTraffic[]'"
    )]
    Status(StatusArgs),

    /// Tell what becomes of a client that connects to an address, and why
    #[command(
        long_about = "Tells whose Service is at an address, where a client's traffic goes from there, which rule chose these \
                      backends, which of them is next, and why the others are not used.\n\n\
                      Asks a running kube-relay; with -f it says what `run` would do with the manifests, and asks nobody.\n\n\
                      Exits with 1 where no Service is served at the address.",
        after_long_help = "Examples:
  A cluster IP:
    kube-relay explain 10.96.0.10:80

  For one client; from outside, a policy or a list may turn it away:
    kube-relay explain 192.0.2.1:30080/TCP --from 203.0.113.9

  Before a commit, as the node with that name and zone:
    kube-relay explain -f manifests/ 10.96.0.10:80 --node-name worker-1 --zone eu-1a"
    )]
    Explain(Box<ExplainArgs>),

    /// Show what manifests would change for a running kube-relay
    #[command(
        long_about = "Compares what a running kube-relay serves with what it would serve from these manifests alone: Services, \
                      listeners and backends that would go (-), come (+) or change.\n\n\
                      Give it the flags or the --config of the running one: addresses follow from them. Services that \
                      the manifests do not name count as removed.\n\n\
                      Exits with 0 where nothing differs, 1 where something does, 2 where that cannot be told, or \
                      not for certain as a manifest has errors.",
        after_long_help = "Examples:
  What a folder would change:
    kube-relay diff manifests/

  With the settings of the running one:
    kube-relay diff --config relay.yaml manifests/

  In a script:
    kube-relay diff manifests/ > changes.txt; test $? -lt 2 || exit 1"
    )]
    Diff(Box<DiffArgs>),

    /// Show which Service does what, as a table that moves
    #[command(
        long_about = "Asks a running kube-relay again and again and shows what each Service does: new connections and flows a \
                      second, failures, bytes, how many are open. Enter shows the backends of one; ? tells all keys.\n\n\
                      With --once, and where standard output is no terminal, the table is printed as text: two questions, \
                      an interval apart, and the rates between them.",
        after_long_help = "Examples:
  All Services, the busiest first:
    kube-relay top

  Those of one namespace that fail most:
    kube-relay top --filter shop/ --sort failed

  Is the split even? The share of each backend:
    kube-relay top default/web --once"
    )]
    Top(TopArgs),

    /// Show what on this machine would break a kube-relay, and what to do about it
    #[command(
        long_about = "Looks at this machine as `run` with the same options would find it, before or while one runs: rights, \
                      limits, ports, addresses, rules of others, the API server. Changes none of it.\n\n\
                      Prints a line for each finding, the worst first, with its remedy below it. Without a source it looks for \
                      the Services of a kube-relay that runs here.\n\n\
                      Exits with 1 where there are errors (will not work) or warnings (may not).",
        after_long_help = "Examples:
  Before the first start:
    kube-relay doctor -f manifests/

  In a pod of the DaemonSet, with its account and its options:
    kubectl -n kube-system exec daemonset/kube-relay -- /kube-relay doctor --config /etc/kube-relay/relay.yaml

  What is fine, too:
    kube-relay doctor --all

  For a program:
    kube-relay doctor -o json | jq '.findings[] | select(.severity == \"error\")'"
    )]
    Doctor(Box<DoctorArgs>),

    /// Print the variables or the DNS names by which Services are found
    #[command(
        long_about = "Prints what a pod of a namespace is told of Services: the variables that a kubelet would set, or names, as \
                      lines of a hosts file or as a zone for a DNS server.\n\n\
                      Services are those of manifests or, without -f, those of a running kube-relay; that one knows no \
                      endpoints of headless Services. What cannot be told goes to standard error. Where a manifest is wrong, \
                      nothing is printed, and the exit code is 1: half a zone would make names vanish.",
        after_long_help = "Examples:
  Run a program outside of the cluster as if in a pod of namespace shop:
    env $(kube-relay env shop) ./program

  Names for this machine alone:
    kube-relay env --format hosts | sudo tee -a /etc/hosts

  All names of a cluster, headless Services too, for a DNS server:
    kubectl get services,endpointslices -A -o yaml > all.yaml
    kube-relay env -f all.yaml --format zone > cluster.local.zone
    kube-relay env -f all.yaml --format zone --reverse 10.96.0.0/16 > 96.10.in-addr.arpa.zone"
    )]
    Env(EnvArgs),

    /// Replace a running kube-relay by another version of it, with nobody refused in between
    #[command(
        long_about = "Has the kube-relay with this --state-dir start the program that is now in the place of its \
                      own, with the same arguments, and hand over to it: listening sockets, open connections, \
                      UDP flows, session affinity, counters. Connections that cannot be moved come to their end \
                      in the old process, which ends with the last of them.\n\n\
                      A supervisor that understands sd_notify (systemd, Type=notify) is told the new main \
                      process; for any other one the first process stays, with nothing of its own. A kube-relay \
                      that reads standard input starts no successor: that cannot be read again.\n\n\
                      Exits with 0 once the new process serves, else with 1 and a line that says why: whatever \
                      fails leaves the old one serving.",
        after_long_help = "Examples:
  After a package has put the new version in place:
    kube-relay upgrade --state-dir /var/lib/kube-relay

  To a version somewhere else:
    kube-relay upgrade --state-dir /var/lib/kube-relay --binary ./kube-relay

  With other arguments: start the new one yourself, it finds the old one by the folder:
    kube-relay run -f manifests/ --state-dir /var/lib/kube-relay --take-over"
    )]
    Upgrade(UpgradeArgs),

    /// Tell whether the kube-relay of this pod serves: for its readiness probe
    #[command(
        long_about = "Asks the kube-relay with this --state-dir whether it serves everything, and whether it is \
                      this pod's own. While one pod of a node takes over from another, they share the node's \
                      ports and the folder: an HTTP probe of either is answered by whichever serves.\n\n\
                      Exits with 0 where it serves here; with 1 where it does not or not yet, runs in another \
                      pod, or does not answer.",
        after_long_help = "Examples:
  In a pod whose containers set KUBE_RELAY_STATE_DIR and KUBE_RELAY_POD_UID:
    readinessProbe:
      exec: {command: [/kube-relay, ready]}

  By hand:
    kube-relay ready --state-dir /var/lib/kube-relay && echo serves"
    )]
    Ready(ReadyArgs),

    /// Remove the routes that a kube-relay has left on this machine
    #[command(
        long_about = "Removes the routes that make addresses of Services local to this machine, by their protocol number, and what \
                      leads answers to clients' addresses to a relay (kube-relay.dev/source-address: preserve).\n\n\
                      They outlive the process, so that clients are refused at once while another one starts. \
                      One that still runs is named, and nothing is removed: it would set them again. Needs CAP_NET_ADMIN.",
        after_long_help = "Examples:
  After the last one on this machine has ended:
    kube-relay cleanup

  What would be removed:
    ip route show table local proto 107; ip -6 route show table local proto 107
    ip rule show table 107107; ip -6 rule show table 107107; nft list table inet kube-relay-107-replies

  Where `run` had another number:
    kube-relay cleanup --route-protocol 207"
    )]
    Cleanup(CleanupArgs),

    /// Print a manifest to start from
    #[command(subcommand, arg_required_else_help = true)]
    New(NewCommand),

    /// Print a script that completes commands and flags in a shell
    #[command(after_long_help = "Examples:
  For bash, to stay:
    kube-relay completions bash > ~/.local/share/bash-completion/completions/kube-relay

  For zsh, to stay (where ~/.zfunc is in fpath):
    kube-relay completions zsh > ~/.zfunc/_kube-relay

  For fish, to stay:
    kube-relay completions fish > ~/.config/fish/completions/kube-relay.fish")]
    Completions(CompletionsArgs),

    /// Print the manual page of the program, or of a command
    #[command(after_long_help = "Examples:
  To read:
    kube-relay man run | man -l -

  To keep:
    kube-relay man > /usr/local/share/man/man1/kube-relay.1")]
    Man(ManArgs),
}

impl Command {
    /// Exit code where the command fails: `diff` tells by 1 that something differs.
    pub fn failure(&self) -> u8 {
        if matches!(self, Self::Diff(_)) { EXIT_UNKNOWN } else { EXIT_PROBLEMS }
    }
}

/// What to print a manifest of.
#[derive(Debug, Subcommand)]
pub enum NewCommand {
    /// A Service and the EndpointSlice with its backends
    #[command(
        long_about = "Prints a Service and the EndpointSlice with its backends, as YAML that `run` serves and kubectl takes.",
        after_long_help = "Examples:
  Serve it at once:
    kube-relay new service web --port 8080 --backend 192.168.1.5:80 | kube-relay run -f -

  Two backends, each client stays with its own, on a node port:
    kube-relay new service web --port 80 --node-port 30080 --sticky \\
      --backend 10.0.0.1:8000 --backend 10.0.0.2:8000

  DNS, over UDP:
    kube-relay new service dns --port 5353 --udp --backend 192.168.1.1:53"
    )]
    Service(NewServiceArgs),
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// File or folder with manifests; `-` reads standard input. Repeat for more
    #[arg(short = 'f', long = "source", value_name = "PATH")]
    #[cfg_attr(not(feature = "kubernetes"), arg(required_unless_present = "config"))]
    #[cfg_attr(
        feature = "kubernetes",
        arg(required_unless_present_any = ["config", "kubeconfig", "master", "kubernetes_service_host"])
    )]
    #[arg(env = "KUBE_RELAY_SOURCE", help_heading = "Source")]
    sources: Vec<PathBuf>,

    #[cfg(feature = "kubernetes")]
    #[command(flatten)]
    api: ApiFlags,

    #[command(flatten)]
    pub(crate) config: ConfigFlag,

    /// Take over from the kube-relay that has the same --state-dir: its sockets, connections and UDP flows. Where none has, start as ever; where one cannot hand over, wait until it can, or ends; where it comes to nothing, exit with 1, and that one serves on
    #[arg(long, help_heading = "Process", value_name = "true|false", env = "KUBE_RELAY_TAKE_OVER")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(default_value_t = false, value_parser = FalseyValueParser::new(), hide_possible_values = true)]
    take_over: bool,

    /// metadata.uid of the pod that this runs in: with --take-over, a container that is started again does not take back what a later pod has taken over
    #[arg(long, help_heading = "Process", value_name = "UID", env = "KUBE_RELAY_POD_UID", value_parser = pod_uid)]
    pod_uid: Option<String>,

    #[command(flatten)]
    flags: RunFlags,
}

/// All flags of `run` but those of its source: `doctor` has them, too.
#[derive(Debug, Args)]
struct RunFlags {
    #[command(flatten)]
    plan: PlanFlags,

    #[command(flatten)]
    vips: VipFlags,

    #[command(flatten)]
    admin: AdminFlags,

    #[command(flatten)]
    upstream: UpstreamFlags,

    #[command(flatten)]
    times: TimeFlags,

    #[command(flatten)]
    access_log: AccessLogFlags,

    #[command(flatten)]
    process: ProcessFlags,
}

/// The flag that names a configuration file, and what the file says.
#[derive(Debug, Args)]
#[command(next_help_heading = "Source")]
pub struct ConfigFlag {
    /// File with the values of flags: a RelayConfiguration, or kubeadm's KubeProxyConfiguration as it is; flags and environment go before it
    #[arg(long, value_name = "FILE", env = "KUBE_RELAY_CONFIG")]
    pub(crate) config: Option<PathBuf>,

    /// Set once the file has been read.
    #[arg(skip)]
    pub file: Option<ConfigFile>,
}

/// An API server as the source.
#[cfg(feature = "kubernetes")]
#[derive(Debug, Args)]
#[command(next_help_heading = "Source")]
struct ApiFlags {
    /// Take Services from the API server that this kubeconfig names [default: in a pod, its cluster's]
    #[arg(long, value_name = "FILE", env = "KUBE_RELAY_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,

    /// Address of the API server, in place of the one that the kubeconfig or the pod's environment names
    #[arg(long, value_name = "URL", env = "KUBE_RELAY_MASTER")]
    master: Option<String>,

    /// Set in each pod.
    #[arg(long, hide = true, env = "KUBERNETES_SERVICE_HOST")]
    kubernetes_service_host: Option<String>,
}

/// Our own servers.
#[derive(Debug, Args)]
#[command(next_help_heading = "Admin servers")]
struct AdminFlags {
    /// Address of /metrics, /readyz and /proxyMode; a wildcard of either family is each address of this machine; `none` for no such server
    #[arg(long, value_name = "IP:PORT", env = "KUBE_RELAY_METRICS_BIND_ADDRESS")]
    #[arg(default_value_t = OrNone(Some(DEFAULT_METRICS_ADDRESS)))]
    metrics_bind_address: OrNone<SocketAddr>,

    /// Address that has /status and its page besides, which `kube-relay status` asks [default: that of the metrics on loopback, else 127.0.0.1 with its port]
    #[arg(long, value_name = "IP:PORT", env = "KUBE_RELAY_STATUS_BIND_ADDRESS")]
    status_bind_address: Option<OrNone<SocketAddr>>,

    /// Address of /healthz and /livez, for load balancers and kubelet probes; `none` for no such server [default: 127.0.0.1:10256; with an API server 0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT", env = "KUBE_RELAY_HEALTHZ_BIND_ADDRESS")]
    healthz_bind_address: Option<OrNone<SocketAddr>>,

    /// Exit where one of these addresses cannot be bound, instead of trying again every 5 s
    #[arg(long, value_name = "true|false", env = "KUBE_RELAY_BIND_ADDRESS_HARD_FAIL")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(default_value_t = false, value_parser = FalseyValueParser::new(), hide_possible_values = true)]
    bind_address_hard_fail: bool,
}

/// How backends are reached.
#[derive(Debug, Args)]
#[command(next_help_heading = "Backends")]
struct UpstreamFlags {
    /// Address of this machine that TCP backends see; repeat for more, used in turn: each has about 28,000 ports towards one backend [default: the kernel chooses]
    #[arg(long, value_name = "IP", env = "KUBE_RELAY_UPSTREAM_SOURCE", value_delimiter = ',')]
    upstream_source: Vec<IpAddr>,

    /// Time that a TCP backend gets to answer a connect before the next is asked; each further silent one gets twice as long
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_CONNECT_TIMEOUT")]
    #[arg(default_value_t = Time(DEFAULT_CONNECT_TIMEOUT))]
    connect_timeout: Time,

    /// Silent TCP backends that are waited for before a client is reset
    #[arg(long, value_name = "N", env = "KUBE_RELAY_CONNECT_TRIES", default_value_t = DEFAULT_CONNECT_TRIES)]
    #[arg(value_parser = clap::value_parser!(u8).range(i64::from(*CONNECT_TRIES.start())..=i64::from(*CONNECT_TRIES.end())))]
    connect_tries: u8,

    /// Failures to connect in a row after which a TCP backend gets nothing for 10 s, and twice as long each time up to 5 min; `none` for never
    #[arg(long, value_name = "N", env = "KUBE_RELAY_EJECT_AFTER", default_value_t = OrNone(Some(DEFAULT_EJECT_AFTER)))]
    eject_after: OrNone<NonZeroU8>,
}

/// How long things may take.
#[derive(Debug, Args)]
#[command(next_help_heading = "Times")]
struct TimeFlags {
    /// Time between "not ready" and no longer accepting after SIGTERM, for load balancers to notice [default: 0s; 5s with an API server]
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_SHUTDOWN_DELAY")]
    shutdown_delay: Option<Time>,

    /// Time that open connections get to end by themselves after SIGTERM; the rest is reset
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_DRAIN_TIMEOUT")]
    #[arg(default_value_t = Time(DEFAULT_DRAIN_TIMEOUT))]
    drain_timeout: Time,

    /// Time that a balancer in front may take for its PROXY header; one that sends it with its client's first bytes needs more
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_ACCEPT_PROXY_TIMEOUT")]
    #[arg(default_value_t = Time(DEFAULT_ACCEPT_PROXY_TIMEOUT))]
    accept_proxy_timeout: Time,

    /// Time that one side of a half-closed TCP connection may keep silent
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_HALF_CLOSE_TIMEOUT")]
    #[arg(default_value_t = Time(DEFAULT_HALF_CLOSE_TIMEOUT))]
    half_close_timeout: Time,

    /// Time that both sides of a TCP connection may keep silent before it is reset; `none` for ever
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_IDLE_TIMEOUT", default_value_t = OrNone(None))]
    idle_timeout: OrNone<Time>,

    /// Age, a tenth more or less, at which a TCP connection is reset in a moment of quiet, so that its client is spread anew; `none` for never
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_MAX_CONNECTION_AGE", default_value_t = OrNone(None))]
    max_connection_age: OrNone<Time>,

    /// Idle time of a UDP flow that no backend has answered
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_UDP_TIMEOUT_UNREPLIED")]
    #[arg(default_value_t = Time(DEFAULT_UDP_TIMEOUT_UNREPLIED))]
    udp_timeout_unreplied: Time,

    /// Idle time of a UDP flow of one exchange
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_UDP_TIMEOUT_ANSWERED")]
    #[arg(default_value_t = Time(DEFAULT_UDP_TIMEOUT_ANSWERED))]
    udp_timeout_answered: Time,

    /// Idle time of a UDP flow whose client sent again after an answer
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_UDP_TIMEOUT_STREAM")]
    #[arg(default_value_t = Time(DEFAULT_UDP_TIMEOUT_STREAM))]
    udp_timeout_stream: Time,
}

/// What is written of each connection and flow.
#[derive(Debug, Args)]
#[command(next_help_heading = "Access log")]
struct AccessLogFlags {
    /// File to write a line to for each connection and UDP flow that has ended; `-` is standard output. Opened anew on SIGHUP [default: none is written]
    #[arg(long, value_name = "PATH", env = "KUBE_RELAY_ACCESS_LOG")]
    access_log: Option<PathBuf>,

    /// Form of these lines
    #[arg(long, value_name = "FORMAT", env = "KUBE_RELAY_ACCESS_LOG_FORMAT", value_enum, default_value_t)]
    access_log_format: AccessFormat,

    /// Write a line for one connection or flow in so many
    #[arg(long, value_name = "N", env = "KUBE_RELAY_ACCESS_LOG_SAMPLE", default_value_t = DEFAULT_ACCESS_LOG_SAMPLE)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    access_log_sample: u32,
}

/// What concerns the process as a whole.
#[derive(Debug, Args)]
#[command(next_help_heading = "Process")]
struct ProcessFlags {
    /// Folder, made before, of this kube-relay alone: another one with it refuses to start, or takes over (--take-over, `kube-relay upgrade`). Keeps the last state, which is served where the API server is away at the start
    #[arg(long, value_name = "FOLDER", env = "KUBE_RELAY_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// What to log: a level (error, warn, info, debug, trace), or target=level pairs as in RUST_LOG
    #[arg(long, value_name = "LEVEL", env = "KUBE_RELAY_LOG_LEVEL", default_value = DEFAULT_LOG_LEVEL)]
    log_level: LogLevel,

    /// Form of the log on standard error
    #[arg(long, value_name = "FORMAT", env = "KUBE_RELAY_LOG_FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,

    /// TCP connections at once; more wait until one has gone. `none`: as many as there are descriptors and memory for
    #[arg(long, value_name = "N", env = "KUBE_RELAY_MAX_CONNECTIONS", default_value_t = OrNone(None))]
    max_connections: OrNone<NonZeroU32>,

    /// Threads that relay [default: the processors that this process may use: CPU affinity and whole CPUs of its cgroup's quota count]
    #[arg(long, value_name = "N", env = "KUBE_RELAY_WORKERS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,

    /// Threads that share each UDP port; for one hot Service rather its annotation kube-relay.dev/udp-shards
    #[arg(long, value_name = "N", env = "KUBE_RELAY_UDP_SHARDS", default_value_t = DEFAULT_UDP_SHARDS)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    udp_shards: u16,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Files or folders with manifests; `-` reads standard input
    #[arg(value_name = "PATH", required_unless_present = "config")]
    sources: Vec<PathBuf>,

    #[command(flatten)]
    pub(crate) config: ConfigFlag,

    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: CheckOutput,

    #[command(flatten)]
    plan: PlanFlags,
}

/// The flags that shape a plan: the same for `run` and `check`.
#[derive(Debug, Args)]
struct PlanFlags {
    #[command(flatten)]
    addresses: AddressFlags,

    #[command(flatten)]
    node: NodeFlags,
}

/// Where Services are reached.
#[derive(Debug, Args)]
#[command(next_help_heading = "Addresses")]
struct AddressFlags {
    /// Where node ports are served: primary (this node's main addresses), localhost, all, and CIDRs of interface addresses [default: localhost] with an API server: primary,localhost
    #[arg(long, value_name = "LIST", env = "KUBE_RELAY_NODEPORT_ADDRESSES", value_delimiter = ',')]
    nodeport_addresses: Vec<NodePortSelector>,

    /// Serve a port of a Service on one more address: 0.0.0.0:8080=default/web:http. Repeat for more
    #[arg(long, value_name = "LISTEN=NAMESPACE/SERVICE:PORT", value_parser = expose)]
    expose: Vec<Expose>,

    /// Serve spec.externalIPs inside these networks; without it all are refused (CVE-2020-8554)
    #[arg(long, value_name = "CIDRS", env = "KUBE_RELAY_ALLOWED_EXTERNAL_CIDRS", value_delimiter = ',')]
    allowed_external_cidrs: Vec<IpNet>,

    /// Use endpoints inside these networks alone, those of pods and of databases that you know: whoever may write an EndpointSlice could have others reached from this node's address (CVE-2021-25740) [default: any]
    #[arg(long, value_name = "CIDRS", env = "KUBE_RELAY_ENDPOINT_CIDRS", value_delimiter = ',')]
    endpoint_cidrs: Vec<IpNet>,

    /// Use endpoints alone whose targetRef is a pod: those that controllers make, and none that somebody wrote by hand
    #[arg(long, value_name = "true|false", env = "KUBE_RELAY_REQUIRE_TARGET_REF")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(default_value_t = false, value_parser = FalseyValueParser::new(), hide_possible_values = true)]
    require_target_ref: bool,

    /// Who may reach Services from outside: networks and addresses. This node and its pods always may. A Service's annotation kube-relay.dev/allow-from narrows it [default: everybody]
    #[arg(long, value_name = "CIDRS", env = "KUBE_RELAY_ALLOW_FROM", value_delimiter = ',', value_parser = network)]
    allow_from: Vec<IpNet>,

    /// Balancers that are believed when a PROXY header of theirs says who a client is: networks and addresses. Asked where a Service has the annotation kube-relay.dev/accept-proxy [default: nobody]
    #[arg(long, value_name = "CIDRS", env = "KUBE_RELAY_ACCEPT_PROXY_FROM")]
    #[arg(value_delimiter = ',', value_parser = network)]
    accept_proxy_from: Vec<IpNet>,

    /// Where Services without a clusterIP get theirs; `none` leaves them without
    #[arg(long, value_name = "CIDR", env = "KUBE_RELAY_SERVICE_CLUSTER_IP_RANGE")]
    #[arg(default_value_t = OrNone(Some(IpNet::V4(DEFAULT_SERVICE_RANGE))))]
    service_cluster_ip_range: OrNone<IpNet>,

    /// Where NodePort and LoadBalancer Services without a nodePort get theirs
    #[arg(long, value_name = "FROM-TO", env = "KUBE_RELAY_SERVICE_NODE_PORT_RANGE")]
    #[arg(default_value_t = PortRange(DEFAULT_NODE_PORT_RANGE))]
    service_node_port_range: PortRange,
}

/// How addresses of Services are made local.
#[derive(Debug, Args)]
#[command(next_help_heading = "Addresses")]
struct VipFlags {
    /// Who makes addresses of Services local to this machine where they are not
    #[arg(long, value_name = "WHO", env = "KUBE_RELAY_VIP_ROUTES", value_enum, default_value_t)]
    vip_routes: VipRoutes,

    /// How long such a route stays once nobody needs it: what a closed connection has left is still sent
    #[arg(long, value_name = "TIME", env = "KUBE_RELAY_VIP_ROUTES_LINGER")]
    #[arg(default_value_t = Time(DEFAULT_VIP_ROUTES_LINGER))]
    vip_routes_linger: Time,

    /// What becomes of these routes when the process ends
    #[arg(long, value_name = "keep|remove", env = "KUBE_RELAY_VIP_ROUTES_AT_EXIT", value_enum, default_value_t)]
    vip_routes_at_exit: AtExit,

    /// Set arp_ignore=1 and arp_announce=2 on interfaces whose neighbours may ask for a load-balancer or external IP, so that it can be made local; without this flag no kernel setting is ever changed
    #[arg(long, value_name = "true|false", env = "KUBE_RELAY_TUNE_SYSCTLS")]
    #[arg(action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(default_value_t = false, value_parser = FalseyValueParser::new(), hide_possible_values = true)]
    tune_sysctls: bool,

    /// What keeps sockets that listen on all addresses of this machine from answering at addresses of Services
    #[arg(long, value_name = "HOW", env = "KUBE_RELAY_VIP_GUARD", value_enum, default_value_t)]
    vip_guard: VipGuard,

    #[command(flatten)]
    protocol: RouteProtocolFlag,

    /// What marks answers to clients whose addresses a Service preserves, on their way here: a value, and the bits of the mark that count. For where another program has this value in these bits
    #[arg(long, value_name = "VALUE/MASK", env = "KUBE_RELAY_REPLY_MARK", default_value_t)]
    reply_mark: ReplyMark,
}

/// Who makes addresses of Services local.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum VipRoutes {
    /// kube-relay, by a route for each; needs CAP_NET_ADMIN
    #[default]
    Auto,
    /// You, say by one route for all: `ip route add local 10.96.0.0/12 dev lo`
    None,
}

/// By which number routes are known as ours.
#[derive(Debug, Args)]
#[command(next_help_heading = "Addresses")]
struct RouteProtocolFlag {
    /// Number (`proto`) of these routes, to know them from others
    #[arg(long, value_name = "5-255", env = "KUBE_RELAY_ROUTE_PROTOCOL", default_value_t = DEFAULT_ROUTE_PROTOCOL)]
    #[arg(value_parser = clap::value_parser!(u8).range(5..))]
    route_protocol: u8,
}

/// Who we are in the cluster.
#[derive(Debug, Args)]
#[command(next_help_heading = "Node")]
struct NodeFlags {
    /// Networks of the cluster's pods: traffic from there is internal to externalTrafficPolicy Local [default: with an API server, the Node's]
    #[arg(long, value_name = "CIDRS", env = "KUBE_RELAY_CLUSTER_CIDR", value_delimiter = ',')]
    cluster_cidr: Vec<IpNet>,

    /// Take the Services with the label service.kubernetes.io/service-proxy-name of this value, and no others
    #[arg(long, value_name = "NAME", env = "KUBE_RELAY_PROXY_NAME")]
    proxy_name: Option<String>,

    /// Name of this node: endpoints with it are local to traffic policy Local [default: with an API server, this machine's name]
    #[arg(long, value_name = "NAME", env = "KUBE_RELAY_NODE_NAME", visible_alias = "hostname-override")]
    node_name: Option<String>,

    /// Zone of this node, for topology hints [default: with an API server, the Node's]
    #[arg(long, value_name = "ZONE", env = "KUBE_RELAY_ZONE")]
    zone: Option<String>,

    /// Address that this node goes by, of either family; repeat for both [default: source of the default route]
    #[arg(long, value_name = "IP", env = "KUBE_RELAY_NODE_ADDRESS", value_delimiter = ',')]
    node_address: Vec<IpAddr>,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// One Service: NAMESPACE/NAME, or NAME in namespace default
    #[arg(value_name = "NAMESPACE/NAME", value_parser = object_name)]
    pub service: Option<ObjectName>,

    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: StatusOutput,

    /// Whom to ask.
    #[command(flatten)]
    pub server: ServerFlag,
}

/// Which kube-relay to ask.
#[derive(Debug, Args)]
pub struct ServerFlag {
    /// Whom to ask: the --status-bind-address of a running kube-relay
    #[arg(long = "server", value_name = "IP:PORT", default_value_t = DEFAULT_METRICS_ADDRESS, env = "KUBE_RELAY_SERVER")]
    #[arg(id = "server", value_parser = socket_address)]
    pub address: SocketAddr,
}

/// Arguments of `explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Where the client connects to; without a protocol, whatever is served there
    #[arg(value_name = "IP:PORT[/PROTOCOL]", value_parser = destination)]
    destination: Destination,

    /// Address of the client [default: whoever it is]
    #[arg(long, value_name = "IP")]
    from: Option<IpAddr>,

    /// File or folder with manifests to ask instead of a running kube-relay; `-` reads standard input. Repeat for more
    #[arg(short = 'f', long = "source", value_name = "PATH")]
    manifests: Vec<PathBuf>,

    /// Whom to ask.
    #[command(flatten)]
    pub server: ServerFlag,

    #[command(flatten)]
    pub(crate) config: ConfigFlag,

    #[command(flatten)]
    plan: PlanFlags,
}

/// Arguments of `diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// Files or folders with manifests; `-` reads standard input
    #[arg(value_name = "PATH", required = true)]
    manifests: Vec<PathBuf>,

    /// Whom to ask.
    #[command(flatten)]
    pub server: ServerFlag,

    #[command(flatten)]
    pub(crate) config: ConfigFlag,

    #[command(flatten)]
    plan: PlanFlags,
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Arguments of `man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The command, like `status` or `new service` [default: the program]
    #[arg(value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Arguments of `env`.
#[derive(Debug, Args)]
pub struct EnvArgs {
    /// Namespace of the pod [default: default]
    #[arg(value_parser = namespace)]
    namespace: Option<String>,

    /// File or folder with manifests; `-` reads standard input. Repeat for more [default: ask a running kube-relay]
    #[arg(short = 'f', long = "source", value_name = "PATH")]
    sources: Vec<PathBuf>,

    /// What to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: EnvFormat,

    /// Domain of the cluster, for names
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local", value_parser = domain)]
    domain: String,

    /// With --format zone: the zone of this network's addresses (PTR), instead of the domain's
    #[arg(long, value_name = "CIDR", value_parser = reverse_network)]
    reverse: Option<ReverseNetwork>,

    /// With -f: where Services without a clusterIP get theirs, as `run` has it; `none` leaves them without
    #[arg(long, value_name = "CIDR", env = "KUBE_RELAY_SERVICE_CLUSTER_IP_RANGE")]
    #[arg(default_value_t = OrNone(Some(IpNet::V4(DEFAULT_SERVICE_RANGE))))]
    service_cluster_ip_range: OrNone<IpNet>,

    /// Whom to ask, without -f.
    #[command(flatten)]
    server: ServerFlag,
}

/// What `env` prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EnvFormat {
    /// Variables, NAME=value
    #[default]
    Env,
    /// Lines of a hosts file
    Hosts,
    /// A zone for a DNS server (RFC 1035)
    Zone,
}

impl EnvArgs {
    /// What to print, and of what. Refuses what contradicts itself.
    pub fn checked(self) -> Result<DiscoveryConfig, ConfigError> {
        let source = match self.sources.is_empty() {
            true => DiscoverySource::Relay(self.server.address),
            false => DiscoverySource::Manifests {
                inputs: checked_sources(self.sources)?,
                ranges: Ranges {
                    cluster_ips: ClusterIpRange(self.service_cluster_ip_range.0.map(|net| net.trunc())),
                    ..Ranges::default()
                },
            },
        };
        let form = form(self.format, self.namespace, self.domain, self.reverse)?;
        Ok(DiscoveryConfig { source, form })
    }
}

/// A zone knows all namespaces, and it alone has a reverse.
fn form(
    format: EnvFormat,
    namespace: Option<String>,
    domain: String,
    reverse: Option<ReverseNetwork>,
) -> Result<Form, ConfigError> {
    let wrong = |flag, value, right: &str| Err(ConfigError { flag, value, right: right.into() });
    match (format, namespace, reverse) {
        (EnvFormat::Env | EnvFormat::Hosts, _, Some(network)) => {
            wrong("--reverse", network.to_string(), "only a zone has a reverse: write --format zone, too")
        }
        (EnvFormat::Zone, Some(namespace), _) => {
            wrong("NAMESPACE", namespace, "a zone holds the names of all namespaces: leave it out")
        }
        (EnvFormat::Zone, None, None) => Ok(Form::Zone { domain }),
        (EnvFormat::Zone, None, Some(network)) => Ok(Form::ReverseZone { domain, network }),
        (EnvFormat::Env, namespace, None) => Ok(Form::Environment { namespace: or_default(namespace) }),
        (EnvFormat::Hosts, namespace, None) => Ok(Form::Hosts { namespace: or_default(namespace), domain }),
    }
}

fn or_default(namespace: Option<String>) -> String {
    namespace.unwrap_or_else(|| "default".to_owned())
}

/// Arguments of `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// One Service with its backends: NAMESPACE/NAME, or NAME in namespace default
    #[arg(value_name = "NAMESPACE/NAME", value_parser = object_name)]
    service: Option<ObjectName>,

    /// Print the table as text, once
    #[arg(long)]
    pub once: bool,

    /// Time from one question to the next, 200ms at least; longer by itself where answers take long
    #[arg(long, value_name = "TIME", default_value_t = Time(DEFAULT_INTERVAL), value_parser = interval)]
    interval: Time,

    /// What Services are sorted by
    #[arg(long, value_enum, value_name = "ORDER", default_value_t)]
    sort: Sort,

    /// Only Services that have all of these words in their name, type, state or addresses
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true)]
    filter: String,

    /// Whom to ask.
    #[command(flatten)]
    server: ServerFlag,
}

impl TopArgs {
    /// What to ask, and how to show it at first.
    pub fn options(&self) -> TopOptions {
        let Self { service, interval, sort, filter, server, .. } = self;
        let (service, filter) = (service.clone(), filter.clone());
        TopOptions { server: server.address, interval: interval.0, sort: *sort, filter, service }
    }
}

/// The parser of `top --interval`.
fn interval(text: &str) -> Result<Time, String> {
    match text.parse::<Time>() {
        Ok(time) if time.0 >= SHORTEST_INTERVAL => Ok(time),
        Ok(_) => Err(format!("too short: {} is the shortest", Time(SHORTEST_INTERVAL))),
        Err(error) => Err(error.to_string()),
    }
}

/// Arguments of `doctor`: those of `run`, none of which has to be there.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// File or folder with manifests; `-` reads standard input. Repeat for more
    #[arg(short = 'f', long = "source", value_name = "PATH", env = "KUBE_RELAY_SOURCE", help_heading = "Source")]
    sources: Vec<PathBuf>,

    #[cfg(feature = "kubernetes")]
    #[command(flatten)]
    api: ApiFlags,

    #[command(flatten)]
    pub(crate) config: ConfigFlag,

    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: DoctorOutput,

    /// Tell what is fine, too
    #[arg(short = 'v', long)]
    all: bool,

    #[command(flatten)]
    flags: RunFlags,
}

/// Arguments of `cleanup`.
#[derive(Debug, Args)]
pub struct CleanupArgs {
    #[command(flatten)]
    protocol: RouteProtocolFlag,
}

impl CleanupArgs {
    /// The number of the routes to remove (5..=255).
    pub fn route_protocol(&self) -> u8 {
        self.protocol.route_protocol
    }
}

/// Arguments of `upgrade`.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// The --state-dir of the running kube-relay
    #[arg(long, value_name = "FOLDER", env = "KUBE_RELAY_STATE_DIR")]
    pub state_dir: PathBuf,

    /// Program to start; a mere name is looked for where the running one's PATH says [default: what is now in the place of its own]
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,

    /// Time that the new process gets to read its sources and take over; after that it is killed, and the running one serves on
    #[arg(long, value_name = "TIME", default_value_t = Time(DEFAULT_UPGRADE_TIMEOUT))]
    timeout: Time,
}

impl UpgradeArgs {
    /// How long the new program may take.
    pub fn timeout(&self) -> Result<Duration, ConfigError> {
        positive("--timeout", self.timeout)
    }
}

/// Arguments of `ready`.
#[derive(Debug, Args)]
pub struct ReadyArgs {
    /// The --state-dir of the kube-relay to ask
    #[arg(long, value_name = "FOLDER", env = "KUBE_RELAY_STATE_DIR")]
    pub state_dir: PathBuf,

    /// metadata.uid of the pod that is asked about: one in another pod does not count [default: one that this container cannot see does not]
    #[arg(long, value_name = "UID", env = "KUBE_RELAY_POD_UID", value_parser = pod_uid)]
    pod_uid: Option<String>,
}

impl ReadyArgs {
    /// The pod that is asked about; `None`: whichever has the folder.
    pub fn pod_uid(&self) -> Option<&str> {
        self.pod_uid.as_deref().filter(|uid| !uid.is_empty())
    }
}

/// Arguments of `new service`.
#[derive(Debug, Args)]
pub struct NewServiceArgs {
    /// Name of the Service
    #[arg(value_parser = label)]
    pub name: String,

    /// Namespace of the Service
    #[arg(short, long, default_value = "default", value_parser = label)]
    pub namespace: String,

    /// Port that clients use
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,

    /// Port that the Service names for its pods [default: the backends', where they have one in common]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub target_port: Option<u16>,

    /// Port on each node: a number, or `auto` to get one; makes the Service a NodePort
    #[arg(long, value_name = "auto|N")]
    pub node_port: Option<NewNodePort>,

    /// spec.type [default: NodePort with --node-port, else ClusterIP]
    #[arg(long = "type", value_name = "TYPE", value_enum, ignore_case = true)]
    pub kind: Option<NewServiceKind>,

    /// UDP instead of TCP
    #[arg(long)]
    pub udp: bool,

    /// Keep each client with one backend (sessionAffinity ClientIP)
    #[arg(long)]
    pub sticky: bool,

    /// Where to relay to; repeat for more, or give several
    #[arg(long = "backend", value_name = "IP:PORT", required = true, num_args = 1.., value_parser = socket_address)]
    pub backends: Vec<SocketAddr>,
}

/// `spec.type` of a Service that can be relayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum NewServiceKind {
    /// Reached at its cluster IP
    #[value(name = "ClusterIP")]
    ClusterIp,
    /// Reached at a port of each node, too
    NodePort,
    /// Reached at a balancer's address, too
    LoadBalancer,
}

impl NewServiceArgs {
    /// The type of the Service to print.
    pub fn service_kind(&self) -> ServiceKind {
        match self.kind {
            Some(NewServiceKind::ClusterIp) => ServiceKind::ClusterIp,
            Some(NewServiceKind::NodePort) => ServiceKind::NodePort,
            Some(NewServiceKind::LoadBalancer) => ServiceKind::LoadBalancer,
            None if self.node_port.is_some() => ServiceKind::NodePort,
            None => ServiceKind::ClusterIp,
        }
    }

    /// What to write. Refuses what contradicts itself.
    pub fn checked(self) -> Result<NewService, ConfigError> {
        if self.kind == Some(NewServiceKind::ClusterIp)
            && let Some(node_port) = self.node_port
        {
            return Err(ConfigError {
                flag: "--node-port",
                value: node_port.to_string(),
                right: "a Service of type ClusterIP has none: leave out --type, or write --type NodePort".into(),
            });
        }
        Ok(NewService {
            kind: self.service_kind(),
            name: ObjectName::new(self.namespace, self.name),
            port: self.port,
            target_port: self.target_port,
            node_port: self.node_port,
            udp: self.udp,
            sticky: self.sticky,
            backends: self.backends,
        })
    }
}

/// Form of the answer of `check`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CheckOutput {
    /// For people
    #[default]
    Text,
    /// For programs: the plan
    Json,
}

/// Form of the answer of `doctor`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DoctorOutput {
    /// For people
    #[default]
    Text,
    /// For programs: all findings
    Json,
}

/// Form of the answer of `status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum StatusOutput {
    /// For people
    #[default]
    Table,
    /// The same, with more columns
    Wide,
    /// For programs: what /status answers
    Json,
    /// The same as YAML
    Yaml,
}

/// A flag whose value is fine by itself, but not beside the others.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid value '{value}' for '{flag}': {right}")]
pub struct ConfigError {
    /// `--drain-timeout`.
    pub flag: &'static str,
    /// What was given.
    pub value: String,
    /// What would be right.
    pub right: String,
}

impl Command {
    /// The flags that a file must not set beside this line, as it would name a second source: files and an API server
    /// are one choice.
    pub(crate) fn overridden_sources(&self) -> &'static [&'static str] {
        match self {
            Self::Run(args) if !args.sources.is_empty() => &["kubeconfig", "master"],
            #[cfg(feature = "kubernetes")]
            Self::Run(args) if args.api.options() != ApiOptions::default() => &["sources"],
            Self::Doctor(args) if !args.sources.is_empty() => &["kubeconfig", "master"],
            #[cfg(feature = "kubernetes")]
            Self::Doctor(args) if args.api.options() != ApiOptions::default() => &["sources"],
            _ => &[],
        }
    }
}

impl RunArgs {
    /// What the file of `--config` says, if one was named.
    pub fn config_file(&self) -> Option<&ConfigFile> {
        self.config.file.as_ref()
    }
}

impl DoctorArgs {
    /// What to look for. Where no source is named, that is no mistake here: manifests, and none of them.
    pub fn checked(self) -> Result<DoctorConfig, ConfigError> {
        #[cfg(feature = "kubernetes")]
        let source = match self.sources.is_empty() && !self.api.is_named() {
            true => SourceConfig::Manifests(Vec::new()),
            false => self.api.checked(self.sources)?,
        };
        #[cfg(not(feature = "kubernetes"))]
        let source = SourceConfig::Manifests(checked_sources(self.sources)?);
        Ok(DoctorConfig { run: self.flags.checked(source)?, all: self.all })
    }
}

impl ExplainArgs {
    /// What is asked.
    pub fn question(&self) -> Question {
        Question { destination: self.destination, from: self.from }
    }

    /// The manifests to ask; `None`: a running kube-relay.
    pub fn manifests(self) -> Result<Option<CheckConfig>, ConfigError> {
        match self.manifests.is_empty() {
            true => Ok(None),
            false => check_config(self.manifests, self.plan).map(Some),
        }
    }
}

impl DiffArgs {
    /// The manifests to compare with.
    pub fn manifests(self) -> Result<CheckConfig, ConfigError> {
        check_config(self.manifests, self.plan)
    }
}

impl CheckArgs {
    /// What the file of `--config` says, if one was named.
    pub fn config_file(&self) -> Option<&ConfigFile> {
        self.config.file.as_ref()
    }
}

impl TryFrom<RunArgs> for RunConfig {
    type Error = ConfigError;

    fn try_from(args: RunArgs) -> Result<Self, ConfigError> {
        #[cfg(feature = "kubernetes")]
        let source = args.api.checked(args.sources)?;
        #[cfg(not(feature = "kubernetes"))]
        let source = SourceConfig::Manifests(manifests(args.sources)?);
        let config = args.flags.checked(source)?;
        if args.take_over && config.state_dir.is_none() {
            return Err(ConfigError {
                flag: "--take-over",
                value: "true".into(),
                right: "give it the --state-dir of the kube-relay that runs: there they meet".into(),
            });
        }
        Ok(RunConfig { take_over: args.take_over, pod_uid: non_empty(args.pod_uid), ..config })
    }
}

impl RunFlags {
    /// With a source, all that `run` works with.
    fn checked(self, source: SourceConfig) -> Result<RunConfig, ConfigError> {
        let Self { plan, vips, admin, upstream, times, access_log, process } = self;
        let cluster = source.is_cluster();
        let AdminAddresses { metrics, status, health } = admin.checked(cluster)?;
        let delay = if cluster { CLUSTER_SHUTDOWN_DELAY } else { DEFAULT_SHUTDOWN_DELAY };
        Ok(RunConfig {
            source,
            plan: plan.checked(cluster)?,
            metrics_address: metrics,
            status_address: status,
            healthz_address: health,
            bind_address_hard_fail: admin.bind_address_hard_fail,
            vips: vips.options(),
            vip_guard: vips.vip_guard,
            reply_path: vips.reply_path(),
            upstream: upstream.checked()?,
            limits: times.limits()?,
            header_timeout: lasting("--accept-proxy-timeout", times.accept_proxy_timeout)?,
            max_connections: process.max_connections.0,
            shutdown: ShutdownTimes {
                delay: times.shutdown_delay.map_or(delay, |time| time.0),
                drain_timeout: times.drain_timeout.0,
            },
            udp_timeouts: UdpTimeouts {
                unreplied: positive("--udp-timeout-unreplied", times.udp_timeout_unreplied)?,
                answered: positive("--udp-timeout-answered", times.udp_timeout_answered)?,
                stream: positive("--udp-timeout-stream", times.udp_timeout_stream)?,
            },
            state_dir: non_empty_path(process.state_dir),
            take_over: false,
            pod_uid: None,
            logs: LogOptions { level: process.log_level, format: process.log_format },
            access_log: access_log.options(),
            udp_shards: NonZeroU16::new(process.udp_shards).unwrap_or(NonZeroU16::MIN),
            workers: process.workers.map(usize::from),
        })
    }
}

impl TryFrom<CheckArgs> for CheckConfig {
    type Error = ConfigError;

    fn try_from(args: CheckArgs) -> Result<Self, ConfigError> {
        check_config(args.sources, args.plan)
    }
}

fn check_config(sources: Vec<PathBuf>, plan: PlanFlags) -> Result<CheckConfig, ConfigError> {
    Ok(CheckConfig { sources: checked_sources(sources)?, plan: plan.checked(false)? })
}

#[cfg(feature = "kubernetes")]
impl ApiFlags {
    /// Manifests come before the cluster that a pod happens to run in, but not before one that somebody names.
    fn checked(self, sources: Vec<PathBuf>) -> Result<SourceConfig, ConfigError> {
        let (server, service_host) = (self.options(), non_empty(self.kubernetes_service_host));
        let named = server != ApiOptions::default();
        match sources.first() {
            None if named || service_host.is_some() => {
                Ok(SourceConfig::Api { server, service_host: service_host.and_then(|host| host.parse().ok()) })
            }
            Some(source) if named => Err(ConfigError {
                flag: "--source",
                value: source.display().to_string(),
                right: "--kubeconfig or --master is given, too: Services come from files or from an API server".into(),
            }),
            _ => Ok(SourceConfig::Manifests(manifests(sources)?)),
        }
    }

    /// True where flags or a pod's environment say that there is a server.
    fn is_named(&self) -> bool {
        self.options() != ApiOptions::default() || non_empty(self.kubernetes_service_host.clone()).is_some()
    }

    fn options(&self) -> ApiOptions {
        ApiOptions { kubeconfig: non_empty_path(self.kubeconfig.clone()), master: non_empty(self.master.clone()) }
    }
}

impl UpstreamFlags {
    fn checked(self) -> Result<UpstreamConfig, ConfigError> {
        let first = self.connect_timeout.0;
        if !CONNECT_TIMEOUTS.contains(&first) {
            return Err(ConfigError {
                flag: "--connect-timeout",
                value: self.connect_timeout.to_string(),
                right: "write a time from 10ms to 1m".into(),
            });
        }
        let count = NonZeroU8::new(self.connect_tries).unwrap_or(NonZeroU8::MIN);
        Ok(UpstreamConfig {
            sources: self.upstream_source,
            steps: Steps { first, count },
            eject_after: self.eject_after.0,
        })
    }
}

impl TimeFlags {
    fn limits(&self) -> Result<LimitOptions, ConfigError> {
        Ok(LimitOptions {
            half_close_timeout: lasting("--half-close-timeout", self.half_close_timeout)?,
            idle_timeout: self.idle_timeout.0.map(|time| lasting("--idle-timeout", time)).transpose()?,
            max_connection_age: self
                .max_connection_age
                .0
                .map(|time| lasting("--max-connection-age", time))
                .transpose()?,
        })
    }
}

/// Less than a second would end connections that are in use.
fn lasting(flag: &'static str, time: Time) -> Result<Duration, ConfigError> {
    if !LASTING.contains(&time.0) {
        return Err(ConfigError { flag, value: time.to_string(), right: "write a time from 1s to 8760h".into() });
    }
    Ok(time.0)
}

/// Where our own servers are to be, wildcards not yet written out.
struct AdminAddresses {
    metrics: Option<SocketAddr>,
    status: Option<SocketAddr>,
    health: Option<SocketAddr>,
}

impl AdminFlags {
    /// `cluster`: load balancers ask from outside.
    fn checked(&self, cluster: bool) -> Result<AdminAddresses, ConfigError> {
        let metrics = self.metrics_bind_address.0;
        let status = self.status_bind_address.map_or_else(|| metrics.map(on_loopback), |address| address.0);
        let healthz_default = if cluster { CLUSTER_HEALTHZ_ADDRESS } else { DEFAULT_HEALTHZ_ADDRESS };
        let health = self.healthz_bind_address.unwrap_or(OrNone(Some(healthz_default))).0;
        for (flag, other) in [("--metrics-bind-address", metrics), ("--status-bind-address", status)] {
            if let (Some(health), Some(other)) = (health, other)
                && clash(health, other)
            {
                return Err(ConfigError {
                    flag: "--healthz-bind-address",
                    value: health.to_string(),
                    right: format!("{flag} has the same: give one another port, like {DEFAULT_HEALTHZ_ADDRESS}"),
                });
            }
        }
        Ok(AdminAddresses { metrics, status, health })
    }
}

/// True where two servers would want one address. A wildcard is all of them.
fn clash(one: SocketAddr, other: SocketAddr) -> bool {
    let same_ip = one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && same_ip
}

/// The address, if other machines cannot reach it; else the same port where they cannot.
fn on_loopback(address: SocketAddr) -> SocketAddr {
    match address.ip().is_loopback() {
        true => address,
        false => SocketAddr::new(DEFAULT_METRICS_ADDRESS.ip(), address.port()),
    }
}

impl AccessLogFlags {
    /// `None` where nothing is to be written. An empty path is none, as with other flags.
    fn options(self) -> Option<AccessLogOptions> {
        let path = self.access_log.filter(|path| !path.as_os_str().is_empty())?;
        let sample = NonZeroU32::new(self.access_log_sample).unwrap_or(NonZeroU32::MIN);
        Some(AccessLogOptions { output: path.into(), format: self.access_log_format, sample })
    }
}

impl VipFlags {
    /// Whoever makes addresses of Services local.
    fn reply_path(&self) -> ReplyPathOptions {
        let removed_at_exit = self.vip_routes_at_exit == AtExit::Remove;
        ReplyPathOptions { protocol: self.protocol.route_protocol, mark: self.reply_mark, removed_at_exit }
    }

    fn options(&self) -> Option<VipOptions> {
        match self.vip_routes {
            VipRoutes::Auto => Some(VipOptions {
                protocol: self.protocol.route_protocol,
                linger: self.vip_routes_linger.0,
                at_exit: self.vip_routes_at_exit,
                tune_sysctls: self.tune_sysctls,
            }),
            VipRoutes::None => None,
        }
    }
}

impl PlanFlags {
    /// `cluster`: the objects are those of an API server.
    fn checked(self, cluster: bool) -> Result<PlanConfig, ConfigError> {
        let Self { addresses, node } = self;
        let node_port_addresses = match addresses.nodeport_addresses {
            none if none.is_empty() && cluster => CLUSTER_NODE_PORT_ADDRESSES.to_vec(),
            none if none.is_empty() => vec![DEFAULT_NODE_PORT_ADDRESSES],
            some => some,
        };
        Ok(PlanConfig {
            node_port_addresses,
            expose: addresses.expose,
            allowed_external_cidrs: addresses.allowed_external_cidrs,
            endpoint_cidrs: addresses.endpoint_cidrs,
            require_target_ref: addresses.require_target_ref,
            allow_from: addresses.allow_from,
            accept_proxy_from: addresses.accept_proxy_from,
            service_cluster_ip_range: addresses.service_cluster_ip_range.0.map(|net| net.trunc()),
            service_node_port_range: addresses.service_node_port_range.0,
            cluster_cidrs: node.cluster_cidr,
            proxy_name: non_empty(node.proxy_name),
            node: Node { name: non_empty(node.node_name).map(Into::into), zone: non_empty(node.zone).map(Into::into) },
            node_addresses: node.node_address.into_iter().map(specified).collect::<Result<_, _>>()?,
            allow_loopback_endpoints: !cluster,
        })
    }
}

/// An empty environment variable (`value: ""` in a pod) means that there is none.
fn non_empty(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// One line of a file is for each.
fn pod_uid(text: &str) -> Result<String, String> {
    match text.len() <= 253 && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(text.to_owned()),
        false => Err("write the pod's metadata.uid".into()),
    }
}

fn non_empty_path(path: Option<PathBuf>) -> Option<PathBuf> {
    path.filter(|path| !path.as_os_str().is_empty())
}

fn specified(ip: IpAddr) -> Result<IpAddr, ConfigError> {
    if !ip.is_unspecified() && !ip.is_multicast() {
        return Ok(ip);
    }
    Err(ConfigError { flag: "--node-address", value: ip.to_string(), right: "write an address of this node".into() })
}

/// What `run` reads: something at least.
fn manifests(sources: Vec<PathBuf>) -> Result<Vec<Input>, ConfigError> {
    if sources.is_empty() {
        return Err(ConfigError {
            flag: "--source",
            value: String::new(),
            right: "neither the command line nor the file of --config names one".into(),
        });
    }
    checked_sources(sources)
}

/// Standard input can be read once.
fn checked_sources(sources: Vec<PathBuf>) -> Result<Vec<Input>, ConfigError> {
    if sources.iter().filter(|path| path.as_os_str() == "-").count() > 1 {
        return Err(ConfigError {
            flag: "--source",
            value: "-".into(),
            right: "standard input can be given once".into(),
        });
    }
    Ok(sources.into_iter().map(|path| Input::from(path.into_os_string())).collect())
}

/// An idle time of 0 would end each flow with its first datagram.
fn positive(flag: &'static str, time: Time) -> Result<Duration, ConfigError> {
    if time.0.is_zero() {
        return Err(ConfigError { flag, value: time.to_string(), right: "write a time above 0, like 10s".into() });
    }
    Ok(time.0)
}

fn object_name(text: &str) -> Result<ObjectName, Infallible> {
    Ok(ObjectName::parse(text))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;
    use crate::access_log::AccessOutput;
    use crate::name::Protocol;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    fn run(line: &str) -> Result<RunConfig, ConfigError> {
        match parse(line).expect("a command line").command {
            Command::Run(args) => RunConfig::try_from(*args),
            other => panic!("not run: {other:?}"),
        }
    }

    fn run_fine(line: &str) -> RunConfig {
        run(line).expect("a fine command line")
    }

    #[test]
    fn given_the_grammar_when_checked_then_clap_finds_no_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn given_only_a_source_when_parsed_then_each_default_is_the_documented_constant() {
        let config = run_fine("kube-relay run -f web.yaml");

        assert_eq!(config.source, SourceConfig::Manifests(vec![Input::from("web.yaml")]));
        assert_eq!(config.metrics_address, Some(DEFAULT_METRICS_ADDRESS));
        assert_eq!(config.status_address, Some(DEFAULT_METRICS_ADDRESS));
        assert_eq!(config.healthz_address, Some(DEFAULT_HEALTHZ_ADDRESS));
        assert!(!config.bind_address_hard_fail);
        assert_eq!(config.shutdown.delay, DEFAULT_SHUTDOWN_DELAY);
        assert_eq!(config.shutdown.drain_timeout, DEFAULT_DRAIN_TIMEOUT);
        assert_eq!(config.udp_timeouts.unreplied, DEFAULT_UDP_TIMEOUT_UNREPLIED);
        assert_eq!(config.udp_timeouts.stream, DEFAULT_UDP_TIMEOUT_STREAM);
        assert_eq!(config.logs.level.to_string(), DEFAULT_LOG_LEVEL);
        assert_eq!(config.access_log, None);
        assert_eq!((config.workers, &config.state_dir), (None, &None));
        let (protocol, linger) = (DEFAULT_ROUTE_PROTOCOL, DEFAULT_VIP_ROUTES_LINGER);
        assert_eq!(config.vips, Some(VipOptions { protocol, linger, at_exit: AtExit::Keep, tune_sysctls: false }));
        assert_eq!(config.upstream.sources, [] as [IpAddr; 0]);
        assert_eq!(config.upstream.steps, Steps::default());
        assert_eq!(config.upstream.eject_after, Some(DEFAULT_EJECT_AFTER));
        assert_eq!(config.limits, LimitOptions::default());
        let options = config.relay_options(&crate::host::Host::loopback_only()).tcp;
        assert_eq!((options.connect.steps, options.limits), (Steps::default(), LimitOptions::default()));
        assert_eq!(options.header_timeout, crate::serve::tcp::TcpOptions::default().header_timeout);
        assert_eq!(config.plan.node_port_addresses, [DEFAULT_NODE_PORT_ADDRESSES]);
        assert_eq!(config.plan.service_cluster_ip_range, Some(IpNet::V4(DEFAULT_SERVICE_RANGE)));
        assert_eq!(config.plan.service_node_port_range, DEFAULT_NODE_PORT_RANGE);
        assert_eq!(config.plan.node, Node::default());
    }

    #[cfg(feature = "kubernetes")]
    #[test]
    fn given_an_api_server_when_parsed_then_a_cluster_is_served_and_loopback_endpoints_are_not() {
        let config = run_fine("kube-relay run --kubeconfig k --master https://10.0.0.1:6443 --state-dir /s");

        let options = ApiOptions { kubeconfig: Some("k".into()), master: Some("https://10.0.0.1:6443".into()) };
        assert_eq!(config.source, SourceConfig::Api { server: options, service_host: None });
        assert_eq!(config.state_dir, Some("/s".into()));
        assert_eq!(config.plan.node_port_addresses, CLUSTER_NODE_PORT_ADDRESSES);
        assert_eq!(config.shutdown.delay, CLUSTER_SHUTDOWN_DELAY);
        assert_eq!(config.healthz_address, Some(CLUSTER_HEALTHZ_ADDRESS));
        assert!(!config.plan.allow_loopback_endpoints);
        let awaits_node = |config: &RunConfig| config.relay_options(&crate::host::Host::loopback_only()).awaits_node;
        assert!(awaits_node(&config) && !awaits_node(&run_fine("kube-relay run -f x")));
    }

    #[cfg(feature = "kubernetes")]
    #[test]
    fn given_a_pod_when_parsed_then_its_cluster_is_the_source_unless_files_are_given() {
        let pod = "kube-relay run --kubernetes-service-host 10.96.0.1";

        let (server, service_host) = (ApiOptions::default(), Some([10, 96, 0, 1].into()));
        assert_eq!(run_fine(pod).source, SourceConfig::Api { server, service_host });
        assert_eq!(
            run_fine(&format!("{pod} -f web.yaml")).source,
            SourceConfig::Manifests(vec![Input::from("web.yaml")])
        );
        let both = run("kube-relay run -f web.yaml --kubeconfig k").expect_err("two sources");
        assert!(both.to_string().contains("'web.yaml' for '--source'"), "{both}");
    }

    #[test]
    fn t215_given_no_flags_when_parsed_then_metrics_are_on_loopback_only() {
        assert!(run_fine("kube-relay run -f x").metrics_address.is_some_and(|address| address.ip().is_loopback()));
    }

    #[test]
    fn t215_given_metrics_for_other_machines_when_parsed_then_status_stays_on_loopback_unless_a_flag_says_otherwise() {
        let status = |flags: &str| run_fine(&format!("kube-relay run -f x {flags}")).status_address;
        let at = |address: &str| Some(address.parse().expect("an address"));

        assert_eq!(status("--metrics-bind-address 10.0.0.5:10349"), at("127.0.0.1:10349"));
        assert_eq!(status("--metrics-bind-address [::]:10249"), at("127.0.0.1:10249"));
        assert_eq!(status("--metrics-bind-address [::1]:1"), at("[::1]:1"));
        assert_eq!(status("--metrics-bind-address none"), None);
        assert_eq!(status("--metrics-bind-address none --status-bind-address 127.0.0.1:1"), at("127.0.0.1:1"));
        assert_eq!(status("--status-bind-address 10.0.0.5:1"), at("10.0.0.5:1"));
        assert_eq!(status("--status-bind-address none"), None);
    }

    #[test]
    fn given_lists_and_repeats_when_parsed_then_all_items_are_there() {
        let config = run_fine(
            "kube-relay run -f a -f - --nodeport-addresses primary,10.0.0.0/8 --nodeport-addresses localhost \
             --node-address 10.0.0.5 --node-address fd00::5 --cluster-cidr 10.244.0.0/16,fd01::/48 \
             --hostname-override worker-1 --zone eu-1a",
        );

        assert_eq!(config.source, SourceConfig::Manifests(vec![Input::from("a"), Input::Stdin]));
        let selectors: Vec<String> = config.plan.node_port_addresses.iter().map(ToString::to_string).collect();
        assert_eq!(selectors, ["primary", "10.0.0.0/8", "localhost"]);
        assert_eq!(config.plan.node_addresses.len(), 2);
        assert_eq!(config.plan.cluster_cidrs.len(), 2);
        assert_eq!(config.plan.node.name.as_deref(), Some("worker-1"));
        assert_eq!(config.plan.node.zone.as_deref(), Some("eu-1a"));
    }

    #[test]
    fn given_none_or_nothing_when_parsed_then_the_server_is_off() {
        let args = ["kube-relay", "run", "-f", "x", "--metrics-bind-address", "none", "--healthz-bind-address", ""];

        let Command::Run(args) = Cli::try_parse_from(args).expect("a command line").command else { panic!("not run") };
        let config = RunConfig::try_from(*args).expect("fine");

        assert_eq!((config.metrics_address, config.healthz_address), (None, None));
        assert_eq!(run_fine("kube-relay run -f x --service-cluster-ip-range none").plan.service_cluster_ip_range, None);
    }

    #[test]
    fn given_how_addresses_become_local_when_parsed_then_it_is_by_routes_with_a_number_or_by_others() {
        let vips = |flags: &str| run_fine(&format!("kube-relay run -f x {flags}")).vips;

        let options =
            VipOptions { protocol: 207, linger: Duration::from_secs(5), at_exit: AtExit::Remove, tune_sysctls: true };
        let flags = "--route-protocol 207 --vip-routes-linger 5s --vip-routes-at-exit remove --tune-sysctls";
        assert_eq!(vips(flags), Some(options));
        assert_eq!(vips("--vip-routes none"), None);
        let reply_path = |flags: &str| run_fine(&format!("kube-relay run -f x {flags}")).reply_path;
        let told = ReplyPathOptions { protocol: 207, mark: "0x2/0xf".parse().expect("a mark"), removed_at_exit: true };
        assert_eq!(reply_path(&format!("{flags} --reply-mark 0x2/0xf")), told);
        assert_eq!(reply_path("").mark.to_string(), "0x100b/0x3fff");
        let guard = |flags: &str| run_fine(&format!("kube-relay run -f x {flags}")).vip_guard;
        assert_eq!((guard(""), guard("--vip-guard none")), (VipGuard::Auto, VipGuard::None));
        let Command::Cleanup(args) = parse("kube-relay cleanup").expect("a command line").command else {
            panic!("not cleanup")
        };
        assert_eq!(args.route_protocol(), DEFAULT_ROUTE_PROTOCOL);
    }

    #[test]
    fn given_an_access_log_when_parsed_then_it_is_whole_and_in_json_unless_flags_say_otherwise() {
        let access_log = |flags: &str| run_fine(&format!("kube-relay run -f x {flags}")).access_log;
        let options = |output, format, sample| {
            Some(AccessLogOptions { output, format, sample: NonZeroU32::new(sample).expect("not 0") })
        };

        let whole = options(AccessOutput::Stdout, AccessFormat::Json, DEFAULT_ACCESS_LOG_SAMPLE);
        assert_eq!(access_log("--access-log -"), whole);
        let file = AccessOutput::File("/var/log/a.log".into());
        let flags = "--access-log /var/log/a.log --access-log-format logfmt --access-log-sample 100";
        assert_eq!(access_log(flags), options(file, AccessFormat::Logfmt, 100));
        assert_eq!(access_log("--access-log-format logfmt"), None, "a form alone writes nothing");
    }

    #[test]
    fn given_values_that_clash_when_checked_then_flag_value_and_remedy_are_named() {
        let same = run("kube-relay run -f x --healthz-bind-address 127.0.0.1:10249").expect_err("the same address");
        let status = run("kube-relay run -f x --status-bind-address 127.0.0.1:10256").expect_err("the same address");
        let twice = run("kube-relay run -f - -f -").expect_err("standard input twice");
        let zero = run("kube-relay run -f x --udp-timeout-stream 0").expect_err("no time");

        assert!(same.to_string().contains("'127.0.0.1:10249' for '--healthz-bind-address'"), "{same}");
        assert!(status.to_string().contains("--status-bind-address has the same"), "{status}");
        let wildcard = "kube-relay run -f x --metrics-bind-address 10.0.0.5:10256 --healthz-bind-address";
        for all in ["0.0.0.0:10256", "[::]:10256"] {
            let error = run(&format!("{wildcard} {all}")).expect_err("that address is among all").to_string();
            assert!(error.contains("--metrics-bind-address has the same"), "{error}");
        }
        assert!(twice.to_string().contains("once"), "{twice}");
        let alone = run("kube-relay run -f x --take-over").expect_err("they cannot meet").to_string();
        assert!(alone.contains("for '--take-over': give it the --state-dir"), "{alone}");
        let pod = run_fine("kube-relay run -f x --take-over --state-dir /s --pod-uid 7f3c-1");
        assert_eq!((pod.take_over, pod.pod_uid.as_deref()), (true, Some("7f3c-1")));
        assert_eq!(run_fine("kube-relay run -f x --pod-uid=").pod_uid, None);
        assert!(pod_uid("a\nb").is_err() && pod_uid(&"a".repeat(300)).is_err());
        assert_eq!(zero.to_string(), "invalid value '0s' for '--udp-timeout-stream': write a time above 0, like 10s");
    }

    #[test]
    fn given_how_connections_are_served_when_parsed_then_each_is_taken_and_none_switches_off() {
        let config = run_fine(
            "kube-relay run -f x --connect-timeout 1s --connect-tries 2 --eject-after none --half-close-timeout 5m \
             --idle-timeout 1h --max-connection-age 2h --max-connections 1000 --accept-proxy-timeout 1m",
        );

        assert_eq!(config.upstream.steps.total(), Duration::from_secs(3));
        assert_eq!(config.upstream.eject_after, None);
        assert_eq!(config.limits.half_close_timeout, Duration::from_secs(300));
        assert_eq!(config.limits.idle_timeout, Some(Duration::from_secs(3_600)));
        assert_eq!(config.limits.max_connection_age, Some(Duration::from_secs(7_200)));
        assert_eq!(config.max_connections, NonZeroU32::new(1_000));
        assert_eq!(config.header_timeout, Duration::from_secs(60));
    }

    #[test]
    fn given_times_that_make_no_sense_when_checked_then_flag_value_and_remedy_are_named() {
        let told = |flags: &str| run(&format!("kube-relay run -f x {flags}")).expect_err("no sense").to_string();

        let short = told("--connect-timeout 1ms");
        assert_eq!(short, "invalid value '1ms' for '--connect-timeout': write a time from 10ms to 1m");
        for flag in ["--accept-proxy-timeout", "--half-close-timeout", "--idle-timeout", "--max-connection-age"] {
            let message = told(&format!("{flag} 0"));
            assert_eq!(message, format!("invalid value '0s' for '{flag}': write a time from 1s to 8760h"));
        }
    }

    #[test]
    fn given_wrong_values_when_parsed_then_flag_value_and_remedy_are_named() {
        let cases = [
            ("run -f x --drain-timeout 30", "--drain-timeout", "10s, 250ms, 1m30s"),
            ("run -f x --nodeport-addresses eth0", "--nodeport-addresses", "a CIDR like"),
            ("run -f x --metrics-bind-address :10249", "--metrics-bind-address", "none"),
            ("run -f x --service-node-port-range 9-1", "--service-node-port-range", "30000-32767"),
            ("run -f x --expose 8080=web", "--expose", "127.0.0.1:8080=default/web:http"),
            ("run -f x --log-level kube_relay=loud", "--log-level", "loud"),
            ("run -f x --workers 0", "--workers", "1..=1024"),
            ("run -f x --access-log - --access-log-format xml", "--access-log-format", "logfmt"),
            ("run -f x --access-log - --access-log-sample 0", "--access-log-sample", "0 is not in 1.."),
            ("run -f x --vip-routes all", "--vip-routes", "none"),
            ("cleanup --route-protocol 4", "--route-protocol", "5..=255"),
            ("run -f x --reply-mark 0x2000", "--reply-mark", "like 0x100b/0x3fff"),
            ("run -f x --reply-mark 0x4001/0xff", "--reply-mark", "write them in both, or in neither"),
            ("run -f x --connect-tries 9", "--connect-tries", "1..=8"),
            ("run -f x --eject-after 0", "--eject-after", "none"),
            ("run -f x --idle-timeout 5", "--idle-timeout", "none"),
            ("env Shop", "[NAMESPACE]", "lower case"),
            ("env --domain a..b", "--domain", "cluster.local"),
            ("env --format zone --reverse 10.96.0.0/12", "--reverse", "10.96.0.0/16"),
            ("new service Web --port 1 --backend 1.2.3.4:5", "<NAME>", "lower case"),
            ("new service web --port 1 --node-port x --backend 1.2.3.4:5", "--node-port", "auto"),
        ];

        for (line, flag, right) in cases {
            let error = parse(&format!("kube-relay {line}")).expect_err("a wrong value").to_string();
            assert!(error.contains(flag) && error.contains(right), "{line}: {error}");
        }
    }

    #[test]
    fn given_a_doctor_when_parsed_then_it_takes_what_run_takes_and_no_source_is_fine() {
        let doctor = |line: &str| match parse(line).expect("a command line").command {
            Command::Doctor(args) => args.checked(),
            other => panic!("not doctor: {other:?}"),
        };

        let bare = doctor("kube-relay doctor").expect("nothing has to be said");
        let full = doctor("kube-relay doctor -v -f web.yaml --vip-routes none --zone z").expect("as for run");

        assert_eq!((bare.run.source, bare.all), (SourceConfig::Manifests(vec![]), false));
        assert_eq!(
            full,
            DoctorConfig { run: run_fine("kube-relay run -f web.yaml --vip-routes none --zone z"), all: true }
        );
        assert!(doctor("kube-relay doctor -f - -f -").is_err(), "standard input twice");
    }

    fn env(line: &str) -> Result<DiscoveryConfig, ConfigError> {
        match parse(line).expect("a command line").command {
            Command::Env(args) => args.checked(),
            other => panic!("not env: {other:?}"),
        }
    }

    #[test]
    fn given_env_when_parsed_then_namespace_domain_and_source_have_the_documented_defaults() {
        let (namespace, domain) = ("default".to_owned(), "cluster.local".to_owned());
        let relay = || DiscoverySource::Relay(DEFAULT_METRICS_ADDRESS);
        let form = |line: &str| env(line).expect("fine").form;

        let bare = DiscoveryConfig { source: relay(), form: Form::Environment { namespace: namespace.clone() } };
        assert_eq!(env("kube-relay env"), Ok(bare));
        assert_eq!(form("kube-relay env shop"), Form::Environment { namespace: "shop".into() });
        assert_eq!(form("kube-relay env --format hosts"), Form::Hosts { namespace, domain: domain.clone() });
        assert_eq!(form("kube-relay env --format zone"), Form::Zone { domain });
        let network = reverse_network("10.96.0.0/16").expect("a zone");
        assert_eq!(
            form("kube-relay env --format zone --domain k8s.example. --reverse 10.96.0.0/16"),
            Form::ReverseZone { domain: "k8s.example".into(), network }
        );
        assert_eq!(
            env("kube-relay env -f x --service-cluster-ip-range 10.96.0.0/12").expect("fine").source,
            DiscoverySource::Manifests {
                inputs: vec![Input::from("x")],
                ranges: Ranges {
                    cluster_ips: ClusterIpRange(Some("10.96.0.0/12".parse().expect("a network"))),
                    ..Ranges::default()
                },
            }
        );
    }

    #[test]
    fn given_an_env_that_contradicts_itself_when_parsed_then_the_flag_and_the_remedy_are_named() {
        let zone = env("kube-relay env shop --format zone").expect_err("a zone of one namespace").to_string();
        let reverse = env("kube-relay env --reverse 10.0.0.0/8").expect_err("variables in reverse").to_string();

        assert!(zone.contains("'shop' for 'NAMESPACE'") && zone.contains("all namespaces"), "{zone}");
        assert!(reverse.contains("'10.0.0.0/8' for '--reverse'") && reverse.contains("--format zone"), "{reverse}");
        assert!(env("kube-relay env -f - -f -").is_err(), "standard input twice");
    }

    #[test]
    fn given_an_address_to_explain_when_parsed_then_manifests_are_asked_only_where_some_are_named() {
        let explain = |line: &str| match parse(line).expect("a command line").command {
            Command::Explain(args) => *args,
            other => panic!("not explain: {other:?}"),
        };

        let live = explain("kube-relay explain 10.96.0.10:53/udp --from 10.0.0.1");
        let offline = explain("kube-relay explain -f web.yaml --zone z 10.96.0.10:80");

        assert_eq!(live.server.address, DEFAULT_METRICS_ADDRESS);
        let question = live.question();
        assert_eq!((question.destination.protocol, question.from), (Some(Protocol::Udp), Some([10, 0, 0, 1].into())));
        assert_eq!(live.manifests(), Ok(None));
        let config = offline.manifests().expect("fine").expect("manifests");
        assert_eq!(config.sources, [Input::from("web.yaml")]);
        assert_eq!(config.plan.node.zone.as_deref(), Some("z"));
        assert!(parse("kube-relay explain web:80").is_err(), "names are not looked up");
    }

    #[test]
    fn given_no_manifests_to_compare_with_when_parsed_then_they_are_asked_for() {
        let error = parse("kube-relay diff").expect_err("no path");

        assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
        assert!(parse("kube-relay diff a.yaml b/ --server 127.0.0.1:1 --nodeport-addresses all").is_ok());
    }

    #[test]
    fn given_no_source_when_parsed_then_the_flag_is_asked_for() {
        let error = parse("kube-relay run").expect_err("no source");

        assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
        assert!(error.to_string().contains("--source"), "{error}");
    }

    #[test]
    fn given_a_new_service_when_parsed_then_a_node_port_makes_it_a_node_port_service() {
        let new = |line: &str| match parse(line).expect("a command line").command {
            Command::New(NewCommand::Service(args)) => args,
            other => panic!("not new service: {other:?}"),
        };
        let line = "kube-relay new service web --port 80 --backend 10.0.0.1:8000 10.0.0.2:8000";

        assert_eq!(new(line).service_kind(), ServiceKind::ClusterIp);
        assert_eq!(new(line).backends.len(), 2);
        assert_eq!(new(&format!("{line} --node-port auto")).service_kind(), ServiceKind::NodePort);
        assert_eq!(new(&format!("{line} --type loadbalancer")).service_kind(), ServiceKind::LoadBalancer);
        assert!(new(&format!("{line} --type ClusterIP --node-port 30000")).checked().is_err());
    }

    #[test]
    fn given_every_command_when_its_help_is_printed_then_it_has_examples_and_shows_defaults() {
        let mut cli = Cli::command();
        cli.build();
        let help = |names: &[&str]| {
            let mut command = &mut cli.clone();
            for name in names {
                command = command.find_subcommand_mut(name).expect("a command");
            }
            command.render_long_help().to_string()
        };

        let first = [&["run"][..], &["check"], &["status"], &["explain"], &["diff"], &["doctor"], &["env"]];
        for names in first.into_iter().chain([&["cleanup"][..], &["new", "service"], &["completions"], &["man"]]) {
            let text = help(names);
            let examples: Vec<&str> = text.lines().filter(|line| line.contains("    kube-relay ")).collect();
            assert!(examples.len() >= 2, "{names:?}: {text}");
            assert!(examples.iter().all(|line| line.len() <= 100), "a terminal would wrap {examples:?}");
        }
        for flag in ["[default: 127.0.0.1:10249]", "[default: 30s]", "[default: localhost]", "[default: 127.96.0.0/16]"]
        {
            assert!(help(&["run"]).contains(flag), "{flag}");
        }
    }
}
