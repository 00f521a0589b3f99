//! Which endpoints a ServicePort may use on this node: conditions, traffic policy, topology hints.
//!
//! A pure function, one to one the policy of kube-proxy. Nothing here knows listeners or sockets.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::{Service, ServicePort, Slice};
use crate::name::Family;

/// This node, as far as selection needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Own node name; `None` makes no endpoint local. From `--node-name`.
    pub name: Option<Arc<str>>,
    /// Own zone, the label `topology.kubernetes.io/zone`; `None` never matches a hint. From `--zone`.
    pub zone: Option<Arc<str>>,
}

/// An endpoint of one ServicePort that may be used, with what people want to read beside it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsableEndpoint {
    /// Address, and the number that the slice resolved the target port to.
    pub address: SocketAddr,
    /// True on this node.
    pub local: bool,
    /// True where it ends, but still serves.
    pub terminating: bool,
    /// From `nodeName`.
    pub node: Option<Arc<str>>,
    /// From `zone`.
    pub zone: Option<Arc<str>>,
    /// From `targetRef.name` of a Pod.
    pub pod: Option<Arc<str>>,
}

/// The endpoints of one scope. Sorted by address, each address once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usable {
    /// May get new traffic.
    pub picks: Vec<UsableEndpoint>,
    /// Keeps what it has: `picks`, and what is terminating but still serves.
    pub serving: Vec<UsableEndpoint>,
}

/// What a ServicePort may use in one family. `None`: no listener of the Service asks for this scope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// For policy Cluster.
    pub cluster: Option<Usable>,
    /// For policy Local.
    pub local: Option<Usable>,
    /// True where some endpoint anywhere could serve: it tells *drop* from *reject*.
    pub any: bool,
}

/// Chooses for one ServicePort and one family among the Service's slices.
pub fn usable<'a>(
    service: &Service,
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a Slice>,
    node: &Node,
) -> Selection {
    let _ = (service, port, family, slices.count(), node);
    Selection::default()
}
