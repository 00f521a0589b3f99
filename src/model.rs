//! What the cluster said: Services by name, endpoints by slice name, and which Services a change touches.
//!
//! Objects arrive here already reduced to the fields that a proxy reads; decoding lives in the
//! sources (`manifest`). What follows from the objects is decided in `endpoints` and `plan`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::frozen::pack;
use crate::name::{Family, ObjectName, Protocol};
use crate::rare::Rare;

/// Seconds that a client stays with its backend where a Service asks for ClientIP and says no time.
pub const DEFAULT_AFFINITY_TIMEOUT: Duration = Duration::from_secs(10_800);

/// A Service, as far as a proxy reads it. Missing and empty lists mean the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// From `metadata.namespace` and `metadata.name`.
    pub name: ObjectName,
    /// From `metadata.creationTimestamp`, RFC 3339 text; the older of two claimants wins. Empty is older than all.
    pub created: Arc<str>,
    /// From the label `service.kubernetes.io/service-proxy-name`.
    pub proxy_name: Option<Arc<str>>,
    /// True with the label `service.kubernetes.io/headless`, whatever its value: its slices are not looked at.
    pub slices_hidden: bool,
    /// From `spec.type` (default ClusterIP).
    pub kind: ServiceKind,
    /// From `spec.externalName`; `None` where it is empty. For DNS alone.
    pub external_name: Option<Arc<str>>,
    /// From `spec.clusterIP` and `spec.clusterIPs`.
    pub cluster_ips: ClusterIps,
    /// From `spec.ipFamilies`, in its order; empty where the Service does not say.
    pub families: Vec<Family>,
    /// From `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// From `spec.externalIPs`.
    pub external_ips: Rare<IpAddr>,
    /// From `status.loadBalancer.ingress[]`: the addresses that are to be captured here (`ipMode` VIP or absent).
    pub load_balancer_ips: Rare<IpAddr>,
    /// From `spec.loadBalancerSourceRanges`.
    pub source_ranges: Rare<IpNet>,
    /// From `spec.sessionAffinity` and `spec.sessionAffinityConfig.clientIP.timeoutSeconds`; `None` without affinity.
    pub affinity_timeout: Option<Duration>,
    /// From `spec.externalTrafficPolicy` (default Cluster).
    pub external_policy: TrafficPolicy,
    /// From `spec.internalTrafficPolicy` (default Cluster).
    pub internal_policy: TrafficPolicy,
    /// From `spec.healthCheckNodePort`; `None` for 0.
    pub health_check_node_port: Option<u16>,
    /// From `spec.allocateLoadBalancerNodePorts` (default true). Read by the static source only.
    pub allocate_node_ports: bool,
    /// From `spec.trafficDistribution`. Read by the static source only.
    pub traffic_distribution: Option<Arc<str>>,
    /// True where `spec.selector` names at least one label: somebody else is to write the slices.
    pub has_selector: bool,
    /// The annotations under `kube-relay.dev/`, without that prefix.
    pub annotations: BTreeMap<Arc<str>, Arc<str>>,
}

impl Service {
    /// A ClusterIP Service without address and ports, named `namespace/name` (or `name` in `default`).
    ///
    /// For Services built in code; every field can be set afterwards.
    pub fn new(name: &str) -> Self {
        Self {
            name: ObjectName::parse(name),
            created: "".into(),
            proxy_name: None,
            slices_hidden: false,
            kind: ServiceKind::ClusterIp,
            external_name: None,
            cluster_ips: ClusterIps::Unset,
            families: Vec::new(),
            ports: Vec::new(),
            external_ips: Rare::default(),
            load_balancer_ips: Rare::default(),
            source_ranges: Rare::default(),
            affinity_timeout: None,
            external_policy: TrafficPolicy::Cluster,
            internal_policy: TrafficPolicy::Cluster,
            health_check_node_port: None,
            allocate_node_ports: true,
            traffic_distribution: None,
            has_selector: false,
            annotations: BTreeMap::new(),
        }
    }

    /// All addresses that it is to be served at: cluster, external and load-balancer IPs.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let cluster_ips = match &self.cluster_ips {
            ClusterIps::Addresses { addresses, .. } => addresses.as_slice(),
            ClusterIps::Unset | ClusterIps::Headless => &[],
        };
        cluster_ips.iter().chain(self.external_ips.iter()).chain(self.load_balancer_ips.iter()).copied()
    }

    /// Adds a cluster IP: one for each family that the Service is to have.
    pub fn cluster_ip(mut self, address: impl Into<IpAddr>) -> Self {
        let mut addresses = match self.cluster_ips {
            ClusterIps::Addresses { addresses, .. } => addresses,
            ClusterIps::Unset | ClusterIps::Headless => Vec::new(),
        };
        addresses.push(address.into());
        self.cluster_ips = ClusterIps::Addresses { addresses, allocated: false };
        self
    }

    /// Adds a TCP port.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push(ServicePort::new(name, Protocol::Tcp, port));
        self
    }

    /// Adds a UDP port.
    pub fn udp_port(mut self, name: &str, port: u16) -> Self {
        self.ports.push(ServicePort::new(name, Protocol::Udp, port));
        self
    }

    /// Serves the port that was added last at this number on node addresses, too.
    pub fn node_port(mut self, number: u16) -> Self {
        if let Some(port) = self.ports.last_mut() {
            port.node_port = Some(number);
            self.kind = ServiceKind::NodePort;
        }
        self
    }
}

/// From `Service.spec.type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceKind {
    /// Reached at its cluster IP.
    #[default]
    ClusterIp,
    /// Reached at a port of each node, too.
    NodePort,
    /// Reached at a balancer's address, too.
    LoadBalancer,
    /// A DNS alias: nothing to proxy.
    ExternalName,
}

impl ServiceKind {
    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalName => "ExternalName",
        }
    }
}

/// The cluster IPs of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ClusterIps {
    /// None yet: an API server or the static source will allocate one.
    #[default]
    Unset,
    /// `clusterIP: None`: clients balance by themselves.
    Headless,
    /// In the order of `spec.clusterIPs`. `allocated` tells that the static source chose them.
    Addresses {
        /// One for each family, at most two.
        addresses: Vec<IpAddr>,
        /// True where no manifest names them.
        allocated: bool,
    },
}

impl ClusterIps {
    /// The address of a family, if the Service has one.
    pub fn of(&self, family: Family) -> Option<IpAddr> {
        match self {
            Self::Addresses { addresses, .. } => addresses.iter().copied().find(|ip| Family::of(*ip) == family),
            Self::Unset | Self::Headless => None,
        }
    }

    /// True where the static source chose the addresses.
    pub fn allocated(&self) -> bool {
        matches!(self, Self::Addresses { allocated: true, .. })
    }
}

/// From `Service.spec.externalTrafficPolicy` and `internalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// Any usable endpoint of the cluster.
    #[default]
    Cluster,
    /// Only endpoints on this node.
    Local,
}

/// One entry of `Service.spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// From `name`; empty is legal for a single port. Joined with the port name of slices.
    pub name: Arc<str>,
    /// From `protocol` (default TCP).
    pub protocol: Protocol,
    /// From `port`: the number on cluster IPs, external IPs and load-balancer addresses (1..=65535).
    pub port: u16,
    /// From `targetPort`, number or name as text. The proxy reads the slices instead; this is for display.
    pub target_port: Option<Arc<str>>,
    /// From `nodePort` (1..=65535); `None` for 0.
    pub node_port: Option<u16>,
    /// True where the static source chose the node port.
    pub node_port_allocated: bool,
    /// From `appProtocol`: a label for people, without effect at this layer.
    pub app_protocol: Option<Arc<str>>,
}

impl ServicePort {
    /// A port without node port.
    pub fn new(name: &str, protocol: Protocol, port: u16) -> Self {
        Self {
            name: name.into(),
            protocol,
            port,
            target_port: None,
            node_port: None,
            node_port_allocated: false,
            app_protocol: None,
        }
    }
}

/// An EndpointSlice (or a part of an Endpoints object), as far as a proxy reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Identity of the slice: a cache key, nothing else.
    pub name: SliceName,
    /// The Service whose endpoints these are. From the label `kubernetes.io/service-name`.
    pub service: ObjectName,
    /// From `addressType`; slices of FQDNs are never stored.
    pub family: Family,
    /// From `ports`; entries without a name or a number are left out.
    pub ports: Vec<SlicePort>,
    /// From `endpoints`; entries without an address are left out.
    pub endpoints: Vec<Endpoint>,
}

impl Slice {
    /// An empty slice of a Service, in the family of its first cluster IP (IPv4 where it has none).
    pub fn new(name: &str, service: &Service) -> Self {
        let family = match &service.cluster_ips {
            ClusterIps::Addresses { addresses, .. } => addresses.first().map_or(Family::V4, |ip| Family::of(*ip)),
            ClusterIps::Unset | ClusterIps::Headless => Family::V4,
        };
        Self {
            name: SliceName::EndpointSlice(ObjectName::new(Arc::clone(&service.name.namespace), name)),
            service: service.name.clone(),
            family,
            ports: Vec::new(),
            endpoints: Vec::new(),
        }
    }

    /// Adds a TCP port: the number that stands behind the Service port of that name.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push(SlicePort { name: name.into(), protocol: Protocol::Tcp, port });
        self
    }

    /// Adds a UDP port.
    pub fn udp_port(mut self, name: &str, port: u16) -> Self {
        self.ports.push(SlicePort { name: name.into(), protocol: Protocol::Udp, port });
        self
    }

    /// Adds an endpoint.
    pub fn endpoint(mut self, endpoint: Endpoint) -> Self {
        self.endpoints.push(endpoint);
        self
    }
}

/// Which object a slice came from. An Endpoints object and a slice may carry the same name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SliceName {
    /// An EndpointSlice of discovery.k8s.io.
    EndpointSlice(ObjectName),
    /// A part of a core/v1 Endpoints object: its `subsets` are numbered, and split by family.
    Endpoints(ObjectName, usize, Family),
}

impl fmt::Display for SliceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EndpointSlice(name) => write!(f, "EndpointSlice {name}"),
            Self::Endpoints(name, ..) => write!(f, "Endpoints {name}"),
        }
    }
}

/// One entry of `EndpointSlice.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// From `name`.
    pub name: Arc<str>,
    /// From `protocol` (default TCP).
    pub protocol: Protocol,
    /// From `port` (1..=65535).
    pub port: u16,
}

/// One entry of `EndpointSlice.endpoints`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// From `addresses[0]`, canonical.
    pub address: IpAddr,
    /// From `conditions.ready` (absent: true): takes new traffic.
    pub ready: bool,
    /// From `conditions.serving` (absent: true): still answers. Consulted only together with `terminating`.
    pub serving: bool,
    /// From `conditions.terminating` (absent: false).
    pub terminating: bool,
    /// From `nodeName`.
    pub node: Option<Arc<str>>,
    /// From `zone`. Read by the static source only, where it stands in for a hint.
    pub zone: Option<Arc<str>>,
    /// From `hints.forZones[].name`.
    pub zone_hints: Rare<Arc<str>>,
    /// From `hints.forNodes[].name`.
    pub node_hints: Rare<Arc<str>>,
    /// From `targetRef.name`, where the target is a Pod: for display.
    pub pod: Option<Arc<str>>,
    /// From `hostname`: one at most, and few have it. For DNS alone.
    pub hostname: Rare<Arc<str>>,
}

impl Endpoint {
    /// A ready endpoint on no node in particular.
    pub fn new(address: impl Into<IpAddr>) -> Self {
        Self {
            address: address.into(),
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            zone: None,
            zone_hints: Rare::default(),
            node_hints: Rare::default(),
            pod: None,
            hostname: Rare::default(),
        }
    }
}

/// What a source says.
#[derive(Clone, Debug)]
pub enum Event {
    /// All objects that the source has now: what is not among them is gone.
    Replace(Objects),
    /// One Service was added or changed.
    ApplyService(Arc<Service>),
    /// One Service is gone.
    DeleteService(ObjectName),
    /// One slice was added or changed.
    ApplySlice(Arc<Slice>),
    /// One slice is gone.
    DeleteSlice(SliceName),
}

/// Everything that a source knows at one moment. Shared with the source's own memory of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// Services, in no particular order; each name once.
    pub services: Vec<Arc<Service>>,
    /// Slices, in no particular order; each name once.
    pub slices: Vec<Arc<Slice>>,
}

impl Objects {
    /// Objects built in code.
    pub fn new(services: Vec<Service>, slices: Vec<Slice>) -> Self {
        Self {
            services: services.into_iter().map(Arc::new).collect(),
            slices: slices.into_iter().map(Arc::new).collect(),
        }
    }
}

/// The objects as they stand. Owned by `control`, by value.
#[derive(Debug, Default)]
pub struct Model {
    services: BTreeMap<ObjectName, Arc<Service>>,
    /// By Service; sorted by name, never empty. Nearly every Service has one.
    slices: BTreeMap<ObjectName, Vec<Arc<Slice>>>,
    owners: BTreeMap<SliceName, ObjectName>,
}

impl Model {
    /// Takes an event in and adds the Services that it touches to `dirty`. An identical object touches nothing.
    pub fn apply(&mut self, event: Event, dirty: &mut BTreeSet<ObjectName>) {
        match event {
            Event::Replace(objects) => self.replace(objects, dirty),
            Event::ApplyService(service) => self.apply_service(service, dirty),
            Event::DeleteService(name) => {
                if self.services.remove(&name).is_some() {
                    dirty.insert(name);
                }
            }
            Event::ApplySlice(slice) => self.apply_slice(slice, dirty),
            Event::DeleteSlice(name) => self.delete_slice(&name, dirty),
        }
    }

    /// The Service of that name.
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All Services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The slices of a Service, by slice name.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = &Arc<Slice>> {
        self.slices.get(service).into_iter().flatten()
    }

    fn replace(&mut self, objects: Objects, dirty: &mut BTreeSet<ObjectName>) {
        let services: BTreeSet<_> = objects.services.iter().map(|service| service.name.clone()).collect();
        let slices: BTreeSet<_> = objects.slices.iter().map(|slice| slice.name.clone()).collect();
        let gone: Vec<_> = self.owners.keys().filter(|name| !slices.contains(*name)).cloned().collect();
        for name in gone {
            self.delete_slice(&name, dirty);
        }
        let gone: Vec<_> = self.services.keys().filter(|name| !services.contains(*name)).cloned().collect();
        for name in gone {
            self.services.remove(&name);
            dirty.insert(name);
        }
        for service in objects.services {
            self.apply_service(service, dirty);
        }
        for slice in objects.slices {
            self.apply_slice(slice, dirty);
        }
        pack(&mut self.services);
        pack(&mut self.slices);
        pack(&mut self.owners);
    }

    fn apply_service(&mut self, service: Arc<Service>, dirty: &mut BTreeSet<ObjectName>) {
        if self.services.get(&service.name).is_some_and(|known| *known == service) {
            return;
        }
        dirty.insert(service.name.clone());
        self.services.insert(service.name.clone(), service);
    }

    fn apply_slice(&mut self, slice: Arc<Slice>, dirty: &mut BTreeSet<ObjectName>) {
        if let Some(owner) = self.owners.get(&slice.name) {
            let known = self.slices(owner).find(|known| known.name == slice.name);
            if known.is_some_and(|known| *known == slice) {
                return;
            }
            if *owner != slice.service {
                self.delete_slice(&slice.name, dirty);
            }
        }
        dirty.insert(slice.service.clone());
        self.owners.insert(slice.name.clone(), slice.service.clone());
        self.insert_slice(slice);
    }

    fn insert_slice(&mut self, slice: Arc<Slice>) {
        let Some(slices) = self.slices.get_mut(&slice.service) else {
            drop(self.slices.insert(slice.service.clone(), vec![slice])); // No room for others to come.
            return;
        };
        match slices.binary_search_by(|known| known.name.cmp(&slice.name)) {
            Ok(place) => slices[place] = slice,
            Err(place) => slices.insert(place, slice),
        }
    }

    fn delete_slice(&mut self, name: &SliceName, dirty: &mut BTreeSet<ObjectName>) {
        let Some(owner) = self.owners.remove(name) else { return };
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.retain(|slice| slice.name != *name);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        dirty.insert(owner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web() -> Service {
        Service::new("default/web").cluster_ip([10, 96, 0, 10]).port("http", 80)
    }

    fn slice(name: &str, service: &str, hosts: &[u8]) -> Slice {
        let slice = Slice::new(name, &Service::new(service)).port("http", 8000);
        hosts.iter().fold(slice, |slice, host| slice.endpoint(Endpoint::new([10, 0, 0, *host])))
    }

    /// Applies an event and tells which Services it touched.
    fn touched(model: &mut Model, event: Event) -> Vec<String> {
        let mut dirty = BTreeSet::new();
        model.apply(event, &mut dirty);
        dirty.iter().map(ToString::to_string).collect()
    }

    fn apply(model: &mut Model, slice: Slice) -> Vec<String> {
        touched(model, Event::ApplySlice(Arc::new(slice)))
    }

    fn hosts(model: &Model, service: &str) -> Vec<String> {
        let service = ObjectName::parse(service);
        model.slices(&service).flat_map(|slice| &slice.endpoints).map(|endpoint| endpoint.address.to_string()).collect()
    }

    #[test]
    fn t009_given_a_service_when_the_same_comes_again_then_nothing_is_touched() {
        let mut model = Model::default();
        assert_eq!(touched(&mut model, Event::ApplyService(Arc::new(web()))), ["default/web"]);

        assert!(touched(&mut model, Event::ApplyService(Arc::new(web()))).is_empty());
        assert_eq!(touched(&mut model, Event::ApplyService(Arc::new(web().port("https", 443)))), ["default/web"]);
    }

    #[test]
    fn t039_given_equal_names_in_two_namespaces_when_stored_then_their_endpoints_do_not_mix() {
        let mut model = Model::default();
        apply(&mut model, slice("s", "ns1/svc1", &[1]));
        apply(&mut model, slice("t", "ns1/svc2", &[2]));
        apply(&mut model, slice("s", "ns2/svc1", &[3]));

        assert_eq!(hosts(&model, "ns1/svc1"), ["10.0.0.1"]);
        assert_eq!(hosts(&model, "ns1/svc2"), ["10.0.0.2"]);
        assert_eq!(hosts(&model, "ns2/svc1"), ["10.0.0.3"]);
    }

    #[test]
    fn t042_t134_given_slices_before_their_service_when_it_comes_then_they_are_there() {
        let mut model = Model::default();
        assert_eq!(apply(&mut model, slice("web-1", "default/web", &[1])), ["default/web"]);
        assert!(model.service(&web().name).is_none());

        touched(&mut model, Event::ApplyService(Arc::new(web())));

        assert_eq!(hosts(&model, "default/web"), ["10.0.0.1"]);
    }

    #[test]
    fn t052_given_a_slice_when_the_same_comes_again_then_nothing_is_touched_and_any_change_touches_its_service() {
        let mut model = Model::default();
        apply(&mut model, slice("web-1", "default/web", &[1, 2]));

        assert!(apply(&mut model, slice("web-1", "default/web", &[1, 2])).is_empty());
        assert_eq!(apply(&mut model, slice("web-1", "default/web", &[2, 1])), ["default/web"]);
        assert_eq!(apply(&mut model, slice("web-1", "default/web", &[2, 1]).port("https", 8443)), ["default/web"]);
    }

    #[test]
    fn t053_given_an_unknown_slice_when_deleted_then_nothing_is_touched() {
        let mut model = Model::default();
        let unknown = slice("web-1", "default/web", &[]).name;

        assert!(touched(&mut model, Event::DeleteSlice(unknown)).is_empty());
    }

    #[test]
    fn t056_given_a_slice_when_it_goes_over_to_another_service_then_both_are_touched_and_it_is_there_once() {
        let mut model = Model::default();
        apply(&mut model, slice("s", "default/svc1", &[1]));

        assert_eq!(apply(&mut model, slice("s", "default/svc2", &[1])), ["default/svc1", "default/svc2"]);
        assert!(hosts(&model, "default/svc1").is_empty());
        assert_eq!(hosts(&model, "default/svc2"), ["10.0.0.1"]);
    }

    #[test]
    fn t061_given_slices_that_come_and_go_when_the_last_is_gone_then_nothing_is_left() {
        let mut model = Model::default();
        for round in 0..10_000 {
            let passing = slice(&format!("s-{round}"), &format!("default/svc-{round}"), &[1]);
            let name = passing.name.clone();
            apply(&mut model, passing);
            touched(&mut model, Event::DeleteSlice(name));
        }

        assert!(model.slices.is_empty());
        assert!(model.owners.is_empty());
    }

    #[test]
    fn given_a_whole_state_when_it_replaces_another_then_what_is_missing_goes_and_what_is_equal_is_not_touched() {
        let mut model = Model::default();
        let kept = Objects::new(vec![web()], vec![slice("web-1", "default/web", &[1])]);
        let mut first = kept.clone();
        first.services.push(Service::new("default/db").into());
        first.slices.push(slice("web-2", "default/web", &[2]).into());
        touched(&mut model, Event::Replace(first));

        assert_eq!(touched(&mut model, Event::Replace(kept.clone())), ["default/db", "default/web"]);
        assert_eq!(hosts(&model, "default/web"), ["10.0.0.1"]);
        assert!(touched(&mut model, Event::Replace(kept)).is_empty());
    }

    #[test]
    fn given_an_endpoints_object_and_a_slice_of_one_name_when_stored_then_both_count() {
        let mut model = Model::default();
        let from_slice = slice("web", "default/web", &[1]);
        let name = SliceName::Endpoints(ObjectName::parse("default/web"), 0, Family::V4);
        let from_endpoints = Slice { name, ..slice("web", "default/web", &[2]) };

        apply(&mut model, from_slice);
        apply(&mut model, from_endpoints);

        assert_eq!(hosts(&model, "default/web"), ["10.0.0.1", "10.0.0.2"]);
    }

    #[test]
    fn given_two_families_when_an_address_is_looked_up_then_its_place_does_not_matter() {
        let v6 = "fd00::10".parse::<IpAddr>().expect("an address");
        let service = Service::new("default/web").cluster_ip(v6).cluster_ip([10, 96, 0, 10]);

        assert_eq!(service.cluster_ips.of(Family::V4), Some(IpAddr::from([10, 96, 0, 10])));
        assert_eq!(service.cluster_ips.of(Family::V6), Some(v6));
    }
}
