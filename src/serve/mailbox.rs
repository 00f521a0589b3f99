//! What other threads know of a worker: where to leave orders, and how busy it is.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::epoll::{self, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use crate::serve::reactor::Foreign;
use crate::serve::worker::Worker;

/// Something to be done by a worker.
pub(crate) type Order = Box<dyn FnOnce(&Rc<Worker>) + Send>;

/// What other threads know of a worker.
#[derive(Debug)]
pub(crate) struct Mailbox {
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
    /// An empty one, whose alarm ends this event loop's sleep.
    ///
    /// # Errors
    /// No descriptor or memory is left.
    pub(crate) fn new(epoll: &Arc<OwnedFd>, alarm_number: Foreign) -> io::Result<Self> {
        let alarm = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(epoll, &alarm, alarm_number.data(), EventFlags::IN | EventFlags::ET)?; // So it is never read.
        Ok(Self {
            orders: Mutex::new(Orders(Some(Vec::new()))),
            posted: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            alarm,
            epoll: Arc::clone(epoll),
            load: AtomicUsize::new(0),
        })
    }

    /// Tasks that count ([`Seat`]).
    pub(crate) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// The event loop, for a listener to be watched.
    pub(crate) fn epoll(&self) -> &OwnedFd {
        &self.epoll
    }

    /// The worker is about to sleep: from here on an order wakes it. False where one is there already.
    pub(crate) fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        !self.posted.load(Ordering::SeqCst)
    }

    /// The worker sleeps no longer.
    pub(crate) fn is_awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Has something done in the worker's next turn, which begins now. Dropped undone where the worker has ended.
    pub(crate) fn order(&self, order: impl FnOnce(&Rc<Worker>) + Send + 'static) {
        self.order_in_time(order);
        if self.asleep.swap(false, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.alarm, &1_u64.to_ne_bytes()); // A full counter has rung already.
        }
    }

    /// Has something done in the worker's next turn, whenever that is.
    pub(crate) fn order_in_time(&self, order: impl FnOnce(&Rc<Worker>) + Send + 'static) {
        let order: Order = Box::new(order); // Dropped after the lock: with it goes whatever it holds.
        match &mut self.orders.lock().unwrap_or_else(PoisonError::into_inner).0 {
            Some(orders) => orders.push(order),
            None => return,
        }
        // Sequentially consistent with `asleep`: either the worker sees this, or whoever posts sees that it sleeps.
        self.posted.store(true, Ordering::SeqCst);
    }

    pub(crate) fn take_orders(&self) -> Vec<Order> {
        if !self.posted.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).0.as_mut().map(std::mem::take).unwrap_or_default()
    }

    #[cfg(test)]
    pub(crate) fn is_closed(&self) -> bool {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).0.is_none()
    }

    /// The last orders.
    pub(crate) fn close(&self) -> Vec<Order> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).0.take().unwrap_or_default()
    }
}

/// One of the tasks that count as a worker's load. Kept by the task.
#[derive(Debug)]
pub(crate) struct Seat(Arc<Mailbox>);

impl Seat {
    pub(crate) fn take(mailbox: &Arc<Mailbox>) -> Self {
        mailbox.load.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(mailbox))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}
