//! The DNS records of Services, as the cluster's own DNS answers them.
//!
//! Pure. After the specification "Kubernetes DNS-Based Service Discovery" (1.1.0), pods' own names apart, which nobody
//! here knows. The zone that holds them is `dns_zone`; what a hosts file can hold of them is `hosts_file`.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::findings::is_name;
use crate::model::{ClusterIps, Endpoint, Service, ServiceKind, ServicePort, Slice};
use crate::name::{ObjectName, Protocol};

/// Letters of a cluster's domain at most. DNS allows 253 for the longest name, an SRV record's, which has up to 201 of
/// them before the dot and the domain.
pub(crate) const MAX_DOMAIN_LENGTH: usize = 51;

/// Letters of a port's name at most, where it is to have an SRV record: with the underscore before it, it is a label.
const MAX_PORT_NAME_LENGTH: usize = 62;

/// All records of a cluster's domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// From names to what they stand for, Service by Service.
    pub records: Vec<Record>,
    /// From addresses to names, relative to the domain: for PTR records.
    pub pointers: Vec<(IpAddr, String)>,
    /// Services that lack records.
    pub gaps: Vec<Gap>,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// A name relative to the domain, in lower case: `web.default.svc`.
    pub owner: String,
    /// What it stands for.
    pub value: RecordValue,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordValue {
    /// A or AAAA: a cluster IP, or the address of an endpoint.
    Address(IpAddr),
    /// SRV: where a named port is.
    Port {
        /// The number (1..=65535).
        port: u16,
        /// A name that has addresses, relative to the domain.
        target: String,
    },
    /// CNAME: another name, in full, with the dot at its end.
    Alias(String),
}

/// A Service without records, or without some of them, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The Service.
    pub service: ObjectName,
    /// What is missing, and what to do.
    pub reason: String,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Service {}: {}", self.service, self.reason)
    }
}

impl Records {
    /// The records of Services, each with its slices; `None` where nobody knows those.
    pub fn of<'s>(services: impl Iterator<Item = (&'s Service, Option<&'s [Arc<Slice>]>)>) -> Self {
        let mut records = Self::default();
        services.for_each(|(service, slices)| records.add(service, slices));
        records
    }

    fn add(&mut self, service: &Service, slices: Option<&[Arc<Slice>]>) {
        let owner = format!("{}.{}.svc", service.name.name, service.name.namespace);
        let has_place = service.kind != ServiceKind::ExternalName && service.cluster_ips != ClusterIps::Unset;
        for port in service.ports.iter().filter(|port| has_place && port.name.len() > MAX_PORT_NAME_LENGTH) {
            self.add_gap(service, format!("no SRV record of port {}: with its underscore that is no label", port.name));
        }
        match (&service.cluster_ips, slices) {
            _ if service.kind == ServiceKind::ExternalName => self.add_alias(owner, service),
            (ClusterIps::Addresses { addresses, .. }, _) => self.add_cluster_ips(&owner, addresses, &service.ports),
            (ClusterIps::Headless, Some(slices)) => self.add_endpoints(&owner, slices),
            (ClusterIps::Headless, None) => {
                self.add_gap(service, "no DNS records: a relay does not follow headless ones; name manifests with -f");
            }
            (ClusterIps::Unset, _) => self.add_gap(service, "no DNS records: it has no cluster IP"),
        }
    }

    fn add_cluster_ips(&mut self, owner: &str, addresses: &[IpAddr], ports: &[ServicePort]) {
        for ip in addresses {
            self.records.push(Record { owner: owner.to_owned(), value: RecordValue::Address(*ip) });
            self.pointers.push((*ip, owner.to_owned()));
        }
        for port in ports {
            self.records.extend(port_record(&port.name, port.protocol, port.port, owner, owner));
        }
    }

    /// Each ready endpoint under the Service's name and under one of its own. Several slices may hold the same one.
    fn add_endpoints(&mut self, owner: &str, slices: &[Arc<Slice>]) {
        let (mut records, mut pointers) = (BTreeSet::new(), BTreeSet::new());
        for slice in slices {
            for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.ready) {
                let own_name = format!("{}.{owner}", label(endpoint));
                for name in [owner, &own_name] {
                    records.insert(Record { owner: name.to_owned(), value: RecordValue::Address(endpoint.address) });
                }
                let ports = slice.ports.iter();
                records.extend(
                    ports.filter_map(|port| port_record(&port.name, port.protocol, port.port, owner, &own_name)),
                );
                pointers.insert((endpoint.address, own_name));
            }
        }
        self.records.extend(records);
        self.pointers.extend(pointers);
    }

    fn add_alias(&mut self, owner: String, service: &Service) {
        let Some(name) = service.external_name.as_deref() else {
            return self.add_gap(service, "no DNS records: it has no externalName");
        };
        let target = name.strip_suffix('.').unwrap_or(name);
        // An address would be a name of four labels that nobody has.
        if !is_domain(target) || target.parse::<IpAddr>().is_ok() {
            return self.add_gap(service, format!("no DNS records: its externalName {name:?} is not a name"));
        }
        self.records.push(Record { owner, value: RecordValue::Alias(format!("{target}.")) });
    }

    fn add_gap(&mut self, service: &Service, reason: impl Into<String>) {
        self.gaps.push(Gap { service: service.name.clone(), reason: reason.into() });
    }
}

/// True for a DNS name without the dot at its end: lower-case letters, digits and dashes, of at most 253.
pub(crate) fn is_domain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(|label| is_name(label, 63))
}

/// `_http._tcp.web.default.svc`; nothing for a port without a name.
fn port_record(name: &str, protocol: Protocol, port: u16, owner: &str, target: &str) -> Option<Record> {
    let owner = format!("_{name}._{}.{owner}", protocol.as_str().to_ascii_lowercase());
    let value = RecordValue::Port { port, target: target.to_owned() };
    is_name(name, MAX_PORT_NAME_LENGTH).then_some(Record { owner, value })
}

/// The first label of an endpoint's own name: its hostname, else its address with dashes.
fn label(endpoint: &Endpoint) -> String {
    match endpoint.hostname.first() {
        Some(hostname) if is_name(hostname, 63) => hostname.to_string(),
        _ => dashed(endpoint.address),
    }
}

/// `10-244-0-6`, `fd00--6`. No label begins or ends with a dash, so `fd00::` is `fd00--0`: the same address.
fn dashed(address: IpAddr) -> String {
    let text = address.to_string().replace(['.', ':'], "-");
    let zero = |missing: bool| if missing { "0" } else { "" };
    format!("{}{text}{}", zero(text.starts_with('-')), zero(text.ends_with('-')))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `add` makes of a Service, a line for each record.
    fn lines(service: &Service, slices: &[Slice]) -> Vec<String> {
        let slices: Vec<_> = slices.iter().cloned().map(Arc::new).collect();
        let mut records = Records::default();
        records.add(service, Some(&slices));
        assert_eq!(records.gaps, []);
        let forward = records.records.iter().map(|Record { owner, value }| match value {
            RecordValue::Address(ip) => format!("{owner} {ip}"),
            RecordValue::Port { port, target } => format!("{owner} {port} {target}"),
            RecordValue::Alias(target) => format!("{owner} {target}"),
        });
        forward.chain(records.pointers.iter().map(|(ip, name)| format!("{ip} {name}"))).collect()
    }

    fn gap(service: &Service) -> String {
        let mut records = Records::default();
        records.add(service, None);
        assert_eq!((records.records.len(), records.gaps.len()), (0, 1));
        records.gaps[0].to_string()
    }

    fn headless(name: &str) -> Service {
        Service { cluster_ips: ClusterIps::Headless, ..Service::new(name) }
    }

    fn alias(target: &str) -> Service {
        Service { kind: ServiceKind::ExternalName, external_name: Some(target.into()), ..Service::new("alias") }
    }

    fn hosted(host: u8, hostname: &str) -> Endpoint {
        Endpoint { hostname: vec![hostname.into()].into(), ..Endpoint::new([10, 244, 0, host]) }
    }

    #[test]
    fn given_cluster_ips_of_both_families_when_asked_then_each_has_its_address_and_each_named_port_its_place() {
        let v6: IpAddr = "fd00::10".parse().expect("an address");
        let dns = Service::new("kube-system/dns").cluster_ip([10, 96, 0, 10]).cluster_ip(v6);
        let dns = dns.udp_port("dns", 53).port("dns-tcp", 53).port("", 80);

        assert_eq!(
            lines(&dns, &[]),
            [
                "dns.kube-system.svc 10.96.0.10",
                "dns.kube-system.svc fd00::10",
                "_dns._udp.dns.kube-system.svc 53 dns.kube-system.svc",
                "_dns-tcp._tcp.dns.kube-system.svc 53 dns.kube-system.svc",
                "10.96.0.10 dns.kube-system.svc",
                "fd00::10 dns.kube-system.svc",
            ]
        );
    }

    #[test]
    fn given_a_headless_service_when_asked_then_ready_endpoints_have_names_of_their_own_and_the_number_of_the_slice() {
        let db = headless("shop/db").port("pg", 1);
        let unready = Endpoint { ready: false, ..hosted(7, "db-7") };
        let slice = Slice::new("db-1", &db).port("pg", 5432);
        let slice = slice.endpoint(hosted(5, "db-0")).endpoint(Endpoint::new([10, 244, 0, 6])).endpoint(unready);

        assert_eq!(
            lines(&db, &[slice.clone(), slice]),
            [
                "10-244-0-6.db.shop.svc 10.244.0.6",
                "_pg._tcp.db.shop.svc 5432 10-244-0-6.db.shop.svc",
                "_pg._tcp.db.shop.svc 5432 db-0.db.shop.svc",
                "db-0.db.shop.svc 10.244.0.5",
                "db.shop.svc 10.244.0.5",
                "db.shop.svc 10.244.0.6",
                "10.244.0.5 db-0.db.shop.svc",
                "10.244.0.6 10-244-0-6.db.shop.svc",
            ]
        );
    }

    #[test]
    fn given_a_hostname_that_is_no_label_when_asked_then_the_address_stands_for_it() {
        let db = headless("db");
        let slice = |hostname| Slice::new("db-1", &db).endpoint(hosted(5, hostname));

        for hostname in ["a.b", "A", "x\n@ IN NS evil."] {
            assert_eq!(lines(&db, &[slice(hostname)])[0], "10-244-0-5.db.default.svc 10.244.0.5");
        }
    }

    #[test]
    fn given_an_alias_when_asked_then_it_leads_to_the_name_whether_a_dot_ends_it_or_not() {
        for target in ["db.example", "db.example."] {
            assert_eq!(lines(&alias(target), &[]), ["alias.default.svc db.example."]);
        }
    }

    #[test]
    fn given_services_without_anything_to_tell_when_asked_then_each_is_named_with_the_reason() {
        let nameless = Service { kind: ServiceKind::ExternalName, ..Service::new("alias") };

        assert!(gap(&alias("192.0.2.1")).starts_with("Service default/alias: no DNS records: its externalName"));
        assert!(gap(&alias("db.example\n@ IN NS evil.")).contains(r"\n"), "a name is a name");
        assert!(gap(&nameless).ends_with("it has no externalName"));
        assert!(gap(&headless("db")).ends_with("name manifests with -f"));
        let long = Service::new("web").cluster_ip([10, 96, 0, 1]).port(&"p".repeat(63), 80);
        let mut records = Records::default();
        records.add(&long, None);
        assert_eq!((records.records.len(), records.gaps.len()), (1, 1), "its address is told all the same");
        assert!(gap(&Service::new("web")).ends_with("it has no cluster IP"));
    }

    #[test]
    fn given_the_longest_names_when_asked_then_they_fit_into_the_longest_domain() {
        let long = "n".repeat(63);
        let web = Service::new(&format!("{long}/{long}")).cluster_ip([10, 96, 0, 1]);
        let longest = web.clone().port(&"p".repeat(MAX_PORT_NAME_LENGTH), 80);

        let owner = lines(&longest, &[])[1].split(' ').next().map(str::len).expect("an owner");

        assert!(owner + 1 + MAX_DOMAIN_LENGTH <= 253, "{owner}");
    }

    #[test]
    fn given_an_address_that_begins_or_ends_with_a_colon_when_it_is_a_name_then_no_dash_is_at_an_end() {
        for (address, name) in
            [("fd00::5", "fd00--5"), ("fd00::", "fd00--0"), ("::5", "0--5"), ("10.0.0.1", "10-0-0-1")]
        {
            assert_eq!(dashed(address.parse().expect("an address")), name);
        }
    }
}
