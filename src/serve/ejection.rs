//! Whether a backend gets new connections: one that cannot be reached again and again is left out for a time.
//!
//! Passive: what is known comes from clients' own connections, and nothing else is sent. All of it is one word for each
//! backend, so it is always read and replaced whole, and who asks it on the way to a backend makes one load.
//!
//! ```text
//!        so many failures in a row                 its time is up, a client comes
//!   In ─────────────────────────────▶ Out ───────────────────────────────────────▶ Probed
//!    ▲   (unless half are out)         ▲                                             │ │
//!    │                                 └───────────── it fails: twice as long ───────┘ │
//!    └───────────────────────────────────────────────── it is reached ─────────────────┘
//! ```
//!
//! *One client at a time tries it again.* If all were let in when the time is up, each of them would meet a black hole
//! that is still one, for a whole step of the ladder. So whoever goes there claims it, and of many that
//! look in the same instant one gets it.
//!
//! *At most half of a table is out.* Threads may eject two at once, so each looks again after it did, and takes back what
//! was too much. Both do one thing and then look at what the other does, with a fence in between: at least one
//! of them sees both. What is told and counted is told and counted after that look. Endpoints that leave later on take nobody
//! in again: those that are left would share their clients with what is known to be dead.
//!
//! Who passes over those that are out is `balancer`, who tells what a try gave is `connect`.

use std::num::NonZeroU8;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::serve::moment::Moment;
use word::{AtomicU64, fence};

/// The word: under loom, one that tries every order of threads (see the `interleavings` at the end).
#[cfg(not(kube_relay_loom))]
mod word {
    pub(super) use std::sync::atomic::{AtomicU64, fence};
}
#[cfg(kube_relay_loom)]
mod word {
    pub(super) use loom::sync::atomic::{AtomicU64, fence};
}

/// How long a backend is out the first time. Each time after that it is twice as long,
pub const SHORTEST: Duration = Duration::from_secs(10);
/// but never longer than this. One that has been in for so long begins anew.
pub const LONGEST: Duration = Duration::from_secs(300);

/// How long the client that tries it again waits for an answer at most, as all others wait for what it meets.
pub(super) const PROBE: Duration = Duration::from_secs(4);

/// It may go away without a word: when so much has passed, another one tries.
const PROBE_TOLD: Duration = Duration::from_secs(5);

/// Whether one backend is in or out. Shared by all who connect to it; lives as long as the backend.
#[derive(Debug)]
pub(crate) struct Ejection(AtomicU64);

impl Default for Ejection {
    fn default() -> Self {
        Self(AtomicU64::new(Record::default().pack()))
    }
}

impl Ejection {
    /// True where a new connection may go there: the backend is in, or its time is up.
    pub(crate) fn admits(&self, now: Instant) -> bool {
        let record = self.load();
        record.standing == Standing::In || record.is_due(Moment::of(now))
    }

    /// True until a client has reached it again.
    pub(crate) fn is_out(&self) -> bool {
        self.load().standing != Standing::In
    }

    /// For how long nobody will try it, 0 where the next client does; `None` where it is in.
    pub(crate) fn out_for(&self, now: Instant) -> Option<Duration> {
        let record = self.load();
        (record.standing != Standing::In).then(|| record.moment.since(Moment::of(now)))
    }

    /// True where this client goes there now: the backend is in, or its time is up and nobody else is on the way. Then the
    /// others wait for what this one meets.
    pub(crate) fn claim(&self, now: Instant) -> bool {
        let seen = self.load();
        if seen.standing == Standing::In {
            return true;
        }
        let now = Moment::of(now);
        let probed = Record { standing: Standing::Probed, moment: now.after(PROBE_TOLD), ..seen };
        seen.is_due(now) && self.replace(seen, probed)
    }

    /// A client has reached it. True where it was out.
    pub(crate) fn reached(&self, now: Instant) -> bool {
        loop {
            let seen = self.load();
            if seen.standing == Standing::In && seen.failures == 0 {
                return false; // As nearly always: nothing is written.
            }
            if self.replace(seen, seen.after_success(Moment::of(now))) {
                return seen.standing != Standing::In;
            }
        }
    }

    /// A client could not reach it, by the fault of the backend. Ejects it after so many failures in a row, where
    /// `spares` says that its table can do without so many more; tells for how long it is out.
    pub(crate) fn failed(&self, after: NonZeroU8, now: Instant, spares: impl Fn(usize) -> bool) -> Option<Duration> {
        let now = Moment::of(now);
        loop {
            let seen = self.load();
            let failed = seen.after_failure(now);
            let is_enough = failed.standing == Standing::In && failed.failures >= after.get();
            let next = if is_enough && spares(1) { failed.ejected(now) } else { failed };
            if next != seen && !self.replace(seen, next) {
                continue;
            }
            if !is_enough || next.standing == Standing::In {
                return None;
            }
            fence(SeqCst); // Pairs with that of whoever ejects another one of the table.
            if !spares(0) {
                let _ = self.replace(next, failed); // Whoever has changed it since has reached it.
                return None;
            }
            return Some(next.length());
        }
    }

    /// Takes it in again, as if nothing had happened.
    pub(crate) fn pardon(&self) {
        self.0.store(Record::default().pack(), Relaxed);
    }

    /// What is remembered of it, for another process; `None` where that is nothing.
    pub(crate) fn export(&self, now: Instant) -> Option<EjectionRecord> {
        let known = self.load();
        let Record { standing, failures, times, moment } = known;
        let now = Moment::of(now);
        let span = if standing == Standing::In { now.since(moment) } else { moment.since(now) };
        let span_ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        (known != Record::default()).then_some(EjectionRecord { standing, failures, times, span_ms })
    }

    /// Goes on with what another process has remembered. A client that was trying it again is none of this process: another
    /// one tries when its time is up.
    pub(crate) fn import(&self, record: EjectionRecord, now: Instant) {
        let EjectionRecord { standing, failures, times, span_ms } = record;
        let now = Moment::of(now);
        let moment = match standing {
            Standing::In => Moment(now.0.saturating_sub(span_ms)),
            Standing::Out | Standing::Probed => now.after(Duration::from_millis(span_ms).min(LONGEST)),
        };
        let record = Record { standing, failures, times: times.min(Record::MOST_TIMES), moment };
        self.0.store(record.pack(), Relaxed);
    }

    /// `Relaxed`, as are all changes: the word publishes no other memory. For what two words say together see
    /// [`Self::failed`].
    fn load(&self) -> Record {
        Record::unpack(self.0.load(Relaxed))
    }

    fn replace(&self, seen: Record, next: Record) -> bool {
        self.0.compare_exchange(seen.pack(), next.pack(), Relaxed, Relaxed).is_ok()
    }
}

/// Whether a backend is in or out, as a plain value: what another process needs to go on with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EjectionRecord {
    standing: Standing,
    failures: u8,
    times: u8,
    /// In: for how long. Out, or being tried: how much longer.
    span_ms: u64,
}

/// Where a backend stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Standing {
    /// It gets its share.
    #[default]
    In,
    /// It gets nothing until its time is up.
    Out,
    /// One client tries it.
    Probed,
}

/// What is remembered of a backend. Pure: the time is an argument.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    standing: Standing,
    /// In a row, while it is in.
    failures: u8,
    /// How often it was ejected in a row.
    times: u8,
    /// In: since when (the beginning for one that was never out). Out: until when. Probed: until when to wait for that.
    moment: Moment,
}

impl Record {
    const STANDING_BITS: u32 = 2;
    const FAILURE_BITS: u32 = 8;
    const TIMES_BITS: u32 = 4;

    /// After so many times it is out for [`LONGEST`].
    const MOST_TIMES: u8 = 6;

    fn pack(self) -> u64 {
        let word = self.moment.0 << Self::TIMES_BITS | u64::from(self.times);
        (word << Self::FAILURE_BITS | u64::from(self.failures)) << Self::STANDING_BITS | self.standing as u64
    }

    fn unpack(word: u64) -> Self {
        let standing = match word & 3 {
            0 => Standing::In,
            1 => Standing::Out,
            _ => Standing::Probed,
        };
        let word = word >> Self::STANDING_BITS;
        let failures = word as u8;
        let word = word >> Self::FAILURE_BITS;
        let times = (word & 0xf) as u8;
        Self { standing, failures, times, moment: Moment(word >> Self::TIMES_BITS) }
    }

    fn is_due(self, now: Moment) -> bool {
        self.moment <= now
    }

    fn after_failure(self, now: Moment) -> Self {
        match self.standing {
            Standing::In => Self { failures: self.failures.saturating_add(1), ..self },
            // Of a try that began before, or for which no other was left.
            Standing::Out => self,
            Standing::Probed => self.ejected(now),
        }
    }

    fn after_success(self, now: Moment) -> Self {
        match self.standing {
            Standing::In => Self { failures: 0, ..self },
            Standing::Out | Standing::Probed => {
                Self { standing: Standing::In, failures: 0, times: self.times, moment: now }
            }
        }
    }

    fn ejected(self, now: Moment) -> Self {
        let was_well = self.standing == Standing::In && now.since(self.moment) >= LONGEST;
        let times = if was_well { 1 } else { (self.times + 1).min(Self::MOST_TIMES) };
        let out = Self { standing: Standing::Out, failures: 0, times, moment: now };
        Self { moment: now.after(out.length()), ..out }
    }

    /// How long it is out, by how often it was.
    fn length(self) -> Duration {
        SHORTEST.saturating_mul(1 << self.times.saturating_sub(1)).min(LONGEST)
    }
}

#[cfg(all(test, not(kube_relay_loom)))]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    const FIVE: NonZeroU8 = NonZeroU8::new(5).expect("5 is not 0");

    /// A backend among many, and a clock.
    struct Case {
        ejection: Ejection,
        now: Instant,
    }

    impl Case {
        fn new() -> Self {
            Self { ejection: Ejection::default(), now: Instant::now() }
        }

        fn fail(&self) -> Option<Duration> {
            self.ejection.failed(FIVE, self.now, |_| true)
        }

        /// Fails until it is out; for how long.
        fn eject(&self) -> u64 {
            (0..5).find_map(|_| self.fail()).expect("five failures are enough").as_secs()
        }

        fn wait(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
        }

        fn admits(&self) -> bool {
            self.ejection.admits(self.now)
        }
    }

    #[test]
    fn f07_given_failures_in_a_row_when_they_are_five_then_the_backend_is_out_for_ten_seconds() {
        let mut case = Case::new();

        assert!((0..4).all(|_| case.fail().is_none()) && case.admits());
        assert_eq!(case.fail(), Some(SHORTEST));
        case.wait(9);
        assert!(!case.admits() && case.ejection.is_out());
        case.wait(2);

        assert!(case.admits());
    }

    #[test]
    fn t234_given_a_backend_that_is_out_when_another_process_goes_on_with_it_then_it_stays_out_as_long() {
        let mut case = Case::new();
        assert_eq!(case.ejection.export(case.now), None);
        case.eject();
        case.wait(4);

        let heir = Ejection::default();
        heir.import(case.ejection.export(case.now).expect("it is out"), case.now);

        assert!(heir.is_out());
        let left = |ejection: &Ejection| ejection.out_for(case.now).map(|left| left.as_millis());
        assert_eq!(left(&heir), left(&case.ejection));
        for ejection in [&case.ejection, &heir] {
            let later = case.now + Duration::from_secs(7);
            assert!(ejection.claim(later) && !ejection.claim(later), "one of them tries");
            ejection.failed(FIVE, later, |_| true);
            assert!(ejection.out_for(later) > Some(SHORTEST), "the second time is longer");
        }
    }

    #[test]
    fn given_what_no_backend_can_have_when_taken_over_then_it_is_out_no_longer_than_any() {
        let case = Case::new();
        let absurd = EjectionRecord { standing: Standing::Out, failures: 255, times: 255, span_ms: u64::MAX };

        case.ejection.import(absurd, case.now);

        assert!(case.ejection.out_for(case.now).is_some_and(|left| left <= LONGEST));
    }

    #[test]
    fn given_failures_when_one_client_gets_through_in_between_then_they_are_counted_anew() {
        let case = Case::new();

        for _ in 0..3 {
            assert!((0..4).all(|_| case.fail().is_none()));
            assert!(!case.ejection.reached(case.now), "it was never out");
        }

        assert!(!case.ejection.is_out());
    }

    #[test]
    fn given_a_backend_whose_time_is_up_when_a_client_tries_it_then_the_others_wait_for_the_outcome() {
        let mut case = Case::new();
        case.eject();
        case.wait(11);

        assert!(case.ejection.claim(case.now), "it is the first");
        assert!(!case.admits() && !case.ejection.claim(case.now), "one at a time");
        assert!(case.ejection.reached(case.now), "it was out");

        assert!(case.admits() && !case.ejection.is_out());
        assert!(!case.ejection.reached(case.now), "and that is told once");
    }

    #[test]
    fn given_a_client_that_went_away_without_a_word_when_it_was_to_tell_then_another_one_tries() {
        let mut case = Case::new();
        case.eject();
        case.wait(11);
        assert!(case.ejection.claim(case.now));

        case.wait(PROBE.as_secs());
        assert!(!case.admits(), "it may tell yet");
        case.wait(1);

        assert!(case.admits() && case.ejection.claim(case.now));
    }

    #[test]
    fn f07_given_a_backend_that_stays_dead_when_it_is_tried_again_then_it_is_out_twice_as_long_up_to_five_minutes() {
        let mut case = Case::new();
        let mut lengths = vec![case.eject()];

        for _ in 0..6 {
            let wait = case.ejection.out_for(case.now).expect("it is out");
            case.now += wait;
            assert!(case.ejection.claim(case.now));
            assert_eq!(case.fail(), None, "it was out before");
            lengths.push(case.ejection.out_for(case.now).expect("it is out").as_secs());
        }

        assert_eq!(lengths, [10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn given_tries_that_began_before_when_they_fail_while_it_is_out_then_it_is_out_no_longer_for_that() {
        let mut case = Case::new();
        case.eject();
        case.wait(1);

        assert!((0..100).all(|_| case.fail().is_none()));

        case.wait(10);
        assert!(case.admits());
    }

    #[test]
    fn given_a_backend_that_came_back_when_it_fails_again_then_it_is_out_longer_unless_it_was_well_for_five_minutes() {
        for (well, seconds) in [(299, 20), (301, 10)] {
            let mut case = Case::new();
            case.eject();
            case.wait(11);
            assert!(case.ejection.reached(case.now));

            case.wait(well);

            assert_eq!(case.eject(), seconds, "after {well} s");
        }
    }

    #[test]
    fn given_a_table_that_cannot_do_without_when_a_backend_fails_then_it_stays_in_and_goes_as_soon_as_it_can() {
        let case = Case::new();

        assert!((0..300).all(|_| case.ejection.failed(FIVE, case.now, |_| false).is_none()));
        assert!(case.admits());

        assert_eq!(case.fail(), Some(SHORTEST));
    }

    #[test]
    fn given_two_that_go_at_once_when_that_is_too_much_then_it_is_taken_back_and_not_told() {
        let case = Case::new();
        assert!((0..4).all(|_| case.fail().is_none()));

        let too_late = case.ejection.failed(FIVE, case.now, |more| more == 1);

        assert_eq!(too_late, None);
        assert!(!case.ejection.is_out());
        assert_eq!(case.fail(), Some(SHORTEST), "the next failure asks again");
    }

    #[test]
    fn given_a_backend_that_is_out_when_ejection_is_switched_off_then_it_is_in() {
        let case = Case::new();
        case.eject();

        case.ejection.pardon();

        assert!(case.admits() && case.ejection.out_for(case.now).is_none());
    }

    #[test]
    fn given_any_record_when_packed_then_it_comes_back_whole() {
        let mut random = StdRng::seed_from_u64(7);
        for _ in 0..10_000 {
            let standing = [Standing::In, Standing::Out, Standing::Probed][random.random_range(0..3)];
            let (failures, times) = (random.random(), random.random_range(0..16));
            let record = Record { standing, failures, times, moment: Moment(random.random::<u64>() >> 14) };
            assert_eq!(Record::unpack(record.pack()), record);
        }
    }

    /// A shadow that keeps what the word keeps, in plain words, and random clients against both.
    #[test]
    fn f07_given_random_clients_and_times_when_simulated_then_it_is_out_for_what_its_failures_say_and_never_for_longer()
    {
        for seed in 0..200 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut case = Case::new();
            let (mut in_a_row, mut ends, mut length) = (0, None::<Instant>, SHORTEST);
            let mut since = None::<Instant>;
            for step in 0..500 {
                case.now += Duration::from_millis(random.random_range(0..8_000));
                let (is_admitted, dead) = (case.admits(), random.random_bool(0.8));
                let place = format!("seed {seed}, step {step}");
                assert_eq!(is_admitted, ends.is_none_or(|ends| Moment::of(case.now) >= Moment::of(ends)), "{place}");
                if !is_admitted {
                    continue;
                }
                let was_out = ends.is_some();
                assert!(case.ejection.claim(case.now), "{place}");
                if !dead {
                    assert_eq!(case.ejection.reached(case.now), was_out, "{place}");
                    in_a_row = 0;
                    if ends.take().is_some() {
                        since = Some(case.now);
                    }
                    continue;
                }
                let told = case.fail();
                in_a_row += 1;
                let goes = was_out || in_a_row == 5;
                if goes {
                    let well =
                        !was_out && since.is_none_or(|since| Moment::of(case.now).since(Moment::of(since)) >= LONGEST);
                    length = if well { SHORTEST } else { (length * 2).min(LONGEST) };
                    (ends, in_a_row) = (Some(Moment::of(case.now).after(length).instant()), 0);
                }
                assert_eq!(told, (goes && !was_out).then_some(length), "{place}");
                assert_eq!(case.ejection.is_out(), goes, "{place}");
            }
        }
    }

    #[test]
    fn f07_given_a_backend_whose_time_is_up_when_threads_claim_it_at_once_then_one_of_them_gets_it() {
        let mut case = Case::new();
        case.eject();
        case.wait(11);
        for _ in 0..200 {
            let got = std::thread::scope(|scope| {
                let threads = [(); 4].map(|()| scope.spawn(|| case.ejection.claim(case.now)));
                threads.map(|thread| thread.join().expect("no panic")).into_iter().filter(|got| *got).count()
            });
            assert_eq!(got, 1);
            case.wait(PROBE_TOLD.as_secs()); // It has told nothing.
        }
    }

    /// Half may be out, no more, whatever the threads do.
    #[test]
    fn f07_given_threads_that_fail_at_all_backends_when_they_eject_then_no_more_than_half_are_out() {
        const BACKENDS: usize = 8;
        for _ in 0..200 {
            let all: [Ejection; BACKENDS] = Default::default();
            let now = Instant::now();
            let spares = |more: usize| all.iter().filter(|one| one.is_out()).count() + more <= BACKENDS / 2;
            std::thread::scope(|scope| {
                for first in 0..4 {
                    let (all, spares) = (&all, &spares);
                    scope.spawn(move || {
                        for turn in 0..10 * BACKENDS {
                            let _ = all[(first * 2 + turn) % BACKENDS].failed(FIVE, now, spares);
                        }
                    });
                }
            });
            assert!(spares(0));
        }
    }
}

/// Every order in which two threads can eject the two backends of a table that can do without one.
#[cfg(all(test, kube_relay_loom))]
mod interleavings {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    const ONE: NonZeroU8 = NonZeroU8::MIN;

    fn spares(all: &[Ejection; 2], more: usize) -> bool {
        all.iter().filter(|one| one.is_out()).count() + more <= 1
    }

    #[test]
    fn f07_given_two_backends_when_two_threads_eject_them_at_once_then_one_stays_in_and_what_is_told_is_so() {
        loom::model(|| {
            let all: Arc<[Ejection; 2]> = Arc::default();
            let now = Instant::now();
            let thread = thread::spawn({
                let all = Arc::clone(&all);
                move || all[0].failed(ONE, now, |more| spares(&all, more)).is_some()
            });
            let told = [all[1].failed(ONE, now, |more| spares(&all, more)).is_some(), thread.join().expect("no panic")];

            assert_eq!(told, [all[1].is_out(), all[0].is_out()]);
            assert!(spares(&all, 0));
        });
    }

    #[test]
    fn f07_given_a_backend_whose_time_is_up_when_two_threads_claim_it_at_once_then_one_of_them_gets_it() {
        loom::model(|| {
            let all: Arc<[Ejection; 2]> = Arc::default();
            let now = Instant::now();
            let time = all[0].failed(ONE, now, |_| true).expect("it is out");
            let claim = move |all: &[Ejection; 2]| all[0].claim(now + time + Duration::from_millis(1));
            let thread = thread::spawn({
                let all = Arc::clone(&all);
                move || claim(&all)
            });

            assert!(claim(&all) ^ thread.join().expect("no panic"));
        });
    }

    #[test]
    fn given_a_backend_when_one_thread_ejects_it_and_another_reaches_it_then_it_is_in_or_told_of() {
        loom::model(|| {
            let all: Arc<[Ejection; 2]> = Arc::default();
            let now = Instant::now();
            let thread = thread::spawn({
                let all = Arc::clone(&all);
                move || all[0].reached(now)
            });
            let ejected = all[0].failed(ONE, now, |more| spares(&all, more)).is_some();
            let returned = thread.join().expect("no panic");

            assert_eq!(all[0].is_out(), ejected && !returned);
        });
    }
}
