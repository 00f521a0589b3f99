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
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::slice;
use std::sync::Arc;

use tracing::warn;

use crate::fd_store::{self, FdStore};
use crate::name::{Family, ListenKey, Protocol};
use crate::plan::Listener;
use crate::serve::filter::{Filter, TooLong};
use crate::serve::passed::Passed;
use crate::serve::tcp::{TcpServer, TcpShared};
use crate::serve::udp::{UdpServer, UdpShards};
use crate::serve::{Target, TargetCell, socket, udp};
use crate::stats::PROCESS;

/// Who serves. Owned by `Listeners`, by value.
#[derive(Debug)]
pub(super) struct Servers {
    tcp: Arc<TcpShared>,
    pub(super) udp: UdpShards,
    /// What of their sockets outlives this process.
    pub(super) store: FdStore,
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

/// A listener's sockets as [`Servers::open`] leaves them.
#[derive(Debug)]
pub(super) enum Opened {
    /// It listens, with its filter unless that is missing.
    Tcp(TcpSocket, Option<NoFilter>),
    /// Connects are refused.
    ParkedTcp(TcpSocket),
    /// One for each shard that is to read. What filters them is set by these.
    Udp(Vec<UdpSocket>),
    /// Senders get port unreachable.
    ParkedUdp(UdpSocket),
}

/// Why a socket has not the filter that it should have.
#[derive(Debug)]
pub(super) struct NoFilter {
    cause: String,
    /// What the operator can do.
    remedy: &'static str,
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
        Self { tcp, udp, store: FdStore::default(), told: BTreeSet::new() }
    }

    /// Opens a listener's sockets in the state that its target asks for; nobody serves there yet. System calls and nothing
    /// else: several threads may do this at once.
    pub(super) fn open(&self, key: ListenKey, wanted: &Listener, target: &Target) -> io::Result<Opened> {
        Ok(match (key.protocol, wanted.target.parked()) {
            (Protocol::Tcp, true) => {
                let socket = socket::listen_tcp(key)?;
                socket::park_tcp(&socket)?;
                Opened::ParkedTcp(TcpSocket::unfiltered(socket))
            }
            (Protocol::Tcp, false) => {
                let mut socket = TcpSocket::unfiltered(socket::bind_tcp(key)?);
                let missing = socket.filter(key, target)?; // Before anybody can connect.
                socket::listen(&socket.socket)?;
                Opened::Tcp(socket, missing)
            }
            (Protocol::Udp, true) => Opened::ParkedUdp(udp::hold_udp(key.address())?),
            (Protocol::Udp, false) => Opened::Udp(self.udp.bind(key, wanted.udp_settings())?),
            (Protocol::Sctp, _) => return Err(io::Error::new(io::ErrorKind::Unsupported, "SCTP is not served")),
        })
    }

    /// Has what was [opened](Self::open) served, unless it is parked.
    pub(super) fn serve(
        &mut self,
        key: ListenKey,
        opened: Opened,
        wanted: &Listener,
        target: &TargetCell,
    ) -> io::Result<Bound> {
        Ok(match opened {
            Opened::Tcp(socket, missing) => {
                self.tell_of(key, missing);
                return self.accept_from(key, socket, target);
            }
            Opened::ParkedTcp(socket) => Bound::ParkedTcp(socket),
            Opened::Udp(sockets) => {
                self.store.keep(key, &sockets);
                let server = self.udp.add(key, sockets, Arc::clone(target), wanted.udp_settings());
                let filtered = self.filter_udp(key, server, false, &target.load());
                Bound::Udp { server, filtered }
            }
            Opened::ParkedUdp(socket) => Bound::ParkedUdp(socket),
        })
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
                self.store.forget(&key);
                Ok(Bound::ParkedTcp(bound))
            }
            (Bound::Tcp(mut bound, server), false) => {
                let missing = bound.filter(key, &target.load())?;
                self.tell_of(key, missing);
                Ok(Bound::Tcp(bound, server))
            }
            (Bound::ParkedTcp(mut bound), false) => {
                let missing = bound.filter(key, &target.load())?;
                self.tell_of(key, missing);
                socket::revive_tcp(&bound.socket)?;
                self.accept_from(key, bound, target)
            }
            (Bound::Udp { server, .. }, true) => {
                self.udp.remove(server).await;
                self.hold_udp(key).await
            }
            (Bound::Udp { server, filtered }, false) => {
                self.udp.set_idle(server, wanted.udp_settings());
                self.udp.sweep(server); // Flows of the last owner, or of sources that are served no more, end.
                let filtered = self.filter_udp(key, server, filtered, &target.load());
                Ok(Bound::Udp { server, filtered })
            }
            (Bound::ParkedUdp(holder), false) => {
                drop(holder);
                let opened = self.open(key, wanted, &target.load())?;
                self.serve(key, opened, wanted, target)
            }
            (parked @ (Bound::ParkedTcp(_) | Bound::ParkedUdp(_)), true) => Ok(parked),
        }
    }

    /// The sockets of a bound listener, for another process. They are served as before.
    ///
    /// # Errors
    /// No descriptor is left for copies.
    pub(super) async fn lend(&self, key: ListenKey, bound: &Bound) -> io::Result<Passed> {
        let (parked, sockets) = match bound {
            Bound::Tcp(bound, _) => (false, vec![Arc::clone(&bound.socket)]),
            Bound::ParkedTcp(bound) => (true, vec![Arc::clone(&bound.socket)]),
            Bound::Udp { server, .. } => (false, self.udp.copies(*server).await?.into_iter().map(Arc::new).collect()),
            Bound::ParkedUdp(holder) => (true, vec![Arc::new(holder.as_fd().try_clone_to_owned()?)]),
        };
        Ok(Passed { key, parked, sockets })
    }

    /// Serves on the sockets that another process has served on until now, in the state that the target asks for. That
    /// process has none of them in an event loop any more: it would spin where one is parked here.
    ///
    /// # Errors
    /// What [`settle`](Self::settle) fails for; the sockets are closed then.
    pub(super) async fn take_over(
        &mut self,
        passed: Passed,
        wanted: &Listener,
        target: &TargetCell,
    ) -> io::Result<Bound> {
        let Passed { key, parked, sockets } = passed;
        if !parked && !self.store.keep(key, &sockets) {
            self.store.forget_name(fd_store::name(&key)); // The other process has had it kept, maybe.
        }
        match (key.protocol, parked) {
            (Protocol::Tcp, false) if !wanted.target.parked() => {
                let mut bound = TcpSocket::passed(sockets)?;
                let missing = bound.filter(key, &target.load())?;
                self.tell_of(key, missing);
                socket::settle_passed(&bound.socket)?;
                self.accept_from(key, bound, target)
            }
            (Protocol::Tcp, false) => {
                let bound = TcpSocket::passed(sockets)?;
                socket::park_tcp(&bound.socket)?;
                self.store.forget(&key);
                Ok(Bound::ParkedTcp(bound))
            }
            (Protocol::Tcp, true) => {
                let bound = Bound::ParkedTcp(TcpSocket::passed(sockets)?);
                self.settle(key, bound, wanted, target).await
            }
            (_, false) if wanted.target.parked() => {
                drop(sockets);
                self.hold_udp(key).await
            }
            (_, false) => {
                let sockets = sockets.into_iter().map(|socket| Ok(UdpSocket::from(own(socket)?)));
                let sockets = sockets.collect::<io::Result<Vec<_>>>()?;
                sockets.iter().try_for_each(udp::settle_passed)?;
                let server = self.udp.take_over(key, sockets, Arc::clone(target), wanted.udp_settings());
                let filtered = self.filter_udp(key, server, true, &target.load());
                Ok(Bound::Udp { server, filtered })
            }
            (_, true) => {
                let holder = sockets.into_iter().next().ok_or(io::ErrorKind::InvalidInput)?;
                self.settle(key, Bound::ParkedUdp(own(holder)?.into()), wanted, target).await
            }
        }
    }

    /// How many sockets a listener can have.
    pub(super) fn most_sockets(&self, protocol: Protocol) -> usize {
        if protocol == Protocol::Udp { self.udp.shard_count() } else { 1 }
    }

    /// Who carries connections.
    pub(super) fn tcp(&self) -> &Arc<TcpShared> {
        &self.tcp
    }

    /// Has connections end whose backends have left.
    pub(super) fn look_at_backends(&self) {
        self.tcp.look_at_backends();
    }

    /// Closes a listener's sockets that are of no use here, for good.
    pub(super) fn discard(&mut self, passed: Passed) {
        self.store.forget_name(fd_store::name(&passed.key));
        passed.close_for_all();
    }

    /// Closes a listener's sockets for good: nobody is let in from now on, whoever has copies of them.
    pub(super) async fn end(&mut self, key: ListenKey, bound: Bound) {
        self.store.forget(&key);
        match bound {
            Bound::Tcp(bound, server) => {
                drop(bound);
                socket::shut(server.stop().await);
            }
            bound => self.release(bound).await,
        }
    }

    /// Closes a listener's sockets here. When this is done, its address is free, unless they are kept for the next process.
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

    fn accept_from(&mut self, key: ListenKey, bound: TcpSocket, target: &TargetCell) -> io::Result<Bound> {
        let server = TcpServer::start(Arc::clone(&bound.socket), key, Arc::clone(target), Arc::clone(&self.tcp))?;
        self.store.keep(key, slice::from_ref(&bound.socket));
        Ok(Bound::Tcp(bound, server))
    }

    /// Parks a UDP listener whose sockets are closed here.
    async fn hold_udp(&mut self, key: ListenKey) -> io::Result<Bound> {
        self.store.forget(&key);
        self.store.settled().await; // Until then the address is not free.
        Ok(Bound::ParkedUdp(udp::hold_udp(key.address())?))
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
        match filter_for(key, target) {
            Ok(filter) => filter,
            Err(missing) => {
                self.tell_of(key, Some(missing));
                None
            }
        }
    }

    /// Counts that a listener works without its filter, and says each cause once.
    fn tell_of(&mut self, key: ListenKey, missing: Option<NoFilter>) {
        let Some(NoFilter { cause, remedy }) = missing else { return };
        PROCESS.filter_fallbacks.increment();
        if !self.told.contains(&cause) {
            let what = "no filter: sources that should get no answer are reset after accept";
            warn!(listen = %key, error = %cause, remedy, "{what}");
            self.told.insert(cause);
        }
    }
}

/// The socket itself, where nobody else has it here.
fn own(socket: Arc<OwnedFd>) -> io::Result<OwnedFd> {
    Arc::try_unwrap(socket).or_else(|socket| socket.try_clone())
}

impl TcpSocket {
    /// One of another process. It may have a filter of any kind.
    fn passed(sockets: Vec<Arc<OwnedFd>>) -> io::Result<Self> {
        let socket = sockets.into_iter().next().ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { socket, filtered: true })
    }

    fn unfiltered(socket: OwnedFd) -> Self {
        Self { socket: socket.into(), filtered: false }
    }

    /// Gives it the filter that the target asks for, or none. Without one where it should be, which is returned, the
    /// server task turns clients away: a reset instead of silence.
    ///
    /// # Errors
    /// A filter that should go stays: it would drop what is to be served.
    fn filter(&mut self, key: ListenKey, target: &Target) -> io::Result<Option<NoFilter>> {
        let attached = filter_for(key, target).and_then(|filter| match filter {
            Some(filter) => filter.attach(&self.socket).map(|()| true).map_err(|error| NoFilter::not_taken(&error)),
            None => Ok(false),
        });
        let filters = matches!(attached, Ok(true));
        if self.filtered && !filters {
            Filter::detach(&self.socket)?;
        }
        self.filtered = filters;
        Ok(attached.err())
    }
}

fn filter_for(key: ListenKey, target: &Target) -> Result<Option<Filter>, NoFilter> {
    Filter::of_target(target, Family::of(key.ip())).map_err(|error| NoFilter::too_long(&error))
}

impl NoFilter {
    fn too_long(error: &TooLong) -> Self {
        Self { cause: error.to_string(), remedy: "name fewer networks" }
    }

    fn not_taken(error: &io::Error) -> Self {
        Self { cause: error.to_string(), remedy: "run it with CAP_NET_ADMIN" }
    }
}
