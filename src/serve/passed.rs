//! The sockets of a listener on their way from one process to another, and whether they are what they should be.
//!
//! What the other process says of them is not taken for granted: the kernel tells what a socket is. Options that are set
//! again in any case (filters, what datagrams are told with) are not looked at.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::SocketType;
use rustix::net::sockopt::{ip_freebind, ipv6_v6only, socket_acceptconn, socket_reuseport, socket_type};
use socket2::SockRef;

use crate::name::{ListenKey, Protocol, ServicePortName};
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

/// The listeners that a process is to have, with the number of sockets that each can have.
#[derive(Clone, Debug, Default)]
pub(crate) struct WantedSockets(pub(crate) BTreeMap<ListenKey, (ServicePortName, usize)>);

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
    /// Compares the sockets of a listener with those that would be opened for it. Nobody minds those of one that is not wanted.
    ///
    /// # Errors
    /// They are not the same.
    pub(crate) fn check(&self, passed: &Passed) -> Result<Fit, Unlike> {
        let Some((service, most)) = self.0.get(&passed.key) else { return Ok(Fit::Whole) };
        match passed.check(*most) {
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
    pub(crate) fn check(&self, most: usize) -> Result<(), Difference> {
        let found = self.sockets.len();
        let most = if self.parked { 1 } else { most };
        if !(1..=most).contains(&found) {
            return Err(Difference::Count { found, most });
        }
        self.sockets.iter().try_for_each(|socket| self.check_one(socket, found > 1))
    }

    /// Closes them, and for others that have copies of them, too, as far as the kernel does that: it lets no client in any
    /// more. Datagrams wait there until the last copy is closed.
    pub(crate) fn close_for_all(self) {
        if self.key.protocol == Protocol::Tcp {
            self.sockets.iter().for_each(socket::shut);
        }
    }

    fn check_one(&self, socket: &OwnedFd, shared: bool) -> Result<(), Difference> {
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
        match self.key.ip().is_ipv6() {
            true => same("IPV6_V6ONLY", ipv6_v6only(socket)?)?,
            false => {
                same("IP_FREEBIND", !ip_freebind(socket)?)?;
                same("IP_TRANSPARENT", !options.ip_transparent_v4()?)?;
            }
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
    use std::net::TcpListener;

    use super::*;
    use crate::name::ObjectName;
    use crate::serve::udp;

    fn key(number: u8, protocol: Protocol) -> ListenKey {
        ListenKey::new([127, 85, 9, number].into(), 7500, protocol)
    }

    fn passed(key: ListenKey, parked: bool, sockets: Vec<OwnedFd>) -> Passed {
        Passed { key, parked, sockets: sockets.into_iter().map(Arc::new).collect() }
    }

    fn difference(passed: &Passed, wanted: usize) -> String {
        passed.check(wanted).expect_err("it is another one").to_string()
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
            passed.check(wanted).unwrap_or_else(|difference| panic!("{}: {difference}", passed.key));
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
        let wanted = WantedSockets([(group.key, (name, 2))].into());
        assert_eq!(wanted.check(&group).expect("others can be had"), Fit::Anew);
        let foreign: OwnedFd = shared(16);
        SockRef::from(&foreign).set_reuse_port(true).expect("a listener");
        assert_eq!(
            difference(&passed(key(16, Protocol::Tcp), false, vec![foreign]), 1),
            "its SO_REUSEPORT is another one"
        );
    }
}
