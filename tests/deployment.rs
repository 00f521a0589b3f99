//! The manifests under `examples/kubernetes`: what they say fits together, and fits the program that they start.
//!
//! Each is read with the API's own types. An overlay's patches are applied as kustomize does it. The unit for a machine without
//! a cluster is in `systemd`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, PodSpec, Probe, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube_relay::cli;
use kube_relay::config::RunConfig;
use kube_relay::flag_defaults;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use support::DEADLINE;

mod support;
#[path = "deployment/systemd.rs"]
mod systemd;

/// The overlays, each with the folders whose DaemonSets are put on top of each other.
const DEPLOYMENTS: [(&str, &[&str]); 4] = [
    ("base", &["base"]),
    ("beside-kube-proxy", &["base", "beside-kube-proxy"]),
    ("beside-kube-proxy-nftables", &["base", "beside-kube-proxy", "beside-kube-proxy-nftables"]),
    ("edge", &["base", "beside-kube-proxy", "edge"]),
];

/// Variables of flags that come with the API server as a source.
const OF_THE_API_SOURCE: [&str; 2] = ["KUBE_RELAY_MASTER", "KUBE_RELAY_STATE_DIR"];

/// A node of the examples.
const HOST_IP: Ipv4Addr = Ipv4Addr::new(127, 0, 93, 1);

fn path(file: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "examples/kubernetes", file].iter().collect()
}

/// The documents of a file.
fn documents(file: &str) -> Vec<Value> {
    let text = fs::read_to_string(path(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    let documents = text.split("\n---\n");
    documents.map(|text| serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{file}: {error}"))).collect()
}

/// An object by the API's type, which has to know each field.
fn typed<T: DeserializeOwned + Serialize>(document: &Value) -> T {
    let object: T = serde_json::from_value(document.clone()).expect("an object of its kind");
    assert_eq!(&serde_json::to_value(&object).expect("JSON"), document, "a field that the API does not have");
    object
}

fn only<T: DeserializeOwned + Serialize>(file: &str, kind: &str) -> T {
    let of_kind: Vec<Value> = documents(file).into_iter().filter(|document| document["kind"] == kind).collect();
    assert_eq!(of_kind.len(), 1, "{kind} in {file}");
    typed(&of_kind[0])
}

/// A strategic merge: mappings field by field, lists of named things by their names, other lists as a whole.
fn merge(under: &mut Value, over: &Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            over.iter().for_each(|(key, value)| merge(under.entry(key).or_insert(Value::Null), value));
        }
        (Value::Array(under), Value::Array(over)) if over.iter().all(|item| item["name"].is_string()) => {
            for item in over {
                match under.iter_mut().find(|below| below["name"] == item["name"]) {
                    Some(below) => merge(below, item),
                    None => under.push(item.clone()),
                }
            }
        }
        (under, over) => *under = over.clone(),
    }
}

/// What an overlay starts on each node.
struct Deployment {
    name: &'static str,
    daemon_set: DaemonSet,
    /// Its RelayConfiguration.
    config: PathBuf,
}

impl Deployment {
    fn all() -> Vec<Self> {
        DEPLOYMENTS.into_iter().map(|(name, folders)| Self::read(name, folders)).collect()
    }

    fn read(name: &'static str, folders: &[&str]) -> Self {
        let mut daemon_set = Value::Null;
        for folder in folders {
            let documents = documents(&format!("{folder}/daemonset.yaml"));
            assert_eq!(documents.len(), 1, "{folder}");
            merge(&mut daemon_set, &documents[0]);
        }
        let mut configs = folders.iter().map(|folder| path(folder).join("relay.yaml"));
        let config = configs.rfind(|path| path.exists()).expect("the base has one");
        Self { name, daemon_set: typed(&daemon_set), config }
    }

    fn pod(&self) -> &PodSpec {
        let spec = self.daemon_set.spec.as_ref().expect("a spec");
        spec.template.spec.as_ref().expect("a pod")
    }

    fn container(&self) -> &Container {
        assert_eq!(self.pod().containers.len(), 1, "{}", self.name);
        &self.pod().containers[0]
    }

    fn annotation(&self, key: &str) -> &str {
        let template = &self.daemon_set.spec.as_ref().expect("a spec").template;
        let annotations = template.metadata.as_ref().and_then(|metadata| metadata.annotations.as_ref());
        annotations.and_then(|annotations| annotations.get(key)).unwrap_or_else(|| panic!("no {key}"))
    }

    /// The command line that a kubelet of this machine would start.
    fn arguments(&self) -> Vec<String> {
        let args = self.container().args.as_ref().expect("arguments").iter();
        let config = format!("--config={}", self.config.display());
        args.map(|arg| match arg.as_str() {
            "--config=/etc/kube-relay/relay.yaml" => config.clone(),
            arg => arg.replace("$(HOST_IP)", &HOST_IP.to_string()),
        })
        .collect()
    }

    /// What the program makes of it, with files as the source.
    fn run_config(&self) -> RunConfig {
        self.run_config_with(&[])
    }

    /// The same, with what the environment says.
    fn run_config_with(&self, environment: &[&str]) -> RunConfig {
        let line = ["kube-relay".to_owned()].into_iter().chain(self.arguments()).chain(["--source=-".to_owned()]);
        let line = line.chain(environment.iter().map(ToString::to_string));
        let parsed = flag_defaults::parse(line.map(OsString::from)).unwrap_or_else(|error| panic!("{error}"));
        let cli::Command::Run(args) = parsed.command else { panic!("not run") };
        let file = args.config_file().expect("a configuration file");
        assert_eq!(file.findings, [], "{}", self.name);
        RunConfig::try_from(*args).expect("a fine configuration")
    }
}

fn port_of(probe: Option<&Probe>) -> u16 {
    let probe = probe.expect("a probe");
    assert!(probe.exec.is_none(), "the API server takes one way of asking");
    let get = probe.http_get.as_ref().expect("a probe by HTTP");
    assert_eq!(get.path.as_deref(), Some("/livez"), "/healthz fails where a node is about to go, and so would the pod");
    assert_eq!((get.host.as_ref(), get.scheme.as_ref()), (None, None));
    match &get.port {
        IntOrString::Int(port) => u16::try_from(*port).expect("a port"),
        IntOrString::String(name) => panic!("{name}: no port is declared"),
    }
}

#[test]
fn given_the_role_when_read_then_it_may_read_what_a_proxy_reads_and_write_events_alone() {
    let account: ServiceAccount = only("base/rbac.yaml", "ServiceAccount");
    let role: ClusterRole = only("base/rbac.yaml", "ClusterRole");
    let binding: ClusterRoleBinding = only("base/rbac.yaml", "ClusterRoleBinding");

    let mut grants = BTreeSet::new();
    for rule in role.rules.expect("rules") {
        assert!(rule.non_resource_urls.is_none() && rule.resource_names.is_none());
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                assert!(grants.insert((group.clone(), resource.clone(), rule.verbs.join(","))), "{resource} twice");
            }
        }
    }
    // What the relay asks for: `role` of the tests `kubernetes` has a server that writes it down.
    let wanted = [
        ("", "services", "list,watch"),
        ("", "services", "get"),
        ("", "endpoints", "list,watch"),
        ("", "nodes", "list,watch"),
        ("discovery.k8s.io", "endpointslices", "list,watch"),
        ("events.k8s.io", "events", "create,patch"),
    ];
    assert_eq!(grants, wanted.map(|(group, resource, verbs)| (group.into(), resource.into(), verbs.into())).into());
    assert_eq!((binding.role_ref.kind.as_str(), binding.role_ref.name.as_str()), ("ClusterRole", "kube-relay"));
    let subjects = binding.subjects.expect("a subject");
    assert_eq!(subjects.len(), 1);
    assert_eq!((&subjects[0].kind[..], Some(&subjects[0].name)), ("ServiceAccount", account.metadata.name.as_ref()));
    for deployment in Deployment::all() {
        assert_eq!(deployment.pod().service_account_name, account.metadata.name);
    }
}

#[test]
fn given_each_overlay_when_read_then_the_pod_has_what_it_needs_of_the_node_and_no_more() {
    for deployment in Deployment::all() {
        let (pod, container) = (deployment.pod(), deployment.container());
        let security = container.security_context.as_ref().expect("a security context");
        let capabilities = security.capabilities.as_ref().expect("capabilities");

        assert_eq!(pod.host_network, Some(true));
        assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"));
        let tolerations = pod.tolerations.as_ref().expect("tolerations");
        assert!(tolerations.iter().any(|any| any.operator.as_deref() == Some("Exists") && any.key.is_none()));
        assert!(container.ports.is_none(), "declared ports are taken from the node");
        assert_eq!(security.run_as_user, Some(0));
        assert_eq!(capabilities.drop, Some(vec!["ALL".into()]));
        assert_eq!(capabilities.add, Some(vec!["NET_BIND_SERVICE".into(), "NET_ADMIN".into()]));
        assert_eq!((security.privileged, security.allow_privilege_escalation), (Some(false), Some(false)));
        assert_eq!(security.read_only_root_filesystem, Some(true));
        assert_eq!(security.seccomp_profile.as_ref().map(|profile| &profile.type_[..]), Some("RuntimeDefault"));
        let resources = container.resources.as_ref().expect("resources");
        assert!(
            ["cpu", "memory"].iter().all(|name| resources.requests.as_ref().is_some_and(|all| all.contains_key(*name)))
        );
        assert!(resources.limits.as_ref().is_some_and(|limits| limits.contains_key("memory")));
    }
}

#[test]
fn t234_given_an_update_when_a_pod_is_replaced_then_the_new_one_starts_beside_it_and_takes_over_in_their_folder() {
    for deployment in Deployment::all() {
        let spec = deployment.daemon_set.spec.as_ref().expect("a spec");
        let strategy = spec.update_strategy.as_ref().expect("a strategy");
        let rolling = strategy.rolling_update.as_ref().expect("a rolling update");
        let (pod, container) = (deployment.pod(), deployment.container());

        assert_eq!(strategy.type_.as_deref(), Some("RollingUpdate"));
        let numbers = (&rolling.max_surge, &rolling.max_unavailable);
        assert_eq!(
            numbers,
            (&Some(IntOrString::Int(1)), &Some(IntOrString::Int(0))),
            "the API takes one of them alone"
        );
        assert!(container.ports.is_none(), "the second pod of a node could not have them");
        assert_eq!((pod.host_pid, pod.share_process_namespace), (None, None), "`ready` knows its own by their numbers");
        let value = |name: &str| container.env.iter().flatten().find(|variable| variable.name == name);
        assert_eq!(value("KUBE_RELAY_TAKE_OVER").and_then(|variable| variable.value.as_deref()), Some("true"));
        let uid = value("KUBE_RELAY_POD_UID").and_then(|variable| variable.value_from.as_ref()).expect("from the pod");
        assert_eq!(uid.field_ref.as_ref().map(|field| field.field_path.as_str()), Some("metadata.uid"));
        let config =
            deployment.run_config_with(&["--state-dir=/var/lib/kube-relay", "--take-over=true", "--pod-uid=1"]);
        assert!(config.take_over && config.pod_uid.is_some() && config.state_dir.is_some());
    }
}

#[test]
fn t234_given_two_pods_of_a_node_when_one_is_asked_whether_it_is_ready_then_its_own_process_answers() {
    for deployment in Deployment::all() {
        let probe = deployment.container().readiness_probe.as_ref().expect("a probe");

        assert!(probe.http_get.is_none(), "at a port of the node the other pod may answer");
        let command = probe.exec.as_ref().and_then(|exec| exec.command.as_ref()).expect("a command");
        let (program, arguments) = command.split_first().expect("a program");
        assert_eq!(program, "/kube-relay", "where the image has it");
        let line = ["kube-relay"].into_iter().chain(arguments.iter().map(String::as_str));
        let line = line.chain(["--state-dir", "/s"]); // As the environment says.
        let parsed = flag_defaults::parse(line.map(OsString::from)).unwrap_or_else(|error| panic!("{error}"));
        assert!(matches!(parsed.command, cli::Command::Ready(_)));
        assert!(probe.timeout_seconds >= Some(5), "it may have to wait while another pod takes over");
    }
}

#[test]
fn given_a_pod_that_is_ended_when_it_drains_then_it_has_the_time_that_it_wants() {
    for deployment in Deployment::all() {
        let shutdown = deployment.run_config().shutdown;

        assert_eq!(deployment.pod().termination_grace_period_seconds, Some(45));
        assert!(shutdown.delay + shutdown.drain_timeout + Duration::from_secs(5) <= Duration::from_secs(45));
    }
}

#[test]
fn given_each_overlay_when_its_ports_are_compared_then_flags_probes_and_annotation_name_the_same() {
    for deployment in Deployment::all() {
        let config = deployment.run_config();
        let health = config.healthz_address.expect("an address for probes");
        let metrics = config.metrics_address.expect("an address for scrapes");
        let container = deployment.container();

        let ports = if deployment.name == "base" { (10256, 10249) } else { (10356, 10349) };
        assert_eq!((health.port(), metrics.port()), ports, "{}: kube-proxy has the others", deployment.name);
        assert!(health.ip().is_unspecified(), "load balancers ask from outside");
        assert_eq!(port_of(container.liveness_probe.as_ref()), health.port(), "{}", deployment.name);
        assert_eq!(deployment.annotation("prometheus.io/port"), metrics.port().to_string());
        let beside = config.plan.proxy_name.as_deref() == Some("kube-relay");
        assert_eq!(beside, deployment.name != "base", "beside kube-proxy only labelled Services are ours");
    }
}

#[test]
fn given_the_environment_of_the_pod_when_read_then_each_variable_is_a_flags_and_each_folder_is_mounted() {
    let command = <cli::Cli as clap::CommandFactory>::command();
    let run = command.find_subcommand("run").expect("run");
    let known: BTreeSet<String> =
        run.get_arguments().filter_map(|arg| Some(arg.get_env()?.to_str()?.to_owned())).collect();

    for deployment in Deployment::all() {
        let (pod, container) = (deployment.pod(), deployment.container());
        for variable in container.env.iter().flatten().filter(|variable| variable.name != "HOST_IP") {
            let name = variable.name.as_str();
            assert!(known.contains(name) || OF_THE_API_SOURCE.contains(&name), "{name}");
        }
        let state = container.env.iter().flatten().find(|variable| variable.name == "KUBE_RELAY_STATE_DIR");
        let state = state.and_then(|variable| variable.value.as_ref()).expect("a folder for the last good state");
        let mounts = container.volume_mounts.as_ref().expect("mounts");
        let mount = mounts.iter().find(|mount| mount.mount_path == *state).expect("the folder is mounted");
        let volume = pod.volumes.iter().flatten().find(|volume| volume.name == mount.name).expect("its volume");
        assert_eq!(volume.host_path.as_ref().map(|host| &host.path), Some(state), "it outlives the pod");
        assert!(mounts.iter().any(|mount| mount.mount_path == "/etc/kube-relay" && mount.read_only == Some(true)));
    }
}

#[test]
fn given_the_address_of_the_api_server_when_kube_proxy_is_gone_then_the_pod_waits_for_it_to_be_told() {
    for deployment in Deployment::all() {
        let master = deployment.container().env.iter().flatten().find(|variable| variable.name == "KUBE_RELAY_MASTER");
        let source = master.and_then(|variable| variable.value_from.as_ref()).expect("from elsewhere");
        let key = source.config_map_key_ref.as_ref().expect("a ConfigMap");

        assert_eq!((key.name.as_str(), key.key.as_str()), ("kube-relay-cluster", "apiServer"));
        assert_eq!(key.optional == Some(true), deployment.name != "base", "kube-proxy serves 10.96.0.1 beside us");
    }
}

#[test]
fn given_the_overlay_for_nftables_when_read_then_its_init_container_loads_the_rules_and_may_do_no_more() {
    let (name, folders) = DEPLOYMENTS[2];
    let deployment = Deployment::read(name, folders);
    let generated = &documents(&format!("{name}/kustomization.yaml"))[0]["configMapGenerator"][0];

    let init = deployment.pod().init_containers.as_ref().expect("an init container");
    assert_eq!(init.len(), 1);
    let security = init[0].security_context.as_ref().expect("a security context");
    let capabilities = security.capabilities.as_ref().expect("capabilities");
    let mount = &init[0].volume_mounts.as_ref().expect("a mount")[0];
    let volume = deployment.pod().volumes.iter().flatten().find(|volume| volume.name == mount.name);
    let map = volume.and_then(|volume| volume.config_map.as_ref()).expect("a ConfigMap");

    assert_eq!(generated["name"].as_str(), Some(map.name.as_str()));
    let file = format!("{}/{}", mount.mount_path, generated["files"][0].as_str().expect("a file"));
    assert_eq!(init[0].command, Some(["nft", "-f", &file].map(str::to_owned).to_vec()));
    assert_eq!(capabilities.drop, Some(vec!["ALL".into()]));
    assert_eq!(capabilities.add, Some(vec!["NET_ADMIN".into()]));
    assert_eq!((security.privileged, security.allow_privilege_escalation), (Some(false), Some(false)));
    assert_eq!(security.read_only_root_filesystem, Some(true));
}

#[test]
fn given_the_kustomizations_when_read_then_each_file_that_they_name_is_there_and_none_is_left_out() {
    for folder in ["base", "beside-kube-proxy", "beside-kube-proxy-nftables", "edge", "pod-monitor", "monitoring"] {
        let kustomization = &documents(&format!("{folder}/kustomization.yaml"))[0];
        let list = |key: &str| kustomization[key].as_array().cloned().unwrap_or_default();
        let patches = list("patches").into_iter().map(|patch| patch["path"].clone());
        let generated =
            list("configMapGenerator").into_iter().flat_map(|map| map["files"].as_array().cloned().expect("files"));
        let named: Vec<Value> = list("resources").into_iter().chain(patches).chain(generated).collect();

        let named: BTreeSet<String> = named.iter().map(|name| name.as_str().expect("a path").to_owned()).collect();
        for name in &named {
            assert!(path(folder).join(name).exists(), "{folder}: {name}");
        }
        for entry in fs::read_dir(path(folder)).expect("a folder") {
            let name = entry.expect("an entry").file_name().into_string().expect("a name");
            let is_for_people = ["kustomization.yaml", "prometheus-local.yaml"].contains(&name.as_str());
            assert!(is_for_people || named.contains(&name), "{folder}/{name} is named nowhere");
        }
    }
}

/// The address that Prometheus asks, as the PodMonitor tells it to.
fn scrape_address(host_ip: IpAddr, annotation: &str) -> String {
    let monitor = &documents("pod-monitor/pod-monitor.yaml")[0];
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    assert!(endpoint.get("port").is_none() && endpoint.get("portNumber").is_none(), "these keep declared ports alone");
    assert_eq!(endpoint["path"], "/metrics");
    let labels =
        |rule: &Value| rule["sourceLabels"].as_array().map(|labels| serde_json::to_string(labels).expect("JSON"));
    let of_node = r#"["__meta_kubernetes_pod_host_ip","__meta_kubernetes_pod_annotation_prometheus_io_port"]"#;
    let rules = endpoint["relabelings"].as_array().expect("rules").iter();
    let rules = rules.filter(|rule| rule["targetLabel"] == "__address__");
    let mut address = String::new();
    for rule in rules {
        assert_eq!(labels(rule).as_deref(), Some(of_node));
        assert_eq!(rule["separator"], ";");
        let matches = match rule["regex"].as_str() {
            Some(r"([^:]+);(\d+)") => host_ip.is_ipv4(),
            Some(r"(.*:.*);(\d+)") => host_ip.is_ipv6(),
            other => panic!("this test does not know what matches {other:?}"),
        };
        if matches {
            let replacement = rule["replacement"].as_str().expect("a replacement");
            address = replacement.replace("$1", &host_ip.to_string()).replace("$2", annotation);
        }
    }
    address
}

#[test]
fn given_the_pod_monitor_when_nodes_have_either_family_then_the_address_is_the_nodes_with_the_pods_port() {
    let monitor = &documents("pod-monitor/pod-monitor.yaml")[0];
    let selected = &monitor["spec"]["selector"]["matchLabels"];

    for deployment in Deployment::all() {
        let template = &deployment.daemon_set.spec.as_ref().expect("a spec").template;
        let labels = template.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
        assert_eq!(&serde_json::to_value(labels).expect("JSON"), selected);
        let address = scrape_address(HOST_IP.into(), deployment.annotation("prometheus.io/port"));
        assert_eq!(address.parse(), Ok(deployment.run_config().metrics_address.expect("an address")));
    }
    let rules = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"].as_array().expect("rules");
    let drops = rules.iter().filter(|rule| rule["action"] == "labeldrop").map(|rule| rule["regex"].as_str());
    assert_eq!(drops.collect::<Vec<_>>(), [Some("pod")], "both pods of an update are one target");
    assert_eq!(scrape_address("fd00::5".parse().expect("an address"), "10249"), "[fd00::5]:10249");
}

/// Killed when dropped.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn given_the_command_line_of_the_pod_when_prometheus_asks_where_the_monitor_says_then_metrics_come_back() {
    let deployment = Deployment::read("base", &["base"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-relay"));
    // The address of probes is the same on each node, and may be another test's; so are routes.
    let arguments =
        deployment.arguments().into_iter().filter(|argument| !argument.starts_with("--healthz-bind-address"));
    command.args(arguments).args(["--healthz-bind-address=none", "--vip-routes=none", "--source=-"]);
    command.env_clear().current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null()).stderr(Stdio::null());
    let _started = Started(command.spawn().expect("the program starts"));

    let address = scrape_address(HOST_IP.into(), deployment.annotation("prometheus.io/port"));
    let answer = get(address.parse().expect("an address"), "/metrics");

    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\nkuberelay_build_info{"), "{answer}");
}

/// The answer, once somebody listens.
fn get(address: SocketAddr, path: &str) -> String {
    let deadline = Instant::now() + DEADLINE;
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
        }
        thread::sleep(Duration::from_millis(5));
    };
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}
