//! A time in which some kinds of objects cannot be read from the API server, for one cause: its begin, its end, and when
//! to tell that it goes on.
//!
//! Pure. Which failure belongs to which cause, and what is told of it, is `api_report`.

use std::time::Duration;

use tokio::time::Instant;

use crate::stats::WatchedKind;

/// How often it is told that it goes on.
const NEWS: Duration = Duration::from_secs(60);

/// An outage for one cause, where there is one. Owned by the report of the API source.
#[derive(Debug, Default)]
pub(crate) struct Outage(Option<Ongoing>);

#[derive(Debug)]
struct Ongoing {
    since: Instant,
    told: Instant,
    /// That could not be read when they were last asked for.
    kinds: Vec<WatchedKind>,
    failures: u64,
    error: String,
}

/// An outage that goes on, as it is told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct News {
    /// Since it began.
    pub(crate) seconds: u64,
    /// So far.
    pub(crate) failures: u64,
    /// The last one.
    pub(crate) error: String,
    /// `Service, Node`.
    pub(crate) kinds: String,
}

impl Outage {
    /// True while it goes on.
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// True while it goes on for a kind.
    pub(crate) fn has(&self, kind: WatchedKind) -> bool {
        self.0.as_ref().is_some_and(|ongoing| ongoing.kinds.contains(&kind))
    }

    /// A kind could not be read. Begins one where there is none.
    pub(crate) fn fail(&mut self, kind: WatchedKind, error: String, now: Instant) {
        let begin = || Ongoing { since: now, told: now, kinds: Vec::new(), failures: 0, error: String::new() };
        let ongoing = self.0.get_or_insert_with(begin);
        ongoing.failures += 1;
        ongoing.error = error;
        if !ongoing.kinds.contains(&kind) {
            ongoing.kinds.push(kind);
        }
    }

    /// A kind fails for another cause now: nothing is known of this one.
    pub(crate) fn forget(&mut self, kind: WatchedKind) {
        if let Some(ongoing) = &mut self.0 {
            ongoing.kinds.retain(|other| *other != kind);
            if ongoing.kinds.is_empty() {
                self.0 = None;
            }
        }
    }

    /// Leaves out the kinds that can be read again. The length of the outage where that is its end.
    pub(crate) fn keep(&mut self, lasts: impl Fn(WatchedKind) -> bool, now: Instant) -> Option<Duration> {
        self.0.as_mut()?.kinds.retain(|kind| lasts(*kind));
        let ended = self.0.take_if(|ongoing| ongoing.kinds.is_empty())?;
        Some(now.saturating_duration_since(ended.since))
    }

    /// What is to be told, once a minute.
    pub(crate) fn news(&mut self, now: Instant) -> Option<News> {
        let ongoing = self.0.as_mut().filter(|ongoing| now.saturating_duration_since(ongoing.told) >= NEWS)?;
        ongoing.told = now;
        let kinds: Vec<_> = ongoing.kinds.iter().map(ToString::to_string).collect();
        Some(News {
            seconds: now.saturating_duration_since(ongoing.since).as_secs(),
            failures: ongoing.failures,
            error: ongoing.error.clone(),
            kinds: kinds.join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_two_kinds_that_fail_when_both_can_be_read_again_then_it_ends() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        outage.fail(WatchedKind::Service, "a".into(), start);
        outage.fail(WatchedKind::Node, "b".into(), start);
        let later = start + Duration::from_secs(5);

        assert_eq!(outage.keep(|kind| kind == WatchedKind::Node, later), None);
        assert!(outage.is_on() && outage.has(WatchedKind::Node) && !outage.has(WatchedKind::Service));

        assert_eq!(outage.keep(|_| false, later), Some(Duration::from_secs(5)));
        assert!(!outage.is_on());
        assert_eq!(outage.keep(|_| false, later), None, "told once");
    }

    #[test]
    fn given_an_outage_when_asked_all_the_time_then_there_are_news_once_a_minute() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        outage.fail(WatchedKind::Service, "a".into(), start);
        outage.fail(WatchedKind::Service, "b".into(), start);

        let news: Vec<_> = (0..=150).filter_map(|second| outage.news(start + Duration::from_secs(second))).collect();

        let told = |seconds| News { seconds, failures: 2, error: "b".into(), kinds: "Service".into() };
        assert_eq!(news, [told(60), told(120)]);
    }

    #[test]
    fn given_a_kind_that_fails_for_another_cause_when_it_was_the_last_then_nobody_says_that_it_is_well() {
        let (mut outage, now) = (Outage::default(), Instant::now());
        outage.fail(WatchedKind::Node, "a".into(), now);

        outage.forget(WatchedKind::Node);

        assert!(!outage.is_on());
        assert_eq!(outage.keep(|_| false, now), None);
    }
}
