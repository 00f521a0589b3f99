//! Texts that objects repeat, each kept once: namespaces, names of Services, ports, nodes and zones.

use std::collections::HashSet;
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::name::ObjectName;

/// The texts of one reading. What nobody keeps goes with it.
#[derive(Debug, Default)]
pub(crate) struct Texts {
    texts: HashSet<Arc<str>, RandomState>,
    names: HashSet<ObjectName, RandomState>,
}

impl Texts {
    /// The one copy of a text.
    pub(crate) fn share(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let new: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&new));
        new
    }

    /// The one copy of a name: a Service's slices say it, too.
    pub(crate) fn name(&mut self, namespace: Arc<str>, name: Arc<str>) -> ObjectName {
        let new = ObjectName::new(namespace, name);
        if let Some(known) = self.names.get(&new) {
            return known.clone();
        }
        self.names.insert(new.clone());
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

    #[test]
    fn given_a_name_that_is_met_again_when_shared_then_it_is_the_same_copy() {
        let mut texts = Texts::default();

        let [first, other, again] = ["web", "db", "web"].map(|name| texts.name("default".into(), name.into()));

        assert_eq!([&first, &other], [&ObjectName::parse("web"), &ObjectName::parse("db")]);
        assert!(std::ptr::eq(&*first, &*again));
    }
}
