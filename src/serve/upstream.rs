//! The sockets of flows to their backends, and how to know our own sockets when they come back as clients.
//!
//! Who gets a socket and when it closes is decided in `flow` and `shard`.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::serve::flow::FlowId;

/// The sockets to backends of one shard, by [`FlowId::index`]. Owned by its thread.
#[derive(Debug)]
pub(super) struct Upstreams {
    sockets: Vec<Option<Upstream>>,
    sources: Arc<OwnSources>,
}

#[derive(Debug)]
struct Upstream {
    socket: UdpSocket,
    /// Its source port: noted in [`OwnSources`].
    port: u16,
}

impl Upstreams {
    pub(super) fn new(sources: Arc<OwnSources>) -> Self {
        Self { sockets: Vec::new(), sources }
    }

    /// Keeps a connected socket until its flow closes.
    pub(super) fn insert(&mut self, flow: FlowId, socket: UdpSocket) -> io::Result<()> {
        let source = socket.local_addr()?;
        if self.sockets.len() <= flow.index() {
            self.sockets.resize_with(flow.index() + 1, || None);
        }
        self.close(flow);
        self.sources.note(source);
        self.sockets[flow.index()] = Some(Upstream { socket, port: source.port() });
        Ok(())
    }

    pub(super) fn get(&self, flow: FlowId) -> Option<&UdpSocket> {
        self.sockets.get(flow.index())?.as_ref().map(|upstream| &upstream.socket)
    }

    /// Closes a flow's socket, which takes it out of the epoll instance, too.
    pub(super) fn close(&mut self, flow: FlowId) {
        if let Some(upstream) = self.sockets.get_mut(flow.index()).and_then(Option::take) {
            self.sources.forget(upstream.port); // before another process can have the port
        }
    }

    /// True where a client is a flow's socket of this process, of any shard.
    pub(super) fn is_own(&self, client: SocketAddr) -> bool {
        self.sources.contains(client)
    }

    /// Closes all sockets.
    pub(super) fn clear(&mut self) {
        for upstream in self.sockets.drain(..).flatten() {
            self.sources.forget(upstream.port);
        }
    }
}

impl Drop for Upstreams {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The source addresses of all flows of this process: an entry for each port, as the kernel gives a port of a connected
/// UDP socket to nobody else on the host. Written by the shard that holds the port, read by all.
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
    use super::*;

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
}
