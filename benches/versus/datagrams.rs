//! The load of datagrams: a closed loop, a paced stream, the search for the highest loss-free rate, a flood.
//!
//! Every flow is a client's connected socket. Each datagram has a number, so that what is lost and how long an
//! exchange takes is known for each. The other end is `echo`.

use std::io;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kube_relay::name::Family;
use kube_relay::serve::mmsg::{BATCH, Batch, To, receive_trains};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use crate::echo::{send, socket};
use crate::load::Span;
use crate::measure::{Cost, Reading, percentile};
use crate::peers::Peer;
use crate::report::Outcome;
use crate::rows::{Datagrams, Metric, Pattern};
use crate::stage::{Stage, TRAINS_PORT};
use crate::workload::Ask;

/// What has not come back for so long is lost. If it comes later it was not.
const STALL: Duration = Duration::from_millis(150);
/// How often lost ones are looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// A paced sender that is late sends so many at once at most, before it looks at what came back.
const CATCH_UP: usize = 32;
/// A rate is loss-free up to this share.
const LOSS_FREE: f64 = 0.001;
/// Where the search begins, in exchanges per second, and by what it goes on until it has passed the limit.
const FIRST_RATE: f64 = 60_000.0;
const STRIDE: f64 = 1.5;
/// The search ends where the last rate that holds and the first that does not are as near as this.
const NEAR_ENOUGH: f64 = 1.06;
/// Whoever does not hold so little holds nothing.
const LEAST_RATE: f64 = 2_000.0;

/// Loads a peer and measures.
pub(crate) fn run(load: Datagrams, peer: &Peer, family: Family, stage: &Stage, span: Span) -> io::Result<Outcome> {
    let mut targets = peer.targets(family).to_vec();
    if let Pattern::Trains(_) = load.pattern {
        targets.iter_mut().for_each(|target| target.set_port(TRAINS_PORT));
    }
    let source = (family == Family::V4).then(|| SocketAddr::from((stage.next_source(), 0)));
    let run = Run { load, source, targets, pids: peer.pids(), stage, span };
    let outcome = match load.pattern {
        Pattern::Window(outstanding) | Pattern::Trains(outstanding) => run.closed_loop(outstanding),
        Pattern::Paced(rate) => run.paced(rate.into()),
        Pattern::LossFree => run.search(),
        Pattern::OneWay => run.flood(),
    };
    stage.drained()?;
    outcome
}

struct Run<'a> {
    load: Datagrams,
    /// `None`: the kernel chooses.
    source: Option<SocketAddr>,
    targets: Vec<SocketAddr>,
    pids: &'a [u32],
    stage: &'a Stage,
    span: Span,
}

/// What the threads of one row tell each other.
#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    counting: AtomicBool,
    moved: AtomicU64,
}

impl Progress {
    fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn counts(&self) -> bool {
        self.counting.load(Ordering::Relaxed)
    }

    fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }
}

impl Run<'_> {
    /// One thread plays all clients: it has less to wake than several, and is not the limit.
    fn closed_loop(&self, outstanding: usize) -> io::Result<Outcome> {
        let progress = Progress::default();
        let each = (outstanding / self.load.flows).max(1);
        let flows = self.stage.rig.client().run(|| self.flows())?;
        thread::scope(|scope| {
            let player = scope.spawn(|| Player::new(flows, each).play(&progress));
            let observed = self.observe(&progress, || progress.moved());
            let score = player.join().expect("players do not panic")?;
            let (moved, cost) = observed?;
            Ok(self.outcome(moved, score.lost, cost.elapsed, &cost, score.latencies))
        })
    }

    fn paced(&self, rate: f64) -> io::Result<Outcome> {
        self.alone(|pacer| {
            pacer.send(rate, self.span.warm_up)?;
            let before = Reading::take(self.pids);
            let probe = pacer.send(rate, self.span.window)?;
            let cost = Reading::take(self.pids).since(&before);
            Ok(self.outcome(probe.received(), probe.lost(), probe.time, &cost, probe.latencies))
        })
    }

    /// Goes up until too much is lost, or the sender cannot do more, then halves what is between.
    fn search(&self) -> io::Result<Outcome> {
        self.alone(|pacer| {
            pacer.send(FIRST_RATE / STRIDE, self.span.warm_up)?;
            let (mut rate, mut best, mut too_much) = (FIRST_RATE, None::<(f64, Outcome)>, f64::INFINITY);
            loop {
                let (holds, achieved, outcome) = self.holds(pacer, rate)?;
                if holds {
                    best = Some((achieved, outcome));
                    if achieved < rate / NEAR_ENOUGH {
                        break; // more cannot be sent
                    }
                } else {
                    too_much = rate;
                }
                rate = match &best {
                    Some((held, _)) if too_much.is_infinite() => held * STRIDE,
                    Some((held, _)) if too_much / held > NEAR_ENOUGH => (held * too_much).sqrt(),
                    Some(_) => break,
                    None if rate < LEAST_RATE => break,
                    None => rate / STRIDE,
                };
            }
            best.map(|(_, outcome)| outcome).ok_or_else(|| io::Error::other("loses at every rate"))
        })
    }

    /// True where a rate holds: at the second attempt it may, too, as other programs disturb.
    fn holds(&self, pacer: &mut Pacer, rate: f64) -> io::Result<(bool, f64, Outcome)> {
        let mut attempt = || {
            let before = Reading::take(self.pids);
            let probe = pacer.send(rate, self.span.window / 2)?;
            let cost = Reading::take(self.pids).since(&before);
            let holds = probe.lost() as f64 <= probe.sent as f64 * LOSS_FREE;
            let achieved = probe.received() as f64 / probe.time.as_secs_f64();
            let outcome = self.outcome(probe.received(), probe.lost(), probe.time, &cost, probe.latencies);
            Ok::<_, io::Error>((holds, achieved, outcome))
        };
        let first = attempt()?;
        if first.0 { Ok(first) } else { attempt() }
    }

    fn flood(&self) -> io::Result<Outcome> {
        let progress = Progress::default();
        let flows = self.stage.rig.client().run(|| self.flows())?;
        thread::scope(|scope| {
            scope.spawn(|| pour(&flows, &progress));
            let sent_before = AtomicU64::new(0);
            let observed = self.observe(&progress, || {
                if !progress.counts() {
                    sent_before.store(progress.moved(), Ordering::Relaxed);
                }
                self.stage.swallowed()
            });
            let (delivered, cost) = observed?;
            let sent = progress.moved() - sent_before.load(Ordering::Relaxed);
            Ok(self.outcome(delivered, sent.saturating_sub(delivered), cost.elapsed, &cost, Vec::new()))
        })
    }

    /// Warms up, then counts for the length of the window, then stops.
    fn observe(&self, progress: &Progress, units: impl Fn() -> u64) -> io::Result<(u64, Cost)> {
        thread::sleep(self.span.warm_up);
        let (before, units_before) = (Reading::take(self.pids), units());
        progress.counting.store(true, Ordering::Relaxed);
        thread::sleep(self.span.window);
        progress.counting.store(false, Ordering::Relaxed);
        let (moved, after) = (units() - units_before, Reading::take(self.pids));
        progress.stop.store(true, Ordering::Relaxed);
        if moved == 0 {
            return Err(io::Error::other("nothing moved"));
        }
        Ok((moved, after.since(&before)))
    }

    /// One sender that is also the receiver, inside the client.
    fn alone(&self, work: impl FnOnce(&mut Pacer) -> io::Result<Outcome> + Send) -> io::Result<Outcome> {
        self.stage.rig.client().run(|| {
            let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)); // waits are short
            work(&mut Pacer { flows: self.flows()?, probe: 0 })
        })
    }

    /// Flows of the calling thread, which is inside the client.
    fn flows(&self) -> io::Result<Flows> {
        let targets = self.targets.iter().copied().cycle().take(self.load.flows);
        let sockets = targets.map(|target| connect(self.source, target)).collect::<io::Result<_>>()?;
        Flows::new(sockets, self.load.bytes, matches!(self.load.pattern, Pattern::Trains(_)))
    }

    fn outcome(&self, moved: u64, lost: u64, time: Duration, cost: &Cost, mut latencies: Vec<u32>) -> Outcome {
        let mut outcome = Outcome::under_load(0, cost.is_disturbed());
        outcome.set(Metric::Rate, Some(moved as f64 / time.as_secs_f64()));
        outcome.set(Metric::ProxyCpu, (!self.pids.is_empty()).then(|| cost.proxy.as_secs_f64() / moved as f64));
        outcome.set(Metric::AllCpu, Some(cost.all.as_secs_f64() / moved as f64));
        outcome.set(Metric::Lost, Some(lost as f64 / (moved + lost) as f64));
        latencies.sort_unstable();
        for (metric, share) in [(Metric::LatencyMedian, 0.5), (Metric::LatencyP99, 0.99)] {
            outcome.set(metric, percentile(&latencies, share).map(|nanos| f64::from(nanos) / 1e9));
        }
        outcome
    }
}

/// Sends without waiting for anything.
fn pour(flows: &Flows, progress: &Progress) {
    let datagram = datagram(Ask::Up, flows.bytes, 0, 0);
    while !progress.stops() {
        for socket in &flows.sockets {
            match socket.send(&datagram) {
                Ok(_) => drop(progress.moved.fetch_add(1, Ordering::Relaxed)),
                Err(_) => thread::yield_now(), // the queue is full
            }
        }
    }
}

/// A datagram as it goes both ways: what it asks for, its number, and the number's generation.
fn datagram(ask: Ask, bytes: usize, number: u32, generation: u32) -> Vec<u8> {
    let mut datagram = vec![ask.byte(); bytes];
    datagram[4..8].copy_from_slice(&number.to_ne_bytes());
    datagram[8..12].copy_from_slice(&generation.to_ne_bytes());
    datagram
}

fn read_numbers(datagram: &[u8]) -> Option<(usize, u32)> {
    let number = |at: usize| Some(u32::from_ne_bytes(datagram.get(at..at + 4)?.try_into().ok()?));
    Some((number(4)? as usize, number(8)?))
}

/// The clients.
struct Flows {
    sockets: Vec<UdpSocket>,
    epoll: OwnedFd,
    batch: Batch,
    /// Slots that a receive fills at most: each that is asked for costs a little.
    most: usize,
    bytes: usize,
}

impl Flows {
    fn new(sockets: Vec<UdpSocket>, bytes: usize, joins: bool) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (number, socket) in sockets.iter().enumerate() {
            epoll::add(&epoll, socket, epoll::EventData::new_u64(number as u64), epoll::EventFlags::IN)?;
            if joins {
                receive_trains(socket)?;
            }
        }
        Ok(Self {
            sockets,
            epoll,
            batch: if joins { Batch::default() } else { Batch::without_joining() },
            most: BATCH,
            bytes,
        })
    }

    /// Takes what has come back, waiting for it up to a time: a batch from each flow that has something.
    ///
    /// `keeps` hears number and generation of each datagram; a slot with one that it keeps is sent again.
    fn bounce(&mut self, patience: Duration, mut keeps: impl FnMut(usize, u32) -> bool) -> io::Result<()> {
        let mut events = [const { MaybeUninit::uninit() }; 64];
        let timeout = Timespec { tv_sec: 0, tv_nsec: patience.as_nanos().min(999_999_999) as i64 };
        let events = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for event in events {
            let socket = &self.sockets[event.data.u64() as usize];
            let Ok(received) = self.batch.receive(socket.as_fd(), self.most) else { continue };
            let (mut kept, mut count) = ([0; BATCH], 0);
            for slot in 0..received {
                let datagrams = self.batch.payload(slot).chunks(self.bytes);
                if datagrams.filter_map(read_numbers).filter(|&(number, generation)| keeps(number, generation)).count()
                    > 0
                {
                    kept[count] = slot;
                    count += 1;
                }
            }
            send(&mut self.batch, socket, kept[..count].iter().copied(), To::Connected);
            self.batch.clear();
        }
        Ok(())
    }
}

fn connect(source: Option<SocketAddr>, target: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(target)?;
    if let Some(source) = source {
        socket.bind(&source.into())?;
    }
    socket.connect(&target.into())?;
    Ok(socket.into())
}

/// Plays the clients of a closed loop: what comes back is sent again, as it is.
struct Player {
    flows: Flows,
    /// By the number of the datagram.
    outstanding: Vec<Outstanding>,
}

/// A datagram that is on its way.
#[derive(Clone, Copy)]
struct Outstanding {
    flow: usize,
    generation: u32,
    since: Instant,
}

/// What a player saw while it counted.
#[derive(Default)]
struct Score {
    lost: u64,
    /// Nanoseconds.
    latencies: Vec<u32>,
}

impl Player {
    fn new(mut flows: Flows, each: usize) -> Self {
        flows.most = each.min(BATCH);
        let since = Instant::now() - STALL; // none is sent yet: all of them look lost
        let number = |number: usize| Outstanding { flow: number / each, generation: 0, since };
        let outstanding = (0..flows.sockets.len() * each).map(number).collect();
        Self { flows, outstanding }
    }

    fn play(mut self, progress: &Progress) -> io::Result<Score> {
        let mut score = Score::default();
        let mut next_look = Instant::now();
        while !progress.stops() {
            let now = Instant::now();
            if now >= next_look {
                let lost = self.send_again(now);
                score.lost += if progress.counts() { lost } else { 0 };
                next_look = now + LOOK_INTERVAL;
            }
            let (mut moved, mut late, counts) = (0, 0, progress.counts());
            self.flows.bounce(LOOK_INTERVAL, |number, generation| {
                let Some(known) = self.outstanding.get_mut(number).filter(|known| known.generation == generation)
                else {
                    late += 1;
                    return false;
                };
                let now = Instant::now();
                moved += 1;
                if counts {
                    score.latencies.push(nanos(now.saturating_duration_since(known.since)));
                }
                known.since = now;
                true
            })?;
            progress.moved.fetch_add(moved, Ordering::Relaxed);
            score.lost = score.lost.saturating_sub(late);
        }
        Ok(score)
    }

    /// Sends new ones in place of those that are lost, and says how many.
    fn send_again(&mut self, now: Instant) -> u64 {
        let mut count = 0;
        for (number, lost) in self.outstanding.iter_mut().enumerate() {
            if now.saturating_duration_since(lost.since) >= STALL {
                (lost.generation, lost.since) = (lost.generation + 1, now);
                let datagram = datagram(Ask::Answer, self.flows.bytes, number as u32, lost.generation);
                let _ = self.flows.sockets[lost.flow].send(&datagram); // if not, it is lost once more
                count += 1;
            }
        }
        count
    }
}

fn nanos(time: Duration) -> u32 {
    u32::try_from(time.as_nanos()).unwrap_or(u32::MAX)
}

/// Sends at a rate, whatever comes back.
struct Pacer {
    flows: Flows,
    /// Tells the datagrams of one probe from those of another.
    probe: u32,
}

/// What became of some time at one rate.
struct Probe {
    sent: u64,
    /// While it sent.
    time: Duration,
    /// Nanoseconds, for each that came back.
    latencies: Vec<u32>,
}

impl Probe {
    fn received(&self) -> u64 {
        self.latencies.len() as u64
    }

    fn lost(&self) -> u64 {
        self.sent - self.received()
    }
}

impl Pacer {
    fn send(&mut self, rate: f64, time: Duration) -> io::Result<Probe> {
        self.probe += 1;
        let planned = (rate * time.as_secs_f64()) as usize;
        let (mut sent_at, mut latencies) = (Vec::with_capacity(planned), Vec::with_capacity(planned));
        let mut datagram = datagram(Ask::Answer, self.flows.bytes, 0, self.probe);
        let began = Instant::now();
        while began.elapsed() < time {
            let due = (rate * began.elapsed().as_secs_f64()) as usize + 1;
            let count = due.min(sent_at.len() + CATCH_UP) - sent_at.len();
            for _ in 0..count {
                let number = sent_at.len();
                datagram[4..8].copy_from_slice(&(number as u32).to_ne_bytes());
                sent_at.push(Instant::now());
                let _ = self.flows.sockets[number % self.flows.sockets.len()].send(&datagram); // if not, it is lost
            }
            let next = Duration::from_secs_f64(sent_at.len() as f64 / rate);
            self.take(&sent_at, &mut latencies, next.saturating_sub(began.elapsed()))?;
        }
        let (time, mut before) = (began.elapsed(), usize::MAX);
        while latencies.len() < sent_at.len() && latencies.len() != before {
            before = latencies.len();
            self.take(&sent_at, &mut latencies, STALL)?;
        }
        Ok(Probe { sent: sent_at.len() as u64, time, latencies })
    }

    fn take(&mut self, sent_at: &[Instant], latencies: &mut Vec<u32>, patience: Duration) -> io::Result<()> {
        let probe = self.probe;
        self.flows.bounce(patience, |number, generation| {
            if let Some(sent) = sent_at.get(number).filter(|_| generation == probe) {
                latencies.push(nanos(sent.elapsed()));
            }
            false
        })
    }
}
