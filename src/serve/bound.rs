//! The sockets of bound listeners, and how each follows its target: who reads from it, when nobody does, and whom the
//! kernel keeps out.
//!
//! | the target | TCP | UDP |
//! |---|---|---|
//! | serves some side | a task accepts | shards read |
//! | gives some sources no answer | and a filter drops their SYNs | and a filter drops their datagrams |
//! | rejects both sides | parked: the kernel refuses | parked: the kernel tells *port unreachable* |
//!
//! What a target says is decided in `plan`, when to act in `listeners`; options and system calls are in `socket`,
//! `mmsg` and `filter`.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::warn;

use crate::name::{Family, ListenKey, Protocol};
use crate::plan::Listener;
use crate::serve::filter::Filter;
use crate::serve::tcp::{TcpServer, TcpShared};
use crate::serve::udp::{UdpServer, UdpShards};
use crate::serve::{Target, TargetCell, socket, udp};
use crate::stats::PROCESS;

/// Who serves. Owned by `Listeners`, by value.
#[derive(Debug)]
pub(super) struct Servers {
    tcp: Arc<TcpShared>,
    pub(super) udp: UdpShards,
    /// Why sockets got no filter, as far as it was said.
    told: BTreeSet<String>,
}

/// Who holds a bound listener's socket.
#[derive(Debug)]
pub(super) enum Bound {
    /// A task accepts from it.
    Tcp(TcpSocket, TcpServer),
    /// Nobody: its port is held, connects are refused.
    ParkedTcp(TcpSocket),
    /// Shards read from it.
    Udp {
        server: UdpServer,
        /// True where the kernel drops some of what comes.
        filtered: bool,
    },
    /// Nobody: senders get port unreachable.
    ParkedUdp(UdpSocket),
}

/// A TCP listener's socket. It keeps its filter while it is parked.
#[derive(Debug)]
pub(super) struct TcpSocket {
    pub(super) socket: Arc<OwnedFd>,
    /// True where the kernel drops some of what comes.
    filtered: bool,
}

impl Servers {
    /// Nothing is bound yet.
    pub(super) fn new(tcp: Arc<TcpShared>, udp: UdpShards) -> Self {
        Self { tcp, udp, told: BTreeSet::new() }
    }

    /// Opens a listener's socket in the state that its target asks for.
    pub(super) fn open(&mut self, key: ListenKey, wanted: &Listener, target: &TargetCell) -> io::Result<Bound> {
        match (key.protocol, wanted.target.parked()) {
            (Protocol::Tcp, true) => {
                let socket = socket::listen_tcp(key)?;
                socket::park_tcp(&socket)?;
                Ok(Bound::ParkedTcp(TcpSocket { socket: socket.into(), filtered: false }))
            }
            (Protocol::Tcp, false) => {
                let mut bound = TcpSocket { socket: socket::bind_tcp(key)?.into(), filtered: false };
                self.filter_tcp(key, &mut bound, &target.load())?; // Before anybody can connect.
                socket::listen(&bound.socket)?;
                self.accept_from(key, bound, target)
            }
            (Protocol::Udp, true) => Ok(Bound::ParkedUdp(udp::hold_udp(key.address())?)),
            (Protocol::Udp, false) => self.open_udp(key, wanted, target),
            (Protocol::Sctp, _) => Err(io::Error::new(io::ErrorKind::Unsupported, "SCTP is not served")),
        }
    }

    /// Gives a bound socket the state that its new target asks for. What it has accepted goes on.
    pub(super) async fn settle(
        &mut self,
        key: ListenKey,
        bound: Bound,
        wanted: &Listener,
        target: &TargetCell,
    ) -> io::Result<Bound> {
        match (bound, wanted.target.parked()) {
            (Bound::Tcp(bound, server), true) => {
                server.stop().await; // A parked socket that is still registered makes its event loop spin.
                socket::park_tcp(&bound.socket)?;
                Ok(Bound::ParkedTcp(bound))
            }
            (Bound::Tcp(mut bound, server), false) => {
                self.filter_tcp(key, &mut bound, &target.load())?;
                Ok(Bound::Tcp(bound, server))
            }
            (Bound::ParkedTcp(mut bound), false) => {
                self.filter_tcp(key, &mut bound, &target.load())?;
                socket::revive_tcp(&bound.socket)?;
                self.accept_from(key, bound, target)
            }
            (Bound::Udp { server, .. }, true) => {
                self.udp.remove(server).await;
                Ok(Bound::ParkedUdp(udp::hold_udp(key.address())?))
            }
            (Bound::Udp { server, filtered }, false) => {
                self.udp.set_idle(server, wanted.udp_settings());
                self.udp.sweep(server); // Flows of the last owner, or of sources that are served no more, end.
                let filtered = self.filter_udp(key, server, filtered, &target.load());
                Ok(Bound::Udp { server, filtered })
            }
            (Bound::ParkedUdp(holder), false) => {
                drop(holder);
                self.open_udp(key, wanted, target)
            }
            (parked @ (Bound::ParkedTcp(_) | Bound::ParkedUdp(_)), true) => Ok(parked),
        }
    }

    /// Closes a socket. When this is done, its address is free.
    pub(super) async fn release(&self, bound: Bound) {
        match bound {
            Bound::Tcp(bound, server) => {
                drop(bound);
                server.stop().await;
            }
            Bound::Udp { server, .. } => self.udp.remove(server).await,
            Bound::ParkedTcp(_) | Bound::ParkedUdp(_) => {}
        }
    }

    fn accept_from(&self, key: ListenKey, bound: TcpSocket, target: &TargetCell) -> io::Result<Bound> {
        let server = TcpServer::start(Arc::clone(&bound.socket), key, Arc::clone(target), Arc::clone(&self.tcp))?;
        Ok(Bound::Tcp(bound, server))
    }

    fn open_udp(&mut self, key: ListenKey, wanted: &Listener, target: &TargetCell) -> io::Result<Bound> {
        let server = self.udp.open(key, Arc::clone(target), wanted.udp_settings())?;
        let filtered = self.filter_udp(key, server, false, &target.load());
        Ok(Bound::Udp { server, filtered })
    }

    /// Gives a socket the filter that the target asks for, or none. Without one where it should be, the server task
    /// turns clients away: a reset instead of silence.
    ///
    /// # Errors
    /// A filter that should go stays: it would drop what is to be served.
    fn filter_tcp(&mut self, key: ListenKey, bound: &mut TcpSocket, target: &Target) -> io::Result<()> {
        let filter = self.filter(key, target);
        let attached = filter.is_some_and(|filter| {
            let outcome = filter.attach(&bound.socket);
            outcome.inspect_err(|error| self.fall_back(key, error, "run it with CAP_NET_ADMIN")).is_ok()
        });
        if bound.filtered && !attached {
            Filter::detach(&bound.socket)?;
        }
        bound.filtered = attached;
        Ok(())
    }

    /// Has the shards filter as the target asks for; true where they do. Without a filter they judge each datagram:
    /// silence all the same.
    fn filter_udp(&mut self, key: ListenKey, server: UdpServer, filtered: bool, target: &Target) -> bool {
        let filter = self.filter(key, target);
        let filters = filter.is_some();
        if filters || filtered {
            self.udp.set_filter(server, filter);
        }
        filters
    }

    fn filter(&mut self, key: ListenKey, target: &Target) -> Option<Filter> {
        let filter = Filter::of_target(target, Family::of(key.ip()));
        filter.inspect_err(|error| self.fall_back(key, error, "name fewer networks")).ok().flatten()
    }

    /// Counts that a listener works without its filter, and says each cause once.
    fn fall_back(&mut self, key: ListenKey, error: &impl Display, remedy: &str) {
        PROCESS.filter_fallbacks.increment();
        if self.told.insert(error.to_string()) {
            warn!(listen = %key, %error, remedy, "no filter: sources that should get no answer are reset after accept");
        }
    }
}
