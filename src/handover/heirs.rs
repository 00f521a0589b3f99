//! Who a connection or flow of another process belongs to here: ServicePorts and backends by name and address, and stand-ins
//! for those that are not there.
//!
//! A stand-in counts what is carried on for an endpoint that has left, as its backend would have done in the process that it
//! comes from; nobody asks it for anything else.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use crate::handover::counts::Counts;
use crate::name::ServicePortName;
use crate::serve::balancer::{Backend, PortState};
use crate::serve::estate::Estate;

/// No table has a backend with this id.
const DEPARTED: u32 = 0;

/// Where the stand-in is for all those that had left in the process that hands over: no backend has this address.
const LONG_GONE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Heirs<'e> {
    estate: &'e Estate,
    ports: BTreeMap<ServicePortName, Arc<PortState>>,
    backends: BTreeMap<(ServicePortName, SocketAddr), Arc<Backend>>,
}

impl<'e> Heirs<'e> {
    pub(crate) fn of_estate(estate: &'e Estate) -> Self {
        Self { estate, ports: BTreeMap::new(), backends: BTreeMap::new() }
    }

    /// The ServicePort of a name, and its backend at an address; stand-ins where there is none, always the same.
    pub(crate) fn of(&mut self, port: &ServicePortName, backend: SocketAddr) -> (Arc<PortState>, Arc<Backend>) {
        let known = self.estate.ports.get(port);
        let state = match known {
            Some(parts) => Arc::clone(&parts.state),
            None => {
                let stand_in = || Arc::new(PortState::new(port.clone()));
                Arc::clone(self.ports.entry(port.clone()).or_insert_with(stand_in))
            }
        };
        if let Some(known) = known.and_then(|parts| parts.backend(backend)) {
            return (state, Arc::clone(known));
        }
        let stand_in = || Arc::new(Backend::new(DEPARTED, backend));
        (state, Arc::clone(self.backends.entry((port.clone(), backend)).or_insert_with(stand_in)))
    }

    /// Counts what all those have carried that had left a ServicePort before.
    pub(crate) fn count_long_gone(&mut self, port: &ServicePortName, counts: &Counts) {
        if !counts.is_empty() {
            let (_, stand_in) = self.of(port, LONG_GONE);
            counts.add_to(&*stand_in.stats);
        }
    }

    /// The stand-ins of backends, for the sums of the ServicePorts that are there.
    pub(crate) fn stand_ins(self) -> BTreeMap<ServicePortName, Vec<Arc<Backend>>> {
        let mut by_port = BTreeMap::<_, Vec<_>>::new();
        for ((port, _), backend) in self.backends {
            if self.estate.ports.contains_key(&port) {
                by_port.entry(port).or_default().push(backend);
            }
        }
        by_port
    }

    /// True where no table has the backend.
    pub(crate) fn is_departed(backend: &Backend) -> bool {
        backend.id == DEPARTED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{ObjectName, Protocol};
    use crate::serve::estate::PortParts;
    use crate::stats::{BackendStats, Entry};

    fn name(service: &str) -> ServicePortName {
        ServicePortName::new(ObjectName::parse(service), "http", Protocol::Tcp)
    }

    #[test]
    fn t234_given_backends_that_are_not_there_when_asked_for_then_each_has_one_stand_in_that_its_service_counts() {
        let at = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let (web, other) = (name("default/web"), name("default/gone"));
        let parts = PortParts {
            state: Arc::new(PortState::new(web.clone())),
            balancers: Box::default(),
            backends: [Arc::new(Backend::new(1, at(1)))].into(),
            departed: None,
            tcp: None,
        };
        let estate = Estate::of_ports(BTreeMap::from([(web.clone(), parts)]));
        let carried = BackendStats::default();
        carried.connections.add(Entry::NodePort, 7);
        let mut heirs = Heirs::of_estate(&estate);

        let (_, known) = heirs.of(&web, at(1));
        let (_, gone) = heirs.of(&web, at(2));
        let (_, again) = heirs.of(&web, at(2));
        heirs.of(&other, at(3));
        heirs.count_long_gone(&web, &Counts::of(&carried));
        heirs.count_long_gone(&web, &Counts::default());

        assert!(!Heirs::is_departed(&known) && Heirs::is_departed(&gone) && Arc::ptr_eq(&gone, &again));
        gone.stats.connections.add(Entry::ClusterIp, 2);
        let stand_ins = heirs.stand_ins();
        assert_eq!(stand_ins.keys().collect::<Vec<_>>(), [&web], "nobody sums up for a Service that is gone");
        let sum: u64 = stand_ins[&web].iter().map(|backend| backend.stats.connections.get()).sum();
        assert_eq!((stand_ins[&web].len(), sum), (2, 9));
    }
}
