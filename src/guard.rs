//! Keeps what listens on all addresses of this machine from answering at addresses of Services.
//!
//! An address that a route makes local is one of this machine like any other: sshd's `0.0.0.0:22` would answer there, and
//! the kubelet's `[::]:10250`. The guard refuses that as if nobody listened, by a table of nf_tables that holds the addresses
//! which routes of ours make local, and asks the kernel which socket each packet to them is for (`guard_table`):
//!
//! * Sockets that are bound to the address are never touched: ours, those of open connections, those of others.
//! * What others have made local is theirs to judge: only addresses of our own routes are guarded, and none that is an
//!   interface's, too (`guard_addresses`).
//! * The table stays for as long as the routes do, also when this process ends or is killed, and goes with the last of them.
//! * Whoever removes it (`nft flush ruleset`) has it made again within [`CHECK_INTERVAL`].
//!
//! Where the kernel has no nf_tables, filters of tc do it (`guard_filters`). They cannot ask which socket a packet is for, so
//! that listeners of all addresses are looked for every [`LISTENERS_INTERVAL`]; and they cannot refuse, only drop.
//!
//! The task here follows the routes as the kernel tells of them, whoever sets and removes them (`vips`, `cleanup`, an
//! operator): it needs to be told nothing. Where neither is to be had, nothing guards, and the log says so.

use std::collections::BTreeSet;
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::sleep_until;

use crate::guard_addresses::{GuardAddresses, Noted};
use crate::guard_filters::GuardFilters;
use crate::guard_socket::table_name;
use crate::guard_table::{self, GuardTable};
use crate::host_news::HostNews;
use crate::local_ports;
use crate::route_socket::{RouteNews, RouteSocket};
use crate::stats::PROCESS;
use crate::wildcard::wildcard_ports;

/// How often it is looked at whether the table is as we left it. That costs one question where nobody has changed any.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(4);
/// How often it is looked at who listens on all addresses, where filters have to know it.
pub const LISTENERS_INTERVAL: Duration = Duration::from_secs(1);
/// Interfaces that come and go within this time are looked at once: filters are on each.
const LINKS_GAP: Duration = Duration::from_millis(20);
/// When it is tried again after it has failed.
const RETRY: Duration = Duration::from_secs(10);
/// The same, where the kernel was busy: others were changing what was looked at.
const BUSY_RETRY: Duration = Duration::from_secs(1);
/// A table that is made again within this time of the last one is no news for the log.
const QUIET: Duration = Duration::from_secs(60);
/// What guards without nf_tables, as the log calls it.
const FILTERS: &str = "filters of tc";

/// What keeps sockets of all addresses from answering at addresses of Services. From `--vip-guard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum VipGuard {
    /// nf_tables, or filters of tc where the kernel has none; needs CAP_NET_ADMIN
    #[default]
    Auto,
    /// Filters of tc on each interface in any case: they drop what nf_tables would refuse
    Tc,
    /// Nothing: sshd answers there, too
    None,
}

/// The task that guards. By default there is none. It ends with the last clone of this, and leaves the table as it is.
#[derive(Clone, Debug, Default)]
pub struct Guard(Option<mpsc::UnboundedSender<oneshot::Sender<()>>>);

impl Guard {
    /// Starts it on the current tokio runtime, for addresses that routes with this number make local. With
    /// [`VipGuard::None`] there is none, and a table that the last run has left goes.
    pub fn start(guard: VipGuard, protocol: u8) -> Self {
        if guard == VipGuard::None {
            match remove(protocol) {
                Ok(true) => tracing::info!("guard of the last run removed"),
                Ok(false) => {}
                // Who may not remove it could not have made it, and where there is no nf_tables it is not there.
                Err(error) => tracing::debug!(%error, "no guard, and none removed"),
            }
            return Self::default();
        }
        let (end, ends) = mpsc::unbounded_channel(); // One at most.
        match Watcher::new(protocol, guard) {
            Ok(watcher) => drop(tokio::spawn(watcher.run(ends))),
            Err(error) => tracing::debug!(%error, "no rtnetlink: no route of ours to be guarded"),
        }
        Self(Some(end))
    }

    /// The end: has the table go where no route of ours is left.
    pub async fn end(&self) {
        let (done, ended) = oneshot::channel();
        if let Some(end) = &self.0 {
            let _ = end.send(done);
            let _ = ended.await; // An error means that there is no task.
        }
    }
}

/// Takes away what guards addresses that routes with this number make local, a table and filters. False where there is
/// none.
///
/// # Errors
/// Where this process may not, or the kernel has no nf_tables and there were no filters, either.
pub fn remove(protocol: u8) -> io::Result<bool> {
    let filters = remove_filters(protocol)?;
    match guard_table::remove(protocol) {
        Err(error) if filters && is_missing(errno(&error)) => Ok(true),
        table => Ok(table? | filters),
    }
}

/// Of these, the filters of tc alone. False where there is none.
///
/// # Errors
/// Where this process may not.
pub fn remove_filters(protocol: u8) -> io::Result<bool> {
    Ok(GuardFilters::open(protocol)?.remove()?)
}

/// True where filters of tc keep what listens on all addresses from answering at each of these.
///
/// # Errors
/// Where the kernel does not tell.
pub(crate) fn has_filters(protocol: u8, addresses: &BTreeSet<IpAddr>) -> io::Result<bool> {
    GuardFilters::open(protocol)?.is_settled(addresses, &local_ports::range())
}

/// The task that follows routes. Owns what it knows by value.
struct Watcher {
    protocol: u8,
    routes: RouteSocket,
    /// `None` where the kernel tells nothing: then routes are looked at now and then.
    news: Option<RouteNews>,
    addresses: GuardAddresses,
    /// True where routes are to be looked at anew.
    is_stale: bool,
    /// True where the table may be another one than it is to be.
    is_pending: bool,
    /// True where the kernel was busy when it was tried last.
    is_busy: bool,
    table: GuardTable,
    /// What guards in the place of a table; `None` as long as that does.
    filters: Option<Filters>,
    /// True where nothing is left of an earlier run that guarded by other means.
    is_alone: bool,
    /// The ports that the kernel gives to clients.
    clients: RangeInclusive<u16>,
    check_due: Instant,
    told: Told,
}

/// Guards without nf_tables, and what has to be known for that.
#[derive(Debug)]
struct Filters {
    set: GuardFilters,
    /// `None` where the kernel does not tell of interfaces: these are looked at now and then.
    links: Option<HostNews>,
    /// When interfaces are looked at, as some have come or gone.
    links_due: Option<Instant>,
    /// When it is looked at who listens.
    listeners_due: Instant,
    /// The addresses that are guarded; `None`: unknown.
    guarded: Option<BTreeSet<IpAddr>>,
}

impl Filters {
    fn open(protocol: u8) -> io::Result<Self> {
        let links = HostNews::open().ok(); // Before the first look, so that nothing is missed in between.
        let listeners_due = Instant::now() + LISTENERS_INTERVAL;
        Ok(Self { set: GuardFilters::open(protocol)?, links, links_due: None, listeners_due, guarded: None })
    }
}

/// What the log says already.
#[derive(Debug, Default)]
struct Told {
    guards: bool,
    fails: bool,
    lost: Option<Instant>,
}

impl Watcher {
    fn new(protocol: u8, guard: VipGuard) -> io::Result<Self> {
        let routes = RouteSocket::open(protocol)?;
        let filters = (guard == VipGuard::Tc).then(|| Filters::open(protocol)).transpose()?;
        let news = RouteNews::open(protocol).ok(); // Before the first look, so that nothing is missed in between.
        let clients = local_ports::range();
        Ok(Self {
            protocol,
            routes,
            news,
            addresses: GuardAddresses::default(),
            is_stale: true,
            is_pending: true,
            is_busy: false,
            table: GuardTable::new(protocol, &clients),
            filters,
            is_alone: false,
            clients,
            check_due: Instant::now(),
            told: Told::default(),
        })
    }

    async fn run(mut self, mut ends: mpsc::UnboundedReceiver<oneshot::Sender<()>>) {
        loop {
            self.check(); // Not left to the timer below: there may be news all the time.
            self.hear();
            self.look_around().await;
            self.settle();
            let (next_due, is_idle) = (self.next_due(), self.is_idle());
            tokio::select! {
                biased;
                end = ends.recv() => {
                    let Some(done) = end else { return };
                    (self.is_stale, self.is_pending) = (true, true);
                    self.hear();
                    self.settle();
                    let _ = done.send(()); // Who asked may have gone.
                    return;
                }
                () = readable(self.news.as_ref()) => {}
                () = links_changed(self.filters.as_mut()) => self.note_links(),
                () = due(next_due, is_idle) => {}
            }
        }
    }

    fn next_due(&self) -> Instant {
        let due = self.filters.iter().flat_map(|filters| [Some(filters.listeners_due), filters.links_due]);
        due.flatten().fold(self.check_due, Instant::min)
    }

    fn note_links(&mut self) {
        if let Some(filters) = &mut self.filters {
            filters.links_due.get_or_insert_with(|| Instant::now() + LINKS_GAP);
        }
    }

    /// For filters, when they are due: interfaces that have come or gone, and who listens. The latter is not read here, as
    /// there may be many sockets.
    async fn look_around(&mut self) {
        let now = Instant::now();
        let links_due = self.filters.as_mut().and_then(|filters| filters.links_due.take_if(|due| *due <= now));
        self.is_pending |= links_due.is_some();
        let wanted = self.addresses.wanted();
        let Some(filters) = self.filters.as_mut().filter(|filters| filters.listeners_due <= now) else { return };
        filters.listeners_due = now + LISTENERS_INTERVAL;
        if wanted.is_empty() {
            return;
        }
        let wanted = wanted.clone();
        match spawn_blocking(move || wildcard_ports(&wanted)).await {
            Ok(Ok(listeners)) => self.is_pending |= filters.set.note(listeners),
            Ok(Err(error)) => tracing::debug!(%error, "sockets cannot be read, trying again"),
            Err(_) => {} // The runtime ends.
        }
    }

    /// True where nothing is to be guarded, nothing is known to be left, and all else is told.
    fn is_idle(&self) -> bool {
        let is_done = !self.is_stale && !self.is_pending && !self.is_busy;
        let is_left = match &self.filters {
            Some(filters) => filters.guarded.as_ref().is_none_or(|addresses| !addresses.is_empty()),
            None => self.table.is_left(),
        };
        is_done && !is_left && self.addresses.wanted().is_empty() && self.news.is_some()
    }

    /// Now and then: what nobody tells of.
    fn check(&mut self) {
        let now = Instant::now();
        if now < self.check_due || self.is_idle() {
            return;
        }
        self.check_due = now + CHECK_INTERVAL;
        self.is_pending = true;
        self.is_stale |= self.news.is_none();
        let clients = local_ports::range();
        if clients != self.clients {
            self.table.note_clients(&clients);
            self.clients = clients;
            if let Some(filters) = &mut self.filters {
                filters.guarded = None; // They are to be others: nobody has changed them.
            }
        }
    }

    /// Takes note of what has become of routes.
    fn hear(&mut self) {
        for news in self.news.as_mut().map(RouteNews::take).unwrap_or_default() {
            match self.addresses.note(news) {
                Noted::Same => {}
                Noted::Changed => self.is_pending = true,
                Noted::Unsure => self.is_stale = true,
            }
        }
        if !self.is_stale {
            return;
        }
        match self.routes.look() {
            Ok(routes) => {
                self.is_stale = false;
                self.is_pending |= self.addresses.note_all(&routes) == Noted::Changed;
            }
            Err(error) => {
                tracing::debug!(%error, "routes cannot be read, trying again");
                self.check_due = Instant::now() + BUSY_RETRY;
            }
        }
    }

    /// Has the addresses guarded that are to be, and no other; where that is not known, the table stays as it is.
    fn settle(&mut self) {
        if self.is_stale || !std::mem::take(&mut self.is_pending) {
            return;
        }
        let mut outcome = self.try_settle();
        if let Err(error) = outcome
            && self.falls_back(error)
        {
            outcome = self.try_settle();
        }
        self.is_busy = outcome.is_err_and(is_busy);
        let guarded = match &self.filters {
            Some(filters) => filters.guarded.as_ref().map_or(0, BTreeSet::len),
            None => self.table.guarded(),
        };
        PROCESS.guarded_addresses.set(guarded as u64);
        let now = Instant::now();
        match outcome {
            Ok(()) => {
                self.clear_other();
                self.check_due = self.check_due.min(now + CHECK_INTERVAL); // Later only where it has failed before.
                self.tell_guards(guarded);
            }
            Err(error) => {
                self.check_due = now + if self.is_busy { BUSY_RETRY } else { RETRY };
                self.tell_fails(error);
            }
        }
    }

    /// True where the kernel has no nf_tables, and filters are to guard from now on.
    fn falls_back(&mut self, error: Errno) -> bool {
        if self.filters.is_some() || self.table.is_proven() || !is_missing(error) {
            return false;
        }
        match Filters::open(self.protocol) {
            Ok(filters) => self.filters = Some(filters),
            Err(_) => return false,
        }
        tracing::debug!(%error, "no nf_tables: filters of tc guard");
        true
    }

    /// Once this guards: what an earlier run has left that guarded by other means.
    fn clear_other(&mut self) {
        if std::mem::replace(&mut self.is_alone, true) {
            return;
        }
        let cleared = match &self.filters {
            Some(_) => guard_table::remove(self.protocol),
            None => remove_filters(self.protocol),
        };
        match cleared {
            Ok(true) => tracing::info!("guard of the last run removed: it was another one"),
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, "no other guard, and none removed"),
        }
    }

    fn try_settle(&mut self) -> Result<(), Errno> {
        let wanted = self.addresses.wanted();
        let is_lost = match &mut self.filters {
            Some(filters) => {
                let is_same = filters.guarded.as_ref() == Some(wanted);
                let settled = filters.set.settle(wanted, &self.clients, is_same);
                filters.guarded = settled.is_ok().then(|| wanted.clone());
                settled?
            }
            None => self.table.settle(wanted)?,
        };
        if is_lost {
            let by = if self.filters.is_some() { FILTERS } else { &table_name(self.protocol) };
            tell_lost(&mut self.told.lost, by);
        }
        Ok(())
    }

    fn tell_guards(&mut self, addresses: usize) {
        self.told.fails = false;
        if addresses > 0 && !std::mem::replace(&mut self.told.guards, true) {
            match &self.filters {
                None => {
                    let by = table_name(self.protocol);
                    tracing::info!(
                        by,
                        "what listens on all addresses of this machine is refused at addresses of Services"
                    );
                }
                Some(_) => tracing::info!(
                    by = FILTERS,
                    "what is sent to addresses of Services, and to who listens on all addresses of this machine, is dropped"
                ),
            }
        }
    }

    /// Nobody misses a guard of no address.
    fn tell_fails(&mut self, error: Errno) {
        if is_busy(error) {
            return tracing::debug!(%error, "the kernel is busy, trying again");
        }
        if self.addresses.wanted().is_empty() || std::mem::replace(&mut self.told.fails, true) {
            return;
        }
        self.told.guards = false;
        let remedy = match error {
            Errno::PERM => "run it with CAP_NET_ADMIN",
            _ => {
                "a kernel (5.10) with nf_tables, nft_socket and nft_reject_inet, or with cls_bpf and sch_ingress; or have those \
                 listen on the node's addresses alone (ListenAddress of sshd, --address of the kubelet), and say --vip-guard none"
            }
        };
        tracing::warn!(
            %error,
            remedy,
            "no guard: what listens on all addresses of this machine (sshd, kubelet) may answer at addresses of Services"
        );
    }
}

/// True where the kernel has no netlink of netfilter, no nf_tables behind it, or not all the parts of that which rules need.
fn is_missing(error: Errno) -> bool {
    matches!(error, Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOENT)
}

/// True where others were changing what was looked at, or to be changed: that is no fault of the kernel.
fn is_busy(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno::INTR)
}

fn tell_lost(last: &mut Option<Instant>, by: &str) {
    let now = Instant::now();
    if last.replace(now).is_none_or(|last| now.duration_since(last) > QUIET) {
        tracing::warn!(by, "somebody has changed the guard: it is made again");
    }
}

async fn readable(news: Option<&RouteNews>) {
    match news {
        Some(news) => news.readable().await,
        None => pending().await,
    }
}

/// Never where there are no filters on any.
async fn links_changed(filters: Option<&mut Filters>) {
    let Some(links) = filters.and_then(|filters| filters.links.as_mut()) else { return pending().await };
    links.heard().await;
}

async fn due(time: Instant, never: bool) {
    match never {
        true => pending().await,
        false => sleep_until(time.into()).await,
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vip_routes::{LocalRoute, News};

    /// Of a number that nobody uses. It has asked nothing of nf_tables yet.
    fn watcher() -> Option<Watcher> {
        Watcher::new(254, VipGuard::Auto).inspect_err(|error| eprintln!("skipped, no rtnetlink here: {error}")).ok()
    }

    #[tokio::test]
    async fn given_routes_that_could_not_be_read_when_settled_then_the_table_is_left_alone_and_that_is_tried_again() {
        let Some(mut watcher) = watcher() else { return };

        watcher.settle();

        assert!(watcher.is_stale && !watcher.table.is_asked(), "nobody was asked");
        assert!(watcher.is_pending && !watcher.is_idle(), "it is still to be done");
    }

    #[tokio::test]
    async fn given_a_settled_guard_when_nothing_of_ours_changes_then_nobody_is_asked_until_the_check_is_due() {
        let Some(mut watcher) = watcher() else { return };
        let due = Instant::now() + Duration::from_secs(3_600);
        (watcher.is_stale, watcher.is_pending, watcher.check_due) = (false, false, due);
        watcher.addresses.note(News::Appeared(LocalRoute { net: IpAddr::from([10, 96, 0, 1]).into(), own: true }));

        watcher.check();
        watcher.settle();

        assert!(!watcher.table.is_asked(), "nobody was asked");
        assert_eq!(watcher.check_due, due);
        watcher.check_due = Instant::now();
        watcher.check();
        assert!(watcher.is_pending && watcher.check_due > Instant::now());
    }

    #[tokio::test]
    async fn given_a_busy_kernel_when_told_then_it_is_not_blamed_and_soon_tried_again() {
        let Some(mut watcher) = watcher() else { return };
        watcher.addresses.note(News::Appeared(LocalRoute { net: IpAddr::from([10, 96, 0, 1]).into(), own: true }));

        for busy in [Errno::AGAIN, Errno::INTR] {
            watcher.tell_fails(busy);
            assert!(!watcher.told.fails);
        }
        (watcher.is_stale, watcher.is_pending, watcher.is_busy) = (false, false, true);
        watcher.addresses = GuardAddresses::default();
        assert!(!watcher.is_idle(), "what the last run has left is still to go");
        watcher.addresses.note(News::Appeared(LocalRoute { net: IpAddr::from([10, 96, 0, 1]).into(), own: true }));
        watcher.tell_fails(Errno::OPNOTSUPP);
        assert!(watcher.told.fails);
    }

    #[tokio::test]
    async fn given_a_kernel_without_nf_tables_when_it_says_so_then_filters_guard() {
        for (error, falls_back) in [(Errno::PROTONOSUPPORT, true), (Errno::INVAL, true), (Errno::PERM, false)] {
            let Some(mut watcher) = watcher() else { return };

            assert_eq!((watcher.falls_back(error), watcher.filters.is_some()), (falls_back, falls_back));
            assert!(!watcher.falls_back(error), "twice");
        }
    }

    #[tokio::test]
    async fn given_no_guard_when_ended_then_nobody_is_waited_for() {
        Guard::default().end().await;
    }
}
