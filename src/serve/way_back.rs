//! Whether answers of a backend to the clients of one side come by this node: what is known, and what each outcome changes.
//! The states and their rules are told in `preserve`; who connects is `connect` and `shard`.
//!
//! Pure but for its atomics: moments and clients are arguments. Threads that come at once may each write what they think: who
//! comes later finds one of these, and all are right enough.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::serve::moment::Moment;

/// After how long a datagram without an answer tells something, when the client sends again.
pub(super) const DOUBT: Duration = Duration::from_millis(300);
/// How long a way back that was found is taken for one, without another answer.
pub(super) const TRUST: Duration = Duration::from_secs(60);
/// When one that was not found is tried again: twice as long each time, up to some ten minutes.
pub(super) const FIRST_RETRY: Duration = Duration::from_secs(5);
pub(super) const MOST_DOUBLINGS: u64 = 7;
/// How often in a row, and over how long at least, a way back that was found has to fail to be there no more.
const STRIKES: u64 = 3;
const STRIKES_LAST: Duration = Duration::from_secs(1);
/// How long a backend that answers nobody sees clients before it is asked again: as long as [`FIRST_RETRY`], and twice as long
/// each time, so often.
const MOST_SILENT_DOUBLINGS: u64 = 2;

/// Tells clients apart: an address, or of IPv6 the network that one host may have. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClientKey(u64);

impl ClientKey {
    pub(super) fn of(client: IpAddr) -> Self {
        let bits = match client.to_canonical() {
            IpAddr::V4(ip) => ip.to_bits().into(),
            IpAddr::V6(ip) => (ip.to_bits() >> 64) as u64,
        };
        Self(bits.max(1))
    }
}

/// Whose address a new flow is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The client's.
    Client,
    /// This node's; and what an answer would tell, or its want.
    Node(Option<Tells>),
}

/// What an answer to this node tells of a client that had none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tells {
    /// The client that had none.
    pub(super) of: ClientKey,
    /// How long it had none; zero: its time is not over, so that nothing follows for it.
    pub(super) waited: Duration,
}

/// How a client came to have no answer, where this node has had one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// The node's took less than half of the time that the client's was waited for.
    Clear,
    /// It took longer: the client's might have come, too.
    Late,
}

/// What is concluded from that, with how long it is not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// That client is served from the node's address, others try.
    One(Duration),
    /// All clients of the side are.
    All(Duration),
}

/// What is known of a way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unknown,
    Found,
    Silent,
    Missing,
}

/// What is known, until when, and how often it was tried in vain, in one word: who reads it sees one moment. 0: nothing.
#[derive(Debug, Default)]
struct Known(AtomicU64);

const STATE_MASK: u64 = 0b11;
const FOUND: u64 = 1;
const SILENT: u64 = 2;
const MISSING: u64 = 3;
/// One was sent to try whether it is still missing.
const RETRYING: u64 = 1 << 2;
const TRIED_SHIFT: u32 = 3;
const TRIED_MASK: u64 = 0b111;
const UNTIL_SHIFT: u32 = 6;

fn word(state: u64, tried: u64, until: Moment) -> u64 {
    until.0 << UNTIL_SHIFT | tried << TRIED_SHIFT | state
}

fn tried(word: u64) -> u64 {
    word >> TRIED_SHIFT & TRIED_MASK
}

fn until(word: u64) -> Moment {
    Moment(word >> UNTIL_SHIFT)
}

fn doubled(times: u64) -> Duration {
    FIRST_RETRY.saturating_mul(1 << times)
}

impl Known {
    const fn nothing() -> Self {
        Self(AtomicU64::new(0))
    }

    fn load(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn store(&self, word: u64) {
        self.0.store(word, Ordering::Relaxed);
    }

    fn state(&self, now: Moment) -> State {
        let known = self.load();
        let holds = now < until(known);
        match known & STATE_MASK {
            FOUND if holds => State::Found,
            SILENT if holds => State::Silent,
            MISSING => State::Missing,
            _ => State::Unknown,
        }
    }

    fn is_missing(&self) -> bool {
        self.load() & STATE_MASK == MISSING
    }

    /// Of what is missing: true for one who asks after its pause. The others do without, until it is known how that one fared.
    fn may_retry(&self, now: Moment) -> bool {
        let known = self.load();
        let retrying = word(MISSING | RETRYING, tried(known), now.after(FIRST_RETRY));
        now >= until(known) && self.0.compare_exchange(known, retrying, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Who was sent to try could not.
    fn give_back(&self, now: Moment) {
        let known = self.load();
        if known & STATE_MASK == MISSING && known & RETRYING != 0 {
            // Refused where somebody knows better by now.
            let again = word(MISSING, tried(known), now);
            let _ = self.0.compare_exchange(known, again, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// It is missing, for twice as long as last time; `None` where that was known, and is told by those who began before.
    fn postpone(&self, now: Moment, most_doublings: u64) -> Option<Duration> {
        let known = self.load();
        let was_missing = known & STATE_MASK == MISSING;
        if was_missing && known & RETRYING == 0 {
            return None;
        }
        let tried = if was_missing { tried(known) } else { 0 };
        let pause = doubled(tried.min(most_doublings));
        self.store(word(MISSING, (tried + 1).min(MOST_DOUBLINGS), now.after(pause)));
        Some(pause)
    }

    /// As another one, and a little longer.
    fn follow(&self, other: &Self) {
        let known = other.load();
        self.store(word(MISSING, tried(known), until(known).after(FIRST_RETRY)));
    }

    fn missing_for(&self, now: Moment) -> Option<Duration> {
        self.is_missing().then(|| until(self.load()).since(now))
    }
}

/// What is known of the way back from one backend to the clients of one side. Shared by all threads.
#[derive(Debug, Default)]
pub(super) struct WayBack {
    of_all: Known,
    /// What is known of the suspect alone.
    of_suspect: Known,
    /// The [`ClientKey`] of who had no answer last, though others may have one; 0: nobody, since somebody had one.
    suspect: AtomicU64,
    /// 0 while the last connection had an answer; else when the first one had none, as a [`Moment`], and how many had none.
    strikes: AtomicU64,
    /// 0 while no datagram waits for the answer that would tell; else since when one does, as a [`Moment`], whether the backend
    /// has answered this node meanwhile, and whether it is this node that it is to answer.
    asked: AtomicU64,
    /// The [`ClientKey`] of whose datagram that is.
    asker: AtomicU64,
}

const AS_NODE: u64 = 1;
const ANSWERED: u64 = 1 << 1;
const SINCE_SHIFT: u32 = 2;
const FIRST_SHIFT: u32 = 8;
const COUNT_MASK: u64 = 0xff;

impl WayBack {
    pub(super) const fn new() -> Self {
        Self {
            of_all: Known::nothing(),
            of_suspect: Known::nothing(),
            suspect: AtomicU64::new(0),
            strikes: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            asker: AtomicU64::new(0),
        }
    }

    /// False where the client is to be served from the node's address. After a pause, one who asks is told to try.
    pub(super) fn may_try(&self, client: ClientKey, now: Moment) -> bool {
        match self.of_all.state(now) {
            State::Found => true,
            _ if self.is_held_back(client) => self.of_suspect.may_retry(now),
            State::Missing => self.of_all.may_retry(now),
            State::Unknown | State::Silent => true,
        }
    }

    fn is_held_back(&self, client: ClientKey) -> bool {
        self.suspect.load(Ordering::Relaxed) == client.0 && self.of_suspect.is_missing()
    }

    /// True where an answer came not long ago.
    pub(super) fn is_found(&self, now: Moment) -> bool {
        self.of_all.state(now) == State::Found
    }

    /// True where answers do not come, by all that is known.
    pub(super) fn is_missing(&self) -> bool {
        self.of_all.is_missing()
    }

    /// True where nothing is known that speaks against showing a client that the backend has left without an answer.
    pub(super) fn may_be_seen(&self, client: ClientKey, now: Moment) -> bool {
        match self.of_all.state(now) {
            State::Found => true,
            State::Missing => false,
            State::Unknown | State::Silent => !self.is_held_back(client),
        }
    }

    /// Whose address a flow is to have that begins now. Clients that ask again may do so from another port, and then that is
    /// another flow: so it is not left to each by itself.
    pub(super) fn turn(&self, client: ClientKey, now: Moment) -> Turn {
        let (state, asked) = (self.of_all.state(now), self.asked.load(Ordering::Relaxed));
        if state == State::Found {
            if asked != 0 {
                self.asked.store(0, Ordering::Relaxed); // By a thread that did not know yet.
            }
            return Turn::Client;
        }
        if asked == 0 {
            return if !self.may_try(client, now) {
                Turn::Node(None)
            } else if state == State::Silent {
                Turn::Client
            } else {
                self.ask(client, now)
            };
        }
        let of = ClientKey(self.asker.load(Ordering::Relaxed));
        let waited = now.since(Moment(asked >> SINCE_SHIFT));
        match (asked & AS_NODE != 0, waited < DOUBT) {
            // One finds out, and no other one pays for it.
            (false, true) => Turn::Node(Some(Tells { of, waited: Duration::ZERO })),
            (false, false) => {
                self.asked.store(now.0 << SINCE_SHIFT | asked & ANSWERED | AS_NODE, Ordering::Relaxed);
                Turn::Node(Some(Tells { of, waited }))
            }
            (true, true) => Turn::Node(Some(Tells { of, waited: DOUBT })),
            (true, false) => self.conclude(of, asked, now),
        }
    }

    fn ask(&self, client: ClientKey, now: Moment) -> Turn {
        self.asker.store(client.0, Ordering::Relaxed);
        self.asked.store(now.0 << SINCE_SHIFT, Ordering::Relaxed);
        Turn::Client
    }

    /// Who asked had no answer, and flows of this node that began later had none, either. Whose address a flow is to have then.
    fn conclude(&self, asker: ClientKey, asked: u64, now: Moment) -> Turn {
        self.asked.store(0, Ordering::Relaxed);
        if asked & ANSWERED != 0 {
            self.failed(asker, Evidence::Late, now, MOST_DOUBLINGS);
            return Turn::Node(None);
        }
        let known = self.of_all.load();
        if known & STATE_MASK == MISSING {
            return Turn::Node(None); // Silence proves nothing: what was known holds.
        }
        let tried = if known & STATE_MASK == SILENT { tried(known) } else { 0 };
        let more = (tried + 1).min(MOST_SILENT_DOUBLINGS);
        self.of_all.store(word(SILENT, more, now.after(doubled(tried))));
        Turn::Client
    }

    /// Who was to find out at this moment could not.
    pub(super) fn forget_asked(&self, client: ClientKey, since: Moment, now: Moment) {
        let asked = since.0 << SINCE_SHIFT;
        if self.asked.compare_exchange(asked, 0, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return; // Another one asks by now, or none had to.
        }
        let known = if self.is_held_back(client) { &self.of_suspect } else { &self.of_all };
        known.give_back(now);
    }

    /// The backend answers this node, while a client still waits.
    pub(super) fn note_answer_to_node(&self) {
        let answered = |asked| (asked != 0).then_some(asked | ANSWERED);
        let _ = self.asked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, answered); // Refused where nobody waits.
    }

    /// An answer to a client came. Written now and then only, as each connection of a busy backend tells this.
    pub(super) fn found(&self, now: Moment) {
        for word in [&self.strikes, &self.suspect, &self.of_suspect.0] {
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Relaxed);
            }
        }
        let known = self.of_all.load();
        if known & STATE_MASK != FOUND || now.after(TRUST / 2) > until(known) {
            self.of_all.store(word(FOUND, 0, now.after(TRUST)));
            self.asked.store(0, Ordering::Relaxed);
        }
    }

    /// None came to a client, though the backend answers. What is concluded, where it is something new.
    pub(super) fn failed(
        &self,
        client: ClientKey,
        evidence: Evidence,
        now: Moment,
        most_doublings: u64,
    ) -> Option<Verdict> {
        let last = self.suspect.load(Ordering::Relaxed);
        match self.of_all.state(now) {
            State::Found if evidence == Evidence::Late => None,
            State::Found => {
                if last == client.0 && self.strikes.load(Ordering::Relaxed) != 0 {
                    return None; // It may be kept out: it counts once.
                }
                self.suspect(client);
                self.is_out(now).then(|| self.condemn(client, now, most_doublings)).flatten()
            }
            State::Missing if last == client.0 => {
                self.asked.store(0, Ordering::Relaxed);
                self.of_suspect.postpone(now, MOST_DOUBLINGS);
                None
            }
            State::Missing => self.condemn(client, now, most_doublings),
            State::Unknown | State::Silent if last == 0 || last == client.0 => {
                let is_new = !self.is_held_back(client);
                if is_new {
                    self.suspect(client);
                }
                self.of_all.store(0); // If it was silent: it answers.
                self.asked.store(0, Ordering::Relaxed);
                let pause = self.of_suspect.postpone(now, MOST_DOUBLINGS)?;
                is_new.then_some(Verdict::One(pause))
            }
            State::Unknown | State::Silent => self.condemn(client, now, most_doublings),
        }
    }

    fn suspect(&self, client: ClientKey) {
        self.suspect.store(client.0, Ordering::Relaxed);
        self.of_suspect.store(0);
    }

    /// Counts a connection that had no answer. True where there were enough in a row.
    fn is_out(&self, now: Moment) -> bool {
        let strikes = self.strikes.load(Ordering::Relaxed);
        let (first, count) = match strikes {
            0 => (now, 1),
            _ => (Moment(strikes >> FIRST_SHIFT), (strikes & COUNT_MASK) + 1),
        };
        self.strikes.store(first.0 << FIRST_SHIFT | count.min(COUNT_MASK), Ordering::Relaxed);
        count >= STRIKES && now.since(first) >= STRIKES_LAST
    }

    /// It is missing for all, and this client is not the next one to try.
    fn condemn(&self, client: ClientKey, now: Moment, most_doublings: u64) -> Option<Verdict> {
        let pause = self.of_all.postpone(now, most_doublings)?;
        self.suspect(client);
        self.of_suspect.follow(&self.of_all);
        self.strikes.store(0, Ordering::Relaxed);
        self.asked.store(0, Ordering::Relaxed);
        Some(Verdict::All(pause))
    }

    /// How soon it is tried again, where it is missing for somebody.
    pub(super) fn missing_for(&self, now: Moment) -> Option<Duration> {
        match self.of_all.state(now) {
            State::Found => None,
            State::Missing => self.of_all.missing_for(now),
            State::Unknown | State::Silent => self.of_suspect.missing_for(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    const START: Moment = Moment(1_000_000);
    const CLIENT: ClientKey = ClientKey(7);
    const OTHER: ClientKey = ClientKey(8);
    const THIRD: ClientKey = ClientKey(9);
    const ZERO: Duration = Duration::ZERO;

    fn failed(way: &WayBack, client: ClientKey, now: Moment) -> Option<Verdict> {
        way.failed(client, Evidence::Clear, now, MOST_DOUBLINGS)
    }

    fn tells(of: ClientKey, waited: Duration) -> Turn {
        Turn::Node(Some(Tells { of, waited }))
    }

    /// Missing for all since [`START`]; [`OTHER`] has failed last.
    fn missing() -> WayBack {
        let way = WayBack::new();
        assert_eq!(failed(&way, CLIENT, START), Some(Verdict::One(FIRST_RETRY)));
        assert_eq!(failed(&way, OTHER, START), Some(Verdict::All(FIRST_RETRY)));
        way
    }

    #[test]
    fn given_addresses_when_told_apart_then_a_network_of_ipv6_is_one_client_and_none_is_nobody() {
        let key = |text: &str| ClientKey::of(text.parse().expect("an address"));

        assert_eq!(key("2001:db8::1"), key("2001:db8::2"));
        assert_ne!(key("2001:db8::1"), key("2001:db8:0:1::1"));
        assert_eq!(key("192.0.2.1"), key("::ffff:192.0.2.1"));
        assert_ne!(key("192.0.2.1"), key("192.0.2.2"));
        assert!([ClientKey::of(Ipv4Addr::UNSPECIFIED.into()), key("::1")].iter().all(|key| key.0 != 0));
    }

    #[test]
    fn given_nothing_known_when_one_client_fails_again_and_again_then_it_alone_is_held_back_longer_each_time() {
        let way = WayBack::new();
        assert!(way.may_try(CLIENT, START) && way.may_try(CLIENT, START), "everybody, as long as nothing is known");
        assert_eq!(failed(&way, CLIENT, START), Some(Verdict::One(FIRST_RETRY)));
        let mut now = START;

        for doublings in 0..10_u64 {
            let pause = doubled(doublings.min(MOST_DOUBLINGS));
            assert_eq!(way.missing_for(now), Some(pause));
            assert!(!way.may_try(CLIENT, Moment(now.after(pause).0 - 1)));
            assert!(way.may_try(OTHER, now) && !way.is_missing(), "others are not taken their address");
            now = now.after(pause);
            assert!(way.may_try(CLIENT, now), "one connection tries");
            assert!(!way.may_try(CLIENT, now), "and no other one, meanwhile");
            assert_eq!(failed(&way, CLIENT, now), None, "it is told once");
        }
    }

    #[test]
    fn given_a_way_back_that_is_missing_when_time_passes_then_one_tries_again_and_later_each_time() {
        let way = missing();
        let (mut now, mut clients) = (START, (10..).map(ClientKey));

        for doublings in 0..10_u64 {
            let pause = doubled(doublings.min(MOST_DOUBLINGS));
            assert_eq!(way.missing_for(now), Some(pause));
            let [one, two] = [clients.next().expect("more"), clients.next().expect("more")];
            assert!(!way.may_try(one, now) && !way.may_try(one, Moment(now.after(pause).0 - 1)));
            now = now.after(pause);
            assert!(doublings > 0 || !way.may_try(OTHER, now), "not the one that has failed");
            assert!(way.may_try(one, now), "one tries");
            assert!(!way.may_try(two, now), "and nobody else, meanwhile");
            let next = doubled((doublings + 1).min(MOST_DOUBLINGS));
            assert_eq!(failed(&way, one, now), Some(Verdict::All(next)));
        }
    }

    #[test]
    fn given_many_connections_under_way_when_they_fail_at_one_moment_then_the_first_retry_is_as_soon_as_ever() {
        let way = WayBack::new();

        let verdicts: Vec<_> = (1..=20).filter_map(|client| failed(&way, ClientKey(client), START)).collect();

        assert_eq!(verdicts, [Verdict::One(FIRST_RETRY), Verdict::All(FIRST_RETRY)], "told once");
        assert_eq!(way.missing_for(START), Some(FIRST_RETRY));
        let later = START.after(FIRST_RETRY);
        assert_eq!(failed(&way, THIRD, later), None, "it was not sent to try");
        assert!(way.may_try(CLIENT, later));
    }

    #[test]
    fn given_a_backend_whose_only_way_is_this_node_when_it_is_missing_then_it_is_tried_again_as_soon_each_time() {
        let (way, mut now) = (missing(), START);

        for client in 10..20 {
            now = now.after(FIRST_RETRY);
            assert!(way.may_try(ClientKey(client), now));
            let verdict = way.failed(ClientKey(client), Evidence::Clear, now, 0);
            assert_eq!(verdict, Some(Verdict::All(FIRST_RETRY)));
        }
    }

    #[test]
    fn given_a_client_that_is_kept_out_when_nothing_was_known_then_others_are_seen_and_it_never_takes_that_from_them() {
        let way = WayBack::new();
        let mut now = START;
        failed(&way, CLIENT, now);

        for _ in 0..1_000 {
            now = now.after(Duration::from_millis(400));
            if way.may_try(CLIENT, now) {
                failed(&way, CLIENT, now);
            }
            assert!(way.may_try(OTHER, now));
        }
        way.found(now);
        assert_eq!(way.missing_for(now), None);
    }

    #[test]
    fn given_a_way_back_that_is_found_when_a_client_is_kept_out_then_it_counts_once_however_often_it_comes() {
        let way = WayBack::new();
        way.found(START);

        for number in 0..50 {
            let now = START.after(STRIKES_LAST * number);
            assert_eq!(failed(&way, CLIENT, now), None);
            assert!(way.is_found(now) && way.turn(OTHER, now) == Turn::Client);
        }
        assert_eq!(failed(&way, OTHER, START.after(TRUST)), Some(Verdict::All(FIRST_RETRY)), "two, and nobody else");
    }

    #[test]
    fn given_a_way_back_that_is_found_when_several_in_a_row_have_no_answer_for_a_while_then_it_is_missing() {
        let way = WayBack::new();
        way.found(START);

        for client in 1..=2 * STRIKES {
            assert_eq!(failed(&way, ClientKey(client), START), None, "at one moment, as when a queue was full");
        }
        let later = START.after(STRIKES_LAST);
        assert_eq!(way.failed(THIRD, Evidence::Late, later, MOST_DOUBLINGS), None, "nothing follows from that");
        assert_eq!(failed(&way, THIRD, later), Some(Verdict::All(FIRST_RETRY)));
    }

    #[test]
    fn given_a_way_back_that_is_missing_when_an_answer_comes_then_it_is_found_until_nobody_has_had_one_for_long() {
        let way = missing();
        way.found(START);

        assert!(way.may_try(OTHER, START) && way.turn(OTHER, START) == Turn::Client);
        assert_eq!(way.missing_for(START), None);
        let later = START.after(TRUST);
        assert_eq!(way.turn(CLIENT, later), Turn::Client, "known no more, and not missing");
        assert_eq!(way.turn(OTHER, later), tells(CLIENT, ZERO), "so it is found out");
        assert_eq!(failed(&way, CLIENT, later), Some(Verdict::One(FIRST_RETRY)));
    }

    #[test]
    fn given_a_way_back_that_is_found_when_told_again_then_the_word_is_written_only_after_a_while() {
        let way = WayBack::new();
        way.found(START);
        let first = way.of_all.load();

        way.found(START.after(TRUST / 4));
        assert_eq!(way.of_all.load(), first);
        way.found(START.after(TRUST));
        assert_eq!(way.turn(CLIENT, START.after(TRUST)), Turn::Client);
    }

    #[test]
    fn given_nothing_known_when_flows_begin_then_one_finds_out_and_an_answer_to_the_node_tells_of_that_one() {
        let (way, soon, later) = (WayBack::new(), START.after(DOUBT / 2), START.after(DOUBT * 3));

        assert_eq!(way.turn(CLIENT, START), Turn::Client);
        assert_eq!(way.turn(OTHER, soon), tells(CLIENT, ZERO), "no other one pays for it");
        assert_eq!(way.turn(OTHER, later), tells(CLIENT, DOUBT * 3), "for as long as it was silent");
        assert_eq!(way.turn(THIRD, later), tells(CLIENT, DOUBT));
        assert_eq!(failed(&way, CLIENT, later), Some(Verdict::One(FIRST_RETRY)));

        assert_eq!(way.turn(CLIENT, later), Turn::Node(None));
        assert_eq!(way.turn(OTHER, later), Turn::Client, "another one finds out");
        assert_eq!(failed(&way, OTHER, later.after(DOUBT)), Some(Verdict::All(FIRST_RETRY)));
        assert_eq!(way.turn(THIRD, later.after(DOUBT)), Turn::Node(None));
    }

    #[test]
    fn given_a_way_back_that_is_missing_when_one_asks_again_then_silence_does_not_make_it_found() {
        let way = missing();
        let again = START.after(FIRST_RETRY);

        assert_eq!(way.turn(THIRD, again), Turn::Client);
        assert_eq!(way.turn(CLIENT, again), tells(THIRD, ZERO));
        let not_answered = again.after(DOUBT);
        assert_eq!(way.turn(CLIENT, not_answered), tells(THIRD, DOUBT), "is the backend there at all?");
        assert_eq!(way.turn(CLIENT, not_answered.after(DOUBT)), Turn::Node(None));
        assert!(way.is_missing());
        assert_eq!(way.missing_for(not_answered.after(DOUBT)), Some(FIRST_RETRY - DOUBT * 2));
    }

    #[test]
    fn given_a_backend_that_answers_nobody_when_flows_follow_then_clients_are_seen_and_it_is_asked_again() {
        let (way, mut now) = (WayBack::new(), START);
        let turn = |now| way.turn(CLIENT, now);

        for seconds in [5, 10, 20, 20] {
            let asked = [now, now.after(DOUBT / 2), now.after(DOUBT), now.after(DOUBT * 3 / 2)].map(turn);
            assert_eq!(asked, [Turn::Client, tells(CLIENT, ZERO), tells(CLIENT, DOUBT), tells(CLIENT, DOUBT)]);
            now = now.after(DOUBT * 2);
            assert_eq!([now, now].map(turn), [Turn::Client; 2], "it answers nobody");
            assert!(!way.is_found(now));
            let silent = Duration::from_secs(seconds);
            assert_eq!(way.of_all.state(Moment(now.after(silent).0 - 1)), State::Silent);
            now = now.after(silent);
        }
        assert_eq!(failed(&way, CLIENT, now), Some(Verdict::One(FIRST_RETRY)), "it begins to answer this node");
    }

    #[test]
    fn given_a_backend_that_answers_others_when_one_asks_what_is_not_answered_then_it_is_not_taken_for_silent() {
        let way = WayBack::new();
        assert_eq!(way.turn(CLIENT, START), Turn::Client);
        assert_eq!(way.turn(OTHER, START), tells(CLIENT, ZERO));
        way.note_answer_to_node();

        let later = START.after(DOUBT);
        assert_eq!(way.turn(CLIENT, later), tells(CLIENT, DOUBT));
        assert_eq!(way.turn(THIRD, later.after(DOUBT)), Turn::Node(None));

        assert_eq!(way.of_all.state(later.after(DOUBT)), State::Unknown);
        assert_eq!(way.turn(CLIENT, later.after(DOUBT)), Turn::Node(None), "it is held back");
    }

    #[test]
    fn given_answers_that_come_late_when_nothing_is_known_then_two_clients_have_flows_begin_at_the_node() {
        let way = WayBack::new();
        let late = |client| way.failed(client, Evidence::Late, START, MOST_DOUBLINGS);

        assert_eq!([CLIENT, OTHER].map(late), [Some(Verdict::One(FIRST_RETRY)), Some(Verdict::All(FIRST_RETRY))]);

        assert_eq!(way.turn(THIRD, START), Turn::Node(None));
        assert_eq!(way.turn(THIRD, START.after(FIRST_RETRY)), Turn::Client, "one tries");
    }

    #[test]
    fn given_a_flow_that_could_not_ask_when_others_follow_then_one_of_them_does() {
        let way = WayBack::new();
        assert_eq!(way.turn(CLIENT, START), Turn::Client);
        way.forget_asked(CLIENT, START, START);
        assert_eq!(way.turn(OTHER, START.after(DOUBT)), Turn::Client);

        let (way, again) = (missing(), START.after(FIRST_RETRY));
        assert_eq!(way.turn(THIRD, again), Turn::Client);
        way.forget_asked(THIRD, again, again);
        assert_eq!(way.turn(CLIENT, again), Turn::Client, "the retry is not lost");
    }

    #[test]
    fn given_a_thread_that_asked_too_late_when_its_question_is_old_then_nobody_is_asked_as_the_node() {
        let way = WayBack::new();
        way.found(START);
        way.ask(CLIENT, START);

        assert_eq!(way.turn(OTHER, START), Turn::Client);
        assert_eq!(way.turn(OTHER, START.after(TRUST)), Turn::Client, "as if nobody had asked");
        assert_eq!(way.turn(THIRD, START.after(TRUST)), tells(OTHER, ZERO));
    }

    /// What becomes of a flow, or a connection, of one of some clients.
    #[derive(Clone, Copy, Debug)]
    enum Fate {
        /// Answers to clients come.
        Answered,
        /// They go past this node, to which the backend answers at once.
        Past,
        /// The same, but the backend takes its time.
        Late,
        /// The backend answers nobody.
        Nobody,
    }

    fn fates() -> impl Strategy<Value = Fate> {
        prop_oneof![Just(Fate::Answered), Just(Fate::Past), Just(Fate::Late), Just(Fate::Nobody)]
    }

    /// A flow of a client begins; what follows of its fate is told the way back.
    fn live(way: &WayBack, client: ClientKey, fate: Fate, now: Moment) {
        let fail = |of: ClientKey, evidence| {
            way.failed(of, evidence, now, MOST_DOUBLINGS);
        };
        match (way.turn(client, now), fate) {
            (Turn::Client, Fate::Answered) => way.found(now),
            (Turn::Client, Fate::Past) => fail(client, Evidence::Clear),
            (Turn::Client, Fate::Late) => fail(client, Evidence::Late),
            (_, Fate::Nobody) | (Turn::Node(None), _) => {}
            (Turn::Node(Some(Tells { waited: Duration::ZERO, .. })), _) => way.note_answer_to_node(),
            (Turn::Node(Some(tells)), Fate::Late) => fail(tells.of, Evidence::Late),
            (Turn::Node(Some(tells)), _) => fail(tells.of, Evidence::Clear),
        }
    }

    proptest! {
        #[test]
        fn given_any_outcomes_when_answers_come_from_then_on_then_clients_are_seen_again(
            steps in prop::collection::vec((1_u64..6, fates(), 0_u64..20_000), 0..200),
        ) {
            let (way, mut now) = (WayBack::new(), START);
            for (client, fate, pause) in steps {
                live(&way, ClientKey(client), fate, now);
                now = Moment(now.0 + pause);
            }
            for _ in 0..4 {
                now = now.after(doubled(MOST_DOUBLINGS) + FIRST_RETRY);
                live(&way, OTHER, Fate::Answered, now); // It may be the one that tells of another's question first.
            }
            prop_assert!(way.is_found(now));
        }

        #[test]
        fn given_any_silence_when_nobody_is_answered_then_nothing_is_found_and_what_was_missing_stays_so(
            steps in prop::collection::vec((1_u64..6, 0_u64..20_000), 0..200), was_missing: bool,
        ) {
            let way = if was_missing { missing() } else { WayBack::new() };
            let mut now = START;
            for (client, pause) in steps {
                live(&way, ClientKey(client), Fate::Nobody, now);
                prop_assert!(!way.is_found(now));
                prop_assert_eq!(way.is_missing(), was_missing);
                now = Moment(now.0 + pause);
            }
        }

        #[test]
        fn given_one_client_that_is_kept_out_when_another_is_answered_then_it_is_never_missing_for_all(
            steps in prop::collection::vec((prop::bool::weighted(0.8), any::<bool>(), 0_u64..90_000), 0..300),
        ) {
            let (way, mut now) = (WayBack::new(), START);
            for (is_kept_out, is_late, pause) in steps {
                let client = if is_kept_out { CLIENT } else { OTHER };
                let evidence = if is_late { Evidence::Late } else { Evidence::Clear };
                let may_try = way.may_try(client, now);
                if may_try && is_kept_out {
                    way.failed(client, evidence, now, MOST_DOUBLINGS);
                } else if may_try {
                    way.found(now);
                }
                prop_assert!(!way.is_missing());
                prop_assert!(way.may_try(OTHER, now));
                now = Moment(now.0 + pause);
            }
        }
    }
}
