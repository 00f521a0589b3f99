//! The process that takes over: it has all that the other one tells ready, and begins with it once it is its own.
//!
//! ```text
//! take … take ─▶ prepare ─▶ commit ─▶ (the other one looks away) ─▶ (listeners begin) ─▶ finish
//!    nothing is read, written or changed │ connections and flows go on
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::handover::heirs::Heirs;
use crate::handover::parcel::{Kind, Parcel, ParcelError};
use crate::handover::services::ServicesTaken;
use crate::handover::streams::TakenStream;
use crate::handover::{flows, streams};
use crate::name::{Family, ListenKey, ServicePortName};
use crate::serve::balancer::Backend;
use crate::serve::estate::Estate;
use crate::serve::moving_flow::{MovingFlow, MovingLosses, ShardLines};
use crate::serve::socket::has_foreign_source;
use crate::vips::Granted;

/// What was taken so far. Dropped, it closes descriptors of its own, and the other process's sockets are as they were.
pub(crate) struct Importer {
    estate: Estate,
    services: ServicesTaken,
    flows: Vec<MovingFlow>,
    /// How far losses are counted; `None` where the other process does not say so.
    losses: Option<Vec<MovingLosses>>,
    streams: Vec<TakenStream>,
    /// Listeners whose flows are not taken, and how many that were.
    left_out: BTreeSet<ListenKey>,
    left: usize,
    /// When the first of it came: nothing moves in the other process from about then on.
    since: Option<Instant>,
    /// What keeps the addresses of connections local.
    granted: Granted,
}

/// What goes on here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TakenOver {
    /// Connections.
    pub(crate) streams: usize,
    /// UDP flows: as far as their listeners were there.
    pub(crate) flows: usize,
    /// How long they stood still, from when the first was told of.
    pub(crate) standstill: Duration,
}

/// Connections go on, flows do as their listeners come.
#[derive(Debug, Default)]
pub(crate) struct Committed {
    shards: ShardLines,
    streams: usize,
    departed: BTreeMap<ServicePortName, Vec<Arc<Backend>>>,
    standstill: Duration,
}

impl Importer {
    /// For what runs here, which is to have all its ServicePorts by now.
    pub(crate) fn new(estate: Estate) -> Self {
        let (services, granted) = (ServicesTaken::default(), Granted::default());
        let (flows, losses, streams, left_out) = Default::default();
        Self { estate, services, flows, losses, streams, left_out, left: 0, since: None, granted }
    }

    /// Takes no flows of a listener: to be called before they come. Their clients come to other sockets than before.
    pub(crate) fn leave_out(&mut self, listener: ListenKey) {
        self.left_out.insert(listener);
    }

    /// Takes what the exporter tells; other kinds of parcels are nothing to it.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn take(&mut self, parcel: Parcel) -> Result<(), ParcelError> {
        if parcel.kind != Kind::Pins {
            self.since.get_or_insert_with(Instant::now); // Most of those come before it.
        }
        match parcel.kind {
            Kind::Losses => self.losses.get_or_insert_default().extend(flows::take_losses(&parcel)?),
            Kind::Stream => self.streams.extend(streams::take(parcel)?),
            Kind::Flow => {
                let (left, taken): (Vec<_>, Vec<_>) =
                    flows::take(parcel)?.into_iter().partition(|flow| self.left_out.contains(&flow.listen));
                self.left += left.len();
                self.flows.extend(taken);
            }
            _ => self.services.take(&parcel)?,
        }
        Ok(())
    }

    /// Has the addresses made local that connections came to, and answers to clients' addresses led here where some of it has
    /// these. To be called when all was taken.
    pub(crate) async fn prepare(&mut self) {
        let wanted = self.streams.iter().filter_map(TakenStream::wanted).collect();
        self.granted = self.estate.vips.require(wanted).await;
        // Most often they are, as the same Service asks for it.
        if !self.estate.reply_path.leads_here() && self.has_clients_addresses() {
            self.estate.reply_path.require().await;
        }
    }

    /// True where a backend sees a client's address.
    fn has_clients_addresses(&self) -> bool {
        let flows = self.flows.iter().map(|flow| (&flow.socket, flow.backend));
        let streams = self.streams.iter().map(TakenStream::to_backend);
        let is_foreign = |(socket, backend): (&OwnedFd, SocketAddr)| {
            has_foreign_source(socket, Family::of(backend.ip())).unwrap_or(false)
        };
        flows.chain(streams).any(is_foreign)
    }

    /// Goes on with everything. To be called once it is this process's, and before listeners accept. What was told of is where
    /// it was: the other process closes its copies now or later, and does nothing else with them.
    pub(crate) fn commit(self) -> Committed {
        let Self { estate, services, flows, losses, streams, since, granted, left, .. } = self;
        if left > 0 {
            warn!(flows = left, "flows begin anew: fewer threads share their listeners than in the last process");
        }
        let now = Instant::now();
        let mut heirs = Heirs::of_estate(&estate);
        // First those that go on at once: clients of flows, and new ones, wait for their listeners anyway.
        let taken = streams.len();
        for stream in streams {
            estate.tcp.take_over(stream.coming(&estate, &mut heirs, &granted, now));
        }
        losses.into_iter().for_each(|losses| estate.udp.go_on_from(losses));
        estate.udp.take_over(flows::with_backends(flows, &mut heirs));
        services.commit(&estate, &mut heirs, now);
        let departed = heirs.stand_ins();
        let standstill = since.map(|since| since.elapsed()).unwrap_or_default();
        Committed { shards: estate.udp, streams: taken, departed, standstill }
    }
}

impl fmt::Debug for Importer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (streams, flows) = (self.streams.len(), self.flows.len());
        f.debug_struct("Importer").field("streams", &streams).field("flows", &flows).finish_non_exhaustive()
    }
}

impl Committed {
    /// Stand-ins for backends of the other process that no table here has, by ServicePort.
    pub(crate) fn departed(&self) -> &BTreeMap<ServicePortName, Vec<Arc<Backend>>> {
        &self.departed
    }

    /// To be called when all listeners are there: flows of others end. What goes on. Blocks, for a turn of the threads.
    pub(crate) fn finish(self) -> TakenOver {
        let Self { shards, streams, standstill, .. } = self;
        TakenOver { streams, flows: shards.forget_the_rest(), standstill }
    }
}
