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
    /// Of the last turn.
    events: RefCell<Vec<Event>>,
}

/// Entries by the number that epoll hands back: the place in the lower half, and above it what tells an entry from
/// those that were there before. For where others hold the same socket (a child process that has not begun its program),
/// it goes on telling of itself after it was closed here.
#[derive(Default)]
struct Table {
    entries: Vec<Option<Rc<Entry>>>,
    vacant: Vec<u32>,
    /// Goes round below the bit of foreign ones.
    last: u32,
}

/// What is known of a socket.
struct Entry {
    socket: OwnedFd,
    number: u64,
    ready: Cell<Ready>,
    /// What its task waits for; nothing while it runs.
    wanted: Cell<Ready>,
    waker: Cell<Option<Waker>>,
    age: Cell<Age>,
}

/// Whom a relay's socket leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Party {
    /// Who has connected to us.
    Client,
    /// Whom we have connected to.
    Backend,
}

/// How often [`Reactor::grow_older`] has met a socket whose age counts.
#[derive(Clone, Copy)]
enum Age {
    Uncounted,
    Never(Party),
    Once(Party),
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
        let number = table.next_number();
        if let Err(errno) = epoll::add(&self.epoll, &socket, EventData::new_u64(number), CONNECTION) {
            return Err(Unwatched { socket, source: errno.into() });
        }
        let entry = Rc::new(Entry {
            socket,
            number,
            ready: Cell::new(Ready::empty()),
            wanted: Cell::new(Ready::empty()),
            waker: Cell::new(None),
            age: Cell::new(Age::Uncounted),
        });
        table.insert(Rc::clone(&entry));
        Ok(Watched { entry, reactor: Rc::clone(self) })
    }

    /// Waits for events at most so long (`None`: without end), notes them and wakes whom they concern. Foreign ones go
    /// to `foreign`, which may register sockets.
    pub(crate) fn turn(&self, timeout: Option<&Timespec>, mut foreign: impl FnMut(Foreign)) {
        let mut events = self.events.borrow_mut();
        events.clear();
        // Interrupted, or out of memory for a moment: the next turn asks again.
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut *events), timeout);
        for event in events.iter() {
            match event.data.u64() {
                number if number & FOREIGN_BIT != 0 => foreign(Foreign(number & !FOREIGN_BIT)),
                number => self.note(number, event.flags),
            }
        }
    }

    fn note(&self, number: u64, said: Ready) {
        let table = self.table.borrow();
        if let Some(entry) = table.get(number) {
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

    /// Hands over the sockets that it meets for the second time since their age counts; no more after that. Returns how
    /// many it has met for the first time.
    pub(crate) fn grow_older(&self, mut aged: impl FnMut(BorrowedFd<'_>, Party)) -> usize {
        let mut young = 0;
        for entry in self.table.borrow().entries.iter().flatten() {
            match entry.age.get() {
                Age::Uncounted => {}
                Age::Never(party) => {
                    entry.age.set(Age::Once(party));
                    young += 1;
                }
                Age::Once(party) => {
                    entry.age.set(Age::Uncounted);
                    aged(entry.socket.as_fd(), party);
                }
            }
        }
        young
    }
}

impl Table {
    fn next_number(&mut self) -> u64 {
        let place = self.vacant.last().copied().unwrap_or(self.entries.len() as u32);
        self.last = self.last.wrapping_add(1) & (u32::MAX >> 1);
        u64::from(self.last) << 32 | u64::from(place)
    }

    fn get(&self, number: u64) -> Option<&Rc<Entry>> {
        self.entries.get(place(number))?.as_ref().filter(|entry| entry.number == number)
    }

    /// At the place of its number, which is the last one given.
    fn insert(&mut self, entry: Rc<Entry>) {
        match self.vacant.pop() {
            Some(place) => self.entries[place as usize] = Some(entry),
            None => self.entries.push(Some(entry)),
        }
    }

    fn remove(&mut self, number: u64) {
        self.entries[place(number)] = None;
        self.vacant.push(place(number) as u32);
    }
}

fn place(number: u64) -> usize {
    number as u32 as usize
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

    /// The kernel tells nothing of it any more. For a socket that another process has, too: closing alone would not do.
    pub(crate) fn forget(&self) {
        let _ = epoll::delete(&self.reactor.epoll, &self.entry.socket); // Not there only where it never was.
    }

    /// Lets it be handed over by the second [`Reactor::grow_older`] from now.
    pub(crate) fn count_age(&self, party: Party) {
        self.entry.age.set(Age::Never(party));
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
        self.reactor.table.borrow_mut().remove(self.entry.number); // The socket is closed after this, nothing borrowed.
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const NO_TIME: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

    /// Counts how often it is rung.
    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Bell {
        fn rung(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn reactor() -> Rc<Reactor> {
        Rc::new(Reactor::new().expect("an epoll instance"))
    }

    fn look(reactor: &Reactor) {
        reactor.turn(Some(&NO_TIME), |number| panic!("nobody gave {number:?}"));
    }

    fn watched(reactor: &Rc<Reactor>) -> (UnixStream, Watched) {
        let (far, near) = UnixStream::pair().expect("sockets");
        near.set_nonblocking(true).expect("a flag");
        (far, reactor.watch(near.into()).expect("an epoll instance with room"))
    }

    fn read(watched: &Watched) -> io::Result<Option<usize>> {
        watched.attempt(READABLE, |socket| rustix::io::read(socket, &mut [0; 16]))
    }

    fn is_ready(watched: &Watched, bell: &Arc<Bell>, wanted: Ready) -> bool {
        let waker = Waker::from(Arc::clone(bell));
        watched.poll_ready(&mut Context::from_waker(&waker), wanted).is_ready()
    }

    #[test]
    fn given_a_socket_when_the_kernel_tells_of_it_then_that_is_noted_until_a_call_finds_it_over() {
        let (reactor, bell) = (reactor(), Arc::<Bell>::default());
        let (mut far, near) = watched(&reactor);

        for round in 1..4 {
            look(&reactor);
            assert!(!is_ready(&near, &bell, READABLE));
            far.write_all(b"x").expect("room");
            look(&reactor);

            assert_eq!(bell.rung(), round);
            assert!(is_ready(&near, &bell, READABLE));
            assert_eq!(read(&near).expect("a socket"), Some(1));
            assert!(is_ready(&near, &bell, READABLE), "nobody has found out that this was all");
            assert_eq!(read(&near).expect("a socket"), None);
        }
    }

    #[test]
    fn given_a_task_that_waits_for_two_things_when_either_comes_then_it_wakes_once() {
        let (reactor, bell) = (reactor(), Arc::<Bell>::default());
        let (mut far, near) = watched(&reactor);
        assert!(!is_ready(&near, &bell, Ready::ERR));
        assert!(!is_ready(&near, &bell, READABLE));

        far.write_all(b"x").expect("room");
        look(&reactor);
        far.write_all(b"y").expect("room");
        look(&reactor);

        assert_eq!(bell.rung(), 1, "it has not looked since");
    }

    #[test]
    fn given_a_task_that_waits_for_something_else_when_the_kernel_tells_then_it_sleeps_on() {
        let (reactor, bell) = (reactor(), Arc::<Bell>::default());
        let (mut far, near) = watched(&reactor);
        assert!(!is_ready(&near, &bell, Ready::ERR));

        far.write_all(b"x").expect("room");
        look(&reactor);

        assert_eq!(bell.rung(), 0);
        assert!(is_ready(&near, &bell, READABLE));
    }

    #[test]
    fn given_more_events_than_are_taken_at_once_when_looked_at_twice_then_all_have_come() {
        let reactor = reactor();
        let sockets: Vec<_> = (0..EVENTS + 44)
            .map(|_| {
                let (mut far, near) = watched(&reactor);
                far.write_all(b"x").expect("room");
                let bell = Arc::<Bell>::default();
                assert!(!is_ready(&near, &bell, READABLE));
                (far, near, bell)
            })
            .collect();
        let rung = || sockets.iter().map(|(.., bell)| bell.rung()).sum::<usize>();

        look(&reactor);
        assert_eq!(rung(), EVENTS);
        look(&reactor);

        assert_eq!(rung(), EVENTS + 44);
    }

    /// The kernel takes a socket out at its last close, and a copy is not closed here.
    #[test]
    fn given_a_place_that_is_used_again_when_a_copy_of_the_last_socket_tells_then_the_next_knows_nothing_of_it() {
        let reactor = reactor();
        let (mut far, near) = watched(&reactor);
        let _copy = near.as_fd().try_clone_to_owned().expect("a descriptor");
        let last = near.entry.number;
        drop(near);

        let (_next_far, next) = watched(&reactor);
        far.write_all(b"x").expect("room");
        look(&reactor);

        assert_eq!(place(next.entry.number), place(last));
        assert!(!next.ready().contains(Ready::IN));
    }

    #[test]
    fn given_sockets_that_come_and_go_when_counted_then_the_table_is_as_long_as_the_most_at_once() {
        let reactor = reactor();

        for _ in 0..100 {
            let _some = [watched(&reactor), watched(&reactor), watched(&reactor)];
        }

        let table = reactor.table.borrow();
        assert_eq!((table.entries.len(), table.vacant.len()), (3, 3));
    }

    #[test]
    fn given_what_epoll_does_not_take_when_watched_then_it_comes_back_and_no_place_is_lost() {
        let reactor = reactor();
        let file = File::open("/proc/self/exe").expect("this program");

        let unwatched = reactor.watch(file.into()).expect_err("a file is always ready");

        assert_eq!(Errno::from_io_error(&unwatched.source), Some(Errno::PERM));
        rustix::fs::fstat(&unwatched.socket).expect("an open descriptor");
        let (mut far, near) = watched(&reactor);
        far.write_all(b"x").expect("room");
        look(&reactor);
        assert!(near.ready().contains(Ready::IN));
    }

    #[test]
    fn given_tasks_that_wait_when_all_are_woken_or_forgotten_then_their_wakers_ring_or_go() {
        let (reactor, bell) = (reactor(), Arc::<Bell>::default());
        let (_far, near) = watched(&reactor);
        assert!(!is_ready(&near, &bell, READABLE));

        reactor.wake_all();
        assert_eq!(bell.rung(), 1);
        reactor.abandon();

        assert_eq!(Arc::strong_count(&bell), 1);
    }

    #[test]
    fn given_a_socket_that_others_know_by_a_number_when_it_is_ready_then_they_are_told_the_number() {
        let reactor = reactor();
        let number = Foreign(u64::MAX >> 1);
        let event = eventfd(1, EventfdFlags::CLOEXEC).expect("a descriptor");
        epoll::add(reactor.epoll(), &event, number.data(), Ready::IN).expect("an epoll instance with room");

        let mut told = Vec::new();
        reactor.turn(Some(&NO_TIME), |number| told.push(number));

        assert_eq!(told, [number]);
    }

    #[test]
    fn given_sockets_whose_age_counts_when_they_grow_older_then_each_is_handed_over_once() {
        let reactor = reactor();
        let [(_a, first), (_b, second), (_c, _other)] = [(); 3].map(|()| watched(&reactor));
        let older = || {
            let mut aged = Vec::new();
            (reactor.grow_older(|_, party| aged.push(party)), aged)
        };

        first.count_age(Party::Client);
        assert_eq!(older(), (1, vec![]));
        second.count_age(Party::Backend);

        assert_eq!([older(), older(), older()], [(1, vec![Party::Client]), (0, vec![Party::Backend]), (0, vec![])]);
    }
}
