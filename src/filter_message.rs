//! Messages to and from the kernel about interfaces and the filters of tc on them: pure, bytes in and bytes out.
//!
//! The socket, and what is asked for when, is in `guard_filters`; what filters do is in `guard_program`.

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NetlinkBuffer,
};
use rustix::io::Errno;

use crate::guard_message::{attribute, find, nest, text};
use crate::route_message::{messages, result};

/// The queueing discipline that has filters and queues nothing, and where it and its filters are (`TC_H_CLSACT`).
const CLSACT: &str = "clsact";
const CLSACT_PARENT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// The only filter of its number.
const HANDLE: u32 = 1;
/// The classifier that runs programs.
const BPF: &str = "bpf";
/// Attributes, as `linux/rtnetlink.h` and `linux/pkt_cls.h` number them.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const LENGTH: u16 = 4;
const PROGRAM: u16 = 5;
const FLAGS: u16 = 8;
const HARDWARE_FLAGS: u16 = 9;
/// A filter of any packet (`ETH_P_ALL`): one of IPv4 alone would not see those that have a tag of VLAN 0 (a priority) before
/// their header, which the kernel takes off only after its filters.
const ANY: u16 = libc::ETH_P_ALL as u16;
/// What interfaces are whose packets have a header of Ethernet (`ARPHRD_ETHER`, `ARPHRD_LOOPBACK`).
const ETHERNET: [u16; 2] = [1, 772];
/// The program's result is the verdict (`TCA_BPF_FLAG_ACT_DIRECT`).
const DIRECT: u32 = 1;
/// It is not for the hardware (`TCA_CLS_FLAGS_SKIP_HW`).
const SKIP_HARDWARE: u32 = 1;
/// Lengths of the fixed parts (`struct ifinfomsg`, `struct tcmsg`), and of an instruction.
const LINK_HEADER: usize = 16;
const HEADER: usize = 20;
const INSTRUCTION: usize = 8;

/// Which of an interface's packets filters see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Direction {
    Ingress = 0xffff_fff2,
    Egress = 0xffff_fff3,
}

/// An interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Link {
    pub(crate) index: u32,
    /// True where its packets begin with a header of Ethernet, and not with that of IP.
    pub(crate) is_ethernet: bool,
}

/// What is asked of the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request<'a> {
    /// Which interfaces there are.
    Links,
    /// The filters of one.
    Filters(u32, Direction),
    /// That an interface has filters at all. Refused as existing where others have seen to that.
    MakeRoom(u32),
    /// The end of that, with all filters that are there.
    RemoveRoom(u32),
    /// This program as the filter of this number, in the place of what is there now. Those of lower numbers come first.
    Set(u32, u16, &'a [u8]),
    /// No filter of this number.
    Remove(u32, u16),
}

/// The message that asks for it.
pub(crate) fn write(request: Request<'_>, number: u32) -> Vec<u8> {
    let kernel = |kind: u16, flags: u16, fixed: &[u8]| {
        let mut buffer = vec![0; 4]; // Its length, once that is known.
        buffer.extend(kind.to_ne_bytes());
        buffer.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        buffer.extend(number.to_ne_bytes());
        buffer.extend([0; 4]); // The kernel knows who asks.
        buffer.extend(fixed);
        buffer
    };
    let mut buffer = match request {
        Request::Links => kernel(libc::RTM_GETLINK, NLM_F_DUMP, &[0; LINK_HEADER]),
        Request::Filters(link, direction) => {
            kernel(libc::RTM_GETTFILTER, NLM_F_DUMP, &fixed(link, 0, direction as u32, 0))
        }
        Request::MakeRoom(link) => {
            let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
            kernel(libc::RTM_NEWQDISC, flags, &fixed(link, CLSACT_HANDLE, CLSACT_PARENT, 0))
        }
        Request::RemoveRoom(link) => {
            kernel(libc::RTM_DELQDISC, NLM_F_ACK, &fixed(link, CLSACT_HANDLE, CLSACT_PARENT, 0))
        }
        Request::Set(link, number, _) => {
            let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
            let fixed = fixed(link, HANDLE, Direction::Ingress as u32, place(number));
            kernel(libc::RTM_NEWTFILTER, flags, &fixed)
        }
        Request::Remove(link, number) => {
            let fixed = fixed(link, HANDLE, Direction::Ingress as u32, place(number));
            kernel(libc::RTM_DELTFILTER, NLM_F_ACK, &fixed)
        }
    };
    match request {
        Request::MakeRoom(_) => text(&mut buffer, KIND, CLSACT),
        Request::Set(_, _, program) => {
            text(&mut buffer, KIND, BPF);
            nest(&mut buffer, OPTIONS, |options| {
                attribute(options, LENGTH, &((program.len() / INSTRUCTION) as u16).to_ne_bytes());
                attribute(options, PROGRAM, program);
                attribute(options, FLAGS, &DIRECT.to_ne_bytes());
                attribute(options, HARDWARE_FLAGS, &SKIP_HARDWARE.to_ne_bytes());
            });
        }
        _ => {}
    }
    let length = buffer.len() as u32;
    buffer[..4].copy_from_slice(&length.to_ne_bytes());
    buffer
}

/// The number of a filter, and what it is for.
fn place(number: u16) -> u32 {
    u32::from(number) << 16 | u32::from(ANY.to_be())
}

/// `struct tcmsg`
fn fixed(link: u32, handle: u32, parent: u32, place: u32) -> [u8; HEADER] {
    let mut fixed = [0; HEADER];
    for (bytes, number) in fixed[4..].chunks_exact_mut(4).zip([link, handle, parent, place]) {
        bytes.copy_from_slice(&number.to_ne_bytes());
    }
    fixed
}

/// A message of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// What became of the request with this number.
    Answer(u32, Result<(), Errno>),
    /// All was told that the request with this number asked for; or not, for this reason.
    End(u32, Result<(), Errno>),
    /// What is being told to the request with this number has changed meanwhile.
    Interrupted(u32),
    /// There is an interface.
    Link(Link),
    /// There is a filter.
    Filter(Filter),
}

/// A filter that is there, whoever has made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) number: u16,
    /// Its instructions; `None` where it is none that [`Request::Set`] could have made.
    pub(crate) program: Option<Vec<u8>>,
}

/// What a datagram of the kernel says. What is about something else is passed over.
pub(crate) fn read(datagram: &[u8]) -> impl Iterator<Item = Heard> {
    messages(datagram).flat_map(|message| {
        let interrupted = message.flags() & NLM_F_DUMP_INTR != 0;
        let interrupted = interrupted.then(|| Heard::Interrupted(message.sequence_number()));
        interrupted.into_iter().chain(heard(&message))
    })
}

fn heard(message: &NetlinkBuffer<&[u8]>) -> Option<Heard> {
    let (number, payload) = (message.sequence_number(), message.payload());
    match message.message_type() {
        NLMSG_ERROR => Some(Heard::Answer(number, result(payload))),
        NLMSG_DONE => Some(Heard::End(number, result(payload))),
        libc::RTM_NEWLINK => link(payload).map(Heard::Link),
        libc::RTM_NEWTFILTER => filter(payload).map(Heard::Filter),
        _ => None,
    }
}

fn link(payload: &[u8]) -> Option<Link> {
    let kind = payload.get(2..)?.first_chunk().copied().map(u16::from_ne_bytes)?;
    Some(Link { index: word(payload, 4)?, is_ethernet: ETHERNET.contains(&kind) })
}

/// `None` where it is not a filter, but what there is of all those with one number.
fn filter(payload: &[u8]) -> Option<Filter> {
    let (handle, found) = (word(payload, 8)?, word(payload, 16)?);
    if handle == 0 {
        return None;
    }
    let number = (found >> 16) as u16;
    let attributes = payload.get(HEADER..)?;
    let is_bpf = find(attributes, KIND).is_some_and(|kind| kind.strip_suffix(&[0]) == Some(BPF.as_bytes()));
    let program = find(attributes, OPTIONS).and_then(|options| find(options, PROGRAM)).map(<[u8]>::to_vec);
    Some(Filter { number, program: program.filter(|_| is_bpf && handle == HANDLE && found == place(number)) })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBER: u16 = 10_700;
    const FILTER: [u8; 16] = [1, 0, 0, 0, 0x6b, 0, 0x72, 0x6b, 6, 0, 0, 0, 255, 255, 255, 255];

    /// What the kernel would tell of a filter that was asked for so.
    fn told(request: Request<'_>) -> Vec<Heard> {
        let mut message = write(request, 7);
        message[4..6].copy_from_slice(&libc::RTM_NEWTFILTER.to_ne_bytes());
        read(&message).collect()
    }

    #[test]
    fn given_a_filter_when_written_and_read_then_it_is_the_same() {
        for number in [NUMBER, 1] {
            let filter = Filter { number, program: Some(FILTER.to_vec()) };

            assert_eq!(told(Request::Set(3, number, &FILTER)), [Heard::Filter(filter)]);
        }
    }

    #[test]
    fn given_a_filter_that_others_have_made_when_read_then_its_number_is_told_and_no_program() {
        let others = |change: fn(&mut Vec<u8>)| {
            let mut message = write(Request::Set(3, NUMBER, &FILTER), 7);
            message[4..6].copy_from_slice(&libc::RTM_NEWTFILTER.to_ne_bytes());
            change(&mut message);
            read(&message).collect::<Vec<_>>()
        };

        let theirs = [Heard::Filter(Filter { number: NUMBER, program: None })];
        assert_eq!(others(|message| message[24..28].copy_from_slice(&2_u32.to_ne_bytes())), theirs, "a second one");
        let of_ipv4 = |message: &mut Vec<u8>| {
            let place = u32::from(NUMBER) << 16 | u32::from((libc::ETH_P_IP as u16).to_be());
            message[32..36].copy_from_slice(&place.to_ne_bytes());
        };
        assert_eq!(others(of_ipv4), theirs);
        assert_eq!(others(|message| message[40..43].copy_from_slice(b"u32")), theirs, "of another kind");
        assert_eq!(others(|message| message[24..28].fill(0)), [], "no filter, but what all of that number have");
    }

    #[test]
    fn given_interfaces_when_read_then_those_of_ethernet_are_told_from_others() {
        for (kind, is_ethernet) in [(1_u16, true), (772, true), (65_534, false), (768, false)] {
            let mut message = write(Request::Links, 7);
            message[4..6].copy_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
            message[18..20].copy_from_slice(&kind.to_ne_bytes());
            message[20..24].copy_from_slice(&5_u32.to_ne_bytes());

            let heard: Vec<Heard> = read(&message).collect();

            assert_eq!(heard, [Heard::Link(Link { index: 5, is_ethernet })], "{kind}");
        }
    }

    #[test]
    fn given_messages_that_are_cut_when_read_then_nothing_panics() {
        let whole = write(Request::Set(3, NUMBER, &FILTER), 7);
        for length in 16..whole.len() {
            let mut message = whole[..length].to_vec();
            message[..4].copy_from_slice(&(length as u32).to_ne_bytes());
            for kind in [libc::RTM_NEWTFILTER, libc::RTM_NEWLINK, NLMSG_ERROR, NLMSG_DONE] {
                message[4..6].copy_from_slice(&kind.to_ne_bytes());
                let _ = read(&message).count();
            }
        }
    }

    #[test]
    fn given_requests_when_written_then_they_are_whole_and_name_the_interface() {
        for request in [
            Request::Filters(9, Direction::Egress),
            Request::MakeRoom(9),
            Request::RemoveRoom(9),
            Request::Set(9, NUMBER, &FILTER),
            Request::Remove(9, NUMBER),
        ] {
            let message = write(request, 7);

            assert_eq!(word(&message, 0), Some(message.len() as u32), "{request:?}");
            assert_eq!((word(&message, 8), word(&message, 20)), (Some(7), Some(9)), "{request:?}");
        }
    }
}
