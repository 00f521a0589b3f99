//! A backend that does what a connection's first byte asks: send, swallow, both, or answer. Cheap to drive.
//!
//! Both ends of a measured path live here as far as they are the same: moving bytes in bulk without copying what is
//! received. What is asked for, and how often, is the load generator's business.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, epoll, epoll::EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::rig::Namespace;

/// Question and answer of a small exchange.
pub(crate) const MESSAGE_BYTES: usize = 64;
/// What one system call is offered in bulk.
const BLOCK_BYTES: usize = 128 * 1024;
/// What one system call may discard in bulk.
const DISCARD_BYTES: usize = 1024 * 1024;
const BACKLOG: i32 = 4096;
/// A bulk stream on which nothing moved for so long is over.
const STALLED: Duration = Duration::from_secs(3);

/// What a connection asks for by its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Send without end.
    Down = b'D' as isize,
    /// Swallow everything.
    Up = b'U' as isize,
    /// Both at once.
    Both = b'B' as isize,
    /// Answer each message of [`MESSAGE_BYTES`] with one.
    Answer = b'A' as isize,
}

impl Ask {
    /// The byte on the wire.
    pub(crate) fn byte(self) -> u8 {
        self as u8
    }

    fn read(byte: u8) -> Option<Self> {
        [Self::Down, Self::Up, Self::Both, Self::Answer].into_iter().find(|ask| ask.byte() == byte)
    }
}

/// A running backend: one thread for messages, one or two for each bulk stream. Dropping it ends the first one; bulk
/// threads end with their streams.
#[derive(Debug)]
pub(crate) struct Backend {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// What the bulk threads of one or more backends have done.
#[derive(Debug, Default)]
pub(crate) struct Bulk {
    received_bytes: AtomicU64,
    threads: AtomicUsize,
}

impl Bulk {
    /// Bytes received so far.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    /// Threads that still send or receive.
    pub(crate) fn threads(&self) -> usize {
        self.threads.load(Ordering::Relaxed)
    }
}

impl Backend {
    /// Listens inside the namespace; several backends may count into one `bulk`.
    pub(crate) fn start(inside: &Namespace, listen: &[SocketAddr], bulk: &Arc<Bulk>) -> io::Result<Self> {
        let listeners = inside.run(|| listen.iter().map(listener).collect::<io::Result<Vec<_>>>())?;
        let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?);
        let service = Service::new(listeners, &stop, Arc::clone(bulk))?;
        let thread = inside.thread(move || service.serve())?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

/// What a backend is told through its eventfd: to end, or to answer whoever has come and then to end.
const END: u64 = 1;
const RETIRE: u64 = 2;
/// How long one that retires waits for those that have come.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

impl Backend {
    /// Ends as a server does that is asked to: accepts nobody any more, and answers whoever has come.
    #[allow(dead_code)] // Not every binary has one that does.
    pub(crate) fn retire(mut self) {
        self.end(RETIRE);
    }

    fn end(&mut self, how: u64) {
        let _ = rustix::io::write(&*self.stop, &how.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.end(END);
    }
}

fn listener(address: &SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(*address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?; // inherited by what it accepts
    socket.bind(&(*address).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// The message thread's state: epoll, listeners and the connections by descriptor number.
struct Service {
    epoll: OwnedFd,
    listeners: Vec<Socket>,
    connections: Vec<Option<Connection>>,
    stop: Arc<OwnedFd>,
    bulk: Arc<Bulk>,
}

struct Connection {
    socket: OwnedFd,
    /// Bytes of a message whose rest has not come yet.
    partial_bytes: usize,
}

/// What is to become of a connection after it was looked at.
enum Next {
    Keep,
    Close,
    Bulk(Ask),
}

impl Service {
    fn new(listeners: Vec<Socket>, stop: &Arc<OwnedFd>, bulk: Arc<Bulk>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        watch(&epoll, stop.as_fd())?;
        for listener in &listeners {
            watch(&epoll, listener.as_fd())?;
        }
        Ok(Self { epoll, listeners, connections: Vec::new(), stop: Arc::clone(stop), bulk })
    }

    fn serve(mut self) {
        let mut events = Vec::with_capacity(128);
        let stop = token(self.stop.as_fd());
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => panic!("a backend cannot wait: {error}"),
            }
            for event in &events {
                let ready = event.data.u64();
                if ready == stop {
                    return self.end();
                }
                self.step(ready);
            }
        }
    }

    fn end(mut self) {
        let mut how = [0; 8];
        let _ = rustix::io::read(&*self.stop, &mut how);
        if u64::from_ne_bytes(how) != RETIRE {
            return;
        }
        let listeners: Vec<_> = self.listeners.iter().map(|listener| token(listener.as_fd())).collect();
        listeners.into_iter().for_each(|listener| self.step(listener)); // Whoever waits in the queue has come.
        self.listeners.clear();
        let (deadline, mut events) = (Instant::now() + LAST_ANSWERS, Vec::with_capacity(128));
        while Instant::now() < deadline && self.connections.iter().any(Option::is_some) {
            events.clear();
            let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&pause));
            events.iter().for_each(|event| self.step(event.data.u64()));
        }
    }

    fn step(&mut self, ready: u64) {
        if let Some(listener) = self.listeners.iter().find(|listener| token(listener.as_fd()) == ready) {
            while let Ok(socket) = rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                keep(&mut self.connections, &self.epoll, socket);
            }
            return;
        }
        let Some(place) = usize::try_from(ready).ok().and_then(|fd| self.connections.get_mut(fd)) else { return };
        let Some(connection) = place else { return };
        match connection.answer() {
            Next::Keep => {}
            Next::Close => *place = None,
            Next::Bulk(ask) => {
                if let Some(connection) = place.take() {
                    let _ = epoll::delete(&self.epoll, &connection.socket);
                    Bulk::start(&self.bulk, ask, connection.socket.into());
                }
            }
        }
    }
}

fn keep(connections: &mut Vec<Option<Connection>>, epoll: &OwnedFd, socket: OwnedFd) {
    if watch(epoll, socket.as_fd()).is_err() {
        return;
    }
    let place = socket.as_raw_fd().unsigned_abs() as usize;
    if connections.len() <= place {
        connections.resize_with(place + 1, || None);
    }
    connections[place] = Some(Connection { socket, partial_bytes: 0 });
}

fn watch(epoll: &OwnedFd, socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(epoll::add(epoll, socket, epoll::EventData::new_u64(token(socket)), EventFlags::IN)?)
}

fn token(descriptor: BorrowedFd<'_>) -> u64 {
    descriptor.as_raw_fd().unsigned_abs().into()
}

impl Connection {
    /// Answers what came; at most one receive and one send.
    fn answer(&mut self) -> Next {
        const BATCH_BYTES: usize = 16 * MESSAGE_BYTES;
        const ANSWERS: [u8; BATCH_BYTES + MESSAGE_BYTES] = [Ask::Answer as u8; BATCH_BYTES + MESSAGE_BYTES];
        let mut came = [0; BATCH_BYTES];
        let came = match rustix::net::recv(&self.socket, &mut came, RecvFlags::empty()) {
            Ok((0, _)) => return Next::Close,
            Ok((bytes, _)) => behind_header(&came[..bytes]),
            Err(Errno::AGAIN | Errno::INTR) => return Next::Keep,
            Err(_) => return Next::Close,
        };
        if self.partial_bytes == 0 {
            match came.first().map(|first| Ask::read(*first)) {
                None | Some(Some(Ask::Answer)) => {}
                Some(Some(ask)) => return Next::Bulk(ask),
                Some(None) => return Next::Close,
            }
        }
        let came_bytes = came.len();
        let pending_bytes = self.partial_bytes + came_bytes;
        self.partial_bytes = pending_bytes % MESSAGE_BYTES;
        let answer_bytes = pending_bytes - self.partial_bytes;
        if answer_bytes == 0 {
            return Next::Keep;
        }
        match rustix::net::send(&self.socket, &ANSWERS[..answer_bytes], SendFlags::NOSIGNAL) {
            Ok(sent) if sent == answer_bytes => Next::Keep,
            _ => Next::Close, // nobody who asks here leaves a window full of answers unread
        }
    }
}

/// What comes behind a PROXY header of version 2, where there is one. It comes whole: nobody sends it in parts.
fn behind_header(came: &[u8]) -> &[u8] {
    const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
    match came {
        [_, _, _, _, _, _, _, _, _, _, _, _, _, _, high, low, rest @ ..] if came.starts_with(SIGNATURE) => {
            rest.get(usize::from(u16::from_be_bytes([*high, *low]))..).unwrap_or_default()
        }
        _ => came,
    }
}

impl Bulk {
    /// Hands a connection to threads of its own.
    fn start(this: &Arc<Self>, ask: Ask, stream: TcpStream) {
        // A client's reset can get lost in a full queue. Nobody would tell us again.
        let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(STALLED));
        let _ = stream.set_read_timeout(Some(STALLED));
        let Ok(second) = stream.set_nonblocking(false).and_then(|()| stream.try_clone()) else { return };
        if matches!(ask, Ask::Down | Ask::Both) {
            this.thread(move |_| fill(&stream));
        }
        if matches!(ask, Ask::Up | Ask::Both) {
            this.thread(move |bulk| discard(&second, &bulk.received_bytes));
        }
    }

    fn thread(self: &Arc<Self>, work: impl FnOnce(&Self) + Send + 'static) {
        let bulk = Arc::clone(self);
        bulk.threads.fetch_add(1, Ordering::Relaxed);
        thread::spawn(move || {
            work(&bulk);
            bulk.threads.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Sends zeros until the stream ends.
pub(crate) fn fill(stream: &TcpStream) {
    let block = vec![0; BLOCK_BYTES];
    loop {
        match rustix::net::send(stream, &block, SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Receives until the stream ends, and counts. The bytes are discarded in the kernel, so that the receiver is not
/// the limit.
pub(crate) fn discard(stream: &TcpStream, received_bytes: &AtomicU64) {
    let mut untouched = vec![0; DISCARD_BYTES];
    loop {
        match rustix::net::recv(stream, untouched.as_mut_slice(), RecvFlags::TRUNC) {
            Ok((_, 0)) => return,
            Ok((_, bytes)) => drop(received_bytes.fetch_add(bytes as u64, Ordering::Relaxed)),
            Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
