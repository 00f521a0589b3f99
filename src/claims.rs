//! Who asks for which listen key, and who gets it: the older object, then the first by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::frozen::pack;
use crate::name::{ListenKey, ObjectName};

/// A Service that asks for a key. The least one gets it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claimant {
    /// From `metadata.creationTimestamp`; empty (written by hand) sorts first.
    pub(crate) created: Arc<str>,
    /// Decides between objects of one age.
    pub(crate) service: ObjectName,
}

/// All claims of all Services. Owned by `Plan`, by value.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    /// Sorted, never empty.
    by_key: BTreeMap<ListenKey, Vec<Claimant>>,
}

impl Claims {
    /// Notes that a Service asks for a key. Claimed twice, the Service must be of the same age.
    pub(crate) fn claim(&mut self, key: ListenKey, claimant: Claimant) {
        // `vec![]` of one: nearly every key has one claimant for ever, and there are tens of thousands.
        match self.by_key.get_mut(&key) {
            None => drop(self.by_key.insert(key, vec![claimant])),
            Some(claimants) => {
                if let Err(place) = claimants.binary_search(&claimant) {
                    claimants.insert(place, claimant);
                }
            }
        }
    }

    /// Takes a claim back; what was not claimed stays so.
    pub(crate) fn release(&mut self, key: &ListenKey, service: &ObjectName) {
        let Some(claimants) = self.by_key.get_mut(key) else { return };
        claimants.retain(|claimant| claimant.service != *service);
        if claimants.is_empty() {
            self.by_key.remove(key);
        }
    }

    /// Takes no more memory than it needs, after many claims at once.
    pub(crate) fn pack(&mut self) {
        pack(&mut self.by_key);
    }

    /// The Service that gets the key.
    pub(crate) fn winner(&self, key: &ListenKey) -> Option<&ObjectName> {
        self.claimants(key).next()
    }

    /// All that ask for the key, the winner first.
    pub(crate) fn claimants(&self, key: &ListenKey) -> impl Iterator<Item = &ObjectName> {
        self.by_key.get(key).into_iter().flatten().map(|claimant| &claimant.service)
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
        Claimant { created: created.into(), service: ObjectName::parse(service) }
    }

    #[test]
    fn t029_given_two_claimants_when_judged_then_the_older_wins_and_the_name_decides_between_twins() {
        let mut claims = Claims::default();
        claims.claim(key(), claimant("2024-05-01T00:00:00Z", "c"));
        claims.claim(key(), claimant("2024-05-01T00:00:00Z", "b"));
        assert_eq!(claims.winner(&key()), Some(&ObjectName::parse("b")));

        claims.claim(key(), claimant("2023-01-01T00:00:00Z", "z"));
        assert_eq!(claims.winner(&key()), Some(&ObjectName::parse("z")));
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
