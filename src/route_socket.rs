//! The two sockets to the kernel about local routes: one that asks, one that listens to what others do.
//!
//! Messages are in `route_message`; what to ask for is decided in `vip_routes`.

use std::io;
use std::net::IpAddr;

use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::yield_now;

use crate::name::Family;
use crate::route_message::{Heard, read, write_change, write_look};
use crate::vip_routes::{Change, LocalRoute, News};

/// Changes that are sent at once. The kernel answers each that it refuses before the call returns, and has room for 270
/// answers by default; what it tells our own listening socket of those that it makes has to fit as well.
pub(crate) const BATCH: usize = 128;
/// The longest datagram that the kernel tells routes in.
const DATAGRAM: usize = 32 * 1024;
/// Bytes of news that may wait, as far as `net.core.rmem_max` allows it.
const ROOM: i32 = 1 << 20;
/// Datagrams of news that are taken at once: others have their turn before the next.
const READS: usize = 4_096;
/// How often all routes are read anew, where they change all the time while they are told.
const LOOKS: usize = 5;

/// Why a change is not known to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotMade {
    /// The kernel would not.
    Refused(Errno),
    /// It did not say whether it would: no answer could be read.
    Unanswered(Errno),
}

impl NotMade {
    /// What the kernel said, or why it could not be heard.
    pub(crate) fn error(self) -> Errno {
        match self {
            Self::Refused(error) | Self::Unanswered(error) => error,
        }
    }
}

/// The socket that asks. Each call is over in as long as the kernel works: it answers before a call to send returns.
#[derive(Debug)]
pub(crate) struct RouteSocket {
    socket: Socket,
    /// Number of the next request.
    next: u32,
    /// Our number among the makers of routes.
    protocol: u8,
    buffer: Box<[u8]>,
}

impl RouteSocket {
    /// Opens it. Changes nothing, and needs no right.
    pub(crate) fn open(protocol: u8) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Have the kernel tell local routes alone, and answers without the question. Older ones do not know how: the
        // rest is passed over here.
        let _ = socket.set_netlink_get_strict_chk(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, next: 1, protocol, buffer: vec![0; DATAGRAM].into() })
    }

    /// Carries changes out, [`BATCH`] at most, and tells what became of each.
    pub(crate) fn change(&mut self, changes: &[Change]) -> Vec<Result<(), NotMade>> {
        debug_assert!(changes.len() <= BATCH);
        let mut outcomes = vec![Ok(()); changes.len()];
        let first = match self.send(changes) {
            Ok(first) => first,
            Err(error) => {
                outcomes.fill(Err(NotMade::Refused(error))); // The kernel has seen none of them.
                return outcomes;
            }
        };
        if let Err(error) = self.hear_answers(first, &mut outcomes) {
            let unanswered = outcomes.iter_mut().filter(|outcome| outcome.is_ok());
            unanswered.for_each(|outcome| *outcome = Err(NotMade::Unanswered(error)));
        }
        outcomes
    }

    /// All local routes of both families.
    pub(crate) fn look(&mut self) -> io::Result<Vec<LocalRoute>> {
        let looked = self.look_at_both();
        // The kernel may be half-way through telling, and tells nothing else on this socket until it is done.
        if looked.is_err()
            && let Ok(fresh) = Self::open(self.protocol)
        {
            *self = fresh;
        }
        looked
    }

    fn look_at_both(&mut self) -> io::Result<Vec<LocalRoute>> {
        let mut routes = Vec::new();
        for family in [Family::V4, Family::V6] {
            match self.look_at(family) {
                Ok(more) => routes.extend(more),
                Err(error) if is_missing_table(family, &error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(routes)
    }

    /// Tells the number of the first change; the others follow.
    fn send(&mut self, changes: &[Change]) -> Result<u32, Errno> {
        let first = self.next;
        if changes.is_empty() {
            return Ok(first);
        }
        self.next = first.wrapping_add(changes.len() as u32);
        let mut request = Vec::with_capacity(changes.len() * 64);
        for (place, change) in changes.iter().enumerate() {
            let number = first.wrapping_add(place as u32);
            // Refusals come in any case. The last one's answer says that all have been seen.
            let is_last = place + 1 == changes.len();
            write_change(*change, self.protocol, number, is_last, &mut request);
        }
        self.socket.send(&request, 0).map_err(errno)?;
        Ok(first)
    }

    fn hear_answers(&mut self, first: u32, outcomes: &mut [Result<(), NotMade>]) -> Result<(), Errno> {
        let Some(last) = outcomes.len().checked_sub(1) else { return Ok(()) };
        loop {
            for heard in self.receive().map_err(errno)? {
                let Heard::Answer(number, outcome) = heard else { continue };
                let place = number.wrapping_sub(first) as usize;
                if let Some(known) = outcomes.get_mut(place) {
                    *known = outcome.map_err(NotMade::Refused);
                }
                if place == last {
                    return Ok(());
                }
            }
        }
    }

    fn look_at(&mut self, family: Family) -> io::Result<Vec<LocalRoute>> {
        for _ in 0..LOOKS {
            if let Some(routes) = self.try_look_at(family)? {
                return Ok(routes);
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// `None` where they changed while they were told.
    fn try_look_at(&mut self, family: Family) -> io::Result<Option<Vec<LocalRoute>>> {
        let ours = self.next;
        self.next = self.next.wrapping_add(1);
        let mut request = Vec::new();
        write_look(family, ours, &mut request);
        self.socket.send(&request, 0)?;
        let (mut routes, mut whole) = (Vec::new(), true);
        loop {
            for heard in self.receive()? {
                match heard {
                    // Others are left from a look that was given up.
                    Heard::News(number, News::Appeared(route)) if number == ours => routes.push(route),
                    Heard::Interrupted(number) if number == ours => whole = false,
                    Heard::Answer(number, outcome) | Heard::End(number, outcome) if number == ours => {
                        outcome?;
                        routes.retain(|route| Family::of(route.net.addr()) == family);
                        return Ok(whole.then_some(routes));
                    }
                    _ => {}
                }
            }
        }
    }

    /// One datagram. Never waits: what the kernel has to say is there.
    fn receive(&mut self) -> io::Result<Vec<Heard>> {
        let length = self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT)?;
        Ok(read(&self.buffer[..length.min(DATAGRAM)], self.protocol).collect())
    }
}

/// True where this machine has no such table: it does not speak IPv6, or loopback has never been up. A kernel that does not
/// tell routes of IPv4 tells none.
fn is_missing_table(family: Family, error: &io::Error) -> bool {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => true,
        Some(Errno::OPNOTSUPP | Errno::AFNOSUPPORT) => family == Family::V6,
        _ => false,
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// The changes that remove our routes to these addresses.
pub(crate) fn removals(addresses: &[IpAddr]) -> Vec<Change> {
    addresses.iter().copied().map(Change::Remove).collect()
}

/// The socket that listens.
#[derive(Debug)]
pub(crate) struct RouteNews {
    socket: AsyncFd<Socket>,
    protocol: u8,
    buffer: Box<[u8]>,
    /// True where not all was taken that is there.
    more: bool,
}

impl RouteNews {
    /// Opens it: from now on the kernel queues what becomes of routes and interfaces. Needs no right, but a tokio runtime.
    pub(crate) fn open(protocol: u8) -> io::Result<Self> {
        const GROUPS: i32 =
            libc::RTMGRP_IPV4_ROUTE | libc::RTMGRP_IPV6_ROUTE | libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR;
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUPS.cast_unsigned()))?;
        socket.set_non_blocking(true)?;
        let _ = socket.set_rx_buf_sz(ROOM); // What does not fit is noticed, and everything looked at then.
        Ok(Self { socket: watch(socket)?, protocol, buffer: vec![0; DATAGRAM].into(), more: false })
    }

    /// Waits until there may be news.
    pub(crate) async fn readable(&self) {
        if self.more {
            return yield_now().await;
        }
        // An error means that the runtime ends.
        if let Ok(mut guard) = self.socket.readable().await {
            guard.clear_ready(); // What is there is taken now, to the end, or there is `more`.
        }
    }

    /// What is there, in its order: the first part of it, where it is very much.
    pub(crate) fn take(&mut self) -> Vec<News> {
        self.take_reads(READS)
    }

    fn take_reads(&mut self, reads: usize) -> Vec<News> {
        let mut news = Vec::new();
        self.more = false;
        for _ in 0..reads {
            let length = match self.socket.get_ref().recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return news,
                Err(error) => {
                    // More came than there was room for.
                    tracing::debug!(%error, "news of routes are lost");
                    news.push(News::Unknown);
                    if Errno::from_io_error(&error) == Some(Errno::NOBUFS) {
                        continue;
                    }
                    return news;
                }
            };
            let heard = read(&self.buffer[..length.min(DATAGRAM)], self.protocol);
            news.extend(heard.filter_map(|heard| match heard {
                Heard::News(_, news) => Some(news),
                _ => None,
            }));
        }
        self.more = true;
        news
    }
}

/// Has the runtime tell when there is something to read.
#[allow(unsafe_code)] // The runtime's only way to watch a descriptor that is not one of its own sockets.
pub(crate) fn watch(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: the socket owns its descriptor and goes into the AsyncFd: it stays open, and the same one, until that is
    // dropped.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number that nobody uses: what these tests ask changes nothing, and would be seen.
    const UNUSED: u8 = 254;

    #[test]
    fn given_this_machine_when_looked_at_then_loopback_is_local_by_others() {
        let mut socket = match RouteSocket::open(UNUSED) {
            Ok(socket) => socket,
            Err(error) => return eprintln!("skipped, no rtnetlink here: {error}"),
        };

        let routes = socket.look().expect("the kernel answers");

        let loopback = LocalRoute { net: "127.0.0.0/8".parse().expect("a network"), own: false };
        assert!(routes.contains(&loopback), "{routes:?}");
        assert!(routes.iter().all(|route| !route.own), "{routes:?}");
    }

    #[test]
    fn given_errors_of_a_look_when_told_apart_then_a_table_that_is_missing_is_none() {
        let is_missing = |family, error: Errno| is_missing_table(family, &error.into());

        assert!([Family::V4, Family::V6].into_iter().all(|family| is_missing(family, Errno::NOENT)));
        assert!(is_missing(Family::V6, Errno::AFNOSUPPORT) && !is_missing(Family::V4, Errno::OPNOTSUPP));
        assert!(!is_missing(Family::V6, Errno::NOBUFS));
    }

    #[test]
    fn given_routes_that_are_not_there_when_removed_then_each_has_an_answer_of_its_own() {
        let mut socket = match RouteSocket::open(UNUSED) {
            Ok(socket) => socket,
            Err(error) => return eprintln!("skipped, no rtnetlink here: {error}"),
        };
        let nobodys = [1, 2, 3].map(|number| IpAddr::from([203, 0, 113, number]));

        let outcomes = socket.change(&removals(&nobodys));

        assert_eq!(outcomes.len(), 3);
        for outcome in outcomes {
            // Root hears that there is none, everybody else that he may not ask.
            assert!(matches!(outcome, Err(NotMade::Refused(Errno::SRCH | Errno::PERM))), "{outcome:?}");
        }
        assert_eq!(socket.change(&[]), []);
    }

    #[tokio::test]
    async fn given_a_listening_socket_when_nothing_happens_then_nothing_is_taken() {
        match RouteNews::open(UNUSED) {
            Ok(mut news) => assert!(news.take().iter().all(|news| *news != News::Unknown)),
            Err(error) => eprintln!("skipped, no rtnetlink here: {error}"),
        }
    }

    #[tokio::test]
    async fn given_more_news_than_are_taken_at_once_when_the_first_are_taken_then_the_rest_is_to_be_taken() {
        let (mut news, mut sender) = match (RouteNews::open(UNUSED), Socket::new(NETLINK_ROUTE)) {
            (Ok(news), Ok(sender)) => (news, sender),
            (Err(error), _) | (_, Err(error)) => return eprintln!("skipped, no rtnetlink here: {error}"),
        };
        let mut port = SocketAddr::new(0, 0);
        news.socket.get_ref().get_address(&mut port).expect("it is bound");
        sender.bind_auto().expect("a port");
        for _ in 0..3 {
            if let Err(error) = sender.send_to(&[0; 16], &SocketAddr::new(port.port_number(), 0), 0) {
                return eprintln!("skipped, no right to send to it: {error}");
            }
        }
        news.readable().await;

        news.take_reads(2);
        assert!(news.more);
        news.readable().await; // The kernel tells of nothing new.

        news.take();
        assert!(!news.more);
    }
}
