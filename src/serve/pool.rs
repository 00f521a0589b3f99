//! The workers of a process: who carries a new connection, and who watches a listener.
//!
//! What is new goes where least is open ([`Pool::place`]); that is all the balancing there is, and no worker ever takes
//! from another. A listener is watched by some of them ([`Pool::listen`]), and an arrival wakes one.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use rustix::event::epoll;
use tokio::sync::oneshot;

use crate::serve::mailbox::{Mailbox, Seat};
use crate::serve::moving_stream::WorkerLines;
use crate::serve::reactor::Foreign;
use crate::serve::worker::{self, Readable, Worker};

/// How many workers watch a listener. What they accept goes to all of them.
///
/// Each costs a descriptor's watch in the kernel, times ten thousand listeners; and it takes few to accept what many
/// can carry.
const ACCEPTORS: usize = 4;

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
            worker::watch_listener(mailbox.epoll(), listener, number)?;
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
        let seat = Seat::take(mailbox.unwrap_or(here.mailbox()));
        match mailbox {
            None => here.spawn(task(seat)),
            Some(mailbox) => mailbox.order(move |worker| worker.spawn(task(seat))),
        }
    }

    /// Runs a task on the worker that has least to do.
    pub(crate) fn place_anywhere<F: Future<Output = ()> + 'static>(
        &self,
        task: impl FnOnce(Seat) -> F + Send + 'static,
    ) {
        let Some(mailbox) = self.workers.iter().min_by_key(|mailbox| mailbox.load()) else { return };
        let seat = Seat::take(mailbox);
        mailbox.order(move |worker| worker.spawn(task(seat)));
    }

    /// The workers, for a hand-over.
    pub(crate) fn lines(&self) -> WorkerLines {
        WorkerLines::new(self.workers.clone())
    }

    /// Compares with one other, another one each time: so that all come to be compared, and each time it is cheap.
    fn less_busy_than(&self, here: &Worker) -> Option<&Arc<Mailbox>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let other = &self.workers[turn % self.workers.len()];
        let load = other.load();
        (here.mailbox().load() > load + load / 4).then_some(other)
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
        self.workers.iter().for_each(|mailbox| mailbox.order(|worker| worker.wake_all()));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.workers.iter().for_each(|mailbox| mailbox.order(|worker| worker.stop()));
    }
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
            let _ = epoll::delete(worker.epoll(), &listener);
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

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
