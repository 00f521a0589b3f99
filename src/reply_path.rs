//! Keeps the way by which answers to clients' addresses come to this process: a table of nf_tables, and one rule and one
//! route of each family. What they are is in `reply_message`.
//!
//! They are there from the first moment that a Service asks for `kube-relay.dev/source-address: preserve` (so a relay without
//! such a Service changes nothing). Others may flush what is not theirs: where the kernel says that somebody has changed
//! rules (`reply_news`), and every [`CHECK_INTERVAL`], it is looked at whether all is there. Without a connection from a
//! client's address they match nothing. They stay when the process ends, or is killed: the next one finds them, and has them
//! once and not twice. `cleanup` takes them away, and so does a relay that begins without such a Service; one whose routes go
//! at exit takes them along. None of these does where another relay with the same number needs them (`reply_seats`).
//!
//! Where the kernel refuses, backends see the node's address: log and `status` say why, and each Service counts it
//! (`reply_path`).

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

use crate::guard_message::Rule;
use crate::guard_socket::GuardSocket;
use crate::local_ports;
use crate::name::Family;
use crate::reply_mark::ReplyMark;
use crate::reply_message::{
    CHAINS, RULE_PRIORITY, Request, filter_table, route_table, rules, without_defragmentation, write,
};
use crate::reply_news::ReplyNews;
use crate::reply_seats::{Seat, take_all};
use crate::route_claim::name_of;
use crate::route_message::{messages, result};
use crate::routing_rules;

/// How often it is looked at whether all is as we left it, where nobody says that it is not.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(4);
/// How long is waited between two looks where somebody does: others may change rules many times a second. Much less than what
/// a sender waits before it sends again.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(20);
/// When it is tried again after it has failed.
const RETRY: Duration = Duration::from_secs(10);
/// The same, where the kernel was busy: others were changing what was looked at.
const BUSY_RETRY: Duration = Duration::from_secs(1);
/// How often that is looked at anew at once.
const LOOKS: usize = 5;
/// Rules of ours with one mark or another, at most: of each that there was.
const MOST_RULES: usize = 16;
/// The longest answer of the kernel to what is asked here.
const ANSWER: usize = 4_096;

/// How answers are led here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyPathOptions {
    /// Number of our routes: the names of table and rules follow from it. From `--route-protocol`.
    pub protocol: u8,
    /// What answers are marked with on their way here. From `--reply-mark`.
    pub mark: ReplyMark,
    /// True where it is to go when the process ends. From `--vip-routes-at-exit`.
    pub removed_at_exit: bool,
}

/// The task that keeps it. By default there is none, and answers do not come here. It ends with the last clone of this, and
/// leaves everything as it is.
#[derive(Clone, Debug, Default)]
pub struct ReplyPath {
    state: Arc<State>,
    orders: Option<mpsc::UnboundedSender<Order>>,
}

/// Whether answers are led here. Written by the [`Keeper`], read by whoever begins a connection.
#[derive(Debug, Default)]
struct State(AtomicI32);

impl State {
    /// Nobody has asked for it yet, or it was taken away at somebody's wish.
    const UNMADE: i32 = 0;
    /// All is there. Errors of the kernel are greater than [`Self::UNMADE`], and stand for themselves.
    const HERE: i32 = -1;

    fn leads_here(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::HERE // What it speaks of was done in the kernel, by system calls.
    }

    fn refusal(&self) -> Option<Errno> {
        let state = self.0.load(Ordering::Relaxed);
        (state > Self::UNMADE).then(|| Errno::from_raw_os_error(state))
    }

    fn set(&self, outcome: Result<(), Errno>) {
        self.0.store(outcome.map_or_else(Errno::raw_os_error, |()| Self::HERE), Ordering::Relaxed);
    }

    fn unmake(&self) {
        self.0.store(Self::UNMADE, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Order {
    /// Some Service needs it: tell when it was tried.
    Require(oneshot::Sender<()>),
    /// No Service needs it: what the last run has left goes.
    Clear,
    /// Another process needs it from now on, and has it kept.
    Leave,
    /// The process ends: tell when what is to go has gone.
    End(oneshot::Sender<()>),
}

impl ReplyPath {
    /// Starts it on the current tokio runtime. It does nothing until it is required.
    pub fn start(options: ReplyPathOptions) -> Self {
        let state = Arc::<State>::default();
        let (orders, inbox) = mpsc::unbounded_channel(); // A few in the life of a process.
        tokio::spawn(Keeper::new(options, Arc::clone(&state)).run(inbox));
        Self { state, orders: Some(orders) }
    }

    /// One of which this is known without a task, for tests of who uses it.
    #[cfg(test)]
    pub(crate) fn assumed(outcome: Result<(), Errno>) -> Self {
        let path = Self::default();
        path.state.set(outcome);
        path
    }

    /// True while answers to clients' addresses come here, if they come by this node at all.
    pub fn leads_here(&self) -> bool {
        self.state.leads_here()
    }

    /// Why they do not, in words with a remedy: what the kernel has refused. `None` where they do, or nobody has asked.
    pub fn refusal(&self) -> Option<String> {
        self.state.refusal().map(|error| format!("{error}: {}", remedy(error)))
    }

    /// Has it kept from now on. When this resolves it is there, or the kernel has refused.
    pub async fn require(&self) {
        self.ask(Order::Require).await;
    }

    /// No Service needs it, at the beginning: what the last run has left goes.
    pub fn clear(&self) {
        if let Some(orders) = &self.orders {
            let _ = orders.send(Order::Clear);
        }
    }

    /// To be called when another process has taken over connections and flows from clients' addresses: it has answers led here
    /// from now on, and may take that back.
    pub(crate) fn leave(&self) {
        if let Some(orders) = &self.orders {
            let _ = orders.send(Order::Leave);
        }
    }

    /// The end: what is to go with the process goes.
    pub async fn end(&self) {
        self.ask(Order::End).await;
    }

    async fn ask(&self, order: impl FnOnce(oneshot::Sender<()>) -> Order) {
        let (done, is_done) = oneshot::channel();
        if let Some(orders) = &self.orders {
            let _ = orders.send(order(done));
            let _ = is_done.await; // An error means that there is no task any more.
        }
    }
}

/// Takes away what leads answers here, of a relay with this number. False where there is none.
///
/// # Errors
/// Where this process may not; what it may remove is removed all the same.
pub fn remove(protocol: u8) -> io::Result<bool> {
    match Kernel::open(protocol, ReplyMark::DEFAULT)?.remove() {
        Err(Errno::PERM) if !is_there(protocol)? => Ok(false), // So much may be asked without any right.
        outcome => Ok(outcome?),
    }
}

/// True where rules lead to our table of routes.
fn is_there(protocol: u8) -> io::Result<bool> {
    let table = route_table(protocol);
    match routing_rules::look() {
        Err(error) if errno(&error) == Errno::OPNOTSUPP => Ok(false), // There are no rules here.
        rules => Ok(rules?.iter().any(|rule| rule.table == table)),
    }
}

/// The task. Owns its sockets by value.
struct Keeper {
    options: ReplyPathOptions,
    state: Arc<State>,
    is_required: bool,
    /// That nobody else takes it away; `None` where it is not required, or there is none left.
    seat: Option<Seat>,
    kernel: Option<Kernel>,
    news: Option<ReplyNews>,
    looked: Instant,
    check_due: Instant,
    /// What the log says already.
    told: Option<Result<(), Errno>>,
    /// When it said last that somebody has taken away what was there.
    told_of_others: Option<Instant>,
}

impl Keeper {
    fn new(options: ReplyPathOptions, state: Arc<State>) -> Self {
        let now = Instant::now();
        Self {
            options,
            state,
            is_required: false,
            seat: None,
            kernel: None,
            news: None,
            looked: now,
            check_due: now,
            told: None,
            told_of_others: None,
        }
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::Require(done)) => {
                        self.is_required = true;
                        self.mend().await;
                        let _ = done.send(()); // Who asked may have gone.
                    }
                    Some(Order::Clear) if !self.is_required => {
                        self.clear("the last run has led answers here: that is taken back").await;
                    }
                    Some(Order::Clear) => {}
                    Some(Order::Leave) => {
                        (self.is_required, self.seat) = (false, None);
                        self.options.removed_at_exit = false;
                    }
                    Some(Order::End(done)) => {
                        if self.options.removed_at_exit {
                            self.clear("answers to clients' addresses are led here no more").await;
                        }
                        let _ = done.send(());
                        return;
                    }
                    None => return,
                },
                () = sleep_until(self.check_due.into()), if self.is_required => self.mend().await,
                () = heard(self.news.as_ref()) => {
                    self.check_due = self.check_due.min(self.looked + SHORTEST_INTERVAL);
                }
                never = answer(self.seat.as_ref()) => match never {},
            }
        }
    }

    /// Makes what is missing.
    async fn mend(&mut self) {
        if self.news.is_none() {
            // Before the look: nothing that happens after it is missed. Who may not listen may not make it, either.
            self.news = ReplyNews::open().inspect_err(|error| tracing::debug!(%error, "rules change unheard")).ok();
        }
        local_ports::refresh();
        let outcome = self.try_mend();
        self.looked = Instant::now();
        if outcome.is_err_and(is_busy) {
            self.check_due = self.looked + BUSY_RETRY; // Until then it is taken for what it was.
        } else {
            self.state.set(outcome.map(|_| ()));
            self.check_due = self.looked + if outcome.is_ok() { CHECK_INTERVAL } else { RETRY };
            self.tell(outcome);
        }
        self.take_seat().await;
    }

    fn try_mend(&mut self) -> Result<bool, Errno> {
        let ReplyPathOptions { protocol, mark, .. } = self.options;
        let kernel = match &mut self.kernel {
            Some(kernel) => kernel,
            None => self.kernel.insert(Kernel::open(protocol, mark).map_err(|error| errno(&error))?),
        };
        let outcome = kernel.mend();
        if outcome.is_err() {
            self.kernel = None; // Its sockets may be what is wrong.
        }
        outcome
    }

    /// Tells of a change, and where somebody has taken away what was there.
    fn tell(&mut self, outcome: Result<bool, Errno>) {
        let now = outcome.map(|_| ());
        let before = self.told.replace(now);
        let by = filter_table(self.options.protocol);
        match outcome {
            Ok(true) if before == Some(Ok(())) => {
                let is_told = self.told_of_others.is_some_and(|told| self.looked < told + CHECK_INTERVAL);
                if !is_told {
                    self.told_of_others = Some(self.looked);
                    tracing::warn!(
                        by,
                        "somebody has changed how answers to clients' addresses come here: it is made again"
                    );
                }
            }
            _ if before == Some(now) => {}
            Ok(_) => {
                tracing::info!(by, "answers to clients' addresses are led here, as a Service wants them preserved")
            }
            Err(error) => {
                let remedy = remedy(error);
                tracing::warn!(%error, remedy, "clients' addresses cannot be preserved: backends see the node's");
            }
        }
    }

    /// Where there is none, it is tried again with the next look.
    async fn take_seat(&mut self) {
        if self.seat.is_none() {
            let (protocol, says) = (self.options.protocol, self.says());
            let taken = Seat::take(&name_of(protocol), protocol, &says).await;
            self.seat = taken.inspect_err(|error| tracing::debug!(%error, "others may take our answers away")).ok();
        }
    }

    async fn clear(&mut self, news: &str) {
        self.state.unmake();
        let (protocol, says) = (self.options.protocol, self.says());
        let _all = match take_all(&name_of(protocol), protocol, &says, self.seat.as_ref()).await {
            Ok(all) => all,
            Err(error) => return tracing::debug!(%error, "answers are led here for others, too"),
        };
        match remove(protocol) {
            Ok(true) => tracing::info!("{news}"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "what leads answers to clients' addresses here stays"),
        }
    }

    fn says(&self) -> String {
        format!("kube-relay with pid {}, for clients' addresses", std::process::id())
    }
}

/// What an operator can do where the kernel refuses.
fn remedy(error: Errno) -> &'static str {
    match error {
        Errno::PERM => "run it with CAP_NET_ADMIN",
        _ => "a kernel (5.10) with nf_tables, nft_socket and policy routing (CONFIG_IP_MULTIPLE_TABLES)",
    }
}

/// Waits until somebody has changed rules; for ever where nobody listens.
async fn heard(news: Option<&ReplyNews>) {
    match news {
        Some(news) => news.heard().await,
        None => pending().await,
    }
}

/// Tells everybody who asks whose seat it is.
async fn answer(seat: Option<&Seat>) -> Infallible {
    match seat {
        Some(seat) => seat.answer().await,
        None => pending().await,
    }
}

/// The sockets to the kernel. Each call is over in as long as that works: it answers before a call to send returns.
struct Kernel {
    protocol: u8,
    mark: ReplyMark,
    routes: Socket,
    /// Or why there is none: rules and routes are removed without it.
    filters: Result<GuardSocket, Errno>,
    /// The rules of nf_tables: the third one where the kernel has it, or was not asked yet.
    rules: Vec<Rule>,
    /// How often rules of nf_tables had changed, those of everybody, when ours were there; `None`: unknown.
    generation: Option<u32>,
    /// True once no rule leads to our table with another mark, as of a run before.
    is_alone: bool,
    /// Number of the next request.
    next: u32,
    buffer: Box<[u8]>,
}

impl Kernel {
    fn open(protocol: u8, mark: ReplyMark) -> io::Result<Self> {
        let mut routes = Socket::new(NETLINK_ROUTE)?;
        routes.bind(&SocketAddr::new(0, 0))?;
        routes.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            protocol,
            mark,
            routes,
            filters: GuardSocket::open_for(filter_table(protocol)).map_err(|error| errno(&error)),
            rules: rules(mark).into(),
            generation: None,
            is_alone: false,
            next: 1,
            buffer: vec![0; ANSWER].into(),
        })
    }

    /// Makes what is missing; true where something was. Marks come last: what is marked has a way then.
    fn mend(&mut self) -> Result<bool, Errno> {
        self.filters.as_ref().map_err(|error| *error)?; // Nothing can be marked: what leads by marks is for nobody.
        let mut was_missing = false;
        for family in Family::ALL {
            was_missing |= self.mend_way(family)?;
        }
        was_missing |= self.mend_marks()?;
        if !self.is_alone {
            self.remove_other_marks()?;
            self.is_alone = true;
        }
        Ok(was_missing)
    }

    /// The rule comes first. A kernel without policy routing refuses it, and takes a route of any table for one of the only
    /// table that it has: then everything would be delivered to this machine.
    fn mend_way(&mut self, family: Family) -> Result<bool, Errno> {
        let mut was_missing = false;
        for request in way(self.mark) {
            was_missing |= match self.ask(request, family) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(error) if is_missing_family(family, error) => return Ok(was_missing),
                Err(error) => return Err(error),
            };
        }
        Ok(was_missing)
    }

    fn mend_marks(&mut self) -> Result<bool, Errno> {
        let filters = self.filters.as_mut().map_err(|error| *error)?;
        let generation = filters.generation()?;
        if self.generation == Some(generation) {
            return Ok(false);
        }
        self.generation = None;
        let mut looks = (0..LOOKS).map(|_| filters.has(&self.rules));
        let is_there = looks.find(|look| !look.is_err_and(is_busy)).unwrap_or(Err(Errno::AGAIN))?;
        if !is_there {
            match filters.build_chains(&CHAINS, &self.rules) {
                Err(Errno::NOENT | Errno::OPNOTSUPP) if self.rules.len() == CHAINS.len() => {
                    self.rules = without_defragmentation(&self.rules).to_vec();
                    filters.build_chains(&CHAINS, &self.rules)?;
                    let remedy =
                        "a kernel with nft_tproxy; nothing where connections are tracked, as kube-proxy has it";
                    tracing::warn!(remedy, "answers over UDP that come in fragments may go to clients past this node");
                }
                outcome => outcome?,
            }
        }
        // Building is one change. Where somebody else made one meanwhile, this number comes up never, or not now.
        self.generation = Some(generation.wrapping_add(u32::from(!is_there)));
        Ok(!is_there)
    }

    /// Removes the rules by which a run before has led answers here, with another mark.
    fn remove_other_marks(&mut self) -> Result<(), Errno> {
        let table = route_table(self.protocol);
        for rule in routing_rules::look().map_err(|error| errno(&error))? {
            let is_ours = rule.table == table && rule.priority == RULE_PRIORITY;
            if let Some(mark) = rule.mark.filter(|mark| is_ours && *mark != self.mark) {
                match self.ask(Request::RemoveRule(Some(mark)), rule.family) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Removes the rules and routes of both families, and the marks. False where there was none. What can be removed is, also
    /// where something cannot: the first refusal is told. Until all has gone, what is marked waits.
    fn remove(&mut self) -> Result<bool, Errno> {
        let mut outcomes = Vec::new();
        for family in Family::ALL {
            outcomes.push(self.remove_rules(family));
            outcomes.push(self.remove_one(Request::RemoveRoute, family));
        }
        outcomes.push(self.remove_marks());
        outcomes.into_iter().try_fold(false, |was_there, outcome| Ok(was_there | outcome?))
    }

    /// One with each mark that there was.
    fn remove_rules(&mut self, family: Family) -> Result<bool, Errno> {
        let mut was_there = false;
        for _ in 0..MOST_RULES {
            if !self.remove_one(Request::RemoveRule(None), family)? {
                break;
            }
            was_there = true;
        }
        Ok(was_there)
    }

    fn remove_one(&mut self, request: Request, family: Family) -> Result<bool, Errno> {
        match self.ask(request, family) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT | Errno::SRCH | Errno::OPNOTSUPP) => Ok(false), // The last: without policy routing.
            Err(error) if is_missing_family(family, error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn remove_marks(&mut self) -> Result<bool, Errno> {
        let removed = self.filters.as_mut().map_err(|error| *error).and_then(GuardSocket::remove);
        match removed {
            Err(error) if is_absent(error) => Ok(false), // Without nf_tables there are none, or no more.
            outcome => outcome,
        }
    }

    fn ask(&mut self, request: Request, family: Family) -> Result<(), Errno> {
        let number = self.next;
        self.next = number.wrapping_add(1);
        let message = write(request, family, self.protocol, number);
        self.routes.send(&message, 0).map_err(|error| errno(&error))?;
        loop {
            let received = self.routes.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT);
            let length = received.map_err(|error| errno(&error))?.min(ANSWER);
            let mut answers = messages(&self.buffer[..length]);
            if let Some(answer) = answers.find(|answer| answer.sequence_number() == number) {
                return result(answer.payload());
            }
        }
    }
}

/// What leads a marked packet here, in the order in which it is made.
fn way(mark: ReplyMark) -> [Request; 2] {
    [Request::AddRule(mark), Request::AddRoute]
}

/// True where this machine does not speak IPv6, or is not to: then it has no clients, either. `ACCESS`: it is switched off on
/// loopback (`disable_ipv6`); who has no right is told `PERM`.
fn is_missing_family(family: Family, error: Errno) -> bool {
    let is_off = matches!(error, Errno::AFNOSUPPORT | Errno::OPNOTSUPP | Errno::ACCESS | Errno::NODEV);
    family == Family::V6 && is_off
}

/// True where others were changing rules meanwhile: that is no fault of the kernel.
fn is_busy(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno::INTR)
}

/// True where the kernel has no nf_tables.
fn is_absent(error: Errno) -> bool {
    matches!(error, Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT | Errno::OPNOTSUPP)
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number that nobody uses.
    const UNUSED: ReplyPathOptions =
        ReplyPathOptions { protocol: 254, mark: ReplyMark::DEFAULT, removed_at_exit: true };

    #[tokio::test]
    async fn given_nobody_who_requires_it_when_ended_then_nothing_was_changed() {
        let path = ReplyPath::start(UNUSED);

        path.clear();
        path.end().await;

        assert!(!path.leads_here());
    }

    #[tokio::test]
    async fn given_another_relay_that_needs_it_when_one_clears_then_it_stays_and_a_seat_is_taken_with_the_next_look() {
        let options = ReplyPathOptions { protocol: 253, ..UNUSED };
        let keeper = || Keeper::new(options, Arc::default());
        let (mut first, mut second) = (keeper(), keeper());
        first.take_seat().await;
        second.take_seat().await;
        assert!(first.seat.is_some() && second.seat.is_some(), "each needs it");

        let all = |ours: Option<Seat>| async move { take_all(&name_of(253), 253, "", ours.as_ref()).await.is_ok() };
        assert!(!all(first.seat.take()).await, "the second one does still");
        assert!(all(second.seat.take()).await);
    }

    #[test]
    fn given_a_kernel_that_may_have_no_policy_routing_when_a_way_is_made_then_its_rule_is_asked_for_before_its_route() {
        assert_eq!(way(ReplyMark::DEFAULT), [Request::AddRule(ReplyMark::DEFAULT), Request::AddRoute]);
    }

    #[test]
    fn given_nothing_when_removed_by_anybody_then_that_is_no_error() {
        match remove(252) {
            Ok(was_there) => assert!(!was_there),
            Err(error) => eprintln!("skipped, no rtnetlink here: {error}"),
        }
    }

    #[test]
    fn given_a_kernel_that_refuses_when_asked_then_it_is_told_why_until_answers_are_led_here_or_nobody_asks() {
        let path = ReplyPath::assumed(Err(Errno::PERM));
        assert!(!path.leads_here());
        assert!(path.refusal().is_some_and(|why| why.ends_with(": run it with CAP_NET_ADMIN")));

        path.state.set(Ok(()));
        assert!(path.leads_here() && path.refusal().is_none());

        path.state.unmake();
        assert!(!path.leads_here() && path.refusal().is_none());
    }

    #[test]
    fn given_a_machine_without_ipv6_when_the_kernel_says_so_then_ipv4_goes_on_and_a_missing_right_is_told() {
        assert!([Errno::AFNOSUPPORT, Errno::ACCESS].into_iter().all(|error| is_missing_family(Family::V6, error)));
        assert!(!is_missing_family(Family::V6, Errno::PERM) && !is_missing_family(Family::V4, Errno::ACCESS));
    }

    #[tokio::test]
    async fn given_no_task_when_required_then_nobody_is_waited_for_and_nothing_leads_here() {
        let none = ReplyPath::default();

        none.require().await;
        none.clear();
        none.end().await;

        assert!(!none.leads_here());
    }
}
