//! System calls and socket options: making, parking and filtering listeners, aborting connections.
//!
//! One of the files where `unsafe` is allowed; who calls when is decided elsewhere.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use crate::name::{Family, ListenKey};

// ---- TCP: listeners ----

/// Connections that may wait for accept: as many as the kernel allows, which caps this at `net.core.somaxconn`.
const BACKLOG: i32 = i32::MAX;

/// Opens a TCP listener on exactly this address: [`bind_tcp`] and [`listen`] in one.
pub fn listen_tcp(key: ListenKey) -> io::Result<OwnedFd> {
    let socket = bind_tcp(key)?;
    listen(&socket)?;
    Ok(socket)
}

/// Takes an address for a TCP listener, non-blocking, not inherited by child processes. Nobody can connect yet.
///
/// Accepted sockets inherit TCP_NODELAY. SO_REUSEADDR lets a restarted process bind while connections of the
/// last one linger; SO_REUSEPORT is never set, so that nobody else can share the port.
pub fn bind_tcp(key: ListenKey) -> io::Result<OwnedFd> {
    let address = key.address();
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    bind_here(&socket, address)?;
    Ok(socket.into())
}

/// Lets clients connect to the socket of [`bind_tcp`].
pub fn listen(socket: impl AsFd) -> io::Result<()> {
    SockRef::from(&socket.as_fd()).listen(BACKLOG)
}

/// Binds a socket to an address of this machine, also to an IPv6 one that is so by a route only (AnyIP).
///
/// The kernel takes those for foreign, unless it is told to bind whatever it is asked to: then it takes foreign
/// ones as well, and nobody would ever come there.
pub(super) fn bind_here(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let foreign = |error: &io::Error| error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error());
    match socket.bind(&address.into()) {
        Err(error) if address.is_ipv6() && foreign(&error) && is_routed_here(address) => {
            socket.set_freebind_v6(true)?;
            socket.bind(&address.into())
        }
        outcome => outcome,
    }
}

/// True where a route through the loopback interface leads to the address. Nothing is sent.
fn is_routed_here(address: SocketAddr) -> bool {
    let probe = || {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM.cloexec(), None)?;
        socket.bind_device(Some(b"lo"))?;
        socket.connect(&address.into())
    };
    probe().is_ok()
}

/// Gives a TCP listener that was opened by somebody else what those have that are opened here, and what can be given later:
/// as many may wait as the kernel allows now.
pub(super) fn settle_passed(listener: impl AsFd) -> io::Result<()> {
    let listener = listener.as_fd();
    SockRef::from(&listener).set_reuse_address(true)?;
    listen(listener)
}

/// Parks a TCP listener: the port stays held and connects are refused; accepted connections go on, waiting ones are reset.
///
/// The socket must not be registered with an event loop: a parked socket is always readable, and the loop would
/// spin. It must have been bound to an explicit port, or it comes back on another one.
pub fn park_tcp(listener: impl AsFd) -> io::Result<()> {
    let listener = listener.as_fd();
    let listener = SockRef::from(&listener);
    listener.shutdown(Shutdown::Both)?;
    listener.set_reuse_address(false) // Two sockets that may reuse share a port on which neither listens.
}

/// Has nobody let in at a TCP listener any more, in whichever process there are copies of it; who waits there is reset. Its
/// address may be bound again. Nobody may watch it, as with [`park_tcp`].
///
/// Best effort: one that does not listen lets nobody in.
pub fn shut(listener: impl AsFd) {
    let _ = SockRef::from(&listener.as_fd()).shutdown(Shutdown::Both);
}

/// Revives a parked TCP listener. Its options and its filter are those that it had.
pub fn revive_tcp(listener: impl AsFd) -> io::Result<()> {
    let listener = listener.as_fd();
    let listener = SockRef::from(&listener);
    listener.set_reuse_address(true)?; // Connections that it accepted before are still on the port.
    listener.listen(BACKLOG)
}

/// How many packets the kernel has dropped at this socket since it was opened, modulo 2³²: by its filter, or for lack
/// of room.
#[allow(unsafe_code)]
pub fn dropped_packets(socket: impl AsFd) -> io::Result<u32> {
    const FIELDS: usize = 9; // SK_MEMINFO_VARS
    const DROPS: usize = 8; // SK_MEMINFO_DROPS
    let mut fields = [0_u32; FIELDS];
    let mut length = size_of_val(&fields) as libc::socklen_t;
    let socket = socket.as_fd();
    // SAFETY: the descriptor is open while it is borrowed; the kernel writes at most `length` bytes to `fields`, and
    // every bit pattern is a number.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            fields.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if outcome == 0 { Ok(fields[DROPS]) } else { Err(io::Error::last_os_error()) }
}

/// Takes one waiting connection from a listener: its socket, non-blocking, and who it is.
pub fn accept(listener: impl AsFd) -> io::Result<(OwnedFd, SocketAddr)> {
    let (socket, peer) = rustix::net::acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    Ok((socket, address_of(peer)?))
}

/// True where somebody waits to be accepted.
pub(super) fn has_waiting(listener: &OwnedFd) -> bool {
    const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&AT_ONCE)).is_ok_and(|ready| ready > 0)
}

/// Who a client is. Without an address it was gone before it was accepted, and there is nobody to serve.
fn address_of(peer: Option<SocketAddrAny>) -> io::Result<SocketAddr> {
    peer.and_then(|peer| SocketAddr::try_from(peer).ok()).ok_or_else(|| Errno::CONNABORTED.into())
}

// ---- TCP: connections ----

/// Asks a silent peer whether it is still there: first after `idle`, then every third of it, `probes` times in all.
/// Whole seconds.
pub fn keep_alive(socket: impl AsFd, idle: Duration, probes: u32) -> io::Result<()> {
    let interval = (idle / 3).max(Duration::from_secs(1));
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
    SockRef::from(&socket.as_fd()).set_tcp_keepalive(&keepalive)
}

/// Opens a TCP socket that does not block, not inherited by child processes.
pub fn open_tcp(family: Family) -> io::Result<OwnedFd> {
    let domain = match family {
        Family::V4 => AddressFamily::INET,
        Family::V6 => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(domain, SocketType::STREAM, flags, None)?)
}

/// Begins to connect a socket that does not block: the event loop tells how it went.
pub fn begin_connect(socket: impl AsFd, to: SocketAddr) -> io::Result<()> {
    match rustix::net::connect(socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(()), // Interrupted, it goes on all the same.
        Err(error) => Err(error.into()),
    }
}

/// Has a socket send small writes at once, whether earlier ones are acknowledged or not (TCP_NODELAY).
pub fn send_small_at_once(socket: impl AsFd) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_tcp_nodelay(socket, true)?)
}

/// Gives a TCP socket its source address before it connects; `from` has port 0.
///
/// The port is chosen when the destination is known (IP_BIND_ADDRESS_NO_PORT), so that the same one serves many
/// destinations: otherwise an address is used up by as many connections as there are ports, whoever they go to.
pub fn bind_source(socket: impl AsFd, from: SocketAddr) -> io::Result<()> {
    let socket = socket.as_fd();
    set_flag(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT)?;
    SockRef::from(&socket).bind(&from.into())
}

/// Gives a TCP socket its source address and port before it connects, the port being one that the kernel may choose
/// (`net.ipv4.ip_local_port_range`). Others may have the same: to which destination each connects tells them apart.
///
/// A port that is bound by number is taken from whoever else connects from this host, wherever to, and for a minute longer. So
/// it is made the only one that there is to choose from.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.3; the port may turn out to be in use when it connects.
pub fn choose_source(socket: impl AsFd, from: SocketAddr) -> io::Result<()> {
    let socket = socket.as_fd();
    let port = u32::from(from.port());
    set_option(socket, libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, (port << 16 | port).cast_signed())?;
    bind_source(socket, SocketAddr::new(from.ip(), 0))
}

/// The lowest and, in the upper half, the highest port to choose from: `linux/in.h`.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

/// The same for a port that the kernel chooses for nobody.
pub fn bind_shared_source(socket: impl AsFd, from: SocketAddr) -> io::Result<()> {
    let socket = socket.as_fd();
    let socket = SockRef::from(&socket);
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())
}

/// Lets a socket be bound to an address that is not this host's. Needs CAP_NET_ADMIN.
pub fn allow_foreign_source(socket: impl AsFd, family: Family) -> io::Result<()> {
    let socket = socket.as_fd();
    match family {
        Family::V4 => SockRef::from(&socket).set_ip_transparent_v4(true),
        Family::V6 => SockRef::from(&socket).set_ip_transparent_v6(true),
    }
}

/// True where [`allow_foreign_source`] was called for it.
///
/// # Errors
/// The kernel does not tell.
pub fn has_foreign_source(socket: impl AsFd, family: Family) -> io::Result<bool> {
    let socket = socket.as_fd();
    match family {
        Family::V4 => SockRef::from(&socket).ip_transparent_v4(),
        Family::V6 => SockRef::from(&socket).ip_transparent_v6(),
    }
}

/// Sets a socket option to 1.
fn set_flag(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    set_option(socket, level, option, 1)
}

/// Sets a socket option whose value is a number.
#[allow(unsafe_code)]
pub(super) fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed; the pointer is to a live `c_int` and the length is its size.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A socket option whose value is a number.
///
/// # Errors
/// The kernel does not tell: there is no such option for this socket.
#[allow(unsafe_code)]
pub(super) fn number_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed; the kernel writes at most `length` bytes to `value`, a number of
    // which every bit pattern is one.
    let outcome =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut length) };
    if outcome == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Makes the next close of the connection a reset: what is still on its way is given up, and the peer is told.
///
/// Best effort: a socket that refuses is one that has been reset already.
pub fn reset_on_close(socket: impl AsFd) {
    let _ = SockRef::from(&socket.as_fd()).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::TcpStream;

    use super::*;
    use crate::name::Protocol;

    const SOON: Duration = Duration::from_millis(200);

    fn key(address: &str) -> ListenKey {
        ListenKey::at(address.parse().expect("an address"), Protocol::Tcp)
    }

    fn connect(key: ListenKey) -> io::Result<TcpStream> {
        TcpStream::connect_timeout(&key.address(), SOON)
    }

    /// Waits until a connection is there to be accepted.
    fn accept_soon(listener: &OwnedFd) -> (OwnedFd, SocketAddr) {
        let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&limit));
        assert_eq!(ready, Ok(1), "a connection in time");
        assert!(has_waiting(listener));
        accept(listener).expect("a connection")
    }

    #[test]
    fn t177_given_a_client_without_an_address_when_accepted_then_it_is_gone_and_one_of_port_0_is_served() {
        use rustix::net::SocketAddrUnix;

        let unix = SocketAddrUnix::new_unnamed().into();
        let of_port_0 = SocketAddr::from(([192, 0, 2, 1], 0));

        for peer in [None, Some(unix)] {
            assert_eq!(address_of(peer).expect_err("no address").kind(), ErrorKind::ConnectionAborted);
        }
        assert_eq!(address_of(Some(of_port_0.into())).expect("an address"), of_port_0);
    }

    #[test]
    fn given_a_listener_when_a_client_connects_then_its_socket_has_the_inherited_options() {
        let key = key("127.81.1.1:7101");
        let listener = listen_tcp(key).expect("a free address");
        let client = connect(key).expect("a listener");

        let (accepted, peer) = accept_soon(&listener);

        assert_eq!(peer, client.local_addr().expect("a connected socket"));
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().expect("an option"));
        assert!(accepted.nonblocking().expect("a flag"));
    }

    #[test]
    fn given_a_listener_when_another_binds_its_address_then_it_is_in_use() {
        let key = key("127.81.1.2:7101");
        let _held = listen_tcp(key).expect("a free address");

        assert_eq!(listen_tcp(key).expect_err("held").kind(), ErrorKind::AddrInUse);
    }

    #[test]
    fn given_an_ipv6_address_of_nobody_when_bound_then_it_is_refused_as_in_ipv4() {
        // Documentation addresses: on no machine.
        for address in ["[2001:db8::1]:8080", "192.0.2.1:8080"] {
            let address = address.parse().expect("an address");
            let error = listen_tcp(ListenKey::at(address, Protocol::Tcp)).expect_err("nobody's address");
            assert_eq!(error.raw_os_error(), Some(Errno::ADDRNOTAVAIL.raw_os_error()), "{address}");
        }
    }

    #[test]
    fn given_an_ipv6_listener_when_the_same_port_is_bound_in_ipv4_then_both_live() {
        let (six, four) = (key("[::1]:7102"), key("127.0.0.1:7102"));

        let _six = listen_tcp(six).expect("IPv6 on loopback");
        let _four = listen_tcp(four).expect("the same port in the other family");

        connect(six).expect("an IPv6 listener");
        connect(four).expect("an IPv4 listener");
    }

    #[test]
    fn given_a_parked_listener_when_clients_connect_then_they_are_refused_and_the_port_stays_held() {
        let key = key("127.81.1.3:7101");
        let listener = listen_tcp(key).expect("a free address");
        let mut before = connect(key).expect("a listener");
        let (served, _) = accept_soon(&listener);

        park_tcp(&listener).expect("a listener");

        assert_eq!(connect(key).expect_err("parked").kind(), ErrorKind::ConnectionRefused);
        assert_eq!(listen_tcp(key).expect_err("still held").kind(), ErrorKind::AddrInUse);
        rustix::io::write(&served, b"x").expect("a connection that goes on");
        before.read_exact(&mut [0]).expect("a connection that goes on");
        revive_tcp(&listener).expect("its port, though a connection is on it");
        connect(key).expect("a listener again");
    }

    #[test]
    fn given_a_parked_listener_when_it_is_revived_then_it_serves_with_the_options_it_had() {
        let key = key("127.81.1.4:7101");
        let listener = listen_tcp(key).expect("a free address");

        for _ in 0..3 {
            park_tcp(&listener).expect("a listener");
            revive_tcp(&listener).expect("a parked listener");
            let _client = connect(key).expect("a listener");
            let (accepted, _) = accept_soon(&listener);
            assert!(SockRef::from(&accepted).tcp_nodelay().expect("an option"));
        }
    }

    #[test]
    fn given_datagrams_that_find_no_room_when_asked_then_the_kernel_tells_how_many() {
        let socket = std::net::UdpSocket::bind("127.81.1.8:0").expect("a free port");
        SockRef::from(&socket).set_recv_buffer_size(4096).expect("a small queue");
        assert_eq!(dropped_packets(&socket).expect("an option"), 0);

        for _ in 0..64 {
            socket.send_to(&[0; 512], socket.local_addr().expect("bound")).expect("sent");
        }

        assert!((1..64).contains(&dropped_packets(&socket).expect("an option")));
    }

    #[test]
    fn given_a_connection_when_it_is_closed_by_reset_then_the_peer_sees_a_reset() {
        let key = key("127.81.1.6:7101");
        let listener = listen_tcp(key).expect("a free address");
        let mut client = connect(key).expect("a listener");
        let (accepted, _) = accept_soon(&listener);

        reset_on_close(&accepted);
        drop(accepted);

        assert_eq!(client.read(&mut [0]).expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn given_a_listener_when_it_is_opened_then_child_processes_do_not_inherit_it() {
        let listener = listen_tcp(key("127.81.1.7:7101")).expect("a free address");

        let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", listener.as_raw_fd())).expect("procfs");

        let flags = flags.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags").trim();
        let flags = i32::from_str_radix(flags, 8).expect("an octal number");
        assert_ne!(flags & libc::O_CLOEXEC, 0);
    }

    /// One that is bound by number has the port for itself.
    #[test]
    fn f15_given_a_port_that_is_the_only_choice_when_connected_to_two_then_both_are_from_it() {
        let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let from = SocketAddr::from(([127, 83, 9, 9], *crate::local_ports::range().end()));

        let connected = listeners.each_ref().map(|listener| {
            let socket = open_tcp(Family::V4)?;
            choose_source(&socket, from)?;
            begin_connect(&socket, listener.local_addr()?)?;
            Ok::<_, io::Error>(socket)
        });

        for outcome in connected {
            match outcome {
                Ok(socket) => {
                    let own = SockRef::from(&socket).local_addr().expect("it is bound");
                    assert_eq!(own.as_socket(), Some(from));
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                    eprintln!("skipped, that needs Linux 6.3: {error}");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}
