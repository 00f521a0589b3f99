//! What a relay is to do on this machine, as far as it decides what the machine has to be like. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use super::fact::Unreadable;
use crate::config::RunConfig;
use crate::guard::VipGuard;
use crate::name::{Family, ListenKey, Protocol};
use crate::plan::ListenerKind;
use crate::reply_mark::ReplyMark;
use crate::status::Report;

/// A process of this program that runs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Running {
    /// As it says itself.
    pub(super) pid: u32,
    /// True where that process is seen from here: it may be in another PID namespace.
    pub(super) visible: bool,
}

impl Running {
    /// A relay that says that it has this pid; `name` is what the kernel calls a process here with the same one. We have
    /// that pid ourselves where both are the first process of a container.
    pub(super) fn new(pid: u32, name: &str, ourselves: u32) -> Self {
        Self { pid, visible: name.trim_end() == "kube-relay" && pid != ourselves }
    }
}

/// Where a relay is to listen, and by what means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Duty {
    /// Where; `None`: nobody has told which Services there are.
    pub(super) listeners: Option<Vec<(ListenKey, ListenerKind)>>,
    /// From `--service-node-port-range`.
    pub(super) node_ports: RangeInclusive<u16>,
    /// By which number its routes are known; `None`: it makes none. From `--vip-routes` and `--route-protocol`.
    pub(super) routes: Option<u8>,
    /// What it marks answers to clients' addresses with. From `--reply-mark`.
    pub(super) reply_mark: ReplyMark,
    /// True where it guards their addresses, if the kernel lets it. From `--vip-guard`.
    pub(super) guards: bool,
    /// True where it has interfaces not answer ARP for addresses that others announce. From `--tune-sysctls`.
    pub(super) tunes: bool,
    /// From `--proxy-name`: another proxy serves all other Services.
    pub(super) proxy_name: Option<String>,
    /// True where it serves a whole cluster.
    pub(super) is_cluster: bool,
    /// Services that ask for their clients' addresses, as far as Services are known.
    pub(super) preserving: Vec<String>,
    /// The one that is at it already.
    pub(super) running: Option<Running>,
}

impl Duty {
    pub(super) fn new(config: &RunConfig, services: Option<&Report>, running: Option<Running>) -> Self {
        Self {
            listeners: services.map(listeners),
            node_ports: config.plan.service_node_port_range.clone(),
            routes: config.vips.as_ref().map(|vips| vips.protocol),
            reply_mark: config.reply_path.mark,
            guards: config.vip_guard != VipGuard::None,
            tunes: config.vips.as_ref().is_some_and(|vips| vips.tune_sysctls),
            proxy_name: config.plan.proxy_name.clone(),
            is_cluster: config.source.is_cluster(),
            preserving: services.map(preserving).unwrap_or_default(),
            running,
        }
    }

    /// False where nobody has told which Services there are.
    pub(super) fn is_known(&self) -> bool {
        self.listeners.is_some()
    }

    /// All listeners that are known of.
    pub(super) fn listeners(&self) -> impl Iterator<Item = &(ListenKey, ListenerKind)> {
        self.listeners.iter().flatten()
    }

    /// The keys of all listeners for which this holds.
    pub(super) fn keys(&self, holds: impl Fn(&ListenKey, ListenerKind) -> bool) -> Vec<ListenKey> {
        self.listeners().filter(|(key, kind)| holds(key, *kind)).map(|(key, _)| *key).collect()
    }

    /// Addresses that belong to Services, not to this machine; with true, those that neighbours may ask for.
    pub(super) fn vips(&self) -> BTreeMap<IpAddr, bool> {
        let mut vips = BTreeMap::new();
        for (key, kind) in self.listeners().filter(|(key, _)| !key.ip().is_loopback()) {
            match kind {
                ListenerKind::ClusterIp => drop(vips.insert(key.ip(), false)),
                ListenerKind::ExternalIp | ListenerKind::LoadBalancerIp => drop(vips.entry(key.ip()).or_insert(true)),
                ListenerKind::NodePort | ListenerKind::Exposed => {}
            }
        }
        vips
    }

    /// True where something is to be served at addresses of this family.
    pub(super) fn serves(&self, family: Family) -> bool {
        self.listeners().any(|(key, _)| Family::of(key.ip()) == family)
    }

    /// True where datagrams are to be served.
    pub(super) fn serves_udp(&self) -> bool {
        self.listeners().any(|(key, _)| key.protocol == Protocol::Udp)
    }

    /// True where no other proxy is expected beside it, and traffic comes by addresses that another one would take.
    pub(super) fn is_alone(&self) -> bool {
        self.proxy_name.is_none() && (self.is_cluster || !self.vips().is_empty())
    }

    /// A relay that runs, but is not seen from here: what is true of our own process need not be of that one.
    pub(super) fn out_of_sight(&self) -> Option<Unreadable> {
        let running = self.running.filter(|running| !running.visible)?;
        let what = format!("the running kube-relay (pid {} where it runs)", running.pid);
        Some(Unreadable::new(what, "it cannot be looked at from here, as its processes have numbers of their own"))
    }

    /// Where the kernel tells about the process that is at it, or would be: that of the running relay, else our own.
    pub(super) fn process_folder(&self) -> String {
        match self.running {
            Some(Running { pid, visible: true }) => format!("/proc/{pid}"),
            _ => "/proc/self".to_owned(),
        }
    }

    /// Whose folder that is, in a sentence.
    pub(super) fn process(&self) -> String {
        match self.running {
            Some(Running { pid, visible: true }) => format!("the running kube-relay (pid {pid})"),
            _ => "a process started like this one".to_owned(),
        }
    }
}

fn preserving(report: &Report) -> Vec<String> {
    let preserving = report.services.iter().filter(|service| service.source_address.is_preserved());
    preserving.map(|service| format!("{}/{}", service.namespace, service.name)).collect()
}

fn listeners(report: &Report) -> Vec<(ListenKey, ListenerKind)> {
    let of_service = report.services.iter().flat_map(|service| {
        let ports = service.ports.iter().flat_map(|port| {
            let listeners = port.listeners.iter();
            listeners.filter_map(|listener| {
                let address: SocketAddr = listener.address.parse().ok()?;
                Some((ListenKey::at(address, port.protocol), listener.kind))
            })
        });
        let health = service.health_port.iter().flat_map(|port| &port.addresses);
        let health = health
            .filter_map(|address| Some((ListenKey::at(address.parse().ok()?, Protocol::Tcp), ListenerKind::NodePort)));
        ports.chain(health)
    });
    of_service.collect()
}

/// Duties for tests.
#[cfg(test)]
pub(super) mod sample {
    use super::*;
    use crate::config::{DEFAULT_NODE_PORT_RANGE, DEFAULT_ROUTE_PROTOCOL};

    /// Nothing is known of Services.
    pub(in crate::doctor) fn unknown() -> Duty {
        Duty {
            listeners: None,
            node_ports: DEFAULT_NODE_PORT_RANGE,
            routes: Some(DEFAULT_ROUTE_PROTOCOL),
            reply_mark: ReplyMark::DEFAULT,
            guards: true,
            tunes: false,
            proxy_name: None,
            is_cluster: false,
            preserving: Vec::new(),
            running: None,
        }
    }

    /// Listeners like `clusterIP 10.96.0.10:80/TCP`.
    pub(in crate::doctor) fn duty(listeners: &[&str]) -> Duty {
        Duty { listeners: Some(listeners.iter().map(|text| listener(text)).collect()), ..unknown() }
    }

    fn listener(text: &str) -> (ListenKey, ListenerKind) {
        let (kind, key) = text.split_once(' ').expect("a kind");
        let (address, protocol) = key.split_once('/').expect("a protocol");
        let protocol = if protocol == "UDP" { Protocol::Udp } else { Protocol::Tcp };
        let kind = serde_json::from_value(kind.into()).expect("a kind");
        (ListenKey::at(address.parse().expect("an address"), protocol), kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_listeners_when_asked_for_vips_then_those_of_services_outside_loopback_are_named() {
        let duty = sample::duty(&[
            "clusterIP 127.96.0.1:80/TCP",
            "clusterIP 10.96.0.1:80/TCP",
            "externalIP 10.96.0.1:443/TCP",
            "loadBalancerIP 203.0.113.7:80/UDP",
            "nodePort 192.0.2.5:30000/TCP",
        ]);

        let vips: Vec<_> = duty.vips().into_iter().collect();

        assert_eq!(vips, [([10, 96, 0, 1].into(), false), ([203, 0, 113, 7].into(), true)]);
        assert!(duty.serves_udp() && !duty.serves(Family::V6) && duty.is_alone());
    }

    #[test]
    fn given_the_pid_of_a_relay_when_somebody_else_or_we_have_it_here_then_it_is_out_of_sight() {
        let duty = |pid, name| Duty { running: Some(Running::new(pid, name, 1)), ..sample::unknown() };

        let (seen, other, ourselves) = (duty(7, "kube-relay\n"), duty(7, "systemd\n"), duty(1, "kube-relay\n"));

        assert_eq!((seen.out_of_sight(), seen.process_folder()), (None, "/proc/7".into()));
        assert_eq!(sample::unknown().out_of_sight(), None, "none runs");
        for hidden in [other, ourselves] {
            let why = hidden.out_of_sight().expect("it is not seen").to_string();
            assert!(why.contains("it cannot be looked at from here"), "{why}");
            assert_eq!(hidden.process_folder(), "/proc/self");
        }
    }

    #[test]
    fn given_loopback_alone_when_asked_then_no_other_proxy_is_in_the_way() {
        assert!(!sample::duty(&["clusterIP 127.96.0.1:80/TCP"]).is_alone());
        assert!(!sample::unknown().is_known());
    }

    #[test]
    fn given_a_report_when_read_then_health_ports_are_listeners_too() {
        let report = crate::live::sample::status().report();

        let keys = listeners(&report);

        assert!(keys.iter().any(|(key, kind)| key.port() == 30080 && *kind == ListenerKind::NodePort), "{keys:?}");
    }
}
