//! The kernel's word that something of what [`Host::read`](crate::host::Host::read) tells may have changed.
//!
//! What has changed is not read from it: a machine says all it is in two answers, and half of the news is about
//! something else. Who asks, and when, is `host_watch`.

use std::io;

use rtnetlink::packet_core::NetlinkBuffer;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use crate::route_message::messages;
use crate::route_socket::watch;

/// What the kernel is asked to tell.
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_ROUTE;
/// The longest datagram that it tells it in.
const DATAGRAM: usize = 32 * 1024;

/// A socket that listens to the kernel.
#[derive(Debug)]
pub(crate) struct HostNews {
    socket: AsyncFd<Socket>,
    buffer: Box<[u8]>,
}

impl HostNews {
    /// Opens it: from now on the kernel queues what happens. Needs no right, but a tokio runtime.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUPS.cast_unsigned()))?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket: watch(socket)?, buffer: vec![0; DATAGRAM].into() })
    }

    /// Waits until there is news. May be cancelled at any time.
    pub(crate) async fn heard(&mut self) {
        loop {
            // An error means that the runtime ends.
            if let Ok(mut guard) = self.socket.readable().await {
                guard.clear_ready(); // All that is there is taken now, to the end.
            }
            if self.take() {
                return;
            }
        }
    }

    /// Takes what is there, and tells whether it is news.
    pub(crate) fn take(&mut self) -> bool {
        let mut is_news = false;
        loop {
            match self.socket.get_ref().recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT) {
                Ok(length) => {
                    is_news |= messages(&self.buffer[..length.min(DATAGRAM)]).any(|message| concerns(&message))
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return is_news,
                // More came than there was room for: what is lost may have been anything.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => is_news = true,
                Err(_) => return true,
            }
        }
    }
}

/// Whether a message may be about what `Host` holds: addresses, names of interfaces, and the routes by which this machine
/// reaches everybody. Other routes may change a thousand times a second.
fn concerns(message: &NetlinkBuffer<&[u8]>) -> bool {
    let payload = message.payload();
    match message.message_type() {
        libc::RTM_NEWADDR | libc::RTM_DELADDR => true,
        // `ifi_family`: bridges tell of their ports in the same way.
        libc::RTM_NEWLINK | libc::RTM_DELLINK => payload.first() == Some(&(libc::AF_UNSPEC as u8)),
        // `rtm_dst_len` and `rtm_type`.
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
            payload.get(1) == Some(&0) && payload.get(7) == Some(&libc::RTN_UNICAST)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of a type, with the first bytes of what it says.
    fn message(kind: u16, payload: [u8; 8]) -> Vec<u8> {
        let header = [24_u32.to_ne_bytes(), [kind.to_ne_bytes(), [0; 2]].concat().try_into().expect("four bytes")];
        [header.concat(), vec![0; 8], payload.to_vec()].concat()
    }

    fn is_news(kind: u16, payload: [u8; 8]) -> bool {
        messages(&message(kind, payload)).any(|message| concerns(&message))
    }

    #[test]
    fn given_messages_of_the_kernel_when_read_then_addresses_links_and_default_routes_are_news() {
        const ROUTE: [u8; 8] = [2, 0, 0, 0, 254, 4, 0, libc::RTN_UNICAST];

        assert!(is_news(libc::RTM_NEWADDR, [2, 24, 0, 0, 2, 0, 0, 0]));
        assert!(is_news(libc::RTM_DELADDR, [10, 64, 0, 0, 2, 0, 0, 0]));
        assert!(is_news(libc::RTM_NEWLINK, [0; 8]) && is_news(libc::RTM_DELLINK, [0; 8]));
        assert!(is_news(libc::RTM_NEWROUTE, ROUTE) && is_news(libc::RTM_DELROUTE, ROUTE));

        assert!(!is_news(libc::RTM_NEWLINK, [7, 0, 0, 0, 0, 0, 0, 0]), "a port of a bridge");
        for (index, value) in [(1, 24), (7, libc::RTN_LOCAL)] {
            let mut other = ROUTE;
            other[index] = value;
            assert!(!is_news(libc::RTM_NEWROUTE, other), "{other:?}");
        }
        assert!(!is_news(libc::RTM_NEWNEIGH, [0; 8]));
    }

    #[test]
    fn given_several_messages_in_a_datagram_when_one_is_news_then_all_are() {
        let datagram = [message(libc::RTM_NEWNEIGH, [0; 8]), message(libc::RTM_NEWADDR, [0; 8])].concat();

        assert!(messages(&datagram).any(|message| concerns(&message)));
    }
}
