//! The addresses of Services, made local to this machine for as long as somebody needs them so.
//!
//! ```text
//! listeners ─ require ─▶ keeper ─ changes, 128 at once ─▶ kernel
//!           ◀─ holds ──         ◀─ what others change ───
//! ```
//!
//! A [`Hold`] is what a listener keeps of an address, and so does each connection that came there: a stream that is
//! open goes on when its Service is deleted, as the route to its address goes a while after the last hold. The keeper is a task of
//! its own; it owns [`Routes`], where it is decided which routes there must be, and the sockets to the kernel
//! (`route_socket`). Who else removes routes is asked in `route_claim`, who would answer ARP in `arp`; `arp_tuning` has the
//! kernel not do so, where somebody has asked for that.
//!
//! Where there is no rtnetlink, or no right to change routes, addresses are local by others or not at all: then
//! listeners fail, each with the remedy.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{sleep, sleep_until, timeout};

use crate::arp;
use crate::arp_tuning::ArpTuning;
use crate::host::Host;
use crate::route_claim::{Claim, ClaimError};
use crate::route_socket::{BATCH, NotMade, RouteNews, RouteSocket, removals};
use crate::stats::PROCESS;
use crate::vip_routes::{Change, News, Outcome, Routes, Tally};

/// How often all routes are looked at although nothing was told of them: some go without a word, and are to be back
/// within 5 s.
const LOOK_INTERVAL: Duration = Duration::from_secs(4);
/// When they are looked at again after that has failed.
const LOOK_RETRY: Duration = Duration::from_secs(1);
/// The least time between two looks, however often the kernel says that there is something to see.
const LOOK_PAUSE: Duration = Duration::from_millis(200);
/// When a socket to the kernel is opened again after that has failed.
const OPEN_RETRY: Duration = Duration::from_secs(5);
/// How long the kernel may take to tell the interfaces: everybody waits for that.
const HOST_PATIENCE: Duration = Duration::from_secs(1);
/// How long is waited after a panic.
const PANIC_PAUSE: Duration = Duration::from_secs(1);
/// How often a claim is tried again that somebody else has.
const CLAIM_INTERVAL: Duration = Duration::from_secs(20);
/// Routes that are set again within this time of the last ones are no news for the log.
const QUIET: Duration = Duration::from_secs(20);
/// Orders that are taken at once.
const ORDERS: usize = 1_024;
/// Networks that are named in one line of the log.
const NAMED: usize = 5;

/// How addresses of Services are made local.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VipOptions {
    /// By which number our routes are known among those of others (5..=255, default 107). From `--route-protocol`.
    pub protocol: u8,
    /// How long the route of an address stays that nobody needs any more (default 60 s): the kernel still sends what a
    /// closed connection has left, and hears of it only while the address is local. From `--vip-routes-linger`.
    pub linger: Duration,
    /// What becomes of them when the process ends. From `--vip-routes-at-exit`.
    pub at_exit: AtExit,
    /// True where `arp_ignore` and `arp_announce` may be set on interfaces whose neighbours may ask for such an address
    /// (default false). From `--tune-sysctls`.
    pub tune_sysctls: bool,
}

/// What becomes of our routes when the process ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AtExit {
    /// They stay: clients are refused at once, and the next process finds them
    #[default]
    Keep,
    /// They go: clients hear nothing, or whom the network leads them to
    Remove,
}

/// An address that is to be local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which one.
    pub address: IpAddr,
    /// True where neighbours may ask for it, as for a load balancer's address: then no route is made on a machine that
    /// would answer them.
    pub announced: bool,
}

/// Keeps an address local. Clones count as one; the address is given up when the last of them is dropped.
pub type Hold = Arc<Lease>;

/// See [`Hold`].
#[derive(Debug)]
pub struct Lease {
    address: IpAddr,
    keeper: mpsc::UnboundedSender<Order>,
}

#[cfg(test)]
impl Lease {
    /// One that no keeper counts.
    pub(crate) fn of_nobody(address: IpAddr) -> Hold {
        Arc::new(Self { address, keeper: mpsc::unbounded_channel().0 })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Where the keeper has ended, nobody counts any more.
        let _ = self.keeper.send(Order::Release(self.address));
    }
}

/// Why an address was not made local.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    /// Neighbours would be answered on this interface, be they answered by other nodes or not.
    #[error(
        "no route to the address is made, as this machine would answer ARP for it on {interface}: {}",
        arp::remedy(.interface)
    )]
    ArpConflict {
        /// Its name.
        interface: String,
    },
    /// They might be, for all that is known. It is tried again.
    #[error("no route to the address is made while the interfaces cannot be read whose neighbours may ask for it")]
    Unsure,
    /// This process may not change routes.
    #[error("no route to the address may be made without CAP_NET_ADMIN")]
    Forbidden,
    /// The kernel would not. It is tried again.
    #[error("the kernel refuses a route to the address ({0})")]
    Refused(Errno),
    /// There was one a moment ago. It is set again.
    #[error("somebody has just taken the route to the address away")]
    Gone,
}

impl From<NoRoute> for io::Error {
    fn from(reason: NoRoute) -> Self {
        Self::new(io::ErrorKind::AddrNotAvailable, reason)
    }
}

/// What became of required addresses.
#[derive(Debug, Default)]
pub struct Granted {
    holds: BTreeMap<IpAddr, Hold>,
    refused: BTreeMap<IpAddr, NoRoute>,
}

impl Granted {
    /// Keeps the address local; `None` where it was not required, or nobody keeps it so.
    pub fn hold(&self, address: IpAddr) -> Option<Hold> {
        self.holds.get(&address).cloned()
    }

    /// Why the address is not local, where that is known.
    pub fn refused(&self, address: IpAddr) -> Option<&NoRoute> {
        self.refused.get(&address)
    }
}

/// What the keeper is told.
#[derive(Debug)]
enum Order {
    Require(Vec<Wanted>, oneshot::Sender<Granted>),
    Release(IpAddr),
    /// All that is wanted has been required: what is left of the last run may go.
    AllKnown,
    /// The process is about to end: nothing goes any more.
    Stop,
    /// Another process has the addresses: nothing goes by this one any more, not even at its end. Told once its claim is free.
    Leave(oneshot::Sender<()>),
    /// The process ends: what is to go at exit goes.
    End(oneshot::Sender<()>),
    /// Panic, to see what happens then.
    #[cfg(test)]
    Panic,
}

/// Where addresses are required. By default nobody makes any local. Clones lead to the same keeper, which ends with the
/// last of them and the last hold.
#[derive(Clone, Debug, Default)]
pub struct Vips(Option<mpsc::UnboundedSender<Order>>);

impl Vips {
    /// Starts a keeper on the current tokio runtime. It looks at what is there and changes nothing unasked.
    pub fn start(options: VipOptions) -> Self {
        let (orders, inbox) = mpsc::unbounded_channel(); // As many as there are listeners, at most.
        tokio::spawn(run(options, inbox, orders.downgrade()));
        Self(Some(orders))
    }

    /// Has addresses made local, and resolves when they are or cannot be. Loopback addresses are so anyway.
    pub async fn require(&self, wanted: Vec<Wanted>) -> Granted {
        let Some(keeper) = &self.0 else { return Granted::default() };
        // Each address once: what is a cluster IP, too, is required as such.
        let mut by_address: BTreeMap<IpAddr, bool> = BTreeMap::new();
        for Wanted { address, announced } in wanted.into_iter().filter(|wanted| !wanted.address.is_loopback()) {
            *by_address.entry(address).or_insert(true) &= announced;
        }
        if by_address.is_empty() {
            return Granted::default();
        }
        let wanted = by_address.into_iter().map(|(address, announced)| Wanted { address, announced });
        let (reply, granted) = oneshot::channel();
        let _ = keeper.send(Order::Require(wanted.collect(), reply));
        granted.await.unwrap_or_default() // A keeper that has ended makes nothing local.
    }

    /// To be called once all that is wanted has been required: from now on routes of ours go that nobody holds, those
    /// of the last run among them.
    pub fn all_known(&self) {
        self.tell(Order::AllKnown);
    }

    /// To be called before listeners are closed because the process ends: routes stay from now on.
    pub fn stop(&self) {
        self.tell(Order::Stop);
    }

    /// To be called when another process has taken over what is served at these addresses: routes are its own from now on,
    /// and it may remove them. Resolves when it may claim them; nobody has to wait for that.
    pub(crate) fn leave(&self) -> oneshot::Receiver<()> {
        let (done, left) = oneshot::channel();
        self.tell(Order::Leave(done));
        left
    }

    /// The end: removes our routes where that is asked for.
    pub async fn end(&self) {
        let (done, ended) = oneshot::channel();
        self.tell(Order::End(done));
        let _ = ended.await; // An error means that there is no keeper.
    }

    fn tell(&self, order: Order) {
        if let Some(keeper) = &self.0 {
            let _ = keeper.send(order);
        }
    }
}

async fn run(options: VipOptions, mut inbox: mpsc::UnboundedReceiver<Order>, own: mpsc::WeakUnboundedSender<Order>) {
    let mut counted = true;
    loop {
        let error = match RouteSocket::open(options.protocol) {
            Ok(socket) => {
                let keeper = async { Keeper::new(options.clone(), socket, own.clone(), counted).run(&mut inbox).await };
                if AssertUnwindSafe(keeper).catch_unwind().await.is_ok() {
                    return;
                }
                tracing::error!(
                    "who keeps addresses local has panicked: it begins anew, and removes no route any more"
                );
                counted = false;
                sleep(PANIC_PAUSE).await; // What made it panic may still be there.
                continue;
            }
            Err(error) => error,
        };
        if timeout(OPEN_RETRY, refuse(&mut inbox, &error, &mut counted)).await.is_ok() {
            return;
        }
    }
}

/// Without rtnetlink: nobody's address is made local, and who needs it is not `counted`. Ends when nobody needs it any more.
async fn refuse(inbox: &mut mpsc::UnboundedReceiver<Order>, error: &io::Error, counted: &mut bool) {
    while let Some(order) = inbox.recv().await {
        match order {
            Order::Require(..) if std::mem::replace(counted, false) => tracing::warn!(
                %error,
                "no rtnetlink, trying again: addresses of Services are local only where others make them so"
            ),
            Order::End(_) => return,
            _ => {}
        }
    }
}

/// The task that keeps addresses local. Owns what it knows by value.
struct Keeper {
    options: VipOptions,
    routes: Routes,
    socket: RouteSocket,
    /// `None` where the kernel tells nothing.
    news: Option<RouteNews>,
    claim: Option<Claim>,
    /// `None` where no setting of the kernel may be changed.
    tuning: Option<ArpTuning>,
    /// For leases. Weak: the keeper is not to keep itself alive.
    own: mpsc::WeakUnboundedSender<Order>,
    /// Who waits for addresses, and which of those are not even tried.
    asked: Vec<Asked>,
    /// The held addresses that neighbours may ask for.
    announced: BTreeSet<IpAddr>,
    /// The last refusals of the kernel.
    refused: BTreeMap<IpAddr, Errno>,
    /// False where it may be that somebody needs an address and was not counted, by a keeper before this one. Then all routes
    /// that are found are held, and none is ever removed.
    counted: bool,
    all_known: bool,
    stopping: bool,
    /// When to try next to get the claim.
    claim_due: Instant,
    /// When to look next at all routes, and when that was done last.
    look_due: Instant,
    looked: Instant,
    /// When it was looked last whether neighbours have come to be answered for addresses with routes.
    judged: Instant,
    /// True where the kernel has said that something has changed, but not what.
    upset: bool,
    told: Told,
}

struct Asked {
    wanted: Vec<Wanted>,
    conflicts: BTreeMap<IpAddr, NoRoute>,
    reply: oneshot::Sender<Granted>,
}

/// What the log says already.
#[derive(Default)]
struct Told {
    forbidden: bool,
    refused: bool,
    conflict: bool,
    answering: bool,
    blind: bool,
    holder: Option<String>,
    /// When routes were set again last, whether or not that was told.
    repaired: Option<Instant>,
    fight: bool,
}

impl Keeper {
    fn new(options: VipOptions, socket: RouteSocket, own: mpsc::WeakUnboundedSender<Order>, counted: bool) -> Self {
        let news = RouteNews::open(options.protocol); // Before the first look, so that nothing is missed in between.
        if let Err(error) = &news {
            tracing::warn!(%error, "the kernel does not tell of changed routes: they are looked at every few seconds");
        }
        let now = Instant::now();
        let mut keeper = Self {
            routes: Routes::new(options.linger),
            tuning: options.tune_sysctls.then(ArpTuning::default),
            options,
            socket,
            news: news.ok(),
            claim: None,
            own,
            asked: Vec::new(),
            announced: BTreeSet::new(),
            refused: BTreeMap::new(),
            counted,
            all_known: false,
            stopping: false,
            claim_due: now,
            look_due: now,
            looked: now,
            judged: now,
            upset: false,
            told: Told::default(),
        };
        keeper.look();
        keeper
    }

    /// Until nobody needs it any more.
    async fn run(mut self, inbox: &mut mpsc::UnboundedReceiver<Order>) {
        self.take_claim().await;
        let mut orders = Vec::new();
        loop {
            tokio::select! {
                biased;
                count = inbox.recv_many(&mut orders, ORDERS) => {
                    if count == 0 {
                        return;
                    }
                    for order in orders.drain(..) {
                        if let Some(done) = self.take(order).await {
                            self.end().await;
                            let _ = done.send(()); // Who asked may have gone.
                            return;
                        }
                    }
                }
                () = readable(self.news.as_ref()) => {}
                () = sleep_until(self.next_due().into()) => {}
                never = answer(self.claim.as_ref()) => match never {},
            }
            self.settle().await;
            self.take_claim().await;
            self.judge_again().await;
        }
    }

    fn next_due(&self) -> Instant {
        self.routes.next_due().map_or(self.look_due, |due| due.min(self.look_due))
    }

    /// Takes an order; gives it back whom to tell of the end, where that is asked for.
    async fn take(&mut self, order: Order) -> Option<oneshot::Sender<()>> {
        let now = Instant::now();
        match order {
            Order::Require(wanted, reply) => {
                let conflicts = self.conflicts(&wanted).await;
                for wanted in wanted.iter().filter(|wanted| !conflicts.contains_key(&wanted.address)) {
                    self.routes.hold(wanted.address, now);
                    if wanted.announced {
                        self.announced.insert(wanted.address);
                    }
                }
                self.asked.push(Asked { wanted, conflicts, reply });
            }
            Order::Release(address) => {
                self.routes.release(address, now);
                if !self.routes.is_held(address) {
                    self.announced.remove(&address);
                }
            }
            Order::AllKnown => {
                self.all_known = true;
                self.claim_due = now;
                self.tell_state();
                self.remove_what_may_go();
            }
            Order::Stop => self.stop(now),
            Order::Leave(done) => {
                self.stop(now);
                self.options.at_exit = AtExit::Keep;
                self.claim = None; // The other one waits for it.
                let _ = done.send(()); // Nobody may wait for that.
            }
            Order::End(done) => return Some(done),
            #[cfg(test)]
            Order::Panic => panic!("asked to"),
        }
        None
    }

    fn stop(&mut self, now: Instant) {
        self.stopping = true;
        self.routes.forbid_removal(now);
    }

    /// The addresses that get no route, as neighbours would be answered. What others made local is not our doing; a route
    /// of the last run is, and goes where nobody holds it. Judged when a listener is opened and when a route is to be set
    /// again. A route that is there and held stays, however interfaces and their settings change: streams may be open there.
    /// Where settings may be changed, that is done first.
    async fn conflicts(&mut self, wanted: &[Wanted]) -> BTreeMap<IpAddr, NoRoute> {
        let in_question = |Wanted { address, announced }: &&Wanted| {
            *announced && address.is_ipv4() && !self.routes.is_local_by_others(*address)
        };
        let in_question: Vec<IpAddr> = wanted.iter().filter(in_question).map(|wanted| wanted.address).collect();
        if in_question.is_empty() {
            return BTreeMap::new();
        }
        // Read anew, as interfaces and settings change.
        let Ok(Ok(host)) = timeout(HOST_PATIENCE, Host::read()).await else {
            return unsure(in_question, &self.routes);
        };
        if let Some(tuning) = &mut self.tuning {
            let interfaces: BTreeSet<&str> =
                in_question.iter().flat_map(|address| arp::asked_on(*address, &host)).collect();
            interfaces.into_iter().for_each(|interface| tuning.quieten(interface));
        }
        let conflict = |address| {
            let interface = arp::conflict(address, &host, arp::arp_ignore)?;
            Some((address, NoRoute::ArpConflict { interface }))
        };
        in_question.into_iter().filter_map(conflict).collect()
    }

    /// Tells of neighbours that have come to be answered for addresses with routes, as interfaces and their settings change;
    /// has that end, where it may.
    async fn judge_again(&mut self) {
        let now = Instant::now();
        if self.announced.is_empty() || now < self.judged + LOOK_INTERVAL {
            return;
        }
        self.judged = now;
        let with_route = self.announced.iter().filter(|address| self.routes.is_local(**address));
        let with_route: Vec<_> = with_route.map(|address| Wanted { address: *address, announced: true }).collect();
        let conflicts = self.conflicts(&with_route).await;
        let Some((address, NoRoute::ArpConflict { interface })) = conflicts.first_key_value() else {
            self.told.answering = false;
            return;
        };
        if !std::mem::replace(&mut self.told.answering, true) {
            let remedy = arp::remedy(interface);
            tracing::warn!(%address, interface, remedy, "this machine now answers ARP for an address of a Service, whose route stays");
        }
    }

    /// Carries out what is due, and answers those who wait for it.
    async fn settle(&mut self) {
        let now = Instant::now(); // What becomes due meanwhile is for the next time: others are heard first.
        let (mut repaired, mut surprised) = (Vec::new(), false);
        loop {
            // Each time: while others had their turn, strangers may have had theirs.
            self.hear();
            if self.look_due <= Instant::now() {
                self.look();
            }
            let due = self.routes.take_due(now, BATCH);
            if due.is_empty() {
                break;
            }
            let due = self.without_conflicts(due).await;
            surprised |= self.carry_out(&due, &mut repaired);
            yield_now().await; // Ten thousand in one go would keep a thread from what else it is for.
        }
        if surprised {
            self.look(); // Once, however many there were.
        }
        self.tell(&repaired);
        for asked in std::mem::take(&mut self.asked) {
            self.grant(asked);
        }
    }

    /// What is left where neighbours would be answered for an address that others have made local up to now.
    async fn without_conflicts(&mut self, due: Vec<Change>) -> Vec<Change> {
        let again =
            |change: &Change| self.announced.contains(&change.address()) && self.routes.was_local(change.address());
        let repairs = due.iter().copied().filter(again);
        let repairs: Vec<_> = repairs.map(|change| Wanted { address: change.address(), announced: true }).collect();
        let conflicts = self.conflicts(&repairs).await;
        let Some((address, reason)) = conflicts.first_key_value() else { return due };
        if !std::mem::replace(&mut self.told.conflict, true) {
            tracing::warn!(%address, %reason, "an address of a Service is local no more, trying again");
        }
        let is_refused = |change: &Change| conflicts.contains_key(&change.address());
        let (refused, due): (Vec<_>, Vec<_>) = due.into_iter().partition(is_refused);
        let now = Instant::now();
        for change in refused {
            self.routes.settle(change, Outcome::Refused, now);
        }
        due
    }

    /// True where the kernel knows of routes that we do not.
    fn carry_out(&mut self, changes: &[Change], repaired: &mut Vec<IpAddr>) -> bool {
        let outcomes = self.socket.change(changes);
        let now = Instant::now();
        let mut surprised = false;
        for (change, outcome) in changes.iter().zip(outcomes) {
            let outcome = match (outcome, change) {
                (Ok(()), _) => Outcome::Done,
                // EACCES is something else: IPv6 is switched off on loopback. That says nothing of IPv4, or of later.
                (Err(NotMade::Refused(Errno::PERM)), _) => Outcome::Forbidden,
                (Err(NotMade::Refused(Errno::SRCH)), Change::Remove(_)) => Outcome::WasGone,
                (Err(error), _) => {
                    surprised |= matches!(error, NotMade::Refused(Errno::EXIST) | NotMade::Unanswered(_));
                    self.refuse(*change, error)
                }
            };
            if self.routes.settle(*change, outcome, now) {
                repaired.push(change.address());
            }
        }
        surprised
    }

    fn refuse(&mut self, change: Change, error: NotMade) -> Outcome {
        tracing::debug!(?change, error = %error.error(), "a change of routes is not made");
        self.refused.insert(change.address(), error.error());
        match error {
            NotMade::Refused(_) => Outcome::Refused,
            NotMade::Unanswered(_) => Outcome::Unanswered,
        }
    }

    /// Takes note of what the kernel has told. Some of it may be older than the last look, which does no harm: the last word
    /// on each route is right all the same.
    fn hear(&mut self) {
        let now = Instant::now();
        let news = self.news.as_mut().map(RouteNews::take).unwrap_or_default();
        if news.contains(&News::Unknown) {
            self.upset = true;
            self.look_due = self.look_due.min(now.max(self.looked + LOOK_PAUSE));
        }
        news.into_iter().for_each(|news| self.routes.note(news, now));
    }

    fn try_look(&mut self) -> io::Result<()> {
        let routes = self.socket.look()?;
        let now = Instant::now();
        let is_first = !self.routes.are_known();
        self.routes.note_all(routes, now);
        if is_first && !self.counted {
            self.routes.hold_own(now);
        }
        (self.looked, self.look_due) = (now, now + LOOK_INTERVAL);
        Ok(())
    }

    /// Looks at all routes, and takes note of what was told meanwhile.
    fn look(&mut self) {
        match self.try_look() {
            Ok(()) => {
                self.told.blind = false;
                if std::mem::take(&mut self.upset) {
                    self.routes.try_again(Instant::now()); // Loopback may be up again, say.
                }
            }
            Err(error) => {
                self.look_due = Instant::now() + LOOK_RETRY;
                if !std::mem::replace(&mut self.told.blind, true) {
                    tracing::warn!(%error, "routes cannot be read, trying again: what others do to them is unknown");
                }
            }
        }
        self.hear();
    }

    /// Not before there is a route to be claimed: on loopback addresses any number of relays live side by side. And not before
    /// all is known: nothing is removed until then, and who takes over from another process would find that one.
    async fn take_claim(&mut self) {
        let now = Instant::now();
        let is_too_early = !self.all_known && self.counted;
        if self.claim.is_some() || self.stopping || is_too_early || self.routes.tally().own == 0 || now < self.claim_due
        {
            return;
        }
        self.claim_due = now + CLAIM_INTERVAL;
        self.try_claim().await;
    }

    /// Where somebody else has it and says nothing, orders wait for that answer: 300 ms in 20 s.
    async fn try_claim(&mut self) {
        let says = format!("kube-relay {} with pid {}", env!("CARGO_PKG_VERSION"), std::process::id());
        match Claim::take(self.options.protocol, says).await {
            Ok(claim) => {
                self.claim = Some(claim);
                self.told.holder = None;
                self.remove_what_may_go();
            }
            Err(error) => self.tell_holder(&error),
        }
    }

    /// What nobody wants goes once it is known what that is, and if nobody else is there to say the contrary.
    fn remove_what_may_go(&mut self) {
        if self.all_known && self.counted && self.claim.is_some() && !self.stopping {
            self.routes.allow_removal(Instant::now());
        }
    }

    /// Hands out the holds that were asked for. Where nobody waits any more they are dropped, and so released.
    fn grant(&self, Asked { wanted, conflicts, reply }: Asked) {
        let Some(keeper) = self.own.upgrade() else { return }; // Nobody is left who could have asked.
        let mut granted = Granted { holds: BTreeMap::new(), refused: conflicts };
        for Wanted { address, .. } in wanted {
            if granted.refused.contains_key(&address) {
                continue;
            }
            granted.holds.insert(address, Arc::new(Lease { address, keeper: keeper.clone() }));
            // Before the first look others may have made it local: who binds it will see.
            if self.routes.are_known() && !self.routes.is_local(address) {
                granted.refused.insert(address, self.why_not_local(address));
            }
        }
        drop(reply.send(granted));
    }

    fn why_not_local(&self, address: IpAddr) -> NoRoute {
        match self.refused.get(&address) {
            _ if self.routes.is_forbidden() => NoRoute::Forbidden,
            Some(error) => NoRoute::Refused(*error),
            None => NoRoute::Gone,
        }
    }

    /// Removes what is to go when the process ends.
    async fn end(&mut self) {
        let addresses = self.routes.own_addresses();
        if self.options.at_exit == AtExit::Keep || addresses.is_empty() {
            return;
        }
        if !self.counted {
            return tracing::warn!(routes = addresses.len(), "routes stay; `kube-relay cleanup` removes them");
        }
        if self.claim.is_none() {
            self.told.holder = None; // It is to be named again, if it is still there.
            self.try_claim().await;
        }
        if self.claim.is_none() {
            return tracing::warn!(routes = addresses.len(), "routes stay, as they may be another process's as well");
        }
        for part in addresses.chunks(BATCH) {
            let failed = self.socket.change(&removals(part)).into_iter().filter_map(Result::err);
            if let Some(error) = failed.map(NotMade::error).find(|error| *error != Errno::SRCH) {
                return tracing::warn!(%error, "routes stay; `kube-relay cleanup` removes them");
            }
            yield_now().await;
        }
        tracing::info!(routes = addresses.len(), "routes of addresses of Services removed");
    }

    /// Tells the transitions, not their repetitions.
    fn tell(&mut self, repaired: &[IpAddr]) {
        if !repaired.is_empty() {
            PROCESS.routes_repaired.add(repaired.len() as u64);
            self.tell_repaired(repaired);
        }
        if self.routes.is_forbidden() && !std::mem::replace(&mut self.told.forbidden, true) {
            tracing::warn!(
                remedy = "run it with CAP_NET_ADMIN, or make them local yourself and say --vip-routes none",
                "no right to change routes: addresses of Services are local only where others make them so"
            );
            self.tell_state();
        }
        self.refused.retain(|address, _| self.routes.lacks(*address));
        match self.refused.first_key_value() {
            Some((address, error)) if !self.told.refused => {
                self.told.refused = true;
                tracing::warn!(%address, %error, "the kernel refuses a route, trying again");
            }
            Some(_) => {}
            None => self.told.refused = false,
        }
        let Tally { own, foreign, missing } = self.routes.tally();
        self.told.conflict &= missing > 0;
        let levels = &PROCESS.vip_addresses;
        for (level, count) in [(&levels.own, own), (&levels.foreign, foreign), (&levels.missing, missing)] {
            level.set(count as u64);
        }
    }

    /// The first ones after a while, and that there is no end of it.
    fn tell_repaired(&mut self, repaired: &[IpAddr]) {
        let now = Instant::now();
        let last = self.told.repaired.replace(now);
        if last.is_none_or(|last| now.duration_since(last) > QUIET) {
            self.told.fight = false;
            let first = repaired.first().map(tracing::field::display);
            tracing::warn!(
                routes = repaired.len(),
                first,
                "addresses of Services were local no more: routes set again"
            );
        }
        let Some(address) = repaired.iter().find(|address| self.routes.is_fought_over(**address)) else { return };
        if !std::mem::replace(&mut self.told.fight, true) {
            tracing::warn!(%address, "somebody keeps taking routes of ours away: set again ever later");
        }
    }

    /// What of others this relay relies on.
    fn tell_state(&self) {
        let Tally { own, foreign, missing } = self.routes.tally();
        let relied_on = self.routes.relied_on();
        if relied_on.is_empty() {
            return tracing::debug!(own, foreign, missing, "addresses of Services");
        }
        let mut named: Vec<String> = relied_on.iter().take(NAMED).map(ToString::to_string).collect();
        if relied_on.len() > NAMED {
            named.push(format!("and {} more", relied_on.len() - NAMED));
        }
        let relied_on = named.join(", ");
        tracing::info!(own, foreign, missing, relied_on, "addresses of Services rely on what others have made local");
    }

    fn tell_holder(&mut self, error: &ClaimError) {
        let text = match error {
            ClaimError::Held { .. } => error.to_string(), // With the holder.
            ClaimError::Socket { source, .. } => format!("{error}: {source}"),
        };
        if self.told.holder.as_ref() != Some(&text) {
            tracing::warn!(error = text, "no route is removed, trying again");
            self.told.holder = Some(text);
        }
    }
}

/// Those that get no route as nobody can tell whether neighbours would be answered. One that is there and held stays.
fn unsure(in_question: Vec<IpAddr>, routes: &Routes) -> BTreeMap<IpAddr, NoRoute> {
    let is_kept = |address| routes.is_held(address) && routes.is_local(address);
    let refused = in_question.into_iter().filter(|address| !is_kept(*address));
    refused.map(|address| (address, NoRoute::Unsure)).collect()
}

async fn readable(news: Option<&RouteNews>) {
    match news {
        Some(news) => news.readable().await,
        None => pending().await,
    }
}

async fn answer(claim: Option<&Claim>) -> std::convert::Infallible {
    match claim {
        Some(claim) => claim.answer().await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vip_routes::LocalRoute;

    fn wanted(address: [u8; 4]) -> Wanted {
        Wanted { address: address.into(), announced: false }
    }

    #[tokio::test]
    async fn given_nobody_who_makes_addresses_local_when_required_then_there_is_no_hold_and_no_complaint() {
        let granted = Vips::default().require(vec![wanted([10, 96, 0, 1])]).await;

        assert!(granted.hold([10, 96, 0, 1].into()).is_none());
        assert_eq!(granted.refused([10, 96, 0, 1].into()), None);
    }

    #[tokio::test]
    async fn given_loopback_addresses_when_required_then_the_keeper_is_not_asked() {
        let (orders, mut inbox) = mpsc::unbounded_channel();

        let granted = Vips(Some(orders)).require(vec![wanted([127, 96, 0, 1])]).await;

        assert!(granted.hold([127, 96, 0, 1].into()).is_none());
        assert!(inbox.try_recv().is_err());
    }

    #[tokio::test]
    async fn given_an_address_of_two_kinds_when_required_then_it_is_so_once_and_as_a_cluster_ip() {
        let (orders, mut inbox) = mpsc::unbounded_channel();
        let address = [10, 96, 0, 1].into();
        let keeper = async {
            let Some(Order::Require(wanted, _)) = inbox.recv().await else { panic!("it is asked") };
            wanted
        };

        let both = [true, false].map(|announced| Wanted { address, announced });
        let vips = Vips(Some(orders));
        let (_, wanted) = tokio::join!(vips.require(both.to_vec()), keeper);

        assert_eq!(wanted, [Wanted { address, announced: false }]);
    }

    #[tokio::test]
    async fn given_a_keeper_that_has_ended_when_required_then_nobody_waits_for_it() {
        let (orders, inbox) = mpsc::unbounded_channel();
        drop(inbox);
        let vips = Vips(Some(orders));

        vips.require(vec![wanted([10, 96, 0, 1])]).await;
        vips.end().await;
    }

    #[tokio::test]
    async fn given_no_rtnetlink_when_addresses_are_required_then_it_is_known_that_they_were_not_counted() {
        let error = io::Error::from(io::ErrorKind::Unsupported);
        for (order, expected) in [(Order::AllKnown, true), (Order::Require(Vec::new(), oneshot::channel().0), false)] {
            let (orders, mut inbox) = mpsc::unbounded_channel();
            let mut counted = true;
            orders.send(order).expect("it is open");
            drop(orders);

            refuse(&mut inbox, &error, &mut counted).await;

            assert_eq!(counted, expected);
        }
    }

    #[tokio::test]
    async fn f35_given_a_keeper_that_panics_when_addresses_are_required_then_another_one_answers() {
        let protocol = 254; // Nobody's, and nothing is asked for that is not there.
        if let Err(error) = RouteSocket::open(protocol) {
            return eprintln!("skipped, no rtnetlink here: {error}");
        }
        let linger = Duration::from_secs(60);
        let vips = Vips::start(VipOptions { protocol, linger, at_exit: AtExit::Keep, tune_sysctls: false });
        let require = async || {
            let (reply, granted) = oneshot::channel();
            vips.tell(Order::Require(vec![wanted([127, 96, 0, 1])], reply));
            granted.await.ok()?.hold([127, 96, 0, 1].into())
        };
        assert!(require().await.is_some());

        vips.tell(Order::Panic);

        // Who is heard together with that order has no answer.
        let again = async { while require().await.is_none() {} };
        timeout(Duration::from_secs(10), again).await.expect("another one has begun");
        vips.end().await;
    }

    #[test]
    fn given_interfaces_that_cannot_be_read_when_addresses_are_required_then_only_routes_that_are_held_stay() {
        let now = Instant::now();
        let [held, left_over, held_and_missing, new] = [1, 2, 3, 4].map(|host| IpAddr::from([198, 18, 0, host]));
        let mut routes = Routes::new(Duration::from_secs(60));
        routes.note_all([held, left_over].map(|address| LocalRoute { net: address.into(), own: true }), now);
        [held, held_and_missing].into_iter().for_each(|address| routes.hold(address, now));

        let refused = unsure(vec![held, left_over, held_and_missing, new], &routes);

        assert_eq!(refused, [left_over, held_and_missing, new].map(|address| (address, NoRoute::Unsure)).into());
    }

    #[test]
    fn given_a_lease_when_its_last_clone_is_dropped_then_the_keeper_is_told_once() {
        let (keeper, mut orders) = mpsc::unbounded_channel();
        let listener: Hold = Arc::new(Lease { address: [10, 96, 0, 1].into(), keeper });
        let connection = Hold::clone(&listener);

        drop(listener);
        assert!(orders.try_recv().is_err(), "a connection is open");
        drop(connection);

        assert!(matches!(orders.try_recv(), Ok(Order::Release(address)) if address == IpAddr::from([10, 96, 0, 1])));
        assert!(orders.try_recv().is_err());
    }
}
