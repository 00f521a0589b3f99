//! The data plane: listeners as they run, and the law of this folder.
//!
//! No lock, no look-up by name, no allocation per datagram, no await while choosing. (A connection that goes to
//! another thread is put in that thread's queue, behind a lock that is held for the push alone.) What should run
//! is decided in `plan`; [`Listeners`] carries the steps out and is owned by `control`.

pub mod access;
mod address_set;
pub mod affinity;
pub mod balancer;
mod bound;
pub mod connect;
mod deadline;
pub mod departed;
pub(crate) mod direction;
pub(crate) mod doubt;
pub mod ejection;
pub(crate) mod estate;
mod failures;
mod fault;
pub(crate) mod few_lines;
mod filter;
pub mod flow;
pub(crate) mod fresh;
pub(crate) mod gate;
mod header_decoder;
mod introduction;
pub mod lasting;
pub mod limits;
pub mod listeners;
mod mailbox;
pub mod mmsg;
pub(crate) mod moment;
pub(crate) mod moving_flow;
pub(crate) mod moving_stream;
mod outbound;
pub(crate) mod passed;
pub(crate) mod pin_record;
mod pipe;
mod pool;
mod ports;
pub mod preserve;
mod proxy_header;
mod reactor;
pub(crate) mod relay;
#[cfg(test)]
mod relay_chaos;
pub mod room;
#[cfg(test)]
pub(crate) mod scripted;
mod shard;
pub mod slab;
mod sleep;
pub mod socket;
mod standstill;
mod stream;
pub mod table;
pub mod tcp;
mod train;
pub mod udp;
pub(crate) mod upstream;
mod way;
mod way_back;
mod wheel;
mod worker;

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use ipnet::IpNet;

use crate::entrance::{Entrance, Origin};
use crate::plan::{HeaderVersion, ListenerKind, ProxyProtocol};
use crate::serve::balancer::{Balancer, PortState};
use crate::stats::DropReason;
use crate::vips::Hold;

pub(crate) use failures::next_wait;
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
    /// Why there is a listener.
    pub kind: ListenerKind,
    /// For sources off this node. Sources are clients: where balancers in front name them, these.
    pub outside: Verdict,
    /// For this node and its pods.
    pub inside: Verdict,
    /// What counts as inside; empty where the two sides are the same, and everybody may come from outside.
    pub inside_of: Arc<[IpNet]>,
    /// Who may come at all, on either side; empty: everybody. Others get no answer.
    pub source_ranges: Arc<[IpNet]>,
    /// Who may come from outside; others get no answer. `None`: everybody, empty: nobody. As [`AllowFrom`](crate::plan::AllowFrom)
    /// has them: sorted, none within another.
    pub allow_from: Option<Arc<[IpNet]>>,
    /// How connections say who their clients are, towards backends and towards us; `None`: not at all, as with UDP.
    pub proxy_protocol: Option<Arc<ProxyProtocol>>,
    /// What keeps the listener's address local: for the listener, and for each connection that came there.
    pub address: Option<Hold>,
}

impl Target {
    /// One balancer, for whoever comes to a cluster IP.
    pub fn serving(balancer: &Arc<Balancer>) -> Self {
        Self::both_sides(&balancer.port, Verdict::Serve(Arc::clone(balancer)))
    }

    /// One verdict, for whoever comes to a cluster IP.
    pub fn both_sides(port: &Arc<PortState>, verdict: Verdict) -> Self {
        Self {
            port: Arc::clone(port),
            kind: ListenerKind::ClusterIp,
            outside: verdict.clone(),
            inside: verdict,
            inside_of: Arc::default(),
            source_ranges: Arc::default(),
            allow_from: None,
            proxy_protocol: None,
            address: None,
        }
    }

    /// The verdict for a source address.
    ///
    /// What the listener's filter lets through is judged once more: it may have been on its way when the target
    /// changed, and not every kernel takes filters from everybody.
    pub fn judge(&self, client: IpAddr) -> &Verdict {
        self.admitted(client).unwrap_or(&Verdict::Drop)
    }

    /// The balancer for a source address, or why there is none.
    pub fn balancer_for(&self, client: IpAddr) -> Result<&Arc<Balancer>, DropReason> {
        match self.admitted(client) {
            Some(Verdict::Serve(balancer)) => Ok(balancer),
            Some(Verdict::Reject) => Err(DropReason::NoEndpoints),
            Some(Verdict::Drop) => Err(DropReason::NoLocalEndpoints),
            None => Err(DropReason::DeniedAddress),
        }
    }

    /// The balancers that begin each connection with a header; `None`: nobody is asked for one.
    fn balancers_in_front(&self) -> Option<&[IpNet]> {
        self.proxy_protocol.as_ref()?.accept_from.as_deref()
    }

    /// What backends get before a client's first byte; `None`: nothing.
    fn header_to_backends(&self) -> Option<HeaderVersion> {
        self.proxy_protocol.as_ref()?.send
    }

    /// What the listener's filter drops for, as far as one word can tell.
    fn reason_of_silence(&self) -> DropReason {
        if self.is_guarded() { DropReason::DeniedAddress } else { DropReason::NoLocalEndpoints }
    }

    /// True where it depends on the peer's address whether a client may come at all.
    fn is_guarded(&self) -> bool {
        let has_lists = !self.source_ranges.is_empty() || self.allow_from.is_some();
        has_lists && self.balancers_in_front().is_none()
    }

    /// The verdict of the client's side; `None` where it may not come at all.
    fn admitted(&self, client: IpAddr) -> Option<&Verdict> {
        let Self { source_ranges, inside_of, allow_from, .. } = self;
        let entrance = Entrance { source_ranges, inside_of, allow_from: allow_from.as_deref() };
        match entrance.admit(client) {
            Ok(Origin::Inside) => Some(&self.inside),
            Ok(Origin::Outside) => Some(&self.outside),
            Err(_) => None,
        }
    }
}

/// The cell through which `control` points a live listener elsewhere; whoever accepts loads it for each connection.
pub type TargetCell = Arc<ArcSwap<Target>>;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    /// Whoever sets a machine's clock would end at once what lasts for a time, or have it last for a day more.
    #[test]
    fn f26_given_the_data_plane_when_it_is_read_then_it_never_asks_for_the_wall_clock() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/serve");
        let files = fs::read_dir(folder).expect("the sources are there").flatten().map(|file| file.path());

        let asks = |path: &PathBuf| fs::read_to_string(path).expect("a text file").contains("SystemTime");

        assert_eq!(files.filter(asks).collect::<Vec<_>>(), Vec::<PathBuf>::new());
    }
}
