//! A hot-swapped table of backends, and the pick: exact round robin, session affinity, no waiting.
//!
//! What to put into a table is decided in `plan`; who reaches the picked backend is `connect` and `udp`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;

use crate::name::{BalancerKey, ServicePortName};
use crate::serve::affinity::Affinity;
use crate::stats::{BackendStats, ServiceStats};

/// One endpoint of one ServicePort. Made by `Listeners`, carried over from table to table and shared by both scopes.
#[derive(Debug)]
pub struct Backend {
    /// Small number, unique in its ServicePort for the life of the process: what a pin remembers.
    pub id: u32,
    /// Where it answers.
    pub address: SocketAddr,
    /// What it carried.
    pub stats: BackendStats,
}

/// What the balancers of a ServicePort share, over all scopes, families and swaps.
#[derive(Debug)]
pub struct PortState {
    /// Whose state this is.
    pub name: ServicePortName,
    /// What happened before a backend was chosen.
    pub stats: ServiceStats,
    /// Which client stays with which backend.
    pub affinity: Affinity,
    cursor: AtomicUsize,
}

impl PortState {
    /// Fresh state for a ServicePort.
    pub fn new(name: ServicePortName) -> Self {
        Self { name, stats: ServiceStats::default(), affinity: Affinity::default(), cursor: AtomicUsize::new(0) }
    }
}

/// The backends of one balancer at one moment. Immutable: a change stores another table.
#[derive(Debug, Default)]
pub struct Table {
    picks: Box<[Arc<Backend>]>,
    serving: Box<[u32]>,
}

impl Table {
    /// `picks` may get new traffic; `serving` (a superset of them) keeps what it has.
    pub fn new(picks: Vec<Arc<Backend>>, serving: &[Arc<Backend>]) -> Self {
        let mut serving: Vec<u32> = serving.iter().chain(&picks).map(|backend| backend.id).collect();
        serving.sort_unstable();
        serving.dedup();
        Self { picks: picks.into_boxed_slice(), serving: serving.into_boxed_slice() }
    }

    /// The backends that may get new traffic, in the order of picks.
    pub fn picks(&self) -> &[Arc<Backend>] {
        &self.picks
    }

    /// True where the backend may keep its connections and flows.
    pub fn serves(&self, backend: &Backend) -> bool {
        self.serving.binary_search(&backend.id).is_ok()
    }

    fn pick_by_id(&self, id: u32) -> Option<&Arc<Backend>> {
        self.picks.iter().find(|backend| backend.id == id)
    }

    /// The first backend from `start` on that was not tried yet, once around.
    fn next_untried(&self, start: usize, tried: &Tried) -> Option<&Arc<Backend>> {
        let count = self.picks.len();
        let first = start.checked_rem(count)?;
        (0..count).map(|step| &self.picks[(first + step) % count]).find(|backend| !tried.contains(backend))
    }
}

/// The backends that one connection has tried already.
#[derive(Debug, Default)]
pub struct Tried(Vec<u32>);

impl Tried {
    /// Notes a try.
    pub fn add(&mut self, backend: &Backend) {
        self.0.push(backend.id);
    }

    /// True once the backend was tried.
    pub fn contains(&self, backend: &Backend) -> bool {
        self.0.contains(&backend.id)
    }

    /// How many were tried.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// Chooses a backend for one ServicePort, family and scope. Shared by server tasks; `control` swaps its table.
#[derive(Debug)]
pub struct Balancer {
    /// What it chooses for.
    pub key: BalancerKey,
    /// What it shares with the ServicePort's other balancers.
    pub port: Arc<PortState>,
    table: ArcSwap<Table>,
}

impl Balancer {
    /// A balancer with its first table.
    pub fn new(key: BalancerKey, port: Arc<PortState>, table: Table) -> Self {
        Self { key, port, table: ArcSwap::from_pointee(table) }
    }

    /// Chooses a backend for a client that has not been tried by this connection; `None` when there is none left.
    ///
    /// A client with a live pin gets its backend; after a failed try the pin moves to the next one.
    pub fn pick(&self, client: IpAddr, tried: &Tried, now: Instant) -> Option<Arc<Backend>> {
        let table = self.table.load(); // one load: everything below belongs to one moment
        let affinity = &self.port.affinity;
        let pin = affinity.recall(client, self.key.scope, now);
        let pinned = pin.and_then(|id| table.pick_by_id(id));
        if let Some(backend) = pinned
            && !tried.contains(backend)
        {
            return Some(Arc::clone(backend));
        }
        let start = self.port.cursor.fetch_add(1, Ordering::Relaxed);
        let backend = table.next_untried(start, tried)?;
        let kept = affinity.remember(client, self.key.scope, backend.id, pin, now);
        Some(Arc::clone(table.pick_by_id(kept).filter(|kept| !tried.contains(kept)).unwrap_or(backend)))
    }

    /// Stores another table. New picks see it at once; picks under way end with the old one.
    pub fn swap(&self, table: Table) {
        self.table.store(Arc::new(table));
    }

    /// The table now: for status and for sweeps, not for picks.
    pub fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    /// True where the backend may keep its connections and flows.
    pub fn serves(&self, backend: &Backend) -> bool {
        self.table.load().serves(backend)
    }
}
