//! Texts that objects repeat, each kept once: namespaces, names of ports, nodes and zones.

use std::collections::HashSet;
use std::sync::Arc;

use foldhash::fast::RandomState;

/// The texts of one reading. What nobody keeps goes with it.
#[derive(Debug, Default)]
pub(crate) struct Texts(HashSet<Arc<str>, RandomState>);

impl Texts {
    /// The one copy of a text.
    pub(crate) fn share(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return Arc::clone(known);
        }
        let new: Arc<str> = text.into();
        self.0.insert(Arc::clone(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_text_that_is_met_again_when_shared_then_it_is_the_same_copy() {
        let mut texts = Texts::default();

        let [first, other, again] = ["http", "https", "http"].map(|text| texts.share(text));

        assert_eq!((&*first, &*other), ("http", "https"));
        assert!(Arc::ptr_eq(&first, &again));
    }
}
