//! What leads answers to clients' addresses to this process: messages to the kernel, pure.
//!
//! ```text
//! nf_tables, table kube-relay-107-replies:  for a transparent socket here ─▶ set MARK; with MARK, and not for here ─▶ drop
//! ip rule   107: fwmark MARK lookup 107107                                  MARK is a value and a mask: `reply_mark`
//! ip route  local default dev lo table 107107                               both families each
//! ```
//!
//! Whoever removes rules or routes of others, as systemd-networkd does when it restarts, would have answers go on to clients,
//! which reset connections that they know nothing of. So what is marked goes nowhere else: it is sent again, until all is back.
//!
//! Which socket a packet is for is asked of the kernel: so an answer to a connection of ours is led here, and what else goes
//! to the same client, also from the same backend, goes its way. When to ask for it, and the sockets, is in `reply_path`.
//!
//! Of a large answer over UDP, the first fragment alone has the ports by which its socket is known. Where connections are
//! tracked, the kernel puts fragments together first; elsewhere a third rule has it do so, one that no packet comes by.

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};

use crate::guard_message::{Expressions, Hook, Rule, SOCKET_TRANSPARENT, SOCKET_WILDCARD, attribute};
use crate::name::Family;
use crate::reply_mark::ReplyMark;
use crate::routing_rules::{MARK, MARK_MASK, PRIORITY, PROTOCOL, TABLE};

/// Where the rule stands among others: behind that of what is local, before those of networks of pods, which begin at 512.
pub const RULE_PRIORITY: u32 = 107;
/// The chains, each with its hook.
pub(crate) const CHAINS: [(&str, Option<Hook>); 3] =
    [(CHAIN, Some(HOOK)), (FORWARD, Some(FORWARD_HOOK)), (DEFRAGMENT, None)];
/// The first chain, and when it sees packets: before the kernel looks for their way, and after all that others do there. What
/// restores marks of connections would take ours away, and firewalld asks for the way back of packets with their marks: by
/// ours, it is this machine.
const CHAIN: &str = "prerouting";
const HOOK: Hook = Hook { number: libc::NF_INET_PRE_ROUTING, priority: 200 };
/// The second one: what is on its way through this machine, before others change marks.
const FORWARD: &str = "forward";
const FORWARD_HOOK: Hook = Hook { number: libc::NF_INET_FORWARD, priority: -150 };
/// The third one, which no packet comes by.
const DEFRAGMENT: &str = "defragment";

/// What a rule does: look into a table (`FR_ACT_TO_TBL`).
const LOOK_INTO_TABLE: u8 = 1;
/// Index of the loopback interface.
const LOOPBACK: u32 = 1;
/// Length of a message's header.
const HEADER: usize = 16;

/// What is asked of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The rule. Refused as existing where it is there.
    AddRule(ReplyMark),
    /// A rule gone: the one with this mark, or one with any.
    RemoveRule(Option<ReplyMark>),
    /// The route of our table. Refused as existing where it is there.
    AddRoute,
    /// The route gone.
    RemoveRoute,
}

/// The number of the table of routes, of a relay whose routes have this protocol.
pub fn route_table(protocol: u8) -> u32 {
    107_000 + u32::from(protocol)
}

/// The name of the table of nf_tables.
pub fn filter_table(protocol: u8) -> String {
    format!("kube-relay-{protocol}-replies")
}

/// The rules of nf_tables, one for each chain. A socket that is bound to no address may be transparent, too, as those of proxies
/// are that others lead connections to: what it waits for is not ours.
pub(crate) fn rules(mark: ReplyMark) -> [Rule; 3] {
    let mut set = Expressions::default();
    set.socket(SOCKET_WILDCARD, false).socket(SOCKET_TRANSPARENT, true).set_mark(mark);
    let mut stay = Expressions::default();
    stay.drop_marked(mark);
    let mut defragment = Expressions::default();
    defragment.redirect_datagrams(1);
    [
        Rule::new(CHAIN, format!("answers to clients, mark {mark}"), set),
        Rule::new(FORWARD, format!("answers to clients stay, mark {mark}"), stay),
        Rule::new(DEFRAGMENT, "no packet comes here: has the kernel put fragments together", defragment),
    ]
}

/// The same rules, for a kernel that has no `nft_tproxy`: it puts fragments together where connections are tracked alone.
pub(crate) fn without_defragmentation(rules: &[Rule]) -> &[Rule] {
    rules.get(..2).unwrap_or(rules)
}

/// The message that asks for it.
pub(crate) fn write(request: Request, family: Family, protocol: u8, number: u32) -> Vec<u8> {
    let (kind, flags) = match request {
        Request::AddRule(_) => (libc::RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL),
        Request::RemoveRule(_) => (libc::RTM_DELRULE, 0),
        Request::AddRoute => (libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL),
        Request::RemoveRoute => (libc::RTM_DELROUTE, 0),
    };
    let mut buffer = Vec::with_capacity(HEADER + 64);
    buffer.extend([0; 4]); // Its length, once that is known.
    buffer.extend(kind.to_ne_bytes());
    buffer.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    buffer.extend(number.to_ne_bytes());
    buffer.extend([0; 4]); // The kernel knows who asks.
    match request {
        Request::AddRule(mark) => rule(&mut buffer, family, protocol, Some(mark)),
        Request::RemoveRule(mark) => rule(&mut buffer, family, protocol, mark),
        Request::AddRoute | Request::RemoveRoute => route(&mut buffer, family, protocol),
    }
    let length = buffer.len() as u32;
    buffer[..4].copy_from_slice(&length.to_ne_bytes());
    buffer
}

/// `struct fib_rule_hdr` and what follows it.
fn rule(buffer: &mut Vec<u8>, family: Family, protocol: u8, mark: Option<ReplyMark>) {
    buffer.extend([number_of(family), 0, 0, 0, 0, 0, 0, LOOK_INTO_TABLE]);
    buffer.extend([0; 4]); // No flags.
    attribute(buffer, PRIORITY, &RULE_PRIORITY.to_ne_bytes());
    if let Some(mark) = mark {
        attribute(buffer, MARK, &mark.value().to_ne_bytes());
        attribute(buffer, MARK_MASK, &mark.mask().to_ne_bytes());
    }
    attribute(buffer, TABLE, &route_table(protocol).to_ne_bytes());
    attribute(buffer, PROTOCOL, &[protocol]);
}

/// `struct rtmsg` and what follows it: whatever address it is, it is delivered here.
fn route(buffer: &mut Vec<u8>, family: Family, protocol: u8) {
    let no_table = 0; // It is told below: there are more than fit here.
    buffer.extend([number_of(family), 0, 0, 0, no_table, protocol, libc::RT_SCOPE_HOST, libc::RTN_LOCAL]);
    buffer.extend([0; 4]); // No flags.
    attribute(buffer, libc::RTA_OIF, &LOOPBACK.to_ne_bytes());
    attribute(buffer, libc::RTA_TABLE, &route_table(protocol).to_ne_bytes());
}

fn number_of(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard_message::find;
    use crate::route_message::messages;

    #[test]
    fn given_a_rule_when_written_then_its_bytes_are_those_of_the_kernels_interface() {
        let bytes = write(Request::AddRule(ReplyMark::DEFAULT), Family::V4, 107, 7);

        // nlmsghdr: length, type RTM_NEWRULE, REQUEST|ACK|EXCL|CREATE, number, port
        let mut wanted = [68_u32.to_ne_bytes(), [0; 4], 7_u32.to_ne_bytes(), [0; 4]].concat();
        wanted[4..6].copy_from_slice(&32_u16.to_ne_bytes());
        wanted[6..8].copy_from_slice(&0x605_u16.to_ne_bytes());
        // fib_rule_hdr: AF_INET, action lookup
        wanted.extend([2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        for (kind, value) in [(6_u16, 107_u32), (10, 0x100b), (16, 0x3fff), (15, 107_107)] {
            wanted.extend([8_u16.to_ne_bytes(), kind.to_ne_bytes()].concat());
            wanted.extend(value.to_ne_bytes());
        }
        wanted.extend([5_u16.to_ne_bytes(), 21_u16.to_ne_bytes()].concat());
        wanted.extend([107, 0, 0, 0]);
        assert_eq!(bytes, wanted);
    }

    #[test]
    fn given_requests_when_written_then_each_is_one_whole_message_of_our_table() {
        for family in Family::ALL {
            let rules = [Request::AddRule(ReplyMark::DEFAULT), Request::RemoveRule(None)];
            for request in rules.into_iter().chain([Request::AddRoute, Request::RemoveRoute]) {
                let bytes = write(request, family, 200, 7);

                let read: Vec<_> = messages(&bytes).collect();
                assert_eq!(read.len(), 1, "{request:?}");
                let attributes = &read[0].payload()[12..];
                assert_eq!(find(attributes, 15), Some(&107_200_u32.to_ne_bytes()[..]), "{request:?}");
            }
        }
    }

    #[test]
    fn given_a_rule_of_any_mark_when_its_removal_is_written_then_no_mark_is_named() {
        let marks = |mark| {
            let bytes = write(Request::RemoveRule(mark), Family::V6, 107, 7);
            let attributes = &bytes[HEADER + 12..];
            [MARK, MARK_MASK].map(|kind| find(attributes, kind).is_some())
        };

        assert_eq!((marks(None), marks(Some(ReplyMark::DEFAULT))), ([false; 2], [true; 2]));
    }

    #[test]
    fn given_another_mark_when_rules_are_compared_then_those_that_set_and_drop_it_are_others() {
        let names = |mark| rules(mark).map(|rule| rule.name());
        let (ours, others) = (names(ReplyMark::DEFAULT), names(ReplyMark::told(0x2000, 0x2000)));

        assert_eq!([0, 1, 2].map(|place| ours[place] == others[place]), [false, false, true]);
        assert_eq!(without_defragmentation(&rules(ReplyMark::DEFAULT)).len(), 2);
    }

    #[test]
    fn given_relays_of_two_numbers_when_named_then_they_have_tables_of_their_own() {
        assert_eq!(filter_table(107), "kube-relay-107-replies");
        assert_ne!((route_table(107), filter_table(107)), (route_table(108), filter_table(108)));
    }
}
