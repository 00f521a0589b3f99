//! Takes the header of the PROXY protocol, versions 1 and 2, apart as it comes in.
//!
//! Pure. Who has to send one is `introduction`; headers that go out are written by `proxy_header`.
//!
//! A header is read up to its last byte and no further, in any pieces. What does not begin like one, is longer than
//! [`LONGEST`] or says what no sender of TCP would is malformed at the first byte that shows it. Additional fields (TLVs) of
//! version 2 are passed over, its checksum, too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use crate::serve::proxy_header::{Parties, V1_LONGEST, V1_START, V2_LOCAL, V2_PROXY, V2_SIGNATURE, V2_TCP4, V2_TCP6};

/// The longest header that is read. By its length field one could have 64 KiB; a certificate's names fit into this.
pub(super) const LONGEST: usize = 4096;

/// In place of a family in version 1: the sender does not say.
const V1_UNKNOWN: &[u8] = b"UNKNOWN";
/// Signature, command, family and length of version 2.
const V2_FIXED: usize = 16;
const V2_UNSPECIFIED: u8 = 0x00;
const V2_UNIX_STREAM: u8 = 0x31;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// Nothing about a client: the connection is the sender's own (a health check), or it does not know.
    Own,
    /// The sender passes this connection on.
    Passed(Parties),
}

/// Why some bytes are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    /// They do not begin as one.
    #[error("no PROXY header")]
    Missing,
    /// It does not end in time.
    #[error("the PROXY header is too long")]
    TooLong,
    /// Version 2 knows LOCAL and PROXY.
    #[error("the PROXY header has an unknown version or command")]
    Command,
    /// Not of TCP.
    #[error("the PROXY header is not about TCP")]
    Family,
    /// Addresses or ports that are none.
    #[error("the PROXY header has wrong addresses")]
    Addresses,
}

/// Takes a header of either version apart as it comes in. Holds at most [`LONGEST`] bytes.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// What came so far.
    seen: Vec<u8>,
}

/// What became of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    /// How many of them belong to the header: all of them while it has not ended.
    pub(super) taken: usize,
    /// What it says; `None` where more has to come.
    pub(super) header: Option<Header>,
}

impl Decoder {
    /// True once it was given a byte.
    pub(super) fn has_begun(&self) -> bool {
        !self.seen.is_empty()
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`Malformed`]: whatever comes, this will be no header.
    pub(super) fn decode(&mut self, bytes: &[u8]) -> Result<Decoded, Malformed> {
        let before = self.seen.len();
        let room = LONGEST - before; // A header that has not ended is shorter.
        self.seen.extend_from_slice(&bytes[..bytes.len().min(room)]);
        Ok(match parse(&self.seen)? {
            Some((header, length)) => Decoded { taken: length - before, header: Some(header) },
            None => Decoded { taken: self.seen.len() - before, header: None },
        })
    }
}

/// The header that some bytes begin with, and its length; `None` where more has to come.
fn parse(bytes: &[u8]) -> Result<Option<(Header, usize)>, Malformed> {
    match bytes.first() {
        None => Ok(None),
        Some(first) if *first == V1_START[0] => parse_v1(bytes),
        Some(first) if *first == V2_SIGNATURE[0] => parse_v2(bytes),
        Some(_) => Err(Malformed::Missing),
    }
}

/// True where bytes are a beginning of what is expected, or begin with it.
fn agrees(bytes: &[u8], expected: &[u8]) -> bool {
    bytes.iter().zip(expected).all(|(byte, expected)| byte == expected)
}

fn parse_v1(bytes: &[u8]) -> Result<Option<(Header, usize)>, Malformed> {
    if !agrees(bytes, V1_START) {
        return Err(Malformed::Missing);
    }
    let line = &bytes[..bytes.len().min(V1_LONGEST)];
    let Some(end) = line.windows(2).position(|pair| pair == b"\r\n") else {
        return if line.len() < V1_LONGEST { Ok(None) } else { Err(Malformed::TooLong) };
    };
    // The line end cannot be within the start, which has none.
    let header = read_line(line.get(V1_START.len()..end).ok_or(Malformed::Addresses)?)?;
    Ok(Some((header, end + 2)))
}

/// What follows `PROXY `, without the line end.
fn read_line(line: &[u8]) -> Result<Header, Malformed> {
    if line == V1_UNKNOWN || line.strip_prefix(V1_UNKNOWN).is_some_and(|rest| rest.starts_with(b" ")) {
        return Ok(Header::Own); // Whatever follows is to be ignored.
    }
    let text = std::str::from_utf8(line).map_err(|_| Malformed::Addresses)?;
    let mut fields = text.split(' ');
    match fields.next() {
        Some("TCP4") => read_addresses::<Ipv4Addr>(fields),
        Some("TCP6") => read_addresses::<Ipv6Addr>(fields),
        _ => Err(Malformed::Family),
    }
}

fn read_addresses<'a, A>(mut fields: impl Iterator<Item = &'a str>) -> Result<Header, Malformed>
where
    A: FromStr + Into<IpAddr>,
{
    let mut next = || fields.next().ok_or(Malformed::Addresses);
    let (client, destination) = (read_ip::<A>(next()?)?, read_ip::<A>(next()?)?);
    let (client_port, destination_port) = (read_port(next()?)?, read_port(next()?)?);
    if fields.next().is_some() {
        return Err(Malformed::Addresses);
    }
    Ok(passed((client, client_port), (destination, destination_port)))
}

fn read_ip<A: FromStr + Into<IpAddr>>(text: &str) -> Result<IpAddr, Malformed> {
    text.parse::<A>().map(Into::into).map_err(|_| Malformed::Addresses)
}

/// Digits alone, and none that says nothing: `+80` and `080` are numbers for Rust.
fn read_port(text: &str) -> Result<u16, Malformed> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    text.parse().ok().filter(|_| is_plain).ok_or(Malformed::Addresses)
}

fn parse_v2(bytes: &[u8]) -> Result<Option<(Header, usize)>, Malformed> {
    if !agrees(bytes, V2_SIGNATURE) {
        return Err(Malformed::Missing);
    }
    if bytes.get(V2_SIGNATURE.len()).is_some_and(|command| ![V2_LOCAL, V2_PROXY].contains(command)) {
        return Err(Malformed::Command);
    }
    let Some((fixed, rest)) = bytes.split_first_chunk::<V2_FIXED>() else { return Ok(None) };
    let [.., command, family, high, low] = *fixed;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if V2_FIXED + length > LONGEST {
        return Err(Malformed::TooLong);
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    let header = if command == V2_LOCAL { Header::Own } else { read_body(family, body)? };
    Ok(Some((header, V2_FIXED + length)))
}

/// What follows the fixed part of a PROXY command: addresses, ports, and fields that are passed over.
fn read_body(family: u8, body: &[u8]) -> Result<Header, Malformed> {
    match family {
        V2_UNSPECIFIED | V2_UNIX_STREAM => Ok(Header::Own),
        V2_TCP4 => read_binary::<4, Ipv4Addr>(body),
        V2_TCP6 => read_binary::<16, Ipv6Addr>(body),
        _ => Err(Malformed::Family),
    }
}

fn read_binary<const N: usize, A>(body: &[u8]) -> Result<Header, Malformed>
where
    A: From<[u8; N]> + Into<IpAddr>,
{
    let parts = || {
        let (client, rest) = body.split_first_chunk::<N>()?;
        let (destination, rest) = rest.split_first_chunk::<N>()?;
        let (client_port, rest) = rest.split_first_chunk::<2>()?;
        let (destination_port, _fields) = rest.split_first_chunk::<2>()?;
        let at = |ip: [u8; N], port: [u8; 2]| -> (IpAddr, u16) { (A::from(ip).into(), u16::from_be_bytes(port)) };
        Some(passed(at(*client, *client_port), at(*destination, *destination_port)))
    };
    parts().ok_or(Malformed::Addresses)
}

/// An IPv4 address that a sender wrote as one of IPv6 (`::ffff:192.0.2.1`) is what it is: lists of networks know it so.
fn passed(client: (IpAddr, u16), destination: (IpAddr, u16)) -> Header {
    let at = |(ip, port): (IpAddr, u16)| SocketAddr::new(ip.to_canonical(), port);
    Header::Passed(Parties { client: at(client), destination: at(destination) })
}

#[cfg(test)]
mod tests {
    use ppp::v2;
    use proptest::prelude::*;

    use super::*;
    use crate::plan::HeaderVersion;
    use crate::serve::proxy_header::tests::{addresses, binary, theirs, v4, v6, versions};

    /// Reads pieces until the header ends, and tells how long it was.
    fn read<'b>(pieces: impl IntoIterator<Item = &'b [u8]>) -> Result<Option<(Header, usize)>, Malformed> {
        let (mut decoder, mut length) = (Decoder::default(), 0);
        for piece in pieces {
            let decoded = decoder.decode(piece)?;
            length += decoded.taken;
            match decoded.header {
                Some(header) => return Ok(Some((header, length))),
                None => assert_eq!(decoded.taken, piece.len()),
            }
        }
        Ok(None)
    }

    fn whole(bytes: &[u8]) -> Result<Option<Header>, Malformed> {
        read([bytes]).map(|read| read.map(|(header, _)| header))
    }

    #[test]
    fn given_senders_that_name_nobody_when_read_then_the_connection_is_their_own() {
        let nobody = [
            b"PROXY UNKNOWN\r\n".to_vec(),
            b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n".to_vec(),
            b"PROXY UNKNOWN \xff\r\n".to_vec(),
            binary(0x20, 0x00, &[]),
            binary(0x20, 0x11, &[203, 0, 113, 7, 10, 96, 0, 10, 0, 1, 0, 80]),
            binary(0x20, 0xff, &[4, 0, 1, 0]),
            binary(0x21, 0x00, &[4, 0, 1, 0]),
            binary(0x21, 0x31, &[0; 216]),
        ];
        for header in nobody {
            assert_eq!(read([&*header]), Ok(Some((Header::Own, header.len()))), "{header:?}");
        }
    }

    #[test]
    fn given_what_is_no_header_when_read_then_the_first_byte_that_shows_it_ends_it() {
        let wrong: [(&[u8], Malformed); 22] = [
            (b"G", Malformed::Missing),
            (b"PROXI", Malformed::Missing),
            (b"PROXY\r", Malformed::Missing),
            (b"p", Malformed::Missing),
            (b"\r\n\r\n\0\r\nQUIT\r", Malformed::Missing),
            (b"\r\n\r\n\0\r\nQUIT\n\x11", Malformed::Command),
            (b"\r\n\r\n\0\r\nQUIT\n\x22", Malformed::Command),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x10\x00", Malformed::TooLong),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x00", Malformed::Family),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x04\x01\x02\x03\x04", Malformed::Addresses),
            (b"PROXY \r\n", Malformed::Family),
            (b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n", Malformed::Family),
            (b"PROXY TCP4\r\n", Malformed::Addresses),
            (b"PROXY TCP4 1.2.3.4 ::1 1 2\r\n", Malformed::Addresses),
            (b"PROXY TCP6 1.2.3.4 1.2.3.4 1 2\r\n", Malformed::Addresses),
            (b"PROXY TCP4  1.2.3.4 1.2.3.4 1 2\r\n", Malformed::Addresses),
            (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n", Malformed::Addresses),
            (b"PROXY TCP4 1.2.3.4 1.2.3.4 +1 2\r\n", Malformed::Addresses),
            (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 02\r\n", Malformed::Addresses),
            (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n", Malformed::Addresses),
            (b"PROXY UNKNOWNS\r\n", Malformed::Family),
            (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n\r\n", Malformed::Addresses),
        ];
        for (bytes, malformed) in wrong {
            assert_eq!(whole(bytes), Err(malformed), "{:?}", String::from_utf8_lossy(bytes));
            let without_last = &bytes[..bytes.len() - 1];
            assert_eq!(whole(without_last), Ok(None), "{:?}", String::from_utf8_lossy(without_last));
        }
    }

    #[test]
    fn given_a_line_without_end_when_read_then_it_is_too_long_at_107_bytes() {
        let line = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat();

        assert_eq!(whole(&line[..106]), Ok(None));
        assert_eq!(whole(&line[..107]), Err(Malformed::TooLong));
        let longest = [&line[..105], b"\r\n"].concat();
        assert_eq!(read([&*longest]), Ok(Some((Header::Own, 107))));
    }

    #[test]
    fn given_a_header_as_long_as_there_may_be_when_read_then_it_is_taken_and_a_longer_one_is_not() {
        let header = |length: usize| binary(V2_LOCAL, V2_UNSPECIFIED, &vec![0; length - V2_FIXED]);

        assert_eq!(read(header(LONGEST).chunks(512)), Ok(Some((Header::Own, LONGEST))));
        assert_eq!(whole(&header(LONGEST + 1)[..V2_FIXED]), Err(Malformed::TooLong));
    }

    #[test]
    fn given_ipv4_addresses_in_the_clothes_of_ipv6_when_read_then_they_are_ipv4() {
        let line = b"PROXY TCP6 ::ffff:203.0.113.7 ::ffff:10.96.0.10 40000 80\r\n";
        let half = b"PROXY TCP6 ::ffff:203.0.113.7 fd00:96::10 40000 443\r\n";

        assert_eq!(whole(line), Ok(Some(Header::Passed(v4()))));
        let mixed = Parties { client: v4().client, destination: v6().destination };
        assert_eq!(whole(half), Ok(Some(Header::Passed(mixed))), "lists judge the client as what it is");
    }

    /// A header as the other implementation writes it.
    fn written_by_another(
        version: HeaderVersion,
        (client, destination): (SocketAddr, SocketAddr),
        field: &[u8],
    ) -> Vec<u8> {
        match version {
            HeaderVersion::V1 => theirs(client, destination).to_string().into_bytes(),
            HeaderVersion::V2 => {
                let command = v2::Version::Two | v2::Command::Proxy;
                let header = v2::Builder::with_addresses(command, v2::Protocol::Stream, (client, destination));
                header.write_tlv(v2::Type::NoOp, field).and_then(v2::Builder::build).expect("a short header")
            }
        }
    }

    proptest! {
        #[test]
        fn given_a_header_of_another_implementation_when_it_comes_in_pieces_then_it_is_read_to_its_end_and_no_further(
            version in versions(),
            addresses in addresses(),
            field in prop::collection::vec(any::<u8>(), 0..600),
            payload in prop::collection::vec(any::<u8>(), 0..40),
            piece in 1_usize..200,
        ) {
            let header = written_by_another(version, addresses, &field);
            let bytes = [&*header, &payload].concat();

            let read = read(bytes.chunks(piece));

            let (client, destination) = addresses;
            let expected = passed((client.ip(), client.port()), (destination.ip(), destination.port()));
            prop_assert_eq!(read, Ok(Some((expected, header.len()))));
        }

        #[test]
        fn given_any_bytes_when_read_in_pieces_then_nothing_panics_and_pieces_make_no_difference(
            start in prop_oneof![
                Just(&b""[..]),
                Just(V1_START),
                Just(&V2_SIGNATURE[..]),
                Just(&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0"[..]),
            ],
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            piece in 1_usize..50,
        ) {
            let bytes = [start, &bytes].concat();

            prop_assert_eq!(read(bytes.chunks(piece)), read([&*bytes]));
        }
    }
}
