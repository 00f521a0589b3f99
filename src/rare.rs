//! A list that is nearly always empty, and takes one pointer then.
//!
//! A `Vec` takes three words to say that it holds nothing. Ten thousand Services with three endpoints each have a
//! hundred thousand lists of exceptions: hints, problems, external addresses.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// A list for what hardly ever is there. Reads as a slice; grows by [`Extend`].
#[derive(Clone, PartialEq, Eq, Hash)]
#[allow(clippy::box_collection)] // That it is one pointer is the point.
pub struct Rare<T>(Option<Box<Vec<T>>>);

impl<T> Rare<T> {
    /// Adds one at the end.
    pub fn push(&mut self, item: T) {
        self.0.get_or_insert_default().push(item);
    }
}

impl<T> Default for Rare<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Deref for Rare<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.0.as_deref().map_or(&[], Vec::as_slice)
    }
}

impl<T> DerefMut for Rare<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.0.as_deref_mut().map_or(&mut [], Vec::as_mut_slice)
    }
}

impl<T> From<Vec<T>> for Rare<T> {
    fn from(list: Vec<T>) -> Self {
        // No empty list behind a pointer: two that are empty would not be equal.
        Self((!list.is_empty()).then(|| Box::new(list)))
    }
}

impl<T> FromIterator<T> for Rare<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        items.into_iter().collect::<Vec<_>>().into()
    }
}

impl<T> Extend<T> for Rare<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        items.into_iter().for_each(|item| self.push(item));
    }
}

impl<'a, T> IntoIterator for &'a Rare<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: fmt::Debug> fmt::Debug for Rare<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_nothing_when_kept_then_it_is_one_pointer_and_equal_however_it_was_made() {
        let mut extended = Rare::<u8>::default();
        extended.extend([]);

        assert_eq!(size_of::<Rare<u8>>(), size_of::<usize>());
        assert_eq!(extended, Rare::from(Vec::new()));
        assert_eq!(extended, [].into_iter().collect());
    }

    #[test]
    fn given_a_list_when_something_is_added_then_it_stands_behind_what_was_there() {
        let mut list = Rare::from(vec![1, 2]);

        list.extend([3]);
        list.push(4);
        list[0] = 0;

        assert_eq!(*list, [0, 2, 3, 4]);
        assert_eq!(format!("{list:?}"), "[0, 2, 3, 4]");
    }
}
