//! Values as people write them on a command line: times, ranges, "or none", `--expose`.
//!
//! Grammar only, each error says what would be right. What the values mean is told where they are used: `config`.

use std::fmt;
use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroU32};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use crate::dns_records::{MAX_DOMAIN_LENGTH, is_domain};
use crate::dns_zone::ReverseNetwork;
use crate::findings::{is_name, parse_cidr, parse_ip};
use crate::name::{ObjectName, Protocol};
use crate::plan::Expose;
use crate::scaffold::NewNodePort;

/// What would have been right.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(&'static str);

/// A length of time: `10s`, `250ms`, `1m30s`, `2h`, `0`. Printed in the same form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time(pub Duration);

const TIME: ValueError = ValueError("not a time: write 10s, 250ms, 1m30s, 2h or 0");

impl FromStr for Time {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let mut rest = text;
        let mut total = Duration::ZERO;
        loop {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or(TIME)?;
            let (number, tail) = rest.split_at(digits);
            let letters = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(letters);
            let number: u64 = number.parse().map_err(|_| TIME)?;
            let milliseconds = number.checked_mul(unit_ms(unit).ok_or(TIME)?).ok_or(TIME)?;
            total = total.checked_add(Duration::from_millis(milliseconds)).ok_or(TIME)?;
            rest = tail;
            if rest.is_empty() {
                return Ok(Self(total));
            }
        }
    }
}

fn unit_ms(unit: &str) -> Option<u64> {
    match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, milliseconds) = (self.0.as_secs(), self.0.subsec_millis());
        let parts = [(seconds / 3600, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s"), (milliseconds.into(), "ms")];
        if self.0.is_zero() {
            return f.write_str("0s");
        }
        parts.iter().filter(|(count, _)| *count > 0).try_for_each(|(count, unit)| write!(f, "{count}{unit}"))
    }
}

/// A value, or `none` (or nothing at all) to switch off what it configures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrNone<T>(pub Option<T>);

impl FromStr for OrNone<SocketAddr> {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        or_none(text, ValueError("not an address: write 127.0.0.1:10249, [::1]:10249, or none"))
    }
}

impl FromStr for OrNone<IpNet> {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        or_none(text, ValueError("not a network: write a CIDR like 127.96.0.0/16, or none"))
    }
}

impl FromStr for OrNone<Time> {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        or_none(text, ValueError("not a time: write 10s, 1m30s, 2h, or none"))
    }
}

impl FromStr for OrNone<NonZeroU8> {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        or_none(text, ValueError("write a number from 1 to 255, or none"))
    }
}

impl FromStr for OrNone<NonZeroU32> {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        or_none(text, ValueError("write a number from 1 on, or none"))
    }
}

fn or_none<T: FromStr>(text: &str, error: ValueError) -> Result<OrNone<T>, ValueError> {
    match text {
        "" | "none" => Ok(OrNone(None)),
        value => value.parse().map(|value| OrNone(Some(value))).map_err(|_| error),
    }
}

impl<T: fmt::Display> fmt::Display for OrNone<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("none"),
        }
    }
}

/// Port numbers from the first to the last: `30000-32767`. Never empty, never with 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

impl FromStr for PortRange {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let bounds = text.split_once('-').and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
        match bounds {
            Some((from, to)) if 0 < from && from <= to => Ok(Self(from..=to)),
            _ => Err(ValueError("not a range of ports: write the first and the last, like 30000-32767")),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

impl FromStr for NewNodePort {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(Self::Number(number)),
            _ if text == "auto" => Ok(Self::Auto),
            _ => Err(ValueError("write auto, or a number like 30080")),
        }
    }
}

/// Reads an IP address with a port.
pub fn socket_address(text: &str) -> Result<SocketAddr, ValueError> {
    const RIGHT: ValueError =
        ValueError("write an IP address and a port, like 10.0.0.1:8000 or [::1]:8000; names are not looked up");
    text.parse().map_err(|_| RIGHT)
}

/// Where clients connect to: an address, and the protocol where one was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Address and port.
    pub address: SocketAddr,
    /// `None`: whatever is served there.
    pub protocol: Option<Protocol>,
}

/// Reads `ADDRESS:PORT` or `ADDRESS:PORT/PROTOCOL`.
pub fn destination(text: &str) -> Result<Destination, ValueError> {
    const RIGHT: ValueError =
        ValueError("write an IP address, a port and maybe a protocol, like 10.96.0.10:80 or [fd00::10]:53/UDP");
    let (address, protocol) = text.split_once('/').map_or((text, None), |(address, word)| (address, Some(word)));
    let protocol = match protocol.map(str::to_ascii_uppercase).as_deref() {
        None => None,
        Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some(_) => return Err(RIGHT),
    };
    let address: SocketAddr = address.parse().map_err(|_| RIGHT)?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port()); // As listeners are named.
    let named = !address.ip().is_unspecified() && address.port() != 0;
    named.then_some(Destination { address, protocol }).ok_or(RIGHT)
}

/// Reads a network, or one address as the network of it alone: `203.0.113.0/24`, `203.0.113.7`. Bits behind the prefix
/// are cleared, zeros in front are decimal.
pub fn network(text: &str) -> Result<IpNet, ValueError> {
    const RIGHT: ValueError = ValueError("write a network or an address, like 203.0.113.0/24 or 203.0.113.7");
    parse_cidr(text).or_else(|| parse_ip(text).map(IpNet::from)).ok_or(RIGHT)
}

/// Reads `LISTEN=NAMESPACE/SERVICE:PORT`; the namespace may be left out and is `default` then.
pub fn expose(text: &str) -> Result<Expose, ValueError> {
    const RIGHT: ValueError =
        ValueError("write address:port=namespace/service:port, like 127.0.0.1:8080=default/web:http");
    let (listen, target) = text.split_once('=').ok_or(RIGHT)?;
    let listen: SocketAddr = listen.parse().map_err(|_| RIGHT)?;
    let (service, port) = target.rsplit_once(':').ok_or(RIGHT)?;
    let service = ObjectName::parse(service);
    let complete = [&service.namespace[..], &service.name, port].iter().all(|part| !part.is_empty());
    if !complete || listen.port() == 0 || listen.ip().is_multicast() {
        return Err(RIGHT);
    }
    Ok(Expose { listen, service, port: port.to_owned() })
}

/// Reads the name of a Service or namespace: a DNS label as the API server takes it.
pub fn label(text: &str) -> Result<String, ValueError> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let fine = (1..=63).contains(&text.len())
        && text.chars().all(inner)
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-');
    fine.then(|| text.to_owned()).ok_or(ValueError(
        "not a name: 1 to 63 of lower case letters, digits and '-', beginning with a letter, like web-1",
    ))
}

/// Reads the name of a namespace: a DNS label, of which the first character may be a digit.
pub fn namespace(text: &str) -> Result<String, ValueError> {
    const RIGHT: ValueError =
        ValueError("not a name: 1 to 63 of lower case letters, digits and '-', with no '-' at either end");
    is_name(text, 63).then(|| text.to_owned()).ok_or(RIGHT)
}

/// Reads the domain of a cluster, with or without a dot at its end, which is not kept.
pub fn domain(text: &str) -> Result<String, ValueError> {
    const RIGHT: ValueError = ValueError("write a domain in lower case, like cluster.local, of 51 letters at most");
    let name = text.strip_suffix('.').unwrap_or(text);
    (name.len() <= MAX_DOMAIN_LENGTH && is_domain(name)).then(|| name.to_owned()).ok_or(RIGHT)
}

/// Reads a network that can be a zone of its own.
pub fn reverse_network(text: &str) -> Result<ReverseNetwork, ValueError> {
    const RIGHT: ValueError =
        ValueError("write a network of whole octets, like 10.96.0.0/16 (of IPv6: of whole digits, like fd00:10::/32)");
    parse_cidr(text).and_then(ReverseNetwork::new).ok_or(RIGHT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_times_as_people_write_them_when_read_and_printed_then_they_are_the_same() {
        let cases = [("250ms", 250), ("10s", 10_000), ("1m30s", 90_000), ("1h", 3_600_000), ("1s500ms", 1_500)];

        for (text, milliseconds) in cases {
            let time: Time = text.parse().expect("a time");
            assert_eq!(time.0, Duration::from_millis(milliseconds), "{text}");
            assert_eq!(time.to_string(), text);
        }
        assert_eq!("0".parse(), Ok(Time(Duration::ZERO)));
        assert_eq!(Time(Duration::ZERO).to_string(), "0s");
    }

    #[test]
    fn given_no_times_when_read_then_they_are_refused() {
        for text in ["", "10", "s", "-1s", "1.5s", "10 s", "10S", "1d", "s10", "18446744073709551615h", "1s5"] {
            assert_eq!(text.parse::<Time>(), Err(TIME), "{text}");
        }
    }

    #[test]
    fn given_none_when_read_then_it_is_off() {
        for text in ["", "none"] {
            assert_eq!(text.parse::<OrNone<SocketAddr>>(), Ok(OrNone(None)));
        }
        assert_eq!("127.96.0.0/16".parse::<OrNone<IpNet>>().expect("a network").to_string(), "127.96.0.0/16");
        assert!("127.0.0.1".parse::<OrNone<SocketAddr>>().is_err(), "the port is missing");
        assert_eq!("5m".parse(), Ok(OrNone(Some(Time(Duration::from_secs(300))))));
        assert_eq!("none".parse(), Ok(OrNone::<Time>(None)));
        assert!("5".parse::<OrNone<Time>>().is_err() && "0".parse::<OrNone<NonZeroU8>>().is_err());
    }

    #[test]
    fn given_port_ranges_when_read_then_only_rising_ones_are_taken() {
        assert_eq!("30000-32767".parse(), Ok(PortRange(30000..=32767)));
        assert_eq!("80-80".parse::<PortRange>().expect("one port").to_string(), "80-80");
        for text in ["0-10", "10-9", "10", "-", "1-65536", "a-b"] {
            assert!(text.parse::<PortRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn given_an_expose_when_read_then_address_service_and_port_are_apart() {
        let v6 = expose("[::1]:5353=kube-system/dns:dns-tcp").expect("an expose");
        let short = expose("127.0.0.1:80=web:8080").expect("an expose");

        assert_eq!(v6.listen.to_string(), "[::1]:5353");
        assert_eq!((v6.service.to_string().as_str(), v6.port.as_str()), ("kube-system/dns", "dns-tcp"));
        assert_eq!((short.service.to_string().as_str(), short.port.as_str()), ("default/web", "8080"));
        for text in [
            "",
            "127.0.0.1:80",
            "127.0.0.1=a/b:c",
            "127.0.0.1:0=a/b:c",
            "127.0.0.1:80=a/b",
            "127.0.0.1:80=/b:c",
            "224.0.0.1:80=a/b:c",
        ] {
            assert!(expose(text).is_err(), "{text}");
        }
    }

    #[test]
    fn given_destinations_as_people_write_them_when_read_then_a_protocol_may_be_named() {
        let read = |text| destination(text).ok().map(|read| (read.address.to_string(), read.protocol));

        assert_eq!(read("10.96.0.10:80"), Some(("10.96.0.10:80".into(), None)));
        assert_eq!(read("10.96.0.10:53/udp"), Some(("10.96.0.10:53".into(), Some(Protocol::Udp))));
        assert_eq!(read("[::ffff:10.96.0.10]:80"), read("10.96.0.10:80"));
        assert_eq!(read("[fd00::10]:80/TCP"), Some(("[fd00::10]:80".into(), Some(Protocol::Tcp))));
        for text in ["", "10.96.0.10", "web:80", "10.96.0.10:80/", "10.96.0.10:80/SCTP", "0.0.0.0:80", "10.96.0.10:0"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn given_networks_and_addresses_when_read_then_an_address_is_a_network_of_one() {
        let cases = [
            ("203.0.113.7", "203.0.113.7/32"),
            ("203.0.113.7/24", "203.0.113.0/24"),
            ("2001:db8::1", "2001:db8::1/128"),
            ("::ffff:203.0.113.7", "203.0.113.7/32"),
        ];
        for (text, net) in cases {
            assert_eq!(network(text).expect("a network").to_string(), net);
        }
        for text in ["", "203.0.113", "203.0.113.0/", "203.0.113.0/33", "0x1.0.0.0", "web", "fe80::1%eth0"] {
            assert!(network(text).is_err(), "{text}");
        }
    }

    #[test]
    fn given_names_when_read_then_only_dns_labels_pass() {
        assert!(label("web-1").is_ok());
        for text in ["", "Web", "1web", "web-", "we.b", &"w".repeat(64)] {
            assert!(label(text).is_err(), "{text}");
        }
    }

    #[test]
    fn given_namespaces_domains_and_zones_when_read_then_only_those_that_dns_has_pass() {
        assert_eq!(namespace("1-shop"), Ok("1-shop".to_owned()));
        assert_eq!(domain("cluster.local."), Ok("cluster.local".to_owned()));
        assert_eq!(reverse_network("10.96.0.0/16").expect("a zone").to_string(), "10.96.0.0/16");
        for text in ["", "Shop", "a.b", "-a", &"n".repeat(64)] {
            assert!(namespace(text).is_err(), "{text}");
        }
        for text in ["", ".", "a..b", "Cluster.local", "a b", &"d".repeat(52)] {
            assert!(domain(text).is_err(), "{text}");
        }
        for text in ["", "10.96.0.0", "10.96.0.0/12", "fd00::/47"] {
            assert!(reverse_network(text).is_err(), "{text}");
        }
    }
}
