//! Datagrams in batches, and the options of UDP sockets: the system calls of the UDP data path.
//!
//! One of the files where `unsafe` is allowed. Who gets which datagram is decided in `flow`, which ones make a message
//! together in `train`, when to call in `shard`.

#![allow(unsafe_code)]

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::ops::{Add, AddAssign, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;

use libc::{c_int, c_uint, mmsghdr};
use rustix::net::SendFlags;
use socket2::{Domain, SockRef, Socket, Type};
use tracing::info;

use crate::local_ports::may_be_chosen_for_datagrams;
use crate::name::Family;
use crate::serve::socket::{allow_foreign_source, bind_here};
use crate::serve::train::{Joining, Load, Train};

/// Slots in one batch. Larger batches gained nothing when measured.
pub const BATCH: usize = 64;

/// The largest datagram that IP can carry is smaller, as is the longest train: nothing is ever cut off.
const PAYLOAD_BYTES: usize = 65_536;

/// One cache line more than a payload: slots at the same offset of a page each would share few cache sets.
const SLOT_BYTES: usize = PAYLOAD_BYTES + 64;

/// Room for a listener's bursts while its shard is busy elsewhere. The kernel caps it at `net.core.rmem_max`.
pub(crate) const LISTENER_BUFFER_BYTES: usize = 4 << 20;

/// Room for the bursts of one backend to one client.
const UPSTREAM_BUFFER_BYTES: usize = 1 << 20;

/// Opens the socket of a listener: non-blocking, bound to exactly this address and to nothing shared.
///
/// Neither SO_REUSEADDR nor SO_REUSEPORT: with them another process could take the address over.
pub fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    Ok(listening(bound(address)?))
}

/// All other options than its room wait for the first datagram ([`equip`]).
fn listening(socket: Socket) -> UdpSocket {
    make_room(&socket);
    socket.into()
}

/// Gives a listener's socket room for what comes before anybody reads. Best effort: one with less is one, too.
fn make_room(socket: &Socket) {
    let _ = socket.set_recv_buffer_size(LISTENER_BUFFER_BYTES);
}

/// Gives a listener's socket that was opened by somebody else what those have that are opened here, and what can be given later.
pub(super) fn settle_passed(socket: &UdpSocket) -> io::Result<()> {
    let options = SockRef::from(socket);
    make_room(&options);
    options.set_reuse_address(false)
}

/// Gives a listener's socket what it needs once datagrams come: to be called before the first one is received, as
/// thousands of listeners never get any, and each option is a system call more at the start. What waits already is
/// told with its ECN bits and with what was dropped before it all the same.
///
/// `trains`: datagrams of equal length from one sender are to be handed over as one, where the kernel can.
///
/// Best effort: a socket without is better than none.
pub fn equip(socket: &UdpSocket, address: SocketAddr, trains: bool) {
    let options = SockRef::from(socket);
    let _ = options.set_send_buffer_size(LISTENER_BUFFER_BYTES);
    let _ = report_overflow(&options);
    let _ = report_ecn(&options, address);
    if trains {
        let _ = receive_trains(socket);
    }
}

/// Holds an address while nothing serves there: senders get *port unreachable*, and nobody else can bind it.
///
/// The socket is connected to itself, so that no datagram of anybody else is for it. To serve again, drop it and
/// call [`bind_udp`]: a fresh socket, as one that was connected once spreads badly in a SO_REUSEPORT group.
pub fn hold_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = bound(address)?;
    socket.connect(&address.into())?;
    Ok(socket.into())
}

/// Opens the socket of one flow. Connected: only its backend's datagrams arrive, and *port unreachable* is told.
///
/// Never SO_REUSEADDR or SO_REUSEPORT here: two flows with the same source port would get each other's answers.
pub fn connect_udp(backend: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(backend), Type::DGRAM.nonblocking().cloexec(), None)?;
    let _ = socket.set_recv_buffer_size(UPSTREAM_BUFFER_BYTES);
    report_ecn(&socket, backend)?;
    socket.connect(&backend.into())?;
    Ok(socket.into())
}

/// As [`connect_udp`], from a client's own address: from its port too, if the kernel might have chosen that one for us, and
/// no other flow of the client has it. Needs CAP_NET_ADMIN.
///
/// Here, too, two sockets never share a port of one address. A port that somebody here may want to serve is not taken: nobody
/// can bind it at all addresses then, and clients' ports are theirs to choose.
pub fn connect_udp_as(client: SocketAddr, backend: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(backend), Type::DGRAM.nonblocking().cloexec(), None)?;
    let _ = socket.set_recv_buffer_size(UPSTREAM_BUFFER_BYTES);
    report_ecn(&socket, backend)?;
    allow_foreign_source(&socket, Family::of(backend.ip()))?;
    let bind = |port| socket.bind(&SocketAddr::new(client.ip(), port).into());
    let port = if may_be_chosen_for_datagrams(client.port()) { client.port() } else { 0 };
    bind(port).or_else(|_| bind(0))?;
    socket.connect(&backend.into())?;
    let socket = UdpSocket::from(socket);
    forget_received(&socket);
    Ok(socket)
}

/// Forgets what came before the socket was connected, be it from whom it may: the backend was asked nothing yet.
fn forget_received(socket: &UdpSocket) {
    const MOST: usize = 1_000; // What comes faster than this is of the backend's own address.
    let _ = (0..MOST).take_while(|_| socket.recv(&mut [0]).is_ok()).count();
}

/// Opens the sockets of a listener that several shards serve: the kernel spreads senders over them evenly, and each
/// stays with its socket while all of them are open.
///
/// The first one is bound like [`bind_udp`]'s, so that an address that somebody else holds is an error; then
/// SO_REUSEPORT lets the others in, and whoever else runs as the same user.
pub fn bind_udp_group(address: SocketAddr, count: usize) -> io::Result<Vec<UdpSocket>> {
    let first = bind_udp(address)?;
    if count > 1 {
        SockRef::from(&first).set_reuse_port(true)?;
    }
    let others = (1..count).map(|_| {
        let socket = unbound(address)?;
        socket.set_reuse_port(true)?;
        bind_here(&socket, address)?;
        Ok(listening(socket))
    });
    std::iter::once(Ok(first)).chain(others).collect()
}

fn bound(address: SocketAddr) -> io::Result<Socket> {
    let socket = unbound(address)?;
    bind_here(&socket, address)?;
    Ok(socket)
}

fn unbound(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking().cloexec(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn report_ecn(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv4() { socket.set_recv_tos_v4(true) } else { socket.set_recv_tclass_v6(true) }
}

/// Asks the kernel to tell with datagrams how many it had to drop before them.
///
/// What the queue of a device drops while sending is not told here: it is in the host's `UdpSndbufErrors` and in the
/// queue's own count. IP_RECVERR would have sending fail with ENOBUFS then. But it also has one client's closed port
/// fail what is sent to the next client, keeps epoll awake until its own queue of errors is read, and tells flows of
/// routers' passing troubles as if they were final.
fn report_overflow(socket: &Socket) -> io::Result<()> {
    set_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)
}

/// Asks the kernel to hand over datagrams of equal length from one sender as one train, where it can.
pub fn receive_trains(socket: &UdpSocket) -> io::Result<()> {
    set_int(socket.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Tries whether the kernel takes one message apart into datagrams, for a socket that is good for nothing else then.
pub(crate) fn try_to_send_trains(socket: &UdpSocket) -> io::Result<()> {
    set_int(socket.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 1_000)
}

fn set_int(socket: BorrowedFd<'_>, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the option's value is one int, which lives until the call returns; the kernel only reads it.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            ptr::from_ref(&value).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Where the datagrams of a batch go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// To whom the socket is connected. All of them: they are of one flow.
    Connected,
    /// Each to its own peer.
    Peers,
}

/// A place in a list of slots: before the first byte that is not yet dealt with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The position in the list.
    pub position: usize,
    /// Bytes of that slot which are behind this place: whole datagrams.
    pub offset: usize,
}

/// The kernel did not take the first message.
#[derive(Debug)]
pub struct Unsent {
    /// Why.
    pub error: io::Error,
    /// The place behind that message.
    pub end: Place,
    load: Load,
}

/// Up to [`BATCH`] slots, received from some sockets and sent on over others, in place. A slot holds one datagram of
/// any size, or a train of equal ones that the kernel has joined.
///
/// 4 MiB of address space, allocated once; pages that no datagram has reached cost nothing.
#[derive(Debug)]
pub struct Batch {
    payloads: Box<[u8]>,
    slots: Box<[Slot; BATCH]>,
    filled: usize,
    overflow: Option<u32>,
    joining: Joining,
}

/// What belongs to one payload.
#[derive(Clone, Copy, Debug)]
struct Slot {
    train: Train,
    peer: Name,
    /// The two lowest bits of TOS or traffic class.
    ecn: u8,
    control: Control,
}

impl Slot {
    const EMPTY: Self =
        Self { train: Train::single(0), peer: Name([0; Name::BYTES]), ecn: 0, control: Control([0; CONTROL_BYTES]) };

    /// One datagram that needs no control message.
    fn is_plain(&self) -> bool {
        self.ecn == 0 && self.train.datagrams() == 1
    }
}

/// Room for the control messages that come with a datagram: ECN, overflow, the length of segments, and one more.
const CONTROL_BYTES: usize = 128;

#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
struct Control([u8; CONTROL_BYTES]);

impl Default for Batch {
    fn default() -> Self {
        Self {
            payloads: vec![0; BATCH * SLOT_BYTES].into_boxed_slice(),
            slots: Box::new([Slot::EMPTY; BATCH]),
            filled: 0,
            overflow: None,
            joining: Joining::default(),
        }
    }
}

impl Batch {
    /// A batch that never joins datagrams when it sends.
    pub fn without_joining() -> Self {
        Self { joining: Joining::NEVER, ..Self::default() }
    }

    /// Forgets all datagrams.
    pub fn clear(&mut self) {
        self.filled = 0;
    }

    /// How many slots are filled.
    pub fn count(&self) -> usize {
        self.filled
    }

    /// How many more slots can be filled.
    pub fn room(&self) -> usize {
        BATCH - self.filled
    }

    /// The bytes of a slot.
    pub fn payload(&self, slot: usize) -> &[u8] {
        &self.payloads[slot * SLOT_BYTES..][..self.slots[slot].train.length]
    }

    /// How many datagrams a slot holds: at least one.
    pub fn datagrams(&self, slot: usize) -> usize {
        self.slots[slot].train.datagrams()
    }

    /// Who sent what is in the slot, or whom it is addressed to.
    pub fn peer(&self, slot: usize) -> Option<SocketAddr> {
        self.slots[slot].peer.decode()
    }

    /// Addresses what is in the slot.
    pub fn set_peer(&mut self, slot: usize, peer: SocketAddr) {
        self.slots[slot].peer = Name::encode(peer);
    }

    /// How many times the kernel dropped what came to the socket of the last `receive` since it was opened, modulo
    /// 2³², as its queue was full; `None` where it does not say. A train that is dropped as a whole counts once.
    pub fn overflow(&self) -> Option<u32> {
        self.overflow
    }

    /// Fills up to `most` slots behind those that are: fewer where no more waits. Does not block.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        let most = most.min(self.room());
        let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; BATCH];
        let mut headers = [const { MaybeUninit::<mmsghdr>::uninit() }; BATCH];
        let payloads = self.payloads.chunks_exact_mut(SLOT_BYTES).zip(self.slots.iter_mut()).skip(self.filled);
        for (((payload, slot), vector), header) in payloads.zip(&mut vectors).zip(&mut headers).take(most) {
            let vector = vector.write(libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: PAYLOAD_BYTES });
            let header = &mut header.write(empty_header()).msg_hdr;
            header.msg_name = slot.peer.0.as_mut_ptr().cast();
            header.msg_namelen = Name::BYTES as libc::socklen_t;
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            header.msg_control = slot.control.0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL_BYTES as _;
        }
        // SAFETY: the first `most` headers are written, and what they point to lives in `self` and on this stack
        // until the call returns; each points to buffers of its own with their true sizes.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr().cast(),
                most as c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        self.overflow = None;
        for (slot, header) in self.slots[self.filled..].iter_mut().zip(&headers).take(received) {
            // SAFETY: the first `received` headers are among the written ones.
            let header = unsafe { header.assume_init_ref() };
            let length = header.msg_len as usize;
            slot.train = Train::single(length);
            slot.ecn = 0;
            read_control(&header.msg_hdr, |level, kind, value| match (level, kind, value) {
                (libc::IPPROTO_IP, libc::IP_TOS, [tos, ..]) => slot.ecn = tos & 3,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &[a, b, c, d]) => {
                    slot.ecn = u32::from_ne_bytes([a, b, c, d]) as u8 & 3;
                }
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &[a, b, c, d]) => {
                    self.overflow = Some(u32::from_ne_bytes([a, b, c, d]));
                }
                (libc::SOL_UDP, libc::UDP_GRO, &[a, b, c, d]) => {
                    slot.train = Train::joined(length, u32::from_ne_bytes([a, b, c, d]) as usize);
                }
                _ => {}
            });
        }
        self.filled += received;
        Ok(received)
    }

    /// Sends what is in these slots from a place on, in this order, with their ECN bits: as many messages as one call
    /// can take, each of one datagram or of several for one peer. Does not block.
    ///
    /// Returns the place behind the last datagram that left. What is behind it was not tried, or failed: sending it
    /// again says why, unless it was an ICMP error about an earlier datagram. The kernel tells that once, and here it
    /// told nobody; the next datagram to a dead port brings another one.
    pub fn send(&self, socket: BorrowedFd<'_>, slots: &[u8], from: Place, to: To) -> Result<Place, Unsent> {
        match (to, slots) {
            (To::Connected, &[slot]) if self.slots[usize::from(slot)].is_plain() => {
                self.send_plain(socket, slots, from)
            }
            _ => self.send_messages(socket, slots, from, to),
        }
    }

    /// One datagram to the peer of a connected socket: the call that costs the kernel least.
    fn send_plain(&self, socket: BorrowedFd<'_>, slots: &[u8], from: Place) -> Result<Place, Unsent> {
        let end = Place { position: from.position + 1, offset: 0 };
        let payload = self.payload(usize::from(slots[from.position]));
        match rustix::net::send(socket, payload, SendFlags::DONTWAIT) {
            Ok(_) => Ok(end),
            Err(errno) => Err(Unsent { error: errno.into(), end, load: self.load(slots, from, To::Connected, 1).0 }),
        }
    }

    fn send_messages(&self, socket: BorrowedFd<'_>, slots: &[u8], from: Place, to: To) -> Result<Place, Unsent> {
        let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; BATCH];
        let mut headers = [const { MaybeUninit::<mmsghdr>::uninit() }; BATCH];
        let mut controls = [const { MaybeUninit::<Outline>::uninit() }; BATCH];
        let mut ends = [Place::default(); BATCH];
        let (mut at, mut count, mut free) = (from, 0, vectors.as_mut_slice());
        for ((header, control), end) in headers.iter_mut().zip(&mut controls).zip(&mut ends) {
            if at.position >= slots.len() || free.is_empty() {
                break;
            }
            let (load, next) = self.load(slots, at, to, free.len());
            let (vectors, rest) = mem::take(&mut free).split_at_mut((next.position - at.position).max(1));
            for ((position, part), vector) in self.parts(slots, at, next).zip(&mut *vectors) {
                let bytes = &self.payload(usize::from(slots[position]))[part];
                vector.write(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
            }
            let first = &self.slots[usize::from(slots[at.position])];
            let header = &mut header.write(empty_header()).msg_hdr;
            if to == To::Peers {
                header.msg_name = first.peer.0.as_ptr().cast_mut().cast();
                header.msg_namelen = first.peer.length();
            }
            header.msg_iovlen = vectors.len() as _;
            header.msg_iov = vectors.as_mut_ptr().cast();
            if first.ecn != 0 || load.segment().is_some() {
                let outline = control.write(Outline::new(first, load));
                header.msg_control = outline.bytes.as_mut_ptr().cast();
                header.msg_controllen = outline.filled as _;
            }
            (at, *end, free) = (next, next, rest);
            count += 1;
        }
        // SAFETY: the first `count` headers are written, and what they point to lives in `self` and on this stack
        // until the call returns. The kernel writes the headers' lengths, and only reads what they point to.
        let sent =
            unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr().cast(), count, libc::MSG_DONTWAIT as _) };
        match usize::try_from(sent) {
            Ok(0) => Ok(from),
            Ok(sent) => Ok(ends[sent - 1]),
            Err(_) => {
                let error = io::Error::last_os_error();
                Err(Unsent { error, end: ends[0], load: self.load(slots, from, to, BATCH).0 })
            }
        }
    }

    /// After a message was not sent: true where it is to be sent again, its datagrams each on their own. From then
    /// on datagrams like these, or any, are not joined.
    pub fn take_apart(&mut self, unsent: &Unsent) -> bool {
        let was_on = self.joining.is_on();
        let learnt = self.joining.learn(&unsent.error, unsent.load);
        if was_on && !self.joining.is_on() {
            info!(error = %unsent.error, "the kernel does not split datagrams on some way: all are sent one by one");
        }
        learnt
    }

    /// Datagrams and payload bytes between two places.
    pub fn measure(&self, slots: &[u8], from: Place, end: Place) -> Tally {
        let mut sum = Tally::default();
        self.measure_each(slots, from, end, |_, tally| sum += tally);
        sum
    }

    /// Datagrams and payload bytes between two places, for each position in the list.
    pub fn measure_each(&self, slots: &[u8], from: Place, end: Place, mut take: impl FnMut(usize, Tally)) {
        for (position, part) in self.parts(slots, from, end) {
            let train = Train { length: part.len(), ..self.slots[usize::from(slots[position])].train };
            take(position, Tally { datagrams: train.datagrams() as u64, bytes: part.len() as u64 });
        }
    }

    /// What the message that begins at a place holds, and where it ends. It has `most` parts at most.
    fn load(&self, slots: &[u8], from: Place, to: To, most: usize) -> (Load, Place) {
        let slot_at = |position: usize| &self.slots[usize::from(slots[position])];
        let first = slot_at(from.position);
        let mut load = self.joining.load(first.train, from.offset);
        let offset = from.offset + load.bytes();
        if offset < first.train.length {
            return (load, Place { offset, ..from });
        }
        let mut end = Place { position: from.position + 1, offset: 0 };
        while end.position < slots.len() && end.position - from.position < most {
            let next = slot_at(end.position);
            let is_for_same = to == To::Connected || next.peer.is_same(&first.peer);
            if next.ecn != first.ecn || !is_for_same || !load.join(next.train, self.joining) {
                break;
            }
            end.position += 1;
        }
        (load, end)
    }

    /// The positions between two places, and which bytes of each.
    fn parts(&self, slots: &[u8], from: Place, end: Place) -> impl Iterator<Item = (usize, Range<usize>)> {
        let last = end.position + usize::from(end.offset > 0);
        (from.position..last).map(move |position| {
            let begin = if position == from.position { from.offset } else { 0 };
            let length = self.slots[usize::from(slots[position])].train.length;
            (position, begin..if position == end.position { end.offset } else { length })
        })
    }
}

/// How much was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Datagrams, however many messages they made.
    pub datagrams: u64,
    /// Their payload.
    pub bytes: u64,
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { datagrams: self.datagrams + other.datagrams, bytes: self.bytes + other.bytes }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// The control messages that leave with a message: its ECN bits (DSCP 0) and the length of its segments.
#[repr(C, align(8))]
struct Outline {
    bytes: [u8; Outline::BYTES],
    filled: usize,
}

impl Outline {
    const BYTES: usize = control_space(size_of::<c_int>()) + control_space(size_of::<u16>());

    fn new(slot: &Slot, load: Load) -> Self {
        let mut outline = Self { bytes: [0; Self::BYTES], filled: 0 };
        if slot.ecn != 0 {
            let (level, kind) = match slot.peer.family() {
                libc::AF_INET => (libc::IPPROTO_IP, libc::IP_TOS),
                _ => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            outline.add(level, kind, c_int::from(slot.ecn).to_ne_bytes());
        }
        if let Some(segment) = load.segment() {
            outline.add(libc::SOL_UDP, libc::UDP_SEGMENT, segment.to_ne_bytes());
        }
        outline
    }

    fn add<const N: usize>(&mut self, level: c_int, kind: c_int, value: [u8; N]) {
        let mut header = empty_control(); // some C libraries have private padding in it
        header.cmsg_len = control_length(N) as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        let room = &mut self.bytes[self.filled..][..control_space(N)];
        // SAFETY: the room is longer than a header, and aligned for one: it begins behind whole control messages.
        unsafe { room.as_mut_ptr().cast::<libc::cmsghdr>().write(header) };
        room[control_length(0)..][..N].copy_from_slice(&value);
        self.filled += control_space(N);
    }
}

/// Calls `take` with level, type and value of each control message.
fn read_control(header: &libc::msghdr, mut take: impl FnMut(c_int, c_int, &[u8])) {
    // SAFETY: the kernel has set the length of what it wrote to the control buffer, which is alive.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: a pointer from CMSG_FIRSTHDR or CMSG_NXTHDR is null or points to a whole header in the buffer.
    while let Some(message) = unsafe { next.as_ref() } {
        #[allow(clippy::unnecessary_cast)] // not a usize in every C library
        let length = (message.cmsg_len as usize).saturating_sub(control_length(0));
        // SAFETY: the kernel wrote `length` bytes behind the header.
        let value = unsafe { std::slice::from_raw_parts(libc::CMSG_DATA(message), length) };
        take(message.cmsg_level, message.cmsg_type, value);
        // SAFETY: header and message are those of the buffer that is walked through.
        next = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
}

fn empty_header() -> mmsghdr {
    // SAFETY: null pointers and zero lengths are a valid, empty message header.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn empty_control() -> libc::cmsghdr {
    // SAFETY: three numbers, for which zero is a value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// Bytes of a control message with a value of `bytes`, without padding behind it.
const fn control_length(bytes: usize) -> usize {
    // SAFETY: arithmetic only.
    (unsafe { libc::CMSG_LEN(bytes as c_uint) }) as usize
}

/// Bytes that a control message with a value of `bytes` takes up.
const fn control_space(bytes: usize) -> usize {
    // SAFETY: arithmetic only.
    (unsafe { libc::CMSG_SPACE(bytes as c_uint) }) as usize
}

/// A socket address as the kernel reads and writes it (`sockaddr_in`, `sockaddr_in6`).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug)]
struct Name([u8; Name::BYTES]);

impl Name {
    const V4_BYTES: usize = size_of::<libc::sockaddr_in>();
    const BYTES: usize = size_of::<libc::sockaddr_in6>();

    fn encode(address: SocketAddr) -> Self {
        let mut name = [0; Self::BYTES];
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        name[0..2].copy_from_slice(&(family as libc::sa_family_t).to_ne_bytes());
        name[2..4].copy_from_slice(&address.port().to_be_bytes());
        match address {
            SocketAddr::V4(v4) => name[4..8].copy_from_slice(&v4.ip().octets()),
            SocketAddr::V6(v6) => {
                name[8..24].copy_from_slice(&v6.ip().octets());
                name[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
            }
        }
        Self(name)
    }

    /// The flow label is left out: it names no peer.
    fn decode(&self) -> Option<SocketAddr> {
        let port = u16::from_be_bytes([self.0[2], self.0[3]]);
        match self.family() {
            libc::AF_INET => {
                let ip: [u8; 4] = self.0[4..8].try_into().ok()?;
                Some(SocketAddrV4::new(Ipv4Addr::from(ip), port).into())
            }
            libc::AF_INET6 => {
                let ip: [u8; 16] = self.0[8..24].try_into().ok()?;
                let scope_id = u32::from_ne_bytes(self.0[24..28].try_into().ok()?);
                Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope_id).into())
            }
            _ => None,
        }
    }

    /// True for the same peer, whatever was in the buffer before.
    fn is_same(&self, other: &Self) -> bool {
        let length = self.length() as usize;
        self.0[..length] == other.0[..length]
    }

    fn family(&self) -> c_int {
        c_int::from(libc::sa_family_t::from_ne_bytes([self.0[0], self.0[1]]))
    }

    fn length(&self) -> libc::socklen_t {
        (if self.family() == libc::AF_INET { Self::V4_BYTES } else { Self::BYTES }) as libc::socklen_t
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;

    fn plain(address: &str) -> UdpSocket {
        let socket = UdpSocket::bind(address).expect("a loopback address");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a deadline");
        socket
    }

    fn wait_readable(socket: &UdpSocket) {
        let mut polled = [rustix::event::PollFd::new(socket, rustix::event::PollFlags::IN)];
        let deadline = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut polled, Some(&deadline)).expect("poll"), 1, "nothing came");
    }

    fn address_of(socket: &UdpSocket) -> SocketAddr {
        socket.local_addr().expect("a bound socket")
    }

    #[test]
    fn given_addresses_of_both_families_when_encoded_and_decoded_then_they_are_the_same() {
        for text in ["10.1.2.3:53", "[fd00::1]:65535", "[fe80::1%7]:9"] {
            let address: SocketAddr = text.parse().expect("an address");

            assert_eq!(Name::encode(address).decode(), Some(address));
        }
        assert_eq!(Name([0; Name::BYTES]).decode(), None);
    }

    #[test]
    fn given_datagrams_of_many_sizes_when_relayed_in_a_batch_then_each_is_whole_and_in_order() {
        let service = bind_udp("127.18.0.1:5301".parse().expect("an address")).expect("a free address");
        let (client, backend) = (plain("127.0.0.1:0"), plain("127.0.0.1:0"));
        let upstream = connect_udp(address_of(&backend)).expect("a way to loopback");
        let sizes = [0, 1, 1472, 65_507];
        for size in sizes {
            client.send_to(&vec![size as u8; size], "127.18.0.1:5301").expect("sent");
        }

        let mut batch = Batch::default();
        while batch.count() < sizes.len() {
            wait_readable(&service);
            batch.receive(service.as_fd(), BATCH).expect("received");
        }
        let sent = batch.send(upstream.as_fd(), &[0, 1, 2, 3], Place::default(), To::Connected).expect("sent");

        assert_eq!(sent, Place { position: sizes.len(), offset: 0 });
        assert_eq!(batch.peer(3), Some(address_of(&client)));
        let mut buffer = vec![0; 70_000];
        for size in sizes {
            let length = backend.recv(&mut buffer).expect("a datagram");
            assert_eq!(&buffer[..length], vec![size as u8; size]);
        }
    }

    #[test]
    fn given_a_batch_for_two_peers_when_sent_then_each_gets_its_own_from_the_bound_address() {
        for service in ["127.18.0.2:5301", "[::1]:15301"] {
            let address: SocketAddr = service.parse().expect("an address");
            let service = bind_udp(address).expect("a free address");
            let any = SocketAddr::new(address.ip(), 0).to_string();
            let clients = [plain(&any), plain(&any)];
            let mut batch = Batch::default();
            for (slot, client) in clients.iter().enumerate() {
                client.send_to(&[slot as u8], address).expect("sent");
                wait_readable(&service);
                batch.receive(service.as_fd(), 1).expect("received");
            }

            batch.set_peer(0, address_of(&clients[1]));
            batch.set_peer(1, address_of(&clients[0]));
            let sent = batch.send(service.as_fd(), &[0, 1], Place::default(), To::Peers).expect("sent");
            assert_eq!(sent.position, 2);

            let mut byte = [0];
            assert_eq!(clients[0].recv_from(&mut byte).expect("a reply"), (1, address));
            assert_eq!(byte, [1]);
            assert_eq!(clients[1].recv_from(&mut byte).expect("a reply"), (1, address));
            assert_eq!(byte, [0]);
        }
    }

    #[test]
    fn t198_given_ecn_and_dscp_bits_when_relayed_then_only_the_ecn_bits_arrive() {
        for service in ["127.18.0.3:5301", "[::1]:15302"] {
            let address: SocketAddr = service.parse().expect("an address");
            let service = bind_udp(address).expect("a free address");
            let any = SocketAddr::new(address.ip(), 0);
            let (client, backend) = (plain(&any.to_string()), bind_udp(any).expect("a free port"));
            let marked = 0b1011_1010; // a DSCP of 46 and ECT(0)
            let options = socket2::SockRef::from(&client);
            if any.is_ipv4() { options.set_tos_v4(marked) } else { options.set_tclass_v6(marked) }.expect("marked");
            equip(&backend, any, false);
            let upstream = connect_udp(address_of(&backend)).expect("a way to loopback");
            client.send_to(b"x", address).expect("sent");
            let (mut batch, mut arrived) = (Batch::default(), Batch::default());

            wait_readable(&service);
            equip(&service, address, true); // Not before the first datagram is there.
            batch.receive(service.as_fd(), BATCH).expect("received");
            batch.send(upstream.as_fd(), &[0], Place::default(), To::Connected).expect("sent");
            wait_readable(&backend);
            let seen = receive_traffic_class(&backend, &mut arrived);

            assert_eq!(batch.slots[0].ecn, 0b10);
            assert_eq!(seen, 0b10, "the whole byte, DSCP and all");
        }
    }

    /// Receives one datagram and reads the whole byte, not only the two bits that a batch keeps.
    fn receive_traffic_class(socket: &UdpSocket, batch: &mut Batch) -> u8 {
        batch.receive(socket.as_fd(), 1).expect("received");
        batch.slots[0].control.0[control_length(0)]
    }

    #[test]
    fn given_a_held_address_when_somebody_sends_then_port_unreachable_is_told_and_nobody_else_can_bind() {
        for address in ["127.18.0.4:5301", "[::1]:15303"] {
            let address: SocketAddr = address.parse().expect("an address");
            let holder = hold_udp(address).expect("a free address");
            let client = plain(&SocketAddr::new(address.ip(), 0).to_string());
            client.connect(address).expect("connected");

            client.send(b"anybody?").expect("sent");

            let mut byte = [0];
            assert_eq!(client.recv(&mut byte).expect_err("no answer").kind(), ErrorKind::ConnectionRefused);
            assert_eq!(bind_udp(address).expect_err("held").kind(), ErrorKind::AddrInUse);
            drop(holder);
            bind_udp(address).expect("free again at once");
        }
    }

    #[test]
    fn given_a_full_queue_when_received_then_the_kernel_says_how_many_were_lost() {
        let service = bind_udp("127.18.0.5:5301".parse().expect("an address")).expect("a free address");
        socket2::SockRef::from(&service).set_recv_buffer_size(4096).expect("a small queue");
        let client = plain("127.0.0.1:0");
        let mut batch = Batch::default();
        for _ in 0..BATCH {
            client.send_to(&[0; 512], "127.18.0.5:5301").expect("sent");
        }

        wait_readable(&service);
        equip(&service, "127.18.0.5:5301".parse().expect("an address"), true);
        let received = batch.receive(service.as_fd(), BATCH).expect("received");
        batch.clear();
        client.send_to(&[0; 512], "127.18.0.5:5301").expect("sent");
        wait_readable(&service);
        batch.receive(service.as_fd(), BATCH).expect("received");

        assert_eq!(batch.overflow(), Some((BATCH - received) as u32));
    }

    /// Fills a batch with single datagrams of these lengths, received by a socket that joins nothing.
    fn filled(lengths: &[usize], service: &UdpSocket) -> Batch {
        let (client, mut batch) = (plain("127.0.0.1:0"), Batch::default());
        for (number, length) in lengths.iter().enumerate() {
            client.send_to(&vec![number as u8; *length], address_of(service)).expect("sent");
        }
        while batch.count() < lengths.len() {
            wait_readable(service);
            batch.receive(service.as_fd(), BATCH).expect("received");
        }
        batch
    }

    #[test]
    fn t199_given_equal_datagrams_when_sent_then_one_message_takes_them_to_who_joins_and_to_who_does_not() {
        let service = bind_udp("127.18.0.6:5301".parse().expect("an address")).expect("a free address");
        let batch = filled(&[100, 100, 100, 40, 40], &service);
        let (joins, does_not) = (bind_udp("127.0.0.1:0".parse().expect("an address")), plain("127.0.0.1:0"));
        let joins = joins.expect("a free port");
        receive_trains(&joins).expect("a kernel with UDP_GRO");
        let slots = [0, 1, 2, 3, 4];

        for receiver in [&joins, &does_not] {
            let upstream = connect_udp(address_of(receiver)).expect("a way to loopback");
            let end = batch.send(upstream.as_fd(), &slots, Place::default(), To::Connected).expect("sent");
            assert_eq!(end.position, 5);
        }

        let mut trains = Batch::default();
        wait_readable(&joins);
        trains.receive(joins.as_fd(), BATCH).expect("received");
        let sizes: Vec<_> =
            (0..trains.count()).map(|slot| (trains.datagrams(slot), trains.payload(slot).len())).collect();
        assert_eq!(sizes, [(4, 340), (1, 40)]);
        let mut buffer = [0; 200];
        for (number, length) in [100, 100, 100, 40, 40].into_iter().enumerate() {
            assert_eq!(does_not.recv(&mut buffer).expect("a datagram"), length);
            assert!(buffer[..length].iter().all(|byte| usize::from(*byte) == number));
        }
    }

    #[test]
    fn t199_given_a_train_when_sent_without_joining_then_its_datagrams_leave_one_by_one() {
        let service = bind_udp("127.18.0.7:5301".parse().expect("an address")).expect("a free address");
        let batch = filled(&[500; 60], &service);
        let middle = bind_udp("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        receive_trains(&middle).expect("a kernel with UDP_GRO");
        let slots: Vec<u8> = (0..60).collect();
        let upstream = connect_udp(address_of(&middle)).expect("a way to loopback");
        batch.send(upstream.as_fd(), &slots, Place::default(), To::Connected).expect("sent");
        let mut train = Batch::without_joining();
        wait_readable(&middle);
        train.receive(middle.as_fd(), 1).expect("received");
        let receiver = plain("127.0.0.1:0");
        let upstream = connect_udp(address_of(&receiver)).expect("a way to loopback");

        let end = train.send(upstream.as_fd(), &[0], Place::default(), To::Connected).expect("sent");

        assert_eq!(train.measure(&[0], Place::default(), end), Tally { datagrams: 60, bytes: 30_000 });
        let mut buffer = [0; 600];
        for number in 0..60 {
            assert_eq!(receiver.recv(&mut buffer).expect("a datagram"), 500);
            assert_eq!(buffer[0], number);
        }
    }

    #[test]
    fn t198_given_equal_datagrams_with_other_ecn_bits_when_sent_then_no_message_mixes_them() {
        for service in ["127.18.0.8:5301", "[::1]:15304"] {
            let address: SocketAddr = service.parse().expect("an address");
            let service = bind_udp(address).expect("a free address");
            let any = SocketAddr::new(address.ip(), 0);
            let (client, backend) = (plain(&any.to_string()), bind_udp(any).expect("a free port"));
            equip(&backend, any, true);
            equip(&service, address, false);
            let upstream = connect_udp(address_of(&backend)).expect("a way to loopback");
            for ecn in [2, 2, 3, 3, 3, 0] {
                let options = socket2::SockRef::from(&client);
                if any.is_ipv4() { options.set_tos_v4(ecn) } else { options.set_tclass_v6(ecn) }.expect("marked");
                client.send_to(&[7; 64], address).expect("sent");
            }
            let (mut batch, mut arrived) = (Batch::default(), Batch::default());
            while batch.count() < 6 {
                wait_readable(&service);
                batch.receive(service.as_fd(), BATCH).expect("received");
            }

            batch.send(upstream.as_fd(), &[0, 1, 2, 3, 4, 5], Place::default(), To::Connected).expect("sent");

            wait_readable(&backend);
            arrived.receive(backend.as_fd(), BATCH).expect("received");
            let seen: Vec<_> =
                (0..arrived.count()).map(|slot| (arrived.datagrams(slot), arrived.slots[slot].ecn)).collect();
            assert_eq!(seen, [(2, 2), (3, 3), (1, 0)]);
        }
    }

    #[test]
    fn given_a_group_of_sockets_when_many_clients_send_then_each_socket_gets_its_share_and_nobody_else_can_bind() {
        let address: SocketAddr = "127.18.0.9:5301".parse().expect("an address");
        let group = bind_udp_group(address, 4).expect("a free address");
        let clients: Vec<_> = (0..256).map(|_| plain("127.0.0.1:0")).collect();

        for client in &clients {
            client.send_to(b"x", address).expect("sent");
        }

        let mut batch = Batch::default();
        let shares: Vec<_> = group
            .iter()
            .map(|socket| {
                let mut share = 0;
                while let Ok(received) = batch.receive(socket.as_fd(), BATCH) {
                    share += received;
                    batch.clear();
                }
                share
            })
            .collect();
        assert_eq!(shares.iter().sum::<usize>(), 256);
        assert!(shares.iter().all(|share| (24..=112).contains(share)), "{shares:?}");
        assert_eq!(bind_udp(address).expect_err("held").kind(), ErrorKind::AddrInUse);
        assert_eq!(bind_udp_group(address, 2).expect_err("held").kind(), ErrorKind::AddrInUse);
        assert_eq!(hold_udp(address).expect_err("held").kind(), ErrorKind::AddrInUse);
        drop(group);
        hold_udp(address).expect("free again at once");
    }

    #[test]
    fn f16_given_a_socket_whose_datagrams_cannot_be_split_when_sent_then_they_are_taken_apart_once_and_for_all() {
        let service = bind_udp("127.18.0.10:5301".parse().expect("an address")).expect("a free address");
        let mut batch = filled(&[64, 64, 64], &service);
        let receiver = plain("127.0.0.1:0");
        let upstream = connect_udp(address_of(&receiver)).expect("a way to loopback");
        set_int(upstream.as_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 1).expect("no checksums");

        let unsent = batch.send(upstream.as_fd(), &[0, 1, 2], Place::default(), To::Connected).expect_err("no offload");
        assert_eq!(unsent.end.position, 3);
        assert!(batch.take_apart(&unsent));
        let end = batch.send(upstream.as_fd(), &[0, 1, 2], Place::default(), To::Connected).expect("sent");

        assert_eq!(end.position, 3);
        let mut buffer = [0; 100];
        for number in 0..3 {
            assert_eq!((receiver.recv(&mut buffer).expect("a datagram"), buffer[0]), (64, number));
        }
    }

    #[test]
    fn given_what_came_before_when_it_is_forgotten_then_what_comes_later_is_received() {
        let [socket, other] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").expect("a free port"));
        socket.set_nonblocking(true).expect("an option");
        let to = socket.local_addr().expect("it is bound");
        let send = |byte: u8| other.send_to(&[byte], to).expect("it is there");
        (1..=3).for_each(|byte| assert_eq!(send(byte), 1));

        forget_received(&socket);
        send(4);

        let mut received = [0; 2];
        assert_eq!(socket.recv(&mut received).expect("a datagram"), 1);
        assert_eq!(received[0], 4);
    }
}
