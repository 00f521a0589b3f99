//! What is said of UDP flows, and the backends that they have in the process that takes them over.
//!
//! A flow whose ServicePort or backend is not there any more comes all the same: it is judged as after any change of
//! endpoints, so that an answer on its way still arrives.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::handover::exporter::ToldCount;
use crate::handover::heirs::Heirs;
use crate::handover::parcel::{Kind, Parcel, ParcelError};
use crate::handover::services::PortName;
use crate::name::{ListenKey, Protocol};
use crate::serve::access::DraftRecord;
use crate::serve::doubt::DoubtRecord;
use crate::serve::flow::{Choice, FlowState};
use crate::serve::moving_flow::{ComingFlow, MovingFlow, MovingLosses, ShardLines, Unanswered};
use crate::stats::{DropReason, Entry, Word};

/// Flows in one parcel, each with a descriptor.
const AT_ONCE: usize = 128;

/// Sockets in one parcel, of whose losses it tells.
const LOSSES_AT_ONCE: usize = 4_096;

/// A flow. Its socket is the parcel's descriptor at the same place.
#[derive(Debug, Serialize, Deserialize)]
struct FlowSaid {
    /// Where its listener is.
    listen: SocketAddr,
    /// Which of the listener's sockets.
    #[serde(default)]
    place: usize,
    client: SocketAddr,
    port: PortName,
    backend: SocketAddr,
    entry: String,
    state: FlowState,
    /// Seconds.
    silent: u64,
    #[serde(default)]
    parting: bool,
    #[serde(default)]
    draft: Option<DraftRecord>,
    #[serde(default)]
    doubt: Option<DoubtRecord>,
}

/// All flows of shards that rest; `told` counts them.
pub(crate) fn parcels(shards: &ShardLines, told: &ToldCount) -> impl Iterator<Item = Result<Parcel, Unanswered>> {
    shards.flows(AT_ONCE).map(move |flows| {
        let flows = flows?;
        told.add(flows.len());
        let (said, sockets): (Vec<_>, Vec<_>) = flows.into_iter().map(FlowSaid::of).unzip();
        Ok(Parcel::new(Kind::Flow, &said).with(sockets))
    })
}

impl FlowSaid {
    fn of(flow: MovingFlow) -> (Self, OwnedFd) {
        let MovingFlow { listen, place, client, port, backend, entry, state, silent, parting, draft, doubt, socket } =
            flow;
        let (listen, port, silent) = (listen.address(), (&port).into(), silent.as_secs());
        let entry = entry.as_str().to_owned();
        (Self { listen, place, client, port, backend, entry, state, silent, parting, draft, doubt }, socket)
    }

    fn moving(self, socket: OwnedFd) -> MovingFlow {
        MovingFlow {
            listen: ListenKey::at(self.listen, Protocol::Udp),
            place: self.place,
            client: self.client,
            port: self.port.into(),
            backend: self.backend,
            entry: Entry::of(&self.entry).unwrap_or(Entry::ClusterIp),
            state: self.state,
            silent: Duration::from_secs(self.silent),
            parting: self.parting,
            draft: self.draft,
            doubt: self.doubt,
            socket,
        }
    }
}

/// How far is counted what the kernel has dropped at a listener's socket.
#[derive(Debug, Serialize, Deserialize)]
struct LossesSaid {
    listen: SocketAddr,
    #[serde(default)]
    place: usize,
    counted: u32,
    /// Why it drops more.
    reason: String,
}

/// How far losses are counted by shards that rest: one parcel at least, as what is not said of is none.
pub(crate) fn losses(shards: &ShardLines) -> impl Iterator<Item = Result<Parcel, Unanswered>> {
    let parcels = |losses: Vec<MovingLosses>| {
        let said: Vec<_> = losses.into_iter().map(LossesSaid::from).collect();
        let parts = if said.is_empty() { vec![&said[..]] } else { said.chunks(LOSSES_AT_ONCE).collect() };
        parts.into_iter().map(|part| Ok(Parcel::new(Kind::Losses, &part))).collect::<Vec<_>>()
    };
    let shards = shards.clone();
    std::iter::once_with(move || shards.losses().map_or_else(|error| vec![Err(error)], parcels)).flatten()
}

/// How far losses are counted, by a parcel.
///
/// # Errors
/// It cannot be read.
pub(crate) fn take_losses(parcel: &Parcel) -> Result<Vec<MovingLosses>, ParcelError> {
    Ok(parcel.said::<Vec<LossesSaid>>()?.into_iter().map(MovingLosses::from).collect())
}

impl From<MovingLosses> for LossesSaid {
    fn from(MovingLosses { listen, place, counted, reason }: MovingLosses) -> Self {
        Self { listen: listen.address(), place, counted, reason: reason.as_str().to_owned() }
    }
}

impl From<LossesSaid> for MovingLosses {
    fn from(LossesSaid { listen, place, counted, reason }: LossesSaid) -> Self {
        let reason = DropReason::of(&reason).unwrap_or(DropReason::Memory);
        Self { listen: ListenKey::at(listen, Protocol::Udp), place, counted, reason }
    }
}

/// The flows of a parcel.
///
/// # Errors
/// It cannot be read, or has not a descriptor for each.
pub(crate) fn take(parcel: Parcel) -> Result<Vec<MovingFlow>, ParcelError> {
    let said: Vec<FlowSaid> = parcel.said()?;
    let (kind, wanted, found) = (parcel.kind, said.len(), parcel.descriptors.len());
    if wanted != found {
        return Err(ParcelError::Descriptors { kind, wanted, found });
    }
    Ok(said.into_iter().zip(parcel.descriptors).map(|(said, socket)| said.moving(socket)).collect())
}

/// Finds out whom each leads to here.
pub(crate) fn with_backends(flows: Vec<MovingFlow>, heirs: &mut Heirs<'_>) -> Vec<ComingFlow> {
    let coming = |flow: MovingFlow| {
        let (port, backend) = heirs.of(&flow.port, flow.backend);
        ComingFlow { choice: Choice { backend, port, entry: flow.entry }, flow }
    };
    flows.into_iter().map(coming).collect()
}
