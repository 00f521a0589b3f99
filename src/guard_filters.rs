//! Guards addresses where the kernel has no nf_tables: filters of tc on each interface, which drop what is sent there to a
//! port at which something listens on all addresses of this machine.
//!
//! ```text
//! interfaces × programs (`guard_program`) ─ what is there is asked, only what differs is changed ─▶ clsact, ingress
//! ```
//!
//! * Loopback has filters as well: clients on this machine come by it.
//! * Nothing is remembered that the kernel can tell: whoever removes a filter has it back with the next look, and what an
//!   earlier run has left is known by the mark of its programs.
//! * Filters of others stay as they are; theirs may come first, and then have the say. The room for filters (clsact) goes
//!   with the last of ours where we have made it, unless others use it by now.
//!
//! When that is done, and for which addresses, is decided in `guard`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::io::Errno;

use crate::filter_message::{Direction, Filter, Heard, Link, Request, read, write};
use crate::guard_program::{self, Ports, programs};
use crate::name::{Family, Protocol};
use crate::wildcard::{Key, wildcard_ports};

/// Numbers of our filters: even ones of IPv4, odd ones of IPv6, from this one on. Those that others have are left to them.
const FIRST: u16 = 10_700;
/// The most filters on an interface: more addresses than that are not guarded.
const MOST: usize = 10_000;
/// How a program of ours begins: these two bytes; 1 where the room for filters is ours, too; the number of our routes.
const OURS: u32 = 0x6b72 << 16;
const OUR_ROOM: u32 = 1 << 8;
/// The longest datagram of the kernel.
const DATAGRAM: usize = 32 * 1024;
/// How often all is read anew, where others change theirs all the time while it is told.
const LOOKS: usize = 5;

/// What keeps sockets of all addresses from answering, without nf_tables. Owned by the task of `guard`, by value.
#[derive(Debug)]
pub(crate) struct GuardFilters {
    socket: FilterSocket,
    /// Number of our routes.
    protocol: u8,
    /// `None`: not looked at yet.
    listeners: Option<BTreeSet<Key>>,
    /// Interfaces that have been guarded so far.
    guarded: BTreeSet<u32>,
    /// Interfaces where the room for filters is ours: what others remove of ours does not make it theirs.
    rooms: BTreeSet<u32>,
}

/// The filters of ours on an interface: their numbers, and programs.
type Programs = BTreeMap<u16, Vec<u8>>;

/// What there is on an interface.
#[derive(Debug, Default)]
struct Found {
    ours: Programs,
    /// Numbers that others have.
    taken: BTreeSet<u16>,
}

impl GuardFilters {
    /// Changes nothing.
    pub(crate) fn open(protocol: u8) -> io::Result<Self> {
        Ok(Self {
            socket: FilterSocket::open()?,
            protocol,
            listeners: None,
            guarded: BTreeSet::new(),
            rooms: BTreeSet::new(),
        })
    }

    /// Takes note of where something listens on all addresses. True where that is another than was known.
    pub(crate) fn note(&mut self, listeners: BTreeSet<Key>) -> bool {
        let is_changed = self.listeners.as_ref() != Some(&listeners);
        self.listeners = Some(listeners);
        if is_changed {
            self.guarded.clear(); // Other programs are to be there: nobody has removed any.
        }
        is_changed
    }

    /// Has these addresses guarded on each interface, and no other; without any, nothing of ours is left. `is_same` where
    /// they are those of the last time. True where an interface that was guarded was so no more.
    pub(crate) fn settle(
        &mut self,
        addresses: &BTreeSet<IpAddr>,
        clients: &RangeInclusive<u16>,
        is_same: bool,
    ) -> Result<bool, Errno> {
        if self.listeners.is_none() {
            self.listeners = Some(wildcard_ports(addresses).map_err(errno)?);
        }
        if !is_same {
            self.guarded.clear();
        }
        let listeners = self.listeners.as_ref().into_iter().flatten();
        let links = self.socket.links()?;
        let wanted = Wanted::new(&links, addresses, &ports(listeners, clients), clients, self.mark())?;
        let (mut is_lost, mut refused) = (false, None);
        let is_there = |index: &u32| links.iter().any(|link| link.index == *index);
        self.guarded.retain(is_there);
        self.rooms.retain(is_there);
        for link in links.iter().copied() {
            match self.settle_link(link.index, wanted.of(link)) {
                Ok(is_changed) => is_lost |= is_changed && self.guarded.contains(&link.index),
                Err(Errno::NODEV) => continue, // It has gone meanwhile.
                Err(error) => {
                    refused.get_or_insert(error); // Others are guarded all the same.
                    continue;
                }
            }
            self.guarded.insert(link.index);
        }
        refused.map_or(Ok(is_lost), Err)
    }

    /// True where each interface has the filters that these addresses want, by what listens now.
    pub(crate) fn is_settled(
        &mut self,
        addresses: &BTreeSet<IpAddr>,
        clients: &RangeInclusive<u16>,
    ) -> io::Result<bool> {
        let listeners = wildcard_ports(addresses)?;
        let links = self.socket.links()?;
        let wanted = Wanted::new(&links, addresses, &ports(&listeners, clients), clients, self.mark())?;
        for link in links {
            let found = self.look(link.index)?;
            let wanted = numbered(wanted.of(link), &found.taken, is_our_room(&found.ours));
            if differences(&found.ours, &wanted).next().is_some() {
                return Ok(false);
            }
        }
        Ok(!wanted.is_empty())
    }

    /// Takes all filters of ours away. False where there was none.
    pub(crate) fn remove(&mut self) -> Result<bool, Errno> {
        let mut is_removed = false;
        for link in self.socket.links()? {
            match self.settle_link(link.index, &[]) {
                Ok(is_changed) => is_removed |= is_changed,
                Err(Errno::NODEV) => {}
                Err(error) => return Err(error),
            }
        }
        self.guarded.clear();
        Ok(is_removed)
    }

    /// True where something had to be changed.
    fn settle_link(&mut self, link: u32, wanted: &[Program]) -> Result<bool, Errno> {
        let found = self.look(link)?;
        let mut is_ours = self.rooms.contains(&link) || is_our_room(&found.ours);
        if found.ours.is_empty() && !wanted.is_empty() {
            match self.socket.change(Request::MakeRoom(link)) {
                Err(Errno::EXIST) => {}
                made => is_ours = made.map(|()| true)?,
            }
        }
        if is_ours {
            self.rooms.insert(link);
        }
        let wanted = numbered(wanted, &found.taken, is_ours);
        let outcome = self.change(link, &found.ours, &wanted);
        // A kernel without programs for filters has room for them all the same: it is not left there, either.
        if is_ours && (wanted.is_empty() || outcome.is_err()) && self.is_unused(link)? {
            self.rooms.remove(&link);
            self.socket.remove_room(link)?;
        }
        outcome
    }

    /// True where something had to be changed.
    fn change(&mut self, link: u32, found: &Programs, wanted: &Programs) -> Result<bool, Errno> {
        let mut is_changed = false;
        for (number, program) in differences(found, wanted) {
            is_changed = true;
            match program {
                Some(program) => self.socket.change(Request::Set(link, number, program))?,
                None => self.socket.change(Request::Remove(link, number))?,
            }
        }
        Ok(is_changed)
    }

    fn look(&mut self, link: u32) -> Result<Found, Errno> {
        let mark = self.mark();
        let is_ours = |program: &Vec<u8>| guard_program::mark(program).is_some_and(|found| found & !OUR_ROOM == mark);
        let mut found = Found::default();
        for Filter { number, program } in self.socket.filters(link, Direction::Ingress)? {
            match program.filter(is_ours) {
                Some(program) => drop(found.ours.insert(number, program)),
                None => drop(found.taken.insert(number)),
            }
        }
        Ok(found)
    }

    fn is_unused(&mut self, link: u32) -> Result<bool, Errno> {
        let inward = self.socket.filters(link, Direction::Ingress)?;
        let outward = self.socket.filters(link, Direction::Egress)?;
        Ok(inward.is_empty() && outward.is_empty())
    }

    /// How programs begin where the room is not ours.
    fn mark(&self) -> u32 {
        OURS | u32::from(self.protocol)
    }
}

/// The ports of a listener are dropped in its family. Those that the kernel gives to clients are not, over UDP: a client
/// that waits for its answer has such a socket.
fn ports<'a>(listeners: impl IntoIterator<Item = &'a Key>, clients: &RangeInclusive<u16>) -> BTreeMap<Family, Ports> {
    let mut ports: BTreeMap<Family, Ports> = BTreeMap::new();
    for (protocol, port, family) in listeners {
        let ports = ports.entry(*family).or_default();
        match protocol {
            Protocol::Tcp => ports.tcp.push(*port),
            Protocol::Udp if !clients.contains(port) => ports.udp.push(*port),
            _ => {}
        }
    }
    ports
}

/// A program, for addresses of a family.
type Program = (Family, Vec<u8>);

/// The programs that interfaces are to have, in their order.
#[derive(Debug, Default)]
struct Wanted {
    /// Where packets begin with a header of Ethernet, and where not.
    with_ethernet: Vec<Program>,
    without: Vec<Program>,
}

impl Wanted {
    /// Those that these interfaces need.
    fn new(
        links: &BTreeSet<Link>,
        addresses: &BTreeSet<IpAddr>,
        ports: &BTreeMap<Family, Ports>,
        clients: &RangeInclusive<u16>,
        mark: u32,
    ) -> Result<Self, Errno> {
        let of = |is_ethernet| {
            let mut wanted = Vec::new();
            if !links.iter().any(|link| link.is_ethernet == is_ethernet) {
                return Ok(wanted);
            }
            for (family, ports) in ports {
                let addresses: Vec<IpAddr> =
                    addresses.iter().copied().filter(|address| Family::of(*address) == *family).collect();
                let programs = programs(&addresses, ports, clients, mark, is_ethernet);
                wanted.extend(programs.into_iter().map(|program| (*family, program)));
            }
            if wanted.len() > MOST { Err(Errno::TOOBIG) } else { Ok(wanted) }
        };
        Ok(Self { with_ethernet: of(true)?, without: of(false)? })
    }

    fn of(&self, link: Link) -> &[Program] {
        if link.is_ethernet { &self.with_ethernet } else { &self.without }
    }

    fn is_empty(&self) -> bool {
        self.with_ethernet.is_empty() && self.without.is_empty()
    }
}

/// These programs, each with a number that nobody has, and with what has become of the room for them.
fn numbered(programs: &[Program], taken: &BTreeSet<u16>, is_our_room: bool) -> Programs {
    let mut numbered = Programs::new();
    for family in Family::ALL {
        let first = FIRST + u16::from(family == Family::V6);
        let free = (first..=u16::MAX).step_by(2).filter(|number| !taken.contains(number));
        let programs = programs.iter().filter(|(of, _)| *of == family).map(|(_, program)| program.clone());
        numbered.extend(free.zip(programs));
    }
    if is_our_room {
        numbered.values_mut().for_each(|program| guard_program::add_to_mark(program, OUR_ROOM));
    }
    numbered
}

fn is_our_room(found: &Programs) -> bool {
    found.values().any(|program| guard_program::mark(program).is_some_and(|mark| mark & OUR_ROOM != 0))
}

/// What has to be set where, and what has to go: first what is missing, so that nothing is open meanwhile.
fn differences<'a>(found: &'a Programs, wanted: &'a Programs) -> impl Iterator<Item = (u16, Option<&'a Vec<u8>>)> {
    let set = wanted.iter().filter(|(number, program)| found.get(number) != Some(program));
    let gone = found.keys().filter(|number| !wanted.contains_key(number));
    set.map(|(number, program)| (*number, Some(program))).chain(gone.map(|number| (*number, None)))
}

/// The socket. Each call is over in as long as the kernel works: it answers before a call to send returns.
#[derive(Debug)]
struct FilterSocket {
    socket: Socket,
    /// Number of the next request.
    next: u32,
    buffer: Box<[u8]>,
}

impl FilterSocket {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let _ = socket.set_cap_ack(true); // Answers without the question, where the kernel knows how.
        Ok(Self { socket, next: 1, buffer: vec![0; DATAGRAM].into() })
    }

    fn links(&mut self) -> Result<BTreeSet<Link>, Errno> {
        let heard = self.look(Request::Links)?.into_iter();
        Ok(heard.filter_map(|heard| if let Heard::Link(link) = heard { Some(link) } else { None }).collect())
    }

    /// None where there is no room for any.
    fn filters(&mut self, link: u32, direction: Direction) -> Result<Vec<Filter>, Errno> {
        let heard = match self.look(Request::Filters(link, direction)) {
            Err(Errno::INVAL | Errno::NOENT | Errno::OPNOTSUPP) => Vec::new(), // Or no kernel for any.
            heard => heard?,
        };
        let heard = heard.into_iter();
        Ok(heard.filter_map(|heard| if let Heard::Filter(filter) = heard { Some(filter) } else { None }).collect())
    }

    fn change(&mut self, request: Request<'_>) -> Result<(), Errno> {
        self.ask(request).map(drop)
    }

    fn remove_room(&mut self, link: u32) -> Result<(), Errno> {
        match self.change(Request::RemoveRoom(link)) {
            Err(Errno::NOENT | Errno::INVAL) => Ok(()), // Somebody else was faster.
            removed => removed,
        }
    }

    fn look(&mut self, request: Request<'_>) -> Result<Vec<Heard>, Errno> {
        let mut looks = (0..LOOKS).map(|_| self.ask(request));
        looks.find(|heard| *heard != Err(Errno::INTR)).unwrap_or(Err(Errno::AGAIN))
    }

    /// Sends something and hears all that the kernel says to it. `INTR` where something changed while it was told.
    fn ask(&mut self, request: Request<'_>) -> Result<Vec<Heard>, Errno> {
        let number = self.next;
        self.next = number.wrapping_add(1);
        self.socket.send(&write(request, number), 0).map_err(errno)?;
        let (mut told, mut outcome, mut is_interrupted) = (Vec::new(), None, false);
        loop {
            let length = match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(errno(error)),
            };
            for heard in read(&self.buffer[..length.min(DATAGRAM)]) {
                match heard {
                    Heard::Answer(its, said) | Heard::End(its, said) if its == number => outcome = Some(said),
                    Heard::Interrupted(its) if its == number => is_interrupted = true,
                    Heard::Answer(..) | Heard::End(..) | Heard::Interrupted(_) => {}
                    other => told.push(other),
                }
            }
        }
        match outcome {
            _ if is_interrupted => Err(Errno::INTR),
            Some(said) => said.map(|()| told),
            None => Err(Errno::IO),
        }
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENTS: RangeInclusive<u16> = 32_768..=60_999;

    fn addresses() -> BTreeSet<IpAddr> {
        [IpAddr::from([10, 96, 0, 10]), [0xfd96, 0, 0, 0, 0, 0, 0, 0x10].into()].into()
    }

    fn listeners() -> BTreeSet<Key> {
        [
            (Protocol::Tcp, 22, Family::V4),
            (Protocol::Tcp, 40_000, Family::V6),
            (Protocol::Udp, 111, Family::V4),
            (Protocol::Udp, 40_000, Family::V4),
        ]
        .into()
    }

    const LINKS: [Link; 2] = [Link { index: 1, is_ethernet: true }, Link { index: 2, is_ethernet: false }];

    fn wanted(addresses: &BTreeSet<IpAddr>, ports: &BTreeMap<Family, Ports>) -> Wanted {
        Wanted::new(&LINKS.into(), addresses, ports, &CLIENTS, OURS | 107).expect("they are few")
    }

    fn filters() -> Programs {
        numbered(wanted(&addresses(), &ports(&listeners(), &CLIENTS)).of(LINKS[0]), &BTreeSet::new(), false)
    }

    #[test]
    fn given_listeners_when_their_ports_are_told_then_those_of_udp_clients_are_none() {
        let ports = ports(&listeners(), &CLIENTS);

        assert_eq!(ports[&Family::V4], Ports { tcp: vec![22], udp: vec![111] });
        assert_eq!(ports[&Family::V6], Ports { tcp: vec![40_000], udp: vec![] });
    }

    #[test]
    fn given_both_families_when_filters_are_wanted_then_each_has_numbers_of_its_own_that_nobody_has() {
        let wanted_now = wanted(&addresses(), &ports(&listeners(), &CLIENTS));
        let numbers = |taken: &[u16]| {
            let taken = taken.iter().copied().collect();
            numbered(wanted_now.of(LINKS[0]), &taken, false).into_keys().collect::<Vec<_>>()
        };

        assert_eq!(numbers(&[]), [FIRST, FIRST + 1]);
        assert_eq!(numbers(&[1, FIRST, FIRST + 2]), [FIRST + 1, FIRST + 4]);
        assert!(wanted(&addresses(), &BTreeMap::new()).is_empty());
        assert!(wanted(&BTreeSet::new(), &ports(&listeners(), &CLIENTS)).is_empty());
    }

    #[test]
    fn given_interfaces_when_filters_are_wanted_then_those_without_ethernet_have_others() {
        let wanted = wanted(&addresses(), &ports(&listeners(), &CLIENTS));

        let [with, without] = LINKS.map(|link| wanted.of(link));
        assert_eq!((with.len(), without.len()), (2, 2));
        assert!(with.iter().zip(without).all(|(one, other)| one.0 == other.0 && one.1 != other.1));
        let of_one = Wanted::new(&[LINKS[1]].into(), &addresses(), &ports(&listeners(), &CLIENTS), &CLIENTS, OURS);
        assert!(of_one.expect("they are few").of(LINKS[0]).is_empty(), "nobody needs them");
    }

    #[test]
    fn given_filters_that_are_there_when_compared_then_only_what_differs_is_changed_and_what_is_missing_first() {
        let wanted = filters();
        let mut found = wanted.clone();
        let surplus = FIRST + 2;
        let (changed, program) = wanted.first_key_value().map(|(number, program)| (*number, program)).expect("two");
        found.insert(changed, vec![]);
        found.insert(surplus, vec![]);

        assert_eq!(differences(&wanted, &wanted).count(), 0);
        let differences: Vec<_> = differences(&found, &wanted).collect();
        assert_eq!(differences, [(changed, Some(program)), (surplus, None)]);
    }

    #[test]
    fn given_room_that_we_made_when_filters_are_marked_then_that_is_known_again() {
        let wanted = wanted(&addresses(), &ports(&listeners(), &CLIENTS));
        let ours = numbered(wanted.of(LINKS[0]), &BTreeSet::new(), true);

        assert!(is_our_room(&ours) && !is_our_room(&filters()) && !is_our_room(&Programs::new()));
        assert_eq!(guard_program::mark(&ours.into_values().next().expect("two")), Some(OURS | OUR_ROOM | 107));
    }

    #[test]
    fn given_this_machine_when_looked_at_then_loopback_is_an_interface_and_nothing_is_ours() {
        let mut filters = match GuardFilters::open(254) {
            Ok(filters) => filters,
            Err(error) => return eprintln!("skipped, no rtnetlink here: {error}"),
        };

        assert!(filters.socket.links().expect("they are told").contains(&LINKS[0]));
        assert_eq!(filters.remove(), Ok(false));
    }
}
