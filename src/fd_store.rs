//! The sockets that the supervisor keeps for the next process: systemd's descriptor store (`FileDescriptorStoreMax=`).
//!
//! A crash, `kill -9` or `systemctl restart` closes no listener then: who comes meanwhile waits in the kernel until the next
//! process is given them (`given`). How the supervisor is told is in `supervisor`, when, in `serve::bound`.
//!
//! *What is kept*: the sockets of listeners that let somebody in. Not those that are parked: the kernel refuses who comes
//! there, with a socket and without. Not those of our own servers: a probe is to hear at once that nobody answers. And no
//! connections: bytes that were read from one side and not yet written to the other are in this process or in a pipe of it
//! at any moment, and after a kill at such a moment the peers would go on with a gap between them. A reset tells them.
//!
//! *What it takes.* A kept socket is open until the supervisor closes it, too, whatever is done here: the kernel lets
//! clients in whom nobody will ever serve, and the address is taken. So the supervisor is told of each listener that ends for
//! good, a TCP socket is shut down besides, which no copy of it survives, and nothing is bound before the supervisor has done
//! what it was told. What a process that is killed has not told is made good by the next one: it closes what nobody wants.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use crate::name::ListenKey;
use crate::stats::PROCESS;
use crate::supervisor::{MOST_DESCRIPTORS, Supervisor};

/// When the supervisor is told again what it did not take.
const RETRY: Duration = Duration::from_secs(1);
/// While nothing has to be told again, there is nothing to wake up for.
const NO_HURRY: Duration = Duration::from_secs(3600);

/// What is kept. Owned by the listeners, by value; a thread tells the supervisor. `Default`: nothing is.
#[derive(Debug, Default)]
pub(crate) struct FdStore {
    /// To the thread; `None` where there is no supervisor.
    orders: Option<Sender<Order>>,
    /// Descriptors that the supervisor keeps at most. From its `FDSTORE`.
    limit: usize,
    /// How many more these may be.
    room: usize,
    /// How many sockets each listener has there.
    kept: BTreeMap<ListenKey, usize>,
    /// True where the supervisor was told to forget, and may still have it.
    is_unsettled: bool,
    /// True once it was said that not all are kept.
    has_told: bool,
}

/// What the thread is to tell.
#[derive(Debug)]
enum Order {
    Keep(String, Vec<OwnedFd>),
    Forget(String),
    /// That it is carried out, whatever was told before.
    Settle(oneshot::Sender<()>),
}

/// What a listener's sockets are called: ASCII without a colon, which is the supervisor's own. It is never read: what a
/// socket is, the kernel tells.
pub(crate) fn name(key: &ListenKey) -> String {
    let protocol = key.protocol.as_str().to_ascii_lowercase();
    format!("{protocol}-{}-{}", key.ip().to_string().replace(':', "_"), key.port())
}

impl FdStore {
    /// Nothing is kept yet. `limit`: how many descriptors may be, as the supervisor says; with 0 it is only told what to
    /// forget.
    ///
    /// # Errors
    /// No thread is left.
    pub(crate) fn start(limit: usize) -> io::Result<Self> {
        Supervisor::of_this_process().map_or_else(|| Ok(Self::default()), |supervisor| Self::of(supervisor, limit))
    }

    fn of(supervisor: Supervisor, limit: usize) -> io::Result<Self> {
        let (orders, inbox) = channel();
        let teller = Teller { supervisor, owed: Vec::new(), has_warned: false };
        thread::Builder::new().name("fd-store".into()).spawn(move || teller.run(&inbox))?;
        Ok(Self { orders: Some(orders), limit, room: limit, ..Self::default() })
    }

    /// Has a listener's sockets kept from now on, until it is [forgotten](Self::forget). False where they are not.
    pub(crate) fn keep(&mut self, key: ListenKey, sockets: &[impl AsFd]) -> bool {
        if self.limit == 0 || self.orders.is_none() {
            return false;
        }
        if self.kept.contains_key(&key) {
            return true;
        }
        if sockets.len() > self.room {
            self.tell_once(&key, "the supervisor has no room for more", "raise FileDescriptorStoreMax=");
            return false;
        }
        let copies: io::Result<Vec<_>> = sockets.iter().map(|socket| socket.as_fd().try_clone_to_owned()).collect();
        let Ok(copies) = copies else {
            self.tell_once(&key, "no descriptor is left for copies", "raise LimitNOFILE=");
            return false;
        };
        self.room -= copies.len();
        self.kept.insert(key, copies.len());
        self.order(Order::Keep(name(&key), copies))
    }

    /// The listener ends for good, or lets nobody in any more.
    pub(crate) fn forget(&mut self, key: &ListenKey) {
        if let Some(count) = self.kept.remove(key) {
            self.room += count;
            self.forget_name(name(key));
        }
    }

    /// What is called so is not kept any more, whoever has had it kept.
    pub(crate) fn forget_name(&mut self, name: String) {
        self.is_unsettled |= self.order(Order::Forget(name));
    }

    /// Resolves once the addresses are free of all that was forgotten, or after a second: binding says whether they are.
    pub(crate) async fn settled(&mut self) {
        if !std::mem::take(&mut self.is_unsettled) {
            return;
        }
        let (tell, told) = oneshot::channel();
        if self.order(Order::Settle(tell)) {
            let _ = told.await; // An error means that the thread has panicked: nothing is kept any more.
        }
    }

    /// Says how much a crash would leave open, where it would.
    pub(crate) fn tell(&self) {
        if self.limit > 0 && self.orders.is_some() {
            let (listeners, limit) = (self.kept.len(), self.limit);
            info!(listeners, limit, "the supervisor keeps sockets: a crash or a restart does not close them");
        }
    }

    fn order(&self, order: Order) -> bool {
        PROCESS.kept_listeners.set(self.kept.len() as u64);
        self.orders.as_ref().is_some_and(|orders| orders.send(order).is_ok())
    }

    /// Once, for all that may come: a Service more or less is no news.
    fn tell_once(&mut self, key: &ListenKey, reason: &str, remedy: &str) {
        if !std::mem::replace(&mut self.has_told, true) {
            let limit = self.limit;
            warn!(listen = %key, limit, reason, remedy, "a crash would close this listener, and maybe others");
        }
    }
}

/// The thread: the supervisor takes messages one by one, and who serves does not wait for it.
struct Teller {
    supervisor: Supervisor,
    /// What it is still to forget.
    owed: Vec<String>,
    /// True while it does not take what it is told.
    has_warned: bool,
}

impl Teller {
    /// Until the listeners are dropped.
    fn run(mut self, inbox: &Receiver<Order>) {
        loop {
            let order = match inbox.recv_timeout(if self.owed.is_empty() { NO_HURRY } else { RETRY }) {
                Ok(order) => Some(order),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let owed = std::mem::take(&mut self.owed);
            owed.into_iter().for_each(|name| self.forget(name));
            match order {
                Some(Order::Keep(name, sockets)) => self.keep(&name, &sockets),
                Some(Order::Forget(name)) => self.forget(name),
                Some(Order::Settle(tell)) => {
                    if let Err(error) = self.supervisor.settle() {
                        debug!(%error, "the supervisor does not say that it has closed what it was to forget");
                    }
                    let _ = tell.send(()); // Whoever has asked may be gone.
                }
                None => {}
            }
        }
    }

    fn keep(&mut self, name: &str, sockets: &[OwnedFd]) {
        if self.owed.iter().any(|owed| owed == name) {
            return; // It would be forgotten together with what went before.
        }
        // FDPOLL=0: else the supervisor watches for their end, and the kernel calls on it for each client and each datagram.
        let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        for some in sockets.chunks(MOST_DESCRIPTORS) {
            let some: Vec<_> = some.iter().map(AsFd::as_fd).collect();
            let outcome = self.supervisor.send(&text, &some);
            self.note(&outcome);
        }
    }

    /// Until it has done so, whoever comes there waits for nobody.
    fn forget(&mut self, name: String) {
        let outcome = self.supervisor.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
        self.note(&outcome);
        if outcome.is_err() {
            self.owed.push(name);
        }
    }

    fn note(&mut self, outcome: &io::Result<()>) {
        match outcome {
            Ok(()) => self.has_warned = false,
            Err(error) if !std::mem::replace(&mut self.has_warned, true) => {
                warn!(%error, "the supervisor cannot be told which sockets to keep");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{SocketAddr, UdpSocket};
    use std::path::Path;

    use super::*;
    use crate::name::Protocol;
    use crate::supervisor::tests::Listener;

    fn key(number: u16) -> ListenKey {
        ListenKey::new([127, 85, 10, 1].into(), number, Protocol::Udp)
    }

    fn sockets(count: usize) -> Vec<UdpSocket> {
        (0..count).map(|_| UdpSocket::bind("127.0.0.1:0").expect("a free port")).collect()
    }

    fn text(words: &str, number: u16) -> String {
        format!("{words}\nFDNAME=udp-127.85.10.1-{number}")
    }

    #[test]
    fn f21_given_listen_keys_when_named_then_each_name_is_another_one_that_the_supervisor_takes() {
        let keys = ["10.96.0.1:80", "10.96.0.1:8080", "[fd96::1]:80", "[fd96::1:80]:80", "[::]:80"]
            .map(|address| address.parse::<SocketAddr>().expect("an address"))
            .map(|address| [ListenKey::at(address, Protocol::Tcp), ListenKey::at(address, Protocol::Udp)]);

        let names: BTreeSet<_> = keys.as_flattened().iter().map(name).collect();

        assert_eq!(names.len(), 10);
        assert!(names.contains("tcp-10.96.0.1-80") && names.contains("udp-fd96__1_80-80"), "{names:?}");
        let fits =
            |name: &String| name.len() <= 255 && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':');
        assert!(names.iter().all(fits), "{names:?}");
    }

    #[test]
    fn f21_given_room_for_three_when_more_are_to_be_kept_then_these_wait_until_some_are_forgotten() {
        let (listener, supervisor) = Listener::new("room");
        let mut store = FdStore::of(supervisor, 3).expect("a thread");

        assert!(store.keep(key(1), &sockets(2)));
        assert!(!store.keep(key(2), &sockets(2)), "no room");
        assert!(store.keep(key(3), &sockets(1)));
        assert!(store.keep(key(3), &sockets(1)), "it is, already");
        store.forget(&key(2));
        store.forget(&key(1));
        assert!(store.keep(key(2), &sockets(2)));

        let keeps = "FDSTORE=1\nFDPOLL=0";
        for (words, number, count) in [(keeps, 1, 2), (keeps, 3, 1), ("FDSTOREREMOVE=1", 1, 0), (keeps, 2, 2)] {
            let (heard, descriptors) = listener.hear();
            assert_eq!((heard, descriptors.len()), (text(words, number), count));
        }
    }

    #[tokio::test]
    async fn f21_given_something_to_forget_when_settled_then_the_supervisor_has_read_it_and_else_nobody_waits() {
        let (listener, supervisor) = Listener::new("settled");
        let mut store = FdStore::of(supervisor, 1).expect("a thread");
        store.settled().await;
        assert!(store.keep(key(1), &sockets(1)));
        store.settled().await;
        let hearing = thread::spawn(move || [listener.hear().0, listener.hear().0, listener.hear().0]);

        store.forget(&key(1));
        store.settled().await;

        let heard = hearing.join().expect("no panic");
        assert_eq!(heard, [text("FDSTORE=1\nFDPOLL=0", 1), text("FDSTOREREMOVE=1", 1), "BARRIER=1".into()]);
    }

    #[test]
    fn f21_given_a_supervisor_that_cannot_be_told_when_something_is_to_be_forgotten_then_it_is_owed() {
        let nobody = Supervisor::at(Path::new("/nowhere/notify")).expect("a short path");
        let mut teller = Teller { supervisor: nobody, owed: Vec::new(), has_warned: false };

        teller.forget("a".into());
        let (listener, supervisor) = Listener::new("owed");
        teller.supervisor = supervisor;
        teller.keep("a", &[sockets(1).remove(0).into()]);
        teller.keep("b", &[sockets(1).remove(0).into()]);

        assert_eq!(teller.owed, ["a"]);
        assert_eq!(listener.hear().0, "FDSTORE=1\nFDPOLL=0\nFDNAME=b", "the other one would be forgotten at once");
    }

    #[tokio::test]
    async fn given_no_supervisor_when_a_listener_comes_and_goes_then_nothing_is_kept_and_nobody_waits() {
        let mut store = FdStore::default();

        assert!(!store.keep(key(1), &sockets(1)));
        store.forget(&key(1));
        store.forget_name("anything".into());
        store.settled().await;
    }
}
