//! Questions that neighbours ask each other: who has an address? By ARP, and as neighbour solicitations of IPv6.
//!
//! Asked as packets of our own, as a kernel takes one answer and says nothing of others.
#![allow(unsafe_code)] // Addresses of packet sockets: one call a block.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read};
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::rig::{Hardware, LAN, Lan, Namespace, Rig};

/// How long answers are waited for: on these cables they take a thousandth of it.
const PATIENCE: Duration = Duration::from_millis(200);

const BROADCAST: Hardware = [0xff; 6];
const ARP_BYTES: usize = 28;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const SOURCE_HARDWARE: u8 = 1;
const TARGET_HARDWARE: u8 = 2;

/// Which nodes answer when the client asks its neighbours for an address, in alphabetical order.
///
/// IPv6 is asked by multicast and, as if somebody had known the address there before, at each node directly.
pub(crate) fn answering(rig: &Rig, lan: &Lan, address: IpAddr) -> Vec<String> {
    let client = rig.client();
    let own = lan.hardware(client);
    let answers = match address {
        IpAddr::V4(address) => client.run(|| ask_by_arp(own, address)),
        IpAddr::V6(address) => {
            let nodes = (0..).zip(rig.nodes()).map(|(i, _)| v6(Lan::node(i).of(Family::V6)));
            let asked: Vec<Ipv6Addr> = [solicited_nodes(address)].into_iter().chain(nodes).collect();
            client.run(|| ask_by_solicitation(own, address, &asked))
        }
    };
    names(lan, &answers.expect("the client may send packets"))
}

/// Who tells the client, asked or not, that an address is its own, while something is done.
pub(crate) fn claiming(client: &Namespace, lan: &Lan, address: Ipv4Addr, work: impl FnOnce()) -> Vec<String> {
    let socket = client.run(arp_socket).expect("the client may listen");
    work();
    let claims = heard(&socket, |packet| {
        let [sender_hardware, sender] = [packet.get(8..14)?, packet.get(14..18)?];
        (sender == address.octets()).then(|| sender_hardware.try_into().ok()).flatten()
    });
    names(lan, &claims.expect("it is open"))
}

fn names(lan: &Lan, hardware: &BTreeSet<Hardware>) -> Vec<String> {
    let names: BTreeSet<&str> = hardware.iter().map(|hardware| lan.owner(hardware)).collect();
    names.into_iter().map(str::to_owned).collect()
}

fn ask_by_arp(own: Hardware, wanted: Ipv4Addr) -> io::Result<BTreeSet<Hardware>> {
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1]; // Ethernet, IPv4, the lengths of their addresses, a question.
    const REPLY: u8 = 2;
    let sender = v4(Lan::CLIENTS[0].of(Family::V4));
    let mut question = [0; ARP_BYTES];
    question[..8].copy_from_slice(&REQUEST);
    question[8..14].copy_from_slice(&own);
    question[14..18].copy_from_slice(&sender.octets());
    question[24..].copy_from_slice(&wanted.octets());
    let socket = arp_socket()?;
    socket.send_to(&question, &on_link(lan_index()?, BROADCAST)?)?;
    heard(&socket, |packet| {
        let is_answer = packet.get(7) == Some(&REPLY) && packet.get(14..18) == Some(&wanted.octets());
        is_answer.then(|| packet.get(8..14)?.try_into().ok()).flatten()
    })
}

/// A socket for ARP alone, on the client's cable to its neighbours.
fn arp_socket() -> io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(i32::from(ARP_TYPE))))?;
    socket.bind(&on_link(lan_index()?, BROADCAST)?)?;
    Ok(socket)
}

/// As the kernel wants the number of ARP: in the order of the network.
const ARP_TYPE: u16 = 0x0806_u16.to_be();

fn lan_index() -> io::Result<u32> {
    let any = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(&any, LAN)?)
}

/// A hardware address on a cable.
fn on_link(index: u32, hardware: Hardware) -> io::Result<SockAddr> {
    let mut address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::sa_family_t,
        sll_protocol: ARP_TYPE,
        sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    address.sll_addr[..6].copy_from_slice(&hardware);
    // SAFETY: the storage has room for an address of any family, is aligned for each, and is filled as its length says.
    let written = unsafe {
        SockAddr::try_init(|storage, length| {
            storage.cast::<libc::sockaddr_ll>().write(address);
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    };
    Ok(written?.1)
}

fn ask_by_solicitation(own: Hardware, wanted: Ipv6Addr, asked: &[Ipv6Addr]) -> io::Result<BTreeSet<Hardware>> {
    let index = lan_index()?;
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    socket.bind(&SocketAddrV6::new(v6(Lan::CLIENTS[0].of(Family::V6)), 0, 0, 0).into())?;
    socket.set_multicast_if_v6(index)?;
    // Others were forwarded, and count for nothing.
    socket.set_multicast_hops_v6(255)?;
    socket.set_unicast_hops_v6(255)?;
    let mut question = [0; 32]; // The kernel fills in the checksum.
    question[0] = SOLICITATION;
    question[8..24].copy_from_slice(&wanted.octets());
    question[24..26].copy_from_slice(&[SOURCE_HARDWARE, 1]);
    question[26..].copy_from_slice(&own);
    for to in asked {
        let scope = if to.is_multicast() { index } else { 0 };
        socket.send_to(&question, &SocketAddrV6::new(*to, 0, 0, scope).into())?;
    }
    heard(&socket, |message| {
        let is_answer = message.first() == Some(&ADVERTISEMENT) && message.get(8..24) == Some(&wanted.octets());
        let has_hardware = message.get(24) == Some(&TARGET_HARDWARE);
        (is_answer && has_hardware).then(|| message.get(26..32)?.try_into().ok()).flatten()
    })
}

/// The group in which whoever has an address is asked for it.
fn solicited_nodes(address: Ipv6Addr) -> Ipv6Addr {
    let [.., high, low] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (high & 0xff), low)
}

/// What comes within a while, and is understood.
fn heard(mut socket: &Socket, understand: impl Fn(&[u8]) -> Option<Hardware>) -> io::Result<BTreeSet<Hardware>> {
    let deadline = Instant::now() + PATIENCE;
    let (mut found, mut packet) = (BTreeSet::new(), [0; 1500]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(found);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(&mut packet) {
            Ok(length) => found.extend(understand(&packet[..length])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(found),
            Err(error) => return Err(error),
        }
    }
}

fn v4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(v4) => v4,
        IpAddr::V6(_) => unreachable!("asked for as IPv4"),
    }
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(_) => unreachable!("asked for as IPv6"),
        IpAddr::V6(v6) => v6,
    }
}
