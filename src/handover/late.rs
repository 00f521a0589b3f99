//! What a process counts after it has told another one of its counters: connections that stay with it go on counting,
//! until the last of them ends.
//!
//! It tells whoever serves by then of the difference, now and then and at its end, at the door of their folder: another
//! process may have taken over meanwhile. A difference is counted whole or not at all, and told again only where it was
//! not heard: so none counts twice. Gauges do not travel: each process knows what is open there.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::counts::{Counts, Whole};
use super::door::{CallError, call};
use super::heirs::Heirs;
use super::introduction::Introduction;
use super::parcel::{Kind, Parcel, ParcelError};
use super::post::{Post, PostError};
use super::services::{
    BackendSaid, CountersSaid, PortSaid, ServicesTaken, backend_parcels, departed_said, port_parcels,
};
use super::source::SourceSaid;
use super::taking::{Greeting, introduce};
use crate::contact::Contact;
use crate::name::ServicePortName;
use crate::serve::balancer::{Backend, PortState};
use crate::serve::departed::Departed;
use crate::serve::estate::{Estate, PortParts};

/// How often it is looked whether more was counted.
const PERIOD: Duration = Duration::from_secs(5);
/// How long whoever serves may take for one message.
const SEND_LIMIT: Duration = Duration::from_secs(2);
/// How long a process may take to say all of it: nobody else is heard meanwhile, and whoever comes to take over waits for no
/// longer than `HELLO_LIMIT` of `taking`.
const HEAR_LIMIT: Duration = Duration::from_secs(1);
/// How long the end of a process waits until the rest is told.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// Counters as they are, or how much more they are than they were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counted {
    process: Counts,
    api: Counts,
    ports: BTreeMap<ServicePortName, PortCounted>,
    backends: BTreeMap<(ServicePortName, SocketAddr), Counts>,
}

/// Those of a ServicePort.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct PortCounted {
    counts: Counts,
    sources: Counts,
    departed: Counts,
    evicted: u64,
}

/// Where a process counts, and what it has told of that.
#[derive(Debug)]
pub(super) struct Ledger {
    /// As they were when all was handed over: there are no others any more.
    ports: BTreeMap<ServicePortName, PortCounters>,
    contact: Arc<Contact>,
    told: Counted,
}

/// Where a ServicePort counts: no more of it than that is kept for as long as a process retires.
#[derive(Debug)]
struct PortCounters {
    state: Arc<PortState>,
    backends: Arc<[Arc<Backend>]>,
    departed: Option<Arc<Departed>>,
}

/// Nobody was told.
#[derive(Debug, thiserror::Error)]
enum Untold {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("nobody is met")]
    Greeting(#[from] Greeting),
    #[error("kube-relay {0} does not know what to do with it")]
    Version(String),
    #[error(transparent)]
    Post(#[from] PostError),
}

/// Tells of the counters of a process that retires, for as long as it does.
#[derive(Debug)]
pub(super) struct Reporter {
    ledger: Ledger,
    /// Where others are met.
    folder: PathBuf,
    /// Hangs up when nothing is counted here any more.
    ends: Receiver<()>,
    /// Dropped once the last was told.
    _settled: oneshot::Sender<()>,
}

/// The other end of a [`Reporter`]. Dropped, it tells the rest.
#[derive(Debug)]
pub(super) struct Accounts {
    end: Sender<()>,
    settled: oneshot::Receiver<()>,
}

impl Counted {
    /// Those of all these.
    fn of(ports: &BTreeMap<ServicePortName, PortCounters>, contact: &Contact) -> Self {
        let of_port = |(name, port): (&ServicePortName, &PortCounters)| (name.clone(), PortCounted::of(port));
        let of_backends = |(name, port): (&ServicePortName, &PortCounters)| {
            let of_backend = |backend: &Arc<Backend>| {
                let counts = Counts::of(backend.stats.so_far());
                (!counts.is_empty()).then(|| ((name.clone(), backend.address()), counts))
            };
            port.backends.iter().filter_map(of_backend).collect::<Vec<_>>()
        };
        Self {
            process: Counts::of(&Whole),
            api: Counts::of(contact),
            ports: ports.iter().map(of_port).collect(),
            backends: ports.iter().flat_map(of_backends).collect(),
        }
    }

    /// What was said to another process.
    fn of_said(CountersSaid { process, ports, backends }: CountersSaid, source: SourceSaid) -> Self {
        let of_port = |PortSaid { port, counts, sources, departed, evicted, .. }: PortSaid| {
            (port.into(), PortCounted { counts, sources, departed, evicted })
        };
        let of_backend = |BackendSaid { port, address, counts, .. }: BackendSaid| ((port.into(), address), counts);
        Self {
            process,
            api: source.api,
            ports: ports.into_iter().map(of_port).collect(),
            backends: backends.into_iter().map(of_backend).collect(),
        }
    }

    /// How much more these are than they were before.
    fn beyond(&self, before: &Self) -> Self {
        let of_port = |(name, port): (&ServicePortName, &PortCounted)| {
            let more = port.beyond(before.ports.get(name).unwrap_or(&PortCounted::default()));
            (more != PortCounted::default()).then(|| (name.clone(), more))
        };
        let of_backend = |(name, counts): (&(ServicePortName, SocketAddr), &Counts)| {
            let more = counts.beyond(before.backends.get(name).unwrap_or(&Counts::default()));
            (!more.is_empty()).then(|| (name.clone(), more))
        };
        Self {
            process: self.process.beyond(&before.process),
            api: self.api.beyond(&before.api),
            ports: self.ports.iter().filter_map(of_port).collect(),
            backends: self.backends.iter().filter_map(of_backend).collect(),
        }
    }

    fn parcels(self) -> impl Iterator<Item = Parcel> {
        let Self { process, api, ports, backends } = self;
        let ports = ports.into_iter().map(|(name, PortCounted { counts, sources, departed, evicted })| PortSaid {
            port: (&name).into(),
            counts,
            sources,
            turns: Vec::new(),
            departed,
            evicted,
        });
        let backends = backends.into_iter().map(|((name, address), counts)| BackendSaid {
            port: (&name).into(),
            address,
            counts,
            connect_us: 0,
            ejection: None,
        });
        [Parcel::new(Kind::Process, &process), SourceSaid::of_api(api).parcel()]
            .into_iter()
            .chain(port_parcels(ports))
            .chain(backend_parcels(backends))
    }
}

impl PortCounters {
    fn of(PortParts { state, backends, departed, .. }: &PortParts) -> Self {
        Self { state: Arc::clone(state), backends: Arc::clone(backends), departed: departed.clone() }
    }
}

impl PortCounted {
    fn of(port: &PortCounters) -> Self {
        Self {
            counts: Counts::of(port.state.stats.so_far()),
            sources: Counts::of(port.state.preserve.stats.so_far()),
            departed: port.departed.as_deref().map(departed_said).unwrap_or_default(),
            evicted: port.state.affinity.evicted.get(),
        }
    }

    fn beyond(&self, before: &Self) -> Self {
        Self {
            counts: self.counts.beyond(&before.counts),
            sources: self.sources.beyond(&before.sources),
            departed: self.departed.beyond(&before.departed),
            evicted: self.evicted.saturating_sub(before.evicted),
        }
    }
}

impl Ledger {
    /// Of a process that has said this of its counters.
    pub(super) fn new(estate: &Estate, contact: Arc<Contact>, said: CountersSaid, source: SourceSaid) -> Self {
        let ports = estate.ports.iter().map(|(name, port)| (name.clone(), PortCounters::of(port)));
        Self { ports: ports.collect(), contact, told: Counted::of_said(said, source) }
    }

    /// Has another process told what was counted since the last time, if anything. Where it was not, it is told the
    /// next time.
    fn tell<E>(&mut self, tell: impl FnOnce(Counted) -> Result<(), E>) -> Result<(), E> {
        let now = Counted::of(&self.ports, &self.contact);
        let more = now.beyond(&self.told);
        if more != Counted::default() {
            tell(more)?;
            self.told = now;
        }
        Ok(())
    }
}

impl Reporter {
    pub(super) fn new(ledger: Ledger, folder: PathBuf) -> (Self, Accounts) {
        let (end, ends) = channel();
        let (settle, settled) = oneshot::channel();
        (Self { ledger, folder, ends, _settled: settle }, Accounts { end, settled })
    }

    /// Tells what is counted until nothing is any more. Blocks until then.
    pub(super) fn run(mut self) {
        while let Err(RecvTimeoutError::Timeout) = self.ends.recv_timeout(PERIOD) {
            if let Err(error) = self.tell() {
                debug!(%error, "what was counted here since the hand-over could not be told, trying again");
            }
        }
        if let Err(error) = self.tell() {
            warn!(%error, "what was counted here since the hand-over is told to nobody");
        }
    }

    fn tell(&mut self) -> Result<(), Untold> {
        let Self { ledger, folder, .. } = self;
        ledger.tell(|more| {
            let post = call(folder)?;
            let other = introduce(&post, Introduction::own())?;
            if !other.understands(Kind::Late) {
                return Err(Untold::Version(other.version()));
            }
            let parcels = [Parcel::new(Kind::Late, &())].into_iter().chain(more.parcels());
            parcels.chain([Parcel::new(Kind::End, &())]).try_for_each(|parcel| post.send(parcel, SEND_LIMIT))?;
            Ok(())
        })
    }
}

impl Accounts {
    /// Has the rest told, and resolves once it is, or cannot be.
    pub(super) async fn settle(self) {
        let Self { end, settled } = self;
        drop(end);
        // The other end says nothing, and is dropped then.
        if timeout(SETTLE_LIMIT, settled).await.is_err() {
            warn!("what was counted here since the hand-over is not told in time");
        }
    }
}

/// What another process has counted after it was taken over from.
#[derive(Debug, Default)]
pub(crate) struct LateCounts {
    services: ServicesTaken,
    api: Counts,
}

/// Nothing of it may be counted.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unheard {
    #[error(transparent)]
    Post(#[from] PostError),
    #[error(transparent)]
    Parcel(#[from] ParcelError),
}

impl LateCounts {
    /// Hears all of it, from who has said that it comes.
    ///
    /// # Errors
    /// It did not come whole, or not in time.
    pub(super) fn hear(post: &Post) -> Result<Self, Unheard> {
        let (mut late, until) = (Self::default(), Instant::now() + HEAR_LIMIT);
        loop {
            let parcel = post.receive(until.saturating_duration_since(Instant::now()))?;
            if parcel.kind == Kind::End {
                return Ok(late);
            }
            if Instant::now() >= until {
                return Err(PostError::Limit.into()); // However fast they come.
            }
            late.take(&parcel)?;
        }
    }

    pub(super) fn take(&mut self, parcel: &Parcel) -> Result<(), ParcelError> {
        match parcel.kind {
            Kind::Source => self.api = parcel.said::<SourceSaid>()?.api,
            Kind::Process | Kind::Port | Kind::Backend => self.services.take_counts(parcel)?,
            _ => {}
        }
        Ok(())
    }

    /// The same, but for what the process as a whole has counted: in a test that is the same one.
    #[cfg(test)]
    pub(super) fn of_services(self) -> Self {
        Self { services: self.services.of_services(), ..self }
    }

    /// Counts it. Stand-ins for backends that are not there, by ServicePort.
    pub(crate) fn commit(
        self,
        estate: &Estate,
        contact: &Contact,
        now: Instant,
    ) -> BTreeMap<ServicePortName, Vec<Arc<Backend>>> {
        let Self { services, api } = self;
        let mut heirs = Heirs::of_estate(estate);
        api.add_to(contact);
        services.commit(estate, &mut heirs, now);
        heirs.stand_ins()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{ObjectName, Protocol};
    use crate::plan::TcpSettings;
    use crate::stats::{CloseReason, DropReason, Entry, WatchFailure, WatchedKind};

    fn at(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    fn name() -> ServicePortName {
        ServicePortName::new(ObjectName::parse("default/web"), "http", Protocol::Tcp)
    }

    /// A process with one ServicePort that has these backends, and has had another one.
    fn estate(backends: &[u16]) -> Estate {
        let backends = backends.iter().map(|port| Arc::new(Backend::new(u32::from(*port), at(*port))));
        let departed = Departed::of(Arc::new(Backend::new(99, at(99))));
        let parts = PortParts {
            state: Arc::new(PortState::new(name())),
            balancers: Box::default(),
            backends: backends.collect(),
            departed: Some(Arc::new(departed)),
            tcp: Some(Arc::new(TcpSettings::default())),
        };
        Estate::of_ports(BTreeMap::from([(name(), parts)]))
    }

    /// Of a process that has told of all that it has counted.
    fn ledger(estate: &Estate, contact: &Arc<Contact>) -> Ledger {
        let mut ledger = Ledger::new(estate, Arc::clone(contact), CountersSaid::default(), SourceSaid::default());
        ledger.told = Counted::of(&ledger.ports, contact);
        ledger
    }

    /// What was counted since the last time, as the other side hears it.
    fn told(ledger: &mut Ledger) -> Option<LateCounts> {
        let mut late = None;
        let telling = ledger.tell(|more| {
            let mut heard = LateCounts::default();
            more.parcels().try_for_each(|parcel| heard.take(&parcel))?;
            late = Some(heard.of_services());
            Ok::<_, ParcelError>(())
        });
        telling.expect("what was written");
        late
    }

    fn count(estate: &Estate, contact: &Contact) {
        let port = &estate.ports[&name()];
        port.state.stats.dropped.count(DropReason::EjectedAll);
        port.state.affinity.evicted.increment();
        port.backends[0].stats.upstream_bytes.add(Entry::NodePort, 10);
        port.backends[1].stats.closed.count(CloseReason::Finished);
        contact.line(WatchedKind::Service).fail(WatchFailure::Timeout);
    }

    #[test]
    fn t234_given_counters_that_were_said_when_more_is_counted_then_another_process_is_told_of_that_alone_and_once() {
        let (old, new, contact) = (estate(&[1, 2]), estate(&[2, 3]), Arc::new(Contact::default()));
        count(&old, &contact);
        let mut ledger = ledger(&old, &contact);
        ledger.told.process = Counts::of(&Whole);

        count(&old, &contact);
        count(&old, &contact);
        let late = told(&mut ledger).expect("there is more");
        let api = Contact::default();
        let stand_ins = late.commit(&new, &api, Instant::now());

        let port = &new.ports[&name()];
        assert_eq!((port.state.stats.dropped.get(DropReason::EjectedAll), port.state.affinity.evicted.get()), (2, 2));
        assert_eq!(port.backends[0].stats.closed.get(CloseReason::Finished), 2);
        assert_eq!(stand_ins[&name()].iter().map(|gone| gone.stats.upstream_bytes.get()).sum::<u64>(), 20);
        assert_eq!(api.failures().map(|(_, _, count)| count).sum::<u64>(), 2);
        let again = told(&mut ledger).unwrap_or_default().commit(&new, &api, Instant::now());
        assert!(again.is_empty());
        assert_eq!(port.state.stats.dropped.get(DropReason::EjectedAll), 2, "it was told");
    }

    #[test]
    fn t234_given_nobody_who_hears_when_told_then_it_is_told_the_next_time() {
        let (old, contact) = (estate(&[1, 2]), Arc::new(Contact::default()));
        let mut ledger = ledger(&old, &contact);
        count(&old, &contact);

        let refused = ledger.tell(|_| Err("nobody hears"));

        assert_eq!(refused, Err("nobody hears"));
        let new = estate(&[1, 2]);
        told(&mut ledger).expect("it is not told yet").commit(&new, &Contact::default(), Instant::now());
        assert_eq!(new.ports[&name()].backends[0].stats.upstream_bytes.of(Entry::NodePort), 10);
    }

    #[test]
    fn t234_given_a_process_that_retires_when_its_estate_is_dropped_then_nothing_but_counters_is_kept() {
        let (old, contact) = (estate(&[1, 2]), Arc::new(Contact::default()));
        let settings = old.ports[&name()].tcp.as_ref().map(Arc::downgrade).expect("it has some");

        let mut ledger = ledger(&old, &contact);
        count(&old, &contact);
        drop(old);

        assert!(settings.upgrade().is_none());
        assert!(told(&mut ledger).is_some(), "and these count");
    }
}
