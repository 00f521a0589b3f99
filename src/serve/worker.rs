//! A thread that carries connections: it has an event loop of its own, and the tasks that live on it.
//!
//! A connection is a task of one thread from its first byte to its last. So nothing about it is shared, waking it is a push
//! to a queue, and the processor that has it in its cache keeps it.
//!
//! *Why not the runtime of the control plane.* With tasks that move between threads, each batch of events wakes other
//! threads to share it, each readiness is an atomic, and each close is a call more. At 93 % of the time in the kernel, what
//! is left is most of what can be saved.
//!
//! *A turn:* orders from other threads, the tasks that are ready, then the events and timers that make others ready.
//! A panic ends the task or the order that it was in, and nothing else.
//!
//! Sockets and their readiness are `reactor`, timers are `sleep`, orders are `mailbox`; many workers are a `pool`.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use async_task::{Runnable, Task};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};
use tracing::error;

use crate::serve::mailbox::{Mailbox, Order};
use crate::serve::reactor::{Foreign, Party, Reactor, Unwatched, Watched};
use crate::serve::sleep::{Sleep, Timers};

/// The number by which a worker's event loop knows its alarm.
const ALARM: Foreign = Foreign(u64::MAX >> 1);

/// The longest sleep, whatever the next timer is: the call that takes longer ones is not allowed everywhere.
const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 3_600);

thread_local! {
    static CURRENT: RefCell<Option<Rc<Worker>>> = const { RefCell::new(None) };
}

/// Whoever accepts from a listener on one worker.
pub(crate) trait Readable {
    /// Somebody waits. Called again in the next turn where that is still so.
    fn readable(&self, worker: &Rc<Worker>);

    /// Nobody here is to be told of it any more: another process accepts.
    fn unwatch(&self, _epoll: &OwnedFd) {}

    /// Its pause is over. For how long it goes on, where nobody may be accepted now either: that costs less than to be
    /// called for it.
    fn stays_mute(&self) -> Option<Duration> {
        None
    }
}

/// A thread's event loop and its tasks.
pub(crate) struct Worker {
    reactor: Rc<Reactor>,
    timers: Rc<Timers>,
    /// Tasks to be polled.
    ready: RefCell<VecDeque<Runnable>>,
    acceptors: RefCell<HashMap<u64, Rc<dyn Readable>, foldhash::fast::FixedState>>,
    mailbox: Arc<Mailbox>,
    stopped: Cell<bool>,
}

/// The worker of this thread.
///
/// # Panics
/// On a thread that is none: what lives on a worker is made and polled nowhere else.
pub(crate) fn current() -> Rc<Worker> {
    CURRENT.with_borrow(Clone::clone).expect("what lives on a worker is made there")
}

/// Registers a connection with the worker of this thread.
///
/// # Errors
/// [`Unwatched`], with the socket.
pub(crate) fn watch(socket: OwnedFd) -> Result<Watched, Unwatched> {
    current().reactor.watch(socket)
}

/// Ready at an instant.
pub(crate) fn sleep_until(deadline: Instant) -> Sleep {
    current().timers.until(deadline)
}

/// Makes this thread a worker until a task has ended. A panic of the task is one of this thread.
#[cfg(test)]
pub(crate) fn run_until_done<T: 'static>(task: impl Future<Output = T> + 'static) -> T {
    let worker = Worker::new().expect("an event loop");
    let outcome = Rc::new(RefCell::new(None));
    CURRENT.set(Some(Rc::clone(&worker)));
    worker.spawn({
        let (worker, outcome) = (Rc::clone(&worker), Rc::clone(&outcome));
        let task = AssertUnwindSafe(task);
        async move {
            let ended = futures_util::FutureExt::catch_unwind(task).await;
            outcome.replace(Some(ended));
            worker.stopped.set(true);
        }
    });
    worker.run();
    match outcome.take().expect("an end") {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Has a task polled. On its own worker it is a push to a queue.
fn schedule(mailbox: &Arc<Mailbox>, task: Runnable) {
    let here = CURRENT.try_with(|current| current.borrow().as_ref().filter(|worker| worker.has(mailbox)).cloned());
    match here {
        Ok(Some(worker)) => worker.ready.borrow_mut().push_back(task),
        _ => {
            // It may be dropped on its own thread alone: where that has ended, it stays what it is.
            let task = ManuallyDrop::new(task);
            mailbox.order(move |worker| worker.ready.borrow_mut().push_back(ManuallyDrop::into_inner(task)));
        }
    }
}

/// Level-triggered, so that who leaves some clients waiting is told again; and one worker is woken, not all.
pub(crate) fn watch_listener(epoll: &OwnedFd, listener: &impl AsFd, number: Foreign) -> io::Result<()> {
    Ok(epoll::add(epoll, listener, number.data(), EventFlags::IN | EventFlags::EXCLUSIVE)?)
}

impl Worker {
    /// A worker with a thread of its own.
    pub(crate) fn start(number: usize) -> io::Result<Arc<Mailbox>> {
        let (told, mailbox) = std::sync::mpsc::channel();
        thread::Builder::new().name(format!("tcp-{number}")).spawn(move || match Self::new() {
            Ok(worker) => {
                let _ = told.send(Ok(Arc::clone(&worker.mailbox)));
                worker.run();
            }
            Err(error) => drop(told.send(Err(error))),
        })?;
        mailbox.recv().unwrap_or_else(|_| Err(io::Error::other("a worker thread has ended at its start")))
    }

    fn new() -> io::Result<Rc<Self>> {
        let reactor = Rc::new(Reactor::new()?);
        let mailbox = Mailbox::new(reactor.epoll(), ALARM)?;
        Ok(Rc::new(Self {
            reactor,
            timers: Rc::default(),
            ready: RefCell::default(),
            acceptors: RefCell::default(),
            mailbox: Arc::new(mailbox),
            stopped: Cell::new(false),
        }))
    }

    /// Makes this thread the worker's, until it is stopped.
    fn run(self: Rc<Self>) {
        CURRENT.set(Some(Rc::clone(&self)));
        while !self.stopped.get() {
            self.contain(|| self.turn());
        }
        self.leave();
    }

    /// Ends what is still there: each task is dropped where it stands.
    fn leave(self: &Rc<Self>) {
        self.carry_out(self.mailbox.close());
        drop(self.acceptors.take());
        loop {
            self.reactor.abandon();
            self.timers.abandon();
            let ready = self.ready.take();
            if ready.is_empty() {
                break;
            }
            drop(ready); // Tasks that these were to wake become ready.
        }
        CURRENT.set(None);
    }

    fn turn(self: &Rc<Self>) {
        self.carry_out(self.mailbox.take_orders());
        self.run_ready();
        let patience = self.patience();
        self.reactor.turn(patience.as_ref(), |number| self.tell(number));
        self.mailbox.is_awake();
        if self.timers.next().is_some() {
            self.timers.fire(Instant::now());
        }
    }

    fn carry_out(self: &Rc<Self>, orders: Vec<Order>) {
        orders.into_iter().for_each(|order| self.contain(|| order(self)));
    }

    /// Polls the tasks that are ready now. Those that this makes ready come after the next look at the sockets.
    fn run_ready(&self) {
        let count = self.ready.borrow().len();
        for _ in 0..count {
            let Some(task) = self.ready.borrow_mut().pop_front() else { return };
            self.contain(|| _ = task.run());
        }
    }

    /// How long nothing may happen; `None` is without end.
    fn patience(&self) -> Option<Timespec> {
        const NONE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        if !self.ready.borrow().is_empty() {
            return Some(NONE);
        }
        if !self.mailbox.may_sleep() || self.stopped.get() {
            return Some(NONE);
        }
        let next = self.timers.next()?;
        let patience = next.saturating_duration_since(Instant::now()).min(LONGEST_SLEEP);
        Some(Timespec::try_from(patience).unwrap_or(NONE))
    }

    /// Has a listener's acceptor look at it. One that is not known yet is in the orders of the next turn.
    fn tell(self: &Rc<Self>, number: Foreign) {
        let acceptor = self.acceptors.borrow().get(&number.0).cloned();
        if let Some(acceptor) = acceptor {
            self.contain(|| acceptor.readable(self));
        }
    }

    /// A panic ends what was being done, not the connections of the thread.
    fn contain(&self, act: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(act)).is_err() {
            error!("a panic has ended what a worker did; its connections go on");
        }
    }

    fn has(&self, mailbox: &Arc<Mailbox>) -> bool {
        Arc::ptr_eq(&self.mailbox, mailbox)
    }

    pub(crate) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The event loop, for a listener to be watched no longer.
    pub(crate) fn epoll(&self) -> &OwnedFd {
        self.reactor.epoll()
    }

    /// Ends the thread after this turn.
    pub(crate) fn stop(&self) {
        self.stopped.set(true);
    }

    /// Wakes every task that waits for a socket.
    pub(crate) fn wake_all(&self) {
        self.reactor.wake_all();
    }

    /// Has an acceptor look at what comes for a number.
    pub(crate) fn adopt(&self, number: Foreign, acceptor: Rc<dyn Readable>) {
        self.acceptors.borrow_mut().insert(number.0, acceptor);
    }

    /// Ends what [`Worker::adopt`] began.
    pub(crate) fn disown(&self, number: Foreign) {
        let gone = self.acceptors.borrow_mut().remove(&number.0);
        drop(gone); // With it may go the last owner of anything: nothing is borrowed here.
    }

    /// Looks at no listener any more: another process accepts.
    pub(crate) fn retire(&self) {
        let acceptors = self.acceptors.take();
        acceptors.values().for_each(|acceptor| acceptor.unwatch(self.epoll()));
    }

    /// Begins a task. A panic ends that task alone.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.spawn_task(task).detach();
    }

    pub(crate) fn spawn_task<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> Task<T> {
        let mailbox = Arc::clone(&self.mailbox);
        let schedule = move |task| schedule(&mailbox, task);
        let (runnable, task) = async_task::spawn_local(task, schedule);
        runnable.schedule();
        task
    }

    /// Does not look at a listener for a time: clients wait meanwhile.
    pub(crate) fn mute(self: &Rc<Self>, number: Foreign, listener: &Arc<OwnedFd>, pause: Duration) {
        if epoll::delete(self.reactor.epoll(), listener).is_err() {
            return;
        }
        let (this, listener, mut pause) = (Rc::downgrade(self), Arc::downgrade(listener), pause);
        self.spawn(async move {
            loop {
                sleep_until(Instant::now() + pause).await;
                let (Some(worker), Some(listener)) = (this.upgrade(), listener.upgrade()) else { return };
                let acceptor = worker.acceptors.borrow().get(&number.0).cloned();
                let Some(acceptor) = acceptor else { return };
                if let Some(longer) = acceptor.stays_mute() {
                    pause = longer;
                } else if watch_listener(worker.reactor.epoll(), &listener, number).is_ok() {
                    return;
                }
            }
        });
    }

    /// Hands over each socket whose age is counted ([`Watched::count_age`]) when it is called the second time since.
    pub(crate) fn grow_older(&self, aged: impl FnMut(BorrowedFd<'_>, Party)) -> usize {
        self.reactor.grow_older(aged)
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("mailbox", &self.mailbox).finish_non_exhaustive()
    }
}
