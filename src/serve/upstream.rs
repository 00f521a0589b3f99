//! The sockets of flows to their backends, and how to know our own sockets when they come back as clients.
//!
//! Who gets a socket and when it closes is decided in `flow` and `shard`.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::epoll;

use crate::name::Family;
use crate::serve::doubt::Doubt;
use crate::serve::flow::FlowId;
use crate::serve::socket::has_foreign_source;

/// The sockets to backends of one shard, by [`FlowId::index`]. Owned by its thread.
#[derive(Debug)]
pub(super) struct Upstreams {
    sockets: Vec<Option<Upstream>>,
    sources: Arc<OwnSources>,
    /// How many of them are in [`Doubt`].
    doubts: usize,
}

#[derive(Debug)]
struct Upstream {
    socket: UdpSocket,
    /// Its source port, noted in [`OwnSources`]; `None` where its source is a client's.
    port: Option<u16>,
    doubt: Option<Doubt>,
}

/// Whose source address a socket has.
///
/// A process that takes a flow over with its socket has to know: it notes its own in [`OwnSources`], and those of clients need
/// their answers led to it (`reply_path`) before the first one is served. The socket tells, by IP_TRANSPARENT. What is known of
/// ways back need not be handed over, as it is found out anew; but a flow's [`Doubt`] has to. A TCP connection has nothing of
/// the kind but its sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// This node.
    Node,
    /// The flow's client.
    Client,
}

impl Owner {
    /// Whose source address a connected socket has, as the kernel knows it.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(super) fn of(socket: &UdpSocket) -> io::Result<Self> {
        let family = Family::of(socket.local_addr()?.ip());
        Ok(if has_foreign_source(socket, family)? { Self::Client } else { Self::Node })
    }
}

impl Upstreams {
    pub(super) fn new(sources: Arc<OwnSources>) -> Self {
        Self { sockets: Vec::new(), sources, doubts: 0 }
    }

    /// Keeps a connected socket until its flow closes.
    pub(super) fn insert(
        &mut self,
        flow: FlowId,
        socket: UdpSocket,
        owner: Owner,
        doubt: Option<Doubt>,
    ) -> io::Result<()> {
        let source = socket.local_addr()?;
        if self.sockets.len() <= flow.index() {
            self.sockets.resize_with(flow.index() + 1, || None);
        }
        self.close(flow);
        // A client may have the port of one of our own, at its own address.
        let port = (owner == Owner::Node).then(|| source.port());
        if port.is_some() {
            self.sources.note(source);
        }
        self.doubts += usize::from(doubt.is_some());
        self.sockets[flow.index()] = Some(Upstream { socket, port, doubt });
        Ok(())
    }

    /// True where some socket's first answer is awaited for what it tells.
    pub(super) fn has_doubts(&self) -> bool {
        self.doubts > 0
    }

    /// What the first answer over a flow's socket would tell.
    pub(super) fn doubt(&self, flow: FlowId) -> Option<Doubt> {
        self.sockets.get(flow.index())?.as_ref()?.doubt
    }

    /// The same, as it has come, or is awaited no more.
    pub(super) fn take_doubt(&mut self, flow: FlowId) -> Option<Doubt> {
        let doubt = self.sockets.get_mut(flow.index())?.as_mut()?.doubt.take();
        self.doubts -= usize::from(doubt.is_some());
        doubt
    }

    /// Puts another doubt in the place of one.
    pub(super) fn replace_doubt(&mut self, flow: FlowId, next: Doubt) {
        if let Some(Some(Upstream { doubt: Some(doubt), .. })) = self.sockets.get_mut(flow.index()) {
            *doubt = next;
        }
    }

    pub(super) fn get(&self, flow: FlowId) -> Option<&UdpSocket> {
        self.sockets.get(flow.index())?.as_ref().map(|upstream| &upstream.socket)
    }

    /// Closes a flow's socket, which takes it out of the epoll instance, too.
    pub(super) fn close(&mut self, flow: FlowId) {
        if let Some(upstream) = self.sockets.get_mut(flow.index()).and_then(Option::take) {
            self.doubts -= usize::from(upstream.doubt.is_some());
            upstream.port.into_iter().for_each(|port| self.sources.forget(port)); // before another process can have the port
        }
    }

    /// Lets go of a flow's socket that another process has, too: closing alone would leave it in the epoll instance.
    pub(super) fn release(&mut self, flow: FlowId, epoll: &OwnedFd) {
        if let Some(socket) = self.get(flow) {
            let _ = epoll::delete(epoll, socket); // Not there only where it never was.
        }
        self.close(flow);
    }

    /// True where a client is a flow's socket of this process, of any shard.
    pub(super) fn is_own(&self, client: SocketAddr) -> bool {
        self.sources.contains(client)
    }

    /// Closes all sockets.
    pub(super) fn clear(&mut self) {
        self.sockets
            .drain(..)
            .flatten()
            .filter_map(|upstream| upstream.port)
            .for_each(|port| self.sources.forget(port));
        self.doubts = 0;
    }
}

impl Drop for Upstreams {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The source addresses of all flows of this process that are this node's: an entry for each port, as the kernel gives a port
/// of a connected UDP socket to nobody else on the host. Written by the shard that holds the port, read by all.
///
/// An entry is the address in 32 bits: an IPv4 address as it is, an IPv6 address folded. Of 2³² foreign IPv6 clients
/// with the same port, one is taken for ours while that port is in use.
#[derive(Debug)]
pub(super) struct OwnSources(Box<[AtomicU32]>);

impl Default for OwnSources {
    fn default() -> Self {
        Self((0..=u16::MAX).map(|_| AtomicU32::new(0)).collect())
    }
}

impl OwnSources {
    fn note(&self, source: SocketAddr) {
        // Release, with the Acquire of `contains`: noted before anything is sent from there.
        self.0[usize::from(source.port())].store(fold(source.ip()), Ordering::Release);
    }

    fn forget(&self, port: u16) {
        self.0[usize::from(port)].store(0, Ordering::Release);
    }

    fn contains(&self, client: SocketAddr) -> bool {
        self.0[usize::from(client.port())].load(Ordering::Acquire) == fold(client.ip())
    }
}

/// Never 0 for an address that a socket can have.
fn fold(ip: IpAddr) -> u32 {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.to_bits(),
        IpAddr::V6(v6) => {
            v6.segments().chunks_exact(2).fold(0_u32, |sum, pair| {
                sum.rotate_left(5).wrapping_mul(0x9e37_79b1) ^ (u32::from(pair[0]) << 16 | u32::from(pair[1]))
            }) | 1
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::serve::preserve::Side;
    use crate::serve::way_back::ClientKey;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn given_sources_when_noted_then_exactly_these_are_ours_until_they_are_forgotten() {
        let sources = OwnSources::default();
        sources.note(address("10.0.0.1:40000"));
        sources.note(address("[fd00::1]:40001"));

        assert!(sources.contains(address("10.0.0.1:40000")));
        assert!(sources.contains(address("[fd00::1]:40001")));
        for other in ["10.0.0.2:40000", "10.0.0.1:40001", "[fd00::2]:40001", "[fd00::1]:40000", "127.0.0.1:53"] {
            assert!(!sources.contains(address(other)), "{other}");
        }
        sources.forget(40000);
        assert!(!sources.contains(address("10.0.0.1:40000")));
    }

    #[test]
    fn f25_given_sockets_when_asked_whose_address_they_have_then_the_kernel_tells() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(socket) = UdpSocket::bind(address) else { continue }; // No IPv6 here.
            assert_eq!(Owner::of(&socket).expect("it is bound"), Owner::Node);
            let family = Family::of(socket.local_addr().expect("bound").ip());
            match crate::serve::socket::allow_foreign_source(&socket, family) {
                Ok(()) => assert_eq!(Owner::of(&socket).expect("it is bound"), Owner::Client),
                Err(error) => eprintln!("skipped, that needs CAP_NET_ADMIN: {error}"),
            }
        }
    }

    #[test]
    fn given_sockets_of_clients_and_of_ours_when_kept_then_ours_alone_are_noted_and_doubts_are_counted() {
        let sources = Arc::<OwnSources>::default();
        let mut upstreams = Upstreams::new(Arc::clone(&sources));
        let socket = || UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let (ours, clients) = (socket(), socket());
        let [of_ours, of_client] = [&ours, &clients].map(|socket| socket.local_addr().expect("bound"));
        let doubt = Doubt::of_client(Side::sample(), ClientKey::of(of_client.ip()), Instant::now());
        let [one, two] = [0, 1].map(FlowId::from_bits);

        upstreams.insert(one, ours, Owner::Node, None).expect("kept");
        upstreams.insert(two, clients, Owner::Client, Some(doubt)).expect("kept");

        assert!(sources.contains(of_ours) && !sources.contains(of_client));
        assert_eq!((upstreams.has_doubts(), upstreams.doubt(one), upstreams.doubt(two)), (true, None, Some(doubt)));
        assert_eq!((upstreams.take_doubt(two), upstreams.take_doubt(two)), (Some(doubt), None), "once");
        assert!(!upstreams.has_doubts());
        upstreams.insert(two, socket(), Owner::Client, Some(doubt)).expect("kept");
        upstreams.close(two);
        assert!(!upstreams.has_doubts() && sources.contains(of_ours));
        upstreams.clear();
        assert!(!sources.contains(of_ours));
    }
}
