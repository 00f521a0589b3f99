//! Whether a backend is to see the client's own address, and what is known of the way back.
//!
//! Answers to a client's address have to come by this node, which only the backend's network decides. What can be told
//! beforehand is told from the routes of this node (`way`): the client is the node itself, or on the backend's own link, or the
//! backend is the node. All else is found out by connections that are made anyway: one from the client's address that is
//! answered proves the way back; where it is not, and the backend answers the node, there is none (`WayBack`).
//!
//! Over TCP, a connection waits `PROOF` for an answer, and is made from the node's address then: the client notices nothing
//! else. Over UDP nobody knows whether an answer is to come, so that the client's next datagram tells: sent `DOUBT` after one
//! that was not answered, it goes from the node's address. Only where that is answered sooner, there is no way back. Where it is
//! not answered, either, nothing is known: a way back that was missing is missing still, and else the backend sees the client
//! again, and each of its flows may tell. While nothing is known, one flow finds out, and all others begin at the node.
//!
//! A way back that was found is not given up for one connection, which may have lost a packet, have met a full queue, or be of a
//! client that is kept out: it takes `STRIKES` in a row. One that was not found is tried again after a while by one
//! connection, longer each time, and not by the client that failed last.

use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::info;

use crate::name::{Family, ServicePortName};
use crate::reply_path::ReplyPath;
use crate::serve::balancer::Backend;
use crate::serve::connect::Source;
use crate::serve::moment::Moment;
use crate::serve::way::{Way, way_to};
use crate::stats::{OnDemand, SourceFallback, SourceStats, Zeros};

/// How long a connection from the client's address may wait for an answer. On a node it takes a thousandth of it.
pub(super) const PROOF: Duration = Duration::from_millis(100);
/// The same for a datagram, when the client sends again.
pub(super) const DOUBT: Duration = Duration::from_millis(300);
/// How long a way back that was found is taken for one, without another answer.
const TRUST: Duration = Duration::from_secs(60);
/// When one that was not found is tried again: twice as long each time, up to some ten minutes.
const FIRST_RETRY: Duration = Duration::from_secs(5);
const MOST_DOUBLINGS: u64 = 7;
/// How often in a row, and over how long at least, a way back that was found has to fail to be there no more.
const STRIKES: u64 = 3;
const STRIKES_LAST: Duration = Duration::from_secs(1);
/// How long a backend that answers nobody sees clients before it is asked again: as long as [`FIRST_RETRY`], and twice as long
/// each time, so often.
const MOST_SILENT_DOUBLINGS: u64 = 3;

/// Whether a ServicePort wants its clients' addresses preserved, and what came of it.
#[derive(Debug, Default)]
pub struct Preserve {
    is_wanted: AtomicBool,
    /// Whether answers are led here; set before it is wanted first.
    reply_path: OnceLock<ReplyPath>,
    /// What its backends saw.
    pub stats: OnDemand<SourceStats>,
}

impl Preserve {
    /// Says whether it is wanted, for connections and flows that begin from now on. Known to `Listeners`.
    pub(super) fn set(&self, is_wanted: bool, reply_path: &ReplyPath) {
        if is_wanted {
            self.reply_path.get_or_init(|| reply_path.clone());
        }
        self.is_wanted.store(is_wanted, Ordering::Relaxed); // Who reads it finds the path by the lock of that.
    }

    /// True where it is wanted.
    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed)
    }

    /// Why it cannot be, for any client; `None` where it can, or is not wanted.
    pub(crate) fn refusal(&self) -> Option<String> {
        self.reply_path.get().filter(|_| self.is_wanted())?.refusal()
    }

    /// Whose address a connection of the client is to have, if it can.
    pub(super) fn source_for(&self, client: SocketAddr) -> Source {
        if self.is_wanted() { Source::Client(client) } else { Source::Any }
    }

    /// On which side a client is, whose address a connection may have; or why none may.
    pub(super) fn side(&self, client: IpAddr, backend: &Backend, now: Instant) -> Result<Side, SourceFallback> {
        match self.reply_path.get().is_some_and(ReplyPath::leads_here) {
            true => side(client, backend.address.ip(), |address| way_to(address, now)),
            false => Err(SourceFallback::ReplyPath),
        }
    }
}

/// On which side of this node a client is: what is known of one tells nothing of the other. A backend on another node answers
/// a pod of this node by it, as that is the pod's only way; and who is farther off, past it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// On a link of this node.
    Link,
    /// Behind a router.
    Router,
}

fn side(client: IpAddr, backend: IpAddr, way_to: impl Fn(IpAddr) -> Option<Way>) -> Result<Side, SourceFallback> {
    let (client, backend) = (client.to_canonical(), backend.to_canonical());
    if Family::of(client) != Family::of(backend) {
        return Err(SourceFallback::OtherFamily); // A balancer in front has named it.
    }
    // A pod that is its own Service's client would hear from itself; and nobody answers to another link's own addresses.
    if client == backend || matches!(client, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        return Err(SourceFallback::SameLink);
    }
    let of_client = way_to(client).ok_or(SourceFallback::NoWayBack)?;
    if of_client == Way::Here {
        return Err(SourceFallback::NodeLocal);
    }
    match (of_client, way_to(backend)) {
        (_, None) => Err(SourceFallback::NoWayBack),
        (_, Some(Way::Here)) => Err(SourceFallback::HostBackend),
        (Way::Link(interface), Some(way)) if way.interface() == Some(interface) => Err(SourceFallback::SameLink),
        (Way::Router(_), Some(_)) => Ok(Side::Router),
        (Way::Link(_) | Way::Here, Some(_)) => Ok(Side::Link),
    }
}

/// What is known of the ways back from one backend, by the side on which clients are.
#[derive(Debug, Default)]
pub struct WaysBack {
    link: WayBack,
    router: WayBack,
}

impl Zeros for WaysBack {
    fn zeros() -> &'static Self {
        static UNKNOWN: WaysBack = WaysBack { link: WayBack::new(), router: WayBack::new() };
        &UNKNOWN
    }
}

impl WaysBack {
    pub(super) fn of(&self, side: Side) -> &WayBack {
        match side {
            Side::Link => &self.link,
            Side::Router => &self.router,
        }
    }

    /// How soon the next connection tries again, where none is found on some side.
    pub(crate) fn missing_for(&self, now: Instant) -> Option<Duration> {
        [&self.link, &self.router].into_iter().filter_map(|way| way.missing_for(Moment::of(now))).max()
    }
}

/// Whether answers of a backend come by this node. Shared by all threads.
///
/// Threads that come at once may each write what they think: who comes later finds one of these, and all are right enough.
#[derive(Debug, Default)]
pub(super) struct WayBack {
    /// 0 while nothing is known; else until when something is, as a [`Moment`], how often it was tried in vain, and whether it
    /// was found. Found after tries in vain: it is only assumed, as the backend answers nobody.
    known: AtomicU64,
    /// 0 while the last connection had an answer; else when the first one had none, as a [`Moment`], and how many had none.
    strikes: AtomicU64,
    /// The [`key`] of the client that had no answer last; 0: nobody.
    striker: AtomicU64,
    /// 0 while no datagram waits for the answer that would tell; else since when one does, as a [`Moment`], and whether the
    /// backend saw this node.
    asked: AtomicU64,
}

/// Whose address a new flow is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The client's. True where the first answer is to tell whether there is a way back.
    Client(bool),
    /// This node's. True where the first answer is to tell that there is none.
    Node(bool),
}

/// Tells clients apart: an address, or of IPv6 the network that one host may have.
fn key(client: IpAddr) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => (ip.to_bits() >> 64) as u64,
    }
}

const FOUND: u64 = 1;
const AS_NODE: u64 = 1;
const SINCE_SHIFT: u32 = 1;
const TRIED_SHIFT: u32 = 1;
const TRIED_MASK: u64 = 0b111;
const UNTIL_SHIFT: u32 = 4;
const FIRST_SHIFT: u32 = 8;
const COUNT_MASK: u64 = 0xff;

impl WayBack {
    const fn new() -> Self {
        Self {
            known: AtomicU64::new(0),
            strikes: AtomicU64::new(0),
            striker: AtomicU64::new(0),
            asked: AtomicU64::new(0),
        }
    }

    /// False where it is known to be missing. After a while, one who asks is told to try again.
    pub(super) fn may_try(&self, client: IpAddr, now: Moment) -> bool {
        let known = self.known.load(Ordering::Relaxed);
        if known == 0 || known & FOUND != 0 {
            return true;
        }
        let until = Moment(known >> UNTIL_SHIFT);
        // Who failed last waits longer: it may be kept out itself, and then would find out nothing for others.
        let has_failed = self.striker.load(Ordering::Relaxed) == key(client);
        if now.0 < until.0 || has_failed && now.0 < until.after(FIRST_RETRY).0 {
            return false;
        }
        // Until it is known how that one fared, the others do without.
        let (tried, until) = (known >> TRIED_SHIFT & TRIED_MASK, now.after(FIRST_RETRY));
        self.known.compare_exchange(known, word(until, tried, 0), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// True where it was found not long ago.
    fn is_found(&self, now: Moment) -> bool {
        self.holds(now) && self.tried() == 0
    }

    /// True where nothing is known, as the backend answers nobody.
    fn is_assumed(&self, now: Moment) -> bool {
        self.holds(now) && self.tried() != 0
    }

    fn holds(&self, now: Moment) -> bool {
        let known = self.known.load(Ordering::Relaxed);
        known & FOUND != 0 && now.0 < known >> UNTIL_SHIFT
    }

    fn tried(&self) -> u64 {
        self.known.load(Ordering::Relaxed) >> TRIED_SHIFT & TRIED_MASK
    }

    /// Whose address a flow is to have that begins now. Clients that ask again may do so from another port, and then that is
    /// another flow: so it is not left to each by itself.
    pub(super) fn turn(&self, client: IpAddr, now: Moment) -> Turn {
        if self.is_found(now) {
            return Turn::Client(false);
        }
        if self.is_assumed(now) {
            return Turn::Client(true);
        }
        let known = self.known.load(Ordering::Relaxed);
        let asked = self.asked.load(Ordering::Relaxed);
        let is_young = now.since(Moment(asked >> SINCE_SHIFT)) < DOUBT;
        match (asked, asked & AS_NODE != 0) {
            (0, _) if self.may_try(client, now) => {
                self.ask(now, 0);
                Turn::Client(true)
            }
            (0, _) => Turn::Node(false),
            (_, true) if is_young => Turn::Node(true),
            (_, true) => self.silent(now),
            // One finds out, and no other one pays for it.
            (_, false) if is_young && known & FOUND == 0 => Turn::Node(false),
            (_, false) if is_young => Turn::Client(true),
            (_, false) => {
                self.ask(now, AS_NODE);
                Turn::Node(true)
            }
        }
    }

    fn ask(&self, now: Moment, as_node: u64) {
        self.asked.store(now.0 << SINCE_SHIFT | as_node, Ordering::Relaxed);
    }

    /// Who was to find out at this moment could not.
    fn forget_asked(&self, since: Moment) {
        let asked = since.0 << SINCE_SHIFT;
        // Refused where another one asks by now.
        let _ = self.asked.compare_exchange(asked, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// It has answered neither the client nor this node, which proves nothing. Whose address a flow is to have then.
    fn silent(&self, now: Moment) -> Turn {
        let known = self.known.load(Ordering::Relaxed);
        if known != 0 && known & FOUND == 0 {
            self.asked.store(0, Ordering::Relaxed);
            return Turn::Node(false); // What was known of it holds.
        }
        // Where it was found once, and nothing has been heard since, it begins anew.
        let tried = self.tried();
        let pause = FIRST_RETRY.saturating_mul(1 << tried);
        self.known.store(word(now.after(pause), (tried + 1).min(MOST_SILENT_DOUBLINGS), FOUND), Ordering::Relaxed);
        self.asked.store(0, Ordering::Relaxed);
        Turn::Client(true)
    }

    /// An answer came. Written now and then only, as each connection of a busy backend tells this.
    fn found(&self, now: Moment) {
        if self.strikes.load(Ordering::Relaxed) != 0 {
            self.strikes.store(0, Ordering::Relaxed);
        }
        let known = self.known.load(Ordering::Relaxed);
        if known & FOUND == 0 || now.after(TRUST / 2).0 > known >> UNTIL_SHIFT {
            self.known.store(word(now.after(TRUST), 0, FOUND), Ordering::Relaxed);
            self.asked.store(0, Ordering::Relaxed);
        }
    }

    /// None came to a client, though the backend answers. How long it is not tried again; `None` where nothing follows from
    /// that yet.
    fn missing(&self, client: IpAddr, now: Moment) -> Option<Duration> {
        self.striker.store(key(client), Ordering::Relaxed);
        if self.is_found(now) && !self.is_out(now) {
            return None;
        }
        Some(self.postpone(now))
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

    /// It is taken for missing, for the time that is told: twice as long each time.
    fn postpone(&self, now: Moment) -> Duration {
        let known = self.known.load(Ordering::Relaxed);
        let tried = if known & FOUND == 0 { known >> TRIED_SHIFT & TRIED_MASK } else { 0 };
        let pause = FIRST_RETRY.saturating_mul(1 << tried);
        self.known.store(word(now.after(pause), (tried + 1).min(MOST_DOUBLINGS), 0), Ordering::Relaxed);
        self.asked.store(0, Ordering::Relaxed);
        self.strikes.store(0, Ordering::Relaxed);
        pause
    }

    fn missing_for(&self, now: Moment) -> Option<Duration> {
        let known = self.known.load(Ordering::Relaxed);
        (known != 0 && known & FOUND == 0).then(|| Moment(known >> UNTIL_SHIFT).since(now))
    }
}

fn word(until: Moment, tried: u64, found: u64) -> u64 {
    until.0 << UNTIL_SHIFT | tried << TRIED_SHIFT | found
}

impl Backend {
    /// Whether a connection from the address of a client on that side is to be tried.
    pub(super) fn may_have_way_back(&self, side: Side, client: IpAddr, now: Instant) -> bool {
        self.ways_back.of(side).may_try(client, Moment::of(now))
    }

    /// True where answers to clients on that side came by this node not long ago.
    pub(super) fn has_way_back(&self, side: Side, now: Instant) -> bool {
        self.ways_back.of(side).is_found(Moment::of(now))
    }

    /// Whose address a flow of a client on that side is to have.
    pub(super) fn turn(&self, side: Side, client: IpAddr, now: Instant) -> Turn {
        self.ways_back.of(side).turn(client, Moment::of(now))
    }

    /// The flow that was to find out at this moment could not begin at its client's address.
    pub(super) fn note_not_asked(&self, side: Side, since: Instant) {
        self.ways_back.of(side).forget_asked(Moment::of(since));
    }

    /// A flow had no answer at its client's address, and none at this node's. True where it may see the client again.
    pub(super) fn note_silence(&self, side: Side, now: Instant) -> bool {
        matches!(self.ways_back.of(side).silent(Moment::of(now)), Turn::Client(_))
    }

    /// A flow that had no answer at its client's address goes on from this node's.
    pub(super) fn note_asked_as_node(&self, side: Side, now: Instant) {
        self.ways_back.of(side).ask(Moment::of(now), AS_NODE);
    }

    /// An answer to a client's address came here.
    pub(super) fn note_way_back(&self, side: Side, now: Instant) {
        self.ways_back.of(side).found(Moment::of(now));
    }

    /// None came to this client, though the backend answers this node.
    pub(super) fn note_no_way_back(&self, side: Side, client: IpAddr, service: &ServicePortName, now: Instant) {
        let Some(pause) = self.ways_back.of(side).missing(client, Moment::of(now)) else { return };
        info!(
            %service, backend = %self.address, reason = %SourceFallback::NoWayBack, again_in_seconds = pause.as_secs(),
            "its answers to clients' addresses do not come by this node: it sees the node's"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rustix::io::Errno;

    use super::*;

    const START: Moment = Moment(1_000_000);
    const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7));
    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 8));

    fn sides(client: Option<Way>, backend: Option<Way>) -> Result<Side, SourceFallback> {
        let [of_client, of_backend] = [1, 2].map(|host| IpAddr::from([192, 0, 2, host]));
        side(of_client, of_backend, |address| if address == of_client { client } else { backend })
    }

    #[test]
    fn given_ways_when_judged_then_who_may_be_answered_past_this_node_is_not_preserved() {
        let [bridge, uplink] = [3, 2];
        let link = |interface| Some(Way::Link(interface));
        let router = |interface| Some(Way::Router(interface));

        assert_eq!(sides(router(uplink), link(bridge)), Ok(Side::Router), "outside to a pod here");
        assert_eq!(sides(link(uplink), link(bridge)), Ok(Side::Link), "a neighbour of the node to a pod here");
        assert_eq!(sides(link(bridge), router(uplink)), Ok(Side::Link), "a pod here to one elsewhere");
        assert_eq!(sides(link(4), link(bridge)), Ok(Side::Link), "a pod here to another, each on a link of its own");
        assert_eq!(sides(router(uplink), router(uplink)), Ok(Side::Router), "that is found out");
        assert_eq!(sides(link(bridge), link(bridge)), Err(SourceFallback::SameLink));
        assert_eq!(sides(link(uplink), router(uplink)), Err(SourceFallback::SameLink));
        assert_eq!(sides(Some(Way::Here), link(bridge)), Err(SourceFallback::NodeLocal));
        assert_eq!(sides(router(uplink), Some(Way::Here)), Err(SourceFallback::HostBackend));
        assert_eq!(sides(None, link(bridge)), Err(SourceFallback::NoWayBack));
        assert_eq!(sides(router(uplink), None), Err(SourceFallback::NoWayBack));
    }

    #[test]
    fn given_a_pod_that_is_its_own_backend_when_judged_then_it_is_not_preserved() {
        let pod = IpAddr::from([10, 82, 0, 10]);

        assert_eq!(side(pod, pod, |_| Some(Way::Router(2))), Err(SourceFallback::SameLink));
    }

    #[test]
    fn given_a_client_that_backends_cannot_answer_when_judged_then_no_route_is_asked_for() {
        let judged = |client: &str, backend: &str| {
            let [client, backend] = [client, backend].map(|ip| ip.parse().expect("an address"));
            side(client, backend, |_| panic!("that is known"))
        };

        assert_eq!(judged("2001:db8::7", "10.0.0.1"), Err(SourceFallback::OtherFamily), "named by a balancer in front");
        assert_eq!(judged("fe80::7", "fd00::1"), Err(SourceFallback::SameLink));
    }

    #[test]
    fn given_a_way_back_that_is_missing_when_time_passes_then_one_tries_again_and_later_each_time() {
        let way = WayBack::new();
        assert!(way.may_try(CLIENT, START) && way.may_try(CLIENT, START), "everybody, as long as nothing is known");
        let mut now = START;

        for doublings in 0..10_u32 {
            let pause = FIRST_RETRY * 2_u32.pow(doublings.min(7));

            assert_eq!(way.missing(CLIENT, now), Some(pause));
            assert_eq!(way.missing_for(now), Some(pause));
            assert!(!way.may_try(OTHER, now) && !way.may_try(OTHER, Moment(now.after(pause).0 - 1)));
            now = now.after(pause);
            assert!(!way.may_try(CLIENT, now), "not the one that has failed");
            assert!(way.may_try(OTHER, now), "one tries");
            assert!(!way.may_try(OTHER, now), "and nobody else, meanwhile");
        }
    }

    #[test]
    fn given_a_client_that_failed_when_nobody_else_comes_then_it_tries_again_somewhat_later() {
        let way = WayBack::new();
        let pause = way.missing(CLIENT, START).expect("nothing was known");

        let again = START.after(pause + FIRST_RETRY);

        assert!(!way.may_try(CLIENT, Moment(again.0 - 1)) && way.may_try(CLIENT, again));
    }

    #[test]
    fn given_a_way_back_that_is_found_when_it_is_missing_later_then_it_is_tried_again_soon() {
        let way = WayBack::new();
        for _ in 0..5 {
            way.missing(CLIENT, START);
        }
        way.found(START);

        assert!(way.may_try(CLIENT, START) && way.turn(CLIENT, START) == Turn::Client(false));
        assert_eq!(way.missing_for(START), None);
        let later = START.after(TRUST);
        assert_eq!(way.turn(CLIENT, later), Turn::Client(true), "known no more, and not missing");
        assert_eq!(way.missing(CLIENT, later), Some(FIRST_RETRY));
    }

    #[test]
    fn given_a_way_back_that_is_found_when_one_connection_has_no_answer_then_others_are_not_taken_their_address() {
        let way = WayBack::new();
        way.found(START);

        for number in 0..10 {
            let now = START.after(STRIKES_LAST * number);
            assert_eq!(way.missing(CLIENT, now), None, "a client that is kept out");
            way.found(now); // Another one is answered.
        }
        assert_eq!(way.turn(OTHER, START.after(STRIKES_LAST * 10)), Turn::Client(false));
    }

    #[test]
    fn given_a_way_back_that_is_found_when_several_in_a_row_have_no_answer_for_a_while_then_it_is_missing() {
        let way = WayBack::new();
        way.found(START);

        for _ in 0..2 * STRIKES {
            assert_eq!(way.missing(CLIENT, START), None, "at one moment, as when a queue was full");
        }
        assert_eq!(way.missing(CLIENT, START.after(STRIKES_LAST)), Some(FIRST_RETRY));
    }

    #[test]
    fn given_a_way_back_that_is_found_when_told_again_then_the_word_is_written_only_after_a_while() {
        let way = WayBack::new();
        way.found(START);
        let first = way.known.load(Ordering::Relaxed);

        way.found(START.after(TRUST / 4));
        assert_eq!(way.known.load(Ordering::Relaxed), first);
        way.found(START.after(TRUST));
        assert_eq!(way.turn(CLIENT, START.after(TRUST)), Turn::Client(false));
    }

    #[test]
    fn given_flows_that_nobody_answers_when_others_follow_then_clients_are_seen_and_each_flow_may_still_tell() {
        let (way, soon, later) = (WayBack::new(), START.after(DOUBT / 2), START.after(DOUBT));
        let turn = |now| way.turn(CLIENT, now);

        assert_eq!([START, soon].map(turn), [Turn::Client(true), Turn::Node(false)], "one finds out");
        assert_eq!([later, later.after(DOUBT / 2)].map(turn), [Turn::Node(true); 2]);
        let mut now = later.after(DOUBT);
        for seconds in [5, 10, 20, 40, 40] {
            assert_eq!(turn(now), Turn::Client(true), "it answers nobody");
            let assumed = Duration::from_secs(seconds);
            assert!(way.is_assumed(Moment(now.after(assumed).0 - 1)) && !way.is_assumed(now.after(assumed)));
            now = now.after(assumed);
            assert_eq!([now, now.after(DOUBT)].map(turn), [Turn::Client(true), Turn::Node(true)], "it is asked again");
            now = now.after(DOUBT * 2);
        }
        assert_eq!(way.missing(CLIENT, now), Some(FIRST_RETRY), "it begins to answer this node");
    }

    #[test]
    fn given_an_answer_to_the_node_alone_when_flows_follow_then_one_tries_again_after_a_while() {
        let way = WayBack::new();
        let turn = |client, now| way.turn(client, now);
        assert_eq!([START, START.after(DOUBT)].map(|now| turn(CLIENT, now)), [Turn::Client(true), Turn::Node(true)]);
        let pause = way.missing(CLIENT, START).expect("nothing was known");

        assert_eq!(turn(OTHER, START), Turn::Node(false));
        let again = START.after(pause);
        assert_eq!([again, again].map(|now| turn(OTHER, now)), [Turn::Client(true), Turn::Node(false)]);
        let not_answered = again.after(DOUBT);
        assert_eq!(turn(OTHER, not_answered), Turn::Node(true), "it is found out whether the backend is there at all");
        assert_eq!(turn(OTHER, not_answered.after(DOUBT)), Turn::Node(false), "silence does not make it found");
        assert_eq!(way.missing_for(not_answered.after(DOUBT)), Some(FIRST_RETRY - DOUBT * 2));
    }

    #[test]
    fn given_a_flow_that_could_not_ask_when_others_follow_then_one_of_them_does() {
        let way = WayBack::new();
        assert_eq!(way.turn(CLIENT, START), Turn::Client(true));

        way.forget_asked(START);

        assert_eq!(way.turn(OTHER, START.after(DOUBT)), Turn::Client(true));
    }

    #[test]
    fn given_nothing_that_leads_answers_here_when_asked_then_nobody_is_preserved() {
        let (preserve, backend) = (Preserve::default(), Backend::new(1, ([192, 0, 2, 2], 80).into()));
        let client = [192, 0, 2, 1].into();

        assert_eq!(preserve.side(client, &backend, Instant::now()), Err(SourceFallback::ReplyPath));
        preserve.set(true, &ReplyPath::default());
        assert_eq!(preserve.side(client, &backend, Instant::now()), Err(SourceFallback::ReplyPath));
        assert_eq!(preserve.source_for((client, 7).into()), Source::Client((client, 7).into()));
        preserve.set(false, &ReplyPath::default());
        assert_eq!(preserve.source_for((client, 7).into()), Source::Any);
    }

    #[test]
    fn given_a_kernel_that_refuses_when_it_is_wanted_then_the_reason_is_told_and_else_not() {
        let (preserve, refusing) = (Preserve::default(), ReplyPath::assumed(Err(Errno::PERM)));
        assert_eq!(preserve.refusal(), None);

        preserve.set(true, &refusing);
        assert!(preserve.refusal().is_some());

        preserve.set(false, &refusing);
        assert_eq!(preserve.refusal(), None);
    }

    #[test]
    fn given_a_client_on_this_machine_when_asked_then_it_is_never_preserved() {
        let (preserve, backend) = (Preserve::default(), Backend::new(1, ([127, 0, 0, 2], 80).into()));
        preserve.set(true, &ReplyPath::assumed(Ok(())));

        let judged = preserve.side([127, 0, 0, 1].into(), &backend, Instant::now());

        assert_eq!(judged, Err(SourceFallback::NodeLocal));
    }
}
