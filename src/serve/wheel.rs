//! A wheel of seconds: which items of a slab to look at, and when.
//!
//! An item stands in the slot of the second in which it may be over. One that has been renewed since is not moved:
//! its owner looks at it when its slot comes up, and enters it again. So a datagram costs the wheel nothing.

use std::mem;
use std::ops::RangeInclusive;

use crate::serve::slab::{Chain, Id, Slab};

/// Seconds that the wheel reaches ahead, and one more for the second that is over. Whoever ends later is looked at
/// once before.
const SLOTS: u32 = 64;

/// Items by the second in which they are due. Owned by `FlowTable`, by value.
#[derive(Debug)]
pub(super) struct Wheel {
    slots: [Chain; SLOTS as usize],
    /// The last second that is over.
    turned: u32,
}

impl Wheel {
    /// An empty wheel that has been turned up to a second.
    pub(super) fn new(turned: u32) -> Self {
        Self { slots: [Chain::default(); SLOTS as usize], turned }
    }

    /// The second in which there may be work next.
    pub(super) fn next(&self) -> u32 {
        self.turned.saturating_add(1)
    }

    /// Goes on to a second with nothing on the wheel.
    pub(super) fn skip_to(&mut self, second: u32) {
        self.turned = self.turned.max(second);
    }

    /// Goes on to a second; for each that has passed, the items are to be taken. At most once around.
    pub(super) fn turn(&mut self, second: u32) -> RangeInclusive<u32> {
        let from = self.next().max(second.saturating_sub(SLOTS - 1));
        self.turned = self.turned.max(second);
        from..=second
    }

    /// The items of a second that has passed. The owner enters each of them again, or removes it.
    pub(super) fn take(&mut self, second: u32) -> Chain {
        mem::take(self.slot(second))
    }

    /// Enters an item that may be over in the second `end`. Returns the second in which it is due: `end`, or as late
    /// as the wheel reaches.
    pub(super) fn enter<T, const N: usize>(&mut self, items: &mut Slab<T, N>, lane: usize, end: u32, id: Id) -> u32 {
        let due = end.clamp(self.next(), self.turned.saturating_add(SLOTS - 1));
        items.append(lane, self.slot(due), id);
        due
    }

    /// Takes out an item that was entered and is due in that second.
    pub(super) fn leave<T, const N: usize>(&mut self, items: &mut Slab<T, N>, lane: usize, due: u32, id: Id) {
        items.detach(lane, self.slot(due), id);
    }

    /// All items, each with the second in which it is due.
    #[cfg(test)]
    pub(super) fn iter<T, const N: usize>(&self, items: &Slab<T, N>, lane: usize) -> impl Iterator<Item = (u32, Id)> {
        let seconds = self.next()..=self.turned + SLOTS - 1;
        let chains = seconds.map(|second| (second, self.slots[(second % SLOTS) as usize]));
        chains.flat_map(move |(second, chain)| items.iter(lane, chain).map(move |(id, _)| (second, id)))
    }

    fn slot(&mut self, second: u32) -> &mut Chain {
        &mut self.slots[(second % SLOTS) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANE: usize = 0;

    /// The items that come up when the wheel is turned.
    fn due(wheel: &mut Wheel, items: &Slab<char, 1>, second: u32) -> String {
        let chains: Vec<_> = wheel.turn(second).map(|passed| wheel.take(passed)).collect();
        chains.into_iter().flat_map(|chain| items.iter(LANE, chain)).map(|(_, item)| item).collect()
    }

    #[test]
    fn given_items_when_the_wheel_turns_then_each_comes_up_in_its_second_and_once() {
        let (mut wheel, mut items) = (Wheel::new(3600), Slab::<char, 1>::default());
        for (item, end) in [('b', 3602), ('a', 3601), ('c', 3663)] {
            let id = items.insert(item);
            assert_eq!(wheel.enter(&mut items, LANE, end, id), end);
        }

        assert_eq!(due(&mut wheel, &items, 3600), "");
        assert_eq!(due(&mut wheel, &items, 3601), "a");
        assert_eq!(due(&mut wheel, &items, 3601), "", "the same second again");
        assert_eq!(due(&mut wheel, &items, 3662), "b");
        assert_eq!(due(&mut wheel, &items, 3663), "c");
    }

    #[test]
    fn given_an_end_out_of_reach_when_entered_then_it_is_due_at_the_rim_and_one_in_the_past_is_due_next() {
        let (mut wheel, mut items) = (Wheel::new(3600), Slab::<char, 1>::default());
        let (far, past) = (items.insert('f'), items.insert('p'));

        assert_eq!(wheel.enter(&mut items, LANE, u32::MAX, far), 3663);
        assert_eq!(wheel.enter(&mut items, LANE, 0, past), 3601);
    }

    #[test]
    fn given_a_long_sleep_when_the_wheel_turns_then_everything_comes_up_in_one_round() {
        let (mut wheel, mut items) = (Wheel::new(3600), Slab::<char, 1>::default());
        for end in 3601..=3663 {
            let id = items.insert('x');
            wheel.enter(&mut items, LANE, end, id);
        }

        assert_eq!(wheel.turn(90_000).count(), 64);
        let taken: usize = (0..64).map(|second| items.iter(LANE, wheel.take(second)).count()).sum();
        assert_eq!(taken, 63);
    }

    #[test]
    fn given_time_that_goes_backwards_when_the_wheel_turns_then_it_stays() {
        let mut wheel = Wheel::new(3600);

        assert_eq!(wheel.turn(3599).count(), 0);
        assert_eq!(wheel.next(), 3601);
    }

    #[test]
    fn given_the_last_second_there_is_when_the_wheel_turns_then_nothing_overflows() {
        let (mut wheel, mut items) = (Wheel::new(u32::MAX - 1), Slab::<char, 1>::default());
        let id = items.insert('x');
        wheel.enter(&mut items, LANE, 0, id);

        assert_eq!(due(&mut wheel, &items, u32::MAX), "x");
        assert_eq!(wheel.next(), u32::MAX);
    }
}
