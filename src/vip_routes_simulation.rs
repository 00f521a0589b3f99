//! A seeded adversary for the routes of VIPs: holders that come and go, strangers that meddle with the kernel's routes,
//! news that get lost, looks that miss a route, a kernel that refuses or does not answer, restarts. What must hold is
//! checked whenever all has come to rest.
//!
//! `KUBE_RELAY_SEED=n` replays one seed.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

const SEEDS: u64 = 200;
const STEPS: usize = 300;
const LINGER: Duration = Duration::from_secs(5);

#[test]
fn given_an_adversary_when_it_takes_random_steps_then_what_is_held_is_local_and_what_others_made_is_theirs() {
    let replay: Option<u64> = std::env::var("KUBE_RELAY_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut losses = 0;
    for seed in replay.map_or(0..SEEDS, |seed| seed..seed + 1) {
        let outcome = std::panic::catch_unwind(|| World::new(seed).run(STEPS));
        assert!(outcome.is_ok(), "failed: replay with KUBE_RELAY_SEED={seed}");
        losses += outcome.unwrap_or_default();
    }
    assert!(losses > 0 || replay.is_some(), "no news were ever lost: that is untested");
}

/// What the kernel does with changes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Fine,
    Refuses,
    DoesNotAnswer,
    /// Strangers are faster.
    IsInterrupted,
}

/// A kernel, those who change its routes, and ours.
struct World {
    random: StdRng,
    now: Instant,
    kernel: BTreeSet<LocalRoute>,
    /// What the kernel has said and nobody has heard yet.
    news: Vec<News>,
    /// Routes with our number that strangers made since we began.
    strangers: BTreeSet<IpAddr>,
    /// The same, where ours may have been before: nobody can tell whether they are the same ones.
    doubtful: BTreeSet<IpAddr>,
    /// How often news were lost.
    losses: usize,
    /// True where the kernel knows a route that we do not.
    surprised: bool,
    routes: Routes,
    /// Who holds what, as they see it.
    holders: BTreeMap<IpAddr, usize>,
    synced: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let loopback = LocalRoute { net: "127.0.0.0/8".parse().expect("a network"), own: false };
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            now: Instant::now(),
            kernel: [loopback].into(),
            news: Vec::new(),
            strangers: BTreeSet::new(),
            doubtful: BTreeSet::new(),
            losses: 0,
            surprised: false,
            routes: Routes::new(LINGER),
            holders: BTreeMap::new(),
            synced: false,
        };
        world.restart();
        world
    }

    /// Tells how often news were lost.
    fn run(mut self, steps: usize) -> usize {
        for _ in 0..steps {
            self.step();
            // News pile up for a while, or some would never be there to be lost.
            if self.random.random_range(0..2) == 0 {
                let mood = match self.random.random_range(0..8) {
                    0 => Mood::Refuses,
                    1 => Mood::DoesNotAnswer,
                    2 => Mood::IsInterrupted,
                    _ => Mood::Fine,
                };
                self.settle(mood);
            }
            self.now += Duration::from_millis(self.random.random_range(0..1_500));
            if self.random.random_range(0..8) == 0 {
                self.come_to_rest();
                self.check();
            }
        }
        self.losses
    }

    fn step(&mut self) {
        let address = self.address();
        match self.random.random_range(0..12) {
            0..=3 => {
                *self.holders.entry(address).or_default() += 1;
                self.routes.hold(address, self.now);
            }
            4..=6 => self.let_go(address),
            7..=9 => self.interfere(),
            10 => self.sync(),
            _ if self.random.random_range(0..4) == 0 => self.restart(),
            _ => self.lose_news(),
        }
    }

    /// One of a few, so that they meet often.
    fn address(&mut self) -> IpAddr {
        let number = self.random.random_range(0..6);
        if self.random.random_range(0..3) == 0 {
            [0xfd96, 0, 0, 0, 0, 0, 0, u16::from(number)].into()
        } else {
            [10, 96, 0, number].into()
        }
    }

    fn let_go(&mut self, address: IpAddr) {
        if let Some(count) = self.holders.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.holders.remove(&address);
            }
            self.routes.release(address, self.now);
        }
    }

    /// A stranger does something to any route.
    fn interfere(&mut self) {
        let net = self.address().into();
        match self.random.random_range(0..3) {
            0 => self.meddle(LocalRoute { net, own: true }),
            1 => self.meddle(LocalRoute { net, own: false }),
            _ => self.meddle(LocalRoute { net: "10.96.0.0/30".parse().expect("a network"), own: false }),
        }
    }

    /// A stranger makes a route, or takes it away where it is there.
    fn meddle(&mut self, route: LocalRoute) {
        let there = self.kernel.remove(&route);
        match route.own_address() {
            Some(address) if there => {
                self.strangers.remove(&address);
                self.doubtful.remove(&address);
            }
            Some(address) if self.is_in_motion(address) => {
                self.doubtful.insert(address);
            }
            Some(address) => {
                self.strangers.insert(address);
            }
            None => {}
        }
        if there {
            self.news.push(News::Vanished(route));
        } else {
            self.kernel.insert(route);
            self.news.push(News::Appeared(route));
        }
    }

    /// True where we may not know yet that our own route to the address is gone, or are about to make one.
    fn is_in_motion(&self, address: IpAddr) -> bool {
        let untold = self.news.iter().any(|news| match news {
            News::Appeared(route) | News::Vanished(route) => route.own_address() == Some(address),
            News::Unknown => true,
        });
        untold || self.holders.contains_key(&address) || self.routes.own_addresses().contains(&address)
    }

    fn sync(&mut self) {
        self.synced = true;
        self.routes.allow_removal(self.now);
    }

    /// What went and came again meanwhile looks as if nothing had happened: ours stays ours.
    fn lose_news(&mut self) {
        (0..3).for_each(|_| self.interfere());
        self.news = vec![News::Unknown];
        self.losses += 1;
    }

    /// The process ends at whatever moment; its holders with it. The next one looks at what is there.
    fn restart(&mut self) {
        self.holders.clear();
        self.news.clear();
        self.strangers.clear();
        self.doubtful.clear();
        self.routes = Routes::new(LINGER);
        self.synced = false;
        self.look();
    }

    fn look(&mut self) {
        self.routes.note_all(self.kernel.iter().copied(), self.now);
    }

    /// As the keeper does it: hear, act, and so on. Strangers act in between.
    fn settle(&mut self, mood: Mood) {
        for _ in 0..100 {
            self.hear();
            let most = self.random.random_range(1..4);
            let due = self.routes.take_due(self.now, most);
            if due.is_empty() {
                if std::mem::take(&mut self.surprised) {
                    self.look();
                }
                return;
            }
            if mood == Mood::IsInterrupted && self.random.random_range(0..2) == 0 {
                self.interfere();
            }
            for change in due {
                let outcome = match mood {
                    Mood::Refuses => Outcome::Refused,
                    Mood::DoesNotAnswer => self.apply_silently(change),
                    Mood::Fine | Mood::IsInterrupted => self.apply(change),
                };
                self.routes.settle(change, outcome, self.now);
            }
        }
        panic!("there is always more to do");
    }

    fn hear(&mut self) {
        let news = std::mem::take(&mut self.news);
        let lost = news.contains(&News::Unknown);
        news.into_iter().for_each(|news| self.routes.note(news, self.now));
        if lost {
            self.look_past_one();
            self.routes.try_again(self.now);
        }
    }

    /// A look that may miss a route: the kernel passes over some where they change while it tells them.
    fn look_past_one(&mut self) {
        let missed = self.random.random_range(0..16);
        if let Some(address) = self.kernel.iter().nth(missed).and_then(LocalRoute::own_address)
            && self.routes.own_addresses().contains(&address)
        {
            self.doubtful.insert(address); // Where nobody holds it, it is a stranger's when it is seen again.
        }
        let seen = self.kernel.iter().enumerate().filter(|(place, _)| *place != missed).map(|(_, route)| *route);
        self.routes.note_all(seen, self.now);
    }

    /// The change is made or not, and nobody says which.
    fn apply_silently(&mut self, change: Change) -> Outcome {
        if self.random.random_range(0..2) == 0 {
            self.apply(change);
        }
        if let Change::Add(address) = change
            && self.strangers.remove(&address)
        {
            self.doubtful.insert(address);
        }
        Outcome::Unanswered
    }

    /// What the kernel does. It is asked only for what may be asked for.
    fn apply(&mut self, change: Change) -> Outcome {
        let route = LocalRoute { net: change.address().into(), own: true };
        match change {
            Change::Add(address) => {
                assert!(self.holders.contains_key(&address), "{address}: nobody asked for it");
                let exists = self.kernel.iter().any(|there| there.net == route.net);
                if exists {
                    self.surprised = true;
                    return Outcome::Refused;
                }
                self.kernel.insert(route);
                self.news.push(News::Appeared(route));
            }
            Change::Remove(address) => {
                assert!(self.synced, "{address}: removed before the Services were known");
                assert!(!self.holders.contains_key(&address), "{address}: removed from under its holders");
                assert!(!self.strangers.contains(&address), "{address}: removed, and it was a stranger's");
                if !self.kernel.remove(&route) {
                    return Outcome::WasGone;
                }
                self.news.push(News::Vanished(route));
            }
        }
        Outcome::Done
    }

    /// Lets all come to pass that is due now or later, and looks once more.
    fn come_to_rest(&mut self) {
        for _ in 0..2 {
            self.hear();
            self.look();
            for _ in 0..10 {
                self.settle(Mood::Fine);
                self.now += LINGER;
            }
        }
        self.settle(Mood::Fine);
    }

    fn check(&self) {
        for address in self.holders.keys() {
            assert!(self.kernel.iter().any(|route| route.net.contains(address)), "{address} is held and not local");
            assert!(self.routes.is_local(*address), "{address} is local and that is not known");
        }
        let own: BTreeSet<IpAddr> = self.kernel.iter().filter_map(LocalRoute::own_address).collect();
        assert_eq!(own.len(), self.routes.tally().own, "routes with our number");
        let others = |address: &IpAddr| self.strangers.contains(address) || self.doubtful.contains(address);
        let may_stay = |address: &IpAddr| self.holders.contains_key(address) || others(address);
        let idle: Vec<IpAddr> = own.iter().copied().filter(|address| !may_stay(address)).collect();
        assert!(!self.synced || idle.is_empty(), "nobody wants {idle:?}");
        assert_eq!(self.routes.tally().missing, 0);
    }
}
