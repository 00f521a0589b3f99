//! Messages to and from the kernel about local routes, and nothing else of rtnetlink: pure, bytes in and bytes out.
//!
//! What is asked is written with the types of `netlink-packet-route`. What is heard is read by hand, as a router's every
//! change of any table comes by: all but two bytes of most messages are never looked at. The socket is in `route_socket`.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NetlinkBuffer, NetlinkMessage, NlasIterator,
};
use rustix::io::Errno;

use crate::name::Family;
use crate::vip_routes::{Change, LocalRoute, News};

/// Index of the loopback interface: the first one of each network namespace.
const LOOPBACK: u32 = 1;
/// The table of what is local (`RT_TABLE_LOCAL`): the first that the kernel looks into.
const LOCAL_TABLE: u8 = libc::RT_TABLE_LOCAL;
/// Length of the fixed part of a message about a route (`struct rtmsg`).
const ROUTE_HEADER: usize = 12;
/// A route that the kernel has made of another one for itself (`RTM_F_CLONED`).
const CLONED: u32 = 0x200;

/// A message of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// A local route is there, or gone. With the number of the request that asked for it, where one did.
    News(u32, News),
    /// What became of the request with this number.
    Answer(u32, Result<(), Errno>),
    /// All routes were told that the request with this number asked for; or not, for this reason.
    End(u32, Result<(), Errno>),
    /// What is being told to the request with this number has changed meanwhile: some of it may be missing.
    Interrupted(u32),
}

/// Appends a change to a buffer: several may go to the kernel at once.
///
/// The kernel answers those that it refuses, and the others where `acknowledge` is true.
pub(crate) fn write_change(change: Change, protocol: u8, number: u32, acknowledge: bool, buffer: &mut Vec<u8>) {
    let route = local_route(change.address(), protocol);
    let (request, flags) = match change {
        Change::Add(_) => (RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_EXCL),
        Change::Remove(_) => (RouteNetlinkMessage::DelRoute(route), 0),
    };
    let acknowledge = if acknowledge { NLM_F_ACK } else { 0 };
    write(request, NLM_F_REQUEST | flags | acknowledge, number, buffer);
}

/// Appends the request to tell all local routes of a family.
pub(crate) fn write_look(family: Family, number: u32, buffer: &mut Vec<u8>) {
    let mut all = RouteMessage::default();
    let address_family = netlink_family(family);
    all.header = RouteHeader { address_family, table: LOCAL_TABLE, kind: RouteType::Local, ..RouteHeader::default() };
    write(RouteNetlinkMessage::GetRoute(all), NLM_F_REQUEST | NLM_F_DUMP, number, buffer);
}

/// `local ADDRESS dev lo table local proto PROTOCOL`. The kernel removes no route whose protocol is another one.
fn local_route(address: IpAddr, protocol: u8) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: netlink_family(Family::of(address)),
        destination_prefix_length: IpNet::from(address).prefix_len(),
        table: LOCAL_TABLE,
        protocol: RouteProtocol::from(protocol),
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    route.attributes = vec![RouteAttribute::Destination(address.into()), RouteAttribute::Oif(LOOPBACK)];
    route
}

fn netlink_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn write(request: RouteNetlinkMessage, flags: u16, number: u32, buffer: &mut Vec<u8>) {
    let mut message = NetlinkMessage::from(request);
    message.header.flags = flags;
    message.header.sequence_number = number;
    message.finalize();
    let start = buffer.len();
    buffer.resize(start + message.buffer_len(), 0); // A multiple of 4, as are all lengths in it.
    message.serialize(&mut buffer[start..]);
}

/// What a datagram of the kernel says. What is about something else, or cannot be read, is passed over.
pub(crate) fn read(datagram: &[u8], protocol: u8) -> impl Iterator<Item = Heard> {
    messages(datagram).flat_map(move |message| {
        let interrupted = message.flags() & NLM_F_DUMP_INTR != 0;
        let interrupted = interrupted.then(|| Heard::Interrupted(message.sequence_number()));
        interrupted.into_iter().chain(heard(&message, protocol))
    })
}

/// The messages of a datagram of any netlink socket, up to where it cannot be read.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = NetlinkBuffer<&[u8]>> {
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(datagram).ok()?;
        let length = (message.length() as usize).next_multiple_of(4);
        datagram = datagram.get(length..).unwrap_or_default();
        Some(message)
    })
}

fn heard(message: &NetlinkBuffer<&[u8]>, protocol: u8) -> Option<Heard> {
    let (number, payload) = (message.sequence_number(), message.payload());
    let route = |news: fn(LocalRoute) -> News| local(payload, protocol).map(|route| Heard::News(number, news(route)));
    match message.message_type() {
        // What it has replaced is not told.
        libc::RTM_NEWROUTE if message.flags() & NLM_F_REPLACE != 0 => route(|_| News::Unknown),
        libc::RTM_NEWROUTE => route(News::Appeared),
        libc::RTM_DELROUTE => route(News::Vanished),
        // Where loopback goes down or loses its last address, routes go without a word.
        libc::RTM_NEWLINK | libc::RTM_DELADDR if is_loopback(payload) => Some(Heard::News(number, News::Unknown)),
        NLMSG_ERROR => Some(Heard::Answer(number, result(payload))),
        NLMSG_DONE => Some(Heard::End(number, result(payload))),
        _ => None,
    }
}

/// What an answer says. Both kinds begin with 0, or with the number of an error below it.
pub(crate) fn result(payload: &[u8]) -> Result<(), Errno> {
    match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(code) if code < 0 => {
            let error = std::io::Error::from_raw_os_error(code.saturating_neg());
            Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        }
        _ => Ok(()),
    }
}

/// Whether a message about an interface (`struct ifinfomsg`) or its address (`struct ifaddrmsg`) is about loopback. A node
/// has many others, and they come and go with its pods.
fn is_loopback(payload: &[u8]) -> bool {
    payload.get(4..).and_then(<[u8]>::first_chunk).is_some_and(|index| u32::from_ne_bytes(*index) == LOOPBACK)
}

/// A route of the table of what is local that delivers here; `None` for any other.
fn local(payload: &[u8], protocol: u8) -> Option<LocalRoute> {
    let (header, attributes) = payload.split_first_chunk::<ROUTE_HEADER>()?;
    let [family, prefix, _, _, table, its_protocol, _, kind, flags @ ..] = *header;
    if table != LOCAL_TABLE || kind != libc::RTN_LOCAL || u32::from_ne_bytes(flags) & CLONED != 0 {
        return None;
    }
    let destination = NlasIterator::new(attributes).flatten().find(|attribute| attribute.kind() == libc::RTA_DST);
    let destination = destination.map(|attribute| attribute.value().to_vec()).unwrap_or_default();
    let address: IpAddr = match i32::from(family) {
        libc::AF_INET => <[u8; 4]>::try_from(destination).ok()?.into(),
        libc::AF_INET6 => <[u8; 16]>::try_from(destination).ok()?.into(),
        _ => return None,
    };
    Some(LocalRoute { net: IpNet::new(address, prefix).ok()?.trunc(), own: its_protocol == protocol })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A message without a body, as the kernel answers the request of number 7.
    pub(crate) fn answer(kind: u16, flags: u16, code: i32) -> Vec<u8> {
        let mut bytes = [20_u32.to_ne_bytes(), [0; 4], 7_u32.to_ne_bytes(), [0; 4], code.to_ne_bytes()].concat();
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes
    }

    const OURS: u8 = 107;

    fn written(change: Change) -> Vec<u8> {
        let mut buffer = Vec::new();
        write_change(change, OURS, 7, true, &mut buffer);
        buffer
    }

    fn route(address: &str, own: bool) -> LocalRoute {
        LocalRoute { net: address.parse::<IpAddr>().expect("an address").into(), own }
    }

    #[test]
    fn given_changes_when_written_then_what_the_kernel_would_echo_reads_as_the_same_routes() {
        for address in ["10.96.0.1", "fd96::1"] {
            let ip = address.parse().expect("an address");

            let [added, removed] = [Change::Add(ip), Change::Remove(ip)].map(written);

            let [here, gone] = [&added, &removed].map(|bytes| read(bytes, OURS).collect::<Vec<_>>());
            assert_eq!(here, [Heard::News(7, News::Appeared(route(address, true)))]);
            assert_eq!(gone, [Heard::News(7, News::Vanished(route(address, true)))]);
            assert_eq!(read(&added, 4).collect::<Vec<_>>(), [Heard::News(7, News::Appeared(route(address, false)))]);
        }
    }

    #[test]
    fn given_a_change_when_written_then_its_bytes_are_those_of_the_kernels_interface() {
        let bytes = written(Change::Add([10, 96, 0, 1].into()));

        // nlmsghdr: length, type RTM_NEWROUTE, REQUEST|ACK|EXCL|CREATE, number, port
        let mut wanted = [44_u32.to_ne_bytes(), [0; 4], 7_u32.to_ne_bytes(), [0; 4]].concat();
        wanted[4..6].copy_from_slice(&24_u16.to_ne_bytes());
        wanted[6..8].copy_from_slice(&0x605_u16.to_ne_bytes());
        // rtmsg: AF_INET /32, table local, protocol 107, scope host, type local; RTA_DST, RTA_OIF
        wanted.extend([2, 32, 0, 0, 255, 107, 254, 2, 0, 0, 0, 0]);
        wanted.extend([8_u16.to_ne_bytes(), 1_u16.to_ne_bytes(), [10, 96], [0, 1]].concat());
        wanted.extend([8_u16.to_ne_bytes(), 4_u16.to_ne_bytes()].concat());
        wanted.extend(1_u32.to_ne_bytes());
        assert_eq!(bytes, wanted);
    }

    #[test]
    fn given_several_messages_in_a_datagram_when_read_then_each_is_heard_and_those_of_other_tables_are_not() {
        let mut datagram = written(Change::Add([10, 96, 0, 1].into()));
        let mut other_table = written(Change::Add([10, 96, 0, 2].into()));
        other_table[20] = 254;
        let mut broadcast = written(Change::Add([10, 96, 0, 255].into()));
        broadcast[23] = 3;
        datagram.extend(other_table.into_iter().chain(broadcast).chain(written(Change::Remove([10, 96, 0, 3].into()))));

        let heard: Vec<_> = read(&datagram, OURS).collect();

        let first = Heard::News(7, News::Appeared(route("10.96.0.1", true)));
        assert_eq!(heard, [first, Heard::News(7, News::Vanished(route("10.96.0.3", true)))]);
    }

    #[test]
    fn given_a_route_that_replaces_another_when_read_then_it_is_to_be_looked_at_all_of_them() {
        let mut bytes = written(Change::Add([10, 96, 0, 1].into()));
        bytes[6..8].copy_from_slice(&NLM_F_REPLACE.to_ne_bytes());

        assert_eq!(read(&bytes, OURS).collect::<Vec<_>>(), [Heard::News(7, News::Unknown)]);
    }

    #[test]
    fn given_a_network_when_read_then_its_prefix_counts() {
        let mut bytes = written(Change::Add([127, 0, 0, 1].into()));
        bytes[17] = 8;

        let loopback = LocalRoute { net: "127.0.0.0/8".parse().expect("a network"), own: true };
        assert_eq!(read(&bytes, OURS).collect::<Vec<_>>(), [Heard::News(7, News::Appeared(loopback))]);
    }

    #[test]
    fn given_answers_when_read_then_they_carry_number_and_error() {
        let answer = |kind, flags, code| read(&answer(kind, flags, code), OURS).collect::<Vec<_>>();

        assert_eq!(answer(NLMSG_ERROR, 0, 0), [Heard::Answer(7, Ok(()))]);
        assert_eq!(answer(NLMSG_ERROR, 0, -1), [Heard::Answer(7, Err(Errno::PERM))]);
        assert_eq!(answer(NLMSG_DONE, 0, 0), [Heard::End(7, Ok(()))]);
        assert_eq!(answer(NLMSG_DONE, NLM_F_DUMP_INTR, 0), [Heard::Interrupted(7), Heard::End(7, Ok(()))]);
        assert_eq!(answer(libc::RTM_NEWNEIGH, 0, 0), []);
        for code in [-5_000, i32::MIN] {
            assert_eq!(answer(NLMSG_ERROR, 0, code), [Heard::Answer(7, Err(Errno::IO))], "no error that there is");
        }
    }

    #[test]
    fn given_an_interface_that_changes_when_read_then_loopback_alone_is_news() {
        for (index, news) in [(LOOPBACK, vec![Heard::News(0, News::Unknown)]), (2, vec![])] {
            let mut bytes = [24_u32.to_ne_bytes(), [0; 4], [0; 4], [0; 4], [0; 4], index.to_ne_bytes()].concat();
            bytes[4..6].copy_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());

            assert_eq!(read(&bytes, OURS).collect::<Vec<_>>(), news);
        }
    }

    #[test]
    fn given_bytes_that_are_cut_or_wrong_when_read_then_nothing_is_heard_and_nothing_panics() {
        let whole = written(Change::Add([10, 96, 0, 1].into()));

        for length in 0..whole.len() {
            let mut cut = whole[..length].to_vec();
            assert_eq!(read(&cut, OURS).count(), 0, "{length} bytes");
            if let Some(field) = cut.get_mut(..4) {
                field.copy_from_slice(&(length as u32).to_ne_bytes());
                assert!(read(&cut, OURS).count() <= 1);
            }
        }
        for place in 0..whole.len() {
            for byte in [0, 1, 3, 255] {
                let mut wrong = whole.clone();
                wrong[place] = byte;
                let _ = read(&wrong, OURS).count();
            }
        }
    }
}
