//! Threads that carry connections: each with an event loop of its own, and the tasks that live on it.
//!
//! A connection is a task of one thread from its first byte to its last. So nothing about it is shared, waking it is a push
//! to a queue, and the processor that has it in its cache keeps it. What is new goes where least is open ([`Pool::place`]);
//! that is all the balancing there is, and no thread ever takes from another.
//!
//! *Why not the runtime of the control plane.* With tasks that move between threads, each batch of events wakes other
//! threads to share it, each readiness is an atomic, and each close is a call more. At 93 % of the time in the kernel, what
//! is left is most of what can be saved.
//!
//! *A turn:* orders from other threads, the tasks that are ready, then the events and timers that make others ready.
//! A panic ends the task or the order that it was in, and nothing else.
//!
//! Sockets and their readiness are `reactor`, timers are `sleep`.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use async_task::{Runnable, Task};
use rustix::event::epoll::{self, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use tokio::sync::oneshot;
use tracing::error;

use crate::serve::reactor::{Foreign, Reactor, Unwatched, Watched};
use crate::serve::sleep::{Sleep, Timers};

/// How many workers watch a listener. What they accept goes to all of them.
///
/// Each costs a descriptor's watch in the kernel, times ten thousand listeners; and it takes few to accept what many
/// can carry.
const ACCEPTORS: usize = 4;

/// The number by which a worker's event loop knows its alarm.
const ALARM: Foreign = Foreign(u64::MAX >> 1);

/// The longest sleep, whatever the next timer is: the call that takes longer ones is not allowed everywhere.
const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 3_600);

/// Something to be done by a worker.
type Order = Box<dyn FnOnce(&Rc<Worker>) + Send>;

// ---- Many workers ----

/// The workers of a process. Dropped, it ends them.
#[derive(Debug)]
pub(crate) struct Pool {
    workers: Vec<Arc<Mailbox>>,
    /// Listeners so far.
    numbers: AtomicU64,
    /// Whose load a worker compares its own with.
    turn: AtomicUsize,
}

impl Pool {
    /// Starts so many threads, one at least.
    ///
    /// # Errors
    /// No thread, descriptor or memory is left.
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let mut pool = Self { workers: Vec::new(), numbers: AtomicU64::new(0), turn: AtomicUsize::new(0) };
        for number in 0..count.max(1) {
            pool.workers.push(Worker::start(number)?); // Where one cannot start, dropping the pool ends the others.
        }
        Ok(pool)
    }

    /// Has several workers watch a listening socket, each with an acceptor of its own. An arrival wakes one of them.
    ///
    /// # Errors
    /// The kernel takes no more: no memory, or its limit of watched descriptors; then nobody watches it.
    pub(crate) fn listen<A: Readable + 'static>(
        &self,
        listener: &Arc<OwnedFd>,
        acceptor: impl Fn(Foreign) -> A + Clone + Send + 'static,
    ) -> io::Result<Listening> {
        let number = Foreign(self.numbers.fetch_add(1, Ordering::Relaxed));
        let mut listening = Listening { number, listener: Arc::clone(listener), watchers: Vec::new() };
        for mailbox in self.workers.iter().cycle().skip(number.0 as usize % self.workers.len()).take(self.acceptors()) {
            let acceptor = acceptor.clone();
            listening.watchers.push(Arc::clone(mailbox));
            mailbox.order_in_time(move |worker| worker.adopt(number, Rc::new(acceptor(number))));
            watch_listener(&mailbox.epoll, listener, number)?;
        }
        Ok(listening)
    }

    fn acceptors(&self) -> usize {
        self.workers.len().min(ACCEPTORS)
    }

    /// Runs a task on the least busy worker: here, unless another has clearly less to do.
    pub(crate) fn place<F: Future<Output = ()> + 'static>(
        &self,
        here: &Rc<Worker>,
        task: impl FnOnce(Seat) -> F + Send + 'static,
    ) {
        let mailbox = self.less_busy_than(here);
        let seat = Seat::take(mailbox.unwrap_or(&here.mailbox));
        match mailbox {
            None => here.spawn(task(seat)),
            Some(mailbox) => mailbox.order(move |worker| worker.spawn(task(seat))),
        }
    }

    /// Compares with one other, another one each time: so that all come to be compared, and each time it is cheap.
    fn less_busy_than(&self, here: &Worker) -> Option<&Arc<Mailbox>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let other = &self.workers[turn % self.workers.len()];
        let load = other.load.load(Ordering::Relaxed);
        (here.mailbox.load.load(Ordering::Relaxed) > load + load / 4).then_some(other)
    }

    /// What each worker answers.
    #[cfg(test)]
    pub(crate) fn ask<T: Send + 'static>(&self, question: impl Fn() -> T + Clone + Send + 'static) -> Vec<T> {
        let ask = |mailbox: &Arc<Mailbox>| {
            let (tell, answer) = std::sync::mpsc::channel();
            let question = question.clone();
            mailbox.order(move |_| drop(tell.send(question())));
            answer.recv().expect("a worker")
        };
        self.workers.iter().map(ask).collect()
    }

    /// Wakes every task that waits for a socket.
    pub(crate) fn wake_all(&self) {
        self.workers.iter().for_each(|mailbox| mailbox.order(|worker| worker.reactor.wake_all()));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.workers.iter().for_each(|mailbox| mailbox.order(|worker| worker.stopped.set(true)));
    }
}

/// Whoever accepts from a listener on one worker.
pub(crate) trait Readable {
    /// Somebody waits. Called again in the next turn where that is still so.
    fn readable(&self, worker: &Rc<Worker>);
}

/// A listener that workers watch. Dropped, it is watched no longer, soon.
#[derive(Debug)]
pub(crate) struct Listening {
    number: Foreign,
    listener: Arc<OwnedFd>,
    watchers: Vec<Arc<Mailbox>>,
}

impl Listening {
    /// Gives the socket back once no worker watches it or holds it any more.
    pub(crate) async fn end(mut self) -> Arc<OwnedFd> {
        let done: Vec<_> =
            std::mem::take(&mut self.watchers).iter().map(|mailbox| self.withdraw_from(mailbox)).collect();
        for done in done {
            let _ = done.await; // A worker that has ended holds nothing.
        }
        Arc::clone(&self.listener)
    }

    fn withdraw_from(&self, mailbox: &Mailbox) -> oneshot::Receiver<()> {
        let (done, ended) = oneshot::channel();
        let (number, listener) = (self.number, Arc::clone(&self.listener));
        mailbox.order(move |worker| {
            worker.disown(number);
            // Not there where it was muted, or could not be watched.
            let _ = epoll::delete(worker.reactor.epoll(), &listener);
            drop(listener);
            let _ = done.send(());
        });
        ended
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.watchers.iter().for_each(|mailbox| drop(self.withdraw_from(mailbox)));
    }
}

/// One of the tasks that count as a worker's load. Kept by the task.
#[derive(Debug)]
pub(crate) struct Seat(Arc<Mailbox>);

impl Seat {
    fn take(mailbox: &Arc<Mailbox>) -> Self {
        mailbox.load.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(mailbox))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Level-triggered, so that who leaves some clients waiting is told again; and one worker is woken, not all.
fn watch_listener(epoll: &OwnedFd, listener: &impl AsFd, number: Foreign) -> io::Result<()> {
    Ok(epoll::add(epoll, listener, number.data(), EventFlags::IN | EventFlags::EXCLUSIVE)?)
}

// ---- What other threads see of one ----

/// What other threads know of a worker.
#[derive(Debug)]
struct Mailbox {
    orders: Mutex<Orders>,
    /// There are orders. Set after they are put there, and looked at before the worker sleeps.
    posted: AtomicBool,
    /// The worker sleeps, or is about to.
    asleep: AtomicBool,
    /// Written to, it ends the sleep.
    alarm: OwnedFd,
    epoll: Arc<OwnedFd>,
    load: AtomicUsize,
}

/// In the order of posting. None are taken any more once the worker has ended.
struct Orders(Option<Vec<Order>>);

impl fmt::Debug for Orders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} orders", self.0.as_ref().map(Vec::len))
    }
}

impl Mailbox {
    /// Has something done in the worker's next turn, which begins now. Dropped undone where the worker has ended.
    fn order(&self, order: impl FnOnce(&Rc<Worker>) + Send + 'static) {
        self.order_in_time(order);
        if self.asleep.swap(false, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.alarm, &1_u64.to_ne_bytes()); // A full counter has rung already.
        }
    }

    /// Has something done in the worker's next turn, whenever that is.
    fn order_in_time(&self, order: impl FnOnce(&Rc<Worker>) + Send + 'static) {
        let order: Order = Box::new(order); // Dropped after the lock: with it goes whatever it holds.
        match &mut self.orders.lock().unwrap_or_else(PoisonError::into_inner).0 {
            Some(orders) => orders.push(order),
            None => return,
        }
        // Sequentially consistent with `asleep`: either the worker sees this, or whoever posts sees that it sleeps.
        self.posted.store(true, Ordering::SeqCst);
    }

    fn take_orders(&self) -> Vec<Order> {
        if !self.posted.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).0.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The last orders.
    fn close(&self) -> Vec<Order> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).0.take().unwrap_or_default()
    }

    /// Has a task polled. On its own worker it is a push to a queue.
    fn schedule(self: &Arc<Self>, task: Runnable) {
        let here = CURRENT.try_with(|current| current.borrow().as_ref().filter(|worker| worker.has(self)).cloned());
        match here {
            Ok(Some(worker)) => worker.ready.borrow_mut().push_back(task),
            _ => {
                // It may be dropped on its own thread alone: where that has ended, it stays what it is.
                let task = ManuallyDrop::new(task);
                self.order(move |worker| worker.ready.borrow_mut().push_back(ManuallyDrop::into_inner(task)));
            }
        }
    }
}

// ---- One worker ----

thread_local! {
    static CURRENT: RefCell<Option<Rc<Worker>>> = const { RefCell::new(None) };
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

/// The outcome of a future, unless an instant comes first.
pub(crate) async fn before<T>(deadline: Instant, mut future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    let mut sleep = sleep_until(deadline);
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending => Pin::new(&mut sleep).poll(cx).map(|()| None),
    })
    .await
}

/// The outcome of a future, unless a turn of the event loop has brought none.
pub(crate) async fn within_a_turn<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    let mut turned = false;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending if turned => Poll::Ready(None),
        Poll::Pending => {
            turned = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

impl Worker {
    /// A worker with a thread of its own.
    fn start(number: usize) -> io::Result<Arc<Mailbox>> {
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
        let alarm = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(reactor.epoll(), &alarm, ALARM.data(), EventFlags::IN | EventFlags::ET)?; // So it is never read.
        let mailbox = Mailbox {
            orders: Mutex::new(Orders(Some(Vec::new()))),
            posted: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            alarm,
            epoll: Arc::clone(reactor.epoll()),
            load: AtomicUsize::new(0),
        };
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
            self.turn();
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
        self.mailbox.asleep.store(false, Ordering::Relaxed);
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
        self.mailbox.asleep.store(true, Ordering::SeqCst);
        if self.mailbox.posted.load(Ordering::SeqCst) || self.stopped.get() {
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
            error!("a worker has panicked and goes on: please report it");
        }
    }

    fn has(&self, mailbox: &Arc<Mailbox>) -> bool {
        Arc::ptr_eq(&self.mailbox, mailbox)
    }

    fn adopt(&self, number: Foreign, acceptor: Rc<dyn Readable>) {
        self.acceptors.borrow_mut().insert(number.0, acceptor);
    }

    fn disown(&self, number: Foreign) {
        let gone = self.acceptors.borrow_mut().remove(&number.0);
        drop(gone); // With it may go the last owner of anything: nothing is borrowed here.
    }

    /// Begins a task. A panic ends that task alone.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.spawn_task(task).detach();
    }

    pub(crate) fn spawn_task<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> Task<T> {
        let mailbox = Arc::clone(&self.mailbox);
        let schedule = move |task| mailbox.schedule(task);
        let (runnable, task) = async_task::spawn_local(task, schedule);
        runnable.schedule();
        task
    }

    /// Does not look at a listener for a time: clients wait meanwhile.
    pub(crate) fn mute(self: &Rc<Self>, number: Foreign, listener: &Arc<OwnedFd>, pause: Duration) {
        if epoll::delete(self.reactor.epoll(), listener).is_err() {
            return;
        }
        let (this, listener) = (Rc::downgrade(self), Arc::downgrade(listener));
        self.spawn(async move {
            loop {
                sleep_until(Instant::now() + pause).await;
                let (Some(worker), Some(listener)) = (this.upgrade(), listener.upgrade()) else { return };
                let is_gone = !worker.acceptors.borrow().contains_key(&number.0);
                if is_gone || watch_listener(worker.reactor.epoll(), &listener, number).is_ok() {
                    return;
                }
            }
        });
    }

    /// Calls `aged` for each socket whose age is counted ([`Watched::count_age`]), at its second birthday.
    pub(crate) fn grow_older(&self, aged: impl FnMut(BorrowedFd<'_>)) -> usize {
        self.reactor.grow_older(aged)
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("mailbox", &self.mailbox).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
