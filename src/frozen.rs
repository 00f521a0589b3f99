//! An ordered map that is made once and then only read, in exactly the memory that its entries need.
//!
//! A `BTreeMap` of two entries takes the room of eleven. Each of ten thousand Services has two such maps
//! for as long as it lives, nearly all with one or two entries.

use std::collections::BTreeMap;
use std::ops::Index;
use std::slice;

/// Makes an ordered map as small as it can be while it stays one that changes. A map that was filled in the order of its
/// keys has nodes that are half empty: to be called after thousands of entries came at once.
pub(crate) fn pack<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    *map = std::mem::take(map).into_iter().collect();
}

/// Adds entries to an ordered map, new ones or others for known keys. Where they are most of it, the map is made anew,
/// as small as it can be, and leaves no holes in memory where nodes were that grew and split.
pub(crate) fn add_all<K: Ord, V>(map: &mut BTreeMap<K, V>, entries: Vec<(K, V)>) {
    if entries.len() > map.len() {
        map.append(&mut entries.into_iter().collect());
    } else {
        map.extend(entries);
    }
}

/// Entries sorted by key, each key once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen<K, V>(Box<[(K, V)]>);

impl<K: Ord, V> Frozen<K, V> {
    /// The value of a key.
    pub fn get(&self, key: &K) -> Option<&V> {
        let place = self.0.binary_search_by(|(known, _)| known.cmp(key)).ok()?;
        self.0.get(place).map(|(_, value)| value)
    }
}

impl<K, V> Frozen<K, V> {
    /// The entries, by key.
    pub fn iter(&self) -> Entries<'_, K, V> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    /// The keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.0.iter().map(|(key, _)| key)
    }

    /// The values, in the order of their keys.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().map(|(_, value)| value)
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The entries of a [`Frozen`] map, by key.
pub type Entries<'a, K, V> = std::iter::Map<slice::Iter<'a, (K, V)>, fn(&'a (K, V)) -> (&'a K, &'a V)>;

impl<'a, K, V> IntoIterator for &'a Frozen<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Entries<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<K: Ord, V> Index<&K> for Frozen<K, V> {
    type Output = V;

    fn index(&self, key: &K) -> &V {
        self.get(key).expect("a key of this map")
    }
}

impl<K, V> Default for Frozen<K, V> {
    fn default() -> Self {
        Self(Box::default())
    }
}

impl<K, V> From<BTreeMap<K, V>> for Frozen<K, V> {
    fn from(map: BTreeMap<K, V>) -> Self {
        Self(map.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_map_when_packed_then_it_says_the_same() {
        let map: BTreeMap<_, _> = (0..1_000).map(|key| (key, key * key)).collect();

        let mut packed = map.clone();
        pack(&mut packed);

        assert_eq!(packed, map);
    }

    #[test]
    fn given_few_or_many_entries_when_added_then_the_map_has_them_and_the_later_of_two_counts() {
        for count in [1, 3, 1_000] {
            let mut map: BTreeMap<_, _> = (0..10).map(|key| (key, "old")).collect();

            add_all(&mut map, (5..5 + count).rev().map(|key| (key, "new")).collect());

            let wanted = (0..5).map(|key| (key, "old")).chain((5..5 + count).map(|key| (key, "new")));
            let left = (5 + count..10).map(|key| (key, "old"));
            assert_eq!(map, wanted.chain(left).collect());
        }
    }

    #[test]
    fn given_a_map_when_frozen_then_it_says_the_same_in_the_same_order() {
        let map = BTreeMap::from([(3, "c"), (1, "a"), (2, "b")]);

        let frozen = Frozen::from(map.clone());

        assert!(frozen.iter().eq(map.iter()));
        assert!((0..5).all(|key| frozen.get(&key) == map.get(&key)));
        assert_eq!((frozen.len(), frozen.is_empty(), frozen[&2]), (3, false, "b"));
        assert!(Frozen::<u8, u8>::default().is_empty());
    }
}
