//! The other end of datagrams: gives back what asks for an answer, swallows and counts the rest.
//!
//! What is sent, and when, is in `datagrams`.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use kube_relay::name::Family;
use kube_relay::serve::mmsg::{BATCH, Batch, Place, To, receive_trains};
use rustix::event::{EventfdFlags, epoll, epoll::EventFlags};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

use crate::rig::Namespace;
use crate::stage::{PORT, TRAINS_PORT};
use crate::workload::Ask;

/// The ends are not to be where datagrams are lost.
const BUFFER_BYTES: usize = 4 << 20;

/// A UDP backend: one thread with a socket for each family and port. On [`TRAINS_PORT`] it receives and sends
/// datagrams joined, where the kernel can. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Echo {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Listens inside a pod; several echoes may count into one number of swallowed datagrams.
    pub(crate) fn start(pod: &Namespace, families: &[Family], swallowed: &Arc<AtomicU64>) -> io::Result<Self> {
        let addresses = families.iter().flat_map(|&family| {
            [PORT, TRAINS_PORT].map(|port| (SocketAddr::new(pod.address(family), port), port == TRAINS_PORT))
        });
        let addresses: Vec<_> = addresses.collect();
        let ends = pod.run(|| addresses.iter().map(|&(address, joins)| End::bind(address, joins)).collect())?;
        let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?);
        let echoing = Echoing::new(ends, &stop, Arc::clone(swallowed))?;
        let thread = pod.thread(move || echoing.serve())?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One socket of the backend.
struct End {
    socket: UdpSocket,
    batch: Batch,
}

impl End {
    fn bind(address: SocketAddr, joins: bool) -> io::Result<Self> {
        let socket = socket(address)?;
        socket.bind(&address.into())?;
        let socket = socket.into();
        if joins {
            receive_trains(&socket)?;
        }
        Ok(Self { socket, batch: if joins { Batch::default() } else { Batch::without_joining() } })
    }
}

/// The thread's state.
struct Echoing {
    epoll: OwnedFd,
    ends: Vec<End>,
    swallowed: Arc<AtomicU64>,
    /// Held so that epoll hears of it.
    _stop: Arc<OwnedFd>,
}

impl Echoing {
    fn new(ends: Vec<End>, stop: &Arc<OwnedFd>, swallowed: Arc<AtomicU64>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, stop, epoll::EventData::new_u64(u64::MAX), EventFlags::IN)?;
        for (number, end) in ends.iter().enumerate() {
            epoll::add(&epoll, &end.socket, epoll::EventData::new_u64(number as u64), EventFlags::IN)?;
        }
        Ok(Self { epoll, ends, swallowed, _stop: Arc::clone(stop) })
    }

    fn serve(mut self) {
        let mut events = Vec::with_capacity(16);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => panic!("an echo cannot wait: {error}"),
            }
            for event in &events {
                let Some(end) = self.ends.get_mut(event.data.u64() as usize) else { return };
                answer(end, &self.swallowed);
            }
        }
    }
}

/// Deals with what waits at a socket: one batch of it.
fn answer(end: &mut End, swallowed: &AtomicU64) {
    let Ok(received) = end.batch.receive(end.socket.as_fd(), BATCH) else { return };
    let wants_answer = |slot: &usize| end.batch.payload(*slot).first() == Some(&Ask::Answer.byte());
    let (answers, rest): (Vec<usize>, Vec<usize>) = (0..received).partition(wants_answer);
    let swallowed_now: usize = rest.into_iter().map(|slot| end.batch.datagrams(slot)).sum();
    swallowed.fetch_add(swallowed_now as u64, Ordering::Relaxed);
    send(&mut end.batch, &end.socket, answers.into_iter(), To::Peers);
    end.batch.clear();
}

/// Sends these slots of a batch. What the kernel will not take is lost.
pub(crate) fn send(batch: &mut Batch, socket: &UdpSocket, chosen: impl Iterator<Item = usize>, to: To) {
    let mut slots = [0; BATCH];
    let count = slots.iter_mut().zip(chosen).map(|(slot, chosen)| *slot = chosen as u8).count();
    let (slots, mut at) = (&slots[..count], Place::default());
    while at.position < slots.len() {
        at = batch.send(socket.as_fd(), slots, at, to).unwrap_or_else(|unsent| unsent.end);
    }
}

/// A socket with large buffers that does not block.
pub(crate) fn socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking().cloexec(), None)?;
    socket.set_recv_buffer_size(BUFFER_BYTES)?;
    socket.set_send_buffer_size(BUFFER_BYTES)?;
    Ok(socket)
}
