//! How many objects were not taken from a source, by kind and reason.
//!
//! Which object, where and why is told by a `Problem`; here is only the count that outlives it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a count stands for where no kind is known: a document or a file that cannot be read.
const NO_KIND: &str = "unknown";

/// Rejected versions of objects. Only grows; owned by the source that reads them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rejections(BTreeMap<Cow<'static, str>, BTreeMap<Cow<'static, str>, u64>>);

impl Rejections {
    /// Counts an object of a kind (`None`: what it is could not be read) that was rejected for a reason.
    pub(crate) fn count(&mut self, kind: Option<&'static str>, reason: &'static str) {
        self.grow(kind.unwrap_or(NO_KIND).into(), reason.into(), 1);
    }

    /// Adds what somebody else has counted.
    pub(crate) fn add(&mut self, other: Self) {
        for (kind, reasons) in other.0 {
            reasons.into_iter().for_each(|(reason, count)| self.grow(kind.clone(), reason, count));
        }
    }

    /// Kind, reason and count, in the order of kinds.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        self.0.iter().flat_map(|(kind, reasons)| {
            reasons.iter().map(move |(reason, count)| (kind.as_ref(), reason.as_ref(), *count))
        })
    }

    /// True where nothing was rejected so far.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn grow(&mut self, kind: Cow<'static, str>, reason: Cow<'static, str>, by: u64) {
        *self.0.entry(kind).or_default().entry(reason).or_default() += by;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_rejections_of_several_kinds_when_counted_then_each_kind_and_reason_has_its_number() {
        let mut all = Rejections::default();
        assert!(all.is_empty());
        all.count(Some("Service"), "decode");
        let mut more = all.clone();
        more.count(None, "permission");

        all.add(more);

        assert_eq!(all.iter().collect::<Vec<_>>(), [("Service", "decode", 2), ("unknown", "permission", 1)]);
        assert_eq!(
            serde_json::to_value(&all).expect("it is JSON"),
            serde_json::json!({"Service": {"decode": 2}, "unknown": {"permission": 1}})
        );
    }
}
