//! The kernel's word that somebody has changed rules of nf_tables, or those that lead to tables of routes.
//!
//! What has changed is not read from it: `reply_path` looks whether all of its own is there. Until then answers would go to
//! clients, who reset connections that they know nothing of, so each moment counts.

use std::io;

use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use crate::route_socket::watch;

/// Groups, as bits: `NFNLGRP_NFTABLES`, and `RTNLGRP_IPV4_RULE` with `RTNLGRP_IPV6_RULE`.
const FILTERS: u32 = 1 << (7 - 1);
const RULES: u32 = 1 << (8 - 1) | 1 << (19 - 1);
/// Datagrams that are taken at once: others have their turn before the next.
const READS: usize = 256;

/// The sockets that listen.
#[derive(Debug)]
pub(crate) struct ReplyNews {
    filters: AsyncFd<Socket>,
    rules: AsyncFd<Socket>,
}

impl ReplyNews {
    /// Opens them: from now on the kernel queues what happens. Needs CAP_NET_ADMIN, and a tokio runtime.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { filters: listen(NETLINK_NETFILTER, FILTERS)?, rules: listen(NETLINK_ROUTE, RULES)? })
    }

    /// Waits until something has happened. May be cancelled at any time.
    pub(crate) async fn heard(&self) {
        tokio::select! {
            () = heard(&self.filters) => (),
            () = heard(&self.rules) => (),
        }
    }
}

fn listen(protocol: isize, groups: u32) -> io::Result<AsyncFd<Socket>> {
    let mut socket = Socket::new(protocol)?;
    socket.bind(&SocketAddr::new(0, groups))?;
    socket.set_non_blocking(true)?;
    watch(socket)
}

async fn heard(socket: &AsyncFd<Socket>) {
    loop {
        // An error means that the runtime ends.
        let Ok(mut ready) = socket.readable().await else { return std::future::pending().await };
        let (is_news, is_all) = take(socket.get_ref());
        if is_all {
            ready.clear_ready();
        }
        if is_news {
            return;
        }
    }
}

/// Throws away what is there: whether that was anything, and all.
fn take(socket: &Socket) -> (bool, bool) {
    for count in 0..READS {
        // Of each datagram the first byte: the kernel drops the rest.
        match socket.recv(&mut &mut [0_u8; 1][..], libc::MSG_DONTWAIT) {
            Ok(_) => {}
            // More came than there was room for: that is news, too.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => {}
            Err(_) => return (count > 0, true),
        }
    }
    (true, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn given_nobody_who_changes_rules_when_taken_then_there_is_no_news() {
        let news = match ReplyNews::open() {
            Ok(news) => news,
            Err(error) => return eprintln!("skipped, no right or no nf_tables here: {error}"),
        };

        let (_, is_all) = take(news.rules.get_ref());
        assert!(is_all && take(news.rules.get_ref()) == (false, true), "nobody changes rules of routes here");
    }
}
