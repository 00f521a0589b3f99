//! Slots with generations, and doubly linked chains that run through them.
//!
//! An id names its item and never a later one in the same slot. An item is on at most one chain of each
//! lane, at no allocation and in constant time; which lanes there are and what they order is the owner's matter.

/// No slot.
const NONE: u32 = u32::MAX;

/// Generations stay below 2³¹, so that an id fits in 63 bits.
const GENERATIONS: u32 = 1 << 31;

/// Names one item of a slab for as long as the item lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    index: u32,
    generation: u32,
}

impl Id {
    /// The slot: below the largest number of items that were alive at once.
    pub fn index(self) -> usize {
        self.index as usize
    }

    /// The id as a number below 2⁶³.
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The id that [`Self::to_bits`] was called on.
    pub fn from_bits(bits: u64) -> Self {
        Self { index: bits as u32, generation: (bits >> 32) as u32 }
    }
}

/// The ends of a chain: first is oldest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    first: u32,
    last: u32,
}

impl Default for Chain {
    fn default() -> Self {
        Self { first: NONE, last: NONE }
    }
}

impl Chain {
    /// True without items.
    pub fn is_empty(self) -> bool {
        self.first == NONE
    }
}

/// Items of one kind, in slots that are used again, with `LANES` chains through each.
#[derive(Debug)]
pub struct Slab<T, const LANES: usize> {
    slots: Vec<Slot<T, LANES>>,
    vacant: u32,
    count: usize,
}

#[derive(Debug)]
struct Slot<T, const LANES: usize> {
    generation: u32,
    /// In a vacant slot, `links[0].after` is the next vacant one.
    links: [Link; LANES],
    item: Option<T>,
}

/// The neighbours of an item on one lane.
#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
}

impl Link {
    const LOOSE: Self = Self { before: NONE, after: NONE };
}

impl<T, const LANES: usize> Default for Slab<T, LANES> {
    fn default() -> Self {
        Self { slots: Vec::new(), vacant: NONE, count: 0 }
    }
}

impl<T, const LANES: usize> Slab<T, LANES> {
    /// How many items are alive.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Stores an item, on no chain.
    pub fn insert(&mut self, item: T) -> Id {
        self.count += 1;
        if self.vacant == NONE {
            self.slots.push(Slot { generation: 0, links: [Link::LOOSE; LANES], item: Some(item) });
            return Id { index: self.slots.len() as u32 - 1, generation: 0 };
        }
        let index = self.vacant;
        let slot = &mut self.slots[index as usize];
        self.vacant = slot.links[0].after;
        slot.links = [Link::LOOSE; LANES];
        slot.item = Some(item);
        Id { index, generation: slot.generation }
    }

    /// Takes an item out. It must be off all chains.
    pub fn remove(&mut self, id: Id) -> Option<T> {
        let slot = self.slots.get_mut(id.index()).filter(|slot| slot.generation == id.generation)?;
        let item = slot.item.take()?;
        slot.generation = (slot.generation + 1) % GENERATIONS;
        slot.links[0].after = self.vacant;
        self.vacant = id.index;
        self.count -= 1;
        Some(item)
    }

    /// The item, if it is alive.
    pub fn get(&self, id: Id) -> Option<&T> {
        self.slots.get(id.index()).filter(|slot| slot.generation == id.generation)?.item.as_ref()
    }

    /// The item, if it is alive.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        self.slots.get_mut(id.index()).filter(|slot| slot.generation == id.generation)?.item.as_mut()
    }

    /// All items, on a chain or not.
    pub fn items(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.item.as_ref())
    }

    /// Puts an item, which is on no chain of that lane, at the end of a chain.
    pub fn append(&mut self, lane: usize, chain: &mut Chain, id: Id) {
        self.link(id.index, lane).before = chain.last;
        self.link(id.index, lane).after = NONE;
        match chain.last {
            NONE => chain.first = id.index,
            last => self.link(last, lane).after = id.index,
        }
        chain.last = id.index;
    }

    /// Takes an item off the chain that it is on.
    pub fn detach(&mut self, lane: usize, chain: &mut Chain, id: Id) {
        let Link { before, after } = std::mem::replace(self.link(id.index, lane), Link::LOOSE);
        match before {
            NONE => chain.first = after,
            before => self.link(before, lane).after = after,
        }
        match after {
            NONE => chain.last = before,
            after => self.link(after, lane).before = before,
        }
    }

    /// The oldest item of a chain.
    pub fn first(&self, chain: Chain) -> Option<Id> {
        self.id_at(chain.first)
    }

    /// The item after this one on its chain. Read it before the item is detached.
    pub fn after(&self, lane: usize, id: Id) -> Option<Id> {
        self.id_at(self.slots[id.index()].links[lane].after)
    }

    /// The items of a chain, oldest first.
    pub fn iter(&self, lane: usize, chain: Chain) -> impl Iterator<Item = (Id, &T)> {
        std::iter::successors(self.first(chain), move |id| self.after(lane, *id))
            .filter_map(|id| self.get(id).map(|item| (id, item)))
    }

    fn id_at(&self, index: u32) -> Option<Id> {
        let slot = self.slots.get(index as usize)?; // NONE is beyond every slot
        Some(Id { index, generation: slot.generation })
    }

    fn link(&mut self, index: u32, lane: usize) -> &mut Link {
        &mut self.slots[index as usize].links[lane]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(slab: &Slab<char, 2>, lane: usize, chain: Chain) -> String {
        slab.iter(lane, chain).map(|(_, item)| item).collect()
    }

    #[test]
    fn given_a_slot_that_was_used_before_when_the_old_id_asks_then_nothing_answers() {
        let mut slab: Slab<char, 1> = Slab::default();
        let old = slab.insert('a');
        slab.remove(old);

        let new = slab.insert('b');

        assert_eq!(new.index(), old.index(), "the slot is used again");
        assert_eq!((slab.get(old), slab.get(new)), (None, Some(&'b')));
        assert_eq!((slab.remove(old), slab.count()), (None, 1));
        assert_eq!(Id::from_bits(new.to_bits()), new);
    }

    #[test]
    fn given_three_items_on_two_lanes_when_one_moves_on_one_lane_then_the_other_lane_stays() {
        let mut slab: Slab<char, 2> = Slab::default();
        let (mut age, mut kind) = (Chain::default(), Chain::default());
        let ids = ['a', 'b', 'c'].map(|item| slab.insert(item));
        for id in ids {
            slab.append(0, &mut age, id);
            slab.append(1, &mut kind, id);
        }

        slab.detach(0, &mut age, ids[0]);
        slab.append(0, &mut age, ids[0]);

        assert_eq!(items(&slab, 0, age), "bca");
        assert_eq!(items(&slab, 1, kind), "abc");
    }

    #[test]
    fn given_a_chain_when_its_items_leave_from_the_middle_and_both_ends_then_it_is_empty() {
        let mut slab: Slab<char, 2> = Slab::default();
        let mut chain = Chain::default();
        let ids = ['a', 'b', 'c'].map(|item| slab.insert(item));
        ids.iter().for_each(|id| slab.append(1, &mut chain, *id));

        slab.detach(1, &mut chain, ids[1]);
        assert_eq!(items(&slab, 1, chain), "ac");
        slab.detach(1, &mut chain, ids[2]);
        assert_eq!(items(&slab, 1, chain), "a");
        slab.detach(1, &mut chain, ids[0]);

        assert!(chain.is_empty());
    }
}
