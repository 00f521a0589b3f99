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
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use foldhash::quality::SeedableRandomState;

use crate::name::Scope;
pub(crate) use crate::serve::pin_record::{PinRecord, Seeds};
use crate::stats::Counter;
use word::AtomicU64;

/// The words of the table: under loom, words that try every order of threads (see the `interleavings` at the end).
#[cfg(not(kube_relay_loom))]
mod word {
    pub(super) use std::sync::atomic::AtomicU64;
}
#[cfg(kube_relay_loom)]
mod word {
    pub(super) use loom::sync::atomic::AtomicU64;
}

/// How many clients of one ServicePort there is room for. A full memory has 3 MiB; pages that no client has touched
/// cost nothing.
///
/// Room is shared out by sets of eight places, and a client that finds its set full takes the place of the longest
/// unused one there, though other sets may have room. Of 50,000 clients at once 0.2 % lose their place so, of 65,536
/// 0.8 %, of 100,000 5.6 %, of 131,072 14 %: the excess of a Poisson distribution over the places of a set.
pub const CLIENTS: usize = 1 << 17;

/// Places in a set. With more, a full set has a fairer notion of its oldest; with fewer, a look-up is shorter.
/// Loom tries every order in which they can be read: two have all that many have.
const WAYS: usize = if cfg!(kube_relay_loom) { 2 } else { 8 };

/// How old a table's epoch is when it is made.
const AGE_OF_EPOCH: Duration = Duration::from_secs(3600);

/// Words of a set: its keys, its pins of scope Cluster, its pins of scope Local.
const SET_WORDS: usize = 3 * WAYS;

/// The clients of one ServicePort and the backends they stay with, one pin per scope.
///
/// Shared by all server tasks; only `control` switches it on and off.
#[derive(Debug)]
pub struct Affinity {
    pins: ArcSwapOption<Pins>,
    /// False where there are no pins: most Services have none, and need not look.
    on: AtomicBool,
    /// Bits of an IPv6 address that tell one client from another.
    ipv6_prefix: AtomicU8,
    /// Clients that were forgotten before their time, because the memory was full: `kuberelay_affinity_evictions_total`.
    pub evicted: Counter,
}

impl Default for Affinity {
    fn default() -> Self {
        Self {
            pins: ArcSwapOption::empty(),
            on: AtomicBool::new(false),
            ipv6_prefix: AtomicU8::new(128),
            evicted: Counter::default(),
        }
    }
}

impl Affinity {
    /// Sets how long a pin lives without a new connection; `None` switches affinity off and forgets all pins.
    ///
    /// Pins that are there are judged by the new time at once.
    /// From Service `spec.sessionAffinityConfig.clientIP.timeoutSeconds` (1..=86400, default 10800).
    pub fn set_timeout(&self, timeout: Option<Duration>) {
        self.on.store(timeout.is_some(), Relaxed); // A pick that is under way may see either.
        let Some(timeout) = timeout else { return self.pins.store(None) };
        match &*self.pins.load() {
            Some(pins) => pins.set_timeout(timeout),
            None => self.pins.store(Some(Arc::new(Pins::new(CLIENTS / WAYS, timeout)))),
        }
    }

    /// Sets how many leading bits of an IPv6 address tell one client from another (1..=128, default 128). With fewer,
    /// a host that changes its address within its network stays the same client. Pins made with another value are
    /// not found any more, and go as unused ones do.
    pub fn set_ipv6_prefix(&self, bits: u8) {
        self.ipv6_prefix.store(bits, Relaxed);
    }

    /// The id of the backend that the client stays with, if its pin is alive. Renews the pin.
    ///
    /// A scope without a pin takes the other scope's, as the pin belongs to the ServicePort; whether
    /// that backend is in the scope's own table is for the caller to see.
    pub fn recall(&self, client: IpAddr, scope: Scope, now: Instant) -> Option<u32> {
        if !self.on.load(Relaxed) {
            return None;
        }
        let pins = self.pins.load();
        let pins = pins.as_ref()?;
        pins.recall(pins.key(self.party(client)), scope, now)
    }

    /// The same for who only looks: the pin stays as it is. With the time that it has left if the client does not come back,
    /// in whole seconds.
    pub fn look(&self, client: IpAddr, scope: Scope, now: Instant) -> Option<(u32, Duration)> {
        let pins = self.pins.load();
        let pins = pins.as_ref()?;
        pins.look(pins.key(self.party(client)), scope, now)
    }

    /// Pins the client to a backend, in place of the pin `instead_of` that the caller could not use.
    ///
    /// Returns the id that counts: another thread may have pinned the client in between.
    pub fn remember(&self, client: IpAddr, scope: Scope, backend: u32, instead_of: Option<u32>, now: Instant) -> u32 {
        if !self.on.load(Relaxed) {
            return backend;
        }
        match &*self.pins.load() {
            Some(pins) => {
                let key = pins.key(self.party(client));
                pins.remember(key, scope, backend, instead_of, now, &self.evicted)
            }
            None => backend,
        }
    }

    /// What is remembered now, for another process; `None` without pins. Those whose time is over stay behind.
    pub(crate) fn export(&self, now: Instant) -> Option<Memory> {
        let pins = self.pins.load();
        let pins = pins.as_ref().filter(|pins| pins.clients.get() > 0)?;
        let phase = now.saturating_duration_since(pins.epoch).subsec_millis();
        Some(Memory { seeds: pins.seeds, phase_ms: phase, pins: pins.records(pins.moment(now)).collect() })
    }

    /// Goes on with what another process has remembered, or with a part of it: pins that were made here before go. Nothing
    /// comes of it where affinity is off.
    pub(crate) fn import(&self, memory: &Memory, now: Instant) {
        let Some(mine) = self.pins.load_full() else { return };
        let pins = if mine.seeds == memory.seeds { mine } else { Arc::new(mine.emptied(memory, now)) };
        let moment = pins.moment(now);
        memory.pins.iter().for_each(|pin| pins.insert(*pin, moment, &self.evicted));
        self.pins.store(Some(pins));
    }

    /// How many clients are remembered. One whose time is over counts until another takes its place.
    pub fn remembered(&self) -> u64 {
        self.pins.load().as_ref().map_or(0, |pins| pins.clients.get())
    }

    /// Who counts as one client: an address, or the IPv6 network that it is in.
    fn party(&self, client: IpAddr) -> IpAddr {
        match client.to_canonical() {
            IpAddr::V6(address) => {
                let host_bits = 128_u32.saturating_sub(self.ipv6_prefix.load(Relaxed).into());
                let network = u128::MAX.checked_shl(host_bits).unwrap_or(0);
                Ipv6Addr::from_bits(address.to_bits() & network).into()
            }
            address => address,
        }
    }
}

/// The clients of one ServicePort as plain values, by what stands for them in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) seeds: Seeds,
    /// How far the seconds are that the pins' ages are counted in (0..1000): in another process they begin at the same time,
    /// so that no pin gets older or younger on its way.
    pub(crate) phase_ms: u32,
    pub(crate) pins: Vec<PinRecord>,
}

/// The table. Shared by all threads; forgotten as a whole.
#[derive(Debug)]
struct Pins {
    epoch: Instant,
    timeout_seconds: AtomicU32,
    seeds: Seeds,
    hasher: SeedableRandomState,
    words: Box<[AtomicU64]>,
    /// Places that somebody has: none is ever given back.
    clients: Counter,
}

impl Pins {
    /// Room for `sets` (a power of two) times [`WAYS`] clients.
    fn new(sets: usize, timeout: Duration) -> Self {
        let now = Instant::now();
        // A caller may have read its clock a moment before the table was made: keep that after the epoch.
        let pins = Self::at(sets, now.checked_sub(AGE_OF_EPOCH).unwrap_or(now), Seeds::random());
        pins.set_timeout(timeout);
        pins
    }

    /// Another one of this size and timeout, for what another process has remembered.
    fn emptied(&self, memory: &Memory, now: Instant) -> Self {
        let age = AGE_OF_EPOCH + Duration::from_millis(memory.phase_ms.into());
        let pins = Self::at(self.words.len() / SET_WORDS, now.checked_sub(age).unwrap_or(now), memory.seeds);
        pins.timeout_seconds.store(self.timeout_seconds.load(Relaxed), Relaxed);
        pins
    }

    fn at(sets: usize, epoch: Instant, seeds: Seeds) -> Self {
        // The words stay in the pages that the allocator got zeroed and untouched from the kernel: collecting
        // into the same allocation is a no-op for a type of the same layout.
        let words = vec![0_u64; sets * SET_WORDS].into_iter().map(AtomicU64::new).collect();
        Self {
            epoch,
            timeout_seconds: AtomicU32::new(0),
            seeds,
            hasher: seeds.hasher(),
            words,
            clients: Counter::default(),
        }
    }

    fn set_timeout(&self, timeout: Duration) {
        self.timeout_seconds.store(u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX), Relaxed);
    }

    fn recall(&self, key: u64, scope: Scope, now: Instant) -> Option<u32> {
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

    fn look(&self, key: u64, scope: Scope, now: Instant) -> Option<(u32, Duration)> {
        let moment = self.moment(now);
        let place = self.set(key).find(key)?;
        [scope, other(scope)].into_iter().find_map(|scope| {
            let pin = Pin(place.pin(scope).load(Relaxed));
            let backend = moment.alive(pin, key)?;
            let left = moment.timeout_seconds.saturating_sub(moment.age(pin));
            Some((backend, Duration::from_secs(left.into())))
        })
    }

    fn remember(
        &self,
        key: u64,
        scope: Scope,
        backend: u32,
        instead_of: Option<u32>,
        now: Instant,
        evicted: &Counter,
    ) -> u32 {
        let moment = self.moment(now);
        let place = self.set(key).find_or_claim(key, moment, Claims { new: &self.clients, evicted });
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

    /// All pins that are alive.
    fn records(&self, moment: Moment) -> impl Iterator<Item = PinRecord> {
        let places = self.words.chunks_exact(SET_WORDS).flat_map(|set| (0..WAYS).map(|way| Set(set).place(way)));
        let pins = places.flat_map(|place| SCOPES.map(|scope| (place, scope)));
        pins.filter_map(move |(place, scope)| {
            let (key, pin) = (place.key().load(Relaxed), Pin(place.pin(scope).load(Relaxed)));
            let backend = moment.alive(pin, key)?;
            Some(PinRecord { key, scope, backend, age: moment.age(pin) })
        })
    }

    /// Where a table has the same seeds, its clients meet in the same sets: who was there finds its place.
    fn insert(&self, PinRecord { key, scope, backend, age }: PinRecord, moment: Moment, evicted: &Counter) {
        if key == 0 {
            return; // Nobody's: it would be taken for an empty place.
        }
        let place = self.set(key).find_or_claim(key, moment, Claims { new: &self.clients, evicted });
        place.pin(scope).store(Pin::new(backend, moment.before(age), key).0, Relaxed);
    }

    /// What stands for the client: 64 bits of its address, seeded, never 0.
    fn key(&self, party: IpAddr) -> u64 {
        self.hasher.hash_one(party).max(1)
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

/// What new clients count.
#[derive(Clone, Copy)]
struct Claims<'c> {
    /// Places that nobody had.
    new: &'c Counter,
    /// Clients that lost theirs before their time.
    evicted: &'c Counter,
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
    fn find_or_claim(self, key: u64, moment: Moment, claims: Claims<'_>) -> Place<'t> {
        // Comes around again only where another thread has just claimed the place for its own client.
        loop {
            let (place, held) = self.own_or_claimable(key, moment);
            if held == key {
                return place;
            }
            let left_behind = place.pins();
            if place.key().compare_exchange(held, key, Relaxed, Relaxed).is_ok() {
                match held {
                    0 => claims.new.increment(),
                    _ if place.age(moment) <= moment.timeout_seconds => claims.evicted.increment(),
                    _ => {}
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

    /// The stamp of so many seconds ago.
    fn before(self, age: u32) -> u32 {
        Pin::wrapped(u64::from(Pin::STAMPS) + u64::from(self.stamp) - u64::from(age.min(Pin::STAMPS)))
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

#[cfg(all(test, not(kube_relay_loom)))]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::Barrier;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);
    const SECOND: Duration = Duration::from_secs(1);

    impl Pins {
        /// A client's pin at an instant, which stays as it is.
        fn peek(&self, client: IpAddr, at: Instant) -> Option<u32> {
            let key = self.key(client);
            let pin = self.set(key).find(key)?.pin(Scope::Cluster);
            self.moment(at).alive(Pin(pin.load(Relaxed)), key)
        }
    }

    fn sticky() -> (Affinity, Instant) {
        let affinity = Affinity::default();
        affinity.set_timeout(Some(TIMEOUT));
        (affinity, Instant::now())
    }

    fn client(number: u32) -> IpAddr {
        Ipv4Addr::from_bits(0x0a00_0000 + number).into()
    }

    /// What stands for a client in a table of one set: a number that fills all 64 bits.
    fn key(number: u32) -> u64 {
        u64::from(number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
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
    fn t141_given_a_pin_when_looked_at_then_it_is_told_with_the_time_left_and_lives_no_longer_for_it() {
        let (affinity, now) = sticky();
        pin(&affinity, client(1), 7, now);
        let look = |number, after| affinity.look(client(number), Scope::Cluster, now + after * SECOND);

        let seen = [0, 20, 60].map(|after| look(1, after));

        assert_eq!(seen, [60, 40, 0].map(|left| Some((7, left * SECOND))));
        assert_eq!((look(1, 61), look(2, 0)), (None, None));
        assert_eq!(affinity.recall(client(1), Scope::Cluster, now + TIMEOUT + SECOND), None, "no look has renewed it");
        assert_eq!(affinity.remembered(), 1, "nor made a place for a client that is new");
        assert_eq!(Affinity::default().look(client(1), Scope::Cluster, now), None);
    }

    #[test]
    fn t144_given_pins_of_both_scopes_when_looked_at_then_each_scope_has_its_own_and_else_the_others() {
        let (affinity, now) = sticky();
        let look = |number, scope| affinity.look(client(number), scope, now).map(|(backend, _)| backend);
        pin(&affinity, client(1), 7, now);
        pin(&affinity, client(2), 7, now);
        affinity.remember(client(2), Scope::Local, 8, Some(7), now);

        let seen = [1, 2].map(|number| [Scope::Cluster, Scope::Local].map(|scope| look(number, scope)));

        assert_eq!(seen, [[Some(7), Some(7)], [Some(7), Some(8)]]);
        let mapped = Ipv4Addr::from_bits(0x0a00_0001).to_ipv6_mapped().into();
        assert_eq!(affinity.look(mapped, Scope::Cluster, now).map(|(backend, _)| backend), Some(7));
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
    fn t147_given_a_prefix_of_64_bits_when_clients_of_one_network_come_then_they_share_a_pin() {
        let (affinity, now) = sticky();
        let [one, two, far] =
            ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"].map(|text| text.parse::<IpAddr>().expect("an address"));
        affinity.set_ipv6_prefix(64);

        pin(&affinity, one, 7, now);
        pin(&affinity, client(1), 8, now);

        assert_eq!(affinity.recall(two, Scope::Cluster, now), Some(7));
        assert_eq!(affinity.recall(far, Scope::Cluster, now), None);
        assert_eq!(affinity.recall(client(2), Scope::Cluster, now), None, "an IPv4 address is a client of its own");
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
        let remember = |number: u32, at| pins.remember(key(number), Scope::Cluster, number, None, at, &evicted);
        for number in 0..WAYS as u32 {
            remember(number, now + number * SECOND);
        }
        pins.recall(key(0), Scope::Cluster, now + 10 * SECOND);

        remember(100, now + 11 * SECOND);

        let recalled = |number| pins.recall(key(number), Scope::Cluster, now + 12 * SECOND);
        assert_eq!(recalled(100), Some(100));
        assert_eq!(recalled(0), Some(0), "used again after the others");
        assert_eq!(recalled(1), None, "the longest unused");
        assert!((2..WAYS as u32).all(|number| recalled(number) == Some(number)));
        assert_eq!(evicted.get(), 1);
    }

    #[test]
    fn t149_given_a_million_clients_when_they_are_pinned_then_memory_is_the_cap_and_the_last_ones_are_known() {
        const MILLION: u32 = 1_000_000;
        let (affinity, now) = sticky();
        let bytes = || affinity.pins.load().as_ref().map(|pins| size_of_val(&*pins.words));
        assert_eq!(bytes(), Some(CLIENTS * 24));

        for number in 0..MILLION {
            assert_eq!(affinity.remember(client(number), Scope::Cluster, number, None, now), number);
        }

        assert_eq!(bytes(), Some(CLIENTS * 24), "3 MiB, whoever comes");
        assert_eq!(affinity.recall(client(MILLION - 1), Scope::Cluster, now), Some(MILLION - 1));
        let known = (0..MILLION).filter(|number| affinity.recall(client(*number), Scope::Cluster, now).is_some());
        let known = known.count() as u64;
        assert_eq!(known + affinity.evicted.get(), u64::from(MILLION), "each is known, or was counted as it went");
        assert!(known > CLIENTS as u64 * 99 / 100, "{known}");
    }

    #[test]
    fn t148_given_as_many_clients_as_there_is_room_for_when_sets_fill_then_the_stated_share_loses_its_place() {
        for (clients, share) in [(50_000, 0.001_94), (65_536, 0.008_4), (100_000, 0.055_9), (131_072, 0.139_6)] {
            let (affinity, now) = sticky();
            for number in 0..clients {
                pin(&affinity, client(number), number, now);
            }

            let lost = affinity.evicted.get() as f64 / f64::from(clients);

            let noise = 5.0 * (share / f64::from(clients)).sqrt(); // five standard deviations, or more
            assert!((lost - share).abs() < noise, "{clients}: {lost} is not about {share}");
        }
    }

    /// Another process's memory, which has clients of its own already.
    fn heir() -> Affinity {
        let heir = sticky().0;
        heir.set_timeout(Some(2 * TIMEOUT));
        let own = heir.pins.load_full().expect("pins");
        heir.pins.store(Some(Arc::new(Pins::at(own.words.len() / SET_WORDS, own.epoch, Seeds { own: 1, shared: 2 }))));
        heir.set_timeout(Some(TIMEOUT));
        pin(&heir, client(7_000_000), 99, Instant::now());
        heir
    }

    #[test]
    fn t150_given_pins_of_another_process_when_taken_over_then_clients_stay_and_expire_as_they_would_have() {
        let (affinity, now) = sticky();
        for number in 0..50_000 {
            pin(&affinity, client(number), number, now + SECOND * (number % 50));
        }
        affinity.remember(client(3), Scope::Local, 77, None, now + 4 * SECOND);
        let later = now + 50 * SECOND;
        let (heir, evicted) = (heir(), affinity.evicted.get());

        let memory = affinity.export(later).expect("pins");
        heir.import(&memory, later);

        assert_eq!(heir.remembered(), affinity.remembered());
        assert_eq!((affinity.evicted.get(), heir.evicted.get()), (evicted, 0));
        for number in 0..50_000 {
            let at = now + SECOND * (number % 50) + TIMEOUT;
            for at in [at, at + SECOND, at + 2 * SECOND] {
                let known = |affinity: &Affinity| affinity.pins.load_full().expect("pins").peek(client(number), at);
                assert_eq!(known(&heir), known(&affinity), "client {number}");
            }
        }
        assert_eq!(heir.recall(client(3), Scope::Local, later), Some(77));
        assert_eq!(heir.recall(client(7_000_000), Scope::Cluster, later), None, "it was known to nobody before");
    }

    #[test]
    fn t150_given_pins_that_come_in_parts_when_taken_over_then_all_are_known() {
        let (affinity, now) = sticky();
        (0..100).for_each(|number| pin(&affinity, client(number), number, now));
        let (heir, mut memory) = (heir(), affinity.export(now).expect("pins"));
        let half = memory.pins.split_off(50);

        heir.import(&memory, now);
        heir.import(&Memory { pins: half, ..memory }, now);

        assert!((0..100).all(|number| heir.recall(client(number), Scope::Cluster, now) == Some(number)));
    }

    #[test]
    fn given_a_pin_of_nobody_or_no_affinity_when_taken_over_then_nothing_comes_of_it() {
        let (affinity, now) = sticky();
        let nobody = PinRecord { key: 0, scope: Scope::Cluster, backend: 1, age: u32::MAX };
        let memory = Memory { seeds: Seeds { own: 3, shared: 4 }, phase_ms: 999, pins: vec![nobody] };

        affinity.import(&memory, now);
        Affinity::default().import(&memory, now);

        assert_eq!(affinity.remembered(), 0);
        assert_eq!(affinity.export(now), None);
        assert_eq!(Affinity::default().export(now), None);
    }

    #[test]
    fn given_an_expired_client_when_its_place_is_taken_then_nobody_was_evicted() {
        let pins = Pins::new(1, TIMEOUT);
        let evicted = Counter::default();
        let now = Instant::now();
        for number in 0..WAYS as u32 {
            pins.remember(key(number), Scope::Cluster, number, None, now, &evicted);
        }

        pins.remember(key(100), Scope::Cluster, 100, None, now + 2 * TIMEOUT, &evicted);

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
                        pins.remember(key(number), Scope::Cluster, backend_of(number), None, now, evicted);
                        if let Some(backend) = pins.recall(key(number), Scope::Local, now) {
                            assert!((1_000..=1_001).contains(&backend), "{backend}");
                        }
                    }
                });
            }
        });
    }
}

/// Every order in which threads can meet in one set, as loom finds them, with all that relaxed loads may still see.
///
/// `RUSTFLAGS="--cfg kube_relay_loom" cargo test --target-dir target/loom --lib interleavings` tries them all, in some
/// 10 s; with `LOOM_MAX_PREEMPTIONS=3` those with up to three preemptions, in one.
#[cfg(all(test, kube_relay_loom))]
mod interleavings {
    use loom::thread;

    use super::*;

    const FAILED: u32 = 99;

    /// Two of the clients fill the set.
    const ANN: u64 = 0x1100_0000_0000_0001;
    const BEN: u64 = 0x2200_0000_0000_0001;
    const EVE: u64 = 0x3300_0000_0000_0001;

    /// A set of two places that threads share, at one moment.
    struct Meeting {
        pins: Pins,
        evicted: Counter,
        now: Instant,
    }

    impl Meeting {
        fn new() -> Arc<Self> {
            let pins = Pins::new(1, Duration::from_secs(60));
            Arc::new(Self { pins, evicted: Counter::default(), now: Instant::now() })
        }

        fn remember(&self, key: u64, scope: Scope, backend: u32, instead_of: Option<u32>) -> u32 {
            self.pins.remember(key, scope, backend, instead_of, self.now, &self.evicted)
        }

        fn recall(&self, key: u64, scope: Scope) -> Option<u32> {
            self.pins.recall(key, scope, self.now)
        }
    }

    /// Runs both at once, in every order, and then the check.
    fn meet<T: 'static>(
        prepare: fn(&Meeting),
        one: fn(&Meeting) -> T,
        other: fn(&Meeting) -> T,
        check: fn(&Meeting, T, T),
    ) {
        loom::model(move || {
            let meeting = Meeting::new();
            prepare(&meeting);
            let thread = thread::spawn({
                let meeting = Arc::clone(&meeting);
                move || one(&meeting)
            });
            let of_other = other(&meeting);
            let of_one = thread.join().expect("no panic");
            check(&meeting, of_one, of_other);
        });
    }

    #[test]
    fn given_a_new_client_when_two_threads_pin_it_then_they_agree() {
        meet(
            |_| {},
            |meeting| meeting.remember(ANN, Scope::Cluster, 1, None),
            |meeting| meeting.remember(ANN, Scope::Cluster, 2, None),
            |meeting, one, other| {
                assert_eq!(one, other);
                assert_eq!(meeting.recall(ANN, Scope::Cluster), Some(one));
            },
        );
    }

    #[test]
    fn given_two_new_clients_when_their_threads_meet_then_each_has_its_own_pin() {
        meet(
            |_| {},
            |meeting| meeting.remember(ANN, Scope::Cluster, 1, None),
            |meeting| meeting.remember(BEN, Scope::Cluster, 2, None),
            |meeting, one, other| {
                assert_eq!((one, other), (1, 2));
                assert_eq!(meeting.recall(ANN, Scope::Cluster), Some(1));
                assert_eq!(meeting.recall(BEN, Scope::Cluster), Some(2));
            },
        );
    }

    #[test]
    fn t140_given_a_pin_that_failed_when_two_threads_move_it_then_one_of_them_decides() {
        meet(
            |meeting| {
                meeting.remember(ANN, Scope::Cluster, FAILED, None);
            },
            |meeting| meeting.remember(ANN, Scope::Cluster, 1, Some(FAILED)),
            |meeting| meeting.remember(ANN, Scope::Cluster, 2, Some(FAILED)),
            |meeting, one, other| {
                assert_eq!(one, other);
                assert_eq!(meeting.recall(ANN, Scope::Cluster), Some(one));
            },
        );
    }

    /// A pin is renewed a second after it was made: that must not put it back where another thread has just moved it.
    #[test]
    fn t140_given_a_pin_that_moves_when_another_thread_renews_it_then_the_move_counts() {
        const LATER: Duration = Duration::from_secs(1);
        meet(
            |meeting| {
                meeting.remember(ANN, Scope::Cluster, FAILED, None);
            },
            |meeting| {
                let (pins, later) = (&meeting.pins, meeting.now + LATER);
                Some(pins.remember(ANN, Scope::Cluster, 1, Some(FAILED), later, &meeting.evicted))
            },
            |meeting| meeting.pins.recall(ANN, Scope::Cluster, meeting.now + LATER),
            |meeting, moved, renewed| {
                assert_eq!(moved, Some(1));
                assert!(matches!(renewed, Some(FAILED | 1)), "{renewed:?}");
                assert_eq!(meeting.recall(ANN, Scope::Cluster), Some(1));
            },
        );
    }

    /// Each scope decides for itself once it has a pin.
    #[test]
    fn t144_given_a_pin_that_moves_when_the_other_scope_takes_it_then_the_move_counts() {
        meet(
            |meeting| {
                meeting.remember(ANN, Scope::Cluster, FAILED, None);
            },
            |meeting| Some(meeting.remember(ANN, Scope::Cluster, 1, Some(FAILED))),
            |meeting| meeting.recall(ANN, Scope::Local),
            |meeting, moved, taken| {
                assert_eq!(moved, Some(1));
                assert!(matches!(taken, Some(FAILED | 1)), "{taken:?}");
                assert_eq!(meeting.recall(ANN, Scope::Cluster), Some(1));
                assert_eq!(meeting.recall(ANN, Scope::Local), taken);
            },
        );
    }

    /// A full set: one thread takes Ann's or Ben's place while the other asks for their pins.
    #[test]
    fn t148_given_a_full_set_when_a_client_is_evicted_then_nobody_reads_a_pin_of_somebody_else() {
        meet(
            |meeting| {
                meeting.remember(ANN, Scope::Cluster, 1, None);
                meeting.remember(BEN, Scope::Cluster, 2, None);
            },
            |meeting| [Some(meeting.remember(EVE, Scope::Cluster, 3, None)), None],
            |meeting| [ANN, BEN].map(|key| meeting.recall(key, Scope::Cluster)),
            |meeting, [eve, _], [ann, ben]| {
                assert_eq!((eve, meeting.recall(EVE, Scope::Cluster)), (Some(3), Some(3)));
                assert!(matches!((ann, ben), (Some(1) | None, Some(2) | None)), "{ann:?} {ben:?}");
                assert_eq!(meeting.evicted.get(), 1);
            },
        );
    }

    /// Two newcomers to a full set: both are let in, and at most one of them is forgotten again at once.
    #[test]
    fn t148_given_a_full_set_when_two_clients_come_at_once_then_no_pin_is_mixed_up() {
        meet(
            |meeting| {
                meeting.remember(ANN, Scope::Cluster, 1, None);
                meeting.remember(BEN, Scope::Cluster, 2, None);
            },
            |meeting| meeting.remember(EVE, Scope::Cluster, 3, None),
            |meeting| meeting.remember(EVE + (1 << 60), Scope::Cluster, 4, None),
            |meeting, one, other| {
                assert_eq!((one, other), (3, 4));
                assert!(matches!(meeting.recall(EVE, Scope::Cluster), Some(3) | None));
                assert!(matches!(meeting.recall(EVE + (1 << 60), Scope::Cluster), Some(4) | None));
            },
        );
    }
}
