//! Who asks for which listen key, and who gets it: the older object, then the first by name.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::iter;

use crate::frozen::pack;
use crate::model::Service;
use crate::name::{ListenKey, ObjectName};
use crate::rare::Rare;
use crate::timestamp::Moment;

/// A Service that asks for a key. The least one gets it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claimant {
    /// From `metadata.creationTimestamp`; without one (written by hand) it is older than all.
    pub(crate) created: Option<Moment>,
    /// Decides between objects of one age.
    pub(crate) service: ObjectName,
}

impl Claimant {
    pub(crate) fn of(service: &Service) -> Self {
        Self { created: Moment::parse(&service.created), service: service.name.clone() }
    }
}

/// Those who ask for one key: nearly always one for ever, and there are tens of thousands.
#[derive(Debug)]
struct Claimants {
    winner: Claimant,
    /// Sorted.
    losers: Rare<Claimant>,
}

impl Claimants {
    fn add(&mut self, mut claimant: Claimant) {
        if claimant < self.winner {
            std::mem::swap(&mut claimant, &mut self.winner);
        }
        if claimant != self.winner && !self.losers.contains(&claimant) {
            self.losers.push(claimant);
            self.losers.sort();
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Claimant> {
        iter::once(&self.winner).chain(&self.losers)
    }

    fn without(self, service: &ObjectName) -> Option<Self> {
        let mut left =
            iter::once(self.winner).chain(self.losers.iter().cloned()).filter(|left| left.service != *service);
        Some(Self { winner: left.next()?, losers: left.collect() })
    }
}

/// All claims of all Services. Owned by `Plan`, by value.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_key: BTreeMap<ListenKey, Claimants>,
}

impl Claims {
    /// Notes that a Service asks for a key. Claimed twice, the Service must be of the same age.
    pub(crate) fn claim(&mut self, key: ListenKey, claimant: Claimant) {
        match self.by_key.entry(key) {
            Entry::Vacant(free) => drop(free.insert(Claimants { winner: claimant, losers: Rare::default() })),
            Entry::Occupied(mut claimants) => claimants.get_mut().add(claimant),
        }
    }

    /// Takes a claim back; what was not claimed stays so.
    pub(crate) fn release(&mut self, key: &ListenKey, service: &ObjectName) {
        let left = self.by_key.remove(key).and_then(|claimants| claimants.without(service));
        self.by_key.extend(left.map(|left| (*key, left)));
    }

    /// Takes no more memory than it needs, after many claims at once.
    pub(crate) fn pack(&mut self) {
        pack(&mut self.by_key);
    }

    /// The Service that gets the key.
    pub(crate) fn winner(&self, key: &ListenKey) -> Option<&ObjectName> {
        self.by_key.get(key).map(|claimants| &claimants.winner.service)
    }

    /// All that ask for the key, the winner first.
    pub(crate) fn claimants(&self, key: &ListenKey) -> impl Iterator<Item = &ObjectName> {
        self.by_key.get(key).into_iter().flat_map(Claimants::iter).map(|claimant| &claimant.service)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::Protocol;

    fn key() -> ListenKey {
        ListenKey::new([127, 0, 0, 1].into(), 30000, Protocol::Tcp)
    }

    fn claimant(created: &str, service: &str) -> Claimant {
        Claimant { created: Moment::parse(created), service: ObjectName::parse(service) }
    }

    #[test]
    fn t029_given_two_claimants_when_judged_then_the_older_wins_and_the_name_decides_between_twins() {
        let mut claims = Claims::default();
        claims.claim(key(), claimant("2024-05-01T00:00:00Z", "c"));
        claims.claim(key(), claimant("2024-05-01T00:00:00Z", "b"));
        assert_eq!(claims.winner(&key()), Some(&ObjectName::parse("b")));

        claims.claim(key(), claimant("2023-01-01T00:00:00Z", "z"));
        assert_eq!(claims.winner(&key()), Some(&ObjectName::parse("z")));
        claims.claim(key(), claimant("", "by-hand"));
        assert_eq!(claims.winner(&key()), Some(&ObjectName::parse("by-hand")));
    }

    #[test]
    fn t029_given_ages_in_two_time_zones_when_judged_then_they_are_compared_as_moments() {
        let mut claims = Claims::default();
        claims.claim(key(), claimant("2024-04-30T23:00:00Z", "a"));
        claims.claim(key(), claimant("2024-05-01T00:30:00+02:00", "b"));

        assert_eq!(claims.winner(&key()), Some(&ObjectName::parse("b")), "half past ten of the day before");
    }

    #[test]
    fn t061_given_the_last_claim_when_released_then_nothing_of_it_is_left() {
        let mut claims = Claims::default();
        claims.claim(key(), claimant("", "a"));
        claims.release(&key(), &ObjectName::parse("other"));
        assert_eq!(claims.winner(&key()), Some(&ObjectName::parse("a")));

        claims.release(&key(), &ObjectName::parse("a"));

        assert!(claims.by_key.is_empty());
    }
}
