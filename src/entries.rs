//! Where a Service is to be reached: one entry for each address and port, and which of them are refused.
//!
//! What happens to traffic that arrives there is decided in `service_plan`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::health_port;
use crate::layout::ListenerKind;
use crate::model::{Service, ServicePort};
use crate::name::{Family, ListenKey, Protocol};
use crate::plan::{Expose, PlanOptions};
use crate::problem::Problem;

/// One place where clients reach one port of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Why it is there.
    pub(crate) kind: ListenerKind,
    /// Where it is.
    pub(crate) key: ListenKey,
    /// Index into the Service's ports.
    pub(crate) port: usize,
    /// True where the static source chose the address or the number.
    pub(crate) allocated: bool,
}

impl Entry {
    /// The family that it is served in.
    pub(crate) fn family(&self) -> Family {
        Family::of(self.key.ip())
    }
}

/// The entries of one Service.
#[derive(Debug)]
pub(crate) struct Entries<'a> {
    service: &'a Service,
    options: &'a PlanOptions,
    /// The families that the Service exists in: those that it has a cluster IP of.
    pub(crate) families: Vec<Family>,
    /// In order of kind, then of port: where two have one key, the first is meant.
    pub(crate) list: Vec<Entry>,
    /// Where load balancers ask for its health, by number and addresses; `None` where they are not to, or cannot.
    pub(crate) health_port: Option<(u16, Arc<[IpAddr]>)>,
    /// What is refused.
    pub(crate) problems: Vec<Problem>,
}

impl<'a> Entries<'a> {
    /// All entries of a Service on this node.
    pub(crate) fn of(service: &'a Service, options: &'a PlanOptions) -> Self {
        let (families, list, problems) = (Vec::new(), Vec::new(), Vec::new());
        let mut entries = Self { service, options, families, list, health_port: None, problems };
        entries.find_families();
        if !entries.families.is_empty() {
            entries.refuse_sctp();
            entries.open_cluster_ips();
            entries.open_node_ports();
            entries.open_external_ips();
            entries.open_load_balancer_ips();
            entries.open_exposed();
            entries.open_health_port();
        }
        entries
    }

    /// All keys that it asks for; one may be there twice.
    pub(crate) fn keys(&self) -> impl Iterator<Item = ListenKey> {
        let health = self.health_port.iter().flat_map(|(number, addresses)| health_port::keys(*number, addresses));
        self.list.iter().map(|entry| entry.key).chain(health)
    }

    fn find_families(&mut self) {
        for family in [Family::V4, Family::V6] {
            let Some(address) = self.service.cluster_ips.of(family) else { continue };
            if self.service.families.is_empty() || self.service.families.contains(&family) {
                self.families.push(family);
            } else {
                self.refuse("family", format!("cluster IP {address} is not served: spec.ipFamilies lacks {family}"));
            }
        }
    }

    fn refuse_sctp(&mut self) {
        for port in self.service.ports.iter().filter(|port| port.protocol == Protocol::Sctp) {
            self.refuse("sctp", format!("port {}/SCTP is not served: this proxy relays TCP and UDP", port.port));
        }
    }

    fn open_cluster_ips(&mut self) {
        let ips = &self.service.cluster_ips;
        let served: Vec<IpAddr> = self.families.iter().filter_map(|family| ips.of(*family)).collect();
        for ip in served {
            self.open_ports(ListenerKind::ClusterIp, ip, ips.allocated());
        }
    }

    fn open_node_ports(&mut self) {
        let addresses = self.in_our_families(&self.options.node_port_addresses);
        for (index, port) in ports(self.service) {
            let Some(number) = port.node_port else { continue };
            self.list.extend(addresses.iter().map(|ip| Entry {
                kind: ListenerKind::NodePort,
                key: ListenKey::new(*ip, number, port.protocol),
                port: index,
                allocated: port.node_port_allocated,
            }));
        }
    }

    fn open_external_ips(&mut self) {
        for ip in &self.service.external_ips {
            match self.refusal_of_family(*ip).or_else(|| self.refusal_of_external_ip(*ip)) {
                Some((reason, why)) => self.refuse(reason, format!("external IP {ip} is not served: {why}")),
                None => self.open_ports(ListenerKind::ExternalIp, *ip, false),
            }
        }
    }

    fn open_load_balancer_ips(&mut self) {
        let own = self.service.load_balancer_ips.iter().filter(|ip| self.is_own(**ip));
        let of_nodes: BTreeSet<Family> = own.map(|ip| Family::of(*ip)).collect();
        let mut elsewhere = Vec::new();
        for ip in &self.service.load_balancer_ips {
            match self.refusal_of_family(*ip) {
                Some((reason, why)) => self.refuse(reason, format!("load-balancer IP {ip} is not served: {why}")),
                None if of_nodes.contains(&Family::of(*ip)) && !self.is_own(*ip) => elsewhere.push(ip.to_string()),
                None => self.open_ports(ListenerKind::LoadBalancerIp, *ip, false),
            }
        }
        if !elsewhere.is_empty() {
            self.note_other_nodes(&elsewhere);
        }
    }

    /// A balancer that nodes are themselves (ServiceLB of k3s) lists their addresses, in each family. Whoever made the others' local here
    /// would cut this node off from those nodes.
    fn note_other_nodes(&mut self, ips: &[String]) {
        let object = format_args!("Service {}", self.service.name);
        let text =
            format!("load-balancer IPs {} are left to other nodes, as one of this node is among them", ips.join(", "));
        self.problems.push(Problem::note(object, "node_address", text));
    }

    fn open_exposed(&mut self) {
        for expose in self.options.expose.iter().filter(|expose| expose.service == self.service.name) {
            let before = self.list.len();
            let addresses = self.in_our_families(&listen_addresses(expose, &self.options.node_addresses));
            for (index, port) in ports(self.service).filter(|(_, port)| expose.names(port)) {
                self.list.extend(addresses.iter().map(|ip| Entry {
                    kind: ListenerKind::Exposed,
                    key: ListenKey::new(*ip, expose.listen.port(), port.protocol),
                    port: index,
                    allocated: false,
                }));
            }
            if self.list.len() == before {
                let why = "the Service has no such port, or no cluster IP of that family";
                self.refuse("expose", format!("--expose {expose} opens nothing: {why}"));
            }
        }
    }

    /// On the addresses of node ports, also those of the other family: a balancer does not have to ask over the family
    /// that it forwards.
    fn open_health_port(&mut self) {
        let number = match health_port::number_of(self.service) {
            Ok(Some(number)) => number,
            Ok(None) => return,
            Err(why) => return self.refuse("health_check", why.into()),
        };
        let mut addresses: Arc<[IpAddr]> = self.options.node_port_addresses.as_slice().into();
        let at = |key| self.list.iter().find(|entry| entry.key == key);
        let taken = health_port::keys(number, &addresses).find_map(at).copied();
        if let Some(taken) = taken {
            let (kind, port) = (taken.kind.in_words(), &self.service.ports[taken.port].name);
            let remedy = "give one of them another number";
            self.refuse("conflict", format!("health port {number} is taken by port {port:?} ({kind}): {remedy}"));
            addresses = [].into();
        } else if addresses.is_empty() {
            let why = "--nodeport-addresses names no address of this node";
            self.refuse("health_check", format!("health port {number} is not answered: {why}"));
        }
        self.health_port = Some((number, addresses));
    }

    /// Opens every port at an address, under the Service's own numbers.
    fn open_ports(&mut self, kind: ListenerKind, ip: IpAddr, allocated: bool) {
        self.list.extend(ports(self.service).map(|(index, port)| Entry {
            kind,
            key: ListenKey::new(ip, port.port, port.protocol),
            port: index,
            allocated,
        }));
    }

    fn in_our_families(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        addresses.iter().copied().filter(|ip| self.families.contains(&Family::of(*ip))).collect()
    }

    fn refusal_of_family(&self, ip: IpAddr) -> Option<Refusal> {
        let family = Family::of(ip);
        (!self.families.contains(&family)).then(|| ("family", format!("the Service has no {family} cluster IP")))
    }

    /// Whoever may edit a Service could take any address with it (CVE-2020-8554): closed unless opened.
    fn refusal_of_external_ip(&self, ip: IpAddr) -> Option<Refusal> {
        if self.is_own(ip) {
            return Some(("external_ip", "it is an address of this node".into()));
        }
        let allowed = self.options.allowed_external_cidrs.iter().any(|net| net.contains(&ip));
        (!allowed).then(|| ("external_ip", format!("allow it with --allowed-external-cidrs {}", IpNet::from(ip))))
    }

    /// True where this node goes by the address, and has not got it for a Service.
    fn is_own(&self, ip: IpAddr) -> bool {
        let PlanOptions { node_addresses, lent_addresses, .. } = self.options;
        node_addresses.contains(&ip) && !lent_addresses.contains(&ip)
    }

    fn refuse(&mut self, reason: &'static str, message: String) {
        self.problems.push(Problem::error(format_args!("Service {}", self.service.name), reason, message));
    }
}

/// Reason word, and the rest of the sentence.
type Refusal = (&'static str, String);

/// The ports that can be served at all, with their indices.
fn ports(service: &Service) -> impl Iterator<Item = (usize, &ServicePort)> {
    service.ports.iter().enumerate().filter(|(_, port)| port.protocol != Protocol::Sctp)
}

/// A wildcard stands for the addresses of this node in its family: listeners never bind a wildcard.
fn listen_addresses(expose: &Expose, node_addresses: &[IpAddr]) -> Vec<IpAddr> {
    let ip = expose.listen.ip();
    if !ip.is_unspecified() {
        return vec![ip];
    }
    node_addresses.iter().copied().filter(|own| Family::of(*own) == Family::of(ip)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ClusterIps, ServiceKind, ServicePort, TrafficPolicy};

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn web() -> Service {
        Service::new("default/web").cluster_ip(ip("10.96.0.10")).port("http", 80)
    }

    fn node() -> PlanOptions {
        PlanOptions {
            node_port_addresses: vec![ip("127.0.0.1"), ip("::1")],
            node_addresses: vec![ip("127.0.0.1"), ip("192.0.2.1"), ip("::1")],
            ..PlanOptions::default()
        }
    }

    /// `kind key` of each entry, in order.
    fn listed(service: &Service, options: &PlanOptions) -> Vec<String> {
        let entries = Entries::of(service, options);
        entries.list.iter().map(|entry| format!("{} {}", entry.kind.as_str(), entry.key)).collect()
    }

    fn reasons(service: &Service, options: &PlanOptions) -> Vec<String> {
        Entries::of(service, options).problems.iter().map(|problem| problem.reason.to_string()).collect()
    }

    #[test]
    fn t018_given_families_in_the_order_v6_v4_when_opened_then_each_family_has_its_own_address() {
        let mut service = web().cluster_ip(ip("fd00::10"));
        service.cluster_ips =
            ClusterIps::Addresses { addresses: vec![ip("fd00::10"), ip("10.96.0.10")], allocated: false };
        service.families = vec![Family::V6, Family::V4];

        assert_eq!(listed(&service, &node()), ["clusterIP 10.96.0.10:80/TCP", "clusterIP [fd00::10]:80/TCP"]);
    }

    #[test]
    fn t019_given_no_families_when_opened_then_the_address_tells_the_family() {
        assert_eq!(Entries::of(&web(), &node()).families, [Family::V4]);
    }

    #[test]
    fn t020_given_a_single_stack_v6_service_when_opened_then_nothing_is_there_for_v4() {
        let service = Service::new("default/web").cluster_ip(ip("fd00::10")).port("http", 80).node_port(30000);

        assert_eq!(listed(&service, &node()), ["clusterIP [fd00::10]:80/TCP", "nodePort [::1]:30000/TCP"]);
    }

    #[test]
    fn given_an_address_of_a_family_that_the_service_denies_when_opened_then_it_is_a_problem() {
        let mut service = web();
        service.families = vec![Family::V6];

        assert_eq!(listed(&service, &node()), Vec::<String>::new());
        assert_eq!(reasons(&service, &node()), ["family"]);
    }

    #[test]
    fn given_addresses_of_nodes_for_a_load_balancer_when_opened_then_those_of_other_nodes_are_left_to_them() {
        let mut service = web();
        service.load_balancer_ips = vec![ip("192.0.2.1"), ip("192.0.2.2"), ip("192.0.2.3")].into();
        let elsewhere = PlanOptions { node_addresses: vec![ip("198.51.100.1")], ..node() };
        let lent = PlanOptions { lent_addresses: vec![ip("192.0.2.1")], ..node() };

        assert_eq!(listed(&service, &node()), ["clusterIP 10.96.0.10:80/TCP", "loadBalancerIP 192.0.2.1:80/TCP"]);
        assert_eq!(reasons(&service, &node()), ["node_address"]);
        for options in [elsewhere, lent] {
            assert_eq!(listed(&service, &options).len(), 4, "nothing says that they are nodes");
            assert_eq!(reasons(&service, &options), [] as [&str; 0]);
        }

        let mut both = web();
        both.cluster_ips =
            ClusterIps::Addresses { addresses: vec![ip("10.96.0.10"), ip("fd00::10")], allocated: false };
        both.families = vec![Family::V4, Family::V6];
        both.load_balancer_ips = vec![ip("192.0.2.1"), ip("2001:db8::1")].into();
        assert_eq!(reasons(&both, &node()), [] as [&str; 0], "one of each family may be one balancer's");
    }

    #[test]
    fn t030_t031_given_one_number_for_three_protocols_when_opened_then_tcp_and_udp_are_there_and_sctp_is_a_problem() {
        let mut service = web().udp_port("quic", 80).port("http3", 81);
        service.ports[2].protocol = Protocol::Sctp;
        for port in &mut service.ports {
            port.node_port = Some(30000);
        }
        let options = PlanOptions { node_port_addresses: vec![ip("127.0.0.1")], ..node() };

        assert_eq!(
            listed(&service, &options),
            [
                "clusterIP 10.96.0.10:80/TCP",
                "clusterIP 10.96.0.10:80/UDP",
                "nodePort 127.0.0.1:30000/TCP",
                "nodePort 127.0.0.1:30000/UDP",
            ]
        );
        assert_eq!(reasons(&service, &options), ["sctp"]);
    }

    #[test]
    fn t032_given_250_ports_when_opened_then_all_are_there() {
        let service = (1..=250).fold(web(), |service, number| service.port(&format!("p{number}"), 1000 + number));

        assert_eq!(listed(&service, &node()).len(), 251);
    }

    #[test]
    fn t021_given_external_ips_of_both_families_when_allowed_then_only_families_of_the_service_are_served() {
        let mut service = web();
        service.external_ips = vec![ip("203.0.113.1"), ip("2001:db8::1")].into();
        let all = ["0.0.0.0/0", "::/0"].map(|net| net.parse().expect("a net")).to_vec();
        let options = PlanOptions { allowed_external_cidrs: all, ..node() };

        assert_eq!(listed(&service, &options)[1..], ["externalIP 203.0.113.1:80/TCP"]);
        assert_eq!(reasons(&service, &options), ["family"]);
    }

    #[test]
    fn t122_given_an_external_ip_that_nobody_allowed_when_opened_then_it_is_refused_with_the_remedy() {
        let mut service = web();
        service.external_ips = vec![ip("203.0.113.1")].into();

        let options = node();
        let problems = Entries::of(&service, &options).problems;

        assert_eq!(problems[0].reason, "external_ip");
        assert!(problems[0].message.contains("--allowed-external-cidrs 203.0.113.1/32"), "{}", problems[0].message);
    }

    #[test]
    fn t123_given_an_external_ip_of_the_node_itself_when_opened_then_no_allow_list_helps() {
        let mut service = web();
        service.external_ips = vec![ip("192.0.2.1")].into();
        let allowed_external_cidrs = vec!["192.0.2.0/24".parse().expect("a net")];
        let options = PlanOptions { allowed_external_cidrs, ..node() };

        assert_eq!(listed(&service, &options).len(), 1);
        assert_eq!(reasons(&service, &options), ["external_ip"]);

        let lent = PlanOptions { lent_addresses: vec![ip("192.0.2.1")], ..options };
        assert!(reasons(&service, &lent).is_empty(), "it was given to the node for a Service, say");
    }

    #[test]
    fn t022_given_a_load_balancer_ip_when_opened_then_the_service_port_is_there() {
        let mut service = web();
        service.load_balancer_ips = vec![ip("198.51.100.1")].into();

        assert_eq!(listed(&service, &node())[1..], ["loadBalancerIP 198.51.100.1:80/TCP"]);
    }

    /// A load balancer's, under policy Local.
    fn balanced() -> Service {
        let health_check_node_port = Some(31000);
        let (kind, external_policy) = (ServiceKind::LoadBalancer, TrafficPolicy::Local);
        Service { kind, external_policy, health_check_node_port, ..web() }
    }

    #[test]
    fn t206_given_the_addresses_of_node_ports_when_a_load_balancer_is_to_ask_then_it_is_there_in_either_family() {
        let health_keys = |addresses: &[&str]| {
            let node_port_addresses = addresses.iter().map(|address| ip(address)).collect();
            let (service, options) = (balanced(), PlanOptions { node_port_addresses, ..node() });
            let entries = Entries::of(&service, &options);
            let reasons: Vec<_> = entries.problems.iter().map(|problem| problem.reason.to_string()).collect();
            (entries.keys().skip(entries.list.len()).map(|key| key.to_string()).collect::<Vec<_>>(), reasons)
        };

        let both = ["192.0.2.1:31000/TCP", "[2001:db8::1]:31000/TCP"].map(str::to_owned).to_vec();
        assert_eq!(health_keys(&["192.0.2.1", "2001:db8::1"]), (both, vec![]));
        assert_eq!(health_keys(&[]), (vec![], vec!["health_check".to_owned()]));
    }

    #[test]
    fn t028_given_no_number_when_a_load_balancer_is_to_ask_then_it_is_a_problem_and_the_service_is_there() {
        let service = Service { health_check_node_port: None, ..balanced() };

        assert_eq!(reasons(&service, &node()), ["health_check"]);
        assert_eq!(listed(&service, &node()), ["clusterIP 10.96.0.10:80/TCP"]);
    }

    #[test]
    fn given_the_number_of_its_own_node_port_when_a_load_balancer_is_to_ask_then_the_node_port_has_it() {
        let mut service = balanced();
        service.ports[0].node_port = Some(31000);

        let options = node();
        let entries = Entries::of(&service, &options);

        let said = r#"health port 31000 is taken by port "http" (node port): give one of them another number"#;
        assert_eq!(entries.problems[0].message, said);
        assert_eq!(entries.keys().count(), entries.list.len());
    }

    #[test]
    fn given_a_wildcard_to_expose_when_opened_then_it_is_each_node_address_of_its_family() {
        let service = web().udp_port("quic", 80);
        let listen = "0.0.0.0:8080".parse().expect("an address");
        let expose = Expose { listen, service: service.name.clone(), port: "80".into() };
        let options = PlanOptions { expose: vec![expose], ..node() };

        assert_eq!(
            listed(&service, &options)[2..],
            [
                "exposed 127.0.0.1:8080/TCP",
                "exposed 192.0.2.1:8080/TCP",
                "exposed 127.0.0.1:8080/UDP",
                "exposed 192.0.2.1:8080/UDP",
            ]
        );
    }

    #[test]
    fn given_an_unknown_port_to_expose_when_opened_then_it_is_a_problem() {
        let listen = "127.0.0.1:8080".parse().expect("an address");
        let expose = Expose { listen, service: web().name, port: "https".into() };
        let options = PlanOptions { expose: vec![expose], ..node() };

        assert_eq!(reasons(&web(), &options), ["expose"]);
    }

    #[test]
    fn t105_given_the_addresses_that_node_ports_are_served_on_when_opened_then_there_is_no_other() {
        let service = web().cluster_ip(ip("fd00::10")).node_port(30000);
        let on = |addresses: &[&str]| {
            let node_port_addresses = addresses.iter().map(|address| ip(address)).collect();
            listed(&service, &PlanOptions { node_port_addresses, ..node() })[2..].to_vec()
        };

        assert_eq!(on(&["192.0.2.1"]), ["nodePort 192.0.2.1:30000/TCP"]);
        assert_eq!(
            on(&["192.0.2.1", "198.51.100.1", "2001:db8::1"]),
            ["192.0.2.1:30000/TCP", "198.51.100.1:30000/TCP", "[2001:db8::1]:30000/TCP"]
                .map(|at| format!("nodePort {at}"))
        );
        assert_eq!(on(&[]), [] as [&str; 0], "none is no error");
    }

    #[test]
    fn given_a_port_without_node_port_when_opened_then_only_the_others_are_on_the_node() {
        let mut service = web().port("https", 443).node_port(30443);
        service.ports.push(ServicePort::new("plain", Protocol::Tcp, 8080));
        let options = PlanOptions { node_port_addresses: vec![ip("127.0.0.1")], ..node() };

        assert_eq!(listed(&service, &options)[3..], ["nodePort 127.0.0.1:30443/TCP"]);
    }
}
