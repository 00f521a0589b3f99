//! The rules by which this machine chooses a table of routes, those of everybody, as `ip rule` lists them: told by the kernel,
//! changed in `reply_path` alone.

use std::io;

use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::guard_message::find;
use crate::name::Family;
use crate::reply_mark::ReplyMark;
use crate::route_message::{messages, result};

/// Attributes of rules, as `linux/fib_rules.h` numbers them.
pub(crate) const PRIORITY: u16 = 6;
pub(crate) const MARK: u16 = 10;
pub(crate) const TABLE: u16 = 15;
pub(crate) const MARK_MASK: u16 = 16;
pub(crate) const PROTOCOL: u16 = 21;
/// Length of a message's header, and of what each rule begins with (`struct fib_rule_hdr`).
const MESSAGE_HEADER: usize = 16;
const HEADER: usize = 12;
/// The longest datagram of the kernel.
const DATAGRAM: usize = 32 * 1024;

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoutingRule {
    pub(crate) family: Family,
    /// Lower ones come first.
    pub(crate) priority: u32,
    /// Which packets; `None`: not by their mark.
    pub(crate) mark: Option<ReplyMark>,
    /// Where their way is looked up; 0 where the rule does something else.
    pub(crate) table: u32,
}

/// All of them, of both families. Needs no right.
///
/// # Errors
/// Where there is no rtnetlink, or no rules: in a kernel without policy routing.
pub(crate) fn look() -> io::Result<Vec<RoutingRule>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&question(), 0)?;
    let (mut rules, mut buffer) = (Vec::new(), vec![0; DATAGRAM]);
    loop {
        // The kernel has answered before the call to send returned, and goes on with each that receives.
        let length = socket.recv(&mut &mut buffer[..], libc::MSG_DONTWAIT)?.min(DATAGRAM);
        for message in messages(&buffer[..length]) {
            match message.message_type() {
                NLMSG_DONE => return Ok(rules),
                NLMSG_ERROR => result(message.payload())?,
                libc::RTM_NEWRULE => rules.extend(read(message.payload())),
                _ => {}
            }
        }
    }
}

/// All rules, of all families.
fn question() -> Vec<u8> {
    let mut question = Vec::with_capacity(MESSAGE_HEADER + HEADER);
    question.extend(((MESSAGE_HEADER + HEADER) as u32).to_ne_bytes());
    question.extend(libc::RTM_GETRULE.to_ne_bytes());
    question.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    question.extend([0; 8]); // A number for the answer, and whose: it is the only one on its socket.
    question.extend([0; HEADER]);
    question
}

/// `None` where it is of another family, as those of multicast are.
fn read(payload: &[u8]) -> Option<RoutingRule> {
    let family = match i32::from(*payload.first()?) {
        libc::AF_INET => Family::V4,
        libc::AF_INET6 => Family::V6,
        _ => return None,
    };
    let attributes = payload.get(HEADER..)?;
    let number = |kind| Some(u32::from_ne_bytes(*find(attributes, kind)?.first_chunk()?));
    let mask = number(MARK_MASK).unwrap_or(u32::MAX);
    let mark = number(MARK).map(|value| ReplyMark::told(value, mask)).filter(|_| mask != 0);
    let (priority, table) = (number(PRIORITY).unwrap_or(0), number(TABLE).unwrap_or(0));
    Some(RoutingRule { family, priority, mark, table })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard_message::attribute;

    #[test]
    fn given_this_machine_when_looked_at_then_the_rule_that_leads_to_the_main_table_is_there() {
        let rules = match look() {
            Ok(rules) => rules,
            Err(error) => return eprintln!("skipped, no rules here: {error}"),
        };

        let main = RoutingRule { family: Family::V4, priority: 32_766, mark: None, table: 254 };
        assert!(rules.contains(&main), "{rules:?}");
    }

    #[test]
    fn given_a_rule_when_read_then_priority_mark_and_table_are_known_and_what_is_cut_panics_nowhere() {
        let mut payload = vec![libc::AF_INET6 as u8, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        for (kind, value) in [(PRIORITY, 107_u32), (MARK, 0x100b), (TABLE, 107_107)] {
            attribute(&mut payload, kind, &value.to_ne_bytes());
        }
        let rule = |mask| RoutingRule {
            family: Family::V6,
            priority: 107,
            mark: Some(ReplyMark::told(0x100b, mask)),
            table: 107_107,
        };

        assert_eq!(read(&payload), Some(rule(u32::MAX)), "all bits where no mask is told");
        attribute(&mut payload, MARK_MASK, &0x3fff_u32.to_ne_bytes());
        assert_eq!(read(&payload), Some(rule(0x3fff)));
        for length in 0..payload.len() {
            let _ = read(&payload[..length]);
        }
        payload[0] = 128; // RTNL_FAMILY_IPMR
        assert_eq!(read(&payload), None);
    }
}
