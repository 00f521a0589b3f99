//! The variables by which a pod finds Services, as a kubelet sets them.
//!
//! Pure. The rules are a kubelet's to the letter: programs were written against them, and some against their oddities.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{ClusterIps, Service, ServiceKind, ServicePort};

/// The Service that pods of all namespaces are told of: the API server.
const MASTER: &str = "kubernetes";
/// The namespace of [`MASTER`].
const MASTER_NAMESPACE: &str = "default";

/// All variables of a pod that come of Services. Displayed as lines `NAME=value`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// By the Service's name, then in a kubelet's order. Each name once.
    pub variables: Vec<Variable>,
    /// Names that two Services give different values.
    pub clashes: Vec<Clash>,
}

/// One variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Capital letters, digits and underscores. Begins with a digit where the Service's name does.
    pub name: String,
    /// An address, a number, a protocol or a URL: nothing that a shell would have to be told of.
    pub value: String,
}

/// A variable that two Services set: `A_SERVICE_PORT` is a number to Service `a`, and a URL to Service `a-service`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clash {
    /// The variable's name.
    pub variable: String,
    /// The Services' names; the second one's value is used.
    pub services: [String; 2],
}

impl Environment {
    /// The variables of a pod with `enableServiceLinks`, as pods have it unless they say otherwise.
    pub fn of_pod(services: &[Arc<Service>], namespace: &str) -> Self {
        let mut environment = Self::default();
        let mut setters = HashMap::new();
        for (name, (service, ip)) in visible(services, namespace) {
            for variable in variables(service, ip) {
                environment.set(variable, name, &mut setters);
            }
        }
        environment
    }

    /// The later of two counts, at the place of the first. A kubelet goes through Services in no order at all.
    fn set<'s>(&mut self, variable: Variable, service: &'s str, setters: &mut HashMap<String, (usize, &'s str)>) {
        let next = (self.variables.len(), service);
        let (place, setter) = setters.entry(variable.name.clone()).or_insert(next);
        let Some(known) = self.variables.get_mut(*place) else { return self.variables.push(variable) };
        if *setter != service && known.value != variable.value {
            let services = [*setter, service].map(str::to_owned);
            self.clashes.push(Clash { variable: variable.name.clone(), services });
        }
        *setter = service;
        *known = variable;
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.variables.iter().try_for_each(|Variable { name, value }| writeln!(f, "{name}={value}"))
    }
}

impl fmt::Display for Clash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { variable, services: [first, second] } = self;
        write!(
            f,
            "{variable}: both Service {first} and Service {second} set it; here it is {second}'s, in a pod either's"
        )
    }
}

impl Variable {
    fn new(name: String, value: impl fmt::Display) -> Self {
        Self { name, value: value.to_string() }
    }
}

/// The Services that a pod is told of, by name. One that is called as the API server's and is in the pod's own
/// namespace comes before that.
fn visible<'s>(services: &'s [Arc<Service>], namespace: &str) -> BTreeMap<&'s str, (&'s Service, IpAddr)> {
    let mut by_name = BTreeMap::new();
    for service in services {
        let Some(ip) = cluster_ip(service) else { continue };
        let name = &*service.name.name;
        if name == MASTER && *service.name.namespace == *MASTER_NAMESPACE {
            by_name.entry(name).or_insert((&**service, ip));
        } else if *service.name.namespace == *namespace {
            by_name.insert(name, (&**service, ip));
        }
    }
    by_name
}

/// The first of its cluster IPs: variables know one family. `None` for headless Services and aliases.
fn cluster_ip(service: &Service) -> Option<IpAddr> {
    match &service.cluster_ips {
        ClusterIps::Addresses { addresses, .. } if service.kind != ServiceKind::ExternalName => {
            addresses.first().copied()
        }
        _ => None,
    }
}

fn variables(service: &Service, ip: IpAddr) -> Vec<Variable> {
    let Some(first) = service.ports.first() else { return Vec::new() };
    let prefix = variable_name(&service.name.name);
    let mut variables = vec![
        Variable::new(format!("{prefix}_SERVICE_HOST"), ip),
        Variable::new(format!("{prefix}_SERVICE_PORT"), first.port),
    ];
    for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
        variables.push(Variable::new(format!("{prefix}_SERVICE_PORT_{}", variable_name(&port.name)), port.port));
    }
    variables.push(Variable::new(format!("{prefix}_PORT"), url(ip, first)));
    variables.extend(service.ports.iter().flat_map(|port| link(&prefix, ip, port)));
    variables
}

/// What Docker's `--link` would have set.
fn link(prefix: &str, ip: IpAddr, port: &ServicePort) -> [Variable; 4] {
    let name = format!("{prefix}_PORT_{}_{}", port.port, port.protocol);
    [
        Variable::new(name.clone(), url(ip, port)),
        Variable::new(format!("{name}_PROTO"), scheme(port)),
        Variable::new(format!("{name}_PORT"), port.port),
        Variable::new(format!("{name}_ADDR"), ip),
    ]
}

/// `tcp://10.96.0.10:80`, with brackets around an IPv6 address.
fn url(ip: IpAddr, port: &ServicePort) -> String {
    format!("{}://{}", scheme(port), SocketAddr::new(ip, port.port))
}

fn scheme(port: &ServicePort) -> String {
    port.protocol.as_str().to_ascii_lowercase()
}

fn variable_name(name: &str) -> String {
    name.to_ascii_uppercase().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(services: Vec<Service>, namespace: &str) -> Environment {
        Environment::of_pod(&services.into_iter().map(Arc::new).collect::<Vec<_>>(), namespace)
    }

    fn names(environment: &Environment) -> Vec<&str> {
        environment.variables.iter().map(|variable| variable.name.as_str()).collect()
    }

    /// With one port, so that it has variables.
    fn at(name: &str, ip: [u8; 4]) -> Service {
        Service::new(name).cluster_ip(ip).port("", 80)
    }

    fn hosts(environment: &Environment) -> Vec<String> {
        let hosts = environment.variables.iter().filter(|variable| variable.name.ends_with("_SERVICE_HOST"));
        hosts.map(|variable| format!("{}={}", variable.name, variable.value)).collect()
    }

    #[test]
    fn given_a_service_of_two_ports_when_asked_then_there_are_the_variables_of_a_kubelet_in_its_order() {
        let dns = Service::new("default/kube-dns").cluster_ip([10, 96, 0, 10]).udp_port("dns", 53).port("dns-tcp", 53);

        let text = environment(vec![dns], "default").to_string();

        assert_eq!(
            text,
            "\
KUBE_DNS_SERVICE_HOST=10.96.0.10
KUBE_DNS_SERVICE_PORT=53
KUBE_DNS_SERVICE_PORT_DNS=53
KUBE_DNS_SERVICE_PORT_DNS_TCP=53
KUBE_DNS_PORT=udp://10.96.0.10:53
KUBE_DNS_PORT_53_UDP=udp://10.96.0.10:53
KUBE_DNS_PORT_53_UDP_PROTO=udp
KUBE_DNS_PORT_53_UDP_PORT=53
KUBE_DNS_PORT_53_UDP_ADDR=10.96.0.10
KUBE_DNS_PORT_53_TCP=tcp://10.96.0.10:53
KUBE_DNS_PORT_53_TCP_PROTO=tcp
KUBE_DNS_PORT_53_TCP_PORT=53
KUBE_DNS_PORT_53_TCP_ADDR=10.96.0.10
"
        );
    }

    #[test]
    fn given_an_ipv6_address_first_when_asked_then_it_is_the_one_and_urls_have_brackets() {
        let v6: IpAddr = "fd00::10".parse().expect("an address");
        let web = Service::new("web").cluster_ip(v6).cluster_ip([10, 96, 0, 10]).port("", 80);

        let text = environment(vec![web], "default").to_string();

        assert_eq!(
            text,
            "\
WEB_SERVICE_HOST=fd00::10
WEB_SERVICE_PORT=80
WEB_PORT=tcp://[fd00::10]:80
WEB_PORT_80_TCP=tcp://[fd00::10]:80
WEB_PORT_80_TCP_PROTO=tcp
WEB_PORT_80_TCP_PORT=80
WEB_PORT_80_TCP_ADDR=fd00::10
"
        );
    }

    #[test]
    fn given_services_of_several_namespaces_when_asked_then_a_pod_sees_its_own_and_the_api_server() {
        let services = vec![
            at("default/kubernetes", [10, 96, 0, 1]),
            at("default/web", [10, 96, 0, 2]),
            at("shop/cart", [10, 96, 0, 3]),
        ];

        let seen = hosts(&environment(services, "shop"));

        assert_eq!(seen, ["CART_SERVICE_HOST=10.96.0.3", "KUBERNETES_SERVICE_HOST=10.96.0.1"]);
    }

    #[test]
    fn given_a_service_called_kubernetes_in_the_own_namespace_when_asked_then_it_hides_the_api_server() {
        let (master, own) = (at("default/kubernetes", [10, 96, 0, 1]), at("a/kubernetes", [10, 96, 0, 2]));

        for services in [vec![master.clone(), own.clone()], vec![own, master]] {
            assert_eq!(hosts(&environment(services.clone(), "a")), ["KUBERNETES_SERVICE_HOST=10.96.0.2"]);
            assert_eq!(hosts(&environment(services, "b")), ["KUBERNETES_SERVICE_HOST=10.96.0.1"]);
        }
    }

    #[test]
    fn given_services_without_a_cluster_ip_when_asked_then_they_have_no_variables() {
        let headless = Service { cluster_ips: ClusterIps::Headless, ..at("db", [10, 96, 0, 1]) };
        let alias = Service { kind: ServiceKind::ExternalName, ..at("alias", [10, 96, 0, 2]) };
        let waiting = Service::new("waiting").port("", 80);
        let bare = Service::new("bare").cluster_ip([10, 96, 0, 3]);

        assert_eq!(environment(vec![headless, alias, waiting, bare], "default"), Environment::default());
    }

    #[test]
    fn given_two_services_that_set_one_variable_when_asked_then_the_last_name_wins_and_that_is_told() {
        let services = vec![at("a", [10, 96, 0, 1]), at("a-service", [10, 96, 0, 2])];

        let environment = environment(services, "default");

        let port = environment.variables.iter().filter(|variable| variable.name == "A_SERVICE_PORT");
        assert_eq!(port.map(|variable| variable.value.as_str()).collect::<Vec<_>>(), ["tcp://10.96.0.2:80"]);
        assert_eq!(names(&environment)[..2], ["A_SERVICE_HOST", "A_SERVICE_PORT"]);
        let services = ["a".to_owned(), "a-service".to_owned()];
        assert_eq!(environment.clashes, [Clash { variable: "A_SERVICE_PORT".into(), services }]);
    }
}
