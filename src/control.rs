//! The one owner of model, plan and listeners: events in, steps out, snapshots for everybody else.
//!
//! What the steps do to sockets is in `serve`; where events come from is in the sources (`manifest`).

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use crate::apply_stats::APPLIED;
use crate::contact::Contact;
use crate::fd_store::FdStore;
use crate::frozen::pack;
use crate::given::Given;
use crate::guard::{Guard, VipGuard};
use crate::handover::giving::{Ask, Handing, Lent};
use crate::handover::importer::{Committed, Importer, TakenOver};
use crate::handover::late::LateCounts;
use crate::handover::source::{SourceCounts, SourceSaid};
use crate::handover::taking::{Predecessor, Taken};
use crate::handover::{Handed, Host, Office, TakeError, TakeOver};
use crate::headroom;
use crate::health::Health;
use crate::healthcheck::{Change, HealthPortError, HealthPorts};
use crate::journal::{self, Moves};
use crate::lifecycle::Drainable;
use crate::model::{Event, Model, ServicePort};
use crate::name::{BalancerKey, Family, ObjectName};
use crate::plan::{Plan, PlanOptions, Problem, ServicePlan, Step};
use crate::recent;
use crate::rejections::Rejections;
use crate::remedy::{BindFailure, explain, remedy};
use crate::reply_path::{ReplyPath, ReplyPathOptions};
use crate::serve::Listeners;
use crate::serve::access::AccessTap;
use crate::serve::estate::Estate;
use crate::serve::fresh::Fresh;
use crate::serve::listeners::{BindError, Inherited};
use crate::serve::passed::{Passed, WantedSockets};
use crate::serve::tcp::{TcpOptions, TcpShared};
use crate::serve::udp::{UdpOptions, UdpShards};
use crate::stats::{PROCESS, UpgradeResult};
use crate::status::{ListenerState, PortCounters, ServiceStatus, SourceStatus, Status, UpgradeStatus};
use crate::timestamp::rfc3339;
use crate::vips::{VipOptions, Vips};

/// Messages that wait for the control task; a source that is faster waits.
const QUEUE: usize = 1024;
/// Events that arrive within this time of the last change are taken together at its end, or before if no more come. The
/// first one after quiet waits for nothing.
const BATCH_WINDOW: Duration = Duration::from_millis(20);
/// After so long without another event a window closes before its time: what came together is there. The clock of the
/// runtime counts whole milliseconds; one would often be none.
const BATCH_GAP: Duration = Duration::from_millis(2);
/// What the gap is at least, in times that the last batch took: events that come one by one, a gap between them, leave four
/// fifths of a processor to others.
const BATCH_REST: u32 = 4;
/// Failed listeners that are logged one by one when many fail at once.
const TOLD_AT_ONCE: usize = 10;

/// What a source tells the control task.
#[derive(Debug)]
pub enum Message {
    /// Objects changed.
    Event(Event),
    /// The first complete state has been sent: act on it.
    Synced,
    /// When changes had come about that were sent just before: the time since then is measured once they are carried out.
    Triggered(Vec<SystemTime>),
    /// This node is at another place in the cluster than was known.
    Setting(Box<Setting>),
    /// How the source does, and all that is wrong with its input now (replaces what it said before).
    Source {
        /// Its state.
        status: SourceStatus,
        /// Broken files, wrong fields, passed-over kinds.
        problems: Vec<Problem>,
    },
}

/// Where a relay is: what its cluster may change while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// What shapes the plan.
    pub plan: PlanOptions,
    /// What counts as this node and its pods.
    pub inside: Vec<IpNet>,
    /// The addresses that this machine has: as one comes, listeners that failed for want of it are tried at once.
    pub local: BTreeSet<IpAddr>,
}

/// Everything that a relay wants to know at its start.
#[derive(Clone, Debug, Default)]
pub struct RelayOptions {
    /// What shapes the plan.
    pub plan: PlanOptions,
    /// What counts as this node and its pods: own addresses and `--cluster-cidr`.
    pub inside: Vec<IpNet>,
    /// For connections.
    pub tcp: TcpOptions,
    /// For datagrams.
    pub udp: UdpOptions,
    /// Threads that relay datagrams. From `--workers`; default: the CPUs that this process may use.
    pub udp_shards: Option<NonZeroUsize>,
    /// True where a source is to tell whether the node may get traffic: until it does, load balancers are told no.
    pub awaits_node: bool,
    /// How addresses of Services are made local; `None`: others do that. From `--vip-routes`.
    pub vips: Option<VipOptions>,
    /// What keeps sockets of all addresses from answering there. From `--vip-guard`.
    pub vip_guard: VipGuard,
    /// How answers to clients' addresses are led here, where a Service wants these preserved; `None`: they are not.
    pub reply_path: Option<ReplyPathOptions>,
    /// Told of each connection's and flow's end; `None`: nobody is. From [`AccessLog::tap`](crate::access_log::AccessLog::tap).
    pub access_log: Option<AccessTap>,
}

/// A running relay: sources send it messages, everybody may read its status. Dropping it ends its control task.
#[derive(Debug)]
pub struct Relay {
    messages: mpsc::Sender<Message>,
    orders: mpsc::Sender<Order>,
    status: watch::Receiver<Arc<Status>>,
    health: Health,
    tcp: Arc<TcpShared>,
    contact: Arc<Contact>,
    vips: Vips,
    guard: Guard,
    reply_path: ReplyPath,
    /// Looks how many connections and flows there is room for.
    _headroom: AbortOnDropHandle<()>,
}

/// What the process asks of the control task.
#[derive(Debug)]
enum Order {
    StopAccepting(oneshot::Sender<()>),
    OfSuccession(Ask),
}

/// That the first state is to be served in the place of another process.
#[derive(Debug)]
struct Succession {
    take_over: TakeOver,
    /// What comes of it.
    tell: oneshot::Sender<Result<Office, TakeError>>,
}

impl Relay {
    /// Starts the data plane on threads of its own, and the control task on the current tokio runtime. Nothing listens
    /// before [`Message::Synced`].
    ///
    /// # Errors
    /// Where the kernel refuses what every relay needs: descriptors, threads.
    pub fn start(options: RelayOptions) -> io::Result<Self> {
        Self::start_as(options, None, Given::default())
    }

    /// The same, on sockets that were open before this process, as far as they are of use.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_given(options: RelayOptions, given: Given) -> io::Result<Self> {
        Self::start_as(options, None, given)
    }

    /// The same, in the place of another process: once there is a first state, what that one serves with is taken over, and
    /// nothing listens before. Where nobody is there, it starts as ever. What becomes of it is told; after an error the
    /// control task has ended, and the other process serves as before.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_taking_over(
        options: RelayOptions,
        take_over: TakeOver,
        given: Given,
    ) -> io::Result<(Self, oneshot::Receiver<Result<Office, TakeError>>)> {
        let (tell, told) = oneshot::channel();
        Ok((Self::start_as(options, Some(Succession { take_over, tell }), given)?, told))
    }

    fn start_as(options: RelayOptions, succession: Option<Succession>, given: Given) -> io::Result<Self> {
        let (messages, inbox) = mpsc::channel(QUEUE);
        let (orders, order_inbox) = mpsc::channel(1); // Nobody gives one before the last is carried out.
        let contact = Arc::new(Contact::default());
        let first = Status {
            contact: Arc::clone(&contact),
            inside: options.inside.as_slice().into(),
            options: Arc::new(options.plan.clone()),
            ..Status::default()
        };
        let (publish, status) = watch::channel(Arc::new(first.clone()));
        let tcp = Arc::new(TcpShared::new(options.tcp)?.with_access_log(options.access_log.clone()));
        let shards = options.udp_shards.or_else(|| available_parallelism().ok()).map_or(1, NonZeroUsize::get);
        let udp = UdpShards::start_with_access_log(shards, options.udp, options.access_log)?;
        let headroom = headroom::follow(Arc::clone(&tcp), udp.gate(), udp.flow_limit());
        let health = Health::new(Instant::now());
        health.set_node_eligible(!options.awaits_node); // Before anybody can ask.
        // Before there are routes: it follows them.
        let guard =
            options.vips.as_ref().map(|vips| Guard::start(options.vip_guard, vips.protocol)).unwrap_or_default();
        let vips = options.vips.map(Vips::start).unwrap_or_default();
        let reply_path = options.reply_path.map(ReplyPath::start).unwrap_or_default();
        let listeners = Listeners::new(options.inside.into(), Arc::clone(&tcp), udp)
            .with_vips(vips.clone())
            .with_reply_path(reply_path.clone())
            .with_store(FdStore::start(given.room)?);
        let control = Control {
            options: options.plan,
            health: health.clone(),
            model: Model::default(),
            plan: Plan::default(),
            health_ports: HealthPorts::start(health.clone())?,
            listeners,
            dirty: BTreeSet::new(),
            source_problems: Vec::new(),
            refused: Rejections::default(),
            source_rejections: Rejections::default(),
            rejected_before: None,
            begins_with_saved: false,
            has_handed_over: false,
            synced: false,
            inside_moved: false,
            local: BTreeSet::new(),
            triggers: Vec::new(),
            measured_before: SystemTime::UNIX_EPOCH,
            measured_until: SystemTime::UNIX_EPOCH,
            news: false,
            status: first,
            publish,
            given,
            succession,
            has_ended: false,
        };
        tokio::spawn(control.run(inbox, order_inbox));
        Ok(Self { messages, orders, status, health, tcp, contact, vips, guard, reply_path, _headroom: headroom })
    }

    /// Where an API source says how it does; it is in each snapshot, too.
    pub fn contact(&self) -> Arc<Contact> {
        Arc::clone(&self.contact)
    }

    /// Where sources send to.
    pub fn messages(&self) -> mpsc::Sender<Message> {
        self.messages.clone()
    }

    /// Snapshots after each change.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.clone()
    }

    /// How it keeps up, and where a source tells whether the node may get traffic.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Resolves when the control task has ended before its time, by a panic: all listeners are closed.
    pub async fn ended(&self) {
        let mut status = self.status.clone();
        while status.changed().await.is_ok() {}
    }

    /// Answers those who ask for a hand-over. Resolves when everything has been handed over: then nothing listens here any
    /// more, and what is open goes on.
    ///
    /// # Errors
    /// No thread is left.
    pub fn attend(&self, host: Host) -> io::Result<oneshot::Receiver<Handed>> {
        let orders = self.orders.clone();
        host.attend(move |ask| orders.blocking_send(Order::OfSuccession(ask)).is_ok())
    }

    /// Waits until the open connections have ended, however long that takes.
    pub async fn drained(&self) {
        self.tcp.drained().await;
    }

    /// Closes all listeners for good. Open connections go on and changes are still followed; flows end. A second call
    /// changes nothing.
    pub async fn stop_accepting(&self) {
        let (done, closed) = oneshot::channel();
        if self.orders.send(Order::StopAccepting(done)).await.is_ok() {
            let _ = closed.await; // An error means that control is gone, and its listeners with it.
        }
    }

    /// Waits until the open connections have ended, for at most `timeout`; resets the rest and returns how many that were.
    pub async fn drain(&self, timeout: Duration) -> usize {
        if tokio::time::timeout(timeout, self.tcp.drained()).await.is_ok() {
            return 0;
        }
        let cut = self.tcp.open_connections();
        self.tcp.abort_connections();
        self.tcp.drained().await;
        cut
    }

    /// Connections that are open now.
    pub fn open_connections(&self) -> usize {
        self.tcp.open_connections()
    }

    /// To be called once another process has all that this one served with: it guards addresses, too.
    pub async fn leave_guard(&self) {
        self.guard.end().await;
    }

    /// The last thing to be called, after [`drain`](Self::drain): removes the routes to addresses of Services, where they
    /// are to go at exit, and with them their guard and what leads answers to clients' addresses here.
    pub async fn leave_addresses(&self) {
        self.vips.end().await;
        self.guard.end().await;
        self.reply_path.end().await;
    }
}

impl Drainable for Relay {
    fn leave(&self) {
        self.health.leave();
    }

    async fn stop_accepting(&self) {
        self.stop_accepting().await;
    }

    async fn drain(&self, timeout: Duration) -> usize {
        self.drain(timeout).await
    }

    fn open_connections(&self) -> usize {
        self.open_connections()
    }
}

/// For how long events are gathered into one batch.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// It is shut then, whatever comes.
    ends: Instant,
    /// And after so long without an event.
    gap: Duration,
}

impl Window {
    /// Nothing is gathered: what is there is a batch.
    fn shut(now: Instant) -> Self {
        Self { ends: now, gap: Duration::ZERO }
    }

    /// The one that follows a batch which took so long.
    fn after(took: Duration, now: Instant) -> Self {
        Self { ends: now + BATCH_WINDOW, gap: took.saturating_mul(BATCH_REST).clamp(BATCH_GAP, BATCH_WINDOW) }
    }

    /// When it closes if nothing comes from now on.
    fn closes(self, now: Instant) -> Instant {
        self.ends.min(now + self.gap)
    }
}

/// The state of the control task, owned by value.
struct Control {
    options: PlanOptions,
    /// Told before and after all work. One plan serves both families: they are late together.
    health: Health,
    model: Model,
    plan: Plan,
    listeners: Listeners,
    health_ports: HealthPorts,
    dirty: BTreeSet<ObjectName>,
    source_problems: Vec<Problem>,
    /// What could be read and not be served, since the start; the source counts the rest. And what a process before
    /// this one has counted that is rejected no more.
    refused: Rejections,
    /// What the source counts of it.
    source_rejections: Rejections,
    /// What was rejected in the process before this one; `None` where there was none, and once it is counted.
    rejected_before: Option<Rejections>,
    /// True where this process took over while its source had been read from a file only.
    begins_with_saved: bool,
    /// True once another process serves: it follows what changes.
    has_handed_over: bool,
    /// True once the source has delivered its first complete state. The snapshot says so after the steps of that state.
    synced: bool,
    /// True where another set of addresses counts as inside than the listeners were told.
    inside_moved: bool,
    /// The addresses of this machine, as far as they were told since the start.
    local: BTreeSet<IpAddr>,
    /// When changes of this batch had come about.
    triggers: Vec<SystemTime>,
    /// What came about later than this was not measured by the process before this one, and is here. Two kinds are in
    /// neither, as nobody knows whose they are: what has an older stamp than something that the other one had heard of
    /// first, and what it had not heard of though it came about before this process has begun to follow the API server.
    measured_before: SystemTime,
    /// When the last change had come about that was measured.
    measured_until: SystemTime,
    /// True where the source has said something that is not in the last snapshot.
    news: bool,
    /// The next snapshot.
    status: Status,
    publish: watch::Sender<Arc<Status>>,
    /// Sockets that were open before this process; empty once the first state is served.
    given: Given,
    /// `Some` until the first state is served.
    succession: Option<Succession>,
    /// True where another process serves, as nothing could be taken over from it.
    has_ended: bool,
}

impl Control {
    /// Until the relay is dropped. Retries come before events, as a flood of these must not keep a freed port waiting;
    /// they are due twice a second at most.
    async fn run(mut self, mut inbox: mpsc::Receiver<Message>, mut orders: mpsc::Receiver<Order>) {
        let mut window = Window::shut(Instant::now());
        loop {
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::StopAccepting(done)) => {
                        self.stop_accepting().await;
                        let _ = done.send(()); // the asker may have been cancelled
                    }
                    Some(Order::OfSuccession(Ask::Lend(handing))) => self.hand_over(handing).await,
                    Some(Order::OfSuccession(Ask::Count(late))) => self.count(late),
                    None => return,
                },
                () = at(self.next_retry()) => self.retry().await,
                message = inbox.recv() => {
                    let Some(message) = message else { return };
                    if self.has_handed_over {
                        continue; // Whoever serves hears it, too, and counts it.
                    }
                    self.health.queued(&Family::ALL, Instant::now());
                    self.take(message);
                    self.take_batch(&mut inbox, window).await;
                    let began = Instant::now();
                    if self.settle().await {
                        let now = Instant::now();
                        self.health.updated(&Family::ALL, now);
                        window = Window::after(now - began, now);
                    } else {
                        self.health.idle(&Family::ALL);
                    }
                    if self.has_ended {
                        return;
                    }
                }
            }
        }
    }

    /// Lends the sockets to another process, and stands still until it is known whose they are. Where listeners are closed
    /// already, as this process is about to end, what is open may still go on there.
    async fn hand_over(&mut self, Handing { lent, end }: Handing) {
        let all = match self.synced {
            true => self.lend().await,
            false => Err(io::Error::other("it does not serve yet")),
        };
        if lent.send(all).is_err() {
            return;
        }
        let Ok(done) = end.await else { return }; // All goes on as before.
        self.has_handed_over = true;
        self.listeners.leave_addresses().await;
        self.stop_accepting().await;
        let _ = done.send(()); // Whoever waits for it goes on without, too.
    }

    /// Counts what another process has counted since it was taken over from.
    fn count(&mut self, late: LateCounts) {
        let now = Instant::now().into_std();
        let departed = late.commit(&self.listeners.estate(), &self.status.contact, now);
        if departed.is_empty() {
            return; // Whoever reads the counters reads these.
        }
        self.listeners.inherit(&departed, now);
        for port in departed.keys() {
            // One that has not been described yet will be.
            let told = self.status.services.contains_key(&port.service).then(|| self.service_status(&port.service));
            if let Some(told) = told.flatten() {
                self.status.services.insert(port.service.clone(), Arc::new(told));
            }
        }
        self.publish();
    }

    async fn lend(&self) -> io::Result<Lent> {
        let (passed, health_ports) = (self.listeners.lend().await?, self.health_ports.lend().await?);
        let (contact, rejections) = (Arc::clone(&self.status.contact), self.status.source.rejections.clone());
        let source = SourceCounts { contact, rejections, measured_until: self.measured_until };
        Ok(Lent { passed, health_ports, estate: self.listeners.estate(), source })
    }

    async fn stop_accepting(&mut self) {
        self.health_ports.close().await;
        self.listeners.close().await;
        self.status.stopping = true;
        self.describe_failures();
        self.publish();
    }

    fn next_retry(&self) -> Option<Instant> {
        let listeners = self.listeners.next_retry().map(Instant::from_std);
        listeners.into_iter().chain(self.health_ports.next_retry()).min()
    }

    async fn retry(&mut self) {
        self.health.queued(&Family::ALL, Instant::now());
        self.listeners.retry(Instant::now().into_std()).await;
        self.health_ports.retry(Instant::now()).await;
        self.health.idle(&Family::ALL);
        if self.describe_failures() {
            self.publish();
        }
    }

    /// Takes what comes until the window closes, and then what is waiting.
    async fn take_batch(&mut self, inbox: &mut mpsc::Receiver<Message>, window: Window) {
        while let Ok(Some(message)) = timeout_at(window.closes(Instant::now()), inbox.recv()).await {
            self.take(message);
        }
        for _ in 0..QUEUE {
            let Ok(message) = inbox.try_recv() else { return };
            self.take(message);
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Event(event) => {
                APPLIED.queue(&event, SystemTime::now());
                self.model.apply(event, &mut self.dirty);
            }
            Message::Synced => self.synced = true,
            Message::Setting(setting) => self.set(*setting),
            Message::Triggered(triggers) => self.triggers.extend(triggers),
            Message::Source { status, problems } => {
                self.source_rejections = status.rejections.clone();
                self.status.source = status;
                self.source_problems = problems;
                self.news = true;
            }
        }
    }

    /// Plans all anew where that may make a difference. Open connections go on as they are.
    fn set(&mut self, setting: Setting) {
        if setting.plan != self.options {
            journal::tell_node_port_addresses(&self.options.node_port_addresses, &setting.plan.node_port_addresses);
            self.status.options = Arc::new(setting.plan.clone());
            self.options = setting.plan;
            self.dirty.extend(self.model.services().map(|service| service.name.clone()));
        }
        self.status.inside = setting.inside.into();
        self.inside_moved |= self.listeners.set_inside(Arc::clone(&self.status.inside));
        self.hasten(setting.local);
    }

    /// What failed for want of an address that is there now does not wait for its turn.
    fn hasten(&mut self, local: BTreeSet<IpAddr>) {
        let came: BTreeSet<IpAddr> = local.difference(&self.local).copied().collect();
        self.local = local;
        if !came.is_empty() {
            let now = Instant::now();
            self.listeners.hasten(&came, now.into_std());
            self.health_ports.hasten(&came, now);
        }
    }

    /// Makes the dirty Services true and tells everybody. True where there were any.
    async fn settle(&mut self) -> bool {
        let acts = self.synced && (!self.dirty.is_empty() || self.inside_moved || !self.status.synced);
        let mut taken = None;
        if acts {
            let (succession, given) = (self.succession.take(), self.take_given());
            if succession.is_some() || !given.is_empty() {
                self.listeners.hold_back();
            }
            self.carry_out().await;
            match succession {
                Some(Succession { take_over, tell }) => match self.succeed(take_over, given).await {
                    Ok(office) => taken = Some((tell, office)),
                    Err(error) => {
                        let _ = error.map(|error| tell.send(Err(error))); // Who waits for it ends the process.
                        self.has_ended = true;
                        return false;
                    }
                },
                None if !given.is_empty() => self.begin_given(given).await,
                None => {}
            }
            self.describe_failures();
            self.describe();
            if !std::mem::replace(&mut self.status.synced, true) {
                self.listeners.all_required();
                self.listeners.tell_of_kept();
            }
            self.status.revision += 1;
        }
        if self.synced {
            APPLIED.settle();
        }
        if acts || self.news {
            self.news = false;
            self.publish();
        }
        if let Some((tell, office)) = taken {
            // Not before: whoever asks this process for its counters from now on finds those of the last one among them.
            let _ = tell.send(Ok(office));
        }
        self.measure(SystemTime::now());
        acts
    }

    /// How long the changes took that are carried out by now. A time to come is another clock's: it says nothing.
    fn measure(&mut self, now: SystemTime) {
        let before = self.measured_before;
        for trigger in self.triggers.drain(..).filter(|trigger| *trigger > before) {
            let Ok(took) = now.duration_since(trigger) else { continue };
            PROCESS.network_programming.observe(took);
            self.measured_until = self.measured_until.max(trigger);
        }
    }

    async fn carry_out(&mut self) {
        let dirty = std::mem::take(&mut self.dirty);
        let began = Instant::now();
        let mut steps = self.plan.update(&self.model, &dirty, &self.options);
        if std::mem::take(&mut self.inside_moved) {
            steps.extend(self.plan.points_of_two_sides());
        }
        let (services, step_count, moves) = (dirty.len(), steps.len(), Moves::of(&steps));
        let swaps = steps.iter().filter(|step| matches!(step, Step::Swap(..))).count();
        let routine = swaps == steps.len();
        let health_ports = self.changes_of_health_ports();
        self.health_ports.release(&health_ports).await; // A listener may be about to have the address.
        self.listeners.apply(steps, began.into_std()).await;
        self.health_ports.open(health_ports, began).await;
        moves.tell(|key| self.listeners.owner(key).is_some());
        APPLIED.apply(swaps, began.elapsed(), SystemTime::now());
        let (listeners, elapsed_ms) = (self.listeners.bound_count(), began.elapsed().as_millis() as u64);
        // Endpoints come and go all day. That listeners do is worth a line.
        if routine {
            tracing::debug!(services, steps = step_count, listeners, elapsed_ms, "tables swapped");
        } else {
            tracing::info!(services, steps = step_count, listeners, elapsed_ms, "applied");
        }
    }

    /// Serves the first state with what another process has served with until now.
    ///
    /// # Errors
    /// That one goes on: nothing was given, or (without a reason) a thread has panicked.
    async fn succeed(&mut self, take_over: TakeOver, given: Vec<Passed>) -> Result<Office, Option<TakeError>> {
        let (began, asked_at) = (Instant::now(), SystemTime::now());
        let (wanted, estate) = (self.listeners.wanted(), self.listeners.estate());
        let taken = take_all(take_over, wanted, estate).await?;
        let Taken { mut office, fresh, listeners, health_ports, source, moving, from } = taken;
        let fresh = fresh.unwrap_or_default();
        let Some(from) = from.map(Arc::new) else {
            self.begin_given(given).await; // Nobody was there, and so there is nothing else.
            return Ok(office);
        };
        // At once: nothing of it moves in the other process any more, whether that looks away from listeners or not yet.
        let committed = moving.map(Importer::commit).unwrap_or_default();
        self.measured_before = source.measured_until().unwrap_or(asked_at);
        self.measured_until = self.measured_before;
        let SourceSaid { api, rejections, .. } = source;
        api.add_to(&*self.status.contact);
        self.rejected_before = Some(rejections);
        self.begins_with_saved = self.status.contact.serves_saved();
        await_release(&from).await;
        // Of one that is there twice, what the other process has served on until now is the one that counts: the last.
        let listeners = given.into_iter().chain(listeners).collect();
        let (inherited, moved) = self.begin_taken(listeners, &fresh, committed).await;
        self.health_ports.inherit(health_ports, &fresh, Instant::now()).await;
        self.open_the_rest(&from).await;
        self.tell_of_upgrade(&from, inherited, moved, began.elapsed());
        office.owe_word_to(from);
        Ok(office)
    }

    /// The sockets that were open before this process. What else came with them is not to be kept any more.
    fn take_given(&mut self) -> Vec<Passed> {
        let Given { sockets, other_names, strays, .. } = std::mem::take(&mut self.given);
        if !strays.is_empty() {
            let names = strays.iter().map(|name| name.escape_debug().to_string()).collect::<Vec<_>>().join(", ");
            tracing::warn!(names, "descriptors were passed to this process that no listener could have: closed");
        }
        other_names.into_iter().for_each(|name| self.listeners.forget_kept(name));
        sockets
    }

    /// Serves the first state, where it can on sockets that were open before this process: who waits there is served.
    async fn begin_given(&mut self, given: Vec<Passed>) {
        let (is_news, now) = (!given.is_empty(), Instant::now().into_std());
        let fresh = if is_news { fresh_or_usual() } else { Fresh::default() };
        let Inherited { adopted, differing, unwanted } = self.listeners.begin(given, &fresh, now).await;
        if is_news {
            let (listeners, elapsed_ms) = (self.listeners.bound_count(), now.elapsed().as_millis() as u64);
            tracing::info!(
                listeners,
                adopted,
                differing,
                unwanted,
                elapsed_ms,
                "sockets that were kept are served again"
            );
        }
    }

    fn tell_of_upgrade(
        &mut self,
        from: &Predecessor,
        Inherited { adopted, differing, unwanted }: Inherited,
        TakenOver { streams, flows, standstill }: TakenOver,
        took: Duration,
    ) {
        PROCESS.upgrades.count(UpgradeResult::Success);
        PROCESS.standstill.observe(standstill);
        let (standstill_ms, elapsed_ms) = (standstill.as_millis() as u64, took.as_millis() as u64);
        let listeners = self.listeners.bound_count();
        let (from_pid, from_version) = (from.pid, from.version.clone());
        tracing::info!(
            from_pid,
            from_version,
            listeners,
            adopted,
            differing,
            unwanted,
            streams,
            flows,
            standstill_ms,
            elapsed_ms,
            "taken over"
        );
        let at = rfc3339(SystemTime::now());
        self.status.upgrade = Some(Arc::new(UpgradeStatus {
            at,
            from_pid,
            from_version,
            listeners: adopted,
            streams,
            flows,
            standstill_ms,
            elapsed_ms,
        }));
    }

    /// Connections and flows go on already: a listener that lets clients in finds counters, pins and turns as they were.
    async fn begin_taken(
        &mut self,
        listeners: Vec<Passed>,
        fresh: &Fresh,
        committed: Committed,
    ) -> (Inherited, TakenOver) {
        let now = Instant::now().into_std();
        self.listeners.inherit(committed.departed(), now);
        let inherited = self.listeners.begin(listeners, fresh, now).await;
        let finished = spawn_blocking(move || committed.finish()).await;
        (inherited, finished.unwrap_or_default()) // It panics nowhere; what it counts is for the log.
    }

    /// Opens what the other process has held until now, and could not be taken over.
    async fn open_the_rest(&mut self, from: &Arc<Predecessor>) {
        if self.next_retry().is_none() {
            return;
        }
        let from = Arc::clone(from);
        if !spawn_blocking(move || from.closed()).await.unwrap_or(false) {
            tracing::warn!("the process that was taken over from does not say that it has closed its listeners");
        }
        let now = Instant::now();
        self.listeners.hasten_all(now.into_std());
        self.health_ports.hasten_all(now);
        self.listeners.retry(now.into_std()).await;
        self.health_ports.retry(now).await;
    }

    /// What the Services that were planned anew are to have.
    fn changes_of_health_ports(&self) -> Vec<Change> {
        let wanted = |name: &ObjectName| self.plan.service(name).and_then(|plan| plan.open_health_port()).cloned();
        let all = self.plan.touched().iter().map(|name| (name.clone(), wanted(name)));
        all.filter(|(name, wanted)| wanted.is_some() || self.health_ports.knows(name)).collect()
    }

    /// Renews the snapshot's entries of Services that changed, and notes how; the first state is no change.
    fn describe(&mut self) {
        let at = rfc3339(SystemTime::now());
        for name in self.plan.touched() {
            if self.status.synced {
                let before = self.status.services.get(name).map(|told| &*told.plan);
                let news = recent::news(before, self.plan.service(name).map(AsRef::as_ref));
                if !news.is_empty() {
                    Arc::make_mut(&mut self.status.recent).add(&at, name, news);
                }
            }
            match self.service_status(name) {
                Some(told) => drop(self.status.services.insert(name.clone(), Arc::new(told))),
                None => drop(self.status.services.remove(name)),
            }
        }
        if self.plan.touched().len() > self.status.services.len() / 2 {
            pack(&mut self.status.services);
        }
    }

    /// What there is to tell of a Service; `None` where it is not there.
    fn service_status(&self, name: &ObjectName) -> Option<ServiceStatus> {
        let (service, plan) = (self.model.service(name)?, self.plan.service(name)?);
        let ports = service.ports.iter().map(|port| self.counters(plan, port)).collect();
        let slices = self.model.slices(name).cloned().collect();
        Some(ServiceStatus { service: Arc::clone(service), plan: Arc::clone(plan), slices, ports })
    }

    /// Where the counters of one ServicePort are.
    fn counters(&self, plan: &ServicePlan, port: &ServicePort) -> PortCounters {
        let Some((BalancerKey { port: name, .. }, _)) = plan.balancers(port).next() else {
            return PortCounters::default();
        };
        let state = self.listeners.port(name).cloned();
        PortCounters {
            state,
            backends: self.listeners.backends(name),
            departed: self.listeners.departed(name),
            balancers: self.listeners.balancers(name),
        }
    }

    /// Renews the snapshot's list of failed listeners; true where it changed. Logs who joined it and who left it, not
    /// who stays.
    fn describe_failures(&mut self) -> bool {
        let health_ports = self.describe_health_ports();
        self.describe_listeners() || health_ports
    }

    fn describe_listeners(&mut self) -> bool {
        let mut told = 0;
        let mut changed = false;
        for key in self.listeners.take_failure_news() {
            let failure = self.listeners.failure(&key);
            let state = failure.map(describe);
            if state.as_ref() == self.status.failed.get(&key) {
                continue;
            }
            changed = true;
            let failed = Arc::make_mut(&mut self.status.failed);
            match state {
                Some(state) => drop(failed.insert(key, state)),
                None => drop(failed.remove(&key)),
            }
            match (failure, self.listeners.owner(&key)) {
                (Some(_), _) if told >= TOLD_AT_ONCE => told += 1,
                (Some(BindError { service, source, .. }), _) => {
                    told += 1;
                    let (reason, remedy) = (BindFailure::of(source), remedy(BindFailure::of(source), key));
                    tracing::warn!(%service, listen = %key, %reason, error = %source, remedy, "cannot listen, trying again");
                }
                (None, Some(service)) => tracing::info!(%service, listen = %key, "listening after all"),
                (None, None) => {} // Not wanted any more.
            }
        }
        if told > TOLD_AT_ONCE {
            tracing::warn!(listeners = told - TOLD_AT_ONCE, "more cannot listen; `status` lists all");
        }
        changed
    }

    fn describe_health_ports(&mut self) -> bool {
        let mut told = 0;
        let mut changed = false;
        for name in self.health_ports.take_failure_news() {
            let failure = self.health_ports.failure(&name);
            let state = failure.map(describe_health_port);
            if state.as_ref() == self.status.failed_health_ports.get(&name) {
                continue;
            }
            changed = true;
            match failure {
                Some(_) if told >= TOLD_AT_ONCE => told += 1,
                Some(HealthPortError { service, key, source }) => {
                    told += 1;
                    let (reason, remedy) = (BindFailure::of(source), remedy(BindFailure::of(source), *key));
                    tracing::warn!(%service, listen = %key, %reason, error = %source, remedy, "cannot answer health checks, trying again");
                }
                None if self.health_ports.knows(&name) => {
                    tracing::info!(service = %name, "answering health checks after all")
                }
                None => {} // Not wanted any more.
            }
            let failed = Arc::make_mut(&mut self.status.failed_health_ports);
            match state {
                Some(state) => drop(failed.insert(name, state)),
                None => drop(failed.remove(&name)),
            }
        }
        if told > TOLD_AT_ONCE {
            tracing::warn!(services = told - TOLD_AT_ONCE, "more health checks cannot be answered; `status` lists all");
        }
        changed
    }

    /// Sends a snapshot to everybody who reads it. It shares all but the map with the last one: 10,000 Services cost
    /// 0.4 ms.
    fn publish(&mut self) {
        let problems: Vec<_> = self.source_problems.iter().chain(self.plan.problems()).cloned().collect();
        if *self.status.problems != problems {
            journal::tell_problems(&self.status.problems, &problems);
            let mut refused = Rejections::default();
            refused.count_refused(&self.status.problems, &problems);
            self.refused.add(refused);
            self.status.problems = Arc::new(problems);
        }
        self.status.source.rejections = self.rejections();
        self.publish.send_replace(Arc::new(self.status.clone()));
    }

    /// All that were counted, by the last process too. What this one finds wrong itself is the same, and counts once: all of it
    /// is known when the source has been heard, which what was saved is not.
    fn rejections(&mut self) -> Rejections {
        let mut all = self.source_rejections.clone();
        all.add(self.refused.clone());
        if let Some(before) = &self.rejected_before {
            let rest = before.beyond(&all);
            all.add(rest.clone());
            if self.status.source.config_revision > 0 || !self.begins_with_saved {
                self.refused.add(rest);
                self.rejected_before = None;
            }
        }
        all
    }
}

/// Everything of the process that runs, or the start of one where none does. `estate` is what goes on with it.
async fn take_all(take_over: TakeOver, wanted: WantedSockets, estate: Estate) -> Result<Taken, Option<TakeError>> {
    loop {
        match try_to_take_all(take_over.clone(), wanted.clone(), estate.clone()).await {
            Err(Some(TakeError::Ended)) => {
                let reason = UpgradeResult::Ended;
                tracing::warn!(%reason, "the process that was to hand over has ended: looking again who is there");
            }
            outcome => return outcome,
        }
    }
}

async fn try_to_take_all(
    take_over: TakeOver,
    wanted: WantedSockets,
    estate: Estate,
) -> Result<Taken, Option<TakeError>> {
    let (asking, holder) = (take_over.clone(), take_over.holder);
    match elsewhere(move || asking.ask(&wanted, estate)).await? {
        Some(mut offer) => {
            offer.prepare().await;
            elsewhere(move || offer.accept(holder)).await
        }
        None => elsewhere(move || take_over.begin()).await,
    }
}

/// Waits until the other process has let go of its listeners.
///
/// Not before: of those who watch a listener the kernel wakes one for each client (EPOLLEXCLUSIVE), and one that is about
/// to look away would leave the client waiting.
async fn await_release(from: &Arc<Predecessor>) {
    let releasing = Arc::clone(from);
    if !spawn_blocking(move || releasing.released()).await.unwrap_or(false) {
        tracing::warn!(from_pid = from.pid, "the process that was taken over from does not say that it has let go");
    }
}

/// What new sockets are like here. Where nothing is left to open one with, they are taken to be as they are nearly
/// everywhere: to refuse those that are kept for that would leave who waits there with nobody.
fn fresh_or_usual() -> Fresh {
    Fresh::look().unwrap_or_else(|error| {
        let reason = BindFailure::of(&error).as_str();
        tracing::warn!(%error, reason, "sockets that were kept cannot be compared with new ones");
        Fresh::default()
    })
}

/// Does what blocks on another thread. `None` is the error of one that has panicked.
async fn elsewhere<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TakeError> + Send + 'static,
) -> Result<T, Option<TakeError>> {
    match spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(Some),
        Err(_) => Err(None),
    }
}

/// Waits for ever where there is nothing to wait for.
async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// A failed bind with its remedy, as people read it.
fn describe(error: &BindError) -> ListenerState {
    let message = format!("{error}: {}", explain(&error.source, error.key));
    ListenerState::Failed { reason: BindFailure::of(&error.source).as_str().into(), message }
}

fn describe_health_port(error: &HealthPortError) -> ListenerState {
    let message = format!("{error}: {}", explain(&error.source, error.key));
    ListenerState::Failed { reason: BindFailure::of(&error.source).as_str().into(), message }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::model::{Endpoint, Objects, Service, Slice};
    use crate::name::{ListenKey, Protocol};
    use crate::plan::Expose;
    use crate::serve::scripted::{named, read_all, soon, until};

    fn start() -> Relay {
        start_with(PlanOptions::default())
    }

    fn start_with(plan: PlanOptions) -> Relay {
        let plan = PlanOptions { allow_loopback_endpoints: true, ..plan };
        let udp = UdpOptions { flow_limit: 64, ..UdpOptions::default() };
        Relay::start(RelayOptions { plan, udp, udp_shards: NonZeroUsize::new(1), ..RelayOptions::default() })
            .expect("threads and descriptors")
    }

    /// The Service `web` at a cluster IP of the test's own: `127.85.1.NUMBER:7500`.
    fn web(number: u8) -> Service {
        Service::new("default/web").cluster_ip([127, 85, 1, number]).port("http", 7500)
    }

    fn key(number: u8) -> ListenKey {
        ListenKey::new([127, 85, 1, number].into(), 7500, Protocol::Tcp)
    }

    /// One that listens nowhere, so that no socket stands in the way of a paused clock.
    fn headless() -> Service {
        Service { cluster_ips: crate::model::ClusterIps::Headless, ..Service::new("default/quiet") }
    }

    fn slice(service: &Service, backends: &[SocketAddr]) -> Slice {
        let port = backends.first().map_or(1, SocketAddr::port);
        let slice = Slice::new("web-1", service).port("http", port);
        backends.iter().fold(slice, |slice, backend| slice.endpoint(Endpoint::new(backend.ip())))
    }

    fn put(service: Service) -> Message {
        Message::Event(Event::ApplyService(Arc::new(service)))
    }

    fn put_slice(slice: Slice) -> Message {
        Message::Event(Event::ApplySlice(Arc::new(slice)))
    }

    fn delete(service: &Service) -> Message {
        Message::Event(Event::DeleteService(service.name.clone()))
    }

    /// Sends a whole state.
    async fn sync(relay: &Relay, services: Vec<Service>, slices: Vec<Slice>) {
        send(relay, [Message::Event(Event::Replace(Objects::new(services, slices))), Message::Synced]).await;
        synced(relay).await;
    }

    async fn send(relay: &Relay, messages: impl IntoIterator<Item = Message>) {
        for message in messages {
            relay.messages.send(message).await.expect("the control task runs");
        }
    }

    async fn synced(relay: &Relay) {
        soon(relay.status().wait_for(|status| status.synced)).await.expect("the control task runs");
    }

    fn now(relay: &Relay) -> Arc<Status> {
        Arc::clone(&relay.status.borrow())
    }

    async fn ask(key: ListenKey) -> String {
        let mut stream = soon(TcpStream::connect(key.address())).await.expect("a listener");
        stream.shutdown().await.expect("a connection");
        String::from_utf8(read_all(&mut stream).await.0).expect("a name")
    }

    #[tokio::test]
    async fn t211_given_a_node_that_nobody_told_of_when_the_relay_has_just_started_then_load_balancers_are_told_no() {
        for awaits_node in [false, true] {
            let options = RelayOptions { awaits_node, udp_shards: NonZeroUsize::new(1), ..RelayOptions::default() };

            let relay = Relay::start(options).expect("threads and descriptors");

            assert_eq!(relay.health().check(Instant::now()).node_eligible, !awaits_node);
        }
    }

    #[tokio::test]
    async fn given_a_first_state_when_a_snapshot_says_synced_then_its_listeners_are_up() {
        let relay = start();
        let backend = named("one").await;
        send(&relay, [put(web(1)), put_slice(slice(&web(1), &[backend]))]).await;
        assert!(!now(&relay).synced);
        TcpStream::connect(key(1).address()).await.expect_err("nothing before the state is complete");

        send(&relay, [Message::Synced]).await;
        synced(&relay).await;

        assert_eq!(ask(key(1)).await, "one");
    }

    #[tokio::test]
    async fn given_an_empty_first_state_when_synced_then_what_the_options_lack_is_told() {
        let listen = "127.85.1.2:7500".parse().expect("an address");
        let expose = vec![Expose { listen, service: web(2).name, port: "http".into() }];
        let relay = start_with(PlanOptions { expose, ..PlanOptions::default() });

        sync(&relay, vec![], vec![]).await;

        assert!(now(&relay).problems[0].message.contains("there is no such Service"));
    }

    #[tokio::test]
    async fn t213_given_a_change_when_it_is_made_true_then_health_knows_when_and_nothing_waits() {
        let relay = start();
        let begin = relay.health().check(Instant::now()).updated();

        sync(&relay, vec![], vec![]).await;

        until(|| relay.health().check(Instant::now()).updated() > begin).await;
        let later = Instant::now() + 2 * crate::health::TIMEOUT;
        assert!(relay.health().check(later).is_healthy());
    }

    /// The name of the backend that answers a client at an address; `None` where nobody does for a while.
    async fn ask_from(client: [u8; 4], key: ListenKey) -> Option<String> {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind((client, 0).into()).expect("a free port");
        let connect = tokio::time::timeout(Duration::from_millis(300), socket.connect(key.address()));
        let mut stream = connect.await.ok()?.ok()?;
        stream.shutdown().await.ok()?;
        let name = String::from_utf8(read_all(&mut stream).await.0).expect("a name");
        (!name.is_empty()).then_some(name)
    }

    #[tokio::test]
    async fn t222_given_the_pods_network_when_it_is_known_late_or_changes_then_its_clients_count_as_inside() {
        let (client, key) = ([127, 85, 1, 60], ListenKey::new([127, 85, 1, 61].into(), 7500, Protocol::Tcp));
        let node = crate::endpoints::Node { name: Some("here".into()), zone: None };
        let relay = start_with(PlanOptions { node, ..PlanOptions::default() });
        let service = Service {
            kind: crate::model::ServiceKind::LoadBalancer,
            load_balancer_ips: vec![key.address().ip()].into(),
            external_policy: crate::model::TrafficPolicy::Local,
            ..web(62)
        };
        let mut elsewhere = slice(&service, &[named("one").await]);
        elsewhere.endpoints[0].node = Some("there".into());
        sync(&relay, vec![service], vec![elsewhere]).await;
        assert_eq!(ask_from(client, key).await, None, "outside, and no endpoint is on this node");

        for (net, answer) in [("127.85.1.60/32", Some("one".to_owned())), ("10.244.0.0/16", None)] {
            let plan = PlanOptions {
                node: crate::endpoints::Node { name: Some("here".into()), zone: None },
                allow_loopback_endpoints: true,
                ..PlanOptions::default()
            };
            let setting = Setting { plan, inside: vec![net.parse().expect("a network")], ..Setting::default() };
            settle(&relay, Message::Setting(Box::new(setting))).await;
            assert_eq!(ask_from(client, key).await, answer, "{net}");
        }
    }

    /// Sends one message and waits until it is acted on.
    async fn settle(relay: &Relay, message: Message) -> Duration {
        let (began, next) = (Instant::now(), now(relay).revision + 1);
        send(relay, [message]).await;
        soon(relay.status().wait_for(|status| status.revision >= next)).await.expect("the control task runs");
        began.elapsed()
    }

    #[tokio::test]
    async fn given_quiet_when_two_events_come_then_the_first_is_acted_on_at_once_and_the_second_after_a_gap() {
        let relay = start();
        sync(&relay, vec![], vec![]).await;
        let (mut at_once, mut soon_after) = (Duration::MAX, Duration::MAX);

        for _ in 0..5 {
            tokio::time::sleep(BATCH_WINDOW).await; // What quiet is.
            let began = Instant::now();
            at_once = at_once.min(settle(&relay, put(headless())).await);
            soon_after = soon_after.min(settle(&relay, delete(&headless())).await);
            assert!(began.elapsed() >= BATCH_GAP);
        }

        assert!(at_once < BATCH_WINDOW / 2, "{at_once:?} at best");
        assert!(soon_after < BATCH_WINDOW, "{soon_after:?} at best");
    }

    #[test]
    fn t232_given_events_that_keep_coming_when_gathered_then_the_window_closes_in_time_and_else_after_a_gap() {
        let now = Instant::now();
        let after = |took_ms| Window::after(Duration::from_millis(took_ms), now);

        assert_eq!(after(0).closes(now), now + BATCH_GAP);
        assert_eq!(after(0).closes(now + BATCH_WINDOW), now + BATCH_WINDOW, "however many come");
        assert_eq!(after(3).closes(now), now + Duration::from_millis(12), "a costly batch is followed by a rest");
        assert_eq!(after(1_000).closes(now), now + BATCH_WINDOW, "which is no longer than the window");
        assert!(Window::shut(now).closes(now) <= now);
    }

    #[tokio::test]
    async fn given_a_first_state_in_two_messages_when_the_second_comes_then_it_does_not_wait_for_a_window() {
        let mut at_once = Duration::MAX;

        for _ in 0..5 {
            let relay = start();
            send(&relay, [put(headless())]).await;
            until(|| relay.messages.capacity() == QUEUE).await;
            at_once = at_once.min(settle(&relay, Message::Synced).await);
        }

        assert!(at_once < BATCH_WINDOW / 2, "{at_once:?} at best");
    }

    #[tokio::test]
    async fn given_a_burst_of_a_thousand_events_when_taken_then_few_batches_make_it_true() {
        let relay = start();
        sync(&relay, vec![headless()], vec![]).await;
        let began = now(&relay).revision;

        for _ in 0..500 {
            send(&relay, [delete(&headless()), put(Service { created: "later".into(), ..headless() })]).await;
        }
        let last = Service { name: ObjectName::parse("default/last"), ..headless() };
        send(&relay, [put(last.clone())]).await;
        soon(relay.status().wait_for(|status| status.services.contains_key(&last.name)))
            .await
            .expect("the control task runs");

        let batches = now(&relay).revision - began;
        assert!(batches <= 20, "{batches}"); // Nothing like a thousand, however slow this machine is.
    }

    #[tokio::test]
    async fn given_endpoints_that_change_when_taken_then_it_is_noted_and_who_is_next_is_known() {
        let relay = start();
        let (one, two) = (named("one").await, named("two").await);
        sync(&relay, vec![web(64)], vec![slice(&web(64), &[one])]).await;
        assert_eq!(now(&relay).recent.iter().count(), 0, "the first state is no change");

        send(&relay, [put_slice(slice(&web(64), &[two]))]).await;
        soon(relay.status().wait_for(|status| status.recent.iter().count() > 0)).await.expect("it is noted");

        let status = now(&relay);
        let noted: Vec<_> = status.recent.iter().map(|event| event.what.clone()).collect();
        assert_eq!(noted, [format!("http/TCP: backends +{two}, -{one}")]);
        let port = &status.report().services[0].ports[0];
        assert_eq!(port.choices[0].next, Some(two));
        assert_eq!(port.choices[0].endpoints.len(), 1);
    }

    #[tokio::test]
    async fn t009_given_an_event_that_changes_nothing_when_taken_then_no_snapshot_is_made() {
        let relay = start();
        sync(&relay, vec![headless()], vec![]).await;
        let mut status = relay.status();
        status.mark_unchanged();

        send(&relay, [put(headless())]).await;
        until(|| relay.messages.capacity() == QUEUE).await;
        send(&relay, [delete(&headless())]).await;
        soon(status.changed()).await.expect("the control task runs");

        assert!(status.borrow().services.is_empty(), "the first snapshot since is that of the second event");
    }

    #[tokio::test]
    async fn f32_given_a_port_that_somebody_holds_when_it_is_freed_in_a_flood_of_events_then_it_is_taken() {
        let relay = start();
        let stranger = TcpListener::bind(key(3).address()).await.expect("a free address");
        let backend = named("one").await;
        sync(&relay, vec![web(3)], vec![slice(&web(3), &[backend])]).await;
        let failed = now(&relay);
        let Some(ListenerState::Failed { reason, message }) = failed.failed.get(&key(3)) else {
            panic!("no failure: {failed:?}")
        };
        assert_eq!(reason, "in_use");
        assert!(message.starts_with("default/web:http: cannot listen on 127.85.1.3:7500/TCP: "), "{message}");
        assert!(message.contains("ss -lnp 'sport = :7500'"), "{message}");

        let messages = relay.messages();
        let flood = tokio::spawn(async move {
            while messages.send(delete(&headless())).await.is_ok() {
                if messages.send(put(headless())).await.is_err() {
                    return;
                }
            }
        });
        drop(stranger);

        soon(relay.status().wait_for(|status| status.failed.is_empty())).await.expect("the control task runs");
        assert_eq!(ask(key(3)).await, "one");
        flood.abort();
    }

    #[tokio::test]
    async fn given_a_relay_that_stops_when_events_come_then_they_are_followed_but_nothing_listens_any_more() {
        let relay = start();
        let backend = named("one").await;
        sync(&relay, vec![web(4)], vec![slice(&web(4), &[backend])]).await;

        relay.stop_accepting().await;
        let status = now(&relay);
        settle(&relay, put(web(5).port("other", 7501))).await;
        soon(relay.stop_accepting()).await;

        assert!(status.stopping && now(&relay).stopping);
        for number in [4, 5] {
            TcpStream::connect(key(number).address()).await.expect_err("closed");
        }
        assert!(relay.status().has_changed().is_ok(), "the control task lives, so health says that all is well");
    }

    #[tokio::test]
    async fn given_a_relay_when_it_is_dropped_then_its_control_task_ends_and_its_addresses_are_free() {
        let relay = start();
        sync(&relay, vec![web(6)], vec![]).await;
        let (messages, mut status) = (relay.messages(), relay.status());

        drop(relay);

        soon(messages.closed()).await;
        soon(async { while status.changed().await.is_ok() {} }).await;
        let address = SocketAddr::from((Ipv4Addr::new(127, 85, 1, 6), 7500));
        std::net::TcpListener::bind(address).expect("free");
    }
}
