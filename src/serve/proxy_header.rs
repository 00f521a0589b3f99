//! The header of the PROXY protocol, versions 1 and 2, as it goes out: what a backend gets before a client's first byte.
//!
//! Pure. How it goes out is `direction`; headers that come in are taken apart by `header_decoder`.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::plan::HeaderVersion;

/// What a header of version 1 begins with.
pub(super) const V1_START: &[u8] = b"PROXY ";
/// The longest of version 1, with its line end; from the protocol's text. None that is written here is longer.
pub(super) const V1_LONGEST: usize = 107;

/// What a header of version 2 begins with.
pub(super) const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version and command: the sender's own connection.
pub(super) const V2_LOCAL: u8 = 0x20;
/// Version and command: somebody's whom the sender names.
pub(super) const V2_PROXY: u8 = 0x21;
/// TCP over IPv4; 12 bytes of addresses and ports follow.
pub(super) const V2_TCP4: u8 = 0x11;
/// TCP over IPv6; 36 bytes of addresses and ports follow.
pub(super) const V2_TCP6: u8 = 0x21;

/// Who talks to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parties {
    /// Who connected.
    pub(crate) client: SocketAddr,
    /// Where to.
    pub(crate) destination: SocketAddr,
}

/// The two addresses, in one family.
enum Addresses {
    V4([[u8; 4]; 2]),
    V6([Ipv6Addr; 2]),
}

impl Parties {
    /// No header has room for two families, and no connection is of two. But a balancer in front may say so; then the one
    /// of IPv4 is written in the way of IPv6 (`::ffff:192.0.2.1`).
    fn addresses(&self) -> Addresses {
        match (self.client.ip(), self.destination.ip()) {
            (IpAddr::V4(client), IpAddr::V4(destination)) => Addresses::V4([client.octets(), destination.octets()]),
            (client, destination) => Addresses::V6([client, destination].map(in_ipv6)),
        }
    }
}

fn in_ipv6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// What a backend gets before a client's first byte. Not counted as payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Preface {
    bytes: [u8; V1_LONGEST],
    length: u8,
}

impl Preface {
    /// A header that tells who the client is, without additional fields.
    pub(crate) fn of(version: HeaderVersion, parties: &Parties) -> Self {
        Self::write(|room| match version {
            HeaderVersion::V1 => write_v1(room, parties),
            HeaderVersion::V2 => write_v2(room, parties),
        })
    }

    fn write(write: impl FnOnce(&mut &mut [u8]) -> io::Result<()>) -> Self {
        let mut bytes = [0; V1_LONGEST];
        let mut room = &mut bytes[..];
        write(&mut room).expect("no header is longer than the longest");
        let length = V1_LONGEST - room.len();
        Self { bytes, length: length as u8 }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length.into()]
    }
}

fn write_v1(room: &mut &mut [u8], parties: &Parties) -> io::Result<()> {
    let (client_port, destination_port) = (parties.client.port(), parties.destination.port());
    match parties.addresses() {
        Addresses::V4(_) => write!(room, "PROXY TCP4 {} {}", parties.client.ip(), parties.destination.ip())?,
        Addresses::V6([client, destination]) => write!(room, "PROXY TCP6 {client} {destination}")?,
    }
    write!(room, " {client_port} {destination_port}\r\n")
}

fn write_v2(room: &mut &mut [u8], parties: &Parties) -> io::Result<()> {
    room.write_all(V2_SIGNATURE)?;
    match parties.addresses() {
        Addresses::V4(addresses) => {
            room.write_all(&[V2_PROXY, V2_TCP4, 0, 12])?;
            room.write_all(addresses.as_flattened())?;
        }
        Addresses::V6(addresses) => {
            room.write_all(&[V2_PROXY, V2_TCP6, 0, 36])?;
            room.write_all(addresses.map(|ip| ip.octets()).as_flattened())?;
        }
    }
    room.write_all(&parties.client.port().to_be_bytes())?;
    room.write_all(&parties.destination.port().to_be_bytes())
}

#[cfg(test)]
pub(super) mod tests {
    use ppp::{v1, v2};
    use proptest::prelude::*;

    use super::*;

    impl Preface {
        /// Any bytes, up to 107.
        pub(in crate::serve) fn any(bytes: &[u8]) -> Self {
            Self::write(|room| room.write_all(bytes))
        }
    }

    fn parties(client: &str, destination: &str) -> Parties {
        let address = |text: &str| text.parse().expect("an address");
        Parties { client: address(client), destination: address(destination) }
    }

    pub(in crate::serve) fn v4() -> Parties {
        parties("203.0.113.7:40000", "10.96.0.10:80")
    }

    pub(in crate::serve) fn v6() -> Parties {
        parties("[2001:db8::7]:40000", "[fd00:96::10]:443")
    }

    fn written(version: HeaderVersion, parties: &Parties) -> Vec<u8> {
        Preface::of(version, parties).as_bytes().to_vec()
    }

    /// A header of version 2 with these bytes behind its length, which tells of them.
    pub(in crate::serve) fn binary(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).expect("a short body").to_be_bytes();
        [&V2_SIGNATURE[..], &[command, family], &length, body].concat()
    }

    #[test]
    fn t126_given_a_client_when_a_header_is_written_then_it_is_as_the_protocol_says() {
        assert_eq!(written(HeaderVersion::V1, &v4()), b"PROXY TCP4 203.0.113.7 10.96.0.10 40000 80\r\n");
        assert_eq!(written(HeaderVersion::V1, &v6()), b"PROXY TCP6 2001:db8::7 fd00:96::10 40000 443\r\n");
        let body = [203, 0, 113, 7, 10, 96, 0, 10, 0x9c, 0x40, 0, 80];
        assert_eq!(written(HeaderVersion::V2, &v4()), binary(0x21, 0x11, &body));
        assert_eq!(written(HeaderVersion::V2, &v6()).len(), 52);
    }

    #[test]
    fn given_the_longest_addresses_when_a_header_is_written_then_there_is_room_for_it() {
        let address = "[1111:2222:3333:4444:5555:6666:7777:8888]:65535";
        let mapped = "[::ffff:111.111.111.111]:65535";

        assert_eq!(written(HeaderVersion::V1, &parties(address, address)).len(), 104);
        assert!(written(HeaderVersion::V1, &parties(mapped, mapped)).ends_with(b" 65535 65535\r\n"));
    }

    #[test]
    fn given_parties_of_two_families_when_a_header_is_written_then_both_are_told_in_ipv6() {
        let mixed = Parties { client: v4().client, destination: v6().destination };

        let line = b"PROXY TCP6 ::ffff:203.0.113.7 fd00:96::10 40000 443\r\n";
        assert_eq!(written(HeaderVersion::V1, &mixed), line);
        let client = in_ipv6(mixed.client.ip()).octets();
        let v2 = written(HeaderVersion::V2, &mixed);
        assert_eq!((v2[13], &v2[16..32], v2.len()), (0x21, &client[..], 52));
    }

    pub(in crate::serve) fn addresses() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
        prop_oneof![
            any::<([u8; 4], u16, [u8; 4], u16)>()
                .prop_map(|(a, p, b, q)| (SocketAddr::from((a, p)), SocketAddr::from((b, q)))),
            any::<([u16; 8], u16, [u16; 8], u16)>()
                .prop_map(|(a, p, b, q)| (SocketAddr::from((a, p)), SocketAddr::from((b, q)))),
        ]
    }

    pub(in crate::serve) fn versions() -> impl Strategy<Value = HeaderVersion> {
        prop_oneof![Just(HeaderVersion::V1), Just(HeaderVersion::V2)]
    }

    pub(in crate::serve) fn theirs(client: SocketAddr, destination: SocketAddr) -> v1::Addresses {
        match (client, destination) {
            (SocketAddr::V4(a), SocketAddr::V4(b)) => v1::Addresses::new_tcp4(*a.ip(), *b.ip(), a.port(), b.port()),
            (SocketAddr::V6(a), SocketAddr::V6(b)) => v1::Addresses::new_tcp6(*a.ip(), *b.ip(), a.port(), b.port()),
            _ => v1::Addresses::Unknown,
        }
    }

    proptest! {
        #[test]
        fn t126_given_any_client_when_a_header_is_written_then_another_implementation_reads_the_same(
            version in versions(),
            (client, destination) in addresses(),
        ) {
            let bytes = written(version, &Parties { client, destination });

            match version {
                HeaderVersion::V1 => {
                    let read = v1::Header::try_from(&*bytes).expect("a whole header");
                    prop_assert_eq!(read.addresses, theirs(client, destination));
                    prop_assert_eq!(read.header.len(), bytes.len());
                }
                HeaderVersion::V2 => {
                    let read = v2::Header::try_from(&*bytes).expect("a whole header");
                    prop_assert_eq!(read.addresses, v2::Addresses::from((client, destination)));
                    prop_assert_eq!((read.command, read.protocol), (v2::Command::Proxy, v2::Protocol::Stream));
                    prop_assert_eq!(read.len(), bytes.len());
                }
            }
        }
    }
}
