//! The load: bulk streams, short connections, ping-pong. As light as it can be, as it shares the CPUs.
//!
//! Few threads, epoll, bulk bytes discarded in the kernel. What the other end does is in `workload`.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use rustix::event::{Timespec, epoll, epoll::EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::measure::{Reading, cpus, percentile};
use crate::peers::Peer;
use crate::report::Outcome;
use crate::rig::Namespace;
use crate::rows::{Direction, Metric, Workload};
use crate::stage::Stage;
use crate::workload::{Ask, MESSAGE_BYTES, discard, fill};

const MESSAGE: [u8; MESSAGE_BYTES] = [Ask::Answer as u8; MESSAGE_BYTES];
/// Longer than a window: whoever lets a stream stand still for so long has lost it.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often threads look whether the window is over.
const STOP_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// A row with more failures than this has failed as a whole.
const FAILURES_AT_MOST: u64 = 100;

/// How long a row runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Before it counts.
    pub(crate) warm_up: Duration,
    /// While it counts.
    pub(crate) window: Duration,
}

/// Loads a peer and measures.
pub(crate) fn run(workload: Workload, peer: &Peer, family: Family, stage: &Stage, span: Span) -> io::Result<Outcome> {
    let load = Load { client: stage.rig.client(), targets: peer.targets(family), pids: peer.pids(), stage, span };
    let outcome = match workload {
        Workload::Bulk { direction, streams } => load.bulk(direction, streams),
        Workload::ShortConnections { at_a_time } => load.small(Life::OneExchange, at_a_time),
        Workload::PingPong { connections } => load.small(Life::Lasting, connections),
    };
    stage.settle()?;
    outcome
}

/// Opens connections from inside the client, with the targets taken in turn.
pub(crate) fn open(client: &Namespace, targets: &[SocketAddr], count: usize) -> io::Result<Vec<TcpStream>> {
    client.run(|| targets.iter().cycle().take(count).map(connect).collect())
}

fn connect(target: &SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(target, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

struct Load<'a> {
    client: &'a Namespace,
    targets: &'a [SocketAddr],
    pids: &'a [u32],
    stage: &'a Stage,
    span: Span,
}

/// What the threads of one row tell each other.
#[derive(Default)]
struct Tally {
    stop: AtomicBool,
    counting: AtomicBool,
    units: AtomicU64,
    failures: AtomicU64,
    first_failure: Mutex<Option<io::Error>>,
}

impl Tally {
    fn fail(&self, error: io::Error) {
        if self.failures.fetch_add(1, Ordering::Relaxed) == 0 {
            *self.first_failure.lock().expect("nobody panics with it") = Some(error);
        }
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.failures.load(Ordering::Relaxed) > FAILURES_AT_MOST
    }
}

impl Load<'_> {
    fn bulk(&self, direction: Direction, count: usize) -> io::Result<Outcome> {
        let streams = open(self.client, self.targets, count)?;
        let ask = match direction {
            Direction::Down => Ask::Down,
            Direction::Up => Ask::Up,
            Direction::Both => Ask::Both,
        };
        for stream in &streams {
            rustix::net::send(stream, &[ask.byte()], SendFlags::NOSIGNAL)?;
        }
        let down_bytes = AtomicU64::new(0);
        let moved_gb = || (down_bytes.load(Ordering::Relaxed) + self.stage.bulk.received_bytes()) as f64 / 1e9;
        thread::scope(|scope| {
            for stream in &streams {
                if direction != Direction::Up {
                    scope.spawn(|| discard(stream, &down_bytes));
                }
                if direction != Direction::Down {
                    scope.spawn(|| fill(stream));
                }
            }
            let outcome = self.observe(&Tally::default(), moved_gb);
            for stream in &streams {
                let _ = stream.shutdown(Shutdown::Both); // its threads wake and end
            }
            outcome
        })
    }

    /// Small exchanges over `count` slots, shared out among a few threads.
    fn small(&self, life: Life, count: usize) -> io::Result<Outcome> {
        let tally = Tally::default();
        let threads = cpus().min(count);
        thread::scope(|scope| {
            let generators: Vec<_> = (0..threads)
                .map(|thread| {
                    let share = Share {
                        targets: self.targets,
                        first: thread,
                        count: count / threads + usize::from(thread < count % threads),
                    };
                    let tally = &tally;
                    scope.spawn(move || {
                        self.client.enter()?;
                        Slots::new(share, life)?.generate(tally)
                    })
                })
                .collect();
            let outcome = self.observe(&tally, || tally.units.load(Ordering::Relaxed) as f64);
            tally.stop.store(true, Ordering::Relaxed);
            let mut latencies = Vec::new();
            for generator in generators {
                latencies.extend(generator.join().expect("generators do not panic")?);
            }
            let mut outcome = outcome?;
            latencies.sort_unstable();
            for (metric, share) in [(Metric::LatencyMedian, 0.5), (Metric::LatencyP99, 0.99)] {
                outcome.set(metric, percentile(&latencies, share).map(|nanos| f64::from(nanos) / 1e9));
            }
            Ok(outcome)
        })
    }

    /// Warms up, then measures for the length of the window.
    fn observe(&self, tally: &Tally, units: impl Fn() -> f64) -> io::Result<Outcome> {
        thread::sleep(self.span.warm_up);
        let (before, units_before) = (Reading::take(self.pids), units());
        tally.counting.store(true, Ordering::Relaxed);
        thread::sleep(self.span.window);
        tally.counting.store(false, Ordering::Relaxed);
        let (moved, after) = (units() - units_before, Reading::take(self.pids));
        let failures = tally.failures.load(Ordering::Relaxed);
        if failures > FAILURES_AT_MOST || moved <= 0.0 {
            let first = tally.first_failure.lock().expect("nobody panics with it").take();
            return Err(first.unwrap_or_else(|| io::Error::other("nothing moved")));
        }
        let cost = after.since(&before);
        let mut outcome = Outcome::under_load(failures, cost.is_disturbed());
        outcome.set(Metric::Rate, Some(moved / cost.elapsed.as_secs_f64()));
        outcome.set(Metric::ProxyCpu, (!self.pids.is_empty()).then(|| cost.proxy.as_secs_f64() / moved));
        outcome.set(Metric::AllCpu, Some(cost.all.as_secs_f64() / moved));
        Ok(outcome)
    }
}

/// How long a connection of small exchanges lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    OneExchange,
    Lasting,
}

/// One thread's part of the slots, and the target that it begins with.
#[derive(Clone, Copy)]
struct Share<'a> {
    targets: &'a [SocketAddr],
    first: usize,
    count: usize,
}

/// The connections of one thread.
struct Slots<'a> {
    epoll: OwnedFd,
    slots: Vec<Slot>,
    targets: std::iter::Skip<std::iter::Cycle<std::slice::Iter<'a, SocketAddr>>>,
    life: Life,
}

/// A place for one exchange at a time.
struct Slot {
    socket: Option<OwnedFd>,
    started: Instant,
    asked: bool,
    answer_bytes: usize,
}

impl<'a> Slots<'a> {
    fn new(share: Share<'a>, life: Life) -> io::Result<Self> {
        let slot = || Slot { socket: None, started: Instant::now(), asked: false, answer_bytes: 0 };
        let mut this = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            slots: (0..share.count).map(|_| slot()).collect(),
            targets: share.targets.iter().cycle().skip(share.first),
            life,
        };
        (0..share.count).try_for_each(|slot| this.connect(slot))?;
        Ok(this)
    }

    /// Exchanges messages until told to stop; returns how long each counted one took, in nanoseconds.
    fn generate(mut self, tally: &Tally) -> io::Result<Vec<u32>> {
        let mut latencies = Vec::new();
        let mut events = Vec::with_capacity(self.slots.len());
        while !tally.is_over() {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&STOP_INTERVAL)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                let slot = event.data.u64() as usize;
                match self.slots[slot].step() {
                    Ok(false) => {}
                    Ok(true) => self.finish(slot, tally, &mut latencies)?,
                    Err(error) => {
                        tally.fail(error.into());
                        self.connect(slot)?;
                    }
                }
            }
        }
        Ok(latencies)
    }

    fn finish(&mut self, slot: usize, tally: &Tally, latencies: &mut Vec<u32>) -> io::Result<()> {
        tally.units.fetch_add(1, Ordering::Relaxed);
        if tally.counting.load(Ordering::Relaxed) {
            latencies.push(u32::try_from(self.slots[slot].started.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
        if self.life == Life::OneExchange {
            return self.connect(slot);
        }
        let slot = &mut self.slots[slot];
        (slot.started, slot.asked, slot.answer_bytes) = (Instant::now(), false, 0);
        Ok(slot.ask()?)
    }

    /// Opens a connection in place of the one that the slot had. Its readiness to send is the first event.
    fn connect(&mut self, slot: usize) -> io::Result<()> {
        let started = Instant::now();
        self.slots[slot].socket = None; // closed, and gone from epoll
        let target = self.targets.next().expect("there is a target");
        let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let interest = EventFlags::IN | EventFlags::OUT | EventFlags::ET; // one registration for both phases
        epoll::add(&self.epoll, socket.as_fd(), epoll::EventData::new_u64(slot as u64), interest)?;
        self.slots[slot] = Slot { socket: Some(socket), started, asked: false, answer_bytes: 0 };
        Ok(())
    }
}

impl Slot {
    /// Goes on after an event; true once the answer is complete.
    fn step(&mut self) -> Result<bool, Errno> {
        if !self.asked {
            self.ask()?;
            return Ok(false);
        }
        let Some(socket) = &self.socket else { return Ok(false) };
        let mut answer = [0; MESSAGE_BYTES];
        match rustix::net::recv(socket, &mut answer, RecvFlags::empty()) {
            Ok((0, _)) => Err(Errno::CONNRESET),
            Ok((bytes, _)) => {
                self.answer_bytes += bytes;
                Ok(self.answer_bytes == MESSAGE_BYTES)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn ask(&mut self) -> Result<(), Errno> {
        let Some(socket) = &self.socket else { return Ok(()) };
        rustix::net::send(socket, &MESSAGE, SendFlags::NOSIGNAL)?;
        self.asked = true;
        Ok(())
    }
}
