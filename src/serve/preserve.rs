//! Whether a backend is to see the client's own address, and what is known of the way back.
//!
//! Answers to a client's address have to come by this node, which only the backend's network decides. What can be told
//! beforehand is told from the routes of this node (`way`): the client is the node itself, or on the backend's own link, or the
//! backend is the node. All else is found out by connections that are made anyway, for each backend, and apart for each `Side`
//! on which clients are (`way_back`):
//!
//! ```text
//! unknown ──an answer to a client──────────────────────▶ found     for 60 s after the last one
//!    │  ▲                                                  │
//!    │  └───────── 60 s without an answer ─────────────────┤
//!    ├──────── two clients in a row have none ─┐   three in a row, over 1 s, no two by one client
//!    │                                         ▼           ▼
//!    ├─ UDP: neither client nor node has one   missing: clients are served from the node's address
//!    ▼                                         │  tried again by one after 5 s, 10 s … ~10 min, where an answer makes it found
//! silent: clients are seen; asked again after 5 s, 10 s, 20 s
//! ```
//!
//! * *To have none* is to be silent to the client, and to answer this node in less than half of that time. Where the node's
//!   answer takes longer, it is undecided: that is the same while nothing is known, and nothing where it is found. Silence to
//!   both proves nothing: it is never found by that, and what is missing stays missing.
//! * One client alone never takes their address from the others, as it may be kept out, have lost a packet or have met a full
//!   queue: it is only held back itself, for 5 s, 10 s …, while nothing is found. Nobody's failure counts while it is missing, but
//!   that of the one who was sent to try.
//! * Over TCP, a connection waits `PROOF`, and is made from the node's address then: the client notices nothing else.
//! * Over UDP nobody knows whether an answer is to come, so that the client's next datagram tells. No flow shows its client
//!   without a doubt before its first answer (`upstream`): it moves to the node's address when the client asks again, and back
//!   where the node has none, either, ever more patiently. While nothing is known, one flow asks, and all others begin at the node.
//! * Who refuses a client's address is asked from the node's: where that is refused too, it is the backend's failure as ever.
//!   Where it is not, and others were let in, that client alone is meant and is not served; else it is, as where there is no way back.

use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::info;

use crate::name::{Family, ServicePortName};
use crate::reply_path::ReplyPath;
use crate::serve::balancer::Backend;
use crate::serve::connect::Source;
use crate::serve::moment::Moment;
use crate::serve::way::{Way, way_to};
use crate::serve::way_back::{ClientKey, Evidence, MOST_DOUBLINGS, Turn, Verdict, WayBack};
use crate::stats::{OnDemand, SourceFallback, SourceStats, Zeros};

/// How long a connection from the client's address may wait for an answer. On a node it takes a thousandth of it.
pub(super) const PROOF: Duration = Duration::from_millis(100);
/// As many sides are known apart for a backend. A node has a few networks; all others share the last place.
const SIDES: usize = 6;

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
        if !self.reply_path.get().is_some_and(ReplyPath::leads_here) {
            return Err(SourceFallback::ReplyPath);
        }
        side(client, backend.address().ip(), |address| way_to(address, now))
    }
}

/// On which side of this node a client is, as seen from a backend: what is known of one side tells nothing of another. A backend
/// on another node answers a pod of this node by it, as that is the pod's only way; and who is farther off, past it.
///
/// By which interface, and by a router or not; but one for all clients that have a route each, as pods with cables of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Side(u64);

impl Side {
    const IS_ONLY_WAY: u64 = 1;

    /// Never 0.
    fn new(client: Way, backend: Way) -> Self {
        let (kind, interface) = match client {
            Way::Here | Way::Alone(_) => (1, 0),
            Way::Link(interface) => (2, interface),
            Way::Router(interface) => (3, interface),
        };
        let is_on_link = matches!(backend, Way::Link(_) | Way::Alone(_));
        let is_only_way = is_on_link && backend.interface() != client.interface();
        Self(u64::from(interface) << 3 | kind << 1 | u64::from(is_only_way))
    }

    /// Of a client behind a router, and a backend behind another one.
    #[cfg(test)]
    pub(super) fn sample() -> Self {
        Self::new(Way::Router(2), Way::Router(9))
    }

    /// Whether the backend is on a link of this node where the client is not, so that nothing but this node leads back. There,
    /// only passing faults and policies can be in the way, and it is tried again soon.
    fn is_only_way(self) -> bool {
        self.0 & Self::IS_ONLY_WAY != 0
    }

    /// How often the time doubles after which a way back that is missing is tried again.
    fn most_doublings(self) -> u64 {
        if self.is_only_way() { 0 } else { MOST_DOUBLINGS }
    }
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
    match (of_client, way_to(backend).ok_or(SourceFallback::NoWayBack)?) {
        (_, Way::Here) => Err(SourceFallback::HostBackend),
        (Way::Link(interface) | Way::Alone(interface), way) if way.interface() == Some(interface) => {
            Err(SourceFallback::SameLink)
        }
        (of_client, of_backend) => Ok(Side::new(of_client, of_backend)),
    }
}

/// What is known of the ways back from one backend, by the side on which clients are. Shared by all threads.
#[derive(Debug, Default)]
pub struct WaysBack([Place; SIDES]);

/// What is known of one side, and of which.
#[derive(Debug, Default)]
struct Place {
    /// The [`Side`]; 0: of none yet.
    side: AtomicU64,
    way: WayBack,
}

impl Place {
    const fn free() -> Self {
        Self { side: AtomicU64::new(0), way: WayBack::new() }
    }

    /// True where the place is that side's, from now on if it was free.
    fn is_of(&self, side: Side) -> bool {
        match self.side.load(Ordering::Relaxed) {
            0 => {
                let taken = self.side.compare_exchange(0, side.0, Ordering::Relaxed, Ordering::Relaxed);
                taken.is_ok() || taken == Err(side.0)
            }
            taken => taken == side.0,
        }
    }
}

impl Zeros for WaysBack {
    fn zeros() -> &'static Self {
        static UNKNOWN: WaysBack = WaysBack([const { Place::free() }; SIDES]);
        &UNKNOWN
    }
}

impl WaysBack {
    fn of(&self, side: Side) -> &WayBack {
        let [first @ .., last] = &self.0;
        &first.iter().find(|place| place.is_of(side)).unwrap_or(last).way
    }

    /// How soon the next connection tries again, where none is found on some side.
    pub(crate) fn missing_for(&self, now: Instant) -> Option<Duration> {
        self.0.iter().filter_map(|place| place.way.missing_for(Moment::of(now))).max()
    }
}

impl Backend {
    /// Whether a connection from the address of a client on that side is to be tried.
    pub(super) fn may_have_way_back(&self, side: Side, client: IpAddr, now: Instant) -> bool {
        self.ways_back.of(side).may_try(ClientKey::of(client), Moment::of(now))
    }

    /// True where answers to clients on that side came by this node not long ago.
    pub(super) fn has_way_back(&self, side: Side, now: Instant) -> bool {
        self.ways_back.of(side).is_found(Moment::of(now))
    }

    /// True where answers to clients on that side do not come by this node, by all that is known.
    pub(super) fn lacks_way_back(&self, side: Side) -> bool {
        self.ways_back.of(side).is_missing()
    }

    /// Whose address a flow of a client on that side is to have.
    pub(super) fn turn(&self, side: Side, client: IpAddr, now: Instant) -> Turn {
        self.ways_back.of(side).turn(ClientKey::of(client), Moment::of(now))
    }

    /// Whether a flow that had no answer, and none at this node's address, may show its client again.
    pub(super) fn may_be_seen(&self, side: Side, client: IpAddr, now: Instant) -> bool {
        self.ways_back.of(side).may_be_seen(ClientKey::of(client), Moment::of(now))
    }

    /// The flow that was to find out at this moment could not begin at its client's address.
    pub(super) fn note_not_asked(&self, side: Side, client: IpAddr, since: Instant) {
        let since = Moment::of(since);
        self.ways_back.of(side).forget_asked(ClientKey::of(client), since, since);
    }

    /// An answer to a client's address came here.
    pub(super) fn note_way_back(&self, side: Side, now: Instant) {
        self.ways_back.of(side).found(Moment::of(now));
    }

    /// One to this node came, while a client still waits for its own.
    pub(super) fn note_answer_to_node(&self, side: Side) {
        self.ways_back.of(side).note_answer_to_node();
    }

    /// None came to this client, though the backend answers this node.
    pub(super) fn note_no_way_back(
        &self,
        side: Side,
        client: ClientKey,
        evidence: Evidence,
        service: &ServicePortName,
        now: Instant,
    ) {
        let verdict = self.ways_back.of(side).failed(client, evidence, Moment::of(now), side.most_doublings());
        let (whose, pause) = match verdict {
            _ if evidence == Evidence::Late => return, // Nothing is known that an operator could act on.
            None => return,
            Some(Verdict::One(pause)) => ("one client", pause),
            Some(Verdict::All(pause)) => ("all clients of that side", pause),
        };
        info!(
            %service, backend = %self.address(), reason = %SourceFallback::NoWayBack, of = whose,
            again_in_seconds = pause.as_secs(),
            "its answers to clients' addresses do not come by this node: it sees the node's"
        );
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::name::{ObjectName, Protocol};

    fn sides(client: Option<Way>, backend: Option<Way>) -> Result<Side, SourceFallback> {
        let [of_client, of_backend] = [1, 2].map(|host| IpAddr::from([192, 0, 2, host]));
        side(of_client, of_backend, |address| if address == of_client { client } else { backend })
    }

    fn link(interface: u32) -> Option<Way> {
        Some(Way::Link(interface))
    }

    fn router(interface: u32) -> Option<Way> {
        Some(Way::Router(interface))
    }

    fn alone(interface: u32) -> Option<Way> {
        Some(Way::Alone(interface))
    }

    const BRIDGE: u32 = 3;
    const UPLINK: u32 = 2;
    const TUNNEL: u32 = 9;

    #[test]
    fn given_ways_when_judged_then_who_may_be_answered_past_this_node_is_not_preserved() {
        assert_eq!(sides(link(BRIDGE), link(BRIDGE)), Err(SourceFallback::SameLink));
        assert_eq!(sides(link(UPLINK), router(UPLINK)), Err(SourceFallback::SameLink));
        assert_eq!(sides(Some(Way::Here), link(BRIDGE)), Err(SourceFallback::NodeLocal));
        assert_eq!(sides(router(UPLINK), Some(Way::Here)), Err(SourceFallback::HostBackend));
        assert_eq!(sides(None, link(BRIDGE)), Err(SourceFallback::NoWayBack));
        assert_eq!(sides(router(UPLINK), None), Err(SourceFallback::NoWayBack));
    }

    #[test]
    fn given_clients_of_one_backend_when_told_apart_then_each_network_is_a_side_and_pods_with_cables_are_one() {
        let elsewhere = |client| sides(client, router(TUNNEL)).expect("it may be");

        let pods = [alone(21), alone(22)].map(elsewhere);
        assert_eq!(pods[0], pods[1]);
        let each = [pods[0], elsewhere(link(BRIDGE)), elsewhere(link(UPLINK)), elsewhere(router(UPLINK))];
        assert!((1..each.len()).all(|i| !each[..i].contains(&each[i])), "{each:?}");
    }

    #[test]
    fn given_a_backend_on_a_link_when_clients_are_on_another_then_this_node_is_the_only_way() {
        let is_only_way = |client, backend| sides(client, backend).expect("it may be").is_only_way();

        assert!(is_only_way(router(UPLINK), link(BRIDGE)) && is_only_way(link(UPLINK), alone(21)));
        assert!(is_only_way(alone(22), alone(21)));
        assert!(!is_only_way(router(UPLINK), link(UPLINK)), "a node beside this one has a way of its own");
        assert!(!is_only_way(alone(22), router(TUNNEL)) && !is_only_way(router(UPLINK), router(UPLINK)));
    }

    #[test]
    fn given_more_sides_than_places_when_asked_then_the_first_are_apart_and_the_others_share_the_last() {
        let ways = WaysBack::default();
        let now = Instant::now();
        let sides: Vec<Side> =
            (0..SIDES as u32 + 2).map(|i| sides(link(10 + i), router(TUNNEL)).expect("it may be")).collect();

        for side in &sides[..SIDES - 1] {
            assert!(!ways.of(*side).is_found(Moment::of(now)));
            ways.of(*side).found(Moment::of(now));
        }
        let found = |side: &Side| ways.of(*side).is_found(Moment::of(now));
        assert!(sides[..SIDES - 1].iter().all(found) && !sides[SIDES - 1..].iter().any(found));
        ways.of(sides[SIDES]).found(Moment::of(now));
        assert!(sides.iter().all(found));
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
    fn given_pods_that_are_answered_when_a_client_of_another_network_is_not_then_each_keeps_what_is_its_own() {
        let (backend, now) = (Backend::new(1, ([192, 0, 2, 2], 80).into()), Instant::now());
        let service = ServicePortName::new(ObjectName::parse("default/dns"), "udp", Protocol::Udp);
        let [pods, lan] = [alone(21), link(UPLINK)].map(|client| sides(client, router(TUNNEL)).expect("it may be"));

        backend.note_way_back(pods, now);
        for host in [7, 8] {
            let client = ClientKey::of([203, 0, 113, host].into());
            backend.note_no_way_back(lan, client, Evidence::Clear, &service, now);
            backend.note_way_back(pods, now);
        }

        assert!(backend.has_way_back(pods, now) && !backend.lacks_way_back(pods));
        assert!(backend.lacks_way_back(lan) && !backend.may_have_way_back(lan, [203, 0, 113, 9].into(), now));
        assert_eq!(backend.turn(lan, [203, 0, 113, 9].into(), now), Turn::Node(None));
        assert!(backend.no_way_back_for(now).is_some());
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
