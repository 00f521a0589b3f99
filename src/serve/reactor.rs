//! The sockets of one thread, and what the kernel has said of each: an epoll instance with a table beside it.
//!
//! A socket is registered once, for everything, and told of by edges: what was said stays noted until a call on the socket
//! finds out that it is over. All of it belongs to one thread, so nothing is noted while somebody looks at it, and a
//! socket is closed without telling epoll: the kernel takes it out. One task at a time waits for a socket.
//!
//! Which task runs when is `worker`; the calls on sockets are in `stream`.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::io::Errno;

/// What the kernel says of a socket.
pub(crate) type Ready = EventFlags;

/// A read may give something, an error or the end of stream included.
pub(crate) const READABLE: Ready = Ready::IN.union(Ready::RDHUP).union(Ready::HUP).union(Ready::ERR);
/// A write may take something, or fail.
pub(crate) const WRITABLE: Ready = Ready::OUT.union(Ready::HUP).union(Ready::ERR);

/// All that epoll can tell of a connection, at each change.
const CONNECTION: Ready = Ready::IN.union(Ready::OUT).union(Ready::PRI).union(Ready::RDHUP).union(Ready::ET);

/// Tells sockets that other threads know by a number of their own from those of this thread's table.
const FOREIGN_BIT: u64 = 1 << 63;

/// Events taken at once. What is ready beyond these comes next: epoll goes round.
const EVENTS: usize = 256;

/// The epoll instance of one thread, which others may add their own to, and the table of this thread's sockets.
pub(crate) struct Reactor {
    epoll: Arc<OwnedFd>,
    table: RefCell<Table>,
    /// Empty between turns.
    events: RefCell<Vec<Event>>,
}

/// Entries by the number that epoll hands back.
#[derive(Default)]
struct Table {
    entries: Vec<Option<Rc<Entry>>>,
    vacant: Vec<u32>,
}

/// What is known of a socket.
struct Entry {
    socket: OwnedFd,
    index: u32,
    ready: Cell<Ready>,
    /// What its task waits for; nothing while it runs.
    wanted: Cell<Ready>,
    waker: Cell<Option<Waker>>,
    age: Cell<u8>,
}

/// A socket in the table. Dropped, it is closed.
pub(crate) struct Watched {
    entry: Rc<Entry>,
    reactor: Rc<Reactor>,
}

/// The kernel watches no more sockets: no memory is left, or its limit of watched descriptors is reached.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch a socket")]
pub(crate) struct Unwatched {
    /// The socket.
    pub(crate) socket: OwnedFd,
    /// What the kernel said.
    pub(crate) source: io::Error,
}

impl From<Unwatched> for io::Error {
    fn from(unwatched: Unwatched) -> Self {
        unwatched.source
    }
}

/// A socket that other threads have put on the epoll instance, by the number that they gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Foreign(pub(crate) u64);

impl Foreign {
    /// To be added to a thread's epoll instance by another thread. The number is below 2⁶³.
    pub(crate) fn data(self) -> EventData {
        EventData::new_u64(FOREIGN_BIT | self.0)
    }
}

impl Reactor {
    /// An epoll instance without sockets.
    ///
    /// # Errors
    /// No descriptor or no memory is left.
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        Ok(Self { epoll, table: RefCell::default(), events: RefCell::new(Vec::with_capacity(EVENTS)) })
    }

    /// The epoll instance, for what is told by [`Foreign`] numbers.
    pub(crate) fn epoll(&self) -> &Arc<OwnedFd> {
        &self.epoll
    }

    /// Registers a connection.
    ///
    /// # Errors
    /// [`Unwatched`], with the socket.
    pub(crate) fn watch(self: &Rc<Self>, socket: OwnedFd) -> Result<Watched, Unwatched> {
        let mut table = self.table.borrow_mut();
        let index = table.vacant.last().copied().unwrap_or(table.entries.len() as u32);
        if let Err(errno) = epoll::add(&self.epoll, &socket, EventData::new_u64(index.into()), CONNECTION) {
            return Err(Unwatched { socket, source: errno.into() });
        }
        let entry = Rc::new(Entry {
            socket,
            index,
            ready: Cell::new(Ready::empty()),
            wanted: Cell::new(Ready::empty()),
            waker: Cell::new(None),
            age: Cell::new(0),
        });
        match table.vacant.pop() {
            Some(index) => table.entries[index as usize] = Some(Rc::clone(&entry)),
            None => table.entries.push(Some(Rc::clone(&entry))),
        }
        Ok(Watched { entry, reactor: Rc::clone(self) })
    }

    /// Waits for events at most so long (`None`: without end), notes them and wakes whom they concern. Foreign ones go
    /// to `foreign`, which may register sockets.
    pub(crate) fn turn(&self, timeout: Option<&Timespec>, mut foreign: impl FnMut(Foreign)) {
        let mut events = std::mem::take(&mut *self.events.borrow_mut());
        events.clear();
        // Interrupted, or out of memory for a moment: the next turn asks again.
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), timeout);
        for event in &events {
            match event.data.u64() {
                number if number & FOREIGN_BIT != 0 => foreign(Foreign(number & !FOREIGN_BIT)),
                index => self.note(index as usize, event.flags),
            }
        }
        self.events.replace(events);
    }

    fn note(&self, index: usize, said: Ready) {
        let table = self.table.borrow();
        if let Some(entry) = table.entries.get(index).and_then(Option::as_ref) {
            entry.ready.set(entry.ready.get() | said);
            if entry.wanted.get().intersects(said) {
                entry.wake();
            }
        }
    }

    /// Forgets who waits for sockets, so that tasks which nobody else could wake come to their end.
    pub(crate) fn abandon(&self) {
        let wakers: Vec<_> = self.table.borrow().entries.iter().flatten().map(|entry| entry.waker.take()).collect();
        drop(wakers); // Their tasks may close sockets now.
    }

    /// Wakes all tasks that wait for a socket.
    pub(crate) fn wake_all(&self) {
        self.table.borrow().entries.iter().flatten().for_each(|entry| entry.wake());
    }

    /// Hands over the sockets of age 2 (they are of age 0 then), and makes those of age 1 a year older. Returns how many
    /// have an age yet.
    pub(crate) fn grow_older(&self, mut aged: impl FnMut(BorrowedFd<'_>)) -> usize {
        let mut young = 0;
        for entry in self.table.borrow().entries.iter().flatten() {
            match entry.age.get() {
                0 => {}
                1 => {
                    entry.age.set(2);
                    young += 1;
                }
                _ => {
                    entry.age.set(0);
                    aged(entry.socket.as_fd());
                }
            }
        }
        young
    }
}

impl Entry {
    fn wake(&self) {
        self.wanted.set(Ready::empty());
        if let Some(waker) = self.waker.take() {
            waker.wake_by_ref();
            self.waker.set(Some(waker)); // Most likely the same task waits next.
        }
    }

    fn wait(&self, wanted: Ready, waker: &Waker) {
        self.wanted.set(self.wanted.get() | wanted);
        let last = self.waker.take().filter(|last| last.will_wake(waker));
        self.waker.set(Some(last.unwrap_or_else(|| waker.clone())));
    }
}

impl Watched {
    /// What is known, as far as it is wanted; pending where nothing of that is, and then the task will be woken.
    pub(crate) fn poll_ready(&self, cx: &mut Context<'_>, wanted: Ready) -> Poll<Ready> {
        let ready = self.ready() & wanted;
        if ready.is_empty() {
            self.entry.wait(wanted, cx.waker());
            return Poll::Pending;
        }
        Poll::Ready(ready)
    }

    /// What is known.
    pub(crate) fn ready(&self) -> Ready {
        self.entry.ready.get()
    }

    /// Notes that something is over, until the kernel says it again.
    pub(crate) fn clear(&self, over: Ready) {
        self.entry.ready.set(self.ready() - over);
    }

    /// Makes a call, and notes where the kernel says "not now": then there is no outcome.
    pub(crate) fn attempt<T>(
        &self,
        needs: Ready,
        call: impl FnOnce(&OwnedFd) -> rustix::io::Result<T>,
    ) -> io::Result<Option<T>> {
        match call(&self.entry.socket) {
            Ok(outcome) => Ok(Some(outcome)),
            Err(Errno::AGAIN) => {
                self.clear(needs);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Lets it be handed over by the second [`Reactor::grow_older`] from now.
    pub(crate) fn count_age(&self) {
        self.entry.age.set(1);
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.entry.socket.as_fd()
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({:?})", self.entry.socket, self.ready())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut table = self.reactor.table.borrow_mut();
        if let Some(entry) = table.entries.get_mut(self.entry.index as usize) {
            *entry = None;
            table.vacant.push(self.entry.index);
        }
    }
}
