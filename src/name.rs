//! Identities: what things are called in logs, metrics, errors and maps.
//!
//! Only names live here. What an object says is in `model`, what follows from it in `plan`.

use std::cmp::Ordering;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};

/// `namespace/name` of an object, as `kubectl` and kube-proxy print it.
///
/// Model, plan, listeners and status all know ten thousand of them: a name is one pointer to what they share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectName(Arc<NamespacedName>);

/// The halves of an [`ObjectName`]. By namespace, then by name.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct NamespacedName {
    /// From `metadata.namespace`; `default` where a manifest names none.
    pub namespace: Arc<str>,
    /// From `metadata.name`.
    pub name: Arc<str>,
}

impl ObjectName {
    /// Builds a name from its two halves.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self(Arc::new(NamespacedName { namespace: namespace.into(), name: name.into() }))
    }

    /// Reads `namespace/name`, or `name` alone in namespace `default`.
    pub fn parse(text: &str) -> Self {
        match text.split_once('/') {
            Some((namespace, name)) => Self::new(namespace, name),
            None => Self::new("default", text),
        }
    }
}

impl Ord for NamespacedName {
    fn cmp(&self, other: &Self) -> Ordering {
        cmp_shared(&self.namespace, &other.namespace).then_with(|| self.name.cmp(&other.name))
    }
}

impl PartialOrd for NamespacedName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Deref for ObjectName {
    type Target = NamespacedName;

    fn deref(&self) -> &NamespacedName {
        &self.0
    }
}

impl Ord for ObjectName {
    fn cmp(&self, other: &Self) -> Ordering {
        cmp_shared(&self.0, &other.0)
    }
}

impl PartialOrd for ObjectName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Serialize for ObjectName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Transport protocol of a Service port. From `Service.spec.ports[].protocol` (default TCP).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Connections.
    #[default]
    Tcp,
    /// Datagrams, grouped to flows.
    Udp,
    /// Known, counted and reported, never served.
    Sctp,
}

impl Protocol {
    /// The word that the API uses: `TCP`, `UDP` or `SCTP`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An IP family: a Service is proxied once for each family that it has an address of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// 32-bit addresses.
    #[serde(rename = "IPv4")]
    V4,
    /// 128-bit addresses.
    #[serde(rename = "IPv6")]
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family that an address belongs to.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// One entry of `Service.spec.ports`, printed as kube-proxy prints it: `namespace/name:port`. One pointer, as
/// [`ObjectName`] is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePortName(Arc<PortOfService>);

/// The parts of a [`ServicePortName`].
///
/// The protocol is part of the identity, since TCP and UDP may share a name and a number.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortOfService {
    /// The Service.
    pub service: ObjectName,
    /// From `spec.ports[].name`; empty is legal for a single port.
    pub port: Arc<str>,
    /// From `spec.ports[].protocol`.
    pub protocol: Protocol,
}

impl ServicePortName {
    /// Builds a name from its parts.
    pub fn new(service: ObjectName, port: impl Into<Arc<str>>, protocol: Protocol) -> Self {
        Self(Arc::new(PortOfService { service, port: port.into(), protocol }))
    }
}

impl Deref for ServicePortName {
    type Target = PortOfService;

    fn deref(&self) -> &PortOfService {
        &self.0
    }
}

impl Ord for ServicePortName {
    fn cmp(&self, other: &Self) -> Ordering {
        cmp_shared(&self.0, &other.0)
    }
}

impl PartialOrd for ServicePortName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The order of what two pointers lead to: nearly always one and the same, where they are equal.
fn cmp_shared<T: Ord + ?Sized>(one: &Arc<T>, other: &Arc<T>) -> Ordering {
    if Arc::ptr_eq(one, other) { Ordering::Equal } else { one.cmp(other) }
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.service.fmt(f)?;
        if self.port.is_empty() { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

/// The address, port and protocol that a listener is bound to: `10.96.0.10:80/TCP`. By address, then by protocol.
///
/// Never a wildcard. A third smaller than a `SocketAddr`, as there are a dozen of each key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenKey {
    ip: IpAddr,
    port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
}

impl ListenKey {
    /// Builds a key from an address, a port and a protocol.
    pub fn new(ip: IpAddr, port: u16, protocol: Protocol) -> Self {
        Self { ip, port, protocol }
    }

    /// Builds a key from an address with its port, and a protocol.
    pub fn at(address: SocketAddr, protocol: Protocol) -> Self {
        Self::new(address.ip(), address.port(), protocol)
    }

    /// The address.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Address and port.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

impl fmt::Display for ListenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address(), self.protocol)
    }
}

impl Serialize for ListenKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Which endpoints a traffic policy lets a listener use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// All endpoints of the cluster that topology hints allow.
    Cluster,
    /// The endpoints on this node.
    Local,
}

impl Scope {
    /// `Cluster` or `Local`, as the API's traffic policies say it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}

/// A balancer: one ServicePort, seen in one family and one scope.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BalancerKey {
    /// The ServicePort that it chooses for.
    pub port: ServicePortName,
    /// The family of its listeners and of its backends.
    pub family: Family,
    /// The endpoints that it may use.
    pub scope: Scope,
}

impl fmt::Display for BalancerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} {} {}", self.port, self.port.protocol, self.family, self.scope.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_port_without_a_name_when_printed_then_no_colon_is_left_behind() {
        let service = ObjectName::parse("default/web");
        let named = ServicePortName::new(service.clone(), "http", Protocol::Tcp);
        let unnamed = ServicePortName::new(service, "", Protocol::Tcp);

        assert_eq!(named.to_string(), "default/web:http");
        assert_eq!(unnamed.to_string(), "default/web");
    }

    #[test]
    fn given_names_that_share_what_they_say_or_not_when_compared_then_only_what_they_say_counts() {
        let [one, same] = [(); 2].map(|()| ObjectName::new("a", "web"));
        let shared = ObjectName::new(Arc::clone(&one.namespace), "zoo");
        let port = |service: &ObjectName, name| ServicePortName::new(service.clone(), name, Protocol::Tcp);

        assert_eq!((one.cmp(&same), one.cmp(&one.clone())), (Ordering::Equal, Ordering::Equal));
        assert!(one < shared && shared < ObjectName::new("a-b", "db"), "the namespace comes first");
        assert_eq!(port(&one, "http").cmp(&port(&same, "http")), Ordering::Equal);
        assert!(port(&one, "https") > port(&same, "http") && port(&one, "https") < port(&shared, "http"));
    }

    #[test]
    fn given_an_ipv6_address_when_a_listen_key_is_printed_then_it_has_brackets() {
        let key = ListenKey::new("fd00::1".parse().expect("an address"), 53, Protocol::Udp);

        assert_eq!(key.to_string(), "[fd00::1]:53/UDP");
    }
}
