//! What sockets of this process are like when they are new, so that one of another process can be compared with them.
//!
//! Not taken for granted: whoever sets a machine up may have each new socket marked, or bound to a device (`ip vrf exec`, a
//! program at a control group). What opening a listener sets is compared in `passed`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::socket_linger;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use socket2::SockRef;

use crate::name::{Family, Protocol};
use crate::remedy::BindFailure;
use crate::serve::socket::number_option;

/// New sockets as they were looked at: once, as ten thousand listeners may be compared with them. `Default`: as they are where
/// nobody has set anything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fresh(BTreeMap<(Family, Protocol), Traits>);

/// What nobody here sets on a listener, and what decides who reaches it or what becomes of those.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Traits {
    /// Of a kind with the same type: MPTCP, UDP-Lite.
    protocol: Option<i32>,
    device: Option<Vec<u8>>,
    mark: u32,
    /// True where its filter stays, whatever it is.
    locks_filter: bool,
    /// Of TCP: accepted sockets have it, too, and a close is a reset or waits.
    linger: Option<Duration>,
    /// Of TCP: who waits for the server to speak first is let in late.
    defers_accept: i32,
}

impl Fresh {
    /// Opens some and looks at them. A family that this host has not is left out: there is nothing to compare.
    ///
    /// # Errors
    /// No descriptor or no memory is left: what new sockets are like is not known.
    pub(crate) fn look() -> io::Result<Self> {
        Self::look_at(open)
    }

    fn look_at(open: impl Fn(Family, Protocol) -> io::Result<OwnedFd>) -> io::Result<Self> {
        let kinds =
            [Family::V4, Family::V6].into_iter().flat_map(|family| [(family, Protocol::Tcp), (family, Protocol::Udp)]);
        let look = |(family, protocol)| match open(family, protocol).and_then(|socket| Traits::of(&socket, protocol)) {
            Ok(traits) => Some(Ok(((family, protocol), traits))),
            // These say nothing of the host, and are over when something is given back.
            Err(error) if matches!(BindFailure::of(&error), BindFailure::FdLimit | BindFailure::Memory) => {
                Some(Err(error))
            }
            Err(_) => None,
        };
        kinds.filter_map(look).collect::<io::Result<_>>().map(Self)
    }

    /// The option in which a socket is another one; `None` where there is none.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(super) fn difference(
        &self,
        socket: &OwnedFd,
        family: Family,
        protocol: Protocol,
    ) -> io::Result<Option<&'static str>> {
        let found = Traits::of(socket, protocol)?;
        Ok(match self.0.get(&(family, protocol)) {
            Some(wanted) => found.difference(wanted),
            None => found.difference(&Traits { protocol: found.protocol, ..Traits::default() }),
        })
    }
}

fn open(family: Family, protocol: Protocol) -> io::Result<OwnedFd> {
    let domain = match family {
        Family::V4 => AddressFamily::INET,
        Family::V6 => AddressFamily::INET6,
    };
    let kind = if protocol == Protocol::Udp { SocketType::DGRAM } else { SocketType::STREAM };
    Ok(socket_with(domain, kind, SocketFlags::CLOEXEC, None)?)
}

impl Traits {
    fn of(socket: &OwnedFd, protocol: Protocol) -> io::Result<Self> {
        let options = SockRef::from(socket);
        let number = |level, option| number_option(socket.as_fd(), level, option);
        let is_tcp = protocol == Protocol::Tcp;
        Ok(Self {
            protocol: Some(number(libc::SOL_SOCKET, libc::SO_PROTOCOL)?),
            device: options.device()?,
            mark: options.mark()?,
            locks_filter: number(libc::SOL_SOCKET, libc::SO_LOCK_FILTER)? != 0,
            linger: if is_tcp { socket_linger(socket)? } else { None },
            defers_accept: if is_tcp { number(libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT)? } else { 0 },
        })
    }

    fn difference(&self, wanted: &Self) -> Option<&'static str> {
        let options = [
            ("SO_PROTOCOL", self.protocol == wanted.protocol),
            ("SO_BINDTODEVICE", self.device == wanted.device),
            ("SO_MARK", self.mark == wanted.mark),
            ("SO_LOCK_FILTER", self.locks_filter == wanted.locks_filter),
            ("SO_LINGER", self.linger == wanted.linger),
            ("TCP_DEFER_ACCEPT", self.defers_accept == wanted.defers_accept),
        ];
        options.into_iter().find(|(_, is_same)| !is_same).map(|(option, _)| option)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f25_given_a_host_that_gives_each_socket_a_device_when_one_comes_then_it_is_compared_with_those() {
        let socket = open(Family::V4, Protocol::Udp).expect("descriptors are left");
        let difference =
            |fresh: &Fresh| fresh.difference(&socket, Family::V4, Protocol::Udp).expect("the kernel tells what it is");
        let own = Fresh::look().expect("descriptors are left");
        assert_eq!(difference(&own), None);
        assert_eq!(difference(&Fresh::default()), None, "nobody does so on this machine");

        let mut other = own.clone();
        other.0.get_mut(&(Family::V4, Protocol::Udp)).expect("it was looked at").device = Some(b"vrf-blue".to_vec());

        assert_eq!(difference(&other), Some("SO_BINDTODEVICE"));
    }

    #[test]
    fn f25_given_a_host_without_a_family_or_a_process_without_descriptors_when_looked_then_both_are_told_apart() {
        let failing = |errno: i32, failing: Family| {
            Fresh::look_at(move |family, protocol| match family == failing {
                true => Err(io::Error::from_raw_os_error(errno)),
                false => open(family, protocol),
            })
        };

        let without_family = failing(libc::EAFNOSUPPORT, Family::V6).expect("it has the other one");
        let without_descriptors = failing(libc::EMFILE, Family::V4).expect_err("it is not known");

        assert!(without_family.0.keys().eq(&[(Family::V4, Protocol::Tcp), (Family::V4, Protocol::Udp)]));
        assert_eq!(without_descriptors.raw_os_error(), Some(libc::EMFILE));
    }
}
