//! Datagrams in batches, and the options of UDP sockets: the system calls of the UDP data path.
//!
//! One of the files where `unsafe` is allowed. Who gets which datagram is decided in `flow`, when to call is `shard`.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{c_int, c_uint, mmsghdr};
use socket2::{Domain, Socket, Type};

use crate::serve::socket::bind_here;

/// Datagrams in one batch. Larger batches gained nothing when measured.
pub const BATCH: usize = 64;

/// The largest datagram that IP can carry is smaller, so nothing is ever cut off.
const PAYLOAD_BYTES: usize = 65_536;

/// One cache line more than a payload: slots at the same offset of a page each would share few cache sets.
const SLOT_BYTES: usize = PAYLOAD_BYTES + 64;

/// Room for a listener's bursts while its shard is busy elsewhere. The kernel caps it at `net.core.rmem_max`.
const LISTENER_BUFFER_BYTES: usize = 4 << 20;

/// Room for the bursts of one backend to one client.
const UPSTREAM_BUFFER_BYTES: usize = 1 << 20;

/// Opens the socket of a listener: non-blocking, bound to exactly this address and to nothing shared.
///
/// Neither SO_REUSEADDR nor SO_REUSEPORT: with them another process could take the address over.
pub fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = bound(address)?;
    // What follows makes it better, but a socket without is better than none.
    let _ = socket.set_recv_buffer_size(LISTENER_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(LISTENER_BUFFER_BYTES);
    let _ = report_overflow(&socket);
    report_ecn(&socket, address)?;
    Ok(socket.into())
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

fn bound(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking().cloexec(), None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    bind_here(&socket, address)?;
    Ok(socket)
}

fn report_ecn(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv4() { socket.set_recv_tos_v4(true) } else { socket.set_recv_tclass_v6(true) }
}

/// Asks the kernel to tell with datagrams how many it had to drop before them.
fn report_overflow(socket: &Socket) -> io::Result<()> {
    let on: c_int = 1;
    // SAFETY: the option's value is one int, which lives until the call returns; the kernel only reads it.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RXQ_OVFL,
            ptr::from_ref(&on).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Where the datagrams of a batch go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// To whom the socket is connected.
    Connected,
    /// Each to its own peer.
    Peers,
}

/// Up to [`BATCH`] datagrams of any size, received from some sockets and sent on over others, in place.
///
/// 4 MiB of address space, allocated once; pages that no datagram has reached cost nothing. The UDP offloads have
/// their place here: GRO adds a segment size to a slot, GSO joins slots of one run in `send`.
#[derive(Debug)]
pub struct Batch {
    payloads: Box<[u8]>,
    slots: Box<[Slot; BATCH]>,
    filled: usize,
    overflow: Option<u32>,
}

/// What belongs to one payload.
#[derive(Clone, Copy, Debug)]
struct Slot {
    length: usize,
    peer: Name,
    /// The two lowest bits of TOS or traffic class.
    ecn: u8,
    control: Control,
}

impl Slot {
    const EMPTY: Self = Self { length: 0, peer: Name([0; Name::BYTES]), ecn: 0, control: Control([0; CONTROL_BYTES]) };
}

/// Room for the control messages of one datagram: ECN, overflow, and two more.
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
        }
    }
}

impl Batch {
    /// Forgets all datagrams.
    pub fn clear(&mut self) {
        self.filled = 0;
    }

    /// How many datagrams it holds.
    pub fn count(&self) -> usize {
        self.filled
    }

    /// How many more it can take.
    pub fn room(&self) -> usize {
        BATCH - self.filled
    }

    /// The payload of a datagram.
    pub fn payload(&self, slot: usize) -> &[u8] {
        &self.payloads[slot * SLOT_BYTES..][..self.length(slot)]
    }

    /// Payload bytes of a datagram.
    pub fn length(&self, slot: usize) -> usize {
        self.slots[slot].length
    }

    /// Who sent the datagram, or whom it is addressed to.
    pub fn peer(&self, slot: usize) -> Option<SocketAddr> {
        self.slots[slot].peer.decode()
    }

    /// Addresses the datagram.
    pub fn set_peer(&mut self, slot: usize, peer: SocketAddr) {
        self.slots[slot].peer = Name::encode(peer);
    }

    /// How many datagrams the kernel dropped at the socket of the last `receive` since it was opened, modulo 2³²,
    /// as its queue was full; `None` where it does not say.
    pub fn overflow(&self) -> Option<u32> {
        self.overflow
    }

    /// Receives up to `most` datagrams behind those that it holds: fewer where no more wait. Does not block.
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
            slot.length = header.msg_len as usize;
            slot.ecn = 0;
            read_control(&header.msg_hdr, |level, kind, value| match (level, kind, value) {
                (libc::IPPROTO_IP, libc::IP_TOS, [tos, ..]) => slot.ecn = tos & 3,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &[a, b, c, d]) => {
                    slot.ecn = u32::from_ne_bytes([a, b, c, d]) as u8 & 3;
                }
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &[a, b, c, d]) => {
                    self.overflow = Some(u32::from_ne_bytes([a, b, c, d]));
                }
                _ => {}
            });
        }
        self.filled += received;
        Ok(received)
    }

    /// Sends the datagrams of these slots, in this order, with their ECN bits. Does not block.
    ///
    /// Returns how many left; fewer than asked for means that the next one failed. Sending it again says why, unless
    /// it was an ICMP error about an earlier datagram: the kernel tells that once, and here it told nobody. The next
    /// datagram to a dead port brings another one.
    pub fn send(&mut self, socket: BorrowedFd<'_>, slots: &[u8], to: To) -> io::Result<usize> {
        let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; BATCH];
        let mut headers = [const { MaybeUninit::<mmsghdr>::uninit() }; BATCH];
        for index in slots {
            let slot = &mut self.slots[usize::from(*index)];
            if slot.ecn != 0 {
                slot.write_control();
            }
        }
        for ((index, vector), header) in slots.iter().zip(&mut vectors).zip(&mut headers) {
            let (payload, slot) = (self.payload(usize::from(*index)), &self.slots[usize::from(*index)]);
            let vector =
                vector.write(libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() });
            let header = &mut header.write(empty_header()).msg_hdr;
            if to == To::Peers {
                header.msg_name = slot.peer.0.as_ptr().cast_mut().cast();
                header.msg_namelen = slot.peer.length();
            }
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            if slot.ecn != 0 {
                header.msg_control = slot.control.0.as_ptr().cast_mut().cast();
                header.msg_controllen = control_space(size_of::<c_int>()) as _;
            }
        }
        let count = slots.len().min(BATCH) as c_uint;
        // SAFETY: the first `count` headers are written, and what they point to lives in `self` and on this stack
        // until the call returns. The kernel writes the headers' lengths, and only reads what they point to.
        let sent =
            unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr().cast(), count, libc::MSG_DONTWAIT as _) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

impl Slot {
    /// Prepares the control message that sets the ECN bits of the datagram, DSCP 0.
    fn write_control(&mut self) {
        let (level, kind) = match self.peer.family() {
            libc::AF_INET => (libc::IPPROTO_IP, libc::IP_TOS),
            _ => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        };
        let mut header = empty_control(); // some C libraries have private padding in it
        header.cmsg_len = control_length(size_of::<c_int>()) as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        let at = self.control.0.as_mut_ptr();
        // SAFETY: the buffer is aligned for a control header and longer than a header and an int.
        unsafe { at.cast::<libc::cmsghdr>().write(header) };
        let value = c_int::from(self.ecn).to_ne_bytes();
        let data = control_length(0);
        self.control.0[data..data + value.len()].copy_from_slice(&value);
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
        let sent = batch.send(upstream.as_fd(), &[0, 1, 2, 3], To::Connected).expect("sent");

        assert_eq!(sent, sizes.len());
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
            assert_eq!(batch.send(service.as_fd(), &[0, 1], To::Peers).expect("sent"), 2);

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
            let upstream = connect_udp(address_of(&backend)).expect("a way to loopback");
            client.send_to(b"x", address).expect("sent");
            let (mut batch, mut arrived) = (Batch::default(), Batch::default());

            wait_readable(&service);
            batch.receive(service.as_fd(), BATCH).expect("received");
            batch.send(upstream.as_fd(), &[0], To::Connected).expect("sent");
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
        let received = batch.receive(service.as_fd(), BATCH).expect("received");
        batch.clear();
        client.send_to(&[0; 512], "127.18.0.5:5301").expect("sent");
        wait_readable(&service);
        batch.receive(service.as_fd(), BATCH).expect("received");

        assert_eq!(batch.overflow(), Some((BATCH - received) as u32));
    }
}
