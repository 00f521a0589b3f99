//! How this machine reaches an address: by which interface, by a router or not, or that it is its own.
//!
//! The kernel is asked, once for each address in a while: a question is answered before the call to send returns, and waits
//! for nothing. Each thread has a socket and a memory of its own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use rtnetlink::packet_core::NLM_F_REQUEST;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::guard_message::{attribute, find};
use crate::route_message::messages;

/// How long an answer holds. Pods that come and go have addresses that others had.
const LASTS: Duration = Duration::from_secs(5);
/// Addresses that a thread remembers: some hundred KiB. With one more it begins anew.
const REMEMBERED: usize = 4_096;
/// The longest answer of the kernel.
const ANSWER: usize = 4_096;
/// Lengths of a message's header and of the fixed part of one about a route (`struct rtmsg`).
const HEADER: usize = 16;
const ROUTE_HEADER: usize = 12;
/// Asks for the route itself in place of what it is for one address (`linux/rtnetlink.h`, Linux 4.13).
const RTM_F_FIB_MATCH: u32 = 0x2000;

/// How an address is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// It is one of this machine's.
    Here,
    /// It is on the link of the interface with this index.
    Link(u32),
    /// The same, and the route there is for this one address: a pod with a cable of its own, where pods have such.
    Alone(u32),
    /// By a router on that link.
    Router(u32),
}

impl Way {
    /// Of the interface; `None` where none is needed.
    pub(super) fn interface(self) -> Option<u32> {
        match self {
            Self::Here => None,
            Self::Link(interface) | Self::Alone(interface) | Self::Router(interface) => Some(interface),
        }
    }
}

/// The way to an address; `None` where there is none, or the kernel does not tell.
pub(super) fn way_to(address: IpAddr, now: Instant) -> Option<Way> {
    thread_local! {
        static WAYS: RefCell<Ways> = RefCell::default();
    }
    WAYS.with_borrow_mut(|ways| ways.to(address, now))
}

#[derive(Default)]
struct Ways {
    /// Opened when it is needed first.
    socket: Option<Socket>,
    /// Number of the last request.
    number: u32,
    /// With when each was asked.
    known: HashMap<IpAddr, (Option<Way>, Instant), RandomState>,
}

impl Ways {
    fn to(&mut self, address: IpAddr, now: Instant) -> Option<Way> {
        match self.known.get(&address) {
            Some((way, asked)) if now.saturating_duration_since(*asked) < LASTS => return *way,
            _ => {}
        }
        let way = self.ask(address).inspect_err(|_| self.socket = None).ok().flatten(); // Who knows what is still to come.
        if self.known.len() >= REMEMBERED {
            self.known.clear();
        }
        self.known.insert(address, (way, now));
        way
    }

    fn ask(&mut self, address: IpAddr) -> io::Result<Option<Way>> {
        let way = self.exchange(address, 0)?.and_then(Route::way);
        let Some(Way::Link(interface)) = way else { return Ok(way) };
        // A kernel that does not know the question says what it said: it tells links apart no more, and nothing else is lost.
        let route = self.exchange(address, RTM_F_FIB_MATCH)?;
        let is_alone = route.is_some_and(|route| route.prefix == prefix_of_one(address));
        Ok(Some(if is_alone { Way::Alone(interface) } else { Way::Link(interface) }))
    }

    fn exchange(&mut self, address: IpAddr, flags: u32) -> io::Result<Option<Route>> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            None => self.socket.insert(open()?),
        };
        self.number = self.number.wrapping_add(1);
        socket.send(&question(address, self.number, flags), 0)?;
        let mut buffer = [0; ANSWER];
        let length = socket.recv(&mut &mut buffer[..], libc::MSG_DONTWAIT)?.min(ANSWER);
        Ok(read(&buffer[..length], self.number))
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn prefix_of_one(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Asks by which route a packet to the address would go.
fn question(address: IpAddr, number: u32, flags: u32) -> Vec<u8> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut buffer = Vec::with_capacity(HEADER + ROUTE_HEADER + 20);
    buffer.extend([0; 4]); // Its length, once that is known.
    buffer.extend(libc::RTM_GETROUTE.to_ne_bytes());
    buffer.extend(NLM_F_REQUEST.to_ne_bytes());
    buffer.extend(number.to_ne_bytes());
    buffer.extend([0; 4]); // The kernel knows who asks.
    buffer.extend([family as u8, prefix_of_one(address)]);
    buffer.extend([0; ROUTE_HEADER - 2 - 4]);
    buffer.extend(flags.to_ne_bytes());
    match address {
        IpAddr::V4(address) => attribute(&mut buffer, libc::RTA_DST, &address.octets()),
        IpAddr::V6(address) => attribute(&mut buffer, libc::RTA_DST, &address.octets()),
    }
    let length = buffer.len() as u32;
    buffer[..4].copy_from_slice(&length.to_ne_bytes());
    buffer
}

/// What an answer tells of a route.
struct Route {
    /// For how many addresses it is: the length of what they have in common.
    prefix: u8,
    kind: u8,
    interface: Option<u32>,
    has_router: bool,
}

impl Route {
    /// `None` where that is no way.
    fn way(self) -> Option<Way> {
        match self.kind {
            libc::RTN_LOCAL => Some(Way::Here),
            libc::RTN_UNICAST if self.has_router => self.interface.map(Way::Router),
            libc::RTN_UNICAST => self.interface.map(Way::Link),
            _ => None,
        }
    }
}

/// The route that an answer tells; `None` where it tells something else.
fn read(datagram: &[u8], number: u32) -> Option<Route> {
    let answer = messages(datagram).find(|message| message.sequence_number() == number)?;
    if answer.message_type() != libc::RTM_NEWROUTE {
        return None;
    }
    let (header, attributes) = answer.payload().split_first_chunk::<ROUTE_HEADER>()?;
    let interface = find(attributes, libc::RTA_OIF).and_then(|bytes| bytes.first_chunk());
    Some(Route {
        prefix: header[1],
        kind: header[7],
        interface: interface.map(|bytes| u32::from_ne_bytes(*bytes)),
        has_router: [libc::RTA_GATEWAY, libc::RTA_VIA].iter().any(|kind| find(attributes, *kind).is_some()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would say of a route.
    fn told(kind: u8, attributes: &[(u16, u32)]) -> Vec<u8> {
        let mut bytes = question([192, 0, 2, 1].into(), 7, 0);
        bytes[4..6].copy_from_slice(&libc::RTM_NEWROUTE.to_ne_bytes());
        bytes[HEADER + 7] = kind;
        for (kind, value) in attributes {
            attribute(&mut bytes, *kind, &value.to_ne_bytes());
        }
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }

    #[test]
    fn given_answers_when_read_then_a_link_a_router_and_this_machine_are_told_apart() {
        let by = (libc::RTA_OIF, 3);

        let way = |told: Vec<u8>, number| read(&told, number).and_then(Route::way);

        assert_eq!(way(told(libc::RTN_UNICAST, &[by]), 7), Some(Way::Link(3)));
        assert_eq!(way(told(libc::RTN_UNICAST, &[by, (libc::RTA_GATEWAY, 1)]), 7), Some(Way::Router(3)));
        assert_eq!(way(told(libc::RTN_UNICAST, &[by, (libc::RTA_VIA, 1)]), 7), Some(Way::Router(3)));
        assert_eq!(way(told(libc::RTN_LOCAL, &[by]), 7), Some(Way::Here));
        assert_eq!(way(told(libc::RTN_UNREACHABLE, &[by]), 7), None);
        assert_eq!(way(told(libc::RTN_UNICAST, &[]), 7), None);
        assert_eq!(way(told(libc::RTN_UNICAST, &[by]), 8), None, "an answer to another question");
        assert_eq!(read(&told(libc::RTN_UNICAST, &[by]), 7).map(|route| route.prefix), Some(32));
    }

    #[test]
    fn given_answers_that_are_cut_when_read_then_nothing_panics() {
        let whole = told(libc::RTN_UNICAST, &[(libc::RTA_OIF, 3), (libc::RTA_GATEWAY, 1)]);

        for length in 0..whole.len() {
            let mut cut = whole[..length].to_vec();
            let _ = read(&cut, 7);
            if let Some(field) = cut.get_mut(..4) {
                field.copy_from_slice(&(length as u32).to_ne_bytes());
                let _ = read(&cut, 7);
            }
        }
    }

    #[test]
    fn given_this_machine_when_asked_then_loopback_is_its_own_and_an_address_of_nobody_is_not() {
        let now = Instant::now();

        assert_eq!(way_to([127, 0, 0, 1].into(), now), Some(Way::Here));
        assert_ne!(way_to([192, 0, 2, 1].into(), now), Some(Way::Here));
    }

    #[test]
    fn given_an_address_that_is_known_when_asked_again_then_the_kernel_is_asked_only_after_a_while() {
        let (mut ways, now) = (Ways::default(), Instant::now());
        let loopback = [127, 0, 0, 1].into();
        ways.to(loopback, now);

        ways.to(loopback, now + LASTS / 2);
        assert_eq!(ways.number, 1);
        ways.to(loopback, now + LASTS);
        assert_eq!(ways.number, 2);
    }

    #[test]
    fn given_more_addresses_than_are_remembered_when_asked_then_memory_stays_bounded() {
        let (mut ways, now) = (Ways::default(), Instant::now());

        for number in 0..REMEMBERED as u32 + 10 {
            ways.to(std::net::Ipv4Addr::from_bits(0x7f00_0000 + number).into(), now);
        }

        assert!(ways.known.len() <= REMEMBERED);
    }
}
