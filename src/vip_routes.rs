//! Which routes make the addresses of Services local to this machine, and what has to be done so that they are there.
//!
//! Pure: what the kernel says, errors and the time are arguments. The messages are in `route_message`, the socket in
//! `route_socket`; who holds an address, and who carries changes out, is `vips`.
//!
//! # What always holds
//!
//! * An address that is held is local: by a route of ours, or because others have made it so (loopback, an address of
//!   an interface, a network that an operator has routed here). If it is not, a change is due that makes it so.
//! * What others have made is never touched, and neither is a route with our number that appeared while we ran and that
//!   we did not make: another process relies on it.
//! * Nothing is removed before the first state of all Services is known ([`Routes::allow_removal`]): until then nobody
//!   can say which of the last run's routes are wanted. And nothing that was held a moment ago: the kernel still sends what
//!   a closed connection has left, and a Service that is deleted and made anew finds its route.
//! * Nothing is done as fast as the kernel can: what it refuses, and what somebody takes away again and again, is tried
//!   ever more seldom.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

/// A change that the kernel refused is tried again after this time at first,
const FIRST_RETRY: Duration = Duration::from_secs(2);
/// and never later than this.
const LAST_RETRY: Duration = Duration::from_secs(30);
/// A route that somebody takes away is set again at once; if that happens again, after this time at first,
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// and never later than this: it is to be back within 5 s.
const LAST_PAUSE: Duration = Duration::from_secs(4);
/// Whoever leaves a route alone for so long is not fighting over it.
const PEACE: Duration = Duration::from_secs(20);
/// So many losses on end are a fight: two may be one program that sets up the machine's network.
const FIGHT: u32 = 4;

/// A route in the table of what is local.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalRoute {
    /// What it makes local.
    pub net: IpNet,
    /// True where it has our number in its field `protocol`.
    pub own: bool,
}

impl LocalRoute {
    /// The address of a route such as ours: with our number, for one address alone.
    pub(crate) fn own_address(&self) -> Option<IpAddr> {
        self.host_address().filter(|_| self.own)
    }

    /// The address of a route for one address alone, whoever has made it.
    pub(crate) fn host_address(&self) -> Option<IpAddr> {
        is_host(&self.net).then(|| self.net.addr())
    }
}

/// What became of a route, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It is there.
    Appeared(LocalRoute),
    /// It is there no more.
    Vanished(LocalRoute),
    /// Something may have happened that is not told: look at all routes.
    Unknown,
}

/// What is to be done to the kernel's routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Make the address local.
    Add(IpAddr),
    /// Take our route to the address away.
    Remove(IpAddr),
}

impl Change {
    /// Whose route it is about.
    pub fn address(self) -> IpAddr {
        match self {
            Self::Add(address) | Self::Remove(address) => address,
        }
    }
}

/// What a change came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is made.
    Done,
    /// There is nothing to remove.
    WasGone,
    /// This process may not change routes, and never will.
    Forbidden,
    /// The kernel would not; another time it may.
    Refused,
    /// The kernel did not say: it may be made or not.
    Unanswered,
}

/// How many addresses of Services are local, and by whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// By routes with our number, those included that nobody wants any more.
    pub own: usize,
    /// Because others made them so.
    pub foreign: usize,
    /// Not at all.
    pub missing: usize,
}

/// All routes that concern us, and who wants them. Owned by the keeper of `vips`, by value.
#[derive(Debug)]
pub struct Routes {
    /// How long the route of an address stays that nobody holds any more.
    linger: Duration,
    held: BTreeMap<IpAddr, Held>,
    /// Routes with our number.
    own: BTreeMap<IpAddr, Origin>,
    foreign: Foreign,
    /// How many held addresses are local by others, and how many are not local.
    foreign_count: usize,
    missing_count: usize,
    agenda: Agenda,
    /// True once all routes were looked at: what comes later with our number, and is not made by us, is a stranger's.
    looked: bool,
    /// True where the kernel has said that this process may not change routes.
    forbidden: bool,
    may_remove: bool,
}

/// An address that should be local.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    holders: usize,
    standing: Standing,
    /// True once it was local while it was held: if it is not any more, somebody took that away.
    was_local: bool,
    /// True once this process has made its route, or may have: one that is seen anew is no stranger's. News get lost, and
    /// the kernel may pass over a route when it tells all of them.
    ours: bool,
    /// How often the kernel has refused its route, on end.
    refusals: u32,
    losses: Losses,
}

/// How often somebody has made an address local no more while it was held, on end.
#[derive(Clone, Copy, Debug, Default)]
struct Losses {
    count: u32,
    last: Option<Instant>,
}

impl Losses {
    fn add(&mut self, now: Instant) {
        let on_end = self.last.is_some_and(|last| now.saturating_duration_since(last) < PEACE);
        self.count = if on_end { self.count.saturating_add(1) } else { 1 };
        self.last = Some(now);
    }

    /// How long to wait before it is made local again.
    fn pause(&self) -> Duration {
        match self.count {
            0 | 1 => Duration::ZERO,
            count => doubled(FIRST_PAUSE, count - 2, LAST_PAUSE),
        }
    }
}

/// By whom an address is local.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    Own,
    Foreign,
    /// Not yet counted, either.
    #[default]
    Missing,
}

/// Where a route with our number comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// This process made it, or found it when it began.
    Ours,
    /// Somebody who uses the same number.
    Stranger,
}

impl Routes {
    /// Knows nothing of the kernel's routes yet. The route of an address stays for as long as `linger` after nobody holds it
    /// any more.
    pub fn new(linger: Duration) -> Self {
        Self {
            linger,
            held: BTreeMap::new(),
            own: BTreeMap::new(),
            foreign: Foreign::default(),
            foreign_count: 0,
            missing_count: 0,
            agenda: Agenda::default(),
            looked: false,
            forbidden: false,
            may_remove: false,
        }
    }

    /// Somebody wants the address to be local from now on.
    pub fn hold(&mut self, address: IpAddr, now: Instant) {
        let held = self.held.entry(address).or_default();
        held.holders += 1;
        if held.holders == 1 {
            self.count(Standing::default(), 1);
        }
        self.judge(address, now);
    }

    /// Somebody may want any address that has a route of ours, and cannot be asked.
    pub fn hold_own(&mut self, now: Instant) {
        self.own_addresses().into_iter().for_each(|address| self.hold(address, now));
    }

    /// One of those who want the address does not any more.
    pub fn release(&mut self, address: IpAddr, now: Instant) {
        let Some(held) = self.held.get_mut(&address) else { return };
        held.holders = held.holders.saturating_sub(1);
        if held.holders == 0 {
            let standing = held.standing;
            self.held.remove(&address);
            self.count(standing, -1);
            self.judge(address, now);
        }
    }

    /// From now on routes of ours go that nobody wants. To be called once all Services are known, and by the only
    /// process that removes routes of this number.
    pub fn allow_removal(&mut self, now: Instant) {
        self.may_remove = true;
        self.own_addresses().into_iter().for_each(|address| self.judge(address, now));
    }

    /// Nothing is removed from now on.
    pub fn forbid_removal(&mut self, now: Instant) {
        self.may_remove = false;
        self.own_addresses().into_iter().for_each(|address| self.judge(address, now));
    }

    /// Takes note of one route.
    pub fn note(&mut self, news: News, now: Instant) {
        let (route, there) = match news {
            News::Appeared(route) => (route, true),
            News::Vanished(route) => (route, false),
            News::Unknown => return,
        };
        match route.own_address() {
            Some(address) if there => {
                let origin = self.origin_of_new(address);
                self.own.entry(address).or_insert(origin);
                self.judge(address, now);
            }
            Some(address) => {
                self.own.remove(&address);
                self.judge(address, now);
            }
            None => {
                self.foreign.note(route.net, there);
                self.held_within(route.net).into_iter().for_each(|address| self.judge(address, now));
            }
        }
    }

    /// Takes note of all routes that there are. Those with our number that are there the first time are from the last
    /// run: they are adopted.
    pub fn note_all(&mut self, routes: impl IntoIterator<Item = LocalRoute>, now: Instant) {
        let known = std::mem::take(&mut self.own);
        self.foreign = Foreign::default();
        for route in routes {
            match route.own_address() {
                Some(address) => {
                    let origin = known.get(&address).copied().unwrap_or_else(|| self.origin_of_new(address));
                    self.own.insert(address, origin);
                }
                None => self.foreign.note(route.net, true),
            }
        }
        self.looked = true;
        let concerned: BTreeSet<IpAddr> =
            self.held.keys().chain(known.keys()).chain(self.own.keys()).copied().collect();
        concerned.into_iter().for_each(|address| self.judge(address, now));
    }

    /// Has everything tried now that the kernel has refused: things have changed.
    pub fn try_again(&mut self, now: Instant) {
        for (address, held) in &mut self.held {
            if std::mem::take(&mut held.refusals) > 0 && self.agenda.strike(*address) {
                self.agenda.set(*address, now);
            }
        }
    }

    /// The changes that are due, so many at most. Each is to be carried out, and its outcome [told](Self::settle).
    pub fn take_due(&mut self, now: Instant, most: usize) -> Vec<Change> {
        let mut due = Vec::new();
        while due.len() < most {
            let Some(address) = self.agenda.pop_due(now) else { break };
            due.extend(self.change(address)); // Nothing, if things have changed since.
        }
        due
    }

    /// When the next change is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.agenda.next()
    }

    /// Takes note of what a change came to. True where it has put back what somebody had taken away.
    pub fn settle(&mut self, change: Change, outcome: Outcome, now: Instant) -> bool {
        let address = change.address();
        let mut repaired = false;
        match (change, outcome) {
            (Change::Add(_), Outcome::Done) => {
                self.own.insert(address, Origin::Ours);
                if let Some(held) = self.held.get_mut(&address) {
                    held.refusals = 0;
                    repaired = held.was_local;
                }
            }
            (Change::Remove(_), Outcome::Done | Outcome::WasGone) => {
                self.own.remove(&address);
            }
            (_, Outcome::Forbidden) => {
                self.forbidden = true;
                self.agenda = Agenda::default();
            }
            (_, Outcome::Refused | Outcome::WasGone | Outcome::Unanswered) => {
                let wait = self.wait_after_refusal(address, outcome);
                self.agenda.set(address, now + wait);
                return false;
            }
        }
        self.judge(address, now);
        repaired
    }

    /// How long to wait for the next try of a change, after one that was refused. Nobody waits for a route to go.
    fn wait_after_refusal(&mut self, address: IpAddr, outcome: Outcome) -> Duration {
        let Some(held) = self.held.get_mut(&address) else { return LAST_RETRY };
        held.ours |= outcome == Outcome::Unanswered;
        let wait = doubled(FIRST_RETRY, held.refusals, LAST_RETRY);
        held.refusals = held.refusals.saturating_add(1);
        wait
    }

    /// True where packets to the address come to this machine's own sockets.
    pub fn is_local(&self, address: IpAddr) -> bool {
        self.own.contains_key(&address) || self.foreign.covers(address)
    }

    /// True where others make the address local, whether we do or not.
    pub fn is_local_by_others(&self, address: IpAddr) -> bool {
        self.foreign.covers(address)
    }

    /// True where somebody wants the address to be local, and it is not.
    pub fn lacks(&self, address: IpAddr) -> bool {
        self.held.contains_key(&address) && !self.is_local(address)
    }

    /// True where somebody keeps making the address local no more.
    pub fn is_fought_over(&self, address: IpAddr) -> bool {
        self.held.get(&address).is_some_and(|held| held.losses.count >= FIGHT)
    }

    /// True where somebody wants the address to be local.
    pub fn is_held(&self, address: IpAddr) -> bool {
        self.held.contains_key(&address)
    }

    /// True where the address has been local since somebody wants it so, whether or not it is now.
    pub fn was_local(&self, address: IpAddr) -> bool {
        self.held.get(&address).is_some_and(|held| held.was_local)
    }

    /// True once all routes were looked at.
    pub fn are_known(&self) -> bool {
        self.looked
    }

    /// True once the kernel has said that this process may not change routes.
    pub fn is_forbidden(&self) -> bool {
        self.forbidden
    }

    /// The addresses of all routes of ours.
    pub fn own_addresses(&self) -> Vec<IpAddr> {
        self.own.iter().filter(|(_, origin)| **origin == Origin::Ours).map(|(address, _)| *address).collect()
    }

    /// What others have made local that addresses of Services need. Loopback is not told: it is always there.
    pub fn relied_on(&self) -> BTreeSet<IpNet> {
        let by_others =
            self.held.keys().copied().filter(|address| !self.own.contains_key(address) && !address.is_loopback());
        by_others.filter_map(|address| self.foreign.covering(address)).collect()
    }

    /// How many addresses are local, and by whom.
    pub fn tally(&self) -> Tally {
        Tally { own: self.own.len(), foreign: self.foreign_count, missing: self.missing_count }
    }

    /// What has to be done about an address as things are.
    fn change(&self, address: IpAddr) -> Option<Change> {
        if self.forbidden || !self.looked {
            return None;
        }
        match (self.held.contains_key(&address), self.own.get(&address)) {
            (true, None) if !self.foreign.covers(address) => Some(Change::Add(address)),
            (false, Some(Origin::Ours)) if self.may_remove => Some(Change::Remove(address)),
            _ => None,
        }
    }

    /// Enters on the agenda, or takes off it, what has to be done about an address.
    fn judge(&mut self, address: IpAddr, now: Instant) {
        self.restand(address, now);
        match self.change(address) {
            // What the kernel has refused waits for its next try, whatever is heard meanwhile.
            Some(Change::Add(_)) => {
                let pause = self.held.get(&address).map_or(Duration::ZERO, |held| held.losses.pause());
                self.agenda.set_unless_set(address, now + pause);
            }
            Some(Change::Remove(_)) => self.agenda.set_unless_set(address, now + self.linger),
            None => {
                self.agenda.strike(address);
            }
        }
    }

    /// Takes note of who makes a held address local now.
    fn restand(&mut self, address: IpAddr, now: Instant) {
        let own = self.own.get(&address);
        let standing = match own {
            Some(_) => Standing::Own,
            None if self.foreign.covers(address) => Standing::Foreign,
            None => Standing::Missing,
        };
        let Some(held) = self.held.get_mut(&address) else { return };
        held.ours |= own == Some(&Origin::Ours);
        held.was_local |= standing != Standing::Missing;
        let before = std::mem::replace(&mut held.standing, standing);
        if before != Standing::Missing && standing == Standing::Missing {
            held.losses.add(now);
        }
        self.count(before, -1);
        self.count(standing, 1);
    }

    fn count(&mut self, standing: Standing, difference: isize) {
        let count = match standing {
            Standing::Own => return,
            Standing::Foreign => &mut self.foreign_count,
            Standing::Missing => &mut self.missing_count,
        };
        *count = count.saturating_add_signed(difference);
    }

    /// Whose a route with our number is that is seen for the first time, or again.
    fn origin_of_new(&self, address: IpAddr) -> Origin {
        let ours = !self.looked || self.held.get(&address).is_some_and(|held| held.ours);
        if ours { Origin::Ours } else { Origin::Stranger }
    }

    fn held_within(&self, net: IpNet) -> Vec<IpAddr> {
        if is_host(&net) {
            return self.held.contains_key(&net.addr()).then(|| net.addr()).into_iter().collect();
        }
        self.held.keys().copied().filter(|address| net.contains(address)).collect()
    }
}

/// A time that doubles with each time before, up to the last one.
fn doubled(first: Duration, times: u32, last: Duration) -> Duration {
    2_u32.checked_pow(times).and_then(|factor| first.checked_mul(factor)).map_or(last, |time| time.min(last))
}

fn is_host(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// What others have made local. Single addresses may be thousands (interfaces have them), networks are a few.
#[derive(Debug, Default)]
struct Foreign {
    hosts: BTreeSet<IpAddr>,
    nets: BTreeSet<IpNet>,
}

impl Foreign {
    fn note(&mut self, net: IpNet, there: bool) {
        // Each of these tells whether it was news, which nobody wants to know.
        let _ = match (is_host(&net), there) {
            (true, true) => self.hosts.insert(net.addr()),
            (true, false) => self.hosts.remove(&net.addr()),
            (false, true) => self.nets.insert(net),
            (false, false) => self.nets.remove(&net),
        };
    }

    fn covers(&self, address: IpAddr) -> bool {
        self.covering(address).is_some()
    }

    /// The route that a packet to the address takes.
    fn covering(&self, address: IpAddr) -> Option<IpNet> {
        if self.hosts.contains(&address) {
            return Some(address.into());
        }
        self.nets.iter().copied().filter(|net| net.contains(&address)).max_by_key(IpNet::prefix_len)
    }
}

/// When to look at which address: each at one time at most.
#[derive(Debug, Default)]
struct Agenda {
    by_time: BTreeSet<(Instant, IpAddr)>,
    by_address: BTreeMap<IpAddr, Instant>,
}

impl Agenda {
    fn set(&mut self, address: IpAddr, due: Instant) {
        self.strike(address);
        self.by_time.insert((due, address));
        self.by_address.insert(address, due);
    }

    fn set_unless_set(&mut self, address: IpAddr, due: Instant) {
        if !self.by_address.contains_key(&address) {
            self.set(address, due);
        }
    }

    /// True where it was on it.
    fn strike(&mut self, address: IpAddr) -> bool {
        let due = self.by_address.remove(&address);
        due.is_some_and(|due| self.by_time.remove(&(due, address)))
    }

    fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(due, _)| *due)
    }

    fn pop_due(&mut self, now: Instant) -> Option<IpAddr> {
        let (due, address) = *self.by_time.first()?;
        (due <= now && self.strike(address)).then_some(address)
    }
}

#[cfg(test)]
#[path = "vip_routes_simulation.rs"]
mod simulation;

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: usize = usize::MAX;
    const LINGER: Duration = Duration::from_secs(60);

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn route(text: &str, own: bool) -> LocalRoute {
        LocalRoute { net: text.parse().expect("a network"), own }
    }

    /// Routes of a machine that has loopback, an address, and these.
    fn machine(more: &[LocalRoute], now: Instant) -> Routes {
        let mut routes = Routes::new(LINGER);
        let always = ["127.0.0.0/8", "::1/128", "192.0.2.5/32"].map(|net| route(net, false));
        routes.note_all(always.into_iter().chain(more.iter().copied()), now);
        routes
    }

    /// Carries out all that is due, as a kernel that refuses nothing.
    fn carry_out(routes: &mut Routes, now: Instant) -> Vec<Change> {
        let due = routes.take_due(now, MANY);
        for change in &due {
            routes.settle(*change, Outcome::Done, now);
        }
        due
    }

    #[test]
    fn given_addresses_when_held_then_those_that_are_not_local_yet_get_a_route() {
        let now = Instant::now();
        let mut routes = machine(&[route("10.96.1.0/24", false)], now);

        for address in ["127.96.0.1", "::1", "192.0.2.5", "10.96.1.7", "10.96.0.1", "fd96::1"] {
            routes.hold(ip(address), now);
        }

        assert_eq!(carry_out(&mut routes, now), [Change::Add(ip("10.96.0.1")), Change::Add(ip("fd96::1"))]);
        assert_eq!(routes.tally(), Tally { own: 2, foreign: 4, missing: 0 });
        let relied_on: Vec<String> = routes.relied_on().iter().map(ToString::to_string).collect();
        assert_eq!(relied_on, ["10.96.1.0/24", "192.0.2.5/32"]);
    }

    #[test]
    fn given_a_route_that_several_hold_when_the_last_lets_go_then_it_goes_after_a_while() {
        let now = Instant::now();
        let mut routes = machine(&[], now);
        routes.allow_removal(now);
        (0..2).for_each(|_| routes.hold(ip("10.96.0.1"), now));
        carry_out(&mut routes, now);

        routes.release(ip("10.96.0.1"), now);
        assert_eq!(routes.next_due(), None, "an open connection holds it");
        routes.release(ip("10.96.0.1"), now);
        routes.hold(ip("10.96.0.1"), now);
        assert_eq!(routes.next_due(), None, "made anew");
        routes.release(ip("10.96.0.1"), now);

        assert_eq!(routes.next_due(), Some(now + LINGER));
        assert_eq!(carry_out(&mut routes, now + LINGER), [Change::Remove(ip("10.96.0.1"))]);
        assert_eq!(routes.tally(), Tally::default());
    }

    #[test]
    fn given_routes_of_the_last_run_when_all_services_are_known_then_only_those_that_nobody_wants_go() {
        let now = Instant::now();
        let mut routes = machine(&[route("10.96.0.1/32", true), route("10.96.0.2/32", true)], now);
        routes.hold(ip("10.96.0.1"), now);
        assert_eq!(routes.next_due(), None, "adopted, and the other may be wanted yet");

        routes.allow_removal(now);

        assert_eq!(carry_out(&mut routes, now + LINGER), [Change::Remove(ip("10.96.0.2"))]);
    }

    #[test]
    fn f35_given_routes_of_holders_who_cannot_be_asked_when_one_is_taken_away_then_it_is_set_again() {
        let now = Instant::now();
        let mut routes = machine(&[route("10.96.0.1/32", true)], now);

        routes.hold_own(now);
        routes.note(News::Vanished(route("10.96.0.1/32", true)), now);

        assert_eq!(carry_out(&mut routes, now), [Change::Add(ip("10.96.0.1"))]);
        assert!(!routes.is_held(ip("192.0.2.5")), "it is not ours");
    }

    #[test]
    fn given_a_route_with_our_number_that_appears_when_nobody_here_wants_it_then_it_is_somebody_elses() {
        let now = Instant::now();
        let mut routes = machine(&[], now);
        routes.allow_removal(now);
        let strangers = route("10.96.0.9/32", true);

        routes.note(News::Appeared(strangers), now);
        routes.note_all([strangers], now);

        assert_eq!(routes.next_due(), None);
        routes.hold(ip("10.96.0.9"), now);
        assert_eq!(routes.next_due(), None, "it is local, whoever made it so");
    }

    #[test]
    fn f28_given_a_held_route_when_somebody_deletes_it_then_it_is_put_back_at_once_and_counts_as_repaired() {
        let now = Instant::now();
        let mut routes = machine(&[], now);
        routes.hold(ip("10.96.0.1"), now);
        let [first] = routes.take_due(now, MANY)[..] else { panic!("one change") };
        assert!(!routes.settle(first, Outcome::Done, now));
        routes.note(News::Appeared(route("10.96.0.1/32", true)), now);

        routes.note(News::Vanished(route("10.96.0.1/32", true)), now);

        assert_eq!(routes.take_due(now, MANY), [first]);
        assert!(routes.settle(first, Outcome::Done, now));
    }

    #[test]
    fn f28_given_a_network_of_others_when_it_goes_then_what_it_made_local_gets_routes_of_ours() {
        let now = Instant::now();
        let mut routes = machine(&[route("10.96.0.0/12", false)], now);
        ["10.96.0.1", "10.97.0.1", "fd96::1"].into_iter().for_each(|address| routes.hold(ip(address), now));
        assert_eq!(carry_out(&mut routes, now), [Change::Add(ip("fd96::1"))]);

        routes.note(News::Vanished(route("10.96.0.0/12", false)), now);
        assert_eq!(routes.tally().missing, 2);

        assert_eq!(carry_out(&mut routes, now), [Change::Add(ip("10.96.0.1")), Change::Add(ip("10.97.0.1"))]);
    }

    #[test]
    fn given_a_process_without_the_right_when_told_so_then_it_tries_nothing_any_more() {
        let now = Instant::now();
        let mut routes = machine(&[route("10.96.0.1/32", false)], now);
        routes.hold(ip("10.96.0.1"), now);
        routes.hold(ip("10.96.0.2"), now);

        let [change] = routes.take_due(now, MANY)[..] else { panic!("one change") };
        routes.settle(change, Outcome::Forbidden, now);
        routes.hold(ip("10.96.0.3"), now);

        assert!(routes.is_forbidden());
        assert_eq!(routes.next_due(), None);
        assert_eq!(routes.tally(), Tally { own: 0, foreign: 1, missing: 2 });
    }

    #[test]
    fn given_a_change_that_the_kernel_refuses_when_its_time_comes_then_it_is_tried_again() {
        let now = Instant::now();
        let mut routes = machine(&[], now);
        routes.hold(ip("10.96.0.1"), now);

        let [change] = routes.take_due(now, MANY)[..] else { panic!("one change") };
        routes.settle(change, Outcome::Refused, now);

        routes.note_all([], now); // Looking changes nothing about that.
        assert_eq!(routes.take_due(now, MANY), []);
        assert_eq!(routes.take_due(now + FIRST_RETRY, MANY), [change]);
    }

    #[test]
    fn given_a_kernel_that_goes_on_refusing_when_tried_again_then_waits_double_until_things_have_changed() {
        let mut now = Instant::now();
        let mut routes = machine(&[], now);
        routes.hold(ip("10.96.0.1"), now);
        let mut waits = Vec::new();

        for _ in 0..6 {
            let [change] = routes.take_due(now, MANY)[..] else { panic!("one change") };
            routes.settle(change, Outcome::Refused, now);
            let due = routes.next_due().expect("it is tried again");
            waits.push((due - now).as_secs());
            now = due;
        }

        assert_eq!(waits, [2, 4, 8, 16, 30, 30]);
        carry_out(&mut routes, now);
        assert_eq!(routes.tally().missing, 0);
    }

    #[test]
    fn given_a_change_that_was_refused_when_things_have_changed_then_it_is_tried_at_once() {
        let now = Instant::now();
        let mut routes = machine(&[], now);
        routes.hold(ip("10.96.0.1"), now);
        let [change] = routes.take_due(now, MANY)[..] else { panic!("one change") };
        routes.settle(change, Outcome::Refused, now);

        routes.try_again(now);

        assert_eq!(routes.take_due(now, MANY), [change]);
    }

    #[test]
    fn f28_given_somebody_who_deletes_a_route_again_and_again_when_put_back_then_ever_later_and_within_five_seconds() {
        let mut now = Instant::now();
        let mut routes = machine(&[], now);
        routes.hold(ip("10.96.0.1"), now);
        carry_out(&mut routes, now);
        let mut pauses = Vec::new();

        for _ in 0..9 {
            routes.note(News::Vanished(route("10.96.0.1/32", true)), now);
            let due = routes.next_due().expect("it is put back");
            pauses.push((due - now).as_millis());
            now = due;
            carry_out(&mut routes, now);
        }

        assert_eq!(pauses, [0, 100, 200, 400, 800, 1_600, 3_200, 4_000, 4_000]);
        assert!(routes.is_fought_over(ip("10.96.0.1")));
        routes.note(News::Vanished(route("10.96.0.1/32", true)), now + PEACE);
        assert_eq!(routes.next_due(), Some(now + PEACE), "after a while of peace it is a new case");
        assert!(!routes.is_fought_over(ip("10.96.0.1")));
    }

    #[test]
    fn given_a_route_of_ours_that_a_look_has_missed_when_it_is_seen_again_then_it_is_still_ours() {
        let now = Instant::now();
        let mut routes = machine(&[], now);
        routes.allow_removal(now);
        routes.hold(ip("fd96::1"), now);
        carry_out(&mut routes, now);

        routes.note_all([], now);
        let [change] = routes.take_due(now, MANY)[..] else { panic!("one change") };
        routes.settle(change, Outcome::Refused, now); // As it is there.
        routes.note_all([route("fd96::1/128", true)], now);
        assert_eq!(routes.next_due(), None);
        routes.release(ip("fd96::1"), now);

        assert_eq!(carry_out(&mut routes, now + LINGER), [Change::Remove(ip("fd96::1"))]);
    }

    #[test]
    fn given_a_change_that_the_kernel_did_not_answer_when_its_route_is_seen_then_it_is_ours() {
        let now = Instant::now();
        let mut routes = machine(&[], now);
        routes.allow_removal(now);
        routes.hold(ip("10.96.0.1"), now);
        let [change] = routes.take_due(now, MANY)[..] else { panic!("one change") };

        routes.settle(change, Outcome::Unanswered, now);
        routes.note(News::Appeared(route("10.96.0.1/32", true)), now);
        routes.release(ip("10.96.0.1"), now);

        assert_eq!(carry_out(&mut routes, now + LINGER), [Change::Remove(ip("10.96.0.1"))]);
    }

    #[test]
    fn given_many_changes_when_taken_in_parts_then_each_is_taken_once() {
        let now = Instant::now();
        let mut routes = machine(&[], now);
        (1..=10).for_each(|number| routes.hold([10, 96, 0, number].into(), now));

        let parts = std::iter::repeat_with(|| routes.take_due(now, 4));
        let taken: Vec<_> = parts.take_while(|part| !part.is_empty()).collect();

        assert_eq!(taken.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
        assert_eq!(taken.concat().iter().collect::<std::collections::BTreeSet<_>>().len(), 10);
    }

    #[test]
    fn given_routes_that_may_go_when_removal_is_forbidden_then_they_stay() {
        let now = Instant::now();
        let mut routes = machine(&[route("10.96.0.1/32", true)], now);
        routes.allow_removal(now);

        routes.forbid_removal(now);

        assert_eq!(routes.next_due(), None);
        assert_eq!(routes.own_addresses(), [ip("10.96.0.1")]);
    }
}
