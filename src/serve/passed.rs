//! The sockets of a listener on their way from one process to another, and whether they are what they should be.
//!
//! What the other process says of them is not taken for granted: the kernel tells what a socket is.
//!
//! | Option | In a socket that is opened here | In one that comes |
//! |---|---|---|
//! | type, address, peer, whether it listens | as the key says, and whether it is parked | has to be so |
//! | SO_REUSEPORT | where threads share it (UDP) | has to be so: others would get a part of the clients |
//! | SO_REUSEADDR | TCP that is not parked | has to be so in a hand-over. systemd gives it to each: set in `bound` |
//! | IPV6_V6ONLY | yes, as the kernel has it where an address is bound | has to be so |
//! | IP_FREEBIND, IP_TRANSPARENT, IPV6_TRANSPARENT | no | has to be so |
//! | IPV6_FREEBIND | where a route alone makes it local | either: nothing depends on it once it is bound |
//! | SO_BINDTODEVICE, SO_MARK, SO_LOCK_FILTER, SO_PROTOCOL | as in any new one (`fresh`) | has to be so |
//! | SO_LINGER, TCP_DEFER_ACCEPT | as in any new one (`fresh`) | has to be so |
//! | O_NONBLOCK, TCP_NODELAY | yes | set here |
//! | backlog, SO_RCVBUF, filter | yes | set in `bound` |
//! | SO_SNDBUF, SO_RXQ_OVFL, IP_RECVTOS, UDP_GRO | from the first datagram on | set with the next datagram |

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::SocketType;
use rustix::net::sockopt::{
    ip_freebind, ipv6_v6only, socket_acceptconn, socket_reuseaddr, socket_reuseport, socket_type,
};
use socket2::SockRef;

use crate::name::{Family, ListenKey, Protocol, ServicePortName};
use crate::serve::fresh::Fresh;
use crate::serve::socket;

/// The sockets of one listener.
#[derive(Debug)]
pub(crate) struct Passed {
    /// Where they are bound.
    pub(crate) key: ListenKey,
    /// True where the port is held and nobody serves there.
    pub(crate) parked: bool,
    /// One; of UDP one for each shard that shares the listener.
    pub(crate) sockets: Vec<Arc<OwnedFd>>,
}

/// Why a socket cannot be served on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Difference {
    /// More threads have shared the listener than there are now.
    #[error("it has {found} sockets, and can have {most}")]
    Count {
        /// So many came.
        found: usize,
        /// So many there can be.
        most: usize,
    },
    /// It is another kind of socket, or has an option that cannot be changed once it is bound.
    #[error("its {0} is another one")]
    Option(&'static str),
    /// The kernel does not tell what it is.
    #[error("it cannot be looked at")]
    Unknown(#[from] io::Error),
}

/// The listeners that a process is to have.
#[derive(Clone, Debug, Default)]
pub(crate) struct WantedSockets {
    /// With the number of sockets that each can have.
    pub(crate) listeners: BTreeMap<ListenKey, (ServicePortName, usize)>,
}

/// A listener whose socket is not as this process would have it: it cannot be served on, nor can another one be had beside it.
#[derive(Debug, thiserror::Error)]
#[error("{service}: the socket at {key} cannot be taken over: {difference}")]
pub(crate) struct Unlike {
    service: ServicePortName,
    key: ListenKey,
    /// No source, as the other process is told all of it.
    difference: Difference,
}

/// What becomes of a listener whose sockets came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    /// It is served on them.
    Whole,
    /// It has others, as more threads have shared it than there are here: clients come to other ones of them, so its flows
    /// begin anew.
    Anew,
}

impl WantedSockets {
    /// Compares the sockets of a listener with those that would be opened for it, which are like `fresh` ones. Nobody
    /// minds those of one that is not wanted.
    ///
    /// # Errors
    /// They are not the same.
    pub(crate) fn check(&self, passed: &Passed, fresh: &Fresh) -> Result<Fit, Unlike> {
        let Some((service, most)) = self.listeners.get(&passed.key) else { return Ok(Fit::Whole) };
        match passed.check(*most, fresh).and_then(|()| passed.check_reuse()) {
            Ok(()) => Ok(Fit::Whole),
            Err(Difference::Count { .. }) if passed.key.protocol == Protocol::Udp => Ok(Fit::Anew),
            Err(difference) => Err(Unlike { service: service.clone(), key: passed.key, difference }),
        }
    }
}

impl From<rustix::io::Errno> for Difference {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Unknown(errno.into())
    }
}

impl Passed {
    /// Compares the sockets with those that would be opened here. `most`: how many can be served on. Fewer are as good: with
    /// another number flows would lose their places.
    ///
    /// # Errors
    /// They are not the same.
    pub(crate) fn check(&self, most: usize, fresh: &Fresh) -> Result<(), Difference> {
        let found = self.sockets.len();
        let most = if self.parked { 1 } else { most };
        if !(1..=most).contains(&found) {
            return Err(Difference::Count { found, most });
        }
        self.sockets.iter().try_for_each(|socket| self.check_one(socket, found > 1, fresh))
    }

    /// What only another kube-relay has as it would be here.
    fn check_reuse(&self) -> Result<(), Difference> {
        let wanted = self.key.protocol == Protocol::Tcp && !self.parked;
        self.sockets.iter().try_for_each(|socket| same("SO_REUSEADDR", socket_reuseaddr(socket)? == wanted))
    }

    /// Closes them, and for others that have copies of them, too, as far as the kernel does that: it lets no client in any
    /// more. Datagrams wait there until the last copy is closed.
    pub(crate) fn close_for_all(self) {
        if self.key.protocol == Protocol::Tcp {
            self.sockets.iter().for_each(socket::shut);
        }
    }

    fn check_one(&self, socket: &OwnedFd, shared: bool, fresh: &Fresh) -> Result<(), Difference> {
        let options = SockRef::from(socket);
        let is_tcp = self.key.protocol == Protocol::Tcp;
        let kind = if is_tcp { SocketType::STREAM } else { SocketType::DGRAM };
        same("kind", socket_type(socket)? == kind)?;
        same("address", options.local_addr()?.as_socket() == Some(self.key.address()))?;
        // A parked datagram socket is connected to itself, and a live one to nobody.
        let peer = options.peer_addr().ok().and_then(|peer| peer.as_socket());
        let wanted_peer: Option<SocketAddr> = (!is_tcp && self.parked).then(|| self.key.address());
        same("peer", peer == wanted_peer)?;
        same("state", socket_acceptconn(socket)? == (is_tcp && !self.parked))?;
        same("SO_REUSEPORT", socket_reuseport(socket)? == shared)?;
        let family = Family::of(self.key.ip());
        match family {
            Family::V6 => {
                same("IPV6_V6ONLY", ipv6_v6only(socket)?)?;
                same("IPV6_TRANSPARENT", !socket::has_foreign_source(socket, family)?)?;
            }
            Family::V4 => {
                same("IP_FREEBIND", !ip_freebind(socket)?)?;
                same("IP_TRANSPARENT", !socket::has_foreign_source(socket, family)?)?;
            }
        }
        if let Some(option) = fresh.difference(socket, family, self.key.protocol)? {
            return Err(Difference::Option(option));
        }
        // Those of the open file, not of this descriptor: the other process may have changed them, or it was no kube-relay.
        options.set_nonblocking(true)?;
        if is_tcp {
            options.set_tcp_nodelay(true)?;
        }
        Ok(())
    }
}

fn same(option: &'static str, is_same: bool) -> Result<(), Difference> {
    if is_same { Ok(()) } else { Err(Difference::Option(option)) }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr, TcpListener, UdpSocket};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use socket2::{Domain, Socket, Type};

    use super::*;
    use crate::name::ObjectName;
    use crate::serve::socket::set_option;
    use crate::serve::udp;

    fn key(number: u8, protocol: Protocol) -> ListenKey {
        ListenKey::new([127, 85, 9, number].into(), 7500, protocol)
    }

    fn passed(key: ListenKey, parked: bool, sockets: Vec<OwnedFd>) -> Passed {
        Passed { key, parked, sockets: sockets.into_iter().map(Arc::new).collect() }
    }

    fn fresh() -> Fresh {
        Fresh::look().expect("descriptors are left")
    }

    fn difference(passed: &Passed, wanted: usize) -> String {
        passed.check(wanted, &fresh()).expect_err("it is another one").to_string()
    }

    #[test]
    fn t234_given_sockets_as_they_are_opened_here_when_compared_then_they_are_the_same() {
        let tcp = socket::listen_tcp(key(1, Protocol::Tcp)).expect("a free address");
        let parked = socket::listen_tcp(key(2, Protocol::Tcp)).expect("a free address");
        socket::park_tcp(&parked).expect("it listens");
        let address = |number| key(number, Protocol::Udp).address();
        let shared = udp::bind_udp_group(address(3), 3).expect("a free address");
        let held = udp::hold_udp(address(4)).expect("a free address");
        let alone = udp::bind_udp(address(5)).expect("a free address");

        for (passed, wanted) in [
            (passed(key(1, Protocol::Tcp), false, vec![tcp]), 1),
            (passed(key(2, Protocol::Tcp), true, vec![parked]), 1),
            (passed(key(3, Protocol::Udp), false, shared.into_iter().map(Into::into).collect()), 3),
            (passed(key(4, Protocol::Udp), true, vec![held.into()]), 3),
            (passed(key(5, Protocol::Udp), false, vec![alone.into()]), 3),
        ] {
            passed.check(wanted, &fresh()).unwrap_or_else(|difference| panic!("{}: {difference}", passed.key));
        }
    }

    #[test]
    fn f25_given_sockets_of_another_kind_when_compared_then_the_difference_is_told() {
        let tcp = |number| socket::listen_tcp(key(number, Protocol::Tcp)).expect("a free address");
        let udp = |number| udp::bind_udp(key(number, Protocol::Udp).address()).expect("a free address");
        let shared = |number| TcpListener::bind(key(number, Protocol::Tcp).address()).expect("a free address").into();

        let elsewhere = passed(key(11, Protocol::Tcp), false, vec![tcp(12)]);
        assert_eq!(difference(&elsewhere, 1), "its address is another one");
        let datagrams = passed(key(13, Protocol::Tcp), false, vec![udp(13).into()]);
        assert_eq!(difference(&datagrams, 1), "its kind is another one");
        let live = passed(key(14, Protocol::Tcp), true, vec![tcp(14)]);
        assert_eq!(difference(&live, 1), "its state is another one");
        let shared_by_three = udp::bind_udp_group(key(15, Protocol::Udp).address(), 3).expect("a free address");
        let sockets: Vec<OwnedFd> = shared_by_three.into_iter().map(Into::into).collect();
        let group = passed(key(15, Protocol::Udp), false, sockets);
        assert_eq!(difference(&group, 2), "it has 3 sockets, and can have 2");
        assert_eq!(
            difference(&passed(key(15, Protocol::Udp), false, Vec::new()), 2),
            "it has 0 sockets, and can have 2"
        );
        let name = ServicePortName::new(ObjectName::new("default", "dns"), "dns", Protocol::Udp);
        let wanted = WantedSockets { listeners: [(group.key, (name, 2))].into() };
        assert_eq!(wanted.check(&group, &fresh()).expect("others can be had"), Fit::Anew);
        let foreign: OwnedFd = shared(16);
        SockRef::from(&foreign).set_reuse_port(true).expect("a listener");
        assert_eq!(
            difference(&passed(key(16, Protocol::Tcp), false, vec![foreign]), 1),
            "its SO_REUSEPORT is another one"
        );
    }

    const TCP: [(Family, Protocol); 2] = [(Family::V4, Protocol::Tcp), (Family::V6, Protocol::Tcp)];
    const UDP: [(Family, Protocol); 2] = [(Family::V4, Protocol::Udp), (Family::V6, Protocol::Udp)];
    const BOTH: [(Family, Protocol); 4] = [TCP[0], TCP[1], UDP[0], UDP[1]];
    const OF_V4: [(Family, Protocol); 2] = [TCP[0], UDP[0]];
    fn loopback(family: Family, number: u8, protocol: Protocol) -> ListenKey {
        match family {
            Family::V4 => key(number, protocol),
            Family::V6 => ListenKey::new(Ipv6Addr::LOCALHOST.into(), 7500 + u16::from(number), protocol),
        }
    }

    /// The option that a listener is not taken over for, when it comes from another process.
    fn refused_for(key: ListenKey, socket: OwnedFd) -> String {
        let name = ServicePortName::new(ObjectName::new("default", "web"), "http", key.protocol);
        let wanted = WantedSockets { listeners: [(key, (name, 1))].into() };
        let told = wanted.check(&passed(key, false, vec![socket]), &fresh()).expect_err("it differs").to_string();
        let prefix = format!("default/web:http: the socket at {key} cannot be taken over: its ");
        let option = told.strip_prefix(&prefix).and_then(|told| told.strip_suffix(" is another one"));
        option.unwrap_or_else(|| panic!("{told}")).to_owned()
    }

    #[test]
    fn f25_given_a_listener_with_an_option_that_ours_have_not_when_handed_over_then_it_is_not_taken_for_that() {
        type Case<'a> = (&'a str, &'a [(Family, Protocol)], fn(&SockRef<'_>) -> io::Result<()>);
        let cases: [Case<'_>; 10] = [
            ("SO_BINDTODEVICE", &BOTH, |socket| socket.bind_device(Some(b"lo"))),
            ("SO_MARK", &BOTH, |socket| socket.set_mark(7)),
            ("SO_LOCK_FILTER", &BOTH, |socket| set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1)),
            ("SO_REUSEPORT", &BOTH, |socket| socket.set_reuse_port(true)),
            ("SO_REUSEADDR", &TCP, |socket| socket.set_reuse_address(false)),
            ("SO_REUSEADDR", &UDP, |socket| socket.set_reuse_address(true)),
            ("SO_LINGER", &TCP, |socket| socket.set_linger(Some(Duration::ZERO))),
            ("TCP_DEFER_ACCEPT", &TCP, |socket| {
                set_option(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 5)
            }),
            ("IP_FREEBIND", &OF_V4, |socket| socket.set_freebind_v4(true)),
            ("TRANSPARENT", &BOTH, |socket| match Family::of(local_ip(socket)) {
                Family::V4 => socket.set_ip_transparent_v4(true),
                Family::V6 => socket.set_ip_transparent_v6(true),
            }),
        ];
        let cases = cases.iter().flat_map(|(option, kinds, sets)| kinds.iter().map(move |kind| (option, kind, sets)));

        for (number, (option, (family, protocol), sets)) in (21..).zip(cases) {
            let key = loopback(*family, number, *protocol);
            let socket: OwnedFd = match protocol {
                Protocol::Udp => udp::bind_udp(key.address()).expect("a free address").into(),
                _ => socket::listen_tcp(key).expect("a free address"),
            };
            match sets(&SockRef::from(&socket)) {
                Ok(()) => assert!(refused_for(key, socket).ends_with(option), "{option} of {key}"),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{option} of {key}: {error}");
                    println!("skipped ({option} of {key}): needs CAP_NET_ADMIN");
                }
            }
        }
    }

    fn local_ip(socket: &SockRef<'_>) -> IpAddr {
        socket.local_addr().ok().and_then(|local| local.as_socket()).expect("it is bound").ip()
    }

    #[test]
    fn f25_given_a_listener_of_another_protocol_with_streams_when_handed_over_then_it_is_not_taken_for_that() {
        let key = key(91, Protocol::Tcp);
        let of_many_paths = Socket::new(Domain::IPV4, Type::STREAM, Some(socket2::Protocol::MPTCP));
        let Ok(socket) = of_many_paths.inspect_err(|error| println!("skipped: this kernel has no MPTCP ({error})"))
        else {
            return;
        };
        socket.set_reuse_address(true).expect("an option");
        socket.bind(&key.address().into()).and_then(|()| socket.listen(1)).expect("a free address");

        assert_eq!(refused_for(key, socket.into()), "SO_PROTOCOL");
    }

    #[test]
    fn f21_given_sockets_of_a_service_manager_when_compared_then_that_others_may_use_their_address_is_no_difference() {
        let socket: OwnedFd = udp::bind_udp(key(92, Protocol::Udp).address()).expect("a free address").into();
        SockRef::from(&socket).set_reuse_address(true).expect("an option"); // As systemd does with each.

        let passed = passed(key(92, Protocol::Udp), false, vec![socket]);
        passed.check(1, &fresh()).expect("it is set again where it is served");

        udp::settle_passed(&passed.sockets[0].try_clone().map(UdpSocket::from).expect("descriptors are left"))
            .expect("it is a socket for datagrams");
        assert!(!SockRef::from(&passed.sockets[0]).reuse_address().expect("an option"));
    }
}
