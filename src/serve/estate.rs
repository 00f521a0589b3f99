//! What a process hands over to the one that comes after it, as the data plane has it: handles of what runs, at one moment.
//!
//! A plan that is carried out later makes others: who asks for these does so while nothing is planned. What is said of
//! them to the other process is in `handover`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
#[cfg(test)]
use std::num::NonZeroUsize;
use std::sync::Arc;

use crate::name::ServicePortName;
use crate::plan::TcpSettings;
use crate::reply_path::ReplyPath;
use crate::serve::balancer::{Backend, Balancer, PortState};
use crate::serve::departed::Departed;
use crate::serve::moving_flow::ShardLines;
#[cfg(test)]
use crate::serve::tcp::TcpOptions;
use crate::serve::tcp::TcpShared;
use crate::vips::Vips;

/// What runs. Given out by `Listeners`.
#[derive(Clone, Debug)]
pub(crate) struct Estate {
    /// Every ServicePort that has a balancer.
    pub(crate) ports: BTreeMap<ServicePortName, PortParts>,
    /// Who carries connections.
    pub(crate) tcp: Arc<TcpShared>,
    /// Who carries flows.
    pub(crate) udp: ShardLines,
    /// Who makes addresses local.
    pub(crate) vips: Vips,
    /// Who leads answers to clients' addresses here.
    pub(crate) reply_path: ReplyPath,
}

/// A ServicePort's state, its balancers and its backends.
#[derive(Clone, Debug)]
pub(crate) struct PortParts {
    pub(crate) state: Arc<PortState>,
    /// One for each family and scope that is asked for.
    pub(crate) balancers: Box<[Arc<Balancer>]>,
    /// By address.
    pub(crate) backends: Arc<[Arc<Backend>]>,
    /// What those have carried that are not among them any more; `None` where none has left.
    pub(crate) departed: Option<Arc<Departed>>,
    /// What the Service says about its connections.
    pub(crate) tcp: Option<Arc<TcpSettings>>,
}

#[cfg(test)]
impl Estate {
    /// One that has these ServicePorts, and nobody who carries datagrams.
    pub(crate) fn of_ports(ports: BTreeMap<ServicePortName, PortParts>) -> Self {
        let options = TcpOptions { workers: NonZeroUsize::MIN, ..TcpOptions::default() };
        let tcp = Arc::new(TcpShared::new(options).expect("a thread"));
        Self { ports, tcp, udp: ShardLines::default(), vips: Vips::default(), reply_path: ReplyPath::default() }
    }
}

impl PortParts {
    /// The backend at an address, if a table has it.
    pub(crate) fn backend(&self, address: SocketAddr) -> Option<&Arc<Backend>> {
        let place = self.backends.binary_search_by_key(&address, |backend| backend.address()).ok()?;
        self.backends.get(place)
    }
}
