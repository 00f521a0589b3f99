//! The backends of a balancer at one moment, and the four ways to choose one of them.
//!
//! Pure: turns, and who may be chosen, are arguments. Who swaps tables, counts turns and remembers clients is `balancer`.

use std::sync::Arc;

use crate::plan::{Balance, TcpSettings};
use crate::serve::balancer::Backend;

/// Up to so many picks a walk finds an id as fast as a search does: most tables need no index.
const WALKED: usize = 8;

/// The backends of one balancer at one moment. Immutable: a change stores another table.
#[derive(Debug, Default)]
pub struct Table {
    picks: Arc<[Arc<Backend>]>,
    /// `None` where both lists would be empty, as they mostly are.
    ids: Option<Box<Ids>>,
    balance: Balance,
    seed: u32,
    /// What the Service says about its connections; `None`: as the flags say.
    tcp: Option<Arc<TcpSettings>>,
}

/// What a table knows of its backends by their ids.
#[derive(Debug)]
struct Ids {
    /// Those of the picks with their places, by id; empty where there are few.
    of_picks: Box<[(u32, u32)]>,
    /// Those of the backends that keep what they have and get nothing new.
    draining: Box<[u32]>,
}

impl Table {
    /// `picks` may get new traffic; `serving` (a superset of them) keeps what it has.
    pub fn new(picks: Arc<[Arc<Backend>]>, serving: &[Arc<Backend>]) -> Self {
        let mut of_picks: Box<[_]> = match picks.len() {
            0..=WALKED => Box::default(),
            _ => picks.iter().zip(0..).map(|(backend, place)| (backend.id, place)).collect(),
        };
        of_picks.sort_unstable();
        let draining = serving.iter().map(|backend| backend.id);
        let draining: Box<[_]> = draining.filter(|id| place_of(*id, &picks, &of_picks).is_none()).collect();
        let has_ids = !of_picks.is_empty() || !draining.is_empty();
        let ids = has_ids.then(|| Box::new(Ids { of_picks, draining }));
        Self { picks, ids, ..Self::default() }
    }

    /// Chooses in another way than by turns. The seed makes the chances of one table others than those of the next,
    /// and of the same table on another node.
    pub fn balanced_by(self, balance: Balance, seed: u32) -> Self {
        Self { balance, seed, ..self }
    }

    /// With what the Service says about its connections.
    pub fn with_settings(self, tcp: Option<Arc<TcpSettings>>) -> Self {
        Self { tcp, ..self }
    }

    /// What the Service says about its connections; `None`: as the flags say.
    pub(super) fn settings(&self) -> Option<&Arc<TcpSettings>> {
        self.tcp.as_ref()
    }

    /// The backends that may get new traffic, in the order of picks.
    pub fn picks(&self) -> &[Arc<Backend>] {
        &self.picks
    }

    /// True where the backend may keep its connections and flows.
    pub fn serves(&self, backend: &Backend) -> bool {
        self.place_of(backend.id).is_some() || self.ids.as_ref().is_some_and(|ids| ids.draining.contains(&backend.id))
    }

    /// The backend of an id, if it may be picked now.
    pub(super) fn pick_by_id(&self, id: u32) -> Option<&Arc<Backend>> {
        self.picks.get(self.place_of(id)?).filter(|backend| !backend.is_own())
    }

    fn place_of(&self, id: u32) -> Option<usize> {
        place_of(id, &self.picks, self.ids.as_ref().map_or(&[], |ids| &ids.of_picks))
    }

    /// True where so many more could be ejected, and half of the picks would be left.
    pub(super) fn spares(&self, more: usize) -> bool {
        self.picks.iter().filter(|backend| backend.ejection.is_out()).count() + more <= self.picks.len() / 2
    }

    /// The backend whose turn it is; `None` where it does not go by turns.
    pub(super) fn whose_turn(&self, turn: usize) -> Option<&Arc<Backend>> {
        let by_turns = self.balance == Balance::RoundRobin && !self.picks.is_empty();
        by_turns.then(|| &self.picks[turn % self.picks.len()])
    }

    /// Chooses among the backends that may be chosen; `None` where there is none.
    ///
    /// `turn` grows by one with each choice, for all who choose from the table.
    pub(super) fn choose(&self, turn: usize, may: &impl Fn(&Backend) -> bool) -> Option<&Arc<Backend>> {
        match self.balance {
            Balance::RoundRobin => self.from(turn, may).next(),
            Balance::Random => self.any(self.chance(turn), may),
            // Of equals `min_by_key` takes the first, and that is another one at each turn.
            Balance::LeastConnections => self.from(turn, may).min_by_key(|backend| backend.open_count()),
            Balance::P2c => self.better_of_two(self.chance(turn), may),
        }
    }

    /// Once around, from a turn's place on.
    fn from(&self, turn: usize, may: &impl Fn(&Backend) -> bool) -> impl Iterator<Item = &Arc<Backend>> {
        let first = turn.checked_rem(self.picks.len()).unwrap_or(0);
        let (behind, ahead) = self.picks.split_at(first);
        ahead.iter().chain(behind).filter(move |backend| may(backend))
    }

    fn any(&self, chance: Chance, may: &impl Fn(&Backend) -> bool) -> Option<&Arc<Backend>> {
        let drawn = self.picks.get(chance.below(self.picks.len()))?;
        if may(drawn) {
            return Some(drawn);
        }
        // Not the drawn one's neighbour, which would get its share besides its own.
        let count = self.from(0, may).count();
        self.from(0, may).nth(chance.next().below(count))
    }

    fn better_of_two(&self, chance: Chance, may: &impl Fn(&Backend) -> bool) -> Option<&Arc<Backend>> {
        let one = self.any(chance, may)?;
        let other = self.any(chance.next().next(), &|other: &Backend| other.id != one.id && may(other));
        other.filter(|other| other.open_count() < one.open_count()).or(Some(one))
    }

    fn chance(&self, turn: usize) -> Chance {
        Chance(u64::from(self.seed) << 32).skip(turn as u64)
    }
}

/// The place of an id among the picks, by their list of ids where there is one.
fn place_of(id: u32, picks: &[Arc<Backend>], ids: &[(u32, u32)]) -> Option<usize> {
    if ids.is_empty() {
        return picks.iter().position(|backend| backend.id == id);
    }
    let found = ids.binary_search_by_key(&id, |(id, _)| *id).ok()?;
    Some(ids[found].1 as usize)
}

/// A random number that follows from a seed and a turn alone (SplitMix64): a shared counter is all the state, so
/// that nobody waits, and a test can say what comes.
#[derive(Clone, Copy)]
struct Chance(u64);

impl Chance {
    fn skip(self, turns: u64) -> Self {
        Self(self.0.wrapping_add(turns.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    fn next(self) -> Self {
        Self(self.mixed())
    }

    /// A number below `count`, each as likely; 0 where there is none.
    fn below(self, count: usize) -> usize {
        ((u128::from(self.mixed()) * count as u128) >> 64) as usize
    }

    fn mixed(self) -> u64 {
        let mut bits = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }
}

/// The backends that one connection has tried already.
///
/// The usual connection tries one and forgets it; as many as the connect ladder has steps fit in place.
/// Only where refusals come at once can there be more, and only then is memory taken.
#[derive(Clone, Debug, Default)]
pub struct Tried {
    count: usize,
    first: [u32; Self::IN_PLACE],
    more: Vec<u32>,
}

impl Tried {
    const IN_PLACE: usize = 4;

    /// Notes a try.
    pub fn add(&mut self, backend: &Backend) {
        match self.first.get_mut(self.count) {
            Some(free) => *free = backend.id,
            None => self.more.push(backend.id),
        }
        self.count += 1;
    }

    /// True once the backend was tried.
    pub fn contains(&self, backend: &Backend) -> bool {
        let in_place = self.count.min(Self::IN_PLACE);
        self.first[..in_place].contains(&backend.id) || self.more.contains(&backend.id)
    }

    /// True where the backend may be tried, and was not yet.
    pub(super) fn leaves(&self, backend: &Backend) -> bool {
        !self.contains(backend) && !backend.is_own()
    }

    /// How many were tried.
    pub fn count(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;

    use super::*;

    const PICKS: usize = 30_000;

    fn backends<const N: usize>(ids: [u32; N]) -> [Arc<Backend>; N] {
        ids.map(|id| Arc::new(Backend::new(id, SocketAddr::from(([10, 0, 0, 1], 1_000 + id as u16)))))
    }

    fn table(balance: Balance, picks: &[Arc<Backend>]) -> Table {
        Table::new(picks.to_vec().into(), &[]).balanced_by(balance, 7)
    }

    fn choose<'t>(table: &'t Table, turn: usize, tried: &Tried) -> Option<&'t Arc<Backend>> {
        table.choose(turn, &|backend: &Backend| tried.leaves(backend))
    }

    /// How often each id is chosen by as many turns.
    fn shares(table: &Table, tried: &Tried) -> BTreeMap<u32, usize> {
        let mut shares = BTreeMap::new();
        for backend in (0..PICKS).filter_map(|turn| choose(table, turn, tried)) {
            *shares.entry(backend.id).or_default() += 1;
        }
        shares
    }

    /// Within 5 %, which is five standard deviations and more.
    fn even(shares: &BTreeMap<u32, usize>, parts: usize) -> bool {
        let fair = PICKS / parts;
        shares.len() == parts && shares.values().all(|share| share.abs_diff(fair) < fair / 20)
    }

    fn open(backend: &Backend, count: usize) {
        (0..count).for_each(|_| backend.stats.active_connections.increment());
    }

    #[test]
    fn given_random_when_chosen_then_each_gets_its_share_and_neighbours_do_not_follow_each_other() {
        let table = table(Balance::Random, &backends([1, 2, 3]));

        assert!(even(&shares(&table, &Tried::default()), 3));
        let chosen = |turn| choose(&table, turn, &Tried::default()).map(|backend| backend.id);
        let again = (0..PICKS).filter(|turn| chosen(*turn) == chosen(turn + 1)).count();
        assert!(again.abs_diff(PICKS / 3) < PICKS / 60, "{again}");
    }

    #[test]
    fn given_random_when_one_was_tried_then_all_others_share_what_it_had() {
        let backends = backends([1, 2, 3, 4]);
        let mut tried = Tried::default();
        tried.add(&backends[1]);

        let shares = shares(&table(Balance::Random, &backends), &tried);

        assert!(even(&shares, 3) && !shares.contains_key(&2), "{shares:?}");
    }

    #[test]
    fn given_two_seeds_when_chosen_then_the_tables_do_not_agree() {
        let backends = backends([1, 2, 3]);
        let [one, other] =
            [1, 2].map(|seed| Table::new(backends.to_vec().into(), &[]).balanced_by(Balance::Random, seed));

        let chosen = |table: &Table, turn| choose(table, turn, &Tried::default()).map(|backend| backend.id);
        let same = (0..PICKS).filter(|turn| chosen(&one, *turn) == chosen(&other, *turn)).count();

        assert!(same.abs_diff(PICKS / 3) < PICKS / 60, "{same}");
    }

    #[test]
    fn given_least_connections_when_all_are_idle_then_it_is_by_turns() {
        let table = table(Balance::LeastConnections, &backends([1, 2, 3]));

        let chosen = (0..6).filter_map(|turn| choose(&table, turn, &Tried::default())).map(|backend| backend.id);

        assert_eq!(chosen.collect::<Vec<_>>(), [1, 2, 3, 1, 2, 3]);
    }

    #[test]
    fn given_least_connections_when_each_choice_stays_open_then_the_busy_ones_wait_until_others_have_caught_up() {
        let backends = backends([1, 2, 3]);
        let table = table(Balance::LeastConnections, &backends);
        open(&backends[0], 10);
        open(&backends[1], 4);

        for turn in 0..16 {
            open(choose(&table, turn, &Tried::default()).expect("a backend"), 1);
        }

        assert_eq!(backends.map(|backend| backend.open_count()), [10, 10, 10]);
    }

    #[test]
    fn given_least_connections_when_flows_are_open_then_they_count_as_well() {
        let backends = backends([1, 2]);
        backends[0].stats.active_flows.increment();

        let shares = shares(&table(Balance::LeastConnections, &backends), &Tried::default());

        assert_eq!(shares, BTreeMap::from([(2, PICKS)]));
    }

    #[test]
    fn given_p2c_when_all_are_idle_then_each_gets_its_share() {
        assert!(even(&shares(&table(Balance::P2c, &backends([1, 2, 3])), &Tried::default()), 3));
    }

    #[test]
    fn given_p2c_when_one_is_busiest_then_it_is_never_chosen_as_two_are_never_the_same() {
        let backends = backends([1, 2, 3]);
        open(&backends[1], 1);

        let shares = shares(&table(Balance::P2c, &backends), &Tried::default());

        assert_eq!(shares.keys().copied().collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn given_any_balance_when_all_but_one_were_tried_then_it_is_that_one_and_then_none() {
        let backends = backends([1, 2, 3]);
        for balance in Balance::ALL {
            let table = table(balance, &backends);
            let mut tried = Tried::default();
            for _ in 0..3 {
                let backend = choose(&table, tried.count(), &tried).expect("one is left");
                assert!(!tried.contains(backend), "{balance}");
                tried.add(backend);
            }

            assert!(choose(&table, 3, &tried).is_none(), "{balance}");
            let empty = Table::default().balanced_by(balance, 1);
            assert!(choose(&empty, 0, &Tried::default()).is_none() && empty.whose_turn(0).is_none(), "{balance}");
        }
    }

    #[test]
    fn given_any_balance_when_a_backend_is_our_own_listener_then_it_is_never_chosen() {
        let backends = backends([1, 2, 3]);
        backends[0].set_own(true);

        for balance in Balance::ALL {
            assert!(!shares(&table(balance, &backends), &Tried::default()).contains_key(&1), "{balance}");
        }
    }

    #[test]
    fn given_few_or_many_backends_when_found_by_id_then_each_is_itself() {
        for count in [1, 8, 9, 200] {
            let picks: Vec<_> = (0..count).rev().flat_map(|id| backends([id])).collect();
            let table = Table::new(picks.into(), &[]);

            assert!((0..count).all(|id| table.pick_by_id(id).is_some_and(|backend| backend.id == id)), "{count}");
            assert!(table.pick_by_id(count).is_none());
        }
    }

    #[test]
    fn given_more_tries_than_fit_in_place_when_asked_then_all_are_known() {
        let backends = backends([1, 2, 3, 4, 5, 6, 0]);
        let mut tried = Tried::default();

        for backend in &backends[..6] {
            tried.add(backend);
        }

        assert_eq!(tried.count(), 6);
        assert!(backends[..6].iter().all(|backend| tried.contains(backend)));
        assert!(!tried.contains(&backends[6]), "an empty place is not the id 0");
    }
}
