//! Keeps what listens on all addresses of this machine from answering at addresses of Services.
//!
//! An address that a route makes local is one of this machine like any other: sshd's `0.0.0.0:22` would answer there, and
//! the kubelet's `[::]:10250`. The guard refuses that as if nobody listened, by a table of nf_tables that holds the addresses
//! which routes of ours make local, and asks the kernel which socket each packet to them is for (`guard_message`):
//!
//! * Sockets that are bound to the address are never touched: ours, those of open connections, those of others.
//! * What others have made local is theirs to judge: only addresses of our own routes are guarded, and none that is an
//!   interface's, too (`guard_addresses`).
//! * The table stays for as long as the routes do, also when this process ends or is killed, and goes with the last of them.
//! * Whoever removes it (`nft flush ruleset`) has it made again within [`CHECK_INTERVAL`].
//!
//! The task here follows the routes as the kernel tells of them, whoever sets and removes them (`vips`, `cleanup`, an
//! operator): it needs to be told nothing. Where there is no nf_tables, nothing guards, and the log says so.

use std::collections::BTreeSet;
use std::fs;
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

use crate::guard_addresses::{GuardAddresses, Noted};
use crate::guard_message::{Rule, rules};
use crate::guard_socket::{BATCH, GuardSocket, There, table_name};
use crate::route_socket::{RouteNews, RouteSocket};
use crate::stats::PROCESS;

/// How often it is looked at whether the table is as we left it. That costs one question where nobody has changed any.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(4);
/// When it is tried again after it has failed.
const RETRY: Duration = Duration::from_secs(10);
/// The same, where the kernel was busy: others were changing what was looked at.
const BUSY_RETRY: Duration = Duration::from_secs(1);
/// A table that is made again within this time of the last one is no news for the log.
const QUIET: Duration = Duration::from_secs(60);
/// The ports of clients, where the kernel does not tell: its default.
const CLIENTS: RangeInclusive<u16> = 32_768..=60_999;

/// What keeps sockets of all addresses from answering at addresses of Services. From `--vip-guard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum VipGuard {
    /// nf_tables, where the kernel has it; needs CAP_NET_ADMIN
    #[default]
    Auto,
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
                Ok(true) => tracing::info!(table = table_name(protocol), "guard of the last run removed"),
                Ok(false) => {}
                // Who may not remove it could not have made it, and where there is no nf_tables it is not there.
                Err(error) => tracing::debug!(%error, "no guard, and none removed"),
            }
            return Self::default();
        }
        let (end, ends) = mpsc::unbounded_channel(); // One at most.
        match Watcher::new(protocol) {
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

/// Takes the table away that guards addresses which routes with this number make local. False where there is none.
///
/// # Errors
/// Where this process may not, or the kernel has no nf_tables.
pub fn remove(protocol: u8) -> io::Result<bool> {
    Ok(GuardSocket::open(protocol)?.remove()?)
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
    /// `None` where there is no netfilter, or it was not needed yet.
    socket: Option<GuardSocket>,
    rules: Vec<Rule>,
    clients: RangeInclusive<u16>,
    /// What is there, as of the generation; `None`: unknown.
    there: Option<There>,
    generation: Option<u32>,
    check_due: Instant,
    told: Told,
}

/// What the log says already.
#[derive(Debug, Default)]
struct Told {
    guards: bool,
    fails: bool,
    lost: Option<Instant>,
}

impl Watcher {
    fn new(protocol: u8) -> io::Result<Self> {
        let routes = RouteSocket::open(protocol)?;
        let news = RouteNews::open(protocol).ok(); // Before the first look, so that nothing is missed in between.
        let clients = clients();
        Ok(Self {
            protocol,
            routes,
            news,
            addresses: GuardAddresses::default(),
            is_stale: true,
            is_pending: true,
            is_busy: false,
            socket: None,
            rules: rules(&clients),
            clients,
            there: None,
            generation: None,
            check_due: Instant::now(),
            told: Told::default(),
        })
    }

    async fn run(mut self, mut ends: mpsc::UnboundedReceiver<oneshot::Sender<()>>) {
        loop {
            self.check(); // Not left to the timer below: there may be news all the time.
            self.hear();
            self.settle();
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
                () = due(self.check_due, self.is_idle()) => {}
            }
        }
    }

    /// True where nothing is to be guarded, nothing is known to be left, and all else is told.
    fn is_idle(&self) -> bool {
        let is_done = !self.is_stale && !self.is_pending && !self.is_busy;
        let is_left = matches!(self.there, Some(There::Other | There::Guarded(_)));
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
        let clients = clients();
        if clients != self.clients {
            self.rules = rules(&clients);
            self.clients = clients;
            self.generation = None; // What is there has other rules.
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
        let outcome = self.try_settle();
        self.is_busy = outcome.is_err_and(is_busy);
        let guarded = match &self.there {
            Some(There::Guarded(addresses)) => addresses.len(),
            _ => 0,
        };
        PROCESS.guarded_addresses.set(guarded as u64);
        let now = Instant::now();
        match outcome {
            Ok(()) => {
                self.check_due = self.check_due.min(now + CHECK_INTERVAL); // Later only where it has failed before.
                self.tell_guards(guarded);
            }
            Err(error) => {
                self.generation = None; // It may be done in part.
                self.check_due = now + if self.is_busy { BUSY_RETRY } else { RETRY };
                self.tell_fails(error);
            }
        }
    }

    fn try_settle(&mut self) -> Result<(), Errno> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            None => self.socket.insert(GuardSocket::open(self.protocol).map_err(errno)?),
        };
        let generation = socket.generation()?;
        if self.generation != Some(generation) {
            let found = socket.look(&self.rules)?;
            let had = self.there.replace(found);
            let is_lost =
                matches!(had, Some(There::Guarded(_))) && self.there != had && !self.addresses.wanted().is_empty();
            if is_lost {
                tell_lost(&mut self.told.lost, self.protocol);
            }
        }
        let there = self.there.get_or_insert(There::Nothing);
        let steps = steps(there, self.addresses.wanted());
        self.generation = None; // As long as not all is done.
        for step in &steps {
            step.carry_out(socket, &self.rules)?;
            step.note(there);
        }
        // Each was one change. Where somebody else made one meanwhile, this number comes up never, or not now.
        self.generation = Some(generation.wrapping_add(steps.len() as u32));
        Ok(())
    }

    fn tell_guards(&mut self, addresses: usize) {
        self.told.fails = false;
        if addresses > 0 && !std::mem::replace(&mut self.told.guards, true) {
            let table = table_name(self.protocol);
            tracing::info!(table, "what listens on all addresses of this machine is refused at addresses of Services");
        }
    }

    /// Nobody misses a guard of no address.
    fn tell_fails(&mut self, error: Errno) {
        if is_busy(error) {
            return tracing::debug!(%error, "nf_tables is busy, trying again");
        }
        if self.addresses.wanted().is_empty() || std::mem::replace(&mut self.told.fails, true) {
            return;
        }
        self.told.guards = false;
        let remedy = match error {
            Errno::PERM => "run it with CAP_NET_ADMIN",
            _ => {
                "a kernel (5.10) with nf_tables, nft_socket and nft_reject_inet; or have those listen on the node's addresses \
                 alone (ListenAddress of sshd, --address of the kubelet), and say --vip-guard none"
            }
        };
        tracing::warn!(
            %error,
            remedy,
            "no guard: what listens on all addresses of this machine (sshd, kubelet) may answer at addresses of Services"
        );
    }
}

/// True where others were changing what was looked at, or to be changed: that is no fault of the kernel.
fn is_busy(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno::INTR)
}

fn tell_lost(last: &mut Option<Instant>, protocol: u8) {
    let now = Instant::now();
    if last.replace(now).is_none_or(|last| now.duration_since(last) > QUIET) {
        tracing::warn!(table = table_name(protocol), "somebody has changed the guard: it is made again");
    }
}

/// A change of the table. The kernel makes each as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// The table anew, with nobody guarded.
    Build,
    Remove,
    Take(Vec<IpAddr>),
    Add(Vec<IpAddr>),
}

impl Step {
    fn carry_out(&self, socket: &mut GuardSocket, rules: &[Rule]) -> Result<(), Errno> {
        match self {
            Self::Build => socket.build(rules),
            Self::Remove => socket.remove().map(drop),
            Self::Take(addresses) => socket.take(addresses),
            Self::Add(addresses) => socket.add(addresses),
        }
    }

    /// Takes note of it as made.
    fn note(&self, there: &mut There) {
        match (self, there) {
            (Self::Build, there) => *there = There::Guarded(BTreeSet::new()),
            (Self::Remove, there) => *there = There::Nothing,
            (Self::Add(addresses), There::Guarded(guarded)) => guarded.extend(addresses),
            (Self::Take(addresses), There::Guarded(guarded)) => {
                for address in addresses {
                    guarded.remove(address);
                }
            }
            (Self::Add(_) | Self::Take(_), There::Nothing | There::Other) => {}
        }
    }
}

/// What has to be done so that these addresses are guarded. Without any, there is no table.
fn steps(there: &There, wanted: &BTreeSet<IpAddr>) -> Vec<Step> {
    let (build, missing, surplus) = match there {
        There::Nothing if wanted.is_empty() => return Vec::new(),
        _ if wanted.is_empty() => return vec![Step::Remove],
        There::Nothing | There::Other => (Some(Step::Build), wanted.iter().copied().collect(), Vec::new()),
        There::Guarded(guarded) => {
            (None, wanted.difference(guarded).copied().collect(), guarded.difference(wanted).copied().collect())
        }
    };
    let parts = |addresses: Vec<IpAddr>| addresses.chunks(BATCH).map(<[_]>::to_vec).collect::<Vec<_>>();
    let (missing, surplus) = (parts(missing), parts(surplus));
    build.into_iter().chain(surplus.into_iter().map(Step::Take)).chain(missing.into_iter().map(Step::Add)).collect()
}

/// The ports that the kernel gives to clients of this network namespace.
fn clients() -> RangeInclusive<u16> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok();
    range.and_then(|text| read_range(&text)).unwrap_or(CLIENTS)
}

fn read_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut ends = text.split_ascii_whitespace().map(|end| end.parse().ok());
    Some(ends.next()??..=ends.next()??)
}

async fn readable(news: Option<&RouteNews>) {
    match news {
        Some(news) => news.readable().await,
        None => pending().await,
    }
}

async fn due(time: Instant, never: bool) {
    match never {
        true => pending().await,
        false => sleep_until(time.into()).await,
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vip_routes::{LocalRoute, News};

    fn addresses(numbers: impl IntoIterator<Item = u16>) -> BTreeSet<IpAddr> {
        numbers.into_iter().map(|number| [0xfd96, 0, 0, 0, 0, 0, 0, number].into()).collect()
    }

    fn list(numbers: impl IntoIterator<Item = u16>) -> Vec<IpAddr> {
        addresses(numbers).into_iter().collect()
    }

    /// Carries steps out as a kernel that refuses nothing.
    fn after(mut there: There, wanted: &BTreeSet<IpAddr>) -> There {
        steps(&there, wanted).iter().for_each(|step| step.note(&mut there));
        there
    }

    #[test]
    fn given_what_is_there_when_other_addresses_are_wanted_then_only_what_differs_is_changed() {
        let guarded = There::Guarded(addresses([1, 2]));

        assert_eq!(steps(&guarded, &addresses([1, 2])), []);
        assert_eq!(steps(&guarded, &addresses([2, 3])), [Step::Take(list([1])), Step::Add(list([3]))]);
        assert_eq!(steps(&There::Nothing, &addresses([1])), [Step::Build, Step::Add(list([1]))]);
        assert_eq!(steps(&There::Other, &addresses([1])), [Step::Build, Step::Add(list([1]))]);
    }

    #[test]
    fn given_no_address_when_asked_for_then_there_is_no_table() {
        let none = BTreeSet::new();

        assert_eq!(steps(&There::Nothing, &none), []);
        for there in [There::Other, There::Guarded(none.clone()), There::Guarded(addresses([1]))] {
            assert_eq!(steps(&there, &none), [Step::Remove]);
        }
    }

    #[test]
    fn given_any_state_when_its_steps_are_made_then_it_is_the_wanted_one_and_there_are_no_more() {
        for there in [There::Nothing, There::Other, There::Guarded(addresses([])), There::Guarded(addresses(5..3_000))]
        {
            for wanted in [addresses([]), addresses([7]), addresses(0..2_500)] {
                let there = after(there.clone(), &wanted);

                let is_wanted = match &there {
                    There::Nothing => wanted.is_empty(),
                    There::Other => false,
                    There::Guarded(guarded) => *guarded == wanted,
                };
                assert!(is_wanted, "{there:?}");
                assert_eq!(steps(&there, &wanted), []);
            }
        }
    }

    #[test]
    fn given_thousands_of_addresses_when_sent_then_no_part_is_longer_than_a_message_may_be() {
        let steps = steps(&There::Nothing, &addresses(0..2_500));

        let lengths: Vec<usize> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Add(addresses) => Some(addresses.len()),
                _ => None,
            })
            .collect();
        assert_eq!(lengths, [1_000, 1_000, 500]);
    }

    #[test]
    fn given_a_range_of_ports_when_read_then_both_ends_count_and_nonsense_is_none() {
        assert_eq!(read_range("32768\t60999\n"), Some(32_768..=60_999));
        for wrong in ["", "1024", "a b", "1 70000"] {
            assert_eq!(read_range(wrong), None, "{wrong}");
        }
    }

    /// Of a number that nobody uses. It has asked nothing of nf_tables yet.
    fn watcher() -> Option<Watcher> {
        Watcher::new(254).inspect_err(|error| eprintln!("skipped, no rtnetlink here: {error}")).ok()
    }

    #[tokio::test]
    async fn given_routes_that_could_not_be_read_when_settled_then_the_table_is_left_alone_and_that_is_tried_again() {
        let Some(mut watcher) = watcher() else { return };

        watcher.settle();

        assert!(watcher.is_stale && watcher.socket.is_none(), "nobody was asked");
        assert!(watcher.is_pending && !watcher.is_idle(), "it is still to be done");
    }

    #[tokio::test]
    async fn given_a_settled_guard_when_nothing_of_ours_changes_then_nobody_is_asked_until_the_check_is_due() {
        let Some(mut watcher) = watcher() else { return };
        let due = Instant::now() + Duration::from_secs(3_600);
        (watcher.is_stale, watcher.is_pending, watcher.check_due) = (false, false, due);
        watcher.there = Some(There::Other);

        watcher.check();
        watcher.settle();

        assert!(watcher.socket.is_none(), "nobody was asked");
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
    async fn given_no_guard_when_ended_then_nobody_is_waited_for() {
        Guard::default().end().await;
    }
}
