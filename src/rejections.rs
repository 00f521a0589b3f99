//! How many objects are not used, or not wholly, by kind and reason.
//!
//! Which object, where and why is told by a `Problem`; here is only the count that outlives it. What cannot be read is
//! counted by the source that reads it, what cannot be served as it is written by `control`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::decode::Kind;
use crate::problem::{Problem, Severity};

/// What a count stands for where no kind is known: a document or a file that cannot be read.
const NO_KIND: &str = "unknown";

/// Why an object that can be read is refused, or a part of it. Sources count under other words.
const REFUSALS: [&str; 6] = ["conflict", "denied_address", "external_ip", "family", "loop", "sctp"];

/// Rejected versions of objects. Only grows; owned by who counts.
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

    /// What is counted here beyond what somebody else has counted.
    pub(crate) fn beyond(&self, other: &Self) -> Self {
        let mut beyond = Self::default();
        for (kind, reasons) in &self.0 {
            for (reason, count) in reasons {
                let known = other.0.get(kind).and_then(|reasons| reasons.get(reason));
                match count.saturating_sub(known.copied().unwrap_or(0)) {
                    0 => {}
                    more => beyond.grow(kind.clone(), reason.clone(), more),
                }
            }
        }
        beyond
    }

    /// Counts the objects that are refused `now` and were not `before`: each once for each reason, as long as it holds.
    pub(crate) fn count_refused(&mut self, before: &[Problem], now: &[Problem]) {
        let before = refused(before);
        refused(now).difference(&before).for_each(|(object, reason)| self.count(kind_of(object), reason));
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

/// Objects, and why they are refused.
fn refused(problems: &[Problem]) -> BTreeSet<(&str, &'static str)> {
    let refusal = |problem: &Problem| REFUSALS.into_iter().find(|reason| problem.reason == *reason);
    let wrong = problems.iter().filter(|problem| problem.severity != Severity::Note);
    wrong.filter_map(|problem| Some((&*problem.object, refusal(problem)?))).collect()
}

fn kind_of(object: &str) -> Option<&'static str> {
    let (kind, _) = object.split_once(' ')?;
    Kind::ALL.into_iter().map(Kind::as_str).find(|known| *known == kind)
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

    #[test]
    fn t234_given_what_two_have_counted_when_the_one_goes_on_from_the_other_then_what_both_know_counts_once() {
        let (mut old, mut new) = (Rejections::default(), Rejections::default());
        (0..3).for_each(|_| old.count(Some("Service"), "decode"));
        old.count(Some("EndpointSlice"), "decode");
        old.count(None, "permission");
        new.count(Some("Service"), "decode");
        new.count(None, "permission");
        new.count(Some("Service"), "sctp");

        let before = old.beyond(&new);
        new.add(before);

        let counts: Vec<_> = new.iter().collect();
        assert_eq!(
            counts,
            [
                ("EndpointSlice", "decode", 1),
                ("Service", "decode", 3),
                ("Service", "sctp", 1),
                ("unknown", "permission", 1)
            ]
        );
        assert!(old.beyond(&old).is_empty());
    }

    #[test]
    fn f4_t031_given_objects_that_are_refused_when_seen_again_then_each_is_counted_once_for_each_reason() {
        let sctp = |line| Problem { line: Some(line), ..Problem::error("Service default/web", "sctp", "port 1/SCTP") };
        let taken = |by| Problem::error("Service default/web", "conflict", format!("taken by {by}"));
        let note = Problem::note("Service default/web", "family", "no cluster IP");
        let other = Problem::error("Service default/web", "decode", "counted by the source");
        let slice = Problem::error("EndpointSlice default/web-1", "denied_address", "multicast");
        let states = [
            vec![sctp(1), sctp(2), note, other],
            vec![sctp(3), taken("a"), slice.clone()],
            vec![taken("b"), slice.clone()],
            vec![slice.clone(), sctp(1)],
        ];
        let mut all = Rejections::default();

        let mut before: &[Problem] = &[];
        for now in &states {
            all.count_refused(before, now);
            before = now;
        }

        assert_eq!(
            all.iter().collect::<Vec<_>>(),
            [("EndpointSlice", "denied_address", 1), ("Service", "conflict", 1), ("Service", "sctp", 2)]
        );
    }
}
