//! What a Service says about the PROXY protocol: the annotations `kube-relay.dev/proxy-protocol` and
//! `kube-relay.dev/accept-proxy`; and whom this process believes: `--accept-proxy-from`.
//!
//! How a header looks is `serve::proxy_header` and `serve::header_decoder`; who is asked for one is `serve::introduction`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{ClusterIps, Service};
use crate::name::{Family, Protocol};
use crate::plan::PlanOptions;
use crate::problem::Problem;

const SEND: &str = "proxy-protocol";
const ACCEPT: &str = "accept-proxy";

/// What becomes of a Service that lets nobody be believed.
const CLOSED: &str = "so nobody is served over TCP";

/// Every program of this machine can have these as its source.
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// A version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeaderVersion {
    /// A line of text.
    V1,
    /// 28 bytes with IPv4, 52 with IPv6.
    V2,
}

impl HeaderVersion {
    /// The word of the annotation: `v1` or `v2`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::V1, Self::V2].into_iter().find(|version| version.as_str() == text)
    }
}

impl fmt::Display for HeaderVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How the TCP connections of a listener say who their clients are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyProtocol {
    /// The header that backends get before the client's first byte; `None`: none. From `kube-relay.dev/proxy-protocol`.
    pub send: Option<HeaderVersion>,
    /// The balancers in front, which begin each connection with a header; `None`: nobody is asked for one. The addresses
    /// of the listener's family, sorted, none within another. From `kube-relay.dev/accept-proxy` and `--accept-proxy-from`.
    ///
    /// Where it is `Some`, nobody else is served: who would come by himself could be kept apart from a balancer that forgot
    /// its header only by guessing.
    pub accept_from: Option<Arc<[IpNet]>>,
}

/// What a Service wants of its TCP listeners, before they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    send: Option<HeaderVersion>,
    accept: bool,
    /// An annotation cannot be read, so nobody is served: as if it were not there, clients could write headers themselves, and
    /// a backend that expects ours would believe them.
    is_wrong: bool,
}

impl Wish {
    /// Reads a Service's annotations. One that cannot be read is a problem, and closes: nobody is served over TCP then.
    ///
    /// Whom this process believes, the flags say alone: who may edit a Service could otherwise say that any client is any other.
    pub(crate) fn of(service: &Service, options: &PlanOptions, problems: &mut Vec<Problem>) -> Self {
        let balancers: &[IpNet] = &options.accept_proxy_from;
        let mut wish = Self::default();
        let mut complain = |text: String| {
            problems.push(Problem::error(format_args!("Service {}", service.name), "annotation", text));
        };
        if let Some(value) = service.annotations.get(SEND) {
            wish.send = HeaderVersion::parse(value.trim());
            if wish.send.is_none() {
                wish.is_wrong = true;
                complain(format!("annotation kube-relay.dev/{SEND}: {value:?} is neither v1 nor v2, {CLOSED}"));
            }
        }
        match service.annotations.get(ACCEPT).map(|value| value.trim()) {
            None | Some("false") => {}
            Some("true") => wish.accept = true,
            Some(value) => {
                wish.is_wrong = true;
                complain(format!("annotation kube-relay.dev/{ACCEPT}: {value:?} is neither true nor false, {CLOSED}"));
            }
        }
        if wish.accept && balancers.is_empty() {
            complain(format!("annotation kube-relay.dev/{ACCEPT}: --accept-proxy-from names nobody, {CLOSED}"));
        }
        let not_in_front = if wish.accept { who_is_not_in_front(service, options) } else { None };
        if let Some(who) = not_in_front {
            let text = format!("--accept-proxy-from has addresses of {who} can say that they are anybody");
            let text = format!("annotation kube-relay.dev/{ACCEPT}: {text}");
            problems.push(Problem::note(format_args!("Service {}", service.name), "annotation", text));
        }
        if wish != Self::default() && service.ports.iter().all(|port| port.protocol != Protocol::Tcp) {
            let text =
                format!("annotations kube-relay.dev/{SEND} and kube-relay.dev/{ACCEPT} are for TCP: no port has it");
            problems.push(Problem::note(format_args!("Service {}", service.name), "annotation", text));
        }
        wish
    }

    /// True where clients of a protocol are announced by balancers.
    pub(crate) fn accepts(self, protocol: Protocol) -> bool {
        self.asks() && protocol == Protocol::Tcp
    }

    /// True where backends get a header.
    pub(crate) fn sends(self) -> bool {
        self.send.is_some()
    }

    fn asks(self) -> bool {
        self.accept || self.is_wrong
    }

    /// What that means for the listeners of a family; `None` where it means nothing, as for hardly any it does not.
    pub(crate) fn at(self, family: Family, balancers: &[IpNet]) -> Option<Arc<ProxyProtocol>> {
        if self == Self::default() {
            return None;
        }
        let accept_from = self.asks().then(|| {
            let believed: &[IpNet] = if self.is_wrong { &[] } else { balancers };
            let of_family: Vec<_> = believed.iter().filter(|net| Family::of(net.addr()) == family).copied().collect();
            IpNet::aggregate(&of_family).into()
        });
        Some(Arc::new(ProxyProtocol { send: self.send, accept_from }))
    }
}

/// Who is believed, though no balancer in front has such addresses. A program of this node that connects to a virtual address
/// has that one as its source.
fn who_is_not_in_front(service: &Service, options: &PlanOptions) -> Option<&'static str> {
    let believed = |ip: &IpAddr| options.accept_proxy_from.iter().any(|net| net.contains(ip));
    let cluster_ips: &[IpAddr] = match &service.cluster_ips {
        ClusterIps::Addresses { addresses, .. } => addresses,
        ClusterIps::Unset | ClusterIps::Headless => &[],
    };
    let virtual_ips = cluster_ips.iter().chain(&*service.external_ips).chain(&*service.load_balancer_ips);
    let own = options.node_addresses.iter().chain(&options.lent_addresses).chain(&LOOPBACK).chain(virtual_ips);
    let overlaps = |pods: &IpNet| {
        let is_in = |net: &IpNet| net.contains(pods) || pods.contains(net);
        options.accept_proxy_from.iter().any(is_in)
    };
    if own.into_iter().any(believed) {
        Some("this node, whose programs")
    } else {
        options.cluster_cidrs.iter().any(overlaps).then_some("pods, which")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balancers() -> Vec<IpNet> {
        ["10.0.1.0/24", "2001:db8::/64", "10.0.0.0/24"].map(|net| net.parse().expect("a network")).into()
    }

    fn options(balancers: &[IpNet]) -> PlanOptions {
        PlanOptions {
            accept_proxy_from: balancers.into(),
            node_addresses: vec![[192, 0, 2, 1].into()],
            cluster_cidrs: vec!["10.82.0.0/16".parse().expect("a network")],
            ..PlanOptions::default()
        }
    }

    fn read(annotations: &[(&str, &str)], balancers: &[IpNet]) -> (Wish, Vec<String>) {
        let mut service = Service::new("default/web").port("http", 80);
        service.annotations.extend(annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())));
        let mut problems = Vec::new();
        let wish = Wish::of(&service, &options(balancers), &mut problems);
        (wish, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn given_a_version_when_read_then_it_is_sent() {
        for (text, version) in [("v1", HeaderVersion::V1), (" v2 ", HeaderVersion::V2)] {
            let (wish, problems) = read(&[(SEND, text)], &[]);
            assert_eq!((wish.send, problems.len()), (Some(version), 0));
        }
    }

    #[test]
    fn given_a_service_without_a_word_when_asked_then_its_listeners_have_nothing() {
        assert_eq!(read(&[(ACCEPT, "false")], &[]), (Wish::default(), vec![]));
        assert_eq!(Wish::default().at(Family::V4, &balancers()), None);
    }

    #[test]
    fn given_balancers_when_accepted_then_each_listener_has_those_of_its_family() {
        let (wish, problems) = read(&[(ACCEPT, "true")], &balancers());

        assert_eq!(problems, [] as [&str; 0]);
        let shown = |family| {
            let protocol = wish.at(family, &balancers()).expect("it accepts");
            let nets = protocol.accept_from.as_ref().expect("balancers");
            nets.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(shown(Family::V4), ["10.0.0.0/23"]);
        assert_eq!(shown(Family::V6), ["2001:db8::/64"]);
        assert!(wish.accepts(Protocol::Tcp) && !wish.accepts(Protocol::Udp));
    }

    #[test]
    fn given_nobody_to_believe_when_accepted_then_nobody_is_let_in_and_that_is_said() {
        let (wish, problems) = read(&[(ACCEPT, "true")], &[]);

        let protocol = wish.at(Family::V4, &[]).expect("it accepts");
        assert!(protocol.accept_from.as_deref().is_some_and(<[IpNet]>::is_empty));
        assert!(problems[0].contains("--accept-proxy-from names nobody"), "{problems:?}");
    }

    #[test]
    fn given_a_service_without_a_port_of_tcp_when_read_then_that_it_changes_nothing_is_told() {
        let mut service = Service::new("default/dns");
        service.annotations.insert(SEND.into(), "v2".into());
        let mut problems = Vec::new();

        Wish::of(&service, &PlanOptions::default(), &mut problems);

        assert_eq!(problems.len(), 1);
        assert!(problems[0].to_string().ends_with("are for TCP: no port has it"), "{problems:?}");
    }

    #[test]
    fn given_another_word_when_read_then_nobody_is_served_and_it_is_told() {
        let cases = [
            (SEND, "V2", "proxy-protocol: \"V2\" is neither v1 nor v2, so nobody is served over TCP"),
            (ACCEPT, "yes", "accept-proxy: \"yes\" is neither true nor false, so nobody is served over TCP"),
        ];
        for (annotation, value, said) in cases {
            let (wish, problems) = read(&[(annotation, value)], &balancers());

            let protocol = wish.at(Family::V4, &balancers()).expect("it closes");
            assert!(protocol.accept_from.as_deref().is_some_and(<[IpNet]>::is_empty), "{annotation}");
            assert_eq!(problems, [format!("Service default/web: annotation kube-relay.dev/{said}")]);
        }
    }

    #[test]
    fn given_balancers_that_have_addresses_of_this_node_when_read_then_that_is_told() {
        let told = |net: &str| read(&[(ACCEPT, "true")], &[net.parse().expect("a network")]).1.len();

        assert_eq!(["10.0.0.9/32", "192.0.2.0/24", "127.0.0.1/32", "0.0.0.0/0", "::/0"].map(told), [0, 1, 1, 1, 1]);
        assert_eq!(
            ["10.82.3.0/24", "10.80.0.0/12", "10.83.0.0/16"].map(told),
            [1, 1, 0],
            "pods are not in front, either"
        );
    }

    #[test]
    fn given_balancers_that_have_the_services_own_addresses_when_read_then_that_is_told() {
        let mut service = Service::new("default/web").port("http", 80);
        service.annotations.insert(ACCEPT.into(), "true".into());
        service.cluster_ips = ClusterIps::Addresses { addresses: vec![[10, 96, 0, 10].into()], allocated: false };
        service.external_ips.push([198, 51, 100, 1].into());
        service.load_balancer_ips.push([203, 0, 113, 1].into());
        let told = |net: &str| {
            let mut problems = Vec::new();
            Wish::of(&service, &options(&[net.parse().expect("a network")]), &mut problems);
            problems.len()
        };

        let nets = ["10.96.0.0/16", "198.51.100.1/32", "203.0.113.0/24", "203.0.113.2/32"];
        assert_eq!(nets.map(told), [1, 1, 1, 0], "a program of this node that connects there has that source");
    }
}
