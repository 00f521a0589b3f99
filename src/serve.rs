//! The data plane: listeners as they run, and the law of this folder.
//!
//! No lock, no look-up by name, no allocation per datagram, no await while choosing. What should run
//! is decided in `plan`; [`Listeners`] carries the steps out and is owned by `control`.

pub mod affinity;
pub mod balancer;
mod bound;
pub mod connect;
mod direction;
mod failures;
mod fault;
pub mod flow;
pub mod lasting;
pub mod listeners;
pub mod mmsg;
mod outbound;
mod pipe;
mod ports;
mod reactor;
mod relay;
#[cfg(test)]
mod relay_chaos;
pub mod room;
#[cfg(test)]
pub(crate) mod scripted;
mod shard;
pub mod slab;
mod sleep;
pub mod socket;
mod stream;
pub mod tcp;
mod train;
pub mod udp;
mod upstream;
mod wheel;
mod worker;

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::serve::balancer::{Balancer, PortState};

pub use listeners::Listeners;

/// What happens to new traffic on one side of a running listener.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// The balancer chooses a backend.
    Serve(Arc<Balancer>),
    /// Connection refused, port unreachable.
    Reject,
    /// No answer at all.
    Drop,
}

/// Where a running listener's traffic goes. Immutable: a change stores another one in the listener's [`TargetCell`].
#[derive(Clone, Debug)]
pub struct Target {
    /// The ServicePort that answers for this listener: its counters count what is turned away.
    pub port: Arc<PortState>,
    /// For sources off this node.
    pub outside: Verdict,
    /// For this node and its pods.
    pub inside: Verdict,
    /// What counts as inside; empty where the two sides are the same.
    pub inside_of: Arc<[IpNet]>,
}

impl Target {
    /// The verdict for a source address.
    pub fn judge(&self, client: IpAddr) -> &Verdict {
        if self.inside_of.iter().any(|net| net.contains(&client)) { &self.inside } else { &self.outside }
    }
}

/// The cell through which `control` points a live listener elsewhere; its server task loads it for each connection.
pub type TargetCell = Arc<ArcSwap<Target>>;
