//! Keeps the way by which answers to clients' addresses come to this process: a table of nf_tables, and one rule and one
//! route of each family. What they are is in `reply_message`.
//!
//! They are there from the first moment that a Service asks for `kube-relay.dev/source-address: preserve` (so a relay without
//! such a Service changes nothing), and are looked at every [`CHECK_INTERVAL`], as others may flush what is not theirs.
//! Without a connection from a client's address they match nothing. They stay when the process ends, or is killed: the next
//! one finds them, and has them once and not twice. `cleanup` takes them away, and so does a relay that begins without such a
//! Service; one whose routes go at exit takes them along. None of these does where another relay with the same number leads
//! answers here: who needs them holds a claim, as with routes (`route_claim`).
//!
//! Where the kernel refuses, backends see the node's address: log and `status` say why, and each Service counts it
//! (`reply_path`).

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
use crate::name::Family;
use crate::reply_message::{CHAINS, Request, filter_table, rules, write};
use crate::route_claim::{Claim, name_of};
use crate::route_message::{messages, result};

/// How often it is looked at whether all is as we left it.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(4);
/// When it is tried again after it has failed.
const RETRY: Duration = Duration::from_secs(10);
/// The same, where the kernel was busy: others were changing what was looked at.
const BUSY_RETRY: Duration = Duration::from_secs(1);
/// How often that is looked at anew at once.
const LOOKS: usize = 5;
/// The longest answer of the kernel to what is asked here.
const ANSWER: usize = 4_096;

/// How answers are led here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyPathOptions {
    /// Number of our routes: the names of table and rules follow from it. From `--route-protocol`.
    pub protocol: u8,
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
/// Where this process may not.
pub fn remove(protocol: u8) -> io::Result<bool> {
    match Kernel::open(protocol).and_then(|mut kernel| Ok(kernel.remove()?)) {
        Err(error) if is_absent(errno(&error)) => Ok(false), // Without nf_tables, nothing was made.
        outcome => outcome,
    }
}

/// The task. Owns its sockets by value.
struct Keeper {
    options: ReplyPathOptions,
    state: Arc<State>,
    is_required: bool,
    /// That nobody else takes it away; `None` where it is not required, or another process has it.
    claim: Option<Claim>,
    kernel: Option<Kernel>,
    check_due: Instant,
    /// What the log says already.
    told: Option<Result<(), Errno>>,
}

impl Keeper {
    fn new(options: ReplyPathOptions, state: Arc<State>) -> Self {
        let check_due = Instant::now();
        Self { options, state, is_required: false, claim: None, kernel: None, check_due, told: None }
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::Require(done)) => {
                        self.is_required = true;
                        self.claim().await;
                        self.settle();
                        let _ = done.send(()); // Who asked may have gone.
                    }
                    Some(Order::Clear) if !self.is_required => {
                        self.clear("the last run has led answers here: that is taken back").await;
                        self.claim = None;
                    }
                    Some(Order::Clear) => {}
                    Some(Order::End(done)) => {
                        if self.options.removed_at_exit {
                            self.clear("answers to clients' addresses are led here no more").await;
                        }
                        let _ = done.send(());
                        return;
                    }
                    None => return,
                },
                () = sleep_until(self.check_due.into()), if self.is_required => self.settle(),
            }
        }
    }

    fn settle(&mut self) {
        let outcome = self.try_settle();
        if outcome.is_err_and(is_busy) {
            self.check_due = Instant::now() + BUSY_RETRY; // Until then it is taken for what it was.
            return;
        }
        self.state.set(outcome.map(|_| ()));
        self.check_due = Instant::now() + if outcome.is_ok() { CHECK_INTERVAL } else { RETRY };
        self.tell(outcome);
    }

    fn try_settle(&mut self) -> Result<bool, Errno> {
        let kernel = match &mut self.kernel {
            Some(kernel) => kernel,
            None => self.kernel.insert(Kernel::open(self.options.protocol).map_err(|error| errno(&error))?),
        };
        kernel.settle()
    }

    /// Tells of a change, and where somebody has taken away what was there.
    fn tell(&mut self, outcome: Result<bool, Errno>) {
        let now = outcome.map(|_| ());
        let before = self.told.replace(now);
        let by = filter_table(self.options.protocol);
        match outcome {
            Ok(true) if before == Some(Ok(())) => {
                tracing::warn!(by, "somebody has changed how answers to clients' addresses come here: it is made again")
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

    /// True where nobody else leads answers here by the same number.
    async fn claim(&mut self) -> bool {
        if self.claim.is_none() {
            let protocol = self.options.protocol;
            let says = format!("kube-relay with pid {}, for clients' addresses", std::process::id());
            let taken = Claim::take_named(&claim_name(&name_of(protocol)), protocol, says).await;
            self.claim = taken.inspect_err(|error| tracing::debug!(%error, "answers are led here by others, too")).ok();
        }
        self.claim.is_some()
    }

    async fn clear(&mut self, news: &str) {
        self.state.unmake();
        if !self.claim().await {
            return; // Another process needs it.
        }
        match remove(self.options.protocol) {
            Ok(true) => tracing::info!("{news}"),
            Ok(false) => {}
            // Who may not remove it could not have made it.
            Err(error) => tracing::debug!(%error, "nothing led answers here, or it is not ours to remove"),
        }
    }
}

/// What an operator can do where the kernel refuses.
fn remedy(error: Errno) -> &'static str {
    match error {
        Errno::PERM => "run it with CAP_NET_ADMIN",
        _ => "a kernel (5.10) with nf_tables, nft_socket and policy routing (CONFIG_IP_MULTIPLE_TABLES)",
    }
}

/// The name of the claim to what leads answers here, beside that to routes.
pub(crate) fn claim_name(of_routes: &str) -> String {
    format!("{of_routes}/replies")
}

/// The sockets to the kernel. Each call is over in as long as that works: it answers before a call to send returns.
struct Kernel {
    protocol: u8,
    routes: Socket,
    filters: GuardSocket,
    rules: [Rule; 2],
    /// How often rules of nf_tables had changed, those of everybody, when ours were there; `None`: unknown.
    generation: Option<u32>,
    /// Number of the next request.
    next: u32,
    buffer: Box<[u8]>,
}

impl Kernel {
    fn open(protocol: u8) -> io::Result<Self> {
        let mut routes = Socket::new(NETLINK_ROUTE)?;
        routes.bind(&SocketAddr::new(0, 0))?;
        routes.connect(&SocketAddr::new(0, 0))?;
        let filters = GuardSocket::open_for(filter_table(protocol))?;
        let (rules, buffer) = (rules(), vec![0; ANSWER].into());
        Ok(Self { protocol, routes, filters, rules, generation: None, next: 1, buffer })
    }

    /// Makes what is missing; true where something was. Marks come last: what is marked has a way then.
    fn settle(&mut self) -> Result<bool, Errno> {
        let mut was_missing = false;
        for family in Family::ALL {
            for request in [Request::AddRoute, Request::AddRule] {
                was_missing |= match self.ask(request, family) {
                    Ok(()) => true,
                    Err(Errno::EXIST) => false,
                    Err(error) if is_missing_family(family, error) => false,
                    Err(error) => return Err(error),
                };
            }
        }
        Ok(self.settle_marks()? | was_missing)
    }

    fn settle_marks(&mut self) -> Result<bool, Errno> {
        let generation = self.filters.generation()?;
        if self.generation == Some(generation) {
            return Ok(false);
        }
        self.generation = None;
        let mut looks = (0..LOOKS).map(|_| self.filters.has(&self.rules));
        let is_there = looks.find(|look| !look.is_err_and(is_busy)).unwrap_or(Err(Errno::AGAIN))?;
        if !is_there {
            self.filters.build_chains(&CHAINS, &self.rules)?;
        }
        // Building is one change. Where somebody else made one meanwhile, this number comes up never, or not now.
        self.generation = Some(generation.wrapping_add(u32::from(!is_there)));
        Ok(!is_there)
    }

    /// Removes the marks, and the rules and routes of both families. False where there was none.
    fn remove(&mut self) -> Result<bool, Errno> {
        let mut was_there = self.filters.remove()?;
        for family in Family::ALL {
            for request in [Request::RemoveRule, Request::RemoveRoute] {
                was_there |= match self.ask(request, family) {
                    Ok(()) => true,
                    Err(Errno::NOENT | Errno::SRCH) => false,
                    Err(error) if is_missing_family(family, error) => false,
                    Err(error) => return Err(error),
                };
            }
        }
        Ok(was_there)
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
    const UNUSED: ReplyPathOptions = ReplyPathOptions { protocol: 254, removed_at_exit: true };

    #[tokio::test]
    async fn given_nobody_who_requires_it_when_ended_then_nothing_was_changed() {
        let path = ReplyPath::start(UNUSED);

        path.clear();
        path.end().await;

        assert!(!path.leads_here());
    }

    #[tokio::test]
    async fn given_another_relay_that_needs_it_when_one_clears_or_ends_then_it_has_no_claim_to_do_so() {
        let options = ReplyPathOptions { protocol: 253, removed_at_exit: true };
        let mut other = Keeper::new(options, Arc::default());
        let mut keeper = Keeper::new(options, Arc::default());
        assert!(other.claim().await && other.claim().await, "the first, and it keeps that");

        assert!(!keeper.claim().await);
        drop(other);
        assert!(keeper.claim().await);
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
