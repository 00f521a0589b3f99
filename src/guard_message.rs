//! Messages to and from nf_tables about the guard, and its rules: pure, bytes in and bytes out.
//!
//! By hand, as the guard needs few of them, and no crate in pure Rust writes them; neither `nft` nor a C library is in our
//! image. The socket is in `guard_socket`; what is guarded, and since when, is decided in `guard`.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use rtnetlink::packet_core::{
    NLA_F_NESTED, NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator,
};
use rustix::io::Errno;

use crate::name::Family;
use crate::reply_mark::ReplyMark;
use crate::route_message::{messages, result};

/// Where packets to this machine's own sockets come by after those of the filters that firewalls use: what these drop is not
/// answered by us.
const PRIORITY: i32 = 10;
/// The chain that each packet comes by, and the one for those to an address of a Service.
const INPUT: &str = "input";
const JUDGE: &str = "judge";
/// Index of the loopback interface.
const LOOPBACK: u32 = 1;
/// Length of the fixed part of each message (`struct nfgenmsg`).
const HEADER: usize = 4;

/// Attributes, as `linux/netfilter/nf_tables.h` numbers them: those of tables, chains, rules, sets and elements,
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_ID: u16 = 10;
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const LIST_ITEM: u16 = 1;
const GENERATION_ID: u16 = 1;
/// of values,
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
/// and of expressions. Most begin with the register that they write to, or read from.
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const META_TO: u16 = 1;
const META_KEY: u16 = 2;
const META_FROM: u16 = 3;
const BITWISE_FROM: u16 = 1;
const BITWISE_TO: u16 = 2;
const BITWISE_LENGTH: u16 = 3;
const BITWISE_MASK: u16 = 4;
const BITWISE_XOR: u16 = 5;
const PAYLOAD_TO: u16 = 1;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LENGTH: u16 = 4;
const COMPARE_FROM: u16 = 1;
const COMPARE_HOW: u16 = 2;
const COMPARE_WITH: u16 = 3;
const LOOKUP_SET: u16 = 1;
const LOOKUP_FROM: u16 = 2;
const SOCKET_KEY: u16 = 1;
const SOCKET_TO: u16 = 2;
const REJECT_TYPE: u16 = 1;
const REJECT_CODE: u16 = 2;
const IMMEDIATE_TO: u16 = 1;
const IMMEDIATE_VALUE: u16 = 2;
const TPROXY_FAMILY: u16 = 1;
const TPROXY_PORT_FROM: u16 = 3;
/// Whether the socket that a packet is for takes those to addresses of others, too (`NFT_SOCKET_TRANSPARENT`, Linux 4.19),
pub(crate) const SOCKET_TRANSPARENT: u32 = 0;
/// and whether it is bound to no address (`NFT_SOCKET_WILDCARD`, Linux 5.10).
pub(crate) const SOCKET_WILDCARD: u32 = 2;
/// What `nft` writes and reads a rule's comment as, in the part of it that the kernel only keeps.
const COMMENT: u8 = 0;

/// Where a chain sees packets, and after whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook {
    /// As `linux/netfilter.h` numbers them.
    pub(crate) number: libc::c_int,
    /// Lower ones come first.
    pub(crate) priority: i32,
}

/// A rule of the guard, or of another table of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    chain: &'static str,
    /// What `nft list ruleset` shows of it. Tells rules of different versions apart.
    comment: String,
    expressions: Vec<u8>,
}

/// What a rule of the kernel is known by again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleName {
    chain: String,
    /// As the kernel keeps it.
    userdata: Vec<u8>,
}

impl Rule {
    /// Of a chain. The comment is what it is known by again.
    pub(crate) fn new(chain: &'static str, comment: impl Into<String>, expressions: Expressions) -> Self {
        Self { chain, comment: comment.into(), expressions: expressions.0 }
    }

    pub(crate) fn name(&self) -> RuleName {
        RuleName { chain: self.chain.into(), userdata: self.userdata() }
    }

    fn userdata(&self) -> Vec<u8> {
        let length = u8::try_from(self.comment.len() + 1).unwrap_or(u8::MAX);
        [&[COMMENT, length], self.comment.as_bytes(), &[0]].concat()
    }
}

/// The rules of the guard: what is sent to an address of the sets, and is for a socket that is bound to no address, is
/// refused as if there was none.
///
/// Which socket a packet is for is asked of the kernel: so a listener of ours, a connection, and whatever others have bound
/// to an address of a Service are let through without being known here, and stay so whatever happens to this process.
///
/// Two kinds of sockets that are bound to no address are meant all the same:
///
/// * One that says it is transparent: others lead connections to it, wherever these were going (TPROXY).
/// * That of a client on this machine that waits for an answer of a Service, as resolvers have them. The answer comes by
///   loopback, over UDP. It goes to a port of `clients` (`net.ipv4.ip_local_port_range`), or comes from a port that the
///   kernel gives to no client, as those of most Services are: then the client may have any (NTP has 123). Either is let
///   through, whoever it is from; a question from here to such a socket comes from a port of `clients`, and is refused.
pub(crate) fn rules(clients: &RangeInclusive<u16>) -> Vec<Rule> {
    let to = |family| {
        let (protocol, offset, length) = match family {
            Family::V4 => (libc::NFPROTO_IPV4, 16, 4),
            Family::V6 => (libc::NFPROTO_IPV6, 24, 16),
        };
        let mut rule = Expressions::default();
        rule.meta(libc::NFT_META_NFPROTO).compare(libc::NFT_CMP_EQ, &[protocol as u8]);
        rule.payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, length).lookup(set_name(family)).jump(JUDGE);
        Rule { chain: INPUT, comment: format!("to a Service, {family}"), expressions: rule.0 }
    };
    let (start, end) = (*clients.start(), *clients.end());
    let answers = |port: Port, compared: &[(libc::c_int, u16)], comment: String| {
        let mut rule = Expressions::default();
        rule.protocol(libc::IPPROTO_UDP).meta(libc::NFT_META_IIF).compare(libc::NFT_CMP_EQ, &LOOPBACK.to_ne_bytes());
        rule.payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, port as u32, 2);
        for (how, with) in compared {
            rule.compare(*how, &with.to_be_bytes());
        }
        rule.accept();
        Rule { chain: JUDGE, comment, expressions: rule.0 }
    };
    let mut transparent = Expressions::default();
    transparent.socket(SOCKET_TRANSPARENT, true).accept();
    let mut refuse_tcp = Expressions::default();
    refuse_tcp.protocol(libc::IPPROTO_TCP).socket(SOCKET_WILDCARD, true).reject(libc::NFT_REJECT_TCP_RST, 0);
    let mut refuse_udp = Expressions::default();
    refuse_udp.protocol(libc::IPPROTO_UDP).socket(SOCKET_WILDCARD, true);
    refuse_udp.reject(libc::NFT_REJECT_ICMPX_UNREACH, libc::NFT_REJECT_ICMPX_PORT_UNREACH);
    vec![
        to(Family::V4),
        to(Family::V6),
        Rule { chain: JUDGE, comment: "for a transparent socket".into(), expressions: transparent.0 },
        answers(
            Port::Destination,
            &[(libc::NFT_CMP_GTE, start), (libc::NFT_CMP_LTE, end)],
            format!("answers to clients here, ports {start}-{end}"),
        ),
        answers(Port::Source, &[(libc::NFT_CMP_LT, start)], format!("answers from ports below {start}")),
        answers(Port::Source, &[(libc::NFT_CMP_GT, end)], format!("answers from ports above {end}")),
        Rule { chain: JUDGE, comment: "for a socket of all addresses, TCP".into(), expressions: refuse_tcp.0 },
        Rule { chain: JUDGE, comment: "for a socket of all addresses, UDP".into(), expressions: refuse_udp.0 },
    ]
}

/// Where a port is in the header of UDP.
#[derive(Clone, Copy)]
enum Port {
    Source = 0,
    Destination = 2,
}

/// The set of guarded addresses of a family.
fn set_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "v4",
        Family::V6 => "v6",
    }
}

/// Expressions of a rule, in the order in which the kernel takes them. All but the last go by one register.
#[derive(Default)]
pub(crate) struct Expressions(Vec<u8>);

impl Expressions {
    fn add(&mut self, name: &str, data: impl FnOnce(&mut Vec<u8>)) -> &mut Self {
        nest(&mut self.0, LIST_ITEM, |item| {
            text(item, EXPRESSION_NAME, name);
            nest(item, EXPRESSION_DATA, data);
        });
        self
    }

    fn meta(&mut self, key: libc::c_int) -> &mut Self {
        self.add("meta", |data| {
            number(data, META_KEY, key as u32);
            number(data, META_TO, libc::NFT_REG_1 as u32);
        })
    }

    fn payload(&mut self, base: libc::c_int, offset: u32, length: u32) -> &mut Self {
        self.add("payload", |data| {
            number(data, PAYLOAD_TO, libc::NFT_REG_1 as u32);
            number(data, PAYLOAD_BASE, base as u32);
            number(data, PAYLOAD_OFFSET, offset);
            number(data, PAYLOAD_LENGTH, length);
        })
    }

    /// Goes on where the register compares so.
    fn compare(&mut self, how: libc::c_int, with: &[u8]) -> &mut Self {
        self.add("cmp", |data| {
            number(data, COMPARE_FROM, libc::NFT_REG_1 as u32);
            number(data, COMPARE_HOW, how as u32);
            nest(data, COMPARE_WITH, |value| attribute(value, VALUE, with));
        })
    }

    fn protocol(&mut self, protocol: libc::c_int) -> &mut Self {
        self.meta(libc::NFT_META_L4PROTO).compare(libc::NFT_CMP_EQ, &[protocol as u8])
    }

    /// Goes on where the register is in the set.
    fn lookup(&mut self, set: &str) -> &mut Self {
        self.add("lookup", |data| {
            text(data, LOOKUP_SET, set);
            number(data, LOOKUP_FROM, libc::NFT_REG_1 as u32);
        })
    }

    /// Goes on where there is a socket, and it is so or not.
    pub(crate) fn socket(&mut self, key: u32, is_so: bool) -> &mut Self {
        self.add("socket", |data| {
            number(data, SOCKET_KEY, key);
            number(data, SOCKET_TO, libc::NFT_REG_1 as u32);
        });
        self.compare(libc::NFT_CMP_EQ, &[u8::from(is_so)])
    }

    /// Gives the mark of the packet this value in the bits of the mask, and leaves the others as they are.
    pub(crate) fn set_mark(&mut self, mark: ReplyMark) -> &mut Self {
        self.meta(libc::NFT_META_MARK).bitwise(!mark.mask(), mark.value());
        self.add("meta", |data| {
            number(data, META_KEY, libc::NFT_META_MARK as u32);
            number(data, META_FROM, libc::NFT_REG_1 as u32);
        })
    }

    /// Drops the packet, where its mark has this value in the bits of the mask.
    pub(crate) fn drop_marked(&mut self, mark: ReplyMark) -> &mut Self {
        self.meta(libc::NFT_META_MARK).bitwise(mark.mask(), 0).compare(libc::NFT_CMP_EQ, &mark.value().to_ne_bytes());
        self.verdict(libc::NF_DROP, None)
    }

    /// Leads datagrams to the socket of a port of this machine, whatever they are for. While a rule does that, wherever it
    /// is, the kernel puts fragments together before any rule sees them.
    pub(crate) fn redirect_datagrams(&mut self, port: u16) -> &mut Self {
        self.protocol(libc::IPPROTO_UDP).add("immediate", |data| {
            number(data, IMMEDIATE_TO, libc::NFT_REG_1 as u32);
            nest(data, IMMEDIATE_VALUE, |value| attribute(value, VALUE, &port.to_be_bytes()));
        });
        self.add("tproxy", |data| {
            number(data, TPROXY_FAMILY, libc::NFPROTO_UNSPEC as u32);
            number(data, TPROXY_PORT_FROM, libc::NFT_REG_1 as u32);
        })
    }

    /// Leaves of the register the bits of the mask, and turns others over.
    fn bitwise(&mut self, mask: u32, flip: u32) -> &mut Self {
        self.add("bitwise", |data| {
            number(data, BITWISE_FROM, libc::NFT_REG_1 as u32);
            number(data, BITWISE_TO, libc::NFT_REG_1 as u32);
            number(data, BITWISE_LENGTH, size_of_val(&mask) as u32);
            nest(data, BITWISE_MASK, |value| attribute(value, VALUE, &mask.to_ne_bytes()));
            nest(data, BITWISE_XOR, |value| attribute(value, VALUE, &flip.to_ne_bytes()));
        })
    }

    fn reject(&mut self, kind: libc::c_int, code: libc::c_int) -> &mut Self {
        self.add("reject", |data| {
            number(data, REJECT_TYPE, kind as u32);
            attribute(data, REJECT_CODE, &[code as u8]);
        })
    }

    fn accept(&mut self) -> &mut Self {
        self.verdict(libc::NF_ACCEPT, None)
    }

    fn jump(&mut self, chain: &str) -> &mut Self {
        self.verdict(libc::NFT_JUMP, Some(chain))
    }

    fn verdict(&mut self, code: libc::c_int, chain: Option<&str>) -> &mut Self {
        self.add("immediate", |data| {
            number(data, IMMEDIATE_TO, libc::NFT_REG_VERDICT as u32);
            nest(data, IMMEDIATE_VALUE, |value| {
                nest(value, VERDICT, |verdict| {
                    number(verdict, VERDICT_CODE, code.cast_unsigned());
                    chain.into_iter().for_each(|chain| text(verdict, VERDICT_CHAIN, chain));
                });
            });
        })
    }
}

/// Changes that the kernel makes all at once, or none of them. Each message has a number of its own, from the first one on.
pub(crate) struct Batch<'a> {
    table: &'a str,
    bytes: Vec<u8>,
    next: u32,
    /// Where the last message begins.
    last: usize,
}

impl<'a> Batch<'a> {
    /// An empty one, for the table of this name.
    pub(crate) fn new(table: &'a str, first: u32) -> Self {
        let mut batch = Self { table, bytes: Vec::new(), next: first, last: 0 };
        batch.control(libc::NFNL_MSG_BATCH_BEGIN);
        batch
    }

    /// The table anew with these rules, and nobody in its sets; one of that name goes.
    pub(crate) fn build(&mut self, rules: &[Rule]) {
        self.table(libc::NFT_MSG_NEWTABLE); // There is one then, in any case, to remove.
        self.remove();
        self.table(libc::NFT_MSG_NEWTABLE);
        self.set(Family::V4);
        self.set(Family::V6);
        self.chain(JUDGE, None);
        self.chain(INPUT, Some(Hook { number: libc::NF_INET_LOCAL_IN, priority: PRIORITY }));
        rules.iter().for_each(|rule| self.rule(rule));
    }

    /// The table anew with these chains and rules, and no sets; one of that name goes. No packet comes by a chain without a hook.
    pub(crate) fn build_chains(&mut self, chains: &[(&str, Option<Hook>)], rules: &[Rule]) {
        self.table(libc::NFT_MSG_NEWTABLE); // As above.
        self.remove();
        self.table(libc::NFT_MSG_NEWTABLE);
        chains.iter().for_each(|(name, hook)| self.chain(name, *hook));
        rules.iter().for_each(|rule| self.rule(rule));
    }

    /// Takes the table away, with all that is in it.
    pub(crate) fn remove(&mut self) {
        self.table(libc::NFT_MSG_DELTABLE);
    }

    /// Guards these addresses, too. Those that are guarded already may be among them.
    pub(crate) fn add(&mut self, addresses: &[IpAddr]) {
        self.elements(libc::NFT_MSG_NEWSETELEM, NLM_F_CREATE, addresses);
    }

    /// Guards these addresses no more. The kernel refuses that where one is not guarded.
    pub(crate) fn take(&mut self, addresses: &[IpAddr]) {
        self.elements(libc::NFT_MSG_DELSETELEM, 0, addresses);
    }

    /// What to send, and the number of the message whose answer is the last.
    pub(crate) fn finish(mut self) -> (Vec<u8>, u32) {
        let last = self.next.wrapping_sub(1);
        // It alone is answered where nothing is wrong.
        if let Some(flags) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            let with_answer = u16::from_ne_bytes([flags[0], flags[1]]) | NLM_F_ACK;
            flags.copy_from_slice(&with_answer.to_ne_bytes());
        }
        self.control(libc::NFNL_MSG_BATCH_END);
        (self.bytes, last)
    }

    fn control(&mut self, kind: libc::c_int) {
        message(&mut self.bytes, kind as u16, 0, self.next, 0, libc::NFNL_SUBSYS_NFTABLES as u16, |_| ());
        self.next = self.next.wrapping_add(1);
    }

    fn change(&mut self, kind: libc::c_int, flags: u16, attributes: impl FnOnce(&mut Vec<u8>)) {
        self.last = self.bytes.len();
        let family = libc::NFPROTO_INET as u8;
        message(&mut self.bytes, of_nf_tables(kind), flags, self.next, family, 0, attributes);
        self.next = self.next.wrapping_add(1);
    }

    fn table(&mut self, kind: libc::c_int) {
        let (table, flags) = (self.table, if kind == libc::NFT_MSG_NEWTABLE { NLM_F_CREATE } else { 0 });
        self.change(kind, flags, |buffer| text(buffer, TABLE_NAME, table));
    }

    fn set(&mut self, family: Family) {
        // The numbers of `nft` for the types of addresses, so that it can show them.
        let (kind, length) = match family {
            Family::V4 => (7, 4),
            Family::V6 => (8, 16),
        };
        let table = self.table;
        self.change(libc::NFT_MSG_NEWSET, NLM_F_CREATE, |buffer| {
            text(buffer, SET_TABLE, table);
            text(buffer, SET_NAME, set_name(family));
            number(buffer, SET_KEY_TYPE, kind);
            number(buffer, SET_KEY_LENGTH, length);
            number(buffer, SET_ID, kind);
        });
    }

    fn chain(&mut self, name: &str, hook: Option<Hook>) {
        let table = self.table;
        self.change(libc::NFT_MSG_NEWCHAIN, NLM_F_CREATE, |buffer| {
            text(buffer, CHAIN_TABLE, table);
            text(buffer, CHAIN_NAME, name);
            if let Some(Hook { number: place, priority }) = hook {
                nest(buffer, CHAIN_HOOK, |hook| {
                    number(hook, HOOK_NUMBER, place as u32);
                    number(hook, HOOK_PRIORITY, priority.cast_unsigned());
                });
                number(buffer, CHAIN_POLICY, libc::NF_ACCEPT as u32);
                text(buffer, CHAIN_TYPE, "filter");
            }
        });
    }

    fn rule(&mut self, rule: &Rule) {
        let table = self.table;
        self.change(libc::NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |buffer| {
            text(buffer, RULE_TABLE, table);
            text(buffer, RULE_CHAIN, rule.chain);
            nest(buffer, RULE_EXPRESSIONS, |list| list.extend(&rule.expressions));
            attribute(buffer, RULE_USERDATA, &rule.userdata());
        });
    }

    fn elements(&mut self, kind: libc::c_int, flags: u16, addresses: &[IpAddr]) {
        let table = self.table;
        for family in Family::ALL {
            let mut of_family = addresses.iter().filter(|address| Family::of(**address) == family).peekable();
            if of_family.peek().is_none() {
                continue;
            }
            self.change(kind, flags, |buffer| {
                text(buffer, ELEMENTS_TABLE, table);
                text(buffer, ELEMENTS_SET, set_name(family));
                nest(buffer, ELEMENTS, |list| of_family.for_each(|address| element(list, *address)));
            });
        }
    }
}

fn element(list: &mut Vec<u8>, address: IpAddr) {
    nest(list, LIST_ITEM, |item| {
        nest(item, ELEMENT_KEY, |key| match address {
            IpAddr::V4(address) => attribute(key, VALUE, &address.octets()),
            IpAddr::V6(address) => attribute(key, VALUE, &address.octets()),
        });
    });
}

/// The request to tell how often rules have changed, whoever did that.
pub(crate) fn ask_generation(request: u32) -> Vec<u8> {
    let mut buffer = Vec::new();
    message(&mut buffer, of_nf_tables(libc::NFT_MSG_GETGEN), NLM_F_ACK, request, 0, 0, |_| ());
    buffer
}

/// The request to tell all rules of a table.
pub(crate) fn ask_rules(table: &str, request: u32) -> Vec<u8> {
    let (kind, family) = (of_nf_tables(libc::NFT_MSG_GETRULE), libc::NFPROTO_INET as u8);
    let mut buffer = Vec::new();
    message(&mut buffer, kind, NLM_F_DUMP, request, family, 0, |buffer| text(buffer, RULE_TABLE, table));
    buffer
}

/// The request to tell all guarded addresses of a family.
pub(crate) fn ask_addresses(table: &str, family: Family, request: u32) -> Vec<u8> {
    let mut buffer = Vec::new();
    let kind = of_nf_tables(libc::NFT_MSG_GETSETELEM);
    message(&mut buffer, kind, NLM_F_DUMP, request, libc::NFPROTO_INET as u8, 0, |buffer| {
        text(buffer, ELEMENTS_TABLE, table);
        text(buffer, ELEMENTS_SET, set_name(family));
    });
    buffer
}

const fn of_nf_tables(kind: libc::c_int) -> u16 {
    (libc::NFNL_SUBSYS_NFTABLES << 8 | kind) as u16
}

fn message(
    buffer: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    number: u32,
    family: u8,
    resource: u16,
    attributes: impl FnOnce(&mut Vec<u8>),
) {
    let start = buffer.len();
    buffer.extend([0; 4]); // Its length, once that is known.
    buffer.extend(kind.to_ne_bytes());
    buffer.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    buffer.extend(number.to_ne_bytes());
    buffer.extend([0; 4]); // The kernel knows who asks.
    buffer.extend([family, 0]); // NFNETLINK_V0
    buffer.extend(resource.to_be_bytes());
    attributes(buffer);
    let length = (buffer.len() - start) as u32;
    buffer[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

pub(crate) fn attribute(buffer: &mut Vec<u8>, kind: u16, value: &[u8]) {
    write_attribute(buffer, kind, |buffer| buffer.extend(value));
}

/// A number. Those of nf_tables are in network byte order.
fn number(buffer: &mut Vec<u8>, kind: u16, value: u32) {
    attribute(buffer, kind, &value.to_be_bytes());
}

/// A text, and the 0 that ends it.
pub(crate) fn text(buffer: &mut Vec<u8>, kind: u16, value: &str) {
    attribute(buffer, kind, &[value.as_bytes(), &[0]].concat());
}

/// An attribute that has others in it.
pub(crate) fn nest(buffer: &mut Vec<u8>, kind: u16, inner: impl FnOnce(&mut Vec<u8>)) {
    write_attribute(buffer, kind | NLA_F_NESTED, inner);
}

/// What is in it is at most 64 KiB: a thousand addresses are half of that.
fn write_attribute(buffer: &mut Vec<u8>, kind: u16, value: impl FnOnce(&mut Vec<u8>)) {
    let start = buffer.len();
    buffer.extend([0; 2]);
    buffer.extend(kind.to_ne_bytes());
    value(buffer);
    let length = buffer.len() - start;
    debug_assert!(length <= usize::from(u16::MAX));
    buffer[start..start + 2].copy_from_slice(&(length as u16).to_ne_bytes());
    buffer.resize(start + length.next_multiple_of(4), 0);
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
    /// How often rules have changed.
    Generation(u32, u32),
    /// A rule of the table.
    Rule(u32, RuleName),
    /// Some of the guarded addresses.
    Addresses(u32, Vec<IpAddr>),
}

/// What a datagram of the kernel says that concerns a table. What is about something else is passed over.
pub(crate) fn read<'a>(datagram: &'a [u8], table: &'a str) -> impl Iterator<Item = Heard> + 'a {
    messages(datagram).flat_map(move |message| {
        let interrupted = message.flags() & NLM_F_DUMP_INTR != 0;
        let interrupted = interrupted.then(|| Heard::Interrupted(message.sequence_number()));
        interrupted.into_iter().chain(heard(&message, table))
    })
}

fn heard(message: &NetlinkBuffer<&[u8]>, table: &str) -> Option<Heard> {
    const GENERATION: u16 = of_nf_tables(libc::NFT_MSG_NEWGEN);
    const RULE: u16 = of_nf_tables(libc::NFT_MSG_NEWRULE);
    const MEMBERS: u16 = of_nf_tables(libc::NFT_MSG_NEWSETELEM);
    let (number, payload) = (message.sequence_number(), message.payload());
    let attributes = || payload.get(HEADER..).unwrap_or_default();
    match message.message_type() {
        NLMSG_ERROR => Some(Heard::Answer(number, result(payload))),
        NLMSG_DONE => Some(Heard::End(number, result(payload))),
        GENERATION => {
            let id = find(attributes(), GENERATION_ID)?.first_chunk().copied()?;
            Some(Heard::Generation(number, u32::from_be_bytes(id)))
        }
        RULE if as_text(find(attributes(), RULE_TABLE)?) == table.as_bytes() => {
            let chain = String::from_utf8_lossy(as_text(find(attributes(), RULE_CHAIN)?)).into_owned();
            let userdata = find(attributes(), RULE_USERDATA).unwrap_or_default().to_vec();
            Some(Heard::Rule(number, RuleName { chain, userdata }))
        }
        MEMBERS => Some(Heard::Addresses(number, addresses(find(attributes(), ELEMENTS)?).collect())),
        _ => None,
    }
}

fn addresses(list: &[u8]) -> impl Iterator<Item = IpAddr> {
    attributes(list).filter_map(|(_, element)| {
        let value = find(find(element, ELEMENT_KEY)?, VALUE)?;
        match value.len() {
            4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        }
    })
}

/// The value of an attribute; the first one of its kind.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// What is there, with its kind, up to where it cannot be read.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(Result::ok).filter_map(|attribute| {
        let (kind, length) = (attribute.kind(), attribute.value_length());
        Some((kind, attribute.into_inner().get(NLA_HEADER_SIZE..)?.get(..length)?))
    })
}

/// Without the 0 that ends it.
fn as_text(value: &[u8]) -> &[u8] {
    value.strip_suffix(&[0]).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route_message::tests::answer;

    const TABLE: &str = "kube-relay-107";
    const CLIENTS: RangeInclusive<u16> = 32_768..=60_999;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// The kinds and flags of the messages, by which the kernel tells them apart.
    fn kinds(bytes: &[u8]) -> Vec<(u16, u16)> {
        messages(bytes).map(|message| (message.message_type(), message.flags())).collect()
    }

    #[test]
    fn given_a_batch_when_finished_then_the_last_change_alone_is_answered_and_has_the_number_told() {
        let mut batch = Batch::new(TABLE, 5);
        batch.build(&rules(&CLIENTS));
        batch.add(&[ip("10.96.0.1"), ip("fd96::1"), ip("10.96.0.2")]);

        let (bytes, last) = batch.finish();

        let kinds = kinds(&bytes);
        assert_eq!((kinds[0].0, kinds[kinds.len() - 1].0), (16, 17), "begin and end");
        let answered: Vec<usize> = (0..kinds.len()).filter(|place| kinds[*place].1 & NLM_F_ACK != 0).collect();
        assert_eq!(answered, [kinds.len() - 2]);
        assert_eq!(last as usize, 5 + kinds.len() - 2);
        let elements = kinds.iter().filter(|(kind, _)| *kind == of_nf_tables(libc::NFT_MSG_NEWSETELEM)).count();
        assert_eq!(elements, 2, "one for each family");
    }

    #[test]
    fn given_a_batch_when_written_then_its_bytes_are_those_of_the_kernels_interface() {
        let mut batch = Batch::new("t", 1);
        batch.remove();

        let (bytes, last) = batch.finish();

        assert_eq!(last, 2);
        let header = |length: u32, kind: u16, flags: u16, number: u32| {
            [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &number.to_ne_bytes(), &[0; 4]]
                .concat()
        };
        let wanted = [
            header(20, 0x10, 1, 1),
            vec![0, 0, 0, 10], // For nf_tables.
            header(28, 0xa02, 5, 2),
            vec![1, 0, 0, 0], // inet
            [&6_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), b"t\0\0\0"].concat(),
            header(20, 0x11, 1, 3),
            vec![0, 0, 0, 10],
        ];
        assert_eq!(bytes, wanted.concat());
    }

    #[test]
    fn given_rules_and_addresses_when_the_kernel_echoes_them_then_they_are_known_again_and_those_of_others_are_not() {
        let (rules, addresses) = (rules(&CLIENTS), [ip("10.96.0.1"), ip("fd96::1")]);
        let mut batch = Batch::new(TABLE, 1);
        batch.build(&rules);
        batch.add(&addresses);
        let (bytes, _) = batch.finish();

        let heard: Vec<Heard> = read(&bytes, TABLE).collect();

        let names = heard.iter().filter_map(|heard| match heard {
            Heard::Rule(_, name) => Some(name.clone()),
            _ => None,
        });
        assert_eq!(names.collect::<Vec<_>>(), rules.iter().map(Rule::name).collect::<Vec<_>>());
        let told = heard.iter().filter_map(|heard| match heard {
            Heard::Addresses(_, addresses) => Some(addresses.clone()),
            _ => None,
        });
        assert_eq!(told.flatten().collect::<Vec<_>>(), addresses);
        assert!(!read(&bytes, "kube-relay-10").any(|heard| matches!(heard, Heard::Rule(..))), "another table");
    }

    #[test]
    fn given_other_ports_of_clients_when_rules_are_compared_then_they_are_others() {
        let name = |clients| rules(&clients).iter().map(Rule::name).collect::<Vec<_>>();

        assert_eq!(name(CLIENTS), name(CLIENTS));
        assert_ne!(name(CLIENTS), name(1_024..=60_999));
    }

    #[test]
    fn given_answers_when_read_then_they_carry_number_and_error() {
        let answer = |kind, flags, code| read(&answer(kind, flags, code), TABLE).collect::<Vec<_>>();

        assert_eq!(answer(NLMSG_ERROR, 0, 0), [Heard::Answer(7, Ok(()))]);
        assert_eq!(answer(NLMSG_ERROR, 0, -2), [Heard::Answer(7, Err(Errno::NOENT))]);
        assert_eq!(answer(NLMSG_DONE, NLM_F_DUMP_INTR, 0), [Heard::Interrupted(7), Heard::End(7, Ok(()))]);
    }

    #[test]
    fn given_a_generation_when_read_then_it_is_the_number_in_network_order() {
        let mut bytes = Vec::new();
        let kind = of_nf_tables(libc::NFT_MSG_NEWGEN);
        message(&mut bytes, kind, 0, 7, 0, 0, |buffer| number(buffer, GENERATION_ID, 0x0102_0304));

        assert_eq!(read(&bytes, TABLE).collect::<Vec<_>>(), [Heard::Generation(7, 0x0102_0304)]);
    }

    #[test]
    fn given_bytes_that_are_cut_or_wrong_when_read_then_nothing_panics() {
        let mut batch = Batch::new(TABLE, 1);
        batch.build(&rules(&CLIENTS));
        batch.add(&[ip("10.96.0.1"), ip("fd96::1")]);
        let (whole, _) = batch.finish();

        for length in 0..whole.len() {
            let _ = read(&whole[..length], TABLE).count();
        }
        for place in 0..whole.len() {
            for byte in [0, 1, 3, 255] {
                let mut wrong = whole.clone();
                wrong[place] = byte;
                let _ = read(&wrong, TABLE).count();
            }
        }
    }
}
