//! The sockets of bound listeners, and how each follows its target: who reads from it, and when nobody does.
//!
//! What a target says is decided in `plan`, when to act in `listeners`; options and system calls are in `socket` and
//! `mmsg`.

use std::io;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::name::{ListenKey, Protocol};
use crate::plan::{self, Listener, Side};
use crate::serve::tcp::{TcpServer, TcpShared};
use crate::serve::udp::{UdpServer, UdpShards};
use crate::serve::{TargetCell, socket, udp};

/// Who serves. Owned by `Listeners`, by value.
#[derive(Debug)]
pub(super) struct Servers {
    pub(super) tcp: Arc<TcpShared>,
    pub(super) udp: UdpShards,
}

/// Who holds a bound listener's socket.
#[derive(Debug)]
pub(super) enum Bound {
    /// A task accepts from it.
    Tcp(Arc<OwnedFd>, TcpServer),
    /// Nobody: its port is held, connects are refused.
    ParkedTcp(Arc<OwnedFd>),
    /// Shards read from it.
    Udp(UdpServer),
    /// Nobody: senders get port unreachable.
    ParkedUdp(UdpSocket),
}

impl Servers {
    /// Opens a listener's socket in the state that its target asks for.
    pub(super) fn open(&self, key: ListenKey, wanted: &Listener, target: &TargetCell) -> io::Result<Bound> {
        refuse_guarded(wanted)?;
        match (key.protocol, wanted.target.parked()) {
            (Protocol::Tcp, parked) => {
                let listener = Arc::new(socket::listen_tcp(key)?);
                if parked {
                    socket::park_tcp(&listener)?;
                    return Ok(Bound::ParkedTcp(listener));
                }
                self.accept_from(key, listener, &wanted.target, target)
            }
            (Protocol::Udp, true) => Ok(Bound::ParkedUdp(udp::hold_udp(key.address)?)),
            (Protocol::Udp, false) => Ok(Bound::Udp(self.udp.open(key, Arc::clone(target), &wanted.udp)?)),
            (Protocol::Sctp, _) => Err(io::Error::new(io::ErrorKind::Unsupported, "SCTP is not served")),
        }
    }

    fn accept_from(
        &self,
        key: ListenKey,
        listener: Arc<OwnedFd>,
        planned: &plan::Target,
        target: &TargetCell,
    ) -> io::Result<Bound> {
        filter(&listener, planned)?;
        let server = TcpServer::start(Arc::clone(&listener), key, Arc::clone(target), Arc::clone(&self.tcp))?;
        Ok(Bound::Tcp(listener, server))
    }

    /// Parks or revives a bound socket as its new target says.
    pub(super) async fn settle(
        &self,
        key: ListenKey,
        bound: Bound,
        wanted: &Listener,
        target: &TargetCell,
    ) -> io::Result<Bound> {
        refuse_guarded(wanted)?;
        match (bound, wanted.target.parked()) {
            (Bound::Tcp(listener, server), true) => {
                server.stop().await; // A parked socket that is still registered makes its event loop spin.
                socket::park_tcp(&listener)?;
                Ok(Bound::ParkedTcp(listener))
            }
            (Bound::Tcp(listener, server), false) => {
                filter(&listener, &wanted.target)?;
                Ok(Bound::Tcp(listener, server))
            }
            (Bound::ParkedTcp(listener), false) => {
                socket::revive_tcp(&listener)?;
                self.accept_from(key, listener, &wanted.target, target)
            }
            (Bound::Udp(server), true) => {
                self.udp.remove(server).await;
                Ok(Bound::ParkedUdp(udp::hold_udp(key.address)?))
            }
            (Bound::Udp(server), false) => {
                self.udp.set_idle(server, &wanted.udp);
                self.udp.sweep(server); // Flows of the last owner, or of a side that is served no more, begin anew.
                Ok(Bound::Udp(server))
            }
            (Bound::ParkedUdp(holder), false) => {
                drop(holder);
                Ok(Bound::Udp(self.udp.open(key, Arc::clone(target), &wanted.udp)?))
            }
            (parked @ (Bound::ParkedTcp(_) | Bound::ParkedUdp(_)), true) => Ok(parked),
        }
    }

    /// Closes a socket. When this is done, its address is free.
    pub(super) async fn release(&self, bound: Bound) {
        match bound {
            Bound::Tcp(listener, server) => {
                drop(listener);
                server.stop().await;
            }
            Bound::Udp(server) => self.udp.remove(server).await,
            Bound::ParkedTcp(_) | Bound::ParkedUdp(_) => {}
        }
    }
}

/// An address that is not for everybody is for nobody until sockets filter by source.
fn refuse_guarded(wanted: &Listener) -> io::Result<()> {
    match wanted.source_ranges.is_empty() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::Unsupported, "source ranges are not enforced yet")),
    }
}

/// Where both sides drop, the kernel does it: clients time out, as they would without anybody there.
///
/// Where only one side does, or the kernel keeps filters for privileged processes, the server task turns the
/// connections away (a reset).
fn filter(listener: &OwnedFd, target: &plan::Target) -> io::Result<()> {
    let drops = |side: &Side| side.verdict == plan::Verdict::Drop;
    if !drops(&target.outside) || !drops(&target.inside) {
        return socket::drop_none(listener);
    }
    match socket::drop_all(listener) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        outcome => outcome,
    }
}
