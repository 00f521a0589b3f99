//! A hot-swapped table of backends, and the pick: session affinity, turns, no waiting; and who is left out for a time.
//!
//! Which backend a turn means is the table's to say (`table`), when one is left out `ejection`'s; what to put into a table
//! is decided in `plan`; who reaches the picked backend is `connect` and `udp`.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tracing::info;

use crate::name::{BalancerKey, Family, Scope, ServicePortName};
use crate::plan::TcpSettings;
use crate::serve::affinity::Affinity;
use crate::serve::ejection::Ejection;
use crate::serve::gate::Cap;
use crate::serve::moment::Moment;
use crate::serve::preserve::{Preserve, WaysBack};
pub use crate::serve::table::{Table, Tried};
use crate::stats::{BackendStats, ConnectFailure, OnDemand, ServiceStats};

/// One endpoint of one ServicePort. Made by `Listeners`, carried over from table to table and shared by both scopes.
#[derive(Debug)]
pub struct Backend {
    /// Small number, unique in its ServicePort for the life of the process: what a pin remembers.
    pub id: u32,
    /// Where it answers: its address and port, a third smaller than a `SocketAddr`.
    ip: IpAddr,
    port: u16,
    /// True while this process itself listens there.
    own: AtomicBool,
    /// What it carried.
    pub stats: OnDemand<BackendStats>,
    /// Whether it gets new connections.
    pub(crate) ejection: Ejection,
    /// When connections to it end, as a [`Moment`]; 0: when they are over.
    leaving: AtomicU64,
    /// Whether its answers to clients' addresses come here; nothing where nobody has asked.
    pub(super) ways_back: OnDemand<WaysBack>,
}

impl Backend {
    /// A backend that has not carried anything yet.
    pub fn new(id: u32, address: SocketAddr) -> Self {
        Self {
            id,
            ip: address.ip(),
            port: address.port(),
            own: AtomicBool::new(false),
            stats: OnDemand::default(),
            ejection: Ejection::default(),
            leaving: AtomicU64::new(0),
            ways_back: OnDemand::default(),
        }
    }

    /// Where it answers.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }

    /// How soon a client's address is tried again, where its answers to those do not come by this node.
    pub fn no_way_back_for(&self, now: Instant) -> Option<Duration> {
        self.ways_back.so_far().missing_for(now)
    }

    /// True while this process itself listens there: it is not picked, as each connection would make another one,
    /// without end.
    pub fn is_own(&self) -> bool {
        self.own.load(Ordering::Relaxed)
    }

    /// Connections and flows that are open to it now: what it is busy with.
    pub fn open_count(&self) -> u64 {
        let stats = self.stats.so_far();
        stats.active_connections.get() + stats.active_flows.get()
    }

    /// Says whether this process listens there. Known to `Listeners`.
    pub fn set_own(&self, own: bool) {
        self.own.store(own, Ordering::Relaxed);
    }

    /// For how long no new connection will be tried, 0 where the next one is; `None` where it gets its share.
    pub fn out_for(&self, now: Instant) -> Option<Duration> {
        self.ejection.out_for(now)
    }

    /// True while it gets no new connections, as it could not be reached again and again, until one client has reached it.
    pub fn is_ejected(&self) -> bool {
        self.ejection.is_out()
    }

    /// Has the connections to it end then, as its endpoint is not wanted any more. Who waits has to be woken.
    pub(crate) fn leave(&self, at: Instant) {
        self.leaving.store(Moment::of(at).0.max(1), Ordering::Relaxed); // Read by who is woken afterwards.
    }

    /// When connections to it end whatever they do.
    pub(crate) fn leaves_at(&self) -> Option<Instant> {
        match self.leaving.load(Ordering::Relaxed) {
            0 => None,
            moment => Some(Moment(moment).instant()),
        }
    }
}

/// What the balancers of a ServicePort share, over all scopes, families and swaps.
#[derive(Debug)]
pub struct PortState {
    /// Whose state this is.
    pub name: ServicePortName,
    /// What happened before a backend was chosen.
    pub stats: OnDemand<ServiceStats>,
    /// Which client stays with which backend.
    pub affinity: Affinity,
    /// How many TCP connections there may be.
    pub(crate) cap: Cap,
    /// Whether its backends are to see clients' addresses.
    pub preserve: Preserve,
}

impl PortState {
    /// Fresh state for a ServicePort.
    pub fn new(name: ServicePortName) -> Self {
        Self {
            name,
            stats: OnDemand::default(),
            affinity: Affinity::default(),
            cap: Cap::default(),
            preserve: Preserve::default(),
        }
    }

    /// True where it has as many TCP connections as the Service allows.
    pub(crate) fn is_full(&self) -> bool {
        self.cap.most().is_some_and(|most| self.stats.so_far().open.get() >= most)
    }
}

/// Counts a TCP connection as an open one of its ServicePort, for as long as it is there.
#[derive(Debug)]
pub(crate) struct Counted(Arc<PortState>);

impl Counted {
    /// Takes a place; `None` where the Service has as many connections as it allows.
    pub(crate) fn begin(port: &Arc<PortState>) -> Option<Self> {
        let open = &port.stats.open;
        let has_place = match port.cap.most() {
            Some(most) => open.increment_up_to(most),
            None => {
                open.increment();
                true
            }
        };
        has_place.then(|| Self(Arc::clone(port)))
    }

    /// One that another process has let in has its place, whatever the Service allows.
    pub(crate) fn go_on(port: &Arc<PortState>) -> Self {
        port.stats.open.increment();
        Self(Arc::clone(port))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.stats.open.decrement();
    }
}

/// Chooses a backend for one ServicePort, family and scope. Shared by server tasks; `control` swaps its table.
#[derive(Debug)]
pub struct Balancer {
    /// What it shares with the ServicePort's other balancers.
    pub port: Arc<PortState>,
    /// The family of its listeners and of its backends.
    pub family: Family,
    /// The endpoints that it may use.
    pub scope: Scope,
    table: ArcSwap<Table>,
    /// Turns since the balancer was made; survives swaps. One for each balancer: shared with those of the other
    /// family or scope, clients that alternate between them would always meet the same half of the backends.
    cursor: AtomicUsize,
}

impl Balancer {
    /// A balancer with its first table. The key's port is the one whose state is given.
    pub fn new(key: BalancerKey, port: Arc<PortState>, table: Table) -> Self {
        debug_assert_eq!(key.port, port.name);
        Self {
            port,
            family: key.family,
            scope: key.scope,
            table: ArcSwap::from_pointee(table),
            cursor: AtomicUsize::new(0),
        }
    }

    /// Chooses a backend for a client that has not been tried by this connection; `None` when there is none left.
    ///
    /// A client with a live pin gets its backend; after a failed try, and where the backend is ejected, the pin moves to the
    /// next one. Everybody else takes the next turn, and what the table has for it. A retry takes a turn too: otherwise the
    /// neighbour of a dead backend would get the dead one's share besides its own. Backends that are ejected come last.
    pub fn pick(&self, client: IpAddr, tried: &Tried, now: Instant) -> Option<Arc<Backend>> {
        let table = self.table.load(); // one load: everything below belongs to one moment
        let affinity = &self.port.affinity;
        let pin = affinity.recall(client, self.scope, now);
        let pinned = pin.and_then(|id| table.pick_by_id(id)).filter(|backend| !tried.contains(backend));
        let claim = |backend: &&Arc<Backend>| backend.ejection.claim(now);
        if let Some(backend) = pinned.filter(claim) {
            return Some(Arc::clone(backend));
        }
        let next_turn = || self.cursor.fetch_add(1, Ordering::Relaxed);
        let backend = best_in_turn(&table, next_turn, tried, pinned, claim, now)?;
        let kept = affinity.remember(client, self.scope, backend.id, pin, now);
        if kept == backend.id {
            return Some(Arc::clone(backend));
        }
        // Another connection of this client was pinned meanwhile: both go to the same place, if this one still can.
        let kept = table.pick_by_id(kept).filter(|kept| !tried.contains(kept)).filter(claim);
        Some(Arc::clone(kept.unwrap_or(backend)))
    }

    /// A backend has been reached.
    pub(crate) fn note_success(&self, backend: &Backend, now: Instant) {
        if backend.ejection.reached(now) {
            info!(service = %self.port.name, backend = %backend.address(), "backend returned");
        }
    }

    /// A backend could not be reached, and it is not this host that lacks something: after so many failures in a row it
    /// gets nothing for a time, unless half of the table is out already.
    pub(crate) fn note_failure(&self, backend: &Backend, reason: ConnectFailure, eject_after: NonZeroU8, now: Instant) {
        let table = self.table.load();
        let Some(time) = backend.ejection.failed(eject_after, now, |more| table.spares(more)) else { return };
        backend.stats.ejections.increment();
        let seconds = time.as_secs();
        info!(service = %self.port.name, backend = %backend.address(), %reason, seconds, "backend ejected");
    }

    /// What the Service says about its connections now; `None`: as the flags say.
    pub(crate) fn tcp_settings(&self) -> Option<Arc<TcpSettings>> {
        self.table.load().settings().cloned()
    }

    /// Turns since the balancer was made, those of processes before this one among them.
    pub(crate) fn turn(&self) -> usize {
        self.cursor.load(Ordering::Relaxed)
    }

    /// Goes on from there.
    pub(crate) fn go_on_from(&self, turn: usize) {
        self.cursor.store(turn, Ordering::Relaxed);
    }

    /// Who gets the next client that no pin binds, if nothing happens before. For status: takes no turn
    /// and claims nobody.
    pub fn upcoming(&self, now: Instant) -> Option<Arc<Backend>> {
        let turn = Cell::new(self.cursor.load(Ordering::Relaxed));
        let next_turn = || turn.replace(turn.get().wrapping_add(1));
        best_in_turn(&self.table.load(), next_turn, &Tried::default(), None, |_| true, now).cloned()
    }

    /// Whom this client is kept at, and for how long if it does not come back; `None` where it would be one that is new. For
    /// status: renews nothing and claims nobody.
    pub fn kept(&self, client: IpAddr, now: Instant) -> Option<(Arc<Backend>, Duration)> {
        let (id, left) = self.port.affinity.look(client, self.scope, now)?;
        Some((Arc::clone(self.table.load().pick_by_id(id)?), left))
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

/// Whose turn it is among those that are in and can be claimed, else the pinned one, else whose turn it is among all: that
/// one is out is no more than experience. Who comes too late to try one again that was out chooses anew.
fn best_in_turn<'t>(
    table: &'t Table,
    next_turn: impl Fn() -> usize,
    tried: &Tried,
    pinned: Option<&'t Arc<Backend>>,
    claim: impl Fn(&&'t Arc<Backend>) -> bool,
    now: Instant,
) -> Option<&'t Arc<Backend>> {
    let is_left = |backend: &Backend| tried.leaves(backend);
    let is_in = |backend: &Backend| is_left(backend) && backend.ejection.admits(now);
    let admitted = std::iter::from_fn(|| in_turn(table, &next_turn, is_in)).find(claim);
    admitted.or(pinned).or_else(|| in_turn(table, &next_turn, is_left))
}

/// The turn of one that may not be chosen is passed over: its neighbour would get its share besides its own.
fn in_turn(table: &Table, next_turn: impl Fn() -> usize, may: impl Fn(&Backend) -> bool) -> Option<&Arc<Backend>> {
    let mut turn = next_turn();
    for _ in 1..table.picks().len() {
        match table.whose_turn(turn) {
            Some(backend) if may(backend) => return Some(backend),
            Some(_) => turn = next_turn(),
            None => break,
        }
    }
    table.choose(turn, &may) // Others take turns, too: that so many were passed over does not mean that nobody is left.
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::name::{ObjectName, Protocol};

    const TIMEOUT: Duration = Duration::from_secs(60);

    fn port(name: &str) -> Arc<PortState> {
        let service = ObjectName::new("default", name);
        Arc::new(PortState::new(ServicePortName::new(service, "http", Protocol::Tcp)))
    }

    fn sticky_port(name: &str) -> Arc<PortState> {
        let port = port(name);
        port.affinity.set_timeout(Some(TIMEOUT));
        port
    }

    fn balancer(port: &Arc<PortState>, scope: Scope, picks: &[Arc<Backend>]) -> Balancer {
        let key = BalancerKey { port: port.name.clone(), family: Family::V4, scope };
        Balancer::new(key, Arc::clone(port), table(picks))
    }

    fn cluster(port: &Arc<PortState>, picks: &[Arc<Backend>]) -> Balancer {
        balancer(port, Scope::Cluster, picks)
    }

    fn table(picks: &[Arc<Backend>]) -> Table {
        Table::new(picks.to_vec().into(), &[])
    }

    fn backends<const N: usize>(ids: [u32; N]) -> [Arc<Backend>; N] {
        ids.map(|id| Arc::new(Backend::new(id, SocketAddr::from(([10, 0, 0, 1], 1_000 + id as u16)))))
    }

    fn client(number: u8) -> IpAddr {
        [192, 0, 2, number].into()
    }

    fn pick(balancer: &Balancer, client: IpAddr) -> Option<u32> {
        balancer.pick(client, &Tried::default(), Instant::now()).map(|backend| backend.id)
    }

    fn picks(balancer: &Balancer, count: usize) -> Vec<u32> {
        (0..count).filter_map(|_| pick(balancer, client(1))).collect()
    }

    fn pick_each<const N: usize>(balancer: &Balancer, clients: [u8; N]) -> [Option<u32>; N] {
        clients.map(|number| pick(balancer, client(number)))
    }

    #[test]
    fn t127_given_no_backends_when_picked_then_there_is_none() {
        let empty = cluster(&port("web"), &[]);

        assert_eq!(pick(&empty, client(1)), None);
    }

    #[test]
    fn t128_given_one_backend_when_picked_four_times_then_it_is_the_same() {
        let web = cluster(&port("web"), &backends([7]));

        assert_eq!(picks(&web, 4), [7, 7, 7, 7]);
    }

    #[test]
    fn t129_given_three_backends_when_picked_then_each_comes_in_turn() {
        let web = cluster(&port("web"), &backends([1, 2, 3]));

        assert_eq!(picks(&web, 7), [1, 2, 3, 1, 2, 3, 1]);
    }

    #[test]
    fn t129_given_threads_when_they_pick_at_once_then_the_shares_are_exact() {
        let web = cluster(&port("web"), &backends([1, 2, 3]));

        let mut shares = BTreeMap::<u32, usize>::new();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| picks(&web, 3_000))).collect();
            for id in threads.into_iter().flat_map(|thread| thread.join().expect("no panic")) {
                *shares.entry(id).or_default() += 1;
            }
        });

        assert_eq!(shares, BTreeMap::from([(1, 4_000), (2, 4_000), (3, 4_000)]));
    }

    #[test]
    fn given_a_balancer_when_looked_at_then_it_tells_who_is_next_and_no_turn_is_taken() {
        let web = cluster(&port("web"), &backends([1, 2]));
        let next = || web.upcoming(Instant::now()).map(|backend| backend.id);

        let seen = [next(), next(), pick(&web, client(1)), next(), pick(&web, client(1)), next()];

        assert_eq!(seen, [1, 1, 1, 2, 2, 1].map(Some));
        assert!(cluster(&port("empty"), &[]).upcoming(Instant::now()).is_none());
    }

    #[test]
    fn given_clients_when_asked_where_they_are_kept_then_it_is_told_and_nothing_comes_of_it() {
        let [one, two] = backends([1, 2]);
        let web = cluster(&sticky_port("web"), &[one, two.clone()]);
        let now = Instant::now();
        let kept = |number, at| web.kept(client(number), at).map(|(backend, left)| (backend.id, left));
        assert_eq!(web.pick(client(1), &Tried::default(), now).map(|backend| backend.id), Some(1));

        let later = now + TIMEOUT / 2;
        assert_eq!([kept(1, later), kept(2, later)], [Some((1, TIMEOUT / 2)), None]);
        assert_eq!(kept(1, now + TIMEOUT * 2), None);
        assert_eq!((web.turn(), web.port.affinity.remembered()), (1, 1), "no turn was taken, and nobody is known");

        web.swap(table(&[two]));
        assert_eq!(kept(1, now), None, "its backend is gone");
    }

    #[test]
    fn given_a_backend_that_is_ejected_when_looked_at_then_the_one_after_it_is_next() {
        let backends = backends([1, 2, 3]);
        let (web, now) = (cluster(&port("web"), &backends), Instant::now());

        web.note_failure(&backends[0], ConnectFailure::Refused, NonZeroU8::MIN, now);

        let next = web.upcoming(now).map(|backend| backend.id);
        assert_eq!((next, pick(&web, client(1))), (Some(2), Some(2)));
    }

    #[test]
    fn t130_given_two_ports_when_picked_by_turns_then_their_cycles_are_independent() {
        let backends = backends([1, 2, 3]);
        let (web, admin) = (cluster(&port("web"), &backends), cluster(&port("admin"), &backends));

        let both: Vec<_> = (0..3).map(|_| (pick(&web, client(1)), pick(&admin, client(1)))).collect();

        assert_eq!(both, [(Some(1), Some(1)), (Some(2), Some(2)), (Some(3), Some(3))]);
    }

    #[test]
    fn given_two_scopes_of_one_port_when_picked_by_turns_then_both_use_all_their_backends() {
        let port = port("web");
        let backends = backends([1, 2]);
        let (outside, inside) = (balancer(&port, Scope::Local, &backends), balancer(&port, Scope::Cluster, &backends));

        let both: Vec<_> = (0..2).map(|_| (pick(&outside, client(1)), pick(&inside, client(1)))).collect();

        assert_eq!(both, [(Some(1), Some(1)), (Some(2), Some(2))]);
    }

    #[test]
    fn t131_given_another_table_when_picked_then_no_backend_of_the_old_one_comes() {
        let [one, two, three, four] = backends([1, 2, 3, 4]);
        let web = cluster(&port("web"), &[one, two.clone(), three]);
        picks(&web, 2);

        web.swap(table(&[two, four]));

        assert_eq!(picks(&web, 4), [2, 4, 2, 4]);
    }

    #[test]
    fn t131_given_threads_that_pick_when_tables_are_swapped_then_a_pick_after_the_swap_is_of_the_new_table() {
        let [one, two] = backends([1, 2]);
        let web = cluster(&port("web"), std::slice::from_ref(&one));
        let done = AtomicBool::new(false);

        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(pick(&web, client(1)).is_some(), "a swap never shows an empty table");
                }
            });
            for backend in [&two, &one].into_iter().cycle().take(2_000) {
                web.swap(table(&[Arc::clone(backend)]));
                assert_eq!(pick(&web, client(2)), Some(backend.id));
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    /// Backends are numbered as they come: each table has a new one and the one before it.
    #[test]
    fn t233_given_threads_that_pick_a_million_times_a_second_when_tables_are_swapped_then_none_gets_a_removed_backend()
    {
        const SWAPS: u32 = 300;
        const PAUSE: Duration = Duration::from_millis(1);
        let numbered = |number: u32| Arc::new(Backend::new(number, SocketAddr::from(([10, 0, 0, 1], 1))));
        let web = cluster(&port("web"), &[numbered(0), numbered(1)]);
        let (oldest, done) = (AtomicU32::new(0), AtomicBool::new(false));
        let pick_on_and_on = || {
            let mut picked = 0_u64;
            while !done.load(Ordering::Relaxed) {
                let removed_before = oldest.load(Ordering::Acquire);
                let id = pick(&web, client(1)).expect("a swap never shows an empty table");
                assert!(id >= removed_before, "backend {id} was removed before {removed_before} was");
                picked += 1;
            }
            picked
        };

        let began = Instant::now();
        let picked: u64 = std::thread::scope(|scope| {
            let pickers = [(); 2].map(|()| scope.spawn(pick_on_and_on));
            let mut last = numbered(1);
            for number in 1..=SWAPS {
                let next = numbered(number + 1);
                web.swap(table(&[last, Arc::clone(&next)]));
                oldest.store(number, Ordering::Release);
                last = next;
                std::thread::sleep(PAUSE); // The rate of the case.
            }
            done.store(true, Ordering::Relaxed);
            pickers.into_iter().map(|picker| picker.join().expect("no removed backend")).sum()
        });

        println!("{:.1} million picks a second", picked as f64 / began.elapsed().as_secs_f64() / 1e6);
        assert!(picked > u64::from(SWAPS), "they were at it all along");
    }

    #[test]
    fn t132_given_the_same_backends_once_more_when_picked_then_the_cycle_goes_on() {
        let backends = backends([1, 2, 3]);
        let web = cluster(&port("web"), &backends);
        picks(&web, 2);

        web.swap(table(&backends));

        assert_eq!(picks(&web, 3), [3, 1, 2]);
    }

    #[test]
    fn t133_given_two_services_when_one_is_deleted_then_the_other_goes_on_where_it_was() {
        let backends = backends([1, 2, 3]);
        let (foo, bar) = (cluster(&port("foo"), &backends), cluster(&port("bar"), &backends));
        picks(&foo, 1);
        picks(&bar, 1);

        foo.swap(Table::default());

        assert_eq!(pick(&foo, client(1)), None);
        assert_eq!(picks(&bar, 2), [2, 3]);
    }

    #[test]
    fn t134_given_endpoints_after_the_service_when_picked_then_they_are_used_as_if_they_had_come_first() {
        let web = cluster(&port("web"), &[]);

        web.swap(table(&backends([1, 2])));

        assert_eq!(picks(&web, 3), [1, 2, 1]);
    }

    #[test]
    fn t135_given_three_sticky_clients_when_they_pick_by_turns_then_each_stays() {
        let web = cluster(&sticky_port("web"), &backends([1, 2, 3]));

        for _ in 0..4 {
            assert_eq!(pick_each(&web, [1, 2, 3]), [Some(1), Some(2), Some(3)]);
        }
    }

    #[test]
    fn t136_given_sticky_clients_when_a_backend_leaves_and_another_comes_then_only_its_client_moves() {
        let [one, two, three, four] = backends([1, 2, 3, 4]);
        let web = cluster(&sticky_port("web"), &[one.clone(), two, three.clone()]);
        pick_each(&web, [1, 2, 3]);

        web.swap(table(&[one.clone(), three.clone()]));
        let moved = pick_each(&web, [1, 2, 3]);
        web.swap(table(&[one, three, four]));
        let after = pick_each(&web, [1, 2, 3]);
        let mut fresh = pick_each(&web, [4, 5, 6]);

        assert_eq!((moved[0], moved[2]), (Some(1), Some(3)));
        assert_eq!(after, moved);
        fresh.sort_unstable();
        assert_eq!(fresh, [Some(1), Some(3), Some(4)], "new clients cover the set");
    }

    #[test]
    fn t137_given_sticky_clients_when_all_backends_are_replaced_then_each_is_picked_anew_once() {
        let web = cluster(&sticky_port("web"), &backends([1, 2, 3]));
        pick_each(&web, [1, 2, 3]);

        web.swap(table(&backends([4, 5, 6])));

        let anew = pick_each(&web, [1, 2, 3]);
        let mut covered = anew;
        covered.sort_unstable();
        assert_eq!(covered, [Some(4), Some(5), Some(6)]);
        assert_eq!(pick_each(&web, [1, 2, 3]), anew);
    }

    /// The addresses are the same, but a backend that was away is another backend: its id is new.
    #[test]
    fn t138_given_sticky_clients_when_all_backends_go_and_come_back_then_pins_start_anew() {
        let web = cluster(&sticky_port("web"), &backends([1, 2]));
        pick_each(&web, [1, 2]);

        web.swap(Table::default());
        assert_eq!(pick(&web, client(1)), None);
        web.swap(table(&backends([3, 4])));

        let anew = pick_each(&web, [2, 1]);
        assert_ne!(anew[0], anew[1]);
        assert!(anew.iter().all(|id| matches!(id, Some(3 | 4))));
        assert_eq!(pick_each(&web, [2, 1]), anew);
    }

    #[test]
    fn t139_given_two_sticky_services_when_the_same_client_uses_both_then_its_pins_are_separate() {
        let (foo, bar) = (sticky_port("foo"), sticky_port("bar"));
        let (foo, bar) = (cluster(&foo, &backends([1, 2])), cluster(&bar, &backends([1, 2])));
        pick(&bar, client(9));

        for _ in 0..3 {
            assert_eq!((pick(&foo, client(1)), pick(&bar, client(1))), (Some(1), Some(2)));
        }
    }

    #[test]
    fn t140_given_a_pinned_backend_that_fails_when_picked_again_then_the_pin_moves_and_others_stay() {
        let web = cluster(&sticky_port("web"), &backends([1, 2, 3]));
        pick_each(&web, [1, 2, 3]);
        let now = Instant::now();

        let mut tried = Tried::default();
        let mut seen = Vec::new();
        while let Some(backend) = web.pick(client(1), &tried, now) {
            seen.push(backend.id);
            tried.add(&backend);
        }

        assert_eq!(seen[0], 1);
        assert_eq!(pick(&web, client(1)), Some(seen[2]), "the pin is where the last try went");
        assert_eq!(pick_each(&web, [2, 3]), [Some(2), Some(3)]);
        seen.sort_unstable();
        assert_eq!(seen, [1, 2, 3], "each once");
    }

    #[test]
    fn t143_given_affinity_when_it_goes_on_and_off_live_then_a_client_is_spread_stuck_and_spread() {
        let port = port("web");
        let web = cluster(&port, &backends([1, 2]));

        let spread = picks(&web, 4);
        port.affinity.set_timeout(Some(TIMEOUT));
        let stuck = picks(&web, 4);
        port.affinity.set_timeout(None);
        let spread_again = picks(&web, 4);

        assert_eq!(spread, [1, 2, 1, 2]);
        assert_eq!(stuck, [1, 1, 1, 1]);
        assert_eq!(spread_again, [2, 1, 2, 1]);
    }

    #[test]
    fn t144_given_a_client_of_both_scopes_when_its_backend_leaves_one_then_only_that_one_picks_anew() {
        let port = sticky_port("web");
        let [one, two] = backends([1, 2]);
        let inside = balancer(&port, Scope::Cluster, &[one.clone(), two.clone()]);
        let outside = balancer(&port, Scope::Local, &[one, two.clone()]);
        assert_eq!((pick(&inside, client(1)), pick(&outside, client(1))), (Some(1), Some(1)), "t145: one pin");

        outside.swap(table(&[two]));

        assert_eq!((pick(&outside, client(1)), pick(&inside, client(1))), (Some(2), Some(1)));
    }

    #[test]
    fn given_a_dead_backend_when_connections_retry_then_its_share_goes_to_all_others() {
        let web = cluster(&port("web"), &backends([1, 2, 3]));
        let now = Instant::now();

        let mut shares = BTreeMap::<u32, usize>::new();
        for _ in 0..300 {
            let mut tried = Tried::default();
            let mut backend = web.pick(client(1), &tried, now).expect("a backend");
            if backend.id == 2 {
                tried.add(&backend);
                backend = web.pick(client(1), &tried, now).expect("another backend");
            }
            *shares.entry(backend.id).or_default() += 1;
        }

        assert_eq!(shares, BTreeMap::from([(1, 150), (3, 150)]));
    }

    const FIVE: NonZeroU8 = NonZeroU8::new(5).expect("5 is not 0");

    fn fail(balancer: &Balancer, backend: &Backend, times: usize, now: Instant) {
        (0..times).for_each(|_| balancer.note_failure(backend, ConnectFailure::Refused, FIVE, now));
    }

    fn shares_at(balancer: &Balancer, now: Instant) -> BTreeMap<u32, usize> {
        let mut shares = BTreeMap::new();
        for _ in 0..300 {
            let backend = balancer.pick(client(1), &Tried::default(), now).expect("a backend");
            *shares.entry(backend.id).or_default() += 1;
        }
        shares
    }

    #[test]
    fn f07_given_an_ejected_backend_when_picked_then_the_others_share_exactly_what_it_had() {
        let backends = backends([1, 2, 3, 4]);
        let web = cluster(&port("web"), &backends);
        let now = Instant::now();

        fail(&web, &backends[1], 5, now);

        assert_eq!(shares_at(&web, now), BTreeMap::from([(1, 100), (3, 100), (4, 100)]));
        assert_eq!(backends[1].stats.ejections.get(), 1);
        assert!(backends[1].out_for(now).is_some() && backends[0].out_for(now).is_none());
    }

    #[test]
    fn f07_given_any_balance_when_a_backend_is_ejected_then_it_is_not_picked_until_its_time_is_up() {
        for balance in crate::plan::Balance::ALL {
            let backends = backends([1, 2]);
            let web = cluster(&port("web"), &[]);
            web.swap(table(&backends).balanced_by(balance, 3));
            let now = Instant::now();

            fail(&web, &backends[0], 5, now);

            assert_eq!(shares_at(&web, now), BTreeMap::from([(2, 300)]), "{balance}");
            let later = now + Duration::from_secs(11);
            assert_eq!(
                shares_at(&web, later).get(&1),
                Some(&1),
                "{balance}: one client tries it, and has not told yet"
            );
            web.note_success(&backends[0], later);
            assert!(shares_at(&web, later)[&1] > 50, "{balance}");
        }
    }

    #[test]
    fn f07_given_all_backends_that_fail_when_half_are_ejected_then_the_others_stay_in() {
        let backends = backends([1, 2, 3, 4, 5]);
        let web = cluster(&port("web"), &backends);
        let now = Instant::now();

        backends.iter().for_each(|backend| fail(&web, backend, 50, now));

        assert_eq!(shares_at(&web, now), BTreeMap::from([(3, 100), (4, 100), (5, 100)]));
        let alone = cluster(&port("web"), &backends[4..]);
        fail(&alone, &backends[4], 50, now);
        assert!(backends[4].out_for(now).is_none(), "a single one is never ejected");
    }

    #[test]
    fn f07_given_only_ejected_backends_when_picked_then_all_of_them_are_used() {
        let backends = backends([1, 2, 3, 4]);
        let web = cluster(&port("web"), &backends);
        let now = Instant::now();
        fail(&web, &backends[0], 5, now);
        fail(&web, &backends[1], 5, now);

        web.swap(table(&backends[..2]));

        assert_eq!(shares_at(&web, now), BTreeMap::from([(1, 150), (2, 150)]));
    }

    #[test]
    fn f33_given_only_ejected_backends_when_a_pinned_client_comes_then_it_stays_with_its_own() {
        let backends = backends([1, 2]);
        let web = cluster(&sticky_port("web"), &backends);
        let now = Instant::now();
        assert_eq!(pick(&web, client(1)), Some(1));
        fail(&web, &backends[0], 5, now);

        web.swap(table(&backends[..1]));

        assert_eq!((0..3).filter_map(|_| pick(&web, client(1))).collect::<Vec<_>>(), [1, 1, 1]);
    }

    #[test]
    fn f07_given_an_ejected_backend_when_all_others_were_tried_then_it_is_the_last_resort() {
        let backends = backends([1, 2, 3]);
        let web = cluster(&port("web"), &backends);
        let now = Instant::now();
        fail(&web, &backends[0], 5, now);

        let mut tried = Tried::default();
        let mut seen = Vec::new();
        while let Some(backend) = web.pick(client(1), &tried, now) {
            seen.push(backend.id);
            tried.add(&backend);
        }

        assert_eq!((seen.len(), seen[2]), (3, 1));
    }

    #[test]
    fn f33_given_a_pinned_backend_that_is_ejected_when_picked_again_then_the_pin_moves_and_stays_moved() {
        let backends = backends([1, 2, 3]);
        let web = cluster(&sticky_port("web"), &backends);
        let now = Instant::now();
        let pick = |number, now| web.pick(client(number), &Tried::default(), now).map(|backend| backend.id);
        assert_eq!([1, 2].map(|number| pick(number, now)), [Some(1), Some(2)]);

        fail(&web, &backends[0], 5, now);
        let moved = pick(1, now).expect("another one");
        web.note_success(&backends[0], now);

        assert_ne!(moved, 1);
        assert_eq!([1, 2].map(|number| pick(number, now)), [Some(moved), Some(2)]);
    }

    #[test]
    fn f07_given_an_ejected_backend_when_the_table_is_swapped_then_it_is_still_out() {
        let backends = backends([1, 2, 3]);
        let web = cluster(&port("web"), &backends);
        let now = Instant::now();
        fail(&web, &backends[2], 5, now);

        web.swap(table(&backends));

        assert_eq!(shares_at(&web, now), BTreeMap::from([(1, 150), (2, 150)]));
    }

    #[test]
    fn f07_given_half_of_the_backends_ejected_when_another_endpoint_leaves_then_nobody_dead_is_taken_in_for_it() {
        let backends = backends([1, 2, 3, 4]);
        let web = cluster(&port("web"), &backends);
        let now = Instant::now();
        fail(&web, &backends[0], 5, now);
        fail(&web, &backends[1], 5, now);

        web.swap(table(&backends[..3]));

        assert_eq!(shares_at(&web, now), BTreeMap::from([(3, 300)]));
    }

    /// All look at the same instant, which is when its time is up.
    #[test]
    fn f07_given_threads_that_pick_when_an_ejected_backend_is_tried_again_then_one_of_them_goes_there() {
        let backends = backends([1, 2]);
        let web = cluster(&port("web"), &backends);
        let mut now = Instant::now();
        fail(&web, &backends[0], 5, now);

        for _ in 0..50 {
            now += backends[0].out_for(now).expect("it is out") + Duration::from_secs(1);
            let went = std::thread::scope(|scope| {
                let shares = || shares_at(&web, now).get(&1).copied().unwrap_or(0);
                let threads = [(); 4].map(|()| scope.spawn(shares));
                threads.map(|thread| thread.join().expect("no panic")).into_iter().sum::<usize>()
            });
            assert_eq!(went, 1);
            fail(&web, &backends[0], 1, now);
        }
    }

    #[test]
    fn t171_given_a_backend_that_leaves_when_asked_then_it_says_when() {
        let [one] = backends([1]);
        let at = Instant::now() + Duration::from_secs(30);
        assert_eq!(one.leaves_at(), None);

        one.leave(at);

        let left = at.saturating_duration_since(one.leaves_at().expect("it leaves"));
        assert!(left < Duration::from_millis(2), "{left:?}");
    }

    #[test]
    fn given_a_backend_that_only_serves_when_picked_then_it_gets_nothing_new_but_keeps_what_it_has() {
        let [one, two, three] = backends([1, 2, 3]);
        let web = cluster(&port("web"), &[]);

        web.swap(Table::new(vec![one.clone()].into(), &[one.clone(), two.clone()]));

        assert_eq!(picks(&web, 2), [1, 1]);
        assert!(web.serves(&one) && web.serves(&two) && !web.serves(&three));
    }
}
