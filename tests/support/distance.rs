//! A long cable: what goes in at one end comes out at the other some time later, as if it went around the world.
//!
//! Two tun devices and a thread in between, as not every kernel can delay by itself (`netem`). Where it is laid is in `rig`.
#![allow(unsafe_code)] // The request that makes a tun device: one call a block.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::ioctl;

use super::namespace::Namespace;

/// `TUNSETIFF`: makes the device of an open file.
const MAKE_DEVICE: ioctl::Opcode = ioctl::opcode::write::<i32>(b'T', 202);
/// `IFF_TUN | IFF_NO_PI`: packets of IP, and nothing before them.
const PLAIN_PACKETS: i16 = 0x1001;

/// The kernel's `ifreq`, as far as it matters here.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// Two devices and what is under way between them. Dropping it takes both away.
#[derive(Debug)]
pub(crate) struct LongCable {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl LongCable {
    /// Makes a device of this name at either end, both still down and without an address. `delay` is that of one way.
    pub(crate) fn lay(ends: [&Namespace; 2], device: &str, delay: Duration) -> io::Result<Self> {
        let [near, far] = ends.map(|end| end.run(|| make_device(device)));
        let (near, far) = (near?, far?);
        let ways = [Way::new(near.try_clone()?, far.try_clone()?), Way::new(far, near)];
        let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name(device.into()).spawn(move || carry(ways, delay, &stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for LongCable {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A device in the namespace of this thread; it lives as long as the file.
fn make_device(name: &str) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun")?;
    let mut request = Request { name: [0; 16], flags: PLAIN_PACKETS, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the opcode takes an `ifreq`, which is what `Request` is to the last byte, and may write to it.
    let request = unsafe { ioctl::Updater::<MAKE_DEVICE, Request>::new(&mut request) };
    // SAFETY: as above.
    unsafe { ioctl::ioctl(&file, request) }?;
    Ok(file)
}

/// One direction, and the packets that are on it with the time of their arrival.
struct Way {
    from: File,
    to: File,
    under_way: VecDeque<(Instant, Box<[u8]>)>,
}

impl Way {
    fn new(from: File, to: File) -> Self {
        Self { from, to, under_way: VecDeque::new() }
    }

    fn take_in(&mut self, delay: Duration) {
        let mut packet = [0; 65_536];
        while let Ok(length) = self.from.read(&mut packet) {
            self.under_way.push_back((Instant::now() + delay, packet[..length].into()));
        }
    }

    fn hand_out(&mut self) {
        while let Some((arrival, packet)) = self.under_way.front()
            && *arrival <= Instant::now()
        {
            let _ = self.to.write(packet); // A device that is down loses it, as any other does.
            self.under_way.pop_front();
        }
    }

    fn next(&self) -> Option<Instant> {
        self.under_way.front().map(|(arrival, _)| *arrival)
    }
}

fn carry(mut ways: [Way; 2], delay: Duration, stop: &OwnedFd) {
    loop {
        ways.iter_mut().for_each(Way::hand_out);
        let next = ways.iter().filter_map(Way::next).min();
        let patience = next.map(|next| next.saturating_duration_since(Instant::now()));
        let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
        let [there, back] = &ways;
        let mut polled = [stop.as_fd(), there.from.as_fd(), back.from.as_fd()]
            .map(|file| PollFd::from_borrowed_fd(file, PollFlags::IN));
        let _ = rustix::event::poll(&mut polled, patience.as_ref());
        if !polled[0].revents().is_empty() {
            return;
        }
        ways.iter_mut().for_each(|way| way.take_in(delay));
    }
}
