//! Client memory: which backend a client was sent to, for `sessionAffinity: ClientIP`.
//!
//! Bounded and lock-free: readers never wait, writers never block readers. Whether a remembered
//! backend may still be used is the balancer's question; only ids are known here.
//!
//! The memory is a set-associative table of words. A client's hash chooses a set of eight places;
//! a place holds the hash and one pin for each scope. **A pin is one word**, so that it is always
//! read and replaced whole, and every decision between threads is a compare-and-swap on one word:
//!
//! * a place is claimed by a swap of its key, and the lowest empty place is always asked first:
//!   two threads with one new client meet in the same place;
//! * a pin is set by a swap of its word: the loser sees the winner's pin and adopts it.
//!
//! Hence all orderings are `Relaxed`: no word publishes other memory, and swaps of one word are
//! totally ordered by themselves. Key and pin may be read from two moments (another client took the
//! place in between), so a pin repeats a few bits of its key: what does not fit is no pin.
//! Keys never go back to empty, hence the meeting place is sure while a set has room. In a full
//! set, where the longest unused client makes room, two first connections of one client in the
//! same instant may part for once; the later ones agree.

use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use foldhash::quality::RandomState;

use crate::name::Scope;
use crate::stats::Counter;

/// How many clients of one ServicePort are remembered at most; beyond, the longest unused go first.
///
/// A full memory has 3 MiB; pages that no client has touched cost nothing.
pub const CLIENTS: usize = 1 << 17;

/// Places in a set. With more, a full set has a fairer notion of its oldest; with fewer, a look-up is shorter.
const WAYS: usize = 8;

/// Words of a set: its keys, its pins of scope Cluster, its pins of scope Local.
const SET_WORDS: usize = 3 * WAYS;

/// The clients of one ServicePort and the backends they stay with, one pin per scope.
///
/// Shared by all server tasks; only `control` switches it on and off.
#[derive(Debug, Default)]
pub struct Affinity {
    pins: ArcSwapOption<Pins>,
    /// Clients that were forgotten before their time, because the memory was full.
    pub evicted: Counter,
}

impl Affinity {
    /// Sets how long a pin lives without a new connection; `None` switches affinity off and forgets all pins.
    ///
    /// Pins that are there are judged by the new time at once.
    /// From Service `spec.sessionAffinityConfig.clientIP.timeoutSeconds` (1..=86400, default 10800).
    pub fn set_timeout(&self, timeout: Option<Duration>) {
        let Some(timeout) = timeout else { return self.pins.store(None) };
        match &*self.pins.load() {
            Some(pins) => pins.set_timeout(timeout),
            None => self.pins.store(Some(Arc::new(Pins::new(CLIENTS / WAYS, timeout)))),
        }
    }

    /// The id of the backend that the client stays with, if its pin is alive. Renews the pin.
    ///
    /// A scope without a pin takes the other scope's, as the pin belongs to the ServicePort; whether
    /// that backend is in the scope's own table is for the caller to see.
    pub fn recall(&self, client: IpAddr, scope: Scope, now: Instant) -> Option<u32> {
        self.pins.load().as_ref()?.recall(client, scope, now)
    }

    /// Pins the client to a backend, in place of the pin `instead_of` that the caller could not use.
    ///
    /// Returns the id that counts: another thread may have pinned the client in between.
    pub fn remember(&self, client: IpAddr, scope: Scope, backend: u32, instead_of: Option<u32>, now: Instant) -> u32 {
        match &*self.pins.load() {
            Some(pins) => pins.remember(client, scope, backend, instead_of, now, &self.evicted),
            None => backend,
        }
    }
}

/// The table. Shared by all threads; forgotten as a whole.
#[derive(Debug)]
struct Pins {
    epoch: Instant,
    timeout_seconds: AtomicU32,
    hasher: RandomState,
    words: Box<[AtomicU64]>,
}

impl Pins {
    /// Room for `sets` (a power of two) times [`WAYS`] clients.
    fn new(sets: usize, timeout: Duration) -> Self {
        // The words stay in the pages that the allocator got zeroed and untouched from the kernel: collecting
        // into the same allocation is a no-op for a type of the same layout.
        let words = vec![0_u64; sets * SET_WORDS].into_iter().map(AtomicU64::new).collect();
        let now = Instant::now();
        let pins = Self {
            // A caller may have read its clock a moment before the table was made: keep that after the epoch.
            epoch: now.checked_sub(Duration::from_secs(3600)).unwrap_or(now),
            timeout_seconds: AtomicU32::new(0),
            hasher: RandomState::default(),
            words,
        };
        pins.set_timeout(timeout);
        pins
    }

    fn set_timeout(&self, timeout: Duration) {
        self.timeout_seconds.store(u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX), Relaxed);
    }

    fn recall(&self, client: IpAddr, scope: Scope, now: Instant) -> Option<u32> {
        let key = self.key(client);
        let moment = self.moment(now);
        let place = self.set(key).find(key)?;
        let cell = place.pin(scope);
        let seen = Pin(cell.load(Relaxed));
        let backend = match moment.alive(seen, key) {
            Some(backend) if seen.stamp() == moment.stamp => return Some(backend),
            Some(backend) => backend,
            None => moment.alive(Pin(place.pin(other(scope)).load(Relaxed)), key)?,
        };
        // Whoever changed the pin in between knows better: its pin is as fresh as this one would be.
        let _ = cell.compare_exchange(seen.0, Pin::new(backend, moment.stamp, key).0, Relaxed, Relaxed);
        Some(backend)
    }

    fn remember(
        &self,
        client: IpAddr,
        scope: Scope,
        backend: u32,
        instead_of: Option<u32>,
        now: Instant,
        evicted: &Counter,
    ) -> u32 {
        let key = self.key(client);
        let moment = self.moment(now);
        let place = self.set(key).find_or_claim(key, moment, evicted);
        let cell = place.pin(scope);
        let wanted = Pin::new(backend, moment.stamp, key);
        let mut seen = Pin(cell.load(Relaxed));
        loop {
            if let Some(pinned) = moment.alive(seen, key)
                && Some(pinned) != instead_of
            {
                return pinned;
            }
            match cell.compare_exchange_weak(seen.0, wanted.0, Relaxed, Relaxed) {
                Ok(_) => return backend,
                Err(changed) => seen = Pin(changed),
            }
        }
    }

    /// What stands for the client: 64 bits of its address, seeded, never 0.
    fn key(&self, client: IpAddr) -> u64 {
        self.hasher.hash_one(client.to_canonical()).max(1)
    }

    fn set(&self, key: u64) -> Set<'_> {
        let sets = self.words.len() / SET_WORDS;
        let start = (key as usize & (sets - 1)) * SET_WORDS;
        Set(&self.words[start..start + SET_WORDS])
    }

    fn moment(&self, now: Instant) -> Moment {
        Moment {
            stamp: Pin::wrapped(now.saturating_duration_since(self.epoch).as_secs()),
            timeout_seconds: self.timeout_seconds.load(Relaxed),
        }
    }
}

/// The places that a key may be in.
#[derive(Clone, Copy)]
struct Set<'t>(&'t [AtomicU64]);

impl<'t> Set<'t> {
    fn place(self, way: usize) -> Place<'t> {
        Place { words: self.0, way }
    }

    fn find(self, key: u64) -> Option<Place<'t>> {
        (0..WAYS).map(|way| self.place(way)).find(|place| place.key().load(Relaxed) == key)
    }

    /// The key's place: its own, else the lowest empty one, else that of the longest unused client.
    fn find_or_claim(self, key: u64, moment: Moment, evicted: &Counter) -> Place<'t> {
        // Comes around again only where another thread has just claimed the place for its own client.
        loop {
            let (place, held) = self.own_or_claimable(key, moment);
            if held == key {
                return place;
            }
            let left_behind = place.pins();
            if place.key().compare_exchange(held, key, Relaxed, Relaxed).is_ok() {
                if held != 0 && place.age(moment) <= moment.timeout_seconds {
                    evicted.increment();
                }
                place.clear(left_behind);
                return place;
            }
        }
    }

    /// The key's place, or the one to claim, with the key that holds it.
    fn own_or_claimable(self, key: u64, moment: Moment) -> (Place<'t>, u64) {
        let mut oldest = (self.place(0), 0, 0);
        for place in (0..WAYS).map(|way| self.place(way)) {
            let held = place.key().load(Relaxed);
            if held == key || held == 0 {
                return (place, held); // Nothing is behind an empty place: keys are claimed in order and never go.
            }
            let age = place.age(moment);
            if oldest.1 == 0 || age > oldest.2 {
                oldest = (place, held, age);
            }
        }
        (oldest.0, oldest.1)
    }
}

/// Room for one client.
#[derive(Clone, Copy)]
struct Place<'t> {
    words: &'t [AtomicU64],
    way: usize,
}

impl<'t> Place<'t> {
    fn key(self) -> &'t AtomicU64 {
        &self.words[self.way]
    }

    fn pin(self, scope: Scope) -> &'t AtomicU64 {
        match scope {
            Scope::Cluster => &self.words[WAYS + self.way],
            Scope::Local => &self.words[2 * WAYS + self.way],
        }
    }

    fn pins(self) -> [Pin; 2] {
        SCOPES.map(|scope| Pin(self.pin(scope).load(Relaxed)))
    }

    /// Takes away the pins of the last client, unless the new one, on another thread, has already put its own there.
    fn clear(self, left_behind: [Pin; 2]) {
        for (scope, pin) in SCOPES.into_iter().zip(left_behind) {
            let _ = self.pin(scope).compare_exchange(pin.0, 0, Relaxed, Relaxed);
        }
    }

    /// Seconds since the younger of its pins was used.
    fn age(self, moment: Moment) -> u32 {
        let [cluster, local] = self.pins().map(|pin| moment.age(pin));
        cluster.min(local)
    }
}

const SCOPES: [Scope; 2] = [Scope::Cluster, Scope::Local];

fn other(scope: Scope) -> Scope {
    match scope {
        Scope::Cluster => Scope::Local,
        Scope::Local => Scope::Cluster,
    }
}

/// What pins are judged by: the time, and how long one lives.
#[derive(Clone, Copy)]
struct Moment {
    stamp: u32,
    timeout_seconds: u32,
}

impl Moment {
    /// The pinned backend, if the pin is the key's and was used within the timeout.
    fn alive(self, pin: Pin, key: u64) -> Option<u32> {
        (pin.fits(key) && self.age(pin) <= self.timeout_seconds).then(|| pin.backend())
    }

    /// Whole seconds since the pin was used. A thread whose clock reading is a little older finds no age, not an eternity.
    fn age(self, pin: Pin) -> u32 {
        if pin.0 == 0 {
            return u32::MAX;
        }
        let age = Pin::wrapped(u64::from(self.stamp.wrapping_sub(pin.stamp())));
        if age < Pin::STAMPS / 2 { age } else { 0 }
    }
}

/// A backend's id (32 bits), the second of its last use (24 bits) and check bits of its key (8 bits). 0 is none.
///
/// Seconds wrap after 194 days: a pin that was not used for that long may come alive again, which does no harm.
#[derive(Clone, Copy)]
struct Pin(u64);

impl Pin {
    const STAMPS: u32 = 1 << 24;

    fn new(backend: u32, stamp: u32, key: u64) -> Self {
        Self(u64::from(backend) << 32 | u64::from(stamp) << 8 | Self::check(key))
    }

    /// Never 0, and none of the bits that choose the set.
    fn check(key: u64) -> u64 {
        key >> 56 | 1
    }

    fn wrapped(seconds: u64) -> u32 {
        (seconds % u64::from(Self::STAMPS)) as u32
    }

    fn fits(self, key: u64) -> bool {
        self.0 & 0xff == Self::check(key)
    }

    fn stamp(self) -> u32 {
        (self.0 >> 8) as u32 % Self::STAMPS
    }

    fn backend(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::Barrier;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);
    const SECOND: Duration = Duration::from_secs(1);

    fn sticky() -> (Affinity, Instant) {
        let affinity = Affinity::default();
        affinity.set_timeout(Some(TIMEOUT));
        (affinity, Instant::now())
    }

    fn client(number: u32) -> IpAddr {
        Ipv4Addr::from_bits(0x0a00_0000 + number).into()
    }

    /// Pins a client that has no pin that counts.
    fn pin(affinity: &Affinity, client: IpAddr, backend: u32, now: Instant) {
        assert_eq!(affinity.remember(client, Scope::Cluster, backend, None, now), backend);
    }

    #[test]
    fn given_no_affinity_when_a_client_is_pinned_then_nothing_is_remembered() {
        let affinity = Affinity::default();
        let now = Instant::now();

        pin(&affinity, client(1), 7, now);

        assert_eq!(affinity.recall(client(1), Scope::Cluster, now), None);
    }

    #[test]
    fn t141_given_a_pin_when_the_timeout_passes_without_a_connection_then_it_is_forgotten() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);
        pin(&affinity, client(2), 8, now);

        assert_eq!(affinity.recall(client(1), Scope::Cluster, now + TIMEOUT - SECOND), Some(7));
        assert_eq!(affinity.recall(client(2), Scope::Cluster, now + TIMEOUT + SECOND), None);
    }

    #[test]
    fn t142_given_a_connection_every_half_timeout_when_ten_timeouts_pass_then_the_pin_is_alive() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);

        for half in 1..=20 {
            assert_eq!(affinity.recall(client(1), Scope::Cluster, now + TIMEOUT / 2 * half), Some(7));
        }
    }

    #[test]
    fn t143_given_a_pin_when_the_timeout_is_shortened_then_the_new_value_judges() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);

        affinity.set_timeout(Some(5 * SECOND));

        assert_eq!(affinity.recall(client(1), Scope::Cluster, now + 6 * SECOND), None);
    }

    #[test]
    fn t143_given_pins_when_affinity_goes_off_and_on_then_they_are_forgotten() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);

        affinity.set_timeout(None);
        affinity.set_timeout(Some(TIMEOUT));

        assert_eq!(affinity.recall(client(1), Scope::Cluster, now), None);
    }

    #[test]
    fn given_a_thread_whose_clock_reading_is_older_when_it_recalls_then_the_pin_is_alive() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now + 2 * SECOND);

        assert_eq!(affinity.recall(client(1), Scope::Cluster, now), Some(7));
        assert_eq!(affinity.remember(client(1), Scope::Cluster, 8, None, now), 7);
    }

    #[test]
    fn given_a_live_pin_when_another_backend_is_remembered_then_the_pin_counts() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);

        assert_eq!(affinity.remember(client(1), Scope::Cluster, 8, None, now), 7);
        assert_eq!(affinity.remember(client(1), Scope::Cluster, 8, Some(6), now), 7);
    }

    #[test]
    fn t140_given_a_pin_that_could_not_be_used_when_it_is_replaced_then_the_new_one_counts() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);
        pin(&affinity, client(2), 7, now);

        assert_eq!(affinity.remember(client(1), Scope::Cluster, 8, Some(7), now), 8);

        assert_eq!(affinity.recall(client(1), Scope::Cluster, now), Some(8));
        assert_eq!(affinity.recall(client(2), Scope::Cluster, now), Some(7), "others keep theirs");
    }

    #[test]
    fn t145_given_a_pin_in_one_scope_when_the_other_scope_asks_then_it_takes_it() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);

        assert_eq!(affinity.recall(client(1), Scope::Local, now), Some(7));
    }

    #[test]
    fn t144_given_a_taken_pin_that_does_not_fit_when_it_is_replaced_then_the_other_scope_keeps_its_own() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);
        affinity.recall(client(1), Scope::Local, now);

        assert_eq!(affinity.remember(client(1), Scope::Local, 9, Some(7), now), 9);

        assert_eq!(affinity.recall(client(1), Scope::Local, now), Some(9));
        assert_eq!(affinity.recall(client(1), Scope::Cluster, now), Some(7));
    }

    #[test]
    fn t147_given_two_ipv6_clients_when_they_differ_in_the_last_bit_then_they_have_pins_of_their_own() {
        let (affinity, now) = sticky();
        let [one, two] = ["2001:db8::1", "2001:db8::2"].map(|text| text.parse::<IpAddr>().expect("an address"));
        pin(&affinity, one, 7, now);
        pin(&affinity, two, 8, now);

        assert_eq!(affinity.recall(one, Scope::Cluster, now), Some(7));
        assert_eq!(affinity.recall(two, Scope::Cluster, now), Some(8));
    }

    #[test]
    fn given_an_ipv4_client_when_it_comes_as_a_mapped_address_then_it_is_the_same_client() {
        let (affinity, now) = sticky();
        pin(&affinity, "192.0.2.1".parse().expect("an address"), 7, now);

        assert_eq!(affinity.recall("::ffff:192.0.2.1".parse().expect("an address"), Scope::Cluster, now), Some(7));
    }

    #[test]
    fn t148_given_a_full_memory_when_one_more_client_comes_then_the_longest_unused_one_makes_room() {
        let pins = Pins::new(1, TIMEOUT);
        let evicted = Counter::default();
        let now = Instant::now();
        let remember = |number: u32, at| pins.remember(client(number), Scope::Cluster, number, None, at, &evicted);
        for number in 0..WAYS as u32 {
            remember(number, now + number * SECOND);
        }
        pins.recall(client(0), Scope::Cluster, now + 10 * SECOND);

        remember(100, now + 11 * SECOND);

        let recalled = |number| pins.recall(client(number), Scope::Cluster, now + 12 * SECOND);
        assert_eq!(recalled(100), Some(100));
        assert_eq!(recalled(0), Some(0), "used again after the others");
        assert_eq!(recalled(1), None, "the longest unused");
        assert!((2..WAYS as u32).all(|number| recalled(number) == Some(number)));
        assert_eq!(evicted.get(), 1);
    }

    #[test]
    fn t149_given_more_clients_than_the_memory_holds_when_they_are_pinned_then_none_fails_and_the_last_is_known() {
        let pins = Pins::new(16, TIMEOUT);
        let evicted = Counter::default();
        let now = Instant::now();

        for number in 0..10_000 {
            assert_eq!(pins.remember(client(number), Scope::Cluster, number, None, now, &evicted), number);
        }

        assert_eq!(pins.recall(client(9_999), Scope::Cluster, now), Some(9_999));
        assert_eq!(evicted.get(), 10_000 - 16 * WAYS as u64);
    }

    #[test]
    fn given_an_expired_client_when_its_place_is_taken_then_nobody_was_evicted() {
        let pins = Pins::new(1, TIMEOUT);
        let evicted = Counter::default();
        let now = Instant::now();
        for number in 0..WAYS as u32 {
            pins.remember(client(number), Scope::Cluster, number, None, now, &evicted);
        }

        pins.remember(client(100), Scope::Cluster, 100, None, now + 2 * TIMEOUT, &evicted);

        assert_eq!(evicted.get(), 0);
    }

    /// Each thread brings the same new clients and wants a backend of its own for them.
    #[test]
    fn given_new_clients_when_threads_pin_them_at_once_then_all_agree() {
        const THREADS: u32 = 4;
        const CLIENTS: u32 = 2_000;
        let (affinity, now) = sticky();
        let start = Barrier::new(THREADS as usize);

        let agreed: Vec<Vec<u32>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (affinity, start) = (&affinity, &start);
                    scope.spawn(move || {
                        start.wait();
                        let pin = |number| affinity.remember(client(number), Scope::Cluster, thread, None, now);
                        (0..CLIENTS).map(pin).collect()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });

        for number in 0..CLIENTS {
            let kept = affinity.recall(client(number), Scope::Cluster, now).expect("a pin");
            assert!(agreed.iter().all(|pins| pins[number as usize] == kept), "client {number}: {kept}");
        }
    }

    /// The same, with one failed backend that all threads want to move away from.
    #[test]
    fn given_a_pin_that_failed_when_threads_move_it_at_once_then_one_of_them_decides() {
        let (affinity, now) = sticky();
        let start = Barrier::new(4);
        pin(&affinity, client(1), 99, now);

        let move_to = |to| {
            start.wait();
            affinity.remember(client(1), Scope::Cluster, to, Some(99), now)
        };
        let moved: Vec<u32> = std::thread::scope(|scope| {
            let move_to = &move_to;
            let threads: Vec<_> = (0..4).map(|to| scope.spawn(move || move_to(to))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });

        let kept = affinity.recall(client(1), Scope::Cluster, now).expect("a pin");
        assert!(moved.iter().all(|backend| *backend == kept), "{moved:?}, {kept}");
    }

    /// Readers and writers at full speed in a memory that is far too small: never a pin that nobody made.
    #[test]
    fn given_a_crowded_set_when_threads_read_and_write_then_each_pin_read_was_once_written() {
        let pins = Pins::new(1, TIMEOUT);
        let evicted = Counter::default();
        let now = Instant::now();
        // A torn read that passes the check bits gives another client's pin (7 bits): backends overlap on purpose.
        let backend_of = |number: u32| 1_000 + number % 2;

        std::thread::scope(|scope| {
            for offset in 0..4 {
                let (pins, evicted) = (&pins, &evicted);
                scope.spawn(move || {
                    for round in 0..20_000 {
                        let number = (round * 7 + offset) % 32;
                        pins.remember(client(number), Scope::Cluster, backend_of(number), None, now, evicted);
                        if let Some(backend) = pins.recall(client(number), Scope::Local, now) {
                            assert!((1_000..=1_001).contains(&backend), "{backend}");
                        }
                    }
                });
            }
        });
    }
}
