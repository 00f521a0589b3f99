//! What a filter of tc does with each packet that comes in by an interface: programs of classic BPF, which the kernel takes
//! from whoever has CAP_NET_ADMIN. Pure: which addresses and ports these are is told by the caller.
//!
//! ```text
//! to an address of this program, at one of these ports, and a new connection or a datagram? ── yes ─▶ drop
//!                                                                                           └─ no ──▶ what others have to say
//! ```
//!
//! A filter sees packets before the kernel looks for the socket that one is for, so that ports have to be known. It can
//! refuse nothing, only drop. Programs are put on interfaces by `guard_filters`.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use crate::name::Family;

/// Instructions of a program at most, as far as its ports leave room for an address: what the kernel tells of a filter has
/// to fit into a page, or `tc filter show` ends with an error.
const LONGEST: usize = 400;
/// The most that the kernel takes (`BPF_MAXINSNS`).
#[cfg(test)]
const LIMIT: usize = 4_096;
/// Numbers that are compared one by one; more are halved first.
const LEAF: usize = 32;
/// Length of an instruction (`struct sock_filter`).
const INSTRUCTION: usize = 8;

/// Where the header of IP begins. After one of Ethernet, it is counted from the packet's first byte: the kernel then finds
/// what is not in the packet's first piece of memory, too, and takes less time. Otherwise from wherever it is
/// (`SKF_NET_OFF`).
const AFTER_ETHERNET: u32 = 14;
const NETWORK: u32 = -0x10_0000_i32 as u32;
/// What the kernel knows of the packet (`SKF_AD_OFF`).
const PROTOCOL: u32 = -0x1000_i32 as u32;
const PACKET_TYPE: u32 = (-0x1000_i32 + 4) as u32;
const INTERFACE: u32 = (-0x1000_i32 + 8) as u32;
/// A packet for the hardware address of another machine (`PACKET_OTHERHOST`), as bridges see them.
const FOR_OTHERS: u32 = 3;
/// Index of the loopback interface.
const LOOPBACK: u32 = 1;
/// What becomes of a packet (`TC_ACT_SHOT`, `TC_ACT_UNSPEC`).
const DROP: u32 = 2;
const PASS: u32 = u32::MAX;

/// Instructions, as `linux/bpf_common.h` numbers them.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const LOAD_HALF_AT_X: u16 = 0x48;
const LOAD_BYTE_AT_X: u16 = 0x50;
const X_IMMEDIATE: u16 = 0x01;
const X_HEADER_LENGTH: u16 = 0xb1;
const X_TO_A: u16 = 0x87;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_AT_LEAST: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Flags of TCP that say whether a connection begins, and how they are then.
const SYN_AND_ACK: u32 = 0x12;
const SYN: u32 = 0x02;
/// Headers that IPv6 may have before that of a protocol with ports: hop-by-hop, routing, authentication, destination.
const BEFORE_PORTS: [u32; 4] = [0, 43, 51, 60];
const FRAGMENT: u32 = 44;
/// Lengths of headers of IPv6: its own, and with that of a fragment.
const V6_HEADER: u32 = 40;
const V6_FRAGMENT: u32 = 48;

/// Ports at which something listens on all addresses of this machine, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) tcp: Vec<u16>,
    pub(crate) udp: Vec<u16>,
}

impl Ports {
    pub(crate) fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.udp.is_empty()
    }
}

/// Programs that drop what is sent to these addresses (sorted, of one family) at these ports. Each begins with `mark`, by
/// which they are told from those of others; they fit into the kernel's [`LIMIT`] unless there are thousands of ports.
///
/// * Over TCP only what begins a connection is dropped, so that those that are open go on.
/// * Over UDP, an answer of a Service to a client on this machine is let through, though that client's socket is one of all
///   addresses as well: it comes by loopback, from a port that the kernel gives to no client (`clients`).
/// * The first fragment has the ports, and the others are nothing without it. Of IPv6, what has other headers before the
///   ports is dropped at any port: nobody sends such to a Service, but who wants to get by.
/// * What is for another machine's hardware address is passed on: a bridge gives it to whoever that is.
/// * A packet that ends before what is looked for ends the program, with the verdict 0 (`TC_ACT_OK`): the kernel drops it
///   where it reads that header.
pub(crate) fn programs(
    addresses: &[IpAddr],
    ports: &Ports,
    clients: &RangeInclusive<u16>,
    mark: u32,
    is_ethernet: bool,
) -> Vec<Vec<u8>> {
    let Some(first) = addresses.first().filter(|_| !ports.is_empty()) else { return Vec::new() };
    let code = Code::new(Family::of(*first), is_ethernet);
    let program = program(code, addresses, ports, clients, mark);
    match addresses.split_at_checked(addresses.len() / 2) {
        Some((lower, upper)) if program.len() > LONGEST * INSTRUCTION && !lower.is_empty() => {
            let mut programs = programs(lower, ports, clients, mark, is_ethernet);
            programs.extend(self::programs(upper, ports, clients, mark, is_ethernet));
            programs
        }
        _ => vec![program],
    }
}

/// The mark of a program, where it begins with one.
pub(crate) fn mark(program: &[u8]) -> Option<u32> {
    let [low, high, 0, 0, mark @ ..] = *program.first_chunk::<INSTRUCTION>()? else { return None };
    (u16::from_ne_bytes([low, high]) == X_IMMEDIATE).then_some(u32::from_ne_bytes(mark))
}

/// Sets these bits in the mark of a program.
pub(crate) fn add_to_mark(program: &mut [u8], bits: u32) {
    let Some(mark) = mark(program) else { return };
    program[INSTRUCTION - 4..INSTRUCTION].copy_from_slice(&(mark | bits).to_ne_bytes());
}

fn program(mut code: Code, addresses: &[IpAddr], ports: &Ports, clients: &RangeInclusive<u16>, mark: u32) -> Vec<u8> {
    let [tcp, udp, begins, address, drop, pass] = std::array::from_fn(|_| code.label());
    code.add(X_IMMEDIATE, mark);
    code.check_range(addresses, pass);
    match code.family {
        Family::V4 => code.find_ports_of_v4(tcp, udp, pass),
        Family::V6 => code.find_ports_of_v6(tcp, udp, address, pass),
    }

    code.place(tcp);
    code.add(LOAD_HALF_AT_X, code.start + 2);
    code.find(&numbers(&ports.tcp), begins, pass);
    code.place(begins);
    code.check_begins(address);
    code.go_to(pass);

    code.place(udp);
    code.check_answer(clients, pass);
    code.add(LOAD_HALF_AT_X, code.start + 2);
    code.find(&numbers(&ports.udp), address, pass);

    code.place(address);
    code.find_address(addresses, drop, pass);

    code.place(drop);
    code.add(RETURN, DROP);
    code.place(pass);
    code.add(RETURN, PASS);
    code.finish()
}

fn numbers(ports: &[u16]) -> Vec<u32> {
    ports.iter().copied().map(u32::from).collect()
}

/// An address as the words that a program compares.
fn words(address: IpAddr) -> Vec<u32> {
    match address {
        IpAddr::V4(address) => vec![address.to_bits()],
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            [96, 64, 32, 0].into_iter().map(|shift| (bits >> shift) as u32).collect()
        }
    }
}

/// A place of a program that others jump to. All jumps go forward.
#[derive(Clone, Copy)]
struct Label(usize);

#[derive(Clone, Copy)]
struct Instruction {
    code: u16,
    /// How many instructions to pass over where a condition is true, and where it is not.
    then: u8,
    otherwise: u8,
    operand: u32,
}

/// A program that is being written.
struct Code {
    /// Of the addresses.
    family: Family,
    /// Where the header of IP begins.
    start: u32,
    instructions: Vec<Instruction>,
    /// Where each label is.
    labels: Vec<usize>,
    /// Jumps, and where they go.
    jumps: Vec<(usize, Label)>,
}

impl Code {
    fn new(family: Family, is_ethernet: bool) -> Self {
        let start = if is_ethernet { AFTER_ETHERNET } else { NETWORK };
        Self { family, start, instructions: Vec::new(), labels: Vec::new(), jumps: Vec::new() }
    }

    /// Where the address begins that a packet is sent to.
    fn destination(&self) -> u32 {
        self.start
            + match self.family {
                Family::V4 => 16,
                Family::V6 => 24,
            }
    }

    fn label(&mut self) -> Label {
        self.labels.push(0);
        Label(self.labels.len() - 1)
    }

    fn place(&mut self, label: Label) {
        self.labels[label.0] = self.instructions.len();
    }

    fn add(&mut self, code: u16, operand: u32) {
        self.instructions.push(Instruction { code, then: 0, otherwise: 0, operand });
    }

    fn go_to(&mut self, label: Label) {
        self.jumps.push((self.instructions.len(), label));
        self.add(JUMP, 0);
    }

    /// Goes there where the condition is true. Conditions jump 255 instructions at most, others as far as they like.
    fn go_if(&mut self, condition: u16, operand: u32, label: Label) {
        self.instructions.push(Instruction { code: condition, then: 0, otherwise: 1, operand });
        self.go_to(label);
    }

    /// Goes there unless it is true.
    fn go_unless(&mut self, condition: u16, operand: u32, label: Label) {
        self.instructions.push(Instruction { code: condition, then: 1, otherwise: 0, operand });
        self.go_to(label);
    }

    /// Passes what is sent to no address between the first and the last one, which is most of what there is; and what is
    /// not for this machine.
    fn check_range(&mut self, addresses: &[IpAddr], pass: Label) {
        let protocol = match self.family {
            Family::V4 => libc::ETH_P_IP,
            Family::V6 => libc::ETH_P_IPV6,
        };
        self.add(LOAD_HALF, PROTOCOL);
        self.go_unless(IF_EQUAL, protocol as u32, pass);
        let word = |address: Option<&IpAddr>| address.and_then(|address| words(*address).first().copied());
        self.add(LOAD_WORD, self.destination());
        self.go_unless(IF_AT_LEAST, word(addresses.first()).unwrap_or(0), pass);
        self.go_if(IF_GREATER, word(addresses.last()).unwrap_or(u32::MAX), pass);
        self.add(LOAD_BYTE, PACKET_TYPE);
        self.go_if(IF_EQUAL, FOR_OTHERS, pass);
    }

    /// Leaves in X how long what is before the header with ports is.
    fn find_ports_of_v4(&mut self, tcp: Label, udp: Label, pass: Label) {
        self.add(LOAD_HALF, self.start + 6);
        self.go_if(IF_ANY_BIT, 0x1fff, pass); // A later fragment.
        self.add(X_HEADER_LENGTH, self.start);
        self.add(LOAD_BYTE, self.start + 9);
        self.go_if(IF_EQUAL, libc::IPPROTO_TCP as u32, tcp);
        self.go_if(IF_EQUAL, libc::IPPROTO_UDP as u32, udp);
        self.go_to(pass);
    }

    fn find_ports_of_v6(&mut self, tcp: Label, udp: Label, address: Label, pass: Label) {
        let protocol = self.label();
        self.add(X_IMMEDIATE, V6_HEADER);
        self.add(LOAD_BYTE, self.start + 6);
        self.go_unless(IF_EQUAL, FRAGMENT, protocol);
        self.add(LOAD_HALF, self.start + V6_HEADER + 2);
        self.go_if(IF_ANY_BIT, 0xfff8, pass); // A later fragment.
        self.add(X_IMMEDIATE, V6_FRAGMENT);
        self.add(LOAD_BYTE, self.start + V6_HEADER);
        self.place(protocol);
        self.go_if(IF_EQUAL, libc::IPPROTO_TCP as u32, tcp);
        self.go_if(IF_EQUAL, libc::IPPROTO_UDP as u32, udp);
        for header in BEFORE_PORTS {
            self.go_if(IF_EQUAL, header, address);
        }
        self.go_to(pass);
    }

    /// Goes there where a packet begins a connection, or is a fragment: its flags may be in the next one.
    fn check_begins(&mut self, address: Label) {
        match self.family {
            Family::V4 => {
                self.add(LOAD_HALF, self.start + 6);
                self.go_if(IF_ANY_BIT, 0x2000, address);
            }
            Family::V6 => {
                self.add(X_TO_A, 0);
                self.go_if(IF_EQUAL, V6_FRAGMENT, address);
            }
        }
        self.add(LOAD_BYTE_AT_X, self.start + 13);
        self.add(AND, SYN_AND_ACK);
        self.go_if(IF_EQUAL, SYN, address);
    }

    /// Goes there where a datagram is from no client, and from this machine.
    fn check_answer(&mut self, clients: &RangeInclusive<u16>, pass: Label) {
        let question = self.label();
        self.add(LOAD_WORD, INTERFACE);
        self.go_unless(IF_EQUAL, LOOPBACK, question);
        self.add(LOAD_HALF_AT_X, self.start);
        self.go_unless(IF_AT_LEAST, u32::from(*clients.start()), pass);
        self.go_if(IF_GREATER, u32::from(*clients.end()), pass);
        self.place(question);
    }

    /// Goes to either, depending on whether the packet is sent to one of these.
    fn find_address(&mut self, addresses: &[IpAddr], drop: Label, pass: Label) {
        let words: Vec<Vec<u32>> = addresses.iter().copied().map(words).collect();
        let upper = |words: &[u32]| words.split_last().map(|(_, upper)| upper.to_vec()).unwrap_or_default();
        for network in words.chunk_by(|one, other| upper(one) == upper(other)) {
            let Some(first) = network.first() else { continue };
            let next = self.label();
            let mut at = self.destination();
            for word in upper(first) {
                self.add(LOAD_WORD, at);
                self.go_unless(IF_EQUAL, word, next);
                at += 4;
            }
            self.add(LOAD_WORD, at);
            let last: Vec<u32> = network.iter().filter_map(|words| words.last().copied()).collect();
            self.find(&last, drop, pass);
            self.place(next);
        }
        self.go_to(pass);
    }

    /// Goes to either, depending on whether A is one of these, which are sorted.
    fn find(&mut self, numbers: &[u32], found: Label, other: Label) {
        let (lower, upper) = numbers.split_at(numbers.len() / 2);
        if let Some(middle) = upper.first()
            && numbers.len() > LEAF
        {
            let below = self.label();
            self.go_unless(IF_AT_LEAST, *middle, below);
            self.find(upper, found, other);
            self.place(below);
            return self.find(lower, found, other);
        }
        for (place, number) in numbers.iter().enumerate() {
            let then = (numbers.len() - place) as u8; // To the second of the jumps below.
            self.instructions.push(Instruction { code: IF_EQUAL, then, otherwise: 0, operand: *number });
        }
        self.go_to(other);
        self.go_to(found);
    }

    /// As the kernel takes it.
    fn finish(mut self) -> Vec<u8> {
        for (from, label) in &self.jumps {
            self.instructions[*from].operand = (self.labels[label.0] - from - 1) as u32;
        }
        let mut bytes = Vec::with_capacity(self.instructions.len() * INSTRUCTION);
        for Instruction { code, then, otherwise, operand } in self.instructions {
            bytes.extend(code.to_ne_bytes());
            bytes.extend([then, otherwise]);
            bytes.extend(operand.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENTS: RangeInclusive<u16> = 32_768..=60_999;
    const MARK: u32 = 0x6b72_006b;
    const EVERYWHERE: u32 = 2;
    const FOR_US: u32 = 0;

    fn ports() -> Ports {
        Ports { tcp: vec![22, 10_250], udp: vec![111] }
    }

    /// A packet, from its network header on, and for whom it is.
    #[derive(Clone, Debug)]
    struct Packet(Vec<u8>, u32);

    impl Packet {
        fn new(to: IpAddr, protocol: u8, from_port: u16, to_port: u16, flags: u8) -> Self {
            let mut bytes = match to {
                IpAddr::V4(to) => {
                    let mut header = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 2];
                    header.extend(to.octets());
                    header
                }
                IpAddr::V6(to) => {
                    let mut header = vec![0x60, 0, 0, 0, 0, 20, protocol, 64];
                    header.extend([0xfd; 16]);
                    header.extend(to.octets());
                    header
                }
            };
            bytes.extend(from_port.to_be_bytes());
            bytes.extend(to_port.to_be_bytes());
            bytes.extend([0; 9]);
            bytes.extend([flags, 0, 0, 0, 0, 0, 0]);
            Self(bytes, FOR_US)
        }

        fn with(mut self, at: usize, byte: u8) -> Self {
            self.0[at] = byte;
            self
        }
    }

    fn tcp(to: IpAddr, port: u16) -> Packet {
        Packet::new(to, 6, 40_000, port, 0x02)
    }

    /// What the kernel would do with it. A load from beyond the end ends a program with 0.
    fn run(program: &[u8], packet: &Packet, interface: u32) -> u32 {
        let instruction = |place: usize| {
            let bytes: [u8; INSTRUCTION] = program[place * INSTRUCTION..][..INSTRUCTION].try_into().expect("eight");
            let [low, high, then, otherwise, operand @ ..] = bytes;
            let code = u16::from_ne_bytes([low, high]);
            Instruction { code, then, otherwise, operand: u32::from_ne_bytes(operand) }
        };
        let load = |at: u32, length: usize| {
            let at = at.wrapping_sub(if at < NETWORK { AFTER_ETHERNET } else { NETWORK }) as usize;
            let bytes = packet.0.get(at..at + length)?;
            Some(bytes.iter().fold(0, |number: u32, byte| number << 8 | u32::from(*byte)))
        };
        let (mut a, mut x, mut place) = (0_u32, 0_u32, 0);
        loop {
            let Instruction { code, then, otherwise, operand } = instruction(place);
            place += 1;
            let condition = match code {
                IF_EQUAL => Some(a == operand),
                IF_GREATER => Some(a > operand),
                IF_AT_LEAST => Some(a >= operand),
                IF_ANY_BIT => Some(a & operand != 0),
                _ => None,
            };
            if let Some(is_true) = condition {
                place += usize::from(if is_true { then } else { otherwise });
                continue;
            }
            let loaded = match code {
                RETURN => return operand,
                JUMP => {
                    place += operand as usize;
                    continue;
                }
                X_IMMEDIATE => {
                    x = operand;
                    continue;
                }
                X_HEADER_LENGTH => {
                    let Some(byte) = load(operand, 1) else { return 0 };
                    x = (byte & 0xf) * 4;
                    continue;
                }
                X_TO_A => Some(x),
                AND => Some(a & operand),
                LOAD_WORD if operand == INTERFACE => Some(interface),
                LOAD_BYTE if operand == PACKET_TYPE => Some(packet.1),
                LOAD_HALF if operand == PROTOCOL => Some(if packet.0[0] >> 4 == 4 { 0x0800 } else { 0x86dd }),
                LOAD_WORD => load(operand, 4),
                LOAD_HALF => load(operand, 2),
                LOAD_BYTE => load(operand, 1),
                LOAD_HALF_AT_X => load(operand.wrapping_add(x), 2),
                LOAD_BYTE_AT_X => load(operand.wrapping_add(x), 1),
                other => panic!("no instruction: {other:#x}"),
            };
            let Some(loaded) = loaded else { return 0 };
            a = loaded;
        }
    }

    fn is_dropped(programs: &[Vec<u8>], packet: &Packet, interface: u32) -> bool {
        let verdicts: Vec<u32> = programs.iter().map(|program| run(program, packet, interface)).collect();
        assert!(verdicts.iter().all(|verdict| [DROP, PASS].contains(verdict)), "{verdicts:?} of {packet:?}");
        verdicts.contains(&DROP)
    }

    fn pair() -> [IpAddr; 2] {
        [[10, 96, 0, 10].into(), [0xfd96, 0, 0, 0, 0, 0, 0, 0x10].into()]
    }

    #[test]
    fn given_a_guarded_address_when_sent_to_then_new_connections_at_those_ports_alone_are_dropped() {
        for vip in pair() {
            let programs = programs(&[vip], &ports(), &CLIENTS, MARK, true);
            let other = if vip.is_ipv4() { [10, 96, 0, 11].into() } else { "fd96::11".parse().expect("an address") };
            let dropped = |packet: Packet| is_dropped(&programs, &packet, EVERYWHERE);

            assert!(dropped(tcp(vip, 22)) && dropped(tcp(vip, 10_250)));
            assert!(!dropped(tcp(vip, 80)) && !dropped(tcp(vip, 111)) && !dropped(tcp(other, 22)));
            for flags in [0x12, 0x10, 0x18, 0x04] {
                assert!(!dropped(Packet::new(vip, 6, 40_000, 22, flags)), "an open connection: {flags}");
            }
            assert!(dropped(Packet::new(vip, 6, 40_000, 22, 0xc2)), "with ECN");
            assert!(dropped(Packet::new(vip, 17, 40_000, 111, 0)) && !dropped(Packet::new(vip, 17, 40_000, 22, 0)));
            assert!(!dropped(Packet::new(vip, 58, 40_000, 22, 0x02)), "ICMP");
            let mut of_a_bridge = tcp(vip, 22);
            of_a_bridge.1 = FOR_OTHERS;
            assert!(!dropped(of_a_bridge), "for another machine");
            let [v4, v6] = pair();
            assert!(!dropped(tcp(if vip == v4 { v6 } else { v4 }, 22)), "of the other family");
        }
    }

    #[test]
    fn given_an_interface_without_ethernet_when_judged_then_the_same_is_dropped() {
        for vip in pair() {
            let [with, without] =
                [true, false].map(|is_ethernet| programs(&[vip], &ports(), &CLIENTS, MARK, is_ethernet));
            assert_ne!(with, without);

            for (protocol, port) in [(6, 22), (6, 80), (17, 111), (17, 22), (58, 22)] {
                let packet = Packet::new(vip, protocol, 40_000, port, 0x02);
                assert_eq!(
                    is_dropped(&without, &packet, EVERYWHERE),
                    is_dropped(&with, &packet, EVERYWHERE),
                    "{protocol} {port}"
                );
            }
            assert!(is_dropped(&without, &tcp(vip, 22), EVERYWHERE));
        }
    }

    #[test]
    fn given_an_answer_on_loopback_when_it_is_from_no_clients_port_then_it_is_let_through() {
        for vip in pair() {
            let programs = programs(&[vip], &ports(), &CLIENTS, MARK, true);
            let dropped = |from, interface| is_dropped(&programs, &Packet::new(vip, 17, from, 111, 0), interface);

            assert!(!dropped(53, LOOPBACK) && !dropped(61_000, LOOPBACK));
            assert!(dropped(32_768, LOOPBACK) && dropped(60_999, LOOPBACK));
            assert!(dropped(53, EVERYWHERE));
        }
    }

    #[test]
    fn given_fragments_and_headers_in_between_when_judged_then_nobody_gets_by() {
        let [v4, v6] = pair();
        let of_v4 = programs(&[v4], &ports(), &CLIENTS, MARK, true);
        let of_v6 = programs(&[v6], &ports(), &CLIENTS, MARK, true);

        let mut tiny = tcp(v4, 22).with(6, 0x20);
        tiny.0.truncate(28); // Ports, and no flags.
        assert!(is_dropped(&of_v4, &tiny, EVERYWHERE));
        assert!(!is_dropped(&of_v4, &tcp(v4, 22).with(7, 1), EVERYWHERE), "a later one");
        let mut options = tcp(v4, 22).with(0, 0x46);
        options.0.splice(20..20, [1; 4]);
        assert!(is_dropped(&of_v4, &options, EVERYWHERE));

        let fragment = |protocol: u8, offset: [u8; 2]| {
            let mut packet = tcp(v6, 22).with(6, 44);
            packet.0.splice(40..40, [protocol, 0, offset[0], offset[1], 0, 0, 0, 1]);
            packet
        };
        assert!(is_dropped(&of_v6, &fragment(6, [0, 1]), EVERYWHERE));
        assert!(is_dropped(&of_v6, &fragment(60, [0, 1]), EVERYWHERE));
        assert!(!is_dropped(&of_v6, &fragment(6, [0, 9]), EVERYWHERE), "a later one");
        assert!(!is_dropped(&of_v6, &fragment(58, [0, 1]), EVERYWHERE), "ICMP");
        for header in BEFORE_PORTS {
            assert!(is_dropped(&of_v6, &tcp(v6, 80).with(6, header as u8), EVERYWHERE), "{header}");
        }
    }

    #[test]
    fn given_thousands_of_addresses_when_programs_are_made_then_each_is_short_and_all_are_found() {
        let v4 = |number: u32| IpAddr::from((0x0a60_0000 + number * 7).to_be_bytes());
        let v6 = |number: u32| IpAddr::from([0xfd96, 0, 0, (number % 3) as u16, 0, 0, 0, number as u16]);
        for address in [&v4 as &dyn Fn(u32) -> IpAddr, &v6] {
            let mut addresses: Vec<IpAddr> = (1..=3_000).map(address).collect();
            addresses.sort();
            let programs = programs(&addresses, &ports(), &CLIENTS, MARK, true);

            assert!(programs.iter().all(|program| program.len() <= LONGEST * INSTRUCTION));
            assert!(programs.len() <= 20, "{}", programs.len());
            for number in (1..=3_000).step_by(97) {
                assert!(is_dropped(&programs, &tcp(address(number), 22), EVERYWHERE), "{number}");
                assert!(!is_dropped(&programs, &tcp(address(number), 80), EVERYWHERE), "{number}");
            }
            assert!(!is_dropped(&programs, &tcp(address(3_001), 22), EVERYWHERE));
        }
    }

    #[test]
    fn given_many_ports_when_programs_are_made_then_they_are_as_long_as_that_takes() {
        let ports = Ports { tcp: (1..=1_000).collect(), udp: Vec::new() };

        let programs = programs(&pair()[..1], &ports, &CLIENTS, MARK, true);

        assert_eq!(programs.len(), 1);
        assert!(programs[0].len() <= LIMIT * INSTRUCTION);
        assert!(is_dropped(&programs, &tcp(pair()[0], 500), EVERYWHERE));
        assert!(!is_dropped(&programs, &tcp(pair()[0], 1_001), EVERYWHERE));
    }

    #[test]
    fn given_nothing_to_drop_when_programs_are_made_then_there_is_none() {
        assert_eq!(programs(&[], &ports(), &CLIENTS, MARK, true), Vec::<Vec<u8>>::new());
        assert_eq!(programs(&pair()[..1], &Ports::default(), &CLIENTS, MARK, true), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn given_a_program_when_its_mark_is_read_then_only_ours_has_one() {
        assert_eq!(mark(&programs(&pair()[..1], &ports(), &CLIENTS, MARK, true)[0]), Some(MARK));
        for other in [&[][..], &[6, 0, 0, 0, 0, 0, 0, 0], &[1, 0, 1, 0, 0, 0, 0, 0], &[1, 0, 0]] {
            assert_eq!(mark(other), None);
        }
    }
}
