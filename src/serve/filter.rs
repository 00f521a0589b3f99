//! The filter of a listener's socket: the kernel drops what comes from sources that are to get no answer.
//!
//! One classic BPF program for each socket, made from all that the listener's target says: verdicts of both sides,
//! source ranges and who is allowed from outside. It is replaced as a whole. Attaching it is a system call, everything before
//! that is pure. Which sockets get one, and what happens where the kernel takes none, is up to `bound`.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use ipnet::IpNet;
use rustix::io::Errno;
use socket2::{SockFilter, SockRef};

use crate::name::Family;
use crate::serve::address_set::AddressSet;
use crate::serve::{Target, Verdict};

/// A program that passes the packets of a set of sources. Cheap enough to run for each packet of a connection, as
/// accepted sockets have the one that their listener had: it searches, so 1,000 networks take some ten comparisons.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Filter(Box<[Instruction]>);

/// There are more networks than a program can hold: 4,096 instructions are about 1,000 scattered networks of IPv4,
/// and half of them of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the networks do not fit into a filter of {LONGEST} instructions")]
pub(super) struct TooLong;

/// The kernel takes no longer program (`BPF_MAXINSNS`).
const LONGEST: usize = 4096;

impl Filter {
    /// The program for a listener's socket; `None` where everybody is to get an answer.
    pub(super) fn of_target(target: &Target, family: Family) -> Result<Option<Self>, TooLong> {
        let drops = |verdict: &Verdict| matches!(verdict, Verdict::Drop);
        let (outside, inside) = (drops(&target.outside), drops(&target.inside));
        if !target.is_guarded() && !outside && !inside {
            return Ok(None);
        }
        if target.balancers_in_front().is_some() {
            // Lists are about clients, and who that is a balancer's header tells: the process judges, and resets. But where
            // clients from outside get no answer, balancers get none: one that is heard would send clients here.
            return Self::of(&AddressSet::all_or_none(family, !outside));
        }
        let set = |nets: &[IpNet]| AddressSet::of(family, nets);
        let everybody = AddressSet::all_or_none(family, true);
        let allowed = target.allow_from.as_deref().map_or_else(|| everybody.clone(), set);
        let heard = set(&target.inside_of).combine(&allowed, |is_inside, is_allowed| match is_inside {
            true => !inside,
            false => is_allowed && !outside,
        });
        let in_range = if target.source_ranges.is_empty() { everybody } else { set(&target.source_ranges) };
        Self::of(&heard.combine(&in_range, |is_heard, is_in_range| is_heard && is_in_range))
    }

    /// The program for a set of sources; `None` where everybody is in it, and none is needed.
    fn of(sources: &AddressSet) -> Result<Option<Self>, TooLong> {
        if sources.is_everybody() {
            return Ok(None);
        }
        if sources.flips().len() >= LONGEST {
            return Err(TooLong); // Each takes an instruction, so there is no need to write them down.
        }
        let program = search(words_of(sources.family()), 0, sources.flips(), false);
        if program.len() > LONGEST { Err(TooLong) } else { Ok(Some(Self(program.into()))) }
    }

    /// Gives the program to a socket, in place of one that it has. Sockets that it has accepted keep theirs.
    ///
    /// # Errors
    /// `PermissionDenied` where the kernel wants CAP_NET_ADMIN for it (seen for TCP sockets, not for UDP); no memory
    /// (`net.core.optmem_max`). The socket's filter is as it was then.
    pub(super) fn attach(&self, socket: impl AsFd) -> io::Result<()> {
        let program: Vec<_> = self.0.iter().map(|step| SockFilter::new(step.code, step.jt, step.jf, step.k)).collect();
        SockRef::from(&socket.as_fd()).attach_filter(&program)
    }

    /// Takes a socket's filter away. Fine where there is none.
    pub(super) fn detach(socket: impl AsFd) -> io::Result<()> {
        match SockRef::from(&socket.as_fd()).detach_filter() {
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(()),
            outcome => outcome,
        }
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Filter({} instructions)", self.0.len())
    }
}

/// Where the 32-bit words of the source address are in the network header.
fn words_of(family: Family) -> &'static [u32] {
    match family {
        Family::V4 => &[12],
        Family::V6 => &[8, 12, 16, 20],
    }
}

/// An instruction of the kernel's `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u16,
    /// How many instructions to pass over where a comparison is true, and where it is false.
    jt: u8,
    jf: u8,
    k: u32,
}

impl Instruction {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS: the word at offset `k`.
    const AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K: compares the word with `k`.
    const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA: passes over `k` instructions.
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K: takes `k` bytes of the packet.

    /// Offsets from here on are into the network header (`SKF_NET_OFF`), wherever the packet begins for the socket.
    const NETWORK_HEADER: u32 = (-0x10_0000_i32).cast_unsigned();

    fn load(offset: u32) -> Self {
        Self { code: Self::LOAD, jt: 0, jf: 0, k: Self::NETWORK_HEADER + offset }
    }

    fn answer(passes: bool) -> Self {
        Self { code: Self::RETURN, jt: 0, jf: 0, k: if passes { u32::MAX } else { 0 } }
    }
}

/// A run of values of one word, up to the next run: all have one answer, or further words decide.
struct Run {
    begin: u32,
    decision: Decision,
}

enum Decision {
    Answer(bool),
    /// A part of the flips decides, from this membership on.
    Further(Range<usize>, bool),
}

/// The program that decides by words of the address, from the first of `words` on.
///
/// `base` is the lowest address that can get here; `flips` are those above it, and `member` tells of what is below them.
fn search(words: &[u32], base: u128, flips: &[u128], member: bool) -> Vec<Instruction> {
    let Some((&word, further)) = words.split_first() else { return vec![Instruction::answer(member)] };
    let shift = 32 * further.len() as u32;
    let runs = runs(base, shift, flips, member);
    if let [Run { decision: Decision::Answer(answer), .. }] = runs.as_slice() {
        return vec![Instruction::answer(*answer)];
    }
    let mut program = vec![Instruction::load(word)];
    program.extend(choose(&runs, &|run| match &run.decision {
        Decision::Answer(answer) => vec![Instruction::answer(*answer)],
        Decision::Further(part, member) => {
            let base = base + (u128::from(run.begin) << shift);
            search(further, base, &flips[part.clone()], *member)
        }
    }));
    program
}

/// What the word that is `shift` bits from the end decides: runs that begin at 0 and go up.
fn runs(base: u128, shift: u32, flips: &[u128], mut member: bool) -> Vec<Run> {
    let word = |flip: &u128| ((flip - base) >> shift) as u32;
    let mut runs = Vec::new();
    // The value that the next run begins with; beyond the last value there is none.
    let mut begin = 0_u64;
    let answer_until = |begin: u64, end: u64, member| {
        let begin = u32::try_from(begin).ok().filter(|_| begin < end);
        begin.map(|begin| Run { begin, decision: Decision::Answer(member) })
    };
    let mut at = 0;
    for group in flips.chunk_by(|a, b| word(a) == word(b)) {
        let value = word(&group[0]);
        runs.extend(answer_until(begin, value.into(), member));
        begin = value.into();
        if !is_at_first_address(group, base, shift) {
            runs.push(Run { begin: value, decision: Decision::Further(at..at + group.len(), member) });
            begin += 1;
        }
        member ^= group.len() % 2 == 1;
        at += group.len();
    }
    runs.extend(answer_until(begin, 1 << 32, member));
    runs
}

/// True where all that have this value of the word are treated alike.
fn is_at_first_address(group: &[u128], base: u128, shift: u32) -> bool {
    matches!(group, [only] if (only - base).trailing_zeros() >= shift)
}

/// Finds the run of the word that is loaded, by halves.
fn choose(runs: &[Run], decide: &impl Fn(&Run) -> Vec<Instruction>) -> Vec<Instruction> {
    if let [run] = runs {
        return decide(run);
    }
    let (lower, upper) = runs.split_at(runs.len() / 2);
    let (below, above) = (choose(lower, decide), choose(upper, decide));
    let at_least = |jt, jf| Instruction { code: Instruction::AT_LEAST, jt, jf, k: upper[0].begin };
    let mut program = match u8::try_from(below.len()) {
        Ok(length) => vec![at_least(length, 0)],
        // Further than a comparison can jump.
        Err(_) => {
            vec![at_least(0, 1), Instruction { code: Instruction::JUMP, jt: 0, jf: 0, k: below.len() as u32 }]
        }
    };
    program.extend(below);
    program.extend(above);
    program
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::ErrorKind;
    use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
    use std::sync::Arc;
    use std::time::Duration;

    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::*;
    use crate::allow_from::AllowFrom;
    use crate::name::{ObjectName, Protocol, ServicePortName};
    use crate::plan::{ListenerKind, ProxyProtocol};
    use crate::serve::address_set::tests::{nets, telling};
    use crate::serve::balancer::PortState;

    /// Runs a program as the kernel would, on a packet from this source.
    fn passes(filter: &Filter, source: IpAddr) -> bool {
        let words: Vec<u32> = match source {
            IpAddr::V4(ip) => vec![ip.to_bits()],
            IpAddr::V6(ip) => (0..4).map(|word| (ip.to_bits() >> (96 - 32 * word)) as u32).collect(),
        };
        let offsets = words_of(Family::of(source));
        let (mut at, mut word) = (0, 0);
        loop {
            let Instruction { code, jt, jf, k } = filter.0[at];
            at += 1;
            match code {
                Instruction::LOAD => {
                    let offset = k - Instruction::NETWORK_HEADER;
                    word = words[offsets.iter().position(|known| *known == offset).expect("a word of the source")];
                }
                Instruction::AT_LEAST => at += usize::from(if word >= k { jt } else { jf }),
                Instruction::JUMP => at += k as usize,
                Instruction::RETURN => return k != 0,
                _ => panic!("an instruction of another program: {code:#x}"),
            }
        }
    }

    fn only(family: Family, nets: &[IpNet]) -> Result<Option<Filter>, TooLong> {
        Filter::of(&AddressSet::of(family, nets))
    }

    /// Networks of one address each, no two of which touch.
    fn scattered(family: Family, count: u32) -> Vec<IpNet> {
        let address = |number: u32| match family {
            Family::V4 => IpAddr::from((number * 3_900_001).to_be_bytes()),
            Family::V6 => IpAddr::from((u128::from(number) * (u128::MAX / 1_000_003)).to_be_bytes()),
        };
        (1..=count).map(|number| address(number).into()).collect()
    }

    proptest! {
        #[test]
        fn t107_given_networks_when_a_filter_is_made_then_it_passes_their_addresses_and_no_others(
            (family, nets) in prop_oneof![Just(Family::V4), Just(Family::V6)]
                .prop_flat_map(|family| (Just(family), nets(family))),
        ) {
            let filter = only(family, &nets).expect("few networks");

            for source in telling(family, &nets) {
                let allowed = nets.iter().any(|net| net.contains(&source));
                let passed = filter.as_ref().is_none_or(|filter| passes(filter, source));
                prop_assert_eq!(passed, allowed, "{}", source);
            }
        }
    }

    /// A target that serves nobody: to pass is to be refused.
    fn target(
        verdicts: [Verdict; 2],
        inside_of: &[IpNet],
        source_ranges: &[IpNet],
        allow_from: Option<Arc<[IpNet]>>,
    ) -> Target {
        let name = ServicePortName::new(ObjectName::parse("web"), "", Protocol::Tcp);
        let (port, [outside, inside]) = (Arc::new(PortState::new(name)), verdicts);
        let (inside_of, source_ranges) = (inside_of.into(), source_ranges.into());
        let kind = ListenerKind::ClusterIp;
        Target {
            port,
            kind,
            outside,
            inside,
            inside_of,
            source_ranges,
            allow_from,
            proxy_protocol: None,
            address: None,
        }
    }

    proptest! {
        #[test]
        fn given_any_target_when_its_filter_is_made_then_it_drops_exactly_whom_the_process_would(
            (family, inside_of, ranges, allowed) in prop_oneof![Just(Family::V4), Just(Family::V6)]
                .prop_flat_map(|family| (Just(family), nets(family), nets(family), prop::option::of(nets(family)))),
            (drops_outside, drops_inside) in any::<(bool, bool)>(),
        ) {
            let verdicts = [drops_outside, drops_inside].map(|drops| if drops { Verdict::Drop } else { Verdict::Reject });
            let allowed = allowed.map(|nets| AllowFrom::new(&nets).at(family));
            let target = target(verdicts, &inside_of, &ranges, allowed.clone());

            let filter = Filter::of_target(&target, family).expect("few networks");

            let nets = [&*inside_of, &ranges, allowed.as_deref().unwrap_or_default()].concat();
            for source in telling(family, &nets) {
                let passed = filter.as_ref().is_none_or(|filter| passes(filter, source));
                prop_assert_eq!(passed, !matches!(target.judge(source), Verdict::Drop), "{}", source);
            }
        }
    }

    #[test]
    fn given_an_allow_list_when_a_filter_is_made_then_outsiders_need_to_be_in_it_and_insiders_in_the_ranges_alone() {
        let net = |text: &str| text.parse::<IpNet>().expect("a net");
        let (inside, allowed, other) = (net("10.0.0.0/8"), net("203.0.113.0/24"), net("198.51.100.0/24"));
        let heard = |ranges: &[IpNet], list: &[IpNet]| {
            let target = target([Verdict::Reject, Verdict::Reject], &[inside], ranges, Some(list.into()));
            let filter = Filter::of_target(&target, Family::V4).expect("short").expect("not everybody");
            [inside, allowed, other].map(|net| passes(&filter, net.addr()))
        };

        assert_eq!(heard(&[], &[allowed]), [true, true, false]);
        assert_eq!(heard(&[], &[]), [true, false, false], "a list of nobody");
        assert_eq!(heard(&[allowed, other], &[allowed]), [false, true, false], "both have to let a client in");
        assert_eq!(heard(&[inside, other], &[allowed]), [true, false, false]);
    }

    #[test]
    fn given_balancers_in_front_when_a_filter_is_made_then_all_are_heard_unless_clients_from_outside_get_no_answer() {
        let net = |text: &str| text.parse::<IpNet>().expect("a net");
        let filter = |verdicts| {
            let protocol = ProxyProtocol { send: None, accept_from: Some([net("10.0.0.9/32")].into()) };
            let target = target(verdicts, &[], &[net("203.0.113.0/24")], Some([net("203.0.113.0/24")].into()));
            let target = Target { proxy_protocol: Some(Arc::new(protocol)), ..target };
            Filter::of_target(&target, Family::V4).expect("short")
        };

        assert_eq!(filter([Verdict::Reject, Verdict::Reject]), None, "lists are not about who comes");
        assert_eq!(filter([Verdict::Reject, Verdict::Drop]), None, "the client may be outside");
        for inside in [Verdict::Reject, Verdict::Drop] {
            let nobody = filter([Verdict::Drop, inside]).expect("a filter");
            assert!(!passes(&nobody, [10, 0, 0, 9].into()));
        }
    }

    #[test]
    fn given_a_thousand_networks_when_a_filter_is_made_then_it_is_searched_and_short_enough() {
        let nets = scattered(Family::V4, 1_000);

        let filter = only(Family::V4, &nets).expect("short enough").expect("not everybody");

        assert!(filter.0.len() <= LONGEST);
        for source in telling(Family::V4, &nets) {
            assert_eq!(passes(&filter, source), nets.iter().any(|net| net.contains(&source)), "{source}");
        }
    }

    #[test]
    fn given_more_networks_than_fit_when_a_filter_is_made_then_there_is_none() {
        assert_eq!(only(Family::V4, &scattered(Family::V4, 1_100)), Err(TooLong));
        assert_eq!(only(Family::V4, &scattered(Family::V4, 1_000)).map(|filter| filter.is_some()), Ok(true));
        assert_eq!(only(Family::V6, &scattered(Family::V6, 2_000)), Err(TooLong));
        assert_eq!(only(Family::V6, &scattered(Family::V6, 200)).map(|filter| filter.is_some()), Ok(true));
    }

    #[test]
    fn given_everybody_when_a_filter_is_made_then_none_is_needed_and_for_nobody_it_is_one_instruction() {
        assert_eq!(Filter::of(&AddressSet::all_or_none(Family::V6, true)), Ok(None));
        let nobody = Filter::of(&AddressSet::all_or_none(Family::V6, false)).expect("short").expect("not everybody");

        assert_eq!(*nobody.0, [Instruction::answer(false)]);
    }

    /// False where this kernel gives TCP sockets of privileged processes alone a filter, and this is none.
    pub(in crate::serve) fn kernel_takes_filters() -> bool {
        let nobody = Filter::of(&AddressSet::all_or_none(Family::V4, false)).expect("short").expect("not everybody");
        nobody.attach(TcpListener::bind("127.0.0.1:0").expect("a free port")).is_ok()
    }

    /// Says so and returns false where this kernel gives filters to privileged processes only.
    fn attaches(filter: &Filter, socket: impl AsFd) -> bool {
        match filter.attach(socket) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                println!("skipped (filter): this kernel gives filters to privileged processes only ({error})");
                false
            }
            Err(error) => panic!("not attached: {error}"),
        }
    }

    fn connect_from(source: Ipv4Addr, to: &TcpListener) -> io::Result<TcpStream> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&std::net::SocketAddr::from((source, 0)).into())?;
        socket.connect_timeout(&to.local_addr()?.into(), Duration::from_millis(200))?;
        Ok(socket.into())
    }

    #[test]
    fn t107_t111_given_a_filtered_listener_when_clients_connect_then_the_kernel_judges_them_until_it_is_taken_away() {
        let listener = TcpListener::bind("127.81.2.1:0").expect("a free port");
        let [one, two] = [Ipv4Addr::new(127, 81, 2, 11), Ipv4Addr::new(127, 81, 2, 12)];
        let only = |source: Ipv4Addr| only(Family::V4, &[IpAddr::from(source).into()]).expect("short").expect("a part");
        Filter::detach(&listener).expect("fine without a filter");
        if !attaches(&only(one), &listener) {
            return;
        }

        let mut before = connect_from(one, &listener).expect("in the set");
        assert_eq!(connect_from(two, &listener).expect_err("not in the set").kind(), ErrorKind::TimedOut);
        only(two).attach(&listener).expect("another in its place");
        assert_eq!(connect_from(one, &listener).expect_err("not in the set").kind(), ErrorKind::TimedOut);
        connect_from(two, &listener).expect("in the set");
        io::Write::write_all(&mut before, b"x").expect("a connection that goes on");
        let (mut served, _) = listener.accept().expect("the first that came");
        io::Read::read_exact(&mut served, &mut [0]).expect("a connection that goes on");

        Filter::detach(&listener).expect("a filter to take away");
        connect_from(one, &listener).expect("everybody is heard");
    }

    #[test]
    fn given_a_filter_on_an_ipv6_socket_when_a_datagram_comes_then_its_source_is_judged() {
        let socket = UdpSocket::bind("[::1]:0").expect("IPv6 on loopback");
        let client = UdpSocket::bind("[::1]:0").expect("IPv6 on loopback");
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a deadline");
        let set = |net: &str| only(Family::V6, &[net.parse().expect("a net")]).expect("short").expect("a part");
        if !attaches(&set("::2/127"), &socket) {
            return;
        }

        client.send_to(b"unheard", socket.local_addr().expect("bound")).expect("sent");
        set("::1/128").attach(&socket).expect("another in its place");
        client.send_to(b"heard", socket.local_addr().expect("bound")).expect("sent");

        let mut buffer = [0; 16];
        let length = socket.recv(&mut buffer).expect("a datagram");
        assert_eq!(&buffer[..length], b"heard");
    }

    #[test]
    fn given_a_filter_of_the_greatest_length_when_attached_then_the_kernel_takes_it() {
        let listener = TcpListener::bind("127.81.2.2:0").expect("a free port");
        let filter = only(Family::V4, &scattered(Family::V4, 1_000)).expect("short enough").expect("not everybody");

        if attaches(&filter, &listener) {
            assert_eq!(
                connect_from(Ipv4Addr::LOCALHOST, &listener).expect_err("no member").kind(),
                ErrorKind::TimedOut
            );
        }
    }
}
