//! Listening sockets by the thousand that hardly anybody calls: behind one descriptor of the runtime, and one task.
//!
//! The sockets are in an epoll instance of their own, and only that one is registered with the runtime: a socket that
//! nobody calls costs what the kernel keeps for it, and an entry here. Who listens where is the owner's business, what is
//! said on a connection its task's.

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::net;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use crate::http_server::ACCEPT_PAUSE;
use crate::serve::socket;

/// Orders that wait for the task.
const QUEUE: usize = 64;
const NO_TIME: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// The owner's end: opens and closes. Each socket has a label, which comes with its connections. Dropped, all are closed.
#[derive(Debug)]
pub(crate) struct ListenerSet<T> {
    epoll: Arc<OwnedFd>,
    orders: mpsc::Sender<Order<T>>,
    last: u64,
}

/// The task's end: the connections. Owned by that task, by value.
#[derive(Debug)]
pub(crate) struct Calls<T> {
    epoll: AsyncFd<Arc<OwnedFd>>,
    orders: mpsc::Receiver<Order<T>>,
    listening: HashMap<Number, Listening<T>>,
    /// No accept before this, as the last one failed.
    pause: Option<Instant>,
    /// True where that was said, and nobody has been accepted since.
    told: bool,
}

/// A socket of a set. None is given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Number(u64);

#[derive(Debug)]
struct Listening<T> {
    socket: Arc<OwnedFd>,
    label: T,
}

#[derive(Debug)]
enum Order<T> {
    Open(Number, Listening<T>),
    Close(Number, oneshot::Sender<()>),
    Copy(Number, oneshot::Sender<io::Result<OwnedFd>>),
}

/// An empty set. Needs a tokio runtime.
///
/// # Errors
/// No descriptor or no memory is left.
pub(crate) fn listener_set<T>() -> io::Result<(ListenerSet<T>, Calls<T>)> {
    let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
    let (orders, inbox) = mpsc::channel(QUEUE);
    let calls =
        Calls { epoll: watch(Arc::clone(&epoll))?, orders: inbox, listening: HashMap::new(), pause: None, told: false };
    Ok((ListenerSet { epoll, orders, last: 0 }, calls))
}

#[allow(unsafe_code)] // The runtime's only way to watch a descriptor that is not one of its own sockets.
fn watch(epoll: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the Arc goes into the AsyncFd: the descriptor that it leads to stays open, and the same one, until that is
    // dropped.
    Ok(unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) }?)
}

impl<T> ListenerSet<T> {
    /// Takes a listening socket that does not block.
    ///
    /// # Errors
    /// The kernel watches no more sockets. Then this one is closed.
    pub(crate) async fn add(&mut self, socket: OwnedFd, label: T) -> io::Result<Number> {
        self.last += 1;
        let (number, socket) = (Number(self.last), Arc::new(socket));
        // The task knows it before the kernel tells of it. Where the task is gone, so is everything that it had.
        let _ = self.orders.send(Order::Open(number, Listening { socket: Arc::clone(&socket), label })).await;
        let watched = epoll::add(&self.epoll, &socket, EventData::new_u64(number.0), EventFlags::IN);
        drop(socket); // From here on the task alone holds it.
        if let Err(error) = watched {
            self.close(number).await;
            return Err(error.into());
        }
        Ok(number)
    }

    /// Another descriptor of a socket, for another process.
    ///
    /// # Errors
    /// No descriptor is left, or the socket is closed.
    pub(crate) async fn copy(&self, number: Number) -> io::Result<OwnedFd> {
        let (told, copy) = oneshot::channel();
        let _ = self.orders.send(Order::Copy(number, told)).await; // An error means that the task is gone, as below.
        copy.await.unwrap_or_else(|_| Err(io::Error::other("nobody listens there")))
    }

    /// Closes a socket. When this is done, its address is free. Its connections go on.
    pub(crate) async fn close(&self, number: Number) {
        let (done, closed) = oneshot::channel();
        if self.orders.send(Order::Close(number, done)).await.is_ok() {
            let _ = closed.await; // An error means that the task is gone, and its sockets with it.
        }
    }
}

impl<T: Clone> Calls<T> {
    /// The next connection, and the label of the socket that it came to; `None` once the set has been dropped.
    pub(crate) async fn next(&mut self) -> Option<(TcpStream, T)> {
        loop {
            let paused = self.pause.is_some();
            tokio::select! {
                biased;
                order = self.orders.recv() => self.obey(order?),
                () = at(self.pause) => self.pause = None,
                ready = self.epoll.readable(), if !paused => {
                    let mut ready = ready.ok()?; // An error means that the runtime ends.
                    let Some(number) = called(ready.get_inner()) else {
                        ready.clear_ready();
                        continue;
                    };
                    ready.retain_ready(); // Others may wait.
                    if let Some(call) = self.accept(number) {
                        return Some(call);
                    }
                }
            }
        }
    }

    fn obey(&mut self, order: Order<T>) {
        match order {
            Order::Open(number, listening) => drop(self.listening.insert(number, listening)),
            Order::Close(number, done) => {
                self.listening.remove(&number); // Closed by this, and so taken out of epoll.
                let _ = done.send(()); // Who asked may have been cancelled.
            }
            Order::Copy(number, told) => {
                if let Some(Listening { socket, .. }) = self.listening.get(&number) {
                    let _ = told.send(socket.try_clone()); // As above.
                }
            }
        }
    }

    /// `None` for a socket that was closed meanwhile, or a client that is gone again.
    fn accept(&mut self, number: Number) -> Option<(TcpStream, T)> {
        let Listening { socket, label } = self.listening.get(&number)?;
        let accepted = socket::accept(socket).and_then(|(stream, _)| TcpStream::from_std(net::TcpStream::from(stream)));
        match accepted {
            Ok(stream) => {
                self.told = false;
                Some((stream, label.clone()))
            }
            Err(error) if is_over(error.kind()) => None,
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    warn!(%error, "own servers cannot accept, trying again");
                }
                self.pause = Some(Instant::now() + ACCEPT_PAUSE);
                None
            }
        }
    }
}

/// True where it is about one client alone.
fn is_over(error: io::ErrorKind) -> bool {
    matches!(error, io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}

/// A socket at which a client waits. The kernel goes round: one that is called all the time keeps no other waiting.
fn called(epoll: &OwnedFd) -> Option<Number> {
    let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
    // Interrupted, it is as if there were none: the next call tells again.
    let count = epoll::wait(epoll, &mut events, Some(&NO_TIME)).unwrap_or(0);
    let [event] = events;
    let data = event.data;
    (count > 0).then(|| Number(data.u64()))
}

/// Waits for ever where there is nothing to wait for.
async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::task::JoinHandle;

    use super::*;
    use crate::name::{ListenKey, Protocol};
    use crate::serve::scripted::soon;

    /// At an address of the test's own.
    fn listen(test: u8, number: u8) -> (OwnedFd, SocketAddr) {
        let key = ListenKey::new([127, 85, 3, test].into(), 7500 + u16::from(number), Protocol::Tcp);
        (socket::listen_tcp(key).expect("a free address"), key.address())
    }

    /// Gives each caller's label out.
    fn serve(mut calls: Calls<u8>) -> (mpsc::Receiver<u8>, JoinHandle<()>) {
        let (sender, labels) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            while let Some((_stream, label)) = calls.next().await {
                let _ = sender.send(label).await; // The test may be over.
            }
        });
        (labels, task)
    }

    #[tokio::test]
    async fn given_many_sockets_when_called_then_each_call_has_the_label_of_its_socket() {
        let (mut set, calls) = listener_set().expect("a descriptor");
        let (mut labels, _task) = serve(calls);
        let mut addresses = Vec::new();
        for label in 0..100 {
            let (socket, address) = listen(1, label);
            set.add(socket, label).await.expect("it is watched");
            addresses.push(address);
        }

        for (label, address) in (0..100).zip(&addresses).rev() {
            TcpStream::connect(address).await.expect("it listens");
            assert_eq!(soon(labels.recv()).await, Some(label));
        }
    }

    #[tokio::test]
    async fn given_calls_that_wait_at_two_sockets_when_taken_then_all_of_them_come() {
        let (mut set, mut calls) = listener_set().expect("a descriptor");
        let mut clients = Vec::new();
        for label in [1, 2] {
            let (socket, address) = listen(2, label);
            for _ in 0..3 {
                clients.push(TcpStream::connect(address).await.expect("it listens"));
            }
            set.add(socket, label).await.expect("it is watched");
        }

        let mut labels = Vec::new();
        for _ in 0..clients.len() {
            labels.push(soon(calls.next()).await.expect("a call").1);
        }

        assert_eq!(labels.iter().sum::<u8>(), 9, "three of each: {labels:?}");
        assert_ne!(labels[..3], [1, 1, 1], "neither keeps the other waiting");
    }

    #[tokio::test]
    async fn given_a_closed_socket_when_its_address_is_bound_again_then_it_is_free_and_the_others_listen() {
        let (mut set, calls) = listener_set().expect("a descriptor");
        let (mut labels, _task) = serve(calls);
        let [(one, first), (other, second)] = [listen(3, 1), listen(3, 2)];
        let number = set.add(one, 1).await.expect("it is watched");
        set.add(other, 2).await.expect("it is watched");

        soon(set.close(number)).await;

        TcpStream::connect(first).await.expect_err("closed");
        socket::listen_tcp(ListenKey::at(first, Protocol::Tcp)).expect("its address is free");
        TcpStream::connect(second).await.expect("it listens");
        assert_eq!(soon(labels.recv()).await, Some(2));
    }

    #[tokio::test]
    async fn given_a_set_when_it_is_dropped_then_the_task_ends_and_its_sockets_are_closed() {
        let (mut set, calls) = listener_set().expect("a descriptor");
        let (_labels, task) = serve(calls);
        let (socket, address) = listen(4, 1);
        set.add(socket, 1).await.expect("it is watched");

        drop(set);

        soon(task).await.expect("no panic");
        TcpStream::connect(address).await.expect_err("closed");
    }
}
