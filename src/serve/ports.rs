//! The ServicePorts that run: each with its balancers, its backends and the keys of its listeners.
//!
//! What a table holds is decided in `plan`; where listeners lead is set in `listeners`.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use foldhash::fast::RandomState;
use tracing::warn;

use crate::endpoints::{Usable, UsableEndpoint};
use crate::frozen::add_all;
use crate::name::{BalancerKey, Family, ListenKey, Scope, ServicePortName};
use crate::plan::{Backends, TcpSettings};
use crate::reply_path::ReplyPath;
use crate::serve::balancer::{Backend, Balancer, PortState, Table};
use crate::serve::departed::Departed;
use crate::serve::estate::PortParts;
use crate::stats::DropReason;
use crate::value::OrNone;

/// All ServicePorts that have a balancer. Owned by `Listeners`, by value.
#[derive(Debug, Default)]
pub(super) struct Ports(BTreeMap<ServicePortName, Port>);

/// A ServicePort's state, its balancers, its backends and its UDP listeners. There are tens of thousands, most with one of
/// each: hence plain lists without room to spare.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) state: Arc<PortState>,
    /// One for each family and scope that is asked for.
    balancers: Vec<Arc<Balancer>>,
    /// By address. Mostly they are the picks of its only table, too, and then both are one list.
    pub(super) backends: Arc<[Arc<Backend>]>,
    /// Those that were among them; `None` where there are none.
    pub(super) departed: Option<Arc<Departed>>,
    /// Those over UDP: a swapped table concerns the flows that they have.
    pub(super) listeners: Vec<ListenKey>,
    /// What the Service says about its connections, or said last.
    tcp: Option<Arc<TcpSettings>>,
    next_backend: u32,
}

impl Ports {
    pub(super) fn get(&self, name: &ServicePortName) -> Option<&Port> {
        self.0.get(name)
    }

    /// Makes room for ServicePorts that are about to come, before each takes memory of its own.
    pub(super) fn expect<'n>(&mut self, names: impl Iterator<Item = &'n ServicePortName>) {
        let new = names.filter(|name| !self.0.contains_key(*name));
        let new = new.map(|name| (name.clone(), Port::new(name.clone()))).collect();
        add_all(&mut self.0, new);
    }

    /// Stores a balancer's table; makes the balancer where it is new.
    pub(super) fn swap(&mut self, key: BalancerKey, wanted: &Backends, reply_path: &ReplyPath) {
        let port = self.0.entry(key.port.clone()).or_insert_with(|| Port::new(key.port.clone()));
        port.state.affinity.set_timeout(wanted.affinity_timeout);
        port.state.affinity.set_ipv6_prefix(wanted.balancing.ipv6_prefix.get());
        port.state.preserve.set(wanted.source.is_preserved(), reply_path);
        port.state.cap.set(wanted.tcp.as_ref().and_then(|tcp| tcp.max_connections));
        let table = port.table(wanted);
        match port.balancer(key.family, key.scope) {
            Some(balancer) => balancer.swap(table),
            None => {
                let balancer = Balancer::new(key, Arc::clone(&port.state), table);
                push(&mut port.balancers, Arc::new(balancer));
            }
        }
    }

    /// No listener needs this balancer any more.
    pub(super) fn retire(&mut self, key: &BalancerKey) {
        if let Some(port) = self.0.get_mut(&key.port) {
            port.balancers.retain(|balancer| (balancer.family, balancer.scope) != (key.family, key.scope));
        }
    }

    /// Drops the backends that no table of the ServicePort names any more (connections keep theirs alive), and the
    /// ServicePort without balancers. True where that ends connections: then they have to be woken.
    pub(super) fn forget(&mut self, name: &ServicePortName, now: Instant) -> bool {
        let Some(port) = self.0.get_mut(name) else { return false };
        let tables: Vec<_> = port.balancers.iter().map(|balancer| balancer.table()).collect();
        let serves = |backend: &Backend| tables.iter().any(|table| table.serves(backend));
        if !tables.is_empty() && port.backends.iter().all(|backend| serves(backend)) {
            return false;
        }
        let (staying, leaving): (Vec<_>, Vec<_>) = port.backends.iter().cloned().partition(|backend| serves(backend));
        let ends = port.part_with(&leaving, now);
        match tables.is_empty() {
            true => drop(self.0.remove(name)),
            false => {
                let departed = port.departed.take().unwrap_or_default();
                port.departed = Some(Arc::new(departed.with(&leaving, now)));
                port.backends = staying.into();
            }
        }
        ends
    }

    /// Backends of another process are none here: what they carry is summed up with that of those that have left.
    pub(super) fn inherit(&mut self, name: &ServicePortName, departed: &[Arc<Backend>], now: Instant) {
        if let Some(port) = self.0.get_mut(name) {
            let before = port.departed.take().unwrap_or_default();
            port.departed = Some(Arc::new(before.with(departed, now)));
        }
    }

    /// The UDP listener leads to this ServicePort from now on.
    pub(super) fn own(&mut self, name: &ServicePortName, key: ListenKey) {
        if let Some(port) = self.0.get_mut(name) {
            push(&mut port.listeners, key);
        }
    }

    /// The listener leads there no more.
    pub(super) fn disown(&mut self, name: &ServicePortName, key: &ListenKey) {
        if let Some(port) = self.0.get_mut(name) {
            port.listeners.retain(|own| own != key);
        }
    }

    /// No listener leads anywhere any more.
    pub(super) fn disown_all(&mut self) {
        self.0.values_mut().for_each(|port| port.listeners.clear());
    }

    /// Marks the backends that are listeners of this process, and those that are no more, among those whose keys have
    /// `turned`: one walk over all backends, as nobody keeps an index for what should never be.
    pub(super) fn mark_own_backends(
        &self,
        turned: &HashSet<ListenKey, RandomState>,
        is_listener: impl Fn(&ListenKey) -> bool,
    ) {
        for (name, port) in &self.0 {
            for backend in port.backends.iter() {
                let address = backend.address();
                let key = ListenKey::at(address, name.protocol);
                if !turned.contains(&key) {
                    continue;
                }
                let own = is_listener(&key);
                if own && !backend.is_own() {
                    warn!(service = %name, backend = %address, reason = %DropReason::Loop, "backend is a listener of this relay: not used");
                }
                backend.set_own(own);
            }
        }
    }

    /// What a hand-over asks for of each.
    pub(super) fn parts(&self) -> BTreeMap<ServicePortName, PortParts> {
        self.0.iter().map(|(name, port)| (name.clone(), port.parts())).collect()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Port {
    fn new(name: ServicePortName) -> Self {
        Self {
            state: Arc::new(PortState::new(name)),
            balancers: Vec::new(),
            backends: Arc::default(),
            departed: None,
            listeners: Vec::new(),
            tcp: None,
            next_backend: 0,
        }
    }

    pub(super) fn balancer(&self, family: Family, scope: Scope) -> Option<&Arc<Balancer>> {
        self.balancers.iter().find(|balancer| (balancer.family, balancer.scope) == (family, scope))
    }

    pub(super) fn balancers(&self) -> &[Arc<Balancer>] {
        &self.balancers
    }

    fn parts(&self) -> PortParts {
        PortParts {
            state: Arc::clone(&self.state),
            balancers: self.balancers.as_slice().into(),
            backends: Arc::clone(&self.backends),
            departed: self.departed.clone(),
            tcp: self.tcp.clone(),
        }
    }

    pub(super) fn known_backend(&self, address: SocketAddr) -> Option<&Arc<Backend>> {
        self.backends.get(self.place_of(address).ok()?)
    }

    fn place_of(&self, address: SocketAddr) -> Result<usize, usize> {
        self.backends.binary_search_by_key(&address, |backend| backend.address())
    }

    /// A table of the planned endpoints: a backend that is known keeps its counters and its id.
    fn table(&mut self, wanted: &Backends) -> Table {
        let Usable { picks, serving } = &wanted.usable;
        self.know(picks.iter().chain(serving.iter()));
        let picks = self.known(picks);
        if wanted.tcp.as_ref().is_some_and(|tcp| tcp.eject_after == Some(OrNone(None))) {
            picks.iter().for_each(|backend| backend.ejection.pardon());
        }
        self.tcp.clone_from(&wanted.tcp);
        let table = Table::new(picks, &self.known(serving)).balanced_by(wanted.balancing.balance, rand::random());
        table.with_settings(wanted.tcp.clone())
    }

    /// Says when connections to backends end whose endpoints have left. True where the Service wants that at all.
    fn part_with(&self, leaving: &[Arc<Backend>], now: Instant) -> bool {
        let Some(reset_after) = self.tcp.as_ref().and_then(|tcp| tcp.reset_after) else { return false };
        leaving.iter().for_each(|backend| backend.leave(now + reset_after));
        !leaving.is_empty()
    }

    /// The backends of some endpoints that are known: the list of all, where it is all of them.
    fn known(&self, endpoints: &[UsableEndpoint]) -> Arc<[Arc<Backend>]> {
        let addresses = endpoints.iter().map(|endpoint| endpoint.address());
        if addresses.clone().eq(self.backends.iter().map(|backend| backend.address())) {
            return Arc::clone(&self.backends);
        }
        addresses.filter_map(|address| self.known_backend(address).cloned()).collect()
    }

    /// Makes the backends that are not known yet. All at once, as the list is made anew.
    fn know<'a>(&mut self, endpoints: impl Iterator<Item = &'a UsableEndpoint>) {
        let new = |endpoint: &&UsableEndpoint| self.place_of(endpoint.address()).is_err();
        let new: BTreeSet<_> = endpoints.filter(new).map(|endpoint| endpoint.address()).collect();
        if new.is_empty() {
            return;
        }
        let mut all = self.backends.to_vec();
        for address in new {
            self.next_backend = self.next_backend.wrapping_add(1);
            all.push(Arc::new(Backend::new(self.next_backend, address)));
        }
        all.sort_unstable_by_key(|backend| backend.address());
        self.backends = all.into();
    }
}

/// Adds to a list that will hardly grow again: `Vec::push` alone would make room for four.
fn push<T>(list: &mut Vec<T>, item: T) {
    list.reserve_exact(1);
    list.push(item);
}
