//! What the data plane tells an access log: a record for each end, through a queue that nobody waits for.
//!
//! How a record is written is `access_line`, who writes it is `access_log`. Where there is no access log there is no
//! [`AccessTap`], and all that is left of it is the look at an empty `Option`.
//!
//! A record costs a box at the begin, which holds what is known then, and a place in a bounded queue at the end. Where
//! the queue is full the record is dropped and counted. The queue takes no lock but to wake a writer that waits, and
//! that one waits again only after a rest: it is woken some dozen times a second, however much ends.

use std::hash::BuildHasher;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use foldhash::quality::FixedState;
use serde::{Deserialize, Serialize};

use crate::name::ListenKey;
use crate::plan::ListenerKind;
use crate::serve::balancer::PortState;
use crate::serve::mmsg::Tally;
use crate::stats::{CloseReason, DropReason, PROCESS};

/// Where the data plane tells of ends. Cheap to clone; all clones share one queue and one sample.
#[derive(Clone, Debug)]
pub struct AccessTap(Arc<Tap>);

#[derive(Debug)]
struct Tap {
    /// `None` asks the writer to look at its orders.
    queue: SyncSender<Option<AccessRecord>>,
    /// One in so many is told of.
    every: NonZeroU32,
    /// What has begun so far. Not counted where all are told of.
    begun: AtomicU64,
    /// Says which one of each row it is.
    places: FixedState,
}

/// A connection or flow that has ended: what a line of the access log tells.
#[derive(Debug)]
pub(crate) struct AccessRecord {
    /// When it ended. The time of day is the writer's to know: here clocks only count on.
    pub(crate) at: Instant,
    /// Who came.
    pub(crate) client: SocketAddr,
    /// The balancer in front that has said so; `None` where the client has come itself.
    pub(crate) peer: Option<SocketAddr>,
    /// Where it came to.
    pub(crate) listen: ListenKey,
    /// Why there is a listener.
    pub(crate) kind: ListenerKind,
    /// Which ServicePort served it.
    pub(crate) port: Arc<PortState>,
    /// Who was reached; `None` where it was turned away.
    pub(crate) backend: Option<SocketAddr>,
    /// What the backend took. Datagrams for UDP alone.
    pub(crate) upstream: Tally,
    /// What the client took.
    pub(crate) downstream: Tally,
    /// From accepting it, or its first datagram, to the end. A flow that was silent at last ends with its idle time.
    pub(crate) duration: Duration,
    /// Backends that were tried, the last one among them.
    pub(crate) tries: u32,
    /// The word that counted the end.
    pub(crate) reason: &'static str,
}

/// The begin of a record. Dropped without an end, it tells nothing.
#[derive(Debug)]
pub(crate) struct Draft {
    tap: AccessTap,
    client: SocketAddr,
    peer: Option<SocketAddr>,
    listen: ListenKey,
    kind: ListenerKind,
    port: Arc<PortState>,
    begun: Instant,
    /// Backends that were tried so far.
    pub(crate) tries: u32,
    /// What the backend took so far.
    pub(crate) upstream: Tally,
    /// What the client took so far.
    pub(crate) downstream: Tally,
}

/// What a draft has noted so far, as a plain value: what another process needs to end the record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct DraftRecord {
    /// Milliseconds since its begin.
    pub(crate) age_ms: u64,
    pub(crate) tries: u32,
    /// Whom a balancer in front has named; `None` where the client has come itself.
    pub(crate) client: Option<SocketAddr>,
    /// Of a flow: a connection knows its own.
    pub(crate) upstream: (u64, u64),
    pub(crate) downstream: (u64, u64),
}

impl AccessTap {
    /// A queue for so many records, and its other end. Of `every` that begin in a row one is told of; which one, the seed
    /// says.
    pub(crate) fn new(capacity: usize, every: NonZeroU32, seed: u64) -> (Self, Receiver<Option<AccessRecord>>) {
        let (queue, records) = sync_channel(capacity);
        let places = FixedState::with_seed(seed);
        (Self(Arc::new(Tap { queue, every, begun: AtomicU64::new(0), places })), records)
    }

    /// True where the connection or flow that begins now is one that the sample takes.
    ///
    /// One of each row of so many, at a place that nobody can foresee: backends come by turns, and with a fixed place two of
    /// them and a sample of one in two would have all lines tell of the same one.
    pub(crate) fn takes_next(&self) -> bool {
        let every = u64::from(self.0.every.get());
        if every == 1 {
            return true;
        }
        let number = self.0.begun.fetch_add(1, Ordering::Relaxed);
        number % every == self.0.places.hash_one(number / every) % every
    }

    /// Begins a record now.
    pub(crate) fn draft(
        &self,
        client: SocketAddr,
        listen: ListenKey,
        kind: ListenerKind,
        port: &Arc<PortState>,
    ) -> Box<Draft> {
        Box::new(Draft {
            tap: self.clone(),
            client,
            peer: None,
            listen,
            kind,
            port: Arc::clone(port),
            begun: Instant::now(),
            tries: 0,
            upstream: Tally::default(),
            downstream: Tally::default(),
        })
    }

    /// Goes on with a record that another process has begun, of a connection or flow from `peer`. The sample has taken it
    /// there.
    pub(crate) fn go_on(
        &self,
        peer: SocketAddr,
        listen: ListenKey,
        kind: ListenerKind,
        port: &Arc<PortState>,
        so_far: DraftRecord,
    ) -> Box<Draft> {
        let tally = |(datagrams, bytes)| Tally { datagrams, bytes };
        let now = Instant::now();
        Box::new(Draft {
            tap: self.clone(),
            client: so_far.client.unwrap_or(peer),
            peer: so_far.client.map(|_| peer),
            listen,
            kind,
            port: Arc::clone(port),
            begun: now.checked_sub(Duration::from_millis(so_far.age_ms)).unwrap_or(now),
            tries: so_far.tries,
            upstream: tally(so_far.upstream),
            downstream: tally(so_far.downstream),
        })
    }

    /// Has the writer look at its orders, unless the queue is full: then it is awake, and does so anyway.
    pub(crate) fn nudge(&self) {
        let _ = self.0.queue.try_send(None);
    }

    fn send(&self, record: AccessRecord) {
        // Full, or the writer has ended: there is nobody else to tell.
        if self.0.queue.try_send(Some(record)).is_err() {
            PROCESS.access_log_dropped.increment();
        }
    }
}

impl Draft {
    /// What it has noted so far.
    pub(crate) fn record(&self, now: Instant) -> DraftRecord {
        DraftRecord {
            age_ms: u64::try_from(now.saturating_duration_since(self.begun).as_millis()).unwrap_or(u64::MAX),
            tries: self.tries,
            client: self.peer.map(|_| self.client),
            upstream: (self.upstream.datagrams, self.upstream.bytes),
            downstream: (self.downstream.datagrams, self.downstream.bytes),
        }
    }

    /// Who came is a balancer in front, and has said that it comes for this client.
    pub(crate) fn introduce(&mut self, client: SocketAddr) {
        self.peer = Some(std::mem::replace(&mut self.client, client));
    }

    /// The way to a backend has ended.
    pub(crate) fn closed(&self, backend: SocketAddr, reason: CloseReason) {
        self.end(Some(backend), reason.as_str());
    }

    /// No backend was reached.
    pub(crate) fn turned_away(&self, reason: DropReason) {
        self.end(None, reason.as_str());
    }

    fn end(&self, backend: Option<SocketAddr>, reason: &'static str) {
        let at = Instant::now();
        self.tap.send(AccessRecord {
            at,
            client: self.client,
            peer: self.peer,
            listen: self.listen,
            kind: self.kind,
            port: Arc::clone(&self.port),
            backend,
            upstream: self.upstream,
            downstream: self.downstream,
            duration: at.duration_since(self.begun),
            tries: self.tries,
            reason,
        });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::name::{ObjectName, Protocol, ServicePortName};

    pub(crate) const BACKEND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 8080);

    /// The begin of a connection to `default/web:http`.
    pub(crate) fn draft(tap: &AccessTap) -> Box<Draft> {
        let service = ObjectName::new("default", "web");
        let port = Arc::new(PortState::new(ServicePortName::new(service, "http", Protocol::Tcp)));
        let listen = ListenKey::new([10, 96, 0, 10].into(), 80, Protocol::Tcp);
        tap.draft(([192, 0, 2, 1], 5000).into(), listen, ListenerKind::ClusterIp, &port)
    }

    fn every(count: u32) -> NonZeroU32 {
        NonZeroU32::new(count).expect("not 0")
    }

    #[test]
    fn given_an_end_when_told_then_the_record_has_what_the_draft_was_told() {
        let (tap, records) = AccessTap::new(1, every(1), 0);
        let mut draft = draft(&tap);
        draft.tries = 2;
        draft.upstream += Tally { datagrams: 0, bytes: 7 };

        draft.closed(BACKEND, CloseReason::Reset);

        let record = records.try_recv().expect("an entry").expect("a record");
        assert_eq!((record.backend, record.reason), (Some(BACKEND), "reset"));
        assert_eq!((record.tries, record.upstream.bytes, record.downstream.bytes), (2, 7, 0));
    }

    #[test]
    fn t234_given_a_draft_of_another_process_when_it_ends_here_then_the_record_tells_of_both() {
        let (old, _old_records) = AccessTap::new(1, every(1), 0);
        let (new, records) = AccessTap::new(1, every(2), 0);
        let mut begun = draft(&old);
        let (peer, named) = (begun.client, SocketAddr::from(([203, 0, 113, 7], 40_000)));
        begun.tries = 3;
        begun.introduce(named);
        begun.upstream += Tally { datagrams: 1, bytes: 7 };
        let later = Instant::now() + Duration::from_secs(30);

        let mut heir = new.go_on(peer, begun.listen, begun.kind, &begun.port, begun.record(later));
        heir.upstream += Tally { datagrams: 1, bytes: 1 };
        heir.closed(BACKEND, CloseReason::Idle);

        let record = records.try_recv().expect("an entry").expect("a record");
        assert_eq!((record.tries, record.upstream), (3, Tally { datagrams: 2, bytes: 8 }));
        assert_eq!((record.client, record.peer), (named, Some(peer)), "a balancer in front has said so");
        assert!(record.duration >= Duration::from_secs(29), "{:?}", record.duration);
    }

    #[test]
    fn given_a_draft_when_it_is_dropped_then_nothing_is_told() {
        let (tap, records) = AccessTap::new(1, every(1), 0);

        drop(draft(&tap));

        assert!(records.try_recv().is_err());
    }

    #[test]
    fn given_a_sample_of_one_in_three_when_many_begin_then_one_of_each_three_is_taken() {
        for seed in 0..20 {
            let (tap, _records) = AccessTap::new(1, every(3), seed);
            for _ in 0..100 {
                assert_eq!([(); 3].map(|()| tap.takes_next()).into_iter().filter(|taken| *taken).count(), 1, "{seed}");
            }
        }
    }

    #[test]
    fn given_a_sample_as_large_as_the_round_of_backends_when_many_begin_then_each_backend_has_its_part_of_the_lines() {
        let (tap, _records) = AccessTap::new(1, every(2), 7);
        let mut lines = [0_u32; 2];

        for number in 0..10_000 {
            lines[number % 2] += u32::from(tap.takes_next()); // By turns, as round robin picks.
        }

        assert_eq!(lines[0] + lines[1], 5_000);
        assert!(lines.iter().all(|count| (2_300..2_700).contains(count)), "{lines:?}");
    }

    #[test]
    fn given_a_full_queue_when_more_ends_then_nobody_waits_and_the_rest_is_counted() {
        let (tap, records) = AccessTap::new(2, every(1), 0);
        let before = PROCESS.access_log_dropped.get();

        for _ in 0..5 {
            draft(&tap).turned_away(DropReason::EjectedAll);
        }
        tap.nudge();

        assert_eq!(records.try_iter().flatten().count(), 2);
        assert!(PROCESS.access_log_dropped.get() >= before + 3); // Other tests may drop some, too.
    }
}
