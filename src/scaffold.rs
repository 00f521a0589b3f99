//! Manifests that we write for people: `new service`, and the slice that a Service with a selector lacks.
//!
//! The text is as a person would write it by hand, and `decode` reads it without a word.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::net::SocketAddr;

use crate::findings::{is_name, name_rule};
use crate::model::{ClusterIps, Service, ServiceKind, ServicePort};
use crate::name::{Family, ObjectName, Protocol};
use crate::plan::{Problem, Severity};

/// What `new service` is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewService {
    /// Namespace and name.
    pub name: ObjectName,
    /// The number that clients connect to (1..=65535).
    pub port: u16,
    /// The number that the Service names for its backends; `None`: theirs, if they have one in common.
    pub target_port: Option<u16>,
    /// Its node port; `None`: what the type asks for. Any but `None` makes a ClusterIP Service a NodePort one.
    pub node_port: Option<NewNodePort>,
    /// `spec.type`, without ExternalName.
    pub kind: ServiceKind,
    /// Datagrams instead of connections.
    pub udp: bool,
    /// A client stays with its backend.
    pub sticky: bool,
    /// Where the backends listen.
    pub backends: Vec<SocketAddr>,
}

/// The node port of a new Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewNodePort {
    /// One that is chosen when the Service is read.
    Auto,
    /// This one (1..=65535).
    Number(u16),
}

impl fmt::Display for NewNodePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Number(number) => number.fmt(f),
        }
    }
}

/// Why no manifest was written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScaffoldError {
    /// No name that Kubernetes takes.
    #[error("{0:?} is not a name; write {rule}", rule = name_rule(63))]
    Name(String),
    /// An address that nobody can connect to.
    #[error("{0} is no address of a backend; write the IP address and port that it listens on")]
    Backend(SocketAddr),
    /// The port 0.
    #[error("0 is not a port; write a number from 1 to 65535")]
    Port,
    /// A Service that is not proxied.
    #[error("a Service of type ExternalName is a DNS name, there is nothing to relay")]
    ExternalName,
}

/// Writes a Service and the EndpointSlices of its backends: one for each family and port of theirs.
pub fn new_service_yaml(new: &NewService) -> Result<String, ScaffoldError> {
    check(new)?;
    let groups: BTreeSet<(Family, u16)> =
        new.backends.iter().map(|backend| (Family::of(backend.ip()), backend.port())).collect();
    let mut text = service_yaml(new, &groups);
    for (number, (family, port)) in (1..).zip(groups) {
        let protocol = if new.udp { Protocol::Udp } else { Protocol::Tcp };
        let ports = [SliceLine { name: "", protocol, port, note: None }];
        let of_group = |backend: &&SocketAddr| Family::of(backend.ip()) == family && backend.port() == port;
        let addresses: BTreeSet<_> = new.backends.iter().filter(of_group).map(SocketAddr::ip).collect();
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        text.push_str("---\n");
        text.push_str(&slice_yaml(&new.name, number, family, &ports, &addresses));
    }
    Ok(text)
}

fn check(new: &NewService) -> Result<(), ScaffoldError> {
    for name in [&new.name.namespace, &new.name.name] {
        if !is_name(name, 63) {
            return Err(ScaffoldError::Name(name.to_string()));
        }
    }
    if new.port == 0 || new.target_port == Some(0) || new.node_port == Some(NewNodePort::Number(0)) {
        return Err(ScaffoldError::Port);
    }
    let wrong = |backend: &&SocketAddr| {
        let ip = backend.ip().to_canonical();
        backend.port() == 0 || ip.is_unspecified() || ip.is_multicast() || ip != backend.ip()
    };
    if let Some(backend) = new.backends.iter().find(wrong) {
        return Err(ScaffoldError::Backend(*backend));
    }
    if new.kind == ServiceKind::ExternalName { Err(ScaffoldError::ExternalName) } else { Ok(()) }
}

fn service_yaml(new: &NewService, groups: &BTreeSet<(Family, u16)>) -> String {
    let mut text = format!("apiVersion: v1\nkind: Service\n{}spec:\n", metadata(&new.name, &new.name.name));
    let kind = match (new.kind, new.node_port) {
        (ServiceKind::ClusterIp, Some(_)) => ServiceKind::NodePort,
        (kind, _) => kind,
    };
    if kind != ServiceKind::ClusterIp {
        line(&mut text, format_args!("  type: {}", kind.as_str()));
    }
    let families: BTreeSet<Family> = groups.iter().map(|(family, _)| *family).collect();
    match families.iter().collect::<Vec<_>>()[..] {
        [_, _] => line(&mut text, format_args!("  ipFamilyPolicy: PreferDualStack")),
        [Family::V6] => line(&mut text, format_args!("  ipFamilies: [IPv6]")),
        _ => {}
    }
    if new.sticky {
        line(&mut text, format_args!("  sessionAffinity: ClientIP"));
    }
    line(&mut text, format_args!("  ports:\n  - port: {}", new.port));
    if new.udp {
        line(&mut text, format_args!("    protocol: UDP"));
    }
    let ports: BTreeSet<u16> = groups.iter().map(|(_, port)| *port).collect();
    let common = if ports.len() == 1 { ports.first().copied() } else { None };
    if let Some(port) = new.target_port.or(common).filter(|port| *port != new.port) {
        line(&mut text, format_args!("    targetPort: {port}"));
    }
    if let Some(NewNodePort::Number(port)) = new.node_port {
        line(&mut text, format_args!("    nodePort: {port}"));
    }
    text
}

/// Tells that nobody says where the backends of a Service with a selector are, with the lines to add.
pub(crate) fn missing_slice(service: &Service) -> Problem {
    let family = match &service.cluster_ips {
        ClusterIps::Addresses { addresses, .. } => addresses.first().map(|ip| Family::of(*ip)),
        ClusterIps::Unset | ClusterIps::Headless => None,
    };
    let family = service.families.first().copied().or(family).unwrap_or(Family::V4);
    let address = if family == Family::V4 { "127.0.0.1" } else { "::1" };
    let ports: Vec<SliceLine<'_>> = service.ports.iter().map(SliceLine::of).collect();
    let slice = slice_yaml(&service.name, 1, family, &ports, &[address.to_owned()]);
    let message = format!(
        "spec.selector: nobody here looks for pods, so it has no endpoints; add their addresses:\n---\n{slice}"
    );
    let object = format!("Service {}", service.name);
    let severity = Severity::Note;
    Problem { object, file: None, line: None, column: None, reason: "no_endpoints".into(), message, severity }
}

/// One entry of a slice's `ports`.
struct SliceLine<'a> {
    name: &'a str,
    protocol: Protocol,
    port: u16,
    note: Option<String>,
}

impl<'a> SliceLine<'a> {
    fn of(port: &'a ServicePort) -> Self {
        let target = port.target_port.as_deref();
        let number = target.and_then(|target| target.parse().ok());
        let named = target.filter(|_| number.is_none());
        let note = named.map(|target| format!(" # the number of the port that pods call {target}"));
        Self { name: &port.name, protocol: port.protocol, port: number.unwrap_or(port.port), note }
    }
}

fn slice_yaml(
    service: &ObjectName,
    number: usize,
    family: Family,
    ports: &[SliceLine<'_>],
    addresses: &[String],
) -> String {
    let metadata = metadata(service, &format!("{}-{number}", service.name));
    let owner = plain(&service.name);
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n{metadata}  labels:\n    kubernetes.io/service-name: {owner}\naddressType: {family}\nports:\n"
    );
    for port in ports {
        line(&mut text, format_args!("- name: {}", plain(port.name)));
        line(&mut text, format_args!("  port: {}{}", port.port, port.note.as_deref().unwrap_or_default()));
        if port.protocol != Protocol::Tcp {
            line(&mut text, format_args!("  protocol: {}", port.protocol));
        }
    }
    text.push_str("endpoints:\n");
    for address in addresses {
        let quote = if family == Family::V6 { "\"" } else { "" };
        line(&mut text, format_args!("- addresses: [{quote}{address}{quote}]"));
    }
    text
}

fn metadata(object: &ObjectName, name: &str) -> String {
    let mut text = format!("metadata:\n  name: {}\n", plain(name));
    if &*object.namespace != "default" {
        line(&mut text, format_args!("  namespace: {}", plain(&object.namespace)));
    }
    text
}

/// A name, in quotes where YAML would take it for a number or a truth value.
fn plain(name: &str) -> String {
    const WORDS: [&str; 12] = ["", "y", "n", "yes", "no", "on", "off", "true", "false", "null", "inf", "nan"];
    let bare = name.starts_with(|first: char| first.is_ascii_lowercase()) && !WORDS.contains(&name);
    if bare { name.to_owned() } else { format!("{name:?}") }
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{content}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use std::sync::Arc;

    use super::*;
    use crate::decode::{Content, decode};
    use crate::model::Slice;

    fn new(backends: &[&str]) -> NewService {
        NewService {
            name: ObjectName::parse("web"),
            port: 8080,
            target_port: None,
            node_port: None,
            kind: ServiceKind::ClusterIp,
            udp: false,
            sticky: false,
            backends: backends.iter().map(|backend| backend.parse().expect("an address")).collect(),
        }
    }

    fn read(new: &NewService) -> (Arc<Service>, Vec<Arc<Slice>>) {
        objects(&new_service_yaml(new).expect("a manifest"))
    }

    fn objects(text: &str) -> (Arc<Service>, Vec<Arc<Slice>>) {
        let decoded = decode(text.as_bytes(), "-");
        assert_eq!(decoded.problems, [], "{text}");
        let (mut services, mut slices) = (Vec::new(), Vec::new());
        for entry in decoded.objects {
            match entry.content {
                Content::Service(service) => services.push(service),
                Content::Slices(more) => slices.extend(more),
            }
        }
        (services.pop().expect("a Service"), slices)
    }

    #[test]
    fn given_one_backend_when_written_then_it_is_what_a_person_would_write() {
        let text = new_service_yaml(&new(&["192.168.1.5:80"])).expect("a manifest");

        let expected = "\
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  ports:
  - port: 8080
    targetPort: 80
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  labels:
    kubernetes.io/service-name: web
addressType: IPv4
ports:
- name: \"\"
  port: 80
endpoints:
- addresses: [192.168.1.5]
";
        assert_eq!(text, expected);
    }

    #[test]
    fn given_every_option_when_written_then_the_service_says_it() {
        let (service, slices) = read(&NewService {
            name: ObjectName::parse("shop/web"),
            target_port: Some(8000),
            node_port: Some(NewNodePort::Number(30_000)),
            udp: true,
            sticky: true,
            ..new(&["10.0.0.1:8000"])
        });

        assert_eq!(service.name, ObjectName::parse("shop/web"));
        assert_eq!(service.kind, ServiceKind::NodePort);
        let port = &service.ports[0];
        assert_eq!((port.port, port.node_port, port.protocol), (8080, Some(30_000), Protocol::Udp));
        assert_eq!(port.target_port.as_deref(), Some("8000"));
        assert!(service.affinity_timeout.is_some());
        assert_eq!((slices[0].service.clone(), slices[0].ports[0].protocol), (service.name.clone(), Protocol::Udp));
    }

    #[test]
    fn given_backends_of_both_families_and_ports_when_written_then_each_has_its_slice() {
        let (service, slices) = read(&new(&["10.0.0.1:80", "10.0.0.2:81", "[fd00::1]:80", "10.0.0.3:80"]));

        let found: Vec<_> =
            slices.iter().map(|slice| (slice.family, slice.ports[0].port, slice.endpoints.len())).collect();
        assert_eq!(found, [(Family::V4, 80, 2), (Family::V4, 81, 1), (Family::V6, 80, 1)]);
        assert_eq!(service.ports[0].target_port, None);
        assert_eq!(read(&new(&["[::1]:80"])).0.families, [Family::V6]);
    }

    #[test]
    fn given_an_automatic_node_port_when_written_then_only_the_type_says_so() {
        let (service, _) = read(&NewService { node_port: Some(NewNodePort::Auto), ..new(&["10.0.0.1:80"]) });

        assert_eq!((service.kind, service.ports[0].node_port), (ServiceKind::NodePort, None));
    }

    #[test]
    fn given_what_cannot_be_served_when_written_then_the_reason_is_told() {
        let told = |new: &NewService| new_service_yaml(new).expect_err("an error").to_string();

        assert!(told(&NewService { name: ObjectName::parse("Web\nkind: x"), ..new(&[]) }).contains("is not a name"));
        assert!(told(&new(&["0.0.0.0:80"])).starts_with("0.0.0.0:80 is no address"));
        assert!(told(&new(&["10.0.0.1:0"])).starts_with("10.0.0.1:0 is no address"));
        assert!(told(&NewService { kind: ServiceKind::ExternalName, ..new(&[]) }).contains("DNS name"));
        assert!(told(&NewService { port: 0, ..new(&[]) }).contains("0 is not a port"));
    }

    #[test]
    fn given_a_service_without_slices_when_told_then_the_lines_to_add_are_complete() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec:\n  selector: {app: web}\n  ports:\n  - {name: http, port: 80, targetPort: 8000}\n  - {name: dns, port: 53, protocol: UDP, targetPort: named}\n";
        let (service, _) = objects(text);

        let note = missing_slice(&service);

        assert_eq!((&*note.object, note.severity), ("Service shop/web", Severity::Note));
        let (_, slice) = note.message.split_once("---\n").expect("lines to add");
        assert!(slice.contains("  port: 53 # the number of the port that pods call named\n"));
        let (_, slices) = objects(&format!("{text}---\n{slice}"));
        assert_eq!(slices[0].service, service.name);
        let ports: Vec<_> = slices[0].ports.iter().map(|port| (&*port.name, port.port, port.protocol)).collect();
        assert_eq!(ports, [("http", 8000, Protocol::Tcp), ("dns", 53, Protocol::Udp)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

        #[test]
        fn given_any_name_when_written_then_it_is_read_back(
            name in "[a-z0-9]([a-z0-9-]{0,4}[a-z0-9])?|nan|inf|infinity|null|true|off|1e3|0x1f|0o7|1-2",
        ) {
            let (service, slices) = read(&NewService { name: ObjectName::parse(&name), ..new(&["10.0.0.1:80"]) });

            prop_assert_eq!(&*service.name.name, &*name);
            prop_assert_eq!(&slices[0].service, &service.name);
        }
    }
}
