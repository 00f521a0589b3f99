//! The one owner of model, plan and listeners: events in, steps out, snapshots for everybody else.
//!
//! What the steps do to sockets is in `serve`; where events come from is in the sources (`manifest`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep_until, timeout_at};

use crate::journal::{self, Moves};
use crate::lifecycle::Drainable;
use crate::model::{Event, Model, ServicePort};
use crate::name::{ObjectName, ServicePortName};
use crate::plan::{Plan, PlanOptions, Problem};
use crate::remedy::{BindFailure, explain};
use crate::serve::Listeners;
use crate::serve::listeners::BindError;
use crate::serve::tcp::{TcpOptions, TcpShared};
use crate::serve::udp::{UdpOptions, UdpShards};
use crate::status::{ListenerState, PortCounters, ServiceReport, ServiceStatus, SourceStatus, Status};

/// Messages that wait for the control task; a source that is faster waits.
const QUEUE: usize = 1024;
/// Events that arrive within this time of the last change are taken together. The first one after quiet waits for nothing.
const BATCH_WINDOW: Duration = Duration::from_millis(20);

/// What a source tells the control task.
#[derive(Debug)]
pub enum Message {
    /// Objects changed.
    Event(Event),
    /// The first complete state has been sent: act on it.
    Synced,
    /// How the source does, and all that is wrong with its input now (replaces what it said before).
    Source {
        /// Its state.
        status: SourceStatus,
        /// Broken files, wrong fields, passed-over kinds.
        problems: Vec<Problem>,
    },
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
}

/// A running relay: sources send it messages, everybody may read its status. Dropping it ends its control task.
#[derive(Debug)]
pub struct Relay {
    messages: mpsc::Sender<Message>,
    orders: mpsc::Sender<Order>,
    status: watch::Receiver<Arc<Status>>,
    tcp: Arc<TcpShared>,
}

/// What the process asks of the control task.
#[derive(Debug)]
enum Order {
    StopAccepting(oneshot::Sender<()>),
}

impl Relay {
    /// Starts the data plane and the control task on the current tokio runtime. Nothing listens before [`Message::Synced`].
    ///
    /// # Errors
    /// Where the kernel refuses what every relay needs: descriptors, threads.
    pub fn start(options: RelayOptions) -> io::Result<Self> {
        let (messages, inbox) = mpsc::channel(QUEUE);
        let (orders, order_inbox) = mpsc::channel(1);
        let (publish, status) = watch::channel(Arc::new(Status::default()));
        let tcp = Arc::new(TcpShared::new(options.tcp));
        let shards = options.udp_shards.or_else(|| available_parallelism().ok()).map_or(1, NonZeroUsize::get);
        let udp = UdpShards::start(shards, options.udp)?;
        let control = Control {
            options: options.plan,
            model: Model::default(),
            plan: Plan::default(),
            listeners: Listeners::new(options.inside.into(), Arc::clone(&tcp), udp),
            dirty: BTreeSet::new(),
            synced: false,
            source_problems: Vec::new(),
            status: Status::default(),
            publish,
        };
        tokio::spawn(control.run(inbox, order_inbox));
        Ok(Self { messages, orders, status, tcp })
    }

    /// Where sources send to.
    pub fn messages(&self) -> mpsc::Sender<Message> {
        self.messages.clone()
    }

    /// Snapshots after each change.
    pub fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.clone()
    }

    /// Closes all listeners. Open connections go on, flows end. A second call changes nothing.
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
}

impl Drainable for Relay {
    async fn stop_accepting(&self) {
        self.stop_accepting().await;
    }

    async fn drain(&self, timeout: Duration) -> usize {
        self.drain(timeout).await
    }
}

/// The state of the control task, owned by value.
struct Control {
    options: PlanOptions,
    model: Model,
    plan: Plan,
    listeners: Listeners,
    dirty: BTreeSet<ObjectName>,
    synced: bool,
    source_problems: Vec<Problem>,
    status: Status,
    publish: watch::Sender<Arc<Status>>,
}

impl Control {
    async fn run(mut self, mut inbox: mpsc::Receiver<Message>, mut orders: mpsc::Receiver<Order>) {
        let mut settled = Instant::now().checked_sub(BATCH_WINDOW).unwrap_or_else(Instant::now);
        loop {
            let retry = self.listeners.next_retry();
            let retry_timer = pin!(async {
                match retry {
                    Some(due) => sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            });
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::StopAccepting(done)) => {
                        self.listeners.unbind_all().await;
                        let _ = done.send(()); // the asker may have been cancelled
                        return;
                    }
                    None => return,
                },
                message = inbox.recv() => {
                    let Some(message) = message else { return };
                    self.take(message);
                    self.take_batch(&mut inbox, settled + BATCH_WINDOW).await;
                    self.settle().await;
                    settled = Instant::now();
                }
                () = retry_timer => {
                    if self.listeners.retry(Instant::now()).await {
                        self.describe_failures();
                        self.publish();
                    }
                }
            }
        }
    }

    /// Takes what comes until the window closes, and then what is waiting.
    async fn take_batch(&mut self, inbox: &mut mpsc::Receiver<Message>, window_end: Instant) {
        while let Ok(Some(message)) = timeout_at(window_end.into(), inbox.recv()).await {
            self.take(message);
        }
        for _ in 0..QUEUE {
            let Ok(message) = inbox.try_recv() else { return };
            self.take(message);
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Event(event) => self.model.apply(event, &mut self.dirty),
            Message::Synced => self.synced = true,
            Message::Source { status, problems } => {
                self.status.source = status;
                self.source_problems = problems;
            }
        }
    }

    /// Makes the dirty Services true and tells everybody.
    async fn settle(&mut self) {
        if self.synced {
            let dirty = std::mem::take(&mut self.dirty);
            let began = Instant::now();
            let steps = self.plan.update(&self.model, &dirty, &self.options);
            let (step_count, moves) = (steps.len(), Moves::of(&steps));
            self.listeners.apply(steps, began).await;
            moves.tell(|key| self.listeners.is_bound(key));
            if step_count > 0 {
                tracing::info!(
                    services = dirty.len(),
                    steps = step_count,
                    listeners = self.listeners.bound_count(),
                    elapsed_ms = began.elapsed().as_millis() as u64,
                    "applied"
                );
            }
            self.describe_failures();
            self.describe();
        }
        self.status.synced = self.synced;
        self.status.revision += 1;
        self.publish();
    }

    /// Renews the snapshot's entries of Services that changed.
    fn describe(&mut self) {
        for name in self.plan.touched() {
            match self.model.service(name) {
                Some(service) => {
                    let report = ServiceReport::of(service, &self.plan);
                    let ports = service.ports.iter().map(|port| self.counters(name, port)).collect();
                    self.status.services.insert(name.clone(), Arc::new(ServiceStatus { report, ports }));
                }
                None => {
                    self.status.services.remove(name);
                }
            }
        }
    }

    /// Where the counters of one ServicePort are.
    fn counters(&self, service: &ObjectName, port: &ServicePort) -> PortCounters {
        let name = ServicePortName { service: service.clone(), port: port.name.clone(), protocol: port.protocol };
        let state = self.listeners.port(&name).cloned();
        let planned = self.plan.service(service).map(|plan| &plan.wanted.balancers);
        let endpoints = planned.into_iter().flatten().filter(|(key, _)| key.port == name);
        let endpoints: BTreeMap<_, _> = endpoints
            .flat_map(|(_, wanted)| &wanted.usable.serving)
            .map(|endpoint| (endpoint.address, endpoint.pod.clone()))
            .collect();
        let backends = endpoints
            .into_iter()
            .filter_map(|(address, pod)| Some((Arc::clone(self.listeners.backend(&name, address)?), pod)))
            .collect();
        PortCounters { state, backends }
    }

    /// Renews the snapshot's list of failed listeners. Logs who joined it and who left it, not who stays.
    fn describe_failures(&mut self) {
        let failed: BTreeMap<_, _> = self.listeners.failed().map(|(key, error)| (*key, describe(error))).collect();
        for (key, error) in self.listeners.failed() {
            let known = self.status.failed.get(key);
            if known != failed.get(key)
                && let Some(ListenerState::Failed { reason, message }) = failed.get(key)
            {
                tracing::warn!(service = %error.service, listen = %key, reason = %reason, "{message}");
            }
        }
        for key in self.status.failed.keys().filter(|key| !failed.contains_key(*key)) {
            if self.listeners.is_bound(key) {
                tracing::info!(listen = %key, "listening after all");
            }
        }
        if *self.status.failed != failed {
            self.status.failed = Arc::new(failed);
        }
    }

    /// Sends a snapshot to everybody who reads it.
    fn publish(&mut self) {
        let problems: Vec<_> = self.source_problems.iter().chain(self.plan.problems()).cloned().collect();
        if *self.status.problems != problems {
            journal::tell_problems(&self.status.problems, &problems);
            self.status.problems = Arc::new(problems);
        }
        self.publish.send_replace(Arc::new(self.status.clone()));
    }
}

/// A failed bind with its remedy, as people read it.
fn describe(error: &BindError) -> ListenerState {
    let message = format!("{error}: {}", explain(&error.source, error.key));
    ListenerState::Failed { reason: BindFailure::of(&error.source).as_str().into(), message }
}
