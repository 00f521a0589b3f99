//! Zones of DNS as text, for a server that answers machines outside of the cluster.
//!
//! Pure. The form is that of RFC 1035, which every server loads; which records there are is `dns_records`.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::dns_records::{Record, RecordValue, Records};

/// Seconds for which an answer may be remembered: what a cluster's own DNS says, as kubeadm sets it up.
const TTL_SECONDS: u32 = 30;

/// Version of the specification that the records follow, which a zone tells.
const SCHEMA_VERSION: &str = "1.1.0";

/// The zone of a cluster's domain: A, AAAA, SRV and CNAME. `serial` has to grow with each change.
pub fn forward(records: &Records, domain: &str, serial: u32) -> String {
    let version = format!("dns-version IN TXT \"{SCHEMA_VERSION}\"\n");
    let lines: String = records.records.iter().map(line).collect();
    head(domain, serial) + &version + &lines
}

/// The zone of the addresses of a network: a PTR for each address in it that has a name in the domain.
pub fn reverse(records: &Records, domain: &str, network: &ReverseNetwork, serial: u32) -> String {
    let pointers: BTreeSet<_> = records.pointers.iter().collect();
    let lines = pointers.into_iter().filter_map(|(ip, name)| {
        let owner = network.owner(*ip)?;
        Some(format!("{owner} IN PTR {name}.{domain}.\n"))
    });
    let lines: String = lines.collect();
    head(&network.origin(), serial) + &lines
}

/// What every zone begins with. Nobody is to ask the name server that it names: whoever loads the zone is the one.
fn head(origin: &str, serial: u32) -> String {
    format!(
        "$ORIGIN {origin}.\n\
         $TTL {TTL_SECONDS}\n\
         @ IN SOA localhost. root.localhost. {serial} 3600 900 604800 {TTL_SECONDS}\n\
         @ IN NS localhost.\n"
    )
}

fn line(Record { owner, value }: &Record) -> String {
    match value {
        RecordValue::Address(ip @ IpAddr::V4(_)) => format!("{owner} IN A {ip}\n"),
        RecordValue::Address(ip @ IpAddr::V6(_)) => format!("{owner} IN AAAA {ip}\n"),
        // All alike: no priority, and one weight.
        RecordValue::Port { port, target } => format!("{owner} IN SRV 0 100 {port} {target}\n"),
        RecordValue::Alias(target) => format!("{owner} IN CNAME {target}\n"),
    }
}

/// A network that is a zone of its own: whole octets of IPv4, whole hexadecimal digits of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReverseNetwork(IpNet);

impl ReverseNetwork {
    /// `None` where the prefix ends inside of an octet, or of a digit.
    pub fn new(network: IpNet) -> Option<Self> {
        network.prefix_len().is_multiple_of(label_bits(network.addr())).then_some(Self(network.trunc()))
    }

    /// The zone's name without the dot at its end: `96.10.in-addr.arpa`.
    pub fn origin(&self) -> String {
        let labels = labels(self.0.addr());
        let tree = if self.0.addr().is_ipv4() { "in-addr.arpa" } else { "ip6.arpa" };
        let own = labels[self.label_count(&labels)..].iter().map(String::as_str);
        own.chain([tree]).collect::<Vec<_>>().join(".")
    }

    /// An address's name in the zone: `10.0`; `None` where it is not in the network.
    fn owner(&self, ip: IpAddr) -> Option<String> {
        let labels = labels(ip);
        let inside = self.0.contains(&ip).then(|| labels[..self.label_count(&labels)].join("."))?;
        Some(if inside.is_empty() { "@".to_owned() } else { inside })
    }

    /// How many of an address's labels are names in the zone; the others are the zone's own name.
    fn label_count(&self, labels: &[String]) -> usize {
        labels.len() - usize::from(self.0.prefix_len() / label_bits(self.0.addr()))
    }
}

/// `10.96.0.0/16`.
impl fmt::Display for ReverseNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bits of an address that are one label of its name.
fn label_bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 8 } else { 4 }
}

/// The labels of an address, the last octet or digit first.
fn labels(ip: IpAddr) -> Vec<String> {
    match ip {
        IpAddr::V4(ip) => ip.octets().iter().rev().map(ToString::to_string).collect(),
        IpAddr::V6(ip) => {
            let digits = ip.octets().into_iter().rev().flat_map(|octet| [octet & 0xf, octet >> 4]);
            digits.map(|digit| format!("{digit:x}")).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn network(text: &str) -> Option<ReverseNetwork> {
        ReverseNetwork::new(text.parse().expect("a network"))
    }

    fn records() -> Records {
        let record = |owner: &str, value| Record { owner: owner.into(), value };
        Records {
            records: vec![
                record("web.default.svc", RecordValue::Address(ip("10.96.0.10"))),
                record("web.default.svc", RecordValue::Address(ip("fd00::10"))),
                record("_http._tcp.web.default.svc", RecordValue::Port { port: 80, target: "web.default.svc".into() }),
                record("mail.shop.svc", RecordValue::Alias("mail.example.".into())),
            ],
            pointers: vec![
                (ip("10.244.0.5"), "db-0.db.shop.svc".into()),
                (ip("10.96.0.10"), "web.default.svc".into()),
                (ip("10.96.0.9"), "cart.shop.svc".into()),
                (ip("10.96.0.10"), "web.default.svc".into()),
                (ip("fd00::10"), "web.default.svc".into()),
            ],
            gaps: vec![],
        }
    }

    #[test]
    fn given_records_when_written_then_the_zone_has_a_head_and_a_line_for_each() {
        assert_eq!(
            forward(&records(), "cluster.local", 1_795_302_240),
            "\
$ORIGIN cluster.local.
$TTL 30
@ IN SOA localhost. root.localhost. 1795302240 3600 900 604800 30
@ IN NS localhost.
dns-version IN TXT \"1.1.0\"
web.default.svc IN A 10.96.0.10
web.default.svc IN AAAA fd00::10
_http._tcp.web.default.svc IN SRV 0 100 80 web.default.svc
mail.shop.svc IN CNAME mail.example.
"
        );
    }

    #[test]
    fn given_a_network_when_its_reverse_zone_is_written_then_it_holds_the_addresses_inside_each_once() {
        let network = network("10.96.0.0/16").expect("whole octets");

        assert_eq!(
            reverse(&records(), "cluster.local", &network, 7),
            "\
$ORIGIN 96.10.in-addr.arpa.
$TTL 30
@ IN SOA localhost. root.localhost. 7 3600 900 604800 30
@ IN NS localhost.
9.0 IN PTR cart.shop.svc.cluster.local.
10.0 IN PTR web.default.svc.cluster.local.
"
        );
    }

    #[test]
    fn given_a_network_of_ipv6_when_its_reverse_zone_is_written_then_each_digit_is_a_label() {
        let text = reverse(&records(), "cluster.local", &network("fd00::/112").expect("whole digits"), 7);

        let origin = format!("$ORIGIN {}d.f.ip6.arpa.\n", "0.".repeat(26));
        assert!(text.starts_with(&origin), "{text}");
        assert!(text.ends_with("\n0.1.0.0 IN PTR web.default.svc.cluster.local.\n"), "{text}");
    }

    #[test]
    fn given_networks_when_taken_as_zones_then_they_end_where_labels_do() {
        assert_eq!(network("10.96.0.0/12"), None);
        assert_eq!(network("fd00::/47"), None);
        assert_eq!(network("10.96.7.1/16"), network("10.96.0.0/16"));
        let whole = |text: &str| network(text).expect("a zone");
        assert_eq!(whole("0.0.0.0/0").origin(), "in-addr.arpa");
        assert_eq!(whole("::/0").origin(), "ip6.arpa");
        assert_eq!(whole("10.96.0.10/32").origin(), "10.0.96.10.in-addr.arpa");
        assert_eq!(whole("10.96.0.10/32").owner(ip("10.96.0.10")).as_deref(), Some("@"));
        assert_eq!(whole("10.96.0.0/16").owner(ip("10.97.0.1")), None);
        assert_eq!(whole("0.0.0.0/0").owner(ip("fd00::1")), None);
    }
}
