//! What is said of ServicePorts: counters, whose turn it is, who is ejected, and which clients stay where.
//!
//! ServicePorts and backends of whom there is nothing to say are left out. ServicePorts that the other process does not serve
//! are left out there: their numbers would be nobody's. What backends have carried that it does not know stays in the sums of
//! their ServicePorts.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::handover::counts::{Counts, Whole};
use crate::handover::heirs::Heirs;
use crate::handover::parcel::{Kind, Parcel, ParcelError};
use crate::name::{Family, ObjectName, Protocol, Scope, ServicePortName};
use crate::serve::affinity::{Memory, PinRecord, Seeds};
use crate::serve::balancer::Backend;
use crate::serve::departed::Departed;
use crate::serve::ejection::EjectionRecord;
use crate::serve::estate::{Estate, PortParts};
use crate::stats::{BackendStats, ServiceStats, SourceStats};

/// ServicePorts or backends in one parcel. What is said of one is less than 8 KiB.
const AT_ONCE: usize = 128;

/// Pins in one parcel: with as many backends that is half of what fits.
const PINS_AT_ONCE: usize = 8_192;

/// Bytes of a pin: see [`pin_bytes`].
const PIN_BYTES: usize = 16;

/// The name of a ServicePort, in its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortName {
    namespace: String,
    service: String,
    #[serde(default)]
    port: String,
    protocol: Protocol,
}

impl From<&ServicePortName> for PortName {
    fn from(name: &ServicePortName) -> Self {
        Self {
            namespace: name.service.namespace.to_string(),
            service: name.service.name.to_string(),
            port: name.port.to_string(),
            protocol: name.protocol,
        }
    }
}

impl From<PortName> for ServicePortName {
    fn from(PortName { namespace, service, port, protocol }: PortName) -> Self {
        Self::new(ObjectName::new(namespace, service), port, protocol)
    }
}

/// A ServicePort.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PortSaid {
    pub(super) port: PortName,
    #[serde(default)]
    pub(super) counts: Counts,
    /// Whose addresses its backends saw.
    #[serde(default)]
    pub(super) sources: Counts,
    #[serde(default)]
    pub(super) turns: Vec<TurnSaid>,
    /// What those have carried that are not among its backends any more.
    #[serde(default)]
    pub(super) departed: Counts,
    /// Clients that session affinity has forgotten before their time.
    #[serde(default)]
    pub(super) evicted: u64,
}

/// Whose turn it is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TurnSaid {
    family: Family,
    scope: Scope,
    turn: u64,
}

/// A backend.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct BackendSaid {
    pub(super) port: PortName,
    pub(super) address: SocketAddr,
    #[serde(default)]
    pub(super) counts: Counts,
    /// Microseconds that the last successful connect took; 0 before the first.
    #[serde(default)]
    pub(super) connect_us: u64,
    #[serde(default)]
    pub(super) ejection: Option<EjectionRecord>,
}

/// What was said of counters: who goes on counting knows from where on it is more.
#[derive(Debug, Default)]
pub(super) struct CountersSaid {
    pub(super) process: Counts,
    pub(super) ports: Vec<PortSaid>,
    pub(super) backends: Vec<BackendSaid>,
}

/// Clients of a ServicePort. The pins are bytes.
#[derive(Debug, Serialize, Deserialize)]
struct PinsSaid {
    port: PortName,
    seeds: Seeds,
    #[serde(default)]
    phase_ms: u32,
    /// What pins say by number.
    backends: Vec<SocketAddr>,
}

/// Which clients stay where. Of these there may be very many: so they are said while all is served, and at the standstill those
/// alone are said again that have come since.
pub(crate) fn pins(estate: &Estate, now: Instant) -> impl Iterator<Item = Parcel> {
    estate.ports.values().flat_map(move |port| pins_said(port, now, u32::MAX))
}

/// What there is to say of all of them, and which clients have come since pins were said. To be asked for when nobody counts
/// any more, but for what stays; `said` is what was said of counters.
pub(super) fn parcels<'e>(
    estate: &'e Estate,
    now: Instant,
    pins_said_at: Instant,
    said: &'e RefCell<CountersSaid>,
) -> impl Iterator<Item = Parcel> {
    let process = std::iter::once_with(|| {
        let counts = Counts::of(&Whole);
        let parcel = Parcel::new(Kind::Process, &counts);
        said.borrow_mut().process = counts;
        parcel
    });
    let ports = estate.ports.values().filter_map(port_said);
    let ports = in_parcels(Kind::Port, ports, |ports| said.borrow_mut().ports.extend(ports));
    let backends = estate.ports.values().flat_map(move |port| backends_said(port, now));
    let backends = in_parcels(Kind::Backend, backends, |backends| said.borrow_mut().backends.extend(backends));
    let oldest = now.saturating_duration_since(pins_said_at).as_secs() + 1; // Their age is told in whole seconds.
    let oldest = u32::try_from(oldest).unwrap_or(u32::MAX);
    let pins = estate.ports.values().flat_map(move |port| pins_said(port, now, oldest));
    process.chain(ports).chain(backends).chain(pins)
}

/// What is said of these.
pub(super) fn port_parcels(ports: impl Iterator<Item = PortSaid>) -> impl Iterator<Item = Parcel> {
    in_parcels(Kind::Port, ports, drop)
}

/// What is said of these.
pub(super) fn backend_parcels(backends: impl Iterator<Item = BackendSaid>) -> impl Iterator<Item = Parcel> {
    in_parcels(Kind::Backend, backends, drop)
}

/// `keep` is given what was written: copies would have to be made while nothing moves.
fn in_parcels<T: Serialize>(
    kind: Kind,
    mut said: impl Iterator<Item = T>,
    mut keep: impl FnMut(Vec<T>),
) -> impl Iterator<Item = Parcel> {
    std::iter::from_fn(move || {
        let some: Vec<_> = said.by_ref().take(AT_ONCE).collect();
        let parcel = (!some.is_empty()).then(|| Parcel::new(kind, &some));
        keep(some);
        parcel
    })
}

fn port_said(port: &PortParts) -> Option<PortSaid> {
    let counts = Counts::of(port.state.stats.so_far());
    let sources = Counts::of(port.state.preserve.stats.so_far());
    let turns = port.balancers.iter().filter(|balancer| balancer.turn() > 0);
    let turns =
        turns.map(|balancer| TurnSaid { family: balancer.family, scope: balancer.scope, turn: balancer.turn() as u64 });
    let departed = port.departed.as_deref().map(departed_said).unwrap_or_default();
    let evicted = port.state.affinity.evicted.get();
    let said = PortSaid { port: (&port.state.name).into(), counts, sources, turns: turns.collect(), departed, evicted };
    let has_counted = [&said.counts, &said.sources, &said.departed].iter().any(|counts| !counts.is_empty());
    (has_counted || !said.turns.is_empty() || evicted > 0).then_some(said)
}

/// What those have carried that have left.
pub(super) fn departed_said(departed: &Departed) -> Counts {
    let sum = BackendStats::default();
    departed.stats().for_each(|stats| sum.absorb(stats));
    Counts::of(&sum)
}

fn backends_said(port: &PortParts, now: Instant) -> impl Iterator<Item = BackendSaid> {
    let of_port = move |backend: &Backend| {
        let stats = backend.stats.so_far();
        let (counts, ejection) = (Counts::of(stats), backend.ejection.export(now));
        (!counts.is_empty() || ejection.is_some()).then(|| BackendSaid {
            port: (&port.state.name).into(),
            address: backend.address(),
            counts,
            connect_us: stats.connect_us.get(),
            ejection,
        })
    };
    port.backends.iter().filter_map(move |backend| of_port(backend))
}

/// Pins that were used within so many seconds.
fn pins_said(port: &PortParts, now: Instant, oldest: u32) -> Vec<Parcel> {
    let Some(Memory { seeds, phase_ms, mut pins }) = port.state.affinity.export(now) else { return Vec::new() };
    pins.retain(|pin| pin.age <= oldest);
    let addresses: BTreeMap<_, _> = port.backends.iter().map(|backend| (backend.id, backend.address())).collect();
    let parcel = |pins: &[PinRecord]| {
        // Of those that have left a pin binds nobody. The others are said where they occur: there may be more than fit.
        let ids: BTreeSet<_> = pins.iter().map(|pin| pin.backend).filter(|id| addresses.contains_key(id)).collect();
        let numbers: BTreeMap<_, _> = ids.into_iter().zip(0..).collect();
        let backends = numbers.keys().filter_map(|id| addresses.get(id).copied()).collect();
        let numbered = |pin: &PinRecord| Some(PinRecord { backend: *numbers.get(&pin.backend)?, ..*pin });
        let bytes: Vec<_> = pins.iter().filter_map(numbered).map(pin_bytes).collect();
        let said = PinsSaid { port: (&port.state.name).into(), seeds, phase_ms, backends };
        Parcel::new(Kind::Pins, &said).with_bytes([bytes.as_flattened()])
    };
    pins.chunks(PINS_AT_ONCE).map(parcel).collect()
}

/// Key, number of the backend, and age with the scope in its lowest bit; the lowest byte first.
fn pin_bytes(PinRecord { key, scope, backend, age }: PinRecord) -> [u8; PIN_BYTES] {
    let age = age.min(u32::MAX >> 1) << 1 | u32::from(scope == Scope::Local);
    let mut bytes = [0; PIN_BYTES];
    bytes[..8].copy_from_slice(&key.to_le_bytes());
    bytes[8..12].copy_from_slice(&backend.to_le_bytes());
    bytes[12..].copy_from_slice(&age.to_le_bytes());
    bytes
}

fn pin_of(bytes: &[u8; PIN_BYTES]) -> PinRecord {
    let [key, other] = [0, 8].map(|from| std::array::from_fn(|index| bytes[from + index]));
    let (key, other) = (u64::from_le_bytes(key), u64::from_le_bytes(other));
    let (backend, age) = (other as u32, (other >> 32) as u32);
    let scope = if age & 1 == 0 { Scope::Cluster } else { Scope::Local };
    PinRecord { key, scope, backend, age: age >> 1 }
}

/// What the other process has said of ServicePorts, until it counts.
#[derive(Debug, Default)]
pub(crate) struct ServicesTaken {
    process: Vec<Counts>,
    ports: Vec<PortSaid>,
    backends: Vec<BackendSaid>,
    /// With when they came.
    pins: Vec<(PinsSaid, Vec<PinRecord>, Instant)>,
}

impl ServicesTaken {
    /// Reads a parcel of [`parcels`].
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn take(&mut self, parcel: &Parcel) -> Result<(), ParcelError> {
        match parcel.kind {
            Kind::Process => self.process.push(parcel.said()?),
            Kind::Port => self.ports.extend(parcel.said::<Vec<_>>()?),
            Kind::Backend => self.backends.extend(parcel.said::<Vec<_>>()?),
            Kind::Pins => {
                let pins = parcel.bytes().as_chunks::<PIN_BYTES>().0.iter().map(pin_of);
                self.pins.push((parcel.said()?, pins.collect(), Instant::now()));
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads what was counted, and nothing else: whose turn it is and who is ejected is known here.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub(super) fn take_counts(&mut self, parcel: &Parcel) -> Result<(), ParcelError> {
        let (ports, backends) = (self.ports.len(), self.backends.len());
        self.take(parcel)?;
        self.ports[ports..].iter_mut().for_each(|port| port.turns.clear());
        for backend in &mut self.backends[backends..] {
            (backend.connect_us, backend.ejection) = (0, None);
        }
        Ok(())
    }

    /// The same, but for what the process as a whole has counted: in a test that is the same one.
    #[cfg(test)]
    pub(super) fn of_services(self) -> Self {
        Self { process: Vec::new(), ..self }
    }

    /// Goes on from there. To be called before anybody comes.
    pub(crate) fn commit(self, estate: &Estate, heirs: &mut Heirs<'_>, now: Instant) {
        self.process.iter().for_each(|counts| counts.add_to(&Whole));
        for PortSaid { port, counts, sources, turns, departed, evicted } in self.ports {
            let name: ServicePortName = port.into();
            let Some(port) = estate.ports.get(&name) else { continue };
            heirs.count_long_gone(&name, &departed);
            add::<ServiceStats>(&counts, || &port.state.stats);
            add::<SourceStats>(&sources, || &port.state.preserve.stats);
            port.state.affinity.evicted.add(evicted);
            for balancer in &port.balancers {
                let is_its = |said: &&TurnSaid| (said.family, said.scope) == (balancer.family, balancer.scope);
                if let Some(said) = turns.iter().find(is_its) {
                    balancer.go_on_from(said.turn as usize);
                }
            }
        }
        for said in self.backends {
            let (_, backend) = heirs.of(&said.port.clone().into(), said.address);
            said.commit(&backend, now);
        }
        for (said, pins, came) in self.pins {
            if let Some(port) = estate.ports.get(&said.port.clone().into()) {
                said.commit(&pins, port, came);
            }
        }
    }
}

/// Counters that are on demand are made only where there is something to count.
fn add<'s, S: super::counts::Counters + 's>(counts: &Counts, counters: impl FnOnce() -> &'s S) {
    if !counts.is_empty() {
        counts.add_to(counters());
    }
}

impl BackendSaid {
    fn commit(self, backend: &Backend, now: Instant) {
        add::<BackendStats>(&self.counts, || &backend.stats);
        if self.connect_us > 0 && backend.stats.so_far().connect_us.get() == 0 {
            backend.stats.connect_us.set(self.connect_us);
        }
        if let Some(record) = self.ejection {
            backend.ejection.import(record, now);
        }
    }
}

impl PinsSaid {
    /// Pins of backends that are not there bind nobody.
    fn commit(&self, pins: &[PinRecord], port: &PortParts, now: Instant) {
        let id_of = |address: &SocketAddr| port.backend(*address).map(|backend| backend.id);
        let ids: Vec<_> = self.backends.iter().map(id_of).collect();
        let pins = pins.iter().filter_map(|pin| {
            let id = ids.get(pin.backend as usize).copied().flatten()?;
            Some(PinRecord { backend: id, ..*pin })
        });
        let memory = Memory { seeds: self.seeds, phase_ms: self.phase_ms.min(999), pins: pins.collect() };
        port.state.affinity.import(&memory, now);
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::num::NonZeroU8;
    use std::sync::Arc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::handover::parcel::LONGEST_BODY_BYTES;
    use crate::name::BalancerKey;
    use crate::serve::balancer::{Balancer, PortState, Table, Tried};
    use crate::stats::{ConnectFailure, DropReason, Entry};

    /// A process's view of one ServicePort whose backends have these addresses, with ids of its own.
    fn estate(first_id: u32, backends: &[u16]) -> (Estate, Arc<Balancer>) {
        let name = ServicePortName::new(ObjectName::parse("default/web"), "http", Protocol::Tcp);
        let state = Arc::new(PortState::new(name.clone()));
        state.affinity.set_timeout(Some(Duration::from_secs(60)));
        let backend = |(port, id): (&u16, u32)| Arc::new(Backend::new(id, ([10, 0, 0, 1], *port).into()));
        let backends: Arc<[_]> = backends.iter().zip(first_id..).map(backend).collect();
        let key = BalancerKey { port: name.clone(), family: Family::V4, scope: Scope::Cluster };
        let balancer = Arc::new(Balancer::new(key, Arc::clone(&state), Table::new(Arc::clone(&backends), &[])));
        let parts = PortParts { state, balancers: [Arc::clone(&balancer)].into(), backends, departed: None, tcp: None };
        (Estate::of_ports(BTreeMap::from([(name, parts)])), balancer)
    }

    fn client(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(0x0a00_0000 + number).into()
    }

    fn pick(balancer: &Balancer, number: u32, now: Instant) -> SocketAddr {
        balancer.pick(client(number), &Tried::default(), now).expect("a backend").address()
    }

    /// What is said at a standstill.
    fn said(estate: &Estate, now: Instant, pins_said_at: Instant) -> Vec<Parcel> {
        parcels(estate, now, pins_said_at, &RefCell::default()).collect()
    }

    fn hand_over(old: &Estate, new: &Estate, now: Instant) -> usize {
        let mut taken = ServicesTaken::default();
        let parcels: Vec<_> = pins(old, now).chain(said(old, now, now)).collect();
        for parcel in &parcels {
            assert!(parcel.body.len() <= LONGEST_BODY_BYTES, "{:?}: {} bytes", parcel.kind, parcel.body.len());
            taken.take(parcel).expect("what was written");
        }
        taken.commit(new, &mut Heirs::of_estate(new), now);
        parcels.len()
    }

    #[test]
    fn f33_t150_given_pinned_clients_when_another_process_takes_over_then_each_gets_its_backend() {
        let now = Instant::now();
        let (old, old_web) = estate(1, &[1, 2, 3]);
        let (new, new_web) = estate(40, &[2, 3, 4]);
        let before: Vec<_> = (0..50_000).map(|number| pick(&old_web, number, now)).collect();

        hand_over(&old, &new, now);

        let gone = SocketAddr::from(([10, 0, 0, 1], 1));
        let kept = (0..).zip(&before).filter(|(number, backend)| pick(&new_web, *number, now) == **backend);
        let stayed = before.iter().filter(|backend| **backend != gone).count();
        assert!(kept.count() >= stayed - 200, "but for a few whose set was full, and who are counted");
        assert!((0..).zip(&before).all(|(number, _)| pick(&new_web, number, now) != gone));
    }

    #[test]
    fn t150_given_clients_that_come_while_pins_are_said_when_all_stands_still_then_they_alone_are_said_again() {
        let now = Instant::now();
        let (old, old_web) = estate(1, &[1, 2, 3]);
        let (new, new_web) = estate(40, &[1, 2, 3]);
        let mut taken = ServicesTaken::default();
        (0..100).for_each(|number| _ = pick(&old_web, number, now));
        let asked = now + Duration::from_secs(20);
        pins(&old, asked).for_each(|parcel| taken.take(&parcel).expect("what was written"));
        let late: Vec<_> = (100..110).map(|number| pick(&old_web, number, asked)).collect();

        let still = asked + Duration::from_secs(2);
        let mut again = said(&old, still, asked);
        again.retain(|parcel| parcel.kind == Kind::Pins);

        assert_eq!(again.iter().map(|parcel| parcel.bytes().len()).sum::<usize>(), 10 * PIN_BYTES);
        again.iter().for_each(|parcel| taken.take(parcel).expect("what was written"));
        taken.commit(&new, &mut Heirs::of_estate(&new), still);
        assert_eq!((100..110).map(|number| pick(&new_web, number, now)).collect::<Vec<_>>(), late);
        assert!((0..100).all(|number| pick(&new_web, number, now) == pick(&old_web, number, now)));
    }

    #[test]
    fn t234_given_turns_counters_and_an_ejection_when_another_process_takes_over_then_it_goes_on_from_there() {
        let now = Instant::now();
        let (old, old_web) = estate(1, &[1, 2, 3]);
        let (new, new_web) = estate(1, &[1, 2, 3]);
        for estate in [&old, &new] {
            estate.ports.values().for_each(|port| port.state.affinity.set_timeout(None));
        }
        let backends = &old.ports.values().next().expect("one").backends;
        (0..4).for_each(|number| _ = pick(&old_web, number, now));
        old_web.port.stats.dropped.count(DropReason::EjectedAll);
        backends[0].stats.upstream_bytes.add(Entry::ClusterIp, 1 << 40);
        backends[0].stats.connect_us.set(321);
        old_web.note_failure(&backends[2], ConnectFailure::Refused, NonZeroU8::MIN, now);

        hand_over(&old, &new, now);

        let heirs = &new.ports.values().next().expect("one").backends;
        assert_eq!(heirs[0].stats.upstream_bytes.of(Entry::ClusterIp), 1 << 40);
        assert_eq!((heirs[0].stats.connect_us.get(), heirs[2].stats.ejections.get()), (321, 1));
        assert_eq!(new_web.port.stats.dropped.get(DropReason::EjectedAll), 1);
        assert!(heirs[2].is_ejected() && !heirs[1].is_ejected());
        let next = |web: &Balancer| [(); 4].map(|()| pick(web, 1, now).port());
        assert_eq!(next(&new_web), next(&old_web));
    }

    #[test]
    fn t234_given_backends_that_left_before_or_meanwhile_when_another_process_takes_over_then_its_sums_have_them() {
        let now = Instant::now();
        let (mut old, _) = estate(1, &[1, 2]);
        let (new, _) = estate(1, &[1]);
        let left = Arc::new(Backend::new(9, ([10, 0, 0, 1], 9).into()));
        left.stats.connections.add(Entry::NodePort, 4);
        let port = old.ports.values_mut().next().expect("one");
        port.departed = Some(Arc::new(Departed::of(left)));
        port.backends.iter().for_each(|backend| backend.stats.connections.add(Entry::NodePort, 1));

        let mut taken = ServicesTaken::default();
        said(&old, now, now).iter().for_each(|parcel| taken.take(parcel).expect("what was written"));
        let mut heirs = Heirs::of_estate(&new);
        taken.commit(&new, &mut heirs, now);

        let carried = |backend: &Arc<Backend>| backend.stats.connections.of(Entry::NodePort);
        let gone: u64 = heirs.stand_ins().values().flatten().map(carried).sum();
        let known: u64 = new.ports.values().flat_map(|port| port.backends.iter()).map(carried).sum();
        assert_eq!((known, gone), (1, 5), "one is known here, one left meanwhile, one before");
    }

    #[test]
    fn given_nothing_to_say_or_a_service_that_is_gone_when_handed_over_then_nothing_is_said_or_counted() {
        let now = Instant::now();
        let (old, web) = estate(1, &[1]);
        assert_eq!(hand_over(&old, &old, now), 1, "the numbers of the process alone");
        pick(&web, 1, now);
        web.port.stats.accepted.increment();

        hand_over(&old, &Estate::of_ports(BTreeMap::new()), now);
    }

    #[test]
    fn given_more_than_one_parcel_can_say_when_handed_over_then_all_of_it_comes() {
        let now = Instant::now();
        let numbers: Vec<_> = (1..=1_000).collect();
        let ((old, _), (new, _)) = (estate(1, &numbers), estate(5, &numbers));
        for (backend, number) in old.ports.values().flat_map(|port| port.backends.iter()).zip(1..) {
            backend.stats.flows.add(number);
        }

        hand_over(&old, &new, now);

        let flows = new.ports.values().flat_map(|port| port.backends.iter()).map(|backend| backend.stats.flows.get());
        assert!(flows.eq(1..=1_000));
    }

    proptest! {
        #[test]
        fn t150_given_any_pin_when_written_and_read_then_it_is_the_same(
            key: u64, backend: u32, age in 0..u32::MAX / 2, local: bool,
        ) {
            let scope = if local { Scope::Local } else { Scope::Cluster };
            let pin = PinRecord { key, scope, backend, age };

            prop_assert_eq!(pin_of(&pin_bytes(pin)), pin);
        }
    }
}
